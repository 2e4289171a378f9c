"""What the tables of all records share: Markdown, and the sentence that says where a record was made."""

from collections.abc import Sequence
from typing import Any


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose first row is its header."""
    return ["| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]]


def where(record: dict[str, Any]) -> str:
    """Device, threads, versions, date and commit of a CPU's record, in a sentence."""
    device = record["device"]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    load = f"load average {device['load_average'][0]:.1f} at the start"
    made = record["date"]
    if commit := record.get("commit"):
        made += f", commit {commit[:12]}" + "-dirty" * commit.endswith("-dirty")
    threads = f"{device['threads']} thread" + "s" * (device["threads"] > 1)
    return f"{device['cpu']}, {device['cores']} cores, {threads}, {load}; {versions}; {made}."


def warning(record: dict[str, Any]) -> str:
    """Of a record whose numbers are not to be read; "" for others."""
    return "Toy sizes: these numbers mean nothing." if "--size toy" in record["command"] else ""


def milliseconds(seconds: float) -> str:
    """Three digits."""
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:,.0f}"


def mib(number_of_bytes: float) -> str:
    """Whole MiB, with a digit behind the point where there are few."""
    value = number_of_bytes / 2**20
    return f"{value:.1f}" if value < 10 else f"{value:,.0f}"
