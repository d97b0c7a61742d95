"""What blocks keep: as much as fits, never more, and in an order of gain."""

import pytest

from qlora_lightning.errors import UserError
from qlora_lightning.fused.budget import GIB, Budget, describe_rungs, plan_rungs, planned_bytes
from qlora_lightning.fused.rungs import BlockShape, Rung

LLAMA_7B = BlockShape(hidden=4096, intermediate=11008, query=4096, key_value=8192, heads=32, rank=64)
HELD = int(5.5 * GIB)


def plan(tokens: int, gib: float) -> list[Rung]:
    return plan_rungs(LLAMA_7B, 32, tokens, 512, 32000, Budget(int(gib * GIB), HELD))


def test_bytes_a_token_are_those_of_the_ladder() -> None:
    """KiB a token and layer: everything 91, without gate and up 48, inputs and attention's result 24, the input alone 8."""
    kib = {rung: LLAMA_7B.kept_bytes(rung) / 1024 for rung in Rung}
    assert kib[Rung.ALL] == pytest.approx(91.1 + 7 * 64 * 2 / 1024, abs=0.1)
    assert kib[Rung.NO_MLP] == pytest.approx(48.1 + 5 * 64 * 2 / 1024, abs=0.1)
    assert kib[Rung.ATTENTION] == pytest.approx(24.1 + 2 * 64 * 2 / 1024, abs=0.1)
    assert kib[Rung.INPUT] == pytest.approx(8 + 64 * 2 / 1024, abs=0.1)


def test_a_large_card_keeps_everything_and_a_small_one_the_inputs() -> None:
    assert plan(8192, 80) == [Rung.ALL] * 32
    assert plan(8192, 9.5).count(Rung.INPUT) >= 28


@pytest.mark.parametrize("gib", [10, 12, 16, 20, 24])
def test_what_is_kept_fits_and_nothing_more_would(gib: float) -> None:
    budget = Budget(gib * GIB, HELD)
    rungs = plan(8192, gib)
    assert planned_bytes(LLAMA_7B, 8192, rungs, 32000) <= budget.free
    first = next(number for number, rung in enumerate(rungs) if rung > Rung.ALL)
    more = [*rungs[:first], Rung.ALL, *rungs[first + 1 :]]
    assert planned_bytes(LLAMA_7B, 8192, more, 32000) > budget.free or rungs[first] != max(rungs)


def test_more_memory_never_repeats_more() -> None:
    repeated = [sum(LLAMA_7B.recomputed_flops(rung, 512) for rung in plan(8192, gib)) for gib in range(10, 40)]
    assert repeated == sorted(repeated, reverse=True)
    assert repeated[-1] == 0


def test_a_step_that_took_more_than_planned_is_planned_smaller() -> None:
    careful = plan_rungs(LLAMA_7B, 32, 8192, 512, 32000, Budget(20 * GIB, HELD, correction=1.2))
    assert careful.count(Rung.ALL) < plan(8192, 20).count(Rung.ALL)


def test_inputs_on_the_host_make_room() -> None:
    from dataclasses import replace

    on_host = replace(LLAMA_7B, input_on_host=True)
    assert on_host.kept_bytes(Rung.INPUT) == 2 * 64
    assert on_host.kept_bytes(Rung.ALL) == LLAMA_7B.kept_bytes(Rung.ALL)


def test_what_cannot_fit_says_what_it_needs() -> None:
    with pytest.raises(UserError, match=r"a microbatch of 65,536 tokens needs \d+\.\d GiB in all, and 8\.0 GiB may be used; raise"):
        plan(65536, 8)


def test_the_log_counts_blocks() -> None:
    assert describe_rungs([Rung.INPUT, Rung.ALL, Rung.ALL]) == "2 keep everything, 1 keep their input alone"
