"""The command line that the recipes share."""
import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import guide  # noqa: F401, which finds the project's own folder
from sampler import one_line_errors


def command(doc: str, main: Callable[[argparse.Namespace], None], out: str, emag: float = 1.5,
            prompt: str = "a hummingbird at a flower"):
    """Runs main(args), with args.prompt, .seed, .out, .emag and .device, and ends the process.

    doc: the recipe's docstring.  out, emag, prompt: what args has where a flag is not given.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")                 # one line
    parser.add_argument("prompt", nargs="?", default=prompt, help=f"(default: {prompt})")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (default: 0)")
    parser.add_argument("--out", type=Path, default=Path(out), metavar="FILE", help=f"(default: {out})")
    parser.add_argument("--emag", type=float, default=emag, metavar="W_E", help=f"w_e; 1 is off (default: {emag})")
    args = parser.parse_args()
    if not args.out.absolute().parent.is_dir() or args.out.exists() and not args.out.is_file():
        parser.error(f"--out {args.out}: need a file in a folder that exists")
    args.device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    sys.exit(one_line_errors(main)(args))
