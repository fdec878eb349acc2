"""The one door: `build_loader(config, world)` gives batches, whatever the backend.

    manifest -> order -> block reader -> encoded batches -> backend -> Batch

A loader's whole state is one integer, `position`: build it with `position=p` and it goes on from there, without replay.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from pipeline.balance import BalancedOrder, read_classes
from pipeline.batch import Batch, World
from pipeline.blocks import BlockReader
from pipeline.buffers import memory_for
from pipeline.config import LoaderConfig, stream_count
from pipeline.encoded import EncodedBatches
from pipeline.handles import OpenShards, ShardSet
from pipeline.mixture import MixedOrder, check_alike, check_distinct, deal_streams, set_seed
from pipeline.order import Order, RowOrder, ShuffledOrder
from pipeline.quarantine import Quarantine, ShardNames
from pipeline.selection import Layout, Selection, select_rows
from pipeline.stage import Stage
from pipeline.visits import VisitLoader
from shards.errors import InputError
from shards.manifest import read_manifest
from shards.schema import Manifest


class Backend(Protocol):
    """What decodes. `next` ends the batch before it and raises StopIteration after the last."""

    def next(self) -> Batch:
        """The next batch."""
        ...

    def close(self) -> None:
        """Stop threads and processes."""
        ...


class Loader(Iterator[Batch]):
    """Batches of one rank, from a position on."""

    def __init__(
        self,
        config: LoaderConfig,
        samples: int,
        streams: int,
        position: int,
        backend: Backend,
        reader: BlockReader | None = None,
    ) -> None:
        self.config = config
        self.samples = samples
        """Rows in the split, of those selected."""
        self.streams = streams
        """Streams of the training order."""
        self.position = position
        """Where the next batch starts: the loader's whole state."""
        self._backend, self._reader = backend, reader
        self._batches = self._images = 0
        self._wait_s = 0.0
        self._closed, self._process = False, os.getpid()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._closed or os.getpid() != self._process:
            where = "was closed" if self._closed else "belongs to the process that built it, and so do its threads"
            raise InputError(f"this loader {where}; build another one")
        begin = time.perf_counter()
        batch = self._backend.next()
        self._wait_s += time.perf_counter() - begin
        if self._reader is not None:
            self._reader.loader.quarantine.count(batch.replaced)
        self._batches += 1
        self._images += len(batch)
        self.position = batch.position + self.config.batch_size
        return batch

    def bad_samples(self) -> list[dict[str, Any]]:
        """The bad samples whose places others took so far; give them to `build_loader` to go on from `position`."""
        return [] if self._reader is None else self._reader.loader.quarantine.listed()

    def stats(self) -> dict[str, float]:
        """Counts so far: batches, images, seconds the trainer waited here; blocks and bytes read, bytes of memory
        that buffers took and that hold films now, reads retried, bad samples replaced, shards that are on this node."""
        stats: dict[str, float] = {"batches": self._batches, "images": self._images, "wait_s": self._wait_s}
        if self._reader is not None:
            shards = self._reader.loader.shards
            read = shards.stats
            stats |= {"blocks": read.blocks, "bytes": read.bytes, "retries": read.retries}
            stats |= {"buffer_bytes": self._reader.buffer_bytes, "held_bytes": self._reader.held_bytes}
            stats["bad_samples"] = len(self.bad_samples())
            stats["staged"] = shards.staged
        return stats

    def close(self) -> None:
        """Stop everything and close all files. The last batch is no longer valid."""
        if self._closed:
            return
        self._closed = True
        if self._reader is not None:
            self._reader.stop()
        self._backend.close()
        if self._reader is not None:
            self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def build_loader(
    config: LoaderConfig, world: World, *, position: int = 0, bad_samples: Sequence[dict[str, Any]] = ()
) -> Loader:
    """A loader that starts at a position (a multiple of the batch size). InputError for what cannot work.

    `bad_samples` are those of an earlier loader, on all its ranks: they stay replaced, whatever became of the files.
    """
    streams = stream_count(config, world)
    if position < 0 or position % config.batch_size:
        raise InputError(f"position {position} is not a multiple of the batch size {config.batch_size}")
    more = config.more_shards if config.mode == "train" else ()
    manifests = [read_manifest(Path(root)) for root in (config.shards, *more)]
    if not position:  # a run that began so before it was refused goes on
        check_distinct([str(root) for root in (config.shards, *more)], manifests)
    manifest = manifests[0]
    order = make_order(config, manifests, streams)
    name = resolve_backend(config, world)
    if name.startswith("hdf5"):
        from pipeline.hdf5 import Hdf5Backend

        baseline = Hdf5Backend(config, manifest, world, order, position, tuned=name == "hdf5-tuned")
        return Loader(config, order.samples, streams, position, baseline)
    reader = _make_reader(config, manifests, order, world, position, bad_samples)
    try:
        batches = EncodedBatches(config, manifest, world, reader, position, order.samples)
        backend = _make_backend(name, config, manifest, world, batches)
    except BaseException:
        reader.close()
        raise
    return Loader(config, order.samples, streams, position, backend, reader)


def make_order(config: LoaderConfig, manifests: Sequence[Manifest], streams: int) -> Order:
    """The order over all sets, in training by the mix or by their sizes. InputError where they do not go together, the
    split is absent, or too little of it is selected."""
    for root, manifest in zip(config.more_shards, manifests[1:], strict=False):
        check_alike(manifests[0], manifest, str(root))
    roots = (Path(root) for root in (config.shards, *config.more_shards))
    sets = [(replace(config, shards=root), manifest) for root, manifest in zip(roots, manifests, strict=False)]
    layouts = [make_layout(*each, number) for number, each in enumerate(sets)]
    if config.mode == "eval":
        return RowOrder(layouts[0])
    owner = deal_streams(config.mix or [layout.samples for layout in layouts], streams)
    orders = [
        _make_set_order(*each, layout, set_seed(config.seed, number), int((owner == number).sum()))
        for number, (each, layout) in enumerate(zip(sets, layouts, strict=True))
    ]
    return MixedOrder(orders, owner)


def _make_set_order(config: LoaderConfig, manifest: Manifest, layout: Layout, seed: int, streams: int) -> ShuffledOrder:
    if config.balance is None:
        return ShuffledOrder(layout, seed=seed, streams=streams)
    classes = read_classes(config.shards, manifest, config.split, config.balance)
    return BalancedOrder(layout, classes, seed=seed, streams=streams)


def make_layout(config: LoaderConfig, manifest: Manifest, number: int = 0) -> Layout:
    """Where the rows lie that the config selects. InputError where there are none, or fewer than a training batch."""
    shards = manifest.splits.get(config.split)
    if not shards:
        present = ", ".join(manifest.splits) or "none"
        raise InputError(f"{config.shards} has no split {config.split!r}; it has: {present}")
    sets = 1 + len(config.more_shards)
    selection = Selection(where=config.where, exclude=config.exclude, number=number, sets=sets)
    selected = select_rows(Path(config.shards), manifest, config.split, selection)
    layout = Layout(tuple(shard.rows for shard in shards), manifest.block_rows, selected)
    least = config.batch_size if config.mode == "train" and selection else 1
    if layout.samples < least:
        wanted = f"; a training batch takes {least:,}" if least > 1 else ""
        raise InputError(
            f"{selection} leaves {layout.samples:,} of the {manifest.rows(config.split):,} samples of split "
            f"{config.split!r}{wanted}; widen the selection" + (" or lower the batch size" if layout.samples else "")
        )
    return layout


def resolve_backend(config: LoaderConfig, world: World) -> str:
    """The backend's name, `auto` decided: dali where the device is a GPU, else cpu."""
    if config.backend != "auto":
        return config.backend
    return "dali" if torch.device(world.device).type == "cuda" else "cpu"


def _make_reader(
    config: LoaderConfig, manifests: Sequence[Manifest], order: Order, world: World, position: int, bad: Sequence[Any]
) -> BlockReader:
    """A reader of the rank's visits."""
    if (channels := manifests[0].image.channels) != 1:
        raise InputError(f"{config.shards} holds images of {channels} channels; the backends here read grey ones")
    asked = None if config.memory_mb is None else config.memory_mb << 20
    roots = (Path(root) for root in (config.shards, *config.more_shards))
    max_bad = config.max_bad if config.mode == "train" else 0
    with ExitStack() as begun:  # copying ends where no reader can be made
        sets = [_open_set(config, begun, *each) for each in zip(roots, manifests, order.layouts, strict=False)]
        memory = memory_for(sets, order.live(world), config.read_threads, asked)
        shards = OpenShards(sets)
        quarantine = Quarantine(ShardNames(split=config.split, first=shards.first), max_bad, bad)
        visits, threads, patience = order.visits(position, world), config.read_threads, config.stall_abort_s
        reader = BlockReader(VisitLoader(shards, quarantine), visits, memory, threads=threads, stall_abort_s=patience)
        begun.pop_all()
    return reader


def _open_set(config: LoaderConfig, begun: ExitStack, root: Path, manifest: Manifest, layout: Layout) -> ShardSet:
    """A data set and, where the config asks for them, its copies on the node, begun."""
    shards, copies = manifest.splits[config.split], None
    if config.stage_dir is not None:
        limit = None if config.stage_gb is None else int(config.stage_gb * 1e9)
        copies = Stage(root, Path(config.stage_dir), manifest, shards, limit)
        begun.callback(copies.close)
    return ShardSet(root=root, manifest=manifest, shards=shards, layout=layout, copies=copies)


def _make_backend(
    name: str, config: LoaderConfig, manifest: Manifest, world: World, batches: EncodedBatches
) -> Backend:
    if name == "dali":
        from pipeline.dali import DaliBackend

        return DaliBackend(config, manifest, world, batches)
    from pipeline.cpu import CpuBackend

    return CpuBackend(config, manifest, world, batches)
