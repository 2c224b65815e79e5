"""Quantization-aware training under FSDP2: all processes have the same quantizers, and a resumed run ends bit-equal."""

from functools import partial

import pytest
import torch
from quantize_job import FEATURES, QAT, Residual
from test_prune_sharded import Doubled, job, resumed
from torch import nn

from lightning_opt.callbacks import Prune
from lightning_opt.quantization.observers import MinMax
from lightning_opt.quantization.scheme import Scheme
from lightning_opt.testing.ranks import on_ranks

pytestmark = pytest.mark.filterwarnings("ignore")
MIN_MAX = partial(QAT, scheme=Scheme(activation_observer=MinMax()))
LSQ = partial(QAT, scheme="w4a8_lsq")
SPARSE = partial(Prune, start="1 steps", end="4 steps", every="1 steps", sparsity=0.5)
HOW = {"features": FEATURES}


def module():
    made = Doubled(Residual(norm=nn.Identity, dropout=0.0))
    made.make = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    return made


@pytest.mark.support(method="qat", strategy="fsdp2", feature="quantizers")
def test_all_processes_have_the_quantizers_that_one_has(tmp_path):
    ranks = on_ranks(lambda: job(tmp_path, MIN_MAX, make=module, **HOW))
    one = job(tmp_path, MIN_MAX, ranks=1, make=module, **HOW)["weights"]
    scales = [name for name in one if name.endswith("scale")]
    assert len(scales) >= 8
    for name in scales:
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name]), name
        torch.testing.assert_close(ranks[0]["weights"][name], one[name], rtol=1e-4, atol=1e-6)
        assert not torch.equal(one[name], torch.ones_like(one[name]))


@pytest.mark.support(method="qat", strategy="fsdp2", feature="resume")
@pytest.mark.parametrize("callbacks", [(LSQ,), (MIN_MAX, SPARSE)], ids=["lsq", "sparse"])
def test_two_processes_resume_bit_equal(tmp_path, callbacks):
    assert resumed(tmp_path, *callbacks, stops=(4, 13), make=module, **HOW)[0] == []
