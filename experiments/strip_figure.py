"""A text, each token coloured by the site that the router chose, beside the card of one feature.

python -m experiments.strip_figure SAE.pt --text "..." --latent 337 --out docs/strip.png

Contexts and labels of the SAE are taken from --output_dir (apply.py and interpret.py make them).
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from src import files, latent_notes, plot_style
from src.config import small_parser
from src.plot_style import DARK, GREY, pyplot
from src.reader import Reader

WIDTH, HEIGHT = 12.0, 3.5  # inches
LINE = 0.29  # inches from one line of text to the next
FONT = {"family": "DejaVu Sans", "size": 10.5}
CONTEXTS = 6
LABEL_CHARS = 56
CONTEXT_CHARS = 30  # on each side of the active token
MAX_SITES_LISTED = 20


class Piece(NamedTuple):
    """A text in one style on a line of its own coordinates, in inches from the upper left."""

    x: float
    y: float
    text: str


class Canvas:
    """Text set piece by piece on a page; widths are measured as they are drawn."""

    def __init__(self) -> None:
        plt = pyplot()
        self.figure = plt.figure(figsize=(WIDTH, HEIGHT), dpi=plot_style.DPI, layout="none")
        self.page = self.figure.add_axes((0, 0, 1, 1))
        self.page.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0))
        self.page.axis("off")
        self.renderer = self.figure.canvas.get_renderer()

    def write(self, piece: Piece, box: str = "", **style: Any) -> float:
        """Write a piece, perhaps on a coloured box; return where its right end is."""
        look = FONT | {"va": "baseline", "color": DARK, "parse_math": False} | style
        drawn = self.page.text(piece.x, piece.y, piece.text, zorder=2, **look)
        extent = drawn.get_window_extent(self.renderer)
        end = piece.x + extent.width / self.figure.dpi
        # Spaces at the ends are part of a token, and matplotlib leaves them out.
        if box:
            size = {"width": end - piece.x, "height": 0.8 * LINE}
            self.page.add_patch(
                pyplot().Rectangle((piece.x, piece.y - 0.58 * LINE), color=box, lw=0, **size)
            )
        return end

    def save(self, path: Path) -> None:
        """Write the picture. Every place is given in inches, so that nothing is laid out."""
        # savefig() returns to this setting after each file.
        pyplot().rcParams["figure.constrained_layout.use"] = False
        plot_style.save(self.figure, path)

    def width(self, text: str, **style: Any) -> float:
        """The width of a text in inches, its spaces included."""
        bar = {"parse_math": False, "alpha": 0}
        both = self.page.text(0, 0, f"|{text}|", **(FONT | bar | style))
        ends = self.page.text(0, 0, "||", **(FONT | bar | style))
        extents = [drawn.get_window_extent(self.renderer).width for drawn in (both, ends)]
        both.remove()
        ends.remove()
        return (extents[0] - extents[1]) / self.figure.dpi


def text_colour(background: Any) -> str:
    """Black or white, whichever is read better on a colour."""
    red, green, blue = background[:3]
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"


def draw_strip(canvas: Canvas, reading: Any, sites: list[int], right: float) -> None:
    """Draw the tokens of a text on boxes in the colours of their sites, and a key below."""
    colours = dict(zip(sites, plot_style.site_colours(len(sites)), strict=True))
    left, y = 0.25, 0.42
    canvas.write(Piece(left, y, "Where the router reads each token"), weight="bold", size=12)
    x, y = left, y + 1.6 * LINE
    for token, site in zip(reading.tokens, reading.sites, strict=True):
        shown = token.replace("\n", "⏎")
        width = canvas.width(shown)
        if x + width > right or (x == left and shown == " "):
            x, y = left, y + 1.12 * LINE
            shown = shown.lstrip(" ")
            width = canvas.width(shown)
        box = {"width": width, "height": 0.92 * LINE, "color": colours[site], "lw": 0}
        canvas.page.add_patch(pyplot().Rectangle((x, y - 0.66 * LINE), **box))
        canvas.write(Piece(x, y, shown), color=text_colour(colours[site]))
        x += width
    y = HEIGHT - 0.3
    canvas.write(Piece(left, y - 0.32, "site (output of block)"), color=GREY, size=9)
    step = (right - left) / len(sites)
    for index, site in enumerate(sites):
        box = {"width": step, "height": 0.26, "color": colours[site], "lw": 0}
        canvas.page.add_patch(pyplot().Rectangle((left + index * step, y - 0.19), **box))
        middle = left + (index + 0.5) * step
        look = {"ha": "center", "color": text_colour(colours[site]), "size": 9}
        canvas.write(Piece(middle, y, str(site)), **look)


def draw_card(
    canvas: Canvas, latent: int, entry: dict[str, Any], note: Any, sites: list[int], left: float
) -> None:
    """Draw what is known of a latent: its label, where it fires, what it promotes, contexts."""
    y = 0.42
    canvas.write(Piece(left, y, f"Latent {latent}"), weight="bold", size=12)
    label = textwrap.shorten(note.label.split(", such as")[0], LABEL_CHARS, placeholder=" ...")
    canvas.write(Piece(left, y + LINE, label or "no label"), size=10)
    canvas.write(Piece(left, y + 1.85 * LINE, note.origin), color=GREY, size=9)
    _draw_sites(canvas, entry, sites, left)
    y += 2.95 * LINE
    for strength, before, token, after in contexts(entry):
        middle = left + 2.75
        canvas.write(Piece(left, y, f"{strength:.1f}"), color=GREY, size=9)
        canvas.write(Piece(middle, y, before), ha="right", size=9.5)
        end = canvas.write(Piece(middle, y, token), box="#FBD9C4", size=9.5, weight="bold")
        gap = canvas.width(after[: len(after) - len(after.lstrip())], size=9.5)
        canvas.write(Piece(end + gap, y, after.lstrip()), size=9.5)
        y += LINE


def _draw_sites(canvas: Canvas, entry: dict[str, Any], sites: list[int], left: float) -> None:
    """Bars for the number of tokens at each site on which the latent fired."""
    counts = entry.get("site_counts")
    if not counts or len(sites) > MAX_SITES_LISTED:
        return
    width, height = 1.75, 0.62
    place = ((WIDTH - width - 0.3) / WIDTH, 1 - (0.36 + height) / HEIGHT)
    axis = canvas.figure.add_axes((*place, width / WIDTH, height / HEIGHT))
    colours = plot_style.site_colours(len(sites))
    axis.bar(sites, [count / sum(counts) for count in counts], color=colours)
    axis.set_title("active at sites", fontsize=9, color=GREY, weight="normal", pad=2)
    axis.set(yticks=[], xticks=[sites[0], sites[-1]])
    axis.tick_params(labelsize=8, length=0)
    axis.grid(visible=False)
    axis.spines["left"].set_visible(False)


def contexts(entry: dict[str, Any]) -> Iterator[tuple[float, str, str, str]]:
    """Yield (strength, text before, active token, text after), one for each token class."""
    names = ("token_class", "activations", "tokens", "position")
    shown: set[str] = set()
    for group, strength, tokens, position in zip(*(entry[name] for name in names), strict=True):
        if group in shown or len(shown) == CONTEXTS:
            continue
        shown.add(group)
        before = "".join(tokens[:position]).replace("\n", " ")
        after = "".join(tokens[position + 1 :]).replace("\n", " ")
        token = tokens[position].replace("\n", "⏎")
        if len(before) > CONTEXT_CHARS:
            before = before[-CONTEXT_CHARS:].partition(" ")[2]
        if len(after) > CONTEXT_CHARS:
            after = after[:CONTEXT_CHARS].rpartition(" ")[0]
        space = token[: len(token) - len(token.lstrip())]
        yield strength, before + space, token.strip(), after


def main() -> None:
    parser = small_parser("experiments.strip_figure", __doc__)
    add = parser.add_argument
    add("SAE", help="a RouteSAE")
    add("--text", required=True, help="text of the strip")
    add("--latent", type=int, required=True, help="feature of the card")
    add("--output_dir", type=Path, default=Path("outputs"), help="where contexts and labels are")
    add("--out", type=Path, default=Path("docs/strip.png"), help="picture")
    args = parser.parse_args()
    reader = Reader(args.SAE, output_dir=str(args.output_dir))
    title = reader.recipe["title"]
    path = files.newest(
        args.output_dir / files.CONTEXT_DIR, f"{files.safe_name(title)}_contexts.json*"
    )
    if path is None:
        parser.error(f"no contexts of {title} in {args.output_dir}; run apply.py first")
    entries = files.load_json(path)["latent_context_map"]
    if str(args.latent) not in entries:
        parser.error(f"{path} has no contexts of latent {args.latent}")
    notes = latent_notes.of_sae(args.output_dir, title, reader.recipe["weights_sum"])
    canvas = Canvas()
    sites = reader.sae.sites()
    split = 0.5 * WIDTH
    draw_strip(canvas, reader.read(args.text), sites, split - 0.2)
    canvas.page.plot([split, split], [0.2, HEIGHT - 0.2], color=plot_style.LIGHT, lw=1)
    draw_card(
        canvas, args.latent, entries[str(args.latent)], notes[args.latent], sites, split + 0.2
    )
    canvas.save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
