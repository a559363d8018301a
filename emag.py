"""EMAG, Exponential Moving Average Guidance (Yadav, Huy, Liu; arXiv 2512.17303, ECCV 2026), in one file.

A third prediction guides the sampler: a negative ε' in which one transformer block attends by habit, with the moving
average of its own attention maps over the trajectory. First the equations, then the class that hooks them into an
unmodified model, then a drop-in for pipelines that do classifier-free guidance (CFG) already.

Symbols: A attention map, E its moving average, Δ deviation, ε prediction (noise or velocity), ε' negative prediction,
β decay, λ blend strength, w_e EMAG scale, w CFG scale. B samples, L candidate blocks, N tokens, d channels of a head.
"""
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# --------------------------------------------------------------------------------------------------- the equations


def ema_update(ema: Tensor | None, attn: Tensor, beta: float) -> Tensor:
    """Attention EMA (ECCV §3.4), in place on `ema`; None starts it with a copy of `attn`.

    E_t = β·E_{t−1} + (1−β)·A_t
    """
    return attn.clone() if ema is None else ema.mul_(beta).add_(attn, alpha=1 - beta)


def deviation(ema: Tensor, attn: Tensor) -> Tensor:
    """Attention gradient (ECCV eq. 11–13), per sample: (B, …) → (B,).

    Δ_t = mean over heads, queries, keys of |E_t − A_t|
    """
    return (ema - attn).abs().flatten(1).mean(dim=1)


def zscore(dev: Tensor) -> Tensor:
    """Each sample's deviations, standardised over the candidate blocks: (B, L) → (B, L).

    z⁽ⁿ⁾ = (Δ⁽ⁿ⁾ − mean Δ) / (std Δ + ε), population std
    """
    dev = dev - dev[:, :1]                        # changes no z, and makes equal Δ exactly 0, so z = 0 at any ε > 0
    std, mean = torch.std_mean(dev, dim=1, correction=0, keepdim=True)
    return (dev - mean) / (std + torch.finfo(dev.dtype).tiny)


def select_layers(dev: Tensor, threshold: float | None = None) -> Tensor:
    """Layer selection (ECCV eq. 11–13), per sample: deviations (B, L) → bool (B, L), at least one True in each row.

    ℓ* = argmax Δ⁽ⁿ⁾ = argmax z⁽ⁿ⁾, the first of equals; with a threshold τ also every block of z⁽ⁿ⁾ ≥ τ
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
    """With CFG (v1 eq. 16, ECCV eq. 15), pred being ε̃': ε̃ = ε_∅ + w·(ε̃' − ε_∅)"""
    return pred_null + scale * (pred - pred_null)


@dataclasses.dataclass(frozen=True)
class Window:
    """Which steps observe and which perturb, as shares of the trajectory still to come: 1 is noise, 0 is data.

    Step i of n, from 0, has r = n−1−i steps left, and a bound f stands for round(f·(n−1)) of them, inclusive.
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


# --------------------------------------------------------------------------------------------- the attention call

CHUNK = 2**22          # map entries made at a time, 16 MiB: beside E, a few times this is all that is held


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
        return F.scaled_dot_product_attention(self.query, self.key, self.value, self.attn_mask, self.dropout_p,
                                              self.is_causal, scale=self.scale, enable_gqa=self.enable_gqa)

    def take(self, rows) -> "_AttentionCall":
        """The same call for some samples of the batch; key and value get as many heads as the query."""
        mask, group = self.attn_mask, self.query.shape[1] // self.key.shape[1]
        if mask is not None:
            mask = mask.expand(*self.query.shape[:-1], self.key.shape[-2])[rows]
        key, value = (x[rows].repeat_interleave(group, dim=1) if group > 1 else x[rows] for x in (self.key, self.value))
        return dataclasses.replace(self, query=self.query[rows], key=key, value=value, attn_mask=mask, enable_gqa=False)

    def map(self, heads: slice, queries: slice, dtype: torch.dtype) -> Tensor:
        """The rows of A that belong to `queries`: softmax(q·kᵀ·scale + mask), (B, heads, queries, N)."""
        scale = self.query.shape[-1] ** -0.5 if self.scale is None else self.scale
        with _no_autocast(self.query):
            q, k = self.query[:, heads, queries].to(dtype), self.key[:, heads].to(dtype)
            logits = (q * scale) @ k.transpose(-1, -2)
            if self.attn_mask is not None:
                mask = self.attn_mask[:, heads, queries]
                logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
            return logits.softmax(dim=-1)


class _CatchSelfAttention(TorchFunctionMode):
    """While on, hands the first self-attention call to `handle` and lets every other torch function be."""

    def __init__(self, handle: Callable[[_AttentionCall], Tensor]):
        super().__init__()
        self.handle, self.caught = handle, False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention and not self.caught:
            call = _AttentionCall(*args, **(kwargs or {}))
            if call.query.shape[-2] == call.key.shape[-2]:        # else it is cross-attention
                self.caught = True
                return self.handle(call)
        return func(*args, **(kwargs or {}))


def _no_autocast(like: Tensor):
    """Maps are made in their own precision also where the model runs under torch.autocast."""
    return torch.autocast(like.device.type, enabled=False)


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Inside, `module` runs forward(its own forward, *args, **kwargs); afterwards it is exactly as before."""
    original, had = module.forward, "forward" in vars(module)
    module.forward = wraps(original)(partial(forward, original))
    try:
        yield
    finally:
        if had:
            module.forward = original
        else:
            del module.forward


def _tensors(tree) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list, dict)):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(item)


def _map_tensors(function: Callable[[Tensor], Tensor], tree):
    """`tree` with every tensor in its nested tuples, lists and dicts replaced by function(tensor)."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return type(tree)((key, _map_tensors(function, item)) for key, item in tree.items())
    if isinstance(tree, (tuple, list)):
        items = [_map_tensors(function, item) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree


# --------------------------------------------------------------------------------------------------------- the class


@dataclasses.dataclass(frozen=True)
class Observation:
    """What one observed step found, on the CPU: each (B, L), a column a candidate block, in the order they run.

    attention (B, L, 2, N): a query token's rows of A_t and E_t, means over heads, where EMAG was given a query_token.
    """
    deviation: Tensor
    zscore: Tensor
    selected: Tensor
    attention: Tensor | None = None


class EMAG:
    """Watches the self-attention of candidate blocks along a trajectory and makes the negative from it.

        emag = EMAG(model.blocks, layers=range(12, 16))
        emag.reset()                                                # before every trajectory
        with emag.observe(rows):  pred = model(x, t, y)             # rows: the conditional samples of the batch
        with emag.perturb():      negative = model(x[rows], t[rows], y[rows])
        pred = emag_update(pred[rows], negative, scale)

    blocks: the model's transformer blocks in the order they run.  layers: the candidates, as indices into it.
    beta, strength: β and λ, in [0, 1].  threshold: None selects the argmax, τ every block of z ≥ τ.
    variant: "map" (EMAG) replaces whole attention rows of the image queries, "image" (EMAG-I) only their image columns,
    "query" (EMAG-Q) the image queries themselves, and makes no map.
    image_tokens: the slice of the token sequence that holds image tokens, None where all do.
    reuse: blocks before the first selected one give again what they gave in the clean pass.
    ema_dtype: of the maps and their average.
    query_token: an image token, counted from 0, whose attention the trace is to hold, to be looked at.

    Raises ValueError where an argument is out of range, RuntimeError where the model or the order of calls cannot work.
    """

    def __init__(self, blocks: Sequence[nn.Module], layers: Iterable[int], *, beta: float = 0.988,
                 strength: float = 1.0, variant: str = "map", threshold: float | None = None,
                 image_tokens: slice | None = None, reuse: bool = True, ema_dtype: torch.dtype = torch.float32,
                 query_token: int | None = None):
        self.blocks, self.layers = list(blocks), sorted(set(layers))
        if not self.layers or self.layers[0] < 0 or self.layers[-1] >= len(self.blocks):
            raise ValueError(f"layers {self.layers}: need at least one of 0…{len(self.blocks) - 1}")
        for name, value in (("beta", beta), ("strength", strength)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}: need 0 ≤ {name} ≤ 1")
        if variant not in ("map", "image", "query"):
            raise ValueError(f"variant is {variant!r}: need 'map', 'image' or 'query'")
        if ema_dtype == torch.bfloat16:
            raise ValueError("ema_dtype bfloat16 has 8 bits, too few to hold a step of 1−β: need float32 or float16")
        self.beta, self.strength, self.variant, self.threshold = beta, strength, variant, threshold
        self.image_tokens = slice(None) if image_tokens is None else image_tokens
        self.reuse, self.ema_dtype, self.query_token = reuse, ema_dtype, query_token
        self.reset()

    def reset(self):
        """Forgets everything: a new trajectory starts."""
        self.trace: list[Observation] = []
        self._ema: dict[int, list[Tensor]] = {}           # candidate → E, in chunks of heads
        self._forget_step()

    def _forget_step(self):
        self._ran: set[int] = set()                       # candidates reached by the pass that is on, or the last one
        self._batch: int | None = None                    # samples observed
        self._deviation: dict[int, Tensor] = {}           # candidate → Δ (B,)
        self._attention: dict[int, Tensor] = {}           # candidate → the query token's rows of A and E (B, 2, N)
        self._clean: dict[int, _AttentionCall] = {}       # candidate → the call behind A_t, where Ã needs A_t
        self._outputs: dict[int, object] = {}             # block → what it gave for the observed rows

    @property
    def deviation(self) -> Tensor:
        """Δ (B, L) of the last observed step."""
        return self._last().deviation

    @property
    def zscore(self) -> Tensor:
        """z (B, L) of the last observed step."""
        return self._last().zscore

    @property
    def selected(self) -> Tensor:
        """The selected blocks, bool (B, L), of the last observed step."""
        return self._last().selected

    def _last(self) -> Observation:
        if not self.trace:
            raise RuntimeError("nothing was observed yet: run the model inside `with emag.observe():` first")
        return self.trace[-1]

    # --- the clean pass

    @contextmanager
    def observe(self, rows=slice(None), update: bool = True) -> Iterator["EMAG"]:
        """Around the clean pass, which it leaves as it is bit for bit.

        rows: an index into the batch, the conditional samples.  update=False: a second evaluation within one step
        (Heun's corrector), which advances neither E nor Δ.
        """
        self._forget_step()
        try:
            with ExitStack() as stack:
                for index, block in enumerate(self.blocks[:self.layers[-1] + 1]):
                    stack.enter_context(_replaced_forward(block, partial(self._observe_block, index, rows, update)))
                yield self
            missing = [index for index in self.layers if index not in self._ran]
            if missing:
                raise RuntimeError(f"candidate block {missing[0]} did not run inside observe(): "
                                   "run the model there once, and give its own blocks as `blocks`")
        except BaseException:
            self._forget_step()                           # so that no negative is made from half a pass
            raise
        if update:
            dev = torch.stack([self._deviation[index] for index in self.layers], dim=1).double().cpu()
            rows = [self._attention[index] for index in self.layers if self.query_token is not None]
            self.trace.append(Observation(dev, zscore(dev), select_layers(dev, self.threshold),
                                          torch.stack(rows, dim=1).cpu() if rows else None))

    def _observe_block(self, index: int, rows, update: bool, forward: Callable, *args, **kwargs):
        if index in self.layers:
            out = self._catch(index, partial(self._observe_attention, index, rows, update), forward, args, kwargs)
        else:
            out = forward(*args, **kwargs)
        if self.reuse and index < self.layers[-1]:
            batch = len(next(_tensors((args, kwargs))))
            # Copies, since a model may add to its hidden states in place between blocks.
            self._outputs[index] = _map_tensors(lambda x: x[rows].clone() if x.ndim and len(x) == batch else x, out)
        return out

    def _observe_attention(self, index: int, rows, update: bool, call: _AttentionCall) -> Tensor:
        if index in self._ran:
            raise RuntimeError(f"candidate block {index} ran twice inside one observe(): observe one pass at a time")
        if call.is_causal:
            raise RuntimeError(f"candidate block {index} attends causally: EMAG averages maps in which every token "
                               "sees every other, as diffusion transformers have them")
        if call.query.ndim != 4:
            raise RuntimeError(f"candidate block {index} attends with queries of shape {tuple(call.query.shape)}: "
                               "need (batch, heads, tokens, channels)")
        clean = call.take(rows)
        self._ran.add(index)
        self._batch = len(clean.query)
        if self.strength < 1 or self.variant == "image":
            self._clean[index] = clean
        if update:
            with torch.no_grad():
                self._deviation[index] = self._advance(index, clean)
                if self.query_token is not None:
                    self._attention[index] = self._attention_rows(index, clean)
        return call.attend()

    def _advance(self, index: int, clean: _AttentionCall) -> Tensor:
        """One EMA step of a candidate block, a few heads at a time; returns Δ (B,).

        `ema_update` and `deviation` in one go, since they share the difference d = A_t − E_{t−1}:
        E_t = E_{t−1} + (1−β)·d and |E_t − A_t| = β·|d|.
        """
        chunks = self._ema.get(index)
        if chunks is None:
            self._ema[index] = [self._observed(clean, heads) for heads in self._head_chunks(clean)]         # E = A
            return torch.zeros(len(clean.query), device=clean.query.device)
        total = 0
        for heads, ema in zip(self._head_chunks(clean), chunks):
            attn = self._observed(clean, heads)
            if attn.shape != ema.shape:
                raise RuntimeError(f"E is {tuple(ema.shape)}, this pass gives {tuple(attn.shape)}: "
                                   "call reset() before a new trajectory")
            d = attn.sub_(ema)
            ema.add_(d, alpha=1 - self.beta)
            total = total + self.beta * torch.linalg.vector_norm(d.flatten(1), ord=1, dim=1)
        return total / sum(ema[0].numel() for ema in chunks)

    def _observed(self, call: _AttentionCall, heads: slice) -> Tensor:
        """What E averages, for some heads: image queries' rows of A, their image columns, or the queries themselves."""
        if self.variant == "query":
            return call.query[:, heads, self.image_tokens].to(self.ema_dtype, copy=True)
        attn = call.map(heads, self.image_tokens, self.ema_dtype)
        # A copy, so that E does not keep the text columns alive.
        return attn[..., self.image_tokens].clone() if self.variant == "image" else attn

    def _attention_rows(self, index: int, clean: _AttentionCall) -> Tensor:
        """The query token's rows of A_t and of E_t (EMAG-Q: of the map that E^q makes), means over heads: (B, 2, N)."""
        tokens = range(clean.query.shape[2])[self.image_tokens]
        if not 0 <= self.query_token < len(tokens):
            raise RuntimeError(f"query_token is {self.query_token}: need one of the {len(tokens)} image tokens, from 0")
        row = slice(tokens[self.query_token], tokens[self.query_token] + 1)
        ema = torch.cat([chunk[:, :, self.query_token, None] for chunk in self._ema[index]], dim=1)
        attn = clean.map(slice(None), row, self.ema_dtype)
        if self.variant == "image":
            attn = attn[..., self.image_tokens]
        elif self.variant == "query":
            query = clean.query.clone()
            query[:, :, row] = ema.to(query.dtype)
            ema = dataclasses.replace(clean, query=query).map(slice(None), row, self.ema_dtype)
        return torch.cat([attn, ema], dim=2).mean(dim=1)

    @staticmethod
    def _head_chunks(call: _AttentionCall) -> Iterator[slice]:
        """Slices of heads whose maps have at most CHUNK entries together, or one head each."""
        batch, heads, queries, _ = call.query.shape
        size = max(1, CHUNK // (batch * queries * call.key.shape[-2]))
        return (slice(start, start + size) for start in range(0, heads, size))

    # --- the negative pass

    @contextmanager
    def perturb(self) -> Iterator["EMAG"]:
        """Around the negative pass, on the rows observed in this step: the selected blocks attend with Ã."""
        selected = self.selected
        if self._batch is None:
            raise RuntimeError("perturb() needs a clean pass of this step: run it inside `with emag.observe():` first")
        chosen = {index: samples for index, samples in zip(self.layers, selected.T) if samples.any()}
        with ExitStack() as stack:
            for index, block in enumerate(self.blocks[:self.layers[-1] + 1]):
                if self.reuse and index < min(chosen):
                    stack.enter_context(_replaced_forward(block, partial(self._repeat_block, index)))
                elif index in chosen:
                    stack.enter_context(_replaced_forward(block, partial(self._perturb_block, index, chosen[index])))
            self._ran.clear()
            yield self
        if self._ran != chosen.keys():
            raise RuntimeError(f"block {min(chosen.keys() - self._ran)} was selected and did not run inside perturb(): "
                               "run the model there once")

    def _repeat_block(self, index: int, forward: Callable, *args, **kwargs):
        self._check_batch(len(next(_tensors((args, kwargs)))))
        return _map_tensors(torch.clone, self._outputs[index])

    def _perturb_block(self, index: int, samples: Tensor, forward: Callable, *args, **kwargs):
        return self._catch(index, partial(self._perturb_attention, index, samples), forward, args, kwargs)

    def _perturb_attention(self, index: int, samples: Tensor, call: _AttentionCall) -> Tensor:
        """The attention of block `index` with Ã for the image queries of the chosen samples (bool (B,))."""
        self._check_batch(len(call.query))
        self._ran.add(index)
        rows = slice(None) if samples.all() else samples.nonzero()[:, 0].to(call.query.device)
        if self.variant == "query":
            query = call.query.clone()
            for heads, blended in self._blended(index, rows, call):
                query[rows, heads, self.image_tokens] = blended.to(query.dtype)
            return dataclasses.replace(call, query=query).attend()
        value, dtype = call.take(rows).value, call.value.dtype
        with _no_autocast(value):
            out = torch.cat([(blended @ value[:, heads].to(blended.dtype)).to(dtype)
                             for heads, blended in self._blended(index, rows, call)], dim=1)
        if out.shape[0] == self._batch and out.shape[2] == call.query.shape[2]:
            return out                                    # no query is left for the fused kernel
        whole = call.attend()
        whole[rows, :, self.image_tokens] = out
        return whole

    def _blended(self, index: int, rows, call: _AttentionCall) -> Iterator[tuple[slice, Tensor]]:
        """Ã (or q̃) for some samples, a few heads at a time. With λ = 1 it is E itself, and no map is made."""
        clean = self._clean[index].take(rows) if index in self._clean else None
        for heads, ema in zip(self._head_chunks(call), self._ema[index]):
            ema = ema[rows]
            if self.variant == "image":
                # Only image → image is replaced; then each row is brought back to sum to one.
                attn = clean.map(heads, self.image_tokens, self.ema_dtype)
                attn[..., self.image_tokens] = blend(attn[..., self.image_tokens], ema, self.strength)
                yield heads, attn / attn.sum(dim=-1, keepdim=True)
            elif self.strength < 1:
                yield heads, blend(self._observed(clean, heads), ema, self.strength)
            else:
                yield heads, ema

    # --- both

    def _catch(self, index: int, handle: Callable, forward: Callable, args, kwargs):
        """Runs a candidate block with its self-attention handed to `handle`."""
        with _CatchSelfAttention(handle) as mode:
            out = forward(*args, **kwargs)
        if not mode.caught:
            raise RuntimeError(f"candidate block {index} ({type(self.blocks[index]).__name__}) made no self-attention "
                               "call to torch's scaled_dot_product_attention: the model may use another kernel")
        return out

    def _check_batch(self, batch: int):
        if batch != self._batch:
            raise RuntimeError(f"the negative pass got {batch} samples, {self._batch} were observed: "
                               "call the model on the observed rows alone")


# ------------------------------------------------------------------------------------------- for pipelines with CFG


@contextmanager
def guide(model: nn.Module, blocks: Sequence[nn.Module], layers: Iterable[int], *, scale: float = 1.5, steps: int = 28,
          cond: str = "last", channels: slice | None = None, window: Window = Window(),
          **emag_options) -> Iterator[EMAG]:
    """EMAG inside a pipeline that doubles the batch for CFG; the pipeline and the model stay as they are.

        with guide(pipe.transformer, pipe.transformer.transformer_blocks, range(6, 9), scale=1.5, steps=28):
            image = pipe(prompt, num_inference_steps=28, guidance_scale=7.0)

    Each call of `model` is one step: its prediction for the conditional half comes back as ε̃', so that the pipeline's
    own CFG formula completes the method.

    scale: w_e; 1 is off.  steps: calls in a trajectory; after as many a new one starts.
    cond: the half of the batch that is conditional, "first" or "last", or "all" of a batch that is not doubled.
    channels: the output channels that are the prediction, where others are a variance.  emag_options: as for EMAG.

    Raises ValueError where an argument is out of range, RuntimeError where the calls do not fill whole trajectories.
    """
    if cond not in ("first", "last", "all"):
        raise ValueError(f"cond is {cond!r}: need 'first', 'last' or 'all'")
    if steps < 1:
        raise ValueError(f"steps is {steps}: need at least 1")
    emag, calls = EMAG(blocks, layers, **emag_options), 0

    def forward(original: Callable, *args, **kwargs):
        nonlocal calls
        step = calls % steps
        calls += 1
        if step == 0:
            emag.reset()
        if not window.observes(step, steps):
            return original(*args, **kwargs)
        batch = len(next(_tensors((args, kwargs))))
        if cond != "all" and batch % 2:
            raise RuntimeError(f"a batch of {batch} samples has no conditional half: is the pipeline's CFG on?")
        rows = {"first": slice(batch // 2), "last": slice(batch // 2, None), "all": slice(None)}[cond]
        with emag.observe(rows):
            out = original(*args, **kwargs)
        if not window.perturbs(step, steps):
            return out
        args, kwargs = _map_tensors(lambda x: x[rows] if x.ndim and len(x) == batch else x, (args, kwargs))
        with emag.perturb():
            negative = _prediction(original(*args, **kwargs))
        guided, part = _prediction(out).clone(), (rows, slice(None) if channels is None else channels)
        guided[part] = emag_update(guided[part], negative[:, part[1]], scale)
        return _with_prediction(out, guided)

    with ExitStack() as stack:
        if scale != 1:
            stack.enter_context(_replaced_forward(model, forward))
        yield emag
    if scale != 1 and (calls == 0 or calls % steps):
        raise RuntimeError(f"the model was called {calls} times inside guide(), which is no multiple of steps={steps}: "
                           "give the number of calls that the pipeline makes for one batch of images")


def _prediction(out) -> Tensor:
    """What a model returned, less its wrapping: a tensor, a tuple, or an output class whose first field it is."""
    return out if isinstance(out, Tensor) else out[0]


def _with_prediction(out, pred: Tensor):
    """`out` in its own wrapping, with another prediction."""
    if isinstance(out, Tensor):
        return pred
    if dataclasses.is_dataclass(out):
        return dataclasses.replace(out, **{dataclasses.fields(out)[0].name: pred})
    return type(out)((pred, *out[1:]))
