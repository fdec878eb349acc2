"""Real films and real reports through the command line, against what their files say; test_whole_path.py has more."""

import csv
import html
import json
import re
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import made_up_images, run_module, write_csv, write_h5

from shards.manifest import read_manifest
from shards.reader import ShardReader


def ingested(out: Path, *flags: object) -> dict[int, dict]:
    """Ingest by the command line, verify, and return row -> sample (of one source) with its split."""
    done = run_module("ingest", "--to-shards", out, *map(str, flags))
    assert done.returncode == 0, done.stderr
    assert run_module("shards", "verify", out).returncode == 0
    manifest, found = read_manifest(out), {}
    for split, shards in manifest.splits.items():
        for info in shards:
            with ShardReader(out, manifest, info) as reader:
                found |= {row["row"]: row | {"split": split} for row in reader.read_table().to_pylist()}
    return found


def subset(path: Path, to: Path, rows: list[int]) -> list[dict[str, str]]:
    """Write some rows of a CSV file to another, as they are; returns them."""
    with open(path, newline="", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    write_csv(to, header, [lines[row] for row in rows])
    return [dict(zip(header, lines[row], strict=True)) for row in rows]


@pytest.mark.slow
def test_nih_folder_with_text_made_of_labels(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "nih"
    rows = subset(folder / "labels.csv", tmp_path / "labels.csv", [*range(40), *range(500, 540)])
    flags = ["--images", folder / "images", "--path-column", "filename", "--csv", tmp_path / "labels.csv"]
    flags += ["--label-list-column", "Finding Labels", "--group-column", "Patient ID"]
    flags += ["--text-template", "{Finding Labels}. {View Position} view."]
    found = ingested(tmp_path / "out", *flags, "--val-fraction", "0.2", "--test-fraction", "0.3")
    assert sorted(found) == list(range(80))
    names = sorted({name for row in rows for name in row["Finding Labels"].split("|")})
    assert read_manifest(tmp_path / "out").labels == tuple(names)
    splits: dict[str, set[str]] = {}
    for number, row in enumerate(rows):
        sample = found[number]
        assert sample["text"] == f"{row['Finding Labels']}. {row['View Position']} view."
        present = {name for name in names if sample[f"label:{name}"] == 1}
        assert present == set(row["Finding Labels"].split("|"))
        assert all(sample[f"label:{name}"] in (0, 1) for name in names)
        splits.setdefault(row["Patient ID"], set()).add(sample["split"])
    assert all(len(each) == 1 for each in splits.values()) and len(splits) < 80
    assert {split for each in splits.values() for split in each} == {"train", "val", "test"}


@pytest.mark.slow
def test_clinical_notes_are_kept_to_the_byte(real_data: Path, tmp_path: Path) -> None:
    """Real notes hold U+FFFD, thin spaces, curly quotes, spaces at the ends; table and tar have them all."""
    folder = real_data / "paired"
    rows = subset(folder / "metadata.csv", tmp_path / "metadata.csv", [0, 24, 31, 32, 33, 34, 46, 49, 84, 89])
    notes = [row["clinical_notes"] for row in rows]
    assert {"\ufffd", "\u2009", "\u2103", "\u201c"} <= set("".join(notes))
    assert any(note != note.strip() for note in notes)
    flags = ["--images", folder / "images", "--path-column", "filename", "--text-column", "clinical_notes"]
    found = ingested(tmp_path / "out", *flags, "--csv", tmp_path / "metadata.csv", "--group-column", "patientid")
    assert [found[row]["text"] for row in range(10)] == notes
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        texts = {int(member.name[3:13]): tar.extractfile(member) for member in tar if member.name.endswith(".txt")}
        assert [texts[row].read() for row in range(10)] == [note.encode() for note in notes]


@pytest.mark.slow
def test_indiana_reports_with_other_films(real_data: Path, tmp_path: Path) -> None:
    """300 of the 3,955 XMLs, whose films nobody gave us: their impressions on made-up films, counted by `stats`."""
    folder, impressions = tmp_path / "reports", {}
    folder.mkdir()
    with tarfile.open(real_data / "reports" / "NLMCXR_reports.tgz") as archive:
        names = sorted(name for name in archive.getnames() if name.endswith(".xml"))[:300]
        for name in names:
            content = archive.extractfile(name).read()  # type: ignore[union-attr]
            (folder / Path(name).name).write_bytes(content)
            parts = re.findall(r'<AbstractText Label="IMPRESSION">(.*?)</AbstractText>', content.decode(), re.DOTALL)
            impressions[len(impressions)] = html.unescape("".join(parts)).strip()
    table = write_csv(tmp_path / "r.csv", ["report"], [[Path(name).name] for name in names])
    h5 = write_h5(tmp_path / "films.h5", np.tile(made_up_images(30), (10, 1, 1)))
    out, flags = tmp_path / "out", ("--text-folder", folder, "--text-column", "report", "--section", "impression")
    found = ingested(out, "--h5", h5, "--csv", table, *flags)
    expected = {row: text for row, text in impressions.items() if text}
    assert {row: sample["text"] for row, sample in found.items()} == expected
    rejects = list(csv.DictReader(open(out / "rejects.csv")))
    assert {int(each["row"]) for each in rejects} == set(range(300)) - set(expected) and 0 < len(rejects) < 10
    assert {each["reason"] for each in rejects} == {"report has no such section"}

    assert run_module("shards", "stats", out, "--json", tmp_path / "stats.json").returncode == 0
    stats = json.loads((tmp_path / "stats.json").read_text())["splits"]["train"]
    counts = Counter(expected.values())
    assert stats["reports"]["commonest"] == max(counts.values())
    assert stats["reports"]["repeating"] == sum(count for count in counts.values() if count > 1)
    assert stats["truncated"] == sum(sample["truncated"] for sample in found.values()) > 0
    assert stats["tokens_mean"] == pytest.approx(np.mean([sample["token_count"] for sample in found.values()]))
