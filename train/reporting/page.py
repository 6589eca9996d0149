"""HTML of the report: a single self-contained file without scripts."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

STYLE = """\
:root { color-scheme: light dark; --page: #f4f5f7; --card: #ffffff; --text: #1d2129; --faint: #5d6470;
  --line: #dfe2e8; --accent: #2563a8; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --page: #121418; --card: #1a1d23; --text: #e6e8ec; --faint: #a2a9b5;
  --line: #323741; --accent: #6aa9ee; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 2.5rem clamp(1rem, 4vw, 3rem) 4rem; background: var(--page);
  color: var(--text); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { margin: 0 0 .3rem; font-size: 1.9rem; line-height: 1.2; letter-spacing: -.015em; text-wrap: balance; }
h2 { margin: 2.8rem 0 .4rem; font-size: 1.25rem; letter-spacing: -.01em; }
p { margin: .5rem 0; max-width: 60rem; }
h1, p, figcaption { overflow-wrap: anywhere; }
.card + p, .card + .figures, .figures + .card { margin-top: .9rem; }
.note + .card { margin-top: 1.6rem; }
.lead, figcaption, .note { color: var(--faint); }
.bad { color: var(--bad); font-weight: 600; }
code { font: .88em ui-monospace, "SF Mono", Menlo, Consolas, monospace; background: var(--card);
  border: 1px solid var(--line); border-radius: .3rem; padding: .1em .35em; display: inline-block; max-width: 100%; }
.card, figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
.card { overflow-x: auto; padding: .4rem 1.1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .94rem; }
th, td { padding: .5rem .7rem .5rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
th:last-child, td:last-child { padding-right: 0; }
tr:last-child > * { border-bottom: 0; }
thead th { color: var(--faint); font-weight: 500; font-size: .85rem; line-height: 1.3; vertical-align: bottom;
  white-space: normal; min-width: 4rem; }
tbody th { font-weight: 600; }
th:first-child { position: sticky; left: 0; background: var(--card); }
.interval { color: var(--faint); font-size: .88em; }
.figures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)); }
figure { padding: .9rem; }
figure img { display: block; width: 100%; height: auto; }
figcaption { margin-top: .5rem; font-size: .88rem; }
details { margin-top: 2.8rem; }
summary { cursor: pointer; font-size: 1.25rem; font-weight: 600; letter-spacing: -.01em; margin-bottom: .6rem; }
details td { white-space: normal; overflow-wrap: anywhere; }
@media (max-width: 30rem) { .card { padding: .3rem .6rem; } th, td { padding-right: .4rem; font-size: .82rem; }
  thead th { min-width: 3.2rem; font-size: .76rem; } tbody th { white-space: normal; } }
@media print { body { max-width: none; background: none; } figure, .card { break-inside: avoid; } }
"""


def page(title: str, body: Sequence[str]) -> str:
    """A whole document with a plain-text title and an HTML body."""
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(title)}</title>",
            f"<style>\n{STYLE}</style>",
            "</head>",
            "<body>",
            *body,
            "</body>",
            "</html>",
            "",
        ]
    )


def heading(text: str, level: int = 2) -> str:
    """A heading."""
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text; `...` becomes code. `kind` is a CSS class: lead, note or bad."""
    parts = escape(text).split("`")
    coded = "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))
    return f'<p class="{kind}">{coded}</p>' if kind else f"<p>{coded}</p>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text whose first column names the rows; intervals after ± are printed faint."""
    lines = ["<thead><tr>", *(f'<th scope="col">{escape(cell)}</th>' for cell in head), "</tr></thead>", "<tbody>"]
    for first, *others in rows:
        cells = "".join(f"<td>{_cell(cell)}</td>" for cell in others)
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    return "\n".join(['<div class="card"><table>', *lines, "</tbody>", "</table></div>"])


def _cell(text: str) -> str:
    value, sign, interval = escape(text).partition(" ± ")
    return f'{value} <span class="interval">± {interval}</span>' if sign else value


def options(values: Mapping[str, object]) -> str:
    """A table of option names and values."""
    rows = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(str(value))}</td></tr>' for name, value in values.items()
    )
    return f'<div class="card"><table><tbody>\n{rows}\n</tbody></table></div>'


def folded(title: str, content: str) -> str:
    """HTML content that is hidden until a click on the title."""
    return f"<details><summary>{escape(title)}</summary>\n{content}\n</details>"


def figure(pictures: Mapping[str, bytes], description: str, caption: str) -> str:
    """An embedded picture for light and dark pages.

    Args:
        pictures: PNG files "light" and "dark"; the browser's colour scheme selects one.
        description: alternative text.
        caption: text below the picture.
    """
    sources = {name: f"data:image/png;base64,{base64.b64encode(png).decode()}" for name, png in pictures.items()}
    return "\n".join(
        [
            "<figure>",
            f'<picture><source srcset="{sources["dark"]}" media="(prefers-color-scheme: dark)">',
            f'<img src="{sources["light"]}" alt="{escape(description)}"></picture>',
            f"<figcaption>{escape(caption)}</figcaption>",
            "</figure>",
        ]
    )


def figures(items: Sequence[str]) -> str:
    """A grid of figures."""
    return "\n".join(['<div class="figures">', *items, "</div>"])
