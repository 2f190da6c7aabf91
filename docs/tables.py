"""Show the run on docs/annotated.html: heat maps, tables of losses, and numbers for the texts.

All of it is made from docs/explorer.json, which docs/numbers.py makes, and from docs/evidence.md.

Letters: K abstract tasks, S skills, N adapted Linears.  Test: pytest tests/repo/test_annotate.py
"""

import html
import math
import re
from typing import Any

from docs import numbers
from docs.markup import inline

LITTLE = 0.05  # nats; a smaller difference of losses counts as none
MOST = 3  # tasks that are shown because routing helps them most, and as many that it harms most

# --------------------------------------------------------------------------------- what the run did


def heat(value: float) -> str:
    """Return a cell of a heat map."""
    shown = f"{value:.2f}"
    style = "" if float(shown) == 0 else f' style="--v:{shown}"'
    return f'<td class="cell"{style}>{shown}</td>'


def signed(value: float, digits: int) -> str:
    """Return a number with its sign."""
    return f"{value:+.{digits}f}".replace("-", "&#8722;")


def spoken(name: str) -> str:
    """Return the name of a task without its underscores."""
    return html.escape(name.replace("_", " "))


def largest(w: list[float]) -> int:
    """Return the abstract task with the largest weight, counted from 0."""
    return w.index(max(w))


def heat_head(first: str, columns: int) -> str:
    """Return the head of a heat map. Its columns are numbered from 1."""
    head = "".join(f'<th scope="col">{number}</th>' for number in range(1, columns + 1))
    return f'<thead><tr><th scope="col">{first}</th>{head}</tr></thead>\n'


def tasks_html(explored: dict[str, Any]) -> str:
    """Return the heat map: the mean w of each task, sorted by its largest abstract task."""
    K = len(explored["Zhat"][0])
    groups: list[list[tuple[int, dict]]] = [[] for _ in range(K)]
    for number, task in enumerate(explored["tasks"]):
        groups[largest(task["w"])].append((number, task))
    bodies = []
    for k, group in enumerate(groups):
        group.sort(key=lambda pair: -pair[1]["w"][k])
        words = html.escape(explored["words"][k])
        rows = [
            f'<tr><th scope="rowgroup" colspan="{K + 1}" class="group">'
            f"Abstract task {k + 1}: {words}</th></tr>"
        ]
        for number, task in group:
            cells = "".join(heat(value) for value in task["w"])
            kind = " <i>(unseen)</i>" if task["kind"] == "unseen" else ""
            rows.append(
                f'<tr><th scope="row"><button type="button" data-task="{number}" '
                f'aria-expanded="false">{spoken(task["name"])}{kind}</button></th>{cells}</tr>'
            )
        bodies.append(f"<tbody>{''.join(rows)}</tbody>")
    return (
        f'<div class="wide"><table class="tasks">{heat_head("task", K)}'
        + "\n".join(bodies)
        + "</table></div>"
    )


def training_html(explored: dict[str, Any]) -> str:
    """Return the mean w of the task that training moved most, before and after training."""
    task = most_moved(explored)
    K = len(task["w"])
    rows = []
    for name, w in (("before training", task["start_w"]), ("after training", task["w"])):
        cells = "".join(heat(value) for value in w)
        rows.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    return (
        f'<div class="wide"><table class="tasks">{heat_head("mean w", K)}'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def most_moved(explored: dict[str, Any]) -> dict[str, Any]:
    """Return the seen task whose mean w differs most from that before training."""

    def change(task: dict[str, Any]) -> float:
        return sum(abs(a - b) for a, b in zip(task["w"], task["start_w"], strict=True))

    return max((task for task in explored["tasks"] if task["kind"] == "seen"), key=change)


def chain_html(explored: dict[str, Any]) -> str:
    """Return w, one row of Zhat, and c of the first sample in one Linear."""
    w = explored["samples"][explored["first"]]["w"]
    Zhat = explored["Zhat"][explored["linears"].index(explored["walk"]["linear"])]  # (K,S)
    row = Zhat[largest(w)]
    c = [sum(w[k] * Zhat[k][s] for k in range(len(w))) for s in range(len(row))]
    tables = []
    for head, name, values in (
        ("abstract task", "$w$", w),
        ("skill", f"row {largest(w) + 1} of $Z^hat$", row),
        ("skill", "$c$", c),
    ):
        cells = "".join(heat(value) for value in values)
        tables.append(
            f"<table>{heat_head(head, len(values))}"
            f'<tbody><tr><th scope="row">{inline(name, {})}</th>{cells}</tr></tbody></table>'
        )
    return f'<div class="chain">{"".join(tables)}</div>'


def cards_html(explored: dict[str, Any]) -> str:
    """Return a card for each abstract task, with the sources that have it most strongly."""
    cards = []
    for k, sources in enumerate(explored["strongest"]):
        items = []
        for source in sources:
            items.append(
                f"<li><b>{source['w']:.2f}</b> {spoken(source['task'])} ({source['kind']})"
                f"<br><q>{html.escape(source['text'])}</q></li>"
            )
        cards.append(
            f'<div class="card"><h4>Abstract task {k + 1}</h4>'
            f"<p>{html.escape(explored['words'][k])}</p><ul>{''.join(items)}</ul></div>"
        )
    return (
        "<details><summary>The prompts with the largest weight on each abstract task</summary>"
        f'<div class="cards">{"".join(cards)}</div></details>'
    )


def gap_html(explored: dict[str, Any], task: dict[str, Any], setting: str) -> str:
    """Return a cell with the loss of a setting minus that with the router's w.

    "off" has no colour. "other" says whose w it is.
    """
    difference = gap(task, setting)
    kind = ""
    if abs(difference) > LITTLE and setting != "off":
        kind = ' class="good"' if difference > 0 else ' class="bad"'
    whose = whose_w(explored, task) if setting == "other" else ""
    return f"<td{kind}>{signed(difference, 2)}{whose}</td>"


def whose_w(explored: dict[str, Any], task: dict[str, Any]) -> str:
    """Return whose w "other" is, and whether the two tasks have the same abstract task."""
    others = set()
    for sample in explored["samples"]:
        if explored["tasks"][sample["task"]] is task:
            others.add(sample["other_task"])
    if len(others) != 1:
        return ""
    name = others.pop()
    other = next(each for each in explored["tasks"] if each["name"] == name)
    same = ""
    if largest(other["w"]) == largest(task["w"]):
        same = " (same)"
    return f"<small>{name.split('_')[0]}{same}</small>"


def extremes_html(explored: dict[str, Any]) -> str:
    """Return a table of the tasks that routing helps most and harms most, seen and unseen."""
    groups = []
    for kind in ("seen", "unseen"):
        tasks = sorted_by_gap(explored, kind)
        helped = [task for task in tasks if gap(task, "mean") > LITTLE]
        harmed = [task for task in reversed(tasks) if gap(task, "mean") < -LITTLE]
        groups.append((f"{kind} tasks that the router’s w helps most", helped[:MOST]))
        groups.append((f"{kind} tasks that it harms most", harmed[:MOST]))
    return losses_table(explored, [(title, tasks) for title, tasks in groups if tasks])


def losses_html(explored: dict[str, Any]) -> str:
    """Return the losses of all tasks with other weights than the router's, folded."""
    groups = []
    for kind in ("seen", "unseen"):
        tasks = sorted_by_gap(explored, kind)
        groups.append((f"{kind} tasks", [average(tasks, f"all {len(tasks)} tasks"), *tasks]))
    table = losses_table(explored, groups)
    return f"<details><summary>The same table for all tasks</summary>{table}</details>"


def sorted_by_gap(explored: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """Return the tasks of a kind, first the one whose loss the mean w raises most."""
    tasks = [task for task in explored["tasks"] if task["kind"] == kind]
    return sorted(tasks, key=lambda task: -gap(task, "mean"))


def gap(task: dict[str, Any], setting: str) -> float:
    """Return the loss of a setting minus that with the router's w, in nats."""
    return task[setting]["loss"] - task["own"]["loss"]


def losses_table(explored: dict[str, Any], groups: list[tuple[str, list[dict]]]) -> str:
    """Return a table of losses: what other weights than the router's cost on tasks in groups."""
    settings = ("mean", "uniform", "other", "off")
    rows = []
    for title, tasks in groups:
        rows.append(f'<tr class="group"><th scope="rowgroup" colspan="9">{title}</th></tr>')
        for task in tasks:
            cells = f"<td>{task['own']['loss']:.2f}</td>"
            cells += "".join(gap_html(explored, task, setting) for setting in settings)
            for name in ("own", "mean", "uniform"):
                cells += f"<td>{100 * task[name]['right'] / task['count']:.0f}</td>"
            rows.append(f'<tr><th scope="row">{spoken(task["name"])}</th>{cells}</tr>')
    heads = ("router’s w", "mean w", "1/K each", "another’s w", "no skills")
    heads += ("router’s w", "mean w", "1/K each")
    columns = "".join(f'<th scope="col">{head}</th>' for head in heads)
    return (
        '<table class="losses"><thead>'
        '<tr class="heads"><td></td><th scope="colgroup">loss</th><th scope="colgroup" '
        'colspan="4">loss minus that with the router’s w</th><th scope="colgroup" colspan="3">'
        f'right answers, %</th></tr><tr><th scope="col">task</th>{columns}</tr></thead>\n'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def average(tasks: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Return the mean loss over the tasks, and the sum of their right answers."""
    result = {"name": name, "count": sum(task["count"] for task in tasks)}
    for setting in numbers.COMPARED:
        loss = sum(task[setting]["loss"] for task in tasks) / len(tasks)
        right = sum(task[setting]["right"] for task in tasks)
        result[setting] = {"loss": loss, "right": right}
    return result


def linears_html(explored: dict[str, Any]) -> str:
    """Return a table of the Linears: what is lost if one of them alone is not routed. Folded."""
    spread, rise = explored["without_one"]["spread"], explored["without_one"]["rise"]
    rows = []
    for name, s, r in zip(explored["linears"], spread, rise, strict=True):
        rows.append(
            f'<tr><th scope="row">{name.replace("blocks.", "").replace(".", " ")}</th>'
            f"<td>{s:.3f}</td><td>{signed(r, 4)}</td></tr>"
        )
    return (
        "<details><summary>Linear by Linear</summary><p>The spread of c says how much it differs "
        "between the seen samples: it is the mean of |c − mean c|. The change of the loss is over "
        "all seen samples, if this Linear, and no other, uses the mean c.</p>"
        '<table><thead><tr><th scope="col">Linear</th><th scope="col">spread of c</th>'
        '<th scope="col">change of the loss</th></tr></thead>\n'
        f"<tbody>{''.join(rows)}</tbody></table></details>"
    )


def gaps_within(explored: dict[str, Any], kind: str, low: float, high: float) -> str:
    """Return the names of the tasks whose loss the mean w and 1/K both change by low to high."""
    names = []
    for task in explored["tasks"]:
        gaps = [gap(task, setting) for setting in ("mean", "uniform")]
        if task["kind"] == kind and low <= min(gaps) and max(gaps) <= high:
            names.append(task["name"].replace("_", " "))
    return ", ".join(names) or "(none)"


def shares(explored: dict[str, Any], kind: str) -> str:
    """Return how many answers are right with the router's w: of the shown samples, and of all."""
    shown = [s for s in explored["samples"] if explored["tasks"][s["task"]]["kind"] == kind]
    right = sum(sample["results"][0][2] for sample in shown)
    whole = average([task for task in explored["tasks"] if task["kind"] == kind], "")
    share = f"{100 * right / len(shown):.0f} %"
    share_of_whole = f"{100 * whole['own']['right'] / whole['count']:.0f} %"
    return (
        f"{right} of the {len(shown)} {kind} samples on this page ({share}), and for "
        f"{share_of_whole} of all {whole['count']} {kind} samples"
    )


# ------------------------------------------------------------------------ numbers for the texts


def values_of(explored: dict[str, Any]) -> dict[str, Any]:
    """Return numbers of the run for the texts of the page."""
    values: dict[str, Any] = {"steps": str(explored["steps"])}
    values["root_width"] = f"{math.sqrt(int(explored['walk']['width'])):.1f}"
    N, K, S = len(explored["Zhat"]), len(explored["Zhat"][0]), len(explored["Zhat"][0][0])
    values |= {"N": str(N), "K": str(K), "S": str(S)}
    heads = ("router’s w", "mean w", "1/K each", "another’s w", "no skills")
    values["means"] = [["mean loss", *heads]]
    for kind in ("seen", "unseen"):
        tasks = [task for task in explored["tasks"] if task["kind"] == kind]
        values[f"{kind}_tasks"] = str(len(tasks))
        values[f"{kind}_share"] = shares(explored, kind)
        values[f"{kind}_little"] = gaps_within(explored, kind, -LITTLE, LITTLE)
        values[f"{kind}_harm"] = gaps_within(explored, kind, -math.inf, -LITTLE)
        values[f"{kind}_distance"] = f"{explored['distance'][kind]:.3f}"
        whole = average(tasks, "")
        losses = [f"{whole[setting]['loss']:.2f}" for setting in numbers.COMPARED]
        values["means"].append([f"{len(tasks)} {kind} tasks", *losses])

    seen = [task for task in explored["tasks"] if task["kind"] == "seen"]
    same = [task for task in seen if largest(task["w"]) == largest(task["start_w"])]
    values["same_largest"] = str(len(same))
    values["most_moved"] = spoken(most_moved(explored)["name"])
    split = min(seen, key=lambda task: max(task["w"]))
    values["split"] = spoken(split["name"])
    by_weight = sorted(range(K), key=lambda k: -split["w"][k])
    values["split_over"] = " and ".join(str(k + 1) for k in sorted(by_weight[:2]))

    sample = explored["samples"][explored["first"]]
    k = largest(sample["w"])
    values["first_input"] = sample["input"]
    values["first_task"] = spoken(explored["tasks"][sample["task"]]["name"])
    values["first_k"] = str(k + 1)
    values["first_w"] = f"{sample['w'][k]:.2f}"
    values["first_words"] = explored["words"][k]
    c = [float(value) for value in explored["walk"]["c"][-1][1:]]
    values["first_skill"] = str(largest(c) + 1)
    return values


def outdated_words(explored: dict[str, Any], items: list[str]) -> list[str]:
    """Return a line for each abstract task whose words do not fit the run.

    An item has the words, and behind " | " the numbers of the seen tasks that have it most.
    """
    found: list[list[str]] = [[] for _ in items]
    for task in explored["tasks"]:
        if task["kind"] == "seen":
            number = task["name"].removeprefix("task").split("_")[0]
            found[largest(task["w"])].append(number)
    lines = []
    for k, item in enumerate(items):
        words, known = item.split(" | ")
        if sorted(known.split()) != sorted(found[k]):
            lines.append(
                f"docs/annotated.txt: abstract task {k + 1} ({words}) is now most in the tasks "
                f"{' '.join(found[k]) or 'none'}; write what they share, and these numbers"
            )
    return lines


# -------------------------------------------------------------------------------------- the verdict


def verdict(text: str) -> str:
    """Return the verdict of docs/evidence.md: the bold words with which its text begins."""
    return re.search(r"^\*\*([^*]+)\*\*", text, re.MULTILINE)[1].replace("\n", " ")


def against_lora(text: str) -> list[list[str]]:
    """Return the first table of docs/evidence.md, OrchMoE minus a LoRA, without the last column."""
    rows: list[list[str]] = []
    for line in text.splitlines():
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")][:-1])
        elif rows:
            break
    return [rows[0], *rows[2:]]  # without the line of dashes
