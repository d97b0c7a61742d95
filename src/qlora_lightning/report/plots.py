"""Figures as SVG that belongs into the page: its colours follow light and dark, its text stays text, and all of that text is our own.

Names that come from data stand in the page around a figure, never in it.
"""

import re
from collections.abc import Callable, Sequence
from io import StringIO
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from qlora_lightning.report.curves import UNSMOOTHED, Smoothing, is_spiky, smooth, thin
from qlora_lightning.report.mmlu import GUESSING, Score
from qlora_lightning.report.reading import Curve

COLORS = 6
"""Hues that tell lines apart; line styles tell those of the same hue."""
DASHES = ("solid", "dashed", "dotted")

_SIZE_INCHES = (5.4, 2.9)
# Colours that nothing else in a figure has -> what the page's style sheet calls them.
_INK, _GRID, _BOLD = "#010203", "#040506", "#070809"
_SERIES = [f"#0a0b{number:02x}" for number in range(COLORS)]
_VARIABLES = {
    _INK: "var(--faint)",
    _GRID: "var(--line)",
    _BOLD: "var(--ink)",
    **{color: f"var(--run{number})" for number, color in enumerate(_SERIES)},
}
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qlora-lightning",
    "text.parse_math": False,
    "path.simplify_threshold": 0.25,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "text.color": _INK,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}


class Line(NamedTuple):
    """A curve to draw."""

    curve: Curve
    number: int
    """Of its run or bucket, from 0: gives colour and line style."""


def style_of(number: int) -> tuple[str, str]:
    """CSS variable of the colour, and line style, of the run or bucket of this number."""
    return f"var(--run{number % COLORS})", DASHES[number // COLORS % len(DASHES)]


def curves(lines: Sequence[Line], unit: str, smoothed: Smoothing = UNSMOOTHED, from_zero: bool = False) -> str:
    """Curves over optimizer steps, thinned where they are long.

    Args:
        lines: at least one.
        unit: of the values, the label of their axis.
        smoothed: how; where it changes anything, the curves themselves stay behind it in a light tone.
        from_zero: begin the axis of values at 0, so that little change looks little.
    """

    def draw(axes: Axes) -> None:
        logarithmic = not from_zero and is_spiky(np.concatenate([line.curve.values for line in lines]))
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        for line in lines:
            if smoothed.window > 1:
                _plot(axes, line, thin(line.curve), linewidth=0.7, alpha=0.3 / len(lines) ** 0.5)
                _plot(axes, line, thin(smooth(line.curve, smoothed)), zorder=3)
            else:
                _plot(axes, line, thin(line.curve), marker="o" if len(line.curve.steps) <= 40 else "", markersize=3.2)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(f"{unit} (logarithmic)" if logarithmic else unit)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(_number))
        axes.yaxis.set_major_formatter(FuncFormatter(_number))
        axes.yaxis.set_minor_formatter(NullFormatter())
        if from_zero:
            axes.set_ylim(0, 1.08 * max(line.curve.values.max() for line in lines))

    return _svg(draw)


def bars(groups: Sequence[str], rows: Sequence[Sequence[Score | None]]) -> str:
    """Accuracies as groups of bars with their intervals, and a dotted line at guessing.

    Args:
        groups: labels of the groups.
        rows: for each run, a score for each group.
    """

    def draw(axes: Axes) -> None:
        width = 0.8 / len(rows)
        for number, scores in enumerate(rows):
            for group, score in enumerate(scores):
                if score is not None:
                    _bar(axes, group + width * (number - (len(rows) - 1) / 2), width * 0.9, score, _SERIES[number % COLORS])
        axes.axhline(100 * GUESSING, color=_INK, linewidth=1, linestyle=(0, (1, 2)))
        axes.set_xticks(range(len(groups)), groups)
        axes.tick_params(axis="x", length=0)
        axes.grid(visible=False, axis="x")
        axes.set_ylabel("accuracy (%)")
        axes.set_ylim(bottom=0)

    return _svg(draw)


def scored(lines: Sequence[tuple[Sequence[int], Sequence[Score], int]]) -> str:
    """Accuracies with their intervals over optimizer steps: for each run its steps, its scores and its number."""

    def draw(axes: Axes) -> None:
        for steps, scores, number in lines:
            heights = [100 * score.accuracy for score in scores]
            axes.errorbar(
                steps,
                heights,
                yerr=_errors(scores),
                color=_SERIES[number % COLORS],
                linestyle=DASHES[number // COLORS % len(DASHES)],
                marker="o",
                markersize=3.5,
                elinewidth=0.9,
                capsize=2,
            )
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("accuracy (%)")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(_number))

    return _svg(draw)


def dots(groups: Sequence[str], rows: Sequence[Sequence[float | None]], unit: str) -> str:
    """One value a run and group, as dots beside each other: for comparing runs where a curve each would be too many."""

    def draw(axes: Axes) -> None:
        for number, values in enumerate(rows):
            offset = 0.5 / len(rows) * (number - (len(rows) - 1) / 2)
            points = [(group + offset, value) for group, value in enumerate(values) if value is not None]
            axes.plot(*zip(*points, strict=True), linestyle="", marker="o", markersize=5.5, color=_SERIES[number % COLORS])
        axes.set_xticks(range(len(groups)), groups)
        axes.set_xlim(-0.5, len(groups) - 0.5)
        axes.tick_params(axis="x", length=0)
        axes.set_ylabel(unit)
        axes.margins(y=0.15)
        axes.yaxis.set_major_formatter(FuncFormatter(_number))

    return _svg(draw)


def _plot(axes: Axes, line: Line, curve: Curve, **how: Any) -> None:
    color, dashes = _SERIES[line.number % COLORS], DASHES[line.number // COLORS % len(DASHES)]
    axes.plot(curve.steps, curve.values, color=color, linestyle=dashes, **how)


def _bar(axes: Axes, place: float, width: float, score: Score, color: str) -> None:
    axes.bar(place, 100 * score.accuracy, width, color=color)
    axes.errorbar(place, 100 * score.accuracy, yerr=_errors([score]), color=_BOLD, linewidth=1.1, capsize=min(3.0, 14 * width))


def _errors(scores: Sequence[Score]) -> list[list[float]]:
    """Below and above each score, in percent; never negative, which rounding in the file could make them."""
    below = [100 * max(0.0, score.accuracy - score.low) for score in scores]
    return [below, [100 * max(0.0, score.high - score.accuracy) for score in scores]]


def _number(value: float, place: int | None = None) -> str:
    """As short as can be: 12,000 and 2e-4."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if value == 0 or abs(value) >= 0.001:
        return f"{value:g}"
    digits, _, power = f"{value:.2e}".partition("e")
    return f"{float(digits):g}e{int(power)}"


def _svg(draw: Callable[[Axes], None]) -> str:
    """The figure's ``<svg>`` element, without a size of its own."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        draw(figure.add_subplot())
        target = StringIO()
        FigureCanvasSVG(figure).print_svg(target, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(target.getvalue())


def _inline(svg: str) -> str:
    """Without what only a file of its own needs, in the page's colours, with coordinates to a hundredth of a point."""
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"<svg[^>]*(viewBox=\"[^\"]*\")[^>]*>", r"<svg \1>", svg, count=1)
    svg = re.sub(r"<g id=\"[^\"]*\">", "<g>", svg)
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", tag[0]), svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    return re.sub(r"\s*\n\s*", "\n", svg).replace("\nL ", "L").strip()
