"""Draw what `overshoot.py` measured, as a PNG: python overshoot_chart.py FILE.png < cases.json (needs matplotlib)."""

import json
import sys

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

COLOURS = {"after": "#c4432b", "holds": "#2b7a78", "litellm": "#8d99ae"}


def main() -> None:
    """Read the cases and write the picture."""
    given = json.load(sys.stdin)
    cases, names = given["cases"], given["names"]
    modes = [mode for mode in COLOURS if any(case["mode"] == mode for case in cases)]
    numbers = sorted({case["concurrency"] for case in cases})
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9})
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 3.6), dpi=150)
    width = 0.8 / len(modes)
    parts = (
        ("overshoot_bp", "spent past the cap, %", max(20, *(case["overshoot_bp"] / 100 for case in cases)) * 1.15),
        ("usable_bp", "of the cap, spent, %", 115),
    )
    for panel, (field, title, top) in zip(panels, parts, strict=True):
        for nth, mode in enumerate(modes):
            found = {case["concurrency"]: case[field] / 100 for case in cases if case["mode"] == mode}
            places = [at + (nth - (len(modes) - 1) / 2) * width for at, number in enumerate(numbers) if number in found]
            heights = [found[number] for number in numbers if number in found]
            bars = panel.bar(places, heights, width * 0.94, color=COLOURS[mode], label=names[mode])
            panel.bar_label(bars, fmt="%.1f", padding=2, fontsize=6.5)
        panel.set_xticks(range(len(numbers)), [f"N = {number}" for number in numbers])
        panel.set_ylim(0, top)
        panel.set_title(title, loc="left", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(given["title"], x=0.01, ha="left", fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower left", ncols=len(modes), frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(sys.argv[1], metadata={"Software": None})


if __name__ == "__main__":
    main()
