"""Measurements from which the defaults on a GPU were chosen: `python -m benchmarks.choices`.

Alternative forms of one part are timed with random weights at the shapes of Llama-3.2-1B. Times are
medians in milliseconds, by CUDA events. The first part compares products in bfloat16 with float64.
Whether the kernels are exact is tested in tests/test_kernels.py (`pytest -m gpu`).
"""

import itertools
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.run import AS_PUBLISHED, SHAPES
from src import checkpoint, config, device, lm, model, sparse
from src.config import small_parser
from src.device import pick_device
from src.files import save_json
from src.sae_training import LocalBatch, SAETraining

FORMS = ("products", "rows", "sums")  # of SparseCode


def median_ms(work, repeats=7, warm=2):
    """Median milliseconds of work()."""
    times = []
    for _ in range(warm + repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[warm:])


def relative_error(value, exact):
    return float((value - exact).norm() / exact.norm())


def rounding(results, cfg):
    """Errors of a TopK's output and gradients in each form of SparseCode, relative to float64."""
    sae = model.TopK(512, 4096, 32, auxk_coeff=0.0).cuda()
    x = torch.randn(2048, 512, device="cuda")
    exact = model.TopK(512, 4096, 32, auxk_coeff=0.0).cuda().double()
    exact.load_state_dict(sae.state_dict())
    form = sparse.decode_form
    for name in FORMS:
        sparse.decode_form = lambda ratio, x, name=name: name
        with device.bf16_matmuls():
            out, exact_out = sae.autoencode(x), exact.autoencode(x.double())
        n_others = (out.latents.ne(0) != exact_out.latents.ne(0)).float().sum() / 2
        errors = {
            "x_hat": relative_error(out.x_hat.detach(), exact_out.x_hat.detach()),
            "other latents": float(n_others / 2048 / 32),
        }
        sae.zero_grad()
        exact.zero_grad()
        with device.bf16_matmuls():
            sum(sae.loss(out).values()).backward()
            sum(exact.loss(exact_out).values()).backward()
        for (parameter_name, p), q in zip(sae.named_parameters(), exact.parameters(), strict=True):
            errors[parameter_name] = relative_error(p.grad, q.grad)
        results[f"relative errors against float64, {name}"] = errors
    sparse.decode_form = form


def topk(results, cfg, n=32768, f=16384, k=64):
    """Selection of the k largest of F for N tokens."""
    from src import kernels

    values = torch.randn(n, f, device="cuda")
    few_positive = values - 3  # as in a trained SAE
    results["top-k"] = {
        "torch": median_ms(lambda: values.topk(k, sorted=False), 3),
        "torch, sorted": median_ms(lambda: values.topk(k), 3),
        "kernel": median_ms(lambda: kernels.topk_indices(values, k)),
        "kernel, few positive": median_ms(lambda: kernels.topk_indices(few_positive, k)),
        "zero in place": median_ms(values.zero_),
    }


def rows_of_active(results, cfg, n=32704, f=16384, k=64, d=2048):
    """Decoding and its gradient: by rows of the active latents, and by dense bfloat16 products.

    "dense code" is the time to write the dense code that dense products need.
    """
    table = torch.randn(f, d, device="cuda").bfloat16()
    dense = torch.zeros(n, f, device="cuda", dtype=torch.bfloat16)
    latent = torch.randint(f, (n * k,), device="cuda")
    values = torch.randn(n * k, device="cuda")
    grad = torch.randn(n, d, device="cuda")
    grad_bf16 = grad.bfloat16()
    bounds = torch.arange(0, n * k + 1, k, device="cuda")
    flat_index = torch.arange(n, device="cuda").repeat_interleave(k) * f + latent

    def fill():
        dense.zero_().view(-1)[flat_index] = values.bfloat16()

    results["rows"] = {
        "sums": median_ms(lambda: sparse.weighted_embedding_bag(values, latent, bounds, table)),
        "dots": median_ms(lambda: sparse.bag_dots(grad, latent, bounds, table)),
        "dense product": median_ms(lambda: device.matmul(dense, table)),
        "dense gradient": median_ms(lambda: (grad_bf16 @ table.T).view(-1)[flat_index]),
        "dense code": median_ms(fill),
    }


def forward(results, cfg):
    """The language model up to three quarters of its depth, eager and compiled."""
    sizes = SHAPES[cfg.shape]
    llama = LlamaConfig(**sizes.language_model, max_position_embeddings=512)
    with torch.device("cuda"):
        language_model = LlamaForCausalLM(llama).to(torch.bfloat16)
    language_model.requires_grad_(False).eval()
    ids = torch.randint(0, 4096, (sizes.batch, sizes.length), device="cuda")
    depth = 3 * len(lm.blocks(language_model)) // 4
    sites = list(range(depth // 3, depth + 1))

    def read():
        return lm.read_sites(language_model, ids, sites)

    timed = {"eager": median_ms(read, 5)}
    eager = read()
    started = time.perf_counter()
    lm.compile_blocks(language_model, sizes.batch, sizes.length)
    compiled = read()
    torch.cuda.synchronize()
    timed["compiling, s"] = time.perf_counter() - started
    timed["compiled"] = median_ms(read, 7)
    differences = [relative_error(compiled[site].float(), eager[site].float()) for site in sites]
    timed["difference"] = max(differences)
    timed["graphs"] = torch._dynamo.utils.counters["stats"].get("unique_graphs")
    results["LM"] = timed


def sae_with_states(name, shape, **options):
    """(training of an SAE, random states of its sites, token keys)"""
    fields, latents, k, rows, length = SHAPES[shape]
    argv = ["--model", name, "--device", "cuda", "--latent_size", str(latents), "--k", str(k)]
    cfg = config.parse("train", argv)
    config.complete(cfg)
    values = config.model_options(cfg, name)
    values |= {"k": k, "layer": 3 * fields["num_hidden_layers"] // 4} | options
    values = {key: value[0] if isinstance(value, list) else value for key, value in values.items()}
    sae = model.build(name, fields["hidden_size"], fields["num_hidden_layers"], values).cuda()
    training = SAETraining(sae, name, values, cfg, 100)
    n = rows * length - rows  # the first token of a row does not count
    shape_of_states = (n, sae.hidden_size)
    hidden = {
        site: torch.randn(shape_of_states, device="cuda", dtype=torch.bfloat16)
        for site in sae.sites()
    }
    batch = LocalBatch(hidden, torch.arange(n, device="cuda"), n, 0)
    training.warm_start(batch)
    return training, batch


def step_ms(name, shape, options):
    """Median milliseconds of one update of an SAE on random states."""
    training, batch = sae_with_states(name, shape, **options)
    number = itertools.count()
    return median_ms(lambda: training.step(batch, next(number), False), 5)


def steps(results, cfg):
    """One update of an SAE on random states, and the peak memory with these states."""
    settings = [(name, {}, form) for name in ("TopK", "MLSAE") for form in FORMS]
    settings += [(name, {}, "tf32") for name in ("TopK", "Crosscoder")]
    others = ("RouteSAE", "Vanilla", "JumpReLU", "Gated", "RandomK", "Crosscoder")
    settings += [(name, {}, "") for name in others]
    settings.append(("RouteSAE", AS_PUBLISHED, ""))
    uses_bf16_matmul, form_of = device.uses_bf16_matmul, sparse.decode_form
    results["steps"] = {}
    for name, options, form in settings:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        device.uses_bf16_matmul = uses_bf16_matmul
        sparse.decode_form = form_of
        if form == "tf32":
            device.uses_bf16_matmul = lambda x: False
        elif form:
            sparse.decode_form = lambda ratio, x, form=form: form
        milliseconds = step_ms(name, cfg.shape, options)
        label = f"{name}{' published' if options else ''} {form}"
        peak = torch.cuda.max_memory_allocated() / 1e9
        results["steps"][label] = {"ms": milliseconds, "peak GB": peak}
        print(label, results["steps"][label], flush=True)
    device.uses_bf16_matmul, sparse.decode_form = uses_bf16_matmul, form_of


def profile(results, cfg):
    """Tables of the operations of one update, as text files in the output folder."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    folder = Path(cfg.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("RouteSAE", "MLSAE", "JumpReLU", "Crosscoder"):
        options = AS_PUBLISHED if name == "RouteSAE" else {}
        training, batch = sae_with_states(name, cfg.shape, **options)
        training.step(batch, 0, False)
        with profiler(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            training.step(batch, 1, False)
            torch.cuda.synchronize()
        look = {"sort_by": "self_device_time_total", "row_limit": 25, "max_name_column_width": 60}
        text = profiled.key_averages().table(**look)
        (folder / f"profile_{name}.txt").write_text(text)


PARTS = {
    "rounding": rounding,
    "topk": topk,
    "rows": rows_of_active,
    "lm": forward,
    "steps": steps,
    "profile": profile,
}


def main():
    parser = small_parser("benchmarks.choices", __doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output_dir", default="outputs/benchmark")
    cfg = parser.parse_args()
    pick_device("cuda")
    results = {"device": torch.cuda.get_device_name(), "commit": checkpoint.environment()}
    for name in cfg.only:
        PARTS[name](results, cfg)
        torch.cuda.empty_cache()
        # saved after each part, in case a later one fails
        save_json(results, Path(cfg.output_dir) / "choices.json")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
