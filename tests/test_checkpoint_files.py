"""What can happen to a run's files: damage, a full disk, a kill between two renames, a second fit in the same folder."""

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from running import base_options, line_of, read_metrics
from safetensors.torch import load_file

from qlora_lightning import disk
from qlora_lightning.callbacks.adapter_checkpoint import put_right
from qlora_lightning.cli import main
from qlora_lightning.disk import disk_trouble, replace_folder
from qlora_lightning.run_lock import RunLock

KEPT = ("--checkpoint.every_n_steps", "1", "--checkpoint.keep", "3")


@pytest.fixture(scope="module")
def ended(tiny_base: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, each of them kept; no test changes it."""
    root = tmp_path_factory.mktemp("files") / "run"
    assert main(["fit", *base_options(tiny_base, rows_file, root), *KEPT, "--trainer.max_steps", "3"]) == 0
    return root


@pytest.fixture
def run(ended: Path, tmp_path: Path) -> Path:
    """A copy of that run to spoil, in which ``last`` and ``step-00000003`` are one file again."""
    root = Path(shutil.copytree(ended, tmp_path / "run"))
    last = root / "checkpoints" / "last.ckpt"
    last.unlink()
    last.hardlink_to(last.with_stem("step-00000003"))
    return root


@pytest.fixture
def go_on(run: Path, tiny_base: Path, rows_file: Path) -> list[str]:
    """The command that takes the run to its fourth step."""
    return ["fit", *base_options(tiny_base, rows_file, run), *KEPT, "--trainer.max_steps", "4"]


def flip_a_bit(content: bytes) -> bytes:
    """In the middle of the largest thing that a checkpoint holds."""
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "bit": flip_a_bit,
    "zeros at the end": lambda content: content[:-4096] + bytes(4096),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_offered(
    run: Path, go_on: list[str], damage: Callable[[bytes], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the file of the same step, which is the same one. The offer works as it stands."""
    last = run / "checkpoints" / "last.ckpt"
    last.write_bytes(damage(last.read_bytes()))
    line = line_of(capsys, *go_on, "--ckpt_path", "last")
    offered = last.with_stem("step-00000002")
    expected = rf"checkpoint {last} is damaged \(.+\); the furthest whole one is of step 2: go on with --ckpt_path {offered}"
    assert re.fullmatch(expected, line)
    assert main([*go_on, "--ckpt_path", str(offered)]) == 0
    assert [row["step"] for row in read_metrics(run)] == ["0", "1", "2", "3"]


def test_without_a_whole_checkpoint_there_is_none_to_offer(run: Path, go_on: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for file in (run / "checkpoints").glob("*.ckpt"):
        file.write_bytes(b"")
    assert "; no other in its folder is whole; begin anew with --overwrite" in line_of(capsys, *go_on, "--ckpt_path", "last")


def test_a_bit_of_an_adapter(run: Path, go_on: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    adapter = run / "checkpoints" / "last"
    file = adapter / "adapter_model.safetensors"
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(flip_a_bit(content))
    load_file(file)  # its format does not notice
    line = line_of(capsys, *go_on, "--trainer.default_root_dir", str(run.with_name("new")), "--ckpt_path", str(adapter))
    assert line == f"{file} is not what was written (its SHA-256 differs); copy the adapter again or give another"


def test_last_that_is_missing_is_the_furthest_of_the_others(run: Path, go_on: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """As after a kill in the very first save; beginning at the beginning would delete what is there."""
    (run / "checkpoints" / "last.ckpt").unlink()
    assert main([*go_on, "--ckpt_path", "last"]) == 0
    assert f"going on from {run}/checkpoints/step-00000003.ckpt, of step 3" in capsys.readouterr().err.replace("\n", " ")


# ---- a disk that takes no more ----


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """The system refuses every write behind the first ``size`` bytes of a file, in the middle of it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(root: Path) -> dict[str, bytes]:
    """Name and content of all files of checkpoints."""
    return {str(path.relative_to(root)): path.read_bytes() for path in (root / "checkpoints").rglob("*") if path.is_file()}


def expect_the_line_and_nothing_lost(run: Path, go_on: list[str], before: dict[str, bytes], reason: str, line: str) -> None:
    last = run / "checkpoints" / "last.ckpt"
    start = f"the checkpoint of step 4 cannot be written to {last.parent} ({reason}; "
    assert line.startswith(start) and f"GiB free there); {last} of step 3 is whole; make room" in line
    assert contents(run) == before
    assert main([*go_on, "--ckpt_path", "last"]) == 0
    assert [row["step"] for row in read_metrics(run)] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("full_at", ["last.ckpt", "last/adapter_model.safetensors", "last/tokenizer.json"])
def test_a_disk_that_is_full_in_the_middle_of_a_file(run: Path, go_on: list[str], full_at: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Torch, safetensors and tokenizers each say it in their own way."""
    before = contents(run)
    with files_no_larger_than((run / "checkpoints" / full_at).stat().st_size - 1):
        line = line_of(capsys, *go_on, "--ckpt_path", "last")
    expect_the_line_and_nothing_lost(run, go_on, before, "File too large", line)


def test_a_disk_that_is_found_full_when_it_is_flushed(
    run: Path, go_on: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some file systems take what they are given and refuse it later."""

    def full(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").readlink().name == "step-00000004.ckpt.partial":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = contents(run)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        line = line_of(capsys, *go_on, "--ckpt_path", "last")
    expect_the_line_and_nothing_lost(run, go_on, before, "No space left on device", line)


def test_what_counts_as_trouble_of_a_disk() -> None:
    assert disk_trouble(OSError(errno.EROFS, os.strerror(errno.EROFS))) == "Read-only file system"
    assert disk_trouble(Exception("No space left on device (os error 28)")) == "No space left on device"
    hidden = RuntimeError("unexpected pos 704 vs 598")
    hidden.__context__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert disk_trouble(hidden) == "No space left on device"
    assert disk_trouble(ValueError("defect of ours")) is None


# ---- a kill between two renames ----


def adapter(folder: Path, step: int, whole: bool = True) -> Path:
    """A folder that passes for an adapter of ``step``."""
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_text(str(step))
    if whole:
        (folder / "qlora_lightning.json").write_text(json.dumps({"step": step}))
    return folder


def test_an_adapter_whose_checkpoint_is_there_takes_its_place(run: Path) -> None:
    """Killed between the checkpoint's name and the folder's: both moments of it, with and without a folder in its place."""
    folder = run / "checkpoints"
    for name in ("step-00000002", "step-00000003"):
        shutil.rmtree(folder / name)
    adapter(folder / "step-00000002", step=1)
    for step in (2, 3):
        adapter(folder / f"step-0000000{step}.next", step)
    put_right(folder)
    for step in (2, 3):
        assert json.loads((folder / f"step-0000000{step}" / "qlora_lightning.json").read_text()) == {"step": step}
    assert not list(folder.glob("*.next"))


def test_an_adapter_whose_checkpoint_never_came_is_dropped(run: Path) -> None:
    folder = run / "checkpoints"
    before = contents(run)
    adapter(folder / "last.next", step=4)
    adapter(folder / "step-00000003.next", step=3, whole=False)
    adapter(folder / "step-00000004.next", step=4)
    adapter(folder / "last.old", step=2)
    (folder / "step-00000004.ckpt.partial").write_bytes(b"half")
    put_right(folder)
    assert contents(run) == before


@pytest.mark.parametrize("at_once", [True, False])
def test_a_folder_takes_the_place_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool) -> None:
    """Also on a file system that cannot exchange two names."""
    if not at_once:
        monkeypatch.setattr(disk, "_exchange", lambda one, other: False)
    adapter(tmp_path / "last", 1)
    replace_folder(adapter(tmp_path / "last.next", 2), tmp_path / "last")
    assert [path.name for path in tmp_path.iterdir()] == ["last"]
    assert (tmp_path / "last" / "adapter_model.safetensors").read_text() == "2"


def test_a_run_that_began_again_keeps_its_own_steps(run: Path, go_on: list[str]) -> None:
    """Later steps are of the run that was given up at this point: they go first."""
    command = [*go_on, "--checkpoint.keep", "1", "--ckpt_path", str(run / "checkpoints" / "step-00000001.ckpt"), "--trainer.max_steps", "2"]
    assert main(command) == 0
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*")) == ["step-00000002", "step-00000002.ckpt"]


# ---- two runs, one folder ----

HOLD = """
import sys, time
from pathlib import Path
from qlora_lightning.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("options", [(), ("--ckpt_path", "last"), ("--overwrite", "true")], ids=str)
def test_a_second_fit_is_refused_before_anything_is_touched(
    run: Path, go_on: list[str], options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Until the first one is gone, however it went."""
    before = contents(run)
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None and first.stdout.readline() == "held\n"
    line = line_of(capsys, *go_on, *options)
    holder = rf"run folder {run} is in use by the fit of process {first.pid} on \S+ since 2\S+ \S+ UTC; wait for its end or stop it, .*"
    assert re.fullmatch(holder, line)
    assert contents(run) == before
    first.kill()
    first.wait()
    RunLock(run).release()
