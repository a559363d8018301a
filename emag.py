"""EMAG, Exponential Moving Average Guidance (Yadav, Huy, Liu; arXiv 2512.17303, ECCV 2026), in one file.

Beside the conditional and the null prediction the network makes a third one, the negative ε'. In that pass one
transformer block uses the moving average of its own attention maps over the trajectory. The negative has the same
content and the same layout, and its fine detail is slightly wrong; the guided prediction moves away from it.

In this order: the equations; the class that puts them into an unmodified model; and, under a line that says so, the
machinery. This file needs torch alone. Pipelines that do classifier-free guidance (CFG) themselves: recipes/guide.py.

Symbols: A attention map, E its moving average, Δ deviation, ε prediction (noise or velocity), ε' negative prediction,
β decay, λ blend strength, w_e EMAG scale, w CFG scale. B samples, L candidate blocks, N tokens, d channels per head.
"""
import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

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
    gap = F.smooth_l1_loss(ema, attn, reduction="none", beta=1e-30)   # |E − A|, in one pass over the memory
    # `mean` adds in pairs. A running sum of a map's 18 million entries loses up to 5% in float32; float16 overflows.
    return gap.flatten(1).mean(dim=1, dtype=at_least_float32(ema.dtype))


def zscore(dev: Tensor) -> Tensor:
    """Each sample's deviations, standardised over the candidate blocks: (B, L) → (B, L).

    z⁽ⁿ⁾ = (Δ⁽ⁿ⁾ − mean Δ) / (std Δ + δ), population std, δ > 0 tiny
    """
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
    """EMAG update (v1 eq. 15, ECCV eq. 14): ε̃' = ε' + w_e·(ε − ε'); unconditional: of both at the null condition"""
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
            raise ValueError(f"{self}: need 1 ≥ start ≥ apply ≥ stop ≥ 0")

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
        guided = cfg_update(emag_update(pred[rows], negative, w_e), pred_null, w)

    blocks: the model's transformer blocks in the order they run.  layers: the candidates, as indices into `blocks`.
    beta, strength: β and λ, in [0, 1].  threshold: None selects the argmax, τ also every block with z ≥ τ.
    variant: what E averages and the negative replaces. Only image queries change. "map" (EMAG): their whole rows of A.
        "image" (EMAG-I): their image columns; then each row is divided by its sum. "query" (EMAG-Q): the queries
        themselves; no map is made.
    image_tokens: the slice of the token sequence that holds image tokens; None where all do. The attribute may be set
        to another slice before the first observed step of a trajectory.
    attention: which attention call of a block is the image's, counted from 0; None: the first with as many queries as
        keys, which is its self-attention.
    reuse: the negative pass does not run the blocks before the first selected one. Give False where blocks do more than
        return their output: where they write to their inputs, or talk to other processes.
    ema_dtype: dtype in which E is kept. float16 halves the memory; in it E stays as it is where A differs by less
        than about 3%, or 2.5·10⁻⁶ where that is more (at β = 0.988). bfloat16 is refused: its 8 bits mostly round
        (1−β)·(A−E) away.

    One object follows one trajectory at a time. When to observe and to perturb is the caller's choice (`Window`).

    Raises ValueError for an argument out of range, RuntimeError where the model or the order of calls cannot work.
    """

    def __init__(self, blocks: Sequence[nn.Module], layers: Iterable[int], *, beta: float = 0.988,
                 strength: float = 1.0, variant: str = "map", threshold: float | None = None,
                 image_tokens: slice | None = None, attention: int | None = None, reuse: bool = True,
                 ema_dtype: torch.dtype = torch.float32):
        self.blocks, self.layers = list(blocks), sorted(set(layers))
        self.beta, self.strength, self.variant, self.threshold = beta, strength, variant, threshold
        self.image_tokens = slice(None) if image_tokens is None else image_tokens
        self.attention, self.reuse, self.ema_dtype = attention, reuse, ema_dtype
        need(self.layers and 0 <= self.layers[0] and self.layers[-1] < len(self.blocks),
             f"layers {self.layers}: need at least one of 0…{len(self.blocks) - 1}", ValueError)
        need(0 <= beta <= 1, f"beta is {beta}: need 0 ≤ beta ≤ 1", ValueError)
        need(0 <= strength <= 1, f"strength is {strength}: need 0 ≤ strength ≤ 1", ValueError)
        need(variant in ("map", "image", "query"), f"variant {variant!r}: need 'map', 'image' or 'query'", ValueError)
        need(threshold is None or threshold == threshold, "threshold is nan: need a number, or None", ValueError)
        need(ema_dtype in (torch.float16, torch.float32, torch.float64),
             f"ema_dtype is {ema_dtype}: need float32, float64 or float16; bfloat16 has only 8 bits", ValueError)
        self.reset()

    def reset(self):
        """Forgets everything: a new trajectory starts."""
        self.trace: list[Observation] = []                     # one entry per observed step
        self._ema: dict[int, list[Tensor]] | None = {}         # candidate → E, in chunks of heads; None: half advanced
        self._shapes: tuple | None = None                      # image tokens, and the candidates' queries and keys
        self._eps = 0.0                                        # `precision` of the blocks
        self.forget()

    def forget(self):
        """Frees what is kept of the clean pass for its negative."""
        self._calls: dict[int, _AttentionCall] = {}            # candidate → its attention, of the observed rows
        self._outputs: dict[int, object] = {}                  # block → what it returned, of the observed rows
        self._entered: Tensor | None = None                    # what block 0 was given

    @property
    def last(self) -> Observation:
        need(self.trace, "nothing was observed yet: first run the model inside `with emag.observe():`")
        return self.trace[-1]

    deviation = property(lambda self: self.last.deviation)
    zscore = property(lambda self: self.last.zscore)
    selected = property(lambda self: self.last.selected)

    def average(self, block: int) -> Tensor:
        """E of one candidate, a copy: (B, heads, image queries, keys); of EMAG-I the image keys alone; of EMAG-Q the
        queries, (B, heads, image queries, d)."""
        need(block in (self._ema or ()), f"block {block} has no average: observe a step; only {self.layers} have one")
        return torch.cat(self._ema[block], dim=1)

    @contextmanager
    def observe(self, rows=slice(None), update: bool = True) -> Iterator["EMAG"]:
        """Around the clean pass, whose result stays the same: bit for bit, but for compiled models and
        nn.MultiheadAttention, for which torch has a faster kernel that this switches off.

        rows: a slice, list or tensor that selects the conditional samples.  update=False: a second evaluation within
        one step (Heun's corrector), which advances neither E nor Δ.
        A pass that fails leaves E as it was, and there is no negative of it. Where E itself fails (Δ is not finite, or
        0), the trajectory ends: reset().
        """
        calls, outputs, entered = {}, {}, None                 # the object's in the last line, where the pass is valid
        self.forget()
        if not self._ema:
            _refuse_dropout(self.blocks)
            self._eps = precision(self.blocks)

        def keep(n: int, call: "_AttentionCall") -> Tensor:
            calls[n] = call.take(rows)
            return call.attend()

        def run(n: int, forward: Callable, args: tuple, kwargs: dict):
            nonlocal entered
            x = first_tensor(args, kwargs)
            if n == 0:
                entered = x[rows].clone()                      # copies, here and below: a model may write to tensors
            output = _with_attention(keep, self, n, forward, args, kwargs) if n in self.layers else \
                forward(*args, **kwargs)
            if self.reuse and n < self.layers[-1]:
                outputs[n] = map_tensors(lambda y: (y[rows] if y.ndim and len(y) == len(x) else y).clone(), output)
            return output

        with _hooked(self.blocks, range(self.layers[-1] + 1) if self.reuse else self.layers, run):
            yield self
        counts = {len(call.query) for call in calls.values()}
        need(len(counts) == 1 and 0 not in counts, f"candidate blocks attend for {sorted(counts)} samples: need "
             "rows that select a sample, and candidates of one kind, such as the blocks that attend in space")
        shapes = self.image_tokens, {n: (tuple(call.query.shape), tuple(call.key.shape)) for n, call in calls.items()}
        need(self._shapes in (None, shapes), "image_tokens, or the shapes of queries and keys, are not those of the "
             "steps before: call reset() before a new trajectory")
        if update:
            self._advance(calls)
            self._shapes = shapes
        self._calls, self._outputs, self._entered = calls, outputs, entered

    @torch.inference_mode(False)                               # E outlives the pass, and later ones may not be in it
    @torch.no_grad()
    def _advance(self, calls: dict[int, "_AttentionCall"]):
        """One step of every candidate's E, a few heads at a time, and the deviations and the choice that follow."""
        need(self._ema is not None, "E is half advanced, since an earlier step failed: call reset() and start again")
        averages, self._ema, deviations = self._ema, None, []  # None until all of it has advanced
        for n in self.layers:
            call, total, chunks = calls[n], 0, calls[n].head_chunks()
            ema = averages.setdefault(n, [None] * len(chunks))
            for i, heads in enumerate(chunks):
                attn = self._averaged(call, heads)                                              # A_t
                ema[i] = ema_update(ema[i], attn, self.beta)                                    # E_t
                total = total + deviation(ema[i], attn) * (attn.shape[1] / call.query.shape[1])   # Δ_t, by its heads
            deviations.append(total)
        dev = torch.stack([each.to(deviations[0].device) for each in deviations], dim=1).cpu().double()   # one wait
        need(dev.isfinite().all(), "Δ is not finite: the attention of a candidate block holds NaN or infinity")
        need(not self.trace or self.beta == 0 or (dev > 0).any(dim=1).all(),
             "the observed attention equals its average exactly: the model saw the same latents at every step, or "
             "another attention than the image's was observed: give attention=")
        self.trace.append(Observation(dev, zscore(dev), select_layers(dev, self.threshold)))
        self._ema = averages

    def _averaged(self, call: "_AttentionCall", heads: slice) -> Tensor:
        """What E averages, for some heads: image queries' rows of A, their image columns, or the queries themselves."""
        if self.variant == "query":
            return call.query[:, heads, self.image_tokens].to(self.ema_dtype)
        attn = call.attention_map(heads, self.image_tokens, self.ema_dtype)
        return attn[..., self.image_tokens] if self.variant == "image" else attn

    @contextmanager
    def perturb(self) -> Iterator["EMAG"]:
        """Around the negative pass, on the rows that this step observed: the selected blocks attend with Ã, not A.

        Samples that selected different blocks share the pass. Reuse: before the first of these blocks both passes are
        equal, so the clean outputs are returned again and those blocks do not run.
        """
        need(self._calls and self._ema,
             "nothing was observed yet in this step: first make its clean pass inside `with emag.observe():`")
        perturbed = [n for n, samples in zip(self.layers, self.selected.T) if samples.any()]
        first, observed = perturbed[0], len(self._calls[perturbed[0]].query)

        def run(n: int, forward: Callable, args: tuple, kwargs: dict):
            x = first_tensor(args, kwargs)
            need(len(x) == observed, f"the negative pass got {len(x)} samples, {observed} were observed: call the "
                                     "model on the observed rows alone")
            if n == 0 and self._entered is not None:
                need(is_close(x, self._entered, self._eps), f"block 0 {OTHER_INPUTS}")
            if n < first:
                return map_tensors(torch.clone, self._outputs[n])
            return _with_attention(self._negative_attention, self, n, forward, args, kwargs)

        with _hooked(self.blocks, [*range(first if self.reuse else 0), *perturbed], run):
            yield self

    def _negative_attention(self, n: int, call: "_AttentionCall") -> Tensor:
        """Block n attends with Ã in the place of A, for the image queries of the samples that selected it.

        call: its attention in this pass; what it was in the clean pass is in `self._calls`.
        """
        clean, image, index = self._calls[n], self.image_tokens, self.layers.index(n)
        if not self.selected[:, :index].any():                        # the first to be perturbed: all is still equal
            own = call.take(slice(None))
            same = [is_close(new, old, self._eps) for new, old in (
                (own.query, clean.query), (own.key, clean.key), (own.value, clean.value))]
            need(same[0] & same[1] & same[2],                         # not `and`: a GPU is waited for once
                 f"block {n}, the first to be perturbed, {OTHER_INPUTS}")
        selected = self.selected[:, index]                                                     # bool (B,)
        rows = slice(None) if selected.all() else selected.nonzero()[:, 0].to(call.query.device)
        clean_rows, own_rows = clean.take(rows), call.take(rows)
        blended = ((heads, self._blended(clean_rows, heads, ema[rows]))                        # one chunk at a time
                   for heads, ema in zip(clean.head_chunks(), self._ema[n]))
        if self.variant == "query":
            query = call.query.clone()
            for heads, each in blended:
                query[rows, heads, image] = each.to(query.dtype)                               # q̃
            return dataclasses.replace(call, query=query).attend()
        with torch.autocast(call.value.device.type, enabled=False):   # Ã·V, which is E·V for λ = 1
            out = torch.cat([own_rows.mix(heads, each) for heads, each in blended], dim=1)
        if out.shape[::2] == call.query.shape[::2]:                   # all samples, all queries
            return out
        whole = call.attend().clone()                                 # autograd may have kept it
        whole[rows, :, image] = out
        return whole

    def _blended(self, clean: "_AttentionCall", heads: slice, ema: Tensor) -> Tensor:
        """Ã (or q̃) of some samples and heads. With λ = 1 it is E; EMAG-I needs A for the text columns all the same."""
        mixed = ema if self.strength == 1 else blend(self._averaged(clean, heads), ema, self.strength)
        if self.variant != "image":
            return mixed
        attn = clean.attention_map(heads, self.image_tokens, self.ema_dtype).clone()
        attn[..., self.image_tokens] = mixed                          # image → image alone; then each row's sum is 1,
        return attn / attn.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(attn.dtype).tiny)   # or 0, if all is masked


# =========================================================================================== the machinery
#
# Below: small helpers; the hooks on unmodified blocks; one call of attention (A is made in `attention_map`).

OTHER_INPUTS = ("gets other inputs in the negative pass than in the clean pass before it: each negative needs a clean "
                "pass of its own, and inputs cut to the observed rows; in train() mode call model.eval()")


def need(good, message: str, error: type[Exception] = RuntimeError):
    if not good:
        raise error(message)


def first_tensor(args: tuple, kwargs: dict) -> Tensor:
    """The first input of a block that is a tensor; its length is the batch size."""
    if args and isinstance(args[0], Tensor):                          # the usual case, and no walk through all inputs
        return args[0]
    return [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)][0]


def map_tensors(function: Callable[[Tensor], Tensor], tree):
    return function(tree) if isinstance(tree, Tensor) else tree_map_only(Tensor, function, tree)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def precision(modules: Iterable[nn.Module]) -> float:
    """The largest eps of the parameters' dtypes. Weights of 8 bits are computed with in at least bfloat16."""
    dtypes = {parameter.dtype for module in modules for parameter in module.parameters()} | {torch.float64}
    return max(min(torch.finfo(dtype).eps, 2**-7) if dtype.is_floating_point or dtype.is_complex else 2**-7
               for dtype in dtypes)


def is_close(new: Tensor, old: Tensor, eps: float, times: int = 8) -> Tensor | bool:
    """Whether every sample (dimension 0) is equal up to rounding, of TF32 or another batch size too: to `times` the
    precision `eps` of what computed them, or to 1e-3."""
    eps, device = max(eps, torch.finfo(old.dtype).eps), old.device.type
    if torch.is_autocast_enabled(device):
        eps = max(eps, torch.finfo(torch.get_autocast_dtype(device)).eps)
    if new.shape != old.shape:
        return False
    off, size = (x.float().flatten(1).norm(dim=1) for x in (new - old, old))
    return (off <= max(1e-3, times * eps) * size).all()               # left on the device: a GPU need not wait here


def _refuse_dropout(blocks: Sequence[nn.Module]):
    for n, block in enumerate(blocks):
        need(not any(isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0
                     for module in block.modules()),
             f"block {n} has dropout on, by which two passes differ: call model.eval()")


# -------------------------------------------------------------------------------------- hooks on unmodified blocks


class _Hook:
    """In the place of the call of block n: run(n, its own call, args, kwargs), while `on`, in the thread of the pass.

    It is kept in the attribute in which module.compile() keeps what it made. torch calls it in the place of what runs
    the module's hooks and forward, and does not copy it with the module.
    """

    def __init__(self, n: int, block: nn.Module, run: Callable, ran: list[int]):
        self.n, self.run, self.ran, self.on, self.thread = n, run, ran, True, threading.get_ident()
        self.before = vars(block).get("_compiled_call_impl")
        self.call = self.before or block._call_impl
        self.compiled = self.before.compiled if isinstance(self.before, _Hook) else self.before is not None

    def __call__(self, *args, **kwargs):
        if not self.on or threading.get_ident() != self.thread:
            return self.call(*args, **kwargs)                         # another thread runs the same model, without EMAG
        self.ran.append(self.n)
        return self.run(self.n, self.call, args, kwargs)


@contextmanager
def _hooked(blocks: Sequence[nn.Module], numbers: Sequence[int], run: Callable) -> Iterator[None]:
    """One pass of the model: inside, block n runs run(n, its own call, args, kwargs), for n in `numbers`."""
    def take_off():
        for n, hook in hooks.items():
            hook.on, own = False, vars(blocks[n])
            while isinstance(top := own.get("_compiled_call_impl"), _Hook) and not top.on:    # a newer one may stay on
                own.update(_compiled_call_impl=top.before) if top.before else own.pop("_compiled_call_impl")

    ran: list[int] = []
    hooks = {n: _Hook(n, blocks[n], run, ran) for n in numbers}
    # Where each block is compiled by itself, only candidates must run uncompiled, and `_with_attention` sees to that.
    one_by_one = all(hook.compiled for hook in hooks.values())
    try:
        with nullcontext() if one_by_one else _uncompiled():
            for n, hook in hooks.items():
                vars(blocks[n])["_compiled_call_impl"] = hook
            yield
        need(ran == list(numbers), f"in this pass the blocks {ran} ran, and {list(numbers)} must, once each, in this "
             "order: run the model once; give its own blocks, in the order they run; and compile it as a whole or "
             "block by block, not both")
    finally:
        try:
            take_off()
        finally:                                                      # once more: Ctrl-C may have struck in the first
            take_off()


_LOCK, _OPEN, _STANCE = threading.RLock(), set(), []                  # what `_uncompiled` shares between threads


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Inside, what was compiled runs uncompiled, since compiled code does not see hooks and modes that come and go.
    torch has one such switch for all threads: who opens first throws it, and who closes last throws it back."""
    if "_dynamo" not in vars(torch):                                  # nothing was compiled; to import it takes seconds
        yield
        return
    me = object()

    def close():
        with _LOCK:
            _OPEN.discard(me)
            if _STANCE and not _OPEN:
                torch._dynamo.eval_frame._set_stance(_STANCE[0])
                _STANCE.clear()

    try:
        with _LOCK:
            _OPEN.add(me)
            if not _STANCE:
                _STANCE.append(torch._dynamo.eval_frame._stance)      # what there was before
                torch.compiler.set_stance("force_eager")
        yield
    finally:
        try:
            close()
        finally:                                                      # as in `_hooked`
            close()


def _with_attention(handle: Callable, emag: EMAG, n: int, forward: Callable, args: tuple, kwargs: dict):
    """Candidate block n runs, and handle(n, call) computes the attention that EMAG averages."""
    mode = _CatchAttention(handle, emag, n, len(first_tensor(args, kwargs)))
    try:
        with _uncompiled(), mode:
            output = forward(*args, **kwargs)
        need(mode.caught, f"candidate block {n} ({type(emag.blocks[n]).__name__}) made no attention that EMAG takes: "
             f"{mode.seen}. It needs torch's scaled_dot_product_attention, or a softmax over (batch, heads, N, N), "
             "with as many queries as keys. What may be in its place: a cache (diffusers: model.disable_cache()), "
             "xformers, flash-attn or FlexAttention (diffusers: set_attention_backend('native'), elsewhere often "
             "attn_mode='torch'), attention in slices, a function that replaces torch's scaled_dot_product_attention")
        return output
    finally:
        mode.caught = True                                            # it does nothing any more
        if torch.overrides._get_current_function_mode() is mode:      # and Ctrl-C may have kept it on torch's stack
            mode.__exit__(None, None, None)


# ------------------------------------------------------------------------------------------- one call of attention

CHUNK = 2**22          # map entries made at a time on a CPU, 16 MiB in float32; elsewhere 8 times as many
FUSED = torch._C._nn.scaled_dot_product_attention          # not F's, which others replace by a function of their own
MULTIHEAD = F.multi_head_attention_forward         # a mode sees it as one call, and of this copy all that it calls:
MULTIHEAD_IN_PARTS = type(MULTIHEAD)(MULTIHEAD.__code__, vars(F) | {"has_torch_function": lambda tensors: False},
                                     MULTIHEAD.__name__, MULTIHEAD.__defaults__)
WATCHED = {FUSED, MULTIHEAD, torch.softmax, Tensor.softmax, F.softmax}


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
        entries = CHUNK if self.query.device.type == "cpu" else 8 * CHUNK
        size = max(1, entries // (batch * queries * self.key.shape[-2]))
        return [slice(start, start + size) for start in range(0, heads, size)]

    def attention_map(self, heads: slice, queries: slice, dtype: torch.dtype) -> Tensor:
        """The rows of A that belong to `queries`: softmax(q·kᵀ·scale + mask), (B, heads, queries, N).

        Made in at least float32, under torch.autocast too. A row of which every key is masked is 0, as the fused
        kernels have it.
        """
        scale, exact = self.query.shape[-1] ** -0.5 if self.scale is None else self.scale, at_least_float32(dtype)
        with torch.autocast(self.query.device.type, enabled=False):
            q, k = self.query[:, heads, queries].to(exact), self.key[:, heads].to(exact)
            logits = (q * scale) @ k.transpose(-1, -2)
            if self.attn_mask is None:
                return logits.softmax(dim=-1).to(dtype)
            mask = self.attn_mask.expand(-1, *self.query.shape[1:3], -1)[:, heads, queries]
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.to(exact)
            attn = logits.softmax(dim=-1).masked_fill(logits.amax(dim=-1, keepdim=True) == -torch.inf, 0)
            return attn.to(dtype)

    def mix(self, heads: slice, attn: Tensor) -> Tensor:
        """The output of attention with other maps, Ã·V."""
        dtype = at_least_float32(attn.dtype)
        return (attn.to(dtype) @ self.value[:, heads].to(dtype)).to(self.value.dtype)


class _HandMade(_AttentionCall):
    """Attention without the fused kernel: query is what softmax gave, A itself, (B, heads, N, N). key and value have
    no channels: only their numbers of tokens are read."""

    def attend(self) -> Tensor:
        return self.query.clone()                                     # a model may write to it

    def attention_map(self, heads: slice, queries: slice, dtype: torch.dtype) -> Tensor:
        return self.query[:, heads, queries].to(dtype)

    def mix(self, heads: slice, attn: Tensor) -> Tensor:
        return attn.to(self.query.dtype)


class _CatchAttention(TorchFunctionMode):
    """While on, handle(n, call) computes one attention of block n; all other functions stay as they are.

    Which one: `EMAG.attention`, among the calls of scaled_dot_product_attention and the softmaxes over the last of four
    dimensions. nn.MultiheadAttention is made to call the former: it then returns no weights.
    """

    def __init__(self, handle: Callable[[int, _AttentionCall], Tensor], emag: EMAG, n: int, batch: int):
        super().__init__()
        self.handle, self.emag, self.n, self.batch = handle, emag, n, batch
        self.calls, self.caught, self.seen = 0, False, "it called neither of the two functions below"

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.caught or func not in WATCHED:
            return func(*args, **kwargs)
        if func is MULTIHEAD:
            with self:
                return MULTIHEAD_IN_PARTS(*args, **kwargs | {"need_weights": False})
        if func is FUSED:
            call = _AttentionCall(*args, **kwargs)
        else:
            maps = func(*args, **kwargs)
            if kwargs.get("dim", args[1] if len(args) > 1 else None) not in (-1, maps.ndim - 1) or maps.ndim != 4:
                self.seen = f"a softmax over {tuple(maps.shape)}"
                return maps
            call = _HandMade(maps, maps.mT[..., :0], maps[..., :0])
        queries, keys, wanted, number = call.query.shape[-2], call.key.shape[-2], self.emag.attention, self.calls
        self.calls += 1
        if (queries != keys) if wanted is None else (number != wanted):
            self.seen = (f"its call {number} attends with {queries} queries to {keys} keys: attention={number} takes "
                         "it, and is right where these keys hold the image")
            return call.attend()
        self.caught = True
        self.check(call)
        return self.handle(self.n, call)

    def check(self, call: _AttentionCall):
        """Raises RuntimeError where EMAG cannot average this call."""
        shape, keys, image, variant = call.query.shape, call.key.shape[-2], self.emag.image_tokens, self.emag.variant
        for good, wrong in (                                          # formatted below, where one is needed
                (not call.is_causal, "attends causally: EMAG is for maps in which every token sees every other"),
                (call.dropout_p == 0, "attends with dropout, by which two passes differ: call model.eval()"),
                (len(shape) == 4, "has queries of shape {shape}: need (batch, heads, tokens, channels)"),
                (shape[0] == self.batch, "gets {batch} samples and attends for {shape[0]}: EMAG needs inputs that are "
                                         "batch-first, and one attention call for the whole batch"),
                (range(shape[-2])[image] and max(abs(image.start or 0), abs(image.stop or 0)) <= shape[-2],
                 "attends for {shape[2]} tokens, and image_tokens is {image}: need the slice of them with the image"),
                (variant != "image" or shape[-2] == keys,
                 "has {shape[2]} queries and {keys} keys: variant 'image' needs as many; use 'map'"),
                (variant != "query" or type(call) is _AttentionCall,
                 "makes its map by hand: variant 'query' has no queries; use 'map'")):
            if not good:
                wrong = wrong.format(shape=tuple(shape), batch=self.batch, image=image, keys=keys)
                raise RuntimeError(f"candidate block {self.n} ({type(self.emag.blocks[self.n]).__name__}) {wrong}")
