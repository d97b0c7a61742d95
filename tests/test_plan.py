"""What the plan says of the way that training steps take."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qlora_lightning.plan import checkpointing, why_not_fused
from qlora_lightning.strategies.policy import MemoryPolicy

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    "fused, compute, device, reason",
    [
        (True, "auto", GPU, None),
        (True, "fp8", GPU, None),
        (True, "fp32", GPU, "the fused path computes in bf16, not float32"),
        (False, "auto", GPU, "model.fused is false"),
        (True, "auto", CPU, "the fused path needs a GPU"),
    ],
)
def test_what_rules_the_fused_path_out_before_the_model_is_loaded(
    fused: bool, compute: str, device: torch.device, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    module: Any = SimpleNamespace(fused=fused, compute=compute)
    assert why_not_fused(module, device) == reason


def test_without_fused_blocks_the_plan_promises_no_budget() -> None:
    """transformers' blocks are computed again whole, or not at all."""
    policy = MemoryPolicy(memory_budget_gib=20, offload_inputs=True)
    assert checkpointing(policy, fused=True) == "gradient checkpointing auto within 20 GiB in all, kept inputs on the host"
    assert checkpointing(policy, fused=False) == "gradient checkpointing full, as auto means without fused blocks"
    kept = MemoryPolicy(gradient_checkpointing="none", offload_inputs=True)
    assert checkpointing(kept, fused=False) == "gradient checkpointing none"
