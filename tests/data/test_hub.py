"""Where a data set's files are, and what the hub refuses, in one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from qlora_lightning.data import hub
from qlora_lightning.data.files import read_rows
from qlora_lightning.data.hub import fetch, stream_sources
from qlora_lightning.data.spec import DataPath, DatasetSpec
from qlora_lightning.errors import UserError

SpecMaker = Callable[..., DatasetSpec]


@pytest.fixture
def hub_spec(make_spec: SpecMaker) -> DatasetSpec:
    return make_spec(path=None, hub_id="someone/rows", hub_file="train.jsonl", validation_hub_file="held.jsonl", revision="0123abc")


def test_hub_files_are_fetched_at_the_pinned_revision(hub_spec: DatasetSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(*args: str, **options: str) -> str:
        asked.append((args, options))
        return f"/cache/{args[1]}"

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert fetch(hub_spec) == ([Path("/cache/train.jsonl")], [Path("/cache/held.jsonl")])
    assert asked[0] == (("someone/rows", "train.jsonl"), {"repo_type": "dataset", "revision": "0123abc"})


def test_several_hub_files_are_fetched_in_their_order(make_spec: SpecMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "hf_hub_download", lambda hub_id, file, **_: f"/cache/{file}")
    spec = make_spec(path=None, hub_id="someone/rows", hub_file=["b.parquet", "a.parquet"], revision="0123abc")
    assert fetch(spec) == ([Path("/cache/b.parquet"), Path("/cache/a.parquet")], [])


def test_streaming_names_hub_files_without_asking_the_hub(hub_spec: DatasetSpec, make_spec: SpecMaker, tmp_path: Path) -> None:
    assert stream_sources(hub_spec) == (
        ["hf://datasets/someone/rows@0123abc/train.jsonl"],
        ["hf://datasets/someone/rows@0123abc/held.jsonl"],
    )
    (tmp_path / "a.jsonl").touch()
    assert stream_sources(make_spec(path=DataPath(tmp_path / "a.jsonl"))) == ([str(tmp_path / "a.jsonl")], [])


def test_local_files_and_folders_never_ask_the_hub(make_spec: SpecMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "hf_hub_download", None)
    train, held = tmp_path / "a.jsonl", tmp_path / "held"
    train.touch()
    held.mkdir()
    local = {"path": DataPath(train), "validation_path": DataPath(held)}
    assert fetch(make_spec(**local, hub_id="someone/rows", validation_hub_file="c.jsonl")) == ([train], [held])


@pytest.mark.parametrize("missing", ["path", "validation_path"])
def test_a_missing_local_file_names_its_option(make_spec: SpecMaker, tmp_path: Path, missing: str) -> None:
    there, none = tmp_path / "a.jsonl", tmp_path / "none.jsonl"
    there.touch()
    spec = make_spec(**{"path": DataPath(there), "validation_path": DataPath(there), missing: DataPath(none)})
    with pytest.raises(UserError) as error:
        fetch(spec)
    assert str(error.value) == f"{none}: no such file; correct data.dataset.{missing} (relative paths count from the YAML that names them)"


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
@pytest.mark.parametrize("streamed", [False, True])
def test_what_the_hub_refuses_is_said_in_one_line(
    hub_spec: DatasetSpec, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str, streamed: bool
) -> None:
    """The same line for a download and for a file that is read where it is."""

    class Refusing:
        def __init__(self, *_: Any, **__: Any) -> None:
            raise error

    monkeypatch.setattr(hub, "HfFileSystem" if streamed else "hf_hub_download", Refusing)
    with pytest.raises(UserError) as raised:
        list(read_rows(stream_sources(hub_spec)[0][0])) if streamed else fetch(hub_spec)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_the_file_system_calls_missing_is_told_apart(hub_spec: DatasetSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """It raises FileNotFoundError for a data set, a revision and a file; the hub's own error is the cause."""
    missing = FileNotFoundError("x")
    monkeypatch.setattr(hub, "HfFileSystem", lambda: (_ for _ in ()).throw(missing))
    url = stream_sources(hub_spec)[0][0]
    with pytest.raises(UserError, match=r"there is no train.jsonl of the hub data set someone/rows at revision 0123abc"):
        list(read_rows(url))
    missing.__cause__ = RevisionNotFoundError("x", response=RESPONSE)
    with pytest.raises(UserError, match="has no revision 0123abc"):
        list(read_rows(url))


def test_offline_the_real_client_ends_in_the_offline_line(hub_spec: DatasetSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for read in (lambda: fetch(hub_spec), lambda: list(read_rows(stream_sources(hub_spec)[0][0]))):
        with pytest.raises(UserError, match=r"give a local copy with --data.dataset.path"):
            read()


def test_a_malformed_hub_name_is_said(make_spec: SpecMaker) -> None:
    spec = make_spec(path=None, hub_id="a b/c/d", hub_file="x.jsonl", revision="0123abc")
    for read in (lambda: fetch(spec), lambda: list(read_rows(stream_sources(spec)[0][0]))):
        with pytest.raises(UserError, match="hub_id must look like owner/name, got 'a b/c/d'"):
            read()
