"""Write docs/annotated.html: the idea of orchmoe.py, its lines with notes, and one run of it.

    python -m docs.annotate                       # from docs/explorer.json
    python -m docs.annotate --run runs/orchmoe-1  # first remake docs/explorer.json from this run

The page is one file that makes no request. Its text is in docs/annotated.txt, its code in
orchmoe.py, its numbers in docs/explorer.json (made by docs/numbers.py), its style and script in
annotated.css and annotated.js, and its explorer in experiments/.

Test: pytest tests/repo/test_annotate.py
"""

import ast
import html
import io
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
# What the explorer of the page and annotated.js read.
EXPLORED = ("linears", "Zhat", "sums_to_one", "mean_w", "tasks", "samples", "first", "words")
LITTLE = 0.05  # nats; a smaller difference of losses counts as none


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
            text += f'<span class="{kind}">{html.escape(line[begin:end])}</span>'
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
        if match := re.fullmatch(r"\{(table|text|html) (\w+)\}", paragraph):
            value = values[match[2]]
            if match[1] == "table":
                value = table_html(value)
            elif match[1] == "text":
                value = f"<pre>{html.escape(value)}</pre>"
            parts.append(value)
        elif match := re.fullmatch(r"\$([^$]*)\$", paragraph):
            parts.append(mathml(match[1], "block"))
        elif match := re.fullmatch(r"(\d+)\. (.*)", paragraph):
            parts.append(f'<p class="item">{match[1]}. {inline(match[2], values)}</p>')
        elif paragraph:
            parts.append(f"<p>{inline(paragraph, values)}</p>")
    return "\n".join(parts)


def inline(text: str, walk: dict[str, Any]) -> str:
    """Return one paragraph as HTML."""
    text = re.sub(r"\{(\w+)\}", lambda match: walk[match[1]], text)
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
    return re.sub(r"\[([^]]+)\]\((#[\w-]+|\w+\.md)\)", r'<a href="\2">\1</a>', "".join(parts))


def table_html(rows: list[list[str]]) -> str:
    """Return a table. The first row is its head, and the first cell of a row names the row."""
    head = "".join(f'<th scope="col">{inline(cell, {})}</th>' for cell in rows[0])
    lines = []
    for cells in rows[1:]:
        others = "".join(f"<td>{inline(cell, {})}</td>" for cell in cells[1:])
        lines.append(f'<tr><th scope="row">{inline(cells[0], {})}</th>{others}</tr>')
    body = "\n".join(lines)
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


# ----------------------------------------------------------------------------------------- the code


def code_html(code: list[str], lines: Iterable[int], name: str) -> str:
    """Return lines of the piece `name` as highlighted code with their numbers."""
    parts = [f'<span data-n="{number}">{code[number - 1]}\n</span>' for number in lines]
    kind = "code method" if "." in name else "code"
    return f'<pre class="{kind}">{"".join(parts)}</pre>'


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
    piece: Piece, block: notes.Block, source: list[str], code: list[str], walk: dict[str, Any]
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
    parts.append(prose(block.text, walk))
    if block.notes:
        for note, lines in zip(block.notes, note_lines(piece, block, source), strict=True):
            shown = [number for number in lines if number not in piece.docstring]
            parts.append(
                f'<div class="pair"><div class="note">{prose(note.text, walk)}</div>\n'
                f"{code_html(code, shown, piece.name)}</div>"
            )
        if piece.docstring:
            folded = code_html(code, piece.docstring, piece.name)
            parts.append(f"<details><summary>Its docstring</summary>{folded}</details>")
    else:
        parts.append(code_html(code, range(piece.first, piece.last + 1), piece.name))
    if block.sample:
        parts.append(f"<aside><h4>Our sample</h4>{prose(block.sample.text, walk)}</aside>")
    if block.test:
        parts.append(f'<p class="small">Checked by the test <code>{block.test}</code></p>')
    parts.append("</section>")
    return "\n".join(part for part in parts if part)


def engineering_html(
    pieces: list[Piece],
    source: list[str],
    code: list[str],
    items: list[str],
    values: dict[str, Any],
) -> str:
    """Return the pieces that no section has, folded, in the order of the file.

    A piece without an item has the first line of its docstring.
    """
    known = dict(item.split(": ", 1) for item in items)
    unknown = known.keys() - {piece.name for piece in pieces}
    if unknown:
        raise ValueError(f"annotated.txt: no piece of the rest is called {', '.join(unknown)}")
    parts = []
    for piece in pieces:
        anchor = piece.name.replace(".", "-").lower()
        text = ""
        if piece.name in known:
            text = inline(known[piece.name], values)
        elif piece.docstring:
            text = html.escape(source[piece.docstring.start - 1].strip().strip('"'))
            text = re.sub(r"`([^`]*)`", r"<code>\1</code>", text)
        parts.append(
            f'<details id="code-{anchor}"><summary><code>{piece.name}</code> {text}</summary>'
            f"{code_html(code, range(piece.first, piece.last + 1), piece.name)}</details>"
        )
    return "\n".join(parts)


# --------------------------------------------------------------------------------- what the run did


def heat(value: float) -> str:
    """Return a cell of a heat map."""
    return f'<td class="cell" style="--v:{value:.2f}">{value:.2f}</td>'


def signed(value: float, digits: int) -> str:
    """Return a number with its sign."""
    return f"{value:+.{digits}f}".replace("-", "&#8722;")


def spoken(name: str) -> str:
    """Return the name of a task without its underscores."""
    return html.escape(name.replace("_", " "))


def tasks_html(explored: dict[str, Any]) -> str:
    """Return the heat map: the mean w of each task, sorted by its largest abstract task."""
    K = len(explored["Zhat"][0])
    groups: list[list[tuple[int, dict]]] = [[] for _ in range(K)]
    for number, task in enumerate(explored["tasks"]):
        largest = task["w"].index(max(task["w"]))
        groups[largest].append((number, task))
    head = "".join(f'<th scope="col">{k + 1}</th>' for k in range(K))
    bodies = []
    for k, group in enumerate(groups):
        group.sort(key=lambda pair: -pair[1]["w"][k])
        words = html.escape(explored["words"][k])
        rows = [
            f'<tr><th scope="rowgroup" colspan="{K + 1}" class="group">'
            f'<a href="#abstract-task-{k + 1}">Abstract task {k + 1}</a>: {words}</th></tr>'
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
        '<div class="wide"><table class="tasks"><thead><tr><th scope="col">task</th>'
        f"{head}</tr></thead>\n" + "\n".join(bodies) + "</table></div>"
    )


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
            f'<div class="card" id="abstract-task-{k + 1}"><h4>Abstract task {k + 1}</h4>'
            f"<p>{html.escape(explored['words'][k])}</p><ul>{''.join(items)}</ul></div>"
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def gap_html(task: dict[str, Any], setting: str) -> str:
    """Return a cell with the loss of a setting minus that with the own w. "off" has no colour."""
    gap = task[setting]["loss"] - task["own"]["loss"]
    kind = ""
    if abs(gap) > LITTLE and setting != "off":
        kind = ' class="good"' if gap > 0 else ' class="bad"'
    return f"<td{kind}>{signed(gap, 2)}</td>"


def losses_html(explored: dict[str, Any]) -> str:
    """Return two tables: what other weights than the own w cost, on seen and on unseen tasks."""
    tables = [losses_table(explored, kind) for kind in ("seen", "unseen")]
    return f'<div class="columns">{"".join(tables)}</div>'


def losses_table(explored: dict[str, Any], kind: str) -> str:
    tasks = [task for task in explored["tasks"] if task["kind"] == kind]
    tasks.sort(key=lambda task: task["own"]["loss"] - task["mean"]["loss"])
    rows = []
    for task in [average(tasks, f"all {len(tasks)} tasks"), *tasks]:
        count = task["count"]
        cells = "".join(gap_html(task, setting) for setting in ("mean", "uniform", "other", "off"))
        rights = [f"{100 * task[name]['right'] / count:.0f}" for name in ("own", "mean", "uniform")]
        cells += "".join(f"<td>{right}</td>" for right in rights)
        rows.append(
            f'<tr><th scope="row">{spoken(task["name"])}</th>'
            f"<td>{task['own']['loss']:.2f}</td>{cells}</tr>"
        )
    heads = ("own w", "mean w", "1/K", "another&#8217;s w", "w = 0", "own w", "mean w", "1/K")
    columns = "".join(f'<th scope="col">{head}</th>' for head in heads)
    return (
        f'<div class="wide"><table class="losses"><caption>{kind.capitalize()} tasks</caption>'
        '<thead><tr><td></td><th scope="colgroup">loss</th><th scope="colgroup" colspan="4">loss '
        'minus that with the own w</th><th scope="colgroup" colspan="3">right answers, %</th></tr>'
        f'<tr><th scope="col">task</th>{columns}</tr></thead>\n<tbody>{"".join(rows)}</tbody>'
        "</table></div>"
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
        '<div class="wide"><table><thead><tr><th scope="col">Linear</th><th scope="col">spread of c'
        f'</th><th scope="col">loss</th></tr></thead>\n<tbody>{"".join(rows)}</tbody></table></div>'
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


# ----------------------------------------------------------------------------------------- the page


def page() -> str:
    """Return the whole page."""
    text = SOURCE.read_text(encoding="utf-8")
    source = text.splitlines()
    code = highlight(text)
    sections = notes.sections()
    items = {section.anchor: section.items for section in sections}
    explored = json.loads(NUMBERS.read_text(encoding="utf-8"))
    explored["words"] = [item.split(" | ")[0] for item in items["abstract-tasks"]]

    # Everything that a text can name.
    pieces = {piece.name: piece for piece in find_pieces(text)}
    told = {block.name for section in sections for block in section.blocks}
    values = explored["walk"] | values_of(explored)
    rest = [piece for piece in pieces.values() if piece.name not in told]
    usage = text[text.index("    adapters = attach(") : text.index("\n\nTest: ")]
    values |= {
        "usage": textwrap.dedent(usage),
        "verbs": [item.split(" | ") for item in items["attach"]],
        "drawing": f"<figure>{(DOCS / 'architecture.svg').read_text(encoding='utf-8')}</figure>",
        "grades": grades_html(items["idea"]),
        "equations": equations_html(),
        "tasks": tasks_html(explored),
        "cards": cards_html(explored),
        "losses": losses_html(explored),
        "linears": linears_html(explored),
        "explorer": explorer.section({name: explored[name] for name in EXPLORED}),
        "pieces": engineering_html(rest, source, code, items["engineering"], values),
    }

    contents = []
    bodies = []
    for section in sections:
        parts = [prose(section.text, values)]
        for block in section.blocks:
            parts.append(block_html(pieces[block.name], block, source, code, values))
        body = "\n".join(parts)
        contents.append(f'<li><a href="#{section.anchor}">{section.title}</a></li>')
        bodies.append(
            f'<section class="step" id="{section.anchor}">\n<h2>{section.title}</h2>\n'
            f"{body}\n</section>"
        )
    style = explorer.read("explorer.css") + (DOCS / "annotated.css").read_text(encoding="utf-8")
    script = (DOCS / "annotated.js").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>OrchMoE, annotated</title>\n<style>\n{style}</style></head>\n<body>\n"
        '<nav id="contents" aria-label="Contents"><details open><summary>Contents</summary>'
        f"<ol>{''.join(contents)}</ol></details></nav>\n<main>\n<h1>OrchMoE, annotated</h1>\n"
        + "\n".join(bodies)
        + f"\n</main>\n<script>\n{script}</script>\n</body></html>\n"
    )


def equations_html() -> str:
    """Return the equations as a table, each with a link to its block."""
    rows = []
    for equation, shape, anchor, name in EQUATIONS:
        link = f'<a href="#{anchor}">{name}</a>'
        rows.append(
            f'<tr><td>{mathml(equation)}</td><td>{shape}</td><td class="text">{link}</td></tr>'
        )
    return f'<div class="wide"><table class="equations">{"".join(rows)}</table></div>'


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
    heads = ("own w", "mean w", "w = 1/K", "w of another sample", "w = 0: the base alone")
    values["means"] = [["mean loss over tasks", *heads]]
    for kind in ("seen", "unseen"):
        tasks = [task for task in explored["tasks"] if task["kind"] == kind]
        values[f"{kind}_tasks"] = str(len(tasks))
        values[f"{kind}_share"] = shares(explored, kind)
        values[f"{kind}_little"] = gaps_within(explored, kind, -LITTLE, LITTLE)
        values[f"{kind}_harm"] = gaps_within(explored, kind, -math.inf, -LITTLE)
        whole = average(tasks, "")
        losses = [f"{whole[setting]['loss']:.2f}" for setting in numbers.COMPARED]
        values["means"].append([f"{len(tasks)} {kind} tasks", *losses])
    return values


# -------------------------------------------------------------------------------------- the program


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--run":
        program.write_json(NUMBERS, numbers.collect(sys.argv[2]))
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
