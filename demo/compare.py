"""Draws the same noise by several methods, one line each.

    python demo/compare.py                                  # no guidance, CFG, EMAG, EMAG and APG, EMAG and CADS
    python demo/compare.py --methods cfg negative emag

The flags are those of sampler.py; --apg and --cads give their numbers. A negative counts as one pass of the network,
though it starts at the block that was selected.
"""
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sampler import (Progress, Settings, check_file, draw_grid, make_parser, need, one_line_errors,  # noqa: E402
                     prepare, sample, save_png, to_images)

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
    parser, output = make_parser(__doc__)
    output.add_argument("--out", type=Path, default="compare.png", metavar="FILE.png", help="(default: compare.png)")
    output.add_argument("--methods", nargs="+", choices=METHODS, default=["none", "cfg", "emag", "apg", "cads"],
                        help="the lines; the negative is what EMAG guides away from (default: all but the negative)")
    args = parser.parse_args(argv)
    check_file("--out", args.out, ".png")
    args.apg, args.cads = args.apg or [], args.cads or []                 # by their defaults where no numbers are given
    need(not args.uncond and 1 not in (args.cfg, args.emag),
         "--uncond, --cfg and --emag: the lines are with and without: need a condition, and scales other than 1")
    model, meta, decoder, settings, labels = prepare(args, per_class=1)
    need(settings.emag != 1, "--emag: the settings say 1, which is off: need another")
    count, num = len(args.methods), settings.num
    need(count * num <= 10**4, f"--num {num}: {count} lines of a grid have room for {10**4 // count} each")
    print(settings, flush=True)

    lines, table, titles, rows = lines_of(settings, args.methods), [], [], []
    model.register_forward_pre_hook(lambda model, inputs: rows.append(len(inputs[0])))
    progress = Progress(count * num, settings.steps)
    for label, changed in lines.items():
        images = []
        for start in range(0, num, settings.batch):
            part = slice(start, start + settings.batch)
            images.extend(to_images(sample(model, meta, labels[part], range(num)[part], changed, progress), decoder))
        table.append(images)
        titles.append(f"{label}\n{sum(rows) / num:g} passes per image")
        rows.clear()
    save_png(draw_grid(table, titles), args.out, settings,
             lines={label: dataclasses.asdict(changed) for label, changed in lines.items()})
    print(f"{args.out}: {count} lines of {num} images")


if __name__ == "__main__":
    sys.exit(main())
