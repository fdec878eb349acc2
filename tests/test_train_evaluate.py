"""Zero-shot evaluation: CheXzero's softmax, AUROC over the known rows, and the command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from shards.manifest import read_manifest
from train.checkpoint import encode
from train.commandline import to_fields
from train.config import DataConfig, TrainConfig, loader_config
from train.evaluate import (
    EvaluateConfig,
    embed_prompts,
    evaluate,
    main,
    probabilities,
    score_label,
    tokenize,
    zero_shot,
)
from train.model import ModelConfig, build_model
from train.prompts import PROMPTS, prompt_for


@pytest.fixture(scope="module")
def run(shards_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with the checkpoint of an untrained model."""
    folder = tmp_path_factory.mktemp("run")
    config = TrainConfig(shards=shards_dir, out=folder, model=ModelConfig(widths=(16, 16, 16, 16)))
    torch.manual_seed(0)
    model = build_model(config.model, vocab_size=49408, context=77)
    settings = {name: value for name, value in to_fields(config).items() if name not in ("shards", "out", "h5")}
    prints = {"tokenizer": read_manifest(shards_dir).tokenizer.digest}
    payload = {"step": 0, "config": settings, "fingerprint": prints, "model": model.state_dict()}
    (folder / "best.pt").write_bytes(encode(payload))
    return folder


def test_known_rows_alone_count() -> None:
    label = np.array([1, 0, -1, np.nan, 1, 0], dtype=np.float32)
    score = score_label(np.array([0.9, 0.1, 0.0, 1.0, 0.3, 0.4], dtype=np.float32), label)
    assert (score.auroc, score.positives, score.negatives) == (0.75, 2, 2)


def test_one_sided_labels_have_no_auroc() -> None:
    score = score_label(np.array([0.9, 0.1], dtype=np.float32), np.array([1, np.nan], dtype=np.float32))
    assert (score.auroc, score.positives, score.negatives) == (None, 1, 0)


def test_the_softmax_of_two_prompts() -> None:
    images = torch.eye(3)[:2]
    found = probabilities(images, torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0]))
    e = np.e
    assert found.tolist() == pytest.approx([e / (e + 1), 1 / (e + 1)])


def test_prompts_default_to_chexzeros_pair() -> None:
    assert prompt_for("Enlarged Hilum").positive == ("enlarged hilum",)
    assert prompt_for("Enlarged Hilum").negative == ("no enlarged hilum",)
    assert all(prompt.positive and prompt.negative for prompt in PROMPTS.values())


def test_prompts_are_tokenised_as_reports_are(shards_dir: Path) -> None:
    from ingest.tokenizer import Tokenizer

    texts = ["No pleural effusion.", "Cardiomegaly, unchanged " * 40]
    for row, text in zip(tokenize(texts, read_manifest(shards_dir)), texts, strict=True):
        np.testing.assert_array_equal(row.numpy(), Tokenizer("ViT-B-32-quickgelu")(text)[0])


class _Oracle(torch.nn.Module):
    """Knows the answer: images carry nothing, so it hands out label vectors in row order."""

    def __init__(self, answers: torch.Tensor, prompts: list[str]) -> None:
        super().__init__()
        self.answers, self.prompts, self.at = answers, prompts, 0

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        rows = self.answers[self.at : self.at + len(images)]
        self.at += len(images)
        return rows

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        from open_clip.tokenizer import SimpleTokenizer

        coder = SimpleTokenizer()
        vectors = torch.zeros(len(tokens), 2)
        for row, ids in enumerate(tokens):
            text = coder.decode([int(i) for i in ids if i])
            vectors[row, 1 if "normal" in text else 0] = 1.0
        return vectors


def test_a_model_that_knows_scores_one_and_its_opposite_zero(shards_dir: Path) -> None:
    manifest = read_manifest(shards_dir)
    config = TrainConfig(shards=shards_dir, out=Path("."), backend="cpu", data=DataConfig(image_size=32))
    labels = embed_labels(config)
    number = manifest.labels.index("Cardiomegaly")
    answers = torch.stack([labels[:, number], 1 - labels[:, number]], dim=1) + 0.01
    for sign, expected in ((1, 1.0), (-1, 0.0)):
        oracle = _Oracle(answers if sign == 1 else answers.flip(1), [])
        result = zero_shot(oracle, loader_config(config, split="test", mode="eval"), manifest=manifest)
        assert result.labels["Cardiomegaly"].auroc == expected
        assert result.samples == manifest.rows("test")


def embed_labels(config: TrainConfig) -> torch.Tensor:
    """Labels (N, labels) of the test split."""
    from pipeline.batch import World
    from pipeline.loader import build_loader

    with build_loader(loader_config(config, split="test", mode="eval"), World()) as batches:
        return torch.cat([batch.labels.clone() for batch in batches])


def test_the_command_writes_json_and_a_table(run: Path, shards_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--checkpoint", str(run), "--shards", str(shards_dir), "--split", "test", "--device", "cpu"])
    printed = capsys.readouterr().out
    record = json.loads((run / "evaluation-test.json").read_text())
    assert record["samples"] == read_manifest(shards_dir).rows("test") and record["split"] == "test"
    assert set(record["labels"]) == set(read_manifest(shards_dir).labels)
    assert "mean" in printed and "Cardiomegaly" in printed
    one_file = EvaluateConfig(checkpoint=run / "best.pt", shards=shards_dir, device="cpu")
    assert evaluate(one_file).mean_auroc == record["mean_auroc"]


def test_prompts_are_chosen_and_recorded(run: Path, shards_dir: Path, tmp_path: Path) -> None:
    records = []
    for number, flags in enumerate(((), ("--prompts", "listed", "--prompt-forms", "{}. PA view.", "{}. AP view."))):
        path = tmp_path / f"{number}.json"
        main(["--checkpoint", str(run), "--shards", str(shards_dir), "--json", str(path), *flags])
        records.append(json.loads(path.read_text()))
    assert records[0]["prompts"] == {"style": "reports", "forms": ["{}"]}
    assert records[1]["prompts"] == {"style": "listed", "forms": ["{}. PA view.", "{}. AP view."]}
    assert records[0]["labels"] != records[1]["labels"]


def test_mistakes_are_one_line(run: Path, shards_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        assert stop.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        return lines[0]

    shards = ("--shards", str(shards_dir))
    assert "holds no checkpoint" in refused("--checkpoint", str(tmp_path), *shards)
    (tmp_path / "x.pt").write_bytes(b"shardclip-checkpoint?")
    assert "not a checkpoint" in refused("--checkpoint", str(tmp_path / "x.pt"), *shards)
    assert "no shards here" in refused("--checkpoint", str(run), "--shards", str(tmp_path))
    assert "'dev'" in refused("--checkpoint", str(run), *shards, "--split", "dev")
    assert "--prompt-forms 'PA'" in refused("--checkpoint", str(run), *shards, "--prompt-forms", "PA")


def test_prompt_vectors_have_unit_length(shards_dir: Path) -> None:
    model = build_model(ModelConfig(widths=(16, 16, 16, 16)), vocab_size=49408, context=77)
    for vector in embed_prompts(model, "Support Devices", read_manifest(shards_dir), torch.device("cpu")):
        assert vector.norm().item() == pytest.approx(1.0)
