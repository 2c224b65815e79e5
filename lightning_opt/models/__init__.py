"""Reference models in plain torch, adapters for models from elsewhere, and Hugging Face models as plain modules."""

from lightning_opt.models.adapters import LoadedWeights, LogitsOf, load_weights
from lightning_opt.models.cnn import ConvNet, ConvNet1d, LeNet
from lightning_opt.models.gpt import GPT
from lightning_opt.models.gru import GRUClassifier
from lightning_opt.models.hugging_face import (
    EncoderClassifier,
    LogitsModel,
    causal_lm,
    encoder_classifier,
    sequence_classifier,
)
from lightning_opt.models.layers import chosen_layers, keep_layers
from lightning_opt.models.minilm import minilm_encoder
from lightning_opt.models.mlp import MLP
from lightning_opt.models.mobile import MobileNet
from lightning_opt.models.resnet import ResNet
from lightning_opt.models.resnet_cifar import CifarResNet, WideResNet
from lightning_opt.models.text import BagOfEmbeddings, TextEncoder
from lightning_opt.models.vit import ViT

__all__ = [
    "GPT",
    "MLP",
    "BagOfEmbeddings",
    "CifarResNet",
    "ConvNet",
    "ConvNet1d",
    "EncoderClassifier",
    "GRUClassifier",
    "LeNet",
    "LoadedWeights",
    "LogitsModel",
    "LogitsOf",
    "MobileNet",
    "ResNet",
    "TextEncoder",
    "ViT",
    "WideResNet",
    "causal_lm",
    "chosen_layers",
    "encoder_classifier",
    "keep_layers",
    "load_weights",
    "minilm_encoder",
    "sequence_classifier",
]
