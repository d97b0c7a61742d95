"""Rating files for tests, of both schemas."""

import json
from pathlib import Path
from typing import Any


def own_row(question: int, first: str, second: str, score: Any, judge: str = "judge", kind: str = "pairwise") -> dict[str, Any]:
    """A row as ``judge`` writes it."""
    row = {"question_id": question, "category": "generic", "kind": kind, "first": first, "second": second}
    return {**row, "score": score, "judge": judge, "reply": "said so"}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write JSON Lines, and the folders that the file needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def round_robin(strengths: dict[str, int], questions: int, judge: str = "judge") -> list[dict[str, Any]]:
    """Everyone against everyone in both orders: the stronger wins, on every third question the weaker, equals are tied."""
    rows = []
    for question in range(questions):
        for first in strengths:
            for second in strengths:
                gap = (strengths[first] - strengths[second]) * (-1 if question % 3 == 2 else 1)
                if first != second:
                    rows.append(own_row(question, first, second, 3 if not gap else 1 if gap > 0 else 2, judge))
    return rows


def released_row(question: int, answer1: str, answer2: str, score: Any, id_field: str = "question_id") -> dict[str, Any]:
    """A row as in the authors' files, which names answers and no systems."""
    row = {"review_id": f"r{question}", id_field: question, "answer1_id": answer1, "answer2_id": answer2}
    return {**row, "reviewer_id": 1, "metadata": {}, "text": "said so", "score": score}
