"""Questions, and the answers of several systems to them, from files of ours and of the QLoRA authors."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

from qlora_lightning.data.files import read_rows
from qlora_lightning.data.rows import Row, fields_of, text_of
from qlora_lightning.errors import UserError
from qlora_lightning.evaluation.judge.reviews import digest

IDS = ("question_id", "message_id", "id")
"""Fields that say which question a row belongs to; the first that a row has counts."""
_QUESTIONS = ("text", "question", "prompt", "instruction")
_ANSWERS = ("generation_truncated", "generation", "text")
_NAMED = 5  # ids in an error


@dataclass(frozen=True)
class Question:
    """What all systems were asked."""

    id: str | int
    text: str
    category: str


@dataclass(frozen=True)
class System:
    """One model's answers, by question id."""

    name: str
    answers: dict[str, str]

    @property
    def digest(self) -> str:
        """Hash of the answers: verdicts on other answers of the same name are no part of the same tournament."""
        return digest(sorted(self.answers.items()))


@dataclass(frozen=True)
class Match:
    """Two systems whose answers are compared, in the order in which the judge sees them."""

    first: System
    second: System


def read_questions(path: str | Path, limit: int | None = None) -> list[Question]:
    """The questions of a file: ``text``, ``question``, ``prompt`` or ``instruction`` (with ``input``), an id, and a ``category`` if any.

    The authors' transcripts of several turns ("### Human: …") are taken as they are, as they were shown to their judge.

    Args:
        path: A .jsonl, .json, .csv or .parquet file.
        limit: Only the first so many.

    Raises:
        UserError: a row has no id or no text, or an id stands twice.
    """
    found: dict[str, Question] = {}
    for where, row in read_rows(path, limit):
        identity = _identity(row, where)
        if str(identity) in found:
            raise UserError(f"{where}: each question must have an id of its own, but {identity!r} stands in an earlier row too; correct it")
        text = _text(row, _QUESTIONS, where)
        context = row.get("input") if "text" not in row and "instruction" in row else None
        category = row.get("category") or "general"
        found[str(identity)] = Question(identity, f"{text}\n\n{context}" if context else text, str(category))
    return list(found.values())


def read_systems(named: Sequence[str]) -> list[System]:
    """Systems from ``FILE`` (named after the file, less its ending) or ``NAME=FILE``.

    Raises:
        UserError: fewer than two, a name that stands twice or that no file can have, or a file without answers.
    """
    if len(named) < 2:
        raise UserError(f"judging needs the answers of two systems or more, got {len(named)}; give --answers A.jsonl B.jsonl")
    files = [_named(entry) for entry in named]
    names = [name for name, _ in files]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"each system must have a name of its own, but {name!r} stands {names.count(name)} times; give NAME=FILE")
        if not name or "/" in name or "\\" in name:
            raise UserError(f"a system's name becomes part of a file's name, got {name!r}; give NAME=FILE without slashes in NAME")
        if "-vs-" in name:
            raise UserError(f"-vs- stands between the systems in a verdict file's name, not in a system's, got {name!r}; give NAME=FILE")
    return [System(name, _answers(path)) for name, path in files]


def _named(entry: str) -> tuple[str, str]:
    name, equals, path = entry.partition("=")
    if equals and not Path(entry).exists():
        return name, path
    return Path(entry).name.removesuffix(".gz").rpartition(".")[0], entry


def _answers(path: str) -> dict[str, str]:
    """Answer texts by question id.

    ``generation_truncated`` comes before ``generation``: there the authors cut what a model wrote when it went on with a human's turn of
    its own, and that is what was judged. Nothing is cut here. ``text`` is an answer where neither is there (baselines of the authors).
    """
    found: dict[str, str] = {}
    for where, row in read_rows(path):
        identity = str(_identity(row, where))
        if identity in found:
            raise UserError(f"{where}: a system answers each question once, but {identity!r} stands in an earlier row too; remove one")
        found[identity] = _text(row, _ANSWERS, where)
    return found


def _identity(row: Row, where: str) -> str | int:
    for field in IDS:
        if isinstance(value := row.get(field), (str, int)):
            return value
    raise UserError(f"{where}: a row must name its question in {', '.join(IDS[:-1])} or {IDS[-1]}, found {fields_of(row)}; add one")


def _text(row: Row, fields: Sequence[str], where: str) -> str:
    for field in fields:
        if isinstance(row.get(field), str):
            return text_of(row, field, where, may_be_empty=True)
    raise UserError(f"{where}: a row needs a text in {', '.join(fields[:-1])} or {fields[-1]}, found {fields_of(row)}; add one")


def check_same_questions(questions: Iterable[Question], systems: Iterable[System]) -> None:
    """Check that every system answers every question. More answers than questions are fine (``--limit``).

    Raises:
        UserError: one does not.
    """
    asked = [str(question.id) for question in questions]
    for system in systems:
        missing = [identity for identity in asked if identity not in system.answers]
        if missing:
            listed = ", ".join(missing[:_NAMED]) + (f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else "")
            raise UserError(
                f"all systems must answer the same questions, but {system.name} has no answer to {len(missing)} of {len(asked)}: "
                f"{listed}; complete its file, or judge the first questions only with --limit"
            )


def pair_up(systems: Sequence[System], reference: str | None, orders: Literal["both", "one"]) -> list[Match]:
    """Every pair of systems, or every system against the reference; in both orders, or with the earlier (the reference) first.

    Raises:
        UserError: no system has the reference's name.
    """
    pairs = list(combinations(systems, 2))
    if reference is not None:
        known = {system.name: system for system in systems}
        if reference not in known:
            raise UserError(f"the reference must be one of the systems, got {reference!r}; they are: {', '.join(known)}")
        pairs = [(known[reference], system) for system in systems if system.name != reference]
    return [Match(*order) for pair in pairs for order in (pair, pair[::-1])[: 2 if orders == "both" else 1]]
