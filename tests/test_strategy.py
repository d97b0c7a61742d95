"""The strategy: what it does with optimizer state, checkpoints and the model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import StrategyRegistry
from running import base_options, line_of

from qlora_lightning.errors import UserError
from qlora_lightning.modeling.flat import ROW
from qlora_lightning.optim import OptimizerSpec, build_optimizer, build_schedule, describe_optimizer, load_optimizer_state, state_bytes
from qlora_lightning.strategies import MemoryPolicy, QLoRAStrategy
from qlora_lightning.strategies.checkpoint_io import AtomicCheckpointIO

CPU = torch.device("cpu")


def test_strategy_is_chosen_by_name() -> None:
    assert "qlora" in StrategyRegistry
    strategy = Trainer(strategy="qlora", accelerator="cpu", logger=False, enable_checkpointing=False).strategy
    assert isinstance(strategy, QLoRAStrategy)
    assert strategy.policy == MemoryPolicy(paged_optimizer=True, optimizer_bits=32, gradient_checkpointing="auto")
    assert strategy.root_device == CPU


def test_cpu_gets_a_plain_adamw_and_says_why() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = build_optimizer([parameter], OptimizerSpec(weight_decay=0.5), MemoryPolicy(optimizer_bits=8), CPU)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    assert describe_optimizer(MemoryPolicy(), CPU) == "AdamW, 32-bit, plain: paged and 8-bit optimizers need a CUDA device"


@pytest.mark.parametrize("paged, bits, kind", [(True, 32, "PagedAdamW32bit"), (True, 8, "PagedAdamW8bit"), (False, 8, "AdamW8bit")])
def test_policy_names_the_optimizer(paged: bool, bits: Any, kind: str) -> None:
    """The class is chosen by the device that is asked for; nothing is allocated before the first step."""
    policy = MemoryPolicy(paged_optimizer=paged, optimizer_bits=bits)
    optimizer = build_optimizer([torch.nn.Parameter(torch.zeros(3))], OptimizerSpec(), policy, torch.device("cuda"))
    assert type(optimizer).__name__ == kind
    assert optimizer.param_groups[0]["weight_decay"] == 0.0


@pytest.mark.parametrize(
    "schedule, factors",
    [("constant", [0.5, 1, 1, 1, 1, 1]), ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]), ("cosine", [0.5, 1, 1, 0.8536, 0.5, 0.1464])],
)
def test_schedules(schedule: Any, factors: list[float]) -> None:
    """Two steps of warm-up, then down to zero at step six."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_schedule(optimizer, OptimizerSpec(schedule=schedule, warmup_steps=2), total_steps=6)
    seen = []
    for _ in factors:
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen == pytest.approx(factors, abs=1e-4)


def test_loaded_state_goes_back_into_the_optimizers_own_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes' own load would drop the mark of paged memory; ours asks for buffers again, and the run goes on the same."""

    def paged_buffer(self: Any, parameter: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        buffer = torch.zeros_like(parameter, dtype=dtype)
        buffer.is_paged = True  # type: ignore[attr-defined]
        return buffer

    monkeypatch.setattr(bnb.optim.optimizer.Optimizer8bit, "get_state_buffer", paged_buffer)
    monkeypatch.setattr(bnb.optim.optimizer.Optimizer8bit, "prefetch_state", lambda self, parameter: None)  # a CUDA call
    parameters = [torch.nn.Parameter(torch.linspace(-1, 1, 64)) for _ in range(2)]
    first, second = (bnb.optim.PagedAdamW32bit([parameter], lr=0.1) for parameter in parameters)
    for _ in range(3):
        parameters[0].grad = parameters[0].detach() ** 2
        first.step()
    saved = {"state": {0: {k: v.clone() if torch.is_tensor(v) else v for k, v in first.state[parameters[0]].items()}}}
    load_optimizer_state(second, saved | {"param_groups": first.state_dict()["param_groups"]})
    assert state_bytes(second) == (2 * 64 * 4, 2 * 64 * 4)
    parameters[1].data = parameters[0].data.clone()
    for parameter, optimizer in zip(parameters, (first, second), strict=True):
        parameter.grad = torch.ones(64)
        optimizer.step()
    assert torch.equal(parameters[0], parameters[1])


def test_optimizer_state_of_other_parameters_is_refused_in_one_line() -> None:
    """As checkpoints had it that held a state for each matrix of the adapter."""
    many, flat = (torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2)) for _ in range(count)]) for count in (28, 1))
    with pytest.raises(UserError) as error:
        load_optimizer_state(flat, many.state_dict())
    assert str(error.value) == (
        "the checkpoint holds the optimizer's state as 28 tensors, not 1: another version of qlora-lightning wrote it; "
        "start from the adapter folder beside it (--ckpt_path FOLDER: its weights, a fresh optimizer)"
    )


def test_memory_budget_has_a_least_value(tiny_base: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("fit", *base_options(tiny_base, rows_file, tmp_path), "--trainer.strategy.memory_budget_gib")
    line = "trainer.strategy.init_args.memory_budget_gib must be at least 1, got 0.5; correct it or leave it out"
    assert line_of(capsys, *command, "0.5") == line
    MemoryPolicy(memory_budget_gib=1).check()


@pytest.mark.parametrize(
    "policy, text",
    [
        (MemoryPolicy(), "auto within what memory is free"),
        (MemoryPolicy(memory_budget_gib=23.5, offload_inputs=True), "auto within 23.5 GiB in all, kept inputs on the host"),
        (MemoryPolicy(gradient_checkpointing="none"), "none"),
    ],
)
def test_policy_says_what_is_kept(policy: MemoryPolicy, text: str) -> None:
    assert policy.describe_checkpointing() == f"gradient checkpointing {text}"


def test_checkpoint_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    """A failure while writing leaves the earlier file."""
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    whole = {"step": 1, "qlora_lightning": {"base_model": "x"}}
    io.save_checkpoint(whole, path)
    with pytest.raises(Exception):  # noqa: B017  (whatever pickle says of a lambda)
        io.save_checkpoint({"step": 2, "bad": lambda: None}, path)
    assert io.load_checkpoint(path) == whole


def test_checkpoint_holds_the_run_but_not_the_base(fit: Callable[..., Path]) -> None:
    """Adapter, optimizer, schedule, random state, data cursor and callbacks, all readable without unpickling code."""
    root = fit("trainer.max_steps=2")
    checkpoint = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
    assert all("lora_" in name for name in checkpoint["state_dict"])
    assert len(checkpoint["state_dict"]) == 2 * 7 * 2  # two layers, seven linears, A and B
    assert checkpoint["global_step"] == 2
    adapter = sum(value.numel() for value in checkpoint["state_dict"].values())
    assert [state["exp_avg"].numel() for state in checkpoint["optimizer_states"][0]["state"].values()] == [-(-adapter // ROW) * ROW]
    assert checkpoint["lr_schedulers"][0]["last_epoch"] == 2
    assert checkpoint["InstructionDataModule"]["cursor"] == {"epoch": 0, "step": 2}
    assert [sorted(state) for state in checkpoint["random_states"]] == [["cuda", "numpy", "python", "torch"]]
    assert checkpoint["qlora_lightning"]["lora"] == {"r": 4, "alpha": 16}


def test_kept_checkpoints(fit: Callable[..., Path]) -> None:
    root = fit("checkpoint.every_n_steps=2", "checkpoint.keep=1", "data.dataset.validation_size=2")
    names = sorted(path.name for path in (root / "checkpoints").iterdir())
    assert names == ["best", "best.ckpt", "last", "last.ckpt", "step-00000005", "step-00000005.ckpt"]


def test_teardown_leaves_the_model_where_it_is() -> None:
    strategy = Trainer(strategy="qlora", accelerator="cpu", logger=False, enable_checkpointing=False).strategy

    moves = []

    class Model(torch.nn.Module):
        def cpu(self) -> "Model":
            moves.append("to the CPU")
            return self

    strategy._lightning_module = Model()  # type: ignore[assignment]
    strategy.teardown()
    assert moves == []
