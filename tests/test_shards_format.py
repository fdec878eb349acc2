"""The bytes of the format: golden tar, golden index, golden table; read back by the tools that others use."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from shards import tar
from shards.errors import InputError
from shards.manifest import encode_manifest, read_manifest, write_manifest
from shards.reader import ShardReader
from shards.schema import ImageSpec, Manifest, SourceInfo, TokenizerSpec, block_rows_for
from shards.writer import Sample, ShardWriter

CONTEXT = 8
LABELS = ("Effusion", "Größe")


def sample(row: int, **changes) -> Sample:
    fields = {
        "source": 0,
        "row": row,
        "image": bytes([255, 216]) + bytes(range(row, row + 40)),
        "text": f"Befund {row}: klein, µ.\n",
        "tokens": np.arange(row, row + CONTEXT, dtype=np.uint16),
        "token_count": 5,
        "truncated": False,
        "side_words": row % 2 == 1,
        "group": row,
        "labels": (1.0, None),
    }
    return Sample(**fields | changes)


def write(folder: Path, rows: int = 3, name: str = "train-000000", **changes):
    arguments = {"image": ImageSpec(), "context": CONTEXT, "labels": LABELS, "block_rows": 2, "groups": (0, 100)}
    with ShardWriter(folder, name, **arguments | changes) as writer:
        for row in range(rows):
            writer.add(sample(row))
    return writer.info


def manifest_of(*infos, **changes) -> Manifest:
    fields = {
        "schema_version": 1,
        "image": ImageSpec(),
        "tokenizer": TokenizerSpec(name="t", digest="0" * 32, context=CONTEXT, vocab_size=100),
        "labels": LABELS,
        "block_rows": 2,
        "seed": 0,
        "sources": (SourceInfo(kind="hdf5", rows=3, samples=3, digest="0" * 32),),
        "splits": {"train": infos},
        "groups": {"train": (0, 100)},
    }
    return Manifest(**fields | changes)


def test_golden_tar_and_index(tmp_path: Path) -> None:
    info = write(tmp_path)
    content = (tmp_path / "train-000000.tar").read_bytes()
    assert hashlib.sha256(content).hexdigest() == "21041752de8746aecb65096b768db0a6c6ecef91df0446dde36f69e228f3b90f"
    assert (tmp_path / "train-000000.idx").read_text() == GOLDEN_INDEX
    assert info.tar.bytes == len(content) and info.rows == 3
    # The first header, field by field, so that a failure says what moved.
    assert content[:17] == b"00-0000000000.jpg" and content[17:100] == bytes(83)
    assert content[100:156] == b"0000644\x000000000\x000000000\x0000000000052\x0000000000000\x00007700\0 "
    assert content[156:157] == b"0" and content[257:265] == b"ustar\x0000"


GOLDEN_INDEX = """v1.2 3
jpg 512 42 00-0000000000.jpg txt 1536 21 00-0000000000.txt json 2560 61 00-0000000000.json
jpg 3584 42 00-0000000001.jpg txt 4608 21 00-0000000001.txt json 5632 61 00-0000000001.json
jpg 6656 42 00-0000000002.jpg txt 7680 21 00-0000000002.txt json 8704 61 00-0000000002.json
"""


def test_golden_table(tmp_path: Path) -> None:
    write(tmp_path)
    file = pq.ParquetFile(tmp_path / "train-000000.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [2, 1]
    assert not any(file.metadata.row_group(0).column(i).is_stats_set for i in range(file.metadata.num_columns))
    text = json.dumps(file.read().to_pylist(), sort_keys=True, ensure_ascii=False)
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "57b5c028934fba205a68ff1b3609a2831381faf0d7ec1bdcb4e3bdd63c1fe16a"
    )
    assert file.read().to_pylist()[1] | {"xxh3": 0} == {
        "key": "00-0000000001",
        "source": 0,
        "row": 1,
        "offset": 3584,
        "size": 42,
        "xxh3": 0,
        "text": "Befund 1: klein, µ.\n",
        "tokens": [1, 2, 3, 4, 5, 6, 7, 8],
        "token_count": 5,
        "truncated": False,
        "side_words": True,
        "group": 1,
        "label:Effusion": 1.0,
        "label:Größe": None,
    }


def test_python_and_gnu_agree_on_the_tar(tmp_path: Path) -> None:
    write(tmp_path)
    with tarfile.open(tmp_path / "train-000000.tar") as archive:
        members = archive.getmembers()
        assert [m.name for m in members[:3]] == ["00-0000000000.jpg", "00-0000000000.txt", "00-0000000000.json"]
        assert all(m.isreg() and m.mtime == 0 and m.uid == 0 and m.mode == 0o644 for m in members)
        assert archive.extractfile(members[4]).read().decode() == "Befund 1: klein, µ.\n"
        assert json.loads(archive.extractfile(members[5]).read()) == {
            "labels": {"Effusion": 1.0, "Größe": None},
            "row": 1,
            "source": 0,
        }
    # Python's own writer makes the same header from the same facts.
    theirs = tarfile.TarInfo("00-0000000000.jpg")
    theirs.size = 42
    assert theirs.tobuf(tarfile.USTAR_FORMAT) == tar.header("00-0000000000.jpg", 42)


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513])
def test_members_fill_whole_blocks(size: int) -> None:
    member = tar.member("a.txt", b"x" * size)
    assert len(member) % 512 == 0
    with tarfile.open(fileobj=io.BytesIO(member + tar.END)) as archive:
        assert archive.extractfile("a.txt").read() == b"x" * size


@pytest.mark.parametrize("name", ["", "a/b", "x" * 101])
def test_names_that_could_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be called"):
        tar.header(name, 1)


def test_a_failed_shard_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        ShardWriter(
            tmp_path, "train-000000", image=ImageSpec(), context=CONTEXT, labels=LABELS, block_rows=2
        ) as writer,
    ):
        writer.add(sample(0))
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="no samples"):
        write(tmp_path, rows=0)
    assert list(tmp_path.iterdir()) == []


def test_the_writer_refuses_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown codec 'gif'; valid: jpeg, png, webp, jpeg2k, raw"):
        ImageSpec(codec="gif")
    with pytest.raises(ValueError, match="a leak"):
        write(tmp_path, groups=(1, 100))
    with pytest.raises(ValueError, match="tokens"):
        write(tmp_path, context=9)
    assert list(tmp_path.iterdir()) == []


def test_reader_gives_back_what_was_written(tmp_path: Path) -> None:
    info = write(tmp_path)
    with ShardReader(tmp_path, manifest_of(info), info) as reader:
        assert reader.blocks == 2 and reader.block_span(1) == (2, 3)
        rows = reader.read_rows(0)
        assert rows.keys() == ["00-0000000000", "00-0000000001"]
        assert rows.tokens.tolist() == [list(range(8)), list(range(1, 9))]
        assert rows.labels[:, 0].tolist() == [1, 1] and np.isnan(rows.labels[:, 1]).all()
        assert rows.side_words.tolist() == [False, True]
        assert reader.read_text(1) == ["Befund 2: klein, µ.\n"]


def test_manifest_round_trip_and_refusals(tmp_path: Path) -> None:
    info = write(tmp_path)
    manifest = manifest_of(info)
    write_manifest(tmp_path, manifest)
    read = read_manifest(tmp_path)
    assert encode_manifest(read) == encode_manifest(manifest)
    assert len(read.digest) == 32 and read.rows("train") == 3 and read.rows("val") == 0

    def refused(change, words: str) -> None:
        fields = json.loads(encode_manifest(manifest))
        change(fields)
        (tmp_path / "manifest.json").write_text(json.dumps(fields))
        with pytest.raises(InputError, match=words):
            read_manifest(tmp_path)

    refused(lambda f: f.update(schema_version=2), "schema version 2")
    refused(lambda f: f["splits"]["train"][0].update(name="../../etc/passwd"), "stands where")
    refused(lambda f: f["splits"].update(extra=[]), "unknown split")
    refused(lambda f: f["groups"].update(val=[50, 60]), "overlap")
    refused(lambda f: f["splits"]["train"][0]["tar"].update(bytes=-1), "positive count")
    refused(lambda f: f.pop("labels"), "not a manifest")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="not a manifest"):
        read_manifest(tmp_path)


def test_block_rows_follow_size_and_count() -> None:
    assert block_rows_for(462_195, 22_000) == (4 << 20) // 22_000  # 4 MiB
    assert block_rows_for(100_000, 22_000) == 100  # 1,000 blocks
    assert block_rows_for(50, 22_000) == 16


@pytest.mark.parametrize("rows", [16, 200, 2000])
def test_blocks_of_any_size_are_read(tmp_path: Path, rows: int) -> None:
    """The reader's limits on what a column takes leave room for the blocks of a large set."""
    context = 77
    with ShardWriter(
        tmp_path, "train-000000", image=ImageSpec(), context=context, labels=LABELS, block_rows=rows, groups=(0, rows)
    ) as writer:
        for row in range(rows):
            tokens = np.arange(row, row + context, dtype=np.uint16)
            writer.add(sample(row % 200)._replace(row=row, group=row, tokens=tokens))
    tokenizer = TokenizerSpec(name="t", digest="0" * 32, context=context, vocab_size=rows + context)
    manifest = manifest_of(writer.info, block_rows=rows, groups={"train": (0, rows)}, tokenizer=tokenizer)
    with ShardReader(tmp_path, manifest, writer.info) as reader:
        assert len(reader.read_rows(0)) == rows
