"""Show where OrchMoE's lead comes from, and what a LoRA does. The plan did not ask this.

python experiments/results/claim/beyond_plan.py [natural-instructions]

It prints the tables and the lists of README.md, with the standard library alone. The table about
the kinds of answers needs the folder of Super-NaturalInstructions.
"""

import itertools
import json
import statistics
import sys
from pathlib import Path

from recompute import COMPARED, FOLDER, cells, differences_from, interval, means, p_value

HARD = 1.0  # nats; a task whose loss is above it, in the mean of the four methods, is hard
LABELS = 12  # so many different answers, or fewer, are labels
SHORT = 3  # words; other answers with such a mean length, or a lower one, are short
INSTANCES = 100  # so many instances of a task decide which kind its answers are


# ------------------------------------------------------------------------------------- the cells


def losses(stage, row):
    """Return {(draw, task): loss}."""
    found = {}
    for draw, cell in enumerate(cells[stage, row]):
        for task, scores in cell["seen"]["tasks"].items():
            found[draw, task] = scores["loss"]
    return found


def differences_of_tasks(stage, other):
    """Return OrchMoE's loss minus that of another method, {(draw, task): difference}."""
    orchmoe, reference = losses(stage, "orchmoe"), losses(stage, other)
    return {key: orchmoe[key] - reference[key] for key in orchmoe}


def losses_of_lora():
    """Return the seen loss of each draw of the LoRA that a joint search of rate and alpha chose.

    It has 249,984 weights, and was made for an earlier study of these draws, with other seeds.
    """
    found = {}
    path = FOLDER.parent / "replication/cells.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines():
        cell = json.loads(line)
        if cell["name"].startswith("tuned/cells/") and cell["settings"]["row"] == "tuned lora":
            tasks = cell["seen"]["tasks"].values()
            found[cell["settings"]["seed"]] = statistics.fmean(task["loss"] for task in tasks)
    return [found[seed] for seed in sorted(found)]


def of_draws(differences, mean=statistics.fmean):
    """Return the mean of the differences of each draw."""
    draws = {}
    for (draw, _), value in differences.items():
        draws.setdefault(draw, []).append(value)
    return [mean(values) for values in draws.values()]


def without(differences, gains, harms=0):
    """Return the differences without so many of the lowest, and of the highest."""
    ordered = sorted(differences, key=differences.get)
    return {key: differences[key] for key in ordered[gains : len(ordered) - harms]}


def gains_that_make_the_lead(differences):
    """Return the smallest number of largest gains without which the mean is not below zero."""
    count = 0
    while statistics.fmean(without(differences, count).values()) < 0:
        count += 1
    return count


# ------------------------------------------------------------------------------------------ text


def written(values, digits=3):
    """Return the mean and its 95 % interval over the draws."""
    mean, low, high = (f"{number:+.{digits}f}" for number in interval(values))
    return f"{mean} [{low}, {high}]"


def in_digits(p):
    """Return a p value as the tables show it."""
    return f"{p:.4f}" if p >= 1e-4 else "<0.0001"


def show_line(*parts):
    print(f"| {' | '.join(str(part) for part in parts)} |")


def show_head(*names):
    show_line(*names)
    print(f"|---|{'---:|' * (len(names) - 1)}")


# -------------------------------------------------------------------------------------- the tables


def show_draws(stages):
    """Show how much single draws count."""
    show_head(
        "OrchMoE minus",
        "OrchMoE is lower on",
        "median task of a draw",
        "without the draw of its largest lead, and p",
        "largest p without one draw",
    )
    for stage, other in stages:
        differences = differences_of_tasks(stage, other)
        lower = sum(value < 0 for value in differences.values())
        values = of_draws(differences)
        without_largest = sorted(values)[1:]  # OrchMoE's largest lead is the lowest difference
        largest_p = max(p_value(values[:draw] + values[draw + 1 :]) for draw in range(len(values)))
        show_line(
            f"{stage}, {other}",
            f"{lower} of {len(differences)}",
            written(of_draws(differences, statistics.median)),
            f"{statistics.fmean(without_largest):+.3f}, p {in_digits(p_value(without_largest))}",
            in_digits(largest_p),
        )


def show_tasks(stages):
    """Show how much single tasks count, and those with a high loss."""
    show_head(
        "OrchMoE minus",
        "without the ten largest gains and the ten largest harms",
        "without forty of each",
        "no lead is left without so many of the largest gains",
        "hard tasks; their share of the difference, and of the loss",
        "difference on the other tasks",
    )
    for stage, other in stages:
        differences = differences_of_tasks(stage, other)
        rows = [losses(stage, row) for row in ("orchmoe", *COMPARED)]
        mean_losses = {key: statistics.fmean(row[key] for row in rows) for key in differences}
        easy = {key: value for key, value in differences.items() if mean_losses[key] <= HARD}
        easy_losses = [mean_losses[key] for key in easy]
        share = 1 - sum(easy.values()) / sum(differences.values())
        share_of_loss = 1 - sum(easy_losses) / sum(mean_losses.values())
        show_line(
            f"{stage}, {other}",
            written(of_draws(without(differences, 10, 10))),
            written(of_draws(without(differences, 40, 40)), digits=4),
            gains_that_make_the_lead(differences),
            f"{len(differences) - len(easy)}; {100 * share:.0f} %, {100 * share_of_loss:.0f} %",
            written(of_draws(easy)),
        )


def show_lora():
    """Show each method minus the LoRA of the joint search, with 60 examples of each task."""
    show_head("minus the LoRA of the joint search", "loss", "below zero", "p")
    lora = losses_of_lora()
    for row in ("orchmoe", *COMPARED):
        values = [a - b for a, b in zip(means("first", row), lora, strict=True)]
        below = sum(value < 0 for value in values)
        show_line(row, written(values), f"{below} of {len(values)}", in_digits(p_value(values)))


def show_correlations():
    """Show how the differences from two methods go together over the draws."""
    for stage in ("first", "second"):
        for one, other in itertools.combinations(COMPARED, 2):
            values = [differences_from(stage, row) for row in (one, other)]
            print(f"- {stage}, {one} and {other}: {statistics.correlation(*values):+.2f}")


def show_few_examples():
    """Show what 15 examples of each task do in place of 60."""
    differences = differences_of_tasks("second", "moe-lora")
    rest = without(differences, 2)
    left_out = sorted(task for draw, task in differences if (draw, task) not in rest)
    values = of_draws(rest)
    print(f"- second, moe-lora, without {left_out[0]}")
    print(f"  and {left_out[1]}: {written(values)}, p {in_digits(p_value(values))}")
    for row in ("orchmoe", *COMPARED):
        rise = statistics.fmean(means("second", row)) - statistics.fmean(means("first", row))
        print(f"- {row}, loss with 15 examples minus 60: {rise:+.3f}")
    matches = [means(stage, "orchmoe", "answers", "exact_match") for stage in ("first", "second")]
    change = [more - fewer for more, fewer in zip(*matches, strict=True)]
    print(f"- orchmoe, exact match with 60 examples minus 15: {written(change, digits=1)}")


def kind_of_answers(path, mean):
    """Return "labels", "short" or "longer" for the answers of a task.

    mean: what is taken of the numbers of words of its answers.
    """
    instances = json.loads(path.read_text(encoding="utf-8"))["Instances"][:INSTANCES]
    answers = [instance["output"][0] for instance in instances]
    if len(set(answers)) <= LABELS:
        return "labels"
    return "short" if mean(len(answer.split()) for answer in answers) <= SHORT else "longer"


def show_kinds(data):
    """Show OrchMoE minus each method for each kind of answers, with 60 examples of each task.

    data: the folder of Super-NaturalInstructions.
    """
    show_head("answers", "tasks", *COMPARED)
    titles = {
        ("labels", statistics.fmean): f"at most {LABELS} different answers",
        ("short", statistics.fmean): f"other answers, at most {SHORT} words in the mean",
        ("longer", statistics.fmean): "longer text",
        ("short", statistics.median): f"other answers, at most {SHORT} words in the median",
    }
    for (kind, mean), title in titles.items():
        keys = []
        for draw, task in losses("first", "orchmoe"):
            if kind_of_answers(Path(data, "tasks", f"{task}.json"), mean) == kind:
                keys.append((draw, task))
        parts = []
        for other in COMPARED:
            differences = differences_of_tasks("first", other)
            parts.append(written(of_draws({key: differences[key] for key in keys})))
        show_line(title, len(keys), *parts)


def main():
    stages = list(itertools.product(("first", "second"), COMPARED))
    show_draws(stages)
    print()
    show_tasks(stages)
    print()
    show_lora()
    print()
    show_few_examples()
    print()
    show_correlations()
    if len(sys.argv) > 1:
        print()
        show_kinds(sys.argv[1])


if __name__ == "__main__":
    main()
