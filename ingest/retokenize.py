"""`python -m ingest.retokenize --tokenizer NAME DIR`: tokens of another tokenizer, in the Parquet files; tars stay.

New Parquet files and a new manifest are made in `DIR/.retokenize/new`, a note for each finished shard beside them, and
then swapped in as one (`ingest.swap`): at every moment the folder reads as the old set or as the new one. After a kill
the same command goes on where it stood; with another tokenizer it first finishes or undoes what it finds.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from tyro.conf import Positional
from xxhash import xxh3_128_hexdigest

from ingest.swap import Swap
from ingest.tokenizer import Tokenizer
from shards.atomic import write_atomic
from shards.cli import main_guard, parse, say
from shards.errors import InputError
from shards.manifest import read_manifest, write_manifest
from shards.progress import Advance, progress
from shards.reader import ShardReader, check_file
from shards.schema import FileInfo, Manifest, ShardInfo, TokenizerSpec, table_schema
from shards.verify import RETOKENIZE_NAME
from shards.writer import encode_table, footer_size

_PLAN = "plan.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class RetokenizeConfig:
    """Replace the tokens of a data set by those of another tokenizer; images, reports and labels stay."""

    root: Positional[Path]
    """Folder of shards."""
    tokenizer: str
    """Name of an open_clip model whose tokenizer to use, e.g. ViT-B-32-quickgelu."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NewShard:
    """One shard with its new Parquet file."""

    info: ShardInfo
    truncated: int
    """Reports with more tokens than the context holds."""


def retokenize(config: RetokenizeConfig) -> str:
    """Do it, or finish what an interrupted run began; returns what came of it in a line.

    InputError for an unknown tokenizer, a damaged set, a full disk.
    """
    read_manifest(config.root)  # before seconds go into importing open_clip
    tokenizer = Tokenizer(config.tokenizer)
    swap = Swap(config.root, RETOKENIZE_NAME)
    try:
        with _locked(config.root):
            _clean_up(swap, config.root, tokenizer.spec)
            manifest = read_manifest(config.root)
            if manifest.tokenizer == tokenizer.spec:
                return f"{config.root}: the tokens are those of {_named(tokenizer.spec)}"
            return _retokenize(config.root, manifest, tokenizer, swap)
    except OSError as error:
        raise InputError(f"cannot write to {config.root} ({error.strerror}); mend that, then run this again") from None


def _retokenize(root: Path, manifest: Manifest, tokenizer: Tokenizer, swap: Swap) -> str:
    swap.begin()
    write_atomic(swap.work / _PLAN, _plan(manifest, tokenizer.spec))
    splits: dict[str, tuple[ShardInfo, ...]] = {}
    samples, truncated = manifest.samples, 0
    with progress("retokenize", samples, "report") as advance:
        for split, infos in manifest.splits.items():
            shards = [_new_shard(root, manifest, info, tokenizer, swap, advance) for info in infos]
            splits[split] = tuple(shard.info for shard in shards)
            truncated += sum(shard.truncated for shard in shards)
    write_manifest(swap.new, replace(manifest, tokenizer=tokenizer.spec, splits=splits))
    swap.run()
    return (
        f"{root}: {samples:,} reports, tokens of {_named(tokenizer.spec)} in place of {_named(manifest.tokenizer)}; "
        f"{truncated:,} cut"
    )


def _new_shard(
    root: Path, manifest: Manifest, info: ShardInfo, tokenizer: Tokenizer, swap: Swap, advance: Advance
) -> NewShard:
    """Write a shard's new Parquet file and a note that it is finished; one that has both is kept."""
    note = swap.work / f"{info.name}.json"
    finished = _read_note(note, swap.new, info)
    if finished:
        advance(info.rows)
        return finished
    with ShardReader(root, manifest, info) as reader:
        table = reader.read_table()
    table, truncated = _with_tokens(table, manifest, tokenizer, advance)
    content = encode_table(table, manifest.block_rows)
    write_atomic(swap.new / f"{info.name}.parquet", content)
    footer = content[-footer_size(content) :]
    new = replace(
        info,
        parquet=FileInfo(bytes=len(content), xxh3=xxh3_128_hexdigest(content)),
        footer_bytes=len(footer),
        footer_xxh3=xxh3_128_hexdigest(footer),
    )
    write_atomic(note, json.dumps({"info": asdict(new), "truncated": truncated}).encode())
    return NewShard(info=new, truncated=truncated)


def _with_tokens(table: pa.Table, manifest: Manifest, tokenizer: Tokenizer, advance: Advance) -> tuple[pa.Table, int]:
    """A shard's table with other tokens, in the columns of the format; and how many reports were cut."""
    context = tokenizer.spec.context
    tokens = np.empty((table.num_rows, context), dtype=np.uint16)
    counts, truncated = np.empty(table.num_rows, dtype=np.uint16), np.empty(table.num_rows, dtype=bool)
    for row, text in enumerate(table["text"]):
        tokens[row], counts[row], truncated[row] = tokenizer(text.as_py())
        advance(1)
    columns = {
        "tokens": pa.FixedSizeListArray.from_arrays(pa.array(tokens.reshape(-1)), context),
        "token_count": pa.array(counts),
        "truncated": pa.array(truncated),
    }
    schema = table_schema(context, manifest.labels)
    # In one piece, as the writer has it: Parquet pages follow the pieces.
    arrays = [columns[name] if name in columns else table[name].combine_chunks() for name in schema.names]
    return pa.table(arrays, schema=schema), int(truncated.sum())


def _read_note(note: Path, folder: Path, info: ShardInfo) -> NewShard | None:
    try:
        fields = json.loads(note.read_bytes())
        new = fields["info"]
        parquet = FileInfo(**new["parquet"])
        check_file(folder / f"{info.name}.parquet", parquet)
        shard = replace(info, parquet=parquet, footer_bytes=new["footer_bytes"], footer_xxh3=new["footer_xxh3"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return NewShard(info=shard, truncated=fields["truncated"])


def _clean_up(swap: Swap, root: Path, wanted: TokenizerSpec) -> None:
    """Bring an interrupted run to where this one can begin or go on."""
    if not swap.work.exists():
        return
    if swap.committed:
        swap.finish()
        return
    try:
        plan = (swap.work / _PLAN).read_bytes()
    except OSError:
        plan = b""
    if plan != _plan(read_manifest(root), wanted):
        swap.undo()


def _plan(manifest: Manifest, wanted: TokenizerSpec) -> bytes:
    """What a run is about: another one may go on only if its plan is the same."""
    return json.dumps({"manifest": manifest.digest, "tokenizer": asdict(wanted)}).encode()


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """One retokenize a folder at a time, on this machine at least."""
    handle = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise InputError(f"another retokenize is at work in {root}; wait for it") from None
    finally:
        os.close(handle)


def _named(spec: TokenizerSpec) -> str:
    return f"{spec.name} ({spec.context} of {spec.vocab_size:,})"


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    with main_guard("retokenize"):
        config = parse(RetokenizeConfig, argv, prog="python -m ingest.retokenize")
        try:
            say(retokenize(config))
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the set is whole, and the same command goes on where it stood") from None


if __name__ == "__main__":
    main()
