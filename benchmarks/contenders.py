"""This project's contenders, each in a process of its own: `python -m benchmarks.contenders JOB` under benchmarks.run.

ours, evaluate, apply: the stages themselves. published: the plain loop of tests/plain.py; evaluate_published: one metric of a RouteSAE.
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
    """Every batch that src reads passes the gate; its counted tokens are the useful ones. Returns a function: how many so far.

    second() is called with the second batch: by then a training has its models.
    """
    from src.data import Rows

    made, done, calls = Rows.batch, 0, 0

    def batch(self, rows):
        nonlocal done, calls
        calls += 1
        if calls == 2:
            second()
        turns.step(done)
        found = made(self, rows)
        done += int(found.mask.sum())
        return found

    Rows.batch = batch
    return lambda: done


def score(sae, states):
    """Quality on held-out states {site: [N,D]}, of an SAE of src."""
    from src.ops import active, squared_errors, unit_norm_decoder

    sae = copy.deepcopy(sae).eval()
    unit_norm_decoder(sae)
    n, errors, fired = len(next(iter(states.values()))), [], torch.zeros(sae.latent_size)
    device = next(sae.parameters()).device
    with torch.no_grad():
        for at in torch.arange(n).split(4096):
            p = sae.autoencode(
                sae.gather({site: states[site][at].to(device) for site in sae.sites()}),
                token=at.to(device),
            )
            errors.append(squared_errors(p.target, p.x_hat).flatten().cpu())
            fired += torch.bincount(
                active(p.latents.flatten(0, -2))[1], minlength=sae.latent_size
            ).cpu()
    samples = sum(map(len, errors))
    return {
        "NormMSE": float(torch.cat(errors).mean()),
        "dead": float((fired == 0).float().mean()),
        "L0": float(fired.sum()) / samples,
    }


def training_objects():
    """The SAEs and schedule-free optimisers that are alive; found by type, so that the trainer may change as it likes."""
    from src.sae import SAE
    from src.sae_training import Signum

    alive = gc.get_objects()
    saes = [
        one
        for one in alive
        if issubclass(type(one), SAE) and next(one.parameters()).device.type != "meta"
    ]
    inner = {id(part) for sae in saes for part in sae.children()}
    return [sae for sae in saes if id(sae) not in inner], [
        one for one in alive if type(one) is Signum
    ]


def ours(job, turns):
    from src import estimate
    from src.config import parse
    from src.data import Rows
    from src.trainer import Trainer

    if job.get("stages"):
        stages.mark()
    turns.breakdown = stages.breakdown
    kept = []
    uncounted, trial = Rows.batch, estimate.step_cost
    done = count(turns, lambda: kept.extend(training_objects()))
    counted = Rows.batch

    def step_cost(
        *arguments,
    ):  # the trial before a training, which its time is estimated from, is none of its steps
        Rows.batch = uncounted
        try:
            return trial(*arguments)
        finally:
            Rows.batch = counted

    estimate.step_cost = step_cost

    def measure(path):
        saes, optimizers = kept
        averaged = [one for one in optimizers if one.at_y]
        for one in averaged:
            one.eval()
        found = score(saes[0], torch.load(path))
        for one in averaged:
            one.train()
        return found

    turns.measure = measure
    Trainer(parse("train", job["argv"])).run()
    turns.finished(done())


def model_and_rows(job):
    """(language model in float32 with its head, rows cut as published: word pieces, padded), on the job's device."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from src.data import Rows

    tokenizer = AutoTokenizer.from_pretrained(job["model_path"])
    language_model = (
        AutoModelForCausalLM.from_pretrained(job["model_path"], dtype=torch.float32)
        .eval()
        .to(job["device"])
    )
    chunking = {} if job.get("packed") else {"chunking": "words"}
    rows = Rows(
        job["data_path"],
        tokenizer,
        job["length"],
        job["split"],
        max_samples=job["rows"],
        **chunking,
    )
    return language_model.requires_grad_(False), rows


def published_batches(rows, size, device):
    """(input_ids, attention_mask) in order, repeated for as long as it takes."""
    while True:
        for start in range(0, len(rows), size):
            items = [rows[i] for i in range(start, min(start + size, len(rows)))]
            yield tuple(torch.stack(part).to(device) for part in zip(*items, strict=True))


def published(job, turns):
    from src import model
    from src.config import model_options, parse
    from tests import plain

    language_model, rows = model_and_rows(job)
    cfg = parse("train", job["argv"])
    options = model_options(cfg, job["model"]) | {"k": cfg.k[0]}
    config = language_model.config
    torch.manual_seed(42)
    sae = model.build(job["model"], config.hidden_size, config.num_hidden_layers, options).to(
        job["device"]
    )
    done = 0

    def passed(batches):
        nonlocal done
        while done < job["tokens"]:
            turns.step(done)
            input_ids, attention_mask = next(batches)
            done += int(attention_mask.sum())
            yield input_ids, attention_mask

    per_batch = (
        sum(int(mask.sum()) for _, mask in [next(published_batches(rows, 64, "cpu"))])
        / 64
        * job["batch"]
    )
    steps = plain.published(
        language_model,
        passed(published_batches(rows, job["batch"], job["device"])),
        sae,
        sae.sites(),
        options,
        round(job["tokens"] / per_batch),
    )

    def measure(path):
        with torch.no_grad():
            for name, parameter in sae.named_parameters():
                parameter.copy_(twin.w[name])
        return score(sae, torch.load(path))

    turns.measure = measure
    for model_of_step, _loss in steps:
        twin = model_of_step
    turns.finished(done)


def evaluate(job, turns):
    """All metrics from one pass, as evaluate.py does it."""
    from src.config import parse
    from src.evaluator import Evaluator

    done = count(turns)
    Evaluator(parse("evaluate", job["argv"])).run()
    turns.finished(done())


def apply(job, turns):
    """Contexts found, as apply.py does it, decoding included."""
    from src.applier import Applier
    from src.config import parse
    from src.data import Rows

    uncounted, write = Rows.batch, Applier._write
    done = count(turns)

    def after_the_pass(
        self, *arguments
    ):  # rows that are read once more, for their text, are not counted once more
        Rows.batch = uncounted
        return write(self, *arguments)

    Applier._write = after_the_pass
    Applier(parse("apply", job["argv"])).run()
    turns.finished(done())


@torch.no_grad()
def evaluate_published(job, turns):
    """One metric of a RouteSAE as published: every pass complete, every site coded for every token, logits of whole batches."""
    from src import checkpoint
    from tests import plain

    language_model, rows = model_and_rows(job)
    sae, recipe = checkpoint.load(job["SAE_path"], job["device"])
    w, k, sites, done = dict(sae.named_parameters()), sae.k, sae.sites(), 0
    inner = {name.removeprefix("sae."): value for name, value in w.items()}
    totals = []

    def logits(ids, mask):
        return language_model(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False
        )

    def patched(ids, mask, site_of):
        """The logits with each site replaced, where a token is routed there, by what the SAE makes of it."""

        def hook(index):
            def replace(_module, _args, output):
                h = output if isinstance(output, torch.Tensor) else output[0]
                mean, std = h.mean(-1, keepdim=True), h.std(-1, keepdim=True)
                x_hat = plain.decode(
                    inner, plain.largest(plain.encode(inner, plain.standardise(h)), k)
                )
                h = torch.where((site_of == index)[..., None], x_hat * (std + 1e-5) + mean, h)
                return h if isinstance(output, torch.Tensor) else (h, *output[1:])

            return replace

        handles = [
            language_model.model.layers[site - 1].register_forward_hook(hook(i))
            for i, site in enumerate(sites)
        ]
        try:
            return logits(ids, mask).logits
        finally:
            for handle in handles:
                handle.remove()

    for ids, mask in published_batches(rows, job["batch"], job["device"]):
        if done >= job["tokens"]:
            break
        turns.step(done)
        done += int(mask.sum())
        out = logits(ids, mask)
        x = plain.standardise(torch.stack([out.hidden_states[site] for site in sites], dim=2))
        p = (x.sum(-2) @ w["router.weight"].T).softmax(-1)
        if job["metric"] == "NormMSE":
            routed = (
                p.max(-1).values[..., None]
                * x.gather(2, p.argmax(-1)[..., None, None].expand(*x.shape[:2], 1, x.shape[-1]))[
                    :, :, 0
                ]
            )
            x_hat = plain.decode(inner, plain.largest(plain.encode(inner, routed), k))
            totals.append(plain.error(routed, x_hat).mean())
            continue
        changed = patched(ids, mask, p.argmax(-1))
        if job["metric"] == "KLDiv":
            clean, other = out.logits.log_softmax(-1), changed.log_softmax(-1)
            totals.append(
                torch.nn.functional.kl_div(other, clean, log_target=True, reduction="batchmean")
            )
        else:
            ce = [
                torch.nn.functional.cross_entropy(one[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
                for one in (out.logits, changed)
            ]
            totals.append(ce[1] - ce[0])
    turns.finished(done)
    print(f"{job['metric']}: {float(torch.stack(totals).mean()):.4f}")


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
