"""`python -m bench.nih --data DIR --out OUT`: what a few minutes of `tiny` on a thousand NIH films give, undressed.

Reports are made of the label list ("Effusion|Mass. PA view."), patients are split, and every step is the command a user
would type. Nothing is tuned: the preset as it is, prompts fixed beforehand in the form the texts have. Beside the model
stands what it has to beat: itself untrained, a regression on thumbnails, and the view (sicker patients are filmed AP).
Telling sick from well alone lifts every label, so each is scored among the abnormal films too.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.demo import run_commands, typed
from bench.machine import bench_main, environment
from shards.atomic import write_json
from shards.errors import InputError
from shards.manifest import read_manifest
from shards.reader import ShardReader
from shards.schema import Manifest

TEMPLATE = "{Finding Labels}. {View Position} view."
FORMS = ("{}. PA view.", "{}. AP view.")
"""Both views in every prompt, so that the view itself is on neither side."""
UNTRAINED_SEEDS = (0, 1, 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class NihConfig:
    """Ingest NIH ChestX-ray14 films, train `tiny` on their labels as text, and say what came of it."""

    data: Path
    """Folder with `images/` and `labels.csv` (columns filename, Finding Labels, Patient ID, View Position)."""
    out: Path
    """Folder for shards and run; missing or empty."""
    json: Path | None = None
    """Where the results go too, beside OUT/nih.json."""
    steps: int | None = None
    """Training steps; none: the preset's."""
    seed: int = 0
    """Seed of split and training."""


def nih_commands(config: NihConfig) -> list[list[str]]:
    """The commands, in order, without the interpreter."""
    shards, run, seed = str(config.out / "shards"), str(config.out / "run"), ["--seed", str(config.seed)]
    films = ["--images", str(config.data / "images"), "--path-column", "filename"]
    table = ["--csv", str(config.data / "labels.csv"), "--label-list-column", "Finding Labels"]
    splits = ["--group-column", "Patient ID", "--val-fraction", "0.1", "--test-fraction", "0.3"]
    train = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "train.main", "--preset", "tiny"]
    steps = [] if config.steps is None else ["--steps", str(config.steps)]
    evaluate = ["train.evaluate", "--checkpoint", run, "--shards", shards, "--split", "test"]
    return [
        ["ingest", "--to-shards", shards, *films, *table, "--text-template", TEMPLATE, *splits, *seed],
        ["shards", "verify", shards],
        [*train, "--shards", shards, "--out", run, *steps, *seed],
        [*evaluate, "--prompts", "listed", "--prompt-forms", *FORMS],
    ]


def run_nih(config: NihConfig) -> dict[str, Any]:
    """Run every command, then the controls; the record that is written as JSON."""
    if config.out.exists() and any(config.out.iterdir()):
        raise InputError(f"{config.out} is not empty; choose another folder with --out")
    from train.scores import ROUNDS  # after what a mistake need not wait for

    commands = nih_commands(config)
    seconds = run_commands(commands, what="bench.nih")
    manifest = read_manifest(config.out / "shards")
    rows = [json.loads(line) for line in (config.out / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    record = {
        "bench": "nih",
        "environment": environment(),
        "commands": [typed(command) for command in commands],
        "seconds": seconds,
        "splits": {split: _split_size(manifest, split) for split in manifest.splits},
        "validation": [{"step": row["step"], "loss": row["val_loss"]} for row in rows if "val_loss" in row],
        "bootstrap": {"unit": "patient", "rounds": ROUNDS, "interval": "2.5 to 97.5 %"},
        "test": _scores(config, manifest),
    }
    write_json(config.out / "nih.json", record)
    return record


def _split_size(manifest: Manifest, split: str) -> dict[str, int]:
    first, end = manifest.groups[split]
    return {"films": manifest.rows(split), "patients": end - first}


def _scores(config: NihConfig, manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Label, or `mean` -> AUROC on the test split of the model, with its interval, and of what it has to beat."""
    from train.controls import thumbnails, with_mean
    from train.ensemble import find_checkpoints, read_member
    from train.scorecard import score_split
    from train.scores import ROUNDS, aurocs, patients_of, truth_of
    from train.zeroshot import NORMAL

    (best,) = find_checkpoints([config.out / "run"])
    member = read_member(best)
    settings = replace(member.settings, shards=config.out / "shards")
    groups, ap_views = read_test_rows(config.out / "shards", manifest)
    found: dict[str, NDArray[np.float64]] = {}
    labels = np.empty(0, np.float32)
    for name, scores, truth in _predictions(settings, member, manifest):
        found[name], labels = scores, truth
    found["view_ap"] = np.repeat(ap_views[:, None], len(manifest.labels), axis=1)
    scored = {name: with_mean(aurocs(scores, labels, manifest.labels)) for name, scores in found.items()}
    scored["thumbnails"] = thumbnails(settings, manifest, "test")
    sick = labels[:, manifest.labels.index(NORMAL)] == 0
    scored["model_among_abnormal"] = with_mean(aurocs(found["model"][sick], labels[sick], manifest.labels))

    def intervals(some: NDArray[np.bool_]) -> list[list[float] | None]:
        """Of the AUROC of each label over some films and, last, of their mean."""
        none, patients = np.full(len(manifest.labels), np.nan), patients_of(groups[some])  # no thresholds
        truth, scores = truth_of(labels[some]), found["model"][some]
        each, mean = score_split(manifest.labels, scores, truth, none, patients, rounds=ROUNDS, seed=config.seed)
        return [scores.intervals["auroc"] for scores in (*each.values(), mean)]

    every, among = intervals(np.ones(len(labels), bool)), intervals(sick)
    record: dict[str, dict[str, Any]] = {}
    for number, label in enumerate((*manifest.labels, "mean")):
        record[label] = {name: scores[label] for name, scores in scored.items()}
        record[label] |= {"interval": every[number], "interval_among_abnormal": among[number]}
        if label != "mean":
            present = labels[:, number] == 1
            record[label] |= {"films": int(present.sum()), "patients": len(np.unique(groups[present]))}
    return record


def read_test_rows(root: Path, manifest: Manifest) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Patient (N,) and whether the view is AP (N,) of the test split's rows, in order."""
    groups, views = [], []
    for info in manifest.splits["test"]:
        with ShardReader(root, manifest, info) as reader:
            table = reader.read_table()
        groups += table["group"].to_pylist()
        views += [text.endswith("AP view.") for text in table["text"].to_pylist()]
    return np.array(groups), np.array(views, dtype=np.float32)


def _predictions(
    settings: Any, member: Any, manifest: Manifest
) -> Iterator[tuple[str, NDArray[np.float64], NDArray[np.float32]]]:
    """Name, scores (N, K), labels (N, K): the model, then with prompts unlike its texts, then untrained ones."""
    import torch

    from train.config import loader_config
    from train.ensemble import model_of
    from train.model import build_model
    from train.zeroshot import Wording, predict

    def told(model: Any, wording: Wording) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        found = predict(model, loader, manifest=manifest, wording=wording)
        return found.probabilities, found.labels

    loader = loader_config(settings, split="test", mode="eval")
    listed = Wording(style="listed", forms=FORMS)
    model = model_of(member, manifest)
    yield "model", *told(model, listed)
    for name, wording in (("bare", Wording(style="listed")), ("chexzero", Wording(style="chexzero"))):
        yield f"model_{name}_prompts", *told(model, wording)
    spec = manifest.tokenizer
    for seed in UNTRAINED_SEEDS:
        torch.manual_seed(seed)
        model = build_model(settings.model, vocab_size=spec.vocab_size, context=spec.context)
        yield f"untrained_{seed}", *told(model, listed)


def main(argv: list[str] | None = None) -> None:
    bench_main("bench.nih", NihConfig, argv, run_nih)


if __name__ == "__main__":
    main()
