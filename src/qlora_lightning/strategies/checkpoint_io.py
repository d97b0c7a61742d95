"""Checkpoints appear whole or not at all: written beside, flushed to disk, then renamed. What is read is checked byte for byte."""

import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from qlora_lightning.disk import sync
from qlora_lightning.errors import UserError

PARTIAL = ".partial"
"""Ends the name of a file that is being written."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Local-file checkpoints that survive a kill at any moment: the name always holds the last complete write."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``; ``storage_options`` must be None (remote file systems are not supported).

        Raises:
            Exception: it cannot be written. What was there before still is, and nothing is left of the attempt.
        """
        assert storage_options is None
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(target.name + PARTIAL)
        try:
            with beside.open("wb") as file:
                torch.save(checkpoint, file)
            sync(beside)
            beside.replace(target)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        sync(target.parent)

    def load_checkpoint(self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None) -> dict[str, Any]:
        """As ``load_whole``, into host memory."""
        return load_whole(Path(path))


class DamagedCheckpoint(Exception):
    """A file that is no whole checkpoint; the text says why."""


def load_whole(path: Path, lazily: bool = False) -> dict[str, Any]:
    """As ``read_checkpoint``, for a user who asked for this file.

    Raises:
        UserError: it is missing, damaged or not ours; where a whole one lies beside it, the line says how to go on from that.
    """
    try:
        return read_checkpoint(path, lazily)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}; give --ckpt_path last, a .ckpt file or an adapter folder") from None
    except DamagedCheckpoint as error:
        raise UserError(f"checkpoint {path} is damaged ({error}); {_way_on(path)}") from error


def read_checkpoint(path: Path, lazily: bool = False) -> dict[str, Any]:
    """The checkpoint at ``path``; only tensors and plain values are unpickled, so a hostile file cannot run code.

    Args:
        path: A file.
        lazily: Leave the tensors in the file until they are looked at.

    Raises:
        FileNotFoundError: there is none.
        DamagedCheckpoint: it is cut short, or its bytes are not those that were written.
        UserError: it was not written by this tool.
    """
    try:
        with zipfile.ZipFile(path) as records:  # torch writes a checksum of every record, and does not look at it
            broken = records.testzip()
        if broken is not None:
            raise DamagedCheckpoint(f"the bytes of its record {broken} are not those that were written")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=lazily)
    except (FileNotFoundError, DamagedCheckpoint):
        raise
    except Exception as error:
        raise DamagedCheckpoint((str(error).strip() or type(error).__name__).split("\n")[0][:160]) from error
    if not isinstance(checkpoint, dict) or not checkpoint.get("qlora_lightning"):
        raise UserError(f"checkpoint {path} was not written by qlora-lightning; give a .ckpt of a run folder's checkpoints/")
    return checkpoint


def furthest_checkpoint(folder: Path, but: Path | None = None) -> tuple[int, Path] | None:
    """The whole checkpoint of most optimizer steps in a folder, and its steps; None where there is none.

    Args:
        folder: That of a run's checkpoints.
        but: A file that is not to be looked at, under none of its names.
    """
    found = []
    for path in sorted(folder.glob("*.ckpt")):
        if but is None or not path.samefile(but):
            with suppress(DamagedCheckpoint, UserError, OSError):
                found.append((int(read_checkpoint(path, lazily=True)["global_step"]), path))
    return max(found, default=None)


def _way_on(damaged: Path) -> str:
    """How to go on without ``damaged``."""
    whole = furthest_checkpoint(damaged.parent, but=damaged)
    if whole is None:
        return "no other in its folder is whole; begin anew with --overwrite, or from an adapter folder (--ckpt_path FOLDER)"
    return f"the furthest whole one is of step {whole[0]}: go on with --ckpt_path {whole[1]}"
