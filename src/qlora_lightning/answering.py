"""``generate``: answer a file of prompts."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rich.progress import Progress

from qlora_lightning.console import console, say
from qlora_lightning.data.files import read_lines, read_rows
from qlora_lightning.data.formats import Conversation, Message, check_turns, messages
from qlora_lightning.errors import UserError
from qlora_lightning.generation import GenerationSpec, load_assistant


def generate(
    prompts: str,
    output: str,
    adapter: str | None = None,
    base_model: str | None = None,
    template: str | None = None,
    system_prompt: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 0.9,
    seed: int = 0,
    batch_size: int = 8,
    overwrite: bool = False,
) -> None:
    """Answer every prompt of a file; one JSON object a line with the row's own fields and `generation`.

    Args:
        prompts: A .jsonl, .json, .csv or .parquet file with a field prompt, instruction (and input), text or messages; or a .txt file.
        output: JSON Lines file to write; it appears when all answers are there.
        adapter: Adapter folder; without one the base model answers.
        base_model: Base model; by default the one that the adapter was trained on.
        template: Prompt template; by default the one that the adapter was trained with.
        system_prompt: Said before each prompt; by default the one that the adapter was trained with.
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 takes the likeliest token each time; above 0 samples.
        top_p: Sample from the likeliest tokens that together have this probability.
        seed: Seed of the sampling, of each batch anew.
        batch_size: Prompts answered at once.
        overwrite: Replace the output file where it exists.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be 1 or more, got {batch_size}; leave it out for 8")
    target = _check_output(Path(output), overwrite)
    spec = GenerationSpec(max_new_tokens, temperature, top_p, seed)
    rows = list(_prompts(prompts))
    assistant, metadata = load_assistant(Path(adapter) if adapter else None, base_model, template)
    system = system_prompt if system_prompt is not None else metadata.get("system_prompt")
    began = time.perf_counter()
    with _appearing_whole(target) as file, Progress(console=console) as progress:
        for start in progress.track(range(0, len(rows), batch_size), description="answering"):
            batch = rows[start : start + batch_size]
            asked = [
                ([Message("system", system)] if system and conversation[0].role != "system" else []) + conversation
                for _, conversation in batch
            ]
            for (row, _), answer in zip(batch, assistant.answer(asked, spec), strict=True):
                file.write(json.dumps({**row, "generation": answer}, ensure_ascii=False) + "\n")
            file.flush()
    say(f"{len(rows)} answers in {time.perf_counter() - began:.1f} s: {output}")


def _check_output(target: Path, overwrite: bool) -> Path:
    """``target``, once it is known that answers may be written there: a model takes long to load."""
    if target.is_dir():
        raise UserError(f"output {target} is a folder; give the name of a file in it")
    if target.exists() and not overwrite:
        raise UserError(f"output {target} exists; give another name or --overwrite true")
    if not target.parent.is_dir():
        raise UserError(f"the folder of output {target} does not exist; make it first")
    return target


@contextmanager
def _appearing_whole(target: Path) -> Iterator[TextIO]:
    """A file to write beside ``target``, renamed at the end: half the answers never pass for all. A failed run leaves the .partial file."""
    beside = target.with_name(target.name + ".partial")
    try:
        file = beside.open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"output {target} cannot be written ({error.strerror}); give a file in a folder that can") from error
    with file:
        yield file
    beside.replace(target)


def _prompts(path: str) -> Iterator[tuple[dict[str, object], Conversation]]:
    """Each row of a prompt file, and the conversation that asks it.

    Raises:
        UserError: a row asks nothing, or the file cannot be read.
    """
    if path.endswith(".txt"):
        for _, line in read_lines(path):
            yield {"prompt": line}, [Message("user", line)]
        return
    for where, row in read_rows(path):
        yield row, _asked(row, where)


def _asked(row: dict[str, object], where: str) -> Conversation:
    """The conversation that a row's fields hold, without its last answer."""
    if row.get("messages", row.get("conversations")):
        (conversation,) = messages(row, where)
        check_turns(conversation, where)
        asked = conversation[:-1] if conversation[-1].role == "assistant" else conversation
        if asked[-1].role != "user":
            raise UserError(f"{where}: `messages` need one of the user to answer, found {asked[-1].role} alone; correct the row")
        return asked
    for field in ("prompt", "instruction", "text"):
        if isinstance(text := row.get(field), str) and text.strip():
            return [Message("user", text, str(row.get("input") or "") if field == "instruction" else "")]
    raise UserError(f"{where}: a prompt needs a text in prompt, instruction, text or messages, found {', '.join(row) or 'nothing'}")
