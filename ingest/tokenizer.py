"""Tokenizers by the name of the open_clip model that they belong to: ids as open_clip makes them, counted.

open_clip (and with it torch, 700 MB and 7 s) is imported when one other than CLIP's own is made.
"""

import difflib
import logging

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128_hexdigest

from ingest.clip_bpe import END, START, ClipBpe
from shards.errors import InputError
from shards.schema import TokenizerSpec

CLIP_NAME = "clip-bpe"
"""What CLIP's own BPE with its own cleaning is called in a manifest, whatever model it was asked for by."""
_CLIP_CLEANING = "_clean_lower"
_NOT_CLIPS = "is not CLIP's, the only one that the text towers here read"


class Tokenizer:
    """The tokenizer of one open_clip model, or CLIP's own, which needs no open_clip in memory."""

    def __init__(self, name: str = CLIP_NAME) -> None:
        """InputError for a model that open_clip does not know, or whose tokenizer is not CLIP's."""
        self._bpe, cleaning = ClipBpe(), _CLIP_CLEANING
        if name != CLIP_NAME:
            loaded, cleaning = _load(name)
            if list(loaded.encoder) != self._bpe.words:
                raise InputError(f"the tokenizer of {name!r} {_NOT_CLIPS}")
            self._bpe = ClipBpe(loaded.clean_fn, loaded.context_length)
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
