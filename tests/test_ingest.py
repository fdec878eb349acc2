"""Ingest end to end: what goes in comes out, the same bytes however it ran, and every mistake is one line."""

import csv
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import (
    FINDINGS,
    REPOSITORY,
    assert_refused,
    made_up_images,
    run_module,
    write_csv,
    write_h5,
    write_source,
)
from PIL import Image

from ingest.__main__ import main
from ingest.config import IngestConfig
from ingest.fingerprint import fingerprint
from ingest.inputs import read_inputs
from ingest.rows import names_side
from ingest.tokenizer import Tokenizer
from ingest.workdir import open_work
from shards.errors import InputError
from shards.manifest import read_manifest, signed, write_manifest
from shards.reader import ShardReader
from shards.verify import verify


def tree(root: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(root.iterdir())}


def rows_of(root: Path, split: str) -> list[dict]:
    manifest = read_manifest(root)
    rows = []
    for info in manifest.splits.get(split, ()):
        with ShardReader(root, manifest, info) as reader:
            for row in reader.read_table().to_pylist():
                rows.append(row | {"jpeg": os.pread(reader.fd, row["size"], row["offset"])})
    return rows


def arguments(out: Path, source: tuple[Path, Path], *more: str) -> list[str | Path]:
    h5, table = source
    labels = ["--label-columns", *FINDINGS, "--group-column", "patient"]
    return ["ingest", "--to-shards", out, "--h5", h5, "--csv", table, *labels, "--val-fraction", "0.2", *more]


def test_what_goes_in_comes_out(source: tuple[Path, Path], shards_dir: Path) -> None:
    images = h5py.File(source[0])["cxr"][:]
    table = list(csv.DictReader(open(source[1], newline="", encoding="utf-8")))
    everything = {split: rows_of(shards_dir, split) for split in ("train", "val", "test")}
    rows = [row for part in everything.values() for row in part]
    assert sorted(row["row"] for row in rows) == list(range(96))
    tokenizer = Tokenizer()
    for row in rows:
        given = table[row["row"]]
        assert row["text"] == given["impression"]
        assert [row[f"label:{name}"] for name in FINDINGS] == [float(given[n]) if given[n] else None for n in FINDINGS]
        assert row["side_words"] == ("left" in row["text"] or "right" in row["text"])
        assert row["tokens"] == tokenizer(row["text"])[0].tolist()
        decoded = np.asarray(Image.open(io.BytesIO(row["jpeg"])))
        assert np.abs(decoded - images[row["row"]]).mean() < 2.5
    patients = {split: {table[row["row"]]["patient"] for row in part} for split, part in everything.items()}
    assert not patients["train"] & patients["val"] and not patients["train"] & patients["test"]
    groups = {split: {row["group"] for row in part} for split, part in everything.items()}
    assert {split: len(found) for split, found in groups.items()} == {split: len(p) for split, p in patients.items()}
    assert abs(len(everything["val"]) - 0.2 * 96) <= 3 and abs(len(everything["test"]) - 0.15 * 96) <= 3
    # The shuffle is global: reading forward is not reading the source in order.
    order = [row["row"] for row in everything["train"]]
    assert order != sorted(order) and abs(np.corrcoef(order, range(len(order)))[0, 1]) < 0.4


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Small left effusion", True),
        ("RLL pneumonia", True),
        ("Right-sided line", True),
        ("Lt. base opacity", True),
        ("Clear lungs, upright film", False),
        ("Leftover contrast", False),
        ("Normal heart", False),
    ],
)
def test_sides(text: str, found: bool) -> None:
    assert names_side(text) == found


def test_the_same_command_after_the_end_has_nothing_to_do(source: tuple[Path, Path], tmp_path: Path) -> None:
    """`ingest ... && train ...` of a job that is queued again; another ingest is refused by what differs."""
    out, h5, table = tmp_path / "set", tmp_path / "cxr.h5", tmp_path / "reports.csv"
    shutil.copy(source[0], h5)
    shutil.copy(source[1], table)
    command = ("ingest", "--to-shards", out, "--h5", h5, "--csv", table, "--val-fraction", "0.2")
    assert run_module(*command, "--workers", "1").returncode == 0
    before = tree(out)
    (out / ".ingest").mkdir()  # as a kill after the manifest leaves it
    (out / "ingest.json").rename(out / ".ingest" / "inputs.json")
    for more in (("--dry-run",), ("--workers", "2")):
        done = run_module(*command, *more)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{out}: 96 samples, finished before by this same ingest; nothing to do\n"
        assert (out / ".ingest").exists() == ("--dry-run" in more)
    assert tree(out) == before
    manifest = read_manifest(out)  # as after `ingest.retokenize --tokenizer PE-Core-B-16`
    write_manifest(out, signed(replace(manifest, tokenizer=replace(manifest.tokenizer, context=32))))
    done = run_module(*command)
    assert done.returncode == 0 and "its tokens are since those of clip-bpe, 32 a report" in done.stdout, done.stderr
    assert_refused(
        run_module(*command, "--seed", "1", "--group-column", "patient"),
        "finished data set of 96 samples, made with another --seed, --group-column; choose another folder",
    )
    assert_refused(run_module(*command, "--seed", "1", "--dry-run"), "made with another --seed;")
    os.utime(h5, (1, 1))
    assert_refused(run_module(*command), "made with another --h5 (file 1, its size or time of change);")
    table.unlink()
    assert_refused(
        run_module(*command),
        "whether of the same inputs cannot be told without --csv (file 1, which cannot be read); put it back",
    )
    (out / "ingest.json").unlink()
    assert_refused(run_module(*command), "no ingest.json")


def test_ctrl_c_says_that_nothing_is_lost(source: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "set"
    command = [sys.executable, "-m", "ingest", "--to-shards", out, "--h5", source[0], "--csv", source[1]]
    injected = str(Path(__file__).parent / "injected")
    stuck = {"PYTHONPATH": injected, "SHARDCLIP_FAULT": "hold:.spill", "SHARDCLIP_COUNT": str(tmp_path / "stuck")}
    environment = {**os.environ, **stuck}
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "stuck").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
    assert process.returncode == 130 and said == "ingest: interrupted; the same command goes on where it stood\n"


def test_finished_shards_are_kept(source: tuple[Path, Path], tmp_path: Path) -> None:
    """With everything done but the manifest, a rerun rewrites nothing; with one shard damaged in size, only that."""
    from ingest.config import IngestConfig
    from ingest.run import ingest

    config = IngestConfig(to_shards=tmp_path / "set", h5=(source[0],), csv=(source[1],), workers=1, shard_mb=0.5)
    import ingest.run as run

    kept = run.remove_work
    try:
        run.remove_work = lambda _: None
        ingest(config)
    finally:
        run.remove_work = kept
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").glob("train-*.tar")}
    (tmp_path / "set" / "manifest.json").unlink()
    lost = min(before)
    os.truncate(lost, 100)
    ingest(config)
    rewritten = [path for path, stamp in before.items() if path.stat().st_mtime_ns != stamp]
    assert rewritten == [lost]
    assert [problem for _, problem in verify(tmp_path / "set") if problem] == []


def test_rejects(tmp_path: Path) -> None:
    images = made_up_images(40).astype(np.float32)
    images[3], images[7], images[11] = 0, 93, 0
    texts = [f"Film {i}" for i in range(40)]
    texts[5], texts[9], texts[11] = "  ", "No impression", ""
    h5 = write_h5(tmp_path / "a.h5", images)
    table = write_csv(tmp_path / "a.csv", ["impression"], [[text] for text in texts])
    command = "ingest", "--to-shards", tmp_path / "out", "--h5", h5, "--csv", table, "--workers", "1"
    tried = run_module(*command, "--dry-run").stdout
    assert "2 of 32 films tried will be rejected: film is all zero\n1 of 32 films tried" in tried
    assert "films tried" not in run_module(*command, "--dry-run", "--allow-blank").stdout
    done = run_module(*command)
    assert done.returncode == 0, done.stderr
    assert "35 samples" in done.stdout and "PSNR" in done.stdout
    assert (tmp_path / "out" / "rejects.csv").read_text() == (
        "source,row,reason\n0,3,film is all zero\n0,5,report is empty\n0,7,film is constant\n"
        "0,9,report is missing\n0,11,report is empty; film is all zero\n"
    )
    assert sorted(row["row"] for row in rows_of(tmp_path / "out", "train")) == [
        row for row in range(40) if row not in (3, 5, 7, 9, 11)
    ]


def test_text_is_kept_exactly(tmp_path: Path) -> None:
    texts = [
        "NA",
        "None",
        " lead and trail ",
        "two\nlines",
        "crlf\r\nline",
        '=cmd("x")',
        "שלום 🫁 \u202e",
        "nul\0byte",
        "x" * 100_000,
    ]
    h5 = write_h5(tmp_path / "a.h5", made_up_images(len(texts)).astype(np.float32))
    table = write_csv(tmp_path / "a.csv", ["id", "impression"], [[i, text] for i, text in enumerate(texts)])
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())
    done = run_module("ingest", "--to-shards", tmp_path / "out", "--h5", h5, "--csv", table, "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert {row["row"]: row["text"] for row in rows_of(tmp_path / "out", "train")} == dict(enumerate(texts))


def test_chexzero(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "chexzero"
    command = ["ingest", "--to-shards", tmp_path / "out", "--h5", folder / "cxr.h5"]
    command += ["--csv", folder / "cxr_paths.csv", folder / "impressions.csv", "--val-fraction", "0.2"]
    done = run_module(*command)
    assert done.returncode == 0, done.stderr
    assert "92 samples" in done.stdout
    rejects = list(csv.DictReader(open(tmp_path / "out" / "rejects.csv")))
    assert {int(row["row"]): row["reason"] for row in rejects} == {
        5: "report is empty",
        17: "film is all zero",
        40: "report is missing",
        60: "report is missing; film is all zero",
    }
    assert [problem for _, problem in verify(tmp_path / "out") if problem] == []
    # Nothing of the paths or the patients in them gets into names, manifest or messages.
    leaked = b"".join(path.read_bytes() for path in (tmp_path / "out").glob("*.json")) + done.stdout.encode()
    assert b"p000" not in leaked and b"files/" not in leaked and b"jkms" not in leaked


class TestMistakes:
    """Each ends with exit code 2, one line that says what and where, and no file under a final name."""

    @pytest.fixture
    def refused(self, tmp_path: Path, source: tuple[Path, Path], capsys: pytest.CaptureFixture[str]):
        def check(*words: str, h5: Path = source[0], table: Path = source[1], more: tuple[str, ...] = ()) -> None:
            out = tmp_path / "out"
            shutil.rmtree(out, ignore_errors=True)
            # The list last: `more` may begin with further tables.
            command = ("--to-shards", out, "--h5", h5, "--workers", "1", "--csv", table, *more)
            before = signal.getsignal(signal.SIGTERM)
            try:
                with pytest.raises(SystemExit) as stop:
                    main(list(map(str, command)))
            finally:
                signal.signal(signal.SIGTERM, before)
            error = capsys.readouterr().err
            assert_refused(subprocess.CompletedProcess(command, stop.value.code, "", error), *words)
            assert not out.exists() or not [path for path in out.iterdir() if not path.name.startswith(".")]

        return check

    def test_files_and_columns(self, refused, tmp_path: Path) -> None:
        files = write_csv(
            tmp_path / "files.csv", ["Path"], [[f"r {i}.TXT "] for i in range(48)] + [[f"a/{i}.png"] for i in range(48)]
        )
        refused("no HDF5 file", "nothing.h5", h5=tmp_path / "nothing.h5")
        refused("cannot read", "nothing.csv", table=tmp_path / "nothing.csv")
        os.mkfifo(tmp_path / "pipe.csv")
        refused("pipe.csv is a pipe", "save it as a file", table=tmp_path / "pipe.csv")
        refused("no column 'findings'", "impression", more=("--text-column", "findings"))
        for name, content, words in (
            ("a.csv.gz", b"\x1f\x8b\x08\x00\xff", "gunzip it"),
            ("a.xlsx", b"PK\x03\x04\xff", "save it as CSV"),
            ("b.xlsx", b"PK\x03\x04\x14\0\x06\0, all of it letters\n", "save it as CSV"),
            ("a.h5", b"\x89HDF\r\n\x1a\n", "it is HDF5, which --h5 takes"),
        ):
            (tmp_path / name).write_bytes(content)
            refused(f"{name} is not CSV in UTF-8", words, table=tmp_path / name)
        refused("no dataset 'images'", "'cxr'", more=("--dataset", "images"))
        refused("column 'Path' holds names of files", "--text-folder", more=("--text-column", "Path"), table=files)
        refused("label column 'Path'", "row 0", more=("--label-columns", "Path"))
        refused("--val-fraction", "1.5", more=("--val-fraction", "1.5"))
        for flag, blank in (("section", " "), ("split-column", ""), ("text-template", ""), ("scheduler", "")):
            refused(f"--{flag} is empty", more=(f"--{flag}", blank))
        refused("--workers 3000000000", "4,096", more=("--workers", "3000000000"))
        refused("--frob", more=("--frob", "1"))
        text = tmp_path / "text.h5"
        text.write_text("not HDF5")
        refused("cannot be opened as HDF5", h5=text)

    def test_headers(self, refused, tmp_path: Path) -> None:
        """A first line that is data is a patient and a report, and no message says them."""
        for line in (
            "MRN123,no effusion",
            "p1,Severe edema. No effusion",
            "7,no effusion",
            "p1,no sign of any edema at all",
        ):
            table = tmp_path / "headless.csv"
            table.write_text(f"{line}\n" * 96)
            refused("headless.csv: 2, whose first line does not read like names; add a header line", table=table)
        table.write_text("patient;impression\np1;x\n")
        refused("one column, and ';' in its name; save it with commas", table=table)

    def test_row_counts(self, refused, tmp_path: Path) -> None:
        refused("96 films", "2 rows", table=write_csv(tmp_path / "b.csv", ["impression"], [["a"], ["b"]]))
        parts = tuple(write_h5(tmp_path / f"{number}.h5", made_up_images(1)) for number in range(6))
        config = IngestConfig(to_shards=tmp_path / "out", h5=parts, csv=(tmp_path / "b.csv",))
        with pytest.raises(InputError, match=r"^6 files from \S*/0.h5 to \S*/5.h5: 6 films but the CSV has 2 rows"):
            read_inputs(config)
        short = write_csv(tmp_path / "c.csv", ["impression"], [["a"]] * 95)
        other = write_csv(tmp_path / "d.csv", ["Path"], [["a"]] * 96)
        refused("c.csv has 95", "d.csv has 96", table=short, more=(str(other),))
        (tmp_path / "more").mkdir()
        namesake = write_csv(tmp_path / "more" / "c.csv", ["Path"], [["a"]] * 96)
        refused("c.csv has 95", "more/c.csv has 96", table=short, more=(str(namesake),))
        torn = tmp_path / "e.csv"
        torn.write_text("a,impression\n1,x\n\n2,y\n")
        refused("row 1", "blank", table=torn)
        torn.write_text("a,impression\n1,x\n2,y,z\n")
        refused("row 1", "3 fields", table=torn)
        torn.write_bytes(b"impression\ncaf\xe9\n")
        refused("UTF-8", "iconv", table=torn)

    def test_pixels(self, refused, tmp_path: Path) -> None:
        images = made_up_images(96).astype(np.float32)
        refused("dtype int64", h5=write_h5(tmp_path / "a.h5", images.astype(np.int64)))
        refused("dtype complex64", h5=write_h5(tmp_path / "x.h5", images.astype(np.complex64)))
        refused("shape (96, 320)", h5=write_h5(tmp_path / "b.h5", images[:, 0]))
        refused("shape (0, 320, 320)", h5=write_h5(tmp_path / "c.h5", images[:0]))
        for number, (row, value) in enumerate([(37, np.nan), (64, np.inf), (2, 0.5), (95, 256.0), (1, -1.0)]):
            bad = images.copy()
            bad[row, 5, 5] = value
            refused(f"row {row} of", h5=write_h5(tmp_path / f"d{number}.h5", bad))

    def test_output_folder(self, source: tuple[Path, Path], shards_dir: Path, tmp_path: Path) -> None:
        before = tree(shards_dir)
        assert_refused(run_module(*arguments(shards_dir, source)), "finished data set of 96 samples, made with another")
        assert tree(shards_dir) == before
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "thesis.tex").write_text("precious")
        assert_refused(run_module(*arguments(tmp_path / "full", source)), "is not empty")
        assert os.listdir(tmp_path / "full") == ["thesis.tex"]
        assert_refused(run_module(*arguments(source[1], source)), "cannot be made a folder", "choose another")
        # An interrupted ingest goes on only as what it was.
        out = tmp_path / "out"
        (out / ".ingest").mkdir(parents=True)
        assert run_module(*arguments(out, source, "--seed", "0", "--workers", "1")).returncode == 0
        shutil.rmtree(out)
        (out / ".ingest").mkdir(parents=True)
        (out / ".ingest" / "inputs.json").write_text(json.dumps({"seed": 1}))
        spill = out / ".ingest" / "0000000000.spill"
        spill.touch()
        assert_refused(run_module(*arguments(out, source)), "interrupted ingest with another", "--seed")
        # One that was refused before it encoded a film leaves nothing that another seed's could be mixed with.
        spill.unlink()
        (out / ".ingest" / "rows.json").write_text("of another order")
        assert run_module(*arguments(out, source, "--seed", "2", "--workers", "1")).returncode == 0
        assert run_module("shards", "verify", out).returncode == 0

    def test_what_a_refused_ingest_left_is_removed_where_nobody_works_on_it(
        self, source: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"
        work = out / ".ingest"
        work.mkdir(parents=True)
        (work / "inputs.json").write_text(json.dumps({"seed": 1}))
        config = IngestConfig(to_shards=out, h5=source[:1], csv=source[1:])
        (work / "shared-0").touch()  # workers of a cluster end the films that they are at, whoever has gone
        with pytest.raises(InputError, match="interrupted ingest with another"), open_work(config, fingerprint(config)):
            pass
        (work / "shared-0").unlink()
        looked = Path.iterdir
        # Another start, which asked for the lock, has just removed what it asked with.
        monkeypatch.setattr(Path, "iterdir", lambda path: iter([*looked(path), path / ".tmp-lock.0"]))
        monkeypatch.setattr("ingest.workdir._check_folder", lambda _: None)
        with open_work(config, fingerprint(config)):
            assert json.loads((work / "inputs.json").read_bytes())["seed"] == 0

    def test_impossible_splits(self, refused, tmp_path: Path) -> None:
        refused("split 'val' stays empty", "96 rows", more=("--val-fraction", "0.001"))
        one = write_csv(tmp_path / "one.csv", ["impression", "patient"], [["x", "same"]] * 96)
        refused("stays empty", "1 groups", table=one, more=("--group-column", "patient", "--val-fraction", "0.2"))
        gaps = write_csv(tmp_path / "gaps.csv", ["impression", "patient"], [["x", "p" * (i != 4)] for i in range(96)])
        refused("1 rows have no 'patient'", "row 4", table=gaps, more=("--group-column", "patient"))


def test_dry_run_writes_nothing(source: tuple[Path, Path], tmp_path: Path) -> None:
    done = run_module(*arguments(tmp_path / "out", source, "--dry-run"))
    assert done.returncode == 0, done.stderr
    assert "96 rows, films of" in done.stdout and "val" in done.stdout and "nothing was written" in done.stdout
    assert not (tmp_path / "out").exists() and "patients are not named" not in done.stdout
    h5, table = source
    done = run_module(
        "ingest", "--dry-run", "--to-shards", tmp_path / "out", "--h5", h5, "--csv", table, "--val-fraction", "0.2"
    )
    assert "patients are not named: films of one may be in train and val; see --group-column\n" in done.stdout
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    assert_refused(run_module(*arguments(tmp_path / "out", source, "--dry-run")), "is not empty and holds no")
    assert_refused(run_module(*arguments(h5, source, "--dry-run")), "cannot be made a folder")


def test_uint8_and_float32_make_the_same_images(tmp_path: Path) -> None:
    h5, table = write_source(tmp_path / "f", 24)
    write_h5(tmp_path / "u.h5", made_up_images(24))
    sets = []
    for number, path in enumerate((h5, tmp_path / "u.h5")):
        out = tmp_path / f"out{number}"
        assert run_module("ingest", "--to-shards", out, "--h5", path, "--csv", table, "--workers", "1").returncode == 0
        sets.append({name: digest for name, digest in tree(out).items() if not name.startswith(("report.", "ingest."))})
    assert sets[0] == sets[1]
