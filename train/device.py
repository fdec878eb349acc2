"""Where and how the arithmetic runs: device, precision, threads."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pipeline.config import available_cpus
from shards.errors import InputError
from train.ranks import Ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """What the towers compute in; weights and loss stay float32."""

    name: str
    """fp32, bf16 or fp16, resolved."""
    device: torch.device
    """Where."""

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context for a forward pass through the towers."""
        if self.name == "fp32":
            return contextlib.nullcontext()
        dtype = torch.bfloat16 if self.name == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype=dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """Scales the loss for fp16, whose small gradients would vanish; does nothing otherwise."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


@contextlib.contextmanager
def memory_named(advice: str) -> Iterator[None]:
    """Turn what torch says of memory that is not there into an InputError with this advice."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
        reason = " ".join(str(error).split("\n")[0].split())[:160]
        raise InputError(f"out of memory ({reason}); {advice}") from None


def choose_device(name: str, ranks: Ranks) -> torch.device:
    """The rank's device for `auto`, `cpu` or `cuda`. InputError where a GPU is asked for and there is none."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if ranks.local_rank >= count:
        raise InputError(
            f"{ranks.local_size} ranks on this machine need as many GPUs, here are {count}; "
            "start fewer, or add --device cpu"
        )
    torch.cuda.set_device(ranks.local_rank)
    return torch.device("cuda", ranks.local_rank)


def choose_precision(name: str, device: torch.device) -> Precision:
    """The precision for `auto`, `fp32`, `bf16` or `fp16` on a device. InputError for fp16 on a CPU."""
    if name == "auto":  # False: bf16 that a V100 only emulates, slowly, does not count
        name = "fp32" if device.type == "cpu" else "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"
    if name == "fp16" and device.type == "cpu":
        raise InputError("precision fp16 needs a GPU; use --precision fp32 or bf16 here")
    return Precision(name=name, device=device)


def pin_threads(threads: int | None, ranks: Ranks) -> None:
    """Fix the threads of this rank's arithmetic, so that sums run in the same order every time.

    Default: the CPUs of the affinity mask, which a batch system sets, shared by the ranks on this machine.
    """
    torch.set_num_threads(threads or max(1, available_cpus() // ranks.local_size))
