"""`python -m ingest --to-shards OUT --h5 cxr.h5 --csv reports.csv ...`: parse, ingest, say what came of it."""

import signal
import time
from typing import TYPE_CHECKING

from ingest.config import IngestConfig
from shards.cli import main_guard, parse, say

if TYPE_CHECKING:
    from ingest.report import Report
    from shards.schema import Manifest


def main(argv: list[str] | None = None) -> None:
    """Run an ingest from the command line."""
    with main_guard("ingest"):
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's way to say Ctrl-C
        config = parse(IngestConfig, argv, prog="python -m ingest")
        from ingest.workdir import check_place, finished_set

        manifest = finished_set(config)
        if manifest is not None:
            _say_finished(config, manifest)
            return
        if config.dry_run:
            from ingest.trial import dry_run

            check_place(config.to_shards)
            for line in dry_run(config):
                say(line)
            return
        from ingest.run import ingest  # heavy: pyarrow, h5py

        started = time.monotonic()
        try:
            report = ingest(config)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the same command goes on where it stood") from None
        _say(config, report, time.monotonic() - started)


def _say_finished(config: IngestConfig, manifest: "Manifest") -> None:
    from ingest.tokenizer import CLIP_NAME, CONTEXT

    found = (manifest.tokenizer.name, manifest.tokenizer.context)
    named = "{}, {} a report".format(*found)
    since = "" if found == (CLIP_NAME, CONTEXT) else f" (its tokens are since those of {named}, by ingest.retokenize)"
    say(f"{config.to_shards}: {manifest.samples:,} samples, finished before by this same ingest{since}; nothing to do")


def _say(config: IngestConfig, report: "Report", seconds: float) -> None:
    from ingest.report import encoding_lines, warnings
    from shards.stats import leak_lines

    sizes = ", ".join(f"{split} {stats.samples:,}" for split, stats in report.stats.splits.items())
    say(f"{config.to_shards}: {report.samples:,} samples ({sizes}); more in report.txt there")
    say(f"took {seconds:.1f} s, {report.samples / seconds:,.0f} films/s")
    rejected = "".join(f"; {why}: {count:,}" for why, count in report.rejected.items())
    rows = report.rows - report.samples
    several = " (some have several reasons)" if report.rejected.total() > rows else ""
    say(f"rejected {rows:,} rows{several}{rejected}")
    known = warnings(report.namesakes, report.unnamed, report.graded)
    for line in (*encoding_lines(report.encoded), *known, *leak_lines(report.stats)):
        say(line)


if __name__ == "__main__":
    main()
