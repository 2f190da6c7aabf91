"""docs/options.md equals the help texts of the programs, and commands in the pages are accepted.

Print the page: python tests/repo/test_options.py > docs/options.md
"""

import argparse
import contextlib
import importlib
import re
import shlex
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # pytest does it by itself

import runtime  # noqa: E402

PROGRAMS = ("train", "eval", "export", "experiments.plot")
STUDIES = tuple(
    f"experiments.{name}"
    for name in ("bench", "compare", "curves", "decision", "fewshot", "map", "pretrain")
)
COMMAND = re.compile(
    r"^ *(?:torchrun .*? -- |python (?:-m )?)([\w.]+?)(?:\.py)?((?: .*)?)$", re.MULTILINE
)
HEAD = """# Options

The flags of the programs, as `--help` prints them. With `--run` or `--start`, the settings of data
and prompt are those of the run unless a flag gives them. With `--resume`, all settings are those of
the run; only the paths that it already has may change.
"""


def parser_of(program):
    """Return the parser that the program makes for itself."""
    with (
        mock.patch.object(runtime.Parser, "parse_args", autospec=True) as parse,
        mock.patch.object(sys, "argv", [f"{program}.py"]),
        contextlib.suppress(KeyboardInterrupt),
    ):
        parse.side_effect = KeyboardInterrupt
        importlib.import_module(program).main()
    return parse.call_args.args[0]


def rows(program):
    """Return the lines of the table of a program: a title for each group, a line for each flag."""
    lines = []
    for group in parser_of(program)._action_groups:
        actions = []
        for action in group._group_actions:
            if action.help != argparse.SUPPRESS and action.dest != "help":
                actions.append(action)
        if actions and group.title not in ("options", "positional arguments"):
            lines.append(f"| **{group.title}** | |")
        for action in actions:
            flags = ", ".join(f"`{flag}`" for flag in action.option_strings)
            text = action.help.replace("%%", "%")
            if action.choices:
                text = f"{', '.join(action.choices)}: {text}"
            lines.append(f"| {flags} | {text} |")
    return lines


def page():
    lines = [HEAD]
    for program in PROGRAMS:
        title = program if "." in program else f"{program}.py"  # python -m runs a module
        lines += [f"## {title}", "", "| flag | what it does |", "|---|---|", *rows(program), ""]
    return "\n".join(lines)


def test_page_of_options_equals_the_help_texts():
    assert (ROOT / "docs/options.md").read_text(encoding="utf-8") == page()


def test_commands_of_the_pages_are_accepted():
    parsers = {program: parser_of(program) for program in PROGRAMS + STUDIES}
    count = 0
    for path in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        text = path.read_text(encoding="utf-8").replace("\\\n", "")
        for program, words in COMMAND.findall(text):
            if program in parsers:
                arguments = shlex.split(words.replace("SEED", "0"), comments=True)
                parsers[program].parse_args(arguments)  # ValueError for a wrong flag or value
                count += 1
    assert count > 15


def test_help_describes_every_flag():
    for program in PROGRAMS + STUDIES:
        parser = parser_of(program)
        assert parser.format_help().startswith("usage: ")
        for action in parser._actions:
            words, *default = action.help.split("(default:")
            assert re.search(r"\w\w", words) and len(default) <= 1, action.dest


def test_help_of_compare_has_its_own_defaults_and_hides_what_it_sets():
    found = {action.dest: action.help for action in parser_of("experiments.compare")._actions}
    assert found["steps"].endswith("(default: 200)")
    assert found["method"] == found["seed"] == found["extra_rank"] == argparse.SUPPRESS


if __name__ == "__main__":
    print(page(), end="")
