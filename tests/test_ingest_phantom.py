"""ingest.phantom: the same films and reports everywhere, and reports that agree with their labels and films."""

import csv
import errno
import hashlib
import os
import re
import subprocess
import sys
from dataclasses import replace

import h5py
import numpy as np
import pytest
from conftest import REPOSITORY, assert_refused, run_module

from ingest import phantom
from ingest.phantom import COLUMNS, PhantomConfig, draw_film, make_phantom
from ingest.phantom_case import LABELS, Device, Effusion, Findings, Opacity, Pneumothorax, make_case, patient_of_film
from ingest.phantom_report import write_report

CASES = [make_case(7, index, index // 2) for index in range(600)]
PLAIN = replace(CASES[0].exposure, roll=0.0, turn=0.0, shift=(0.0, 0.0), zoom=1.0, noise=0.0, bars=(0.0, 0.0), gain=2.5)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def test_golden_films_and_reports():
    """A change here changes the data set of every seed: then phantom.VERSION has to grow."""
    films = np.stack([draw_film(case) for case in CASES[:12]]).astype(np.uint8)
    texts = "\n".join(f"{write_report(case).text} {write_report(case).labels}" for case in CASES)
    assert digest(films.tobytes()) == "d38f031ea51ba0ea"
    assert digest(texts.encode()) == "5635c5290e017723"


_DENSITY = """
import hashlib
from dataclasses import replace
from ingest.phantom_body import Body
from ingest.phantom_case import Device, Effusion, Findings, Opacity, Pneumothorax, make_case
from ingest.phantom_findings import devices, lung_findings

for index in range(4):
    case = make_case(7, index, index)
    findings = Findings(
        opacities=(Opacity(side="left", across=0.6, down=0.5, size=0.2, strength=0.9, grain=0.5),),
        effusions=(Effusion(side="left", amount=0.6),),
        pneumothorax=Pneumothorax(side="right", depth=0.4),
        heart=0.5,
        edema=0.8,
        devices=(Device(kind="picc", side="right", wobble=0.3),),
    )
    body = Body(replace(case, findings=findings))
    density = body.tissue() + body.bones() + lung_findings(body) + devices(body)
    print(density.dtype, hashlib.sha256(density.tobytes()).hexdigest())
"""


def test_same_films_whatever_vector_units_numpy_finds():
    """Before they are rounded to grey levels. NumPy knows its units by other names since 2.4."""
    without = {"NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX2 FMA3 AVX512F AVX512CD AVX512_SKX"}
    plain, plainer = (
        subprocess.run(
            [sys.executable, "-c", _DENSITY], cwd=REPOSITORY, env=os.environ | env, capture_output=True, text=True
        )
        for env in ({}, without)
    )
    assert plain.stdout.count("float32") == 4, plain.stderr
    assert plain.stdout == plainer.stdout


def test_same_bytes_whatever_the_workers(tmp_path):
    for workers in (1, 3):
        make_phantom(PhantomConfig(out=tmp_path / str(workers), samples=37, seed=5, workers=workers))
    for name in ("cxr.h5", "reports.csv"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()


def test_files_are_laid_out_as_chexzero_writes(tmp_path):
    make_phantom(PhantomConfig(out=tmp_path, samples=20, seed=5, workers=2))
    with h5py.File(tmp_path / "cxr.h5") as file:
        data = file["cxr"]
        assert data.shape == (20, 320, 320) and data.dtype == np.float32
        assert data.chunks is None and data.compression is None
        films = data[:]
    assert films.min() == 0 and films.max() == 255 and (films == films.round()).all()
    assert (films.std(axis=(1, 2)) > 20).all()
    assert np.array_equal(films[19], draw_film(make_case(5, 19, int(patient_of_film(20, 5)[19]))))
    with open(tmp_path / "reports.csv", newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == COLUMNS == ("Path", "impression", "patient", *LABELS)
    assert len(rows) == 20 and all(row[1] for row in rows)
    assert {cell for row in rows for cell in row[3:]} <= {"1", "0", "-1", ""}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cxr.h5", "reports.csv"]


def test_again_is_left_alone_and_another_is_refused(tmp_path):
    make_phantom(PhantomConfig(out=tmp_path, samples=4, workers=1))
    before = (tmp_path / "cxr.h5").stat().st_mtime_ns
    make_phantom(PhantomConfig(out=tmp_path, samples=4, workers=1))
    assert (tmp_path / "cxr.h5").stat().st_mtime_ns == before
    done = run_module("ingest.phantom", "--out", tmp_path, "--samples", "5")
    assert_refused(done, "already holds cxr.h5", "choose another --out")


def test_mistakes_are_one_line(tmp_path):
    assert_refused(run_module("ingest.phantom", "--out", tmp_path, "--samples", "0"), "--samples is 0")
    assert_refused(run_module("ingest.phantom", "--out", tmp_path, "--workers", "0"), "--workers is 0")
    assert_refused(run_module("ingest.phantom"), "--out")


def test_a_failure_leaves_nothing_under_a_final_name(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "disk gone")

    monkeypatch.setattr(phantom, "_draw_all", fail)
    with pytest.raises(OSError, match="disk gone"):
        make_phantom(PhantomConfig(out=tmp_path, samples=4, workers=1))
    assert not list(tmp_path.iterdir())


def test_patients_share_their_anatomy():
    patients = patient_of_film(4000, 0)
    films = np.bincount(patients)
    assert patients[0] == 0 and (np.diff(patients) >= 0).all() and (films > 0).all()
    assert films.max() <= 5 and (films >= 2).sum() > 500
    assert np.array_equal(patient_of_film(500, 0), patients[:500])
    one, two, other = make_case(0, 10, 4), make_case(0, 11, 4), make_case(0, 12, 5)
    assert one.patient == two.patient != other.patient
    assert one.exposure != two.exposure


KEYWORDS = {
    "Cardiomegaly": r"cardiomegaly|\bheart\b|cardiac",
    "Edema": r"edema|vasculature|vascularity",
    "Lung Opacity": r"opacity|consolidation|airspace|infiltrate",
    "Pleural Effusion": r"effusion|pleural fluid|costophrenic",
    "Pneumothorax": r"pneumothorax|fully expanded",
    "Support Devices": r"devices|\blines\b|\btube|catheter|picc|pacemaker|drain|\bett\b|central line",
}
DENIED = r"^(no|there is no|there are no|free of)\b|normal|\bclear\b|free of|sharp|fully expanded|unremarkable"
HEDGED = r"^(possible|questionable|findings may represent|equivocal)"


def read_labels(text: str) -> dict[str, int | None]:
    """A small labeller of its own: what each sentence says of each finding, by keywords."""
    found: dict[str, int | None] = dict.fromkeys(LABELS)
    for sentence in re.split(r"\.\s*", re.sub(r"impression: |\d+\. ", "", text.lower())):
        value = -1 if re.search(HEDGED, sentence) else 0 if re.search(DENIED, sentence) else 1
        for label, words in KEYWORDS.items():
            if re.search(words, sentence):
                assert found[label] in (None, value), text
                found[label] = value
    return found


def test_reports_say_what_the_labels_say():
    for case in CASES:
        report = write_report(case)
        assert read_labels(report.text) == report.labels, report.text


def test_labels_say_what_the_film_shows():
    values = []
    for case in CASES:
        labels, present = write_report(case).labels, case.findings.present()
        for label in LABELS:
            values.append(labels[label])
            assert labels[label] == -1 or present[label] == (labels[label] == 1)
    assert all(values.count(value) > 60 for value in (1, 0, -1, None))


def test_reports_vary():
    texts = [write_report(case).text for case in CASES]
    assert len(set(texts)) > 0.9 * len(texts)
    assert 20 < np.mean([len(text.split()) for text in texts]) < 45


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["opacity", "effusion", "pneumothorax"])
def test_a_finding_lies_on_its_side(side, kind):
    """The patient's left is the right of the image, and the report names the side."""
    findings = {
        "opacity": Findings(opacities=(Opacity(side=side, across=0.6, down=0.5, size=0.2, strength=0.9, grain=0.5),)),
        "effusion": Findings(effusions=(Effusion(side=side, amount=0.6),)),
        "pneumothorax": Findings(pneumothorax=Pneumothorax(side=side, depth=0.4)),
    }[kind]
    healthy = replace(CASES[3], exposure=PLAIN, findings=Findings())
    case = replace(healthy, findings=findings)
    changed = np.abs(draw_film(case) - draw_film(healthy)) > 12
    columns = np.flatnonzero(changed.any(axis=0))
    assert changed.sum() > 400
    assert columns.min() > 155 if side == "left" else columns.max() < 165
    other = {"left": "right", "right": "left"}[side]
    told = [write_report(replace(case, index=index)) for index in range(30)]
    stated = [report.text.lower() for report in told if 1 in report.labels.values()]
    both = r"right (or|and) left"
    assert stated and all(side in text and other not in re.sub(both, "", text) for text in stated)


def test_a_large_heart_is_wider_and_a_device_is_bright():
    healthy = replace(CASES[3], exposure=PLAIN, findings=Findings())
    large = replace(healthy, findings=Findings(heart=0.6))
    wider = draw_film(large)[170:230].astype(int) - draw_film(healthy)[170:230]
    assert (wider > 20).sum() > 400
    tube = replace(healthy, findings=Findings(devices=(Device(kind="ett", side="right", wobble=0.0),)))
    brighter = draw_film(tube) - draw_film(healthy)
    assert (brighter[:60, 150:170] > 15).sum() > 60 and (brighter > 15).sum() < 3000
