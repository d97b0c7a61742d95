"""The README of an adapter folder."""

from pathlib import Path

import pytest

from qlora_lightning.card import adapter_card

METADATA = {
    "base_fingerprint": "0123456789abcdef",
    "quantization": {"quant_type": "nf4", "double_quant": True},
    "lora": {"r": 16, "alpha": 32},
    "template": "chatml",
    "system_prompt": None,
    "data": {"data set": "mine", "training rows": 7},
    "step": 3,
    "metrics": {"val/loss": 0.5},
}


@pytest.mark.parametrize("source, loads", [("some/hub-id", '"some/hub-id"'), ("package://p/m.gguf", 'resolve_base("package://p/m.gguf")')])
def test_card_shows_code_that_loads_the_adapter(source: str, loads: str) -> None:
    card = adapter_card({**METADATA, "base_model": source}, Path("runs/x/checkpoints/last"))
    assert f"base = AutoModelForCausalLM.from_pretrained({loads})" in card
    code = "\n".join(line[4:] for line in card.splitlines() if line.startswith("    ") and "qlora-lightning chat" not in line)
    compile(code, "card", "exec")
    assert (
        "| val/loss | 0.5 |" in card
        and "- training rows: 7" in card
        and "NF4 with double quantisation, rank 16, alpha 32, 3 optimizer" in card
    )
