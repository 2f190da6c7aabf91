"""Turn Markdown with LaTeX into HTML.  Test: pytest tests/repo/test_annotate.py"""

import html
import itertools
import re

from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from pygments.lexers import PythonLexer
from pygments.token import Comment, Keyword, Name, Number, Operator, String

from support import program
from support.program import UserError

RENDERER = MarkdownIt("commonmark", {"html": True}).enable("table")
MATHML = "http://www.w3.org/1998/Math/MathML"  # HTML needs no name space
# Classes of the style sheet. All other tokens have no colour.
COLOURS = {
    Comment: "co",
    Keyword: "kw",
    Operator.Word: "kw",
    String: "st",
    Number: "nu",
    Name.Class: "df",
    Name.Function: "df",
}


def mathml(latex: str, display: str) -> str:
    """Return LaTeX as MathML. `display` is inline or block."""
    with program.reading(f"annotated.md: ${latex}$", "mend this LaTeX"):
        math = convert(latex, display=display)
    return math.replace(f' xmlns="{MATHML}"', "")


def markdown(text: str, values: dict[str, str]) -> str:
    """Return Markdown with LaTeX between dollar signs as HTML.

    `values` has the HTML that each {{name}} stands for. A list item that begins with a bold word
    gets this word as its label.
    """

    def value_of(match: re.Match) -> str:
        name = match[1] or match[2]
        if name not in values:
            raise UserError(f"annotated.md: {{{{{name}}}}} is not the name of a value")
        return values[name]

    text = re.sub(r"\$\$([^$]+)\$\$", lambda match: mathml(match[1], "block"), text)
    text = re.sub(r"\$([^$]+)\$", lambda match: mathml(match[1], "inline"), text)
    text = RENDERER.render(text.replace(" %", "\u00a0%"))
    # A long name of a test may break only behind its underscores.
    text = re.sub(r"<code>test_\w+", lambda match: match[0].replace("_", "_<wbr>"), text)
    text = re.sub(
        r"<li><strong>(\w+)</strong>", r'<li class="graded"><span class="grade \1">\1</span>', text
    )
    text = re.sub(r"(?s)<table>.*?</table>", r'<div class="wide">\g<0></div>', text)
    return re.sub(r"<p>\{\{(\w+)\}\}</p>|\{\{(\w+)\}\}", value_of, text)


def inline(text: str) -> str:
    """Return Markdown of one line as HTML without a paragraph around it."""
    return markdown(text, {}).strip().removeprefix("<p>").removesuffix("</p>")


def table(rows: list[list[str]]) -> str:
    """Return a table whose first row is its head. A cell has text and LaTeX, and no HTML.

    On a narrow page, the name of a row of many numbers stands above them.
    """
    lines = [f"| {html.escape(' | '.join(cells), quote=False)} |" for cells in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    text = markdown("\n".join(lines), {})
    if len(rows[0]) >= 5:
        text = stacked(text, len(rows[0]) - 1)
    return text


def stacked(text: str, columns: int) -> str:
    """Return a table whose names of rows stand above `columns` columns on a narrow page."""
    return text.replace("<table>", f'<table class="stacked" style="--columns:{columns}">')


def highlight(source: str) -> list[str]:
    """Return the lines of a Python source as HTML with coloured tokens."""
    text = ""
    tokens = PythonLexer(stripnl=False).get_tokens(source)
    for colour, group in itertools.groupby(tokens, lambda token: colour_of(token[0])):
        code = html.escape("".join(value for _, value in group), quote=False)
        if colour:
            # A token may have several lines. Each line has tags of its own.
            code = re.sub(r"(.+)", rf"<i class={colour}>\1</i>", code)
        text += code
    return text.splitlines()


def colour_of(kind: object) -> str:
    """Return the class of a kind of token, "" for none."""
    for group, colour in COLOURS.items():
        if kind in group:
            return colour
    return ""
