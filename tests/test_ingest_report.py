"""report.json and report.txt: every number against a set whose facts are known."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import made_up_images, run_module, write_csv, write_h5

from ingest.report import Encoded, encoding_lines
from shards.manifest import read_manifest

COUNT = 60


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, str]:
    """An ingest of two sources: the set, its report, and what the command said."""
    folder = tmp_path_factory.mktemp("report")
    images = made_up_images(COUNT)
    images[5], images[6], images[7] = 0, 0, 200  # show nothing
    images[11] = images[10]
    images[12] = images[10]
    images[21] = images[20]
    write_h5(folder / "a.h5", images.astype(np.float32))
    write_h5(folder / "b.h5", images[30:50])
    rows = [[f"Film {row}: no effusion.", row // 3, "1" if row % 2 else ""] for row in range(COUNT)]
    rows[5][0] = ""
    rows[8][0] = "NO IMPRESSION"
    rows[40][0] = rows[41][0] = "Effusion on the left."
    rows[42][0] = "word " * 100
    write_csv(folder / "a.csv", ["impression", "patient", "Edema"], rows)
    write_csv(folder / "b.csv", ["impression", "grade"], [[f"Other {row}", row] for row in range(20)])
    (folder / "list.toml").write_text(
        '[[source]]\nh5 = "a.h5"\ncsv = "a.csv"\ngroup_column = "patient"\nlabel_columns = ["Edema"]\nsplit = "train"\n'
        '[[source]]\nh5 = "b.h5"\ncsv = "b.csv"\nsplit = "val"\nlabel_columns = ["grade"]\n'
    )
    done = run_module("ingest", "--to-shards", folder / "out", "--sources", folder / "list.toml", "--workers", "2")
    assert done.returncode == 0, done.stderr
    return folder / "out", json.loads((folder / "out" / "report.json").read_text()), done.stdout


def test_rows_and_rejects(report: tuple[Path, dict, str]) -> None:
    root, found, said = report
    first, second = found["sources"]
    assert (first["rows"], first["samples"]) == (COUNT, COUNT - 4)
    assert first["rejected"] == {
        "film is all zero": 2,
        "report is empty": 1,
        "report is missing": 1,
        "film is constant": 1,
    }
    assert second == {"kind": "hdf5", "rows": 20, "samples": 20, "rejected": {}}
    assert "rejected 4 rows (some have several reasons); film is all zero: 2" in said
    lines = (root / "report.txt").read_text().splitlines()
    assert f"  source 0 (hdf5): {COUNT - 4} of {COUNT}; some of the others have several reasons" in lines
    assert "  source 1 (hdf5): 20 of 20" in lines


def test_films(report: tuple[Path, dict, str]) -> None:
    """Blank and equal films, by opaque keys, within a source and across: the second source repeats rows 30 to 49."""
    _, found, said = report
    assert "20 films are in train and in val, byte for byte" in said
    films = found["films"]
    assert (films["all_zero"], films["constant"]) == (2, 1)
    keys = {tuple(keys) for keys in films["equal"]}
    assert {("00-0000000010", "00-0000000011", "00-0000000012"), ("00-0000000020", "00-0000000021")} <= keys
    assert {(f"00-{row:010d}", f"01-{row - 30:010d}") for row in range(30, 50)} <= keys
    assert films["repeated"] == 5 + 40 and films["repeated_most"] == 3 and len(keys) == 22


def test_more_bytes_are_called_more() -> None:
    encoded = Encoded(codec="png", quality=None, source_bytes=10**7, set_bytes=4 * 10**7, measured=1, psnr=None,
                      resized_psnr=None, resized_difference=0.0)  # fmt: skip
    assert next(encoding_lines(encoded)) == "films took 10.0 MB, the set takes 40.0 MB: 4.0 times more"
    *_, loss = encoding_lines(dataclasses.replace(encoded, measured=0))
    assert "no loss" not in loss and "none of the films looked at" in loss


def test_bytes(report: tuple[Path, dict, str]) -> None:
    root, found, _ = report
    encoded = found["encoded"]
    assert encoded["source_bytes"] == COUNT * 320 * 320 * 4 + 20 * 320 * 320
    trios = [path for path in root.iterdir() if path.name.startswith(("train-", "val-"))]
    assert encoded["set_bytes"] == sum(path.stat().st_size for path in trios) and len(trios) == 6
    assert (encoded["codec"], encoded["quality"]) == ("jpeg", 95) and 30 < encoded["psnr"] < 60


def test_reports_and_labels(report: tuple[Path, dict, str]) -> None:
    root, found, _ = report
    assert found["stats"]["digest"] == read_manifest(root).digest
    train, val = found["stats"]["splits"]["train"], found["stats"]["splits"]["val"]
    assert (train["samples"], val["samples"]) == (COUNT - 4, 20)
    assert train["reports"]["repeating"] == 2 and train["truncated"] == 1 and train["side_words"] == 2
    assert train["tokens_quantiles"]["most"] == 77
    # Rows 6, 7 and 8 are all that patient 2 had; where a source names no patients, a row is its own.
    assert (train["groups"], val["groups"], train["ungrouped"], val["ungrouped"]) == (19, 20, 0, 0)
    accepted = set(range(COUNT)) - {5, 6, 7, 8}
    odd = sum(row % 2 for row in accepted)
    assert train["labels"]["Edema"] == {"1": odd, "0": 0, "-1": 0, "blank": len(accepted) - odd, "other": 0}
    assert found["stats"]["shared_films"] == {"train, val": 20}


def test_the_page_says_it_and_nothing_private(report: tuple[Path, dict, str]) -> None:
    root, _, said = report
    page = (root / "report.txt").read_text()
    for line in (
        "76 of 80 rows became samples",
        "    rejected 2: film is all zero",
        "45; report.json has their keys (22",
        "times less",
        "over 76 films measured",
        "labels with numbers that are not 1, 0, -1 or blank: grade\n",
    ):
        assert line in page, line
    assert "or blank: grade\n" in said
    for word in ("effusion", "Other", str(root.parent), "a.h5"):
        assert word not in page + (root / "report.json").read_text()
    assert run_module("shards", "verify", root).returncode == 0
