"""``data inspect``: what a fit would train on, token by token and in numbers, before any weight is loaded."""

import difflib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_lightning.console import say
from qlora_lightning.data.audit import SET_COLUMNS, Audit, Lengths, Padding, audit, in_both, padding_waste, set_shares
from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.data.excerpts import Excerpt, excerpts, harmless, visible
from qlora_lightning.data.sets import Part, merged
from qlora_lightning.data.steps import StepShape
from qlora_lightning.data.stream import BEGINNING
from qlora_lightning.errors import UserError
from qlora_lightning.inspection_html import page
from qlora_lightning.lightning_cli import OneLineLightningParser, QLoRACLI, resolve_names
from qlora_lightning.parser import OneLineParser
from qlora_lightning.recipes import shared_defaults

_DESCRIPTION = (
    "Show which tokens a fit would train on, and audit its rows. Of the base model only the tokenizer is loaded (a .gguf file is "
    "converted first, once). Besides the options below every option of `fit` is understood and means the same: --config RECIPE, "
    "--model.base_model, --data.dataset, --data.dataset.path FILE and all others that `qlora-lightning fit --help` lists."
)
_ROWS = "Examples to show, the first of each set. Default: 5 on the terminal, 100 in an HTML page, all with --json."
_PART = "all: every row of the training files, whether it is trained on or held out of them. train, validation: one of the two parts."
_HTML = "Write the examples and the audit into this file, as a page that needs no network; the terminal then shows the audit alone."
_STRICT = (
    "End with exit code 2 when something spoils training: bad rows that were skipped, rows without a supervised token (also after "
    "truncation), answers that lost their end token, a doubled BOS, boundary tokens (they begin before an answer and end in it), "
    "examples in both the training and the validation part."
)
_JSON = (
    "Print JSON Lines on standard output and all else on standard error: {row, text, supervised, input_tokens, supervised_tokens} for "
    "each example (row: the number of the row, or of the tree of messages, from 1, counted through all files of its set), then "
    "{summary}, the audit."
)
_BAD = 5  # errors of bad rows on the terminal
_BARS = " ▁▂▃▄▅▆▇█"
_TRAINED, _READ = "bold green", "dim"


def data(arguments: list[str]) -> int:
    """Run a subcommand of ``data``; gives the exit code.

    Raises:
        UserError: there is no such subcommand, or as ``inspect``.
    """
    name, *options = arguments or [""]
    if {"--help", "-h"} & {*arguments}:
        _print_help()
    elif name == "inspect":
        inspect(options)
    else:
        near = "; did you mean inspect?" if difflib.get_close_matches(name, ["inspect"]) else ""
        found = f"got {name!r}" if name else "got none"
        raise UserError(f"data needs the subcommand inspect, {found}{near}; see qlora-lightning data inspect --help")
    return 0


def inspect(options: list[str]) -> None:
    """Show the examples and the audit of the fit that ``options`` describe.

    Raises:
        UserError: options, rows or files are wrong, or something spoils training and ``--strict`` is among the options.
    """
    cli = InspectionCLI(options)
    given, read = cli.given, cli.datamodule
    found = take_stock(read, given.part, given.trainer.accumulate_grad_batches)
    if given.html is not None:
        names = " + ".join(one.spec.name for one in read.sets)
        _write(given.html, page(f"{names}, {given.part}", _excerpts(read, given, 100), found))
    if given.json:
        _print_json(_excerpts(read, given, None), found)
    else:
        show(Console(highlight=False), [] if given.html else _excerpts(read, given, 5), found)
    if given.strict and found.problems:
        raise UserError(f"--strict: found {'; '.join(found.problems)}; correct the rows or the fields of data.dataset")


class InspectionCLI(QLoRACLI):
    """Parses the options of a fit and of the inspection, and builds the data module alone: no model, Trainer, logger or run folder.

    Attributes:
        given: the parsed options.
        datamodule: with its rows read.
    """

    def __init__(self, options: list[str]) -> None:
        command, *resolved = resolve_names(["fit", *options])
        super().__init__([command, "--config", str(shared_defaults()), *resolved])

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        _add_options(parser)

    def before_instantiate_classes(self) -> None:
        """Nothing of a run: no folder is made, no checkpoint looked for."""
        self.given: Namespace = self.config[self.subcommand]
        if self.given.rows is not None and self.given.rows < 0:
            raise UserError(f"--rows must be 0 or more, got {self.given.rows}; leave it out for the default")

    def instantiate_classes(self) -> None:
        parser = OneLineLightningParser()
        parser.add_lightning_class_args(InstructionDataModule, "data")
        self.datamodule = parser.instantiate_classes(Namespace(data=self.given.data)).data

    def after_instantiate_classes(self) -> None:
        self.datamodule.check(self.given.trainer.accumulate_grad_batches)
        self.datamodule.setup("fit")
        if self.given.part == "validation":
            self.datamodule.setup("validate")
        if self.datamodule.streaming:
            say(f"data.streaming is true: the first {BEGINNING:,} rows stand for all")
            self.datamodule.train_set, self.datamodule.train_report = self.datamodule.sets[0].training

    def _run_subcommand(self, subcommand: str) -> None:
        """There is nothing to run."""


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--rows", type=int | None, default=None, help=_ROWS)
    parser.add_argument("--part", type=Literal["all", "train", "validation"], default="all", help=_PART)
    parser.add_argument("--html", type=Path | None, default=None, help=_HTML)
    parser.add_argument("--strict", type=bool, default=False, help=_STRICT)


def _print_help() -> None:
    parser = OneLineParser(prog="qlora-lightning data inspect", description=_DESCRIPTION)
    _add_options(parser)
    parser.add_argument("--json", type=bool, default=False, help=_JSON)
    parser.print_help()


def take_stock(read: InstructionDataModule, part: str, accumulate: int) -> Audit:
    """The audit of a part of the rows of a data module that is set up.

    Args:
        read: the data module.
        part: "all" (every row of the training files), "train" or "validation".
        accumulate: the trainer's accumulate_grad_batches, by which the padding is told.
    """
    held, (dataset, report) = read.val_set, _merged(read, part)
    epoch = _parts(read, "validation" if part == "validation" else "train")
    shares = set_shares([(name, account, weight) for name, (_, account), weight in epoch])
    if part == "validation":
        return audit(part, dataset, report, in_both(dataset, read.train_set), [], None, None, shares)
    layout = "packed" if read.packing else "grouped" if read.group_by_length else "random"
    bad = [line for one in read.sets for line in one.bad]
    leaked = 0 if held is None else in_both(read.train_set, held)
    return audit(part, dataset, report, leaked, bad, _padding(read, accumulate), layout, shares)


def _parts(read: InstructionDataModule, part: str) -> list[tuple[str, Part, float]]:
    """That part of each set which has one: the set's name, the part, and how often an epoch goes through it."""
    match part:
        case "all":
            return [(one.spec.name, one.everything, one.weight) for one in read.sets]
        case "train":
            return [(one.spec.name, one.training, one.weight) for one in read.sets]
    return [(one.spec.name, held, 1.0) for one in read.sets if (held := one.validation) is not None]


def _merged(read: InstructionDataModule, part: str) -> Part:
    return merged([(examples, weight) for _, examples, weight in _parts(read, part)])


def _padding(read: InstructionDataModule, accumulate: int) -> Padding:
    """The padding of every layout that a run could have, whichever it has."""

    def waste(group_by_length: bool, pack_length: int | None = None) -> float:
        shape = StepShape(read.global_batch_size, accumulate, pack_length=pack_length)
        return padding_waste(read.train_set, shape, read.pad_to_multiple_of, read.seed, group_by_length)

    return Padding(random=waste(False), grouped=waste(True), packed=waste(read.group_by_length, read.packed_row))


def _excerpts(read: InstructionDataModule, given: Namespace, default: int | None) -> Iterator[Excerpt]:
    names = [name for name, _, _ in _parts(read, given.part)]
    return excerpts(_merged(read, given.part)[0], names, read.tokenizer, default if given.rows is None else given.rows)


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--html {file}: cannot be written ({error.strerror}); name a file that can") from error
    say(f"written: {file}")


def _print_json(examples: Iterable[Excerpt], found: Audit) -> None:
    try:
        for example in examples:
            print(json.dumps(_json_row(example, named=len(found.sets) > 1)))
        print(json.dumps({"summary": found.summary()}), flush=True)
    except BrokenPipeError:  # `| head` has seen enough; without another place to flush to, Python complains at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _json_row(example: Excerpt, named: bool) -> dict[str, Any]:
    return {
        **({"set": example.set} if named else {}),
        "row": example.row,
        "text": example.text,
        "supervised": example.supervised,
        "input_tokens": example.input_tokens,
        "supervised_tokens": example.supervised_tokens,
    }


# ---- for the terminal ----


def show(console: Console, examples: Iterable[Excerpt], found: Audit) -> None:
    """Print the examples, coloured by what is trained on, and the audit. Where there are no colours, marks take their place."""
    for number, example in enumerate(examples):
        if not number:
            console.print(_legend(console.is_terminal), soft_wrap=True)
        console.print(Text(harmless(example.heading), "bold cyan"), soft_wrap=True)
        console.print(_coloured(example, console.is_terminal), Text(), sep="\n", soft_wrap=True)
    for table in _tables(found):
        console.print(table, "")
    for line in found.bad_rows[:_BAD]:
        console.print(Text(f"bad row: {harmless(line)}"), soft_wrap=True)
    for problem in found.problems:
        console.print(Text(f"warning: {problem}", "bold yellow"), soft_wrap=True)


def _legend(colours: bool) -> Text:
    marks = "; in it ⏎ is a line end, → a tab, · a blank at an edge or in a run"
    trained = Text("trained on", _TRAINED) if colours else Text("⟦trained on⟧")
    return Text.assemble(trained, Text(" and "), Text("only read", _READ if colours else ""), Text(marks + "\n"))


def _coloured(example: Excerpt, colours: bool) -> Text:
    text = Text()
    for piece in example.pieces:
        if not piece.supervised:
            text.append(harmless(piece.text), _READ if colours else "")
        else:
            text.append(visible(piece.text) if colours else f"⟦{visible(piece.text)}⟧", _TRAINED if colours else "")
    return text


def _tables(found: Audit) -> Iterator[Table]:
    yield _table([], found.lines())
    yield _table(
        ["tokens", "p50", "p95", "max", "from 0 to max"],
        [[name, f"{of.p50:,}", f"{of.p95:,}", f"{of.max:,}", _bars(of)] for name, of in found.lengths.items()],
    )
    if len(found.sets) > 1:
        yield _table(SET_COLUMNS, [one.cells() for one in found.sets])


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(*names, show_header=bool(names), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _bars(lengths: Lengths) -> str:
    """The histogram in one line; what is not empty is never flat."""
    most = max(bucket.examples for bucket in lengths.histogram)
    return "".join(_BARS[-(-bucket.examples * 8 // most)] for bucket in lengths.histogram)
