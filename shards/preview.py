"""`python -m shards preview DIR --out FILE.png`: films with key and the beginning of their reports.

For the eyes of somebody who may read the reports: the PNG holds them.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from tyro.conf import Positional

from shards.atomic import check_writable, write_atomic
from shards.cli import check_outside, say
from shards.encodings import decode_image
from shards.errors import InputError
from shards.manifest import read_manifest
from shards.scan import read_image, read_samples
from shards.schema import Manifest

MAX_COUNT = 400
"""Films on one sheet."""
_FILM = 224
"""Side of the box a film is fitted into, pixels."""
_GAP = 8
_FONT_SIZE = 11
_LINE = 14
_NO_CHARACTER = "\uffff"
"""Unicode has none here: drawn as every letter is that a font lacks."""
_TEXT_LINES = 5
_SHOWN = 2000
"""Characters of a report that are looked at; fewer fit."""
_PAPER, _INK, _PALE = 255, 0, 96
_COLUMNS = ("key", "offset", "size", "xxh3", "text")


@dataclass(frozen=True, kw_only=True, slots=True)
class PreviewConfig:
    """Draw a contact sheet of films with the beginning of their reports; keep it where reports may be."""

    root: Positional[Path]
    """Folder of shards."""
    out: Path
    """PNG file to write."""
    split: str = "train"
    """Which split to draw from."""
    count: int = 24
    """Films on the sheet."""
    seed: int = 0
    """Another seed draws other films."""
    font: Path | None = None
    """TrueType or OpenType file for the reports; none: DejaVu Sans, which has no Chinese, Japanese or Korean."""

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MAX_COUNT:
            raise InputError(f"--count {self.count} is not in 1..{MAX_COUNT}")
        if self.out.suffix.lower() != ".png":
            raise InputError(f"--out {self.out} does not end in .png")
        if not self.out.parent.is_dir():
            raise InputError(f"no folder {self.out.parent} for --out; make it first")


@dataclass(frozen=True, kw_only=True, slots=True)
class Film:
    """What a cell of the sheet shows."""

    key: str
    text: str
    pixels: NDArray[np.uint8]
    """(height, width)"""


def run(config: PreviewConfig) -> None:
    """Write the sheet."""
    manifest = read_manifest(config.root)
    if config.split not in manifest.splits:
        raise InputError(f"no split {config.split!r} in {config.root}; it has {', '.join(manifest.splits)}")
    check_outside(config.out, config.root, "--out")
    check_writable(config.out)
    font = load_font(config.font)
    rows = choose_rows(manifest.rows(config.split), config.count, config.seed)
    films = list(read_films(config.root, manifest, config.split, rows))
    buffer = io.BytesIO()
    draw_sheet(films, font).save(buffer, "PNG")
    write_atomic(config.out, buffer.getvalue())
    say(f"{config.out}: {len(rows)} of {manifest.rows(config.split):,} films of {config.split}, with their reports")
    if lacking := sum(lacks_letters(font, film.text) for film in films):
        say(f"{lacking} reports have letters that the font lacks, drawn as boxes; give one that has them with --font")


def load_font(path: Path | None) -> ImageFont.FreeTypeFont:
    """The font of this file, or matplotlib's DejaVu Sans. InputError for a file that is no font."""
    if path is None:
        import matplotlib

        path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    try:
        return ImageFont.truetype(io.BytesIO(path.read_bytes()), _FONT_SIZE)
    except OSError as error:
        raise InputError(
            f"--font {path} cannot be used ({error.strerror or error}); name a .ttf or .otf file"
        ) from None


def lacks_letters(font: ImageFont.FreeTypeFont, text: str) -> bool:
    """Whether a font draws a letter of the part that is shown as it draws what is no character."""
    box = bytes(font.getmask(_NO_CHARACTER))
    return any(bytes(font.getmask(letter)) == box for letter in {*text[:_SHOWN]} if not letter.isspace())


def choose_rows(rows: int, count: int, seed: int) -> NDArray[np.int64]:
    """`count` different rows of a split, or all of them, in order."""
    return np.sort(np.random.default_rng(seed % 2**64).choice(rows, min(count, rows), replace=False))


def read_films(root: Path, manifest: Manifest, split: str, rows: NDArray[np.int64]) -> Iterator[Film]:
    """The films at these rows of a split, ascending."""
    for reader, row in read_samples(root, manifest, split, rows, _COLUMNS):
        content = read_image(reader, row)
        try:
            pixels = decode_image(content, manifest.image)
        except ValueError as error:
            raise InputError(f"shard {reader.info.name}, sample {row['key']}: {error}; ingest again") from None
        yield Film(key=row["key"], text=row["text"], pixels=pixels)


def draw_sheet(films: list[Film], font: ImageFont.FreeTypeFont) -> Image.Image:
    """The contact sheet, grey, about as wide as high."""
    columns = max(1, round(len(films) ** 0.5 * 1.2))
    width, height = _FILM + _GAP, _FILM + (1 + _TEXT_LINES) * _LINE + 2 * _GAP
    lines = -(-len(films) // columns)
    sheet = Image.new("L", (min(columns, len(films)) * width + _GAP, lines * height + _GAP), _PAPER)
    for number, film in enumerate(films):
        line, column = divmod(number, columns)
        _draw_film(sheet, film, font, _GAP + column * width, _GAP + line * height)
    return sheet


def _draw_film(sheet: Image.Image, film: Film, font: ImageFont.FreeTypeFont, x: int, y: int) -> None:
    draw = ImageDraw.Draw(sheet)
    image = Image.fromarray(film.pixels)
    scale = _FILM / max(image.size)
    fitted = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
    sheet.paste(fitted, (x + (_FILM - fitted.width) // 2, y + (_FILM - fitted.height) // 2))
    draw.text((x, y + _FILM + 2), film.key, fill=_PALE, font=font)
    for number, line in enumerate(wrap(film.text, font), 1):
        draw.text((x, y + _FILM + 2 + number * _LINE), line, fill=_INK, font=font)


def wrap(text: str, font) -> list[str]:
    """The beginning of a report in lines that fit under a film, an ellipsis where it goes on."""
    lines, line = [], ""
    words = text[:_SHOWN].split()
    for word in words:
        longer = f"{line} {word}".strip()
        if font.getlength(longer) <= _FILM:
            line = longer
            continue
        if line:
            lines.append(line)
        line = _cut(word, font)
        if len(lines) == _TEXT_LINES:
            break
    lines = [*lines, line] if line else lines
    if len(lines) > _TEXT_LINES:
        lines = [*lines[: _TEXT_LINES - 1], _cut(lines[_TEXT_LINES - 1] + " ...", font)]
    return lines


def _cut(line: str, font) -> str:
    """A line, cut in the middle of its end where it is too wide."""
    while font.getlength(line) > _FILM:
        line = line[: max(1, len(line) - 5)].rstrip(" .") + "..." if len(line) > 8 else line[:1]
    return line
