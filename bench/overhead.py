"""What EMAG costs: the time of whole trajectories relative to CFG's, beside the arithmetic floor.

    python bench/overhead.py                             # 28 blocks, 384 wide, 256 tokens, on the CPU
    python bench/overhead.py --model SD3-small           # 24 joint blocks; needs `pip install diffusers`
    python bench/overhead.py --model DiT-XL/2 --dtype bf16
    python bench/overhead.py --quick                     # a GPU in six minutes: DiT-XL/2 and SD3, batch 1 and 8
    python bench/overhead.py --host                      # Python's own time, which a GPU at batch 1 waits for
    python bench/overhead.py --count                     # bytes and operations of a step of SD3 at 1024², from the code

Weights are random: they decide which block is selected and nothing else about the cost. bench/README.md says what the
columns mean.

By default the trajectories of one table run side by side, a step of each in turn, so that a machine that slows down
slows all of them; a ratio is that of the summed seconds, and the median over the rounds. With --quick each runs alone,
since eight samples of E at 1024² leave no room for a second one: then the peak of memory is its own too.

"authors' flow" is the structure of the paper's own code, at every step: a pass that makes the attention maps in the
candidate blocks for both halves of the batch, then a whole second pass, for both halves, that makes them again and
attends with the average in one block.
"""
import argparse
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from unittest import mock

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dit import DIT_SIZES, DiT  # noqa: E402
from emag import EMAG, Window, cfg_update, emag_update  # noqa: E402
from sampler import APG, CADS, flow_times, guided, need, one_line_errors  # noqa: E402

BETA, SCALE, CFG = 0.988, 1.5, 7.0
DIT_WINDOW, SD3_WINDOW = Window(0.6, 0.4, 0.2), Window(1.0, 0.8, 0.2)
QUICK_SECONDS = 330                   # after these --quick starts no further row

# ---------------------------------------------------------------------------------------------------------- the models


def build_dit(name: str) -> DiT:
    """A DiT of 256 tokens with random weights: one of the paper's, "small", 384 wide with 28 blocks, or "tiny", on
    which only Python's time counts."""
    width, depth, heads, side = {"small": (384, 28, 6, 32), "tiny": (16, 28, 2, 8)}.get(name) or (
        *DIT_SIZES[name.split("-")[1].split("/")[0]], 32)
    model = DiT(input_size=side, patch_size=2, hidden_size=width, depth=depth, num_heads=heads, learn_sigma=False)
    for parameter in model.parameters():
        if parameter.is_meta or not parameter.any():       # adaLN-Zero: every block is the identity, all maps are alike
            parameter.data.normal_(0, 0.02)
    return model


def build_sd3(name: str) -> nn.Module:
    """SD3-Medium's transformer with random weights, or as many blocks, 384 or 16 wide: "SD3-small", "SD3-tiny"."""
    from diffusers import SD3Transformer2DModel
    return SD3Transformer2DModel(num_layers=24, **{
        "SD3": dict(sample_size=128, num_attention_heads=24, attention_head_dim=64, caption_projection_dim=1536,
                    pos_embed_max_size=192),
        "SD3-small": dict(sample_size=32, num_attention_heads=6, attention_head_dim=64, caption_projection_dim=384),
        "SD3-tiny": dict(sample_size=8, num_attention_heads=2, attention_head_dim=8, caption_projection_dim=16,
                         joint_attention_dim=16, pooled_projection_dim=16)}[name])


def sd3_network(model: nn.Module, device, dtype):
    """SD3 as a function of (x, t, y), with random prompt embeddings: a row for each label of y."""
    tokens = 77 + 256 if model.config.joint_attention_dim == 4096 else 8
    text, pooled = (torch.randn(2, *shape, device=device, dtype=dtype) for shape in (
        (tokens, model.config.joint_attention_dim), (model.config.pooled_projection_dim,)))

    def predict(x, t, y):
        times = torch.full((len(x),), 1000 * t, device=device)
        return model(x.to(dtype), encoder_hidden_states=text[y], pooled_projections=pooled[y], timestep=times,
                     return_dict=False)[0].to(x.dtype)

    return predict


def dit_network(model: DiT, dtype):
    """DiT as a function of (x, t, y). Not `sampler.network`, which looks at each output and so waits for the GPU."""
    return lambda x, t, y: model(x.to(dtype), torch.full((len(x),), 1000 * t, device=x.device), y).to(x.dtype)


class Case:
    """One model and what its trajectories start from: noise x (batch, C, side, side) and the conditions y, null."""

    def __init__(self, name: str, device: str, dtype: torch.dtype):
        self.name, self.device, self.joint = name, device, name.startswith("SD3")
        with torch.device(device):                                        # no copy of the weights on the CPU
            model = (build_sd3 if self.joint else build_dit)(name).eval().requires_grad_(False)
            nn.Module.to(model, dtype)                                    # diffusers' own prints a warning
            self.net = sd3_network(model, device, dtype) if self.joint else dit_network(model, dtype)
        self.model, self.blocks = model, model.transformer_blocks if self.joint else model.blocks
        self.full_side = model.config.sample_size if self.joint else model.config["input_size"]

    def start(self, batch: int, side: int | None = None):
        """Noise and conditions of a batch. SD3 takes other sides than its own."""
        self.side = side or self.full_side
        y, null = (torch.full((batch,), label, device=self.device)
                   for label in ((1, 0) if self.joint else (1, self.model.null_class)))
        # of DiT they are embeddings, which CADS needs
        self.y, self.null = (y, null) if self.joint else (self.model.y_embedder(y), self.model.y_embedder(null))
        channels = self.model.config.in_channels if self.joint else self.model.config["in_channels"]
        self.x = torch.randn(batch, channels, self.side, self.side).to(self.device, torch.float64)
        return self

    def layers(self, window: Window) -> range:
        """The paper's candidates at this depth: 12–15 of 28 with DiT's settings; 6–8 of 24 with SD3's, 7–9 of 28."""
        depth = len(self.blocks)
        return range(depth * 12 // 28, depth * 16 // 28) if window is DIT_WINDOW else range(depth // 4, depth // 3 + 1)

    def emag(self, window: Window, **options) -> EMAG:
        tokens = slice(0, (self.side // 2) ** 2) if self.joint else None
        return EMAG(self.blocks, self.layers(window), beta=BETA, image_tokens=tokens, **options)

    def predict(self, steps: int, window: Window, emag: EMAG | None, **options) -> Callable:
        """The guided prediction, for one trajectory."""
        return guided(self.net, self.y, self.null, steps=steps, emag=emag, emag_scale=SCALE, window=window,
                      **(dict(cfg=CFG) | options))


@contextmanager
def compiled(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, each block is compiled for itself, as diffusers' documentation recommends."""
    for block in blocks:
        block.compile()
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None


class AuthorsFlow:
    """Predictions with the passes and maps of the authors' code, for DiT; it changes the model's blocks for good."""

    def __init__(self, case: Case, layers):
        self.net, self.labels, self.layers = case.net, torch.cat([case.y, case.null]), layers
        self.ema, self.dev = {}, {}
        for index in layers:
            attention = case.blocks[index].attn
            attention.forward = lambda x, index=index, attention=attention: self.attend(index, attention, x)
        self.negative_in = None

    def attend(self, index: int, attention: nn.Module, x: Tensor) -> Tensor:
        q, k, v = rearrange(attention.qkv(x), "b n (three h d) -> three b h n d", three=3, h=attention.heads)
        attn = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
        if self.negative_in is None:
            old = self.ema.get(index, attn)
            self.ema[index] = BETA * old + (1 - BETA) * attn
            self.dev[index] = (self.ema[index] - attn).abs().mean()
        elif self.negative_in == index:
            attn = self.ema[index]
        return attention.proj(rearrange(attn @ v, "b h n d -> b n (h d)"))

    def __call__(self, x: Tensor, t: float, step: int, update: bool = True) -> Tensor:
        both = torch.cat([x, x])
        self.negative_in = None
        pred, pred_null = self.net(both, t, self.labels).chunk(2)
        self.negative_in = max(self.layers, key=lambda index: self.dev[index].item())
        negative, _ = self.net(both, t, self.labels).chunk(2)
        return cfg_update(emag_update(pred, negative, SCALE), pred_null, CFG)


# ---------------------------------------------------------------------------------------------------------------- time


def floor(emag: EMAG, window: Window, steps: int, passes: int = 2) -> float:
    """passes/2 + Σ over perturbed steps of (L − ℓ*) / (2·L·steps): L blocks, and CFG is two passes per step."""
    observed = [step for step in range(steps) if window.observes(step, steps)]
    starts = [emag.layers[int(entry.selected.any(0).nonzero()[0])] for step, entry in zip(observed, emag.trace)
              if window.perturbs(step, steps)]
    return passes / 2 + sum(len(emag.blocks) - start for start in starts) / (2 * len(emag.blocks) * steps)


@torch.inference_mode()
def side_by_side(predicts: dict, x: Tensor, times: Sequence[float], clock=time.perf_counter) -> dict[str, float]:
    """Seconds that each guidance takes for an Euler trajectory over `times`, all of them advanced a step in turn."""
    states, seconds = dict.fromkeys(predicts, x), dict.fromkeys(predicts, 0.0)
    for step, (t, t_next) in enumerate(pairwise(times)):
        for label, predict in predicts.items():
            started = clock()
            states[label] = states[label] + (t_next - t) * predict(states[label], t, step)
            if x.is_cuda:
                torch.cuda.synchronize()
            seconds[label] += clock() - started
    return seconds


@torch.inference_mode()
def alone(start: Callable[[], Callable], x: Tensor, times: Sequence[float]) -> tuple[float, float]:
    """(seconds, peak GiB) of one trajectory, after a whole one that no clock sees: the median of three, or of one where
    that takes more than two seconds. The GPU is waited for at its end alone. Memory is that of CUDA, else NaN."""
    def trajectory() -> float:
        predict, state, started = start(), x, time.perf_counter()
        for step, (t, t_next) in enumerate(pairwise(times)):
            state = state + (t_next - t) * predict(state, t, step)
        if x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    trajectory()
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = [trajectory()]
    seconds += [trajectory() for _ in range(2 if seconds[0] < 2 else 0)]
    return statistics.median(seconds), torch.cuda.max_memory_allocated() / 2**30 if x.is_cuda else math.nan


def guidances(joint: bool) -> dict[str, tuple[dict | None, dict]]:
    """label → (options of EMAG, None without it; options of `guided`, made by a call where they hold state)."""
    found = {"no guidance": (None, dict(cfg=1.0)), "CFG": (None, {}), "EMAG": ({}, {}),
             "EMAG without reuse": (dict(reuse=False), {}), "EMAG-Q": (dict(variant="query"), {})}
    if joint:
        return found | {"EMAG-I": (dict(variant="image"), {})}
    apg = dict(combine=partial(APG, "velocity", CFG, 0.0, 5.0, -0.5))
    cads = dict(condition=partial(CADS, torch.randn_like, 0.6, 0.9, 0.005, 1.0))
    return found | {"EMAG without CFG": ({}, dict(cfg=1.0)), "APG": (None, apg), "CADS": (None, cads),
                    "EMAG + APG": ({}, apg), "EMAG + CADS": ({}, cads)}


def table(args: argparse.Namespace, device: str, dtype: torch.dtype):
    """Side by side, a step of each in turn."""
    name = args.model or "small"
    case = Case(name, device, dtype).start(args.batch)
    groups = [("SD3", args.steps[1], SD3_WINDOW)] if case.joint else [
        ("DiT", args.steps[0], DIT_WINDOW), ("SD3", args.steps[1], SD3_WINDOW)]
    authors = None if case.joint else Case(name, device, dtype).start(args.batch)
    fast = Case(name, device, dtype).start(args.batch) if args.compile else None
    print(f"{name}: {len(case.blocks)} blocks, {args.dtype}, batch {args.batch}, {args.rounds} rounds, "
          f"{machine(device)}\n\n| settings | guidance | time / CFG | lowest…highest | floor | seconds |\n"
          "| --- | --- | --- | --- | --- | --- |")
    for group, steps, window in groups:
        rows = {label: (case, *options) for label, options in guidances(case.joint).items()}
        if fast:
            rows |= {"CFG, blocks compiled": (fast, None, {}), "EMAG, blocks compiled": (fast, {}, {})}
        emags = {label: where.emag(window, **options) for label, (where, options, _) in rows.items()
                 if options is not None}

        def run(steps: int) -> dict[str, float]:
            predicts = {}
            for label, (where, _, options) in rows.items():
                made = {key: option() if callable(option) else option for key, option in options.items()}
                predicts[label] = where.predict(steps, window, emags.get(label), **made)
            if authors:
                predicts["authors' flow"] = AuthorsFlow(authors, case.layers(window))
            return side_by_side(predicts, case.x, flow_times(steps))

        with compiled(fast.blocks) if fast else nullcontext():
            run(min(steps, 6))                            # warms up: a short trajectory with all its kinds of steps
            measured = [run(steps) for _ in range(args.rounds)]
        layers = case.layers(window)
        settings = (f"{group}: {steps} steps, blocks {layers[0]}–{layers[-1]}, "
                    f"window {window.start:g}/{window.apply:g}/{window.stop:g}")
        for label in measured[0]:
            ratios = [seconds[label] / seconds["CFG"] for seconds in measured]
            reuses = label in emags and emags[label].reuse
            least = f"{floor(emags[label], window, steps, 1 if 'cfg' in rows[label][2] else 2):.3f}" if reuses else ""
            print(f"| {settings} | {label} | {statistics.median(ratios):.3f} | {min(ratios):.3f}…{max(ratios):.3f} | "
                  f"{least} | {statistics.median(seconds[label] for seconds in measured):.1f} |", flush=True)


def quick(device: str, small: bool):
    """Each guidance alone: DiT-XL/2, and SD3 at 512² and 1024²; `small` takes models that a CPU can run."""
    dit, sd3, sides, dtype = ("tiny", "SD3-tiny", (8, 8, 16), torch.float32) if small else (
        "DiT-XL/2", "SD3", (32, 64, 128), torch.bfloat16)
    dit_steps, sd3_steps, few, many = (8, 6, 4, 2) if small else (50, 28, 10, 8)
    # model, latent side, window, steps, batch, and whether its blocks are compiled too
    cases = [(dit, sides[0], DIT_WINDOW, dit_steps, 1, True), (dit, sides[0], SD3_WINDOW, sd3_steps, 1, False),
             (dit, sides[0], DIT_WINDOW, dit_steps, many, False), (sd3, sides[1], SD3_WINDOW, sd3_steps, 1, False),
             (sd3, sides[2], SD3_WINDOW, sd3_steps, 1, not small), (sd3, sides[1], SD3_WINDOW, few, many, False),
             (sd3, sides[2], SD3_WINDOW, few, many, False)]
    began, case = time.monotonic(), None
    print(f"{machine(device)}, {str(dtype).split('.')[-1]}, each guidance alone\n\n"
          "| model, latent side, batch, steps | guidance | seconds | / CFG | floor | floor, one sample as measured | "
          "peak GiB |\n|" + " --- |" * 7)
    for name, side, window, n, batch, compiles in cases:
        if case is None or case.name != name:
            case = None                                                   # its memory first
            case = Case(name, device, dtype)
        case.start(batch, side)
        rows = [(label, *guidances(case.joint)[label], False)
                for label in ("CFG", "no guidance", "EMAG", "EMAG without reuse", "EMAG-Q")]
        if case.joint:
            rows.append(("EMAG, E in float16", dict(ema_dtype=torch.float16), {}, False))
        if compiles:
            rows += [("CFG, blocks compiled", None, {}, True), ("EMAG, blocks compiled", {}, {}, True)]
        found = {}
        for label, options, more, fast in rows:
            if time.monotonic() - began > QUICK_SECONDS:
                print(f"| {name}, {side}, {batch}, {n} | {label} | out of time |")
                continue
            emag = None                                                   # the memory of the row before first
            if device == "cuda":
                torch.cuda.empty_cache()
            emag = case.emag(window, **options) if options is not None else None
            try:
                with compiled(case.blocks) if fast else nullcontext():
                    found[label], peak = alone(lambda: case.predict(n, window, emag, **more), case.x, flow_times(n))
            except torch.cuda.OutOfMemoryError:
                print(f"| {name}, {side}, {batch}, {n} | {label} | out of memory |", flush=True)
                continue
            least, one = "", ""
            if emag and emag.reuse:
                least = floor(emag, window, n)
                # where a GPU waits for Python one sample takes as long as two, and the negative as its share of both
                one = f"{1 + (least - 1) * 2 * found.get('no guidance', math.nan) / found.get('CFG', math.nan):.3f}"
                least = f"{least:.3f}"
            ratio = found[label] / found.get("CFG", math.nan)
            print(f"| {name}, {side}, {batch}, {n} | {label} | {found[label]:.3f} | {ratio:.3f} | {least} | {one} | "
                  f"{peak:.2f} |", flush=True)


def host_time(rounds: int, steps: int = 28) -> dict[str, float]:
    """Time of the process over CFG's, on one thread: 28 blocks so narrow that only Python counts, and SD3's window."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        case, window = Case("tiny", "cpu", torch.float32).start(1), SD3_WINDOW
        emags = {"CFG": None, "EMAG": case.emag(window), "EMAG-Q": case.emag(window, variant="query")}
        measured = [side_by_side({label: case.predict(steps, window, emag) for label, emag in emags.items()}, case.x,
                                 flow_times(steps), time.process_time) for _ in range(1 + rounds)][1:]
    finally:
        torch.set_num_threads(threads)
    return {label: statistics.median(seconds[label] / seconds["CFG"] for seconds in measured) for label in emags}


def machine(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


# -------------------------------------------------------------------------------------------------- counted, not timed
#
# The same code runs on tensors without data (torch's "meta" device), and every kernel that it would start is written
# down: the bytes that it reads and writes, each tensor once, and the operations of its matrix products.

# bytes per second, and operations per second in 16 bits and in float32, as their makers state them
CARDS = {"H100 SXM": (3.35e12, 989e12, 67e12), "RTX 4090": (1.008e12, 165e12, 82.6e12)}


@dataclasses.dataclass
class Count:
    """kernels: (name, bytes, operations, whether they are of 16 bits).  waits: times the GPU's result is waited for."""
    kernels: list[tuple[str, int, int, bool]] = dataclasses.field(default_factory=list)
    waits: int = 0

    @property
    def bytes(self) -> int:
        return sum(kernel[1] for kernel in self.kernels)

    @property
    def operations(self) -> int:
        return sum(kernel[2] for kernel in self.kernels)

    def seconds(self, card: str) -> float:
        """At the card's full speed; of each kernel the longer of its bytes and its operations."""
        speed, half, full = CARDS[card]
        return sum(max(size / speed, work / (half if short else full)) for _, size, work, short in self.kernels)

    def add(self, name: str, tensors: Sequence[Tensor], operations: int):
        # an expanded tensor is read as what it was before
        sizes = [x.element_size() * math.prod(n for n, stride in zip(x.shape, x.stride()) if stride) for x in tensors]
        self.kernels.append((name, sum(sizes), operations, any(x.element_size() == 2 for x in tensors)))


class _Kernels(TorchDispatchMode):
    def __init__(self, count: Count):
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, aten = kwargs or {}, torch.ops.aten
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        meta = any(x.is_meta for x in given)
        if func is aten._local_scalar_dense.default and meta:             # whatever is asked is true
            self.count.waits += 1
            return True
        if func is aten._to_copy.default and meta and torch.device(kwargs.get("device") or "meta").type == "cpu":
            self.count.waits += 1                                         # equal Δ: the first candidate is chosen
            return torch.ones(given[0].shape, dtype=kwargs.get("dtype") or given[0].dtype)
        out = func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        owners = {x.untyped_storage()._cdata for x in given}
        view = not func._schema.is_mutable and all(x.untyped_storage()._cdata in owners for x in made)
        if made and not view and not func.__name__.startswith(("empty", "new_empty")):
            formula = flop_registry.get(func._overloadpacket)
            self.count.add(func.__name__, [*given, *made], formula(*args, **kwargs, out_val=out) if formula else 0)
        return out


class _FusedAttention(TorchFunctionMode):
    """Fused attention as the one kernel that it is on a GPU: q, k, v and the result once, no map."""

    def __init__(self, count: Count):
        super().__init__()
        self.count = count

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch._C._nn.scaled_dot_product_attention or not args[0].is_meta:
            return func(*args, **(kwargs or {}))
        query, key, value, out = *args[:3], torch.empty_like(args[0])
        self.count.add("attention", [query, key, value, out], 4 * query.numel() * key.shape[-2])
        return out


@contextmanager
def counting() -> Iterator[Count]:
    """Inside, what torch would compute is counted; on "meta" tensors alone a comparison gives True."""
    count = Count()
    with (mock.patch("torch.autocast", lambda *args, **kwargs: nullcontext()),      # which knows no meta device
          mock.patch("torch.is_autocast_enabled", lambda *args: False),
          _FusedAttention(count), _Kernels(count)):
        yield count


@torch.no_grad()                              # under inference_mode torch would show `linear` whole, not its kernels
def count_step(case: Case, variant: str | None) -> dict[str, Count]:
    """What one step of `variant` consists of, None: of CFG alone. The first candidate is selected, the dearest."""
    both, labels, half = torch.cat([case.x, case.x]), torch.cat([case.null, case.y]), slice(len(case.x), None)
    if variant is None:
        with counting() as plain:
            case.net(both, 0.5, labels)
        return {"CFG": plain}
    emag = case.emag(SD3_WINDOW, variant=variant)
    for _ in range(2):                                                    # the first only starts E
        with counting() as observed, emag.observe(half):
            case.net(both, 0.5, labels)
    with counting() as negative, emag.perturb():
        case.net(case.x, 0.5, case.y)
    return {"observed": observed, "negative": negative}


def count_table(name: str, batch: int, steps: int):
    """Of one step per variant; times of a trajectory from its steps of each kind, as they follow from the count."""
    case, window = Case(name, "meta", torch.bfloat16).start(batch), SD3_WINDOW
    plain = count_step(case, None)["CFG"]
    observed, perturbed = (sum(map(lambda step: kind(step, steps), range(steps)))
                           for kind in (window.observes, window.perturbs))
    print(f"{name}, latent side {case.side}, batch {batch}, bfloat16: counted, not measured. Of {steps} steps "
          f"{observed} are observed and {perturbed} perturbed.\n" + "; ".join(
              f"{card}: {speed / 1e12:g} TB/s, {half / 1e12:g} TFLOPS in bfloat16, {full / 1e12:g} in float32"
              for card, (speed, half, full) in CARDS.items()) +
          f"\n\n| what | GiB moved | TFLOP | kernels | waits | {' | '.join(f'ms, {card}' for card in CARDS)} |\n"
          + "|" + " --- |" * (5 + len(CARDS)))

    def line(label: str, count: Count, less: Count | None = None):
        minus = lambda of: of(count) - (of(less) if less else 0)                                    # noqa: E731
        times = " | ".join(f"{1e3 * minus(lambda c: c.seconds(card)):.1f}" for card in CARDS)
        print(f"| {label} | {minus(lambda c: c.bytes) / 2**30:.2f} | {minus(lambda c: c.operations) / 1e12:.2f} | "
              f"{minus(lambda c: len(c.kernels))} | {minus(lambda c: c.waits)} | {times} |", flush=True)

    line("CFG's step", plain)
    ratios = {}
    for label, variant in {"EMAG": "map", "EMAG-I": "image", "EMAG-Q": "query"}.items():
        parts = count_step(case, variant)
        line(f"{label}: observing adds", parts["observed"], plain)
        line(f"{label}: the negative adds", parts["negative"])
        ratios[label] = [1 + (observed * (parts["observed"].seconds(card) - plain.seconds(card)) + perturbed
                              * parts["negative"].seconds(card)) / (steps * plain.seconds(card)) for card in CARDS]
    print(f"\n| trajectory / CFG's | {' | '.join(CARDS)} |\n|" + " --- |" * (1 + len(CARDS)))
    for label, values in ratios.items():
        print(f"| {label} | {' | '.join(f'{value:.3f}' for value in values)} |")


# -------------------------------------------------------------------------------------------------------- command line


@one_line_errors
def main(argv: Sequence[str] | None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = lambda message: need(False, f"{message}: see --help")
    add, models = parser.add_argument, ["small", "tiny", *(f"DiT-{size}/2" for size in DIT_SIZES), "SD3-small",
                                        "SD3-tiny", "SD3"]
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--quick", action="store_true", help="each guidance alone, on a GPU, in six minutes")
    kinds.add_argument("--host", action="store_true", help="Python's own time")
    kinds.add_argument("--count", action="store_true", help="bytes and operations of one step, of SD3 at 1024²")
    add("--small", action="store_true", help="--quick with models that a CPU can run, to test it")
    add("--model", choices=models, help="default: small; with --count SD3")
    add("--dtype", choices=["fp32", "bf16"], default="fp32")
    add("--batch", type=int, default=1, help="images drawn together")
    add("--steps", type=int, nargs=2, default=(50, 28), metavar=("DIT", "SD3"),
        help="steps with the DiT settings (250 in the paper) and with the SD3 settings (28)")
    add("--rounds", type=int, default=3)
    add("--compile", action="store_true", help="also with the blocks compiled one by one")
    args = parser.parse_args(argv)
    need(args.batch >= 1 and args.rounds >= 1 and min(args.steps) >= 4,
         "--batch and --rounds need 1 or more, --steps 4 or more")
    need(not args.count or (args.model or "SD3").startswith("SD3"), f"--count --model {args.model}: need one of SD3's")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    need(not args.quick or args.small or device == "cuda", "--quick: no GPU here: need one, or --small to try it")
    need(args.quick or not args.small, "--small: only --quick has small models: need --model")

    torch.compiler.set_stance("default")          # loads torch.compiler, a second's work that EMAG's first pass had
    torch.manual_seed(0)
    if args.count:
        count_table(args.model or "SD3", args.batch, args.steps[1])
    elif args.quick:
        quick(device, args.small)
        print("\n| host time, one thread | / CFG |\n| --- | --- |")
    elif not args.host:
        table(args, device, {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype])
    if args.quick or args.host:
        for label, ratio in host_time(args.rounds).items():
            print(f"| {label} | {ratio:.2f} |")


if __name__ == "__main__":
    sys.exit(main())
