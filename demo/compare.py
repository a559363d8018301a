"""Draws the same noise by several methods, one line each.

    python demo/compare.py --out demo/compare.png      # no guidance, CFG, EMAG, EMAG and APG, EMAG and CADS
    python demo/compare.py --methods cfg negative emag --out demo/negative.png

The flags are those of sampler.py; --apg and --cads give their numbers.
"""
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sampler import (Settings, check_file, draw_grid, make_parser, need, one_line_errors, prepare,  # noqa: E402
                     sample, save_png, to_images)

METHODS = ["none", "cfg", "negative", "emag", "apg", "cads"]


def lines_of(settings: Settings, methods: Sequence[str]) -> dict[str, Settings]:
    """A label with the scales in it → the settings of its line. `settings` has numbers for APG and for CADS."""
    plain, change = dataclasses.replace(settings, apg=None, cads=None), dataclasses.replace
    both = f"w_e {settings.emag:g}, w {settings.cfg:g}"
    lines = {"none": ("no guidance", change(plain, cfg=1.0, emag=1.0)),
             "cfg": (f"CFG\nw {settings.cfg:g}", change(plain, emag=1.0)),
             "negative": (f"the negative\nw_e 0, w {settings.cfg:g}", change(plain, emag=0.0)),
             "emag": (f"EMAG\n{both}", plain),
             "apg": ("EMAG + APG\n{}\neta {:g}, norm {:g},\nmomentum {:g}".format(both, *settings.apg),
                     change(plain, apg=settings.apg)),
             "cads": ("EMAG + CADS\n{}\ntau {:g} to {:g},\ns {:g}, psi {:g}".format(both, *settings.cads),
                      change(plain, cads=settings.cads))}
    return dict(lines[method] for method in methods)


@one_line_errors
def main(argv: Sequence[str] | None):
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, default="samples.png", metavar="FILE.png", help="(default: samples.png)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["none", "cfg", "emag", "apg", "cads"],
                        help="the lines; the negative is what EMAG guides away from (default: all but the negative)")
    args = parser.parse_args(argv)
    check_file("--out", args.out, ".png")
    need(not args.uncond, "--uncond: the lines differ in CFG too, which needs a condition: leave it out")
    need(1 not in (args.cfg, args.emag), "--cfg and --emag: the lines are with and without: need scales other than 1")
    args.apg, args.cads = args.apg or [], args.cads or []                 # by their defaults where no numbers are given
    model, meta, decoder, settings, labels = prepare(args, per_class=1)
    need(settings.emag != 1, "--emag: the checkpoint recommends 1, which is off: need another")

    sample(model, meta, labels[:1], [0], dataclasses.replace(settings, steps=1))      # so that no line is the first run
    lines, table, titles = lines_of(settings, args.methods), [], []
    for label, changed in lines.items():
        images, seconds = [], 0.0
        if sys.stderr and sys.stderr.isatty():
            print(label.splitlines()[0], end="\033[K\r", file=sys.stderr, flush=True)
        for start in range(0, settings.num, settings.batch):
            part, started = slice(start, start + settings.batch), time.perf_counter()
            x = sample(model, meta, labels[part], range(settings.num)[part], changed)
            device, x = x.device, x.cpu()                                 # waits for a GPU
            seconds += time.perf_counter() - started
            images.extend(to_images(x.to(device), decoder))
        table.append(images)
        titles.append(f"{label}\n{seconds / settings.num:.2g} s per image")
    save_png(draw_grid(table, titles), args.out, settings,
             lines={label: dataclasses.asdict(changed) for label, changed in lines.items()})
    print(f"{args.out}: {len(lines)} lines of {settings.num} images")


if __name__ == "__main__":
    sys.exit(main())
