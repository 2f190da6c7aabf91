"""Writes docs/evidence.md: what was trained on what, and the tables of the comparison and the ablations, all
from the files that the stages have left; the figures beside it. The part of an older page from the heading
"What this says" on is written by hand, and kept.

    PYTHONPATH=. python recipes/report.py OUT small|full docs"""

import shutil
import sys
from pathlib import Path

import checkpoint
import data
import plot
import runtime

BY_HAND = "## What this says"
FIGURES = {"sizes.png": "ROUGE-L against training instances of a task, with bands over seeds",
           "router.png": "Mean w of each real task, grouped by category",
           "ablations.png": "Default - row in ROUGE-L with its interval, for each ablation"}


def stage(name: str, folder: Path) -> str:
    """One row on a run of train.py."""
    run, log = runtime.read_json(folder / "config.json"), plot.records(folder)
    train, losses = run["train"], [row["dev_loss"] for row in log if "dev_loss" in row]
    ratio = run["data"]["text_ratio"] if run["data"]["text"] else 0
    text = int(train["steps"] * ratio) * train["batch_size"]
    examples = train["steps"] * train["batch_size"] - text
    tokens = f"{text * train['text_length'] / 1e6:.1f} M" if text else "-"
    speed = [row["tokens_per_s"] for row in log if "tokens_per_s" in row][-1]
    return (f"| {name} | {train['steps']:,} of {train['batch_size']} | {tokens} | {examples:,} | "
            f"{len(run['tasks'])} | {losses[0]:.3f} | {min(losses):.3f} | {speed:,} |")


def facts(out: Path) -> str:
    results = runtime.read_json(out / "compare/results.json")
    config, prompt = results["train"], results["data"]
    base = checkpoint.map_t5(out / "instructed/model")
    sizes = base.config
    parameters = sum(p.numel() for p in base.parameters())
    splits = {name: data.read_splits(prompt["data"], name) for name in ("instruct", "adapt")}
    categories = {name: len({data.read_task(Path(prompt["data"], "tasks", f"{task}.json"))["category"]
                             for task in lists["train"]}) for name, lists in splits.items()}
    with_text = f"definition + {prompt['num_pos']} examples" if prompt["num_pos"] else "definition alone"
    seconds = sum(cell["seconds"] for cell in results["cells"])
    tuned = [path for path in (out / "compare/tune").glob("*/scores.json")]
    tuning = sum(runtime.read_json(path)["seconds"] for path in tuned)
    return "\n".join([
        f"{results['device']}. A T5 v1.1-shaped base of {parameters / 1e6:.1f} M parameters (d_model "
        f"{sizes.d_model}, {sizes.num_layers} + {sizes.num_decoder_layers} layers, {sizes.num_heads} heads, "
        f"d_ff {sizes.d_ff}, a vocabulary of {sizes.vocab_size:,}), prompts of {with_text}, at most "
        f"{prompt['max_source_length']} / {prompt['max_target_length']} tokens.", "",
        "| stage | steps, batch | tokens of text | examples of tasks | tasks | first dev loss "
        "| best dev loss | tokens/s at the end |", "|---|" + "---:|" * 7,
        stage("base, span corruption", out / "base"), stage("instructed, full", out / "instructed"), "",
        f"Stage 2 and 3 saw {len(splits['instruct']['train'])} training tasks of {categories['instruct']} "
        f"categories. The comparison adapts to {len(splits['adapt']['train'])} training tasks of "
        f"{categories['adapt']} other categories and is scored on held-out instances of these (seen) and on "
        f"{len(splits['adapt']['test'])} official test tasks (unseen), at most {config['eval_instances']} "
        f"instances of each set, evenly over the tasks. {config['steps']} steps of batch "
        f"{config['batch_size']} for every method; {len(tuned)} runs for the rates ({tuning / 60:.0f} "
        f"minutes of one core) and {len(results['cells'])} cells "
        f"({seconds / 60:.0f} minutes)."])


def rates(results: dict) -> str:
    lines = ["| method | rate | dev loss by rate |", "|---|---:|---|"]
    for name, found in results["rates"].items():
        losses = ", ".join(f"{rate}: {loss:.3f}" for rate, loss in found["dev_loss"].items())
        lines.append(f"| {name} | {found['rate']:g} | {losses} |")
    return "\n".join(lines)


def page(out: Path, scale: str) -> str:
    results = runtime.read_json(out / "compare/results.json")
    ablations = (out / "compare/ablations.md").read_text(encoding="utf-8")
    variables = "SNI=natural-instructions TEXT=text.txt.xz SCALE=" + scale
    scripts = sorted(path.name for path in Path("recipes").glob("[1-6]-*.sh"))
    commands = "\n".join(f"{variables} bash recipes/{script}" for script in scripts)
    pictures = [f"![{text}](evidence-{name})" for name, text in FIGURES.items()]
    return "\n".join([
        "# The comparison on real data", "",
        f"The official prompts, tasks and metric of Super-NaturalInstructions on a base that was pre-trained "
        f"for it on real text; **scale: {scale}**. Written by `recipes/report.py` from what these "
        "commands leave (`recipes/settings.sh` has the sizes):", "", "```", commands, "```", "",
        "## What was trained", "", facts(out), "",
        "## Learning rates", "", "Of A and B (full: of every weight), by the lowest dev loss, equal effort "
        "for each method:", "", rates(results), "",
        "## Methods", "", (out / "compare/results.md").read_text(encoding="utf-8"),
        pictures[0], "", pictures[1], "",
        "## Ablations", "", ablations, pictures[2], ""])


def main(out: Path, scale: str, docs: Path) -> None:
    path = docs / "evidence.md"
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    by_hand = old[old.index(BY_HAND):] if BY_HAND in old else f"{BY_HAND}\n"
    with runtime.atomic_write(path) as file:
        file.write((page(out, scale) + "\n" + by_hand).encode())
    for name in FIGURES:
        shutil.copyfile(out / "compare" / name, docs / f"evidence-{name}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
