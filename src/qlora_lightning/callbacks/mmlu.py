"""MMLU during training every n optimizer steps, and in ``validate``."""

import json
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from rich.table import Table

from qlora_lightning.callbacks.monitor import between_steps
from qlora_lightning.callbacks.progress import RunProgress
from qlora_lightning.console import console, say
from qlora_lightning.data.spec import DataPath
from qlora_lightning.errors import UserError
from qlora_lightning.evaluation.mmlu import Answers, MMLUTest, context_length
from qlora_lightning.evaluation.mmlu_data import HUB_REVISION, Exam, Question, Split
from qlora_lightning.evaluation.mmlu_prompt import Style
from qlora_lightning.evaluation.mmlu_scores import MMLUScores, Score
from qlora_lightning.module import QLoRAModule

FOLDER = "mmlu"
"""Folder of a run with one JSON file an evaluation."""


class MMLU(Callback):
    """Score the model on MMLU, by the letter that it finds likeliest. Off unless ``path`` or ``hub_id`` is given.

    Args:
        path: A folder of MMLU's CSVs (dev/, val/, test/; either edition), or of the hub's Parquet files, or the QLoRA authors' JSON Lines.
        hub_id: MMLU on the hub, in place of a path: cais/mmlu.
        revision: Commit of the hub data set.
        split: Which questions: test, val or dev.
        shots: Solved examples before each question, 0 to 5, from the dev split in order. Null: 5 (of JSON Lines: as many as they have).
        style: paper: the prompt of the QLoRA authors and of MMLU's own code. lm_eval: that of lm-evaluation-harness.
        subjects: Only these subjects: a list, or names with commas between. Null: all.
        limit: Only the first so many questions of each subject.
        every_n_steps: During fit, optimizer steps between evaluations, and after the last step. Null: only validate evaluates.
        batch_tokens: Tokens of a batch at most. Changes speed and memory, not results.
        max_length: The longest prompt in tokens; longer ones lose examples from the front. Null: the base model's positions.
        share_examples: Compute the examples of a subject once for all its questions. False is slower, and only for comparing.
    """

    def __init__(
        self,
        path: DataPath | None = None,
        hub_id: str | None = None,
        revision: str = HUB_REVISION,
        split: Split = "test",
        shots: int | None = None,
        style: Style = "paper",
        subjects: list[str] | str | None = None,
        limit: int | None = None,
        every_n_steps: int | None = None,
        batch_tokens: int = 4096,
        max_length: int | None = None,
        share_examples: bool = True,
    ) -> None:
        for name, value, least in (
            ("shots", shots, 0),
            ("limit", limit, 1),
            ("every_n_steps", every_n_steps, 1),
            ("batch_tokens", batch_tokens, 1),
            ("max_length", max_length, 1),
        ):
            if value is not None and value < least:
                raise UserError(f"mmlu.{name} must be at least {least}, got {value}; correct it or leave it out")
        names = [name.strip() for name in subjects.split(",")] if isinstance(subjects, str) else subjects
        self.wanted = path is not None or hub_id is not None
        """Whether there is anything to score on."""
        if not self.wanted and every_n_steps is not None:
            raise UserError(f"mmlu.every_n_steps {every_n_steps} needs questions; give --mmlu.path FOLDER or --mmlu.hub_id cais/mmlu")
        self.exam = Exam(path, hub_id or "cais/mmlu", revision, split, shots, names, limit)
        self.style: Style = style
        self.every_n_steps, self.batch_tokens, self.max_length, self.share_examples = (
            every_n_steps,
            batch_tokens,
            max_length,
            share_examples,
        )
        self._questions: list[Question] | None = None
        self._test: MMLUTest | None = None
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the questions before the model loads: what is wrong with them is said now."""
        if stage == "validate" or self.every_n_steps is not None:
            self.read()

    def read(self) -> None:
        """Read the questions, once.

        Raises:
            UserError: as ``Exam.read``.
        """
        if self.wanted and self._questions is None:
            self._questions = self.exam.read()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the prompts as tokens before the first step, so that a tokenizer which cannot is known by then."""
        if self.every_n_steps is not None:
            self._made(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.every_n_steps is None or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        last = trainer.global_step >= data.total_steps > 0 or trainer.should_stop
        if last or trainer.global_step % self.every_n_steps == 0:
            with between_steps(trainer):
                scores = self.evaluate(trainer, pl_module, f"step-{trainer.global_step:06d}")
            for logger in trainer.loggers:  # at once: what `log` takes here, Lightning would repeat at every later step
                logger.log_metrics(scores.metrics(), step=trainer.global_step - 1)
            say(f"MMLU after step {trainer.global_step}: {_percent(scores.macro)} (mean over {len(scores.subjects)} subjects)")

    def evaluate(self, trainer: Trainer, module: LightningModule, name: str) -> MMLUScores:
        """Score the model as it is now, write ``mmlu/<name>.json`` into the run folder and the table to W&B.

        Args:
            trainer: Whose strategy has loaded the model.
            module: The module with the model; its training state is as before afterwards.
            name: Of the file.
        """
        assert isinstance(module, QLoRAModule)
        test, began, strategy = self._made(trainer, module), time.perf_counter(), trainer.strategy
        progress = trainer.progress_bar_callback

        def tick(done: int, of: int) -> None:
            if isinstance(progress, RunProgress):
                progress.count("MMLU", done, of)

        with module.autocast(strategy.root_device):
            answers = test.answers(module.model, self.batch_tokens, self.share_examples, trainer.global_rank, trainer.world_size, tick)
        if trainer.world_size > 1:
            logits = strategy.reduce(answers.logits.to(strategy.root_device), reduce_op="sum").cpu()
            answers = test.merged(logits, answers.shared)
        scores = test.scores(answers)
        if trainer.is_global_zero:
            self._record(trainer, module, scores, answers, name, time.perf_counter() - began)
        return scores

    def _made(self, trainer: Trainer, module: LightningModule) -> MMLUTest:
        assert isinstance(module, QLoRAModule)
        self.read()
        if self._test is None:
            assert self._questions is not None
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            longest = context_length(module.model, self.max_length)
            self._test = MMLUTest(self._questions, data.tokenizer, self.style, longest)
            _say_what(self._test)
        return self._test

    def _record(self, trainer: Trainer, module: QLoRAModule, scores: MMLUScores, answers: Answers, name: str, seconds: float) -> None:
        fitting = trainer.state.fn == "fit"
        document = {
            "step": trainer.global_step if fitting else None,
            "model": module.base_model if module.initial_adapter is None else str(module.initial_adapter),
            "style": self.style,
            "shots": max((len(question.shots) for question in self._questions or []), default=0),
            "split": self.exam.split,
            "source": self.exam.path or f"{self.exam.hub_id}@{self.exam.revision}",
            "limit": self.exam.limit,
            **scores.document(),
            "examples_shared": answers.shared,
            "seconds": round(seconds, 3),
        }
        file = Path(trainer.default_root_dir, FOLDER, f"{name}.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(".tmp")
        draft.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        draft.replace(file)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                rows = [[subject, one.accuracy, *one.interval, one.questions] for subject, one in scores.subjects.items()]
                logger.log_table(f"mmlu/subjects/{name}", ["subject", "accuracy", "low", "high", "questions"], rows)


def _say_what(test: MMLUTest) -> None:
    subjects, shots = len({question.subject for question in test.questions}), max(prompt.shots for prompt in test.prompts)
    say(f"MMLU: {len(test.questions):,} questions, subjects: {subjects}, examples before each: {shots}, answers as {test.letters.text!r}")
    shortened = sum(prompt.dropped > 0 for prompt in test.prompts)
    lost = sum(not prompt.fits for prompt in test.prompts)
    if shortened:
        say(f"MMLU: {shortened} of {len(test.prompts)} prompts were over {test.max_length} tokens and lost examples from the front")
    if lost:
        say(f"warning: {lost} of MMLU's questions do not fit into {test.max_length} tokens even without examples; they count as wrong")


def _percent(score: Score) -> str:
    low, high = score.interval
    return f"{score.accuracy:.1%} [{low:.1%}, {high:.1%}]"


def mmlu_table(scores: MMLUScores) -> Table:
    """The categories and the two means, with their intervals."""
    table = Table("MMLU", "accuracy", "95 %", "questions", "subjects", title_justify="left")
    rows: list[tuple[str, Score, int]] = [(name, one, one.subjects) for name, one in scores.categories.items()]
    for name, one, subjects in [
        *rows,
        ("all, mean over subjects", scores.macro, len(scores.subjects)),
        ("all, over questions", scores.micro, len(scores.subjects)),
    ]:
        low, high = one.interval
        table.add_row(name, f"{one.accuracy:.1%}", f"{low:.1%} to {high:.1%}", f"{one.questions:,}", str(subjects))
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def show(scores: MMLUScores) -> None:
    """Print the table."""
    console.print(mmlu_table(scores))
