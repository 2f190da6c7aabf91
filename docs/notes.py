"""Read docs/annotated.txt, the text of docs/annotated.html.

The text is a list of sections: first those of the path, then those of the code, in the order of
orchmoe.py. A section of the code has blocks, each about one function, method or class, and a block
has notes, each about some of its lines. The first word of a line says what the line is:

    # anchor: title of a section
    ## name #anchor title of a block
    $$ an equation of the block
    [grade] what has this grade       stated, secondary, inferred, chosen, as in docs/paper.md
    [test] name of the test that holds the block
    | a line of the block, without its indent: the note below is about the lines from here on
    + what the note is about: the note is engineering, and folded with its lines
    [sample] what follows is the step of the sample that runs through the page
    - an item of the section

All other lines are paragraphs of the section, block, note or sample that was named last. They may
have `code`, *stress*, [links](#anchor), [links](page.md), $mathematics$ and {number of the run}. A
paragraph may be {table name}, {text name} or {html name}. In the mathematics "X^hat" has a hat,
"B_s" an index, "X^T" a T, and frac(a ; b) is a fraction.
"""

from dataclasses import dataclass, field
from pathlib import Path

TEXT = Path(__file__).with_name("annotated.txt")
GRADES = ("stated", "secondary", "inferred", "chosen")


@dataclass
class Note:
    line: str
    text: str = ""
    folded: str = ""  # what an engineering note is about


@dataclass
class Block:
    name: str
    anchor: str
    title: str
    text: str = ""
    equations: list[str] = field(default_factory=list)
    evidence: list[tuple[str, str]] = field(default_factory=list)  # (grade, what has it)
    notes: list[Note] = field(default_factory=list)
    sample: Note | None = None
    test: str = ""


@dataclass
class Section:
    anchor: str
    title: str
    text: str = ""
    items: list[str] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)


def read(text: str) -> list[Section]:
    """Return the sections of a text in this form. Raise ValueError for an unknown [word]."""
    sections: list[Section] = []
    section = block = None
    owner = None  # what the paragraphs belong to
    for line in text.splitlines():
        marker, _, rest = line.partition(" ")
        if marker == "#":
            anchor, title = rest.split(": ", 1)
            owner = section = Section(anchor, title)
            sections.append(section)
        elif marker == "##":
            name, anchor, title = rest.split(" ", 2)
            owner = block = Block(name, anchor.removeprefix("#"), title)
            section.blocks.append(block)
        elif marker == "$$":
            block.equations.append(rest)
        elif marker == "|":
            owner = Note(rest)
            block.notes.append(owner)
        elif marker == "+":
            owner.folded = rest
        elif marker == "-":
            section.items.append(rest)
        elif marker == "[test]":
            block.test = rest
        elif marker == "[sample]":
            owner = block.sample = Note("")
        elif marker.startswith("[") and marker.endswith("]"):
            grade = marker[1:-1]
            if grade not in GRADES:
                raise ValueError(f"{line}: not one of {', '.join(GRADES)}, test, sample")
            block.evidence.append((grade, rest))
        else:
            owner.text += line + "\n"
    return sections


def sections() -> list[Section]:
    """Return the sections of the page."""
    return read(TEXT.read_text(encoding="utf-8"))
