"""The best events of each latent, token texts and windows, against plain loops."""

import random

import pytest
import torch

from src.contexts import Events, Table, TokenText, best, sentence


def make(n, latents, groups, seed):
    g = torch.Generator().manual_seed(seed)
    latent, group = (
        torch.randint(latents, (n,), generator=g),
        torch.randint(groups, (n,), generator=g),
    )
    value = torch.randperm(n, generator=g).float()
    zero = torch.zeros(n, dtype=torch.long)
    return Events(
        latent, value, group, torch.arange(n), zero, zero, value, value, torch.zeros(n, 1)
    )


def plain(events, per_group, per_latent):
    """What a loop over activations would keep."""
    kept = {}
    for i in events.value.argsort(descending=True).tolist():
        mine = kept.setdefault(int(events.latent[i]), [])
        if (
            len(mine) < per_latent
            and sum(int(events.group[j]) == int(events.group[i]) for j in mine) < per_group
        ):
            mine.append(i)
    return {latent: sorted(float(events.value[i]) for i in mine) for latent, mine in kept.items()}


@pytest.mark.parametrize("seed", range(4))
def test_the_table_over_batches_keeps_what_a_loop_over_everything_keeps(seed):
    events = make(4000, 7, 12, seed)
    table = Table(7, 9, 2)
    for part in torch.arange(4000).split(random.Random(seed).randint(50, 900)):
        chosen = part[table.candidates(events.latent[part], events.group[part], events.score[part])]
        table.add(events.take(chosen))
    kept = table.kept
    found = {latent: sorted(kept.value[kept.latent == latent].tolist()) for latent in range(7)}
    assert found == plain(events, 2, 9)
    assert (
        len(table.candidates(events.latent, events.group, events.score)) < 200
    )  # little is left to look at once the table is full


def test_equal_scores_keep_their_order():
    same = torch.zeros(6, dtype=torch.long)
    assert best(same, torch.arange(6), torch.ones(6), None, 3).tolist() == [0, 1, 2]


class Bytes:
    """A tokenizer of single bytes: characters outside ASCII are spread over tokens."""

    @staticmethod
    def decode(ids):
        return bytes(ids).decode("utf-8", "replace")


def test_characters_over_several_tokens_stand_whole_and_nothing_is_lost():
    text = TokenText(Bytes.decode, 256, ord("a"))
    ids = list("na\u00efve \u65e5\u672c!".encode())
    pieces = text.pieces(ids)
    assert len(pieces) == len(ids) and "".join(pieces) == "na\u00efve \u65e5\u672c!"
    assert pieces[2:4] == ["\u00ef", ""] and pieces[7:10] == ["\u65e5", "", ""]
    assert "\ufffd" in "".join(
        text.pieces(ids[:3])
    )  # a character cut off by the window's end cannot be shown


def test_token_classes_join_case_and_space():
    text = TokenText(Bytes.decode, 256, ord("a"))
    assert (
        text.group[ord("A")] == text.group[ord("a")]
        and text.group[ord("a")] != text.group[ord("b")]
    )


@pytest.mark.parametrize(
    ("pieces", "at", "wanted"),
    [
        ([" One", ".", " Two", " three", ".", " Four"], 3, "Two<X> three</X>."),
        ([" He", " said", ' "', "no", '."', " Then"], 3, 'He said "<X>no</X>."'),
        (["a", "\n", "b", "\n", "c"], 2, "<X>b</X>"),
        ([" end", "."], 1, "end<X>.</X>"),
        (["v1", ".", "5", " is"], 2, "v1.<X>5</X> is"),
        ([" x", " </ACTIVATED>", " y"], 0, "<X>x</X> < /ACTIVATED> y"),
    ],
)
def test_sentences_are_cut_in_the_text_and_the_token_marked(pieces, at, wanted):
    found = sentence(pieces, at).replace("<ACTIVATED>", "<X>").replace("</ACTIVATED>", "</X>")
    assert found.replace("<X> ", " <X>") == wanted.replace("<X> ", " <X>").replace("< /", "</ ")
