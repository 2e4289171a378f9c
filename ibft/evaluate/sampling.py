"""Which samples are to be made, with which seeds, and the file that they are appended to, whoever makes them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ibft.errors import InputError
from ibft.evaluate.extraction import Extraction
from ibft.evaluate.jsonl import Row, read_rows, read_text
from ibft.evaluate.problems import Problem

SAMPLES_NAME = "samples.jsonl"
GENERATION_NAME = "generation.json"


@dataclass(frozen=True)
class Request:
    """One sample that is to be made."""

    problem: Problem
    prompt: str
    temperature: float
    sample: int  # index among the samples of the problem at this temperature
    seed: int

    @property
    def identity(self) -> tuple[str, float, int]:
        return self.problem.task_id, self.temperature, self.sample


@dataclass(frozen=True)
class Sampling:
    """How every sample is drawn; its temperature and seed are its own."""

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    top_p: float = 1.0
    top_k: int = 0  # 0: all


def plan(
    problems: Sequence[Problem],
    prompts: Mapping[str, str],
    *,
    temperatures: Sequence[float],
    num_samples: int,
    seed: int,
) -> list[Request]:
    """`num_samples` requests for every problem and temperature; `prompts` by task_id."""
    return [
        Request(
            problem,
            prompts[problem.task_id],
            temperature,
            sample,
            sample_seed(seed, problem.task_id, temperature, sample),
        )
        for temperature in temperatures
        for problem in problems
        for sample in range(num_samples)
    ]


def sample_seed(seed: int, task_id: str, temperature: float, sample: int) -> int:
    """The seed of one sample, in [0, 2^31): a function of these alone, not of what else is generated, or with it."""
    digest = hashlib.sha256(json.dumps([seed, task_id, float(temperature), sample]).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1  # servers disagree on longer ones


class SamplesFile:
    """`samples.jsonl` in a folder, to which samples are appended as they are made, so that a new run goes on.

    Each line says how its sample was made (`settings`); a file of samples made otherwise is refused.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], extraction: Extraction, *, overwrite: bool = False
    ) -> None:
        """Reads what is there, and writes nothing. InputError where it cannot be gone on with."""
        self.path = folder / SAMPLES_NAME
        self._overwrite = overwrite
        self._settings = dict(settings)
        self._extraction = extraction
        self._prompts: dict[tuple[str, float, int], str] = {}  # of the samples there are, as hashes
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--output {str(folder)!r} is a file; name a folder.")
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise InputError(f"--output {str(folder)!r} cannot be written to.")
        if self.path.exists() and not overwrite:
            for number, row in read_rows(self.path, appended=True):
                self._check(row, f"{self.path}, line {number}")

    def __len__(self) -> int:
        return len(self._prompts)

    def pending(self, requests: Sequence[Request]) -> list[Request]:
        """The requests whose samples are not there yet. InputError for one that is there with another prompt."""
        for request in requests:
            if self._prompts.get(request.identity, _digest(request.prompt)) != _digest(request.prompt):
                raise InputError(
                    f"{self.path} has samples of {request.problem.task_id!r} for another prompt; choose another "
                    "--output, or pass --overwrite."
                )
        return [request for request in requests if request.identity not in self._prompts]

    @property
    def recorded(self) -> Mapping[str, Any]:
        """What generation.json says of the samples that are there; {} where none are."""
        file = self.path.with_name(GENERATION_NAME)
        if not self._prompts or not file.is_file():
            return {}
        try:
            return dict(json.loads(read_text(file)))
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{file} cannot be read ({error}); choose another --output, or pass --overwrite."
            ) from error

    def begin(self, record: Mapping[str, Any]) -> None:
        """Makes the folder ready to be appended to; `record`, what was asked for, becomes generation.json."""
        folder = self.path.parent
        folder.mkdir(parents=True, exist_ok=True)
        if self._overwrite:
            self.path.unlink(missing_ok=True)
        elif self.path.exists():
            _drop_half_line(self.path)
        partial = folder / f".{GENERATION_NAME}.partial"
        partial.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, folder / GENERATION_NAME)

    def add(self, request: Request, raw: str, finish_reason: str) -> None:
        """Appends one sample; it is the system's to keep once this returns."""
        row: Row = {
            "task_id": request.problem.task_id,
            "sample": request.sample,
            "temperature": request.temperature,
            "completion": self._extraction(raw, request.problem),
            "raw": raw,
            "finish_reason": finish_reason,
            "seed": request.seed,
            "prompt_sha256": _digest(request.prompt),
            "settings": self._settings,
        }
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(row) + "\n")
        self._prompts[request.identity] = row["prompt_sha256"]

    def _check(self, row: Row, where: str) -> None:
        try:
            identity = (row["task_id"], float(row["temperature"]), row["sample"])
            settings, prompt = dict(row["settings"]), str(row["prompt_sha256"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{where} is none that `ibft eval generate` wrote; choose another --output, or pass --overwrite."
            ) from error
        wanted = json.loads(json.dumps(self._settings))  # lists for tuples
        for name in dict.fromkeys([*wanted, *settings]):
            if settings.get(name) != wanted.get(name):
                raise InputError(
                    f"{where} was generated with {name} {settings.get(name)!r}, not {wanted.get(name)!r}; choose "
                    "another --output, or pass --overwrite."
                )
        self._prompts[identity] = prompt


def _drop_half_line(path: Path) -> None:
    """Cuts off what a power cut or a full disk left of the last line."""
    with path.open("rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)


def _digest(prompt: str) -> str:
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:16]
