"""The names by which configs ask for sharding: `strategy=fsdp2`, `tensor_parallel`, `fsdp2_tp`."""

from collections.abc import Mapping, Sequence

from lightning_opt.strategies.sharded import ShardedStrategy
from lightning_opt.strategies.wrapping import Wrapping


def fsdp2(
    *,
    data_parallel_size: int | None = None,
    wrap: Sequence[str] | None = None,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
    keep_sharded: bool = False,
    timeout_s: float = 300.0,
) -> ShardedStrategy:
    """Shard weights, gradients and optimizer state over all processes; each computes with whole layers.

    (Zhao et al. 2023, arXiv 2304.11277.)

    Args:
        data_parallel_size: How many processes; None: all.
        wrap: Names of the modules whose weights are gathered together, as patterns within the network such as
            "blocks.*"; None: the repeated blocks, found by type.
        reshard_after_forward: Whether a block's whole weights are freed between forward and backward: less memory,
            one more gathering.
        cpu_offload: Whether weights, gradients and optimizer state wait in the host's memory.
        keep_sharded: See `ShardedStrategy`.
        timeout_s: After how many seconds without an answer a peer counts as lost.
    """
    return ShardedStrategy(
        data_parallel_size=data_parallel_size,
        tensor_parallel_size=1,
        wrapping=Wrapping(patterns=wrap, reshard_after_forward=reshard_after_forward, cpu_offload=cpu_offload),
        keep_sharded=keep_sharded,
        timeout_s=timeout_s,
    )


def tensor_parallel(
    *,
    tensor_parallel_size: int | None = None,
    plan: Mapping[str, str] | None = None,
    keep_sharded: bool = False,
    timeout_s: float = 300.0,
) -> ShardedStrategy:
    """Cut every layer over all processes, which see the same samples.

    (Shoeybi et al. 2019, Megatron-LM, arXiv 1909.08053, section 3.)

    Args:
        tensor_parallel_size: How many processes; None: all.
        plan: Module-name pattern -> kind (see `tensor_plans.KINDS`); None: the built-in plan for such a network.
        keep_sharded: See `ShardedStrategy`.
        timeout_s: After how many seconds without an answer a peer counts as lost.
    """
    return ShardedStrategy(
        data_parallel_size=1,
        tensor_parallel_size=tensor_parallel_size,
        plan=plan,
        keep_sharded=keep_sharded,
        timeout_s=timeout_s,
    )


def fsdp2_tp(
    *,
    tensor_parallel_size: int,
    data_parallel_size: int | None = None,
    plan: Mapping[str, str] | None = None,
    wrap: Sequence[str] | None = None,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
    keep_sharded: bool = False,
    timeout_s: float = 300.0,
) -> ShardedStrategy:
    """Cut every layer over neighbouring processes, and shard the pieces over the rest.

    Args:
        tensor_parallel_size: Processes that share each layer; those of one machine.
        data_parallel_size: Processes that see different samples; None: what is left of all.
        plan: See `tensor_parallel`.
        wrap: See `fsdp2`.
        reshard_after_forward: See `fsdp2`.
        cpu_offload: See `fsdp2`.
        keep_sharded: See `ShardedStrategy`.
        timeout_s: After how many seconds without an answer a peer counts as lost.
    """
    return ShardedStrategy(
        data_parallel_size=data_parallel_size,
        tensor_parallel_size=tensor_parallel_size,
        wrapping=Wrapping(patterns=wrap, reshard_after_forward=reshard_after_forward, cpu_offload=cpu_offload),
        plan=plan,
        keep_sharded=keep_sharded,
        timeout_s=timeout_s,
    )
