"""CLIP's tokenizer, and those of open_clip's models that differ from it in cleaning and length: ids as open_clip's.

open_clip brings the vocabulary; importing it for that costs torch, 730 MiB and 7 s, which no ingest has to pay. It is
imported for the name of another model. The algorithm is that of openai/CLIP `simple_tokenizer.py`;
`tests/test_ingest_tokenizer.py` holds it to open_clip's ids.
"""

import difflib
import gzip
import html
import logging
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from itertools import pairwise
from pathlib import Path

import ftfy
import numpy as np
import regex
from numpy.typing import NDArray
from xxhash import xxh3_128_hexdigest

from shards.errors import InputError
from shards.schema import TokenizerSpec

START, END = "<start_of_text>", "<end_of_text>"
CONTEXT = 77

_MERGES = 49152 - 256 - 2
"""Of the file's merges as many as CLIP uses."""
_MOST_KNOWN, _LONGEST_KNOWN = 100_000, 100
"""Words looked up at most, and letters of one: about 20 MB. Reports have some ten thousand, typing errors more."""
_MOST_LETTERS = 4096
"""Of a word that are looked at. Its first CONTEXT tokens are all that count, and are a few hundred letters."""
_PATTERN = regex.compile(
    rf"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+", regex.IGNORECASE
)
_PLAIN = regex.compile(r"[ -%'-~\n\t]*")
"""Printable ASCII without `&`: ftfy takes 17 us to find nothing to mend there and no entity to resolve."""
CLIP_NAME = "clip-bpe"
"""What CLIP's own BPE with its own cleaning is called in a manifest, whatever model it was asked for by."""
_CLIP_CLEANING = "_clean_lower"
_NOT_CLIPS = "is not CLIP's, the only one that the text towers here read"


class ClipBpe:
    """Text to token ids. Words seen before are looked up: reports repeat theirs."""

    def __init__(self, clean: Callable[[str], str] | None = None, context: int = CONTEXT) -> None:
        """With CLIP's own cleaning, or another. InputError where open_clip is not installed."""
        self._clean, self.context = clean or clip_cleaned, context
        with gzip.open(_vocabulary_file(), "rt", encoding="utf-8") as file:
            merges = [line.split() for line in file.read().split("\n")[1 : _MERGES + 1]]
        self._letters = _letters()
        letters = list(self._letters.values())
        self.words = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), START, END]
        """The vocabulary; a token's id is its place."""
        self._ids = {word: number for number, word in enumerate(self.words)}
        self._ranks = {(first, second): rank for rank, (first, second) in enumerate(merges)}
        self._specials = {special: [self._ids[special]] for special in (START, END)}
        self._known = dict(self._specials)

    def encode(self, text: str) -> list[int]:
        """Token ids of a report, cleaned, without start and end; of a long one the first.

        As many as the context holds, or more: what would be cut off anyway is not looked at, a field may hold 16 MiB.
        """
        ids: list[int] = []
        for word in _PATTERN.findall(self._clean(text)):
            if len(ids) >= self.context:
                break
            found = self._known.get(word)
            if found is None:
                found = self._learn(word)
            ids += found
        return ids

    def _learn(self, word: str) -> list[int]:
        if len(self._known) > _MOST_KNOWN:
            self._known = dict(self._specials)
        ids = [self._ids[part] for part in self._merge(word)]
        if len(word) <= _LONGEST_KNOWN:
            self._known[word] = ids
        return ids

    def _merge(self, word: str) -> list[str]:
        """A word in parts: neighbours merged, the pair of lowest rank first, until no pair is in the list."""
        parts = [self._letters[byte] for byte in word[:_MOST_LETTERS].encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            pair = min(pairwise(parts), key=lambda pair: self._ranks.get(pair, _MERGES))
            if pair not in self._ranks:
                break
            parts = list(_joined(parts, pair))
        return parts


def _joined(parts: list[str], pair: tuple[str, str]) -> Iterator[str]:
    """The parts with that pair of neighbours as one, from the left."""
    following = iter(range(len(parts)))
    for place in following:
        if tuple(parts[place : place + 2]) == pair:
            next(following)
            yield "".join(pair)
        else:
            yield parts[place]


def clip_cleaned(text: str) -> str:
    """CLIP's cleaning: broken Unicode mended, HTML entities resolved, white space single, lower case."""
    if not _PLAIN.fullmatch(text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


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


class Tokenizer:
    """The tokenizer of one open_clip model, or CLIP's own, which needs no open_clip in memory."""

    def __init__(self, name: str = CLIP_NAME) -> None:
        """InputError for a model that open_clip does not know, or whose tokenizer is not CLIP's."""
        if name == CLIP_NAME:
            self._bpe, cleaning = ClipBpe(), _CLIP_CLEANING
        else:
            loaded, cleaning = _load(name)
            self._bpe = ClipBpe(loaded.clean_fn, loaded.context_length)
            if list(loaded.encoder) != self._bpe.words:
                raise InputError(f"the tokenizer of {name!r} {_NOT_CLIPS}")
        self.spec = _spec(name, self._bpe, cleaning)
        self._start, self._end = map(self._bpe.words.index, (START, END))

    def __call__(self, text: str) -> tuple[NDArray[np.uint16], int, bool]:
        """Tokens uint16 (context,) zero-padded, how many count (start and end too), and whether text was cut."""
        context = self.spec.context
        ids = [self._start, *self._bpe.encode(text), self._end]
        truncated = len(ids) > context
        if truncated:
            ids = [*ids[: context - 1], self._end]
        tokens = np.zeros(context, dtype=np.uint16)
        tokens[: len(ids)] = ids
        return tokens, len(ids), truncated


def _load(name: str):
    """open_clip's tokenizer object of a model, and what its cleaning is called."""
    import open_clip
    from open_clip.tokenizer import SimpleTokenizer

    known = open_clip.list_models()
    if name not in known:  # open_clip itself would quietly take CLIP's
        near = ", ".join(difflib.get_close_matches(name, known, 3)) or "ViT-B-32-quickgelu, ViT-L-14"
        raise InputError(f"open_clip knows no model {name!r}; it knows for example {near}")
    try:
        logging.disable(logging.WARNING)
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # whatever a missing package, file or network raises
        raise InputError(
            f"the tokenizer of {name!r} cannot be loaded here ({type(error).__name__}): it is one of Hugging Face's, "
            "which needs their package and files; CLIP's, as in ViT-B-32-quickgelu, comes with open_clip"
        ) from None
    finally:
        logging.disable(logging.NOTSET)
    if not isinstance(tokenizer, SimpleTokenizer) or tokenizer.reduction_fn is not None:
        raise InputError(f"the tokenizer of {name!r} {_NOT_CLIPS}")
    return tokenizer, tokenizer.clean_fn.__name__


def _spec(name: str, bpe: ClipBpe, cleaning: str) -> TokenizerSpec:
    # CLIP's own is named and digested as ingest does; another cleaning makes another tokenizer of the same words.
    plain = cleaning == _CLIP_CLEANING
    return TokenizerSpec(
        name=CLIP_NAME if plain else name,
        digest=xxh3_128_hexdigest("\n".join(bpe.words if plain else [*bpe.words, cleaning]).encode()),
        context=bpe.context,
        vocab_size=len(bpe.words),
    )
