"""Sections of text, tables and plots as one HTML page that needs nothing else, as Markdown, tables as plain text.

All text is escaped: it comes out of files that may come from anywhere. Plots are SVG behind a data URI, where no script
of theirs could run; the page has no script, no font, no link of its own, and a policy that forbids the browser any.
"""

import base64
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from bench.kinds import Table

SHORT = 24
"""Letters of a cell that stay on one line."""
GOOD, BAD, UNKNOWN = "yes", "no", "not measured"
_CLASSES = {GOOD: "good", BAD: "bad", UNKNOWN: "unknown", "worse": "bad", "better": "good"}
"""What a cell says -> its colour."""

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto; padding: 1rem;
  max-width: 60rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
h2 { border-top: 1px solid #ccc; padding-top: 1rem; }
p { margin: .5rem 0; } .small { color: #555; font-size: .875rem; }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .875rem; overflow-wrap: normal; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top; }
th, td { max-width: 22rem; }
th { border-bottom: 2px solid #888; white-space: nowrap; vertical-align: bottom; }
.text { text-align: left; } td { white-space: nowrap; }
td.long { white-space: normal; min-width: 18rem; }
td.good { color: #0a6b2d; font-weight: 600; } td.bad { color: #b00020; font-weight: 600; } td.unknown { color: #666; }
img { display: block; width: 100%; max-width: 32rem; height: auto; margin: .75rem 0; }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_NUMBER = re.compile(r"([-+]?[\d.,]+(e[-+]?\d+)?(x|%)?)?")

_MARKUP = re.compile(r"[\\`*\[\]<>|#!&]|:(?=//)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """A picture."""

    title: str
    """What it shows, for who cannot see it."""
    svg: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A part of the page."""

    title: str
    paragraphs: tuple[str, ...] = ()
    small: tuple[str, ...] = ()
    """Paragraphs that matter less."""
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()


def to_html(title: str, sections: Sequence[Section]) -> str:
    """The page, UTF-8."""
    body = "\n".join(line for section in sections for line in _section(section))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f"{body}\n</body>\n</html>\n"
    )


def _section(section: Section) -> Iterator[str]:
    yield f"<section>\n<h2>{escape(section.title)}</h2>"
    yield from (f"<p>{escape(each)}</p>" for each in section.paragraphs)
    yield from (f'<p class="small">{escape(each)}</p>' for each in section.small)
    for plot in section.plots:
        source = base64.b64encode(plot.svg).decode()
        yield f'<img alt="{escape(plot.title)}" src="data:image/svg+xml;base64,{source}">'
    for table in section.tables:
        yield from _table(table)
    yield "</section>"


def _table(table: Table) -> Iterator[str]:
    if table.title:
        yield f"<h3>{escape(table.title)}</h3>"
    # the box scrolls, not the page; a keyboard reaches it too
    yield f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.title or "table")}"><table>'
    kinds = ["" if _is_numbers(table, column) else "text" for column in range(len(table.header))]
    yield "<thead><tr>" + _cells("th", table.header, kinds) + "</tr></thead><tbody>"
    yield from ("<tr>" + _cells("td", row, kinds) + "</tr>" for row in table.rows)
    yield "</tbody></table></div>"
    yield from (f'<p class="small">{escape(each)}</p>' for each in table.notes)


def _is_numbers(table: Table, column: int) -> bool:
    """Whether a column stands flush right."""
    return column > 0 and all(_NUMBER.fullmatch(row[column]) for row in table.rows)


def _cells(tag: str, cells: Sequence[str], kinds: Sequence[str]) -> str:
    marks = (_CLASSES.get(cell, "long" if len(cell) > SHORT else "") for cell in cells)
    classes = (f"{kind} {mark}".strip() for kind, mark in zip(kinds, marks, strict=True))
    return "".join(f'<{tag} class="{each}">{escape(cell)}</{tag}>' for cell, each in zip(cells, classes, strict=True))


def to_markdown(title: str, sections: Sequence[Section]) -> str:
    """The same without the plots."""
    return "\n".join([f"# {_plain(title)}", "", *(line for section in sections for line in _lines(section))]) + "\n"


def _lines(section: Section) -> Iterator[str]:
    yield from (f"## {_plain(section.title)}", "")
    for paragraph in (*section.paragraphs, *section.small):
        yield from (_plain(paragraph), "")
    for table in section.tables:
        if table.title:
            yield from (f"### {_plain(table.title)}", "")
        yield "| " + " | ".join(map(_plain, table.header)) + " |"
        yield "|" + "---|" * len(table.header)
        yield from ("| " + " | ".join(map(_plain, row)) + " |" for row in table.rows)
        yield ""
        for note in table.notes:
            yield from (_plain(note), "")


def to_text(table: Table) -> Iterator[str]:
    """A table for a terminal."""
    yield from ("", table.title) if table.title else ()
    columns = list(zip(table.header, *table.rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [_is_numbers(table, column) for column in range(len(columns))]
    for row in (table.header, *table.rows):
        padded = (
            f"{cell:>{width}}" if end else f"{cell:<{width}}"
            for cell, width, end in zip(row, widths, right, strict=True)
        )
        yield "  ".join(padded).rstrip()
    yield from table.notes


def _plain(text: str) -> str:
    """Text that Markdown takes for text: no HTML, no link, no picture, no new cell."""
    return _MARKUP.sub(r"\\\g<0>", text)
