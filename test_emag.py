"""Page one is the method once more, slowly, and the test that both are one. The rest tests emag.py and sampler.py, in
their order, and then what the README says. `guide` is tested in recipes/, dit.py and the command line in demo/, wrong
input in bench/.
"""
import copy
import dataclasses
import importlib.util
import inspect
import itertools
import json
import math
import pickle
import re
import runpy
import statistics
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import emag as emag_module
import sampler
from dit import Attention, DiT
from emag import EMAG, Window, deviation, ema_update, is_close, precision, select_layers, zscore

torch.set_num_threads(1)                 # the models are tiny: a second thread costs more than it brings
HERE = Path(__file__).resolve().parent
DEMO = HERE / "demo" / "emoji-flow.pt"
F64 = torch.float64


def script(path: str):
    """A script such as demo/trace.py as a module."""
    spec = importlib.util.spec_from_file_location(re.sub(r"\W", "_", path), HERE / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def seeded(*shape, seed=0, dtype=F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# -------------------------------------------------------------------------------------------- EMAG once more, slowly


def softmax_map(q: Tensor, k: Tensor) -> Tensor:
    """(B, heads, N, d) twice → A (B, heads, N, N)."""
    return torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1]), dim=-1)


class SlowEMAG:
    """The method for any forward by_hand(*inputs, attend), where attend(n, q, k) gives the attention map of block n.

    The paper's equations, one sample at a time where each chooses its blocks; nothing is shared with emag.py.
    """

    def __init__(self, by_hand: Callable, layers=(1, 2, 3), beta=0.988, strength=1.0, threshold=None, variant="map",
                 image_tokens=None, softmax=softmax_map):
        self.by_hand, self.layers, self.beta, self.strength, self.threshold = by_hand, layers, beta, strength, threshold
        self.variant, self.image, self.softmax, self.ema = variant, image_tokens or slice(None), softmax, {}

    def clean(self, *inputs) -> Tensor:
        self.maps, self.seen = {}, {}
        pred = self.by_hand(*inputs, attend=self.watch)
        for n, seen in self.seen.items():
            self.ema[n] = self.beta * self.ema[n] + (1 - self.beta) * seen if n in self.ema else seen
        self.deviation, self.selected = [], []
        for b in range(len(pred)):
            dev = [(self.ema[n][b] - self.seen[n][b]).abs().mean().item() for n in self.layers]
            mean = sum(dev) / len(dev)
            std = math.sqrt(sum((d - mean) ** 2 for d in dev) / len(dev))
            z = [0.0 if std < 1e-15 else (d - mean) / std for d in dev]
            self.deviation.append(dev)
            self.selected.append([i == dev.index(max(dev)) or (self.threshold is not None and z[i] >= self.threshold)
                                  for i in range(len(dev))])
        return pred

    def watch(self, n: int, q: Tensor, k: Tensor) -> Tensor:
        maps, image = self.softmax(q, k), self.image
        if n in self.layers:
            self.maps[n] = maps
            seen = dict(map=maps[:, :, image], image=maps[:, :, image, image], query=q[:, :, image])
            self.seen[n] = seen[self.variant]
        return maps

    def negative(self, *inputs) -> Tensor:
        return self.by_hand(*inputs, attend=self.perturb)

    def perturb(self, n: int, q: Tensor, k: Tensor) -> Tensor:
        maps, q, image = self.softmax(q, k), q.clone(), self.image
        for b in range(len(q)):
            if n not in self.layers or not self.selected[b][self.layers.index(n)]:
                continue
            blended = (1 - self.strength) * self.seen[n][b] + self.strength * self.ema[n][b]
            if self.variant == "map":
                maps[b, :, image] = blended
            elif self.variant == "query":
                q[b, :, image] = blended
                maps[b] = self.softmax(q, k)[b]
            else:
                maps[b, :, image] = self.maps[n][b, :, image]
                maps[b, :, image, image] = blended
                total = maps[b].sum(dim=-1, keepdim=True)
                maps[b] /= torch.where(total > 0, total, 1)
        return maps


ROWS = [slice(None), slice(2, 4), torch.tensor([0, 2, 3])]             # all samples, half a doubled batch, some of them
OPTIONS = [{}, dict(strength=0.4), dict(strength=0.0), dict(threshold=0.0), dict(threshold=0.0, strength=0.7),
           dict(image_tokens=slice(0, 4)), dict(image_tokens=slice(2, None), strength=0.6, threshold=0.5),
           *(dict(variant=variant, **rest) for variant in ("image", "query") for rest in (
               {}, dict(image_tokens=slice(2, 8)), dict(image_tokens=slice(0, 4), strength=0.6, threshold=0.5)))]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["dit", "wild"])
def test_emag_is_slow_emag(name, options, monkeypatch):
    """Clean passes, E, Δ, selection and negatives, over three trajectories: for some rows, with and without reuse, with
    maps of three, one and all heads at a time."""
    case = Case(name, batch=4)
    emag, apart = case.emag(beta=0.8, **options), set()
    for rows, reuse, chunk in zip(ROWS, (True, False, True), (3100, 1, 2**22)):
        monkeypatch.setattr("emag.CHUNK", chunk)
        emag.reuse, slow = reuse, SlowEMAG(case.by_hand, beta=0.8, **options)
        emag.reset()
        for step in range(5):
            inputs, plain = case.inputs(step), case.model(*case.inputs(step))
            picked = [part[rows] for part in inputs]
            with emag.observe(rows):
                assert torch.equal(case.model(*inputs), plain)                   # bit for bit
            pred = slow.clean(*picked)
            torch.testing.assert_close(plain[rows], pred)
            torch.testing.assert_close(emag.deviation, torch.tensor(slow.deviation, dtype=F64))
            assert emag.selected.tolist() == slow.selected
            expected = slow.negative(*picked)
            for again in range(2):                                               # the negative advances nothing
                with emag.perturb():
                    negative = case.model(*picked)
                torch.testing.assert_close(negative, expected)
            for n in (1, 2, 3):
                torch.testing.assert_close(emag.average(n), slow.ema[n])
            apart.add(len(set(map(tuple, slow.selected))))
            moved = (negative - pred).abs().max() / pred.abs().max()
            assert moved > 1e-4 or step == 0 or options.get("strength") == 0.0
        assert len(emag.trace) == 5
    # The samples of one batch disagree about the block at some step, else this shows less than it says. (Queries of the
    # wild model grow from block to block, so that one block always wins.)
    assert max(apart) > 1 or options.get("variant") == "query"


# ------------------------------------------------------------------------------------- two models written out by hand


def randomised(model: nn.Module, seed: int = 0, std: float = 0.1) -> nn.Module:
    """Random weights everywhere, also where an initialisation puts zeros, so that every block does something."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(0, std, generator=generator)
    return model.double().eval().requires_grad_(False)


def small_dit(seed: int = 0, **changes) -> DiT:
    config = dict(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=5, num_heads=4, num_classes=3,
                  learn_sigma=False)
    return randomised(DiT(**(config | changes)), seed, std=0.25)


def dit_by_hand(model: DiT, x: Tensor, t: Tensor, y: Tensor, attend=lambda n, q, k: softmax_map(q, k)) -> Tensor:
    heads = model.config["num_heads"]
    h = model.x_embedder(x) + model.pos_embed
    c = model.t_embedder(t) + (y if y.is_floating_point() else model.y_embedder(y))
    for n, block in enumerate(model.blocks):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
            part[:, None] for part in block.adaLN_modulation(c).chunk(6, dim=1))
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2)
                   for part in block.attn.qkv(block.norm1(h) * (1 + scale_a) + shift_a).chunk(3, dim=-1))
        h = h + gate_a * block.attn.proj((attend(n, q, k) @ v).transpose(1, 2).flatten(2))
        h = h + gate_m * block.mlp(block.norm2(h) * (1 + scale_m) + shift_m)
    shift, scale = (part[:, None] for part in model.final_layer.adaLN_modulation(c).chunk(2, dim=1))
    h = model.final_layer.linear(model.final_layer.norm_final(h) * (1 + scale) + shift)
    p, grid = model.patch_size, x.shape[-1] // model.patch_size
    out = torch.zeros(len(x), h.shape[-1] // p**2, *x.shape[2:], dtype=h.dtype)
    for token in range(grid**2):
        row, column = p * (token // grid), p * (token % grid)
        out[:, :, row:row + p, column:column + p] = h[:, token].unflatten(-1, (p, p, -1)).permute(0, 3, 1, 2)
    return out


class WildBlock(nn.Module):
    """Keyword calls, a cross-attention after the self-attention, and nested outputs, not all with a batch dimension."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.cq, self.ck, self.cv, self.co = (nn.Linear(dim, dim) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, *, hidden: Tensor, context: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        out = F.scaled_dot_product_attention(query=self.split(self.q(hidden)), key=self.split(self.k(hidden)),
                                             value=self.split(self.v(hidden)))
        hidden = hidden + self.o(out.transpose(1, 2).flatten(2))
        out = F.scaled_dot_product_attention(query=self.split(self.cq(hidden)), key=self.split(self.ck(context)),
                                             value=self.split(self.cv(context)))
        return hidden + self.co(out.transpose(1, 2).flatten(2)), {
            "context": context + 0.1 * context.tanh(), "shift": torch.full((1,), 0.05, dtype=F64), "": torch.zeros(())}


class WildModel(nn.Module):
    """Blocks like those in other code bases; early outputs reach late blocks, and the stream is changed in place."""

    def __init__(self, dim: int = 16, heads: int = 2, depth: int = 5):
        super().__init__()
        self.blocks = nn.ModuleList(WildBlock(dim, heads) for _ in range(depth))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        skips = []
        for block in self.blocks:
            x, extra = block(hidden=x, context=context)
            context = extra["context"]
            skips.append(x)
            x += extra["shift"]                    # in place: what the block gave is changed after the fact
            extra["shift"] += 1
        return x + sum(skips[:2])


def wild_by_hand(model: WildModel, x: Tensor, context: Tensor, attend=lambda n, q, k: softmax_map(q, k)) -> Tensor:
    skips = []
    for n, block in enumerate(model.blocks):
        used = attend(n, block.split(block.q(x)), block.split(block.k(x)))
        x = x + block.o((used @ block.split(block.v(x))).transpose(1, 2).flatten(2))
        cross = softmax_map(block.split(block.cq(x)), block.split(block.ck(context)))
        x = x + block.co((cross @ block.split(block.cv(context))).transpose(1, 2).flatten(2)) + 0.05
        context = context + 0.1 * context.tanh()
        skips.append(x)                            # the in-place addition reaches the skip as well
    return x + sum(skips[:2])


class Case:
    """A model, its forward by hand, and inputs for each step of a trajectory: `batch` samples."""

    def __init__(self, name: str, batch: int = 3, seed: int = 0):
        self.name, self.batch = name, batch
        self.model = small_dit(seed) if name == "dit" else randomised(WildModel(), seed, std=0.4)
        self.blocks = self.model.blocks

    def by_hand(self, *inputs, **attend) -> Tensor:
        return (dit_by_hand if self.name == "dit" else wild_by_hand)(self.model, *inputs, **attend)

    def inputs(self, step: int, null: bool = False) -> tuple[Tensor, ...]:
        """null: with the null condition."""
        each = range(self.batch)
        if self.name == "dit":
            return (torch.stack([seeded(3, 8, 8, seed=100 * b + step) for b in each]),
                    torch.tensor([900.0 - 100 * step] * self.batch, dtype=F64),
                    torch.tensor([3 if null else b % 3 for b in each]))
        return (torch.stack([seeded(9, 16, seed=100 * b + step) for b in each]),
                torch.stack([seeded(7, 16, seed=5000 if null else 5001 + b) for b in each]))

    def emag(self, layers=(1, 2, 3), **options) -> EMAG:
        return EMAG(self.blocks, layers, ema_dtype=F64, **options)


@pytest.fixture(params=["dit", "wild"])
def case(request) -> Case:
    return Case(request.param)


# ------------------------------------------------------------------------------------------ equations, by slow loops


def test_attention_ema_starts_as_a_copy_and_advances_in_place():
    maps = seeded(2, 3, 5, 5).softmax(-1)
    kept, ema = maps.clone(), ema_update(None, maps[0], 0.9)
    assert ema_update(ema, maps[1], 0.9) is ema and torch.equal(maps, kept)
    torch.testing.assert_close(ema, 0.9 * kept[0] + 0.1 * kept[1])
    half = torch.full((1, 2, 400, 400), 0.5, dtype=torch.float16)
    torch.testing.assert_close(deviation(torch.zeros_like(half), half), torch.tensor([0.5]))          # in float32


def test_the_deviation_is_exact_at_the_size_of_real_maps():
    """One head of SD3's at 1024²: 18 million entries. A sum in float32 one by one is off by 1.6 to 5%, differently for
    sharp and flat maps, and chooses another block."""
    logits, found, exact = seeded(2, 1, 1, 4096, 4429, dtype=torch.float32), [], []
    for sharpness in (2.0, 4.0):
        attn, ema = (logits * sharpness).softmax(-1)
        if exact:                                                                  # the second has moved 2% less
            ema = attn + (ema - attn) * (0.98 * exact[0] / (ema.double() - attn).abs_().mean())
        found.append(deviation(ema, attn).double())
        exact.append((ema.double() - attn).abs_().mean())
    torch.testing.assert_close(torch.cat(found), torch.stack(exact), rtol=1e-6, atol=0)
    assert select_layers(torch.stack(found, dim=1)).tolist() == [[True, False]]


def test_zscore_and_selection_by_hand():
    for width in (1, 2, 3, 4, 8):
        dev = seeded(300, width, seed=width).abs() * 1e-5
        z, largest = zscore(dev), torch.tensor([[value == max(row) for value in row] for row in dev.tolist()])
        for row, each in zip(dev.tolist(), z.tolist()):
            std = statistics.pstdev(row) or 1.0
            assert each == pytest.approx([(value - statistics.fmean(row)) / std for value in row], rel=1e-9, abs=1e-12)
        torch.testing.assert_close(zscore(dev * 1e-12), z)                      # however little the maps move
        assert torch.equal(z == z.amax(dim=1, keepdim=True), largest)           # argmax z is the paper's argmax Δ
        assert torch.equal(select_layers(dev), largest)
        for tau in (-0.5, 0.0, 0.8, z[0, 0].item()):
            assert torch.equal(select_layers(dev, tau), largest | (z >= tau))
        assert z.max() <= math.sqrt(width - 1) + 1e-9                           # so that a larger τ adds no block
    assert select_layers(torch.tensor([[1.0, 3.0, 3.0, 2.0]])).tolist() == [[False, True, False, False]]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_equal_deviations_have_zscore_zero_and_select_the_first(dtype):
    for width in (1, 3, 4, 7):
        dev = seeded(500, 1, dtype=dtype).abs().repeat(1, width)      # many values, since few of them round badly
        assert torch.equal(zscore(dev), torch.zeros_like(dev))
        assert select_layers(dev).tolist() == [[True] + [False] * (width - 1)] * 500


@pytest.mark.parametrize("bounds, steps, observed, perturbed", [
    ((1.0, 0.8, 0.2), 1, [0], [0]),                                # r = 0 alone, and every bound rounds to 0
    ((1.0, 0.8, 0.2), 2, [0, 1], [0, 1]),                          # bounds 1, 1 and 0 of r = 1, 0
    ((1.0, 0.8, 0.6), 6, range(0, 3), range(1, 3)),                # r 5…3 and 4…3
    ((1.0, 0.8, 0.2), 28, range(0, 23), range(5, 23)),             # r 27…5 and 22…5
    ((1.0, 0.8, 0.2), 250, range(0, 200), range(50, 200)),         # r 249…50 and 199…50
    ((0.6, 0.4, 0.2), 250, range(100, 200), range(149, 200)),      # DiT's published window: r 149…50 and 100…50
])
def test_window_indices(bounds, steps, observed, perturbed):
    window = Window(*bounds)
    assert [i for i in range(steps) if window.observes(i, steps)] == list(observed)
    assert [i for i in range(steps) if window.perturbs(i, steps)] == list(perturbed)


def test_window_out_of_order():
    for bounds in ((0.5, 0.8, 0.2), (1.0, 0.2, 0.8), (1.2, 0.8, 0.2), (1.0, 0.8, -0.1), (math.nan, 0.8, 0.2)):
        with pytest.raises(ValueError, match="need 1 ≥ start"):
            Window(*bounds)


# ----------------------------------------------------------------------------------------------------------- the class


def trajectory(case: Case, emag: EMAG, steps: int = 4) -> list[Tensor]:
    """The negatives."""
    negatives = []
    for step in range(steps):
        with emag.observe():
            case.model(*case.inputs(step))
        with emag.perturb():
            negatives.append(case.model(*case.inputs(step)))
    return negatives


def test_what_can_be_looked_at(case):
    emag, plain = case.emag([3, 1, 3, 2]), case.emag()                             # any order, and twice, is the same
    assert all(map(torch.equal, trajectory(case, emag), trajectory(case, plain)))
    for name in ("deviation", "zscore", "selected"):
        assert getattr(emag, name) is getattr(emag.trace[-1], name) and getattr(emag, name).shape == (3, 3)
    torch.testing.assert_close(emag.zscore, zscore(emag.deviation))
    assert torch.equal(emag.trace[0].zscore, torch.zeros(3, 3, dtype=F64))         # E = A at the first observed step
    emag.average(2).zero_()                                                        # what is looked at is a copy
    assert emag.average(2).sum() > 1
    with pytest.raises(RuntimeError, match=r"block 4 .*only \[1, 2, 3\]"):
        emag.average(4)


def state(model: nn.Module) -> list:
    return [(name, sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
            for name, module in model.named_modules()]


@pytest.mark.parametrize("block", [2, 4])
def test_an_exception_leaves_everything_as_it_was(case, block):
    """In a candidate after its attention, and behind all candidates: no hook stays, E does not advance, no negative is
    made from half a pass. Then the pass is made once more."""
    emag, slow, before = case.emag(beta=0.8, reuse=False), SlowEMAG(case.by_hand, beta=0.8), state(case.model)
    module = case.blocks[block].attn.proj if case.name == "dit" else case.blocks[block].o

    def breaks_off(context):
        handle = module.register_forward_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError), context:
            case.model(*case.inputs(step))
        handle.remove()
        assert state(case.model) == before

    for step in range(4):
        breaks_off(emag.observe())
        with pytest.raises(RuntimeError, match="inside `with emag.observe"), emag.perturb():
            pass
        with emag.observe():
            case.model(*case.inputs(step))
        slow.clean(*case.inputs(step))
        torch.testing.assert_close(emag.deviation, torch.tensor(slow.deviation, dtype=F64))
        breaks_off(emag.perturb())
        with emag.perturb():
            torch.testing.assert_close(case.model(*case.inputs(step)), slow.negative(*case.inputs(step)))
    assert len(emag.trace) == 4 and state(case.model) == before


def test_an_exception_while_e_advances_needs_a_reset(case, monkeypatch):
    emag = case.emag()
    expected, good = trajectory(case, emag), [deviation]
    with monkeypatch.context() as patch, pytest.raises(IndexError), emag.observe():
        patch.setattr("emag.deviation", lambda *args: good.pop()(*args))                  # fails for the second block
        case.model(*case.inputs(4))
    with emag.observe(update=False):
        case.model(*case.inputs(4))
    for context in (emag.perturb(), emag.observe()):
        with pytest.raises(RuntimeError, match=r"call reset\(\)|emag.observe\(\)"), context:
            case.model(*case.inputs(4))
    emag.reset()
    assert all(map(torch.equal, trajectory(case, emag), expected)) and len(emag.trace) == 4


def test_wrong_use_is_one_clear_line(case):
    def refused(message: str, context, *calls):
        with pytest.raises(RuntimeError, match=message), context:
            for call in calls:
                case.model(*call)

    emag, one, two, three = case.emag(), *map(case.inputs, range(3))
    refused("nothing was observed yet", emag.perturb())
    with pytest.raises(RuntimeError, match="nothing was observed yet"):
        emag.selected
    refused(r"blocks \[0, 1, 2, 3, 0, 1, 2, 3\] ran", emag.observe(), one, two)
    refused(r"blocks \[\] ran, and \[1\] must", case.emag([1], reuse=False).observe())
    refused(r"blocks \[0, 2, 1, 3\] ran, and \[0, 1, 2, 3\] must",
            EMAG([case.blocks[n] for n in (0, 2, 1, 3, 4)], [1, 3]).observe(), one)
    refused("rows that select a sample", emag.observe(slice(3, 3)), one)
    for tokens in (slice(4, 4), slice(90, 99), slice(0, 99), slice(-99, None)):
        refused("and image_tokens is slice", case.emag(image_tokens=tokens).observe(), one)
    for emag.reuse in (True, False):
        emag.reset()
        for each in (one, two):
            with emag.observe():
                case.model(*each)
        for rows in ([0, 1], [0, 1, 2, 0]):
            refused(f"got {len(rows)} samples, 3 were observed", emag.perturb(), [part[rows] for part in two])
        refused("once each, in this order", emag.perturb(), two, two)
        refused(r"blocks \[\] ran", emag.perturb())
        refused("gets other inputs in the negative pass", emag.perturb(), three)             # no clean pass of these
        refused("gets other inputs in the negative pass", emag.perturb(), [two[0][[1, 0, 2]], *two[1:]])
    refused("call reset", emag.observe(slice(0, 2)), three)
    emag.image_tokens = slice(0, 4)
    refused("call reset", emag.observe(), three)
    emag.reset()
    with emag.observe():
        case.model(*one)
    refused("exactly: the model saw the same latents", emag.observe(),
            [torch.cat([part[:1], other[1:]]) for part, other in zip(one, two)])             # one sample is enough
    assert len(trajectory(case, case.emag(beta=0.0))) == 4                                   # here Δ is 0 by right


def test_dropout_is_refused_unless_it_is_off(case):
    case.blocks[4].drop, emag = nn.Dropout(0.1), case.emag()                 # behind the candidates
    case.model.train()
    with pytest.raises(RuntimeError, match=r"block 4 has dropout on.* model.eval\(\)"), emag.observe():
        case.model(*case.inputs(0))
    case.blocks[4].drop.eval()                                               # training mode alone changes nothing
    case.blocks[3].drop = nn.Dropout(0.0)
    assert len(trajectory(case, emag)) == 4


@pytest.mark.parametrize("n", [0, 2])
def test_hooks_of_others_on_a_block_stay_around_it(n):
    """A block that is no candidate, and a candidate."""
    case, doubled = Case("dit"), Case("dit")
    case.blocks[n].register_forward_hook(lambda module, args, out: 2 * out)
    forward = doubled.blocks[n].forward
    doubled.blocks[n].forward = lambda *args: 2 * forward(*args)
    for one, two in zip(trajectory(case, case.emag()), trajectory(doubled, doubled.emag())):
        assert torch.equal(one, two)


def test_label_dropout_says_that_the_model_is_in_train_mode():
    """Randomness that is no nn.Dropout, as in DiT's training: the condition is dropped at random."""
    case, dropped = Case("dit"), iter([False, True])
    emag = case.emag()
    case.model.y_embedder.register_forward_hook(lambda module, args, out: out * 0 if next(dropped) else None)
    with emag.observe():
        case.model(*case.inputs(0))
    with pytest.raises(RuntimeError, match=r"call model.eval\(\)"), emag.perturb():
        case.model(*case.inputs(0))


def stance() -> str:
    """What torch.compiler.set_stance has set for all threads."""
    return torch._dynamo.eval_frame._stance.stance


def steps_of(case: Case, emag: EMAG) -> Iterator[Tensor]:
    """As `trajectory`, and can be left in the middle of each pass."""
    for step in range(4):
        with emag.observe():
            yield
            case.model(*case.inputs(step))
            yield
        with emag.perturb():
            yield
            negative = case.model(*case.inputs(step))
            yield
        yield negative


@pytest.mark.parametrize("name, before", [("dit", "default"), ("wild", "eager_on_recompile")])
def test_passes_may_overlap_in_one_thread(name, before):
    """Generators, as asyncio makes them: on two models, and on one. Nothing of them stays in torch."""
    case = Case(name)
    other, clean, expected = Case(name, seed=1), state(case.model), []
    for each in (case, other):
        expected += [trajectory(each, each.emag())]
    torch.compiler.set_stance(before)
    both = [steps_of(each, each.emag()) for each in (case, other)]
    for negatives, right in zip(zip(*zip(*both)), expected):   # in turn
        assert all(map(torch.equal, [negative for negative in negatives if negative is not None], right))
    assert stance() == before and state(case.model) == clean
    first, second = steps_of(case, case.emag()), steps_of(case, case.emag())
    for _ in range(8):                                          # into the second negative pass
        next(first)
    next(second)
    first.close()                                               # the lower hooks go first
    assert state(case.model) != clean and stance() == "force_eager"
    next(second)                                                # and do nothing any more
    second.close()
    assert state(case.model) == clean and stance() == before
    torch.compiler.set_stance("default")


def test_passes_that_overlap_on_a_compiled_model_see_their_own_inputs():
    """The hooks of the other pass are not taken for blocks that are compiled one by one."""
    case = Case("dit")
    case.model = torch.compile(case.model, backend="eager")
    case.model(*case.inputs(0))
    one, two = case.emag([3, 4]), case.emag([3, 4])
    first, second = one.observe(), two.observe()
    for passes in (first, second):
        passes.__enter__()
    case.model(*case.inputs(1))                                 # both see it
    first.__exit__(None, None, None)
    with pytest.raises(RuntimeError, match="in this pass"):
        case.model(*case.inputs(0))
        second.__exit__(None, None, None)
    assert not two.trace and stance() == "default"
    torch._dynamo.reset()


def test_two_threads_may_guide_one_model(case):
    """Each with an EMAG object of its own, their passes interleaved: no thread sees the other's hooks."""
    clean, expected, turn = state(case.model), trajectory(case, case.emag()), threading.Barrier(2, timeout=60)

    def run(_) -> list[Tensor]:
        found = []
        for negative in steps_of(case, case.emag()):
            turn.wait()
            found += [] if negative is None else [negative]
        return found

    with ThreadPoolExecutor(2) as threads:
        for negatives in threads.map(run, range(2)):
            for one, two in zip(negatives, expected, strict=True):      # on some CPUs another thread rounds otherwise
                torch.testing.assert_close(one, two)
    assert state(case.model) == clean and stance() == "default"


def test_two_emag_objects_on_one_pass(case):
    """Nested: each averages candidates of its own, and the inner negative is not the outer one's."""
    one, two, alone = case.emag([1, 2]), case.emag([3]), [case.emag([1, 2]), case.emag([3])]
    expected = [trajectory(case, emag, steps=2) for emag in alone]
    for step in range(2):
        with one.observe(), two.observe():
            case.model(*case.inputs(step))
        for emag, negatives in zip((one, two), expected):
            with emag.perturb():
                assert torch.equal(case.model(*case.inputs(step)), negatives[step])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_inside_a_pass_is_a_model_of_its_own(case, duplicate):
    inputs = case.inputs(0)
    with case.emag().observe():
        inside = duplicate(case.model)
        case.model(*inputs)
    for parameter in inside.parameters():
        parameter.data.mul_(0.5)
    expected = duplicate(inside)(*inputs)
    assert torch.equal(inside(*inputs), expected) and not torch.equal(expected, case.model(*inputs))
    assert state(inside) == state(case.model)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")     # it struck where errors end
def test_ctrl_c_anywhere_leaves_nothing_behind(request):
    """Between calls that emag.py makes, at every third. No hook, mode or stance stays, and E never has advanced without
    its entry in the trace: it is the average of what the trace has, or needs a reset."""
    blocks, file = nn.ModuleList(Attends(CALLS["positional"][0]) for _ in range(2)), emag_module.__file__

    def run(step: int) -> list[Tensor]:
        return [block(attend_inputs(step)) for block in blocks]

    def passes(emag: EMAG, step: int):
        with emag.observe():
            run(step)
        with emag.perturb():
            run(step)

    def interrupted_at(number: int) -> bool:
        emag, count = EMAG(blocks, [0, 1], beta=0.5, reuse=False), itertools.count()
        passes(emag, 0)

        def strike(frame, event, arg):
            # Python asks for signals after a call of C, and where a function starts, but not where a generator goes on.
            if event not in ("call", "c_return") or event == "call" and frame.f_code.co_flags & inspect.CO_GENERATOR:
                return
            if file in (frame.f_code.co_filename, frame.f_back and frame.f_back.f_code.co_filename):
                if next(count) == number:
                    raise KeyboardInterrupt
        try:
            sys.setprofile(strike)
            passes(emag, 1)
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
        assert state(blocks) == clean and stance() == before and torch._C._len_torch_function_stack() == 0
        assert emag._ema is None or len(emag.trace) == 1 + (not torch.equal(emag.average(0), started))
        return next(count) > number

    before = "eager_on_recompile"
    torch.compiler.set_stance(before)
    request.addfinalizer(lambda: torch.compiler.set_stance("default"))
    clean, plain, first = state(blocks), run(1), EMAG(blocks, [0, 1], reuse=False)
    passes(first, 0)
    started = first.average(0)
    assert sum(1 for _ in itertools.takewhile(interrupted_at, itertools.count(step=3))) > 100
    assert all(map(torch.equal, run(1), plain))


def test_e_outlives_inference_mode(case):
    expected, emag = trajectory(case, case.emag()), case.emag()
    for step, mode in enumerate([torch.inference_mode, torch.no_grad, torch.inference_mode, torch.enable_grad]):
        with mode(), emag.observe():
            case.model(*case.inputs(step))
        with torch.no_grad(), emag.perturb():
            assert torch.equal(case.model(*case.inputs(step)), expected[step])


def peak(run: Callable, *inputs: Tensor) -> int:
    """The most bytes that are allocated on the CPU at once in run(*inputs)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run(*inputs)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]))


def memory(grid: int, heads: int, layers, **options) -> list[int]:
    """Peak bytes above the plain model for two samples of grid² tokens, in the first observed step and in the next."""
    model = randomised(DiT(input_size=grid, patch_size=1, in_channels=1, hidden_size=32, depth=3, num_heads=heads,
                           num_classes=1, learn_sigma=False)).float()
    emag, extra = EMAG(model.blocks, layers, **options), []

    def guided(*inputs: Tensor):
        with emag.observe():
            model(*inputs)
        with emag.perturb():
            model(*inputs)

    for t in (0.0, 100.0):
        inputs = torch.full((2, 1, grid, grid), 0.5), torch.tensor([t, t]), torch.tensor([0, 0])
        plain = peak(model, *inputs)
        extra.append(peak(guided, *inputs) - plain)
    return extra


def test_memory_is_the_average_and_one_chunk_and_with_emag_q_no_map(monkeypatch):
    one_map = 2 * 4 * 576**2                                                # bytes of one head's maps of 24² tokens
    monkeypatch.setattr("emag.CHUNK", 2 * 576**2)
    first, later = memory(24, 8, [1, 2])
    average = 2 * 8 * one_map
    assert average < first < average + 5 * one_map and later < 5 * one_map  # E is allocated in the first step
    few, many = (memory(grid, 2, [1], variant="query")[0] for grid in (24, 48))
    assert many < 5 * few and few < one_map                                 # four times as many tokens: linear is four
    query, key = seeded(3, 8, 24, 5), seeded(3, 8, 48, 5)
    monkeypatch.setattr("emag.CHUNK", 3 * 2 * 24 * 48 + 1)                  # maps of two heads, of the whole batch
    assert emag_module._AttentionCall(query, key, key).head_chunks() == [slice(n, n + 2) for n in (0, 2, 4, 6)]


@pytest.mark.parametrize("options, message", [
    (dict(layers=[]), "need at least one"), (dict(layers=[5]), "of 0…4"), (dict(layers=[-1]), "of 0…4"),
    (dict(beta=1.1), "0 ≤ beta ≤ 1"), (dict(beta=-0.1), "0 ≤ beta ≤ 1"), (dict(strength=2), "0 ≤ strength ≤ 1"),
    (dict(strength=math.nan), "0 ≤ strength ≤ 1"), (dict(threshold=math.nan), "threshold is nan"),
    (dict(variant="blur"), "need 'map'"), (dict(ema_dtype=torch.bfloat16), "8 bits"),
    (dict(ema_dtype=torch.int64), "need float32")])
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        EMAG(small_dit().blocks, **(dict(layers=[1]) | options))


# ------------------------------------------------------------------------------ machinery: attention calls as they are

SDPA = F.scaled_dot_product_attention


class Attends(nn.Module):
    """A block that is attention alone; its values are the identity, so that what it gives is the map, (B, 4, N, N)."""

    def __init__(self, attend: Callable):
        super().__init__()
        self.attend = attend

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k = heads_of(x)
        return self.attend(q, k, torch.eye(x.shape[1], dtype=x.dtype).expand(*q.shape[:2], -1, -1), mask)


def heads_of(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, 4, -1)).permute(2, 0, 3, 1, 4)


def attend_inputs(step: int) -> Tensor:
    return torch.stack([2 * seeded(6, 40, seed=100 * b + step) for b in range(3)])


def observed(emag: EMAG, block: nn.Module, *steps: int) -> Tensor:
    """What the block gives in the last of these steps."""
    for step in steps:
        with emag.observe():
            clean = block(attend_inputs(step))
    return clean


def assert_slow_emag(emag: EMAG, slow: SlowEMAG, block: Callable, rows=slice(None)) -> tuple[Tensor, Tensor]:
    """As `test_emag_is_slow_emag`, for one block; gives its last output, for `rows`, and negative."""
    for step in range(3):
        x = attend_inputs(step)
        with emag.observe(rows):
            clean = block(x)[rows]
        torch.testing.assert_close(clean, slow.clean(x[rows]))
        torch.testing.assert_close(emag.deviation, torch.tensor(slow.deviation, dtype=F64))
        torch.testing.assert_close(emag.average(0), slow.ema[0])
        for again in range(2):
            with emag.perturb():
                negative = block(x[rows])
        torch.testing.assert_close(negative, slow.negative(x[rows]))
    assert (negative - clean).abs().max() > 1e-3
    return clean, negative


def general_map(q: Tensor, k: Tensor, scale: float = 5**-0.5, mask: Tensor = torch.zeros(()), group: int = 1) -> Tensor:
    """With a scale, an additive mask and grouped heads; a row of which every key is masked is 0."""
    k = torch.stack([k[:, head - head % group] for head in range(4)], dim=1)
    weights = (scale * torch.einsum("bhqd,bhkd->bhqk", q, k) + mask).exp()
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)


def hand_made(softmax: Callable) -> Callable:
    return lambda query, key, value, mask=None: softmax(query @ key.mT / math.sqrt(query.shape[-1])) @ value


SOFTMAX = {"torch.softmax": lambda x: torch.softmax(x, -1), "Tensor.softmax": lambda x: x.softmax(dim=-1),
           "F.softmax": lambda x: F.softmax(x, dim=x.ndim - 1), "nn.Softmax": nn.Softmax(dim=-1)}
KEPT = torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(1)) < 0.7
NONE_KEPT = KEPT | torch.eye(6, dtype=torch.bool)
NONE_KEPT[0, :, 1:3], NONE_KEPT[2, :, :, 4:] = False, False              # rows without a key, and keys that nobody sees
EVERY_HEAD = seeded(4, 6, 6, seed=2)
CALLS = {                                                        # name: (the call, its map's arguments, its mask input)
    "positional": (lambda q, k, v, mask: SDPA(q, k, v), {}, None),
    "keywords": (lambda q, k, v, mask: SDPA(value=v, key=k, query=q, dropout_p=0.0), {}, None),
    "boolean mask": (lambda q, k, v, mask: SDPA(q, k, v, mask), {}, KEPT | torch.eye(6, dtype=torch.bool)),
    "additive mask": (lambda q, k, v, mask: SDPA(q, k, v, attn_mask=EVERY_HEAD), dict(mask=EVERY_HEAD), None),
    "additive mask for all heads": (lambda q, k, v, mask: SDPA(q, k, v, EVERY_HEAD[0]), dict(mask=EVERY_HEAD[0]), None),
    "boolean mask, rows without a key": (lambda q, k, v, mask: SDPA(q, k, v, mask), {}, NONE_KEPT),
    "additive mask, rows without a key": (lambda q, k, v, mask: SDPA(q, k, v, mask), {}, NONE_KEPT.double().log()),
    "scale": (lambda q, k, v, mask: SDPA(q, k, v, scale=0.3), dict(scale=0.3), None),
    "grouped heads": (lambda q, k, v, mask: SDPA(q, k[:, ::2], v[:, ::2], enable_gqa=True), dict(group=2), None),
    "after a cross-attention": (lambda q, k, v, mask: (SDPA(q, k[:, :, :3], v[:, :, :3]), SDPA(q, k, v))[1], {}, None),
    "after a softmax over queries": (lambda q, k, v, mask: (F.softmax(q @ k.mT, -2), SDPA(q, k, v))[1], {}, None),
    "by hand, after a softmax over queries": (lambda q, k, v, mask: (
        torch.softmax(q @ k.mT, dim=2), hand_made(SOFTMAX["torch.softmax"])(q, k, v))[1], {}, None),
    "by hand, after a cross-attention": (lambda q, k, v, mask: (
        torch.softmax(q @ k[:, :, :3].mT, dim=-1), hand_made(SOFTMAX["F.softmax"])(q, k, v))[1], {}, None),
    **{f"{name} by hand": (hand_made(softmax), {}, None) for name, softmax in SOFTMAX.items()}}
VARIANTS = [dict(), dict(strength=0.6), dict(image_tokens=slice(2, None)), dict(variant="image"), dict(variant="query"),
            *(dict(variant=variant, image_tokens=tokens, strength=strength) for variant, tokens, strength in (
                ("image", slice(0, 4), 1.0), ("image", slice(2, None), 0.6), ("query", slice(0, 4), 0.6)))]


# Calls of which EMAG reads other arguments come with all variants; the others, only to be seen, with the first.
READ = {"positional", "scale", "grouped heads", "torch.softmax by hand", *(name for name in CALLS if "mask" in name)}


@pytest.mark.parametrize("name, options", [
    (name, options) for name in CALLS for options in VARIANTS
    if (name in READ or not options) and not ("by hand" in name and options.get("variant") == "query")], ids=str)
def test_calls_in_the_wild_are_the_map_of_the_equation(name, options, monkeypatch):
    call, arguments, mask = CALLS[name]
    block = Attends(call)
    emag = EMAG([block], [0], beta=0.7, ema_dtype=F64, **options)
    for rows, chunk in ((slice(None), 2**22), (slice(1, 3), 1)):
        monkeypatch.setattr("emag.CHUNK", chunk)
        some = mask if mask is None else mask[rows]
        if mask is not None:
            arguments = dict(mask=some.double().log() if mask.dtype == torch.bool else some)
        slow = SlowEMAG(lambda x, attend: attend(0, *heads_of(x)), (0,), 0.7, softmax=partial(general_map, **arguments),
                        **options)
        emag.reset()
        clean, negative = assert_slow_emag(emag, slow, lambda x: block(x, mask if len(x) == 3 else some), rows)
        text = [token for token in range(6) if token not in range(6)[options.get("image_tokens") or slice(None)]]
        assert torch.equal(negative[:, :, text], clean[:, :, text])                    # text queries are as they were


def test_a_model_that_attends_by_hand_is_the_one_with_the_fused_kernel(case, monkeypatch):
    fused, emag, inputs = case.emag(strength=0.8), case.emag(strength=0.8), case.inputs
    expected = trajectory(case, fused)
    monkeypatch.setattr(F, "scaled_dot_product_attention", hand_made(SOFTMAX["torch.softmax"]))
    for negative, other in zip(trajectory(case, emag), expected):
        torch.testing.assert_close(negative, other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(emag.deviation, fused.deviation)
    case.model.float()
    case.inputs = lambda step: [part.float() if part.is_floating_point() else part for part in inputs(step)]
    emag = case.emag()                                                            # with an average in float64
    assert trajectory(case, emag)[-1].dtype == torch.float32 and emag.average(1).dtype == F64


@pytest.mark.parametrize("call", [hand_made(SOFTMAX["torch.softmax"]), lambda q, k, v, mask: SDPA(q, k, k)])
def test_gradients_pass_through_a_negative(call):
    """Of values and of text queries: what softmax or the kernel gave is not written to."""
    block, x = Attends(call), attend_inputs(1).requires_grad_()
    for variant in ("map", "image"):
        emag = EMAG([block], [0], image_tokens=slice(0, 4), variant=variant)
        observed(emag, block, 0)
        with emag.observe():
            block(x)
        with emag.perturb():
            grad, = torch.autograd.grad(block(x)[:, :, 4:].square().sum(), x)
        assert grad.abs().max() > 0


@pytest.mark.parametrize("variant", ["map", "query"])
def test_the_first_self_attention_of_a_block_is_meant(variant):
    hand = hand_made(SOFTMAX["nn.Softmax"])
    block = Attends(lambda q, k, v, mask: torch.cat([SDPA(q, k, v), SDPA(k, q, v), hand(q, q, v)], dim=1))
    emag = EMAG([block], [0], ema_dtype=F64, variant=variant)
    clean = observed(emag, block, 0, 1)
    with emag.perturb():
        negative = block(attend_inputs(1))
    assert (negative - clean)[:, :4].abs().max() > 1e-2 and torch.equal(negative[:, 4:], clean[:, 4:])


class Joined(nn.Module):
    """Text attends to text, and image queries to image and text keys: 6 to 9. What it gives are the maps."""
    text = seeded(3, 4, 3, 5, seed=8)

    def forward(self, x: Tensor) -> Tensor:
        (q, k), text = heads_of(x), self.text[:len(x)]
        SDPA(text, text, text)                                                    # 3 queries to 3 keys
        k = torch.cat([k, text], dim=2)
        return SDPA(q, k, torch.eye(k.shape[2], dtype=F64).expand(*q.shape[:2], -1, -1))


@pytest.mark.parametrize("variant", ["map", "query"])
def test_an_attention_that_is_chosen_by_number(variant):
    """After a square call of the text, and with more keys than queries. Following the error's advice leads there."""
    block, options = Joined(), dict(beta=0.8, variant=variant, image_tokens=slice(1, 5))
    with pytest.raises(RuntimeError, match="give attention="):                    # the text's is the same in each step
        observed(EMAG([block], [0]), block, 0, 1)
    emag = EMAG([block], [0], attention=1, ema_dtype=F64, **options)
    assert_slow_emag(emag, SlowEMAG(lambda x, attend: attend(0, heads_of(x)[0], torch.cat(
        [heads_of(x)[1], block.text], dim=2)), (0,), **options), block)
    assert emag.average(0).shape == (3, 4, 4, 9 if variant == "map" else 5)
    block.text = block.text[:, :, :2]
    with pytest.raises(RuntimeError, match=r"call reset\(\)"):                    # fewer keys than before
        observed(emag, block, 3)
    few = Attends(lambda q, k, v, mask: SDPA(q[:, :, :4], k, v))                  # fewer queries than keys
    with pytest.raises(RuntimeError, match="4 queries to 6 keys: attention=0 takes it"):
        observed(EMAG([few], [0]), few, 0)
    emag = EMAG([few], [0], attention=0)                                          # as it says
    observed(emag, few, 0)
    assert emag.average(0).shape == (3, 4, 4, 6)


class Multihead(nn.Module):
    """torch's own attention module, as models use it."""

    def __init__(self, weights: bool):
        super().__init__()
        self.self_attn, self.weights = nn.MultiheadAttention(40, 4, batch_first=True), weights

    def forward(self, x: Tensor) -> Tensor:
        return self.self_attn(x, x, x, need_weights=self.weights)[0]


@pytest.mark.parametrize("fast, grad", [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("make", [partial(Multihead, True), partial(Multihead, False),
                                  partial(nn.TransformerEncoderLayer, 40, 4, 50, batch_first=True)])
def test_torchs_own_attention_modules(make, fast, grad, monkeypatch):
    """By torch's fast path, where it has one, and by the slow one."""
    block = randomised(make(), std=0.3).requires_grad_(grad)

    def by_hand(x, attend):
        q, k, v = (part.unflatten(-1, (4, 10)).transpose(1, 2) for part in
                   F.linear(x, block.self_attn.in_proj_weight, block.self_attn.in_proj_bias).chunk(3, dim=-1))
        h = block.self_attn.out_proj((attend(0, q, k) @ v).transpose(1, 2).flatten(2))
        if isinstance(block, Multihead):
            return h
        h = block.norm1(x + h)
        return block.norm2(h + block.linear2(F.relu(block.linear1(h))))

    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: fast)
    for variant in ("map", "query"):
        with torch.set_grad_enabled(grad):
            assert_slow_emag(EMAG([block], [0], beta=0.7, ema_dtype=F64, variant=variant),
                             SlowEMAG(by_hand, (0,), 0.7, variant=variant), block)


def test_other_queries_keys_or_values_in_the_negative_pass_are_refused():
    block = Attends(lambda q, k, v, offset: SDPA(q + offset[0], k + offset[1], v + offset[2]))
    emag = EMAG([block], [0])
    with emag.observe():
        block(attend_inputs(0), torch.zeros(3))
    for offset in torch.eye(3):
        with pytest.raises(RuntimeError, match="gets other inputs in the negative pass"), emag.perturb():
            block(attend_inputs(0), offset)


def test_a_block_whose_attention_stays_as_it_is_may_be_a_candidate():
    blocks = [Attends(CALLS["positional"][0]) for _ in range(2)]
    emag = EMAG(blocks, [0, 1])
    for step in range(2):
        with emag.observe():
            blocks[0](attend_inputs(0)), blocks[1](attend_inputs(step))
    assert emag.selected.tolist() == [[False, True]] * 3


TEXT = seeded(3, 4, 2, 5, seed=9)
CANNOT = {                                # what a candidate block does, what is said about it, and how EMAG is set
    "causal": (lambda q, k, v, mask: SDPA(q, k, v, is_causal=True), "attends causally"),
    "dropout": (lambda q, k, v, mask: SDPA(q, k, v, dropout_p=0.1), "attends with dropout"),
    "no heads": (lambda q, k, v, mask: SDPA(q[:, 0], k[:, 0], v[:, 0]), r"need \(batch, heads, tokens, channels\)"),
    "none": (lambda q, k, v, mask: v, r"candidate block 0 \(Attends\) made no attention .*set_attention_backend"),
    "none of that number": (CALLS["positional"][0], "made no attention", dict(attention=1)),
    "no queries": (hand_made(SOFTMAX["F.softmax"]), "'query' has no queries", dict(variant="query")),
    "more keys": (lambda q, k, v, mask: SDPA(q[:, :, :4], k, v), "'image'", dict(attention=0, variant="image")),
    "maps of three dimensions": (lambda q, k, v, mask: (q.flatten(0, 1) @ k.flatten(0, 1).mT).softmax(-1),
                                 r"softmax over \(12, 6, 6\).*\(batch, heads, N, N\)"),
    "tokens first": (lambda q, k, v, mask: SDPA(*(x.permute(2, 1, 0, 3) for x in (q, k, v))),
                     "gets 3 samples and attends for 6: .* batch-first"),
    "one call per sample": (lambda q, k, v, mask: [SDPA(*each) for each in zip(*(x.split(1) for x in (q, k, v)))],
                            "gets 3 samples and attends for 1: .* one attention call"),
    "slices of heads": (lambda q, k, v, mask: [(a @ b.mT).softmax(-1) for a, b in zip(*(x.flatten(0, 1).split(3)
                                                                                        for x in (q, k)))],
                        r"softmax over \(3, 6, 6\).*in slices"),
    "the text first": (lambda q, k, v, mask: (SDPA(TEXT, TEXT, TEXT), SDPA(q, k, v)), "give attention="),
    "a sample with infinite queries": (lambda q, k, v, mask: SDPA(torch.cat([q[:2], q[2:] * math.inf]), k, v),
                                       "Δ is not finite"),
}


@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_be_right_says_why(name):
    call, message, *options = CANNOT[name]
    block = Attends(call)
    with pytest.raises(RuntimeError, match=message):
        observed(EMAG([block], [0], **dict(*options)), block, 0, 1)


def test_what_takes_the_place_of_torchs_attention(monkeypatch):
    """A function that calls the kernel in the end is seen there, and acts once. Others are named."""
    block = Attends(lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v))

    def refused(message: str):
        with pytest.raises(RuntimeError, match=message), EMAG([block], [0]).observe():
            block(attend_inputs(0))

    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *rest: SDPA(2 * q, *rest))
    assert runpy.run_path(emag_module.__file__)["FUSED"] is SDPA                   # also if emag.py is imported later
    plain = block(attend_inputs(0))
    with EMAG([block], [0]).observe():
        assert torch.equal(block(attend_inputs(0)), plain)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: q)
    refused("replaces torch's scaled_dot_product")
    refused(r"model.disable_cache\(\)")


class CountFused(torch.overrides.TorchFunctionMode):
    calls, maps = 0, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += func is SDPA
        self.maps += func is Tensor.softmax
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", ["map", "query"])
@pytest.mark.parametrize("reuse", [True, False])
def test_fused_kernels_stay_in_use_and_no_block_runs_before_the_selected_one(reuse, variant):
    case = Case("dit", batch=1)
    emag = case.emag(variant=variant, reuse=reuse)
    trajectory(case, emag, steps=3)
    with CountFused() as clean, emag.observe():
        case.model(*case.inputs(3))
    with CountFused() as negative, emag.perturb():
        case.model(*case.inputs(3))
    first = 1 + emag.selected[0].nonzero().item() if reuse else 0        # Ã·V alone is not the kernel's
    assert (clean.calls, negative.calls) == (5, 5 - first - (variant == "map"))
    assert clean.maps == (3 if variant == "map" else 0) and negative.maps == 0     # with λ = 1, Ã is E


def test_float16_is_only_how_e_is_kept():
    """Maps and Ã·V are made in float32: the logits of sharp maps are not rounded, and large values fit."""
    exact, half = Case("dit"), Case("dit")
    for case in (exact, half):
        for block in case.blocks:
            block.attn.qkv.weight.data *= torch.tensor([8.0, 8.0, 1e6]).repeat_interleave(32)[:, None]
            block.attn.proj.weight.data *= 1e-6
    half.model.float()
    half.inputs = lambda step: [part.float() if part.is_floating_point() else part for part in exact.inputs(step)]
    expected, emag = exact.emag(beta=0.5), EMAG(half.blocks, [1, 2, 3], beta=0.5, ema_dtype=torch.float16)
    for one, two in zip(trajectory(half, emag), trajectory(exact, expected)):
        assert (one - two).norm() < 5e-4 * two.norm()
    assert emag.average(1).dtype == torch.float16


@pytest.mark.parametrize("variant", ["map", "query"])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_models_keep_a_float32_average(autocast, variant):
    exact, half = Case("dit"), Case("dit")
    expected, emag = exact.emag(variant=variant), EMAG(half.blocks, [1, 2, 3], variant=variant)
    reference, dtype = trajectory(exact, expected), torch.float32 if autocast else torch.bfloat16
    half.model.to(dtype)
    half.inputs = lambda step: [part.to(dtype) if part.is_floating_point() else part for part in exact.inputs(step)]
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        negatives = trajectory(half, emag)
    for n in (1, 2, 3):
        assert emag.average(n).dtype == torch.float32
        if variant == "map":                                             # made in float32, not rounded before
            torch.testing.assert_close(emag.average(n).sum(-1), torch.ones(3, 4, 16), rtol=0, atol=1e-5)
    for entry, other in zip(emag.trace[1:], expected.trace[1:]):
        torch.testing.assert_close(entry.deviation, other.deviation, rtol=0.1, atol=0)
    for one, two in zip(negatives, reference):
        assert one.dtype == torch.bfloat16 and (one.double() - two).norm() < 0.1 * two.norm()


@pytest.mark.parametrize("autocast", [True, False])
def test_maps_are_not_rounded_on_the_way(autocast):
    """Under autocast the negative is E; in bfloat16 values of 1 stay 1, since each row of Ã has the sum 1 before it is
    rounded."""
    block = Attends(lambda q, k, v, mask: SDPA(q, k, v if autocast else torch.ones_like(v)))
    emag, dtype = EMAG([block], [0]), torch.float32 if autocast else torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for step in range(2):
            with emag.observe():
                block(attend_inputs(step).to(dtype))
        with emag.perturb():
            negative = block(attend_inputs(1).to(dtype))
    expected = emag.average(0) if autocast else torch.ones(negative.shape, dtype=dtype)
    torch.testing.assert_close(negative, expected, rtol=1e-6, atol=1e-6)


def test_what_counts_as_equal_in_both_passes(case):
    """Rounding does, a batch with another condition does not, also where both are near to each other."""
    old, eps = 1e6 * seeded(1, 400), precision(case.blocks)
    far, further = old + 0.03 * old.roll(1, 1), old + 0.1 * old.roll(1, 1)
    assert is_close(old * (1 + 5e-4), old, eps) and not is_close(old, old.expand(9, -1), eps)
    assert not is_close(torch.cat([old.expand(63, -1), 1.1 * old]), old.expand(64, -1), eps)      # one in a batch
    assert not is_close(far, old, eps) and not is_close(old * (1 + 2e-3), old, eps)
    assert is_close(old * 0, old * 0, eps)                               # as a network gives that begins with zeros
    with torch.autocast("cpu", dtype=torch.bfloat16):                    # eight times its precision is 1/16
        assert is_close(far, old, eps) and not is_close(further, old, eps)
        assert is_close(old * 1.012, old, eps, times=2) and not is_close(old * 1.02, old, eps, times=2)
    case.blocks[0].int8 = nn.Parameter(torch.ones(1, dtype=torch.int8), requires_grad=False)
    eps = precision(case.blocks)
    assert is_close(far, old, eps) and not is_close(further, old, eps)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_in_eval_mode_changes_nothing(reentrant):
    from torch.utils.checkpoint import checkpoint
    case = Case("dit")
    case.model.requires_grad_(True)
    plain, emag = trajectory(case, case.emag()), case.emag()
    del case.model.blocks
    case.model.blocks = [partial(checkpoint, block, use_reentrant=reentrant) for block in case.blocks]
    for one, two in zip(trajectory(case, emag), plain):
        torch.testing.assert_close(one, two)
    assert not emag.average(1).requires_grad


def compiled(module: nn.Module, way: str, **options) -> nn.Module:
    return module.compile(**options) or module if way == "module.compile()" else torch.compile(module, **options)


@pytest.mark.parametrize("way, what", [
    ("torch.compile()", "the model"), ("torch.compile()", "each block"), ("module.compile()", "each block"),
    ("module.compile()", "some blocks")])
def test_compiled_is_uncompiled(way, what, monkeypatch):
    """Blocks that were each compiled by module.compile() stay so, but for the candidates; else nothing runs compiled
    inside a pass. The model is one graph; blocks have a break in the attention, such as diffusers' dispatch of kernels
    makes."""
    graphs, results, attend, one_graph = [], [], Attention.forward, what == "the model"
    if not one_graph:
        monkeypatch.setattr(Attention, "forward", lambda *args: (torch._dynamo.graph_break(), attend(*args))[1])
    stay = (way, what) == ("module.compile()", "each block")
    make = torch._dynamo.lookup_backend("aot_eager" if stay else "eager")

    def backend(graph, inputs):                                          # runs of what was compiled are in `graphs`
        return lambda *args, run=make(graph, inputs): graphs.append(1) or run(*args)

    torch._dynamo.reset()
    for compiles in (False, True):
        case = Case("dit")
        if compiles and one_graph:
            case.model = compiled(case.model, way, backend=backend, fullgraph=True)
        elif compiles:
            case.model.blocks = case.blocks = nn.ModuleList(
                compiled(block, way, backend=backend) if n in (0, 2, 4) or "each" in what else block
                for n, block in enumerate(case.blocks))
        off, emag = case.model(*case.inputs(0)), case.emag([1, 2])       # compiled before the hooks come
        assert bool(graphs) == compiles
        five = len(graphs)                                               # of that many blocks
        graphs.clear()
        negatives = trajectory(case, emag)
        # A clean pass runs three blocks compiled, and a negative the last two, and a candidate that nobody chose.
        assert 4 * (3 + 2) / 5 * five <= len(graphs) <= 4 * (3 + 3) / 5 * five if stay else not graphs
        graphs.clear()
        torch.testing.assert_close(case.model(*case.inputs(0)), off)
        assert bool(graphs) == compiles and stance() == "default"        # and compiled again
        results.append([off, *negatives, emag.deviation])                # E advanced once per step
        graphs.clear()
    for one, two in zip(*results):
        torch.testing.assert_close(one, two)
    torch._dynamo.reset()


def test_hooks_that_torch_2_6_to_2_10_would_throw_away(monkeypatch):
    """Those versions, given a function to leave uncompiled, take what it says that it wraps."""
    def innermost_fn(fn):
        while hasattr(fn, "_torchdynamo_orig_callable"):
            fn = fn._torchdynamo_orig_callable
        return fn

    case = Case("dit")
    expected = trajectory(case, case.emag())
    for module in (torch._dynamo.decorators, torch._dynamo.eval_frame):
        monkeypatch.setattr(module, "innermost_fn", innermost_fn, raising=False)
    assert all(map(torch.equal, trajectory(case, case.emag()), expected))


# ------------------------------------------------------------------------------------------------------------ samplers

MEAN, STD = 0.7, 0.4          # the data are one Gaussian, so every prediction is known in closed form


def gaussian_velocity(x, t, step, update=True):
    """E[ε − x₀ | x_t] for x_t = (1−t)·x₀ + t·ε."""
    var = (1 - t) ** 2 * STD**2 + t**2
    off = x - (1 - t) * MEAN
    return t / var * off - (MEAN + (1 - t) * STD**2 / var * off)


def gaussian_noise(x, t, step, update=True):
    """E[ε | x_t] for x_t = √ᾱ·x₀ + √(1−ᾱ)·ε."""
    a = sampler.ALPHAS_BAR[round(1000 * t)].item()
    return math.sqrt(1 - a) / (a * STD**2 + 1 - a) * (x - math.sqrt(a) * MEAN)


@pytest.mark.parametrize("run, predict, counts, order", [
    (sampler.euler, gaussian_velocity, (64, 128, 256), 1), (sampler.heun, gaussian_velocity, (64, 128, 256), 2),
    (sampler.ddim, gaussian_noise, (100, 200, 500), 1)])
def test_samplers_converge_to_the_exact_solution_at_their_order(run, predict, counts, order):
    x, a = seeded(16), sampler.ALPHAS_BAR[-1].item() if run is sampler.ddim else 0.0
    exact = MEAN + STD * (x - math.sqrt(a) * MEAN) / math.sqrt(a * STD**2 + 1 - a)
    errors = [(run(predict, x, [1 - i / n for i in range(n + 1)]) - exact).abs().max().item() for n in counts]
    for (n, error), (m, finer) in pairwise(zip(counts, errors)):
        assert math.log(error / finer) / math.log(m / n) == pytest.approx(order, abs=0.15)
    assert errors[-1] < 0.01


def test_times():
    assert sampler.flow_times(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert sampler.ddpm_times(4) == [1.0, 0.667, 0.334, 0.001, 0.0] and sampler.ddpm_times(1) == [1.0, 0.0]
    assert sampler.alpha_bar(0.0) == 1.0 and sampler.alpha_bar(1.0) == pytest.approx(4.036e-5, rel=1e-3)
    for steps in (10, 50, 250, 1000):             # improved-diffusion's: a stride added up from 0, each sum rounded
        taken, at = [], 0.0
        for _ in range(steps):
            taken.append(round(at))
            at += 999 / (steps - 1)
        times = sampler.ddpm_times(steps)
        assert [round(1000 * t) - 1 for t in times[:-1]] == taken[::-1] and times[-1] == 0.0


def curved(x, t, step=0):
    return torch.sin(3 * x) * (0.5 + t) + 0.1 * x


def test_ddpm_is_the_posterior_written_out():
    """With a learned variance; `test_a_guided_trajectory_against_the_equations_written_out` has the fixed one."""
    steps, x, noises = 12, seeded(2, 3, 2, 2), seeded(12, 2, 3, 2, 2, seed=50)

    def out(x, t, step=0):
        return torch.cat([curved(x, t), torch.tanh(x + 2 * t)], dim=1)

    ours = sampler.ddpm(out, x, sampler.ddpm_times(steps), noise=lambda x, draws=iter(noises): next(draws))

    alphas_bar = [math.prod(1 - (1e-4 + (0.02 - 1e-4) * i / 999) for i in range(end)) for end in range(1001)]
    times = [0, *(round(i * 999 / (steps - 1)) + 1 for i in range(steps))]
    z = x.clone()
    for k in reversed(range(steps)):
        a, a_next = alphas_bar[times[k + 1]], alphas_bar[times[k]]
        beta = 1 - a / a_next                                              # of the respaced process
        eps, v = out(z, times[k + 1] / 1000).chunk(2, dim=1)
        x0 = z / math.sqrt(a) - math.sqrt(1 / a - 1) * eps
        z = beta * math.sqrt(a_next) / (1 - a) * x0 + (1 - a_next) * math.sqrt(1 - beta) / (1 - a) * z
        if k > 0:
            least, most = math.log(beta * (1 - a_next) / (1 - a)), math.log(beta)
            z = z + (((v + 1) * most + (1 - v) * least) / 4).exp() * noises[steps - 1 - k]
    torch.testing.assert_close(ours, z, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("flow, data_share, sign", [
    ("rf", lambda time: 1 - time / 1000, 1), ("sit", lambda time: time, -1), ("repa", lambda time: 1 - time, 1)])
def test_each_flow_has_its_own_time_and_sign(flow, data_share, sign):
    """One Gaussian again: x = s·data + (1−s)·noise, s being a function of the network's time; SiT's velocity is data −
    noise, and that of the others noise − data. The other channels are left out."""
    def model(x, t, y):
        return torch.cat([sign * gaussian_velocity(x, 1 - data_share(t[0].item()), step=0), x], dim=1)

    model.pos_embed = torch.zeros(1, dtype=F64)
    net, start = sampler.network(model, dict(prediction="velocity", flow=flow)), seeded(100, 2, 1, 1)
    out = sampler.euler(lambda x, t, step: net(x, t, start), start, sampler.flow_times(200))
    torch.testing.assert_close(out, MEAN + STD * start, rtol=0, atol=0.02)


def test_noise_depends_on_seed_and_index_alone():
    like, noise = torch.empty(4, 3, 2, 2, dtype=F64), sampler.SampleNoise(5, range(4))
    draws = [noise(like), noise(like), sampler.SampleNoise(6, range(4))(like)]
    alone = sampler.SampleNoise(5, [2])
    assert torch.equal(alone(like[:1])[0], draws[0][2]) and torch.equal(alone(like[:1])[0], draws[1][2])
    assert len(torch.cat(draws).flatten(1).unique(dim=0)) == 12


# ------------------------------------------------------------------------------------------------------------ guidance

RUN = dict(sampler="euler", steps=6, cfg=2.0, emag=2.0, layers=[1, 2, 3], beta=0.9, window=[1.0, 0.8, 0.2], seed=3)


def draw(count: int = 3, batch: int | None = None, model: DiT | None = None, watch=None, **changes) -> Tensor:
    """Samples of a small random DiT that predicts what the sampler needs."""
    settings, batch, parts = sampler.Settings(**RUN | changes), batch or count, []
    meta = dict(prediction="noise" if settings.sampler in ("ddim", "ddpm") else "velocity")
    for start in range(0, count, batch):
        indices = range(start, min(start + batch, count))
        parts.append(sampler.sample(model or small_dit(), meta, [i % 3 for i in indices], indices, settings, watch))
    return torch.cat(parts)


def apg_by_hand(cond: Tensor, null: Tensor, scale: float, d_prev, eta: float, norm: float, momentum: float):
    """The APG paper's algorithm 1, one sample at a time; also gives d."""
    guided, directions = [], []
    for b, each in enumerate(cond):
        d = each - null[b] + (0 if d_prev is None else momentum * d_prev[b])
        directions.append(d)
        d = d * min(1.0, norm / math.sqrt(sum(value**2 for value in d.flatten().tolist())))
        parallel = (d * each).sum() / (each * each).sum() * each
        guided.append(each + (scale - 1) * ((d - parallel) + eta * parallel))
    return torch.stack(guided), directions


def cads_by_hand(y: Tensor, t: float, n: Tensor | None, tau1: float, tau2: float, s: float, psi: float) -> Tensor:
    """The CADS paper's formula, one sample at a time."""
    gamma = 1 if t <= tau1 else 0 if t >= tau2 else (tau2 - t) / (tau2 - tau1)
    if gamma == 1:
        return y
    out = []
    for clean, extra in zip(y, n):
        noisy = math.sqrt(gamma) * clean + s * math.sqrt(1 - gamma) * extra
        ratio = statistics.pstdev(clean.tolist()) / statistics.pstdev(noisy.tolist())
        out.append(psi * ((noisy - noisy.mean()) * ratio + clean.mean()) + (1 - psi) * noisy)
    return torch.stack(out)


GUIDANCE = [(False, 1.0, None, None), (True, 1.0, None, None), (False, 2.5, [0.3, 3.0, -0.5], None),
            (False, 1.0, None, [0.5, 0.95, 0.3, 0.8]), (False, 2.5, [0.3, 3.0, -0.5], [0.5, 0.95, 0.3, 0.8])]


@pytest.mark.parametrize("name, uncond, cfg, apg, cads", [
    *((name, False, 2.5, None, None) for name in ("euler", "heun", "ddim", "ddpm")),
    *((name, *guidance) for name in ("heun", "ddim") for guidance in GUIDANCE)])
def test_a_guided_trajectory_against_the_equations_written_out(name, uncond, cfg, apg, cads):
    """Whole trajectories, sampler and guidance: the oracle shares the table of ᾱ and the noise with the code."""
    model, steps, scale = small_dit(), 6, 2.0
    eta = {"ddim": 0.5, "ddpm": 1.0}.get(name)                            # with a fixed variance DDPM is DDIM at η = 1
    x = draw(sampler=name, steps=steps, cfg=cfg, emag=scale, window=(1.0, 0.8, 0.2), uncond=uncond, apg=apg, cads=cads,
             eta=0.5 if name == "ddim" else 0.0)
    slow, noise = SlowEMAG(partial(dit_by_hand, model), beta=0.9), sampler.SampleNoise(3, range(3))
    z = noise(torch.empty(3, 3, 8, 8, dtype=F64))
    labels = torch.full((3,), 3) if uncond else torch.tensor([0, 1, 2])
    y, directions, of_noise = None, {-1: None}, eta is not None

    def predict(x, t, step, update=True):
        nonlocal y
        times = torch.full((3,), 1000 * t - of_noise)
        left = steps - 1 - step
        observed, perturbed = 1 <= left <= 5, 1 <= left <= 4              # round(0.2·5), round(0.8·5)
        if update:
            embedding = model.y_embedder.embedding_table.weight[labels]
            y = labels if not cads else cads_by_hand(embedding, t, noise(embedding) if t > cads[0] else None, *cads)
        pred = (slow.clean if observed and update else partial(dit_by_hand, model))(x, times, y)
        if perturbed:
            negative = slow.negative(x, times, y)
            pred = negative + scale * (pred - negative)
        if cfg == 1:
            return pred
        pred_null = dit_by_hand(model, x, times, torch.full((3,), 3))
        if not apg:
            return pred_null + cfg * (pred - pred_null)
        a = sampler.ALPHAS_BAR[round(1000 * t)]
        # x = √ᾱ·x̂₀ + √(1−ᾱ)·ε, or x = x̂₀ + t·v
        signal, spread = (a.sqrt(), (1 - a).sqrt()) if of_noise else (1, t)
        denoised = [(x - spread * each) / signal for each in (pred, pred_null)]
        guided, direction = apg_by_hand(*denoised, cfg, directions[step - 1], *apg)
        if update:
            directions[step] = direction
        return (x - signal * guided) / spread

    if of_noise:
        for step, (i, i_next) in enumerate(pairwise([1000, 800, 600, 401, 201, 1, 0])):
            a, a_next = sampler.ALPHAS_BAR[[i, i_next]]
            var = eta**2 * (1 - a_next) / (1 - a) * (1 - a / a_next)
            eps = predict(z, i / 1000, step)
            z = a_next.sqrt() * (z - (1 - a).sqrt() * eps) / a.sqrt() + (1 - a_next - var).sqrt() * eps
            z = z + var.sqrt() * noise(z) if var > 0 else z
    else:
        for step in range(steps):
            t, t_next = 1 - step / steps, 1 - (step + 1) / steps
            v = predict(z, t, step)
            if name == "heun" and step < steps - 1:
                v = (v + predict(z + (t_next - t) * v, t_next, step, update=False)) / 2
            z = z + (t_next - t) * v
    torch.testing.assert_close(x, z, rtol=1e-4, atol=1e-4)                # the sampler keeps E in float32


@pytest.mark.parametrize("cfg, scale, passes", [
    (1.0, 1.0, [[2], [2], [2], [2]]), (2.0, 1.0, [[4], [4], [4], [4]]), (0.0, 1.0, [[4], [4], [4], [4]]),
    (1.0, 2.0, [[2], [2, 2], [2, 2], [2]]), (2.0, 0.0, [[4], [4, 2], [4, 2], [4]])])
def test_a_scale_that_is_off_costs_no_pass_and_changes_no_bit(cfg, scale, passes):
    """And a second trajectory starts anew."""
    case, samples, y, null = Case("dit", batch=2), [], torch.tensor([0, 1]), torch.tensor([2, 3])
    emag, net, drawn = case.emag(), sampler.network(case.model, dict(prediction="velocity")), []
    for repeat in range(2):
        predict = sampler.guided(lambda x, t, y: samples.append(len(x)) or net(x, t, y), y, null, steps=4, cfg=cfg,
                                 emag=emag, emag_scale=scale, window=Window(1.0, 0.67, 0.33))
        for step in range(4):
            samples.clear()
            x, t = case.inputs(step)[0], 0.9 - 0.2 * step
            drawn.append(predict(x, t, step))
            assert samples == passes[step]
            off = net(x, t, y)
            if cfg != 1:
                pred, pred_null = net(torch.cat([x, x]), t, torch.cat([y, null])).chunk(2)
                off = pred_null + cfg * (pred - pred_null)
            assert torch.equal(drawn[-1], off) == (scale == 1 or step in (0, 3))
        assert len(emag.trace) == (0 if scale == 1 else 3)
    assert all(map(torch.equal, drawn[:4], drawn[4:]))


def test_guided_channels():
    """The others stay conditional; APG's norm and projection are those of the guided channels."""
    x, y, null = seeded(2, 4, 4, 4), torch.tensor([0, 1]), torch.tensor([3, 3])

    def net(x, t, y):
        half = t * torch.tanh(x * (1 + 0.1 * y[:, None, None, None])).cumsum(dim=1)
        return torch.cat([half, 2 * half], dim=1)

    cond, at_null = net(x, 0.5, y), net(x, 0.5, null)
    for channels, count in ((3, 3), (None, 4)):                          # all that are noise, and never the variance
        expected = torch.cat([(at_null + 3 * (cond - at_null))[:, :count], cond[:, count:]], dim=1)
        guided = sampler.guided(net, y, null, steps=4, cfg=3.0, channels=channels)
        torch.testing.assert_close(guided(x, 0.5, 0), expected)
    denoised = [x[:, :3] - 0.5 * each[:, :3] for each in (cond, at_null)]
    first, _ = apg_by_hand(*denoised, 3.0, None, 0.0, 1.0, 0.0)
    apg = sampler.APG("velocity", 3.0, 0.0, 1.0, 0.0)
    guided = sampler.guided(net, y, null, steps=1, cfg=3.0, channels=3, combine=apg)
    torch.testing.assert_close(guided(x, 0.5, 0), torch.cat([(x[:, :3] - first) / 0.5, cond[:, 3:]], dim=1))
    model, seen = small_dit(learn_sigma=True), []
    guided = sampler.guided(lambda x, t, y: model(x, torch.full((len(x),), t), y), y, null, steps=3, cfg=3.0,
                            emag=EMAG(model.blocks, [1, 2]), emag_scale=2.0, window=Window(1, 1, 0), watch=seen.append)
    for step in range(3):
        others = guided(seeded(2, 3, 8, 8, seed=step), 900 - 100 * step, step)[:, 3:]
    assert torch.equal(others, seen[-1].clean[:, 3:]) and not torch.allclose(others, seen[-1].negative[:, 3:])


def test_ddpm_gets_the_learned_variance():
    model, noise = small_dit(learn_sigma=True), sampler.SampleNoise(3, range(3))
    expected = sampler.ddpm(lambda x, t, step: dit_by_hand(model, x, torch.full((3,), 1000 * t - 1), torch.arange(3)),
                            noise(torch.empty(3, 3, 8, 8, dtype=F64)), sampler.ddpm_times(6), noise=noise)
    torch.testing.assert_close(draw(model=model, sampler="ddpm", cfg=1.0, emag=1.0), expected)


def test_apg_of_nothing_is_finite():
    nothing = torch.zeros(1, 3, 4, 4)
    assert torch.equal(sampler.apg(nothing, nothing, 3.0, eta=0.5, norm=5.0)[0], nothing.double())


@pytest.mark.parametrize("bounds", [(0.6, 0.9), (0.5, 0.5), (0.0, 1.0), (0.9, 0.95), (0.0, 0.0)])
@pytest.mark.parametrize("psi", [1.0, 0.4, 0.0])
def test_cads_by_hand(bounds, psi):
    y, noise = 0.7 + 2 * seeded(3, 10), seeded(3, 10, seed=1)
    for t in (0.0, 0.3, 0.5, 0.6, 0.75, 0.9, 1.0):
        noisy = sampler.cads(y, t, lambda like: noise, *bounds, 0.25, psi)
        torch.testing.assert_close(noisy, cads_by_hand(y, t, noise, *bounds, 0.25, psi))
    assert sampler.cads(y, bounds[0], pytest.fail, *bounds, 0.25, psi) is y            # γ = 1: nothing is drawn


@pytest.mark.parametrize("changes", [
    dict(variant="query", threshold=0.5), dict(sampler="ddim", eta=0.7, strength=0.5),
    *(dict(sampler=name, cads=[0.3, 0.9, 0.25, 1.0], apg=[0.0, 3.0, -0.5]) for name in ("heun", "ddpm"))], ids=str)
def test_a_sample_does_not_depend_on_its_batch(changes):
    selected = []
    together = draw(4, watch=lambda step: selected.extend(entry.selected for entry in step.emag.trace[-1:]), **changes)
    for batch in (1, 3):
        torch.testing.assert_close(draw(4, batch, **changes), together, rtol=1e-9, atol=1e-9)
    assert any(len(set(map(tuple, each.tolist()))) > 1 for each in selected)       # some chose different blocks


def test_watch_is_told_of_each_step_once_with_its_predictions():
    told, model, labels = [], small_dit(), torch.tensor([0, 1, 2, 3, 3, 3])
    draw(model=model, sampler="heun", watch=told.append)
    assert [(step.step, step.negative is None) for step in told] == [(n, n in (0, 5)) for n in range(6)]
    for step in told:
        both = dit_by_hand(model, torch.cat([step.x, step.x]), torch.full((6,), 1000 * step.t), labels)
        torch.testing.assert_close(torch.cat([step.clean, step.pred_null]), both, rtol=1e-5, atol=1e-5)
        assert step.t == pytest.approx(1 - step.step / 6)
        assert step.negative is None or (step.negative - step.clean).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------------------ settings

CHANGES = dict(sampler="heun", steps=5, cfg=3.0, emag=3.0, layers=[2], beta=0.5, strength=0.5, variant="query", seed=4,
               threshold=0.0, window=[1.0, 0.6, 0.4], guide_channels=2, apg=[0.0, 3.0, -0.5], cads=[0.3, 0.9, 0.25, 1])


def test_every_setting_reaches_the_run():
    plain, others = draw(), {"classes", "num", "batch", "heads", "flow", "dtype", "checkpoint", "weights", "vae"}
    for name, value in CHANGES.items():
        assert not torch.allclose(draw(**{name: value}), plain, rtol=1e-3), name
    assert not torch.equal(draw(cfg=1.0), draw(cfg=1.0, uncond=True))
    assert not torch.equal(draw(sampler="ddim"), draw(sampler="ddim", eta=0.5))
    assert {field.name for field in dataclasses.fields(sampler.Settings)} <= {*CHANGES, "uncond", "eta", *others}


def test_settings_go_through_json_and_stay():
    settings = sampler.Settings(**RUN | CHANGES)
    assert sampler.Settings(**json.loads(json.dumps(dataclasses.asdict(settings)))) == settings
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.steps = 4


# ------------------------------------------------------------------------------------- what the README says is true

README = (HERE / "README.md").read_text(encoding="utf-8")
ROW = r"^\| (.+?) \| `(\w[\w.]*)` \| \[(\w+\.py):(\d+)\]\((\w+\.py)#L(\d+)\) \|"
TABLE = re.findall(ROW, README.replace("\\|", "|"), re.MULTILINE)


def test_the_table_points_at_the_equations():
    """Each row: an equation, a function, and the line where that starts; the equation stands in its docstring."""
    assert len(TABLE) >= 13
    for equation, name, file, line, linked_file, linked_line in TABLE:
        lines = (HERE / file).read_text(encoding="utf-8").splitlines()
        assert (file, line) == (linked_file, linked_line)
        start, body = rf"\s*(def|class) {name.split('.')[-1]}\b", "\n".join(lines[int(line) - 1:int(line) + 24])
        assert re.match(start, body), f"{name} is not at {file}:{line}"
        formulas = re.findall("`(.+?)`", equation)
        assert not formulas or any(formula in body for formula in formulas), f"{equation} is not beside {name}"


@pytest.mark.parametrize("name", [row[1] for row in TABLE])
def test_each_function_of_the_table_is_on_the_way_to_a_picture(name, monkeypatch):
    """Break it, and sampling breaks."""
    *owner, last = name.split(".")
    for module in (emag_module, sampler):
        place = getattr(module, owner[0], None) if owner else module
        if hasattr(place, last):
            monkeypatch.setattr(place, last, lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        for changes in ({}, dict(apg=[0.0, 5.0, -0.5], cads=[0.6, 0.9, 0.1, 1.0])):
            draw(1, threshold=0.5, strength=0.5, **changes)


def snippet(start: str) -> str:
    return next(code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if code.startswith(start))


def test_the_snippet_of_the_class_is_what_guided_does():
    """Each step of a trajectory of six. Observed are r = 3, 2, 1, and perturbed 2, 1."""
    case, model, w, w_e, null = Case("dit", 2), small_dit(depth=16, learn_sigma=True), 2.5, 3.0, torch.full((2,), 3)
    start, step_of = re.fullmatch(r"((?s:.*)emag.reset.*\n)((?s:.*))", snippet("from contextlib")).groups()
    names = dict(model=model, rows=slice(0, 2), w=w, w_e=w_e, n=6, C=3)
    exec(start, names)
    predict = sampler.guided(lambda x, t, y: model(x, torch.full((len(x),), t), y), torch.tensor([0, 1]), null, steps=6,
                             cfg=w, emag=EMAG(model.blocks, range(12, 16)), emag_scale=w_e, window=names["window"])
    for step in range(6):
        x, t, y = case.inputs(step)
        names |= dict(i=step, x=x, t=t, y=y, x2=torch.cat([x, x]), t2=torch.cat([t, t]), y2=torch.cat([y, null]))
        exec(step_of, names)
        torch.testing.assert_close(names["pred"], predict(x, 900 - 100 * step, step)[:, :3])
    assert len(names["emag"].trace) == 3


def test_emag_py_needs_torch_and_the_standard_library_alone():
    source = (HERE / "emag.py").read_text(encoding="utf-8")
    modules = set(re.findall(r"^\s*(?:from|import) (\w+)", source, re.MULTILINE))
    assert "torch" in modules and modules - {"torch"} <= sys.stdlib_module_names
