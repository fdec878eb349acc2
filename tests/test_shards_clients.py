"""What others read out of our shards: `webdataset`, and DALI's own reader with our index."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.manifest import read_manifest
from shards.reader import ShardReader


def expected(root: Path) -> dict[str, dict]:
    manifest = read_manifest(root)
    rows = {}
    for info in manifest.splits["train"]:
        with ShardReader(root, manifest, info) as reader:
            rows |= {row["key"]: row for row in reader.read_table().to_pylist()}
    return rows


def test_webdataset(shards_dir: Path) -> None:
    wds = pytest.importorskip("webdataset")
    urls = [str(path) for path in sorted(shards_dir.glob("train-*.tar"))]
    data = wds.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("__key__", "jpg", "txt", "json")
    rows = expected(shards_dir)
    seen = set()
    for key, image, text, record in data:
        seen.add(key)
        assert image.size == (320, 320)
        assert text == rows[key]["text"]
        assert record["row"] == rows[key]["row"]
        assert record["labels"] == {name: rows[key][f"label:{name}"] for name in record["labels"]}
    assert seen == set(rows)


def test_dali_reader_with_our_index(shards_dir: Path) -> None:
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn, pipeline_def, types

    tars = sorted(shards_dir.glob("train-*.tar"))

    @pipeline_def(batch_size=4, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def graph():
        image, text = fn.readers.webdataset(
            paths=[str(path) for path in tars],
            index_paths=[str(path.with_suffix(".idx")) for path in tars],
            ext=["jpg", "txt"],
            missing_component_behavior="error",
            dont_use_mmap=True,
            name="reader",
        )
        return fn.decoders.image(image, device="cpu", output_type=types.GRAY), text

    rows = list(expected(shards_dir).values())
    pipe = graph()
    pipe.build()
    assert pipe.reader_meta("reader")["epoch_size"] == len(rows)
    images, texts = pipe.run()
    manifest = read_manifest(shards_dir)
    with ShardReader(shards_dir, manifest, manifest.splits["train"][0]) as reader:
        for number in range(4):
            row = rows[number]
            assert bytes(np.asarray(texts.at(number))).decode() == row["text"]
            decoded = np.asarray(images.at(number))[..., 0]
            ours = np.asarray(Image.open(io.BytesIO(os.pread(reader.fd, row["size"], row["offset"]))))
            # Two builds of libjpeg-turbo may differ by a rounding of the inverse DCT.
            assert np.abs(decoded.astype(int) - ours).max() <= 1
