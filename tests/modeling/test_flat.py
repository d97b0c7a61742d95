"""The flat adapter: one tensor for the optimizer, the same parameters as ever for everyone else."""

import copy
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from running import base_options, line_of

from qlora_lightning.modeling import flat as flat_module
from qlora_lightning.modeling.adapters import LoRASpec, attach_lora, load_adapter, save_adapter
from qlora_lightning.modeling.checkpointing import apply_gradient_checkpointing
from qlora_lightning.modeling.flat import ROW, FlatAdapter
from qlora_lightning.modeling.loading import QuantizationSpec, load_base_model
from qlora_lightning.module import QLoRAModule
from qlora_lightning.strategies.policy import GradientCheckpointing

IDS = torch.arange(6, 40)[None]


@pytest.fixture
def model(tiny_base: Path) -> PeftModel:
    """The tiny base in 4 bits with LoRA; B is not zero, so that every parameter has a gradient."""
    torch.manual_seed(0)
    base = load_base_model(str(tiny_base), QuantizationSpec(), torch.float32, torch.device("cpu"))
    model = attach_lora(base, LoRASpec(r=4, dropout=0.0))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Trainable parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def backward(model: PeftModel, times: int) -> None:
    """Add the gradient of so many microbatches."""
    for number in range(times):
        model(input_ids=IDS + number).logits.square().mean().backward()


def lies_in(flat: FlatAdapter, model: torch.nn.Module) -> bool:
    """Whether every trainable parameter and gradient is still a view of the buffers."""
    values, gradients = (tensor.untyped_storage().data_ptr() for tensor in (flat.parameter.data, flat.gradient))
    for parameter in (*trained(model).values(), *flat.pieces, flat.parameter):
        assert parameter.grad is not None
        if (parameter.untyped_storage().data_ptr(), parameter.grad.untyped_storage().data_ptr()) != (values, gradients):
            return False
    return True


def test_parameters_keep_name_shape_and_value(model: PeftModel) -> None:
    before = {name: parameter.detach().clone() for name, parameter in trained(model).items()}
    flat = FlatAdapter(model)
    assert lies_in(flat, model)
    after = trained(model)
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    count = sum(value.numel() for value in before.values())
    assert flat.parameter.numel() % ROW == 0 and 0 <= flat.parameter.numel() - count < ROW
    assert not flat.parameter[count:].any() and not flat.gradient.any()


@pytest.mark.parametrize(
    "parent, layers",
    [("self_attn", ["q_proj", "k_proj", "v_proj"]), ("self_attn", ["o_proj"]), ("mlp", ["gate_proj", "up_proj"]), ("mlp", ["down_proj"])],
)
@pytest.mark.parametrize("kind", ["lora_A", "lora_B"])
def test_layers_that_read_the_same_input_are_one_matrix(model: PeftModel, parent: str, layers: list[str], kind: str) -> None:
    flat = FlatAdapter(model)
    modules = model.get_base_model().model.layers[1].get_submodule(parent)
    parameters = [getattr(modules.get_submodule(layer), kind)["default"].weight for layer in layers]
    backward(model, 1)
    values, gradient = flat.stacked(parameters)
    assert torch.equal(values, torch.cat([parameter.detach() for parameter in parameters]))
    assert torch.equal(gradient, torch.cat([parameter.grad for parameter in parameters]))
    gradient.fill_(2)
    assert all((parameter.grad == 2).all() for parameter in parameters)


def test_what_does_not_lie_together_is_not_stacked(model: PeftModel) -> None:
    flat = FlatAdapter(model)
    attention = model.get_base_model().model.layers[0].self_attn
    with pytest.raises(AssertionError, match="not next to each other"):
        flat.stacked([attention.q_proj.lora_A["default"].weight, attention.v_proj.lora_A["default"].weight])


@pytest.mark.parametrize("mode", ["none", "full"])
def test_autograd_adds_to_the_flat_gradient(model: PeftModel, mode: GradientCheckpointing) -> None:
    """In place, over microbatches, the same to the bit as gradients of their own."""
    apply_gradient_checkpointing(model.train(), mode)
    backward(model, 3)
    expected = {name: parameter.grad for name, parameter in trained(model).items()}
    flat = FlatAdapter(model)
    for _ in range(2):  # the second time after zeroing
        flat.zero_grad()
        backward(model, 3)
        assert lies_in(flat, model)
        for name, parameter in trained(model).items():
            assert parameter.grad is not None and torch.equal(parameter.grad, expected[name])


def test_loading_and_moving_stay_in_the_buffer(model: PeftModel, tmp_path: Path) -> None:
    flat = FlatAdapter(model)
    first = {name: value.clone() for name, value in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    save_adapter(model, tmp_path, {}, "")
    for load in (
        lambda: set_peft_model_state_dict(model, first),
        lambda: load_adapter(model, tmp_path, ""),
        lambda: model.load_state_dict({name: value.clone() for name, value in trained(copy.deepcopy(model)).items()}, strict=False),
        lambda: model.to("cpu"),
        lambda: model.eval().train(),
    ):
        load()
        assert lies_in(flat, model)
    flat.parameter.data.zero_()
    load_adapter(model, tmp_path, "")
    found = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert all(torch.equal(found[name], first[name]) for name in first)


def test_written_adapter_is_the_one_of_separate_tensors(model: PeftModel, tmp_path: Path) -> None:
    for name in ("separate", "flat"):
        save_adapter(model, tmp_path / name, {}, "")
        model.save_pretrained(str(tmp_path / f"peft-{name}"), save_embedding_layers=False)
        FlatAdapter(model)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert len({(folder / file).read_bytes() for folder in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize("value", [None, 1.1e-3])
def test_norm_is_right_for_many_values(value: float | None) -> None:
    """Random ones, and equal ones, whose sum in one fp32 number would lose the small to the large."""
    layer = torch.nn.Linear(1000, 5000, bias=False)
    flat = FlatAdapter(layer)
    flat.gradient.copy_(torch.randn_like(flat.gradient) if value is None else torch.full_like(flat.gradient, value))
    assert flat.gradient_norm().item() == pytest.approx(flat.gradient.double().square().sum().sqrt().item(), rel=1e-5)


def adapter_of(shapes: list[tuple[int, int]]) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.ParameterList([torch.nn.Parameter(torch.randn(shape)) for shape in shapes])


def updated(parameters: list[torch.nn.Parameter], optimizer: Callable[..., torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """The optimizer after three steps of a made-up gradient."""
    made = optimizer(parameters, lr=0.1, weight_decay=0.1)
    for _ in range(3):
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad.copy_(parameter.detach() ** 2)
        made.step()
    return made


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, bnb.optim.AdamW32bit, bnb.optim.AdamW8bit], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("piece", [ROW, 2**26])
def test_flat_update_is_that_of_separate_tensors(
    monkeypatch: pytest.MonkeyPatch, optimizer: Callable[..., torch.optim.Optimizer], piece: int
) -> None:
    """To the bit, also of 8-bit state, where tensors have 4096 values or more (fewer stay in 32 bits) and whole blocks of 256."""
    monkeypatch.setattr(flat_module, "PIECE", piece)
    shapes = [(64, 80), (96, 64), (16, 256), (128, 48)]
    separate, together = adapter_of(shapes), adapter_of(shapes)
    for parameter in separate.parameters():
        parameter.grad = torch.zeros_like(parameter)
    flat = FlatAdapter(together)
    assert len(flat.pieces) == (3 if piece == ROW else 1)
    updated(list(separate.parameters()), optimizer)
    updated(flat.pieces, optimizer)
    for one, other in zip(separate.parameters(), together.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_fit_trains_the_buffer(fit: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, accumulate: int) -> None:
    """Through Lightning's own zeroing, validation before and during training, resume and teardown."""
    modules: list[QLoRAModule] = []
    start = QLoRAModule.on_train_start
    monkeypatch.setattr(QLoRAModule, "on_train_start", lambda self: (modules.append(self), start(self))[1])
    options = ("data.dataset.validation_size=4", "validation.every_n_steps=1", f"trainer.accumulate_grad_batches={accumulate}")
    root = fit(*options, "trainer.max_steps=2")
    fit(*options, "trainer.max_steps=4", "ckpt_path=last")
    assert len(modules) == 2
    for module in modules:
        assert lies_in(module.flat, module.model)
    saved = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[f"model.{name}"], parameter) for name, parameter in trained(modules[1].model).items())


def test_checkpoint_with_a_state_for_each_matrix_is_refused(
    fit: Callable[..., Path], tiny_base: Path, rows_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = fit("trainer.max_steps=1")
    file = root / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["optimizer_states"][0]["param_groups"][0]["params"] = list(range(28))
    torch.save(checkpoint, file)
    line = line_of(capsys, "fit", *base_options(tiny_base, rows_file, root), "--ckpt_path", "last")
    assert line.startswith("the checkpoint holds the optimizer's state as 28 tensors, not 1: another version of qlora-lightning wrote it;")
