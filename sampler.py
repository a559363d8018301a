"""Draws samples from a diffusion transformer, guided by CFG and EMAG, and by APG and CADS with them.

    python sampler.py --emag 2.0          # the demo checkpoint; w_e = 1 is plain CFG, 0 takes the negative for ε

Time t runs from 1 (noise) to 0 (data) everywhere. A velocity model has x_t = (1−t)·x₀ + t·ε and predicts v = ε − x₀; a
noise model has x_t = √ᾱ(t)·x₀ + √(1−ᾱ(t))·ε and predicts ε. The network runs in its own dtype and on its own device;
integration is in float64, on the CPU.
"""
import argparse
import dataclasses
import difflib
import json
import math
import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from dit import DiT, LatentDecoder, fingerprint, load_decoder, load_dit, naming, need
from emag import EMAG, Window, cfg_update, emag_update

DEMO = Path(__file__).resolve().parent / "demo" / "emoji-flow.pt"

# ---------------------------------------------------------------------------------------------------------- schedules

TRAIN_STEPS = 1000
# DDPM's linear schedule: ᾱ at t = 0, 1/1000, …, 1. The literature's timestep i is t = (i+1)/1000; ᾱ(0) = 1 is data.
ALPHAS_BAR = torch.cat([torch.ones(1, dtype=torch.float64),
                        (1 - torch.linspace(1e-4, 0.02, TRAIN_STEPS, dtype=torch.float64)).cumprod(0)])


def alpha_bar(t: float) -> float:
    return ALPHAS_BAR[round(TRAIN_STEPS * t)].item()


# A prediction at x_t and the x̂₀ that it stands for: x_t = x̂₀ + t·v, or x_t = √ᾱ·x̂₀ + √(1−ᾱ)·ε.
def coefficients(prediction: str, t: float) -> tuple[float, float]:
    return (1.0, t) if prediction == "velocity" else (alpha_bar(t) ** 0.5, (1 - alpha_bar(t)) ** 0.5)

def to_x0(pred: Tensor, x: Tensor, t: float, prediction: str) -> Tensor:
    a, b = coefficients(prediction, t)
    return (x - b * pred) / a

def from_x0(x0: Tensor, x: Tensor, t: float, prediction: str) -> Tensor:
    a, b = coefficients(prediction, t)
    return (x - a * x0) / b


# How a network was trained: the time that it is called with, as a function of t, and its sign.
NOISE = (lambda t: TRAIN_STEPS * t - 1, 1)            # timesteps i = 0…999
FLOWS = {"rf": (lambda t: TRAIN_STEPS * t, 1),        # 1000·t, v = ε − x₀
         "sit": (lambda t: 1 - t, -1),                # 1 − t, v = x₀ − ε
         "repa": (lambda t: t, 1)}                    # t itself, v = ε − x₀: REPA, minRF


def flow_times(steps: int) -> list[float]:
    """steps + 1 times, evenly from 1 to 0."""
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()


def ddpm_times(steps: int) -> list[float]:
    """steps + 1 times: of the training timesteps nearest to evenly spaced ones, as in DiT's sampler; then t = 0."""
    return [(round(i) + 1) / TRAIN_STEPS for i in np.linspace(TRAIN_STEPS - 1, 0, steps)] + [0.0]


# ----------------------------------------------------------------------------------------------------------- samplers
#
# predict(x, t, step, update=True) is the guided prediction at time t: `step` counts from 0, and update=False marks a
# second evaluation within one step. x is the noise, (B, C, H, W); `times` are n + 1 times from noise to data.

Predict = Callable[..., Tensor]
Noise = Callable[[Tensor], Tensor]            # standard normal noise, shaped like its argument


def euler(predict: Predict, x: Tensor, times: Sequence[float]) -> Tensor:
    """Euler's method on the flow dx/dt = v(x, t)."""
    for step, (t, t_next) in enumerate(pairwise(times)):
        x = x + (t_next - t) * predict(x, t, step)
    return x


def heun(predict: Predict, x: Tensor, times: Sequence[float]) -> Tensor:
    """Heun's method on dx/dt = v(x, t), with an Euler step into t = 0 (Karras et al., arXiv 2206.00364, alg. 1)."""
    for step, (t, t_next) in enumerate(pairwise(times)):
        v = predict(x, t, step)
        x_euler = x + (t_next - t) * v
        if t_next > 0:
            v = (v + predict(x_euler, t_next, step, update=False)) / 2
        x = x + (t_next - t) * v
    return x


def ddim(predict: Predict, x: Tensor, times: Sequence[float], *, eta: float = 0.0,
         noise: Noise = torch.randn_like) -> Tensor:
    """DDIM (Song et al., arXiv 2010.02502, eq. 12 and 16): η = 0 is deterministic, η = 1 as noisy as DDPM."""
    for step, (t, t_next) in enumerate(pairwise(times)):
        a, a_next = alpha_bar(t), alpha_bar(t_next)
        eps = predict(x, t, step)
        x0 = to_x0(eps, x, t, "noise")
        sigma = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)) ** 0.5
        x = a_next ** 0.5 * x0 + max(0.0, 1 - a_next - sigma ** 2) ** 0.5 * eps
        if sigma > 0:
            x = x + sigma * noise(x)
    return x


def ddpm(predict: Predict, x: Tensor, times: Sequence[float], *, noise: Noise = torch.randn_like) -> Tensor:
    """Ancestral sampling of DDPM (Ho et al., arXiv 2006.11239, alg. 2) over respaced steps, variance learned or fixed.

    Where the prediction has twice the channels of x, its second half v gives the variance between its two bounds,
    log σ² = (v+1)/2·log β + (1−v)/2·log β̃ (Nichol & Dhariwal, arXiv 2102.09672, eq. 15). Else σ² = β̃: with few steps
    the other bound, β, would leave visible noise in the image.
    """
    for step, (t, t_next) in enumerate(pairwise(times)):
        a, a_next = alpha_bar(t), alpha_bar(t_next)
        beta = 1 - a / a_next                                             # of the respaced process
        eps, *learned = predict(x, t, step).split(x.shape[1], dim=1)
        x0 = to_x0(eps, x, t, "noise")
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
TIMES = {"velocity": flow_times, "noise": ddpm_times}


class SampleNoise:
    """Standard normal noise with one generator per sample, seeded by (seed, index): other samples change nothing."""

    def __init__(self, seed: int, indices: Sequence[int]):
        seeds = [np.random.SeedSequence((seed, index)).generate_state(1, np.uint64).item() for index in indices]
        self.generators = [torch.Generator().manual_seed(each) for each in seeds]

    def __call__(self, like: Tensor) -> Tensor:
        noise = [torch.randn(like.shape[1:], generator=generator) for generator in self.generators]
        return torch.stack(noise).to(like)


# ----------------------------------------------------------------------------------------------------------- guidance

@dataclasses.dataclass(frozen=True)
class Step:
    """What one step of `guided` saw, for a `watch` that looks on."""
    emag: EMAG | None
    step: int                             # from 0
    t: float
    x: Tensor                             # (B, C, H, W)
    clean: Tensor                         # ε (B, C_out, H, W)
    pred_null: Tensor | None              # ε_∅, None where w = 1
    negative: Tensor | None               # ε', None outside the perturb window


def guided(net: Callable, y: Tensor, null: Tensor, *, steps: int, cfg: float = 1.0, emag: EMAG | None = None,
           emag_scale: float = 1.5, window: Window = Window(), channels: int | None = None,
           condition: Callable | None = None, combine: Callable | None = None,
           watch: Callable[[Step], None] | None = None) -> Predict:
    """EMAG with CFG as the samplers call it, for one trajectory: ε̃ = ε_∅ + w·(ε' + w_e·(ε − ε') − ε_∅).

    net(x, t, y): the network.  y, null: labels of the condition and of ∅, (B,), or embeddings (B, D). For unconditional
    EMAG y is ∅ too, and cfg is 1.  A scale of 1 costs nothing: w = 1 needs no null prediction, w_e = 1 no negative.
    channels: only the first so many channels are guided; None: as many as x has. The others are the conditional ε's.
    condition: condition(y, t, update) in the place of y (`CADS`).
    combine: combine(ε̃', ε_∅, x, t, update) in the place of CFG's formula (`APG`); needs w ≠ 1, which makes ε_∅.
    """
    guiding = emag is not None and emag_scale != 1
    if guiding:
        emag.reset()

    def predict(x: Tensor, t: float, step: int, update: bool = True) -> Tensor:
        cond = y if condition is None else condition(y, t, update)

        # ε, ε_∅: the clean pass, in which the conditional samples are observed
        with emag.observe(slice(len(x)), update) if guiding and window.observes(step, steps) else nullcontext():
            if cfg == 1:
                clean, pred_null = net(x, t, cond), None
            else:
                clean, pred_null = net(torch.cat([x, x]), t, torch.cat([cond, null])).chunk(2)

        # ε': the negative pass, of the conditional samples alone
        pred, negative = clean, None
        if guiding and window.perturbs(step, steps):
            with emag.perturb():
                negative = net(x, t, cond)
            pred = emag_update(clean, negative, emag_scale)               # ε̃' = ε' + w_e·(ε − ε')
        if watch is not None and update:
            watch(Step(emag, step, t, x, clean, pred_null, negative))

        first = slice(x.shape[1] if channels is None else channels)
        if combine is not None:
            pred = combine(pred[:, first], pred_null[:, first], x[:, first], t, update)
        elif cfg != 1:
            pred = cfg_update(pred[:, first], pred_null[:, first], cfg)   # ε̃ = ε_∅ + w·(ε̃' − ε_∅)
        return torch.cat([pred[:, first], clean[:, first.stop:]], dim=1)

    return predict


def apg(denoised: Tensor, denoised_null: Tensor, scale: float, previous: Tensor | float = 0.0, eta: float = 0.0,
        norm: float = math.inf, momentum: float = 0.0) -> tuple[Tensor, Tensor]:
    """Adaptive projected guidance (Sadat et al., arXiv 2410.02416, alg. 1): CFG on x̂₀ without the part that saturates.

    d = D_c − D_∅ + m·d_prev;  D = D_c + (w−1)·(d_⊥ + η·d_∥), where d is first clipped to ‖d‖ ≤ ρ, sample by sample

    denoised, denoised_null: D_c, D_∅ (B, …).  previous: the d returned for the step before, 0 at the first.
    eta, norm, momentum: η ≥ 0, ρ > 0, m in (−1, 1).  Returns D, and d before clipping (B, C·H·W): float64.
    """
    cond, null = denoised.double().flatten(1), denoised_null.double().flatten(1)
    d = cond - null + momentum * previous
    clipped = d * (norm / d.square().sum(dim=1, keepdim=True).sqrt()).clamp(max=1)
    unit = torch.nn.functional.normalize(cond, dim=1)
    parallel = (clipped * unit).sum(dim=1, keepdim=True) * unit
    return (cond + (scale - 1) * (clipped - parallel + eta * parallel)).view_as(denoised), d


class APG:
    """`apg` in the place of CFG's formula, for one trajectory: D_c is the x̂₀ of ε̃'. A second evaluation within one
    step has the same d_prev as the first."""

    def __init__(self, prediction: str, scale: float, eta: float, norm: float, momentum: float):
        self.prediction, self.settings = prediction, dict(scale=scale, eta=eta, norm=norm, momentum=momentum)
        self.previous = self.latest = 0.0

    def __call__(self, pred: Tensor, pred_null: Tensor, x: Tensor, t: float, update: bool) -> Tensor:
        previous = self.latest if update else self.previous
        denoised, denoised_null = (to_x0(each, x, t, self.prediction) for each in (pred, pred_null))
        x0, d = apg(denoised, denoised_null, previous=previous, **self.settings)
        if update:
            self.previous, self.latest = previous, d
        return from_x0(x0, x, t, self.prediction)


def cads(y: Tensor, t: float, noise: Noise, tau1: float, tau2: float, s: float, psi: float) -> Tensor:
    """Condition-annealed sampling (Sadat et al., arXiv 2310.17347): condition embeddings (B, D) with noise on them.

    ŷ = √γ·y + s·√(1−γ)·n, and then ψ·(ŷ with y's mean and std) + (1−ψ)·ŷ
    γ = 1 for t ≤ τ₁, 0 for t ≥ τ₂, linear between.  Where it is 1, y comes back untouched and no noise is drawn.
    0 ≤ τ₁ ≤ τ₂ ≤ 1, s > 0, ψ in [0, 1].
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


class CADS:
    """`cads` in the place of the condition, for one trajectory: all passes of a step share one noisy condition."""

    def __init__(self, noise: Noise, tau1: float, tau2: float, s: float, psi: float):
        self.settings = dict(noise=noise, tau1=tau1, tau2=tau2, s=s, psi=psi)

    def __call__(self, y: Tensor, t: float, update: bool) -> Tensor:
        if update:
            self.noisy = cads(y, t, **self.settings)
        return self.noisy


# ----------------------------------------------------------------------------------------------------------- settings

SCALE, SHARE, COUNT = (-1e6, 1e6), (0.0, 1.0), (1, 10**6)                 # a setting is whole where its limits are
LIMITS = dict(steps=(1, TRAIN_STEPS), cfg=SCALE, emag=SCALE, threshold=SCALE, beta=SHARE, strength=SHARE, eta=SHARE,
              guide_channels=COUNT, num=COUNT, batch=COUNT, seed=(0, 2**63))
CHOICES = dict(sampler=("euler", "heun", "ddim", "ddpm"), variant=("map", "image", "query"),
               dtype=("float32", "bfloat16", "float16"))


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that decides the pixels of a run, under the names of the flags. Raises ValueError where it cannot be run."""
    sampler: str                                  # euler or heun for a velocity, ddim or ddpm for noise
    steps: int
    cfg: float                                    # w; 1 is off
    emag: float                                   # w_e; 1 is off, 0 takes the negative for the prediction
    layers: tuple[int, ...]                       # the candidate blocks 𝓛, counted from 0
    beta: float = 0.988                           # EMA decay β
    strength: float = 1.0                         # blend λ
    variant: str = "map"                          # EMAG; "image" is EMAG-I, in a DiT the same, and "query" EMAG-Q
    threshold: float | None = None                # τ: every block with z ≥ τ is selected beside the argmax
    window: tuple[float, ...] = (1.0, 0.8, 0.2)   # start, apply, stop
    eta: float = 0.0                              # ddim's η
    guide_channels: int | None = None             # so many are guided; None: all
    uncond: bool = False                          # from the null condition alone
    apg: tuple[float, ...] | None = None          # η, ρ, m
    cads: tuple[float, ...] | None = None         # τ₁, τ₂, s, ψ
    classes: tuple[int | str, ...] = ()           # by name where there are names
    num: int | None = None                        # images in all
    batch: int = 24                               # images drawn together
    seed: int = 0
    heads: int | None = None                      # of the network's attention
    flow: str | None = None                       # which of FLOWS; None for a noise model
    dtype: str = "float32"                        # of the network
    checkpoint: str = ""                          # its name
    weights: str = ""                             # the fingerprint of what is in it
    vae: str | None = None                        # the fingerprint of the decoder's weights

    def __post_init__(self):
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if name in ("layers", "window", "apg", "cads", "classes"):    # JSON and argparse make lists
                object.__setattr__(self, name, tuple(value))
            if name in LIMITS:
                low, high = LIMITS[name]
                need(isinstance(value, (int, type(low))) and low <= value <= high,
                     f"--{name.replace('_', '-')} {value}: need a number from {low} to {high}")
            if name in CHOICES:
                need(value in CHOICES[name], f"--{name} {value}: need one of {', '.join(CHOICES[name])}")
        need(len(self.window) == 3, f"--window {self.window}: need START, APPLY and STOP")
        Window(*self.window)                                              # a ValueError where they are out of order
        a, c = self.apg or (0, 1, 0), self.cads or (0, 1, 1, 1)
        need(len(a) == 3 and 0 <= a[0] <= 1e6 and 0 < a[1] <= 1e6 and -1 < a[2] < 1,
             f"--apg {a}: need 0 ≤ ETA ≤ 1e6, 0 < NORM ≤ 1e6, −1 < MOMENTUM < 1, or no numbers")
        need(len(c) == 4 and 0 <= c[0] <= c[1] <= 1 and 0 < c[2] <= 1e6 and 0 <= c[3] <= 1,
             f"--cads {c}: need 0 ≤ TAU1 ≤ TAU2 ≤ 1, 0 < S ≤ 1e6, 0 ≤ PSI ≤ 1, or no numbers")
        need(self.cfg == 1 or not self.uncond, "--uncond: has no CFG: leave --cfg out")
        need(self.cfg != 1 or not self.apg, "--apg: needs a null prediction, and w = 1 makes none: give --cfg above 1")
        need(not (self.cads and self.uncond), "--cads: noises the condition, and --uncond has none: leave one out")
        need(self.eta == 0 or self.sampler == "ddim", f"--eta {self.eta:g}: {self.sampler} has none: leave it out")

    def __str__(self):
        """One line, without what is as by default."""
        chosen = [f"{field.name} {getattr(self, field.name)}" for field in dataclasses.fields(self)
                  if getattr(self, field.name) != field.default and field.name not in ("checkpoint", "weights", "vae")]
        return f"{self.checkpoint}: {', '.join(chosen)}"


# For checkpoints without settings of their own: DiT-XL/2's, or for a velocity SD3's steps, w_e and window. The
# candidates have DiT-XL/2's relative depth, 12–15 of 28 blocks.
PUBLISHED = {"noise": dict(sampler="ddpm", steps=250, cfg=1.5, emag=3.0, window=(0.6, 0.4, 0.2)),
             "velocity": dict(sampler="euler", steps=28, cfg=1.5, emag=1.5)}


# ----------------------------------------------------------------------------------------------------------- sampling

def network(model: DiT, meta: dict, variance: bool = False) -> Callable[[Tensor, float, Tensor], Tensor]:
    """The model as a function of (x, t, y) in this file's time and sign. Only this function knows the checkpoint's.

    variance: keep the channels of the output beyond the prediction, which `ddpm` reads.  Raises FloatingPointError.
    """
    to_network_time, sign = NOISE if meta["prediction"] == "noise" else FLOWS[meta.get("flow", "rf")]
    device, dtype = model.pos_embed.device, model.pos_embed.dtype

    def predict(x: Tensor, t: float, y: Tensor) -> Tensor:
        times = torch.full((len(x),), to_network_time(t), device=device, dtype=torch.float32)
        # Device and dtype one after the other, so that no float64 is asked of a device that has none.
        out = model(x.to(dtype).to(device), times, y.to(device)).to(x.device).to(x.dtype)
        if not out.isfinite().all():
            raise FloatingPointError(f"the network gives NaN or infinity at t = {t:.3g}: need --dtype float32, smaller "
                                     "scales or weights without NaN")
        return sign * (out if variance else out[:, :x.shape[1]])

    return predict


@torch.inference_mode()
def sample(model: DiT, meta: dict, labels: Sequence[int], indices: Sequence[int], settings: Settings,
           watch: Callable[[Step], None] | None = None, emag: EMAG | None = None,
           combine: Callable | None = None) -> Tensor:
    """One batch, (B, C, H, W) in float64, on the CPU: x is small, and not every device has float64.

    labels: one class per sample.  indices: the samples' numbers, which with the seed give their noise.
    watch, emag, combine: as for `guided`; the last two replace what the settings say.
    Raises FloatingPointError where the network's output is not finite, RuntimeError as EMAG does.
    """
    channels, side, noise = model.config["in_channels"], model.config["input_size"], SampleNoise(settings.seed, indices)
    x = noise(torch.empty(len(labels), channels, side, side, dtype=torch.float64))
    y = torch.tensor(labels, device=model.pos_embed.device)
    null = None if model.null_class is None else torch.full_like(y, model.null_class)
    y = null if settings.uncond else y
    condition = CADS(noise, *settings.cads) if settings.cads else None
    if condition:
        y, null = (None if each is None else model.y_embedder(each).cpu() for each in (y, null))
    if settings.apg and combine is None:
        combine = APG(meta["prediction"], settings.cfg, *settings.apg)
    emag = emag or EMAG(model.blocks, settings.layers, beta=settings.beta, strength=settings.strength,
                        variant=settings.variant, threshold=settings.threshold)
    predict = guided(network(model, meta, variance=settings.sampler == "ddpm"), y, null, steps=settings.steps,
                     cfg=settings.cfg, emag=emag, emag_scale=settings.emag, window=Window(*settings.window),
                     channels=settings.guide_channels, condition=condition, combine=combine, watch=watch)

    extra = {"ddim": dict(eta=settings.eta, noise=noise), "ddpm": dict(noise=noise)}.get(settings.sampler, {})
    sampler, times = SAMPLERS[meta["prediction"]][settings.sampler], TIMES[meta["prediction"]](settings.steps)
    return sampler(predict, x, times, **extra)


# ----------------------------------------------------------------------------------------------- pictures and files

@torch.inference_mode()
def to_images(x: Tensor, decoder: LatentDecoder | None = None) -> np.ndarray:
    """RGB in [−1, 1], (B, 3, H, W), or grey, (B, 1, H, W), or latents and their decoder → (B, H, W, 3) uint8."""
    if decoder is not None:
        device = next(decoder.parameters()).device
        x = torch.cat([decoder(part.float().to(device)) for part in x.split(2)])          # a few at a time
        if not x.isfinite().all():
            raise FloatingPointError("the decoder gives NaN or infinity: need smaller scales or another --vae")
    x = x.expand(-1, 3, -1, -1)
    return rearrange(((x + 1) * 127.5).round().clamp(0, 255), "b c h w -> b h w c").to(torch.uint8).cpu().numpy()


def draw_grid(table: Sequence[Sequence[np.ndarray]], labels: Sequence[str]) -> Image.Image:
    """Lines of images (H, W, 3) uint8, enlarged to at least 96 pixels, with a label to the left of each line."""
    zoom = math.ceil(96 / table[0][0].shape[0])                    # so that five lines of label fit
    height, width = (side * zoom for side in table[0][0].shape[:2])
    font, gap = ImageFont.load_default(size=16), 4
    left = round(max(font.getlength(line) for label in labels for line in label.splitlines())) + 16
    grid = Image.new("RGB", (left + max(map(len, table)) * (width + gap), len(table) * (height + gap) + gap), "white")
    for r, (images, label) in enumerate(zip(table, labels)):
        top = gap + r * (height + gap)
        ImageDraw.Draw(grid).text((left - 8, top + height // 2), label, "black", font, "rm", align="right")
        for c, image in enumerate(images):
            enlarged = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            grid.paste(enlarged, (left + c * (width + gap), top))
    return grid


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to. At the end it is renamed, unless it is gone: so `path` is never half there. A
    link to a file is followed.

    Raises ValueError where `path` cannot be written, or not replaced (on Windows, while another program has it open):
    then it says where the new file is."""
    try:
        target = Path(os.path.realpath(path))
        if not (target.is_file() and os.access(target, os.W_OK)) and os.path.lexists(path):
            raise OSError("is no regular file, or is read-only")
        beside = target.with_name(f".{platform.node()}-{os.getpid()}-{time.time_ns()}.tmp")
        try:
            yield beside
            try:
                if beside.exists():
                    beside.replace(target)
            except PermissionError as error:
                kept = beside.replace(target.with_name(f"{target.stem}-{time.time_ns()}{target.suffix}"))
                raise ValueError(f"{path}: cannot be replaced ({error.strerror}): written is {kept}") from None
        finally:
            beside.unlink(missing_ok=True)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{path}: cannot be written ({error.args[-1]}): need a regular file or a new name, "
                         "in a folder that exists and has room") from None


def check_file(flag: str, path: Path, suffix: str):
    """Before the sampling: ValueError where `path` has another suffix or cannot be written."""
    need(path.suffix == suffix, f"{flag} {path}: need a file name that ends in {suffix}")
    with whole_file(path) as probe:
        probe.write_bytes(bytes(4096))                                    # a full disk takes empty files
        probe.unlink()


def save_png(image: Image.Image, path: Path, settings: Settings, **more):
    """The settings, and what else is given, go into the PNG's text chunk `settings`, as JSON."""
    info = PngImagePlugin.PngInfo()
    info.add_text("settings", json.dumps(dataclasses.asdict(settings) | more))
    with whole_file(path) as beside:
        image.save(beside, format="PNG", pnginfo=info)


# ------------------------------------------------------------------------------------------------------- command line

def plain_parser(description: str) -> argparse.ArgumentParser:
    """One whose errors are ValueErrors, for `one_line_errors`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = lambda message: need(False, f"{message}: see --help")
    return parser


def make_parser(description: str) -> tuple[argparse.ArgumentParser, argparse._ArgumentGroup]:
    """The flags that sampler.py shares with the scripts in demo/ and bench/, and the group that takes their outputs."""
    parser, otherwise = plain_parser(description), "default: those of --like, or else what the checkpoint recommends"
    split = lambda text: text.split(",")                                                              # noqa: E731
    add = parser.add_argument_group("model").add_argument
    add("--ckpt", type=Path, default=DEMO, metavar="PATH", help="a file, or a diffusers folder (default: the demo's)")
    add("--vae", type=Path, metavar="PATH", help="the decoder of latents, sd-vae-ft-ema or -mse (default: none)")
    add("--device", default="auto", help="cpu, cuda, or mps, untested on a Mac (default: auto, cuda if there is one)")
    add("--dtype", default="auto", choices=("auto", *CHOICES["dtype"]),
        help="of the network (default: auto, bfloat16 on cuda, else float32)")
    add("--heads", type=int, help="of attention, where it is none of DiT-S, B, L, XL (default: the checkpoint's)")
    add("--flow", choices=FLOWS, help="a velocity as of rectified flow, SiT or REPA (default: the checkpoint's)")
    add = parser.add_argument_group("guidance", otherwise).add_argument
    add("--cfg", type=float, metavar="W", help="CFG scale: 1 is off")
    add("--emag", type=float, metavar="W_E", help="EMAG scale: 1 is off, 0 takes the negative for the prediction")
    add("--layers", type=split, metavar="LIST", help="the candidate blocks, counted from 0, such as 4-7 or 4,6")
    add("--beta", type=float, metavar="B", help="EMA decay β")
    add("--strength", type=float, metavar="L", help="blend λ")
    add("--variant", choices=CHOICES["variant"], help="EMAG, EMAG-I (in a DiT the same), or EMAG-Q")
    add("--threshold", type=float, metavar="Z", help="select every block with z ≥ Z beside the argmax")
    add("--window", type=float, nargs=3, metavar=("START", "APPLY", "STOP"),
        help="1 ≥ START ≥ APPLY ≥ STOP ≥ 0: of the steps left")
    add("--guide-channels", type=int, metavar="N", help="guide the first so many alone; official DiT code: 3")
    add("--uncond", action=argparse.BooleanOptionalAction, help="∅ alone, no CFG; published W_E for DiT: 7")
    add("--apg", type=float, nargs="*", metavar="ETA NORM MOMENTUM", help="APG for CFG's formula; no numbers: 0 5 -0.5")
    add("--cads", type=float, nargs="*", metavar="TAU1 TAU2 S PSI", help="CADS; no numbers: 0.6 0.9 EMBEDDING_STD/4 1")
    add = parser.add_argument_group("sampling", otherwise).add_argument
    add("--like", type=Path, metavar="FILE.png", help="the settings of a picture that these scripts drew; flags win")
    add("--sampler", choices=CHOICES["sampler"], help="two of velocity, two of noise")
    add("--steps", type=int, metavar="N", help="of the sampler")
    add("--eta", type=float, metavar="E", help="ddim's noise: 0 none, 1 as ddpm")
    add("--classes", type=split, metavar="all|LIST", help="by number, or by name where there are names")
    add("--num", type=int, metavar="N", help="images in all, dealt to the classes in turn; else some of each")
    add("--batch", type=int, metavar="N", help="images drawn together")
    add("--seed", type=int, metavar="N", help="of the noise")
    return parser, parser.add_argument_group("output")


def parse_numbers(flag: str, parts: Sequence[int | str], count: int, names: Sequence[str] = ()) -> list[int]:
    """Parts such as 4, "4", "4-7" or a name → the numbers below `count` that they stand for; ["all"] or [] → all."""
    known, numbers = {str(n): n for n in range(count)} | {name: n for n, name in enumerate(names)}, []
    for part in map(str, [] if list(parts) == ["all"] else parts):
        first, dash, last = (part, "", "") if part in known else part.partition("-")
        first, last = known.get(first, -1), known.get(last if dash else first, -1)
        if not 0 <= first <= last:
            nearest = sorted(names, key=lambda name: -difflib.SequenceMatcher(None, part[:60], name).ratio())
            raise ValueError(f"{flag} {part!r:.60}: need all, or of 0…{count - 1} such as 0,1 or 0-1"
                             + (", or of " + ", ".join(nearest) if names else ""))
        numbers += range(first, last + 1)
    return numbers or list(range(count))


def read_settings(path: Path) -> Settings:
    """Those in a picture's text chunk. Raises ValueError where there are none, or they cannot be used."""
    with naming(f"--like {path}", Exception), Image.open(path, formats=["PNG"]) as image:
        need("settings" in image.text, "holds no settings: need a PNG that one of these scripts drew")
        found = json.loads(image.text["settings"])
        return Settings(**{field.name: found[field.name] for field in dataclasses.fields(Settings)})


def load(args: argparse.Namespace) -> tuple[DiT, dict, LatentDecoder | None]:
    """(model, meta, decoder or None), on the CPU in float32."""
    (model, meta), name = load_dit(args.ckpt, args.heads), args.ckpt.name
    need(not (args.flow and "flow" in meta), f"--flow {args.flow}: {name} says what it predicts: leave the flag out")
    if args.flow:
        meta = meta | dict(prediction="velocity", flow=args.flow)
    need(args.vae or getattr(args, "latents", None) or not meta["latent"],
         f"{name} samples latents: need --vae sd-vae-ft-ema, or sampler.py --latents FILE.npy")
    return model, meta, load_decoder(args.vae, model.config["in_channels"]) if args.vae else None


def prepare(args: argparse.Namespace, per_class: int = 8) -> tuple:
    """(model, meta, decoder or None, Settings, one class per image). A flag wins over --like, and that over what the
    checkpoint recommends.
    per_class: images per class where --num is not given.  Raises ValueError where flags or files are wrong."""
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"     # torchrun: one each
    device = gpu if args.device == "auto" else args.device
    try:
        torch.empty(1, device=device)
    except Exception:                                                     # each kind of device has errors of its own
        raise ValueError(f"--device {device}: not usable here: need auto, cpu, cuda or mps") from None
    like = args.like and read_settings(args.like)
    model, meta, decoder = load(args)
    name, names, config, weights = args.ckpt.name, meta["class_names"], model.config, fingerprint(model)
    need(not like or like.weights == weights,
         f"--like {args.like}: was drawn with other weights than {name} has: need --ckpt {like and like.checkpoint}")
    heads, flow = config["num_heads"], meta["flow"] if meta["prediction"] == "velocity" else None
    need(not like or (like.heads, like.flow) == (heads, flow), f"--like {args.like}: was drawn with --heads "
         f"{like and like.heads}{like and like.flow and f' --flow {like.flow}' or ''}: need the same flags")
    depth, first, end = config["depth"], config["depth"] * 12 // 28, config["depth"] * 16 // 28
    with naming(f"{args.ckpt}, its settings", (TypeError, ValueError)):
        published = PUBLISHED[meta["prediction"]] | dict(layers=range(first, max(end, first + 1)))
        base = like or Settings(**published | (meta["settings"] or {}))

    layers = parse_numbers("--layers", args.layers or base.layers, depth)
    classes = parse_numbers("--classes", args.classes or base.classes, config["num_classes"], names)
    auto = like.dtype if like else "bfloat16" if "cuda" in device else "float32"
    chosen = {flag: value for flag, value in vars(args).items() if value is not None and flag in vars(base)} | dict(
        layers=layers, classes=[names[c] if names else c for c in classes],
        heads=heads, flow=flow, dtype=auto if args.dtype == "auto" else args.dtype,
        checkpoint=name, weights=weights, vae=decoder and fingerprint(decoder))
    if args.uncond and args.cfg is None:
        chosen["cfg"] = 1.0
    if args.apg == []:
        chosen["apg"] = base.apg or [0.0, 5.0, -0.5]                      # the APG paper's for DiT-XL/2
    if args.cads == []:
        std = model.y_embedder.embedding_table.weight.std().item()
        chosen["cads"] = base.cads or [0.6, 0.9, round(std / 4, 4), 1.0]
    settings = dataclasses.replace(base, **chosen)

    samplers, channels = SAMPLERS[meta["prediction"]], config["in_channels"]
    need(settings.sampler in samplers, f"--sampler {settings.sampler}: {name} needs {' or '.join(samplers)}")
    need((settings.guide_channels or 1) <= channels, f"--guide-channels {settings.guide_channels}: need 1…{channels}")
    need(model.null_class is not None or settings.cfg == 1 and not settings.uncond,
         f"--cfg {settings.cfg:g}: {name} has no null class, which CFG and --uncond need: need --cfg 1")
    need(settings.num or len(classes) <= 32, f"--classes: {len(classes)} are too many for a grid: need fewer, or --num")
    num = settings.num or len(classes) * per_class
    labels, settings = [classes[i % len(classes)] for i in range(num)], dataclasses.replace(settings, num=num)
    return model.to(device, getattr(torch, settings.dtype)), meta, decoder and decoder.to(device), settings, labels


def tell(text: str):
    """Writes over the last line of stderr, where that is a terminal."""
    if sys.stderr and sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1
        print(f"{text:{width}.{width}}", end="\r", file=sys.stderr, flush=True)


class Progress:
    """A `watch` over all batches of a run: how many images are to go, the rate, and the time that is left."""

    def __init__(self, images: int, steps: int):
        self.to_go, self.steps, self.done, self.started = images, steps, 0.0, time.monotonic()

    def __call__(self, step: Step):
        share = len(step.x) / self.steps
        self.done, self.to_go = self.done + share, self.to_go - share
        rate = self.done / (time.monotonic() - self.started)
        left = timedelta(seconds=max(0, round(self.to_go / rate)))
        tell(f"{self.to_go:.1f} images to go, {rate:.3g} a second: {left} left" if self.to_go > share / 2 else "")


def one_line_errors(run: Callable[[Sequence[str] | None], None]) -> Callable[..., int]:
    """run(argv) as a command, which returns its exit code: 0; 2 with one line on stderr where flags, files or numbers
    are wrong or memory is out; 130 with one line after Ctrl-C. Characters that stdout lacks are escaped."""
    def main(argv: Sequence[str] | None = None) -> int:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):                            # a notebook's has none, pythonw's is None
                stream.reconfigure(errors="backslashreplace")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return run(argv) or 0
        except KeyboardInterrupt:
            code, text = 130, "interrupted"
        except (ValueError, OSError, FloatingPointError, RuntimeError, MemoryError) as error:
            code, text = 2, str(error) or type(error).__name__
        finally:
            tell("")
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))
        print(f"{Path(run.__code__.co_filename).name}: {text}", file=sys.stderr)
        return code

    return main


@one_line_errors
def main(argv: Sequence[str] | None):
    parser, output = make_parser(__doc__)
    outs = output.add_mutually_exclusive_group()
    outs.add_argument("--out", type=Path, default="samples.png", metavar="FILE.png", help="(default: samples.png)")
    outs.add_argument("--latents", type=Path, metavar="FILE.npy", help="what is sampled, (N, C, H, W) (default: none)")
    args = parser.parse_args(argv)
    out, flag, suffix = (args.latents, "--latents", ".npy") if args.latents else (args.out, "--out", ".png")
    check_file(flag, out, suffix)
    model, meta, decoder, settings, labels = prepare(args)
    num, batch, columns, started = settings.num, settings.batch, len(settings.classes), time.monotonic()
    need(args.latents or num <= 10**4, f"--num {num}: a grid has room for 10000: need bench/many.py")
    print(settings, flush=True)
    progress = Progress(num, settings.steps)
    x = torch.cat([sample(model, meta, labels[start:start + batch], range(num)[start:start + batch], settings, progress)
                   for start in range(0, num, batch)])
    if args.latents:
        with whole_file(out) as beside, beside.open("wb") as file:
            np.save(file, x.float().numpy())
    else:
        images = to_images(x, decoder)
        table = [images[c::columns] for c in range(min(columns, num))]
        save_png(draw_grid(table, [str(name) for name in settings.classes]), out, settings)
    print(f"{out}: {num} images, {settings.sampler} {settings.steps} steps, {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    sys.exit(main())
