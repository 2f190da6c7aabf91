"""Write docs/annotated.html: what OrchMoE does, shown with one run, and then orchmoe.py with notes.

    python -m docs.annotate                  # from docs/explorer.json

    # To show another run: docs/explorer.json and the page from this run. It trains twice more.
    python train.py --data sni/ --device cpu --out runs/page
    python -m docs.annotate --run runs/page

    python -m docs.annotate --still          # docs/answers.png as well, with Chromium

It needs markdown-it-py, latex2mathml and Pygments: pip install -r requirements-dev.txt. The page is
one file that makes no request. Its text is docs/annotated.md, its numbers are in
docs/explorer.json (made by docs/numbers.py) and in tiny/, its verdict in docs/evidence.md, its
style in annotated.css, and its explorer in experiments/. Four scripts move it: annotated.js is for
the whole page, and by_hand.js, reader.js and training.js are for one part each. docs/markup.py
turns Markdown into HTML, and docs/tables.py the numbers.

annotated.md is Markdown with LaTeX. Each heading ends in its {#anchor}. A heading of level 3 names
a piece of orchmoe.py, a function, method or class. Below it, each block of code is the beginning of
one line of this piece, and the text behind it is a note about the lines from there on. A note that
begins with *Engineering* is folded, and so is a piece that no heading names. A quotation is the
step of the sample that runs through the page. {{name}} is a number or a table of the run.

Test: pytest tests/repo/test_annotate.py
"""

import ast
import itertools
import json
import re
import subprocess
import tempfile
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from docs import numbers, tables
from docs.markup import highlight, inline, markdown
from experiments.explorer import explorer
from support import program
from support.program import UserError

DOCS = Path(__file__).resolve().parent
SOURCE = DOCS.parent / "orchmoe.py"
TEXT = DOCS / "annotated.md"
NUMBERS = DOCS / "explorer.json"
PAGE = DOCS / "annotated.html"
STILL = DOCS / "answers.png"
SCRIPTS = ("annotated.js", "by_hand.js", "reader.js", "training.js")
# What the explorer of the page and annotated.js read.
EXPLORED = ("linears", "Zhat", "sums_to_one", "mean_w", "first", "words")
TASK = ("name", "kind", "w", "head", "listed")
SAMPLE = ("task", "input", "tail", "references", "w", "other_w", "other_task", "results")


# ----------------------------------------------------------------------------------------- the text


class Note(NamedTuple):
    line: str  # the beginning of a line of the code
    text: str


class Block(NamedTuple):
    """What the page says about one piece of orchmoe.py."""

    piece: str
    title: str
    anchor: str
    text: str
    notes: list[Note]
    sample: str  # the step of the sample that runs through the page, "" for none


@dataclass
class Section:
    level: int  # 1: a part of the page, 2: a section of a part
    title: str
    anchor: str
    text: str
    blocks: list[Block] = field(default_factory=list)


def read_sections() -> list[Section]:
    """Return the parts and sections of annotated.md, in their order."""
    text = TEXT.read_text(encoding="utf-8")
    parts = re.split(r"^(#+) (.*) \{#([\w-]+)\}$", text, flags=re.MULTILINE)[1:]
    sections: list[Section] = []
    for i in range(0, len(parts), 4):
        marks, title, anchor, body = parts[i : i + 4]
        if len(marks) < 3:
            sections.append(Section(len(marks), title, anchor, body))
        else:
            sections[-1].blocks.append(read_block(title, anchor, body))
    return sections


def read_block(title: str, anchor: str, body: str) -> Block:
    """Return a block. Its title ends in `the name of a piece`, and its sample is a quotation."""
    body, mark, sample = body.partition("\n> ")
    text, *parts = re.split(r"^```python\n(.*)\n```$", body, flags=re.MULTILINE)
    notes = [Note(line, note) for line, note in zip(parts[::2], parts[1::2], strict=True)]
    piece = title.split("`")[-2]
    return Block(piece, title, anchor, text, notes, mark + sample)


# --------------------------------------------------------------------------- the pieces of the file


class Piece(NamedTuple):
    """A piece of orchmoe.py: lines `first` to `last`, counted from 1."""

    name: str
    first: int
    last: int
    docstring: range  # its lines, empty without one


def find_pieces(source: str) -> list[Piece]:
    """Cut a module into pieces: every line belongs to exactly one.

    Functions and methods are pieces. So are the head of a class, up to its first method, the
    docstring of the module, and the imports with the constants behind them.
    """
    tree = ast.parse(source)
    starts = [("what the file is", 1, range(0))]
    starts.append(("imports and constants", tree.body[0].end_lineno + 1, range(0)))
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


def note_lines(piece: Piece, notes: list[Note], source: list[str]) -> list[range]:
    """Return the lines of each note. Raise UserError if a note does not name one line."""
    starts = []
    for note in notes:
        found = []
        for number in range(piece.first, piece.last + 1):
            if source[number - 1].strip().startswith(note.line) and number not in piece.docstring:
                found.append(number)
        if len(found) != 1:
            raise UserError(f"annotated.md: {len(found)} lines of {piece.name} begin {note.line!r}")
        starts += found
    first = [n for n in range(piece.first, piece.last + 1) if is_code(source[n - 1])][0]
    if starts != sorted(starts) or starts[0] != first:
        raise UserError(
            f"annotated.md: notes of {piece.name} must follow its lines, from the first one on"
        )
    starts[0] = piece.first
    ends = [*starts[1:], piece.last + 1]
    return [range(start, end) for start, end in zip(starts, ends, strict=True)]


def is_code(line: str) -> bool:
    return line.strip() != "" and not line.startswith("# ---")


def block_html(
    piece: Piece, block: Block, source: list[str], code: list[str], values: dict[str, str]
) -> str:
    """Return a block of a section: its text, then its notes beside the code."""
    parts = [
        f'<section class="block" id="{block.anchor}">'
        f'<h3>{inline(block.title)} <a class="self" href="#{block.anchor}" '
        f'aria-label="link to {block.piece}">#</a></h3>',
        markdown(block.text, values),
    ]
    if block.notes:
        for note, lines in zip(block.notes, note_lines(piece, block.notes, source), strict=True):
            parts.append(note_html(note, code_html(code, lines, piece), values))
    else:
        parts.append(code_html(code, range(piece.first, piece.last + 1), piece))
    parts.append(markdown(block.sample, values))
    parts.append("</section>")
    return "\n".join(parts)


def note_html(note: Note, code: str, values: dict[str, str]) -> str:
    """Return a note beside its code. Engineering is folded."""
    engineering = re.match(r"\s*\*(Engineering: .*)\.\*", note.text)
    text = note.text[engineering.end() :] if engineering else note.text
    pair = f'<div class="pair"><div class="note">{markdown(text, values)}</div>\n'
    pair += f"<div>{code}</div></div>"
    if engineering:
        summary = f"<summary>{engineering[1]}</summary>"
        pair = f'<details class="fold">{summary}{pair}</details>'
    return pair


def folded_html(piece: Piece, source: list[str], code: list[str]) -> str:
    """Return a piece without a block, folded, with the first line of its docstring."""
    about = ""
    if piece.docstring:
        about = inline(source[piece.docstring.start - 1].strip().strip('"'))
    anchor = re.sub(r"\W", "-", piece.name).lower()
    lines = code_html(code, range(piece.first, piece.last + 1), piece)
    return (
        f'<details class="fold" id="code-{anchor}"><summary><code>{piece.name}</code> {about}'
        f"</summary>{lines}</details>"
    )


def sections_html(sections: list[Section], text: str, values: dict[str, str]) -> str:
    """Return the sections as HTML, with every line of the code once.

    Raise UserError if the blocks do not name pieces of the code in its order.
    """
    source = text.splitlines()
    code = highlight(text)
    pieces = {piece.name: piece for piece in find_pieces(text)}
    hidden = list(pieces)  # the names of the pieces that are still to be shown
    parts: list[str] = []

    def fold_until(name: str) -> None:
        """Add the pieces before this one, folded."""
        if name not in hidden:
            raise UserError(f"annotated.md: {name} is not in orchmoe.py, or not in this order")
        while hidden[0] != name:
            parts.append(folded_html(pieces[hidden.pop(0)], source, code))

    for section in sections:
        if section.blocks:
            fold_until(section.blocks[0].piece)  # they belong to the section before
        kind = "part" if section.level == 1 else "step"
        heading = f"h{section.level}"
        parts.append(f'<section class="{kind}" id="{section.anchor}">')
        parts.append(f"<{heading}>{inline(section.title)}</{heading}>")
        parts.append(markdown(section.text, values))
        for block in section.blocks:
            fold_until(block.piece)
            piece = pieces[hidden.pop(0)]
            parts.append(block_html(piece, block, source, code, values))
        parts.append("</section>")
    for name in hidden:
        parts.append(folded_html(pieces[name], source, code))
    return "\n".join(parts)


# ----------------------------------------------------------------------------------------- the page


def page() -> str:
    """Return the whole page."""
    source = SOURCE.read_text(encoding="utf-8")
    explored = json.loads(NUMBERS.read_text(encoding="utf-8"))
    evidence = (DOCS / "evidence.md").read_text(encoding="utf-8")
    usage = re.search(r"(    .*\n)+", source[source.index("    adapters = attach(") :])[0]
    usage_lines = "\n".join(highlight(textwrap.dedent(usage)))
    values = tables.values_of(explored) | {
        "usage": f"<pre>{usage_lines}</pre>",
        "drawing": f"<figure>{(DOCS / 'architecture.svg').read_text(encoding='utf-8')}</figure>",
        "explorer": explorer.section(shown_by_script(explored)),
        "verdict": inline(tables.verdict(evidence)),
        "headline": tables.headline(evidence),
        "default_K": tables.default_K(evidence),
        "training_adds": tables.training_adds(evidence),
    }
    sections = read_sections()
    contents = []
    for section in sections:
        link = f'<a href="#{section.anchor}">{inline(section.title)}</a>'
        contents.append(f'<p class="level{section.level}">{link}</p>')
    moved = {name: explored[name] for name in ("router", "training")} | numbers.reader()
    moved["linear"] = explored["walk"]["linear"]
    scripts = [explorer.json_script("moved-data", moved)]
    for name in SCRIPTS:
        scripts.append(f"<script>\n{(DOCS / name).read_text(encoding='utf-8')}</script>\n")
    return (
        f"{head()}<title>OrchMoE, annotated</title></head>\n<body class='page'>\n"
        '<nav id="contents" aria-label="Contents"><details open><summary>Contents</summary>'
        f"{''.join(contents)}</details></nav>\n<main>\n{sections_html(sections, source, values)}\n"
        f"<footer>{footer(explored)}</footer></main>\n{''.join(scripts)}</body></html>\n"
    )


def head() -> str:
    """Return the beginning of a page with its style."""
    style = explorer.read("explorer.css") + (DOCS / "annotated.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>\n{style}</style>\n"
    )


def shown_by_script(explored: dict[str, Any]) -> dict[str, Any]:
    """Return what the scripts of the page read, with weights of three decimals."""
    explored = explored | {"words": [words for words, _ in tables.WORDS]}
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


def footer(explored: dict[str, Any]) -> str:
    """Return which run the numbers are from."""
    return (
        "All numbers before the code, and those of “our sample”, are from one run of "
        f"<code>python train.py</code>, whose adapter has the SHA-256 <code>{explored['hash']}"
        "</code> (its first 16 digits)."
    )


# ---------------------------------------------------------------------------------------- the still


def write_still() -> None:
    """Write a picture of the answers of the page. It needs Chromium."""
    explored = json.loads(NUMBERS.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        still = Path(folder) / "still.html"
        still.write_text(
            f"{head()}</head><body class='still'>{explorer.section(shown_by_script(explored))}"
            "</body></html>\n",
            encoding="utf-8",
        )
        command = ["chromium", "--headless", "--no-sandbox", "--hide-scrollbars"]
        command += ["--force-device-scale-factor=1.5", "--window-size=1000,680"]
        command += [f"--user-data-dir={folder}/profile", f"--screenshot={STILL}", still.as_uri()]
        subprocess.run(command, check=True, capture_output=True)


# -------------------------------------------------------------------------------------- the program


def main() -> None:
    parser = program.Parser(usage="python -m docs.annotate [--run RUN] [--still]")
    parser.add_argument("--run", help="the finished run that the page shows from now on")
    parser.add_argument("--still", action="store_true", help="write answers.png as well")
    args = parser.parse_args()
    if args.run:
        program.write_json(NUMBERS, numbers.collect(args.run))
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written: {PAGE}")
    for line in tables.outdated_words(json.loads(NUMBERS.read_text(encoding="utf-8"))):
        print(line)
    if args.still:
        write_still()


if __name__ == "__main__":
    program.run_program(main)
