"""One case a loss: what of ours equals what of torchdistill's, on the same random tensors, and why not where not.

Each function takes a generator and returns a `Case`; both sides are functions of the same student tensors.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_opt.losses import (
    CRD,
    DIST,
    DKD,
    KD,
    AttentionTransfer,
    RKDAngle,
    RKDDistance,
    Signals,
    SimilarityPreserving,
    StandardizedKD,
    Supervision,
)
from lightning_opt.losses.review import hierarchical_context

LOGITS = ("head", "output", "head", "output")
BATCH, CLASSES = 16, 20


@dataclass(frozen=True, kw_only=True)
class Case:
    """Two functions of the same student tensors.

    Attributes:
        loss: Ours.
        peer: Theirs, with what it is called with.
        student: What the gradient is taken with respect to.
        ours: Our value.
        theirs: The other value.
        same: Whether the two definitions are one.
        note: What has to be said about the comparison.
    """

    loss: str
    peer: str
    student: list[Tensor]
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    same: bool = True
    note: str = ""


def normal(g: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=g, dtype=torch.float64)


def io(value: object, name: str = "head") -> dict:
    return {name: {"output": value}}


def logit_case(g: torch.Generator, *, ours: Callable, theirs: Callable, **words: Any) -> Case:
    teacher, labels = normal(g, BATCH, CLASSES, scale=3.0), torch.randint(CLASSES, (BATCH,), generator=g)
    return Case(
        student=[normal(g, BATCH, CLASSES, scale=3.0)],
        ours=lambda s: ours(Signals(logits=s), Signals(logits=teacher), Supervision(labels=labels)),
        theirs=lambda s: theirs(s, teacher, labels),
        **words,
    )


def peer_logits(loss: torch.nn.Module, *, factor: float = 1.0) -> Callable:
    return lambda s, t, labels: factor * loss(io(s), io(t), labels)


def kd(peer: ModuleType, g: torch.Generator) -> list[Case]:
    alone = peer.KDLoss(*LOGITS, temperature=4.0, alpha=0.0)
    both = peer.KDLoss(*LOGITS, temperature=4.0, alpha=0.3, beta=0.7)

    def mixed(s: Signals, t: Signals, known: Supervision) -> Tensor:
        assert known.labels is not None
        return 0.3 * F.cross_entropy(s.logits, known.labels) + 0.7 * KD(temperature=4.0)(s, t, known)

    words: dict[str, Any] = {"loss": "KD(temperature=4)", "same": True}
    return [
        logit_case(
            g,
            ours=KD(temperature=4.0),
            theirs=peer_logits(alone, factor=16.0),
            peer="16 * KDLoss(temperature=4, alpha=0)",
            note="with `alpha=0`, KDLoss leaves the factor T squared out",
            **words,
        ),
        logit_case(
            g,
            ours=mixed,
            theirs=peer_logits(both),
            peer="KDLoss(temperature=4, alpha=0.3, beta=0.7)",
            note="0.3 * cross-entropy + 0.7 * KD",
            **words,
        ),
    ]


def standardized(peer: ModuleType, g: torch.Generator) -> list[Case]:
    # z / std_unbiased = sqrt((C - 1) / C) * z / std: the same as a higher temperature.
    shrunk = 2.0 * math.sqrt(CLASSES / (CLASSES - 1))
    plain = peer.LogitStdKDLoss(*LOGITS, temperature=2.0, alpha=0.0)
    exact = peer.LogitStdKDLoss(*LOGITS, temperature=2.0, alpha=0.0, eps=0.0)

    def converted(s: Signals, t: Signals, known: Supervision) -> Tensor:
        return StandardizedKD(temperature=shrunk)(s, t, known) * (4.0 / shrunk**2)

    return [
        logit_case(
            g,
            loss="StandardizedKD(temperature=2)",
            peer="4 * LogitStdKDLoss(temperature=2)",
            ours=StandardizedKD(temperature=2.0),
            theirs=peer_logits(plain, factor=4.0),
            same=False,
            note="LogitStdKDLoss divides by the deviation over C - 1; the paper's algorithm 1 and ours over C",
        ),
        logit_case(
            g,
            loss="StandardizedKD(temperature=2 sqrt(C / (C - 1)))",
            peer="4 * LogitStdKDLoss(temperature=2, eps=0)",
            ours=converted,
            theirs=peer_logits(exact, factor=4.0),
            note="the same, once the temperature makes up for C against C - 1",
        ),
    ]


def dist(peer: ModuleType, g: torch.Generator) -> list[Case]:
    cases = []
    for tau, beta, gamma in ((1.0, 1.0, 1.0), (4.0, 2.0, 0.5)):
        loss = peer.DISTLoss(*LOGITS, beta=beta, gamma=gamma, tau=tau)
        cases.append(
            logit_case(
                g,
                loss=f"DIST(inter={beta:g}, intra={gamma:g}, temperature={tau:g})",
                peer=f"DISTLoss(beta={beta:g}, gamma={gamma:g}, tau={tau:g})",
                ours=DIST(inter=beta, intra=gamma, temperature=tau),
                theirs=peer_logits(loss),
                note="ours, as the authors, adds 1e-8 to the norms' product; DISTLoss bounds each norm from below",
            )
        )
    return cases


def layer_case(g: torch.Generator, *, ours: Callable, theirs: Callable, shapes: tuple, **words: Any) -> Case:
    teacher = normal(g, *shapes[1])
    t = Signals(logits=teacher, features={"b": teacher})
    return Case(
        student=[normal(g, *shapes[0])],
        ours=lambda s: ours(Signals(logits=s, features={"a": s}), t, Supervision()),
        theirs=lambda s: theirs(io(s, "a"), io(teacher, "b")),
        **words,
    )


def relations(peer: ModuleType, g: torch.Generator) -> list[Case]:
    layers = {"a": "b"}
    vectors = ((BATCH, 24), (BATCH, 32))
    maps = ((BATCH, 8, 6, 6), (BATCH, 12, 6, 6))
    rkd = {name: peer.RKDLoss("a", "b", *factors, "mean") for name, factors in (("d", (1.0, 0.0)), ("a", (0.0, 1.0)))}
    at = {"p": {"student": {"path": "a", "io": "output"}, "teacher": {"path": "b", "io": "output"}}}
    attention: dict[str, Any] = {
        "loss": "AttentionTransfer(power=2)",
        "ours": AttentionTransfer(layers),
        "shapes": maps,
    }
    similarity: dict[str, Any] = {"loss": "SimilarityPreserving", "ours": SimilarityPreserving(layers), "shapes": maps}
    return [
        layer_case(
            g,
            loss="RKDDistance",
            peer="RKDLoss(dist_factor=1, angle_factor=0)",
            ours=RKDDistance(layers),
            theirs=rkd["d"],
            shapes=vectors,
        ),
        layer_case(
            g,
            loss="RKDAngle",
            peer="RKDLoss(dist_factor=0, angle_factor=1)",
            ours=RKDAngle(layers),
            theirs=rkd["a"],
            shapes=vectors,
        ),
        layer_case(g, peer='ATLoss(mode="code")', theirs=peer.ATLoss(at, mode="code"), **attention),
        layer_case(
            g,
            peer='ATLoss(mode="paper")',
            theirs=peer.ATLoss(at, mode="paper"),
            same=False,
            note="mode paper adds up norms that are not squared; ours is the authors' code, the squared norm as a mean",
            **attention,
        ),
        layer_case(
            g,
            peer='SPKDLoss(reduction="batchmean")',
            theirs=peer.SPKDLoss("a", "b", "batchmean"),
            same=False,
            note="SPKDLoss divides rows by their L1 norm (`normalize(x, 1)`), the paper's equation 2 by the L2 norm",
            **similarity,
        ),
        layer_case(
            g,
            peer="formula of the paper (arXiv 1907.09682)",
            theirs=similarity_in_the_paper,
            note="equations 1 to 4 written out, row by row",
            **similarity,
        ),
    ]


def similarity_in_the_paper(student: dict, teacher: dict) -> Tensor:
    grams = []
    for x in (student["a"]["output"], teacher["b"]["output"]):
        rows = [torch.stack([(one * other).sum() for other in x]) for one in x]
        grams.append(torch.stack([row / row.square().sum().sqrt() for row in rows]))
    return (grams[0] - grams[1]).square().sum() / BATCH**2


def review(peer: ModuleType, g: torch.Generator) -> list[Case]:
    loss = peer.HierarchicalContextLoss("a", "output", "b", "output")
    cases = []
    for size in (16, 4):
        teacher = normal(g, 4, 6, size, size)
        cases.append(
            Case(
                loss=f"hierarchical_context (ReviewKD), {size} x {size}",
                peer="HierarchicalContextLoss",
                student=[normal(g, 4, 6, size, size)],
                ours=lambda s, teacher=teacher: hierarchical_context(s, teacher),
                theirs=lambda s, teacher=teacher: loss(io((s, None), "a"), io(teacher, "b")),
                note="maps that are not square differ: ours drops the levels above the shorter side, theirs looks at H",
            )
        )
    return cases


def crd(peer: ModuleType, g: torch.Generator, *, eps: float) -> list[Case]:
    """Two steps, so that the memory banks and the constant Z have been moved by the first."""
    # The temperature is a power of two: CRDLoss keeps it in float32.
    n_data, negatives, width, tau = 64, 32, 8, 0.0625
    ours = CRD({"a": "b"}, n_data=n_data, n_negatives=negatives, feature_dim=width, temperature=tau, by_class=False)
    theirs = peer.CRDLoss("a", "supp", "b", width, n_data, negatives, n_data, temperature=tau, eps=eps).double()
    student, teacher = normal(g, 2, BATCH, 24), normal(g, 2, BATCH, 32)
    ours.build(_signals("a", student[0]), _signals("b", teacher[0]))
    ours = ours.double()
    assert ours.embed_student is not None
    assert ours.embed_teacher is not None
    embed_student, embed_teacher = ours.embed_student, ours.embed_teacher
    # Theirs calls the bank of the student memory_v1.
    theirs.memory_v1.copy_(ours.bank_student)
    theirs.memory_v2.copy_(ours.bank_teacher)
    index = torch.stack([torch.randperm(n_data, generator=g)[:BATCH] for _ in range(2)])
    drawn = torch.randint(n_data, (2, BATCH, negatives), generator=g)

    def our_value(*students: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for step, s in enumerate(students):
            with mock.patch("lightning_opt.losses.contrastive.draw_negatives", return_value=drawn[step]):
                total = total + ours(_signals("a", s), _signals("b", teacher[step]), Supervision(index=index[step]))
        return total

    def their_value(*students: Tensor) -> Tensor:
        total = torch.zeros(1, dtype=torch.float64)
        for step, s in enumerate(students):
            chosen = torch.cat([index[step][:, None], drawn[step]], dim=1)
            embedded = F.normalize(embed_student(s), dim=1)
            answer = F.normalize(embed_teacher(teacher[step]), dim=1).detach()
            supp = {"supp": {"input": {"pos_idx": index[step], "contrast_idx": chosen}}}
            total = total + theirs({**io(embedded, "a"), **supp}, io(answer, "b"))
        return total.squeeze()

    return [
        Case(
            loss="CRD, two steps",
            peer=f"CRDLoss(eps={eps:g})",
            student=list(student),
            ours=our_value,
            theirs=their_value,
            same=eps == 0.0,
            note="both are given the same negatives, embeddings and first banks"
            if eps == 0.0
            else "CRDLoss adds 1e-7 to each of the N + 1 denominators; the paper's h has none, nor has ours",
        )
    ]


def dkd(g: torch.Generator) -> list[Case]:
    """torchdistill has no DKD: the paper's equations 4 to 7, written out with the target class cut away."""
    tau, alpha, beta = 4.0, 1.0, 8.0

    def paper(s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        p, q = ((z / tau).softmax(dim=1) for z in (t, s))
        rows, others = torch.arange(len(s)), ~F.one_hot(labels, s.shape[1]).bool()
        p_t, q_t = p[rows, labels], q[rows, labels]
        tckd = p_t * (p_t / q_t).log() + (1 - p_t) * ((1 - p_t) / (1 - q_t)).log()
        p_hat, q_hat = ((z[others].view(len(s), -1) / tau).softmax(dim=1) for z in (t, s))
        nckd = (p_hat * (p_hat / q_hat).log()).sum(dim=1)
        return (tau**2 * (alpha * tckd + beta * nckd)).mean()

    return [
        logit_case(
            g,
            loss="DKD(alpha=1, beta=8, temperature=4)",
            peer="formula of the paper (arXiv 2203.08679)",
            ours=DKD(alpha=alpha, beta=beta, temperature=tau),
            theirs=paper,
            note="torchdistill has no DKD; T squared as in its authors' code",
        )
    ]


def _signals(name: str, feature: Tensor) -> Signals:
    return Signals(logits=feature, features={name: feature})


def all_cases(peer: ModuleType, g: torch.Generator) -> list[Case]:
    """Return every case, on tensors drawn from `g`."""
    return [
        *kd(peer, g),
        *standardized(peer, g),
        *dist(peer, g),
        *relations(peer, g),
        *crd(peer, g, eps=0.0),
        *crd(peer, g, eps=1e-7),
        *review(peer, g),
        *dkd(g),
    ]
