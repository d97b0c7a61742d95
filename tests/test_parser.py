"""Lists on the command line, and options that only one command knows."""

import pytest

from qlora_lightning.cli import main
from qlora_lightning.parser import gather_lists, without


def plot(runs: list[str], output: str = "x", labels: list[str] | None = None) -> None: ...


def count(number: int, names: list[str] | None = None) -> None: ...


@pytest.mark.parametrize(
    "given, gathered",
    [
        ("A B", ['--runs=["A", "B"]']),
        ("A B --output x", ['--runs=["A", "B"]', "--output", "x"]),
        ("--output x A B", ['--runs=["A", "B"]', "--output", "x"]),
        ("--output=x A", ['--runs=["A"]', "--output=x"]),
        ("--runs A B --labels c d", ['--runs=["A", "B"]', '--labels=["c", "d"]']),
        ("--runs=A", ['--runs=["A"]']),
        ('--runs=["A"]', ['--runs=["A"]']),
        ("-h", ["-h"]),
        ("", []),
    ],
)
def test_values_of_a_list_follow_each_other(given: str, gathered: list[str]) -> None:
    """The first parameter's stand without its name too."""
    assert gather_lists(plot, given.split()) == gathered


def test_a_list_that_is_not_first_needs_its_name() -> None:
    assert gather_lists(count, ["3", "--names", "a", "b"]) == ['--names=["a", "b"]', "3"]


def test_help_shows_a_list_as_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["report", "--help"])
    shown = capsys.readouterr().out
    assert "--runs ITEM ..." in shown and "[ITEM," not in shown


def test_options_that_only_one_command_knows_are_left_out() -> None:
    given = ["--config", "quickstart", "--rows", "4", "--checks=resume", "--json=true", "--rows=5", "--trainer.devices", "1"]
    assert without(given, ("--checks", "--rows")) == ["--config", "quickstart", "--json=true", "--trainer.devices", "1"]
