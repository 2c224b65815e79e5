"""Attention and pre-norm blocks that the vision, text and language models of this room share."""

from torch import Tensor, nn
from torch.nn import functional

from lightning_opt.models.checks import divides, positive, probability


class SelfAttention(nn.Module):
    """Mix positions by scaled dot-product attention (Vaswani et al. 2017, arXiv 1706.03762, equation 1).

    The number of heads is read from the projections' width in `forward`, so that whole heads can be cut from the
    weights without touching an attribute; the scale stays what it was at construction.

    Args:
        dim: Width of the input and of the output.
        heads: Number of heads; `dim / heads` is the width of each.
        fused: One projection `qkv` for queries, keys and values instead of three (`query`, `key`, `value`).
        causal: Position t sees positions up to t only.
        dropout: Probability of dropping an attention weight.

    Raises:
        ValueError: `dim` is not a multiple of `heads`.
    """

    def __init__(
        self, dim: int, *, heads: int, fused: bool = False, causal: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        divides("dim", positive("dim", dim), "heads", positive("heads", heads))
        self.head_dim = dim // heads
        self.scale = self.head_dim**-0.5
        self.causal = causal
        self.dropout = probability("dropout", dropout)
        self.fused = fused
        if fused:
            self.qkv = nn.Linear(dim, 3 * dim)
        else:
            self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map `(B, T, dim)` to `(B, T, dim)`.

        Args:
            x: The positions.
            mask: Bool, broadcastable to `(B, heads, T, T)`; False positions are not looked at. Not with `causal`.
        """
        query, key, value = self._heads(x)
        mixed = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.causal,
            scale=self.scale,
        )
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.fused:
            return self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        projected = (self.query(x), self.key(x), self.value(x))
        return tuple(part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in projected)


class TransformerBlock(nn.Module):
    """Add attention, then a two-layer perceptron, each behind a layer norm (pre-norm).

    Args:
        dim: Width of the residual stream.
        heads: Attention heads.
        hidden: Width of the perceptron.
        fused: See `SelfAttention`.
        causal: See `SelfAttention`.
        dropout: Probability of dropping an attention weight or a value before it is added.
    """

    def __init__(
        self, dim: int, *, heads: int, hidden: int, fused: bool = False, causal: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, heads=heads, fused=fused, causal=causal, dropout=dropout)
        self.dropout1 = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, positive("hidden", hidden))
        self.activation = nn.GELU()
        self.down = nn.Linear(hidden, dim)
        self.dropout2 = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map `(B, T, dim)` to `(B, T, dim)`; `mask` as in `SelfAttention`."""
        x = x + self.dropout1(self.attention(self.norm1(x), mask))
        return x + self.dropout2(self.down(self.activation(self.up(self.norm2(x)))))


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Average the positions that count.

    Args:
        x: `(B, T, D)` positions.
        mask: `(B, T)`, bool or 0/1; a row without any position gives zeros.

    Returns:
        `(B, D)`.
    """
    weight = mask.unsqueeze(-1).to(x.dtype)
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1.0)
