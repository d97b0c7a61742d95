"""The arithmetic of many cards: what formulas give, and that the document says it."""

from pathlib import Path

import pytest
from transformers import LlamaConfig

from qlora_lightning.module import QLoRAModule
from qlora_lightning.plan.communication import ETHERNET, INFINIBAND, NVLINK, Traffic, all_gather_seconds, all_reduce_seconds
from qlora_lightning.plan.fleet import Fleet
from qlora_lightning.plan.memory import Forecast
from qlora_lightning.plan.scaling import POINTS, Point, efficiency, efficiency_rows, gather_rows, least_tokens, tokens_rows
from qlora_lightning.plan.target import gpu_of
from qlora_lightning.strategies.policy import MemoryPolicy

DOCUMENT = Path(__file__).parents[1] / "docs" / "scaling.md"


@pytest.mark.parametrize("row", [*efficiency_rows(), *tokens_rows(), *gather_rows()])
def test_the_document_says_what_is_computed(row: str) -> None:
    assert row in DOCUMENT.read_text().splitlines()


def test_a_ring_sends_what_it_reduces_around_twice() -> None:
    assert all_reduce_seconds(450e9, 2, NVLINK) == pytest.approx(1.0)
    assert all_reduce_seconds(50e9, 64, INFINIBAND) == pytest.approx(2 * 63 / 64)
    assert all_gather_seconds(12.5e9, 4, ETHERNET) == pytest.approx(0.75)
    assert all_reduce_seconds(1e9, 1, ETHERNET) == 0


def test_the_least_tokens_reach_the_goal() -> None:
    for point in POINTS:
        tokens = least_tokens(point, 64, INFINIBAND)
        step = Point("", tokens, point.tokens_per_second, point.trained, point.linear)
        assert efficiency(step, 64, INFINIBAND) == pytest.approx(0.95, abs=1e-4)


def test_divided_weights_are_gathered_each_microbatch_twice() -> None:
    alone, divided = (Traffic(Fleet(4, 2, sharded), 100, 1000) for sharded in (False, True))
    assert (alone.gathered, divided.gathered) == (0, 2000)
    assert alone.step_seconds == divided.step_seconds == all_reduce_seconds(100, 8, INFINIBAND)


@pytest.mark.parametrize(("hidden", "intermediate", "layers", "heads", "point"), [(4096, 11008, 32, 32, 0), (8192, 22016, 80, 64, 3)])
def test_sizes_are_those_of_the_models(hidden: int, intermediate: int, layers: int, heads: int, point: int) -> None:
    config = LlamaConfig(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads)
    plan = Forecast(QLoRAModule("x"), config).on(gpu_of(141), MemoryPolicy(), None)
    assert (plan.trained, plan.linear) == (POINTS[point].trained, POINTS[point].linear)
