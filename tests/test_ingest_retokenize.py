"""Other tokens for a data set: the right ones, everything else as it was, and old or new at every moment."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, assert_refused, run_module
from test_shards_tools import make_set, problems, table

from ingest.retokenize import RetokenizeConfig, retokenize
from ingest.tokenizer import Tokenizer
from shards.errors import InputError
from shards.manifest import read_manifest


def tree(root: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in root.iterdir()}


def test_tokens_are_those_of_open_clip_and_come_back_to_the_same_bytes(shards_dir: Path, tmp_path: Path) -> None:
    from open_clip import get_tokenizer

    root = Path(shutil.copytree(shards_dir, tmp_path / "set"))
    before = {split: table(root, split) for split in ("train", "val", "test")}
    done = run_module("ingest.retokenize", "--tokenizer", "PE-Core-B-16", root)
    assert done.returncode == 0 and "clip-bpe (32 of 49,408)" in done.stdout, done.stderr
    assert problems(root) == [] and read_manifest(root).tokenizer.context == 32
    for split, rows in before.items():
        after = table(root, split)
        expected = get_tokenizer("PE-Core-B-16")([row["text"] for row in rows]).numpy()
        assert np.array_equal([row["tokens"] for row in after], expected)
        tokens = ("tokens", "token_count", "truncated")
        assert [{**row, **dict.fromkeys(tokens)} for row in after] == [{**r, **dict.fromkeys(tokens)} for r in rows]
        assert [row["token_count"] for row in after] == [int((line > 0).sum()) for line in expected]
    for name, digest in tree(shards_dir).items():
        assert (tree(root)[name] == digest) == (not name.endswith((".parquet", "manifest.json")))
    # Back to what ingest made: by another model's name, the same tokenizer.
    retokenize(RetokenizeConfig(root=root, tokenizer="ViT-B-32-quickgelu"))
    assert tree(root) == tree(shards_dir)
    said = retokenize(RetokenizeConfig(root=root, tokenizer="ViT-L-14"))
    assert "the tokens are those of clip-bpe" in said and tree(root) == tree(shards_dir)


def test_long_reports_are_cut_as_open_clip_does() -> None:
    from open_clip import get_tokenizer

    tokenizer = Tokenizer("coca_ViT-B-32")
    for text in ("", "No effusion.", "left " * 74, "left " * 75, "left " * 300, "größer ½ 肺 &amp;\r\n\ufffd"):
        tokens, count, truncated = tokenizer(text)
        assert tokens.dtype == np.uint16 and np.array_equal(tokens, get_tokenizer("coca_ViT-B-32")([text])[0])
        assert count == max(np.flatnonzero(tokens)) + 1 and truncated == (text in ("left " * 75, "left " * 300))


def test_mistakes_are_one_line(shards_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_refused(run_module("ingest.retokenize", "--tokenizer", "ViT-B-32", tmp_path), "manifest.json")
    assert_refused(run_module("ingest.retokenize", tmp_path), "--tokenizer")
    root = Path(shutil.copytree(shards_dir, tmp_path / "set"))
    assert_refused(
        run_module("ingest.retokenize", "--tokenizer", "roberta-ViT-B-32", root), "cannot be loaded", "Hugging Face"
    )
    with pytest.raises(InputError, match="no model 'ViT-B-33'; it knows for example ViT-B-32"):
        retokenize(RetokenizeConfig(root=root, tokenizer="ViT-B-33"))
    handle = os.open(root, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="another retokenize is at work"):
        retokenize(RetokenizeConfig(root=root, tokenizer="PE-Core-B-16"))
    os.close(handle)
    monkeypatch.setattr("ingest.tokenizer._MERGES", 48_893)
    with pytest.raises(InputError, match=r"the tokenizer of 'PE-Core-B-16' is not CLIP's"):
        retokenize(RetokenizeConfig(root=root, tokenizer="PE-Core-B-16"))
    assert tree(root) == tree(shards_dir)


def test_a_damaged_set_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    root = make_set(tmp_path / "set")
    content = bytearray((root / "train-000001.parquet").read_bytes())
    content[300] ^= 1
    (root / "train-000001.parquet").write_bytes(content)
    before = tree(root)
    with pytest.raises(InputError, match="train-000001"):
        retokenize(RetokenizeConfig(root=root, tokenizer="PE-Core-B-16"))
    assert tree_of_files(root) == before
    assert any("unfinished retokenize" in problem for problem in problems(root))


def tree_of_files(root: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in root.iterdir() if path.is_file()}


# Runs in a process of its own: forks a child that dies at its Nth change to the file system, and one that looks.
KILLS = """
import os, shutil, sys
from pathlib import Path
import ingest.retokenize as r
from shards.manifest import read_manifest
from shards.schema import TokenizerSpec
from shards.verify import verify

class Stub:
    def __init__(self, name):
        self.spec = TokenizerSpec(name="stub", digest="1" * 32, context=int(name), vocab_size=100)
    def __call__(self, text):
        import numpy as np
        tokens = np.zeros(self.spec.context, dtype=np.uint16)
        tokens[:5] = [90, *[byte % 90 for byte in text.encode()[7:10]], 91]
        return tokens, 5, True

r.Tokenizer = Stub
os.fsync = lambda handle: None  # nobody cuts the power here

def child(work):
    # A process of its own: what it does to memory and threads stays there.
    pid = os.fork()
    if not pid:
        code = 1
        try:
            code = work() or 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def run(root, name):
    r.retokenize(r.RetokenizeConfig(root=root, tokenizer=name))

def run_and_die(root, name, when):
    left = [when]
    def dying(function):
        def wrapped(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)
            return function(*args, **kwargs)
        return wrapped
    for name_ in ("replace", "symlink", "link", "mkdir", "unlink", "rmdir", "fsync"):
        setattr(os, name_, dying(getattr(os, name_)))
    run(root, name)

def expect(root, contexts, whole):
    found = read_manifest(root).tokenizer.context
    problems = [p for _, p in verify(root) if p and (whole or "unfinished retokenize" not in p)]
    links = [p.name for p in root.iterdir() if p.is_symlink()] if whole else []
    if problems or links or found not in contexts:
        print(found, problems, links, flush=True)
        return 1
    return found  # the exit code

origin, work = Path(sys.argv[1]), Path(sys.argv[2])
states = []
for when in range(1000):
    root, other = work / f"{when}", work / f"{when}-other"
    shutil.copytree(origin, root)
    died = child(lambda: run_and_die(root, "6", when))
    assert died in (0, 9), (when, died)
    states.append(child(lambda: expect(root, (8, 6), died == 0)))
    assert states[-1] in (8, 6), (when, states[-1])
    if not died:
        break
    if when % 3:
        continue
    # Going on, and, at every other of these points, changing one's mind.
    shutil.copytree(root, other, symlinks=True)
    for folder, name in ((root, 6), (other, 9)) if when % 2 == 0 else ((root, 6),):
        assert child(lambda: run(folder, str(name))) == 0, (when, name)
        assert child(lambda: expect(folder, (name,), True)) == name, (when, name)
        assert (folder / "train-000000.tar").read_bytes() == (origin / "train-000000.tar").read_bytes()
    if when:
        assert all((root / p.name).read_bytes() == p.read_bytes() for p in (work / "0").iterdir()), when
    shutil.rmtree(other)
print("".join(map(str, states)))
"""


def test_killed_anywhere_it_reads_as_old_or_new_and_goes_on(tmp_path: Path) -> None:
    origin = make_set(tmp_path / "set", {"train-000000": range(0, 6), "val-000000": range(32, 35)})
    (tmp_path / "work").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLS, origin, tmp_path / "work"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    states = done.stdout.strip()
    # One moment, and one only, at which the old set becomes the new one.
    assert len(states) > 50 and states.count("8") > 30 and states == "8" * states.count("8") + "6" * states.count("6")
