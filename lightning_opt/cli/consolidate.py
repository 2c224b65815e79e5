"""`consolidate`: write a checkpoint of many files, as several processes write it, as one ordinary file."""

from collections.abc import Sequence

from lightning_opt.cli.guard import guarded

_HELP = """usage: lightning-opt consolidate CHECKPOINT [OUT]

Write a sharded checkpoint, such as runs/X/student/checkpoints/last.ckpt of a run under strategy=fsdp2, as the
ordinary single file that one process would have written (OUT; without it, last-consolidated.ckpt beside it). Every
file is checked first, no code is run, and the sharded one stays. Resuming does not need it: any strategy reads both."""


def main(argv: Sequence[str]) -> int:
    """Run the command line; return its exit code."""
    words = list(argv)
    if "--help" in words or "-h" in words:
        print(_HELP)
        return 0
    return guarded(lambda: _main(words))


def _main(words: list[str]) -> int:
    from lightning_opt.checkpointing.consolidate import consolidate
    from lightning_opt.errors import ConfigError

    odd = [word for word in words if word.startswith("-") or "=" in word]
    if not 1 <= len(words) <= 2 or odd:
        said = f"; {odd[0]!r} is neither" if odd else f", not {len(words)} words"
        raise ConfigError(f"consolidate takes a checkpoint and perhaps a new file{said}: {_HELP.splitlines()[0]}")
    print(consolidate(*words))
    return 0
