"""What a run ran on: packages, the code's commit, GPU and driver. No host, no user: a run's folder is handed on."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = (
    *("torch", "torchvision", "open_clip_torch", "timm", "nvidia-dali-cuda120", "nvidia-dali-cuda130"),
    *("numpy", "numba", "pyarrow", "simplejpeg", "h5py"),
)
"""Whose versions a run records."""
_PATIENCE_S = 20


def versions() -> dict[str, Any]:
    """Name -> version: Python, kernel, libraries, commit, GPU, driver, CUDA. What there is none of is absent."""
    found: dict[str, Any] = {"python": platform.python_version(), "kernel": platform.release()}
    found |= {name: version for name in PACKAGES if (version := package_version(name))}
    found |= {"cpus": len(os.sched_getaffinity(0))}
    return {**found, **_commit(), **_gpu()}


def package_version(package: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> dict[str, Any]:
    """The repository's commit, and whether files differ from it; nothing where the code is installed without one."""
    commit = _ask("git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD")
    if commit is None:
        return {}
    changes = _ask("git", "-C", str(Path(__file__).resolve().parent.parent), "status", "--porcelain", "-uno")
    return {"commit": commit, "uncommitted_changes": bool(changes)}


def _gpu() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        return {}
    found = {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count(), "cuda": torch.version.cuda}
    driver = _ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {**found, **({"driver": driver.splitlines()[0]} if driver else {})}


def _ask(*command: str) -> str | None:
    """What a program says; None where it is missing, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
