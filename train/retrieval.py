"""Retrieval both ways: which report belongs to a film, which film to a report; equal reports are one report.

"No acute disease." may be the report of a thousand films. It stands in the list of reports once, and is right for each
of those films; each of those films is right for it. The rank is that of the best right one: 1 + the number of wrong
ones that are at least as similar. A wrong one that ties counts as ahead, so that a model which has collapsed to a point
ranks last, not first.

Similarities are made in chunks of films against the distinct reports, and seen once: memory is bounded whatever N.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from pipeline.config import LoaderConfig
from pipeline.loader import make_layout
from pipeline.order import Layout
from pipeline.read import ReadStats, retried
from pipeline.selection import scan_shards
from shards.reader import Rows, ShardReader
from shards.schema import Manifest, ShardInfo
from train.scores import Ints, Patients, draws, interval, sum_by

TOP = (1, 5, 10)
_ELEMENTS = 1 << 24
"""Most similarities held at once, 64 MiB of float32."""
_TIE = 1e-6
"""Similarities of unit vectors that are closer are ties: the last bits depend on the shape of a product."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recall:
    """How often a right one is among the first k."""

    recall: float
    interval: list[float] | None
    """95 % over patients; the gallery stays as it is. None where nothing was drawn."""
    chance: float
    """What ranking at random would give."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Direction:
    """Retrieval one way."""

    recall: dict[str, Recall]
    """k -> recall at k."""
    median_rank: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Retrieval:
    """Retrieval of films and their reports, over all films both ways."""

    gallery: int
    """Films to choose from."""
    distinct_reports: int
    """Reports to choose from."""
    image_to_text: Direction
    text_to_image: Direction


def retrieve(
    images: torch.Tensor, texts: torch.Tensor, report: NDArray[np.uint64], patients: Patients, *, rounds: int, seed: int
) -> Retrieval:
    """Score unit vectors (N, D) of films and reports, whose texts are equal where `report` (N,) is."""
    _, first, of_row, copies = np.unique(report, return_index=True, return_inverse=True, return_counts=True)
    distinct = texts[torch.from_numpy(first).to(texts.device)]
    ranks = rank_right_ones(images, distinct, torch.from_numpy(of_row).to(images.device))
    luck = [
        {k: min(k / len(first), 1.0) for k in TOP},
        {k: float(chance(copies[of_row], len(images), k).mean()) for k in TOP},
    ]
    found = [_direction(*each, patients, rounds, seed) for each in zip(ranks, luck, strict=True)]
    return Retrieval(gallery=len(images), distinct_reports=len(first), image_to_text=found[0], text_to_image=found[1])


def rank_right_ones(
    images: torch.Tensor, distinct: torch.Tensor, report: torch.Tensor, *, elements: int = _ELEMENTS
) -> tuple[Ints, Ints]:
    """Rank (N,) of each film's report among the distinct ones, and of the best right film of it among films, from 1.

    images (N, D), distinct reports (U, D), report (N,) int64 in [0, U). `elements`: most similarities at once.
    """
    of_image = torch.empty(len(images), dtype=torch.int64, device=images.device)
    of_text = torch.zeros(len(distinct), dtype=torch.int64, device=images.device)
    own = torch.cat([(part * distinct[to]).sum(1) for part, to in _parts(images, report, elements // images.shape[1])])
    best = own.new_full((len(distinct),), -torch.inf).scatter_reduce_(0, report, own, "amax")
    done = 0
    for part, to in _parts(images, report, elements // len(distinct)):
        similarity = part @ distinct.T  # (n, U)
        similarity[torch.arange(len(part), device=to.device), to] = -torch.inf
        end = done + len(part)
        of_image[done:end] = (similarity >= own[done:end, None] - _TIE).sum(1)
        of_text += (similarity >= best - _TIE).sum(0)
        done = end
    return 1 + of_image.cpu().numpy(), 1 + of_text[report].cpu().numpy()


def chance(right: Ints, gallery: int, k: int) -> NDArray[np.float64]:
    """Probability (N,) that k of `gallery` items, drawn at random, hold one of the `right` (N,) right ones."""
    drawn = np.arange(min(k, gallery))
    missed = np.clip(gallery - right[:, None] - drawn, 0, None) / (gallery - drawn)
    return 1 - missed.prod(axis=1)


def _parts(images: torch.Tensor, report: torch.Tensor, rows: int) -> Any:
    return zip(images.split(max(1, rows)), report.split(max(1, rows)), strict=True)


def _direction(ranks: Ints, luck: dict[int, float], patients: Patients, rounds: int, seed: int) -> Direction:
    hits = np.stack([ranks <= k for k in TOP] + [np.ones(len(ranks), bool)], axis=1)
    sums = sum_by(patients.of_row, hits, patients.count)  # (patients, 4)
    parts = [drawn.T @ sums for drawn in draws(patients.count, rounds=rounds, seed=seed)]
    totals = np.concatenate([np.empty((0, sums.shape[1])), *parts])
    recalls = {
        str(k): Recall(
            recall=float(hits[:, n].mean()),
            interval=interval(totals[:, n] / totals[:, -1]),
            chance=luck[k],
        )
        for n, k in enumerate(TOP)
    }
    return Direction(recall=recalls, median_rank=float(np.median(ranks)))


def read_identity(loader: LoaderConfig, manifest: Manifest) -> tuple[Ints, NDArray[np.uint64]]:
    """Patient (N,), NO_GROUP where unknown, and a digest of the report (N,), in the order of a loader of mode `eval`.

    Reports are equal where their tokens are: that is all a model sees of them.
    """
    layout = make_layout(loader, manifest)
    shards = manifest.splits[loader.split]
    numbers = {info.name: number for number, info in enumerate(shards)}

    def scan(info: ShardInfo) -> list[tuple[Ints, NDArray[np.uint64]]]:
        stats = ReadStats()
        with retried(lambda: ShardReader(loader.shards, manifest, info), stats) as reader:
            return [
                _of_block(retried(partial(reader.read_rows, block), stats), layout, numbers[info.name], block)
                for block in range(reader.blocks)
            ]

    groups, reports = zip(*(part for parts in scan_shards(shards, scan) for part in parts), strict=True)
    return np.concatenate(groups), np.concatenate(reports)


def _of_block(rows: Rows, layout: Layout, shard: int, block: int) -> tuple[Ints, NDArray[np.uint64]]:
    chosen = layout.chosen_of(shard, block)
    digests = [xxh3_64_intdigest(tokens.tobytes()) for tokens in rows.tokens[chosen]]
    return rows.group[chosen].astype(np.int64), np.array(digests, np.uint64)
