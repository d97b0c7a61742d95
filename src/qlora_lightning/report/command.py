"""``report``: one page of one or several runs."""

import json as json_module
from contextlib import suppress
from pathlib import Path

from qlora_lightning.console import say
from qlora_lightning.errors import UserError
from qlora_lightning.report.page import report_page
from qlora_lightning.report.reading import read_runs
from qlora_lightning.report.summary import summarize


def report(runs: list[str], output: str = "report.html", json: bool = False) -> None:
    """Write one HTML page of one or several runs: settings side by side, curves, MMLU, samples, memory, throughput, the data's audit.

    The page is one file without scripts or anything from elsewhere: it can be mailed, kept, or opened without a network.

    Args:
        runs: Folders of runs, as in runs/quickstart; several are shown on the same axes.
        output: HTML file to write; an earlier report of that name is replaced.
        json: Print the summary of the runs as one JSON document on standard output.
    """
    target = _check_output(Path(output))
    found = read_runs(runs)
    summaries = summarize(found)
    _write(target, report_page(found, summaries))
    for run in found:
        for problem in run.problems:
            say(f"warning: {problem}")
    say(f"Report of {len(found)} run{'s' if len(found) > 1 else ''}: {target} ({target.stat().st_size / 1000:,.0f} kB)")
    if json:
        print(json_module.dumps({"output": str(target), "runs": [one.as_json() for one in summaries]}, indent=2, allow_nan=False))


def _check_output(target: Path) -> Path:
    """``target``, once it is known to be no file of another kind: a report replaces what is there."""
    if target.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--output must end in .html, got {target}; give another name")
    if target.is_dir():
        raise UserError(f"--output {target} is a folder; give the name of a file in it")
    if not target.parent.is_dir():
        raise UserError(f"--output {target}: there is no folder {target.parent}; make it, or name a file in another")
    return target


def _write(target: Path, page: str) -> None:
    """Whole or not at all: an earlier report stays until the new one is there."""
    beside = target.with_name(f"{target.name}.partial")
    try:
        beside.write_text(page, encoding="utf-8")
        beside.replace(target)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise UserError(f"--output {target} cannot be written ({error.strerror}); name a file that can") from error
