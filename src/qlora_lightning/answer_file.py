"""Answers, and the file that keeps them as they come, so that a run that ends early goes on where it was."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_lightning.data.rows import Row
from qlora_lightning.errors import UserError
from qlora_lightning.evaluation.output import check_output as check_file

_ESCAPED = "backslashreplace"  # half a surrogate pair, which UTF-8 cannot write, becomes JSON's own escape for it


@dataclass(frozen=True)
class Answer:
    """What a model answered."""

    generation: str
    """The text, up to the end of turn."""
    generated_tokens: int
    """Tokens drawn, with the one that ended the turn; of a server as it counted them, 0 where it did not say."""
    finish: str
    """``stop`` where the model ended its turn, ``length`` where ``max_new_tokens`` did; a server may have further words."""


class AnswerFile:
    """Answers to the prompts 0, 1, … of a file, on disk as soon as they are there.

    ``OUT.partial`` opens with a line that says what is asked of whom and how; then each answer has a line, in the order in which they came.
    ``finish`` writes OUT itself in the order of the prompts, so that some answers never pass for all.

    Args:
        target: OUT.
        identity: Plain values that every answer depends on: answers begun with others are refused.
        overwrite: Begin anew, whatever is there.

    Raises:
        UserError: ``target`` cannot be written, exists, or was begun otherwise.
    """

    def __init__(self, target: Path, identity: dict[str, Any], overwrite: bool = False) -> None:
        self.target = target
        self.partial = target.with_name(target.name + ".partial")
        self.done: dict[int, Answer] = {}
        """The answers so far, by the number of their prompt."""
        self._identity = json.loads(json.dumps(identity))
        if not overwrite and self.partial.exists():
            self._resume()

    def _resume(self) -> None:
        """Take over what is whole: a line that a kill cut is taken off. Without an answer there is nothing to go on with."""
        whole, _, cut = self.partial.read_bytes().rpartition(b"\n")
        try:
            header, *lines = [json.loads(line) for line in whole.splitlines()] or [{}]
            done = {line.pop("number"): Answer(**line) for line in lines}
            if done:
                self._check(header)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise UserError(f"{self.partial} holds no answers of this tool; remove it, or begin anew with --overwrite") from error
        self.done = done
        if done and cut:
            with self.partial.open("r+b") as file:
                file.truncate(len(whole) + 1)

    def _check(self, begun: dict[str, Any]) -> None:
        for name in self._identity | begun:
            if begun.get(name) != self._identity.get(name):
                raise UserError(
                    f"{self.partial} was begun with {name} {_short(begun.get(name))}, now it is {_short(self._identity.get(name))}; "
                    "go on with the same, give another output, or begin anew with --overwrite"
                )

    def add(self, answers: Sequence[tuple[int, Answer]]) -> None:
        """Keep answers, each with the number of its prompt. The first take the place of a file that was to be overwritten."""
        lines = [{"number": number, **asdict(answer)} for number, answer in answers]
        mode, lines = ("a", lines) if self.done else ("w", [self._identity, *lines])
        try:
            with self.partial.open(mode, encoding="utf-8", errors=_ESCAPED) as file:
                file.writelines(map(_line, lines))
        except OSError as error:
            raise self._unwritable(error) from error
        if mode == "w":
            self.target.unlink(missing_ok=True)  # were it kept, it would bar the way to go on without `overwrite`
        self.done |= answers

    def finish(self, rows: Sequence[Row]) -> None:
        """Write the file: each row's own fields and its answer, in the order of the rows; all must be answered.

        Raises:
            UserError: the disk does not take it; the answers stay in ``OUT.partial``.
        """
        ordered = self.target.with_name(self.target.name + ".ordered")
        try:
            with ordered.open("w", encoding="utf-8", errors=_ESCAPED) as file:
                file.writelines(_line(row | asdict(self.done[number])) for number, row in enumerate(rows))
            ordered.replace(self.target)
        except OSError as error:
            ordered.unlink(missing_ok=True)
            raise self._unwritable(error) from error
        self.partial.unlink()

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"output {self.target} cannot be written ({error.strerror}); mend that, then the same command goes on, or give another output"
        )


def check_output(target: Path, prompts: Path, overwrite: bool) -> None:
    """Raises UserError unless answers may be written there: known before a model loads, which takes long."""
    if target.exists() and prompts.exists() and target.samefile(prompts):
        raise UserError(f"answers must not take the place of their prompts, got {target} for both; give another name")
    check_file(str(target), overwrite)


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False, default=str) + "\n"  # default: Parquet has dates


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}…"
