"""Several ranks from one command, from torchrun and from SLURM: who is started with what, and who prepares what the others read."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forking import Start, torchrun
from jsonargparse import Namespace
from lightning.pytorch.strategies import StrategyRegistry
from running import base_options, read_metrics

from qlora_lightning.cli import main
from qlora_lightning.data import prepared
from qlora_lightning.errors import UserError
from qlora_lightning.launching import child_command, differences, settle
from qlora_lightning.lightning_cli import QLoRACLI, resolve_names
from qlora_lightning.parser import STRATEGIES
from qlora_lightning.recipes import shared_defaults
from qlora_lightning.run_folder import check_seen

OF_A_RANK = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK")


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
        time.sleep(2)
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


def test_slurm_starts_all_ranks(tiny_base: Path, rows_file: Path, tmp_path: Path) -> None:
    start = Start(tiny_base, rows_file, tmp_path, slurm)
    ended = start()
    assert [one.code for one in ended] == [0, 0]
    assert len(read_metrics(start.root)) == 6
    # another number of devices than was started
    first, second = start("overwrite=true", "trainer.devices=3")
    assert (first.code, second.code) == (2, 2)
    (line,) = first.lines + second.lines
    assert "trainer.devices and trainer.num_nodes are not what was started" in line


def test_main_called_from_python_starts_the_other_rank(
    tiny_base: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in OF_A_RANK:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setattr(sys, "argv", ["no", "--such", "command"])
    root = tmp_path / "run"
    assert main(["fit", *base_options(tiny_base, rows_file, root), "--trainer.devices", "2"]) == 0
    assert "2 devices: strategy qlora_ddp" in capsys.readouterr().err
    assert len(read_metrics(root)) == 6
    assert "QLoRADDPStrategy" in (root / "config.yaml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["the command", "the rank that it started"])
def test_no_rank_is_left_behind(tiny_base: Path, rows_file: Path, tmp_path: Path, victim: str) -> None:
    root = tmp_path / "run"
    options = [*base_options(tiny_base, rows_file, root), "--trainer.devices", "2", "--trainer.max_epochs", "10000"]
    environment = {name: value for name, value in os.environ.items() if name not in OF_A_RANK} | {"GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "qlora_lightning.cli", "fit", *options, "--checkpoint.every_n_steps", "2"]
    with (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(command, env=environment, stderr=err)
    until = time.monotonic() + 120
    while not (root / "checkpoints" / "last.ckpt").exists() and time.monotonic() < until:
        time.sleep(0.2)
    child = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
    os.kill(process.pid if victim == "the command" else child, signal.SIGKILL)
    assert process.wait(60) == (-signal.SIGKILL if victim == "the command" else 2)
    while (alive := Path(f"/proc/{child}/cmdline").exists() and Path(f"/proc/{child}/cmdline").read_bytes()) and time.monotonic() < until:
        time.sleep(0.2)
    assert not alive
    line = (tmp_path / "err").read_text().strip().split("\n")[-1]
    if victim == "the command":
        assert "rank 0 of 2 (node " in line and "it is gone" in line
    else:
        assert "rank 1 of 2" in line and "it was killed (SIGKILL), most often because the kernel had no memory left" in line
    assert (root / "checkpoints" / "last.ckpt").exists()


@pytest.mark.slow
def test_torchrun_starts_all_ranks(tiny_base: Path, rows_file: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "qlora_lightning.cli"]
    environment = {name: value for name, value in os.environ.items() if name not in OF_A_RANK} | {"GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, "fit", *base_options(tiny_base, rows_file, root)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Done: 6 steps") == 1
    assert len(read_metrics(root)) == 6
