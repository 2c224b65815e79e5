"""Feature taps on CNNs and Hugging Face networks: what they read and what they leave behind."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_opt.errors import ConfigError
from lightning_opt.modules.taps import FeatureTaps, match_modules, near_names


class Block(nn.Module):
    def __init__(self, ins, outs):
        super().__init__()
        self.conv, self.act = nn.Conv2d(ins, outs, 3, padding=1), nn.ReLU()

    def forward(self, x):
        return self.act(self.conv(x))


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.layer1 = nn.Sequential(Block(3, width), Block(width, width))
        self.layer2 = nn.Sequential(nn.MaxPool2d(2), Block(width, 2 * width))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(2 * width, 5)

    def forward(self, x):
        return self.head(self.drop(self.layer2(self.layer1(x)).mean((2, 3))))


class Branches(nn.Module):
    """Returns and takes tensors in many forms."""

    def __init__(self):
        super().__init__()
        self.pair, self.named, self.keyword, self.nothing = Pair(), Named(), nn.Linear(3, 3), Nothing()

    def forward(self, x):
        first, second = self.pair(x)
        self.nothing(x)
        return self.keyword(input=self.named(first)["b"]) + second


class Pair(nn.Module):
    def forward(self, x):
        return x + 1, x + 2


class Named(nn.Module):
    def forward(self, x):
        return {"none": None, "b": (x * 3, x)[0]}


class Nothing(nn.Module):
    def forward(self, x):
        return None


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class TestMatching:
    @pytest.mark.parametrize(
        ("patterns", "found"),
        [
            (["layer1"], ["layer1"]),
            (["layer*.1"], ["layer1.1", "layer2.1"]),
            (["layer1.*"], ["layer1.0", "layer1.1"]),
            (["head", "layer1"], ["layer1", "head"]),
            (["layer2.1:in", "layer2.1"], ["layer2.1", "layer2.1:in"]),
            (["**.conv"], ["layer1.0.conv", "layer1.1.conv", "layer2.1.conv"]),
            ([], []),
        ],
    )
    def test_patterns(self, net, patterns, found):
        assert match_modules(net, patterns) == found

    def test_no_match_lists_near_names(self, net):
        with pytest.raises(ConfigError, match=r"'laier2.1' matches no module of Net; near names: layer2\.1") as error:
            match_modules(net, ["layer1", "laier2.1"])
        listed = str(error.value).split("near names: ")[1].split(". Use")[0].split(", ")
        assert len(listed) == 5
        assert error.value.exit_code == 2

    def test_near_names_are_sorted(self):
        assert near_names("encoder.layer.12", ["pooler", "encoder.layer.1", "encoder"])[0] == "encoder.layer.1"

    def test_a_shared_module_has_both_names(self):
        net = nn.Module()
        net.one = net.two = nn.Linear(2, 2)
        assert match_modules(net, ["*"]) == ["one", "two"]


class TestReading:
    @pytest.mark.parametrize("training", [True, False])
    def test_outputs_and_inputs(self, net, training):
        net.train(training)
        with FeatureTaps(net, ["layer1.0", "layer2:in", "head:in"]) as taps:
            logits = net(IMAGES)
            features = taps.collect()
        assert list(features) == ["layer1.0", "layer2:in", "head:in"]
        torch.testing.assert_close(features["layer1.0"], net.layer1[0](IMAGES))
        torch.testing.assert_close(features["layer2:in"], net.layer1(IMAGES))
        torch.testing.assert_close(net.head(features["head:in"]), logits)

    def test_gradient_flows_through_a_feature(self, net):
        with FeatureTaps(net, ["layer1"]) as taps:
            net(IMAGES)
            taps.collect()["layer1"].sum().backward()
        assert net.layer1[0].conv.weight.grad.abs().sum() > 0
        assert net.head.weight.grad is None

    def test_no_grad(self, net):
        with torch.no_grad(), FeatureTaps(net, ["layer1"]) as taps:
            net(IMAGES)
            assert not taps.collect()["layer1"].requires_grad

    def test_inference_mode(self, net):
        with torch.inference_mode(), FeatureTaps(net, ["layer1"]) as taps:
            net(IMAGES)
            assert taps.collect()["layer1"].is_inference()

    def test_tuples_dicts_and_keyword_inputs(self):
        net, x = Branches(), torch.randn(2, 3)
        with FeatureTaps(net, ["pair", "named", "keyword:in"]) as taps:
            net(x)
            features = taps.collect()
        torch.testing.assert_close(features["pair"], x + 1)
        torch.testing.assert_close(features["named"], (x + 1) * 3)
        torch.testing.assert_close(features["keyword:in"], (x + 1) * 3)

    def test_shared_module_gives_its_last_answer(self):
        linear = nn.Linear(3, 3)
        net, x = nn.Sequential(linear, linear), torch.randn(2, 3)
        with FeatureTaps(net, ["0", "1"]) as taps:
            y = net(x)
            features = taps.collect()
        assert torch.equal(features["0"], y)
        assert torch.equal(features["1"], y)

    def test_each_forward_starts_afresh_and_collect_forgets(self, net):
        with FeatureTaps(net, ["layer1"]) as taps:
            net(IMAGES)
            net(2 * IMAGES)
            torch.testing.assert_close(taps.collect()["layer1"], net.layer1(2 * IMAGES))
            with pytest.raises(ConfigError, match="did not run"):
                taps.collect()

    def test_a_module_that_gives_no_tensor(self):
        net = Branches()
        with FeatureTaps(net, ["nothing"]) as taps:
            net(torch.randn(2, 3))
            with pytest.raises(ConfigError, match="gave no tensor"):
                taps.collect()

    def test_a_feature_changed_in_place_is_refused(self):
        net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))
        with FeatureTaps(net, ["0"]) as taps:
            net(torch.randn(2, 3))
            with pytest.raises(ConfigError, match="in place"):
                taps.collect()

    def test_recomputed_activations_store_nothing(self, net):
        class Saving(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = net.layer1

            def forward(self, x):
                return checkpoint(self.inner, x, use_reentrant=False)

        model = Saving()
        with FeatureTaps(model, ["inner.0"]) as taps:
            out = model(IMAGES.clone().requires_grad_())
            feature = taps.collect()["inner.0"]
            (out.sum() + feature.sum()).backward()
            assert not taps._record.features
        assert net.layer1[0].conv.weight.grad.abs().sum() > 0


class TestLeaving:
    def test_hooks_and_tensors_are_gone_after_exit(self, net):
        with FeatureTaps(net, ["layer*"]) as taps:
            net(IMAGES)
            assert hooks_of(net) == 4
            kept = weakref.ref(taps._record.features["layer1"])
        gc.collect()
        assert hooks_of(net) == 0
        assert kept() is None

    def test_also_after_an_error(self, net):
        taps = FeatureTaps(net, ["layer1"])
        with pytest.raises(RuntimeError), taps:
            net(torch.randn(2, 9, 8, 8))
        assert hooks_of(net) == 0
        with taps:  # and the taps still work
            net(IMAGES)
            assert list(taps.collect()) == ["layer1"]

    def test_nested_use_leaves_with_the_last(self, net):
        taps = FeatureTaps(net, ["layer1"])
        with taps:
            with taps:
                net(IMAGES)
            assert hooks_of(net) == 3
            assert list(taps.collect()) == ["layer1"]
        assert hooks_of(net) == 0

    def test_two_taps_on_one_model_do_not_disturb_each_other(self, net):
        with FeatureTaps(net, ["layer1"]) as outer:
            with FeatureTaps(net, ["layer1", "layer2"]) as inner:
                net(IMAGES)
                assert list(inner.collect()) == ["layer1", "layer2"]
            assert list(outer.collect()) == ["layer1"]
        assert hooks_of(net) == 0

    def test_install_and_remove(self, net):
        taps = FeatureTaps(net, ["layer1"])
        taps.install()
        for _ in range(2):
            net(IMAGES)
            assert list(taps.collect()) == ["layer1"]
        taps.remove()
        taps.remove()
        assert hooks_of(net) == 0
        taps.install()
        assert hooks_of(net) == 3
        taps.remove()

    def test_no_patterns_no_hooks(self, net):
        with FeatureTaps(net, []) as taps:
            net(IMAGES)
            assert taps.collect() == {}
            assert hooks_of(net) == 0

    @pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
    def test_a_copy_does_not_feed_the_taps_and_loses_its_hooks(self, net, way):
        with FeatureTaps(net, ["layer1", "layer2:in"]) as taps:
            net(IMAGES)
            if way == "deepcopy":
                twin = copy.deepcopy(net)
            elif way == "pickle":
                twin = pickle.loads(pickle.dumps(net))
            else:
                buffer = io.BytesIO()
                torch.save(net.state_dict(), buffer)
                buffer.seek(0)
                twin = Net()
                twin.load_state_dict(torch.load(buffer, weights_only=True))
            twin(7 * IMAGES)
            assert hooks_of(twin) == 0
            torch.testing.assert_close(taps.collect()["layer1"], net.layer1(IMAGES))
        twin(IMAGES)

    def test_taps_copied_together_with_their_model_tap_the_copy(self, net):
        class Owner(nn.Module):
            def __init__(self):
                super().__init__()
                self.net, self.taps = net, FeatureTaps(net, ["layer1"])

        owner = Owner()
        owner.taps.install()
        twin = copy.deepcopy(owner)
        twin.taps.install()
        twin.net(2 * IMAGES)
        torch.testing.assert_close(twin.taps.collect()["layer1"], net.layer1(2 * IMAGES))
        owner.taps.remove()
        assert hooks_of(net) == 0


class TestCompiled:
    @pytest.fixture(autouse=True)
    def _fresh(self):
        torch.compiler.reset()
        yield
        torch.compiler.reset()

    @pytest.mark.parametrize("whole", ["module.compile", "torch.compile", "inner"])
    @pytest.mark.parametrize("used_before", [False, True])
    def test_compiled_networks(self, net, whole, used_before):
        net.eval()
        expected = net.layer1(IMAGES)
        model = net
        if whole == "module.compile":
            net.compile(backend="eager")
        elif whole == "torch.compile":
            model = torch.compile(net, backend="eager")
        else:
            net.layer1.compile(backend="eager")
        if used_before:
            model(IMAGES)
        with FeatureTaps(model, ["layer1", "layer1.0", "layer2:in"]) as taps:
            assert taps.names == ["layer1", "layer1.0", "layer2:in"]
            for scale in (1, 1):
                model(scale * IMAGES)
                features = taps.collect()
                torch.testing.assert_close(features["layer1"], expected)
                torch.testing.assert_close(features["layer2:in"], expected)
            features["layer1"].sum().backward()
        assert net.layer1[0].conv.weight.grad.abs().sum() > 0
        model(IMAGES)
        assert not taps._record.features


class TestHuggingFace:
    def test_layers_equal_the_hidden_states_that_the_model_reports(self):
        transformers = pytest.importorskip("transformers")
        config = transformers.BertConfig(
            vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, num_labels=3
        )
        model, ids = transformers.BertForSequenceClassification(config).eval(), torch.arange(8).view(2, 4)
        model(input_ids=ids, output_hidden_states=True)  # transformers installs hooks of its own and leaves them
        before = hooks_of(model)
        with FeatureTaps(model, ["bert.encoder.layer.*", "bert.embeddings", "bert.encoder"]) as taps:
            output = model(input_ids=ids, output_hidden_states=True)
            features = taps.collect()
        assert list(features) == ["bert.embeddings", "bert.encoder", "bert.encoder.layer.0", "bert.encoder.layer.1"]
        torch.testing.assert_close(features["bert.embeddings"], output.hidden_states[0])
        torch.testing.assert_close(features["bert.encoder.layer.0"], output.hidden_states[1])
        torch.testing.assert_close(features["bert.encoder"], output.hidden_states[2])
        assert hooks_of(model) == before
