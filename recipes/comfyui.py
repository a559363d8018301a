"""EMAG as a ComfyUI node: MODEL → MODEL, before any sampler, guider or CFG node.

Put this file and emag.py into ComfyUI's custom_nodes/emag/, with an __init__.py of one line:
    from .comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
Models: transformers that keep their blocks in lists (`BLOCKS` below): SD3, Flux, Chroma, Qwen-Image, Wan, Lumina 2,
Z-Image, HunyuanVideo and others. Where the image lies among a block's tokens is found in the first observed call.
The node changes the model's prediction for the positive prompt, to ε̃' = ε' + w_e·(ε − ε'). What combines it with the
negative prompt (CFG, dual CFG, APG, CFG-Zero*) then completes the method. ComfyUI's predictions are denoised latents,
affine in ε for one x and σ, and the weights of the update sum to 1, so that it is the same update.
"""
import logging
import sys
from collections import Counter
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial

import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

try:
    from .emag import EMAG, Window, emag_update
except ImportError:                                                   # not in a package: emag.py is on the path
    from emag import EMAG, Window, emag_update

# The lists of blocks of a model, in the order they run.
BLOCKS = ("joint_blocks", "double_blocks", "double_stream_blocks", "double_layers", "transformer_blocks", "blocks",
          "layers", "single_blocks", "single_stream_blocks", "single_layers", "single_transformer_blocks")
# Samplers that evaluate at the σ of later steps too, and how many steps ahead.
AHEAD = {"sample_heun": 1, "sample_exp_heun_2_x0": 1, "sample_exp_heun_2_x0_sde": 1, "sample_heunpp2": 2}


def blocks_of(model: nn.Module) -> list[nn.Module]:
    lists = [getattr(model, name) for name in BLOCKS if isinstance(getattr(model, name, None), nn.ModuleList)]
    if not lists:
        raise ValueError(f"EMAG: this model, a {type(model).__name__}, has no list of transformer blocks by any of the "
                         f"names {', '.join(BLOCKS)}: bypass the EMAG node, or add the list's name in comfyui.py")
    return [block for blocks in lists for block in blocks]


def numbers(text: str, count: int) -> list[int]:
    """The candidates: "6-8" or "6,7,8"; of an empty text a quarter to three eighths of `count` blocks, as in SD3."""
    if not text.strip():
        return list(range(count // 4, max(count * 3 // 8, count // 4 + 1)))
    try:
        parts = [[int(number) for number in part.split("-")] for part in text.split(",")]
        return [n for first, last in ((part[0], part[-1]) for part in parts) for n in range(first, last + 1)]
    except ValueError:
        raise ValueError(f"EMAG: layers is {text!r}: need numbers of blocks, such as 6-8 or 6,7,8") from None


def cut(tree, rows: slice, batch: int):
    """A call's inputs, of which every tensor as long as the batch is cut to `rows`."""
    return tree_map_only(Tensor, lambda x: x[rows] if x.ndim and len(x) == batch else x, tree)


# -------------------------------------------------------------------------------------- attention and its tokens


@contextmanager
def attending(blocks, layers, options, attend):
    """The transformer_options of a call in which attend(n, func, q, k, v, …) computes ComfyUI's attention. func is what
    would; n is the candidate whose self-attention it is, or None."""
    running, before = [None], options.get("optimized_attention_override")

    def override(func, q, k, *args, **kwargs):
        tokens = 2 if kwargs.get("skip_reshape") else 1               # of (B, heads, N, d) or (B, N, channels)
        n = running[0] if q.shape[tokens] == k.shape[tokens] else None
        return attend(n, partial(before, func) if before else func, q, k, *args, **kwargs)

    with ExitStack() as stack:
        for n in layers:
            for hook, value in ((blocks[n].register_forward_pre_hook, n), (blocks[n].register_forward_hook, None)):
                stack.enter_context(hook(lambda *_, value=value: running.__setitem__(0, value)))
        yield {**options, "optimized_attention_override": override}


def visible(n, func, *args, **kwargs):
    """In a candidate torch's kernel, which EMAG sees; elsewhere the attention that the user chose."""
    return (func if n is None else attention_pytorch)(*args, **kwargs)


class Enough(Exception):
    """Ends a call that has shown what it was made for."""


def image_tokens(call, x: Tensor, blocks, layers, options) -> slice:
    """Where the tokens of the latent lie among those of the candidates' attention.

    They are those whose queries differ between two latents, call(latent, options), while attention gives 0, so that no
    token sees another. Tokens of text, of reference images and of padding stay the same, within what quantised weights
    add. Both calls end in the last candidate.
    """
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x) * (1 + x.std())
    queries = []
    for latent in (noise, -noise):
        found = {}                                                    # candidate → its queries, (N, channels)

        def attend(n, func, q, k, v, *args, found=found, **kwargs):
            if n is not None and n not in found:
                found[n] = (q.transpose(1, 2).flatten(2) if kwargs.get("skip_reshape") else q)[0].float()
                if len(found) == len(layers):
                    raise Enough
            return attention_pytorch(q, k, torch.zeros_like(v), *args, **kwargs)

        # Compiled code would not see the hooks. Where nothing was compiled, torch._dynamo takes seconds to import.
        eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
        with eager, attending(blocks, layers, options, attend) as changed, suppress(Enough):
            call(latent, changed)
        queries.append(found)
    places = set()
    for n in layers:
        if n not in queries[1]:
            raise RuntimeError(f"EMAG: block {n} has no self-attention by ComfyUI's optimized_attention: choose other "
                               "layers, or bypass the EMAG node")
        a, b = (found[n] for found in queries)
        change = (a - b).norm(dim=1) / (a.norm(dim=1) + b.norm(dim=1)).clamp(min=1e-30)
        rows = (change > change.max() / 8).nonzero()[:, 0].tolist() or [0]
        whole = change.max() > 0 and rows == list(range(rows[0], rows[-1] + 1))
        places.add((rows[0], rows[-1] + 1) if whole else None)
    if len(places) > 1 or None in places:
        raise RuntimeError(f"EMAG: the image is no single piece of the tokens of blocks {layers}, or not the same in "
                           "all of them: choose layers of one kind, or bypass the EMAG node")
    return slice(*places.pop())


# ------------------------------------------------------------------------------------------------- one sampling run


class Run:
    """One sampling run: an EMAG object for each positive conditioning (several where a prompt has areas)."""

    def __init__(self, scale: float, window: Window, layers: str, options: dict, sampler, sigmas: Tensor):
        self.scale, self.window, self.layers, self.options = scale, window, layers, options
        self.sigmas, self.steps = sigmas.tolist(), len(sigmas) - 1
        self.ahead = AHEAD.get(getattr(getattr(sampler, "sampler_function", None), "__name__", None), 0)
        self.emags: dict[object, EMAG] = {}                           # a conditioning's uuid → its EMAG
        self.visits, self.advanced = Counter(), -1                    # evaluations per σ; the step that E is at
        self.observed, self.negatives, self.chosen = set(), 0, Counter()

    def evaluation(self, guider, sigma: float, model_options: dict):
        """A new evaluation of the guided model: which step it belongs to, and whether E advances in it.

        The step is the last one whose σ is not below this one. Heun's corrector belongs to the step before: it is the
        first visit of its σ, and the predictor the second. E advances in the first evaluation of a step.
        """
        for name, options in (("Context Windows", model_options.get("context_handler")),
                              ("EasyCache or LazyCache", model_options.get("transformer_options", {}).get("easycache")),
                              ("MultiGPU", model_options.get("multigpu_clones"))):
            if options:
                raise RuntimeError("EMAG needs every block to run on the whole latent, in every step, on one device, "
                                   f"and the node {name} changes that: bypass it, or the EMAG node")
        at = max(0, sum(s >= sigma * (1 - 1e-5) for s in self.sigmas[:-1]) - 1)
        self.visits[at] += 1
        self.step = at - max(0, min(at, self.ahead) + 1 - self.visits[at])
        self.advances, self.advanced = self.step > self.advanced, max(self.step, self.advanced)
        self.conds, self.positive, self.seen = guider.conds.get("positive"), None, set()

    def batch(self, conds: list):
        """Which of the lists of conditionings is the positive one: 0 for CFG, 2 for dual CFG, None in others' calls."""
        self.positive = next((i for i, cond in enumerate(conds) if cond is not None and cond is self.conds), None)

    def apply_model(self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={},
                    **more):
        """The model's call, for one conditioning or a batch of some, with ε̃' as the prediction of the positive ones.

        One that comes a second time in an evaluation makes someone else's negative, as of skip-layer guidance.
        """
        inputs = t, c_concat, c_crossattn, control
        uuids, which = (transformer_options.get(name, []) for name in ("uuids", "cond_or_uncond"))
        mine = [i for i, uuid in enumerate(uuids) if which[i] == self.positive and uuid not in self.seen]
        self.seen.update(uuids[i] for i in mine)
        if not mine or not self.window.observes(self.step, self.steps):
            return executor(x, *inputs, transformer_options, **more)
        model = executor.class_obj.diffusion_model
        blocks = blocks_of(getattr(model, "_orig_mod", model))        # of a compiled model too
        layers, size = numbers(self.layers, len(blocks)), len(x) // len(uuids)
        rows = {i: slice(i * size, (i + 1) * size) for i in mine}

        def alone(i: int, rows: slice, x_: Tensor, options: dict) -> Tensor:
            """The call for conditioning i alone, on the latents x_."""
            options = {**options, "uuids": [uuids[i]], "cond_or_uncond": [which[i]]}
            return executor(x_, *cut(inputs, rows, len(x)), options, **cut(more, rows, len(x)))

        for i in mine:
            if uuids[i] not in self.emags:
                one = slice(i * size, i * size + 1)
                tokens = image_tokens(partial(alone, i, one), x[one], blocks, layers, transformer_options)
                self.emags[uuids[i]] = EMAG(blocks, layers, image_tokens=tokens, **self.options)
        emags = {i: self.emags[uuids[i]] for i in mine}
        with attending(blocks, layers, transformer_options, visible) as options, ExitStack() as stack:
            for i, emag in emags.items():
                stack.enter_context(emag.observe(rows[i], update=self.advances or not emag.trace))
            out = executor(x, *inputs, options, **more)
        self.observed.add(self.step)
        if self.window.perturbs(self.step, self.steps):
            out = out.clone()
            for i, emag in emags.items():
                with attending(blocks, layers, transformer_options, visible) as options, emag.perturb():
                    negative = alone(i, rows[i], x[rows[i]], options)
                out[rows[i]] = emag_update(out[rows[i]], negative, self.scale)
                self.negatives += 1
                self.chosen.update(emag.layers[n] for n in emag.selected.nonzero()[:, 1].tolist())
        for emag in emags.values():
            emag.forget()                                             # what was kept of the clean pass
        return out

    def log(self):
        if not self.observed:
            logging.warning("EMAG did nothing: no step in its window had a positive conditioning")
        else:
            chosen = ", ".join(f"{n} ({count}×)" for n, count in sorted(self.chosen.items()))
            logging.info(f"EMAG: {len(self.observed)} of {self.steps} steps observed, {self.negatives} negatives made, "
                         f"from blocks {chosen or '–'}")


# --------------------------------------------------------------------------------------------------------- the node


def patched(model, scale: float, window: Window, layers: str, **options):
    """A clone of a ModelPatcher that is guided by EMAG."""
    blocks, runs = blocks_of(model.model.diffusion_model), []
    EMAG(blocks, numbers(layers, len(blocks)), **options)             # says before a run what is out of range

    def outer_sample(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        runs.append(Run(scale, window, layers, options, sampler, sigmas))
        try:
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            runs.pop().log()                                          # E is freed, also where the user interrupts

    def predict_noise(executor, x, timestep, model_options={}, *args, **kwargs):
        runs[-1].evaluation(executor.class_obj, timestep.max().item(), model_options)
        return executor(x, timestep, model_options, *args, **kwargs)

    def calc_cond_batch(executor, model, conds, *args, **kwargs):
        runs[-1].batch(conds)
        return executor(model, conds, *args, **kwargs)

    def apply_model(executor, *args, **kwargs):
        return runs[-1].apply_model(executor, *args, **kwargs)

    model = model.clone()
    for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, outer_sample), (WrappersMP.PREDICT_NOISE, predict_noise),
                          (WrappersMP.CALC_COND_BATCH, calc_cond_batch), (WrappersMP.APPLY_MODEL, apply_model)):
        model.remove_wrappers_with_key(kind, "emag")                  # the last EMAG node of a chain counts
        if scale != 1:
            model.add_wrapper_with_key(kind, "emag", wrapper)
    return model


class EMAGNode:
    @classmethod
    def INPUT_TYPES(cls):
        def number(default, most, step, tooltip):
            return "FLOAT", dict(default=default, min=0.0, max=most, step=step, tooltip=tooltip)

        return {"required": {
            "model": ("MODEL",),
            "scale": number(1.5, 20.0, 0.05, "w_e: 1 is off, 0 shows the negative"),
            "start": number(1.0, 1.0, 0.01, "share of the steps that is left where it starts to observe; 1: all"),
            "apply": number(0.8, 1.0, 0.01, "share of the steps that is left where it starts to guide"),
            "stop": number(0.2, 1.0, 0.01, "share of the steps that is left where it ends"),
            "layers": ("STRING", dict(default="", tooltip="candidate blocks, as in 6-8 or 6,7,8; empty: a quarter to "
                                                          "three eighths of the depth")),
            "variant": (["query", "map", "image"], dict(default="query", tooltip=(
                "query (EMAG-Q) needs little memory; map (EMAG) and image (EMAG-I) keep whole attention maps"))),
            "beta": number(0.988, 1.0, 0.001, "the decay of the average"),
        }}

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "patch", "advanced/guidance"
    DESCRIPTION = "Guides away from a prediction in which one block attends by its average so far (arXiv 2512.17303)."

    def patch(self, model, scale, start, apply, stop, layers, variant, beta):
        return (patched(model, scale, Window(start, apply, stop), layers, variant=variant, beta=beta),)


NODE_CLASS_MAPPINGS = {"EMAG": EMAGNode}
NODE_DISPLAY_NAME_MAPPINGS = {"EMAG": "EMAG (guidance by averaged attention)"}
