"""Commands in the pages are accepted by the programs, and every flag has a help text."""

import argparse
import contextlib
import importlib
import re
import shlex
import sys
from unittest import mock

from helpers import ROOT, text_of
from support.program import Parser

PROGRAMS = ("train", "eval", "integrations.export")
NAMES = ("bench", "compare", "computed", "explorer", "why")
STUDIES = tuple(f"experiments.{name}" for name in NAMES)
SHORT_PROGRAMS = ("integrations.serve", "integrations.server", "experiments.smollm2")
COMMAND = re.compile(
    r"^ *(?:OMP_NUM_THREADS=1 )?(?:torchrun .*? -- |python (?:-m )?)([\w.]+?)(?:\.py)?((?: .*)?)$",
    re.MULTILINE,
)


def parser_of(program):
    """Return the parser that the program makes for itself."""
    with (
        mock.patch.object(Parser, "parse_args", autospec=True) as parse,
        mock.patch.object(sys, "argv", [f"{program}.py"]),
        contextlib.suppress(KeyboardInterrupt),
    ):
        parse.side_effect = KeyboardInterrupt
        module = importlib.import_module(program)
        if hasattr(module, "__path__"):
            module = importlib.import_module(f"{program}.__main__")
        module.main()
    return parse.call_args.args[0]


def test_commands_of_pages_and_docstrings_are_accepted():
    parsers = {program: parser_of(program) for program in PROGRAMS + STUDIES + SHORT_PROGRAMS}
    found = set()
    paths = [ROOT / "README.md", ROOT / "SECURITY.md"]
    patterns = ("docs/*.md", "*.py", "integrations/*.py", "experiments/**/*.py", "examples/*.py")
    paths += [path for pattern in patterns for path in ROOT.glob(pattern)]
    for path in paths:
        text = re.sub(r"\\+\n", "", text_of(path))  # a docstring has two backslashes
        for program, words in COMMAND.findall(text):
            if program in parsers:
                arguments = shlex.split(
                    words.partition(" > ")[0].replace("SEED", "0"), comments=True
                )
                parsers[program].parse_args(arguments)  # ValueError for a wrong flag or value
                found.add(program)
    assert found == parsers.keys()


def test_help_describes_every_flag():
    for program in PROGRAMS + STUDIES:
        parser = parser_of(program)
        assert "usage: " in parser.format_help()
        assert "Test: " not in parser.description
        for action in parser._actions:
            words, *default = action.help.split("(default:")
            assert re.search(r"\w\w", words) and len(default) <= 1, action.dest


def test_help_of_compare_has_its_own_defaults_and_hides_what_it_sets():
    found = {action.dest: action.help for action in parser_of("experiments.compare")._actions}
    assert found["out"].endswith("(default: results/compare)")
    assert found["steps"].endswith("(default: 600)")  # as in train.py
    assert found["seed"] == found["start"] == argparse.SUPPRESS
