"""The DDP preset: a timeout that ends a job, no search for unused parameters unless asked for."""

from datetime import timedelta

from lightning.pytorch.strategies import DDPStrategy

from lightning_opt.strategies import auto, ddp


def test_preset():
    strategy = ddp(timeout_s=7.0)
    assert isinstance(strategy, DDPStrategy)
    assert strategy._timeout == timedelta(seconds=7)
    assert strategy._ddp_kwargs["find_unused_parameters"] is False
    assert strategy._ddp_kwargs["gradient_as_bucket_view"] is True
    assert ddp(find_unused_parameters=True, static_graph=True)._ddp_kwargs["static_graph"] is True


def test_auto_is_lightnings_own():
    assert auto() == "auto"
