"""A judge's verdicts on pairs of answers: one record, whatever file it came from."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from qlora_lightning.errors import UserError

Kind = Literal["pairwise", "relative"]
Score = int | tuple[float, float] | None

_OWN = ("question_id", "kind", "first", "second", "score", "judge")
_SCORES = "1 (first), 2 (second), 3 (tie), two scores of 0 or more, or -1 (not parsed)"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge said on two answers to one question.

    Attributes:
        question: id of the question.
        category: of the question; empty where the file gives none.
        kind: pairwise says which answer is better, relative scores both.
        first: system whose answer the judge was shown first.
        second: the other system.
        score: pairwise: 1 (first is better), 2 (second) or 3 (tie); relative: both scores; None where the reply could not be parsed.
        judge: who said it.
    """

    question: str
    category: str
    kind: Kind
    first: str
    second: str
    score: Score
    judge: str

    @property
    def share(self) -> float | None:
        """The first answer's share of the win: 1, 0, or 0.5 for a tie; None where the reply could not be parsed."""
        if self.score is None:
            return None
        if isinstance(self.score, tuple):
            first, second = self.score
            return 0.5 if first == second else float(first > second)
        return {1: 1.0, 2: 0.0, 3: 0.5}[self.score]

    @property
    def pair(self) -> tuple[str, str]:
        """The two systems in the order of their names."""
        return (self.first, self.second) if self.first < self.second else (self.second, self.first)


def own_verdict(row: dict[str, Any], where: str) -> Verdict:
    """The verdict in a row of the ``judge`` command.

    Args:
        row: question_id, category, kind, first, second, score, judge, and more.
        where: file and line, for errors.

    Raises:
        UserError: a field is missing or means nothing, a name is no text, or a system is judged against itself.
    """
    missing = [field for field in _OWN if field not in row]
    if missing or row["kind"] not in ("pairwise", "relative"):
        raise UserError(
            f"{where}: a verdict needs {', '.join(_OWN)} (kind: pairwise or relative), found {described(row)}; "
            "give a folder that holds files of `judge` or the released ratings of QLoRA's authors"
        )
    if row["first"] == row["second"]:
        raise UserError(f"{where}: a verdict needs two systems, found {row['first']!r} on both sides; remove the line")
    if type(row["question_id"]) not in (int, str):
        raise UserError(f"{where}: question_id must be a number or text, found {str(row['question_id'])[:40]}; correct the row")
    score = parsed_score(row["score"], where)
    if score is not None and isinstance(score, tuple) != (row["kind"] == "relative"):
        raise UserError(f"{where}: the score {row['score']} is none of a {row['kind']} verdict; correct the row")
    names = {field: _name(row[field], field, where) for field in ("first", "second", "judge")}
    return Verdict(str(row["question_id"]), str(row.get("category", "")), row["kind"], score=score, **names)


def _name(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip() or any("\ud800" <= one <= "\udfff" for one in value):  # halves of pairs
        raise UserError(f"{where}: {field} must be a name, found {str(value)[:40]!r}; correct the row")
    return value


def parsed_score(score: Any, where: str) -> Score:
    """A score of a rating file: of either format, -1 (alone, or in a list) stands for a reply that could not be parsed.

    Raises:
        UserError: it is none.
    """
    if isinstance(score, list) and len(score) == 2 and all(map(_is_score, score)):
        return None if -1 in score else (float(score[0]), float(score[1]))
    if type(score) is int and score in (-1, 1, 2, 3):
        return None if score == -1 else score
    raise UserError(f"{where}: score must be {_SCORES}, found {score!r}; correct the row")


def _is_score(one: Any) -> bool:
    return type(one) in (int, float) and (0 <= one < math.inf or one == -1)


def described(row: dict[str, Any]) -> str:
    """The fields of a row, for an error."""
    kind = f" with kind {str(row['kind'])[:40]!r}" if "kind" in row else ""
    return (visible(", ".join(row))[:200] or "no field") + kind


def visible(text: str) -> str:
    """``text`` in one line: what would break it, turn it or command a terminal is written out, as in ``\\u001b``."""
    return "".join(one if one.isprintable() else f"\\u{ord(one):04x}" for one in text)
