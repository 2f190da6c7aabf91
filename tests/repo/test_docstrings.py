"""The examples in the docstrings of the top-level files run."""

import ast
import re
import textwrap
from unittest import mock

import data
import kernels
import orchmoe
import tasks
import tokenizer
from helpers import ROOT, random_batch, text_of


def is_python(text):
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def examples_of(path):
    """Return the indented blocks of Python in the docstring of a module."""
    docstring = ast.get_docstring(ast.parse(text_of(path))) or ""
    blocks = re.findall(r"(?<=\n\n)(?:    .*\n)+", f"{docstring}\n")
    return filter(is_python, map(textwrap.dedent, blocks))


EXAMPLES = [(path.stem, text) for path in sorted(ROOT.glob("*.py")) for text in examples_of(path)]
CODE = dict(EXAMPLES)


def test_each_example_has_a_test():
    assert [name for name, _ in EXAMPLES] == ["data", "kernels", "orchmoe"]


def test_example_of_data_gives_a_batch(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = vars(data) | vars(tasks) | {"tokenizer": tokenizer}
    exec(CODE["data"], names)
    assert names["batch"].input_ids.shape[0] == 8


def test_example_of_orchmoe_trains(small_t5):
    names = vars(orchmoe) | {"model": small_t5}
    names["ids"], names["mask"], names["labels"] = random_batch(2, 60, range(1, 13), [5] * 12)
    embedded = small_t5.embed(names["ids"]).detach()
    exec(CODE["orchmoe"], names | {"embeddings": [embedded], "masks": [names["mask"]]})
    for skills in small_t5.skill_adapters.skills.values():
        assert skills.B.any()


def test_example_of_kernels_attaches_the_fast_mix_and_compiles(small_t5):
    names = {"orchmoe": orchmoe, "kernels": kernels, "model": small_t5}
    with mock.patch.object(kernels, "compile_blocks") as compile_blocks:
        exec(CODE["kernels"], names | {"config": orchmoe.OrchMoEConfig()})
    compile_blocks.assert_called_once_with(small_t5.blocks)
    for skills in small_t5.skill_adapters.skills.values():
        assert skills.mix is kernels.mix_skills
