"""A hash that tells base models apart, taken from their files: the same on every device and in every quantisation and dtype."""

import hashlib
import json
from pathlib import Path

from transformers.utils import cached_file

from qlora_lightning.modeling.sources import WEIGHT_FILES, hub_errors, resolve_base

SAMPLES = 256
SAMPLE_BYTES = 4096


def base_fingerprint(source: str, revision: str | None = None) -> str:
    """16 hexadecimal digits for a base model named as in ``resolve_base``, whose files are there.

    Of each file of weights its size and 256 samples of 4 KiB are read, spread evenly: what changed the weights changed some of them. A
    converted GGUF file counts by its own hash, as another version of the converter may write other bytes.
    """
    folder = _folder(resolve_base(source), source, revision)
    digest = hashlib.sha256()
    origin = folder / "source.json"
    if origin.is_file():
        digest.update(json.loads(origin.read_text())["sha256"].encode())
        return digest.hexdigest()[:16]
    for file in sorted(path for pattern in WEIGHT_FILES for path in folder.glob(pattern)):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for number in range(SAMPLES):
                stream.seek(number * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _folder(resolved: str, source: str, revision: str | None) -> Path:
    """The local folder of a base model; of a hub id the one in its cache."""
    if Path(resolved).is_dir():
        return Path(resolved)
    with hub_errors(source):
        config = cached_file(resolved, "config.json", revision=revision or "main")
    assert config is not None
    return Path(config).parent
