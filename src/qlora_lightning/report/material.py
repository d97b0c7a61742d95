"""What went in and what came out, as text: the audit of the data, and answers to the same prompts as training went on."""

import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from qlora_lightning.report.html import key, note, section, table, text
from qlora_lightning.report.plots import style_of
from qlora_lightning.report.reading import Run, Sample

NO_SAMPLES = "No sample answers: fit keeps them with --samples.count 3, and --samples.every_n_steps 100 asks during training too."
NO_AUDIT = "No account of the data: fit writes one (audit.json) at its start; data inspect --config RECIPE shows the rows themselves."
MOST_PROMPTS, MOST_ANSWERS, MOST_CHARACTERS = 20, 6, 3000
"""What a page shows at most: prompts, answers of a run to each, characters of a text."""

COLUMNS = {
    "part": "part",
    "weight": "weight",
    "rows": "rows",
    "kept": "examples",
    "skipped": "left out",
    "truncated": "cut to length",
    "respelled": "spell a control token",
    "lost_ends": "lost end tokens",
    "doubled_bos": "doubled BOS",
    "straddling_tokens": "boundary tokens",
    "tokens": "tokens",
    "supervised_tokens": "supervised tokens",
    "supervised_share": "supervised",
    "epoch_share": "of an epoch",
    "length_min": "shortest",
    "length_median": "median",
    "length_max": "longest",
}
"""Field of an entry of audit.json -> what the page calls it."""
WRONG = ("lost_ends", "doubled_bos", "straddling_tokens")
"""Counts that are 0 where the data is well."""
_SHARES = ("supervised_share", "epoch_share")


# ---- samples ----


def samples_section(runs: Sequence[Run]) -> str:
    """Each prompt with the runs' answers, step by step, beside the reference."""
    prompts = list(dict.fromkeys((sample.prompt, sample.reference) for run in runs for sample in run.samples))
    if not prompts:
        return section("samples", "Samples", note(NO_SAMPLES))
    cut = note(f"The first {MOST_PROMPTS} of {len(prompts)} prompts; all are in samples.jsonl.") if len(prompts) > MOST_PROMPTS else ""
    about = note("The same held-out prompts each time.")
    return section("samples", "Samples", about, *(_sample(runs, *prompt) for prompt in prompts[:MOST_PROMPTS]), cut)


def _sample(runs: Sequence[Run], prompt: str, reference: str) -> str:
    answers = [
        _answers(run, number, found, named=len(runs) > 1)
        for number, run in enumerate(runs)
        if (found := [sample for sample in run.samples if (sample.prompt, sample.reference) == (prompt, reference)])
    ]
    return (
        f'<article class="sample"><h4>Prompt</h4>{_pre(prompt)}<div class="beside"><div>{"".join(answers)}</div>'
        f"<div><h4>Reference</h4>{_pre(reference)}</div></div></article>"
    )


def _answers(run: Run, number: int, found: Sequence[Sample], named: bool) -> str:
    chosen = _spread(sorted(found, key=lambda sample: sample.step))
    left_out = len(found) - len(chosen)
    lines = "".join(f"<dt>{_when(sample.step)}</dt><dd>{_pre(sample.generation)}</dd>" for sample in chosen)
    more = note(f"{left_out} answers between them are in samples.jsonl.") if left_out else ""
    heading = key(run.name, style_of(number)) if named else "Answers"
    return f'<h4>{heading}</h4><dl class="answers">{lines}</dl>{more}'


def _spread(found: list[Sample]) -> list[Sample]:
    """The first, the last, and some evenly between."""
    if len(found) <= MOST_ANSWERS:
        return found
    return [found[round(number * (len(found) - 1) / (MOST_ANSWERS - 1))] for number in range(MOST_ANSWERS)]


def _when(step: int) -> str:
    return f"step {step:,}" if step else "untrained"


def _pre(content: str) -> str:
    """A text as it is, to be read in its own direction."""
    if not content:
        return '<p class="faint">(empty)</p>'
    more = f"\n… {len(content) - MOST_CHARACTERS:,} more characters" if len(content) > MOST_CHARACTERS else ""
    return f'<pre dir="auto">{text(content[:MOST_CHARACTERS])}{more}</pre>'


# ---- audit ----


def audit_section(runs: Sequence[Run]) -> str:
    """The account of the runs' data; runs with the same data share a table."""
    accounts = sorted(((json.dumps(run.audit, sort_keys=True), run) for run in runs if run.audit), key=lambda pair: pair[0])
    if not accounts:
        return section("data", "Data", note(NO_AUDIT))
    shared = [[run for _, run in group] for _, group in groupby(accounts, key=lambda pair: pair[0])]
    tables = [_audit(group[0].audit, ", ".join(run.name for run in group) if len(runs) > 1 else "") for group in shared]
    legend = note("Lengths and counts of tokens are of the whole example. Marked: counts that should be 0.")
    without = [run.name for run in runs if not run.audit]
    missing = note(f"Without an account of the data: {', '.join(without)}.") if without else ""
    return section("data", "Data", *tables, legend, missing)


def _audit(entries: Sequence[dict[str, Any]], caption: str) -> str:
    """Sets side by side, their fields one below the other; fields that this version does not know stand last, under their own names."""
    known = [name for name in COLUMNS if any(one.get(name) is not None for one in entries)]
    others = [name for one in entries for name, value in one.items() if name not in COLUMNS and isinstance(value, int | float | str)]
    fields = [*known, *dict.fromkeys(name for name in others if name != "name")]
    rows = [[text(COLUMNS.get(name, name)), *(_cell(name, one.get(name)) for one in entries)] for name in fields]
    lengths = ["lengths", *(_histogram(one) for one in entries)]
    wrong = [name in WRONG and any(one.get(name) for one in entries) for name in fields]
    shown = [*rows, lengths] if any(lengths[1:]) else rows
    heads = ["set", *(text(str(one.get("name") or "-")) for one in entries)]
    return table(heads, shown, caption, marked=[*wrong, False])


def _cell(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return "<br>".join(f"{text(_figure(number))} {text(str(why))}" for why, number in value.items()) or "nothing"
    if name in _SHARES and isinstance(value, int | float):
        return f"{value:.1%}"
    return text(_figure(value))


def _figure(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,g}" if isinstance(value, float) else str(value)


def _histogram(entry: dict[str, Any]) -> str:
    """The lengths as a row of bars, where they are told."""
    lengths = entry.get("lengths")
    buckets = lengths.get("histogram") if isinstance(lengths, dict) else None
    if not isinstance(buckets, list) or not buckets:
        return ""
    counts = [int(one["examples"]) for one in buckets]
    bars = "".join(f'<i style="height: {count / max(1, *counts):.1%}"></i>' for count in counts)
    words = f"0 to {int(buckets[-1]['last']):,} tokens"
    return f'<span class="bars" role="img" aria-label="{words}">{bars}</span><span class="faint">{words}</span>'
