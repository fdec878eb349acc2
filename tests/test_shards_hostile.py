"""D7: data sets made to harm, every digest right. Commands and loader refuse in one line, or never touch the bad part.

Nothing is created outside, and memory stays within 200 MB of what it was.
"""

import contextlib
import ctypes
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from xxhash import xxh3_128, xxh3_128_hexdigest

from pipeline.batch import World
from pipeline.config import LoaderConfig
from pipeline.loader import build_loader
from shards import tar
from shards.__main__ import main
from shards.errors import InputError
from shards.manifest import read_manifest, write_manifest
from shards.pages import unpacked_bytes
from shards.reader import ShardReader
from shards.schema import FileInfo
from shards.writer import encode_table, footer_size

ALLOWANCE_KB = 200_000
NAME = "val-000000"


def commands(root: Path, out: Path) -> dict[str, list[str]]:
    where = ["--where", "split == 'val'", "--out"]
    return {
        "verify": ["verify", str(root), "--decode", "all"],
        "inspect": ["inspect", str(root)],
        "sample": ["inspect", str(root), "--sample", "00-0000099999"],
        "preview": ["preview", str(root), "--split", "val", "--out", str(out / "sheet.png")],
        "stats": ["stats", str(root)],
        "shards": ["export", str(root), *where, str(out / "shards")],
        "files": ["export", str(root), *where, str(out / "files"), "--to", "files"],
    }


def memory_kb(field: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


def release_memory() -> None:
    """Give back what making the attack left, or it would hide what the victim takes."""
    pa.default_memory_pool().release_unused()
    ctypes.CDLL(None).malloc_trim(0)


def run_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str | None:
    capsys.readouterr()
    try:
        main(arguments)
    except SystemExit as stop:
        lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        assert stop.code == 2 and len(lines) == 1, (arguments, stop.code, lines)
        return lines[0]
    return None


def run_loader(root: Path) -> str | None:
    config = LoaderConfig(shards=root, split="val", mode="eval", backend="cpu", batch_size=8, threads=1, image_size=32)
    try:
        with build_loader(config, World()) as loader:
            for _ in loader:
                pass
    except InputError as error:
        return str(error)
    return None


@pytest.fixture
def attack(shards_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A copy of a sound set to change, and a function that runs everything on it: command -> its refusal or None."""
    root = Path(shutil.copytree(shards_dir, tmp_path / "cell" / "set"))
    out = tmp_path / "out"
    out.mkdir()

    def run() -> dict[str, str | None]:
        found: dict[str, str | None] = {}
        release_memory()
        for name, arguments in [*commands(root, out).items(), ("loader", None)]:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
            before = memory_kb("VmRSS")
            found[name] = run_loader(root) if arguments is None else run_command(arguments, capsys)
            assert memory_kb("VmHWM") - before < ALLOWANCE_KB, name
        assert os.listdir(tmp_path / "cell") == ["set"] and sorted(os.listdir(tmp_path)) == ["cell", "out"]
        assert {path.name for path in out.iterdir()} <= {"sheet.png", "shards", "files"}
        assert not Path("/shardclip-hostile").exists()
        return found

    return root, run


def sign(root: Path, **changes: object) -> None:
    """What the attacker does last: the shard's files as they are now, entered into the manifest."""
    manifest = read_manifest(root)
    info = manifest.splits["val"][0]
    files = {}
    for suffix in ("tar", "idx", "parquet"):
        path, digest = root / f"{NAME}.{suffix}", xxh3_128()
        with open(path, "rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
        files[suffix] = FileInfo(bytes=path.stat().st_size, xxh3=digest.hexdigest())
    parquet = (root / f"{NAME}.parquet").read_bytes()
    footer = parquet[-footer_size(parquet) :]
    info = replace(info, **files, footer_bytes=len(footer), footer_xxh3=xxh3_128_hexdigest(footer), **changes)
    write_manifest(root, replace(manifest, splits=manifest.splits | {"val": (info,)}))


def header(name: bytes = b"00-0000000001.jpg", size: bytes = b"00000000000\0", kind: bytes = b"0") -> bytes:
    """A tar header of whatever is asked, its checksum right."""
    block = bytearray(tar.header("x", 0))
    block[0:100] = name.ljust(100, b"\0")
    block[124:136] = size
    block[156:157] = kind
    if kind in b"12":
        block[157:257] = b"/etc/hostname".ljust(100, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


HEADERS = {
    "path upwards": header(b"../../shardclip-hostile"),
    "absolute path": header(b"/shardclip-hostile"),
    "symlink": header(kind=b"2"),
    "hardlink": header(kind=b"1"),
    "fifo": header(kind=b"6"),
    "device": header(kind=b"3"),
    "sparse": header(kind=b"S"),
    "8 GiB": header(size=b"77777777777\0"),
    "negative": header(size=b"-0000000001\0"),
    "base-256": header(size=b"\x80" + bytes(3) + b"\x7f" + b"\xff" * 7),
    "base-256, negative": header(size=b"\xff" * 12),
    "pax": header(size=b"%011o\0" % (1 << 30), kind=b"x"),
    "long name": header(size=b"%011o\0" % (1 << 30), kind=b"L"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_lies(attack, kind: str) -> None:
    """In the place of a sample's own header: only `verify` looks there, and sees it."""
    root, run = attack
    with open(root / f"{NAME}.tar", "r+b") as file:
        file.write(HEADERS[kind])
    sign(root)
    found = run()
    assert "header or offset is wrong" in (found.pop("verify") or "")
    assert "no sample" in (found.pop("sample") or "")
    assert set(found.values()) == {None}


@pytest.mark.parametrize("kind", ["pax of 1 GB", "members", "links", "hole"])
def test_what_stands_after_the_last_sample(attack, kind: str) -> None:
    root, run = attack
    path = root / f"{NAME}.tar"
    end = path.stat().st_size - len(tar.END)
    with open(path, "r+b") as file:
        file.truncate(end)
        file.seek(end)
        if kind == "members":  # DESIGN's million would be 512 MB of disk
            file.write(b"".join(header(b"m%06d" % number) for number in range(100_000)))
        elif kind == "links":
            file.write(header(b"../../shardclip-hostile", kind=b"2") + header(b"/shardclip-hostile", kind=b"1"))
        else:
            file.write(header(size=b"%011o\0" % (1 << 30), kind=b"x" if kind.startswith("pax") else b"0"))
            file.truncate(file.tell() + (1 << 30))
            file.seek(0, os.SEEK_END)
        file.write(tar.END)
    sign(root)
    found = run()
    assert "does not end after its last sample" in (found.pop("verify") or "")
    assert "no sample" in (found.pop("sample") or "")
    assert found.pop("loader") is None or path.stat().st_size > 1 << 30  # whose blocks would not fit its memory
    assert set(found.values()) == {None}


def forge(root: Path, change: Callable[[pa.Table], pa.Table], **options: object) -> None:
    """Rewrite the shard's table, by our own writer or by pyarrow with options, and sign it."""
    path = root / f"{NAME}.parquet"
    manifest = read_manifest(root)
    table = change(pq.read_table(path))
    if options:
        pq.write_table(table, path, **{"row_group_size": manifest.block_rows, "compression": "zstd"} | options)
    else:
        path.write_bytes(encode_table(table, manifest.block_rows))
    sign(root)


def column(name: str, make: Callable[[int], pa.Array]) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        number = table.schema.get_field_index(name)
        values = make(table.num_rows)
        return table.set_column(number, pa.field(name, values.type), values)

    return change


PLAIN = {"use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
LONG = "A" * 30_000_000
TABLES: dict[str, tuple[Callable[[pa.Table], pa.Table], dict[str, object]]] = {
    "dictionary bomb": (column("text", lambda rows: pa.array([LONG] * rows)), {"use_dictionary": ["text"]}),
    "compression bomb": (column("text", lambda rows: pa.array([LONG] * rows)), PLAIN),
    "delta bomb": (
        column("text", lambda rows: pa.array([LONG] * rows)),
        PLAIN | {"column_encoding": {"text": "DELTA_BYTE_ARRAY"}},
    ),
    "key bomb": (column("key", lambda rows: pa.array([LONG] * rows)), PLAIN),
    "other row groups": (lambda table: table, PLAIN | {"row_group_size": 5}),
    "other codec": (lambda table: table, PLAIN | {"compression": "snappy"}),
    "nested": (column("text", lambda rows: pa.array([[[{"a": "b"}]]] * rows)), PLAIN),
    "number for text": (column("text", lambda rows: pa.array(range(rows))), PLAIN),
    "text for number": (column("size", lambda rows: pa.array(["1"] * rows)), PLAIN),
    "wide tokens": (column("tokens", lambda rows: pa.array([[1] * 78] * rows, pa.list_(pa.uint16(), 78))), PLAIN),
    "no text": (column("text", lambda rows: pa.nulls(rows, pa.string())), {}),
    "no tokens": (
        column("tokens", lambda rows: pa.array([[None] * 77] * rows, pa.list_(pa.uint16(), 77))),
        {},
    ),
    "not UTF-8": (column("text", lambda rows: pa.array([b"\xff"] * rows, pa.binary()).view(pa.string())), {}),
    "a column less": (lambda table: table.drop_columns(["group"]), {}),
    "a column more": (lambda table: table.append_column("x", pa.array([1] * table.num_rows)), {}),
    "rows doubled": (lambda table: pa.concat_tables([table, table]), {}),
    "no rows": (lambda table: table.slice(0, 0), {}),
    "a foreign source": (column("source", lambda rows: pa.array([77] * rows, pa.uint8())), {}),
}


SPARED = {
    "dictionary bomb": {"loader"},
    "compression bomb": {"loader"},
    "delta bomb": {"loader"},
    "key bomb": {"stats", "loader"},
    "no text": {"loader"},
    "not UTF-8": {"loader"},
    "no tokens": {"preview"},
    "a foreign source": {"stats", "preview"},
}
"""Who reads other columns only."""


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_that_no_writer_of_ours_makes(attack, kind: str) -> None:
    """Refused by whoever reads that table: for bombs before anything of them is unpacked."""
    root, run = attack
    change, options = TABLES[kind]
    forge(root, change, **options)
    found = run()
    assert found.pop("inspect") is None  # reads the manifest alone
    assert {name for name, refusal in found.items() if refusal is None} <= SPARED.get(kind, set())


def varint(value: int, length: int = 0) -> bytes:
    """A Thrift integer, drawn out to `length` bytes."""
    value, content = 2 * value, b""
    while value >> 7 or len(content) + 1 < length:
        content, value = content + bytes([value & 127 | 128]), value >> 7
    return content + bytes([value])


@pytest.mark.parametrize("options", [PLAIN, {"use_dictionary": ["text"]}, PLAIN | {"data_page_version": "2.0"}])
def test_a_bomb_whose_footer_says_that_it_is_small(attack, options: dict[str, object]) -> None:
    """What the footer says of sizes and encodings is a claim; the pages' own headers tell."""
    root, run = attack
    forge(root, column("text", lambda rows: pa.array([LONG] * rows)), **options)
    path = root / f"{NAME}.parquet"
    content = path.read_bytes()
    place = len(content) - footer_size(content)
    footer = content[place:]
    for group in range(pq.read_metadata(path).num_row_groups):
        chunk = pq.read_metadata(path).row_group(group).column(6)
        size = varint(chunk.total_uncompressed_size)
        assert chunk.path_in_schema == "text" and size in footer
        footer = footer.replace(size, varint(100, len(size)))
    path.write_bytes(content[:place] + footer)
    assert pq.read_metadata(path).row_group(0).column(6).total_uncompressed_size == 100
    sign(root)
    found = run()
    assert {name for name, refusal in found.items() if refusal is None} <= {"inspect", "loader"}


def test_page_headers_are_read_as_pyarrow_reads_them(shards_dir: Path) -> None:
    """The sum over a column's pages, headers included, is what pyarrow entered into the footer; noise is refused."""
    path = shards_dir / "train-000000.parquet"
    group = pq.read_metadata(path).row_group(0)
    file = pa.OSFile(str(path))
    for number in range(group.num_columns):
        chunk = group.column(number)
        size = unpacked_bytes(file.read_at, chunk.data_page_offset, chunk.total_compressed_size)
        assert 0 < chunk.total_uncompressed_size - size < 100
    rng = np.random.default_rng(0)
    for _ in range(300):
        noise = rng.bytes(int(rng.integers(1, 60)))
        with contextlib.suppress(ValueError, KeyError, TypeError):
            unpacked_bytes(lambda size, offset, noise=noise: noise[offset : offset + size], 0, len(noise))


def test_a_table_that_carries_a_pickle(attack, tmp_path: Path) -> None:
    """Extension types once were unpickled by pyarrow when a file was opened."""
    root, run = attack
    marker = tmp_path / "out" / "marker"
    payload = b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    metadata = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": payload}

    def change(table: pa.Table) -> pa.Table:
        field = pa.field("text", pa.string(), metadata=metadata)
        return table.set_column(table.schema.get_field_index("text"), field, table["text"])

    forge(root, change)
    run()
    assert not marker.exists()


def claim(**values: int) -> Callable[[int], pa.Array]:
    """Offsets or sizes of which the first is another."""
    ((_, value),) = values.items()
    return lambda rows: pa.array([value] * rows)


@pytest.mark.parametrize(("name", "value"), [("size", 8 << 30), ("size", -1), ("offset", -1), ("offset", 1 << 62)])
def test_places_outside_and_sizes_beyond_any_image(attack, name: str, value: int) -> None:
    """The tar is a hole of 16 GiB, so that such a place is inside of it, and reading it would fill the memory."""
    root, run = attack
    os.truncate(root / f"{NAME}.tar", 16 << 30)
    forge_without_digest(root, name, value)
    found = run()
    assert {key for key, refusal in found.items() if refusal is None} <= {"inspect", "stats"}


def test_a_block_scattered_over_a_huge_tar(attack) -> None:
    """Each image is small and inside, the stretch between the first and the last is not."""
    root, run = attack
    os.truncate(root / f"{NAME}.tar", 16 << 30)
    forge_without_digest(root, "offset", None)
    found = run()
    assert {key for key, refusal in found.items() if refusal is None} <= {"inspect", "stats"}
    with pytest.raises(InputError, match="scattered"):
        manifest = read_manifest(root)
        with ShardReader(root, manifest, manifest.splits["val"][0]) as reader:
            reader.read_rows(0)


def forge_without_digest(root: Path, name: str, value: int | None) -> None:
    """As `forge`, but the tar's digest, which would take seconds and that nobody gets to, is any."""
    path = root / f"{NAME}.parquet"
    manifest = read_manifest(root)
    rows = manifest.splits["val"][0].rows
    spread = np.linspace(512, 15 << 30, rows).astype(np.int64)
    table = column(name, lambda count: pa.array(spread if value is None else [value] * count))(pq.read_table(path))
    content = encode_table(table, manifest.block_rows)
    path.write_bytes(content)
    footer = content[-footer_size(content) :]
    info = replace(
        manifest.splits["val"][0],
        tar=FileInfo(bytes=16 << 30, xxh3="0" * 32),
        parquet=FileInfo(bytes=len(content), xxh3=xxh3_128_hexdigest(content)),
        footer_bytes=len(footer),
        footer_xxh3=xxh3_128_hexdigest(footer),
    )
    write_manifest(root, replace(manifest, splits=manifest.splits | {"val": (info,)}))


def shard(fields: dict) -> dict:
    return fields["splits"]["val"][0]


MANIFESTS: dict[str, Callable[[dict], object]] = {
    "rows": lambda fields: shard(fields).update(rows=10**15),
    "rows and room": lambda fields: (shard(fields).update(rows=10**15), shard(fields)["tar"].update(bytes=10**19)),
    "as many rows as blocks allow": lambda fields: (
        fields.update(block_rows=1 << 16),
        shard(fields).update(rows=(1 << 21 << 16) - 10**6),
        shard(fields)["tar"].update(bytes=10**16),
    ),
    "footer": lambda fields: shard(fields).update(footer_bytes=1 << 40),
    "block rows": lambda fields: fields.update(block_rows=10**12),
    "slashes": lambda fields: shard(fields).update(name="../../val-000000"),
    "absolute": lambda fields: shard(fields).update(name="/etc/passwd"),
    "no text": lambda fields: shard(fields).update(name=None),
    "split": lambda fields: fields["splits"].update({"../val": fields["splits"]["val"]}),
    "image": lambda fields: fields["image"].update(height=10**9, width=10**9),
    "image of text": lambda fields: fields["image"].update(height="320"),
    "codec": lambda fields: fields["image"].update(codec="pickle"),
    "context": lambda fields: fields["tokenizer"].update(context=10**18),
    "context of text": lambda fields: fields["tokenizer"].update(context="77"),
    "labels": lambda fields: fields.update(labels=[str(number) for number in range(10**5)]),
    "labels as text": lambda fields: fields.update(labels="Edema"),
    "source": lambda fields: fields["sources"][0].update(rows=10**15),
    "seed": lambda fields: fields.update(seed=float("inf")),
    "groups": lambda fields: fields.update(groups={"val": [0]}),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_manifest_that_lies(attack, kind: str) -> None:
    root, run = attack
    fields = json.loads((root / "manifest.json").read_text())
    MANIFESTS[kind](fields)
    (root / "manifest.json").write_text(json.dumps(fields))
    found = run()
    if kind == "footer":
        assert found.pop("inspect") is None  # says what the manifest says
    if kind == "as many rows as blocks allow":
        assert found.pop("inspect") is None
    assert all(found.values()), found


@pytest.mark.parametrize("content", [b"[" * 10**6, b'{"a":' * 10**5, b"9" * 10**6, b"\xff\xfe", b"", b"null", b"[]"])
def test_a_manifest_that_is_none(attack, content: bytes) -> None:
    root, run = attack
    (root / "manifest.json").write_bytes(content)
    assert all(run().values())


def test_pipes_and_holes_in_place_of_files(attack) -> None:
    """A pipe would keep a reader for ever, a manifest with a hole of 4 GiB fill its memory."""
    root, run = attack
    (root / "rejects.csv").unlink()
    os.mkfifo(root / "rejects.csv")
    found = run()
    assert "is no file" in (found["shards"] or "")
    (root / "manifest.json").unlink()
    os.mkfifo(root / "manifest.json")
    assert all(run().values())
    (root / "manifest.json").unlink()
    (root / "manifest.json").write_bytes(b"{")
    os.truncate(root / "manifest.json", 4 << 30)
    assert all(run().values())
