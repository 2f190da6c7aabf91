"""When does routing pay? OrchMoE against a LoRA of the same total size, on the bundled data.

The map varies one thing at a time around a centre: the total rank, the number of steps, and the
number of training tasks. Each point has four rows. LoRA and OrchMoE are tuned there on dev, with
the same number of trials. The floor is OrchMoE without a router, w = 1/K. The ceiling is OrchMoE
that is given the real task, w = one-hot. Both take the rates of OrchMoE.

    python -m experiments.map --stage calm       # how much do two runs of the same settings differ?
    python -m experiments.map --stage router     # which router moves, and does that help?
    python -m experiments.map --stage map        # the map itself: hours on two cores
    python -m experiments.map                    # the tables and the figure of the finished cells

Stages go on after an interruption. Without --results the cells are those of this repository.
Test: pytest tests/experiments/test_map.py
"""

from dataclasses import dataclass
from typing import Literal

import runtime
from experiments.study import (
    FIXED,
    Cell,
    Row,
    Study,
    pick_device,
    read_study,
)

RESULTS = runtime.ROOT / "experiments/results/map"
LIKE = {"like": "orchmoe"}
EQUAL = {"lora": Row({"method": "lora"}), "orchmoe": Row()}
ROWS = EQUAL | {
    "floor": Row({"router": "none"}, **LIKE),
    "ceiling": Row({"router": "none"}, router="task", **LIKE),
}

# Two rows at several rates and numbers of steps. What counts is the sd over seeds.
CALM = {
    "r0.003": {"lr_skills": 3e-3},
    "r0.01": {"lr_skills": 1e-2},
    "r0.03": {"lr_skills": 3e-2},
    "r0.003-1800": {"lr_skills": 3e-3, "steps": 1800, "eval_every": 900},
}
# OrchMoE with other routers. The first one stays at its start.
ROUTERS = {
    "rate 1e-6": Row({"lr_router": 1e-6}, **LIKE),
    "rate 2e-4": Row({"lr_router": 2e-4}, **LIKE),
    "rate 1e-3": Row({"lr_router": 1e-3}, **LIKE),
    "rate 5e-3": Row({"lr_router": 5e-3}, **LIKE),
    "K 16": Row({"tasks": 16}, **LIKE),
    "K 32": Row({"tasks": 32}, **LIKE),
    "K 64": Row({"tasks": 64}, **LIKE),
    "normal start": Row({"router_init": "normal"}, **LIKE),
    "sharper start": Row(router="sharp", **LIKE),
    "flatter start": Row(router="flat", **LIKE),
}

TASKS = 28  # training tasks of the bundled data
CENTRE = {"skills": 4, "rank": 1, "steps": 600, "tasks": TASKS}
# Each axis of the map: tag of a point -> what it changes. `tasks` is the number of training tasks.
AXES = {
    "total rank": {
        "2": {"skills": 2},
        "4": {},
        "8": {"rank": 2},
        "16": {"rank": 4},
        "32": {"rank": 8},
    },
    "steps": {"300": {"steps": 300}, "600": {}, "1800": {"steps": 1800}},
    "training tasks": {"7": {"tasks": 7}, "14": {"tasks": 14}, "28": {}},
}

DEFAULTS = {
    "out": "results/map",
    "results": str(RESULTS),
    "seeds": 5,
    "trials": 5,
    "steps": 600,
    "eval_every": 300,
    "eval_instances": 560,
    "rank": 1,
    "lr_skills": 1e-2,
    "lr_router": 1e-3,
}


@dataclass(frozen=True)
class MapConfig:
    """Map: which cells are made."""

    stage: Literal["calm", "router", "map", "table"] = "table"  # what is made


def stage_cells(stage: str, study: Study) -> list[Cell]:
    """Return the cells of the stages before the map. They are not tuned."""
    seeds = range(min(3, study.config.seeds))
    if stage == "calm":
        return study.cells("calm", EQUAL, CALM, seeds, "losses")
    return study.cells("router", ROUTERS, {"": {}}, seeds, "losses")


def main() -> None:
    fixed = (*FIXED, "data", "splits", "max_tasks", "tasks", "skills", "alpha", "router")
    _, config, study_config, settings = read_study(__doc__, MapConfig, DEFAULTS, fixed)
    if config.stage != "table":
        study = Study(settings, pick_device(study_config, settings), study_config, EQUAL)
        study.run(stage_cells(config.stage, study))


if __name__ == "__main__":
    runtime.run_program(main)
