"""An adapter multiplied into a base's weights, tensor by tensor and shard by shard: host memory holds one shard, whatever the model's size.

Every product is computed in fp32 and rounded once, to the dtype that is written.
Shapes: O outputs and I inputs of a linear layer, r rank.
"""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qlora_lightning.console import say
from qlora_lightning.errors import UserError
from qlora_lightning.modeling.adapters import ADAPTER_FILE, adapter_config
from qlora_lightning.modeling.loading import QuantizationSpec
from qlora_lightning.modeling.sources import first_line

INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 2 * 10**9
"""Size of a shard at most (a single larger tensor makes a larger one): what the writing of a merged model holds in memory."""
_PEFT_PREFIX = "base_model.model."


class TensorFiles:
    """Tensors by name in safetensors files, read one at a time; of their shapes only the headers are read.

    Args:
        places: name -> the file that holds it.
    """

    def __init__(self, places: Mapping[str, Path]) -> None:
        self._places = places

    @classmethod
    def of_model(cls, folder: Path) -> "TensorFiles":
        """Those of a model folder of transformers.

        Raises:
            UserError: it has no safetensors, or they are broken.
        """
        index = folder / INDEX_FILE
        if index.is_file():
            return cls({name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()})
        if not (folder / "model.safetensors").is_file():
            raise UserError(
                f"merging reads safetensors, but {folder} holds neither {INDEX_FILE} nor model.safetensors; load the base with "
                "transformers, write it with save_pretrained, and name that folder with --base_model"
            )
        return cls.of_file(folder / "model.safetensors")

    @classmethod
    def of_file(cls, file: Path) -> "TensorFiles":
        """Those of one file.

        Raises:
            UserError: it is broken.
        """
        with _readable(file), safe_open(file, framework="pt") as opened:
            return cls(dict.fromkeys(opened.keys(), file))

    @property
    def names(self) -> list[str]:
        """Of all tensors, in their order."""
        return list(self._places)

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU.

        Raises:
            UserError: its file is broken.
        """
        with _readable(self._places[name]), safe_open(self._places[name], framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor

    def empty(self) -> dict[str, Tensor]:
        """All tensors without their values, on the device ``meta``.

        Raises:
            UserError: a file is broken.
        """
        found = {}
        for file in dict.fromkeys(self._places.values()):
            with _readable(file), safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (no mapping)
                    part = opened.get_slice(name)
                    found[name] = torch.empty(part.get_shape(), dtype=_DTYPES.get(part.get_dtype(), torch.uint8), device="meta")
        return {name: found[name] for name in self._places}


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32}


class _readable:
    """Turns what safetensors raises about a file into one line."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __enter__(self) -> None:
        """Nothing to do yet."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (SafetensorError, OSError)):
            raise UserError(f"{self._file} cannot be read ({first_line(error)}); copy it again or give another") from error


class LowRank(NamedTuple):
    """Where an adapter's two factors for one layer are."""

    a: str
    b: str


class AdapterFactors:
    """The factors of a PEFT adapter folder, read when they are needed.

    Attributes:
        layers: name of the base's weight -> names of the factors.
        r: rank.
        alpha: the product is scaled by alpha / r.

    Raises:
        UserError: the folder holds something that is no LoRA factor of a linear layer.
    """

    def __init__(self, folder: Path) -> None:
        config = adapter_config(folder)
        self.r, self.alpha = config.r, config.lora_alpha
        self._files = TensorFiles.of_file(folder / ADAPTER_FILE)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._files.empty().items()}
        self.layers: dict[str, LowRank] = {}
        for name in self.shapes:
            layer, kind, _ = name.removeprefix(_PEFT_PREFIX).rpartition(".lora_A.weight")
            if kind:
                self.layers[f"{layer}.weight"] = LowRank(name, name.replace(".lora_A.", ".lora_B."))
        known = {name for layer in self.layers.values() for name in layer}
        if unknown := sorted(self.shapes.keys() ^ known):
            raise UserError(
                f"merge knows LoRA on linear layers, but {folder} also holds {unknown[0]} (embeddings, biases and whole modules have no "
                "place in its product); merge that adapter with PEFT's merge_and_unload"
            )

    def check(self, base: Mapping[str, Tensor], tied: bool) -> None:
        """Compare with the tensors of the base.

        Args:
            base: name -> tensor, values not needed.
            tied: whether the output head is the embedding.

        Raises:
            UserError: a layer has no weight of its own in the base, or one of another shape.
        """
        for weight, (a, b) in self.layers.items():
            if weight not in base:
                why = (
                    "the head, which is the embedding here, cannot be changed alone"
                    if tied and "head" in weight
                    else "it has no such weight"
                )
                raise UserError(f"the adapter changes {weight}, but in the base's files {why}; merge it with PEFT's merge_and_unload")
            expected, given = tuple(base[weight].shape), (self.shapes[b][0], self.shapes[a][1])
            if given != expected:
                raise UserError(f"the adapter belongs to another base model: {weight} is {given} there, {expected} here")

    def product(self, weight: str, device: torch.device) -> Tensor:
        """What the adapter adds to a weight: B A alpha / r, fp32 [O, I]."""
        a, b = (self._files.read(name).to(device, torch.float32) for name in self.layers[weight])
        return (b @ a) * (self.alpha / self.r)


def nf4_round_trip(spec: QuantizationSpec, dtype: torch.dtype, device: torch.device) -> Callable[[Tensor], Tensor]:
    """What becomes of a weight that is loaded in ``dtype``, stored in 4 bits and used: the numbers that the adapter was trained on.

    Args:
        spec: how the base was stored while training.
        dtype: of the products while training.
        device: where the weights are quantised.
    """
    import bitsandbytes
    from bitsandbytes.functional import dequantize_4bit

    def round_trip(weight: Tensor) -> Tensor:
        stored: Any = bitsandbytes.nn.Params4bit(
            weight.to(dtype), requires_grad=False, quant_type=spec.quant_type, compress_statistics=spec.double_quant
        )
        stored = stored.to(device)
        used: Tensor = dequantize_4bit(stored.data, stored.quant_state)
        return used

    return round_trip


class Merger:
    """Writes a base with an adapter in it.

    Args:
        base: The base's tensors.
        adapter: The adapter.
        dtype: That is written.
        device: Where products are computed.
    """

    def __init__(self, base: TensorFiles, adapter: AdapterFactors, dtype: torch.dtype, device: torch.device) -> None:
        self._base, self._adapter, self._dtype, self._device = base, adapter, dtype, device
        self._empty = {name: value.to(self._written(value)) for name, value in base.empty().items()}

    @property
    def num_bytes(self) -> int:
        """Of all weights that will be written."""
        return sum(value.nbytes for value in self._empty.values())

    @property
    def tensors(self) -> int:
        """How many they are."""
        return len(self._empty)

    def write(
        self,
        folder: Path,
        stored: Collection[str] = (),
        round_trip: Callable[[Tensor], Tensor] | None = None,
        shard_bytes: int = SHARD_BYTES,
        advance: Callable[[int], None] = lambda tensors: None,
    ) -> None:
        """Write the shards, and their index where there are several, into a folder that exists.

        Args:
            folder: Where.
            stored: Names of the weights that were stored in 4 bits while training; () takes the base's own numbers everywhere.
            round_trip: What that storage makes of a weight.
            shard_bytes: Size of a shard at most.
            advance: Is told how many tensors have become ready.

        Raises:
            UserError: a base's file is broken, or a number is too large for the dtype that is written.
        """
        split = split_torch_state_dict_into_shards(self._empty, max_shard_size=shard_bytes)
        for file, names in split.filename_to_tensors.items():
            shard = {}
            for name in names:
                shard[name] = self.tensor(name, round_trip if name in stored else None)
                advance(1)
            save_file(shard, folder / file, metadata={"format": "pt"})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")

    def tensor(self, name: str, round_trip: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """One tensor as it is written, on the CPU and contiguous."""
        value = self._base.read(name)
        if round_trip is not None:
            value = round_trip(value)
        if name in self._adapter.layers:
            value = value.to(self._device, torch.float32) + self._adapter.product(name, self._device)
        written = value.to(self._written(value))
        if self._dtype == torch.float16 and written.is_floating_point() and not written.isfinite().all() and value.isfinite().all():
            raise UserError(f"{name} has a number beyond what fp16 holds (65,504): {float(value.abs().max()):g}; use --dtype bf16")
        return written.cpu().contiguous()

    def _written(self, value: Tensor) -> torch.dtype:
        return self._dtype if value.is_floating_point() else value.dtype


def base_weights(names: Collection[str]) -> list[str]:
    """Names of a model's parameters inside PEFT's wrapping -> those of the base's own files."""
    return [name.removeprefix(_PEFT_PREFIX).replace(".base_layer.", ".") for name in names]


def say_sizes(merger: Merger) -> None:
    """Tell what will be written."""
    say(f"{merger.tensors} tensors, {merger.num_bytes / 1e9:,.3f} GB a model")
