"""Talking to an adapter."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from running import line_of

from qlora_lightning.answer_file import Answer
from qlora_lightning.cli import main
from qlora_lightning.data.formats import Message


def test_chat_answers_lines_of_standard_input(
    fit: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The conversation goes on until it is cleared: the second prompt holds the first question, the third does not."""
    from qlora_lightning.generation import Assistant

    adapter = fit("trainer.max_steps=1") / "checkpoints" / "last"
    lengths, encode = [], Assistant.encode

    def counted(self: Assistant, conversations: list[list[Message]]) -> tuple[torch.Tensor, torch.Tensor]:
        lengths.append(len(conversations[0]))
        return encode(self, conversations)

    monkeypatch.setattr(Assistant, "encode", counted)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\nAnd you?\n/clear\n\nHi\n/quit\nnever asked\n"))
    assert main(["chat", str(adapter), "--max_new_tokens", "4"]) == 0
    assert lengths == [1, 3, 1]
    assert "Type a question" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command, line",
    [
        (["chat", "--temprature", "1"], "unknown option temprature; did you mean temperature?"),
        (["generate", "--batchsize=3", "p.txt", "out.jsonl"], "unknown option batchsize; did you mean batch_size?"),
        (["recipes", "copy", "--flder", "x"], "unknown option flder; did you mean folder?"),
    ],
)
def test_a_misspelt_option_is_no_value(capsys: pytest.CaptureFixture[str], command: list[str], line: str) -> None:
    assert line_of(capsys, *command) == line


def test_a_misspelt_template(tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = line_of(capsys, "chat", "--base_model", str(tiny_base), "--template", "alpca")
    names = "alpaca, chatml, completion, gemma, guanaco, llama2, llama3, mistral, plain, qwen, zephyr, tokenizer"
    assert line == f"template must be one of {names}; got 'alpca', nearest is alpaca"


def test_bytes_that_are_no_text_are_asked_as_question_marks(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_lightning.generation import Assistant

    asked: list[str] = []
    monkeypatch.setattr(Assistant, "encode", lambda self, conversations: asked.append(conversations[0][-1].content) or (None, None))
    monkeypatch.setattr(Assistant, "complete", lambda *_, **__: [Answer("a", 1, "stop")])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Gr\xfcn\n"), encoding="utf-8", errors="surrogateescape"))
    assert main(["chat", "--base_model", str(tiny_base)]) == 0
    assert asked == ["Gr?n"]


def test_chat_needs_a_base(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat"]) == 2
    assert "no base model is known" in capsys.readouterr().err


def test_folder_that_is_no_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(tmp_path)]) == 2
    assert f"{tmp_path} is not an adapter folder: it needs adapter_config.json and adapter_model.safetensors" in capsys.readouterr().err
