"""Where each process sees a part of the gradients, all of them take the same way."""

import pytest
import torch
import torch.distributed as dist
from prune_job import Mlp, Stranger, fit, make_run

from lightning_opt.callbacks import NonFiniteGuard
from lightning_opt.errors import NonFiniteError
from lightning_opt.strategies.sharded_presets import fsdp2
from lightning_opt.testing.ranks import on_ranks

pytestmark = pytest.mark.filterwarnings("ignore")
BAD_STEP = 4


class Poisoned(Stranger):
    """One process meets one bad batch."""

    def __init__(self):
        net = Mlp()
        net[2].p = 0.0
        super().__init__(net, make=lambda parameters: torch.optim.SGD(parameters, lr=0.05))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if len(self.seen) == BAD_STEP + 1 and dist.get_rank() == 1 else loss


def job(folder, policy):
    options = {"devices": 2, "strategy": fsdp2(), "save": policy == "rollback", "every_n_steps": 3}
    run = make_run(folder, lambda: NonFiniteGuard(policy), module=Poisoned, **options)
    try:
        fit(run)
    except NonFiniteError as error:
        return str(error)
    guard = run.trainer.callbacks[0]
    finite = all(bool(value.isfinite().all()) for value in run.module.state_dict().values())
    return [guard.skipped_steps, guard.rollbacks, finite, dict(run.module.state_dict())]


def test_all_processes_decide_the_same(tmp_path):
    policies = ("stop", "skip", "rollback")
    first, second = on_ranks(lambda: [job(tmp_path / policy, policy) for policy in policies])
    for said in (first[0], second[0]):
        assert f"step {BAD_STEP}" in said
        assert "is not finite" in said
    for one, other in zip(first[1:], second[1:], strict=True):
        assert one[:3] == other[:3]
        assert one[2]
        assert all(torch.equal(value, other[3][name]) for name, value in one[3].items())
    assert [kind[:2] for kind in first[1:]] == [[1, 0], [1, 1]]
    assert any(not torch.equal(value, first[2][3][name]) for name, value in first[1][3].items())
