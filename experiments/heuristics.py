"""Score two heuristics that need no model: they check the reader and the metric, and set a floor.

copy-demo answers with the output of the task's first positive example, copy-input with the input.
Both have published scores: 28.54 and 14.20 ROUGE-L on the 119 English test tasks of
Super-NaturalInstructions (arXiv 2204.07705).

    python -m experiments.heuristics copy-demo --data natural-instructions/

Test: pytest tests/experiments/test_heuristics.py
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import data
import eval as evaluation
import tasks
import tokenizer
from support import program
from support.program import UserError
from tasks import DataConfig

KINDS = ("copy-demo", "copy-input")


def copy_heuristic(kind: str, root: str, examples: Sequence[data.Example]) -> list[str]:
    """Return the predictions of a heuristic for examples of the task files in `root`."""
    read_task = functools.lru_cache(1)(tasks.read_task)  # examples of a task are together
    predictions = []
    for example in examples:
        path = Path(root) / "tasks" / f"{example.task}.json"
        task = read_task(path)
        if kind == "copy-input":
            predictions.append(task["instances"][example.position]["input"])
        elif task["positive"]:
            predictions.append(task["positive"][0]["output"])
        else:
            raise UserError(f"{path}: no Positive Examples to copy; use copy-input")
    return predictions


def main() -> None:
    parser = program.Parser(usage="python -m experiments.heuristics KIND [--data DIR]")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--data", default=str(program.ROOT / "sni"))
    flags = parser.parse_args()

    words = tokenizer.load(program.ROOT / "tiny")  # texts are copied, so any tokenizer will do
    config = DataConfig(data=flags.data)
    if config.is_jsonl:
        raise UserError(f"--data {flags.data}: give a folder with tasks/")
    sets = data.load_sets(config, words, only_test=True)
    examples = data.require_set(sets, "test", config)
    predictions = copy_heuristic(flags.kind, flags.data, examples)
    scores = evaluation.score(examples, predictions, "official")
    overall = ", ".join(f"{name} {value:.4f}" for name, value in scores["overall"].items())
    program.print_line(f"{len(examples)} instances of {len(scores['tasks'])} tasks: {overall}")


if __name__ == "__main__":
    program.run_program(main)
