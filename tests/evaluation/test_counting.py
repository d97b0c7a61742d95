"""Progress of long measurements."""

import re

import pytest

from qlora_lightning.evaluation import counting as module
from qlora_lightning.evaluation.counting import counting


def test_a_log_file_gets_plain_lines_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 10.0, 20.0, 25.0, 40.0, 60.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(moments))
    with counting("perplexity", 6000, "tokens") as advance:
        for units in (1000, 1000, 500, 1500, 2000):
            advance(units)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "perplexity  2,000 of 6,000 tokens  100 tokens/s  0:00:40 left",
        "perplexity  4,000 of 6,000 tokens  100 tokens/s  0:00:20 left",
    ]


def test_a_terminal_gets_one_line_that_goes_away(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    console = Console(stderr=True, force_terminal=True, width=80)
    monkeypatch.setattr(module, "console", console)
    monkeypatch.setattr(module, "is_live", lambda: True)
    with counting("perplexity, nf4-dq", 123456789, "tokens") as advance:
        advance(120000000)
    drawn = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line) for line in capsys.readouterr().err.replace("\r", "\n").splitlines()]
    shown = [line for line in drawn if "perplexity" in line]
    assert shown and all(len(line) <= 80 and "123,456,789 tokens" in line for line in shown)
