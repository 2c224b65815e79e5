"""Pairs of callbacks and strategies that no other file has: N:M under ddp, pipelines side by side, and refusals."""

from functools import partial

import pytest
from test_prune_layers_sharded import job
from test_prune_sharded import same_masks

from lightning_opt.callbacks import Prune, Quantize
from lightning_opt.callbacks.support import check_pair
from lightning_opt.errors import ConfigError
from lightning_opt.pruning.structured import Structures
from lightning_opt.strategies import ddp
from lightning_opt.strategies.pipeline import pipeline
from lightning_opt.strategies.sharded_presets import fsdp2, fsdp2_tp, tensor_parallel
from lightning_opt.testing.ranks import on_ranks

pytestmark = pytest.mark.filterwarnings("ignore")
SIDE_BY_SIDE = partial(pipeline, data_parallel_size=2)
WHOLE = {"structures": partial(Prune, Structures()), "qat": Quantize}
LATER = partial(Quantize, method="post_training")


@pytest.mark.support(method=["unstructured", "n_m"], strategy=["ddp", "pipeline_ddp"], feature="masks")
@pytest.mark.parametrize(("strategy", "ranks"), [(ddp, 2), (SIDE_BY_SIDE, 4)], ids=["ddp", "pipeline_ddp"])
def test_masks_are_those_of_one_process(tmp_path, strategy, ranks):
    many = on_ranks(lambda: job(tmp_path, ranks=ranks, strategy=strategy), ranks=ranks, timeout_s=200)
    one = {"states": job(tmp_path, ranks=1)}
    for states in many:
        same_masks(one, {"states": states})


@pytest.mark.support(method=["structured", "qat"], strategy="pipeline_ddp", feature="pair", refused=True)
@pytest.mark.parametrize("callback", WHOLE.values(), ids=WHOLE)
def test_what_needs_whole_layers_is_refused_beside_other_pipelines_too(callback):
    with pytest.raises(ConfigError, match="strategy=pipeline does not go with"):
        check_pair(SIDE_BY_SIDE(), callback())


@pytest.mark.support(
    method="ptq", strategy=["fsdp2", "tensor_parallel", "fsdp2_tp", "pipeline", "pipeline_ddp"], feature="pair",
    refused=True,
)  # fmt: skip
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (fsdp2, "fsdp2"),
        (tensor_parallel, "tensor_parallel"),
        (partial(fsdp2_tp, tensor_parallel_size=2), "fsdp2_tp"),
        (pipeline, "pipeline"),
        (SIDE_BY_SIDE, "pipeline"),
    ],
)
def test_what_is_rounded_after_training_needs_whole_weights(make, name):
    with pytest.raises(ConfigError, match=f"strategy={name}"):
        check_pair(make(), LATER())
