"""Show the run on docs/annotated.html: heat maps, tables of losses, and numbers for the texts.

All of it is made from docs/explorer.json, which docs/numbers.py makes, and from docs/evidence.md.

Letters: K abstract tasks, S skills, N adapted Linears.  Test: pytest tests/repo/test_annotate.py
"""

import html
import math
import re
from typing import Any

from docs import numbers
from docs.markup import inline, markdown, stacked, table
from docs.numbers import of_kind

LITTLE = 0.05  # nats; a smaller difference of losses counts as none
MOST = 3  # tasks that are shown because routing helps them most, and as many that it harms most
# What the seen tasks of each abstract task share, and the numbers of these tasks. After a run with
# other tasks, `outdated_words` says what to write anew.
WORDS = (
    ("write the opposite of each adjective", "109"),
    ("two things of a trip or a review: which was good, or how was it in all", "126 127"),
    (
        "a list: pick, count, compare or change its members",
        "101 102 103 104 105 106 107 108 110 113",
    ),
    ("go on with a list, or write a card as a sentence", "115 128"),
    ("a sentence about a person: the country or the job", "112 116"),
    ("the job of a person, or the last place of a trip", "111 125"),
    (
        "a sentence about a person: name its thing, rewrite it, title it, or ask when",
        "117 118 119 120",
    ),
    ("a story of who has which things, or how many", "114 121 122 123 124"),
)
SETTINGS = {
    "mean": "mean w",
    "uniform": "1/K each",
    "other": "another’s w",
    "off": "no skills",
}

# --------------------------------------------------------------------------------- what the run did


def heat(value: float) -> str:
    """Return a cell of a heat map."""
    shown = f"{value:.2f}"
    style = "" if float(shown) == 0 else f' style="--v:{shown}"'
    return f'<td class="cell"{style}>{shown}</td>'


def signed(value: float, digits: int) -> str:
    """Return a number with its sign. What rounds to zero has none."""
    text = f"{value:+.{digits}f}"
    if float(text) == 0:
        text = text[1:]
    return text.replace("-", "−")


def spoken(name: str) -> str:
    """Return the name of a task without its underscores."""
    return html.escape(name.replace("_", " "))


def largest(w: list[float]) -> int:
    """Return the abstract task with the largest weight, counted from 0."""
    return w.index(max(w))


def heat_map(first: str, rows: list[tuple[str, list[float]]]) -> str:
    """Return a heat map. A row has the HTML of its name and its values."""
    return f"<table>{heat_head(first, len(rows[0][1]))}<tbody>{heat_rows(rows)}</tbody></table>"


def heat_head(first: str, columns: int) -> str:
    """Return the head of a heat map. Its columns are numbered from 1."""
    head = "".join(f'<th scope="col">{number}</th>' for number in range(1, columns + 1))
    return f'<thead><tr><th scope="col">{first}</th>{head}</tr></thead>\n'


def heat_rows(rows: list[tuple[str, list[float]]]) -> str:
    """Return the rows of a heat map."""
    lines = []
    for name, values in rows:
        cells = "".join(heat(value) for value in values)
        lines.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    return "\n".join(lines)


def tasks_html(explored: dict[str, Any]) -> str:
    """Return the heat map: the mean w of each task, sorted by its largest abstract task."""
    bodies = []
    for k, (words, _) in enumerate(WORDS):
        numbered = []
        for number, task in enumerate(explored["tasks"]):
            if largest(task["w"]) == k:
                numbered.append((number, task))
        numbered.sort(key=lambda pair: -pair[1]["w"][k])
        rows = []
        for number, task in numbered:
            kind = " <i>(unseen)</i>" if task["kind"] == "unseen" else ""
            button = f'<button type="button" data-task="{number}" aria-expanded="false">'
            rows.append((f"{button}{spoken(task['name'])}{kind}</button>", task["w"]))
        group = f'<tr><th scope="rowgroup" colspan="{len(WORDS) + 1}" class="group">'
        group += f"Abstract task {k + 1}: {html.escape(words)}</th></tr>"
        bodies.append(f"<tbody>{group}{heat_rows(rows)}</tbody>")
    head = heat_head("task", len(WORDS))
    return f'<div class="wide"><table class="tasks">{head}{"".join(bodies)}</table></div>'


def chain_html(explored: dict[str, Any]) -> str:
    """Return w, one row of Zhat, and c of the first sample in one Linear."""
    w = explored["samples"][explored["first"]]["w"]
    Zhat = explored["Zhat"][explored["linears"].index(explored["walk"]["linear"])]  # (K,S)
    row = Zhat[largest(w)]
    c = [sum(w[k] * Zhat[k][s] for k in range(len(w))) for s in range(len(row))]
    maps = heat_map("abstract task", [(inline("$w$"), w)])
    maps += heat_map("skill", [(inline(rf"row {largest(w) + 1} of $\hat Z$"), row)])
    maps += heat_map("skill", [(inline("$c$"), c)])
    return f'<div class="chain">{maps}</div>'


# ----------------------------------------------------------------------- what routing does for each


def gap(task: dict[str, Any], setting: str) -> float:
    """Return the loss of a setting minus that with the router's w, in nats."""
    return task[setting] - task["own"]


def average(tasks: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Return the mean losses over the tasks."""
    result: dict[str, Any] = {"name": name}
    for setting in numbers.COMPARED:
        result[setting] = sum(task[setting] for task in tasks) / len(tasks)
    return result


def extremes_html(explored: dict[str, Any]) -> str:
    """Return a table of the means, and of the tasks that routing helps most and harms most."""
    means = []
    extremes = []
    for kind in ("seen", "unseen"):
        tasks = sorted_by_gap(explored, kind)
        means.append(average(tasks, f"all {len(tasks)} {kind} tasks"))
        helped = [task for task in tasks if gap(task, "mean") > LITTLE][:MOST]
        harmed = [task for task in reversed(tasks) if gap(task, "mean") < -LITTLE][:MOST]
        if helped:
            extremes.append((f"{kind} tasks that the router’s w helps most", helped))
        if harmed:
            extremes.append((f"{kind} tasks that it harms most", harmed))
    return losses_table([("mean over tasks", means), *extremes])


def losses_html(explored: dict[str, Any]) -> str:
    """Return the losses of all tasks with other weights than the router's, folded."""
    groups = [(f"{kind} tasks", sorted_by_gap(explored, kind)) for kind in ("seen", "unseen")]
    return (
        f"<details><summary>The same table for all tasks</summary>{losses_table(groups)}</details>"
    )


def sorted_by_gap(explored: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """Return the tasks of a kind, first the one whose loss the mean w raises most."""
    return sorted(of_kind(explored, kind), key=lambda task: -gap(task, "mean"))


def losses_table(groups: list[tuple[str, list[dict]]]) -> str:
    """Return a table of losses: what other weights than the router's cost on tasks in groups."""
    rows = []
    for title, tasks in groups:
        rows.append(f'<tr class="group"><th scope="rowgroup" colspan="6">{title}</th></tr>')
        for task in tasks:
            cells = f"<td>{task['own']:.2f}</td>"
            cells += "".join(gap_html(task, setting) for setting in SETTINGS)
            rows.append(f'<tr><th scope="row">{spoken(task["name"])}</th>{cells}</tr>')
    columns = "".join(f'<th scope="col">{name}</th>' for name in SETTINGS.values())
    return stacked(
        '<table><thead><tr><th scope="col">task</th><th scope="col">router’s w</th>'
        f"{columns}</tr></thead>\n<tbody>{''.join(rows)}</tbody></table>",
        1 + len(SETTINGS),
    )


def gap_html(task: dict[str, Any], setting: str) -> str:
    """Return a cell with the change of the loss. Without skills it has no colour."""
    difference = gap(task, setting)
    kind = ""
    if abs(difference) > LITTLE and setting != "off":
        kind = ' class="good"' if difference > 0 else ' class="bad"'
    return f"<td{kind}>{signed(difference, 2)}</td>"


def linears_html(explored: dict[str, Any]) -> str:
    """Return a table of the Linears: what is lost if only one of them is not routed. Folded."""
    spread, rise = explored["without_one"]["spread"], explored["without_one"]["rise"]
    rows = [["Linear", "spread of c", "change of the loss"]]
    for name, difference, change in zip(explored["linears"], spread, rise, strict=True):
        spoken_name = name.replace("blocks.", "").replace(".", " ").replace("_", " ")
        rows.append([spoken_name, f"{difference:.3f}", signed(change, 4)])
    return (
        "<details><summary>Linear by Linear</summary><p>The spread of c says how much it differs "
        "between the seen samples: it is the mean of |c − mean c|. The change of the loss is over "
        "all seen samples, if this Linear, and no other, uses the mean c.</p>"
        f"{table(rows)}</details>"
    )


def count_gaps(explored: dict[str, Any], kind: str, low: float, high: float) -> str:
    """Return how many tasks there are whose loss the mean w and 1/K both change by low to high."""
    count = 0
    for task in of_kind(explored, kind):
        gaps = [gap(task, setting) for setting in ("mean", "uniform")]
        if low <= min(gaps) and max(gaps) <= high:
            count += 1
    return str(count)


def shares(explored: dict[str, Any], kind: str) -> str:
    """Return how many answers are right with the router's w: of the shown samples, and of all."""
    shown = [s for s in explored["samples"] if explored["tasks"][s["task"]]["kind"] == kind]
    right = len([sample for sample in shown if sample["results"][0][2]])
    count = sum(task["count"] for task in of_kind(explored, kind))
    share = 100 * right / len(shown)
    share_of_all = 100 * sum(task["right"] for task in of_kind(explored, kind)) / count
    return (
        f"{right} of the {len(shown)} {kind} samples on this page ({share:.0f}\u00a0%), and for "
        f"{share_of_all:.0f}\u00a0% of all {count} {kind} samples"
    )


# ------------------------------------------------------------------------------- for the texts


def values_of(explored: dict[str, Any]) -> dict[str, str]:
    """Return the HTML of all that the texts of the page name: numbers, words and tables."""
    values = {}
    for name, value in explored["walk"].items():
        values[name] = html.escape(value) if isinstance(value, str) else table(value)
    values["prompt"] = f"<pre>{values['prompt']}</pre>"
    values |= {
        "chain": chain_html(explored),
        "tasks": tasks_html(explored),
        "extremes": extremes_html(explored),
        "losses": losses_html(explored),
        "linears": linears_html(explored),
    }
    N, K, S = len(explored["Zhat"]), len(explored["Zhat"][0]), len(explored["Zhat"][0][0])
    values |= {"N": str(N), "K": str(K), "S": str(S), "steps": str(explored["steps"])}
    width = int(explored["walk"]["width"])
    values["root_width"] = f"{math.sqrt(width):.1f}"
    values["per_task"] = str(width + 1 + N * S)
    for kind in ("seen", "unseen"):
        values[f"{kind}_tasks"] = str(len(of_kind(explored, kind)))
        values[f"{kind}_share"] = shares(explored, kind)
        values[f"{kind}_little"] = count_gaps(explored, kind, -LITTLE, LITTLE)
        values[f"{kind}_harm"] = count_gaps(explored, kind, -math.inf, -LITTLE)
        values[f"{kind}_distance"] = f"{explored['distance'][kind]:.3f}"

    stops = explored["training"]
    for twin in numbers.TWINS:
        values[f"{twin}_loss"] = f"{stops[twin][-1]['loss']:.2f}"
    values["start_loss"] = f"{stops['trained'][0]['loss']:.2f}"
    pairs = zip(stops["trained"][0]["w"], stops["trained"][-1]["w"], strict=True)
    values["same_largest"] = str(sum(largest(start) == largest(end) for start, end in pairs))
    seen = of_kind(explored, "seen")
    split = min(seen, key=lambda task: max(task["w"]))
    values["split"] = spoken(split["name"])
    by_weight = sorted(range(K), key=lambda k: -split["w"][k])
    values["split_over"] = " and ".join(str(k + 1) for k in sorted(by_weight[:2]))

    sample = explored["samples"][explored["first"]]
    k = largest(sample["w"])
    values["first_input"] = html.escape(sample["input"])
    values["first_task"] = spoken(explored["tasks"][sample["task"]]["name"])
    values["first_k"] = str(k + 1)
    values["first_w"] = f"{sample['w'][k]:.2f}"
    values["first_words"] = html.escape(WORDS[k][0])
    c = [float(value) for value in explored["walk"]["c"][-1][1:]]
    values["first_skill"] = str(largest(c) + 1)
    return values


def outdated_words(explored: dict[str, Any]) -> list[str]:
    """Return a line for each abstract task whose words do not fit the run."""
    found: list[list[str]] = [[] for _ in WORDS]
    for task in of_kind(explored, "seen"):
        found[largest(task["w"])].append(task["name"].removeprefix("task").split("_")[0])
    lines = []
    for k, (words, known) in enumerate(WORDS):
        if known.split() != sorted(found[k]):
            lines.append(
                f"docs/tables.py: abstract task {k + 1} ({words}) is now most in the tasks "
                f"{' '.join(sorted(found[k])) or 'none'}; write what they share, and these numbers"
            )
    return lines


# -------------------------------------------------------------------------------------- the verdict


def unbroken(text: str) -> str:
    """Return a text in which no interval breaks at the end of a line."""
    return re.sub(r"\[[^]]*\d\]", lambda match: match[0].replace(" ", "\u00a0"), text)


def verdict(text: str) -> str:
    """Return the answer with which docs/evidence.md begins, as Markdown."""
    return re.search(r"^\*\*In one setting[^*]+\*\*", text, re.MULTILINE)[0]


def headline(text: str) -> str:
    """Return the first four columns of the first table of docs/evidence.md, as HTML."""
    rows = []
    for line in re.search(r"(^\|.*\n)+", text, re.MULTILINE)[0].splitlines():
        cells = line.strip("|").split("|")
        rows.append("|".join(cells[:4]))
    return stacked(markdown(unbroken("\n".join(rows)), {}), 3)


def default_K(text: str) -> str:
    """Return the sentences of docs/evidence.md about K = 8, as HTML."""
    found = re.search(r"With\s+K\s=\s8, the default,.+?(?=\n\n)", text, re.DOTALL)
    return inline(unbroken(found[0]))


def training_adds(text: str) -> str:
    """Return what docs/evidence.md says of a trained router minus a frozen one, in nats."""
    found = re.search(r"with a frozen router \| 16 draws, newer \| ([^|]+) \|", text)
    return unbroken(found[1])
