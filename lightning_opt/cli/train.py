"""`train`: build -> fit -> test -> benchmark -> export -> report -> return the objective(s)."""

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_opt.cli import help as help_text
from lightning_opt.cli.guard import guarded
from lightning_opt.cli.log import start_logging
from lightning_opt.config.paths import import_from_here
from lightning_opt.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    import_from_here()
    if help_text.wanted(words):
        print(help_text.train())
        return 0
    return guarded(lambda: _run(words), debug=any(word.startswith(("debug=", "+debug=")) for word in words))


def _run(words: list[str]) -> int:
    """Compose and check first: nothing heavy is imported, nothing is created, until the config can work."""
    from lightning_opt.config import compose, launch
    from lightning_opt.config.checks import check
    from lightning_opt.config.hydra_entry import sweep, through_hydra

    if (folder := launch.folder_of_parent()) is not None:
        return _as_rank(folder)
    line = compose.read_command_line(words, config_name="train")
    if line.flags:
        return through_hydra(line)
    if launch.launched_from_outside():
        if line.multirun:
            raise ConfigError("-m: a sweep starts its own processes; give the command without a launcher")
        if launch.rank() > 0:
            named = None if launch.has_store() else compose.plain(compose.compose_config(line)).get("run_dir")
            return _as_rank(launch.wait_for_folder(named))
    if line.multirun:
        return sweep(line, run_one=lambda config, yaml: _job(config, yaml, words))
    composed = compose.compose_config(line)
    config = compose.plain(composed)
    warnings = check(config)
    _job(config, compose.unresolved_yaml(composed), words, warnings=warnings)
    return 0


def _job(config: dict[str, Any], yaml: str, words: list[str], *, warnings: Sequence[str] = ()) -> Any:
    """Run one job from a checked config; return its objective(s)."""
    start_logging()
    with _collector_off():
        from lightning_opt.cli.rehearsal import rehearse

        rehearse(config)
        from lightning_opt.cli import job  # with Lightning, which a refusal need not wait for

    return job.run(config, yaml=yaml, command=[*_program(), *words], warnings=warnings)


@contextmanager
def _collector_off() -> Iterator[None]:
    """Look for no garbage meanwhile: what imports make is none, and looking takes a fifth of their time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _program() -> list[str]:
    """Return the words before the arguments, as a person would type them again."""
    name = Path(sys.argv[0]).name
    return ["python", name] if name == "train.py" else ["lightning-opt", "train"]


def _as_rank(folder: Path) -> int:
    """Run as another rank of a job that is already running: its config, its folder, nothing else."""
    from lightning_opt.cli import job

    job.run_as_rank(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
