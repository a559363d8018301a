"""Draws samples from a diffusion transformer, guided by CFG and EMAG, and by APG and CADS with them.

    python sampler.py --emag 2.0          # the demo checkpoint; w_e = 1 is plain CFG, 0 shows the negative itself

Time t runs from 1 (noise) to 0 (data) everywhere. A velocity model has x_t = (1−t)·x₀ + t·ε and predicts v = ε − x₀; a
noise model has x_t = √ᾱ(t)·x₀ + √(1−ᾱ(t))·ε and predicts ε. Integration is in float64, the network in its own dtype.
"""
import argparse
import json
import math
import os
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageColor, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from dit import DiT, LatentDecoder, load_decoder, load_dit
from emag import EMAG, Window, cfg_update, emag_update

DEMO = Path(__file__).resolve().parent / "demo" / "emoji-flow.pt"

# ---------------------------------------------------------------------------------------------------------- schedules

TRAIN_STEPS = 1000
# DDPM's linear schedule: ᾱ at t = 0, 1/1000, …, 1. The literature's timestep i is t = (i+1)/1000; ᾱ(0) = 1 is data.
ALPHAS_BAR = torch.cat([torch.ones(1, dtype=torch.float64),
                        (1 - torch.linspace(1e-4, 0.02, TRAIN_STEPS, dtype=torch.float64)).cumprod(0)])


def alpha_bar(t: float) -> float:
    return ALPHAS_BAR[round(TRAIN_STEPS * t)].item()


# Between a prediction and the x̂₀ it stands for, at x_t.

def velocity_to_x0(v: Tensor, x: Tensor, t: float) -> Tensor:
    return x - t * v


def x0_to_velocity(x0: Tensor, x: Tensor, t: float) -> Tensor:
    return (x - x0) / t


def noise_to_x0(eps: Tensor, x: Tensor, t: float) -> Tensor:
    a = alpha_bar(t)
    return (x - (1 - a) ** 0.5 * eps) / a ** 0.5


def x0_to_noise(x0: Tensor, x: Tensor, t: float) -> Tensor:
    a = alpha_bar(t)
    return (x - a ** 0.5 * x0) / (1 - a) ** 0.5


TO_X0 = {"velocity": velocity_to_x0, "noise": noise_to_x0}
FROM_X0 = {"velocity": x0_to_velocity, "noise": x0_to_noise}


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
        x0 = noise_to_x0(eps, x, t)
        sigma = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)) ** 0.5
        x = a_next ** 0.5 * x0 + max(0.0, 1 - a_next - sigma ** 2) ** 0.5 * eps
        if sigma > 0:
            x = x + sigma * noise(x)
    return x


def ddpm(predict: Predict, x: Tensor, steps: int | Sequence[float], *,
         noise: Callable[[Tensor], Tensor] = torch.randn_like) -> Tensor:
    """Ancestral sampling of DDPM (Ho et al., arXiv 2006.11239, alg. 2) over respaced steps, variance learned or fixed.

    Where the prediction has twice the channels of x, its second half v gives the variance between its two bounds,
    log σ² = (v+1)/2·log β + (1−v)/2·log β̃ (Nichol & Dhariwal, arXiv 2102.09672, eq. 15); else σ² = β̃, since β leaves
    noise to be seen in the image where steps are few.
    """
    for step, (t, t_next) in enumerate(pairwise(ddpm_times(steps) if isinstance(steps, int) else steps)):
        a, a_next = alpha_bar(t), alpha_bar(t_next)
        beta = 1 - a / a_next                                             # of the respaced process
        eps, *learned = predict(x, t, step).split(x.shape[1], dim=1)
        x0 = noise_to_x0(eps, x, t)
        mean = (a_next ** 0.5 * beta * x0 + (1 - beta) ** 0.5 * (1 - a_next) * x) / (1 - a)     # of q(x_s | x_t, x₀)
        if t_next == 0:
            return mean
        beta_tilde = beta * (1 - a_next) / (1 - a)
        sigma = beta_tilde ** 0.5
        if learned:
            share = (learned[0] + 1) / 2
            sigma = ((share * math.log(beta) + (1 - share) * math.log(beta_tilde)) / 2).exp()
        x = mean + sigma * noise(x)
    return x


SAMPLERS = {"velocity": {"euler": euler, "heun": heun}, "noise": {"ddim": ddim, "ddpm": ddpm}}


class SampleNoise:
    """Standard normal noise from one generator a sample, seeded by (seed, index): other samples change nothing."""

    def __init__(self, seed: int, indices: Sequence[int]):
        seeds = [np.random.SeedSequence((seed, index)).generate_state(1, np.uint64).item() for index in indices]
        self.generators = [torch.Generator().manual_seed(each) for each in seeds]

    def __call__(self, like: Tensor) -> Tensor:
        noise = [torch.randn(like.shape[1:], generator=generator) for generator in self.generators]
        return torch.stack(noise).to(like)


# ----------------------------------------------------------------------------------------------------------- guidance


def network(model: DiT, meta: dict, variance: bool = False) -> Callable[[Tensor, float, Tensor], Tensor]:
    """The model as a function of (x, t, y) in this file's time and sign; no other place knows a checkpoint's own.

    variance: keep the channels of the output beyond the prediction, which `ddpm` reads.
    """
    to_network_time, sign = {"noise": (lambda t: TRAIN_STEPS * t - 1, 1),      # trained on timesteps i = 0…999
                             "rf": (lambda t: TRAIN_STEPS * t, 1),             # trained on 1000·t, v = ε − x₀
                             "sit": (lambda t: 1 - t, -1)                      # trained on 1 − t, v = x₀ − ε
                             }["noise" if meta["prediction"] == "noise" else meta.get("flow", "rf")]

    def predict(x: Tensor, t: float, y: Tensor) -> Tensor:
        times = torch.full((len(x),), to_network_time(t), device=x.device, dtype=torch.float32)
        out = model(x.to(model.pos_embed.dtype), times, y).to(x.dtype)
        return sign * (out if variance else out[:, :x.shape[1]])

    return predict


def apg(denoised: Tensor, denoised_null: Tensor, scale: float, previous: Tensor | float = 0.0, eta: float = 0.0,
        norm: float = math.inf, momentum: float = 0.0) -> tuple[Tensor, Tensor]:
    """Adaptive projected guidance (Sadat et al., arXiv 2410.02416, alg. 1): CFG on x̂₀, less what only saturates.

    d = D_c − D_∅ + m·d_prev;  D = D_c + (w−1)·(d_⊥ + η·d_∥), where d is first clipped to ‖d‖ ≤ ρ, sample by sample

    denoised, denoised_null: D_c, D_∅ (B, …).  previous: the d returned for the step before, 0 at the first.
    eta, norm, momentum: η ≥ 0, ρ > 0, m in (−1, 1).  Returns D and d before clipping, in float64.
    """
    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(dim=1).view(-1, *[1] * (a.ndim - 1))

    cond = denoised.double()
    d = cond - denoised_null.double() + momentum * previous
    clipped = d * (norm / dot(d, d).sqrt()).clamp(max=1)
    unit = torch.nn.functional.normalize(cond.flatten(1), dim=1).view_as(cond)
    parallel = dot(clipped, unit) * unit
    return cond + (scale - 1) * (clipped - parallel + eta * parallel), d


def cads(y: Tensor, t: float, noise: Callable[[Tensor], Tensor], tau1: float, tau2: float, s: float,
         psi: float) -> Tensor:
    """Condition-annealed sampling (Sadat et al., arXiv 2310.17347): condition embeddings (B, D) with noise on them.

    ŷ = √γ·y + s·√(1−γ)·n, and then ψ·(ŷ with y's mean and std) + (1−ψ)·ŷ
    γ = 1 for t ≤ τ₁, 0 for t ≥ τ₂, linear between.  Where it is 1, y comes back untouched and no noise is drawn.

    tau1, tau2: 0 ≤ τ₁ ≤ τ₂ ≤ 1.  s > 0.  psi: ψ in [0, 1].
    """
    if t <= tau1:
        return y
    gamma = max(0.0, (tau2 - t) / (tau2 - tau1)) if tau2 > tau1 else 0.0
    clean = y.double()
    noisy = gamma ** 0.5 * clean + s * (1 - gamma) ** 0.5 * noise(clean)
    std, mean = torch.std_mean(clean, dim=1, keepdim=True)
    noisy_std, noisy_mean = torch.std_mean(noisy, dim=1, keepdim=True)
    rescaled = (noisy - noisy_mean) / noisy_std * std + mean
    return (psi * rescaled + (1 - psi) * noisy).to(y.dtype)


def guided(net: Callable, y: Tensor, null: Tensor, *, steps: int, cfg: float = 1.0, emag: EMAG | None = None,
           emag_scale: float = 1.0, window: Window = Window(), channels: int | None = None,
           prediction: str = "velocity", apg_settings: Sequence[float] | None = None,
           cads_settings: Sequence[float] | None = None, noise: Callable[[Tensor], Tensor] = torch.randn_like,
           watch: Callable = lambda *step: None) -> Predict:
    """The guided prediction as the samplers call it, for one trajectory: ε̃ = ε_∅ + w·(ε' + w_e·(ε − ε') − ε_∅).

    y, null: labels of the condition and of ∅, (B,), or embeddings (B, D), which CADS needs. For unconditional EMAG y is
    ∅ too, and cfg is 1.
    channels: how many of the first channels are guided, None for those of x; the others stay the conditional ones.
    prediction: what `net` gives, "velocity" or "noise"; only APG, which works on x̂₀, has to know.
    apg_settings: (η, ρ, m), for APG in the place of CFG's formula.  cads_settings: (τ₁, τ₂, s, ψ), with `noise`.
    watch: called once a step, with (step, t, x, ε, ε'), ε' being None outside the perturb window.
    A scale of 1 costs nothing: no null prediction is made for w = 1, no negative for w_e = 1.
    """
    if emag is not None:
        emag.reset()
    condition, d, d_prev = y, 0.0, 0.0

    def predict(x: Tensor, t: float, step: int, update: bool = True) -> Tensor:
        nonlocal condition, d, d_prev
        batch, count = len(x), channels or x.shape[1]
        active = emag is not None and emag_scale != 1
        if update:                       # a second evaluation of the step has the same condition and the same d_prev
            condition = y if cads_settings is None else cads(y, t, noise, *cads_settings)
            d_prev = d
        with emag.observe(slice(batch), update) if active and window.observes(step, steps) else nullcontext():
            if cfg == 1:
                clean = pred_null = net(x, t, condition)
            else:
                clean, pred_null = net(torch.cat([x, x]), t, torch.cat([condition, null])).split(batch)
        pred, negative = clean, None
        if active and window.perturbs(step, steps):
            with emag.perturb():
                negative = net(x, t, condition)
            pred = emag_update(clean, negative, emag_scale)
        if update:
            watch(step, t, x, clean, negative)
        if apg_settings is not None:
            cut, to_x0, from_x0 = x[:, :count], TO_X0[prediction], FROM_X0[prediction]
            x0, latest = apg(to_x0(pred[:, :count], cut, t), to_x0(pred_null[:, :count], cut, t), cfg, d_prev,
                             *apg_settings)
            pred = from_x0(x0, cut, t)
            d = latest if update else d
        elif cfg != 1:
            pred = cfg_update(pred, pred_null, cfg)
        return torch.cat([pred[:, :count], clean[:, count:]], dim=1)

    return predict


DEFAULTS = dict(variant="map", threshold=None, eta=0.0, guide_channels=None, uncond=False, apg=None, cads=None, seed=0,
                num=None)


@torch.inference_mode()
def sample(model: DiT, meta: dict, labels: Sequence[int], indices: Sequence[int], settings: dict,
           watch: Callable = lambda *step: None, query_token: int | None = None) -> tuple[Tensor, EMAG]:
    """One batch: (x (B, C, H, W) in float64, the EMAG object with its trace).

    labels: a class for each sample.  indices: the samples' numbers, which with the seed give their noise.
    settings: as the command line has them: sampler, steps, cfg, emag, layers, beta, strength, window, and DEFAULTS.
    watch: as for `guided`.  query_token: as for `EMAG`.
    """
    settings = DEFAULTS | settings
    device, config = model.pos_embed.device, model.config
    noise = SampleNoise(settings["seed"], indices)
    x = noise(torch.empty(len(labels), config["in_channels"], config["input_size"], config["input_size"],
                          dtype=torch.float64, device=device))
    null = torch.full((len(labels),), model.null_class, device=device)
    y = null if settings["uncond"] else torch.tensor(labels, device=device)
    if settings["cads"]:
        y, null = model.y_embedder(y), model.y_embedder(null)
    emag = EMAG(model.blocks, settings["layers"], beta=settings["beta"], strength=settings["strength"],
                variant=settings["variant"], threshold=settings["threshold"], query_token=query_token)
    predict = guided(network(model, meta, variance=settings["sampler"] == "ddpm"), y, null, steps=settings["steps"],
                     cfg=settings["cfg"], emag=emag, emag_scale=settings["emag"], window=Window(*settings["window"]),
                     channels=settings["guide_channels"], prediction=meta["prediction"], apg_settings=settings["apg"],
                     cads_settings=settings["cads"], noise=noise, watch=watch)
    extra = {"ddim": dict(eta=settings["eta"], noise=noise), "ddpm": dict(noise=noise)}.get(settings["sampler"], {})
    return SAMPLERS[meta["prediction"]][settings["sampler"]](predict, x, settings["steps"], **extra), emag


# ----------------------------------------------------------------------------------------------------------- pictures


@torch.inference_mode()
def to_images(x: Tensor, decoder: LatentDecoder | None = None) -> np.ndarray:
    """RGB in [−1, 1], (B, 3, H, W), or latents and their decoder, a few at a time → (B, H, W, 3) uint8."""
    if decoder is not None:
        x = torch.cat([decoder(part.float()) for part in x.split(2)])
    return rearrange(((x + 1) * 127.5).round().clamp(0, 255), "b c h w -> b h w c").to(torch.uint8).cpu().numpy()


def draw_grid(rows: Sequence[Sequence[np.ndarray]], labels: Sequence[str]) -> Image.Image:
    """Rows of equally large images (H, W, 3) uint8, enlarged to 96 pixels at least, a label to the left of each row."""
    zoom = math.ceil(96 / rows[0][0].shape[0])                    # so that five lines of label fit
    height, width = (side * zoom for side in rows[0][0].shape[:2])
    font, gap = ImageFont.load_default(size=16), 4
    left = round(max(font.getlength(line) for label in labels for line in label.splitlines())) + 16
    grid = Image.new("RGB", (left + max(map(len, rows)) * (width + gap), len(rows) * (height + gap) + gap), "white")
    draw = ImageDraw.Draw(grid)
    for r, (images, label) in enumerate(zip(rows, labels)):
        top = gap + r * (height + gap)
        draw.text((left - 8, top + height // 2), label, fill="black", font=font, anchor="rm", align="right")
        for c, image in enumerate(images):
            grid.paste(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST),
                       (left + c * (width + gap), top))
    return grid


def comparison(settings: dict) -> dict[str, dict]:
    """The rows of --compare: a label with the scales in it → settings."""
    plain = settings | dict(apg=None, cads=None)
    cfg, both = f"w {settings['cfg']:g}", f"w_e {settings['emag']:g}, w {settings['cfg']:g}"
    return {"no guidance": plain | dict(cfg=1.0, emag=1.0),
            f"CFG\n{cfg}": plain | dict(emag=1.0),
            f"EMAG\n{both}": plain,
            "EMAG + APG\n{}\neta {:g}, norm {:g},\nmomentum {:g}".format(both, *settings["apg"]):
                plain | dict(apg=settings["apg"]),
            "EMAG + CADS\n{}\ntau {:g} to {:g},\ns {:g}, psi {:g}".format(both, *settings["cads"]):
                plain | dict(cads=settings["cads"])}


def draw_comparison(model: DiT, meta: dict, decoder: LatentDecoder | None, labels: Sequence[int], settings: dict,
                    watch: Callable) -> Image.Image:
    """A row for each guidance, with its seconds per image, less the decoding; each column has the same noise."""
    rows, row_labels = [], []
    sample(model, meta, labels[:1], [0], settings | dict(steps=1))                                # to warm up
    for label, changed in comparison(settings).items():
        images, seconds = [], 0.0
        for start in range(0, len(labels), settings["batch"]):
            part, started = labels[start:start + settings["batch"]], time.perf_counter()
            x, _ = sample(model, meta, part, range(start, start + len(part)), changed, watch)
            x = x.to("cpu")                                                                       # waits for a GPU
            seconds += time.perf_counter() - started
            images.extend(to_images(x.to(model.pos_embed.device), decoder))
        rows.append(images)
        row_labels.append(f"{label}\n{seconds / len(labels):.2g} s an image")
    return draw_grid(rows, row_labels)


def shade(values: np.ndarray, *colors: str) -> np.ndarray:
    """Values in [0, 1] on a scale of evenly spaced colours, NaN in grey: (…,) → (…, 3) uint8."""
    stops = np.array([ImageColor.getrgb(color) for color in colors])
    at = np.linspace(0, 1, len(stops))
    rgb = np.stack([np.interp(values, at, stops[:, c]) for c in range(3)], axis=-1)
    return np.where(np.isnan(values)[..., None], 232, rgb.round()).astype(np.uint8)


def draw_trace(emag: EMAG, seen: Sequence[tuple], settings: dict, meta: dict, side: int,
               decoder: LatentDecoder | None = None) -> Image.Image:
    """What EMAG did to one batch. Left, over the steps: the first sample's z-scores, all samples' choices and ‖ε − ε'‖.
    Right, at three moments, of the first sample: x̂₀ by ε and by ε', and where a query token attends, by A and by E.

    seen: an entry for each perturbed step, (step, t, x, ε, ε' of the first sample, ‖ε − ε'‖ of every sample).
    side: height and width of the image in tokens.
    """
    steps, window, layers = settings["steps"], Window(*settings["window"]), emag.layers
    observed = [step for step in range(steps) if window.observes(step, steps)]
    perturbed = [step for step, *_ in seen]
    moments = list(dict.fromkeys((perturbed[0], perturbed[len(perturbed) // 2], perturbed[-1])))
    left, cell, row_height, tile, gap = 84, max(1, 660 // steps), max(10, min(30, 180 // len(layers))), 120, 6
    width, height, top, right = steps * cell, row_height * len(layers), 84, 84 + steps * cell + 130
    page = Image.new("RGB", (right + 3 * (tile + gap) + 6, max(2 * height + 480, top + 5 * (tile + gap) + 4)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=14)

    def text(x: float, y: float, string: str, anchor: str = "rm"):
        draw.multiline_text((x, y), string, fill="black", font=font, anchor=anchor, align="center")

    def steps_by_blocks(y: float, title: str, values: Sequence[Tensor], colors: Sequence[str]):
        """A picture of one row (L,) in [0, 1] for each observed step, a block below the other; other steps are grey."""
        table = np.full((len(layers), steps), np.nan)
        table[:, observed] = torch.stack(list(values), dim=1).numpy()
        text(left, y - 6, title, "ld")
        for row, layer in enumerate(layers):
            text(left - 8, y + (row + 0.5) * row_height, f"block {layer}")
        picture = Image.fromarray(shade(table, *colors))
        page.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, round(y)))

    text(10, 10, f"{settings['checkpoint']}: {settings['sampler']}, {steps} steps, w_e {settings['emag']:g}, "
         f"w {settings['cfg']:g}, beta {settings['beta']:g}, strength {settings['strength']:g}, "
         f"variant {settings['variant']}, {len(emag.trace[0].selected)} samples", "la")

    bound = max(1.0, (len(layers) - 1) ** 0.5)                                                    # |z| ≤ √(L−1)
    steps_by_blocks(top, "z-score of the deviation, first sample (red high, blue low); outlined: the selected block",
                    [(entry.zscore[0] / bound + 1) / 2 for entry in emag.trace], ("#2166ac", "#f7f7f7", "#b2182b"))
    selected = np.pad(torch.stack([entry.selected[0] for entry in emag.trace], dim=1).int().numpy(), ((0, 0), (1, 1)))
    for row, changes in enumerate(np.diff(selected)):
        for first, end in changes.nonzero()[0].reshape(-1, 2) + observed[0]:                      # a run of steps
            draw.rectangle((left + first * cell, top + row * row_height, left + end * cell - 1,
                            top + (row + 1) * row_height - 1), outline="black", width=2)

    y = top + height + 10
    for name, members, color in (("observe", observed, "#9ecae1"), ("perturb", perturbed, "#fd8d3c")):
        text(left - 8, y + 6, name)
        draw.rectangle((left + members[0] * cell, y, left + (members[-1] + 1) * cell - 1, y + 11), fill=color)
        y += 17
    for x, anchor, name in ((left, "la", "t = 1, noise"), (left + width, "ra", "t = 0, data")):
        text(x, y + 4, name, anchor)
    for step in moments:
        text(left + (step + 0.5) * cell, y + 4, str(step), "ma")

    y += 54
    steps_by_blocks(y, "share of the samples that chose a block (black: all)",
                    [entry.selected.double().mean(dim=0) for entry in emag.trace], ("white", "#6a51a3", "black"))
    draw.rectangle((left, y, left + width - 1, y + height - 1), outline="#cccccc")

    y, high = y + height + 44, page.height - (y + height + 44) - 20
    sizes = np.array([each for *_, each in seen])                                                  # (steps, B)
    text(left, y - 6, "size of clean - negative: mean over the samples, and from the smallest to the largest", "ld")
    height_of = (lambda size: y + high * (1 - size / max(sizes.max(), 1e-9)))
    for step, each in zip(perturbed, sizes):
        draw.rectangle((left + step * cell, height_of(each.max()), left + (step + 1) * cell - 1, height_of(each.min())),
                       fill="#dddddd")
    draw.line([(left + (step + 0.5) * cell, height_of(each.mean())) for step, each in zip(perturbed, sizes)],
              fill="black", width=2)
    draw.rectangle((left, y, left + width - 1, y + high), outline="#cccccc")
    for size in (0.0, sizes.max()):
        text(left - 8, height_of(size), f"{size:.3g}")

    for row, name in enumerate(("clean, x0", "negative, x0", "difference", "attention A", "average E")):
        text(right - 8, top + row * (tile + gap) + tile / 2, name)
    for column, step in enumerate(moments):
        _, t, x, *predictions, _ = seen[perturbed.index(step)]
        entry, edge = emag.trace[observed.index(step)], right + column * (tile + gap)
        block = int(entry.selected[0].nonzero()[0])
        text(edge + tile / 2, top - 6, f"step {step}, t = {t:.2f}\nblock {layers[block]}", "md")
        x0 = torch.cat([TO_X0[meta["prediction"]](pred[:, :x.shape[1]], x, t) for pred in predictions])
        clean, negative = to_images(x0, decoder)
        difference = clean.astype(int) - negative
        gain = max(1, round(127 / max(1, np.quantile(abs(difference), 0.99))))
        maps = entry.attention[0, block].reshape(2, side, side).numpy()
        pictures = [clean, negative, (128 + gain * difference).clip(0, 255).astype(np.uint8),
                    *shade(maps / maps.max(), "white", "#fdbb84", "#b30000", "black")]
        for row, picture in enumerate(pictures):
            y = top + row * (tile + gap)
            page.paste(Image.fromarray(picture).resize((tile, tile), Image.Resampling.NEAREST), (edge, y))
            draw.rectangle((edge, y, edge + tile - 1, y + tile - 1), outline="#cccccc")
        text(edge + 4, top + 2 * (tile + gap) + 3, f"x{gain}", "la")
        for row in (3, 4):
            x, y = (start + part * tile / side for start, part in (
                (edge, emag.query_token % side), (top + row * (tile + gap), emag.query_token // side)))
            draw.rectangle((x, y, x + tile / side, y + tile / side), outline="#2166ac", width=2)
    return page


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, renamed when all is written: `path` is never half there."""
    beside = path.with_name(f"{path.name}.tmp{os.environ.get('RANK', '')}")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def save_png(image: Image.Image, path: Path, settings: dict):
    """The settings go into the PNG's text chunk `settings`, as JSON."""
    info = PngInfo()
    info.add_text("settings", json.dumps(settings))
    with whole_file(path) as beside:
        image.save(beside, format="PNG", pnginfo=info)


def save_npz(path: Path, folder: Path, num: int):
    """Packs 000000.png … into arr_0, (num, H, W, 3) uint8, as the ADM evaluation suite reads it, an image at a time."""
    read = lambda index: np.asarray(Image.open(folder / f"{index:06d}.png"))                        # noqa: E731
    header = dict(descr="|u1", fortran_order=False, shape=(num, *read(0).shape))
    with whole_file(path) as beside, zipfile.ZipFile(beside, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for index in range(num):
                file.write(read(index).tobytes())


# ------------------------------------------------------------------------------------------------------- command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)


def numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


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
    add("--ckpt", type=Path, default=DEMO, help="the checkpoint, a file or a diffusers folder (default: the demo's)")
    add("--vae", type=Path, help="the decoder of a latent checkpoint: sd-vae-ft-ema or -mse, a folder or a file")
    add("--heads", type=int, help="attention heads, where a checkpoint is none of DiT-S, B, L, XL")
    add("--flow", choices=["rf", "sit"], help="the checkpoint predicts a velocity: rectified flow's, or SiT's")
    add("--emag", type=float, metavar="W_E", help="EMAG scale w_e: 1 is off, 0 shows the negative itself")
    add("--cfg", type=float, metavar="W", help="CFG scale w: 1 is off")
    add("--guide-channels", type=int, metavar="N", help="guide the first N channels alone (official DiT code: 3)")
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
    add("--apg", type=float, nargs="*", metavar="ETA NORM MOMENTUM",
        help="adaptive projected guidance in the place of CFG's formula (without numbers: 0 5 -0.5)")
    add("--cads", type=float, nargs="*", metavar="TAU1 TAU2 S PSI",
        help="condition-annealed sampling (without numbers: 0.6 0.9, a quarter of the embeddings' std, 1)")
    add("--classes", metavar="all|LIST", help="by number, or by name where the checkpoint has names (default: all)")
    add("--num", type=int, help="images in all, dealt to the classes in turn (default for a grid: 8 a class)")
    add("--batch", type=int, default=24, metavar="B")
    add("--seed", type=int, default=0, metavar="S")
    add("--out", type=Path, default=Path("samples.png"), metavar="FILE.png|FOLDER",
        help="a grid, or a folder for 000000.png …, where a run goes on that was interrupted")
    add("--npz", type=Path, metavar="FILE", help="with a folder: pack its images as arr_0 as well")
    add("--compare", action="store_true", help="a row each for no guidance, CFG, EMAG, EMAG + APG, EMAG + CADS")
    add("--trace", type=Path, metavar="FILE.png", help="draw what EMAG did to the first batch, as well")
    add("--latents", type=Path, metavar="FILE.npy", help="save what the network samples, (N, C, H, W), and no picture")
    add("--device", default="auto", help="auto takes cuda where there is one, else cpu")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
        help="the network's; auto is bfloat16 on cuda, else float32")
    return parser


def published_settings(model: DiT, meta: dict) -> dict:
    """For a checkpoint without settings of its own: DiT-XL/2's, or SD3's steps, scale and window for a velocity, with
    the candidates at DiT-XL/2's relative depth, 12–15 of 28 blocks."""
    depth = len(model.blocks)
    layers = list(range(depth * 12 // 28, max(depth * 16 // 28, depth * 12 // 28 + 1)))
    common = dict(cfg=1.5, layers=layers, beta=0.988, strength=1.0)
    if meta["prediction"] == "noise":
        return common | dict(sampler="ddpm", steps=250, emag=3.0, window=[0.6, 0.4, 0.2])
    return common | dict(sampler="euler", steps=28, emag=1.5, window=[1.0, 0.8, 0.2])


def resolve(args: argparse.Namespace, model: DiT, meta: dict) -> tuple[dict, list[int]]:
    """The settings in force, the command line's where given, else the checkpoint's, and the classes by number.

    Raises ValueError where a setting is out of range.
    """
    grid, names = args.out.suffix == ".png" and not args.latents, meta["class_names"]
    given = {name: getattr(args, name) for name in ("emag", "cfg", "guide_channels", "sampler", "steps", "eta", "beta",
                                                    "strength", "variant", "threshold", "window", "num")}
    settings = DEFAULTS | (meta["settings"] or published_settings(model, meta))
    settings |= {name: value for name, value in given.items() if value is not None}
    embeddings = model.y_embedder.embedding_table.weight
    for name, default in (("apg", [0.0, 5.0, -0.5]),                      # the APG paper's for DiT-XL/2
                          ("cads", [0.6, 0.9, round(embeddings.std().item() / 4, 4), 1.0])):
        values = [] if args.compare and not getattr(args, name) else getattr(args, name)
        if values is not None:
            settings[name] = values or default
            if len(settings[name]) != len(default):
                raise ValueError(f"--{name} {numbers(values)}: need {len(default)} numbers, or none for "
                                 f"{numbers(default)}")
    if args.layers is not None:
        settings["layers"] = parse_layers(args.layers)
    if args.classes is None and grid and model.null_class > 32:
        raise ValueError(f"--classes: {model.null_class} classes are too many for one grid: "
                         "name some, such as 207,360,387,974, or give a folder as --out")
    classes = parse_classes("all" if args.classes is None else args.classes, model.null_class, names)
    if settings["num"] is None:
        if not grid:
            raise ValueError("--num: say how many images to draw")
        settings["num"] = len(classes) * (1 if args.compare else 8)
    if args.uncond:
        settings["cfg"] = 1.0
    settings |= dict(uncond=args.uncond, seed=args.seed, batch=args.batch, checkpoint=args.ckpt.name,
                     classes=[names[number] if names else number for number in classes])
    if settings["sampler"] not in SAMPLERS[meta["prediction"]]:
        raise ValueError(f"--sampler {settings['sampler']}: a {meta['prediction']} model needs "
                         f"{' or '.join(SAMPLERS[meta['prediction']])}")
    channels = model.config["in_channels"]
    for flag, value, least, most in (
            ("--steps", settings["steps"], 1, TRAIN_STEPS), ("--num", settings["num"], 1, 10**6),
            ("--batch", args.batch, 1, 10**6), ("--seed", args.seed, 0, 2**63), ("--eta", settings["eta"], 0, 1),
            ("--guide-channels", settings["guide_channels"] or channels, 1, channels),
            ("--emag", settings["emag"], -1e6, 1e6), ("--cfg", settings["cfg"], -1e6, 1e6)):
        if not least <= value <= most:
            raise ValueError(f"{flag} is {value}: need at least {least:g} and at most {most:g}")
    if args.compare and (not grid or args.trace or settings["cfg"] == 1 or settings["emag"] == 1):
        raise ValueError("--compare: draws rows with and without CFG and EMAG: need a .png as --out, w and w_e other "
                         "than 1, and neither --uncond nor --trace")
    if settings["apg"]:
        eta, norm, momentum = settings["apg"]
        if not (0 <= eta <= 1e6 and norm > 0 and -1 < momentum < 1):
            raise ValueError(f"--apg {numbers(settings['apg'])}: need ETA ≥ 0, NORM > 0 and −1 < MOMENTUM < 1")
    if settings["cads"]:
        tau1, tau2, s, psi = settings["cads"]
        if not (0 <= tau1 <= tau2 <= 1 and 0 < s <= 1e6 and 0 <= psi <= 1):
            raise ValueError(f"--cads {numbers(settings['cads'])}: need 0 ≤ TAU1 ≤ TAU2 ≤ 1, S > 0 and 0 ≤ PSI ≤ 1")
    if settings["cads"] and args.uncond:
        raise ValueError("--cads: puts noise on the condition, and --uncond has none: leave one of them out")
    if settings["apg"] and settings["cfg"] == 1:
        raise ValueError("--apg: works on the difference to the null prediction, and w = 1 makes none: "
                         "give --cfg above 1, and no --uncond")
    if args.trace and (not grid or settings["emag"] == 1):
        raise ValueError("--trace: draws what EMAG does to a grid of images: "
                         "need a .png as --out, and w_e other than 1")
    Window(*settings["window"])
    EMAG(model.blocks, settings["layers"], beta=settings["beta"], strength=settings["strength"])
    return settings, classes


def check_outputs(args: argparse.Namespace):
    """Fails before the sampling, not after it, where an output cannot be written."""
    if args.npz and args.out.suffix == ".png":
        raise ValueError("--npz: need a folder as --out, whose images it packs")
    if args.out.suffix != ".png" and args.out.suffix.lower() in Image.registered_extensions():
        raise ValueError(f"--out {args.out}: need a file name that ends in .png, or a folder")
    if args.trace and (args.trace.suffix != ".png" or args.trace.resolve() == args.out.resolve()):
        raise ValueError(f"--trace {args.trace}: need a file name that ends in .png, another than --out {args.out}")
    for flag, path, folder in (("--out", None if args.latents else args.out, args.out.suffix != ".png"),
                               ("--npz", args.npz, False), ("--trace", args.trace, False),
                               ("--latents", args.latents, False)):
        if path is None:
            continue
        if not path.parent.is_dir() or (path.is_file() if folder else path.is_dir()):
            raise ValueError(f"{flag} {path}: need a {'folder' if folder else 'file'} in a folder that exists")
        try:
            probe = path.with_name(f"{path.name}.tmp{os.getpid()}")
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ValueError(f"{flag} {path}: cannot be written ({error.strerror})") from None


def choose_device(name: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """The device and the network's dtype that --device and --dtype ask for; under torchrun, a GPU for each process."""
    try:
        if name == "auto":
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float64, device=device)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError):
        raise ValueError(f"--device {name}: not usable here, or without float64; need auto, cpu or cuda") from None
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    return device, getattr(torch, dtype)


def claim_folder(folder: Path, settings: dict):
    """Makes the folder with its settings.json, or checks that what is there was made with the same settings."""
    file = folder / "settings.json"
    if file.is_file():
        there = json.loads(file.read_text(encoding="utf-8"))
        differing = [name for name in settings if there.get(name) != json.loads(json.dumps(settings[name]))]
        if differing:
            name = differing[0]
            raise ValueError(f"--out {folder}: made with {name} {there.get(name)}, not {settings[name]}: "
                             "give the same settings to go on, or another folder")
        return
    # Another rank may be writing its settings.json just now.
    if folder.is_dir() and any(not path.suffix.startswith(".tmp") for path in folder.iterdir()):
        raise ValueError(f"--out {folder}: holds files, and no settings.json: need a new or empty folder")
    folder.mkdir(exist_ok=True)
    with whole_file(file) as beside:
        beside.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    rank, processes = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    try:
        args = make_parser().parse_args(argv)
        check_outputs(args)
        device, dtype = choose_device(args.device, args.dtype)
        model, meta = load_dit(args.ckpt, args.heads)
        if args.flow:
            meta = meta | dict(prediction="velocity", flow=args.flow)
        if meta["latent"] and not (args.vae or args.latents):
            raise ValueError(f"{args.ckpt.name} samples latents: give --vae sd-vae-ft-ema to decode them, "
                             "or --latents FILE.npy to save them")
        decoder = load_decoder(args.vae).to(device) if args.vae else None
        settings, classes = resolve(args, model, meta)
        settings["dtype"] = str(dtype).removeprefix("torch.")
        to_folder = args.out.suffix != ".png" and not args.latents
        if processes > 1 and not to_folder:
            raise ValueError("torchrun: several processes need a folder as --out")
        if to_folder:
            claim_folder(args.out, settings)
    except ValueError as error:
        print(f"sampler.py: {error}", file=sys.stderr)
        return 2
    if rank == 0:
        print(json.dumps(settings), flush=True)
    if processes > 1:
        # For the barrier at the end alone. torchrun ends all processes when one fails, so there is no need to time out.
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
    model.to(device, dtype)
    num, started, done, seen = settings["num"], time.monotonic(), 0, []
    labels = [classes[i % len(classes)] for i in range(num)]

    def watch(step: int, t: float, x: Tensor, clean: Tensor, negative: Tensor | None):
        if sys.stderr.isatty() and rank == 0:
            print(f"\r{done} of {num} images done, step {step + 1} of {settings['steps']} ", end="", file=sys.stderr,
                  flush=True)
        if args.trace and done == 0 and negative is not None:
            sizes = (clean - negative)[:, :x.shape[1]].flatten(1).norm(dim=1).tolist()
            seen.append((step, t, x[:1], clean[:1], negative[:1], sizes))

    if args.compare:
        save_png(draw_comparison(model, meta, decoder, labels, settings, watch), args.out, comparison(settings))
    side = model.config["input_size"] // model.config["patch_size"]
    images, latents = [], []
    # Batch k holds samples k·B … k·B + B − 1, whoever draws it and however often a run was interrupted.
    for start in range(rank * args.batch, 0 if args.compare else num, processes * args.batch):
        indices = range(start, min(start + args.batch, num))
        files = {index: args.out / f"{index:06d}.png" for index in indices}
        if to_folder and all(file.exists() for file in files.values()):
            continue
        x, emag = sample(model, meta, labels[start:indices.stop], indices, settings, watch,
                         query_token=(side // 2) * (side + 1) if args.trace else None)
        if args.trace and start == 0:
            save_png(draw_trace(emag, seen, settings, meta, side, decoder), args.trace, settings)
        done += len(indices)
        if args.latents:
            latents.append(x.float().cpu().numpy())
            continue
        images.extend(to_images(x, decoder))
        if to_folder:
            for (index, file), image in zip(files.items(), images):
                if not file.exists():
                    save_png(Image.fromarray(image), file, settings | dict(index=index))
            images.clear()
    if sys.stderr.isatty() and rank == 0:
        print("\r\033[K", end="", file=sys.stderr)

    if processes > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if args.latents:
        with whole_file(args.latents) as beside, beside.open("wb") as file:
            np.save(file, np.concatenate(latents))
    elif images:
        rows = [images[r::len(classes)] for r in range(min(len(classes), num))]
        save_png(draw_grid(rows, [str(name) for name in settings["classes"]]), args.out, settings)
    elif args.npz and rank == 0:
        save_npz(args.npz, args.out, num)
    if rank == 0:
        print(f"{args.latents or args.out}: {num} images, {settings['sampler']} {settings['steps']} steps, "
              f"emag {settings['emag']:g} cfg {settings['cfg']:g}, {time.monotonic() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
