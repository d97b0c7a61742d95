"""Chat requests to any OpenAI-compatible server: parallel, at a kept rate, retried where trying again can help.

The ``openai`` client talks; its own retries are off, so that one policy holds and its attempts are counted. One event loop drives the
requests rather than threads: an interrupt then ends calls that still wait for a slow server.
"""

import asyncio
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import openai

from qlora_lightning.errors import UserError
from qlora_lightning.evaluation.waiting import Gate, backoff, retry_after

LONGEST_RETRY_AFTER_SECONDS = 600.0
"""A server that asks for a longer pause than this (a used-up day's quota, say) is not waited for."""
FAILURES_IN_A_ROW = 20
"""After so many requests without a reply in between, the server is taken to be gone."""
_NO_KEY = "none"  # the client refuses to start without one


@dataclass
class EndpointSpec:
    """A model behind a server that speaks OpenAI's chat protocol, and how hard it may be asked."""

    base_url: str
    """Address of the server, as in http://127.0.0.1:8000/v1 or https://api.openai.com/v1."""
    model: str
    """Model that the server is asked for."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key. A server of one's own needs none."""
    parallel: int = 8
    """Requests under way at once."""
    requests_per_minute: int | None = None
    """Start no more requests than this in a minute, retries included; by default as many as come."""
    timeout_seconds: float = 120.0
    """Longest wait for an answer."""
    retries: int = 6
    """How often a request is sent again after 429, 5xx, a time-out, a lost connection or a reply that is not the protocol's."""
    completion_limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the server calls the longest answer: reasoning models of OpenAI take the second name only."""

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise UserError(f"base_url must open with http:// or https://, got {self.base_url!r}; give one like http://127.0.0.1:8000/v1")
        if self.parallel < 1 or self.retries < 0 or self.timeout_seconds <= 0:
            raise UserError(
                "need parallel >= 1, retries >= 0 and timeout_seconds > 0, "
                f"got {self.parallel}, {self.retries} and {self.timeout_seconds:g}; correct them"
            )
        if self.requests_per_minute is not None and self.requests_per_minute < 1:
            raise UserError(f"requests_per_minute must be 1 or more, got {self.requests_per_minute}; leave it out for no limit")


@dataclass(frozen=True)
class ChatRequest:
    """What a model is asked, and how it draws its answer."""

    messages: list[dict[str, str]]
    """``{"role": …, "content": …}`` each."""
    max_tokens: int
    """Longest answer, in tokens."""
    temperature: float
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class ChatReply:
    """What came back: a text, or the last error once trying again was over."""

    text: str | None
    error: str | None
    prompt_tokens: int
    """As the server counted them; 0 where it did not say."""
    completion_tokens: int
    finish_reason: str | None
    """``stop``, or ``length`` where the answer was cut."""
    attempts: int
    """Requests sent, the first one included."""


class Endpoint:
    """A server to ask."""

    def __init__(self, spec: EndpointSpec) -> None:
        self.spec = spec
        self._key = os.environ.get(spec.key_variable, "").strip() or _NO_KEY  # strip: read from a file, a key often ends in a line end
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError(f"a key must be plain ASCII, but that in {spec.key_variable} holds other characters; export the right one")

    def check(self, temperature: float = 0.0, top_p: float = 1.0) -> None:
        """Ask for a few tokens once, so that a wrong address, key or model shows before the work starts.

        Args:
            temperature: As the work will ask for it: some models refuse all but one.
            top_p: The same.

        Raises:
            UserError: the server refuses or is not there. A busy server (429, 5xx) passes: the work waits for it.
        """
        request = ChatRequest([{"role": "user", "content": "Say OK."}], 16, temperature, top_p)
        with asyncio.Runner() as runner:
            failure = runner.run(self._try_once(request))
        if failure is not None:
            self._refuse(failure)

    def replies(self, requests: Iterable[tuple[int, ChatRequest]]) -> Iterator[tuple[int, ChatReply]]:
        """Replies to numbered requests as they come, in any order. Requests are drawn as places get free.

        A request that fails gives a reply with ``error`` and leaves the others alone.

        Raises:
            UserError: ``FAILURES_IN_A_ROW`` failed in a row.
        """
        failed = 0
        for number, reply in self._all_replies(requests):
            failed = 0 if reply.error is None else failed + 1
            yield number, reply
            if failed == FAILURES_IN_A_ROW:
                raise UserError(
                    f"{self.spec.base_url} failed {failed} times in a row, at last: {reply.error}; what it answered before is kept, "
                    "and the same command (without --overwrite) goes on when it answers again"
                )

    def _all_replies(self, requests: Iterable[tuple[int, ChatRequest]]) -> Iterator[tuple[int, ChatReply]]:
        pending = iter(requests)
        gate = Gate(self.spec.requests_per_minute)
        running: dict[asyncio.Task[ChatReply], int] = {}
        with asyncio.Runner() as runner:
            client = self._client()
            loop = runner.get_loop()
            try:
                while True:
                    for number, request in islice(pending, self.spec.parallel - len(running)):
                        running[loop.create_task(self._reply(client, gate, request))] = number
                    if not running:
                        return
                    done, _ = runner.run(_first(running))
                    yield from [(running.pop(task), task.result()) for task in done]
            finally:
                runner.run(_end(client, running))

    def _client(self) -> openai.AsyncOpenAI:
        spec = self.spec
        # No redirects: what is asked would go to a host that nobody named.
        plain = openai.DefaultAsyncHttpxClient(follow_redirects=False, timeout=spec.timeout_seconds)
        return openai.AsyncOpenAI(base_url=spec.base_url, api_key=self._key, timeout=spec.timeout_seconds, max_retries=0, http_client=plain)

    async def _try_once(self, request: ChatRequest) -> "_Failure | None":
        async with self._client() as client:
            outcome = await self._attempt(client, request, 1)
        return outcome if isinstance(outcome, _Failure) else None

    async def _reply(self, client: openai.AsyncOpenAI, gate: Gate, request: ChatRequest) -> ChatReply:
        attempt = 0
        while True:
            attempt += 1
            await gate.enter()
            outcome = await self._attempt(client, request, attempt)
            if isinstance(outcome, ChatReply):
                return outcome
            if not outcome.temporary or attempt > self.spec.retries:
                return ChatReply(None, outcome.text, 0, 0, None, attempt)
            gate.hold(outcome.retry_after)  # the others would be turned away as well
            await asyncio.sleep(backoff(attempt))  # also then: servers ask for 0 seconds

    async def _attempt(self, client: openai.AsyncOpenAI, request: ChatRequest, attempt: int) -> "ChatReply | _Failure":
        options: dict[str, Any] = {self.spec.completion_limit: request.max_tokens}
        if request.seed is not None:
            options["seed"] = request.seed
        try:
            completion = await client.chat.completions.create(
                model=self.spec.model,
                messages=request.messages,  # type: ignore[arg-type]  # the client's types name each role apart
                temperature=request.temperature,
                top_p=request.top_p,
                **options,
            )
            return _read(completion, attempt)
        except (openai.OpenAIError, ValueError) as error:  # ValueError: a body that is not JSON
            return _Failure.of(error, self._key)

    def _refuse(self, failure: "_Failure") -> None:
        """Raise the line for a failure that no waiting mends."""
        url, model, variable = self.spec.base_url, self.spec.model, self.spec.key_variable
        if failure.status == 0:
            raise UserError(f"no chat server answers at {url} ({failure.text}); start it, or correct base_url")
        if failure.status in (401, 403):
            given = f"set {variable} to a valid one" if self._key != _NO_KEY else f"the variable {variable} is not set; export it"
            raise UserError(f"{url} does not accept the key ({failure.text}); {given}, or name another with key_variable")
        if failure.status == 404:
            raise UserError(f"{url} has no model {model} ({failure.text}); see {url}/models, and check that base_url ends as in …/v1")
        if not failure.temporary:
            raise UserError(f"{url} refuses to answer as {model} ({failure.text}); correct the model or its options")


@dataclass(frozen=True)
class _Failure:
    """Why an attempt gave no reply."""

    text: str
    status: int
    """HTTP status; 0 without an answer, 200 where the answer was not the protocol's."""
    temporary: bool
    """Whether trying again can help."""
    retry_after: float = 0.0
    """Seconds that the server asks to wait."""

    @classmethod
    def of(cls, error: Exception, key: str) -> "_Failure":
        """Sort an error of the client. Servers echo keys in messages: the key is struck out."""
        said = _said(error).replace(key, "***") if key != _NO_KEY else _said(error)
        if isinstance(error, openai.APITimeoutError):
            return cls("time-out", 0, True)
        if isinstance(error, openai.APIConnectionError):
            return cls(f"no connection: {error.__cause__ or said}", 0, True)
        if not isinstance(error, openai.APIStatusError):
            return cls(f"a reply that is not the protocol's: {said}", 200, True)
        wait = retry_after(error.response.headers)
        lasting = error.code == "insufficient_quota" or wait > LONGEST_RETRY_AFTER_SECONDS
        status = error.status_code
        return cls(f"{status}: {said}", status, (status in (408, 409, 429) or status >= 500) and not lasting, wait)


def _read(completion: Any, attempt: int) -> ChatReply:
    """A reply from what the client made of the body: it does not check the body's form."""
    try:
        choice, usage = completion.choices[0], completion.usage
        text = choice.message.content or getattr(choice.message, "refusal", None) or ""
        if not isinstance(text, str):
            raise TypeError(f"content is a {type(text).__name__}")
    except (AttributeError, LookupError, TypeError) as error:
        said = getattr(completion, "error", None) or error  # some servers send an error as if all were well
        raise ValueError(f"no choices with a message ({said})") from error
    text = text.encode("utf-8", "replace").decode()  # half a surrogate pair, which no file takes, becomes a question mark
    finish = getattr(choice, "finish_reason", None)
    return ChatReply(text, None, _count(usage, "prompt_tokens"), _count(usage, "completion_tokens"), finish, attempt)


def _count(usage: Any, name: str) -> int:
    """A number of tokens that the server counted; 0 where it did not, or gives something else."""
    count = getattr(usage, name, None)
    return count if isinstance(count, int) else 0


def _said(error: Exception) -> str:
    """What an error tells in one line: the message that the server sent rather than the client's wrapping of it."""
    body = getattr(error, "body", None)
    text = body.get("message") or body.get("detail") if isinstance(body, dict) else None  # OpenAI's word, and FastAPI's
    return " ".join(str(text or getattr(error, "message", error)).split())[:300]


async def _first(running: Iterable["asyncio.Task[ChatReply]"]) -> Any:
    return await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)


async def _end(client: openai.AsyncOpenAI, running: Iterable["asyncio.Task[ChatReply]"]) -> None:
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    await client.close()
