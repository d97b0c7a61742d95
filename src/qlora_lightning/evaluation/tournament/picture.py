"""The picture of a tournament: ratings with their intervals, and beside them who beats whom."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qlora_lightning.evaluation.tournament.standings import READABLE_MATRIX
from qlora_lightning.evaluation.tournament.verdicts import visible

_BLUE, _GREY, _INK = "#2166ac", "#8c8c8c", "#222222"
_LONGEST = 32
"""Characters of a name; a longer one would leave no room for what is drawn of it."""
_STYLE: Any = {
    "font.size": 10,
    "font.family": ["DejaVu Sans", "sans-serif"],
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.edgecolor": _GREY,
}


def draw(
    names: list[str],
    elo: list[tuple[float, float, float]],
    strengths: list[float],
    win_rates: np.ndarray[Any, Any],
    title: str,
) -> Figure:
    """Draw systems from the best down.

    Args:
        names: of the systems; long ones are cut in the middle.
        elo: rating, lower and upper end of the interval.
        strengths: Bradley-Terry rating.
        win_rates: [S, S] share of the wins of the row's system over the column's, nan where they never met.
        title: of the picture.
    """
    size, names = len(names), [_short(visible(name)) for name in names]
    with rc_context(_STYLE):
        height = max(3.2, 0.42 * size + 2.0)
        if size not in READABLE_MATRIX:
            figure = Figure(figsize=(8, height), layout="constrained")
            left = figure.subplots()
        else:
            shares = [5.6, max(4.5, 0.72 * size + 1.8)]
            figure = Figure(figsize=(sum(shares) + 1, height), layout="constrained")
            left, right = figure.subplots(1, 2, width_ratios=shares)
            _matrix(right, names, win_rates)
        _ratings(left, names, elo, strengths)
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=2, frameon=False)
        figure.suptitle(title, fontsize=12, color=_INK, x=0.01, ha="left")
    return figure


def save(figure: Figure, folder: Path) -> list[Path]:
    """Write ratings.png and ratings.svg; a file appears when it is whole."""
    written = []
    for kind in ("png", "svg"):
        target = folder / f"ratings.{kind}"
        beside = target.with_name(target.name + ".partial")
        with rc_context(_STYLE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in another script: the .svg shows it all the same
            figure.savefig(beside, format=kind, dpi=160, facecolor="white", metadata={"Date": None} if kind == "svg" else None)
        beside.replace(target)
        written.append(target)
    return written


def _short(name: str) -> str:
    half = _LONGEST // 2
    return name if len(name) <= _LONGEST else f"{name[:half]}…{name[1 - half :]}"


def _ratings(axes: Axes, names: list[str], elo: list[tuple[float, float, float]], strengths: list[float]) -> None:
    rows = np.arange(len(names))
    rating, low, high = np.array(elo).T
    axes.errorbar(rating, rows, xerr=[rating - low, high - rating], fmt="o", color=_BLUE, capsize=3, label="Elo, 95 % interval", zorder=3)
    axes.plot(strengths, rows + 0.24, "D", color=_GREY, markersize=4, markerfacecolor="white", label="Bradley-Terry", zorder=4)
    for row, value, end in zip(rows, rating, high, strict=True):
        axes.annotate(f"{value:.0f}", (end, row), (7, 0), textcoords="offset points", va="center", color=_INK)
    axes.set(yticks=rows, yticklabels=names, xlabel="rating (points)", ylim=(len(names) - 0.4, -0.6))
    axes.margins(x=0.12)
    axes.grid(axis="x", color="#e5e5e5", zorder=0)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _matrix(axes: Axes, names: list[str], win_rates: np.ndarray[Any, Any]) -> None:
    image = axes.imshow(100 * win_rates, cmap="RdBu", vmin=0, vmax=100, aspect="auto")  # white is 50 %
    for (row, column), rate in np.ndenumerate(win_rates):
        if not np.isnan(rate):
            colour = "white" if abs(rate - 0.5) > 0.3 else _INK
            axes.text(column, row, f"{100 * rate:.0f}", ha="center", va="center", color=colour)
    ticks = np.arange(len(names))
    axes.set(xticks=ticks, yticks=ticks, yticklabels=names, title="wins of the row over the column, ties as half (%)")
    axes.title.set(fontsize=10, color=_INK)
    axes.set_xticklabels(names, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_facecolor("#cfcfcf")  # of systems that never met, and of a system with itself
    axes.set_xticks(ticks[1:] - 0.5, minor=True)
    axes.set_yticks(ticks[1:] - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.9, pad=0.02, aspect=30, ticks=[0, 25, 50, 75, 100], format="%d %%")
    bar.outline.set_visible(False)
