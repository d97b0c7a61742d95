"""Where a data set's files are: local, or on the Hugging Face hub, downloaded or read there.

What the hub refuses is one line that says the way out.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, cast

from huggingface_hub import HfFileSystem, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,  # the HTTP client's own, which is httpx's or httpx2's by the hub client's version
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from qlora_lightning.console import say
from qlora_lightning.data.spec import DatasetSpec
from qlora_lightning.errors import UserError

HUB = "hf://datasets/"
_OPTIONS = ("data.dataset.", "data.dataset.path")


def fetch(spec: DatasetSpec) -> tuple[list[Path], list[Path]]:
    """The local files of a data set, training and validation ([] for none); downloads what the hub holds and this machine does not.

    Raises:
        UserError: a local file does not exist, the hub cannot be reached, or does not give the file.
    """
    train, held = _places(spec, partial(_download, spec))
    return [Path(path) for path in train], [Path(path) for path in held]


def stream_sources(spec: DatasetSpec) -> tuple[list[str], list[str]]:
    """Where ``read_rows`` finds a data set's rows, training and validation ([] for none), with nothing downloaded.

    Raises:
        UserError: a local file does not exist.
    """
    return _places(spec, lambda file: f"{HUB}{spec.hub_id}@{spec.revision}/{file}")


def _places(spec: DatasetSpec, of_hub: Callable[[str], str]) -> tuple[list[str], list[str]]:
    def listed(files: str | list[str] | None) -> list[str]:
        return [of_hub(file) for file in ([files] if isinstance(files, str) else files or [])]

    train = listed(spec.hub_file) if spec.path is None else [_local(spec.path, "data.dataset.path")]
    if spec.validation_path is not None:
        return train, [_local(spec.validation_path, "data.dataset.validation_path")]
    return train, listed(spec.validation_hub_file) if spec.path is None else []


def _local(path: str, option: str) -> str:
    """Checked here, where it is still known which option named the file."""
    if not Path(path).exists():
        raise UserError(f"{path}: no such file; correct {option} (relative paths count from the YAML that names them)")
    return path


def _download(spec: DatasetSpec, file: str) -> str:
    assert spec.hub_id is not None
    return download(spec.hub_id, file, spec.revision)


def download(hub_id: str, file: str, revision: str | None, options: tuple[str, str] = _OPTIONS) -> str:
    """The local path of a file of a hub data set, fetched if this machine does not have it.

    Args:
        hub_id: The data set.
        file: Its path in there.
        revision: Commit, tag or branch.
        options: For the errors: what stands before hub_id, hub_file and revision in the options of that name, and the option for a
            local file.

    Raises:
        UserError: the hub cannot be reached, or does not give the file.
    """
    try:
        path = str(hf_hub_download(hub_id, file, repo_type="dataset", revision=revision))
    except (OSError, HTTPError, ValueError) as error:
        raise _refused(error, hub_id, file, revision, options) from error
    commit = re.search(r"/snapshots/([0-9a-f]{40})/", path)  # the hub's cache keeps files in folders named by commit
    if commit and commit[1] != revision:  # a branch moves: so that it can be pinned
        say(f"{hub_id} at {revision} is commit {commit[1]}; pin it with --{options[0]}revision {commit[1]}")
    return path


def open_url(url: str) -> IO[bytes]:
    """A file of the hub, read piece by piece as it is asked for; ``refusal`` tells what an OSError or HTTPError of reading means.

    Raises:
        UserError: the hub cannot be reached, or does not give the file.
    """
    try:
        return cast(IO[bytes], HfFileSystem().open(url, "rb"))
    except (OSError, HTTPError, ValueError) as error:
        raise refusal(error, url) from error


def refusal(error: Exception, url: str) -> UserError:
    """What went wrong with a file read from the hub, as one line."""
    hub_id, _, rest = url.removeprefix(HUB).partition("@")
    revision, _, file = rest.partition("/")
    return _refused(error, hub_id, file, revision)


def _refused(error: Exception, hub_id: str, file: str, revision: str | None, options: tuple[str, str] = _OPTIONS) -> UserError:
    prefix, local = options
    name = f"{file} of the hub data set {hub_id}"
    # The file system says of all that is missing FileNotFoundError; which of them it was is the cause, and a file has none.
    match error.__cause__ if type(error) is FileNotFoundError and error.__cause__ else error:
        case GatedRepoError():
            line = f"{name} is gated; accept its terms on the hub and log in with `hf auth login`"
        case RevisionNotFoundError():
            line = f"{name} has no revision {revision}; correct {prefix}revision"
        case RepositoryNotFoundError():
            line = f"the hub has no data set {hub_id}, or not for you; correct {prefix}hub_id or log in"
        case LocalEntryNotFoundError() | OfflineModeIsEnabled():
            line = (
                f"{name} is not on this machine and the hub cannot be reached (HF_HUB_OFFLINE is set or there is no connection); "
                f"go online or give a local copy with --{local}"
            )
        case RemoteEntryNotFoundError() | FileNotFoundError():
            line = f"there is no {name} at revision {revision}; correct {prefix}hub_file"
        case ValueError():
            line = f"{prefix}hub_id must look like owner/name, got {hub_id!r}; correct it"
        case _:
            line = f"{name} cannot be fetched ({' '.join(str(error).split())[:160]}); check the connection and the disk"
    return UserError(line)
