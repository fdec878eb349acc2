"""What findings are called: reports' words, CheXzero's pair, texts made of label lists; each in sentences; files."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from shards.errors import InputError
from train.zeroshot import ALIASES, NORMAL, PROMPTS, SHIPPED, Prompt, Wording, listed_note, prompt_for, read_prompts

CHEXPERT = (
    *("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema"),
    *("Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture"),
    "Support Devices",
)
NIH = (
    *("No Finding", "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema", "Fibrosis"),
    *("Hernia", "Infiltration", "Mass", "Nodule", "Pleural_Thickening", "Pneumonia", "Pneumothorax"),
)


@pytest.mark.parametrize("labels", [CHEXPERT, NIH])
@pytest.mark.parametrize("style", ["reports", "chexzero", "listed"])
def test_every_label_of_chexpert_and_nih_has_two_sides_of_its_own(labels: tuple[str, ...], style) -> None:
    prompts = [prompt_for(label, style, labels=labels) for label in labels]
    for prompt in prompts:
        assert all(prompt.sides) and not set(prompt.positive) & set(prompt.negative)
    assert len({prompt.positive for prompt in prompts}) == len(labels)


def test_nihs_names_are_put_into_reports_words() -> None:
    assert prompt_for("Effusion") == PROMPTS["Pleural Effusion"]
    assert prompt_for("Pleural_Thickening") == Prompt(
        positive=("pleural thickening",), negative=("no pleural thickening",)
    )
    assert set(ALIASES) <= {*NIH, *CHEXPERT}


def test_chexzeros_pair_is_literal() -> None:
    for label in ("Effusion", "Cardiomegaly", "Pleural Other"):
        name = label.lower()
        assert prompt_for(label, "chexzero") == Prompt(positive=(name,), negative=(f"no {name}",))


def test_listed_says_what_such_texts_say() -> None:
    """A text made of labels never says `no mass`: the other side is No Finding, whose other side is everything else."""
    assert prompt_for("Pleural_Thickening", "listed", labels=NIH) == Prompt(
        positive=("Pleural_Thickening",), negative=(NORMAL,)
    )
    assert prompt_for(NORMAL, "listed", labels=NIH) == Prompt(positive=(NORMAL,), negative=NIH[1:])
    assert prompt_for(NORMAL, "listed", labels=(NORMAL,)).negative


def test_sentences_multiply() -> None:
    wording = Wording(style="listed", forms=("{}. PA view.", "{}. AP view."))
    prompt = wording.prompt("Mass", NIH)
    assert prompt.positive == ("Mass. PA view.", "Mass. AP view.")
    assert prompt.negative == ("No Finding. PA view.", "No Finding. AP view.")
    assert Wording().prompt("Edema", NIH) == prompt_for("Edema")
    for forms in ((), ("PA view.",)):
        with pytest.raises(InputError, match="--prompt-forms"):
            Wording(forms=forms)


def test_the_shipped_file_is_chexperts_labels_and_can_be_given_back() -> None:
    assert sorted(PROMPTS) == sorted(CHEXPERT)
    assert read_prompts(SHIPPED) == PROMPTS
    assert Wording(own=PROMPTS).prompt("Effusion", NIH) == PROMPTS["Pleural Effusion"]


def test_a_file_of_ones_own_goes_first(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('["Pleural Effusion"]\npositive = ["fluid", "wet"]\nnegative = ["dry"]\n')
    wording = Wording(style="chexzero", forms=("{}.", "Now {}."), own=read_prompts(path))
    assert wording.prompt("Effusion", NIH) == Prompt(
        positive=("fluid.", "Now fluid.", "wet.", "Now wet."), negative=("dry.", "Now dry.")
    )
    assert wording.prompt("Edema", NIH).negative == ("no edema.", "Now no edema.")
    assert wording.unused(NIH) == [] and wording.unused(("Edema",)) == ["Pleural Effusion"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[Edema", "not TOML"),
        ("", "holds no prompts"),
        ("Edema = 1", "two lists"),
        ('[Edema]\npositive = ["a"]', "two lists"),
        ('[Edema]\npositive = ["a"]\nnegative = ["b"]\nneutral = []', "two lists"),
        ('[Edema]\npositive = "a"\nnegative = ["b"]', "`positive`"),
        ('[Edema]\npositive = ["a"]\nnegative = []', "`negative`"),
        ('[Edema]\npositive = ["a", "b"]\nnegative = ["b", "a"]', "say the same"),
        ('[Edema]\npositive = ["a", " "]\nnegative = ["b"]', "`positive`"),
        ('[Edema]\npositive = [1]\nnegative = ["b"]', "`positive`"),
        ("a=" + "[" * 100_000, "not TOML"),
        ("#" * (1 << 20) + "\n", "no file of at most"),
    ],
)
def test_a_bad_file_says_where(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(content)
    with pytest.raises(InputError, match=words):
        read_prompts(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not TOML"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("texts", "noted"),
    [
        (["Mass|Edema. PA view.", "No Finding. AP view."], 1),
        (["Mass|Edema. PA view.", "No Finding. No Mass."], 0),  # names what is not there
        (["Mass. PA view.", "No Finding. AP view."], 0),  # leaves one out
        (["There is a mass.", "No acute disease."], 0),
    ],
)
def test_prompts_of_another_form_than_texts_made_of_labels_are_told(texts: list[str], noted: int, monkeypatch) -> None:
    labels = np.array([[1, 1, 0], [0, np.nan, 1]], np.float32)
    reader = SimpleNamespace(read_text=lambda _: texts, read_rows=lambda _: SimpleNamespace(labels=labels))
    monkeypatch.setattr("train.zeroshot.ShardReader", lambda *_: contextlib.nullcontext(reader))
    manifest = SimpleNamespace(labels=("Mass", "Edema", "No Finding"), splits={"test": [None]})
    loader = SimpleNamespace(shards=Path(), split="test")
    assert len(listed_note(Wording(), loader, manifest)) == noted
    assert not listed_note(Wording(style="listed"), loader, manifest)
    assert not listed_note(Wording(own=PROMPTS), loader, manifest)
