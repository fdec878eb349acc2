"""Zero-shot evaluation: CheXzero's softmax, thresholds from val, checkpoints as one, notes, and the command's files."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import FINDINGS, write_source
from sklearn.metrics import average_precision_score, f1_score, matthews_corrcoef, roc_auc_score

from pipeline.config import DataConfig, LoaderConfig
from shards.errors import InputError
from shards.manifest import read_manifest
from shards.reader import ShardReader
from train.architecture import ModelConfig
from train.checkpoint import read_checkpoint, write_checkpoint
from train.commandline import to_fields
from train.config import TrainConfig, loader_config
from train.ensemble import average, find_checkpoints, model_of, read_member
from train.evaluate import EvaluateConfig, evaluate, main
from train.model import build_model
from train.retrieval import read_identity
from train.scorecard import table
from train.scores import aurocs, choose_threshold
from train.state import LEFT_OUT
from train.zeroshot import Prompt, Wording, embed_prompts, predict, probabilities, tokenize

WIDTHS = (16, 16, 16, 16)


def small(shards: Path, out: Path) -> TrainConfig:
    """A model and images that take no time."""
    return TrainConfig(shards=shards, out=out, model=ModelConfig(widths=WIDTHS), data=DataConfig(image_size=32))


def trained(path: Path, shards: Path, seed: int, **more: object) -> Path:
    """A checkpoint of an untrained model; returns its path."""
    config = small(shards, path.parent)
    settings = {name: value for name, value in to_fields(config).items() if name not in ("shards", "out", "h5")}
    prints = {"tokenizer": read_manifest(shards).tokenizer.digest}
    payload = {"step": seed, "config": settings, "fingerprint": prints, "model": weights(seed)} | more
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(path, payload)
    return path


def weights(seed: int) -> dict[str, torch.Tensor]:
    """Of an untrained model."""
    torch.manual_seed(seed)
    return build_model(ModelConfig(widths=WIDTHS), vocab_size=49408, context=77).state_dict()


@pytest.fixture(scope="module")
def run(shards_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: its best checkpoint, of step 0, is one of its newest three too."""
    folder = tmp_path_factory.mktemp("run")
    for seed in range(3):
        trained(folder / "checkpoints" / f"step-{seed:07d}.pt", shards_dir, seed)
    trained(folder / "best.pt", shards_dir, 0)
    return folder


def asked(run: Path, shards: Path, **more: object) -> EvaluateConfig:
    """A quick evaluation."""
    return EvaluateConfig(
        **({"checkpoint": (run,), "shards": shards, "device": "cpu", "resamples": 20, "plots": False} | more)
    )


def rows(config: TrainConfig, split: str = "test") -> LoaderConfig:
    return loader_config(config, split=split, mode="eval")


def test_the_softmax_of_two_prompts() -> None:
    images = torch.eye(3)[:2]
    found = probabilities(images, torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0]))
    e = np.e
    assert found.tolist() == pytest.approx([e / (e + 1), 1 / (e + 1)])


def test_prompts_are_tokenised_as_reports_are(shards_dir: Path) -> None:
    from ingest.tokenizer import Tokenizer

    texts = ["No pleural effusion.", "Cardiomegaly, unchanged " * 40]
    for row, text in zip(tokenize(texts, read_manifest(shards_dir)), texts, strict=True):
        np.testing.assert_array_equal(row.numpy(), Tokenizer("ViT-B-32-quickgelu")(text)[0])


class _Oracle(torch.nn.Module):
    """Knows the answer: images carry nothing, so it hands out label vectors in row order."""

    def __init__(self, answers: torch.Tensor) -> None:
        super().__init__()
        self.answers, self.at, self.logit_scale = answers, 0, torch.nn.Parameter(torch.zeros(()))

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
    config = small(shards_dir, Path("."))
    labels = torch.from_numpy(parquet(shards_dir, "test")[2])
    number = manifest.labels.index("Cardiomegaly")
    answers = torch.stack([labels[:, number], 1 - labels[:, number]], dim=1) + 0.01
    for sign, expected in ((1, 1.0), (-1, 0.0)):
        oracle = _Oracle(answers if sign == 1 else answers.flip(1))
        found = predict(oracle, rows(config), manifest=manifest)
        assert aurocs(found.probabilities, found.labels, manifest.labels)["Cardiomegaly"] == expected


def parquet(shards: Path, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Groups (N,), texts (N,) and labels (N, K) of a split, as the tables have them."""
    manifest, groups, texts, labels = read_manifest(shards), [], [], []
    for info in manifest.splits[split]:
        with ShardReader(shards, manifest, info) as reader:
            for block in range(reader.blocks):
                texts += reader.read_text(block)
                groups.append(reader.read_rows(block).group)
                labels.append(reader.read_rows(block).labels)
    return np.concatenate(groups), np.array(texts), np.concatenate(labels)


def test_rows_are_known_by_patient_and_report(shards_dir: Path) -> None:
    manifest = read_manifest(shards_dir)
    loader = LoaderConfig(shards=shards_dir, split="train", mode="eval")
    groups, texts, labels = parquet(shards_dir, "train")
    found = read_identity(loader, manifest)
    np.testing.assert_array_equal(found[0], groups)
    assert len(np.unique(found[1])) == len(np.unique(texts))
    some = LoaderConfig(shards=shards_dir, split="train", mode="eval", where="Cardiomegaly == 1")
    np.testing.assert_array_equal(read_identity(some, manifest)[0], groups[labels[:, 0] == 1])


def test_figures_are_scikit_learns_and_thresholds_are_vals(run: Path, shards_dir: Path) -> None:
    manifest, member = read_manifest(shards_dir), read_member(run / "best.pt")
    config = small(shards_dir, run)
    val, test = (
        predict(model_of(member, manifest), rows(config, split), manifest=manifest) for split in ("val", "test")
    )
    for by in ("mcc", "f1"):
        result = evaluate(asked(run, shards_dir, threshold_by=by))
        assert result.split == "test" and all("English" in note for note in result.notes)
        for number, name in enumerate(manifest.labels):
            known = [np.isin(part.labels[:, number], (0, 1)) for part in (val, test)]
            (chosen, truth), (scores, told) = (
                [getattr(part, field)[rows, number] for part, rows in zip((val, test), known, strict=True)]
                for field in ("labels", "probabilities")
            )
            threshold = choose_threshold(scores, chosen, by)
            found = result.labels[name]
            assert found.threshold == threshold
            assert found.auroc == pytest.approx(roc_auc_score(truth, told), abs=1e-12)
            assert found.average_precision == pytest.approx(average_precision_score(truth, told), abs=1e-12)
            assert found.f1 == pytest.approx(f1_score(truth, told >= threshold))
            assert found.mcc == pytest.approx(matthews_corrcoef(truth, told >= threshold))
            assert found.positives == truth.sum() and found.intervals["auroc"][0] <= found.auroc
        assert result.mean.auroc == pytest.approx(np.mean(list(result.auroc.values())))
        assert result.mean.labels["auroc"] == len(FINDINGS) and result.unit == "patient"


def test_uncertain_films_count_as_they_are_told_to(run: Path, shards_dir: Path) -> None:
    labels = parquet(shards_dir, "test")[2][:, 1]
    counts = {}
    for policy in ("ignore", "positive", "negative"):
        found = evaluate(asked(run, shards_dir, uncertain=policy, retrieval=False)).labels["Pleural Effusion"]
        counts[policy] = found.positives, found.negatives
    ones, zeros, unsure = ((labels == value).sum() for value in (1, 0, -1))
    assert unsure > 0
    assert counts == {"ignore": (ones, zeros), "positive": (ones + unsure, zeros), "negative": (ones, zeros + unsure)}


def test_several_checkpoints_are_one_model(run: Path, shards_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Probabilities are averaged, and similarities: products of the vectors side by side."""
    manifest = read_manifest(shards_dir)
    config = small(shards_dir, run)
    files = [run / "checkpoints" / f"step-{seed:07d}.pt" for seed in range(3)]
    parts = [predict(model_of(read_member(file), manifest), rows(config), manifest=manifest) for file in files]
    one = average(parts)
    np.testing.assert_allclose(one.probabilities, sum(part.probabilities for part in parts) / 3, atol=1e-12)
    torch.testing.assert_close(one.images @ one.texts.T, sum(part.images @ part.texts.T for part in parts) / 3)
    result = evaluate(asked(run, shards_dir, checkpoint=tuple(files)))
    truth = parquet(shards_dir, "test")[2][:, 0]
    assert result.auroc["Cardiomegaly"] == pytest.approx(roc_auc_score(truth, one.probabilities[:, 0]))
    assert [each["step"] for each in result.checkpoints] == [0, 1, 2]
    assert (run / "evaluation-test-of-3.json").exists()
    # Those of a folder by `RUN/best.pt RUN/checkpoints/*`: best.pt is step 0 again, under another name.
    capsys.readouterr()
    assert find_checkpoints([run / "best.pt", *files]) == [run / "best.pt", *files[1:]]
    assert capsys.readouterr().out == f"{files[0]} holds what {run / 'best.pt'} does, and counts once\n"
    # In a copy of the folder they are two files; where one is damaged it is the other.
    copy = Path(shutil.copytree(run, run.with_name("copy")))
    content = bytearray((copy / "best.pt").read_bytes())
    content[-9] ^= 1
    (copy / "best.pt").write_bytes(content)
    copies = [copy / "checkpoints" / file.name for file in files]
    assert find_checkpoints([copy], every=True) == [copies[0], *reversed(copies[1:])]
    assert f"the digest in its header; {copies[0]} is taken for it\n" in capsys.readouterr().out
    # The top k of a run are those with the lowest loss on val; best.pt, which is step 0 again, counts once.
    losses = {
        file: predict(model_of(read_member(file), manifest), rows(config, "val"), manifest=manifest).loss
        for file in files
    }
    top = evaluate(asked(run, shards_dir, top=2, json=run / "top.json"))
    assert [each["step"] for each in top.checkpoints] == [
        read_member(f).step for f in sorted(files, key=losses.get)[:2]
    ]


def test_a_run_on_an_hdf5_file_is_evaluated_on_what_is_named(
    shards_dir: Path, source: tuple[Path, Path], tmp_path: Path
) -> None:
    """Wherever that file is by now; or on such a file, whatever its dataset is called."""
    config = replace(small(shards_dir, tmp_path), backend="hdf5-tuned", h5=source[0], accumulate=3, batch_size=3)
    settings = {name: value for name, value in to_fields(config).items() if name not in LEFT_OUT}
    run = trained(tmp_path / "run/best.pt", shards_dir, 0, config=settings).parent
    films = tmp_path / "films.h5"
    with h5py.File(source[0]) as file, h5py.File(films, "w") as copy:
        copy["set/films"] = file["cxr"][:]
    on_shards = evaluate(asked(run, shards_dir))
    on_file = evaluate(asked(run, shards_dir, backend="hdf5", h5=films, dataset="set/films"))
    assert on_file.samples == on_shards.samples > 0
    with pytest.raises(InputError, match=r"no dataset 'cxr'.*'set/films'"):
        evaluate(asked(run, shards_dir, backend="hdf5", h5=films))


def test_averaged_weights_are_taken_where_there_are_any(run: Path, shards_dir: Path, tmp_path: Path) -> None:
    path = trained(tmp_path / "a.pt", shards_dir, 1, ema=weights(0))
    found = {name: evaluate(asked(path, shards_dir, weights=name)) for name in ("auto", "ema", "model")}
    assert [found[name].checkpoints[0]["weights"] for name in found] == ["ema", "ema", "model"]
    assert found["auto"].auroc == evaluate(asked(run, shards_dir)).auroc != found["model"].auroc
    assert find_checkpoints([tmp_path / "a.pt"]) == [path]


def test_the_command_writes_json_csv_plots_and_a_table(
    run: Path, shards_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    main(["--checkpoint", str(run), "--shards", str(shards_dir), "--json", str(path), "--resamples", "20"])
    printed = capsys.readouterr().out
    record = json.loads(path.read_text())
    manifest = read_manifest(shards_dir)
    assert record["samples"] == manifest.rows("test") and record["split"] == "test" and record["unit"] == "patient"
    assert record["patients"] == manifest.groups["test"][1] - manifest.groups["test"][0]
    assert set(record["labels"]) == set(manifest.labels) and record["mean_auroc"] == record["mean"]["auroc"]
    lines = list(csv.DictReader(path.with_suffix(".csv").open()))
    assert [line["label"] for line in lines] == [*manifest.labels, "mean"]
    assert float(lines[0]["auroc_low"]) == record["labels"][lines[0]["label"]]["intervals"]["auroc"][0]
    for name in ("roc", "pr"):
        assert (tmp_path / f"result-{name}.png").read_bytes().startswith(b"\x89PNG")
    body = printed.splitlines()[1:]
    assert "Cardiomegaly" in printed and "film to report" in printed and max(map(len, body)) <= 100
    secrets = ("MRN", "Film ", str(shards_dir), str(run))
    files = [file.read_text() for file in (path, path.with_suffix(".csv"))]
    assert not [secret for secret in secrets for text in (*files, *body) if secret in text]


def test_prompts_are_chosen_and_recorded(run: Path, shards_dir: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text(
        '[Cardiomegaly]\npositive = ["big heart"]\nnegative = ["small heart"]\n'
        '[Hernia]\npositive = ["a"]\nnegative = ["b"]\n'
    )
    flags = {
        "plain": (),
        "listed": ("--prompts", "listed", "--prompt-forms", "{}. PA view.", "{}. AP view."),
        "own": ("--prompts-file", str(mine)),
    }
    records = {}
    for name, more in flags.items():
        path = tmp_path / f"{name}.json"
        main(
            [
                "--checkpoint",
                str(run),
                "--shards",
                str(shards_dir),
                "--json",
                str(path),
                "--resamples",
                "0",
                "--no-plots",
                *more,
            ]
        )
        records[name] = json.loads(path.read_text())
    assert records["listed"]["prompts"]["style"] == "listed"
    assert records["listed"]["prompts"]["labels"]["Cardiomegaly"]["positive"] == [
        "Cardiomegaly. PA view.",
        "Cardiomegaly. AP view.",
    ]
    assert records["own"]["prompts"]["labels"]["Cardiomegaly"] == {
        "positive": ["big heart"],
        "negative": ["small heart"],
    }
    assert records["own"]["labels"]["Cardiomegaly"] != records["plain"]["labels"]["Cardiomegaly"]
    assert records["own"]["labels"]["Pleural Effusion"] == records["plain"]["labels"]["Pleural Effusion"]
    assert any("Hernia" in note for note in records["own"]["notes"])
    assert records["plain"]["notes"] == []
    assert records["plain"]["labels"]["Cardiomegaly"]["intervals"]["auroc"] is None
    assert not list(tmp_path.glob("*.png"))


@pytest.fixture(scope="module")
def plain_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with a val split and no test split, no patients, and a label that nobody has."""
    from ingest.config import IngestConfig
    from ingest.run import ingest

    folder = tmp_path_factory.mktemp("plain")
    h5, table_file = write_source(folder, 24)
    lines = table_file.read_text().splitlines()
    table_file.write_text(
        "\n".join([lines[0] + ",Hernia", *(line.replace("on.", "on and more.") + ",0" for line in lines[1:])])
    )
    ingest(
        IngestConfig(
            to_shards=folder / "set", h5=(h5,), csv=(table_file,), label_columns=(*FINDINGS, "Hernia"), val_fraction=0.5
        )
    )
    return folder / "set"


def test_what_is_missing_is_said_and_left_out(run: Path, plain_shards: Path) -> None:
    result = evaluate(asked(run, plain_shards, json=run / "plain.json"))
    assert (result.split, result.unit) == ("val", "film")
    nothing = result.labels["Hernia"]
    assert (nothing.auroc, nothing.threshold, nothing.f1, nothing.positives) == (None, None, None, 0)
    assert set(nothing.intervals.values()) == {None}
    assert set(result.mean.labels.values()) == {2}
    told = " ".join(result.notes)
    for words in ("no test split", "draws of a film", "1 of 3 labels", "Hernia"):
        assert words in told, told
    assert "English" not in told, "their reports have an `and`"
    assert any(line.split() == ["Hernia", *"----", "0", "12"] for line in table(result, 20).splitlines())
    csv_line = (run / "plain.csv").read_text().splitlines()[3]
    assert csv_line.startswith("Hernia,,,") and csv_line.endswith(",0,12,0")
    none = evaluate(asked(run, plain_shards, split="train", where="split == 'train'", json=run / "plain.json"))
    assert none.labels["Cardiomegaly"].f1 is None and none.labels["Cardiomegaly"].auroc is not None
    assert any("no film of val" in note for note in none.notes)


def test_without_labels_there_is_retrieval(run: Path, source: tuple[Path, Path], tmp_path: Path) -> None:
    from ingest.config import IngestConfig
    from ingest.run import ingest

    h5, table_file = source
    ingest(IngestConfig(to_shards=tmp_path / "set", h5=(h5,), csv=(table_file,), val_fraction=0.1, workers=1))
    result = evaluate(asked(run, tmp_path / "set", json=tmp_path / "r.json"))
    assert result.labels == {} and result.mean.auroc is None and result.retrieval is not None
    shown = table(result, 20)
    assert "film to report" in shown and "AUROC" not in shown and "zero-shot" not in shown


def test_results_on_other_shards_leave_those_there_alone(shards_dir: Path, plain_shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trained(folder / "best.pt", shards_dir, 0)
    wanted = {"evaluation-val.json": shards_dir}
    wanted[f"evaluation-val-{read_manifest(plain_shards).digest[:8]}.json"] = plain_shards
    for shards in (shards_dir, plain_shards, plain_shards, shards_dir):
        evaluate(asked(folder, shards, split="val", retrieval=False))
    found = {path.name: json.loads(path.read_bytes())["shards"] for path in folder.glob("*.json")}
    assert found == {name: read_manifest(shards).digest for name, shards in wanted.items()}


def test_mistakes_are_one_line(run: Path, shards_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        assert stop.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        return lines[0]

    shards = ("--shards", str(shards_dir))
    good = ("--checkpoint", str(run), *shards)
    assert "holds no checkpoint" in refused("--checkpoint", str(tmp_path), *shards)
    (tmp_path / "x.pt").write_bytes(b"shardclip-checkpoint?")
    assert "not a checkpoint" in refused("--checkpoint", str(tmp_path / "x.pt"), *shards)
    assert "no shards here" in refused("--checkpoint", str(run), "--shards", str(tmp_path))
    assert "'dev'" in refused(*good, "--split", "dev")
    assert "--prompt-forms 'PA'" in refused(*good, "--prompt-forms", "PA")
    assert "here are 3 checkpoints" in refused(*good, "--top", "4")  # of 4 files, two of which are the same
    assert "--top 0" in refused(*good, "--top", "0")
    assert "--seed -1" in refused(*good, "--seed", "-1")
    assert "takes all 77 tokens, or more" in refused(*good, "--prompt-forms", "word " * 80 + "{}")
    assert "twice" in refused("--checkpoint", str(run), str(run / "best.pt"), *shards)
    assert "no averaged weights" in refused(*good, "--weights", "ema")
    assert "cannot read the prompts" in refused(*good, "--prompts-file", str(tmp_path / "none.toml"))
    films = tmp_path / "films.csv"
    films.write_text("theirs")
    assert "would write over" in refused(*good, "--json", str(tmp_path / "films.json"))
    assert films.read_text() == "theirs"
    mine = tmp_path / "mine.json"
    mine.write_text('{"bench": "loader"}')
    for path, words in (
        (films, "does not end in .json"),
        (shards_dir / "manifest.json", "lies in the data set"),
        (tmp_path / "config.json", "would write over a file of a run"),
        (mine, "is no such result"),
    ):
        path.touch()
        assert words in refused(*good, "--json", str(path))
    broken = {name: torch.full_like(value, torch.nan) for name, value in weights(0).items()}
    nan = trained(tmp_path / "nan.pt", shards_dir, 1, model=broken)
    assert "not finite" in refused("--checkpoint", str(nan), *shards)
    for change, words in (
        ({"config": 3}, "its config is missing, or not what a run writes"),
        ({"config": {"steps": "x"}}, "settings that this version does not know (steps is 'x'"),
        ({"model": {"logit_scale": 3}}, "holds another model"),
    ):
        payload = read_checkpoint(nan) | change
        write_checkpoint(tmp_path / "hostile.pt", payload)
        assert words in refused("--checkpoint", str(tmp_path / "hostile.pt"), *shards)
    payload = read_checkpoint(nan)
    payload["config"]["model"] |= {"embed_dim": 60_000, "text_width": 60_000}  # 80 GB, were it built
    write_checkpoint(tmp_path / "hostile.pt", payload)
    assert "holds another model" in refused("--checkpoint", str(tmp_path / "hostile.pt"), *shards)
    assert "loss on val" in refused(*good, "--top", "1", "--where", "split == 'test'")


def test_prompt_vectors_are_the_mean_of_their_phrasings(shards_dir: Path) -> None:
    """Of their unit vectors, and of unit length again."""
    model = build_model(ModelConfig(widths=WIDTHS), vocab_size=49408, context=77).eval()
    manifest, texts = read_manifest(shards_dir), ("edema", "fluid in the lungs", "congestion")
    wording = Wording(own={"Edema": Prompt(positive=texts, negative=("clear lungs",))})
    vectors = embed_prompts(model, "Edema", manifest, torch.device("cpu"), wording)
    with torch.inference_mode():
        each = model.encode_text(tokenize(texts, manifest))
    mean = (each / each.norm(dim=1, keepdim=True)).mean(dim=0)
    torch.testing.assert_close(vectors[0], mean / mean.norm())
    assert vectors[1].norm().item() == pytest.approx(1.0)
