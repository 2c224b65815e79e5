"""What this machine's processor can do with integers of 8 bits."""

import functools
import platform
from pathlib import Path

_EXACT_FLAGS = frozenset(("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"))


@functools.cache
def multiplies_int8_exactly() -> bool:
    """Tell whether products of 8-bit integers are summed in 32 bits by the processor.

    x86 processors without VNNI sum pairs of products in 16 bits, where `255 * 127 * 2` does not fit: the sum stays at
    32767. Engines then give wrong answers for layers with large weights of 8 bits, unless they are told to use slower
    instructions. Weights of 7 bits always fit.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "i686"):
        return True
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return not _EXACT_FLAGS.isdisjoint(flags.split())
