"""The DDP preset: a timeout that ends a job, no search for unused parameters unless asked for."""

from datetime import timedelta

import torch
from lightning.pytorch.strategies import DDPStrategy
from parallel_job import distillation, fit

from lightning_opt.strategies import auto, ddp
from lightning_opt.testing.ranks import on_ranks


def test_preset():
    strategy = ddp(timeout_s=7.0)
    assert isinstance(strategy, DDPStrategy)
    assert strategy._timeout == timedelta(seconds=7)
    assert strategy._ddp_kwargs["find_unused_parameters"] is False
    assert strategy._ddp_kwargs["gradient_as_bucket_view"] is True
    assert strategy._ddp_kwargs["static_graph"] is False
    assert ddp(find_unused_parameters=True, static_graph=True)._ddp_kwargs["static_graph"] is True


def test_auto_is_lightnings_own():
    assert auto() == "auto"


def test_a_static_graph_learns_as_in_one_process():
    options = {"steps": 4, "accumulate_grad_batches": 2, "gradient_clip_val": 0.3}

    def job():
        losses, module, _ = fit(distillation, strategy=ddp(static_graph=True), devices=2, **options)
        return losses, [name for name, _ in module.named_parameters()]

    one, module, _ = fit(distillation, **options)
    ranks = on_ranks(job)
    assert torch.allclose(torch.stack([losses for losses, _ in ranks]).mean(0), one, rtol=0, atol=1e-5)
    # no parameter of the teacher is in any bucket
    assert ranks[0][1] == [name for name, _ in module.named_parameters()]
    assert len(one) == 8
