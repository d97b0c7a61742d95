"""The plan of a run's memory on a GPU that is made up: what counts as taken, what a step's peak teaches, when graphs give way."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from qlora_lightning.errors import UserError
from qlora_lightning.fused.budget import GIB, ROUNDED_UP, working_bytes
from qlora_lightning.fused.memory import OptimizerState, Planner
from qlora_lightning.fused.microbatch import Shape
from qlora_lightning.fused.rungs import BlockShape, Rung
from qlora_lightning.strategies.policy import GradientCheckpointing, MemoryPolicy

LLAMA_7B = BlockShape(hidden=4096, intermediate=11008, query=4096, key_value=8192, heads=32, rank=64)
LONG, SHORT = Shape(16, 512, 8192), Shape(16, 128, 2048)


@dataclass
class Card:
    """Bytes of a GPU, as torch tells them."""

    total: int = 80 * GIB
    elsewhere: int = GIB // 2
    allocated: int = 6 * GIB
    peak: int = 20 * GIB  # of loading, or of validation before training


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    made = Card()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (made.total - made.allocated - made.elsewhere, made.total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: made.allocated)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: made.allocated)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: made.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: setattr(made, "peak", made.allocated))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    return made


@pytest.fixture
def planner(card: Card) -> Callable[..., Planner]:
    def make(gib: float | None = None, state: int = GIB, mode: GradientCheckpointing = "auto") -> Planner:
        policy = MemoryPolicy(memory_budget_gib=gib, gradient_checkpointing=mode)
        return Planner(LLAMA_7B, 32, 32000, policy, OptimizerState(state), torch.device("cuda"))

    return make


def run(planner: Planner, card: Card, shape: Shape, takes: float) -> bool:
    """A microbatch that takes so many times what is planned; whether that changed the plan."""
    rungs = [Rung.INPUT] * 32
    before = planner.before()
    planned = planner.needed(shape, rungs, "fa4") / planner.budget.correction
    card.peak = max(card.peak, card.allocated + int(takes * planned))
    return planner.correct(before, shape, rungs, "fa4")


def test_a_small_shape_learns_nothing_from_the_peak_of_a_large_one(planner: Callable[..., Planner], card: Card) -> None:
    plan = planner()
    plan.start()
    assert run(plan, card, LONG, 0.95)
    assert plan.budget.correction == pytest.approx(0.95, abs=1e-3)
    card.allocated += 2 * GIB  # the optimizer's first update
    assert not run(plan, card, SHORT, 0.95)
    assert plan.budget.correction == pytest.approx(0.95, abs=1e-3)
    assert run(plan, card, Shape(16, 1024, 16384), 1.1)
    assert plan.budget.correction == pytest.approx(1.1, abs=1e-3)


def test_kernels_that_a_first_step_loads_count(planner: Callable[..., Planner], card: Card) -> None:
    """Once: what the first update makes is the optimizer's state, which is planned for."""
    plan = planner(gib=12)
    plan.start()
    held = plan.budget.held
    card.elsewhere += 300 * 2**20
    run(plan, card, SHORT, 0.95)
    assert plan.budget.held == held + 300 * 2**20
    card.elsewhere += GIB  # paged
    run(plan, card, LONG, 1.1)
    assert plan.budget.held == held + 300 * 2**20


def test_what_ran_before_training_is_not_the_first_steps_peak(planner: Callable[..., Planner], card: Card) -> None:
    plan = planner()
    plan.start()
    assert card.peak == card.allocated
    plan.start()  # with every microbatch, measured once
    run(plan, card, SHORT, 0.5)
    assert plan.budget.correction == 0.8


def test_a_paged_state_gives_way_where_nothing_else_fits(planner: Callable[..., Planner], card: Card) -> None:
    plan = planner(gib=9.0, state=2 * GIB)
    plan.start()
    assert plan.plan(SHORT, "fa4").count(Rung.INPUT) > 0
    held = plan.budget.held
    assert held == card.allocated + card.elsewhere
    assert plan.plan(SHORT, "fa4")  # from now on
    assert plan.budget.held == held
    with pytest.raises(UserError, match=r"set trainer\.strategy\.optimizer_bits: 8"):
        plan.plan(Shape(16, 2048, 32768), "fa4")


@pytest.mark.parametrize("paged", [False, True])
def test_a_resumed_optimizers_state_counts_once(planner: Callable[..., Planner], card: Card, paged: bool) -> None:
    plan = planner(state=4 * GIB)
    plan.start()
    card.allocated, card.elsewhere = (card.allocated, card.elsewhere + 4 * GIB) if paged else (card.allocated + 4 * GIB, card.elsewhere)
    resumed = planner(state=4 * GIB)
    resumed.count_state(4 * GIB, 4 * GIB if paged else 0)
    resumed.start()
    assert resumed.budget == plan.budget


def test_a_budget_is_of_this_run_alone_but_no_more_than_others_leave(planner: Callable[..., Planner], card: Card) -> None:
    plan = planner(gib=24)
    plan.start()
    assert plan.budget.total == 24 * GIB and plan.budget.held == 7 * GIB + card.elsewhere
    card.elsewhere = 60 * GIB
    crowded = planner(gib=24)
    crowded.start()
    assert crowded.budget.total == 21 * GIB and crowded.budget.held == 8 * GIB
    fixed = planner(gib=24, mode="none")  # a budget is for auto only
    fixed.start()
    assert fixed.budget.total == card.total


def test_what_does_not_fit_is_said_before_it_runs(planner: Callable[..., Planner], card: Card) -> None:
    card.total = 8 * GIB
    plan = planner()
    plan.start()
    with pytest.raises(UserError, match=r"a microbatch of 8,192 tokens needs \d+\.\d GiB in all, and 8\.0 GiB may be used"):
        plan.plan(LONG, "fa4")


def test_one_long_row_needs_a_sum_of_its_own_for_each_part_of_the_device(planner: Callable[..., Planner], card: Card) -> None:
    """FlashAttention 2 in a fixed order: 132 multiprocessors share 32 heads of one row, so five fp32 sums of dq."""
    plan = planner()
    plan.start()
    tokens, rungs = 65536, [Rung.INPUT] * 32
    shape = Shape(1, tokens, tokens)
    more = plan.needed(shape, rungs, "flash") - plan.needed(shape, rungs, "fa4")
    assert more > 3 * 4 * tokens * 4096
    assert plan.needed(LONG, rungs, "flash") == plan.needed(LONG, rungs, "fa4")


def test_inputs_on_their_way_from_the_host_take_memory() -> None:
    rungs = [Rung.INPUT] * 32
    on_host = working_bytes(replace(LLAMA_7B, input_on_host=True), 8192, rungs, 32000)
    more = on_host - working_bytes(LLAMA_7B, 8192, rungs, 32000)
    assert more == pytest.approx(ROUNDED_UP * 2 * 2 * 8192 * 4096, abs=2)
