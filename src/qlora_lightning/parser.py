"""jsonargparse with errors of one line: the key as the user wrote it, and the nearest key there is."""

import difflib
import inspect
import json
import re
from argparse import HelpFormatter
from collections.abc import Callable
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from qlora_lightning.errors import UserError

UNKNOWN = re.compile(r"unrecognized arguments: (?:--)?(?P<a>[^\s=]+)|(?:does not accept option|No action for key|Key) '(?P<b>[^']+)'")


class OneLineParser(ArgumentParser):
    """Raises ``UserError`` where argparse prints its usage and exits. Takes no abbreviations: half a name is a misspelt one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.allow_abbrev = False

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong with the arguments in one line, with the nearest option for an unknown one."""
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
