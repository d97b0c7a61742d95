"""Which of the merged models is taken, whether it is good enough, and the account of it for people, for the card and for machines."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from qlora_lightning.errors import UserError
from qlora_lightning.evaluation.intervals import Estimate
from qlora_lightning.export.candidates import Base
from qlora_lightning.export.evidence import Figures, Measured, figures, interval

MAX_KL = 0.02
"""Nats a token: text that the live model writes is 2 % more perplexing (e^0.02) to the merged one."""


@dataclass(frozen=True)
class Verdict:
    """What was found."""

    found: Mapping[Base, Figures]
    live_perplexity: Estimate
    chosen: Base
    asked: bool
    """Whether the user chose, not the figures."""
    max_kl: float

    @property
    def good(self) -> bool:
        """Whether the chosen model's KL lies within the bound; nan does not."""
        return self.found[self.chosen].kl.value <= self.max_kl

    @property
    def reason(self) -> str:
        """Why this one, in words."""
        if self.asked:
            return "asked for"
        return "the only candidate" if len(self.found) == 1 else "the nearer one to the live model"


def judge(live: Measured, measured: Mapping[Base, Measured], base: Base | None, max_kl: float) -> Verdict:
    """Take the model that the user asked for, else the one with the smallest mean KL."""
    found = {name: figures(one) for name, one in measured.items()}
    nearest = min(found, key=lambda name: found[name].kl.value if math.isfinite(found[name].kl.value) else math.inf)
    loss = interval(live.nll, live.row)
    return Verdict(found, Estimate(*(math.exp(bound) for bound in loss)), base or nearest, base is not None, max_kl)


def check(verdict: Verdict) -> None:
    """Raise UserError where the chosen model is too far from the live one."""
    if not verdict.good:
        others = {name: one.kl.value for name, one in verdict.found.items() if one.kl.value <= verdict.max_kl}
        better = " or ".join(f"--base {name} (which has {kl:.2g})" for name, kl in others.items())
        raise UserError(
            f"a merged model must stay within --max_kl {verdict.max_kl:g} nats a token of the live one, got "
            f"{verdict.found[verdict.chosen].kl.value:.2g} with {verdict.chosen} weights; nothing is written; "
            f"{f'take {better}' if better else 'raise the bound'}, or --force writes it as it is"
        )


def table(verdict: Verdict) -> Table:
    """For the terminal."""
    shown = Table(box=None, pad_edge=False)
    for heading in HEADINGS:
        shown.add_column(heading, justify="left" if heading == HEADINGS[0] else "right")
    for row in cells(verdict):
        shown.add_row(*row)
    return shown


HEADINGS = ("model", "KL to live, nats", "same top token", "perplexity")


def cells(verdict: Verdict) -> list[list[str]]:
    """A row a model under ``HEADINGS``: means a token, with their 95 % intervals."""
    rows = [["live", "", "", span(verdict.live_perplexity, ".4g")]]
    for name, one in verdict.found.items():
        rows.append([name, span(one.kl, ".2g"), percent(one.top1), span(one.perplexity, ".4g")])
    return rows


def span(value: Estimate, form: str) -> str:
    """A value with its interval."""
    return f"{value.value:{form}} ({value.low:{form}}-{value.high:{form}})"


def percent(value: Estimate) -> str:
    """A share with its interval, in percent."""
    return f"{value.value:.1%} ({100 * value.low:.1f}-{100 * value.high:.1f})"


def as_json(verdict: Verdict) -> dict[str, Any]:
    """Plain values."""
    found = {
        name: {field: getattr(one, field)._asdict() for field in ("kl", "top1", "perplexity")} | {"kl_p99": one.kl_p99}
        for name, one in verdict.found.items()
    }
    live = {"perplexity": verdict.live_perplexity._asdict()}
    return {"chosen": verdict.chosen, "reason": verdict.reason, "max_kl": verdict.max_kl, "live": live, "merged": found}
