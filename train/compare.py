"""`python -m train.compare RUN RUN ...`: runs side by side: what differs in their settings, and what came of it.

It reads what lies in the runs' folders, of other versions of this program too, and of runs that are still going on.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from xxhash import xxh3_64_hexdigest

from shards.atomic import write_atomic, write_json
from shards.cli import main_guard, parse, say
from shards.errors import InputError
from train.curves import draw_line, draw_loss, new_figure, to_png
from train.rows import Row, films_since, is_number, read_rows
from train.rundir import RunFolder, check_result

PROG = "train.compare"
_OWN = {"shards", "out", "h5", "dataset", "resume", "stop_at", "watch", "data.stage_dir"}
"""Settings that say where files lie and how a run was started: no difference between runs."""
_EVERY_RUN = ("kernel", "cpus")
_SHARDS = "version of shards"


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareConfig:
    """Lay runs side by side: settings and versions that differ, best validation loss, films/s, waiting, AUROC."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    png: Path | None = None
    """Where to draw the losses and films/s of all runs over each other."""
    json: Path | None = None
    """Where the comparison goes as JSON."""


def compare(runs: Sequence[Path]) -> dict[str, Any]:
    """What differs, and each run's figures. InputError for a folder that holds no run."""
    names = short_names(runs)
    named = dict(zip(names, runs, strict=True))
    settings = {name: read_settings(run) for name, run in named.items()}
    figures = {name: read_figures(run) for name, run in named.items()}
    rows = {name: read_rows(RunFolder(root=run).metrics) for name, run in named.items()}
    samples = same_samples(rows)
    if samples and len({found.get(_SHARDS) for found in settings.values()} - {None}) > 1:
        samples["same"] = False  # a digest is of places in shards, not of what is there
    return {"runs": names, "differences": differences(settings), "figures": figures, "samples": samples}


def short_names(runs: Sequence[Path]) -> list[str]:
    """What to call the runs: the shortest ends of their paths that tell them apart."""
    whole = [run.resolve().parts for run in runs]
    if len(set(whole)) < len(whole):
        raise InputError("the same run is named twice; name different folders")
    for length in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-length:]) for parts in whole]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("different paths have the same parts")


def read_settings(run: Path) -> dict[str, Any]:
    """A run's settings and versions, flat: `optim.lr` -> value."""
    folder = RunFolder(root=run)
    settings = flatten(_read_json(folder.config))
    settings = {name: value for name, value in settings.items() if _OWN.isdisjoint((name, name.partition(".")[0]))}
    versions = _read_json(run / "versions.json") if (run / "versions.json").exists() else {}
    return settings | {f"version of {name}": value for name, value in versions.items() if name not in _EVERY_RUN}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, names joined by dots."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def differences(settings: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Setting -> run -> value, where not all are alike; a run of another version may lack one (None)."""
    names = {name: None for found in settings.values() for name in found}
    told = {name: {run: found.get(name) for run, found in settings.items()} for name in names}
    return {name: values for name, values in told.items() if len({json.dumps(value) for value in values.values()}) > 1}


def read_figures(run: Path) -> dict[str, Any]:
    """What came of a run: steps done, best validation loss, last training loss, speed, AUROC of each evaluation. Losses
    and speed are of the films that it is trained on now, `films_since` this step."""
    folder = RunFolder(root=run)
    rows = read_rows(folder.metrics)
    if not rows:
        raise InputError(f"{folder.metrics} has no rows yet; give folders of runs (train.main --out)")
    figures: dict[str, Any] = {"step": rows[-1]["step"], "steps": _read_json(folder.config).get("steps")}
    since = films_since(rows)  # what the run said before is of other films
    rows = [row for row in rows if row["step"] > since] or rows
    figures |= {"films_since": since} if since else {}
    validated = [row for row in rows if is_number(row.get("val_loss"))]
    if validated:
        best = min(validated, key=lambda row: row["val_loss"])
        figures |= {"best_val_loss": best["val_loss"], "best_step": best["step"]}
    figures |= {"loss": _median(rows[-10:], "loss"), **speed(rows)}
    return figures | {"auroc": read_auroc(run)}


def speed(rows: list[Row]) -> dict[str, float | None]:
    """Median films/s, and the share of all time that waited for the loader; the first row, which warms up, left out."""
    steady = rows[1:] or rows
    timed = [row for row in steady if is_number(row.get("step_ms")) and is_number(row.get("loader_wait_ms"))]
    total = sum(row["step_ms"] for row in timed)
    wait = sum(row["loader_wait_ms"] for row in timed)
    return {"images_per_s": _median(steady, "images_per_s"), "wait_share": wait / total if total else None}


def read_auroc(run: Path) -> dict[str, float]:
    """What was asked -> mean AUROC, of the evaluations that lie in the run's folder."""
    records = [_read_json(path) for path in sorted(run.glob("evaluation-*.json"))]
    return {asked(record): float(record["mean_auroc"]) for record in records if is_number(record.get("mean_auroc"))}


def asked(record: dict[str, Any]) -> str:
    """Split, films and prompts of an evaluation: where these words are the same, so is what was asked of the models."""
    checkpoints = record.get("checkpoints")
    several = f" of {len(checkpoints)}" if isinstance(checkpoints, list) and len(checkpoints) > 1 else ""
    parts = [f"shards {str(record.get('shards', '?'))[:8]}"]
    parts += [f"{name} {record[name]}" for name in ("where", "uncertain") if record.get(name) not in (None, "ignore")]
    parts += [f"without {str(record['excluded'])[:8]}"] if record.get("excluded") else []
    prompts = xxh3_64_hexdigest(json.dumps(record.get("prompts"), sort_keys=True).encode())
    return f"{record.get('split', '?')}{several} ({', '.join(parts)}, prompts {prompts[:4]})"


def same_samples(rows: dict[str, list[Row]]) -> dict[str, Any] | None:
    """Whether the runs had trained on the same samples at the last step that all have logged; None where none is."""
    digests = [
        {row["step"]: row["order_digest"] for row in found if isinstance(row.get("order_digest"), str)}
        for found in rows.values()
    ]
    common = set(digests[0]).intersection(*digests[1:])
    if not common:
        return None
    return {"step": max(common), "same": len({digest[max(common)] for digest in digests}) == 1}


def table(record: dict[str, Any]) -> list[str]:
    """The comparison for people, a column a run."""
    rows = [(name, [_text(values[run]) for run in record["runs"]]) for name, values in record["differences"].items()]
    rows.append(("", [""] * len(record["runs"])))
    splits = {split: None for found in record["figures"].values() for split in found["auroc"]}
    for title, show in (*_SHOWN, *((f"AUROC {split}", _auroc(split)) for split in splits)):
        rows.append((title, [show(record["figures"][run]) for run in record["runs"]]))
    wide = max(len(name) for name, _ in rows)
    widths = [max(len(run), *(len(texts[at]) for _, texts in rows)) for at, run in enumerate(record["runs"])]
    lines = [
        f"{name:<{wide}}  " + "  ".join(f"{text:>{width}}" for text, width in zip(texts, widths, strict=True))
        for name, texts in [("", record["runs"]), *rows]
    ]
    samples = record["samples"]
    if samples:
        lines.append(
            f"{'the same' if samples['same'] else 'other'} samples up to step {samples['step']} (order digest)"
        )
    return [line.rstrip() for line in lines]


def draw(runs: Sequence[Path], out: Path) -> None:
    """Losses and films/s of all runs over each other."""
    figure = new_figure(11, 4)
    loss, speeds = figure.subplots(1, 2, width_ratios=(3, 2))
    for number, (name, run) in enumerate(zip(short_names(runs), runs, strict=True)):
        rows, color = read_rows(RunFolder(root=run).metrics), f"C{number % 10}"
        draw_loss(loss, rows, name, color)
        draw_line(speeds, rows, "images_per_s", name, color=color)
    loss.set(xlabel="step")
    speeds.set(title="films/s", xlabel="step", ylim=(0, None))
    speeds.legend(fontsize=8, loc="lower right")
    write_atomic(out, to_png(figure))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}); give folders of runs (train.main --out)") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path} is not JSON; give folders of runs (train.main --out)") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} does not hold an object; give folders of runs (train.main --out)")
    return found


def _median(rows: list[Row], name: str) -> float | None:
    values = [row[name] for row in rows if is_number(row.get(name))]
    return statistics.median(values) if values else None


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "-" if value is None else json.dumps(value) if isinstance(value, list) else str(value)


def _figure(name: str, form: str) -> Any:
    return lambda found: "-" if found.get(name) is None else format(found[name], form)


def _auroc(split: str) -> Any:
    return lambda found: f"{found['auroc'][split]:.3f}" if split in found["auroc"] else "-"


def _on_other_films(found: dict[str, Any]) -> str:
    return f", the first {found['films_since']:,} on other films" if "films_since" in found else ""


_SHOWN = (
    ("steps done", lambda found: f"{found['step']:,} of {_text(found['steps'])}{_on_other_films(found)}"),
    ("best validation loss", _figure("best_val_loss", ".4f")),
    ("at step", _figure("best_step", ",")),
    ("last training loss", _figure("loss", ".4f")),
    ("films/s", _figure("images_per_s", ",.0f")),
    ("waiting for the loader", _figure("wait_share", ".1%")),
)
"""Title and text of each figure."""


def main(argv: Sequence[str] | None = None) -> None:
    """Compare runs as the command line says. Exit code 2 for a user's mistake."""
    with main_guard(PROG):
        config = parse(CompareConfig, argv, prog=PROG)
        if not config.runs:
            raise InputError("no run is named; give folders of runs (train.main --out)")
        for path, flag, keys in ((config.png, "--png", None), (config.json, "--json", {"runs", "figures"})):
            if path:
                check_result(path, f".{flag[2:]}", flag, keys)
        record = compare(config.runs)
        say("\n".join(table(record)))
        if config.json:
            write_json(config.json, record)
        if config.png:
            draw(config.runs, config.png)
            say(f"{config.png}")


if __name__ == "__main__":
    main()
