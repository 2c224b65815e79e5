"""`--help`, answered without importing anything heavy."""

from collections.abc import Sequence
from pathlib import Path

from lightning_opt.config.paths import conf_dir

_TRAIN = """usage: python train.py [+experiment=NAME] [group=option ...] [key=value ...]
       lightning-opt train ...        the same from an installed package, in any folder

Train a model, alone or from a teacher; test it, measure it beside its baseline, export it, and report.
The same command with the same run_dir=PATH goes on where a stopped run was. -m sweeps.

  python train.py +experiment=distill                      a teacher, the student alone, the distilled student
  python train.py +experiment=distill model=cnn seed=3     another student, another seed
  python train.py +experiment=distill run_dir=runs/mine    name the folder; run it again to resume
  python train.py +experiment=distill trainer.devices=2 strategy=ddp
  python train.py model._target_=my_pkg.Net data._target_=my_pkg.Data

keys:   seed task_name run_dir run_root baseline objective compile trusted_targets
        trainer.{max_epochs,max_steps,devices,accelerator,precision} data.batch_size optimizer.lr
        benchmark=false export=false switch a stage off
flags:  --cfg job (print the config)  --config-dir DIR (own options)  --config-name NAME  -m (sweep)  --hydra-help

groups and their options:
"""


_OTHERS = {
    "evaluate": """usage: lightning-opt evaluate run_dir=RUN [data.batch_size=N] [trusted_targets=[my_pkg.Net]]

Judge a finished run's model on its test set again and print the metrics as JSON. The run folder is all it needs.
Classes that are not lightning_opt's own are built only where trusted_targets names them exactly.""",
    "benchmark": """usage: lightning-opt benchmark run_dir=RUN [beside=[RUN,...]] [benchmark.threads=1]

Measure a finished run's model, and others beside it, interleaved in one process; print the measures as JSON.""",
    "export": """usage: lightning-opt export run_dir=RUN [export.formats=[onnx,openvino]]

Write a finished run's model into its artifact folder for other engines; each file is read back and compared.""",
    "report": """usage: lightning-opt report RUN [RUN ...] [out=FOLDER]
       lightning-opt report SWEEP [max_latency_ms=X] [max_size_bytes=N] [min_quality=X]

Render one run's report.html and report.md again from its folder, compare several runs, or show a sweep: its points, its
Pareto front, the best of them under limits, and the command that gives each again.""",
}


def of_command(name: str) -> str:
    """Return the help of a command other than `train`."""
    return f"{_OTHERS[name]}\n\n--cfg job prints the config that the words compose to."


def wanted(words: Sequence[str]) -> bool:
    """Tell whether the command line asks for help."""
    return "--help" in words or "-h" in words


def train() -> str:
    """Return the help of `train`, with every group and its options."""
    return _TRAIN + "\n".join(_groups(conf_dir()))


def _groups(conf: Path) -> list[str]:
    lines = []
    for group in sorted(folder for folder in conf.iterdir() if folder.is_dir() and not folder.name.startswith("_")):
        options = sorted(file.stem for file in group.glob("*.yaml"))
        if options:
            lines.append(f"  {group.name + ':':12} {' '.join(options)}")
    return lines
