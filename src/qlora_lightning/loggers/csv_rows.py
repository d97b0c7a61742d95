"""Metrics as a CSV file that survives a resume: Lightning's own logger deletes an existing ``metrics.csv``."""

import csv
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor


class RunCSVLogger(Logger):
    """One row a logging call in ``<save_dir>/metrics.csv``, written at once; an existing file is continued, not deleted.

    Args:
        save_dir: Folder of the run. The file lies directly in it, without a version folder.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self._save_dir = save_dir
        self._columns: list[str] | None = None
        self._rows: int | None = None

    @property
    def save_dir(self) -> str:
        """Folder of the run."""
        return self._save_dir

    @property
    def name(self) -> str:
        """Empty, as is the version: the run folder names the run, and a resumed run is the same one."""
        return ""

    version = name

    @property
    def path(self) -> Path:
        """The file of metrics."""
        return Path(self._save_dir) / "metrics.csv"

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the command line writes the whole configuration to ``config.yaml``; a second, partial copy would only differ."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append one row. ``step`` is the optimizer step, counted from 0; a name not seen before adds a column."""
        numbers = {name: str(value.item() if isinstance(value, Tensor) else value) for name, value in metrics.items()}
        row = {"step": "" if step is None else str(step), **numbers}
        columns, count = self._read_columns(), self.rows
        new = [name for name in row if name not in columns]
        if new:
            self._columns = [*columns, *new]
            self._rewrite(self.read_rows())
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._read_columns(), lineterminator="\n").writerow(row)
        self._rows = count + 1

    @property
    def rows(self) -> int:
        """How many rows the file has."""
        if self._rows is None:
            self._read_columns()
            self._rows = len(self.read_rows())
        return self._rows

    @rank_zero_only
    def cut(self, rows: int) -> None:
        """Keep the first ``rows`` rows: a run that goes on from a checkpoint logs those anew that came after it."""
        if self.rows > rows:
            self._rewrite(self.read_rows()[:rows])

    def _read_columns(self) -> list[str]:
        """Header of the file, read once; the first call makes the folder and drops a line that a kill cut short."""
        if self._columns is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                self._draft().write_text(whole, encoding="utf-8")
                self._draft().replace(self.path)
            self._columns = next(csv.reader(whole.splitlines()[:1]), [])
        return self._columns

    def read_rows(self) -> list[dict[str, str]]:
        """All rows as they are written: name -> text, empty where a row has no such value."""
        if not self.path.is_file():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        """Header and ``rows`` in place of the old file."""
        draft = self._draft()
        with draft.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._read_columns(), restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        draft.replace(self.path)
        self._rows = len(rows)

    def _draft(self) -> Path:
        """A file beside the real one, put in its place whole, so that a kill never leaves half a history."""
        return self.path.with_suffix(".csv.tmp")
