"""The rating files that QLoRA's authors released (artidoro/qlora, eval/ratings-gpt4), with their traps.

A row says which answers were compared, by id, and not which systems; those stand in the file's name, ``A-vs-B-JUDGE-reviewer.jsonl``.
66 of the 72 names in ``relative-gpt-3.5`` give the order backwards, so it is settled from the answer ids: a system that was compared
with several others is the one whose answer is in all the files that name it.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from qlora_lightning.errors import UserError
from qlora_lightning.evaluation.tournament.verdicts import Verdict, described, parsed_score

_FIELDS = ("answer1_id", "answer2_id", "score")
# The judge is what stands between the second system and "-reviewer"; its own name may hold dashes (gpt-4).
_NAME = re.compile(r"(?P<a>.+?)[-_]vs[-_](?P<b>.+?)-(?P<judge>gpt-[\d.]+(?:-turbo)?|[^-]+)-reviewer(?:-threeclass)?\.jsonl")
_ONE_NAME = {"gpt35": "gpt-3.5", "gpt4": "gpt-4"}  # the same system, spelt in two ways in different folders

Located = tuple[str, dict[str, Any]]
"""File and line of a row, and its fields."""


@dataclass(frozen=True)
class ReleasedFile:
    """Rows of one file, the systems and the judge that its name gives, and where it lies."""

    name: str
    a: str
    b: str
    judge: str
    rows: list[Located]


def is_released(row: dict[str, Any]) -> bool:
    """Whether a row is of the released files' schema, or means to be."""
    return "answer1_id" in row


def released_file(name: str, rows: list[Located]) -> ReleasedFile:
    """Take a file's name apart.

    Raises:
        UserError: it does not name two systems, or a row lacks a field.
    """
    for where, row in rows:
        if not {*_FIELDS} <= {*row} or not {"question_id", "message_id"} & {*row}:
            raise UserError(
                f"{where}: a released verdict needs question_id or message_id, {', '.join(_FIELDS)}; found {described(row)}; correct it"
            )
    match = _NAME.fullmatch(PurePosixPath(name).name)
    if match is None:
        raise UserError(
            f"{name}: the rows give answer ids alone, so the file's name must give the systems, as A-vs-B-JUDGE-reviewer.jsonl; rename it"
        )
    a, b = system_name(match["a"]), system_name(match["b"])
    if a == b:
        raise UserError(f"{name}: the file's name must give two systems, found {a!r} on both sides; rename it")
    return ReleasedFile(name, a, b, system_name(match["judge"]), rows)


def system_name(name: str) -> str:
    """The name in a part of a file name: ``13b-guanaco-oa-generations-topp0.9-temp0.7`` is 13b-guanaco, ``answer-gpt35`` gpt-3.5."""
    short = re.sub(r"-(?:oa|vicuna)-generations.*$", "", name).removeprefix("answer-")
    return _ONE_NAME.get(short, short)


def released_verdicts(files: list[ReleasedFile]) -> tuple[list[Verdict], list[str]]:
    """The verdicts of one folder, and what is to be told about their names.

    Raises:
        UserError: a score means nothing.
    """
    ids = _answer_ids(files)
    verdicts, backwards, unsettled = [], 0, 0
    for file in files:
        order = _order(file, ids)
        backwards += order < 0
        unsettled += order == 0
        first, second = (file.b, file.a) if order < 0 else (file.a, file.b)
        verdicts += [_verdict(row, where, first, second, file.judge) for where, row in file.rows]
    folder = PurePosixPath(files[0].name).parent.name
    notes = []
    if backwards:
        notes.append(f"{folder}: {backwards} of {len(files)} file names give the order of the answers backwards; the answer ids settled it")
    if unsettled:
        notes.append(f"{folder}: of {unsettled} of {len(files)} files no answer id settles the order; their names were trusted")
    return verdicts, notes


def _verdict(row: dict[str, Any], where: str, first: str, second: str, judge: str) -> Verdict:
    score = parsed_score(row["score"], where)
    relative = isinstance(row["score"], list)
    return Verdict(_question(row), str(row.get("category", "")), "relative" if relative else "pairwise", first, second, score, judge)


def _question(row: dict[str, Any]) -> str:
    return str(row["question_id"] if "question_id" in row else row["message_id"])


def _answers(row: dict[str, Any]) -> tuple[str, str]:
    return str(row["answer1_id"]), str(row["answer2_id"])


def _answer_ids(files: Iterable[ReleasedFile]) -> dict[tuple[str, str], str]:
    """(system, question) -> id of its answer, for the systems that were compared with at least two others.

    The id must be in most files of the system, not in all: of two systems the answers were generated anew between the two orders.
    """
    partners: dict[str, set[str]] = defaultdict(set)
    seen: dict[tuple[str, str], list[str]] = defaultdict(list)
    for file in files:
        for system, partner in ((file.a, file.b), (file.b, file.a)):
            partners[system].add(partner)
            for _, row in file.rows:
                seen[system, _question(row)] += {*_answers(row)}
    ids = {}
    for (system, question), answers in seen.items():
        if len(partners[system]) > 1:
            (likeliest, most), *others = Counter(answers).most_common(2)
            if not others or most > others[0][1]:
                ids[system, question] = likeliest
    return ids


def _order(file: ReleasedFile, ids: dict[tuple[str, str], str]) -> int:
    """Above 0 where the file's name gives the order of the answers, below 0 where it gives it backwards, 0 where nothing tells."""
    votes = 0
    for _, row in file.rows:
        a, b = ids.get((file.a, _question(row))), ids.get((file.b, _question(row)))
        first, second = _answers(row)
        votes += (first == a) + (second == b) - (second == a) - (first == b)
    return votes
