"""Rows come from any kind of file, folder or archive, one after the other; what is wrong with one is said with file and line."""

import csv
import gzip
import json
import zipfile
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.parquet
import pytest

from qlora_lightning.data import files
from qlora_lightning.data.files import data_files, place, read_lines, read_rows
from qlora_lightning.errors import UserError

ROWS = [{"prompt": "Größe?", "response": "zwei\nZeilen, mit Komma"}, {"prompt": "b", "response": '"q"'}]


def write(path: Path) -> Path:
    kind = path.name.lower().removesuffix(".gz").rsplit(".")[-1]
    if kind in ("parquet", "arrow"):
        table = pyarrow.Table.from_pylist(ROWS)
        if kind == "parquet":
            pyarrow.parquet.write_table(table, path)
        else:
            with (pyarrow.ipc.new_file if "file" in path.name else pyarrow.ipc.new_stream)(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=1)
        return path
    with gzip.open(path, "wt", encoding="utf-8") if path.suffix.lower() == ".gz" else path.open("w", encoding="utf-8", newline="") as file:
        if kind == "json":
            json.dump(ROWS, file, ensure_ascii=False)
        elif kind == "jsonl":
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))
        else:
            writer = csv.DictWriter(file, ["prompt", "response"], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    return path


KINDS = ["r.json", "r.jsonl", "r.csv", "r.tsv", "r.parquet", "stream.arrow", "file.arrow"]
GZIPPED = ["r.json.gz", "r.jsonl.gz", "r.csv.gz", "r.tsv.gz"]


@pytest.mark.parametrize("name", [*KINDS, *GZIPPED, "R.JSONL", "R.CSV.GZ", "a.b.json"])
def test_every_kind_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    assert [row for _, row in read_rows(write(tmp_path / name))] == ROWS


@pytest.mark.parametrize("name", [*KINDS, *GZIPPED])
def test_every_kind_can_lie_in_an_archive(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(write(tmp_path / name), f"inner/{name}")
    assert [row for _, row in read_rows(tmp_path / "set.zip")] == ROWS


def test_rows_are_named_as_a_reader_finds_them(tmp_path: Path) -> None:
    """The line, or for kinds without lines the number."""
    lines = tmp_path / "r.jsonl"
    lines.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert [where for where, _ in read_rows(lines)] == [f"{lines}:1", f"{lines}:3"]
    table = write(tmp_path / "r.csv")
    assert [where for where, _ in read_rows(table)] == [f"{table}:3", f"{table}:4"]  # the first row spans lines 2 and 3
    for name in ("r.json", "r.parquet", "file.arrow"):
        file = write(tmp_path / name)
        assert [where for where, _ in read_rows(file)] == [f"{file}: row 1", f"{file}: row 2"]
    assert (place("x/r.tsv.gz", 2), place("x/r.json", 2)) == ("x/r.tsv.gz:2", "x/r.json: row 2")


def test_a_folder_is_read_file_by_file_and_what_is_no_data_passed_over(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/z.jsonl", "a/b/c.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"from": name}) + "\n")
    other = ["README.md", "dataset_info.json", "a/state.json", "dataset_dict.json", "b.jsonl.lock", ".hidden.jsonl", ".git/x.jsonl"]
    (tmp_path / ".git").mkdir()
    for name in other:
        (tmp_path / name).write_text("no rows")
    read = list(read_rows(tmp_path))
    assert [row["from"] for _, row in read] == ["a/b/c.jsonl", "a/z.jsonl", "b.jsonl"]
    assert read[0][0] == f"{tmp_path}/a/b/c.jsonl:1"


def test_rows_of_an_archive_are_named_by_archive_file_and_line(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("core.jsonl", '{"a": 1}\n{"a": 2}\n')
        archive.writestr("__MACOSX/._core.jsonl", "\0")
        archive.writestr("notes.txt", "no rows")
    assert [where for where, _ in read_rows(tmp_path / "set.zip")] == [f"{tmp_path}/set.zip/core.jsonl:{line}" for line in (1, 2)]
    assert len(list(read_rows(tmp_path))) == 2  # also where the archive lies in a folder


def test_only_the_first_rows_of_each_file_where_so_asked(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.json", "c.parquet"):
        write(tmp_path / name)
    assert [row for _, row in read_rows(tmp_path, most=1)] == ROWS[:1] * 3


@pytest.mark.parametrize("name", ["r.json", "r.jsonl", "r.csv"])
def test_a_row_is_given_before_the_next_is_decoded(tmp_path: Path, name: str) -> None:
    """What is wrong further on does not keep the rows before it back, and they are never all in memory."""
    file = write(tmp_path / name)
    file.write_text(file.read_text(encoding="utf-8").rstrip("]\n") + '{"broken"\n"', encoding="utf-8")
    rows = read_rows(file)
    assert next(rows)[1] == ROWS[0]
    with pytest.raises(UserError, match="broken"):
        list(rows)


def test_rows_of_columns_come_in_small_parts(tmp_path: Path) -> None:
    """One batch of 2,500 rows is read in three parts, and keeps its order."""
    table = pyarrow.table({"n": list(range(2500))})
    with pyarrow.ipc.new_file(tmp_path / "r.arrow", table.schema) as writer:
        writer.write_table(table)
    assert [row["n"] for _, row in read_rows(tmp_path / "r.arrow")] == list(range(2500))


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_bytes(b"\xef\xbb\xbfprompt,response\na,b\n")
    (tmp_path / "r.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n')
    assert next(read_rows(tmp_path / "r.csv"))[1] == {"prompt": "a", "response": "b"}
    assert next(read_rows(tmp_path / "r.jsonl"))[1] == {"prompt": "a"}


def test_a_csv_field_may_be_long(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert len(next(read_rows(tmp_path / "r.csv"))[1]["text"]) == 200_000


@pytest.mark.parametrize("name", ["r.json", "r.jsonl", "r.csv", "r.parquet"])
def test_a_row_of_more_than_four_million_characters_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All text of a row counts together, also inside lists; 20 stands for four million here."""
    monkeypatch.setattr(files, "_MAX_ROW", 20)
    monkeypatch.setitem(globals(), "ROWS", [{"prompt": "x" * 9, "response": "y" * 11}, {"prompt": "x" * 10, "response": "y" * 11}])
    file = write(tmp_path / name)
    rows = read_rows(file)
    next(rows)
    with pytest.raises(UserError) as error:
        next(rows)
    row = ":3" if name == "r.csv" else ":2" if name == "r.jsonl" else ": row 2"
    assert str(error.value) == f"{file}{row}: a row may hold 20 characters at most, got 21; split or remove the row"


def test_text_inside_lists_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert files._MAX_ROW == 4_000_000
    monkeypatch.setattr(files, "_MAX_ROW", 20)
    (tmp_path / "r.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "x" * 17}]}))
    with pytest.raises(UserError, match="20 characters at most, got 21"):
        list(read_rows(tmp_path / "r.jsonl"))


def test_an_open_quote_does_not_swallow_a_large_file(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text('a\n1\n"' + "x\n" * 2_100_000)
    with pytest.raises(UserError, match=r"r.csv:3: broken CSV \(field larger than field limit \(4000000\)\); correct the quotes"):
        list(read_rows(tmp_path / "r.csv"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.txt", b"x", "r.txt: a data set must be .json, .jsonl, .csv, .tsv (each also .gz), .parquet, .arrow, a .zip"),
        ("r", b"x", "r: a data set must be .json"),
        ("r.parquet.gz", b"x", "a data set must be .json"),
        ("r.zip.gz", b"x", "a data set must be .json"),
        ("r.jsonl", b"", "r.jsonl: the file has no rows"),
        ("r.json", b"[]", "r.json: the file has no rows"),
        ("r.csv", b"prompt,response\n", "r.csv: the file has no rows"),
        ("r.jsonl", b'{"a": 1}\n{"a": \n', "r.jsonl:2: broken JSON (Expecting value, column"),
        ("r.json", b'[{"a": 1},\n {"b" 2}]', "r.json:2: broken JSON (Expecting ':' delimiter, column 7)"),
        ("r.json", b'[{"a": 1}\n {"a": 2}]', "r.json:2: broken JSON (Expecting ',' delimiter, column 2)"),
        ("r.json", b'[{"a": 1},\n', "r.json:2: broken JSON (Expecting value, column 1)"),
        ("r.json", b'[{"a": 1}]\n[]', "r.json:2: broken JSON (Extra data, column 1)"),
        ("r.json", b" ", "r.json:1: broken JSON (Expecting value"),
        ("r.jsonl", b'{"a": 1}\n{"a": ' + b"9" * 5000 + b"}", "r.jsonl:2: broken JSON (Exceeds the limit"),
        ("r.jsonl", b"[" * 100_000, "r.jsonl:1: broken JSON (maximum recursion depth"),
        ("r.json", b'{"a": 1}', "r.json: a .json data set must be one list of rows, got dict; use .jsonl"),
        ("r.jsonl", b'{"a": 1}\n[1]\n', "r.jsonl:2: a row must be an object with named fields, got list"),
        ("r.json", b'[{"a": 1}, "x"]', "r.json: row 2: a row must be an object with named fields, got str"),
        ("r.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "r.jsonl:2: text must be UTF-8, found byte 0xff"),
        ("r.json", b'[\n\n{"a": "\xe9"}]', "r.json:3: text must be UTF-8, found byte 0xe9"),
        ("r.csv", b"a,b\n1,2\n3\n", "r.csv:3: the row must have as many fields as the header"),
        ("r.tsv", b"a\tb\n1,2\n", "r.tsv:2: the row must have as many fields as the header"),
        ("r.csv", b'a,b\n"1\n1",2\n\xff,2\n', "r.csv:4: text must be UTF-8, found byte 0xff"),
        ("r.csv", b"a,b\n1,2,3\n", "r.csv:2: the row must have as many fields as the header"),
        ("r.csv", b'a,b\n"x"y,2\n', "r.csv:2: broken CSV (',' expected"),
        ("r.csv", b'a,b\n"x,2\ny\n', "r.csv:2: broken CSV (unexpected end of data)"),
        ("r.parquet", b"not parquet", "r.parquet: cannot be read (Parquet"),
        ("r.arrow", b"not arrow", "r.arrow: cannot be read ("),
        ("r.zip", b"not zip", "r.zip: cannot be read (File is not a zip file)"),
        ("r.jsonl.gz", b"not gzip", "r.jsonl.gz: cannot be read (Not a gzipped file"),
        ("r.jsonl.gz", gzip.compress(b'{"a": 1}\n', mtime=0)[:-4], "r.jsonl.gz: cannot be read"),
        ("r.jsonl.gz", gzip.compress(b'{"a": 1}\n', mtime=0)[:10] + b"\xff" * 20, "r.jsonl.gz: cannot be read (Error -3"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        list(read_rows(tmp_path / name))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files_and_folders_without_data_are_told_apart(tmp_path: Path) -> None:
    for name in ("none.jsonl", "none"):
        with pytest.raises(UserError, match=rf"{name}: no such file or folder; give one that exists"):
            list(read_rows(tmp_path / name))
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "folder.jsonl" / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"folder.jsonl: no data file is in it; put in at least one that is .json"):
        list(read_rows(tmp_path / "folder.jsonl"))


def test_what_is_wrong_inside_an_archive_is_named_there(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("core.jsonl", '{"a": 1}\n{"a"\n')
    with pytest.raises(UserError, match=r"set.zip/core.jsonl:2: broken JSON"):
        list(read_rows(tmp_path / "set.zip"))
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("notes.txt", "x")
    with pytest.raises(UserError, match=r"empty.zip: no data file is in it"):
        list(read_rows(tmp_path / "empty.zip"))


URL = "hf://datasets/someone/rows@0123abc/sub/train.jsonl.gz"


def test_a_file_of_the_hub_is_read_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(url: str) -> IO[bytes]:
        assert url == URL
        return write(tmp_path / "r.jsonl.gz").open("rb")

    monkeypatch.setattr(files, "open_url", opened)
    assert list(read_rows(URL)) == [(f"{URL}:1", ROWS[0]), (f"{URL}:2", ROWS[1])]


def test_a_connection_that_breaks_while_reading_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __enter__(self) -> "Broken":
            return self

        def __exit__(self, *_: Any) -> None: ...

        def readline(self, size: int) -> bytes:
            raise ConnectionError("reset by peer")

    monkeypatch.setattr(files, "open_url", lambda url: Broken())
    with pytest.raises(
        UserError, match=r"train.jsonl of the hub data set someone/rows cannot be fetched \(reset by peer\); check the conn"
    ):
        list(read_rows("hf://datasets/someone/rows@0123abc/train.jsonl"))


def test_lines_of_text_without_blank_ones(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfone\r\n\n two \xe2\x80\xa8 parts\n")
    assert list(read_lines(tmp_path / "p.txt")) == [(1, "one"), (3, " two \u2028 parts")]
    (tmp_path / "p.txt").write_text("\n \n")
    with pytest.raises(UserError, match=r"p\.txt: the file has no lines; give one with at least one line"):
        list(read_lines(tmp_path / "p.txt"))


def test_a_folder_is_read_through_links_and_a_link_back_is_no_endless_way(tmp_path: Path) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "folder"
    for made in (elsewhere, folder):
        made.mkdir()
        (made / "r.jsonl").write_text(json.dumps({"prompt": made.name}) + "\n")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "back").symlink_to(folder)
    assert [row["prompt"] for _, row in read_rows(folder)] == ["elsewhere", "folder"]
    assert [file.relative_to(folder).as_posix() for file in data_files(folder)] == ["linked/r.jsonl", "r.jsonl"]


def test_a_time_that_python_cannot_tell_is_one_line(tmp_path: Path) -> None:
    times = pyarrow.array([2**58], pyarrow.timestamp("ms"))
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["q"], "when": times}), tmp_path / "r.parquet")
    with pytest.raises(UserError, match=r"r\.parquet: cannot be read \(.*\); check the file"):
        list(read_rows(tmp_path / "r.parquet"))


def test_json_lines_under_the_name_of_a_list_are_read(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert [row["prompt"] for _, row in read_rows(tmp_path / "r.json")] == ["a", "b"]
    (tmp_path / "r.json").write_text('{"prompt": "a"}\n{"prompt" "b"}\n')
    with pytest.raises(UserError, match=r"r\.json:2: broken JSON"):
        list(read_rows(tmp_path / "r.json"))
