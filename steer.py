"""Continues texts with latents edited: `python steer.py --help`."""

from src.config import run_stage


def steer(cfg):
    from src.steerer import Steerer

    Steerer(cfg).run()


if __name__ == "__main__":
    raise SystemExit(run_stage("steer", steer))
