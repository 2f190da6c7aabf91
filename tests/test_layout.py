"""The shape of the repository: imports point down only, orchmoe.py stands alone, nothing else is imported at
run time."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEVEL = {
    "orchmoe": 0,
    "kernels": 0,
    "model": 0,
    "t5": 1,
    "llama": 1,
    "metrics": 0,
    "runtime": 0,
    "checkpoint": 2,
    "tokenizer": 1,
    "data": 2,
    "experiments": 3,
    "baselines": 1,
    "eval": 3,
    "export": 4,
    "train": 4,
}
PACKAGES = {"torch", "safetensors", "numpy", "sentencepiece", "tqdm", "nltk"}
FILES = sorted(path for path in ROOT.glob("*.py"))


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_point_down(path):
    below = {name for name, level in LEVEL.items() if level < LEVEL[path.stem]}
    assert imported(path) & LEVEL.keys() <= below


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_other_package_is_imported(path):
    optional = {"tokenizers"} if path.stem == "tokenizer" else set()
    assert imported(path) - LEVEL.keys() - sys.stdlib_module_names <= PACKAGES | optional


def test_the_house_stays_small():
    assert len(FILES) <= 14
    lines = {path.stem: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert max(lines.values()) <= 558
    behind, todo = set(), {"train"}
    while todo:
        behind |= (new := {todo.pop()})
        todo |= imported(ROOT / f"{min(new)}.py") & lines.keys() - behind
    assert "llama" in behind and sum(lines[name] for name in behind) <= 3893


@pytest.mark.parametrize("name", ["train", "eval"])
def test_a_function_of_the_programs_fits_a_screen(name):
    functions = [node for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")))
                 if isinstance(node, ast.FunctionDef)]  # fmt: skip
    assert len(functions) > 10
    assert not [node.name for node in functions if node.end_lineno - node.lineno >= 40]


def test_orchmoe_works_alone_in_an_empty_folder(tmp_path):
    (tmp_path / "orchmoe.py").write_bytes((ROOT / "orchmoe.py").read_bytes())
    program = (
        "import torch, orchmoe; from torch import nn\n"
        "m = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2));"
        "a = orchmoe.attach(m, orchmoe.OrchMoEConfig(targets=('0', '2'))); x = torch.randn(3, 5, 4)\n"
        "with a.routed(x): m(x).sum().backward()\n"
        "print(sorted(k for k in __import__('sys').modules if k in ('transformers', 'model', 'kernels')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout == "[]\n", done.stderr


def test_no_file_is_wider_than_a_page():
    wide = [
        f"{path.name}:{i}"
        for path in ROOT.rglob("*.py")
        for i, line in enumerate(open(path, encoding="utf-8"), 1)
        if len(line) > 111 and ".venv" not in path.parts
    ]
    assert not wide


FOREIGN = {"--help", "--local-dir", "--depth", "--prediction", "--reference", "--hypothesis-profile",
           "evaluation.py",
           "--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--master-port", "--outtype",
           "convert_lora_to_gguf.py", "convert_hf_to_gguf.py", "--outfile", "--lora",
           "--lora-init-without-apply", "--enable-lora", "--max-lora-rank", "--lora-modules"}  # fmt: skip
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/*.md")]
STUDY = [*ROOT.glob("experiments/*.py"), *ROOT.glob("*/make*")]
SOURCES = "".join(path.read_text(encoding="utf-8") for path in [*FILES, *STUDY])
METHODS = {node.name: {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
           for path in FILES for node in ast.parse(path.read_text(encoding="utf-8")).body
           if isinstance(node, ast.ClassDef)}  # fmt: skip


def anchors(page):
    """The names that a page's headings have in links."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_pages_name_what_is_there(page):
    text = page.read_text(encoding="utf-8")
    assert "@@" not in text
    for target, _, heading in re.findall(r"\]\((?!http)([^)#]*)(#?)([^)]*)\)", text):
        there = page.parent / target if target else page
        assert there.exists(), target
        assert not heading or heading in anchors(there), heading
    for name in re.findall(r"(?:`|python )(\w+\.py)\b", text):
        assert (page.parent / name).exists() or (ROOT / name).exists() or name in FOREIGN, name
    for name in re.findall(r"python -m ([a-z0-9.]+)", text):
        assert (ROOT / f"{name.replace('.', '/')}.py").exists(), name
    for owner, name in re.findall(r"`([A-Z]\w+)\.([a-z]\w+)`", text):
        assert name in METHODS.get(owner, ()), f"{owner}.{name}"
    for name in re.findall(r"`([a-z]+(?:_[a-z]+)+)`", text):
        assert re.search(rf"\b{name}\b", SOURCES), name
    flags = set(re.findall(r"--[a-z][a-z0-9-]+", text)) - FOREIGN
    for flag in flags:
        field = flag[2:].removeprefix("no-").replace("-", "_")  # of a switch there is a --no- form
        assert re.search(rf'^    {field}: |"{flag}"', SOURCES, re.MULTILINE), flag


def test_the_readme_counts_the_lines_that_there_are():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`\w+\.py`(?:, `\w+\.py`)*) \| ([\d +]+) \|", readme, re.MULTILINE)
    said = {name: int(n) for names, counts in rows
            for name, n in zip(re.findall(r"\w+(?=\.py)", names), counts.split(" + "), strict=True)}
    assert said == {path.stem: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
