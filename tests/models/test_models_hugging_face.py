import json
import re
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers")

from lightning_opt.errors import ConfigError, MissingExtraError, StorageError  # noqa: E402
from lightning_opt.models import (  # noqa: E402
    MobileNet,
    ResNet,
    causal_lm,
    chosen_layers,
    encoder_classifier,
    minilm_encoder,
    sequence_classifier,
)
from lightning_opt.testing.models import check_model  # noqa: E402

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
BERT = {"model_type": "bert", **SIZES}
ELECTRA = {"model_type": "electra", "embedding_size": 8, **SIZES}
DISTILBERT = {"model_type": "distilbert", "vocab_size": 50, "dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 32}
LLAMA = {"model_type": "llama", **SIZES, "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": None}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 50,
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 2,
    "n_positions": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

IDS = torch.randint(1, 50, (3, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
TEXTS = {"input_ids": IDS, "attention_mask": MASK}


@pytest.mark.parametrize(
    ("config", "attention"), [(BERT, "sdpa"), (BERT, "eager"), (ELECTRA, "sdpa"), (DISTILBERT, "eager")]
)
def test_encoders_pass_the_checker_and_export(config, attention):
    model = encoder_classifier(config=config, num_outputs=4, num_layers=2, attention=attention)
    report = check_model(model, TEXTS, 4)
    assert model.backbone.config._attn_implementation == attention
    assert report.outputs_shape == (3, 4)
    assert report.export_error is None


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=lambda c: c["model_type"])
def test_causal_models_pass_the_checker_and_export(config):
    # gpt2 has 16 positions and llama none to learn: all parameters get a gradient.
    report = check_model(causal_lm(config=config, num_layers=2), {"input_ids": IDS, "attention_mask": MASK}, 50)
    assert report.outputs_shape == (3, 6, 50)
    assert report.export_error is None


def test_pooling_leaves_padding_out_and_equals_a_hand_made_mean():
    torch.manual_seed(0)
    model = encoder_classifier(config=BERT, num_outputs=4).eval()
    with torch.no_grad():
        states = model.backbone(**TEXTS).last_hidden_state
        mean = torch.stack([states[i, :n].mean(0) for i, n in enumerate(MASK.sum(1).tolist())])
        torch.testing.assert_close(model(**TEXTS), mean @ model.head.weight.T + model.head.bias)
        alone = model(IDS[1:2, :3])
        torch.testing.assert_close(model(**TEXTS)[1:2], alone)
        model.pooling = "cls"
        torch.testing.assert_close(model(**TEXTS), states[:, 0] @ model.head.weight.T + model.head.bias)


def test_token_types_reach_the_backbone():
    model = encoder_classifier(config=BERT, num_outputs=4).eval()
    assert not torch.equal(model(IDS, MASK, torch.ones_like(IDS)), model(IDS, MASK, torch.zeros_like(IDS)))


def test_a_pooler_that_would_get_no_gradient_is_gone():
    assert not any("pooler" in name for name, _ in encoder_classifier(config=BERT, num_outputs=4).named_parameters())


def test_kept_layers_are_the_chosen_ones_and_alone_are_run():
    full = encoder_classifier(config=BERT, num_outputs=4).eval()
    part = encoder_classifier(config=BERT, num_outputs=4, num_layers=[0, 2]).eval()
    renamed = {k.replace("layer.2.", "layer.1."): v for k, v in full.state_dict().items() if ".layer.1." not in k}
    part.load_state_dict(renamed)
    with torch.no_grad():
        x = full.backbone.embeddings(IDS)
        for i in (0, 2):
            x = full.backbone.encoder.layer[i](x)
        torch.testing.assert_close(part(IDS), full.head(x.mean(1)))
    assert part.backbone.config.num_hidden_layers == 2


def test_chosen_layers():
    assert chosen_layers(12, 6) == [0, 2, 4, 7, 9, 11]  # the layers that DistilBERT starts from (arXiv 1910.01108)
    assert chosen_layers(6, 1) == [0]
    assert chosen_layers(6, 6) == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="at most the model's 6, got 7"):
        chosen_layers(6, 7)
    with pytest.raises(ValueError, match=re.escape("positions from 0 to 5, got [0, 6]")):
        chosen_layers(6, [0, 6])


def test_models_without_a_list_of_layers_say_so():
    config = dict(model_type="albert", embedding_size=8, **SIZES)
    with pytest.raises(ConfigError, match="one list of 3 layers, but AlbertModel has none"):
        encoder_classifier(config=config, num_outputs=2, num_layers=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a trained head, as transformers itself writes it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved")
    values = {k: v for k, v in BERT.items() if k != "model_type"}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**values, num_labels=4)).eval()
    model.save_pretrained(folder)
    return folder, model


def test_a_folder_gives_its_weights(saved):
    folder, original = saved
    model = encoder_classifier(str(folder), num_outputs=2).eval()
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, original.bert.state_dict()[name])
    assert model.backbone.embeddings.word_embeddings.weight.dtype == torch.float32


def test_a_folder_with_a_head_answers_as_transformers_does(saved):
    folder, original = saved
    model = sequence_classifier(str(folder), num_outputs=4).eval()
    with torch.no_grad():
        assert torch.equal(model(**TEXTS), original(**TEXTS).logits)
    assert check_model(model, TEXTS, 4).export_error is None


def test_a_head_of_other_outputs_is_refused(saved):
    with pytest.raises(ConfigError, match="has 4 outputs, but num_outputs is 3"):
        sequence_classifier(str(saved[0]), num_outputs=3)


def test_a_folder_without_a_head_is_no_classifier(tmp_path):
    values = {k: v for k, v in BERT.items() if k != "model_type"}
    transformers.BertModel(transformers.BertConfig(**values)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"lacks 2 weights of BertForSequenceClassification, first classifier\.bias"):
        sequence_classifier(str(tmp_path), num_outputs=2)


def test_values_can_replace_those_of_the_source(saved):
    model = encoder_classifier(str(saved[0]), num_outputs=2, config={"hidden_dropout_prob": 0.25})
    assert model.backbone.embeddings.dropout.p == 0.25
    assert model.dropout.p == 0.25
    assert encoder_classifier(str(saved[0]), num_outputs=2, dropout=0.5).dropout.p == 0.5


def test_pickled_weights_are_never_read(saved, tmp_path):
    folder, original = saved
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save(original.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(StorageError, match="safetensors"):
        encoder_classifier(str(tmp_path), num_outputs=2)


def test_code_that_comes_with_a_folder_is_never_run(tmp_path):
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass C: pass\n")
    settings = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.C"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError):
        encoder_classifier(str(tmp_path), num_outputs=2)
    assert not marker.exists()


@pytest.mark.parametrize("key", ["auto_map", "attn_implementation", "_attn_implementation", "trust_remote_code"])
def test_config_keys_that_bring_code_are_refused(key):
    with pytest.raises(ConfigError, match=f"config.{key} is not allowed"):
        encoder_classifier(config={**BERT, key: "elsewhere/kernel"}, num_outputs=2)


def test_a_hub_name_without_a_pinned_revision_warns_and_offline_says_so_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.warns(UserWarning, match="set revision to a commit hash"), pytest.raises(StorageError) as error:
        encoder_classifier("nobody/nothing", num_outputs=2, local_files_only=True)
    assert "nobody/nothing" in str(error.value)
    assert "\n" not in str(error.value)
    with warnings.catch_warnings(action="error"), pytest.raises(StorageError):
        encoder_classifier("nobody/nothing", num_outputs=2, local_files_only=True, revision="a" * 40)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, ConfigError, "give source"),
        ({"config": {"hidden_size": 16}}, ConfigError, "config.model_type is None"),
        ({"config": {"model_type": "bertt"}}, ConfigError, "config.model_type is 'bertt'"),
        ({"config": {**BERT, "num_attention_heads": 3}}, ConfigError, "cannot be built"),
        ({"config": BERT, "attention": "flash"}, ValueError, "attention must be one of 'sdpa', 'eager', got 'flash'"),
        ({"config": BERT, "pooling": "max"}, ValueError, "pooling must be one of 'mean', 'cls', got 'max'"),
        ({"source": "./no/such/folder"}, StorageError, "there is no folder ./no/such/folder"),
    ],
)
def test_wrong_arguments_are_named(options, error, words):
    with pytest.raises(error, match=re.escape(words)) as raised:
        encoder_classifier(num_outputs=2, **options)
    assert "\n" not in str(raised.value)


def test_without_transformers_the_install_line_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'lightning_opt[text]'")):
        encoder_classifier(config=BERT, num_outputs=2)


def test_minilm_without_weights_is_its_published_architecture():
    with torch.device("meta"):
        model = minilm_encoder(num_outputs=2, pretrained=False)
    # 22,713,216 as published, less the pooler of 384 x 384 + 384
    assert sum(p.numel() for p in model.backbone.parameters()) == 22_713_216 - 147_840


@pytest.mark.slow
@pytest.mark.network
def test_minilm_comes_from_the_package_with_its_own_configuration_and_weights():
    from safetensors.torch import load

    from lightning_opt.data.fetch import read
    from lightning_opt.data.packages import MINILM_CONFIG as CONFIG_FILE
    from lightning_opt.data.packages import MINILM_WEIGHTS
    from lightning_opt.models.minilm import MINILM_CONFIG

    try:
        settings, weights = json.loads(read(CONFIG_FILE)), load(read(MINILM_WEIGHTS))
    except StorageError as error:
        pytest.skip(str(error).splitlines()[0])
    assert {key: settings[key] for key in MINILM_CONFIG} == MINILM_CONFIG
    model = minilm_encoder(num_outputs=2, num_layers=[0, 5])
    state = model.backbone.state_dict()
    assert torch.equal(state["embeddings.word_embeddings.weight"], weights["embeddings.word_embeddings.weight"])
    theirs = weights["encoder.layer.5.output.dense.weight"]
    assert torch.equal(state["encoder.layer.1.output.dense.weight"], theirs)


def rename_resnet(name):
    name = name.removeprefix("resnet.")
    name = name.replace("embedder.embedder.convolution", "conv1").replace("embedder.embedder.normalization", "bn1")
    name = name.replace("classifier.1", "fc")
    name = re.sub(r"encoder\.stages\.(\d)\.layers\.(\d+)\.", lambda m: f"layer{int(m[1]) + 1}.{m[2]}.", name)
    name = name.replace("shortcut.convolution", "downsample.0").replace("shortcut.normalization", "downsample.1")
    name = re.sub(r"layer\.(\d)\.convolution", lambda m: f"conv{int(m[1]) + 1}", name)
    return re.sub(r"layer\.(\d)\.normalization", lambda m: f"bn{int(m[1]) + 1}", name)


@pytest.mark.parametrize(
    ("depth", "options"),
    [
        (18, {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"}),
        (50, {"depths": [3, 4, 6, 3], "hidden_sizes": [256, 512, 1024, 2048], "layer_type": "bottleneck"}),
    ],
)
def test_resnet_answers_as_the_one_in_transformers(depth, options):
    torch.manual_seed(0)
    theirs = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=5, **options)).eval()
    ours = ResNet(depth=depth, num_outputs=5).eval()
    ours.load_state_dict({rename_resnet(name): value for name, value in theirs.state_dict().items()})
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images).logits, rtol=1e-4, atol=1e-4)


def test_mobile_net_answers_as_the_one_in_transformers():
    torch.manual_seed(0)
    config = transformers.MobileNetV2Config(num_labels=5, tf_padding=False, layer_norm_eps=1e-5)
    theirs = transformers.MobileNetV2ForImageClassification(config).eval()
    ours = MobileNet(num_outputs=5).eval()
    ours.load_state_dict(dict(zip(ours.state_dict(), mobile_state(theirs), strict=True)))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images).logits, rtol=1e-4, atol=1e-4)


def mobile_state(model):
    """Both list the layers from the image to the logits; transformers' stem holds the first block as well."""
    return list(model.state_dict().values())
