"""Measure one model, or several side by side: quality, latency, operations, memory, size, energy, cost, fidelity."""

from lightning_opt.evaluation.cost import Price, cost_per_million
from lightning_opt.evaluation.fidelity import class_fidelity, label_fidelity, value_fidelity
from lightning_opt.evaluation.flops import Flops, count_flops
from lightning_opt.evaluation.latency import fixed_threads, time_interleaved
from lightning_opt.evaluation.measure import Measured, measure, measure_beside
from lightning_opt.evaluation.memory import peak_memory
from lightning_opt.evaluation.parameters import count_nonzero, count_parameters
from lightning_opt.evaluation.quality import collect_logits, evaluate
from lightning_opt.evaluation.size import safetensors_bytes

__all__ = [
    "Flops",
    "Measured",
    "Price",
    "class_fidelity",
    "collect_logits",
    "cost_per_million",
    "count_flops",
    "count_nonzero",
    "count_parameters",
    "evaluate",
    "fixed_threads",
    "label_fidelity",
    "measure",
    "measure_beside",
    "peak_memory",
    "safetensors_bytes",
    "time_interleaved",
    "value_fidelity",
]
