"""The comparison table and the course of a training are made from JSON alone."""

import json
import sys

import pytest

from src import plots

STEPS = range(1, 6)


def metrics_lines():
    for step in STEPS:
        common = {
            "step": step,
            "tokens": 100 * step,
            "tokens_per_s": 5,
            "lr": 0.1,
            "loss": 1 / step,
        }
        yield {
            "sae": "RouteSAE_t",
            "sites": [4, 5, 6],
            **common,
            "NormMSE": 0.9 / step,
            "AuxK": 0.1 / step,
            "L0": 16.0,
            "dead": 0.1,
            "share": [0.5, 0.3, 0.2],
        }
        yield {
            "sae": "Gated_t",
            "sites": [5],
            **common,
            "NormMSE": 0.5 / step,
            "L1": 0.5,
            "GateAux": 0.2,
            "L0": 900 / step,
            "dead": 0.0,
        }


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, which stay open."""
    import matplotlib.pyplot as plt

    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    return figures


def is_inside(figure):
    """Whether every axis and every tick label lies inside the picture."""
    figure.canvas.draw()
    width, height = figure.canvas.get_width_height()
    boxes = [axis.get_tightbbox() for axis in figure.axes]
    return all(
        b.x0 >= -2 and b.y0 >= -2 and b.x1 <= width + 2 and b.y1 <= height + 2 for b in boxes
    )


def tick_texts(axis):
    return [text.get_text() for text in axis.get_xticklabels() if text.get_text()]


def test_the_course_has_one_panel_a_quantity_and_none_that_is_empty(
    tmp_path, monkeypatch, capsys, drawn
):
    path = tmp_path / "metrics.jsonl"
    cut_line = '{"sae": "Gat'  # the process was killed while it wrote
    path.write_text("\n".join([*map(json.dumps, metrics_lines()), cut_line]))
    monkeypatch.setattr(sys, "argv", ["plots", str(path), str(tmp_path / "course.png")])
    plots.main()
    (figure,) = drawn
    panels = {axis.get_title(loc="left"): axis for axis in figure.axes}
    assert list(panels) == [
        "NormMSE, share of squared norm",
        "AuxK, term of the loss",
        "L1, term of the loss",
        "GateAux, term of the loss",
        "L0, active latents a token",
        "dead latents, share",
        "RouteSAE: share of tokens by site",
    ]
    mse, l0 = panels["NormMSE, share of squared norm"], panels["L0, active latents a token"]
    assert list(mse.lines[1].get_ydata()) == [0.5 / step for step in STEPS]
    assert list(mse.lines[1].get_xdata()) == [100 * step for step in STEPS]
    assert list(l0.lines[0].get_ydata()) == [16.0] * 5
    (dead,) = panels["dead latents, share"].lines  # that of Gated stays 0
    assert list(dead.get_ydata()) == [0.1] * 5
    shares = panels["RouteSAE: share of tokens by site"]
    assert [text.get_text() for text in shares.texts] == ["site 4", "site 5", "site 6"]
    assert is_inside(figure)
    assert (tmp_path / "course.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "course.pdf").read_bytes().startswith(b"%PDF")
    assert "course.png" in capsys.readouterr().out


def test_a_run_without_lines_is_one_clear_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="metrics.jsonl has no line yet"):
        plots.load_courses(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize(
    "line",
    [
        "[1]",
        '{"a": 1}',
        "5",
        '{"sae": "x", "tokens": "many", "loss": 1, "L0": 1}',
        '{"sae": "x", "tokens": 1, "loss": 1, "L0": 1, "share": [0.5]}',
        '{"sae": "x", "tokens": 1, "loss": 1, "L0": 1, "share": [0.5], "sites": [1, 2]}',
    ],
)
def test_lines_of_another_kind_are_one_clear_error(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl is no metrics.jsonl of a training"):
        plots.load_courses(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("content", ["[1]", "{}", '{"title": "x", "NormMSE": "low"}', '"text"'])
def test_a_file_that_is_no_evaluation_is_named(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=r"x.json is no result of evaluate.py"):
        plots.load(tmp_path)


WHOLE = {
    "title": "x",
    "NormMSE": 0.5,
    "L0": 2.0,
    "sites": [1],
    "k": 4,
    "tokens": 9,
    "trained_tokens": 9,
    "split": "eval",
    "data_path": "a",
    "git_commit": "1",
    "versions": {"torch": "2"},
    "Routing": {"sites": [1, 2], "share": [0.5, 0.5]},
    "Density_histogram": {"latents": [1, 2, 3, 4, 5, 6, 7]},
}


@pytest.mark.parametrize("key", WHOLE)
@pytest.mark.parametrize("value", ["absent", None, 5, "text", [], {}, ["a"], 1e308])
def test_a_foreign_evaluation_is_shown_or_named(tmp_path, key, value):
    result = {name: item for name, item in WHOLE.items() if (name, value) != (key, "absent")}
    if value != "absent":
        result[key] = value
    (tmp_path / "x.json").write_text(json.dumps(result))
    try:
        results = plots.load(tmp_path)
    except ValueError as error:
        assert str(error).endswith(
            "x.json is no result of evaluate.py; remove it or use --only NAME"
        )
        return
    assert "| 0.5000 |" in plots._document(results, "p.png") or key == "NormMSE"


def test_a_result_with_nothing_but_what_it_needs_is_drawn(tmp_path):
    results = [{key: WHOLE[key] for key in ("title", "NormMSE", "L0", "sites")}, WHOLE]
    plots.picture(results, tmp_path / "p.png")
    assert (tmp_path / "p.png").exists()


def test_a_title_stays_in_its_cell():
    table = plots.table([WHOLE | {"title": "a|b\n| c \x1b[31m"}])
    assert len(table.splitlines()) == 3 and "| a\\|b\\n\\| c \\x1b[31m |" in table


def test_a_title_with_dollars_is_drawn_as_it_is(tmp_path):
    plots.picture([WHOLE | {"title": "a$\\frac{$b"}], tmp_path / "p.png")
    assert (tmp_path / "p.png").exists()


def test_an_sae_that_is_never_active_stands_on_its_frontier():
    family = [evaluation("Vanilla_d_target_l08", l0, 0.3) for l0 in (0.0, 8.0)]
    assert plots.interpolate(family, 4.0) is None


def test_a_picture_replaces_a_planted_link_and_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(map(json.dumps, metrics_lines())))
    courses = plots.load_courses(path)
    precious, picture = tmp_path / "precious", tmp_path / "course.png"
    precious.write_text("precious")
    picture.symlink_to(precious)
    plots.run_picture(courses, picture)
    assert precious.read_text() == "precious"
    assert not picture.is_symlink()
    before = picture.read_bytes()
    assert before.startswith(b"\x89PNG")

    def fail_halfway(_figure, file, **_):
        file.write(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail_halfway)
    with pytest.raises(OSError, match="full"):
        plots.run_picture(courses, picture)
    assert picture.read_bytes() == before
    assert sorted(item.name for item in tmp_path.iterdir()) == [
        "course.pdf",
        "course.png",
        "metrics.jsonl",
        "precious",
    ]


def evaluation(title, l0, error, k=None):
    model = title.split("_")[0]
    return {"title": title, "L0": l0, "NormMSE": error, "k": k, "sites": [12], "model": model}


def test_a_frontier_is_read_off_between_its_points_only():
    results = [
        evaluation("Vanilla_d_target_l08", 8.0, 0.3),
        evaluation("Vanilla_d_target_l032", 32.0, 0.1),
        evaluation("TopK_d", 16.0, 0.15, k=16),
    ]
    family = plots.families(results)["Vanilla_d"]
    assert plots.interpolate(family, 16.0)["NormMSE"] == pytest.approx(0.2)
    assert plots.interpolate(family, 64.0) is None
    assert "Vanilla_d, read off its frontier" in plots.table(results)


def test_results_of_other_tokens_are_not_ranked_with_held_out_ones():
    measured = {"eval": 50_000, "train": 500}
    results = []
    for title, split, error in (
        ("TopK_d_train", "train", 0.01),
        ("TopK_d", "eval", 0.2),
        ("Vanilla_d_target_l08", "eval", 0.3),
        ("Vanilla_d_target_l032_train", "train", 0.02),
        ("Gated_d", "eval", 0.1),
    ):
        result = evaluation(title, 32.0 if "32" in title else 8.0, error)
        results.append(result | {"split": split, "tokens": measured[split]})
    few = evaluation("Gated_d_2", 8.0, 0.05, k=16) | {"split": "eval", "tokens": 800}
    rows = plots.table([*results, few]).splitlines()
    assert "| split | tokens |" in rows[0]
    shown = [[cell.strip() for cell in row.split("|")[1:5]] for row in rows[2:]]
    assert [row[0] for row in shown] == [
        "Gated_d",
        "TopK_d",
        "Vanilla_d_target_l08",
        "Gated_d_2",
        "TopK_d_train",
        "Vanilla_d_target_l032_train",
    ]
    assert shown[0][2:] == ["eval", "50,000"] and shown[3][2:] == ["eval", "800"]
    # no frontier is drawn through points of different tokens
    assert all(len(family) == 1 for family in plots.families([*results, few]).values())


def test_the_table_groups_rows_by_the_sites_they_are_patched_at():
    errors = {"Crosscoder_d": 0.05, "TopK_d_layer7": 0.3, "TopK_d_layer22": 0.1, "RouteSAE_d": 0.2}
    sites = {
        "Crosscoder_d": [7, 14, 22],
        "TopK_d_layer7": [7],
        "TopK_d_layer22": [22],
        "RouteSAE_d": list(range(7, 23)),
        "Gated_d": [22],
    }
    results = [evaluation(title, 8.0, errors.get(title, 0.2)) for title in sites]
    results = [result | {"sites": sites[result["title"]]} for result in results]
    rows = plots.table(results).splitlines()[2:]
    assert [[cell.strip() for cell in row.split("|")[1:3]] for row in rows] == [
        ["TopK_d_layer7", "7"],
        ["TopK_d_layer22", "22"],
        ["Gated_d", "22"],
        ["RouteSAE_d", "7 ... 22"],
        ["Crosscoder_d", "7 14 22"],
    ]


def at(model, site, l0, error, rest=""):
    """The result of an SAE at one site, or at several."""
    sites = site if isinstance(site, list) else [site]
    title = f"{model}_d_layer{site}{rest}" if len(sites) == 1 else f"{model}_d{rest}"
    result = evaluation(title, l0, error) | {"sites": sites, "KLDiv": 2 * error, "model": model}
    histogram = {"latents": [1, 0, 2, 5, 9, 3, 1]}
    return result | {"Density_histogram": histogram}


def test_where_all_l0_are_alike_there_are_bars_grouped_by_the_patched_site(tmp_path, drawn):
    results = [
        at("TopK", 4, 31.999, 0.1),
        at("Vanilla", 12, 32.0001, 0.3),
        at("TopK", 12, 32.0001, 0.2),
        at("RouteSAE", [4, 8, 12], 32.0, 0.15),
    ]
    plots.picture(results, tmp_path / "bars.png")
    (figure,) = drawn
    error = figure.axes[0]
    groups = [t.get_text().strip() for t in error.texts if t.get_fontweight() == "bold"]
    assert groups == ["site 4", "site 12", "sites 4, 8, 12"]
    assert [t.get_text() for t in error.get_yticklabels()] == [
        "TopK",
        "TopK",
        "Vanilla",
        "RouteSAE",
    ]
    assert [bar.get_width() for bar in error.patches] == [0.1, 0.2, 0.3, 0.15]
    colours = [bar.get_facecolor() for bar in error.patches]
    assert colours[0] == colours[1] and len(set(colours)) == 3  # one colour a model
    assert is_inside(figure)


def test_a_model_at_many_sites_is_a_curve_and_a_routed_one_a_level_line(tmp_path, drawn):
    results = [at("TopK", site, 32.0, site / 100) for site in (4, 6, 8, 10)]
    results += [at("RouteSAE", [4, 6, 8, 10], 32.0, 0.05)]
    results += [at("RouteSAE", [4, 6, 8, 10], 32.0, 0.09, "_random")]
    results += [at("TopK", 8, 32.0, 0.13, "_frozen-decoder")]
    plots.picture(results, tmp_path / "sites.png")
    (figure,) = drawn
    error = figure.axes[0]
    curve, _ = error.lines
    assert list(curve.get_xdata()) == [4, 6, 8, 10]
    assert [text.get_text() for text in error.texts] == [
        "TopK, one a site",
        "TopK, frozen-decoder, site 8",
        "RouteSAE",
        "RouteSAE, random",
    ]
    assert is_inside(figure)


def test_results_with_one_title_are_one_curve_with_one_name(drawn):
    results = [at("TopK", site, 32.0, site / 100) | {"title": "TopK"} for site in (2, 4, 6)]
    axis = plots.pyplot().figure(figsize=(6, 4)).add_subplot()
    plots.draw_sites(axis, results, "NormMSE", "NormMSE", 4)
    assert [text.get_text() for text in axis.texts] == ["TopK, one a site"]


def trained_on(model, site, tokens, error):
    return at(model, site, 32.0, error) | {"trained_tokens": tokens, "Dead": 0.0}


def test_curves_over_tokens_join_the_trainings_of_one_model_and_its_sites():
    from experiments import smollm2_curves

    results = [
        trained_on("TopK", 14, 200_000, 0.2),
        trained_on("TopK", 14, 100_000, 0.3),
        trained_on("TopK", 7, 100_000, 0.1),
        trained_on("RouteSAE", [7, 14], 100_000, 0.4),
    ]
    named = smollm2_curves.curves(results)
    assert list(named) == ["RouteSAE, sites 7 ... 14", "TopK, site 7", "TopK, site 14"]
    assert [row["NormMSE"] for row in named["TopK, site 14"]] == [0.3, 0.2]
    rows = smollm2_curves.table(named).splitlines()[2:]
    assert rows[-1] == "| TopK, site 14 | 200,000 | 0.2000 | 0.4000 | 0.0000 |"
    with pytest.raises(ValueError, match="TopK_d_layer7 has no KLDiv; measure it"):
        smollm2_curves.curves([trained_on("TopK", 7, 100_000, 0.1) | {"KLDiv": None}])


@pytest.mark.parametrize("worst, scale", [(0.09, "linear"), (0.5, "log")])
def test_small_values_over_sites_are_not_pressed_together_by_a_large_one(drawn, worst, scale):
    results = [at("TopK", site, 32.0, site / 100) for site in (2, 4, 6)]
    results += [at("RandomK", 6, 32.0, worst)]
    axis = plots.pyplot().figure(figsize=(6, 4)).add_subplot()
    plots.draw_sites(axis, results, "NormMSE", "NormMSE", 4)
    assert axis.get_yscale() == scale
    low, high = axis.get_ylim()
    assert low < 0.02 and high > worst


@pytest.mark.parametrize("l0", [(31.999, 32.0001), (8.0, 64.0), (0.5, 3000.0), (32.0, 36.0)])
@pytest.mark.parametrize("error", [(0.1, 0.1), (0.1, 0.1000001), (1e-4, 0.9)])
def test_no_axis_of_a_frontier_collapses(tmp_path, drawn, l0, error):
    results = [
        at("TopK", 12, l0[0], error[0], "_k1"),
        at("TopK", 12, l0[1], error[1], "_k2"),
        at("Gated", 12, l0[1], error[0]),
    ]
    figure = plots.pyplot().figure(figsize=(6, 4))
    axis = figure.add_subplot()
    plots.draw_frontiers(axis, results, "NormMSE", "NormMSE", 4)
    for line in (axis.xaxis, axis.yaxis):
        low, high = line.get_view_interval()
        assert high / low > 1.2
        texts = [label.get_text() for label in line.get_ticklabels()]
        assert 2 <= len(texts) == len(set(texts)), texts
    assert is_inside(figure)
    assert [text.get_text() for text in axis.texts] == ["TopK, site 12", "Gated, site 12"]


def test_a_site_has_one_marker_and_a_model_one_colour_in_every_panel(tmp_path, drawn):
    results = [at(m, s, l0, 0.1) for m in ("TopK", "Gated") for s in (4, 12) for l0 in (8.0, 64.0)]
    plots.picture(results, tmp_path / "frontier.png")
    panels = drawn[0].axes[:2]
    looks = [[(line.get_color(), line.get_marker()) for line in axis.lines] for axis in panels]
    assert looks[0] == looks[1]
    assert len(set(looks[0])) == 4
    assert {len({look[i] for look in looks[0]}) for i in (0, 1)} == {2}


def test_labels_are_moved_apart_and_keep_their_order():
    moved = plots.plot_style.spread([0.5, 0.5, 0.51, 0.1], 0.1)
    assert moved[3] == 0.1
    assert sorted(moved[:3])[1] - min(moved[:3]) >= 0.099
    assert moved[0] < moved[1] < moved[2]


def test_names_say_the_model_and_what_is_special():
    results = [
        at("TopK", 4, 32, 0.1, "_s1"),
        at("TopK", 8, 32, 0.1, "_s1"),
        at("RouteSAE", [4, 5, 6], 32, 0.1, "_random_s1"),
        at("TopK", 4, 64, 0.1, "_k64_s1"),
    ]
    assert plots.names.of_results(results) == [
        "TopK, site 4",
        "TopK, site 8",
        "RouteSAE, random",
        "TopK, site 4, k 64",
    ]
    assert plots.names.sites([4, 5, 6]) == "sites 4 to 6"
    assert plots.names.sites([4, 6]) == "sites 4, 6"
