"""Files that a command writes: checked before a model is loaded, which takes long, and written whole."""

from pathlib import Path

from qlora_lightning.errors import UserError


def check_output(file: str | None, overwrite: bool) -> None:
    """Raise UserError where ``file`` could not be written, or would replace another one without ``overwrite``."""
    if file is None:
        return
    target = Path(file)
    if target.is_dir():
        raise UserError(f"output {target} is a folder; give the name of a file in it")
    if target.exists() and not overwrite:
        raise UserError(f"output {target} exists; give another name or --overwrite")
    if not target.parent.is_dir():
        raise UserError(f"the folder of output {target} does not exist; make it first")


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
