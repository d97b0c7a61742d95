"""Requests to a chat server come through its faults, keep the rate, and fail one by one."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from chat_server import Answer, ChatServer, serving

from qlora_lightning.errors import UserError
from qlora_lightning.evaluation import waiting
from qlora_lightning.evaluation.endpoint import ChatReply, ChatRequest, Endpoint, EndpointSpec


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def request(text: str = "Hello") -> ChatRequest:
    return ChatRequest([{"role": "user", "content": text}], max_tokens=5, temperature=0.0)


def ask(server: ChatServer, count: int = 1, **options: Any) -> dict[int, ChatReply]:
    endpoint = Endpoint(EndpointSpec(server.base_url, "m", **options))
    return dict(endpoint.replies((number, request(f"question {number}")) for number in range(count)))


def test_every_request_gets_its_own_reply() -> None:
    with serving(lambda _, body: Answer("re: " + body["messages"][0]["content"])) as server:
        replies = ask(server, 20, parallel=4)
    assert {number: reply.text for number, reply in replies.items()} == {n: f"re: question {n}" for n in range(20)}
    assert replies[0] == ChatReply("re: question 0", None, 11, 4, "stop", 1)


def test_a_reply_can_be_written_as_utf8() -> None:
    with serving(lambda *_: Answer("half a pair: \ud83d")) as server:
        assert ask(server)[0].text == "half a pair: ?"


def test_the_request_says_how_to_answer() -> None:
    asked = ChatRequest([{"role": "user", "content": "q"}], max_tokens=9, temperature=0.7, top_p=0.9, seed=3)
    with serving(lambda *_: Answer()) as server:
        list(Endpoint(EndpointSpec(server.base_url, "some-model")).replies([(0, asked)]))
        list(Endpoint(EndpointSpec(server.base_url, "m", completion_limit="max_completion_tokens")).replies([(0, asked)]))
    first, second = server.asked
    assert first == {"model": "some-model", "messages": asked.messages, "max_tokens": 9, "temperature": 0.7, "top_p": 0.9, "seed": 3}
    assert second["max_completion_tokens"] == 9 and "max_tokens" not in second


def test_requests_run_side_by_side_but_no_more_than_allowed() -> None:
    with serving(lambda *_: Answer(after_seconds=0.2)) as server:
        began = time.monotonic()
        ask(server, 8, parallel=4)
        elapsed = time.monotonic() - began
    assert 0.4 <= elapsed < 1.2  # two rounds of four
    assert server.times[4] - server.times[0] >= 0.15


def test_requests_are_drawn_as_places_get_free() -> None:
    drawn: list[int] = []

    def requests() -> Iterator[tuple[int, ChatRequest]]:
        for number in range(100):
            drawn.append(number)
            yield number, request()

    with serving(lambda *_: Answer()) as server:
        replies = Endpoint(EndpointSpec(server.base_url, "m", parallel=3)).replies(requests())
        next(replies)
        replies.close()
    assert len(drawn) == 3


@pytest.mark.parametrize(
    "fault",
    [
        Answer("try later", status=429),
        Answer("broken", status=500),
        Answer("starting", status=503),
        Answer(body="<html>proxy</html>", content_type="text/html"),
        Answer(body="{not json"),
        Answer(body="{}"),
        Answer(body='{"choices": []}'),
        Answer(body='{"choices": [{"message": null}]}'),
        Answer(body='{"choices": [{"message": {"content": ["x"]}}], "usage": null}'),
        Answer(body='{"choices": {"a": 1}}'),
        Answer("busy", status=429, headers={"retry-after": "Wed, 21 Oct 2015 07:28:00 -0000"}),
    ],
    ids=lambda fault: f"{fault.status}-{fault.payload()[:20]!r}",
)
def test_a_passing_fault_is_tried_again(fault: Answer) -> None:
    with serving(lambda number, _: fault if number < 2 else Answer("good")) as server:
        (reply,) = ask(server).values()
    assert (reply.text, reply.error, reply.attempts) == ("good", None, 3)


def test_an_error_that_is_sent_as_if_all_were_well_is_shown() -> None:
    with serving(lambda *_: Answer(body='{"error": {"message": "overloaded"}}')) as server:
        (reply,) = ask(server, retries=0).values()
    assert reply.error is not None and "overloaded" in reply.error


@pytest.mark.parametrize("usage", ['"many"', "[1]", "{}", "null", '{"prompt_tokens": "12", "completion_tokens": null}'])
def test_tokens_that_are_not_counted_are_none(usage: str) -> None:
    with serving(lambda *_: Answer(body=f'{{"choices": [{{"message": {{"content": "x"}}}}], "usage": {usage}}}')) as server:
        assert ask(server)[0] == ChatReply("x", None, 0, 0, None, 1)


def test_a_pause_of_nothing_is_no_licence_to_hammer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "FIRST_WAIT_SECONDS", 0.4)
    with serving(lambda number, _: Answer(status=429, headers={"retry-after": "0"}) if number == 0 else Answer()) as server:
        ask(server)
    assert server.times[1] - server.times[0] >= 0.2


def test_a_server_that_is_gone_is_not_asked_for_ever() -> None:
    with serving(lambda number, _: Answer("fine") if number < 3 else Answer("gone", status=500)) as server:
        endpoint = Endpoint(EndpointSpec(server.base_url, "m", parallel=1, retries=0))
        came: list[int] = []
        with pytest.raises(UserError, match=r"failed 20 times in a row, at last: 500: gone; what it answered before is kept"):
            came += [number for number, _ in endpoint.replies((number, request()) for number in range(100))]
    assert len(server.asked) <= 24


def test_a_time_out_is_tried_again() -> None:
    with serving(lambda number, _: Answer("good", after_seconds=1.0 if number == 0 else 0.0)) as server:
        (reply,) = ask(server, timeout_seconds=0.2).values()
    assert (reply.text, reply.attempts) == ("good", 2)


def test_retries_end_and_leave_the_others_alone() -> None:
    def answer(_: int, body: dict[str, Any]) -> Answer:
        return Answer("broken", status=500) if body["messages"][0]["content"] == "question 1" else Answer("good")

    with serving(answer) as server:
        replies = ask(server, 3, retries=2)
    assert replies[1] == ChatReply(None, "500: broken", 0, 0, None, 3)
    assert replies[0].text == replies[2].text == "good"
    assert len(server.asked) == 5


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_refusal_is_not_tried_again(status: int) -> None:
    with serving(lambda *_: Answer("no", status=status)) as server:
        (reply,) = ask(server).values()
    assert (reply.text, reply.error, reply.attempts) == (None, f"{status}: no", 1)


def test_a_used_up_quota_is_not_waited_for() -> None:
    quota = '{"error": {"message": "no money", "code": "insufficient_quota"}}'
    with serving(
        lambda number, _: Answer(status=429, body=quota) if number == 0 else Answer(status=429, headers={"retry-after": "86400"})
    ) as s:
        assert [reply.attempts for reply in ask(s, 2, parallel=1).values()] == [1, 1]


def test_retry_after_is_kept_by_all() -> None:
    """While the server asks for a pause nobody else is sent to it either."""
    with serving(lambda number, _: Answer(status=429, headers={"retry-after": "0.3"}) if number == 0 else Answer()) as server:
        replies = ask(server, 3, parallel=1)
    assert server.times[1] - server.times[0] >= 0.3
    assert [reply.attempts for reply in replies.values()] == [2, 1, 1]


def test_retry_after_may_be_a_date() -> None:
    def answer(number: int, _: dict[str, Any]) -> Answer:
        date = format_datetime(datetime.now(UTC) + timedelta(seconds=1), usegmt=True)
        return Answer(status=429, headers={"retry-after": date}) if number == 0 else Answer()

    time.sleep(-time.time() % 1)  # dates have whole seconds
    with serving(answer) as server:
        ask(server)
    assert server.times[1] - server.times[0] >= 0.5


def test_the_rate_holds_for_retries_too() -> None:
    with serving(lambda number, _: Answer(status=500) if number % 2 else Answer()) as server:
        ask(server, 6, requests_per_minute=1500)
    distances = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    assert len(server.times) > 6 and (server.times[-1] - server.times[0]) >= 0.035 * len(distances)


def test_without_a_server_each_request_fails() -> None:
    with serving(lambda *_: Answer()) as server:
        pass
    (reply,) = ask(server, retries=1).values()
    assert reply.attempts == 2 and reply.error is not None and reply.error.startswith("no connection")


def test_the_key_comes_from_the_environment_and_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret-1")
    with serving(lambda *_: Answer("Incorrect key secret-1", status=401)) as server:
        (reply,) = ask(server, key_variable="MY_KEY").values()
        with pytest.raises(UserError) as raised:
            Endpoint(EndpointSpec(server.base_url, "m", "MY_KEY")).check()
    assert server.keys == ["Bearer secret-1"] * 2
    assert reply.error == "401: Incorrect key ***"
    assert "secret" not in str(raised.value) and "set MY_KEY to a valid one" in str(raised.value)


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (Answer("who are you", status=401), r"does not accept the key \(401: who are you\); the variable OPENAI_API_KEY is not set"),
        (Answer("unknown", status=404), r"/v1 has no model m \(404: unknown\); see http"),
        (Answer("max_tokens?", status=400), r"refuses to answer as m \(400: max_tokens\?\); correct"),
        (Answer(after_seconds=1), r"no chat server answers at http.*/v1 \(time-out\)"),
    ],
)
def test_a_server_that_refuses_shows_at_once(answer: Answer, line: str) -> None:
    with serving(lambda *_: answer) as server, pytest.raises(UserError, match=line):
        Endpoint(EndpointSpec(server.base_url, "m", timeout_seconds=0.3)).check()
    assert len(server.asked) == 1


@pytest.mark.parametrize("key", ["sk-secr\u00e9t", "sk-se\ncret"])
def test_a_key_that_no_header_takes_is_not_shown(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(UserError, match="a key must be plain ASCII, but that in MY_KEY holds other characters") as raised:
        Endpoint(EndpointSpec("http://x/v1", "m", "MY_KEY"))
    assert "sk-" not in str(raised.value)


def test_a_line_end_behind_the_key_is_none_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret\n")
    with serving(lambda *_: Answer()) as server:
        ask(server, key_variable="MY_KEY")
    assert server.keys == ["Bearer secret"]


def test_the_check_asks_as_the_work_will() -> None:
    """Some models refuse every temperature but one."""
    with serving(lambda *_: Answer()) as server:
        Endpoint(EndpointSpec(server.base_url, "m")).check(1.0, 0.9)
    assert (server.asked[0]["temperature"], server.asked[0]["top_p"]) == (1.0, 0.9)


def test_no_server_shows_at_once() -> None:
    with serving(lambda *_: Answer()) as server:
        pass
    with pytest.raises(UserError, match=r"no chat server answers at http://127.0.0.1:.* \(no connection.*; start it, or correct base_url"):
        Endpoint(EndpointSpec(server.base_url, "m")).check()


@pytest.mark.parametrize("answer", [Answer(), Answer("busy", status=429), Answer("starting", status=503)])
def test_a_busy_server_passes_the_check(answer: Answer) -> None:
    with serving(lambda *_: answer) as server:
        Endpoint(EndpointSpec(server.base_url, "m")).check()
    assert len(server.asked) == 1  # the work waits and asks again, not the check


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"base_url": "localhost:8000"}, "base_url must open with http:// or https://, got 'localhost:8000'"),
        ({"parallel": 0}, "need parallel >= 1"),
        ({"requests_per_minute": 0}, "requests_per_minute must be 1 or more, got 0"),
    ],
)
def test_impossible_settings(options: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        EndpointSpec(**{"base_url": "http://x/v1", "model": "m"} | options)


@pytest.mark.parametrize("hours", [-5, 0, 5])
def test_a_date_to_come_back_at_counts_from_the_servers_own_clock(hours: int) -> None:
    now = datetime.now(UTC) + timedelta(hours=hours)
    headers = {"retry-after": format_datetime(now + timedelta(seconds=30), usegmt=True), "date": format_datetime(now, usegmt=True)}
    assert waiting.retry_after(headers) == 30
