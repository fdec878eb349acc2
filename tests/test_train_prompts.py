"""What findings are called: reports' words, CheXzero's pair, texts made of label lists; each in sentences."""

import pytest

from shards.errors import InputError
from train.prompts import ALIASES, NORMAL, PROMPTS, Prompt, Wording, prompt_for

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
