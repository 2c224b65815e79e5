"""Training on what a language model says itself: samples of the teacher or of the student.

Everything drawn here comes from a generator that a seed and a step fix, so that a resumed run draws the same.
"""

import random
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Predict: TypeAlias = Callable[[Tensor], Tensor]

IGNORED = -100


@torch.no_grad()
def sample_continuations(
    predict_fn: Predict,
    prompt_ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    context_length: int | None = None,
    eos_id: int | None = None,
    pad_id: int = 0,
) -> tuple[Tensor, Tensor]:
    """Let a causal language model go on from each prompt, token by token.

    Args:
        predict_fn: Maps `(B, T)` ids to `(B, T, V)` logits.
        prompt_ids: `(B, P)` ids, at least one and without padding.
        max_new_tokens: How many tokens N are added, at least 1.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Draw among that many of the likeliest tokens. None: among all.
        generator: Draws the tokens; on the device of the ids. None: torch's global one.
        context_length: How many of the last tokens the model sees. None: all.
        eos_id: A sample ends after this token. None: never.
        pad_id: Fills up a sample that has ended.

    Returns:
        `(B, P + N)` ids, prompts first, and a bool mask of that shape, True where a token was drawn.

    Raises:
        ValueError: A number is out of range, or a prompt is empty.
    """
    _check_sampling(prompt_ids, max_new_tokens, temperature, top_k, context_length)
    tokens = torch.full(
        (len(prompt_ids), prompt_ids.shape[1] + max_new_tokens), pad_id, dtype=torch.long, device=prompt_ids.device
    )
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    tokens[:, : prompt_ids.shape[1]] = prompt_ids
    running = torch.ones(len(prompt_ids), dtype=torch.bool, device=prompt_ids.device)
    for position in range(prompt_ids.shape[1], tokens.shape[1]):
        begin = 0 if context_length is None else max(position - context_length, 0)
        logits = predict_fn(tokens[:, begin:position])[:, -1].float()
        drawn = _draw(logits, temperature=temperature, top_k=top_k, generator=generator)
        tokens[:, position] = torch.where(running, drawn, pad_id)
        mask[:, position] = running
        if eos_id is not None:
            running = running & (drawn != eos_id)
            if not running.any():
                break
    return tokens, mask


def _draw(logits: Tensor, *, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """Draw one of V classes for each of `(B, V)` logits."""
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    if top_k is not None and top_k < logits.shape[-1]:
        # By place and not by value: equal logits must not let more than top_k through.
        likeliest = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, likeliest.indices, likeliest.values)
    return torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator).squeeze(-1)


def _check_sampling(
    prompt_ids: Tensor, max_new_tokens: int, temperature: float, top_k: int | None, context_length: int | None
) -> None:
    if prompt_ids.ndim != 2 or prompt_ids.shape[1] < 1:
        raise ValueError(f"prompt_ids must be (B, P) with P at least 1, not {tuple(prompt_ids.shape)}")
    if not temperature >= 0.0:
        raise ValueError(f"temperature must be at least 0, not {temperature}")
    counts = {"max_new_tokens": max_new_tokens, "top_k": top_k, "context_length": context_length}
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, not {count}")


class OnPolicy:
    """Replace some batches by prompts from the data and what a model makes of them.

    With the teacher's samples it is sequence-level distillation (Kim, Rush, 2016, arXiv 1606.07947, section 3.2, here
    by sampling instead of beam search); with the student's it is the on-policy part of GKD (Agarwal and others, 2024,
    arXiv 2306.13649, algorithm 1), where `fraction` is lambda. Only drawn tokens keep a label, so losses and metrics
    look at nothing else. A student must not be taught its own samples as if they were right: see `labels_are_true`.

    Args:
        fraction: Share of the batches that are replaced, in [0, 1].
        source: Who writes: "student" or "teacher".
        prompt_length: How many tokens of each sample are kept, at least 1.
        max_new_tokens: How many are written. None: as many as keep the batch's shape, (B, T).
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Draw among that many of the likeliest tokens. None: among all.
        context_length: How many of the last tokens a model sees. None: all.
        eos_id: A sample ends after this token. None: never.
        pad_id: Fills up a sample that has ended.

    Raises:
        ValueError: A value is out of range.
    """

    def __init__(
        self,
        *,
        fraction: float,
        source: Literal["student", "teacher"] = "student",
        prompt_length: int = 16,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        context_length: int | None = None,
        eos_id: int | None = None,
        pad_id: int = 0,
    ) -> None:
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"fraction must be in [0, 1], not {fraction}")
        if source not in ("student", "teacher"):
            raise ValueError(f"source must be 'student' or 'teacher', not {source!r}")
        if prompt_length < 1:
            raise ValueError(f"prompt_length must be at least 1, not {prompt_length}")
        new_tokens = 1 if max_new_tokens is None else max_new_tokens
        _check_sampling(torch.zeros(1, 1), new_tokens, temperature, top_k, context_length)
        self.fraction = fraction
        self.source = source
        self.prompt_length = prompt_length
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_k = top_k
        self.context_length = context_length
        self.eos_id = eos_id
        self.pad_id = pad_id

    @property
    def labels_are_true(self) -> bool:
        """Whether a task's loss may use the labels of a replaced batch: the teacher's samples yes, the student's no."""
        return self.source == "teacher"

    def replaces(self, *, step: int, seed: int) -> bool:
        """Return whether the batch of this step is replaced: the same answer on every rank and after a resume."""
        return random.Random(f"replace/{seed}/{step}").random() < self.fraction

    def mix(
        self,
        inputs: Tensor | Mapping[str, Tensor],
        labels: Tensor,
        student_predict: Predict,
        teacher_predict: Predict,
        *,
        step: int,
        seed: int,
        rank: int = 0,
    ) -> tuple[Tensor | Mapping[str, Tensor], Tensor]:
        """Return the batch of one step: as it is, or prompts and samples.

        Args:
            inputs: `(B, T)` ids, or a dict of `input_ids` and perhaps `attention_mask`.
            labels: `(B, T)` next tokens, already shifted; -100 where nothing counts.
            student_predict: Maps `(B, T)` ids to `(B, T, V)` logits; best in eval mode, for dropout would be drawn too.
            teacher_predict: The same for the teacher.
            step: Number of the training step.
            seed: Seed of the run, the same on every rank: whether a batch is replaced must not differ between them.
            rank: Ranks write different samples.

        Raises:
            ValueError: The prompt is longer than the batch, or the batch has an entry that samples cannot have.
        """
        if not self.replaces(step=step, seed=seed):
            return inputs, labels
        ids, prompts_are_whole = self._prompts(inputs)
        tokens, drawn = sample_continuations(
            student_predict if self.source == "student" else teacher_predict,
            ids[:, : self.prompt_length],
            max_new_tokens=self.max_new_tokens or ids.shape[1] + 1 - self.prompt_length,
            temperature=self.temperature,
            top_k=self.top_k,
            generator=_generator(f"sample/{seed}/{step}" + (f"/{rank}" if rank else ""), ids.device),
            context_length=self.context_length,
            eos_id=self.eos_id,
            pad_id=self.pad_id,
        )
        counts = drawn & prompts_are_whole.unsqueeze(-1)
        new_labels = torch.where(counts[:, 1:], tokens[:, 1:], IGNORED).to(labels.dtype)
        if isinstance(inputs, Tensor):
            return tokens[:, :-1], new_labels
        new_inputs = {"input_ids": tokens[:, :-1]}
        if "attention_mask" in inputs:
            seen = drawn.clone()
            seen[:, : self.prompt_length] = inputs["attention_mask"][:, : self.prompt_length].bool()
            new_inputs["attention_mask"] = seen[:, :-1].to(inputs["attention_mask"].dtype)
        return new_inputs, new_labels

    def _prompts(self, inputs: Tensor | Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the `(B, T)` ids, and for each sample whether its prompt is free of padding."""
        mapping = {"input_ids": inputs} if isinstance(inputs, Tensor) else inputs
        if unknown := sorted(set(mapping) - {"input_ids", "attention_mask"}):
            raise ValueError(f"samples can replace input_ids and attention_mask only; the batch also has {unknown}")
        ids = mapping["input_ids"]
        if self.prompt_length > ids.shape[1]:
            raise ValueError(f"prompt_length is {self.prompt_length}; the batch has only {ids.shape[1]} tokens")
        seen = mapping.get("attention_mask", torch.ones_like(ids))[:, : self.prompt_length]
        return ids, seen.bool().all(dim=-1)


def _generator(key: str, device: torch.device) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(random.Random(key).getrandbits(63))
