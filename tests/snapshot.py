"""What a folder holds, to be compared with what it holds later."""

import hashlib
from pathlib import Path


def contents(folder: Path) -> dict[str, str]:
    """Every file and folder below, by its path from there, with the digest of what it holds."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }
