"""MMLU (Hendrycks et al., arXiv 2009.03300) from the files it is published in: questions, and the examples that stand before them.

Four sources: a folder of the CSVs of either edition, the hub's Parquet files (a download or a local copy), and JSON Lines as the QLoRA
authors released them, whose prompts are taken apart again and must be the paper's to the blank.
"""

import csv
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlora_lightning.data.files import read_rows
from qlora_lightning.data.hub import download
from qlora_lightning.data.rows import Row
from qlora_lightning.errors import UserError
from qlora_lightning.evaluation.mmlu.subjects import SUBJECTS

Split = Literal["test", "val", "dev"]
LETTERS = "ABCD"
HUB_REVISION = "c30699e8356da336a370243923dbaf21066bb9fe"  # cais/mmlu, March 2024: the edition of 14,042 test questions
_HEADER = "The following are multiple choice questions (with answers) about  {}.\n\n"  # two blanks, as the authors' code writes it
_OPTIONS = [f"\n{letter}. " for letter in LETTERS]
_JSON_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


@dataclass(frozen=True)
class Problem:
    """A question with its four choices."""

    question: str
    choices: tuple[str, str, str, str]
    answer: int
    """The right choice, from 0."""


@dataclass(frozen=True)
class Question:
    """A problem to be solved, and the solved ones that stand before it, in order."""

    subject: str
    problem: Problem
    shots: tuple[Problem, ...]


@dataclass(frozen=True)
class Exam:
    """What is read, and from where."""

    path: str | None = None
    """A folder of CSVs or Parquet files, or a file of JSON Lines (which is one split, whatever ``split`` says); None: ``hub_id``."""
    hub_id: str = "cais/mmlu"
    revision: str = HUB_REVISION
    split: Split = "test"
    shots: int | None = None
    """Solved examples before each question, the first of the dev split; None: 5, or as many as a JSON Lines file has."""
    subjects: Sequence[str] | None = None
    limit: int | None = None
    """Only the first so many questions of each subject."""

    def read(self) -> list[Question]:
        """The questions, subject by subject in alphabetical order.

        Raises:
            UserError: files or subjects are missing, a row is wrong, or there are fewer examples than asked for.
        """
        questions = self._from_prompts(self.path) if self.path is not None and self.holds_prompts else self._from_tables()
        chosen = _chosen(questions, self.subjects, self.path or self.hub_id)
        return [question for name in sorted(chosen) for question in questions[name][: self.limit]]

    @property
    def holds_prompts(self) -> bool:
        """Whether the source is JSON Lines, each with its examples in it."""
        return self.path is not None and self.path.endswith(_JSON_SUFFIXES)

    def _from_tables(self) -> dict[str, list[Question]]:
        if self.split == "dev" and self.shots != 0:
            raise UserError("mmlu.split dev holds the examples, which would stand before themselves with their answers; set --mmlu.shots 0")
        problems, examples = self._tables(self.split), {} if self.shots == 0 else self._tables("dev")
        wanted = 5 if self.shots is None else self.shots
        questions = {}
        for subject, solved in problems.items():
            shots = tuple(examples.get(subject, [])[:wanted])
            if len(shots) < wanted and self._wants(subject):
                raise UserError(
                    f"{self.path or self.hub_id}: {subject} needs {wanted} examples in its dev split, found {len(shots)}; "
                    f"add them or set --mmlu.shots {len(shots)}"
                )
            questions[subject] = [Question(subject, problem, shots) for problem in solved]
        return questions

    def _tables(self, split: Split) -> dict[str, list[Problem]]:
        """The problems of each subject in one split; none, unread, of a subject that is not wanted and has a file of its own."""
        name = "validation" if split == "val" else split  # as the hub has it
        if self.path is None:
            file = f"all/{name}-00000-of-00001.parquet"
            return _of_rows(read_rows(download(self.hub_id, file, self.revision, ("mmlu.", "mmlu.path"))))
        root = Path(self.path)
        if not root.exists():
            raise UserError(f"--mmlu.path {root}: no such file or folder; give a folder with dev/, val/ and test/ of MMLU's CSVs")
        for folder in (root / split, root / "data" / split):
            if files := sorted(folder.glob(f"*_{split}.csv")):
                subjects = {file.name.removesuffix(f"_{split}.csv"): file for file in files}
                return {subject: _of_csv(file) if self._wants(subject) else [] for subject, file in subjects.items()}
        files = sorted(root.glob(f"{name}-*.parquet")) or sorted(root.glob(f"all/{name}-*.parquet"))  # the hub's folder, or its parent
        if not files:
            raise UserError(
                f"--mmlu.path {root}: needs {split}/SUBJECT_{split}.csv for each subject (as published), or {name}-*.parquet of the hub, "
                "found neither; correct the path or --mmlu.split"
            )
        return _of_rows(located for file in files for located in read_rows(file))

    def _wants(self, subject: str) -> bool:
        return self.subjects is None or subject in self.subjects

    def _from_prompts(self, path: str) -> dict[str, list[Question]]:
        questions: dict[str, list[Question]] = defaultdict(list)
        for place, row in read_rows(path):
            question = _taken_apart(row, place)
            if self.shots is not None and self.shots > len(question.shots):
                raise UserError(
                    f"{place}: has {len(question.shots)} examples in its prompt, --mmlu.shots asks for {self.shots}; "
                    "lower it, or give the folder of CSVs"
                )
            shots = question.shots if self.shots is None else question.shots[: self.shots]
            questions[question.subject].append(Question(question.subject, question.problem, shots))
        return questions


def _chosen(found: Iterable[str], wanted: Sequence[str] | None, source: str) -> set[str]:
    """The subjects to score. A mean over a part of the published 57 compares with nothing, so that has to be said."""
    there = set(found)
    if wanted is not None:
        if missing := sorted(set(wanted) - there):
            raise UserError(f"{source} has no subject {', '.join(missing)}; it has {_listed(sorted(there))}")
        return set(wanted)
    if there < SUBJECTS.keys():
        raise UserError(
            f"{source} lacks {len(SUBJECTS) - len(there)} of MMLU's {len(SUBJECTS)} subjects ({_listed(sorted(SUBJECTS.keys() - there))}); "
            f"add them, or score a part with --mmlu.subjects {','.join(sorted(there)[:2])},..."
        )
    return there


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _of_csv(file: Path) -> list[Problem]:
    """A subject's problems: the first edition has no header and letters for answers, the later one a header and indices."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.reader(stream, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: cannot be read as CSV in UTF-8 ({error}); copy the file again") from error
    filled = [(f"{file}: row {number}", cells) for number, cells in enumerate(rows, 1) if cells]
    headed = bool(filled) and [filled[0][1][place].strip().lower() for place in (0, -1)] == ["question", "answer"]
    problems = [_of_cells(cells, place) for place, cells in filled[headed:]]
    if not problems:
        raise UserError(f"{file}: has no questions; copy the file again, or leave the subject out with --mmlu.subjects")
    return problems


def _of_cells(cells: list[str], place: str) -> Problem:
    if len(cells) != 6:
        raise UserError(f"{place}: needs 6 columns (question, four choices, answer), found {len(cells)}; correct the row")
    question, a, b, c, d, answer = cells
    return Problem(question, (a, b, c, d), _answer(answer, place))


def _of_rows(rows: Iterable[tuple[str, Row]]) -> dict[str, list[Problem]]:
    """The hub's schema: question, subject, choices (four), answer (an index)."""
    problems: dict[str, list[Problem]] = defaultdict(list)
    for place, row in rows:
        if missing := [name for name in ("question", "subject", "choices", "answer") if name not in row]:
            raise UserError(f"{place}: needs the fields question, subject, choices and answer, found no {missing[0]}; correct the row")
        choices = row["choices"]
        if not isinstance(choices, list) or len(choices) != 4:
            raise UserError(f"{place}: `choices` must be a list of four, got {choices!r}; correct the row")
        a, b, c, d = map(str, choices)
        problem = Problem(str(row["question"]), (a, b, c, d), _answer(row["answer"], place))
        problems[str(row["subject"])].append(problem)
    return problems


def _answer(value: object, place: str) -> int:
    text = str(value).strip()
    if text in set("0123"):
        return int(text)
    if text in set(LETTERS):
        return LETTERS.index(text)
    raise UserError(f"{place}: the answer must be a letter from A to D or an index from 0 to 3, got {text!r}; correct the row")


# ---- the authors' prompts ----


def paper_header(subject: str) -> str:
    """What the authors' prompts begin with."""
    return _HEADER.format(subject.replace("_", " "))


def written(problem: Problem, strip: bool = False) -> str:
    """A problem as it stands in a prompt, up to ``Answer:``."""
    question = problem.question.strip() if strip else problem.question
    return question + "".join(f"{option}{choice}" for option, choice in zip(_OPTIONS, problem.choices, strict=True)) + "\nAnswer:"


def _taken_apart(row: Row, place: str) -> Question:
    """The question of a row {subject, input, output}."""
    if missing := [name for name in ("subject", "input", "output") if not isinstance(row.get(name), str)]:
        raise UserError(f"{place}: needs the texts subject, input and output (the authors' JSON Lines), found no {missing[0]}")
    subject, prompt = str(row["subject"]), str(row["input"])
    header = paper_header(subject)
    if not prompt.startswith(header):
        raise UserError(f"{place}: `input` must begin with {header!r}, got {prompt[:80]!r}; give the authors' file or the folder of CSVs")
    *shots, last = re.split(r"(?<=\nAnswer: [ABCD])\n\n", prompt[len(header) :])
    solved = tuple(_parsed(text[:-2], text[-1], place) for text in shots)
    return Question(subject, _parsed(last, str(row["output"]), place), solved)


def _parsed(text: str, answer: str, place: str) -> Problem:
    rest, pieces = text.removesuffix("\nAnswer:"), list[str]()
    for option in reversed(_OPTIONS):
        rest, _, choice = rest.rpartition(option)
        pieces.insert(0, choice)
    a, b, c, d = pieces
    problem = Problem(rest, (a, b, c, d), _answer(answer, place))
    if written(problem) != text:
        raise UserError(f"{place}: a question must end in its choices A. to D. and Answer:, got {text[-80:]!r}; correct the row")
    return problem
