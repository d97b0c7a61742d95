"""Rows come from anywhere: files that lie about their size, names that lead elsewhere, rows that no reader was made for."""

import gzip
import json
import pickle
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from canary import Canary

from qlora_lightning.data.files import read_lines, read_rows
from qlora_lightning.errors import UserError

ROW = {"prompt": "a", "response": "b"}


def line(path: Path) -> str:
    """What a user is told of a file that is refused."""
    with pytest.raises(UserError) as refused:
        list(read_rows(path))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_the_canary_sings(tmp_path: Path) -> None:
    """What the other tests plant does run where a pickle is read."""
    pickle.loads(pickle.dumps(Canary(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["../../outside.jsonl", "/tmp/outside.jsonl", "C:\\outside.jsonl", "a/../../../outside.jsonl"])
def test_a_name_in_an_archive_leads_nowhere(name: str, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    archive = tmp_path / "inner" / "rows.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(name, json.dumps(ROW))
    before = sorted(tmp_path.rglob("*"))
    if ".." in name:
        assert "no data file is in it" in line(archive)
    else:
        assert [row for _, row in read_rows(archive)] == [ROW]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_in_an_archive_is_no_link(tmp_path: Path) -> None:
    secret = tmp_path / "secret.jsonl"
    secret.write_text(json.dumps({"prompt": "secret", "response": "secret"}))
    with zipfile.ZipFile(tmp_path / "rows.zip", "w") as file:
        entry = zipfile.ZipInfo("rows.jsonl")
        entry.external_attr = 0o120777 << 16  # a symbolic link
        file.writestr(entry, str(secret))
    assert "broken JSON" in line(tmp_path / "rows.zip")


def test_an_archive_in_an_archive_is_passed_over(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "inner.zip", "w") as file:
        file.writestr("rows.jsonl", json.dumps(ROW))
    with zipfile.ZipFile(tmp_path / "rows.zip", "w") as file:
        file.write(tmp_path / "inner.zip", "inner.zip")
    assert "no data file is in it" in line(tmp_path / "rows.zip")


BOMBS = {"json": b" ", "jsonl": b" " * 99_999 + b"\n", "csv": b"a" * 99_999 + b"\n"}


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("packing", ["zip", "gz"])
def test_a_bomb_is_left_before_it_is_unpacked(kind: str, packing: str, tmp_path: Path) -> None:
    content = BOMBS[kind] * (200_000_000 // len(BOMBS[kind]))  # 200 MB that pack into 200 kB
    if packing == "gz":
        path = tmp_path / f"rows.{kind}.gz"
        path.write_bytes(gzip.compress(content))
    else:
        path = tmp_path / "rows.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr(f"rows.{kind}", content)
    assert "200 times as large as packed" in line(path)


def test_a_file_that_packs_well_is_no_bomb(tmp_path: Path) -> None:
    """80 MB of rows that are much alike, as templates make them, pack about 100 times smaller."""
    rows = "".join(json.dumps({"prompt": f"What is {n} plus {n}?", "response": "It is " + "very " * 500}) + "\n" for n in range(30_000))
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(rows.encode(), 1))
    assert len(rows) > 1 << 26
    assert sum(1 for _ in read_rows(path)) == 30_000


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_a_line_without_an_end_is_left(name: str, tmp_path: Path) -> None:
    first = b"prompt,response\n" if name == "rows.csv" else json.dumps(ROW).encode() + b"\n"
    (tmp_path / name).write_bytes(first + b'"' + b"a" * 25_000_000)
    assert f"{name}:2: a line may hold 24,000,000 bytes at most" in line(tmp_path / name)


def test_a_text_file_with_a_line_without_an_end_is_left(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"a" * 25_000_000)
    with pytest.raises(UserError, match=r"prompts.txt:1: a line may hold 24,000,000 bytes"):
        list(read_lines(tmp_path / "prompts.txt"))


@pytest.mark.parametrize("depth", [300, 900, 100_000])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_deep_nesting_is_one_line(name: str, depth: int, tmp_path: Path) -> None:
    row = '{"prompt": "a", "response": "b", "more": ' + "[" * depth + "]" * depth + "}"
    (tmp_path / name).write_text(f"[{row}]" if name == "rows.json" else row)
    assert "deep at most" in (told := line(tmp_path / name)) or "recursion" in told


@pytest.mark.parametrize(
    "content",
    [
        b'{"prompt": "a\xff", "response": "b"}',
        b"\x00\x00\x00\x00",
        b'{"prompt": NaN',
        b'{"prompt": ' + b"9" * 5000 + b"}",
        b"\xff\xfe{\x00}\x00",
        b"[" * 100_000,
    ],
    ids=["bytes", "nul", "nan", "digits", "utf-16", "brackets"],
)
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv", "rows.parquet", "rows.arrow", "rows.zip", "rows.jsonl.gz"])
def test_noise_is_one_line(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    try:
        rows = [row for _, row in read_rows(tmp_path / name)]
    except UserError as error:
        assert "\n" not in str(error)
    else:  # a CSV file is hardly ever wrong
        assert name == "rows.csv" and all(isinstance(row, dict) for row in rows)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_no_type_of_a_column_runs_code(kind: str, tmp_path: Path) -> None:
    """Arrow can name Python classes in a column's metadata, which older versions of it unpickled."""
    payload = pickle.dumps(Canary(tmp_path / "canary"))
    metadata = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": payload}
    schema = pyarrow.schema([pyarrow.field("prompt", pyarrow.string(), metadata=metadata), pyarrow.field("response", pyarrow.string())])
    table = pyarrow.Table.from_pylist([ROW], schema=schema).replace_schema_metadata({b"pandas": payload})
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    assert [row for _, row in read_rows(path)] == [ROW]
    assert not (tmp_path / "canary").exists()


def test_a_pickle_is_no_data_set(tmp_path: Path) -> None:
    for name in ("rows.pkl", "rows.pickle", "rows.pt", "rows.joblib", "rows.npy"):
        (tmp_path / name).write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
        assert "a data set must be .json, .jsonl" in line(tmp_path / name)
    assert not (tmp_path / "canary").exists()
