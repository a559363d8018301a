"""EMAG for pipelines that do classifier-free guidance (CFG) already: one `with` block around the pipeline's call.

Needs emag.py, and torch. The recipes beside this file show it with ten model families.
"""
import dataclasses
import importlib.util
import itertools
import math
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

if importlib.util.find_spec("emag") is None:             # a copy has it beside this file, this project one folder up
    sys.path.append(str(Path(__file__).resolve().parent.parent))
from emag import EMAG, Window, emag_update, is_close, need, precision


@contextmanager
def guide(model: nn.Module, blocks: Sequence[nn.Module], layers: Iterable[int], *, cond: str, scale: float = 1.5,
          steps: int | Callable[[], int] = 28, calls: int = 1, channels: slice | None = None, window: Window = Window(),
          take: Callable | None = None, image_tokens: slice | Callable | None = None, reuse: bool = True,
          **emag_options) -> Iterator[EMAG]:
    """EMAG inside a pipeline that does CFG; the pipeline and the model stay as they are. scale, steps and window have
    SD3's defaults; image_tokens has none, and must be given wherever text is among the tokens.

        with guide(pipe.transformer, pipe.transformer.transformer_blocks, range(6, 9), cond="last", scale=1.5,
                   steps=28, image_tokens=slice(0, 4096)) as emag:
            image = pipe(prompt, num_inference_steps=28, guidance_scale=7.0).images[0]

    The model's prediction for the conditional samples comes back as ε̃', so that the pipeline's own CFG formula
    completes the method.

    cond, calls: how the pipeline does CFG.
        calls=1, cond="first" or "last": one call of the model per step, with a doubled batch; that half is conditional.
            A batch that is not doubled, since CFG is off in this step, is conditional as a whole.
        calls=1, cond="all": one call per step, and never CFG.
        calls=2, cond="first" or "last": two calls per step; that call is the conditional one. After "first" the other
            one may be missing, since CFG is off in this step.
        Further calls of a step, with the same latents, do not count. One with all inputs of the conditional call comes
        back guided like it, any other (skip-layer guidance) as it is. One that differs by hooks or attention
        processors alone has all these inputs too: do not combine.
    scale: w_e; 1 is off.
    steps: steps per trajectory, after which a new one starts; or a function that says so when one starts, such as
        `lambda: pipe.num_timesteps`. After a trajectory that was interrupted, emag.reset() lets the next one start.
    channels: the slice of the output's dimension 1 that is the prediction, where others are a variance.
    image_tokens: as for EMAG; or a function of the model's inputs, (args, kwargs) → slice, called once per trajectory.
    take: take(args, kwargs, rows) → (args, kwargs) cuts the model's inputs to the samples `rows`, a slice. The default
        cuts every tensor as long as the batch, in lists too; and where x_t is a list, every list as long as the batch.
    reuse, emag_options: as for EMAG. diffusers' group offloading turns reuse off: a skipped block would load nothing.

    x_t is the first tensor, or list of tensors, among the model's inputs; its length is the batch size. In a list of
    lists each holds the images of a sample, x_t last.
    """
    order = {1: ("first", "last", "all"), 2: ("first", "last")}
    need(calls in order, f"calls is {calls}: need 1 or 2", ValueError)
    need(cond in order[calls], f"cond is {cond!r}: need one of {order[calls]}", ValueError)
    need(callable(steps) or steps >= 1, f"steps is {steps}: need at least 1", ValueError)
    need(math.isfinite(scale), f"scale is {scale}: need a finite number", ValueError)
    for name, part in dict(channels=channels, image_tokens=image_tokens).items():
        need(part is None or isinstance(part, slice) or callable(part) and name == "image_tokens",
             f"{name} is {part!r}: need a slice, such as slice(0, 3), or None", ValueError)
    emag = EMAG(blocks, layers, image_tokens=None if callable(image_tokens) else image_tokens, **emag_options)
    at: _Place | None = None

    def forward(original: Callable, args: tuple, kwargs: dict):
        nonlocal at
        latents, rows = _conditional(_x_t(args, kwargs), cond, calls)
        doubled, anew = rows != slice(None), at is None or at.trace is not emag.trace
        need(anew or at.thread == threading.get_ident() or at.is_through(),
             "another thread draws inside this guide(): one after the other, or a model and a guide() for each")
        need(anew or not at.busy, "a call of the model failed, or two pipelines draw at once inside this guide(): "
             "leave it, or call emag.reset() and start again")
        if anew or at.is_through() and not _equal(latents, at.latents):
            emag.reset()                                              # a new trajectory starts
            emag.reuse = reuse and not any(map(_loads_in_groups, blocks))
            at = _Place(calls, int((calls, cond) == (2, "last")), steps() if callable(steps) else steps, emag.trace)
        at.busy = True                                                # until this call is through
        inputs = tree_map(lambda x: x, (args, kwargs))                # before the model takes things out of its lists
        observed = at.count(latents, doubled, inputs) and window.observes(at.step, at.steps)
        if observed and callable(image_tokens) and not emag.trace:
            emag.image_tokens = image_tokens(args, kwargs)
        # Further calls of the step do not advance E.
        with emag.observe(rows, update=at.call < calls) if observed else nullcontext():
            out = original(*args, **kwargs)
        at_first = observed and len(emag.trace) == 1
        need(not at_first or image_tokens is None or not _hides_image(emag),
             "image_tokens holds tokens that a mask hides in a sample: the image must be at one place in all samples, "
             "so draw prompts of one length, or one after the other")
        if observed and window.perturbs(at.step, at.steps):
            pred, rewrap = _prediction(out)
            need(doubled or len(pred) == len(latents), f"{len(latents)} samples went in and {len(pred)} came out: "
                 "guide() takes the first tensor among the model's inputs for x_t")
            pred = tree_map(torch.clone, pred)                        # a model may write all its outputs to one place
            if doubled:
                inputs = (take or _take)(*inputs, rows)
            if doubled and not at.cut_checked:                        # once per trajectory, since it takes a pass
                _check_cut(model, emag, lambda: _predict(original, inputs), pred, rows)
                at.cut_checked = True
            with emag.perturb():
                negative = _predict(original, inputs)
            # At λ = 0 and where A is E (Δ = 0) it must be.
            need(emag.strength == 0 or not emag.deviation.any() or not _equal(negative, pred[rows]),
                 "the negative is the prediction itself, though the attention is not its average: what EMAG caught is "
                 "not the image's attention, or its result is not used. Give other layers, or attention=")
            _guide_rows(pred, negative, rows, channels, scale)
            out = rewrap(pred)
        emag.forget()                                                 # frees what was kept of the clean pass
        at.busy = False
        return out

    with replaced_forward(model, forward) if scale != 1 else nullcontext():
        yield emag
    if at is None:
        need(scale == 1 or callable(steps) and steps() == 0, "the model's forward was never called inside guide(): "
             "give the model that the pipeline calls; where a sampler calls another method, such as inference, first "
             "make that the forward: model.forward, model.inference = model.inference, model.__call__")
    elif at.trace is emag.trace:                                      # no reset() since
        need(at.is_through(), f"the last trajectory ended in step {at.step + 1} of {at.steps}: give the steps and "
             "calls that the pipeline makes, such as steps=lambda: pipe.num_timesteps; after one that was interrupted "
             "call emag.reset()")


@dataclasses.dataclass
class _Place:
    """Where in its trajectory a pipeline is. Steps, and the calls of one step, are counted from 0."""
    calls: int
    conditional: int                                                  # which call of a step is
    steps: int
    trace: list                                                       # emag.trace: after reset() it is another one
    step: int = -1
    call: int = 1
    latents: Tensor | Sequence[Tensor] = ()                           # of this step, without the doubling
    doubled: bool = False                                             # whether this step's first call was
    inputs: tuple | None = None                                       # of the conditional call
    cut_checked: bool = False
    busy: bool = False                                                # during a call, and for good where that failed
    thread: int = dataclasses.field(default_factory=threading.get_ident)

    def __post_init__(self):
        need(self.steps >= 1, f"steps() gave {self.steps} when a trajectory started: need at least 1")

    def is_through(self) -> bool:
        return self.step == self.steps - 1 and self.call >= self.conditional

    def count(self, latents: Tensor | list[Tensor], doubled: bool, inputs: tuple) -> bool:
        """One more call of the model: of this step if its latents are the same, else of the next one. True: it is
        conditional."""
        if _equal(latents, self.latents):
            need(self.calls == 2 or self.doubled, "the model was called twice in a row with the same latents: if one "
                 "of the two is without the condition, give calls=2, and cond='first' or 'last' for the conditional "
                 "one; if both have it, use the class EMAG in a loop of your own")
            self.call += 1
        else:
            need(self.call >= self.conditional, "with calls=2 and cond='last' the two calls of a step need the same "
                 "latents, and they differ: where there is one call per step, give calls=1; where the conditional "
                 "call comes first, cond='first'")
            self.step, self.call, self.doubled = self.step + 1, 0, doubled
            self.latents = tree_map(torch.clone, latents)             # copied: a pipeline may change them in place
        if self.call == self.conditional:
            self.inputs = inputs
        return self.call == self.conditional or self.call >= self.calls and _equal(inputs, self.inputs)


def _equal(a, b) -> bool:
    """Tensors, lists and dicts of them, and plain numbers by value; other things by identity."""
    (a, one), (b, other) = tree_flatten(a), tree_flatten(b)
    return one == other and all(torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else
                                x is y or isinstance(x, (int, float, str)) and x == y for x, y in zip(a, b))


def _is_list(x) -> bool:
    return isinstance(x, list) and len(x) > 0 and isinstance(x[0], Tensor)


def _x_t(args: tuple, kwargs: dict) -> Tensor | list:
    """The first tensor, list of tensors, or list of such lists among the model's inputs."""
    leaves = tree_leaves((args, kwargs), is_leaf=lambda x: _is_list(x) or isinstance(x, list) and any(map(_is_list, x)))
    found = [x for x in leaves if isinstance(x, list) or isinstance(x, Tensor) and x.ndim > 0]
    need(found, "the model was called without a tensor")
    return found[0]


def _conditional(x: Tensor | list, cond: str, calls: int) -> tuple[Tensor | list[Tensor], slice]:
    """The latents without CFG's doubling, and the conditional rows of the batch x: a half, if it is two equal halves,
    else all."""
    x = [images[-1] for images in x] if isinstance(x[0], list) else x
    half = len(x) // 2
    doubled = half > 0 and _equal(x[:half], x[half:])
    latents = x[:half] if doubled else x
    need(not any(torch.equal(*pair) for pair in itertools.combinations(latents, 2)),
         f"the batch of {len(x)} samples holds some latents more than once, and not as two equal halves: draw images "
         "from different noise; where the pipeline makes more parts than the two of CFG (PAG's), draw without that")
    need(not doubled or calls == 1 and cond != "all", "both halves of the batch hold the same latents, as CFG doubles "
         "them: give calls=1, and cond='first' or 'last', the conditional half; without CFG draw from different noise")
    partly = (a.shape == b.shape and (a == b).float().mean() > 0.1 for a, b in zip(x[:half], x[half:]))
    need(doubled or calls == 2 or cond == "all" or not any(partly), "samples of the batch agree in a part of their "
         "latents: where CFG joins other inputs to each half, use the class EMAG in a loop of your own; where there is "
         "no CFG, give cond='all'")
    return latents, slice(None) if not doubled else slice(half) if cond == "first" else slice(half, None)


def _take(args: tuple, kwargs: dict, rows: slice) -> tuple[tuple, dict]:
    """The inputs with every tensor as long as the batch cut to `rows`; and every such list, if x_t is one."""
    x = _x_t(args, kwargs)
    cut = lambda y: isinstance(y, (Tensor, type(x))) and getattr(y, "ndim", 1) and len(y) == len(x)         # noqa: E731
    return tree_map(lambda leaf: leaf[rows] if cut(leaf) else leaf, (args, kwargs), is_leaf=cut)


def _hides_image(emag: EMAG) -> bool:
    """Whether the mask of the attention hides one of the image tokens from every query of a sample."""
    mask = emag._calls[emag.layers[0]].attn_mask                                                   # (B, heads, N, N)
    if mask is None:
        return False
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return not seen[..., emag.image_tokens].flatten(1, 2).any(dim=1).all()


def _loads_in_groups(block: nn.Module) -> bool:
    """Whether diffusers' group offloading loads the block, or parts of it, when they run."""
    hooks = (getattr(module, "_diffusers_hook", None) for module in block.modules())
    return any(hook is not None and hook.get_hook("group_offloading") is not None for hook in hooks)


def _check_cut(model: nn.Module, emag: EMAG, run: Callable, pred, rows: slice):
    """run() is the model on inputs cut to the conditional samples, for which this must change nothing."""
    observed = len(emag.selected)
    hint = "an input is not batch-first, or is only by chance as long as the batch: give take="
    need(len(pred) == 2 * observed, f"{observed} samples were observed, and the prediction holds {len(pred)}, not "
         f"{2 * observed}: the model folds frames or other dimensions into its batch, and guide() cannot halve it")
    again = None
    try:
        with emag.observe(update=False):                              # which compares the number of tokens
            again = run()
    except Exception as error:
        raise RuntimeError(
            f"the model fails on inputs cut to the conditional samples ({error}): {hint}" if again is None else
            "inputs cut to the conditional samples make fewer tokens: a batch is padded to its longest prompt, so give "
            f"no negative prompt that is longer than the prompts; or {hint}") from error
    clean, null = pred[rows], pred[rows.stop:rows.start]              # the conditional half, and the other half
    # Equal up to rounding; where the halves are near each other, much nearer to its own half than to the other.
    eps, away = precision([model]), lambda x, y: (x - y).float().norm()                                     # noqa: E731
    same = all(is_close(new[None], old[None], eps) and (4 * away(new, old) <= away(other, old) or
               is_close(new[None], old[None], eps, times=2)) for new, old, other in zip(again, clean, null))
    need(same and len(again) == len(clean), "the model predicts something else on inputs cut to conditional samples"
         f": {hint}; or dropout is on, or the prediction is not finite")


def _predict(forward: Callable, inputs: tuple[tuple, dict]) -> Tensor | list[Tensor]:
    """The model's prediction; it gets lists and dicts of its own, since it may take things out of them."""
    args, kwargs = tree_map(lambda x: x, inputs)
    return _prediction(forward(*args, **kwargs))[0]


def _prediction(out) -> tuple[Tensor | list[Tensor], Callable]:
    """The prediction in a model's output, the first tensor or list of tensors in it; and a function that puts another
    one in its place."""
    if dataclasses.is_dataclass(out):
        name = dataclasses.fields(out)[0].name
        pred, rewrap = _prediction(getattr(out, name))
        return pred, lambda pred: dataclasses.replace(out, **{name: rewrap(pred)})
    leaves, spec = tree_flatten(out, is_leaf=_is_list)
    need(leaves and (isinstance(leaves[0], Tensor) or _is_list(leaves[0])),
         f"the model returns a {type(out).__name__}: guide() needs a tensor or a list of tensors first in it")
    return leaves[0], lambda pred: tree_unflatten([pred, *leaves[1:]], spec)


def _guide_rows(pred, negative, rows: slice, channels: slice | None, scale: float):
    """Writes ε̃' in the place of ε into `pred`: for the samples `rows`, in their prediction channels."""
    channels = slice(None) if channels is None else channels
    for i, old in zip(range(len(pred))[rows], negative):
        pred[i][channels] = emag_update(pred[i][channels], old[channels], scale)


@contextmanager
def replaced_forward(model: nn.Module, run: Callable) -> Iterator[None]:
    """Inside, model.forward is run(its own forward, args, kwargs); afterwards it is as before.

    Not its call: the official DiT and SiT call `self.forward` inside `forward_with_cfg`.
    """
    # Offloading by accelerate keeps a module's own forward as `_old_forward`, and puts it back after a pipeline's run.
    place = "_old_forward" if "_old_forward" in vars(model) else "forward"
    original, inherited = getattr(model, place), place not in vars(model)
    need(not hasattr(original, "is_guided"), "the model is inside another guide() already: leave that one first")
    compiled = vars(model).get("_compiled_call_impl")                 # module.compile() lets it run instead of forward

    @wraps(original, updated=())                                      # pipelines read its signature
    @torch.compiler.disable
    def replacement(*args, **kwargs):
        return run(original, args, kwargs)

    replacement.is_guided = True
    try:
        vars(model).pop("_compiled_call_impl", None)
        setattr(model, place, replacement)
        yield
    finally:
        if compiled is not None:
            model._compiled_call_impl = compiled
        for place in ("forward", "_old_forward"):
            if vars(model).get(place) is replacement:
                setattr(model, place, original)
        if inherited and vars(model).get("forward") is original:
            del model.forward
