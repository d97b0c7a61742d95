"""The files that ship with the package: recipes (one YAML = one run), data modules (one YAML = one instruction set), shared defaults.

In a wheel they lie in ``shipped/`` inside the package; in a checkout they are the folders at its root, so both show the same files.
"""

import difflib
import json as json_module
import shutil
from pathlib import Path
from typing import Any

import yaml

from qlora_lightning.console import say
from qlora_lightning.errors import UserError


def shipped_root() -> Path:
    """Folder that holds ``recipes/``, ``datamodules/`` and ``lightning_cli.yaml``."""
    package = Path(__file__).resolve().parent
    shipped = package / "shipped"
    return shipped if shipped.is_dir() else package.parents[1]


def shared_defaults() -> Path:
    """What every run shares: ``lightning_cli.yaml`` of the working folder, else the shipped one."""
    own = Path("lightning_cli.yaml")
    return _utf8(own) if own.is_file() else shipped_root() / own


def find_recipe(name_or_path: str) -> Path:
    """The YAML of a recipe: an existing file wins, else a shipped recipe of that name.

    Raises:
        UserError: there is neither, or the file is not UTF-8.
    """
    path = Path(name_or_path)
    if not path.is_file():
        return _shipped_recipe(name_or_path)
    _check_dataset(_utf8(path))
    return path


def names_dataset(recipe: Path) -> bool:
    """Whether a recipe names a data set by its file, and does not only set some of its fields."""
    content = _content(recipe)
    return isinstance(_mapping(content.get("data")).get("dataset", content.get("data.dataset")), str)


def _check_dataset(recipe: Path) -> None:
    """The parser would forget a data set's file where the same YAML sets one of its fields as well."""
    content = _content(recipe)
    fields = [key for key in (*content, *(f"data.{key}" for key in _mapping(content.get("data")))) if str(key).startswith("data.dataset.")]
    if fields and names_dataset(recipe):
        raise UserError(
            f"{recipe}: a YAML names a data set's file or sets its fields, and this one does both ({fields[0]}); "
            f"give the fields in a second --config or as --{fields[0]} VALUE"
        )


def _content(recipe: Path) -> dict[str, Any]:
    """What a YAML says; nothing where it is broken, of which the parser says more."""
    try:
        return _mapping(yaml.safe_load(recipe.read_text(encoding="utf-8")))
    except (yaml.YAMLError, RecursionError):
        return {}


def _utf8(path: Path) -> Path:
    """``path``, once it is known that the parser can read it: its own complaint would name neither file nor line."""
    try:
        data = path.read_bytes()
        data.decode("utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a YAML file that can") from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: a recipe must be UTF-8, found byte 0x{data[error.start]:02x}; save the file as UTF-8") from error
    return path


def find_datamodule(name_or_path: str) -> Path | str:
    """The YAML of an instruction set: an existing file wins, else a shipped one of that name. A mapping instead of a name stays as it is.

    Raises:
        UserError: it is none of these.
    """
    if name_or_path.lstrip().startswith("{") or name_or_path == "null":
        return name_or_path
    if Path(name_or_path).is_file():
        return _utf8(Path(name_or_path))
    shipped = {path.stem: path for path in sorted((shipped_root() / "datamodules").glob("*.yaml"))}
    if name_or_path.removesuffix(".yaml") in shipped:
        return shipped[name_or_path.removesuffix(".yaml")]
    near = difflib.get_close_matches(Path(name_or_path).stem, shipped, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"a data set is a YAML file or a shipped name, and {name_or_path!r} is neither; {hint}shipped are {', '.join(shipped)}")


def _shipped_recipes() -> dict[str, Path]:
    """Every shipped recipe by name: its path below ``recipes/`` without the suffix."""
    folder = shipped_root() / "recipes"
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def _shipped_recipe(name: str) -> Path:
    recipes = _shipped_recipes()
    if name.removesuffix(".yaml") in recipes:
        return recipes[name.removesuffix(".yaml")]
    near = difflib.get_close_matches(Path(name).stem, recipes, n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UserError(
        f"a recipe is a YAML file or a shipped name, and {name!r} is neither; {hint}`qlora-lightning recipes list` names them all"
    )


def _description(recipe: Path) -> str:
    """The first comment line of ``recipe``, where every recipe says what it is for."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    return next((line.lstrip("# ").strip() for line in lines if line.startswith("#")), "")


def recipes_list(json: bool = False) -> None:
    """List the shipped recipes with a line on each.

    Args:
        json: Print one JSON document instead: a list of {name, description, path}.
    """
    rows = [{"name": name, "description": _description(path), "path": str(path)} for name, path in _shipped_recipes().items()]
    if json:
        print(json_module.dumps(rows, indent=2))
        return
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        print(f"{row['name']:<{width}}  {row['description']}".rstrip())


def recipes_show(name: str) -> None:
    """Print the YAML of a recipe.

    Args:
        name: A shipped name (`qlora-lightning recipes list`) or a file.
    """
    print(find_recipe(name).read_text(encoding="utf-8"), end="")


def recipes_copy(name: str, folder: Path = Path(), overwrite: bool = False) -> None:
    """Copy a shipped recipe, the data module that it names and that one's local data files, to change them and run them from there.

    Args:
        name: A shipped name (`qlora-lightning recipes list`).
        folder: Where to copy to; `recipes/` and `datamodules/` are made inside it.
        overwrite: Replace files there that differ. Without it nothing is copied when any of them does.
    """
    root = shipped_root()
    copies = {source: folder / source.relative_to(root) for source in _files_of(_shipped_recipe(name), root)}
    missing = {source: target for source, target in copies.items() if not _same(source, target)}
    taken = [str(target) for target in missing.values() if target.exists()]
    if taken and not overwrite:
        raise UserError(f"a copy never replaces other content, and {', '.join(taken)} differs; pass --overwrite or another folder")
    try:
        for source, target in missing.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    except OSError as error:
        raise UserError(f"a recipe is copied into a folder, but {target} cannot be written ({error.strerror}); name another") from error
    for source, target in copies.items():
        say(f"{'copied' if source in missing else 'already there'}: {target}")
    say(f"run it with: qlora-lightning fit --config {next(iter(copies.values()))}")


def _same(source: Path, target: Path) -> bool:
    return target.is_file() and source.read_bytes() == target.read_bytes()


def _files_of(recipe: Path, root: Path) -> list[Path]:
    """``recipe`` and the shipped files it needs, each once; a path inside a YAML is relative to that YAML."""
    data = _mapping(_mapping(yaml.safe_load(recipe.read_text(encoding="utf-8"))).get("data"))
    dataset = _mapping(data.get("init_args", data)).get("dataset")
    files = [recipe]
    if isinstance(dataset, str):
        module = (recipe.parent / dataset).resolve()
        files += [module, *_named_files(module.parent, yaml.safe_load(module.read_text(encoding="utf-8")))]
    else:
        files += _named_files(recipe.parent, dataset)
    return [file for file in dict.fromkeys(files) if file.is_relative_to(root)]


def _named_files(folder: Path, dataset: Any) -> list[Path]:
    """The local files among the data that ``dataset`` names; a hub id is no file."""
    names = [_mapping(dataset).get(key) for key in ("path", "validation_path")]
    paths = [(folder / name).resolve() for name in names if isinstance(name, str)]
    return [path for path in paths if path.is_file()]


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
