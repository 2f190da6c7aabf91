"""Compare OrchMoE with its baselines at one total size, on the bundled data or any other.

First every method is tuned on dev over all that it trains, rates and scale, with the same number
of trials. Then each runs with several seeds: the same order of the data and the same number of
steps for all. Results are of seen and unseen instances, by which nothing is chosen.

    python -m experiments.compare                            # tuning, then all methods
    python -m experiments.compare --method FILE.py:Class     # and a method of your own
    python -m experiments.compare --ablations                # OrchMoE with one change at a time

Writes cells (see experiments/study.py) and results.md, or ablations.md, into the folder of
--results, or else --out.
Test: pytest tests/experiments/test_compare.py
"""

from dataclasses import dataclass

from baselines import METHODS, load_method
from experiments.study import (
    FIXED,
    UNTRAINED,
    Cell,
    Row,
    Study,
    changed,
    pick_device,
    read_study,
    require_choices,
)
from experiments.tables import markdown, publish
from orchmoe import OrchMoEConfig
from support import program
from support.program import UserError

# ------------------------------------------------------------------------------ what is compared

ROWS = {name: Row({"method": name}) for name in METHODS}
ADAPTED = tuple(name for name in ROWS if name != "full")
# Rows of one total size. The private skills of c-poly grow with the number of tasks.
EQUAL = {name: ROWS[name] for name in ADAPTED if name != "c-poly"}

DEFAULT_RUN = "ablations/default-s{seed}"
# Each row has one difference from the default. S R and the scale alpha / (S R) stay the same.
ABLATIONS = {
    "default": Row(),
    "w replaced by its mean": Row(w="mean", run=DEFAULT_RUN),
    "w of another sample": Row(w="other", run=DEFAULT_RUN),
    "router: token": Row({"router": "token"}),
    "router: none": Row({"router": "none"}),
    "router: random": Row(replaced_router="random"),
    "told the true task": Row(replaced_router="task"),
    "router start: normal": Row({"router_init": "normal"}),
    "attention off": Row({"router_attention": False}),
    "w without softmax": Row({"router_norm": "none"}),
    "Gumbel noise on": Row({"gumbel": True}),
    "allocation start: sd 1": Row({"allocation_std": 1.0}),
    "allocation start: sd 0.001": Row({"allocation_std": 1e-3}),
    "K = 1": Row({"abstract_tasks": 1}),
    "K = 4": Row({"abstract_tasks": 4}),
    "K = 16": Row({"abstract_tasks": 16}),
    "S = 1": Row({"skills": 1}),
    "S = 2": Row({"skills": 2}),
    "S = 8": Row({"skills": 8}),
    "factors mixed": Row({"mixing": "factors"}),
}
DEFAULTS = {
    "out": "results/compare",
    "steps": 200,
    "eval_instances": 280,
    "lr_skills": 1e-2,
    "lr_router": 2e-5,
}


@dataclass(frozen=True)
class CompareConfig:
    """Comparison: what is compared."""

    methods: tuple[str, ...] = ADAPTED  # methods to compare
    ablations: bool = False  # OrchMoE with one change at a time, instead of the methods
    rows: tuple[str, ...] = ()  # these ablations (default: all)

    def __post_init__(self) -> None:
        require_choices("--methods", self.methods, ROWS)
        require_choices("--rows", self.rows, ABLATIONS)


def ablation(name: str, adapter: OrchMoEConfig) -> Row:
    """Return a row of ABLATIONS for these settings. With another S, R follows: S R stays.

    Raise UserError if it changes nothing or is not possible.
    """
    row = ABLATIONS[name]._replace(like="orchmoe")  # its size and its tuned values
    known = vars(adapter)
    if row.settings and all(known.get(field) == value for field, value in row.settings.items()):
        raise UserError(
            f"--rows {name}: the given settings are the same already; leave out the row or the flag"
        )
    needs_w = row.w or row.replaced_router or "mixing" in row.settings
    if needs_w and adapter.router != "sample":
        raise UserError(
            f"--rows {name}: --router {adapter.router} has no w of a sample; leave one out"
        )
    if "skills" not in row.settings:
        return row
    total = adapter.skills * adapter.rank
    skills = row.settings["skills"]
    if total % skills:
        raise UserError(f"--rows {name}: S R = {total} is no multiple of {skills}; leave it out")
    alpha = adapter.rank if adapter.alpha is None else adapter.alpha
    return row._replace(settings={"skills": skills, "rank": total // skills, "alpha": alpha})


# -------------------------------------------------------------------------------------- the study


def method_cells(config: CompareConfig, study: Study) -> tuple[list[Cell], dict[str, dict]]:
    """Tune the methods. Return the cells of all methods, and the reports of the searches."""
    rows = {name: row for name, row in ROWS.items() if name in config.methods}  # orchmoe first
    rows |= {name: row for name, row in study.equal.items() if name not in ROWS}  # of --method
    reports = {}
    if study.config.tune:
        reports = study.tune(rows, study.config.trials)
    cells = study.cells("methods", rows, {"": {}}, range(study.config.seeds))
    return cells + study.cells("methods", UNTRAINED, {"": {}}, [0]), reports


def ablation_cells(config: CompareConfig, study: Study) -> tuple[list[Cell], dict[str, dict]]:
    """Do the same for the ablations, at the values tuned for OrchMoE and without extra ranks."""
    names = [name for name in ABLATIONS if name in ("default", *(config.rows or ABLATIONS))]
    for name in names:
        ablation(name, study.settings.adapter)  # raises now, and not after hours of tuning
    reports = {}
    if study.config.tune:
        reports = study.tune({"orchmoe": ROWS["orchmoe"]}, study.config.trials)
    tuned = study.cell("", "orchmoe", ROWS["orchmoe"], {}).settings
    rows = {name: ablation(name, tuned.adapter) for name in names}
    equal_rank = Study(study.settings, study.device, study.config, equal={})
    equal_rank.best = study.best
    if study.config.tune and "router: token" in rows:
        # The rate that was tuned for the sample router means nothing to this one.
        token = {"router: token": rows["router: token"]}
        trials = max(3, study.config.trials // 3)
        reports |= equal_rank.tune(token, trials, ["lr_token_router"])
    return equal_rank.cells("ablations", rows, {"": {}}, range(study.config.seeds)), reports


def compare(config: CompareConfig, study: Study) -> None:
    """Make the cells that are missing. Write the results, and print the tables."""
    make_cells = ablation_cells if config.ablations else method_cells
    cells, tuning = make_cells(config, study)
    study.run(cells)

    rows = {}
    for cell in cells:
        rows.setdefault(cell.name, []).append(cell.result())
    file = "ablations.md" if config.ablations else "results.md"
    publish(markdown(rows, tuning), study.results / file)


def main() -> None:
    fixed = [name for name in FIXED if name != "method"]
    flags, config, study_config, settings = read_study(__doc__, CompareConfig, DEFAULTS, fixed)
    useless = {"rows": "it goes with --ablations"}
    if config.ablations:
        useless = {"methods": "not with --ablations", "method": "not with --ablations"}
    if not study_config.tune:
        useless["trials"] = "not with --no-tune"
    for name, why in useless.items():
        if name in flags:
            raise UserError(f"{program.flag(name)}: {why}; leave it out")

    own = {}
    if "method" in flags:
        name = load_method(flags["method"])
        if name in ROWS:
            raise UserError(f"--method {name}: it has a row already; choose it with --methods")
        own[name] = Row({"method": name})
        settings = changed(settings, {"method": "orchmoe"})  # every row sets its own

    study = Study(settings, pick_device(study_config, settings), study_config, EQUAL | own)
    compare(config, study)


if __name__ == "__main__":
    program.run_program(main)
