"""Row batches through worker processes, in order, with only a few batches on their way; and the progress of it."""

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from time import perf_counter

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from qlora_lightning.console import console, is_live, say
from qlora_lightning.data.tokenize import Chunk, RowTokenizer, Unit
from qlora_lightning.errors import UserError

_BATCH = 256  # rows a call of the tokenizer: enough for its threads, little memory
_ALONE = 40  # batches; fewer are done before a worker process has started
_SAID_EVERY = 20.0  # seconds between lines of progress where there is no terminal
_AHEAD = 3  # batches on their way for each process, so that none of them waits

_work: RowTokenizer
"""In a worker process: what it does."""


def map_batches(work: RowTokenizer, units: Iterable[Unit], processes: int) -> Iterator[Chunk]:
    """``work`` over all rows, by this process where they are few, else by ``processes`` of them."""
    batches = _batches(iter(units))
    yield from map(work, islice(batches, _ALONE))
    rest = next(batches, None)
    if rest is None:
        return
    batches = chain([rest], batches)
    yield from map(work, batches) if processes < 2 else _by_pool(work, batches, processes)


def _batches(units: Iterator[Unit]) -> Iterator[list[Unit]]:
    while batch := list(islice(units, _BATCH)):
        yield batch


def _by_pool(work: RowTokenizer, batches: Iterator[list[Unit]], processes: int) -> Iterator[Chunk]:
    # Started anew and not forked: the tokenizer's threads and their locks do not survive a fork.
    pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=_start, initargs=(work,))
    pending: deque[Future[Chunk]] = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(_run, batch))
            if len(pending) >= _AHEAD * processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise UserError("a process that tokenizes was killed, likely for lack of memory; set --data.num_proc 1") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start(work: RowTokenizer) -> None:
    global _work
    _work = work
    tokenize_alone()  # the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()


def tokenize_alone(worker: int = 0) -> None:
    """Keep tokenizers to one thread in this process: after a fork it would wait for threads that only its parent has."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _end_with_parent() -> None:
    """A parent that is killed cannot tell its workers to stop."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(batch: list[Unit]) -> Chunk:
    return _work(batch)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.0f} rows/s")


def shown(chunks: Iterable[Chunk], total: int | None, description: str) -> Iterator[Chunk]:
    """``chunks`` with a bar of rows, rows/s and time left on a terminal, with a line now and then elsewhere.

    ``total`` is the number of rows, where it is known.
    """
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,} rows"), _Rate(), TimeRemainingColumn()
    began = said = perf_counter()
    rows = 0
    with Progress(*columns, console=console, transient=True, disable=not is_live()) as progress:
        task = progress.add_task(description, total=total)
        for chunk in chunks:
            yield chunk
            rows += chunk.rows
            progress.advance(task, chunk.rows)
            if not is_live() and perf_counter() - said > _SAID_EVERY:
                said = perf_counter()
                say(f"{description}: {rows:,}{f' of {total:,}' if total else ''} rows, {rows / (said - began):,.0f} rows/s")
