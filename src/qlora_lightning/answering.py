"""``generate``: answer a file of prompts, with a model here or one behind a server."""

import json
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Protocol

from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from qlora_lightning.answer_file import Answer, AnswerFile, check_output
from qlora_lightning.answering_local import LocalAnswerer
from qlora_lightning.console import console, is_live, say
from qlora_lightning.data.formats import Conversation
from qlora_lightning.errors import UserError
from qlora_lightning.generation import GenerationSpec
from qlora_lightning.modeling.loading import Storage
from qlora_lightning.prompts import read_prompts

SAMPLING = {"greedy": (0.0, 0.9), "paper": (0.7, 0.9)}
"""Temperature and top-p: the likeliest token each time, or as the QLoRA paper drew its answers."""
_SAID_EVERY = 30.0  # seconds between two lines in a log file


def generate(
    prompts: str,
    output: str,
    adapter: str | None = None,
    base_model: str | None = None,
    template: str | None = None,
    system_prompt: str | None = None,
    sampling: Literal["greedy", "paper"] = "greedy",
    max_new_tokens: int = 256,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch_size: int = 8,
    storage: Storage | None = None,
    base_url: str | None = None,
    server_model: str | None = None,
    key_variable: str = "OPENAI_API_KEY",
    parallel: int = 8,
    requests_per_minute: int | None = None,
    timeout_seconds: float = 120.0,
    completion_limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens",
    overwrite: bool = False,
) -> None:
    """Answer every prompt of a file, with a model on this machine or one behind a server.

    The output has one JSON object a line, in the file's order: the row's own fields, `generation`, `generated_tokens` and `finish` (stop or
    length). Answers are kept in OUTPUT.partial as they come; after an interruption the same command goes on there. A sampled answer depends
    on the seed, its prompt and the prompt's number only; in bf16, rounding differs a little with the batch, and now and then turns a word.

    Args:
        prompts: A .jsonl, .json, .csv or .parquet file with a field prompt, instruction (and input), text, messages, or a transcript of
            "### Human:" and "### Assistant:" turns in input, text or prompt; or a .txt file of one prompt a line.
        output: JSON Lines file to write; it appears when all answers are there.
        adapter: Adapter folder; without one the base model answers.
        base_model: Base model, or a merged one; by default the one that the adapter was trained on.
        template: Prompt template; by default the one that the adapter was trained with.
        system_prompt: Said before each prompt; by default the one that the adapter was trained with.
        sampling: greedy takes the likeliest token each time; paper samples at temperature 0.7 and top-p 0.9, as in the QLoRA paper.
        max_new_tokens: Longest answer, in tokens.
        temperature: In place of the one of `sampling`: 0 takes the likeliest token each time, above 0 samples.
        top_p: In place of the one of `sampling`: sample from the likeliest tokens that together have this probability.
        seed: Seed of the sampling.
        batch_size: Prompts answered at once on this machine.
        storage: How the base model is held here; by default as the adapter was trained, without one nf4-dq.
        base_url: Address of an OpenAI-compatible server to ask instead, as in http://127.0.0.1:8000/v1.
        server_model: Model that the server is asked for.
        key_variable: Environment variable that holds the server's key.
        parallel: Requests under way at once at the server.
        requests_per_minute: Start no more requests than this in a minute at the server; by default as many as come.
        timeout_seconds: Longest wait for an answer of the server.
        completion_limit: What the server calls the longest answer; reasoning models of OpenAI want max_completion_tokens.
        overwrite: Replace the output file where it exists, and begin anew where answers were begun.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be 1 or more, got {batch_size}; leave it out for 8")
    check_output(Path(output), Path(prompts), overwrite)
    preset = SAMPLING[sampling]
    spec = GenerationSpec(max_new_tokens, preset[0] if temperature is None else temperature, preset[1] if top_p is None else top_p, seed)
    answerer: Answerer
    if base_url or server_model:
        _check_server(base_url, server_model, adapter=adapter, base_model=base_model, template=template, storage=storage)
        from qlora_lightning.answering_server import ServerAnswerer  # needs the extra `eval`
        from qlora_lightning.evaluation.endpoint import EndpointSpec

        where = EndpointSpec(str(base_url), str(server_model), key_variable, parallel, requests_per_minute, timeout_seconds)
        answerer = ServerAnswerer(replace(where, completion_limit=completion_limit))
    else:
        answerer = LocalAnswerer(Path(adapter) if adapter else None, base_model, template, storage, batch_size)
    answer_prompts(prompts, Path(output), answerer, spec, answerer.system_prompt if system_prompt is None else system_prompt, overwrite)


def _check_server(base_url: str | None, server_model: str | None, **local: str | None) -> None:
    if not base_url or not server_model:
        missing = "server_model" if base_url else "base_url"
        raise UserError(f"a server needs --base_url URL and --server_model NAME, got no {missing}; give both")
    given = [f"--{name}" for name, value in local.items() if value is not None]
    if given:
        raise UserError(f"--base_url lets a server answer, {' and '.join(given)} a model on this machine; leave one of them out")


class Answerer(Protocol):
    """A model that answers numbered conversations."""

    @property
    def system_prompt(self) -> str | None:
        """What it was trained to hear before each conversation."""

    def identity(self) -> dict[str, Any]:
        """Plain values that its answers depend on."""

    def answers(
        self, conversations: Mapping[int, Conversation], left: Collection[int], spec: GenerationSpec
    ) -> Iterator[list[tuple[int, Answer]]]:
        """Answers to those conversations that are left, with their numbers, some at a time."""


def answer_prompts(
    prompts: str, target: Path, answerer: Answerer, spec: GenerationSpec, system_prompt: str | None, overwrite: bool
) -> None:
    """Ask what has no answer yet, keep answers as they come, and write the file once all are there."""
    asked = list(read_prompts(prompts, system_prompt))
    file = AnswerFile(target, _identity([one.conversation for one in asked], answerer, spec), overwrite)
    if file.done:
        say(f"Going on with {file.partial}: {len(file.done)} of {len(asked)} prompts are answered")
    left = [number for number in range(len(asked)) if number not in file.done]
    conversations = dict(enumerate(one.conversation for one in asked))
    batches = answerer.answers(conversations, left, spec) if left else iter(())
    pace = Pace(len(asked), len(file.done), time.perf_counter())  # a model has been loaded by now
    for answers in _shown(batches, pace):
        file.add(answers)
    file.finish([one.row for one in asked])
    seconds = time.perf_counter() - pace.started
    say(f"{len(asked)} answers, {pace.tokens:,} tokens in {seconds:.1f} s ({pace.tokens / seconds:,.1f} tokens/s): {target}")


def _identity(conversations: list[Conversation], answerer: Answerer, spec: GenerationSpec) -> dict[str, Any]:
    """What every answer depends on. (Greedy answers depend on no seed.)"""
    text = json.dumps([[asdict(message) for message in conversation] for conversation in conversations])
    drawing = asdict(spec) if spec.temperature > 0 else {"max_new_tokens": spec.max_new_tokens, "temperature": 0.0}
    return {"prompts": sha256(text.encode()).hexdigest()[:16], **answerer.identity(), **drawing}


@dataclass
class Pace:
    """How far the answering is, and how fast it goes."""

    total: int
    """Prompts in the file."""
    done: int
    """Prompts with an answer, those of an earlier run included."""
    started: float
    """Moment of the start, in seconds."""
    answered: int = 0
    """Prompts answered since then ..."""
    tokens: int = 0
    """... with so many tokens."""

    def advance(self, answers: Sequence[tuple[int, Answer]]) -> None:
        """Count answers."""
        self.done += len(answers)
        self.answered += len(answers)
        self.tokens += sum(answer.generated_tokens for _, answer in answers)

    def words(self, now: float) -> str:
        """As in ``24 of 80 prompts, 310.2 tokens/s, 0:01:10 left``."""
        seconds = now - self.started
        text = f"{self.done} of {self.total} prompts"
        if not self.answered:
            return text
        left = timedelta(seconds=round(seconds / self.answered * (self.total - self.done)))
        return f"{text}, {self.tokens / seconds:,.1f} tokens/s, {left} left"


def _shown(batches: Iterable[Sequence[tuple[int, Answer]]], pace: Pace) -> Iterator[Sequence[tuple[int, Answer]]]:
    """``batches`` with a bar on a terminal, with a line now and then elsewhere."""
    columns = TextColumn("answering"), BarColumn(bar_width=None), TextColumn("{task.description}", table_column=Column(no_wrap=True))
    said = pace.started
    with Progress(*columns, console=console, transient=True, expand=True, disable=not is_live()) as progress:
        task = progress.add_task(pace.words(said), total=pace.total, completed=pace.done)
        for answers in batches:
            yield answers
            pace.advance(answers)
            now = time.perf_counter()
            progress.update(task, completed=pace.done, description=pace.words(now))
            if not is_live() and now - said > _SAID_EVERY:
                said = now
                say(f"answering: {pace.words(now)}")
