"""The two models that an adapter could be merged into, written, loaded in plain transformers and measured, one after the other."""

import gc
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_lightning.console import say
from qlora_lightning.errors import UserError
from qlora_lightning.evaluation.counting import counting
from qlora_lightning.export.evidence import LiveRecord, Measured, Row, scored_tokens
from qlora_lightning.export.weights import Merger, base_weights, nf4_round_trip
from qlora_lightning.modeling.loading import QuantizationSpec
from qlora_lightning.modeling.sources import quiet_transformers
from qlora_lightning.modeling.trained import TrainedModel

Base = Literal["original", "dequantized"]
"""What the adapter is added to: the base's own weights, or what their storage in 4 bits has made of them."""


class Live(NamedTuple):
    """What the live model leaves behind."""

    measured: Measured
    stored: list[str]
    """Names of the base's weights that it holds in 4 bits."""
    dtype: torch.dtype
    """Of its products."""
    device: torch.device


def record_live(live: TrainedModel, rows: Sequence[Row], record: LiveRecord) -> Live:
    """Let the live model speak first."""
    stored = base_weights([name for name, parameter in live.model.named_parameters() if hasattr(parameter, "quant_state")])
    with counting("the live model", scored_tokens(rows), "tokens") as advance:
        measured = record.record(live.model, live.computing, live.device, advance)
    return Live(measured, stored, live.dtype, live.device)


@dataclass
class Candidates:
    """Merged models in folders of their own, of which the best gets a name.

    Args:
        merger: Writes them.
        live: What the live model left.
        quantization: How the base was stored while training; None where it was not in 4 bits, so that there is one candidate only.
        record: What the live model said.
        rows: That it was said of.
    """

    merger: Merger
    live: Live
    quantization: QuantizationSpec | None
    record: LiveRecord
    rows: Sequence[Row]

    @property
    def bases(self) -> list[Base]:
        """The candidates there are."""
        return ["original"] if self.quantization is None else ["original", "dequantized"]

    def make(self, base: Base, folder: Path, settings: Callable[[Path], Any]) -> Measured:
        """Write one, load what was written, and measure that.

        Args:
            base: Which.
            folder: To be made; the model lies there afterwards.
            settings: Writes everything but the weights into it.

        Raises:
            UserError: it cannot be written, or does not load whole.
        """
        folder.mkdir()
        settings(folder)
        with counting(f"merging, {base}", self.merger.tensors, "tensors") as advance:
            self.merger.write(folder, *self._storage(base), advance=advance)
        for file in folder.glob("*.safetensors"):  # which safetensors lets nobody but their owner read
            file.chmod((folder / "config.json").stat().st_mode)
        free_memory()  # of the products: what is free decides how much of the model lies on the device
        model = load_merged(folder, self._dtype, self.live.device)
        with counting(f"merged, {base}", scored_tokens(self.rows), "tokens") as advance:
            measured = self.record.compare(model, nullcontext, self.live.device, advance)
        del model
        free_memory()
        shutil.rmtree(_offload(folder), ignore_errors=True)
        return measured

    def _storage(self, base: Base) -> tuple[list[str], Callable[[Tensor], Tensor] | None]:
        if base == "original":
            return [], None
        assert self.quantization is not None
        return self.live.stored, nf4_round_trip(self.quantization, self.live.dtype, self.live.device)

    @property
    def _dtype(self) -> torch.dtype | None:
        """Measured as it is written, but in fp32 where the live model computes so: a device without bf16 would take hours."""
        return torch.float32 if self.live.dtype == torch.float32 else None


def load_merged(folder: Path, dtype: torch.dtype | None, device: torch.device) -> Any:
    """A merged model by plain transformers, in eval mode, on as much of the device as it needs; what has no place there stays on disk.

    Args:
        folder: The model.
        dtype: None: as it is written.
        device: Where inputs are put.

    Raises:
        UserError: tensors are missing: transformers reads this model's files in a way that merging does not know.
    """
    placing: Any = {"device_map": "auto", "offload_folder": _offload(folder)} if device.type == "cuda" else {"device_map": {"": "cpu"}}
    loaded: Any
    with quiet_transformers():
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or "auto", output_loading_info=True, use_safetensors=True, trust_remote_code=False, **placing
        )
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"the merged model would load without {missing[0]} ({len(missing)} tensors missing): transformers converts this model's files "
            "as it reads them, which merging does not; merge the adapter with PEFT's merge_and_unload"
        )
    return model.eval()


def _offload(folder: Path) -> Path:
    """Where transformers puts the part of a model that has no place in memory; it is read at every forward."""
    return folder.with_name(f"{folder.name}.offload")


def free_memory() -> None:
    """Give back what a deleted model held, before the next one is loaded: together they might not fit."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def announce(tokens: int, rows: int, source: str) -> None:
    """Tell what is measured on."""
    say(f"Measuring on {tokens:,} scored tokens of {rows:,} rows: {source}")
