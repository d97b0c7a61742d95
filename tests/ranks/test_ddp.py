"""Two ranks compute what one computes: losses, gradient norms and adapters equal within fp32 rounding, whatever the batches are."""

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from unittest.mock import patch
from zlib import crc32

import pytest
import torch
from peft import PeftModel
from running import read_metrics
from safetensors.torch import load_file
from starting import Ended, Ranks, ddp_options, fit
from transformers import AutoModelForCausalLM

ROUNDING = 5e-6
"""Largest relative difference of a loss or norm, and of an adapter's value to the largest, that the order of sums in fp32 makes here."""
SMOOTH = "model.optimizer.eps=0.01"
"""AdamW's update of a value whose gradient is next to nothing is its sign, which rounding decides; with a larger eps it is not."""


@pytest.fixture(scope="module")
def odd_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 rows of uneven length: five steps of four, and a last one of a single row, for which the second rank has none."""
    file = tmp_path_factory.mktemp("odd") / "rows.jsonl"
    rows = [{"instruction": f"Say {'very ' * (n % 5)}{n}.", "output": f"{'so ' * (n * 7 % 11)}{n}"} for n in range(21)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def one_and_two(
    two_ranks: Ranks, tiny_base: Path, odd_rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, Path]]:
    """The same fit on one rank, in this process, and on two; the folders of both. Each is made once."""

    @cache
    def one(*options: str) -> Path:
        root = tmp_path_factory.mktemp("one") / "run"
        assert fit(ddp_options(1, tiny_base, odd_rows, root, SMOOTH, *options)).code == 0
        return root

    @cache
    def two(fault: str, *options: str) -> Path:
        root = tmp_path_factory.mktemp("two") / "run"
        for ended in two_ranks.run(fit_with, fault, ddp_options(2, tiny_base, odd_rows, root, SMOOTH, *options)):
            assert ended.code == 0, ended.err
        return root

    return lambda *options, fault="": (one(*options), two(fault, *options))


def difference(one: Path, other: Path) -> float:
    """The largest relative difference between two runs: of losses and gradient norms of all steps, and of the adapters at the end."""
    rows = [[row for row in read_metrics(root) if row["train/loss"]] for root in (one, other)]
    pairs = zip(*rows, strict=True)
    names = ("train/loss", "train/grad_norm", "train/supervised_fraction")
    found = [abs(float(mine[name]) / float(theirs[name]) - 1) for mine, theirs in pairs for name in names]
    mine, theirs = (load_file(root / "checkpoints" / "last" / "adapter_model.safetensors") for root in (one, other))
    assert mine.keys() == theirs.keys()
    return max(*found, *(float((mine[name] - theirs[name]).abs().max() / theirs[name].abs().max()) for name in mine))


# ---- what is planted in a rank ----


def fit_with(fault: str, arguments: list[str]) -> Ended:
    """In a rank: the fit, with a fault of ``FAULTS`` in it."""
    with ExitStack() as planted:
        if fault:
            FAULTS[fault](planted)
        return fit(arguments)


def no_sum(planted: ExitStack) -> None:
    """Ranks keep their own gradients, and nobody compares their adapters."""
    planted.enter_context(patch("qlora_lightning.strategies.QLoRADDPStrategy.sum_over_ranks", lambda self, *tensors: None))
    planted.enter_context(patch("qlora_lightning.callbacks.adapter_checkpoint.check_ranks_alike", lambda *_: None))


def average(planted: ExitStack) -> None:
    """As DistributedDataParallel does."""
    from qlora_lightning.strategies import QLoRADDPStrategy

    real = QLoRADDPStrategy.sum_over_ranks

    def averaging(self: QLoRADDPStrategy, *tensors: torch.Tensor) -> None:
        real(self, *tensors)
        for tensor in tensors:
            tensor /= 2

    planted.enter_context(patch.object(QLoRADDPStrategy, "sum_over_ranks", averaging))


def same_shard(planted: ExitStack) -> None:
    """Every rank takes the first one's rows."""
    from dataclasses import replace

    from qlora_lightning.data import steps

    real = steps.microbatches_of
    planted.enter_context(patch.object(steps, "microbatches_of", lambda *args: real(*args[:3], replace(args[3], rank=0), *args[4:])))


def own_count(planted: ExitStack) -> None:
    """Each rank divides by its own supervised tokens of a microbatch, as trainers do that average means."""
    from qlora_lightning.data.collate import Collator

    real = Collator.train

    def train(self: Collator, fetched: object) -> object:
        batch = real(self, fetched)  # type: ignore[arg-type]
        batch["tokens_in_step"] = max(1, 2 * batch["num_supervised"])
        return batch

    planted.enter_context(patch.object(Collator, "train", train))


FAULTS: dict[str, Callable[[ExitStack], None]] = {
    "no sum": no_sum,
    "average": average,
    "same shard": same_shard,
    "own count": own_count,
}


# ---- the same ----


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), id="a last step that leaves a rank without a row"),
        pytest.param(("trainer.accumulate_grad_batches=2", "trainer.strategy.gradient_checkpointing=none"), id="two microbatches"),
        pytest.param(("data.packing=true", "trainer.accumulate_grad_batches=2", "data.pack_length=128"), id="packed"),
        pytest.param(("data.streaming=true", "trainer.max_steps=6"), id="streamed, over the end of the rows"),
        pytest.param(("data.group_by_length=false", "trainer.limit_train_batches=5", "trainer.accumulate_grad_batches=2"), id="cut step"),
    ],
)
def test_two_ranks_are_one(one_and_two: Callable[..., tuple[Path, Path]], options: tuple[str, ...]) -> None:
    assert difference(*one_and_two(*options)) < ROUNDING


def test_a_mix_of_sets(one_and_two: Callable[..., tuple[Path, Path]], rows_file: Path) -> None:
    mix = json.dumps([{"dataset": {"path": str(rows_file), "name": "other"}, "weight": 0.5}])
    assert difference(*one_and_two(f"data.mix={mix}", "trainer.accumulate_grad_batches=2")) < ROUNDING


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_the_same_is_seen(one_and_two: Callable[..., tuple[Path, Path]], fault: str) -> None:
    assert difference(*one_and_two("trainer.max_steps=3", fault=fault)) > 100 * ROUNDING


def test_each_metric_is_the_whole_runs_and_written_once(one_and_two: Callable[..., tuple[Path, Path]], tiny_base: Path) -> None:
    one, two = one_and_two()
    assert [row["step"] for row in read_metrics(two)] == ["0", "1", "2", "3", "4", "5"]
    assert {*read_metrics(two)[0]} == {*read_metrics(one)[0]}
    assert all(float(row["train/tokens_per_second"]) > 0 for row in read_metrics(two))
    # nothing but PEFT is needed for what two ranks have trained
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), str(two / "checkpoints" / "last"))


# ---- what ranks tell each other ----


def fit_noting(arguments: list[str]) -> tuple[Ended, list[int], dict[str, list[float]]]:
    """In a rank, or on one: the fit, dropout's random state at each microbatch, and what was logged; the second rank needs 77 GiB."""
    from qlora_lightning.callbacks import monitor
    from qlora_lightning.module import QLoRAModule

    streams: list[int] = []
    logged: dict[str, list[float]] = {}
    step, log = QLoRAModule.training_step, QLoRAModule.log

    def training_step(self: QLoRAModule, batch: dict[str, object], number: int) -> torch.Tensor:
        streams.append(crc32(torch.get_rng_state().numpy().tobytes()))
        return step(self, batch, number)

    def noting(self: QLoRAModule, name: str, value: float, **options: object) -> None:
        logged.setdefault(name, []).append(float(value))
        log(self, name, value, **options)  # type: ignore[arg-type]

    needed = 77.0 if os.environ.get("RANK") == "1" else 1.0
    with (
        patch.object(monitor, "peak_memory_gib", lambda device: needed),
        patch.multiple(QLoRAModule, training_step=training_step, log=noting),
    ):
        ended = fit(arguments)
    return ended, streams, logged


@pytest.fixture(scope="module")
def noted(
    two_ranks: Ranks, tiny_base: Path, odd_rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[Ended, list[int], dict]]:
    """What ``fit_noting`` gives of one rank alone, and of each of two: with dropout, and without a seed that the user set."""
    root = tmp_path_factory.mktemp("noted")
    options = ("model.lora.dropout=0.2", "trainer.max_steps=3", "trainer.accumulate_grad_batches=2")
    one = fit_noting(ddp_options(1, tiny_base, odd_rows, root / "one", *options))
    two = two_ranks.run(fit_noting, ddp_options(2, tiny_base, odd_rows, root / "two", *options))
    assert [ended.code for ended, *_ in (one, *two)] == [0, 0, 0]
    return [one, *two]


def test_dropout_masks_differ_between_ranks_and_the_first_has_a_single_devices(noted: list[tuple[Ended, list[int], dict]]) -> None:
    alone, first, second = (streams for _, streams, _ in noted)
    assert first[0] == alone[0]
    assert len({*first, *second}) == len(first) + len(second) == 12


def test_every_rank_logs_the_whole_steps_values(noted: list[tuple[Ended, list[int], dict]]) -> None:
    first, second = (logged for *_, logged in noted[1:])
    for name in ("train/loss", "train/grad_norm", "train/supervised_fraction"):
        assert first[name] == second[name] and len(first[name]) == 3
    assert first["memory/peak_gib"] == second["memory/peak_gib"] == [77.0] * 3


def test_tokens_a_second_count_every_ranks() -> None:
    """Two ranks' 30 and 50 tokens, 10 and 30 of them supervised, in two seconds."""
    from types import SimpleNamespace
    from unittest.mock import MagicMock

    from qlora_lightning.callbacks.monitor import Monitor
    from qlora_lightning.module import QLoRAModule

    trainer, module = SimpleNamespace(global_step=0, optimizers=[SimpleNamespace(state={})]), MagicMock(spec=QLoRAModule)
    module.told, module.device = {}, torch.device("cpu")
    with patch("qlora_lightning.callbacks.monitor.time.perf_counter", side_effect=[0.0, 2.0]):
        monitor = Monitor()
        monitor.on_train_start(trainer, module)  # type: ignore[arg-type]
        monitor.on_train_batch_start(trainer, module, {"num_tokens": 30, "num_supervised": 10}, 0)  # type: ignore[arg-type]
        monitor.on_before_optimizer_step(trainer, module, MagicMock())  # type: ignore[arg-type]
        module.heard = [module.told, module.told | {"tokens": 50.0, "supervised": 30.0}]
        trainer.global_step = 1
        monitor.on_train_batch_end(trainer, module, None, {}, 0)  # type: ignore[arg-type]
    (logged,) = module.log_numbers.call_args.args
    assert (logged["train/tokens_per_second"], logged["train/supervised_fraction"]) == (40.0, 0.5)


# ---- ranks that are not alike ----


def fit_unlike(at_step: int, arguments: list[str]) -> Ended:
    """In a rank: the fit; in the second one, one bit of the adapter changes before step ``at_step``."""
    from qlora_lightning.module import QLoRAModule

    real = QLoRAModule.optimizer_zero_grad if at_step else QLoRAModule.configure_optimizers

    def changing(self: QLoRAModule, *args: object) -> object:
        if os.environ["RANK"] == "1" and self.trainer.global_step == at_step:
            self.flat.parameter.data[5].mul_(1 + 2**-23)
        return real(self, *args)  # type: ignore[arg-type]

    with patch.object(QLoRAModule, real.__name__, changing):
        return fit(arguments)


@pytest.mark.parametrize("at_step", [0, 1])
def test_ranks_that_are_not_alike_end_the_run(two_ranks: Ranks, tiny_base: Path, odd_rows: Path, tmp_path: Path, at_step: int) -> None:
    """At the start, and before a checkpoint is written of them."""
    root = tmp_path / "run"
    ended = two_ranks.run(fit_unlike, at_step, ddp_options(2, tiny_base, odd_rows, root, "checkpoint.every_n_steps=2"))
    assert [one.code for one in ended] == [2, 2]
    lines = "".join(one.err for one in ended)
    assert lines.count(f"the adapter of rank 1 is not that of rank 0 at step {2 * at_step}: its device") == 1
    assert not list(root.glob("checkpoints/*.ckpt"))


def test_ranks_without_a_seed_take_the_firsts(two_ranks: Ranks, tiny_base: Path, odd_rows: Path, tmp_path: Path) -> None:
    options = ddp_options(2, tiny_base, odd_rows, tmp_path / "run", "seed_everything=false", "trainer.max_steps=1")
    assert [one.code for one in two_ranks.run(fit, options)] == [0, 0]


# ---- steps that are no finite number ----


def fit_with_nan(rank: str, arguments: list[str]) -> Ended:
    """In a rank, or on one: the fit; in step 2, ``rank`` computes NaN."""
    from qlora_lightning.module import QLoRAModule

    real = QLoRAModule.training_step

    def training_step(self: QLoRAModule, batch: dict[str, object], number: int) -> torch.Tensor:
        loss = real(self, batch, number)
        return loss * torch.nan if self.trainer.global_step == 1 and os.environ.get("RANK", "0") == rank else loss

    with patch.object(QLoRAModule, "training_step", training_step):
        return fit(arguments)


def test_a_nan_of_one_rank_is_one_decision_of_all(two_ranks: Ranks, tiny_base: Path, odd_rows: Path, tmp_path: Path) -> None:
    """All pass over the step, or all end; the rows that are named are those of both ranks, as on one."""
    options = (SMOOTH, "trainer.max_steps=3", "trainer.accumulate_grad_batches=2", "nonfinite.policy=skip")
    roots = tmp_path / "one", tmp_path / "two"
    assert fit_with_nan("0", ddp_options(1, tiny_base, odd_rows, roots[0], *options)).code == 0
    ended = two_ranks.run(fit_with_nan, "1", ddp_options(2, tiny_base, odd_rows, roots[1], *options))
    assert [one.code for one in ended] == [0, 0]
    one, two = (json.loads((root / "nonfinite.json").read_text())["steps"] for root in roots)
    assert [step["sets"] for step in two] == [step["sets"] for step in one]
    assert len(two[0]["sets"][0]["rows"]) == 4
    losses = [[float(row["train/loss"]) for row in read_metrics(root)] for root in roots]
    assert losses[1][2] == pytest.approx(losses[0][2], rel=ROUNDING)
    ended = two_ranks.run(fit_with_nan, "1", ddp_options(2, tiny_base, odd_rows, tmp_path / "stop", *options, "nonfinite.policy=stop"))
    assert [one.code for one in ended] == [2, 2]
    assert "".join(one.err for one in ended).count("step 2 has loss") == 1
