"""Commands as processes of their own, without paying for the imports of torch and Lightning in each of them.

A fork server imports them once; each command is a fork of it with its own session, folder, environment and output, to
be killed or stopped like any other. What depends on how Python itself was started (ddp, `python -m`, a console script)
is started for real: see `run`.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["lightning_opt.cli.job", "lightning_opt.cli.finished", "lightning_opt.checkpointing"])


@dataclass(frozen=True)
class Ended:
    returncode: int
    stdout: str
    stderr: str


class Started:
    """A running command; its words go to `train` unless they begin with another command's name."""

    def __init__(
        self,
        words: list[str],
        *,
        cwd: Path,
        cache: Path,
        limits: dict[int, int] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        words = [str(word) for word in words]
        self._outputs = [cwd / f".{name}-{time.monotonic_ns()}" for name in ("out", "err")]
        variables = {**_environment(cache), **(environment or {})}
        arguments = (words, str(cwd), variables, [str(path) for path in self._outputs], limits or {})
        self.process = _context.Process(target=_command, args=arguments)
        self.process.start()

    @property
    def is_running(self) -> bool:
        return self.process.is_alive()

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def end(self, timeout_s: float = TIMEOUT_S) -> Ended:
        self.process.join(timeout_s)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        stdout, stderr = (path.read_text() if path.exists() else "" for path in self._outputs)
        for path in self._outputs:
            path.unlink(missing_ok=True)
        return Ended(self.process.exitcode, stdout, stderr)


class Ranks:
    """A command as the workers of one `torchrun`: its environment and its store, without its start-up."""

    def __init__(self, words: list[str], *, cwd: Path, cache: Path, count: int = 2, **environment: str) -> None:
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "GROUP_RANK": "0",
            "TORCHELASTIC_RUN_ID": "none",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "0",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            **environment,
        }
        # Without the launcher's store rank 0 keeps one itself, at the same port.
        self._store = store if shared["TORCHELASTIC_USE_AGENT_STORE"] == "True" else None
        del store
        each = [{**shared, "RANK": str(number), "LOCAL_RANK": str(number)} for number in range(count)]
        self.ranks = [Started(words, cwd=cwd, cache=cache, environment=variables) for variables in each]

    @property
    def is_running(self) -> bool:
        return all(rank.is_running for rank in self.ranks)

    def kill(self) -> None:
        for rank in self.ranks:
            if rank.is_running:
                rank.signal(signal.SIGKILL)

    def end(self) -> list[Ended]:
        return [rank.end() for rank in self.ranks]


def warm(*words, cwd: Path, cache: Path, limits: dict[int, int] | None = None) -> Ended:
    """Run a command to its end."""
    return Started(list(words), cwd=cwd, cache=cache, limits=limits).end()


def run(*words, cwd: Path, cache: Path, command: list[str] | None = None) -> subprocess.CompletedProcess:
    """Run `python train.py` (or `command`) as a user does."""
    return subprocess.run(
        [*(command or [sys.executable, str(ROOT / "train.py")]), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        cwd=cwd,
        env={**os.environ, **_environment(cache)},
    )


def wait_for(happened, *, process: Started | None = None, timeout_s: float = TIMEOUT_S) -> None:
    """Wait until a condition holds; fail when the process ends, or the time is over, before it does."""
    until = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < until, "waited too long"
        if process is not None and not process.is_running:
            assert happened(), process.end().stderr
        time.sleep(0.005)


def _environment(cache: Path) -> dict[str, str]:
    return {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "LIGHTNING_OPT_CACHE": str(cache)}


def _command(words, cwd, environment, outputs, limits) -> None:
    os.setsid()
    os.chdir(cwd)
    os.environ.update(environment)
    for number, path in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    import resource

    import torch

    import lightning_opt.__main__ as console
    from lightning_opt.cli import train

    torch.set_num_threads(1)
    for name, value in limits.items():
        resource.setrlimit(name, (value, value))
    if words and words[0] in console._COMMANDS:
        sys.argv = ["lightning-opt", *words]
        sys.exit(console.main(words))
    sys.argv = [str(ROOT / "train.py"), *words]
    sys.exit(train.main(words))
