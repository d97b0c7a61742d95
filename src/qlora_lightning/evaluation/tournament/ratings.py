"""Verdicts from rating files, of ``judge`` or of the authors: one, a folder of them, or a .tar archive, read without unpacking it."""

import json
import lzma
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from qlora_lightning.errors import UserError
from qlora_lightning.evaluation.tournament.released import Located, is_released, released_file, released_verdicts
from qlora_lightning.evaluation.tournament.verdicts import Verdict, own_verdict


@dataclass(frozen=True)
class Ratings:
    """All verdicts of a source, sorted by file, and what is to be told about them."""

    verdicts: list[Verdict]
    notes: list[str]

    @property
    def parsed(self) -> list[Verdict]:
        """The verdicts whose reply could be parsed."""
        return [verdict for verdict in self.verdicts if verdict.score is not None]

    @property
    def unparsed(self) -> int:
        """How many replies could not be parsed."""
        return len(self.verdicts) - len(self.parsed)

    @property
    def judges(self) -> list[str]:
        """Their names, sorted."""
        return sorted({verdict.judge for verdict in self.verdicts})


def read_ratings(source: str) -> Ratings:
    """The verdicts of every .jsonl file of a source.

    Args:
        source: a file, a folder (searched through), a .tar archive (also .tar.gz, .tar.bz2, .tar.xz), or ARCHIVE/FOLDER for a folder in it.

    Raises:
        UserError: there is no such source, it has no rating files, one is broken or of another schema, or none of its verdicts was parsed.
    """
    verdicts: list[Verdict] = []
    notes: list[str] = []
    folders: dict[str, list[tuple[str, list[Located]]]] = defaultdict(list)
    for name, lines in _files(source):
        rows = list(_rows(name, lines, notes))
        if rows and is_released(rows[0][1]):
            folders[str(PurePosixPath(name).parent)].append((name, rows))
        else:
            verdicts += [own_verdict(row, where) for where, row in rows]
    matched = 0
    for files in folders.values():
        found, told = released_verdicts([released_file(name, rows) for name, rows in files])
        verdicts += found
        notes += told
        matched += any(verdict.kind == "pairwise" for verdict in found)
    if matched > 1:
        notes.append(f"pairwise verdicts of {matched} folders are taken together; give one folder to rate its verdicts alone")
    if all(verdict.score is None for verdict in verdicts):
        raise UserError(f"--ratings {source}: needs verdicts that could be parsed, found none among {len(verdicts):,}; judge again")
    return Ratings(verdicts, notes)


def _rows(name: str, lines: Iterable[bytes], notes: list[str]) -> Iterator[Located]:
    """The rows of a file. A last line that a stopped ``judge`` left half written is passed over, and noted."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if not line.endswith(b"\n"):
                notes.append(f"{where}: the last line is cut short and left out; the `judge` that was stopped can go on")
                return
            raise UserError(f"{where}: a line must hold JSON ({error}); correct or delete it") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: a line must hold a JSON object, found {type(row).__name__}; give rating files alone")
        yield where, row


def _files(source: str) -> Iterator[tuple[str, Iterable[bytes]]]:
    """Name and content of the rating files of a source, sorted by name."""
    path = Path(source)
    archive = next((one for one in (path, *path.parents) if ".tar" in one.suffixes and one.is_file()), None)
    if archive is not None:
        yield from _members(archive, path.relative_to(archive).parts)
        return
    if not path.exists():
        raise UserError(f"--ratings {source}: there is no such file or folder; give what `judge` wrote as its --output")
    names = sorted(file for file in path.rglob("*.jsonl") if file.is_file()) if path.is_dir() else [path]
    if not names:
        raise UserError(f"--ratings {source}: needs rating files (*.jsonl), found none; give what `judge` wrote as its --output")
    for name in names:
        try:
            with name.open("rb") as file:
                lines = file.readlines()
        except OSError as error:
            raise UserError(f"--ratings {name}: the file cannot be read ({error.strerror}); allow it, or leave the file out") from error
        yield str(name), lines


def _members(archive: Path, inside: tuple[str, ...]) -> Iterator[tuple[str, Iterable[bytes]]]:
    """The same of the members of an archive that lie in a folder ``inside`` it; nothing is written to the disk."""
    try:
        with tarfile.open(archive) as tar:
            members = [member for member in tar if _belongs(archive, member, inside)]
            if not members:
                raise UserError(f"--ratings {archive.joinpath(*inside)}: needs rating files (*.jsonl), found none there in the archive")
            # in the archive's own order: a compressed one can only be read onwards
            files = ((member.name, tar.extractfile(member)) for member in members)
            read = {f"{archive}/{name}": file.readlines() for name, file in files if file is not None}
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise UserError(f"--ratings {archive}: the archive cannot be read ({str(error).partition(':')[0]}); fetch it again") from error
    yield from sorted(read.items())


def _belongs(archive: Path, member: tarfile.TarInfo, inside: tuple[str, ...]) -> bool:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"--ratings {archive}: members must stay in the archive's folder, found {member.name!r}; pack it anew without it")
    folder = path.parts[:-1]
    within = any(folder[start : start + len(inside)] == inside for start in range(len(folder) + 1))
    return member.isfile() and path.suffix == ".jsonl" and within
