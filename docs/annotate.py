"""Write docs/annotated.html: what OrchMoE does, shown with one run, and then orchmoe.py with notes.

    python -m docs.annotate                  # from docs/explorer.json

    # After a change of the code: a new run, then docs/explorer.json and the page from this run.
    python train.py --data sni/ --device cpu --out runs/page
    python -m docs.annotate --run runs/page

The page is one file that makes no request. It begins with a path of fifteen minutes, the sections
in PATH; all lines of orchmoe.py follow, in their order. Its text is in docs/annotated.txt, its
numbers in docs/explorer.json (made by docs/numbers.py), its verdict in docs/evidence.md, its style
and script in annotated.css and annotated.js, and its explorer in experiments/. docs/markup.py turns
texts into HTML, and docs/tables.py the numbers.

Test: pytest tests/repo/test_annotate.py
"""

import ast
import html
import io
import itertools
import json
import keyword
import re
import sys
import textwrap
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from docs import notes, numbers, tables
from docs.markup import inline, mathml, prose
from experiments import explorer
from support import program

DOCS = Path(__file__).resolve().parent
SOURCE = DOCS.parent / "orchmoe.py"
NUMBERS = DOCS / "explorer.json"
PAGE = DOCS / "annotated.html"
SUBTITLE = (
    "Many small LoRAs and a router that mixes them for each prompt: what they do, shown with one "
    "trained model, and how the code does it. For readers who know LoRA."
)
# Equation, shape of its left side, anchor of the block that computes it, and its name.
EQUATIONS = (
    ("X = rmsnorm(E)", "(B,L,D)", "router-summarise", "the embeddings E of the source, scaled"),
    ("X^hat = softmax(X X^T / sqrt(D)) X + X", "(B,L,D)", "router-summarise", "attention"),
    ("x^hat = mean_L X^hat", "(B,D)", "router-summarise", "mean over the tokens"),
    ("x^hat ← (x^hat - μ) / sd", "(B,D)", "w", "standardised"),
    ("w = softmax(W_task x^hat + b)", "(B,K)", "w", "weights of the abstract tasks"),
    (
        "Z^hat_ks = sigmoid(Z_ks) / sum_j sigmoid(Z_kj)",
        "(N,K,S)",
        "allocation-weights",
        "allocation",
    ),
    ("c = w Z^hat", "(N,B,S)", "c", "weights of the skills"),
    ("y = W_0 x + scale sum_s c_s B_s A_s x", "(B,L,O)", "mix-skills", "output of a Linear"),
)
PATH = ("idea", "abstract-tasks", "explore", "where", "evidence")
# What the explorer of the page and annotated.js read.
EXPLORED = ("linears", "Zhat", "sums_to_one", "mean_w", "first", "words")
TASK = ("name", "kind", "w", "head", "listed")
SAMPLE = ("task", "input", "tail", "references", "w", "other_w", "other_task", "results")


class Piece(NamedTuple):
    """A piece of orchmoe.py: lines `first` to `last`, counted from 1."""

    name: str
    first: int
    last: int
    docstring: range  # its lines, empty without one


# --------------------------------------------------------------------------- the pieces of the file


def find_pieces(source: str) -> list[Piece]:
    """Cut a module into pieces: every line belongs to exactly one.

    Functions and methods are pieces. So are the head of a class, up to its first method, the
    docstring of the module, and the imports with the constants behind them.
    """
    tree = ast.parse(source)
    starts = [("module", 1, range(0))]
    starts.append(("imports", tree.body[0].end_lineno + 1, range(0)))
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        starts.append((node.name, first_line(node, source), docstring_lines(node)))
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    name = f"{node.name}.{method.name}"
                    starts.append((name, first_line(method, source), docstring_lines(method)))

    lasts = [first - 1 for _, first, _ in starts[1:]] + [len(source.splitlines())]
    return [
        Piece(name, first, last, docstring)
        for (name, first, docstring), last in zip(starts, lasts, strict=True)
    ]


def docstring_lines(node: ast.FunctionDef | ast.ClassDef) -> range:
    """Return the numbers of the lines of a docstring."""
    if ast.get_docstring(node) is None:
        return range(0)
    return range(node.body[0].lineno, node.body[0].end_lineno + 1)


def first_line(node: ast.FunctionDef | ast.ClassDef, source: str) -> int:
    """Return the first line of a definition, with its decorators and the comments above it."""
    line = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    lines = source.splitlines()
    above = line - 1  # counted from 1
    while above > 1 and (lines[above - 1].strip() == "" or lines[above - 1].startswith("# ---")):
        above -= 1
    while above < line and lines[above].strip() == "":
        above += 1
    return above + 1


# --------------------------------------------------------------------------------- the code as HTML

MARKS = {"kw": "b", "co": "i"}  # short tags of keywords and comments, which keep the page small


def highlight(source: str) -> list[str]:
    """Return the lines of the source as HTML with keywords, strings, comments, numbers marked."""
    lines = source.splitlines()
    spans: dict[int, list[tuple[int, int, str]]] = {}
    previous = ""
    for token in tokens_of(source):
        kind = kind_of(token, previous)
        previous = token.string
        if kind:
            for row in range(token.start[0], token.end[0] + 1):
                begin = token.start[1] if row == token.start[0] else 0
                end = token.end[1] if row == token.end[0] else len(lines[row - 1])
                spans.setdefault(row, []).append((begin, end, kind))

    found = []
    for row, line in enumerate(lines, start=1):
        text = ""
        done = 0
        for begin, end, kind in spans.get(row, []):
            text += html.escape(line[done:begin])
            tag = MARKS.get(kind, "span")
            opening = f"<{tag}>" if kind in MARKS else f'<span class="{kind}">'
            text += f"{opening}{html.escape(line[begin:end])}</{tag}>"
            done = end
        found.append(text + html.escape(line[done:]))
    return found


def tokens_of(source: str) -> Iterator[tokenize.TokenInfo]:
    """Yield the tokens of a source. An f-string is one token, as it was before Python 3.12."""
    depth = 0  # of f-strings within one another
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        name = tokenize.tok_name[token.type]
        if name == "FSTRING_START":
            if depth == 0:
                start = token.start
            depth += 1
        elif name == "FSTRING_END":
            depth -= 1
            if depth == 0:
                yield tokenize.TokenInfo(tokenize.STRING, "", start, token.end, token.line)
        elif depth == 0:
            yield token


def kind_of(token: tokenize.TokenInfo, previous: str) -> str:
    """Return the CSS class of a token, "" for none."""
    if token.type == tokenize.COMMENT:
        return "co"
    if token.type == tokenize.STRING:
        return "st"
    if token.type == tokenize.NUMBER:
        return "nu"
    if token.type == tokenize.NAME and keyword.iskeyword(token.string):
        return "kw"
    if token.type == tokenize.NAME and previous in ("def", "class"):
        return "df"
    return ""


# ----------------------------------------------------------------------------------------- the code


def code_html(code: list[str], lines: Iterable[int], piece: Piece) -> str:
    """Return lines of a piece as highlighted code. Its docstring is folded.

    The style sheet counts the lines of an element, from the one after its --before.
    """
    parts = []
    for in_docstring, group in itertools.groupby(lines, lambda number: number in piece.docstring):
        numbers_of_lines = list(group)
        spans = [f"<span>{code[number - 1]}\n</span>" for number in numbers_of_lines]
        kind = "code method" if "." in piece.name else "code"
        before = f'style="--before:{numbers_of_lines[0] - 1}"'
        block = f'<pre class="{kind}" {before}>{"".join(spans)}</pre>'
        if in_docstring:
            block = f"<details><summary>docstring</summary>{block}</details>"
        parts.append(block)
    return "".join(parts)


def note_lines(piece: Piece, block: notes.Block, source: list[str]) -> list[range]:
    """Return the lines of each note of a block. Raise ValueError if a note names no single line."""
    starts = []
    for note in block.notes:
        found = []
        for number in range(piece.first, piece.last + 1):
            if source[number - 1].strip() == note.line and number not in piece.docstring:
                found.append(number)
        if len(found) != 1:
            raise ValueError(f"note of {block.name}: {len(found)} lines are {note.line!r}")
        starts += found
    first = [n for n in range(piece.first, piece.last + 1) if is_code(source[n - 1])][0]
    if starts != sorted(starts) or starts[0] != first:
        raise ValueError(
            f"notes of {block.name}: they must follow the lines, from the first one on"
        )
    starts[0] = piece.first
    ends = [*starts[1:], piece.last + 1]
    return [range(start, end) for start, end in zip(starts, ends, strict=True)]


def is_code(line: str) -> bool:
    return line.strip() != "" and not line.startswith("# ---")


def block_html(
    piece: Piece, block: notes.Block, source: list[str], code: list[str], values: dict[str, Any]
) -> str:
    """Return a block of a section: its equation, evidence and text, then notes beside the code."""
    title = "" if block.title == block.name else f"{block.title}: "
    parts = [
        f'<section class="block" id="{block.anchor}">'
        f'<h3>{title}<code>{block.name}</code> <a class="self" href="#{block.anchor}" '
        f'aria-label="link to {block.name}">#</a></h3>'
    ]
    for equation in block.equations:
        parts.append(mathml(equation, "block"))
    for grade, what in block.evidence:
        badge = f'<span class="grade {grade}">{grade}</span>'
        parts.append(f'<p class="evidence">{badge} {html.escape(what)}</p>')
    parts.append(prose(block.text, values))
    if block.notes:
        for note, lines in zip(block.notes, note_lines(piece, block, source), strict=True):
            parts.append(note_html(note, code_html(code, lines, piece), values))
    else:
        parts.append(code_html(code, range(piece.first, piece.last + 1), piece))
    if block.sample:
        parts.append(f"<aside><h4>Our sample</h4>{prose(block.sample.text, values)}</aside>")
    if block.test:
        parts.append(f'<p class="small">Checked by the test <code>{block.test}</code></p>')
    parts.append("</section>")
    return "\n".join(part for part in parts if part)


def note_html(note: notes.Note, code: str, values: dict[str, Any]) -> str:
    """Return a note beside its code. Engineering is folded."""
    pair = f'<div class="pair"><div class="note">{prose(note.text, values)}</div>\n'
    pair += f"<div>{code}</div></div>"
    if note.folded:
        summary = f"Engineering: {html.escape(note.folded)}"
        pair = f'<details class="fold"><summary>{summary}</summary>{pair}</details>'
    return pair


def folded_html(
    piece: Piece, text: str, source: list[str], code: list[str], values: dict[str, Any]
) -> str:
    """Return a folded piece that has no block. Without a text it has its docstring's first line."""
    if text:
        text = inline(text, values)
    elif piece.docstring:
        first = source[piece.docstring.start - 1].strip().strip('"')
        text = re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(first))
    anchor = piece.name.replace(".", "-").lower()
    lines = code_html(code, range(piece.first, piece.last + 1), piece)
    return (
        f'<details class="fold" id="code-{anchor}"><summary><code>{piece.name}</code> {text}'
        f"</summary>{lines}</details>"
    )


def named_pieces(section: notes.Section) -> tuple[dict[str, notes.Block], dict[str, str]]:
    """Return the blocks of a section, and the texts of its items "name: text", by piece."""
    blocks = {block.name: block for block in section.blocks}
    items = dict(item.split(": ", 1) for item in section.items if " | " not in item)
    return blocks, items


def code_sections(
    sections: list[notes.Section], text: str, values: dict[str, Any]
) -> dict[str, str]:
    """Return {anchor: HTML} of the sections of the code. Together they have every line once.

    A section begins at the first piece that it names, in a block or in an item, and ends where the
    next one begins. Pieces without a block are folded. Raise ValueError if a section names a piece
    that does not exist or that belongs to another section.
    """
    source = text.splitlines()
    code = highlight(text)
    pieces = find_pieces(text)
    positions = {piece.name: position for position, piece in enumerate(pieces)}
    starts = []
    for section in sections:
        blocks, items = named_pieces(section)
        names = blocks.keys() | items.keys()
        if not names:
            raise ValueError(f"annotated.txt, {section.anchor}: name a piece of orchmoe.py in it")
        for name in names:
            if name not in positions:
                raise ValueError(f"annotated.txt, {section.anchor}: orchmoe.py has no {name}")
        starts.append(min(positions[name] for name in names))
    ends = [*starts[1:], len(pieces)]

    bodies = {}
    for section, start, end in zip(sections, starts, ends, strict=True):
        blocks, items = named_pieces(section)
        for name in blocks.keys() | items.keys():
            if not start <= positions[name] < end:
                raise ValueError(f"annotated.txt, {section.anchor}: {name} is in another section")
        parts = [prose(section.text, values)]
        for piece in pieces[start:end]:
            if piece.name in blocks:
                parts.append(block_html(piece, blocks[piece.name], source, code, values))
            else:
                about = items.get(piece.name, "")
                parts.append(folded_html(piece, about, source, code, values))
        bodies[section.anchor] = "\n".join(parts)
    return bodies


# ----------------------------------------------------------------------------------------- the page


def page() -> str:
    """Return the whole page."""
    source = SOURCE.read_text(encoding="utf-8")
    sections = notes.sections()
    items = {section.anchor: section.items for section in sections}
    explored = json.loads(NUMBERS.read_text(encoding="utf-8"))
    explored["words"] = [item.split(" | ")[0] for item in items["abstract-tasks"]]
    evidence = (DOCS / "evidence.md").read_text(encoding="utf-8")

    # Everything that a text can name.
    values = explored["walk"] | tables.values_of(explored)
    usage = re.search(r"(    .*\n)+", source[source.index("    adapters = attach(") :])[0]
    values |= {
        "usage": textwrap.dedent(usage),
        "verbs": [item.split(" | ") for item in items["adapters"] if " | " in item],
        "drawing": f"<figure>{(DOCS / 'architecture.svg').read_text(encoding='utf-8')}</figure>",
        "grades": grades_html(items["idea"]),
        "equations": equations_html(),
        "chain": tables.chain_html(explored),
        "tasks": tables.tasks_html(explored),
        "training": tables.training_html(explored),
        "cards": tables.cards_html(explored),
        "extremes": tables.extremes_html(explored),
        "losses": tables.losses_html(explored),
        "linears": tables.linears_html(explored),
        "explorer": explorer.section(shown_by_script(explored)),
        "verdict": tables.verdict(evidence),
        "against_lora": tables.against_lora(evidence),
    }

    path = [section for section in sections if section.anchor in PATH]
    code = [section for section in sections if section.anchor not in PATH]
    bodies = {section.anchor: prose(section.text, values) for section in path}
    bodies |= code_sections(code, source, values)
    parts = []
    for section in sections:
        if section is code[0]:
            parts.append('<h2 class="part" id="the-code">The code</h2>')
        parts.append(
            f'<section class="step" id="{section.anchor}">\n<h2>{section.title}</h2>\n'
            f"{bodies[section.anchor]}\n</section>"
        )
    style = explorer.read("explorer.css") + (DOCS / "annotated.css").read_text(encoding="utf-8")
    script = (DOCS / "annotated.js").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>OrchMoE, annotated</title>\n<style>\n{style}</style></head>\n<body>\n"
        '<nav id="contents" aria-label="Contents"><details open><summary>Contents</summary>'
        f"<p>In fifteen minutes</p><ol>{links(path)}</ol>"
        f"<p>The code</p><ol>{links(code)}</ol></details></nav>\n"
        "<main>\n<header><h1>OrchMoE, annotated</h1>\n"
        f'<p class="subtitle">{SUBTITLE}</p>\n'
        f'<div class="path"><p><b>In fifteen minutes</b></p><ol>{links(path)}</ol>'
        '<p>Then <a href="#the-code">the code</a>: every line of orchmoe.py in its order, with '
        "notes. That takes an hour.</p></div></header>\n"
        + "\n".join(parts)
        + f"\n<footer>{footer(explored)}</footer></main>\n<script>\n{script}</script>\n"
        "</body></html>\n"
    )


def shown_by_script(explored: dict[str, Any]) -> dict[str, Any]:
    """Return what the scripts of the page read, with weights of three decimals."""
    shown = {name: explored[name] for name in EXPLORED}
    shown["tasks"] = [{name: task[name] for name in TASK} for task in explored["tasks"]]
    shown["samples"] = [{name: sample[name] for name in SAMPLE} for sample in explored["samples"]]
    shown = with_three_decimals(shown)
    for sample, original in zip(shown["samples"], explored["samples"], strict=True):
        sample["results"] = original["results"]  # the page shows their losses rounded
    return shown


def with_three_decimals(value: Any) -> Any:
    """Return a JSON value with all its numbers rounded."""
    if isinstance(value, dict):
        return {name: with_three_decimals(item) for name, item in value.items()}
    if isinstance(value, list):
        return [with_three_decimals(item) for item in value]
    return round(value, 3) if isinstance(value, float) else value


def links(sections: list[notes.Section]) -> str:
    """Return the items of a list of contents."""
    return "".join(f'<li><a href="#{s.anchor}">{s.title}</a></li>' for s in sections)


def footer(explored: dict[str, Any]) -> str:
    """Return which run the numbers are from."""
    return (
        f"All numbers of the path and of “our sample” are from one run of <code>python train.py"
        f"</code>, whose adapter has the SHA-256 <code>{explored['hash']}</code> (its first 16 "
        "digits)."
    )


def equations_html() -> str:
    """Return the equations as a table, each with a link to its block."""
    rows = []
    for equation, shape, anchor, name in EQUATIONS:
        link = f'<a href="#{anchor}">{name}</a>'
        rows.append(
            f'<tr><td>{mathml(equation)}</td><td>{shape}</td><td class="text">{link}</td></tr>'
        )
    return (
        f'<div class="wide"><table class="equations"><tbody>{"".join(rows)}</tbody></table></div>'
    )


def grades_html(items: list[str]) -> str:
    """Return what the labels mean."""
    lines = []
    for item in items:
        grade, meaning = item.split(": ", 1)
        lines.append(f'<li><span class="grade {grade}">{grade}</span> {meaning}</li>')
    return f'<ul class="grades">{"".join(lines)}</ul>'


# -------------------------------------------------------------------------------------- the program


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--run":
        program.write_json(NUMBERS, numbers.collect(sys.argv[2]))
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written: {PAGE}")
    explored = json.loads(NUMBERS.read_text(encoding="utf-8"))
    for section in notes.sections():
        if section.anchor == "abstract-tasks":
            for line in tables.outdated_words(explored, section.items):
                print(line)


if __name__ == "__main__":
    program.run_program(main)
