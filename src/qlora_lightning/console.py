"""The one console for people. All but a command's result goes here, to standard error, so that a live bar and a print never garble."""

from rich.console import Console

console = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """Print one line of plain text above any live bar: no markup, no wrapping (a log file has no width)."""
    console.print(text, markup=False, soft_wrap=True)


def is_live() -> bool:
    """Whether a bar may redraw itself: colours forced by an environment variable do not turn a log file into a terminal."""
    return console.is_interactive and console.file.isatty()
