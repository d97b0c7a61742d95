"""A tournament between systems: all that verdicts say about them, as a record and as a JSON document."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qlora_lightning.evaluation.counting import counting
from qlora_lightning.evaluation.tournament.bradley_terry import BradleyTerry, bradley_terry
from qlora_lightning.evaluation.tournament.elo import Elo, elo, orders_played
from qlora_lightning.evaluation.tournament.matches import Floats, Matches, OrderBias, comparisons, matches_of, order_bias
from qlora_lightning.evaluation.tournament.ratings import Ratings
from qlora_lightning.evaluation.tournament.relative import Percent, percents
from qlora_lightning.evaluation.tournament.verdicts import Kind

READABLE_MATRIX = range(3, 17)
"""Systems: a matrix of two says what the ratings say, and the numbers of a larger one cannot be read."""
_FEW = 20  # questions; drawing so few anew tells little about others


@dataclass(frozen=True)
class Tournament:
    """Everything that a tournament gave, and how it was held. The order of systems is that of ``matches.systems``.

    Attributes:
        source: where the verdicts come from.
        read: the verdicts.
        kind: of the verdicts that are matches.
        notes: what a reader must know of them.
    """

    source: str
    read: Ratings
    kind: Kind
    matches: Matches
    elo: Elo
    bradley_terry: BradleyTerry
    order_bias: OrderBias
    reference: str | None
    percents: list[Percent]
    k: float
    orderings: int
    seed: int
    notes: list[str]

    @property
    def ranking(self) -> list[int]:
        """Indices of the systems, the highest Elo rating first."""
        return [int(index) for index in np.argsort(-self.elo.rating, kind="stable")]


def hold(read: Ratings, source: str, k: float, orderings: int, seed: int, reference: str | None) -> Tournament:
    """Rate the systems of the verdicts that were read; arguments as of the command ``elo``."""
    used = comparisons(read.verdicts)
    kind: Kind = used[0].kind
    matches = matches_of(used)
    with counting("Elo", orders_played(orderings), "orders") as advance:
        rating = elo(matches, k, orderings, seed, advance)
    strengths = bradley_terry(matches)
    scored = percents(read.verdicts, reference, seed) if reference else []
    notes = [*read.notes, *_notes(read, matches, kind, strengths.drawn, reference if scored else None)]
    return Tournament(
        source, read, kind, matches, rating, strengths, order_bias(used), reference if scored else None, scored, k, orderings, seed, notes
    )


def _notes(read: Ratings, matches: Matches, kind: Kind, drawn: bool, reference: str | None) -> list[str]:
    notes = []
    if kind == "relative":
        notes.append("there are no pairwise verdicts: the higher of the two scores of a relative one wins, equal ones are a tie")
    if any(verdict.kind == "relative" for verdict in read.verdicts) and reference is None:
        notes.append("no relative verdicts with the reference: the % of it is left out; --reference NAME names another")
    if len(read.judges) > 1:
        notes.append(f"verdicts of {len(read.judges)} judges are taken together: {', '.join(read.judges)}")
    if matches.questions < _FEW:
        some = "1 question" if matches.questions == 1 else f"{matches.questions} questions"
        notes.append(f"only {some}: the intervals say little; ask {_FEW} or more")
    if drawn:
        notes.append(
            "Bradley-Terry: wins and losses do not connect all systems, so each got one draw against an imagined one of 1000 points"
        )
    return notes


def document(found: Tournament) -> dict[str, Any]:
    """The JSON document of a tournament; ratings and intervals in points, rates and ``first_wins`` from 0 to 1."""
    matches, strengths = found.matches, found.bradley_terry
    met = matches.met
    order = found.ranking
    return {
        "ratings": [
            {
                "name": matches.systems[one],
                "elo": float(found.elo.rating[one]),
                "low": float(found.elo.low[one]),
                "high": float(found.elo.high[one]),
                "matches": int(met[one].sum()),
            }
            for one in order
        ],
        "bradley_terry": {
            "ratings": [
                {
                    "name": matches.systems[one],
                    "rating": float(strengths.rating[one]),
                    "low": float(strengths.low[one]),
                    "high": float(strengths.high[one]),
                }
                for one in order
            ],
            "draws_added": strengths.drawn,
        },
        "win_rates": {
            "systems": [matches.systems[one] for one in order],
            "rates": _table(matches.win_rates, order),
            "matches": _table(met, order),
        },
        "order_bias": asdict(found.order_bias),
        "relative": {"reference": found.reference, "systems": [asdict(one) for one in found.percents]} if found.reference else None,
        "unparsed": found.read.unparsed,
        "verdicts": len(found.read.verdicts),
        "matches": len(matches),
        "matches_from": found.kind,
        "questions": matches.questions,
        "judges": found.read.judges,
        "k": found.k,
        "orderings": found.orderings,
        "seed": found.seed,
        "source": found.source,
        "notes": found.notes,
    }


def _table(values: Floats, order: list[int]) -> list[list[float | None]]:
    return [[None if math.isnan(value) else float(value) for value in row] for row in values[np.ix_(order, order)]]
