"""``judge``: let a model judge the answers of systems against each other."""

import json as json_module
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.markup import escape
from rich.table import Column, Table

from qlora_lightning.console import console, say
from qlora_lightning.errors import UserError
from qlora_lightning.evaluation.endpoint import Endpoint, EndpointSpec
from qlora_lightning.evaluation.judge.judging import Asking, ask, budget, due_reviews, summary
from qlora_lightning.evaluation.judge.reviews import digest, own_prompts, read_review_prompts
from qlora_lightning.evaluation.judge.systems import check_same_questions, pair_up, read_questions, read_systems
from qlora_lightning.evaluation.judge.verdict_log import VerdictLog, check_folder, prepare_folder

if TYPE_CHECKING:
    from qlora_lightning.evaluation.judge.local import LocalJudge


def judge(
    answers: list[str],
    questions: str,
    output: str,
    mode: Literal["pairwise", "relative"] = "pairwise",
    reference: str | None = None,
    prompts: str | None = None,
    orders: Literal["both", "one"] = "both",
    base_url: str | None = None,
    judge_model: str | None = None,
    key_variable: str = "OPENAI_API_KEY",
    judge_adapter: str | None = None,
    judge_base: str | None = None,
    judge_template: str | None = None,
    batch_size: int = 4,
    temperature: float = 0.2,
    max_tokens: int = 1024,
    parallel: int = 8,
    requests_per_minute: int | None = None,
    timeout_seconds: float = 120.0,
    retries: int = 6,
    completion_limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens",
    price_in: float | None = None,
    price_out: float | None = None,
    limit: int | None = None,
    dry_run: bool = False,
    json: bool = False,
    overwrite: bool = False,
) -> None:
    """Let a model judge the answers of systems against each other, question by question; verdicts go to JSON Lines, a file a match.

    The budget is shown first. The same command again asks only for what has no verdict yet.

    Args:
        answers: Files of answers (of `generate`, or as the QLoRA authors publish them), each a system named after its file or NAME=FILE.
        questions: File of the questions: an id (question_id, message_id or id), the text, a category if any.
        output: Folder for the verdicts.
        mode: pairwise asks which answer is better (or neither), relative for a score from 1 to 10 for each.
        reference: Compare only with this system; relative mode needs one (the paper takes ChatGPT).
        prompts: File of review prompts, as the QLoRA authors publish them; by default prompts of this tool.
        orders: both asks twice, each answer first once, since judges prefer a place; one halves the cost.
        base_url: OpenAI-compatible server that judges, as in http://127.0.0.1:8000/v1.
        judge_model: The model that the server is asked for.
        key_variable: Environment variable that holds the server's key.
        judge_adapter: Adapter folder of a judge that runs here instead.
        judge_base: Base model of a judge that runs here; by default the one of the adapter.
        judge_template: Prompt template of a judge that runs here; by default the one that its adapter was trained with.
        batch_size: Reviews that a judge here writes at once.
        temperature: Of the judge's sampling; the QLoRA authors took 0.2.
        max_tokens: Longest reply, in tokens; the QLoRA authors took 1024.
        parallel: Requests under way at once.
        requests_per_minute: Send no more requests than this in a minute; by default as many as come.
        timeout_seconds: Longest wait for a reply.
        retries: How often a request is sent again after 429, 5xx, a time-out or a lost connection.
        completion_limit: What the server calls the longest reply; reasoning models of OpenAI want max_completion_tokens.
        price_in: Price of a million prompt tokens, for the budget.
        price_out: Price of a million completion tokens, for the budget.
        limit: Only the first so many questions.
        dry_run: Show the budget and stop.
        json: Print one JSON document on standard output.
        overwrite: Delete the verdicts that the folder holds.
    """
    if mode == "relative" and reference is None:
        raise UserError("relative mode scores every system beside one; name it with --reference NAME")
    if limit is not None and limit < 1:
        raise UserError(f"limit must be 1 or more, got {limit}; leave it out for all questions")
    if any(price is not None and not 0 <= price < math.inf for price in (price_in, price_out)):
        raise UserError(f"prices must be 0 or more, got {price_in} and {price_out}; leave out what is not known")
    name = _judge_name(base_url, judge_model, judge_adapter or judge_base)
    asking = Asking(mode, read_review_prompts(prompts) if prompts else own_prompts(mode), name, temperature, max_tokens)
    chosen: Endpoint | LocalJudge
    if base_url:
        chosen = Endpoint(
            EndpointSpec(base_url, name, key_variable, parallel, requests_per_minute, timeout_seconds, retries, completion_limit)
        )
    else:
        from qlora_lightning.evaluation.judge import local  # torch and transformers, which a server's judge does without

        chosen = local.LocalJudge(judge_adapter, judge_base, judge_template, asking, batch_size)
    all_questions, systems = read_questions(questions), read_systems(answers)
    asked = all_questions[:limit]
    check_same_questions(asked, systems)
    matches = pair_up(systems, reference, orders)

    folder, settings = Path(output), {**asking.settings(), "questions": digest([asdict(question) for question in all_questions])}
    if not isinstance(chosen, Endpoint):
        settings |= chosen.identity()
    answered = {system.name: system.digest for system in systems}
    if not overwrite:
        check_folder(folder, settings, answered)
    log = VerdictLog(folder, [] if overwrite else [(match.first.name, match.second.name) for match in matches])
    reviews = due_reviews(asked, matches, log.given)
    needed = budget(reviews, asking, requests_per_minute if base_url else None, price_in, price_out)
    say(f"{len(systems)} systems, {len(asked)} questions, {len(matches)} matches; {len(log.verdicts):,} verdicts are there already")
    say(f"to do: {needed}")
    if dry_run:
        if json:
            print(json_module.dumps(asdict(needed)))
        return
    if reviews:
        chosen.check(temperature) if isinstance(chosen, Endpoint) else chosen.load()
    with log:
        prepare_folder(folder, settings, answered, overwrite)
        failed = ask(chosen, reviews, asking, log) if reviews else 0
    found = {**summary(log, matches), "failed": failed}
    if json:
        print(json_module.dumps(found, ensure_ascii=False))
    else:
        _print(found)
    if failed:
        raise UserError(f"{failed} of {len(reviews)} reviews got no reply (see above); the same command asks for them again")


def _judge_name(base_url: str | None, judge_model: str | None, here: str | None) -> str:
    """The one judge that the options name."""
    if base_url and judge_model and not here:
        return judge_model
    if here and not base_url and not judge_model:
        return here
    given = ", ".join(name for name, value in (("base_url", base_url), ("judge_model", judge_model), ("a judge here", here)) if value)
    raise UserError(
        f"name one judge, got {given or 'none'}; give --base_url and --judge_model for a server, "
        "or --judge_base or --judge_adapter for one here"
    )


def _print(found: dict[str, Any]) -> None:
    columns = ("first", "second", "verdicts", "first_better", "second_better", "equal", "unparsed")
    table = Table(*(Column(column.replace("_", " "), overflow="fold") for column in columns))
    for count in found["matches"]:
        table.add_row(*(escape(str(count[column])) for column in columns))
    console.print(table)
    say(
        f"{found['verdicts']:,} verdicts in {found['folder']}, {found['unparsed']:,} of them unparsed (kept, neither wins nor ties); "
        f"{found['prompt_tokens']:,} prompt and {found['completion_tokens']:,} completion tokens as counted by the judge"
    )
