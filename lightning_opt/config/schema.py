"""Which plain keys there are, what they hold and in which range.

Nodes with a `_target_` are checked against the class they name; this table is for the rest, and for ranges.
"""

import ast
from dataclasses import dataclass


@dataclass(frozen=True)
class Key:
    """One key: its type as an annotation, its range, and one value outside of that, such as -1 for no limit."""

    type: str
    low: float | None = None
    high: float | None = None
    exclusive: bool = False
    also: float | None = None

    @property
    def annotation(self) -> ast.expr:
        """Return the type as a syntax tree."""
        return ast.parse(self.type, mode="eval").body


NODE = Key("dict | None")

# Plain nodes by their path; "*" stands for any name the user chooses.
PLAIN: dict[str, dict[str, Key]] = {
    "": {
        "seed": Key("int", low=0, high=2**32 - 1),
        "task_name": Key("str"),
        "run_dir": Key("str | None"),
        "run_root": Key("str"),
        "tags": Key("list[str]"),
        "objective": Key("str | list[str] | None"),
        "baseline": Key("bool"),
        "start_from": Key("str | None"),
        "compile": Key("bool"),
        "ckpt_path": Key("str | None"),
        "trusted_targets": Key("list[str]"),
        "vars": Key("dict"),
        **dict.fromkeys(
            (
                "task",
                "data",
                "model",
                "teacher",
                "loss",
                "pruner",
                "quantizer",
                "optimizer",
                "scheduler",
                "trainer",
                "strategy",
                "callbacks",
                "logger",
                "benchmark",
                "export",
                "diagnose",
                "paths",
                "launch",
                "sweep",
            ),
            NODE,
        ),
    },
    "teacher": {
        "model": NODE,
        "run_dir": Key("str | None"),
        "weights": Key("str | None"),
        "members": Key("int", low=1, high=16),
        "preprocess": NODE,
        "dtype": Key("Literal['float32', 'bfloat16', 'float16', 'int8'] | None"),
        "placement": Key("Literal['replicated', 'sharded', 'tensor_parallel', 'pipeline', 'ranks'] | None"),
        "ranks": Key("int | None", low=2),
        "compile": Key("bool"),
        "channels_last": Key("bool"),
        "cache": NODE,
        "weighting": NODE,
        "init_student": Key("dict[str, str] | None"),
        "train": Key("dict | bool | None"),
    },
    "teacher.cache": {
        "outputs": Key("Literal['full', 'top_k']"),
        "k": Key("int", low=1),
        "batch_size": Key("int", low=1),
        "average_versions": Key("int | None", low=1),
        "data": Key("dict | None"),
    },
    "teacher.train": {
        "max_epochs": Key("int | None", low=1, also=-1),
        "max_steps": Key("int | None", low=1, also=-1),
        "seed": Key("int | None", low=0),
        "optimizer": NODE,
        "scheduler": NODE,
        "data": Key("dict | None"),
        "teacher": NODE,
        "loss": NODE,
    },
    "loss": {
        "task_weight": Key("float | dict", low=0),
        "terms": Key("dict | None"),
        "sampling": NODE,
    },
    "benchmark": {
        "batch_sizes": Key("list[int]", low=1),
        "threads": Key("int | None", low=1),
        "max_seconds": Key("float", low=0, exclusive=True),
        "rounds": Key("int", low=1),
        "engines": Key("list[str] | str"),
        "price_per_hour": Key("float | None", low=0),
        "currency": Key("str"),
        "utilisation": Key("float", low=0, high=1, exclusive=True),
    },
    "export": {
        "formats": Key("list[str] | str"),
        "schemes": Key("list[str]"),
    },
    "paths": {"cache_dir": Key("str")},
    "callbacks": {"*": NODE},
    "logger": {"*": NODE},
    "loss.terms": {"*": NODE},
    "teacher.train.loss.terms": {"*": NODE},
}

# Ranges of well-known arguments of classes, by glob; the classes check the rest when they are built.
RANGES: dict[str, Key] = {
    "data.batch_size": Key("int", low=1),
    "data.eval_batch_size": Key("int | None", low=1),
    "data.num_workers": Key("int", low=0),
    "optimizer.lr": Key("float", low=0, exclusive=True),
    "optimizer.weight_decay": Key("float", low=0),
    "optimizer.momentum": Key("float", low=0, high=1),
    "quantizer.calibration_samples": Key("int", low=1),
    "quantizer.max_drop": Key("float | None", low=0, exclusive=True),
    "pruner.sparsity": Key("float", low=0, high=1, exclusive=True),
    "scheduler.warmup_fraction": Key("float", low=0, high=1),
    "trainer.max_epochs": Key("int | None", low=-1),
    "trainer.max_steps": Key("int", low=-1),
    "trainer.accumulate_grad_batches": Key("int", low=1),
    "trainer.gradient_clip_val": Key("float | None", low=0),
    "trainer.log_every_n_steps": Key("int", low=1),
    "task.num_outputs": Key("int", low=1),
    "loss.terms.*.loss.temperature": Key("float | dict", low=0, exclusive=True),
    "loss.terms.*.weight": Key("float | dict", low=0),
}
