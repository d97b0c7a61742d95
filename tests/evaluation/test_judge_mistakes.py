"""What is wrong with the options or files of `judge` ends in one line, before anything is asked or written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from chat_server import Answer, serving
from filelock import FileLock
from tournament_files import tournament, write_rows

from qlora_lightning.cli import main

SERVER = ["--base_url", "http://127.0.0.1:9/v1", "--judge_model", "m"]


@pytest.mark.parametrize(
    ("names", "more", "line"),
    [
        ("ab", SERVER, "no chat server answers at http://127.0.0.1:9/v1 (no connection: "),
        ("a", SERVER, "judging needs the answers of two systems or more, got 1; give --answers A.jsonl B.jsonl"),
        ("aa", SERVER, "each system must have a name of its own, but 'a' stands 2 times; give NAME=FILE"),
        ("ab", [*SERVER, "--mode", "relative"], "relative mode scores every system beside one; name it with --reference NAME"),
        ("ab", [*SERVER, "--reference", "x"], "the reference must be one of the systems, got 'x'; they are: a, b"),
        ("ab", [*SERVER, "--prompts", "questions.jsonl"], "questions.jsonl:1: a review prompt needs system_prompt (str)"),
        ("ab", [*SERVER, "--price_in", "-1"], "prices must be 0 or more, got -1.0 and None; leave out what is not known"),
        ("ab", [*SERVER, "--temperature", ".nan"], "need temperature >= 0 and max_tokens >= 1, got nan and 1024"),
        (["a", "a-vs-b"], SERVER, "-vs- stands between the systems in a verdict file's name, not in a system's, got 'a-vs-b'; give NAME"),
        ("ab", [*SERVER, "--limit", "0"], "limit must be 1 or more, got 0"),
        ("ab", [*SERVER, "--max_tokens", "0"], "need temperature >= 0 and max_tokens >= 1, got 0.2 and 0"),
        ("ab", [], "name one judge, got none; give --base_url and --judge_model for a server"),
        ("ab", ["--base_url", "http://127.0.0.1:9/v1"], "name one judge, got base_url"),
        ("ab", [*SERVER, "--judge_base", "x"], "name one judge, got base_url, judge_model, a judge here"),
        ("ab", [*SERVER, "--questions", "nowhere.jsonl"], "nowhere.jsonl: no such file or folder"),
    ],
)
def test_mistakes_end_in_one_line(
    names: Sequence[str], more: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*tournament(tmp_path, *names), *more]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"qlora-lightning: {line}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([], "b.jsonl: the file has no rows"),
        ([{"generation": "x"}], "b.jsonl:1: a row must name its question in question_id, message_id or id, found generation"),
        ([{"question_id": 1}], "b.jsonl:1: a row needs a text in generation_truncated, generation or text, found question_id"),
        ([{"question_id": 1, "text": "x"}] * 2, "b.jsonl:2: a system answers each question once, but '1' stands in an earlier row too"),
        (
            [{"question_id": 3, "text": "x"}],
            "all systems must answer the same questions, but b has no answer to 2 of 3: 1, 2; complete its file",
        ),
    ],
)
def test_mistakes_in_answers_end_in_one_line(
    rows: list[dict[str, Any]], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = tournament(Path(), "a", "b")
    write_rows(Path("b.jsonl"), rows)
    assert main([*command, *SERVER]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"qlora-lightning: {line}")


@pytest.mark.parametrize(("status", "line"), [(401, "does not accept the key (401: no)"), (404, "has no model m (404: no)")])
def test_a_judge_that_refuses_ends_in_one_line(status: int, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda *_: Answer("no", status=status)) as server:
        assert main([*tournament(tmp_path, "a", "b"), "--base_url", server.base_url, "--judge_model", "m"]) == 2
    assert line in capsys.readouterr().err.splitlines()[-1]
    assert len(server.asked) == 1 and not (tmp_path / "out").exists()


def test_two_runs_do_not_write_into_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    with serving(lambda *_: Answer()) as server, FileLock(tmp_path / "out" / "judge.lock"):
        assert main([*tournament(tmp_path, "a", "b"), "--base_url", server.base_url, "--judge_model", "m"]) == 2
    assert "another run writes into the output folder" in capsys.readouterr().err
