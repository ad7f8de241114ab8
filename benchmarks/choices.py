"""What a GPU's defaults were chosen by: `python -m benchmarks.choices`. Forms of one part beside each other, at Llama-3.2-1B's shapes.

Milliseconds, medians of runs timed by events, random weights; exactness of the kernels first. Parts: kernels, topk, lm, steps, profile.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.run import SHAPES
from src import checkpoint, config, lm, model, ops
from src.run import Run


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


def kernels(found):
    from src import kernels

    for n, f, k in ((1000, 16384, 64), (333, 5000, 16), (64, 32768, 128), (64, 64, 64)):
        values = torch.randn(n, f, device="cuda")
        values[: n // 2] = values[: n // 2].mul(4).round()  # ties
        mine = values.gather(1, kernels.largest(values, k)).sort(1).values
        assert torch.equal(mine, values.topk(k).values.sort(1).values), (n, f, k)
    for dtype in (torch.bfloat16, torch.float32):
        h = torch.randn(77, 2048, device="cuda", dtype=dtype) * 9 + 3
        out = torch.zeros(77, 3, 2048, device="cuda")
        kernels.standardise(h, 1e-5, out[:, 1])
        assert torch.allclose(out[:, 1], ops.pre_process(h, 1e-5)[0], atol=1e-5) and not out[:, ::2].any()
    sae, x = model.TopK(512, 4096, 32, auxk_coeff=0.0).cuda(), torch.randn(2048, 512, device="cuda")
    exact = model.TopK(512, 4096, 32, auxk_coeff=0.0).cuda().double()
    exact.load_state_dict(sae.state_dict())
    for name, least in (("dense products", torch.inf), ("sums of rows", 0)):
        model.SPARSE_FROM["cuda"] = least
        with ops.narrow_factors():
            a, b = (one.autoencode(x.to(one.pre_bias.dtype)) for one in (sae, exact))
        others = (a.latents.ne(0) != b.latents.ne(0)).float().sum() / 2 / 2048 / 32
        off = {"x_hat": float((a.x_hat - b.x_hat).norm() / b.x_hat.norm()), "other latents": float(others)}
        for one, p in ((sae, a), (exact, b)):
            one.zero_grad()
            with ops.narrow_factors():
                sum(one.loss(p).values()).backward()
        off |= {n: float((p.grad - q.grad).norm() / q.grad.norm()) for (n, p), q in zip(sae.named_parameters(), exact.parameters(), strict=True)}
        found[f"relative errors against float64, {name}"] = off


def topk(found, n=32768, f=16384, k=64):
    from src import kernels

    values = torch.randn(n, f, device="cuda")
    half = values.bfloat16()

    def groups(size=32):
        grouped = values.view(n, -1, size)
        best = grouped.amax(-1).topk(k, sorted=False).indices
        inside = grouped.gather(1, best[..., None].expand(-1, -1, size)).flatten(1).topk(k, sorted=False).indices
        return best.gather(1, inside // size) * size + inside % size

    found["top-k"] = {
        "torch": timed(lambda: values.topk(k, sorted=False), 3), "torch, sorted": timed(lambda: values.topk(k), 3),
        "torch, bfloat16": timed(lambda: half.topk(k, sorted=False), 3), "two stages": timed(groups, 3),
        "kernel": timed(lambda: kernels.largest(values, k)), "zero in place": timed(values.zero_),
    }


def language_model(shape):
    fields, *_ = SHAPES[shape]
    with torch.device("cuda"):
        made = LlamaForCausalLM(LlamaConfig(**fields, max_position_embeddings=512)).to(torch.bfloat16)
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
    off = max(float((after[s].float() - before[s].float()).norm() / before[s].float().norm()) for s in sites)
    found["LM"] |= {"compiling, s": time.perf_counter() - started, "compiled": timed(lambda: lm.read_sites(made, ids, sites), 7), "difference": off}
    found["LM"]["graphs"] = torch._dynamo.utils.counters["stats"].get("unique_graphs")


def sae_of(name, shape, **options):
    fields, latents, k, rows, length = SHAPES[shape]
    cfg = config.parse("train", ["--model", name, "--device", "cuda", "--latent_size", str(latents), "--k", str(k)])
    config.complete(cfg)
    values = config.model_options(cfg, name) | {"k": k, "layer": 3 * fields["num_hidden_layers"] // 4} | options
    values = {key: value[0] if isinstance(value, list) else value for key, value in values.items()}
    sae = model.build(name, fields["hidden_size"], fields["num_hidden_layers"], values).cuda()
    return Run(sae, name, values, cfg, 100), rows * length - rows


def steps(found, shape):
    """One update of an SAE, its states given; peak memory with them."""
    published = {"router_objective": "published", "router_balance": "none"}
    for name, more in (("TopK", {}), ("RouteSAE", published), ("RouteSAE", {}), ("Vanilla", {}), ("JumpReLU", {}), ("Gated", {}), ("RandomK", {}),
                       ("Crosscoder", {}), ("MLSAE", {})):
        for how in ("bf16", "tf32", "sums"):
            if how != "bf16" and name not in ("TopK", "Crosscoder"):
                continue
            if how == "sums" and name != "TopK":
                continue
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            label = f"{name}{' published' if more else ''} {how}"
            before, ops.narrow = ops.narrow, (lambda x: x) if how == "tf32" else ops.narrow
            model.SPARSE_FROM["cuda"] = 0 if how == "sums" else torch.inf
            try:
                run, n = sae_of(name, shape, **more)
                hidden = {s: torch.randn(n, run.sae.hidden_size, device="cuda", dtype=torch.bfloat16) for s in run.sae.sites()}
                token, count = torch.arange(n, device="cuda"), iter(range(100))
                run.warm_start(hidden)
                took = timed(lambda run=run, hidden=hidden, token=token, count=count: run.step(hidden, token, next(count), False), 5)
                found.setdefault("steps", {})[label] = {"ms": took, "peak GB": torch.cuda.max_memory_allocated() / 1e9}
                print(label, found["steps"][label], flush=True)
            except Exception as error:
                found.setdefault("steps", {})[label] = f"{type(error).__name__}: {error}"[:300]
                print(label, found["steps"][label], flush=True)
            ops.narrow = before
            run = hidden = None


def profile(found, shape, out):
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    for name, more in (("RouteSAE", {"router_objective": "published", "router_balance": "none"}), ("MLSAE", {})):
        run, n = sae_of(name, shape, **more)
        hidden = {s: torch.randn(n, run.sae.hidden_size, device="cuda", dtype=torch.bfloat16) for s in run.sae.sites()}
        token = torch.arange(n, device="cuda")
        run.warm_start(hidden)
        run.step(hidden, token, 0, False)
        with profiler(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as p:
            run.step(hidden, token, 1, False)
            torch.cuda.synchronize()
        (out / f"profile_{name}.txt").write_text(p.key_averages().table(sort_by="self_device_time_total", row_limit=30, max_name_column_width=60))


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choices", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama")
    parser.add_argument("--only", nargs="+", default=["kernels", "topk", "lm", "steps", "profile"])
    parser.add_argument("--output_dir", default="outputs/benchmark")
    cfg = parser.parse_args()
    out = Path(cfg.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.pick_device("cuda")
    torch.set_grad_enabled(True)
    found = {"device": torch.cuda.get_device_name(), "commit": checkpoint.environment()}
    parts = {
        "kernels": lambda: kernels(found), "topk": lambda: topk(found), "lm": lambda: forward(found, cfg.shape),
        "steps": lambda: steps(found, cfg.shape), "profile": lambda: profile(found, cfg.shape, out),
    }
    for name in cfg.only:
        started = time.perf_counter()
        try:
            parts[name]()
        except Exception as error:
            import traceback

            traceback.print_exc()
            found[f"{name} failed"] = f"{type(error).__name__}: {error}"[:500]
        torch.cuda.empty_cache()
        print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)
        (out / "choices.json").write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
