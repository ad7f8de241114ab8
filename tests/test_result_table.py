"""The tables of an evaluation fit a terminal, whatever was asked for and of however many SAEs."""

import pytest

from src import metric_table, result_table

SITES = list(range(7, 23))


def result(model, sites, error, word=""):
    keys = [metric.key for metric in metric_table.METRICS if metric.unit]
    routing = {
        "sites": SITES,
        "share": [1 / 16] * 16,
        "share_entropy": 1.0,
        "p_entropy": 0.5,
        "agrees_with_best_site_unscaled": 0.25,
    }
    place = f"_layer{sites[0]}" if len(sites) == 1 else ""
    numbers = dict.fromkeys(keys, error) | {"L0": 32.0, "KLDiv_seq": 371.7576}
    head = {"title": f"{model}_news{word}{place}_s42", "model": model, "sites": sites}
    return head | numbers | ({"Routing": routing} if model == "RouteSAE" else {})


ONE_SITE = [result("TopK", [site], 0.1) for site in reversed(SITES)]
ROUTED = [result("RouteSAE", SITES, 0.2, "_random"), result("RouteSAE", SITES, 0.1)]


@pytest.mark.parametrize("results", [ROUTED[1:], [*ONE_SITE[:3], *ROUTED], [*ONE_SITE, *ROUTED]])
@pytest.mark.parametrize("width", [result_table.LEAST_LINE, 80, 100, 200])
def test_every_metric_of_one_and_of_many_saes_fits_the_line(results, width):
    lines = result_table.lines(results, metric_table.NAMES, width)
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    for metric in metric_table.METRICS:
        if metric.unit:
            assert metric.key in " ".join(words)


def test_results_are_grouped_by_site_with_the_best_first():
    lines = result_table.lines([*ROUTED, *ONE_SITE[:2]], ["NormMSE"], 100)
    assert lines[1:5] == [
        "21       TopK               0.1000  32.00",
        "22       TopK               0.1000  32.00",
        "7 to 22  RouteSAE           0.1000  32.00",
        "         RouteSAE, random   0.2000  32.00",
    ]
    assert "KLDiv" not in " ".join(lines)  # only what was asked for, and L0


def test_columns_without_room_follow_in_a_table_of_their_own_with_the_same_rows():
    lines = result_table.lines([*ONE_SITE, *ROUTED], ["all", *metric_table.NAMES], 60)
    heads = [i for i, line in enumerate(lines) if line.startswith("site ")]
    assert len(heads) > 1
    rows = [[line[:26] for line in lines[i + 1 : i + 19]] for i in heads]
    assert all(of_one == rows[0] for of_one in rows)


def test_saes_that_one_name_would_stand_for_have_their_titles():
    twins = [dict(ROUTED[0], title=f"RouteSAE_news_{word}") for word in ("", "")]
    twins[1]["title"] = "RouteSAE_news_"
    lines = result_table.lines(twins, ["L0"], 100)
    assert sum("RouteSAE_news_" in line for line in lines) == 2
