"""What a reader of an evaluation has to know beside its figures, in plain words."""

from collections.abc import Sequence

from shards.schema import Manifest
from train.scorecard import LabelScores


def split_notes(manifest: Manifest, split: str, *, choosing: bool, unit: str) -> list[str]:
    """What the split and its patients mean for all figures. `choosing`: val has films to choose thresholds on."""
    notes = []
    if split == "val":
        absent = "" if manifest.rows("test") else ", for there is no test split"
        notes.append(
            f"scored on val{absent}: checkpoint and thresholds were chosen on these films; expect less of others"
        )
    if split == "train":
        notes.append("scored on train: the model was trained on these films")
    if not manifest.labels:
        notes.append("no label columns: retrieval alone")
    elif not choosing:
        notes.append("there is no film of val to choose thresholds on: no F1, MCC, sensitivity, specificity")
    if unit != "patient":
        notes.append(f"intervals are over draws of a {unit}; where patients have several films they are too narrow")
    return notes


def label_notes(labels: dict[str, LabelScores], *, unused: Sequence[str], choosing: bool) -> list[str]:
    """Labels that something is missing for. `unused`: labels of the prompts' file that the data set does not have."""
    notes = []
    without = [name for name, scores in labels.items() if scores.auroc is None]
    unchosen = [name for name, scores in labels.items() if scores.auroc is not None and scores.threshold is None]
    if without:
        count = f"{len(without)} of {len(labels)} labels"
        notes.append(f"{count} lack positives or negatives and are in no mean: {', '.join(without)}")
    if unchosen and choosing:
        notes.append(f"without a threshold, for val lacks positives or negatives: {', '.join(unchosen)}")
    if unused:
        notes.append(f"the prompts' file names labels that these shards do not have: {', '.join(unused)}")
    return notes
