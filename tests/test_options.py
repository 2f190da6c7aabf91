"""docs/options.md against the programs' own parsers, and the number of options. Print the page:
python tests/test_options.py > docs/options.md"""

import argparse
import importlib
import re
import shlex
import sys
from unittest import mock

from conftest import ROOT

import runtime

PROGRAMS = ("train", "eval", "export", "experiments.plot")
STUDY = tuple(f"experiments.{name}" for name in ("bench", "compare", "fewshot", "pretrain", "report"))
COMMAND = re.compile(r"^ *(?:torchrun .*? -- |python (?:-m )?)([\w.]+?)(?:\.py)?((?: .*)?)$", re.MULTILINE)


def parser_of(program):
    """The parser that the program makes for itself."""
    made = []
    stop = mock.patch.object(runtime.Parser, "parse_args", lambda self: made.append(self) or sys.exit())
    try:
        with stop, mock.patch.object(sys, "argv", [f"{program}.py"]):
            importlib.import_module(program).main()
    except SystemExit:
        pass
    return made[0]


def rows(program):
    for group in parser_of(program)._action_groups:
        shown = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
        if shown and group.title not in ("options", "positional arguments"):
            yield f"| **{group.title}** | |"
        for action in shown:
            if action.dest != "help":
                names = ", ".join(f"`{name}`" for name in action.option_strings)
                choices = f"{', '.join(action.choices)}: " if action.choices else ""
                yield f"| {names} | {choices}{action.help.replace('%%', '%')} |"


def page():
    head = ["# Options", "", "The flags of the programs, as `--help` has them. With `--run`, `--resume` or "
            "`--start` settings of data and prompt", "that no flag names are the run's.", ""]
    for program in PROGRAMS:
        title = program if "." in program else f"{program}.py"  # a module is run by python -m
        head += [f"## {title}", "", "| flag | what it does |", "|---|---|", *rows(program), ""]
    return "\n".join(head)


def test_the_page_of_options_is_what_the_programs_take():
    assert (ROOT / "docs/options.md").read_text(encoding="utf-8") == page()


def test_the_commands_of_the_pages_are_taken_as_printed():
    parsers, count = {program: parser_of(program) for program in PROGRAMS + STUDY}, 0
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        for program, words in COMMAND.findall(page.read_text(encoding="utf-8").replace("\\\n", "")):
            if program in parsers:  # ValueError for a flag or a value that it does not take
                parsers[program].parse_args(shlex.split(words.replace("SEED", "0"), comments=True))
                count += 1
    assert count > 15


def test_train_has_few_options():
    assert len([row for row in rows("train") if row.startswith("| `--")]) <= 48


if __name__ == "__main__":
    print(page(), end="")
