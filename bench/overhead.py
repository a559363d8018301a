"""What EMAG costs: the time of whole trajectories relative to CFG's, beside the arithmetic floor.

    python bench/overhead.py                                        # 28 blocks, 384 wide, 256 tokens, on the CPU
    python bench/overhead.py --model DiT-XL/2 --dtype bf16          # on a GPU

All rows are measured in one run, in turns, so that a machine that slows down slows all of them; each is the median over
the rounds of its ratio to CFG in the same round. Weights are random: they decide which block is selected and nothing
else about the cost. The floor counts passes alone (`floor` below).

"authors' flow" is the structure of the paper's own code, at every step: a pass that makes the attention maps in the
candidate blocks for both halves of the batch, then a whole second pass, for both halves, that makes them again and
attends with the average in one block.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from einops import rearrange

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dit import DIT_SIZES, DiT  # noqa: E402
from emag import EMAG, Window, cfg_update, emag_update  # noqa: E402
from sampler import euler, guided, network  # noqa: E402

BETA = 0.988


def build(name: str) -> DiT:
    """A DiT of 256 tokens with random weights: NAME/PATCH of the paper's, or "small", 384 wide with 28 blocks."""
    width, depth, heads = (384, 28, 6) if name == "small" else DIT_SIZES[name.split("-")[1].split("/")[0]]
    model = DiT(input_size=32, patch_size=2, hidden_size=width, depth=depth, num_heads=heads, learn_sigma=False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if not parameter.any():                   # adaLN-Zero would make every block the identity, all maps alike
            parameter.data.normal_(0, 0.02, generator=generator)
    return model.eval().requires_grad_(False)


class AuthorsFlow:
    """Predictions with the passes and maps of the authors' code; layers and window as for EMAG."""

    def __init__(self, model: DiT, net, y, null, layers):
        self.net, self.labels, self.layers, self.ema, self.dev = net, torch.cat([y, null]), layers, {}, {}
        for index in layers:
            attention = model.blocks[index].attn
            attention.forward = lambda x, index=index, attention=attention: self.attend(index, attention, x)
        self.negative_in = None

    def attend(self, index: int, attention, x):
        q, k, v = rearrange(attention.qkv(x), "b n (three h d) -> three b h n d", three=3, h=attention.heads)
        attn = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
        if self.negative_in is None:
            old = self.ema.get(index, attn)
            self.ema[index] = BETA * old + (1 - BETA) * attn
            self.dev[index] = (self.ema[index] - attn).abs().mean()
        elif self.negative_in == index:
            attn = self.ema[index]
        return attention.proj(rearrange(attn @ v, "b h n d -> b n (h d)"))

    def __call__(self, x, t, step, update=True):
        both = torch.cat([x, x])
        self.negative_in = None
        pred, pred_null = self.net(both, t, self.labels).chunk(2)
        self.negative_in = max(self.layers, key=lambda index: self.dev[index].item())
        negative, _ = self.net(both, t, self.labels).chunk(2)
        return cfg_update(emag_update(pred, negative, 1.5), pred_null, 7.0)


def floor(emag: EMAG, window: Window, steps: int, depth: int) -> float:
    """1 + Σ over perturbed steps of (depth − ℓ*) / (2·depth·steps): CFG is two passes a step, a negative starts at ℓ*."""
    observed = [step for step in range(steps) if window.observes(step, steps)]
    starts = [emag.layers[int(entry.selected.any(0).nonzero()[0])] for step, entry in zip(observed, emag.trace)
              if window.perturbs(step, steps)]
    return 1 + sum(depth - start for start in starts) / (2 * depth * steps)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", choices=["small", *(f"DiT-{size}/2" for size in DIT_SIZES)])
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--batch", type=int, default=1, help="images drawn together")
    parser.add_argument("--steps", type=int, nargs=2, default=(50, 28), metavar=("DIT", "SD3"),
                        help="steps with the DiT settings (250 in the paper) and with the SD3 settings (28)")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model = build(args.model).to(device, dtype)
    plain = build(args.model).to(device, dtype)              # the authors' flow changes its own copy for good
    depth = len(model.blocks)
    y, null = (torch.full((args.batch,), label, device=device) for label in (1, model.null_class))
    x = torch.randn(args.batch, 4, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    net = network(model, dict(prediction="velocity"))

    def timed(predict, steps: int) -> float:
        torch.cuda.synchronize() if device == "cuda" else None
        started = time.perf_counter()
        euler(predict, x, steps)
        torch.cuda.synchronize() if device == "cuda" else None
        return time.perf_counter() - started

    published = [("DiT", args.steps[0], Window(0.6, 0.4, 0.2), range(depth * 12 // 28, depth * 16 // 28)),
                 ("SD3", args.steps[1], Window(1.0, 0.8, 0.2), range(depth // 4, depth // 3 + 1))]
    runs, floors = {}, {}
    for name, steps, window, layers in published:
        runs[name, "CFG"] = lambda steps=steps: timed(guided(net, y, null, steps=steps, cfg=7.0), steps)
        for label, reuse in (("EMAG", True), ("EMAG without reuse", False)):
            emag = EMAG(model.blocks, layers, beta=BETA, reuse=reuse)
            floors[name, label] = lambda emag=emag, window=window, steps=steps: floor(emag, window, steps, depth)
            runs[name, label] = lambda emag=emag, window=window, steps=steps: timed(
                guided(net, y, null, steps=steps, cfg=7.0, emag=emag, emag_scale=1.5, window=window), steps)
        runs[name, "authors' flow"] = lambda layers=layers, steps=steps: timed(
            AuthorsFlow(plain, network(plain, dict(prediction="velocity")), y, null, layers), steps)

    ratios, seconds = {key: [] for key in runs}, {key: [] for key in runs}
    with torch.inference_mode():
        for steps in args.steps:
            timed(guided(net, y, null, steps=2, cfg=7.0), 2)                              # warm up
        for _ in range(args.rounds):
            for key, run in runs.items():
                seconds[key].append(run())
                ratios[key].append(seconds[key][-1] / seconds[key[0], "CFG"][-1])

    machine = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.model}, {depth} blocks, {model.config['hidden_size']} wide, 256 tokens, {args.dtype}, batch {args.batch}, "
          f"{args.rounds} rounds, {machine}, torch {torch.__version__}\n")
    print("| settings | guidance | time / CFG | lowest…highest | floor | seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, steps, window, layers in published:
        for (group, label), values in ratios.items():
            if group == name:
                least = f"{floors[group, label]():.3f}" if label == "EMAG" else ""
                print(f"| {name}: {steps} steps, blocks {layers[0]}–{layers[-1]}, window {window.start:g}/{window.apply:g}/"
                      f"{window.stop:g} | {label} | {statistics.median(values):.3f} | {min(values):.3f}…{max(values):.3f} | "
                      f"{least} | {statistics.median(seconds[group, label]):.1f} |")


if __name__ == "__main__":
    main()
