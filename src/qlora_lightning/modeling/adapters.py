"""LoRA by PEFT on every linear layer of the blocks, and the adapter folder: PEFT's format plus what is needed to use it rightly."""

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from qlora_lightning.errors import UserError
from qlora_lightning.modeling.sources import first_line

METADATA_FILE = "qlora_lightning.json"
ADAPTER_FILE = "adapter_model.safetensors"
ALL_LINEAR = "all-linear"
_METADATA: dict[str, type] = {
    "base_model": str,
    "revision": str,
    "base_fingerprint": str,
    "compute": str,
    "quantization": dict,
    "template": str,
    "system_prompt": str,
}
"""What readers of the metadata rely on, each None where it is not known; the file may come from anywhere."""
_CONFIG: dict[str, type] = {"r": int, "lora_alpha": int}


@dataclass
class LoRASpec:
    """The low-rank adapters."""

    r: int = 64
    """Rank (QLoRA paper: 64; with adapters on every linear layer the rank hardly matters)."""
    alpha: int = 16
    """The adapter's output is scaled by alpha / r."""
    dropout: float = 0.1
    """Dropout on the adapter's input (QLoRA paper: 0.1 for 7B and 13B, 0.05 for 33B and 65B)."""
    target_modules: list[str] = field(default_factory=lambda: [ALL_LINEAR])
    """Names of the linear layers that get an adapter; `all-linear` is every linear layer of the blocks."""

    def __post_init__(self) -> None:
        if self.r < 1 or self.alpha < 1:
            raise UserError(f"model.lora.r and model.lora.alpha must be 1 or more, got {self.r} and {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.lora.dropout must be at least 0 and below 1, got {self.dropout}")


def attach_lora(base: PreTrainedModel, spec: LoRASpec) -> PeftModel:
    """Put an adapter with fp32 weights on the layers that ``spec`` names. A is random, drawn from torch's global generator; B is zero."""
    targets = ALL_LINEAR if spec.target_modules == [ALL_LINEAR] else spec.target_modules
    config = LoraConfig(
        r=spec.r, lora_alpha=spec.alpha, lora_dropout=spec.dropout, target_modules=targets, bias="none", task_type="CAUSAL_LM"
    )
    try:
        model = get_peft_model(base, config)
    except ValueError as error:
        raise UserError(f"model.lora.target_modules {spec.target_modules} match no layer ({str(error).splitlines()[0][:160]})") from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    assert isinstance(model, PeftModel)
    return model


def norms_to_fp32(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Keep normalisation weights in fp32, as the paper's authors do, and give what they put out in ``dtype``; nothing else is upcast.

    An fp32 weight would otherwise make the norm's output fp32, then that of every 4-bit layer behind it (bitsandbytes answers in the
    dtype it is asked in), and so the whole residual stream: a quarter more time at 7B, and 2 GiB more at 16 x 512
    tokens, for the same products (benchmarks/2026-11-23-fit-7b-h200.md).
    """
    for name, module in model.named_modules():
        if "norm" in name.rsplit(".", 1)[-1] and not list(module.children()):
            for parameter in module.parameters():
                parameter.data = parameter.data.float()
            module.register_forward_hook(lambda module, inputs, output: output.to(dtype))


def save_adapter(model: PeftModel, folder: Path, metadata: dict[str, Any], card: str) -> None:
    """Write PEFT's adapter folder with a card and, last, our metadata. Also there: a hash of the weights, as their format has none.

    Args:
        model: A model with an adapter.
        folder: Made where it is missing.
        metadata: JSON; see ``module.QLoRAModule.metadata``.
        card: Markdown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # host copies: PEFT would clone, on the device, tensors that share memory, as those of a flat adapter do
    weights = {name: value.detach().to("cpu", copy=True) for name, value in model.named_parameters() if ".lora_" in name}
    # embedding layers by "auto", the default, would be looked for in the base's vocabulary on the hub
    model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
    shutil.copymode(folder / "adapter_config.json", folder / ADAPTER_FILE)  # safetensors does not heed the umask
    (folder / "README.md").write_text(card)
    metadata = metadata | {"adapter_sha256": _sha256(folder / ADAPTER_FILE)}
    (folder / METADATA_FILE).write_text(json.dumps(metadata, indent=2) + "\n")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def adapter_metadata(folder: Path) -> dict[str, Any]:
    """What ``save_adapter`` wrote; {} for a folder written by PEFT alone.

    Raises:
        UserError: this is not an adapter folder, or what was written there is broken.
    """
    if not (folder / "adapter_config.json").is_file() or not (folder / ADAPTER_FILE).is_file():
        raise UserError(f"{folder} is not an adapter folder: it needs adapter_config.json and {ADAPTER_FILE}")
    file = folder / METADATA_FILE
    values = _read_json(file) if file.is_file() else {}
    _check_types(values, _METADATA, file)
    return values


def adapter_config(folder: Path) -> LoraConfig:
    """PEFT's own configuration of an adapter folder.

    Raises:
        UserError: it is broken, or asks for more than ``LoRASpec`` can say, which would be lost without a word.
    """
    file = folder / "adapter_config.json"
    values = _read_json(file)
    if values.get("peft_type") != "LORA":
        raise UserError(f"{folder} must hold a LoRA adapter, got peft_type {values.get('peft_type')}; give another adapter")
    for name in ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern"):
        if values.get(name):
            raise UserError(f"{folder} needs plain LoRA with one r and alpha, got {name} {values[name]}; use it with PEFT, or give another")
    _check_types(values, _CONFIG, file)
    targets = values.get("target_modules") or []
    if not isinstance(targets, str | list) or not all(isinstance(one, str) for one in targets):
        raise UserError(f"{file}: target_modules must be names of layers, got {targets!r}; copy the adapter again or give another")
    try:
        return LoraConfig.from_pretrained(str(folder))
    except (TypeError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({first_line(error)}); copy the adapter again or give another") from error


def _check_types(values: dict[str, Any], kinds: dict[str, type], file: Path) -> None:
    for name, kind in kinds.items():
        if values.get(name) is not None and not isinstance(values[name], kind):
            found = type(values[name]).__name__
            raise UserError(f"{file}: {name} must be {kind.__name__}, got {found}; copy the adapter again or give another")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or lists without an end
        raise UserError(f"{file} is not JSON ({first_line(error)}); copy the adapter again or give another") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} must hold one JSON object, got {type(values).__name__}; copy the adapter again or give another")
    return values


def load_adapter(model: PeftModel, folder: Path, base_fingerprint: str) -> None:
    """Copy an adapter folder's weights into the attached adapter.

    Args:
        model: A 4-bit base with an adapter.
        folder: The adapter folder.
        base_fingerprint: That of the model's base, to be compared with the one that the folder records.

    Raises:
        UserError: its files are broken, or its tensors are not those of this model's adapter (another rank, other layers, another base).
    """
    metadata = adapter_metadata(folder)
    if metadata.get("base_fingerprint", base_fingerprint) != base_fingerprint:
        raise UserError(
            f"{folder} was trained on {metadata['base_model']} with other weights ({metadata['base_fingerprint']}) than this base model "
            f"({base_fingerprint}); give the base that it was trained on"
        )
    alpha, mine = adapter_config(folder).lora_alpha, getattr(model.peft_config["default"], "lora_alpha", None)
    try:
        weights = load_file(folder / ADAPTER_FILE)
    except SafetensorError as error:
        raise UserError(f"{folder / ADAPTER_FILE} cannot be read ({first_line(error)}); copy the adapter again or give another") from error
    if metadata.get("adapter_sha256") not in (None, _sha256(folder / ADAPTER_FILE)):
        raise UserError(f"{folder / ADAPTER_FILE} is not what was written (its SHA-256 differs); copy the adapter again or give another")
    broken = next((name for name, value in weights.items() if not value.isfinite().all()), None)
    if broken is not None:
        raise UserError(f"{folder / ADAPTER_FILE} holds NaN or infinity in {broken}, of which no answer comes; give another adapter")
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    check_adapter_shapes(
        {name: tuple(value.shape) for name, value in weights.items()},
        {name: tuple(value.shape) for name, value in expected.items()},
        str(folder),
    )
    if alpha != mine:
        raise UserError(f"{folder} was trained with alpha {alpha}, this recipe says {mine}; set model.lora.alpha: {alpha}")
    set_peft_model_state_dict(model, weights)


def check_adapter_shapes(given: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], source: str) -> None:
    """Compare tensor names and shapes, and say in one line what differs and what to set."""
    ranks = {shape[0] for name, shape in given.items() if "lora_A" in name}
    rank = {shape[0] for name, shape in expected.items() if "lora_A" in name}
    if ranks != rank:
        raise UserError(
            f"{source} holds an adapter of rank {_join(ranks)}, this recipe says {_join(rank)}; set model.lora.r: {_join(ranks)}"
        )
    if given.keys() != expected.keys():
        example = sorted(given.keys() ^ expected.keys())[0]
        raise UserError(
            f"{source} has adapters on other layers than this recipe ({example}, for one); set model.lora.target_modules as it had"
        )
    for name, shape in given.items():
        if shape != expected[name]:
            raise UserError(f"{source} belongs to another base model: {name} is {shape} there, {expected[name]} here")


def _join(values: set[int]) -> str:
    return ", ".join(map(str, sorted(values)))
