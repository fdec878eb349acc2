"""The bench's report: all files of ours are read, figures are theirs, regressions are found, text stays text."""

import base64
import copy
import html
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from statistics import median
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import REPOSITORY

from bench.compare import BETTER, FEW, MACHINE, SAME, WORSE, compare, compare_all, judge
from bench.kinds import METRICS, Case, Result
from bench.page import to_html, to_markdown
from bench.report import ReportConfig, main, make_report, sections
from bench.shapes import UnreadableError, bundle, distinct, read_results
from bench.standards import judged
from shards.errors import InputError

RESULTS = sorted((REPOSITORY / "bench" / "results").glob("*.json"))
BUNDLE = REPOSITORY / "bench" / "results" / "cpu-2core.json"
MACHINES = {"cpu": "EPYC", "cpus": 2, "memory_gib": 23.5, "gpu": None}
NASTY = (
    '</td><script>alert(1)</script><img src="http://example.org/x" onerror=a> $x^2$ | `b` [c](http://d) \x00\u202e\n# e'
)


def loader_json(rates: dict[str, list[float]], day: int = 1, **settings: object) -> dict[str, Any]:
    """A loader bench's JSON."""
    cases = [
        {"name": name, "images_per_s": median(each), "rounds": [{"images_per_s": rate, "images": 9} for rate in each]}
        for name, each in rates.items()
    ]
    environment = {**MACHINES, "time": f"2026-01-{day:02d}T00:00:00+00:00"}
    return {"bench": "loader", "environment": environment, "settings": {"threads": 2, **settings}, "cases": cases}


def save(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def results_of(folder: Path, *contents: Any) -> list[Result]:
    paths = [save(folder / f"{number}.json", content) for number, content in enumerate(contents)]
    return distinct(result for path in paths for result in read_results(path))


@pytest.mark.parametrize("path", [path for path in RESULTS if path != BUNDLE], ids=lambda path: path.stem)
def test_every_committed_result_is_read_and_shown(path: Path) -> None:
    assert json.loads(BUNDLE.read_bytes())["results"][path.name] == json.loads(path.read_bytes())
    (*results,) = read_results(path)
    page = to_html("x", list(sections(make_report([path]))))
    for result in results:
        assert result.machine and result.time and (result.cases or result.tables)
        shown = [case.label for case in result.cases] + [cell for table in result.tables for cell in table.rows[0]]
        assert shown and all(html.escape(each) in page for each in shown)


def leaves(value: Any) -> Iterator[float]:
    """All numbers of a JSON."""
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from leaves(each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


FIGURE = re.compile(r"(?<![\w.])\d[\d,]*\d(?:\.\d+)?|(?<![\w.])\d\.\d+")
SCALES = (1, 100, -100, 1e3, 1 / 60, 2**-20)
"""As it is, per cent, milliseconds, minutes, MiB."""


def test_figures_of_the_readme_are_in_the_files_that_it_names() -> None:
    """Row by row, paragraph by paragraph: decimals, and numbers of three digits or more that say something."""
    checked = 0
    for part in re.split(r"\n\n|\n(?=\|)", (REPOSITORY / "README.md").read_text(encoding="utf-8")):
        named = re.findall(r"`(cpu-2core[\w-]*\.json)`", part)
        numbers = [each for name in named for each in leaves(json.loads((RESULTS[0].parent / name).read_bytes()))]
        for figure in FIGURE.findall(re.sub(r"`[^`]*`", "", part)) if named else ():
            plain, _, decimals = figure.replace(",", "").partition(".")
            if decimals or len(plain.rstrip("0")) >= 3:
                found = {round(number * scale, len(decimals)) for number in numbers for scale in SCALES}
                assert float(figure.replace(",", "")) in found, f"{figure} is not in {named}"
                checked += 1
    assert checked > 50


def test_figures_are_those_of_the_file(tmp_path: Path) -> None:
    """Ratios within rounds, worked out here by hand: not the ratio of the medians, which would be 3."""
    rates = {"hdf5": [100.0, 200.0, 300.0], "cpu": [600.0, 600.0, 600.0], "cpu floor": [800.0, 700.0, 750.0]}
    found = {
        standard.what: (figure, reached)
        for standard, figure, reached in judged(results_of(tmp_path, loader_json(rates)))
    }
    figure, reached = found["loader on 2 cores to hdf5"]
    assert figure is not None and figure.value == 3.0 and figure.shown == "3.00x (2.00x to 6.00x)" and reached is False
    figure, reached = found["loader on 2 cores to its kernels alone"]
    assert figure is not None and figure.value == pytest.approx(0.8) and reached
    assert found["loader on 2 cores from raw shards to hdf5"] == (None, None)


@pytest.mark.parametrize("change", [{"threads": 4}, {"latency_ms": [0, 5]}, {"cold": True}])
def test_a_standard_is_not_read_from_another_case(change: dict[str, object], tmp_path: Path) -> None:
    content = loader_json({"hdf5": [100.0] * 3, "cpu": [700.0] * 3})
    content["settings"] |= change
    assert all(figure is None for _, figure, _ in judged(results_of(tmp_path, content)))
    elsewhere = loader_json({"hdf5": [100.0] * 3, "cpu": [700.0] * 3})
    elsewhere["environment"]["cpus"] = 16
    assert all(figure is None for _, figure, _ in judged(results_of(tmp_path, elsewhere)))


def test_standards_of_a_gpu(tmp_path: Path) -> None:
    """From what `make gpu` writes: the fastest of ours to the fastest of theirs, the recipe's own batch alone."""

    def case(name: str, size: int, *rates: float, **more: float) -> dict[str, Any]:
        return {"name": name, "batch_size": size, "rounds": [{"images_per_s": rate, **more} for rate in rates]}

    settings = {"preset": "cxr-dinov3-clip", "batch_size": 64}
    steps = [case("step", 64, 100, 110), case("step compiled", 64, 180, 220), case("open_clip", 64, 90, 100)]
    steps += [case("open_clip compiled", 64, 120, 110), case("step", 256, 999), case("open_clip", 256, 1)]
    loop = [case("live", 64, 175, wait_share=0.004), case("resident", 64, 180), case("loader alone", 64, 1080)]
    recipe = {"preset": "cxr-dinov3-clip", "whole": False, "steps": 500, "wall_s": 20, "seconds_25000": 840}
    machine = {"gpu": "NVIDIA H200", "cpus": 16, "cpu": "x"}
    parts = {"step": {"bench": "step", "settings": settings, "cases": steps}, "recipe": recipe}
    parts |= {"together": {"bench": "together", "settings": settings, "cases": loop}}
    content = {"bench": "gpu", "environment": machine, **parts}
    found = {standard.wanted: figure.value for standard, figure, _ in judged(results_of(tmp_path, content)) if figure}
    assert found == pytest.approx({5: 6.0, 0.01: 0.004, 15: 14.0, 1.3: 1.75})
    content["environment"] |= {"gpu": "NVIDIA T4"}
    assert not any(figure for _, figure, _ in judged(results_of(tmp_path, content)))


OLD = {"hdf5": [100.0, 103.0, 98.0, 101.0, 102.0], "cpu": [700.0, 690.0, 705.0, 695.0, 702.0]}


def verdict(folder: Path, newer: dict[str, list[float]], case: str = "cpu") -> str:
    """Of films/s of a case, after OLD."""
    (pair,), _ = compare_all(results_of(folder, loader_json(OLD), loader_json(newer, day=2)), 0.05)
    (change,) = [change for change in pair.changes if change.case == case and change.metric == "images_per_s"]
    return change.verdict


def scaled(by: float, rates: list[float]) -> list[float]:
    return [rate * by for rate in rates]


def test_what_is_worse_beyond_the_noise(tmp_path: Path) -> None:
    hdf5, cpu = OLD["hdf5"], OLD["cpu"]
    assert verdict(tmp_path, {"hdf5": hdf5, "cpu": scaled(0.9, cpu)}) == WORSE
    assert verdict(tmp_path, {"hdf5": hdf5, "cpu": scaled(1.2, cpu)}) == BETTER
    assert verdict(tmp_path, {"hdf5": hdf5, "cpu": scaled(0.97, cpu)}) == SAME  # sure, but too little to matter
    assert verdict(tmp_path, {"hdf5": hdf5, "cpu": [700.0, 400.0, 702.0, 300.0, 704.0]}) == SAME  # much, but noise
    assert verdict(tmp_path, {"hdf5": hdf5, "cpu": scaled(0.8, cpu)[:3]}) == FEW


def test_what_slows_the_reference_as_well_is_the_machine(tmp_path: Path) -> None:
    slower = {name: scaled(0.7, rates) for name, rates in OLD.items()}
    assert verdict(tmp_path, slower) == MACHINE
    assert verdict(tmp_path, slower, "hdf5") == MACHINE
    assert (
        verdict(tmp_path, {**OLD, "hdf5": scaled(1.5, OLD["hdf5"])}) == SAME
    )  # a baseline got better, ours is as it was


def test_a_noisy_reference_hides_no_loss(tmp_path: Path) -> None:
    """Rounds of a real run (cpu-2core-loader.json): the ratios lie from 4.9 to 7.4, and ours lost 30 %."""
    hdf5, cpu = [1392.0, 1264.0, 1797.0, 1838.0, 1627.0], [9459.0, 9389.0, 8886.0, 9755.0, 8171.0]
    older = loader_json({"hdf5": hdf5, "cpu": cpu})
    for by, beside, expected in ((0.7, 1.0, WORSE), (0.7, 0.95, WORSE), (0.7, 0.8, MACHINE), (0.7, 0.7, MACHINE)):
        newer = loader_json({"hdf5": scaled(beside, hdf5), "cpu": scaled(by, cpu)}, day=2)
        (pair,), _ = compare_all(results_of(tmp_path, older, newer), 0.05)
        found = [each.verdict for each in pair.changes if (each.case, each.metric) == ("cpu", "images_per_s")]
        assert found == [expected], (by, beside)


RECORDED = [
    {
        **{"hdf5": [1187, 876, 1178, 1179, 1156], "hdf5-tuned": [1820, 1740, 1806, 1820, 1919]},
        **{"webdataset": [1428, 1397, 1401, 1239, 1412], "dali reader": [1675, 1558, 1621, 1670, 1665]},
        "cpu": [7469, 6503, 7734, 6737, 7594],
    },
    {
        **{"hdf5": [1270, 909, 1134, 1060, 1166], "hdf5-tuned": [1910, 1590, 1387, 1344, 1809]},
        **{"webdataset": [1340, 1345, 692, 1169, 1372], "dali reader": [1570, 1675, 1716, 1612, 1619]},
        "cpu": [10439, 9933, 9745, 9690, 10732],
    },
    {
        **{"hdf5": [938, 794, 886, 861, 925], "hdf5-tuned": [1392, 1264, 1797, 1838, 1627]},
        **{"webdataset": [945, 1128, 1266, 990, 1036], "dali reader": [1572, 1439, 1426, 1605, 1497]},
        "cpu": [9459, 9389, 8886, 9755, 8171],
    },
    {
        **{"hdf5": [883, 778, 807, 831, 741], "hdf5-tuned": [1550, 1293, 1495, 1301, 1215]},
        **{"webdataset": [1051, 1059, 1011, 1372, 896], "dali reader": [1306, 1106, 1194, 1331, 1537]},
        "cpu": [7862, 9242, 7640, 9261, 8727],
    },
]
"""films/s in each round of four runs on 2026-11-21 and 22: `git log -p bench/results/cpu-2core-loader.json`."""


def drawn(rng: np.random.Generator, machine: float, ours: float) -> Result:
    """A run of five rounds drawn from a recorded one, each case about 1: on a machine, or of a loader, so fast."""
    recorded = RECORDED[rng.integers(len(RECORDED))]
    rounds, cases = rng.integers(0, 5, 5), []
    for name, rates in recorded.items():
        pace = machine * (ours if name == "cpu" else 1.0) / median(rates)
        taken = tuple(rates[number] * pace * rng.lognormal(0, 0.01) for number in rounds)
        cases.append(Case(name=name, rounds={"images_per_s": taken}, peer=name in ("webdataset", "dali reader")))
    return Result(file="x", kind="loader", raw={}, cases=tuple(cases))


@pytest.mark.parametrize(
    ("machine", "ours", "least", "most"),
    [(0.85, 1.0, 0, 0.07), (0.7, 1.0, 0, 0.03), (1.0, 0.7, 0.95, 1), (0.85, 0.7, 0.9, 1)],
)
def test_a_machine_that_slows_is_seldom_called_a_loss_of_ours(
    machine: float, ours: float, least: float, most: float
) -> None:
    """And a loss of ours seldom the machine's: with the noise of rounds as it was recorded."""
    rng, draws = np.random.default_rng(0), 300
    pairs = [compare(drawn(rng, 1.0, 1.0), drawn(rng, machine, ours), 0.05) for _ in range(draws)]
    assert least <= sum(bool(pair.regressions) for pair in pairs) / draws <= most


def test_loaders_of_others_are_no_regression_of_ours(tmp_path: Path) -> None:
    older, newer = (loader_json({**OLD, "ffcv": scaled(by, OLD["cpu"])}, day=day) for day, by in ((1, 1.0), (2, 0.5)))
    for content in (older, newer):
        content["cases"][-1]["peer"] = True
    (pair,), _ = compare_all(results_of(tmp_path, older, newer), 0.05)
    assert not pair.regressions and MACHINE in {change.verdict for change in pair.changes if change.case == "ffcv"}


def test_the_rule_seldom_cries_wolf() -> None:
    """5 rounds of one distribution against 5 of the same: at most as often as the level says, on either side."""
    rng = np.random.default_rng(0)
    found = [judge(*rng.lognormal(7, 0.1, (2, 5)), METRICS["images_per_s"], 0.05)[0] for _ in range(2000)]
    assert found.count(WORSE) < 0.013 * len(found)
    assert {judge([5.0] * 5, [5.0] * 5, METRICS["images_per_s"], 0.0)[0]} == {SAME}


def test_more_is_worse_where_less_is_better(tmp_path: Path) -> None:
    older = loader_json({"cpu": [700.0] * 5})
    for number, row in enumerate(older["cases"][0]["rounds"]):
        row |= {"cpu_s_per_1000": 0.30 + number / 1000, "pss_bytes": 100 << 20}
    newer = copy.deepcopy(older)
    newer["environment"]["time"] = "2026-02-01T00:00:00+00:00"
    for row in newer["cases"][0]["rounds"]:
        row["cpu_s_per_1000"] *= 1.5
        row["pss_bytes"] += 6 << 20  # six percent, and nothing to speak of
    (pair,), _ = compare_all(results_of(tmp_path, older, newer), 0.05)
    assert {change.metric for change in pair.regressions} == {"cpu_s_per_1000"}


@pytest.mark.parametrize("change", [{"cpus": 4}, {"gpu": "H200"}, {"cpu": "Xeon"}])
def test_other_machines_are_shown_but_not_compared(change: dict[str, object], tmp_path: Path) -> None:
    newer = loader_json({name: scaled(0.1, rates) for name, rates in OLD.items()}, day=2)
    newer["environment"] |= change
    pairs, left = compare_all(results_of(tmp_path, loader_json(OLD), newer), 0.05)
    assert not pairs and "not compared across machines: 0.json | 1.json" in left[0]
    slower = loader_json({name: scaled(0.1, rates) for name, rates in OLD.items()}, day=2, batch_size=7)
    pairs, left = compare_all(results_of(tmp_path, loader_json(OLD, batch_size=8), slower), 0.05)
    assert not pairs and "across settings" in left[0]


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = str(save(tmp_path / "old.json", loader_json(OLD)))
    new = str(save(tmp_path / "new.json", loader_json({**OLD, "cpu": scaled(0.5, OLD["cpu"])}, day=2)))
    page = tmp_path / "page.html"
    with pytest.raises(SystemExit) as stop:
        main([old, new, "--html", str(page)])
    said = capsys.readouterr()
    assert stop.value.code == 1 and "worse: loader cpu: films/s 700 to 350 (0.50x)" in said.err
    assert "Worse than before: loader cpu" in page.read_text()
    tuned = save(tmp_path / "tune.json", {**loader_json(OLD), "bench": "tune", "choices": [], "verdict": "3x as fast."})
    main([old, str(tuned)])
    assert "tune.json: 3x as fast." in capsys.readouterr().out  # whose sentence it is
    main([old])
    assert "| cpu | 700 | 690 to 705 |" in capsys.readouterr().out


def test_a_reader_that_has_gone_is_no_error_of_ours(tmp_path: Path) -> None:
    """`bench.report F | head -1`: silence, and exit code 1 as everywhere."""
    command = [sys.executable, "-m", "bench.report", str(save(tmp_path / "a.json", loader_json(OLD)))]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, cwd=REPOSITORY, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_mistakes(tmp_path: Path) -> None:
    foreign = save(tmp_path / "foreign.json", {"a": 1})
    with pytest.raises(InputError, match=r"none of the files .*foreign\.json: .* of no kind"):
        make_report([foreign])
    with pytest.raises(InputError, match="name one JSON"):
        ReportConfig(files=())
    with pytest.raises(InputError, match=r"nosuch\.json .*No such file"):
        make_report([tmp_path / "nosuch.json"])


def test_what_is_not_read_is_named_and_the_rest_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = save(tmp_path / "good.json", loader_json(OLD))
    (tmp_path / "torn.json").write_bytes(b'{"cases": [')
    report = make_report([good, tmp_path / "torn.json", save(tmp_path / "foreign.json", [])])
    assert [why.split(":")[0] for why in report.unreadable] == ["torn.json", "foreign.json"]
    main([str(good), str(tmp_path / "torn.json")])
    assert "not read: torn.json: it is not JSON" in capsys.readouterr().err


def test_a_bundle_holds_all_and_counts_nothing_twice(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{day}.json", loader_json(OLD, day=day)) for day in (1, 2)]
    (tmp_path / "all.json").write_bytes(bundle(paths))
    (tmp_path / "again.json").write_bytes(bundle([tmp_path / "all.json"]))
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "all.json").read_bytes()
    results = make_report([tmp_path / "all.json", *paths]).results
    assert [result.file for result in results] == ["1.json", "2.json"]
    gpu = save(tmp_path / "gpu.json", {"bench": "gpu", "environment": MACHINES, "loader": loader_json(OLD)})
    assert [result.file for result in read_results(gpu)] == ["gpu.json: loader"]


SVG_TAGS = {"svg", "metadata", "defs", "style", "g", "path", "use", "clipPath", "rect"}


class Tags(HTMLParser):
    """What a page is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: dict[str, set[str]] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, set()).add(value or "")


def poisoned() -> dict[str, Any]:
    """A loader's JSON with hostile text wherever text is shown."""
    content = loader_json({NASTY: [1.0, 2.0], "cpu": [3.0, 4.0]})
    content["environment"] |= {"cpu": NASTY, "time": NASTY}
    content["settings"] |= {NASTY: NASTY}
    content["cases"][0]["note"] = NASTY
    content["verdict"] = NASTY
    content["profile"] = {NASTY: {NASTY: 1.0}}
    return content


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    parts = list(sections(make_report([save(tmp_path / "x.json", poisoned())])))
    page = to_html("x", parts)
    tags = Tags()
    tags.feed(page)
    assert tags.names <= set(
        "html head meta title style body section h1 h2 h3 p div table thead tbody tr th td img".split()
    )
    assert set(tags.attributes) <= set(
        "lang charset name content http-equiv class tabindex role aria-label alt src scope".split()
    )
    assert tags.attributes["src"] and all(
        each.startswith("data:image/svg+xml;base64,") for each in tags.attributes["src"]
    )
    assert "alert(1)" in page and "\x00" not in page and "\u202e" not in page
    for source in tags.attributes["src"]:
        elements = list(ElementTree.fromstring(base64.b64decode(source.partition(",")[2])).iter())
        links = [value for each in elements for name, value in each.attrib.items() if name.endswith("href")]
        assert all(link.startswith("#") for link in links)
        assert {str(each.tag).rpartition("}")[2] for each in elements} <= SVG_TAGS
    told = to_markdown("x", parts)
    assert not re.search(r"(?<!\\)<(script|img)|(?<!\\)\[c|[^\\]://", told)
    rows = [line for line in told.splitlines() if line.startswith("|")]
    assert rows and not [line for line in told.splitlines() if line.startswith("# e")]


@pytest.mark.parametrize(
    "content",
    [
        {"cases": 3, "bench": "loader"},
        {"bench": ["loader"], "cases": []},
        {"bench": "loader", "cases": [3, None, {"name": {}, "rounds": [{"images_per_s": "9"}, 3]}]},
        {"bench": "loader", "cases": [{"rounds": [{"images_per_s": 1e999}, {"images_per_s": True}]}], "settings": []},
        {"bench": "step", "cases": [{"batch_size": "x", "rounds": {}}, {"batch_size": 1e300, "rounds": None}]},
        {"bench": "scale", "samples": [{"samples": 0, "first_batch_s": -1}, 4], "ranks": {"a": 1}},
        {
            "bench": "ingest",
            "cases": [{"films": 0, "rounds": [{"ingest": 3}]}],
            "memory": {"runs": [[], {"peak": "x"}]},
        },
        {"bench": "bundle", "results": [1]},
        {"inputs": {"a": 1}},
        {"bench": "scale", "shuffle": None, "start": [{}]},
        {"environment": {"file_system": 3, "memory_gib": 10**400}, "bench": "loader", "cases": [{"name": "a"}]},
    ],
)
def test_malformed_files_are_refused_or_shown_but_never_crash(content: Any, tmp_path: Path) -> None:
    good = save(tmp_path / "good.json", loader_json(OLD))
    report = make_report([good, save(tmp_path / "x.json", content)])
    assert "good.json" in to_html("x", list(sections(report)))
    assert to_markdown("x", list(sections(report)))


def test_deep_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(UnreadableError):
        read_results(tmp_path / "deep.json")


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; apt-get install chromium")


def chromium(*arguments: str, timeout: float = 60) -> str:
    """Run the browser without a network or a screen; its output."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=timeout, check=True).stdout


MEASURE = """<!DOCTYPE html><iframe src="page.html" style="width:{width}px;height:800px;border:0"></iframe><script>
const frame = document.querySelector('iframe');
frame.onload = () => {{
  const page = frame.contentDocument, images = [...page.images], tables = [...page.querySelectorAll('table')];
  const boxes = tables.map(e => e.parentElement).filter(e => getComputedStyle(e).overflowX == 'auto');
  const fetched = frame.contentWindow.performance.getEntriesByType('resource');
  document.title = JSON.stringify({{
    width: page.documentElement.scrollWidth,
    letters: Math.min(...[...page.querySelectorAll('p, td, th')].map(e => parseFloat(getComputedStyle(e).fontSize))),
    drawn: images.filter(e => e.naturalWidth > 0 && e.clientWidth <= {width}).length,
    images: images.length,
    fit: boxes.filter(e => e.clientWidth <= {width}).length,
    tables: tables.length,
    loaded: fetched.filter(e => !e.name.startsWith('data:')).length,
    scripts: page.scripts.length,
  }});
}};
</script>"""


@browser
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_the_page_on_a_phone_and_on_a_desk(width: int, tmp_path: Path) -> None:
    """The page is as wide as the window, wide tables scroll in their boxes, plots are drawn, nothing is fetched."""
    report = make_report([*RESULTS, save(tmp_path / "nasty.json", poisoned())])
    (tmp_path / "page.html").write_text(to_html("x", list(sections(report))))
    (tmp_path / "measure.html").write_text(MEASURE.format(width=width))
    dom = chromium(
        "--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom", f"file://{tmp_path}/measure.html"
    )
    title = re.search(r"<title>(.*?)</title>", dom)
    assert title, dom[:500]
    found = json.loads(title[1])
    assert found["width"] <= width
    assert found["letters"] >= 14
    assert found["images"] == found["drawn"] >= 3
    assert found["tables"] == found["fit"] >= 10
    assert found["loaded"] == found["scripts"] == 0


@browser
def test_a_screenshot_is_not_blank(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "page.html").write_text(to_html("x", list(sections(make_report(RESULTS)))))
    chromium("--window-size=500,900", f"--screenshot={tmp_path}/shot.png", f"file://{tmp_path}/page.html")
    shot = np.asarray(Image.open(tmp_path / "shot.png").convert("L"))
    assert shot.shape[1] == 500 and 0.01 < (shot < 128).mean() < 0.3


def test_a_part_of_make_gpu_that_failed_is_said(tmp_path: Path) -> None:
    """Not passed over in silence: a page without it would look like one on which nothing was tried."""
    parts = {
        "step": {"failed": "bench.step: not done after 540 s"},
        "tests": {"exit_code": 0, "summary": ["17 passed"]},
    }
    (tmp_path / "gpu.json").write_text(json.dumps({"bench": "gpu", "environment": {"gpu": "NVIDIA H200"}, **parts}))
    report = make_report([tmp_path / "gpu.json"])
    short, *_ = sections(report)
    assert "gpu.json: step: bench.step: not done after 540 s" in short.paragraphs
    assert "Not measured: gpu.json: step" in [section.title for section in sections(report)]


def test_a_verdict_is_not_cut() -> None:
    """Its end is what to do. The longest that there is, from the results of this repository."""
    (found,) = read_results(REPOSITORY / "bench" / "results" / "cpu-2core-together.json")
    assert found.said == (found.raw["verdict"],) and "change first: " in found.said[0]
