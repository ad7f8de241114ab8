"""The best events of each latent, against a plain loop."""

import random

import numpy as np
import pytest
import torch

from src.events import Events, Table, best, values_around, window_bounds


def random_events(n, latents, groups, seed):
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randint(latents, (n,), generator=generator)
    group = torch.randint(groups, (n,), generator=generator)
    value = torch.randperm(n, generator=generator).float()
    zero = torch.zeros(n, dtype=torch.long)
    return Events(
        latent, value, group, torch.arange(n), zero, zero, value, value, torch.zeros(n, 1)
    )


def values_kept_by_a_loop(events, per_group, per_latent):
    kept = {}
    for index in events.value.argsort(descending=True).tolist():
        chosen = kept.setdefault(int(events.latent[index]), [])
        same_group = sum(events.group[other] == events.group[index] for other in chosen)
        if len(chosen) < per_latent and same_group < per_group:
            chosen.append(index)
    return {
        latent: sorted(float(events.value[index]) for index in chosen)
        for latent, chosen in kept.items()
    }


@pytest.mark.parametrize("seed", range(4))
def test_the_table_over_batches_keeps_what_a_loop_over_everything_keeps(seed):
    events = random_events(4000, 7, 12, seed)
    table = Table(7, 9, 2)
    for batch in torch.arange(4000).split(random.Random(seed).randint(50, 900)):
        new = events.take(batch)
        table.add(new.take(table.candidates(new.latent, new.group, new.score, new.value >= 0)))
    kept = table.kept
    values = {latent: sorted(kept.value[kept.latent == latent].tolist()) for latent in range(7)}
    assert values == values_kept_by_a_loop(events, 2, 9)
    by_latent = [sorted(events.value.tolist()) for events in table.by_latent()]
    assert by_latent == [values[latent] for latent in range(7)]
    # Few events pass the floors of a full table.
    allowed = events.value >= 0
    assert len(table.candidates(events.latent, events.group, events.score, allowed)) < 200


def test_equal_scores_keep_their_order():
    same = torch.zeros(6, dtype=torch.long)
    assert best(same, torch.arange(6), torch.ones(6), None, 3).tolist() == [0, 1, 2]


def test_a_window_ends_with_its_document_and_before_tokens_that_do_not_count():
    documents = np.array([-1, 3, 3, 3, 3, 4, 4, -1, 4, 4])
    bounds = [window_bounds(documents, center, 2) for center in range(1, 10)]
    expected = [(1, 4), (1, 5), (1, 5), (2, 5), (5, 7), (5, 7), (7, 8), (8, 10), (8, 10)]
    assert bounds == expected


def test_values_around_entries_are_those_of_the_dense_code():
    torch.manual_seed(0)
    dense = torch.randint(0, 4, (3, 12)).float()  # three latents in a row of 12 tokens
    key = dense.flatten().nonzero()[:, 0]
    shuffled = key[torch.randperm(len(key))]
    index = torch.arange(0, len(key), 2)
    around = values_around(shuffled, dense.flatten()[shuffled], 12, index, reach=3)
    padded = torch.nn.functional.pad(dense, (3, 3))
    for window, number in zip(around, shuffled[index].tolist(), strict=True):
        latent, position = divmod(number, 12)
        assert window.tolist() == padded[latent, position : position + 7].tolist()
