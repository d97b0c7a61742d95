"""What each row of a prompt file asks."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qlora_lightning.data.formats import Message
from qlora_lightning.errors import UserError
from qlora_lightning.prompts import asked, read_prompts

PREAMBLE = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TRANSCRIPT = "### Human: What is it? ### Assistant: A line\nand another. ### Human: Why? ### Assistant:"
TURNS = [Message("user", "What is it?"), Message("assistant", "A line\nand another."), Message("user", "Why?")]


@pytest.mark.parametrize(
    "row, conversation",
    [
        ({"prompt": "Hi"}, [Message("user", "Hi")]),
        ({"question_id": 1, "text": "Hi", "category": "generic"}, [Message("user", "Hi")]),
        ({"instruction": "Add", "input": "1 2"}, [Message("user", "Add", "1 2")]),
        ({"messages": [{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}]}, [Message("user", "a")]),
        ({"conversations": [{"from": "human", "value": "a"}]}, [Message("user", "a")]),
    ],
)
def test_the_shapes_of_questions(row: dict[str, Any], conversation: list[Message]) -> None:
    assert asked(row, "here") == conversation


@pytest.mark.parametrize(
    "row",
    [
        {"input": TRANSCRIPT, "output": "Because.", "prompt": f"{PREAMBLE} {TRANSCRIPT}", "text": TRANSCRIPT},
        {"prompt": f"{PREAMBLE} {TRANSCRIPT}"},
        {"text": TRANSCRIPT.removesuffix(" ### Assistant:")},
    ],
)
def test_a_transcript_becomes_turns_without_its_marks_and_preamble(row: dict[str, Any]) -> None:
    assert asked(row, "here") == TURNS


def test_marks_inside_a_question_are_words() -> None:
    assert asked({"text": "What does '### Human:' mean?"}, "here") == [Message("user", "What does '### Human:' mean?")]


def test_a_system_prompt_stands_before_what_brings_none(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    own = [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "a"}]
    file.write_text(json.dumps({"messages": own}) + "\n" + json.dumps({"prompt": "b"}) + "\n")
    said = [[(message.role, message.content) for message in prompt.conversation] for prompt in read_prompts(file, "Be brief.")]
    assert said == [[("system", "Rhyme."), ("user", "a")], [("system", "Be brief."), ("user", "b")]]


def test_a_text_file_is_a_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("Hi\n\nAnd you?\n")
    assert [prompt.row for prompt in read_prompts(file)] == [{"prompt": "Hi"}, {"prompt": "And you?"}]


@pytest.mark.parametrize(
    "row, complaint",
    [
        ({"id": 1}, "a prompt needs a text in prompt, instruction, text or messages, found id"),
        (
            {"input": "### Human: a ### Assistant: b"},
            "a transcript to answer must end with a '### Human:' turn (an empty '### Assistant:' may follow), "
            "found the answer 'b'; cut it off",
        ),
        ({"text": "### Human: ### Assistant:"}, "a '### Human:' turn must not be empty; correct or remove the row"),
        (
            {"text": "### Human: a ### Human: b"},
            "user and assistant must speak in turn, but message 2 is by user where assistant is due; correct or remove the row",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "message 1: field 'content' must be text, got null; correct or remove the row"),
        (
            {"messages": [{"role": "system", "content": "a"}]},
            "`messages` need one of the user to answer, found system alone; correct the row",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
            "user and assistant must speak in turn, but message 2 is by system where assistant is due; correct or remove the row",
        ),
        ({"prompt": "\ud83d"}, "field 'prompt' holds half a surrogate pair, which is no Unicode text; correct or remove the row"),
    ],
)
def test_rows_that_cannot_be_asked(tmp_path: Path, row: dict[str, Any], complaint: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError) as error:
        list(read_prompts(file))
    assert str(error.value) == f"{file}:1: {complaint}"


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b"Hi\nGr\xfc\xdfe\n", ":2: text must be UTF-8, found byte 0xfc; save the file as UTF-8"),
        (b"\n", ": the file has no lines; give one with at least one line"),
    ],
)
def test_text_files_that_cannot_be_read(tmp_path: Path, content: bytes, complaint: str) -> None:
    file = tmp_path / "p.txt"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        list(read_prompts(file))
    assert str(error.value) == f"{file}{complaint}"


REAL = os.environ.get("QLORA_LIGHTNING_REAL_DATA")


@pytest.mark.skipif(REAL is None, reason="QLORA_LIGHTNING_REAL_DATA names no folder with the published prompts")
def test_the_papers_953_and_80_questions() -> None:
    folder = Path(str(REAL)) / "vicuna_oa_eval" / "prompts"
    prompts = list(read_prompts(folder / "oa_questions.jsonl.gz"))
    assert Counter(len(prompt.conversation) for prompt in prompts) == {1: 517, 3: 414, 5: 22}
    for prompt in prompts:
        said = " ".join(("### Human: " if m.role == "user" else "### Assistant: ") + m.content for m in prompt.conversation)
        assert " ".join(f"{said} ### Assistant:".split()) == " ".join(prompt.row["input"].split())
    vicuna = list(read_prompts(folder / "vicuna_questions.jsonl"))
    assert [prompt.conversation for prompt in vicuna] == [[Message("user", prompt.row["text"])] for prompt in vicuna]
    assert len(vicuna) == 80
