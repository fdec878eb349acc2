"""`python -m train.controls --shards OUT --out DIR`: is what the model learnt real? Three controls beside the model.

    untrained    zero-shot AUROC before training                                    0.5 +- 0.07
    shuffled     after training with reports shuffled between films, films as ever  0.5 +- 0.07
    thumbnails   a logistic regression on 16 x 16 pixels, trained on the labels     at least 0.05 below the model

Each is evaluated on the same split as the model. DIR/controls.json has it all; exit code 1 says that a control failed.
"""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from pipeline.batch import World
from pipeline.loader import build_loader
from shards.atomic import check_writable, write_json
from shards.cli import main_guard, parse, say
from shards.errors import InputError
from shards.manifest import read_manifest
from shards.schema import Manifest
from train.checkpoint import newest_good
from train.commandline import preset
from train.config import TrainConfig, loader_config
from train.evaluate import EvaluateConfig, evaluate
from train.model import build_model
from train.rundir import RunFolder
from train.scores import auroc, aurocs, truth_of
from train.zeroshot import predict

PROG = "python -m train.controls"
CHANCE = 0.07
"""How far from 0.5 the mean AUROC of a model that cannot know anything may be."""
MARGIN = 0.05
"""How far the thumbnails have to stay below the model."""
THUMBNAIL = 16
_PENALTIES = (0.001, 0.01, 0.1, 1.0)
_UNTRAINED = 3

Scores = dict[str, float | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlsConfig:
    """Train the preset with and without its reports shuffled, and compare with no training and with thumbnails."""

    shards: Path
    """Folder of the data set, with labels and train, val and test splits."""
    out: Path
    """Folder for the runs and controls.json."""
    checkpoint: Path | None = None
    """Run folder of a model trained already, `demo/run` say; None trains one into OUT/model."""
    preset: str = "tiny"
    """Preset to train."""
    steps: int | None = None
    """Training steps; None for the preset's."""
    ranks: int = 2
    """Processes that train."""
    seed: int = 0
    """Seed of the training runs, and the first of the untrained models."""
    split: Literal["val", "test"] = "test"
    """Split to evaluate on."""


def run_controls(config: ControlsConfig) -> dict[str, Any]:
    """All controls; the record that was written to controls.json."""
    manifest = read_manifest(config.shards)
    _check(config, manifest)
    check_writable(config.out, folder=True)
    settings = replace(preset(config.preset), shards=config.shards, out=config.out, seed=config.seed)
    scores = {
        "untrained": untrained(settings, manifest, config.split),
        "shuffled": _trained(config, "shuffled", ["--shuffle-reports"]),
        "thumbnails": thumbnails(settings, manifest, config.split),
        "model": _evaluated(config, config.checkpoint) if config.checkpoint else _trained(config, "model", []),
    }
    record = {"shards": manifest.digest, "split": config.split, "auroc": scores, "passed": judge(scores)}
    write_json(config.out / "controls.json", record)
    return record


def _check(config: ControlsConfig, manifest: Manifest) -> None:
    missing = [split for split in ("train", "val", config.split) if not manifest.rows(split)]
    if missing or not manifest.labels:
        lack = f"no {missing[0]} split" if missing else "no label columns"
        raise InputError(f"{config.shards} has {lack}; ingest with --val-fraction, --test-fraction and --label-columns")


def judge(scores: dict[str, Scores]) -> dict[str, bool]:
    """Whether each control came out as it has to."""
    mean = {name: _number(score["mean"]) for name, score in scores.items()}
    return {
        "untrained": abs(mean["untrained"] - 0.5) <= CHANCE,
        "shuffled": abs(mean["shuffled"] - 0.5) <= CHANCE,
        "thumbnails": mean["thumbnails"] <= mean["model"] - MARGIN,
    }


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def untrained(settings: TrainConfig, manifest: Manifest, split: str) -> Scores:
    """Mean over a few freshly initialised models, the training run's own first."""
    loader = loader_config(settings, split=split, mode="eval")
    results = []
    for seed in range(settings.seed, settings.seed + _UNTRAINED):
        torch.manual_seed(seed)
        spec = manifest.tokenizer
        model = build_model(settings.model, vocab_size=spec.vocab_size, context=spec.context)
        found = predict(model, loader, manifest=manifest)
        results.append(with_mean(aurocs(found.probabilities, found.labels, manifest.labels)))
    return {name: float(np.mean([_number(result[name]) for result in results])) for name in results[0]}


def with_mean(scores: Scores) -> Scores:
    """Scores by label with their mean, over the labels that have one, under `mean`."""
    known = [score for score in scores.values() if score is not None]
    return {**scores, "mean": float(np.mean(known)) if known else None}


def _trained(config: ControlsConfig, name: str, flags: list[str]) -> Scores:
    """Train into OUT/NAME with train.main on all ranks, and evaluate the last step."""
    folder = config.out / name
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={config.ranks}", "-m", "train.main"]
    flags = [*flags, "--preset", config.preset, "--shards", str(config.shards), "--out", str(folder)]
    flags += ["--seed", str(config.seed)] + ([] if config.steps is None else ["--steps", str(config.steps)])
    say(f"training {folder}")
    done = subprocess.run([sys.executable, "-m", *torchrun, *flags])
    if done.returncode:
        raise InputError(f"training {folder} ended with exit code {done.returncode}, its message stands above")
    return _evaluated(config, _last(folder))


def _last(folder: Path) -> Path:
    """The newest checkpoint: with shuffled reports the best one would be the least trained."""
    found = newest_good(RunFolder(root=folder).checkpoints, warn=say)
    if found is None:
        raise InputError(f"{folder} holds no checkpoint to evaluate")
    return found[0]


def _evaluated(config: ControlsConfig, checkpoint: Path) -> Scores:
    asked = EvaluateConfig(
        checkpoint=(checkpoint,), shards=config.shards, split=config.split, resamples=0, retrieval=False, plots=False
    )
    return with_mean(evaluate(asked).auroc)


def thumbnails(settings: TrainConfig, manifest: Manifest, split: str) -> Scores:
    """A logistic regression per label, trained on `train`, its penalty chosen on `val`."""
    sets = {name: read_thumbnails(settings, name) for name in ("train", "val", split)}
    low, high = sets["train"][0].mean(axis=0), sets["train"][0].std(axis=0) + 1e-6
    scaled = {name: ((pixels - low) / high, labels) for name, (pixels, labels) in sets.items()}
    scores = {}
    for number, label in enumerate(manifest.labels):
        column = {name: (pixels, labels[:, number]) for name, (pixels, labels) in scaled.items()}
        fits = [fit for fit in (_fit(*column["train"], penalty) for penalty in _PENALTIES) if fit is not None]
        best = max(fits, key=lambda fit: _score(fit, *column["val"]) or 0.0, default=None)
        scores[label] = None if best is None else _score(best, *column[split])
    return with_mean(scores)


def read_thumbnails(settings: TrainConfig, split: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Pixels (N, 256) and labels (N, K) of a split, in row order."""
    pixels, labels = [], []
    with build_loader(loader_config(settings, split=split, mode="eval"), World()) as loader:
        for batch in loader:
            pixels.append(F.adaptive_avg_pool2d(batch.images[:, :1], THUMBNAIL).flatten(1).numpy().copy())
            labels.append(batch.labels.numpy().copy())
    return np.concatenate(pixels), np.concatenate(labels)


Fit = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def _fit(pixels: NDArray[np.float32], label: NDArray[np.float32], penalty: float) -> Fit | None:
    """The decision function of one regression; None where the label has one side only."""
    from sklearn.linear_model import LogisticRegression

    known = (label == 0) | (label == 1)
    if len(np.unique(label[known])) < 2:
        return None
    return LogisticRegression(C=penalty, max_iter=2000).fit(pixels[known], label[known]).decision_function


def _score(fit: Fit, pixels: NDArray[np.float32], label: NDArray[np.float32]) -> float | None:
    return auroc(fit(pixels), truth_of(label))


def table(record: dict[str, Any]) -> list[str]:
    """The scores, a line a label, and what each control came to."""
    names, scores, passed = list(record["auroc"]), record["auroc"], record["passed"]
    lines = [f"{record['split'] + ' AUROC':<24}" + "".join(f"{name:>12}" for name in names)]
    for label in scores[names[0]]:
        lines.append(f"{label:<24}" + "".join(f"{_number(scores[name][label]):12.3f}" for name in names))
    verdicts = {True: "ok", False: "FAILED"}
    return [*lines, f"{'':<24}" + "".join(f"{verdicts[passed[name]] if name in passed else '':>12}" for name in names)]


def main(argv: list[str] | None = None) -> None:
    """Run the controls, print the table; exit code 1 where one failed."""
    with main_guard(PROG):
        record = run_controls(parse(ControlsConfig, argv, prog=PROG))
        say("\n" + "\n".join(table(record)))
        if not all(record["passed"].values()):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
