"""``agreement``: how far judges agree, on which system is better and on single examples."""

import json as json_module
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

from scipy.stats import kendalltau, spearmanr
from statsmodels.stats.inter_rater import aggregate_raters, fleiss_kappa

from qlora_lightning.console import say
from qlora_lightning.errors import UserError
from qlora_lightning.evaluation.tournament.matches import comparisons
from qlora_lightning.evaluation.tournament.ratings import Ratings, read_ratings
from qlora_lightning.evaluation.tournament.report import Section, show_section
from qlora_lightning.evaluation.tournament.verdicts import Verdict, visible

Example = tuple[str, str, str]
"""A question and two systems, in the order of their names."""
Votes = dict[Example, float]
"""The first system's share of the win, by the rater's majority: 1, 0, or 0.5 for a tie."""


def agreement(ratings: list[str], orders: bool = False, json: bool = False) -> None:
    """Compare judges: Kendall's tau and Spearman's rho of the systems' win rates, and Fleiss' kappa over single examples.

    An example is a question with two systems; its verdict is what a judge said most often on it, in either order (a tie where nothing was
    said most often). Win rates and kappa are of the examples that the judges compared have in common. Of pairwise and relative verdicts the
    pairwise ones are used; where there are none, the higher score of the relative ones wins. Replies not parsed are counted and left out.

    Args:
        ratings: Two or more folders, files or archives as for `elo`, each one judge (of several people in one, their majority); or one
            with the verdicts of several judges, who are then compared.
        orders: Compare the two orders of the answers instead: what one judge said in the one with what it said in the other.
        json: Print one JSON document on standard output.
    """
    reads = {source: read_ratings(source) for source in ratings}
    raters = _by_order(reads) if orders else _by_judge(reads)
    if len(raters) < 2:
        raise UserError(f"agreement needs two judges or more, found {', '.join(raters)} alone; give another --ratings, or --orders true")
    found = compare(raters, sum(read.unparsed for read in reads.values()))
    _show(found)
    for note in dict.fromkeys(note for read in reads.values() for note in read.notes):
        say(f"note: {visible(note)}")
    if json:
        print(json_module.dumps(asdict(found), indent=2, ensure_ascii=False, allow_nan=False))


@dataclass(frozen=True)
class Pair:
    """Two raters next to each other; a coefficient is None where it is not defined (one system, or nothing that differs).

    Attributes:
        raters: the two.
        examples: that both judged.
        same: share of them with the same verdict, from 0 to 1.
        fleiss_kappa: agreement on examples beyond chance.
        kendall_tau: of the systems' win rates (tau-b).
        spearman: rank correlation of the same.
    """

    raters: tuple[str, str]
    examples: int
    same: float
    fleiss_kappa: float | None
    kendall_tau: float | None
    spearman: float | None


@dataclass(frozen=True)
class Agreement:
    """How far raters agree.

    Attributes:
        raters: name -> examples that it judged.
        examples: that all of them judged.
        fleiss_kappa: of all raters on these; None where it is not defined.
        pairs: every two raters.
        win_rates: system -> rater -> its share of the wins, ties as half, from 0 to 1, on the examples that all judged.
        unparsed: replies that were left out.
    """

    raters: dict[str, int]
    examples: int
    fleiss_kappa: float | None
    pairs: list[Pair]
    win_rates: dict[str, dict[str, float]]
    unparsed: int


def compare(raters: dict[str, Votes], unparsed: int) -> Agreement:
    """Compare two raters or more.

    Raises:
        UserError: two of them have no example in common.
    """
    pairs = [_pair((one, other), raters[one], raters[other]) for one, other in combinations(raters, 2)]
    shared = _shared(list(raters.values()))
    kappa = example_kappa([[votes[example] for votes in raters.values()] for example in shared])
    rates = {name: win_rates(votes, shared) for name, votes in raters.items()}
    systems = sorted({system for _, *pair in shared for system in pair})
    table = {system: {name: rate[system] for name, rate in rates.items()} for system in systems}
    return Agreement({name: len(votes) for name, votes in raters.items()}, len(shared), kappa, pairs, table, unparsed)


def example_kappa(votes: Sequence[Sequence[float]]) -> float | None:
    """Fleiss' kappa (statsmodels) of [examples, raters] verdicts of any categories; None where all are of one category."""
    if not votes:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # 0 / 0 where all verdicts are of one category
        return _defined(float(fleiss_kappa(aggregate_raters(votes)[0])))


def win_rates(votes: Votes, examples: list[Example]) -> dict[str, float]:
    """Each system's share of the wins in some examples, ties as half."""
    shares: dict[str, list[float]] = defaultdict(list)
    for example in examples:
        _, first, second = example
        shares[first].append(votes[example])
        shares[second].append(1 - votes[example])
    return {system: sum(each) / len(each) for system, each in shares.items()}


def majority(verdicts: list[Verdict]) -> Votes:
    """What was said most often on each example; a tie where two verdicts were equally frequent."""
    said: dict[Example, Counter[float]] = defaultdict(Counter)
    for verdict in verdicts:
        if (share := verdict.share) is not None:
            said[(verdict.question, *verdict.pair)][share if verdict.first < verdict.second else 1 - share] += 1
    return {example: _most(counts) for example, counts in said.items()}


def _most(counts: Counter[float]) -> float:
    (share, most), *others = counts.most_common(2)
    return 0.5 if others and others[0][1] == most else share


def _pair(names: tuple[str, str], one: Votes, other: Votes) -> Pair:
    shared = _shared([one, other])
    if not shared:
        raise UserError(
            f"judges must have examples (a question and two systems) in common, found none of {names[0]} and {names[1]}; "
            "let both judge the same answers (with --orders: in both orders)"
        )
    rates, other_rates = win_rates(one, shared), win_rates(other, shared)
    tau, rho = rank_agreement([rates[system] for system in rates], [other_rates[system] for system in rates])
    same = sum(one[example] == other[example] for example in shared) / len(shared)
    return Pair(names, len(shared), same, example_kappa([[one[example], other[example]] for example in shared]), tau, rho)


def rank_agreement(one: list[float], other: list[float]) -> tuple[float | None, float | None]:
    """Kendall's tau-b and Spearman's rho (scipy); None where one list does not vary."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a list that does not vary
        return _defined(float(kendalltau(one, other).statistic)), _defined(float(spearmanr(one, other).statistic))


def _shared(raters: list[Votes]) -> list[Example]:
    """Examples that all raters judged, sorted."""
    return sorted(set.intersection(*({*votes} for votes in raters)))


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value


def _by_judge(reads: dict[str, Ratings]) -> dict[str, Votes]:
    """Each source a rater; of one source alone, each judge in it."""
    if len(reads) > 1:
        judges = [" + ".join(read.judges) for read in reads.values()]
        short = [Path(source).name for source in reads]
        names = next((names for names in (judges, short) if len({*names}) == len(names)), list(reads))
        return {name: majority(comparisons(read.verdicts)) for name, read in zip(names, reads.values(), strict=True)}
    (read,) = reads.values()
    return {judge: majority(comparisons([verdict for verdict in read.verdicts if verdict.judge == judge])) for judge in read.judges}


def _by_order(reads: dict[str, Ratings]) -> dict[str, Votes]:
    """The two orders of each pair as two raters; which is which changes from question to question.

    Were the order by name one rater, its win rates would favour the systems early in the alphabet, as judges favour what they see first.
    """
    judges = sorted({judge for read in reads.values() for judge in read.judges})
    if len(judges) > 1:
        raise UserError(f"--orders compares the two orders of one judge, found {len(judges)}: {', '.join(judges)}; give the ratings of one")
    verdicts = [verdict for read in reads.values() for verdict in comparisons(read.verdicts)]
    place = {question: index for index, question in enumerate(sorted({verdict.question for verdict in verdicts}))}
    sides: tuple[list[Verdict], list[Verdict]] = ([], [])
    for verdict in verdicts:
        sides[(place[verdict.question] + (verdict.first < verdict.second)) % 2].append(verdict)
    return {f"{judges[0]}, one order": majority(sides[0]), f"{judges[0]}, the other": majority(sides[1])}


def _show(found: Agreement) -> None:
    counts = [f"{visible(name)}: {count:,} examples" for name, count in found.raters.items()]
    say("; ".join([*counts, f"{found.unparsed:,} replies not parsed"]))
    rows = [
        [
            " / ".join(pair.raters),
            f"{pair.examples:,}",
            f"{100 * pair.same:.1f} %",
            *map(_number, (pair.fleiss_kappa, pair.kendall_tau, pair.spearman)),
        ]
        for pair in found.pairs
    ]
    show_section(Section("Agreement", ["judges", "examples", "same verdict", "Fleiss' kappa", "Kendall's tau", "Spearman's rho"], rows, ""))
    rates = sorted(found.win_rates.items(), key=lambda item: -sum(item[1].values()))
    rows = [[system, *(f"{100 * of[name]:.1f}" for name in found.raters)] for system, of in rates]
    show_section(Section("Win rates (%)", ["system", *found.raters], rows, ""))
    if len(found.raters) > 2:
        say(f"all {len(found.raters)} judges on the {found.examples:,} examples they share: Fleiss' kappa {_number(found.fleiss_kappa)}")


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.3f}"
