"""What a check of ``verify`` says: differences that it measured, and the bound that each is held to."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal

import torch
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor

from qlora_lightning.errors import UserError

Verdict = Literal["passed", "failed", "not here"]
_COLOURS: dict[Verdict, str] = {"passed": "green", "failed": "bold red", "not here": "yellow"}
_CHUNK = 2**24  # values that a norm converts to float64 at once


@dataclass(frozen=True)
class Bound:
    """How large a difference may be, and why so large."""

    value: float
    origin: str


BITS = Bound(0.0, "bit for bit")
NONE = Bound(0.0, "none may be")


@dataclass(frozen=True)
class Measurement:
    """One difference. Between tensors and losses it is relative; of labels it is the number of problems."""

    what: str
    difference: float
    bound: Bound

    @property
    def within(self) -> bool:
        """Whether the bound is kept, which a difference that is no number never does."""
        return self.difference <= self.bound.value


@dataclass(frozen=True)
class Findings:
    """What a check found. Without a measurement it could not be made here, and ``note`` says why."""

    measured: Sequence[Measurement] = ()
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """A check that was made."""

    check: str
    seconds: float
    measured: Sequence[Measurement] = field(default_factory=list)
    note: str = ""
    failure: str = ""
    """The user's error that ended the check, if one did."""

    @property
    def verdict(self) -> Verdict:
        """``not here``: nothing could be measured on this device or with this model, which is neither good nor bad."""
        if self.failure or not all(one.within for one in self.measured):
            return "failed"
        return "passed" if self.measured else "not here"

    def document(self) -> dict[str, Any]:
        """Plain values for JSON; a difference that is no number is null."""
        return {
            "check": self.check,
            "verdict": self.verdict,
            "seconds": round(self.seconds, 1),
            "note": self.failure or self.note,
            "measured": [
                {
                    "what": one.what,
                    "difference": one.difference if math.isfinite(one.difference) else None,
                    "tolerance": one.bound.value,
                    "tolerance_from": one.bound.origin,
                    "within": one.within,
                }
                for one in self.measured
            ],
        }


def carry_out(check: str, measure: Callable[[], Findings]) -> Outcome:
    """Make a check. A user's error in it (a fit that refuses its own checkpoint, say) is a failure of the check and ends no other."""
    began = perf_counter()
    try:
        found = measure()
    except UserError as error:
        return Outcome(check, perf_counter() - began, failure=str(error))
    return Outcome(check, perf_counter() - began, found.measured, found.note)


def relative(one: Tensor, reference: Tensor) -> float:
    """|one - reference| / |reference|, summed in float64; 0 only for equal values."""
    difference = reference_norm = 0.0
    for mine, theirs in zip(one.flatten().split(_CHUNK), reference.flatten().split(_CHUNK), strict=True):
        difference += float((mine.double() - theirs.double()).square().sum())
        reference_norm += float(theirs.double().square().sum())
    return math.sqrt(difference / reference_norm) if reference_norm else float(difference > 0)


def relative_loss(one: float, reference: float) -> float:
    """As ``relative``, of two losses."""
    return relative(torch.tensor([one], dtype=torch.float64), torch.tensor([reference], dtype=torch.float64))


def table(outcomes: Sequence[Outcome]) -> Table:
    """A line a check and one for each of its measurements, for the terminal."""
    found = Table(title="Verification", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    found.add_column("check")
    found.add_column("difference", justify="right", no_wrap=True)
    found.add_column("tolerance", justify="right", no_wrap=True)
    found.add_column("where it comes from")
    for outcome in outcomes:
        verdict = Text(outcome.verdict, _COLOURS[outcome.verdict])
        found.add_row(Text(outcome.check, "bold"), "", Text(f"{outcome.seconds:.1f} s"), verdict)
        for one in outcome.measured:
            numbers = (Text(f"{one.difference:.3g}", "" if one.within else "bold red"), f"{one.bound.value:.2g}", Text(one.bound.origin))
            found.add_row(Text(f"  {one.what}"), *numbers)
        if said := outcome.failure or outcome.note:
            found.add_row(Text(f"  {said}"))
        found.add_section()
    return found
