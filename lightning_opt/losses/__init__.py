"""Losses between a student and a teacher, by family: logit, feature, relation, contrastive, sequence."""

from lightning_opt.losses.base import DistillationLoss, Signals, Supervision
from lightning_opt.losses.contrastive import CRD
from lightning_opt.losses.correlation import DIST, MultiLevelKD
from lightning_opt.losses.feature import AttentionTransfer, FitNets, HiddenStates, SimilarityPreserving
from lightning_opt.losses.logit import DKD, KD, LogitMSE, SigmoidKD, StandardizedKD
from lightning_opt.losses.regression import BoundedRegressionKD, RegressionKD
from lightning_opt.losses.relation import MiniLMRelations, RKDAngle, RKDDistance
from lightning_opt.losses.review import ReviewKD
from lightning_opt.losses.sampling import OnPolicy, sample_continuations
from lightning_opt.losses.schedules import Constant, Cosine, Linear, Step, value_at
from lightning_opt.losses.sequence import ForwardKL, GeneralizedJSD, ReverseKL, SkewKL, SkewReverseKL
from lightning_opt.losses.teachers import ConfidenceWeights, FixedWeights, combine_teachers
from lightning_opt.losses.terms import Term
from lightning_opt.losses.top_k import TopKKL

__all__ = [
    "CRD",
    "DIST",
    "DKD",
    "KD",
    "AttentionTransfer",
    "BoundedRegressionKD",
    "ConfidenceWeights",
    "Constant",
    "Cosine",
    "DistillationLoss",
    "FitNets",
    "FixedWeights",
    "ForwardKL",
    "GeneralizedJSD",
    "HiddenStates",
    "Linear",
    "LogitMSE",
    "MiniLMRelations",
    "MultiLevelKD",
    "OnPolicy",
    "RKDAngle",
    "RKDDistance",
    "RegressionKD",
    "ReverseKL",
    "ReviewKD",
    "SigmoidKD",
    "Signals",
    "SimilarityPreserving",
    "SkewKL",
    "SkewReverseKL",
    "StandardizedKD",
    "Step",
    "Supervision",
    "Term",
    "TopKKL",
    "combine_teachers",
    "sample_continuations",
    "value_at",
]
