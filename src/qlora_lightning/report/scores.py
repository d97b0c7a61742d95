"""MMLU: by category and by subject, and over the steps of a training."""

from collections.abc import Sequence

from qlora_lightning.report import plots
from qlora_lightning.report.html import figure, key, note, section, table, text
from qlora_lightning.report.mmlu import CATEGORIES, GUESSING, Evaluation, Score, headlines, history
from qlora_lightning.report.plots import style_of
from qlora_lightning.report.reading import Run

NO_MMLU = "No MMLU yet: fit and validate measure it with --mmlu.path, during training with --mmlu.every_n_steps too."
METRIC = "mmlu/accuracy"
ONLY_CURVES = f"No MMLU files: metrics.csv holds {METRIC}, but the run's folder mmlu, which tells how it was measured, is gone."
_LABELS = {"STEM": "STEM", "humanities": "humanities", "social sciences": "social sc.", "other": "other"}


def mmlu_section(runs: Sequence[Run]) -> str:
    """Everything about MMLU, of the runs that have it."""
    shown = {number: one for number, one in enumerate(headlines([run.mmlu for run in runs])) if one is not None}
    if not shown:
        return section("mmlu", "MMLU", note(ONLY_CURVES if any(METRIC in run.curves for run in runs) else NO_MMLU))
    grid = f'<div class="grid">{_by_category(runs, shown)}{_over_steps(runs)}</div>'
    without = [run.name for number, run in enumerate(runs) if number not in shown]
    missing = note(f"Without MMLU: {', '.join(without)}.") if without else ""
    return section("mmlu", "MMLU", _warning(runs, shown), grid, _asked(runs, shown), missing, _by_subject(runs, shown))


def _warning(runs: Sequence[Run], shown: dict[int, Evaluation]) -> str:
    if len({(one.setting, one.questions) for one in shown.values()}) == 1:
        return ""
    return note("These runs were not asked alike (see below): their accuracies cannot be compared.", "warning")


def _asked(runs: Sequence[Run], shown: dict[int, Evaluation]) -> str:
    """How each run's shown evaluation was made."""
    facts = [_facts(one) for one in shown.values()]
    rows = [[name, *(cells[name] for cells in facts)] for name in facts[0]]
    caption = "The evaluation shown of each run: of those asked alike, over the most questions, the one after the most steps."
    return table(["", *(key(runs[number].name, style_of(number)) for number in shown)], rows, caption)


def _facts(one: Evaluation) -> dict[str, str]:
    return {
        "after step": "-" if one.step is None else f"{one.step:,}",
        "asked": text(str(one.setting)),
        "questions": f"{one.questions:,}",
        "mean of subjects": interval(one.macro),
        "of all questions": f"{one.micro:.1%}",
        "prompts that lost shots": f"{one.shortened:,}",
        "too long to ask, so wrong": f"{one.unanswered:,}",
        "time": "-" if one.seconds is None else f"{one.seconds:,.3g} s" if one.seconds < 10 else f"{one.seconds:,.0f} s",
    }


def interval(score: Score) -> str:
    """An accuracy with its 95 % interval, as HTML."""
    return f'<span class="whole">{score.accuracy:.1%} ({100 * score.low:.1f} to {100 * score.high:.1f})</span>'


def _by_category(runs: Sequence[Run], shown: dict[int, Evaluation]) -> str:
    groups = [name for name in CATEGORIES if any(name in one.categories for one in shown.values())]
    rows: list[list[Score | None]] = [[] for _ in runs]
    for number, one in shown.items():
        rows[number] = [one.macro, *(one.categories.get(name) for name in groups)]
    words = "; ".join(
        f"{runs[number].name}: mean {one.macro.accuracy:.1%}, "
        + ", ".join(f"{name} {one.categories[name].accuracy:.1%}" for name in groups if name in one.categories)
        for number, one in shown.items()
    )
    return figure(
        "figure-mmlu-category",
        "MMLU by category",
        plots.bars(["all", *(_LABELS[name] for name in groups)], rows),
        [key(run.name, style_of(number)) for number, run in enumerate(runs) if number in shown],
        words,
        f"Mean over subjects, with 95 % intervals. Dotted: guessing, {GUESSING:.0%}.",
    )


def _over_steps(runs: Sequence[Run]) -> str:
    """Accuracy during training, of the runs that were asked more than once in one way."""
    found = [(number, past) for number, run in enumerate(runs) if len(past := history(run.mmlu)) > 1]
    if not found:
        return ""
    lines = [([one.step or 0 for one in past], [one.macro for one in past], number) for number, past in found]
    settings = dict.fromkeys(f"{past[0].setting}, {past[0].questions:,} questions" for _, past in found)
    words = "; ".join(
        f"{runs[number].name}: " + ", ".join(f"{one.macro.accuracy:.1%} at step {one.step:,}" for one in past) for number, past in found
    )
    return figure(
        "figure-mmlu-steps",
        "MMLU over the training",
        plots.scored(lines),
        [key(runs[number].name, style_of(number)) for number, _ in found],
        words,
        f"Mean over subjects, with 95 % intervals: {'; '.join(settings)}.",
    )


def _by_subject(runs: Sequence[Run], shown: dict[int, Evaluation]) -> str:
    """Every subject, those that the first run knows best first."""
    numbers = list(shown)
    first, *others = (shown[number].subjects for number in numbers)
    subjects = [*first, *dict.fromkeys(name for other in others for name in other if name not in first)]
    ranked = sorted(subjects, key=lambda name: (-first[name].accuracy if name in first else 1.0, name))
    rows = [
        [text(name.replace("_", " ")), *(_cell(shown[number].subjects.get(name), number) for number in numbers), _questions(name, shown)]
        for name in ranked
    ]
    heads = ["subject", *(key(runs[number].name, style_of(number)) for number in numbers), "questions"]
    order = "highest first" if len(numbers) == 1 else f"the highest of {runs[numbers[0]].name} first"
    body = table(heads, rows, f"Accuracy with its 95 % interval, {order}.")
    return f"<details open><summary>{len(ranked)} subjects</summary>{body}</details>"


def _cell(score: Score | None, number: int) -> str:
    if score is None:
        return "-"
    color, _ = style_of(number)
    return f'<span class="bar"><i style="width: {score.accuracy:.1%}; background: {color}"></i></span> {interval(score)}'


def _questions(name: str, shown: dict[int, Evaluation]) -> str:
    counts = {one.subjects[name].questions for one in shown.values() if name in one.subjects}
    return " / ".join("-" if count is None else f"{count:,}" for count in counts)
