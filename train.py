"""Run `python train.py +experiment=distill [key=value ...]`."""

import sys

from lightning_opt.cli.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
