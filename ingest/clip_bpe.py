"""CLIP's byte-pair encoding, as open_clip's `SimpleTokenizer` does it, without torch.

open_clip brings the vocabulary; importing open_clip for it costs 730 MiB and 7 s, which no ingest has to pay. The
algorithm is that of openai/CLIP `simple_tokenizer.py`; `tests/test_ingest_tokenizer.py` holds it to open_clip's ids.
"""

import gzip
import html
import itertools
from importlib.machinery import PathFinder
from pathlib import Path

import ftfy
import regex

from shards.errors import InputError

START, END = "<start_of_text>", "<end_of_text>"
CONTEXT = 77

_MERGES = 49152 - 256 - 2
"""Of the file's merges as many as CLIP uses."""
_MOST_KNOWN = 100_000
"""Words looked up at most: about 20 MB. Reports have some ten thousand, accession numbers and typing errors more."""
_PATTERN = regex.compile(
    rf"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+", regex.IGNORECASE
)
_PLAIN = regex.compile(r"[ -%'-~\n\t]*")
"""Printable ASCII without `&`: ftfy takes 17 us to find nothing to mend there and no entity to resolve."""


class ClipBpe:
    """Text to token ids. Words seen before are looked up: reports repeat theirs."""

    def __init__(self) -> None:
        """InputError where open_clip is not installed."""
        with gzip.open(_vocabulary_file(), "rt", encoding="utf-8") as file:
            merges = [tuple(line.split()) for line in file.read().split("\n")[1 : _MERGES + 1]]
        self._letters = _letters()
        letters = list(self._letters.values())
        self.words = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), START, END]
        """The vocabulary; a token's id is its place."""
        self._ids = {word: number for number, word in enumerate(self.words)}
        self._ranks = {merge: rank for rank, merge in enumerate(merges)}
        self._specials = {special: [self._ids[special]] for special in (START, END)}
        self._known = dict(self._specials)

    def encode(self, text: str) -> list[int]:
        """Token ids of a report, cleaned and in lower case, without start and end; of a long one the first, 77 or more.

        What would be cut off anyway is not looked at: a field may hold 16 MiB.
        """
        ids: list[int] = []
        for word in _PATTERN.findall(clean(text)):
            if len(ids) >= CONTEXT:
                break
            found = self._known.get(word)
            if found is None:
                found = self._learn(word)
            ids += found
        return ids

    def _learn(self, word: str) -> list[int]:
        if len(self._known) > _MOST_KNOWN:
            self._known = dict(self._specials)
        self._known[word] = [self._ids[part] for part in self._merge(word)]
        return self._known[word]

    def _merge(self, word: str) -> list[str]:
        """A word in parts: neighbours merged, the pair of lowest rank first, until no pair is in the list."""
        parts = [self._letters[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            pair = min(itertools.pairwise(parts), key=lambda pair: self._ranks.get(pair, _MERGES))
            if pair not in self._ranks:
                break
            parts = _join(parts, *pair)
        return parts


def clean(text: str) -> str:
    """CLIP's cleaning: broken Unicode mended, HTML entities resolved, white space single, lower case."""
    if not _PLAIN.fullmatch(text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def _join(parts: list[str], first: str, second: str) -> list[str]:
    """Every `first` that is followed by `second`, joined with it, from the left."""
    joined: list[str] = []
    at = 0
    while at < len(parts):
        both = parts[at] == first and parts[at + 1 : at + 2] == [second]
        joined.append(first + second if both else parts[at])
        at += 2 if both else 1
    return joined


def _letters() -> dict[int, str]:
    """A printable letter for each byte: its own where it has one, else from U+0100 on."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in own]
    return {byte: chr(byte) for byte in own} | {byte: chr(256 + number) for number, byte in enumerate(others)}


def _vocabulary_file() -> Path:
    """open_clip's vocabulary, found without importing it."""
    package = PathFinder.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise InputError("open_clip is not installed; install it (pip install open_clip_torch): its vocabulary is used")
    return Path(package.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
