"""Draws what EMAG did to one batch: scores, choices, and how the negative differs from the clean prediction.

    python demo/trace.py --classes face-smiling,country-flag                                  # the flags of sampler.py
"""
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dit import LatentDecoder  # noqa: E402
from emag import Window  # noqa: E402
from sampler import (Progress, Settings, Step, check_file, make_parser, need, one_line_errors, prepare,  # noqa: E402
                     sample, save_png, to_images, to_x0)


class Trace:
    """A watch that keeps what `draw` needs: `perturbed`, the Step of each perturbed step, cut to the first sample, and
    with it ‖ε − ε'‖ of every sample; `rows`, where a token in the middle of the first sample attends."""

    def __init__(self, settings: Settings, side: int):
        self.settings, self.side, self.token = settings, side, (side // 2) * (side + 1)
        window = Window(*settings.window)
        self.observed = [step for step in range(settings.steps) if window.observes(step, settings.steps)]
        self.perturbed: list[tuple[Step, Tensor]] = []
        # EMAG-Q has no maps; and where β is nearly 1, E hardly moves, and the rounding of E hides what A was.
        self.has_rows = settings.variant != "query" and settings.beta <= 0.999
        self.rows: dict[int, tuple[Tensor, Tensor]] = {}                  # step → A and E, each (L, N)

    def __call__(self, step: Step):
        self.emag = step.emag
        if self.has_rows and step.step in self.observed:
            average = torch.stack([self.emag.average(n)[0, :, self.token].mean(dim=0) for n in self.emag.layers]).cpu()
            beta, attn = self.settings.beta, average                      # E starts as A
            if self.rows:                                                 # A_t = (E_t − β·E_{t−1}) / (1−β)
                attn = (average - beta * list(self.rows.values())[-1][1]) / (1 - beta)
            self.rows[step.step] = attn, average
        if step.negative is not None:
            first = {name: getattr(step, name)[:1] for name in ("x", "clean", "negative")}
            size = (step.clean - step.negative)[:, :step.x.shape[1]].flatten(1).norm(dim=1).cpu()
            self.perturbed.append((dataclasses.replace(step, **first), size))


def shade(values: np.ndarray, *colors: str) -> np.ndarray:
    """Values in [0, 1] on a scale of evenly spaced colours, NaN in grey: (…,) → (…, 3) uint8."""
    stops = np.array([ImageColor.getrgb(color) for color in colors])
    at = np.linspace(0, 1, len(stops))
    rgb = np.stack([np.interp(values, at, stops[:, c]) for c in range(3)], axis=-1)
    return np.where(np.isnan(values)[..., None], 232, rgb.round()).astype(np.uint8)


def draw(trace: Trace, prediction: str, decoder: LatentDecoder | None) -> Image.Image:
    """Left, over the steps: the first sample's z-scores, all samples' choices and ‖ε − ε'‖. Right, at three moments, of
    the first sample: x̂₀ by ε and by ε', and where one token attends, by A and by E."""
    steps, layers, entries = trace.settings.steps, trace.emag.layers, trace.emag.trace
    observed, perturbed = trace.observed, [step.step for step, _ in trace.perturbed]
    moments = list(dict.fromkeys((perturbed[0], perturbed[len(perturbed) // 2], perturbed[-1])))
    names = ("clean, x0", "negative, x0", "difference") + ("attention A", "average E") * trace.has_rows
    left, cell, line, tile, gap, top = 84, max(1, 660 // steps), max(10, min(30, 180 // len(layers))), 120, 6, 84
    width, height, right = steps * cell, line * len(layers), left + steps * cell + 130
    page = Image.new("RGB", (right + 3 * (tile + gap) + 6, max(2 * height + 480, top + 5 * (tile + gap) + 4)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=14)

    def text(x: float, y: float, string: str, anchor: str = "rm"):
        pen.multiline_text((x, y), string, fill="black", font=font, anchor=anchor, align="center")

    def box(x: float, y: float, wide: float, high: float, **style):
        pen.rectangle((x, y, x + wide - 1, y + high - 1), **style)

    def steps_by_blocks(y: float, title: str, values: Sequence[Tensor], colors: Sequence[str]):
        """A picture of one column (L,) in [0, 1] per observed step, one line per block; other steps are grey."""
        table = np.full((len(layers), steps), np.nan)
        table[:, observed] = torch.stack(list(values), dim=1).numpy()
        text(left, y - 6, title, "ld")
        for i, layer in enumerate(layers):
            text(left - 8, y + (i + 0.5) * line, f"block {layer}")
        picture = Image.fromarray(shade(table, *colors))
        page.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, round(y)))

    text(10, 10, "{checkpoint}: {sampler}, {steps} steps, w_e {emag:g}, w {cfg:g}, beta {beta:g}, strength "
         "{strength:g}, variant {variant}, {num} samples".format(**vars(trace.settings)), "la")
    bound = max(1.0, (len(layers) - 1) ** 0.5)                            # |z| ≤ √(L−1)
    steps_by_blocks(top, "z-score of the deviation, first sample (red high, blue low); outlined: the selected block",
                    [(entry.zscore[0] / bound + 1) / 2 for entry in entries], ("#2166ac", "#f7f7f7", "#b2182b"))
    selected = np.pad(torch.stack([entry.selected[0] for entry in entries], dim=1).int().numpy(), ((0, 0), (1, 1)))
    for i, changes in enumerate(np.diff(selected)):
        for first, end in changes.nonzero()[0].reshape(-1, 2) + observed[0]:                      # a run of steps
            box(left + first * cell, top + i * line, (end - first) * cell, line, outline="black", width=2)

    y = top + height + 10
    for name, members, color in (("observe", observed, "#9ecae1"), ("perturb", perturbed, "#fd8d3c")):
        text(left - 8, y + 6, name)
        box(left + members[0] * cell, y, (members[-1] + 1 - members[0]) * cell, 12, fill=color)
        y += 17
    for x, anchor, name in ((left, "la", "t = 1, noise"), (left + width, "ra", "t = 0, data")):
        text(x, y + 4, name, anchor)
    for step in moments:
        text(left + (step + 0.5) * cell, y + 4, str(step), "ma")

    y += 54
    steps_by_blocks(y, "share of the samples that chose a block (black: all)",
                    [entry.selected.double().mean(dim=0) for entry in entries], ("white", "#6a51a3", "black"))
    box(left, y, width, height, outline="#cccccc")

    y += height + 44
    high, sizes = page.height - y - 20, torch.stack([size for _, size in trace.perturbed]).numpy()        # (steps, B)
    text(left, y - 6, "size of clean - negative: mean over the samples, and from the smallest to the largest", "ld")
    height_of = (lambda size: y + high * (1 - size / max(sizes.max(), 1e-9)))
    for step, each in zip(perturbed, sizes):
        upper, lower = height_of(each.max()), height_of(each.min())
        box(left + step * cell, upper, cell, lower - upper + 1, fill="#dddddd")
    pen.line([(left + (step + 0.5) * cell, height_of(each.mean())) for step, each in zip(perturbed, sizes)],
             fill="black", width=2)
    box(left, y, width, high, outline="#cccccc")
    for size in (0.0, sizes.max()):
        text(left - 8, height_of(size), f"{size:.3g}")

    for i, name in enumerate(names):
        text(right - 8, top + i * (tile + gap) + tile / 2, name)
    for column, step in enumerate(moments):
        seen, _ = trace.perturbed[perturbed.index(step)]
        edge, block = right + column * (tile + gap), int(entries[observed.index(step)].selected[0].nonzero()[0])
        text(edge + tile / 2, top - 6, f"step {step}, t = {seen.t:.2f}\nblock {layers[block]}", "md")
        x0 = [to_x0(pred[:, :seen.x.shape[1]], seen.x, seen.t, prediction) for pred in (seen.clean, seen.negative)]
        clean, negative = to_images(torch.cat(x0), decoder)
        difference = clean.astype(int) - negative
        gain = max(1, round(127 / max(1, np.quantile(abs(difference), 0.99))))
        pictures = [clean, negative, (128 + gain * difference).clip(0, 255).astype(np.uint8)]
        if trace.has_rows:
            maps = torch.stack([rows[block] for rows in trace.rows[step]]).clamp(min=0)           # (2, N)
            maps = maps.view(2, trace.side, trace.side).numpy()
            pictures.extend(shade(maps / maps.max(), "white", "#fdbb84", "#b30000", "black"))
        for i, picture in enumerate(pictures):
            y = top + i * (tile + gap)
            page.paste(Image.fromarray(picture).resize((tile, tile), Image.Resampling.NEAREST), (edge, y))
            box(edge, y, tile, tile, outline="#cccccc")
        text(edge + 4, top + 2 * (tile + gap) + 3, f"x{gain}", "la")
        for i in range(3, len(pictures)):
            (down, across), size = divmod(trace.token, trace.side), tile / trace.side
            y = top + i * (tile + gap) + down * size
            box(edge + across * size, y, size + 1, size + 1, outline="#2166ac", width=2)
    return page


@one_line_errors
def main(argv: Sequence[str] | None):
    parser, output = make_parser(__doc__)
    output.add_argument("--out", type=Path, default="trace.png", metavar="FILE.png", help="(default: trace.png)")
    args = parser.parse_args(argv)
    check_file("--out", args.out, ".png")
    model, meta, decoder, settings, labels = prepare(args)
    need(settings.emag != 1, "--emag 1: EMAG is off: need another scale, such as 2")
    if args.num is None:
        settings = dataclasses.replace(settings, num=min(settings.num, settings.batch))
    need(settings.num <= settings.batch,
         f"--num {settings.num}: the trace is of one batch: need at most {settings.batch}, or a larger --batch")
    print(settings, flush=True)
    trace = Trace(settings, model.config["input_size"] // model.config["patch_size"])
    progress, num = Progress(settings.num, settings.steps), settings.num
    sample(model, meta, labels[:num], range(num), settings, lambda step: (trace(step), progress(step)))
    save_png(draw(trace, meta["prediction"], decoder), args.out, settings)
    print(f"{args.out}: {settings.num} samples, {len(trace.perturbed)} of {settings.steps} steps perturbed")


if __name__ == "__main__":
    sys.exit(main())
