"""The distillation module: what is trained, what is saved, what is refused, and that the gradient is the right one."""

import copy
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_opt.errors import ConfigError
from lightning_opt.losses import KD, FitNets, FixedWeights, Linear, OnPolicy, Term
from lightning_opt.modules import Distillation, Supervised, Teacher
from lightning_opt.modules.teacher import Ensemble
from lightning_opt.tasks import Classification, LanguageModeling, Regression

TASK = Classification(num_outputs=3)


def net(width, seed=0, outputs=3):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(width, outputs)
    )


def loader(n=32, batch=8):
    g = torch.Generator().manual_seed(3)
    return DataLoader(TensorDataset(torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g)), batch)


def fit(module, **options):
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, loader())
    return trainer


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.mark.support(method="distil_logit", strategy="one", feature="trains")
def test_one_step_equals_the_formula_by_hand():
    student, teacher = net(5), net(9, seed=1)
    student[3].p = 0.0
    before = copy.deepcopy(student)
    module = Distillation(
        student, teacher, task=TASK, losses=[Term(KD(temperature=2.0), weight=0.7)], task_weight=0.3, optimizer=sgd
    )
    fit(module, limit_train_batches=1, max_steps=1)

    x, y = next(iter(loader()))
    teacher.eval()
    before.train()
    with torch.no_grad():
        q = (teacher(x) / 2.0).softmax(-1)
    logits = before(x)
    kd = (q * (q.log() - (logits / 2.0).log_softmax(-1))).sum(-1).mean() * 4.0
    (0.3 * F.cross_entropy(logits, y) + 0.7 * kd).backward()
    for new, old in zip(student.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), old.detach() - 0.1 * old.grad, atol=1e-6, rtol=1e-5)


def test_teacher_never_changes_and_is_nowhere_in_the_module():
    teacher = net(9, seed=1)
    before = copy.deepcopy(teacher.state_dict())
    module = Distillation(net(5), teacher, task=TASK, losses=[KD()], optimizer=sgd)
    fit(module)
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    ours = {id(p) for p in module.parameters()}
    assert not ours & {id(p) for p in teacher.parameters()}
    assert all(key.startswith(("model.",)) for key in module.state_dict())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.training


def test_projectors_are_trained_and_saved_but_are_not_the_model():
    module = Distillation(net(5), net(9, seed=1), task=TASK, losses=[FitNets(layers={"0": "0"})], optimizer=sgd)
    torch.manual_seed(0)
    trainer = fit(module, limit_train_batches=2)
    saved = trainer._checkpoint_connector.dump_checkpoint(False)
    extra = [key for key in saved["state_dict"] if not key.startswith("model.")]
    assert extra
    assert all(key.startswith("terms.") for key in extra)
    in_optimizer = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert {id(p) for p in module.terms.parameters()} <= in_optimizer
    assert not any(key.startswith("terms") for key in module.model.state_dict())


def test_building_moves_neither_random_state_nor_batch_statistics():
    module = Distillation(net(5), net(9, seed=1), task=TASK, losses=[FitNets(layers={"0": "0"})], optimizer=sgd)
    statistics = module.model[1].running_mean.clone()
    example = TASK.read(next(iter(loader())))
    state = torch.get_rng_state()
    module.build(example)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(module.model[1].running_mean, statistics)
    assert module.model.training


def test_taps_are_gone_after_the_fit():
    student, teacher = net(5), net(9, seed=1)
    fit(Distillation(student, teacher, task=TASK, losses=[FitNets(layers={"0": "0"})], optimizer=sgd))
    for model in (student, teacher):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_weights_follow_their_schedules():
    module = Distillation(
        net(5), net(9, seed=1), task=TASK, losses=[Term(KD(), weight=Linear(0.0, 1.0))], task_weight=Linear(1.0, 0.0)
    )
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(pl_module.progress)

    fit(module, callbacks=[Watch()])
    assert seen == [step / 8 for step in range(8)]


def test_another_number_of_classes_is_refused_by_name():
    module = Distillation(net(5), Teacher(net(9, outputs=5), name="big"), task=TASK, losses=[KD()])
    with pytest.raises(ConfigError, match=r"big answers with shape \(8, 5\)"):
        fit(module)


def test_a_tap_that_matches_nothing_lists_near_names():
    module = Distillation(net(5), net(9), task=TASK, losses=[FitNets(layers={"layer9": "0"})])
    with pytest.raises(ConfigError, match="layer9"):
        fit(module)


def test_a_student_larger_than_its_teacher_is_a_warning():
    module = Distillation(net(50), net(9), task=TASK, losses=[KD()])
    with pytest.warns(UserWarning, match="larger than its teacher"):
        module.build(TASK.read(next(iter(loader()))))


@pytest.mark.parametrize(("teacher", "losses"), [([], [KD()]), (net(9), [])])
def test_nothing_to_learn_from_is_refused(teacher, losses):
    with pytest.raises(ValueError, match="empty"):
        Distillation(net(5), teacher, task=TASK, losses=losses)


def test_two_teachers_count_as_their_weights_say():
    first, second = net(9, seed=1), net(9, seed=2)
    x, y = next(iter(loader()))
    module = Distillation(
        net(5), [first, second], task=TASK, losses=[KD()], weighting=FixedWeights([3.0, 1.0]), optimizer=sgd
    )
    example = TASK.read((x, y))
    from lightning_opt.losses import Supervision

    together = module._ask(example, Supervision(labels=y)).logits
    by_hand = 0.75 * first.eval()(x).softmax(-1) + 0.25 * second.eval()(x).softmax(-1)
    torch.testing.assert_close(together.softmax(-1), by_hand)
    fit(module)


def test_ensemble_averages_probabilities_and_numbers():
    first, second = net(9, seed=1).eval(), net(9, seed=2).eval()
    x, _ = next(iter(loader()))
    mean = (first(x).softmax(-1) + second(x).softmax(-1)) / 2
    torch.testing.assert_close(Ensemble([first, second])(x).softmax(-1), mean)
    from lightning_opt.modules.matching import mix_of

    numbers = Ensemble([first, second], mix=mix_of(Regression(num_outputs=3)))(x)
    torch.testing.assert_close(numbers, (first(x) + second(x)) / 2)


def test_teacher_in_half_precision_answers_in_float32_and_keeps_the_given_network():
    model = net(9)
    teacher = Teacher(model, dtype="bfloat16")
    x, _ = next(iter(loader()))
    answer = teacher(x).logits
    assert answer.dtype == torch.float32
    assert next(model.parameters()).dtype == torch.float32
    torch.testing.assert_close(answer, model.eval()(x), atol=0.1, rtol=0.1)
    assert not torch.equal(answer, model(x))
    with pytest.raises(ValueError, match="int3"):
        Teacher(model, dtype="int3")


def test_channels_last_answers_alike_and_leaves_the_callers_network_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4))
    x = torch.randn(5, 3, 8, 8)
    seen = []
    plain, fast = Teacher(model), Teacher(model, channels_last=True)
    fast.answering[0].register_forward_hook(lambda _, given, out: seen.extend([given[0], out]))
    torch.testing.assert_close(fast(x).logits, plain(x).logits, rtol=1e-5, atol=1e-5)
    assert all(value.is_contiguous(memory_format=torch.channels_last) for value in seen)
    assert len(seen) == 2
    assert model[0].weight.is_contiguous()
    assert torch.equal(fast(x).logits, fast(x.contiguous(memory_format=torch.channels_last)).logits)


def test_teacher_preprocesses_for_itself():
    model = net(9)
    x, _ = next(iter(loader()))
    torch.testing.assert_close(Teacher(model, preprocess=lambda t: t * 0.5)(x).logits, model.eval()(x * 0.5))


class Tokens(nn.Module):
    def __init__(self, vocabulary=7, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(vocabulary, 8)
        self.head = nn.Linear(8, vocabulary)

    def forward(self, input_ids):
        return self.head(self.table(input_ids))


def test_masked_tokens_and_on_policy_samples_train():
    task = LanguageModeling(num_outputs=7)
    ids = torch.randint(7, (16, 6), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    data = DataLoader(TensorDataset(ids, labels), 4)
    student = Tokens()
    before = copy.deepcopy(student.state_dict())
    module = Distillation(
        student,
        Tokens(seed=1),
        task=task,
        losses=[KD(temperature=1.0)],
        sampling=OnPolicy(fraction=1.0, prompt_length=2),
        optimizer=sgd,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    assert any(not torch.equal(value, before[name]) for name, value in student.state_dict().items())
    # what the student wrote itself is not taught to it as true: no loss on labels was computed
    assert "train/loss_task" not in trainer.callback_metrics


def test_processes_that_share_a_batch_write_the_same_samples(monkeypatch):
    """The stages of a pipeline, or the pieces of a layer, see the same samples: theirs is one data rank."""
    asked = []
    sampling = OnPolicy(fraction=1.0, prompt_length=2)
    monkeypatch.setattr(sampling, "mix", lambda inputs, labels, *_, rank, **__: asked.append(rank) or (inputs, labels))
    module = Distillation(
        Tokens(), Tokens(seed=1), task=LanguageModeling(num_outputs=7), losses=[KD()], sampling=sampling
    )
    ids = torch.zeros(2, 6, dtype=torch.long)
    for rank in (0, 3):
        kwargs = {"rank": rank // 2, "num_replicas": 2}
        trainer = SimpleNamespace(distributed_sampler_kwargs=kwargs, global_rank=rank, global_step=0)
        module._trainer = module._fabric = None
        monkeypatch.setattr(Distillation, "trainer", trainer, raising=False)
        module._sampled(module.task.read((ids, ids)))
    assert asked == [0, 1]


@pytest.mark.support(method="supervised", strategy="one", feature="trains")
def test_supervised_equals_a_plain_loop():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    plain = copy.deepcopy(model)
    fit(Supervised(model, task=TASK, optimizer=sgd))
    optimizer = sgd(plain.parameters())
    for _ in range(2):
        for x, y in loader():
            optimizer.zero_grad()
            F.cross_entropy(plain(x), y).backward()
            optimizer.step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
