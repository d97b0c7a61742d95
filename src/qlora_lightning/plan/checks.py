"""What cannot work, or cannot be meant, and needs no weights to be seen."""

from lightning.pytorch import Trainer

from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.modeling.positions import positions_of
from qlora_lightning.module import QLoRAModule
from qlora_lightning.plan.cost import Disk
from qlora_lightning.plan.memory import Forecast

GIB = 2**30


def problems(trainer: Trainer, module: QLoRAModule, data: InstructionDataModule, forecast: Forecast, disk: Disk) -> list[str]:
    """One line each: rule, value, way out."""
    return [*_of_lengths(data, positions_of(forecast.config)), *_of_steps(trainer, module, data), *_of_disk(disk)]


def _of_lengths(data: InstructionDataModule, positions: int | None) -> list[str]:
    if positions is None:
        return []
    limit, longest = data.spec.max_length, 0 if data.streaming else int(data.train_set.lengths.max())
    if longest > positions:
        over = int((data.train_set.lengths > positions).sum())
        found = f"{over:,} of {len(data.train_set):,} training examples are longer, the longest {longest:,} tokens"
    elif limit is not None and limit > positions:
        found = f"data.dataset.max_length is {limit:,}"
    else:
        return []
    return [f"examples must fit the base model's {positions:,} positions, but {found}; set data.dataset.max_length: {positions}"]


def _of_steps(trainer: Trainer, module: QLoRAModule, data: InstructionDataModule) -> list[str]:
    steps, warmup = data.total_steps, module.optimizer.warmup_steps
    if steps < 1:
        return ["a fit needs an end, but neither trainer.max_steps nor trainer.max_epochs is set; set one of them"]
    if warmup >= steps:
        return [
            f"model.optimizer.warmup_steps must be below the run's {steps:,} steps, got {warmup:,}: the learning rate would never reach "
            f"its peak; set it to {steps // 10} or train longer"
        ]
    return []


def _of_disk(disk: Disk) -> list[str]:
    if disk.total <= disk.free:
        return []
    return [
        f"checkpoints need {disk.total / GIB:.1f} GiB on the disk that holds {disk.folder}, which has {disk.free / GIB:.1f} GiB free; free "
        "some, lower checkpoint.keep, or set trainer.default_root_dir to another disk"
    ]
