"""What is worked out from a report at ingest: CLIP tokens, and whether it names a side."""

import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ingest.tokenizer import Tokenizer
from shards.schema import TokenizerSpec

TOKENIZER = "ViT-B-32-quickgelu"
"""CLIP's own, by the name of the open_clip model that has it; `ingest.retokenize` makes others."""

_SIDES = re.compile(
    r"\b(?:left|right|lt|rt|[lr]|lul|lll|rul|rml|rll|lingula\w*|dextro\w*|l[ae]vo\w*|situs)(?:ward|wards|sided)?\b",
    re.IGNORECASE,
)


def names_side(text: str) -> bool:
    """Whether a report names a side of the body, so that its film must not be mirrored (the flip guard).

    Errs towards yes: `right heart border` counts as well as `right-sided effusion`.
    """
    return _SIDES.search(text) is not None


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
    tokenizer = Tokenizer(TOKENIZER)
    tokens = np.zeros((len(texts), tokenizer.spec.context), dtype=np.uint16)
    counts = np.zeros(len(texts), dtype=np.int64)
    truncated, sides = np.zeros(len(texts), dtype=bool), np.zeros(len(texts), dtype=bool)
    for row in np.flatnonzero(wanted):
        text = texts[row].as_py()
        tokens[row], counts[row], truncated[row] = tokenizer(text)
        sides[row] = names_side(text)
    return Words(spec=tokenizer.spec, tokens=tokens, counts=counts, truncated=truncated, sides=sides)
