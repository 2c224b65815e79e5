"""Measure how much faster int8 artifacts are than the best float32 engine, and than the peers' int8, and how small.

    python experiments/quant_speed/run.py            # about 25 minutes on a quiet machine
    python experiments/quant_speed/run.py --quick    # a look at small networks; leaves results and README alone

Each network has a fresh process. Prints tables, writes results.json after each network, then the figure and the tables
in README.md; --parts NAME ... measures some and keeps the others.
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
sys.path[:0] = [str(HERE), str(HERE.parents[1]), str(HERE.parent / "prune_speed")]
sys.path.append(str(HERE.parent / "quant_quality"))

from networks import NETWORKS, build  # noqa: E402

BATCHES = (1, 32)
FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")


def measure(name: str, *, seconds: float, folder: Path, peers: bool) -> dict[str, Any]:
    """Build, write and time one network in this process."""
    from clock import interleaved, load, summary
    from files import float_arms, our_arms, peer_arms, sizes
    from judge import compared

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    network = NETWORKS[name]
    model = build(network)
    example = network.inputs(2)
    arms = float_arms(model, example, folder)
    ours, exported, refused = our_arms(model, network, folder)
    others, reasons = peer_arms(network, folder) if peers else ({}, {})
    arms |= ours | others
    probe = network.inputs(4)
    answers = {arm: runner.predict(probe).double().flatten() for arm, runner in arms.items()}
    found: dict[str, Any] = {
        "sizes": sizes(model, folder),
        "exported": exported,
        "reasons": refused | reasons,
        "batches": {},
    }
    found["cosine"] = {
        arm: float(torch.cosine_similarity(answers["fp32, torch eager"], answer, dim=0))
        for arm, answer in answers.items()
    }
    for batch in BATCHES:
        inputs = network.inputs(batch)
        before = load()
        samples = interleaved(
            {arm: runner.bind(inputs) for arm, runner in arms.items()}, seconds=seconds * network.seconds, least=3
        )
        found["batches"][str(batch)] = {"load": max(before, load()), "arms": summary(samples), **compared(samples)}
    return found


def machine() -> dict[str, Any]:
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    cpu = next((line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line), "")
    flags = next((line.partition(":")[2].split() for line in text.splitlines() if line.startswith("flags")), [])
    about = {"cpu": cpu or platform.machine(), "flags": [flag for flag in FLAGS if flag in flags]}
    packages = ("torch", "onnxruntime", "openvino", "transformers")
    about |= {"cores": os.cpu_count(), "threads": 1, "python": platform.python_version()}
    return about | {name: version(name) for name in packages}


def in_fresh_process(name: str, *, seconds: float, passed: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, str(Path(__file__).resolve()), *passed]
        subprocess.run([*command, "--part", name, "--out", str(out), "--seconds", str(seconds)], check=True)
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def main() -> None:
    import peers

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="mlp and cnn, few rounds; README.md stays as it is")
    parser.add_argument("--seconds", type=float, default=None, help="of timing, for each network and batch size")
    parser.add_argument("--parts", nargs="+", choices=list(NETWORKS), default=None)
    parser.add_argument("--missing", action="store_true", help="only networks that results.json lacks")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no network after these")
    parser.add_argument("--peer-path", type=Path, default=peers.FOLDER, help="folder of the peers; filled if missing")
    parser.add_argument("--no-peers", action="store_true", help="leave NNCF and ONNX Runtime's own quantizer out")
    parser.add_argument("--redraw", action="store_true", help="measure nothing: tables and figure from results.json")
    parser.add_argument("--part", choices=list(NETWORKS), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.no_peers and not arguments.redraw:
        peers.install(arguments.peer_path)
    if arguments.part:
        with tempfile.TemporaryDirectory() as folder:
            part = measure(arguments.part, seconds=arguments.seconds, folder=Path(folder), peers=not arguments.no_peers)
        arguments.out.write_text(json.dumps(part), encoding="utf-8")
        return
    study(arguments)


def study(arguments: argparse.Namespace) -> None:
    passed = ["--peer-path", str(arguments.peer_path), *(["--no-peers"] if arguments.no_peers else [])]
    seconds, begun = arguments.seconds or (3.0 if arguments.quick else 15.0), time.monotonic()
    path = HERE / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"parts": {}}
    names = arguments.parts or (["mlp", "cnn"] if arguments.quick else list(NETWORKS))
    if arguments.missing:
        names = [name for name in names if name not in results["parts"]]
    shown: dict[str, Any] = {"machine": machine(), "parts": {} if arguments.quick else results["parts"]}
    for name in [] if arguments.redraw else names:
        if time.monotonic() - begun > 60 * arguments.minutes:
            break
        shown["parts"][name] = in_fresh_process(name, seconds=seconds, passed=passed)
        print(f"{name}: done after {time.monotonic() - begun:.0f} s", flush=True)
        if not arguments.quick:
            path.write_text(json.dumps(shown, indent=1) + "\n", encoding="utf-8")
    finish(shown, quick=arguments.quick)


def finish(results: dict[str, Any], *, quick: bool) -> None:
    from table import into_readme, markdown

    text = markdown(results)
    print(text)
    if quick:
        return
    into_readme(HERE / "README.md", text)
    from figure import draw

    draw(results, HERE / "figures" / "speed.png")


if __name__ == "__main__":
    main()
