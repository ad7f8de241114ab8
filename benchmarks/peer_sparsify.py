"""eai-sparsify as a contender, from its own environment: its Trainer as its README shows it, signum (its default), the language model as stored."""

from pathlib import Path

import numpy as np
import torch
from sparsify import SaeConfig, TrainConfig, Trainer
from sparsify.data import MemmapDataset
from transformers import AutoModel

from benchmarks import gate


def main():
    job, turns, done = gate.job(), gate.Gate(), 0
    folder = Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    binary = folder / f"rows-{job.get('dtype', 'auto')}.bin"
    rows = torch.load(job["rows"]).numpy()
    rows.astype(np.uint32).tofile(binary)
    dtype = getattr(torch, job["dtype"]) if "dtype" in job else "auto"
    model = AutoModel.from_pretrained(job["model_path"], dtype=dtype).to(job["device"])
    sae = SaeConfig(num_latents=job["latents"], k=job["k"])
    options = {"optimizer": job["optimizer"]} if "optimizer" in job else {}
    cfg = TrainConfig(
        sae,
        batch_size=job["batch"],
        layers=[job["site"] - 1],
        exclude_tokens=job["special"],
        log_to_wandb=False,
        save_dir=str(folder),
        **options,
    )
    trainer = Trainer(cfg, MemmapDataset(str(binary), job["length"], dtype=np.uint32), model)

    def step(_module, args):
        nonlocal done
        turns.step(done)
        done += int(torch.isin(args[0], trainer.exclude_tokens, invert=True).sum())

    model.register_forward_pre_hook(step)
    (coder,) = trainer.saes.values()

    def measure(path):
        averaged = [one for one in trainer.optimizers if hasattr(one, "eval")]
        for one in averaged:
            one.eval()

        def reconstruct(h):
            acts, indices, _ = coder.encode(h)
            return coder.decode(acts, indices), torch.bincount(
                indices[acts != 0], minlength=coder.num_latents
            )

        found = gate.score(torch.load(path)[job["site"]], reconstruct)
        for one in averaged:
            one.train()
        return found

    turns.measure = measure
    try:
        trainer.fit()
        turns.finished(done)
    except gate.Enough:
        pass


if __name__ == "__main__":
    main()
