"""`lightning-opt COMMAND ...` and `python -m lightning_opt COMMAND ...`."""

import sys
from importlib import import_module

_COMMANDS = {
    "train": "train a model, with a teacher or alone, and measure it",
    "evaluate": "judge a finished run again, from its folder alone",
    "benchmark": "measure a finished run's models side by side",
    "export": "write a finished run's model for other engines",
    "report": "render one run's report, compare several, or show a sweep",
    "consolidate": "write a sharded checkpoint as one ordinary file",
}


def main(argv: list[str] | None = None) -> int:
    """Run the command that the first argument names; return its exit code."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print("usage: lightning-opt COMMAND [key=value ...]\n\ncommands:")
        print("\n".join(f"  {name:11} {does}" for name, does in _COMMANDS.items()))
        print("\nlightning-opt COMMAND --help says more.")
        return 0 if words else 2
    if words[0] not in _COMMANDS:
        print(f"lightning-opt: there is no command '{words[0]}'; choose from {', '.join(_COMMANDS)}", file=sys.stderr)
        return 2
    command = import_module(f"lightning_opt.cli.{words[0]}")
    return int(command.main(words[1:]))


if __name__ == "__main__":
    sys.exit(main())
