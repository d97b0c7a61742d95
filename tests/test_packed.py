"""Packing changes no gradient: the sequences of a packed row are as far from each other as in rows of their own."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from running import base_options
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen3Config,
)

from qlora_lightning.cli import main
from qlora_lightning.data.collate import Batch, Collator
from qlora_lightning.data.dataset import IGNORED, TokenizedExample
from qlora_lightning.data.steps import StepDataset, StepSampler, StepShape
from qlora_lightning.errors import UserError
from qlora_lightning.modeling.adapters import LoRASpec, attach_lora
from qlora_lightning.modeling.loading import QuantizationSpec, load_base_model
from qlora_lightning.modeling.packed import check_packing, measure_mixing
from qlora_lightning.module import QLoRAModule

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
GROUPED = {**SHAPE, "num_key_value_heads": 2, "pad_token_id": 3}
WINDOW = {"sliding_window": 8, "head_dim": 16}  # shorter than many an example, and much shorter than a row
APART = {
    "llama": LlamaConfig(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=16),
    "mistral": MistralConfig(**GROUPED, **WINDOW),
    "gemma2": Gemma2Config(**GROUPED, **WINDOW),
    "gemma3": Gemma3TextConfig(**GROUPED, **WINDOW, layer_types=["sliding_attention", "full_attention"]),
    "gpt_neox": GPTNeoXConfig(**SHAPE),
}
MIXING = {
    "bloom": BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=512),  # knows no positions
    "opt": OPTConfig(
        hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=512, word_embed_proj_dim=64
    ),  # knows positions, but derives no mask from them
    "mamba": MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=512, state_size=8),  # carries its state on
}


class Examples:
    """As many random examples of 3 to 40 tokens as make a full step of eight and a short one of five; the first token may be supervised."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.lengths = rng.integers(3, 41, size=13)
        ids = [rng.integers(6, 500, size=n).astype(np.int32) for n in self.lengths]
        labels = [np.where(np.arange(len(one)) >= rng.integers(0, 3), one, IGNORED).astype(np.int32) for one in ids]
        self.examples = [TokenizedExample(*pair) for pair in zip(ids, labels, strict=True)]
        self.targets = np.array([int((one[1:] != IGNORED).sum()) for one in labels])
        self.parts = [(13, 1.0)]

    def __getitem__(self, index: int) -> TokenizedExample:
        return self.examples[index]


def batches(microbatches: int, pack_length: int | None) -> list[Batch]:
    """An epoch of the real sampler and collator."""
    examples = Examples()
    sampler = StepSampler(examples, StepShape(8, microbatches, pack_length=pack_length), seed=0, group_by_length=True)
    collate, fetch = Collator(filler_id=3, pad_to_multiple_of=8).train, StepDataset(examples).__getitems__
    return [collate(fetch(microbatch)) for microbatch in sampler]


def build(config: object, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(dtype)


def wrap(model: torch.nn.Module) -> QLoRAModule:
    """A module with this model, outside a Trainer."""
    module = QLoRAModule("tiny", compute="fp32")
    module._compute_dtype = torch.float32
    module.model = model
    return module


def step_of(module: QLoRAModule, step: list[Batch]) -> tuple[float, torch.Tensor]:
    """Loss and gradient (all of it, flat) of one optimizer step."""
    module.model.zero_grad()
    loss = 0.0
    for batch in step:
        share = module.cross_entropy_sum(batch) / batch["tokens_in_step"]
        share.backward()
        loss += share.item()
    return loss, torch.cat([parameter.grad.flatten() for parameter in module.parameters() if parameter.grad is not None])


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative to the second."""
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("microbatches", [1, 2, 4])
@pytest.mark.parametrize("family", APART)
def test_packing_changes_neither_the_loss_nor_the_gradient(family: str, microbatches: int) -> None:
    module = wrap(build(APART[family]))
    packed, unpacked = batches(microbatches, 96), batches(1, None)
    assert any("position_ids" in batch for batch in packed[:microbatches])
    for mine, reference in ((packed[:microbatches], unpacked[:1]), (packed[microbatches:], unpacked[1:])):  # the full step, the short one
        (loss, gradient), (expected_loss, expected) = step_of(module, mine), step_of(module, reference)
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert distance(gradient, expected) < 5e-6


@pytest.mark.parametrize("family", APART)
def test_without_positions_that_begin_anew_the_gradient_is_another(family: str) -> None:
    """What the test above would show if the sequences were mixed."""
    module = wrap(build(APART[family]))
    (packed,), (unpacked,) = batches(1, 96)[:1], batches(1, None)[:1]
    rows, width = packed["position_ids"].shape
    running = packed | {"position_ids": torch.arange(width).expand(rows, width)}
    assert distance(step_of(module, [running])[1], step_of(module, [unpacked])[1]) > 1e-2


def test_packing_changes_no_gradient_of_adapters_on_a_four_bit_base(four_bit: QLoRAModule) -> None:
    packed, unpacked = batches(2, 96)[:2], batches(2, None)[:2]
    assert distance(step_of(four_bit, packed)[1], step_of(four_bit, unpacked)[1]) < 1e-5


@pytest.fixture
def four_bit(tiny_base: Path) -> QLoRAModule:
    """Adapters that do something, on the quantised tiny base."""
    base = load_base_model(str(tiny_base), QuantizationSpec(), torch.float32, torch.device("cpu"))
    torch.manual_seed(0)
    module = wrap(attach_lora(base, LoRASpec(r=4, dropout=0.0)))
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return module


# ---- the self-test ----


@pytest.mark.parametrize("family", [*APART, "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_that_keep_sequences_apart_pass(family: str, dtype: torch.dtype) -> None:
    """Not by a hair: what is left is rounding, which in bf16 is a hundred thousand times that in fp32."""
    config = {**APART, "mixtral": MixtralConfig(**GROUPED)}[family]
    model = build(config, dtype)
    leak, shift = measure_mixing(model)
    assert leak < 1e-5
    assert shift < (1e-5 if dtype == torch.float32 else 0.05)
    check_packing(model, "tiny")


@pytest.mark.parametrize("family", MIXING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_that_mix_sequences_are_refused(family: str, dtype: torch.dtype) -> None:
    with pytest.raises(UserError, match=r"keeps packed sequences apart, and some/model mixes them .*; set data.packing: false"):
        check_packing(build(MIXING[family], dtype), "some/model")


def test_an_attention_that_builds_no_mask_is_refused() -> None:
    """A model of a good family with a single layer that looks across the border."""

    def see_all(module: torch.nn.Module, arguments: tuple[object, ...], options: dict[str, object]) -> object:
        return arguments, {**options, "attention_mask": None}

    model = build(LlamaConfig(**{**GROUPED, "num_hidden_layers": 8}))
    check_packing(model, "tiny")
    model.model.layers[7].self_attn.register_forward_pre_hook(see_all, with_kwargs=True)
    with pytest.raises(UserError):
        check_packing(model, "tiny")


@pytest.mark.parametrize("training", [True, False])
def test_the_test_leaves_no_trace(four_bit: QLoRAModule, training: bool) -> None:
    """Neither in the training mode nor in the random state nor in the 4-bit weights, whose gradients stay the same to the last bit."""
    four_bit.model.train(training)
    state, (_, before) = torch.get_rng_state(), step_of(four_bit, batches(1, 96)[:1])
    check_packing(four_bit.model, "tiny")
    assert torch.equal(torch.get_rng_state(), state)
    assert {module.training for module in four_bit.model.modules()} == {training}
    assert torch.equal(step_of(four_bit, batches(1, 96)[:1])[1], before)


def test_a_fit_that_packing_would_spoil_costs_an_earlier_run_nothing(
    tiny_base: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "bloom"
    build(MIXING["bloom"]).save_pretrained(base)
    for file in tiny_base.glob("tokenizer*"):
        shutil.copy(file, base)
    root = tmp_path / "run"
    options = [*base_options(base, rows_file, root), "--model.lora.target_modules", "[query_key_value]", "--trainer.max_steps", "1"]
    assert main(["fit", *options]) == 0
    left = sorted(path.name for path in root.rglob("*"))
    assert main(["fit", *options, "--data.packing", "true", "--overwrite"]) == 2
    assert "mixes them" in capsys.readouterr().err
    assert sorted(path.name for path in root.rglob("*")) == left
