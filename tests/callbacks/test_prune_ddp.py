"""Two processes: they mask and remove the same, as one process with the whole batch does, and resume bit-equal."""

import contextlib
import os
import signal
import socket
import time
from functools import partial

import pytest
import torch
from prune_job import Conv, Stranger, fit, make_run

from lightning_opt.callbacks import Prune
from lightning_opt.checkpointing import find_checkpoint
from lightning_opt.errors import ConfigError
from lightning_opt.pruning.criteria import Snip, Wanda
from lightning_opt.pruning.structured import Structures
from lightning_opt.testing.resume import KillAfter, compare_checkpoints

pytestmark = pytest.mark.filterwarnings("ignore")
LIMIT_S = 90.0

OFTEN = {"start": "2 steps", "end": "8 steps", "every": "3 steps", "observe_steps": 2, "sparsity": 0.7}
GRADIENTS = partial(Prune, criterion=Snip(), include=["one", "two"], **OFTEN)
INPUTS = partial(Prune, criterion=Wanda(), include=["stem", "head"], **OFTEN)
SHRINK = partial(Prune, Structures(round_to=1), sparsity=0.5, start="2 steps", end="8 steps", every="3 steps")


def start(job, rank, port, ranks=2):
    """Fork a process as torchrun would start it (importing everything again would take most of the test's time)."""
    pid = os.fork()
    if pid == 0:
        code = 1
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
        os.environ |= {name: str(value) for name, value in names.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                job()
            code = 0
        finally:
            os._exit(code)
    return pid


def run_two(job):
    """Run a job in two processes; return their exit codes. Those that hang are killed, and have none."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = [start(job, rank, port) for rank in range(2)]
    codes, end = {}, time.monotonic() + LIMIT_S
    while len(codes) < 2 and time.monotonic() < end:
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for pid in set(pids) - set(codes):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return [codes.get(pid) for pid in pids]


def module():
    return Stranger(Conv(norm=torch.nn.Identity).double())  # batch statistics would be each process's own


def job(folder, *callbacks, stop=None, ranks=2):
    callbacks = [*callbacks, *([partial(KillAfter, stop)] if stop else [])]
    options = {"devices": 2, "strategy": "ddp"} if ranks > 1 else {}
    run = make_run(folder, *callbacks, module=module, features=16, precision="64-true", **options)
    fit(run, resume=find_checkpoint(folder))


def load(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)


@pytest.mark.support(method=["unstructured", "structured"], strategy="ddp", feature="resume")
@pytest.mark.parametrize(
    ("callbacks", "stops"),
    [((GRADIENTS, INPUTS), [5]), ((SHRINK, partial(Prune, end=0.9)), [4, 9])],
    ids=["masks", "cut"],
)
def test_two_processes_resume_bit_equal(tmp_path, callbacks, stops):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_two(lambda: job(whole, *callbacks)) == [0, 0]
    for stop in stops:
        assert 1 in run_two(lambda stop=stop: job(cut, *callbacks, stop=stop))
        assert load(cut)["global_step"] == stop
    assert run_two(lambda: job(cut, *callbacks)) == [0, 0]
    assert compare_checkpoints(whole / "last.ckpt", cut / "last.ckpt") == []


@pytest.mark.support(method="unstructured", strategy="ddp", feature="masks")
@pytest.mark.support(method="structured", strategy="ddp", feature="structure")
def test_two_processes_choose_what_one_does_with_the_whole_batch(tmp_path):
    callbacks = (SHRINK, GRADIENTS, INPUTS)
    assert run_two(lambda: job(tmp_path / "two", *callbacks)) == [0, 0]
    job(tmp_path / "one", *callbacks, ranks=1)
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    assert one["recipes"] == two["recipes"] != {}
    bits = [
        {
            f"{key} {name}": mask["bits"]
            for key, value in pruners_of(state)
            for name, mask in value.items()
            if mask["bits"] is not None
        }
        for state in (one, two)
    ]
    assert len(bits[0]) >= 3
    assert bits[0].keys() == bits[1].keys()
    for name, found in bits[0].items():
        assert torch.equal(found, bits[1][name]), name
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(value, two["state_dict"][name], rtol=1e-6, atol=1e-9)


def pruners_of(state):
    return [(key, value["masks"]["masks"]) for key, value in state["callbacks"].items() if key.startswith("Prune")]


def test_processes_that_are_forked_are_refused_for_structures(tmp_path):
    run = make_run(tmp_path, SHRINK, module=module, features=16, devices=2, strategy="ddp_fork", save=False)
    with pytest.raises(ConfigError, match="strategy=ddp_fork"):
        run.trainer.callbacks[0].setup(run.trainer, run.module, "fit")
