"""A small causal language model in plain torch."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_opt.models.checks import positive, probability
from lightning_opt.models.initialization import init_transformer
from lightning_opt.models.transformer import TransformerBlock


class GPT(nn.Module):
    """Predict the next token at each position (Radford et al. 2019, the GPT-2 report, section 2.3).

    Weights of linear layers and embeddings: normal with standard deviation 0.02, those that write to the residual
    stream divided by `sqrt(2 * depth)`, as in GPT-2; biases 0.

    Args:
        vocab_size: Number of tokens.
        context_length: Longest sequence.
        dim: Width of the residual stream.
        depth: Number of blocks.
        heads: Attention heads of each block.
        mlp_ratio: Width of each block's perceptron over `dim`.
        fused_qkv: One projection for queries, keys and values instead of three.
        tied_embeddings: Read the logits with the token embedding itself, which saves `vocab_size * dim` weights; the
            model then has no `head` and its state holds the table once.
        dropout: Probability of dropping a value in embeddings and blocks.

    Raises:
        ValueError: An argument cannot work.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        context_length: int = 128,
        dim: int = 128,
        depth: int = 4,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        fused_qkv: bool = False,
        tied_embeddings: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.context_length = positive("context_length", context_length)
        self.token_embedding = nn.Embedding(positive("vocab_size", vocab_size), dim)
        self.position_embedding = nn.Embedding(context_length, dim)
        self.dropout = nn.Dropout(probability("dropout", dropout))
        hidden = int(dim * mlp_ratio)
        self.blocks = nn.ModuleList(
            TransformerBlock(dim, heads=heads, hidden=hidden, fused=fused_qkv, causal=True, dropout=dropout)
            for _ in range(positive("depth", depth))
        )
        self.norm = nn.LayerNorm(dim)
        self.head = None if tied_embeddings else nn.Linear(dim, vocab_size, bias=False)
        init_transformer(self)
        for name, parameter in self.blocks.named_parameters():
            if name.endswith(("attention.out.weight", "down.weight")):
                nn.init.normal_(parameter, std=0.02 / (2 * depth) ** 0.5)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Map `(B, T)` token ids to `(B, T, vocab_size)` logits; those at t say what follows position t.

        Raises:
            ValueError: The sequence is longer than `context_length`.
        """
        length = input_ids.shape[1]
        if length > self.context_length:
            raise ValueError(f"a sequence of {length} tokens is longer than context_length={self.context_length}")
        positions = torch.arange(length, device=input_ids.device)
        x = self.dropout(self.token_embedding(input_ids) + self.position_embedding(positions))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return functional.linear(x, self.token_embedding.weight) if self.head is None else self.head(x)
