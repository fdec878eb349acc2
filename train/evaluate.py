"""`python -m train.evaluate --checkpoint RUN --shards OUT --split test`: zero-shot AUROC of every label.

CheXzero's method: an image is compared with a prompt that names the finding and one that denies it, and the softmax of
the two similarities is the finding's probability. Images are resized as in training and not augmented.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from pipeline.config import LoaderConfig
from pipeline.selection import Selection
from shards.atomic import check_writable, write_atomic
from shards.cli import main_guard, parse, say
from shards.errors import InputError
from shards.manifest import read_manifest
from shards.schema import Manifest
from train.checkpoint import newest_good, read_checkpoint
from train.commandline import from_fields
from train.config import TrainConfig, loader_config
from train.device import Precision, choose_device
from train.model import build_model
from train.prompts import Style, Wording
from train.ranks import Ranks
from train.rundir import RunFolder
from train.state import placeholder_config
from train.validate import embed_split

PROG = "train.evaluate"
TOKENIZER = "clip-bpe"
"""The manifest's name for open_clip's tokenizer, which the prompts need as well."""
_WORDING = Wording()


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Evaluate a checkpoint zero-shot: AUROC of every label column, over the rows where it is known."""

    checkpoint: Path
    """A run's folder (its best checkpoint, or the newest where none was validated), or a checkpoint file."""
    shards: Path
    """Folder of the data set to evaluate on."""
    split: Literal["auto", "train", "val", "test"] = "auto"
    """auto: test where there is one, else val."""
    where: str | None = None
    """Evaluate only the samples for which this query holds; what the run was trained on plays no part here."""
    exclude: Path | None = None
    """File of keys, one 00-0000000123 a line, of samples to leave out."""
    batch_size: int = 64
    """Images embedded at once."""
    backend: Literal["auto", "cpu", "dali", "hdf5", "hdf5-tuned"] = "auto"
    """Loader; auto: dali where the device is a GPU, else cpu."""
    h5: Path | None = None
    """The HDF5 file the shards were made from; the hdf5 backends alone read it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
    json: Path | None = None
    """Where the results go; none: evaluation-SPLIT.json in the run's folder."""
    prompts: Style = "reports"
    """What a finding is called: as reports say it, CheXzero's `no X`, or as in texts made of a list of labels."""
    prompt_forms: tuple[str, ...] = ("{}",)
    """Sentences that prompts stand in, `"{}. PA view."`; averaged. For texts made by ingest's --text-template."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelScore:
    """One label's result."""

    auroc: float | None
    """Area under the ROC curve; None where a side has no sample."""
    positives: int
    negatives: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The result over one split."""

    split: str
    samples: int
    labels: dict[str, LabelScore]
    mean_auroc: float | None
    """Mean over the labels that have one."""

    @property
    def auroc(self) -> dict[str, float | None]:
        """AUROC by label."""
        return {name: score.auroc for name, score in self.labels.items()}


def zero_shot(
    model: nn.Module,
    loader: LoaderConfig,
    *,
    manifest: Manifest,
    device: torch.device | str = "cpu",
    wording: Wording = _WORDING,
) -> Evaluation:
    """Evaluate any model, trained or not, on the split that `loader` (mode `eval`) names."""
    found, labels = predict(model, loader, manifest=manifest, device=device, wording=wording)
    scores = {name: score_label(found[:, n], labels[:, n]) for n, name in enumerate(manifest.labels)}
    known = [score.auroc for score in scores.values() if score.auroc is not None]
    mean = float(np.mean(known)) if known else None
    return Evaluation(split=loader.split, samples=len(labels), labels=scores, mean_auroc=mean)


def predict(
    model: nn.Module,
    loader: LoaderConfig,
    *,
    manifest: Manifest,
    device: torch.device | str = "cpu",
    wording: Wording = _WORDING,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Probabilities (N, K) of the data set's labels by their prompts, and the labels (N, K), in row order."""
    precision = Precision(name="fp32", device=torch.device(device))
    embedded = embed_split(model, loader, precision, Ranks())
    images, columns = embedded.images.cpu(), []
    for label in manifest.labels:
        positive, negative = embed_prompts(model, label, manifest, precision.device, wording)
        columns.append(probabilities(images, positive, negative).numpy())
    return np.stack(columns, axis=1), embedded.labels.cpu().numpy()


def probabilities(images: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """CheXzero's softmax over the similarities of images (N, D) with two prompts (D,), all of unit length: (N,)."""
    pair = images @ torch.stack([positive, negative], dim=1)  # (N, 2)
    return pair.softmax(dim=1)[:, 0]


def score_label(probability: NDArray[np.float32], label: NDArray[np.float32]) -> LabelScore:
    """AUROC over the rows whose label (N,) is 1 or 0; uncertain (-1) and unknown (NaN) rows are left out."""
    from sklearn.metrics import roc_auc_score

    known = (label == 0) | (label == 1)
    positives, negatives = int((label == 1).sum()), int((label == 0).sum())
    auroc = float(roc_auc_score(label[known], probability[known])) if positives and negatives else None
    return LabelScore(auroc=auroc, positives=positives, negatives=negatives)


def embed_prompts(
    model: nn.Module, label: str, manifest: Manifest, device: torch.device, wording: Wording = _WORDING
) -> tuple[torch.Tensor, torch.Tensor]:
    """The label's positive and negative prompt as unit vectors (D,) on the CPU; several phrasings are averaged."""
    prompt = wording.prompt(label, manifest.labels)
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        sides = []
        for texts in prompt.sides:
            tokens = tokenize(texts, manifest).to(device)
            vectors = F.normalize(model.encode_text(tokens).float(), dim=-1)  # type: ignore[operator]
            sides.append(F.normalize(vectors.mean(dim=0), dim=-1).cpu())
    model.train(was_training)
    return sides[0], sides[1]


def tokenize(texts: Sequence[str], manifest: Manifest) -> torch.Tensor:
    """Token ids (texts, context) int64, as ingest made those of the reports."""
    from open_clip.tokenizer import SimpleTokenizer

    spec = manifest.tokenizer
    if spec.name != TOKENIZER:
        raise InputError(f"the shards' tokens are from {spec.name!r}; prompts can be made with {TOKENIZER!r} only")
    return SimpleTokenizer(context_length=spec.context)(list(texts))


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Load the checkpoint, evaluate, and write the JSON."""
    manifest = read_manifest(config.shards)
    wording = Wording(style=config.prompts, forms=config.prompt_forms)
    folder, payload = find_payload(config.checkpoint)
    if payload["fingerprint"]["tokenizer"] != manifest.tokenizer.digest:
        raise InputError(f"{config.checkpoint} was trained on tokens of another tokenizer than {config.shards} has")
    device = choose_device(config.device, Ranks())
    trained = trained_config(config.checkpoint, payload)
    model = trained_model(trained, payload, manifest)
    model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    split = choose_split(config, manifest)
    path = config.json or folder / f"evaluation-{split}.json"
    check_writable(path)
    data = replace(trained.data, where=config.where, exclude=config.exclude, mix=())  # nor its further sets
    settings = replace(
        trained, shards=config.shards, backend=config.backend, h5=config.h5, batch_size=config.batch_size, data=data
    )
    loader = loader_config(settings, split=split, mode="eval")
    result = zero_shot(model, loader, manifest=manifest, device=device, wording=wording)
    record = {"step": payload["step"], "shards": manifest.digest, "prompts": asdict(wording)}
    record |= {"where": config.where, "excluded": Selection(exclude=config.exclude).keys_digest(), **asdict(result)}
    write_atomic(path, (json.dumps(record, indent=1) + "\n").encode())
    say(f"{path}")
    return result


def trained_config(path: Path, payload: dict[str, Any]) -> TrainConfig:
    """The settings a checkpoint was trained with; its paths are placeholders."""
    try:
        return from_fields(TrainConfig, placeholder_config(payload["config"]))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} has settings that this version does not know ({error})") from None


def trained_model(trained: TrainConfig, payload: dict[str, Any], manifest: Manifest) -> nn.Module:
    """The model of a checkpoint, on the CPU."""
    model = build_model(trained.model, vocab_size=manifest.tokenizer.vocab_size, context=manifest.tokenizer.context)
    model.load_state_dict(payload["model"])
    return model


def find_payload(path: Path) -> tuple[Path, dict[str, Any]]:
    """The run's folder and the payload that a --checkpoint means."""
    if path.is_file():
        parent = path.parent
        return (parent.parent if parent.name == "checkpoints" else parent), read_checkpoint(path)
    folder = RunFolder(root=path)
    if folder.best.exists():
        return path, read_checkpoint(folder.best)
    found = newest_good(folder.checkpoints, warn=say)
    if found is None:
        raise InputError(f"{path} holds no checkpoint; give a run's folder or a file of its checkpoints")
    return path, found[1]


def choose_split(config: EvaluateConfig, manifest: Manifest) -> str:
    """The split to evaluate on. InputError where it is absent, or no label could be evaluated."""
    split = config.split if config.split != "auto" else "test" if manifest.rows("test") else "val"
    if not manifest.rows(split):
        raise InputError(f"{config.shards} has no {split} split; it has: {', '.join(manifest.splits)}")
    if not manifest.labels:
        raise InputError(f"{config.shards} has no label columns; ingest with --label-columns")
    return split


def table(result: Evaluation) -> str:
    """The result for people."""
    width = max(len(name) for name in ("mean", *result.labels))
    lines = [f"zero-shot on {result.split}, {result.samples} films", f"{'':{width}}  AUROC  present  absent"]
    for name, score in result.labels.items():
        lines.append(f"{name:{width}}  {_figure(score.auroc)}  {score.positives:7}  {score.negatives:6}")
    return "\n".join([*lines, f"{'mean':{width}}  {_figure(result.mean_auroc)}"])


def _figure(auroc: float | None) -> str:
    return f"{auroc:5.3f}" if auroc is not None else "    -"


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as the command line says. Exit code 2 for a user's mistake."""
    with main_guard(PROG):
        say(table(evaluate(parse(EvaluateConfig, argv, prog=PROG))))


if __name__ == "__main__":
    main()
