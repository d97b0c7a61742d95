"""The instruction sets as Lightning sees them: rows to loaders, and the place in the data that a checkpoint remembers."""

from collections.abc import Callable
from hashlib import sha256
from itertools import chain, islice
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from qlora_lightning.data.collate import Collator
from qlora_lightning.data.dataset import DataReport, TokenizedDataset
from qlora_lightning.data.encoder import Encoder, encode_prompts
from qlora_lightning.data.formats import Conversation
from qlora_lightning.data.heldout import HeldoutExamples, in_turn
from qlora_lightning.data.packing import check_pack_length
from qlora_lightning.data.rendering import Renderer, load_renderer
from qlora_lightning.data.sets import InstructionSet, RowSet, merged, with_style_of
from qlora_lightning.data.spec import DatasetSpec, MixPart
from qlora_lightning.data.steps import StepShape, check_division, own_generator
from qlora_lightning.data.stream import StreamedSet
from qlora_lightning.data.templates import TEMPLATES, TOKENIZER
from qlora_lightning.data.training import PlannedTraining, StreamedTraining, Training
from qlora_lightning.errors import UserError, check_least
from qlora_lightning.machine import usable_cores
from qlora_lightning.modeling.tokenizer import filler_id, load_tokenizer, tokenizer_digest

_PACKED_ROW = 2048  # tokens: rows long enough to fill well, short enough for attention over a whole row


class InstructionDataModule(LightningDataModule):
    """Instruction data for finetuning: whole optimizer steps of ``global_batch_size`` examples, whatever the microbatches and GPUs.

    Validation reads every row on every rank, longest first. Prediction gives the validation conversations without their last answer.

    Args:
        dataset: The instruction set: a YAML file (--data.dataset FILE.yaml), single fields of which can be set on the command line
            (--data.dataset.path rows.jsonl).
        base_model: The model whose tokenizer is used, named as for the model.
        base_revision: Commit, tag or branch of a base model on the hub.
        mix: Further instruction sets in the same run, a list of {dataset: FILE.yaml, weight: 1.0}. All are written out as ``dataset`` is.
        global_batch_size: Examples an optimizer step, over all microbatches and GPUs. trainer.accumulate_grad_batches divides it.
        eval_batch_size: Examples a batch in validation, test and prediction. Changes memory and speed, not results.
        streaming: Read rows while training instead of preparing them first, for sets larger than the disk. Needs trainer.max_steps; the
            order is the files', loosened by a shuffle buffer; the first validation_size rows are held out.
        packing: Lay the examples of a step end to end in rows, each with positions and attention of its own: no padding, same results.
        pack_length: Tokens of a packed row at most. Null: 2,048, or the longest example where that is longer
            (2,048 in a stream, whose lengths are not known).
        group_by_length: Make up steps of examples of like length. Saves padding; the order stays shuffled.
        pad_to_multiple_of: Round the length of each batch up to a multiple of this many tokens, which suits tensor cores.
        num_workers: Processes that pad batches ahead of training. 0: the training process itself; usually enough.
        num_proc: Processes that tokenize rows, once. Null: one a core.
        seed: Of the order of the examples and, but for compat: paper, the choice of validation rows; no other random state influences them.
    """

    def __init__(
        self,
        dataset: DatasetSpec,
        base_model: str,
        base_revision: str | None = None,
        mix: list[MixPart] = [],  # noqa: B006  (no Union with None, whose error would hide what is wrong in an entry)
        global_batch_size: int = 16,
        eval_batch_size: int = 8,
        streaming: bool = False,
        packing: bool = False,
        pack_length: int | None = None,
        group_by_length: bool = True,
        pad_to_multiple_of: int = 8,
        num_workers: int = 0,
        num_proc: int | None = None,
        seed: int = 42,
    ) -> None:
        super().__init__()
        positive = {"global_batch_size": global_batch_size, "eval_batch_size": eval_batch_size, "pack_length": pack_length}
        positive |= {"pad_to_multiple_of": pad_to_multiple_of, "num_proc": num_proc}
        check_least("data", {name: (value, 1) for name, value in positive.items()} | {"num_workers": (num_workers, 0), "seed": (seed, 0)})
        if seed >= 2**63:
            raise UserError(f"data.seed must be below 2**63, got {seed}; correct it")
        self.spec = dataset
        self.base_model = base_model
        self.base_revision = base_revision
        self.mix = mix
        self.global_batch_size = global_batch_size
        self.eval_batch_size = eval_batch_size
        self.streaming = streaming
        self.packing = packing
        self.group_by_length = group_by_length
        self.pad_to_multiple_of = pad_to_multiple_of
        self.num_workers = num_workers
        self.seed = seed
        self.tokenizer: PreTrainedTokenizerFast
        self.renderer: Renderer
        self.sets: list[RowSet] = []
        self.train_set: TokenizedDataset
        self.train_report: DataReport | None = None
        self.val_set: TokenizedDataset | None = None
        self.val_report: DataReport | None = None
        self.heldout: Literal["required", "optional", "unused"] = "required"
        """Whether ``validate`` needs held-out rows; unused: it reads no rows at all, the tokenizer alone."""
        self._pack_length = pack_length
        self._processes = num_proc or usable_cores()

    # Reading

    def prepare_data(self) -> None:
        """Downloads and tokenizes what this machine does not have yet; on one process a node."""
        assert self.trainer is not None and self.trainer.state.fn is not None
        self.setup(str(self.trainer.state.fn.value))

    def setup(self, stage: str | None = None) -> None:
        """Opens the prepared rows, or prepares them first. May be called before there is a trainer, and again.

        Raises:
            UserError: files, rows or the template are wrong, or ``stage`` needs validation rows and there are none.
        """
        if stage == "validate" and self.heldout == "unused":
            self._load_style()
            return
        self._open()
        held = [(part, 1.0) for one in self.sets if (part := one.validation) is not None]
        if held and self.val_set is None:
            self.val_set, self.val_report = merged(held)
        if stage in (None, "fit") and not self.streaming and self.train_report is None:
            self.train_set, self.train_report = merged([(one.training, one.weight) for one in self.sets])
            self._check_pack_length()
        if stage in (None, "fit") and self.streaming:
            self._streamed.check()
        if self.val_set is None and stage in ("validate", "test", "predict") and self.heldout == "required":
            raise UserError(
                "validate, test and predict need validation rows, but the data set has none; "
                "set --data.dataset.validation_size or --data.dataset.validation_path"
            )

    def _open(self) -> None:
        if self.sets:
            return
        self._load_style()
        if self.streaming:
            self._open_stream()
            return
        specs = [(self.spec, 1.0), *((with_style_of(self.spec, part), part.weight) for part in self.mix)]
        self.sets = [InstructionSet(spec, self.tokenizer, self._processes, self.seed, weight) for spec, weight in specs]

    def _load_style(self) -> None:
        self.tokenizer = load_tokenizer(self.base_model, self.base_revision)
        self.renderer = load_renderer(self.spec.template, self.tokenizer)

    def _open_stream(self) -> None:
        if self.mix:
            raise UserError("data.mix needs rows that are prepared first, but data.streaming is true; leave one of them out")
        self.sets = [StreamedSet(self.spec, self.tokenizer, self.seed)]

    def _check_pack_length(self) -> None:
        if self.packing and self._pack_length is not None:
            check_pack_length(self._pack_length, int(self.train_set.lengths.max()))

    @property
    def pack_length(self) -> int | None:
        """Tokens of a packed row at most; None without packing."""
        return self.packed_row if self.packing else None

    @property
    def packed_row(self) -> int:
        """Tokens that a packed row would have at most, packed or not."""
        return self._pack_length or max(_PACKED_ROW, 0 if self.streaming else int(self.train_set.lengths.max()))

    def heldout_conversations(self, n: int | None = None) -> list[Conversation]:
        """Usable validation conversations, none where there is no validation: all for None, in the order of the sets and their rows; else
        ``n`` at most, the first of each set in turn."""
        self._open()
        sets = [one.heldout_conversations() for one in self.sets]
        return list(chain.from_iterable(sets) if n is None else islice(in_turn(sets), n))

    # Steps

    def check(self, accumulate: int, ranks: int = 1) -> None:
        """Raises UserError unless the global batch divides into ``accumulate`` microbatches on each of ``ranks`` GPUs."""
        check_division(self.global_batch_size, accumulate, ranks)

    @property
    def _training(self) -> Training:
        trainer = self.trainer
        assert trainer is not None
        accumulate, limit = trainer.accumulate_grad_batches, trainer.limit_train_batches
        shape = StepShape(self.global_batch_size, accumulate, trainer.global_rank, trainer.world_size, self.pack_length)
        if self.streaming:
            return StreamedTraining(self._streamed, shape, self.seed, trainer.max_steps, limit)
        return PlannedTraining(self.train_set, shape, self.seed, self.group_by_length, limit)

    @property
    def _streamed(self) -> StreamedSet:
        (streamed,) = self.sets
        assert isinstance(streamed, StreamedSet)
        return streamed

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch, the short last one included; as far as the trainer's limit_train_batches lets it go."""
        return self._training.steps_per_epoch

    @property
    def microbatches_per_epoch(self) -> int:
        """Microbatches of an epoch on this rank; as far as the trainer's limit_train_batches lets it go."""
        return self._training.microbatches_per_epoch

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole fit: as many as max_steps or max_epochs allow, whichever ends it first."""
        assert self.trainer is not None
        limits = [self.trainer.max_steps] if self.trainer.max_steps > 0 else []
        if self.trainer.max_epochs is not None and self.trainer.max_epochs > 0:
            limits.append(self.trainer.max_epochs * self.steps_per_epoch)
        return min(limits, default=0)

    # Loaders

    def train_dataloader(self) -> DataLoader[Any]:
        """Microbatches of whole steps, from the step on that the trainer has reached. (Batches fetched run ahead of steps taken.)"""
        assert self.trainer is not None
        self.check(self.trainer.accumulate_grad_batches, self.trainer.world_size)
        return self._training.loader(self.trainer.global_step, self._collator, self.num_workers)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Validation batches, longest examples first; no loader where there are no validation rows."""
        if self.val_set is None:
            return []
        return self._loader(HeldoutExamples(self.val_set), self._collator.heldout)

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The validation rows: an instruction set has no third part."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        """The validation prompts, left-padded, in the order of ``heldout_conversations``."""
        renderings = [self.renderer.prompt(conversation) for conversation in self.heldout_conversations()]
        prompts = encode_prompts(Encoder.of(self.tokenizer, self.renderer), renderings)
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
        assert self.trainer is not None
        epoch, step = divmod(self.trainer.global_step, self.steps_per_epoch)
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
        rows = {
            "training rows": self.train_report.kept if self.train_report else "streamed",
            "held-out rows": self.val_report.kept if self.val_report else 0,
        }
        name = " + ".join(one.spec.name for one in self.sets)
        data = {"data set": name, **rows, "fingerprint": self._fingerprint}
        return {**self._template(), "system_prompt": self.spec.system_prompt, "tokenizer": tokenizer_digest(self.tokenizer), "data": data}

    @property
    def _fingerprint(self) -> str:
        return self._streamed.fingerprint() if self.streaming else self.train_set.fingerprint()

    def _template(self) -> dict[str, str]:
        name = self.spec.template
        text = str(self.tokenizer.chat_template) if name == TOKENIZER else repr(TEMPLATES[name])
        return {"template": name, "template_hash": sha256(text.encode()).hexdigest()[:16]}

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "group_by_length": self.group_by_length,
            "steps_per_epoch": None if self.streaming else self.steps_per_epoch,  # a stream's is the run's length
            "examples": None if self.streaming else len(self.train_set),
            "fingerprint": self._fingerprint,
        }
