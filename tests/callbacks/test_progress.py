"""Progress counts optimizer steps: with accumulation, a short last step and after a resume; in a log file and on a terminal."""

import io
import itertools
import re
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from rich.console import Console
from torch.utils.data import DataLoader, TensorDataset

from qlora_lightning import console as console_module
from qlora_lightning.callbacks import progress
from qlora_lightning.callbacks.pace import Pace, clock
from qlora_lightning.callbacks.progress import Reading, RunProgress


class Toy(pl.LightningModule):
    """Five microbatches an epoch; logs what a run logs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = self.layer(batch[0]).pow(2).mean()
        self.log("train/loss", loss.detach() * 0 + 2.31)
        self.log("train/tokens_per_second", 1234.0)
        if batch_idx == 1:
            self.print("a [line] of the module")
        return loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val/loss", self.layer(batch[0]).mean())

    test_step = validation_step

    def predict_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.layer(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=2e-4)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1), "interval": "step"}]


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(5, 2)), batch_size=1)


def trainer(bar: RunProgress, folder: Path, **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {"max_epochs": 2, "accumulate_grad_batches": 2, "limit_val_batches": 0, "num_sanity_val_steps": 0}
    options = {**defaults, **options}
    return pl.Trainer(accelerator="cpu", logger=False, callbacks=[bar], default_root_dir=folder, enable_model_summary=False, **options)


def step_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("step")]


def test_plain_lines_count_optimizer_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(RunProgress(every_n_steps=1), tmp_path, enable_checkpointing=False).fit(Toy(), loader())
    captured = capsys.readouterr()
    lines = step_lines(captured.err)
    assert [line.split()[1] for line in lines] == [f"{step}/6" for step in range(1, 7)]  # 5 microbatches by 2: the third step is short
    assert re.fullmatch(r"step 1/6  loss 2\.3100  lr 2\.0e-4  1,234 tokens/s  0:00:0\d < -:--:--", lines[0])
    assert re.fullmatch(r"step 2/6  loss 2\.3100  lr 2\.0e-5  1,234 tokens/s  0:00:0\d < 0:00:0\d", lines[1])
    assert "a [line] of the module\n" in captured.err
    assert captured.out == ""


def test_plain_lines_keep_their_rhythm_and_always_show_the_last_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bar = RunProgress(every_n_steps=4, every_n_seconds=1000)
    trainer(bar, tmp_path, max_epochs=-1, max_steps=9, enable_checkpointing=False).fit(Toy(), loader())
    assert [line.split()[1] for line in step_lines(capsys.readouterr().err)] == ["4/9", "8/9", "9/9"]


def test_time_brings_a_line_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bar = RunProgress(every_n_steps=1000, every_n_seconds=0)
    trainer(bar, tmp_path, max_epochs=1, enable_checkpointing=False).fit(Toy(), loader())
    assert len(step_lines(capsys.readouterr().err)) == 3


def test_max_steps_counts_where_it_comes_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(RunProgress(1), tmp_path, max_steps=4, enable_checkpointing=False).fit(Toy(), loader())
    assert [line.split()[1] for line in step_lines(capsys.readouterr().err)] == ["1/4", "2/4", "3/4", "4/4"]


def test_resumed_run_starts_at_its_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = trainer(RunProgress(1), tmp_path, max_epochs=1, enable_checkpointing=False)
    first.fit(Toy(), loader())
    first.save_checkpoint(tmp_path / "last.ckpt")
    capsys.readouterr()
    resumed = RunProgress(1)
    trainer(resumed, tmp_path, enable_checkpointing=False).fit(Toy(), loader(), ckpt_path=str(tmp_path / "last.ckpt"))
    lines = step_lines(capsys.readouterr().err)
    assert [line.split()[1] for line in lines] == ["4/6", "5/6", "6/6"]
    assert lines[0].endswith("< -:--:--")
    assert resumed._pace.first_step == 4


def test_evaluations_report_in_a_log_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trainer(RunProgress(1, every_n_seconds=0), tmp_path, limit_val_batches=3, enable_checkpointing=False)
    run.validate(Toy(), [loader(), loader()], verbose=False)
    run.test(Toy(), loader(), verbose=False)
    run.predict(Toy(), loader())
    lines = [line.split("  ")[0] for line in capsys.readouterr().err.splitlines() if "<" in line]
    assert lines == [
        *(f"validation {batch}/3" for _ in range(2) for batch in (1, 2, 3)),
        *(f"{name} {batch}/5" for name in ("test", "prediction") for batch in range(1, 6)),
    ]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal of 160 columns that keeps what was written to it."""
    screen = io.StringIO()
    fake = Console(file=screen, force_terminal=True, force_interactive=True, width=160)
    monkeypatch.setattr(progress, "console", fake)
    monkeypatch.setattr(console_module, "console", fake)
    monkeypatch.setattr(progress, "is_live", lambda: True)
    return screen


def test_live_bar_shows_all_and_prints_stay_whole(terminal: io.StringIO, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bar = RunProgress()
    run = trainer(bar, tmp_path, limit_val_batches=2, num_sanity_val_steps=1, enable_checkpointing=False)
    run.fit(Toy(), loader(), loader())
    assert bar._bars is None
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "a [line] of the module\n" in text
    last = next(line for line in reversed(text.splitlines()) if line.startswith("step"))
    assert last.startswith("step 6/6")
    assert "loss 2.3100  lr 2.0e-9  1,234 tokens/s 0:00:0" in last
    assert capsys.readouterr().out == ""


def test_an_error_gives_the_terminal_back(terminal: io.StringIO, tmp_path: Path) -> None:
    class Broken(Toy):
        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            raise RuntimeError("broken")

    bar = RunProgress()
    with pytest.raises(RuntimeError, match="broken"):
        trainer(bar, tmp_path, enable_checkpointing=False).fit(Broken(), loader())
    assert bar._bars is None


def test_metrics_are_read_at_most_twice_a_second(terminal: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readings = 0

    def read(self: RunProgress, run: pl.Trainer) -> Reading:
        nonlocal readings
        readings += 1
        return Reading(None, None, None)

    monkeypatch.setattr(RunProgress, "_read", read)
    monkeypatch.setattr(progress, "READ_SECONDS", 1000.0)
    trainer(RunProgress(), tmp_path, max_epochs=20, enable_checkpointing=False).fit(Toy(), loader())
    assert readings <= 2  # at most the first step and the end


def test_disabled_shows_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class OtherRank(RunProgress):
        def setup(self, *args: Any, **kwargs: Any) -> None:
            super().setup(*args, **kwargs)
            self.disable()

    trainer(OtherRank(1), tmp_path, enable_checkpointing=False).fit(Toy(), loader())
    assert not step_lines(capsys.readouterr().err)


def test_time_left_is_of_this_session_without_its_first_step() -> None:
    pace = Pace(total=100, step=50, started=0.0)
    assert pace.left(10.0) is None
    pace.advance(51, 60.0)  # the first step took a minute
    assert pace.left(60.0) is None
    pace.advance(53, 64.0)
    assert pace.left(64.0) == 47 * 2.0
    assert pace.left(65.0) == 93.0
    assert pace.elapsed(65.0) == 65.0
    assert Pace(total=None, step=0, started=0.0, first_moment=1.0).left(2.0) is None


def test_clock_and_empty_reading() -> None:
    assert (clock(None), clock(59.9), clock(3725), clock(100 * 3600)) == ("-:--:--", "0:00:59", "1:02:05", "100:00:00")
    assert str(Reading(None, None, None)) == ""
    assert str(Reading(1.5, None, 12345.6)) == "loss 1.5000  12,346 tokens/s"


def test_a_clock_that_is_set_changes_no_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """NTP sets the clock of the day an hour back and two hours forth while steps are counted."""
    jumps, real = itertools.cycle((-3600.0, 7200.0)), time.time
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    trainer(RunProgress(every_n_steps=1), tmp_path, enable_checkpointing=False).fit(Toy(), loader())
    times = [line.rpartition("tokens/s  ")[2] for line in step_lines(capsys.readouterr().err)]
    assert len(times) == 6 and all(re.fullmatch(r"0:00:0\d < (0:00:0\d|-:--:--)", text) for text in times)


def test_nothing_is_measured_by_the_clock_of_the_day() -> None:
    """It may be set while a run goes on. Allowed are dates that a server gives and that a person reads."""
    allowed = {"evaluation/waiting.py", "run_lock.py"}
    package = Path(progress.__file__).parents[1]
    users = {
        file.relative_to(package).as_posix()
        for file in package.rglob("*.py")
        if re.search(r"\btime\.time\(|\bimport time\b.*\btime\(|datetime\.(now|utcnow)\(", file.read_text())
    }
    assert users <= allowed
