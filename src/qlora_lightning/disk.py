"""Files that survive a kill, a power cut and a full disk: flushed, and put in place whole."""

import ctypes
import os
import re
import shutil
from pathlib import Path

ASIDE = ".old"
"""Ends the name of a folder that another is taking the place of."""
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Flush a folder and all that is in it."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` beside ``path``, flush it and put it in its place."""
    beside = path.with_name(path.name + ".partial")
    beside.write_text(text, encoding="utf-8")
    sync(beside)
    beside.replace(path)
    sync(path.parent)


def replace_folder(new: Path, place: Path) -> None:
    """Put the folder ``new`` in the place of ``place``, which may be missing; both lie in one folder.

    There is a whole folder at ``place`` all the time. Where the system cannot exchange two names at once there is none between two
    renames, and ``new`` is whole then.
    """
    if not place.exists():
        new.rename(place)
    elif not _exchange(new, place):
        aside = place.with_name(place.name + ASIDE)
        place.rename(aside)
        new.rename(place)
        new = aside
    sync(place.parent)
    shutil.rmtree(new, ignore_errors=True)  # what was there before


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where system or file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return renameat2 is not None and renameat2(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def link(source: Path, target: Path) -> None:
    """Give a file a second name in place of what has it, or a copy where the file system has no hard links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        sync(target)


def link_tree(source: Path, target: Path) -> Path:
    """Make ``target`` a folder of the same files as ``source``, in place of what it is; gives it, flushed."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=lambda one, other: link(Path(one), Path(other)))
    sync_tree(target)
    return target


def disk_trouble(error: BaseException) -> str | None:
    """What the system said when a write failed (``No space left on device``), None where an error comes from elsewhere.

    Libraries hide it: torch raises another error while it closes the file, safetensors and tokenizers put it into their text.
    """
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    for one in chain:
        if isinstance(one, OSError) and one.strerror:
            return one.strerror
        if found := re.search(r"\(os error (\d+)\)", str(one)):
            return os.strerror(int(found[1]))
    return None
