"""The shape of the project: imports point down, code is small, pages are correct."""

import ast
import importlib
import io
import re
import sys
import tokenize
from collections.abc import Iterable
from pathlib import Path

import pytest

from helpers import ROOT, text_of

FILES = sorted(ROOT.glob("*.py"))
SUPPORT = sorted(ROOT.glob("support/*.py"))
TESTS = sorted(ROOT.glob("tests/**/*.py"))

# A file imports only files of lower levels.
LEVEL = {
    "orchmoe": 0,
    "kernels": 0,
    "model": 1,
    "metrics": 0,
    "support": 0,
    "variants": 1,
    "baselines": 2,
    "t5": 2,
    "llama": 2,
    "tokenizer": 1,
    "checkpoint": 3,
    "tasks": 2,
    "data": 3,
    "run_folder": 4,
    "eval": 5,
    "integrations": 5,
    "train": 6,
    "experiments": 7,
    "docs": 8,
}
PACKAGES = {"torch", "safetensors", "numpy", "sentencepiece", "tqdm", "nltk"}
OPTIONAL = {"tokenizer": {"tokenizers"}}  # inside functions


def parse(path: Path) -> ast.Module:
    return ast.parse(text_of(path))


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    """Return the first part of each name that these nodes import."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


# ----------------------------------------------------------------------------------------- imports


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_point_down(path):
    """A file imports lower files, the standard library and the listed packages."""
    tree = parse(path)
    below = {name for name, level in LEVEL.items() if level < LEVEL[path.stem]}
    allowed = below | sys.stdlib_module_names | PACKAGES
    assert imported(tree.body) <= allowed
    assert imported(ast.walk(tree)) <= allowed | OPTIONAL.get(path.stem, set())


@pytest.mark.parametrize("folder", ["integrations", "experiments"])
def test_imports_of_a_folder_point_down(folder):
    above = {name for name, level in LEVEL.items() if level > LEVEL[folder]}
    for path in ROOT.glob(f"{folder}/**/*.py"):
        assert not imported(ast.walk(parse(path))) & above, path


@pytest.mark.parametrize("path", SUPPORT, ids=lambda path: path.stem)
def test_support_imports_nothing_of_the_project(path):
    allowed = {"support"} | sys.stdlib_module_names | PACKAGES
    assert imported(ast.walk(parse(path))) <= allowed


def test_orchmoe_needs_only_torch():
    tree = parse(ROOT / "orchmoe.py")
    assert imported(ast.walk(tree)) - sys.stdlib_module_names == {"torch"}


# -------------------------------------------------------------------------------------------- size

# Tokens count code only, so that comments, docstrings and white space are free.
LAYOUT_TOKENS = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def count_tokens(source: str) -> int:
    count = 0
    docstring_lines = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstring_lines.update(range(node.lineno, node.end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_code = token.type not in LAYOUT_TOKENS and token.start[0] not in docstring_lines
        count += is_code
    return count


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="there an f-string is several tokens")
def test_files_behind_train_stay_small():
    behind = {"train"}
    total = 0
    for path in sorted(FILES, key=lambda path: LEVEL[path.stem], reverse=True):
        if path.stem in behind:
            behind |= imported(ast.walk(parse(path)))
            total += count_tokens(text_of(path))
    for path in SUPPORT:
        total += count_tokens(text_of(path))
    assert {"llama", "orchmoe", "run_folder"} <= behind
    assert total <= 33_400


def test_top_level_has_few_files():
    assert len(FILES) <= 15


# ------------------------------------------------------------------------------------------- pages

# Flags, files and settings of other projects, and of readers, that the pages name.
FOREIGN = set(
    """
    --local-dir --depth evaluation.py --nproc-per-node --nnodes --node-rank --master-addr
    --master-port --max-lora-rank --shutdown-timeout --outtype --outfile --lora
    convert_lora_to_gguf.py convert_hf_to_gguf.py make_rows.py save_pretrained
    """.split()
)
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/*.md")]
RESULTS = list(ROOT.glob("experiments/results/**/*.md"))
CODE = [*FILES, *SUPPORT]
for pattern in ("experiments/**/*.py", "integrations/*.py", "*/make*"):
    CODE += ROOT.glob(pattern)
SOURCES = "".join(text_of(path) for path in CODE)
TEST_SOURCES = "".join(text_of(path) for path in TESTS)


NAMES = {}
for path in FILES:
    NAMES |= vars(importlib.import_module(path.stem))


def anchors(page: Path) -> list[str]:
    """Return the names by which links reach the headings of a page, or the lines of a program."""
    if page.suffix == ".py":
        return [f"L{n + 1}" for n in range(len(text_of(page).splitlines()))]
    if page.suffix == ".html":
        return re.findall(r' id="([^"]+)"', text_of(page))
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    if page.name == "annotated.md":
        return re.findall(r"\{#([\w-]+)\}$", "\n".join(headings), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES + RESULTS, ids=name_of)
def test_links_lead_to_what_exists(page):
    text = text_of(page)
    for target, _, heading in re.findall(r"\]\((?!http)([^)#]*)(#?)([^)]*)\)", text):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        assert not heading or heading in anchors(linked), heading


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_name_what_exists(page):
    text = text_of(page)
    for name in re.findall(r"(?:`|python )(\w+\.py)\b", text):
        exists = (page.parent / name).exists() or (ROOT / name).exists()
        assert exists or name in FOREIGN, name
    for name in re.findall(r"python -m ([a-z0-9_.]+)", text):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), name
    for owner, name in re.findall(r"`([A-Z]\w+)\.([a-z]\w+)`", text):
        assert hasattr(NAMES[owner], name), f"{owner}.{name}"
    for name in re.findall(r"`([a-z]+(?:_[A-Za-z]+)+)`", text):
        sources = TEST_SOURCES if name.startswith("test_") else SOURCES
        assert re.search(rf"\b{name}\b", sources) or name in FOREIGN, name
    for flag in set(re.findall(r"--[a-z][a-z0-9-]+", text)) - FOREIGN:
        field = flag[2:].removeprefix("no-").replace("-", "_")  # --no-x switches off the field x
        assert re.search(rf'^    {field}: |"{flag}"', SOURCES, re.MULTILINE), flag
