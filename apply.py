"""Finds the contexts of each latent: `python apply.py --help`."""

from src.config import command, run_stage


def apply(cfg):
    from src.applier import Applier

    total, path = Applier(cfg).run()
    print(f"{total:,} latents with contexts: {path}")
    if total:
        print(f"next: {command('interpret')} {path} --engine heuristic --score detection fuzzing")


if __name__ == "__main__":
    raise SystemExit(run_stage("apply", apply))
