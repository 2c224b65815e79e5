"""`check_loss` on the losses over features, and what the package of checkers loads."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_opt.losses import (
    CRD,
    AttentionTransfer,
    FitNets,
    HiddenStates,
    LogitMSE,
    MiniLMRelations,
    ReviewKD,
    RKDAngle,
    RKDDistance,
    Signals,
    SimilarityPreserving,
    Supervision,
)
from lightning_opt.testing import check_loss

ROOT = Path(__file__).resolve().parents[2]
B, T = 8, 5
LENGTHS = torch.tensor([5, 3, 1, 4, 5, 2, 5, 4])
TOKENS = torch.arange(T) < LENGTHS[:, None]


def pair(*shapes_of_two):
    """Two networks with features "a", "b", ...; one (student shape, teacher shape) for each."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        Signals(
            logits=torch.randn(B, 4, generator=generator),
            features={name: torch.randn(shape, generator=generator) for name, shape in zip("ab", shapes, strict=False)},
        )
        for shapes in zip(*shapes_of_two, strict=True)
    )
    return student, teacher


MAPS = ((B, 3, 8, 8), (B, 5, 8, 8))
DEEP = ((B, 4, 4, 4), (B, 7, 4, 4))
VECTORS = ((B, 6), (B, 9))
SEQUENCES = ((B, T, 6), (B, T, 8))

CASES = {
    "fitnets_maps": (FitNets({"a": "a"}), pair(MAPS)),
    "fitnets_tokens": (FitNets({"a": "a"}), pair(SEQUENCES)),
    "attention_transfer": (AttentionTransfer({"*": "*"}), pair(MAPS, DEEP)),
    "hidden_states_cosine": (HiddenStates({"a": "a"}, distance="cosine"), pair(SEQUENCES)),
    "hidden_states_mse": (HiddenStates({"a": "a"}, distance="mse"), pair(SEQUENCES)),
    "similarity_preserving": (SimilarityPreserving({"a": "a"}), pair(MAPS)),
    "similarity_of_tokens": (SimilarityPreserving({"a": "a"}), pair(SEQUENCES)),
    "review_kd": (ReviewKD({"*": "*"}), pair(MAPS, DEEP)),
    "rkd_distance": (RKDDistance({"a": "a"}), pair(VECTORS)),
    "rkd_distance_of_tokens": (RKDDistance({"a": "a"}), pair(SEQUENCES)),
    "rkd_angle": (RKDAngle({"a": "a"}), pair(VECTORS)),
    "crd": (CRD({"a": "a"}, n_data=20, n_negatives=6, feature_dim=5), pair(VECTORS)),
}


@pytest.mark.parametrize("name", CASES)
def test_behaves(name):
    loss, (student, teacher) = CASES[name]
    facts = Supervision(labels=torch.arange(B) % 4, index=torch.arange(B), token_mask=TOKENS)
    check_loss(loss, student, teacher, facts)


def test_minilm_behaves():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        Signals(
            logits=torch.zeros(B, 2),
            features={f"x.{name}": torch.randn(B, T, width, generator=generator) for name in "qkv"},
        )
        for width in (6, 8)
    )
    loss = MiniLMRelations({"x": "x"}, relation_heads=2, projections=list("qkv"))
    check_loss(loss, student, teacher, Supervision(token_mask=TOKENS))


@pytest.mark.parametrize("loss", [RKDDistance(None), RKDAngle(None)], ids=lambda loss: type(loss).__name__)
def test_relations_of_logits_behave(loss):
    student, teacher = pair(VECTORS)
    mask = torch.arange(B) % 4 > 0
    check_loss(loss, student, teacher, Supervision(mask=mask), zero_when_equal=True)


def test_the_checkers_load_neither_lightning_nor_each_other():
    script = (
        "import sys; import lightning_opt.testing as t; from lightning_opt.testing import check_loss; "
        "assert callable(t.check_loss); "
        "print([m for m in sys.modules if m.split('.')[0] in ('lightning', 'hydra', 'transformers') "
        "or m in ('lightning_opt.testing.models', 'lightning_opt.testing.resume')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"


def test_an_unknown_checker_is_an_attribute_error():
    import lightning_opt.testing as checkers

    with pytest.raises(AttributeError, match="check_nothing"):
        checkers.check_nothing  # noqa: B018


class TestFindings:
    """Faults of a loss that `check_loss` names."""

    def check(self, loss):
        student, teacher = pair(VECTORS)
        check_loss(loss, student, teacher, Supervision())

    def test_a_parameter_that_is_not_used(self):
        class Idle(LogitMSE):
            def __init__(self):
                super().__init__()
                self.idle = torch.nn.Parameter(torch.ones(()))

        with pytest.raises(AssertionError, match="Idle gives its own parameter idle no gradient"):
            self.check(Idle())

    def test_signals_that_are_changed_in_place(self):
        class Greedy(LogitMSE):
            def forward(self, student, teacher, supervision):
                value = super().forward(student, teacher, supervision)
                with torch.no_grad():
                    teacher.logits.zero_()
                return value

        student, teacher = pair(VECTORS)
        fresh = Signals(logits=teacher.logits.clone())
        with pytest.raises(AssertionError, match=r"Greedy (changes the tensors|is .* and then)"):
            check_loss(Greedy(), student, fresh, Supervision())

    def test_a_token_mask_that_is_not_read(self):
        class Blind(FitNets):
            def forward(self, student, teacher, supervision):
                return super().forward(student, teacher, Supervision())

        student, teacher = pair(SEQUENCES)
        with pytest.raises(AssertionError, match=r"Blind went from .* to nan when masked entries changed"):
            check_loss(Blind({"a": "a"}), student, teacher, Supervision(token_mask=TOKENS))
