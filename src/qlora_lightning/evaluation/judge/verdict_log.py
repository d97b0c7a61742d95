"""The folder that a judge writes its verdicts into: one file a match and order, appended verdict by verdict, resumable after a kill."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout

from qlora_lightning.errors import UserError
from qlora_lightning.evaluation.judge.reviews import Mode, Score

SETTINGS = "judge.json"
"""File that says what all verdicts of a folder have in common."""
_LOCK = "judge.lock"


@dataclass(frozen=True)
class VerdictRow:
    """One reply of a judge: a line of a verdict file."""

    question_id: str | int
    category: str
    kind: Mode
    first: str
    """Name of the system whose answer stood first."""
    second: str
    score: Score
    """1, 2 or 3 (neither is better); two scores; or -1 where the reply could not be read."""
    judge: str
    reply: str
    prompt_tokens: int
    completion_tokens: int


class VerdictLog:
    """Verdicts of a folder on some matches ``(first, second)``, those of earlier runs included; within the context more may be added.

    Raises:
        UserError: a line that is there is no verdict, or (within the context) another run writes into the folder.
    """

    def __init__(self, folder: Path, matches: list[tuple[str, str]]) -> None:
        self.folder = folder
        self.verdicts: list[VerdictRow] = []
        for first, second in matches:
            path = self._path(first, second)
            if path.exists():
                lines = enumerate(_whole(path.read_bytes()).splitlines(), 1)
                self.verdicts += [_verdict(line, first, second, f"{path}:{number}") for number, line in lines]
        self._files: dict[Path, TextIO] = {}
        self._held = ExitStack()

    def __enter__(self) -> "VerdictLog":
        """Make the folder and hold it against other runs."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(FileLock(self.folder / _LOCK, timeout=0))
        except Timeout as error:
            raise UserError(f"another run writes into the output folder {self.folder}; wait for its end or give another folder") from error
        except OSError as error:
            raise UserError(f"output folder {self.folder} cannot be written ({error.strerror}); give another") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with suppress(OSError) if kind else nullcontext():  # closing tries again to write what a full disk did not take
            self._held.close()

    @property
    def given(self) -> set[tuple[str, str, str]]:
        """First, second and question id of the verdicts that are there."""
        return {(verdict.first, verdict.second, str(verdict.question_id)) for verdict in self.verdicts}

    def add(self, verdict: VerdictRow) -> None:
        """Append a verdict to its match's file; a kill of this process does not lose it any more.

        Raises:
            UserError: the disk does not take it.
        """
        path = self._path(verdict.first, verdict.second)
        try:
            file = self._file(path)
            file.write(json.dumps(asdict(verdict), ensure_ascii=False) + "\n")
            file.flush()
        except OSError as error:
            raise UserError(
                f"verdict file {path} cannot be written ({error.strerror}); mend that, then the same command goes on"
            ) from error
        self.verdicts.append(verdict)

    def _file(self, path: Path) -> TextIO:
        """The file of a match, open at its end. Half a line that a killed run left there is cut off."""
        if path not in self._files:
            if path.exists():
                with path.open("rb+") as file:
                    file.truncate(len(_whole(file.read())))
            self._files[path] = self._held.enter_context(path.open("a", encoding="utf-8"))
        return self._files[path]

    def _path(self, first: str, second: str) -> Path:
        return self.folder / f"{first}-vs-{second}.jsonl"


def _whole(data: bytes) -> bytes:
    """Whole lines only."""
    return data[: data.rfind(b"\n") + 1]


def _verdict(line: bytes, first: str, second: str, where: str) -> VerdictRow:
    try:
        verdict = VerdictRow(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: the line is no verdict of this tool ({error}); give another --output folder") from error
    if (verdict.first, verdict.second) != (first, second):
        raise UserError(
            f"{where}: a file holds the verdicts on the match in its name, but this one is on {verdict.first} against {verdict.second}; "
            "give the file its own name back"
        )
    return verdict


def check_folder(folder: Path, settings: dict[str, Any], systems: dict[str, str]) -> None:
    """Check that verdicts in the folder, where there are any, came about under the same settings. (Settings alone bind nobody.)

    Systems may join a tournament later; one that takes part already must not have changed its answers.

    Args:
        folder: Need not exist.
        settings: What all verdicts must have in common.
        systems: Name of each system -> hash of its answers.

    Raises:
        UserError: the folder holds verdicts of other settings.
    """
    if not any(_verdict_files(folder)):
        return
    way_out = "give another folder, or --overwrite to delete them"
    earlier = _earlier(folder)
    if earlier is None:
        raise UserError(f"output folder {folder} holds verdicts but no {SETTINGS} that says how they came about; {way_out}")
    for name, value in settings.items():
        if earlier.get(name) != value:
            was, now = (str(each)[:80] for each in (earlier.get(name), value))
            raise UserError(f"output folder {folder} holds verdicts of another {name} ({was}, not {now}); {way_out}")
    for name, answers in systems.items():
        if earlier["systems"].get(name, answers) != answers:
            raise UserError(f"output folder {folder} holds verdicts on other answers of {name}; {way_out}")


def prepare_folder(folder: Path, settings: dict[str, Any], systems: dict[str, str], overwrite: bool) -> None:
    """Note the settings of the verdicts to come; ``overwrite`` deletes those that are there."""
    if overwrite:
        for path in _verdict_files(folder):
            path.unlink()
    known = (_earlier(folder) or {"systems": {}})["systems"] if any(_verdict_files(folder)) else {}
    beside = folder / f"{SETTINGS}.partial"
    beside.write_text(json.dumps({**settings, "systems": known | systems}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(folder / SETTINGS)


def _verdict_files(folder: Path) -> Iterator[Path]:
    return folder.glob("*-vs-*.jsonl")


def _earlier(folder: Path) -> dict[str, Any] | None:
    """The settings of the folder's verdicts, None where there is no file of them that can be read."""
    try:
        settings = json.loads((folder / SETTINGS).read_bytes())
    except (OSError, ValueError):
        return None
    return settings if isinstance(settings, dict) and isinstance(settings.get("systems"), dict) else None
