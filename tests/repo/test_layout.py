"""The shape of the project: imports point down, code is small and plain, pages are correct."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path

import pytest

from helpers import ROOT

FILES = sorted(ROOT.glob("*.py"))
TESTS = sorted(ROOT.glob("tests/**/*.py"))

# A file imports only files of lower levels.
LEVEL = {
    "orchmoe": 0,
    "kernels": 0,
    "model": 0,
    "metrics": 0,
    "runtime": 0,
    "baselines": 1,
    "t5": 1,
    "llama": 1,
    "tokenizer": 1,
    "checkpoint": 2,
    "data": 2,
    "run_folder": 3,
    "eval": 4,
    "export": 5,
    "train": 6,
    "experiments": 7,
    "integrations": 7,
}
PACKAGES = {"torch", "safetensors", "numpy", "sentencepiece", "tqdm", "nltk"}
OPTIONAL = {"tokenizer": {"tokenizers"}, "export": {"transformers", "peft"}}  # inside functions


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> set[str]:
    """Return the first part of each name that a file imports."""
    names = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


# ----------------------------------------------------------------------------------------- imports


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_point_down(path):
    below = {name for name, level in LEVEL.items() if level < LEVEL[path.stem]}
    assert imported(path) & LEVEL.keys() <= below


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_only_the_listed_packages_are_imported(path):
    allowed = PACKAGES | OPTIONAL.get(path.stem, set())
    assert imported(path) - LEVEL.keys() - sys.stdlib_module_names <= allowed


def test_optional_packages_are_not_imported_at_the_top():
    for name, packages in OPTIONAL.items():
        for node in parse(ROOT / f"{name}.py").body:
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & packages
            elif isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] not in packages


def test_no_test_module_imports_another():
    """They share helpers.py, and the fixtures of conftest.py."""
    modules = [path.stem for path in TESTS if path.stem != "helpers"]
    assert len(modules) == len(set(modules))  # pytest imports them by their name alone
    for path in TESTS:
        assert not imported(path) & set(modules), path.name


def test_orchmoe_works_alone_in_an_empty_folder(tmp_path):
    (tmp_path / "orchmoe.py").write_bytes((ROOT / "orchmoe.py").read_bytes())
    program = """
import sys
import torch
from torch import nn
import orchmoe

model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
adapters = orchmoe.attach(model, orchmoe.OrchMoEConfig(targets=("0", "2")))
x = torch.randn(3, 5, 4)
with adapters.routed(x):
    model(x).sum().backward()
print([name for name in ("transformers", "model", "kernels") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


# ---------------------------------------------------------------------------------- size and style

# Tokens count code only, so that comments, docstrings and white space are free.
LAYOUT_TOKENS = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
KINDS = {
    "statements": ast.stmt,
    "walrus": ast.NamedExpr,
    "conditional": ast.IfExp,
    "comprehension": (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp),
}
DOCUMENTED = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def measure(source: str) -> Counter:
    """Return the number of tokens of code, and of each of KINDS."""
    counts = Counter()
    docstring_lines = set()
    for node in ast.walk(ast.parse(source)):
        for name, kind in KINDS.items():
            counts[name] += isinstance(node, kind)
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            docstring_lines |= set(range(docstring.lineno, docstring.end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_code = token.type not in LAYOUT_TOKENS and token.start[0] not in docstring_lines
        counts["tokens"] += is_code
    return counts


def test_measure_counts_code_alone():
    source = '"""Three\n\nlines."""\n\n# A comment.\nx = [y for y in (1, 2) if (z := y)]  # more\n'
    expected = {"statements": 2, "walrus": 1, "conditional": 0, "comprehension": 1, "tokens": 19}
    assert measure(source) == expected


def behind(name: str) -> set[str]:
    """Return the names of the top-level files that `import name` reads."""
    found = set()
    waiting = {name}
    while waiting:
        name = waiting.pop()
        found.add(name)
        names = imported(ROOT / f"{name}.py") & {path.stem for path in FILES}
        waiting |= names - found
    return found


def test_files_behind_train_stay_small_and_plain():
    names = behind("train")
    assert {"llama", "orchmoe", "run_folder"} <= names
    total = Counter()
    for name in names:
        total += measure((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    assert total["tokens"] <= 38_200
    thousands = total["statements"] / 1000
    assert total["walrus"] <= 3 * thousands
    assert total["conditional"] <= 30 * thousands
    assert total["comprehension"] <= 45 * thousands


def test_top_level_has_few_files_and_the_formatter_lays_them_out():
    assert len(FILES) <= 15
    for path in FILES:
        assert not re.search(r"fmt: *(skip|off)", path.read_text(encoding="utf-8")), path.name


# ------------------------------------------------------------------------------------------- pages

# Flags, files and settings of other projects that the pages name.
FOREIGN = set(
    """
    --help --local-dir --depth --prediction --reference --hypothesis-profile evaluation.py
    --nproc-per-node --nnodes --node-rank --master-addr --master-port --outtype --outfile --lora
    convert_lora_to_gguf.py convert_hf_to_gguf.py --lora-init-without-apply --enable-lora
    --max-lora-rank --lora-modules load_best_model_at_end
    """.split()
)
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/*.md")]
CODE = [*FILES]
for pattern in ("experiments/*.py", "integrations/*.py", "*/make*"):
    CODE += ROOT.glob(pattern)
SOURCES = "".join(path.read_text(encoding="utf-8") for path in CODE)


def methods_of_classes() -> dict[str, set[str]]:
    """Return {class: its methods} of the top-level files."""
    methods = {}
    for path in FILES:
        for node in parse(path).body:
            if isinstance(node, ast.ClassDef):
                functions = [part for part in node.body if isinstance(part, ast.FunctionDef)]
                methods[node.name] = {function.name for function in functions}
    return methods


METHODS = methods_of_classes()


def anchors(page: Path) -> list[str]:
    """Return the names by which links reach the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_pages_name_what_exists(page):
    text = page.read_text(encoding="utf-8")
    assert "@@" not in text
    for target, _, heading in re.findall(r"\]\((?!http)([^)#]*)(#?)([^)]*)\)", text):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        assert not heading or heading in anchors(linked), heading
    for name in re.findall(r"(?:`|python )(\w+\.py)\b", text):
        exists = (page.parent / name).exists() or (ROOT / name).exists()
        assert exists or name in FOREIGN, name
    for name in re.findall(r"python -m ([a-z0-9.]+)", text):
        assert (ROOT / f"{name.replace('.', '/')}.py").exists(), name
    for owner, name in re.findall(r"`([A-Z]\w+)\.([a-z]\w+)`", text):
        assert name in METHODS.get(owner, ()), f"{owner}.{name}"
    for name in re.findall(r"`([a-z]+(?:_[a-z]+)+)`", text):
        assert re.search(rf"\b{name}\b", SOURCES) or name in FOREIGN, name
    for flag in set(re.findall(r"--[a-z][a-z0-9-]+", text)) - FOREIGN:
        field = flag[2:].removeprefix("no-").replace("-", "_")  # --no-x switches off the field x
        assert re.search(rf'^    {field}: |"{flag}"', SOURCES, re.MULTILINE), flag
