"""Losses between a student and a teacher, by family: logit, feature, relation, contrastive, sequence.

The functions that the classes are made of stand in the modules of each family.
"""

from lightning_opt.losses.base import DistillationLoss, Signals, Supervision
from lightning_opt.losses.contrastive import CRD
from lightning_opt.losses.correlation import DIST, MultiLevelKD
from lightning_opt.losses.feature import AttentionTransfer, FitNets, HiddenStates, SimilarityPreserving
from lightning_opt.losses.logit import DKD, KD, LogitMSE, SigmoidKD, StandardizedKD
from lightning_opt.losses.regression import BoundedRegressionKD, RegressionKD
from lightning_opt.losses.relation import MiniLMRelations, RKDAngle, RKDDistance
from lightning_opt.losses.review import ReviewKD
from lightning_opt.losses.sampling import OnPolicy, sample_continuations
from lightning_opt.losses.schedules import Constant, Cosine, Linear, Schedule, Step, value_at
from lightning_opt.losses.sequence import ForwardKL, GeneralizedJSD, ReverseKL, SkewKL, SkewReverseKL
from lightning_opt.losses.teachers import ConfidenceWeights, FixedWeights, TeacherWeights, combine_teachers
from lightning_opt.losses.terms import Term
from lightning_opt.losses.top_k import TopKKL, expand_top_k, top_k_kl, top_k_of

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
    "Schedule",
    "SigmoidKD",
    "Signals",
    "SimilarityPreserving",
    "SkewKL",
    "SkewReverseKL",
    "StandardizedKD",
    "Step",
    "Supervision",
    "TeacherWeights",
    "Term",
    "TopKKL",
    "combine_teachers",
    "expand_top_k",
    "sample_continuations",
    "top_k_kl",
    "top_k_of",
    "value_at",
]
