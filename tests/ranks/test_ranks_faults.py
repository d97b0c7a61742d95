"""What goes wrong on one rank ends all of them, soon, with that rank's line and nobody else's; what was saved stays and goes on.

The ranks are processes as torchrun starts them, forked from one that has imported everything: a start costs a second and not ten.
"""

import os
import shutil
import signal
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from forking import SECONDS, Start
from running import read_metrics

from qlora_lightning import rollcall
from qlora_lightning.data.collate import Collator
from qlora_lightning.module import QLoRAModule

STEP = 4
"""The step in which a fault is planted; step 3 is saved."""


def in_step(rank: int, fault: Callable[[QLoRAModule], Any]) -> None:
    """Have ``fault`` happen in step ``STEP`` of one rank."""
    real = QLoRAModule.training_step

    def faulty(self: QLoRAModule, *args: Any) -> Any:
        if self.trainer.global_step + 1 == STEP and self.trainer.global_rank == rank:
            fault(self)
        return real(self, *args)

    QLoRAModule.training_step = faulty  # type: ignore[method-assign,assignment]


def killed(rank: int) -> None:
    def kill(_: QLoRAModule) -> None:
        time.sleep(3 * rollcall.BEAT_SECONDS)  # steps of this model are shorter than the time between two signs of life
        os.kill(os.getpid(), signal.SIGKILL)

    in_step(rank, kill)


def out_of_memory(rank: int) -> None:
    def fail(_: QLoRAModule) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    in_step(rank, fail)


def hanging(rank: int) -> None:
    in_step(rank, lambda _: time.sleep(10 * SECONDS))


def slow(rank: int) -> None:
    """Slow in one step, and far slower to fetch rows before it, while the other rank is in that step already."""
    in_step(rank, lambda _: time.sleep(1))
    real, batches = Collator.train, count(1)

    def faulty(self: Collator, fetched: Any) -> Any:
        if next(batches) == STEP + 1 and os.environ["RANK"] == str(rank):  # one batch is fetched ahead
            time.sleep(4)
        return real(self, fetched)

    Collator.train = faulty  # type: ignore[method-assign]


def defective(rank: int) -> None:
    in_step(rank, lambda module: module.no_such_thing)


def other_lightning(rank: int) -> None:
    """Another version of a package on one rank, as far as its metadata tell."""
    from qlora_lightning import manifest

    real = manifest.version
    if int(os.environ["RANK"]) == rank:
        manifest.version = lambda name: "2.0.0" if name == "lightning" else real(name)  # type: ignore[assignment]


@pytest.fixture
def start(tiny_base: Path, rows_file: Path, tmp_path: Path) -> Start:
    return Start(tiny_base, rows_file, tmp_path)


@pytest.fixture(scope="module")
def whole(tiny_base: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The losses of a run that nothing disturbs."""
    start = Start(tiny_base, rows_file, tmp_path_factory.mktemp("whole"))
    assert [one.code for one in start()] == [0, 0]
    return [row["train/loss"] for row in read_metrics(start.root)]


def check_goes_on(start: Start, losses: list[str]) -> None:
    """The last checkpoint is whole, and a resumed run is what it would have been."""
    assert torch.load(start.root / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == STEP - 1
    assert [one.code for one in start("ckpt_path=last")] == [0, 0]
    assert [row["train/loss"] for row in read_metrics(start.root)] == losses


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed(start: Start, whole: list[str], rank: int) -> None:
    ended = start(plant=(killed, rank))
    assert ended[rank].code == -signal.SIGKILL
    survivor = ended[1 - rank]
    assert survivor.code == 2
    (line,) = survivor.lines
    assert f"rank {rank} of 2 (node " in line and "--ckpt_path last" in line and "last seen in step" in line
    if rank == 1:
        check_goes_on(start, whole)


def test_a_rank_without_memory(start: Start) -> None:
    first, second = start(plant=(out_of_memory, 1))
    assert (first.code, second.code) == (2, 2)
    assert first.lines == []  # what it saw, a connection that was closed, is no cause
    (line,) = second.lines
    assert "rank 1 of 2 (node " in line and "out of memory in step 4: a microbatch of 2 rows" in line and "--ckpt_path last" in line


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs(start: Start, rank: int) -> None:
    ended = start("ranks.patience_seconds=2", plant=(hanging, rank))
    assert [one.code for one in ended] == [2, 2]
    (line,) = [line for one in ended for line in one.lines]
    assert f"rank {rank} of 2 (node " in line and "is not at the end of step 4, where others have waited for 2 s" in line
    assert "test_ranks_faults.py" in line  # where it hangs


def test_a_rank_may_be_slow_and_between_steps_as_slow_as_it_likes(start: Start) -> None:
    assert [one.code for one in start("ranks.patience_seconds=3", f"trainer.max_steps={STEP}", plant=(slow, 1))] == [0, 0]


def test_a_defect_shows_its_own_traceback_alone(start: Start) -> None:
    first, second = start(plant=(defective, 1))
    assert (first.code, second.code) == (1, 1)
    assert "Traceback" in second.err and "no_such_thing" in second.err and "rank 1 of 2" in second.err
    assert "Traceback" not in first.err and first.lines == []


@pytest.mark.parametrize(
    ("plant", "own", "what"),
    [
        (None, ("model.lora.r=8",), "model.lora.r is 8 here and 4 on rank 0"),
        ((other_lightning, 1), (), "lightning is 2.0.0 here and "),
    ],
)
def test_ranks_that_are_not_alike(start: Start, plant: Any, own: tuple[str, ...], what: str) -> None:
    first, second = start(plant=plant, of_rank_1=own)
    assert (first.code, second.code) == (2, 2)
    assert first.lines == []
    (line,) = second.lines
    assert "rank 1 of 2 (node " in line and what in line
    assert not (start.root / "checkpoints").exists()


def test_a_rank_with_other_rows(start: Start) -> None:
    other = start.folder / "other.jsonl"
    shutil.copy(start.rows, other)
    with other.open("a") as file:
        file.write('{"instruction": "One more.", "output": "more"}\n')
    _, second = start(of_rank_1=(f"data.dataset.path={other}",))
    (line,) = second.lines
    assert "rank 1 of 2 (node " in line and "training rows is " in line


def test_a_wrong_option_is_said_once(start: Start) -> None:
    ended = start("data.global_batch_size=3")
    assert [one.code for one in ended] == [2, 2]
    (line,) = [line for one in ended for line in one.lines]
    assert "global_batch_size" in line
