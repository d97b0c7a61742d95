"""Where metrics go: a CSV file that survives a resume, and Weights & Biases, which may never break, block or prompt in a run."""

from qlora_lightning.loggers.csv_rows import RunCSVLogger
from qlora_lightning.loggers.wandb_run import RunWandbLogger

__all__ = ["RunCSVLogger", "RunWandbLogger"]
