"""Draw architecture.svg beside this file, from plain strings.

    python docs/architecture.py

Test: pytest tests/repo/test_docs.py
"""

from pathlib import Path

# Light tints of Okabe and Ito's colours, which the colour-blind can tell apart.
FROZEN = "#E4E4E4"
ROUTER = "#BFE0F5"
ALLOCATION = "#B9E6D3"
SKILLS = "#FBDFA6"
INK = "#1A1A1A"
LOGITS = 'W<tspan dy="3" font-size="10">task</tspan><tspan dy="-3"> x̂ + b</tspan>'
HEAD = f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 596"
 font-size="14" font-family="Helvetica, Arial, sans-serif" fill="{INK}">
<title>Architecture of OrchMoE, with the shapes</title>
<defs><marker id="tip" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">
<path d="M0,0 L9,4 L0,8 z"/></marker></defs>
<rect width="860" height="596" fill="white"/>"""


def text(x: float, y: float, line: str, *, bold: bool = False, anchor: str = "middle") -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{weight}>{line}</text>'


def rectangle(x: int, y: int, width: int, height: int, fill: str, more: str) -> str:
    place = f'x="{x}" y="{y}" width="{width}" height="{height}"'
    return f'<rect {place} {more}fill="{fill}" stroke="{INK}"/>'


def box(x: int, y: int, width: int, height: int, fill: str, *lines: str) -> str:
    """Return a rounded box with centred lines, the first one bold."""
    parts = [rectangle(x, y, width, height, fill, 'rx="6" ')]
    top = y + height / 2 + 5 - 9 * (len(lines) - 1)
    for i, line in enumerate(lines):
        parts.append(text(x + width / 2, top + 18 * i, line, bold=i == 0))
    return "\n".join(parts)


def frame(x: int, y: int, width: int, height: int, title: str) -> str:
    """Return a dashed frame with its title inside, at the top left."""
    place = f'x="{x}" y="{y}" width="{width}" height="{height}"'
    dashed = f'<rect {place} rx="8" fill="none" stroke="{INK}" stroke-dasharray="5 4"/>'
    return dashed + "\n" + text(x + 12, y + 21, title, anchor="start", bold=True)


def arrow(*points: tuple[int, int]) -> str:
    """Return an arrow through the points."""
    path = " ".join(f"{x},{y}" for x, y in points)
    style = f'fill="none" stroke="{INK}" stroke-width="1.5" marker-end="url(#tip)"'
    return f'<polyline points="{path}" {style}/>'


def drawing() -> str:
    """Return the whole SVG: above what is computed once a sample, below one adapted Linear."""
    once = [
        frame(316, 8, 390, 126, "Task Router: one, reads the source alone"),
        box(10, 42, 120, 80, FROZEN, "source", "tokens", "(B,L)"),
        box(164, 42, 130, 80, FROZEN, "E", "embeddings", "(B,L,D)"),
        box(
            322, 42, 202, 80, ROUTER, "x̂", "X = rmsnorm(E)", "mean(P X + X), standardised", "(B,D)"
        ),
        box(548, 42, 146, 80, ROUTER, "w", f"softmax({LOGITS})", "(B,K)"),
        box(730, 42, 120, 80, ALLOCATION, "c = w Ẑ", "skill weights", "(N,B,S)"),
        arrow((130, 82), (164, 82)),
        arrow((294, 82), (322, 82)),
        arrow((524, 82), (548, 82)),
        arrow((694, 82), (730, 82)),
        box(
            10,
            164,
            284,
            80,
            FROZEN,
            "T5 encoder and decoder",
            "N of its Linears have skills",
            "(B,L,D)",
        ),
        box(322, 164, 202, 80, "white", "loss", "cross-entropy of the", "target tokens, no more"),
        box(548, 164, 146, 80, ALLOCATION, "Ẑ: sigmoid(Z)", "rows sum to 1", "(N,K,S)"),
        arrow((229, 122), (229, 164)),
        arrow((294, 204), (322, 204)),
        arrow((694, 204), (770, 204), (770, 122)),
    ]
    linear = [
        frame(10, 280, 840, 250, "One of the N adapted Linears"),
        text(838, 301, "A is kept as (S,R,D), B as (S,R,O)", anchor="end"),
        box(26, 380, 90, 60, FROZEN, "x", "(B,L,D)"),
        box(176, 320, 140, 80, SKILLS, "h = A x", "A: S R × D", "(B,L,S R)"),
        box(362, 320, 140, 80, ALLOCATION, "α/R · c · h", "c_s for R ranks", "(B,L,S R)"),
        box(548, 320, 140, 80, SKILLS, "B h", "B: O × S R", "(B,L,O)"),
        box(176, 432, 512, 80, FROZEN, "W₀ x", "the frozen weight, O × D", "(B,L,O)"),
        '<circle cx="722" cy="410" r="14" fill="white" stroke="black"/>',
        text(722, 415, "+", bold=True),
        box(756, 380, 82, 60, FROZEN, "y", "(B,L,O)"),
        arrow((116, 400), (146, 400), (146, 360), (176, 360)),
        arrow((116, 420), (146, 420), (146, 472), (176, 472)),
        arrow((316, 360), (362, 360)),
        arrow((502, 360), (548, 360)),
        arrow((688, 360), (722, 360), (722, 396)),
        arrow((688, 472), (722, 472), (722, 424)),
        arrow((736, 410), (756, 410)),
        arrow((820, 122), (820, 262), (432, 262), (432, 320)),
    ]
    legend = []
    for x, fill, name in (
        (10, FROZEN, "frozen"),
        (100, ROUTER, "router"),
        (190, ALLOCATION, "allocation"),
        (305, SKILLS, "skills"),
    ):
        legend.append(rectangle(x, 544, 18, 14, fill, ""))
        legend.append(text(x + 25, 556, name, anchor="start"))
    legend.append(text(10, 578, "P = softmax(X Xᵀ / √D)", anchor="start"))
    letters = [
        "B batch (in shapes), L length, D d_in, O d_out",
        "K abstract tasks, S skills, R rank, N adapted Linears",
    ]
    for i, line in enumerate(letters):
        legend.append(text(850, 556 + 22 * i, line, anchor="end"))
    return "\n".join([HEAD, *once, *linear, *legend, "</svg>"]) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "architecture.svg").write_text(drawing(), encoding="utf-8")
