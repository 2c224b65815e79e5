"""Encoders and language models of Hugging Face's transformers, as plain modules that answer with logits.

Weights are read from safetensors only and no code that comes with a model is ever run. transformers is an extra
(`pip install 'lightning_opt[text]'`) and is imported only when one of these functions is called.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_opt.errors import ConfigError
from lightning_opt.models.checks import one_of, positive, probability
from lightning_opt.models.hub import build
from lightning_opt.models.layers import keep_layers
from lightning_opt.models.transformer import masked_mean


class EncoderClassifier(nn.Module):
    """Classify or regress texts with an encoder, pooling and one linear layer.

    The head's weights are normal with standard deviation 0.02, its bias 0.

    Args:
        backbone: Called with `input_ids` and `attention_mask`, answers with `last_hidden_state` `(B, T, hidden)`.
        hidden: Width of the backbone's hidden states.
        num_outputs: Values per sample, such as classes.
        pooling: "mean" over the tokens that count, or "cls" for the first token.
        dropout: Probability of dropping a value before the head.

    Raises:
        ValueError: An argument cannot work.
    """

    def __init__(
        self, backbone: nn.Module, *, hidden: int, num_outputs: int, pooling: str = "mean", dropout: float = 0.0
    ) -> None:
        super().__init__()
        one_of("pooling", pooling, ("mean", "cls"))
        self.pooling = pooling
        self.backbone = backbone
        self.dropout = nn.Dropout(probability("dropout", dropout))
        self.head = nn.Linear(hidden, positive("num_outputs", num_outputs))
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Map `(B, T)` token ids, with a `(B, T)` mask of 1 for tokens that count, to `(B, num_outputs)`."""
        given = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        states = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **given).last_hidden_state
        if self.pooling == "cls":
            pooled = states[:, 0]
        else:
            pooled = states.mean(1) if attention_mask is None else masked_mean(states, attention_mask)
        return self.head(self.dropout(pooled))


class LogitsModel(nn.Module):
    """Answer with the logits of a Hugging Face model that has its own head.

    Args:
        model: Called with `input_ids` and `attention_mask`, answers with an object that has `logits`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Map `(B, T)` token ids to `(B, num_outputs)` or, for a language model, `(B, T, V)` logits."""
        given = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **given).logits


def encoder_classifier(
    source: str | None = None,
    *,
    num_outputs: int,
    config: Mapping[str, Any] | None = None,
    pooling: str = "mean",
    num_layers: int | Sequence[int] | None = None,
    dropout: float | None = None,
    attention: str = "sdpa",
    revision: str | None = None,
    local_files_only: bool = False,
) -> EncoderClassifier:
    """Build a text classifier on an encoder; the head is new.

    Args:
        source: A folder with `config.json` and safetensors weights, or a name on the hub. None: random weights, built
            from `config`.
        num_outputs: Values per sample, such as classes.
        config: Without `source` the whole configuration, with its "model_type" such as "bert"; with it, values that
            replace the source's own.
        pooling: "mean" over the tokens that count, or "cls" for the first token.
        num_layers: Keep only these layers: how many, evenly spaced from first to last, or their positions.
        dropout: Probability of dropping a value before the head; None: the configuration's own.
        attention: "sdpa" (fused) or "eager" (attention weights can be read).
        revision: Commit hash of a hub model.
        local_files_only: Use the hub's local cache, never the network.

    Raises:
        ConfigError: The configuration cannot work, or transformers is missing.
        StorageError: The source cannot be read.
        ValueError: An argument cannot work.
    """
    backbone = build(
        "AutoModel", source, config, attention=attention, revision=revision, local_files_only=local_files_only
    )
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None  # its weights would get no gradient: the head reads the hidden states
    if num_layers is not None:
        keep_layers(backbone, num_layers)
    settings = backbone.config
    if dropout is None:
        dropout = getattr(settings, "classifier_dropout", None)
        dropout = getattr(settings, "hidden_dropout_prob", None) if dropout is None else dropout
    return EncoderClassifier(
        backbone, hidden=settings.hidden_size, num_outputs=num_outputs, pooling=pooling, dropout=dropout or 0.0
    )


def sequence_classifier(
    source: str,
    *,
    num_outputs: int,
    attention: str = "sdpa",
    revision: str | None = None,
    local_files_only: bool = False,
) -> LogitsModel:
    """Load a text classifier together with its trained head, such as a teacher that is used as it is.

    Args:
        source: A folder with `config.json` and safetensors weights, or a name on the hub.
        num_outputs: Values per sample that the head must have.
        attention: "sdpa" or "eager".
        revision: Commit hash of a hub model.
        local_files_only: Use the hub's local cache, never the network.

    Raises:
        ConfigError: The source has no trained head, or one of other outputs; or transformers is missing.
        StorageError: The source cannot be read.
    """
    model = build(
        "AutoModelForSequenceClassification",
        source,
        None,
        attention=attention,
        revision=revision,
        local_files_only=local_files_only,
    )
    if model.config.num_labels != num_outputs:
        raise ConfigError(
            f"{source} has {model.config.num_labels} outputs, but num_outputs is {num_outputs}; choose a model with "
            "a head for this task, or encoder_classifier for a new head"
        )
    return LogitsModel(model)


def causal_lm(
    source: str | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    num_layers: int | Sequence[int] | None = None,
    attention: str = "sdpa",
    revision: str | None = None,
    local_files_only: bool = False,
) -> LogitsModel:
    """Build a causal language model; arguments as in `encoder_classifier`.

    Raises:
        ConfigError: The configuration cannot work, or transformers is missing.
        StorageError: The source cannot be read.
    """
    settings = {**(config or {}), "use_cache": False}  # a cache of keys and values serves generation only
    model = build(
        "AutoModelForCausalLM",
        source,
        settings if source is not None or config is not None else None,
        attention=attention,
        revision=revision,
        local_files_only=local_files_only,
    )
    if num_layers is not None:
        keep_layers(model, num_layers)
    return LogitsModel(model)
