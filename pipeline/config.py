"""Settings of a loader, checked where they are made."""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.effects import EffectsConfig
from shards.errors import InputError

if TYPE_CHECKING:  # settings need no torch
    from pipeline.batch import World

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BACKENDS = ("auto", "cpu", "dali", "hdf5", "hdf5-tuned")
MODES = ("train", "eval")
DTYPES = ("float32", "float16", "bfloat16")
DEFAULT_STREAMS = 48
MOST = {
    "batch_size": 1 << 20,
    "streams": 1 << 20,
    "threads": 1024,
    "memory_mb": 1 << 24,
    "read_threads": 256,
    "ahead": 256,
    "image_size": 8192,
    "views": 64,
}
"""Largest values: beyond them a slip of the finger would allocate, or start, for ever."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """How samples are chosen, read and augmented: what the settings of a loader and those of a training run share."""

    where: str | None = None
    """Use only the samples for which this query holds, in training and validation alike, e.g. "View == 1" (see
    shards/query.py); to select among those for training alone: "split != 'train' or Edema == 1"."""
    exclude: Path | None = None
    """File of keys, one 00-0000000123 a line, of samples to leave out of training and validation; 2:00-0000000123 is of
    the second data set."""
    balance: str | None = None
    """Label whose values, or query whose yes and no, get equal shares of each training epoch; evaluation ignores it."""
    more_shards: tuple[Path, ...] = ()
    """Folders of further data sets to train on, alike in images, tokenizer and labels; evaluation is of --shards."""
    mix: tuple[float, ...] = ()
    """Shares of the sets in every batch, that of --shards first, to half a stream; none: as large as the sets are."""
    streams: int | None = None
    """Streams the order interleaves; none: 48, or the next multiple of the ranks. Part of a run's fingerprint."""
    threads: int | None = None
    """Threads (hdf5: worker processes) that decode on each rank; none: the CPUs this process may use, shared by the
    ranks on this machine."""
    memory_mb: int | None = None
    """MiB for the encoded blocks that each rank holds at once; none: what is left of the streams' blocks, the next of
    each and those being read take; of more than 288, only what one block ahead needs."""
    read_threads: int = 4
    """Threads that read blocks ahead on each rank: requests on the way to the file system at once. They cost next to no
    CPU."""
    ahead: int = 2
    """Batches prepared while the trainer works."""
    own_jpeg: bool = True
    """Backend cpu: decode with the compiled decoder; off: libjpeg-turbo, which is slower, decodes all. Same pixels."""
    max_bad: int = 0
    """Bad training samples (damaged, or not to be decoded) that the run does without: others of their blocks take their
    places (see pipeline/quarantine.py). One more ends it. Evaluation takes none, as it would count another row twice:
    name them in --data.exclude."""
    stage_dir: Path | None = None
    """Folder on each node to which shards are copied, verified, while the run reads them; used as they are complete."""
    stage_gb: float | None = None
    """Most gigabytes of copies of a data set there; none: until a twentieth of that disk is left."""
    stall_abort_s: float = 300
    """Seconds to wait for one block of a shard before giving up; 0: for ever. A line says after 5 s what is waited
    for."""
    image_size: int = 224
    """Height and width the model sees, pixels."""
    scale: tuple[float, float] = (0.9, 1.0)
    """Range of the crop's share of the image's area."""
    flip: float = 0.5
    """Probability of a left-right flip."""
    flip_guard: bool = False
    """Leave unflipped the images whose report names a side."""
    effects: EffectsConfig = field(default_factory=EffectsConfig)
    """Rotation, brightness, contrast and blur of training images; off in every preset."""
    mean: tuple[float, float, float] = CLIP_MEAN
    """Subtracted from each channel; of 1, not of 255."""
    std: tuple[float, float, float] = CLIP_STD
    """Divides each channel; of 1, not of 255."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderConfig(DataConfig):
    """What to load, in which order, how augmented, and by which backend."""

    shards: Path
    """Folder of the data set (holds manifest.json)."""
    split: str = "train"
    """train, val or test."""
    mode: str = "train"
    """train: shuffled, augmented, without end. eval: every row once in row order, not augmented."""
    backend: str = "auto"
    """cpu, dali, hdf5, hdf5-tuned; auto: dali where the device is a GPU, else cpu."""
    batch_size: int = 64
    """Samples in the global batch, over all ranks."""
    seed: int = 0
    """Seed of order and augmentation."""
    views: int = 1
    """Images made of each training sample, cropped, flipped and changed each in its own way."""
    dtype: str = "float32"
    """float32, float16 or bfloat16."""
    h5: Path | None = None
    """The HDF5 file the shards were made from; the hdf5 backends alone read it."""
    h5_dataset: str = "cxr"
    """Path of the dataset in that file."""

    def __post_init__(self) -> None:
        _one_of("backend", self.backend, BACKENDS)
        _one_of("mode", self.mode, MODES)
        _one_of("dtype", self.dtype, DTYPES)
        for name, most in MOST.items():
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise InputError(f"{name} is {value}; it has to be at least 1 and at most {most:,}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise InputError(f"crop scale {self.scale} is not a range within (0, 1]")
        if not 0 <= self.flip <= 1 or not all(0 < value < math.inf for value in self.std):
            raise InputError(f"flip {self.flip} has to lie in [0, 1] and std {self.std} above 0")
        if not all(map(math.isfinite, self.mean)):
            raise InputError(f"mean {self.mean} has to be of finite numbers")
        if not (0 <= self.stall_abort_s < math.inf and self.max_bad >= 0):
            raise InputError(f"stall_abort_s {self.stall_abort_s} and max_bad {self.max_bad} have to be at least 0")
        if self.stage_gb is not None and not 0 < self.stage_gb < math.inf:
            raise InputError(f"stage_gb {self.stage_gb} has to be a number above 0")
        if self.backend.startswith("hdf5") and self.max_bad:
            raise InputError(f"max_bad {self.max_bad}: backend {self.backend} reads no shards and replaces nothing")
        _check_mixture(self)
        if self.backend.startswith("hdf5") and self.h5 is None:
            raise InputError(f"backend {self.backend} reads the HDF5 file itself; give its path with --h5")

    @property
    def images_a_sample(self) -> int:
        """Views made of each sample; an evaluation has one."""
        return self.views if self.mode == "train" else 1

    @property
    def changes_films(self) -> bool:
        """Whether films go through `pipeline.effects`."""
        return self.mode == "train" and bool(self.effects)


def _one_of(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise InputError(f"unknown {name} {value!r}; valid: {', '.join(valid)}")


def _check_mixture(config: LoaderConfig) -> None:
    if not config.more_shards and not config.mix:
        return
    if config.mix and len(config.mix) != 1 + len(config.more_shards):
        raise InputError(f"mix has {len(config.mix)} shares for {1 + len(config.more_shards)} data sets")
    if not all(0 < share < math.inf for share in config.mix):
        raise InputError(f"mix {config.mix} has to be of numbers above 0")
    if config.backend.startswith("hdf5"):
        raise InputError(f"backend {config.backend} reads one HDF5 file; more_shards needs cpu or dali")


def available_cpus() -> int:
    """CPUs this process may run on: its affinity mask, which a batch system sets, not the machine's count."""
    return len(os.sched_getaffinity(0))


def thread_count(config: LoaderConfig, world: "World") -> int:
    """Threads (or worker processes) for decoding on this rank, at least 1."""
    return config.threads or max(1, available_cpus() // (world.local_size or world.size))


def stream_count(config: LoaderConfig, world: "World") -> int:
    """Streams of the training order. InputError, with the arithmetic, where batch, ranks and streams do not fit."""
    ranks = world.size
    streams = config.streams or -(-DEFAULT_STREAMS // ranks) * ranks
    _divisible(f"batch size {config.batch_size}", config.batch_size, ranks)
    _divisible(f"{streams} streams", streams, ranks)
    return streams


def _divisible(what: str, value: int, ranks: int) -> None:
    whole, rest = divmod(value, ranks)
    if rest:
        choices = f"{whole * ranks} or {(whole + 1) * ranks}" if whole else f"{ranks}"
        raise InputError(
            f"{what} cannot be shared by {ranks} ranks: {value} = {whole} x {ranks} + {rest}; use {choices}"
        )
