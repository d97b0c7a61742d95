"""Small files of questions and answers in the shapes that `judge` reads."""

import json
from pathlib import Path
from typing import Any

QUESTIONS = [
    {"question_id": 1, "text": "What is two and two?", "category": "math"},
    {"question_id": 2, "text": "Name a river.", "category": "generic"},
    {"question_id": 3, "text": "Why do cats purr?", "category": "generic"},
]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """JSON Lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def answer_file(folder: Path, name: str, questions: list[dict[str, Any]] = QUESTIONS) -> Path:
    """What ``generate`` writes: the question's own fields and ``generation``."""
    return write_rows(folder / f"{name}.jsonl", [{**row, "generation": f"{name} says {row['question_id']}"} for row in questions])


def tournament(folder: Path, *names: str) -> list[str]:
    """Options of `judge` for systems with these names."""
    questions = write_rows(folder / "questions.jsonl", QUESTIONS)
    answers = [str(answer_file(folder, name)) for name in names]
    return ["judge", *answers, "--questions", str(questions), "--output", str(folder / "out")]


def read_verdicts(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The verdicts of every match, by the name of its file."""
    return {
        path.stem: [json.loads(line) for line in path.read_text("utf-8").splitlines()] for path in sorted(folder.glob("out/*-vs-*.jsonl"))
    }
