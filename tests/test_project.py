"""The project as a whole: who may import whom, what a wheel holds, that every command explains itself."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY

OURS = ("shards", "ingest", "pipeline", "train", "bench")
ALLOWED = {
    "shards": set(),
    "ingest": {"shards"},
    "pipeline": {"shards", "ingest.source"},
    "train": {"pipeline", "shards"},
    "bench": {"shards", "ingest", "pipeline", "train"},
}
"""The map of the design."""
NAMED = re.compile(r"python -m ([a-z_.]*[a-z])|(cpu-2core-[a-z0-9-]+\.[a-z]+)")
"""A command, or a file of bench/results."""
COMMANDS = (
    "ingest",
    "ingest.phantom",
    "train.main",
    "train.evaluate",
    "train.controls",
    "bench.loader",
    "bench.report",
    "bench.scale",
    "bench.tune",
    "bench.nih",
    "bench.encodings",
    "bench.ingest",
    "bench.demo",
    "bench.gpu",
)


def imported(path: Path) -> set[str]:
    """Modules that a source file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("package", OURS)
def test_packages_import_only_what_the_map_allows(package: str) -> None:
    files = list((REPOSITORY / package).rglob("*.py"))
    assert files
    for path in files:
        for module in imported(path):
            top = module.split(".")[0]
            if top in OURS and top != package:
                allowed = any(module == name or module.startswith(f"{name}.") for name in ALLOWED[package])
                assert allowed, f"{path.relative_to(REPOSITORY)} imports {module}"


def test_text_is_read_and_written_in_utf8() -> None:
    """Whatever the locale of a batch job is: Python takes its encoding where none is named."""
    modes = {"open": 1, "fdopen": 1, "read_text": 0, "write_text": 1}
    for path in (each for package in OURS for each in (REPOSITORY / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", None) or getattr(node.func, "id", "")
            if name not in modes or (name == "open" and isinstance(node.func, ast.Attribute)):
                continue
            binary = name.endswith("open") and any("b" in str(getattr(each, "value", "")) for each in node.args[1:])
            said = len(node.args) > modes[name] if name.endswith("text") else binary
            assert said or any(each.arg == "encoding" for each in node.keywords), f"{path}:{node.lineno}"


def test_shards_need_neither_torch_nor_dali() -> None:
    modules = sorted(f"shards.{path.stem}" for path in (REPOSITORY / "shards").glob("[a-z]*.py"))
    code = f"import sys, {', '.join(modules)}; print([m for m in sys.modules if m in ('torch', 'nvidia', 'open_clip')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_what_reads_no_tensor_imports_no_torch() -> None:
    """Importing torch and timm takes 6 s, on a parallel file system a minute."""
    modules = "train.main, train.commandline, train.weights, train.compare, train.curves, train.lead_time, bench.report"
    presets = "for name in train.presets.PRESETS: train.commandline.preset(name)"
    code = f"import sys, {modules}\n{presets}\nprint([m for m in ('torch', 'timm', 'open_clip') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_ingest_workers_stay_light() -> None:
    """What a worker process of the ingest imports holds neither torch (700 MB) nor open_clip."""
    code = "import sys, ingest.encode, ingest.assemble; print('torch' in sys.modules, 'open_clip' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout == "False False\n", done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_explain_themselves_and_refuse_nonsense(command: str) -> None:
    """Both in one process, as a start is mostly imports."""
    code = (
        "import runpy, sys\n"
        "for sys.argv[1:] in (['--help'], ['--no-such-flag', '1']):\n"
        f"    try: runpy.run_module({command!r}, run_name='__main__', alter_sys=True)\n"
        "    except SystemExit as stop: print('\\nexit', stop.code, flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    helped, explained, refused = done.stdout.partition("\nexit 0\n")
    assert explained and "--" in helped, (done.stdout, done.stderr)
    assert refused == "\nexit 2\n" and done.returncode == 0, (refused, done.stderr)
    (line,) = done.stderr.splitlines()
    assert "--no-such-flag" in line


def test_a_wheel_holds_all_five_packages_and_no_tests(tmp_path: Path) -> None:
    """Built, installed outside the repository, and imported from there."""
    shutil.rmtree(REPOSITORY / "build", ignore_errors=True)  # setuptools packs what an earlier build left, too
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, str(REPOSITORY)]
    done = subprocess.run(build, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("shardclip-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if name.endswith(".py")} == set(OURS)
    assert {"shards/FORMAT.md", "ingest/phantom.toml", "ingest/slurm/ingest.sbatch"} <= set(names)
    assert any(name.endswith("LICENSE") for name in names)
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel]
    assert subprocess.run(install, capture_output=True).returncode == 0
    modules = sorted(name[:-3].replace("/", ".") for name in names if name.endswith(".py") and "__" not in name)
    code = (
        f"import importlib, sys; sys.path.insert(0, {str(site)!r})\n"
        f"for name in {modules!r}: assert importlib.import_module(name).__file__.startswith({str(site)!r}), name"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_readme_names_every_source_file() -> None:
    """The annotated tree is the reading order; a file that is not in it does not exist for a reader."""
    readme = (REPOSITORY / "README.md").read_text()
    for package in OURS:
        for path in (REPOSITORY / package).glob("*.py"):
            if path.name != "__init__.py":
                assert path.name in readme, f"{package}/{path.name} is not in the README's tree"


def test_commands_and_results_that_a_text_names_are_there() -> None:
    """A docstring goes on naming a command long after it went."""
    folders = (*OURS, "tests")
    texts = [
        path
        for folder in folders
        for kind in ("py", "md", "sbatch")
        for path in (REPOSITORY / folder).rglob(f"*.{kind}")
    ]
    named = [match for path in (*texts, REPOSITORY / "README.md") for match in NAMED.findall(path.read_text())]
    assert len({command for command, _ in named}) > 20 and len({result for _, result in named}) > 10
    for command, result in named:
        path = REPOSITORY / command.replace(".", "/")
        if command.split(".")[0] in OURS:
            source = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
            assert source.exists() and '__name__ == "__main__"' in source.read_text(), command
        assert (REPOSITORY / "bench" / "results" / result).exists(), result
