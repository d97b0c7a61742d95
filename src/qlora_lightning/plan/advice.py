"""What to change where a fit does not fit, with values that do: each is tried by the same planner."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import ceil

from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.fused.budget import GIB, total_for
from qlora_lightning.plan.longest import Longest, bound, longest_of
from qlora_lightning.plan.memory import Forecast, MemoryPlan
from qlora_lightning.plan.target import Target
from qlora_lightning.strategies.policy import MemoryPolicy

_LENGTH_STEP = 64
STRATEGY = "trainer.strategy.init_args"


@dataclass(frozen=True)
class Change:
    """Options that make a fit fit."""

    options: dict[str, str]
    """Name -> value."""
    peak: int
    """Bytes that it then takes of the device."""
    note: str = ""
    """What it costs."""


@dataclass(frozen=True)
class _Tried:
    policy: MemoryPolicy
    longest: Longest
    options: dict[str, str]
    note: str = ""
    ranks: int = 1


def changes(
    forecast: Forecast, target: Target, policy: MemoryPolicy, data: InstructionDataModule, accumulate: int, longest: Longest
) -> list[Change]:
    """Single changes that suffice, else all of them together; none where the model itself is too large.

    Args:
        forecast: of the model.
        target: where it is to run.
        policy: the recipe's.
        data: set up.
        accumulate: the recipe's accumulate_grad_batches.
        longest: the longest microbatch.
    """

    def attempt(tried: _Tried) -> Change | None:
        plan = forecast.on(target, tried.policy, tried.longest)
        return Change(tried.options, plan.step.peak, tried.note) if plan.fits else None

    now = _Tried(policy, longest, {}, ranks=forecast.fleet.ranks)
    parts = [finder(now, data, accumulate, target, attempt) for finder in (_budget, _checkpointing, _microbatches, _bits, _length)]
    found = [change for change in parts if change is not None]
    return found or _together(now, data, accumulate, target, attempt)


Attempt = Callable[[_Tried], Change | None]


def least_gib(plan: MemoryPlan) -> int:
    """GiB of the smallest GPU that a plan fits on."""
    return ceil(total_for(plan.step.peak) / GIB)


def _budget(now: _Tried, data: InstructionDataModule, accumulate: int, target: Target, attempt: Attempt) -> Change | None:
    if now.policy.memory_budget_gib is None:
        return None
    for gib in range(ceil(now.policy.memory_budget_gib), target.total // GIB + 1):
        options = {f"{STRATEGY}.memory_budget_gib": str(gib)}
        if change := attempt(replace(now, policy=replace(now.policy, memory_budget_gib=gib), options=options)):
            return change
    return None


def _checkpointing(now: _Tried, data: InstructionDataModule, accumulate: int, target: Target, attempt: Attempt) -> Change | None:
    return attempt(_least_kept(now)) if now.policy.gradient_checkpointing == "none" else None


def _least_kept(now: _Tried) -> _Tried:
    if now.policy.gradient_checkpointing != "none":
        return now
    options = now.options | {f"{STRATEGY}.gradient_checkpointing": "auto"}
    return replace(now, policy=replace(now.policy, gradient_checkpointing="auto"), options=options)


def _microbatches(now: _Tried, data: InstructionDataModule, accumulate: int, target: Target, attempt: Attempt) -> Change | None:
    return next((change for tried in _smaller(now, data, accumulate) if (change := attempt(tried))), None)


def _smaller(now: _Tried, data: InstructionDataModule, accumulate: int) -> Iterator[_Tried]:
    """The recipe with more and smaller microbatches, the largest of them first."""
    size = data.global_batch_size // now.ranks
    for count in range(accumulate + 1, size + 1):
        if size % count == 0:
            rows = size // count
            longest = bound(rows, now.longest.width) if data.streaming else longest_of(data, count, now.ranks)
            yield replace(now, longest=longest, options=now.options | {"trainer.accumulate_grad_batches": str(count)})


def _bits(now: _Tried, data: InstructionDataModule, accumulate: int, target: Target, attempt: Attempt) -> Change | None:
    return attempt(_few_bits(now)) if now.policy.optimizer_bits == 32 and target.cuda else None


def _few_bits(now: _Tried) -> _Tried:
    options = now.options | {f"{STRATEGY}.optimizer_bits": "8"}
    return replace(now, policy=replace(now.policy, optimizer_bits=8), options=options)


def _length(now: _Tried, data: InstructionDataModule, accumulate: int, target: Target, attempt: Attempt) -> Change | None:
    """The greatest length that fits, by halving."""
    best, low, high = None, 1, (now.longest.width - 1) // _LENGTH_STEP
    while low <= high:
        middle = (low + high) // 2
        if change := attempt(_cut(now, data, middle * _LENGTH_STEP)):
            best, low = change, middle + 1
        else:
            high = middle - 1
    return best


def _cut(now: _Tried, data: InstructionDataModule, tokens: int) -> _Tried:
    note = "" if data.streaming else f"of {len(data.train_set):,} examples {int((data.train_set.lengths > tokens).sum()):,} are longer"
    return replace(now, longest=now.longest.cut(tokens), options=now.options | {"data.dataset.max_length": str(tokens)}, note=note)


def _together(now: _Tried, data: InstructionDataModule, accumulate: int, target: Target, attempt: Attempt) -> list[Change]:
    """Everything that saves memory and changes no result; where that is too much still, with shorter rows."""
    most = _least_kept(_few_bits(now) if now.policy.optimizer_bits == 32 and target.cuda else now)
    for tried in _smaller(most, data, accumulate):
        most = tried
        if change := attempt(tried):
            return [change]
    change = _length(most, data, accumulate, target, attempt)
    return [] if change is None else [change]
