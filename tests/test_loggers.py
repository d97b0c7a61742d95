"""metrics.csv over resumes and new columns; an offline W&B run read back from the file that it wrote; how the mode is decided."""

import csv
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wandb
from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made by protobuf
from wandb_server import WandbServer

from qlora_lightning.errors import UserError
from qlora_lightning.loggers import RunCSVLogger, RunWandbLogger, wandb_run
from qlora_lightning.loggers import wandb_mode as mode_module
from qlora_lightning.loggers.wandb_files import read_records
from qlora_lightning.loggers.wandb_mode import WandbMode, reachable, wandb_mode


def rows_of(logger: RunCSVLogger) -> list[dict[str, str]]:
    with logger.path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_lies_in_the_run_folder_and_is_written_at_once(tmp_path: Path) -> None:
    logger = RunCSVLogger(str(tmp_path / "runs" / "quickstart"))
    logger.log_metrics({"train/loss": torch.tensor(2.5), "epoch": 0}, step=0)
    assert logger.path == tmp_path / "runs" / "quickstart" / "metrics.csv"
    assert logger.path.read_text() == "step,train/loss,epoch\n0,2.5,0\n"


def test_csv_grows_columns(tmp_path: Path) -> None:
    logger = RunCSVLogger(str(tmp_path))
    logger.log_metrics({"train/loss": 2.5}, step=0)
    logger.log_metrics({"val/loss": 3.0}, step=0)
    logger.log_metrics({"train/loss": 2.0}, step=1)
    assert rows_of(logger) == [
        {"step": "0", "train/loss": "2.5", "val/loss": ""},
        {"step": "0", "train/loss": "", "val/loss": "3.0"},
        {"step": "1", "train/loss": "2.0", "val/loss": ""},
    ]


def test_csv_resumed_has_neither_gap_nor_double_step(tmp_path: Path) -> None:
    first = RunCSVLogger(str(tmp_path))
    for step in range(7):
        first.log_metrics({"train/loss": float(step)}, step=step)
    resumed = RunCSVLogger(str(tmp_path))
    resumed.cut(5)
    for step in range(5, 10):
        resumed.log_metrics({"train/loss": float(step), "new": 1}, step=step)
    assert [(row["step"], row["train/loss"]) for row in rows_of(resumed)] == [(str(step), str(float(step))) for step in range(10)]
    assert not list(tmp_path.glob("*.tmp"))


def test_csv_of_a_fresh_run_is_emptied(tmp_path: Path) -> None:
    RunCSVLogger(str(tmp_path)).log_metrics({"train/loss": 1.0}, step=3)
    logger = RunCSVLogger(str(tmp_path))
    logger.cut(0)
    assert rows_of(logger) == []


@pytest.mark.parametrize("cut", ["step,train/loss\n0,1.0\n1,2.", "step,train/loss\n0,1.0\n"])
def test_csv_line_that_a_kill_cut_is_dropped(tmp_path: Path, cut: str) -> None:
    (tmp_path / "metrics.csv").write_text(cut)
    logger = RunCSVLogger(str(tmp_path))
    logger.log_metrics({"train/loss": 2.0}, step=1)
    assert logger.path.read_text() == "step,train/loss\n0,1.0\n1,2.0\n"


def test_csv_header_that_a_kill_cut_is_written_anew(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,train/lo")
    logger = RunCSVLogger(str(tmp_path))
    logger.log_metrics({"train/loss": 2.0}, step=0)
    assert logger.path.read_text() == "step,train/loss\n0,2.0\n"


@pytest.fixture
def fresh_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """W&B as in a new process of a user without key and settings."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_RUN_ID", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    wandb.teardown()
    yield monkeypatch
    wandb.teardown()


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_mode_of_the_environment_wins(fresh_wandb: pytest.MonkeyPatch) -> None:
    fresh_wandb.setattr(mode_module, "wandb_logged_in", lambda: pytest.fail("asked for a key"))
    for wish, mode in (("online", "online"), ("offline", "offline"), ("disabled", "disabled"), ("dryrun", "offline")):
        fresh_wandb.setenv("WANDB_MODE", wish)
        assert wandb_mode().mode == mode


def test_unknown_mode_is_the_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "of")
    with pytest.raises(UserError, match=r"WANDB_MODE must be one of online, offline, .*, got 'of'; unset it"):
        wandb_mode()


def test_no_key_means_offline_without_a_prompt(fresh_wandb: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    fresh_wandb.setattr("builtins.input", lambda *_: pytest.fail("prompted"))
    assert wandb_mode() == WandbMode("offline", "no API key; `wandb login` stores one")
    assert capfd.readouterr() == ("", "")


def test_unreachable_host_means_offline(fresh_wandb: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    fresh_wandb.setenv("WANDB_API_KEY", "0" * 40)
    fresh_wandb.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed_port()}")
    mode = wandb_mode(seconds=1.0)
    assert mode.mode == "offline"
    assert "not reachable within 1 s" in mode.reason
    assert capfd.readouterr() == ("", "")


def test_key_and_host_mean_online(fresh_wandb: pytest.MonkeyPatch) -> None:
    fresh_wandb.setattr(mode_module, "wandb_logged_in", lambda: True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        fresh_wandb.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert wandb_mode(seconds=2.0).mode == "online"


def test_reachable_asks_the_proxy_where_one_is_set(fresh_wandb: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        fresh_wandb.setenv("http_proxy", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert reachable("http://host.invalid", seconds=2.0)
    assert not reachable("http://host.invalid", seconds=2.0)


def test_slow_name_lookup_does_not_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mode_module, "_connects", lambda address, seconds: threading.Event().wait(5))
    assert not reachable("https://host.invalid", seconds=0.1)


def history_of(records: list[Record]) -> list[dict[str, Any]]:
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]


def config_of(records: list[Record]) -> dict[str, Any]:
    updates = [record.run.config for record in records if record.WhichOneof("record_type") == "run"]
    updates += [record.config for record in records if record.WhichOneof("record_type") == "config"]
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for update in updates for item in update.update}


def offline_records(folder: Path) -> list[list[Record]]:
    """Records of each offline run, the oldest first; W&B is stopped before, as at the end of a process."""
    wandb.teardown()
    return [list(read_records(file)) for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)]


def test_offline_run_reads_back_and_a_resumed_one_continues_it(
    fresh_wandb: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    logger = RunWandbLogger(save_dir=str(folder), name="first", tags=["a"], log_adapter=True)
    logger.log_hyperparams({"model": {"base_model": "tiny"}, "lr": 2e-4})
    for step in range(1500):  # more than one block of the file
        logger.log_metrics({"train/loss": 1.0 / (step + 1), "train/grad_norm": 0.5}, step=step)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    logger.upload_adapter(adapter, {"r": 64})
    logger.finalize("success")

    captured = capfd.readouterr()
    run_folder = next(folder.glob("wandb/offline-run-*"))
    assert captured.err.strip() == f"W&B recorded offline (no API key; `wandb login` stores one); upload with: wandb sync {run_folder}"
    assert captured.out == ""
    (records,) = offline_records(folder)
    history = history_of(records)
    assert [row["trainer/global_step"] for row in history] == list(range(1500))
    assert [row["train/loss"] for row in history] == [1.0 / (step + 1) for step in range(1500)]
    assert {row["train/grad_norm"] for row in history} == {0.5}
    config = config_of(records)
    assert config["lr"] == 2e-4
    assert config["model"] == {"base_model": "tiny"}
    artifacts = [record.request.log_artifact.artifact for record in records if record.request.WhichOneof("request_type") == "log_artifact"]
    artifacts += [record.artifact for record in records if record.WhichOneof("record_type") == "artifact"]
    assert [artifact.type for artifact in artifacts] == ["model"]

    resumed = RunWandbLogger(save_dir=str(folder))
    resumed.resume = True
    resumed.log_metrics({"train/loss": 0.0}, step=1500)
    resumed.finalize("failed")
    assert logger.version == resumed.version == logger.id_path.read_text().strip()
    assert history_of(offline_records(folder)[1])[0]["trainer/global_step"] == 1500


def test_a_fresh_run_takes_a_fresh_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    logger = RunWandbLogger(save_dir=str(tmp_path))
    logger.id_path.parent.mkdir()
    logger.id_path.write_text("stored\n")
    assert logger._choose_id() != "stored"
    logger.resume = True
    assert logger._choose_id() == "stored"


def test_a_failing_wandb_leaves_one_warning_and_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = wandb.init

    def init(**options: Any) -> Any:
        if options["mode"] != "disabled":
            raise wandb.Error("no space")
        return start(**options)

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb_run, "wandb_mode", lambda: WandbMode("online", ""))
    logger = RunWandbLogger(save_dir=str(tmp_path), log_adapter=True)
    logger.log_hyperparams({"lr": 1.0})
    logger.log_metrics({"train/loss": 1.0}, step=0)
    logger.upload_adapter(tmp_path, {})
    logger.finalize("success")
    assert capsys.readouterr().err == "warning: W&B failed and the run goes on without it (Error: no space)\n"


def test_a_log_call_that_fails_ends_recording_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = RunWandbLogger(save_dir=str(tmp_path))

    def log(_: Any) -> None:
        raise BrokenPipeError("service died")

    logger._experiment = SimpleNamespace(log=log)  # type: ignore[assignment]
    logger.log_metrics({"train/loss": 1.0}, step=0)
    logger.log_metrics({"train/loss": 1.0}, step=1)
    assert capsys.readouterr().err.count("warning: W&B failed") == 1


def test_adapter_stays_here_unless_asked_for(tmp_path: Path) -> None:
    logger = RunWandbLogger(save_dir=str(tmp_path))
    logger.upload_adapter(tmp_path, {})
    assert logger._experiment is None


def test_a_log_call_that_hangs_ends_recording_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wandb_run, "CALL_SECONDS", 0.2)
    logger = RunWandbLogger(save_dir=str(tmp_path))
    logger._experiment = SimpleNamespace(log=lambda _: threading.Event().wait(20))  # type: ignore[assignment]
    began = time.monotonic()
    for step in range(3):
        logger.log_metrics({"train/loss": 1.0}, step=step)
    logger.finalize("success")
    assert time.monotonic() - began < 2
    assert capsys.readouterr().err == "warning: W&B failed and the run goes on without it (no answer within 0.2 s)\n"


def both(folder: Path, resume: bool) -> tuple[RunCSVLogger, RunWandbLogger]:
    """The loggers of one start of a run."""
    rows, run = RunCSVLogger(str(folder)), RunWandbLogger(save_dir=str(folder))
    run.resume, run.history = resume, rows
    return rows, run


def log_steps(loggers: tuple[RunCSVLogger, RunWandbLogger], steps: range) -> None:
    """Two rows a step, as where each is validated."""
    for step in steps:
        for metrics in ({"train/loss": 1.0 / (step + 1)}, {"val/loss": 2.0 / (step + 1)}):
            for logger in loggers:
                logger.log_metrics(metrics, step=step)


def points(history: list[dict[str, Any]]) -> list[tuple[int, str, float]]:
    """What a chart shows: step, metric and value."""
    return [(row["trainer/global_step"], name, row[name]) for row in history for name in ("train/loss", "val/loss") if name in row]


def expected(steps: int) -> list[tuple[int, str, float]]:
    return [point for step in range(steps) for point in ((step, "train/loss", 1.0 / (step + 1)), (step, "val/loss", 2.0 / (step + 1)))]


KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
from pathlib import Path
from test_loggers import both, log_steps
loggers = both(Path({folder!r}), False)
log_steps(loggers, range(7))
os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_a_run(folder: Path) -> None:
    """A process that logs seven steps and is killed, as a checkpoint was written after step 5."""
    code = KILLED.format(path=sys.path, folder=str(folder))
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -9


def go_on(folder: Path) -> None:
    """Go on from step 5 to step 10."""
    loggers = both(folder, True)
    loggers[0].cut(10)
    log_steps(loggers, range(5, 10))
    loggers[1].finalize("success")


def test_offline_a_killed_and_resumed_run_is_whole_in_its_last_folder(fresh_wandb: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """W&B loses what a killed process has not written: the resumed start records it again, and `wandb sync` uploads each row once."""
    fresh_wandb.setenv("WANDB_MODE", "offline")
    kill_a_run(tmp_path)
    go_on(tmp_path)
    *_, last = offline_records(tmp_path)
    assert points(history_of(last)) == expected(10)
    marks = [file.read_text() for file in tmp_path.glob("wandb/offline-run-*/*.synced")]
    assert len(marks) == 1 and "holds all of it" in marks[0]
    with WandbServer() as server:
        sync(tmp_path, server)
        assert points(server.history) == expected(10)


def sync(folder: Path, server: WandbServer) -> None:
    command = [sys.executable, "-m", "wandb", "sync", *map(str, sorted(folder.glob("wandb/offline-run-*")))]
    subprocess.run(command, check=True, capture_output=True, timeout=60, cwd=folder, env=os.environ | server.environment)
    wandb.teardown()


def test_offline_each_job_may_be_uploaded_before_the_next_one_goes_on(fresh_wandb: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh_wandb.setenv("WANDB_MODE", "offline")
    first = both(tmp_path, False)
    log_steps(first, range(7))
    first[1].finalize("failed")
    with WandbServer() as server:
        sync(tmp_path, server)
        assert points(server.history) == expected(7)
        time.sleep(1.1)  # W&B names folders by the second
        go_on(tmp_path)
        sync(tmp_path, server)
        assert points(server.history) == expected(10)


@pytest.mark.parametrize("arrived", [False, True])
def test_online_a_killed_and_resumed_run_has_each_row_once(fresh_wandb: pytest.MonkeyPatch, tmp_path: Path, arrived: bool) -> None:
    """Whether the rows after the checkpoint were still under way when the process was killed, or the server had them all."""
    with WandbServer() as server:
        for name, value in server.environment.items():
            fresh_wandb.setenv(name, value)
        if arrived:
            first = both(tmp_path, False)
            log_steps(first, range(7))
            first[1].finalize("failed")
            assert points(server.history) == expected(7)
        else:
            kill_a_run(tmp_path)
            assert len(server.history) < 14
        go_on(tmp_path)
        wandb.teardown()
        assert points(server.history) == expected(10)


def test_a_connection_lost_in_the_middle_costs_bounded_time_and_no_row(
    fresh_wandb: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh_wandb.setattr(wandb_run, "FINISH_SECONDS", 2.0)
    with WandbServer() as server:
        for name, value in server.environment.items():
            fresh_wandb.setenv(name, value)
        loggers = both(tmp_path, False)
        log_steps(loggers, range(5))
        server.answers = False
        began = time.monotonic()
        log_steps(loggers, range(5, 10))
        assert time.monotonic() - began < 2
        loggers[1].finalize("success")
        assert time.monotonic() - began < 20
        said = capsys.readouterr().err
        assert said.count("W&B has not taken everything within 2 s; nothing is lost") == 1
        (record,) = tmp_path.glob("wandb/run-*/*.wandb")
        assert points(history_of(list(read_records(record)))) == expected(10)
        wandb.teardown()
        server.answers = True
        again = both(tmp_path, True)  # the finished run, started again: it logs nothing
        again[1].log_hyperparams({})
        again[1].finalize("success")
        wandb.teardown()
        assert points(server.history) == expected(10)
