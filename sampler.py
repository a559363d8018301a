"""Draws samples from a diffusion transformer, guided by CFG and EMAG, and by APG and CADS with them.

    python sampler.py --emag 2.0          # the demo checkpoint; w_e = 1 is plain CFG, 0 takes the negative for ε

Time t runs from 1 (noise) to 0 (data) everywhere. A velocity model has x_t = (1−t)·x₀ + t·ε and predicts v = ε − x₀; a
noise model has x_t = √ᾱ(t)·x₀ + √(1−ᾱ(t))·ε and predicts ε. Integration is in float64, the network in its own dtype.
"""
import argparse
import dataclasses
import json
import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from dit import DiT, LatentDecoder, fingerprint, load_decoder, load_dit
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

        first = slice(channels or x.shape[1])
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

def need(good, message: str):
    if not good:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that decides the pixels of a run, under the names of the flags. Raises ValueError, naming the flag."""
    sampler: str                                      # one of SAMPLERS
    steps: int
    cfg: float                                        # w; 1 is off
    emag: float                                       # w_e; 1 is off, 0 takes the negative for ε
    layers: tuple[int, ...]                           # the candidates 𝓛, counted from 0
    beta: float = 0.988                               # β
    strength: float = 1.0                             # λ
    variant: str = "map"                              # "map", "image" or "query", as for EMAG
    threshold: float | None = None                    # τ; None selects the argmax
    window: tuple[float, ...] = (1.0, 0.8, 0.2)       # start, apply, stop
    eta: float = 0.0                                  # ddim's η
    guide_channels: int | None = None                 # the first so many are guided; None: all
    uncond: bool = False
    apg: tuple[float, ...] | None = None              # η, ρ, m; None is off
    cads: tuple[float, ...] | None = None             # τ₁, τ₂, s, ψ; None is off
    classes: tuple[int | str, ...] = ()               # dealt to the samples in turn; () is all
    num: int | None = None                            # images in all
    batch: int = 24                                   # samples drawn together
    seed: int = 0
    heads: int | None = None                          # of the network
    flow: str | None = None                           # "rf" or "sit" where it predicts a velocity
    dtype: str = "float32"                            # of the network
    checkpoint: str = ""                              # its file's name
    weights: str = ""                                 # the fingerprint of what is in it
    vae: str | None = None                            # the fingerprint of the decoder's weights

    def __post_init__(self):
        def check(wanted: str, good: Callable, *names: str, kinds: tuple = (int, float), count: int | None = None):
            """Each field holds one value, or a tuple of `count` values (0: any number), for which good(…) is true."""
            for name in names:
                value = getattr(self, name)
                if isinstance(value, (list, range)):                      # from JSON, argparse and `prepare`
                    object.__setattr__(self, name, value := tuple(value))
                values = value if isinstance(value, tuple) else (value,)
                optional = getattr(Settings, name, 0) is None
                need(value is None and optional
                     or isinstance(value, tuple) == (count is not None) and len(values) == (count or len(values))
                     and all(type(each) in kinds for each in values) and good(*values),
                     f"--{name.replace('_', '-')} {' '.join(map(str, values)):.60}: need {wanted}")

        check("euler, heun, ddim or ddpm", lambda v: v in ("euler", "heun", "ddim", "ddpm"), "sampler", kinds=(str,))
        check("map, image or query", lambda v: v in ("map", "image", "query"), "variant", kinds=(str,))
        check("a whole number from 1 to 1000", lambda v: 1 <= v <= TRAIN_STEPS, "steps", kinds=(int,))
        check("a whole number from 1 to 1e6", lambda v: 1 <= v <= 1e6, "num", "batch", "guide_channels", kinds=(int,))
        check("a whole number from 0 to 2^63", lambda v: 0 <= v <= 2**63, "seed", kinds=(int,))
        check("a number from 0 to 1", lambda v: 0 <= v <= 1, "beta", "strength", "eta")
        check("a number from -1e6 to 1e6", lambda v: -1e6 <= v <= 1e6, "cfg", "emag", "threshold")
        check("block numbers, from 0", lambda *v: v and min(v) >= 0, "layers", kinds=(int,), count=0)
        check("names or numbers", lambda *v: True, "classes", kinds=(int, str), count=0)
        check("1 ≥ START ≥ APPLY ≥ STOP ≥ 0", lambda *v: 1 >= v[0] >= v[1] >= v[2] >= 0, "window", count=3)
        check("0 ≤ ETA ≤ 1e6, 0 < NORM ≤ 1e6, −1 < MOMENTUM < 1, or no numbers",
              lambda eta, norm, momentum: 0 <= eta <= 1e6 and 0 < norm <= 1e6 and -1 < momentum < 1, "apg", count=3)
        check("0 ≤ TAU1 ≤ TAU2 ≤ 1, 0 < S ≤ 1e6, 0 ≤ PSI ≤ 1, or no numbers",
              lambda tau1, tau2, s, psi: 0 <= tau1 <= tau2 <= 1 and 0 < s <= 1e6 and 0 <= psi <= 1, "cads", count=4)
        need(self.cfg == 1 or not self.uncond, "--uncond: has no CFG: leave --cfg out")
        need(self.cfg != 1 or not self.apg, "--apg: needs a null prediction, and w = 1 makes none: give --cfg above 1")
        need(not (self.cads and self.uncond), "--cads: noises the condition, and --uncond has none: leave one out")
        need(self.eta == 0 or self.sampler == "ddim", f"--eta {self.eta:g}: {self.sampler} has none: leave it out")


# For checkpoints without settings of their own: DiT-XL/2's, or for a velocity SD3's steps, w_e and window. The
# candidates have DiT-XL/2's relative depth, 12–15 of 28 blocks.
PUBLISHED = {"noise": dict(sampler="ddpm", steps=250, cfg=1.5, emag=3.0, window=(0.6, 0.4, 0.2)),
             "velocity": dict(sampler="euler", steps=28, cfg=1.5, emag=1.5)}


# ----------------------------------------------------------------------------------------------------------- sampling

def network(model: DiT, meta: dict, variance: bool = False) -> Callable[[Tensor, float, Tensor], Tensor]:
    """The model as a function of (x, t, y) in this file's time and sign. Only this function knows the checkpoint's.

    variance: keep the channels of the output beyond the prediction, which `ddpm` reads.  Raises FloatingPointError.
    """
    to_network_time, sign = {"noise": (lambda t: TRAIN_STEPS * t - 1, 1),      # trained on timesteps i = 0…999
                             "rf": (lambda t: TRAIN_STEPS * t, 1),             # trained on 1000·t, v = ε − x₀
                             "sit": (lambda t: 1 - t, -1)                      # trained on 1 − t, v = x₀ − ε
                             }["noise" if meta["prediction"] == "noise" else meta.get("flow", "rf")]

    def predict(x: Tensor, t: float, y: Tensor) -> Tensor:
        times = torch.full((len(x),), to_network_time(t), device=x.device, dtype=torch.float32)
        out = model(x.to(model.pos_embed.dtype), times, y).to(x.dtype)
        if not out.isfinite().all():
            raise FloatingPointError("the network gives NaN or infinity: need --dtype float32, smaller scales or "
                                     "weights without NaN")
        return sign * (out if variance else out[:, :x.shape[1]])

    return predict


@torch.inference_mode()
def sample(model: DiT, meta: dict, labels: Sequence[int], indices: Sequence[int], settings: Settings,
           watch: Callable[[Step], None] | None = None, emag: EMAG | None = None,
           combine: Callable | None = None) -> Tensor:
    """One batch, (B, C, H, W) in float64.

    labels: one class per sample.  indices: the samples' numbers, which with the seed give their noise.
    watch, emag, combine: as for `guided`; the last two replace what the settings say.
    Raises FloatingPointError where the network's output is not finite, RuntimeError as EMAG does; both name the step.
    """
    device, config = model.pos_embed.device, model.config
    noise = SampleNoise(settings.seed, indices)
    x = noise(torch.empty(len(labels), config["in_channels"], config["input_size"], config["input_size"],
                          dtype=torch.float64, device=device))
    null = torch.full((len(labels),), model.null_class, device=device)
    y = null if settings.uncond else torch.tensor(labels, device=device)
    condition = CADS(noise, *settings.cads) if settings.cads else None
    if condition:
        y, null = model.y_embedder(y), model.y_embedder(null)
    if settings.apg and combine is None:
        combine = APG(meta["prediction"], settings.cfg, *settings.apg)
    emag = emag or EMAG(model.blocks, settings.layers, beta=settings.beta, strength=settings.strength,
                        variant=settings.variant, threshold=settings.threshold)
    predict = guided(network(model, meta, variance=settings.sampler == "ddpm"), y, null, steps=settings.steps,
                     cfg=settings.cfg, emag=emag, emag_scale=settings.emag, window=Window(*settings.window),
                     channels=settings.guide_channels, condition=condition, combine=combine, watch=watch)

    def predict_or_say_where(x: Tensor, t: float, step: int, update: bool = True) -> Tensor:
        try:
            return predict(x, t, step, update)
        except (FloatingPointError, RuntimeError) as error:               # RuntimeError: EMAG's, or out of memory
            raise type(error)(f"step {step + 1} of {settings.steps}: {error}") from error

    extra = {"ddim": dict(eta=settings.eta, noise=noise), "ddpm": dict(noise=noise)}.get(settings.sampler, {})
    sampler, times = SAMPLERS[meta["prediction"]][settings.sampler], TIMES[meta["prediction"]](settings.steps)
    return sampler(predict_or_say_where, x, times, **extra)


# ----------------------------------------------------------------------------------------------- pictures and files

@torch.inference_mode()
def to_images(x: Tensor, decoder: LatentDecoder | None = None) -> np.ndarray:
    """RGB in [−1, 1], (B, 3, H, W), or latents and their decoder, a few at a time → (B, H, W, 3) uint8."""
    if decoder is not None:
        x = torch.cat([decoder(part.float()) for part in x.split(2)])
        if not x.isfinite().all():
            raise FloatingPointError("the decoder gives NaN or infinity: need smaller scales or another --vae")
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
def whole_file(path: Path, keep: bool = True) -> Iterator[Path]:
    """A path beside `path` to write to, renamed when all is written, so that `path` is never half there. A link to a
    file is followed.  keep: False only tries to write.  Raises ValueError where `path` cannot be written."""
    try:
        str(path).encode()                                                # a lone surrogate could not be printed
        target = Path(os.path.realpath(path))
        beside = target.with_name(f".{platform.node()}-{os.getpid()}-{time.time_ns()}.tmp")
        with suppress(FileNotFoundError):                                 # a new name
            os.lstat(path)
            if not (target.is_file() and os.access(target, os.W_OK)):
                raise OSError("is no regular file, or is read-only")
        try:
            yield beside
            if keep:
                beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{path}: cannot be written ({error.args[-1]}): need a regular file or a new name, "
                         "in a folder that exists and has room") from None


def check_file(flag: str, path: Path, suffix: str):
    """Before the sampling: ValueError where `path` has another suffix or cannot be written."""
    need(path.suffix == suffix, f"{flag} {path}: need a file name that ends in {suffix}")
    with whole_file(path, keep=False) as probe:
        probe.write_bytes(bytes(4096))                                    # a full disk takes empty files


def save_png(image: Image.Image, path: Path, settings: Settings, **more):
    """The settings, and what else is given, go into the PNG's text chunk `settings`, as JSON."""
    info = PngImagePlugin.PngInfo()
    info.add_text("settings", json.dumps(dataclasses.asdict(settings) | more))
    with whole_file(path) as beside:
        image.save(beside, format="PNG", pnginfo=info)


# ------------------------------------------------------------------------------------------------------- command line

def make_parser(description: str) -> argparse.ArgumentParser:
    """The flags that sampler.py shares with the scripts in demo/ and bench/: all but those of the outputs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error, add = lambda message: need(False, f"{message}: see --help"), parser.add_argument
    add("--ckpt", type=Path, default=DEMO, help="the checkpoint, a file or a diffusers folder (default: the demo's)")
    add("--vae", type=Path, help="the decoder of a latent checkpoint: sd-vae-ft-ema or -mse, a folder or a file")
    add("--heads", type=int, help="attention heads, where a checkpoint is none of DiT-S, B, L, XL")
    add("--flow", choices=["rf", "sit"], help="the checkpoint predicts a velocity: rectified flow's, or SiT's")
    add("--emag", type=float, metavar="W_E", help="EMAG scale w_e: 1 is off, 0 takes the negative for the prediction")
    add("--cfg", type=float, metavar="W", help="CFG scale w: 1 is off")
    add("--guide-channels", type=int, metavar="N", help="guide the first N channels alone (official DiT code: 3)")
    add("--uncond", action="store_true", help="from the null condition alone, no CFG (published w_e for DiT: 7)")
    add("--sampler", choices=[name for group in SAMPLERS.values() for name in group])
    add("--steps", type=int, metavar="N")
    add("--eta", type=float, help="ddim's noise: 0 none, 1 as ddpm (default 0)")
    add("--layers", metavar="A-B", help="candidate blocks, counted from 0")
    add("--beta", type=float, help="EMA decay β in [0, 1]")
    add("--strength", type=float, help="blend λ in [0, 1]")
    add("--variant", choices=["map", "image", "query"], help="EMAG, EMAG-I (in a DiT the same as EMAG), or EMAG-Q")
    add("--threshold", type=float, metavar="Z", help="select every block with z ≥ Z beside the argmax")
    add("--window", type=float, nargs=3, metavar=("START", "APPLY", "STOP"), help="1 ≥ START ≥ APPLY ≥ STOP ≥ 0")
    add("--apg", type=float, nargs="*", metavar="ETA NORM MOMENTUM", help="APG for CFG's formula (default 0 5 -0.5)")
    add("--cads", type=float, nargs="*", metavar="TAU1 TAU2 S PSI", help="CADS (default 0.6 0.9, embedding std / 4, 1)")
    add("--classes", metavar="all|LIST", help="by number, or by name where there are names (default: the checkpoint's)")
    add("--num", type=int, help="images in all, dealt to the classes in turn")
    add("--batch", type=int, metavar="B", help="images drawn together (default 24)")
    add("--seed", type=int, metavar="S", help="of the noise (default 0)")
    add("--device", default="auto", help="auto takes cuda where there is one, else cpu")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="auto: bfloat16 on cuda")
    return parser


def parse_numbers(flag: str, parts: Sequence[int | str], count: int, names: Sequence[str] = ()) -> list[int]:
    """Parts such as 4, "4", "4-7" or a name → the numbers below `count` that they stand for; ["all"] or [] → all."""
    known, numbers = {str(n): n for n in range(count)} | {name: n for n, name in enumerate(names)}, []
    for part in map(str, [] if list(parts) == ["all"] else parts):
        first, dash, last = (part, "", "") if part in known else part.partition("-")
        first, last = known.get(first, -1), known.get(last if dash else first, -1)
        need(0 <= first <= last, f"{flag} {part!r:.60}: need all, or of 0…{count - 1} such as 0,1 or 0-1"
             + (", or of " + ", ".join(names) if names else ""))
        numbers += range(first, last + 1)
    return numbers or list(range(count))


def prepare(args: argparse.Namespace, per_class: int = 8) -> tuple:
    """(model, meta, decoder or None, Settings, one class per image): as the flags say, else as the checkpoint says.
    per_class: images per class where --num is not given.  Raises ValueError where flags or files are wrong."""
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"     # torchrun: one each
    device = gpu if args.device == "auto" else args.device
    try:
        torch.ones(1, dtype=torch.float64, device=device).item()
    except Exception:                                                     # each kind of device has errors of its own
        raise ValueError(f"--device {device}: not usable here, or without float64: need auto, cpu or cuda") from None
    (model, meta), name = load_dit(args.ckpt, args.heads), args.ckpt.name
    need(not (args.flow and "flow" in meta), f"--flow {args.flow}: {name} says what it predicts: leave the flag out")
    meta = meta | dict(prediction="velocity", flow=args.flow) if args.flow else meta
    samplers, names, depth = SAMPLERS[meta["prediction"]], meta["class_names"], len(model.blocks)
    decodes, channels = meta["latent"] and not getattr(args, "latents", None), model.config["in_channels"]
    need(args.vae or not decodes, f"{name} samples latents: need --vae sd-vae-ft-ema, or sampler.py --latents FILE.npy")
    need(decodes or not args.vae, f"--vae {args.vae}: nothing is to be decoded: leave it out")
    decoder = load_decoder(args.vae, channels).to(device) if args.vae else None
    try:
        layers = range(depth * 12 // 28, max(depth * 16 // 28, depth * 12 // 28 + 1))
        settings = Settings(**PUBLISHED[meta["prediction"]] | dict(layers=layers) | (meta["settings"] or {}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{args.ckpt}: recommends settings that cannot be used: {error}") from None

    given = {flag: value for flag, value in vars(args).items() if value is not None and flag in vars(settings)}
    for flag, count, known in (("layers", depth, ()), ("classes", model.null_class, names)):
        parts = given[flag].split(",") if flag in given else getattr(settings, flag)
        given[flag] = parse_numbers(f"--{flag}", parts, count, known)
    if args.uncond and args.cfg is None:
        given["cfg"] = 1.0
    if args.apg == []:
        given["apg"] = [0.0, 5.0, -0.5]                                   # the APG paper's for DiT-XL/2
    if args.cads == []:
        given["cads"] = [0.6, 0.9, round(model.y_embedder.embedding_table.weight.std().item() / 4, 4), 1.0]
    given |= dict(heads=model.config["num_heads"], checkpoint=name, weights=fingerprint(model),
                  flow=meta.get("flow", "rf") if meta["prediction"] == "velocity" else None,
                  vae=decoder and fingerprint(decoder),
                  dtype=args.dtype if args.dtype != "auto" else "bfloat16" if "cuda" in device else "float32")
    settings, classes = dataclasses.replace(settings, **given), given["classes"]
    need(settings.sampler in samplers, f"--sampler {settings.sampler}: {name} needs {' or '.join(samplers)}")
    need((settings.guide_channels or 1) <= channels, f"--guide-channels {settings.guide_channels}: need 1…{channels}")
    need(settings.num or len(classes) <= 32,
         f"--classes: {len(classes)} are too many for one grid: need --num, or some of "
         + (", ".join(names) if names else "them, such as 0,1"))
    labels = [classes[i % len(classes)] for i in range(settings.num or len(classes) * per_class)]
    settings = dataclasses.replace(settings, num=len(labels), classes=[names[c] if names else c for c in classes])
    return model.to(device, getattr(torch, settings.dtype)), meta, decoder, settings, labels


def one_line_errors(run: Callable[[Sequence[str] | None], None]) -> Callable[..., int]:
    """run(argv) as a command: returns 0, or 2 with one line on stderr where flags, files or numbers are wrong."""
    def main(argv: Sequence[str] | None = None) -> int:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return run(argv) or 0
        except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
            text = " ".join(str(error).encode(errors="backslashreplace").decode().split())
            print(f"{Path(run.__code__.co_filename).name}: {text}", file=sys.stderr)
            return 2

    return main


@one_line_errors
def main(argv: Sequence[str] | None):
    parser = make_parser(__doc__)
    outs = parser.add_mutually_exclusive_group()
    outs.add_argument("--out", type=Path, default=Path("samples.png"), metavar="FILE.png", help="default: samples.png")
    outs.add_argument("--latents", type=Path, metavar="FILE.npy", help="save what the network samples, (N, C, H, W)")
    args = parser.parse_args(argv)
    need(os.environ.get("WORLD_SIZE", "1") == "1", "WORLD_SIZE: this draws in one process: several need bench/many.py")
    out, flag, suffix = (args.latents, "--latents", ".npy") if args.latents else (args.out, "--out", ".png")
    check_file(flag, out, suffix)
    model, meta, decoder, settings, labels = prepare(args)
    num, steps, columns, started, parts = settings.num, settings.steps, len(settings.classes), time.monotonic(), []
    need(args.latents or num <= 10**4, f"--num {num}: a grid has room for 10000: need bench/many.py")
    print(json.dumps(dataclasses.asdict(settings)), flush=True)
    for start in range(0, num, settings.batch):
        part = slice(start, start + settings.batch)
        watch = (lambda step: print(f"{start} of {num} images done, step {step.step + 1} of {steps}", end="\033[K\r",
                                    file=sys.stderr, flush=True)) if sys.stderr and sys.stderr.isatty() else None
        parts.append(sample(model, meta, labels[part], range(num)[part], settings, watch))
    if args.latents:
        with whole_file(out) as beside, beside.open("wb") as file:
            np.save(file, torch.cat(parts).float().cpu().numpy())
    else:
        images = to_images(torch.cat(parts), decoder)
        table = [images[c::columns] for c in range(min(columns, num))]
        save_png(draw_grid(table, [str(name) for name in settings.classes]), out, settings)
    print(f"{out}: {num} images, {settings.sampler} {steps} steps, {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    sys.exit(main())
