"""What others read out of our shards, against the source: `webdataset`, DALI's reader, Hugging Face, DuckDB, pandas."""

import csv
import io
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import FINDINGS, made_up_images, write_csv, write_h5
from PIL import Image

from shards.manifest import read_manifest
from shards.reader import ShardReader

START, END = 49406, 49407
"""CLIP's tokens around a report."""


def expected(root: Path, split: str = "train") -> dict[str, dict]:
    """Key -> row of our own table."""
    manifest = read_manifest(root)
    rows = {}
    for info in manifest.splits[split]:
        with ShardReader(root, manifest, info) as reader:
            rows |= {row["key"]: row for row in reader.read_table().to_pylist()}
    return rows


def source_rows(source: tuple[Path, Path]) -> list[dict[str, str]]:
    """The rows of the CSV that the shards were made from."""
    with open(source[1], newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def labels_of(row: dict[str, str]) -> dict[str, float | None]:
    """A CSV row's labels; blank is unknown."""
    return {name: float(row[name]) if row[name] else None for name in FINDINGS}


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


WARY = """
import sys, numpy, PIL.Image, webdataset
def refuse(event, _):
    if event in ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "socket.connect"):
        raise SystemExit(f"webdataset came to {event}")
sys.addaudithook(refuse)
data = webdataset.WebDataset(sys.argv[1], shardshuffle=False).decode("pil")
print(sum({"jpg", "txt", "json"} <= set(sample) for sample in data))
"""


def test_webdataset_needs_no_trust(shards_dir: Path) -> None:
    """With WDS_SECURE=1, known from 1.0 on; an audit hook says the same of every version: no pickle, no command."""
    pytest.importorskip("webdataset")
    count = read_manifest(shards_dir).splits["train"]
    urls = f"{shards_dir}/train-{{000000..{len(count) - 1:06d}}}.tar"
    done = subprocess.run(
        [sys.executable, "-c", WARY, urls],
        env={**os.environ, "WDS_SECURE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == read_manifest(shards_dir).rows("train")


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


class TestHuggingFace:
    @pytest.fixture
    def load(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """`load_dataset` of `webdataset` shards with caches in a folder of the test, offline."""
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        datasets = pytest.importorskip("datasets")

        def load(root: Path, **settings):
            files = {"train": f"{root}/train-*.tar"}
            cache = str(tmp_path / "cache")
            return datasets.load_dataset("webdataset", data_files=files, split="train", cache_dir=cache, **settings)

        return load

    def test_every_sample_is_the_sources(self, load, source: tuple[Path, Path], shards_dir: Path) -> None:
        rows, seen = source_rows(source), []
        with h5py.File(source[0]) as file:
            films = file["cxr"][:]
        for sample in load(shards_dir):
            number = sample["json"]["row"]
            seen.append(number)
            assert sample["txt"] == rows[number]["impression"]
            assert sample["json"]["labels"] == labels_of(rows[number])
            pixels = np.asarray(sample["jpg"])
            assert pixels.shape == (320, 320) and np.abs(pixels - films[number]).mean() < 2  # JPEG, quality 95
        assert sorted(seen) == sorted(row["row"] for row in expected(shards_dir).values())

    def test_streaming(self, load, shards_dir: Path) -> None:
        texts = [sample["txt"] for sample in load(shards_dir, streaming=True)]
        assert texts == [row["text"] for row in expected(shards_dir).values()]

    def test_labels_that_are_mostly_unknown_need_features(self, load, tmp_path: Path) -> None:
        """It infers types from 5 samples, as FORMAT.md warns: a label unknown in all of them must be declared."""
        from datasets import Features, Value
        from datasets import Image as ImageFeature

        from ingest.config import IngestConfig
        from ingest.run import ingest

        h5 = write_h5(tmp_path / "a.h5", made_up_images(20))
        table = write_csv(tmp_path / "a.csv", ["impression", "Mass"], [["x", 1 if i == 7 else ""] for i in range(20)])
        out = tmp_path / "out"
        ingest(IngestConfig(to_shards=out, h5=(h5,), csv=(table,), label_columns=("Mass",), workers=1))
        features = Features(
            {
                "jpg": ImageFeature(),
                "txt": Value("string"),
                "json": {"labels": {"Mass": Value("float32")}, "row": Value("int64"), "source": Value("int64")},
                "__key__": Value("string"),
                "__url__": Value("string"),
            }
        )
        found = {sample["json"]["row"]: sample["json"]["labels"]["Mass"] for sample in load(out, features=features)}
        assert found == {row: 1.0 if row == 7 else None for row in range(20)}


class TestTables:
    def test_duckdb(self, source: tuple[Path, Path], shards_dir: Path) -> None:
        duckdb = pytest.importorskip("duckdb")
        rows, ours = source_rows(source), expected(shards_dir)
        files = f"'{shards_dir}/train-*.parquet'"
        with duckdb.connect() as base:
            assert base.execute(f"SELECT count(*), count(DISTINCT key) FROM {files}").fetchone() == (len(ours),) * 2
            for row, text in base.execute(f"SELECT row, text FROM {files}").fetchall():
                assert text == rows[row]["impression"]
            label = '"label:Pleural Effusion"'
            counts = dict(base.execute(f"SELECT {label}, count(*) FROM {files} GROUP BY 1").fetchall())
            known = [labels_of(rows[row["row"]])["Pleural Effusion"] for row in ours.values()]
            assert counts == {value: known.count(value) for value in (None, 0, 1, -1)}
            ends = f"SELECT DISTINCT tokens[1], tokens[token_count], len(tokens) FROM {files} WHERE NOT truncated"
            assert base.execute(ends).fetchall() == [(START, END, 77)]
            patients = f"""SELECT count(*) FROM (SELECT DISTINCT "group" FROM {files}) JOIN
                (SELECT DISTINCT "group" FROM '{shards_dir}/test-*.parquet') USING ("group")"""
            assert base.execute(patients).fetchone() == (0,)

    def test_pandas_finds_the_image_too(self, source: tuple[Path, Path], shards_dir: Path) -> None:
        pandas = pytest.importorskip("pandas")
        rows = source_rows(source)
        with h5py.File(source[0]) as file:
            films = file["cxr"][:]
        for path in sorted(shards_dir.glob("train-*.parquet")):
            tar = path.with_suffix(".tar").read_bytes()
            for row in pandas.read_parquet(path).to_dict("records"):
                assert row["text"] == rows[row["row"]]["impression"]
                tokens = row["tokens"]
                assert (tokens[0], tokens[row["token_count"] - 1], tokens[row["token_count"] :].any()) == (
                    START,
                    END,
                    False,
                )
                image = Image.open(io.BytesIO(tar[row["offset"] : row["offset"] + row["size"]]))
                assert np.abs(np.asarray(image) - films[row["row"]]).mean() < 2
