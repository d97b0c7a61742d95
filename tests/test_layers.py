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
    "cache": 0,
    "machine": 0,
    "strategies.policy": 0,
    "strategies": 1,
    "modeling": 1,
    "kernels": 0,
    "fused": 1,
    "optim": 0,
    "errors": 0,
    "console": 0,
    "disk": 0,
    "manifest": 1,
    "loggers": 0,
    "interruption": 0,
    "redaction": 0,
    "card": 0,
    "recipes": 0,
    "evaluation.tournament.verdicts": 0,
    "evaluation.tournament.ratings": 0,
    "evaluation.tournament.released": 0,
    "evaluation.tournament.matches": 0,
    "evaluation.tournament.elo": 0,
    "evaluation.judge.reviews": 0,
    "evaluation.endpoint": 0,
    "evaluation.waiting": 0,
    "evaluation.judge.systems": 0,
    "evaluation.judge.verdict_log": 0,
    "evaluation.mmlu.questions": 0,
    "evaluation.mmlu.subjects": 0,
    "evaluation.mmlu.prompts": 0,
    "evaluation.intervals": 0,
    "evaluation.output": 0,
    "evaluation.mmlu.scores": 0,
    "evaluation.texts": 0,
    "evaluation.counting": 0,
    "evaluation": 3,
    "report": 3,
    "answer_file": 0,
    "prompts": 0,
    "sampling": 2,
    "answering": 3,
    "answering_local": 3,
    "answering_server": 3,
    "module": 2,
    "generation": 2,
    "chat": 3,
    "plan": 3,
    "verify": 3,
    "export": 3,
    "doctor": 3,
    "inspection_html": 3,
    "callbacks": 4,
    "parser": 5,
    "run_folder": 5,
    "run_lock": 0,
    "inspection": 5,
    "planning": 5,
    "measuring": 5,
    "verification": 5,
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
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node not in typing_only:
            assert node.level == 0, f"{file} has a relative import in line {node.lineno}: name the module in full"
            names.append(node.module or "")
    return [name.removeprefix("qlora_lightning.") for name in names if name.startswith("qlora_lightning.")]


def test_every_kind_of_import_counts(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text("import qlora_lightning.chat\nimport os\nfrom qlora_lightning.data.files import place\n")
    assert imports_of(file) == ["chat", "data.files"]
    file.write_text("from . import chat\n")
    with pytest.raises(AssertionError, match="has a relative import in line 1"):
        imports_of(file)


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
    code = "import sys; from qlora_lightning.cli import main; main(['recipes', 'list'])"
    check = "assert not {'torch', 'transformers'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", f"{code}; {check}"], check=True, capture_output=True)
