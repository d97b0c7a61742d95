"""How fast is `fit` at given points, and in how much memory? Many fits in one process, so that a base is read and quantised once.

    python benchmarks/random_llama.py 7b /tmp/7b
    python benchmarks/points.py /tmp/7b --points 16x512-8gib,4x2048-keep --repeat 2
    python benchmarks/points.py /tmp/65b --points 1x512:checkpointing=auto:budget=44 --cap-gib 46 --steps 20

Each fit is the command's own code with its own options: data, callbacks, paged optimizer, clipping. Only what loads the base is replaced:
it hands out the same one, without the last adapter. A point is a name of POINTS, or ROWSxLENGTH with fields (`8x1024:dropout=0.1:rank=16`).
A microbatch is a step; its rows are random letters of exactly the given length, all supervised.

Columns: median tokens/s over the steps after the warm-up, from metrics.csv; peaks of torch's allocator, GiB, over the whole fit (the base
is there already); all memory of the device that is taken after the last step, GiB (allocator, CUDA context, paged state that lies there);
seconds from the command to the end of the first step, without loading the base; loss of the first step.

`peer_points.py` prints the same columns for a peer; a shell loop lets the two take turns:

    for turn in 1 2 3; do python benchmarks/points.py ... ; python benchmarks/peer_points.py ... ; done
"""

import argparse
import csv
import gc
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fit_loop import write_rows
from random_llama import share_layers

GIB = 2**30
COLUMNS = ("who", "point", "tokens/s", "allocated", "reserved", "device", "first step, s", "first loss")


@dataclass(frozen=True)
class Point:
    """One setting of a step."""

    rows: int
    length: int
    checkpointing: str = "full"
    """none, full or auto."""
    budget: float | None = None
    """GiB that ``auto`` may use."""
    dropout: float = 0.0
    rank: int = 64
    compute: str = "auto"


POINTS = {
    "16x512-8gib": Point(16, 512, "auto", 8.0),
    "4x2048-8gib-dropout": Point(4, 2048, "auto", 8.0, dropout=0.1),
    "4x2048-keep": Point(4, 2048, "none"),
    "8x2048-keep": Point(8, 2048, "none"),
    "16x512-keep-dropout": Point(16, 512, "none", dropout=0.1),
    "1x2048-12gib": Point(1, 2048, "auto", 12.0),
    "1x512-8gib": Point(1, 512, "auto", 8.0),
    "8x2048-keep-fp8": Point(8, 2048, "none", compute="fp8"),
    "4x2048-full": Point(4, 2048, "full"),
    "16x512-full": Point(16, 512, "full"),
}
"""Named points: the targets of speed and memory, and full checkpointing beside them."""


def parse_points(names: str) -> dict[str, Point]:
    """Points by name, in the order of a list with commas."""
    return {name: POINTS.get(name) or _parse_point(name) for name in names.split(",")}


def _parse_point(text: str) -> Point:
    size, *settings = text.split(":")
    rows, length = map(int, size.split("x"))
    point = Point(rows, length)
    kinds = {field.name: type(getattr(point, field.name)) for field in fields(Point)} | {"budget": float}
    given = dict(setting.split("=") for setting in settings)
    return replace(point, **{name: kinds[name](value) for name, value in given.items()})


def point_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that ours and a peer's points share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="checkpoint folder of random_llama.py")
    parser.add_argument("--points", type=parse_points, default=",".join(list(POINTS)[:7]), metavar="NAME,...")
    parser.add_argument("--repeat", type=int, default=1, help="times that the list of points is gone through")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8, help="measured, after the warm-up")
    parser.add_argument("--cap-gib", type=float, help="most that torch's allocator may reserve")
    return parser


def print_line(cells: Sequence[object]) -> None:
    """A line of the table, at once."""
    print("| " + " | ".join(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |", flush=True)


def print_header() -> None:
    """The table's head."""
    print_line(COLUMNS)
    print_line(["---"] * len(COLUMNS))


def cap_memory(gib: float | None) -> None:
    """Let torch's allocator reserve no more than this."""
    import torch

    if gib is not None:
        torch.cuda.set_per_process_memory_fraction(gib * GIB / torch.cuda.get_device_properties(0).total_memory)


def reset_memory() -> None:
    """Give back what nobody holds, and begin to watch for peaks."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory_columns() -> list[float]:
    """Peaks allocated and reserved, and what of the device is taken now, in GiB."""
    import torch

    if not torch.cuda.is_available():
        return [0.0, 0.0, 0.0]
    free, total = torch.cuda.mem_get_info()
    return [number / GIB for number in (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), total - free)]


@contextmanager
def host_memory() -> Iterator[list[float]]:
    """A list whose only entry is, at the end, the peak of this process's own memory in GiB: files that it maps do not count."""
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
            peak[0] = max(peak[0], int(line.split()[1]) * 1024 / GIB)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield peak
    done.set()
    thread.join()


class SharedBase:
    """Loads a base once and takes the adapter off between fits."""

    def __init__(self) -> None:
        from qlora_lightning import module

        self._load, self._attach = module.load_base_model, module.attach_lora
        module.load_base_model, module.attach_lora = self.load, self.attach
        self._base: Any = None
        self._adapted: Any = None

    def load(self, *arguments: Any, **options: Any) -> Any:
        """The base without an adapter."""
        if self._base is None:
            self._base = self._load(*arguments, **options)
        self.release()
        return self._base

    def attach(self, *arguments: Any, **options: Any) -> Any:
        """An adapter, remembered to be taken off."""
        self._adapted = self._attach(*arguments, **options)
        return self._adapted

    def release(self) -> None:
        """Take the adapter off, and the hooks that were set for it."""
        if self._adapted is not None:
            self._base, self._adapted = self._adapted.unload(), None
            for module in self._base.modules():
                module._forward_hooks.clear()


def forget_modules() -> None:
    """Empty the modules of earlier fits: the command line's parser remembers the last one, with its adapter and its graphs."""
    from qlora_lightning.module import QLoRAModule

    for module in [one for one in gc.get_objects() if type(one) is QLoRAModule]:
        vars(module).clear()


class Steps:
    """When the steps of a fit ended, and the memory taken after the last one."""

    def __init__(self) -> None:
        from qlora_lightning.callbacks.monitor import Monitor

        self.ends: list[float] = []
        self.memory: list[float] = []
        original = Monitor.on_train_batch_end

        def on_train_batch_end(monitor: Any, trainer: Any, *arguments: Any) -> None:
            original(monitor, trainer, *arguments)
            self.ends.append(time.perf_counter())
            if trainer.global_step == trainer.max_steps:
                self.memory = memory_columns()

        Monitor.on_train_batch_end = on_train_batch_end


def fit_arguments(base: str, point: Point, rows: Path, folder: Path, steps: int, options: Sequence[str]) -> list[str]:
    """The command of a point."""
    settings: dict[str, Any] = {
        "model.base_model": base,
        "model.lora.r": point.rank,
        "model.lora.dropout": point.dropout,
        "model.compute": point.compute,
        "data.dataset.path": rows,
        "data.dataset.template": "plain",
        "data.dataset.train_on_source": "true",
        "data.global_batch_size": point.rows,
        "trainer.strategy.gradient_checkpointing": point.checkpointing,
        "trainer.max_steps": steps,
        "trainer.num_sanity_val_steps": 0,
        "trainer.default_root_dir": folder,
        "trainer.logger": "false",
        "checkpoint.every_n_steps": 100000,
        "checkpoint.keep": 0,
        "overwrite": "true",
    }
    if point.budget is not None:
        settings["trainer.strategy.memory_budget_gib"] = point.budget
    settings |= dict(option.split("=", 1) for option in options)
    return ["fit", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]


@contextmanager
def said_to(file: Path) -> Iterator[None]:
    """What is printed goes into ``file``."""
    with file.open("w") as log, redirect_stdout(log), redirect_stderr(log):
        yield


def run_point(base: SharedBase, steps: Steps, name: str, point: Point, arguments: argparse.Namespace) -> list[object]:
    """Run a fit; the cells of its line."""
    from qlora_lightning.cli import main as command

    count, folder = arguments.warmup + arguments.steps, arguments.folder / "run"
    rows, log = arguments.folder / f"rows-{point.rows}x{point.length}.jsonl", arguments.folder / f"{name.replace(':', '-')}.log"
    write_rows(rows, point.rows * count, point.length)
    base.release()
    forget_modules()
    reset_memory()
    steps.ends, steps.memory = [], []
    began = time.perf_counter()
    try:
        with said_to(log):
            code = command(fit_arguments(arguments.base, point, rows, folder, count, arguments.options))
    except Exception as error:  # a point that fails must not take the others with it
        return [f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"]
    if code:
        return [f"failed: {log.read_text().strip().splitlines()[-1]}"]
    with (folder / "metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row["train/tokens_per_second"]]
    speed = statistics.median(float(row["train/tokens_per_second"]) for row in logged[arguments.warmup :])
    return [f"{speed:,.0f}", *steps.memory, steps.ends[0] - began, float(logged[0]["train/loss"])]


def main() -> None:
    parser = point_parser(__doc__)
    parser.add_argument("--options", nargs="*", default=[], metavar="NAME=VALUE", help="more options of `fit`, for all points")
    parser.add_argument("--who", default="qlora-lightning", help="what the first column says")
    parser.add_argument("--folder", type=Path, default=Path("runs/points"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    import torch

    from qlora_lightning.modeling.loading import QuantizationSpec, compute_dtype

    cap_memory(arguments.cap_gib)
    share_layers(Path(arguments.base))
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    base, steps, began = SharedBase(), Steps(), time.perf_counter()
    with said_to(arguments.folder / "loading.log"), host_memory() as host:
        base.load(arguments.base, QuantizationSpec(), compute_dtype("auto", device), device)
    seconds, (allocated, reserved, _) = time.perf_counter() - began, memory_columns()
    print(
        f"base loaded in {seconds:.1f} s, peak GiB: {allocated:.2f} allocated, {reserved:.2f} reserved, {host[0]:.2f} of the host's memory"
    )
    print_header()
    for _ in range(arguments.repeat):
        for name, point in arguments.points.items():
            print_line([arguments.who, name, *run_point(base, steps, name, point, arguments)])


if __name__ == "__main__":
    main()
