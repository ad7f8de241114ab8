"""Trains sparse autoencoders: `python train.py --help`."""

from src.config import run_stage


def train(cfg):
    from src.trainer import Trainer

    loss = Trainer(cfg).run()
    print(f"Training complete. Final loss: {loss:.4f}")


if __name__ == "__main__":
    raise SystemExit(run_stage("train", train))
