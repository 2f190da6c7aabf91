"""Draw losses.png: the loss of the three runs on training batches and on dev.

pip install matplotlib
python experiments/results/real/figure.py
"""

import csv
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent
STEPS = 40  # of which the mean training loss is drawn

with open(FOLDER / "losses.csv", encoding="utf-8") as file:
    rows = list(csv.DictReader(file))
figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
LINES = {
    "OrchMoE": ("orchmoe", "tab:blue", "o-"),
    "LoRA, alpha 1": ("lora", "tab:orange", "s--"),
    "LoRA, alpha 4": ("lora_alpha_4", "tab:green", "^:"),
}
for name, (method, color, line) in LINES.items():
    middles = []
    means = []
    for start in range(0, len(rows) - STEPS + 1, STEPS):
        middles.append(start + STEPS / 2)
        means.append(fmean(float(row[method]) for row in rows[start : start + STEPS]))
    axes.plot(middles, means, color=color, alpha=0.4, label=f"{name}, mean of {STEPS} batches")
    on_dev = [row for row in rows if row[f"{method}_dev"]]
    steps = [int(row["step"]) for row in on_dev]
    losses = [float(row[f"{method}_dev"]) for row in on_dev]
    axes.plot(steps, losses, line, color=color, fillstyle="none", label=f"{name}, dev")
axes.set_xlabel("step of 8 rows")
axes.set_ylabel("loss, nats per target token")
axes.legend(frameon=False, fontsize=8)
axes.spines[["top", "right"]].set_visible(False)
figure.savefig(FOLDER / "losses.png", dpi=150)
