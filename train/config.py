"""Settings of a run, checked where they are made. What people type often stands at the top, the rest nests."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipeline.config import DataConfig, LoaderConfig
from shards.errors import InputError
from train.architecture import ModelConfig
from train.tracking import WatchConfig

MAX_THREADS = 1024
"""More than the largest machines have CPUs. torch that is given more than the system allows ends by a signal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """The optimizer and its learning rate over the steps."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with momentum; in one fused kernel each."""
    lr: float = 5e-4
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine", "one-cycle", "plateau"] = "cosine"
    """After the warm-up: stay at the peak; fall to zero by the last step along a line or half a cosine; plateau: fall
    by a factor when validation no longer improves. one-cycle: rise from 1/25 of the peak and fall, along cosines;
    momentum (AdamW's first beta) goes from 0.95 to 0.85 and back, whatever is set here, as with torch's OneCycleLR."""
    warmup: int = 50
    """Steps of rise to the peak: linear from zero, but for one-cycle."""
    plateau_factor: float = 0.5
    """What a plateau multiplies the learning rate by."""
    plateau_patience: int = 2
    """Validations in a row without a lower loss that a plateau bears; one more lowers the learning rate."""
    momentum: float = 0.9
    """SGD's momentum."""
    nesterov: bool = False
    """Nesterov's variant of it."""
    weight_decay: float = 0.1
    """Decay of weights with two dimensions or more; biases, norms and the logit scale have none. AdamW's is decoupled,
    SGD's is added to the gradient."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of AdamW's two moments."""
    eps: float = 1e-6
    """Added to AdamW's denominator."""
    clip: float | None = 1.0
    """Largest norm of the gradient of all parameters together; longer ones are scaled down to it. None: no limit."""

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"--optim.{name} {value} is not a number above 0")
        for name in ("warmup", "plateau_patience"):
            if getattr(self, name) < 0:
                raise InputError(f"--optim.{name.replace('_', '-')} {getattr(self, name)} is below 0")
        if not 0 < self.plateau_factor < 1:
            raise InputError(f"--optim.plateau-factor {self.plateau_factor} does not lie between 0 and 1")
        if not 0 <= self.weight_decay < math.inf:
            raise InputError(f"--optim.weight-decay {self.weight_decay} is not a number of at least 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"--optim.betas {self.betas[0]} {self.betas[1]} do not both lie in [0, 1)")
        if not 0 <= self.momentum < 1:
            raise InputError(f"--optim.momentum {self.momentum} does not lie in [0, 1)")
        if self.nesterov and not self.momentum:
            raise InputError(f"--optim.nesterov needs momentum; --optim.momentum is {self.momentum}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Train an image-text model on shards.

    --preset NAME or --config FILE (RUN/config.json of an earlier run) gives all values; other flags change single ones.
    --loader-config FILE (from python -m bench.loader --tune) sets how films are read and decoded on this machine.
    """

    shards: Path
    """Folder of the data set (holds manifest.json)."""
    out: Path
    """Folder of the run: checkpoints, metrics, curves."""
    h5: Path | None = None
    """The HDF5 file the shards were made from; the hdf5 backends alone read it."""
    dataset: str = "cxr"
    """Path of the dataset in it."""
    preset: str = "tiny"
    """Named set of values for everything else; read before the other flags, which change single values of it."""
    steps: int = 500
    """Optimizer steps in the whole run."""
    batch_size: int = 64
    """Samples in a global batch, over all ranks."""
    backend: Literal["auto", "cpu", "dali", "hdf5", "hdf5-tuned"] = "auto"
    """Loader; auto: dali where the device is a GPU, else cpu."""
    seed: int = 0
    """Seed of weights, order and augmentation."""
    resume: Literal["never", "auto"] = "never"
    """auto: go on from the newest good checkpoint of the run, or start where there is none."""
    stop_at: int | None = None
    """Save and end after this step as a preemption would: exit code 0 and a file `requeue` in the run's folder."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl."""
    validate_every: int = 100
    """Steps between validations on the val split; 0: never."""
    save_every: int = 100
    """Steps between checkpoints."""
    keep: int = 2
    """Newest good checkpoints to keep; the best is kept besides."""
    save_retries: int = 3
    """Saves in a row that may fail, on a full disk say, before the run ends; training goes on meanwhile."""
    rank_timeout_s: float = 25
    """Seconds without a sign of life from a rank after which the others end the run; 0: never. Not a bound on a step, a
    validation or a save: a thread of each rank gives the sign."""
    force: bool = False
    """Go on from a checkpoint that was made with other settings, data or versions; what differs is said and noted."""
    patience: int | None = None
    """Validations in a row without a lower loss after which the run ends; none: it goes on to --steps."""
    min_delta: float = 0.0
    """By how much a loss has to be lower to count, for --patience and for the plateau schedule."""
    accumulate: int = 1
    """Parts into which each rank's share of a batch is cut to save memory. The loss is still that of the whole batch:
    it costs one more forward pass."""
    label_smoothing: float = 0.0
    """Share of the contrastive target that is spread over all pairs of the batch."""
    ema: float | None = None
    """Decay of a moving average of the weights, which is validated and saved beside them; none: no average."""
    activation_checkpointing: bool = False
    """Compute the towers' activations again in the backward pass instead of keeping them: less memory, more time."""
    compile: bool = False
    """Compile the training pass with torch.compile."""
    channels_last: bool = True
    """Keep images and convolutions in the layout that GPUs and CPUs convolve fastest."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """Where a loss or a gradient is no number: end the run, or count it and go on. Its update is made in neither."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on a GPU that has it, else fp16 with a scaler; fp32 on a CPU."""
    threads: int | None = None
    """Threads of a rank's arithmetic; none: the CPUs this process may use, shared by the ranks on this machine."""
    vision_weights: str = "none"
    """What the image tower starts with: none (chance), hub:ORG/REPO/FILE (from the Hugging Face cache, never the
    network; see `python -m train.weights`), or a path: safetensors, a torch or TorchScript archive, a checkpoint of a
    run, a folder that holds one of them."""
    text_weights: str = "none"
    """The same of the text tower. A file of both towers may stand at both."""
    shuffle_reports: bool = False
    """A control, not a way to train: reports change places within the batch, so that nothing can be learnt."""
    data: DataConfig = field(default_factory=DataConfig)
    """Reading and augmentation."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The two towers."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and learning rate."""
    watch: WatchConfig = field(default_factory=WatchConfig)
    """What is shown and recorded besides metrics.jsonl."""

    def __post_init__(self) -> None:
        for name in (
            *("steps", "batch_size", "accumulate", "log_every", "save_every"),
            *("keep", "patience", "stop_at", "threads"),
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; it has to be at least 1")
        if self.threads is not None and self.threads > MAX_THREADS:
            raise InputError(f"threads is {self.threads}; it has to be at most {MAX_THREADS:,}")
        if not -(2**63) <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}; it has to fit 64 bits")
        for name in ("validate_every", "save_retries", "rank_timeout_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; it has to be at least 0")
        _check_shares(self)


def _check_shares(config: TrainConfig) -> None:
    """InputError for a share or a decay outside its range, or for what needs validations where there are none."""
    if not 0 <= config.label_smoothing < 1:
        raise InputError(f"label_smoothing is {config.label_smoothing}; it has to lie in [0, 1)")
    if config.ema is not None and not 0 < config.ema < 1:
        raise InputError(f"ema is {config.ema}; it has to lie between 0 and 1, as 0.9999 does")
    if not 0 <= config.min_delta < math.inf:
        raise InputError(f"min_delta is {config.min_delta}; it has to be a number of at least 0")
    if not config.validate_every and (config.patience is not None or config.optim.schedule == "plateau"):
        name = "--patience" if config.patience is not None else "--optim.schedule plateau"
        raise InputError(f"{name} goes by the validation loss, and --validate-every is 0; validate now and then")


def loader_config(config: TrainConfig, *, split: str, mode: str) -> LoaderConfig:
    """The loader's settings for training or for embedding a split."""
    data = {name: getattr(config.data, name) for name in DataConfig.__slots__}
    if mode == "eval":
        data["max_bad"] = 0
    return LoaderConfig(
        shards=config.shards,
        split=split,
        mode=mode,
        backend=config.backend,
        batch_size=config.batch_size,
        seed=config.seed,
        h5=config.h5,
        h5_dataset=config.dataset,
        **data,
    )
