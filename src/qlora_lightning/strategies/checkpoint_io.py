"""Checkpoints appear whole or not at all: written beside, flushed to disk, then renamed."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from qlora_lightning.errors import UserError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Local-file checkpoints that survive a kill at any moment: the name always holds the last complete write."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``; ``storage_options`` must be None (remote file systems are not supported)."""
        assert storage_options is None
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(target.name + ".partial")
        with beside.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(target)

    def load_checkpoint(self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint into host memory; only tensors and plain values are unpickled, so a hostile file cannot run code."""
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise UserError(f"no checkpoint at {path}; give --ckpt_path last, a .ckpt file or an adapter folder") from None
        except Exception as error:
            reason = str(error).split("\n")[0][:160]
            raise UserError(f"checkpoint {path} cannot be read ({reason}); use an earlier one of the same folder") from error
        if not isinstance(checkpoint, dict) or not checkpoint.get("qlora_lightning"):
            raise UserError(f"checkpoint {path} was not written by qlora-lightning; give a .ckpt of a run folder's checkpoints/")
        return checkpoint
