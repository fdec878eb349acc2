"""A large batch in parts, with the loss of the whole: gradients through cached features (GradCache, Gao et al. 2021).

A contrastive loss is no sum over parts of a batch: every image is scored against every report. So the parts are
embedded without a graph first, the loss is taken over all of them (and over all ranks), and its gradient with regard to
the features is kept; then each part goes forward once more, from the same random state, and backward from there. The
sum of the parts' gradients is the whole batch's. It costs one more forward pass and the memory of one part.
"""

import contextlib
from collections.abc import Callable, Sequence

import torch

from shards.errors import InputError
from train.objective import Forward, Output, Tensors

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
