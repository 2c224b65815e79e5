"""Count the floating-point operations of one forward pass: 2 for each multiply-accumulate.

`torch.utils.flop_counter` counts matrix products, convolutions and attention. What it misses on some devices is added
here (attention on CPUs, matrix-vector products, fused LSTM and cuDNN recurrent layers). By its convention, and ours,
element-wise work, normalisation, pooling and softmax count zero; causal attention counts in full. An operator that is
neither counted nor known to be light is listed by name, so that a report can say what is missing.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

from lightning_opt.evaluation.inputs import at_batch
from lightning_opt.forward import Inputs, forward

Shape = torch.Size | list[int] | tuple[int, ...]


def _attention_flop(query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _matrix_vector_flop(matrix: Shape, vector: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(matrix)


def _add_matrix_vector_flop(bias: Shape, matrix: Shape, vector: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(matrix)


def _dot_flop(left: Shape, right: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(left)


def _add_batched_product_flop(bias: Shape, left: Shape, right: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(left) * right[-1]


def _fused_rnn_layer_flop(inputs: Shape, from_input: Shape, from_hidden: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(inputs[:-1]) * (prod(from_input) + prod(from_hidden))


def _cudnn_rnn_flop(inputs: Shape, weights: list[Shape], *args: Any, **kwargs: Any) -> int:
    return 2 * prod(inputs[:-1]) * sum(prod(weight) for weight in weights if len(weight) > 1)


_ADDED: Mapping[Any, Callable[..., int]] = MappingProxyType(
    {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop,
        torch.ops.aten.mv: _matrix_vector_flop,
        torch.ops.aten.addmv: _add_matrix_vector_flop,
        torch.ops.aten.dot: _dot_flop,
        torch.ops.aten.addbmm: _add_batched_product_flop,
        torch.ops.aten.mkldnn_rnn_layer: _fused_rnn_layer_flop,
        torch.ops.aten._cudnn_rnn: _cudnn_rnn_flop,
    }
)

# Light operators without a tag that says so: moves, copies, makers, lookups, norms, pools and softmax.
_LIGHT = frozenset(
    """
    _adaptive_avg_pool2d _adaptive_avg_pool3d _assert_async _assert_tensor_metadata _conj _log_softmax _neg_view
    _local_scalar_dense _native_batch_norm_legit _native_batch_norm_legit_functional
    _native_batch_norm_legit_no_training _prelu_kernel _safe_softmax _softmax _thnn_fused_gru_cell
    _thnn_fused_lstm_cell _to_copy _unique2 _unsafe_view _reshape_alias adaptive_max_pool2d alias arange argmax argmin
    avg_pool1d avg_pool2d avg_pool3d batch_norm bernoulli bincount bucketize cat channel_shuffle clone col2im
    constant_pad_nd contiguous copy copy_ cudnn_batch_norm cummax cummin cumprod cumsum detach detach_ diagonal_copy
    embedding empty empty_like empty_strided equal eye fill fill_ flip full full_like gather glu im2col index
    index_add index_add_ index_copy index_put index_put_ index_select is_same_size item lift_fresh lift_fresh_copy
    linspace masked_fill masked_fill_ masked_scatter masked_select max max_pool2d_with_indices max_pool3d_with_indices
    median min mode native_batch_norm native_channel_shuffle native_dropout native_group_norm native_layer_norm
    new_empty new_empty_strided new_full new_ones new_zeros nonzero norm normal_ one_hot ones ones_like
    _fused_rms_norm pixel_shuffle pixel_unshuffle pow prod rand randint rand_like randn randn_like randperm
    reflection_pad1d reflection_pad2d repeat repeat_interleave replication_pad1d replication_pad2d
    resize_ roll scalar_tensor scatter scatter_ scatter_add scatter_add_ scatter_reduce searchsorted select_backward
    set_ slice_scatter sort split_with_sizes_copy squeeze_copy stack std sum sym_numel sym_size tile topk transpose_
    tril triu unfold_backward uniform_ unique_dim unsafe_chunk unsafe_split unsqueeze_ upsample_bicubic2d
    upsample_bilinear2d upsample_nearest1d upsample_nearest2d var var_mean view_copy where zero_ zeros zeros_like
    """.split()  # noqa: SIM905  (a hundred quoted words would hide the list)
)
_LIGHT_NAMESPACES = frozenset({"prim", "quantized_decomposed"})


@dataclass(frozen=True, kw_only=True)
class Flops:
    """The floating-point operations of one forward pass, 2 per multiply-accumulate.

    Attributes:
        total: All that was counted.
        by_operator: The share of each operator, such as `{"aten.convolution": 1024}`.
        by_module: The share of each module by its full name, children included.
        not_counted: Calls of each operator that may be heavy and could not be counted.
    """

    total: int
    by_operator: Mapping[str, int]
    by_module: Mapping[str, int]
    not_counted: Mapping[str, int]


class _NotCounted(TorchDispatchMode):
    """Note each operator that the counter has no formula for and that is not known to be light."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = getattr(func, "overloadpacket", func)
        if packet not in flop_registry and packet not in _ADDED and not _is_light(func):
            self.calls[_operator_name(packet)] += 1
        return func(*args, **(kwargs or {}))


def count_flops(model: nn.Module, example_inputs: Inputs, *, batch: int = 1) -> Flops:
    """Count the operations of one forward pass of `model` over `batch` samples like `example_inputs`.

    Example:
        >>> import torch
        >>> count_flops(torch.nn.Linear(10, 3), torch.zeros(1, 10)).total
        60
    """
    inputs = at_batch(example_inputs, batch)
    missed = _NotCounted()
    counter = FlopCounterMode(display=False, custom_mapping=dict(_ADDED))
    # The watcher is entered first: it then sees what is left after the counter has taken composite operators apart.
    with torch.no_grad(), _no_fast_path(), missed, counter:
        forward(model, inputs)
    counts = {name: sum(shares.values()) for name, shares in counter.get_flop_counts().items()}
    return Flops(
        total=int(counter.get_total_flops()),
        by_operator={_operator_name(op): int(n) for op, n in counter.get_flop_counts().get("Global", {}).items()},
        by_module={name.partition(".")[2]: int(n) for name, n in counts.items() if "." in name},
        not_counted=dict(missed.calls),
    )


def _operator_name(packet: Any) -> str:
    return str(packet) if isinstance(packet, torch._ops.OpOverloadPacket) else getattr(packet, "__name__", str(packet))


def _is_light(func: Any) -> bool:
    if not isinstance(func, torch._ops.OpOverload):
        return False
    if func.is_view or torch.Tag.pointwise in func.tags or torch.Tag.reduction in func.tags:
        return True
    if func.namespace in _LIGHT_NAMESPACES:
        return True
    return func.namespace == "aten" and func.overloadpacket.__name__ in _LIGHT


@contextlib.contextmanager
def _no_fast_path() -> Iterator[None]:
    """Keep PyTorch's fused transformer layers apart: the counter cannot look into them."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
