"""How cost grows: simulated sets are real ones to the loader, and what is counted is right."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bench.order import shuffle
from bench.plots import draw, plots_of, scale_panels
from bench.scale import ScaleConfig, measure_order, measure_ranks, measure_set, thread_counts, verdict
from bench.shapes import read_results
from bench.simulate import write_set
from bench.standards import judged
from pipeline.batch import World
from pipeline.config import LoaderConfig
from pipeline.loader import build_loader
from pipeline.order import Layout, ShuffledOrder
from shards.errors import InputError
from shards.manifest import read_manifest


def test_a_simulated_set_is_a_set(tmp_path: Path) -> None:
    """The loader reads and checks every shard of it; an epoch has each sample once."""
    write_set(tmp_path, samples=96, shards=6)
    manifest = read_manifest(tmp_path)
    assert manifest.rows("train") == 96 and len(manifest.splits["train"]) == 6
    with build_loader(LoaderConfig(shards=tmp_path, batch_size=24, mode="eval"), World()) as loader:
        found = [batch.samples.numpy().copy() for batch in loader]
    assert np.array_equal(np.concatenate(found), [(shard, row) for shard in range(6) for row in range(16)])
    assert {(tmp_path / f"train-{number:06d}.tar").stat().st_ino for number in range(6)} == {
        (tmp_path / "train-000000.tar").stat().st_ino
    }


def test_films_are_as_large_as_real_ones(tmp_path: Path) -> None:
    """22 KB a film at quality 95: the first batch waits for as many bytes as on a real set."""
    info = write_set(tmp_path, samples=64, shards=1).splits["train"][0]
    assert 20_000 < info.tar.bytes / info.rows - 2560 < 24_000


def test_a_set_is_measured_in_a_fresh_process(tmp_path: Path) -> None:
    row = measure_set(352, 22, ScaleConfig(samples=(352,), shards=(), rounds=1, out=tmp_path))
    assert (row["samples"], row["shards"], row["blocks"]) == (352, 22, 22)
    assert row["first_batch_s"] > row["manifest_s"] > 0 and row["locate_us"] > 0
    assert not list(tmp_path.iterdir())


def test_memory_is_that_of_the_blocks() -> None:
    small, large = (measure_order(lambda shards=shards: Layout((11_000,) * shards, 190)) for shards in (42, 4_200))
    assert large["blocks"] == 100 * small["blocks"] == 243_600
    assert large["kept_bytes"] < 20 * large["blocks"]


@pytest.mark.parametrize("ranks", [1, 3, 8, 64])
def test_reads_keep_the_bound(ranks: int) -> None:
    row = measure_ranks(Layout((1_000,) * 7, 19), ranks)
    assert row["blocks"] == 7 * 53 <= row["reads"] <= row["bound"] == row["blocks"] + row["streams"] - 1
    assert row["streams"] % ranks == 0


def test_thread_counts() -> None:
    assert [thread_counts(cpus) for cpus in (1, 2, 6, 8)] == [(1,), (1, 2), (1, 2, 4, 6), (1, 2, 4, 8)]


def made_up() -> dict[str, Any]:
    """What the command writes, in small."""
    rows = [
        {"samples": size, "shards": 1, "first_batch_s": 0.5 + size / 1e8, "kept_bytes": size}
        for size in (462_000, 10**8)
    ]
    cases = [
        {"name": f"{n} threads", "threads": n, "images_per_s": n * 9.0, "rounds": [{"images_per_s": n * 9.0}]}
        for n in (1, 2)
    ]
    environment = {"cpu": "x", "cpus": 2, "time": "2026-01-01"}
    return {"bench": "scale", "environment": environment, "samples": rows, "shards": [], "ranks": [], "cases": cases}


def test_the_figures_end_in_a_sentence() -> None:
    said = verdict(made_up() | {"ranks": [{"ranks": 8, "ratio": 1.04}, {"ranks": 2, "ratio": 1.02}]})
    assert said == (
        "first batch after 0.50 s with 462,000 samples and 1.50 s with 100,000,000 samples, whose order takes "
        "100.0 MB; 8 ranks read each block 1.04 times an epoch, together; 2 threads give 2.00x the films/s of 1 threads"
    )
    assert verdict({"samples": [], "ranks": [], "cases": []}) == ""


def test_plots_and_standards(tmp_path: Path) -> None:
    """A PNG, the same plots on the report's page, and the standards of the start."""
    (tmp_path / "scale.json").write_text(json.dumps(made_up()))
    (tmp_path / "scale.png").write_bytes(draw([panel for panel in scale_panels(made_up()) if panel], "png", columns=2))
    with Image.open(tmp_path / "scale.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000
    (result,) = read_results(tmp_path / "scale.json")
    titles = [plot.title for plot in plots_of(result)]
    assert {"seconds to the first batch", "bytes of the order in memory", "films/s of the loader"} <= set(titles)
    found = {standard.what: reached for standard, _, reached in judged([result]) if reached is not None}
    assert found == {"first batch of 462,000 samples": True, "first batch of 100 million samples": True}


def test_mistakes() -> None:
    with pytest.raises(InputError, match="do not make 2 equal shards"):
        ScaleConfig(samples=(11_001,))
    with pytest.raises(InputError, match="over 60,000"):
        ScaleConfig(shards=(66_000,))
    with pytest.raises(InputError, match="--ranks 0"):
        ScaleConfig(ranks=(0,))


def test_how_random_an_epoch_is() -> None:
    found = shuffle(ShuffledOrder(Layout((10_000,) * 3, 190), seed=0, streams=48), 10_000, 190, 64)
    assert found["batch_pairs_of_a_block"] < 0.02
    assert abs(found["distance"] - found["distance_random"]) < 0.02
