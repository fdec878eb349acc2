"""The loop's options in whole runs: averages, parts, early stopping, a plateau, validation's time, a compiled pass."""

import functools
import json
from pathlib import Path

import pytest
import torch

from shards.errors import InputError
from train.checkpoint import list_checkpoints, read_checkpoint
from train.commandline import from_fields, parse_config
from train.config import OptimConfig, TrainConfig, loader_config
from train.device import Precision
from train.main import main
from train.model import build_model
from train.objective import Contrastive, validation_loss
from train.optim import learning_rate, momentum
from train.ranks import Ranks
from train.step import Step, check_parts

SMALL = (
    *("--steps", "12", "--batch-size", "8", "--model.widths", *("16",) * 4, "--device", "cpu", "--threads", "1"),
    *("--data.image-size", "64", "--log-every", "1", "--validate-every", "3", "--save-every", "6"),
    *("--optim.warmup", "2", "--optim.lr", "1e-3"),
)
EVERYTHING = (
    *("--optim.optimizer", "sgd", "--optim.schedule", "plateau", "--optim.plateau-patience", "0"),
    *("--min-delta", "10", "--ema", "0.8", "--accumulate", "4", "--label-smoothing", "0.1"),
    *("--activation-checkpointing", "--optim.clip", "0.5"),
    *("--model.text-head", "mlp", "--model.head-width", "32", "--model.head-dropout", "0.2"),
)


def train(shards: Path, out: Path, *more: str) -> None:
    """A run in this process."""
    main(["--shards", str(shards), "--out", str(out), *SMALL, *more])


def column(out: Path, name: str) -> dict[int, float]:
    """One figure of a run by step."""
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row[name] for row in rows if name in row}


def newest(out: Path) -> dict:
    """The payload of a run's newest checkpoint."""
    return read_checkpoint(list_checkpoints(out / "checkpoints")[0][1])


@pytest.fixture(scope="module")
def plain(shards_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps with the default options. Read only."""
    out = tmp_path_factory.mktemp("loop") / "plain"
    train(shards_dir, out)
    return out


@pytest.fixture(scope="module")
def rich(shards_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps with every option on. Read only."""
    out = tmp_path_factory.mktemp("loop") / "rich"
    train(shards_dir, out, *EVERYTHING)
    return out


def test_everything_at_once_resumes_bit_by_bit(rich: Path, shards_dir: Path, tmp_path: Path) -> None:
    train(shards_dir, tmp_path, *EVERYTHING, "--stop-at", "7")
    train(shards_dir, tmp_path, *EVERYTHING, "--resume", "auto")
    for name in ("loss", "val_loss", "lr", "grad_norm", "order_digest"):
        assert column(tmp_path, name) == column(rich, name), name
    files = [list_checkpoints(run / "checkpoints")[0][1] for run in (rich, tmp_path)]
    assert files[0].read_bytes() == files[1].read_bytes()
    first = newest(rich)
    assert first["schedule"]["plateau"]["cuts"] == 3
    assert any(not first["ema"][name].equal(first["model"][name]) for name in first["model"])


def test_the_position_counts_batches_not_parts(rich: Path, plain: Path) -> None:
    assert newest(rich)["position"] == newest(plain)["position"] == 12 * 8
    assert column(rich, "order_digest") == column(plain, "order_digest")


def test_a_plateau_lowers_the_rate_after_each_validation_but_the_first(rich: Path) -> None:
    rates = column(rich, "lr")
    assert [rates[step] for step in (1, 2, 6, 7, 9, 10, 12)] == [5e-4, 1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4, 2.5e-4]


def test_every_step_gets_its_own_rate_momentum_and_decay(
    shards_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The schedules count steps from 0, the average's ramp from 1."""
    noted: list[tuple] = []
    monkeypatch.setattr("train.step.set_rates", lambda _, *rates: noted.append(rates))
    monkeypatch.setattr("train.loop.update_average", lambda _, __, *how: noted.append(how))
    train(shards_dir, tmp_path, "--optim.schedule", "one-cycle", "--ema", "0.9", "--stop-at", "3")
    config = OptimConfig(schedule="one-cycle", warmup=2, lr=1e-3)
    for step in range(3):
        rates = learning_rate(config, step, 12), momentum(config, step, 12)
        assert noted[2 * step : 2 * step + 2] == [rates, (0.9, step + 1)]


def test_the_average_is_what_is_validated(rich: Path, shards_dir: Path) -> None:
    payload = newest(rich)
    config = from_fields(TrainConfig, {**payload["config"], "shards": str(shards_dir), "out": ""})
    losses = {}
    for part in ("model", "ema"):
        model = build_model(config.model, vocab_size=49408, context=77).to(memory_format=torch.channels_last)
        model.load_state_dict(payload[part])
        precision = Precision(name="fp32", device=torch.device("cpu"))
        losses[part] = validation_loss(model, loader_config(config, split="val", mode="eval"), precision, Ranks())
    assert losses["ema"] == pytest.approx(column(rich, "val_loss")[12], rel=1e-6)
    assert losses["model"] != pytest.approx(losses["ema"], rel=1e-6)


def test_parts_train_as_the_whole_batch_does(plain: Path, shards_dir: Path, tmp_path: Path) -> None:
    """In the first steps; then AdamW has made rounding grow, as it does in any training."""
    train(shards_dir, tmp_path, "--accumulate", "2", "--stop-at", "4")
    losses, expected = column(tmp_path, "loss"), column(plain, "loss")
    assert [losses[step] for step in (1, 2, 3)] == pytest.approx([expected[step] for step in (1, 2, 3)], rel=1e-5)


def test_validation_tells_its_time_on_its_own_rows(plain: Path) -> None:
    took = column(plain, "validate_s")
    assert list(took) == list(column(plain, "val_loss")) == [3, 6, 9, 12]
    assert all(0 < seconds < 60 for seconds in took.values())


def test_a_run_that_no_longer_improves_ends(
    shards_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Losses of the validations at steps 1 to 7; 1.95 is not lower by 0.1, so that patience ends at step 5."""
    losses = iter([3.0, 2.0, 1.95, float("nan"), 2.5, 1.0, 1.0])
    monkeypatch.setattr(Contrastive, "validate", lambda *_: next(losses))
    options = ("--validate-every", "1", "--patience", "3", "--min-delta", "0.1")
    train(shards_dir, tmp_path, *options, "--stop-at", "4")
    train(shards_dir, tmp_path, *options, "--resume", "auto")
    assert max(column(tmp_path, "loss")) == newest(tmp_path)["step"] == 5
    assert not (tmp_path / "requeue").exists() and (tmp_path / "curves.png").exists()
    best = read_checkpoint(tmp_path / "best.pt")
    # The lowest, by however little, and not what comes after it or after the run was stopped.
    assert (best["step"], best["best_step"], best["best_loss"]) == (3, 3, 1.95)
    assert "no lower validation loss in 3 validations" in capsys.readouterr().out
    train(shards_dir, tmp_path, *options, "--resume", "auto")  # and is not taken up again
    assert max(column(tmp_path, "loss")) == 5


def test_a_compiled_run_counts_its_graphs(
    plain: Path, shards_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled without code generation, which takes a minute here."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    train(shards_dir, tmp_path, "--compile", "--stop-at", "4")
    graphs, losses = column(tmp_path, "compiled_graphs"), column(tmp_path, "loss")
    assert 1 <= graphs[1] <= graphs[4] <= 3 and not column(plain, "compiled_graphs")
    expected = column(plain, "loss")
    assert [losses[step] for step in (1, 2, 3)] == pytest.approx([expected[step] for step in (1, 2, 3)], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--accumulate", "0"), "accumulate is 0"),
        (("--ema", "1"), "ema is 1.0"),
        (("--label-smoothing", "1"), "label_smoothing is 1.0"),
        (("--min-delta", "-1"), "min_delta is -1.0"),
        (("--patience", "0"), "patience is 0"),
        (("--patience", "2", "--validate-every", "0"), "--patience goes by the validation loss"),
        (("--optim.schedule", "plateau", "--validate-every", "0"), "plateau goes by the validation loss"),
        (("--optim.plateau-factor", "1"), "--optim.plateau-factor 1.0"),
        (("--optim.plateau-patience", "-1"), "--optim.plateau-patience -1"),
        (("--optim.momentum", "1"), "--optim.momentum 1.0"),
        (("--optim.nesterov", "--optim.momentum", "0"), "--optim.momentum is 0.0"),
        (("--optim.optimizer", "adam"), "adam"),
        (("--optim.schedule", "step"), "step"),
        (("--on-nonfinite", "ignore"), "ignore"),
    ],
)
def test_options_that_cannot_be_are_named(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse_config("x", ["--shards", "a", "--out", "b", *arguments])


def test_parts_that_no_rank_can_make_are_refused() -> None:
    check_parts(8, 2, 4)
    with pytest.raises(InputError, match="--accumulate 3 does not divide the 8 samples"):
        check_parts(8, 1, 3)
    with pytest.raises(InputError, match="--accumulate 4 does not divide the 2 samples that each of 4 ranks"):
        check_parts(8, 4, 4)


def test_too_little_memory_is_one_line(
    shards_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def step(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nA second line")

    monkeypatch.setattr(Step, "__call__", step)
    with pytest.raises(SystemExit, match="2"):
        train(shards_dir, tmp_path / "run")
    (line,) = capsys.readouterr().err.splitlines()
    assert "out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.); try --accumulate" in line


def test_a_run_is_whole_without_its_curves(
    shards_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def draw(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.loop.draw_curves", draw)
    train(shards_dir, tmp_path, "--steps", "1")
    told = capsys.readouterr()
    assert "no curves (OSError)" in told.err and "trained 1 steps" in told.out
