"""Several ranks from one command: who starts them, how they find each other, and what they must have in common before they train.

One command on one machine starts the others itself, as Lightning does; torchrun and SLURM start all of them at once. Either way the
first rank settles the run folder and the checkpoint for all, and the first rank of each machine prepares data and base before the others
look at them. All of that comes before there is a process group, whose other ranks could tire of waiting.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from qlora_lightning import __version__, rollcall
from qlora_lightning.console import say
from qlora_lightning.errors import UserError
from qlora_lightning.manifest import environment
from qlora_lightning.modeling.fingerprint import base_fingerprint
from qlora_lightning.strategies import QLoRADDPStrategy, QLoRAStrategy

MEETING_SECONDS = 1800
"""How long a rank looks for the first one: machines of a cluster start minutes apart."""
SAID_FROM_SECONDS = 30
CHILD = "QLORA_LIGHTNING_RANK"
"""Environment variable by which a rank that this tool has started knows its number."""
_OF_ONE_MACHINE = ("config", "ckpt_path", "overwrite", "path", "validation_path", "default_root_dir", "save_dir", "base_model")
"""Options whose values may differ between machines: what their files hold is compared instead."""
_RUNS = count()
"""Ranks from outside may run one command after another (in tests), with a store that lasts."""
WAY_ON = {"fit": "checkpoints stay: go on with the same command and --ckpt_path last"}


# ---- who starts the ranks ----


def started_from_outside() -> ClusterEnvironment | None:
    """torchrun's or SLURM's environment, where it has started several ranks.

    Raises:
        UserError: SLURM was not told how many ranks a machine has.
    """
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if not SLURMEnvironment.detect() or int(os.environ["SLURM_NTASKS"]) == 1:
        return None
    try:
        return SLURMEnvironment()
    except RuntimeError as error:
        raise UserError("SLURM must be told the ranks of each machine; give sbatch or srun --ntasks-per-node, not --ntasks") from error


def join(command: str) -> None:
    """Join the roll call at once where this process is one of several ranks already, so that even a wrong option is said once."""
    run = 0
    if CHILD in os.environ:
        rank, ranks = int(os.environ[CHILD]), int(os.environ["WORLD_SIZE"])
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    elif (outside := started_from_outside()) is not None:
        rank, ranks, address = outside.global_rank(), outside.world_size(), (outside.main_address, outside.main_port)
        run = next(_RUNS)
    else:
        return
    if ranks > 1:
        if rank != 0:
            wait_for(address)
        agent_hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's own process, which outlives the ranks
        rollcall.begin(rank, ranks, address, rank == 0 and not agent_hosts, _way_on(command), run)


def settle(config: Namespace, command: str) -> None:
    """Choose ``qlora_ddp`` where there are several devices and no other choice was made, and begin the roll call of ranks to be started.

    Args:
        config: Of a fit or evaluation, parsed; ``trainer.devices``, ``num_nodes`` and ``strategy`` are settled in place.
        command: fit, validate, test or predict.

    Raises:
        UserError: the ranks cannot find each other.
    """
    trainer = config.trainer
    if (outside := started_from_outside()) is not None and str(trainer.devices) in ("1", "auto", "-1") and trainer.num_nodes == 1:
        nodes = _nodes(outside)
        trainer.devices, trainer.num_nodes = outside.world_size() // nodes, nodes
    ranks = count_ranks(config)
    if ranks == 1:
        return
    if rollcall.current is None:
        rank, address = _place(trainer.num_nodes, ranks)
        if rank != 0:
            wait_for(address)
        rollcall.begin(rank, ranks, address, rank == 0, _way_on(command))
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address[0], str(rollcall.current_call().address[1])
    if isinstance(trainer.strategy, Namespace) and trainer.strategy.class_path == _path(QLoRAStrategy):
        trainer.strategy.class_path = _path(QLoRADDPStrategy)
        say(f"{ranks} devices: strategy qlora_ddp, a 4-bit base on each")


def count_ranks(config: Namespace) -> int:
    """Devices over all machines.

    Raises:
        UserError: there are no such devices.
    """
    trainer = config.trainer
    if str(trainer.devices) == "1" and trainer.num_nodes == 1:
        return 1
    try:  # Lightning knows what auto, -1 and lists mean on each kind of device
        scout = Trainer(accelerator=trainer.accelerator, devices=trainer.devices, num_nodes=trainer.num_nodes, barebones=True)
    except (ValueError, MisconfigurationException) as error:
        raise UserError(f"trainer.devices {trainer.devices} cannot be had: {' '.join(str(error).split())}") from error
    return scout.num_devices * scout.num_nodes


def _nodes(outside: ClusterEnvironment) -> int:
    """Machines that torchrun or SLURM has started ranks on, equally many on each."""
    if isinstance(outside, SLURMEnvironment):
        return int(os.environ["SLURM_NNODES"])
    return int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"])


def _place(nodes: int, ranks: int) -> tuple[int, tuple[str, int]]:
    """Rank of the process that a user has started on a machine, and where the ranks meet."""
    if nodes == 1:
        return 0, ("127.0.0.1", 0)
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in os.environ]:
        raise UserError(
            f"on several machines the ranks need to know where to meet, and {missing[0]} is not set; "
            f"start with torchrun or srun, or set MASTER_ADDR, MASTER_PORT and NODE_RANK (0 to {nodes - 1}) for the command on each"
        )
    return int(os.environ["NODE_RANK"]) * (ranks // nodes), (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))


def wait_for(address: tuple[str, int]) -> None:
    """Wait until rank 0 listens at this host and port; torch would fill the terminal meanwhile.

    Raises:
        UserError: nobody came.
    """
    host, port = address
    for second in range(MEETING_SECONDS):
        try:
            socket.create_connection(address, timeout=10).close()
            return
        except OSError:
            if second == SAID_FROM_SECONDS:
                say(f"Waiting for rank 0 at {host}:{port}")
            time.sleep(1)
    raise UserError(
        f"the ranks meet at MASTER_ADDR:MASTER_PORT, and nobody was at {host}:{port} for {MEETING_SECONDS // 60} min; "
        "start rank 0 there, or name the machine where it runs"
    )


def _way_on(command: str) -> str:
    return WAY_ON.get(command, "start again")


def _path(strategy: type) -> str:
    return f"qlora_lightning.strategies.{strategy.__name__}"


# ---- what they do before they train ----


@contextmanager
def first_of_machine(trainer: Trainer) -> Iterator[None]:
    """What prepares files: the first rank of each machine does it, and the others, who find it done, only then."""
    call = rollcall.current
    if call is None:
        yield
        return
    cluster: ClusterEnvironment = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
    prepared = f"prepared/{cluster.node_rank()}"
    if cluster.local_rank() != 0:
        call.receive(prepared)
    yield
    if cluster.local_rank() == 0:
        call.hand_on(prepared, True)


def traits(config: Namespace, trainer: Trainer, model: Any, datamodule: Any) -> dict[str, str]:
    """What ranks must have in common: versions, options, and what the files hold that options name."""
    options = {name: str(value) for name, value in vars(config.as_flat()).items() if name.rpartition(".")[2] not in _OF_ONE_MACHINE}
    packages = {name: number for name, number in environment(trainer.strategy.root_device).items() if name != "device"}
    versions = {"qlora-lightning": __version__, "python": sys.version.split()[0], **packages, "peft": version("peft")}
    training = getattr(datamodule, "train_set", None)  # an evaluation reads none
    sets = {"training rows": training, "held-out rows": datamodule.val_set} if not datamodule.streaming else {}
    rows = {name: examples.fingerprint() for name, examples in sets.items() if examples is not None}
    return versions | rows | {"base model": base_fingerprint(model.base_model, model.revision)} | options


def differences(mine: Mapping[str, str], first: Mapping[str, str]) -> str | None:
    """One line on what this rank has otherwise than rank 0, three things at most; None where nothing is."""
    names = [name for name in {**first, **mine} if mine.get(name) != first.get(name)]
    shown = ", ".join(f"{name} is {mine.get(name, 'unset')} here and {first.get(name, 'unset')} on rank 0" for name in names[:3])
    more = f", and {len(names) - 3} more" if len(names) > 3 else ""
    return f"ranks must have the same versions, options, data and base: {shown}{more}; make them equal and start again" if names else None


class RankLauncher(_SubprocessScriptLauncher):
    """Starts the other ranks of this machine, where nobody else has, and begins when all ranks are there and alike.

    Args:
        cluster: Lightning's view of the ranks.
        devices: Ranks of each machine.
        nodes: Machines.
        arguments: Of the command line, the command first.
        mine: What this rank must have in common with the others.
    """

    def __init__(self, cluster: ClusterEnvironment, devices: int, nodes: int, arguments: list[str], mine: dict[str, str]) -> None:
        super().__init__(cluster, devices, nodes)
        self._arguments = arguments
        self._mine = mine

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        def together() -> Any:
            self._compare()
            return function(*args, **kwargs)

        try:
            self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        except ValueError as error:
            raise UserError(f"trainer.devices and trainer.num_nodes are not what was started: {error}") from error
        return super().launch(together, trainer=trainer)

    def _compare(self) -> None:
        call = rollcall.current_call()
        if call.rank == 0:
            call.hand_on("traits", self._mine)
        elif (different := differences(self._mine, call.receive("traits"))) is not None:
            raise UserError(different)
        call.meet("alike")

    def _call_children_scripts(self) -> None:
        """As Lightning does it, but with the arguments that this command was given, which need not be ``sys.argv``.

        ``self.procs`` stays empty: Lightning's observer kills this process too when one of those ends.
        """
        call = rollcall.current_call()
        host, port = call.address
        given = {
            "NODE_RANK": self.cluster_environment.node_rank(),
            "WORLD_SIZE": self.num_processes * self.num_nodes,
            "MASTER_ADDR": host,
            "MASTER_PORT": port,
        }
        for local in range(1, self.num_processes):
            rank = call.rank + local
            own = {name: str(value) for name, value in {**given, "LOCAL_RANK": local, CHILD: rank}.items()}
            call.attend_to(rank, subprocess.Popen(child_command(self._arguments), env={**os.environ, **own}, stdin=subprocess.DEVNULL))


def child_command(arguments: list[str]) -> list[str]:
    """The command of another rank, which finds modules where this process does."""
    from_here = sys.path[0] in ("", str(Path.cwd()))  # as `python -m` does; the console script does not
    return [
        sys.executable,
        *([] if from_here else ["-P"]),
        "-m",
        "qlora_lightning.cli",
        *arguments,
        *(["--debug"] if "--debug" in sys.argv else []),
    ]


def use_launcher(trainer: Trainer, arguments: list[str], mine: dict[str, str]) -> None:
    """Have ``trainer`` launch with ``RankLauncher``."""
    strategy: Any = trainer.strategy
    strategy._launcher = RankLauncher(strategy.cluster_environment, trainer.num_devices, trainer.num_nodes, arguments, mine)
