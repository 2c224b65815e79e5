"""A recurrent classifier for signals and for token ids."""

import torch
from torch import Tensor, nn

from lightning_opt.models.checks import one_of, positive, probability
from lightning_opt.models.transformer import masked_mean


class GRUClassifier(nn.Module):
    """Classify or regress sequences with gated recurrent units (Cho et al. 2014, arXiv 1406.1078).

    Recurrent and linear weights keep torch's own initialisation; embeddings are normal with standard deviation 0.02.

    Args:
        num_outputs: Values per sample, such as classes.
        in_features: Values at each step of a signal; not used with `vocab_size`.
        vocab_size: Number of tokens, for token ids; None: signals.
        embedding_dim: Width of the token embedding.
        hidden: Width of the recurrent state.
        num_layers: Recurrent layers.
        bidirectional: Read the sequence from both ends as well. Not for padded sequences, since the backward reading
            would begin in the padding.
        pooling: "last" reads the state after the last step that counts, "mean" the mean over the steps that count.
        dropout: Probability of dropping a value between layers and before the head.

    Raises:
        ValueError: An argument cannot work.
    """

    def __init__(
        self,
        *,
        num_outputs: int,
        in_features: int = 1,
        vocab_size: int | None = None,
        embedding_dim: int = 64,
        hidden: int = 64,
        num_layers: int = 1,
        bidirectional: bool = False,
        pooling: str = "last",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        one_of("pooling", pooling, ("last", "mean"))
        if bidirectional and pooling == "last":
            raise ValueError("pooling must be 'mean' with bidirectional=True, got 'last'")
        self.pooling = pooling
        self.bidirectional = bidirectional
        self.embedding = None
        width = positive("in_features", in_features)
        if vocab_size is not None:
            width = positive("embedding_dim", embedding_dim)
            self.embedding = nn.Embedding(positive("vocab_size", vocab_size), width)
            nn.init.normal_(self.embedding.weight, std=0.02)
        self.gru = nn.GRU(
            width,
            positive("hidden", hidden),
            num_layers=positive("num_layers", num_layers),
            dropout=probability("dropout", dropout) if num_layers > 1 else 0.0,
            bidirectional=bidirectional,
            batch_first=True,
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden * (1 + bidirectional), positive("num_outputs", num_outputs))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Map a batch of sequences to `(B, num_outputs)`.

        Args:
            input_ids: `(B, L)` token ids with `vocab_size`; else a signal `(B, L)`, `(B, 1, L)` where each step is one
                value, or `(B, L, in_features)`.
            attention_mask: `(B, L)`, 1 for steps that count, 0 for padding behind them; None: all count.

        Raises:
            ValueError: A mask came to a bidirectional model.
        """
        if self.bidirectional and attention_mask is not None:
            raise ValueError(
                "attention_mask cannot be honoured with bidirectional=True; build it with bidirectional=False"
            )
        states, _ = self.gru(self._steps(input_ids))
        return self.head(self.dropout(self._pool(states, attention_mask)))

    def _steps(self, inputs: Tensor) -> Tensor:
        if self.embedding is not None:
            return self.embedding(inputs)
        if inputs.dim() == 2:
            return inputs.unsqueeze(-1)
        return inputs.transpose(1, 2) if self.gru.input_size == 1 and inputs.shape[1] == 1 else inputs

    def _pool(self, states: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return states[:, -1] if self.pooling == "last" else states.mean(1)
        if self.pooling == "mean":
            return masked_mean(states, mask)
        last = (mask.to(torch.int64).sum(1) - 1).clamp(min=0)
        return states.gather(1, last[:, None, None].expand(-1, 1, states.shape[-1])).squeeze(1)
