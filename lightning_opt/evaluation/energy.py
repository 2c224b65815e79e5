"""Energy of a timed region, read from a counter in the hardware: NVML on NVIDIA GPUs, RAPL on Intel and AMD CPUs.

Where there is no counter (most virtual machines and containers), the answer is a reason, never an estimate.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch

RAPL_ROOT = Path("/sys/class/powercap")


class EnergyMeter(Protocol):
    """A counter of joules.

    Attributes:
        source: What the counter covers, for the report.
    """

    source: str

    def start(self) -> None:
        """Begin a region."""

    def joules(self) -> float:
        """Return the energy since `start`."""


class EnergyUnavailableError(RuntimeError):
    """There is no counter that this process can read; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Energy of a region in which one callable ran again and again.

    Attributes:
        joules: Energy of the region, idle draw included.
        seconds: Length of the region.
        calls: Calls in it.
        idle_watts: Draw of the same counter while nothing ran.
        source: What the counter covers.
    """

    joules: float
    seconds: float
    calls: int
    idle_watts: float
    source: str

    def per_1k(self, *, samples_per_call: int) -> float:
        """Return joules per 1,000 samples, idle draw included."""
        return self.joules / (self.calls * samples_per_call) * 1e3

    def per_1k_above_idle(self, *, samples_per_call: int) -> float:
        """Return joules per 1,000 samples beyond what the idle machine draws in the same time."""
        return (self.joules - self.idle_watts * self.seconds) / (self.calls * samples_per_call) * 1e3


class RaplMeter:
    """Reads the CPU packages' counters under `/sys/class/powercap` (whole sockets, other processes included).

    Raises:
        EnergyUnavailableError: There is no counter, or it is readable by root only.
    """

    def __init__(self, root: Path = RAPL_ROOT) -> None:
        self._zones = sorted(path for path in root.glob("intel-rapl:*") if path.name.count(":") == 1)
        if not self._zones:
            raise EnergyUnavailableError(f"no RAPL counter under {root} (usual in virtual machines and containers)")
        self.source = f"RAPL, {len(self._zones)} CPU package(s), whole sockets"
        self._ranges = [self._read(zone / "max_energy_range_uj") for zone in self._zones]
        self.start()

    def start(self) -> None:
        self._first = [self._read(zone / "energy_uj") for zone in self._zones]

    def joules(self) -> float:
        """Return the energy since `start`; a counter that ran over its range once is put right."""
        total = 0
        for zone, first, wrap in zip(self._zones, self._first, self._ranges, strict=True):
            now = self._read(zone / "energy_uj")
            total += now - first if now >= first else now - first + wrap
        return total * 1e-6

    @staticmethod
    def _read(path: Path) -> int:
        try:
            return int(path.read_text())
        except (OSError, ValueError) as error:
            raise EnergyUnavailableError(f"the RAPL counter {path} cannot be read: {error}") from error


class NvmlMeter:
    """Reads an NVIDIA GPU's total energy counter (the whole card) through NVML.

    Raises:
        EnergyUnavailableError: The package is missing, or the card has no such counter.
    """

    def __init__(self, device: torch.device) -> None:
        if find_spec("pynvml") is None:
            raise EnergyUnavailableError("nvidia-ml-py is not installed: pip install 'lightning_opt[energy]'")
        import pynvml

        self._nvml: Any = pynvml
        self.source = "NVML total energy counter, whole card"
        try:
            pynvml.nvmlInit()
            # By UUID: CUDA's order and NVML's differ when CUDA_VISIBLE_DEVICES hides cards.
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self.start()
        except pynvml.NVMLError as error:
            raise EnergyUnavailableError(f"NVML has no energy counter for {device}: {error}") from error

    def start(self) -> None:
        self._first = self._millijoules()

    def joules(self) -> float:
        return (self._millijoules() - self._first) * 1e-3

    def _millijoules(self) -> int:
        return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))


def energy_meter(device: torch.device | str) -> EnergyMeter:
    """Return the counter that covers `device`.

    Raises:
        EnergyUnavailableError: There is none; the message says why.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return NvmlMeter(device)
    if device.type == "cpu":
        return RaplMeter()
    raise EnergyUnavailableError(f"no energy counter is known for {device.type}")


def measure_energy(
    call: Callable[[], Any],
    *,
    meter: EnergyMeter,
    synchronize: Callable[[], None] = lambda: None,
    min_seconds: float = 2.0,
    idle_seconds: float = 1.0,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Energy:
    """Run `call` for at least `min_seconds` between two readings of `meter`, after an idle region.

    Counters are refreshed some ten times a second, so regions well below a second mean nothing.
    """
    synchronize()
    meter.start()
    idle_start = clock()
    sleep(idle_seconds)
    idle_joules, idle_length = meter.joules(), clock() - idle_start
    calls = 0
    meter.start()
    start = clock()
    with torch.inference_mode():
        while calls == 0 or clock() - start < min_seconds:
            call()
            calls += 1
            synchronize()
    joules, seconds = meter.joules(), clock() - start
    idle_watts = idle_joules / idle_length if idle_length > 0 else 0.0
    return Energy(joules=joules, seconds=seconds, calls=calls, idle_watts=idle_watts, source=meter.source)
