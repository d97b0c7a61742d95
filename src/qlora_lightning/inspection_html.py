"""The page of ``data inspect --html``: one file without scripts or anything from elsewhere, readable in light and dark."""

from collections.abc import Iterable, Sequence
from html import escape

from qlora_lightning.data.audit import SET_COLUMNS, Audit, Bucket
from qlora_lightning.data.excerpts import Excerpt, Piece, harmless, visible

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --page: #fff; --faint: #60656c; --line: #d9dce0; --mark: #c9efd2; --warn: #8a4b00; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --page: #16181b; --faint: #9aa1a9; --line: #363a40; --mark: #14532d; --warn: #ffb454; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; } h3 { font-size: .95rem; margin: 1.5rem 0 .3rem; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { text-align: left; padding: .15rem 1rem .15rem 0; vertical-align: top; }
th { color: var(--faint); font-weight: normal; white-space: nowrap; } td { font-variant-numeric: tabular-nums; }
figure { display: inline-block; margin: 0 2rem 1rem 0; } figcaption { font-size: .8rem; color: var(--faint); max-width: 15rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line); border-radius: 4px; padding: .6rem; margin: 0;
  font: 13px/1.5 ui-monospace, monospace; color: var(--faint); }
mark { background: var(--mark); color: var(--ink); border-radius: 2px; } .warning { color: var(--warn); font-weight: 600; }
.bars { display: flex; align-items: flex-end; gap: 2px; height: 4rem; width: 15rem; border-bottom: 1px solid var(--line); }
.bars i { flex: 1; background: var(--faint); }
"""


def page(title: str, examples: Iterable[Excerpt], found: Audit) -> str:
    """The whole page as HTML.

    Args:
        title: what was inspected.
        examples: to show, what is trained on inside ``<mark>``.
        found: their audit.
    """
    warnings = "".join(f'<p class="warning">{_text(problem)}</p>' for problem in found.problems)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>{_text(title)}</h1>\n{warnings}{_audit(found)}\n<h2>Examples</h2>\n{_LEGEND}\n"
        f"{''.join(map(_example, examples))}</body></html>\n"
    )


_LEGEND = (
    "<p><mark>trained on</mark>; all else is only read. In what is trained on ⏎ is a line end, → a tab, and · a blank at an edge or in a "
    "run.</p>"
)


def _text(text: str) -> str:
    return escape(harmless(text))


def _example(example: Excerpt) -> str:
    return f"<h3>{_text(example.heading)}</h3>\n<pre>\n{''.join(map(_piece, example.pieces))}</pre>\n"


def _piece(piece: Piece) -> str:
    return f"<mark>{escape(visible(piece.text))}</mark>" if piece.supervised else _text(piece.text)


def _audit(found: Audit) -> str:
    lengths = [[name, f"{of.p50:,}", f"{of.p95:,}", f"{of.max:,}"] for name, of in found.lengths.items()]
    return "\n".join(
        [
            f"<h2>Audit</h2>{_table([], found.lines())}",
            _list("Bad rows", found.bad_rows),
            f"<h2>Sets</h2>{_table(SET_COLUMNS, [one.cells() for one in found.sets])}" if len(found.sets) > 1 else "",
            f"<h2>Lengths</h2>{_table(['tokens', 'p50', 'p95', 'max'], lengths)}",
            *(_histogram(name, of.histogram) for name, of in found.lengths.items()),
        ]
    )


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = f"<tr>{''.join(f'<th>{_text(name)}</th>' for name in names)}</tr>" if names else ""
    lines = (f"<tr><th>{_text(first)}</th>{''.join(f'<td>{_text(cell)}</td>' for cell in rest)}</tr>" for first, *rest in rows)
    return f"<table>{head}{''.join(lines)}</table>"


def _list(title: str, lines: list[str]) -> str:
    return f"<h2>{title}</h2><ul>{''.join(f'<li>{_text(line)}</li>' for line in lines)}</ul>" if lines else ""


def _histogram(name: str, buckets: list[Bucket]) -> str:
    most, width = max(bucket.examples for bucket in buckets), buckets[0].last + 1
    bars = "".join(f'<i style="height:{one.examples / most:.1%}" title="{_bar_title(one)}"></i>' for one in buckets)
    caption = f"{name}: 0 to {buckets[-1].last:,} tokens, {width:,} a bar, {most:,} examples in the highest"
    return f'<figure><div class="bars">{bars}</div><figcaption>{_text(caption)}</figcaption></figure>'


def _bar_title(bucket: Bucket) -> str:
    return f"{bucket.first:,} to {bucket.last:,} tokens: {bucket.examples:,} examples"
