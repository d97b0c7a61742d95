"""A run on two ranks that is interrupted and resumed is the run that was not; and a checkpoint does not depend on their number."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from running import read_metrics
from starting import Ended, Ranks, ddp_options, fit

# 18 rows, 4 held out: two epochs of four steps of two microbatches, the last of each short
OPTIONS = (
    "model.lora.dropout=0.1",
    "model.optimizer.schedule=cosine",
    "trainer.max_epochs=2",
    "trainer.accumulate_grad_batches=2",
    "validation.every_n_steps=4",
    "data.dataset.validation_size=4",
    "data.eval_batch_size=2",
)
EVERY_STEP = ("checkpoint.every_n_steps=1", "checkpoint.keep=20")


@pytest.fixture(scope="module")
def start(two_ranks: Ranks, tiny_base: Path, rows_file: Path) -> Callable[..., list[Ended]]:
    """Run a fit in a folder on one or two ranks, each of which does it with ``how``; gives how it ended on each."""

    def run(ranks: int, root: Path, *options: str, how: Callable[..., Ended] = fit, more: tuple[str, ...] = ()) -> list[Ended]:
        command = ddp_options(ranks, tiny_base, rows_file, root, *OPTIONS, *options)
        return [how(*more, command)] if ranks == 1 else two_ranks.run(how, *more, command)

    return run


@pytest.fixture(scope="module")
def whole(start: Callable[..., list[Ended]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks from beginning to end, with every step kept."""
    root = tmp_path_factory.mktemp("whole") / "run"
    assert [one.code for one in start(2, root, *EVERY_STEP)] == [0, 0]
    assert [step for step, _ in losses(root)] == [str(step) for step in range(10)]
    return root


def losses(root: Path) -> list[tuple[str, str]]:
    """Step and loss, as written."""
    return [(row["step"], row["train/loss"]) for row in read_metrics(root) if row["train/loss"]]


def validations(root: Path) -> list[tuple[str, str]]:
    return [(row["step"], row["val/loss"]) for row in read_metrics(root) if row["val/loss"]]


def adapter(root: Path) -> torch.Tensor:
    state = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return torch.cat([value.flatten() for value in state.values()])


def checkpoint_of(root: Path, step: int) -> Path:
    return root / "checkpoints" / f"step-{step:08d}.ckpt"


# ---- as many ranks as before ----


@pytest.mark.parametrize("stop_at", [1, 5])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    start: Callable[..., list[Ended]], whole: Path, tmp_path: Path, stop_at: int
) -> None:
    """From a step inside the first epoch, and from its end, which is a short step."""
    assert [one.code for one in start(2, tmp_path, f"ckpt_path={checkpoint_of(whole, stop_at)}")] == [0, 0]
    assert losses(tmp_path) == losses(whole)[stop_at:]
    assert torch.equal(adapter(tmp_path), adapter(whole))


def fit_with_first_ranks_state(arguments: list[str]) -> Ended:
    """In a rank: a fit that saves the random state of the first rank only, as many trainers do."""
    from qlora_lightning.callbacks.random_state import SAVED, RandomState

    real = RandomState.on_load_checkpoint

    def loading(self: RandomState, trainer: object, module: object, checkpoint: dict[str, list[object]]) -> None:
        real(self, trainer, module, checkpoint | {SAVED: [checkpoint[SAVED][0]] * 2})  # type: ignore[arg-type]

    with patch.object(RandomState, "on_load_checkpoint", loading):
        return fit(arguments)


def test_an_unsaved_random_state_of_the_second_rank_is_seen(start: Callable[..., list[Ended]], whole: Path, tmp_path: Path) -> None:
    how = fit_with_first_ranks_state
    assert [one.code for one in start(2, tmp_path, f"ckpt_path={checkpoint_of(whole, 5)}", how=how)] == [0, 0]
    assert losses(tmp_path) != losses(whole)[5:]


# ---- another number of ranks ----


def fit_noting_rows(arguments: list[str]) -> tuple[Ended, list[tuple[int, list[int]]]]:
    """In a rank, or on one: the fit, with the examples of each microbatch and their step."""
    from qlora_lightning.module import QLoRAModule

    real, seen = QLoRAModule.training_step, []

    def training_step(self: QLoRAModule, batch: dict, number: int) -> torch.Tensor:
        seen.append((self.trainer.global_step, batch["examples"].tolist()))
        return real(self, batch, number)

    with patch.object(QLoRAModule, "training_step", training_step):
        return fit(arguments), seen


def by_step(*of_ranks: list[tuple[int, list[int]]]) -> dict[int, list[int]]:
    """The examples of each step, of all microbatches and ranks."""
    steps: dict[int, list[int]] = {}
    for step, examples in chain.from_iterable(of_ranks):
        steps[step] = sorted(steps.get(step, []) + examples)
    return steps


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(start: Callable[..., list[Ended]], tmp_path: Path, before: int, after: int) -> None:
    """The same rows in the same steps; without dropout, the same losses within rounding; from the format of one device."""
    smooth = ("model.lora.dropout=0", "model.optimizer.eps=0.01", *EVERY_STEP)
    first, second = tmp_path / "first", tmp_path / "second"
    ended = start(before, first, *smooth, how=fit_noting_rows)
    expected = by_step(*(seen for _, seen in ended))
    resumed = start(after, second, *smooth, f"ckpt_path={checkpoint_of(first, 3)}", how=fit_noting_rows)
    assert [one.code for one, _ in (*ended, *resumed)] == [0] * 3
    assert by_step(*(seen for _, seen in resumed)) == {step: rows for step, rows in expected.items() if step >= 3}
    mine, reference = ([float(loss) for _, loss in losses(root)] for root in (second, first))
    assert mine == pytest.approx(reference[3:], rel=1e-4)
    assert "".join(one.err for one, _ in resumed).count(f"goes on with {after} rank") == 1
    keys = [{*torch.load(checkpoint_of(root, 5), weights_only=True)} for root in (first, second)]
    assert keys[0] == keys[1]


def test_masks_after_a_change_of_ranks_follow_from_seed_step_and_rank(
    start: Callable[..., list[Ended]], whole: Path, tmp_path: Path
) -> None:
    """With dropout, two runs that go on alike are alike, and do not draw what the run on two ranks drew."""
    roots = tmp_path / "one", tmp_path / "again"
    for root in roots:
        assert start(1, root, f"ckpt_path={checkpoint_of(whole, 6)}")[0].code == 0
    assert losses(roots[0]) == losses(roots[1])
    assert losses(roots[0]) != losses(whole)[6:]


# ---- signals ----


def fit_until_signal(where: str, rank: str, at_step: int, arguments: list[str]) -> Ended:
    """In a rank: the fit; ``rank`` gets SIGTERM in training_step or validation_step after ``at_step`` steps."""
    from qlora_lightning.module import QLoRAModule

    real, sent = getattr(QLoRAModule, where), []

    def step(self: QLoRAModule, batch: dict[str, object], number: int) -> object:
        if os.environ["RANK"] == rank and not sent and self.trainer.global_step == at_step:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch, number)

    with patch.object(QLoRAModule, where, step):
        return fit(arguments)


@pytest.mark.parametrize("where, rank, at_step, saved", [("training_step", "1", 2, 3), ("validation_step", "1", 4, 4)])
def test_a_signal_to_one_rank_stops_all_behind_the_same_step(
    start: Callable[..., list[Ended]], whole: Path, tmp_path: Path, where: str, rank: str, at_step: int, saved: int
) -> None:
    """In a step, and in a validation, which runs again when the run goes on. Then all is as if nothing had been."""
    ended = start(2, tmp_path, how=fit_until_signal, more=(where, rank, at_step))
    assert [one.code for one in ended] == [128 + signal.SIGTERM] * 2
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == saved
    assert ended[0].err.count(f"Stopped by SIGTERM after step {saved}, which is saved") == 1
    assert "Stopped by" not in ended[1].err
    assert [one.code for one in start(2, tmp_path, "ckpt_path=last")] == [0, 0]
    assert losses(tmp_path) == losses(whole)
    assert validations(tmp_path) == validations(whole)
    assert torch.equal(adapter(tmp_path), adapter(whole))


# ---- a checkpoint that cannot be written ----


def fit_on_full_disk(arguments: list[str]) -> Ended:
    """In a rank: the fit; the first rank's disk is full when the checkpoint of step 2 is written."""
    from qlora_lightning.strategies import checkpoint_io

    real = torch.save

    def save(saved: object, *arguments: object, **options: object) -> None:
        if isinstance(saved, dict) and saved.get("global_step") == 2:
            raise OSError(28, "No space left on device")
        real(saved, *arguments, **options)  # type: ignore[arg-type]

    first = os.environ["RANK"] == "0"
    with patch.object(checkpoint_io.torch, "save", save) if first else nullcontext():
        return fit(arguments)


def test_a_full_disk_of_the_first_rank_ends_all_with_its_line(start: Callable[..., list[Ended]], tmp_path: Path) -> None:
    began = time.monotonic()
    ended = start(2, tmp_path, *EVERY_STEP, how=fit_on_full_disk)
    assert [one.code for one in ended] == [2, 2]
    assert "the checkpoint of step 2 cannot be written" in ended[0].last_line and "No space left on device" in ended[0].last_line
    assert "cannot be written" not in ended[1].err
    assert time.monotonic() - began < 60
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 1
