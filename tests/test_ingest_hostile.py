"""Input that is damaged, contradictory or made to harm, and circumstances that must not matter.

The numbers are the rows of the fault table: I5, I9, I10, I11, I13.
"""

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import REPOSITORY, assert_refused, made_up_images, run_module, write_csv, write_h5
from PIL import Image

from ingest.config import IngestConfig, SourceConfig
from ingest.films import H5Films
from ingest.inputs import read_inputs
from ingest.reports import MAX_FIELD
from ingest.source import H5Source
from ingest.table import read_table
from ingest.trial import dry_run
from shards.errors import InputError
from shards.manifest import read_manifest
from shards.reader import ShardReader
from shards.schema import sample_key


def tree(root: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in root.iterdir() if path.is_file()}


def table_of(root: Path) -> dict[str, dict]:
    """Key -> row, of all splits."""
    manifest, found = read_manifest(root), {}
    for split, shards in manifest.splits.items():
        for info in shards:
            with ShardReader(root, manifest, info) as reader:
                found |= {row["key"]: row | {"split": split} for row in reader.read_table().to_pylist()}
    return found


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """12 films and their reports. Read only."""
    folder = tmp_path_factory.mktemp("small")
    table = write_csv(folder / "a.csv", ["impression", "patient"], [[f"Film {i}", i // 2] for i in range(12)])
    return write_h5(folder / "a.h5", made_up_images(12)), table


def command(out: Path, small: tuple[Path, Path], *more: str) -> list[str]:
    return [
        "-m",
        "ingest",
        "--to-shards",
        str(out),
        "--h5",
        str(small[0]),
        "--csv",
        str(small[1]),
        "--workers",
        "1",
        *more,
    ]


def in_namespace(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a shell script as root of a user and mount namespace of its own; skips where there are none."""
    probe = subprocess.run(["unshare", "-Urm", "true"], capture_output=True) if shutil.which("unshare") else None
    if probe is None or probe.returncode:
        pytest.skip("unshare -Urm does not work here")
    call = ["unshare", "-Urm", "sh", "-c", script, "sh", *map(str, arguments)]
    return subprocess.run(call, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)


class TestI5:
    """Output that cannot be written, input that cannot be read: one line, before any work."""

    @pytest.mark.parametrize("exists", [True, False])
    def test_read_only_output(self, small: tuple[Path, Path], tmp_path: Path, exists: bool) -> None:
        disk = tmp_path / "disk"
        (disk / "set").mkdir(parents=True) if exists else disk.mkdir()
        script = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && shift && exec "$@"'
        done = in_namespace(script, disk, sys.executable, *command(disk / "set", small))
        assert_refused(done, "cannot write", "Read-only file system")
        assert "encode" not in done.stderr
        assert [path.name for path in disk.rglob("*")] == (["set"] if exists else [])

    @pytest.mark.parametrize("which", ["h5", "csv", "images"])
    def test_input_without_permission(self, small: tuple[Path, Path], tmp_path: Path, which: str) -> None:
        if not shutil.which("unshare") or subprocess.run(["unshare", "-U", "true"], capture_output=True).returncode:
            pytest.skip("unshare -U does not work here")
        h5, table = (Path(shutil.copy(path, tmp_path)) for path in small)
        folder = tmp_path / "films"
        folder.mkdir()
        locked = {"h5": h5, "csv": table, "images": folder}[which]
        arguments = ["-m", "ingest", "--to-shards", str(tmp_path / "out"), "--csv", str(table)]
        arguments += ["--images", str(folder), "--path-column", "patient"] if which == "images" else ["--h5", str(h5)]
        locked.chmod(0)
        try:
            # Without a mapping there are no capabilities, so that root's files can be closed to root.
            call = ["unshare", "-U", sys.executable, *arguments]
            done = subprocess.run(call, cwd=REPOSITORY, capture_output=True, text=True)
        finally:
            locked.chmod(0o700)
        assert_refused(done, locked.name)
        assert "ermission" in done.stderr or "may not be read" in done.stderr
        assert not (tmp_path / "out").exists()

    def test_input_that_is_something_else(self, small: tuple[Path, Path], tmp_path: Path) -> None:
        folder = tmp_path / "folder"
        folder.mkdir()
        for h5, table, words in ((folder, small[1], "no HDF5 file"), (small[0], folder, "cannot read")):
            with pytest.raises(InputError, match=words):
                read_inputs(IngestConfig(to_shards=tmp_path / "out", h5=(h5,), csv=(table,)))

    def test_films_and_labels_beyond_what_a_shard_takes(self, small: tuple[Path, Path], tmp_path: Path) -> None:
        names = [f"label{number}" for number in range(1001)]
        table = write_csv(tmp_path / "a.csv", ["impression", *names], [["x"] + [1] * 1001] * 12)
        config = IngestConfig(to_shards=tmp_path / "out", h5=(small[0],), csv=(table,), label_columns=tuple(names))
        with pytest.raises(InputError, match="1,001 labels"):
            read_inputs(config)
        (tmp_path / "1").touch()
        with pytest.raises(InputError, match="films of 5000 x 5000"):
            read_inputs(
                IngestConfig(
                    to_shards=tmp_path / "out", images=tmp_path, path_column="label0", csv=(table,), image_size=5000
                )
            )


def test_a_dataset_that_is_not_there(tmp_path: Path) -> None:
    """A file may have a dataset a patient: the message lists no names that could be theirs, and no pixels."""
    for names, words in (
        (["films"], "it holds 'films'$"),
        (["a/films", "a/b/films", "masks"], "it holds 'a/b/films', 'a/films', 'masks'$"),
        (["MRN77/film", "films"], "there are 2 other names"),
        (list("abcdefghi"), "there are 9 other names"),
        ([], "there is no dataset in it$"),
    ):
        with h5py.File(tmp_path / "a.h5", "w") as file:
            for name in names:
                file[name] = np.full((2, 3, 3), 123, dtype="u1")
        with pytest.raises(InputError, match=words) as error:
            H5Source(tmp_path / "a.h5")
        assert "MRN" not in str(error.value)
    with pytest.raises(InputError, match=r"'a' of .* is a group; it holds 'a/films'$"):
        H5Source(write_h5(tmp_path / "b.h5", np.zeros((2, 3, 3), np.uint8), dataset="a/films"), "a")
    with pytest.raises(InputError, match=r"it holds 'cxr'$"):
        H5Source(write_h5(tmp_path / "b.h5", np.zeros((2, 3, 3), np.uint8)), "cxr/films")


def test_names_of_datasets_are_looked_for_without_following_links(tmp_path: Path) -> None:
    foreign = write_h5(tmp_path / "elsewhere.h5", made_up_images(1), dataset="theirs")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["a/films"] = np.zeros((2, 3, 3), np.uint8)
        file["a/again"] = file["/"]  # a circle
        file["a/loop"] = h5py.SoftLink("/a/loop")
        file["far"] = h5py.ExternalLink(str(foreign), "/")
    with pytest.raises(InputError, match=r"it holds 'a/films'$"):
        H5Source(tmp_path / "a.h5")
    for name in ("a/loop", "a/loop/films", "far/theirs"):
        with pytest.raises(InputError, match="reached through a link"):
            H5Source(tmp_path / "a.h5", name)
    with h5py.File(tmp_path / "a.h5", "a") as file:
        for number in range(1100):
            file[f"patients/{number}"] = np.uint8(0)
    with pytest.raises(InputError, match="there are more than 1,000 other names"):
        H5Source(tmp_path / "a.h5")


@pytest.mark.parametrize(
    ("shape", "chunks", "words"),
    [
        ((3, 2000, 2000), (1, 20, 2000), None),  # 100 pieces
        ((3, 40, 40), (1, 1, 1), "films are cut into 1,600 pieces"),
        ((4000, 200, 200), (3000, 100, 100), "480,000,000 bytes have to be read at once"),
    ],
)
def test_chunks_that_cut_films(
    tmp_path: Path, shape: tuple[int, ...], chunks: tuple[int, ...], words: str | None
) -> None:
    """Few pieces are read like any others; what would take the memory is refused, with the command that mends it."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("films", shape, "f4", chunks=chunks, fillvalue=7)
        if words is None:
            file["films"][:] = 9
    if words is None:
        with H5Source(tmp_path / "a.h5", "films") as films:
            assert (films.read_uint8(0, 3) == 9).all()
        return
    with pytest.raises(InputError, match=words) as error:
        H5Source(tmp_path / "a.h5", "films")
    assert "h5repack -l films:CHUNK=32x" in str(error.value)


def test_films_in_many_pieces_are_read_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HDF5 takes 7 KB for each chunk that a read touches: 32 films of 1,024 pieces took a worker 250 MB."""
    images = np.random.default_rng(0).integers(0, 256, (40, 64, 64), dtype=np.uint8)
    reads, read = [], H5Source.read

    def note(self: H5Source, first: int, end: int) -> np.ndarray:
        reads.append(end - first)
        return read(self, first, end)

    monkeypatch.setattr(H5Source, "read", note)
    for chunks, most in ((1, 2, 2), 1), ((1, 4, 4), 4), ((3, 4, 4), 12), ((7, 2, 2), 7), ((1, 16, 16), 32):
        reads.clear()
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file.create_dataset("cxr", data=images, chunks=chunks)
        with H5Films(SourceConfig(h5=(tmp_path / "a.h5",))) as films:
            assert (np.stack(list(films.read(0, 40))) == images).all()  # type: ignore[arg-type]
        assert max(reads) == most, chunks


def test_pixels_that_are_no_numbers_are_no_grey_levels(tmp_path: Path) -> None:
    for value in (np.nan, np.inf, -np.inf):
        images = np.zeros((4, 3, 3), np.float32)
        images[2, 1, 1] = value
        for value_range in ((0.0, 1.0), None):
            with (
                H5Source(write_h5(tmp_path / "a.h5", images)) as films,
                pytest.raises(InputError, match=r"row 2 of .* that are no number"),
            ):
                films.read_uint8(0, 4, value_range)


def test_films_longer_than_a_codec_takes(tmp_path: Path) -> None:
    h5 = write_h5(tmp_path / "a.h5", np.zeros((1, 2, 16_384), np.uint8))
    table = write_csv(tmp_path / "a.csv", ["impression"], [["x"]])
    with pytest.raises(InputError, match="16,383 pixels are the longest side"):
        read_inputs(IngestConfig(to_shards=tmp_path / "out", h5=(h5,), csv=(table,)))


@pytest.mark.parametrize("value", ["1_0", "\uff11", "inf", "nan", "yes", "--1", "1e39", "-10000", "20170125"])
def test_labels_that_are_no_labels(small: tuple[Path, Path], tmp_path: Path, value: str) -> None:
    """No numbers, or such as ids and dates have: they would stand in the shards, for whoever gets them."""
    rows = [["x", label] for label in ("1", " -1 ", "", "2.5e-1", "+1.", value)]
    table = write_csv(tmp_path / "a.csv", ["impression", "L"], rows)
    with pytest.raises(InputError, match=r"row 5 of label column 'L' (is neither|has a number of)") as error:
        read_table(SourceConfig(h5=(small[0],), csv=(table,), label_columns=("L",)))
    assert value not in str(error.value)


def test_a_label_of_very_many_numbers_is_an_id_and_of_some_a_warning(tmp_path: Path) -> None:
    def config(numbers: list[float]) -> IngestConfig:
        table = write_csv(tmp_path / "a.csv", ["impression", "L", "Edema"], [["x", each, -1] for each in numbers])
        h5 = write_h5(tmp_path / "a.h5", np.zeros((len(numbers), 3, 3), np.uint8))
        return IngestConfig(to_shards=tmp_path / "out", h5=(h5,), csv=(table,), label_columns=("L", "Edema"))

    with pytest.raises(InputError, match="label column 'L' has 201 different whole numbers beyond -1 to 1"):
        read_inputs(config(list(range(2, 203))))
    days = [float(31 * each) for each in range(1200)]  # 0 to 101 years
    with pytest.raises(InputError, match="row 323 of label column 'L' has a number of five digits or more"):
        read_inputs(config(days))
    taken = dataclasses.replace(config(days), allow_label_numbers=True)
    assert read_inputs(taken).labels[:, 0].tolist() == days
    with pytest.raises(InputError, match="row 1 of label column 'L' has a number of 16,777,216 or more"):
        read_inputs(dataclasses.replace(config([0, -20170125]), allow_label_numbers=True))
    for numbers in ([each / 1000 for each in range(500)], list(range(2, 202)), [each / 10 for each in range(950)]):
        line = next(line for line in dry_run(config(numbers)) if line.startswith("labels with numbers"))
        assert line.endswith(": L")
    assert not any("labels with" in line for line in dry_run(config([1, 0, -1])))


class TestI9:
    """Text."""

    def test_what_excel_writes(self, tmp_path: Path) -> None:
        """Columns without a name, semicolons, Windows letters, UTF-16: read where that is safe, else how to mend it."""
        path = tmp_path / "a.csv"
        config = SourceConfig(h5=(path,), csv=(path,))
        path.write_text("impression,,\r\nfine,,\r\n")
        assert read_table(config).texts.to_pylist() == ["fine"]
        for text, encoding, words in (
            ("impression;id\nGröße;7\n", "cp1252", "one column, and ';' in its name; save it with commas"),
            ("id,impression\n7,Größe\n", "cp1252", "row 0 of .* is not UTF-8; .*iconv -f CP1252"),
            ("id,impression\n7,Größe\n", "utf-16", "header of .* not CSV in UTF-8; .*iconv -f UTF-16 -t UTF-8"),
            (" impression,id,\nfine,7,\n", "utf-8", "columns are a.csv: ' impression', id"),
        ):
            path.write_text(text, encoding=encoding)
            with pytest.raises(InputError, match=words):
                read_table(config)

    def test_bytes_that_are_not_utf_8_are_named_by_their_row(self, tmp_path: Path) -> None:
        path = tmp_path / "a.csv"
        for row in (0, 7, 2999):
            lines = [b"id,impression\n"] + [b'%d,"Gr\xc3\xb6\xc3\x9fe,\nnormal"\n' % i for i in range(3000)]
            lines[row + 1] = b"%d,CANARY caf\xe9\n" % row
            path.write_bytes(b"".join(lines))
            with pytest.raises(InputError) as error:
                read_table(SourceConfig(h5=(path,), csv=(path,)))
            assert f"row {row} of" in str(error.value) and "UTF-8" in str(error.value)
            assert "CANARY" not in str(error.value) and "caf" not in str(error.value)

    @pytest.mark.parametrize("junk", [b"\xed\xa0\x80", b"\xc0\xaf", b"\xf5\x80\x80\x80", b"\xff\xfea\0"])
    def test_what_only_resembles_utf_8(self, tmp_path: Path, junk: bytes) -> None:
        """Surrogates, overlong forms, beyond Unicode, UTF-16."""
        (tmp_path / "a.csv").write_bytes(b"impression\nfine\n" + junk + b"\n")
        with pytest.raises(InputError, match=r"row 1 of .* is not UTF-8"):
            read_table(SourceConfig(h5=(tmp_path,), csv=(tmp_path / "a.csv",)))

    def test_odd_but_right_text_comes_through_to_the_byte(self, tmp_path: Path) -> None:
        """From the CSV to tar and table; `test_text_is_kept_exactly` has more of them."""
        texts = [
            "N/A",
            "nan",
            "null",
            "\u200f\u202e\u0645\u0631\u062d\u0628\u0627",
            "👩‍⚕️🫁",
            "a\tb\x0b\x0c\x1b[31m\x7f",
            "\ufeffbom",
            "e\u0301 é",
            "x" * (1 << 20),
        ]
        h5 = write_h5(tmp_path / "a.h5", made_up_images(len(texts)))
        table = write_csv(tmp_path / "a.csv", ["impression"], [[text] for text in texts])
        out = tmp_path / "out"
        done = run_module("ingest", "--to-shards", out, "--h5", h5, "--csv", table, "--workers", "1")
        assert done.returncode == 0, done.stderr
        rows = table_of(out)
        assert {row["row"]: row["text"] for row in rows.values()} == dict(enumerate(texts))
        assert set(rows) == {sample_key(0, row) for row in range(len(texts))}  # keys come from the rows alone
        import tarfile

        with tarfile.open(out / "train-000000.tar") as archive:
            for row, text in enumerate(texts):
                member = archive.extractfile(f"{sample_key(0, row)}.txt")
                assert member is not None and member.read() == text.encode()
        assert run_module("shards", "verify", out).returncode == 0

    def test_the_size_cap_is_said(self, tmp_path: Path) -> None:
        """A field of 200 MB is an unclosed quote far more often than a report."""
        path = tmp_path / "a.csv"
        with open(path, "wb") as file:
            file.write(b"impression\nfine\n")
            for _ in range(200):
                file.write(b"x" * 999_999 + b"\n" if _ else b'"' + b"x" * 999_998 + b"\n")
        with pytest.raises(InputError, match=rf"row 1 of .*field larger than field limit \({MAX_FIELD}\)"):
            read_table(SourceConfig(h5=(path,), csv=(path,)))

    @pytest.mark.parametrize("content", ["Path,impression\n", "Path,impression"])
    def test_a_header_alone(self, tmp_path: Path, content: str) -> None:
        table = tmp_path / "a.csv"
        table.write_text(content)
        for films in ({"images": tmp_path}, {"h5": (write_h5(tmp_path / "a.h5", made_up_images(2)),)}):
            config = IngestConfig(to_shards=tmp_path / "out", csv=(table,), **films)
            with pytest.raises(InputError, match=r"a\.csv: a header and no row"):
                read_inputs(config)

    def test_report_files(self, tmp_path: Path) -> None:
        """Whatever a CSV names as a report file, the row is rejected or the report is read; nothing hangs."""
        folder = tmp_path / "reports"
        folder.mkdir()
        (folder / "a.txt").write_bytes(b"IMPRESSION: caf\xe9")
        (folder / "b.xml").write_bytes(
            b'<?xml version="1.0" encoding="big5"?><a><AbstractText Label="IMPRESSION">x</AbstractText></a>'
        )
        (folder / "c.xml").write_bytes(b"<a>" * 100_000)
        (folder / "big.txt").write_bytes(b"x" * (1 << 21))
        (folder / "good.txt").write_text("IMPRESSION: Fine.")
        (folder / "folder").mkdir()
        os.mkfifo(folder / "pipe")
        names = ["a.txt", "b.xml", "c.xml", "big.txt", "pipe", "folder", "x\0y", "n" * 5000, "../a.csv", "good.txt"]
        table = write_csv(tmp_path / "a.csv", ["impression"], [[name] for name in names])
        config = SourceConfig(h5=(table,), csv=(table,), text_folder=folder, section="impression")
        found = read_table(config)
        assert sorted(found.reasons) == list(range(9)) and found.texts.to_pylist()[9] == "Fine."

    def test_image_files(self, tmp_path: Path) -> None:
        from ingest.films import FolderFilms
        from ingest.images import Fault

        folder = tmp_path / "films"
        (folder / "folder").mkdir(parents=True)
        os.mkfifo(folder / "pipe")
        (folder / "loop").symlink_to("loop")
        (folder / "null").symlink_to("/dev/zero")
        names = ["pipe", "folder", "loop", "null", "x\0y", "n" * 5000, "a/" * 3000, "/etc/hostname", "..", ".", ""]
        films = FolderFilms(SourceConfig(images=folder), names, 0)
        assert films.stamp()
        assert set(films.read(0, len(names))) <= {Fault.MISSING, Fault.UNREADABLE}


class TestI10:
    """Ids."""

    def test_patients_are_who_they_are_written_as(self, tmp_path: Path) -> None:
        """`007` is not `7`, `p1` not `P1`; dots and slashes mean nothing; blanks around an id do not make another."""
        ids = ["7", "007", "7.0", "p1", "P1", "../../etc", "a/b", "..", ".", "é", "e\u0301", "7 ", " 007", "NA"]
        h5 = write_h5(tmp_path / "a.h5", made_up_images(len(ids)))
        table = write_csv(tmp_path / "a.csv", ["impression", "id"], [[f"Film {i}", each] for i, each in enumerate(ids)])
        config = IngestConfig(to_shards=tmp_path / "out", h5=(h5,), csv=(table,), group_column="id")
        groups = read_inputs(config).plan.groups.tolist()
        assert len(set(groups)) == len(ids) - 2 and groups[0] == groups[11] and groups[1] == groups[12]

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "films"
        folder.mkdir()
        for number, image in enumerate(made_up_images(8)):
            Image.fromarray(image).save(folder / f"{number}.png")
        return folder

    def test_rows_that_share_an_image_file(self, folder: Path, tmp_path: Path) -> None:
        """Two reports of one film are two samples; in two splits they would leak it, which is refused."""
        names = [f"{i // 2}.png" if i % 2 else f"./{i // 2}.png" for i in range(16)]
        rows = [[name, f"Report {i}", i % 2] for i, name in enumerate(names)]
        table = write_csv(tmp_path / "a.csv", ["Path", "impression", "reader"], rows)

        def config(**settings: object) -> IngestConfig:
            return IngestConfig(to_shards=tmp_path / "out", images=folder, csv=(table,), **settings)

        assert len(read_inputs(config()).plan.order["train"]) == 16
        with pytest.raises(InputError, match=r"row \d+ and row \d+ name the same image file"):
            read_inputs(config(val_fraction=0.5))
        with pytest.raises(InputError, match="name the same image file"):
            read_inputs(config(val_fraction=0.5, group_column="reader"))
        plan = read_inputs(config(val_fraction=0.5, group_column="Path", group_regex=r"\d+")).plan
        assert len(plan.order["val"]) == 8
        assert {i // 2 for i in plan.order["val"]}.isdisjoint({i // 2 for i in plan.order["train"]})

    def test_columns_and_files_named_twice(self, small: tuple[Path, Path], tmp_path: Path) -> None:
        twice = write_csv(tmp_path / "b.csv", ["impression", "impression"], [["a", "b"]] * 12)
        for files, words in (
            ((twice,), "names a column twice"),
            ((small[1], twice), "twice"),
        ):
            with pytest.raises(InputError, match=words):
                read_table(SourceConfig(h5=(small[0],), csv=files))


ELSEWHERE = {
    "external link": "reached through a link",
    "link on the way": "reached through a link",
    "soft link": "reached through a link",
    "virtual": "from other files (virtual",
    "external storage": "from other files (virtual or external",
}
"""Way in which HDF5 can point elsewhere -> what the refusal says."""


def write_pointer(path: Path, kind: str, foreign: Path) -> None:
    """An HDF5 file whose films are in another one."""
    shape = (12, 320, 320)
    with h5py.File(path, "w") as file:
        if kind == "external link":
            file["cxr"] = h5py.ExternalLink(str(foreign), "/cxr")
        elif kind == "link on the way":
            file["group"] = h5py.ExternalLink(str(foreign), "/")
        elif kind == "soft link":
            file["far"] = h5py.ExternalLink(str(foreign), "/cxr")
            file["cxr"] = h5py.SoftLink("/far")
        elif kind == "virtual":
            layout = h5py.VirtualLayout(shape=shape, dtype="u1")
            layout[:] = h5py.VirtualSource(str(foreign), "cxr", shape=shape)
            file.create_virtual_dataset("cxr", layout)
        else:
            file.create_dataset("cxr", shape, "u1", external=[(str(foreign), 0, h5py.h5f.UNLIMITED)])


class TestI11:
    """HDF5 that lies."""

    def test_no_foreign_file_is_opened(self, small: tuple[Path, Path], tmp_path: Path) -> None:
        """strace sees every open of an ingest, for every way in which HDF5 can point elsewhere."""
        if shutil.which("strace") is None:
            pytest.skip("strace is not installed")
        foreign = write_h5(tmp_path / "elsewhere.h5", made_up_images(12))
        for number, kind in enumerate(ELSEWHERE):
            write_pointer(tmp_path / f"{number}.h5", kind, foreign)
        # One traced interpreter for all of them: starting it under strace takes longer than the rest.
        code = (
            "import sys\nfrom ingest.__main__ import main\n"
            "for h5, name in zip(sys.argv[3:], ['cxr', 'group/cxr', 'cxr', 'cxr', 'cxr']):\n"
            "    try:\n"
            "        main(['--to-shards', sys.argv[1], '--csv', sys.argv[2], '--h5', h5, '--dataset', name])\n"
            "    except SystemExit as stop:\n"
            "        print(stop.code)\n"
        )
        log = tmp_path / "log"
        call = ["strace", "-f", "-qq", "-e", "trace=openat,open,openat2", "-o", str(log), sys.executable, "-c", code]
        paths = [str(tmp_path / f"{number}.h5") for number in range(len(ELSEWHERE))]
        done = subprocess.run(
            [*call, str(tmp_path / "out"), str(small[1]), *paths], cwd=REPOSITORY, capture_output=True, text=True
        )
        opened = log.read_text() if log.exists() else ""
        if "4.h5" not in opened:
            pytest.skip("strace cannot trace here")
        assert done.stdout.split() == ["2"] * len(ELSEWHERE)
        for line, words in zip(done.stderr.splitlines(), ELSEWHERE.values(), strict=True):
            assert words in line
        assert "elsewhere.h5" not in opened and not (tmp_path / "out").exists()

    def test_a_shape_bomb_takes_no_memory(self, tmp_path: Path) -> None:
        """172 TB declared in a file of some kilobytes: refused within 100 MB."""
        path = tmp_path / "bomb.h5"
        with h5py.File(path, "w") as file:
            file.create_dataset("chunked", (420_000_000, 320, 320), "f4", chunks=(1, 320, 320))
            file.create_dataset("wide", (2, 10**6, 10**6), "f4", chunks=(1, 10**3, 10**6))
            plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            plist.set_alloc_time(h5py.h5d.ALLOC_TIME_LATE)
            space = h5py.h5s.create_simple((420_000_000, 320, 320))
            h5py.h5d.create(file.id, b"contiguous", h5py.h5t.IEEE_F32LE, space, plist)
        assert path.stat().st_size < 10_000
        code = (
            "import sys\nfrom pathlib import Path\nfrom ingest.source import H5Source\n"
            "from shards.errors import InputError\n"
            "kb = lambda field: int(Path('/proc/self/status').read_text().split(field + ':')[1].split()[0])\n"
            "before = kb('VmRSS')\n"
            "for name in ('chunked', 'wide', 'contiguous'):\n"
            "    try:\n        H5Source(Path(sys.argv[1]), name)\n"
            "    except InputError as error:\n        print('refused')\n"
            "print(kb('VmHWM') - before)"
        )
        done = subprocess.run([sys.executable, "-c", code, path], cwd=REPOSITORY, capture_output=True, text=True)
        *refused, kilobytes = done.stdout.split()
        assert refused == ["refused"] * 3 and int(kilobytes) < 100_000, (done.stdout, done.stderr)

    def test_cut_and_flipped_files(self, tmp_path: Path) -> None:
        """Chunked, compressed and checksummed: whatever is hit, a line or the right films; never a crash."""
        images, good = made_up_images(8), tmp_path / "good.h5"
        with h5py.File(good, "w", libver="latest") as file:
            file.create_dataset("cxr", data=images, chunks=(2, 320, 320), compression="gzip", fletcher32=True)
        np.save(tmp_path / "images.npy", images)
        content, rng = good.read_bytes(), np.random.default_rng(0)
        for number in range(60):
            bad = bytearray(content[: int(rng.integers(1, len(content)))] if number % 4 == 0 else content)
            if number % 4:
                bad[rng.integers(0, 3000 if number % 4 < 3 else len(bad))] ^= 1 << int(rng.integers(8))
            (tmp_path / f"{number}.h5").write_bytes(bad)
        code = (
            "import sys\nimport numpy as np\nfrom pathlib import Path\nfrom ingest.source import H5Source\n"
            "from shards.errors import InputError\n"
            "images = np.load(sys.argv[1])\n"
            "for path in sys.argv[2:]:\n"
            "    try:\n"
            "        with H5Source(Path(path)) as source:\n"
            "            same = np.array_equal(source.read_uint8(0, source.rows), images)\n"
            "        print('same' if same else 'other')\n"
            "    except InputError as error:\n"
            "        print('refused' if '\\n' not in str(error) else 'lines')\n"
        )
        paths = [str(tmp_path / f"{number}.h5") for number in range(60)]
        call = [sys.executable, "-c", code, str(tmp_path / "images.npy"), *paths]
        done = subprocess.run(call, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
        said = done.stdout.split()
        assert done.returncode == 0 and len(said) == 60, done.stderr[-2000:]
        assert set(said) <= {"same", "refused"} and said.count("refused") >= 20, said

    def test_a_filter_that_hdf5_does_not_bring(self, tmp_path: Path) -> None:
        """Its plug-in would be code of somebody else's."""
        path = tmp_path / "a.h5"
        with h5py.File(path, "w") as file:
            plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            plist.set_chunk((1, 320, 320))
            plist.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, ())  # zstd's number
            space = h5py.h5s.create_simple((12, 320, 320))
            data = h5py.Dataset(h5py.h5d.create(file.id, b"cxr", h5py.h5t.NATIVE_UINT8, space, plist))
            data[:] = made_up_images(12)
        with pytest.raises(InputError, match="filter that HDF5 does not bring itself; repack it"):
            H5Source(path)
