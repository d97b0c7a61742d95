"""Answering files of prompts."""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from rich.console import Console
from running import base_options, line_of

from qlora_lightning import answering
from qlora_lightning.answer_file import Answer
from qlora_lightning.answering import Pace
from qlora_lightning.callbacks.predictions import Predictions
from qlora_lightning.cli import main
from qlora_lightning.data.formats import Conversation, Message
from qlora_lightning.generation import Assistant, GenerationSpec
from qlora_lightning.module import QLoRAModule


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_generate_writes_a_row_for_each_prompt_with_its_own_fields(fit: Callable[..., Path], tmp_path: Path) -> None:
    adapter = fit("trainer.max_steps=1") / "checkpoints" / "last"
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    rows = [
        {"id": 7, "prompt": "Hi"},
        {"instruction": "Add", "input": "1 2"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]},
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["generate", str(prompts), str(output), "--adapter", str(adapter), "--max_new_tokens", "4", "--batch_size", "2"]
    assert main(command) == 0
    written = rows_of(output)
    added = {"generation", "generated_tokens", "finish"}
    assert [{key: value for key, value in row.items() if key not in added} for row in written] == rows
    assert all(isinstance(row["generation"], str) and 1 <= row["generated_tokens"] <= 4 for row in written)
    assert {row["finish"] for row in written} <= {"stop", "length"}


def test_generate_does_not_overwrite(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, output = tmp_path / "p.txt", tmp_path / "out.jsonl"
    prompts.write_text("Hi\n")
    output.write_text("precious")
    command = ["generate", str(prompts), str(output), "--base_model", str(tiny_base), "--max_new_tokens", "2"]
    assert main(command) == 2
    assert "exists; give another name or --overwrite" in capsys.readouterr().err
    assert output.read_text() == "precious"
    assert main([*command, "--overwrite"]) == 0
    assert json.loads(output.read_text())["prompt"] == "Hi"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("Hi\n\nAnd you?\n")
    return file


def test_batch_size_of_nothing(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = line_of(capsys, "generate", str(prompts), str(tmp_path / "out.jsonl"), "--batch_size", "0")
    assert line == "batch_size must be 1 or more, got 0; leave it out for 8"


def test_output_that_is_a_folder(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = line_of(capsys, "generate", str(prompts), str(tmp_path), "--overwrite")
    assert line == f"output {tmp_path} is a folder; give the name of a file in it"


def test_answers_never_replace_their_prompts(prompts: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = line_of(capsys, "generate", str(prompts), str(prompts), "--base_model", str(tiny_base), "--overwrite")
    assert line == f"answers must not take the place of their prompts, got {prompts} for both; give another name"
    assert prompts.read_text() == "Hi\n\nAnd you?\n"


def test_an_unknown_way_of_sampling(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = line_of(capsys, "generate", str(prompts), str(tmp_path / "out.jsonl"), "--sampling", "nucleus")
    assert line.startswith("sampling: ") and "'greedy', 'paper'" in line and "nucleus" in line


def test_a_misspelt_template_costs_no_model(prompts: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(prompts), str(tmp_path / "out.jsonl"), "--base_model", str(tiny_base), "--template", "chatmll"]
    assert main(command) == 2
    err = capsys.readouterr().err
    assert "got 'chatmll', nearest is chatml" in err and "Loading" not in err


def test_unreadable_prompts_cost_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = line_of(capsys, "generate", str(tmp_path / "none.txt"), str(tmp_path / "out.jsonl"), "--base_model", "/no/model")
    assert line == f"{tmp_path / 'none.txt'}: no such file or folder; give one that exists"


def drawn_with(spec: list[GenerationSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer nothing, but note how."""

    def noted(self: Assistant, conversations: Mapping[int, Conversation], how: GenerationSpec, *_: Any) -> Iterator[Any]:
        spec.append(how)
        yield [(number, Answer("a", 1, "stop")) for number in conversations]

    monkeypatch.setattr(Assistant, "answer_all", noted)


@pytest.mark.parametrize(
    "options, temperature, top_p",
    [
        ([], 0.0, 0.9),
        (["--sampling", "paper"], 0.7, 0.9),
        (["--sampling", "paper", "--top_p", "0.5"], 0.7, 0.5),
        (["--temperature", "1"], 1.0, 0.9),
    ],
)
def test_the_papers_sampling_by_one_word(
    prompts: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], temperature: float, top_p: float
) -> None:
    drawn_with(specs := [], monkeypatch)
    assert main(["generate", str(prompts), str(tmp_path / "out.jsonl"), "--base_model", str(tiny_base), *options]) == 0
    assert specs == [GenerationSpec(256, temperature, top_p, 0)]


def test_the_storage_of_the_base_can_be_chosen(prompts: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(prompts), str(tmp_path / "out.jsonl"), "--base_model", str(tiny_base), "--max_new_tokens", "2"]
    assert main([*command, "--storage", "16bit"]) == 0
    assert "as 16bit onto cpu" in capsys.readouterr().err


# Interrupted runs


class Killed(BaseException):
    """Stands for a kill: nothing in the code handles it."""


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"question_id": n, "text": "why " * (n * 3 % 7 + 1)}) + "\n" for n in range(7)))
    return file


@pytest.fixture
def command(questions: Path, tiny_base: Path, tmp_path: Path) -> list[str]:
    options = ["--sampling", "paper", "--max_new_tokens", "6", "--batch_size", "2"]
    return ["generate", str(questions), str(tmp_path / "out.jsonl"), "--base_model", str(tiny_base), *options]


def killed_after(batches: int, command: list[str]) -> None:
    """Run ``command`` until so many batches are answered."""
    complete, count = Assistant.complete, 0

    def dies_later(self: Assistant, *arguments: Any) -> list[Answer]:
        nonlocal count
        count += 1
        if count > batches:
            raise Killed
        return complete(self, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Assistant, "complete", dies_later)
        main(command)


def test_the_same_command_goes_on_and_ends_with_the_same_answers(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    assert main(command) == 0
    whole = output.read_bytes()
    output.unlink()
    killed_after(2, command)
    assert not output.exists()
    capsys.readouterr()
    assert main(command) == 0
    assert f"Going on with {output}.partial: 4 of 7 prompts are answered" in capsys.readouterr().err
    assert output.read_bytes() == whole
    assert [row["question_id"] for row in rows_of(output)] == list(range(7))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "questions.jsonl"]


def test_a_line_that_was_cut_is_asked_again(command: list[str], tmp_path: Path) -> None:
    killed_after(2, command)
    partial = tmp_path / "out.jsonl.partial"
    partial.write_bytes(partial.read_bytes()[:-9])
    killed_after(0, command)
    assert len(partial.read_text().splitlines()) == 1 + 3
    assert main(command) == 0
    assert [row["question_id"] for row in rows_of(tmp_path / "out.jsonl")] == list(range(7))


@pytest.mark.parametrize(
    "options, change",
    [
        (["--temperature", "0.5"], "temperature 0.7, now it is 0.5"),
        (["--seed", "1"], "seed 0, now it is 1"),
        (["--system_prompt", "Be brief."], "prompts "),
        (["--template", "guanaco"], 'template null, now it is "guanaco"'),
    ],
)
def test_answers_of_other_settings_are_not_mixed(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], change: str
) -> None:
    killed_after(1, command)
    kept = (tmp_path / "out.jsonl.partial").read_bytes()
    line = line_of(capsys, *command, *options)
    assert line.startswith(f"{tmp_path / 'out.jsonl'}.partial was begun with {change}")
    assert line.endswith("go on with the same, give another output, or begin anew with --overwrite")
    assert (tmp_path / "out.jsonl.partial").read_bytes() == kept
    assert main([*command, *options, "--overwrite"]) == 0


def test_batches_stay_the_same_after_a_kill_in_the_middle_of_one(command: list[str], tmp_path: Path) -> None:
    """Their rounding would turn a word in 16 bit now and then."""

    def batches_of(asked: list[tuple[int, ...]]) -> Callable[..., list[Answer]]:
        complete = Assistant.complete

        def noted(self: Assistant, ids: Any, mask: Any, spec: Any, numbers: Any) -> list[Answer]:
            asked.append(tuple(numbers))
            return complete(self, ids, mask, spec, numbers)

        return noted

    whole: list[tuple[int, ...]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Assistant, "complete", batches_of(whole))
        assert main([*command, "--overwrite"]) == 0
    answers = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").unlink()
    killed_after(2, command)
    partial = tmp_path / "out.jsonl.partial"
    partial.write_bytes(partial.read_bytes()[:-9])
    again: list[tuple[int, ...]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Assistant, "complete", batches_of(again))
        assert main(command) == 0
    assert again == whole[1:]
    assert (tmp_path / "out.jsonl").read_bytes() == answers


def test_another_size_of_batches_goes_on(command: list[str], tmp_path: Path) -> None:
    killed_after(1, command)
    assert main([*command, "--batch_size", "3"]) == 0
    assert len(rows_of(tmp_path / "out.jsonl")) == 7


def test_what_was_begun_anew_goes_on_without_overwrite(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("old")
    killed_after(0, [*command, "--overwrite"])
    assert output.read_text() == "old"
    killed_after(1, [*command, "--overwrite"])
    assert main(command) == 0
    assert "2 of 7 prompts are answered" in capsys.readouterr().err
    assert len(rows_of(output)) == 7


def test_an_interrupt_says_how_to_go_on(command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: Any) -> list[Answer]:
        raise KeyboardInterrupt

    killed_after(1, command)
    monkeypatch.setattr(Assistant, "complete", interrupted)
    assert main(command) == 130
    assert capsys.readouterr().err.endswith(
        "qlora-lightning: interrupted; the answers so far are kept, and the same command (without --overwrite) goes on\n"
    )


def test_other_questions_or_another_model_do_not_go_on(
    command: list[str], questions: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed_after(1, command)
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x07")
    assert "was begun with base_model" in line_of(capsys, *[str(other) if part == str(tiny_base) else part for part in command])
    questions.write_text(questions.read_text().replace("why", "who"))
    assert "was begun with prompts" in line_of(capsys, *command)


@pytest.mark.parametrize("content", ["precious\n", '{"a": 1}\n{"b": 2}\n', '[1]\n{"number": 1}\n'])
def test_a_partial_file_of_something_else(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    partial = tmp_path / "out.jsonl.partial"
    partial.write_text(content)
    assert line_of(capsys, *command) == f"{partial} holds no answers of this tool; remove it, or begin anew with --overwrite"
    assert partial.read_text() == content


def test_half_a_surrogate_pair_in_a_field_comes_through(questions: Path, command: list[str], tmp_path: Path) -> None:
    questions.write_text('{"text": "Hi", "note": "\\ud83d"}\n')
    assert main(command) == 0
    assert rows_of(tmp_path / "out.jsonl")[0]["note"] == "\ud83d"


def test_the_bar_fits_eighty_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "console", Console(stderr=True, force_terminal=True, width=80))
    monkeypatch.setattr(answering, "is_live", lambda: True)
    pace = Pace(total=953, done=500, started=time.perf_counter() - 100)
    list(answering._shown([[(n, Answer("a", 200, "stop"))] for n in range(100)], pace))
    drawn = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line) for line in capsys.readouterr().err.replace("\r", "\n").splitlines()]
    assert any("prompts, " in line and line.rstrip().endswith("left") for line in drawn)
    assert all(len(line) <= 80 and ("answering" in line or not line.strip()) for line in drawn)


def test_the_pace_counts_this_run_only() -> None:
    pace = Pace(total=10, done=4, started=100.0)
    assert pace.words(100.0) == "4 of 10 prompts"
    pace.advance([(4, Answer("a", 30, "stop")), (5, Answer("b", 50, "length"))])
    assert pace.words(120.0) == "6 of 10 prompts, 4.0 tokens/s, 0:00:40 left"


# predict


@pytest.fixture
def predict(fit: Callable[..., Path], tiny_base: Path, rows_file: Path) -> Callable[..., list[dict[str, Any]]]:
    """Run ``predict`` on three held-out rows of a run; give what it wrote."""
    root = fit("trainer.max_steps=1", "data.dataset.validation_size=3")
    options = [*base_options(tiny_base, rows_file, root), "--data.dataset.validation_size", "3"]

    def run(*more: str) -> list[dict[str, Any]]:
        assert main(["predict", *options, "--ckpt_path", "last", *more]) == 0
        return rows_of(root / "predictions.jsonl")

    return run


def test_predict_writes_answers_beside_references(predict: Callable[..., list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]) -> None:
    rows = predict("--generation.max_new_tokens", "5")
    assert len(rows) == 3
    assert all(set(row) == {"prompt", "generation", "generated_tokens", "finish", "reference"} for row in rows)
    assert all(row["generated_tokens"] <= 5 for row in rows)
    assert "3 answers, " in capsys.readouterr().err


def test_ranks_of_predict_write_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two ranks side by side: neither touches what the other has, and the first puts all in order once both are done."""
    heldout = [[Message("user", f"q{n}"), Message("assistant", f"r{n}")] for n in range(5)]
    ranks = [Predictions(), Predictions()]
    trainers: list[Any] = [
        SimpleNamespace(
            default_root_dir=str(tmp_path),
            world_size=2,
            global_rank=rank,
            is_global_zero=rank == 0,
            datamodule=SimpleNamespace(heldout_conversations=lambda: heldout),
            strategy=SimpleNamespace(barrier=lambda _: None),
        )
        for rank in (0, 1)
    ]
    module = Mock(spec=QLoRAModule)
    for rank, trainer in zip(ranks, trainers, strict=True):
        rank.on_predict_start(trainer, module)
    for rank, number in ((1, 1), (0, 0), (0, 2), (1, 3), (0, 4)):
        ranks[rank].write_on_batch_end(trainers[rank], module, [Answer(f"a{number}", 1, "stop")], None, {"numbers": [number]}, 0, 0)
    for rank in (1, 0):
        ranks[rank].on_predict_end(trainers[rank], module)
    assert [(row["prompt"], row["generation"], row["reference"]) for row in rows_of(tmp_path / "predictions.jsonl")] == [
        (f"q{n}", f"a{n}", f"r{n}") for n in range(5)
    ]
    assert capsys.readouterr().err.startswith("5 answers, 5 tokens in ")
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]


def test_predict_samples_alike_in_batches_of_any_size(predict: Callable[..., list[dict[str, Any]]]) -> None:
    options = ["--generation.max_new_tokens", "8", "--generation.temperature", "1.5"]
    together = predict(*options)
    assert predict(*options, "--data.eval_batch_size", "1") == together
    assert predict(*options, "--generation.seed", "1") != together
