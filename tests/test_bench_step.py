"""The step bench on a CPU: what is counted, that both trainers train alike, what turns measure; `make gpu` dry."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import run_module
from torch import nn

from bench import gpu
from bench.limits import best_batch, count_flops, gaps, half_peak, search_batch, sized
from bench.recipe import pace, total_seconds
from bench.shapes import tables_of
from bench.sizes import store_from_shards
from bench.step import StepBenchConfig, run_step
from bench.together import advice, compare, verdict
from bench.together import main as together
from bench.trainers import OpenClip, Ours, Setup
from pipeline.batch import Batch
from pipeline.loader import Loader
from shards.errors import InputError
from train.config import OptimConfig, TrainConfig
from train.device import Precision
from train.model import build_model
from train.presets import PRESETS, tiny

CPU = torch.device("cpu")


def toy() -> TrainConfig:
    """The smallest model that is one, on one thread."""
    base = tiny()
    return replace(
        base,
        preset="toy",
        log_every=2,
        data=replace(base.data, image_size=64),
        model=replace(base.model, widths=(16, 16, 16, 16), embed_dim=16, text_width=16),
    )


@pytest.fixture
def toy_preset() -> Iterator[None]:
    """`--preset toy`, in this process."""
    PRESETS["toy"] = toy
    yield
    del PRESETS["toy"]


def made_up_batch(size: int = 8, context: int = 32, longest: int = 20) -> Batch:
    """Noise with reports."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.zeros(size, context, dtype=torch.int64)
    for row in range(size):
        length = longest - row % 4
        tokens[row, :length] = torch.randint(1, 400, (length,), generator=generator)
        tokens[row, length - 1] = 499
    images = torch.randn(size, 3, 64, 64, generator=generator).contiguous(memory_format=torch.channels_last)
    samples = torch.arange(2 * size).reshape(size, 2)
    return Batch(
        images=images, tokens=tokens, labels=torch.zeros(size, 0), samples=samples, position=0, text_length=longest
    )


def setup(**optim) -> Setup:
    """Equal towers for both trainers."""
    torch.manual_seed(0)
    config = replace(toy(), shards=Path(), out=Path(), optim=OptimConfig(schedule="constant", warmup=0, **optim))
    model = build_model(config.model, vocab_size=500, context=32, image_size=64)
    return Setup(config=config, model=model, precision=Precision(name="fp32", device=CPU))


@pytest.mark.parametrize(
    "optim", [{"optimizer": "adamw", "lr": 1e-3}, {"optimizer": "sgd", "lr": 0.1, "weight_decay": 0.0}]
)
def test_both_trainers_do_the_same_work(optim: dict) -> None:
    """After three steps on the same batch their weights agree, so what is timed is the same training."""
    given, batch = setup(clip=1.0, **optim), made_up_batch()
    ours, theirs = Ours(given, batch, compiled=False), OpenClip(given, batch, compiled=False)
    before = given.model.text.token_embedding.weight.clone()
    ours.run(3)
    theirs.run(3)
    expected = dict(ours.learner.model.named_parameters())
    moved = 0.0
    for name, parameter in theirs._model.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=2e-4, msg=name)
        moved = max(moved, (parameter - dict(given.model.named_parameters())[name]).abs().max().item())
    assert moved > 2e-3 and torch.equal(before, given.model.text.token_embedding.weight)


def test_flops_of_known_layers() -> None:
    class Known(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Linear(16, 4, bias=False)
            self.embed = nn.Embedding(10, 16)

        def forward(self, images, tokens):
            x = self.embed(tokens)  # (B, L, 16)
            x = nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]
            return self.conv(images), self.linear(x), torch.ones(())

    images, tokens = torch.randn(2, 3, 10, 12), torch.zeros(2, 6, dtype=torch.int64)
    conv = 2 * (10 * 12) * 8 * (3 * 3 * 3)
    linear = 2 * 6 * 16 * 4
    attention = 2 * (2 * 6 * 6 * 16)
    # Backward is twice forward, but for the convolution's input, which needs no gradient.
    assert count_flops(Known(), images, tokens) == 2 * conv + 3 * linear + 3 * attention
    assert count_flops(Known(), images[:1], tokens[:1]) == 2 * conv + 3 * linear + 3 * attention


def test_peaks_go_by_the_cards_names() -> None:
    assert half_peak("NVIDIA H100 80GB HBM3") == 989.4e12 and half_peak("NVIDIA H100 PCIe") == 756e12
    assert half_peak("NVIDIA H200") == 989.4e12 and half_peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert half_peak("NVIDIA L40S") == 362.05e12 and half_peak("NVIDIA L4") == 121e12
    assert half_peak("NVIDIA A10") == 125e12 and half_peak("Tesla V100-SXM2-32GB") == 125e12
    assert half_peak("some other card") is None


def test_gaps_are_what_no_kernel_covers() -> None:
    assert gaps([]) is None
    assert gaps([(0, 10)]) == 0
    assert gaps([(0, 4), (2, 3), (6, 10)]) == pytest.approx(0.2)
    assert gaps([(6, 10), (0, 4), (3, 6)]) == 0


def test_a_batch_of_any_size_holds_the_same_samples() -> None:
    batch = made_up_batch(8)
    for size in (3, 8, 20):
        found = sized(batch, size)
        assert len(found) == size and found.images.is_contiguous(memory_format=torch.channels_last)
        for at in range(size):
            assert torch.equal(found.images[at], batch.images[at % 8])
            assert torch.equal(found.tokens[at], batch.tokens[at % 8])


class Clock:
    """A clock that goes on only when a trainer works."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_the_search_ends_where_growth_or_memory_does(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("bench.limits.time", clock)

    class Trainer:
        """Films/s grow up to a batch of `full`; there is memory for 128."""

        def __init__(self, size: int, full: int) -> None:
            if size > 128:
                raise torch.OutOfMemoryError("no")
            self._seconds = max(1.0, size / full)

        def run(self, steps: int) -> None:
            clock.now += steps * self._seconds

    given_back: list[torch.device] = []  # also of the size that had no memory: DALI, which comes next, would have none
    monkeypatch.setattr("bench.limits.give_back", given_back.append)

    def search(first: int, largest: int, full: int) -> list[dict]:
        return search_batch(lambda size: Trainer(size, full), CPU, first=first, largest=largest, seconds=10)

    tried = search(8, 4096, 32)
    assert [found["batch_size"] for found in tried] == [8, 16, 32, 64] and "faster than batch 32" in tried[-1]["ended"]
    assert [found["images_per_s"] for found in tried] == [8, 16, 32, 32] and best_batch(tried) == 32
    assert search(8, 16, 32)[-1]["ended"] == "--largest-batch 16"
    tried = search(32, 4096, 4096)
    assert [found["batch_size"] for found in tried] == [32, 64, 128] and "out of memory" in tried[-1]["ended"]
    assert len(given_back) == 4 + 2 + 4
    with pytest.raises(torch.OutOfMemoryError):
        search(256, 4096, 32)


@pytest.mark.usefixtures("toy_preset")
def test_step_bench_says_what_it_measured(shards_dir: Path) -> None:
    result = run_step(
        StepBenchConfig(
            **{"shards": shards_dir, "preset": "toy", "batch_size": 8, "largest_batch": 16, "rounds": 2},
            **{"seconds": 0.02, "compiled": False, "threads": 1, "device": "cpu"},
        )
    )
    assert json.loads(json.dumps(result, allow_nan=False))["bench"] == "step"
    assert result["settings"]["preset"] == "toy" and result["settings"]["batch_size"] == 8
    cases = {(case["name"], case["batch_size"]): case for case in result["cases"]}
    assert {name for name, size in cases if size == 8} == {"step", "step, whole text", "open_clip"}
    ours, whole, theirs = (cases[name, 8] for name in ("step", "step, whole text", "open_clip"))
    assert ours["tokens"] < whole["tokens"] == theirs["tokens"] == result["settings"]["context"]
    assert ours["flops_per_step"] < whole["flops_per_step"] == theirs["flops_per_step"]
    for case in cases.values():
        assert len(case["rounds"]) == 2 and case["lowest"] <= case["images_per_s"] <= case["highest"]
        assert all(row["images_per_s"] == case["batch_size"] / row["step_s"] for row in case["rounds"])
        expected = case["flops_per_step"] / case["step_s"] / result["peak"]["flops_per_s"]
        assert case["mfu"] == pytest.approx(expected)
    rounds = zip(ours["rounds"], theirs["rounds"], strict=True)
    ratios = sorted(mine["images_per_s"] / other["images_per_s"] for mine, other in rounds)
    assert (ours["ratio_lowest"], ours["ratio_highest"]) == pytest.approx((ratios[0], ratios[1]))
    assert "ratio_to_open_clip" not in theirs
    loop = result["loop"]
    assert len(loop["rounds"]) == 4 and loop["lowest"] <= loop["overhead"] <= loop["highest"] and loop["inside"] > 0
    assert "against open_clip's trainer" in result["verdict"]
    (shown,) = tables_of(result)
    assert len(shown.rows) == len(cases) and {"to open_clip", "of peak"} <= set(shown.header)


@pytest.mark.usefixtures("toy_preset")
def test_together_measures_live_replayed_and_resident_batches(
    shards_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loader that takes 50 ms for a batch is waited for in the turns that it feeds, and in no other."""
    monkeypatch.setattr(Loader, "__next__", slowly(Loader.__next__))
    arguments = ["--shards", str(shards_dir), "--preset", "toy", "--batch-size", "8"]
    arguments += ["--rounds", "2", "--seconds", "0.02"]
    together([*arguments, "--threads", "1", "--device", "cpu", "--json", str(tmp_path / "t.json")])
    result = json.loads((tmp_path / "t.json").read_bytes())
    cases = {case["name"]: case for case in result["cases"]}
    assert list(cases) == ["resident", "replayed", "live", "loader alone"]
    for name, case in cases.items():
        assert len(case["rounds"]) == 2, name
        for row in case["rounds"]:
            assert row["wait_s"] + row["inside_s"] <= row["step_s"] * 1.001 and row["images_per_s"] > 0
    steps = {row["steps"] for name in ("resident", "replayed", "live") for row in cases[name]["rounds"]}
    assert len(steps) == 1 and steps.pop() % 2 == 0  # each turn bears as many rows of metrics
    assert cases["resident"]["wait_s"] < DELAY
    assert cases["live"]["wait_s"] >= DELAY and cases["loader alone"]["step_s"] >= DELAY
    told = capsys.readouterr().out
    assert result["verdict"] in told and "share" in result["verdict"] and "says this alone" in result["verdict"]
    assert "step 1000000000" not in told and not list(tmp_path.glob("run*"))


DELAY = 0.05
"""Seconds."""


def slowly(take: Callable[[Loader], Batch]) -> Callable[[Loader], Batch]:
    """`take`, later."""

    def later(loader: Loader) -> Batch:
        time.sleep(DELAY)
        return take(loader)

    return later


def turns(
    live: float, wait: float, *, replayed: float = 0.1, alone: float = 0.02, cpu: float = 0.4
) -> dict[str, list[dict[str, float]]]:
    """Three rounds at batch 64, seconds a step."""

    def rows(step_s: float, wait_s: float = 0.0) -> list[dict[str, float]]:
        row = {"step_s": step_s, "images_per_s": 64 / step_s, "wait_share": wait_s / step_s, "cpu_s_per_1000": cpu}
        return [row] * 3

    return {
        **{"resident": rows(replayed), "replayed": rows(replayed)},
        **{"live": rows(live, wait), "loader alone": rows(alone, alone)},
    }


def test_the_verdict_follows_the_figures() -> None:
    settings = {"threads": 8, "backend": "cpu", "device": "cuda", "compile": True}
    found = compare(turns(0.1005, 0.0002), cpus=8, device="cuda")
    assert found["loader_cost"] == pytest.approx(0.005) and found["loader_over_step"] == pytest.approx(5)
    # 640 films/s at 0.4 CPU ms each are 0.256 CPUs; with what is spare, and one for the rest, 2.
    assert advice(found, settings) == {"cpus_per_gpu": 2, "first": "--batch-size, to what bench.step finds best"}
    assert verdict(found, settings).startswith("Step-bound: training waits for data 0.2%")
    assert "--cpus-per-task 2 for each GPU" in verdict(found, settings)
    assert advice(found, {**settings, "compile": False})["first"] == "--compile"
    found = compare(turns(0.2, 0.1, alone=0.2), cpus=8, device="cuda")  # 0.1 CPUs of 8 are busy
    noisy = {**found, "loader_cost_lowest": -0.1, "loader_cost_highest": 0.2}
    assert "lost in the noise" in verdict(noisy, settings) and "noise" not in verdict(found, settings)
    assert (
        "how it reads, for its CPUs wait (0.1 busy): python -m bench.loader --tune" in advice(found, settings)["first"]
    )
    found = compare(turns(0.2, 0.1, alone=0.2, cpu=20), cpus=8, device="cuda")  # 6.4
    assert verdict(found, settings).startswith("Loader-bound: training waits for data 50.0%")
    assert "--backend dali" in advice(found, settings)["first"]
    assert advice(found, {**settings, "threads": 2})["first"] == "--data.threads 8 (now 2)"
    fast = compare(turns(0.01, 0.005, replayed=0.004, alone=0.01), cpus=4, device="cuda")
    assert advice(fast, {**settings, "backend": "dali", "threads": 4}) == {
        "cpus_per_gpu": 9,
        "first": "--cpus-per-task 9 for each GPU (now 4)",
    }


def test_the_time_of_a_recipe_is_its_steps_and_validations() -> None:
    rows = [
        {"step": step, "step_ms": 900.0 if step == 10 else 10.0, "loader_wait_ms": 0.1, "save_pause_s": None}
        for step in range(10, 501, 10)
    ]
    rows[-1] |= {"validate_s": 2.0, "save_pause_s": 0.5}
    found = {"whole": False, **pace(rows)}
    assert found["step_s"] == pytest.approx(0.01) and found["wait_share"] == pytest.approx(0.01)
    assert total_seconds(found, 25_000, 50) == pytest.approx(8.9 + 250 + 125)
    assert total_seconds({**found, "whole": True, "wall_s": 77.0}, 25_000, 50) == 77.0


def test_mistakes_are_named(shards_dir: Path) -> None:
    with pytest.raises(InputError, match="--rounds 0"):
        StepBenchConfig(shards=shards_dir, rounds=0)
    with pytest.raises(InputError, match="unknown preset 'huge'"):
        run_step(StepBenchConfig(shards=shards_dir, preset="huge"))


@pytest.mark.slow
def test_make_gpu_can_be_gone_without_one(shards_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part but the tests and bench.loader, which have tests of their own; the parts of an earlier call stay.

    And without DALI, which a machine with a GPU need not have.
    """
    (tmp_path / "nothing" / "nvidia").mkdir(parents=True)
    (tmp_path / "nothing" / "nvidia" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "nothing"))
    arguments = ["--device", "cpu", "--preset", "tiny", "--shards", shards_dir, "--out", tmp_path, "--rounds", "1"]
    arguments += ["--seconds", "0.1", "--batch-size", "4", "--largest-batch", "0", "--no-compiled", "--threads", "1"]
    (tmp_path / "dry-run.json").write_text('{"bench": "gpu", "loader": {"kept": true}}')
    done = run_module(
        "bench.gpu", *map(str, arguments), "--recipe-steps", "4", "--parts", "step", "together", "recipe", timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "no DALI here" in done.stdout
    found = json.loads((tmp_path / "dry-run.json").read_bytes())
    assert found["together"]["settings"]["backend"] == "cpu"
    assert found["loader"] == {"kept": True} and found["step"]["bench"] == "step"
    assert found["together"]["bench"] == "together" and found["step"]["settings"]["preset"] == "tiny"
    recipe = found["recipe"]
    assert recipe["steps"] == 4 and not recipe["whole"] and recipe["validate_s"] > 0 and recipe["losses"]["validation"]
    assert recipe["seconds_800"] > 800 * recipe["step_s"]
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="needs a CUDA device"):
            gpu.run_gpu(gpu.GpuConfig(out=tmp_path))


def test_a_part_of_make_gpu_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever went wrong in it; and one for which no time is left is not begun."""

    def broken(_: gpu.Job) -> dict[str, object]:
        raise KeyError("images")

    def late(job: gpu.Job) -> dict[str, object]:
        monkeypatch.setattr(gpu.time, "monotonic", lambda: float("inf"))
        return {"seconds": job.seconds_left}

    parts = {**gpu._PARTS, "tests": broken, "loader": late}
    monkeypatch.setattr(gpu, "_PARTS", parts)
    monkeypatch.setenv("OUT", str(tmp_path))
    path = gpu.run_gpu(gpu.GpuConfig(device="cpu", parts=("tests", "loader", "step")))
    found = json.loads(path.read_bytes())
    assert found["tests"]["failed"] == "KeyError: 'images'" and found["loader"]["seconds"] == 0
    assert found["step"]["failed"] == "ingest.phantom: no time was left for it" and path.parent == tmp_path


def test_a_file_for_the_baselines_is_made_of_shards(
    shards_dir: Path, source: tuple[Path, Path], tmp_path: Path
) -> None:
    """Every film in its row, as far as JPEG keeps it."""
    with h5py.File(store_from_shards(shards_dir, tmp_path / "cxr.h5")) as made, h5py.File(source[0]) as given:
        assert made["cxr"].dtype == given["cxr"].dtype == "f4" and made["cxr"].shape == given["cxr"].shape
        for one, other in zip(made["cxr"], given["cxr"], strict=True):
            assert np.abs(one - other).mean() < 3
