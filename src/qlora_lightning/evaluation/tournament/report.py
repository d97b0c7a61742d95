"""What a tournament gave, as tables: on the terminal, and in Markdown with the picture."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Column, Table
from rich.text import Text

from qlora_lightning.console import console, say
from qlora_lightning.errors import UserError
from qlora_lightning.evaluation.tournament.elo import ORDERS_EACH, RESAMPLES
from qlora_lightning.evaluation.tournament.standings import READABLE_MATRIX, Tournament
from qlora_lightning.evaluation.tournament.verdicts import visible

_WIDEST = 400  # characters


@dataclass(frozen=True)
class Section:
    """One table under its title, with a line on how to read it."""

    title: str
    names: list[str]
    rows: list[list[str]]
    reading: str


def show(found: Tournament) -> None:
    """Print the tables on the console."""
    say(_heading(found) + "\n")
    for section in sections(found):
        show_section(section)
    for note in found.notes:
        say(f"note: {visible(note)}")


def show_section(section: Section) -> None:
    """Print one table under its title."""
    columns = [Column(Text(visible(name)), justify="right" if place else "left", no_wrap=True) for place, name in enumerate(section.names)]
    table = Table(*columns, title=Text(visible(section.title)), title_justify="left", box=None, pad_edge=False)
    for row in section.rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    # as wide as its cells: a log file has no width, and half a name or number is of no use on a terminal either
    table.width = console.measure(table, options=console.options.update(max_width=_WIDEST)).maximum
    console.print(table, "", crop=False)


def write_report(found: Tournament, folder: Path) -> list[Path]:
    """Write report.md, ratings.png and ratings.svg; gives their paths.

    Raises:
        UserError: one cannot be written.
    """
    from qlora_lightning.evaluation.tournament.picture import draw, save  # matplotlib takes long to load

    order = found.ranking
    names = [found.matches.systems[one] for one in order]
    elo = [(float(found.elo.rating[one]), float(found.elo.low[one]), float(found.elo.high[one])) for one in order]
    strengths = [float(found.bradley_terry.rating[one]) for one in order]
    figure = draw(names, elo, strengths, found.matches.win_rates[order][:, order], _heading(found))
    report = folder / "report.md"
    beside = report.with_name("report.md.partial")
    try:
        pictures = save(figure, folder)
        beside.write_text(markdown(found), encoding="utf-8")
        beside.replace(report)
    except OSError as error:
        raise UserError(f"--output {folder}: {report.name} and the pictures cannot be written ({error.strerror}); give another") from error
    return [report, *pictures]


def markdown(found: Tournament) -> str:
    """The report as Markdown, which shows ratings.png from the same folder."""
    lines = ["# Ratings", "", _heading(found), "", _escaped(f"Verdicts: {found.source}, judged by {', '.join(found.read.judges)}."), ""]
    lines += [f"- {_escaped(note)}" for note in found.notes] + ([""] if found.notes else [])
    lines += ["![Ratings with intervals, and win rates](ratings.png)", ""]
    for section in sections(found):
        lines += [f"## {_escaped(section.title)}", "", _row(section.names), _row(["---", *["---:"] * (len(section.names) - 1)])]
        lines += [*(_row(row) for row in section.rows), "", _escaped(section.reading), ""]
    return "\n".join(lines)


def sections(found: Tournament) -> Iterator[Section]:
    """The tables, in the order of the report."""
    yield _ratings(found)
    if len(found.matches.systems) in READABLE_MATRIX:
        yield _win_rates(found)
    yield _order_bias(found)
    if found.percents:
        yield _percents(found)
    yield _counts(found)


def _heading(found: Tournament) -> str:
    matches = found.matches
    return (
        f"{len(matches.systems)} systems, {len(matches):,} matches on {matches.questions:,} questions; "
        f"Elo with K = {found.k:g}, mean of {found.orderings:,} orders"
    )


def _ratings(found: Tournament) -> Section:
    elo, strengths, met = found.elo, found.bradley_terry, found.matches.met
    rows = [
        [
            found.matches.systems[one],
            f"{elo.rating[one]:.1f}",
            f"{elo.low[one]:.0f} to {elo.high[one]:.0f}",
            f"{strengths.rating[one]:.1f}",
            f"{strengths.low[one]:.0f} to {strengths.high[one]:.0f}",
            f"{met[one].sum():,.0f}",
        ]
        for one in found.ranking
    ]
    reading = (
        f"Elo: every match once in random order, from 1000 points each, mean over {found.orderings:,} orders (seed {found.seed}). Its 95 % "
        f"interval: {RESAMPLES} samples of the questions, drawn with replacement (all verdicts on a question together), each in the same "
        f"{ORDERS_EACH} orders. Bradley-Terry: logistic regression of the wins, ties as half a win, the mean of "
        "all systems at 1000; its interval takes the verdicts on one question as one cluster."
    )
    return Section("Ratings", ["system", "Elo", "95 %", "Bradley-Terry", "95 %", "matches"], rows, reading)


def _win_rates(found: Tournament) -> Section:
    names, rates = found.matches.systems, found.matches.win_rates
    rows = [
        [f"{place} {names[one]}", *("" if np.isnan(rate) else f"{100 * rate:.0f}" for rate in rates[one, found.ranking])]
        for place, one in enumerate(found.ranking, 1)
    ]
    columns = ["", *(str(place) for place in range(1, len(names) + 1))]
    return Section("Win rates (%)", columns, rows, "Wins of the row's system over the column's, ties as half a win.")


def _order_bias(found: Tournament) -> Section:
    bias = found.order_bias
    rows = [["decisive verdicts", f"{bias.decisive:,}"], ["ties", f"{bias.ties:,}"]]
    if bias.first_wins is not None:
        rows.insert(0, ["won by the first answer, of the decisive", f"{100 * bias.first_wins:.1f} %"])
    if bias.both_orders:
        rows += [
            ["pairs of answers judged in both orders", f"{bias.both_orders:,}"],
            ["same verdict in both", f"{100 * bias.same_verdict / bias.both_orders:.1f} %"],
            ["the first answer won both times", f"{100 * bias.first_twice / bias.both_orders:.1f} %"],
            ["the second answer won both times", f"{100 * bias.second_twice / bias.both_orders:.1f} %"],
        ]
    return Section("Order bias", ["", "value"], rows, "A judge without bias lets the first answer win 50 %.")


def _percents(found: Tournament) -> Section:
    rows = [
        [
            one.name,
            f"{one.percent:.1f}",
            f"{one.low:.1f} to {one.high:.1f}",
            "" if one.shown_first is None else f"{one.shown_first:.1f}",
            "" if one.shown_second is None else f"{one.shown_second:.1f}",
            f"{one.verdicts:,}",
        ]
        for one in found.percents
    ]
    reading = (
        f"Sum of a system's scores by the sum of {found.reference}'s in the same verdicts, both orders together, and of each order alone. "
        "The interval draws the questions anew, 2,000 times."
    )
    names = ["system", "%", "95 %", "shown first", "shown second", "verdicts"]
    return Section(f"% of {found.reference}", names, rows, reading)


def _counts(found: Tournament) -> Section:
    rows = []
    for kind in ("pairwise", "relative"):
        of_kind = [verdict for verdict in found.read.verdicts if verdict.kind == kind]
        if of_kind:
            rows.append([kind, f"{len(of_kind):,}", f"{sum(verdict.score is None for verdict in of_kind):,}"])
    return Section(
        "Verdicts", ["kind", "verdicts", "not parsed"], rows, "Replies that could not be parsed are left out; none counts as a tie."
    )


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(map(_escaped, cells)) + " |"


def _escaped(text: str) -> str:
    """``text`` as Markdown that shows it, and holds no markup or HTML that a name may spell."""
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", visible(text).replace("&", "&amp;").replace("<", "&lt;"))
