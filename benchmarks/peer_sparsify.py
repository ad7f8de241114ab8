"""eai-sparsify as a contender, run from its own environment.

Its Trainer is used as its README shows, with its default optimiser (signum), on one layer or, for a
job with several sites, on several layers of one pass. The language model is
loaded as stored, or in the job's dtype.
"""

from pathlib import Path

import numpy as np
import torch
from sparsify import SaeConfig, TrainConfig, Trainer
from sparsify.data import MemmapDataset
from transformers import AutoModel

from benchmarks import gate


def main():
    job, turns = gate.job(), gate.Gate()
    done = 0
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
        layers=[site - 1 for site in job.get("sites", [job["site"]])],
        exclude_tokens=job["special"],
        log_to_wandb=False,
        save_dir=str(folder),
        **options,
    )
    trainer = Trainer(cfg, MemmapDataset(str(binary), job["length"], dtype=np.uint32), model)

    def count_tokens(_module, args):
        nonlocal done
        turns.step(done)
        done += int(torch.isin(args[0], trainer.exclude_tokens, invert=True).sum())

    model.register_forward_pre_hook(count_tokens)
    coder = next(iter(trainer.saes.values()))  # of the first site

    def measure(path):
        averaged = [optimizer for optimizer in trainer.optimizers if hasattr(optimizer, "eval")]
        for optimizer in averaged:
            optimizer.eval()

        def reconstruct(h):
            acts, indices, _ = coder.encode(h)
            fired = torch.bincount(indices[acts != 0], minlength=coder.num_latents)
            return coder.decode(acts, indices), fired

        quality = gate.score(torch.load(path)[job["site"]], reconstruct)
        for optimizer in averaged:
            optimizer.train()
        return quality

    turns.measure = measure
    try:
        trainer.fit()
        turns.finished(done)
    except gate.Enough:
        pass


if __name__ == "__main__":
    main()
