"""What is worked out from a report at ingest: CLIP tokens, and whether it names a side.

open_clip (and with it torch, 700 MB) is imported on first use, in the one process that tokenises.
"""

import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from xxhash import xxh3_128_hexdigest

from shards.schema import TokenizerSpec

CONTEXT = 77
"""CLIP's context length (Radford et al., 2021, section 2.4: 76 tokens and the end)."""

_SIDES = re.compile(
    r"\b(?:left|right|lt|rt|[lr]|lul|lll|rul|rml|rll|lingula\w*|dextro\w*|l[ae]vo\w*|situs)(?:ward|wards|sided)?\b",
    re.IGNORECASE,
)


def names_side(text: str) -> bool:
    """Whether a report names a side of the body, so that its film must not be mirrored (the flip guard).

    Errs towards yes: `right heart border` counts as well as `right-sided effusion`.
    """
    return _SIDES.search(text) is not None


class ClipTokenizer:
    """open_clip's `SimpleTokenizer`: same ids, with the count and the truncation kept."""

    def __init__(self) -> None:
        from open_clip.tokenizer import SimpleTokenizer

        self._tokenizer = SimpleTokenizer(context_length=CONTEXT)
        vocabulary = "\n".join(self._tokenizer.encoder)
        self.spec = TokenizerSpec(
            name="clip-bpe",
            digest=xxh3_128_hexdigest(vocabulary.encode()),
            context=CONTEXT,
            vocab_size=self._tokenizer.vocab_size,
        )

    def __call__(self, text: str) -> tuple[NDArray[np.uint16], int, bool]:
        """Tokens uint16 (77,) zero-padded, how many of them count (start and end too), and whether text was cut."""
        ids = [self._tokenizer.sot_token_id, *self._tokenizer.encode(text), self._tokenizer.eot_token_id]
        truncated = len(ids) > CONTEXT
        if truncated:
            ids = [*ids[: CONTEXT - 1], self._tokenizer.eot_token_id]
        tokens = np.zeros(CONTEXT, dtype=np.uint16)
        tokens[: len(ids)] = ids
        return tokens, len(ids), truncated


@dataclass(frozen=True, kw_only=True, slots=True)
class Words:
    """What was worked out from the reports, row by row; zero for rows without one."""

    spec: TokenizerSpec
    tokens: NDArray[np.uint16]
    """(rows, context)"""
    counts: NDArray[np.int64]
    truncated: NDArray[np.bool_]
    sides: NDArray[np.bool_]


def read_words(texts: pa.ChunkedArray, wanted: NDArray[np.bool_]) -> Words:
    """Tokenise the reports of the wanted rows and look for sides in them."""
    tokenizer = ClipTokenizer()
    tokens = np.zeros((len(texts), tokenizer.spec.context), dtype=np.uint16)
    counts = np.zeros(len(texts), dtype=np.int64)
    truncated, sides = np.zeros(len(texts), dtype=bool), np.zeros(len(texts), dtype=bool)
    for row in np.flatnonzero(wanted):
        text = texts[row].as_py()
        tokens[row], counts[row], truncated[row] = tokenizer(text)
        sides[row] = names_side(text)
    return Words(spec=tokenizer.spec, tokens=tokens, counts=counts, truncated=truncated, sides=sides)
