"""CLIP's tokens without open_clip in memory: the same ids as open_clip's own tokenizer."""

import subprocess
import sys
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ingest.tokenizer
from ingest.tokenizer import CLIP_NAME, CONTEXT, ClipBpe, Tokenizer

OURS = ClipBpe()


def same(theirs, text: str) -> bool:
    """Whether ours are open_clip's ids: all of them, or at least those that fit the context."""
    ours, expected = OURS.encode(text), theirs.encode(text)
    return ours == expected or (len(ours) >= CONTEXT and ours == expected[: len(ours)])


@pytest.fixture(scope="module")
def theirs():
    from open_clip import get_tokenizer

    return get_tokenizer("ViT-B-32-quickgelu")


def test_spec_is_open_clips(theirs):
    assert list(theirs.encoder) == OURS.words
    assert Tokenizer().spec == Tokenizer("ViT-B-32-quickgelu").spec
    assert Tokenizer().spec.name == CLIP_NAME and Tokenizer().spec.vocab_size == 49408


@pytest.mark.parametrize("text", ["No acute process.", "Größe: 3 µm — \ufffd, left; RIGHT", "word " * 200, "x"])
def test_rows_are_open_clips(theirs, text):
    tokens, count, truncated = Tokenizer()(text)
    (expected,) = theirs([text]).numpy()
    assert tokens.tolist() == expected.tolist()
    assert count == int(expected.argmax()) + 1 and truncated == text.startswith("word")


def test_real_reports(theirs, real_data):
    with tarfile.open(real_data / "reports" / "NLMCXR_reports.tgz") as reports:
        texts = [reports.extractfile(member).read().decode() for member in reports if member.isfile()][::20]
    assert len(texts) > 190 and all(same(theirs, text) for text in texts)


@given(text=st.one_of(st.text(max_size=200), st.text(st.characters(max_codepoint=127), max_size=200)))
def test_any_text(theirs, text):
    assert same(theirs, text)


PIECES = [word.removesuffix("</w>") for word in OURS.words if word.removesuffix("</w>").isascii()]


@given(
    word=st.one_of(st.text("ab"), st.text("aetinos"), st.text("-=."), st.lists(st.sampled_from(PIECES)).map("".join))
)
def test_any_word(theirs, word):
    """Words that many pairs of the list overlap in."""
    assert same(theirs, word)


def test_of_an_endless_word_only_the_beginning_is_looked_at():
    """A pass over the word for each pair in it takes the square of its length."""
    bpe, word = ClipBpe(), "ab" * 500_000
    assert bpe.encode(word) == bpe.encode(word[: ingest.tokenizer._MOST_LETTERS])
    assert len(bpe.encode(word)) > CONTEXT


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "<start_of_text> A <END_OF_TEXT>",
        "&amp;lt; Herz&#228;",
        "don't WE'LL",
        "ﬁbrosis\u00a0 ½",
        "a" * 3000,
        "tab\there\r\nand\x1b[31m red \x00\x85",
        "plain, 100% 'quoted' \"twice\" <b>~</b> ``x``",
        "é ́ Ł🫁",
    ],
)
def test_odd_texts(theirs, text):
    assert same(theirs, text)


def test_forgotten_words_come_out_the_same(monkeypatch):
    monkeypatch.setattr(ingest.tokenizer, "_MOST_KNOWN", 3)
    small, text = ClipBpe(), "No acute cardiopulmonary abnormality; no effusion, no pneumothorax. " * 3
    assert small.encode(text) == OURS.encode(text) == small.encode(text)
    assert len(small._known) <= 4


def test_what_is_cut_off_is_not_encoded():
    assert len(OURS.encode("lungs are clear " * 100_000)) == CONTEXT


def test_torch_stays_out_of_an_ingest():
    code = "import sys, ingest.run, ingest.tokenizer as t; t.Tokenizer()('x'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
