"""metrics.csv over resumes and new columns; an offline W&B run read back from the file that it wrote; how the mode is decided."""

import csv
import json
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wandb
from wandb.proto.wandb_internal_pb2 import Record

from qlora_lightning import loggers
from qlora_lightning.errors import UserError
from qlora_lightning.loggers import RunCSVLogger, RunWandbLogger, WandbMode, reachable, wandb_mode


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
    resumed.truncate_after(5)
    for step in range(5, 10):
        resumed.log_metrics({"train/loss": float(step), "new": 1}, step=step)
    assert [(row["step"], row["train/loss"]) for row in rows_of(resumed)] == [(str(step), str(float(step))) for step in range(10)]
    assert not list(tmp_path.glob("*.tmp"))


def test_csv_of_a_fresh_run_is_emptied(tmp_path: Path) -> None:
    RunCSVLogger(str(tmp_path)).log_metrics({"train/loss": 1.0}, step=3)
    logger = RunCSVLogger(str(tmp_path))
    logger.truncate_after(0)
    assert rows_of(logger) == []
    RunCSVLogger(str(tmp_path / "new")).truncate_after(0)
    assert not (tmp_path / "new").exists()


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
    fresh_wandb.setattr(loggers, "wandb_logged_in", lambda: pytest.fail("asked for a key"))
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
    fresh_wandb.setattr(loggers, "wandb_logged_in", lambda: True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        fresh_wandb.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert wandb_mode(seconds=2.0).mode == "online"


def test_reachable_asks_the_proxy_where_one_is_set(fresh_wandb: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        fresh_wandb.setenv("http_proxy", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert reachable("http://host.invalid", seconds=2.0)
    assert not reachable("http://host.invalid", seconds=2.0)


def test_slow_name_lookup_does_not_block(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    monkeypatch.setattr(loggers, "_connects", lambda address, seconds: threading.Event().wait(5))
    assert not reachable("https://host.invalid", seconds=0.1)


def records_of(file: Path) -> list[Record]:
    """Every record of a ``.wandb`` file: a LevelDB log in blocks of 32 KiB after a header of 7 bytes that counts as part of the first."""
    data, position, records, parts = file.read_bytes(), 7, [], b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(Record.FromString(parts))
            parts = b""
    return records


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
    return [records_of(file) for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)]


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
    monkeypatch.setattr(loggers, "wandb_mode", lambda: WandbMode("online", ""))
    logger = RunWandbLogger(save_dir=str(tmp_path), log_adapter=True)
    logger.log_hyperparams({"lr": 1.0})
    logger.log_metrics({"train/loss": 1.0}, step=0)
    logger.upload_adapter(tmp_path, {})
    logger.finalize("success")
    assert capsys.readouterr().err == "warning: W&B failed and the run goes on without it (Error: no space)\n"


def test_a_log_call_that_fails_ends_recording_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
