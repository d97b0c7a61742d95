"""A run folder as data: metrics.csv, which must be whole, and what else is there, which may be missing or damaged.

Shapes: n values of a curve.
"""

import csv
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import yaml

from qlora_lightning.errors import UserError
from qlora_lightning.report.mmlu import Evaluation

METRICS_FILE, CONFIG_FILE, SAMPLES_FILE, AUDIT_FILE, MMLU_FOLDER = "metrics.csv", "config.yaml", "samples.jsonl", "audit.json", "mmlu"
ADAPTER_FILE = "checkpoints/last/qlora_lightning.json"

Values = npt.NDArray[np.float64]
Content = TypeVar("Content")


class Curve(NamedTuple):
    """One metric of a run: optimizer steps taken when a value was logged [n], rising, and the values [n]; all of them finite."""

    steps: Values
    values: Values


class Sample(NamedTuple):
    """An answer to a held-out prompt after so many optimizer steps."""

    step: int
    prompt: str
    generation: str
    reference: str


@dataclass
class Run:
    """What a run left in its folder."""

    folder: Path
    name: str
    """What the report calls it; of several runs no two have the same."""
    curves: dict[str, Curve]
    not_finite: dict[str, int]
    """Metric -> how many of its values are no finite number and so in no curve."""
    config: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    """What is recorded beside the adapter of the last checkpoint."""
    samples: list[Sample] = field(default_factory=list)
    audit: list[dict[str, Any]] = field(default_factory=list)
    """The account of each data set's rows."""
    mmlu: list[Evaluation] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Files that cannot be read, a line each."""

    @property
    def steps(self) -> int:
        """Optimizer steps that the metrics tell of."""
        return int(max((curve.steps[-1] for curve in self.curves.values()), default=0))


def read_runs(folders: Sequence[str]) -> list[Run]:
    """The runs in these folders, each with a name of its own.

    Raises:
        UserError: a folder is none of a run, or given twice, or its metrics are damaged.
    """
    if not folders:
        raise UserError("a report needs the folder of at least one run; give it, as in report runs/quickstart")
    paths = [Path(folder) for folder in folders]
    seen: dict[Path, Path] = {}
    for path in paths:
        if (other := seen.setdefault(path.resolve(), path)) is not path:
            raise UserError(f"each run is reported once, and {path} is the same folder as {other}; leave one out")
    return [read_run(path, name) for path, name in zip(paths, distinct_names([path.resolve() for path in paths]), strict=True)]


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of these paths that differ: ``run``, or ``a/run`` and ``b/run``."""
    depths = [1] * len(paths)
    while True:
        names = ["/".join(path.parts[-depth:]) for path, depth in zip(paths, depths, strict=True)]
        if len({*names}) == len(names):
            return names
        depths = [depth + (names.count(name) > 1) for name, depth in zip(names, depths, strict=True)]


def read_run(folder: Path, name: str) -> Run:
    """Everything in a run folder.

    Raises:
        UserError: this is no run folder, or its metrics are damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a run folder: there is no such folder; give one that fit wrote, as in runs/quickstart")
    file = folder / METRICS_FILE
    if not file.is_file():
        raise UserError(f"{folder} is not a run folder: it has no {METRICS_FILE}; give a folder that fit wrote, as in runs/quickstart")
    curves, not_finite = read_metrics(file)
    run = Run(folder, name, curves, not_finite)
    run.config = _read(run, CONFIG_FILE, _mapping_of_yaml, {})
    run.adapter = _read(run, ADAPTER_FILE, _mapping_of_json, {})
    run.samples = _read(run, SAMPLES_FILE, _samples, [])
    run.audit = _read(run, AUDIT_FILE, _audit, [])
    files = sorted(path.relative_to(folder).as_posix() for path in (folder / MMLU_FOLDER).glob("*.json"))
    found = (_read(run, path, lambda text: Evaluation.of(_mapping_of_json(text)), None) for path in files)
    run.mmlu = [evaluation for evaluation in found if evaluation is not None]
    return run


def _read(run: Run, path: str, understand: Callable[[str], Content], missing: Content) -> Content:
    """The content of a file that may be missing. One that is damaged is as good as missing, and said to be so."""
    file = run.folder / path
    if not file.is_file():
        return missing
    try:
        return understand(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        run.problems.append(f"{file} is left out: {reason[:160]}")
        return missing


# ---- metrics.csv ----


def read_metrics(file: Path) -> tuple[dict[str, Curve], dict[str, int]]:
    """The curves of a metrics.csv, and how many values of each metric are no finite number.

    The logger counts steps from 0: a row of step s is written when s + 1 steps are taken. Rows above the first of the training are of the
    untrained model. A last line that a kill cut short is left out.

    Raises:
        UserError: a line is damaged, or there is none yet.
    """
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    trained = False
    for step, row in _rows(file):
        trained = trained or "train/loss" in row
        for name, value in row.items():
            points[name].append((step + 1 if trained else step, value))
    if not points:
        raise UserError(f"{file} holds no value yet; wait for the run's first step, or leave the run out")
    arrays = {name: np.array(sorted(pairs, key=lambda pair: pair[0])) for name, pairs in points.items()}
    finite = {name: np.isfinite(array[:, 1]) for name, array in arrays.items()}
    curves = {name: Curve(array[finite[name], 0], array[finite[name], 1]) for name, array in arrays.items() if finite[name].any()}
    return curves, {name: int((~kept).sum()) for name, kept in finite.items() if not kept.all()}


def _rows(file: Path) -> Iterable[tuple[int, dict[str, float]]]:
    """Step and filled cells of each line that has a step."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}); leave the run out, or bring the file back") from error
    lines = csv.reader(StringIO(text[: text.rfind("\n") + 1], newline=""))
    names = next(lines, [])
    for cells in lines:
        where = f"{file}:{lines.line_num}"
        if len(cells) != len(names):
            raise UserError(
                f"{where}: a line has a cell for each of the {len(names)} columns, this one has {len(cells)}; mend or delete it"
            )
        row = {name: _number(cell, name, where) for name, cell in zip(names, cells, strict=True) if cell}
        step = row.pop("step", None)
        if step is not None:
            yield int(step), row


def _number(cell: str, name: str, where: str) -> float:
    try:
        return int(cell) if name == "step" else float(cell)
    except ValueError as error:
        raise UserError(f"{where}: {name} is a number, found {cell[:40]!r}; mend or delete the line") from error


# ---- the other files ----


def _mapping(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"it holds no object, but {type(content).__name__}")
    return content


def _mapping_of_yaml(text: str) -> dict[str, Any]:
    return _mapping(yaml.safe_load(text))


def _mapping_of_json(text: str) -> dict[str, Any]:
    return _mapping(json.loads(text))


def _samples(text: str) -> list[Sample]:
    rows = [_mapping_of_json(line) for line in text.split("\n")[:-1]]
    return [Sample(int(row["step"]), *(str(row[name]) for name in ("prompt", "generation", "reference"))) for row in rows]


def _audit(text: str) -> list[dict[str, Any]]:
    return [_mapping(one) for one in _mapping_of_json(text)["sets"]]
