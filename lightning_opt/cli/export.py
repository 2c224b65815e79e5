"""`export`: write a finished run's model for other engines, each file read back and compared."""

import json
from collections.abc import Sequence
from typing import Any

from lightning_opt.cli import help as help_text
from lightning_opt.cli.guard import guarded


def main(argv: Sequence[str]) -> int:
    """Run the command line; return its exit code."""
    words = list(argv)
    if help_text.wanted(words):
        print(help_text.of_command("export"))
        return 0
    return guarded(lambda: _main(words))


def _main(words: list[str]) -> int:
    from lightning_opt.cli.finished import command

    return command("export", words, _export)


def _export(config: dict[str, Any]) -> int:
    """Load the run's model, write the formats into its artifact folder, and print what was written as JSON."""
    from lightning_opt.cli.finished import take_up
    from lightning_opt.cli.log import start_logging
    from lightning_opt.cli.measuring import deploy

    start_logging()
    run = take_up(config["run_dir"], trusted=config["trusted_targets"], data_values=config.get("data"))
    place = run.folder / "artifact"
    written = deploy(config, place, run.model, run.task, run.data, architecture=run.config["model"])
    print(json.dumps(written, indent=2))
    return 0
