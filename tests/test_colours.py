"""The colours of the pictures and of the page, as seen with each kind of colour vision."""

import itertools
import math

import pytest

from src import page, plot_style
from src.zoo import ZOO

# Linear RGB as seen without one kind of cone (Machado, Oliveira and Fernandes 2009, severity 1).
VISION = {
    "all cones": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
    "tritanopia": (
        (1.255528, -0.076749, -0.178779),
        (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.303900),
    ),
}
LEAST = 9.0  # CIEDE2000 between two models; 2.3 is just noticeable side by side
LEAST_LIGHTNESS = 1.5  # L* between neighbours of sixteen sites


def linear(colour):
    """Linear RGB of "#rrggbb" or of numbers from 0 to 255."""
    if isinstance(colour, str):
        colour = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    shares = [value / 255 for value in colour]
    return [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in shares]


def lab(colour, vision):
    """CIELAB (D65) of a colour as it is seen."""
    rgb = [
        min(1.0, max(0.0, sum(m * c for m, c in zip(row, linear(colour), strict=True))))
        for row in VISION[vision]
    ]
    to_xyz = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    white = (0.9505, 1.0, 1.089)
    x, y, z = (
        sum(m * c for m, c in zip(row, rgb, strict=True)) / w
        for row, w in zip(to_xyz, white, strict=True)
    )
    fx, fy, fz = (t ** (1 / 3) if t > 216 / 24389 else t * 841 / 108 + 4 / 29 for t in (x, y, z))
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)


def distance(first, second):
    """CIEDE2000 of two CIELAB colours (Sharma, Wu and Dalal 2005)."""
    (l1, a1, b1), (l2, a2, b2) = first, second
    mean = (math.hypot(a1, b1) + math.hypot(a2, b2)) / 2
    g = 0.5 * (1 - math.sqrt(mean**7 / (mean**7 + 25**7)))
    c1, c2 = math.hypot(a1 * (1 + g), b1), math.hypot(a2 * (1 + g), b2)
    h1 = math.degrees(math.atan2(b1, a1 * (1 + g))) % 360
    h2 = math.degrees(math.atan2(b2, a2 * (1 + g))) % 360
    turn = (h2 - h1 + 180) % 360 - 180 if c1 * c2 else 0.0
    hue = (h1 + turn / 2) % 360 if c1 * c2 else h1 + h2
    light, chroma = (l1 + l2) / 2, (c1 + c2) / 2
    dh = 2 * math.sqrt(c1 * c2) * math.sin(math.radians(turn / 2))
    cosine = {
        k: math.cos(math.radians(k * hue + d)) for k, d in ((1, -30), (2, 0), (3, 6), (4, -63))
    }
    t = 1 - 0.17 * cosine[1] + 0.24 * cosine[2] + 0.32 * cosine[3] - 0.20 * cosine[4]
    sl = 1 + 0.015 * (light - 50) ** 2 / math.sqrt(20 + (light - 50) ** 2)
    sc, sh = 1 + 0.045 * chroma, 1 + 0.015 * chroma * t
    rc = 2 * math.sqrt(chroma**7 / (chroma**7 + 25**7))
    rt = -rc * math.sin(math.radians(60 * math.exp(-(((hue - 275) / 25) ** 2))))
    parts = (l2 - l1) / sl, (c2 - c1) / sc, dh / sh
    return math.sqrt(sum(part**2 for part in parts) + rt * parts[1] * parts[2])


def test_the_distance_is_that_of_published_pairs():
    first = (50.0, 2.6772, -79.7751), (50.0, 0.0, -82.7485)
    second = (2.0776, 0.0795, -1.1350), (0.9033, -0.0636, -0.5514)
    assert round(distance(*first), 4) == 2.0425
    assert round(distance(*second), 4) == 0.9082


@pytest.mark.parametrize("vision", VISION)
def test_the_colours_of_any_two_models_are_told_apart(vision):
    drawn = {name: plot_style.colour(name) for name in ZOO}
    drawn |= {colour: colour for colour in plot_style.MORE_COLOURS if colour not in drawn.values()}
    colours = {name: lab(colour, vision) for name, colour in drawn.items()}
    pairs = itertools.combinations(colours, 2)
    distances = {pair: distance(colours[pair[0]], colours[pair[1]]) for pair in pairs}
    closest = min(distances, key=distances.get)
    assert distances[closest] > LEAST, (closest, distances[closest])


@pytest.mark.parametrize("vision", VISION)
def test_the_colours_of_the_sites_grow_lighter_for_every_reader(vision):
    sites = list(range(7, 23))
    on_page = [lab(colour, vision)[0] for colour in page.site_colours(sites).values()]
    drawn = [
        lab([255 * c for c in colour[:3]], vision)[0] for colour in plot_style.site_colours(16)
    ]
    for lightness in (on_page, drawn):
        steps = [after - before for before, after in itertools.pairwise(lightness)]
        assert min(steps) > LEAST_LIGHTNESS, steps
