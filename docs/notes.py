"""Read docs/annotated.txt, the text of docs/annotated.html.

The text is a list of sections, in the order of the idea. A section has blocks, each about one
function, method or class of orchmoe.py, and a block has notes, each about some of its lines:

    # anchor: title of a section
    ## name #anchor title of a block
    $$ an equation of the block
    [grade] what has this grade       stated, secondary, inferred, chosen, as in docs/paper.md
    [test] name of the test that holds the block
    | a line of the block, without its indent: the note below is about the lines from here on
    [sample] what follows is the step of the sample that runs through the page
    - an item of the section

All other lines are paragraphs of the section, block, note or sample that was named last. They may
have `code`, *stress*, [links](#anchor), [links](page.md), $mathematics$ and {number of the run}. A
paragraph may be {table name}, {text name} or {html name}. In the mathematics "X^hat" has a hat,
"B_s" an index, "X^T" a T, and frac(a ; b) is a fraction.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

TEXT = Path(__file__).with_name("annotated.txt")
GRADES = ("stated", "secondary", "inferred", "chosen")


@dataclass
class Note:
    line: str
    text: str = ""


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
    """Return the sections of a text in this form. Raise ValueError for a line that has no place."""
    sections: list[Section] = []
    block = None
    owner = None  # what the paragraphs belong to
    for line in text.splitlines():
        if match := re.fullmatch(r"# ([\w-]+): (.*)", line):
            owner = Section(*match.groups())
            sections.append(owner)
            block = None
        elif match := re.fullmatch(r"## ([\w.]+) #([\w-]+) (.*)", line):
            owner = block = Block(*match.groups())
            sections[-1].blocks.append(block)
        elif match := re.fullmatch(r"\$\$ (.*)", line):
            block.equations.append(match[1])
        elif match := re.fullmatch(r"\[(\w+)\] ?(.*)", line):
            kind, rest = match.groups()
            if kind in GRADES:
                block.evidence.append((kind, rest))
            elif kind == "test":
                block.test = rest
            elif kind == "sample":
                owner = block.sample = Note("")
            else:
                raise ValueError(f"{line}: not one of {', '.join(GRADES)}, test, sample")
        elif match := re.fullmatch(r"\| (.*)", line):
            owner = Note(match[1])
            block.notes.append(owner)
        elif match := re.fullmatch(r"- (.*)", line):
            sections[-1].items.append(match[1])
        else:
            owner.text += line + "\n"
    return sections


def sections() -> list[Section]:
    """Return the sections of the page."""
    return read(TEXT.read_text(encoding="utf-8"))
