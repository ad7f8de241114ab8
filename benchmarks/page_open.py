"""Size of the page and time to open it in headless Chromium: `python -m benchmarks.page_open`.

The page shows 4,000 random features with 22 contexts of 41 tokens each, from 200,000 tokens of
text; with `--contexts FILE` it shows the features of a contexts file.
"""

import random
import tempfile
import time
from pathlib import Path

from src.config import small_parser
from src.feature_files import read_features
from src.page import page
from tests.browser import Browser

SITES = list(range(4, 13))
COLUMNS = (
    *("tokens", "position", "token_activations", "layer", "router_weight", "document"),
    *("row", "start"),
)
N_FEATURES = 4000
N_TOKENS = 200_000  # of the text


def random_words(draw, n):
    """n words, drawn by a Zipf-like law from a vocabulary of 20,000."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = [" " + "".join(draw.choices(letters, k=draw.randint(1, 9))) for _ in range(20_000)]
    weights = [1 / (rank + 1) for rank in range(len(vocabulary))]
    return draw.choices(vocabulary, weights, k=n)


def random_context(draw, words, activation):
    """One context of 41 tokens, whose token 20 has the activation."""
    start = draw.randrange(len(words) - 41)
    near = [[draw.randrange(20), round(draw.random() * activation, 3)] for _ in range(3)]
    return {
        "tokens": words[start : start + 41],
        "position": 20,
        "token_activations": [[20, activation], *near],
        "layer": draw.choice(SITES),
        "router_weight": 0.8123,
        "document": start,
        "row": 0,
        "start": start,
        "activation": activation,
    }


def random_feature(draw, words, index, n):
    """Feature `index` of n, as a contexts file has it."""
    top = [random_context(draw, words, round(9 - 0.1 * rank, 4)) for rank in range(10)]
    columns = {key: [context[key] for context in top] for key in COLUMNS}
    site_counts = [draw.randrange(1000) for _ in SITES]
    others = [draw.randrange(n) for _ in range(8)]
    logits = {"from": -2.0, "to": 2.0, "counts": [draw.randrange(10_000) for _ in range(24)]}
    density = draw.random() / 100
    sample_activations = sorted((draw.random() * 9 for _ in range(64)), reverse=True)
    sample = [random_context(draw, words, round(8 * draw.random(), 4)) for _ in range(12)]
    return columns | {
        "activations": [context["activation"] for context in top],
        "token_class": [context["tokens"][20].strip() for context in top],
        "site_counts": site_counts,
        "site_strengths": [round(draw.random(), 4) for _ in SITES],
        "nearest": [[other, round(draw.random(), 3)] for other in others],
        "partners": [[other, round(draw.random(), 3)] for other in others],
        "logit_histogram": logits,
        "max_activation": 9 + index / n,
        "density": density,
        "sample_activations": sample_activations,
        "sample": [context | {"quarter": 1 + i // 3} for i, context in enumerate(sample)],
        "promoted": [[word, 1.234] for word in words[index : index + 8]],
        "suppressed": [[word, 1.234] for word in words[index + 8 : index + 16]],
    }


def random_page(n, seed=0):
    """(contexts, labels) of n random features over nine sites."""
    draw = random.Random(seed)
    words = random_words(draw, N_TOKENS)
    features = {str(i): random_feature(draw, words, i, n) for i in range(n)}
    labels = {}
    for i in range(n):
        description = "the word" + "".join(words[i : i + 6])
        labels[str(i)] = {"description": description, "score": 1 + i % 5}
    shares = [1 / 9] * 9
    contexts = {
        "sites": SITES,
        "model": "RouteSAE",
        "source_model": "x/made",
        "title": "made",
        "latent_size": n,
        "total_latents": n,
        "tokens": 10**6,
        "threshold": 1.0,
        "latent_context_map": features,
        "routing": {"share": shares, "sample": {"tokens": words[:200], "weights": [shares] * 200}},
    }
    return contexts, labels


def main():
    parser = small_parser("benchmarks.page_open", __doc__)
    parser.add_argument("--contexts", type=Path, help="contexts file of apply.py")
    path = parser.parse_args().contexts
    contexts, labels = read_features(path) if path else random_page(N_FEATURES)
    n_features = len(contexts["latent_context_map"])
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        report = Path(folder) / "report.html"
        started = time.perf_counter()
        report.write_text(page(contexts, labels, []), encoding="utf-8")
        seconds = time.perf_counter() - started
        megabytes = report.stat().st_size / 1e6
        print(f"{n_features:,} features: {megabytes:.1f} MB, made in {seconds:.1f} s")
        for what, width in (("desktop", 1200), ("phone", 390)):
            browser = Browser(Path(folder) / what, width=width)
            opened = min(browser.open(report) for _ in range(3))
            started = time.perf_counter()
            browser.press("j")
            pressing = 0.03  # seconds that `press` itself waits
            seconds = time.perf_counter() - started - pressing
            print(
                f"{what}: {opened:.2f} s to open (best of 3), {seconds:.3f} s to the next feature"
            )
            shown = browser.run("document.getElementById('count').textContent")
            assert shown == f"{n_features} of {n_features}"
            assert not browser.requests and not browser.errors
            browser.close()


if __name__ == "__main__":
    main()
