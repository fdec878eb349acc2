"""What only a GPU can show: the same DALI graph on it against torchvision, a step in AMP and channels_last, the digest.

Run by `make gpu`; skipped with a reason elsewhere.
"""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from pipeline.augment import crop_boxes, flips
from pipeline.batch import Batch, World, digest_batch
from pipeline.config import CLIP_MEAN, CLIP_STD, LoaderConfig
from pipeline.loader import build_loader
from shards.manifest import read_manifest
from shards.reader import ShardReader

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
BATCH = 16


def grey_levels(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) normalised back to 0..255, on the CPU."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (images.float().cpu() * std + mean) * 255


def reference(root: Path, batch: Batch) -> torch.Tensor:
    """The batch's images (B, 1, 224, 224) by Pillow and torchvision, grey levels."""
    manifest = read_manifest(root)
    readers = [ShardReader(root, manifest, info) for info in manifest.splits["train"]]
    positions = np.arange(batch.position, batch.position + len(batch))
    boxes, flipped = (
        crop_boxes(0, positions, height=320, width=320, scale=(0.9, 1.0)),
        flips(0, positions, probability=0.5),
    )
    images = []
    for (shard, row), (y, x, h, w), flip in zip(batch.samples.tolist(), boxes.tolist(), flipped, strict=True):
        record = readers[shard].read_table().slice(row, 1).to_pylist()[0]
        jpeg = os.pread(readers[shard].fd, record["size"], record["offset"])
        pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(jpeg))))[None]
        small = transforms.resized_crop(pixels, y, x, h, w, [224, 224], InterpolationMode.BICUBIC, antialias=True)
        images.append(small.flip(-1) if flip else small)
    for reader in readers:
        reader.close()
    return torch.stack(images).float()


@pytest.mark.parametrize("backend", ["dali", "cpu"])
def test_gpu_batches_equal_the_reference(shards_dir: Path, backend: str, record_property) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    config = LoaderConfig(shards=shards_dir, backend=backend, batch_size=BATCH)
    with build_loader(config, World(device="cuda")) as loader:
        batch = next(loader)
        assert batch.images.is_cuda and batch.images.is_contiguous(memory_format=torch.channels_last)
        difference = (grey_levels(batch.images) - reference(shards_dir, batch)).abs()
    record_property("mean", difference.mean().item())
    record_property("within_1", (difference <= 1.01).float().mean().item())
    record_property("largest", difference.max().item())
    assert difference.mean() <= 0.5
    assert (difference <= 2.01).float().mean() >= 0.999


def test_half_precision_is_the_same_image(shards_dir: Path) -> None:
    pytest.importorskip("nvidia.dali")
    images = []
    for dtype in ("float32", "float16"):
        config = LoaderConfig(shards=shards_dir, backend="dali", batch_size=BATCH, dtype=dtype)
        with build_loader(config, World(device="cuda")) as loader:
            images.append(grey_levels(next(loader).images))
    assert (images[0] - images[1]).abs().max() < 0.2


def test_order_digest_is_the_cpus(shards_dir: Path) -> None:
    pytest.importorskip("nvidia.dali")
    digests = []
    for backend, device in (("cpu", "cpu"), ("cpu", "cuda"), ("dali", "cuda")):
        world = World(device=device)
        with build_loader(LoaderConfig(shards=shards_dir, backend=backend, batch_size=BATCH), world) as loader:
            digests.append([digest_batch(next(loader), world) for _ in range(8)])
    assert digests[0] == digests[1] == digests[2]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_step_in_amp_and_channels_last(shards_dir: Path, tmp_path: Path, precision: str) -> None:
    """The real loop, ten steps: finite losses that fall, on the GPU, from channels_last images without a conversion."""
    import json

    from conftest import run_module

    run = tmp_path / "run"
    arguments = [
        "--steps",
        "10",
        "--batch-size",
        "16",
        "--log-every",
        "1",
        "--precision",
        precision,
        "--device",
        "cuda",
    ]
    done = run_module("train.main", "--preset", "tiny", "--shards", shards_dir, "--out", run, *arguments)
    assert done.returncode == 0, done.stderr
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(losses).all() and np.mean(losses[-3:]) < np.mean(losses[:3])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--optim.optimizer", "sgd", "--accumulate", "4", "--ema", "0.9", "--label-smoothing", "0.1"],
        ["--activation-checkpointing", "--no-channels-last"],
    ],
)
def test_a_step_does_not_wait_for_the_device(shards_dir: Path, precision: str, options: list[str]) -> None:
    """torch's own detector raises at any operation inside the step that would synchronise host and GPU."""
    from train.commandline import parse_config
    from train.device import Precision
    from train.model import build_model
    from train.nonfinite import Recorder
    from train.optim import build_average, build_optimizer, update_average
    from train.ranks import Ranks
    from train.state import Learner
    from train.step import build_step

    config = parse_config("x", ["--shards", str(shards_dir), "--out", "x", *options])
    chosen = Precision(name=precision, device=torch.device("cuda"))
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model = build_model(config.model, vocab_size=49408, context=77).to("cuda", memory_format=layout)
    average = build_average(model, config.ema)
    learner = Learner(model=model, optimizer=build_optimizer(model, config.optim), scaler=chosen.scaler(), ema=average)
    step, recorder = build_step(config, learner, chosen, Ranks()), Recorder(Ranks(), scaled=precision == "fp16")
    with build_loader(LoaderConfig(shards=shards_dir, backend="cpu", batch_size=BATCH), World(device="cuda")) as loader:
        step(next(loader), 1e-3)
        batch = next(loader)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            recorder.note(2, step(batch, 1e-3), batch.samples)
            if average is not None:
                update_average(average, model, 0.9, 2)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_an_update_without_a_number_is_left_out(optimizer: str) -> None:
    """By the fused kernels of the GPU, from the very first update on."""
    from train.config import OptimConfig
    from train.optim import build_optimizer, update

    model = torch.nn.Linear(5, 3, device="cuda")
    before = model.weight.detach().clone()
    made = build_optimizer(model, OptimConfig(optimizer=optimizer))
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    for factor in (float("nan"), 1.0):
        (model(torch.ones(2, 5, device="cuda")).square().sum() * factor).backward()
        update(made, scaler, torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        made.zero_grad()
        assert model.weight.equal(before) == (factor != 1.0)
    assert model.weight.isfinite().all()
