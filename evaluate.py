"""Measures trained sparse autoencoders: `python evaluate.py --help`."""

from src.config import run_stage


def evaluate(cfg):
    from src.evaluator import Evaluator

    result = Evaluator(cfg).run()
    if isinstance(result, float):
        print(f"Evaluation complete. {cfg.metric[0]}: {result:.4f}")


if __name__ == "__main__":
    raise SystemExit(run_stage("evaluate", evaluate))
