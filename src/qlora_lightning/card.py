"""The README of an adapter folder: what it is, how to use it, what it was trained on and how it fared."""

from pathlib import Path
from typing import Any

FP8 = " Products with frozen weights were computed in FP8 (e4m3) while training, which is not paper-exact."
CARD = """---
base_model: {base_model}
library_name: peft
tags: [qlora, lora, qlora-lightning]
---

# LoRA adapter for {base_model}

Trained with QLoRA by qlora-lightning: {quant_type}{double}, rank {r}, alpha {alpha}, {step} optimizer steps.{compute}

## Use

    qlora-lightning chat {folder}

or in plain PEFT, on the untouched base model:

    from peft import PeftModel
    from transformers import AutoModelForCausalLM
{base}
    model = PeftModel.from_pretrained(base, "{folder}")

Prompts are rendered with the template `{template}`{system}.

## Data

{data}

## Metrics at step {step}

{metrics}

The whole configuration is in `recipe.yaml`; the fingerprint of the base model's weights is `{base_fingerprint}`.
"""


def adapter_card(metadata: dict[str, Any], folder: Path) -> str:
    """Markdown for the adapter folder ``folder`` from the metadata that is saved beside it."""
    metrics = [f"| {name} | {value:.6g} |" for name, value in metadata["metrics"].items()]
    data = metadata["data"]
    return CARD.format(
        folder=folder,
        base_model=metadata["base_model"],
        base=_base_lines(metadata["base_model"]),
        base_fingerprint=metadata["base_fingerprint"],
        quant_type=metadata["quantization"]["quant_type"].upper(),
        double=" with double quantisation" if metadata["quantization"]["double_quant"] else "",
        r=metadata["lora"]["r"],
        alpha=metadata["lora"]["alpha"],
        step=metadata["step"],
        compute=FP8 if metadata.get("compute") == "fp8" else "",
        template=metadata["template"],
        system=f" and the system prompt {metadata['system_prompt']!r}" if metadata["system_prompt"] else "",
        data="\n".join(f"- {key}: {value}" for key, value in data.items()),
        metrics="\n".join(["| metric | value |", "|---|---|", *metrics]),
    )


def _base_lines(source: str) -> str:
    """The code that loads a base model in plain transformers; a GGUF file is used as it was converted for training."""
    if not source.endswith(".gguf"):
        return f'    base = AutoModelForCausalLM.from_pretrained("{source}")'
    return (
        "    from qlora_lightning.modeling.sources import resolve_base\n"
        f'    base = AutoModelForCausalLM.from_pretrained(resolve_base("{source}"))'
    )
