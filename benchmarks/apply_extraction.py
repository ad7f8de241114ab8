"""Extraction of contexts after encoding: the applier's tables against plain loops over activations that do the same job on the same batches.

`python -m benchmarks.apply_extraction --SAE_path X.pt --max_tokens 100000`, an SAE of one site. Both loops count, find maxima, draw the same
sample and keep the same best contexts with the strengths around them (asserted). The published form takes every number out by .item() and
makes the context of every activation above the threshold before it looks at its heap; the lean one takes lists and makes only those that stay.
"""

import heapq
import time

import torch

from src import hooks, lm
from src.applier import SAMPLE, Applier, ContextCollector, parts
from src.config import parse
from src.data import open_rows
from src.events import Table
from src.ops import active, dense, random_integers


class Loop:
    """One activation after the other; a heap per latent and token class, one per latent for the sample."""

    def __init__(self, lean, n_latents, reach, seed, threshold, per_token):
        self.lean, self.reach, self.seed, self.threshold, self.per_token = (
            lean,
            reach,
            seed,
            threshold,
            per_token,
        )
        self.density, self.maximum = [0] * n_latents, [0.0] * n_latents
        self.top, self.sample = [{} for _ in range(n_latents)], [[] for _ in range(n_latents)]

    def keep(self, heap, size, score, row, position, context):
        """Pushes an event while it is among the best of its heap; earlier ones win ties."""
        entry = (score, -row, -position)
        if self.lean and len(heap) == size and entry < heap[0][:3]:
            return
        heapq.heappush(heap, (*entry, context()))
        if len(heap) > size:
            heapq.heappop(heap)

    def update(self, strength, batch, groups):
        row, position = batch.mask.nonzero(as_tuple=True)
        token, latent, value = active(strength)
        drawn = random_integers(
            batch.token_keys()[token] * strength.shape[1] + latent, self.seed, 2**24
        )
        columns = (
            token,
            latent,
            value,
            drawn,
            groups[batch.input_ids[batch.mask]][token],
            batch.row[row][token],
            position[token],
        )
        lists = [column.tolist() for column in columns] if self.lean else None
        for i in range(len(token)):
            t, which, v, draw, group, r, at = (
                (part[i] for part in lists) if self.lean else (part[i].item() for part in columns)
            )
            self.density[which] += 1
            self.maximum[which] = max(self.maximum[which], v)

            def context(t=t, which=which, at=at):
                first = max(0, t - min(self.reach, at))
                near = slice(first, t + self.reach + 1)
                return strength[near, which][row[near] == row[t]].tolist()

            if v > 0:
                self.keep(self.sample[which], SAMPLE, draw, r, at, context)
            if v > self.threshold:
                self.keep(self.top[which].setdefault(group, []), self.per_token, v, r, at, context)


def check(seen, loop, size):
    """The same counts, maxima, samples and best contexts."""
    assert seen.density.tolist() == loop.density and seen.maximum.tolist() == loop.maximum
    top, sample = seen.top.kept, seen.sample.kept
    for latent in range(len(loop.density)):
        heaps = sorted(
            (event for heap in loop.top[latent].values() for event in heap), reverse=True
        )[:size]
        for kept, wanted in ((top, heaps), (sample, sorted(loop.sample[latent], reverse=True))):
            mine = kept.take((kept.latent == latent).nonzero()[:, 0])
            found = zip(mine.score.tolist(), mine.row.tolist(), mine.position.tolist(), strict=True)
            assert sorted(found) == sorted((score, -row, -at) for score, row, at, _ in wanted), (
                latent
            )
            events = {
                (row, at): around
                for row, at, around in zip(
                    mine.row.tolist(), mine.position.tolist(), mine.around, strict=True
                )
            }
            for _, row, at, context in wanted:
                assert events[-row, -at].count_nonzero() <= len(context) and events[
                    -row, -at
                ].float().sum() - sum(context) < 1e-2 * len(context)


@torch.no_grad()
def compare(argv=None):
    """({what: seconds}, {loop: times as fast}) over options of apply.py; prints both."""
    started = time.perf_counter()
    applier = Applier(parse("apply", argv))
    cfg, sae = applier.cfg, applier.sae
    applier.tokenizer, applier.language_model = hooks.open_language_model(cfg, [sae])
    rows, applier.text = open_rows(cfg, applier.tokenizer), applier._token_text()
    spent = {"loading": time.perf_counter() - started}

    def timed(name, work):
        started = time.perf_counter()
        result = work()
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - started
        return result

    threshold = 0.22 * sae.hidden_size**0.5 if cfg.act_threshold is None else cfg.act_threshold
    top, sample = (
        Table(sae.latent_size, 3 * cfg.top_n, cfg.max_per_token),
        Table(sae.latent_size, SAMPLE),
    )
    seen = ContextCollector(sae, rows, cfg.context_length, top, sample, cfg.seed)
    loops = {
        name: Loop(
            lean, sae.latent_size, cfg.context_length, cfg.seed, threshold, cfg.max_per_token
        )
        for name, lean in (("lean loop", True), ("published loop", False))
    }
    groups = torch.tensor(applier.text.group)
    for batch in rows.batches(cfg.batch_size):
        full = timed(
            "language model",
            lambda batch=batch: lm.read_sites(applier.language_model, batch.input_ids, sae.sites()),
        )
        for some, hidden in parts(batch, full, sae):
            p = timed(
                "encode",
                lambda hidden=hidden, b=some: sae.autoencode(
                    sae.gather(hidden), token=b.token_keys()
                ),
            )
            code = sae.strength(p)
            timed(
                "tables",
                lambda p=p, s=code, b=some: seen.update(b, p, s, groups, threshold),
            )
            strength = dense(code)
            for name, loop in loops.items():
                timed(
                    name,
                    lambda s=strength, b=some, loop=loop: loop.update(s, b, groups),
                )
    timed("tables", lambda: (seen.top.kept, seen.sample.kept))  # what waited is merged
    for loop in loops.values():
        check(seen, loop, 3 * cfg.top_n)
    timed(
        "apply, whole",
        lambda: applier.get_context(threshold, cfg.context_length, cfg.max_per_token, cfg.lines),
    )
    print(
        f"{seen.tokens} tokens, {sum(loops['lean loop'].density)} activations, threshold {threshold:.3g}; all three keep the same"
    )
    for name, seconds in spent.items():
        print(f"{name:>15}: {seconds:8.2f} s  {seen.tokens / seconds:>12,.0f} tokens/s")
    times = {name: spent[name] / spent["tables"] for name in loops}
    for name, found in times.items():
        print(f"tables: {found:.1f} times as fast as the {name}")
    print(
        f"apply runs at {spent['language model'] / spent['apply, whole']:.0%} of the language model's rate"
    )
    return spent, times


if __name__ == "__main__":
    compare()
