"""jsonargparse with errors of one line: the key as the user wrote it, and the nearest key there is."""

import difflib
import inspect
import json
import os
import re
from argparse import HelpFormatter
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader, set_parsing_settings

from qlora_lightning.errors import UserError

UNKNOWN = re.compile(r"unrecognized arguments: (?:--)?(?P<a>[^\s=]+)|(?:does not accept option|No action for key|Key) '(?P<b>[^']+)'")
DENIED = re.compile(r"Importing '(?P<path>[^']+)' is not allowed")
CLASSES = (
    "qlora_lightning",
    *(f"lightning.pytorch.{part}" for part in ("callbacks", "loggers", "plugins.environments", "profilers")),
    "lightning.fabric.plugins.environments",
)
"""What a recipe may name classes of: to import a module is to run it, and a recipe may come from anywhere."""
TRUST = "QLORA_LIGHTNING_TRUST"
"""Environment variable in which a user names further packages, with commas between; a recipe cannot set it."""

MOST_VALUES = 100_000
"""In a YAML, with what it repeats by name counted each time; a recipe has a hundred."""


def restrict() -> None:
    """Let no option or YAML import anything but ``CLASSES`` and what the user trusts, nor be read from elsewhere than local files."""
    trusted = [name.strip() for name in os.environ.get(TRUST, "").split(",") if name.strip()]
    if bad := [name for name in trusted if not all(part.isidentifier() for part in name.split("."))]:
        raise UserError(f"{TRUST} must name packages with commas between, as in my_callbacks,my_loggers, got {bad[0]!r}; correct it")
    set_parsing_settings(
        import_path_denylist=["*", "lightning.pytorch.callbacks.lambda_function"],  # which calls whatever it is given
        import_path_allowlist=[*CLASSES, *trusted],
        config_read_mode_urls_enabled=False,
        config_read_mode_fsspec_enabled=False,  # LightningCLI turns it on
    )
    set_loader("yaml", _load_yaml, (yaml.YAMLError,))


_LOAD: Callable[[str], Any] = get_loader("yaml")


def _load_yaml(text: str) -> Any:
    """As jsonargparse does, within bounds: a few lines of aliases can stand for more values than any memory holds."""
    try:
        value = _LOAD(text)
        values = _count(value, {})
    except RecursionError:
        raise UserError(f"a YAML may not nest without end, and this one does: {text[:60]!r}…; correct it") from None
    if values > MOST_VALUES:
        raise UserError(
            f"a YAML may hold {MOST_VALUES:,} values at most, and this one stands for more: {text[:60]!r}…; write it out shorter"
        )
    return _datasets_as_files(value)


def _datasets_as_files(value: Any) -> Any:
    """``dataset: mine.yaml`` as ``./mine.yaml``: jsonargparse would take it for a name in a module ``mine``, not to be imported."""
    if isinstance(value, list):
        return [_datasets_as_files(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {key: _as_file(one) if key in ("dataset", "data.dataset") else _datasets_as_files(one) for key, one in value.items()}


def _as_file(value: Any) -> Any:
    return f"./{value}" if isinstance(value, str) and value.endswith((".yaml", ".yml")) and "/" not in value else value


def _count(value: Any, known: dict[int, int]) -> int:
    """The values in ``value``; ``known`` holds the counts of lists and mappings by their identity."""
    if not isinstance(value, list | dict):
        return 1
    if id(value) not in known:
        known[id(value)] = 1 + sum(_count(one, known) for one in (value.values() if isinstance(value, dict) else value))
    return known[id(value)]


class OneLineParser(ArgumentParser):
    """Raises ``UserError`` where argparse prints its usage and exits. Takes no abbreviations: half a name is a misspelt one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        restrict()
        super().__init__(*args, **kwargs)
        self.allow_abbrev = False

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """As jsonargparse does; a class that may not be imported is an error like any other, wherever it is named."""
        try:
            return super().parse_args(*args, **kwargs)
        except (ImportError, TypeError, ValueError) as error:
            if DENIED.search(str(error)) is None:
                raise
            self.error(str(error), error)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong with the arguments in one line, with the nearest option for an unknown one."""
        if denied := DENIED.search(message):
            raise UserError(
                f"a recipe may name classes of {', '.join(CLASSES)}, got {denied['path']}, whose code would run; "
                f"if you trust it, export {TRUST}={denied['path'].rpartition('.')[0]}"
            ) from ex
        match = UNKNOWN.search(message)
        if match:
            key = match["a"] or match["b"]
            raise UserError(f"unknown option {key}{self._suggestion(key)}") from ex
        text = re.sub(r'^Parser key "(?P<key>[^"]+)":\s*', r"\g<key>: ", " ".join(message.split()))
        text = re.sub(r"<class '(\w+)'>", r"\1", text)
        if text.endswith("Got value: None"):
            text = f"{text.split(':')[0]} must be set; give it in the recipe or as --{text.split(':')[0]} VALUE"
        raise UserError(text) from ex

    def _positional_optionals(self, cfg: Any, unk: list[str]) -> Any:
        """Where options may stand without their name, jsonargparse would take a misspelt ``--name`` for such a value."""
        unknown = next((argument for argument in unk if argument.startswith("--")), None)
        if unknown is not None:
            self.error(f"unrecognized arguments: {unknown}")
        return super()._positional_optionals(cfg, unk)

    def _suggestion(self, key: str) -> str:
        keys = {action.dest for parser in self._all_parsers() for action in parser._actions}
        near = difflib.get_close_matches(key, keys, n=1, cutoff=0.5) or difflib.get_close_matches(
            key.rsplit(".", 1)[-1], [name for name in keys if "." in name], n=1, cutoff=0.4
        )
        return f"; did you mean {near[0]}?" if near else "; see --help"

    def _all_parsers(self) -> list[ArgumentParser]:
        subcommands: Any = self._subcommands_action
        return [self, *(subcommands._name_parser_map.values() if subcommands else [])]


class CommandParser(OneLineParser):
    """Of a plain command, whose lists are words one after the other: see ``gather_lists``."""

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        """The help, without jsonargparse's own sign for a list."""
        return super().format_help(formatter).replace("[ITEM,...]", "ITEM ...")


def gather_lists(function: Callable[..., Any], arguments: list[str]) -> list[str]:
    """Arguments in which every parameter ``list[str]`` of ``function`` is one JSON list, as jsonargparse wants it.

    A user writes ``--ratings A B``; where the first parameter is such a list, also ``A B`` without its name.
    """
    parameters = inspect.signature(function).parameters
    lists: dict[str, list[str]] = {name: [] for name, one in parameters.items() if one.annotation in (list[str], list[str] | None)}
    if not lists:
        return arguments
    unnamed = next(iter(parameters))
    rest, option = [], ""  # the option whose value comes next: of a list until another option comes, else once
    for argument in arguments:
        if argument.startswith("--") or argument == "-h":
            name, equals, value = argument.removeprefix("--").partition("=")
            option = "" if equals else name
            if name not in lists or value.startswith("["):
                rest.append(argument)
            elif equals:
                lists[name].append(value)
        elif option in lists or (not option and unnamed in lists):
            lists[option or unnamed].append(argument)
        else:
            rest.append(argument)
            option = ""
    return [*(f"--{name}={json.dumps(values)}" for name, values in lists.items() if values), *rest]


def without(options: Sequence[str], names: Sequence[str]) -> list[str]:
    """``options`` without these and their values; a switch is written NAME=true by now."""
    kept, rest = [], list(options)
    while rest:
        option = rest.pop(0)
        if option.partition("=")[0] not in names:
            kept.append(option)
        elif "=" not in option and rest:
            rest.pop(0)
    return kept
