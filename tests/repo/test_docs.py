"""What people read: equations, tables of memory and of settings, rows to try."""

import re
from pathlib import Path

import torch

import data
import t5
import train
from baselines import attach_method, count_parameters
from experiments.computed import t5_config
from helpers import ROOT, snippets, text_of
from orchmoe import OrchMoEConfig
from support.program import flag
from tasks import DataConfig
from tokenizer import load as load_tokenizer

# -------------------------------------------------------------------------------------- equations

# The beginnings of the lines to which README links, in the order of its table.
EQUATIONS = (
    "X = F.rms_norm(",
    "X_hat = P @ X + X",
    "return masked_mean(X_hat, mask)",
    "x_hat = (x_hat - self.mu) / self.sd",
    "logits = F.linear(x_hat, self.W_task",
    "return F.logsigmoid(Z).softmax(",
    "c = w.to(Zhat).reshape(-1, K) @ Zhat",
    "return y + scale * torch.einsum(",
)


def test_equations_of_the_readme_link_to_their_lines():
    """If this fails, give the links the numbers that are expected."""
    expected = []
    lines = text_of("orchmoe.py").splitlines()
    for start in EQUATIONS:
        numbers = [n for n, line in enumerate(lines, 1) if line.strip().startswith(start)]
        expected.append(numbers[0])
    readme = text_of("README.md")
    assert [int(number) for number in re.findall(r"\(orchmoe\.py#L(\d+)\)", readme)] == expected


def lines_of(name):
    """Return the number of lines of a file, or of all files of a folder."""
    path = ROOT / name
    paths = path.glob("*.py") if path.is_dir() else [path]
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def test_the_readme_says_how_long_each_file_is():
    """If this fails, give the table the numbers that are expected."""
    readme = text_of("README.md")
    rows = re.findall(r"^\| (\[.*?\)) \| ([\d,]+) \|", readme, re.MULTILINE)
    assert len(rows) == 8
    listed = 0
    for files, number in rows:
        count = sum(lines_of(name) for name in re.findall(r"\]\((.*?)\)", files))
        assert number == f"{count:,}", files
        listed += count
    # The promise speaks of what train.py needs, so not of the example.
    promised = f"{listed - lines_of('examples/minimal.py'):,} lines of plain PyTorch"
    assert promised in " ".join(readme.split())


# ---------------------------------------------------------------------------------- table of memory


SIZES = {
    "t5-small": t5_config(512, 1024, 8, 6),
    "t5-base": t5_config(768, 2048, 12, 12),
    "t5-large": t5_config(1024, 2816, 24, 16),
    "t5-xl": t5_config(2048, 5120, 24, 32),
    "t5-xxl": t5_config(4096, 10240, 24, 64),
}


def format_bytes(number):
    """Return a number of bytes with three digits: 1770000 gives "1.77 MB"."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while number >= 1000:
        number /= 1000
        units.pop(0)
    return f"{number:.3g} {units[0]}"


def size_of(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_page_on_data_has_the_computed_memory():
    page = text_of("docs/data.md")
    for name, config in SIZES.items():
        with torch.device("meta"):
            base = t5.T5(config)
            size = size_of(base)
            blocks = [size_of(block) for block in base.blocks]
            trained = []
            for options in ({}, {"targets": ("all",), "skills": 8, "rank": 4}):
                adapters = attach_method("orchmoe", base, OrchMoEConfig(**options))
                trained.append(sum(count_parameters(adapters).values()))
                adapters.detach()

        outside = size - sum(blocks)  # embedding and head
        memory = [2 * size, 4 * size]
        memory += [16 * count for count in trained]
        memory += [2 * size / 8, 2 * outside, 2 * max(blocks)]  # --shard over 8 processes
        cells = [f"{number:,}" for number in (size, *trained)]
        cells += [format_bytes(number) for number in memory]
        assert f"| {name} | {' | '.join(cells)} |" in page


# ------------------------------------------------------------------------------------ settings


def test_pages_have_the_settings_of_the_programs():
    page = text_of("docs/use.md")
    default = train.Settings()
    (cells,) = re.findall(r"^\| the bundled T5, 2.7 M \| .*? \| (.*)$", page, re.MULTILINE)
    sizes, *rates, length, _ = cells.split(" | ")
    assert sizes == f"{default.abstract_tasks}, {default.skills}, {default.rank}"
    expected = [default.lr_skills, default.lr_router]
    expected += [default.lr_allocation, default.lr_token_router]
    assert [float(rate) for rate in rates] == expected
    assert length == f"{default.batch_size}, {default.steps}"

    page = text_of("docs/data.md")
    for name in ("num_pos", "bare_share", "max_source_length", "max_target_length", "eval_every"):
        assert re.search(rf"`{flag(name)}` {getattr(default, name)}\b", page)
    assert f"`--train-instances` {default.train_limit})" in page


# -------------------------------------------------------------------------------------- rows to try


def test_rows_of_the_page_have_the_sets_that_it_shows():
    page = text_of("docs/data.md")
    [snippet] = snippets(page, "rows.jsonl")
    exec(snippet, {})
    lines = Path("rows.jsonl").read_text().splitlines()
    assert all(lines[i] in page for i in (0, 1, 200))
    sets = data.load_sets(DataConfig(data="rows.jsonl"), load_tokenizer(ROOT / "tiny"))
    counts = ", ".join(f"{len(sets[name])} {name}" for name in ("train", "dev", "seen"))
    assert f"rows of data: {counts}\n" in page
