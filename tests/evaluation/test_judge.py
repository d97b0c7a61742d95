"""`judge` asks for every verdict once, keeps every reply, and goes on where it stopped."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_server import Answer, serving
from tournament_files import QUESTIONS, answer_file, read_verdicts, tournament, write_rows

from qlora_lightning.cli import main
from qlora_lightning.evaluation import waiting
from qlora_lightning.evaluation.judge.verdict_log import VerdictLog

Respond = Callable[[int, dict[str, Any]], Answer]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "FIRST_WAIT_SECONDS", 0.01)


def prefer(name: str) -> Respond:
    """A judge with a favourite."""

    def respond(_: int, body: dict[str, Any]) -> Answer:
        text = body["messages"][-1]["content"]
        if f"{name} says" not in text:
            return Answer("Neither.\n3")
        others = [text.find(f"{other} says") for other in "abc" if other != name and f"{other} says" in text]
        return Answer("Clear.\n1" if text.find(f"{name} says") < min(others, default=0) else "Clear.\n2")

    return respond


def run(arguments: list[str], base_url: str, *more: str) -> int:
    return main([*arguments, "--base_url", base_url, "--judge_model", "m", *more])


def test_every_pair_in_both_orders(tmp_path: Path) -> None:
    with serving(prefer("b")) as server:
        assert run(tournament(tmp_path, "a", "b", "c"), server.base_url) == 0
    verdicts = read_verdicts(tmp_path)
    assert set(verdicts) == {"a-vs-b", "b-vs-a", "a-vs-c", "c-vs-a", "b-vs-c", "c-vs-b"}
    assert {name: {row["score"] for row in rows} for name, rows in verdicts.items()} == {
        "a-vs-b": {2}, "b-vs-a": {1}, "a-vs-c": {3}, "c-vs-a": {3}, "b-vs-c": {1}, "c-vs-b": {2}
    }  # fmt: skip
    (row,) = [row for row in verdicts["a-vs-b"] if row["question_id"] == 1]
    assert row == {
        "question_id": 1,
        "category": "math",
        "kind": "pairwise",
        "first": "a",
        "second": "b",
        "score": 2,
        "judge": "m",
        "reply": "Clear.\n2",
        "prompt_tokens": 11,
        "completion_tokens": 4,
    }
    assert len(server.asked) == 18 + 1  # one to see whether the server answers at all
    asked = next(body for body in server.asked if "a says 1" in body["messages"][-1]["content"])
    assert (asked["temperature"], asked["max_tokens"]) == (0.2, 1024)


def test_one_order_takes_the_earlier_first(tmp_path: Path) -> None:
    with serving(prefer("a")) as server:
        run(tournament(tmp_path, "b", "a"), server.base_url, "--orders", "one")
    assert list(read_verdicts(tmp_path)) == ["b-vs-a"]


def test_relative_mode_compares_with_the_reference(tmp_path: Path) -> None:
    with serving(lambda number, _: Answer("8 9\nGood." if number % 2 else "both are good")) as server:
        run(tournament(tmp_path, "a", "b", "c"), server.base_url, "--mode", "relative", "--reference", "c")
    verdicts = read_verdicts(tmp_path)
    assert set(verdicts) == {"a-vs-c", "c-vs-a", "b-vs-c", "c-vs-b"}
    scores = [row["score"] for rows in verdicts.values() for row in rows]
    assert sorted(scores, key=str) == [-1] * 6 + [[8.0, 9.0]] * 6
    assert all(row["kind"] == "relative" for rows in verdicts.values() for row in rows)


def test_replies_without_a_verdict_are_kept_and_counted_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda number, _: Answer(["hard to say", "1", "3"][number % 3])) as server:
        run(tournament(tmp_path, "a", "b"), server.base_url, "--orders", "one", "--json")
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["verdicts"], found["unparsed"], found["failed"]) == (3, 1, 0)
    assert found["matches"] == [
        {"first": "a", "second": "b", "verdicts": 3, "unparsed": 1, "first_better": 1, "second_better": 0, "equal": 1}
    ]
    (unparsed,) = [row for row in read_verdicts(tmp_path)["a-vs-b"] if row["score"] == -1]
    assert unparsed["reply"] == "hard to say"
    assert "to do: 3 requests" in err


def test_the_authors_prompts_by_category(tmp_path: Path) -> None:
    general = {"system_prompt": "S", "prompt_template": "{question}|{answer_1}|{answer_2}|{prompt}", "defaults": {"prompt": "general"}}
    prompts = [{**general, "category": "general"}, {**general, "category": "math", "defaults": {"prompt": "compute"}}]
    file = write_rows(tmp_path / "prompts.jsonl", prompts)
    with serving(prefer("a")) as server:
        run(tournament(tmp_path, "a", "b"), server.base_url, "--prompts", str(file), "--orders", "one")
    assert sorted(server.prompts()[1:]) == [
        "Name a river.|a says 2|b says 2|general",
        "What is two and two?|a says 1|b says 1|compute",
        "Why do cats purr?|a says 3|b says 3|general",
    ]


def test_answers_in_every_published_shape(tmp_path: Path) -> None:
    """A baseline of the authors, and a model of theirs with the OA benchmark's ids, whose text they cut; the order of rows is free."""
    questions = write_rows(tmp_path / "questions.jsonl", [{**row, "message_id": row["question_id"]} for row in QUESTIONS])
    base = write_rows(tmp_path / "base.jsonl", [{"answer_id": "x", "question_id": n, "text": f"base {n}"} for n in (3, 2, 1)])
    cut = [{"message_id": n, "generation": f"cut {n} ### Human:", "generation_truncated": f"cut {n}"} for n in (1, 2, 3)]
    other = write_rows(tmp_path / "cut.jsonl", cut)
    command = ["judge", str(base), f"other={other}", "--questions", str(questions), "--output", str(tmp_path / "out"), "--orders", "one"]
    with serving(lambda *_: Answer("1")) as server:
        assert run(command, server.base_url) == 0
    assert list(read_verdicts(tmp_path)) == ["base-vs-other"]
    for number, row in enumerate(QUESTIONS, 1):
        (text,) = [text for text in server.prompts() if row["text"] in text]
        assert f"base {number}\n" in text and f"cut {number}\n" in text


def test_the_same_command_goes_on_where_requests_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*tournament(tmp_path, "a", "b"), "--parallel", "1"]  # replies come in the order of the questions

    def broken_river(_: int, body: dict[str, Any]) -> Answer:
        return Answer("no", status=400) if "river" in body["messages"][-1]["content"] else Answer("1")

    with serving(broken_river) as server:
        assert run(command, server.base_url) == 2
    err = capsys.readouterr().err
    assert "no reply on question 2, a against b, after 1 attempts: 400: no" in err
    assert "2 of 6 reviews got no reply (see above); the same command asks for them again" in err
    assert [row["question_id"] for row in read_verdicts(tmp_path)["a-vs-b"]] == [1, 3]

    with serving(lambda *_: Answer("2")) as server:
        assert run(command, server.base_url) == 0
    assert len(server.asked) == 1 + 2
    assert [(row["question_id"], row["score"]) for row in read_verdicts(tmp_path)["a-vs-b"]] == [(1, 1), (3, 1), (2, 2)]

    with serving(lambda *_: Answer("2")) as server:
        assert run(command, server.base_url) == 0
    assert not server.asked  # nothing is left to ask


def test_a_judge_that_is_gone_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = [{"question_id": n, "text": f"Question {n}?"} for n in range(40)]
    questions = write_rows(tmp_path / "questions.jsonl", many)
    files = [str(answer_file(tmp_path, name, many)) for name in "ab"]
    with serving(lambda number, _: Answer("1") if number < 5 else Answer("gone", status=500)) as server:
        command = ["judge", *files, "--questions", str(questions), "--output", str(tmp_path / "out"), "--retries", "0", "--parallel", "1"]
        assert run(command, server.base_url) == 2
    assert "/v1 failed 20 times in a row, at last: 500: gone; what it answered before is kept" in capsys.readouterr().err
    assert len(server.asked) < 30
    assert sum(map(len, read_verdicts(tmp_path).values())) == 4


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """Killed while replies come in, with a line cut in the middle on top; the second run asks only for what is missing."""
    command = [*tournament(tmp_path, "a", "b"), "--judge_model", "m", "--parallel", "1"]
    with serving(lambda number, _: Answer("1", after_seconds=0.0 if number < 4 else 30.0)) as server:
        arguments = [sys.executable, "-m", "qlora_lightning.cli", *command, "--base_url", server.base_url]
        process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        deadline = time.monotonic() + 60
        while len(server.asked) < 5 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert sum(map(len, read_verdicts(tmp_path).values())) == 3
    file = tmp_path / "out" / "a-vs-b.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:40])
    with serving(lambda *_: Answer("2")) as server:
        assert main([*command, "--base_url", server.base_url]) == 0
    assert len(server.asked) == 1 + 3
    assert sorted(row["question_id"] for row in read_verdicts(tmp_path)["a-vs-b"]) == [1, 2, 3]
    assert file.read_bytes().startswith(whole)


def test_the_budget_is_shown_and_a_dry_run_stops_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--dry_run", "--json", "--requests_per_minute", "4", "--price_in", "10", "--price_out", "1000", "--max_tokens", "100"]
    assert run(tournament(tmp_path, "a", "b"), "http://127.0.0.1:9/v1", *options, "--limit", "2") == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    tokens = found["prompt_tokens_estimate"]
    assert found == {
        "requests": 4,
        "prompt_tokens_estimate": tokens,
        "completion_tokens_at_most": 400,
        "minutes_at_least": 1.0,
        "cost_at_most": pytest.approx((10 * tokens + 1000 * 400) / 1e6),
    }
    assert 4 * 200 < tokens < 4 * 500
    assert "(an estimate: bytes / 4), at most 400 completion tokens, at least 1.0 minutes at the rate limit, costs at most about 0.4" in err
    assert not (tmp_path / "out").exists()


def test_systems_may_join_later(tmp_path: Path) -> None:
    with serving(prefer("a")) as server:
        run(tournament(tmp_path, "a", "b"), server.base_url)
    with serving(prefer("a")) as server:
        assert run(tournament(tmp_path, "a", "b", "c"), server.base_url) == 0
    assert len(server.asked) == 1 + 12
    assert {name: len(rows) for name, rows in read_verdicts(tmp_path).items()} == dict.fromkeys(
        ["a-vs-b", "b-vs-a", "a-vs-c", "c-vs-a", "b-vs-c", "c-vs-b"], 3
    )


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (["--mode", "relative", "--reference", "a"], "holds verdicts of another mode (pairwise, not relative)"),
        (["--judge_model", "n"], "holds verdicts of another judge (m, not n)"),
        (["--temperature", "0"], "holds verdicts of another temperature (0.2, not 0.0)"),
    ],
)
def test_verdicts_of_other_settings_do_not_mix(change: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = tournament(tmp_path, "a", "b")
    with serving(prefer("a")) as server:
        run(command, server.base_url)
        assert run(command, server.base_url, *change) == 2
        assert f"{line}; give another folder, or --overwrite to delete them" in capsys.readouterr().err
        assert len(server.asked) == 1 + 6
        assert run(command, server.base_url, *change, "--overwrite") == 0
    assert sum(map(len, read_verdicts(tmp_path).values())) == 6


def test_settings_without_a_verdict_bind_nobody(tmp_path: Path) -> None:
    """A run that was killed before its first verdict leaves them, as of a mistake that is corrected now."""
    command = tournament(tmp_path, "a", "b")
    with serving(lambda *_: Answer("no", status=400) if _[0] else Answer()) as server:
        assert run(command, server.base_url, "--limit", "1") == 2
        assert (tmp_path / "out" / "judge.json").exists() and not read_verdicts(tmp_path)
    with serving(prefer("a")) as server:
        assert run(command, server.base_url, "--temperature", "0") == 0


@pytest.mark.parametrize("content", ["not json", "[]", "{}"])
def test_settings_that_cannot_be_read(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = tournament(tmp_path, "a", "b")
    with serving(prefer("a")) as server:
        run(command, server.base_url, "--limit", "1")
        (tmp_path / "out" / "judge.json").write_text(content)
        assert run(command, server.base_url) == 2
    assert "holds verdicts but no judge.json that says how they came about" in capsys.readouterr().err


def test_a_renamed_file_of_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(prefer("a")) as server:
        run(tournament(tmp_path, "a", "b"), server.base_url)
        (tmp_path / "out" / "a-vs-b.jsonl").rename(tmp_path / "out" / "a-vs-c.jsonl")
        assert run(tournament(tmp_path, "a", "c"), server.base_url) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "a-vs-c.jsonl:1: a file holds the verdicts on the match in its name, but this one is on a against b; give the file" in line


def test_a_full_disk_keeps_the_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Closing the file tries once more, and must not hide the line with an error of its own."""

    class FullDisk(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            self.flush()

    command = tournament(tmp_path, "a", "b")
    with serving(prefer("a")) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(VerdictLog, "_file", lambda self, path: self._held.enter_context(FullDisk()))
        assert run(command, server.base_url) == 2
    assert ".jsonl cannot be written (No space left on device); mend that, then the same" in capsys.readouterr().err
    with serving(prefer("a")) as server:
        assert run(command, server.base_url) == 0


def test_an_interrupt_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(VerdictLog, "add", interrupted)
    with serving(prefer("a")) as server:
        assert run(tournament(tmp_path, "a", "b"), server.base_url) == 130
    assert capsys.readouterr().err.endswith(
        "qlora-lightning: interrupted; the verdicts so far are kept, and the same command (without --overwrite) goes on\n"
    )


def test_changed_answers_do_not_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = tournament(tmp_path, "a", "b")
    with serving(prefer("a")) as server:
        run(command, server.base_url)
        write_rows(tmp_path / "b.jsonl", [{"question_id": n, "generation": "new"} for n in (1, 2, 3)])
        assert run(command, server.base_url) == 2
    assert "holds verdicts on other answers of b" in capsys.readouterr().err


def test_a_model_here_judges(tiny_base: Path, tmp_path: Path) -> None:
    """Random weights give no verdict that can be read, but every reply is there."""
    judge = ["--judge_base", str(tiny_base), "--judge_template", "chatml", "--max_tokens", "6", "--orders", "one", "--batch_size", "2"]
    assert main([*tournament(tmp_path, "a", "b"), *judge]) == 0
    rows = read_verdicts(tmp_path)["a-vs-b"]
    assert sorted(row["question_id"] for row in rows) == [1, 2, 3]
    assert all(row["judge"] == str(tiny_base) and row["prompt_tokens"] > 500 and 0 < row["completion_tokens"] <= 6 for row in rows)


def test_a_judge_here_replies_alike_after_an_interruption(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A reply is drawn by its own question and match, wherever in the run it comes."""
    judge = ["--judge_base", str(tiny_base), "--max_tokens", "6", "--orders", "one", "--batch_size", "1", "--temperature", "2"]
    assert main([*tournament(tmp_path, "a", "b"), *judge]) == 0
    file = tmp_path / "out" / "a-vs-b.jsonl"
    whole = {row["question_id"]: row["reply"] for row in read_verdicts(tmp_path)["a-vs-b"]}
    file.write_bytes(file.read_bytes().splitlines(keepends=True)[0])
    assert main([*tournament(tmp_path, "a", "b"), *judge]) == 0
    assert {row["question_id"]: row["reply"] for row in read_verdicts(tmp_path)["a-vs-b"]} == whole
    assert main([*tournament(tmp_path, "a", "b"), *judge, "--judge_template", "alpaca"]) == 2
    assert "holds verdicts of another template (None, not alpaca)" in capsys.readouterr().err


def test_a_judge_here_that_cannot_be_loaded_leaves_nothing(tmp_path: Path) -> None:
    assert main([*tournament(tmp_path, "a", "b"), "--judge_base", str(tmp_path / "nowhere")]) == 2
    assert not (tmp_path / "out").exists()


def test_a_judge_on_a_server_needs_no_torch(tmp_path: Path) -> None:
    command = [*tournament(tmp_path, "a", "b"), "--base_url", "http://127.0.0.1:9/v1", "--judge_model", "m", "--dry_run"]
    code = f"import sys; from qlora_lightning.cli import main; assert main({command!r}) == 0"
    check = "assert not {'torch', 'transformers'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", f"{code}; {check}"], check=True, capture_output=True)
