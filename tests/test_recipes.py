"""Finding, listing and copying recipes in a planted tree of shipped files."""

import json
from pathlib import Path

import pytest

from qlora_lightning import recipes
from qlora_lightning.errors import UserError
from qlora_lightning.recipes import find_recipe, recipes_copy, recipes_list, recipes_show, shared_defaults, shipped_root

FILES = {
    "lightning_cli.yaml": "trainer: {}\n",
    "recipes/quickstart.yaml": "# A first run, offline.\n# More.\ndata:\n  dataset: ../datamodules/quick.yaml\n",
    "recipes/oasst1-7b.yaml": "# The paper's OASST1 on 7B.\n\ndata: {class_path: X, init_args: {dataset: ../datamodules/oasst1.yaml}}\n",
    "recipes/oasst1-13b.yaml": "data: {dataset: ../datamodules/oasst1.yaml}\n",
    "recipes/inline.yaml": "data:\n  dataset: {path: ../datamodules/quick/train.jsonl}\n",
    "recipes/README.md": "no recipe",
    "datamodules/quick.yaml": "path: quick/train.jsonl\nvalidation_path: quick/heldout.jsonl\nhub_id: some/set\n",
    "datamodules/quick/train.jsonl": '{"a": 1}\n',
    "datamodules/quick/heldout.jsonl": '{"a": 2}\n',
    "datamodules/oasst1.yaml": "hub_id: OpenAssistant/oasst1\n",
}


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of shipped files, and an empty working folder."""
    root = tmp_path / "shipped"
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(recipes, "shipped_root", lambda: root)
    return root


def tree(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_root_is_the_checkout_or_the_wheels_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (shipped_root() / "lightning_cli.yaml").is_file()
    package = tmp_path / "site-packages" / "qlora_lightning"
    (package / "shipped").mkdir(parents=True)
    monkeypatch.setattr(recipes, "__file__", str(package / "recipes.py"))
    assert shipped_root() == package / "shipped"


def test_find_prefers_a_file_then_a_shipped_name(shipped: Path) -> None:
    assert find_recipe("quickstart") == shipped / "recipes" / "quickstart.yaml"
    assert find_recipe("quickstart.yaml") == shipped / "recipes" / "quickstart.yaml"
    Path("quickstart").write_text("mine: 1\n")
    assert find_recipe("quickstart") == Path("quickstart")


def test_unknown_name_suggests_the_nearest(shipped: Path) -> None:
    with pytest.raises(UserError, match=r"'oast1-7b' is neither; did you mean oasst1-7b or oasst1-13b\? `qlora-lightning recipes list`"):
        find_recipe("oast1-7b")
    with pytest.raises(UserError, match=r"'zzz' is neither; `qlora-lightning recipes list`"):
        find_recipe("zzz")
    with pytest.raises(UserError, match="is neither"):
        find_recipe("../lightning_cli")


def test_defaults_of_the_working_folder_come_first(shipped: Path) -> None:
    assert shared_defaults() == shipped / "lightning_cli.yaml"
    Path("lightning_cli.yaml").write_text("")
    assert shared_defaults() == Path("lightning_cli.yaml")


def test_list(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipes_list()
    assert capsys.readouterr().out.splitlines() == [
        "inline",
        "oasst1-13b",
        "oasst1-7b   The paper's OASST1 on 7B.",
        "quickstart  A first run, offline.",
    ]
    recipes_list(json=True)
    rows = json.loads(capsys.readouterr().out)
    path = str(shipped / "recipes" / "quickstart.yaml")
    assert rows[-1] == {"name": "quickstart", "description": "A first run, offline.", "path": path}


def test_show_prints_the_file_itself(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipes_show("quickstart")
    assert capsys.readouterr().out == FILES["recipes/quickstart.yaml"]


@pytest.mark.parametrize(
    "name, others",
    [
        ("quickstart", ["datamodules/quick.yaml", "datamodules/quick/train.jsonl", "datamodules/quick/heldout.jsonl"]),
        ("oasst1-7b", ["datamodules/oasst1.yaml"]),
        ("inline", ["datamodules/quick/train.jsonl"]),
    ],
)
def test_copy_brings_what_the_recipe_needs(shipped: Path, name: str, others: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    recipes_copy(name, Path("mine"))
    expected = [f"recipes/{name}.yaml", *others]
    assert tree(Path("mine")) == {file: FILES[file] for file in expected}
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        *(f"copied: mine/{file}" for file in expected),
        f"run it with: qlora-lightning fit --config mine/recipes/{name}.yaml",
    ]


def test_copy_never_replaces_silently(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipes_copy("oasst1-7b")
    recipes_copy("oasst1-13b")  # shares an unchanged data module
    assert "already there: datamodules/oasst1.yaml" in capsys.readouterr().err
    Path("datamodules/oasst1.yaml").write_text("mine: 1\n")
    Path("recipes/oasst1-7b.yaml").unlink()
    with pytest.raises(UserError, match=r"datamodules/oasst1\.yaml differs; pass --overwrite"):
        recipes_copy("oasst1-7b")
    assert not Path("recipes/oasst1-7b.yaml").exists()
    recipes_copy("oasst1-7b", overwrite=True)
    assert Path("datamodules/oasst1.yaml").read_text() == FILES["datamodules/oasst1.yaml"]


def test_copy_into_a_file_is_refused(shipped: Path) -> None:
    Path("mine").write_text("no folder")
    with pytest.raises(UserError) as error:
        recipes_copy("quickstart", Path("mine"))
    rule = "a recipe is copied into a folder, but mine/recipes/quickstart.yaml cannot be written (Not a directory)"
    assert str(error.value) == f"{rule}; name another"


def test_files_must_be_utf_8(shipped: Path) -> None:
    for name, find in (("mine.yaml", lambda: find_recipe("mine.yaml")), ("lightning_cli.yaml", shared_defaults)):
        Path(name).write_bytes(b"# gut\n# sch\xf6n\n")
        with pytest.raises(UserError) as error:
            find()
        assert str(error.value) == f"{name}:2: a recipe must be UTF-8, found byte 0xf6; save the file as UTF-8"


def test_copy_takes_shipped_names_only(shipped: Path) -> None:
    with pytest.raises(UserError, match="is neither"):
        recipes_copy("nothing")
