"""What a GPU's defaults were chosen by: `python -m benchmarks.choices`. Forms of one part beside each other, at Llama-3.2-1B's shapes.

Milliseconds, medians of runs timed by events, random weights; before that how far bfloat16 factors are from float64. The kernels' exactness is
tests/test_kernels.py's (`pytest -m gpu`).
"""

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.run import SHAPES
from src import checkpoint, config, lm, model, ops
from src.device import pick_device
from src.files import save_json
from src.sae_training import SAETraining


def timed(work, repeats=7, warm=2):
    """Median milliseconds."""
    took = []
    for i in range(warm + repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if i >= warm:
            took.append(start.elapsed_time(end))
    return statistics.median(took)


def rounding(found):
    sae, x = model.TopK(512, 4096, 32, auxk_coeff=0.0).cuda(), torch.randn(2048, 512, device="cuda")
    exact = model.TopK(512, 4096, 32, auxk_coeff=0.0).cuda().double()
    exact.load_state_dict(sae.state_dict())
    form = ops.SparseCode.form
    for name in ("products", "rows", "sums"):
        ops.SparseCode.form = lambda ratio, x, name=name: name
        with ops.bf16_matmuls():
            a, b = (one.autoencode(x.to(one.pre_bias.dtype)) for one in (sae, exact))
        others = (a.latents.ne(0) != b.latents.ne(0)).float().sum() / 2 / 2048 / 32
        off = {
            "x_hat": float((a.x_hat - b.x_hat).detach().norm() / b.x_hat.detach().norm()),
            "other latents": float(others),
        }
        for one, p in ((sae, a), (exact, b)):
            one.zero_grad()
            with ops.bf16_matmuls():
                sum(one.loss(p).values()).backward()
        off |= {
            n: float((p.grad - q.grad).norm() / q.grad.norm())
            for (n, p), q in zip(sae.named_parameters(), exact.parameters(), strict=True)
        }
        found[f"relative errors against float64, {name}"] = off
    ops.SparseCode.form = form


def topk(found, n=32768, f=16384, k=64):
    from src import kernels

    values = torch.randn(n, f, device="cuda")
    few = values - 3  # of which few are positive, as in a trained SAE
    found["top-k"] = {
        "torch": timed(lambda: values.topk(k, sorted=False), 3),
        "torch, sorted": timed(lambda: values.topk(k), 3),
        "kernel": timed(lambda: kernels.topk_indices(values, k)),
        "kernel, few positive": timed(lambda: kernels.topk_indices(few, k)),
        "zero in place": timed(values.zero_),
    }


def rows_of_active(found, n=32704, f=16384, k=64, d=2048):
    """A code decoded, and its gradient taken, by rows of a table in bfloat16 and by dense products; the dense code made for these or not."""
    table, dense = (
        torch.randn(f, d, device="cuda").bfloat16(),
        torch.zeros(n, f, device="cuda", dtype=torch.bfloat16),
    )
    latent, values, grad = (
        torch.randint(f, (n * k,), device="cuda"),
        torch.randn(n * k, device="cuda"),
        torch.randn(n, d, device="cuda"),
    )
    bounds, at = (
        torch.arange(0, n * k + 1, k, device="cuda"),
        torch.arange(n, device="cuda").repeat_interleave(k) * f + latent,
    )
    narrowed = grad.bfloat16()

    def filled():
        dense.zero_().view(-1)[at] = values.bfloat16()

    found["rows"] = {
        "sums": timed(lambda: ops.weighted_embedding_bag(values, latent, bounds, table)),
        "dots": timed(lambda: ops.bag_dots(grad, latent, bounds, table)),
        "dense product": timed(lambda: ops.product(dense, table)),
        "dense gradient": timed(lambda: (narrowed @ table.T).view(-1)[at]),
        "dense code": timed(filled),
    }


def language_model(shape):
    fields, *_ = SHAPES[shape]
    with torch.device("cuda"):
        made = LlamaForCausalLM(LlamaConfig(**fields, max_position_embeddings=512)).to(
            torch.bfloat16
        )
    return made.requires_grad_(False).eval()


def forward(found, shape):
    made, (_, _, _, rows, length) = language_model(shape), SHAPES[shape]
    ids = torch.randint(0, 4096, (rows, length), device="cuda")
    depth = 3 * len(lm.blocks(made)) // 4
    sites = list(range(depth // 3, depth + 1))
    found["LM"] = {"eager": timed(lambda: lm.read_sites(made, ids, sites), 5)}
    before = lm.read_sites(made, ids, sites)
    started = time.perf_counter()
    lm.compile_blocks(made, rows, length)
    after = lm.read_sites(made, ids, sites)
    torch.cuda.synchronize()
    off = max(
        float((after[s].float() - before[s].float()).norm() / before[s].float().norm())
        for s in sites
    )
    found["LM"] |= {
        "compiling, s": time.perf_counter() - started,
        "compiled": timed(lambda: lm.read_sites(made, ids, sites), 7),
        "difference": off,
    }
    found["LM"]["graphs"] = torch._dynamo.utils.counters["stats"].get("unique_graphs")


def sae_with_states(name, shape, **options):
    """(run, random states of its sites, token keys)"""
    fields, latents, k, rows, length = SHAPES[shape]
    cfg = config.parse(
        "train", ["--model", name, "--device", "cuda", "--latent_size", str(latents), "--k", str(k)]
    )
    config.complete(cfg)
    values = (
        config.model_options(cfg, name)
        | {"k": k, "layer": 3 * fields["num_hidden_layers"] // 4}
        | options
    )
    values = {key: value[0] if isinstance(value, list) else value for key, value in values.items()}
    sae = model.build(name, fields["hidden_size"], fields["num_hidden_layers"], values).cuda()
    run, n = SAETraining(sae, name, values, cfg, 100), rows * length - rows
    hidden = {
        site: torch.randn(n, sae.hidden_size, device="cuda", dtype=torch.bfloat16)
        for site in sae.sites()
    }
    run.warm_start(hidden)
    return run, hidden, torch.arange(n, device="cuda")


def steps(found, shape):
    """One update of an SAE, its states given; peak memory with them."""
    published = {"router_objective": "published", "router_balance": "none"}
    forms = [(name, {}, how) for name in ("TopK", "MLSAE") for how in ("products", "rows", "sums")]
    forms += [(name, {}, "tf32") for name in ("TopK", "Crosscoder")]
    forms += [
        (name, {}, "")
        for name in ("RouteSAE", "Vanilla", "JumpReLU", "Gated", "RandomK", "Crosscoder")
    ] + [("RouteSAE", published, "")]
    uses_bf16_matmul, form, found["steps"] = ops.uses_bf16_matmul, ops.SparseCode.form, {}
    for name, more, how in forms:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        ops.uses_bf16_matmul = (lambda x: False) if how == "tf32" else uses_bf16_matmul
        ops.SparseCode.form = form if how in ("", "tf32") else lambda ratio, x, how=how: how
        run, hidden, token = sae_with_states(name, shape, **more)
        number = itertools.count()
        took = timed(
            lambda run=run, hidden=hidden, token=token, number=number: run.step(
                hidden, token, next(number), False
            ),
            5,
        )
        label = f"{name}{' published' if more else ''} {how}"
        found["steps"][label] = {"ms": took, "peak GB": torch.cuda.max_memory_allocated() / 1e9}
        print(label, found["steps"][label], flush=True)
        run = hidden = None  # the next one needs the room
    ops.uses_bf16_matmul, ops.SparseCode.form = uses_bf16_matmul, form


def profile(found, shape, out):
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    out.mkdir(parents=True, exist_ok=True)
    for name in ("RouteSAE", "MLSAE", "JumpReLU", "Crosscoder"):
        more = (
            {"router_objective": "published", "router_balance": "none"}
            if name == "RouteSAE"
            else {}
        )
        run, hidden, token = sae_with_states(name, shape, **more)
        run.step(hidden, token, 0, False)
        with profiler(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as p:
            run.step(hidden, token, 1, False)
            torch.cuda.synchronize()
        (out / f"profile_{name}.txt").write_text(
            p.key_averages().table(
                sort_by="self_device_time_total", row_limit=25, max_name_column_width=60
            )
        )


PARTS = {
    "rounding": lambda found, cfg: rounding(found),
    "topk": lambda found, cfg: topk(found),
    "rows": lambda found, cfg: rows_of_active(found),
    "lm": lambda found, cfg: forward(found, cfg.shape),
    "steps": lambda found, cfg: steps(found, cfg.shape),
    "profile": lambda found, cfg: profile(found, cfg.shape, Path(cfg.output_dir)),
}


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.choices", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output_dir", default="outputs/benchmark")
    cfg = parser.parse_args()
    pick_device("cuda")
    found = {"device": torch.cuda.get_device_name(), "commit": checkpoint.environment()}
    for name in cfg.only:
        PARTS[name](found, cfg)
        torch.cuda.empty_cache()
        save_json(
            found, Path(cfg.output_dir) / "choices.json"
        )  # what is measured stays, should a later part fail
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
