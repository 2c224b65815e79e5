"""One rank of a job whose folder and config are there: `main` runs in a process that a launcher has started."""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_opt.cli.guard import guarded
from lightning_opt.config import launch, ranks
from lightning_opt.config.launchers import exposed
from lightning_opt.config.processes import die_with_parent


def main(argv: Sequence[str] | None = None) -> int:
    """Run this process's part in the job of a run folder, the first word; return the exit code."""
    folder = Path((sys.argv if argv is None else ["", *argv])[-1])
    die_with_parent()
    try:
        return guarded(lambda: run_rank(folder))
    except SystemExit as end:
        # torchrun would start ranks again that were asked to stop; who started torchrun has been told the code
        if ranks.is_supervised() and launch.is_of_torchrun() and end.code in ranks.STOPPED:
            return 0
        raise


def run_rank(folder: Path) -> int:
    """Run this process's part: rank 0 measures, records and reports, the others train along with it."""
    config = json.loads((folder / ".hydra" / "resolved.json").read_text(encoding="utf-8"))
    from lightning_opt.cli import job

    if launch.rank() > 0:
        job.run_as_rank(folder)
        return 0
    place = folder / ".hydra"
    command = shlex.split((place / "command.txt").read_text(encoding="utf-8"))
    yaml = (place / "config.yaml").read_text(encoding="utf-8")
    warnings = place / "warnings.json"
    said = json.loads(warnings.read_text(encoding="utf-8")) if warnings.is_file() else []
    job.run(config, yaml=yaml, command=command, warnings=list(dict.fromkeys([*said, *exposed()])))
    return 0
