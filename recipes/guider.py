"""EMAG as a guider of diffusers, for its modular pipelines and for the others that take a guider.

    pipe.update_components(guider=ExponentialMovingAverageGuidance(
        guidance_scale=7.0, emag_scale=1.5, emag_layers=[6, 7, 8], image_tokens=[0, 4096]))       # SD3 at 1024²

A guider asks for the passes of a step by name, and the pipeline calls the model once for each. This one asks for one
more, the negative, from the same inputs as the conditional pass, and hands ε̃' to the guider that it extends in the
place of ε: to classifier-free guidance, or to adaptive projected guidance (APG).

Blocks: those of the denoiser in the lists named in `BLOCKS`.
Image tokens, n of them: first in Stable Diffusion 3, [0, n]; last in Qwen-Image, [-n, None]; n is (height // 16) *
(width // 16) in both. All, None, where the blocks attend to nothing else (Wan).
The window is in this project's terms, the share of the steps that is left; diffusers' start and stop, of CFG or APG,
are the share that is done.
Settings: SD3's w_e, window and relative depth, which is where candidates are looked for if no layers are given.
Memory: E of one candidate is 1.6 GiB per image in SD3 at 1024²; emag_variant="query" makes it 24 MiB.
"""
import functools
from collections.abc import Callable

import torch
from diffusers import AdaptiveProjectedGuidance, ClassifierFreeGuidance
from diffusers.configuration_utils import register_to_config
from torch import nn

from emag import EMAG, Window, emag_update

# The lists of blocks of a denoiser, in the order they run.
BLOCKS = ("transformer_blocks", "double_stream_blocks", "blocks", "layers", "single_transformer_blocks",
          "single_stream_blocks")


class EMAGMixin:
    """What EMAG adds to a guider of `pred_cond` and `pred_uncond`, whose class comes after this one among the bases.

    emag_scale: w_e; 1 is off.  emag_layers: the candidates, one or more indices into the denoiser's blocks.
    emag_start, emag_apply, emag_stop: the window.  image_tokens: start and stop of the slice of image tokens.
    emag_beta, emag_strength, emag_threshold, emag_variant: as in EMAG.
    trace: what the last run found, one entry per observed step.
    """
    _input_predictions = ["pred_cond", "pred_uncond", "pred_cond_emag"]

    def _set_up(self, guider: type):
        """The body of __init__, after register_to_config: checks EMAG's settings, and leaves the others to `guider`."""
        guider.__init__(self, **{name: value for name, value in self.config.items()
                                 if not name.startswith(("emag_", "image_tokens", "_"))})
        self.window = Window(self.config.emag_start, self.config.emag_apply, self.config.emag_stop)
        self.trace, self._emag, self._put_back = [], None, lambda: None

    def _acts(self, inside: Callable[[int, int], bool]) -> bool:
        return (self._enabled and self.config.emag_scale != 1 and self._step is not None
                and inside(self._step, self._num_inference_steps))

    @property
    def _passes(self) -> list[str]:
        return (["pred_cond", "pred_uncond"][:super().num_conditions]
                + ["pred_cond_emag"] * self._acts(self.window.perturbs))

    @property
    def num_conditions(self) -> int:
        return len(self._passes)

    @property
    def is_conditional(self) -> bool:
        return self._count_prepared > 0 and self._passes[self._count_prepared - 1] != "pred_uncond"

    def set_state(self, step, num_inference_steps, timestep):
        self._put_back()                                              # where a step broke off before its call
        super().set_state(step, num_inference_steps, timestep)

    def prepare_inputs(self, data):
        batches = super().prepare_inputs(data)[:super().num_conditions]
        return batches + [self._prepare_batch(data, 0, name) for name in self._passes[len(batches):]]

    def prepare_inputs_from_block_state(self, data, input_fields):
        batches = super().prepare_inputs_from_block_state(data, input_fields)[:super().num_conditions]
        return batches + [self._prepare_batch_from_block_state(input_fields, data, 0, name)
                          for name in self._passes[len(batches):]]

    def prepare_models(self, denoiser: nn.Module):
        super().prepare_models(denoiser)
        name = self._passes[self._count_prepared - 1]
        if name == "pred_cond" and self._step == 0:
            self._emag = None
        if name == "pred_cond" and self._acts(self.window.observes):
            if self._emag is None:
                self._emag = self._make(denoiser)
                self.trace = self._emag.trace
            self._next_call(denoiser, self._emag.observe)
        if name == "pred_cond_emag":
            self._next_call(denoiser, self._emag.perturb)

    def _make(self, denoiser: nn.Module) -> EMAG:
        blocks, config = [block for name in BLOCKS for block in getattr(denoiser, name, [])], self.config
        if not blocks:
            raise ValueError(f"{type(denoiser).__name__} has no list of blocks by any of the names {', '.join(BLOCKS)}"
                             ": add its name to BLOCKS in guider.py")
        layers, count = config.emag_layers, len(blocks)
        if layers is None:
            layers = range(count // 4, max(count * 3 // 8, count // 4 + 1))
        return EMAG(blocks, [layers] if isinstance(layers, int) else layers, beta=config.emag_beta,
                    strength=config.emag_strength, variant=config.emag_variant, threshold=config.emag_threshold,
                    image_tokens=None if config.image_tokens is None else slice(*config.image_tokens))

    def _next_call(self, denoiser: nn.Module, a_pass: Callable):
        """The denoiser's next call runs inside a_pass(). Its forward is put back before anything can fail in it."""
        before, forward = vars(denoiser).get("forward"), denoiser.forward

        def put_back():
            if before is None:
                del denoiser.forward
            else:
                denoiser.forward = before
            self._put_back = lambda: None

        @torch.compiler.disable
        @functools.wraps(forward)                                     # pipelines read its signature
        def once(*args, **kwargs):
            self._put_back()
            with a_pass():
                return forward(*args, **kwargs)

        denoiser.forward, self._put_back = once, put_back

    def forward(self, pred_cond, pred_uncond=None, pred_cond_emag=None):
        if pred_cond_emag is not None:
            pred_cond = emag_update(pred_cond, pred_cond_emag, self.config.emag_scale)
        if self._emag is not None:
            self._emag.forget()                                       # what was kept of the clean pass
        if self._step == self._num_inference_steps - 1:
            self._emag = None                                         # and E
        return super().forward(pred_cond, pred_uncond)


class ExponentialMovingAverageGuidance(EMAGMixin, ClassifierFreeGuidance):
    """EMAG with CFG (arXiv 2512.17303)."""

    @register_to_config
    def __init__(self, guidance_scale: float = 7.0, emag_scale: float = 1.5, emag_layers: int | list[int] | None = None,
                 emag_start: float = 1.0, emag_apply: float = 0.8, emag_stop: float = 0.2, emag_beta: float = 0.988,
                 emag_strength: float = 1.0, emag_threshold: float | None = None, emag_variant: str = "map",
                 image_tokens: list[int | None] | None = None, guidance_rescale: float = 0.0,
                 use_original_formulation: bool = False, start: float = 0.0, stop: float = 1.0, enabled: bool = True):
        self._set_up(ClassifierFreeGuidance)


class ExponentialMovingAverageAdaptiveProjectedGuidance(EMAGMixin, AdaptiveProjectedGuidance):
    """EMAG with APG (arXiv 2410.02416) in the place of CFG."""

    @register_to_config
    def __init__(self, guidance_scale: float = 7.5, emag_scale: float = 1.5, emag_layers: int | list[int] | None = None,
                 emag_start: float = 1.0, emag_apply: float = 0.8, emag_stop: float = 0.2, emag_beta: float = 0.988,
                 emag_strength: float = 1.0, emag_threshold: float | None = None, emag_variant: str = "map",
                 image_tokens: list[int | None] | None = None,
                 adaptive_projected_guidance_momentum: float | None = None,
                 adaptive_projected_guidance_rescale: float = 15.0, eta: float = 1.0, guidance_rescale: float = 0.0,
                 use_original_formulation: bool = False, start: float = 0.0, stop: float = 1.0, enabled: bool = True):
        self._set_up(AdaptiveProjectedGuidance)


def draw(pipe, scale=1.5, guidance_scale=3.5, variant="map", height=2048, width=2048, **inputs):
    """The images of a HunyuanImagePipeline, whose image tokens come first. Its own guiders give way to EMAG with CFG.

    inputs: what else `pipe` takes, at least a prompt and a negative_prompt.
    """
    own = pipe.guider, pipe.ocr_guider
    tokens = (height // pipe.vae_scale_factor) * (width // pipe.vae_scale_factor)
    pipe.guider = pipe.ocr_guider = ExponentialMovingAverageGuidance(
        guidance_scale, scale, emag_variant=variant, image_tokens=[0, tokens])
    try:
        return pipe(height=height, width=width, **inputs).images
    finally:
        pipe.guider, pipe.ocr_guider = own


def main(args):
    from diffusers import HunyuanImagePipeline

    pipe = HunyuanImagePipeline.from_pretrained("hunyuanvideo-community/HunyuanImage-2.1-Diffusers",
                                                torch_dtype=torch.bfloat16).to(args.device)
    images = draw(pipe, args.emag, prompt=args.prompt, negative_prompt="", generator=torch.manual_seed(args.seed))
    images[0].save(args.out)


if __name__ == "__main__":
    from command import command
    command(__doc__, main, out="hunyuan-image.png")
