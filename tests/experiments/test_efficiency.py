"""How many examples a method needs: what the tables say."""

from experiments import efficiency
from helpers import ROOT, run


def test_the_tables_are_those_of_the_cells(tmp_path):
    folder = ROOT / "experiments/results/efficiency"
    for number in efficiency.EXAMPLES:
        (tmp_path / str(number)).symlink_to(folder / str(number))
    out = run("experiments/efficiency.py", "--results", tmp_path, cwd=tmp_path)
    assert (tmp_path / "tables.md").read_text() == (folder / "tables.md").read_text()
    assert "| 100 examples: orchmoe - lora | 5 | -0.051 [-0.092, -0.009] | " in out


def test_examples_needed_is_read_off_between_two_numbers():
    def needed(*losses):
        return efficiency.examples_needed(1.0, dict(zip((10, 25, 50, 100), losses, strict=True)))

    assert needed(2.0, 1.5, 0.5, 0.4) == "35"  # half way between 25 and 50 on a log scale
    assert needed(0.9, 0.8, 0.7, 0.6) == "at most 10"
    assert needed(2.0, 1.9, 1.8, 1.7) == "more than 100"
