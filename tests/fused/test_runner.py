"""The fused path of a run on a CPU, with plain torch for kernels and no graphs: shapes, autograd, a fit beside the unfused one."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import FAMILIES, make, rows
from lightning.pytorch import Trainer
from running import read_metrics
from safetensors.torch import load_file

from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.data.spec import DatasetSpec
from qlora_lightning.errors import UserError
from qlora_lightning.fused import runner as runner_module
from qlora_lightning.fused.budget import GIB, Budget, total_for
from qlora_lightning.fused.family import fuse
from qlora_lightning.fused.memory import Planner
from qlora_lightning.fused.microbatch import Shape, packed_room, shape_of
from qlora_lightning.fused.rungs import Rung
from qlora_lightning.fused.runner import Graphs, Place, Runner
from qlora_lightning.kernels import reference
from qlora_lightning.modeling.flat import FlatAdapter
from qlora_lightning.module import QLoRAModule
from qlora_lightning.strategies import MemoryPolicy, QLoRAStrategy


def reference_runner(model: Any, flat: FlatAdapter, policy: MemoryPolicy, device: torch.device, dtype: torch.dtype, *_: Any) -> Runner:
    """As ``fused_runner`` gives on a GPU, with plain torch for kernels."""
    return Runner(fuse(model, flat, reference, dtype, 4096), flat, policy, state_bytes=0, graphs=False)


def _none(*_: Any) -> None:
    """As ``fused_runner`` gives where it is off."""


def batch(rows: int, length: int, scored: int) -> dict[str, Any]:
    ids = torch.zeros(rows, length, dtype=torch.int64)
    return {"input_ids": ids, "scored": torch.arange(scored), "row_lengths": [length] * rows}


def test_shapes_are_few() -> None:
    assert shape_of(batch(16, 512, 8192 - 16)) == Shape(16, 512, 8192)
    assert shape_of(batch(16, 505, 3000)) == shape_of(batch(16, 512, 3500)) == Shape(16, 512, 4096)
    shapes = {shape_of(batch(16, length, length)) for length in range(1, 513)}
    assert len(shapes) < 64
    assert all(shape.tokens % 128 == 0 for shape in shapes)


def test_rows_of_unlike_length_lie_end_to_end() -> None:
    """Their 4,240 tokens take room for 4,352, and not 8,192."""
    unlike = batch(16, 512, 3000) | {"row_lengths": list(range(40, 520, 30))}
    assert sum(unlike["row_lengths"]) == 4240
    assert shape_of(unlike) == Shape(1, 4352, 4352, sequences=32, longest=512)


def test_packed_rows_become_one() -> None:
    packed = batch(2, 200, 300) | {"cu_seqlens": torch.tensor([0, 90, 200, 390, 400]), "longest": 190}
    assert shape_of(packed) == Shape(1, 512, 512, sequences=16, longest=512)


@pytest.mark.parametrize("tokens, room", [(1, 128), (900, 1024), (1024, 1024), (1025, 1280), (3900, 4096), (4096, 4096), (4097, 4224)])
def test_room_is_coarse_where_shapes_are_captured(tokens: int, room: int) -> None:
    """At 7B; below 1,024 tokens a step is short enough to feel its padding."""
    assert packed_room(tokens) == room


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("data.packing=true",),
        ("trainer.accumulate_grad_batches=2",),
        ("trainer.gradient_clip_val=0.1",),
        ("trainer.gradient_clip_val=0.01", "trainer.gradient_clip_algorithm=value"),
        ("trainer.limit_train_batches=5", "trainer.accumulate_grad_batches=2", "trainer.max_epochs=2"),
        ("trainer.overfit_batches=2", "trainer.max_epochs=3"),
        ("data.dataset.validation_size=4", "validation.every_n_steps=1", "samples.count=2", "samples.every_n_steps=1"),
    ],
    ids=str,
)
def test_a_fit_is_the_unfused_one(fit: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]) -> None:
    unfused = read_metrics(fit(*options, folder="unfused"))
    monkeypatch.setattr("qlora_lightning.module.fused_runner", reference_runner)
    fused = read_metrics(fit(*options, folder="fused"))
    assert len(fused) == len(unfused) >= 5
    for mine, theirs in zip(fused, unfused, strict=True):
        assert mine["step"] == theirs["step"]
        if not theirs["train/loss"]:
            continue  # a row of validation before training
        assert float(mine["train/loss"]) == pytest.approx(float(theirs["train/loss"]), rel=1e-4)
        assert float(mine["train/grad_norm"]) == pytest.approx(float(theirs["train/grad_norm"]), rel=1e-3)


def test_an_interrupted_fit_goes_on_to_the_bit(fit: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout's seeds are drawn from the generator that a checkpoint holds."""
    monkeypatch.setattr("qlora_lightning.module.fused_runner", reference_runner)
    whole = fit("model.lora.dropout=0.2", folder="whole")
    cut = fit("model.lora.dropout=0.2", "trainer.max_steps=3", folder="cut")
    fit("model.lora.dropout=0.2", f"ckpt_path={cut / 'checkpoints' / 'last.ckpt'}", folder="cut")
    first, second = (load_file(root / "checkpoints" / "last" / "adapter_model.safetensors") for root in (whole, cut))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("first, second", [(reference_runner, _none), (_none, reference_runner)], ids=["then unfused", "then fused"])
def test_a_checkpoint_goes_on_through_the_other_path(
    fit: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, first: Callable[..., Any], second: Callable[..., Any]
) -> None:
    whole = read_metrics(fit(folder="whole"))
    monkeypatch.setattr("qlora_lightning.module.fused_runner", first)
    fit("trainer.max_steps=3", folder="cut")
    monkeypatch.setattr("qlora_lightning.module.fused_runner", second)
    resumed = read_metrics(fit("ckpt_path=last", folder="cut"))
    for mine, theirs in zip(resumed, whole, strict=True):
        assert float(mine["train/loss"]) == pytest.approx(float(theirs["train/loss"]), rel=1e-4)


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    """With graphs wanted, which ``capture`` makes up."""
    model = make(FAMILIES["llama with grouped queries"], tmp_path)
    flat = FlatAdapter(model)
    return Runner(fuse(model, flat, reference, torch.float32, 1024), flat, MemoryPolicy(), state_bytes=0, graphs=True)


class Replay:
    """Stands for a captured graph: computes what was captured."""

    def __init__(self, replay: Callable[[], None]) -> None:
        self.replay = replay


def capture(self: Runner, place: Place, shape: Shape) -> Graphs:
    """As ``Runner._capture``, eagerly."""
    states: list[Any] = []
    graphs: Graphs

    def forward() -> None:
        states[:] = [self.decoder.forward(place.tokens, place.rungs)]
        graphs.loss.copy_(states[0].losses.sum())

    def backward() -> None:
        self.decoder.backward(states[0], place.tokens, graphs.scale)

    graphs = Graphs(Replay(forward), Replay(backward), torch.zeros(()), torch.ones(()))  # type: ignore[arg-type]
    self._pool, self._pool_bytes = object(), 3 * GIB
    return graphs


def step(runner: Runner, batch: dict[str, Any], scale: float = 1.0) -> tuple[float, torch.Tensor]:
    runner.flat.zero_grad()
    loss = runner.cross_entropy_sum(batch)
    (loss * scale).backward()
    return float(loss), runner.flat.gradient.clone()


def test_graphs_begin_with_a_shapes_second_microbatch(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runner, "_capture", capture)
    first, second = rows([40, 21, 33], 40), rows([64, 21, 33, 50], 64)
    eager = [step(runner, first), step(runner, second)]
    assert not runner._captured()
    captured = [step(runner, first), step(runner, second)]
    assert len(runner._captured()) == 2
    for one, other in zip(eager, captured, strict=True):
        assert one[0] == other[0] and torch.equal(one[1], other[1])


def test_gradients_add_up_and_scale(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runner, "_capture", capture)
    batch = rows([40, 21, 33], 40)
    _, once = step(runner, batch)
    for _ in range(2):
        (runner.cross_entropy_sum(batch) * 0.5).backward()
    torch.testing.assert_close(runner.flat.gradient, 2 * once)


@pytest.mark.parametrize("captured", [False, True])
def test_a_second_backward_of_one_microbatch_is_refused(runner: Runner, monkeypatch: pytest.MonkeyPatch, captured: bool) -> None:
    """What it kept is gone; a graph would compute with whatever stands there."""
    monkeypatch.setattr(Runner, "_capture", capture)
    batch = rows([40, 21, 33], 40)
    if captured:
        step(runner, batch)
    loss = runner.cross_entropy_sum(batch)
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="one backward"):
        loss.backward()


def test_a_forward_whose_backward_never_came_leaves_no_trace(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runner, "_capture", capture)
    batch = rows([40, 21, 33], 40)
    lost = runner.cross_entropy_sum(batch)
    alone = step(runner, batch)
    assert not runner._captured()  # its backward has not compiled its kernels yet
    assert torch.equal(step(runner, batch)[1], alone[1])
    with pytest.raises(AssertionError, match="before the next one's forward"):
        lost.backward()


def test_without_memory_for_graphs_a_run_goes_on(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> Graphs:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Runner, "_capture", fail)
    monkeypatch.setattr(Runner, "_drop_graphs", lambda self: None)
    batch = rows([40, 21, 33], 40)
    first, second, third = (step(runner, batch) for _ in range(3))
    assert torch.equal(first[1], second[1]) and torch.equal(first[1], third[1])
    assert capsys.readouterr().err.count("Too little memory to capture 1 x 128 tokens as CUDA graphs") == 1


@pytest.mark.parametrize("gib, wanted, kept", [(24, None, True), (10, None, False), (10, 2, True), (10, 5, False)])
def test_graphs_give_their_memory_up_where_it_is_short(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, gib: int, wanted: int | None, kept: bool
) -> None:
    """They hold 3 GiB beside 4 GiB of weights; what is wanted is known of an eager shape, not of validation."""
    monkeypatch.setattr(Runner, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    runner.planner._budget = Budget(gib * GIB, 4 * GIB)
    batch = rows([40, 21, 33], 40)
    eager, _ = step(runner, batch), step(runner, batch)
    runner.give_up_graphs(None if wanted is None else wanted * GIB)
    assert bool(runner._captured()) == kept
    assert torch.equal(step(runner, batch)[1], eager[1])
    assert runner._captured()  # again


@pytest.fixture
def planning(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """On a card of 24 GiB, 4 of them taken, that is made up."""
    monkeypatch.setattr(Runner, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(Planner, "plans", True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    runner.planner._budget = Budget(24 * GIB, 4 * GIB)
    return runner


def test_weights_stay_expanded_where_memory_is_left_over(planning: Runner) -> None:
    """From the second microbatch of a shape on, with the same bits and without a dequantisation."""
    batch = rows([40, 21, 33], 40)
    eager = step(planning, batch)
    assert not planning.decoder.expanded
    second = step(planning, batch)
    decoder = planning.decoder
    assert len(decoder.expanded) == 4 * len(decoder.blocks)
    taken = sum(weight.nbytes for weight in decoder.expanded.values())
    assert planning.planner.budget.held == 4 * GIB + taken == 4 * GIB + decoder.expanded_bytes * len(decoder.blocks)
    decoder.blocks[0].qkv.weights[0].packed.zero_()  # nobody reads it any longer
    third = step(planning, batch)
    for other in (second, third):
        assert other[0] == eager[0] and torch.equal(other[1], eager[1])


def test_a_shape_that_needs_the_memory_gets_that_of_expanded_weights(planning: Runner) -> None:
    """What is kept of activations saves more than what is kept of weights."""
    batch, larger = rows([40, 21, 33], 40), rows([64, 21, 33, 50] * 8, 64)
    eager, _ = step(planning, batch), step(planning, batch)
    needed = planning.planner.needed(shape_of(larger), [Rung.ALL] * len(planning.decoder.blocks), "reference")
    taken = planning.planner.budget.held - 4 * GIB
    planning.planner._budget = Budget(int(total_for(4 * GIB + needed)) + 100, 4 * GIB + taken)  # room for it, and for nothing beside
    step(planning, larger)
    assert not planning.decoder.expanded and planning.planner.budget.held == 4 * GIB
    assert torch.equal(step(planning, batch)[1], eager[1])


def test_half_of_what_is_left_over_stays_free(planning: Runner) -> None:
    each = planning.decoder.expanded_bytes
    batch = rows([40, 21, 33], 40)
    needed = planning.planner.needed(shape_of(batch), [Rung.ALL] * len(planning.decoder.blocks), "reference")
    planning.planner._budget = Budget(int(total_for(4 * GIB + 2 * needed + 3 * each)), 4 * GIB)
    step(planning, batch), step(planning, batch)
    assert len(planning.decoder.expanded) == 4  # one block's


def test_shapes_that_keep_the_device_busy_are_not_captured(planning: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = rows([40, 21, 33], 40)
    monkeypatch.setattr(runner_module, "LAUNCHED_IN_TIME", shape_of(batch).tokens * planning.decoder.blocks[0].parameters)
    for _ in range(3):
        step(planning, batch)
    assert not planning._captured()
    smaller = rows([21], 21)
    step(planning, smaller), step(planning, smaller)
    assert len(planning._captured()) == 1


def test_shapes_that_nearly_do_are_captured_once_they_have_come_often(planning: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a capture costs is more than it saves in a few microbatches."""
    batch = rows([40, 21, 33], 40)
    monkeypatch.setattr(runner_module, "LAUNCHED_LATE", shape_of(batch).tokens * planning.decoder.blocks[0].parameters)
    monkeypatch.setattr(runner_module, "SEEN_OFTEN", 4)
    eager = [step(planning, batch) for _ in range(4)]
    assert not planning._captured()
    captured = step(planning, batch)
    assert len(planning._captured()) == 1
    assert all(torch.equal(one[1], captured[1]) for one in eager)


def test_what_has_run_is_not_refused_by_a_later_plan(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> list[Rung]:
        raise UserError("a microbatch needs more")

    monkeypatch.setattr(Runner, "_capture", capture)
    batch = rows([40, 21, 33], 40)
    first = step(runner, batch)
    monkeypatch.setattr(runner.planner, "plan", refuse)
    runner._plan_again()
    assert torch.equal(step(runner, batch)[1], first[1])
    with pytest.raises(UserError, match="needs more"):  # another shape, before it runs
        step(runner, rows([64, 21, 33, 50], 64))


def test_fit_after_validation_in_one_process_is_fused(
    tiny_base: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is there already; how it trains is still to be chosen."""
    monkeypatch.setattr("qlora_lightning.module.fused_runner", reference_runner)
    module = QLoRAModule(str(tiny_base), compute="fp32")
    spec = DatasetSpec(path=str(rows_file), template="chatml", validation_size=4)
    data = InstructionDataModule(spec, base_model=str(tiny_base), global_batch_size=4)
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "default_root_dir": tmp_path}
    Trainer(**options, strategy=QLoRAStrategy()).validate(module, data, verbose=False)
    assert module._runner is None
    Trainer(**options, strategy=QLoRAStrategy(), max_steps=1, use_distributed_sampler=False).fit(module, data)
    assert module._runner is not None and module._runner._ticket > 0
