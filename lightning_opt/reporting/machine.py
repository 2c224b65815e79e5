"""Say where a run happened: versions, hardware and the commit. Imports none of the packages that it names."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning_opt import __version__

_ALWAYS = ("torch", "lightning", "torchmetrics", "hydra-core", "numpy")
_IF_PRESENT = ("transformers", "onnx", "onnxruntime", "openvino", "nncf", "torchao")
_GIT_SECONDS = 5.0
# What makes integers or bf16 fast, and what the others build on.
_INSTRUCTIONS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "avx512_bf16", "amx_bf16", "i8mm", "bf16")


def environment(folder: Path | str = ".") -> dict[str, Any]:
    """Describe versions, hardware and commit, as the record's keys of the same names.

    Args:
        folder: Where to look for a git checkout; usually the working directory.

    Returns:
        `{"versions": {...}, "hardware": {...}, "git": {...} or None}`.
    """
    return {"versions": versions(), "hardware": hardware(), "git": git_state(folder)}


def versions() -> dict[str, str | None]:
    """Read installed versions from package metadata; None for one of the core packages that is absent."""
    found: dict[str, str | None] = {"python": platform.python_version(), "platform": platform.platform()}
    found["lightning_opt"] = __version__
    for name in _ALWAYS + _IF_PRESENT:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            if name in _ALWAYS:
                found[name] = None
    return found


def hardware() -> dict[str, Any]:
    """Describe the processor, memory and, where torch is already loaded, the threads and GPUs that it uses."""
    return {
        "cpu": {"model": _cpu_model(), "cores": _usable_cores(), "instructions": instructions()},
        "memory_bytes": _memory_bytes(),
        "threads": _threads(),
        "gpus": _gpus(),
    }


def git_state(folder: Path | str = ".") -> dict[str, Any] | None:
    """Read the commit of a checkout and whether it has changes; None outside one or without git."""
    if _git(folder, "rev-parse", "--is-inside-work-tree") != "true":
        return None
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else bool(changes) or commit is None}


def _git(folder: Path | str, *arguments: str) -> str | None:
    # fsmonitor may name a program to start; reading a commit must not start one
    command = ["git", "-c", "core.fsmonitor=false", "-C", str(folder), *arguments]
    settings = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS, env=settings, check=False)
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip().lower() in {"model name", "hardware", "cpu model"} and value.strip():
            return value.strip()
    return platform.processor() or platform.machine() or None


def instructions() -> list[str] | None:
    """List the processor's instructions that matter for integers of 8 bits and for bf16; None if it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip().lower() in {"flags", "features"}:
            there = set(value.split())
            return [name for name in _INSTRUCTIONS if name in there]
    return None


def _usable_cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _threads() -> int | None:
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) > 0 else _usable_cores()


def _gpus() -> list[dict[str, Any]]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(position) for position in range(torch.cuda.device_count())]
    return [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in found]
