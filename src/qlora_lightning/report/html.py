"""Pieces of the page. Whatever comes from data passes ``text``, which leaves nothing in it that a browser could take for anything else."""

import re
from collections.abc import Iterable, Sequence
from html import escape

from qlora_lightning.data.excerpts import harmless

_INVISIBLE = re.compile("[\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff\ufff9-\ufffb\U000e0000-\U000e007f]")
"""What turns or hides the text around it (Unicode's directional marks, zero widths), and halves of surrogate pairs."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --page: #fff; --card: #fafbfc; --faint: #5a6068; --line: #dfe2e6; --mark: #fff3d1;
  --warn: #8a4b00; --run0: #0072b2; --run1: #d55e00; --run2: #00875f; --run3: #aa3377; --run4: #9a7400; --run5: #5c6670; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --page: #16181b; --card: #1d2024; --faint: #a3a9b1; --line: #363a40; --mark: #46390f; --warn: #ffb454;
    --run0: #5cb8f0; --run1: #ff8a3d; --run2: #35c79a; --run3: #e68ac3; --run4: #e3bb4a; --run5: #b3bac2; }
}
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 76rem; margin: 0 auto;
  padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .75rem; }
h3 { font-size: .95rem; margin: 0 0 .25rem; } h4 { font-size: .8rem; color: var(--faint); font-weight: 600; margin: 0 0 .25rem; }
p { margin: .5rem 0; max-width: 60rem; } .faint, figcaption { color: var(--faint); font-size: .84rem; }
.warning { color: var(--warn); font-weight: 600; }
a { color: inherit; } nav a { margin-right: 1rem; } nav { margin-top: .75rem; font-size: .9rem; }
.wide { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .88rem; }
caption { text-align: left; color: var(--faint); padding-bottom: .35rem; }
th, td { text-align: left; padding: .22rem 1.25rem .22rem 0; vertical-align: top; border-bottom: 1px solid var(--line); }
td { font-variant-numeric: tabular-nums; max-width: 26rem; } th, td { overflow-wrap: break-word; }
tbody th { font-weight: normal; color: var(--faint); }
thead th { vertical-align: bottom; max-width: 16rem; }
.pair { display: flex; flex-wrap: wrap; gap: 0 4rem; } .pair section { max-width: 100%; min-width: min(100%, 20rem); }
.pair p, .pair details { width: 0; min-width: 100%; }
tr.differs td { background: var(--mark); padding-left: .4rem; } tr.differs td + td { border-left: 4px solid var(--page); }
.key { display: inline-block; width: 1.3rem; border-top: 3px solid; vertical-align: middle; margin-right: .4rem; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; font-size: .82rem; margin-bottom: .35rem; overflow-wrap: anywhere; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1rem; }
figure, .sample { margin: 0; padding: 1rem 1.1rem; border: 1px solid var(--line); border-radius: 8px; background: var(--card);
  min-width: 0; }
figure svg { display: block; width: 100%; height: auto; } figure svg text { font-family: system-ui, sans-serif !important; }
figure svg * { stroke-linejoin: round; } figcaption { margin-top: .4rem; }
.whole { white-space: nowrap; }
.bar { display: inline-block; width: 7rem; height: .6rem; background: var(--line); border-radius: 2px; vertical-align: middle; }
.bar i { display: block; height: 100%; border-radius: 2px; }
.sample { margin-bottom: 1rem; }
.beside { display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 1fr); gap: 1rem 1.5rem; margin-top: 1rem; }
.bars { display: flex; align-items: flex-end; gap: 1px; height: 2.2rem; width: 9rem; border-bottom: 1px solid var(--line); }
.bars i { flex: 1; background: var(--faint); }
.answers { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: .35rem .9rem; margin: 0 0 1rem; align-items: baseline; }
.answers dt { font-size: .8rem; color: var(--faint); white-space: nowrap; } .answers dd { margin: 0; min-width: 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font: 13px/1.5 ui-monospace, monospace; }
details { margin: .75rem 0; } summary { cursor: pointer; } details pre { margin-top: .5rem; color: var(--faint); }
@media (max-width: 44rem) { body { padding: 1.25rem .9rem 3rem; } .beside { grid-template-columns: minmax(0, 1fr); }
  figure, .sample { padding: .75rem .7rem; } }
@media print { figure, .sample { break-inside: avoid; } }
"""


def text(value: str) -> str:
    """``value`` as text and nothing but text: markup escaped, control characters and directional marks made visible."""
    return escape(_INVISIBLE.sub(lambda found: f"\\u{ord(found[0]):04x}", harmless(value)))


def document(title: str, body: str) -> str:
    """A whole page that may neither run scripts nor load anything."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; form-action 'none'; "
        "base-uri 'none'\">"
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def section(key: str, title: str, *parts: str) -> str:
    """A part of the page under a heading that can be linked to."""
    return f'<section id="{key}"><h2>{text(title)}</h2>\n' + "\n".join(filter(None, parts)) + "</section>"


def note(words: str, kind: str = "faint") -> str:
    """A short paragraph."""
    return f'<p class="{kind}">{text(words)}</p>'


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", marked: Sequence[bool] = ()) -> str:
    """A table whose first column names its rows.

    Args:
        heads: HTML of the head's cells.
        rows: HTML of the cells.
        caption: what it shows, as text.
        marked: whether each row stands out; empty for none.
    """
    head = "".join(f'<th scope="col">{cell}</th>' for cell in heads)
    lines = []
    for number, (first, *rest) in enumerate(rows):
        mark = ' class="differs"' if marked and marked[number] else ""
        lines.append(f'<tr{mark}><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>')
    title = f"<caption>{text(caption)}</caption>" if caption else ""
    return f'<div class="wide"><table>{title}<thead><tr>{head}</tr></thead>\n<tbody>{chr(10).join(lines)}</tbody></table></div>'


def key(name: str, style: tuple[str, str]) -> str:
    """A name behind a stroke in the colour (CSS) and line style of its curve."""
    color, dashes = style
    return f'<span><span class="key" style="border-color: {color}; border-style: {dashes} none none"></span>{text(name)}</span>'


def figure(key: str, title: str, svg: str, legend: Sequence[str], description: str, caption: str) -> str:
    """A figure that can be read without seeing it.

    Args:
        key: its id, unlike any other's; that of everything inside begins with it.
        title: above it.
        svg: as ``plots`` gives it.
        legend: HTML of its keys; not shown for one alone.
        description: what it shows, in words.
        caption: below it.
    """
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", svg)
    svg = svg.replace("<svg ", '<svg role="img" ', 1).replace(">", f"><title>{text(title)}. {text(description)}</title>", 1)
    keys = f'<div class="legend">{"".join(legend)}</div>' if len(legend) > 1 else ""
    words = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return f'<figure id="{key}"><h3>{text(title)}</h3>{keys}\n{svg}\n{words}</figure>'
