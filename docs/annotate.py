"""Write docs/annotated.html: orchmoe.py with notes beside the code, and the routing explorer.

    python -m docs.annotate                       # from docs/explorer.json
    python -m docs.annotate --run runs/orchmoe-1  # first remake docs/explorer.json from this run

The page is one file without links to the network. The notes come from three places: the docstrings
of orchmoe.py, docs/notes.py, and the numbers of a finished run in docs/explorer.json.

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
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import data
import eval as evaluation
import run_folder
import runtime
from docs.notes import NOTES, Note
from experiments import explorer

DOCS = Path(__file__).resolve().parent
SOURCE = DOCS.parent / "orchmoe.py"
NUMBERS = DOCS / "explorer.json"
PAGE = DOCS / "annotated.html"


class Block(NamedTuple):
    """A piece of orchmoe.py that has a note: lines `first` to `last`, counted from 1."""

    name: str
    first: int
    last: int
    docstring: str


# --------------------------------------------------------------------------- the blocks of the file


def find_blocks(source: str) -> list[Block]:
    """Cut a module into blocks: every line belongs to exactly one.

    Functions and methods are blocks. So are the head of a class, up to its first method, the
    docstring of the module, and the imports with the constants behind them.
    """
    tree = ast.parse(source)
    starts = [("module", 1, ast.get_docstring(tree) or "")]
    starts.append(("imports", tree.body[0].end_lineno + 1, ""))
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        starts.append((node.name, first_line(node, source), ast.get_docstring(node) or ""))
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    name = f"{node.name}.{method.name}"
                    docstring = ast.get_docstring(method) or ""
                    starts.append((name, first_line(method, source), docstring))

    lasts = [first - 1 for _, first, _ in starts[1:]] + [len(source.splitlines())]
    return [
        Block(name, first, last, docstring)
        for (name, first, docstring), last in zip(starts, lasts, strict=True)
    ]


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


# -------------------------------------------------------------------------------- the code as HTML


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

MATH_TOKEN = re.compile(r"[A-Za-zα-ωΑ-Ω]+(?:\^hat)?(?:\^T)?(?:_[A-Za-z0-9]+)?|[0-9.]+|\S")
FUNCTIONS = ("softmax", "sigmoid", "mean", "normalise", "ln", "H", "U", "N")


def mathml(equation: str) -> str:
    """Return MathML for one equation: "X^hat" has a hat, "B_s" an index, "sqrt(D)" a root."""
    parts = []
    tokens = MATH_TOKEN.findall(equation)
    while tokens:
        token = tokens.pop(0)
        if token == "sqrt":
            end = tokens.index(")")
            inside = "".join(atom(name) for name in tokens[1:end])
            parts.append(f"<msqrt><mrow>{inside}</mrow></msqrt>")
            tokens = tokens[end + 1 :]
        else:
            parts.append(atom(token))
    return f'<math display="block"><mrow>{"".join(parts)}</mrow></math>'


def atom(token: str) -> str:
    """Return MathML for one name, number or sign."""
    if re.fullmatch(r"[0-9.]+", token):
        return f"<mn>{token}</mn>"
    if not token[0].isalpha():
        sign = {"-": "&#8722;", "~": "&#8764;"}.get(token, html.escape(token))
        return f"<mo>{sign}</mo>"
    name, _, index = token.partition("_")
    name, transposed = name.removesuffix("^T"), name.endswith("^T")
    name, hat = name.removesuffix("^hat"), name.endswith("^hat")
    if name == "sum":
        return f"<munder><mo>&#8721;</mo><mi>{index}</mi></munder>"
    variant = ' mathvariant="normal"' if name in FUNCTIONS and len(name) > 1 else ""
    result = f"<mi{variant}>{name}</mi>"
    if hat:
        result = f"<mover accent='true'>{result}<mo>^</mo></mover>"
    if transposed:
        result = f"<msup>{result}<mi>T</mi></msup>"
    if index:
        result = f"<msub>{result}<mi mathvariant='normal'>{index}</mi></msub>"
    return result


# ----------------------------------------------------------------------------------------- the page

STYLE = """
body { font-family: system-ui, sans-serif; margin: 0; line-height: 1.45; color: #1c2430; }
header, section.intro { max-width: 70rem; margin: 0 auto; padding: 1rem; }
.block { display: grid; grid-template-columns: minmax(16rem, 26rem) minmax(0, 1fr);
  border-top: 1px solid #e3e6ea; }
.note { padding: .8rem 1rem; font-size: .88rem; }
.note h2 { font: 600 .9rem ui-monospace, monospace; margin: 0 0 .4rem; overflow-wrap: anywhere; }
.note p { margin: .4rem 0; }
.numbers { background: #f2f6fb; padding: .4rem .6rem; font: .76rem/1.5 ui-monospace, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.test { color: #5b6675; font-size: .78rem; overflow-wrap: anywhere; }
.grade { font-size: .72rem; padding: .08rem .4rem; border-radius: .6rem; color: #fff; }
.stated { background: #1b7f4b; } .secondary { background: #1f5fa8; }
.inferred { background: #8a5a00; } .chosen { background: #9a3a6a; }
.code { background: #fbfbfc; padding: .8rem 0; overflow-x: auto; }
.code pre { margin: 0; font: .78rem/1.5 ui-monospace, monospace; }
.code .n { display: inline-block; width: 3.2rem; text-align: right; padding-right: 1rem;
  color: #9aa4b1; user-select: none; }
.co { color: #6b7684; font-style: italic; } .st { color: #2f6b3a; } .nu { color: #7a3e9d; }
.kw { color: #a8323e; } .df { color: #1f5fa8; font-weight: 600; }
math { font-size: 1.05rem; margin: .3rem 0; overflow-x: auto; }
@media (max-width: 800px) { .block { grid-template-columns: minmax(0, 1fr); }
  .code .n { width: 2.2rem; padding-right: .6rem; } }
"""

INTRO = """
<p>This page shows <code>orchmoe.py</code> from its first line to its last. On the right is the
code. On the left is what each block does, its equation, and who says so:
<span class="grade stated">stated</span> in the paper's abstract,
<span class="grade secondary">secondary</span> in summaries of the paper,
<span class="grade inferred">inferred</span> from papers that OrchMoE builds on, or
<span class="grade chosen">chosen</span> by us, because the full text was not available. Blocks
without a label are engineering, or follow from labelled ones.</p>
<p>The numbers in the blue boxes are those of one sample after a full run of
<code>python train.py</code>. At the end of the page is <a href="#explore">an explorer</a>: choose a
sample, move the weights of the abstract tasks, and see what changes.</p>
"""


def note_html(block: Block, note: Note, numbers: dict[str, list[str]]) -> str:
    """Return the left column of a block."""
    parts = [f"<h2>{html.escape(block.name)}</h2>"]
    if note.grade:
        source = f" {html.escape(note.source)}" if note.source else ""
        parts.append(f'<p><span class="grade {note.grade}">{note.grade}</span>{source}</p>')
    for equation in note.equation.split(" ;; "):
        if equation:
            parts.append(mathml(equation))
    if block.name != "module":
        for paragraph in block.docstring.split("\n\n"):
            if paragraph and not paragraph.startswith("  "):
                parts.append(f"<p>{html.escape(' '.join(paragraph.split()))}</p>")
    if note.text:
        parts.append(f"<p>{html.escape(note.text)}</p>")
    if block.name in numbers:
        lines = html.escape("\n".join(numbers[block.name]))
        parts.append(f'<div class="numbers">{lines}</div>')
    if note.test:
        parts.append(f'<p class="test">Test: {note.test}</p>')
    return "\n".join(parts)


def page() -> str:
    """Return the whole page."""
    source = SOURCE.read_text(encoding="utf-8")
    explored = json.loads(NUMBERS.read_text(encoding="utf-8"))
    code = highlight(source)
    rows = []
    for block in find_blocks(source):
        lines = []
        for number in range(block.first, block.last + 1):
            lines.append(f'<span class="n">{number}</span>{code[number - 1]}')
        note = note_html(block, NOTES[block.name], explored["walk"])
        text = "\n".join(lines)
        rows.append(
            f'<div class="block"><div class="note">{note}</div>\n'
            f'<div class="code"><pre>{text}</pre></div></div>'
        )
    explained = (
        f"<p>{len(explored['samples'])} samples of a run of the default command "
        f"({explored['steps']} steps). Where does the routing matter, and where does it not? "
        "Compare the loss with the sample's own w and with w = 1/K, on seen and unseen tasks.</p>"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>OrchMoE, annotated</title>\n<style>{STYLE}</style></head>\n<body>\n"
        f"<header><h1>OrchMoE, annotated</h1>{INTRO}</header>\n"
        + "\n".join(rows)
        + f'\n<section class="intro" id="explore"><h1>Explore the routing</h1>{explained}\n'
        f"{explorer.section(explored)}</section>\n</body></html>\n"
    )


# ------------------------------------------------------------------------- the numbers of a run


@torch.no_grad()
def walk(run: str) -> dict[str, list[str]]:
    """Return the numbers of one seen sample at each step of orchmoe.py, as lines of text.

    run: the folder of a run with a sample router that uses its attention.
    """
    device = runtime.pick_device(device="cpu", dtype="float32")
    base, adapters, tokenizer = run_folder.load(device, run=run)
    config = run_folder.read_config(run)
    data_config = config.section(data.DataConfig, "dataset")
    example = data.load_sets(data_config, tokenizer, training=config.tasks)["seen"][0]
    router = adapters.router
    batch = data.collate([example])
    embeddings = base.embed(batch.input_ids)
    path, linear = next(iter(adapters.linears.items()))
    inputs = []
    hook = linear.register_forward_hook(lambda _, given, output: inputs.append((given[0], output)))
    with evaluation.routed(base, adapters, batch) as routing:
        base.loss(batch.input_ids, batch.attention_mask, batch.labels)
    hook.remove()
    x, y = inputs[0]
    frozen = F.linear(x, linear.weight, linear.bias)

    _, L, D = embeddings.shape
    X = F.rms_norm(embeddings, (D,), eps=1e-6)
    P = (X @ X.mT / math.sqrt(D)).softmax(dim=-1)  # (1,L,L)
    same_token = batch.input_ids[:, :, None] == batch.input_ids[:, None, :]
    on_same_token = (P * same_token).sum(dim=-1).mean()
    x_hat = router.summarise(embeddings)
    standard = (x_hat - router.mu) / router.sd
    logits = F.linear(standard, router.W_task, router.bias)
    N, K, S = adapters.Z.shape
    return {
        "TaskRouter.summarise": [
            f"sample {example.id}: L = {L}, D = {D}",
            f"mean attention of a token to itself and its repetitions: {on_same_token:.4f}",
            f"x_hat = [{numbers(x_hat[0, :4])}, ...]",
        ],
        "TaskRouter.forward": [
            f"standardised x_hat = [{numbers(standard[0, :4])}, ...]",
            f"W_task x_hat + b = [{numbers(logits[0])}]",
            f"w = [{numbers(routing.w[0])}], sum {routing.w.sum():.4f}",
        ],
        "OrchMoE.__init__": [f"N = {N} adapted Linears, K = {K}, S = {S}"],
        "OrchMoE.allocation_weights": [
            f"{path}, row of the largest w:",
            f"Zhat = [{numbers(routing.Zhat[0, 0, routing.w[0].argmax()])}]",
        ],
        "OrchMoE.route": [f"{path}: c = [{numbers(routing.c[0, 0])}]"],
        "SkillLinear.forward": [
            f"{path}: x {tuple(x.shape)} -> y {tuple(y.shape)}",
            f"norm of W0 x: {frozen.norm():.2f}, of the skills' part: {(y - frozen).norm():.2f}",
        ],
        "mix_skills": [
            f"A {tuple(linear.skill_A.shape)}, B {tuple(linear.skill_B.shape)}: "
            f"one LoRA of rank {linear.skill_A.shape[0] * linear.skill_A.shape[1]}",
        ],
    }


def numbers(values: Tensor) -> str:
    return ", ".join(f"{value:.3f}" for value in values.tolist())


# ----------------------------------------------------------------------------------- the program


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--run":
        run = sys.argv[2]
        explored = explorer.collect(run)
        runtime.write_json(NUMBERS, {"walk": walk(run), **explored})
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
