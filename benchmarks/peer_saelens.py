"""SAELens as a contender, run from its own environment.

Its training runner trains a TopK with its defaults on rows that were tokenised before. The language
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
from sae_lens.training.sae_trainer import SAETrainer

from benchmarks import gate


def main():
    job, turns = gate.job(), gate.Gate()
    done, coder = 0, None
    rows = torch.load(job["rows"])
    step_tokens = job["batch"] * job["length"]
    cfg = LanguageModelSAERunnerConfig(
        sae=TopKTrainingSAEConfig(d_in=job["hidden"], d_sae=job["latents"], k=job["k"]),
        model_name=job["model_path"],
        model_class_name="AutoModelForCausalLM",
        hook_name=f"model.layers.{job['site'] - 1}",
        context_size=job["length"],
        is_dataset_tokenized=True,
        streaming=False,
        exclude_special_tokens=True,
        training_tokens=job["tokens"],
        train_batch_size_tokens=step_tokens,
        store_batch_size_prompts=job["batch"],
        n_batches_in_buffer=max(16, job["batch"]),
        device=job["device"],
        autocast=job.get("autocast", False),
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=None,
        model_from_pretrained_kwargs={"dtype": job["dtype"]} if "dtype" in job else {},
    )
    trainer_step = SAETrainer.step

    def counted_step(self, batch):
        nonlocal done, coder
        coder = self.sae
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
        LanguageModelSAETrainingRunner(cfg, override_dataset=dataset).run()
        turns.finished(done)
    except gate.Enough:
        pass


if __name__ == "__main__":
    main()
