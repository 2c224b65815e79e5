"""How the networks of this room get their first weights."""

from torch import nn


def init_convolutions(model: nn.Module) -> None:
    """Initialise a convolutional network in place.

    Convolutions get Kaiming normal weights over fan-out (He et al. 2015, arXiv 1502.01852, equation 14), normalisation
    layers weight 1 and bias 0; linear layers keep torch's own initialisation.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.GroupNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def init_transformer(model: nn.Module, *, std: float = 0.02) -> None:
    """Initialise a transformer in place: weights of linear layers and embeddings normal with `std`, biases 0.

    As in BERT (Devlin et al. 2018, arXiv 1810.04805) and GPT-2 (Radford et al. 2019).
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
