"""What EMAG costs: the time of whole trajectories relative to CFG's, beside the arithmetic floor.

    python bench/overhead.py                                        # 28 blocks, 384 wide, 256 tokens, on the CPU
    python bench/overhead.py --model SD3-small                      # 24 joint blocks; needs `pip install diffusers`
    python bench/overhead.py --model DiT-XL/2 --dtype bf16          # on a GPU
    python bench/overhead.py --model SD3 --dtype bf16

The trajectories of one table run side by side, a step of each in turn, so that a machine that slows down slows all of
them; a ratio is that of the summed seconds, and the median over the rounds. Weights are random: they decide which
block is selected and nothing else about the cost. The floor counts passes alone (`floor` below).

"authors' flow" is the structure of the paper's own code, at every step: a pass that makes the attention maps in the
candidate blocks for both halves of the batch, then a whole second pass, for both halves, that makes them again and
attends with the average in one block.
"""
import argparse
import statistics
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dit import DIT_SIZES, DiT  # noqa: E402
from emag import EMAG, Window, cfg_update, emag_update  # noqa: E402
from sampler import APG, CADS, flow_times, guided, network  # noqa: E402

BETA, SCALE, CFG = 0.988, 1.5, 7.0
DIT_WINDOW, SD3_WINDOW = Window(0.6, 0.4, 0.2), Window(1.0, 0.8, 0.2)


def build_dit(name: str) -> DiT:
    """A DiT of 256 tokens with random weights: one of the paper's, or "small", 384 wide with 28 blocks."""
    width, depth, heads = (384, 28, 6) if name == "small" else DIT_SIZES[name.split("-")[1].split("/")[0]]
    model = DiT(input_size=32, patch_size=2, hidden_size=width, depth=depth, num_heads=heads, learn_sigma=False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if not parameter.any():                   # adaLN-Zero would make every block the identity, all maps alike
            parameter.data.normal_(0, 0.02, generator=generator)
    return model


def build_sd3(name: str) -> nn.Module:
    """SD3-Medium's transformer with random weights, or "SD3-small": as many blocks, 384 wide, 256 image tokens."""
    from diffusers import SD3Transformer2DModel
    small = dict(sample_size=32, num_attention_heads=6, caption_projection_dim=384) if name == "SD3-small" else dict(
        sample_size=128, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192)
    return SD3Transformer2DModel(num_layers=24, attention_head_dim=64, **small)


def sd3_network(model: nn.Module, device, dtype):
    """SD3 as a function of (x, t, y), with random prompt embeddings: a row for each label of y."""
    text, pooled = (torch.randn(2, *shape, device=device, dtype=dtype) for shape in ((77 + 256, 4096), (2048,)))

    def predict(x, t, y):
        times = torch.full((len(x),), 1000 * t, device=device)
        return model(x.to(dtype), encoder_hidden_states=text[y], pooled_projections=pooled[y], timestep=times,
                     return_dict=False)[0].to(x.dtype)

    return predict


class AuthorsFlow:
    """Predictions with the passes and maps of the authors' code, for DiT; it changes the model's blocks for good."""

    def __init__(self, model: DiT, net, y: Tensor, null: Tensor, layers):
        self.net, self.labels, self.layers, self.ema, self.dev = net, torch.cat([y, null]), layers, {}, {}
        for index in layers:
            attention = model.blocks[index].attn
            attention.forward = lambda x, index=index, attention=attention: self.attend(index, attention, x)
        self.negative_in = None

    def attend(self, index: int, attention: nn.Module, x: Tensor) -> Tensor:
        q, k, v = rearrange(attention.qkv(x), "b n (three h d) -> three b h n d", three=3, h=attention.heads)
        attn = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
        if self.negative_in is None:
            old = self.ema.get(index, attn)
            self.ema[index] = BETA * old + (1 - BETA) * attn
            self.dev[index] = (self.ema[index] - attn).abs().mean()
        elif self.negative_in == index:
            attn = self.ema[index]
        return attention.proj(rearrange(attn @ v, "b h n d -> b n (h d)"))

    def __call__(self, x: Tensor, t: float, step: int, update: bool = True) -> Tensor:
        both = torch.cat([x, x])
        self.negative_in = None
        pred, pred_null = self.net(both, t, self.labels).chunk(2)
        self.negative_in = max(self.layers, key=lambda index: self.dev[index].item())
        negative, _ = self.net(both, t, self.labels).chunk(2)
        return cfg_update(emag_update(pred, negative, SCALE), pred_null, CFG)


def floor(emag: EMAG, window: Window, steps: int, passes: int) -> float:
    """passes/2 + Σ over perturbed steps of (L − ℓ*) / (2·L·steps): L blocks, and CFG is two passes per step."""
    observed = [step for step in range(steps) if window.observes(step, steps)]
    starts = [emag.layers[int(entry.selected.any(0).nonzero()[0])] for step, entry in zip(observed, emag.trace)
              if window.perturbs(step, steps)]
    return passes / 2 + sum(len(emag.blocks) - start for start in starts) / (2 * len(emag.blocks) * steps)


@torch.inference_mode()
def side_by_side(predicts: dict, x: Tensor, times: list[float]) -> dict[str, float]:
    """Seconds that each guidance takes for an Euler trajectory over `times`, all of them advanced a step in turn."""
    states, seconds = dict.fromkeys(predicts, x), dict.fromkeys(predicts, 0.0)
    for step, (t, t_next) in enumerate(pairwise(times)):
        for label, predict in predicts.items():
            started = time.perf_counter()
            states[label] = states[label] + (t_next - t) * predict(states[label], t, step)
            if x.is_cuda:
                torch.cuda.synchronize()
            seconds[label] += time.perf_counter() - started
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small",
                        choices=["small", *(f"DiT-{size}/2" for size in DIT_SIZES), "SD3-small", "SD3"])
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--batch", type=int, default=1, help="images drawn together")
    parser.add_argument("--steps", type=int, nargs=2, default=(50, 28), metavar=("DIT", "SD3"),
                        help="steps with the DiT settings (250 in the paper) and with the SD3 settings (28)")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    torch.compiler.set_stance("default")                  # loads torch.compiler, a second's work that EMAG's first pass had
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    joint = args.model.startswith("SD3")
    torch.manual_seed(0)
    prepare = lambda model: model.to(device, dtype).eval().requires_grad_(False)                    # noqa: E731
    model = prepare((build_sd3 if joint else build_dit)(args.model))
    if joint:
        side, channels, image_tokens = model.config.sample_size, 16, slice(0, (model.config.sample_size // 2) ** 2)
        net, blocks, labels = sd3_network(model, device, dtype), model.transformer_blocks, (1, 0)
    else:
        side, channels, image_tokens = 32, 4, None
        net, blocks, labels = network(model, dict(prediction="velocity")), model.blocks, (1, model.null_class)
        copy = prepare(build_dit(args.model))
        copy_net = network(copy, dict(prediction="velocity"))
    depth = len(blocks)
    y, null = (torch.full((args.batch,), label, device=device) for label in labels)
    if not joint:
        y, null = model.y_embedder(y), model.y_embedder(null)              # CADS puts its noise on embeddings
    x = torch.randn(args.batch, channels, side, side, dtype=torch.float64).to(device)

    sd3_layers = range(depth // 4, depth // 3 + 1)                                # 6–8 of 24, 7–9 of 28
    groups = [("SD3", args.steps[1], SD3_WINDOW, sd3_layers)] if joint else [
        ("DiT", args.steps[0], DIT_WINDOW, range(depth * 12 // 28, depth * 16 // 28)),
        ("SD3", args.steps[1], SD3_WINDOW, sd3_layers)]
    machine = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.model}: {depth} blocks, {args.dtype}, batch {args.batch}, {args.rounds} rounds, {machine}, "
          f"torch {torch.__version__}\n")
    print("| settings | guidance | time / CFG | lowest…highest | floor | seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, steps, window, layers in groups:
        rows = {"no guidance": (None, dict(cfg=1.0)), "CFG": (None, {}), "EMAG": ({}, {}),
                "EMAG without reuse": (dict(reuse=False), {}), "EMAG-Q": (dict(variant="query"), {})}
        if joint:
            rows["EMAG-I"] = (dict(variant="image"), {})
        else:
            # Made anew for each trajectory, whose state they hold.
            apg = dict(combine=partial(APG, "velocity", CFG, 0.0, 5.0, -0.5))
            cads = dict(condition=partial(CADS, torch.randn_like, 0.6, 0.9, 0.005, 1.0))
            rows |= {"EMAG without CFG": ({}, dict(cfg=1.0)), "APG": (None, apg), "CADS": (None, cads),
                     "EMAG + APG": ({}, apg), "EMAG + CADS": ({}, cads)}
        emags = {label: EMAG(blocks, layers, beta=BETA, image_tokens=image_tokens, **options)
                 for label, (options, _) in rows.items() if options is not None}
        measured = []
        for _ in range(1 + args.rounds):
            predicts = {}
            for label, (_, options) in rows.items():
                made = {name: option() if callable(option) else option for name, option in options.items()}
                predicts[label] = guided(net, y, null, steps=steps, emag=emags.get(label), emag_scale=SCALE,
                                         window=window, **(dict(cfg=CFG) | made))
            if not joint:
                predicts["authors' flow"] = AuthorsFlow(copy, copy_net, y, null, layers)
            # The round before the first warms up, and a few steps are enough for that.
            measured.append(side_by_side(predicts, x, flow_times(steps)[:None if measured else 3]))
        for label in predicts:
            ratios = [seconds[label] / seconds["CFG"] for seconds in measured[1:]]
            least = ""
            if label in emags and emags[label].reuse:
                least = f"{floor(emags[label], window, steps, passes=1 if 'cfg' in rows[label][1] else 2):.3f}"
            print(f"| {name}: {steps} steps, blocks {layers[0]}–{layers[-1]}, window {window.start:g}/{window.apply:g}/"
                  f"{window.stop:g} | {label} | {statistics.median(ratios):.3f} | "
                  f"{min(ratios):.3f}…{max(ratios):.3f} | {least} | "
                  f"{statistics.median(seconds[label] for seconds in measured[1:]):.1f} |", flush=True)


if __name__ == "__main__":
    main()
