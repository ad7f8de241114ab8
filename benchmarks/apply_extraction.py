"""Extraction of contexts after encoding: the applier's tables against a plain loop over activations, same batches, same best values.

`python -m benchmarks.apply_extraction --SAE_path X.pt --max_tokens 100000`
"""

import heapq
import time

import torch

from src import hooks
from src.applier import SAMPLE, Applier, Seen
from src.config import parse
from src.contexts import Table
from src.data import open_rows
from src.ops import active


def plain(strength, batch, groups, threshold, kept, per_token, per_latent):
    """One activation after the other, a heap per latent and token class."""
    row, position = batch.mask.nonzero(as_tuple=True)
    for token, latent, value in zip(*(t.tolist() for t in active(strength)), strict=True):
        if value > threshold:
            group = int(groups[batch.input_ids[row[token], position[token]]])
            heap = kept.setdefault(latent, {}).setdefault(group, [])
            heapq.heappush(heap, (value, int(batch.row[row[token]]), int(position[token])))
            if len(heap) > per_token:
                heapq.heappop(heap)


@torch.no_grad()
def main():
    applier = Applier(parse("apply"))
    cfg, sae = applier.cfg, applier.sae
    applier.tokenizer, model = hooks.open_language_model(cfg, [sae])
    rows, applier.text = open_rows(cfg, applier.tokenizer), applier._token_text()
    threshold = 0.22 * sae.hidden_size**0.5 if cfg.act_threshold is None else cfg.act_threshold
    spent, kept = {"language model": 0.0, "encode": 0.0, "tables": 0.0, "plain loop": 0.0}, {}
    seen = Seen(sae, rows, cfg.context_length, Table(sae.latent_size, 3 * cfg.top_n, cfg.max_per_token), Table(sae.latent_size, SAMPLE), cfg.seed)

    def timed(name, work):
        started = time.perf_counter()
        result = work()
        spent[name] += time.perf_counter() - started
        return result

    for batch in rows.batches(cfg.batch_size):
        hidden = timed("language model", lambda batch=batch: hooks.read(model, batch, sae.sites()))
        p = timed("encode", lambda hidden=hidden, batch=batch: sae.autoencode(sae.gather(hidden), token=batch.token_keys()))
        strength = sae.strength(p)
        timed("tables", lambda p=p, s=strength, batch=batch: seen.update(batch, p, s, applier.text.group, threshold))
        timed("plain loop", lambda s=strength, b=batch: plain(s, b, applier.text.group, threshold, kept, cfg.max_per_token, 3 * cfg.top_n))
    top = seen.top.kept
    for latent in top.latent.unique().tolist():
        wanted = sorted((value for heap in kept[latent].values() for value, *_ in heap), reverse=True)[: 3 * cfg.top_n]
        assert sorted(top.value[top.latent == latent].tolist(), reverse=True) == wanted, latent
    print(f"{seen.tokens} tokens, threshold {threshold:.3g}; the same best values in both")
    for name, seconds in spent.items():
        print(f"{name:>15}: {seconds:8.2f} s  {seen.tokens / seconds:>12,.0f} tokens/s")
    print(f"tables are {spent['plain loop'] / spent['tables']:.1f} times the plain loop's speed; they also count, sample and keep windows")


if __name__ == "__main__":
    main()
