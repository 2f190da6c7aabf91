"""Turn the notation of docs/annotated.txt into HTML: paragraphs, tables and mathematics.

docs/notes.py says what the notation is.  Test: pytest tests/repo/test_annotate.py
"""

import html
import re
from typing import Any

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
