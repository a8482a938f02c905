"""Calls that were wrong once, as files: one a call, JSON, made again from seeds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from cuattn.errors import ArgumentError
from cuattn.testing.fuzzing.case import Case
from cuattn.testing.fuzzing.engine import Failure

__all__ = ["files", "load", "save"]


def save(folder: Path, failure: Failure) -> Path:
    """Write a failure into a folder, which is made if it is not there, and return the file.

    Its name says the operation; the same call gets the same name. Beside the call it holds the error that was found.
    """
    content = json.loads(failure.case.to_json()) | {"found": failure.error}
    digest = hashlib.sha256(failure.case.to_json().encode()).hexdigest()[:10]
    path = folder / f"{failure.case.operation}-{digest}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ArgumentError(f"cannot write {path}: {error.strerror}") from error
    return path


def files(place: Path) -> Iterator[Path]:
    """List the files of a folder, in the order of their names; a file is itself."""
    if place.is_dir():
        yield from sorted(place.glob("*.json"))
    else:
        yield place


def load(path: Path) -> Case:
    """Read a case. Raises `ArgumentError` if there is none."""
    try:
        return Case.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"cannot read {path}: {error}") from error
    except ArgumentError as error:
        raise ArgumentError(f"{path}: {error}") from error
