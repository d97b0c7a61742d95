"""The LightningModule: a 4-bit base with LoRA, and a loss that is right whatever the split of a step into microbatches.

To follow one training step: ``training_step`` here, ``data/collate.py`` for what a batch holds, ``optim.py`` for the update.
Shapes: B rows of a microbatch, T tokens of a row, P scored positions of a row, V vocabulary.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from peft import PeftModel
from torch import Tensor
from torch.optim import Optimizer

from qlora_lightning.answer_file import Answer
from qlora_lightning.console import console, say
from qlora_lightning.data.dataset import IGNORED
from qlora_lightning.data.heldout import HeldoutSums, heldout_metrics, heldout_names
from qlora_lightning.fused.runner import Runner
from qlora_lightning.fused.start import fused_runner
from qlora_lightning.generation import Assistant, GenerationSpec
from qlora_lightning.manifest import check_manifest, environment, fit_manifest, model_manifest, saved_manifest
from qlora_lightning.modeling.adapters import LoRASpec, adapter_metadata, attach_lora, check_adapter_shapes, load_adapter, norms_to_fp32
from qlora_lightning.modeling.checkpointing import apply_gradient_checkpointing
from qlora_lightning.modeling.fingerprint import base_fingerprint
from qlora_lightning.modeling.flat import FlatAdapter
from qlora_lightning.modeling.ledger import ledger, ledger_table
from qlora_lightning.modeling.loading import Compute, QuantizationSpec, check_fp8, compute_dtype, load_base_model
from qlora_lightning.modeling.packed import check_packing
from qlora_lightning.modeling.sources import stored_source
from qlora_lightning.modeling.tokenizer import check_tokenizer
from qlora_lightning.optim import OptimizerSpec, build_optimizer, build_schedule, refuse_step, state_bytes
from qlora_lightning.ranks import StepEnd, begin_alike
from qlora_lightning.strategies.policy import MemoryPolicy


class QLoRAModule(LightningModule):
    """Finetune a causal language model with QLoRA.

    Args:
        base_model: The pretrained model: a hub id, a local folder, a .gguf file, or package://PACKAGE/FILE.
        revision: Commit, tag or branch of a hub id.
        lora: The low-rank adapters.
        quantization: How the frozen base is stored.
        optimizer: AdamW and its schedule.
        compute: Dtype of the matrix products: bf16, fp32, or auto (bf16 where the device multiplies it well). fp8 trains faster on GPUs
            that have it: products with frozen weights in e4m3, which is not the paper's arithmetic, and bf16 elsewhere.
        fused: Train through hand-written blocks and CUDA graphs where device and family (LLaMA, Mistral, Qwen2, Qwen3) allow it;
            false uses transformers' own. Adapters and checkpoints are the same.
        reproducible: Equal bits from run to run, as a resumed run needs. False lets the fused path take cuDNN's attention, which is
            faster where FlashAttention 4 is not installed.
    """

    model: PeftModel
    flat: FlatAdapter
    """The model's adapter as one tensor, and its gradient."""
    grad_norm: Tensor
    """Norm of the last step's gradient, before clipping."""

    def __init__(
        self,
        base_model: str,
        revision: str | None = None,
        lora: LoRASpec = LoRASpec(),  # noqa: B008  (the parser reads defaults from the signature; a spec is never written to)
        quantization: QuantizationSpec = QuantizationSpec(),  # noqa: B008
        optimizer: OptimizerSpec = OptimizerSpec(),  # noqa: B008
        compute: Compute = "auto",
        fused: bool = True,
        reproducible: bool = True,
    ) -> None:
        super().__init__()
        self.base_model = base_model
        self.revision = revision
        self.lora = lora
        self.quantization = quantization
        self.optimizer = optimizer
        self.compute = compute
        self.fused = fused
        self.reproducible = reproducible
        self.initial_adapter: Path | None = None
        """Adapter folder whose weights replace the fresh ones, set before the Trainer runs."""
        self.generation = GenerationSpec()
        """How ``predict`` draws answers, set before it starts."""
        self.strict_loading = False  # a checkpoint never holds the frozen base; on_load_checkpoint compares what it does hold
        self._step_loss = torch.zeros(())
        self.told: dict[str, float] = {}
        """What this rank's callbacks tell the others at a step's end, set in ``on_before_optimizer_step``; on each under the same names."""
        self.heard: list[dict[str, float]] = []
        """What every rank told in the last step, in order of ranks."""
        self.on_nonfinite: Callable[[float, float], None] = refuse_step
        """Told loss and norm of a step of which one is no finite number; unless it raises, the update is left out."""
        self._runner: Runner | None = None
        self._heldout = HeldoutSums()

    @property
    def dtype_of_compute(self) -> torch.dtype:
        """The dtype of the matrix products, once the model is configured."""
        return self._compute_dtype

    @property
    def policy(self) -> MemoryPolicy:
        """The memory policy that the strategy states; the default one under a strategy of somebody else's."""
        return getattr(self.trainer.strategy, "policy", MemoryPolicy())

    # ---- building ----

    def configure_model(self) -> None:
        """Load the base in 4 bits onto the strategy's device, attach LoRA, and say what the result is made of."""
        device = self.trainer.strategy.root_device
        if not hasattr(self, "model"):
            self._build(device)
        if self.trainer.state.fn == "fit":
            self._prepare_training(device)

    def _build(self, device: torch.device) -> None:
        if self.initial_adapter is not None:
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            check_tokenizer(data.tokenizer, adapter_metadata(self.initial_adapter), self.initial_adapter)
        self._compute_dtype = compute_dtype(self.compute, device)
        if self.trainer.state.fn == "fit":
            check_fp8(self.compute, self.fused, device)
        say(f"Loading {self.base_model} in {self.quantization.quant_type} onto {device}")
        load = getattr(self.trainer.strategy, "load_base", load_base_model)
        base = load(self.base_model, self.quantization, self._compute_dtype, device, self.revision)
        self.base_fingerprint = base_fingerprint(self.base_model, self.revision)
        torch.manual_seed(torch.initial_seed())  # A's first values depend on the seed alone, not on what ran before
        model = attach_lora(base, self.lora)
        norms_to_fp32(model, self._compute_dtype)
        if self.initial_adapter is not None:
            load_adapter(model, self.initial_adapter, self.base_fingerprint)
        self.flat = FlatAdapter(model)
        self.model = model.train()
        console.print(ledger_table(ledger(self.model)))
        if share_out := getattr(self.trainer.strategy, "share_out", None):
            share_out(self.model)

    def _prepare_training(self, device: torch.device) -> None:
        """Choose the path of training steps; refuse a model that would mix the sequences of a packed row."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.fused and self._runner is None:
            fp8 = self.compute == "fp8"
            self._runner = fused_runner(self.model, self.flat, self.policy, device, self._compute_dtype, fp8, self.reproducible)
        if self._runner is None:
            apply_gradient_checkpointing(self.model, self.policy.gradient_checkpointing)
            if data.packing:  # before an earlier run is given up for this one
                with self.autocast(device):
                    check_packing(self.model, self.base_model)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW over the adapter, as the strategy's memory policy allows, and its schedule by optimizer steps."""
        device = self.trainer.strategy.root_device
        optimizer = build_optimizer(self.flat.pieces, self.optimizer, self.policy, device)
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        schedule = build_schedule(optimizer, self.optimizer, data.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def autocast(self, device: torch.device | None = None) -> AbstractContextManager[Any]:
        """The context in which the model computes; fp32 adapter weights are used in the compute dtype inside it.

        Args:
            device: where the model is, if this module has not been told yet.
        """
        return torch.autocast((device or self.device).type, self._compute_dtype, enabled=self._compute_dtype != torch.float32)

    def on_train_start(self) -> None:
        """Ranks begin alike. A resumed optimizer's state is there already; the plan of memory must not count it twice."""
        begin_alike(self.trainer.strategy, self.flat, self.trainer.global_step)
        if self._runner:
            self._runner.planner.count_state(*state_bytes(self.trainer.optimizers[0]))

    # ---- loss ----

    def cross_entropy_sum(self, batch: dict[str, Any]) -> Tensor:
        """Sum of cross-entropy over the microbatch's supervised tokens, in fp32.

        No attention mask is passed: rows are padded on the right, and a causal model's earlier tokens never see what follows.
        The examples of a packed row are told apart by positions that begin anew with each (``modeling/packed.py`` tests that).
        The head runs only at positions whose next token is supervised in some row.

        Args:
            batch: ``input_ids``, ``labels`` [B, T]; ``logit_positions`` [P]; ``position_ids`` [B, T] where rows are packed.

        Returns:
            Scalar; 0 with a graph where nothing is supervised.
        """
        return self._cross_entropy(batch, "sum")

    def cross_entropy_by_row(self, batch: dict[str, Any]) -> Tensor:
        """As ``cross_entropy_sum``, of each row by itself: [B] float64."""
        shape_BP = (len(batch["labels"]), len(batch["logit_positions"]))
        return self._cross_entropy(batch, "none").view(shape_BP).double().sum(1)

    def _cross_entropy(self, batch: dict[str, Any], reduction: str) -> Tensor:
        """Of all positions that are scored [B * P], or their sum; 0 where nothing is supervised."""
        positions = batch["logit_positions"]
        targets_BP = batch["labels"][:, positions + 1]
        inputs = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
        with self.autocast():
            logits_BPV = self.model(**inputs, logits_to_keep=positions, use_cache=False).logits
        return F.cross_entropy(logits_BPV.flatten(0, 1).float(), targets_BP.flatten(), ignore_index=IGNORED, reduction=reduction)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """This microbatch's share of the step's loss.

        The step's loss is (sum over all its supervised tokens, of all ranks) / (their number). Lightning divides what is returned by
        ``accumulate_grad_batches``, so that is multiplied in here; strategies of ours add ranks up, and average nothing.
        """
        loss_sum = self._runner.cross_entropy_sum(batch) if self._runner else self.cross_entropy_sum(batch)
        share = loss_sum / batch["tokens_in_step"]
        self._step_loss = self._step_loss + share.detach()
        return share * self.trainer.accumulate_grad_batches

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Add up what the ranks have computed; log the step's loss, its gradient's norm before clipping, and the rate that it uses."""
        end = StepEnd(self.trainer.strategy, self.flat, self._step_loss, self.told)
        self.grad_norm, self.heard, (loss, norm), self._step_loss = end.grad_norm, end.heard, end.numbers, torch.zeros(())
        self.log_numbers({"train/loss": loss, "train/grad_norm": norm, "train/learning_rate": optimizer.param_groups[0]["lr"]})
        if not math.isfinite(loss + norm):  # weights and optimizer state never see it
            self.on_nonfinite(loss, norm)
            self.flat.withhold()

    def log_numbers(self, numbers: dict[str, float]) -> None:
        """Log what the host knows. On a GPU, where Lightning would put them, each would be waited for behind the step's update."""
        self.log_dict({name: torch.tensor(value) for name, value in numbers.items()})

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: int | float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by the norm that is known already; any other algorithm is Lightning's."""
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            torch.nn.utils.clip_grads_with_norm_([self.flat.parameter], float(gradient_clip_val), self.grad_norm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        self.flat.zero_grad()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """In place, whatever ``set_to_none``: gradients that Lightning drops, as before a fit, would no longer be part of the flat one."""
        self.flat.zero_grad()

    # ---- evaluation ----

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Add each row's cross-entropy and number of supervised tokens to the sums of its set and length."""
        self._heldout.add(self.cross_entropy_by_row(batch), batch["row_targets"], batch["row_sets"], batch["row_lengths"])

    def on_validation_epoch_end(self) -> None:
        self._log_validation("val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self._log_validation("test")

    def _log_validation(self, stage: str) -> None:
        """Token-weighted loss over all batches (and ranks), whatever their size; also by set and by length."""
        names = heldout_names(self.trainer.datamodule.sets)  # type: ignore[attr-defined]
        table = self._heldout.table(len(names)).to(self.trainer.strategy.root_device)
        self._heldout = HeldoutSums()
        metrics = heldout_metrics(self.trainer.strategy.reduce(table, reduce_op="sum").cpu(), names)
        self.log_dict({f"{stage}/{name}": value for name, value in metrics.items()})

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[Answer]:
        """Answers to a batch of left-padded prompts, ``input_ids`` and ``attention_mask`` [B, T], drawn as ``generation`` says."""
        if not batch["numbers"]:  # it only keeps this rank in time
            return []
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        assistant = Assistant(self.model, data.tokenizer, data.renderer, self._compute_dtype)
        return assistant.complete(batch["input_ids"], batch["attention_mask"], self.generation, batch["numbers"])

    # ---- state ----

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The adapter's parameters only: the frozen base is never part of a checkpoint."""
        return {name: parameter.detach() for name, parameter in self.named_parameters() if parameter.requires_grad}

    def metadata(self) -> dict[str, Any]:
        """What tells whether an adapter or checkpoint belongs to this model, as plain values."""
        return {
            "base_model": stored_source(self.base_model),
            "revision": self.revision,
            "base_fingerprint": self.base_fingerprint,
            "quantization": {"quant_type": self.quantization.quant_type, "double_quant": self.quantization.double_quant},
            "lora": {"r": self.lora.r, "alpha": self.lora.alpha},
            "compute": self.compute,
            "optimizer": asdict(self.optimizer) | {"betas": list(self.optimizer.betas)},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        device = self.trainer.strategy.root_device
        manifest = {"manifest": fit_manifest(self, self.trainer), "environment": environment(device)}
        checkpoint["qlora_lightning"] = self.metadata() | manifest

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another base, quantisation or adapter, for a fit of any other recipe; see ``manifest.py``."""
        saved = saved_manifest(checkpoint)
        states = checkpoint["state_dict"], self.state_dict()
        given, expected = ({name: tuple(value.shape) for name, value in state.items()} for state in states)
        check_adapter_shapes(given, expected, "the checkpoint")
        mine = fit_manifest(self, self.trainer) if self.trainer.state.fn == "fit" else model_manifest(self)
        check_manifest(saved, mine, "the checkpoint")
