"""Files that a measurement writes: checked before a model is loaded, which takes long, and written whole."""

from pathlib import Path

from qlora_lightning.errors import UserError


def check_output(file: str | None, overwrite: bool) -> None:
    """Raise UserError where ``file`` could not be written, or would replace another one without ``overwrite``."""
    if file is None:
        return
    target = Path(file)
    if target.exists() and not (overwrite and target.is_file()):
        raise UserError(f"{file} exists; give another name" + (" or --overwrite" if target.is_file() else ""))
    if not target.parent.is_dir():
        raise UserError(f"the folder of {file} does not exist; make it first")


def write_output(file: str, text: str) -> None:
    """Put ``text`` in place of ``file``: whole, so that a kill never leaves half of it.

    Raises:
        UserError: it cannot be written.
    """
    target = Path(file)
    beside = target.with_name(target.name + ".partial")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(target)
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}); give a file in a folder that can") from error
