"""Is the shrunk model the masked model? On many architectures, through replay of the recipe in a fresh process."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from table import write_table

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.json"
TOLERANCE = 1e-5
BATCH = 8


def run(script: str, folder: Path, names: list[str], *, path: str = "") -> None:
    """Run one script for some models, each in a process of its own."""
    places = [str(HERE.parents[1]), path, os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    subprocess.run([sys.executable, str(HERE / script), str(folder), *names], env=environment, capture_output=True)


def measure(names: list[str], *, peer_path: str | None) -> dict[str, dict[str, Any]]:
    """Cut in one process, replay in another, and run the peer in a third."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run("cut.py", folder, names)
        run("replay.py", folder, [name for name in names if (folder / name / "recipe-all.json").is_file()])
        if peer_path:
            run("peer.py", folder, names, path=peer_path)
        return {name: collect(folder / name) for name in names}


def measure_peer(names: list[str], *, path: str) -> dict[str, dict[str, Any]]:
    """Run the peer alone."""
    with tempfile.TemporaryDirectory() as temporary:
        run("peer.py", Path(temporary), names, path=path)
        return {name: collect(Path(temporary) / name).get("peer", {}) for name in names}


def collect(folder: Path) -> dict[str, Any]:
    """Read what the processes wrote about one model."""

    def read(script: str) -> dict[str, Any]:
        error, found = folder / f"{script}.error", folder / f"{script}.json"
        if error.is_file():
            return {"error": error.read_text()}
        return json.loads(found.read_text()) if found.is_file() else {}

    found, replayed, peer = read("cut"), read("replay"), read("peer")
    if "refused" in found:
        found = {"verdict": "refused", "why": found["refused"]}
    elif "error" in found or "error" in replayed:
        script, why = ("cut", found["error"]) if "error" in found else ("replay", replayed["error"])
        found |= {"verdict": "fail", "why": f"{script}: {why}"}
    elif "ratios" in found:
        for ratio, measured in found["ratios"].items():
            measured |= replayed[ratio]
        found["all_kinds_run"] = replayed["all_kinds_run"]
        found |= judge(found)
    return found | ({"peer": peer} if peer else {})


def judge(found: dict[str, Any]) -> dict[str, str]:
    """Say pass, refused or fail: equal within the tolerance, moved against the dense model, fewer parameters."""
    if not found["exact"]:
        return {"verdict": "refused", "why": "; ".join(found["refused_axes"][:3]) or "nothing can be cut exactly"}
    for ratio, measured in found["ratios"].items():
        if measured["difference"] > TOLERANCE * max(1.0, measured["largest"]):
            return {"verdict": "fail", "why": f"at {ratio} the answers differ by {measured['difference']:.1e}"}
        if measured["moved"] < 1e-3 * measured["largest"] or measured["params"] >= found["params"]:
            return {"verdict": "fail", "why": f"at {ratio} nothing happened"}
    if not found["all_kinds_run"]:
        return {"verdict": "fail", "why": "with every kind of group cut, the answer is not finite"}
    return {"verdict": "pass", "why": ""}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="names of architectures; all by default")
    parser.add_argument("--again", action="store_true", help="measure anew what results.json already holds")
    parser.add_argument(
        "--peer-path",
        help="folder that holds torch_pruning (pip install --no-deps --target FOLDER torch-pruning==1.6.1)",
    )
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop before the next model after this time"
    )
    parser.add_argument("--peer-only", action="store_true", help="only the peer, for models that results.json holds")
    options = parser.parse_args()
    sys.path.insert(0, str(HERE.parents[1]))
    from architectures import ARCHITECTURES

    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if options.peer_only:
        known = [name for name in options.only or ARCHITECTURES if name in results]
        for name, found in measure_peer(known, path=options.peer_path).items():
            results[name]["peer"] = found
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        write_table(HERE / "README.md", results, list(ARCHITECTURES))
        return 0
    wanted = [name for name in options.only or ARCHITECTURES if options.again or name not in results]
    started = time.monotonic()
    for batch in [wanted[place : place + BATCH] for place in range(0, len(wanted), BATCH)]:
        if time.monotonic() - started > options.seconds:
            print("stopped by --seconds; the same command goes on")
            break
        results |= measure(batch, peer_path=options.peer_path)
        for name in batch:
            print(name, results[name]["verdict"], results[name]["why"], flush=True)
        RESULTS.write_text(
            json.dumps({each: results[each] for each in ARCHITECTURES if each in results}, indent=1) + "\n"
        )
    write_table(HERE / "README.md", results, list(ARCHITECTURES))
    return int(any(result["verdict"] == "fail" for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
