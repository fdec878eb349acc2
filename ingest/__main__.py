"""`python -m ingest --to-shards OUT --h5 cxr.h5 --csv reports.csv ...`: parse, ingest, say what came of it."""

import time
from collections import Counter

from ingest.config import IngestConfig
from shards.cli import main_guard, parse, say


def main(argv: list[str] | None = None) -> None:
    """Run an ingest from the command line."""
    with main_guard("ingest"):
        config = parse(IngestConfig, argv, prog="python -m ingest")
        if config.dry_run:
            from ingest.dry_run import dry_run

            for line in dry_run(config):
                say(line)
            return
        from ingest.run import ingest  # heavy: pyarrow, h5py

        started = time.monotonic()
        outcome = ingest(config)
        manifest, seconds = outcome.manifest, time.monotonic() - started
        samples = sum(map(manifest.rows, manifest.splits))
        sizes = ", ".join(
            f"{split} {manifest.rows(split):,} in {len(manifest.splits[split])}" for split in manifest.splits
        )
        say(f"{config.to_shards}: {samples:,} samples ({sizes} shards)")
        say(f"took {seconds:.1f} s, {samples / seconds:,.0f} films/s")
        reasons = Counter(reason for found in outcome.rejects.values() for reason in found.split("; "))
        say(
            f"rejected {len(outcome.rejects):,} rows" + "".join(f"; {why}: {count:,}" for why, count in reasons.items())
        )
        say(
            f"JPEG quality {manifest.image.quality}: PSNR {outcome.psnr:.1f} dB; after the resize to 224 x 224 "
            f"{outcome.resized_psnr:.1f} dB, {outcome.resized_difference:.2f} grey levels on average"
        )


if __name__ == "__main__":
    main()
