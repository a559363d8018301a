"""Draws samples from a diffusion transformer, guided by CFG and EMAG.

    python sampler.py --emag 2.0          # the demo checkpoint; w_e = 1 is plain CFG, 0 shows the negative itself

Time t runs from 1 (noise) to 0 (data) everywhere. A velocity model has x_t = (1−t)·x₀ + t·ε and predicts v = ε − x₀; a
noise model has x_t = √ᾱ(t)·x₀ + √(1−ᾱ(t))·ε and predicts ε. Integration is in float64, the network in its own dtype.
"""
import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from dit import DiT, load_dit
from emag import EMAG, Window, cfg_update, emag_update

DEMO = Path(__file__).resolve().parent / "demo" / "emoji-flow.pt"

# ---------------------------------------------------------------------------------------------------------- schedules

TRAIN_STEPS = 1000
# DDPM's linear schedule: ᾱ at t = 0, 1/1000, …, 1. The literature's timestep i is t = (i+1)/1000; ᾱ(0) = 1 is data.
ALPHAS_BAR = torch.cat([torch.ones(1, dtype=torch.float64),
                        (1 - torch.linspace(1e-4, 0.02, TRAIN_STEPS, dtype=torch.float64)).cumprod(0)])


def alpha_bar(t: float) -> float:
    return ALPHAS_BAR[round(TRAIN_STEPS * t)].item()


def flow_times(steps: int) -> list[float]:
    """steps + 1 times, evenly from 1 to 0."""
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()


def ddpm_times(steps: int) -> list[float]:
    """steps + 1 times: the training timesteps nearest to an even spacing of 999…0, as in DiT's sampler, and then 0."""
    return [(round(i) + 1) / TRAIN_STEPS for i in np.linspace(TRAIN_STEPS - 1, 0, steps)] + [0.0]


# ----------------------------------------------------------------------------------------------------------- samplers
#
# predict(x, t, step, update=True) is the guided prediction at time t; `step` counts from 0, and update=False marks a
# second evaluation within one step. `steps` is their number n, or the n + 1 times themselves, from noise to data.

Predict = Callable[..., Tensor]


def euler(predict: Predict, x: Tensor, steps: int | Sequence[float]) -> Tensor:
    """Euler's method on the flow dx/dt = v(x, t)."""
    for step, (t, t_next) in enumerate(pairwise(flow_times(steps) if isinstance(steps, int) else steps)):
        x = x + (t_next - t) * predict(x, t, step)
    return x


def heun(predict: Predict, x: Tensor, steps: int | Sequence[float]) -> Tensor:
    """Heun's method on dx/dt = v(x, t), with an Euler step into t = 0 (Karras et al., arXiv 2206.00364, alg. 1)."""
    for step, (t, t_next) in enumerate(pairwise(flow_times(steps) if isinstance(steps, int) else steps)):
        v = predict(x, t, step)
        x_euler = x + (t_next - t) * v
        if t_next > 0:
            v = (v + predict(x_euler, t_next, step, update=False)) / 2
        x = x + (t_next - t) * v
    return x


def ddim(predict: Predict, x: Tensor, steps: int | Sequence[float], *, eta: float = 0.0,
         noise: Callable[[Tensor], Tensor] = torch.randn_like) -> Tensor:
    """DDIM (Song et al., arXiv 2010.02502, eq. 12 and 16): η = 0 is deterministic, η = 1 as noisy as DDPM."""
    for step, (t, t_next) in enumerate(pairwise(ddpm_times(steps) if isinstance(steps, int) else steps)):
        a, a_next = alpha_bar(t), alpha_bar(t_next)
        eps = predict(x, t, step)
        x0 = (x - (1 - a) ** 0.5 * eps) / a ** 0.5
        sigma = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)) ** 0.5
        x = a_next ** 0.5 * x0 + max(0.0, 1 - a_next - sigma ** 2) ** 0.5 * eps
        if sigma > 0:
            x = x + sigma * noise(x)
    return x


SAMPLERS = {"velocity": {"euler": euler, "heun": heun}, "noise": {"ddim": ddim}}


class SampleNoise:
    """Standard normal noise from one generator a sample, seeded by (seed, index): other samples change nothing."""

    def __init__(self, seed: int, indices: Sequence[int]):
        seeds = [np.random.SeedSequence((seed, index)).generate_state(1, np.uint64).item() for index in indices]
        self.generators = [torch.Generator().manual_seed(each) for each in seeds]

    def __call__(self, like: Tensor) -> Tensor:
        noise = [torch.randn(like.shape[1:], generator=generator) for generator in self.generators]
        return torch.stack(noise).to(like)


# ----------------------------------------------------------------------------------------------------------- guidance


def network(model: DiT, meta: dict) -> Callable[[Tensor, float, Tensor], Tensor]:
    """The model as a function of (x, t, y) in this file's time and sign; no other place knows a checkpoint's own."""
    to_network_time = {"velocity": lambda t: TRAIN_STEPS * t,                  # trained on 1000·t
                       "noise": lambda t: TRAIN_STEPS * t - 1}[meta["prediction"]]         # trained on i = 0…999

    def predict(x: Tensor, t: float, y: Tensor) -> Tensor:
        times = torch.full((len(x),), to_network_time(t), device=x.device, dtype=torch.float32)
        return model(x.to(model.pos_embed.dtype), times, y)[:, :x.shape[1]].to(x.dtype)

    return predict


def guided(net: Callable, y: Tensor, null: Tensor, *, steps: int, cfg: float = 1.0, emag: EMAG | None = None,
           emag_scale: float = 1.0, window: Window = Window()) -> Predict:
    """The guided prediction as the samplers call it, for one trajectory: ε̃ = ε_∅ + w·(ε' + w_e·(ε − ε') − ε_∅).

    y, null: labels of the condition and of ∅, (B,). For unconditional EMAG y is ∅ too, and cfg is 1.
    A scale of 1 costs nothing: no null prediction is made for w = 1, no negative for w_e = 1.
    """
    if emag is not None:
        emag.reset()

    def predict(x: Tensor, t: float, step: int, update: bool = True) -> Tensor:
        batch = len(x)
        active = emag is not None and emag_scale != 1
        with emag.observe(slice(batch), update) if active and window.observes(step, steps) else nullcontext():
            if cfg == 1:
                pred = pred_null = net(x, t, y)
            else:
                pred, pred_null = net(torch.cat([x, x]), t, torch.cat([y, null])).split(batch)
        if active and window.perturbs(step, steps):
            with emag.perturb():
                negative = net(x, t, y)
            pred = emag_update(pred, negative, emag_scale)
        return pred if cfg == 1 else cfg_update(pred, pred_null, cfg)

    return predict


@torch.inference_mode()
def sample(model: DiT, meta: dict, labels: Sequence[int], indices: Sequence[int], settings: dict,
           progress: Callable[[int], None] = lambda step: None) -> tuple[Tensor, EMAG]:
    """One batch: (x (B, C, H, W) in float64, the EMAG object with its trace).

    labels: a class for each sample.  indices: the samples' numbers, which with the seed give their noise.
    """
    device, config = model.pos_embed.device, model.config
    noise = SampleNoise(settings["seed"], indices)
    x = noise(torch.empty(len(labels), config["in_channels"], config["input_size"], config["input_size"],
                          dtype=torch.float64, device=device))
    null = torch.full((len(labels),), model.null_class, device=device)
    y = null if settings["uncond"] else torch.tensor(labels, device=device)
    emag = EMAG(model.blocks, settings["layers"], beta=settings["beta"], strength=settings["strength"],
                variant=settings["variant"], threshold=settings["threshold"])
    predict = guided(network(model, meta), y, null, steps=settings["steps"], emag=emag, emag_scale=settings["emag"],
                     cfg=1.0 if settings["uncond"] else settings["cfg"], window=Window(*settings["window"]))

    def reporting(x: Tensor, t: float, step: int, update: bool = True) -> Tensor:
        progress(step)
        return predict(x, t, step, update)

    extra = dict(eta=settings["eta"], noise=noise) if settings["sampler"] == "ddim" else {}
    return SAMPLERS[meta["prediction"]][settings["sampler"]](reporting, x, settings["steps"], **extra), emag


# ----------------------------------------------------------------------------------------------------------- pictures


def to_images(x: Tensor) -> np.ndarray:
    """RGB in [−1, 1], (B, 3, H, W) → (B, H, W, 3) uint8."""
    return rearrange(((x + 1) * 127.5).round().clamp(0, 255), "b c h w -> b h w c").to(torch.uint8).cpu().numpy()


def draw_grid(rows: Sequence[Sequence[np.ndarray]], labels: Sequence[str], zoom: int) -> Image.Image:
    """Rows of equally large images (H, W, 3) uint8, enlarged `zoom` times, a label to the left of each row."""
    height, width = (side * zoom for side in rows[0][0].shape[:2])
    font, gap = ImageFont.load_default(size=16), 4
    left = round(max(font.getlength(label) for label in labels)) + 16
    grid = Image.new("RGB", (left + max(map(len, rows)) * (width + gap), len(rows) * (height + gap) + gap), "white")
    draw = ImageDraw.Draw(grid)
    for r, (images, label) in enumerate(zip(rows, labels)):
        top = gap + r * (height + gap)
        draw.text((left - 8, top + height // 2), label, fill="black", font=font, anchor="rm")
        for c, image in enumerate(images):
            grid.paste(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST),
                       (left + c * (width + gap), top))
    return grid


def save_png(image: Image.Image, path: Path, settings: dict):
    """Writes beside the file and renames; the settings go into the PNG's text chunk `settings`, as JSON."""
    info = PngInfo()
    info.add_text("settings", json.dumps(settings))
    beside = path.with_name(path.name + ".tmp")
    image.save(beside, format="PNG", pnginfo=info)
    beside.replace(path)


# ------------------------------------------------------------------------------------------------------- command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)


def parse_layers(text: str) -> list[int]:
    """"4-7" or "4,5,9" → [4, 5, 6, 7] or [4, 5, 9]."""
    layers = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or not (last or first).isdigit() or int(last or first) < int(first):
            raise ValueError(f"--layers {text}: need block numbers such as 4-7 or 4,5,9")
        layers += range(int(first), int(last or first) + 1)
    return layers


def parse_classes(text: str, num_classes: int, names: Sequence[str]) -> list[int]:
    """"all", or numbers and names with commas between them → class numbers."""
    if text == "all":
        return list(range(num_classes))
    classes = [names.index(part) if part in names else int(part) if part.isdigit() else -1 for part in text.split(",")]
    if not all(0 <= number < num_classes for number in classes):
        allowed = f"0…{num_classes - 1}" + (f" or {', '.join(names)}" if names else "")
        raise ValueError(f"--classes {text}: need all, or of {allowed}, with commas between")
    return classes


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="sampler.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", type=Path, default=DEMO, help="the checkpoint (default: the demo's)")
    add("--emag", type=float, metavar="W_E", help="EMAG scale w_e: 1 is off, 0 shows the negative itself")
    add("--cfg", type=float, metavar="W", help="CFG scale w: 1 is off")
    add("--uncond", action="store_true", help="unconditional: maps and negative from the null condition, no CFG")
    add("--sampler", choices=[name for group in SAMPLERS.values() for name in group])
    add("--steps", type=int, metavar="N")
    add("--eta", type=float, help="ddim's noise: 0 none, 1 as ddpm (default 0)")
    add("--layers", metavar="A-B", help="candidate blocks, from 0")
    add("--beta", type=float, help="EMA decay β in [0, 1]")
    add("--strength", type=float, help="blend λ in [0, 1]")
    add("--variant", choices=["map", "image", "query"], help="what the EMA is of: EMAG, EMAG-I, EMAG-Q")
    add("--threshold", type=float, metavar="Z", help="select every block of z ≥ Z, not the argmax alone")
    add("--window", type=float, nargs=3, metavar=("START", "APPLY", "STOP"), help="1 ≥ START ≥ APPLY ≥ STOP ≥ 0")
    add("--classes", default="all", metavar="all|LIST", help="by number, or by name where the checkpoint has names")
    add("--num", type=int, help="images in all, dealt to the classes in turn (default: 8 a class)")
    add("--batch", type=int, default=24, metavar="B")
    add("--seed", type=int, default=0, metavar="S")
    add("--out", type=Path, default=Path("samples.png"), metavar="FILE.png")
    add("--device", default="auto", help="auto takes cuda where there is one, else cpu")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
        help="the network's; auto is bfloat16 on cuda, else float32")
    return parser


def resolve(args: argparse.Namespace, model: DiT, meta: dict) -> tuple[dict, list[int]]:
    """The settings in force, the command line's where given, else the checkpoint's, and the classes by number.

    Raises ValueError where a setting is out of range.
    """
    given = {name: getattr(args, name) for name in ("emag", "cfg", "sampler", "steps", "eta", "beta", "strength",
                                                    "variant", "threshold", "window")}
    settings = dict(variant="map", threshold=None, eta=0.0) | meta["settings"] | {
        name: value for name, value in given.items() if value is not None}
    if args.layers is not None:
        settings["layers"] = parse_layers(args.layers)
    names = meta["class_names"]
    classes = parse_classes(args.classes, model.null_class, names)
    settings |= dict(uncond=args.uncond, seed=args.seed, checkpoint=args.ckpt.name,
                     classes=[names[number] if names else number for number in classes])
    if args.uncond:
        settings["cfg"] = 1.0
    if settings["sampler"] not in SAMPLERS[meta["prediction"]]:
        raise ValueError(f"--sampler {settings['sampler']}: a {meta['prediction']} model needs "
                         f"{' or '.join(SAMPLERS[meta['prediction']])}")
    settings["num"] = 8 * len(classes) if args.num is None else args.num
    for flag, value, most in (("--steps", settings["steps"], TRAIN_STEPS), ("--num", settings["num"], None),
                              ("--batch", args.batch, None)):
        if value < 1 or (most and value > most):
            raise ValueError(f"{flag} is {value}: need at least 1" + (f" and at most {most}" if most else ""))
    for flag in ("emag", "cfg"):
        if not math.isfinite(settings[flag]):
            raise ValueError(f"--{flag} is {settings[flag]}: need a finite number")
    if args.seed < 0:
        raise ValueError(f"--seed is {args.seed}: need at least 0")
    if not 0 <= settings["eta"] <= 1:
        raise ValueError(f"--eta is {settings['eta']}: need 0 ≤ eta ≤ 1")
    Window(*settings["window"])
    EMAG(model.blocks, settings["layers"], beta=settings["beta"], strength=settings["strength"])
    return settings, classes


def check_output(path: Path):
    """Fails before the sampling, not after it, where `path` cannot be written."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"--out {path}: need a file name that ends in .png")
    if not path.parent.is_dir() or path.is_dir():
        raise ValueError(f"--out {path}: need a file in a folder that exists")
    try:
        probe = path.with_name(path.name + ".tmp")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--out {path}: cannot be written ({error.strerror})") from None


def choose_device(name: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """The device and the network's dtype that --device and --dtype ask for."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, dtype=torch.float64, device=device)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError):
        raise ValueError(f"--device {name}: not usable here, or without float64; need auto, cpu or cuda") from None
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    return device, getattr(torch, dtype)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = make_parser().parse_args(argv)
        check_output(args.out)
        device, dtype = choose_device(args.device, args.dtype)
        model, meta = load_dit(args.ckpt)
        settings, classes = resolve(args, model, meta)
    except ValueError as error:
        print(f"sampler.py: {error}", file=sys.stderr)
        return 2
    model.to(device, dtype)
    settings["dtype"] = str(dtype).removeprefix("torch.")
    num, started, images = settings["num"], time.monotonic(), []

    def progress(step: int):
        if sys.stderr.isatty():
            print(f"\r{len(images)} of {num} images done, step {step + 1} of {settings['steps']} ", end="",
                  file=sys.stderr, flush=True)

    for start in range(0, num, args.batch):
        indices = range(start, min(start + args.batch, num))
        x, _ = sample(model, meta, [classes[i % len(classes)] for i in indices], indices, settings, progress)
        images.extend(to_images(x))
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    rows = [images[r::len(classes)] for r in range(min(len(classes), num))]
    grid = draw_grid(rows, [str(name) for name in settings["classes"]], zoom=max(1, 96 // model.config["input_size"]))
    save_png(grid, args.out, settings)
    guidance = " ".join(f"{name} {settings[name]:g}" for name in ("emag", "cfg"))
    print(f"{args.out}: {num} images, {settings['sampler']} {settings['steps']} steps, {guidance}, "
          f"{time.monotonic() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
