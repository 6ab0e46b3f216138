"""One self-contained HTML page: text, tables and pictures, light and dark, without the network."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

__all__ = ["Page", "Picture"]

STYLE = """
:root { color-scheme: light dark;
  --ground: #ffffff; --ink: #1b1f24; --soft: #57606a; --line: #d5d9de; --fill: #f3f5f7; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ground: #15181d; --ink: #e7eaee; --soft: #a3adb8; --line: #3b424c; --fill: #1e2329; }
}
body { background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 62rem; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; }
h2 { border-top: 1px solid var(--line); font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-top: 1.2rem; }
p, figcaption { color: var(--soft); margin: .4rem 0; max-width: 48rem; }
figure { margin: 1rem 0; } img { height: auto; max-width: 100%; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; margin: .8rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; }
th { font-weight: 600; } td.number { font-variant-numeric: tabular-nums; text-align: right; }
dl { display: grid; gap: .6rem 2rem; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); margin: 1.2rem 0; }
dl div { background: var(--fill); border-radius: .4rem; padding: .7rem 1rem; }
dt { color: var(--soft); font-size: .85rem; } dd { font-size: 1.35rem; font-weight: 600; margin: 0; }
pre { background: var(--fill); border-radius: .4rem; font-size: .8rem; overflow-x: auto; padding: .8rem; }
@media print { h2, figure { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class Picture:
    """A picture in both forms.

    Args:
        name: Of its file, without suffix.
        alt: What it shows, for who cannot see it.
        caption: How to read it.
        light: PNG.
        dark: PNG.
    """

    name: str
    alt: str
    caption: str
    light: bytes
    dark: bytes

    def html(self) -> str:
        dark, light = (base64.b64encode(data).decode() for data in (self.dark, self.light))
        return (
            f"<figure><picture>"
            f'<source media="screen and (prefers-color-scheme: dark)" srcset="data:image/png;base64,{dark}">'
            f'<img alt="{html.escape(self.alt, quote=True)}" src="data:image/png;base64,{light}">'
            f"</picture><figcaption>{html.escape(self.caption)}</figcaption></figure>"
        )


@dataclass
class Page:
    """A page under construction; everything that is added is escaped."""

    title: str
    subtitle: str = ""
    parts: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)

    def section(self, title: str) -> None:
        self.parts.append(f"<h2>{html.escape(title)}</h2>")

    def text(self, text: str) -> None:
        self.parts.append(f"<p>{html.escape(text)}</p>")

    def picture(self, picture: Picture) -> None:
        self.pictures.append(picture)
        self.parts.append(picture.html())

    def figures(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Large numbers, each with what it is."""
        cells = (f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in pairs)
        self.parts.append(f"<dl>{''.join(cells)}</dl>")

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> None:
        """A table; the columns ``numbers`` are aligned to the right."""
        right = set(numbers)
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        lines = "".join(f"<tr>{''.join(_cell(cell, i in right) for i, cell in enumerate(row))}</tr>" for row in rows)
        self.parts.append(f'<div class="scroll"><table><tr>{head}</tr>{lines}</table></div>')

    def preformatted(self, text: str) -> None:
        self.parts.append(f"<pre>{html.escape(text)}</pre>")

    def html(self) -> str:
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self.title)}</title><style>{STYLE}</style></head><body>"
            f"<h1>{html.escape(self.title)}</h1><p>{html.escape(self.subtitle)}</p>{''.join(self.parts)}</body></html>\n"
        )


def _cell(text: str, number: bool) -> str:
    return f"<td{' class=number' if number else ''}>{html.escape(text)}</td>"
