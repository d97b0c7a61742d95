"""A lower layer never imports a higher one; the table below is the architecture."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import qlora_lightning

PACKAGE = Path(qlora_lightning.__file__).parent
# Module (or folder of modules) -> layer, the most specific name first.
LAYERS = {
    "data.datamodule": 1,
    "data": 0,
    "strategies.policy": 0,
    "strategies": 1,
    "modeling": 1,
    "optim": 0,
    "errors": 0,
    "console": 0,
    "loggers": 0,
    "card": 0,
    "recipes": 0,
    "module": 2,
    "generation": 2,
    "chat": 3,
    "plan": 3,
    "doctor": 3,
    "callbacks": 4,
    "parser": 5,
    "lightning_cli": 5,
    "cli": 5,
}


def layer_of(module: str) -> int:
    """Layer of a module named below the package; a module that the table does not know is an error."""
    name = module
    while name not in LAYERS:
        assert "." in name, f"{module} has no layer: add it to the table"
        name = name.rpartition(".")[0]
    return LAYERS[name]


def imports_of(file: Path) -> list[str]:
    """Modules of this package that a file imports when it is loaded or when it runs; imports for type checkers do not count."""
    tree = ast.parse(file.read_text())
    typing_only = [
        node for test in ast.walk(tree) if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.unparse(test.test) for node in ast.walk(test)
    ]
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node not in typing_only]
    return [node.module.removeprefix("qlora_lightning.") for node in nodes if node.module and node.module.startswith("qlora_lightning.")]


FILES = sorted(file for file in PACKAGE.rglob("*.py") if file.name != "__init__.py" and "shipped" not in file.parts)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_down(file: Path) -> None:
    module = ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
    for imported in imports_of(file):
        assert layer_of(imported) <= layer_of(module), f"{module} imports {imported}, which lies above it"
        assert imported != "cli", "nothing imports the command line"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_stay_readable(file: Path) -> None:
    assert file.read_text().count("\n") <= 310


def test_help_starts_without_torch() -> None:
    """What needs no model must not wait for the libraries that do."""
    code = "import sys; from qlora_lightning.cli import main; main(['recipes', 'list']); assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
