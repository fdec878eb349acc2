"""What the tools of `shards` say and do: verify, preview, stats, export, on a small set whose every fact is known."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY, assert_refused, run_module
from PIL import Image
from xxhash import xxh3_128_hexdigest

from pipeline.selection import read_keys
from shards.encodings import encode
from shards.errors import InputError
from shards.export import ExportConfig, choose
from shards.export import run as export
from shards.lock import exclusive
from shards.manifest import read_manifest, write_manifest
from shards.preview import PreviewConfig, choose_rows, lacks_letters, load_font, read_films, wrap
from shards.query import parse_query
from shards.reader import ShardReader
from shards.schema import CODEC_EXTENSIONS, NO_GROUP, FileInfo, ImageSpec, Manifest, SourceInfo, TokenizerSpec
from shards.tally import repeats
from shards.verify import VerifyConfig, verify
from shards.writer import Sample, ShardWriter, encode_table, footer_size

LABELS = ("Cardiomegaly", "Pleural Effusion")
CONTEXT = 8
SPEC = ImageSpec(height=32, width=32)
SHARDS = {"train-000000": range(0, 20), "train-000001": range(20, 32), "val-000000": range(32, 40)}
"""Shard -> rows of the source in it."""


def film(row: int, size: tuple[int, int] = (32, 32), mode: str = "L", fmt: str = "JPEG") -> bytes:
    """A film whose grey level tells its row."""
    buffer = io.BytesIO()
    Image.new(mode, size, 3 * row if mode == "L" else (3 * row,) * 3).save(buffer, fmt)
    return buffer.getvalue()


def sample(row: int, **changes) -> Sample:
    """Rows 0..39. Two films a patient; rows 0 and 1 share their film and their report, 32 repeats the film of 5."""
    same, said = {1: 0, 32: 5}.get(row, row), {1: 0}.get(row, row)
    count = 3 + row % 6
    fields = {
        "source": 0,
        "row": row,
        "image": film(same),
        "text": f"Report {said}: größer, {'left' if said % 4 == 0 else 'no'} effusion.",
        "tokens": np.array([90, *range(1, count - 1), 91, *[0] * (CONTEXT - count)], dtype=np.uint16),
        "token_count": count,
        "truncated": count == CONTEXT,
        "side_words": said % 4 == 0,
        "group": row // 2,
        "labels": ((1.0, 0.0, -1.0, None)[row % 4], 1.0 if row % 8 == 0 else None),
    }
    return Sample(**fields | changes)


def make_set(root: Path, shards: dict[str, range] = SHARDS, labels: tuple[str, ...] = LABELS, **changes) -> Path:
    """Write the set; `changes` replace fields of the manifest, `samples` (row -> fields) those of samples."""
    root.mkdir()
    odd, spec = changes.pop("samples", {}), changes.get("image", SPEC)
    ranges = {"train": (0, 16), "val": (16, 20)}
    infos = []
    for name, rows in shards.items():
        groups = None if odd else ranges[name.split("-")[0]]
        with ShardWriter(root, name, image=spec, context=CONTEXT, labels=labels, block_rows=4, groups=groups) as writer:
            for row in rows:
                writer.add(sample(row, **odd.get(row, {})))
        infos.append(writer.info)
    rows = sum(map(len, shards.values()))
    splits = dict.fromkeys(name.split("-")[0] for name in shards)
    fields = {
        "schema_version": 1,
        "image": SPEC,
        "tokenizer": TokenizerSpec(name="t", digest="0" * 32, context=CONTEXT, vocab_size=100),
        "labels": labels,
        "block_rows": 4,
        "seed": 0,
        "sources": (SourceInfo(kind="hdf5", rows=50, samples=rows, digest="0" * 32),),
        "splits": {split: tuple(info for info in infos if info.name.startswith(split)) for split in splits},
        "groups": {split: ranges[split] for split in splits},
    }
    write_manifest(root, Manifest(**fields | changes))
    return root


def problems(root: Path, **options) -> list[str]:
    return [problem for _, problem in verify(root, **options) if problem]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set. Read only; copy before changing."""
    return make_set(tmp_path_factory.mktemp("tools") / "set")


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "set"))


# verify


def test_the_same_is_found_by_any_number_of_processes(copy: Path) -> None:
    assert problems(copy, workers=2, decode="all") == []
    for name in ("train-000001.tar", "val-000000.parquet"):
        content = bytearray((copy / name).read_bytes())
        content[900] ^= 1
        (copy / name).write_bytes(content)
    found = problems(copy, workers=2)
    assert len(found) == 2 and found == problems(copy)
    assert "train-000001, sample 00-0000000020" in found[0] and "val-000000" in found[1]


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (film(7)[:-80], "does not decode as jpeg"),
        (b"not an image", "does not decode as jpeg"),
        (film(7, size=(32, 31)), "an image of 31 x 32, not 32 x 32"),
        (film(7, mode="RGB"), "of kind RGB, not L"),
    ],
)
def test_films_that_do_not_decode_are_found_although_their_digest_is_right(
    tmp_path: Path, image: bytes, words: str
) -> None:
    root = make_set(tmp_path / "set", samples={7: {"image": image}})
    (found,) = problems(root, decode="all")
    assert words in found and "train-000000, sample 00-0000000007" in found
    assert problems(root, decode=0) == []


def test_a_key_twice_is_found_across_shards_and_splits(tmp_path: Path) -> None:
    for name, shards in {
        "shards": {"train-000000": range(4), "train-000001": range(3, 8)},
        "splits": {"train-000000": range(32), "val-000000": range(31, 40)},
    }.items():
        samples = {31: {"group": NO_GROUP}} if name == "splits" else {}
        root = make_set(tmp_path / name, shards, samples=samples, groups={})
        found = problems(root)
        assert len(found) >= 1 and f"key 00-00000000{'03' if name == 'shards' else '31'} appears twice" in found[0]
    root = make_set(tmp_path / "outside", sources=(SourceInfo(kind="hdf5", rows=39, samples=40, digest="0" * 32),))
    assert any("source 00 does not have" in problem for problem in problems(root))
    root = make_set(tmp_path / "count", sources=(SourceInfo(kind="hdf5", rows=50, samples=41, digest="0" * 32),))
    assert problems(root) == ["source 00 has 40 samples, the manifest says 41; ingest again"]


def test_a_patient_in_two_splits_is_found_whatever_the_ranges_say(tmp_path: Path) -> None:
    for name, ranges in {"none": {}, "one": {"train": (0, 16)}}.items():
        root = make_set(tmp_path / name, samples={35: {"group": 3}, 36: {"group": NO_GROUP}}, groups=ranges)
        (found,) = problems(root)
        assert "1 groups are in train and in val (leak), group 3 first" in found
    root = make_set(tmp_path / "both", samples={35: {"group": 3}})
    assert any("leak" in problem for problem in problems(root))


def test_impossible_tokens_are_found(tmp_path: Path) -> None:
    for number, odd in enumerate(({"tokens": np.full(CONTEXT, 100, dtype=np.uint16)}, {"token_count": CONTEXT + 1})):
        (found,) = problems(make_set(tmp_path / str(number), samples={7: odd}))
        assert "train-000000: it holds tokens outside 8 of 100" in found


def forge(root: Path, column: str, values: pa.Array) -> Path:
    """Change a column of the last shard, and every digest with it."""
    manifest = read_manifest(root)
    info = manifest.splits["val"][0]
    path = root / f"{info.name}.parquet"
    rows = pq.read_table(path)
    number = rows.schema.get_field_index(column)
    content = encode_table(rows.set_column(number, rows.schema.field(number), values), manifest.block_rows)
    path.write_bytes(content)
    footer = content[-footer_size(content) :]
    parquet = FileInfo(bytes=len(content), xxh3=xxh3_128_hexdigest(content))
    info = replace(info, parquet=parquet, footer_bytes=len(footer), footer_xxh3=xxh3_128_hexdigest(footer))
    write_manifest(root, replace(manifest, splits=manifest.splits | {"val": (info,)}))
    return root


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("text", pa.array([None] + ["a"] * 7), "column 'text' has blanks"),
        ("truncated", pa.array([None] + [True] * 7), "column 'truncated' has blanks"),
        ("text", pa.array([b"\xff"] * 8, pa.binary()).view(pa.string()), "makes no sense"),
        ("text", pa.array(["a"] * 8), "differ from the table"),
        ("label:Cardiomegaly", pa.array([1.0] * 8, pa.float32()), "differ from the table"),
        ("size", pa.array([1 << 62] * 8), "do not fit its tar"),
        ("row", pa.array(range(8)), "the key does not name its source row"),
        ("key", pa.array([f"00-{row:010d}" for row in range(8)]), "the key does not name its source row"),
        ("source", pa.array([200] * 8, pa.uint8()), "names a source that the manifest does not"),
        ("xxh3", pa.array([1] * 8, pa.uint64()), "not those that were ingested"),
        ("offset", pa.array([1024] * 8), "header or offset is wrong"),
    ],
)
def test_tables_that_lie_are_found_although_their_digests_are_right(
    copy: Path, column: str, values: pa.Array, words: str
) -> None:
    assert any(words in problem for problem in problems(forge(copy, column, values))), problems(copy)


@pytest.mark.parametrize("codec", CODEC_EXTENSIONS)
def test_every_codec_is_decoded_shown_and_exported(tmp_path: Path, codec: str) -> None:
    spec = replace(SPEC, codec=codec)
    images = {row: encode(np.full((32, 32), 3 * row, dtype=np.uint8), spec) for row in range(40)}
    samples = {row: {"image": image} for row, image in images.items()}
    root = make_set(tmp_path / "set", image=spec, samples=samples)
    assert problems(root, decode="all") == []
    (shown,) = read_films(root, read_manifest(root), "train", np.array([23]))
    assert shown.key == "00-0000000023" and np.abs(shown.pixels - 69.0).max() <= (1 if codec == "jpeg" else 0)
    export(ExportConfig(root=root, where="row == 23", out=tmp_path / "out", to="files"))
    assert (tmp_path / "out" / "train" / f"00-0000000023.{spec.extension}").read_bytes() == images[23]
    samples[7] = {"image": images[7][: len(images[7]) // 2]}
    (found,) = problems(make_set(tmp_path / "cut", image=spec, samples=samples), decode="all")
    assert f"does not decode as {codec}" in found and "00-0000000007" in found


def test_the_commands_explain_themselves() -> None:
    done = run_module("shards", "--help")
    assert done.returncode == 0 and "{verify,inspect,preview,stats,export}" in done.stdout
    done = run_module("shards", "export", "--help")
    assert done.returncode == 0 and "--where" in done.stdout
    assert_refused(run_module("shards", "stats", "DIR", "--no-such-flag", "1"), "--no-such-flag")


def test_verify_command(small: Path) -> None:
    done = run_module("shards", "verify", small, "--workers", "2", "--decode", "all")
    assert done.returncode == 0 and "3 shards, 40 samples" in done.stdout and "40 images decoded" in done.stdout
    assert_refused(run_module("shards", "verify", small, "--decode", "-1"), "--decode -1")
    assert_refused(run_module("shards", "verify", small, "--decode", "some"), "some")
    with pytest.raises(InputError, match="--workers 0"):
        VerifyConfig(root=small, workers=0)


# the query language


TABLE = {
    "label:A": [1.0, 0.0, -1.0, None],
    "label:Big Heart": [None, 1.0, 1.0, 1.0],
    "label:size": [5.0, 6.0, 7.0, 8.0],
    "size": [10, 20, 30, 40],
    "token_count": [3, 4, 5, 6],
    "side_words": [True, False, True, False],
    "truncated": [False, False, False, True],
    "key": ["00-0000000000", "00-0000000001", "00-0000000002", "00-0000000003"],
    "row": [0, 1, 2, 3],
}
QUERIES = {
    "A == 1": [0],
    "A != 1": [1, 2, 3],
    "not A == 1": [1, 2, 3],
    "A < 1": [1, 2],
    "A is None": [3],
    "A is not None and not (A == -1 or `Big Heart` == 1)": [0],
    "A in (1, -1)": [0, 2],
    "A not in [1, -1]": [1, 3],
    "-1 <= A < 1": [1, 2],
    "A == `Big Heart`": [],
    "`Big Heart` == 1 and side_words": [2],
    "side_words == False or truncated": [1, 3],
    "side_words or A == 0": [0, 1, 2],
    "split == 'val'": [0, 1, 2, 3],
    'split in ("train", "test")': [],
    "key == '00-0000000002'": [2],
    "size > 20": [2, 3],
    "`label:size` > 6.5": [2, 3],
    "row == 99999999999999999999": [],
    " token_count >= 5\n and row != 3": [2],
}


@pytest.mark.parametrize("text", QUERIES)
def test_query(text: str) -> None:
    query = parse_query(text, ("A", "Big Heart", "size"))
    table = pa.table({name: pa.array(values) for name, values in TABLE.items()})
    mask = query.mask(table.select(query.columns), "val")
    assert mask.dtype == bool and np.flatnonzero(mask).tolist() == QUERIES[text]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A", "A is no yes or no"),
        ("A = 1", "cannot be read"),
        ("", "cannot be read"),
        ("A == 1; import os", "cannot be read"),
        ("B == 1", "no column 'B'; columns are A, Big Heart, size, split"),
        ("`B` == 1", "no column 'B'"),
        ("`A == 1", "backtick is not closed"),
        ("A == 'x'", "A is a number, 'x' is a text"),
        ("split == 1", "split is a text"),
        ("A == True", "True is a truth"),
        ("1 == 1", "both constants"),
        ("side_words < True", "neither less nor more"),
        ("row is None", "never blank"),
        ("A is 1", "None only"),
        ("A in 1", "list of constants"),
        ("A + 1 == 2", "A + 1 is neither a column nor a constant"),
        ("`Big Heart`.x == 1", "is neither a column nor a constant"),
        ("__import__('os').system('true') == 1", "neither a column nor a constant"),
        ("(lambda: 1)() == 1", "neither a column nor a constant"),
        ("[A for A in (1,)] == 1", "neither a column nor a constant"),
        ("f'{A}' == key", "neither a column nor a constant"),
        ("(A := 1) == 1", "neither a column nor a constant"),
        ("1", "1 is no comparison"),
        ("A == None", "None is neither"),
        ("A == 1j", "1j is neither"),
        ("(" * 1500 + "A == 1" + ")" * 1500, "where "),
        ("not " * 900 + "A == 1", "where "),
        ("A == 1" + " or A == 1" * 900, "characters"),
        ("A == 1\0", "where "),
    ],
)
def test_queries_outside_the_language_are_refused(text: str, words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        parse_query(text, ("A", "Big Heart", "size"))


# preview


def test_preview_shows_the_films(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    done = run_module("shards", "preview", small, "--split", "val", "--count", "4", "--out", out)
    assert done.returncode == 0 and "4 of 8 films of val" in done.stdout, done.stderr
    sheet = np.asarray(Image.open(out))
    rows = 32 + choose_rows(8, 4, 0)
    # Two columns; the middle of each film has the grey level of its row.
    middles = [sheet[8 + 112, 8 + 112], sheet[8 + 112, 8 + 232 + 112]]
    assert np.abs(np.array(middles) - 3.0 * np.where(rows == 32, 5, rows)[:2]).max() <= 2
    assert (sheet[8 + 226 : 8 + 240, 8:200] < 200).any(), "no key under the first film"
    first = out.read_bytes()
    run_module("shards", "preview", small, "--split", "val", "--count", "4", "--out", out)
    assert out.read_bytes() == first
    run_module("shards", "preview", small, "--split", "val", "--count", "4", "--seed", "1", "--out", out)
    assert out.read_bytes() != first


def test_preview_draws_each_row_once_and_any_of_them() -> None:
    for rows, count in ((20, 20), (21, 20), (1000, 20), (100_000_000_000, 20), (3, 20)):
        drawn = choose_rows(rows, count, 7)
        assert len(np.unique(drawn)) == len(drawn) == min(rows, count) and drawn.min() >= 0 and drawn.max() < rows
    assert len(np.unique(np.concatenate([choose_rows(50, 5, seed) for seed in range(100)]))) == 50


def test_preview_refuses(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    assert_refused(run_module("shards", "preview", small, "--split", "test", "--out", out), "no split 'test'")
    for change, words in (
        ({"count": 0}, "--count 0"),
        ({"out": tmp_path / "no" / "x.png"}, "no folder"),
        ({"out": tmp_path / "x.jpg"}, "does not end in .png"),
    ):
        with pytest.raises(InputError, match=words):
            PreviewConfig(**{"root": small, "out": out} | change)
    assert list(tmp_path.iterdir()) == []
    assert_refused(run_module("shards", "preview", small, "--out", out, "--font", __file__), "--font", "cannot be used")


def test_preview_draws_the_letters_of_reports_in_other_languages_or_says_that_it_cannot() -> None:
    font = load_font(None)
    assert not lacks_letters(font, "Pleuraerguß, Lungenödem; corazón de tamaño normal. Сердце не расширено. Καρδιά")
    assert lacks_letters(font, "Effusion: 흉수")


def test_preview_keeps_reports_of_any_kind_inside_their_cell() -> None:
    font = load_font(None)
    for text in ("x" * 5000, "word " * 1000, "", "\n\t ", "ö§ 肺 \u202e\x00 a", "W" * 60 + " " + "i " * 500):
        lines = wrap(text, font)
        assert len(lines) <= 5 and all(font.getlength(line) <= 224 for line in lines)
    assert wrap("word " * 1000, font)[-1].endswith("...") and wrap("No effusion.", font) == ["No effusion."]


# stats


def test_stats_count_what_is_there(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "stats.json"
    done = run_module("shards", "stats", small, "--json", out)
    assert done.returncode == 0, done.stderr
    stats = json.loads(out.read_text())
    assert stats["digest"] == read_manifest(small).digest and stats["context"] == CONTEXT
    train, val = stats["splits"]["train"], stats["splits"]["val"]
    assert (train["samples"], val["samples"]) == (32, 8)
    sizes = [len(film(0 if row == 1 else row)) for row in range(32)]
    assert train["image_bytes"] == sum(sizes) and train["image_bytes_least"] == min(sizes)
    assert train["tokens_quantiles"] == {"least": 3, "50 %": 5, "90 %": 8, "99 %": 8, "most": 8}
    assert train["tokens_mean"] == np.mean([3 + row % 6 for row in range(32)])
    assert train["truncated"] == sum(row % 6 == 5 for row in range(32)) and train["side_words"] == 9
    assert train["reports"]["repeating"] == 2 and train["reports"]["commonest"] == 2
    assert val["reports"]["repeating"] == 0
    assert train["tokens"]["repeating"] == 32 and train["tokens"]["commonest"] == 6
    assert train["duplicate_films"] == 2 and val["duplicate_films"] == 0
    assert stats["shared_films"] == {"train, val": 1}
    assert (train["groups"], train["films_per_group_mean"], train["ungrouped"]) == (16, 2.0, 0)
    assert train["labels"]["Cardiomegaly"] == {"1": 8, "0": 8, "-1": 8, "blank": 8, "other": 0}
    assert train["labels"]["Pleural Effusion"] == {"1": 4, "0": 0, "-1": 0, "blank": 28, "other": 0}
    assert "1 films are in train and in val, byte for byte" in done.stdout
    done = run_module("shards", "stats", small, "--shared", tmp_path / "keys.txt")
    (key,) = (tmp_path / "keys.txt").read_text().split()
    shared = {row["xxh3"]: row["key"] for row in table(small, "train")}
    assert [shared[row["xxh3"]] for row in table(small, "val") if row["xxh3"] in shared] == [key]
    assert f"{tmp_path / 'keys.txt'}: 1 keys" in done.stdout and len(read_keys(tmp_path / "keys.txt")) == 1
    assert_refused(run_module("shards", "stats", small, "--shared", small / "k"), "--shared", "lies in the data set")
    assert re.search(r"Cardiomegaly +8 +8 +8 +8 +2 +2 +2 +2\n", done.stdout)
    assert_refused(run_module("shards", "stats", small, "--json", tmp_path / "no" / "x.json"), "no folder")


def test_expected_repeats_are_exact() -> None:
    """Against all batches there are."""
    hashes = np.array([5, 5, 5, 9, 9, 2, 3], dtype=np.uint64)
    for batch in (2, 3, 5, 7):
        batches = [np.unique(hashes[list(c)], return_counts=True)[1] for c in combinations(range(7), batch)]
        pairs = np.mean([(counts * (counts - 1) // 2).sum() for counts in batches])
        twins = np.mean([counts[counts > 1].sum() for counts in batches])
        found = repeats(hashes, batch)
        assert found.pairs_in_batch == pytest.approx(pairs) and found.twins_in_batch == pytest.approx(twins)
        assert (found.repeating, found.commonest) == (5, 3)
    assert repeats(np.arange(1, dtype=np.uint64)).pairs_in_batch == 0


def test_stats_notice_damage(copy: Path) -> None:
    path = copy / "train-000001.parquet"
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)
    assert_refused(run_module("shards", "stats", copy), "train-000001")


# export

WHERE = "Cardiomegaly == 1 and not (`Pleural Effusion` == 1 and split == 'train')"
MEANT = {"train": [row for row in range(32) if row % 4 == 0 and row % 8], "val": [32, 36]}


def table(root: Path, split: str) -> list[dict]:
    manifest, rows = read_manifest(root), []
    for info in manifest.splits[split]:
        with ShardReader(root, manifest, info) as reader:
            for row in reader.read_table().to_pylist():
                rows.append(row | {"image": os.pread(reader.fd, row["size"], row["offset"])})
    return rows


def test_export_to_shards(small: Path, tmp_path: Path) -> None:
    (copy := tmp_path / "set").mkdir()
    for path in small.iterdir():
        shutil.copy(path, copy)
    (copy / "rejects.csv").write_text("source,row,reason\n0,44,report is empty\n")
    out = tmp_path / "subset"
    done = run_module("shards", "export", copy, "--where", WHERE, "--out", out, "--shard-mb", "0.009")
    assert done.returncode == 0 and "6 of 40 samples (train 4, val 2) as shards" in done.stdout, done.stderr
    assert problems(out, decode="all") == []
    manifest = read_manifest(out)
    assert len(manifest.splits["train"]) == 2 and manifest.block_rows == 16
    assert manifest.groups == {"train": (0, 16), "val": (16, 20)}
    assert manifest.sources[0].rows == 50 and manifest.sources[0].samples == 6
    for split, rows in MEANT.items():
        before = {row["row"]: row for row in table(copy, split)}
        after = table(out, split)
        assert [row["row"] for row in after] == rows
        for row in after:
            assert {**row, "offset": 0} == {**before[row["row"]], "offset": 0}
    lines = (out / "rejects.csv").read_text().splitlines()
    assert lines[1] == "0,44,report is empty" and len(lines) == 2 + 34
    assert {int(line.split(",")[1]) for line in lines[2:]} == set(range(40)) - {*MEANT["train"], *MEANT["val"]}


def test_export_of_everything_is_the_same_set(small: Path, tmp_path: Path) -> None:
    """Written anew in one shard a split, sample by sample the same."""
    done = run_module("shards", "export", small, "--where", "row >= 0", "--out", tmp_path / "all")
    assert done.returncode == 0, done.stderr
    before, after = (tmp_path / "b.json", tmp_path / "a.json")
    for root, path in ((small, before), (tmp_path / "all", after)):
        run_module("shards", "stats", root, "--json", path)
    numbers = [json.loads(path.read_text()) | {"digest": ""} for path in (before, after)]
    assert numbers[0] == numbers[1]


def test_export_to_files(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "files"
    out.mkdir()  # an empty folder will do
    done = run_module("shards", "export", small, "--where", WHERE, "--out", out, "--to", "files")
    assert done.returncode == 0, done.stderr
    found = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert found == sorted(
        f"{split}/00-{row:010d}.{suffix}" for split, rows in MEANT.items() for row in rows for suffix in FILES
    )
    stem = out / "train" / "00-0000000004"
    assert stem.with_suffix(".jpg").read_bytes() == film(4)
    assert stem.with_suffix(".txt").read_text() == "Report 4: größer, left effusion."
    assert json.loads(stem.with_suffix(".json").read_text()) == {
        "labels": {"Cardiomegaly": 1.0, "Pleural Effusion": None},
        "row": 4,
        "source": 0,
    }


FILES = ("jpg", "txt", "json")


def test_export_goes_where_a_link_leads(small: Path, tmp_path: Path) -> None:
    """It was found to be none of its folders once everything was written."""
    (tmp_path / "disk").mkdir()
    for name in ("disk", "disk/there"):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(tmp_path / name)
        export(ExportConfig(root=small, where="row < 9", out=tmp_path / "link"))
        assert problems(tmp_path / name) == []
        shutil.rmtree(tmp_path / name)
        (tmp_path / "disk").mkdir(exist_ok=True)


def test_mistaken_paths_are_named(small: Path, tmp_path: Path) -> None:
    assert_refused(run_module("shards", "inspect", small / "manifest.json"), "manifest.json is a file; name the folder")
    both = tmp_path / "a.txt"
    assert_refused(run_module("shards", "stats", small, "--json", both, "--shared", both), "a file of its own")


def test_a_set_that_may_not_be_read_is_not_called_absent(copy: Path) -> None:
    rights = "-dac_override,-dac_read_search"  # root has them, whatever the permissions say
    drop = [] if os.getuid() else ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}"]
    if drop and (shutil.which("setpriv") is None or subprocess.run([*drop, "true"], capture_output=True).returncode):
        pytest.skip("setpriv cannot drop rights here")
    (copy / "manifest.json").chmod(0)
    command = [*drop, sys.executable, "-m", "shards", "verify", str(copy)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert_refused(done, "manifest.json may not be read (Permission denied)")


def test_export_refuses_and_leaves_nothing(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(where: str, out: Path, *words: str) -> None:
        with pytest.raises(InputError) as caught:
            export(ExportConfig(root=copy, where=where, out=out))
        assert all(word in str(caught.value) for word in words), caught.value

    out = tmp_path / "out"
    refused("Cardiomegaly == 5", out, "no sample", "Cardiomegaly == 5")
    refused("Cardiomegaly", out, "no yes or no")
    refused("Edema == 1", out, "no column 'Edema'; columns are Cardiomegaly, Pleural Effusion, split")
    refused("row > 1", copy, "lies in")
    refused("row > 1", copy / "sub", "lies in")
    refused("row > 1", tmp_path, "there already")
    refused("row > 1", tmp_path / "gone" / "..", "there already")
    assert_refused(run_module("shards", "export", copy, "--where", "row = 1", "--out", out), "cannot be read")
    content = bytearray((copy / "train-000001.tar").read_bytes())
    content[600] ^= 1
    (copy / "train-000001.tar").write_bytes(content)
    refused("row > 1", out, "train-000001, sample 00-0000000020")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]
    # What a killed export left is no obstacle; what one at work has written so far is left to it.
    (tmp_path / ".tmp-out").mkdir()
    (tmp_path / ".tmp-out" / "train-000000.tar").write_bytes(b"")
    with exclusive(tmp_path / ".tmp-out.lock", "taken"):
        refused("row < 9", out, "another export is writing to", "process")
        assert (tmp_path / ".tmp-out" / "train-000000.tar").exists()
    assert run_module("shards", "export", copy, "--where", "row < 9", "--out", out).returncode == 0
    with monkeypatch.context() as patched:  # one that ends while another chooses, whose films would be for nothing
        kept = tmp_path / "kept"
        out.rename(kept)
        patched.setattr("shards.export.choose", lambda *given: kept.rename(out) and choose(*given))
        refused("row < 9", out, "there already")
    assert problems(out) == [] and sorted(path.name for path in tmp_path.iterdir()) == ["out", "set"]
