"""GGUF through a converter that is a program of its own."""

import stat
from pathlib import Path

import pytest

from qlora_lightning.errors import UserError
from qlora_lightning.export.gguf import CONVERTERS, find_converter, write_gguf


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, script: str) -> None:
    """An executable of that name, alone on the PATH with what a script needs."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.parametrize("name", CONVERTERS)
def test_the_converter_is_told_model_type_and_file(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    install(monkeypatch, tmp_path / "bin", name, 'echo "$1 $2 $4 $5" > "$3"')
    file = write_gguf(find_converter("q8_0"), model, "q8_0")
    assert file == model / "mine-q8_0.gguf"
    assert file.read_text() == f"{model} --outfile --outtype q8_0\n"
    assert sorted(path.name for path in model.iterdir()) == ["config.json", "mine-q8_0.gguf"]


FAILS = 'echo half > "$3"; echo trace >&2; echo "Model X is not supported" >&2; exit 1'


@pytest.mark.parametrize("script", [FAILS, "echo Model X is not supported"])
def test_what_the_converter_says_last_is_the_line(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    install(monkeypatch, tmp_path / "bin", CONVERTERS[1], script)
    with pytest.raises(UserError, match=r"cannot write GGUF of .*mine \(Model X is not supported\); the merged model itself is whole"):
        write_gguf(find_converter("f16"), model, "f16")
    assert [path.name for path in model.iterdir()] == ["config.json"]


def test_without_a_converter_the_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"--gguf needs llama.cpp's converter, but none of .* is on the PATH; put llama.cpp's folder"):
        find_converter("f16")


def test_types_that_it_does_not_write_are_refused() -> None:
    with pytest.raises(UserError, match=r"--gguf must be one of f32, .*, got 'q4_k_m'; make smaller ones .* with llama-quantize"):
        find_converter("q4_k_m")
