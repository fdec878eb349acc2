"""One optimizer step: forward, backward, update. The only place where gradients are made, and free of host syncs.

A large batch may go through the towers in parts, with gradients through cached features (GradCache, Gao et al. 2021). A
contrastive loss is no sum over parts of a batch: every image is scored against every report. So the parts are embedded
without a graph first, the loss is taken over all of them (and over all ranks), and its gradient with regard to the
features is kept; then each part goes forward once more, from the same random state, and backward from there. The sum of
the parts' gradients is the whole batch's. It costs one more forward pass and the memory of one part.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.batch import Batch
from shards.errors import InputError
from train.config import TrainConfig
from train.device import Precision
from train.objective import Contrastive, Forward, Objective, Output, Tensors
from train.optim import set_rates, update
from train.ranks import Ranks
from train.state import Learner


def build_step(config: TrainConfig, learner: Learner, precision: Precision, ranks: Ranks) -> "Step":
    """The step that a config asks for; the learner may be restored from a checkpoint after it."""
    seed = config.seed if config.shuffle_reports else None
    if config.activation_checkpointing:
        learner.model.set_grad_checkpointing()  # type: ignore[operator]
    return Step(
        learner,
        Contrastive(ranks, label_smoothing=config.label_smoothing, shuffle_seed=seed),
        precision,
        ranks,
        clip=config.optim.clip,
        parts=config.accumulate,
        compiled=config.compile,
        channels_last=config.channels_last,
    )


class Step:
    """Trains a learner in place, one batch a call."""

    def __init__(
        self,
        learner: Learner,
        objective: Objective,
        precision: Precision,
        ranks: Ranks,
        *,
        clip: float | None = None,
        parts: int = 1,
        compiled: bool = False,
        channels_last: bool = True,
    ) -> None:
        """`clip`: largest norm of the gradient; None: no limit. `parts`: into which the rank's share of a batch is cut.

        `channels_last`: the layout that the model's weights have; images are brought to it where they are not in it.
        """
        self._model, self._optimizer, self._scaler = learner.model, learner.optimizer, learner.scaler
        self.objective, self._precision, self._parts = objective, precision, parts
        self._clip = math.inf if clip is None else clip
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._wrapped = distribute(learner.model, precision.device, ranks)
        # Compiled apart from what `_wrapped` and the bare model are: the warm-up and validation have other shapes.
        self._compiled = torch.compile(self._wrapped) if compiled else self._wrapped

    def __call__(self, batch: Batch, lr: float, momentum: float | None = None) -> Output:
        """Train on one batch; what comes back is still being computed where the device is a GPU.

        No update is made where loss or gradient is no number: its metric `grad_norm` is none then, on every rank.
        """
        output = self._backward(self._compiled, batch)
        output.metrics["grad_norm"] = norm = self._clip_gradients()
        set_rates(self._optimizer, lr, momentum)
        update(self._optimizer, self._scaler, norm)
        self._optimizer.zero_grad(set_to_none=True)
        self.objective.constrain(self._model)
        return output

    def warm_up(self, batch: Batch) -> None:
        """Forward and backward on a batch that teaches nothing: no weight changes.

        DDP sorts its gradient buckets anew after the first backward, and from three ranks on another bucket means
        another order of summation. Done before the first step of every run, fresh or resumed, both see the same sums.
        """
        device = self._precision.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            self._backward(self._wrapped, batch)
        self._optimizer.zero_grad(set_to_none=True)

    def _backward(self, module: Callable[..., Tensors], batch: Batch) -> Output:
        """Loss of this rank's share, and the gradients of the global batch."""

        def forward(*inputs: torch.Tensor) -> Tensors:
            with self._precision.autocast():
                return module(*inputs)

        def loss(outputs: Tensors) -> Output:
            output = self.objective.loss(outputs, batch)
            self._scaler.scale(poisoned(output.loss)).backward()
            return output

        inputs = tuple(self._laid_out(tensor) for tensor in self.objective.inputs(batch))
        if self._parts == 1:
            return loss(forward(*inputs))
        return backward_in_parts(forward, inputs, self._parts, loss, self._no_sync)

    def _laid_out(self, tensor: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) in the layout of the model's weights; the loaders' are already, but for hdf5's."""
        return tensor.contiguous(memory_format=self._layout) if tensor.ndim == 4 else tensor

    def _no_sync(self) -> contextlib.AbstractContextManager:
        """The context in which no gradients are exchanged."""
        if isinstance(self._wrapped, DistributedDataParallel):
            return self._wrapped.no_sync()
        return contextlib.nullcontext()

    def _clip_gradients(self) -> torch.Tensor:
        """Bound the gradient's norm; returns the norm () before, still on the device."""
        self._scaler.unscale_(self._optimizer)
        return nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)


def nothing_batch(count: int, image_size: int, context: int, labels: int, device: torch.device) -> Batch:
    """`count` black images with empty reports and so many labels, for the warm-up."""
    tokens = torch.zeros(count, context, dtype=torch.int64)
    tokens[:, 0] = 1
    images = torch.zeros(count, 3, image_size, image_size).contiguous(memory_format=torch.channels_last)
    return Batch(
        images=images.to(device),
        tokens=tokens.to(device),
        labels=torch.zeros(count, labels, device=device),
        samples=torch.zeros(count, 2, dtype=torch.int64),
        position=0,
        text_length=1,
    )


def compiled_graphs() -> int:
    """Graphs that torch.compile has made so far in this process; more than a few mean that shapes keep changing."""
    from torch._dynamo.utils import counters  # slow to import, and there without --compile too

    return counters["stats"]["unique_graphs"]


def poisoned(loss: torch.Tensor) -> torch.Tensor:
    """The loss () for the backward pass: itself, or NaN where it is infinite.

    An infinite loss can have finite gradients. With NaN for all of them, what DDP sums up is NaN on every rank, so that
    all ranks leave the update out together and none has to ask the others. Times 1 a finite loss is what it was.
    """
    return loss * (1 + 0 * loss.detach())


def distribute(model: nn.Module, device: torch.device, ranks: Ranks) -> nn.Module:
    """The model under DDP where there are several ranks. Buffers are constants here and are not broadcast."""
    if ranks.size == 1:
        return model
    devices = [device] if device.type == "cuda" else None
    with warnings.catch_warnings():
        # torch 2.14 wants another name for broadcast_buffers, which the older versions that we allow do not have.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)


Loss = Callable[[Tensors], Output]
"""The model's outputs for the whole share of a rank -> its loss, after which their gradients are there."""


def backward_in_parts(
    forward: Forward,
    inputs: Tensors,
    parts: int,
    loss: Loss,
    no_sync: Callable[[], contextlib.AbstractContextManager],
) -> Output:
    """Loss of the whole share of a rank, and its gradients, with the memory of a part.

    `inputs` are (B, ...) each and are cut along B. `no_sync`: the context in which DDP does not exchange gradients,
    which it does with the last part, once.
    """
    device = inputs[0].device
    cut = list(zip(*(tensor.tensor_split(parts) for tensor in inputs), strict=True))
    chances, cached = [], []
    with torch.no_grad():
        for part in cut:
            chances.append(_chance(device))
            cached.append(forward(*part))
    whole = tuple(_join(column).requires_grad_() for column in zip(*cached, strict=True))
    output = loss(whole)
    gradients = zip(*(_gradients(tensor, parts) for tensor in whole), strict=True)
    for number, (part, chance, gradient) in enumerate(zip(cut, chances, gradients, strict=True), start=1):
        torch.set_rng_state(chance[0])
        if chance[1] is not None:
            torch.cuda.set_rng_state(chance[1], device)
        with contextlib.nullcontext() if number == parts else no_sync():
            _backward(forward(*part), gradient)
    return output


def _chance(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The state of the generators that a forward pass may draw from; both live on the host: nothing waits."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def check_parts(batch_size: int, ranks: int, parts: int) -> None:
    """InputError where a rank's share of a batch cannot be cut into parts of one size."""
    share, rest = divmod(batch_size, ranks)
    if not rest and share % parts:  # a batch that the ranks cannot share is the loader's to refuse
        raise InputError(
            f"--accumulate {parts} does not divide the {share} samples that each of {ranks} ranks has of a batch of "
            f"{batch_size}; change either"
        )


def _backward(outputs: Tensors, gradients: Tensors) -> None:
    """Backward from several outputs at once; one that depends on no weight has nothing to say."""
    pairs = [pair for pair in zip(outputs, gradients, strict=True) if pair[0].requires_grad]
    torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])


def _join(column: Sequence[torch.Tensor]) -> torch.Tensor:
    """An output of all parts: rows in order; a value of the model itself, such as the logit scale, once."""
    return column[0].clone() if column[0].ndim == 0 else torch.cat(list(column))


def _gradients(tensor: torch.Tensor, parts: int) -> Sequence[torch.Tensor]:
    """The gradient of each part of an output; that of a value of the model itself goes with the last part."""
    gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
    if tensor.ndim:
        return gradient.tensor_split(parts)
    return [torch.zeros_like(gradient)] * (parts - 1) + [gradient]
