"""Everything a lab's films and reports may lie in, and what must come out of it."""

import csv
import errno
import io
import os
import resource
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import assert_refused, made_up_images, run_module, write_csv, write_h5
from PIL import Image

from ingest.config import IngestConfig, SourceConfig, read_sources
from ingest.encode import blank
from ingest.films import FolderFilms, H5File, H5Films
from ingest.images import Fault, read_film
from ingest.inputs import read_inputs
from ingest.notes import order_lines
from ingest.plan import Plan, _by_fraction
from ingest.reports import cut_section
from ingest.run import ingest
from ingest.source import H5Source
from ingest.table import read_table
from ingest.trial import dry_run, settle
from ingest.workdir import finished_set
from shards.encodings import ENCODINGS, decode, encode
from shards.errors import InputError
from shards.manifest import read_manifest
from shards.reader import ShardReader
from shards.schema import ImageSpec
from shards.verify import verify


def samples(root: Path) -> dict[str, dict]:
    """Key -> row of the table, with its split and decoded pixels."""
    manifest = read_manifest(root)
    found = {}
    for split, shards in manifest.splits.items():
        for info in shards:
            with ShardReader(root, manifest, info) as reader:
                for row in reader.read_table().to_pylist():
                    content = os.pread(reader.fd, row["size"], row["offset"])
                    found[row["key"]] = row | {"split": split, "pixels": decode(content, manifest.image)}
    return found


def _films(config: IngestConfig) -> H5Films | FolderFilms:
    """The films of a config's one source."""
    (source,) = config.source_list()
    return H5Films(source) if source.h5 else FolderFilms(source, read_table(source).names, 0)


def run(out: Path, **settings) -> dict[str, dict]:
    ingest(IngestConfig(to_shards=out, workers=1, **settings))
    assert [problem for _, problem in verify(out) if problem] == []
    return samples(out)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return made_up_images(40)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "r.csv", ["impression"], [[f"Film {i}"] for i in range(40)])


def key(row: int, source: int = 0) -> str:
    return f"{source:02d}-{row:010d}"


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "float64"])
@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"chunks": (7, 320, 320)},
        {"chunks": (16, 320, 320), "compression": "gzip"},
        {"compression": "lzf"},  # chunks that h5py chooses, which cut films
    ],
)
def test_every_dtype_and_layout_gives_the_same_pixels(
    tmp_path: Path, images: np.ndarray, table: Path, dtype: str, layout: dict
) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        films = file.create_dataset("group/films", data=images.astype(dtype), **layout)
        assert films.chunks is None or films.chunks[1] == 320 or layout == {"compression": "lzf"}
    settings = {"h5": (tmp_path / "a.h5",), "dataset": "group/films", "csv": (table,), "encoding": "raw"}
    found = run(tmp_path / "out", **settings)
    assert len(found) == 40
    assert all((found[key(row)]["pixels"] == images[row]).all() for row in range(40))


def test_several_files_are_one_source(tmp_path: Path, images: np.ndarray, table: Path) -> None:
    parts = [write_h5(tmp_path / f"{n}.h5", images[a:b]) for n, (a, b) in enumerate([(0, 3), (3, 17), (17, 40)])]
    found = run(tmp_path / "out", h5=tuple(parts), csv=(table,), encoding="png")
    assert all((found[key(row)]["pixels"] == images[row]).all() for row in range(40))


def test_films_of_two_sizes_are_told_apart_by_their_files(tmp_path: Path, images: np.ndarray) -> None:
    files = tuple(write_h5(tmp_path / f"{side}.h5", images[:4, :side]) for side in (9, 8))
    with pytest.raises(InputError, match=r"8.h5 holds films of 8 x 320, \S*9.h5 of 9 x 320; a set needs one size"):
        H5Films(SourceConfig(h5=files))
    write_csv(tmp_path / "a.csv", ["impression"], [["x"]] * 4)
    (tmp_path / "s.toml").write_text("".join(f'[[source]]\nh5 = "{side}.h5"\ncsv = "a.csv"\n' for side in (9, 8)))
    with pytest.raises(InputError, match="films of source 1 have 8 x 320 pixels, those of source 0 9 x 320"):
        read_inputs(IngestConfig(to_shards=tmp_path / "out", sources=tmp_path / "s.toml"))


def test_folders_in_the_order_of_a_shell_are_told_apart() -> None:
    files = tuple(Path("films", str(number), "cxr.h5") for number in (1, 10, 2))
    assert any("films/10/cxr.h5 before films/2/cxr.h5" in line for line in order_lines([SourceConfig(h5=files)]))


def test_files_in_the_order_of_a_shell_are_said_to_be(tmp_path: Path, images: np.ndarray, table: Path) -> None:
    names = [f"films-{number}.h5" for number in (1, 10, 2, 3)]
    for number, name in enumerate(names):
        write_h5(tmp_path / name, images[number * 10 : number * 10 + 10])

    def lines(order: list[str]) -> list[str]:
        config = IngestConfig(to_shards=tmp_path / "out", h5=tuple(tmp_path / name for name in order), csv=(table,))
        return [line for line in dry_run(config) if "read as given" in line]

    assert len(said := lines(names)) == 1 and "films-10.h5 before films-2.h5" in said[0]
    assert not lines([names[0], *names[2:], names[1]])
    (tmp_path / "all.h5").symlink_to(tmp_path / names[1])
    assert not lines(["films-1.h5", "all.h5", *names[2:]])  # no numbering


def test_value_range_is_explicit(tmp_path: Path, table: Path) -> None:
    hounsfield = np.linspace(-1024, 3071, 40 * 320 * 320).reshape(40, 320, 320)
    h5 = write_h5(tmp_path / "ct.h5", hounsfield.astype(np.float32))
    command = ["ingest", "--to-shards", tmp_path / "out", "--h5", h5, "--csv", table, "--encoding", "raw"]
    assert_refused(run_module(*command), "row 0 of", "-1024", "--value-range LO HI")
    assert not (tmp_path / "out").exists()  # so that the same folder serves once the range is given
    found = run(tmp_path / "two", h5=(h5,), csv=(table,), encoding="raw", value_range=(-1000.0, 3000.0))
    # The first film lies below black altogether: nothing to see, so it is rejected.
    expected = np.clip(np.rint((hounsfield[20] + 1000) / 4000 * 255), 0, 255)
    assert (found[key(20)]["pixels"] == expected).all()
    unit = write_h5(tmp_path / "unit.h5", np.random.default_rng(0).random((40, 320, 320)).astype(np.float32))
    assert_refused(
        run_module("ingest", "--to-shards", tmp_path / "u", "--h5", unit, "--csv", table),
        "row 0 of",
        "not all whole numbers",
    )


def test_blank_films_become_samples_on_request(tmp_path: Path, images: np.ndarray, table: Path) -> None:
    """I8: rejected, counted and refused in number without --allow-blank; samples like any other with it."""
    blank = images.copy()
    blank[3], blank[5:9] = 0, 77
    h5 = write_h5(tmp_path / "a.h5", blank)
    settings = {"h5": (h5,), "csv": (table,), "encoding": "raw"}
    with pytest.raises(InputError, match=r"5 of 40 rows are rejected \(4: film is constant\)"):
        run(tmp_path / "one", max_rejects=0.1, **settings)
    assert not (tmp_path / "one" / "manifest.json").exists()
    assert set(run(tmp_path / "two", **settings)) == {key(row) for row in range(40) if row not in (3, *range(5, 9))}
    (tmp_path / "s.toml").write_text('[[source]]\nh5 = "a.h5"\ncsv = "r.csv"\nallow_blank = true\n')
    for name, given in (("three", settings | {"allow_blank": True}), ("four", {"sources": tmp_path / "s.toml"})):
        found = run(tmp_path / name, max_rejects=0.0, **({"encoding": "raw"} | given))
        assert len(found) == 40
        assert (found[key(3)]["pixels"] == 0).all() and (found[key(7)]["pixels"] == 77).all()


def test_of_many_files_only_those_are_opened_that_are_read(
    tmp_path: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an earlier look said how many rows each has."""
    cuts = np.array_split(images.astype(np.float32), 3)
    files = tuple(write_h5(tmp_path / f"{number}.h5", cut) for number, cut in enumerate(cuts))
    source = SourceConfig(h5=files)
    with H5Films(source) as films:
        known, ranges = films.files, list(films.ranges(1000))
    opened: list[Path] = []

    def noted(path: Path, name: str, *, counted: bool) -> H5Source:
        assert counted
        opened.append(path)
        return H5Source(path, name, counted=counted)

    monkeypatch.setattr("ingest.films.H5Source", noted)
    with H5Films(source, known) as films:
        assert np.array_equal(list(films.read(*ranges[1])), cuts[1])
        assert set(films.stored(*ranges[2])) == {320 * 320 * 4}
    assert [file.rows for file in known] == list(map(len, cuts)) and opened == [files[1]]


def test_rows_that_were_never_written_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HDF5 would give them as black; who opens a file again does not look at half a million chunks for them again."""
    source = SourceConfig(h5=(tmp_path / "a.h5",))
    for chunks in ((10, 8, 8), (10, 4, 8)):
        with h5py.File(tmp_path / "a.h5", "w") as file:
            films = file.create_dataset("cxr", (100, 8, 8), "u1", chunks=chunks)
            films[:30], films[40:, 4:] = 7, 7
        with pytest.raises(
            InputError,
            match=r"10 chunks but stores 9; the others, from row 30 on"
            if chunks == (10, 8, 8)
            else r"20 chunks but stores 12; the others, from row 30 on",
        ):
            H5Films(source)
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["cxr"][:] = 7
    with H5Films(source) as films:
        known = films.files
    monkeypatch.setattr("ingest.h5._count_chunks", lambda *_: pytest.fail("counted again"))
    monkeypatch.setattr(H5Source, "stored_bytes", property(lambda _: pytest.fail("counted again")))
    with H5Films(source, known) as films:
        assert len(list(films.read(0, 100))) == 100 and films.stored(0, 9).tolist() == [64] * 9


def test_more_hdf5_files_than_a_process_may_open(tmp_path: Path, images: np.ndarray) -> None:
    path = write_h5(tmp_path / "a.h5", images.astype(np.float32))
    most, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, hard))
    try:
        with H5Films(SourceConfig(h5=(path,) * 20)) as films:
            assert films.rows == 20 * len(images) and len(list(films.ranges(1000))) == 20
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def test_a_file_that_grew_since_it_was_looked_at_is_refused(tmp_path: Path, images: np.ndarray) -> None:
    """Its rows would be taken for those of the next file."""
    source = SourceConfig(h5=(write_h5(tmp_path / "a.h5", images.astype(np.float32)),))
    files = (H5File(len(images) - 1, 1),)
    with H5Films(source, files) as films, pytest.raises(InputError, match=r"1 of 1 has 40 films, 39 when"):
        next(films.read(0, 1))


@pytest.mark.parametrize("what", ["h5", "csv"])
def test_what_changes_after_it_was_looked_at_is_told(
    tmp_path: Path, images: np.ndarray, table: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Be it before the output folder is made: workers do not count the chunks again, and would read black films."""
    path = tmp_path / "a.h5"

    def store(rows: int) -> None:
        with h5py.File(path, "w") as file:
            file.create_dataset("cxr", images.shape, "u1", chunks=(4, 320, 320))[:rows] = images[:rows]

    def settle_later(*given: Any) -> Any:
        if what == "h5":
            store(36)
        else:
            table.write_text(table.read_text().replace("Film", "Chest"))
        return settle(*given)

    store(40)
    monkeypatch.setattr("ingest.run.settle", settle_later)
    config = IngestConfig(to_shards=tmp_path / "out", h5=(path,), csv=(table,), workers=1, allow_blank=True)
    with pytest.raises(InputError, match=rf"^--{what} \(file 1, its .*\) changed while it was read"):
        ingest(config)


@pytest.mark.parametrize("chunks", [None, (10, 8, 8)])
def test_a_file_cut_while_it_is_read_gives_no_black_films(tmp_path: Path, chunks: tuple[int, ...] | None) -> None:
    """HDF5 reads zeros past the end; restored with its old time of change, nobody would look at its films again."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("cxr", data=np.full((100, 8, 8), 7, np.uint8), chunks=chunks)
    with H5Films(SourceConfig(h5=(path,))) as films:
        found = films.read(0, 100)
        next(found)
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(InputError, match="changed while it was read"):
            list(found)


def test_chunks_are_read_once(tmp_path: Path, images: np.ndarray) -> None:
    """Ranges never cut a chunk, and chunks larger than a read are decompressed once."""
    from ingest.config import SourceConfig
    from ingest.films import H5Films

    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("cxr", data=np.repeat(images, 20, axis=0), chunks=(100, 320, 320), compression="gzip")
    with H5Films(SourceConfig(h5=(tmp_path / "a.h5",), csv=(tmp_path,))) as films:
        ranges = list(films.ranges(256))
        assert ranges == [(0, 300), (300, 600), (600, 800)]
        assert sum(1 for _ in films.read(300, 600)) == 300


class TestImageFolder:
    @pytest.fixture
    def folder(self, tmp_path: Path, images: np.ndarray) -> Path:
        folder = tmp_path / "films"
        (folder / "p1").mkdir(parents=True)
        grey = Image.fromarray(images[0])
        grey.save(folder / "grey.png")
        Image.fromarray(images[0].astype(np.uint16) * 257).save(folder / "wide.png")
        grey.convert("RGB").save(folder / "rgb.webp", lossless=True)
        rgba = grey.convert("RGBA")
        rgba.putalpha(7)
        rgba.save(folder / "rgba.png")
        grey.save(folder / "p1" / "really_a_png.jpg", format="PNG")
        exif = Image.Exif()
        exif[0x0112] = 6  # shown turned by 90 degrees clockwise
        grey.rotate(90).save(folder / "turned.png", exif=exif)
        (folder / "text.png").write_text("no image")
        (folder / "cut.png").write_bytes((folder / "grey.png").read_bytes()[:5000])
        Image.fromarray(images[0][:160]).save(folder / "flat.png")
        return folder

    def test_every_kind_of_file_is_the_same_film(self, folder: Path, images: np.ndarray) -> None:
        for name in ("grey.png", "wide.png", "rgb.webp", "rgba.png", "p1/really_a_png.jpg", "turned.png"):
            film = read_film(folder / name, 320)
            assert not isinstance(film, Fault) and (film == images[0]).all(), name

    def test_long_side_is_fitted_and_the_rest_is_black(self, folder: Path, images: np.ndarray) -> None:
        film = read_film(folder / "flat.png", 320)
        assert not isinstance(film, Fault)
        assert (film[80:240] == images[0][:160]).all() and not film[:80].any() and not film[240:].any()

    def test_bad_files_are_faults(self, folder: Path, tmp_path: Path) -> None:
        film = Image.open(folder / "grey.png")
        for name, frames in (("TIFF", Fault.FRAMES), ("PNG", Fault.FRAMES), ("WEBP", Fault.FRAMES), ("MPO", None)):
            film.save(tmp_path / "two", format=name, save_all=True, append_images=[film.rotate(90)])
            found = read_film(tmp_path / "two", 320)
            assert found is frames if frames else not isinstance(found, Fault), name
        film.save(tmp_path / "page.tif")
        page = bytearray((tmp_path / "page.tif").read_bytes())
        at = int.from_bytes(page[4:8], "little")
        link = at + 2 + 12 * int.from_bytes(page[at : at + 2], "little")
        for following, expected in ((at, None), (0xFFFFFFF0, Fault.UNREADABLE)):  # itself; nowhere
            page[link : link + 4] = following.to_bytes(4, "little")
            (tmp_path / "page.tif").write_bytes(page)
            found = read_film(tmp_path / "page.tif", 320)
            assert found is expected if expected else not isinstance(found, Fault)
        assert read_film(folder / "text.png", 320) is Fault.UNREADABLE
        assert read_film(folder / "cut.png", 320) is Fault.UNREADABLE
        assert read_film(folder / "nothing.png", 320) is Fault.MISSING
        # A 1.5 KB file that claims 40,000 x 40,000 pixels.
        bomb = bytearray((folder / "grey.png").read_bytes())
        bomb[16:24] = (40_000).to_bytes(4, "big") * 2
        (tmp_path / "bomb.png").write_bytes(bomb)
        assert read_film(tmp_path / "bomb.png", 320) in (Fault.TOO_LARGE, Fault.UNREADABLE)

    def test_16_bits_must_be_full_or_be_given_a_range(self, tmp_path: Path, images: np.ndarray) -> None:
        """12 or 14 bits in 16 would be shown nearly black; with the range that they use they are the film."""
        film = images[0].astype(np.uint16)
        film[0, 0] = 255
        for scale, expected in (
            (1, Fault.NO_RANGE),
            (16, Fault.NO_RANGE),
            (64, Fault.NO_RANGE),
            (257, None),
            (0, None),
        ):
            wide = film * np.uint16(scale)
            for name in ("a.png", "a.tif"):
                Image.fromarray(wide).save(tmp_path / name)
            Image.frombytes("I;16B", film.shape[::-1], wide.astype(">u2").tobytes()).save(tmp_path / "b.tif")
            for name in ("a.png", "a.tif", "b.tif"):
                found = read_film(tmp_path / name, 320)
                assert found is expected if expected else not isinstance(found, Fault), (scale, name)
                ranged = read_film(tmp_path / name, 320, (0.0, 255.0 * max(scale, 1)))
                assert np.array_equal(ranged, film if scale else film * 0)

    def test_a_range_is_asked_for_before_there_is_anything_to_go_on_with(
        self, tmp_path: Path, images: np.ndarray
    ) -> None:
        names = [f"{number}.png" for number in range(20)]
        table = write_csv(tmp_path / "a.csv", ["Path", "impression"], [[name, "x"] for name in names])
        for number, name in enumerate(names):
            Image.fromarray(images[number].astype(np.uint16) * 16).save(tmp_path / name)
        config = IngestConfig(to_shards=tmp_path / "out", images=tmp_path, csv=(table,))
        with pytest.raises(InputError, match="each of 20 films looked at has more than 8 bits"):
            ingest(config)
        assert not (tmp_path / "out").exists()
        assert read_inputs(replace(config, value_range=(0.0, 4095.0))).notes == ()
        Image.fromarray(images[0]).save(tmp_path / names[0])  # some of them are rejected then, and counted
        (note,) = read_inputs(config).notes
        assert "19 of 20 films looked at will be rejected" in note and "--value-range" in note

    @pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
    def test_a_range_is_of_8_bits_too_where_they_can_hold_it(
        self, tmp_path: Path, images: np.ndarray, mode: str
    ) -> None:
        """As of an HDF5 file of bytes; one of 12 bits is of other films that may lie beside them, and said to be."""
        names = [f"{number}.png" for number in range(20)]
        table = write_csv(tmp_path / "a.csv", ["Path", "impression"], [[name, "x"] for name in names])
        for name, film in zip(names, images, strict=False):
            Image.fromarray(film).convert(mode).save(tmp_path / name)
        h5 = write_h5(tmp_path / "a.h5", images[:20])
        files = IngestConfig(to_shards=tmp_path / "a", images=tmp_path, csv=(table,), encoding="raw")
        data = replace(files, to_shards=tmp_path / "b", images=None, h5=(h5,))
        expected = np.clip(np.rint((images[3] - 60.0) * (255 / 100)), 0, 255)
        for source in (files, data):
            config = replace(source, value_range=(60.0, 160.0), workers=1)
            assert read_inputs(config).notes == ()
            ingest(config)
            assert np.array_equal(samples(config.to_shards)[key(3)]["pixels"], expected)
            for value_range in ((0.0, 4095.0), (-1.0, 200.0)):
                config = replace(source, value_range=value_range, to_shards=tmp_path / "none")
                assert "--value-range changes none of 20 films looked at" in read_inputs(config).notes[0]
                assert any("--value-range changes none" in line for line in dry_run(config))
                found = next(_films(config).read(3, 4))
                assert np.array_equal(found, images[3])

    def test_a_range_of_other_films_that_washes_out_those_beside_them_is_told(
        self, tmp_path: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Floats of 0 to 1, or 12 bits, beside films that need no range."""
        names = [f"{number}.tif" for number in range(20)]
        table = write_csv(tmp_path / "a.csv", ["Path", "impression"], [[name, "x"] for name in names])
        config = IngestConfig(to_shards=tmp_path / "out", images=tmp_path, csv=(table,))
        for kind, value_range in (
            (lambda film: film, (0.0, 1.0)),
            (lambda film: film * np.uint16(257), (0.0, 4095.0)),
        ):
            for name, film in zip(names, images, strict=False):
                Image.fromarray(kind(film)).save(tmp_path / name)
            for number in (13, 14):
                Image.fromarray((images[number] / 255.0 * value_range[1]).astype(np.float32)).save(
                    tmp_path / names[number]
                )
            (note,) = read_inputs(replace(config, value_range=value_range)).notes
            assert "--value-range makes 18 of 20 films looked at black and white" in note and "--sources" in note
            (note,) = read_inputs(config).notes
            assert "2 of 20 films looked at will be rejected" in note
        with monkeypatch.context() as patched:
            patched.setattr("ingest.notes._LOOK_S", 0.0)  # films so large that each takes a second
            (note,) = read_inputs(replace(config, value_range=value_range)).notes
            assert "makes 3 of 3 films looked at" in note

    def test_films_that_cannot_be_had_are_none_that_a_range_does_not_change(
        self, tmp_path: Path, images: np.ndarray
    ) -> None:
        names = [f"{number}.png" for number in range(8)]
        table = write_csv(tmp_path / "a.csv", ["Path", "impression"], [[name, "x"] for name in names])
        config = IngestConfig(
            to_shards=tmp_path / "out", images=tmp_path, csv=(table,), val_fraction=0, value_range=(0.0, 4095.0)
        )
        for name in names:
            (tmp_path / name).write_bytes(b"no film")
        assert read_inputs(config).notes == ()
        Image.fromarray(images[0]).save(tmp_path / "5.png")
        assert "changes none of 1 films looked at" in read_inputs(config).notes[0]

    def test_a_range_that_one_film_cannot_do_without_changes_something(
        self, tmp_path: Path, images: np.ndarray, table: Path
    ) -> None:
        """Whoever left it out would be refused, although those before are the same without it."""
        films = images[:40].astype(np.float32)
        config = IngestConfig(
            to_shards=tmp_path, h5=(write_h5(tmp_path / "a.h5", films),), csv=(table,), value_range=(0.0, 255.0)
        )
        assert "--value-range changes none of 40 films" in read_inputs(config).notes[0]
        films[-1, 0, 0] = 256
        write_h5(tmp_path / "a.h5", films)
        assert read_inputs(config).notes == ()

    def test_a_film_that_may_not_be_read_is_called_so(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Root may read everything."""

        def denied(*_) -> bool:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(Path, "is_file", denied)
        assert read_film(tmp_path / "a.png", 320) is Fault.DENIED
        assert "permissions" in Fault.DENIED.reason

    def test_real_numbers_need_a_range(self, tmp_path: Path, images: np.ndarray) -> None:
        film = images[0].astype(np.float32) / 255
        for path, value in ((tmp_path / "a.tif", 1.0), (tmp_path / "b.tif", np.nan)):
            film[0, 0] = value
            Image.fromarray(film).save(path)
        assert read_film(tmp_path / "a.tif", 320) is Fault.NO_RANGE
        found = read_film(tmp_path / "a.tif", 320, (0.0, 1.0))
        assert np.array_equal(found[1:], images[0][1:])  # type: ignore[index]
        assert read_film(tmp_path / "b.tif", 320, (0.0, 1.0)) is Fault.UNREADABLE
        Image.fromarray(images[0]).save(tmp_path / "c.png")  # 8 bits say themselves what is white
        assert np.array_equal(read_film(tmp_path / "c.png", 320, (0.0, 4095.0)), images[0])

    @pytest.mark.parametrize("size", [(320, 320), (400, 300), (301, 400), (900, 9), (9, 900), (1, 1)])
    def test_one_grey_level_is_no_film_whatever_its_shape(self, tmp_path: Path, size: tuple[int, int]) -> None:
        """The black that makes it square is not part of it."""
        film = Image.new("RGB", size, (9, 9, 9))
        film.save(tmp_path / "a.png")
        found = read_film(tmp_path / "a.png", 320)
        assert not isinstance(found, Fault) and blank(found) is Fault.CONSTANT
        if min(size) > 1:
            film.putpixel((size[0] // 3, size[1] // 3), (200, 200, 200))
            film.save(tmp_path / "a.png")
            found = read_film(tmp_path / "a.png", 320)
            assert not isinstance(found, Fault) and blank(found) is Fault.NONE
        Image.new("L", size).save(tmp_path / "a.png")
        assert blank(read_film(tmp_path / "a.png", 320)) is Fault.ALL_ZERO  # type: ignore[arg-type]
        label = np.zeros((320, 320), np.uint8)
        label[20:30, 40:80] = 200  # black on all sides, as no padding is
        assert blank(label) is Fault.NONE

    def test_ingest_and_rejects(self, folder: Path, tmp_path: Path) -> None:
        outside = tmp_path / "secret.png"
        outside.write_bytes((folder / "grey.png").read_bytes())
        (folder / "link.png").symlink_to(outside)
        names = ["grey.png", "text.png", "../secret.png", str(outside), "link.png", "gone.png", "turned.png", ""]
        table = write_csv(tmp_path / "t.csv", ["file", "impression"], [[name, "Report"] for name in names])
        found = run(tmp_path / "out", images=folder, path_column="file", csv=(table,), max_rejects=0.9)
        assert sorted(found) == [key(0), key(6)]
        rejects = {int(row["row"]): row["reason"] for row in csv.DictReader(open(tmp_path / "out" / "rejects.csv"))}
        assert rejects == {1: "film file cannot be decoded"} | dict.fromkeys(
            (2, 3, 4, 5, 7), "film file is missing or outside the folder"
        )

    def test_a_finished_set_of_another_folder_is_no_end_of_this_ingest(self, folder: Path, tmp_path: Path) -> None:
        """The CSV names the same files in both."""
        table = write_csv(tmp_path / "t.csv", ["Path", "impression"], [["grey.png", "x"]])
        config = IngestConfig(to_shards=tmp_path / "out", images=folder, csv=(table,), workers=1)
        ingest(config)
        shutil.copytree(folder, tmp_path / "other")
        assert finished_set(replace(config, images=tmp_path / "films" / "p1" / "..")) is not None
        with pytest.raises(InputError, match=r"made with another --images \(which folder\);"):
            finished_set(replace(config, images=tmp_path / "other"))

    def test_too_many_rejects_are_a_mistake(self, folder: Path, tmp_path: Path) -> None:
        table = write_csv(
            tmp_path / "t.csv", ["Path", "impression"], [[name, "x"] for name in ("a.png", "b.png", "grey.png")]
        )
        command = ["ingest", "--to-shards", tmp_path / "out", "--images", folder, "--csv", table]
        assert_refused(run_module(*command), "2 of 3 rows are rejected", "film file is missing or outside the folder")
        # A wrong folder is known before a film is read, and leaves nothing that stands in the way of the right one.
        command = ["ingest", "--to-shards", tmp_path / "new", "--images", tmp_path, "--csv", table]
        for more in ((), ("--dry-run",)):
            assert_refused(run_module(*command, *more), "none of 3 rows looked at names an image file", "--path-column")
        assert not (tmp_path / "new").exists()

    def test_the_real_films_are_chexzeros(self, real_data: Path) -> None:
        """Our way from an image file to 320 x 320 is the one that wrote the HDF5 file: equal to the pixel."""
        paths = list(csv.DictReader(open(real_data / "chexzero" / "cxr_paths.csv")))
        films = h5py.File(real_data / "chexzero" / "cxr.h5")["cxr"][:]
        compared = 0
        for row, record in enumerate(paths):
            path = real_data / "paired" / "images" / Path(record["Path"]).name
            if path.exists():
                assert (read_film(path, 320) == films[row]).all(), f"row {row}"
                compared += 1
        assert compared == 94


class TestReports:
    def test_sections(self) -> None:
        report = "EXAM: Chest.\nFINDINGS: Heart size: normal. Lungs clear.\n"
        report += "IMPRESSION: 1. No acute disease.\n2. Line ok.\nSIGNED: x"
        assert cut_section(report, "impression") == "1. No acute disease.\n2. Line ok."
        assert cut_section(report, "Findings") == "Heart size: normal. Lungs clear."
        assert cut_section(report, "history") == ""
        assert cut_section("Findings: a. FINAL IMPRESSION: Stable.", "impression") == "Stable."
        mixed = "Findings: x\nImpression: y\nHeart size: normal\nRecommendation: z"
        assert cut_section(mixed, "impression") == "y\nHeart size: normal"
        assert cut_section("CLINICAL IMPRESSION: cough\nIMPRESSION: none", "impression") == "none"
        assert cut_section("CLINICAL HISTORY: cough\nIMPRESSION: none", "clinical history") == "cough"
        bomb = '<!DOCTYPE r [<!ENTITY a "x">]><r><AbstractText Label="IMPRESSION">&a;</AbstractText></r>'
        assert cut_section(bomb, "impression") == ""

    def test_indiana(self, real_data: Path) -> None:
        """3,955 XMLs; the 34 without an impression are those whose element is empty or absent."""
        found = empty = 0
        with tarfile.open(real_data / "reports" / "NLMCXR_reports.tgz") as archive:
            for member in archive:
                if member.name.endswith(".xml"):
                    text = archive.extractfile(member).read().decode()  # type: ignore[union-attr]
                    cut = cut_section(text, "impression")
                    found, empty = found + 1, empty + (not cut)
                    assert cut or '<AbstractText Label="IMPRESSION"/>' in text or "IMPRESSION" not in text
        assert (found, empty) == (3955, 34)

    def test_files_templates_and_sections(self, tmp_path: Path, images: np.ndarray) -> None:
        reports = tmp_path / "reports"
        reports.mkdir()
        (reports / "a.txt").write_text("FINDINGS: x.\nIMPRESSION: Clear.")
        (reports / "b.txt").write_text("FINDINGS: x.")
        (tmp_path / "secret.txt").write_text("IMPRESSION: secret")
        table = write_csv(tmp_path / "t.csv", ["impression"], [["a.txt"], ["b.txt"], ["../secret.txt"], ["none.txt"]])
        h5 = write_h5(tmp_path / "a.h5", images[:4])
        settings = {"h5": (h5,), "csv": (table,), "text_folder": reports, "section": "impression", "max_rejects": 0.9}
        assert {row["key"]: row["text"] for row in run(tmp_path / "o1", **settings).values()} == {key(0): "Clear."}
        rejects = [row["reason"] for row in csv.DictReader(open(tmp_path / "o1" / "rejects.csv"))]
        assert rejects == ["report has no such section", "report file cannot be read", "report file cannot be read"]

        with pytest.raises(InputError, match=r"none of the 4 rows has a report \(2: report has no such section"):
            ingest(IngestConfig(to_shards=tmp_path / "o", **settings | {"section": "impresion"}))
        (reports / "a.txt").write_text("<report><AbstractText>Clear.</AbstractText></report>")
        with pytest.raises(InputError, match="the report of row 0 is XML; say by --section"):
            ingest(IngestConfig(to_shards=tmp_path / "o", **settings | {"section": None}))

        table = write_csv(
            tmp_path / "u.csv", ["a b", "view"], [["Edema|Mass", "PA"], ["", "AP"], ["", ""], ["{view}", ""]]
        )
        found = run(tmp_path / "o2", h5=(h5,), csv=(table,), text_template="{a b}, {view} view {x")
        texts = [found[key(row)]["text"] for row in (0, 1, 3)]
        assert texts == [
            "Edema|Mass, PA view {x",
            ", AP view {x",
            "{view},  view {x",
        ]
        assert key(2) not in found


class TestLabelsAndSplits:
    def test_listed_labels(self, tmp_path: Path, images: np.ndarray) -> None:
        rows = [["x", "Edema|Mass", "-1"], ["x", "", ""], ["x", "No Finding", "1"], ["x", "Mass", "0"]]
        table = write_csv(tmp_path / "t.csv", ["impression", "found", "Cardiomegaly"], rows)
        h5 = write_h5(tmp_path / "a.h5", images[:4])
        settings = {"label_columns": ("Cardiomegaly",), "label_list_column": "found"}
        found = run(tmp_path / "out", h5=(h5,), csv=(table,), **settings)
        names = ("Cardiomegaly", "Edema", "Mass", "No Finding")
        assert read_manifest(tmp_path / "out").labels == names
        values = [[found[key(row)][f"label:{name}"] for name in names] for row in range(4)]
        assert values == [[-1, 1, 1, 0], [None] * 4, [1, 0, 0, 1], [0, 0, 1, 0]]
        settings = {"label_list_column": "found", "label_list_separator": "s"}
        run(tmp_path / "by-s", h5=(h5,), csv=(table,), **settings)
        assert read_manifest(tmp_path / "by-s").labels == ("Edema|Ma", "Ma", "No Finding")

    def test_group_regex_and_split_column(
        self, tmp_path: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows = [
            [f"files/p{i // 2:03d}/s{i}.png", "x", ("train", "validate", "test", "")[i // 2 % 4]] for i in range(40)
        ]
        table = write_csv(tmp_path / "t.csv", ["Path", "impression", "split"], rows)
        h5 = write_h5(tmp_path / "a.h5", images)
        settings = {"group_column": "Path", "group_regex": r"/(p\d+)/", "split_column": "split"}
        found = run(tmp_path / "out", h5=(h5,), csv=(table,), **settings)
        for row in range(40):
            assert found[key(row)]["split"] == ("train", "val", "test", "train")[row // 2 % 4]
        assert len({row["group"] for row in found.values()}) == 20
        rows[1][2] = "test"  # one patient in two splits
        write_csv(table, ["Path", "impression", "split"], rows)
        with pytest.raises(InputError, match=r"1 groups have rows in two splits \(row 0 and row 1, for"):
            ingest(IngestConfig(to_shards=tmp_path / "x", h5=(h5,), csv=(table,), **settings))
        with pytest.raises(InputError, match="names no split"):
            ingest(IngestConfig(to_shards=tmp_path / "x", h5=(h5,), csv=(table,), split_column="impression"))
        with pytest.raises(InputError, match="40 rows have no patient by --group-regex in 'Path', row 0"):
            ingest(
                IngestConfig(to_shards=tmp_path / "x", h5=(h5,), csv=(table,), group_column="Path", group_regex="q(.)")
            )
        # Its group takes no part in the match.
        with pytest.raises(InputError, match="40 rows have no patient by --group-regex in 'Path', row 0"):
            run(tmp_path / "x", h5=(h5,), csv=(table,), group_column="Path", group_regex="files(x)?")
        monkeypatch.setattr("ingest.table._REGEX_S", 0.2)
        slow = {**settings, "group_regex": "^(a|aa)+$", "split_column": None}
        write_csv(table, ["Path", "impression"], [["a" * 60 + "b"] * 2] * 40)
        with pytest.raises(InputError, match="is not done with row 0 after seconds; write it without"):
            ingest(IngestConfig(to_shards=tmp_path / "x", h5=(h5,), csv=(table,), **slow))
        assert not (tmp_path / "x").exists()

    def test_a_patient_belongs_where_the_middle_of_its_films_falls(self, tmp_path: Path) -> None:
        """Of five patients of four films the middles lie at 0.1, 0.3, 0.5, 0.7 and 0.9."""
        config = IngestConfig(to_shards=tmp_path, h5=(tmp_path,), csv=(tmp_path,), test_fraction=0.35, val_fraction=0.2)
        assert sorted(_by_fraction(np.full(5, 4), config)) == [0, 0, 1, 2, 2]

    def test_several_sources(self, tmp_path: Path, images: np.ndarray) -> None:
        """Two sources with columns of their own and a third that is the validation set: one manifest, keys apart."""
        write_h5(tmp_path / "a.h5", images[:20])
        write_csv(tmp_path / "a.csv", ["impression", "Edema", "who"], [[f"a{i}", i % 2, i] for i in range(20)])
        write_h5(tmp_path / "b.h5", images[20:30], dataset="films")
        write_csv(tmp_path / "b.csv", ["report", "Mass", "who"], [[f"b{i}" * (i != 7), 1, i] for i in range(10)])
        (tmp_path / "films").mkdir()
        for i in range(6):
            Image.fromarray(images[30 + i]).save(tmp_path / "films" / f"{i}.png")
        write_csv(tmp_path / "c.csv", ["Path", "impression", "who"], [[f"{i}.png", f"c{i}", i] for i in range(6)])
        (tmp_path / "sources.toml").write_text(
            '[[source]]\nh5 = "a.h5"\ncsv = ["a.csv"]\nlabel_columns = ["Edema"]\ngroup_column = "who"\n'
            '[[source]]\nh5 = ["b.h5"]\ndataset = "films"\ncsv = "b.csv"\ntext_column = "report"\n'
            'label_columns = ["Mass"]\ngroup_column = "who"\n'
            '[[source]]\nimages = "films"\ncsv = "c.csv"\nsplit = "val"\ngroup_column = "who"\n'
        )
        found = run(tmp_path / "out", sources=tmp_path / "sources.toml", encoding="png")
        assert {row["key"] for row in found.values() if row["split"] == "val"} == {key(i, 2) for i in range(6)}
        assert len(found) == 35 and found[key(3, 1)]["text"] == "b3"
        assert (tmp_path / "out" / "rejects.csv").read_text() == "source,row,reason\n1,7,report is empty\n"
        assert (found[key(4, 2)]["pixels"] == images[34]).all() and (found[key(9, 1)]["pixels"] == images[29]).all()
        assert found[key(3)]["label:Edema"] == 1 and found[key(3)]["label:Mass"] is None
        manifest = read_manifest(tmp_path / "out")
        assert [(each.kind, each.rows, each.samples) for each in manifest.sources] == [
            ("hdf5", 20, 20),
            ("hdf5", 10, 9),
            ("images", 6, 6),
        ]
        # Patient 3 of one source is not patient 3 of another.
        assert len({row["group"] for row in found.values()}) == 35

    def test_patients_of_several_sources(self, tmp_path: Path, images: np.ndarray) -> None:
        """Equal ids are one person where the sources say so: in one split, one group."""
        write_h5(tmp_path / "a.h5", images[:20])
        write_csv(tmp_path / "a.csv", ["impression", "who"], [[f"a{i}", i // 2] for i in range(20)])
        write_h5(tmp_path / "b.h5", images[20:26])
        write_csv(tmp_path / "b.csv", ["impression", "who"], [[f"b{i}", 9 - i // 2] for i in range(6)])
        who = np.array([i // 2 for i in range(20)] + [9 - i // 2 for i in range(6)])

        def plan(*more: str) -> Plan:
            tables = [
                f'[[source]]\nh5 = "{name}.h5"\ncsv = "{name}.csv"\ngroup_column = "who"\n{line}\n'
                for name, line in zip("ab", more, strict=True)
            ]
            (tmp_path / "s.toml").write_text("".join(tables))
            config = IngestConfig(to_shards=tmp_path / "out", sources=tmp_path / "s.toml", val_fraction=0.3)
            return read_inputs(config).plan

        def torn(plan: Plan) -> set[int]:
            return set(who[plan.order["train"]]) & set(who[plan.order["val"]])

        same, other = 'group_namespace = "x"', 'group_namespace = "y"'
        for lines in (("", ""), (same, ""), (same, other)):
            apart = plan(*lines)
            assert apart.namesakes == 3 and len(set(apart.groups)) == 13 and torn(apart)
        together = plan(same, same)
        assert together.namesakes == 0 and len(set(together.groups)) == 10 and not torn(together)
        assert all(len(set(together.groups[who == person])) == 1 for person in range(10))
        # Who is in a source that has a split of its own is there with all films; two such sources contradict.
        moved = plan(same, f'{same}\nsplit = "val"')
        assert {7, 8, 9} <= set(who[moved.order["val"]]) and not torn(moved)
        with pytest.raises(InputError, match=r"3 groups have .* \(row 14 of source 0 and row 4 of source 1, for"):
            plan(f'{same}\nsplit = "train"', f'{same}\nsplit = "val"')
        config = IngestConfig(to_shards=tmp_path / "out", sources=tmp_path / "s.toml", dry_run=True)
        plan("", "")
        assert any("3 patient ids are in several sources" in line for line in dry_run(config))

    def test_a_source_that_names_no_patients_beside_one_that_does(self, tmp_path: Path, images: np.ndarray) -> None:
        """Its films count as a patient each, by the format; that they may leak is said, unless they stay together."""
        write_h5(tmp_path / "a.h5", images)
        write_csv(tmp_path / "a.csv", ["impression", "who"], [[f"a{i}", i // 2] for i in range(40)])
        for line, more, said in (
            ("", {"val_fraction": 0.2}, 1),
            ('split = "val"', {"test_fraction": 0.2}, 0),
            ("", {}, 0),
        ):
            (tmp_path / "s.toml").write_text(
                '[[source]]\nh5 = "a.h5"\ncsv = "a.csv"\ngroup_column = "who"\n'
                f'[[source]]\nh5 = "a.h5"\ncsv = "a.csv"\n{line}\n'
            )
            config = IngestConfig(to_shards=tmp_path / "out", sources=tmp_path / "s.toml", **more)
            assert sum(found.startswith("source 1: patients are not named") for found in dry_run(config)) == said
            if said:
                ingest(replace(config, workers=1))
                assert "\nsource 1: patients are not named" in (tmp_path / "out" / "report.txt").read_text()

    def test_an_image_file_of_two_sources(self, tmp_path: Path, images: np.ndarray) -> None:
        """One folder, a CSV a split: a film in both would leak."""
        (tmp_path / "films" / "p").mkdir(parents=True)
        for i in range(4):
            Image.fromarray(images[i]).save(tmp_path / "films" / "p" / f"{i}.png")
        write_csv(tmp_path / "a.csv", ["Path", "impression"], [[f"p/{i}.png", f"a{i}"] for i in range(3)])
        write_csv(tmp_path / "b.csv", ["Path", "impression"], [[f"{i}.png", f"b{i}"] for i in (3, 2)])
        text = '[[source]]\nimages = "films"\ncsv = "a.csv"\nsplit = "train"\n'
        text += '[[source]]\nimages = "films/../films/p"\ncsv = "b.csv"\nsplit = "{}"\n'
        config = IngestConfig(to_shards=tmp_path / "out", sources=tmp_path / "s.toml")
        (tmp_path / "s.toml").write_text(text.format("train"))
        assert len(read_inputs(config).plan.order["train"]) == 5
        (tmp_path / "s.toml").write_text(text.format("val"))
        with pytest.raises(InputError, match="row 2 of source 0 and row 1 of source 1 name the same image file"):
            read_inputs(config)

    def test_settings_of_the_other_kind(self, tmp_path: Path) -> None:
        films = {"h5": {"h5": (tmp_path / "a.h5",)}, "images": {"images": tmp_path}}
        for kind, setting, flag in (
            ("h5", {"path_column": "file"}, "--path-column"),
            ("h5", {"image_size": 224}, "--image-size"),
            ("images", {"dataset": "x"}, "--dataset"),
        ):
            with pytest.raises(InputError, match=f"{flag} does nothing with --{kind}"):
                SourceConfig(csv=(tmp_path / "a.csv",), **films[kind], **setting).check()
        for labels in ({"label_columns": ("who",)}, {"label_list_column": "who"}):
            with pytest.raises(InputError, match="'who' is a label column too"):
                SourceConfig(csv=(tmp_path / "a.csv",), **films["h5"], group_column="who", **labels).check()
        with pytest.raises(InputError, match="--group-namespace needs --group-column"):
            SourceConfig(csv=(tmp_path / "a.csv",), **films["h5"], group_namespace="x").check()

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("source = 1", "[[source]] tables"),
            ("[[source]]\nh6 = 1", "no setting 'h6'"),
            (
                "[[source]]\nsplit = 'all'",
                "split = 'all' should be Literal['train', 'val', 'test']",
            ),
            ("[[source]]\nh5 = 1", "h5 = 1 should be tuple[Path, ...]"),
            ('[[source]]\nimages = ""', "images = ''"),
            ('[[source]]\nimages = "a\\u0000"', "images = 'a"),
            ("[[source]]\nvalue_range = [1]", "value_range"),
            ("[[source]]\nallow_blank = 1", "allow_blank"),
            ("[[source", "is not TOML"),
        ],
    )
    def test_mistakes_in_the_list(self, tmp_path: Path, text: str, words: str) -> None:
        (tmp_path / "s.toml").write_text(text)
        with pytest.raises(InputError) as error:
            read_sources(tmp_path / "s.toml")
        assert words in str(error.value)


@pytest.mark.parametrize("codec", ENCODINGS)
def test_encodings(codec: str, images: np.ndarray) -> None:
    spec = ImageSpec(codec=codec)
    for image in images[:4]:
        content = encode(image, spec)
        back = decode(content, spec)
        assert back.dtype == np.uint8 and back.shape == (320, 320)
        if ENCODINGS[codec].lossless:
            assert (back == image).all()
        else:
            assert 0 < np.abs(back.astype(float) - image).mean() < 2
        assert encode(image, spec) == content
        for damaged in (content[: len(content) // 2], b"", b"\0" * 100):
            if codec == "jpeg" and damaged and damaged[0]:
                continue  # libjpeg fills in what is missing; the xxh3 of the bytes is what catches it
            with pytest.raises(ValueError):
                decode(damaged, spec)
    with pytest.raises(ValueError, match="are not uint8"):
        encode(images[0][:10], spec)
    small = io.BytesIO()
    Image.fromarray(images[0][:64, :64]).save(small, format="PNG")
    with pytest.raises(ValueError, match="64 x 64"):
        decode(small.getvalue(), ImageSpec(codec="png"))
