"""``push``: an adapter or a merged model to the Hugging Face hub, after a look at what would go there."""

import json as json_module
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml
from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from rich.table import Table

from qlora_lightning.console import console, say
from qlora_lightning.errors import UserError
from qlora_lightning.modeling.sources import first_line
from qlora_lightning.redaction import redacted

MODEL_FILES = (("adapter_config.json", "adapter_model.safetensors"), ("config.json", "*.safetensors"))
"""An adapter folder holds the first two, a model the second two."""
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle", ".joblib")
KEYS = (".pem", ".key", ".env", ".netrc")
SCANNED_BYTES = 1 << 20
"""Larger files are vocabularies and weights, in which no one writes a password."""
_CARD_FIELDS = ("base_model", "license", "library_name", "tags")


def push(folder: str, repo: str, private: bool = False, yes: bool = False, json: bool = False) -> None:
    """Upload an adapter or a merged model to the Hugging Face hub. Without --yes it only shows what would go where.

    Folders with checkpoints, optimizer states, other pickles, links or secrets are refused.

    Args:
        folder: Adapter folder, as in RUN/checkpoints/last, or merged model.
        repo: Its repository, as in USER/NAME; made if it does not exist.
        private: Make the repository private.
        yes: Upload.
        json: Print one JSON document on standard output and nothing else there.
    """
    root = Path(folder)
    _check_repo(repo)
    files = files_to_push(root)
    card = _card(root)
    _show(repo, private, files, card)
    commit = _upload(root, repo, private) if yes else None
    say(f"Uploaded: {commit}" if commit else "Nothing was uploaded; the same command with --yes does it")
    if json:
        listed = [{"path": file.path, "bytes": file.num_bytes} for file in files]
        account = {"repository": repo, "private": private, "uploaded": yes, "commit": commit, "card": card, "files": listed}
        print(json_module.dumps(account | {"bytes": sum(file.num_bytes for file in files)}, indent=2))


@dataclass(frozen=True)
class _File:
    path: str
    """In the folder and in the repository."""
    num_bytes: int


def files_to_push(root: Path) -> list[_File]:
    """All files of a folder, the largest first.

    Raises:
        UserError: it holds no model, or something that has no business on the hub.
    """
    if not any(all(next(root.glob(pattern), None) for pattern in kind) for kind in MODEL_FILES):
        last = root / "checkpoints" / "last"
        way_out = f"give {last}" if last.is_dir() else "give an adapter folder or a merged model"
        raise UserError(f"push takes an adapter (adapter_config.json and weights) or a model, which {root} is not; {way_out}")
    paths = sorted(path for path in root.rglob("*") if not path.is_dir() or path.is_symlink())
    for path in paths:
        if reason := _unwanted(path):
            raise UserError(f"{path} is {reason}, which must not be uploaded; push a folder without it")
    return sorted((_File(path.relative_to(root).as_posix(), path.stat().st_size) for path in paths), key=lambda file: -file.num_bytes)


def _unwanted(path: Path) -> str | None:
    if path.is_symlink():
        return "a link, whose file may lie anywhere"
    if path.suffix.lower() in PICKLES or path.name.startswith("optimizer"):
        return "a checkpoint, an optimizer's state or another pickle"
    if path.suffix.lower() in KEYS or path.name in KEYS or path.name.startswith("id_rsa"):
        return "a file that keys are kept in"
    if ".partial" in path.name:
        return "left over from something that was interrupted"
    if path.stat().st_size <= SCANNED_BYTES:
        text = path.read_bytes().decode("utf-8", errors="replace")
        if redacted(text) != text:
            return "a file with a secret in it (a token, a password in an address, or a key of your environment)"
    return None


def _check_repo(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"a repository is named USER/NAME, got {repo!r} ({first_line(error)}); correct it") from error


def _card(root: Path) -> dict[str, Any]:
    """What the hub reads off the card: the fields of its head that say something; {} without a card.

    Raises:
        UserError: the head is no YAML.
    """
    file = root / "README.md"
    if not file.is_file():
        return {}
    try:
        fields: dict[str, Any] = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"the head of {file} is not what the hub reads ({first_line(error)}); correct the lines between the ---") from error
    return {name: fields[name] for name in _CARD_FIELDS if fields.get(name)}


def _show(repo: str, private: bool, files: list[_File], card: dict[str, Any]) -> None:
    shown = Table("file", box=None, pad_edge=False)
    shown.add_column("MB", justify="right")
    for file in files:
        shown.add_row(file.path, f"{file.num_bytes / 1e6:,.3f}")
    console.print(shown)
    say(f"{len(files)} files, {sum(file.num_bytes for file in files) / 1e6:,.3f} MB, to https://huggingface.co/{repo}")
    say(f"A repository that is made for it is {'private' if private else 'public (--private makes it private)'}")
    told = "; ".join(f"{name}: {', '.join(value) if isinstance(value, list) else value}" for name, value in card.items())
    say(f"The card says {told}" if told else "There is no card (README.md) that says anything")
    if "license" not in card:
        say("warning: the card names no license; that of the base model applies to what was made of it")


def _upload(root: Path, repo: str, private: bool) -> str:
    """Make the repository where it does not exist, upload, and give the address of the commit."""
    if get_token() is None:
        raise UserError("uploading needs a token of the hub, found none; run `hf auth login`, or set HF_TOKEN to one that may write")
    api = HfApi()
    with _hub_words(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise UserError(f"{repo} exists and is public, but --private was asked for; make it private on the hub, or give another name")
        return str(api.upload_folder(repo_id=repo, folder_path=root, commit_message="Upload by qlora-lightning push").commit_url)


@contextmanager
def _hub_words(repo: str) -> Iterator[None]:
    """What can go wrong on the way, in one line each."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise UserError("uploading needs a token of the hub, found none; run `hf auth login`") from error
    except HfHubHTTPError as error:
        raise UserError(
            f"the hub does not take {repo} ({first_line(error)}); check the name, and that the token may write there"
        ) from error
    except (httpx.HTTPError, OfflineModeIsEnabled, ConnectionError) as error:
        raise UserError(
            f"the hub cannot be reached ({first_line(error)}); go online (unset HF_HUB_OFFLINE) and give the same command again"
        ) from error
