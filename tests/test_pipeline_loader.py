"""A loader's life: interrupted, closed, closed again, inherited by a forked process, built again and again."""

import gc
import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline import cpu, read
from pipeline.batch import World, make_batch
from pipeline.blocks import BlockReader
from pipeline.config import LoaderConfig
from pipeline.handles import record_type
from pipeline.loader import build_loader
from shards.errors import InputError
from shards.manifest import read_manifest

OURS = ("cpu", "dali")


def settings(shards: Path, **more: object) -> LoaderConfig:
    return LoaderConfig(shards=shards, batch_size=8, threads=2, **{"backend": "cpu", **more})  # type: ignore[arg-type]


class Interrupted(threading.Event):
    """Its third wait ends by Ctrl-C."""

    waits = 0

    def wait(self, timeout: float | None = None) -> bool:
        Interrupted.waits += 1
        if Interrupted.waits == 3:
            signal.raise_signal(signal.SIGINT)
        return super().wait(timeout)


def test_an_interrupt_while_waiting_costs_no_batch(shards_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a notebook one goes on after Ctrl-C. The batch that was waited for was lost then, and nothing said so."""
    with build_loader(settings(shards_dir), World()) as loader:
        expected = [(batch.position, batch.samples.clone()) for batch, _ in zip(loader, range(5), strict=False)]
    here = SimpleNamespace(**{**vars(threading), "Event": Interrupted})
    monkeypatch.setattr(cpu, "threading", here)
    found = []
    with build_loader(settings(shards_dir), World()) as loader:
        while len(found) < 5:
            try:
                batch = next(loader)
            except KeyboardInterrupt:
                assert len(found) == 2
                continue
            found.append((batch.position, batch.samples.clone()))
    assert Interrupted.waits == 6
    assert [position for position, _ in found] == [position for position, _ in expected]
    assert all(torch.equal(one, two) for (_, one), (_, two) in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", OURS)
def test_a_closed_loader_says_so(shards_dir: Path, backend: str) -> None:
    """It waited for ever for threads that are gone."""
    loader = build_loader(settings(shards_dir, backend=backend), World())
    next(loader)
    loader.close()
    loader.close()
    with pytest.raises(InputError, match="was closed"):
        next(loader)


def test_a_forked_process_is_told_that_the_loader_is_not_its_own(shards_dir: Path) -> None:
    """It has none of the threads and waited for ever."""
    with build_loader(settings(shards_dir), World()) as loader:
        next(loader)
        child = os.fork()
        if not child:
            try:
                next(loader)
            except InputError as error:
                os._exit(7 if "belongs to the process that built it" in str(error) else 8)
            os._exit(9)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 7
        assert len(next(loader)) == 8


def test_a_closed_loader_leaves_no_buffers_to_the_garbage_collector(
    shards_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kept over 100 MB at batch 64 until that came round: a trainer builds one for every validation."""
    preadv, stop, stopped = os.preadv, BlockReader.stop, threading.Event()

    def late(*arguments: object) -> int:
        """Comes after the loader was closed, whose thread waits for it then, which is an error there."""
        assert stopped.wait(600)
        return preadv(*arguments)  # type: ignore[arg-type]

    def stop_and_tell(self: BlockReader) -> None:
        stop(self)
        stopped.set()

    def slots() -> int:
        return sum(type(each) is cpu._Slot for each in gc.get_objects())

    monkeypatch.setattr(read.os, "preadv", late)
    monkeypatch.setattr(BlockReader, "stop", stop_and_tell)
    gc.collect()
    gc.disable()
    try:
        before = slots()
        loader = build_loader(settings(shards_dir), World())
        assert slots() > before
        loader.close()
        del loader
        assert slots() == before
    finally:
        gc.enable()


class FakeStream:
    """Stands in for a CUDA stream: notes what is asked of it."""

    device = torch.device("cpu")

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def __enter__(self) -> None:
        self.log.append(f"in {self.name}")

    def __exit__(self, *_: object) -> None:
        self.log.append(f"out of {self.name}")


def test_batches_go_to_a_gpu_beside_the_trainers_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the right order, as far as can be seen without one: copied in the side stream by the thread that finishes the
    batch, waited for by the trainer's stream and not by the trainer, memory kept for what is queued there, and the
    pinned buffer given back after the copy only."""
    log: list[str] = []

    class Event:
        def __str__(self) -> str:
            return "the copy"

        def record(self, stream: FakeStream) -> None:
            log.append(f"{stream.name} copied")

        def synchronize(self) -> None:
            log.append("host waits for the copy")

    def send(images: torch.Tensor, *_: object, **how: object) -> torch.Tensor:
        log.append(f"to device, {how}")
        return images

    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: FakeStream("trainer", log))
    monkeypatch.setattr(torch.Tensor, "to", send)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, stream: log.append(f"kept for {stream.name}"))
    monkeypatch.setattr(cpu.torch, "empty", lambda shape, dtype, **_: torch.zeros(shape, dtype=dtype))
    slot = cpu._Slot((4, 8, 8, 3), torch.float32, FakeStream("side", log))  # type: ignore[arg-type]
    slot.encoded = SimpleNamespace(fate=SimpleNamespace(boxes=[0] * 3))  # type: ignore[assignment]
    slot._open_tasks = 2
    slot.finish_task(None)
    assert not log and not slot.done.is_set()
    slot.finish_task(None)
    sent = ["in side", "to device, {'non_blocking': True}", "side copied", "out of side"]
    assert log == sent and slot.done.is_set()
    assert slot.take().shape == (3, 3, 8, 8)
    assert log == [*sent, "trainer waits for the copy", "kept for trainer"]
    slot.give_back()
    assert log[-1] == "host waits for the copy"


def test_a_batch_that_failed_is_not_sent() -> None:
    slot = cpu._Slot((4, 8, 8, 3), torch.float32)
    slot._side, slot._open_tasks = FakeStream("side", []), 1  # type: ignore[assignment]
    slot.finish_task(InputError("damaged"))
    assert slot.done.is_set() and str(slot.error) == "damaged" and slot._sent is None


def test_what_is_sent_to_a_gpu_is_pinned_first(shards_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA may hold the host up for other memory of more than 64 KB, until all that was launched before is done."""
    pinned: list[torch.dtype] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.dtype) or tensor)
    records = np.zeros(2, dtype=record_type(read_manifest(shards_dir)))
    sent = make_batch(torch.empty(2, 3, 4, 4), records, 0, torch.device("meta"))
    assert sent.tokens.is_meta and sent.labels.is_meta and pinned == [torch.int64, torch.float32]
    assert not sent.samples.is_meta  # the host counts and names them
