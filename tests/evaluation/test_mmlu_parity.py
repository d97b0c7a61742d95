"""Our MMLU against lm-evaluation-harness, by the script that proves it on a real model: every question, both styles, one model."""

import csv
import importlib.util
from pathlib import Path
from types import ModuleType

import datasets
import pytest
import torch
from transformers import AutoTokenizer

from qlora_lightning.modeling.loading import Storage, load_stored
from qlora_lightning.modeling.trained import TrainedModel

CPU = torch.device("cpu")
SUBJECTS = ["anatomy", "astronomy", "us_foreign_policy"]


@pytest.fixture(scope="module")
def parity() -> ModuleType:
    """The script benchmarks/mmlu_parity.py."""
    file = Path(__file__).parents[2] / "benchmarks" / "mmlu_parity.py"
    spec = importlib.util.spec_from_file_location("mmlu_parity", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def mmlu_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sums as MMLU publishes its questions: 5 in dev, 6 in test; some questions and choices with blanks around them, one with a comma."""
    folder = tmp_path_factory.mktemp("mmlu")
    for split, rows in {"dev": 5, "test": 6}.items():
        (folder / split).mkdir()
        for number, subject in enumerate(SUBJECTS):
            with (folder / split / f"{subject}_{split}.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(_row(number, row, split == "test") for row in range(rows))
    return folder


def _row(subject: int, row: int, blanks: bool) -> list[str]:
    right = (subject + row) % 4
    question = f" {subject}, {row}: sum? " if blanks and row % 3 == 0 else f"{row}+{subject}?"
    return [question, *(f"{row + subject + choice - right}{' ' * (choice == 1)}" for choice in range(4)), "ABCD"[right]]


@pytest.fixture
def model(tiny_base: Path) -> TrainedModel:
    return _model(tiny_base, "16bit")


def _model(base: Path, storage: Storage) -> TrainedModel:
    stored = load_stored(str(base), storage, torch.float32, CPU).eval()
    return TrainedModel(stored, AutoTokenizer.from_pretrained(base), torch.float32, storage, {}, "tiny")


@pytest.mark.parametrize("style", ["paper", "lm_eval"])
@pytest.mark.parametrize("storage", ["16bit", "nf4-dq"])
def test_the_same_letter_for_every_question(parity: ModuleType, mmlu_folder: Path, tiny_base: Path, style: str, storage: Storage) -> None:
    trained = _model(tiny_base, storage)
    ours = parity.our_answers(trained, mmlu_folder, SUBJECTS, style)
    theirs = parity.harness_answers(trained, mmlu_folder, SUBJECTS, style)
    for subject in SUBJECTS:
        assert ours[subject].cut == 0 and len(ours[subject].choices) == 6
        assert ours[subject].choices == theirs[subject].choices, subject
        assert parity.difference(ours[subject], theirs[subject]) < 1e-4, subject


def test_the_comparison_sees_a_difference(parity: ModuleType, mmlu_folder: Path, model: TrainedModel) -> None:
    """One blank in the heading, or four examples for five, and the scores are others."""
    ours = parity.our_answers(model, mmlu_folder, ["anatomy"], "paper")["anatomy"]
    for style, shots in (("lm_eval", 5), ("paper", 4)):
        theirs = parity.harness_answers(model, mmlu_folder, ["anatomy"], style, shots)["anatomy"]
        assert parity.difference(ours, theirs) > 1e-3


def test_prompts_of_the_harness_are_ours(parity: ModuleType, mmlu_folder: Path, model: TrainedModel, tmp_path: Path) -> None:
    from qlora_lightning.evaluation.harness.model import run_tasks
    from qlora_lightning.evaluation.harness.tasks import find_tasks, prepare_tasks
    from qlora_lightning.evaluation.mmlu.prompts import prompt_text
    from qlora_lightning.evaluation.mmlu.questions import Exam

    for style in ("paper", "lm_eval"):
        found = find_tasks([str(parity.write_task(mmlu_folder, tmp_path, "anatomy", style))])
        prepare_tasks(found, 5, None)
        samples = run_tasks(model, found)["samples"][f"{style}_anatomy"]
        questions = Exam(str(mmlu_folder), subjects=["anatomy"]).read()
        assert [sample["arguments"][2] for sample in samples] == [(prompt_text(question, style), " C") for question in questions]


def test_bos_stands_where_the_tokenizer_puts_it(parity: ModuleType, mmlu_folder: Path, model: TrainedModel) -> None:
    from tokenizers.processors import TemplateProcessing

    plain = parity.our_answers(model, mmlu_folder, ["anatomy"], "paper")["anatomy"]
    model.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    ours = parity.our_answers(model, mmlu_folder, ["anatomy"], "paper")["anatomy"]
    theirs = parity.harness_answers(model, mmlu_folder, ["anatomy"], "paper")["anatomy"]
    assert parity.difference(plain, ours) > 1e-3
    assert parity.difference(ours, theirs) < 1e-4


@pytest.fixture(autouse=True)
def own_data_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing that the harness prepares goes into the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
