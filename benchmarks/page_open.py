"""Size of the page and time to open it in headless Chromium: `python -m benchmarks.page_open`.

1,000 features made here, 22 contexts of 41 tokens each.
"""

import random
import tempfile
import time
from pathlib import Path

from src.page import page
from tests.browser import Browser


def made(n, seed=0):
    """(contexts, labels) of n features over nine sites, words drawn by a Zipf-like law from 20,000."""
    draw = random.Random(seed)
    letters, sites = "abcdefghijklmnopqrstuvwxyz", list(range(4, 13))
    vocabulary = [" " + "".join(draw.choices(letters, k=draw.randint(1, 9))) for _ in range(20_000)]
    weights = [1 / (i + 1) for i in range(len(vocabulary))]
    stream = draw.choices(vocabulary, weights, k=1_000_000)

    def one(value):
        start = draw.randrange(len(stream) - 41)
        near = [
            [20, value],
            *([draw.randrange(20), round(draw.random() * value, 3)] for _ in range(3)),
        ]
        return {
            "tokens": stream[start : start + 41],
            "position": 20,
            "token_activations": near,
            "layer": draw.choice(sites),
            "router_weight": 0.8123,
            "document": start,
            "activation": value,
        }

    table, labels = {}, {}
    for i in range(n):
        top = [one(round(9 - 0.1 * j, 4)) for j in range(10)]
        columns = {
            key: [c[key] for c in top]
            for key in (
                "tokens",
                "position",
                "token_activations",
                "layer",
                "router_weight",
                "document",
            )
        }
        table[str(i)] = columns | {
            "activations": [c["activation"] for c in top],
            "token_class": [c["tokens"][20].strip() for c in top],
            "site_counts": [draw.randrange(1000) for _ in sites],
            "max_activation": 9 + i / n,
            "density": draw.random() / 100,
            "sample_activations": sorted((draw.random() * 9 for _ in range(64)), reverse=True),
            "sample": [
                one(round(8 * draw.random(), 4)) | {"quarter": 1 + j // 3} for j in range(12)
            ],
            "promoted": [[w, 1.234] for w in stream[i : i + 8]],
            "suppressed": [[w, 1.234] for w in stream[i + 8 : i + 16]],
        }
        labels[str(i)] = {
            "description": "the word" + "".join(stream[i : i + 6]),
            "score": 1 + i % 5,
        }
    header = {
        "sites": sites,
        "model": "RouteSAE",
        "source_model": "x/made",
        "title": "made",
        "latent_size": n,
        "total_latents": n,
        "tokens": 10**6,
    }
    weights = [[1 / 9] * 9] * 200
    return header | {
        "threshold": 1.0,
        "latent_context_map": table,
        "routing": {"share": [1 / 9] * 9, "sample": {"tokens": stream[:200], "weights": weights}},
    }, labels


def main():
    contexts, labels = made(1000)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        report = Path(folder) / "report.html"
        report.write_text(page(contexts, labels, []), encoding="utf-8")
        print(f"1,000 features: {report.stat().st_size / 1e6:.1f} MB")
        for what, width in (("desktop", 1200), ("phone", 390)):
            browser = Browser(Path(folder) / what, width=width)
            opened = min(browser.open(report) for _ in range(3))
            started = time.perf_counter()
            browser.press("j")
            print(
                f"{what}: {opened:.2f} s to open (best of 3), {time.perf_counter() - started - 0.03:.3f} s to the next feature"
            )
            assert (
                browser.run("document.querySelectorAll('#list a').length") == 1000
                and not browser.requests
                and not browser.errors
            )
            browser.close()


if __name__ == "__main__":
    main()
