"""Rows prepared once: tokenized by all cores, written as Arrow, memory-mapped, and found again by what they were made from.

The key of a prepared set is the bytes of the data files, everything in the specification that shapes examples, the tokenizer with its
chat template, and the code of this folder. A set is written beside its place and renamed when it is whole: killed halfway, the next run
begins anew. Rows stream through; no more than some thousand are in memory at once (but a .json file's text, and OASST1's messages, whole).
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow
import tokenizers
from filelock import FileLock, Timeout

from qlora_lightning.cache import cache_folder
from qlora_lightning.console import say
from qlora_lightning.data.dataset import SCHEMA, DataReport, Numbers, TokenizedDataset, report_on
from qlora_lightning.data.encoder import Encoder
from qlora_lightning.data.files import Located, data_files, read_rows
from qlora_lightning.data.formats import RowParser, gather, row_parser
from qlora_lightning.data.rendering import PaperRenderer, load_renderer
from qlora_lightning.data.spec import DatasetSpec
from qlora_lightning.data.tokenize import Chunk, RowTokenizer, Unit
from qlora_lightning.data.unchanged import FileState, states_of, unchanged
from qlora_lightning.data.workers import map_batches, shown
from qlora_lightning.disk import sync_tree
from qlora_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SOURCES = ("name", "path", "hub_id", "hub_file", "revision", "validation_path", "validation_hub_file", "validation_size")
"""Fields of the specification that say where rows are, and its name: what the rows hold is in the key instead."""
_SAID_FROM = 2.0  # seconds; what took less is not worth a line


@dataclass(frozen=True)
class Prepared:
    """All examples of some files, and what became of their rows."""

    examples: TokenizedDataset
    rows: int
    """Rows (or trees of rows) read."""
    skipped: list[tuple[int, str]]
    """Number of the row, from 0, and why it or a conversation of it was left out."""
    bad: list[str]
    """The errors of rows that were skipped because they are wrong; the first hundred."""

    def whole(self) -> tuple[TokenizedDataset, DataReport]:
        """All examples, and the account of all rows; see ``part``."""
        return self.part(np.arange(self.rows))

    def part(self, rows: Numbers) -> tuple[TokenizedDataset, DataReport]:
        """The examples of these rows, and the account of them.

        Raises:
            UserError: none is left to use.
        """
        chosen = np.zeros(self.rows, dtype=np.bool_)
        chosen[rows] = True
        skipped = Counter(reason for row, reason in self.skipped if chosen[row])
        examples = self.examples if len(rows) == self.rows else self.examples.of_rows(rows)
        if not len(examples):
            reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
            raise UserError(
                f"no row of the data set is left to use: {reasons or 'none was given'}, of {len(rows)} rows; "
                "correct the rows or the limits in data.dataset"
            )
        return examples, report_on(examples, len(rows), dict(skipped))


def prepare(files: Sequence[Path], spec: DatasetSpec, tokenizer: "PreTrainedTokenizerBase", processes: int) -> Prepared:
    """The examples of the rows in ``files``: from the cache, or made with so many processes and kept there.

    Raises:
        UserError: a file or a row is wrong, the template does not suit the tokenizer, or the cache cannot be written.
    """
    sources = states_of(files)
    target = cache_folder() / "data" / _key(files, spec, tokenizer)
    try:
        if (found := _load(target)) is not None:  # also from a cache that others fill and this user may only read
            return found
        target.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(target):
            found = _load(target)
            if found is None:
                _prepare_into(target, sources, files, spec, tokenizer, processes)
                found = _load(target)
    except OSError as error:
        raise UserError(
            f"prepared data is kept in {cache_folder()}, which cannot be written ({os.strerror(error.errno or 0)}); "
            "set QLORA_LIGHTNING_CACHE to a folder that can"
        ) from error
    assert found is not None
    return found


@contextmanager
def _only_one(target: Path) -> Iterator[None]:
    """Of several ranks and runs one works, and the others wait and say so."""
    lock = FileLock(f"{target}.lock")
    try:
        lock.acquire(timeout=_SAID_FROM)
    except Timeout:
        say(f"Waiting for another process that prepares {target.name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _load(folder: Path) -> Prepared | None:
    """What was prepared, None where nothing was or where it was damaged since."""
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        state = FileState.of(folder / "examples.arrow")
        with pyarrow.memory_map(str(state.file)) as source, pyarrow.ipc.open_file(source) as reader:
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        examples = TokenizedDataset.from_batches(batches, report["content"], state.check_mapped)
        return Prepared(examples, report["rows"], [(row, reason) for row, reason in report["skipped"]], report["bad"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # (Arrow's and JSON's errors are ValueErrors)
        return None


def _prepare_into(
    target: Path,
    sources: Sequence[FileState],
    files: Sequence[Path],
    spec: DatasetSpec,
    tokenizer: "PreTrainedTokenizerBase",
    processes: int,
) -> None:
    beside = target.with_name(f"{target.name}.partial")
    for leftover in (beside, target):  # of a run that was killed; damaged
        shutil.rmtree(leftover, ignore_errors=True)
    beside.mkdir()
    began = perf_counter()
    try:
        with unchanged(sources):  # else other rows would be kept under the name of those that were there first
            chunks = tokenized(read_files(files, spec), spec, tokenizer, processes)
            report = _write(beside / "examples.arrow", shown(chunks, _rows_in(files, spec), f"Tokenizing {spec.name}"))
        (beside / "report.json").write_text(json.dumps(report), encoding="utf-8")
        sync_tree(beside)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    beside.rename(target)
    elapsed = perf_counter() - began
    if elapsed > _SAID_FROM:
        rate = report["rows"] / elapsed
        say(f"Prepared {spec.name}: {report['rows']:,} rows in {elapsed:.1f} s ({rate:,.0f} rows/s), kept in {target}")


def _write(file: Path, chunks: Iterable[Chunk]) -> dict[str, Any]:
    digests = {name: hashlib.sha256() for name in ("borders", "input_ids", "supervised")}  # apart, so that batches leave no trace
    rows = 0
    skipped: list[tuple[int, str]] = []
    bad: list[str] = []
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_file(sink, SCHEMA) as writer:
        for chunk in chunks:
            writer.write_batch(chunk.batch)
            digests["borders"].update(np.diff(chunk.batch["input_ids"].offsets.to_numpy()))
            for name in ("input_ids", "supervised"):
                digests[name].update(chunk.batch[name].values.to_numpy())
            skipped += chunk.skipped
            bad += chunk.bad[: 100 - len(bad)]
            rows += chunk.rows
    content = hashlib.sha256(b"".join(digest.digest() for digest in digests.values())).hexdigest()
    return {"rows": rows, "skipped": skipped, "bad": bad, "content": content}


def read_files(files: Iterable[str | Path], spec: DatasetSpec) -> Iterator[Located]:
    """The rows of all files, one file after the other."""
    return chain.from_iterable(read_rows(file, spec.rows_per_file) for file in files)


def tokenized(rows: Iterator[Located], spec: DatasetSpec, tokenizer: "PreTrainedTokenizerBase", processes: int = 1) -> Iterator[Chunk]:
    """What becomes of rows (at least one), in their order, some hundred at a time.

    Raises:
        UserError: a row is wrong, and ``spec.bad_rows`` says that this is an error; or the template does not suit the tokenizer.
    """
    first = next(rows)
    work = row_tokenizer(first, spec, tokenizer)
    return map_batches(work, units_of(chain([first], rows), work.parser), processes)


def row_tokenizer(first: Located, spec: DatasetSpec, tokenizer: "PreTrainedTokenizerBase") -> RowTokenizer:
    """What tokenizes the rows of a set, of which ``first`` tells the shape.

    Raises:
        UserError: no shape that is known, or the template does not suit the tokenizer.
    """
    renderer = PaperRenderer(tokenizer) if spec.compat == "paper" else load_renderer(spec.template, tokenizer)
    return RowTokenizer(row_parser(spec, first[1], first[0]), renderer, Encoder.of(tokenizer, renderer), spec, tokenizer.bos_token_id)


def units_of(rows: Iterable[Located], parser: RowParser) -> Iterator[Unit]:
    """Rows, or the trees that they make up, by number."""
    return (Unit(number, where, row) for number, (where, row) in enumerate(gather(rows, parser)))


def _key(files: Sequence[Path], spec: DatasetSpec, tokenizer: "PreTrainedTokenizerBase") -> str:
    shape = {name: value for name, value in asdict(spec).items() if name not in _SOURCES}
    contents = [(str(part.relative_to(file)), _digest(part)) for file in files for part in data_files(file)]
    parts = [contents, shape, tokenizer_identity(tokenizer), _code_version(), tokenizers.__version__]
    return f"{spec.name.replace('/', '-')[:40]}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:24]}"


def tokenizer_identity(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A hash (hex) of all of a tokenizer that text becomes tokens by."""
    names = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.chat_template)
    return hashlib.sha256(repr((names, tokenizer.backend_tokenizer.to_str())).encode()).hexdigest()


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); check the file") from error


@cache
def _code_version() -> str:
    """Changes with any file of this folder: examples made by other code are never taken for ours."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _rows_in(files: Sequence[Path], spec: DatasetSpec) -> int | None:
    """How many rows there are, for the time left; None where only reading them tells."""
    counts = [_count_rows(part) for file in files for part in data_files(file)]
    if None in counts:
        return None
    return sum(min(count or 0, spec.rows_per_file or count or 0) for count in counts)


def _count_rows(file: Path) -> int | None:
    match file.suffix.lower():
        case ".jsonl":
            with file.open("rb") as stream:
                return sum(1 for _ in stream)
        case ".parquet":
            with suppress(pyarrow.ArrowException):  # reading it says what is wrong
                return int(pyarrow.parquet.read_metadata(file).num_rows)
    return None
