"""Does a fit that is killed again and again end as the one that was left alone? Kill, go on with ``--ckpt_path last``, compare every bit.

    python benchmarks/kills.py --kills 200
    python benchmarks/kills.py --kills 20 --gpu
    python benchmarks/kills.py --kills 20 --gpu --seed 1 -- --config quickstart --trainer.logger false --checkpoint.every_n_steps 2

What stands behind ``--`` are options of ``fit``; without them a tiny random model trains for 12 steps. One run is left alone. Others are
killed by SIGKILL, up to ``--each`` times, and each time started again with the same command. Half of the kills fall at a random moment
(uniform in the time that the undisturbed run takes), half right before a random file operation in the run folder (fsync, rename, link,
unlink, ...), which this script counts while a fit runs. After every kill whatever checkpoint is there must be whole. In the end metrics
(all but speed and memory), samples, every checkpoint and every adapter must equal those of the undisturbed run, and no other file may be
there.

On a CPU each start is forked from this process, which has imported everything; with ``--gpu`` it is a process of its own, on the GPU.
"""

import argparse
import json
import mmap
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from run_difference import broken_checkpoints, differences

PHASES = ("loading", "step", "validation", "save", "ending")
LOADING, STEP, VALIDATION, SAVE, ENDING = range(len(PHASES))
OPERATIONS = ("fsync", "rename", "replace", "link", "unlink", "rmdir", "mkdir")
RECIPE = {
    "model.lora.r": 4,
    "model.lora.dropout": 0.1,
    "model.compute": "fp32",
    "model.optimizer.learning_rate": 0.01,
    "model.optimizer.schedule": "cosine",
    "data.dataset.template": "alpaca",
    "data.dataset.validation_size": 6,
    "data.global_batch_size": 4,
    "trainer.accumulate_grad_batches": 2,
    "trainer.max_epochs": 2,
    "trainer.logger": "false",
    "validation.every_n_steps": 3,
    "checkpoint.every_n_steps": 2,
    "samples.count": 2,
    "samples.max_new_tokens": 4,
    "samples.every_n_steps": 5,
}


class Beacon:
    """Where a fit is, and how many file operations it has done, readable after its death: a file that both processes map."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            path.write_bytes(bytes(16))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 16)

    def read(self) -> tuple[int, int]:
        """Phase and count."""
        phase, count = struct.unpack("qq", self._memory[:])
        return phase, count

    def write(self, phase: int, count: int) -> None:
        self._memory[:] = struct.pack("qq", phase, count)


def watch(beacon: Beacon, root: Path, kill_at: int) -> None:
    """Let this process keep the beacon while it fits, and die right before file operation ``kill_at`` (from 1; 0: never)."""
    from lightning.pytorch.loops import _EvaluationLoop
    from lightning.pytorch.loops.fit_loop import _FitLoop

    from qlora_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint

    beacon.write(LOADING, 0)
    marked = ((_FitLoop, "advance", STEP), (_FitLoop, "on_run_end", ENDING), (_EvaluationLoop, "run", VALIDATION))
    for owner, name, phase in (*marked, (AdapterCheckpoint, "_save", SAVE)):
        setattr(owner, name, _during(getattr(owner, name), phase, beacon))
    for name in OPERATIONS:
        setattr(os, name, _counted(getattr(os, name), beacon, str(root), kill_at))


def _during(function: Callable[..., Any], phase: int, beacon: Beacon) -> Callable[..., Any]:
    def marked(*arguments: Any, **options: Any) -> Any:
        before = beacon.read()[0]
        beacon.write(phase, beacon.read()[1])
        result = function(*arguments, **options)
        beacon.write(ENDING if phase == ENDING else before, beacon.read()[1])
        return result

    return marked


def _counted(function: Callable[..., Any], beacon: Beacon, root: str, kill_at: int) -> Callable[..., Any]:
    def counted(*arguments: Any, **options: Any) -> Any:
        of_the_run = isinstance(arguments[0], int) or "dir_fd" in options or os.fspath(arguments[0]).startswith(root)
        if of_the_run:
            phase, count = beacon.read()
            beacon.write(phase, count + 1)
            if count + 1 == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    return counted


class Starter:
    """Starts fits in folders of ``work``, forked from this process or as processes of their own."""

    def __init__(self, work: Path, options: list[str], gpu: bool) -> None:
        self.work, self.options, self.gpu = work, options, gpu
        self._beacon_file = work / "beacon"
        self.beacon = Beacon(self._beacon_file)
        self._durations: deque[float] = deque(maxlen=5)

    @property
    def seconds(self) -> float:
        """How long a fit takes: the longest of the last that were left to end, as a shared machine has its moods."""
        return max(self._durations)

    def start(self, name: str, kill_at: int = 0, kill_after: float | None = None) -> int | None:
        """Fit in ``work/name`` to its end, or to its kill after so many seconds or at that file operation. Exit code, None if killed."""
        root = self.work / name
        command = ["fit", *self.options, "--trainer.default_root_dir", str(root), "--ckpt_path", "last"]
        self.beacon.write(LOADING, 0)
        log = self.work / f"{name}.log"
        process = self._spawn(command, root, kill_at, log) if self.gpu else self._fork(command, root, kill_at, log)
        began = time.monotonic()
        give_up = began + (kill_after or 1e9)
        while True:
            pid, status = os.waitpid(process, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                if code == -signal.SIGKILL:
                    return None
                self._durations.append(time.monotonic() - began)
                return code
            if time.monotonic() > give_up:
                os.kill(process, signal.SIGKILL)
                give_up = float("inf")
            time.sleep(0.002)

    def _fork(self, command: list[str], root: Path, kill_at: int, log: Path) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            with log.open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            code = fit(command, self.beacon, root, kill_at)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _spawn(self, command: list[str], root: Path, kill_at: int, log: Path) -> int:
        own = [sys.executable, __file__, "--child", str(self._beacon_file), str(root), str(kill_at), "--", *command]
        with log.open("a") as file:
            return subprocess.Popen(own, stdout=file, stderr=file).pid


def fit(command: list[str], beacon: Beacon, root: Path, kill_at: int) -> int:
    """Run the command line in this process, watched."""
    from qlora_lightning.cli import main

    watch(beacon, root, kill_at)
    return main(command)


def write_example(folder: Path, gpu: bool) -> list[str]:
    """Options of a fit of a tiny random LLaMA on generated rows, which this writes; in bf16 on a GPU, for the fused path."""
    from random_llama import write_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    base, rows = folder / "base", folder / "rows.jsonl"
    if not (pid := os.fork()):  # torch's threads must not begin in the process that forks the fits
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=512, max_position_embeddings=512, bos_token_id=1, eos_token_id=2))
        model.save_pretrained(base)
        write_tokenizer(512, base)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    lines = [{"instruction": f"Say {'very ' * (n % 5)}{n}.", "output": f"{'so ' * (n * 7 % 11)}{n}"} for n in range(27)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    device = {"trainer.accelerator": "gpu", "model.compute": "bf16"} if gpu else {"trainer.accelerator": "cpu"}
    options = RECIPE | {"model.base_model": base, "data.dataset.path": rows} | device
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


class Tally:
    """What was killed where, and what came of it."""

    def __init__(self) -> None:
        self.fell: Counter[tuple[str, str]] = Counter()
        self.faults: list[str] = []
        self.lost = self.different = self.runs = 0

    @property
    def kills(self) -> int:
        return sum(self.fell.values())

    def table(self) -> str:
        """Markdown: kills by phase and kind."""
        lines = ["| killed in | at a random moment | before a file operation |", "|---|---|---|"]
        for phase in PHASES:
            lines.append(f"| {phase} | {self.fell[phase, 'time']} | {self.fell[phase, 'operation']} |")
        total = f"{self.kills} kills in {self.runs} runs: {self.lost} lost, {self.different} different"
        return "\n".join([*lines, "", total, *self.faults])


def kill_and_compare(starter: Starter, name: str, times: int, operations: int, chance: random.Random, tally: Tally) -> None:
    """One run, killed at most ``times`` times, then left to end, then compared with the undisturbed one."""
    root = starter.work / name
    code: int | None = None
    for _ in range(times):
        kind = chance.choice(("time", "operation"))
        moment = {"kill_after": chance.uniform(0, starter.seconds)} if kind == "time" else {"kill_at": chance.randint(1, operations)}
        code = starter.start(name, **moment)  # type: ignore[arg-type]
        if code is not None:
            break
        tally.fell[PHASES[starter.beacon.read()[0]], kind] += 1
        if broken := broken_checkpoints(root):
            tally.lost += 1
            tally.faults.append(f"{name}, killed by {moment}: {broken}")
            return
    if code is None:
        code = starter.start(name)
    tally.runs += 1
    if code:
        tally.lost += 1
        tally.faults.append(f"{name} ended with exit code {code}; see {starter.work / name}.log")
    elif found := differences(starter.work / "whole", root):
        tally.different += 1
        tally.faults.append(f"{name} differs: {'; '.join(found[:5])}")
    else:
        shutil.rmtree(root)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--each", type=int, default=5, help="the most kills of one run")
    parser.add_argument("--gpu", action="store_true", help="start processes instead of forking this one")
    parser.add_argument("--work", type=Path, default=Path("runs/kills"), help="folder of all runs; deleted first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("options", nargs="*", help="options of fit, behind --")
    given = parser.parse_args()
    shutil.rmtree(given.work, ignore_errors=True)
    given.work.mkdir(parents=True)
    if not given.gpu:
        import qlora_lightning.lightning_cli  # noqa: F401  (forked fits have it then)
    starter = Starter(given.work.resolve(), given.options or write_example(given.work.resolve(), given.gpu), given.gpu)
    for name in ("warm-up", "whole"):  # the first prepares the data
        if starter.start(name):
            sys.exit((starter.work / f"{name}.log").read_text())
    began, operations = time.monotonic(), starter.beacon.read()[1]
    print(f"undisturbed: {starter.seconds:.1f} s, {operations} file operations", file=sys.stderr)
    if found := differences(starter.work / "warm-up", starter.work / "whole"):
        sys.exit(f"two runs that were left alone differ: {found}")
    chance, tally = random.Random(given.seed), Tally()
    while tally.kills < given.kills:
        times = min(chance.randint(1, given.each), given.kills - tally.kills)
        kill_and_compare(starter, f"run-{tally.runs + tally.lost:04d}", times, operations, chance, tally)
        rate = tally.kills / (time.monotonic() - began)
        left = (given.kills - tally.kills) / rate if rate else float("nan")
        print(f"{tally.kills} kills, {tally.lost} lost, {tally.different} different, {left:.0f} s left", file=sys.stderr)
    print(tally.table())
    return 1 if tally.lost or tally.different else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        file, folder, number, _, *command = sys.argv[2:]
        sys.exit(fit(command, Beacon(Path(file)), Path(folder), int(number)))
    sys.exit(main())
