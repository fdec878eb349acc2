"""One step: its gradients in parts and on ranks against plain ones, its layout, its shapes, and that it never waits."""

import dataclasses
import functools
import multiprocessing
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from test_train_objective import reports
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.batch import Batch
from train import objective
from train.config import OptimConfig, TrainConfig
from train.device import Precision, choose_precision
from train.model import ModelConfig, build_model
from train.objective import Contrastive
from train.optim import MAX_LOGIT_SCALE, build_average, build_optimizer, update_average
from train.ranks import Ranks
from train.state import Learner, Progress, capture, restore
from train.step import Step, compiled_graphs, nothing_batch

CPU = Precision(name="fp32", device=torch.device("cpu"))
LENGTHS = [5, 40, 9, 17, 33, 7, 12, 70, 21, 8, 16, 3, 15, 30, 6, 11]
Gradients = dict[str, torch.Tensor]


def small_model() -> nn.Module:
    """The tiny model with few channels, always the same."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(widths=(16, 16, 16, 16)), vocab_size=49408, context=77)
    return model.to(memory_format=torch.channels_last)


def share(rank: int = 0, size: int = 1, lengths: list[int] = LENGTHS) -> Batch:
    """A rank's share of one global batch: sample i of rank r is sample r + i R."""
    count, generator = len(lengths), torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 64, 64, generator=generator)[rank::size]
    tokens = reports(lengths)[rank::size]
    return Batch(
        images=images.contiguous(memory_format=torch.channels_last),
        tokens=tokens,
        labels=torch.zeros(len(tokens), 0),
        samples=torch.zeros(len(tokens), 2, dtype=torch.int64),
        position=0,
        text_length=int(tokens.argmax(dim=1).max()) + 1,
    )


def make_step(
    model: nn.Module,
    optim: OptimConfig | None = None,
    ranks: Ranks | None = None,
    scaler: torch.amp.GradScaler | None = None,
    **more,
) -> Step:
    """A step that trains a model on the CPU."""
    optimizer, ranks = build_optimizer(model, optim or OptimConfig()), ranks or Ranks()
    learner = Learner(model=model, optimizer=optimizer, scaler=scaler or CPU.scaler())
    return Step(learner, Contrastive(ranks, label_smoothing=0.1), CPU, ranks, **more)


def spy(step: Step, model: nn.Module) -> Gradients:
    """Filled with the gradients that the optimizer is given in the next step."""
    seen: Gradients = {}

    def look(*_: object) -> None:
        seen.update({name: weight.grad.clone() for name, weight in model.named_parameters()})

    step._optimizer.register_step_pre_hook(look)
    return seen


def gradients(
    ranks: Ranks,
    parts: int,
    model: nn.Module | None = None,
    lengths: list[int] = LENGTHS,
    reduced: list[int] | None = None,
) -> tuple[float, Gradients]:
    """The global loss and the gradients that the optimizer is given in one step after the warm-up.

    `reduced` gets the number of each bucket of gradients that DDP sums over the ranks in it.
    """
    model = model or small_model()
    step = make_step(model, ranks=ranks, parts=parts)
    if reduced is not None:
        step._wrapped.register_comm_hook(reduced, note_and_reduce)
    step.warm_up(nothing_batch(2 * parts, 64, 77, 0, CPU.device))
    (reduced or []).clear()
    seen = spy(step, model)
    output = step(share(ranks.rank, ranks.size, lengths), 1e-3)
    return ranks.sums([output.loss.item()])[0] / ranks.size, seen


def note_and_reduce(buckets: list[int], bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """What DDP does by itself, noted."""
    buckets.append(bucket.index())
    return allreduce_hook(None, bucket)


def assert_alike(found: Gradients, expected: Gradients) -> None:
    """Equal to 1e-5 of each tensor's largest entry."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * gradient.abs().max().item(), msg=name)


@pytest.fixture(scope="module")
def plain() -> tuple[float, Gradients]:
    """Loss and gradients of the whole batch at once, in one process."""
    return gradients(Ranks(), 1)


@pytest.mark.parametrize("parts", [2, 4, 16])
def test_parts_have_the_gradients_of_the_whole(plain: tuple[float, Gradients], parts: int) -> None:
    loss, found = gradients(Ranks(), parts)
    assert loss == pytest.approx(plain[0], rel=1e-5)
    assert_alike(found, plain[1])


@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler("cpu", init_scale=1024.0)])
def test_gradients_are_clipped_as_a_whole(plain: tuple[float, Gradients], scaler: torch.amp.GradScaler | None) -> None:
    """To a quarter of their norm, which is told as it was; a scaler has nothing to say in it."""
    norm = torch.stack([gradient.norm() for gradient in plain[1].values()]).norm().item()
    model = small_model()
    step = make_step(model, scaler=scaler, clip=norm / 4)
    found = spy(step, model)
    assert step(share(), 1e-3).metrics["grad_norm"].item() == pytest.approx(norm, rel=1e-4)
    assert_alike(found, {name: gradient / 4 for name, gradient in plain[1].items()})


def on_two_ranks(rank: int, store: Path, results: multiprocessing.SimpleQueue) -> None:
    """One of two gloo processes: its gradients, whole and in parts."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    ranks = Ranks(rank=rank, size=2, local_rank=rank, local_size=2)
    told = []
    for parts in (1, 4):
        reduced: list[int] = []
        loss, found = gradients(ranks, parts, reduced=reduced)
        told.append((loss, {name: each.numpy() for name, each in found.items()}, reduced))
    results.put(told)
    dist.destroy_process_group()


def test_two_ranks_have_the_gradients_of_one(plain: tuple[float, Gradients], tmp_path: Path) -> None:
    """Compared before any update, whole and in 4 parts each: later, AdamW would make rounding grow."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    processes = [context.Process(target=on_two_ranks, args=(rank, tmp_path / "store", results)) for rank in (0, 1)]
    for process in processes:
        process.start()
    both = [results.get() for _ in processes]
    for process in processes:
        process.join(600)
    for loss, found, reduced in (each for told in both for each in told):
        assert reduced == list(range(len(reduced))) and reduced, "gradients are summed once, in parts too"
        assert loss == pytest.approx(plain[0], rel=1e-5)
        assert_alike({name: torch.from_numpy(each) for name, each in found.items()}, plain[1])


def test_parts_draw_the_same_chances_again() -> None:
    """With dropout: the gradients of parts that went forward once each, from the same seed, under one graph."""

    def forgetful() -> nn.Module:
        model = small_model()
        model.image = nn.Sequential(model.image, nn.Dropout(0.5))
        return model

    model, batch = forgetful(), share()
    torch.manual_seed(7)
    cut = zip(batch.images.tensor_split(4), batch.tokens.tensor_split(4), strict=True)
    images, texts, scales = zip(*(model(*part) for part in cut), strict=True)
    loss = Contrastive(Ranks(), label_smoothing=0.1).loss
    loss((torch.cat(images), torch.cat(texts), scales[0]), batch).loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
    expected = {name: weight.grad for name, weight in model.named_parameters()}

    again = forgetful()
    step = make_step(again, parts=4)
    seen = spy(step, again)
    torch.manual_seed(7)
    step(batch, 0.0)
    assert_alike(seen, expected)


def test_an_update_leaves_the_temperature_in_its_bounds() -> None:
    """Whichever way AdamW's first update goes, it is as long as the learning rate: far beyond one end or the other."""
    model = small_model()
    make_step(model)(share(), 100.0)
    assert model.logit_scale.item() in (0.0, pytest.approx(MAX_LOGIT_SCALE))


def test_activation_checkpointing_changes_no_gradient(plain: tuple[float, Gradients]) -> None:
    model = small_model()
    model.set_grad_checkpointing()
    loss, found = gradients(Ranks(), 1, model)
    assert loss == plain[0]
    assert_alike(found, plain[1])


class _NoWaiting(TorchDispatchMode):
    """Raises at operations that, on a GPU, would have the host wait for the device."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_dim")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.removeprefix("aten::") in self.WAITING:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("optim", "more"),
    [
        (OptimConfig(), {}),
        (OptimConfig(optimizer="sgd"), {"clip": 1.0, "parts": 4}),
    ],
)
def test_a_step_never_waits_for_the_device(optim: OptimConfig, more: dict) -> None:
    model = small_model()
    step, average = make_step(model, optim, **more), build_average(model, 0.9)
    batch = share()
    step(batch, 1e-3)
    with _NoWaiting():
        step(batch, 1e-3)
        update_average(average, model, 0.9, 2)
    with pytest.raises(AssertionError, match="waits"), _NoWaiting():
        step(batch, 1e-3).loss.item()


class _Layouts(TorchDispatchMode):
    """Notes copies of 4-D activations that change their layout, and convolutions that meet two layouts."""

    def __init__(self) -> None:
        super().__init__()
        self.changed: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        tensors = [each for each in (*args, out) if isinstance(each, torch.Tensor) and _has_layout(each)]
        if name in ("clone", "_to_copy", "copy_", "contiguous", "convolution", "convolution_backward"):
            # By strides: behind a class token, the gradient is a part of a longer sequence, and still channels_last.
            if len({each.stride(1) == 1 for each in tensors}) > 1:
                self.changed.append(f"{name} {[tuple(each.shape) for each in tensors]}")
        return out


def conversions(model: nn.Module, images: torch.Tensor) -> list[str]:
    """Layout conversions in a step on images (B, 3, H, W), its backward pass included."""
    step, batch = make_step(model), dataclasses.replace(share(lengths=LENGTHS[: len(images)]), images=images)
    with _Layouts() as seen:
        step(batch, 1e-3)
    return seen.changed


def test_nothing_leaves_channels_last() -> None:
    """But for the tiny tower's read-out, which lines its last grid of 7 x 7 up as its weights have it."""
    images = torch.randn(4, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    assert conversions(small_model(), images) == ["clone [(4, 16, 7, 7), (4, 16, 7, 7)]"]
    contiguous = small_model().to(memory_format=torch.contiguous_format)
    assert len(conversions(contiguous, images)) > 10  # the detector detects


@pytest.mark.parametrize("tower", ["clip-vit", "vit_small_patch16_dinov3", "vit_small_patch14_dinov2"])
def test_the_presets_towers_convert_nothing(tower: str) -> None:
    """The kinds of tower that the presets have, small ones: patches come out of the convolution as tokens lie."""
    sizes = {"vit_small_patch14_dinov2": 56}
    size, width = sizes.get(tower, 64), 64 if tower == "clip-vit" else 384
    config = ModelConfig(tower=tower, embed_dim=width, image_layers=2, image_width=64, image_heads=2)
    model = build_model(config, vocab_size=49408, context=77, image_size=size).to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    assert conversions(model, images) == []


def test_images_come_to_the_layout_of_the_weights_once() -> None:
    """As the hdf5 backends deliver them."""
    assert len(conversions(small_model(), torch.randn(4, 3, 224, 224))) == 2


def test_text_lengths_compile_a_few_graphs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """All five lengths that texts are cut to, twice each, in parts too; the same losses as without."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    model, plainly = small_model(), small_model()
    step, eager = make_step(model, compiled=True), make_step(plainly)
    step.warm_up(nothing_batch(2, 64, 77, 0, CPU.device))
    before, losses = compiled_graphs(), []
    for longest in (20, 40, 9, 60, 77, 77, 9, 20, 60, 40):
        batch = share(lengths=[3, 4, longest, 5])
        losses.append((step(batch, 1e-3).loss.item(), eager(batch, 1e-3).loss.item()))
    assert 1 <= compiled_graphs() - before <= 3
    assert [one for one, _ in losses] == pytest.approx([other for _, other in losses], rel=1e-4)


def test_cutting_texts_changes_no_gradient(plain: tuple[float, Gradients], monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of texts cut to 70 -> 77 would show nothing: the longest here has 40 of 77 tokens."""
    lengths = [min(length, 40) for length in LENGTHS]
    found = []
    for parts in (1, 4):
        for cut in (True, False):
            with monkeypatch.context() as patched:
                if not cut:
                    patched.setattr(objective, "cut_tokens", lambda tokens, _: tokens)
                found.append(gradients(Ranks(), parts, lengths=lengths))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        assert_alike(gradient, found[0][1])
    assert found[0][0] != pytest.approx(plain[0], rel=1e-3)


def _has_layout(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a layout to lose: of one channel or one pixel, both layouts are the same."""
    return tensor.ndim == 4 and tensor.shape[1] > 1 and tensor.shape[2:].numel() > 1


@pytest.mark.parametrize(("major", "name"), [(7, "fp16"), (9, "bf16")])
def test_a_gpu_that_only_emulates_bf16_gets_fp16(monkeypatch: pytest.MonkeyPatch, major: int, name: str) -> None:
    """A V100 takes bf16 tensors, and is slower with them than in fp32."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=major))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True)
    assert choose_precision("auto", torch.device("cuda")).name == name


def test_a_scaler_goes_on_where_it_stood() -> None:
    """fp16 on the CPU: it halves its scale while gradients overflow, and no weight changes; it doubles it later. The
    same if put away in the middle; one that --force has turned on begins afresh."""
    fp16, config, parts = Precision(name="fp16", device=torch.device("cpu")), TrainConfig(shards=Path(), out=Path()), 2
    batch = share(lengths=LENGTHS[:4])

    def begin(payload: dict | None) -> tuple[Learner, Step]:
        model = small_model()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2)
        learner = Learner(model=model, optimizer=build_optimizer(model, OptimConfig()), scaler=scaler)
        step = Step(learner, Contrastive(Ranks()), fp16, Ranks(), clip=1.0, parts=parts)
        step.warm_up(nothing_batch(2 * parts, 64, 77, 0, fp16.device))
        if payload is not None:
            restore(payload, learner, Ranks())
        return learner, step

    def go(learner: Learner, step: Step, count: int) -> list[tuple[str, float]]:
        said = [(step(batch, 1e-3).loss.item(), learner.scaler.get_scale()) for _ in range(count)]
        return [(f"{loss:.6f}", scale) for loss, scale in said]

    learner, step = begin(None)
    said = go(learner, step, 7)
    payload = capture(config, {}, Progress(step=7), learner, [], Ranks())
    said += go(learner, step, 9)
    losses, scales = zip(*said, strict=True)
    first = next(n for n in range(1, 16) if scales[n] >= scales[n - 1])  # the first update that was made
    assert first > 2 and set(losses[: first + 1]) == {losses[0]} and losses[first + 1] != losses[0]
    assert any(after > before for before, after in pairwise(scales))
    assert said[:7] + go(*begin(payload), 9) == said
    learner, _ = begin({**payload, "scaler": {}})
    assert learner.scaler.get_scale() == 2.0**20
