"""A number for fine detail: the distance of samples to the demo's held-out emoji, over scales of CFG and EMAG.

    pip install resvg-py && python bench/quality.py                     # draws the data on its first run: demo/train.py

Sliced Wasserstein distance between the 7×7 patches of two sets of images, on two levels of a Laplacian pyramid (Karras
et al., arXiv 1710.10196, section 5 and appendix C): fine is 32×32, coarse 16×16. It compares with the 5% of emoji that
no training step has seen, one sample for each with its class; "training images" stands for what a perfect model would
get. CFG alone is swept over w as well, since EMAG lengthens the guidance too and any one CFG point can be beaten.
"""
import argparse
import sys
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]
from dit import load_dit  # noqa: E402
from sampler import DEMO, sample  # noqa: E402
from train import load_data  # noqa: E402


def pyramid(images: Tensor) -> tuple[Tensor, Tensor]:
    """(fine, coarse): images (B, 3, 32, 32) less their own 16×16 version brought back up, and that version."""
    coarse = F.avg_pool2d(images, 2)
    return images - F.interpolate(coarse, scale_factor=2, mode="bilinear"), coarse


def patches(images: Tensor) -> Tensor:
    """All 7×7 patches at every second place, (P, 147), each channel brought to mean 0 and variance 1 over the set."""
    found = F.unfold(images, 7, stride=2).transpose(1, 2).reshape(-1, 3, 49)
    std, mean = torch.std_mean(found, dim=(0, 2), keepdim=True)
    return ((found - mean) / std).flatten(1)


def sliced_wasserstein(a: Tensor, b: Tensor, projections: int = 128) -> float:
    """Mean distance of the sorted projections of two equally large sets of patches on random directions."""
    directions = torch.randn(projections, a.shape[1], generator=torch.Generator().manual_seed(0))
    directions = directions / directions.norm(dim=1, keepdim=True)
    return torch.stack([((a @ part.T).sort(dim=0).values - (b @ part.T).sort(dim=0).values).abs().mean()
                        for part in directions.split(64)]).mean().item()


def distances(images: Tensor, reference: Tensor) -> list[float]:
    return [1000 * sliced_wasserstein(patches(a), patches(b)) for a, b in zip(pyramid(images), pyramid(reference))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, default=DEMO)
    parser.add_argument("--data", type=Path, default=ROOT / "demo" / "data")
    parser.add_argument("--cfg", type=float, nargs="+", default=[1.5, 2.5, 3.5])
    parser.add_argument("--emag", type=float, nargs="+", default=[1.0, 2.0, 3.0])
    parser.add_argument("--num", type=int, help="of the held-out images (default: all)")
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()

    model, meta = load_dit(args.ckpt)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    data = load_data(args.data)
    held_out = np.flatnonzero(data["held_out"])[:args.num]
    labels = data["labels"][held_out].tolist()
    rng, left = np.random.default_rng(0), np.flatnonzero(~data["held_out"])
    training = [rng.choice(left[data["labels"][left] == label]) for label in labels]
    to_float = lambda rows: torch.from_numpy(data["images"][rows]).float() / 127.5 - 1          # noqa: E731
    reference = to_float(held_out)

    settings = dict(meta["settings"])
    settings["steps"] = args.steps or settings["steps"]
    print(f"{args.ckpt.name}, {len(labels)} samples, {settings['sampler']} {settings['steps']} steps, "
          f"blocks {settings['layers']}, window {settings['window']}\n")
    print("| w | w_e | fine ×10³ | coarse ×10³ |\n| --- | --- | --- | --- |")
    print("| training images | | {:.1f} | {:.1f} |".format(*distances(to_float(training), reference)), flush=True)
    for cfg, scale in product(args.cfg, args.emag):
        parts = []
        for start in range(0, len(labels), 32):
            batch = labels[start:start + 32]
            parts.append(sample(model, meta, batch, range(start, start + len(batch)),
                                settings | dict(cfg=cfg, emag=scale))[0].float().cpu().clamp(-1, 1))
        found = distances(torch.cat(parts), reference)
        print("| {:g} | {:g} | {:.1f} | {:.1f} |".format(cfg, scale, *found), flush=True)


if __name__ == "__main__":
    main()
