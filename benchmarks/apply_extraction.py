"""Extraction of contexts after encoding: the applier's tables against loops over activations.

`python -m benchmarks.apply_extraction --SAE_path X.pt --max_tokens 100000`, for an SAE of one site.
All three count activations, find maxima, draw the same sample and keep the same best contexts with
the activations around them, which is asserted. The published loop takes every number out by .item()
and makes the context of every activation above the threshold before it looks at its heap. The lean
loop takes lists, and makes only those contexts that it keeps.
"""

import functools
import heapq
import time

import torch

from src import hooks, lm
from src.applier import EVENTS_PER_CONTEXT, Applier, split_batch, token_text
from src.config import parse, small_parser
from src.data import open_rows
from src.draws import random_integers
from src.events import SAMPLE_SIZE, ContextCollector
from src.sae import BatchInfo
from src.sparse import active, dense


class Loop:
    """Visits one activation after the other.

    Keeps the best contexts in a heap per latent and token class, and the sample in one per latent.
    """

    def __init__(self, lean, n_latents, reach, seed, threshold, per_token):
        self.lean = lean
        self.reach = reach  # tokens of a context on each side
        self.seed = seed
        self.threshold = threshold
        self.per_token = per_token  # best contexts per latent and token class
        self.density = [0] * n_latents
        self.maximum = [0.0] * n_latents
        self.top = [{} for _ in range(n_latents)]
        self.sample = [[] for _ in range(n_latents)]

    def keep(self, heap, size, score, row, position, context):
        """Push an event if it is among the best of its heap. Of equal scores the first is kept."""
        entry = (score, -row, -position)
        if self.lean and len(heap) == size and entry < heap[0][:3]:
            return
        heapq.heappush(heap, (*entry, context()))
        if len(heap) > size:
            heapq.heappop(heap)

    def update(self, strength, batch, groups):
        """Visit the activations of one batch. strength: dense codes [N,F]."""
        row, position = batch.mask.nonzero(as_tuple=True)
        token, latent, value = active(strength)
        keys = batch.token_keys()[token] * strength.shape[1] + latent
        draw = random_integers(keys, self.seed, 2**24)
        group = groups[batch.input_ids[batch.mask]][token]
        columns = (token, latent, value, draw, group, batch.row[row][token], position[token])
        if self.lean:
            events = zip(*(column.tolist() for column in columns), strict=True)
        else:
            events = (tuple(column[i].item() for column in columns) for i in range(len(token)))
        for event in events:
            self.visit(strength, row, event)

    def visit(self, strength, row_of_token, event):
        token, latent, value, draw, group, row, position = event
        self.density[latent] += 1
        self.maximum[latent] = max(self.maximum[latent], value)

        def context():
            first = max(0, token - min(self.reach, position))
            near = slice(first, token + self.reach + 1)
            same_row = row_of_token[near] == row_of_token[token]
            return strength[near, latent][same_row].tolist()

        if value > 0:
            self.keep(self.sample[latent], SAMPLE_SIZE, draw, row, position, context)
        if value > self.threshold:
            heap = self.top[latent].setdefault(group, [])
            self.keep(heap, self.per_token, value, row, position, context)


def check(collector, loop, size):
    """Assert that counts, maxima, samples and best contexts are the same."""
    assert collector.fired.tolist() == loop.density
    assert collector.maximum.tolist() == loop.maximum
    for latent in range(len(loop.density)):
        top = sorted((entry for heap in loop.top[latent].values() for entry in heap), reverse=True)
        check_events(collector.top.kept, latent, top[:size])
        check_events(collector.sample.kept, latent, sorted(loop.sample[latent], reverse=True))


def check_events(kept, latent, entries):
    """Assert that a table's events of a latent are the entries of a loop's heaps."""
    events = kept.take((kept.latent == latent).nonzero()[:, 0])
    scores, rows, positions = events.score.tolist(), events.row.tolist(), events.position.tolist()
    expected = sorted((score, -row, -position) for score, row, position, _ in entries)
    assert sorted(zip(scores, rows, positions, strict=True)) == expected, latent
    around = dict(zip(zip(rows, positions, strict=True), events.around, strict=True))
    for _, row, position, context in entries:
        activations = around[-row, -position]
        assert activations.count_nonzero() <= len(context)
        # the table keeps them in float16
        assert activations.float().sum() - sum(context) < 1e-2 * len(context)


class Stopwatch:
    """Sums of seconds by name."""

    def __init__(self):
        self.seconds = {}

    def time(self, name, work):
        """What work() returns."""
        started = time.perf_counter()
        result = work()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
        return result


@torch.no_grad()
def compare(argv=None):
    """({part: seconds}, {loop: times as fast}) for options of apply.py; prints both."""
    watch = Stopwatch()
    started = time.perf_counter()
    parser = small_parser("benchmarks.apply_extraction", __doc__)
    parser.epilog = "All options are those of apply.py."
    applier = Applier(parse("apply", parser.parse_known_args(argv)[1]))
    cfg, sae = applier.cfg, applier.sae
    applier.tokenizer, applier.language_model = hooks.open_language_model(cfg)
    rows, applier.text = open_rows(cfg, applier.tokenizer), token_text(applier.tokenizer)
    watch.seconds["loading"] = time.perf_counter() - started

    threshold = applier.threshold()
    n_top = EVENTS_PER_CONTEXT * cfg.top_n
    collector = ContextCollector(sae, rows, cfg.context_length, n_top, cfg.max_per_token, cfg.seed)
    sizes = (sae.latent_size, cfg.context_length, cfg.seed, threshold, cfg.max_per_token)
    loops = {"lean loop": Loop(True, *sizes), "published loop": Loop(False, *sizes)}
    groups = torch.tensor(applier.text.group)

    def read(batch):
        return lm.read_sites(applier.language_model, batch.input_ids, sae.sites())

    def encode(batch, hidden):
        return sae.autoencode(sae.gather(hidden), BatchInfo(token_keys=batch.token_keys()))

    def extract(batch, out):
        collector.update(batch, sae, out, groups, threshold)

    for batch in rows.batches(cfg.batch_size):
        states = watch.time("language model", functools.partial(read, batch))
        for part, hidden in split_batch(batch, states, sae):
            out = watch.time("encode", functools.partial(encode, part, hidden))
            code = sae.strength(out)
            watch.time("tables", functools.partial(extract, part, out))
            strength = dense(code)
            for name, loop in loops.items():
                watch.time(name, functools.partial(loop.update, strength, part, groups))
    # reading them merges the events that wait
    watch.time("tables", lambda: (collector.top.kept, collector.sample.kept))
    for loop in loops.values():
        check(collector, loop, n_top)
    options = (threshold, cfg.context_length, cfg.max_per_token, cfg.lines)
    watch.time("apply, whole", lambda: applier.get_context(*options))
    n_activations = sum(loops["lean loop"].density)
    print(f"{collector.n_tokens} tokens, {n_activations} activations, threshold {threshold:.3g}")
    return report(watch.seconds, collector.n_tokens, loops)


def report(seconds, tokens, loops):
    """Print rates and speedups; returns (seconds, speedups)."""
    print("the tables and both loops keep the same contexts")
    for name, spent in seconds.items():
        print(f"{name:>15}: {spent:8.2f} s  {tokens / spent:>12,.0f} tokens/s")
    times = {name: seconds[name] / seconds["tables"] for name in loops}
    for name, factor in times.items():
        print(f"tables: {factor:.1f} times as fast as the {name}")
    share = seconds["language model"] / seconds["apply, whole"]
    print(f"apply runs at {share:.0%} of the language model's rate")
    return seconds, times


if __name__ == "__main__":
    compare()
