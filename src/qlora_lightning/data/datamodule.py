"""The instruction set as Lightning sees it: rows to loaders, and the place in the data that a checkpoint remembers."""

from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedTokenizerFast

from qlora_lightning.data.collate import Collator
from qlora_lightning.data.files import fetch, place, read_rows
from qlora_lightning.data.formats import Conversation, Row, read_conversations
from qlora_lightning.data.spec import DatasetSpec
from qlora_lightning.data.steps import StepDataset, StepLoader, StepSampler, own_generator
from qlora_lightning.data.templates import TEMPLATES, Template, render_prompt
from qlora_lightning.data.tokenize import DataReport, Encoder, TokenizedDataset, prepare
from qlora_lightning.errors import UserError
from qlora_lightning.modeling.tokenizer import filler_id, load_tokenizer

_Located = list[tuple[str, Row]]


class InstructionDataModule(LightningDataModule):
    """Instruction data for finetuning: whole optimizer steps of ``global_batch_size`` examples, whatever the microbatches and GPUs.

    Validation reads every row on every rank, longest first. Prediction gives the validation conversations without their last answer.

    Args:
        dataset: The instruction set: a YAML file (--data.dataset FILE.yaml), single fields of which can be set on the command line
            (--data.dataset.path rows.jsonl).
        base_model: The model whose tokenizer is used, named as for the model.
        base_revision: Commit, tag or branch of a base model on the hub.
        global_batch_size: Examples an optimizer step, over all microbatches and GPUs. trainer.accumulate_grad_batches divides it.
        eval_batch_size: Examples a batch in validation, test and prediction. Changes memory and speed, not results.
        group_by_length: Make up steps of examples of like length. Saves padding; the order stays shuffled.
        pad_to_multiple_of: Round the length of each batch up to a multiple of this many tokens, which suits tensor cores.
        num_workers: Processes that pad batches ahead of training. 0: the training process itself; usually enough.
        seed: Of the order of the examples and the choice of validation rows; nothing else influences them.
    """

    def __init__(
        self,
        dataset: DatasetSpec,
        base_model: str,
        base_revision: str | None = None,
        global_batch_size: int = 16,
        eval_batch_size: int = 8,
        group_by_length: bool = True,
        pad_to_multiple_of: int = 8,
        num_workers: int = 0,
        seed: int = 42,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("global_batch_size", global_batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("pad_to_multiple_of", pad_to_multiple_of, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
        ):
            if value < least:
                raise UserError(f"data.{name} must be at least {least}, got {value}; correct it")
        self.spec = dataset
        self.base_model = base_model
        self.base_revision = base_revision
        self.global_batch_size = global_batch_size
        self.eval_batch_size = eval_batch_size
        self.group_by_length = group_by_length
        self.pad_to_multiple_of = pad_to_multiple_of
        self.num_workers = num_workers
        self.seed = seed
        self.template: Template = TEMPLATES[dataset.template]
        self.tokenizer: PreTrainedTokenizerFast
        self.train_set: TokenizedDataset
        self.train_report: DataReport
        self.val_set: TokenizedDataset | None = None
        self.val_report: DataReport | None = None
        self._read = False
        self._fingerprint = ""
        self._training_rows: _Located = []
        self._held_rows: _Located = []

    # Reading

    def prepare_data(self) -> None:
        """Downloads what only the hub has; on one process a node."""
        fetch(self.spec)

    def setup(self, stage: str | None = None) -> None:
        """Reads and tokenizes the rows, once.

        Raises:
            UserError: files, rows or the template are wrong, or ``stage`` needs validation rows and there are none.
        """
        if not self._read:
            self._read = True
            self.tokenizer = load_tokenizer(self.base_model, self.base_revision)
            self._training_rows, self._held_rows = self._rows()
            if self._held_rows:
                self.val_set, self.val_report = prepare(self._held_rows, self.spec, self.tokenizer)
        if stage in (None, "fit") and not self._fingerprint:
            self.train_set, self.train_report = prepare(self._training_rows, self.spec, self.tokenizer)
            self._fingerprint = self.train_set.fingerprint()
            self._training_rows = []
        if self.val_set is None and stage in ("validate", "test", "predict"):
            raise UserError(
                "validate, test and predict need validation rows, but the data set has none; "
                "set --data.dataset.validation_size or --data.dataset.validation_path"
            )

    def _rows(self) -> tuple[_Located, _Located]:
        train_file, validation_file = fetch(self.spec)
        rows = _located(train_file)
        if validation_file is not None:
            return rows, _located(validation_file)
        size = self.spec.validation_size
        count = int(size) if size >= 1 else ceil(size * len(rows))
        if count >= len(rows):
            raise UserError(f"data.dataset.validation_size must leave rows to train on, got {size} of {len(rows)} rows; make it smaller")
        # Rows are drawn, not conversations: the paths of one tree share their beginnings and must not end up on both sides.
        held = set(np.random.default_rng([self.seed, 0, 1]).permutation(len(rows))[:count].tolist())
        return [row for n, row in enumerate(rows) if n not in held], [row for n, row in enumerate(rows) if n in held]

    def heldout_conversations(self, n: int | None = None) -> list[Conversation]:
        """The first ``n`` usable validation conversations (all for None), in the order of the rows; none where there is no validation."""
        conversations = (_to_last_answer(one) for one in read_conversations(self._held_rows, self.spec, Counter()))
        return list(islice(conversations, n))

    # Steps

    def check(self, accumulate: int, ranks: int = 1) -> None:
        """Raises UserError unless the global batch divides into ``accumulate`` microbatches on each of ``ranks`` GPUs."""
        size = self.global_batch_size
        if accumulate < 1:
            raise UserError(f"trainer.accumulate_grad_batches must be 1 or more, got {accumulate}; use 1")
        if size % ranks:
            near = ceil(size / ranks) * ranks
            raise UserError(
                f"data.global_batch_size must be a multiple of the number of GPUs, got {size} for {ranks} GPUs; use {near}, say"
            )
        if size % (accumulate * ranks):
            possible = ", ".join(str(k) for k in range(1, size // ranks + 1) if size // ranks % k == 0)
            raise UserError(
                f"trainer.accumulate_grad_batches must divide the {size // ranks} examples that each GPU has of "
                f"data.global_batch_size {size}, got {accumulate}; use one of {possible}"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch, the short last one included; as far as the trainer's limit_train_batches lets it go."""
        steps = ceil(len(self.train_set) / self.global_batch_size)
        if self.trainer is None:
            return steps
        limit = self._limit(len(self._sampler(0, 0, None)))
        return steps if limit is None else ceil(limit / self.trainer.accumulate_grad_batches)

    @property
    def microbatches_per_epoch(self) -> int:
        """Microbatches of an epoch on this rank; as far as the trainer's limit_train_batches lets it go."""
        whole = len(self._sampler(0, 0, None))
        return self._limit(whole) or whole

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole fit: as many as max_steps or max_epochs allow, whichever ends it first."""
        assert self.trainer is not None
        limits = [self.trainer.max_steps] if self.trainer.max_steps > 0 else []
        if self.trainer.max_epochs is not None and self.trainer.max_epochs > 0:
            limits.append(self.trainer.max_epochs * self.steps_per_epoch)
        return min(limits, default=0)

    def _limit(self, microbatches: int) -> int | None:
        """The trainer's own limit on an epoch, in microbatches; a part of a step left over at its end becomes a short step."""
        assert self.trainer is not None
        limit = self.trainer.limit_train_batches
        limit = max(1, int(microbatches * limit)) if isinstance(limit, float) else int(limit or microbatches)
        return limit if limit < microbatches else None

    def _sampler(self, epoch: int, start: int, limit: int | None) -> StepSampler:
        assert self.trainer is not None
        return StepSampler(
            self.train_set,
            global_batch_size=self.global_batch_size,
            microbatches=self.trainer.accumulate_grad_batches,
            seed=self.seed,
            group_by_length=self.group_by_length,
            epoch=epoch,
            start=start,
            limit=limit,
            rank=self.trainer.global_rank,
            ranks=self.trainer.world_size,
        )

    def _cursor(self) -> tuple[int, int]:
        """(epoch, step in it) at which training stands. It counts steps taken: batches fetched run ahead of them."""
        assert self.trainer is not None
        return divmod(self.trainer.global_step, self.steps_per_epoch)

    # Loaders

    def train_dataloader(self) -> StepLoader:
        """Microbatches of planned steps, from the step on that the trainer has reached."""
        assert self.trainer is not None
        self.check(self.trainer.accumulate_grad_batches, self.trainer.world_size)
        epoch, start = self._cursor()
        sampler = self._sampler(epoch, start, self._limit(len(self._sampler(0, 0, None))))
        return StepLoader(
            StepDataset(self.train_set),
            sampler,
            collate_fn=self._collator.train,
            num_workers=self.num_workers,
            generator=own_generator(self.seed),
        )

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Validation batches, longest examples first; no loader where there are no validation rows."""
        if self.val_set is None:
            return []
        order = np.argsort(-self.val_set.lengths, kind="stable").tolist()
        examples: Any = self.val_set
        return self._loader(Subset(examples, order), self._collator.evaluation)

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The validation rows: an instruction set has no third part."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        """The validation prompts, left-padded, in the order of ``heldout_conversations``."""
        renderings = [render_prompt(conversation, self.template, self.tokenizer) for conversation in self.heldout_conversations()]
        prompts = [tokens.ids for tokens in Encoder(self.tokenizer, self.template).encode(renderings) if tokens is not None]
        return self._loader(prompts, self._collator.prompts)

    @property
    def _collator(self) -> Collator:
        return Collator(filler_id(self.tokenizer), self.pad_to_multiple_of)

    def _loader(self, dataset: Any, collate: Callable[[Any], Any]) -> DataLoader[Any]:
        return DataLoader(
            dataset, batch_size=self.eval_batch_size, collate_fn=collate, num_workers=self.num_workers, generator=own_generator(self.seed)
        )

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What decides the order of the data, and where in it training stands."""
        epoch, step = self._cursor()
        return {**self._identity(), "cursor": {"epoch": epoch, "step": step}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compares; the cursor itself follows from the trainer's global step.

        Raises:
            UserError: training would go on with other data or in another order.
        """
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        for name, value in self._identity().items():
            if state_dict[name] != value:
                raise UserError(
                    f"a resumed run must see the same data: {name} was {state_dict[name]} in the checkpoint and is {value} now; "
                    "restore it, or start anew from the adapter"
                )

    def metadata(self) -> dict[str, Any]:
        """What an adapter folder records of its data: how to prompt the model, and what it was trained on; plain values."""
        rows = {"training rows": self.train_report.kept, "held-out rows": self.val_report.kept if self.val_report else 0}
        data = {"data set": self.spec.name, **rows, "fingerprint": self._fingerprint}
        template = {"template": self.spec.template, "template_hash": sha256(repr(self.template).encode()).hexdigest()[:16]}
        return {**template, "system_prompt": self.spec.system_prompt, "data": data}

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "group_by_length": self.group_by_length,
            "steps_per_epoch": self.steps_per_epoch,
            "examples": len(self.train_set),
            "fingerprint": self._fingerprint,
        }


def _to_last_answer(conversation: Conversation) -> Conversation:
    """Without what the user said after the last answer."""
    return conversation[: max(n for n, message in enumerate(conversation) if message.role == "assistant") + 1]


def _located(path: Path) -> _Located:
    return [(place(path, number), row) for number, row in read_rows(path)]
