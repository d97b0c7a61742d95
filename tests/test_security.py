"""What the whole tool keeps to: no pickles, no code from elsewhere, no words that steer a terminal, no files where they do not belong."""

import ast
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.table import Table
from running import line_of
from test_gguf import write_gguf
from transformers import PreTrainedTokenizerFast

import qlora_lightning
from qlora_lightning.chat import _HarmlessStreamer
from qlora_lightning.console import console, say
from qlora_lightning.modeling.sources import resolve_base

SOURCES = sorted(Path(qlora_lightning.__file__).parent.rglob("*.py"))
STEER = "\x1b]0;owned\x07\x1b[2J\x1b[31mred\x9b5m"  # a window's title, an empty screen, colours in two spellings
FORBIDDEN = {
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
    "eval", "exec", "os.system", "os.popen", "tempfile.mktemp", "pandas.read_pickle", "numpy.load", "np.load",
}  # fmt: skip
"""Modules and calls that run what a file says, or write where another can foresee it."""


def calls(source: str) -> list[tuple[str, dict[str, str]]]:
    """The calls in a source as they are written, and their named arguments; what it imports counts as a call."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            found.append((ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords if word.arg}))
        elif isinstance(node, ast.Import):
            found += [(alias.name, {}) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module or "", {}))
    return found


def faults(source: str) -> list[str]:
    """What of a source breaks the rules."""
    found = [name for name, _ in calls(source) if name in FORBIDDEN]
    for name, words in calls(source):
        if name == "torch.load" and words.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if name.startswith("Auto") and name.endswith(".from_pretrained") and words and words.get("trust_remote_code") != "False":
            found.append(f"{name} without trust_remote_code=False")
        if name == "AutoModelForCausalLM.from_pretrained" and words and words.get("use_safetensors") != "True":
            found.append(f"{name} without use_safetensors=True")
    return found


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(SOURCES[0].parent)))
def test_no_module_reads_pickles_or_runs_strangers_code(file: Path) -> None:
    assert faults(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch; torch.load(path)",
        "import torch; torch.load(path, weights_only=False)",
        "import pickle",
        "from joblib import load",
        "yaml.load(text, Loader=yaml.Loader)",
        "AutoConfig.from_pretrained(name, revision=revision)",
        "AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False)",
        "eval(text)",
    ],
)
def test_the_rules_see_what_breaks_them(source: str) -> None:
    assert faults(source)


def controls(text: str) -> set[str]:
    """Control characters that could steer a terminal."""
    return {one for one in text if (ord(one) < 32 and one not in "\t\n\r") or 127 <= ord(one) < 160}


PRINTERS: list[Callable[[str], None]] = [say, console.print, lambda words: console.print(_table(words))]


@pytest.mark.parametrize("print_it", PRINTERS, ids=["say", "print", "table"])
def test_words_never_steer_the_terminal(print_it: Callable[[str], None], capsys: pytest.CaptureFixture[str]) -> None:
    print_it(f"a row says {STEER}")
    told = capsys.readouterr().err
    assert "red" in told and not controls(told)


def _table(words: str) -> Table:
    table = Table(words, title=words)
    table.add_row(words)
    return table


def test_what_is_said_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    say("[red]a[/red] [link=http://evil]b[/link]")
    assert capsys.readouterr().err == "[red]a[/red] [link=http://evil]b[/link]\n"


def test_a_name_in_an_error_never_steers_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = line_of(capsys, "fit", "--config", str(tmp_path / f"no{STEER}.yaml"))
    assert "red" in told and not controls(told)


@pytest.mark.parametrize("command", [["data", "inspect"], ["fit"]])
def test_a_row_in_an_error_never_steers_the_terminal(
    command: list[str], tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({f"a{STEER}": "b"}))
    options = ["--model.base_model", str(tiny_base), "--data.dataset.path", str(tmp_path / "rows.jsonl")]
    told = line_of(capsys, *command, *options, "--trainer.default_root_dir", str(tmp_path / "run"))
    assert "red" in told and not controls(told)


def test_what_is_converted_is_the_users_by_the_users_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file lies where others may foresee and plant it, nor keeps the narrow mode of a temporary one."""
    monkeypatch.setenv("QLORA_LIGHTNING_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "tiny.gguf")
    before = os.umask(0o027)
    try:
        folder = Path(resolve_base(str(tmp_path / "tiny.gguf")))
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(one.stat().st_mode) for one in (folder, *folder.iterdir())}
    assert modes == {0o750, 0o640}
    assert [one.name for one in folder.parent.iterdir()] == [folder.name]


def test_an_adapter_is_readable_by_the_users_mask(fit: Callable[..., Path]) -> None:
    before = os.umask(0o027)
    try:
        folder = fit("trainer.max_steps=1") / "checkpoints" / "last"
    finally:
        os.umask(before)
    assert {stat.S_IMODE(one.stat().st_mode) for one in folder.iterdir()} == {0o640}


def test_an_answer_never_steers_the_terminal(tiny_tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]) -> None:
    streamer = _HarmlessStreamer(tiny_tokenizer)
    streamer.put(torch.tensor(tiny_tokenizer.encode(f"it says {STEER}", add_special_tokens=False)))
    streamer.end()
    told = capsys.readouterr().out
    assert "red" in told and not controls(told)
