"""SAELens as a contender, run from its own environment.

Its training runner trains a TopK with its defaults on rows that were tokenised before; for a job
with several sites its MultiSAETrainingRunner trains one TopK a site from one pass. The language
model is loaded through its AutoModelForCausalLM class, in the job's dtype or as stored, and ends
after the hooked block. Of the options that its configuration names for speed, autocast is tried.
On a CPU torch.compile takes minutes, and sparse activations fail (aten::view).
"""

import torch
from datasets import Dataset
from sae_lens import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    TopKTrainingSAEConfig,
)
from sae_lens.multi_sae_training_runner import (
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
)
from sae_lens.training.sae_trainer import SAETrainer

from benchmarks import gate


def runner_of(job, dataset):
    """Return the runner of one SAE, or of one SAE for each of the job's sites."""

    def sae():
        return TopKTrainingSAEConfig(d_in=job["hidden"], d_sae=job["latents"], k=job["k"])

    def hook(site):
        return f"model.layers.{site - 1}"

    options = {
        "model_name": job["model_path"],
        "model_class_name": "AutoModelForCausalLM",
        "context_size": job["length"],
        "streaming": False,
        "exclude_special_tokens": True,
        "training_tokens": job["tokens"],
        "train_batch_size_tokens": job["batch"] * job["length"],
        "store_batch_size_prompts": job["batch"],
        "n_batches_in_buffer": max(16, job["batch"]),
        "device": job["device"],
        "autocast": job.get("autocast", False),
        "logger": LoggingConfig(log_to_wandb=False),
        "checkpoint_path": None,
        "output_path": None,
        "model_from_pretrained_kwargs": {"dtype": job["dtype"]} if "dtype" in job else {},
    }
    if "sites" in job:
        saes = {str(site): sae() for site in job["sites"]}
        hooks = {str(site): hook(site) for site in job["sites"]}
        cfg = MultiSAETrainingRunnerConfig(saes=saes, hook_names=hooks, **options)
        return MultiSAETrainingRunner(cfg, override_dataset=dataset)
    cfg = LanguageModelSAERunnerConfig(
        sae=sae(), hook_name=hook(job["site"]), is_dataset_tokenized=True, **options
    )
    return LanguageModelSAETrainingRunner(cfg, override_dataset=dataset)


def main():
    job, turns = gate.job(), gate.Gate()
    done, coder = 0, None
    rows = torch.load(job["rows"])
    trainer_step = SAETrainer.step

    def counted_step(self, batch):
        nonlocal done, coder
        if coder is None:
            coder = self.sae
        if self.sae is coder:  # the first of several SAEs, which all take the same tokens
            turns.step(done)
            done += len(batch)
        return trainer_step(self, batch)

    SAETrainer.step = counted_step

    def measure(path):
        def reconstruct(h):
            code = coder.encode(h)
            return coder.decode(code), (code.to_dense() != 0).sum(0)

        return gate.score(torch.load(path)[job["site"]], reconstruct)

    turns.measure = measure
    dataset = Dataset.from_dict({"input_ids": rows.tolist()})
    try:
        runner_of(job, dataset).run()
        turns.finished(done)
    except gate.Enough:
        pass


if __name__ == "__main__":
    main()
