"""The curves of a training: losses, learning rate, gradient, speed, memory; each figure only where something was logged for it."""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from qlora_lightning.report import plots
from qlora_lightning.report.curves import MOST_POINTS, UNSMOOTHED, Smoothing, smoothing_window
from qlora_lightning.report.html import figure, key, note, section
from qlora_lightning.report.plots import Line, style_of
from qlora_lightning.report.reading import Run


class Plot(NamedTuple):
    """A metric's figure."""

    metric: str
    title: str
    unit: str
    says: str
    """What the metric is, for its caption."""
    smoothed_by: Literal["mean", "median"] | None = None
    """None for values that are not noisy."""
    from_zero: bool = False


LOSS = Plot("train/loss", "Training loss", "nats a token", "Cross-entropy a supervised token.", smoothed_by="mean")
HELDOUT = Plot(
    "val/loss", "Held-out loss", "nats a token", "Cross-entropy a supervised token of the held-out rows; step 0 is before training."
)
OTHERS = (
    Plot("train/learning_rate", "Learning rate", "learning rate", "As the optimizer used it.", from_zero=True),
    Plot("train/grad_norm", "Gradient norm", "norm", "Before clipping.", smoothed_by="median"),
    Plot(
        "train/tokens_per_second",
        "Throughput",
        "tokens/s",
        "Input tokens, padding not counted, without validation.",
        smoothed_by="median",
        from_zero=True,
    ),
    Plot(
        "memory/peak_gib",
        "Peak memory",
        "GiB",
        "The most that was allocated until then (on a CPU: resident), 1 GiB = 2³⁰ bytes.",
        from_zero=True,
    ),
)
NO_HELDOUT = "Held-out loss is not there: it needs held-out rows (data.dataset.validation_size, or a validation file)."


def training_section(runs: Sequence[Run]) -> str:
    """Every curve of the runs."""
    losses = [_figure(runs, LOSS), _figure(runs, HELDOUT)]
    parts = [_parts(runs, "val/loss_by_length", "Held-out loss by length", "Examples by their tokens.")]
    parts += [_parts(runs, "val/loss", "Held-out loss by data set", "The held-out rows of each set.")]
    others = [_figure(runs, plot) for plot in OTHERS]
    missing = "" if any("val/loss" in run.curves for run in runs) else note(NO_HELDOUT)
    grid = f'<div class="grid">{"".join([*losses, *parts, *others])}</div>'
    return section("training", "Training", grid, missing)


def _figure(runs: Sequence[Run], plot: Plot) -> str:
    """One metric of all runs on shared axes."""
    lines = [Line(run.curves[plot.metric], number) for number, run in enumerate(runs) if plot.metric in run.curves]
    if not lines:
        return ""
    longest = max(len(line.curve.steps) for line in lines)
    smoothed = Smoothing(smoothing_window(longest), plot.smoothed_by) if plot.smoothed_by else UNSMOOTHED
    return figure(
        _slug(plot.metric),
        plot.title,
        plots.curves(lines, plot.unit, smoothed, plot.from_zero),
        [key(run.name, style_of(number)) for number, run in enumerate(runs)],
        _described([(runs[line.number].name, line) for line in lines]),
        " ".join(filter(None, [plot.says, _drawn(longest, smoothed), _lost(runs, plot.metric)])),
    )


def _drawn(longest: int, smoothed: Smoothing) -> str:
    """How what is drawn differs from what was logged."""
    words = f"Bold: {smoothed.by} of the {smoothed.window} logged values around each; light: as logged." if smoothed.window > 1 else ""
    return words + (f" Thinned to the lowest and highest of each of {MOST_POINTS // 2:,} parts." if longest > MOST_POINTS else "")


def _lost(runs: Sequence[Run], metric: str) -> str:
    number = sum(run.not_finite.get(metric, 0) for run in runs)
    return f"Left out: {number:,} values that are no finite number." if number else ""


def _described(named: Sequence[tuple[str, Line]]) -> str:
    """The curves in words: where each begins and ends."""
    ends = [(name, line.curve.steps, line.curve.values) for name, line in named]
    return "; ".join(f"{name}: {y[0]:.4g} at step {x[0]:,.0f}, {y[-1]:.4g} at step {x[-1]:,.0f}" for name, x, y in ends)


# ---- held-out loss in parts ----


def _parts(runs: Sequence[Run], prefix: str, title: str, says: str) -> str:
    """A metric that was logged apart, as in ``val/loss/<set>``: one run's curves, or the last values of several runs beside each other."""
    names = sorted({name for run in runs for name in run.curves if name.startswith(f"{prefix}/")}, key=_first_number)
    if not names:
        return ""
    labels = [name.removeprefix(f"{prefix}/") for name in names]
    draw = _one_run if len(runs) == 1 else _many_runs
    return draw(runs, _slug(prefix + "/parts"), title, says, names, labels)


def _one_run(runs: Sequence[Run], slug: str, title: str, says: str, names: Sequence[str], labels: Sequence[str]) -> str:
    lines = [Line(runs[0].curves[name], number) for number, name in enumerate(names)]
    legend = [key(label, style_of(number)) for number, label in enumerate(labels)]
    return figure(slug, title, plots.curves(lines, "nats a token"), legend, _described(list(zip(labels, lines, strict=True))), says)


def _many_runs(runs: Sequence[Run], slug: str, title: str, says: str, names: Sequence[str], labels: Sequence[str]) -> str:
    rows = [[float(run.curves[name].values[-1]) if name in run.curves else None for name in names] for run in runs]
    legend = [key(run.name, style_of(number)) for number, run in enumerate(runs)]
    words = "; ".join(
        f"{run.name}: " + ", ".join(f"{label} {value:.4g}" for label, value in zip(labels, row, strict=True) if value is not None)
        for run, row in zip(runs, rows, strict=True)
    )
    caption = f"{says} Each run's last values."
    numbered = [label if re.fullmatch(r"[\d+-]+", label) else f"{number}" for number, label in enumerate(labels, 1)]
    if numbered != list(labels):  # a data set's name may be long, or anything: the figure holds numbers only
        caption += " " + ", ".join(f"{number}: {label}" for number, label in zip(numbered, labels, strict=True))
    return figure(slug, title, plots.dots(numbered, rows, "nats a token"), legend, words, caption)


def _first_number(name: str) -> tuple[int, str]:
    """Sorts buckets by their lengths (of ``…/128-255`` 128) and other names by the alphabet."""
    found = re.search(r"/(\d+)[^/]*$", name)
    return (int(found[1]) if found else 0, name)


def _slug(metric: str) -> str:
    return "figure-" + re.sub("[^a-z]+", "-", metric)
