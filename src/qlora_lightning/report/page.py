"""The report's page: what every run is and came to, side by side, then its parts."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import yaml

from qlora_lightning import __version__
from qlora_lightning.report.html import document, key, note, section, table, text
from qlora_lightning.report.material import audit_section, samples_section
from qlora_lightning.report.plots import style_of
from qlora_lightning.report.reading import Run
from qlora_lightning.report.scores import mmlu_section
from qlora_lightning.report.settings import compare_settings
from qlora_lightning.report.summary import Summary
from qlora_lightning.report.training import training_section

NO_CONFIG = "No settings: a run folder that fit wrote has them in config.yaml."
_PARTS = {"summary": "Summary", "settings": "Settings", "training": "Training", "mmlu": "MMLU", "samples": "Samples", "data": "Data"}


class Line(NamedTuple):
    """A line of the summary: what it tells, and how it writes a run's."""

    name: str
    write: Callable[[Summary], str | None]


LINES = (
    Line("optimizer steps", lambda run: f"{run.steps:,}"),
    Line("training loss, last tenth", lambda run: _written(run.train_loss, "{:.4f}")),
    Line("held-out loss, untrained", lambda run: _written(run.val_loss_first, "{:.4f}")),
    Line("held-out loss, best", lambda run: _written(run.val_loss_best, f"{{:.4f}} (step {run.val_loss_best_step or 0:,})")),
    Line("held-out loss, last", lambda run: _written(run.val_loss_final, "{:.4f}")),
    Line("perplexity, last", lambda run: _written(run.val_perplexity_final, "{:,.2f}")),
    Line("MMLU, mean of subjects", lambda run: _mmlu(run)),
    Line("throughput, median", lambda run: _written(run.tokens_per_second_median, "{:,.0f} tokens/s")),
    Line("peak memory", lambda run: _written(run.peak_gib, "{:.2f} GiB")),
    Line("time in training steps", lambda run: _duration(run.training_seconds_estimated)),
)


def report_page(runs: Sequence[Run], summaries: Sequence[Summary]) -> str:
    """The whole page as HTML, of at least one run and its summary each."""
    title = f"Report: {', '.join(run.name for run in runs)}"
    links = "".join(f'<a href="#{part}">{name}</a>' for part, name in _PARTS.items())
    parts = [
        f"<header><h1>{text(title)}</h1>{note(f'qlora-lightning {__version__}')}<nav>{links}</nav></header>",
        *(note(problem, "warning") for run in runs for problem in run.problems),
        f'<div class="pair">{_summary(runs, summaries)}{_settings(runs)}</div>',
        training_section(runs),
        mmlu_section(runs),
        samples_section(runs),
        audit_section(runs),
    ]
    return document(title, "\n".join(parts))


def _summary(runs: Sequence[Run], summaries: Sequence[Summary]) -> str:
    rows = [[line.name, *(text(line.write(one) or "-") for one in summaries)] for line in LINES]
    shown = [row for row in rows if any(cell != "-" for cell in row[1:])]
    words = "Losses in nats a supervised token; MMLU with its 95 % interval."
    if any(one.training_seconds_estimated for one in summaries):
        words += " The time is an estimate from the mean length of an example and the logged speed, without validation and saving."
    return section("summary", "Summary", table(["", *_names(runs)], shown), note(words))


def _settings(runs: Sequence[Run]) -> str:
    lines = compare_settings(runs)
    if not lines:
        return section("settings", "Settings", note(NO_CONFIG))
    rows = [[text(line.name), *map(text, line.values)] for line in lines]
    words = note("Marked: where the runs differ.") if any(line.differs for line in lines) else ""
    body = table(["", *_names(runs)], rows, marked=[line.differs for line in lines])
    return section("settings", "Settings", body, words, *(_config(run) for run in runs if run.config))


def _config(run: Run) -> str:
    content = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
    return f"<details><summary>The whole configuration of {text(run.name)}</summary><pre>{text(content)}</pre></details>"


def _names(runs: Sequence[Run]) -> list[str]:
    """Heads of the runs' columns."""
    return [key(run.name, style_of(number)) if len(runs) > 1 else text(run.name) for number, run in enumerate(runs)]


def _written(value: float | None, pattern: str) -> str | None:
    return None if value is None else pattern.format(value)


def _mmlu(run: Summary) -> str | None:
    if run.mmlu_accuracy is None or run.mmlu_interval is None:
        return None
    low, high = run.mmlu_interval
    return f"{run.mmlu_accuracy:.1%} ({100 * low:.1f} to {100 * high:.1f})"


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    minutes = seconds / 60
    return f"about {seconds:.0f} s" if minutes < 2 else f"about {minutes:.0f} min" if minutes < 120 else f"about {minutes / 60:.1f} h"
