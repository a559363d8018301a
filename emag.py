"""EMAG, Exponential Moving Average Guidance (Yadav, Huy, Liu; arXiv 2512.17303, ECCV 2026), in one file.

Beside the conditional and the null prediction the network makes a third one, the negative ε'. In that pass one
transformer block uses the moving average of its own attention maps over the trajectory. The negative has the same
content and the same layout, and its fine detail is slightly wrong; the guided prediction moves away from it.

In this order: the equations; the class that hooks them into an unmodified model; `guide`, for pipelines that have
classifier-free guidance (CFG) already; and, under a line that says so, the machinery. This file needs torch alone.

Symbols: A attention map, E its moving average, Δ deviation, ε prediction (noise or velocity), ε' negative prediction,
β decay, λ blend strength, w_e EMAG scale, w CFG scale. B samples, L candidate blocks, N tokens, d channels per head.
"""
import dataclasses
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial, wraps

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

# --------------------------------------------------------------------------------------------------- the equations


def ema_update(ema: Tensor | None, attn: Tensor, beta: float) -> Tensor:
    """Attention EMA (ECCV §3.4), in place on `ema`; None starts it with a copy of `attn`.

    E_t = β·E_{t−1} + (1−β)·A_t
    """
    return attn.clone() if ema is None else ema.lerp_(attn, 1 - beta)


def deviation(ema: Tensor, attn: Tensor) -> Tensor:
    """Attention gradient (ECCV eq. 11–13), per sample: (B, …) → (B,).

    Δ_t = mean over heads, queries, keys of |E_t − A_t|
    """
    dtype = torch.promote_types(ema.dtype, torch.float32)             # float16 cannot hold the sum
    return torch.linalg.vector_norm((ema - attn).flatten(1), ord=1, dim=1, dtype=dtype) / ema[0].numel()


def zscore(dev: Tensor) -> Tensor:
    """Each sample's deviations, standardised over the candidate blocks: (B, L) → (B, L).

    z⁽ⁿ⁾ = (Δ⁽ⁿ⁾ − mean Δ) / (std Δ + δ), population std, δ > 0 tiny
    """
    dev = dev - dev[:, :1]                                            # z stays the same; equal Δ give exactly z = 0
    std, mean = torch.std_mean(dev, dim=1, correction=0, keepdim=True)
    return (dev - mean) / (std + torch.finfo(dev.dtype).tiny)


def select_layers(dev: Tensor, threshold: float | None = None) -> Tensor:
    """Layer selection (ECCV eq. 11–13), per sample: deviations (B, L) → bool (B, L), at least one True per sample.

    ℓ* = argmax Δ⁽ⁿ⁾ = argmax z⁽ⁿ⁾, the first if several are equal; with a threshold τ also every block with z⁽ⁿ⁾ ≥ τ
    """
    largest = torch.zeros_like(dev, dtype=torch.bool).scatter_(1, dev.argmax(dim=1, keepdim=True), True)
    return largest if threshold is None else largest | (zscore(dev) >= threshold)


def blend(attn: Tensor, ema: Tensor, strength: float) -> Tensor:
    """Blend (v1 eq. 12, ECCV eq. 11–13): Ã_t = (1−λ)·A_t + λ·E_t"""
    return (1 - strength) * attn + strength * ema


def emag_update(pred: Tensor, negative: Tensor, scale: float) -> Tensor:
    """EMAG update (v1 eq. 15, ECCV eq. 14): ε̃' = ε' + w_e·(ε − ε')"""
    return negative + scale * (pred - negative)


def cfg_update(pred: Tensor, pred_null: Tensor, scale: float) -> Tensor:
    """With CFG (v1 eq. 16, ECCV eq. 15), where pred is ε̃': ε̃ = ε_∅ + w·(ε̃' − ε_∅)"""
    return pred_null + scale * (pred - pred_null)


@dataclasses.dataclass(frozen=True)
class Window:
    """Which steps observe the attention (from `start` to `stop`) and which perturb it (from `apply` to `stop`).

    A bound f is the fraction of the trajectory that is left: 1 at the start (noise), 0 at the end (data). Step i of n,
    counted from 0, has r = n−1−i steps left; the bound f is the step with r = round(f·(n−1)), inclusive.
    """
    start: float = 1.0
    apply: float = 0.8
    stop: float = 0.2

    def __post_init__(self):
        if not 0 <= self.stop <= self.apply <= self.start <= 1:
            raise ValueError(f"window start {self.start}, apply {self.apply}, stop {self.stop}: "
                             "need 1 ≥ start ≥ apply ≥ stop ≥ 0")

    def observes(self, step: int, steps: int) -> bool:
        return round(self.stop * (steps - 1)) <= steps - 1 - step <= round(self.start * (steps - 1))

    def perturbs(self, step: int, steps: int) -> bool:
        return round(self.stop * (steps - 1)) <= steps - 1 - step <= round(self.apply * (steps - 1))


# ------------------------------------------------------------------------------------------------------- the method


@dataclasses.dataclass(frozen=True)
class Observation:
    """What one observed step found, on the CPU: each (B, L), one column per candidate block, in the order they run."""
    deviation: Tensor
    zscore: Tensor
    selected: Tensor


class EMAG:
    """Watches the self-attention of candidate blocks along a trajectory, and makes the negative from it.

        emag = EMAG(model.blocks, layers=range(12, 16))
        emag.reset()                                                # before every trajectory
        with emag.observe(rows):  pred = model(x, t, y)             # rows: the conditional samples of the batch
        with emag.perturb():      negative = model(x[rows], t[rows], y[rows])
        pred = emag_update(pred[rows], negative, scale)

    blocks: the model's transformer blocks in the order they run.  layers: the candidates, as indices into `blocks`.
    beta, strength: β and λ, in [0, 1].  threshold: None selects the argmax, τ also every block with z ≥ τ.
    variant: what the EMA averages and the negative replaces. "map" (EMAG): whole rows of A. "image" (EMAG-I): only
        their image columns. "query" (EMAG-Q): the queries themselves; no map is made. Only image queries are changed:
        text queries attend as the model has them.
    image_tokens: the slice of the token sequence that holds image tokens; None where all do.
    reuse: the negative pass does not run the blocks before the first selected one (see `perturb`). Give False where
        blocks do more than return their output: where they write to their inputs, or talk to other processes.
    ema_dtype: dtype of the maps and of their average. float16 halves the memory; in it E stays as it is where A differs
        by less than about 3% (at β = 0.988), or by more in entries below 6·10⁻⁵. bfloat16 is refused: its 8 bits mostly
        round (1−β)·(A−E) away.

    Raises ValueError for an argument out of range, RuntimeError where the model or the order of calls cannot work.
    """

    def __init__(self, blocks: Sequence[nn.Module], layers: Iterable[int], *, beta: float = 0.988,
                 strength: float = 1.0, variant: str = "map", threshold: float | None = None,
                 image_tokens: slice | None = None, reuse: bool = True, ema_dtype: torch.dtype = torch.float32):
        self.blocks, self.layers = list(blocks), sorted(set(layers))
        self.beta, self.strength, self.variant, self.threshold = beta, strength, variant, threshold
        self.image_tokens = slice(None) if image_tokens is None else image_tokens
        self.reuse, self.ema_dtype = reuse, ema_dtype
        _check_options(self)
        self.reset()

    def reset(self):
        """Forgets everything: a new trajectory starts."""
        self.trace: list[Observation] = []                # one entry per observed step
        self._ema: dict[int, list[Tensor]] = {}           # candidate block → E, in chunks of heads
        self._shape: dict[int, tuple] = {}                # candidate block → shapes of its queries and keys
        self._forget_pass()

    def _forget_pass(self):
        self._calls: dict[int, _AttentionCall] = {}       # candidate block → its attention call in the clean pass
        self._outputs: dict[int, object] = {}             # block → its output in the clean pass

    @property
    def last(self) -> Observation:
        if not self.trace:
            raise RuntimeError("nothing was observed yet: first run the model inside `with emag.observe():`")
        return self.trace[-1]

    deviation = property(lambda self: self.last.deviation)
    zscore = property(lambda self: self.last.zscore)
    selected = property(lambda self: self.last.selected)

    def average(self, block: int) -> Tensor:
        """E of one candidate block, to be looked at: (B, heads, image queries, keys); of EMAG-I the image
        keys alone; of EMAG-Q the queries, (B, heads, image queries, d)."""
        if block not in self._ema:
            raise RuntimeError(f"block {block} has no average: observe a step first, and ask for one of {self.layers}")
        return torch.cat(self._ema[block], dim=1)

    @contextmanager
    def observe(self, rows=slice(None), update: bool = True) -> Iterator["EMAG"]:
        """Around the clean pass, whose result stays the same, bit for bit where the model is not compiled. E and Δ
        advance when the pass is complete: a pass that fails leaves them as they were.

        rows: an index into the batch, the conditional samples.  update=False: a second evaluation within one step
        (Heun's corrector), which advances neither E nor Δ.
        """
        try:
            with _hooking(self.blocks, "observe()") as hook:
                self._forget_pass()
                _check_dropout(self.blocks)
                for n in range(self.layers[-1]) if self.reuse else ():
                    hook(n, self._record, rows)
                for n in self.layers:                                 # around _record, so that a block may run both
                    hook(n, self._catch, self._clean_attention, rows)
                yield self
            if update:
                self._advance()
        except BaseException:
            self._forget_pass()                                       # so that no negative is made from half a pass
            raise

    @contextmanager
    def perturb(self) -> Iterator["EMAG"]:
        """Around the negative pass, on the rows that this step observed: the selected blocks attend with Ã, not A.
        Every step that perturbs needs its own clean pass: without one, that of an earlier step would be taken for it.

        Reuse: before the first selected block both passes are equal, so the clean outputs are returned again and those
        blocks do not run: the same numbers for less work.
        """
        # Samples that selected different blocks share the pass: it starts at the first of these blocks, and in each
        # block only the samples that selected it attend with Ã.
        chosen = {n: samples for n, samples in zip(self.layers, self.selected.T) if samples.any()}
        if not self._calls or not self._ema:
            raise RuntimeError("perturb() needs a clean pass of this step: run it inside `with emag.observe():` first")
        with _hooking(self.blocks, "perturb()") as hook:
            for n in range(min(chosen)) if self.reuse else ():
                hook(n, self._replay)
            for n, samples in chosen.items():
                hook(n, self._catch, self._negative_attention, samples)
            yield self

    # The three hooks: what runs in the place of block n's own forward, `original`.

    def _record(self, n: int, rows, original: Callable, /, *args, **kwargs):
        """Block n runs, and what it returns is kept for `rows`: a copy, since a model may add to it in place."""
        output, batch = original(*args, **kwargs), len(_first_input(args, kwargs))
        self._outputs[n] = tree_map_only(Tensor, lambda x: (x[rows] if _is_batched(x, batch) else x).clone(), output)
        return output

    def _replay(self, n: int, original: Callable, /, *args, **kwargs):
        """Block n does not run: it returns once more what was kept."""
        self._check_batch(len(_first_input(args, kwargs)))
        return tree_map_only(Tensor, torch.clone, self._outputs[n])

    def _catch(self, n: int, attention: Callable, rows, original: Callable, /, *args, **kwargs):
        """Block n runs, and attention(n, rows, call) computes its first self-attention."""
        with _CatchSelfAttention(partial(attention, n, rows), len(_first_input(args, kwargs))) as mode:
            output = original(*args, **kwargs)
        if not mode.caught:
            block = self.blocks[n]
            raise RuntimeError(f"candidate block {n} ({type(block).__name__}) {mode.what_was_seen(block)}")
        return output

    # What `_catch` does with the attention of the clean pass.

    def _clean_attention(self, n: int, rows, call: "_AttentionCall") -> Tensor:
        """Block n attends as it would; its call, cut to the observed rows, is kept for `_advance` and the negative."""
        clean = call.take(rows)
        _check_call(n, clean, self)
        others = {len(other.query) for other in self._calls.values()} - {len(clean.query)}
        if others:
            raise RuntimeError(f"candidate block {n} attends for {len(clean.query)} samples, another for "
                               f"{others.pop()}: need candidates of one kind, such as the blocks that attend in space")
        if n in self._ema and clean.shape != self._shape[n]:
            raise RuntimeError(f"queries and keys of block {n} were {self._shape[n]}, and now they are {clean.shape}: "
                               "call reset() before a new trajectory")
        self._calls[n] = clean
        return call.attend()

    @torch.no_grad()
    def _advance(self):
        """One step of every candidate's E, and the deviations and the choice that follow from it."""
        if self.trace and not self._ema:
            raise RuntimeError("an earlier step broke off while E was advancing: call reset() and start again")
        try:
            dev = torch.stack([self._advance_block(n).cpu() for n in self.layers], dim=1).double()
            if not dev.isfinite().all():
                raise RuntimeError("Δ is not finite: the attention of a candidate block holds NaN or infinity")
            if self.trace and self.beta > 0 and (dev == 0).all(dim=1).any():
                raise RuntimeError("the observed attention equals its average exactly: the model saw the same latents "
                                   "at every step, or the first self-attention of the blocks is not the image's")
        except BaseException:
            self._ema.clear()                                         # a part of it may have advanced
            raise
        self.trace.append(Observation(dev, zscore(dev), select_layers(dev, self.threshold)))

    def _advance_block(self, n: int) -> Tensor:
        """E_t and Δ_t of block n, a few heads at a time; returns Δ_t (B,)."""
        call, dev = self._calls[n], 0
        slices = call.head_chunks()
        ema, self._shape[n] = self._ema.setdefault(n, [None] * len(slices)), call.shape
        for i, heads in enumerate(slices):
            attn = self._averaged(call, heads)                        # A_t
            ema[i] = ema_update(ema[i], attn, self.beta)              # E_t
            dev = dev + deviation(ema[i], attn) * (attn.shape[1] / call.query.shape[1])
        return dev

    def _averaged(self, call: "_AttentionCall", heads: slice) -> Tensor:
        """What E averages, for some heads: image queries' rows of A, their image columns, or the queries themselves."""
        if self.variant == "query":
            return call.query[:, heads, self.image_tokens].to(self.ema_dtype)
        attn = call.attention_map(heads, self.image_tokens, self.ema_dtype)
        return attn[..., self.image_tokens] if self.variant == "image" else attn

    # What `_catch` does with the attention of the negative pass.

    def _negative_attention(self, n: int, selected: Tensor, call: "_AttentionCall") -> Tensor:
        """Block n attends with Ã in the place of A, for the image queries of the samples that selected it.

        selected: bool (B,).
        """
        self._check_batch(len(call.query))
        if not self.selected[:, :self.layers.index(n)].any():         # nothing is perturbed before this block
            _check_same(n, self.blocks[n], call.take(slice(None)), self._calls[n])
        samples = slice(None) if selected.all() else selected.nonzero()[:, 0].to(call.query.device)
        if self.variant == "query":
            query = call.query.clone()
            for heads, blended in self._blended(n, samples):
                query[samples, heads, self.image_tokens] = blended.to(query.dtype)                   # q̃
            return dataclasses.replace(call, query=query).attend()
        chosen = call.take(samples)
        with torch.autocast(call.value.device.type, enabled=False):   # Ã·V, which is E·V for λ = 1
            out = torch.cat([chosen.mix(heads, blended) for heads, blended in self._blended(n, samples)], dim=1)
        if len(out) == len(call.query) and out.shape[2] == call.query.shape[2]:
            return out                                                # all queries are replaced
        whole = call.attend().clone()
        whole[samples, :, self.image_tokens] = out
        return whole

    def _blended(self, n: int, samples) -> Iterator[tuple[slice, Tensor]]:
        """Ã (or q̃) of block n, a few heads at a time. With λ = 1 it is E, and only EMAG-I makes a map."""
        if self.strength < 1 or self.variant == "image":
            clean = self._calls[n].take(samples)
        for heads, ema in zip(self._calls[n].head_chunks(), self._ema[n]):
            ema = ema[samples]
            if self.variant == "image":
                # Only image → image is replaced; then each row is divided by its sum. A row of sum 0 stays as in A.
                attn = clean.attention_map(heads, self.image_tokens, self.ema_dtype)
                mixed = attn.clone()
                mixed[..., self.image_tokens] = blend(attn[..., self.image_tokens], ema, self.strength)
                total = mixed.sum(dim=-1, keepdim=True)
                yield heads, torch.where(total > 0, mixed / total, attn)
            elif self.strength < 1:
                yield heads, blend(self._averaged(clean, heads), ema, self.strength)
            else:
                yield heads, ema

    def _check_batch(self, batch: int):
        observed = len(self._calls[self.layers[0]].query)
        if batch != observed:
            raise RuntimeError(f"the negative pass got {batch} samples, {observed} were observed: "
                               "call the model on the observed rows alone")


# ------------------------------------------------------------------------------------------ for pipelines with CFG


@contextmanager
def guide(model: nn.Module, blocks: Sequence[nn.Module], layers: Iterable[int], *, scale: float = 1.5, steps: int = 28,
          cond: str = "last", calls: int = 1, channels: slice | None = None, window: Window = Window(),
          take: Callable | None = None, **emag_options) -> Iterator[EMAG]:
    """EMAG inside a pipeline that does CFG; the pipeline and the model stay as they are. The defaults are SD3's.

        with guide(pipe.transformer, pipe.transformer.transformer_blocks, range(6, 9), scale=1.5, steps=28, cond="last",
                   image_tokens=slice(0, 4096)) as emag:
            image = pipe(prompt, num_inference_steps=28, guidance_scale=7.0).images[0]

    The model's prediction for the conditional samples comes back as ε̃', so that the pipeline's own CFG formula
    completes the method.

    scale: w_e; 1 is off.  steps: steps per trajectory; after so many a new trajectory starts.
    calls, cond: how the pipeline does CFG.
        calls=1, cond="first" or "last": it calls the model once per step, with a doubled batch; that half of it is
            conditional.
        calls=1, cond="all": it calls the model once per step, without CFG.
        calls=2, cond="first" or "last": it calls the model twice per step; that call is the conditional one.
    channels: the slice of the output's dimension 1 that is the prediction, where others are a variance.
    take: take(args, kwargs, rows) → (args, kwargs) cuts the model's inputs to the samples `rows`, a slice. The default
        cuts every tensor and every list that is as long as the batch.
    emag_options: as for EMAG.

    x_t is the first tensor, or list of tensors, among the model's inputs; its length is the batch size.

    Raises ValueError for an argument out of range, RuntimeError where the model's calls are not as described.
    """
    allowed = {1: ("first", "last", "all"), 2: ("first", "last")}
    for good, wrong in ((calls in allowed, f"calls is {calls}: need 1 or 2"),
                        (cond in allowed.get(calls, ()), f"cond is {cond!r}: need one of {allowed.get(calls)}"),
                        (steps >= 1, f"steps is {steps}: need at least 1"),
                        (math.isfinite(scale), f"scale is {scale}: need a finite number")):
        if not good:
            raise ValueError(wrong)
    emag = EMAG(blocks, layers, **emag_options)
    count = 0                                                         # calls of the model so far
    before = ()                                                       # the latents of the call before
    thread = None                                                     # of this trajectory; None where a call failed
    cut_checked = False

    def forward(original: Callable, /, *args, **kwargs):
        nonlocal count, before, thread, cut_checked
        step, turn = divmod(count % (steps * calls), calls)
        if step == turn == 0:
            emag.reset()
            before = ()
        elif thread != threading.get_ident():
            raise RuntimeError("a call of this trajectory failed, or two threads draw inside one guide(): "
                               "leave guide() after an error, and give each thread a model and a guide() of its own")
        count, thread = count + 1, None
        x = _first_input(args, kwargs)
        again, before = _equal(x, before), tree_map(torch.clone, x)
        if again and calls == 1:
            raise RuntimeError("the model was called twice in a row with the same latents: this pipeline calls it "
                               "twice per step. Give calls=2, and cond='first' or 'last' for the conditional call")
        if turn == 1 and not again:
            raise RuntimeError("with calls=2 the two calls of a step need the same latents, and they differ: "
                               "does this pipeline call the model once per step? Then give calls=1")
        observed = window.observes(step, steps) and (calls == 1 or turn == allowed[2].index(cond))
        rows = _conditional(x, cond) if observed and calls == 1 else slice(None)
        with emag.observe(rows) if observed else nullcontext():
            out = original(*args, **kwargs)
        if observed and window.perturbs(step, steps):
            pred, rewrap = _unwrap(out)
            if rows != slice(None):
                args, kwargs = (take or _take)(args, kwargs, rows)
                if not cut_checked:                                   # once, since it takes a pass
                    _check_cut(model, original, args, kwargs, pred, rows, len(emag.selected))
                    cut_checked = True
            with emag.perturb():
                negative, _ = _unwrap(original(*args, **kwargs))
            out = rewrap(_guided_rows(pred, negative, rows, channels, scale))
        emag._forget_pass()                                           # to free what was kept of the clean pass
        thread = threading.get_ident()
        return out

    with ExitStack() as hooks:
        if scale != 1:
            if hasattr(getattr(model, "_old_forward", model.forward), "_emag"):
                raise RuntimeError("this model is inside another guide(): one at a time per model")
            hooks.enter_context(_replaced_forward(model, forward))
        try:
            yield emag
        except RuntimeError as error:
            if "fullgraph=True" in str(error):
                raise RuntimeError("a whole model compiled with fullgraph=True cannot be hooked inside its graph: "
                                   "give guide() what torch.compile returned, or compile without fullgraph") from error
            raise
    if scale != 1 and (count == 0 or count % (steps * calls)):
        raise RuntimeError(f"the model was called {count} times inside guide(), which is no multiple of steps={steps} "
                           f"times calls={calls}: give the steps and calls that the pipeline makes per batch of images")


# =========================================================================================== the machinery
#
# Below: how `guide` handles a model's inputs and outputs, the hooks on unmodified blocks, one call of attention (A is
# made in `attention_map`), and the checks.


def _equal(a: Tensor | list[Tensor], b: Tensor | list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def _conditional(x: Tensor | list[Tensor], cond: str) -> slice:
    """The conditional samples of a batch: all, or one half of it where CFG doubled it."""
    first, last = slice(len(x) // 2), slice(len(x) // 2, None)
    doubled = len(x) % 2 == 0 and _equal(x[first], x[last])
    if doubled and cond == "all":
        raise RuntimeError("cond is 'all', but both halves of the batch hold the same latents, as CFG doubles them: "
                           "give cond='first' or 'last', the conditional half; without CFG, draw from different noise")
    if not doubled and cond != "all":
        raise RuntimeError(f"the batch of {len(x)} samples has no conditional half, since its halves hold different "
                           "latents: is the pipeline's CFG on? Give cond='all' where it has none, calls=2 where it "
                           "calls the model twice per step")
    return {"first": first, "last": last, "all": slice(None)}[cond]


def _take(args: tuple, kwargs: dict, rows: slice) -> tuple[tuple, dict]:
    """The inputs with every tensor and every list that is as long as the batch cut to `rows`."""
    batched = partial(_is_batched, batch=len(_first_input(args, kwargs)))
    return tree_map(lambda x: x[rows] if batched(x) else x, (args, kwargs), is_leaf=batched)


def _check_cut(model: nn.Module, original: Callable, args: tuple, kwargs: dict, pred, rows: slice, observed: int):
    """Cutting the inputs to the conditional samples must not change what the model predicts for these."""
    hint = "an input is not batch-first, or only happens to be as long as the batch: give take="
    if len(pred) != 2 * observed:
        raise RuntimeError(f"{observed} samples were observed, and the prediction holds {len(pred)}, not {2 * observed}: "
                           "the model folds frames or other dimensions into its batch, and guide() cannot halve it")
    clean, null = pred[rows], pred[rows.stop:rows.start]              # the conditional half, and the other one
    try:
        again, _ = _unwrap(original(*args, **kwargs))
    except Exception as error:
        raise RuntimeError(f"the model fails on inputs cut to the conditional samples ({error}): {hint}") from error
    if len(again) != len(clean) or not all(_close(*parts, model) for parts in zip(again, clean, null)):
        raise RuntimeError("the model predicts something else on inputs cut to the conditional samples: "
                           f"{hint}; or dropout is on, or the prediction is not finite")


def _unwrap(out) -> tuple[Tensor | list[Tensor], Callable]:
    """The prediction in a model's output, a tensor or a list with one per sample; and a function that puts another one
    in its place."""
    pred, rewrap = out, lambda pred: pred
    if dataclasses.is_dataclass(out):
        name = dataclasses.fields(out)[0].name
        pred, rewrap = getattr(out, name), lambda pred: dataclasses.replace(out, **{name: pred})
    elif isinstance(out, tuple) and out:                              # a named tuple, or a plain one
        pred, rewrap = out[0], lambda pred: getattr(type(out), "_make", type(out))((pred, *out[1:]))
    if not isinstance(pred, (Tensor, list)):
        raise RuntimeError(f"the model returns a {type(out).__name__}: guide() needs a tensor, a list of tensors, or a "
                           "tuple or dataclass in which one of these comes first, the prediction")
    return pred, rewrap


def _guided_rows(pred, negative, rows: slice, channels: slice | None, scale: float):
    """`pred` with ε̃' in the place of ε: for the samples `rows`, in their prediction channels."""
    channels = slice(None) if channels is None else channels
    if isinstance(pred, list):                                        # one tensor (C, …) per sample
        guided = list(pred)
        guided[rows] = [_guided_rows(p[None], q[None], slice(None), channels, scale)[0]
                        for p, q in zip(pred[rows], negative)]
    else:
        guided = pred.clone()
        guided[rows, channels] = emag_update(pred[rows, channels], negative[:, channels], scale)
    return guided


# -------------------------------------------------------------------------------------- hooks on unmodified blocks


_TURN = threading.RLock()


@contextmanager
def _hooking(blocks: Sequence[nn.Module], where: str) -> Iterator[Callable]:
    """One pass: after hook(n, forward, *bound) block n runs forward(n, *bound, its own forward, *args, **kwargs).

    Compiled models and blocks run uncompiled inside, since compiled code does not see hooks that come and go. torch has
    one such switch for all threads, so the passes of several threads take turns.
    """
    hooked, ran, stack, thread = [], [], ExitStack(), threading.get_ident()

    def hook(n: int, forward: Callable, *bound):
        def run(original: Callable, /, *args, **kwargs):
            if threading.get_ident() != thread:                       # another thread runs the same model, without EMAG
                return original(*args, **kwargs)
            ran.append(n)
            return forward(n, *bound, original, *args, **kwargs)

        hooked.append(n)
        stack.enter_context(_replaced_forward(blocks[n], run))

    with _TURN, torch.compiler.set_stance("force_eager"), stack:
        yield hook
        _check_ran(ran, hooked, where)


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Inside, `module` runs forward(its own forward, *args, **kwargs), uncompiled; afterwards it is as before."""
    def run(*args, **kwargs):
        return forward(original, *args, **kwargs) if on else original(*args, **kwargs)

    # Offloading by accelerate keeps a module's own forward as `_old_forward`, and puts it back after a pipeline's run.
    place = "_old_forward" if "_old_forward" in vars(module) else "forward"
    original, inherited = getattr(module, place), place not in vars(module)
    compiled = vars(module).pop("_compiled_call_impl", None)          # module.compile() lets it run instead of forward
    replacement = torch.compiler.disable(wraps(original)(run))
    replacement._emag = on = True                       # not on: what somebody kept of the replacement does nothing
    try:
        setattr(module, place, replacement)
        yield
    finally:
        on = False
        if compiled is not None:
            module._compiled_call_impl = compiled
        for place in ("forward", "_old_forward"):
            if vars(module).get(place) is replacement:
                setattr(module, place, original)
        if inherited and vars(module).get("forward") is original:
            del module.forward


def _first_input(args: tuple, kwargs: dict) -> Tensor | list[Tensor]:
    """The first input that is a tensor, or a list with one tensor per sample; its length is the batch size."""
    for leaf in tree_leaves((args, kwargs), is_leaf=lambda tree: isinstance(tree, list)):
        if isinstance(leaf, Tensor) or isinstance(leaf, list) and leaf and isinstance(leaf[0], Tensor):
            return leaf
    raise RuntimeError("a hooked model or block was called without a tensor")


def _is_batched(x, batch: int) -> bool:
    """Whether x is a tensor or a list with one entry per sample."""
    return (isinstance(x, list) or isinstance(x, Tensor) and x.ndim > 0) and len(x) == batch


# ------------------------------------------------------------------------------------------- one call of attention

CHUNK = 2**22          # map entries made at a time, 16 MiB in float32
FUSED = torch._C._nn.scaled_dot_product_attention          # not F's, which others replace by a function of their own


@dataclasses.dataclass
class _AttentionCall:
    """One call of scaled_dot_product_attention, argument by argument: query (B, heads, N, d)."""
    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def shape(self) -> tuple[tuple, tuple]:
        return tuple(self.query.shape), tuple(self.key.shape)

    def attend(self) -> Tensor:
        """What the model asked for, by the fused kernel."""
        return FUSED(self.query, self.key, self.value, self.attn_mask, self.dropout_p, self.is_causal,
                     scale=self.scale, enable_gqa=self.enable_gqa)

    def take(self, rows) -> "_AttentionCall":
        """The same call for some samples of the batch; key and value get as many heads as the query."""
        mask, group = self.attn_mask, self.query.shape[1] // self.key.shape[1]
        if mask is not None:                                          # (B, heads or 1, N or 1, N), cut to `rows`
            mask = mask[(None,) * (4 - mask.ndim)].expand(len(self.query), -1, -1, -1)[rows]
        key, value = (x[rows].repeat_interleave(group, dim=1) if group > 1 else x[rows] for x in (self.key, self.value))
        return dataclasses.replace(self, query=self.query[rows], key=key, value=value, attn_mask=mask, enable_gqa=False)

    def head_chunks(self) -> list[slice]:
        """Slices of heads whose maps have at most CHUNK entries together, or one head each."""
        batch, heads, queries, _ = self.query.shape
        size = max(1, CHUNK // (batch * queries * self.key.shape[-2]))
        return [slice(start, start + size) for start in range(0, heads, size)]

    def attention_map(self, heads: slice, queries: slice, dtype: torch.dtype) -> Tensor:
        """The rows of A that belong to `queries`: softmax(q·kᵀ·scale + mask), (B, heads, queries, N).

        In `dtype` also under torch.autocast. A row of which every key is masked is 0, as the fused kernels have it.
        """
        scale = self.query.shape[-1] ** -0.5 if self.scale is None else self.scale
        with torch.autocast(self.query.device.type, enabled=False):
            q, k = self.query[:, heads, queries].to(dtype), self.key[:, heads].to(dtype)
            logits = (q * scale) @ k.transpose(-1, -2)
            if self.attn_mask is None:
                return logits.softmax(dim=-1)
            mask = self.attn_mask.expand(-1, *self.query.shape[1:3], -1)[:, heads, queries]
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.to(dtype)
            return logits.softmax(dim=-1).masked_fill(logits.amax(dim=-1, keepdim=True) == -torch.inf, 0)

    def mix(self, heads: slice, attn: Tensor) -> Tensor:
        """The output of attention with other maps, Ã·V."""
        return (attn @ self.value[:, heads].to(attn.dtype)).to(self.value.dtype)


class _HandMade(_AttentionCall):
    """Attention without the fused kernel: query is what softmax gave, A itself, (B, heads, N, N); the rest is empty."""
    shape = property(lambda self: (tuple(self.query.shape),) * 2)

    def attend(self) -> Tensor:
        return self.query

    def attention_map(self, heads: slice, queries: slice, dtype: torch.dtype) -> Tensor:
        return self.query[:, heads, queries].to(dtype)

    def mix(self, heads: slice, attn: Tensor) -> Tensor:
        return attn.to(self.query.dtype)


class _CatchSelfAttention(TorchFunctionMode):
    """While on, hands the first self-attention to `handle`, and leaves all other functions unchanged.

    That is a call of scaled_dot_product_attention, or a softmax over the last dimension, with as many queries as keys.
    """
    SOFTMAX = (torch.softmax, Tensor.softmax, F.softmax)

    def __init__(self, handle: Callable[[_AttentionCall], Tensor], batch: int):
        super().__init__()
        self.handle, self.batch, self.caught = handle, batch, False
        self.parts = None                     # shape of the caught map, if it is (B·heads, N, N)
        self.unequal = None                   # (queries, keys) of a call that is no self-attention

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is FUSED and not self.caught:
            call = _AttentionCall(*args, **kwargs)
            if call.query.shape[-2] == call.key.shape[-2]:
                return self._hand_over(call)
            self.unequal = call.query.shape[-2], call.key.shape[-2]
        out = func(*args, **kwargs)
        if func in self.SOFTMAX and out.ndim in (3, 4) and out.shape[-1] == out.shape[-2]:
            if self.parts == out.shape:
                raise RuntimeError("a candidate block makes its map in several parts, or two maps of one shape: EMAG "
                                   "needs one for the whole batch (diffusers: pipe.disable_attention_slicing())")
            if not self.caught and kwargs.get("dim", args[1] if len(args) > 1 else None) in (-1, out.ndim - 1):
                # (B·heads, N, N), in which the heads of a sample stand together, as well as (B, heads, N, N)
                maps = out if out.ndim == 4 or len(out) % self.batch else out.unflatten(0, (self.batch, -1))
                self.parts = out.shape if out.ndim == 3 else None
                return self._hand_over(_HandMade(maps, maps[..., :0], maps[..., :0])).reshape(out.shape)
        return out

    def _hand_over(self, call: _AttentionCall) -> Tensor:
        self.caught = True
        if call.query.ndim == 4 and len(call.query) != self.batch:
            raise RuntimeError(f"a candidate block gets {self.batch} samples and attends for {len(call.query)}: EMAG "
                               "needs inputs that are batch-first, and one attention call for the whole batch")
        return self.handle(call)

    def what_was_seen(self, block: nn.Module) -> str:
        """Why nothing was caught, for the error line."""
        if self.unequal is not None:
            return ("attends with {} queries to {} keys: EMAG needs tokens that attend to each other, as many queries "
                    "as keys".format(*self.unequal))
        if any(hasattr(module, "_diffusers_hook") for module in block.modules()):
            return "did not compute its attention: switch the cache of the model off (diffusers: model.disable_cache())"
        if any(isinstance(module, nn.MultiheadAttention) for module in block.modules()):
            return ("attends by nn.MultiheadAttention, inside which nothing is seen: let it call "
                    "scaled_dot_product_attention instead")
        if F.scaled_dot_product_attention is not FUSED:
            return ("attends by a function that replaces torch's scaled_dot_product_attention "
                    f"({F.scaled_dot_product_attention!r}): put the original back")
        return ("made no self-attention by torch's scaled_dot_product_attention or by softmax: switch from xformers, "
                "flash-attn or FlexAttention to torch's kernel, in diffusers by set_attention_backend('native') or "
                "disable_xformers_memory_efficient_attention(), in timm by fused_attn, elsewhere often by "
                "infer_mode='torch' or attn_mode='torch'")


# ------------------------------------------------------------------------------ what cannot be right is an error


def _check_options(emag: EMAG):
    if not emag.layers or emag.layers[0] < 0 or emag.layers[-1] >= len(emag.blocks):
        raise ValueError(f"layers {emag.layers}: need at least one of 0…{len(emag.blocks) - 1}")
    for name in ("beta", "strength"):
        if not 0 <= getattr(emag, name) <= 1:
            raise ValueError(f"{name} is {getattr(emag, name)}: need 0 ≤ {name} ≤ 1")
    if emag.variant not in ("map", "image", "query"):
        raise ValueError(f"variant is {emag.variant!r}: need 'map', 'image' or 'query'")
    if emag.threshold is not None and math.isnan(emag.threshold):
        raise ValueError("threshold is nan: need a number, or None for the argmax")
    if emag.ema_dtype not in (torch.float16, torch.float32, torch.float64):
        raise ValueError(f"ema_dtype is {emag.ema_dtype}: need float32, float64 or float16; bfloat16 has 8 bits, too "
                         "few for steps of (1−β)·(A−E)")


def _check_ran(ran: list[int], hooked: list[int], where: str):
    """Every hook of a pass ran once, in the order of the blocks."""
    missing, order = set(hooked) - set(ran), sorted(hooked)
    if missing:
        raise RuntimeError(f"block {min(missing)} did not run inside {where}: run the model there once, and give its "
                           "own blocks as `blocks`")
    if len(ran) > len(order):
        raise RuntimeError(f"the blocks ran twice inside {where}: one pass of the model at a time")
    if ran != order:
        raise RuntimeError(f"the blocks ran in the order {list(dict.fromkeys(ran))}: give `blocks` in that order")


def _check_dropout(blocks: Sequence[nn.Module]):
    for n, block in enumerate(blocks):
        if any(isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0
               for module in block.modules()):
            raise RuntimeError(f"block {n} has dropout on, by which two passes differ: call model.eval()")


def _check_call(n: int, call: _AttentionCall, emag: EMAG):
    """The attention of candidate block n, cut to the observed rows, is one that EMAG can average."""
    if call.is_causal:
        raise RuntimeError(f"candidate block {n} attends causally, which is not supported: EMAG is for maps in which "
                           "every token sees every other, as diffusion transformers have them")
    if call.query.ndim != 4 or not len(call.query):
        raise RuntimeError(f"candidate block {n} attends with queries of shape {tuple(call.query.shape)} for the "
                           "observed rows: need (batch, heads, tokens, channels), and rows that select a sample")
    if call.dropout_p > 0:
        raise RuntimeError(f"candidate block {n} attends with dropout, by which two passes differ: call model.eval()")
    tokens, image = call.query.shape[2], emag.image_tokens
    if not range(tokens)[image] or max(abs(image.start or 0), abs(image.stop or 0)) > tokens:
        raise RuntimeError(f"candidate block {n} attends for {tokens} tokens, and image_tokens is {image}: "
                           "need the slice of them that holds the image")
    if emag.variant == "query" and isinstance(call, _HandMade):
        raise RuntimeError(f"candidate block {n} makes its map by hand: variant 'query' has no queries; use 'map'")


def _check_same(n: int, block: nn.Module, call: _AttentionCall, clean: _AttentionCall):
    """The first perturbed block must get the same queries and keys in both passes."""
    if not (_close(call.query, clean.query, None, block) and _close(call.key, clean.key, None, block)):
        raise RuntimeError(f"block {n}, the first to be perturbed, gets other inputs in the negative pass than in the "
                           "clean one: cut all inputs to the observed rows, and switch dropout off")


def _close(new: Tensor, old: Tensor, other: Tensor | None, module: nn.Module) -> bool:
    """Equal within rounding error, also of TF32 or another batch size; and, down to twice the dtype's precision, off by
    at most a quarter of the distance between `old` and `other`."""
    dtypes = {old.dtype, *(p.dtype for p in module.parameters())}
    if torch.is_autocast_enabled(old.device.type):
        dtypes.add(torch.get_autocast_dtype(old.device.type))
    # Weights of 8 bits are the same in both passes; what is computed with them has at least bfloat16's precision.
    eps = max(min(torch.finfo(dtype).eps, 2**-7) if dtype.is_floating_point else 2**-7 for dtype in dtypes)
    allowed = max(1e-3, 8 * eps)
    size = old.float().norm()
    if other is not None:
        allowed = min(allowed, max(1e-3, 2 * eps, ((other - old).float().norm() / size).item() / 4))
    return new.shape == old.shape and bool((new - old).float().norm() <= allowed * size)
