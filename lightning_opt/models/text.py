"""Text classifiers in plain torch: a transformer encoder and a bag of embeddings."""

import torch
from torch import Tensor, nn

from lightning_opt.models.checks import positive, probability
from lightning_opt.models.initialization import init_transformer
from lightning_opt.models.transformer import TransformerBlock, masked_mean


class TextEncoder(nn.Module):
    """Classify or regress token ids with a pre-norm transformer and the mean over the tokens that count.

    A narrow token table with a projection behind it (Lan et al. 2019, arXiv 1909.11942, section 3.1) keeps a large
    vocabulary from outweighing the blocks. Weights: normal with standard deviation 0.02; biases 0.

    Args:
        num_outputs: Values per sample, such as classes.
        vocab_size: Number of tokens.
        max_length: Longest sequence.
        dim: Width of the residual stream.
        depth: Number of blocks.
        heads: Attention heads of each block.
        mlp_ratio: Width of each block's perceptron over `dim`.
        embedding_dim: Width of the token table; None: `dim`, without a projection.
        pad_id: Token that marks padding when `forward` gets no mask; None: all tokens count then.
        fused_qkv: One projection for queries, keys and values instead of three.
        dropout: Probability of dropping a value in embeddings, blocks and before the head.

    Raises:
        ValueError: An argument cannot work.
    """

    def __init__(
        self,
        *,
        num_outputs: int,
        vocab_size: int,
        max_length: int = 128,
        dim: int = 128,
        depth: int = 2,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        embedding_dim: int | None = None,
        pad_id: int | None = None,
        fused_qkv: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.max_length = positive("max_length", max_length)
        self.pad_id = pad_id
        table = dim if embedding_dim is None else positive("embedding_dim", embedding_dim)
        self.token_embedding = nn.Embedding(positive("vocab_size", vocab_size), table)
        self.projection = None if embedding_dim is None else nn.Linear(table, dim, bias=False)
        self.position_embedding = nn.Embedding(max_length, dim)
        self.embedding_norm = nn.LayerNorm(dim)
        self.embedding_dropout = nn.Dropout(probability("dropout", dropout))
        hidden = int(dim * mlp_ratio)
        self.blocks = nn.ModuleList(
            TransformerBlock(dim, heads=heads, hidden=hidden, fused=fused_qkv, dropout=dropout)
            for _ in range(positive("depth", depth))
        )
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(dim, positive("num_outputs", num_outputs))
        init_transformer(self)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Map token ids to `(B, num_outputs)`.

        Args:
            input_ids: `(B, T)` token ids.
            attention_mask: `(B, T)`, 1 for tokens that count, 0 for padding; None: see `pad_id`.

        Raises:
            ValueError: The sequence is longer than `max_length`.
        """
        length = input_ids.shape[1]
        if length > self.max_length:
            raise ValueError(f"a text of {length} tokens is longer than max_length={self.max_length}")
        mask = _mask(input_ids, attention_mask, self.pad_id)
        x = self.token_embedding(input_ids)
        if self.projection is not None:
            x = self.projection(x)
        positions = torch.arange(length, device=x.device)
        x = self.embedding_dropout(self.embedding_norm(x + self.position_embedding(positions)))
        for block in self.blocks:
            x = block(x, mask[:, None, None, :])
        return self.head(self.dropout(masked_mean(self.norm(x), mask)))


class BagOfEmbeddings(nn.Module):
    """Classify or regress token ids by the mean of their embeddings (Joulin et al. 2016, arXiv 1607.01759).

    Embeddings: normal with standard deviation 0.1; linear layers: torch's own.

    Args:
        num_outputs: Values per sample, such as classes.
        vocab_size: Number of tokens.
        dim: Width of the embeddings.
        hidden: Width of a hidden layer behind the mean; None: none.
        pad_id: Token that marks padding when `forward` gets no mask; None: all tokens count then.
        dropout: Probability of dropping a value before the head.

    Raises:
        ValueError: An argument cannot work.
    """

    def __init__(
        self,
        *,
        num_outputs: int,
        vocab_size: int,
        dim: int = 64,
        hidden: int | None = None,
        pad_id: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.pad_id = pad_id
        self.embedding = nn.Embedding(positive("vocab_size", vocab_size), positive("dim", dim))
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.hidden = None if hidden is None else nn.Linear(dim, positive("hidden", hidden))
        self.activation = nn.ReLU()
        self.dropout = nn.Dropout(probability("dropout", dropout))
        self.head = nn.Linear(dim if hidden is None else hidden, positive("num_outputs", num_outputs))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Map `(B, T)` token ids, with a `(B, T)` mask of 1 for tokens that count, to `(B, num_outputs)`."""
        x = masked_mean(self.embedding(input_ids), _mask(input_ids, attention_mask, self.pad_id))
        if self.hidden is not None:
            x = self.activation(self.hidden(x))
        return self.head(self.dropout(x))


def _mask(input_ids: Tensor, attention_mask: Tensor | None, pad_id: int | None) -> Tensor:
    if attention_mask is not None:
        return attention_mask.to(torch.bool)
    return torch.ones_like(input_ids, dtype=torch.bool) if pad_id is None else input_ids != pad_id
