"""A small exam in the schema of MMLU's CSVs, for the tests that need one."""

import csv
import random
from pathlib import Path

SUBJECTS = ("abstract_algebra", "anatomy", "formal_logic")


def rows(subject: str, count: int, seed: int) -> list[list[str]]:
    """Sums with four choices; the answer is a letter. Some questions hold line ends, quotes and commas, as MMLU's do."""
    draw = random.Random(f"{subject}-{seed}")
    made = []
    for number in range(count):
        a, b, right = draw.randint(1, 9), draw.randint(1, 9), draw.randrange(4)
        wrong = draw.sample([value for value in range(2, 30) if value != a + b], 3)
        choices = [str(value) for value in [*wrong[:right], a + b, *wrong[right:]]]
        asked = [f"{a} + {b} = ?", f'What is "{a}, {b}" added up?', f"Given {a}\nand {b}, the sum is ", f" In {subject}: {a} and {b}?"]
        made.append([asked[number % 4], *choices, "ABCD"[right]])
    return made


def write_exam(root: Path, subjects: tuple[str, ...] = SUBJECTS, questions: int = 6, header: bool = False) -> Path:
    """``root`` with dev/ (five rows a subject) and test/, in the first edition's form or, with ``header``, the later one's."""
    for split, count in (("dev", 5), ("test", questions)):
        (root / split).mkdir(parents=True, exist_ok=True)
        for subject in subjects:
            with (root / split / f"{subject}_{split}.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                if header:
                    writer.writerow(["question", "choice0", "choice1", "choice2", "choice3", "answer"])
                for row in rows(subject, count, seed=len(split)):
                    writer.writerow([*row[:5], "ABCD".index(row[5])] if header else row)
    return root
