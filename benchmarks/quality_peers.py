"""SAEs of other libraries, trained on states from a file: `python -m benchmarks.quality_peers JOB`.

It runs in an environment of one library and imports nothing of src. JOB is a JSON file. Each
library trains through the trainer that it documents, on the same batches in the same order, and
codes held-out states as it does at inference. An answer is one JSON line for each setting, with
the file that holds the reconstructions.

| setting | meaning |
|---|---|
| default | the library's defaults; steps of a warm-up that are more than the run are shares of it |
| x3 | the same with the learning rate times 3, a warm-up of 5 % and a decay over the last fifth |

A model with a penalty is trained a few times, until its L0 is near the target.

N states, D width, F latents.
"""

import json
import math
import os
import sys
import time
from pathlib import Path

import torch

L0_TOLERANCE, MAX_TRAININGS = 0.05, 5
STUCK = 0.02  # change of L0, relative
WARMUP, SPARSITY_WARMUP, ANNEAL_START, DECAY_START = 0.05, 0.1, 0.5, 0.8  # shares of a run
ROW = 256  # states that sparsify takes for a row of text
WIDTH_PARTS = (1, 3, 7, 15, 32)  # of 32: the widths of Matryoshka in its paper


class Batches:
    """The training states in order; it can be read several times."""

    def __init__(self, states, batch):
        self.states, self.batch = states, batch

    def __len__(self):
        return len(self.states) // self.batch

    def __iter__(self):
        for step in range(len(self)):
            yield self.states[step * self.batch : (step + 1) * self.batch].clone()


# ------------------------------------------------------------------------------------- libraries


def train_saelens(job, batches, factor, coefficient):
    """SAELens: its SAETrainer; inference with the SAE that it saves."""
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.sae import SAE
    from sae_lens.training.sae_trainer import SAETrainer

    sizes = {"d_in": batches.states.shape[1], "d_sae": job["latents"]}
    classes = {
        "TopK": "TopK",
        "BatchTopK": "BatchTopK",
        "Matryoshka": "MatryoshkaBatchTopK",
        "JumpReLU": "JumpReLU",
        "Gated": "Gated",
        "Standard": "Standard",
    }
    name = classes[job["model"]]
    penalty = "l0_coefficient" if name == "JumpReLU" else "l1_coefficient"
    options = {"k": job["k"]} if coefficient is None else {penalty: coefficient}
    if job["model"] == "Matryoshka":
        options["matryoshka_widths"] = [job["latents"] * part // 32 for part in WIDTH_PARTS]
    if factor and name.endswith("BatchTopK"):
        # Its threshold for inference remembers 1 / rate steps, 100 by default.
        options["topk_threshold_lr"] = max(0.01, 5 / len(batches))
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(**sizes, **options)
    torch.manual_seed(job["seed"])
    sae = getattr(sae_lens, f"{name}TrainingSAE")(config)
    steps = len(batches)
    rate = 3e-4 * (factor or 1)
    schedule = {"lr": rate, "lr_end": rate / 10}  # as its configuration of a whole run sets it
    if factor:
        schedule |= {
            "lr_warm_up_steps": round(WARMUP * steps),
            "lr_decay_steps": round((1 - DECAY_START) * steps),
            "dead_feature_window": max(1, round(0.03 * steps)),
        }
    trainer_config = SAETrainerConfig(
        total_training_samples=steps * batches.batch,
        train_batch_size_samples=batches.batch,
        **schedule,
    )
    sae = SAETrainer(trainer_config, sae, iter(batches)).fit()
    folder = Path(job["folder"]) / "saelens"
    sae.save_inference_model(folder)
    trained = SAE.load_from_disk(folder)

    def reconstruct(x):
        code = trained.encode(x)
        return trained.decode(code), code != 0

    return reconstruct


def train_dictionary_learning(job, batches, factor, coefficient):
    """dictionary_learning: its trainSAE, with the activations normalised as its README advises."""
    from dictionary_learning import trainers, utils
    from dictionary_learning.training import trainSAE

    steps = len(batches)
    classes = {
        "TopK": trainers.TopKTrainer,
        "BatchTopK": trainers.BatchTopKTrainer,
        "JumpReLU": trainers.JumpReluTrainer,
        "Gated": trainers.GatedSAETrainer,
        "p-anneal": trainers.PAnnealTrainer,
    }
    rates = {"JumpReLU": 7e-5, "Gated": 5e-5, "p-anneal": 1e-3}
    rate = rates.get(job["model"], 2e-4 / (job["latents"] / 2**14) ** 0.5)
    options = {"warmup_steps": round(WARMUP * steps)}  # 1,000 by default
    if job["model"] in ("TopK", "BatchTopK"):
        options |= {"k": job["k"], "threshold_start_step": round(WARMUP * steps)}
    else:
        options["sparsity_warmup_steps"] = round(SPARSITY_WARMUP * steps)  # 2,000
    if job["model"] == "JumpReLU":
        options["target_l0"] = job["k"]
    elif job["model"] == "Gated":
        options["l1_penalty"] = coefficient
    elif job["model"] == "p-anneal":
        # As in the demo of its authors: with the default end of p, 0, it divides by 0.
        annealing = {"anneal_start": round(ANNEAL_START * steps), "p_end": 0.2}
        options |= {"initial_sparsity_penalty": coefficient, "sparsity_function": "Lp^p"}
        options |= annealing
    if factor:
        options |= {"lr": rate * factor, "decay_start": round(DECAY_START * steps)}
    config = {
        "trainer": classes[job["model"]],
        "activation_dim": batches.states.shape[1],
        "dict_size": job["latents"],
        "steps": steps,
        "layer": 0,
        "lm_name": "states",
        "device": "cpu",
        "seed": job["seed"],
        **options,
    }
    folder = Path(job["folder"]) / "dictionary_learning"
    torch.manual_seed(job["seed"])
    trainSAE(batches, [config], steps, save_dir=folder, normalize_activations=True, device="cpu")
    trained, _ = utils.load_dictionary(f"{folder}/trainer_0", "cpu")

    def reconstruct(x):
        code = trained.encode(x)
        return trained.decode(code), code != 0

    return reconstruct


class States(torch.nn.Module):
    """A language model for sparsify whose tokens are numbers of states."""

    device = torch.device("cpu")
    dummy_inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.long)}

    def __init__(self, states):
        super().__init__()
        self.states, self.layer = states, torch.nn.Identity()

    @property
    def base_model(self):
        return self

    def forward(self, input_ids):
        return self.layer(self.states[input_ids])


def train_sparsify(job, batches, factor, coefficient):
    """sparsify: its Trainer, with states in the place of a language model."""
    if not torch.cuda.is_available():
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # it would look for a GPU
    from sparsify import SaeConfig, TrainConfig, Trainer

    rows = torch.arange(len(batches) * batches.batch).view(-1, ROW)
    rate = 5e-3 / (job["latents"] / 2**14) ** 0.5
    config = TrainConfig(
        SaeConfig(num_latents=job["latents"], k=job["k"]),
        batch_size=batches.batch // ROW,
        hookpoints=["layer"],
        init_seeds=[job["seed"]],
        log_to_wandb=False,
        save_dir=job["folder"],
        **({"lr": rate * factor} if factor else {}),
    )
    trainer = Trainer(config, [{"input_ids": row} for row in rows], States(batches.states))
    trainer.fit()
    for optimizer in trainer.optimizers:
        if hasattr(optimizer, "eval"):
            optimizer.eval()
    (coder,) = trainer.saes.values()

    def reconstruct(x):
        acts, indices, _ = coder.encode(x)
        active = torch.zeros(len(x), coder.num_latents, dtype=torch.bool)
        return coder.decode(acts, indices), active.scatter(1, indices, acts != 0)

    return reconstruct


LIBRARIES = {
    "SAELens": train_saelens,
    "dictionary_learning": train_dictionary_learning,
    "sparsify": train_sparsify,
}
# First coefficient of a penalty; the search begins there.
COEFFICIENTS = {
    ("SAELens", "JumpReLU"): 1.0,
    ("SAELens", "Gated"): 1.0,
    ("SAELens", "Standard"): 1.0,
    ("dictionary_learning", "Gated"): 0.1,
    ("dictionary_learning", "p-anneal"): 0.1,
}


# --------------------------------------------------------------------------------------- settings


@torch.no_grad()
def coded(reconstruct, states):
    """(reconstructions [N,D], mean L0, share of latents that never fired)"""
    parts, active, fired = [], 0, 0
    for x in states.split(4096):
        x_hat, is_active = reconstruct(x)
        parts.append(x_hat)
        active += int(is_active.sum())
        fired = fired + is_active.sum(0)
    return torch.cat(parts), active / len(states), float((fired == 0).float().mean())


def next_coefficient(tried, target):
    """The next coefficient, from (coefficient, L0) of those tried: a secant of their logarithms."""
    points = sorted((math.log(c), math.log(max(l0, 1e-2))) for c, l0 in tried)
    wanted = math.log(target)
    above = [point for point in points if point[1] >= wanted]
    below = [point for point in points if point[1] < wanted]
    if not above or not below:  # a larger coefficient gives a smaller L0
        c, l0 = points[-1] if above else points[0]
        return math.exp(c + max(-3.0, min(3.0, 1.5 * (l0 - wanted))))
    (c1, l1), (c2, l2) = above[-1], below[0]
    share = (l1 - wanted) / (l1 - l2)
    return math.exp(c1 + min(0.9, max(0.1, share)) * (c2 - c1))


def at_target(train, states, target, coefficient):
    """Train until L0 is near the target. -> (coded(...) of the nearest, its coefficient, tries)"""
    tried = []
    while True:
        result = coded(train(coefficient), states)
        tried.append((coefficient, result[1], result))
        near = abs(result[1] / target - 1) <= L0_TOLERANCE
        # So few steps cannot make it sparse if another coefficient leaves L0 where it was.
        stuck = len(tried) > 1 and abs(result[1] - tried[-2][1]) < STUCK * result[1]
        if coefficient is None or near or stuck or len(tried) == MAX_TRAININGS:
            break
        coefficient = next_coefficient([entry[:2] for entry in tried], target)
        print(f"L0 {result[1]:.1f}, next coefficient {coefficient:.3g}", file=sys.stderr)
    best = min(tried, key=lambda entry: abs(math.log(max(entry[1], 1e-2) / target)))
    return best[2], best[0], len(tried)


def main():
    job = json.loads(Path(sys.argv[1]).read_text())
    library = LIBRARIES[job["library"]]
    states = torch.load(job["states"])
    batches = Batches(states["train"], job["batch"])
    coefficient = COEFFICIENTS.get((job["library"], job["model"]))
    for setting, factor in job["settings"].items():
        started = time.perf_counter()

        def train(coefficient, factor=factor):
            return library(job, batches, factor, coefficient)

        result, coefficient, tries = at_target(train, states["test"], job["k"], coefficient)
        x_hat, l0, dead = result
        path = Path(job["folder"]) / f"{setting}.pt"
        torch.save(x_hat.float(), path)
        answer = {
            "setting": setting,
            "L0": l0,
            "dead": dead,
            "coefficient": coefficient,
            "trainings": tries,
            "seconds": time.perf_counter() - started,
            "x_hat": str(path),
        }
        print("ANSWER " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
