"""Measure how much faster models get when channels, heads or layers are cut out, beside what their MACs promise.

    python experiments/prune_speed/run.py            # about 7 minutes on a quiet machine
    python experiments/prune_speed/run.py --quick    # a look, under 2 minutes; leaves results, figure and README alone

Prints tables, writes results.json, figures/efficiency.png and the tables in README.md.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
PARTS = {"resnet50": 0.75, "bert": 0.15, "zeros": 0.1}


def measure(part: str, *, seconds: float, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one family in this process."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if part == "resnet50":
        import peer
        import resnet

        if not arguments.no_peer:
            peer.install(arguments.peer_path)
        cut = None if arguments.no_peer else peer.cut
        return resnet.measure(seconds=seconds, folder=folder, peer=cut, quick=arguments.quick)
    if part == "bert":
        import bert

        return bert.measure(seconds=seconds, folder=folder)
    import zeros

    return zeros.measure(seconds=seconds, folder=folder)


def machine() -> dict[str, Any]:
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    cpu = next((line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line), "")
    flags = next((line.partition(":")[2].split() for line in text.splitlines() if line.startswith("flags")), [])
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    about = {"cpu": cpu or platform.machine(), "flags": wide, "cores": os.cpu_count(), "threads": 1}
    packages = ("torch", "onnxruntime", "openvino", "transformers")
    return about | {"python": platform.python_version()} | {name: version(name) for name in packages}


def in_fresh_process(part: str, *, seconds: float, passed: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, str(Path(__file__).resolve()), *passed]
        subprocess.run([*command, "--part", part, "--out", str(out), "--seconds", str(seconds)], check=True)
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def main() -> None:
    from peer import FOLDER

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, without 1/4; README.md stays as it is")
    parser.add_argument("--seconds", type=float, default=None, help="of timing, without what comes before it")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--peer-path", type=Path, default=FOLDER, help="folder of Torch-Pruning; filled if missing")
    parser.add_argument("--no-peer", action="store_true", help="leave Torch-Pruning out")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        with tempfile.TemporaryDirectory() as folder:
            part = measure(arguments.part, seconds=arguments.seconds, folder=Path(folder), arguments=arguments)
        arguments.out.write_text(json.dumps(part), encoding="utf-8")
        return
    passed = [*(["--quick"] if arguments.quick else []), *(["--no-peer"] if arguments.no_peer else [])]
    passed += ["--peer-path", str(arguments.peer_path)]
    seconds, begun = arguments.seconds or (24.0 if arguments.quick else 200.0), time.perf_counter()
    path = HERE / "results.json"
    parts = json.loads(path.read_text(encoding="utf-8"))["parts"] if path.exists() else {}
    for name in arguments.parts:
        parts[name] = in_fresh_process(name, seconds=seconds * PARTS[name], passed=passed)
    finish(parts, arguments, begun)


def finish(parts: dict[str, Any], arguments: argparse.Namespace, begun: float) -> None:
    from table import into_readme, markdown

    results = {"machine": machine(), "wall_s": round(time.perf_counter() - begun, 1), "parts": parts}
    if arguments.quick:
        results["parts"] = {name: parts[name] for name in arguments.parts}
    text = markdown(results)
    print(text)
    if arguments.quick:
        return
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    into_readme(HERE / "README.md", text)
    if "resnet50" in parts:
        from figure import draw

        draw(results, HERE / "figures" / "efficiency.png")


if __name__ == "__main__":
    main()
