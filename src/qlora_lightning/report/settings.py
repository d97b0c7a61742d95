"""What a run was told to do, as lines to compare: the main settings by name, and whatever else differs between runs."""

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from qlora_lightning.report.reading import Run

MAIN = {
    "LoRA rank r": "model.lora.r",
    "LoRA alpha": "model.lora.alpha",
    "LoRA dropout": "model.lora.dropout",
    "LoRA layers": "model.lora.target_modules",
    "4-bit type": "model.quantization.quant_type",
    "double quantisation": "model.quantization.double_quant",
    "computes in": "model.compute",
    "learning rate": "model.optimizer.learning_rate",
    "schedule": "model.optimizer.schedule",
    "warm-up steps": "model.optimizer.warmup_steps",
    "gradient clipping": "trainer.gradient_clip_val",
    "examples a step": "data.global_batch_size",
    "microbatches a step": "trainer.accumulate_grad_batches",
    "epochs": "trainer.max_epochs",
    "steps at most": "trainer.max_steps",
    "longest example": "data.dataset.max_length",
    "packing": "data.packing",
    "grouped by length": "data.group_by_length",
    "template": "data.dataset.template",
    "trained on the source": "data.dataset.train_on_source",
    "gradient checkpointing": "trainer.strategy.init_args.gradient_checkpointing",
    "seed": "seed_everything",
}
"""What a reader wants to know of every run -> its key in config.yaml."""

_OF_NO_EFFECT = ("trainer.default_root_dir", "trainer.logger", "overwrite", "json", "ckpt_path", "trainer.enable_", "model.base_model")


class Setting(NamedTuple):
    """One line of the comparison."""

    name: str
    values: list[str]
    """One a run."""
    differs: bool


def compare_settings(runs: Sequence[Run]) -> list[Setting]:
    """Base model, data set and main settings of every run, then the other settings in which they differ, under their keys."""
    flat = [_flatten(run.config) for run in runs]
    named = {"base model": [base_model(run) for run in runs], "data set": [data_set(run) for run in runs]}
    named |= {name: [_show(one.get(key)) for one in flat] for name, key in MAIN.items()}
    named["steps at most"] = ["-" if value == "-1" else value for value in named["steps at most"]]  # Lightning's word for no limit
    others = sorted({key for one in flat for key in one} - {*MAIN.values()})
    shown_above = (*_OF_NO_EFFECT, *(["data.dataset.name", "data.dataset.path"] if len({*named["data set"]}) > 1 else []))
    named |= {key: [_show(one.get(key)) for one in flat] for key in others if not key.startswith(shown_above) and _differ(key, flat)}
    return [Setting(name, values, len({*values}) > 1) for name, values in named.items() if {*values} != {"-"}]


def base_model(run: Run) -> str:
    """The base model as the recipe names it; - where nothing tells."""
    return str(_flatten(run.config).get("model.base_model") or run.adapter.get("base_model") or "-")


def data_set(run: Run) -> str:
    """The data sets' names as the recipe has them: the set's, and those mixed in; - where nothing tells."""
    data = run.config.get("data")
    data = data if isinstance(data, dict) else {}
    mix = data.get("mix")
    names = [_set_name(one) for one in (data.get("dataset"), *(mix if isinstance(mix, list) else []))]
    recorded = run.adapter.get("data")
    return " + ".join(filter(None, names)) or str((recorded if isinstance(recorded, dict) else {}).get("data set") or "-")


def _set_name(spec: Any) -> str:
    if not isinstance(spec, dict):
        return "" if spec is None else PurePath(str(spec)).stem
    if isinstance(inner := spec.get("dataset"), dict | str):
        return _set_name(inner)
    return str(spec.get("name") or PurePath(str(spec.get("path") or "")).stem or spec.get("hub_id") or "")


def _differ(key: str, flat: Sequence[dict[str, Any]]) -> bool:
    return len({_show(one.get(key)) for one in flat}) > 1 and all(flat)  # a run without config.yaml differs in everything


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {name: leaf for key, inner in value.items() for name, leaf in _flatten(inner, f"{prefix}.{key}" if prefix else str(key)).items()}


def _show(value: Any) -> str:
    if value is None or value == []:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_show, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
