"""DICOM films: what a viewer shows comes out, whatever wrote the file; damage is a reason and nothing leaks."""

import csv
import io
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY, assert_refused, made_up_images, run_module, state, write_csv
from PIL import Image

from ingest.images import MAX_PIXELS, Fault, fit, read_film
from shards.verify import verify

pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed (extra `dicom`)")
gdcm = pytest.importorskip("gdcm", reason="gdcm is not installed (extra `dicom`)")

HEIGHT, WIDTH = 400, 300
NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")


@pytest.fixture(scope="module")
def stored() -> np.ndarray:
    """(400, 300) 12-bit values with detail and noise."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    noise = np.random.default_rng(0).normal(0, 20, x.shape)
    return np.clip(2000 + 1500 * np.sin(x / 40) * np.cos(y / 50) + noise, 0, 4095).astype(np.uint16)


def dataset(pixels: np.ndarray, bits: int, syntax: str = NATIVE[1], **tags: Any) -> Any:
    """A film as an X-ray system writes it, with a patient whose name must not be seen again."""
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    data.PatientName, data.PatientID, data.StudyDescription = "CANARY^NAME", "CANARYMRN", "CANARY TEXT"
    data.Rows, data.Columns = pixels.shape[:2]
    data.SamplesPerPixel = pixels.shape[2] if pixels.ndim == 3 else 1
    if data.SamplesPerPixel == 3:
        data.PlanarConfiguration = 0
    data.PhotometricInterpretation = "RGB" if data.SamplesPerPixel == 3 else "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit = pixels.itemsize * 8, bits, bits - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    swap = syntax == NATIVE[2]
    data.PixelData = (pixels.byteswap() if swap else pixels).tobytes()
    data["PixelData"].VR = "OW"
    for name, value in tags.items():
        setattr(data, name, value)
    return data


def save(data: Any, path: Path) -> Path:
    syntax = str(data.file_meta.TransferSyntaxUID)
    encoding = {"implicit_vr": syntax == NATIVE[0], "little_endian": syntax != NATIVE[2]}
    data.save_as(path, **({} if syntax not in NATIVE else encoding), enforce_file_format=True)
    return path


def sequence(entries: np.ndarray, first: int, bits: int) -> Any:
    """A LUT of one item."""
    item = pydicom.Dataset()
    item.LUTDescriptor = [len(entries) % 65536, first, bits]
    item.LUTData = entries.astype("<u2").tobytes()
    item["LUTData"].VR = "OW"
    return pydicom.Sequence([item])


def linear(x: np.ndarray, center: float, width: float) -> np.ndarray:
    """PS3.3 C.11.2.1.2.1 to the letter, y from 0 to 255, one value at a time."""

    def one(value: float) -> float:
        if value <= center - 0.5 - (width - 1) / 2:
            return 0
        if value > center - 0.5 + (width - 1) / 2:
            return 255
        return ((value - (center - 0.5)) / (width - 1) + 0.5) * 255

    table = {value: one(float(value)) for value in np.unique(x)}
    return np.vectorize(table.get, otypes=[float])(x)


def shown(levels: np.ndarray) -> np.ndarray:
    """(320, 320) a film of these grey levels."""
    return fit(Image.fromarray(np.rint(levels).astype(np.uint8)), 320)


def film(path: Path) -> np.ndarray:
    found = read_film(path, 320)
    assert not isinstance(found, Fault), found.reason
    return found


class TestWhatAViewerShows:
    @pytest.mark.parametrize(("center", "width"), [(2048, 4096), (1500, 700), (2000.5, 1), (-10, 2), (9000, 3000)])
    def test_window(self, tmp_path: Path, stored: np.ndarray, center: float, width: float) -> None:
        path = save(dataset(stored, 12, WindowCenter=center, WindowWidth=width), tmp_path / "a.dcm")
        assert (film(path) == shown(linear(stored, center, width))).all()

    def test_the_first_of_several_windows(self, tmp_path: Path, stored: np.ndarray) -> None:
        tags = {"WindowCenter": [1000, 3000], "WindowWidth": [500, 90], "WindowCenterWidthExplanation": ["A", "B"]}
        path = save(dataset(stored, 12, **tags), tmp_path / "a.dcm")
        assert (film(path) == shown(linear(stored, 1000, 500))).all()

    def test_monochrome1_is_turned_over_after_the_window(self, tmp_path: Path, stored: np.ndarray) -> None:
        tags = {"PhotometricInterpretation": "MONOCHROME1", "WindowCenter": 1000, "WindowWidth": 1500}
        path = save(dataset(stored, 12, **tags), tmp_path / "a.dcm")
        assert (film(path) == shown(255 - linear(stored, 1000, 1500))).all()

    @pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16])
    def test_without_a_window_least_to_greatest(self, tmp_path: Path, stored: np.ndarray, dtype: type) -> None:
        """MIMIC-CXR's films: 16 bits, 12 of them used, and a window that is sometimes blank."""
        info = np.iinfo(dtype)
        values = (stored.astype(np.int64) * (info.max - info.min) // 4095 // 2 + info.min).astype(dtype)
        low, high = int(values.min()), int(values.max())
        expected = shown((values.astype(float) - low) / (high - low) * 255)
        for number, blank in enumerate(({}, {"WindowCenter": "", "WindowWidth": ""}, {"WindowWidth": 0.5})):
            path = save(dataset(values, info.bits, **blank), tmp_path / f"{number}.dcm")
            assert (film(path) == expected).all()

    def test_padding_is_not_the_least_value(self, tmp_path: Path, stored: np.ndarray) -> None:
        values = stored // 2 + 1000
        values[:, :40] = 0
        plain = film(save(dataset(values, 12), tmp_path / "a.dcm"))
        inside = values[:, 40:]
        stretched = np.clip((values.astype(float) - inside.min()) / (inside.max() - inside.min()), 0, 1)
        padded = film(save(dataset(values, 12, PixelPaddingValue=0), tmp_path / "b.dcm"))
        assert (padded == shown(stretched * 255)).all() and (padded != plain).any()

    def test_rescaled_and_signed(self, tmp_path: Path, stored: np.ndarray) -> None:
        signed = stored.astype(np.int16) - 2048
        tags = {"RescaleSlope": "0.5", "RescaleIntercept": "-1024", "WindowCenter": -1000, "WindowWidth": 800}
        path = save(dataset(signed, 12, **tags), tmp_path / "a.dcm")
        assert (film(path) == shown(linear(signed * 0.5 - 1024, -1000, 800))).all()

    def test_look_up_tables(self, tmp_path: Path, stored: np.ndarray) -> None:
        """VOI LUTs of 12 and of 8 bits (at which pydicom's own function fails), after a modality LUT."""
        curve = 4095 / (1 + np.exp(-(np.arange(3000) - 1400) / 300))
        path = save(dataset(stored, 12, VOILUTSequence=sequence(curve, 500, 12)), tmp_path / "a.dcm")
        found = curve.astype(np.uint16)[np.clip(stored.astype(int) - 500, 0, 2999)]
        assert (film(path) == shown(found / 4095 * 255)).all()
        path = save(dataset(stored, 12, VOILUTSequence=sequence(curve / 16, 500, 8)), tmp_path / "b.dcm")
        assert (film(path) == shown((curve / 16).astype(np.uint16)[np.clip(stored.astype(int) - 500, 0, 2999)])).all()
        squares = np.arange(4096) ** 2 // 256
        tags = {"ModalityLUTSequence": sequence(squares, 0, 16), "WindowCenter": 30000, "WindowWidth": 50000}
        path = save(dataset(stored, 12, **tags), tmp_path / "c.dcm")
        assert (film(path) == shown(linear(squares[stored], 30000, 50000))).all()

    @pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
    def test_as_pydicom_does_it(self, tmp_path: Path, stored: np.ndarray, function: str) -> None:
        """Parity with `apply_voi_lut` after `apply_modality_lut`, over its output range."""
        from pydicom.pixels import apply_modality_lut, apply_voi_lut

        tags = {"RescaleSlope": 2, "RescaleIntercept": -100, "WindowCenter": 3000.25, "WindowWidth": 2500.5}
        data = dataset(stored, 12, VOILUTFunction=function, **tags)
        low, high = -100.0, 4095 * 2 - 100.0
        expected = (apply_voi_lut(apply_modality_lut(stored, data), data) - low) / (high - low) * 255
        assert (film(save(data, tmp_path / "a.dcm")) == shown(expected)).all()

    def test_overlays_in_unused_bits_are_not_shown(self, tmp_path: Path, stored: np.ndarray) -> None:
        marked = stored | (np.random.default_rng(1).integers(0, 16, stored.shape).astype(np.uint16) << 12)
        tags = {"WindowCenter": 2000, "WindowWidth": 4000}
        clean, drawn = (save(dataset(p, 12, **tags), tmp_path / f"{n}.dcm") for n, p in enumerate((stored, marked)))
        assert (film(drawn) == film(clean)).all()

    def test_colours_become_grey(self, tmp_path: Path) -> None:
        colours = np.stack(made_up_images(3), axis=-1)
        expected = fit(Image.fromarray(colours), 320)
        assert (film(save(dataset(colours, 8), tmp_path / "rgb.dcm")) == expected).all()
        ybr = np.asarray(Image.fromarray(colours).convert("YCbCr"))
        path = save(dataset(ybr, 8, PhotometricInterpretation="YBR_FULL"), tmp_path / "ybr.dcm")
        assert np.abs(film(path).astype(int) - expected).max() <= 2

    def test_rounding_once_before_the_resize_costs_next_to_nothing(self, tmp_path: Path) -> None:
        """A film of 2,400 x 2,000 against the window and the resize in floating point, rounded at the end."""
        y, x = np.mgrid[:2400, :2000]
        values = (2000 + 1500 * np.sin(x / 240) * np.cos(y / 300) + (x * 7 + y * 13) % 29).astype(np.uint16)
        path = save(dataset(values, 12, WindowCenter=2048, WindowWidth=4096), tmp_path / "a.dcm")
        exact = np.clip((values - 2047.5) / 4095 + 0.5, 0, 1) * 255
        resized = Image.fromarray(exact.astype(np.float32)).resize((266, 320), Image.Resampling.LANCZOS)
        difference = film(path)[:, 27:293] - np.asarray(resized)
        # 0.25 is what rounding alone costs on average.
        assert np.abs(difference).mean() < 0.27 and np.abs(difference).max() < 1.1


def compressed(data: Any, syntax: str, path: Path) -> Path:
    """The same film in another transfer syntax, written by gdcm."""
    reader = gdcm.ImageReader()
    reader.SetFileName(str(save(data, path.with_suffix(".raw"))))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(syntax)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return path


LOSSLESS = {
    "RLE": "1.2.840.10008.1.2.5",
    "JPEG lossless": "1.2.840.10008.1.2.4.57",
    "JPEG lossless, first order": "1.2.840.10008.1.2.4.70",
    "JPEG-LS": "1.2.840.10008.1.2.4.80",
    "JPEG 2000": "1.2.840.10008.1.2.4.90",
}


class TestTransferSyntaxes:
    @pytest.mark.parametrize("syntax", NATIVE)
    def test_uncompressed(self, tmp_path: Path, stored: np.ndarray, syntax: str) -> None:
        tags = {"WindowCenter": 2000, "WindowWidth": 4000}
        path = save(dataset(stored, 12, syntax, **tags), tmp_path / "a.dcm")
        assert (film(path) == shown(linear(stored, 2000, 4000))).all()

    @pytest.mark.parametrize("syntax", LOSSLESS.values(), ids=LOSSLESS.keys())
    def test_lossless(self, tmp_path: Path, stored: np.ndarray, syntax: str) -> None:
        tags = {"WindowCenter": 2000, "WindowWidth": 4000}
        films = ((stored, 12), (stored * 16, 16), ((stored // 16).astype(np.uint8), 8))
        for number, (pixels, bits) in enumerate(films):
            path = compressed(dataset(pixels, bits, **tags), syntax, tmp_path / f"{number}.dcm")
            assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == syntax
            assert (film(path) == shown(linear(pixels, 2000, 4000))).all()
        signed = stored.astype(np.int16) - 2048
        path = compressed(dataset(signed, 12, WindowCenter=0, WindowWidth=3000), syntax, tmp_path / "signed.dcm")
        assert (film(path) == shown(linear(signed, 0, 3000))).all()

    def test_jpeg(self, tmp_path: Path, stored: np.ndarray) -> None:
        grey = (stored // 16).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(grey).save(buffer, "JPEG", quality=90)
        data = dataset(grey, 8, "1.2.840.10008.1.2.4.50", WindowCenter=128, WindowWidth=256)
        data.PixelData = pydicom.encaps.encapsulate([buffer.getvalue()])
        assert (film(save(data, tmp_path / "a.dcm")) == fit(Image.open(buffer), 320)).all()

    def test_pydicoms_own_files(self) -> None:
        """Files that came with pydicom, of many makers: read, or a reason; the same film is the same in each form."""
        folder = Path(pydicom.data.__file__).parent / "test_files"
        names = ("MR_small_RLE", "MR_small_implicit", "MR_small_bigendian", "MR_small_jp2klossless",
                 "MR_small_jpeg_ls_lossless", "MR_small_padded", "MR_small_expb")  # fmt: skip
        if not (folder / "MR_small.dcm").exists():
            pytest.skip("pydicom came without its test files")
        expected = film(folder / "MR_small.dcm")
        for name in names:
            assert (film(folder / f"{name}.dcm") == expected).all(), name
        reasons = {
            "MR_truncated": Fault.UNREADABLE,
            "rtdose": Fault.FRAMES,
            "rtplan": Fault.NO_PIXELS,
            "test-SR": Fault.NO_PIXELS,
            "image_dfl": Fault.UNSUPPORTED,
            "examples_palette": Fault.UNSUPPORTED,
            "no_meta": Fault.UNREADABLE,
        }
        assert {name: read_film(folder / f"{name}.dcm", 320) for name in reasons} == reasons


class TestDamage:
    def test_bombs_are_refused_before_decoding(self, tmp_path: Path, stored: np.ndarray) -> None:
        data = dataset(stored, 12, Rows=20_000, Columns=20_000)
        assert 20_000**2 > MAX_PIXELS
        assert read_film(save(data, tmp_path / "a.dcm"), 320) is Fault.TOO_LARGE
        # The tags are modest, the compressed frame is not.
        buffer = io.BytesIO()
        Image.new("L", (12_000, 12_000)).save(buffer, "JPEG")
        data = dataset((stored // 16).astype(np.uint8), 8, "1.2.840.10008.1.2.4.50")
        data.PixelData = pydicom.encaps.encapsulate([buffer.getvalue()])
        code = (
            "import sys\nfrom pathlib import Path\nfrom ingest.images import read_film\n"
            "print(read_film(Path(sys.argv[1]), 320).name, Path('/proc/self/status').read_text().split('VmHWM:')[1])"
        )
        run = subprocess.run(
            [sys.executable, "-c", code, save(data, tmp_path / "b.dcm")], cwd=REPOSITORY, capture_output=True, text=True
        )
        reason, kilobytes, *_ = run.stdout.split()
        assert reason == "UNREADABLE" and int(kilobytes) < 200_000, run.stderr

    @pytest.mark.parametrize(("form", "syntax"), [("JPEG", "50"), ("JPEG2000", "90")])
    def test_a_frame_of_another_size_is_not_decoded(
        self, tmp_path: Path, stored: np.ndarray, monkeypatch: pytest.MonkeyPatch, form: str, syntax: str
    ) -> None:
        """However few its bytes: of black JPEG 2000 makes next to nothing."""
        decoded, buffer = list[object](), io.BytesIO()
        monkeypatch.setattr("pydicom.pixels.pixel_array", lambda *_, **__: decoded.append(None))
        Image.new("L", (640, 480)).save(buffer, form)
        data = dataset((stored // 16).astype(np.uint8), 8, f"1.2.840.10008.1.2.4.{syntax}")
        data.PixelData = pydicom.encaps.encapsulate([buffer.getvalue()])
        assert read_film(save(data, tmp_path / "a.dcm"), 320) is Fault.UNREADABLE and not decoded

    def test_reasons(self, tmp_path: Path, stored: np.ndarray) -> None:
        cases: dict[str, tuple[Callable[[Any], None], Fault]] = {
            "frames": (lambda data: setattr(data, "NumberOfFrames", 2), Fault.FRAMES),
            "none": (lambda data: delattr(data, "PixelData"), Fault.NO_PIXELS),
            "no rows": (lambda data: delattr(data, "Rows"), Fault.NO_PIXELS),
            "no columns": (lambda data: setattr(data, "Columns", 0), Fault.UNREADABLE),
            "wide": (lambda data: setattr(data, "BitsAllocated", 32), Fault.UNSUPPORTED),
            "palette": (lambda data: setattr(data, "PhotometricInterpretation", "PALETTE COLOR"), Fault.UNSUPPORTED),
            "two": (lambda data: setattr(data, "SamplesPerPixel", 2), Fault.UNSUPPORTED),
            "short": (lambda data: setattr(data, "Rows", 401), Fault.UNREADABLE),
            "lut": (lambda data: setattr(data, "VOILUTSequence", [pydicom.Dataset()]), Fault.UNREADABLE),
        }
        for name, (damage, reason) in cases.items():
            data = dataset(stored, 12)
            damage(data)
            assert read_film(save(data, tmp_path / f"{name}.dcm"), 320) is reason, name
            assert reason.reason

    @pytest.mark.parametrize("syntax", [NATIVE[1], *LOSSLESS.values()])
    def test_nothing_but_a_reason_or_a_film(self, tmp_path: Path, stored: np.ndarray, syntax: str) -> None:
        """Cut and flipped files, some of which make gdcm abort: never an exception, never a dead process."""
        data = dataset(stored[:120, :100].copy(), 12)
        good = tmp_path / "good.dcm"
        if syntax in NATIVE:
            save(data, good)
        else:
            compressed(data, syntax, good)
        content, rng = good.read_bytes(), np.random.default_rng(0)
        outcomes = set()
        for number in range(60):
            bad = bytearray(content[: int(rng.integers(132, len(content)))] if number % 3 == 0 else content)
            for _ in range(4 if number % 3 else 0):
                bad[rng.integers(132, 1200 if number % 3 == 1 else len(bad))] ^= 1 << int(rng.integers(8))
            (tmp_path / "bad.dcm").write_bytes(bad)
            found = read_film(tmp_path / "bad.dcm", 320)
            outcomes.add(found if isinstance(found, Fault) else Fault.NONE)
        assert Fault.UNREADABLE in outcomes
        assert (film(good) == film(good)).all()

    def test_a_crash_of_gdcm_costs_one_film(self, tmp_path: Path, stored: np.ndarray) -> None:
        """The process that decodes is replaced; killed from outside, it says so and the film is not blamed."""
        import os
        import signal

        from ingest import dicom
        from shards.errors import InputError

        path = compressed(dataset(stored, 12), LOSSLESS["JPEG lossless"], tmp_path / "a.dcm")
        expected = film(path)
        child = dicom._GDCM._child
        assert child is not None
        os.kill(child.pid, signal.SIGSEGV)
        assert read_film(path, 320) is Fault.UNREADABLE
        assert (film(path) == expected).all()
        child = dicom._GDCM._child
        assert child is not None
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(InputError, match="killed"):
            read_film(path, 320)
        assert (film(path) == expected).all()

    def test_the_process_of_gdcm_ends_with_its_parent(self, tmp_path: Path, stored: np.ndarray) -> None:
        path = compressed(dataset(stored, 12), LOSSLESS["JPEG lossless"], tmp_path / "a.dcm")
        code = (
            "import sys, time\nfrom pathlib import Path\nfrom ingest import dicom\n"
            "from ingest.images import read_film\n"
            "read_film(Path(sys.argv[1]), 320)\nprint(dicom._GDCM._child.pid, flush=True)\ntime.sleep(600)"
        )
        with subprocess.Popen([sys.executable, "-c", code, path], cwd=REPOSITORY, stdout=subprocess.PIPE) as parent:
            assert parent.stdout is not None
            child = int(parent.stdout.readline())
            assert state(child) not in ("Z", "")
            parent.kill()
        deadline = time.monotonic() + 300
        while state(child) not in ("Z", ""):
            assert time.monotonic() < deadline, "the child survived"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, stored: np.ndarray) -> Path:
    """DICOM films and a PNG under names that say nothing, three of them bad, and their CSV."""
    folder = tmp_path_factory.mktemp("dicom")
    (folder / "films").mkdir()
    films = folder / "films"
    tags = {"WindowCenter": 2000, "WindowWidth": 4000}
    for number in range(12):
        pixels = np.roll(stored, 17 * number, axis=1)
        if number % 3 == 1:
            compressed(dataset(pixels, 12, **tags), LOSSLESS["JPEG lossless, first order"], films / f"{number}.img")
        else:
            save(dataset(pixels, 12, **tags), films / f"{number}.img")
    Image.fromarray((stored // 16).astype(np.uint8)).save(films / "12.img", format="PNG")
    save(dataset(np.stack([stored, stored]), 12, NumberOfFrames=2, Rows=HEIGHT, Columns=WIDTH), films / "13.img")
    (films / "14.img").write_bytes((films / "1.img").read_bytes()[:3000])
    save(dataset(stored, 12, Rows=30_000, Columns=30_000), films / "15.img")
    rows = [[f"{number}.img", f"Report {number}", number // 2] for number in range(16)]
    write_csv(folder / "r.csv", ["Path", "impression", "patient"], rows)
    for path in films.glob("*.raw"):
        path.unlink()
    return folder


class TestIngest:
    def test_a_folder_of_dicom_becomes_shards(self, folder: Path, tmp_path: Path, stored: np.ndarray) -> None:
        out = tmp_path / "out"
        command = ["ingest", "--to-shards", out, "--images", folder / "films", "--csv", folder / "r.csv"]
        command += ["--group-column", "patient", "--val-fraction", "0.2", "--encoding", "png"]
        done = run_module(*command)
        assert done.returncode == 0, done.stderr
        assert [problem for _, problem in verify(out, decode="all") if problem] == []
        rejects = {int(row["row"]): row["reason"] for row in csv.DictReader(open(out / "rejects.csv"))}
        assert rejects == {
            13: "film file holds several frames",
            14: "film file cannot be decoded",
            15: "film file declares too many pixels",
        }
        from test_ingest_sources import key, samples

        found = samples(out)
        assert len(found) == 13
        for number in range(12):
            expected = shown(linear(np.roll(stored, 17 * number, axis=1), 2000, 4000))
            assert (found[key(number)]["pixels"] == expected).all()
        # No tag of the files, and no name of one, is anywhere in the result or what was said.
        written = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
        said = (done.stdout + done.stderr).encode()
        for canary in (b"CANARY", b".img"):
            assert canary not in written + said

    def test_without_pydicom_one_line_says_what_to_install(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "blocked").mkdir()
        (tmp_path / "blocked" / "pydicom.py").write_text("raise ImportError('not here')")
        command = ["ingest", "--to-shards", tmp_path / "out", "--images", folder / "films", "--csv", folder / "r.csv"]
        done = run_module(*command, PYTHONPATH=str(tmp_path / "blocked"))
        assert_refused(done, "pydicom", "pip install -e '.[dicom]'")
        assert_refused(run_module(*command, "--dry-run", PYTHONPATH=str(tmp_path / "blocked")), "-e '.[dicom]'")
        assert not (tmp_path / "out" / "manifest.json").exists()
        assert run_module(*command).returncode == 0
