"""The one door: `build_loader(config, world)` gives batches, whatever the backend.

    manifest -> order -> block reader -> encoded batches -> backend -> Batch

A loader's whole state is one integer, `position`: build it with `position=p` and it goes on from there, without replay.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from pipeline.balance import BalancedOrder, read_classes
from pipeline.batch import Batch, World
from pipeline.blocks import BlockReader
from pipeline.buffers import MOST_MEMORY, check_memory, read_ahead
from pipeline.config import LoaderConfig, stream_count
from pipeline.encoded import EncodedBatches
from pipeline.handles import OpenShards
from pipeline.mixture import MixedOrder, MixedReader, check_alike, deal_streams, set_seed
from pipeline.order import Layout, Order, RowOrder, ShuffledOrder, Visit
from pipeline.quarantine import Quarantine, ShardNames
from pipeline.selection import Selection, select_rows
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
        reader: BlockReader | MixedReader | None = None,
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
            self._reader.quarantine.count(batch.replaced)
        self._batches += 1
        self._images += len(batch)
        self.position = batch.position + self.config.batch_size
        return batch

    def bad_samples(self) -> list[dict[str, Any]]:
        """The bad samples whose places others took so far; give them to `build_loader` to go on from `position`."""
        return [] if self._reader is None else self._reader.quarantine.listed()

    def stats(self) -> dict[str, float]:
        """Counts so far: batches, images, seconds the trainer waited here; blocks and bytes read, reads retried, bad
        samples replaced, shards that are on this node."""
        stats: dict[str, float] = {"batches": self._batches, "images": self._images, "wait_s": self._wait_s}
        if self._reader is not None:
            read = self._reader.stats
            stats |= {"blocks": read.blocks, "bytes": read.bytes, "retries": read.retries}
            stats |= {"buffer_bytes": self._reader.buffer_bytes, "bad_samples": len(self.bad_samples())}
            stats["staged"] = self._reader.staged
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
    manifest = read_manifest(config.shards)
    mixed = config.mode == "train" and bool(config.more_shards)
    name = resolve_backend(config, world)
    if name.startswith("hdf5"):
        from pipeline.hdf5 import Hdf5Backend

        order = make_order(config, manifest, streams)
        baseline = Hdf5Backend(config, manifest, world, order, position, tuned=name == "hdf5-tuned")
        return Loader(config, order.samples, streams, position, baseline)
    limit = config.max_bad if config.mode == "train" else 0
    reader: BlockReader | MixedReader
    if mixed:
        make = partial(Quarantine, limit=limit, known=bad_samples)
        order, reader = _make_mixture(config, manifest, world, make, streams, position)
    else:
        order = make_order(config, manifest, streams)
        live = 1 if config.mode == "eval" else streams // world.size
        quarantine = Quarantine(ShardNames(split=config.split), limit, bad_samples)
        reader = _make_reader(config, manifest, order.layout, order.visits(position, world), quarantine, live)
    try:
        batches = EncodedBatches(config, manifest, world, reader, position, order.samples)
        backend = _make_backend(name, config, manifest, world, batches)
    except BaseException:
        reader.close()
        raise
    return Loader(config, order.samples, streams, position, backend, reader)


def make_order(config: LoaderConfig, manifest: Manifest, streams: int, number: int = 0) -> Order:
    """The order that the config asks for, of the data set `number` of a mixture. InputError where the split is absent,
    or too little of it is selected."""
    layout = make_layout(config, manifest, number)
    if config.mode == "eval":
        return RowOrder(layout)
    if config.balance is None:
        return ShuffledOrder(layout, seed=config.seed, streams=streams)
    classes = read_classes(Path(config.shards), manifest, config.split, config.balance)
    return BalancedOrder(layout, classes, seed=config.seed, streams=streams)


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
    config: LoaderConfig,
    manifest: Manifest,
    layout: Layout,
    visits: Iterator[Visit],
    quarantine: Quarantine,
    live: int,
    first_shard: int = 0,
) -> BlockReader:
    """A reader of visits, `live` of which are open at once."""
    shards, image = manifest.splits[config.split], manifest.image
    if image.channels != 1:
        raise InputError(f"{config.shards} holds images of {image.channels} channels; the backends here read grey ones")
    limit = MOST_MEMORY if config.memory_mb is None else config.memory_mb << 20
    check_memory(manifest, shards, limit, live)
    memory = limit if config.memory_mb else read_ahead(shards, layout, live, config.read_threads)
    opened = OpenShards(Path(config.shards), manifest, shards, _stage(config, manifest))
    loader = VisitLoader(opened, manifest, quarantine, layout.chosen_of, first_shard)
    threads, patience = config.read_threads, config.stall_abort_s
    return BlockReader(loader, shards, visits, memory, threads=threads, stall_abort_s=patience)


def make_mixed_order(config: LoaderConfig, manifests: Sequence[Manifest], streams: int) -> MixedOrder:
    """The order over all sets, by the mix or by their sizes. InputError where they do not go together."""
    for root, manifest in zip(config.more_shards, manifests[1:], strict=True):
        check_alike(manifests[0], manifest, str(root))
    sets = [replace(config, shards=Path(root)) for root in (config.shards, *config.more_shards)]
    sizes = [make_layout(*each, number).samples for number, each in enumerate(zip(sets, manifests, strict=True))]
    owner = deal_streams(config.mix or sizes, streams)
    orders = [
        make_order(replace(each, seed=set_seed(config.seed, number)), manifest, int((owner == number).sum()), number)
        for number, (each, manifest) in enumerate(zip(sets, manifests, strict=True))
    ]
    return MixedOrder([order for order in orders if isinstance(order, ShuffledOrder)], owner)


def _make_mixture(
    config: LoaderConfig,
    manifest: Manifest,
    world: World,
    make_quarantine: Callable[[ShardNames], Quarantine],
    streams: int,
    position: int,
) -> tuple[MixedOrder, MixedReader]:
    """Order and readers of all sets; each has its part of the memory, and all have one quarantine."""
    manifests = [manifest, *(read_manifest(Path(root)) for root in config.more_shards)]
    order = make_mixed_order(config, manifests, streams)
    quarantine = make_quarantine(ShardNames(split=config.split, first=tuple(order.first_shard)))
    readers: list[tuple[int, BlockReader]] = []
    try:
        for number, root in enumerate((config.shards, *config.more_shards)):
            live = order.set_streams(number, world)
            if not live:
                continue
            share = config.memory_mb and max(1, config.memory_mb * live * world.size // streams)
            part = replace(config, shards=Path(root), memory_mb=share)
            visits = order.set_visits(number, position, world)
            layout = order.orders[number].layout
            first = order.first_shard[number]
            readers.append((first, _make_reader(part, manifests[number], layout, visits, quarantine, live, first)))
    except BaseException:
        for _, reader in readers:
            reader.close()
        raise
    return order, MixedReader(readers)


def _stage(config: LoaderConfig, manifest: Manifest) -> Stage | None:
    """Copies on the node, begun, where the config asks for them."""
    if config.stage_dir is None:
        return None
    limit = None if config.stage_gb is None else int(config.stage_gb * 1e9)
    return Stage(Path(config.shards), Path(config.stage_dir), manifest, manifest.splits[config.split], limit)


def _make_backend(
    name: str, config: LoaderConfig, manifest: Manifest, world: World, batches: EncodedBatches
) -> Backend:
    if name == "dali":
        from pipeline.dali import DaliBackend

        return DaliBackend(config, manifest, world, batches)
    from pipeline.cpu import CpuBackend

    return CpuBackend(config, manifest, world, batches)
