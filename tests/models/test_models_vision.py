import re
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_opt.models import MLP, CifarResNet, ConvNet, ConvNet1d, MobileNet, ResNet, ViT, WideResNet
from lightning_opt.models.mobile import round_channels
from lightning_opt.testing.models import check_model


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# As published for 100 classes, in millions, with projection shortcuts (the benchmark of arXiv 1910.10699).
@pytest.mark.parametrize(
    ("depth", "channels", "millions"),
    [
        (20, (16, 16, 32, 64), 0.28),
        (32, (16, 16, 32, 64), 0.47),
        (44, (16, 16, 32, 64), 0.67),
        (56, (16, 16, 32, 64), 0.86),
        (110, (16, 16, 32, 64), 1.74),
        (8, (32, 64, 128, 256), 1.23),
        (32, (32, 64, 128, 256), 7.43),
    ],
)
def test_cifar_resnet_has_the_published_number_of_parameters(depth, channels, millions):
    assert round(count(CifarResNet(num_outputs=100, depth=depth, channels=channels)) / 1e6, 2) == millions


def test_resnet20_for_ten_classes_is_the_0_27_million_of_the_paper():
    assert round(count(CifarResNet(num_outputs=10, depth=20)) / 1e6, 2) == 0.27


@pytest.mark.parametrize(
    ("depth", "widen", "millions"), [(16, 1, 0.18), (16, 2, 0.70), (40, 1, 0.57), (40, 2, 2.26), (28, 10, 36.54)]
)
def test_wide_resnet_has_the_published_number_of_parameters(depth, widen, millions):
    with torch.device("meta"):
        model = WideResNet(num_outputs=100, depth=depth, widen=widen)
    assert round(count(model) / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("depth", "parameters", "entries"), [(18, 11_689_512, 122), (34, 21_797_672, 218), (50, 25_557_032, 320)]
)
def test_resnet_has_the_published_parameters_and_names(depth, parameters, entries):
    with torch.device("meta"):
        model = ResNet(num_outputs=1000, depth=depth)
    names = set(model.state_dict())
    assert count(model) == parameters
    assert len(names) == entries
    assert {
        "conv1.weight",
        "bn1.running_mean",
        "layer1.0.conv1.weight",
        "layer2.0.downsample.0.weight",
        "layer2.0.downsample.1.bias",
        "layer4.1.bn2.num_batches_tracked",
        "fc.bias",
    } <= names
    assert ("layer1.0.downsample.0.weight" in names) == (depth == 50)


def test_published_names_of_small_image_networks():
    cifar = set(CifarResNet(num_outputs=100, depth=8).state_dict())
    wide = set(WideResNet(num_outputs=100, depth=16).state_dict())
    assert {"conv1.weight", "layer2.0.downsample.1.weight", "layer3.0.bn2.bias", "fc.weight"} <= cifar
    assert {"block1.layer.0.convShortcut.weight", "block3.layer.1.conv2.weight", "bn1.weight", "fc.bias"} <= wide


def test_mobile_net_has_the_published_parameters():
    with torch.device("meta"):
        full, half = MobileNet(num_outputs=1000), MobileNet(num_outputs=1000, width=0.5)
    assert count(full) == 3_504_872
    assert round(count(half) / 1e6, 2) == 1.97
    assert all(
        size % 8 == 0
        for name, value in half.named_parameters()
        if re.search(r"features.*weight", name) and value.dim() == 4
        for size in value.shape[:1]
    )


def test_round_channels_follows_the_published_rule():
    # arXiv 1801.04381's reference rounding: nearest multiple of 8, up where rounding down loses more than a tenth
    assert [round_channels(c) for c in (1, 12, 16 * 0.75, 24 * 0.35, 33, 44, 1280 * 1.4)] == [
        8,
        16,
        16,
        8,
        32,
        48,
        1792,
    ]


IMAGES = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
SMALL = {"stages": ((1, 8, 1, 1), (4, 16, 2, 2)), "last_channels": 32, "stem_stride": 1}


@pytest.mark.parametrize(
    "build",
    [
        lambda: MLP(input_shape=(1, 28, 28), hidden=(16,), num_outputs=7, dropout=0.2, norm=nn.BatchNorm1d),
        lambda: MLP(in_features=784, hidden=(), num_outputs=7),
        lambda: ConvNet(widths=(4, 8), convs_per_width=2, num_outputs=7, dropout=0.2),
        lambda: CifarResNet(depth=8, in_channels=1, num_outputs=7),
        lambda: WideResNet(depth=10, widen=1, in_channels=1, num_outputs=7, dropout=0.2),
        lambda: ResNet(depth=18, in_channels=1, num_outputs=7, small_images=True),
        lambda: MobileNet(in_channels=1, num_outputs=7, **SMALL),
        lambda: ViT(in_channels=1, num_outputs=7, dim=16, depth=2, dropout=0.1),
        lambda: ViT(in_channels=1, num_outputs=7, dim=16, depth=2, fused_qkv=True, pooling="mean"),
    ],
    ids=["mlp", "linear", "cnn", "resnet8", "wrn", "resnet18", "mobile", "vit", "vit-fused"],
)
def test_vision_models_pass_the_checker_and_export(build):
    report = check_model(build(), IMAGES, 7)
    assert report.outputs_shape == (3, 7)
    assert report.export_error is None


def test_bottlenecks_and_large_images_have_the_right_shapes():
    model = ResNet(depth=50, num_outputs=5).eval()
    with torch.no_grad():
        assert model.layer4(model.layer3(model.layer2(model.layer1(torch.zeros(1, 64, 56, 56))))).shape == (
            1,
            2048,
            7,
            7,
        )
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 5)


@pytest.mark.parametrize(("length", "shape"), [(None, (3, 40)), (40, (3, 1, 40))])
def test_conv_1d_takes_signals_with_and_without_a_channel_axis(length, shape):
    signals = torch.randn(shape)
    assert check_model(ConvNet1d(num_outputs=10, length=length), signals, 10).export_error is None


def test_conv_1d_without_length_takes_any_length_and_with_it_sees_positions():
    torch.manual_seed(0)
    anywhere, fixed = ConvNet1d(num_outputs=2).eval(), ConvNet1d(num_outputs=2, length=64).eval()
    early, late = torch.zeros(1, 64), torch.zeros(1, 64)
    early[0, 24] = late[0, 40] = 1.0  # 16 apart: two steps of the last feature map, away from the borders
    with torch.no_grad():
        assert anywhere(torch.zeros(1, 96)).shape == (1, 2)
        torch.testing.assert_close(anywhere(early), anywhere(late))
        assert (fixed(early) - fixed(late)).abs().max() > 1e-3


@pytest.mark.parametrize("size", [8, 32, (12, 20)])
def test_vit_takes_images_of_any_size(size):
    height, width = (size, size) if isinstance(size, int) else size
    model = ViT(num_outputs=3, image_size=size, patch_size=4, in_channels=2, dim=8, depth=1, heads=2)
    assert model.position_embedding.shape == (1, height * width // 16 + 1, 8)
    assert model(torch.zeros(2, 2, height, width)).shape == (2, 3)


def test_convolutions_start_with_kaiming_fan_out():
    torch.manual_seed(0)
    weight = CifarResNet(num_outputs=10, depth=8, channels=(64, 64, 128, 256)).layer3[0].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)  # sqrt(2 / (out * kernel area))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: MLP(num_outputs=2), "in_features=None"),
        (lambda: MLP(num_outputs=2, in_features=3, input_shape=(3,)), "input_shape=(3,)"),
        (lambda: MLP(num_outputs=0, in_features=3), "num_outputs must be a whole number of at least 1, got 0"),
        (lambda: MLP(num_outputs=2, in_features=3, hidden=(4, -1)), "hidden[1] must be a whole number"),
        (lambda: ConvNet(num_outputs=2, dropout=1.0), "dropout must be in [0, 1), got 1.0"),
        (lambda: ConvNet(num_outputs=2, widths=()), "widths must be a list of whole numbers, got ()"),
        (lambda: ConvNet1d(num_outputs=2, kernel_size=4), "kernel_size must be odd, got 4"),
        (lambda: CifarResNet(num_outputs=2, depth=21), "depth must be 6 n + 2"),
        (lambda: CifarResNet(num_outputs=2, channels=(16, 32)), "channels must be 4 whole numbers, got (16, 32)"),
        (lambda: WideResNet(num_outputs=2, depth=20), "depth must be 6 n + 4"),
        (lambda: ResNet(num_outputs=2, depth=19), "depth must be one of 18, 34, 50, 101, got 19"),
        (lambda: MobileNet(num_outputs=2, width=0.0), "width must be above 0, got 0.0"),
        (
            lambda: ViT(num_outputs=2, image_size=28, patch_size=5),
            "image_size must be a multiple of patch_size=5, got 28",
        ),
        (lambda: ViT(num_outputs=2, dim=30, heads=4), "dim must be a multiple of heads=4, got 30"),
        (lambda: ViT(num_outputs=2, pooling="max"), "pooling must be one of 'cls', 'mean', got 'max'"),
    ],
)
def test_wrong_arguments_are_named_with_their_value(build, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        build()


def test_no_model_imports_lightning_or_transformers():
    import subprocess
    import sys

    code = (
        "import sys, lightning_opt.models; "
        "print([m for m in ('lightning', 'transformers', 'hydra', 'torchvision') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"
