"""``elo``: who is better than whom, from verdicts on pairs of answers."""

import json as json_module
import math
import time
from pathlib import Path

from qlora_lightning.console import say
from qlora_lightning.errors import UserError
from qlora_lightning.evaluation.tournament.ratings import read_ratings
from qlora_lightning.evaluation.tournament.released import system_name
from qlora_lightning.evaluation.tournament.report import show, write_report
from qlora_lightning.evaluation.tournament.standings import document, hold
from qlora_lightning.evaluation.tournament.verdicts import Verdict

_REFERENCE = "gpt-3.5"  # ChatGPT, as in the paper


def elo(
    ratings: str,
    k: float = 32.0,
    orderings: int = 10_000,
    seed: int = 0,
    reference: str | None = None,
    output: str | None = None,
    json: bool = False,
) -> None:
    """Rate models from verdicts on pairs of their answers: Elo with intervals, Bradley-Terry, win rates, order bias, % of a reference.

    Elo, Bradley-Terry, win rates and order bias come from the pairwise verdicts; where there are none, from the relative ones, of which the
    higher score wins. The % of the reference comes from the relative verdicts. Replies that could not be parsed are counted and left out.

    Args:
        ratings: Folder that `judge` wrote, or the released GPT-4 ratings of QLoRA's authors: a folder, one file, the .tar.xz as it was
            published, or ratings-gpt4.tar.xz/oa for a folder in it.
        k: Points that one match moves at most. The paper's text says 32, and so was its OA column made; its Vicuna column needs 4.
        orderings: Random orders of the matches; the rating is the mean of what they end with.
        seed: Seed of the orders and of the samples for the intervals.
        reference: The system that counts as 100 %; by default gpt-3.5, where it takes part.
        output: Folder for report.md, ratings.png and ratings.svg; made where it does not exist.
        json: Print one JSON document on standard output.
    """
    if not (k > 0 and math.isfinite(k)):
        raise UserError(f"--k must be above 0, got {k:g}; leave it out for 32")
    if orderings < 1:
        raise UserError(f"--orderings must be 1 or more, got {orderings}; leave it out for 10,000")
    if seed < 0:
        raise UserError(f"--seed must be 0 or more, got {seed}; leave it out for 0")
    folder = _folder(output)
    began = time.perf_counter()
    read = read_ratings(ratings)
    found = hold(read, ratings, k, orderings, seed, _reference(read.verdicts, reference))
    if folder is not None:
        written = write_report(found, folder)
    show(found)
    say(f"{time.perf_counter() - began:.1f} s" + (f"; written: {', '.join(map(str, written))}" if folder is not None else ""))
    if json:
        print(json_module.dumps(document(found), indent=2, ensure_ascii=False, allow_nan=False))


def _reference(verdicts: list[Verdict], asked: str | None) -> str | None:
    """The reference's name as the verdicts spell it; None where none was asked for and the usual one is missing."""
    systems = {name.lower(): name for verdict in verdicts if verdict.kind == "relative" for name in verdict.pair}
    name = systems.get((asked or _REFERENCE).lower()) or systems.get(system_name(asked or _REFERENCE).lower())
    if name is None and asked is not None:
        there = ", ".join(sorted(systems.values())) or "none: judge with --mode relative"
        raise UserError(f"--reference must be a system with relative verdicts, got {asked!r}; there are {there}")
    return name


def _folder(output: str | None) -> Path | None:
    """The folder for the report, made before the work is done."""
    if output is None:
        return None
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output} must be a folder that can be written ({error.strerror}); give another") from error
    return Path(output)
