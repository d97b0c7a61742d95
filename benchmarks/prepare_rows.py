"""How fast are rows tokenized, in how much memory, and how soon does a second start have them?

    python benchmarks/prepare_rows.py BASE datamodules/alpaca.yaml alpaca.json.gz --rows 240000 --processes 1 2

The rows of the file are repeated up to the number asked for. Each number of processes gets a cache of its own and a process of its own,
then a second one that finds the prepared rows. Memory is the peak of resident memory: of the main process, and of the largest worker.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

import yaml

from qlora_lightning.data.files import read_rows

GIB = 2**20  # getrusage counts KiB


def measure(base: str, dataset: Path, rows: Path, processes: int) -> None:
    """Prepare once and print what it took, as JSON."""
    from qlora_lightning.data.datamodule import InstructionDataModule
    from qlora_lightning.data.spec import DataPath, DatasetSpec

    spec = {**yaml.safe_load(dataset.read_text()), "path": DataPath(rows), "validation_hub_file": None, "validation_size": 1024}
    data = InstructionDataModule(DatasetSpec(**spec), base, num_proc=processes)
    began = time.perf_counter()
    data.setup("fit")
    seconds = time.perf_counter() - began
    mine, workers = (resource.getrusage(who).ru_maxrss / GIB for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    assert data.train_report is not None
    print(json.dumps({"seconds": seconds, "main_gib": mine, "worker_gib": workers, "tokens": data.train_report.tokens}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("dataset", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--rows", type=int, default=240_000)
    parser.add_argument("--processes", type=int, nargs="+", default=[len(os.sched_getaffinity(0))])
    parser.add_argument("--measure", action="store_true", help="prepare FILE as it is in this process and print a line")
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.base, arguments.dataset, arguments.file, arguments.processes[0])
        return
    with tempfile.TemporaryDirectory() as folder:
        repeated = Path(folder) / "rows.jsonl"
        rows = [row for _, row in read_rows(arguments.file)]
        with repeated.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in islice(cycle(rows), arguments.rows))
        print(f"{arguments.rows:,} rows, {repeated.stat().st_size / 2**20:.0f} MiB")
        for processes in arguments.processes:
            cache = {**os.environ, "QLORA_LIGHTNING_CACHE": str(Path(folder) / f"cache-{processes}")}
            command = [sys.executable, __file__, arguments.base, str(arguments.dataset), str(repeated), "--measure"]
            for start in ("first", "second"):
                output = subprocess.run([*command, "--processes", str(processes)], env=cache, check=True, capture_output=True, text=True)
                result = json.loads(output.stdout.splitlines()[-1])
                print(
                    f"{processes} processes, {start} start: {result['seconds']:.1f} s ({arguments.rows / result['seconds']:,.0f} rows/s), "
                    f"main {result['main_gib']:.2f} GiB, worker {result['worker_gib']:.2f} GiB, {result['tokens']:,} tokens",
                    flush=True,
                )


if __name__ == "__main__":
    main()
