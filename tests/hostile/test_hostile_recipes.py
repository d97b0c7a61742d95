"""A recipe from elsewhere chooses among settings and known classes; it imports nothing, unpickles nothing and fetches nothing."""

from pathlib import Path

import pytest
from running import base_options, line_of

from qlora_lightning.cli import main
from qlora_lightning.parser import CLASSES, TRUST

MODULE = """
from pathlib import Path
from lightning.pytorch import Callback

Path({canary!r}).touch()

class Own(Callback):
    def on_fit_start(self, trainer, pl_module):
        Path({used!r}).touch()
"""
EVIL = "{class_path: strangers_code.Own}"


@pytest.fixture(autouse=True)
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that could be imported, and that leaves a mark when it is."""
    (tmp_path / "strangers_code.py").write_text(MODULE.format(canary=str(tmp_path / "canary"), used=str(tmp_path / "used")))
    monkeypatch.syspath_prepend(tmp_path)


def recipe(tmp_path: Path, content: str) -> str:
    (tmp_path / "recipe.yaml").write_text(content)
    return str(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    "content",
    [
        f"trainer: {{callbacks: [{EVIL}]}}",
        f"trainer: {{callbacks: {EVIL}}}",
        "trainer: {callbacks: [strangers_code.Own]}",
        f"trainer: {{logger: {EVIL}}}",
        f"trainer: {{strategy: {EVIL}}}",
        f"trainer: {{plugins: {EVIL}}}",
        f"trainer: {{profiler: {EVIL}}}",
        f"trainer: {{accelerator: {EVIL}}}",
        f"model: {{lora: {EVIL}}}",
        "trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.LambdaCallback, init_args: {setup: strangers_code.Own}}]}",
        "trainer: {callbacks: [{class_path: subprocess.Popen, init_args: {args: [touch, CANARY]}}]}",
        "trainer: {logger: {class_path: os.system, init_args: {command: touch CANARY}}}",
        "trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.model_checkpoint.os.system}]}",
    ],
)
def test_a_recipe_imports_nothing_but_known_classes(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = recipe(tmp_path, content.replace("CANARY", str(tmp_path / "canary")))
    told = line_of(capsys, "fit", "--config", file, "--model.base_model", "nowhere/base")
    assert f"a recipe may name classes of {', '.join(CLASSES)}, got " in told and f"export {TRUST}=" in told
    assert not (tmp_path / "canary").exists()


def test_a_class_of_ones_own_is_named_in_the_environment(
    tmp_path: Path, tiny_base: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TRUST, "strangers_code")
    file = recipe(tmp_path, f"trainer: {{callbacks: [{EVIL}]}}")
    options = base_options(tiny_base, rows_file, tmp_path / "run")
    assert main(["fit", "--config", file, *options, "--trainer.max_steps", "1"]) == 0
    assert (tmp_path / "used").exists()


def test_a_recipe_cannot_set_what_is_trusted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = recipe(tmp_path, f"{TRUST}: strangers_code\ntrainer: {{callbacks: [{EVIL}]}}")
    assert main(["fit", "--config", file, "--model.base_model", "nowhere/base"]) == 2
    assert not (tmp_path / "canary").exists()


def test_lightnings_own_callbacks_need_no_trust(tmp_path: Path, tiny_base: Path, rows_file: Path) -> None:
    callback = "{class_path: lightning.pytorch.callbacks.LearningRateMonitor}"
    file = recipe(tmp_path, f"trainer: {{callbacks: [{callback}]}}")
    options = base_options(tiny_base, rows_file, tmp_path / "run")
    assert main(["fit", "--config", file, *options, "--trainer.max_steps", "1"]) == 0


@pytest.mark.parametrize(
    "content",
    [
        "!!python/object/apply:os.system ['touch CANARY']",
        "trainer: !!python/object/apply:pathlib.Path.touch [CANARY]",
        "model: {base_model: !!python/name:os.system }",
        "model: !include CANARY",
    ],
)
def test_a_yaml_makes_no_object_of_pythons(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = recipe(tmp_path, content.replace("CANARY", str(tmp_path / "canary")))
    assert main(["fit", "--config", file]) == 2
    assert not (tmp_path / "canary").exists()
    assert main(["recipes", "show", file]) == 0
    assert not (tmp_path / "canary").exists()


def test_a_yaml_that_grows_without_bound_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each line ten times the one before: 10^9 words from 300 bytes."""
    lines = ["a: &a [" + ", ".join(["x"] * 10) + "]"]
    lines += [f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)]
    assert "may hold 100,000 values at most" in line_of(capsys, "fit", "--config", recipe(tmp_path, "\n".join(lines)))


def test_a_recipe_nested_without_end_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "may not nest without end" in line_of(capsys, "fit", "--config", recipe(tmp_path, "model: " + "[" * 5000 + "]" * 5000))


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/x.yaml", "memory://x.yaml", "file:///etc/passwd"])
def test_no_part_of_a_recipe_is_fetched(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = line_of(capsys, "fit", "--config", recipe(tmp_path, f"data: {{dataset: '{address}'}}"))
    assert "127.0.0.1" not in told.replace(address, "") and "root:" not in told
