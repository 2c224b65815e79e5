"""`report`: render one run's report again, or compare several runs."""

from collections.abc import Sequence
from pathlib import Path

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
    """Take run folders as plain words or as `run_dir=` and `runs=`."""
    from lightning_opt.config.compose import compose_config, plain, read_command_line
    from lightning_opt.config.hydra_entry import through_hydra

    flagged = any(word.startswith("-") for word in words)
    folders = [] if flagged else [word for word in words if "=" not in word]
    line = read_command_line([word for word in words if word not in folders], config_name="report")
    if line.flags:
        return through_hydra(line)
    config = plain(compose_config(line))
    folders += [config["run_dir"]] if config["run_dir"] else []
    return _report([Path(folder) for folder in [*folders, *config["runs"]]], config["out"])


def _report(folders: list[Path], out: str | None) -> int:
    from lightning_opt.errors import ConfigError
    from lightning_opt.reporting import render, render_comparison

    if not folders:
        raise ConfigError("run_dir has no value; name one run folder or several: lightning-opt report RUN [RUN ...]")
    if len(folders) == 1:
        written = render(folders[0])
    else:
        written = render_comparison(folders, Path(out) if out else folders[0].parent / "comparison")
    for path in written:
        print(path)
    return 0
