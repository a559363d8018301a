"""Draws what quality.py and negatives.py left in their cache: demo/frontier.png and demo/negatives.png.

    pip install matplotlib && python bench/figures.py --cache FOLDER
"""
import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

DEMO = Path(__file__).resolve().parent.parent / "demo"


def draw_frontier(runs: list[dict], settings: dict, file: Path):
    """FD against coverage, KID against class accuracy: CFG alone as a curve over w, EMAG's runs as points.

    runs, settings: as `quality.save_scores` left them; runs with other changes than scales and variant are left out.
    """
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 6), layout="constrained")
    runs = [run for run in runs if run["changes"].keys() <= {"cfg", "emag", "variant"} and not run["random"]]
    kinds = {"CFG alone, w": ("black", "o-", lambda run: run["changes"].get("emag") == 1),
             "EMAG, w / w_e": ("tab:red", "o", lambda run: run["changes"].get("emag") != 1
                               and "variant" not in run["changes"]),
             f"EMAG-Q, {settings['cfg']:g} / {settings['emag']:g}":
                 ("tab:blue", "s", lambda run: "variant" in run["changes"])}
    for axis, (x, y) in zip(axes, (("coverage", "FD"), ("class accuracy", "KID"))):
        for label, (color, style, belongs) in kinds.items():
            chosen = [run for run in runs if not run["omega_of"] and belongs(run)]
            chosen.sort(key=lambda run: run["changes"].get("cfg", settings["cfg"]))
            places, widths = ([[run[what][metric] for run in chosen] for metric in (x, y)]
                              for what in ("values", "widths"))
            axis.errorbar(*places, xerr=widths[0], yerr=widths[1], color=color, fmt=style, elinewidth=0.6, label=label)
            for *place, run in zip(*places, chosen):
                scales = settings | run["changes"]
                text = f"{scales['cfg']:g}" + (f" / {scales['emag']:g}" if scales["emag"] != 1 else "")
                side = 1 if place[0] > np.mean(places[0]) or style == "o-" else -1           # so that few labels meet
                if style != "s":
                    axis.annotate(text, place, xytext=(6 * side, 4), textcoords="offset points", color=color,
                                  ha="left" if side == 1 else "right")
        axis.set(xlabel=x, ylabel=f"{y}, axis upside down")
        axis.invert_yaxis()
    axes[0].legend(title="better: up and to the right")
    figure.savefig(file, dpi=110)


def draw_negatives(rows: list[dict], file: Path):
    """Hardness against faithfulness, one panel for each moment. rows: as negatives.py left them."""
    moments = sorted({row["t"] for row in rows}, reverse=True)
    figure, axes = pyplot.subplots(1, len(moments), figsize=(5 * len(moments), 5.5), layout="constrained",
                                   squeeze=False, sharey=True)
    for axis, t in zip(axes[0], moments):
        for number, row in enumerate(row for row in rows if row["t"] == t):
            (x, width), (y, height) = row["hardness"], row["same class"]
            axis.errorbar(x, y, xerr=width, yerr=height, color=f"C{number}", fmt="o", elinewidth=0.6, label=row["name"])
        axis.set(title=f"t = {t:.2f}", xlabel="‖x̂₀ − x̂₀'‖ / ‖x̂₀ − x̂₀^∅‖, harder to the left", xlim=(0, None))
    axes[0, 0].set_ylabel("share of x̂₀' in the class of x̂₀, more faithful upwards")
    axes[0, -1].legend(loc="lower left")
    figure.savefig(file, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=DEMO, metavar="FOLDER")
    args = parser.parse_args()
    found = {name: json.loads((args.cache / f"{name}.json").read_text()) for name in ("quality", "negatives")
             if (args.cache / f"{name}.json").is_file()}
    if not found:
        parser.exit(2, f"figures.py: {args.cache} holds no results: run bench/quality.py or bench/negatives.py first\n")
    if "quality" in found:
        draw_frontier(found["quality"]["rows"], found["quality"]["settings"], args.out / "frontier.png")
    if "negatives" in found:
        draw_negatives(found["negatives"]["rows"], args.out / "negatives.png")


if __name__ == "__main__":
    main()
