"""The recipes in pipelines as people use them: edits, image to image, adapters, CFG in a part of the steps, offloading.

Tiny models of the real classes with random weights, against EMAG by slow means (test_recipes.py).
"""
import importlib
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])
from guide import guide  # noqa: E402
from test_emag import F64, randomised, seeded  # noqa: E402
from test_recipes import (LATENT, STEPS, SlowAttention, Wan, check, close, images_of, import_diffusers,  # noqa: E402
                          quiet, sd3_inputs, sdxl_check, tiny_flux, tiny_qwen, tiny_sd3, tiny_sdxl, tiny_z_image,
                          tokens)


def tiny_lumina2():
    diffusers = import_diffusers()
    model = randomised(diffusers.Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=6, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=2, multiple_of=8, axes_dim_rope=(4, 4, 4), axes_lens=(40, 16, 16),
        cap_feat_dim=12), std=0.3)
    return quiet(diffusers.Lumina2Pipeline(model, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), None, None,
                                           None))


def lumina2_inputs(lengths, **more) -> dict:
    mask = torch.stack([torch.arange(9) < length for length in lengths]).long()
    return dict(prompt_embeds=tokens(9, 12, 1, len(lengths)), negative_prompt_embeds=tokens(9, 12, 2, len(lengths)),
                prompt_attention_mask=mask, negative_prompt_attention_mask=mask, guidance_scale=3.0, **LATENT, **more)


def draw_lumina2(pipe, scale: float, **inputs):
    def image_tokens(args, kwargs):
        text = int(kwargs["encoder_attention_mask"].sum(dim=1).max())
        return slice(text, text + 16)

    with guide(pipe.transformer, pipe.transformer.layers, range(1, 2), scale=scale, steps=lambda: pipe.num_timesteps,
               calls=2, cond="first", image_tokens=image_tokens):
        return pipe(**inputs).images


def with_prompt(embeds: Tensor):
    """The conditional samples of a call: all where it has this prompt, none else."""
    return lambda args, kwargs: range(len(embeds)) if torch.equal(
        kwargs["encoder_hidden_states"].to(embeds), embeds) else None


@pytest.mark.parametrize("family, images", [("SD3", 1), ("Z-Image", 2), ("Lumina2", 2)])
def test_cfg_in_a_part_of_the_steps(family, images):
    """SD3's callback halves the batch, Z-Image stops to double it, Lumina2 stops to make its second call."""
    import_diffusers()
    from recipes import sd3, z_image
    sizes = set()                                                # of the batches

    def half_or_all(batch: int, half: range):
        sizes.add(batch)
        return half if batch == 2 * images else range(images)

    if family == "SD3":
        pipe = tiny_sd3()
        callback = importlib.import_module("diffusers.callbacks").SD3CFGCutoffCallback(cutoff_step_ratio=0.25)
        run = images_of(pipe, **sd3_inputs(images), callback_on_step_end=callback)
        draw, blocks, image = partial(sd3.draw, pipe), pipe.transformer.transformer_blocks, slice(0, 16)
        rows = lambda args, kwargs: half_or_all(len(kwargs["hidden_states"]), range(images, 2 * images))    # noqa: E731
    elif family == "Z-Image":
        pipe = tiny_z_image()
        run = images_of(pipe, prompt_embeds=list(tokens(9, 12, 1, images)), guidance_scale=3.0, cfg_truncation=0.2,
                        negative_prompt_embeds=list(tokens(7, 12, 2, images)), **LATENT)
        draw, blocks, image = partial(z_image.draw, pipe), pipe.transformer.layers, slice(0, 16)
        rows = lambda args, kwargs: half_or_all(len(args[0]), range(images))                                # noqa: E731
    else:
        pipe, inputs = tiny_lumina2(), lumina2_inputs([9] * images, cfg_trunc_ratio=0.5)
        run, draw = images_of(pipe, **inputs), partial(draw_lumina2, pipe)
        blocks, image, rows = pipe.transformer.layers, slice(9, 25), with_prompt(inputs["prompt_embeds"])
    check(partial(run, draw), run, pipe.transformer, SlowAttention(blocks, range(1, 2), tokens=image), rows=rows)
    assert len(sizes) == (0 if family == "Lumina2" else 2)


def test_a_conditional_call_without_a_partner_is_a_step():
    """The last steps of Lumina2 above make one call each."""
    pipe, count = tiny_lumina2(), []
    pipe.transformer.register_forward_hook(lambda *_: count.append(1))
    pipe(**lumina2_inputs([9], cfg_trunc_ratio=0.5))
    assert STEPS < len(count) < 2 * STEPS


def test_skip_layer_guidance_calls_the_model_once_more():
    from recipes import sd3
    images, pipe, passed = 2, tiny_sd3(dual_attention_layers=(0, 1, 2), qk_norm="rms_norm"), []
    run = images_of(pipe, **sd3_inputs(images), skip_guidance_layers=[1, 4], skip_layer_guidance_start=0.1,
                    skip_layer_guidance_stop=0.9)
    rows = lambda args, kwargs: passed.append(1) if "skip_layers" in kwargs else range(images, 2 * images)  # noqa: E731
    check(partial(run, partial(sd3.draw, pipe)), run, pipe.transformer,
          SlowAttention(pipe.transformer.transformer_blocks, range(1, 2), tokens=slice(0, 16)), rows=rows)
    assert passed


def encoded(pipe):
    """A pipeline that takes images as latents, of four channels."""
    pipe.latent_channels, pipe._encode_vae_image = 4, lambda image, generator: image
    pipe.image_processor.preprocess = lambda image, *size, **options: image
    return quiet(pipe)


@pytest.mark.parametrize("cfg", [False, True])
def test_a_reference_image_of_flux(cfg):
    """Kontext, also with true CFG: text, image, reference."""
    diffusers = import_diffusers()
    from recipes import flux
    base = tiny_flux(guidance=True)
    pipe = encoded(diffusers.FluxKontextPipeline(base.scheduler, *[None] * 5, base.transformer))
    inputs = dict(prompt_embeds=tokens(5, 12, 1, 1), pooled_prompt_embeds=seeded(1, 10, seed=3), **LATENT,
                  image=seeded(1, 4, 8, 4, seed=9), _auto_resize=False, max_area=64 * 64)
    if cfg:
        inputs |= dict(negative_prompt_embeds=tokens(5, 12, 2, 1), negative_pooled_prompt_embeds=seeded(1, 10, seed=4),
                       true_cfg_scale=3.0)
    run = images_of(pipe, **inputs)
    check(partial(run, partial(flux.draw, pipe)), run, pipe.transformer,
          SlowAttention(pipe.transformer.transformer_blocks, range(1, 2), tokens=slice(5, 21)),
          rows=with_prompt(inputs["prompt_embeds"]))


@pytest.mark.parametrize("references", [1, 2])
def test_reference_images_of_qwen_image(references, monkeypatch):
    """Behind the image; Edit has one, EditPlus several."""
    diffusers = import_diffusers()
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
    from recipes import qwen_image
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (32, 64, None))
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "calculate_dimensions", lambda area, ratio: (32, 64))
    base, picture = tiny_qwen(), Image.new("RGB", (32, 64))
    pipeline = diffusers.QwenImageEditPipeline if references == 1 else diffusers.QwenImageEditPlusPipeline
    pipe = encoded(pipeline(base.scheduler, None, None, None, None, base.transformer))
    pipe.image_processor.resize = lambda image, *size: image
    pipe.image_processor.preprocess = lambda image, *size: seeded(1, 4, 8, 4, seed=9)
    inputs = dict(prompt_embeds=tokens(7, 12, 1, 1), negative_prompt_embeds=tokens(4, 12, 2, 1), true_cfg_scale=3.0,
                  prompt_embeds_mask=torch.ones(1, 7, dtype=torch.bool), image=[picture] * references,
                  negative_prompt_embeds_mask=torch.ones(1, 4, dtype=torch.bool), **LATENT)
    run = images_of(pipe, **inputs)
    check(partial(run, partial(qwen_image.draw, pipe)), run, pipe.transformer,
          SlowAttention(pipe.transformer.transformer_blocks, range(1, 2), tokens=slice(7, 23), variant="query"),
          rows=with_prompt(inputs["prompt_embeds"]))


def test_layers_of_qwen_image(monkeypatch):
    """Three images follow each other; behind them is the reference."""
    diffusers = import_diffusers()
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_layered
    from recipes import qwen_image
    monkeypatch.setattr(pipeline_qwenimage_layered, "calculate_dimensions", lambda area, ratio: (32, 64))
    base = tiny_qwen(use_layer3d_rope=True, use_additional_t_cond=True)
    pipe = encoded(diffusers.QwenImageLayeredPipeline(base.scheduler, *[None] * 4, base.transformer))
    config = SimpleNamespace(z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    pipe.vae = SimpleNamespace(dtype=F64, config=config,
                               decode=lambda latents, return_dict: (latents[:, :, 0, None],))
    pipe.text_encoder, pipe.image_processor.resize = SimpleNamespace(dtype=F64), lambda image, *size: image
    pipe.image_processor.preprocess = lambda image, *size: seeded(1, 4, 8, 4, seed=9)
    pipe.image_processor.postprocess = lambda image, output_type: image
    inputs = dict(prompt="a", prompt_embeds=tokens(7, 12, 1, 1), negative_prompt_embeds=tokens(4, 12, 2, 1), layers=2,
                  true_cfg_scale=3.0, num_inference_steps=STEPS, image=[Image.new("RGB", (32, 64))])
    draw = images_of(pipe, **inputs)
    check(partial(draw, partial(qwen_image.draw, pipe)), draw, pipe.transformer,
          SlowAttention(pipe.transformer.transformer_blocks, range(1, 2), tokens=slice(7, 7 + 3 * 8), variant="query"),
          rows=with_prompt(inputs["prompt_embeds"]))


@pytest.mark.parametrize("doubled", [True, False])
def test_references_of_z_image_are_in_lists_of_lists(doubled):
    """Two samples, which share a reference: text, reference, image, and what SigLIP makes of the reference."""
    diffusers = import_diffusers()
    from recipes import z_image
    pipe = quiet(diffusers.ZImageOmniPipeline(*[None] * 7))
    base, lengths = tiny_z_image(siglip_feat_dim=6), [9, 3, 5]   # each 32 with padding, as the reference's 8
    pipe.register_modules(scheduler=base.scheduler, transformer=base.transformer)
    pipe.prepare_image_latents = lambda *, batch_size, **more: [[seeded(4, 1, 4, 8, seed=20)]] * batch_size
    pipe.prepare_siglip_embeds = lambda *, batch_size, **more: [[seeded(2, 3, 6, seed=30)]] * batch_size
    embeds = [[[seeded(length, 12, seed=seed + sample) for length in lengths] for sample in (0, 1)] for seed in (1, 3)]
    run = images_of(pipe, prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], **LATENT,
                    guidance_scale=4.0 if doubled else 0.0)
    check(partial(run, partial(z_image.draw, pipe)), run, pipe.transformer,
          SlowAttention(pipe.transformer.layers, range(1, 2), range(2), slice(128, 144)))


@pytest.mark.parametrize("family", ["SD3", "Flux", "SDXL", "Z-Image", "SD3 inpainting"])
def test_image_to_image_makes_fewer_steps(family, strength=0.5, steps=4):
    diffusers = import_diffusers()
    from recipes import flux, sd3, z_image
    more = dict(image=seeded(2, 4, 8, 8, seed=9), strength=strength, num_inference_steps=2 * steps)
    vae = SimpleNamespace(config=SimpleNamespace(latent_channels=4, shift_factor=0.0, scaling_factor=1.0))
    if family == "SDXL":
        pipe = encoded(tiny_sdxl("StableDiffusionXLImg2ImgPipeline"))
        pipe.vae = vae
        return sdxl_check(pipe, 2, steps=steps, without=["height", "width"], **more)
    if family.startswith("SD3"):
        pipe, inputs = encoded(tiny_sd3("StableDiffusion3Img2ImgPipeline")), sd3_inputs(2)
        if family == "SD3 inpainting":                           # mask and masked image beside each half of the latents
            pipe = tiny_sd3("StableDiffusion3InpaintPipeline", in_channels=33, out_channels=16)
            more |= dict(image=seeded(1, 3, 64, 64, seed=9).sigmoid(), mask_image=torch.ones(1, 1, 64, 64).tril())
            vae.config.latent_channels, vae.dtype = 16, F64
            vae.encode = lambda x: SimpleNamespace(latents=x.mean(1, keepdim=True)[..., ::8, ::8].repeat(1, 16, 1, 1))
        draw, blocks, image, rows = sd3.draw, pipe.transformer.transformer_blocks, slice(0, 16), range(2, 4)
    elif family == "Flux":
        base = tiny_flux(guidance=True)
        pipe = encoded(diffusers.FluxImg2ImgPipeline(base.scheduler, *[None] * 5, base.transformer))
        inputs = dict(prompt_embeds=tokens(5, 12, 1), pooled_prompt_embeds=seeded(2, 10, seed=3), **LATENT)
        draw, blocks, image, rows = flux.draw, pipe.transformer.transformer_blocks, slice(5, 21), range(2)
    else:
        base = tiny_z_image()
        pipe = encoded(diffusers.ZImageImg2ImgPipeline(base.scheduler, None, None, None, base.transformer))
        inputs = dict(prompt_embeds=list(tokens(9, 12, 1)), negative_prompt_embeds=list(tokens(7, 12, 2)), **LATENT)
        draw, blocks, image, rows = z_image.draw, pipe.transformer.layers, slice(0, 16), range(2)
    pipe.vae = vae
    run = images_of(pipe, **inputs | more)
    check(partial(run, partial(draw, pipe)), run, pipe.transformer,
          SlowAttention(blocks, range(1, 2), rows, image), steps=steps)


# ------------------------------------------------------------------------------------------------ adapters and lists


@pytest.mark.parametrize("layers, images", [(2, 1), (3, 2)])
def test_a_controlnet_with_as_many_outputs_as_samples(layers, images):
    """A list of 2 tensors beside a doubled batch of 2, and of 3 beside 4."""
    diffusers = import_diffusers()
    from recipes import sd3
    control = randomised(diffusers.SD3ControlNetModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=layers, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=4,
        pos_embed_max_size=16), seed=5, std=0.3)
    pipe = tiny_sd3("StableDiffusion3ControlNetPipeline", more=[control])
    hint = seeded(1, 4, 64, 64, seed=9).repeat(2 * images, 1, 1, 1)
    pipe.prepare_image = lambda **options: hint
    encode = lambda x: SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda: x[..., ::8, ::8]))        # noqa: E731
    pipe.vae = SimpleNamespace(config=SimpleNamespace(shift_factor=0.0, scaling_factor=1.0), dtype=F64, encode=encode)
    run = images_of(pipe, **sd3_inputs(images), control_image=hint)
    check(partial(run, partial(sd3.draw, pipe)), run, pipe.transformer,
          SlowAttention(pipe.transformer.transformer_blocks, range(1, 2), range(images, 2 * images), slice(0, 16)))


def test_two_ip_adapters_and_one_image_of_sdxl():
    """A list of two tensors beside a doubled batch of two."""
    import_diffusers()
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
    pipe = tiny_sdxl()
    unet = pipe.unet
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(10, 12, 2) for _ in range(2)])
    unet.config.encoder_hid_dim_type = "ip_image_proj"
    processors = dict(unet.attn_processors)
    for name in processors:
        if name.endswith("attn2.processor"):
            attn = unet.get_submodule(name.removesuffix(".processor"))
            processors[name] = IPAdapterAttnProcessor2_0(attn.to_q.in_features, 12, num_tokens=(2, 2), scale=[1.0, 1.0])
    unet.set_attn_processor(processors)
    randomised(unet, std=0.5)
    sdxl_check(pipe, 1, ip_adapter_image_embeds=[seeded(2, 1, 10, seed=seed) for seed in (8, 9)])


def test_an_ip_adapter_of_flux():
    """The model takes the embeddings out of the dict that it is given."""
    import_diffusers()
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
    from recipes import flux
    pipe = tiny_flux()
    model = pipe.transformer
    model.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(10, 12, 2)])
    model.set_attn_processor({name: FluxIPAdapterAttnProcessor(16, 12, num_tokens=(2,)) if "single" not in name else own
                              for name, own in model.attn_processors.items()})
    randomised(model, std=0.3)
    inputs = dict(prompt_embeds=tokens(5, 12, 1), pooled_prompt_embeds=seeded(2, 10, seed=3),
                  negative_prompt_embeds=tokens(5, 12, 2), negative_pooled_prompt_embeds=seeded(2, 10, seed=4),
                  ip_adapter_image_embeds=[seeded(2, 1, 10, seed=8)], true_cfg_scale=3.0,
                  negative_ip_adapter_image_embeds=[seeded(2, 1, 10, seed=9)], **LATENT)
    run = images_of(pipe, **inputs)
    check(partial(run, partial(flux.draw, pipe)), run, model,
          SlowAttention(model.transformer_blocks, range(1, 2), tokens=slice(5, 21)),
          rows=with_prompt(inputs["prompt_embeds"]))


def test_a_t2i_adapter_of_sdxl():
    """The U-Net takes the adapter's features out of the list that it is given."""
    diffusers = import_diffusers()
    adapter = randomised(diffusers.T2IAdapter(in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=8,
                                              adapter_type="full_adapter"), std=0.3)
    base = tiny_sdxl()
    pipe = quiet(diffusers.StableDiffusionXLAdapterPipeline(None, None, None, None, None, base.unet, adapter,
                                                            base.scheduler))
    sdxl_check(pipe, 1, image=seeded(1, 3, 64, 64, seed=9))


# ------------------------------------------------------------------------------------- offloading, stopping, refusals


@pytest.mark.parametrize("family, kind, group", [("SD3", "block_level", 2), ("SD3", "block_level", 3),
                                                 ("SD3", "leaf_level", None), ("Wan", "block_level", 3)])
def test_group_offloading_turns_reuse_off(family, kind, group, tmp_path):
    """A group is loaded by the first of its blocks. On disk, those that were not loaded are empty."""
    import_diffusers()
    from diffusers.hooks import apply_group_offloading
    from recipes import sd3

    def make():
        if family == "SD3":
            pipe = tiny_sd3()
            return pipe, images_of(pipe, **sd3_inputs(1)), partial(sd3.draw, pipe)
        case = Wan(1)
        return case.pipe, lambda draw, **scale: draw(**case.inputs, num_inference_steps=STEPS, output_type="latent",
                                                     guidance_scale=3.0, **scale), case.draw

    pipe, run, draw = make()
    off, expected = run(draw, scale=1.0), run(draw, scale=2.5)
    pipe, run, draw = make()
    cpu = torch.device("cpu")
    apply_group_offloading(pipe.transformer, onload_device=cpu, offload_device=cpu, offload_type=kind,
                           num_blocks_per_group=group, offload_to_disk_path=str(tmp_path))
    close(run(draw, scale=2.5), expected, off)


@pytest.mark.parametrize("raises", [False, True])
def test_after_an_interrupted_picture_reset_starts_the_next(raises):
    pipe, noise = tiny_sd3(), lambda: torch.Generator().manual_seed(0)
    options = dict(layers=range(2, 4), cond="last", scale=2.5, steps=lambda: pipe.num_timesteps)
    blocks, inputs = pipe.transformer.transformer_blocks, sd3_inputs(1)

    def stop(pipe, step, t, inputs):
        if step == 2 and raises:
            raise InterruptedError
        pipe._interrupt = step == 2
        return {}

    def draw(**more):
        return pipe(generator=noise(), **inputs, **more).images

    with guide(pipe.transformer, blocks, **options):
        expected = draw()
    with guide(pipe.transformer, blocks, **options) as emag:
        for _ in range(2):
            try:
                draw(callback_on_step_end=stop)
            except InterruptedError:
                assert raises
            emag.reset()
            assert torch.equal(draw(), expected)
        try:
            draw(callback_on_step_end=stop)
        except InterruptedError:
            assert raises
        emag.reset()
    with pytest.raises(RuntimeError, match="step 3 of 4.*reset"), guide(pipe.transformer, blocks, **options):
        try:
            draw(callback_on_step_end=stop)
        except InterruptedError:
            assert raises


def test_a_batch_padded_to_a_negative_prompt():
    """Z-Image; the error's advice is followed."""
    from recipes import z_image
    pipe = tiny_z_image()

    def run(length: int, scale: float):
        draw = images_of(pipe, prompt_embeds=[seeded(7, 12, seed=1)], guidance_scale=4.0, **LATENT,
                         negative_prompt_embeds=[seeded(length, 12, seed=3)])
        return draw(partial(z_image.draw, pipe), scale=scale)

    for length in (40, 33):
        with pytest.raises(RuntimeError, match="no negative prompt that is longer"):
            run(length, 2.5)
    run(7, 2.5)


def test_image_tokens_that_a_mask_hides():
    """Lumina2 puts each sample's image behind its own prompt: one slice is right for prompts of one length alone."""
    pipe = tiny_lumina2()
    with pytest.raises(RuntimeError, match="of one length"):
        draw_lumina2(pipe, 2.5, **lumina2_inputs([9, 5]))
    for length in (9, 5):                                        # with the same length, and one after the other
        draw_lumina2(pipe, 2.5, **lumina2_inputs([length] * 2))


def test_a_softmax_that_is_not_the_attention():
    """Kandinsky's NABLA: a softmax over blocks of tokens chooses what a sparse kernel attends to."""
    diffusers = import_diffusers()
    from diffusers.models.attention_dispatch import attention_backend
    model = randomised(diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=12, in_text_dim2=10, time_dim=8, out_visual_dim=4, model_dim=16, ff_dim=24,
        num_text_blocks=1, num_visual_blocks=4, axes_dims=(4, 2, 2)), std=0.3).float()
    sparse = dict(sta_mask=torch.eye(2, dtype=torch.bool)[None, None], P=0.9, to_fractal=True)

    def run(steps: int):
        with torch.no_grad(), attention_backend("flex"):     # model.set_attention_backend would leave it on for all
            for step in range(steps):
                model(hidden_states=seeded(1, 1, 32, 16, 4, seed=step).float(), timestep=torch.full((1,), 900.0 - step),
                      encoder_hidden_states=tokens(5, 12, 90, 1).float(), text_rope_pos=torch.arange(5),
                      pooled_projections=seeded(1, 10, seed=91).float(), sparse_params=sparse,
                      visual_rope_pos=(torch.arange(1), torch.arange(16), torch.arange(8)))

    run(1)
    with pytest.raises(RuntimeError, match="not the image's attention"):
        with guide(model, model.visual_transformer_blocks, range(1, 3), scale=2.5, steps=5, cond="all"):
            run(5)
