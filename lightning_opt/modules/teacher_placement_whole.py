"""A teacher that lives whole on every rank, and what every other placement shares with it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from lightning_opt.errors import ConfigError
from lightning_opt.forward import Inputs, map_inputs, predict
from lightning_opt.modules.taps import FeatureTaps

Answer = tuple[Tensor, dict[str, Tensor]]

_APART = 0.1  # far above what another device or other kernels round differently


@dataclass(frozen=True, kw_only=True)
class Held:
    """How much memory a teacher's weights and buffers take.

    Attributes:
        whole_bytes: Of the whole network.
        rank_bytes: On the rank that holds most, between answers.
        peak_bytes: On the rank that holds most, while it answers; None where no answer was looked at yet.
    """

    whole_bytes: int
    rank_bytes: int
    peak_bytes: int | None = None


class Replicated:
    """The whole network, on this rank's device.

    Args:
        network: What answers.
        device: Where to; None: where it is.
        at_once: Whether it is moved now, or when it is first asked.
    """

    where = "replicated, whole on every rank that needs it"

    def __init__(self, network: nn.Module, device: torch.device | None = None, *, at_once: bool = True) -> None:
        self.network = network
        self.whole_bytes = bytes_of(network)
        self._taps: FeatureTaps | None = None
        self._to = None if at_once else device
        if device is not None and at_once:
            network.to(device)

    def watch(self, patterns: Sequence[str]) -> None:
        """Install taps on the modules whose features are read; an empty list removes them.

        Raises:
            ConfigError: A pattern matches no module.
        """
        if self._taps is not None:
            self._taps.remove()
        self._taps = FeatureTaps(self.network, patterns) if patterns else None
        if self._taps is not None:
            self._taps.install()

    def ask(self, inputs: Inputs) -> Answer:
        """Return what the network says about this rank's batch, and the features that are watched."""
        if self._to is not None:
            self.network.to(self._to)
            self._to = None
        logits = predict(self.network, inputs)
        return logits, self._taps.collect() if self._taps is not None else {}

    def held(self) -> Held:
        """Return how much memory the weights take; collective where they are spread."""
        return Held(whole_bytes=self.whole_bytes, rank_bytes=self.whole_bytes, peak_bytes=self.whole_bytes)

    def release(self) -> None:
        """Give the network back whole; collective where it is spread."""
        self.watch([])


class Parted(Replicated):
    """A network of which each rank holds a part; all ranks must ask at once.

    Args:
        network: The same on all ranks.
        device: This rank's.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        super().__init__(network)
        self.device = device
        self._found_on = next((one.device for one in network.parameters()), device)

    @torch.no_grad()
    def check(self, example: Inputs, answer: Tensor) -> None:
        """Make sure that the parts together say what the whole network said. Collective.

        Args:
            example: What it was asked.
            answer: The logits.

        Raises:
            ConfigError: They say something else.
        """
        said = self.ask(map_inputs(example, lambda value: value.to(self.device)))[0].to(answer.device)
        size = torch.linalg.vector_norm(answer.float()).clamp(min=1e-12)
        apart = float(torch.linalg.vector_norm((said - answer).float()) / size)
        if most(int(not apart <= _APART), self.device):  # NaN is apart, too
            raise ConfigError(
                f"teacher.placement: {type(self.network).__name__}, {self.where}, does not answer as it does whole "
                f"(relative difference {apart:.2g}); choose another teacher.placement"
            )

    @override
    def held(self) -> Held:
        held = most(bytes_of(self.network), self.device)
        return Held(whole_bytes=self.whole_bytes, rank_bytes=held, peak_bytes=held)


def bytes_of(network: nn.Module) -> int:
    """Return the bytes of the memory that this rank holds for a network's weights and buffers, each counted once."""
    held = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in _local(network)}
    return sum(held.values())


def _local(network: nn.Module) -> Iterator[Tensor]:
    for one in (*network.parameters(), *network.buffers()):
        yield one.to_local() if hasattr(one, "to_local") else one  # a DTensor, whose import takes long


def most(number: int, device: torch.device) -> int:
    """Return the largest of the ranks' numbers."""
    numbers = torch.tensor(number, device=device)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return int(numbers)
