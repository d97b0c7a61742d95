"""Rows come from any of four kinds of file; what is wrong with one is said with file and line."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from qlora_lightning.data import files
from qlora_lightning.data.files import fetch, place, read_lines, read_rows
from qlora_lightning.data.spec import DataPath, DatasetSpec
from qlora_lightning.errors import UserError

ROWS = [{"prompt": "Größe?", "response": "zwei\nZeilen, mit Komma"}, {"prompt": "b", "response": '"q"'}]


def write(path: Path) -> Path:
    kind = path.name.lower().removesuffix(".gz").rsplit(".")[-1]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
        return path
    with gzip.open(path, "wt", encoding="utf-8") if path.suffix == ".gz" else path.open("w", encoding="utf-8", newline="") as file:
        if kind == "json":
            json.dump(ROWS, file, ensure_ascii=False)
        elif kind == "jsonl":
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))
        else:
            writer = csv.DictWriter(file, ["prompt", "response"])
            writer.writeheader()
            writer.writerows(ROWS)
    return path


@pytest.mark.parametrize("name", ["r.json", "r.jsonl", "r.csv", "r.parquet", "r.json.gz", "r.jsonl.gz", "r.csv.gz", "R.JSONL", "a.b.json"])
def test_every_kind_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    assert [row for _, row in read_rows(write(tmp_path / name))] == ROWS


def test_rows_are_numbered_as_a_reader_finds_them(tmp_path: Path) -> None:
    lines = tmp_path / "r.jsonl"
    lines.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert [number for number, _ in read_rows(lines)] == [1, 3]
    assert place(lines, 3) == f"{lines}:3"
    assert [number for number, _ in read_rows(write(tmp_path / "r.csv"))] == [3, 4]  # the first row spans lines 2 and 3
    assert place("x/r.json", 2) == "x/r.json: row 2"


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_bytes(b"\xef\xbb\xbfprompt,response\na,b\n")
    (tmp_path / "r.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n')
    assert next(read_rows(tmp_path / "r.csv"))[1] == {"prompt": "a", "response": "b"}
    assert next(read_rows(tmp_path / "r.jsonl"))[1] == {"prompt": "a"}


def test_a_csv_field_may_be_long(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert len(next(read_rows(tmp_path / "r.csv"))[1]["text"]) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.txt", b"x", "r.txt: a data set must be .json, .jsonl, .csv (each also .gz) or .parquet"),
        ("r", b"x", "r: a data set must be .json"),
        ("r.parquet.gz", b"x", "a data set must be .json"),
        ("r.jsonl", b"", "r.jsonl: the file has no rows"),
        ("r.json", b"[]", "r.json: the file has no rows"),
        ("r.csv", b"prompt,response\n", "r.csv: the file has no rows"),
        ("r.jsonl", b'{"a": 1}\n{"a": \n', "r.jsonl:2: broken JSON (Expecting value, column"),
        ("r.json", b'[{"a": 1},\n {"b" 2}]', "r.json:2: broken JSON (Expecting ':' delimiter, column 7)"),
        ("r.json", b'{"a": 1}', "r.json: a .json data set must be one list of rows, got dict; use .jsonl"),
        ("r.jsonl", b'{"a": 1}\n[1]\n', "r.jsonl:2: a row must be an object with named fields, got list"),
        ("r.json", b'[{"a": 1}, "x"]', "r.json: row 2: a row must be an object with named fields, got str"),
        ("r.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "r.jsonl:2: text must be UTF-8, found byte 0xff"),
        ("r.json", b'[\n\n{"a": "\xe9"}]', "r.json:3: text must be UTF-8, found byte 0xe9"),
        ("r.csv", b"a,b\n1,2\n3\n", "r.csv:3: the row must have as many fields as the header"),
        ("r.csv", b"a,b\n1,2,3\n", "r.csv:2: the row must have as many fields as the header"),
        ("r.csv", b'a,b\n"x"y,2\n', "r.csv:2: broken CSV (',' expected"),
        ("r.csv", b'a,b\n"x,2\ny\n', "r.csv:2: broken CSV (unexpected end of data)"),
        ("r.parquet", b"not parquet", "r.parquet: cannot be read (Parquet"),
        ("r.jsonl.gz", b"not gzip", "r.jsonl.gz: cannot be read (Not a gzipped file"),
        ("r.jsonl.gz", gzip.compress(b'{"a": 1}\n')[:-4], "r.jsonl.gz: cannot be read"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        list(read_rows(tmp_path / name))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.jsonl: no such file; give one that exists"):
        list(read_rows(tmp_path / "none.jsonl"))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match=r"folder.jsonl: cannot be read"):
        list(read_rows(tmp_path / "folder.jsonl"))


@pytest.fixture
def hub_spec(make_spec: Callable[..., DatasetSpec]) -> DatasetSpec:
    return make_spec(path=None, hub_id="someone/rows", hub_file="train.jsonl", validation_hub_file="held.jsonl", revision="0123abc")


def test_hub_files_are_fetched_at_the_pinned_revision(hub_spec: DatasetSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(*args: str, **options: str) -> str:
        asked.append((args, options))
        return f"/cache/{args[1]}"

    monkeypatch.setattr(files, "hf_hub_download", download)
    assert fetch(hub_spec) == (Path("/cache/train.jsonl"), Path("/cache/held.jsonl"))
    assert asked[0] == (("someone/rows", "train.jsonl"), {"repo_type": "dataset", "revision": "0123abc"})


def test_local_files_never_ask_the_hub(make_spec: Callable[..., DatasetSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "hf_hub_download", None)
    train, held = (write(tmp_path / name) for name in ("a.jsonl", "b.jsonl"))
    local = {"path": DataPath(train), "validation_path": DataPath(held)}
    assert fetch(make_spec(**local, hub_id="someone/rows", validation_hub_file="c.jsonl")) == (train, held)


@pytest.mark.parametrize("missing", ["path", "validation_path"])
def test_a_missing_local_file_names_its_option(make_spec: Callable[..., DatasetSpec], tmp_path: Path, missing: str) -> None:
    there, none = write(tmp_path / "a.jsonl"), tmp_path / "none.jsonl"
    spec = make_spec(**{"path": DataPath(there), "validation_path": DataPath(there), missing: DataPath(none)})
    with pytest.raises(UserError) as error:
        fetch(spec)
    assert str(error.value) == f"{none}: no such file; correct data.dataset.{missing} (relative paths count from the YAML that names them)"


def test_lines_of_text_without_blank_ones(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfone\r\n\n two \xe2\x80\xa8 parts\n")
    assert list(read_lines(tmp_path / "p.txt")) == [(1, "one"), (3, " two \u2028 parts")]
    (tmp_path / "p.txt").write_text("\n \n")
    with pytest.raises(UserError, match=r"p\.txt: the file has no lines; give one with at least one line"):
        list(read_lines(tmp_path / "p.txt"))


RESPONSE = httpx2.Response(404, request=httpx2.Request("GET", "https://hub.invalid"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            LocalEntryNotFoundError("x"),
            "the hub cannot be reached (HF_HUB_OFFLINE is set or there is no connection); go online or give a local copy",
        ),
        (OfflineModeIsEnabled("x"), "with --data.dataset.path"),
        (GatedRepoError("x", response=RESPONSE), "train.jsonl of the hub data set someone/rows is gated; accept its terms"),
        (RepositoryNotFoundError("x", response=RESPONSE), "the hub has no data set someone/rows, or not for you"),
        (RevisionNotFoundError("x", response=RESPONSE), "has no revision 0123abc; correct data.dataset.revision"),
        (RemoteEntryNotFoundError("x", response=RESPONSE), "there is no train.jsonl of the hub data set someone/rows at revision 0123abc"),
        (OSError(28, "No space left on device"), "cannot be fetched ([Errno 28] No space left on device)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_hub_refuses_is_said_in_one_line(
    hub_spec: DatasetSpec, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(files, "hf_hub_download", refuse)
    with pytest.raises(UserError) as raised:
        fetch(hub_spec)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_offline_the_real_client_ends_in_the_offline_line(hub_spec: DatasetSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"give a local copy with --data.dataset.path"):
        fetch(hub_spec)


def test_a_malformed_hub_name_is_said(make_spec: Callable[..., DatasetSpec]) -> None:
    with pytest.raises(UserError, match="hub_id must look like owner/name, got 'a b/c/d'"):
        fetch(make_spec(path=None, hub_id="a b/c/d", hub_file="x.jsonl", revision="0123abc"))
