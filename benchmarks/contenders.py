"""This project's contenders; benchmarks.run starts each as `python -m benchmarks.contenders JOB`.

| kind of job | work |
|---|---|
| ours, evaluate, apply | the stage itself |
| published | the training loop as published, on src/reference.py |
| evaluate_published | one metric of a RouteSAE, as published |
"""

import copy
import gc
import os
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import gate, stages


def count(turns, second=lambda: None):
    """Let every batch that src reads pass the gate. Returns a function: useful tokens so far.

    Useful tokens are those that the mask counts. second() is called before the second batch, when a
    training has its models.
    """
    from src.data import Rows

    read_batch = Rows.batch
    tokens = batches = 0

    def counted_batch(self, rows):
        nonlocal tokens, batches
        batches += 1
        if batches == 2:
            second()
        turns.step(tokens)
        batch = read_batch(self, rows)
        tokens += int(batch.mask.sum())
        return batch

    Rows.batch = counted_batch
    return lambda: tokens


def leave_uncounted(owner, name, uncounted_batch):
    """Let what owner.name reads not count as work of the contender."""
    from src.data import Rows

    function, counted_batch = getattr(owner, name), Rows.batch

    def uncounted(*args, **options):
        Rows.batch = uncounted_batch
        try:
            return function(*args, **options)
        finally:
            Rows.batch = counted_batch

    setattr(owner, name, uncounted)


def score(sae, states):
    """Quality of an SAE of src on held-out states {site: [N,D]}."""
    from src.ops import squared_errors, unit_norm_decoder
    from src.sae import BatchInfo
    from src.sparse import active

    sae = copy.deepcopy(sae).eval()
    unit_norm_decoder(sae)
    device = next(sae.parameters()).device
    n_tokens = len(next(iter(states.values())))
    errors, fired = [], torch.zeros(sae.latent_size)
    with torch.no_grad():
        for token in torch.arange(n_tokens).split(4096):
            hidden = {site: states[site][token].to(device) for site in sae.sites()}
            out = sae.autoencode(sae.gather(hidden), BatchInfo(token_keys=token.to(device)))
            errors.append(squared_errors(out.target, out.x_hat).flatten().cpu())
            _, latent, _ = active(out.latents.flatten(0, -2))
            fired += torch.bincount(latent, minlength=sae.latent_size).cpu()
    samples = sum(map(len, errors))
    return {
        "NormMSE": float(torch.cat(errors).mean()),
        "dead": float((fired == 0).float().mean()),
        "L0": float(fired.sum()) / samples,
    }


def living():
    """(SAEs, those within another too; schedule-free optimisers), of the whole process.

    They are found by type among all objects, so that this file need not know the trainer. Their
    order is that of the garbage collector.
    """
    from src.sae import SAE
    from src.sae_training import Signum

    objects = gc.get_objects()
    saes = [thing for thing in objects if issubclass(type(thing), SAE)]
    return saes, [thing for thing in objects if type(thing) is Signum]


def training_objects(before):
    """(SAEs, optimisers) that were not alive `before`, when living() was called."""
    known = {id(thing) for things in before for thing in things}
    saes, optimizers = (
        [thing for thing in things if id(thing) not in known] for things in living()
    )
    saes = [sae for sae in saes if next(sae.parameters()).device.type != "meta"]
    inner = {id(part) for sae in saes for part in sae.children()}
    return [sae for sae in saes if id(sae) not in inner], optimizers


def ours(job, turns):
    """A training, as train.py does it."""
    from src import estimate
    from src.config import parse
    from src.data import Rows
    from src.trainer import Trainer

    if job.get("stages"):
        stages.mark()
    turns.breakdown = stages.breakdown
    training, before = [], living()  # other SAEs may live in this process
    uncounted_batch = Rows.batch
    tokens = count(turns, lambda: training.extend(training_objects(before)))
    # the trial step from which the duration is estimated is no step of the training
    leave_uncounted(estimate, "step_cost", uncounted_batch)

    def measure(path):
        saes, optimizers = training
        averaged = [optimizer for optimizer in optimizers if optimizer.at_y]
        for optimizer in averaged:
            optimizer.eval()
        quality = score(saes[0], torch.load(path))
        for optimizer in averaged:
            optimizer.train()
        return quality

    turns.measure = measure
    Trainer(parse("train", job["argv"])).run()
    turns.finished(tokens())


def model_and_rows(job):
    """(language model in float32 with its head, rows).

    Rows are cut as published, into pieces of words with padding, unless the job wants packed rows.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from src.data import Rows

    tokenizer = AutoTokenizer.from_pretrained(job["model_path"])
    language_model = AutoModelForCausalLM.from_pretrained(job["model_path"], dtype=torch.float32)
    language_model = language_model.eval().to(job["device"]).requires_grad_(False)
    options = {"max_samples": job["rows"], "chunking": "pack" if job.get("packed") else "words"}
    rows = Rows(job["data_path"], tokenizer, job["length"], job["split"], **options)
    return language_model, rows


def published_batches(rows, size, device):
    """(input_ids, attention_mask) in order, from the start again without end."""
    while True:
        for start in range(0, len(rows), size):
            items = [rows[i] for i in range(start, min(start + size, len(rows)))]
            yield tuple(torch.stack(part).to(device) for part in zip(*items, strict=True))


def published(job, turns):
    """A training with the loop as published."""
    from benchmarks.published import train
    from src import model
    from src.config import model_options, parse

    language_model, rows = model_and_rows(job)
    cfg = parse("train", job["argv"])
    options = model_options(cfg, job["model"]) | {"k": cfg.k[0]}
    config = language_model.config
    torch.manual_seed(42)
    sae = model.build(job["model"], config.hidden_size, config.num_hidden_layers, options)
    sae = sae.to(job["device"])
    tokens = 0

    def counted(batches):
        nonlocal tokens
        while tokens < job["tokens"]:
            turns.step(tokens)
            input_ids, attention_mask = next(batches)
            tokens += int(attention_mask.sum())
            yield input_ids, attention_mask

    _, mask = next(published_batches(rows, 64, "cpu"))
    tokens_of_batch = int(mask.sum()) / 64 * job["batch"]
    n_steps = round(job["tokens"] / tokens_of_batch)
    batches = counted(published_batches(rows, job["batch"], job["device"]))
    steps = train(language_model, batches, sae, options, n_steps)

    def measure(path):
        with torch.no_grad():
            for name, parameter in sae.named_parameters():
                parameter.copy_(trained.weights[name])
        return score(sae, torch.load(path))

    turns.measure = measure
    for model_of_step in steps:
        trained = model_of_step
    turns.finished(tokens)


def evaluate(job, turns):
    """The metrics of one pass, as evaluate.py does it."""
    from src import estimate
    from src.config import parse
    from src.data import Rows
    from src.evaluator import Evaluator

    uncounted_batch = Rows.batch
    tokens = count(turns)
    leave_uncounted(estimate, "of_reading", uncounted_batch)
    Evaluator(parse("evaluate", job["argv"])).run()
    turns.finished(tokens())


def apply(job, turns):
    """Contexts of all latents, as apply.py does it, decoding of tokens included."""
    from src import estimate
    from src.applier import Applier
    from src.config import parse
    from src.data import Rows

    uncounted_batch = Rows.batch
    tokens = count(turns)
    leave_uncounted(estimate, "of_reading", uncounted_batch)
    # writing reads some rows once more, for their text
    leave_uncounted(Applier, "_write", uncounted_batch)
    Applier(parse("apply", job["argv"])).run()
    turns.finished(tokens())


class PublishedEvaluation:
    """One metric of a RouteSAE as published.

    Every pass of the language model is complete, every site is coded for every token, and logits
    are those of whole batches. N tokens as [rows, positions], L sites, D hidden.
    """

    def __init__(self, language_model, sae, metric):
        from src import reference

        self.language_model, self.metric = language_model, metric
        self.sites = sae.sites()
        self.sae = reference.RouteSAE(dict(sae.named_parameters()), {"k": sae.k})

    def batch(self, ids, mask):
        """The metric, averaged over one batch."""
        from src import reference

        out = self.run(ids, mask)
        states = torch.stack([out.hidden_states[site] for site in self.sites], dim=2)
        x = reference.standardise(states)  # [rows, positions, L, D]
        p = self.sae.site_probabilities(x)
        site_index = p.argmax(-1)
        if self.metric == "NormMSE":
            index = site_index[..., None, None].expand(*x.shape[:2], 1, x.shape[-1])
            routed = p.max(-1).values[..., None] * x.gather(2, index)[:, :, 0]
            return reference.normalised_error(routed, self.reconstruct(routed)).mean()
        patched = self.patched_logits(ids, mask, site_index)
        if self.metric == "KLDiv":
            clean, patched = out.logits.log_softmax(-1), patched.log_softmax(-1)
            kl_div = torch.nn.functional.kl_div
            return kl_div(patched, clean, log_target=True, reduction="batchmean")
        return cross_entropy(patched, ids) - cross_entropy(out.logits, ids)

    def run(self, ids, mask):
        return self.language_model(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False
        )

    def reconstruct(self, x):
        return self.sae.decode(self.sae.activate(self.sae.pre_acts(x), None))

    def patched_logits(self, ids, mask, site_index):
        """Logits with each token's state at its site replaced by the SAE's reconstruction."""
        from src import reference

        def hook_of(index):
            def replace(_module, _args, output):
                h = output if isinstance(output, torch.Tensor) else output[0]
                mean, std = h.mean(-1, keepdim=True), h.std(-1, keepdim=True)
                h_hat = self.reconstruct(reference.standardise(h)) * (std + 1e-5) + mean
                h = torch.where((site_index == index)[..., None], h_hat, h)
                return h if isinstance(output, torch.Tensor) else (h, *output[1:])

            return replace

        blocks = self.language_model.model.layers
        handles = [
            blocks[site - 1].register_forward_hook(hook_of(index))
            for index, site in enumerate(self.sites)
        ]
        try:
            return self.run(ids, mask).logits
        finally:
            for handle in handles:
                handle.remove()


def cross_entropy(logits, ids):
    """Mean over all predictions, padding included."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def evaluate_published(job, turns):
    """One metric of a RouteSAE as published."""
    from src import checkpoint

    language_model, rows = model_and_rows(job)
    sae, _ = checkpoint.load(job["SAE_path"], job["device"])
    evaluation = PublishedEvaluation(language_model, sae, job["metric"])
    tokens, means = 0, []
    for ids, mask in published_batches(rows, job["batch"], job["device"]):
        if tokens >= job["tokens"]:
            break
        turns.step(tokens)
        tokens += int(mask.sum())
        means.append(evaluation.batch(ids, mask))
    turns.finished(tokens)
    print(f"{job['metric']}: {float(torch.stack(means).mean()):.4f}")


KINDS = {
    "ours": ours,
    "published": published,
    "evaluate": evaluate,
    "evaluate_published": evaluate_published,
    "apply": apply,
}


def main():
    started = time.perf_counter()
    job = gate.job()
    turns = gate.Gate()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        if job["kind"] == "ours" and "--output_dir" not in job["argv"]:
            job["argv"] += ["--output_dir", str(Path(folder) / "out")]
        try:
            KINDS[job["kind"]](job, turns)
        except gate.Enough:
            pass
    print(f"{job['kind']}: {time.perf_counter() - started:.1f} s in all")


if __name__ == "__main__":
    main()
