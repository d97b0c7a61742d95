"""``generate`` with a chat server in the model's place."""

import json
from pathlib import Path
from typing import Any

import pytest
from chat_server import Answer, ChatServer, serving
from running import line_of

from qlora_lightning.cli import main
from qlora_lightning.evaluation import waiting


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    turns = "### Human: a ### Assistant: b ### Human: c ### Assistant:"
    rows: list[dict[str, Any]] = [{"question_id": 1, "text": "Hi"}, {"instruction": "Add", "input": "1 2"}, {"input": turns}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def command(prompts: Path, server: ChatServer, *options: str) -> list[str]:
    output = str(prompts.with_name("out.jsonl"))
    return ["generate", str(prompts), output, "--base_url", server.base_url, "--server_model", "m", *options]


def rows_of(prompts: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in prompts.with_name("out.jsonl").read_text().splitlines()]


def test_a_server_answers_whole_conversations_in_the_files_order(prompts: Path) -> None:
    with serving(lambda _, body: Answer("re: " + body["messages"][-1]["content"])) as server:
        assert main(command(prompts, server, "--sampling", "paper", "--seed", "10", "--system_prompt", "Be brief.")) == 0
    assert [row["generation"] for row in rows_of(prompts)] == ["re: Hi", "re: Add\n\n1 2", "re: c"]
    assert rows_of(prompts)[0] == {"question_id": 1, "text": "Hi", "generation": "re: Hi", "generated_tokens": 4, "finish": "stop"}
    bodies = {body["messages"][-1]["content"]: body for body in server.asked[1:]}  # the first is the check
    assert [message["role"] for message in bodies["c"]["messages"]] == ["system", "user", "assistant", "user"]
    drawn = [(body["temperature"], body["top_p"], body["seed"], body["max_tokens"]) for body in bodies.values()]
    assert sorted(drawn) == [(0.7, 0.9, 10 + number, 256) for number in range(3)]


def test_greedy_asks_for_the_likeliest(prompts: Path) -> None:
    with serving(lambda _, body: Answer()) as server:
        assert main(command(prompts, server)) == 0
    assert {(body["temperature"], body["top_p"], body.get("seed")) for body in server.asked} == {(0.0, 1.0, None)}


def test_requests_that_fail_are_asked_again_by_the_same_command(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refusing(_: int, body: dict[str, Any]) -> Answer:
        return Answer("too long", status=400) if body["messages"][-1]["content"] == "Hi" else Answer("fine")

    with serving(refusing) as server:
        line = line_of(capsys, *command(prompts, server))
        assert line.startswith("1 of 3 requests failed, the last one with: 400: ")
        assert line.endswith("; the same command (without --overwrite) asks them again and keeps the others")
        assert not prompts.with_name("out.jsonl").exists()
    with serving(lambda *_: Answer("at last")) as better:
        url = command(prompts, server)
        assert "was begun with base_url" in line_of(capsys, *command(prompts, better))
        assert "no chat server answers" in line_of(capsys, *url)


def test_the_others_are_not_asked_twice(prompts: Path) -> None:
    refused = ["Hi"]

    def answer(_: int, body: dict[str, Any]) -> Answer:
        text = body["messages"][-1]["content"]
        return Answer("no", status=400) if text in refused else Answer(f"re: {text}")

    with serving(answer) as server:
        assert main(command(prompts, server)) == 2
        refused.clear()
        before = len(server.asked)
        assert main(command(prompts, server)) == 0
        assert [text for text in server.prompts()[before:] if text != "Say OK."] == ["Hi"]
    assert [row["generation"] for row in rows_of(prompts)] == ["re: Hi", "re: Add\n\n1 2", "re: c"]


@pytest.mark.parametrize(
    "options, line",
    [
        (
            ["--base_url", "http://x/v1", "--server_model", "m", "--adapter", "a", "--storage", "nf4"],
            "--base_url lets a server answer, --adapter and --storage a model on this machine; leave one of them out",
        ),
        (["--base_url", "http://x/v1"], "a server needs --base_url URL and --server_model NAME, got no server_model; give both"),
        (["--server_model", "m"], "a server needs --base_url URL and --server_model NAME, got no base_url; give both"),
    ],
)
def test_options_that_do_not_go_together(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], line: str
) -> None:
    assert line_of(capsys, "generate", str(prompts), str(tmp_path / "out.jsonl"), *options) == line
