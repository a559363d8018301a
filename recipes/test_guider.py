"""The guiders, in diffusers' own pipelines on tiny random models, against a loop written by hand."""
import functools
import math
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
import guider as recipe  # noqa: E402
from guider import ExponentialMovingAverageAdaptiveProjectedGuidance as EMAGWithAPG  # noqa: E402
from guider import ExponentialMovingAverageGuidance as EMAGWithCFG  # noqa: E402

STEPS, SCALE, CFG, BETA = 4, 2.5, 3.0, 0.988
OBSERVED, PERTURBED = range(0, 3), range(1, 3)                          # of 4 steps, by the window 1, 0.8, 0.2


def seeded(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return model.double().eval().requires_grad_(False)


class SD3:
    """Image tokens first, then text."""
    tokens, layers = slice(0, 16), [1, 2, 3]

    def __init__(self, depth: int = 5):
        from diffusers.modular_pipelines.stable_diffusion_3 import modular_blocks_stable_diffusion_3 as modular
        self.model = randomised(diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=depth, num_attention_heads=2,
            attention_head_dim=8, caption_projection_dim=16, joint_attention_dim=12, pooled_projection_dim=10,
            pos_embed_max_size=8))
        self.blocks = self.model.transformer_blocks
        self.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.inputs = {f"{kind}{name}": seeded(2, *shape, seed=i) for i, (kind, name, shape) in enumerate(
            (kind, name, shape) for kind in ("", "negative_")
            for name, shape in (("prompt_embeds", (5, 12)), ("pooled_prompt_embeds", (10,))))}
        self.inputs |= dict(latents=seeded(2, 4, 8, 8, seed=9), height=64, width=64)
        self.pipe = self.modular(modular.StableDiffusion3AutoBlocks())
        self.begin()

    def modular(self, blocks):
        for name in set(blocks.sub_blocks) - {"denoise"}:
            blocks.sub_blocks.pop(name)                               # encoders and decoder
        pipe = blocks.init_pipeline()
        pipe.set_progress_bar_config(disable=True)
        pipe.update_components(transformer=self.model, scheduler=self.scheduler)
        return pipe

    def begin(self):
        self.scheduler.set_timesteps(STEPS)
        return self.inputs["latents"]

    def call(self, x, t, kind):
        return self.model(x, encoder_hidden_states=self.inputs[kind + "prompt_embeds"], timestep=t.expand(len(x)),
                          pooled_projections=self.inputs[kind + "pooled_prompt_embeds"], return_dict=False)[0]

    def finish(self, pred, pred_cond):
        return pred

    def draw(self, guider):
        self.pipe.update_components(guider=guider)
        return self.pipe(num_inference_steps=STEPS, output="latents", **self.inputs)


class Qwen(SD3):
    """Text first, then the image. After CFG the prediction gets the conditional one's norm."""
    tokens = slice(5, 21)

    def __init__(self):
        from diffusers.modular_pipelines.qwenimage import modular_blocks_qwenimage as modular
        self.model = randomised(diffusers.QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=5, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=12, axes_dims_rope=(4, 2, 2)))
        self.blocks = self.model.transformer_blocks
        self.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
        mask = torch.ones(2, 5, dtype=torch.bool)
        self.inputs = dict(prompt_embeds=seeded(2, 5, 12, seed=1), negative_prompt_embeds=seeded(2, 5, 12, seed=2),
                           prompt_embeds_mask=mask, negative_prompt_embeds_mask=mask, latents=seeded(2, 16, 16, seed=3),
                           height=64, width=64)
        self.pipe = self.modular(modular.QwenImageAutoBlocks())

    def begin(self):
        self.scheduler._step_index = None                             # with the time shift that the pipeline chose
        return self.inputs["latents"]

    def call(self, x, t, kind):
        return self.model(x, self.inputs[kind + "prompt_embeds"], self.inputs[kind + "prompt_embeds_mask"],
                          t.expand(len(x)).to(x) / 1000, [[(1, 4, 4)]] * len(x), return_dict=False)[0]

    def finish(self, pred, pred_cond):
        return pred * pred_cond.norm(dim=-1, keepdim=True) / pred.norm(dim=-1, keepdim=True)


def cfg_by_hand(cond, null, state):
    return null + CFG * (cond - null)


def apg_by_hand(cond, null, state):
    """As diffusers has it: of the guidance the part along the conditional prediction is scaled by η = 0.5."""
    d = state["d"] = cond - null - 0.4 * state.get("d", 0)
    clipped = torch.stack([one * min(1, 2.0 / one.norm()) for one in d])
    along = torch.stack([(one * c).sum() / (c * c).sum() * c for one, c in zip(clipped, cond)])
    return null + CFG * (clipped - along + 0.5 * along)


GUIDERS = {"CFG": (EMAGWithCFG, diffusers.ClassifierFreeGuidance, {}, cfg_by_hand),
           "APG": (EMAGWithAPG, diffusers.AdaptiveProjectedGuidance, dict(
               adaptive_projected_guidance_momentum=-0.4, adaptive_projected_guidance_rescale=2.0, eta=0.5),
               apg_by_hand)}


@pytest.fixture(params=[SD3, Qwen], scope="module")
def case(request):
    return request.param()


@pytest.fixture(scope="module")
def sd3():
    return SD3()


def settings(case, **more):
    return dict(guidance_scale=CFG, emag_scale=SCALE, emag_layers=case.layers,
                image_tokens=[case.tokens.start, case.tokens.stop]) | more


@contextmanager
def slow_attention(blocks, layers, handle):
    """torch's attention by hand; handle(n, query, maps) may replace the maps of candidate n."""
    running, fused = [None], F.scaled_dot_product_attention

    def attend(query, key, value, attn_mask=None, **off):
        logits = query @ key.mT / math.sqrt(query.shape[-1])
        if attn_mask is not None:
            logits = logits + (torch.where(attn_mask, 0.0, -torch.inf) if attn_mask.dtype == torch.bool else attn_mask)
        maps, n = logits.softmax(-1), running[0]
        running[0] = None
        return (maps if n is None else handle(n, maps)) @ value

    hooks = [blocks[n].register_forward_pre_hook(lambda *_, n=n: running.__setitem__(0, n)) for n in layers]
    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused
        for hook in hooks:
            hook.remove()


def by_hand(case, combine):
    """EMAG in the sampling loop, of whole maps."""
    x, ema, state = case.begin(), {}, {}
    times = case.scheduler.timesteps
    for step, t in enumerate(times):
        seen, chosen = {}, {}

        def observe(n, maps):
            seen[n] = maps[:, :, case.tokens]                                                       # noqa: B023
            return maps

        def perturb(n, maps):
            rows = [row for row, block in chosen.items() if block == n]                             # noqa: B023
            maps = maps.clone()
            maps[rows, :, case.tokens] = ema[n][rows]
            return maps

        with slow_attention(case.blocks, case.layers, observe):
            cond = case.call(x, t, "")
        null = case.call(x, t, "negative_")
        if step in OBSERVED:
            for n, maps in seen.items():
                ema[n] = BETA * ema[n] + (1 - BETA) * maps if n in ema else maps
        if step in PERTURBED:
            for row in range(2):
                dev = [(ema[n][row] - seen[n][row]).abs().mean().item() for n in case.layers]
                chosen[row] = case.layers[dev.index(max(dev))]
            with slow_attention(case.blocks, case.layers, perturb):
                negative = case.call(x, t, "")
            cond = negative + SCALE * (cond - negative)
        x = case.scheduler.step(case.finish(combine(cond, null, state), cond), t, x, return_dict=False)[0]
    return x


def close(case, on, expected, off):
    """Equal to 1e-5 of the latents' size, and further from what they are without EMAG by a hundred times as much."""
    if isinstance(case, Qwen):                                          # the loop keeps them as tokens
        expected = diffusers.QwenImagePipeline._unpack_latents(expected, 64, 64, 8)
    size = off.abs().max()
    assert (on.squeeze() - expected.squeeze()).abs().max() < 1e-5 * size < 1e-2 * (on - off).abs().max()


def state(model):
    return [(dict(vars(m).get("_forward_hooks", {})), vars(m).get("forward"), vars(m).get("_compiled_call_impl"))
            for m in model.modules()]


@functools.cache
def drawn(case, kind: str, ours: bool = True) -> torch.Tensor:
    cls, base, options, _ = GUIDERS[kind]
    return case.draw(cls(**settings(case), **options) if ours else base(guidance_scale=CFG, **options))


@pytest.mark.parametrize("kind", GUIDERS)
def test_the_guider_is_the_loop_written_by_hand(case, kind):
    cls, _, options, combine = GUIDERS[kind]
    off, before = drawn(case, kind, ours=False), state(case.model)
    guider = cls(**settings(case), **options)
    on = case.draw(guider)
    expected = by_hand(case, combine)
    close(case, on, expected, off)
    assert len(guider.trace) == len(OBSERVED) and guider._emag is None  # E is freed, the choices may be looked at
    assert torch.equal(case.draw(guider), on)                           # a second picture starts anew
    assert state(case.model) == before


@pytest.mark.parametrize("kind", GUIDERS)
def test_off_and_disabled_are_the_library_bit_for_bit(case, kind):
    cls, base, options, _ = GUIDERS[kind]
    off = case.draw(cls(**settings(case, emag_scale=1.0), **options))
    assert torch.equal(off, drawn(case, kind, ours=False))
    guider, alone = cls(**settings(case), **options), base(guidance_scale=CFG, **options)
    guider.disable(), alone.disable()
    assert torch.equal(case.draw(guider), case.draw(alone))
    assert guider.num_conditions == 1 and len(guider.trace) <= len(OBSERVED)
    guider.enable()
    assert torch.equal(case.draw(guider), drawn(case, kind))


@pytest.mark.parametrize("kind", GUIDERS)
def test_saved_loaded_and_new(kind, tmp_path, sd3):
    cls, _, options, _ = GUIDERS[kind]
    case = sd3
    guider = cls(**settings(case), **options)
    guider.save_pretrained(tmp_path)
    on = drawn(case, kind)
    for other in (cls.from_pretrained(tmp_path), guider.new(), cls.from_config(guider.config)):
        assert type(other) is cls and torch.equal(case.draw(other), on)
    changed = guider.new(emag_scale=1.0, guidance_scale=5.0)
    assert (changed.config.emag_scale, changed.guidance_scale, changed.config.emag_layers) == (1.0, 5.0, case.layers)
    assert not torch.equal(case.draw(changed), on)
    assert "emag_scale" in repr(guider) and cls().config.emag_layers is None


def test_the_passes_of_a_step_and_which_are_conditional(sd3):
    case, seen = sd3, []
    guider = EMAGWithCFG(**settings(case))
    handle = case.model.register_forward_pre_hook(lambda *_: seen.append((guider._step, guider.is_conditional)))
    case.draw(guider)
    for step in range(STEPS):
        assert [kind for at, kind in seen if at == step] == [True, False] + [True] * (step in PERTURBED)
    seen.clear()
    case.draw(guider.new(guidance_scale=1.0))                           # no CFG: the negative is the second pass
    assert len(seen) == STEPS + len(PERTURBED)
    handle.remove()
    assert guider.is_unconditional is not guider.is_conditional


def test_emag_without_cfg_is_the_loop_too(case):
    on = case.draw(EMAGWithCFG(**settings(case, guidance_scale=1.0)))
    expected = by_hand(case, lambda cond, null, state: cond)
    close(case, on, expected, case.draw(diffusers.ClassifierFreeGuidance(guidance_scale=1.0)))


@pytest.mark.parametrize("error, call", [(RuntimeError, 0), (RuntimeError, 2), (KeyboardInterrupt, 4)])
def test_errors_leave_no_hook(error, call, sd3):
    """Call 0 and 2 are conditional passes, 4 is a negative one."""
    case, calls = sd3, iter(range(100))
    guider, before = EMAGWithCFG(**settings(case)), state(case.model)
    on = drawn(case, "CFG")

    def fail(*_):
        if next(calls) == call:
            raise error

    case.model.norm_out.forward, forward = lambda *args: fail() or forward(*args), case.model.norm_out.forward
    with pytest.raises(error):
        case.draw(guider)
    del case.model.norm_out.forward
    assert state(case.model) == before
    assert torch.equal(case.draw(guider), on)


def test_a_forward_that_was_replaced_stays_replaced(sd3, monkeypatch):
    on, forward = drawn(sd3, "CFG"), sd3.model.forward
    mine = lambda *args, **kwargs: forward(*args, **kwargs)                                         # noqa: E731
    monkeypatch.setitem(vars(sd3.model), "forward", mine)
    assert torch.equal(sd3.draw(EMAGWithCFG(**settings(sd3))), on) and sd3.model.forward is mine


@pytest.mark.parametrize("how", ["wrapper", "blocks"])
def test_a_compiled_denoiser(how):
    case = SD3(depth=2)
    case.layers = [0, 1]
    on, off = (case.draw(EMAGWithCFG(**settings(case, emag_scale=scale))) for scale in (SCALE, 1.0))
    if how == "wrapper":
        case.pipe.update_components(transformer=torch.compile(case.model, backend="eager"))
    for block in case.blocks if how == "blocks" else []:
        block.compile(backend="eager")
    compiled = case.draw(EMAGWithCFG(**settings(case)))
    assert (compiled - on).abs().max() < 1e-9 * off.abs().max() and "forward" not in vars(case.model)
    torch.compiler.reset()


def test_settings_out_of_range(sd3):
    with pytest.raises(ValueError, match="window|start"):
        EMAGWithCFG(emag_apply=1.0, emag_start=0.5)
    case = sd3
    for bad in (dict(emag_layers=[99]), dict(emag_variant="maps"), dict(emag_beta=2.0)):
        with pytest.raises(ValueError):
            case.draw(EMAGWithCFG(**settings(case, **bad)))
    with pytest.raises(ValueError, match="BLOCKS"):
        EMAGWithCFG()._make(torch.nn.Linear(2, 2))


def test_one_layer_none_and_the_default_depth(sd3):
    assert EMAGWithCFG(emag_layers=3)._make(sd3.model).layers == [3]
    for depth, layers in ((5, [1]), (16, [4, 5])):                      # a quarter to three eighths, at least one
        blocks = torch.nn.ModuleList(sd3.blocks[0] for _ in range(depth))
        assert EMAGWithCFG()._make(SimpleNamespace(transformer_blocks=blocks)).layers == layers


# ------------------------------------------------------------------------------------------------ HunyuanImage 2.1


def test_hunyuan_image():
    model = randomised(diffusers.HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=3, num_single_layers=5,
        num_refiner_layers=1, text_embed_dim=12, text_embed_2_dim=10, rope_axes_dim=(4, 4)))
    own = diffusers.ClassifierFreeGuidance(guidance_scale=CFG), diffusers.ClassifierFreeGuidance(guidance_scale=CFG)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    pipe = diffusers.HunyuanImagePipeline(scheduler, *[None] * 5, model, *own)
    pipe.set_progress_bar_config(disable=True)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    embeds = {f"{kind}prompt_embeds{n}": seeded(2, *shape, seed=i) for i, (kind, n, shape) in enumerate(
        (kind, n, shape) for kind in ("", "negative_") for n, shape in (("", (5, 12)), ("_2", (4, 10))))}
    masks = {f"{kind}prompt_embeds_mask{n}": each for kind in ("", "negative_")
             for n, each in (("", mask), ("_2", mask[:, 1:]))}
    inputs = dict(**embeds, **masks, height=128, width=128, output_type="latent", num_inference_steps=STEPS)

    def run(call, **options):
        return call(**inputs, **options, generator=torch.Generator().manual_seed(0))

    off, before = run(pipe).images, state(model)
    assert torch.equal(run(recipe.draw, pipe=pipe, scale=1.0, guidance_scale=CFG), off)
    on = run(recipe.draw, pipe=pipe, scale=SCALE, guidance_scale=CFG)
    assert (pipe.guider, pipe.ocr_guider) == own and state(model) == before

    forward, calls, ema, blocks = model.forward, [], {}, [*model.transformer_blocks, *model.single_transformer_blocks]

    def two_calls(*args, **kwargs):                                     # the conditional one first
        step, turn = divmod(len(calls), 2)
        calls.append(None)
        if turn or step not in OBSERVED:
            return forward(*args, **kwargs)

        def observe(n, maps):
            ema[n] = BETA * ema[n] + (1 - BETA) * maps[:, :, :16] if n in ema else maps[:, :, :16]
            return maps

        def perturb(n, maps):
            return torch.cat([ema[n], maps[:, :, 16:]], 2)

        with slow_attention(blocks, [2], observe):
            pred = forward(*args, **kwargs)[0]
        if step in PERTURBED:
            with slow_attention(blocks, [2], perturb):
                negative = forward(*args, **kwargs)[0]
            pred = negative + SCALE * (pred - negative)
        return (pred,)

    model.forward = two_calls
    expected = run(pipe).images
    del model.forward
    close(None, on, expected, off)
