"""`train.main` with a loss or a gradient that is no number: SHARDCLIP_NONFINITE = KIND:RANK:STEP[:STEP...].

`nan` puts NaN into the third image of the rank's batch, `loss` makes the loss infinite, `gradient` the gradient.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator

import torch

from pipeline.batch import Batch
from train.objective import Contrastive, Output, Tensors

THIRD = 2


@contextlib.contextmanager
def injected(fault: str, batch_size: int, seen: list[tuple[int, int]] | None = None) -> Iterator[None]:
    """Inside, batches of the fault's steps fail so; `seen` is told shard and row of the image spoilt."""
    kind, rank, *steps = fault.split(":")
    positions = {(int(step) - 1) * batch_size for step in steps}
    inputs, loss = Contrastive.inputs, Contrastive.loss

    def due(objective: Contrastive, batch: Batch) -> bool:
        return batch.position in positions and objective._ranks.rank == int(rank)

    def spoilt_inputs(self: Contrastive, batch: Batch) -> Tensors:
        if kind == "nan" and due(self, batch):
            images = batch.images.clone()
            images[THIRD] = float("nan")
            batch = dataclasses.replace(batch, images=images)
            if seen is not None:
                seen.append(tuple(batch.samples[THIRD].tolist()))
        return inputs(self, batch)

    def spoilt_loss(self: Contrastive, outputs: Tensors, batch: Batch) -> Output:
        if kind == "gradient" and due(self, batch):
            outputs[0].register_hook(lambda gradient: gradient * float("inf"))
        output = loss(self, outputs, batch)
        infinite = kind == "loss" and due(self, batch)
        return dataclasses.replace(output, loss=output.loss + float("inf")) if infinite else output

    Contrastive.inputs, Contrastive.loss = spoilt_inputs, spoilt_loss
    try:
        yield
    finally:
        Contrastive.inputs, Contrastive.loss = inputs, loss


if __name__ == "__main__":
    from train.main import main

    torch.set_num_threads(1)
    with injected(os.environ["SHARDCLIP_NONFINITE"], batch_size=8):
        main()
