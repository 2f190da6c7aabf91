"""Draw architecture.svg beside this file, from plain strings.

    python docs/architecture.py

The drawing is narrow, so that a phone shows it whole. Its colours follow the light or dark scheme
of the reader.

Test: pytest tests/repo/test_docs.py
"""

from pathlib import Path

WIDTH = 460
HEIGHT = 894
# Class, light colour, dark colour, what has it. Tints of Okabe and Ito's colours, which the
# colour-blind can tell apart.
COLOURS = (
    ("frozen", "#E4E4E4", "#3D434B", "frozen"),
    ("router", "#BFE0F5", "#1C4A68", "Task Router"),
    ("allocation", "#B9E6D3", "#1F5541", "allocation"),
    ("skills", "#FBDFA6", "#604A16", "skills"),
    ("loss", "#F5D3E3", "#5E2C47", "loss"),
)
LOGITS = 'W<tspan dy="3" font-size="10">task</tspan><tspan dy="-3"> x̂ + b</tspan>'


def style() -> str:
    """Return the style sheet. Its names begin with "oa-", because a page may contain the SVG."""
    light = [".oa-paper{fill:#FFFFFF}", ".oa-ink{fill:#1A1A1A}", ".oa-line{stroke:#1A1A1A}"]
    dark = [".oa-paper{fill:#14181E}", ".oa-ink{fill:#E4E8EE}", ".oa-line{stroke:#AEB8C4}"]
    for name, light_colour, dark_colour, _ in COLOURS:
        light.append(f".oa-{name}{{fill:{light_colour}}}")
        dark.append(f".oa-{name}{{fill:{dark_colour}}}")
    light.append(".oa-none{fill:none}")
    night = "@media (prefers-color-scheme: dark)"
    return "<style>\n" + "\n".join(light) + f"\n{night} {{\n" + "\n".join(dark) + "\n}\n</style>"


def text(x: float, y: float, line: str, *, bold: bool = False, anchor: str = "middle") -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text class="oa-ink" x="{x:g}" y="{y:g}" text-anchor="{anchor}"{weight}>{line}</text>'


def rectangle(x: int, y: int, width: int, height: int, kind: str, more: str = "") -> str:
    place = f'x="{x}" y="{y}" width="{width}" height="{height}"'
    return f'<rect class="oa-{kind} oa-line" {place}{more}/>'


def box(x: int, y: int, width: int, height: int, kind: str, *lines: str) -> str:
    """Return a rounded box with centred lines, the first one bold."""
    parts = [rectangle(x, y, width, height, kind, ' rx="6"')]
    top = y + height / 2 + 5 - 9 * (len(lines) - 1)
    for i, line in enumerate(lines):
        parts.append(text(x + width / 2, top + 18 * i, line, bold=i == 0))
    return "\n".join(parts)


def frame(x: int, y: int, width: int, height: int, title: str) -> str:
    """Return a dashed frame with its title inside, at the top left."""
    dashed = rectangle(x, y, width, height, "none", ' rx="8" stroke-dasharray="5 4"')
    return dashed + "\n" + text(x + 12, y + 21, title, anchor="start", bold=True)


def arrow(*points: tuple[int, int]) -> str:
    """Return an arrow through the points."""
    path = " ".join(f"{x},{y}" for x, y in points)
    line = 'stroke-width="1.5" marker-end="url(#oa-tip)"'
    return f'<polyline class="oa-none oa-line" points="{path}" {line}/>'


def drawing() -> str:
    """Return the whole SVG: what is computed once a prompt, one adapted Linear, and the loss."""
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}"',
        ' font-size="14" font-family="Helvetica, Arial, sans-serif">',
        "<title>Architecture of OrchMoE, with the shapes</title>",
        style(),
        '<defs><marker id="oa-tip" markerWidth="9" markerHeight="8" refX="8" refY="4"',
        ' orient="auto"><path class="oa-ink" d="M0,0 L9,4 L0,8 z"/></marker></defs>',
        f'<rect class="oa-paper" width="{WIDTH}" height="{HEIGHT}"/>',
    ]
    once = [
        box(24, 8, 176, 46, "frozen", "prompt", "tokens (B,L)"),
        box(248, 8, 176, 46, "frozen", "E", "embeddings (B,L,D)"),
        arrow((200, 31), (248, 31)),
        frame(14, 74, 432, 274, "Task Router: one, reads the prompt"),
        box(60, 106, 300, 44, "router", "X = rmsnorm(E)", "(B,L,D)"),
        box(60, 168, 300, 44, "router", "P = softmax(X Xᵀ / √D)", "attention (B,L,L)"),
        box(60, 230, 300, 44, "router", "x̂ = mean(P X + X), standardised", "(B,D)"),
        box(60, 292, 300, 44, "router", f"w = softmax({LOGITS})", "abstract tasks (B,K)"),
        arrow((336, 54), (336, 106)),
        arrow((210, 150), (210, 168)),
        arrow((210, 212), (210, 230)),
        arrow((210, 274), (210, 292)),
        arrow((360, 128), (390, 128), (390, 252), (360, 252)),
        box(24, 368, 176, 46, "allocation", "Ẑ: sigmoid(Z)", "rows sum to 1 (N,K,S)"),
        box(248, 368, 176, 46, "allocation", "c = w Ẑ", "skill weights (N,B,S)"),
        arrow((200, 391), (248, 391)),
        arrow((336, 336), (336, 368)),
    ]
    linear = [
        frame(14, 434, 432, 308, "One of the N adapted Linears"),
        text(26, 473, "A is kept as (S,R,D), B as (S,R,O)", anchor="start"),
        box(24, 486, 400, 28, "frozen", "x (B,L,D)"),
        box(24, 534, 176, 152, "frozen", "W₀ x", "the frozen weight, O × D", "(B,L,O)"),
        box(224, 534, 200, 42, "skills", "h = A x (B,L,S R)", "A: S R × D"),
        box(224, 589, 200, 42, "allocation", "α/R · c · h", "c_s for R ranks"),
        box(224, 644, 200, 42, "skills", "B h (B,L,O)", "B: O × S R"),
        arrow((112, 514), (112, 534)),
        arrow((324, 514), (324, 534)),
        arrow((324, 576), (324, 589)),
        arrow((324, 631), (324, 644)),
        arrow((424, 391), (436, 391), (436, 610), (424, 610)),
        '<circle class="oa-paper oa-line" cx="216" cy="716" r="12"/>',
        text(216, 721, "+", bold=True),
        arrow((112, 686), (112, 716), (204, 716)),
        arrow((324, 686), (324, 716), (228, 716)),
        text(216, 701, "y (B,L,O)", bold=True),
    ]
    base = [
        box(
            24,
            762,
            226,
            46,
            "frozen",
            "frozen T5, Llama, Qwen, ...",
            "N of its Linears have skills",
        ),
        box(286, 762, 138, 46, "loss", "loss", "of the answer alone"),
        arrow((24, 31), (7, 31), (7, 785), (24, 785)),
        arrow((250, 785), (286, 785)),
        arrow((216, 728), (216, 762)),
    ]
    legend = []
    x = 14
    for kind, _, _, name in COLOURS:
        legend.append(rectangle(x, 824, 16, 13, kind))
        legend.append(text(x + 21, 835, name, anchor="start"))
        x += 38 + 7 * len(name)
    letters = (
        "B prompts in the batch, L tokens, D input width, O output width,",
        "K abstract tasks, S skills of rank R, N adapted Linears",
    )
    for i, line in enumerate(letters):
        legend.append(text(14, 860 + 20 * i, line, anchor="start"))
    return "\n".join([*head, *once, *linear, *base, *legend, "</svg>"]) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "architecture.svg").write_text(drawing(), encoding="utf-8")
