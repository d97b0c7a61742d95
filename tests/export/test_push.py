"""``push``: shows first, uploads only when told to, refuses what has no business on the hub. No test touches the network."""

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from huggingface_hub.errors import HfHubHTTPError
from running import line_of

from qlora_lightning.cli import main
from qlora_lightning.export import hub

CARD = "---\nbase_model: some/base\nlicense: mit\ntags: [qlora, merged]\n---\n\n# A model\n"


class PatchedHub:
    """In place of the hub's client: keeps what it was asked to do."""

    def __init__(self) -> None:
        self.done: list[tuple[str, dict[str, Any]]] = []
        self.public = False
        self.error: Exception | None = None

    def __call__(self) -> "PatchedHub":
        return self

    def create_repo(self, repo: str, **options: Any) -> None:
        if self.error is not None:
            raise self.error
        self.done.append((repo, options))

    def repo_info(self, repo: str) -> SimpleNamespace:
        return SimpleNamespace(private=not self.public)

    def upload_folder(self, **options: Any) -> SimpleNamespace:
        self.done.append(("upload", options))
        return SimpleNamespace(commit_url="https://huggingface.co/me/mine/commit/1")


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> PatchedHub:
    patched = PatchedHub()
    monkeypatch.setattr(hub, "HfApi", patched)
    monkeypatch.setattr(hub, "get_token", lambda: "hf_" + "x" * 30)
    return patched


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, text in {"config.json": "{}", "model.safetensors": "w" * 5000, "README.md": CARD, "merge.json": "{}"}.items():
        (folder / name).write_text(text)
    return folder


def test_without_yes_it_only_shows(folder: Path, api: PatchedHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(folder), "me/mine", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["files"][0] == {"path": "model.safetensors", "bytes": 5000} and len(found["files"]) == 4
    assert found["card"] == {"base_model": "some/base", "license": "mit", "tags": ["qlora", "merged"]}
    assert not found["uploaded"] and found["commit"] is None and api.done == []
    assert "to https://huggingface.co/me/mine" in err and "public (--private makes it private)" in err
    assert "base_model: some/base; license: mit; tags: qlora, merged" in err
    assert err.strip().endswith("Nothing was uploaded; the same command with --yes does it")


def test_with_yes_it_uploads(folder: Path, api: PatchedHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(folder), "me/mine", "--private", "--yes"]) == 0
    (repo, made), (_, uploaded) = api.done
    assert repo == "me/mine" and made == {"private": True, "exist_ok": True}
    assert uploaded["repo_id"] == "me/mine" and uploaded["folder_path"] == folder
    assert "Uploaded: https://huggingface.co/me/mine/commit/1" in capsys.readouterr().err


def test_private_never_goes_to_a_public_repository(folder: Path, api: PatchedHub, capsys: pytest.CaptureFixture[str]) -> None:
    api.public = True
    line = line_of(capsys, "push", str(folder), "me/mine", "--private", "--yes")
    assert line.startswith("me/mine exists and is public, but --private was asked for")
    assert "upload" not in [name for name, _ in api.done]


@pytest.mark.parametrize("name", ["last.ckpt", "deep/optimizer.safetensors", "pytorch_model.bin", "x.PKL", "training_args.bin", "data.pt"])
def test_checkpoints_and_pickles_are_refused(folder: Path, api: PatchedHub, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(pickle.dumps([1]))
    line = line_of(capsys, "push", str(folder), "me/mine", "--yes")
    assert line.startswith(f"{folder / name} is a checkpoint, an optimizer's state or another pickle, which must not be uploaded; ")
    assert api.done == []


@pytest.mark.parametrize(
    "name, text",
    [
        ("recipe.yaml", "entity: me\ntoken: hf_" + "aB3" * 12),
        ("notes/deep.txt", "see https://me:hunter2hunter2@example.org/data"),
        ("config.json", '{"key": "value-of-my-environment"}'),
    ],
)
def test_secrets_are_refused_and_not_shown(
    folder: Path, api: PatchedHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "value-of-my-environment")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    assert main(["push", str(folder), "me/mine", "--yes"]) == 2
    out, err = capsys.readouterr()
    assert f"{folder / name} is a file with a secret in it" in err and api.done == []
    assert not any(secret in out + err for secret in ("aB3aB3", "hunter2", "value-of-my"))


@pytest.mark.parametrize("name", [".env", "id_rsa", "server.pem", "model.safetensors.partial"])
def test_files_that_do_not_belong_are_refused(folder: Path, api: PatchedHub, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (folder / name).write_text("")
    assert line_of(capsys, "push", str(folder), "me/mine", "--yes").startswith(f"{folder / name} is ")
    assert api.done == []


def test_links_are_refused(folder: Path, api: PatchedHub, capsys: pytest.CaptureFixture[str]) -> None:
    """What a link leads to would be uploaded: somebody's whole home, say."""
    (folder / "more").symlink_to("/etc")
    assert "more is a link, whose file may lie anywhere" in line_of(capsys, "push", str(folder), "me/mine", "--yes")


def test_a_run_folder_is_refused_with_the_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoints" / "last").mkdir(parents=True)
    line = line_of(capsys, "push", str(tmp_path), "me/mine")
    assert line.endswith(f"which {tmp_path} is not; give {tmp_path / 'checkpoints' / 'last'}")


def test_a_wrong_name_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert line_of(capsys, "push", str(folder), "me/mine/too").startswith("a repository is named USER/NAME, got 'me/mine/too'")


def test_a_card_that_the_hub_cannot_read_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "README.md").write_text("---\ntags: [a\n---\n")
    assert line_of(capsys, "push", str(folder), "me/mine").startswith(f"the head of {folder / 'README.md'} is not what the hub reads (")


def test_without_a_token_nothing_is_tried(
    folder: Path, api: PatchedHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "get_token", lambda: None)
    line = line_of(capsys, "push", str(folder), "me/mine", "--yes")
    assert line == "uploading needs a token of the hub, found none; run `hf auth login`, or set HF_TOKEN to one that may write"
    assert api.done == []


ANSWER = httpx.Response(403, request=httpx.Request("POST", "https://huggingface.co"))


@pytest.mark.parametrize(
    "error, line",
    [
        (
            httpx.ConnectError("[Errno -2] Name or service not known"),
            "the hub cannot be reached ([Errno -2] Name or service not known);",
        ),
        (HfHubHTTPError("403 Forbidden: no rights", response=ANSWER), "the hub does not take me/mine (403 Forbidden: no rights); check"),
    ],
)
def test_what_goes_wrong_on_the_way_is_one_line(
    folder: Path, api: PatchedHub, capsys: pytest.CaptureFixture[str], error: Exception, line: str
) -> None:
    api.error = error
    assert line_of(capsys, "push", str(folder), "me/mine", "--yes").startswith(line)
