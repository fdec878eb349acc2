"""`python -m train.evaluate --checkpoint RUN --shards OUT --split test`: what a model knows that it was never taught.

Every label's findings zero-shot (AUROC, average precision, F1, MCC) and retrieval of reports by films and films by
reports, with 95 % intervals over patients. Scores are of the test split; what has to be chosen (the checkpoint, the
threshold of F1 and MCC) is chosen on val. Where that cannot be, `notes` say so, in the files and on the screen.

    EVALUATION.json     all of it                    EVALUATION-roc.png, -pr.png    curves, a panel a label
    EVALUATION.csv      a line a label
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pipeline.config import LoaderConfig
from pipeline.loader import make_layout
from pipeline.selection import Selection
from shards.atomic import write_atomic, write_json
from shards.cli import check_outside, main_guard, parse, say
from shards.errors import InputError
from shards.manifest import read_manifest
from shards.schema import Manifest
from train.curves import draw_precision_recall, draw_roc
from train.device import choose_device, memory_named
from train.ensemble import Member, Weights, eval_loader, find_checkpoints, model_of, predict_as_one, result_path
from train.ranks import Ranks
from train.retrieval import read_identity, retrieve
from train.rundir import check_result
from train.scorecard import Evaluation, label_notes, score_split, split_notes, table, to_csv
from train.scores import ROUNDS, Criterion, Floats, Uncertain, choose_threshold, patients_of, truth_of
from train.zeroshot import Predicted, Style, Wording, listed_note, predict, read_prompts

PROG = "train.evaluate"


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Evaluate a checkpoint, or several as one: zero-shot scores of every label column, and retrieval."""

    checkpoint: tuple[Path, ...]
    """A run's folder (its best checkpoint, or the newest where none was validated), or a checkpoint file. Several are
    one model: their probabilities are averaged."""
    top: int | None = None
    """Average the K checkpoints with the lowest validation loss, of all that the runs of --checkpoint keep."""
    weights: Weights = "auto"
    """auto: weights averaged over the steps (EMA) where a checkpoint has them, else the model's."""
    shards: Path
    """Folder of the data set to evaluate on."""
    split: Literal["auto", "train", "val", "test"] = "auto"
    """auto: test where there is one, else val."""
    where: str | None = None
    """Evaluate only the samples for which this query holds; what the run was trained on plays no part here."""
    exclude: Path | None = None
    """File of keys, one 00-0000000123 a line, of samples to leave out."""
    uncertain: Uncertain = "ignore"
    """What a label of -1 counts as."""
    threshold_by: Criterion = "mcc"
    """What each label's threshold maximises on val; both F1 and MCC are then given at it, as CheXzero does."""
    resamples: int = ROUNDS
    """Bootstrap draws of patients for the intervals; 0: no intervals."""
    seed: int = 0
    """Seed of the draws."""
    retrieval: bool = True
    """Rank reports by films and films by reports; takes time with the square of the films."""
    plots: bool = True
    """Draw ROC and precision-recall curves."""
    batch_size: int = 64
    """Images embedded at once."""
    backend: Literal["auto", "cpu", "dali", "hdf5", "hdf5-tuned"] = "auto"
    """Loader; auto: dali where the device is a GPU, else cpu."""
    h5: Path | None = None
    """The HDF5 file the shards were made from; the hdf5 backends alone read it."""
    dataset: str = "cxr"
    """Path of the dataset in it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """What the towers compute in; auto: as training does."""
    json: Path | None = None
    """Where the results go; none: in the run's folder, evaluation-SPLIT.json, or -SPLIT-DIGEST.json of other shards."""
    prompts: Style = "reports"
    """What a finding is called: as reports say it, CheXzero's `no X`, or as in texts made of a list of labels."""
    prompts_file: Path | None = None
    """TOML file of prompts that go before those, in train/chexpert.toml's form; a side's phrasings are averaged."""
    prompt_forms: tuple[str, ...] = ("{}",)
    """Sentences that prompts stand in, `"{}. PA view."`; averaged. For texts made by ingest's --text-template."""

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise InputError("--checkpoint names nothing; give a run's folder or a checkpoint file")
        if self.top is not None and self.top < 1:
            raise InputError(f"--top {self.top} is below 1")
        for name in ("resamples", "seed"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name} {getattr(self, name)} is below 0")


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Predict, score, and write JSON, CSV and plots."""
    manifest = read_manifest(config.shards)
    own = read_prompts(config.prompts_file) if config.prompts_file else {}
    wording = Wording(style=config.prompts, forms=config.prompt_forms, own=own)
    split, choosing = choose_split(config, manifest), _can_choose(config, manifest)
    if config.top is not None and not choosing:
        raise InputError(f"--top chooses by the loss on val, of which {config.shards} has no film here")
    files = find_checkpoints(config.checkpoint, every=config.top is not None)
    path = config.json or result_path(files, split, manifest, of=config.top or len(files))
    if config.json:
        check_outside(path, config.shards, "--json")
    check_result(path, ".json", "--json", {"mean_auroc"})
    if (beside := path.with_suffix(".csv")).exists() and not path.exists():
        raise InputError(f"--json {path} would write over {beside}, which is no evaluation's; choose another name")
    splits = ("val", split) if choosing and manifest.labels else (split,)
    told, found = _predict(config, manifest, wording, files, splits)
    result, truth = _score(config, manifest, wording, told, found, split=split, choosing=choosing)
    _write(path, _asked(config, manifest, wording) | {"mean_auroc": result.mean.auroc} | asdict(result), result)
    if config.plots and result.labels:
        _draw(path, result, found[split].probabilities, truth)
    return result


def choose_split(config: EvaluateConfig, manifest: Manifest) -> str:
    """The split to evaluate on. InputError where it is absent, or there is nothing to evaluate."""
    split = config.split if config.split != "auto" else "test" if manifest.rows("test") else "val"
    if not manifest.rows(split):
        raise InputError(f"{config.shards} has no {split} split; it has: {', '.join(manifest.splits)}")
    if not manifest.labels and not config.retrieval:
        raise InputError(f"{config.shards} has no label columns; ingest with --label-columns")
    return split


def _can_choose(config: EvaluateConfig, manifest: Manifest) -> bool:
    """Whether val has films under the selection."""
    if not manifest.rows("val"):
        return False
    try:
        return make_layout(_rows(config, "val"), manifest).samples > 0
    except InputError:  # that it leaves nothing; what makes no sense is refused with the split itself
        return False


def _rows(config: EvaluateConfig, split: str) -> LoaderConfig:
    """The films that are evaluated, as they are; a checkpoint's settings say what is made of them."""
    return LoaderConfig(
        shards=config.shards,
        split=split,
        mode="eval",
        backend=config.backend,
        batch_size=config.batch_size,
        h5=config.h5,
        h5_dataset=config.dataset,
        where=config.where,
        exclude=config.exclude,
    )


def _predict(
    config: EvaluateConfig, manifest: Manifest, wording: Wording, files: Sequence[Path], splits: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[str, Predicted]]:
    """Step and weights of each checkpoint, and what all of them as one make of each split."""
    device = choose_device(config.device, Ranks())

    def predicted(member: Member, split: str) -> Predicted:
        model = model_of(member, manifest).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        loader = eval_loader(member.settings, _rows(config, split))
        return predict(model, loader, manifest=manifest, device=device, precision=config.precision, wording=wording)

    return predict_as_one(files, config.weights, predicted, top=config.top, splits=splits)


def _score(
    config: EvaluateConfig,
    manifest: Manifest,
    wording: Wording,
    told: list[dict[str, Any]],
    found: dict[str, Predicted],
    *,
    split: str,
    choosing: bool,
) -> tuple[Evaluation, Floats]:
    """Every figure with the notes that belong to it, and the truth (N, K) it was scored against."""
    own, names = found[split], manifest.labels
    groups, reports = read_identity(_rows(config, split), manifest)
    patients, truth = patients_of(groups), truth_of(own.labels, config.uncertain)
    thresholds = _thresholds(found.get("val"), len(names), config)
    rounds, seed = config.resamples, config.seed
    labels, mean = score_split(names, own.probabilities, truth, thresholds, patients, rounds=rounds, seed=seed)
    ranked = retrieve(own.images, own.texts, reports, patients, rounds=rounds, seed=seed) if config.retrieval else None
    notes = split_notes(manifest, split, choosing=choosing, unit=patients.unit)
    notes += listed_note(wording, _rows(config, split), manifest)
    notes += label_notes(labels, unused=wording.unused(names), choosing=choosing)
    result = Evaluation(
        checkpoints=told,
        split=split,
        samples=len(own),
        patients=patients.count,
        unit=patients.unit,
        notes=notes,
        labels=labels,
        mean=mean,
        retrieval=ranked,
    )
    return result, truth


def _thresholds(val: Predicted | None, labels: int, config: EvaluateConfig) -> Floats:
    """Each label's threshold (K,) on val; NaN where there is none."""
    if val is None:
        return np.full(labels, np.nan)
    truth = truth_of(val.labels, config.uncertain)
    found = [choose_threshold(val.probabilities[:, n], truth[:, n], config.threshold_by) for n in range(labels)]
    return np.array(found)


def _asked(config: EvaluateConfig, manifest: Manifest, wording: Wording) -> dict[str, Any]:
    """What was asked, for the JSON. No path is in it."""
    sides = {name: asdict(wording.prompt(name, manifest.labels)) for name in manifest.labels}
    prompts = {"style": config.prompts, "forms": list(config.prompt_forms), "labels": sides}
    asked = {name: getattr(config, name) for name in ("where", "uncertain", "threshold_by", "resamples", "seed")}
    asked["excluded"] = Selection(exclude=config.exclude).keys_digest()
    return {"shards": manifest.digest, "prompts": prompts, **asked}


def _write(path: Path, record: dict[str, Any], result: Evaluation) -> None:
    write_json(path, record)
    say(str(path))
    if result.labels:
        write_atomic(path.with_suffix(".csv"), to_csv(result.labels, result.mean).encode())


def _draw(path: Path, result: Evaluation, probabilities: Floats, truth: Floats) -> None:
    dots = "; dots: at the threshold chosen on val" if any(found.threshold for found in result.labels.values()) else ""
    title = f"zero-shot on {result.split}, {result.samples:,} films{dots}"
    for name, draw in (("roc", draw_roc), ("pr", draw_precision_recall)):
        write_atomic(path.with_name(f"{path.stem}-{name}.png"), draw(result.labels, probabilities, truth, title))


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as the command line says. Exit code 2 for a user's mistake."""
    with main_guard(PROG), memory_named("try a smaller --batch-size, or --device cpu"):
        config = parse(EvaluateConfig, argv, prog=PROG)
        say(table(evaluate(config), config.resamples))


if __name__ == "__main__":
    main()
