"""Peak memory of one forward pass.

On CUDA the allocator is asked. On a CPU every tensor that an operator returns is followed from birth to death, and the
largest sum of bytes alive at once is taken: parameters and buffers, inputs, activations. Scratch memory inside a
kernel and the process itself are not part of it; the process' resident size is given beside it as a cross-check.
"""

import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_opt.forward import Inputs, forward


@dataclass(frozen=True, kw_only=True)
class PeakMemory:
    """The most bytes that a forward pass held at once.

    Attributes:
        bytes: Parameters and buffers, inputs and activations alive together.
        resident_bytes: The part that is there before the pass: parameters, buffers and inputs.
        method: How it was found.
        process_bytes: Resident size of the whole process after the pass; None where the system does not say.
    """

    bytes: int
    resident_bytes: int
    method: str
    process_bytes: int | None


class _LiveTensors(TorchDispatchMode):
    """Follow the storages that operators return, from birth to death."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known = known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(answer):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                self._follow(leaf.untyped_storage())
        return answer

    def _follow(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if address in self._known or size == 0:
            return
        self._known.add(address)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._forget, address, size).atexit = False

    def _forget(self, address: int, size: int) -> None:
        self.live_bytes -= size
        self._known.discard(address)


def peak_memory(model: nn.Module, inputs: Inputs) -> PeakMemory:
    """Run one forward pass of `model`, in its present mode, and return the most bytes it held at once.

    Args:
        model: The model, on the device that is to be measured.
        inputs: One batch on the same device.
    """
    leaves = list(tree_leaves(dict(inputs) if isinstance(inputs, Mapping) else inputs))
    resident = _storages([*model.parameters(), *model.buffers(), *leaves])
    resident_bytes = sum(resident.values())
    device = next((leaf.device for leaf in leaves), torch.device("cpu"))
    if device.type == "cuda":
        activations, method = _cuda_activations(model, inputs, device), "CUDA allocator peak"
    else:
        activations, method = _followed_activations(model, inputs, set(resident)), "bytes of tensors alive at once"
    return PeakMemory(
        bytes=resident_bytes + activations,
        resident_bytes=resident_bytes,
        method=method,
        process_bytes=process_bytes(),
    )


def process_bytes() -> int | None:
    """Return the resident size of this process in bytes; None where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _followed_activations(model: nn.Module, inputs: Inputs, known: set[int]) -> int:
    # Not inference_mode: under no_grad composite operators arrive here in parts, so that their inner tensors count.
    with torch.no_grad(), _LiveTensors(known) as live:
        forward(model, inputs)
    return live.peak_bytes


def _cuda_activations(model: nn.Module, inputs: Inputs, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    with torch.inference_mode():
        forward(model, inputs)
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device) - before)


def _storages(tensors: list[Tensor]) -> dict[int, int]:
    """Map each distinct storage's address to its bytes."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
