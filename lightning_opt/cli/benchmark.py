"""`benchmark`: measure a finished run's model, alone or beside others, interleaved in one process."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_opt.cli import help as help_text
from lightning_opt.cli.guard import guarded


def main(argv: Sequence[str]) -> int:
    """Run the command line; return its exit code."""
    words = list(argv)
    if help_text.wanted(words):
        print(help_text.of_command("benchmark"))
        return 0
    return guarded(lambda: _main(words))


def _main(words: list[str]) -> int:
    from lightning_opt.cli.finished import command

    return command("benchmark", words, _benchmark)


def _benchmark(config: dict[str, Any]) -> int:
    """Load the models, measure them side by side, and print the measures as JSON."""
    from lightning_opt.cli.finished import take_up
    from lightning_opt.cli.judging import example_of
    from lightning_opt.cli.log import start_logging
    from lightning_opt.cli.measuring import benchmark_options
    from lightning_opt.evaluation import measure
    from lightning_opt.export import load

    start_logging()
    run = take_up(config["run_dir"], trusted=config["trusted_targets"])
    models = {Path(config["run_dir"]).name: run.model}
    for other in config["beside"]:
        models[Path(other).name] = load(Path(other), trusted_targets=tuple(config["trusted_targets"]))
    options = benchmark_options(config.get("benchmark") or {})
    print(json.dumps(measure(models, example_of(run.data), **options), indent=2))
    return 0
