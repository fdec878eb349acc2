"""What a loader hands to the trainer, where it hands it, and the digest that proves which samples it was."""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

DIGEST_MODULUS = 1 << 64


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """Where one rank stands. Passed in by whoever started the processes; nothing in `pipeline` looks it up."""

    rank: int = 0
    """This process, 0 <= rank < size."""
    size: int = 1
    """Processes that share every global batch."""
    device: torch.device | str = "cpu"
    """Where the tensors of a batch have to be."""
    local_size: int | None = None
    """Processes on this machine, which share its CPUs; None: all of them."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} is outside a world of {self.size}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One rank's share of a global batch. Valid until the next `next()` of its loader: the image buffers are reused."""

    images: torch.Tensor
    """(B, 3, H, W) normalised, in the loader's dtype, channels_last (`hdf5`: contiguous), on the device.
    With several views (views * B, 3, H, W): view v of sample i is image v * B + i."""
    tokens: torch.Tensor
    """(B, context) int64 on the device: start token, text, end token, zeros."""
    labels: torch.Tensor
    """(B, labels) float32 on the device: 1 present, 0 absent, -1 uncertain, NaN unknown."""
    samples: torch.Tensor
    """(B, 2) int64 on the CPU: shard number and row in the shard."""
    position: int
    """First position of the *global* batch; sample i of rank r of R stands at position + r + i * R."""
    text_length: int
    """Most tokens any report of this rank's batch has, known without asking the device; 0 in an empty batch."""
    replaced: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 2), dtype=np.int64))
    """(m, 2) shard, row of bad samples that were due here and whose places others of `samples` took; see
    `pipeline.quarantine`."""

    def __len__(self) -> int:
        return len(self.samples)


def make_batch(images: torch.Tensor, records: NDArray[np.void], position: int, device: torch.device) -> Batch:
    """The batch of decoded images, with what belongs to it on the device."""
    tokens, labels = torch.from_numpy(records["tokens"].astype(np.int64)), torch.from_numpy(records["labels"].copy())
    if device.type != "cpu":  # a call that does nothing costs a turn at the interpreter's lock
        # Pinned first: of other memory CUDA may copy more than 64 KB only when all that was launched before is done.
        tokens, labels = (each.pin_memory().to(device, non_blocking=True) for each in (tokens, labels))
    changed = records["row"] != records["planned"]
    return Batch(
        images=images,
        tokens=tokens,
        labels=labels,
        samples=torch.from_numpy(np.stack([records["shard"], records["row"]], axis=1)),
        position=position,
        text_length=int(records["token_count"].max(initial=0)),
        replaced=np.stack([records["shard"], records["planned"]], axis=1)[changed],
    )


def digest_batch(batch: Batch, world: World) -> int:
    """Sum modulo 2^64 of xxh3_64(position, shard, row) over the samples of one rank's batch.

    Each is hashed as three little-endian 64-bit words. Sums of all ranks and batches, modulo 2^64, give the run's
    order digest: it does not depend on the number of ranks or the batch size, only on what was delivered where.
    """
    positions = batch.position + world.rank + world.size * torch.arange(len(batch))
    words = torch.cat([positions[:, None], batch.samples], dim=1).numpy().astype("<i8").tobytes()
    return sum(xxh3_64_intdigest(words[at : at + 24]) for at in range(0, len(words), 24)) % DIGEST_MODULUS
