"""A frozen network that a student learns from."""

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_opt.errors import ConfigError
from lightning_opt.forward import Inputs, batch_size_of, logits_of, map_inputs, predict
from lightning_opt.losses.base import Signals
from lightning_opt.losses.teachers import Mix, mix_probabilities
from lightning_opt.modules.teacher_placement import PLACEMENTS, Held, Replicated, check_placement, place
from lightning_opt.modules.teacher_placement_int8 import as_int8, how
from lightning_opt.modules.teacher_placement_whole import Parted

log = logging.getLogger("lightning_opt")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_INT8 = "int8"
_SAMPLES_COMPARED = 32
_SAMPLES_REMEMBERED = 2


class Teacher:
    """Hold a network that answers and never learns.

    It is deliberately not an `nn.Module`: Lightning must not see its parameters, or they would land in the student's
    checkpoint, optimizer, gradient buckets and shards.

    Args:
        model: The trained network. It is frozen, and put in eval mode before every answer.
        preprocess: What this teacher wants done to the student's inputs first, such as its own normalisation.
        dtype: "float32", "bfloat16" or "float16" to compute in, or "int8" to hold weights in; answers are float32 in
            any case. None keeps the network as it is.
        compile: Whether to compile the network in place.
        channels_last: Whether a convolutional network holds weights and images with the channels as the last axis in
            memory, which most processors convolve faster. Answers are those of other kernels: equal from run to run,
            and to those of the other layout within rounding, not to the last bit.
        placement: Where it lives while a student is trained: "replicated" (whole on every rank), "sharded" (a slice of
            every weight on each rank, by an FSDP2 of its own), "tensor_parallel" (a part of every layer) or "pipeline"
            (some layers). Nothing of it is in the student's wrapper, optimizer or checkpoint.
        ranks: Over how many neighbouring ranks one copy is spread; None: all.
        name: How messages and the report call it.

    Raises:
        ValueError: An unknown `dtype` or `placement`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        preprocess: Callable[[Inputs], Inputs] | None = None,
        dtype: str | None = None,
        compile: bool = False,
        channels_last: bool = False,
        placement: str | None = None,
        ranks: int | None = None,
        name: str = "teacher",
    ) -> None:
        if dtype is not None and dtype not in (*_DTYPES, _INT8):
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, {_INT8}, not {dtype!r}")
        if placement is not None and placement not in PLACEMENTS:
            raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}, not {placement!r}")
        self.model = model.requires_grad_(False).eval()
        self.preprocess = preprocess
        # As a part of the key of stored answers; inputs are cast to it where it is one of torch's.
        self.dtype: torch.dtype | str | None = _DTYPES.get(dtype, dtype) if dtype is not None else None
        self.placement = placement or "replicated"
        self.ranks = ranks
        self.name = name
        self.channels_last = channels_last
        # The caller's module keeps its precision and layout.
        self.answering = self.model
        if dtype == _INT8:
            self.answering = as_int8(self.model)
        elif isinstance(self.dtype, torch.dtype) and self.dtype != torch.float32:
            self.answering = copy.deepcopy(self.model).to(self.dtype)
        if channels_last:
            copied = self.answering if self.answering is not self.model else copy.deepcopy(self.model)
            self.answering = copied.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.compile = compile
        if compile:
            self.answering.compile()
        self._home = Replicated(self.answering)
        # Of a network that will be spread: what it was asked first, and what it said while it was whole.
        self._example: Inputs | None = None
        self._answer: Tensor | None = None
        self._is_looked_at = False

    def to(self, device: torch.device) -> "Teacher":
        """Move the network; return self."""
        self.answering.to(device)
        return self

    def place(self, strategy: Any) -> "Teacher":
        """Put the network where it lives while a student is trained; return self. Taps that were there are gone.

        Collective unless it is replicated. Until `release` a network that is spread is not whole on any rank.

        Args:
            strategy: The trainer's, set up.

        Raises:
            ConfigError: It cannot live there.
        """
        self.release()
        self.check(strategy, getattr(strategy, "world_size", 1))
        self._home = place(self.answering, self.placement, strategy, ranks=self.ranks, example=self._example)
        if isinstance(self._home, Parted) and self._example is not None and self._answer is not None:
            self._home.check(self._example, self._answer)
        self._is_looked_at = False
        held = self._home.held()
        log.info(
            "%s: %s; %s of its %s bytes on the rank that holds most",
            self.name,
            self._home.where,
            f"{held.rank_bytes:,}",
            f"{held.whole_bytes:,}",
        )
        return self

    def check(self, strategy: Any, processes: int) -> None:
        """Refuse a place that it cannot take under a strategy, before anything starts.

        Raises:
            ConfigError: Naming the keys.
        """
        check_placement(
            self.placement,
            strategy,
            processes,
            ranks=self.ranks,
            dtype=self.dtype if isinstance(self.dtype, str) else None,
            compile=self.compile,
            channels_last=self.channels_last,
        )
        if self.placement == "tensor_parallel" and any(True for _ in self.answering.parameters()):
            from lightning_opt.modules.teacher_placement_tensor import plan_for

            plan_for(self.answering, self.ranks or processes)

    def release(self) -> None:
        """Take the network back from where `place` put it: whole again, without taps. Collective if it was spread."""
        self._home.release()
        self._home = Replicated(self.answering)

    def held(self) -> Held:
        """Return how much memory the weights take, on the rank that holds most. Collective if they are spread."""
        return self._home.held()

    @property
    def asks_together(self) -> bool:
        """Whether all ranks must ask at the same time, each as often as the others."""
        return self.placement != "replicated"

    def watch(self, patterns: Sequence[str]) -> None:
        """Install taps on the modules whose features the losses read; an empty list removes them.

        Raises:
            ConfigError: A pattern matches no module.
        """
        self._home.watch(patterns)

    # Not inference_mode: its tensors cannot be saved for backward, which hints and attention maps do.
    @torch.no_grad()
    def __call__(self, inputs: Inputs) -> Signals:
        """Answer one batch in eval mode, without gradients; logits and features are float32."""
        self.answering.eval()
        if self.preprocess is not None:
            inputs = self.preprocess(inputs)
        cast = map_inputs(inputs, self._cast)
        logits, features = self._home.ask(cast)
        if self._example is None and self.asks_together:
            self._example = map_inputs(cast, lambda value: value[:_SAMPLES_REMEMBERED].clone())
            self._answer = logits[:_SAMPLES_REMEMBERED].clone()
        if not self._is_looked_at and (isinstance(self._home, Parted) or batch_size_of(inputs) > _SAMPLES_REMEMBERED):
            self._look(inputs, logits)
        return Signals(logits=logits.float(), features={name: value.float() for name, value in features.items()})

    def _look(self, inputs: Inputs, logits: Tensor) -> None:
        """Say once what is known only when a question was answered. Every rank comes through here."""
        self._is_looked_at = True
        if isinstance(self._home, Parted):
            peak = self._home.held().peak_bytes
            log.info("%s: at most %s bytes of weights on a rank while it answers", self.name, f"{peak:,}")
        if self.dtype == _INT8:
            few = map_inputs(inputs, lambda value: value[:_SAMPLES_COMPARED].cpu())
            exact = predict(self.model, few).float()
            said = logits[:_SAMPLES_COMPARED].float().cpu()
            log.info(
                "%s: %s; on %d samples it says what the float teacher does in %.1f %% of the answers, logits differ by "
                "%.2g on average",
                self.name,
                how(self.answering),
                len(said),
                100 * (said.argmax(-1) == exact.argmax(-1)).float().mean(),
                (said - exact).abs().mean(),
            )

    def _cast(self, value: Any) -> Any:
        if isinstance(self.dtype, torch.dtype) and torch.is_floating_point(value):
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
