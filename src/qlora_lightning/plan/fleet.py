"""The devices of a run, of which none need be here: how many, and how they divide the work."""

from dataclasses import dataclass
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Trainer

from qlora_lightning.strategies import QLoRADDPStrategy, QLoRAFSDP2Strategy, QLoRAStrategy

_OURS = (QLoRAStrategy, QLoRADDPStrategy, QLoRAFSDP2Strategy)


@dataclass(frozen=True)
class Fleet:
    """The devices that train together, each a rank."""

    devices: int = 1
    """Of each machine."""
    nodes: int = 1
    """Machines."""
    sharded: bool = False
    """Whether they divide the base's 4-bit weights among them (``qlora_fsdp2``); else each has all of them."""

    @property
    def ranks(self) -> int:
        """Devices of all machines."""
        return self.devices * self.nodes

    @classmethod
    def of(cls, trainer: Trainer) -> "Fleet":
        """That of a Trainer, whose devices are here."""
        nodes = trainer.num_nodes
        return cls(trainer.world_size // nodes, nodes, isinstance(trainer.strategy, QLoRAFSDP2Strategy))

    def __str__(self) -> str:
        machines = f" on each of {self.nodes} machines" if self.nodes > 1 else ""
        base = "the 4-bit base divided among them" if self.sharded else "the whole 4-bit base on each"
        return f"{self.devices} devices{machines}, {base}"


ALONE = Fleet()


def one_device_of(config: Namespace) -> Fleet:
    """The fleet that a fit's options ask for; afterwards they ask for its first device alone, which must be here.

    Args:
        config: parsed, not yet built.
    """
    trainer = config.trainer
    name = _strategy(trainer.strategy)
    devices = _devices(trainer.devices, trainer.accelerator)
    fleet = Fleet(devices, trainer.num_nodes, name == QLoRAFSDP2Strategy.strategy_name)
    if name is None or devices < 1:
        return fleet  # whoever builds it will say what is wrong
    if isinstance(trainer.strategy, Namespace):
        trainer.strategy.class_path = f"qlora_lightning.strategies.{QLoRAStrategy.__name__}"
    else:
        trainer.strategy = QLoRAStrategy.strategy_name
    trainer.devices = trainer.devices[:1] if isinstance(trainer.devices, list) else 1
    trainer.num_nodes = 1
    return fleet


def _strategy(given: Any) -> str | None:
    """The name of a strategy of ours; None for any other."""
    said = (given.class_path if isinstance(given, Namespace) else str(given)).rpartition(".")[2]
    return next((one.strategy_name for one in _OURS if said in (one.__name__, one.strategy_name)), None)


def _devices(given: Any, accelerator: Any) -> int:
    """How many ``trainer.devices`` means; 0 where that is not known."""
    if isinstance(given, list):
        return len(given)
    text = str(given)
    if text in ("auto", "-1"):
        return max(1, torch.cuda.device_count()) if str(accelerator) in ("auto", "gpu", "cuda") else 1
    if "," in text:
        return len([part for part in text.split(",") if part.strip()])
    return int(text) if text.isdigit() else 0
