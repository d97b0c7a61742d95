"""Talking to an adapter, and answering files of prompts."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qlora_lightning.answering import _asked
from qlora_lightning.cli import main
from qlora_lightning.data.encoder import Encoder
from qlora_lightning.data.formats import Message
from qlora_lightning.generation import GenerationSpec, left_pad, load_assistant


def ask(text: str) -> list[Message]:
    return [Message("user", text)]


def test_left_padding_ends_rows_together() -> None:
    ids, mask = left_pad([[5, 6, 7], [8]], filler=3)
    assert ids.tolist() == [[5, 6, 7], [3, 3, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_a_batch_answers_like_its_rows_alone(tiny_base: Path) -> None:
    """Padding must not reach the answer: greedy answers of a batch equal those of single prompts."""
    assistant, _ = load_assistant(None, str(tiny_base), "chatml")
    assistant.dtype = torch.float32
    prompts = [ask("Hi"), ask("A much longer question than the other one, is it not?")]
    spec = GenerationSpec(max_new_tokens=8)
    assert assistant.answer(prompts, spec) == [assistant.answer([prompt], spec)[0] for prompt in prompts]


def test_sampling_is_seeded_and_leaves_the_global_state_alone(tiny_base: Path) -> None:
    assistant, _ = load_assistant(None, str(tiny_base), "chatml")
    before = torch.get_rng_state()
    answers = [assistant.answer([ask("Hi")], GenerationSpec(12, temperature=2.0, top_p=1.0, seed=seed))[0] for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    assert torch.equal(before, torch.get_rng_state())


def test_answers_stop_at_the_end_of_turn(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the model writes after the end token is not part of the answer."""
    assistant, _ = load_assistant(None, str(tiny_base), "chatml")
    end = assistant.tokenizer.convert_tokens_to_ids("<|im_end|>")
    letters = assistant.tokenizer.encode("ab", add_special_tokens=False)
    tail = torch.tensor([[*letters, end, *letters]])
    monkeypatch.setattr(assistant.model, "generate", lambda input_ids, **options: torch.cat([input_ids, tail], 1))
    assert assistant.answer([ask("Hi")], GenerationSpec()) == ["ab"]


def test_a_model_can_answer_in_its_tokenizers_own_chat_template(tiny_base: Path, tmp_path: Path) -> None:
    """The prompt is the one that transformers makes, and a token that a question spells ends nothing."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    (base / "chat_template.jinja").write_text(
        r"{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    assistant, _ = load_assistant(None, str(base), "tokenizer")
    asked = [{"role": "user", "content": "Hi"}]
    expected = assistant.tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert assistant.encode([ask("Hi")])[0].tolist() == [expected]
    end = assistant.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert assistant.encode([ask("Hi<|im_end|>")])[0][0].tolist().count(end) == 1
    assert len(assistant.answer([ask("Hi")], GenerationSpec(4))) == 1


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
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [{key: value for key, value in row.items() if key != "generation"} for row in written] == rows
    assert all(isinstance(row["generation"], str) for row in written)


@pytest.mark.parametrize(
    "content, complaint",
    [
        ('{"id": 1}\n', "p.jsonl:1: a prompt needs a text in prompt, instruction, text or messages, found id"),
        ('{"prompt": \n', "p.jsonl:1"),
    ],
)
def test_generate_names_the_row_that_asks_nothing(
    tiny_base: Path, tmp_path: Path, content: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(content)
    assert main(["generate", str(prompts), str(tmp_path / "out.jsonl"), "--base_model", str(tiny_base)]) == 2
    assert complaint in capsys.readouterr().err


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


def line_of(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """The last line of a command that must fail by the user's mistake."""
    assert main(list(command)) == 2
    return capsys.readouterr().err.strip().split("\n")[-1].removeprefix("qlora-lightning: ")


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


def test_prompts_that_are_not_utf_8(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts.write_bytes(b"Hi\nGr\xfc\xdfe\n")
    line = line_of(capsys, "generate", str(prompts), str(tmp_path / "out.jsonl"))
    assert line == f"{prompts}:2: text must be UTF-8, found byte 0xfc; save the file as UTF-8"


def test_prompts_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = line_of(capsys, "generate", str(tmp_path / "none.txt"), str(tmp_path / "out.jsonl"))
    assert line == f"{tmp_path / 'none.txt'}: no such file or folder; give one that exists"


@pytest.mark.parametrize(
    "messages, complaint",
    [
        ([{"role": "user", "content": None}], "message 1: field 'content' must be text, got null; correct or remove the row"),
        ([{"role": "system", "content": "a"}], "`messages` need one of the user to answer, found system alone; correct the row"),
        (
            [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}],
            "user and assistant must speak in turn, but message 2 is by system where assistant is due; correct or remove the row",
        ),
    ],
)
def test_messages_that_cannot_be_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], messages: list[dict[str, object]], complaint: str
) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"messages": messages}) + "\n")
    assert line_of(capsys, "generate", str(file), str(tmp_path / "out.jsonl")) == f"{file}:1: {complaint}"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}]},
    ],
)
def test_every_spelling_of_a_role_is_asked(row: dict[str, object]) -> None:
    assert _asked(row, "here") == [Message("user", "a")]


def test_a_failed_run_leaves_no_answers_under_the_name(
    prompts: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_lightning.generation import Assistant

    output, asked = tmp_path / "out.jsonl", []

    def fails_later(self: Assistant, conversations: list[list[Message]], spec: GenerationSpec) -> list[str]:
        asked.append(conversations)
        if len(asked) == 2:
            raise ZeroDivisionError
        return ["a"]

    monkeypatch.setattr(Assistant, "answer", fails_later)
    command = ["generate", str(prompts), str(output), "--base_model", str(tiny_base), "--batch_size", "1"]
    with pytest.raises(ZeroDivisionError):
        main(command)
    assert not output.exists()
    assert main(command) == 0
    assert len(output.read_text().splitlines()) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "prompts.txt"]


def test_encoder_is_made_once(tiny_base: Path) -> None:
    """It copies the tokenizer's backend."""
    assistant, _ = load_assistant(None, str(tiny_base), "chatml")
    with pytest.MonkeyPatch.context() as patch:
        made: list[Encoder] = []
        of = Encoder.of
        patch.setattr(Encoder, "of", lambda *args: made.append(of(*args)) or made[-1])
        assert torch.equal(assistant.encode([ask("Hi")])[0], assistant.encode([ask("Hi")])[0])
    assert len(made) == 1


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


def test_chat_needs_a_base(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat"]) == 2
    assert "no base model is known" in capsys.readouterr().err


def test_folder_that_is_no_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(tmp_path)]) == 2
    assert f"{tmp_path} is not an adapter folder: it needs adapter_config.json and adapter_model.safetensors" in capsys.readouterr().err


def test_predict_writes_answers_beside_references(fit: Callable[..., Path], tiny_base: Path, rows_file: Path) -> None:
    from running import base_options

    root = fit("trainer.max_steps=1", "data.dataset.validation_size=3")
    options = [*base_options(tiny_base, rows_file, root), "--data.dataset.validation_size", "3"]
    assert main(["predict", *options, "--ckpt_path", "last"]) == 0
    rows = [json.loads(line) for line in (root / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert all(set(row) == {"prompt", "generation", "reference"} for row in rows)
