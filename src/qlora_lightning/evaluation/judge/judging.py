"""Asking a judge: which reviews are due, what they will cost, and the verdicts as they come."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any, Protocol

from qlora_lightning.console import say
from qlora_lightning.errors import UserError
from qlora_lightning.evaluation.counting import counting
from qlora_lightning.evaluation.endpoint import ChatReply, ChatRequest
from qlora_lightning.evaluation.judge.reviews import UNPARSED, Mode, ReviewPrompts, parse_score
from qlora_lightning.evaluation.judge.systems import Match, Question
from qlora_lightning.evaluation.judge.verdict_log import VerdictLog, VerdictRow

BYTES_PER_TOKEN = 4
"""Of text in UTF-8, about, in any script: a letter of Cyrillic has two bytes, one of Chinese three."""
_FAILURES_SHOWN = 3


class Judge(Protocol):
    """Whatever answers requests: a server, or a model in this process."""

    def replies(self, requests: Iterable[tuple[int, ChatRequest]]) -> Iterator[tuple[int, ChatReply]]:
        """Replies to numbered requests, in any order."""
        ...


@dataclass(frozen=True)
class Asking:
    """How verdicts are asked for."""

    mode: Mode
    prompts: ReviewPrompts
    judge: str
    """Name of the judge, as verdicts keep it."""
    temperature: float
    max_tokens: int
    """Longest reply, in tokens."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf or self.max_tokens < 1:
            raise UserError(f"need temperature >= 0 and max_tokens >= 1, got {self.temperature:g} and {self.max_tokens}; correct them")

    def settings(self) -> dict[str, Any]:
        """What all verdicts of a folder must have in common."""
        return {
            "mode": self.mode,
            "judge": self.judge,
            "prompts": self.prompts.digest,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }


@dataclass(frozen=True)
class Review:
    """One question with two answers, to be judged."""

    question: Question
    match: Match

    @property
    def number(self) -> int:
        """63 bits that are the review's own in every run: a judge here draws its reply by them."""
        name = "\n".join((str(self.question.id), self.match.first.name, self.match.second.name))
        return int.from_bytes(sha256(name.encode()).digest()[:8]) >> 1

    def request(self, asking: Asking) -> ChatRequest:
        """What the judge is asked."""
        first, second = (system.answers[str(self.question.id)] for system in (self.match.first, self.match.second))
        messages = asking.prompts.choose(self.question.category).messages(self.question.text, first, second)
        return ChatRequest(messages, asking.max_tokens, asking.temperature)

    def verdict(self, asking: Asking, reply: ChatReply) -> VerdictRow:
        """What the judge's reply comes to."""
        assert reply.text is not None
        return VerdictRow(
            question_id=self.question.id,
            category=self.question.category,
            kind=asking.mode,
            first=self.match.first.name,
            second=self.match.second.name,
            score=parse_score(asking.mode, reply.text, cut=reply.finish_reason == "length"),
            judge=asking.judge,
            reply=reply.text,
            prompt_tokens=reply.prompt_tokens,
            completion_tokens=reply.completion_tokens,
        )


def due_reviews(questions: list[Question], matches: list[Match], given: set[tuple[str, str, str]]) -> list[Review]:
    """Reviews without a verdict, question by question, so that a run that ends early has judged all matches on the same questions."""
    return [
        Review(question, match)
        for question in questions
        for match in matches
        if (match.first.name, match.second.name, str(question.id)) not in given
    ]


@dataclass(frozen=True)
class Budget:
    """What the reviews that are due will take."""

    requests: int
    prompt_tokens_estimate: int
    """Bytes divided by four."""
    completion_tokens_at_most: int
    minutes_at_least: float | None
    """At the rate limit; None without one."""
    cost_at_most: float | None
    """In the currency of the prices; None without them. An estimate, as the prompt tokens are one."""

    def __str__(self) -> str:
        parts = [
            f"{self.requests:,} requests",
            f"about {self.prompt_tokens_estimate:,} prompt tokens (an estimate: bytes / {BYTES_PER_TOKEN})",
            f"at most {self.completion_tokens_at_most:,} completion tokens",
        ]
        if self.minutes_at_least is not None:
            parts.append(f"at least {self.minutes_at_least:,.1f} minutes at the rate limit")
        if self.cost_at_most is not None:
            parts.append(f"costs at most about {self.cost_at_most:,.2f}")
        return ", ".join(parts)


def budget(
    reviews: list[Review], asking: Asking, requests_per_minute: int | None, price_in: float | None, price_out: float | None
) -> Budget:
    """Count what the reviews will take; prices are per million tokens."""
    size = sum(len(message["content"].encode()) for review in reviews for message in review.request(asking).messages)
    prompt_tokens, completion_tokens = size // BYTES_PER_TOKEN, len(reviews) * asking.max_tokens
    priced = price_in is not None or price_out is not None
    return Budget(
        len(reviews),
        prompt_tokens,
        completion_tokens,
        len(reviews) / requests_per_minute if requests_per_minute else None,
        ((price_in or 0.0) * prompt_tokens + (price_out or 0.0) * completion_tokens) / 1e6 if priced else None,
    )


def ask(judge: Judge, reviews: list[Review], asking: Asking, log: VerdictLog) -> int:
    """Ask for the reviews, write each verdict as it comes, and give the number of reviews that got no reply."""
    failed, due = 0, {review.number: review for review in reviews}
    requests = ((number, review.request(asking)) for number, review in due.items())
    with counting("judging", len(reviews), "reviews") as advance:
        for number, reply in judge.replies(requests):
            advance(1)
            if reply.error is None:
                log.add(due[number].verdict(asking, reply))
                continue
            failed += 1
            if failed <= _FAILURES_SHOWN:
                _report_failure(due[number], reply)
    return failed


def _report_failure(review: Review, reply: ChatReply) -> None:
    match = f"{review.match.first.name} against {review.match.second.name}"
    say(f"no reply on question {review.question.id}, {match}, after {reply.attempts} attempts: {reply.error}")


@dataclass
class MatchCount:
    """The verdicts on one match in one order."""

    first: str
    second: str
    verdicts: int = 0
    unparsed: int = 0
    """Replies without a verdict that can be read: neither wins nor ties."""
    first_better: int = 0
    second_better: int = 0
    equal: int = 0

    def count(self, verdict: VerdictRow) -> None:
        """Take a verdict in; of two scores the higher one is better."""
        score, self.verdicts = verdict.score, self.verdicts + 1
        if isinstance(score, list):
            score = 3 if score[0] == score[1] else 1 if score[0] > score[1] else 2
        self.unparsed += score == UNPARSED
        self.first_better += score == 1
        self.second_better += score == 2
        self.equal += score == 3


def summary(log: VerdictLog, matches: list[Match]) -> dict[str, Any]:
    """The verdicts of all matches, added up."""
    counts = {(match.first.name, match.second.name): MatchCount(match.first.name, match.second.name) for match in matches}
    for verdict in log.verdicts:
        counts[verdict.first, verdict.second].count(verdict)
    return {
        "folder": str(log.folder),
        "verdicts": len(log.verdicts),
        "unparsed": sum(count.unparsed for count in counts.values()),
        "prompt_tokens": sum(verdict.prompt_tokens for verdict in log.verdicts),
        "completion_tokens": sum(verdict.completion_tokens for verdict in log.verdicts),
        "matches": [asdict(count) for count in counts.values()],
    }
