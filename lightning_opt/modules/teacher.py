"""A frozen network that a student learns from."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_opt.errors import ConfigError
from lightning_opt.forward import Inputs, forward, logits_of, map_inputs
from lightning_opt.losses.base import Signals
from lightning_opt.losses.teachers import Mix, mix_probabilities
from lightning_opt.modules.taps import FeatureTaps

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Teacher:
    """Hold a network that answers and never learns.

    It is deliberately not an `nn.Module`: Lightning must not see its parameters, or they would land in the student's
    checkpoint, optimizer, gradient buckets and shards.

    Args:
        model: The trained network. It is frozen, and put in eval mode before every answer.
        preprocess: What this teacher wants done to the student's inputs first, such as its own normalisation.
        dtype: "float32", "bfloat16" or "float16" to compute in; answers are float32 in any case. None keeps the
            network as it is.
        compile: Whether to compile the network in place.
        channels_last: Whether a convolutional network holds weights and images with the channels as the last axis in
            memory, which most processors convolve faster. Answers are those of other kernels: equal from run to run,
            and to those of the other layout within rounding, not to the last bit.
        name: How messages and the report call it.

    Raises:
        ValueError: An unknown `dtype`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        preprocess: Callable[[Inputs], Inputs] | None = None,
        dtype: str | None = None,
        compile: bool = False,
        channels_last: bool = False,
        name: str = "teacher",
    ) -> None:
        if dtype is not None and dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, not {dtype!r}")
        self.model = model.requires_grad_(False).eval()
        self.preprocess = preprocess
        self.dtype = _DTYPES[dtype] if dtype is not None else None
        self.name = name
        self._taps: FeatureTaps | None = None
        self.channels_last = channels_last
        # The caller's module keeps its precision and layout.
        self.answering = self.model
        if self.dtype not in (None, torch.float32):
            self.answering = copy.deepcopy(self.model).to(self.dtype)
        if channels_last:
            copied = self.answering if self.answering is not self.model else copy.deepcopy(self.model)
            self.answering = copied.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if compile:
            self.answering.compile()

    def to(self, device: torch.device) -> "Teacher":
        """Move the network; return self."""
        self.answering.to(device)
        return self

    def watch(self, patterns: Sequence[str]) -> None:
        """Install taps on the modules whose features the losses read; an empty list removes them.

        Raises:
            ConfigError: A pattern matches no module.
        """
        if self._taps is not None:
            self._taps.remove()
        self._taps = FeatureTaps(self.answering, patterns) if patterns else None
        if self._taps is not None:
            self._taps.install()

    # Not inference_mode: its tensors cannot be saved for backward, which hints and attention maps do.
    @torch.no_grad()
    def __call__(self, inputs: Inputs) -> Signals:
        """Answer one batch in eval mode, without gradients; logits and features are float32."""
        self.answering.eval()
        if self.preprocess is not None:
            inputs = self.preprocess(inputs)
        logits = logits_of(forward(self.answering, map_inputs(inputs, self._cast))).float()
        features = self._taps.collect() if self._taps is not None else {}
        return Signals(logits=logits, features={name: value.float() for name, value in features.items()})

    def _cast(self, value: Any) -> Any:
        if self.dtype is not None and torch.is_floating_point(value):
            value = value.to(self.dtype)
        return value.contiguous(memory_format=torch.channels_last) if self.channels_last and value.dim() == 4 else value

    def vocabulary(self) -> int | None:
        """Return how many tokens the network knows: rows of its largest embedding; None without one."""
        rows = [module.num_embeddings for module in self.model.modules() if isinstance(module, nn.Embedding)]
        return max(rows, default=None)

    def check_vocabulary(self, vocab_size: int | None) -> None:
        """Refuse data with tokens that the network does not know.

        Args:
            vocab_size: How many tokens the data may hold; None where it has none.

        Raises:
            ConfigError: It has more than the network knows.
        """
        known = self.vocabulary()
        if vocab_size is not None and known is not None and known < vocab_size and self.preprocess is None:
            raise ConfigError(
                f"teacher: {self.name} knows {known} tokens and the data has {vocab_size}; both need the same tokenizer"
            )


class Ensemble(nn.Module):
    """Answer as several networks together do.

    Args:
        members: At least two networks whose logits have one shape.
        mix: What is averaged; probabilities of classes unless given, see `losses.teachers`.
    """

    def __init__(self, members: Sequence[nn.Module], *, mix: Mix = mix_probabilities) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.mix = mix

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        answers = torch.stack([logits_of(member(*args, **kwargs)).float() for member in self.members])
        shares = answers.new_full((len(answers), *[1] * (answers.dim() - 1)), 1.0 / len(answers))
        return self.mix(answers, shares)
