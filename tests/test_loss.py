"""Contract 1: the gradient of a step is that of (sum of cross-entropy over its supervised tokens) / (their number), however it is split."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from running import read_metrics
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from qlora_lightning.modeling.adapters import LoRASpec, attach_lora
from qlora_lightning.modeling.loading import QuantizationSpec, load_base_model
from qlora_lightning.module import QLoRAModule

CPU = torch.device("cpu")


@pytest.fixture
def module(tiny_base: Path) -> QLoRAModule:
    """A module with its model, outside a Trainer; B is not zero, so that every adapter has a gradient."""
    module = QLoRAModule(str(tiny_base), compute="fp32")
    module._compute_dtype = torch.float32
    torch.manual_seed(0)
    module.model = attach_lora(load_base_model(str(tiny_base), QuantizationSpec(), torch.float32, CPU), LoRASpec(r=4, dropout=0.0))
    for name, parameter in module.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return module


def make_batch(lengths: list[int], prompts: list[int], width: int) -> dict[str, torch.Tensor]:
    """Random rows, padded on the right to ``width``, supervised after their prompt."""
    generator = torch.Generator().manual_seed(len(lengths))
    ids = torch.zeros(len(lengths), width, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for row, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        ids[row, :length] = torch.randint(6, 250, (length,), generator=generator)
        labels[row, prompt:length] = ids[row, prompt:length]
    positions = (labels[:, 1:] != -100).any(0).nonzero().flatten()
    return {"input_ids": ids, "labels": labels, "logit_positions": positions}


def gradients(module: QLoRAModule, loss: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of the adapter, which are then cleared."""
    loss.backward()
    found = [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]
    module.model.zero_grad()
    return found


def test_sum_over_supervised_positions_equals_a_full_forward_with_a_mask(module: QLoRAModule) -> None:
    """The head at some positions only, and no attention mask, change neither the sum nor a gradient."""
    batch = make_batch([9, 17, 5], [4, 3, 2], width=24)
    mask = (torch.arange(24)[None] < torch.tensor([[9], [17], [5]])).long()
    logits = module.model(input_ids=batch["input_ids"], attention_mask=mask).logits
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum")
    got = module.cross_entropy_sum(batch)
    torch.testing.assert_close(got, expected)
    for mine, reference in zip(gradients(module, got), gradients(module, expected), strict=True):
        torch.testing.assert_close(mine, reference)


def test_padding_changes_nothing(module: QLoRAModule) -> None:
    narrow, wide = (make_batch([9, 17], [4, 3], width) for width in (17, 40))
    torch.testing.assert_close(module.cross_entropy_sum(narrow), module.cross_entropy_sum(wide))


def test_base_model_gradient_survives_evaluation(module: QLoRAModule, tiny_base: Path) -> None:
    """A forward in eval mode must leave the 4-bit weights as they are: bitsandbytes repacks them on some CPUs, and then trains wrong."""
    batch = make_batch([9, 17], [4, 3], width=17)
    before = gradients(module, module.cross_entropy_sum(batch))
    module.model.eval()
    with torch.no_grad():
        module.model(input_ids=batch["input_ids"])
    module.model.train()
    for mine, reference in zip(gradients(module, module.cross_entropy_sum(batch)), before, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=0)


def test_four_bit_gradients_equal_those_of_the_dequantised_weights(module: QLoRAModule, tiny_base: Path) -> None:
    """The quantised path is its definition: the same adapter on a plain model that holds dequantised weights, forward and backward."""
    from bitsandbytes.functional import dequantize_4bit

    plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    quantised = dict(module.model.get_base_model().named_modules())
    for name, layer in plain.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            weight = quantised[name].base_layer.weight
            layer.weight.data = dequantize_4bit(weight.data, weight.quant_state).float()
    twin = QLoRAModule(str(tiny_base), compute="fp32")
    twin._compute_dtype = torch.float32
    twin.model = attach_lora(plain.requires_grad_(False), LoRASpec(r=4, dropout=0.0))
    twin.load_state_dict(module.state_dict(), strict=False)
    batch = make_batch([9, 17, 5], [4, 3, 2], width=24)
    loss, reference = module.cross_entropy_sum(batch), twin.cross_entropy_sum(batch)
    torch.testing.assert_close(loss, reference)
    for mine, expected in zip(gradients(module, loss), gradients(twin, reference), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


def test_first_step_is_the_same_for_every_accumulation(fit: Callable[..., Path]) -> None:
    """Loss and gradient norm of the first step, and those of the short last one after equal updates, do not depend on the split."""
    runs = [read_metrics(fit(f"trainer.accumulate_grad_batches={n}", folder=f"a{n}")) for n in (1, 2, 4)]
    for name in ("train/loss", "train/grad_norm"):
        first, *others = ([float(row[name]) for row in run if row[name]] for run in runs)
        assert len(first) == 6  # five whole steps and the short one
        for other in others:
            assert other[0] == pytest.approx(first[0], rel=1e-6)
            assert other == pytest.approx(first, rel=1e-3)


def test_logged_losses_of_whole_and_short_steps_are_token_means(fit: Callable[..., Path], tiny_base: Path, rows_file: Path) -> None:
    """With a learning rate next to zero every step sees the same model, so an epoch's losses weighted by tokens give validation's loss."""
    root = fit(
        "trainer.accumulate_grad_batches=4",
        "model.optimizer.learning_rate=1e-12",
        f"data.dataset.validation_path={rows_file}",
        "data.eval_batch_size=3",
    )
    rows = read_metrics(root)
    steps = [row for row in rows if row["train/loss"]]
    held_out = [float(row["val/loss"]) for row in rows if row["val/loss"]]
    assert held_out[0] == pytest.approx(held_out[-1], rel=1e-6)
    lengths = token_counts(tiny_base, rows_file)
    weighted = sum(float(row["train/loss"]) * tokens for row, tokens in zip(steps, step_tokens(tiny_base, rows_file), strict=True))
    assert weighted / sum(lengths) == pytest.approx(held_out[0], rel=1e-5)


def token_counts(base: Path, rows: Path) -> list[int]:
    """Supervised tokens of each training example."""
    data = set_up(base, rows)
    return [int((data.train_set[n].labels[1:] != -100).sum()) for n in range(len(data.train_set))]


def step_tokens(base: Path, rows: Path) -> list[int]:
    """Supervised tokens of each step of the first epoch, as planned."""
    from qlora_lightning.data.steps import plan_epoch

    data, counts = set_up(base, rows), token_counts(base, rows)
    plan = plan_epoch(data.train_set.lengths, 4, seed=42, epoch=0, group_by_length=True)
    return [sum(counts[index] for index in step) for step in plan]


def set_up(base: Path, rows: Path):
    """A data module outside a Trainer."""
    from qlora_lightning.data.datamodule import InstructionDataModule
    from qlora_lightning.data.spec import DataPath, DatasetSpec

    data = InstructionDataModule(DatasetSpec(path=DataPath(str(rows))), str(base), global_batch_size=4)
    data.setup()
    return data
