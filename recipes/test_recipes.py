"""The recipes, on tiny models of the real classes with random weights, against EMAG by slow means."""
import itertools
import math
import runpy
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

RECIPES = Path(__file__).resolve().parent
sys.path[:0] = map(str, [RECIPES, RECIPES.parent])
from dit import DiT  # noqa: E402
from guide import guide  # noqa: E402
from test_emag import F64, randomised, seeded  # noqa: E402


def import_diffusers():
    """diffusers, or the test is skipped: its pipelines, and some of its models, need transformers too."""
    pytest.importorskip("transformers")
    return pytest.importorskip("diffusers")


def tiny_vae(diffusers, levels: int = 2, **changes):
    config = dict(block_out_channels=(8,) * levels, norm_num_groups=4, latent_channels=4, shift_factor=0.0,
                  down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels)
    return diffusers.AutoencoderKL(**config | changes).eval()


# ------------------------------------------------------------------------------------------------- the slow oracle


class SlowAttention:
    """EMAG for any model, nothing shared with emag.py: while on, torch's attention itself is a slow one, and hooks of
    torch say in which candidate it runs. The negative pass is of the whole batch, of which `rows` are used."""

    def __init__(self, blocks, layers, rows=(), tokens=slice(None), variant="map", beta=0.988):
        self.blocks, self.layers, self.rows, self.tokens = blocks, list(layers), list(rows), tokens
        self.variant, self.beta, self.block = variant, beta, None
        self.reset()

    def reset(self):
        self.ema, self.seen, self.chosen = {}, {}, {}

    @contextmanager
    def on(self):
        handles = [self.blocks[index].register_forward_pre_hook(lambda *_, index=index: setattr(self, "block", index))
                   for index in self.layers]
        fused, F.scaled_dot_product_attention = F.scaled_dot_product_attention, self.attention
        try:
            yield
        finally:
            F.scaled_dot_product_attention = fused
            for handle in handles:
                handle.remove()

    def attention(self, query, key, value, attn_mask=None, **off):
        block, self.block = self.block, None                     # the first call of a block is the self-attention
        maps = lambda q: self.softmax(q, key, attn_mask)                                            # noqa: E731
        if block is not None and not self.chosen:
            seen = query if self.variant == "query" else maps(query)
            self.seen[block] = seen[self.rows][:, :, self.tokens]
        mixed = [number for number, index in self.chosen.items() if index == block]          # numbers in self.rows
        rows = [self.rows[number] for number in mixed]
        if mixed and self.variant == "query":
            query = query.clone()
            query[rows, :, self.tokens] = self.ema[block][mixed]
        attn = maps(query)
        if mixed and self.variant == "map":
            attn[rows, :, self.tokens] = self.ema[block][mixed]
        return attn @ value

    @staticmethod
    def softmax(query, key, mask):
        logits = query @ key.mT / math.sqrt(query.shape[-1])
        if mask is not None:
            logits = logits + (torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask)
        return logits.softmax(-1)

    def predict(self, run, step, steps, scale, window=(1.0, 0.8, 0.2)) -> Tensor:
        """run() is a pass of the model; gives its prediction with ε̃' in `rows`."""
        start, apply, stop = (round(bound * (steps - 1)) for bound in window)
        left = steps - 1 - step
        if step == 0:
            self.reset()
        self.chosen = {}
        with self.on():
            pred = run()
        if not stop <= left <= start:
            return pred
        for index, seen in self.seen.items():
            self.ema[index] = self.beta * self.ema.get(index, seen) + (1 - self.beta) * seen
        if left > apply:
            return pred
        for number in range(len(self.rows)):
            dev = [(self.ema[index][number] - self.seen[index][number]).abs().mean().item() for index in self.layers]
            self.chosen[number] = self.layers[dev.index(max(dev))]
        with self.on():
            negative = run()
        pred = pred.clone()
        pred[self.rows] = negative[self.rows] + scale * (pred[self.rows] - negative[self.rows])
        return pred


@contextmanager
def slowly(model, slow: SlowAttention, steps: int, scale: float, channels=slice(None), rows=None, **options):
    """Each call of `model` is a step of slow EMAG. rows: a function of its inputs gives the conditional samples, None
    where the call is no step."""
    forward, count = model.forward, itertools.count()

    def guided(*args, **kwargs):
        if rows is not None:
            slow.rows = rows(args, kwargs)
            if slow.rows is None:
                return forward(*args, **kwargs)
        outs = []

        def run():
            own_args, own_kwargs = copy_lists((args, kwargs))    # a model may take things out of its lists
            outs.append(forward(*own_args, **own_kwargs))
            pred = outs[-1] if isinstance(outs[-1], Tensor) else outs[-1][0]
            return torch.stack(pred) if isinstance(pred, list) else pred

        pred, out = slow.predict(run, next(count) % steps, steps, scale, **options), outs[0]
        whole = out if isinstance(out, Tensor) else out[0]
        if isinstance(whole, list):
            return (list(pred),)
        whole = whole.clone()
        whole[:, channels] = pred[:, channels]
        return whole if isinstance(out, Tensor) else type(out)(sample=whole) if isinstance(out, dict) else (whole,)

    model.forward = guided
    try:
        yield
    finally:
        del model.forward


def copy_lists(inputs):
    """The same tensors in lists, tuples and dicts that are new."""
    if isinstance(inputs, dict):
        return {name: copy_lists(value) for name, value in inputs.items()}
    return type(inputs)(map(copy_lists, inputs)) if type(inputs) in (list, tuple) else inputs


def forwards(model) -> list:
    return [vars(module).get("forward") for module in model.modules()]


def tokens(count: int, dim: int, seed: int, images: int = 2) -> Tensor:
    return seeded(images, count, dim, seed=seed)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def close(on, expected, off):
    """Equal to 1e-5 of its size, and further from what it is without EMAG by a hundred times as much."""
    size = off.abs().max()
    assert expected.isfinite().all() and (on - expected).abs().max() < 1e-5 * size < 1e-2 * (on - off).abs().max()


STEPS, SIZE = 4, dict(height=64, width=64)
LATENT = dict(output_type="latent", num_inference_steps=STEPS, **SIZE)


def check(draw, plain, model, slow, channels=slice(None), window=(1.0, 0.8, 0.2), steps=STEPS, rows=None):
    """draw(scale) is the recipe: off it is `plain` bit for bit, on slow EMAG; afterwards the model is as it was."""
    before, off, on = forwards(model), draw(scale=1.0), draw(scale=2.5)
    with slowly(model, slow, steps, 2.5, channels, rows, window=window):
        expected = plain()
    close(on, expected, off)
    assert forwards(model) == before and torch.equal(plain(), off)


# --------------------------------------------------------------------------------------------- one call per step


class Official(DiT):
    """Calls itself as the official codes of DiT and SiT do: the first half conditional, three channels guided."""

    def forward_with_cfg(self, x, t, y, cfg_scale):
        half = x[:len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        cond, null = out[:, :3].chunk(2)
        eps = null + cfg_scale * (cond - null)
        return torch.cat([torch.cat([eps, eps]), out[:, 3:]], dim=1)


def official(learn_sigma: bool):
    model = randomised(Official(input_size=8, patch_size=2, in_channels=4, hidden_size=16, depth=17, num_heads=2,
                                learn_sigma=learn_sigma), std=0.2)
    model.y_embedder.num_classes = model.null_class
    return model


def test_recipe_official_dit():
    from recipes import dit_official
    model = official(True)

    class Diffusion:                                             # a stand-in: `diffusion` of that code is no package
        num_timesteps = 10

        def p_sample_loop(self, model, shape, noise, clip_denoised, model_kwargs, device, progress):
            assert noise.shape == shape and not clip_denoised
            for i in reversed(range(10)):
                noise = noise - 0.1 * model(noise, torch.full(shape[:1], 100.0 * i, dtype=F64), **model_kwargs)[:, :4]
            return noise

    def plain():
        torch.manual_seed(0)
        noise = torch.randn(2, 4, 8, 8, dtype=F64)
        return Diffusion().p_sample_loop(model.forward_with_cfg, (4, 4, 8, 8), torch.cat([noise, noise]), False,
                                         dict(y=torch.tensor([3, 4, 1000, 1000]), cfg_scale=1.5), "cpu", False)[:2]

    draw = lambda **options: (torch.manual_seed(0), dit_official.draw(                             # noqa: E731
        model, Diffusion(), [3, 4], **options))[1]
    check(draw, plain, model, SlowAttention(model.blocks, range(12, 16), range(2)), slice(0, 3), (0.6, 0.4, 0.2), 10)


def test_recipe_official_sit():
    from recipes import sit_official
    model = official(False)

    class Sampler:                                               # as torchdiffeq's Euler: n times make n − 1 calls
        def sample_ode(self, sampling_method, num_steps):
            assert sampling_method == "euler"

            def sample(x, model, **kwargs):
                states, times = [x], torch.linspace(0, 1, num_steps, dtype=F64)
                for t, later in itertools.pairwise(times):
                    states.append(states[-1] + (later - t) * model(states[-1], t.expand(len(x)), **kwargs))
                return torch.stack(states)
            return sample

    def plain():
        torch.manual_seed(0)
        noise = torch.randn(2, 4, 8, 8, dtype=F64)
        return Sampler().sample_ode("euler", STEPS + 1)(torch.cat([noise, noise]), model.forward_with_cfg,
                                                        y=torch.tensor([3, 4, 1000, 1000]), cfg_scale=1.5)[-1][:2]

    draw = lambda **options: (torch.manual_seed(0), sit_official.draw(                             # noqa: E731
        model, Sampler(), [3, 4], steps=STEPS, **options))[1]
    check(draw, plain, model, SlowAttention(model.blocks, range(12, 16), range(2)), slice(0, 3))


def images_of(pipe, **inputs):
    """pipe(…) with the same noise at each call."""
    def run(call=pipe, **options) -> Tensor:
        out = call(**inputs, **options, generator=torch.Generator().manual_seed(0))
        out = getattr(out, "images", out)
        return torch.stack(out) if isinstance(out, list) else torch.as_tensor(out)
    return run


def test_recipe_dit_pipeline():
    diffusers = import_diffusers()
    from recipes import dit_pipeline
    transformer = randomised(diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=17, sample_size=8,
        patch_size=2, norm_num_groups=4), std=0.3)
    pipe = quiet(diffusers.DiTPipeline(transformer, tiny_vae(diffusers).double(),
                                       diffusers.DDIMScheduler(clip_sample=False)))
    run = images_of(pipe, output_type="np")
    check(partial(run, partial(dit_pipeline.draw, pipe, [3, 4], num_inference_steps=10)),
          partial(run, class_labels=[3, 4], num_inference_steps=10, guidance_scale=1.5), transformer,
          SlowAttention(transformer.transformer_blocks, range(12, 16), range(2)), slice(0, 4), (0.6, 0.4, 0.2), 10)


def test_recipe_pixart():
    diffusers = import_diffusers()
    from recipes import pixart
    transformer = randomised(diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=17, sample_size=8,
        patch_size=2, cross_attention_dim=16, caption_channels=12, use_additional_conditions=False), std=0.3)
    pipe = quiet(diffusers.PixArtAlphaPipeline(None, None, tiny_vae(diffusers, 4), transformer,
                                               diffusers.DPMSolverMultistepScheduler()))
    run = images_of(pipe, prompt_embeds=tokens(5, 12, 1), negative_prompt_embeds=tokens(5, 12, 2), negative_prompt=None,
                    prompt_attention_mask=torch.ones(2, 5), negative_prompt_attention_mask=torch.ones(2, 5),
                    use_resolution_binning=False, **LATENT)
    check(partial(run, partial(pixart.draw, pipe)), run, transformer,
          SlowAttention(transformer.transformer_blocks, range(12, 16), range(2, 4)), slice(0, 4))


def tiny_sd3(pipeline: str = "StableDiffusion3Pipeline", more=(), **changes):
    diffusers = import_diffusers()
    transformer = randomised(diffusers.SD3Transformer2DModel(**dict(
        sample_size=8, patch_size=2, in_channels=4, num_layers=6, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=4,
        pos_embed_max_size=16) | changes), std=0.3)
    return quiet(getattr(diffusers, pipeline)(
        transformer, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), *[None] * 7, *more))


def sd3_inputs(images: int) -> dict:
    return dict(prompt_embeds=tokens(5, 12, 1, images), negative_prompt_embeds=tokens(5, 12, 2, images),
                pooled_prompt_embeds=seeded(images, 10, seed=3), guidance_scale=3.0,
                negative_pooled_prompt_embeds=seeded(images, 10, seed=4), **LATENT)


@pytest.mark.parametrize("dual, variant", [((), "map"), ((0, 1, 2), "query")], ids=["SD3", "SD3.5"])
def test_recipe_sd3(dual, variant):
    from recipes import sd3
    pipe = tiny_sd3(dual_attention_layers=dual, qk_norm="rms_norm" if dual else None)
    run = images_of(pipe, **sd3_inputs(2))
    check(partial(run, partial(sd3.draw, pipe, variant=variant)), run, pipe.transformer,
          SlowAttention(pipe.transformer.transformer_blocks, range(1, 2), range(2, 4), slice(0, 16), variant))


def tiny_sdxl(pipeline: str = "StableDiffusionXLPipeline", more=(), **options):
    diffusers = import_diffusers()
    unet = randomised(diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), transformer_layers_per_block=(1, 3),
        attention_head_dim=(1, 2), cross_attention_dim=12, use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 10), std=0.5)
    return quiet(getattr(diffusers, pipeline)(None, None, None, None, None, unet, *more,
                                              diffusers.EulerDiscreteScheduler(), add_watermarker=False, **options))


def sdxl_inputs(images: int) -> dict:
    return dict(prompt_embeds=tokens(5, 12, 1, images), negative_prompt_embeds=tokens(5, 12, 2, images),
                pooled_prompt_embeds=seeded(images, 10, seed=3),
                negative_pooled_prompt_embeds=seeded(images, 10, seed=4), **LATENT | dict(num_inference_steps=5))


def sdxl_check(pipe, images: int, steps: int = 5, without=(), **more):
    from recipes import sdxl
    inputs = {name: value for name, value in (sdxl_inputs(images) | more).items() if name not in without}
    run, mid = images_of(pipe, **inputs), pipe.unet.mid_block.attentions[0].transformer_blocks
    check(partial(run, partial(sdxl.draw, pipe)), run, pipe.unet,
          SlowAttention(mid, range(3), range(images, 2 * images)), steps=steps)


def test_recipe_sdxl():
    sdxl_check(tiny_sdxl(), 2)


def tiny_z_image(**changes):
    diffusers = import_diffusers()
    transformer = randomised(diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=16, n_layers=6, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=12,
        axes_dims=[2, 2, 4], axes_lens=[80, 16, 16], **changes), std=0.3)
    return quiet(diffusers.ZImagePipeline(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), None, None, None,
                                          transformer))


@pytest.mark.parametrize("doubled", [True, False])
def test_recipe_z_image(doubled):
    """Lists in and out; the prompts are 40 and 7 tokens long (64 and 32 with padding), the negative ones 9 and 3."""
    from recipes import z_image
    pipe = tiny_z_image()
    run = images_of(pipe, prompt_embeds=[seeded(40, 12, seed=1), seeded(7, 12, seed=2)], **LATENT,
                    negative_prompt_embeds=[seeded(9, 12, seed=3), seeded(3, 12, seed=4)],
                    guidance_scale=4.0 if doubled else 0.0)
    check(partial(run, partial(z_image.draw, pipe)), run, pipe.transformer,
          SlowAttention(pipe.transformer.layers, range(1, 2), range(2), slice(0, 16)))


# -------------------------------------------------------------------------------------------- two calls per step


def tiny_flux(guidance: bool = False, blocks=(2, 4), **changes):
    diffusers = import_diffusers()
    transformer = randomised(diffusers.FluxTransformer2DModel(**dict(
        in_channels=16, num_layers=blocks[0], num_single_layers=blocks[1], attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(2, 2, 4), guidance_embeds=guidance)
        | changes), std=0.3)
    return quiet(diffusers.FluxPipeline(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
                                        *[None] * 5, transformer))


def tiny_qwen(**changes):
    diffusers = import_diffusers()
    transformer = randomised(diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=6, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(2, 2, 4), **changes), std=0.3)
    return quiet(diffusers.QwenImagePipeline(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
                                             None, None, None, transformer))


def tiny_wan(experts: int = 1, **changes):
    diffusers = import_diffusers()
    transformers = [randomised(diffusers.WanTransformer3DModel(**dict(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12, freq_dim=16,
        ffn_dim=24, num_layers=11, rope_max_seq_len=16) | changes), seed=seed, std=0.3) for seed in range(experts)]
    for module in itertools.chain(*(transformer.modules() for transformer in transformers)):
        if isinstance(module, torch.nn.RMSNorm):
            module.weight.data.mul_(8)                           # else every map is nearly uniform
    return quiet(diffusers.WanPipeline(
        None, None, None, diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        *transformers, boundary_ratio=0.8 if experts == 2 else None))


def test_recipe_flux_with_built_in_guidance():
    from recipes import flux
    pipe = tiny_flux(guidance=True)
    blocks = [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]
    run = images_of(pipe, prompt_embeds=tokens(5, 12, 1), pooled_prompt_embeds=seeded(2, 10, seed=3),
                    **LATENT)
    check(partial(run, partial(flux.draw, pipe)), run, pipe.transformer,
          SlowAttention(blocks, range(1, 2), range(2), slice(5, 21)))


class Flux:
    """A pipeline of two calls: what it is given, its calls of the model, and the formula of its CFG."""
    variant, layers, image = "map", range(1, 2), slice(-16, None)

    def __init__(self, images: int):
        from recipes import flux
        self.pipe, self.scale, self.images = tiny_flux(), "true_cfg_scale", images
        self.model, self.draw = self.pipe.transformer, partial(flux.draw, self.pipe)
        self.blocks = [*self.model.transformer_blocks, *self.model.single_transformer_blocks]
        self.inputs = dict(prompt_embeds=tokens(5, 12, 1, images), negative_prompt_embeds=tokens(5, 12, 2, images),
                           pooled_prompt_embeds=seeded(images, 10, seed=3), **SIZE,
                           negative_pooled_prompt_embeds=seeded(images, 10, seed=4), latents=tokens(16, 16, 5, images))

    def times(self, steps):
        self.set_times(sigmas=np.linspace(1, 1 / steps, steps))

    def set_times(self, **options):                              # calculate_shift for 16 tokens
        self.pipe.scheduler.set_timesteps(**options, mu=0.5 + (1.15 - 0.5) * (16 - 256) / (4096 - 256))

    def call(self, x, t, kind):
        grid = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), dim=-1).flatten(0, 1)
        return self.model(x, self.inputs[kind + "prompt_embeds"], self.inputs[kind + "pooled_prompt_embeds"],
                          t.expand(len(x)).to(x) / 1000, F.pad(grid, (1, 0)).to(x), torch.zeros(5, 3).to(x),
                          return_dict=False)[0]

    def combine(self, cond, null, scale):
        return null + scale * (cond - null)


class Qwen(Flux):
    variant = "query"

    def __init__(self, images: int):
        from recipes import qwen_image
        self.pipe, self.scale, self.images = tiny_qwen(), "true_cfg_scale", images
        self.model, self.draw = self.pipe.transformer, partial(qwen_image.draw, self.pipe)
        self.blocks, mask = self.model.transformer_blocks, torch.ones(images, 7, dtype=torch.bool)
        mask[0, 4:] = images == 1                                # of two prompts one is padded
        self.inputs = dict(prompt_embeds=tokens(7, 12, 1, images), negative_prompt_embeds=tokens(4, 12, 2, images),
                           prompt_embeds_mask=mask, negative_prompt_embeds_mask=mask[:, :4], **SIZE,
                           latents=tokens(16, 16, 5, images))

    def call(self, x, t, kind):
        return self.model(x, self.inputs[kind + "prompt_embeds"], self.inputs[kind + "prompt_embeds_mask"],
                          t.expand(len(x)).to(x) / 1000, [[(1, 4, 4)]] * len(x), return_dict=False)[0]

    def combine(self, cond, null, scale):
        both = null + scale * (cond - null)
        return both * cond.norm(dim=-1, keepdim=True) / both.norm(dim=-1, keepdim=True)


class Wan(Flux):
    variant, layers, image = "query", range(2, 4), slice(None)

    def __init__(self, images: int):
        from recipes import wan
        self.pipe, self.scale, self.images = tiny_wan(), "guidance_scale", images
        self.model, self.draw = self.pipe.transformer, partial(wan.draw, self.pipe)
        self.blocks = self.model.blocks
        self.inputs = dict(prompt_embeds=tokens(5, 12, 1, images), negative_prompt_embeds=tokens(5, 12, 2, images),
                           latents=seeded(images, 4, 2, 8, 8, seed=5), num_frames=5, **SIZE)

    def times(self, steps):
        self.pipe.scheduler.set_timesteps(steps)

    def call(self, x, t, kind):
        return self.model(x.double(), t.expand(len(x)), self.inputs[kind + "prompt_embeds"], return_dict=False)[0]


@pytest.mark.parametrize("family, images", [(Flux, 1), (Qwen, 1), (Qwen, 2), (Wan, 1)])  # of two prompts one is padded
def test_recipes_of_two_calls_are_the_loop_written_by_hand(family, images):
    case = family(images)
    draw = lambda **options: case.draw(num_inference_steps=STEPS, output_type="latent",            # noqa: E731
                                       **{case.scale: 3.0}, **case.inputs, **options)
    plain = lambda: case.pipe(num_inference_steps=STEPS, output_type="latent", return_dict=False,  # noqa: E731
                              **{case.scale: 3.0}, **case.inputs)[0]
    before, off, on = forwards(case.model), draw(scale=1.0), draw(scale=2.5)
    slow = SlowAttention(case.blocks, case.layers, range(images), case.image, case.variant)
    latents, scheduler = case.inputs["latents"].to(off.dtype), case.pipe.scheduler
    case.times(STEPS)
    with torch.no_grad():
        for step, t in enumerate(scheduler.timesteps):
            cond = slow.predict(lambda: case.call(latents, t, ""), step, STEPS, 2.5)               # noqa: B023
            pred = case.combine(cond, case.call(latents, t, "negative_"), 3.0)
            latents = scheduler.step(pred, t, latents, return_dict=False)[0]
    close(on, latents, off)
    assert forwards(case.model) == before and torch.equal(plain(), off)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("family", [Flux, Qwen, Wan])
def test_two_calls_taken_for_one_are_an_error_in_the_first_step(family, images):
    case = family(images)
    passes = []
    case.model.register_forward_hook(lambda *_: passes.append(1))
    for cond in ("all", *["first", "last"] * (images == 2)):
        for steps in (STEPS, 2 * STEPS):
            passes.clear()
            with pytest.raises(RuntimeError, match="latents.*calls=2"):
                with guide(case.model, case.blocks, case.layers, scale=2.5, steps=steps, cond=cond):
                    case.pipe(num_inference_steps=STEPS, output_type="latent", **{case.scale: 3.0}, **case.inputs)
            assert len(passes) < 2                               # the second call did not get through
    assert all(forward is None for forward in forwards(case.model))


def test_the_two_experts_of_wan_are_two_trajectories():
    from recipes import wan
    pipe, case, steps = tiny_wan(experts=2), Wan(1), 11
    inputs = dict(**case.inputs, output_type="latent", guidance_scale=3.0)
    plain = lambda: pipe(num_inference_steps=steps, **inputs).frames                               # noqa: E731
    off = plain()
    on = wan.draw(pipe, 2.5, num_inference_steps=steps, **inputs)
    first = int((pipe.scheduler.timesteps >= 800).sum())
    assert 3 <= first <= steps - 3
    latents = case.inputs["latents"].float()
    pipe.scheduler.set_timesteps(steps)
    with torch.no_grad():
        for step, t in enumerate(pipe.scheduler.timesteps):
            case.model, begin, end = (pipe.transformer, 0, first) if t >= 800 else (pipe.transformer_2, first, steps)
            if step == begin:
                slow = SlowAttention(case.model.blocks, case.layers, range(1), variant="query")
            cond = slow.predict(lambda: case.call(latents, t, ""), step - begin, end - begin, 2.5)  # noqa: B023
            pred = case.combine(cond, case.call(latents, t, "negative_"), 3.0)
            latents = pipe.scheduler.step(pred, t, latents, return_dict=False)[0]
    close(on, latents, off)


# ------------------------------------------------------------------------------------- inputs of all kinds (row 5)


def run(model, inputs, steps: int = 5) -> Tensor:
    """The predictions of `steps` calls, model(**inputs(step)), stacked."""
    with torch.no_grad(), getattr(model, "cache_context", lambda name: contextmanager(lambda: (yield))())("cond"):
        outs = [model(**inputs(step)) for step in range(steps)]
    return torch.stack([out if isinstance(out, Tensor) else out[0] for out in outs])


def doubled(name: str, batch: int, *shape, seed: int) -> dict:
    """The same latents in both halves of the batch, as CFG makes them."""
    return {name: seeded(batch // 2, *shape, seed=seed).repeat(2, *[1] * len(shape))}


def hidream(batch: int, text_layers: int):
    diffusers = import_diffusers()
    model = randomised(diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        caption_channels=[12, 10], text_emb_dim=10, num_routed_experts=2, num_activated_experts=1,
        axes_dims_rope=(4, 2, 2), max_resolution=(8, 8), llama_layers=[0, 1, 2, 2]), std=0.3)
    fixed = dict(encoder_hidden_states_t5=tokens(5, 12, 90, batch), pooled_embeds=seeded(batch, 10, seed=91),
                 encoder_hidden_states_llama3=seeded(text_layers, batch, 4, 10, seed=92))      # (layers, batch, …)
    return model, [*model.double_stream_blocks, *model.single_stream_blocks], lambda step: dict(
        doubled("hidden_states", batch, 4, 8, 8, seed=step), **fixed,
        timesteps=torch.full((batch,), 900.0 - 100 * step, dtype=F64))


def hidream_take(args, kwargs, rows):
    return args, {name: x[:, rows] if name == "encoder_hidden_states_llama3" else x[rows] for name, x in kwargs.items()}


def kandinsky(batch: int, text: int, frames: int, images: int = 1):
    diffusers = import_diffusers()
    model = randomised(diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=12, in_text_dim2=10, time_dim=8, out_visual_dim=4, model_dim=16, ff_dim=24,
        num_text_blocks=1, num_visual_blocks=4, axes_dims=(4, 2, 2)), std=0.3).float()
    fixed = dict(encoder_hidden_states=tokens(text, 12, 90, batch).float(), text_rope_pos=torch.arange(text),
                 pooled_projections=seeded(batch, 10, seed=91).float(),
                 visual_rope_pos=(torch.arange(frames), torch.arange(4), torch.arange(4)))
    return model, model.visual_transformer_blocks, lambda step: dict(
        hidden_states=seeded(images, frames, 8, 8, 4, seed=step).repeat(batch // images, 1, 1, 1, 1).float(),
        timestep=torch.full((batch,), 900.0 - 100 * step), **fixed)


def kandinsky_take(args, kwargs, rows):
    return args, {name: x if name.endswith("rope_pos") else x[rows] for name, x in kwargs.items()}


INPUTS = {                                                       # each batch is 4, or 2 samples of one image
    "a batch in second place": (lambda: hidream(4, 3), hidream_take, slice(0, 16)),
    "a batch in second place, as many text layers": (lambda: hidream(4, 4), hidream_take, slice(0, 16)),
    "as many text tokens as samples": (lambda: kandinsky(2, 2, 1), kandinsky_take, None),
    "as many frames as samples": (lambda: kandinsky(2, 5, 2), kandinsky_take, None),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_that_are_not_one_row_per_sample_need_take(name):
    make, take, image = INPUTS[name]
    model, blocks, inputs = make()
    rows = range(len(inputs(0)["hidden_states"]))[len(inputs(0)["hidden_states"]) // 2:]
    options = dict(layers=range(1, 3), scale=2.5, steps=5, cond="last", image_tokens=image)
    off = run(model, inputs)
    for reuse in (True, False):
        with pytest.raises(RuntimeError, match="take="), guide(model, blocks, **options, reuse=reuse):
            run(model, inputs)
    with guide(model, blocks, **options, take=take):
        on = run(model, inputs)
    slow = SlowAttention(blocks, range(1, 3), rows, image or slice(None))
    with slowly(model, slow, 5, 2.5):
        close(on, run(model, inputs), off)


def prx(batch: int):
    diffusers = import_diffusers()
    model = randomised(diffusers.PRXTransformer2DModel(in_channels=4, patch_size=2, context_in_dim=12, hidden_size=16,
                                                       num_heads=2, depth=4, axes_dim=[4, 4]), std=0.3)
    return model, model.blocks, lambda step: dict(
        doubled("hidden_states", batch, 4, 8, 8, seed=step), timestep=torch.full((batch,), 0.1 * step, dtype=F64),
        encoder_hidden_states=tokens(5, 12, 90, batch))


def fibo(batch: int):
    diffusers = import_diffusers()
    model = randomised(diffusers.BriaFiboTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, text_encoder_dim=8, axes_dims_rope=[0, 4, 4]), std=0.3)
    return model, [*model.transformer_blocks, *model.single_transformer_blocks], lambda step: dict(
        doubled("hidden_states", batch, 16, 4, seed=step), encoder_hidden_states=tokens(5, 16, 90, batch),
        text_encoder_layers=[tokens(5, 8, 91 + layer, batch) for layer in range(4)], txt_ids=torch.zeros(5, 3),
        img_ids=seeded(16, 3, seed=9), timestep=torch.full((batch,), 0.9 - 0.1 * step, dtype=F64))


def proteina(batch: int):
    diffusers = import_diffusers()
    model = randomised(diffusers.RFD4ProteinaTransformer(
        nlayers=4, token_dim=16, nheads=2, dim_cond=8, pair_repr_dim=8, latent_dim=4, t_emb_dim=8, xt_pair_dist_dim=6,
        feats_seq=("xt_bb_ca", "xt_local_latents", "sequence_probabilities"), feats_pair_cond=("time_emb_bb_ca",),
        feats_cond_seq=("time_emb_bb_ca",), feats_pair_repr=("xt_bb_ca_pair_dists",), tri_mult_c=8), std=0.3)
    times, tokens_of = torch.full((batch,), 0.9, dtype=F64), torch.ones(batch, 8, dtype=torch.bool)
    return model, model.transformer_layers, lambda step: dict(
        doubled("bb_ca", batch, 8, 3, seed=step), **doubled("local_latents", batch, 8, 4, seed=50 + step),
        bb_ca_time=times, local_latents_time=times, padding_mask=tokens_of, return_dict=False, conditioning=dict(
            is_in_context_conditioning=~tokens_of, supports_local_latent=tokens_of,
            sequence_probabilities=tokens(8, 147, 90, batch).softmax(-1)))


@pytest.mark.parametrize("make, options", [
    (prx, dict(attention=0)),                                    # text joins the keys alone
    (fibo, {}),                                                  # a list of as many tensors as samples
    (proteina, {})])                                             # conditions in a dict, and several outputs
def test_other_inputs_are_cut_by_guide(make, options):
    model, blocks, inputs = make(4)
    off = run(model, inputs)
    with guide(model, blocks, range(1, 3), scale=2.5, steps=5, cond="last", **options):
        on = run(model, inputs)
    with slowly(model, SlowAttention(blocks, range(1, 3), range(2, 4)), 5, 2.5):
        close(on, run(model, inputs), off)


def test_two_calls_cut_nothing():
    """A pipeline of two calls never needs take=: here frames and text tokens are as many as samples."""
    model, blocks, inputs = kandinsky(2, 2, 2, images=2)
    off = run(model, lambda step: inputs(step // 2), 10)
    with guide(model, blocks, range(1, 3), scale=2.5, steps=5, calls=2, cond="last", ema_dtype=F64):
        on = run(model, lambda step: inputs(step // 2), 10)
    with slowly(model, SlowAttention(blocks, range(1, 3), range(2)), 5, 2.5):
        expected = run(model, inputs)
    close(on[1::2], expected, off[1::2])
    assert torch.equal(on[::2], off[::2])


class ListModel(torch.nn.Module):
    """Lists in and out, one tensor (C, F, H, W) per sample, as the official code of Wan has them: no tuple around."""

    def __init__(self):
        super().__init__()
        self.inner = tiny_wan().transformer
        self.blocks = self.inner.blocks

    def forward(self, x, t, context, seq_len):
        out = self.inner(torch.stack(x), t, torch.stack(context), return_dict=False)[0]
        return [sample.float() for sample in out]


@pytest.mark.parametrize("images", [1, 2])
def test_the_official_code_of_wan_takes_and_gives_lists(images):
    model, context = ListModel(), list(tokens(5, 12, 1, images))

    def calls():
        with torch.no_grad():
            return [torch.stack(model([*seeded(images, 4, 2, 8, 8, seed=step)], torch.full((images,), 900 - 100 * step),
                                      context=context if turn == 0 else [-sample for sample in context], seq_len=32))
                    for step in range(5) for turn in range(2)]

    off = calls()
    with guide(model, model.blocks, range(2, 4), scale=2.5, steps=5, calls=2, cond="first", variant="query"):
        on = calls()
    slow = SlowAttention(model.blocks, range(2, 4), range(images), variant="query")
    with torch.no_grad():
        for step in range(5):
            expected = slow.predict(lambda: torch.stack(model(                                     # noqa: B023
                [*seeded(images, 4, 2, 8, 8, seed=step)], torch.full((images,), 900 - 100 * step),  # noqa: B023
                context=context, seq_len=32)), step, 5, 2.5)
            close(on[2 * step], expected, off[2 * step]) if 1 <= step <= 3 else None
            assert torch.equal(on[2 * step + 1], off[2 * step + 1])


# ----------------------------------------------------------------------------- what cannot work says why (row 11)


def ernie():
    diffusers = import_diffusers()
    model = randomised(diffusers.ErnieImageTransformer2DModel(
        hidden_size=16, num_attention_heads=2, num_layers=4, ffn_hidden_size=24, in_channels=4, out_channels=4,
        text_in_dim=12, rope_axes_dim=(2, 2, 4)), std=0.3)
    return model, model.layers, lambda step: dict(
        hidden_states=seeded(2, 4, 4, 4, seed=step), timestep=torch.full((2,), 0.1 * step, dtype=F64),
        text_bth=tokens(5, 12, 90), text_lens=torch.tensor([5, 5]))


def mochi():
    diffusers = import_diffusers()
    model = randomised(diffusers.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=4, pooled_projection_dim=16,
        in_channels=4, text_embed_dim=16, time_embed_dim=8, max_sequence_length=5), std=0.3)
    return model, model.transformer_blocks, lambda step: dict(
        hidden_states=seeded(2, 4, 2, 4, 4, seed=step), timestep=torch.full((2,), 0.1 * step, dtype=F64),
        encoder_hidden_states=tokens(5, 16, 90), encoder_attention_mask=torch.ones(2, 5, dtype=torch.bool))


def latte(kind: str, cfg: bool = False):
    diffusers = import_diffusers()
    model = randomised(diffusers.LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=4,
        cross_attention_dim=16, sample_size=8, patch_size=2, num_embeds_ada_norm=1000, norm_type="ada_norm_single",
        norm_elementwise_affine=False, caption_channels=12, video_length=3, attention_bias=True), std=0.3)
    both = [block for pair in zip(model.transformer_blocks, model.temporal_transformer_blocks) for block in pair]
    samples = 1 if cfg else 2                                                            # CFG doubles one
    return model, both if kind == "both" else model.transformer_blocks, lambda step: dict(
        hidden_states=seeded(samples, 4, 3, 8, 8, seed=step).repeat(2 // samples, 1, 1, 1, 1),
        timestep=torch.full((2,), 10 * step),
        encoder_hidden_states=tokens(5, 12, 90))


def small_flux(cache=None):
    diffusers = import_diffusers()
    model = tiny_flux(blocks=(2, 1)).transformer
    if cache is not None:
        model.enable_cache(cache(diffusers))
    return model, [*model.transformer_blocks, *model.single_transformer_blocks], lambda step: dict(
        hidden_states=tokens(16, 16, step), encoder_hidden_states=tokens(5, 12, 90), img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(5, 3), pooled_projections=seeded(2, 10, seed=91),
        timestep=torch.full((2,), 0.1 * step, dtype=F64))


MESSAGES = {
    "fewer queries than keys": (lambda: prx(4), "last", "16 queries .*21 keys"),
    "tokens first": (ernie, "all", "21 samples .*2.*batch-first"),
    "one attention call per sample": (mochi, "all", "2 samples .*1.*one attention call"),
    "frames in the batch": (lambda: latte("spatial", cfg=True), "last", "folds .*batch"),
    "blocks of frames and of positions": (lambda: latte("both"), "all", "candidate.*6.*32"),
    "FirstBlockCache": (lambda: small_flux(lambda d: d.FirstBlockCacheConfig(threshold=10.0)), "all", "cache"),
    "MagCache": (lambda: small_flux(lambda d: d.MagCacheConfig(
        num_inference_steps=5, threshold=100.0, retention_ratio=0.0, max_skip_steps=3,
        mag_ratios=torch.ones(5))), "all", "cache"),
    "PyramidAttentionBroadcast": (lambda: small_flux(lambda d: d.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1000),
        spatial_attention_block_identifiers=("transformer_blocks",),
        current_timestep_callback=lambda: 500)), "all", "cache"),
    "TaylorSeer": (lambda: small_flux(lambda d: d.TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=1)), "all", "cache"),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_what_cannot_work_says_why(name):
    make, cond, message = MESSAGES[name]
    model, blocks, inputs = make()
    with pytest.raises(RuntimeError, match=message), guide(model, blocks, range(1, 3), scale=2.5, steps=5, cond=cond):
        run(model, inputs)


def test_frames_in_the_batch_work_where_nothing_is_cut():
    """Each frame is then a sample of its own, and chooses its own block."""
    model, blocks, inputs = latte("spatial")
    off = run(model, inputs)
    with guide(model, blocks, range(1, 3), scale=2.5, steps=5, cond="all") as emag:
        on = run(model, inputs)
    assert emag.selected.shape == (2 * 3, 2) and (on - off).abs().max() > 1e-3 * off.abs().max()


def test_a_kernel_in_the_place_of_torchs(monkeypatch):
    model, blocks, inputs = small_flux()
    fused, options = F.scaled_dot_product_attention, dict(layers=range(1, 3), scale=2.5, steps=5, cond="all")
    with guide(model, blocks, **options):
        expected = run(model, inputs)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kwargs: fused(*args, **kwargs))
    with guide(model, blocks, **options):
        assert torch.equal(run(model, inputs), expected)         # one that calls torch's in the end is seen there
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda query, *args, **kwargs: query)
    with pytest.raises(RuntimeError, match="replaces torch's scaled_dot_product"), guide(model, blocks, **options):
        run(model, inputs)


# ------------------------------------------------------------------------------------------- compiled models (row 3)


class Counting:
    """A compiler's backend that leaves the graph as it is and counts its runs."""

    def __init__(self):
        self.runs = 0

    def __call__(self, graph, inputs):
        def compiled(*args):
            self.runs += 1
            return graph(*args)
        return compiled


def other_dit():
    model = randomised(DiT(input_size=8, patch_size=2, in_channels=3, hidden_size=16, depth=3, num_heads=2,
                           num_classes=3, learn_sigma=False), std=0.3)
    return model, model.blocks, lambda step: dict(
        x=seeded(2, 3, 8, 8, seed=step), t=torch.full((2,), 0.1 * step, dtype=F64), y=torch.tensor([0, 1]))


WAYS = {
    "torch.compile(model)": lambda model, blocks, **options: torch.compile(model, **options),
    "model.compile()": lambda model, blocks, **options: model.compile(fullgraph=True, **options) or model,
    "each block": lambda model, blocks, **options: [block.compile(**options) for block in blocks] and model,
    "compile_repeated_blocks()": lambda model, blocks, **options: model.compile_repeated_blocks(**options) or model,
}


@pytest.mark.parametrize("make, way", zip((other_dit, other_dit, other_dit, small_flux), WAYS))
def test_compiled_is_uncompiled(make, way):
    torch._dynamo.reset()
    (plain, plain_blocks, inputs), (model, blocks, _), backend = make(), make(), Counting()
    options = dict(layers=range(1, 3), scale=2.5, steps=5, cond="all")
    with guide(plain, plain_blocks, **options) as expected_emag:
        expected = run(plain, inputs)
    model = WAYS[way](model, blocks, backend=backend)
    off, runs = run(model, inputs), backend.runs
    assert runs > 0
    for repeat in range(2):
        with guide(model, blocks, **options) as emag:
            on = run(model, inputs)
        assert torch.equal(torch.stack([entry.deviation for entry in emag.trace]),
                           torch.stack([entry.deviation for entry in expected_emag.trace]))
        close(on, expected, off)
    runs = backend.runs
    assert torch.equal(run(model, inputs), off) and backend.runs > runs                  # compiled again, as before
    torch._dynamo.reset()


# ----------------------------------------------------------------------------------------------- as commands


def test_a_recipe_runs_from_any_folder(tmp_path):
    done = subprocess.run([sys.executable, RECIPES / "sd3.py", "--out", "no/folder.png"], cwd=tmp_path, text=True,
                          capture_output=True)
    assert done.returncode == 2 and done.stderr.startswith("sd3.py: --out") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("family", ["dit_official", "dit_pipeline", "flux", "pixart", "qwen_image", "sd3", "sdxl",
                                    "sit_official", "wan", "z_image"])
def test_each_recipe_has_the_same_flags(family, monkeypatch, capsys):
    if family == "sdxl":
        import_diffusers()
    monkeypatch.setattr(sys, "argv", [f"{family}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(RECIPES / f"{family}.py"), run_name="__main__")
    text = capsys.readouterr().out
    assert not stop.value.code and all(flag in text for flag in ("prompt", "--seed", "--out", "--emag", "Blocks:"))


def test_a_recipe_as_a_command(tmp_path, monkeypatch):
    """SD3's, where the pipeline that is loaded is a tiny one that takes words for seeds."""
    diffusers, loaded = import_diffusers(), []

    class Loads:
        def __init__(self):
            self.pipe = tiny_sd3()
            self.transformer, self.to = self.pipe.transformer, lambda device: self
            self.vae = None

        num_timesteps = property(lambda self: self.pipe.num_timesteps)

        def __call__(self, prompt, generator):
            inputs = sd3_inputs(1) | dict(prompt_embeds=tokens(5, 12, len(prompt), 1))
            latents = self.pipe(generator=generator, **inputs).images[0, :3].permute(1, 2, 0)
            return SimpleNamespace(images=[Image.fromarray(latents.mul(20).add(128).byte().numpy())])

    def from_pretrained(name, **options):
        loaded.append(name)
        return Loads()

    monkeypatch.setattr(diffusers.StableDiffusion3Pipeline, "from_pretrained", from_pretrained)
    pictures = {}
    for name, flags in dict(plain=["--emag", "1"], emag=[], again=[], seed=["--seed", "5"], words=["a bird"]).items():
        out = tmp_path / f"{name}.png"
        monkeypatch.setattr(sys, "argv", ["sd3.py", *flags, "--out", str(out)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(RECIPES / "sd3.py"), run_name="__main__")
        assert stop.value.code == 0
        pictures[name] = out.read_bytes()
    assert pictures["emag"] == pictures["again"] and len(set(pictures.values())) == 4 and len(loaded) == 5
    monkeypatch.setattr(sys, "argv", ["sd3.py", "--emag", "nan"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(RECIPES / "sd3.py"), run_name="__main__")
    assert stop.value.code == 2
