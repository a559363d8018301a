"""Draws demo/frontier.png and demo/negatives.png, of what quality.py and negatives.py left, and demo/negative.png.

    pip install matplotlib && python bench/figures.py --cache FOLDER
    python bench/figures.py --negative                                    # draws 90 samples first: minutes

negative.png: the same noise with CFG, as the negative, and with EMAG, for five of the checkpoint's default classes. Of
each class's samples in the grid of sampler.py the one with the largest ‖x̂₀ − x̂₀'‖, summed over EMAG's perturbed
steps, is taken, and of these the five largest.
"""
import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dit import fingerprint, load_dit  # noqa: E402
from sampler import (DEMO, Settings, Step, check_file, draw_grid, need, one_line_errors, parse_numbers,  # noqa: E402
                     sample, save_png, to_images, to_x0)

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

COLUMNS, ZOOM = 5, 5                      # of negative.png


def draw_frontier(quality: dict, negatives: dict, file: Path):
    """FD against coverage, KID against class accuracy: CFG alone as a curve over w, the others as points.

    quality, negatives: as the scripts left them. Left out are runs with other changes than scales and variant, and
    negatives that were scored on other samples.
    """
    w, w_e = quality["settings"]["cfg"], quality["settings"]["emag"]
    kinds = {"CFG alone, w": ("black", "o-", (6, 4)), "CFG in EMAG's window, w inside": ("tab:green", "D", (-6, -13)),
             "EMAG, w / w_e": ("tab:red", "o", (6, -13)), f"EMAG-Q, {w:g} / {w_e:g}": ("tab:blue", "s", (6, 4)),
             f"PAG and S², {w:g} / w_e": ("tab:purple", "^", (-6, 4))}    # color, style, where a label stands
    points = {kind: [] for kind in kinds}
    plain, inside, emag, emag_q, others = points.values()
    for run in quality["rows"]:
        changes = run["changes"]
        scales = f"{changes.get('cfg', w):g}", f"{changes.get('emag', w_e):g}"
        if run["random"] or run["omega_of"] or changes.keys() - {"cfg", "emag", "variant"}:
            continue
        if run["inside"]:
            inside.append((run, f"{run['inside']:g}"))
        elif changes.get("emag") == 1:
            plain.append((run, scales[0]))
        elif "variant" in changes:
            emag_q.append((run, ""))
        else:
            emag.append((run, " / ".join(scales)))
    plain.sort(key=lambda point: float(point[1]))
    if all(negatives.get(key) == quality[key] for key in ("settings", "num", "seeds")):
        others += [(run, f"{run['name']} {run['emag']:g}") for run in negatives["runs"] if run["name"] in ("PAG", "S²")]

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 6), layout="constrained")
    for axis, (x, y) in zip(axes, (("coverage", "FD"), ("class accuracy", "KID"))):
        for kind, (color, style, offset) in kinds.items():
            if not points[kind]:
                continue
            places, widths = ([[run[what][metric] for run, _ in points[kind]] for metric in (x, y)]
                              for what in ("values", "widths"))
            axis.errorbar(*places, xerr=widths[0], yerr=widths[1], color=color, fmt=style, elinewidth=0.6, label=kind)
            for *place, (_, text) in zip(*places, points[kind]):
                axis.annotate(text, place, xytext=offset, textcoords="offset points", color=color,
                              ha="left" if offset[0] > 0 else "right")
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


def draw_negative(file: Path, checkpoint: Path = DEMO, per_class: int = 8):
    """The picture that the docstring above describes, with the settings that the checkpoint recommends."""
    (model, meta), name = load_dit(checkpoint), checkpoint.name
    settings = Settings(**meta["settings"] | dict(checkpoint=name, weights=fingerprint(model)))
    classes = parse_numbers("--classes", settings.classes, model.null_class, meta["class_names"])
    settings, labels = dataclasses.replace(settings, num=len(classes) * per_class), classes * per_class
    sizes = np.zeros(settings.num)
    for start in range(0, settings.num, settings.batch):
        rows = range(settings.num)[start:start + settings.batch]

        def watch(step: Step):
            if step.negative is not None:
                x0, other = (to_x0(pred, step.x, step.t, meta["prediction"]) for pred in (step.clean, step.negative))
                sizes[rows] += (x0 - other).flatten(1).norm(dim=1).cpu().numpy()
        sample(model, meta, [labels[i] for i in rows], rows, settings, watch)
    largest = [max((i for i in range(settings.num) if labels[i] == label), key=sizes.__getitem__)
               for label in dict.fromkeys(labels)]
    chosen = sorted(sorted(largest, key=lambda i: -sizes[i])[:COLUMNS], key=largest.index)
    lines = {f"CFG\nw {settings.cfg:g}": 1.0, f"the negative\nw_e 0, w {settings.cfg:g}": 0.0,
             f"EMAG\nw_e {settings.emag:g}, w {settings.cfg:g}": settings.emag}
    table = []
    for scale in lines.values():
        x = sample(model, meta, [labels[i] for i in chosen], chosen, dataclasses.replace(settings, emag=scale))
        table.append([np.kron(image, np.ones((ZOOM, ZOOM, 1), np.uint8)) for image in to_images(x)])
    save_png(draw_grid(table, list(lines)), file, settings, chosen=chosen)
    print(f"{file}: samples {', '.join(map(str, chosen))} of the grid")


@one_line_errors
def main(argv: Sequence[str] | None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: need(False, f"{message}: see --help")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="of quality.py and negatives.py")
    parser.add_argument("--negative", action="store_true", help="draw negative.png")
    parser.add_argument("--out", type=Path, default=DEMO.parent, metavar="FOLDER")
    args = parser.parse_args(argv)
    need(args.cache or args.negative, "--cache FOLDER or --negative: need one of them, or both")
    need(args.out.is_dir(), f"--out {args.out}: need a folder that exists")
    if args.cache:
        files = {name: args.cache / f"{name}.json" for name in ("quality", "negatives")}
        found = {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
        need(found, f"--cache {args.cache}: holds no results: run bench/quality.py or bench/negatives.py first")
        if "quality" in found:
            draw_frontier(found["quality"], found.get("negatives", {}), args.out / "frontier.png")
        if "negatives" in found:
            draw_negatives(found["negatives"]["rows"], args.out / "negatives.png")
    if args.negative:
        check_file("--out", args.out / "negative.png", ".png")
        draw_negative(args.out / "negative.png")


if __name__ == "__main__":
    sys.exit(main())
