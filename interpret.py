"""Names latents from their contexts: `python interpret.py --help`."""

from src.config import run_stage


def interpret(cfg):
    from src.interpreter import Interpreter

    Interpreter(cfg).run()


if __name__ == "__main__":
    raise SystemExit(run_stage("interpret", interpret))
