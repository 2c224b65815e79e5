"""The arms: what is done to the net after float training. All take the same number of optimizer steps."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peers
import torch
from setting import Data, Pair, fresh, train
from torch import Tensor, nn

FACTORS = (0.3, 1.0)  # of float training's learning rate, for the extra steps of all arms; the control chooses


@dataclass
class Bench:
    """One seed of one pair.

    Attributes:
        pair: The pair.
        data: Its data.
        seed: Of first weights, order and dropout.
        work: Where the float nets are kept.
        factor: Learning rate of the extra steps, as a share of float training's.
    """

    pair: Pair
    data: Data
    seed: int
    work: Path
    factor: float

    def float_net(self) -> nn.Module:
        """Return the net after float training."""
        return self._kept("float", lambda model: self._train(model, self.pair.lr, self.pair.epochs, 0))

    def control(self) -> nn.Module:
        """Return the net after the extra steps in float: what post-training arms quantize."""

        def more(model: nn.Module) -> None:
            model.load_state_dict(self.float_net().state_dict())
            self.extra(model)

        return self._kept(f"fp32_{self.factor}", more)

    def extra(self, model: nn.Module, **how: Any) -> None:
        """Train for the extra steps, with a learning rate that goes up and down again."""
        self._train(model, self.factor * self.pair.lr, self.pair.extra, self.pair.epochs, **how)

    def batches(self) -> list[Tensor]:
        """Return what is calibrated on: the same training samples for all."""
        return self.data.calibration()

    def _train(self, model: nn.Module, lr: float, epochs: int, first_epoch: int, **how: Any) -> None:
        train(model, self.data, self.pair, seed=self.seed, lr=lr, epochs=epochs, first_epoch=first_epoch, **how)

    def _kept(self, name: str, make: Callable[[nn.Module], Any]) -> nn.Module:
        model, file = fresh(self.pair, self.seed), self.work / f"{self.pair.name}_{name}_{self.seed}.pt"
        if not file.exists():
            self.work.mkdir(parents=True, exist_ok=True)
            make(model)
            torch.save(model.state_dict(), file)
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval()


Arm = Callable[[Bench], nn.Module]


def nncf_arm(bench: Bench, *, bits: int, trained: bool = False) -> nn.Module:
    """NNCF, from the control, or from the float net with the extra steps in its fake quantization."""
    model = bench.float_net() if trained else bench.control()
    model = peers.nncf(model, bench.batches(), bits=bits, text=bench.pair.text)
    if trained:
        bench.extra(model)
    return model


def modelopt_arm(bench: Bench, *, bits: int, trained: bool = False) -> nn.Module:
    """Do the same with modelopt."""
    model = peers.modelopt(bench.float_net() if trained else bench.control(), bench.batches(), bits=bits)
    if trained:
        bench.extra(model)
    return model


def torchao_arm(bench: Bench, *, bits: int, trained: bool = False) -> nn.Module:
    """Do the same with torchao: linear layers alone, activations dynamic."""
    if not trained:
        return peers.torchao_post_training(bench.control(), bits=bits)
    model = peers.torchao_prepare(bench.float_net(), bits=bits)
    bench.extra(model)
    return peers.torchao_convert(model, bits=bits)


def peers_of(pair: Pair) -> dict[str, Arm]:
    """Name the peers' arms that a pair can have: NNCF has neither 2 bits nor 4 for tables, torchao no convolutions."""
    found: dict[str, Arm] = {}
    for trained, kind in ((False, "ptq"), (True, "qat")):
        for bits in (8, 4, 2):
            if bits == 8 or (bits == 4 and not pair.text):
                found[f"nncf_{kind}_w{bits}"] = partial(nncf_arm, bits=bits, trained=trained)
            found[f"modelopt_{kind}_w{bits}"] = partial(modelopt_arm, bits=bits, trained=trained)
            if pair.name in ("mnist5k", "movie_reviews"):
                found[f"torchao_{kind}_w{bits}"] = partial(torchao_arm, bits=bits, trained=trained)
    return found


def control(bench: Bench) -> nn.Module:
    """Quantize nothing, with the extra steps."""
    return bench.control()


def before(bench: Bench) -> nn.Module:
    """Quantize nothing, without the extra steps."""
    return bench.float_net()
