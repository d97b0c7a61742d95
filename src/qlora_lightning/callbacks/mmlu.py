"""MMLU during training every n optimizer steps, and in ``validate``."""

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.table import Table

from qlora_lightning.callbacks.monitor import between_steps
from qlora_lightning.callbacks.progress import RunProgress
from qlora_lightning.callbacks.run_files import drop_mmlu_after, mmlu_name, write_mmlu
from qlora_lightning.console import console, say
from qlora_lightning.data.spec import DataPath
from qlora_lightning.errors import UserError, check_least
from qlora_lightning.evaluation.mmlu.prompts import Style
from qlora_lightning.evaluation.mmlu.questions import HUB_REVISION, Exam, Question, Split
from qlora_lightning.evaluation.mmlu.scores import MMLUScores, Score
from qlora_lightning.evaluation.mmlu.scoring import Answers, MMLUTest, context_length
from qlora_lightning.loggers import RunWandbLogger
from qlora_lightning.modeling.positions import base_positions
from qlora_lightning.module import QLoRAModule


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
        positive = {"limit": limit, "every_n_steps": every_n_steps, "batch_tokens": batch_tokens, "max_length": max_length}
        check_least("mmlu", {"shots": (shots, 0)} | {name: (value, 1) for name, value in positive.items()})
        names = [name.strip() for name in subjects.split(",")] if isinstance(subjects, str) else subjects
        if names is not None and not all([names, *names]):
            raise UserError(f"mmlu.subjects must be names with commas between, got {subjects!r}; correct it, or leave it out for all")
        self.wanted = path is not None or hub_id is not None
        """Whether there is anything to score on."""
        asked = {"every_n_steps": every_n_steps, "subjects": subjects, "shots": shots, "limit": limit, "max_length": max_length}
        if not self.wanted and (given := [(name, value) for name, value in asked.items() if value is not None]):
            name, value = given[0]
            raise UserError(f"mmlu.{name} {value} needs questions; give --mmlu.path FOLDER or --mmlu.hub_id cais/mmlu")
        self.exam = Exam(path, hub_id or "cais/mmlu", revision, split, shots, names, limit)
        self.style: Style = style
        self.every_n_steps, self.batch_tokens, self.max_length, self.share_examples = (
            every_n_steps,
            batch_tokens,
            max_length,
            share_examples,
        )
        self.record: RunWandbLogger | None = None
        """The W&B run that trained what ``validate`` scores, to add the result to; set before the Trainer runs."""
        self._questions: list[Question] | None = None
        self._test: MMLUTest | None = None
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the questions and write the prompts as tokens before the model loads: what is wrong with either is said now."""
        if not self.wanted or stage not in ("fit", "validate"):
            return
        if stage == "fit" and self.every_n_steps is None:
            say("MMLU: left to validate; set --mmlu.every_n_steps N to score during fit too")
            return
        self._make(trainer, pl_module)

    def read(self) -> None:
        """Read the questions, once.

        Raises:
            UserError: as ``Exam.read``.
        """
        if self.wanted and self._questions is None:
            self._questions = self.exam.read()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        if trainer.is_global_zero:
            drop_mmlu_after(Path(trainer.default_root_dir), self._step)  # of a run that went further and will score them again

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.every_n_steps is None or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        last = trainer.global_step >= data.total_steps > 0 or trainer.should_stop
        if last or trainer.global_step % self.every_n_steps == 0:
            with between_steps(trainer):
                scores = self.evaluate(trainer, pl_module, mmlu_name(trainer.global_step))
            for logger in trainer.loggers:  # at once: what `log` takes here, Lightning would repeat at every later step
                logger.log_metrics(scores.metrics(), step=trainer.global_step - 1)
            say(f"MMLU after step {trainer.global_step}: {_percent(scores.macro)} (mean over subjects: {len(scores.subjects)})")

    def evaluate(self, trainer: Trainer, module: LightningModule, name: str) -> MMLUScores:
        """Score the model as it is now, write ``mmlu/<name>.json`` into the run folder and the subjects' table to W&B.

        Args:
            trainer: Whose strategy has loaded the model.
            module: The module with the model; its training state is as before afterwards.
            name: Of the file.
        """
        assert isinstance(module, QLoRAModule) and self._test is not None
        test, began, strategy = self._test, time.perf_counter(), trainer.strategy
        progress = trainer.progress_bar_callback
        counting = progress.counting("MMLU") if isinstance(progress, RunProgress) else nullcontext(lambda done, of: None)
        with counting as tick, module.autocast(strategy.root_device):
            answers = test.answers(module.model, self.batch_tokens, self.share_examples, trainer.global_rank, trainer.world_size, tick)
        if trainer.world_size > 1:
            logits = strategy.reduce(answers.logits.to(strategy.root_device), reduce_op="sum").cpu()
            answers = test.merged(logits, answers.shared)
        scores = test.scores(answers)
        if trainer.is_global_zero:
            self._record(trainer, module, scores, answers, name, time.perf_counter() - began)
        return scores

    def _make(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, QLoRAModule)
        longest = context_length(base_positions(module.base_model, module.revision), self.max_length)
        self.read()
        assert self._questions is not None
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._test = MMLUTest(self._questions, data.tokenizer, self.style, longest)
        _say_what(self._test)

    def _record(self, trainer: Trainer, module: QLoRAModule, scores: MMLUScores, answers: Answers, name: str, seconds: float) -> None:
        fitting = trainer.state.fn == "fit"
        document = {
            "step": trainer.global_step if fitting else None,
            "model": str(module.initial_adapter or (not fitting and trainer.ckpt_path) or module.base_model),
            "style": self.style,
            "shots": max((len(question.shots) for question in self._questions or []), default=0),
            "split": None if self.exam.holds_prompts else self.exam.split,
            "source": self.exam.path or f"{self.exam.hub_id}@{self.exam.revision}",
            "limit": self.exam.limit,
            **scores.document(),
            "examples_shared": answers.shared,
            "seconds": round(seconds, 3),
        }
        write_mmlu(Path(trainer.default_root_dir), name, document)
        step = trainer.global_step if fitting else None
        for logger in trainer.loggers:
            if isinstance(logger, RunWandbLogger):
                _log_table(logger, scores, step)
        if self.record is not None:
            self.record.log_metrics(scores.metrics())
            _log_table(self.record, scores, step)
            self.record.finalize("success")


def _log_table(logger: RunWandbLogger, scores: MMLUScores, step: int | None) -> None:
    """Under one name: W&B shows the newest and keeps the others by step."""
    rows = [[step, subject, one.accuracy, *one.interval, one.questions] for subject, one in scores.subjects.items()]
    columns = ["step", "subject", "accuracy", "low", "high", "questions"]
    logger.log_table("mmlu/subjects", columns, rows, step=None if step is None else step - 1)


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
