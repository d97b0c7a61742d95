"""The README of an adapter folder or of a merged model: what it is, how to use it, what it was trained on and how it fared."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_lightning.redaction import redacted

FP8 = " Products with frozen weights were computed in FP8 (e4m3) while training, which is not paper-exact."
CARD = """---
{front}library_name: peft
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

MERGED = """---
{front}library_name: transformers
pipeline_tag: text-generation
tags: [qlora, merged, qlora-lightning]
---

# {base_model}, finetuned and merged

{base_model} with a LoRA adapter of rank {r} and alpha {alpha} in it, trained by qlora-lightning on the base in {storage}:
{dtype}, {gigabytes:.3f} GB. Neither PEFT nor bitsandbytes is needed to use it.

## Use

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("{folder}", dtype="auto", device_map="auto")
    tokenizer = AutoTokenizer.from_pretrained("{folder}")
    prompt = tokenizer.apply_chat_template([{{"role": "user", "content": "..."}}], add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**prompt.to(model.device), max_new_tokens=256)

The tokenizer's chat template: {template}.

## How near it is to the model that was trained

This folder holds the one called {chosen}: {reason}. "live" is the base in {storage} with the adapter beside it, "original" the
base's own weights with the adapter in them, "dequantized" the same with what storage in 4 bits makes of the weights, on which the
adapter was trained. Measured on {measured}, at {tokens:,} tokens of {rows} rows: means a token, in brackets 95 % intervals over
rows. KL(live || merged) may be {max_kl:g} nats at most unless forced.

{figures}

Made by:

    {command}

The same figures, to all digits, are in `merge.json`.
{data}"""
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def adapter_card(metadata: dict[str, Any], folder: Path) -> str:
    """Markdown for the adapter folder ``folder`` from the metadata that is saved beside it."""
    metrics = [f"| {name} | {value:.6g} |" for name, value in metadata["metrics"].items()]
    data = metadata["data"]
    text = CARD.format(
        folder=folder,
        front=_front(metadata["base_model"], "adapter"),
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
    return redacted(text)


def _base_lines(source: str) -> str:
    """The code that loads a base model in plain transformers; a GGUF file is used as it was converted for training."""
    if not source.endswith(".gguf"):
        return f'    base = AutoModelForCausalLM.from_pretrained("{source}")'
    return (
        "    from qlora_lightning.modeling.sources import resolve_base\n"
        f'    base = AutoModelForCausalLM.from_pretrained(resolve_base("{source}"))'
    )


def _front(base: str, relation: str) -> str:
    """What the hub links the model by; nothing for a local base, as the hub refuses a card whose base is no repository there."""
    local = Path(base).exists() or not _HUB_ID.fullmatch(base)
    return "" if local else f"base_model: {base}\nbase_model_relation: {relation}\n"


def merged_card(
    account: Mapping[str, Any], metadata: Mapping[str, Any], folder: Path, headings: Sequence[str], rows: Sequence[Sequence[str]]
) -> str:
    """Markdown for the folder ``folder`` of a merged model.

    Args:
        account: What ``merge.json`` holds.
        metadata: The adapter's, {} of a plain PEFT one.
        folder: Where the model lies.
        headings: Of the table of figures.
        rows: Of that table.
    """
    base = account["base_model"]
    lines = [f"| {' | '.join(cells)} |" for cells in (headings, ["---", *["---:"] * (len(headings) - 1)], *rows)]
    data = [f"- {key}: {value}" for key, value in metadata.get("data", {}).items()]
    text = MERGED.format(
        front=_front(base, "finetune"),
        base_model=base,
        r=account["lora"]["r"],
        alpha=account["lora"]["alpha"],
        storage=account["live_storage"],
        chosen=account["chosen"],
        reason=account["reason"],
        dtype=account["dtype"],
        gigabytes=account["bytes"] / 1e9,
        folder=folder,
        template=account["chat_template"],
        measured=account["measured_on"],
        tokens=account["tokens"],
        rows=account["rows"],
        max_kl=account["max_kl"],
        figures="\n".join(lines),
        command=account["command"],
        data="\n".join(["", "## Data", "", *data, ""]) if data else "",
    )
    return redacted(text)
