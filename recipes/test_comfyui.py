"""The ComfyUI node, against EMAG by slow means: in a stand-in for ComfyUI, and in ComfyUI itself where the environment
variable COMFYUI names its folder."""
import copy
import gc
import importlib.machinery
import importlib.util
import json
import logging
import math
import os
import sys
import types
import weakref
from collections import Counter, defaultdict
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import emag as core  # noqa: E402

WINDOW, BETA, SCALE, CFG = (1.0, 0.8, 0.2), 0.988, 2.5, 3.0


def load(name: str):
    """recipes/comfyui.py on whatever `comfy` is importable now."""
    spec = importlib.util.spec_from_file_location(name, HERE / "comfyui.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------- EMAG by slow means, by hand


def sample_euler(model, x, sigmas, begin=lambda step, first: None):
    for i in range(len(sigmas) - 1):
        begin(i, True)
        d = (x - model(x, sigmas[i])) / sigmas[i]
        x = x + d * (sigmas[i + 1] - sigmas[i])
    return x


def sample_heun(model, x, sigmas, begin=lambda step, first: None):
    for i in range(len(sigmas) - 1):
        begin(i, True)
        d, h = (x - model(x, sigmas[i])) / sigmas[i], sigmas[i + 1] - sigmas[i]
        if sigmas[i + 1] > 0:
            begin(i, False)
            x_next = x + d * h
            d = (d + (x_next - model(x_next, sigmas[i + 1])) / sigmas[i + 1]) / 2
        x = x + d * h
    return x


class Slow:
    """EMAG for calls of one conditioning each. Nothing of it is shared with emag.py or comfyui.py: the attention is
    computed by hand in float64, hooks of torch say which block runs, and where the image lies is told."""

    def __init__(self, blocks, layers, tokens, variant, steps, scale=SCALE, window=WINDOW):
        self.blocks, self.layers, self.tokens, self.variant = blocks, list(layers), tokens, variant
        self.steps, self.scale = steps, scale
        self.start, self.apply, self.stop = (round(bound * (steps - 1)) for bound in window)
        self.ema, self.seen, self.chosen, self.running = {}, {}, {}, None

    def begin(self, step, first):
        self.left, self.first = self.steps - 1 - step, first

    def attend(self, func, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False,
               skip_output_reshape=False, transformer_options=None, **kwargs):
        if not skip_reshape:
            q, k, v = (x.reshape(len(x), x.shape[1], heads, -1).transpose(1, 2) for x in (q, k, v))
        dtype = v.dtype
        q, k, v = q.double(), k.double(), v.double()
        mask = mask[(None,) * (4 - mask.ndim)] if mask is not None and mask.ndim != 3 else \
            mask[:, None] if mask is not None else None

        def softmax(q):
            logits = q @ k.mT * kwargs.get("scale", q.shape[-1] ** -0.5)
            if mask is not None:
                logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
            return logits.softmax(-1)

        block, mixed = None, []
        if q.shape[2] == k.shape[2]:
            block, self.running = self.running, None            # the first self-attention of a block
        if block is not None:
            (uuid,), image = transformer_options["uuids"], self.tokens
            seen = q[:, :, image] if self.variant == "query" else softmax(q)[:, :, image]
            if not self.chosen:
                self.seen[uuid, block] = seen
            mixed = [row for row in range(len(q)) if self.chosen.get((uuid, row)) == block]
        if mixed and self.variant == "query":
            q = q.clone()
            q[mixed, :, image] = self.ema[uuid, block][mixed]
        attn = softmax(q)
        if mixed and self.variant == "map":
            attn[mixed, :, image] = self.ema[uuid, block][mixed]
        out = (attn @ v).to(dtype)
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    def guided(self, calc) -> Tensor:
        """ε̃' of the positive conditionings, of which calc(transformer_options) makes the prediction."""
        options = {"optimized_attention_override": self.attend}
        hooks = [self.blocks[n].register_forward_pre_hook(lambda *_, n=n: setattr(self, "running", n))
                 for n in self.layers]
        try:
            self.seen, self.chosen = {}, {}
            pred = calc(options)
            if not self.stop <= self.left <= self.start:
                return pred
            for key, seen in self.seen.items():
                if self.first:
                    self.ema[key] = BETA * self.ema[key] + (1 - BETA) * seen if key in self.ema else seen
            if self.left > self.apply:
                return pred
            if self.first:
                self.deviation = {key: (self.ema[key] - seen).abs().flatten(1).mean(1)
                                  for key, seen in self.seen.items()}
            for uuid in {uuid for uuid, _ in self.seen}:
                dev = torch.stack([self.deviation[uuid, n] for n in self.layers])
                self.chosen |= {(uuid, row): self.layers[n] for row, n in enumerate(dev.argmax(0).tolist())}
            negative = calc(options)
            return negative + self.scale * (pred - negative)
        finally:
            for hook in hooks:
                hook.remove()


def close(on, expected, off):
    """Within 1e-5 of the hand-written loop, and further from what it is without EMAG by a hundred times as much."""
    size = off.abs().max().item()
    assert expected.isfinite().all() and (on - expected).abs().max() <= 1e-5 * size <= 1e-2 * (on - off).abs().max()


# ------------------------------------------------------------------------------------------------- the stand-in


def own_attention(q, k, v, heads, mask=None, skip_reshape=False, transformer_options=None):
    """The attention that a user chose: nothing in it that EMAG could catch."""
    q, k, v = (x.reshape(len(x), x.shape[1], heads, -1).transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.mT * q.shape[-1] ** -0.5).exp()
    return (weights / weights.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2)


def attention_pytorch(q, k, v, heads, mask=None, skip_reshape=False, transformer_options=None):
    q, k, v = (x.reshape(len(x), x.shape[1], heads, -1).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


def optimized_attention(*args, transformer_options, **kwargs):
    override = transformer_options.get("optimized_attention_override")
    call = partial(override, own_attention) if override else own_attention
    return call(*args, transformer_options=transformer_options, **kwargs)


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.qkv, self.out, self.mlp = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x, transformer_options):
        q, k, v = self.qkv(F.layer_norm(x, x.shape[-1:])).chunk(3, -1)
        x = x + self.out(optimized_attention(q, k, v, 2, transformer_options=transformer_options))
        return x + self.mlp(F.layer_norm(x, x.shape[-1:])).tanh()


class Joint(nn.Module):
    """Text and image attend together; `order` says where the image is. A reference image may lie beside it."""

    def __init__(self, order="text image", dim=8):
        super().__init__()
        self.embed, self.text, self.final = nn.Linear(4, dim), nn.Linear(6, dim), nn.Linear(dim, 4)
        self.blocks, self.order = nn.ModuleList(Block(dim) for _ in range(8)), order.split()

    def forward(self, x, t, context, transformer_options, reference=None):
        batch, channels, height, width = x.shape
        parts = {"text": self.text(context), "image": self.embed(x.flatten(2).mT) + t[:, None, None]}
        if reference is not None:
            parts["reference"] = self.embed(reference.flatten(2).mT)
        order = [name for name in self.order if name in parts]
        x = torch.cat([parts[name] for name in order], 1)
        for block in self.blocks:
            x = block(x, transformer_options=transformer_options)
        x = x.split([parts[name].shape[1] for name in order], 1)[order.index("image")]
        return self.final(x).mT.reshape(batch, channels, height, width)


def executor(owner, original, wrappers):
    """What ComfyUI's wrappers get as their first argument."""
    def call(*args, **kwargs):
        rest = executor(owner, original, wrappers[1:])
        return wrappers[0](rest, *args, **kwargs) if wrappers else original(*args, **kwargs)
    call.class_obj = owner
    return call


class BaseModel:
    def __init__(self, network):
        self.diffusion_model = network

    def apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):
        def apply(x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):
            uuids, which = transformer_options["uuids"], transformer_options["cond_or_uncond"]
            assert len(uuids) == len(which) and len(x) in (1, 2 * len(which))     # patches split the batch by these
            out = self.diffusion_model(x, t, c_crossattn, dict(transformer_options), **kwargs)
            return x - t.view(-1, 1, 1, 1) * out
        wrappers = transformer_options["wrappers"].get("apply_model", [])
        return executor(self, apply, wrappers)(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)


class Patcher:
    def __init__(self, model, wrappers=()):
        self.model, self.wrappers, self.model_options = model, defaultdict(dict, wrappers), {}

    def clone(self):
        return Patcher(self.model, {kind: dict(keyed) for kind, keyed in self.wrappers.items()})

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers[kind][key] = wrapper

    def remove_wrappers_with_key(self, kind, key):
        self.wrappers[kind].pop(key, None)


class Guider:
    """ComfyUI's CFG: conditionings of equal text are batched, [negative, positive], while `batches()` allows it."""

    def __init__(self, patcher, positive, negative, batches=lambda: True, scale=CFG):
        self.patcher, self.batches, self.scale = patcher, batches, scale
        self.conds = {"positive": positive, "negative": negative}
        self.wrappers = {kind: list(keyed.values()) for kind, keyed in patcher.wrappers.items()}

    def calc_cond_batch(self, conds, x, sigma, options={}):
        def calc(model, conds, x, sigma, options):
            outs = [torch.zeros_like(x) for _ in conds]
            counts = [torch.zeros_like(x) for _ in conds]
            left = [(cond, i) for i, some in enumerate(conds) for cond in some or ()]
            while left:
                alike = [entry for entry in left if self.alike(entry[0], left[0][0])]
                batch = alike[::-1] if self.batches() else left[:1]
                left = [entry for entry in left if all(entry is not other for other in batch)]
                areas = [cond.get("area", slice(None)) for cond, _ in batch]
                more = {name: torch.cat([cond[name] for cond, _ in batch]) for name in {"reference"} & set(batch[0][0])}
                out = model.apply_model(
                    torch.cat([x[:, :, area] for area in areas]), sigma.repeat(len(batch)),
                    c_crossattn=torch.cat([cond["text"] for cond, _ in batch]),
                    transformer_options={**options, "wrappers": self.wrappers, "cond_or_uncond": [i for _, i in batch],
                                         "uuids": [cond["uuid"] for cond, _ in batch]}, **more)
                for (_, i), area, one in zip(batch, areas, out.chunk(len(batch)), strict=True):
                    outs[i][:, :, area] += one
                    counts[i][:, :, area] += 1
            return [out / count.clamp(min=1) for out, count in zip(outs, counts)]
        run = executor(None, calc, self.wrappers.get("calc_cond_batch", []))
        return run(self.patcher.model, conds, x, sigma, options)

    @staticmethod
    def alike(one, other):
        rows = [len(range(4)[each.get("area", slice(None))]) for each in (one, other)]
        return one["text"].shape == other["text"].shape and rows[0] == rows[1]

    def predict_noise(self, x, sigma, model_options={}, seed=None):
        positive, negative = self.calc_cond_batch([self.conds["positive"], self.conds["negative"]], x, sigma)
        return negative + self.scale * (positive - negative)

    def sample(self, x, sampler, sigmas):
        """sampler: a function of (model, x, sigmas)."""
        def outer(noise, latent, sampler, sigmas):
            predict = executor(self, self.predict_noise, self.wrappers.get("predict_noise", []))
            return sampler.sampler_function(
                lambda x, sigma: predict(x, sigma.expand(len(x)), self.patcher.model_options), noise, sigmas)
        run = executor(self, outer, self.wrappers.get("outer_sample", []))
        with torch.inference_mode():
            return run(x, torch.zeros_like(x), types.SimpleNamespace(sampler_function=sampler), sigmas)


class ByHand(Guider):
    """The positive conditionings one by one with slow EMAG, the others as they are."""

    def __init__(self, *args, slow, **kwargs):
        super().__init__(*args, batches=lambda: False, **kwargs)
        self.slow = slow

    def predict_noise(self, x, sigma, model_options={}, seed=None):
        positive = self.slow.guided(
            lambda options: self.calc_cond_batch([self.conds["positive"]], x, sigma, options)[0])
        (negative,) = self.calc_cond_batch([self.conds["negative"]], x, sigma)
        return self.combine(positive, negative, x, sigma)

    def combine(self, positive, negative, x, sigma):
        return negative + self.scale * (positive - negative)


@pytest.fixture(scope="module")
def node():
    """recipes/comfyui.py on the stand-in's few names of ComfyUI."""
    names = {"comfy": {}, "comfy.ldm": {}, "comfy.ldm.modules": {},
             "comfy.ldm.modules.attention": {"attention_pytorch": attention_pytorch},
             "comfy.patcher_extension": {"WrappersMP": types.SimpleNamespace(
                 OUTER_SAMPLE="outer_sample", PREDICT_NOISE="predict_noise", CALC_COND_BATCH="calc_cond_batch",
                 APPLY_MODEL="apply_model")}}
    with pytest.MonkeyPatch.context() as patch:
        for name, content in names.items():
            module = types.ModuleType(name)
            vars(module).update(content, __path__=[])
            patch.setitem(sys.modules, name, module)
        return load("comfyui_on_a_stand_in")


def seeded(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cond(seed, length=5, batch=2, **more):
    return {"text": seeded(batch, length, 6, seed=seed), "uuid": f"prompt {seed}", **more}


def apply_node(node, model, scale=SCALE, start=WINDOW[0], apply=WINDOW[1], stop=WINDOW[2], layers="2-4",
               variant="query", beta=BETA):
    return node.NODE_CLASS_MAPPINGS["EMAG"]().patch(model, scale, start, apply, stop, layers, variant, beta)[0]


def joint(order="text image"):
    torch.manual_seed(0)
    network = Joint(order).eval().requires_grad_(False)
    for p in network.parameters():
        p.mul_(2)
    return Patcher(BaseModel(network))


X, SIGMAS = seeded(2, 4, 4, 6, seed=9), torch.linspace(1, 0, 8)


def by_hand(patcher, conds, sampler=sample_euler, tokens=slice(5, 29), variant="query", guider=ByHand):
    slow = Slow(patcher.model.diffusion_model.blocks, range(2, 5), tokens, variant, len(SIGMAS) - 1)
    return guider(patcher, *conds, slow=slow).sample(X, partial(sampler, begin=slow.begin), SIGMAS)


def hooks(model) -> int:
    """What hooks and replaced calls a network has."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + (m._compiled_call_impl is not None)
               + ("forward" in vars(m)) for m in model.modules())


@contextmanager
def averages(node):
    """The EMAG objects that a run makes, as weak references."""
    made, original = [], node.EMAG

    class Spied(original):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(weakref.ref(self))

    node.EMAG = Spied
    try:
        yield made
    finally:
        node.EMAG = original


@pytest.mark.parametrize("sampler", [sample_euler, sample_heun])
@pytest.mark.parametrize("variant", ["query", "map"])
@pytest.mark.parametrize("how", ["batched", "separate", "in turns"])
def test_the_node_is_emag_by_hand(node, sampler, variant, how):
    patcher, conds, turn = joint(), ([cond(1)], [cond(2)]), iter(range(10**6))
    batches = {"batched": lambda: True, "separate": lambda: False, "in turns": lambda: next(turn) % 3 > 0}[how]
    off = Guider(patcher, *conds, batches).sample(X, sampler, SIGMAS)
    guided = apply_node(node, patcher, variant=variant)
    on = Guider(guided, *conds, batches).sample(X, sampler, SIGMAS)
    close(on, by_hand(patcher, conds, sampler, variant=variant), off)
    if how != "in turns":
        assert torch.equal(Guider(guided, *conds, batches).sample(X, sampler, SIGMAS), on)
    assert hooks(patcher.model.diffusion_model) == 0


@pytest.mark.parametrize("order, tokens", [("image text", slice(0, 24)), ("text image reference", slice(5, 29)),
                                           ("text reference image", slice(29, 53)), ("image", slice(0, 24))])
def test_the_image_is_found_wherever_it_lies(node, order, tokens):
    patcher = joint(order)
    conds = tuple([cond(seed, reference=seeded(2, 4, 4, 6, seed=5))] for seed in (1, 2))
    run = partial(sampler_run, conds=conds)
    close(run(apply_node(node, patcher)), by_hand(patcher, conds, tokens=tokens), run(patcher))


def sampler_run(patcher, conds, sampler=sample_euler, guider=Guider, **options):
    return guider(patcher, *conds, **options).sample(X, sampler, SIGMAS)


def test_the_image_is_found_under_quantised_weights(node):
    """Inputs rounded to 8 bits, on a scale that all tokens share: then text tokens change a little too."""
    def quantised(x):
        return x.div(scale := x.abs().max() / 448).to(torch.float8_e4m3fn).to(x) * scale

    patcher, found = joint(), []
    for block in patcher.model.diffusion_model.blocks:
        block.qkv.register_forward_pre_hook(lambda _, args: (quantised(args[0]),))
        block.mlp.register_forward_pre_hook(lambda _, args: (quantised(args[0]),))
    original, node.image_tokens = node.image_tokens, lambda *args: found.append(original(*args)) or found[-1]
    sampler_run(apply_node(node, patcher, layers="2-7"), ([cond(1)], [cond(2)]), batches=lambda: False)
    node.image_tokens = original
    assert found == [slice(5, 29)]


def test_an_image_in_several_pieces_is_refused(node):
    patcher = joint()
    forward = patcher.model.diffusion_model.embed.forward
    patcher.model.diffusion_model.embed.forward = lambda x: forward(x) * (torch.arange(24) % 5 > 0)[:, None]
    with pytest.raises(RuntimeError, match="piece"):
        sampler_run(apply_node(node, patcher), ([cond(1)], [cond(2)]))


def test_unequal_prompts_and_areas(node):
    patcher = joint()
    for positive in ([cond(1, length=7)], [cond(1, area=slice(0, 3)), cond(3, area=slice(1, 4))]):
        conds = positive, [cond(2)]
        tokens = slice(7, 31) if len(positive) == 1 else slice(5, 23)
        on, off = sampler_run(apply_node(node, patcher), conds), sampler_run(patcher, conds)
        close(on, by_hand(patcher, conds, tokens=tokens), off)


def test_dual_cfg_and_other_negatives(node):
    class Dual(Guider):
        def predict_noise(self, x, sigma, model_options={}, seed=None):
            middle = [{**self.conds["negative"][0], "uuid": "middle"}]
            conds = [self.conds["negative"], middle, self.conds["positive"]]
            null, middle, pred = self.calc_cond_batch(conds, x, sigma)
            return null + 2 * (middle - null) + 3 * (pred - middle)

    class Weak(Guider):                                        # a second call for the same prompt, as SLG makes
        def predict_noise(self, x, sigma, model_options={}, seed=None):
            pred = super().predict_noise(x, sigma)
            (weak,) = self.calc_cond_batch([self.conds["positive"]], x * 0.9, sigma)
            return pred + 0.5 * (pred - weak)

    class DualByHand(ByHand):
        combine = lambda self, pred, null, x, sigma: null + 3 * (pred - null)                       # noqa: E731

    class WeakByHand(ByHand):
        def combine(self, positive, negative, x, sigma):
            pred = super().combine(positive, negative, x, sigma)
            (weak,) = self.calc_cond_batch([self.conds["positive"]], x * 0.9, sigma)
            return pred + 0.5 * (pred - weak)

    patcher, conds = joint(), ([cond(1)], [cond(2)])
    for guider, hand in ((Dual, DualByHand), (Weak, WeakByHand)):
        on, off = (sampler_run(model, conds, guider=guider) for model in (apply_node(node, patcher), patcher))
        close(on, by_hand(patcher, conds, guider=hand), off)


def test_a_scale_of_one_is_off_and_the_last_node_counts(node):
    patcher, conds = joint(), ([cond(1)], [cond(2)])
    off, on = sampler_run(patcher, conds), sampler_run(apply_node(node, patcher), conds)
    assert torch.equal(sampler_run(apply_node(node, patcher, scale=1.0), conds), off)
    assert torch.equal(sampler_run(apply_node(node, apply_node(node, patcher, scale=4.0)), conds), on)
    assert torch.equal(sampler_run(apply_node(node, apply_node(node, patcher), scale=1.0), conds), off)


def test_what_other_wrappers_keep_of_the_model_stays_as_it_was(node):
    def keep(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        kept.append((out, out.clone()))
        return out

    kept, guided = [], apply_node(node, joint())
    guided.add_wrapper_with_key("apply_model", "other", keep)
    sampler_run(guided, ([cond(1)], [cond(2)]))
    assert kept and all(torch.equal(*pair) for pair in kept)


def test_a_run_that_is_interrupted_leaves_nothing(node):
    class Interrupted(Exception):
        pass

    def sampler(model, x, sigmas):
        for i in range(4):
            model(x * (1 - i / 9), sigmas[i])
        network.final.register_forward_pre_hook(interrupt)
        model(x, sigmas[4])

    def interrupt(*_):
        raise Interrupted

    patcher, conds = joint(), ([cond(1)], [cond(2)])
    network, off = patcher.model.diffusion_model, sampler_run(patcher, conds)
    guided = apply_node(node, patcher)
    on = sampler_run(guided, conds)
    with averages(node) as made:
        with pytest.raises(Interrupted):
            sampler_run(guided, conds, sampler)
        network.final._forward_pre_hooks.clear()
        assert made and not any(emag() for emag in made if gc.collect() is not None)
    assert hooks(network) == 0
    assert torch.equal(sampler_run(patcher, conds), off) and torch.equal(sampler_run(guided, conds), on)


def test_one_line_per_run(node, caplog):
    patcher, conds = joint(), ([cond(1)], [cond(2)])
    with caplog.at_level(logging.INFO):
        sampler_run(apply_node(node, patcher), conds)
        sampler_run(apply_node(node, patcher, start=0.5, apply=0.5, stop=0.5, layers="3"), conds)
        sampler_run(apply_node(node, patcher), ([], [cond(2)]))
    first, second, third = [record for record in caplog.records if "EMAG" in record.message]
    assert "6 of 7 steps" in first.message and "5 negatives" in first.message
    assert "1 of 7 steps" in second.message and "from blocks 3 (2×)" in second.message            # two samples
    assert third.levelno == logging.WARNING and "nothing" in third.message


def test_what_cannot_be_right_is_refused_with_what_to_do(node):
    patcher, conds = joint(), ([cond(1)], [cond(2)])
    unknown = Patcher(BaseModel(nn.Linear(2, 2)))
    for bad in (dict(layers="a"), dict(layers="6-9"), dict(layers="4-2"), dict(apply=1.0, start=0.5), dict(beta=2.0)):
        with pytest.raises(ValueError):
            apply_node(node, patcher, **bad)
    with pytest.raises(ValueError, match="bypass"):
        apply_node(node, unknown)
    for options in ({"context_handler": object()}, {"transformer_options": {"easycache": object()}},
                    {"multigpu_clones": {1: 2}}):
        guided = apply_node(node, patcher)
        guided.model_options = options
        with pytest.raises(RuntimeError, match="bypass"):
            sampler_run(guided, conds)
    assert hooks(patcher.model.diffusion_model) == 0


def test_layers(node):
    assert node.numbers("6-8", 24) == node.numbers(" 6, 7,8", 24) == node.numbers("", 24) == [6, 7, 8]
    assert node.numbers("1,3-4", 8) == [1, 3, 4] and node.numbers("", 4) == [1]
    assert node.NODE_CLASS_MAPPINGS["EMAG"].INPUT_TYPES()["required"]["variant"][0][0] == "query"


HEUNPP2 = [0, 1, 2, 1, 2, 3, 2, 3, 3]                                 # the index of σ in each evaluation, for 4 steps


@pytest.mark.parametrize("name, at, steps", [
    ("sample_euler", [0, 1, 2, 3], [0, 1, 2, 3]),
    ("sample_heun", [0, 1, 1, 2, 2, 3, 3], [0, 0, 1, 1, 2, 2, 3]),
    ("sample_heunpp2", HEUNPP2, [0, 0, 0, 1, 1, 1, 2, 2, 3]),
    ("sample_dpm_2", [0, 0.5, 1, 1.5, 2, 2.5, 3], [0, 0, 1, 1, 2, 2, 3]),
    ("sample_dpmpp_sde", [0, 0.5, 1, 1.5, 2, 2.5, 3], [0, 0, 1, 1, 2, 2, 3])])
def test_which_step_an_evaluation_belongs_to(node, name, at, steps):
    def function():
        pass
    function.__name__ = name
    sigmas = torch.tensor([1.0, 0.7, 0.4, 0.2, 0.0])
    run = node.Run(2.0, core.Window(), "", {}, types.SimpleNamespace(sampler_function=function), sigmas)
    guider, found, first = types.SimpleNamespace(conds={}), [], []
    for i in at:
        low, high = sigmas[math.floor(i)], sigmas[math.ceil(i)]
        run.evaluation(guider, ((low + high) / 2).item(), {})
        found.append(run.step)
        first.append(run.advances)
    assert found == steps and first == [step not in steps[:i] for i, step in enumerate(steps)]


# ----------------------------------------------------------------------------------------------------- the workflow


def check_workflow(classes):
    """recipes/comfyui-workflow.json, as ComfyUI's page saves it: links join slots that exist and are of one type, and
    widgets hold what the nodes take. classes: type → ComfyUI's class; nodes of other types are not looked at.
    Gives the types of the nodes."""
    flow = json.loads((HERE / "comfyui-workflow.json").read_text())
    nodes = {node["id"]: node for node in flow["nodes"]}
    assert len(nodes) == len(flow["nodes"]) and flow["last_node_id"] == max(nodes)
    for number, source, out, target, into, kind in flow["links"]:
        one, other = nodes[source]["outputs"][out], nodes[target]["inputs"][into]
        assert number in one["links"] and other["link"] == number and one["type"] == other["type"] == kind
    assert len(flow["links"]) == sum(len(node["inputs"]) for node in nodes.values()) == flow["last_link_id"]
    for node in nodes.values():
        if node["type"] not in classes:
            continue
        cls = classes[node["type"]]
        outputs = [output["type"] for output in node["outputs"]]         # newer versions may have more
        assert outputs == list(cls.RETURN_TYPES)[:len(outputs)]
        inputs = {**cls.INPUT_TYPES()["required"], **cls.INPUT_TYPES().get("optional", {})}
        values = list(node["widgets_values"])
        sockets = [name for name, (kind, *_) in inputs.items() if isinstance(kind, str) and kind in (
            "MODEL", "CLIP", "VAE", "CONDITIONING", "LATENT", "IMAGE")]
        assert sorted(sockets) == sorted(each["name"] for each in node["inputs"])
        assert all(each["type"] == inputs[each["name"]][0] for each in node["inputs"])
        for name, (kind, *more) in inputs.items():
            if name in sockets:
                continue
            value, limits = values.pop(0), more[0] if more else {}
            choices = kind if isinstance(kind, (list, tuple)) else limits.get("options")
            if choices is not None:
                assert value in choices or name == "ckpt_name"         # a file that the reader has
            else:
                assert isinstance(value, {"FLOAT": (int, float), "INT": int, "STRING": str}[kind])
                assert kind == "STRING" or limits["min"] <= value <= limits["max"]
            if limits.get("control_after_generate"):
                assert values.pop(0) in ("fixed", "increment", "decrement", "randomize")
        assert not values
    return {node["type"] for node in nodes.values()}


def test_the_workflow_fits_the_node(node):
    assert "EMAG" in check_workflow(node.NODE_CLASS_MAPPINGS)


# ------------------------------------------------------------------------------------------------- ComfyUI itself

real = pytest.mark.skipif(not os.environ.get("COMFYUI"), reason="COMFYUI names no folder of ComfyUI")


class Absent:
    """Stands in for packages of ComfyUI's that sampling does not use, where they are not installed."""
    names = ("torchaudio", "torchvision", "spandrel")

    class Module(types.ModuleType):
        __path__ = []

        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            module = importlib.import_module(f"{self.__name__}.{name}")
            setattr(self, name, module)
            return module

        def __call__(self, *args, **kwargs):
            return None

        def __mro_entries__(self, bases):
            return ()

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] in cls.names:
            return importlib.machinery.ModuleSpec(name, cls, is_package=True)

    @classmethod
    def create_module(cls, spec):
        return cls.Module(spec.name)

    @classmethod
    def exec_module(cls, module):
        pass


@pytest.fixture(scope="module")
def comfy():
    """ComfyUI's package and the node on it."""
    sys.path.insert(0, os.environ["COMFYUI"])
    sys.meta_path.append(Absent)
    argv, sys.argv = sys.argv, ["main.py", "--cpu"]
    try:
        import comfy.options
        comfy.options.enable_args_parsing()
        import comfy.ldm.chroma.model
        import comfy.ldm.flux.model
        import comfy.ldm.hunyuan_video.model
        import comfy.model_patcher
        import comfy.sample
        import comfy.supported_models
        import comfyui_version
    finally:
        sys.argv = argv
    comfy.version = tuple(map(int, comfyui_version.__version__.split(".")))
    comfy.node = load("comfyui_on_comfyui")
    return comfy


class Family:
    """A tiny model of one of ComfyUI's own classes with random weights, 8 blocks; its latents, prompts, and image."""
    joint = dict(in_channels=16, hidden_size=64, mlp_ratio=2.0, num_heads=2, depth=4, depth_single_blocks=4, theta=256,
                 axes_dim=[8, 12, 12], context_in_dim=24, vec_in_dim=32, out_channels=16, qkv_bias=True,
                 guidance_embed=True, txt_ids_dims=[])
    packed = dict(joint, in_channels=64, out_channels=64, in_dim=64, out_dim=64, hidden_dim=64, n_layers=2,
                  patch_size=2, vec_in_dim=None)
    sd3 = dict(in_channels=16, depth=2, num_blocks=8, input_size=None, patch_size=2, adm_in_channels=32, num_patches=36,
               pos_embed_max_size=6, pos_embed_scaling_factor=None, qk_norm="rms", context_embedder_config={
                   "target": "torch.nn.Linear", "params": {"in_features": 24, "out_features": 128}})
    lumina = dict(patch_size=2, in_channels=16, dim=64, n_layers=8, n_refiner_layers=1, n_heads=2, n_kv_heads=1,
                  qk_norm=True, cap_feat_dim=24, axes_dims=[8, 12, 12], axes_lens=[300, 512, 512], multiple_of=32,
                  ffn_dim_multiplier=1.0)
    z_image = dict(lumina, dim=256, n_heads=8, n_kv_heads=8, z_image_modulation=True, time_scale=1000.0,
                   rope_theta=256.0, pad_tokens_multiple=8)
    table = {                                                          # configuration, latent, the image's tokens
        "SD3": (sd3, (16, 8, 12), slice(5, 29)),
        "SD3.5": (dict(sd3, x_block_self_attn_layers=[0, 1, 2, 3, 4]), (16, 8, 12), slice(5, 29)),
        "Flux": (dict(joint, patch_size=2), (16, 8, 12), slice(5, 29)),
        "Chroma": (packed, (16, 8, 12), slice(5, 29)),
        "QwenImage": (dict(in_channels=64, out_channels=16, num_layers=8, attention_head_dim=32, num_attention_heads=2,
                           joint_attention_dim=24, axes_dims_rope=(8, 12, 12)), (16, 1, 8, 12), slice(5, 29)),
        "WAN21_T2V": (dict(model_type="t2v", dim=96, ffn_dim=128, num_heads=2, num_layers=8, text_dim=24, text_len=8,
                           in_dim=16, out_dim=16, freq_dim=64), (16, 3, 8, 12), slice(0, 72)),
        "Lumina2": (lumina, (16, 8, 12), slice(5, 29)),
        "Z-Image": (z_image, (16, 8, 10), slice(8, 28)),               # text padded to 8, the image's 20 tokens to 24
        "HunyuanVideo": (dict(joint, patch_size=[1, 2, 2], byt5=False, meanflow=False, use_cond_type_embedding=False,
                              vision_in_dim=None, meanflow_sum=False), (16, 3, 8, 12), slice(5, 77)),
    }

    def __init__(self, comfy, name):
        config, shape, self.tokens = self.table[name]
        if name == "HunyuanVideo" and comfy.version < (0, 4):
            self.tokens = slice(0, 72)
        params = {"Flux": comfy.ldm.flux.model.FluxParams, "Chroma": comfy.ldm.chroma.model.ChromaParams,
                  "HunyuanVideo": comfy.ldm.hunyuan_video.model.HunyuanVideoParams}.get(name)
        if params:
            config = {key: config[key] for key in config if key in params.__dataclass_fields__}
        cls = {"SD3.5": "SD3", "Z-Image": "Lumina2"}.get(name, name)
        extra = {} if cls == "SD3" else {"image_model": None}
        built = getattr(comfy.supported_models, cls)({**copy.deepcopy(config), **extra})
        built.unet_config["dtype"] = torch.float32
        model, random = built.get_model({}, ""), torch.Generator().manual_seed(0)
        for name_, p in [*model.diffusion_model.named_parameters(), *model.diffusion_model.named_buffers()]:
            if p.ndim >= 2:
                p.data = torch.randn(p.shape, generator=random) * (2 / p.shape[1:].numel()) ** 0.5
            elif p.is_floating_point() and p.numel():
                p.data = torch.randn(p.shape, generator=random) * 0.1 + (not name_.endswith("bias"))
        cpu = torch.device("cpu")
        self.comfy, self.name = comfy, name
        self.patcher = comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
        self.network = model.diffusion_model
        lists = "joint_blocks", "double_blocks", "single_blocks", "transformer_blocks", "blocks", "layers"
        self.blocks = [block for name in lists for block in getattr(self.network, name, [])]
        self.latent = torch.zeros(1, *shape)
        self.prompts = self.prompt(1), self.prompt(2)

    def prompt(self, seed, length=5, **more):
        more.setdefault("attention_mask", torch.ones(1, length, dtype=torch.long))
        if self.name not in ("Lumina2", "Z-Image"):
            more.pop("attention_mask")
        more |= {"pooled_output": seeded(1, 32, seed=seed + 100), "guidance": 3.0}
        return [[seeded(1, length, 24, seed=seed), more]]

    def noise(self):
        return torch.randn(self.latent.shape, generator=torch.Generator().manual_seed(7))

    def sample(self, patcher=None, sampler="euler", steps=6, prompts=None, **more):
        """Through ComfyUI's own comfy.sample."""
        positive, negative = prompts or self.prompts
        with torch.inference_mode():
            return self.comfy.sample.sample(patcher or self.patcher, self.noise(), steps, CFG, sampler, "simple",
                                            positive, negative, self.latent, disable_pbar=True, seed=0, **more)

    def by_hand(self, sampler=sample_euler, steps=6, prompts=None, variant="query", tokens=None, combine=None,
                patcher=None):
        """The loop, CFG and EMAG by hand; ComfyUI prepares the prompts and calls the model for one at a time."""
        samplers, patcher = self.comfy.samplers, (patcher or self.patcher).clone()
        slow = Slow(self.blocks, range(2, 5), tokens or self.tokens, variant, steps)
        patcher.model.memory_required = lambda *args, **kwargs: math.inf

        class Hand(samplers.CFGGuider):
            def calc(guider, conds, x, sigma, options, **more):
                options = {**options, "transformer_options": {**options.get("transformer_options", {}), **more}}
                return samplers.calc_cond_batch(guider.inner_model, [conds], x, sigma, options)[0]

            def predict_noise(guider, x, sigma, model_options={}, seed=None):
                calc = partial(guider.calc, x=x, sigma=sigma, options=model_options)
                pred = slow.guided(lambda options: calc(guider.conds["positive"], **options))
                null = calc(guider.conds["negative"])
                return combine(pred, null, x, sigma, model_options, guider) if combine else null + CFG * (pred - null)

        def function(model, x, sigmas, extra_args, callback, disable):
            return sampler(lambda x, sigma: model(x, sigma.expand(len(x)), **extra_args), x, sigmas, slow.begin)

        sigmas = samplers.KSampler(patcher, steps, torch.device("cpu"), "euler", "simple").sigmas
        guider = Hand(patcher)
        guider.set_conds(*(prompts or self.prompts))
        try:
            with torch.inference_mode():
                return guider.sample(self.noise(), self.latent, samplers.KSAMPLER(function), sigmas, disable_pbar=True,
                                     seed=0)
        finally:
            del patcher.model.memory_required

    def guided(self, patcher=None, **options):
        return apply_node(self.comfy.node, patcher or self.patcher, **options)


@real
@pytest.mark.parametrize("sampler, variant", [("euler", "query"), ("euler", "map"), ("heun", "query")])
@pytest.mark.parametrize("name", Family.table)
def test_comfyui_is_emag_by_hand(comfy, name, sampler, variant):
    if name == "Z-Image" and comfy.version < (0, 4):
        pytest.skip("this ComfyUI has no Z-Image")
    family, hand = Family(comfy, name), {"euler": sample_euler, "heun": sample_heun}[sampler]
    off, guided = family.sample(sampler=sampler), family.guided(variant=variant)
    with averages(comfy.node) as made:
        on = family.sample(guided, sampler)
    close(on, family.by_hand(hand, variant=variant), off)
    assert torch.equal(family.sample(guided, sampler), on)             # a rerun
    assert made and not any(emag() for emag in made if gc.collect() is not None) and hooks(family.network) == 0
    assert torch.equal(family.sample(sampler=sampler), off)


@real
@pytest.mark.parametrize("name, tokens", [("Flux", slice(5, 29)), ("QwenImage", slice(5, 29)),
                                          ("Z-Image", slice(40, 60))])
def test_reference_images_in_comfyui(comfy, name, tokens):
    """They follow the image in Flux and Qwen-Image. In Z-Image 8 tokens for their text and 24 of theirs precede it."""
    if name == "Z-Image" and comfy.version < (0, 4):
        pytest.skip("this ComfyUI has no Z-Image")
    family = Family(comfy, name)
    reference = seeded(*family.latent.shape, seed=5)
    prompts = [family.prompt(seed, reference_latents=[reference]) for seed in (1, 2)]
    on, off = (family.sample(patcher, prompts=prompts) for patcher in (family.guided(), family.patcher))
    close(on, family.by_hand(prompts=prompts, tokens=tokens), off)
    assert not torch.equal(off, family.sample())


@real
@pytest.mark.parametrize("how", ["batched", "separate", "in turns"])
def test_batches_of_comfyui(comfy, how):
    family, turn, sizes = Family(comfy, "SD3"), iter(range(10**6)), Counter()
    expected, off = family.by_hand(), family.sample()
    few = {"batched": lambda: False, "separate": lambda: True, "in turns": lambda: next(turn) % 3 == 0}[how]
    family.patcher.model.memory_required = lambda *args, **kwargs: math.inf if few() else 0
    family.network.register_forward_pre_hook(lambda module, args: sizes.update([len(args[0])]))
    close(family.sample(family.guided()), expected, off)
    assert {"batched": sizes[2] == 6, "separate": sizes[2] == 0, "in turns": 0 < sizes[2] < 6}[how]


@real
def test_prompts_of_unequal_length_and_areas_in_comfyui(comfy):
    family = Family(comfy, "SD3")
    negative, longer = family.prompt(2), family.prompt(1, length=7)
    area = [{**family.prompt(seed)[0][1], "area": (8, 6, 0, 6 * i), "strength": 1.0} for i, seed in enumerate((1, 3))]
    areas = [[family.prompt(seed)[0][0], more] for seed, more in zip((1, 3), area)]
    for positive, tokens in ((longer, slice(7, 31)), (areas, slice(5, 17))):
        prompts = positive, negative
        on, off = family.sample(family.guided(), prompts=prompts), family.sample(prompts=prompts)
        close(on, family.by_hand(prompts=prompts, tokens=tokens), off)


@real
def test_dual_cfg_in_comfyui(comfy):
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG
    family = Family(comfy, "SD3")

    def sample(patcher):
        guider = Guider_DualCFG(patcher)
        guider.set_conds(family.prompt(1), family.prompt(3), family.prompt(2))
        guider.set_cfg(3.0, 2.0)
        sigmas = comfy.samplers.KSampler(patcher, 6, torch.device("cpu"), "euler", "simple").sigmas
        with torch.inference_mode():
            return guider.sample(family.noise(), family.latent, comfy.samplers.sampler_object("euler"), sigmas,
                                 disable_pbar=True)

    middle = comfy.sampler_helpers.convert_cond(family.prompt(3))

    def combine(pred, null, x, sigma, options, guider):
        if not hasattr(guider, "middle"):
            processed = comfy.samplers.process_conds(guider.inner_model, x, {"middle": middle}, x.device, seed=0)
            guider.middle = processed["middle"]
        mid = guider.calc(guider.middle, x, sigma, options)
        return null + 2 * (mid - null) + 3 * (pred - mid)

    close(sample(family.guided()), family.by_hand(combine=combine), sample(family.patcher))


def outputs(result):
    """What a node of ComfyUI gave, of its older or newer kind."""
    return getattr(result, "result", result)


@real
def test_skip_layer_guidance_in_comfyui(comfy):
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
    family = Family(comfy, "SD3")

    def skip(patcher):
        return outputs(SkipLayerGuidanceDiT().skip_guidance(patcher, 1.5, 0.0, 1.0, double_layers="3"))[0]

    skipped_block = {"patches_replace": {"dit": {("double_block", 3): lambda args, more: args}}}

    def combine(pred, null, x, sigma, model_options, guider):
        skipped = guider.calc(guider.conds["positive"], x, sigma, model_options, **skipped_block)
        return null + CFG * (pred - null) + 1.5 * (pred - skipped)

    on, off = family.sample(skip(family.guided())), family.sample(skip(family.patcher))
    close(on, family.by_hand(combine=combine), off)
    assert torch.equal(family.sample(family.guided(skip(family.patcher))), on)


@real
def test_lora_casting_and_compiled_models_in_comfyui(comfy):
    from comfy_extras.nodes_torch_compile import set_torch_compile_wrapper
    family = Family(comfy, "SD3")
    off, on = family.sample(), family.sample(family.guided())

    lora = family.patcher.clone()
    key = "diffusion_model.joint_blocks.3.x_block.attn.qkv.weight"
    lora.add_patches({key: (seeded(384, 128, seed=3) * 0.05,)})
    after = family.sample(family.guided(lora))
    close(after, family.by_hand(patcher=lora), family.sample(lora))
    assert not torch.equal(after, on) and torch.equal(family.sample(family.guided()), on)

    for module in family.network.modules():                            # as where weights do not fit into a GPU
        if hasattr(module, "comfy_cast_weights"):
            module.comfy_cast_weights = True
    assert torch.equal(family.sample(family.guided()), on)

    def compiled(patcher):
        patcher = patcher.clone()
        set_torch_compile_wrapper(model=patcher, backend="eager")
        return patcher

    close(family.sample(family.guided(compiled(family.patcher))), on, off)
    close(family.sample(compiled(family.guided())), on, off)
    assert hooks(family.network) == 0


@real
def test_every_sampler_of_comfyui_advances_the_average_once_per_step(comfy):
    family, failed = Family(comfy, "SD3"), {}
    for sampler in comfy.samplers.SAMPLER_NAMES:
        made, original = [], comfy.node.Run.log
        comfy.node.Run.log = lambda run: made.append([len(emag.trace) for emag in run.emags.values()])  # noqa: B023
        try:
            family.sample(family.guided(start=1.0, apply=1.0, stop=0.0), sampler, steps=5)
        finally:
            comfy.node.Run.log = original
        if made != [[5]]:
            failed[sampler] = made
    assert set(failed) <= {"dpm_fast", "dpm_adaptive"}, failed         # which choose σ of their own
    assert all(0 < advanced <= 5 for made in failed.values() for (advanced,) in made)


@real
def test_an_interrupted_run_leaves_nothing_in_comfyui(comfy):
    family = Family(comfy, "Flux")

    def stop(step, *_):
        if step == 3:
            raise comfy.model_management.InterruptProcessingException()

    guided, off = family.guided(), family.sample()
    on = family.sample(guided)
    with averages(comfy.node) as made, pytest.raises(comfy.model_management.InterruptProcessingException):
        family.sample(guided, callback=stop)
    assert made and not any(emag() for emag in made if gc.collect() is not None) and hooks(family.network) == 0
    assert torch.equal(family.sample(), off) and torch.equal(family.sample(guided), on)


@real
def test_caches_and_context_windows_of_comfyui_are_refused(comfy):
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode
    from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
    family = Family(comfy, "WAN21_T2V")
    for cls in (ContextWindowsManualNode, EasyCacheNode, LazyCacheNode):
        inputs = {each.id: each.default for each in cls.define_schema().inputs if each.id != "model"}
        choices = {each.id: each.options[0] for each in cls.define_schema().inputs if getattr(each, "options", None)}
        patcher = outputs(cls.execute(family.guided(), **inputs | choices))[0]
        with pytest.raises(RuntimeError, match="bypass"):
            family.sample(patcher)


@real
def test_the_workflow_loads_in_comfyui(comfy):
    import nodes
    from comfy_extras import nodes_sd3
    classes = {**nodes.NODE_CLASS_MAPPINGS, **comfy.node.NODE_CLASS_MAPPINGS,
               "EmptySD3LatentImage": nodes_sd3.EmptySD3LatentImage}
    assert check_workflow(classes) <= set(classes)
