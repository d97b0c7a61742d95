"""What ends a run from outside: it says how to go on, and its exit code tells a scheduler that it did not succeed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from running import base_options


@pytest.mark.parametrize("number, code, words", [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "Stopped by SIGTERM")])
def test_signal_ends_a_fit_with_the_way_on(
    tiny_base: Path, rows_file: Path, tmp_path: Path, number: signal.Signals, code: int, words: str
) -> None:
    """SIGTERM is heeded between batches, so the last step is saved; after Ctrl-C the last regular checkpoint stands."""
    root = tmp_path / "run"
    options = [*base_options(tiny_base, rows_file, root), "--trainer.max_epochs", "100000", "--checkpoint.every_n_steps", "5"]
    command = [sys.executable, "-m", "qlora_lightning.cli", "fit", *options]
    log = (tmp_path / "log").open("w")
    # a shell that starts jobs in the background has them ignore SIGINT
    restore = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    process = subprocess.Popen(command, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}, preexec_fn=restore)
    give_up = time.monotonic() + 120
    while not (root / "checkpoints" / "last.ckpt").is_file() and time.monotonic() < give_up:
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(timeout=60) == code
    said = (tmp_path / "log").read_text()
    assert words in said.splitlines()[-1] and "--ckpt_path last" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] >= 5
