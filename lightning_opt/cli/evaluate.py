"""`evaluate`: judge a finished run again; its folder is all it needs."""

import json
from collections.abc import Sequence
from typing import Any

from lightning_opt.cli import help as help_text
from lightning_opt.cli.guard import guarded


def main(argv: Sequence[str]) -> int:
    """Run the command line; return its exit code."""
    words = list(argv)
    if help_text.wanted(words):
        print(help_text.of_command("evaluate"))
        return 0
    return guarded(lambda: _main(words))


def _main(words: list[str]) -> int:
    from lightning_opt.cli.finished import command

    return command("evaluate", words, _evaluate)


def _evaluate(config: dict[str, Any]) -> int:
    """Rebuild the run, test its model, and print the metrics as one line of JSON."""
    from lightning_opt.cli.finished import take_up
    from lightning_opt.cli.judging import quality_of
    from lightning_opt.cli.log import start_logging
    from lightning_opt.forward import predict

    start_logging()
    run = take_up(config["run_dir"], trusted=config["trusted_targets"], data_values=config.get("data"))
    print(json.dumps(quality_of(lambda inputs: predict(run.model, inputs), run.task, run.data)))
    return 0
