"""The transformers against a second implementation, written out in numpy with einsum and float64."""

import math

import numpy as np
import pytest
import torch
from scipy.special import erf, softmax

from lightning_opt.models import GPT, TextEncoder, ViT
from lightning_opt.models.transformer import SelfAttention, masked_mean


def arrays(model):
    return {name: value.detach().double().numpy() for name, value in model.state_dict().items()}


def linear(x, state, name):
    y = np.einsum("bti,oi->bto", x, state[f"{name}.weight"])
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def layer_norm(x, state, name):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def attention(x, state, name, heads, allowed):
    """`allowed`: (B, T, T) bool, [b, i, j] whether i sees j."""
    batch, length, dim = x.shape
    if f"{name}.qkv.weight" in state:
        q, k, v = np.split(linear(x, state, f"{name}.qkv"), 3, axis=-1)
    else:
        q, k, v = (linear(x, state, f"{name}.{part}") for part in ("query", "key", "value"))
    q, k, v = (part.reshape(batch, length, heads, dim // heads) for part in (q, k, v))
    scores = np.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(dim // heads)
    weights = softmax(np.where(allowed[:, None], scores, -np.inf), axis=-1)
    return linear(np.einsum("bhij,bjhd->bihd", weights, v).reshape(batch, length, dim), state, f"{name}.out")


def blocks(x, state, heads, allowed):
    for i in range(1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))):
        name = f"blocks.{i}"
        x = x + attention(layer_norm(x, state, f"{name}.norm1"), state, f"{name}.attention", heads, allowed)
        hidden = linear(layer_norm(x, state, f"{name}.norm2"), state, f"{name}.up")
        x = x + linear(0.5 * hidden * (1 + erf(hidden / math.sqrt(2))), state, f"{name}.down")
    return layer_norm(x, state, "norm")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_vit_equals_the_einsum_implementation(fused, pooling):
    torch.manual_seed(0)
    model = ViT(
        num_outputs=3, image_size=(4, 6), patch_size=2, in_channels=2, dim=8, depth=2, heads=2, fused_qkv=fused,
        pooling=pooling,
    ).double().eval()  # fmt: skip
    images, state = torch.randn(2, 2, 4, 6, dtype=torch.float64), arrays(model)
    patches = np.stack(
        [images[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].numpy() for i in range(2) for j in range(3)], axis=1
    )
    x = np.einsum("bncij,dcij->bnd", patches, state["patch_embedding.weight"]) + state["patch_embedding.bias"]
    if pooling == "cls":
        x = np.concatenate([np.repeat(state["cls_token"], 2, axis=0), x], axis=1)
    x = blocks(x + state["position_embedding"], state, 2, np.ones((2, x.shape[1], x.shape[1]), bool))
    expected = linear((x[:, :1] if pooling == "cls" else x.mean(1, keepdims=True)), state, "head")[:, 0]
    np.testing.assert_allclose(model(images).detach().numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_gpt_equals_the_einsum_implementation(fused, tied):
    torch.manual_seed(0)
    model = GPT(
        vocab_size=11, context_length=9, dim=8, depth=2, heads=4, fused_qkv=fused, tied_embeddings=tied
    ).double().eval()  # fmt: skip
    ids, state = torch.randint(0, 11, (2, 7)), arrays(model)
    x = state["token_embedding.weight"][ids.numpy()] + state["position_embedding.weight"][:7]
    x = blocks(x, state, 4, np.repeat(np.tril(np.ones((7, 7), bool))[None], 2, axis=0))
    table = state["token_embedding.weight"] if tied else state["head.weight"]
    np.testing.assert_allclose(model(ids).detach().numpy(), np.einsum("btd,vd->btv", x, table), atol=1e-12)


def test_text_encoder_equals_the_einsum_implementation():
    torch.manual_seed(0)
    model = TextEncoder(num_outputs=3, vocab_size=11, max_length=8, dim=8, heads=2, embedding_dim=4).double().eval()
    ids, state = torch.randint(0, 11, (2, 6)), arrays(model)
    mask = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    x = state["token_embedding.weight"][ids.numpy()] @ state["projection.weight"].T
    x = layer_norm(x + state["position_embedding.weight"][:6], state, "embedding_norm")
    x = blocks(x, state, 2, np.repeat(mask[:, None, :].astype(bool), 6, axis=1))
    mean = np.stack([x[0].mean(0), x[1, :3].mean(0)])
    expected = mean @ state["head.weight"].T + state["head.bias"]
    np.testing.assert_allclose(model(ids, torch.tensor(mask)).detach().numpy(), expected, atol=1e-12)


def test_a_token_changes_no_logits_before_it_and_some_from_it_on():
    torch.manual_seed(0)
    model = GPT(vocab_size=11, context_length=8, dim=16, depth=2).eval()
    ids = torch.randint(0, 11, (1, 8))
    with torch.no_grad():
        before = model(ids)
        for t in range(8):
            changed = ids.clone()
            changed[0, t] = (ids[0, t] + 1) % 11
            difference = (model(changed) - before).abs().amax(-1)[0]
            assert difference[:t].eq(0).all()
            assert difference[t:].gt(0).all()


def test_tied_embeddings_share_one_table():
    tied = GPT(vocab_size=50, context_length=8, dim=16, depth=1)
    free = GPT(vocab_size=50, context_length=8, dim=16, depth=1, tied_embeddings=False)
    size = [sum(p.numel() for p in model.parameters()) for model in (tied, free)]
    assert size[1] - size[0] == 50 * 16
    assert "head.weight" not in tied.state_dict()


def test_residual_writers_start_smaller_by_the_depth():
    torch.manual_seed(0)
    model = GPT(vocab_size=5, dim=128, depth=8)
    assert model.blocks[3].up.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert model.blocks[3].down.weight.std().item() == pytest.approx(0.02 / 4, rel=0.03)  # sqrt(2 * 8) = 4
    assert model.blocks[3].attention.out.weight.std().item() == pytest.approx(0.02 / 4, rel=0.03)


@pytest.mark.parametrize("fused", [False, True])
def test_heads_can_be_cut_from_the_weights_alone(fused):
    """What is left must equal the whole layer with that head's part of the output projection at zero."""
    torch.manual_seed(0)
    layer = SelfAttention(12, heads=3, fused=fused)
    x = torch.randn(2, 5, 12)
    kept = torch.tensor([0, 1, 2, 3, 8, 9, 10, 11])  # heads 0 and 2 of width 4
    silenced = SelfAttention(12, heads=3, fused=fused)
    silenced.load_state_dict(layer.state_dict())
    with torch.no_grad():
        silenced.out.weight[:, 4:8] = 0
        expected = silenced(x)
        rows = torch.cat([kept, 12 + kept, 24 + kept]) if fused else kept
        for part in ("qkv",) if fused else ("query", "key", "value"):
            projection = getattr(layer, part)
            projection.weight.data, projection.bias.data = projection.weight[rows], projection.bias[rows]
        layer.out.weight.data = layer.out.weight[:, kept]
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-6)


def test_attention_dropout_acts_in_training_only():
    torch.manual_seed(0)
    layer, x = SelfAttention(8, heads=2, dropout=0.5), torch.randn(1, 6, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_masked_mean_leaves_masked_positions_out():
    x = torch.tensor([[[1.0], [5.0], [100.0]], [[7.0], [8.0], [9.0]]])
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert masked_mean(x, mask).tolist() == [[3.0], [0.0]]


def test_too_long_a_sequence_is_refused_with_both_lengths():
    with pytest.raises(ValueError, match="9 tokens is longer than context_length=8"):
        GPT(vocab_size=5, context_length=8, dim=8)(torch.zeros(1, 9, dtype=torch.long))
