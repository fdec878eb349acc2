"""Faults in what training reads and writes: damaged and hostile checkpoints, full disks, changed settings, patients'
names (rows T6, T7, T8, T11 and T12).
"""

import contextlib
import io
import os
import pickle
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import FINDINGS, made_up_images, run_module, write_csv, write_h5
from soak_train import Life, Server, arguments, differing, outcome, serving
from test_train_faults import wait_for_step
from xxhash import xxh3_128_hexdigest

from train.checkpoint import (
    MAGIC,
    VERSION,
    list_checkpoints,
    newest_good,
    read_checkpoint,
    verify_checkpoint,
    write_checkpoint,
)
from train.commandline import read_config
from train.job import set_best_aside
from train.rows import read_rows

STEPS = ("--steps", "10")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(server: Server, shards_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 10 steps with checkpoints of steps 8 and 10. Read only: copy before going on."""
    out = tmp_path_factory.mktemp("whole") / "run"
    codes, errors = server.run(arguments(shards_dir, out, *STEPS))
    assert codes == [0], errors
    return out


def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of a run."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def digests(out: Path) -> dict[str, str]:
    """Every file of a run, by its name."""
    return {str(path): xxh3_128_hexdigest(path.read_bytes()) for path in sorted(out.rglob("*")) if path.is_file()}


# T6: damaged checkpoints


def test_every_cut_and_any_flip_is_seen(whole: Path, tmp_path: Path) -> None:
    run = copy(whole, tmp_path)
    (newest_step, newest), (older_step, _) = list_checkpoints(run / "checkpoints")
    content = newest.read_bytes()
    for point in range(100):
        newest.write_bytes(content[: len(content) * point // 100])
        with pytest.raises(ValueError, match=r"damaged|not a checkpoint"):
            verify_checkpoint(newest)
    found = newest_good(run / "checkpoints", warn=lambda _: None)
    assert found is not None and found[1]["step"] == older_step
    for place in range(0, len(content), len(content) // 40):
        newest.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(ValueError, match=r"damaged|not a checkpoint|version"):
            verify_checkpoint(newest)
    newest.write_bytes(content)
    assert read_checkpoint(newest)["step"] == newest_step


def another_model(path: Path) -> bytes:
    """A whole checkpoint of a run with other settings."""
    payload = read_checkpoint(path)
    payload["fingerprint"]["model.widths"] = [8, 8, 8, 8]
    return written(path, payload)


def written(path: Path, payload: dict) -> bytes:
    write_checkpoint(path, payload)
    return path.read_bytes()


DAMAGE: dict[str, Callable[[Path], bytes | None]] = {
    "cut": lambda path: path.read_bytes()[:-1],
    "no bytes": lambda _: b"",
    "a later version": lambda path: path.read_bytes().replace(f" {VERSION} ".encode(), f" {VERSION + 1} ".encode(), 1),
    "another model": another_model,
    "other fields": lambda path: written(path, {"step": 10, "model": {}}),
    "gone": lambda _: None,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_one_before_is_taken(server: Server, shards_dir: Path, whole: Path, tmp_path: Path, damage: str) -> None:
    run = copy(whole, tmp_path)
    newest = list_checkpoints(run / "checkpoints")[0][1]
    content = DAMAGE[damage](newest)
    newest.unlink()
    if content is not None:
        newest.write_bytes(content)
    codes, errors = server.run(arguments(shards_dir, run, *STEPS))
    assert codes == [0] and "going on after step 8" in errors, errors
    assert (content is None) or (errors.count("warning: ") == 1 and newest.name in errors)
    assert differing(outcome(run), outcome(whole)) == []


def test_none_good_is_no_new_beginning(server: Server, shards_dir: Path, whole: Path, tmp_path: Path) -> None:
    run = copy(whole, tmp_path)
    for _, path in list_checkpoints(run / "checkpoints"):
        path.write_bytes(path.read_bytes()[:-1])
    before = digests(run)
    codes, errors = server.run(arguments(shards_dir, run, *STEPS))
    assert codes == [2] and "none of the 2 checkpoints" in errors and len(errors.splitlines()) == 1, errors
    assert digests(run) == before


def test_weights_of_another_shape_are_named(server: Server, shards_dir: Path, whole: Path, tmp_path: Path) -> None:
    """Under the fingerprint of this run."""
    run = copy(whole, tmp_path)
    for _, path in list_checkpoints(run / "checkpoints"):
        payload = read_checkpoint(path)
        name = next(iter(payload["model"]))
        payload["model"][name] = torch.zeros(3)
        write_checkpoint(path, payload)
    codes, errors = server.run(arguments(shards_dir, run, *STEPS))
    assert codes == [2] and "holds another model" in errors and name in errors and "Traceback" not in errors, errors


def test_a_damaged_film_of_val_ends_all_ranks_and_the_steps_are_saved(
    server: Server, shards_dir: Path, tmp_path: Path
) -> None:
    damaged, run = Path(shutil.copytree(shards_dir, tmp_path / "set")), tmp_path / "run"
    tar = damaged / "val-000000.tar"
    content = bytearray(tar.read_bytes())
    content[1000] ^= 1  # in the first image, which is rank 0's
    tar.write_bytes(content)
    codes, errors = server.run(arguments(damaged, run, *STEPS, "--save-every", "100"), ranks=2)
    said = [line for line in errors.splitlines() if line.startswith("train.main: ")]
    assert codes == [2, 2] and len(said) == 1, errors
    assert "val-000000" in said[0] and "damaged" in said[0] and "stopped after step 5, which is saved" in said[0]
    assert [step for step, _ in list_checkpoints(run / "checkpoints")] == [5]


# T7: hostile files


class Payload:
    """Unpickled, it would leave a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def hostile(kind: str, marker: Path) -> bytes:
    """A pickle, or a torch file around one, or our own file around that, with a digest that is right."""
    if kind == "pickle":
        return pickle.dumps(Payload(marker))
    buffer = io.BytesIO()
    torch.save({"step": 10, "model": Payload(marker)}, buffer)
    content = buffer.getvalue()
    header = f"{MAGIC} {VERSION} {xxh3_128_hexdigest(content)} {len(content):020d}\n".encode()
    return content if kind == "torch" else header + content


@pytest.mark.parametrize("kind", ["pickle", "torch", "ours"])
def test_no_file_of_a_run_runs_code(server: Server, shards_dir: Path, whole: Path, tmp_path: Path, kind: str) -> None:
    """The newest checkpoint is passed over; what is none of a run's files is not opened."""
    run, marker = copy(whole, tmp_path), tmp_path / "marker"
    content = hostile(kind, marker)
    for name in (
        "checkpoints/step-0000010.pt",
        "checkpoints/.metadata",
        "dali.state",
        "metrics.jsonl",
        "versions.json",
    ):
        (run / name).write_bytes(content)
    (run / "config.json").write_bytes(content)
    codes, errors = server.run(arguments(shards_dir, run, *STEPS))
    assert codes == [0] and "going on after step 8" in errors and "Traceback" not in errors, errors
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["pickle", "torch", "ours"])
def test_no_file_that_is_named_runs_code(server: Server, shards_dir: Path, tmp_path: Path, kind: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / "file"
    path.write_bytes(hostile(kind, marker))
    for read in (read_checkpoint, read_config):
        with pytest.raises(ValueError, match=str(path)):
            read(path)
    codes, errors = server.run(["--config", str(path), "--shards", str(shards_dir), "--out", str(tmp_path / "run")])
    assert codes == [2] and "Traceback" not in errors, errors
    assert not marker.exists()


# T8: full and read-only disks


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path, Path]]:
    """A server with a small disk of its own: where it is for its runs, and how we see it."""
    folder = tmp_path_factory.mktemp("disk")
    mount = ["unshare", "-Urm", "sh", "-c", 'mount -t tmpfs -o size=64m tmpfs "$0" && exec "$@"', str(folder)]
    if subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("no mounts in a namespace here")
    with serving(*mount) as server:
        yield server, folder, Path(f"/proc/{server.pid}/root{folder}")


def fill(seen: Path) -> None:
    """Take the last byte of a disk."""
    with contextlib.suppress(OSError), open(seen / "filler", "wb", buffering=0) as file:
        for size in (1 << 20, 4096):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass


def unlike(run: Path, whole: Path) -> list[str]:
    """In what two runs differ besides the flag that the tests below need."""
    return [
        name for name in differing(outcome(run), outcome(whole)) if not name.endswith(("config/save_retries", " bytes"))
    ]


def test_a_full_disk(small_disk: tuple[Server, Path, Path], shards_dir: Path, whole: Path, tmp_path: Path) -> None:
    """Training goes on for as many saves as may fail, then ends; what was there is whole, and goes on with room."""
    server, folder, seen = small_disk
    command = arguments(shards_dir, folder / "full", *STEPS, "--save-retries", "1")
    life = Life(server, command, 1, real=False, hold=[0, 4, str(tmp_path / "go")])
    wait_for_step(seen / "full", 3, life.running)
    while not list_checkpoints(seen / "full" / "checkpoints"):
        assert life.running()
    fill(seen)
    (tmp_path / "go").touch()
    codes, errors = life.join()
    assert codes == [2] and "Traceback" not in errors, errors
    assert errors.count("cannot write the checkpoint") == 2 and "No space left on device" in errors
    assert "0 more in a row may fail (--save-retries)" in errors
    left = list_checkpoints(seen / "full" / "checkpoints")
    for _, path in left:
        verify_checkpoint(path)
    assert len(set(re.findall(r"cannot write the checkpoint (step-\d+)", errors))) == 2, "it did not go on training"
    (seen / "filler").unlink()
    codes, errors = server.run(command)
    assert codes == [0] and f"going on after step {left[0][0]}" in errors, errors
    assert unlike(seen / "full", whole) == []
    shutil.rmtree(seen / "full")


def test_a_disk_that_turns_read_only(
    small_disk: tuple[Server, Path, Path], shards_dir: Path, whole: Path, tmp_path: Path
) -> None:
    server, folder, seen = small_disk
    inside = ["nsenter", "-t", str(server.pid), "-U", "-m", "--preserve-credentials", "sh", "-c"]
    out, checkpoints = seen / "ro", folder / "ro" / "checkpoints"
    command = arguments(shards_dir, folder / "ro", *STEPS, "--save-retries", "0")
    life = Life(server, command, 1, real=False, hold=[0, 4, str(tmp_path / "go")])
    wait_for_step(out, 3, life.running)
    while not list_checkpoints(out / "checkpoints"):
        assert life.running()
    freeze = f"mount --bind {checkpoints} {checkpoints} && mount -o remount,bind,ro {checkpoints}"
    subprocess.run([*inside, freeze], check=True)
    (tmp_path / "go").touch()
    codes, errors = life.join()
    assert codes == [2] and "Read-only file system" in errors and "Traceback" not in errors, errors
    codes, errors = server.run(command)
    assert codes == [2] and "Traceback" not in errors, errors
    subprocess.run([*inside, f"umount {checkpoints}"], check=True)
    codes, errors = server.run(command)
    assert codes == [0] and "going on after step" in errors, errors
    assert unlike(out, whole) == []


# T11: going on with something else


def test_what_differs_is_named_field_by_field(server: Server, shards_dir: Path, whole: Path, tmp_path: Path) -> None:
    run = copy(whole, tmp_path)
    for _, path in list_checkpoints(run / "checkpoints"):
        payload = read_checkpoint(path)
        payload["fingerprint"] |= {"versions.torch": "1.0", "versions.nvidia-dali-cuda120": "2.0", "shards": "0123"}
        write_checkpoint(path, payload)
    before = digests(run)
    other = ("--seed", "7", "--batch-size", "4", "--data.flip", "0.25", "--data.effects.rotation", "5")
    codes, errors = server.run(arguments(shards_dir, run, *STEPS, *other))
    assert codes == [2] and len(errors.splitlines()) == 1, errors
    for words in ("seed was 0, is now 7", "batch_size was 8, is now 4", "data.flip was 0.5, is now 0.25", "effects"):
        assert words in errors
    assert f"versions.torch was 1.0, is now {version('torch')}" in errors and "shards was 0123, is now" in errors
    assert "dali" not in errors, "DALI does not decode here, so its version is nobody's business"
    assert digests(run) == before


def test_force_goes_on_and_notes_it(server: Server, shards_dir: Path, whole: Path, tmp_path: Path) -> None:
    """Also with another batch size, whose positions follow those of the old one."""
    run = copy(whole, tmp_path)
    other = ("--seed", "7", "--batch-size", "4", "--steps", "12", "--optim.weight-decay", "0.5", "--force")
    codes, errors = server.run(arguments(shards_dir, run, *other))
    assert codes == [0] and "warning: going on by --force although seed was 0, is now 7" in errors, errors
    noted = (run / "forced.txt").read_text().splitlines()
    assert sorted(line.removeprefix("after step 10: ") for line in noted) == [
        *("batch_size was 8, is now 4", "optim.weight_decay was 0.2, is now 0.5"),
        *("seed was 0, is now 7", "steps was 10, is now 12"),
    ]
    payload = read_checkpoint(list_checkpoints(run / "checkpoints")[0][1])
    assert (payload["step"], payload["position"]) == (12, 10 * 8 + 2 * 4)
    assert payload["fingerprint"]["seed"] == 7
    assert [group["weight_decay"] for group in payload["optimizer"]["param_groups"]] == [0.5, 0.0]


def test_force_onto_other_films_judges_anew(server: Server, shards_dir: Path, whole: Path, tmp_path: Path) -> None:
    """A loss on the films of before, which none on the new ones may ever reach, is no best one; nor are the bad samples
    there those of here."""
    run = copy(whole, tmp_path)
    for path in run.glob("checkpoints/step-*.pt"):
        payload = read_checkpoint(path)
        payload["best_loss"] = 0.001
        payload["schedule"]["patience"] = {"best": 0.001, "bad": 1}
        payload["schedule"]["plateau"] = {"patience": {"best": 0.001, "bad": 0}, "cuts": 2}
        payload["fingerprint"]["shards"] = "0123"
        payload["bad_samples"] = [{"shard": 99, "row": 0, "key": "00-0000000000", "offset": 0, "why": "damaged"}]
        write_checkpoint(path, payload)
    best = (run / "best.pt").read_bytes()
    more = ("--steps", "15", "--force", "--patience", "2", "--data.max-bad", "1")
    codes, errors = server.run(arguments(shards_dir, run, *STEPS, *more))
    assert codes == [0], errors
    assert "--steps 15 counts the 10 on other films, too: 5 are left for these" in errors
    assert (run / "best-until-10.pt").read_bytes() == best, "it would be the best until the first validation"
    payload = read_checkpoint(run / "best.pt")
    assert payload["step"] == 15 and payload["best_loss"] > 0.001
    assert payload["schedule"]["plateau"]["cuts"] == 2 and payload["bad_samples"] == []
    since = [row.get("films_since") for row in read_rows(run / "metrics.jsonl")]
    assert payload["films_since"] == 10 and since == [None] * 10 + [10] * 5


def test_the_best_model_of_films_that_a_run_goes_back_to_is_its_best_again(tmp_path: Path) -> None:
    """Whatever a run on other films, ended before it saved, did meanwhile."""
    best, aside = tmp_path / "best.pt", tmp_path / "best-until-10.pt"
    job = SimpleNamespace(folder=SimpleNamespace(best=best), done=10, warn=lambda _: None)
    job.checkpoint, job.on_other_films = {"best_step": 8}, True
    best.write_text("first")
    set_best_aside(job)
    assert aside.read_text() == "first" and not best.exists()
    best.write_text("second")  # of the other films, and the run was killed before its checkpoint of that step
    set_best_aside(job)
    assert aside.read_text() == "first", "the only one"
    best.unlink()
    set_best_aside(job)
    job.on_other_films = False
    for job.checkpoint in (None, {"best_step": None}):  # one that the other films' own run begins with has no best yet
        set_best_aside(job)
        assert not best.exists()
    job.checkpoint = {"best_step": 8}
    for _ in range(2):
        set_best_aside(job)
        assert best.read_text() == "first" and not aside.exists()
    best.unlink()
    set_best_aside(job)
    assert not best.exists()


# T12: nothing of a patient


def test_nothing_of_a_patient_gets_out(server: Server, tmp_path: Path) -> None:
    """Not into a run's files, nor into what is said when shards are damaged, checkpoints lost or settings wrong."""
    canaries = (b"MRNKANARIE", b"Erna Mustermann", b"Kanarienvogel")
    header = ["Path", "impression", "patient", *FINDINGS]
    table = [
        [f"Erna Mustermann/{n}.png", f"Kanarienvogel {n} on the left.", f"MRNKANARIE{n // 2}", n % 2, 0]
        for n in range(60)
    ]
    source = write_h5(tmp_path / "a.h5", made_up_images(60)), write_csv(tmp_path / "a.csv", header, table)
    shards = tmp_path / "shards"
    said = run_module(
        "ingest", "--to-shards", shards, "--h5", source[0], "--csv", source[1], "--group-column", "patient",
        "--label-columns", *FINDINGS, "--val-fraction", "0.2", "--workers", "1", "--shard-mb", "0.5",
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    texts = [said.stdout, said.stderr]
    out = tmp_path / "run"
    for more in (("--stop-at", "4"), ("--seed", "1"), ()):
        codes, errors = server.run(arguments(shards, out, *STEPS, *more))
        texts.append(errors)
        assert codes == [2 if "--seed" in more else 0]
    for tar in shards.glob("train-*.tar"):
        content = bytearray(tar.read_bytes())
        for place in range(2000, len(content), 4000):
            content[place] ^= 1
        tar.write_bytes(content)
    codes, errors = server.run(arguments(shards, tmp_path / "damaged", *STEPS))
    assert codes == [2] and "damaged" in errors
    names = [name for tar in shards.glob("*.tar") for name in member_names(tar)]
    assert names
    files = [path for run in (out, tmp_path / "damaged") for path in run.rglob("*")]
    assert len(files) > 8
    everything = "\n".join([*texts, errors, *names, *map(str, files)]).encode()
    everything += b"".join(path.read_bytes() for path in files if path.is_file())
    for canary in canaries:
        assert canary not in everything
    assert canaries[2] in (shards / "train-000000.tar").read_bytes()  # reports are in the shards, and nowhere else


def member_names(tar: Path) -> list[str]:
    """What stands in a tar's headers, damaged or not."""
    with contextlib.suppress(tarfile.TarError), tarfile.open(tar) as file:
        return file.getnames()
    return []
