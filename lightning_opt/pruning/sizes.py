"""How many bytes a state dict takes on disk, dense and in the forms that gain from zeros."""

import zlib
from collections.abc import Mapping

from torch import Tensor, nn

from lightning_opt.evaluation.parameters import state_tensors
from lightning_opt.pruning.packing import encode


def sizes_on_disk(model: nn.Module | Mapping[str, Tensor]) -> dict[str, int]:
    """Return the bytes of the files that would be written.

    Args:
        model: A model or a state dict.

    Returns:
        "dense": a plain safetensors file; "bitmask": bit-mask file with all values as they are (lossless);
        "bitmask_fp16": the same with values rounded to float16; "compressed": the lossless bit-mask file, deflated.
    """
    from safetensors.torch import save

    dense = dict(state_tensors(model)) if isinstance(model, nn.Module) else _distinct(model)
    tensors, metadata = encode(model)
    bitmask = save(tensors, metadata)
    half = save(*encode(model, dtype="fp16"))
    plain = save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in dense.items()})
    return {
        "dense": len(plain),
        "bitmask": len(bitmask),
        "bitmask_fp16": len(half),
        "compressed": len(zlib.compress(bitmask, level=6)),
    }


def _distinct(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out names that share another name's tensor."""
    entries = {(t.data_ptr() or name, t.shape, t.stride(), t.dtype): name for name, t in reversed(list(state.items()))}
    names = set(entries.values())
    return {name: tensor for name, tensor in state.items() if name in names}
