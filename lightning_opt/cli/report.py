"""`report`: render one run's report again, compare several runs, or say what a sweep found."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_opt.cli import help as help_text
from lightning_opt.cli.guard import guarded


def main(argv: Sequence[str]) -> int:
    """Run the command line; return its exit code."""
    words = list(argv)
    if help_text.wanted(words):
        print(help_text.of_command("report"))
        return 0
    return guarded(lambda: _main(words))


def _main(words: list[str]) -> int:
    """Take folders as plain words or as `run_dir=` and `runs=`."""
    from lightning_opt.config.compose import compose_config, plain, read_command_line
    from lightning_opt.config.hydra_entry import through_hydra

    flagged = any(word.startswith("-") for word in words)
    folders = [] if flagged else [word for word in words if "=" not in word]
    line = read_command_line([word for word in words if word not in folders], config_name="report")
    if line.flags:
        return through_hydra(line)
    config = plain(compose_config(line))
    folders += [config["run_dir"]] if config["run_dir"] else []
    for path in _report([Path(folder) for folder in [*folders, *config["runs"]]], config):
        print(path)
    return 0


def _report(folders: list[Path], config: dict[str, Any]) -> tuple[Path, Path]:
    """Write the report that these folders are for, and return its two files."""
    from lightning_opt.errors import ConfigError
    from lightning_opt.reporting import render, render_comparison
    from lightning_opt.reporting.sweeps import is_sweep

    if not folders:
        raise ConfigError("run_dir has no value; name one run folder or several: lightning-opt report RUN [RUN ...]")
    limits = {name: value for name, value in config.items() if name.startswith(("max_", "min_")) and value is not None}
    if len(folders) == 1 and is_sweep(folders[0]):
        return _sweep(folders[0], limits)
    if limits:
        raise ConfigError(f"{next(iter(limits))} is for a sweep's report; {folders[0]} is no sweep (no sweep.json)")
    if len(folders) == 1:
        return render(folders[0])
    return render_comparison(folders, Path(config["out"]) if config["out"] else folders[0].parent / "comparison")


def _sweep(folder: Path, limits: dict[str, Any]) -> tuple[Path, Path]:
    from lightning_opt.errors import ConfigError
    from lightning_opt.reporting.sweeps_report import Limits, render_sweep

    for name, value in limits.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            raise ConfigError(f"{name}={value}: must be a number")
    return render_sweep(folder, Limits(**limits))
