"""A vision transformer for images of any size."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_opt.models.checks import divides, one_of, positive, positives, probability
from lightning_opt.models.initialization import init_transformer
from lightning_opt.models.transformer import TransformerBlock


class ViT(nn.Module):
    """Classify images cut into patches with a transformer (Dosovitskiy et al. 2020, arXiv 2010.11929, section 3.1).

    Linear weights, the class token and learned positions: normal with standard deviation 0.02; biases 0; the patch
    convolution: torch's own.

    Args:
        num_outputs: Values per sample, such as classes.
        image_size: Height and width in pixels, or one number for both; multiples of `patch_size`.
        patch_size: Side of a square patch in pixels.
        in_channels: Channels of the image.
        dim: Width of the residual stream.
        depth: Number of blocks.
        heads: Attention heads of each block.
        mlp_ratio: Width of each block's perceptron over `dim`.
        pooling: "cls" reads an extra token, "mean" the mean over all patches.
        fused_qkv: One projection for queries, keys and values instead of three.
        dropout: Probability of dropping a value in embeddings and blocks.

    Raises:
        ValueError: An argument cannot work.
    """

    def __init__(
        self,
        *,
        num_outputs: int,
        image_size: int | Sequence[int] = 28,
        patch_size: int = 4,
        in_channels: int = 3,
        dim: int = 64,
        depth: int = 4,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        pooling: str = "cls",
        fused_qkv: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        one_of("pooling", pooling, ("cls", "mean"))
        probability("dropout", dropout)
        patches = _patches(image_size, positive("patch_size", patch_size))
        self.patch_embedding = nn.Conv2d(positive("in_channels", in_channels), dim, patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if pooling == "cls" else None
        self.position_embedding = nn.Parameter(torch.zeros(1, patches + (pooling == "cls"), dim))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(dim, heads=heads, hidden=int(dim * mlp_ratio), fused=fused_qkv, dropout=dropout)
            for _ in range(positive("depth", depth))
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, positive("num_outputs", num_outputs))
        self._initialise()

    def _initialise(self) -> None:
        init_transformer(self)
        nn.init.normal_(self.position_embedding, std=0.02)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, in_channels, H, W)` to `(B, num_outputs)`."""
        x = self.patch_embedding(x).flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.dropout(x + self.position_embedding)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x.mean(1) if self.cls_token is None else x[:, 0])


def _patches(image_size: int | Sequence[int], patch_size: int) -> int:
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    height, width = positives("image_size", sides, length=2)
    divides("image_size", height, "patch_size", patch_size)
    divides("image_size", width, "patch_size", patch_size)
    return (height // patch_size) * (width // patch_size)
