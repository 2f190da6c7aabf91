"""docs/options.md against the programs' own parsers, and the number of options. Print the page:
python tests/test_options.py > docs/options.md"""

import argparse
import importlib
import sys
from unittest import mock

from conftest import ROOT

import runtime

PROGRAMS = ("train", "eval", "export", "experiments.plot")


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


def test_train_has_few_options():
    assert len([row for row in rows("train") if row.startswith("| `--")]) <= 48


if __name__ == "__main__":
    print(page(), end="")
