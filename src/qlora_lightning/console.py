"""The one console for people. All but a command's result goes here, to standard error, so that a live bar and a print never garble."""

from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment

from qlora_lightning.redaction import redacted

_CONTROLS = {n: 0x2400 + n for n in range(32) if chr(n) not in "\t\n"} | {127: "␡"} | {n: f"\\x{n:02x}" for n in range(128, 160)}


def harmless(text: str) -> str:
    """Control characters as pictures, so that a row's, a model's or a file's words can neither steer a terminal nor break a page."""
    return text.translate(_CONTROLS)


class _Harmless:
    """Whatever is to be printed, with control characters of its own only: those of rich, none of the words."""

    def __init__(self, inner: ConsoleRenderable) -> None:
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._segments(console, options)

    def _segments(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self._inner, options):
            yield segment if segment.control else Segment(harmless(segment.text), segment.style)


class _HarmlessWords(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Harmless(one) for one in renderables]


console = Console(stderr=True, highlight=False)
console.push_render_hook(_HarmlessWords())


def say(text: str) -> None:
    """Print one line of plain text above any live bar: no markup, no wrapping (a log file has no width), no secrets."""
    console.print(redacted(text), markup=False, soft_wrap=True)


def is_live() -> bool:
    """Whether a bar may redraw itself: colours forced by an environment variable do not turn a log file into a terminal."""
    return console.is_interactive and console.file.isatty()
