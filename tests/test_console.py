"""One line stays one line, whatever it holds."""

import pytest

from qlora_lightning.console import is_live, say


def test_say_is_plain_and_unwrapped(capsys: pytest.CaptureFixture[str]) -> None:
    text = "[bold]no markup[/bold] " + "x" * 300
    say(text)
    captured = capsys.readouterr()
    assert captured.err == text + "\n"
    assert captured.out == ""


def test_forced_colours_make_no_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not is_live()
