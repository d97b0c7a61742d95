"""Several ranks from one command, from torchrun and from SLURM: who is started with what, and who prepares what the others read."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forking import SECONDS, Start, torchrun
from jsonargparse import Namespace
from lightning.pytorch.strategies import StrategyRegistry
from running import base_options, read_metrics
from starting import OF_A_RANK, of_no_rank

from qlora_lightning.data import prepared
from qlora_lightning.errors import UserError
from qlora_lightning.launching import child_command, differences, settle
from qlora_lightning.lightning_cli import QLoRACLI, resolve_names
from qlora_lightning.parser import STRATEGIES
from qlora_lightning.recipes import shared_defaults
from qlora_lightning.run_folder import check_seen


class Parsed(QLoRACLI):
    """Parses, and no more."""

    def before_instantiate_classes(self) -> None:
        self.strategy = self.config.fit.trainer.strategy
        self.instantiate_classes = lambda: None  # type: ignore[method-assign]
        self._run_subcommand = lambda _: None  # type: ignore[method-assign,assignment]

    def after_instantiate_classes(self) -> None:
        """Nothing is instantiated."""


@pytest.fixture
def parsed(tiny_base: Path, rows_file: Path, tmp_path: Path) -> Callable[..., Namespace]:
    """The strategy that options choose."""

    def parse(*options: str) -> Namespace:
        arguments = resolve_names([*base_options(tiny_base, rows_file, tmp_path / "run"), *options])
        strategy: Namespace = Parsed(["fit", "--config", str(shared_defaults()), *arguments]).strategy
        return strategy

    return parse


def test_names_are_those_that_lightning_knows() -> None:
    ours = {name for name in StrategyRegistry if StrategyRegistry[name]["strategy"].__module__.startswith("qlora_lightning")}
    assert ours == {*STRATEGIES}
    for name, path in STRATEGIES.items():
        assert StrategyRegistry[name]["strategy"].__name__ == path.rpartition(".")[2]


@pytest.mark.parametrize("name", ["qlora_ddp", "qlora_fsdp2"])
def test_a_strategy_by_name_takes_over_the_options(parsed: Callable[..., Namespace], tmp_path: Path, name: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"trainer:\n  strategy: {name}\n")
    budget, bits = ["--trainer.strategy.memory_budget_gib", "20"], ["--trainer.strategy.optimizer_bits", "8"]
    for options in (
        ["--trainer.strategy", name, *budget, *bits],
        [*bits, f"--trainer.strategy={name}", *budget],
        [*bits, "--config", str(recipe), *budget],
    ):
        strategy = parsed(*options)
        assert strategy.class_path == STRATEGIES[name]
        assert (strategy.init_args.memory_budget_gib, strategy.init_args.optimizer_bits) == (20, 8)
        assert strategy.init_args.paged_optimizer is True  # of the shared defaults


def test_machines_must_know_where_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OF_A_RANK:
        monkeypatch.delenv(name, raising=False)
    config = Namespace(trainer=Namespace(devices=1, num_nodes=2, accelerator="cpu", strategy="qlora_ddp"))
    with pytest.raises(UserError, match="MASTER_ADDR is not set; start with torchrun or srun"):
        settle(config, "fit")


def test_a_machine_that_does_not_see_the_checkpoint(tmp_path: Path) -> None:
    check_seen(None)
    check_seen(str(tmp_path))
    with pytest.raises(UserError, match="every machine must see what --ckpt_path names"):
        check_seen(str(tmp_path / "last.ckpt"))


def test_differences_between_ranks() -> None:
    assert differences({"a": "1"}, {"a": "1"}) is None
    assert "b is unset here and 2 on rank 0" in str(differences({"a": "1"}, {"a": "1", "b": "2"}))
    assert "and 2 more" in str(differences({}, dict.fromkeys("abcde", "1")))


def test_other_ranks_find_modules_where_this_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["/somewhere/bin", *sys.path])
    assert child_command(["fit"]) == [sys.executable, "-P", "-m", "qlora_lightning.cli", "fit"]
    monkeypatch.chdir("/")
    monkeypatch.setattr(sys, "path", ["/", *sys.path])
    assert child_command(["fit"]) == [sys.executable, "-m", "qlora_lightning.cli", "fit"]


def counted(_: int) -> None:
    """Note each preparation of a data set, which takes a while."""
    real = prepared._prepare_into

    def counting(*arguments: object) -> None:
        with Path(os.environ["COUNTED"]).open("a") as file:
            file.write(f"{os.environ.get('RANK')}\n")
        time.sleep(1)
        real(*arguments)  # type: ignore[arg-type]

    prepared._prepare_into = counting  # type: ignore[assignment]


def test_the_first_rank_prepares(tiny_base: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"  # that nobody has prepared yet
    rows.write_text("".join(f'{{"instruction": "Say {n}.", "output": "{n}"}}\n' for n in range(8)))

    def environment(rank: int, port: int) -> dict[str, str]:
        return torchrun(rank, port) | {"COUNTED": str(tmp_path / "counted")}

    start = Start(tiny_base, rows, tmp_path)
    ended = start._replace(environment=environment)(plant=(counted, 0))
    assert [one.code for one in ended] == [0, 0]
    assert (tmp_path / "counted").read_text() == "0\n"
    assert "2 devices: strategy qlora_ddp" in ended[0].err
    assert ended[1].err == ""  # what a run says comes from the first rank


def slurm(rank: int, port: int) -> dict[str, str]:
    """What srun sets for a task of ``srun --ntasks-per-node 2``."""
    own = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return own | {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "fit"}


# Whoever starts the ranks, each has its own dropout masks and its microbatches of every step.
OPTIONS = ("model.lora.dropout=0.1", "trainer.accumulate_grad_batches=2")


def losses(root: Path) -> list[str]:
    found = [row["train/loss"] for row in read_metrics(root)]
    assert len(found) == 6
    return found


@pytest.fixture(scope="module")
def of_slurm(tiny_base: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Two ranks that SLURM has started, which are done."""
    start = Start(tiny_base, rows_file, tmp_path_factory.mktemp("slurm"), slurm)
    assert [one.code for one in start(*OPTIONS)] == [0, 0]
    return start


def test_slurm_starts_other_ranks_than_the_trainer_has_devices(of_slurm: Start, tmp_path: Path) -> None:
    first, second = of_slurm._replace(folder=tmp_path)("trainer.devices=3")
    assert (first.code, second.code) == (2, 2)
    (line,) = first.lines + second.lines
    assert "trainer.devices and trainer.num_nodes are not what was started" in line


@pytest.mark.slow
def test_main_called_from_python_starts_the_other_rank(of_slurm: Start, tmp_path: Path) -> None:
    start = of_slurm._replace(folder=tmp_path)
    process = start.launch(*OPTIONS, python=True)
    process.join(SECONDS)
    err = (tmp_path / "err").read_text()
    assert process.exitcode == 0, err
    assert err.count("2 devices: strategy qlora_ddp") == 1
    assert "QLoRADDPStrategy" in (start.root / "config.yaml").read_text()
    assert losses(start.root) == losses(of_slurm.root)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["the command", "the rank that it started"])
def test_no_rank_is_left_behind(tiny_base: Path, rows_file: Path, tmp_path: Path, victim: str) -> None:
    start = Start(tiny_base, rows_file, tmp_path)
    process = start.launch("trainer.max_epochs=10000")
    until = time.monotonic() + SECONDS
    while not (start.root / "checkpoints" / "last.ckpt").exists() and time.monotonic() < until:
        time.sleep(0.1)
    child = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
    os.kill(process.pid if victim == "the command" else child, signal.SIGKILL)
    process.join(60)
    assert process.exitcode == (-signal.SIGKILL if victim == "the command" else 2)
    while (alive := Path(f"/proc/{child}/cmdline").exists() and Path(f"/proc/{child}/cmdline").read_bytes()) and time.monotonic() < until:
        time.sleep(0.1)
    assert not alive
    line = (tmp_path / "err").read_text().strip().split("\n")[-1]
    if victim == "the command":
        assert "rank 0 of 2 (node " in line and "it is gone" in line
    else:
        assert "rank 1 of 2" in line and "it was killed (SIGKILL), most often because the kernel had no memory left" in line
    assert (start.root / "checkpoints" / "last.ckpt").exists()


@pytest.mark.slow
def test_torchrun_starts_all_ranks(of_slurm: Start, tmp_path: Path) -> None:
    start = of_slurm._replace(folder=tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "qlora_lightning.cli"]
    done = subprocess.run([*command, *start.arguments(*OPTIONS)], env=of_no_rank(), capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Done: 6 steps") == 1
    assert losses(start.root) == losses(of_slurm.root)
