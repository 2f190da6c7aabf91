"""Write docs/annotated.html: what OrchMoE does, shown with one run, and then orchmoe.py with notes.

    python -m docs.annotate                  # from docs/explorer.json

    # After a change of the code: a new run, then docs/explorer.json and the page from this run.
    python train.py --data sni/ --device cpu --out runs/page
    python -m docs.annotate --run runs/page

The page is one file that makes no request. It begins with a path of fifteen minutes, the sections
in PATH; all lines of orchmoe.py follow, in their order. Its text is in docs/annotated.txt, its
numbers in docs/explorer.json (made by docs/numbers.py), its verdict in docs/evidence.md, its style
and script in annotated.css and annotated.js, and its explorer in experiments/.

Test: pytest tests/repo/test_annotate.py
"""

import ast
import html
import io
import itertools
import json
import keyword
import math
import re
import sys
import textwrap
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import program
from docs import notes, numbers
from experiments import explorer

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
    ("y = W_0 x + scale sum_s c_s B_s A_s x", "(B,L,O)", "linear", "output of a Linear"),
)
PATH = ("idea", "abstract-tasks", "explore", "where", "evidence")
# What the explorer of the page and annotated.js read.
EXPLORED = ("linears", "Zhat", "sums_to_one", "mean_w", "first", "words")
TASK = ("name", "kind", "w", "head", "listed")
SAMPLE = ("task", "input", "tail", "references", "w", "other_w", "other_task", "results")
LITTLE = 0.05  # nats; a smaller difference of losses counts as none
MOST = 3  # tasks that are shown because routing helps them most, and as many that it harms most


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


# ---------------------------------------------------------------------------------- the mathematics

NAME = re.compile(r"([^\W\d_]+|[\d.]+)(\^hat)?(?:_(\w+?))?(?:\^(\w))?(?=\W|$)")
MATH_TOKEN = re.compile(rf"{NAME.pattern}|\S")
SIGNS = {"-": "&#8722;", "~": "&#8764;"}
THIN = '<mspace width="0.2em"></mspace>'


def mathml(equation: str, display: str = "inline") -> str:
    """Return MathML for an equation in the notation of docs/notes.py."""
    tokens = [match[0] for match in MATH_TOKEN.finditer(equation)]
    return f'<math display="{display}">{math_row(tokens, "")}</math>'


def math_row(tokens: list[str], end: str) -> str:
    """Return an mrow of the tokens before `end`. Take them and `end` away."""
    parts = []
    after_operand = False  # two operands side by side get a thin space between them
    while tokens:
        token = tokens.pop(0)
        if token == end:
            break
        is_operand = token[0].isalnum()
        if is_operand and after_operand:
            parts.append(THIN)
        if token == "sqrt":
            tokens.pop(0)  # its bracket
            parts.append(f"<msqrt>{math_row(tokens, ')')}</msqrt>")
        elif token == "frac":
            tokens.pop(0)
            above = math_row(tokens, ";")
            parts.append(f"<mfrac>{above}{math_row(tokens, ')')}</mfrac>")
        elif token == "(":
            parts.append(f"<mrow><mo>(</mo>{math_row(tokens, ')')}<mo>)</mo></mrow>")
        else:
            parts.append(math_atom(token))
        after_operand = is_operand or token == "("
    return f"<mrow>{''.join(parts)}</mrow>"


def math_atom(token: str) -> str:
    """Return MathML for one name, number or sign."""
    match = NAME.fullmatch(token)
    if match is None:
        return f"<mo>{SIGNS.get(token, html.escape(token))}</mo>"
    name, hat, index, power = match.groups()
    if name == "sum":
        return f"<munder><mo>&#8721;</mo><mi>{index}</mi></munder>"
    kind = "mn" if name[0].isdigit() else "mi"
    result = f"<{kind}>{name}</{kind}>"
    if hat:
        result = f'<mover accent="true">{result}<mo stretchy="false" class="hat">^</mo></mover>'
    if index:
        result = f"<msub>{result}<mi>{index}</mi></msub>"
    if power:
        result = f'<msup>{result}<mi mathvariant="normal">{power}</mi></msup>'
    return result


# ----------------------------------------------------------------------------------------- the text


def prose(text: str, values: dict[str, Any]) -> str:
    """Return the paragraphs of a text as HTML. `values` has what its {names} stand for."""
    parts = []
    for paragraph in text.strip().split("\n\n"):
        paragraph = " ".join(paragraph.split())
        inserted = re.fullmatch(r"\{(table|text|html) (\w+)\}", paragraph)
        equation = re.fullmatch(r"\$([^$]*)\$", paragraph)
        item = re.fullmatch(r"(\d+)\. (.*)", paragraph)
        if inserted:
            kind, name = inserted.groups()
            value = values[name]
            if kind == "table":
                value = table_html(value)
            elif kind == "text":
                value = f"<pre>{html.escape(value)}</pre>"
            parts.append(value)
        elif equation:
            parts.append(mathml(equation[1], "block"))
        elif item:
            parts.append(f'<p class="item">{item[1]}. {inline(item[2], values)}</p>')
        elif paragraph:
            parts.append(f"<p>{inline(paragraph, values)}</p>")
    return "\n".join(parts)


def inline(text: str, values: dict[str, Any]) -> str:
    """Return one paragraph as HTML."""
    text = re.sub(r"\{(\w+)\}", lambda match: values[match[1]], text)
    parts = re.split(r"(`[^`]*`|\$[^$]*\$)", text)
    for i, part in enumerate(parts):
        if part.startswith("`"):
            parts[i] = f"<code>{html.escape(part[1:-1])}</code>"
        elif part.startswith("$"):
            parts[i] = mathml(part[1:-1])
        else:
            part = html.escape(part, quote=False)
            parts[i] = re.sub(r"\*([^*]+)\*", r"<em>\1</em>", part)
    # Links come last, since a link may have code inside.
    return re.sub(
        r"\[([^]]+)\]\((#[\w-]+|\w+\.md|https:[^)]+)\)", r'<a href="\2">\1</a>', "".join(parts)
    )


def table_html(rows: list[list[str]]) -> str:
    """Return a table. The first row is its head, and the first cell of a row names the row.

    On a narrow page, the name of a row of many numbers stands above them.
    """
    columns = len(rows[0]) - 1
    kind = ""
    if columns >= 4 and all(re.fullmatch(r"[-\d.,]+", cell) for cell in rows[1][1:]):
        kind = f' class="stacked" style="--columns:{columns}"'
    head = "".join(f'<th scope="col">{inline(cell, {})}</th>' for cell in rows[0])
    lines = []
    for cells in rows[1:]:
        others = "".join(f"<td>{inline(cell, {})}</td>" for cell in cells[1:])
        lines.append(f'<tr><th scope="row">{inline(cells[0], {})}</th>{others}</tr>')
    body = "\n".join(lines)
    return (
        f'<div class="wide"><table{kind}><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


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
        for name in blocks.keys() | items.keys():
            if name not in positions:
                raise ValueError(f"annotated.txt, {section.anchor}: orchmoe.py has no {name}")
        starts.append(min(positions[name] for name in blocks.keys() | items.keys()))
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


# --------------------------------------------------------------------------------- what the run did


def heat(value: float) -> str:
    """Return a cell of a heat map."""
    shown = f"{value:.2f}"
    style = "" if float(shown) == 0 else f' style="--v:{shown}"'
    return f'<td class="cell"{style}>{shown}</td>'


def signed(value: float, digits: int) -> str:
    """Return a number with its sign."""
    return f"{value:+.{digits}f}".replace("-", "&#8722;")


def spoken(name: str) -> str:
    """Return the name of a task without its underscores."""
    return html.escape(name.replace("_", " "))


def largest(w: list[float]) -> int:
    """Return the abstract task with the largest weight, counted from 0."""
    return w.index(max(w))


def heat_head(first: str, K: int) -> str:
    """Return the head of a heat map: a column for each abstract task."""
    head = "".join(f'<th scope="col">{k + 1}</th>' for k in range(K))
    return f'<thead><tr><th scope="col">{first}</th>{head}</tr></thead>\n'


def tasks_html(explored: dict[str, Any]) -> str:
    """Return the heat map: the mean w of each task, sorted by its largest abstract task."""
    K = len(explored["Zhat"][0])
    groups: list[list[tuple[int, dict]]] = [[] for _ in range(K)]
    for number, task in enumerate(explored["tasks"]):
        groups[largest(task["w"])].append((number, task))
    bodies = []
    for k, group in enumerate(groups):
        group.sort(key=lambda pair: -pair[1]["w"][k])
        words = html.escape(explored["words"][k])
        rows = [
            f'<tr><th scope="rowgroup" colspan="{K + 1}" class="group">'
            f"Abstract task {k + 1}: {words}</th></tr>"
        ]
        for number, task in group:
            cells = "".join(heat(value) for value in task["w"])
            kind = " <i>(unseen)</i>" if task["kind"] == "unseen" else ""
            rows.append(
                f'<tr><th scope="row"><button type="button" data-task="{number}" '
                f'aria-expanded="false">{spoken(task["name"])}{kind}</button></th>{cells}</tr>'
            )
        bodies.append(f"<tbody>{''.join(rows)}</tbody>")
    return (
        f'<div class="wide"><table class="tasks">{heat_head("task", K)}'
        + "\n".join(bodies)
        + "</table></div>"
    )


def training_html(explored: dict[str, Any]) -> str:
    """Return the mean w of the task that training moved most, before and after training."""
    task = most_moved(explored)
    K = len(task["w"])
    rows = []
    for name, w in (("before training", task["start_w"]), ("after training", task["w"])):
        cells = "".join(heat(value) for value in w)
        rows.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    return (
        f'<div class="wide"><table class="tasks">{heat_head("mean w", K)}'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def most_moved(explored: dict[str, Any]) -> dict[str, Any]:
    """Return the seen task whose mean w differs most from that before training."""

    def change(task: dict[str, Any]) -> float:
        return sum(abs(a - b) for a, b in zip(task["w"], task["start_w"], strict=True))

    return max((task for task in explored["tasks"] if task["kind"] == "seen"), key=change)


def chain_html(explored: dict[str, Any]) -> str:
    """Return w, one row of Zhat, and c of the first sample in one Linear."""
    walk = explored["walk"]
    w = explored["samples"][explored["first"]]["w"]
    row = walk["allocation"][largest(w) + 1]
    c = walk["c"][-1]
    tables = []
    for head, name, values in (
        ("abstract task", "$w$", [f"{value:.2f}" for value in w]),
        ("skill", f"row {largest(w) + 1} of $Z^hat$", row[1:]),
        ("skill", "$c$", c[1:]),
    ):
        numbers_ = "".join(f'<th scope="col">{i + 1}</th>' for i in range(len(values)))
        cells = "".join(heat(float(value)) for value in values)
        tables.append(
            f'<table><thead><tr><th scope="col">{head}</th>{numbers_}</tr></thead>'
            f'<tbody><tr><th scope="row">{inline(name, {})}</th>{cells}</tr></tbody></table>'
        )
    return f'<div class="chain">{"".join(tables)}</div>'


def cards_html(explored: dict[str, Any]) -> str:
    """Return a card for each abstract task, with the sources that have it most strongly."""
    cards = []
    for k, sources in enumerate(explored["strongest"]):
        items = []
        for source in sources:
            items.append(
                f"<li><b>{source['w']:.2f}</b> {spoken(source['task'])} ({source['kind']})"
                f"<br><q>{html.escape(source['text'])}</q></li>"
            )
        cards.append(
            f'<div class="card"><h4>Abstract task {k + 1}</h4>'
            f"<p>{html.escape(explored['words'][k])}</p><ul>{''.join(items)}</ul></div>"
        )
    return (
        "<details><summary>The prompts that have each abstract task most strongly</summary>"
        f'<div class="cards">{"".join(cards)}</div></details>'
    )


def gap_html(explored: dict[str, Any], task: dict[str, Any], setting: str) -> str:
    """Return a cell with the loss of a setting minus that with the router's w.

    "off" has no colour. "other" says whose w it is.
    """
    gap = task[setting]["loss"] - task["own"]["loss"]
    kind = ""
    if abs(gap) > LITTLE and setting != "off":
        kind = ' class="good"' if gap > 0 else ' class="bad"'
    whose = whose_w(explored, task) if setting == "other" else ""
    return f"<td{kind}>{signed(gap, 2)}{whose}</td>"


def whose_w(explored: dict[str, Any], task: dict[str, Any]) -> str:
    """Return whose w "other" is, and whether the two tasks have the same abstract task."""
    others = set()
    for sample in explored["samples"]:
        if explored["tasks"][sample["task"]] is task:
            others.add(sample["other_task"])
    if len(others) != 1:
        return ""
    name = others.pop()
    other = next(each for each in explored["tasks"] if each["name"] == name)
    same = ""
    if largest(other["w"]) == largest(task["w"]):
        same = " (same)"
    return f"<small>{name.split('_')[0]}{same}</small>"


def extremes_html(explored: dict[str, Any]) -> str:
    """Return a table of the tasks that routing helps most and harms most, seen and unseen."""
    groups = []
    for kind in ("seen", "unseen"):
        tasks = sorted_by_gap(explored, kind)
        groups.append((f"{kind} tasks that the router’s w helps most", tasks[:MOST]))
        groups.append((f"{kind} tasks that it harms most", tasks[-MOST:]))
    return losses_table(explored, groups)


def losses_html(explored: dict[str, Any]) -> str:
    """Return the losses of all tasks with other weights than the router's, folded."""
    groups = []
    for kind in ("seen", "unseen"):
        tasks = sorted_by_gap(explored, kind)
        groups.append((f"{kind} tasks", [average(tasks, f"all {len(tasks)} tasks"), *tasks]))
    table = losses_table(explored, groups)
    return f"<details><summary>The same table for all tasks</summary>{table}</details>"


def sorted_by_gap(explored: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """Return the tasks of a kind, first the one whose loss the mean w raises most."""
    tasks = [task for task in explored["tasks"] if task["kind"] == kind]
    return sorted(tasks, key=lambda task: task["own"]["loss"] - task["mean"]["loss"])


def losses_table(explored: dict[str, Any], groups: list[tuple[str, list[dict]]]) -> str:
    """Return a table of losses: what other weights than the router's cost on tasks in groups."""
    settings = ("mean", "uniform", "other", "off")
    rows = []
    for title, tasks in groups:
        rows.append(f'<tr class="group"><th scope="rowgroup" colspan="9">{title}</th></tr>')
        for task in tasks:
            cells = f"<td>{task['own']['loss']:.2f}</td>"
            cells += "".join(gap_html(explored, task, setting) for setting in settings)
            for name in ("own", "mean", "uniform"):
                cells += f"<td>{100 * task[name]['right'] / task['count']:.0f}</td>"
            rows.append(f'<tr><th scope="row">{spoken(task["name"])}</th>{cells}</tr>')
    heads = ("router’s w", "mean w", "1/K each", "another’s w", "no skills")
    heads += ("router’s w", "mean w", "1/K each")
    columns = "".join(f'<th scope="col">{head}</th>' for head in heads)
    return (
        '<table class="losses"><thead>'
        '<tr class="heads"><td></td><th scope="colgroup">loss</th><th scope="colgroup" '
        'colspan="4">loss minus that with the router’s w</th><th scope="colgroup" colspan="3">'
        f'right answers, %</th></tr><tr><th scope="col">task</th>{columns}</tr></thead>\n'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def average(tasks: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Return the mean loss over the tasks, and the sum of their right answers."""
    result = {"name": name, "count": sum(task["count"] for task in tasks)}
    for setting in numbers.COMPARED:
        loss = sum(task[setting]["loss"] for task in tasks) / len(tasks)
        right = sum(task[setting]["right"] for task in tasks)
        result[setting] = {"loss": loss, "right": right}
    return result


def linears_html(explored: dict[str, Any]) -> str:
    """Return a table of the Linears: what is lost if one of them alone is not routed."""
    spread, rise = explored["without_one"]["spread"], explored["without_one"]["rise"]
    rows = []
    for name, s, r in zip(explored["linears"], spread, rise, strict=True):
        rows.append(
            f'<tr><th scope="row">{name.replace("blocks.", "").replace(".", " ")}</th>'
            f"<td>{s:.3f}</td><td>{signed(r, 4)}</td></tr>"
        )
    return (
        '<table><thead><tr><th scope="col">Linear</th><th scope="col">spread of c</th>'
        '<th scope="col">change of the loss</th></tr></thead>\n'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def gaps_within(explored: dict[str, Any], kind: str, low: float, high: float) -> str:
    """Return the names of the tasks whose loss the mean w and 1/K both change by low to high."""
    names = []
    for task in explored["tasks"]:
        gaps = [task[setting]["loss"] - task["own"]["loss"] for setting in ("mean", "uniform")]
        if task["kind"] == kind and low <= min(gaps) and max(gaps) <= high:
            names.append(task["name"].replace("_", " "))
    return ", ".join(names) or "(none)"


def shares(explored: dict[str, Any], kind: str) -> str:
    """Return how many answers are right, among the shown samples and in the whole set."""
    shown = [s for s in explored["samples"] if explored["tasks"][s["task"]]["kind"] == kind]
    right = sum(sample["results"][0][2] for sample in shown)
    whole = average([task for task in explored["tasks"] if task["kind"] == kind], "")
    return (
        f"{right} of the {len(shown)} {kind} ones are right ({100 * right / len(shown):.0f} %; of "
        f"all {whole['count']}: {100 * whole['own']['right'] / whole['count']:.0f} %)"
    )


# -------------------------------------------------------------------------------------- the verdict


def verdict(text: str) -> str:
    """Return the verdict of docs/evidence.md: the bold words with which its text begins."""
    return re.search(r"^\*\*([^*]+)\*\*", text, re.MULTILINE)[1].replace("\n", " ")


def against_lora(text: str) -> list[list[str]]:
    """Return the rows of the first table of docs/evidence.md that compare OrchMoE with a LoRA.

    A bold first cell names the study of the rows below it.
    """
    rows = [["study", "seen tasks, nats", "seen tasks, perplexity", "unseen tasks, nats"]]
    study = ""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| **"):
            study = cells[0].strip("*")
        elif line.startswith("| LoRA of equal size"):
            rows.append([study, *cells[1:4]])
        elif len(rows) > 1 and not line.startswith("|"):
            break
    return rows


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
    values = explored["walk"] | values_of(explored)
    usage = re.search(r"(    .*\n)+", source[source.index("    adapters = attach(") :])[0]
    values |= {
        "usage": textwrap.dedent(usage),
        "verbs": [item.split(" | ") for item in items["adapters"] if " | " in item],
        "drawing": f"<figure>{(DOCS / 'architecture.svg').read_text(encoding='utf-8')}</figure>",
        "grades": grades_html(items["idea"]),
        "equations": equations_html(),
        "chain": chain_html(explored),
        "tasks": tasks_html(explored),
        "training": training_html(explored),
        "cards": cards_html(explored),
        "extremes": extremes_html(explored),
        "losses": losses_html(explored),
        "linears": linears_html(explored),
        "explorer": explorer.section(shown_by_script(explored)),
        "verdict": verdict(evidence),
        "against_lora": against_lora(evidence),
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


def values_of(explored: dict[str, Any]) -> dict[str, Any]:
    """Return numbers of the run for the texts of the page."""
    values: dict[str, Any] = {"steps": str(explored["steps"])}
    values["root_width"] = f"{math.sqrt(int(explored['walk']['width'])):.1f}"
    N, K, S = len(explored["Zhat"]), len(explored["Zhat"][0]), len(explored["Zhat"][0][0])
    values |= {"N": str(N), "K": str(K), "S": str(S)}
    heads = ("router’s w", "mean w", "1/K each", "another’s w", "no skills")
    values["means"] = [["mean loss", *heads]]
    for kind in ("seen", "unseen"):
        tasks = [task for task in explored["tasks"] if task["kind"] == kind]
        values[f"{kind}_tasks"] = str(len(tasks))
        values[f"{kind}_share"] = shares(explored, kind)
        values[f"{kind}_little"] = gaps_within(explored, kind, -LITTLE, LITTLE)
        values[f"{kind}_harm"] = gaps_within(explored, kind, -math.inf, -LITTLE)
        values[f"{kind}_distance"] = f"{explored['distance'][kind]:.3f}"
        whole = average(tasks, "")
        losses = [f"{whole[setting]['loss']:.2f}" for setting in numbers.COMPARED]
        values["means"].append([f"{len(tasks)} {kind} tasks", *losses])

    seen = [task for task in explored["tasks"] if task["kind"] == "seen"]
    same = [task for task in seen if largest(task["w"]) == largest(task["start_w"])]
    values["same_largest"] = str(len(same))
    values["most_moved"] = spoken(most_moved(explored)["name"])
    split = min(seen, key=lambda task: max(task["w"]))
    values["split"] = spoken(split["name"])
    by_weight = sorted(range(K), key=lambda k: -split["w"][k])
    values["split_over"] = " and ".join(str(k + 1) for k in sorted(by_weight[:2]))

    sample = explored["samples"][explored["first"]]
    k = largest(sample["w"])
    values["first_input"] = sample["input"]
    values["first_task"] = spoken(explored["tasks"][sample["task"]]["name"])
    values["first_k"] = str(k + 1)
    values["first_w"] = f"{sample['w'][k]:.2f}"
    values["first_words"] = explored["words"][k]
    c = [float(value) for value in explored["walk"]["c"][-1][1:]]
    values["first_skill"] = str(largest(c) + 1)
    return values


# -------------------------------------------------------------------------------------- the program


def outdated_words(explored: dict[str, Any], items: list[str]) -> list[str]:
    """Return a line for each abstract task whose words do not fit the run.

    An item has the words, and behind " | " the numbers of the seen tasks that have it most.
    """
    found: list[list[str]] = [[] for _ in items]
    for task in explored["tasks"]:
        if task["kind"] == "seen":
            number = task["name"].removeprefix("task").split("_")[0]
            found[largest(task["w"])].append(number)
    lines = []
    for k, item in enumerate(items):
        words, known = item.split(" | ")
        if sorted(known.split()) != sorted(found[k]):
            lines.append(
                f"docs/annotated.txt: abstract task {k + 1} ({words}) is now most in the tasks "
                f"{' '.join(found[k]) or 'none'}; write what they share, and these numbers"
            )
    return lines


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--run":
        program.write_json(NUMBERS, numbers.collect(sys.argv[2]))
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written: {PAGE}")
    explored = json.loads(NUMBERS.read_text(encoding="utf-8"))
    for section in notes.sections():
        if section.anchor == "abstract-tasks":
            for line in outdated_words(explored, section.items):
                print(line)


if __name__ == "__main__":
    program.run_program(main)
