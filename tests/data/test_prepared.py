"""Prepared sets: made once, found again, whole or not there, and the same however many processes made them."""

import errno
import gzip
import json
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from filelock import FileLock
from making import CHATML_CHAT, located, prepare_rows, turns
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from qlora_lightning.data import prepared, workers
from qlora_lightning.data.dataset import SCHEMA, TokenizedDataset
from qlora_lightning.data.files import read_rows
from qlora_lightning.data.prepared import Prepared, prepare
from qlora_lightning.data.spec import DatasetSpec
from qlora_lightning.data.tokenize import Chunk
from qlora_lightning.errors import UserError

SpecMaker = Callable[..., DatasetSpec]
ROWS = [turns(f"question {n}", "so " * (n % 5) + str(n), "And?", f"no {n}") for n in range(30)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; gives the folder of the prepared sets in it."""
    monkeypatch.setenv("QLORA_LIGHTNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


@pytest.fixture
def rows_at(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows as JSON Lines."""

    def write(rows: list[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def tokenizations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever rows are tokenized."""
    made, tokenized = [], prepared.tokenized

    def counted(*arguments: Any) -> Iterator[Any]:
        made.append(1)
        return tokenized(*arguments)

    monkeypatch.setattr(prepared, "tokenized", counted)
    return made


def examples_of(dataset: TokenizedDataset) -> list[tuple[list[int], list[int]]]:
    return [(ids.tolist(), labels.tolist()) for ids, labels in dataset]


def sets_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


# Found again


def test_a_second_call_tokenizes_nothing(
    make_spec: SpecMaker, tiny_tokenizer: PreTrainedTokenizerFast, rows_at: Callable[..., Path], cache: Path, tokenizations: list[int]
) -> None:
    file = rows_at(ROWS)
    first, second = (prepare([file], make_spec(), tiny_tokenizer, 1) for _ in range(2))
    assert len(tokenizations) == len(sets_in(cache)) == 1
    assert examples_of(first.examples) == examples_of(second.examples)
    assert first.examples.fingerprint() == second.examples.fingerprint()
    assert (first.rows, first.skipped, first.bad) == (second.rows, second.skipped, second.bad) == (30, [], [])


def test_a_set_is_found_wherever_its_file_lies(
    make_spec: SpecMaker, tiny_tokenizer: PreTrainedTokenizerFast, rows_at: Callable[..., Path], tmp_path: Path, tokenizations: list[int]
) -> None:
    """What is in the file counts and how it is read, not its folder, its validation rows or the number of processes."""
    file = rows_at(ROWS)
    (tmp_path / "elsewhere").mkdir()
    copy = tmp_path / "elsewhere" / "rows.jsonl"
    copy.write_bytes(file.read_bytes())
    prepare([file], make_spec(path=str(file)), tiny_tokenizer, 1)
    prepare([copy], make_spec(path=str(copy), validation_size=5), tiny_tokenizer, 2)
    assert len(tokenizations) == 1


@pytest.mark.parametrize(
    "change",
    ["a byte of the data", "template", "max_length", "system_prompt", "bad_rows", "compat", "rows_per_file", "chat template", "code"],
)
def test_a_change_makes_a_new_set(
    make_spec: SpecMaker,
    tiny_tokenizer: PreTrainedTokenizerFast,
    rows_at: Callable[..., Path],
    cache: Path,
    tokenizations: list[int],
    monkeypatch: pytest.MonkeyPatch,
    change: str,
) -> None:
    rows = [{"prompt": f"q{n}", "response": "a"} for n in range(9)]
    fields: dict[str, Any] = {
        "template": "guanaco",
        "max_length": 99,
        "system_prompt": "Hi",
        "bad_rows": "skip",
        "compat": "paper",
        "rows_per_file": 3,
    }
    file = rows_at(rows)
    prepare([file], make_spec(), tiny_tokenizer, 1)
    spec = make_spec(**{change: fields[change]} if change in fields else {})
    if change == "a byte of the data":
        rows_at([*rows[:-1], {"prompt": "q8", "response": "b"}])
    elif change == "chat template":
        tiny_tokenizer = with_chat(tiny_tokenizer)
    elif change == "code":
        monkeypatch.setattr(prepared, "_code_version", lambda: "another")
    prepare([file], spec, tiny_tokenizer, 1)
    assert len(tokenizations) == len(sets_in(cache)) == 2


def with_chat(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>", chat_template=CHATML_CHAT
    )


def test_a_tokenizer_with_one_other_token_makes_a_new_set(
    make_spec: SpecMaker,
    tiny_tokenizer: PreTrainedTokenizerFast,
    merging_tokenizer: PreTrainedTokenizerFast,
    rows_at: Callable[..., Path],
    tokenizations: list[int],
) -> None:
    file = rows_at(ROWS)
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(merging_tokenizer.backend_tokenizer.to_str()), bos_token="<s>", eos_token="</s>"
    )
    other.add_tokens(["question"])
    sets = [prepare([file], make_spec(), tokenizer, 1) for tokenizer in (tiny_tokenizer, merging_tokenizer, other)]
    assert len(tokenizations) == 3
    assert len({one.examples.fingerprint() for one in sets}) == 3


def test_the_codes_version_follows_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "__file__", str(tmp_path / "prepared.py"))
    versions = []
    for text in ("a = 1", "a = 2"):
        (tmp_path / "rendering.py").write_text(text)
        prepared._code_version.cache_clear()
        versions.append(prepared._code_version())
    prepared._code_version.cache_clear()
    assert versions[0] != versions[1]


# Whole or not there


def test_after_a_failure_in_the_middle_the_next_run_begins_anew(
    make_spec: SpecMaker,
    tiny_tokenizer: PreTrainedTokenizerFast,
    rows_at: Callable[..., Path],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = rows_at(ROWS)
    monkeypatch.setattr(workers, "_BATCH", 10)
    with monkeypatch.context() as patch:
        calls, call = [], prepared.RowTokenizer.__call__

        def fails_later(self: Any, units: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return call(self, units)

        patch.setattr(prepared.RowTokenizer, "__call__", fails_later)
        with pytest.raises(KeyboardInterrupt):
            prepare([file], make_spec(), tiny_tokenizer, 1)
    assert sets_in(cache) == []
    assert len(prepare([file], make_spec(), tiny_tokenizer, 1).examples) == 30


def test_what_a_killed_run_left_is_no_part_of_the_set(
    make_spec: SpecMaker, tiny_tokenizer: PreTrainedTokenizerFast, rows_at: Callable[..., Path], cache: Path
) -> None:
    file = rows_at(ROWS)
    whole = prepare([file], make_spec(), tiny_tokenizer, 1).examples.fingerprint()
    (name,) = sets_in(cache)
    (cache / name).rename(cache / f"{name}.partial")
    (cache / f"{name}.partial" / "examples.arrow").write_bytes(b"half")
    (cache / f"{name}.partial" / "other").write_bytes(b"of older code")
    assert prepare([file], make_spec(), tiny_tokenizer, 1).examples.fingerprint() == whole
    assert sets_in(cache) == [name]
    assert sorted(path.name for path in (cache / name).iterdir()) == ["examples.arrow", "report.json"]


SCRIPT = """
import sys
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from qlora_lightning.data.prepared import prepare
from qlora_lightning.data.spec import DataPath, DatasetSpec
tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
made = prepare([Path(sys.argv[2])], DatasetSpec(path=DataPath(sys.argv[2])), tokenizer, 1)
print(made.rows, made.examples.fingerprint())
"""


def test_two_processes_at_once_make_one_set(
    make_spec: SpecMaker, tiny_base: Path, tiny_tokenizer: PreTrainedTokenizerFast, rows_at: Callable[..., Path], cache: Path
) -> None:
    file = rows_at(ROWS * 20)
    command = [sys.executable, "-c", SCRIPT, str(tiny_base), str(file)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], answers
    here = prepare([file], make_spec(path=str(file)), tiny_tokenizer, 1)
    assert {out.strip() for out, _ in answers} == {f"600 {here.examples.fingerprint()}"}
    assert len(sets_in(cache)) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written_is_one_line(
    make_spec: SpecMaker, tiny_tokenizer: PreTrainedTokenizerFast, rows_at: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir(mode=0o500)
    with pytest.raises(UserError, match=r"cannot be written \(Permission denied\); set QLORA_LIGHTNING_CACHE to a folder that can$"):
        prepare([rows_at(ROWS)], make_spec(), tiny_tokenizer, 1)


def test_a_cache_that_is_a_file_is_one_line(
    make_spec: SpecMaker, tiny_tokenizer: PreTrainedTokenizerFast, rows_at: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(UserError, match=rf"prepared data is kept in {tmp_path}/cache, which cannot be written \(Not a directory\); set"):
        prepare([rows_at(ROWS)], make_spec(), tiny_tokenizer, 1)


# Processes


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes from the third batch of four rows on."""
    monkeypatch.setattr(workers, "_BATCH", 4)
    monkeypatch.setattr(workers, "_ALONE", 2)


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the pools of worker processes that were made."""
    sizes, pool = [], workers.ProcessPoolExecutor

    def counted(processes: int, *arguments: Any, **options: Any) -> Any:
        sizes.append(processes)
        return pool(processes, *arguments, **options)

    monkeypatch.setattr(workers, "ProcessPoolExecutor", counted)
    return sizes


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("template", ["chatml", "tokenizer"])
def test_more_processes_give_the_same_examples_in_the_same_order(
    make_spec: SpecMaker, tiny_tokenizer: PreTrainedTokenizerFast, rows_at: Callable[..., Path], pools: list[int], template: str
) -> None:
    rows = [*ROWS, turns("q", ""), {"messages": 1}, turns("say <|im_end|>", "a")]
    spec, tokenizer = make_spec(template=template, bad_rows="skip", max_length=80), tiny_tokenizer
    if template == "tokenizer":
        tokenizer = with_chat(tiny_tokenizer)
    alone = list(prepared.tokenized(read_rows(rows_at(rows)), spec, tokenizer, 1))
    assert pools == []
    together = prepare([rows_at(rows)], spec, tokenizer, 2)
    assert pools == [2]
    examples = TokenizedDataset.from_batches([chunk.batch for chunk in alone], "")
    assert examples_of(together.examples) == examples_of(examples)
    assert all(np.array_equal(examples.columns[name], together.examples.columns[name]) for name in examples.columns)
    assert together.skipped == [found for chunk in alone for found in chunk.skipped]
    assert together.bad == [line for chunk in alone for line in chunk.bad]
    assert together.rows == 33


@pytest.mark.usefixtures("small_batches")
def test_a_wrong_row_in_a_worker_is_the_same_line(
    make_spec: SpecMaker, tiny_tokenizer: PreTrainedTokenizerFast, rows_at: Callable[..., Path], pools: list[int], cache: Path
) -> None:
    file = rows_at([*ROWS, turns("q", "a") | {"messages": None}])
    with pytest.raises(UserError) as error:
        prepare([file], make_spec(), tiny_tokenizer, 2)
    assert str(error.value).startswith(f"{file}:31: the row needs a list 'messages' of role and content, found messages; correct it")
    assert "\n" not in str(error.value)
    assert pools == [2]
    assert sets_in(cache) == []


def test_few_rows_need_no_worker(
    make_spec: SpecMaker, tiny_tokenizer: PreTrainedTokenizerFast, rows_at: Callable[..., Path], pools: list[int]
) -> None:
    prepare([rows_at(ROWS)], make_spec(), tiny_tokenizer, 2)
    assert pools == []


# Rows


def test_wrong_rows_are_skipped_and_the_first_lines_kept(
    make_spec: SpecMaker, tiny_tokenizer: PreTrainedTokenizerFast, rows_at: Callable[..., Path]
) -> None:
    file = rows_at([turns("q", "a"), *([{"messages": None}, turns("", "a")] * 60), turns("q", "a")])
    made = prepare([file], make_spec(bad_rows="skip"), tiny_tokenizer, 1)
    _, report = made.part(np.arange(made.rows))
    assert (report.rows, report.kept, report.skipped) == (122, 2, {"bad row": 120})
    assert len(made.bad) == 100
    assert made.bad[0].startswith(f"{file}:2: the row needs a list 'messages'")
    assert made.bad[1].startswith(f"{file}:3: message 1: field 'content' must not be empty")


def test_by_default_a_wrong_row_ends_the_command(
    make_spec: SpecMaker, tiny_tokenizer: PreTrainedTokenizerFast, rows_at: Callable[..., Path]
) -> None:
    file = rows_at([turns("q", "a"), turns("q", "a") | {"messages": [{"role": "bot", "content": "x"}]}])
    with pytest.raises(UserError, match=f"^{file}:2: message 1: a role must be one of .*, got 'bot'; correct or remove the row$"):
        prepare([file], make_spec(), tiny_tokenizer, 1)


def test_mapped_examples_are_those_in_memory(
    make_spec: SpecMaker, tiny_tokenizer: PreTrainedTokenizerFast, rows_at: Callable[..., Path]
) -> None:
    rows = [*ROWS, turns("q", ""), turns("q", "</s>")]
    made = prepare([rows_at(rows)], make_spec(), tiny_tokenizer, 1)
    in_memory, in_memory_report = prepare_rows(located(*rows), make_spec(), tiny_tokenizer)
    mapped, report = made.part(np.arange(made.rows))
    assert examples_of(mapped) == examples_of(in_memory)
    assert report == in_memory_report
    assert (report.rows, report.kept, report.respelled) == (32, 31, 1)
    assert not mapped[0].input_ids.flags.writeable


def test_a_rows_examples_are_told_by_its_number(
    make_spec: SpecMaker, tiny_tokenizer: PreTrainedTokenizerFast, rows_at: Callable[..., Path]
) -> None:
    """Row 1 is left out and row 2 gives two examples."""
    reworded = [{"instruction": "c", "input": "", "output": "d"}]
    rows = [{"instruction": "a", "instances": [{"input": "", "output": output}]} for output in ("x", "", "y", "z")]
    rows[2]["reformulations"] = reworded
    made = prepare([rows_at(rows)], make_spec(template="plain"), tiny_tokenizer, 1)
    assert made.examples.columns["row"].tolist() == [0, 2, 2, 3]
    examples, report = made.part(np.array([3, 1, 2]))
    assert examples_of(examples) == examples_of(made.examples)[1:]
    assert (report.rows, report.kept, report.skipped) == (3, 3, {"empty answer": 1})
    assert report.tokens == int(examples.lengths.sum()) == 4 + 4 + 4
    with pytest.raises(UserError, match="no row of the data set is left to use: 1 empty answer, of 1 rows"):
        made.part(np.array([1]))


@pytest.mark.parametrize("kind", ["rows.json", "rows.jsonl.gz", "rows.parquet", "folder"])
def test_copies_of_the_rows_in_other_kinds_of_files_give_the_same_examples(
    make_spec: SpecMaker, tiny_tokenizer: PreTrainedTokenizerFast, rows_at: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    (tmp_path / "folder").mkdir()
    file = tmp_path / kind
    if kind == "rows.json":
        file.write_text(json.dumps(ROWS))
    elif kind == "rows.jsonl.gz":
        file.write_bytes(gzip.compress(rows_at(ROWS).read_bytes()))
    elif kind == "rows.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    else:
        rows_at(ROWS[:7], "folder/a.jsonl")
        rows_at(ROWS[7:], "folder/b.jsonl")
    as_lines, copy = (prepare([path], make_spec(), tiny_tokenizer, 1).examples for path in (rows_at(ROWS), file))
    assert examples_of(copy) == examples_of(as_lines)
    assert copy.fingerprint() == as_lines.fingerprint()


def test_several_files_are_read_one_after_the_other(
    make_spec: SpecMaker, tiny_tokenizer: PreTrainedTokenizerFast, rows_at: Callable[..., Path]
) -> None:
    files = [rows_at(ROWS[:20], "b.jsonl"), rows_at(ROWS[20:], "a.jsonl")]
    whole = prepare([rows_at(ROWS)], make_spec(), tiny_tokenizer, 1).examples
    assert prepare(files, make_spec(), tiny_tokenizer, 1).examples.fingerprint() == whole.fingerprint()
    assert prepare(files[::-1], make_spec(), tiny_tokenizer, 1).examples.fingerprint() != whole.fingerprint()


# The data set and its fingerprint


@pytest.fixture
def made(make_spec: SpecMaker, tiny_tokenizer: PreTrainedTokenizerFast, rows_at: Callable[..., Path]) -> Callable[..., Prepared]:
    """Prepares rows in a file of their own."""
    return lambda *rows, **fields: prepare([rows_at(list(rows))], make_spec(**fields), tiny_tokenizer, 1)


@pytest.mark.parametrize("change", [turns("q", "b"), turns("r", "a"), turns("q", "aa")])
def test_the_fingerprint_sees_every_change(made: Callable[..., Prepared], change: dict[str, Any]) -> None:
    first, second = (made(row).examples.fingerprint() for row in (turns("q", "a"), change))
    assert first != second
    assert len(first) == 64


def test_the_fingerprint_sees_labels_borders_and_order(made: Callable[..., Prepared]) -> None:
    spoken = turns("q", "a")
    all_of_it, answers = (made(spoken, template="guanaco", train_on_source=source).examples for source in (True, False))
    assert np.array_equal(all_of_it[0].input_ids, answers[0].input_ids)
    assert all_of_it.fingerprint() != answers.fingerprint()
    assert made(spoken, turns("r", "b")).examples.fingerprint() != made(turns("r", "b"), spoken).examples.fingerprint()


def test_the_fingerprint_does_not_see_how_the_same_examples_were_named(made: Callable[..., Prepared]) -> None:
    first, second = (made(turns("q", "a"), name=name).examples.fingerprint() for name in ("a/b", "c"))
    assert first == second


def test_some_rows_have_a_fingerprint_of_their_own(made: Callable[..., Prepared]) -> None:
    dataset = made(*ROWS).examples
    parts = [dataset.of_rows(np.array(rows)) for rows in ([1, 2], [2, 1], [1, 3], [1])]
    prints = [part.fingerprint() for part in parts]
    assert prints[0] == prints[1]  # the rows are a set: their order is the data's
    assert len({*prints, dataset.fingerprint()}) == 4
    assert examples_of(parts[1]) == examples_of(dataset)[1:3]


def test_batches_do_not_change_the_examples(made: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = made(*ROWS).examples
    monkeypatch.setattr(workers, "_BATCH", 7)
    parts = made(*ROWS, name="again").examples
    assert examples_of(parts) == examples_of(whole)
    assert len(parts._tokens) == 5


def test_a_mix_is_its_sets_one_after_the_other(made: Callable[..., Prepared], tmp_path: Path) -> None:
    first, second = made(*ROWS[:20]).examples, made(*ROWS[20:]).examples.of_rows(np.array([1, 4]))
    mixed = TokenizedDataset.mixed([(first, 1.0), (second, 0.5)])
    assert mixed.parts == [(20, 1.0), (2, 0.5)]
    assert examples_of(mixed) == examples_of(first) + examples_of(second)
    assert mixed.targets.tolist() == [*first.targets, *second.targets]
    assert TokenizedDataset.mixed([(first, 2.0)]).fingerprint() == first.fingerprint()
    others = [[(first, 1.0), (second, 0.25)], [(second, 0.5), (first, 1.0)], [(first, 1.0)]]
    assert len({TokenizedDataset.mixed(sets).fingerprint() for sets in others} | {mixed.fingerprint()}) == 4


# What is seen of it


def test_a_bar_is_shown_on_a_terminal_only(
    made: Callable[..., Prepared], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made(*ROWS)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(workers.console, "is_interactive", True)
    monkeypatch.setattr(workers, "is_live", lambda: True)
    nothing = pyarrow.RecordBatch.from_pylist([], SCHEMA)

    def slowly() -> Iterator[Chunk]:
        for _ in range(3):
            sleep(0.15)  # longer than between two paintings of the bar
            yield Chunk(1500, nothing, [], [])

    assert len(list(workers.shown(slowly(), 4500, "Tokenizing mine"))) == 3
    shown = capfd.readouterr()
    assert shown.out == ""
    assert re.search("Tokenizing mine .*1,500 rows.* rows/s", shown.err)


def test_what_took_long_is_said_with_its_rate(
    made: Callable[..., Prepared], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setattr(prepared, "_SAID_FROM", 0.0)
    made(*ROWS, name="mine")
    (folder,) = sets_in(cache)
    line = capfd.readouterr().err.strip()
    assert line.startswith("Prepared mine: 30 rows in ")
    assert line.endswith(f" rows/s), kept in {cache / folder}")


def test_progress_is_a_line_now_and_then_elsewhere(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter(range(0, 1000, 15))  # seconds
    monkeypatch.setattr(workers, "perf_counter", lambda: float(next(clock)))
    chunks = [Chunk(100, pyarrow.RecordBatch.from_pylist([], SCHEMA), [], []) for _ in range(4)]
    assert list(workers.shown(chunks, 400, "Tokenizing rows")) == chunks
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Tokenizing rows: 200 of 400 rows, 4 rows/s"
    assert len(lines) == 2


# What goes wrong afterwards


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b"\xff\xfe", b'{"rows": 1'])
def test_a_damaged_set_is_made_anew(made: Callable[..., Prepared], cache: Path, tokenizations: list[int], damage: bytes) -> None:
    whole = made(*ROWS)
    (folder,) = sets_in(cache)
    (cache / folder / "report.json").write_bytes(damage)
    assert made(*ROWS).examples.fingerprint() == whole.examples.fingerprint()
    (cache / folder / "examples.arrow").write_bytes(b"ARROW1")
    assert made(*ROWS).rows == whole.rows
    assert len(tokenizations) == 3


def test_another_layout_of_a_folder_is_another_set(
    make_spec: SpecMaker, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, rows_at: Callable[..., Path]
) -> None:
    """The order of the files is the order of the rows; a file that was hidden and is no more brings rows."""
    folder = tmp_path / "set"
    for name, text in (("a", "one"), (".b", "two")):
        (folder / name).mkdir(parents=True)
        rows_at([turns("q", text)]).rename(folder / name / "r.jsonl")

    def answers() -> list[str]:
        examples = prepare([folder], make_spec(), tiny_tokenizer, 1).examples
        return [str(tiny_tokenizer.decode(labels[labels >= 0].tolist())) for labels in (examples[n].labels for n in range(len(examples)))]

    assert answers() == ["one<|im_end|>"]
    (folder / ".b").rename(folder / "b")
    assert answers() == ["one<|im_end|>", "two<|im_end|>"]
    (folder / "a").rename(folder / "c")
    assert answers() == ["two<|im_end|>", "one<|im_end|>"]


@pytest.mark.usefixtures("small_batches")
def test_a_process_that_is_killed_is_one_line(
    rows_at: Callable[..., Path],
    make_spec: SpecMaker,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    cache: Path,
) -> None:
    """SIGKILL, as from the kernel when memory is out, while rows are still being read; nothing of the set is left."""
    read = prepared.read_files

    def killing(*arguments: Any) -> Iterator[Any]:
        for number, row in enumerate(read(*arguments)):
            if number == 20:
                children = multiprocessing.active_children()
                assert children
                for child in children:
                    child.kill()
            yield row

    monkeypatch.setattr(prepared, "read_files", killing)
    with pytest.raises(UserError, match=r"a process that tokenizes was killed, likely for lack of memory; set --data\.num_proc 1"):
        prepare([rows_at(ROWS * 4)], make_spec(), tiny_tokenizer, 2)
    assert sets_in(cache) == []


@pytest.mark.parametrize("change", ["append", "cut", "remove", "rewrite"])
def test_a_file_that_changes_while_it_is_prepared_is_not_kept(
    rows_at: Callable[..., Path],
    make_spec: SpecMaker,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    cache: Path,
    change: str,
) -> None:
    """Else its rows would be found again under the name of those that it had before."""
    file, read = rows_at(ROWS), prepared.read_files
    text = file.read_text()

    def changing(*arguments: Any) -> Iterator[Any]:
        for number, row in enumerate(read(*arguments)):
            if number == 5:
                match change:
                    case "append":
                        file.write_text(text + text)
                    case "cut":
                        os.truncate(file, len(text) // 2)
                    case "rewrite":
                        file.write_text(text.replace("question", "QUESTION"))
                    case "remove":
                        file.unlink()
            yield row

    monkeypatch.setattr(prepared, "read_files", changing)
    said = {
        "append": f"changed from {len(text):,} to {2 * len(text):,} bytes",
        "cut": f"changed from {len(text):,} to {len(text) // 2:,} bytes",
    }
    said |= {"rewrite": "written to", "remove": "removed"}
    with pytest.raises(UserError, match=rf"^{file} was {said[change]} while it was being read; put it back"):
        prepare([file], make_spec(), tiny_tokenizer, 1)
    assert sets_in(cache) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(
    rows_at: Callable[..., Path],
    make_spec: SpecMaker,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    cache: Path,
) -> None:
    write = prepared._write
    monkeypatch.setattr(prepared, "_write", lambda file, chunks: write(Path("/dev/full"), chunks))
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); set QLORA_LIGHTNING_CACHE to a folder that can$"):
        prepare([rows_at(ROWS)], make_spec(), tiny_tokenizer, 1)
    assert sets_in(cache) == []


def test_a_set_that_is_there_needs_no_right_to_write(
    rows_at: Callable[..., Path], make_spec: SpecMaker, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare([rows_at(ROWS)], make_spec(), tiny_tokenizer, 1).examples.fingerprint()

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refused)
    monkeypatch.setattr(prepared, "FileLock", refused)
    assert prepare([rows_at(ROWS)], make_spec(), tiny_tokenizer, 1).examples.fingerprint() == whole


def test_who_waits_for_another_process_says_so(
    rows_at: Callable[..., Path],
    make_spec: SpecMaker,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    cache: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(prepared, "_SAID_FROM", 0.1)
    target = cache / prepared._key([rows_at(ROWS)], make_spec(), tiny_tokenizer)
    cache.mkdir(parents=True)
    with ThreadPoolExecutor(1) as thread, FileLock(f"{target}.lock"):
        waiting = thread.submit(prepare, [rows_at(ROWS)], make_spec(), tiny_tokenizer, 1)
        while f"Waiting for another process that prepares {target.name}" not in (said := "".join(capsys.readouterr().err.split("\n"))):
            assert not said
            sleep(0.05)
        assert not waiting.done()
    assert waiting.result().rows == len(ROWS)
