"""All tests: equations against slow loops, hooks against hand-written forwards, samplers against closed forms and
diffusers, the command line against bad input. Tests that compare with diffusers are skipped where it is not installed.
"""
import argparse
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import sampler
from dit import DIT_SIZES, DiT, LatentDecoder, load_decoder, load_dit, read_checkpoint
from emag import (EMAG, Window, blend, cfg_update, deviation, ema_update, emag_update, guide, select_layers, zscore)

HERE = Path(__file__).resolve().parent
DEMO, EPS = (HERE / "demo" / name for name in ("emoji-flow.pt", "emoji-eps.pt"))
F64 = torch.float64


def seeded(*shape, seed=0, dtype=F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ------------------------------------------------------------------------------------------ equations, by slow loops


def test_attention_ema_over_twenty_steps():
    maps, beta = seeded(20, 2, 3, 5, 5).softmax(-1), 0.9
    ema = None
    for step in range(20):
        ema = ema_update(ema, maps[step], beta)
        # The recursion unrolled: E_t = β^t·A_0 + Σ_{s=1}^{t} (1−β)·β^{t−s}·A_s
        unrolled = beta**step * maps[0] + sum((1 - beta) * beta ** (step - s) * maps[s] for s in range(1, step + 1))
        torch.testing.assert_close(ema, unrolled)


def test_ema_starts_with_a_copy_and_goes_on_in_place():
    first = seeded(1, 2, 3, 3)
    kept = first.clone()
    ema = ema_update(None, first, 0.5)
    assert ema_update(ema, kept + 1, 0.5) is ema
    assert torch.equal(first, kept) and not torch.equal(ema, first)


def test_deviation_is_a_mean_per_sample():
    ema, attn = seeded(3, 2, 4, 5, seed=1), seeded(3, 2, 4, 5, seed=2)
    for b in range(3):
        total = sum(abs(ema[b, h, q, k].item() - attn[b, h, q, k].item())
                    for h in range(2) for q in range(4) for k in range(5))
        assert deviation(ema, attn)[b].item() == pytest.approx(total / (2 * 4 * 5), rel=1e-12)


def test_zscore_by_hand():
    dev = seeded(7, 4).abs()
    for row, z in zip(dev.tolist(), zscore(dev).tolist()):
        mean = sum(row) / 4
        std = math.sqrt(sum((value - mean) ** 2 for value in row) / 4)
        assert z == pytest.approx([(value - mean) / std for value in row], rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_equal_deviations_have_zscore_zero_and_select_the_first(dtype):
    for width in (1, 3, 4, 7):
        dev = seeded(500, 1, dtype=dtype).abs().repeat(1, width)      # many values, since few of them round badly
        assert torch.equal(zscore(dev), torch.zeros_like(dev))
        assert select_layers(dev).tolist() == [[True] + [False] * (width - 1)] * 500


def test_zscore_selection_is_the_argmax_of_the_deviation():
    for width in (1, 2, 3, 4, 8):
        dev = seeded(500, width, seed=width).abs() * 1e-5
        slow = [row.index(max(row)) for row in dev.tolist()]
        assert zscore(dev).argmax(dim=1).tolist() == slow
        assert select_layers(dev).nonzero().tolist() == [[b, n] for b, n in enumerate(slow)]


def test_ties_select_the_first():
    assert select_layers(torch.tensor([[1.0, 3.0, 3.0, 2.0]])).tolist() == [[False, True, False, False]]


def test_threshold_adds_blocks_and_its_bound():
    dev = seeded(200, 4).abs()
    z = zscore(dev)
    for tau in (-0.5, 0.0, 0.8):
        slow = [[value >= tau or value == max(row) for value in row] for row in z.tolist()]
        assert select_layers(dev, tau).tolist() == slow
    # z ≤ √(L−1), reached where one block stands alone, so a larger τ is the argmax.
    for width in (2, 4, 9):
        alone = torch.zeros(1, width, dtype=F64)
        alone[0, 1] = 1
        assert zscore(alone).max().item() == pytest.approx(math.sqrt(width - 1))
        dev = seeded(300, width).abs()
        assert zscore(dev).max() <= math.sqrt(width - 1) + 1e-9
        assert torch.equal(select_layers(dev, math.sqrt(width - 1) + 1e-6), select_layers(dev))


def test_scaling_the_deviation_changes_neither_z_nor_selection():
    dev = seeded(50, 4).abs()
    torch.testing.assert_close(zscore(0.988 * dev), zscore(dev))
    assert torch.equal(select_layers(0.988 * dev, 0.5), select_layers(dev, 0.5))


def test_blend_and_updates_by_hand():
    a, b = seeded(2, 3, seed=1), seeded(2, 3, seed=2)
    for i in range(2):
        for j in range(3):
            p, q = a[i, j].item(), b[i, j].item()
            assert blend(a, b, 0.3)[i, j].item() == pytest.approx(0.7 * p + 0.3 * q)
            assert emag_update(a, b, 2.5)[i, j].item() == pytest.approx(q + 2.5 * (p - q))
            assert cfg_update(a, b, 1.7)[i, j].item() == pytest.approx(q + 1.7 * (p - q))


@pytest.mark.parametrize("steps, observed, perturbed", [
    (1, [0], [0]),                                # r = 0 alone, and every bound rounds to 0
    (2, [0, 1], [0, 1]),                          # bounds 1, 1 and 0 of r = 1, 0
    (28, range(0, 23), range(5, 23)),             # r 27…5 and 22…5
    (250, range(0, 200), range(50, 200)),         # r 249…50 and 199…50
])
def test_window_indices(steps, observed, perturbed):
    window = Window(1.0, 0.8, 0.2)
    assert [i for i in range(steps) if window.observes(i, steps)] == list(observed)
    assert [i for i in range(steps) if window.perturbs(i, steps)] == list(perturbed)


def test_window_of_the_published_dit_settings():
    window = Window(0.6, 0.4, 0.2)                # 250 steps: observe r 149…50, perturb r 100…50
    assert [249 - i for i in range(250) if window.observes(i, 250)] == list(range(149, 49, -1))
    assert [249 - i for i in range(250) if window.perturbs(i, 250)] == list(range(100, 49, -1))


@pytest.mark.parametrize("bounds", [(0.5, 0.8, 0.2), (1.0, 0.2, 0.8), (1.2, 0.8, 0.2), (1.0, 0.8, -0.1)])
def test_window_out_of_order(bounds):
    with pytest.raises(ValueError, match="need 1 ≥ start"):
        Window(*bounds)


# ------------------------------------------------------------- two models, each with a forward written out by hand


def softmax_map(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1]), dim=-1)


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


def dit_by_hand(model: DiT, x: Tensor, t: Tensor, y: Tensor, replace={}) -> tuple[Tensor, dict[int, Tensor]]:
    """DiT's forward with plain attention; `replace` maps (block, sample) to the map used there. Also gives the maps."""
    heads, maps = model.config["num_heads"], {}
    h = model.x_embedder(x) + model.pos_embed
    c = model.t_embedder(t) + (y if y.is_floating_point() else model.y_embedder(y))
    for n, block in enumerate(model.blocks):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
            part[:, None] for part in block.adaLN_modulation(c).chunk(6, dim=1))
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2)
                   for part in block.attn.qkv(block.norm1(h) * (1 + scale_a) + shift_a).chunk(3, dim=-1))
        maps[n] = softmax_map(q, k)
        used = torch.stack([replace.get((n, b), maps[n][b]) for b in range(len(x))])
        h = h + gate_a * block.attn.proj((used @ v).transpose(1, 2).flatten(2))
        h = h + gate_m * block.mlp(block.norm2(h) * (1 + scale_m) + shift_m)
    shift, scale = (part[:, None] for part in model.final_layer.adaLN_modulation(c).chunk(2, dim=1))
    h = model.final_layer.linear(model.final_layer.norm_final(h) * (1 + scale) + shift)
    p, grid = model.patch_size, x.shape[-1] // model.patch_size
    out = torch.zeros(len(x), h.shape[-1] // p**2, *x.shape[2:], dtype=h.dtype)
    for token in range(grid**2):
        row, column = p * (token // grid), p * (token % grid)
        out[:, :, row:row + p, column:column + p] = h[:, token].unflatten(-1, (p, p, -1)).permute(0, 3, 1, 2)
    return out, maps


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
        return hidden + self.co(out.transpose(1, 2).flatten(2)), {"context": context + 0.1 * context.tanh(),
                                                                  "shift": torch.full((1,), 0.05, dtype=F64)}


class WildModel(nn.Module):
    """Blocks like those in other code bases; early outputs reach late blocks, and the stream is changed in place."""

    def __init__(self, dim: int = 16, heads: int = 2, depth: int = 5):
        super().__init__()
        self.layers_ = nn.ModuleList(WildBlock(dim, heads) for _ in range(depth))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        skips = []
        for block in self.layers_:
            x, extra = block(hidden=x, context=context)
            context = extra["context"]
            skips.append(x)
            x += extra["shift"]                    # in place: what the block gave is changed after the fact
        return x + sum(skips[:2])

    def by_hand(self, x: Tensor, context: Tensor, replace={}) -> tuple[Tensor, dict[int, Tensor]]:
        skips, maps = [], {}
        for n, block in enumerate(self.layers_):
            maps[n] = softmax_map(block.split(block.q(x)), block.split(block.k(x)))
            used = torch.stack([replace.get((n, b), maps[n][b]) for b in range(len(x))])
            x = x + block.o((used @ block.split(block.v(x))).transpose(1, 2).flatten(2))
            cross = softmax_map(block.split(block.cq(x)), block.split(block.ck(context)))
            x = x + block.co((cross @ block.split(block.cv(context))).transpose(1, 2).flatten(2))
            context = context + 0.1 * context.tanh()
            x = x + 0.05
            skips.append(x)                        # the in-place addition reaches the skip as well
        return x + sum(skips[:2]), maps


class Case:
    """A model, its blocks, its forward by hand, and inputs for each step of a trajectory: `batch` samples from 0 on."""

    def __init__(self, name: str, batch: int = 3, seed: int = 0):
        self.name, self.batch = name, batch
        if name == "dit":
            self.model = small_dit(seed)
            self.blocks, self.by_hand = self.model.blocks, lambda *args, **kw: dit_by_hand(self.model, *args, **kw)
        else:
            self.model = randomised(WildModel(), seed, std=0.4)
            self.blocks, self.by_hand = self.model.layers_, self.model.by_hand

    def inputs(self, step: int) -> tuple[Tensor, ...]:
        if self.name == "dit":
            x = torch.stack([seeded(3, 8, 8, seed=100 * b + step) for b in range(self.batch)])
            return x, torch.full((self.batch,), 900.0 - 100 * step, dtype=F64), torch.arange(self.batch) % 4
        return (torch.stack([seeded(9, 16, seed=100 * b + step) for b in range(self.batch)]),
                torch.stack([seeded(7, 16, seed=5000 + b) for b in range(self.batch)]))

    def emag(self, layers=(1, 2, 3), **options) -> EMAG:
        return EMAG(self.blocks, layers, ema_dtype=F64, **options)


@pytest.fixture(params=["dit", "wild"])
def case(request) -> Case:
    return Case(request.param)


class SlowEMAG:
    """The equations of METHOD for any `by_hand` forward, a sample at a time, nothing shared with emag.py."""

    def __init__(self, case: Case, layers, beta=0.988, strength=1.0, threshold=None):
        self.case, self.layers, self.beta, self.strength, self.threshold = case, layers, beta, strength, threshold
        self.ema, self.selected, self.deviation = {}, [], []

    def clean(self, *inputs) -> Tensor:
        pred, self.maps = self.case.by_hand(*inputs)
        self.selected, self.deviation = [], []
        for b in range(len(pred)):
            for n in self.layers:
                attn = self.maps[n][b]
                old = self.ema.get((n, b))
                self.ema[n, b] = attn if old is None else self.beta * old + (1 - self.beta) * attn
            dev = [(self.ema[n, b] - self.maps[n][b]).abs().mean().item() for n in self.layers]
            mean = sum(dev) / len(dev)
            std = math.sqrt(sum((d - mean) ** 2 for d in dev) / len(dev))
            z = [0.0 if std < 1e-15 else (d - mean) / std for d in dev]
            best = z.index(max(z))
            self.selected.append([n for i, n in enumerate(self.layers)
                                  if i == best or (self.threshold is not None and z[i] >= self.threshold)])
            self.deviation.append(dev)
        return pred

    def negative(self, *inputs) -> Tensor:
        replace = {(n, b): (1 - self.strength) * self.maps[n][b] + self.strength * self.ema[n, b]
                   for b, chosen in enumerate(self.selected) for n in chosen}
        return self.case.by_hand(*inputs, replace=replace)[0]


# ----------------------------------------------------------------------------------------------------------- the hooks


@pytest.mark.parametrize("options", [{}, {"strength": 0.4}, {"threshold": 0.0}, {"threshold": 0.0, "strength": 0.7}])
@pytest.mark.parametrize("reuse", [True, False])
def test_the_negative_is_that_of_a_forward_written_by_hand(case, options, reuse):
    emag, slow = case.emag(beta=0.8, reuse=reuse, **options), SlowEMAG(case, (1, 2, 3), beta=0.8, **options)
    seen = set()
    for step in range(6):
        with emag.observe():
            pred = case.model(*case.inputs(step))
        torch.testing.assert_close(pred, slow.clean(*case.inputs(step)))
        with emag.perturb():
            negative = case.model(*case.inputs(step))
        with emag.perturb():
            assert torch.equal(case.model(*case.inputs(step)), negative)         # and once more
        torch.testing.assert_close(negative, slow.negative(*case.inputs(step)))
        torch.testing.assert_close(emag.deviation, torch.tensor(slow.deviation, dtype=F64))
        chosen = [[n for n, is_chosen in zip((1, 2, 3), row) if is_chosen] for row in emag.selected.tolist()]
        assert chosen == slow.selected
        seen.add(tuple(map(tuple, chosen)))
        if step > 0:
            assert (negative - pred).abs().max() > 1e-3 * pred.abs().max()
    # The samples of one batch disagree about the block at some step, else this test shows less than it says.
    assert any(len(set(rows)) > 1 for rows in seen)


def test_observe_leaves_the_clean_pass_bit_for_bit(case):
    plain = case.model(*case.inputs(0))
    with case.emag().observe(slice(0, 1)):
        assert torch.equal(case.model(*case.inputs(0)), plain)


def test_reuse_runs_no_block_before_the_selected_one(case):
    emag, ran = case.emag(), []
    for n, block in enumerate(case.blocks):
        linear = block.attn.qkv if case.name == "dit" else block.q
        linear.register_forward_hook(lambda module, args, out, n=n: ran.append(n))
    for step in range(2):
        with emag.observe():
            case.model(*case.inputs(step))
    ran.clear()
    with emag.perturb():
        case.model(*case.inputs(1))
    first = 1 + emag.selected.nonzero()[:, 1].min().item()
    assert ran == list(range(first, 5))


@pytest.mark.parametrize("name", ["dit", "wild"])
def test_observed_rows_alone_count(name):
    """Half of a doubled batch observed, the negative made from that half: as if the other half were not there."""
    for rows in (slice(0, 3), slice(3, 6), torch.tensor([0, 2, 4])):
        double, single = Case(name, batch=6), Case(name, batch=6)
        emag, alone = double.emag(), single.emag()
        for step in range(3):
            picked = [part[rows] for part in double.inputs(step)]
            with emag.observe(rows):
                double.model(*double.inputs(step))
            with alone.observe():
                single.model(*picked)
            with emag.perturb():
                negative = double.model(*picked)
            with alone.perturb():
                torch.testing.assert_close(negative, single.model(*picked))
        torch.testing.assert_close(emag.deviation, alone.deviation)


def test_strength_zero_is_the_clean_prediction(case):
    emag = case.emag(strength=0.0)
    for step in range(3):
        with emag.observe():
            pred = case.model(*case.inputs(step))
        with emag.perturb():
            torch.testing.assert_close(case.model(*case.inputs(step)), pred)


def trajectory(case: Case, emag: EMAG, steps: int = 4) -> list[Tensor]:
    negatives = []
    for step in range(steps):
        with emag.observe():
            case.model(*case.inputs(step))
        with emag.perturb():
            negatives.append(case.model(*case.inputs(step)))
    return negatives


def test_two_runs_after_reset_agree_exactly(case):
    emag = case.emag()
    first, devs = trajectory(case, emag), [entry.deviation for entry in emag.trace]
    emag.reset()
    assert emag.trace == []
    for one, two in zip(first, trajectory(case, emag)):
        assert torch.equal(one, two)
    assert all(torch.equal(entry.deviation, dev) for entry, dev in zip(emag.trace, devs)) and len(emag.trace) == 4


def test_the_trace_is_on_the_cpu_and_the_properties_are_its_last_entry(case):
    emag = case.emag()
    with pytest.raises(RuntimeError, match="nothing was observed yet"):
        emag.deviation
    trajectory(case, emag)
    for name in ("deviation", "zscore", "selected"):
        assert getattr(emag, name) is getattr(emag.trace[-1], name)
        assert getattr(emag, name).shape == (3, 3) and getattr(emag, name).device.type == "cpu"
    torch.testing.assert_close(emag.zscore, zscore(emag.deviation))
    assert torch.equal(emag.trace[0].zscore, torch.zeros(3, 3, dtype=F64))         # E = A at the first observed step
    assert emag.trace[0].selected.tolist() == [[True, False, False]] * 3


def test_update_false_advances_neither_ema_nor_deviation(case):
    """Heun's second evaluation: another clean pass, guided with the step's own E and selection."""
    emag, slow = case.emag(beta=0.8), SlowEMAG(case, (1, 2, 3), beta=0.8)
    for step in (0, 1, 2):
        with emag.observe():
            case.model(*case.inputs(step))
        slow.clean(*case.inputs(step))
        with emag.observe(update=False):
            case.model(*case.inputs(10 + step))
        with emag.perturb():
            negative = case.model(*case.inputs(10 + step))
        torch.testing.assert_close(negative, slow.negative(*case.inputs(10 + step)))
    assert len(emag.trace) == 3


def forwards(model: nn.Module) -> list:
    return [(name, "forward" in vars(module), len(module._forward_hooks), len(module._forward_pre_hooks))
            for name, module in model.named_modules()]


def test_hooks_are_gone_after_normal_exit_and_after_an_exception(case):
    before, plain, emag = forwards(case.model), case.model(*case.inputs(0)), case.emag()
    trajectory(case, emag)
    assert forwards(case.model) == before
    for candidate in (True, False):
        # In the middle of a block: after its attention was caught, before it returns.
        module = case.blocks[2 if candidate else 0]
        module = module.attn.proj if case.name == "dit" else module.o
        handle = module.register_forward_hook(lambda *args: 1 / 0)
        for context in (emag.observe, emag.perturb):
            with pytest.raises(ZeroDivisionError), context():
                case.model(*case.inputs(0))
                raise ZeroDivisionError            # a perturb that reuses block 0 does not run into the hook
            emag.reset()
            handle.remove()
            trajectory(case, emag, steps=1)
            handle = module.register_forward_hook(lambda *args: 1 / 0)
        handle.remove()
    assert forwards(case.model) == before
    assert torch.equal(case.model(*case.inputs(0)), plain)


def test_a_forward_somebody_else_put_on_a_block_comes_back(case):
    calls, block = [], case.blocks[1]
    original = block.forward
    block.forward = mine = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    trajectory(case, case.emag(), steps=2)
    assert block.forward is mine and calls


def test_no_negative_from_half_a_pass(case):
    emag = case.emag()
    trajectory(case, emag, steps=1)
    with pytest.raises(ZeroDivisionError), emag.observe():
        case.model(*case.inputs(1))
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="needs a clean pass"), emag.perturb():
        pass


def test_blocks_that_were_not_chosen_are_untouched():
    """Only the block with the replaced map differs from the clean pass, given the input it got."""
    case = Case("dit", batch=1)
    emag = case.emag()
    for step in range(3):
        with emag.observe():
            case.model(*case.inputs(step))
    seen = {}
    handles = [block.register_forward_hook(lambda module, args, out, n=n: seen.update({n: (args, out)}))
               for n, block in enumerate(case.blocks)]
    with emag.perturb():
        case.model(*case.inputs(2))
    for handle in handles:
        handle.remove()
    chosen = [1 + column for column in emag.selected[0].nonzero()[:, 0].tolist()]
    for n, (args, out) in seen.items():
        agrees = torch.allclose(case.blocks[n](*args), out, rtol=1e-9, atol=1e-9)
        if n >= chosen[0]:
            assert agrees == (n not in chosen), f"block {n}, chosen {chosen}"


class NoAttention(nn.Module):
    def forward(self, x):
        return x


def test_a_candidate_without_self_attention_is_an_error_that_names_it(case):
    blocks = [*case.blocks[:2], NoAttention()]
    emag = EMAG(blocks, [2])
    with pytest.raises(RuntimeError, match=r"candidate block 2 \(NoAttention\) made no self-attention"), emag.observe():
        blocks[2](torch.zeros(1, 4))
    with pytest.raises(RuntimeError, match="candidate block 1 did not run"), EMAG(blocks, [1]).observe():
        pass


class CrossOnly(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x[:, :, :3], x[:, :, :3])


def test_cross_attention_does_not_count():
    block = CrossOnly()
    with pytest.raises(RuntimeError, match="made no self-attention"), EMAG([block], [0]).observe():
        block(torch.zeros(1, 1, 4, 8))


def test_wrong_use_is_one_clear_line(case):
    emag = case.emag()
    with pytest.raises(RuntimeError, match="nothing was observed yet"), emag.perturb():
        pass
    with pytest.raises(RuntimeError, match="ran twice"), emag.observe():
        case.model(*case.inputs(0))
        case.model(*case.inputs(0))
    emag.reset()
    trajectory(case, emag, steps=2)
    for reuse in (True, False):
        emag.reuse = reuse
        with emag.observe():
            case.model(*case.inputs(0))
        with pytest.raises(RuntimeError, match="got 2 samples, 3 were observed"), emag.perturb():
            case.model(*(part[:2] for part in case.inputs(0)))
    with pytest.raises(RuntimeError, match="did not run inside perturb"), emag.perturb():
        pass
    with pytest.raises(RuntimeError, match="call reset"), emag.observe(slice(0, 2)):
        case.model(*case.inputs(0))
    for token in (-1, 3):
        with pytest.raises(RuntimeError, match="one of the 3 image tokens"), \
                case.emag(query_token=token, image_tokens=slice(2, 5)).observe():
            case.model(*case.inputs(0))


@pytest.mark.parametrize("options, message", [
    (dict(layers=[]), "need at least one"), (dict(layers=[5]), "of 0…4"), (dict(layers=[-1]), "of 0…4"),
    (dict(beta=1.1), "0 ≤ beta ≤ 1"), (dict(beta=-0.1), "0 ≤ beta ≤ 1"), (dict(strength=2), "0 ≤ strength ≤ 1"),
    (dict(variant="blur"), "need 'map'"), (dict(ema_dtype=torch.bfloat16), "8 bits"),
])
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        EMAG(small_dit().blocks, **(dict(layers=[1]) | options))


def test_few_heads_at_a_time_gives_the_same(case, monkeypatch):
    whole = trajectory(case, case.emag())
    monkeypatch.setattr("emag.CHUNK", 1)
    for one, two in zip(whole, trajectory(case, case.emag())):
        torch.testing.assert_close(one, two)


@contextmanager
def allocations():
    """Yields a list that holds, afterwards, the most bytes that were allocated on the CPU at once inside."""
    peak = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield peak
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    peak.append(int(live.max()))


def test_observe_holds_the_average_and_one_chunk(monkeypatch):
    """Peak memory above the plain model is E plus a few chunks; four times E would fail by far."""
    model = DiT(input_size=32, patch_size=1, in_channels=1, hidden_size=32, depth=4, num_heads=8, num_classes=1,
                learn_sigma=False).eval().requires_grad_(False)
    inputs = torch.zeros(1, 1, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    one_map = 4 * 1024**2                                                   # bytes of one head's map of 1024 tokens
    monkeypatch.setattr("emag.CHUNK", 1024**2)
    with allocations() as plain:
        model(*inputs)
    emag = EMAG(model.blocks, [1, 2])
    with allocations() as first, emag.observe():
        model(*inputs)
    with allocations() as later:
        with emag.observe():
            model(*inputs)
        with emag.perturb():
            model(*inputs)
    average = 2 * 8 * one_map
    assert average < first[0] - plain[0] < average + 5 * one_map            # E is allocated at the first step
    assert later[0] - plain[0] < 5 * one_map                                # and later only chunks are


# ----------------------------------------------------------------------------------------------------- per sample


def draw(model, meta, count, batch, **changes) -> tuple[Tensor, Tensor]:
    settings = dict(sampler="euler", steps=6, cfg=2.0, emag=2.0, layers=[1, 2, 3], beta=0.9, strength=1.0,
                    window=[1.0, 0.8, 0.2], seed=3) | changes
    parts = []
    for start in range(0, count, batch):
        indices = range(start, min(start + batch, count))
        x, emag = sampler.sample(model, meta, [i % model.null_class for i in indices], indices, settings)
        parts.append((x, torch.stack([entry.selected for entry in emag.trace], dim=1)))
    return torch.cat([x for x, _ in parts]), torch.cat([selected for _, selected in parts])


@pytest.mark.parametrize("which", ["random", "demo"])
def test_a_sample_does_not_depend_on_its_batch(which):
    if which == "demo":
        model, meta = load_dit(DEMO)
        settings = meta["settings"] | dict(steps=8)
        tolerance = 1e-3                                                    # float32 network, images in [−1, 1]
    else:
        model, meta, settings, tolerance = small_dit(), dict(prediction="velocity"), {}, 1e-9
    together, selected = draw(model, meta, 6, 6, **settings)
    for batch in (1, 4, 2):
        apart, selected_apart = draw(model, meta, 6, batch, **settings)
        torch.testing.assert_close(apart, together, rtol=0, atol=tolerance)
        assert torch.equal(selected_apart, selected)
    # At some step the samples of the batch chose different blocks.
    assert any(len(set(map(tuple, step.tolist()))) > 1 for step in selected.unbind(dim=1))


def test_different_blocks_for_different_samples_by_construction():
    """Sample 0's map moves in block 1 only, sample 1's in block 3 only: each is perturbed there and nowhere else."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(WildBlock(16, 2) for _ in range(5)).double()
    context = seeded(2, 7, 16)
    still = seeded(2, 9, 16)

    def run(moves: dict[int, Tensor]) -> Tensor:
        out = []
        for n, block in enumerate(blocks):
            out.append(block(hidden=moves.get(n, still), context=context)[0])
        return torch.stack(out, dim=1)

    moved = still + seeded(2, 9, 16, seed=1)
    first = torch.stack([moved[0], still[1]])
    third = torch.stack([still[0], moved[1]])
    emag = EMAG(blocks, [1, 2, 3], reuse=False, ema_dtype=F64)
    with torch.no_grad():
        for moves in ({}, {1: first, 3: third}):
            with emag.observe():
                pred = run(moves)
        with emag.perturb():
            negative = run({1: first, 3: third})
    assert emag.selected.tolist() == [[True, False, False], [False, False, True]]
    changed = (negative - pred).abs().amax(dim=(2, 3)) > 1e-6
    assert changed.tolist() == [[False, True, False, False, False], [False, False, False, True, False]]


# ------------------------------------------------------------------------------------------------- guided prediction


def toy_net(x: Tensor, t: float, y: Tensor) -> Tensor:
    return torch.tanh(x * (1 + 0.1 * y[:, None, None, None])) * t


def test_guided_is_plain_or_cfg_where_emag_is_off():
    x, y, null = seeded(2, 3, 4, 4), torch.tensor([0, 1]), torch.tensor([3, 3])
    plain, at_null = toy_net(x, 0.5, y), toy_net(x, 0.5, null)
    assert torch.equal(sampler.guided(toy_net, y, null, steps=4)(x, 0.5, 0), plain)
    torch.testing.assert_close(sampler.guided(toy_net, y, null, steps=4, cfg=3.0)(x, 0.5, 0),
                               at_null + 3 * (plain - at_null))


def counting(net):
    def wrapped(x, t, y):
        wrapped.samples.append(len(x))
        return net(x, t, y)
    wrapped.samples = []
    return wrapped


@pytest.mark.parametrize("cfg, scale, passes", [
    (1.0, 1.0, [[2], [2], [2], [2]]), (2.0, 1.0, [[4], [4], [4], [4]]),
    (1.0, 2.0, [[2], [2, 2], [2, 2], [2]]), (2.0, 0.0, [[4], [4, 2], [4, 2], [4]])])
def test_a_scale_that_is_off_costs_no_pass(cfg, scale, passes):
    case = Case("dit", batch=2)
    net = counting(sampler.network(case.model, dict(prediction="velocity")))
    predict = sampler.guided(net, torch.tensor([0, 1]), torch.tensor([3, 3]), steps=4, cfg=cfg, emag=case.emag(),
                             emag_scale=scale, window=Window(1.0, 0.67, 0.33))
    for step in range(4):
        net.samples.clear()
        predict(case.inputs(0)[0], 0.9 - 0.2 * step, step)
        assert net.samples == passes[step]


def apg_by_hand(cond: Tensor, null: Tensor, scale: float, d_prev, eta: float, norm: float, momentum: float):
    """METHOD's section 6, a sample at a time, with the sums written out; also gives d."""
    guided, directions = [], []
    for b in range(len(cond)):
        d = cond[b] - null[b] + (0 if d_prev is None else momentum * d_prev[b])
        directions.append(d)
        length = math.sqrt(sum(value**2 for value in d.flatten().tolist()))
        d = d * min(1.0, norm / length)
        parallel = (d * cond[b]).sum() / (cond[b] * cond[b]).sum() * cond[b]
        guided.append(cond[b] + (scale - 1) * ((d - parallel) + eta * parallel))
    return torch.stack(guided), directions


def cads_by_hand(y: Tensor, t: float, n: Tensor | None, tau1: float, tau2: float, s: float, psi: float) -> Tensor:
    """METHOD's section 6, a number at a time."""
    gamma = 1 if t <= tau1 else 0 if t >= tau2 else (tau2 - t) / (tau2 - tau1)
    if gamma == 1:
        return y
    out = []
    for b in range(len(y)):
        clean = y[b].tolist()
        noisy = [math.sqrt(gamma) * number + s * math.sqrt(1 - gamma) * extra
                 for number, extra in zip(clean, n[b].tolist())]
        ratio = statistics.pstdev(clean) / statistics.pstdev(noisy)
        rescaled = [(value - statistics.fmean(noisy)) * ratio + statistics.fmean(clean) for value in noisy]
        out.append([psi * new + (1 - psi) * old for new, old in zip(rescaled, noisy)])
    return torch.tensor(out, dtype=y.dtype)


@pytest.mark.parametrize("name", ["euler", "heun", "ddim"])
@pytest.mark.parametrize("uncond, cfg, apg, cads", [
    (False, 1.0, None, None), (False, 2.5, None, None), (True, 1.0, None, None), (False, 2.5, [0.3, 3.0, -0.5], None),
    (False, 1.0, None, [0.5, 0.95, 0.3, 0.8]), (False, 2.5, [0.3, 3.0, -0.5], [0.5, 0.95, 0.3, 0.8])])
def test_a_guided_trajectory_against_the_equations_written_out(name, uncond, cfg, apg, cads):
    """Whole trajectories, sampler and guidance: the oracle shares the table of ᾱ and the noise with the code."""
    model, steps, scale, window = small_dit(), 6, 2.0, (1.0, 0.8, 0.2)
    prediction = "noise" if name == "ddim" else "velocity"
    settings = dict(sampler=name, steps=steps, cfg=cfg, emag=scale, window=window, uncond=uncond, apg=apg, cads=cads)
    x, _ = draw(model, dict(prediction=prediction), 3, 3, **settings)

    class ByHand:
        by_hand = staticmethod(lambda *args, **kw: dit_by_hand(model, *args, **kw))
    slow, noise = SlowEMAG(ByHand, (1, 2, 3), beta=0.9), sampler.SampleNoise(3, range(3))
    z = noise(torch.empty(3, 3, 8, 8, dtype=F64))
    labels = torch.full((3,), 3) if uncond else torch.tensor([0, 1, 2])
    y, directions = None, {-1: None}

    def predict(x, t, step, update=True):
        nonlocal y
        times = torch.full((3,), 1000 * t - (prediction == "noise"))
        left = steps - 1 - step
        observed, perturbed = 1 <= left <= 5, 1 <= left <= 4              # round(0.2·5), round(0.8·5)
        if update:
            embedding = model.y_embedder.embedding_table.weight[labels]
            y = labels if not cads else cads_by_hand(embedding, t, noise(embedding) if t > cads[0] else None, *cads)
        if observed and update:
            pred = slow.clean(x, times, y)
        else:
            pred = dit_by_hand(model, x, times, y)[0]
        if perturbed:
            negative = slow.negative(x, times, y)
            pred = negative + scale * (pred - negative)
        if cfg == 1:
            return pred
        pred_null = dit_by_hand(model, x, times, torch.full((3,), 3))[0]
        if not apg:
            return pred_null + cfg * (pred - pred_null)
        a = sampler.ALPHAS_BAR[round(1000 * t)]
        signal, spread = (a.sqrt(), (1 - a).sqrt()) if prediction == "noise" else (1 - t, t)
        if prediction == "noise":                                         # x = signal·x̂₀ + spread·ε
            denoised = [(x - spread * each) / signal for each in (pred, pred_null)]
        else:                                                             # v = ε − x̂₀ in the same x
            denoised = [x - spread * each for each in (pred, pred_null)]
        guided, direction = apg_by_hand(*denoised, cfg, directions[step - 1], *apg)
        if update:
            directions[step] = direction
        eps = (x - signal * guided) / spread
        return eps if prediction == "noise" else eps - guided

    if name == "ddim":
        indices = [999, 799, 599, 400, 200, 0]
        for step, i in enumerate(indices):
            a = sampler.ALPHAS_BAR[i + 1]
            a_next = sampler.ALPHAS_BAR[indices[step + 1] + 1] if step < 5 else torch.ones(())
            eps = predict(z, (i + 1) / 1000, step)
            z = a_next.sqrt() * (z - (1 - a).sqrt() * eps) / a.sqrt() + (1 - a_next).sqrt() * eps
    else:
        for step in range(steps):
            t, t_next = 1 - step / steps, 1 - (step + 1) / steps
            v = predict(z, t, step)
            if name == "heun" and step < steps - 1:
                v = (v + predict(z + (t_next - t) * v, t_next, step, update=False)) / 2
            z = z + (t_next - t) * v
    torch.testing.assert_close(x, z, rtol=1e-4, atol=1e-4)                # the sampler keeps E in float32


def test_a_second_trajectory_with_the_same_emag_starts_anew():
    case = Case("dit", batch=2)
    net, emag = sampler.network(case.model, dict(prediction="velocity")), case.emag()
    y, x = torch.arange(2), case.inputs(0)[0]
    one, two = (sampler.euler(sampler.guided(net, y, y, steps=4, emag=emag, emag_scale=2.0), x, 4) for _ in range(2))
    assert torch.equal(one, two) and len(emag.trace) == 3


def test_emag_one_is_cfg_bit_for_bit():
    model = small_dit()
    net = sampler.network(model, dict(prediction="velocity"))
    y, null = torch.arange(3), torch.full((3,), 3)

    def cfg_alone(x, t, step):
        pred, pred_null = net(torch.cat([x, x]), t, torch.cat([y, null])).chunk(2)
        return pred_null + 2.0 * (pred - pred_null)

    x, emag = sampler.sample(model, dict(prediction="velocity"), [0, 1, 2], range(3), dict(
        sampler="euler", steps=6, cfg=2.0, emag=1.0, layers=[1, 2, 3], beta=0.9, strength=1.0, window=[1.0, 0.8, 0.2],
        seed=3))
    start = sampler.SampleNoise(3, range(3))(torch.empty(3, 3, 8, 8, dtype=F64))
    with torch.inference_mode():
        assert torch.equal(x, sampler.euler(cfg_alone, start, 6))
    assert emag.trace == []


# ------------------------------------------------------------------------------------------------------ APG and CADS

RUN = dict(steps=6, cfg=2.0, emag=2.0, layers=[1, 2, 3], beta=0.9, strength=1.0, window=[1.0, 0.8, 0.2], seed=3)


def run_small(name: str, **changes) -> Tensor:
    """Three samples of a small random DiT that predicts what the sampler `name` needs."""
    meta = dict(prediction="noise" if name in ("ddim", "ddpm") else "velocity")
    return sampler.sample(small_dit(), meta, [0, 1, 2], range(3), RUN | dict(sampler=name) | changes)[0]


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("eta, norm, momentum", [(0.0, 5.0, -0.5), (1.0, math.inf, 0.0), (0.4, 11.0, 0.3),
                                                 (0.0, math.inf, -0.75)])
def test_apg_is_the_normalized_guidance_of_diffusers(eta, norm, momentum, dtype):
    theirs = pytest.importorskip("diffusers.guiders.adaptive_projected_guidance")
    buffer, d = theirs.MomentumBuffer(momentum), 0.0
    for step in range(5):
        cond, null = (seeded(3, 4, 6, 6, seed=2 * step + which, dtype=dtype) for which in (0, 1))
        guided, d = sampler.apg(cond, null, 4.0, d, eta, norm, momentum)
        expected = theirs.normalized_guidance(cond, null, 4.0 - 1, buffer, eta, 0.0 if norm == math.inf else norm,
                                              use_original_formulation=True)
        torch.testing.assert_close(guided.to(dtype), expected, rtol=0, atol=1e-12 if dtype == F64 else 2e-5)


def test_apg_moves_at_right_angles_and_no_further_than_the_norm():
    cond, null = seeded(2, 3, 4, 4), seeded(2, 3, 4, 4, seed=1)
    null[1] = cond[1] + 0.01 * null[1]                                              # this sample is not clipped
    across, _ = sampler.apg(cond, null, 3.0, eta=0.0, norm=1.0)
    assert ((across - cond) * cond).flatten(1).sum(dim=1).abs().max() < 1e-12
    whole, _ = sampler.apg(cond, null, 3.0, eta=1.0, norm=1.0)
    expected = torch.tensor([1.0, (cond[1] - null[1]).norm()]) * (3.0 - 1)
    torch.testing.assert_close((whole - cond).flatten(1).norm(dim=1), expected.double(), rtol=1e-6, atol=0)


def test_apg_of_nothing_is_finite():
    nothing = torch.zeros(1, 3, 4, 4)
    guided, _ = sampler.apg(nothing, nothing, 3.0, eta=0.5, norm=5.0)
    assert torch.equal(guided, nothing.double())


@pytest.mark.parametrize("name", ["euler", "heun", "ddim", "ddpm"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_apg_that_keeps_everything_is_cfg(name, scale):
    plain, kept, projected = (run_small(name, emag=scale, apg=apg) for apg in (
        None, [1.0, math.inf, 0.0], [0.0, math.inf, 0.0]))
    torch.testing.assert_close(kept, plain, rtol=1e-7, atol=1e-7)
    assert (projected - plain).abs().max() > 1e-2


def test_apg_with_emag_off_is_apg_alone_bit_for_bit():
    model, meta = small_dit(), dict(prediction="velocity")
    net, d, options = sampler.network(model, meta), 0.0, (0.0, 3.0, -0.5)
    y, null = torch.arange(3), torch.full((3,), 3)

    def apg_alone(x, t, step):
        nonlocal d
        pred, pred_null = net(torch.cat([x, x]), t, torch.cat([y, null])).chunk(2)
        x0, d = sampler.apg(x - t * pred, x - t * pred_null, 2.0, d, *options)
        return (x - x0) / t

    x, emag = sampler.sample(model, meta, [0, 1, 2], range(3), RUN | dict(sampler="euler", emag=1.0, apg=options))
    with torch.inference_mode():
        start = sampler.SampleNoise(3, range(3))(torch.empty(3, 3, 8, 8, dtype=F64))
        assert torch.equal(x, sampler.euler(apg_alone, start, 6))
    assert emag.trace == []


def test_apg_guides_the_chosen_channels_alone():
    """Norm, projection and guided prediction are those of the first channels; the others stay conditional."""
    net = lambda x, t, y: toy_net(x, t, y).cumsum(dim=1)                                            # noqa: E731
    x, y, null = seeded(2, 4, 4, 4), torch.tensor([0, 1]), torch.tensor([3, 3])
    guided = sampler.guided(net, y, null, steps=1, cfg=3.0, channels=3, apg_settings=(0.0, 1.0, 0.0))(x, 0.5, 0)
    cond, at_null = net(x, 0.5, y), net(x, 0.5, null)
    first, _ = apg_by_hand((x - 0.5 * cond)[:, :3], (x - 0.5 * at_null)[:, :3], 3.0, None, 0.0, 1.0, 0.0)
    torch.testing.assert_close(guided, torch.cat([(x[:, :3] - first) / 0.5, cond[:, 3:]], dim=1))


def test_conversions_go_there_and_back():
    x0, eps = seeded(2, 3, 4, 4), seeded(2, 3, 4, 4, seed=1)
    for t in (0.001, 0.25, 1.0):
        x = (1 - t) * x0 + t * eps
        torch.testing.assert_close(sampler.velocity_to_x0(eps - x0, x, t), x0)
        torch.testing.assert_close(sampler.x0_to_velocity(x0, x, t), eps - x0, rtol=1e-6, atol=1e-9)
        a = sampler.ALPHAS_BAR[round(1000 * t)]
        x = a.sqrt() * x0 + (1 - a).sqrt() * eps
        torch.testing.assert_close(sampler.noise_to_x0(eps, x, t), x0)
        torch.testing.assert_close(sampler.x0_to_noise(x0, x, t), eps)


@pytest.mark.parametrize("bounds", [(0.6, 0.9), (0.5, 0.5), (0.0, 1.0), (0.9, 0.95), (0.0, 0.0)])
@pytest.mark.parametrize("psi", [1.0, 0.4, 0.0])
def test_cads_number_by_number(bounds, psi):
    y, noise = 0.7 + 2 * seeded(3, 10), seeded(3, 10, seed=1)
    for t in (0.0, 0.3, 0.5, 0.6, 0.75, 0.9, 1.0):
        noisy = sampler.cads(y, t, lambda like: noise, *bounds, 0.25, psi)
        torch.testing.assert_close(noisy, cads_by_hand(y, t, noise, *bounds, 0.25, psi))
        if psi == 1:
            torch.testing.assert_close(torch.std_mean(noisy, dim=1), torch.std_mean(y, dim=1))


def test_cads_draws_nothing_and_changes_nothing_where_gamma_is_one():
    y = seeded(2, 6, dtype=torch.float32)
    assert sampler.cads(y, 0.6, pytest.fail, 0.6, 0.9, 0.25, 1.0) is y


@pytest.mark.parametrize("name, eta", [("euler", 0.0), ("heun", 0.0), ("ddim", 0.0), ("ddim", 1.0), ("ddpm", 0.0)])
def test_cads_that_is_over_from_the_start_is_no_cads_bit_for_bit(name, eta):
    without, never, some = (run_small(name, eta=eta, cads=cads) for cads in (
        None, [1.0, 1.0, 0.25, 1.0], [0.5, 0.9, 0.25, 1.0]))
    assert torch.equal(without, never) and (some - without).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["heun", "ddpm"])
def test_cads_and_apg_do_not_depend_on_the_batch(name):
    model, meta = small_dit(), dict(prediction="noise" if name == "ddpm" else "velocity")
    settings = dict(sampler=name, cads=[0.3, 0.9, 0.25, 1.0], apg=[0.0, 3.0, -0.5])
    together, _ = draw(model, meta, 8, 8, **settings)
    apart, _ = draw(model, meta, 8, 1, **settings)
    torch.testing.assert_close(apart, together, rtol=1e-9, atol=1e-9)


def test_one_noisy_condition_a_step():
    """The clean and the negative pass, and both evaluations of Heun's step, see the same; each step another. And
    `watch` is told of each step once, with its clean and its negative prediction."""
    seen, out, told = [], [], []

    def net(x, t, y):
        seen.append((t, y[:2]))                                           # the conditional half
        out.append(case.model(x, torch.full((len(x),), 1000 * t), y))
        return out[-1]

    case = Case("dit", batch=2)
    y, null = (case.model.y_embedder(torch.tensor(labels)) for labels in ([0, 1], [3, 3]))
    predict = sampler.guided(net, y, null, steps=3, cfg=2.0, emag=case.emag(), emag_scale=2.0,
                             window=Window(1.0, 1.0, 0.0), cads_settings=(0.0, 1.0, 0.25, 1.0),
                             watch=lambda *step: told.append(step))
    sampler.heun(predict, case.inputs(0)[0], 3)
    assert [t for t, _ in seen] == pytest.approx([1, 1, 2 / 3, 2 / 3, 2 / 3, 2 / 3, 1 / 3, 1 / 3, 1 / 3, 1 / 3])
    steps = [seen[:4], seen[4:8], seen[8:]]
    for calls in steps:
        assert all(torch.equal(condition, calls[0][1]) for _, condition in calls)
    assert not torch.equal(steps[0][0][1], steps[1][0][1]) and not torch.equal(steps[1][0][1], steps[2][0][1])
    assert not torch.equal(steps[2][0][1], y)
    for step, (number, t, _, clean, negative) in enumerate(told):
        first = 4 * step                                                  # passes: two evaluations of two each
        assert (number, t) == (step, seen[first][0])
        assert torch.equal(clean, out[first][:2]) and torch.equal(negative, out[first + 1])
    assert len(told) == 3


# -------------------------------------------------------------------------------------------------------- samplers


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


@pytest.mark.parametrize("run, counts, order", [
    (lambda x, n: sampler.euler(gaussian_velocity, x, n), (64, 128, 256), 1),
    (lambda x, n: sampler.heun(gaussian_velocity, x, n), (64, 128, 256), 2),
    (lambda x, n: sampler.ddim(gaussian_noise, x, [1 - i / n for i in range(n + 1)]), (100, 200, 500), 1)])
def test_samplers_converge_to_the_exact_solution_at_their_order(run, counts, order):
    x = seeded(16)
    if order == 1 and counts[0] == 100:
        a = sampler.ALPHAS_BAR[-1].item()
        exact = MEAN + STD * (x - math.sqrt(a) * MEAN) / math.sqrt(a * STD**2 + 1 - a)
    else:
        exact = MEAN + STD * x
    errors = [(run(x, n) - exact).abs().max().item() for n in counts]
    for (n, error), (m, finer) in zip(zip(counts, errors), zip(counts[1:], errors[1:])):
        assert math.log(error / finer) / math.log(m / n) == pytest.approx(order, abs=0.15)
    assert errors[-1] < 0.01


def test_time_grids():
    assert sampler.flow_times(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert sampler.ddpm_times(4) == [1.0, 0.667, 0.334, 0.001, 0.0]
    assert sampler.ddpm_times(1) == [1.0, 0.0]
    assert sampler.alpha_bar(0.0) == 1.0 and sampler.alpha_bar(1.0) == pytest.approx(4.036e-5, rel=1e-3)


def test_given_times_are_the_same_as_their_number():
    x = seeded(4)
    assert torch.equal(sampler.euler(gaussian_velocity, x, [1.0, 0.75, 0.5, 0.25, 0.0]),
                       sampler.euler(gaussian_velocity, x, 4))


def curved(x, t):
    return torch.sin(3 * x) * (0.5 + t) + 0.1 * x


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_is_the_scheduler_of_diffusers(eta):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    scheduler.set_timesteps(50)
    x = start = seeded(2, 3, 4, 4)
    for i in scheduler.timesteps.tolist():
        noise = seeded(2, 3, 4, 4, seed=i)
        x = scheduler.step(curved(x, (i + 1) / 1000), i, x, eta=eta, variance_noise=noise).prev_sample
    times = [(i + 1) / 1000 for i in scheduler.timesteps.tolist()]
    draws = iter(times)
    ours = sampler.ddim(lambda x, t, step: curved(x, t), start, times + [0.0], eta=eta,
                        noise=lambda x: seeded(2, 3, 4, 4, seed=round(1000 * next(draws)) - 1))
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)              # that library's ᾱ is float32


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_is_the_scheduler_of_diffusers(shift):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(28)
    x = start = seeded(2, 3, 4, 4, dtype=torch.float32)
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas.tolist()):
        x = scheduler.step(curved(x, sigma), t, x, return_dict=False)[0]
    ours = sampler.euler(lambda x, t, step: curved(x, t), start, scheduler.sigmas.tolist())
    torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [10, 50, 250, 1000])
def test_respaced_steps_are_those_of_the_official_rule(steps):
    """improved-diffusion's respacing: a stride of 999 / (n − 1) added up from 0, each sum rounded."""
    taken, at = [], 0.0
    for _ in range(steps):
        taken.append(round(at))
        at += 999 / (steps - 1)
    times = sampler.ddpm_times(steps)
    assert [round(1000 * t) - 1 for t in times[:-1]] == taken[::-1] and times[-1] == 0.0


def test_ddpm_with_a_fixed_variance_is_ddim_at_eta_one():
    x, noises = seeded(2, 3, 2, 2), [seeded(2, 3, 2, 2, seed=50 + i) for i in range(20)]
    predict = lambda x, t, step: curved(x, t)                                                       # noqa: E731
    ours, theirs = (run(predict, x, 20, noise=lambda like, calls=iter(noises): next(calls), **options)
                    for run, options in ((sampler.ddpm, {}), (sampler.ddim, dict(eta=1.0))))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("learned", [True, False])
def test_ddpm_is_the_posterior_written_out(learned):
    """Step by step in scalars, from the betas of the respaced process as the official code builds them."""
    steps, x = 12, seeded(2, 3, 2, 2)

    def out(x, i):
        eps = curved(x, i / 1000)
        return torch.cat([eps, torch.tanh(x + i / 500)], dim=1) if learned else eps

    noises = {i: seeded(2, 3, 2, 2, seed=50 + i) for i in range(steps)}
    calls = iter(range(steps))
    ours = sampler.ddpm(lambda x, t, step: out(x, round(1000 * t) - 1), x, steps, noise=lambda x: noises[next(calls)])

    full, alphas_bar = 1.0, []
    for i in range(1000):
        full *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
        alphas_bar.append(full)
    timesteps = [round(i * 999 / (steps - 1)) for i in range(steps)]
    betas, last = [], 1.0
    for i in timesteps:
        betas.append(1 - alphas_bar[i] / last)
        last = alphas_bar[i]
    z = x.clone()
    for k in reversed(range(steps)):
        product = math.prod(1 - beta for beta in betas[:k + 1])
        previous = math.prod(1 - beta for beta in betas[:k])
        prediction = out(z, timesteps[k])
        for place in np.ndindex(2, 3, 2, 2):
            b, c, h, w = place
            x0 = z[place].item() / math.sqrt(product) - math.sqrt(1 / product - 1) * prediction[place].item()
            mean = (betas[k] * math.sqrt(previous) / (1 - product) * x0
                    + (1 - previous) * math.sqrt(1 - betas[k]) / (1 - product) * z[place].item())
            if k > 0:
                least, most = math.log(betas[k] * (1 - previous) / (1 - product)), math.log(betas[k])
                share = (prediction[b, c + 3, h, w].item() + 1) / 2 if learned else 0.0
                mean += math.exp((share * most + (1 - share) * least) / 2) * noises[steps - 1 - k][place].item()
            z[place] = mean
    torch.testing.assert_close(ours, z, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("flow, name", [("rf", "euler"), ("rf", "heun"), ("sit", "euler"), ("sit", "heun")])
def test_times_and_signs_of_velocity_checkpoints(flow, name):
    """One Gaussian again, its velocity in the checkpoint's own time and sign: samples have its mean and covariance."""
    seen = []

    class Network:
        pos_embed = torch.zeros(1, dtype=F64)

        def __call__(self, x, t, y):
            seen.append(t[0].item())
            if flow == "rf":                           # 1000·t from noise 1000 to data 0, ε − x₀
                return torch.cat([gaussian_velocity(x, t[0].item() / 1000, 0), x], dim=1)
            s = t[0].item()                            # SiT: 0 noise, 1 data, x_s = s·x₁ + (1−s)·x₀, velocity x₁ − x₀
            var = s**2 * STD**2 + (1 - s) ** 2
            off = x - s * MEAN
            return torch.cat([MEAN + s * STD**2 / var * off - (1 - s) / var * off, x], dim=1)

    net = sampler.network(Network(), dict(prediction="velocity", flow=flow))
    start = seeded(1000, 2, 1, 1)
    out = sampler.SAMPLERS["velocity"][name](lambda x, t, step, update=True: net(x, t, None), start, 200)
    torch.testing.assert_close(out, MEAN + STD * start, rtol=0, atol=0.03)
    assert out.mean().item() == pytest.approx(MEAN, abs=0.05)
    assert np.cov(out.flatten(1).T.numpy()) == pytest.approx(STD**2 * np.eye(2), abs=0.02)
    assert seen[0] == {"rf": 1000, "sit": 0}[flow]


def test_the_official_code_guides_three_channels():
    y, null, x = torch.tensor([0, 1]), torch.tensor([3, 3]), seeded(2, 4, 4, 4)
    net = lambda x, t, y: torch.cat([toy_net(x, t, y), 2 * toy_net(x, t, y)], dim=1)                # noqa: E731
    cond, at_null = net(x, 0.5, y), net(x, 0.5, null)
    expected = cond.clone()
    expected[:, :3] = (at_null + 3 * (cond - at_null))[:, :3]
    torch.testing.assert_close(sampler.guided(net, y, null, steps=4, cfg=3.0, channels=3)(x, 0.5, 0), expected)
    expected[:, 3] = (at_null + 3 * (cond - at_null))[:, 3]          # all that are noise, and never the variance
    torch.testing.assert_close(sampler.guided(net, y, null, steps=4, cfg=3.0)(x, 0.5, 0), expected)


def test_noise_depends_on_seed_and_index_alone():
    like = torch.empty(4, 3, 2, 2, dtype=F64)
    eight = sampler.SampleNoise(5, range(4))
    first, second = eight(like), eight(like)
    alone = sampler.SampleNoise(5, [2])
    assert torch.equal(alone(like[:1])[0], first[2]) and torch.equal(alone(like[:1])[0], second[2])
    assert not torch.equal(first[0], first[1]) and not torch.equal(first, second)
    assert not torch.equal(sampler.SampleNoise(6, range(4))(like), first)


# ---------------------------------------------------------------------------------- attention calls as they are


class EyeBlock(nn.Module):
    """Attention with the identity as its values, so that what it gives is the map itself: (B, heads, N, N)."""

    def __init__(self, call, heads: int = 4):
        super().__init__()
        self.call, self.heads = call, heads

    def forward(self, x: Tensor) -> Tensor:
        q, k = x.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.call(q, k, torch.eye(x.shape[1], dtype=x.dtype).expand(*q.shape[:2], -1, -1))


SDPA = F.scaled_dot_product_attention
BOOL_MASK = torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(1)) < 0.7
BOOL_MASK |= torch.eye(6, dtype=torch.bool)
FLOAT_MASK = seeded(4, 6, 6, seed=2)
CALLS = {
    "positional": (lambda q, k, v: SDPA(q, k, v), {}),
    "keywords": (lambda q, k, v: SDPA(value=v, key=k, query=q, dropout_p=0.0), {}),
    "boolean mask": (lambda q, k, v: SDPA(q, k, v, BOOL_MASK[:len(q)]), dict(mask=BOOL_MASK.double().log())),
    "additive mask": (lambda q, k, v: SDPA(q, k, v, attn_mask=FLOAT_MASK), dict(mask=FLOAT_MASK)),
    "scale": (lambda q, k, v: SDPA(q, k, v, scale=0.3), dict(scale=0.3)),
    "grouped heads": (lambda q, k, v: SDPA(q, k[:, ::2], v[:, ::2], enable_gqa=True), dict(group=2)),
}


def eye_inputs(step: int, batch: int = 3, heads: int = 4) -> Tensor:
    return torch.stack([2 * seeded(6, 2 * heads * 5, seed=100 * b + step) for b in range(batch)])


def map_by_hand(x: Tensor, scale: float = 5**-0.5, mask: Tensor | None = None, group: int = 1) -> Tensor:
    heads = 4
    q, k = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in x.chunk(2, dim=-1))
    k = torch.stack([k[:, head - head % group] for head in range(heads)], dim=1)
    logits = scale * torch.einsum("bhqd,bhkd->bhqk", q, k)
    if mask is not None:
        logits = logits + (mask[:len(x)] if mask.ndim == 4 else mask)
    return logits.exp() / logits.exp().sum(-1, keepdim=True)


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("name", CALLS)
def test_calls_in_the_wild_make_the_map_of_the_equation(name, strength):
    call, expected = CALLS[name]
    block = EyeBlock(call)
    emag, ema = EMAG([block], [0], beta=0.7, strength=strength, ema_dtype=F64), None
    for step in range(3):
        x, attn = eye_inputs(step), map_by_hand(eye_inputs(step), **expected)
        ema = attn if ema is None else 0.7 * ema + 0.3 * attn
        with emag.observe():
            torch.testing.assert_close(block(x), attn)
        with emag.perturb():
            torch.testing.assert_close(block(x), (1 - strength) * attn + strength * ema)


def test_masks_follow_the_observed_rows():
    call, expected = CALLS["boolean mask"]
    block, whole = EyeBlock(call), eye_inputs(0)
    emag = EMAG([block], [0], ema_dtype=F64)
    with emag.observe(slice(1, 3)):
        block(whole)
    with emag.perturb():
        torch.testing.assert_close(block(whole[1:]), map_by_hand(whole, **expected)[1:])


class TwoCalls(EyeBlock):
    """A self-attention, and a second one that is none of EMAG's business."""

    def forward(self, x):
        return super().forward(x), super().forward(x.flip(1))


def test_the_first_self_attention_of_a_block_is_meant():
    block = TwoCalls(SDPA)
    emag = EMAG([block], [0], ema_dtype=F64)
    for step in range(2):
        with emag.observe():
            clean = block(eye_inputs(step))
    with emag.perturb():
        negative = block(eye_inputs(1))
    assert (negative[0] - clean[0]).abs().max() > 1e-2 and torch.equal(negative[1], clean[1])


@pytest.mark.parametrize("call, message", [
    (lambda q, k, v: SDPA(q, k, v, is_causal=True), "attends causally"),
    (lambda q, k, v: SDPA(q[:, 0], k[:, 0], v[:, 0]), r"need \(batch, heads, tokens, channels\)")])
def test_calls_that_cannot_work_say_so(call, message):
    block = EyeBlock(call)
    with pytest.raises(RuntimeError, match=message), EMAG([block], [0]).observe():
        block(eye_inputs(0))


class JointOracle:
    """A_t and its averages for EyeBlock, by the definitions of METHOD section 2: tokens `image` are image tokens."""

    def __init__(self, variant: str, image: list[int], beta: float, strength: float):
        self.variant, self.image, self.beta, self.strength, self.ema = variant, image, beta, strength, None

    def step(self, x: Tensor) -> Tensor:
        """What the negative's map must be, (B, heads, N, N)."""
        attn, rows = map_by_hand(x), torch.tensor(self.image)
        columns = torch.arange(attn.shape[-1]) if self.variant == "map" else rows
        queries = x.chunk(2, dim=-1)[0]
        seen = queries[:, rows] if self.variant == "query" else attn[:, :, rows][..., columns]
        self.ema = seen if self.ema is None else self.beta * self.ema + (1 - self.beta) * seen
        self.deviation = (self.ema - seen).abs().flatten(1).mean(1)
        blended = (1 - self.strength) * seen + self.strength * self.ema
        out = attn.clone()
        if self.variant == "query":
            queries = queries.clone()
            queries[:, rows] = blended
            return map_by_hand(torch.cat([queries, x.chunk(2, dim=-1)[1]], dim=-1))
        for i, row in enumerate(self.image):
            out[:, :, row, columns] = blended[:, :, i]
            out[:, :, row] /= out[:, :, row].sum(-1, keepdim=True)
        return out


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("image", [slice(0, 4), slice(2, None), None])
@pytest.mark.parametrize("variant", ["map", "image", "query"])
def test_variants_with_joint_attention(variant, image, strength):
    block = EyeBlock(SDPA)
    tokens = list(range(6))[image or slice(None)]
    oracle = JointOracle(variant, tokens, beta=0.7, strength=strength)
    emag = EMAG([block], [0], variant=variant, image_tokens=image, beta=0.7, strength=strength, ema_dtype=F64)
    for step in range(3):
        x = eye_inputs(step)
        with emag.observe():
            clean = block(x)
        with emag.perturb():
            negative = block(x)
        torch.testing.assert_close(negative, oracle.step(x))
        torch.testing.assert_close(emag.deviation[:, 0], oracle.deviation)
    text = [token for token in range(6) if token not in tokens]
    assert torch.equal(negative[:, :, text], clean[:, :, text])                       # text queries are as they were
    torch.testing.assert_close(negative.sum(-1), torch.ones(3, 4, 6, dtype=F64))      # and all rows still sum to one
    if variant == "image" and text:
        share = negative[:, :, tokens][..., text] / clean[:, :, tokens][..., text]    # image → text: same proportions
        torch.testing.assert_close(share, share[..., :1].expand_as(share))
    assert (negative - clean).abs().max() > 1e-2


@pytest.mark.parametrize("variant", ["map", "image", "query"])
def test_variants_reuse_and_selection(variant):
    """On a whole model, with samples that disagree about the block: reuse changes nothing."""
    case = Case("dit")
    options = dict(variant=variant, beta=0.8, strength=0.8, threshold=0.9)
    with_reuse, without = case.emag(**options), case.emag(reuse=False, **options)
    for one, two in zip(trajectory(case, with_reuse, steps=6), trajectory(case, without, steps=6)):
        torch.testing.assert_close(one, two)
    assert any(len(set(map(tuple, entry.selected.tolist()))) > 1 for entry in with_reuse.trace)


class CountFused(torch.overrides.TorchFunctionMode):
    """Counts the attention calls that reach the real function."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += func is SDPA
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", ["map", "query"])
def test_fused_kernels_stay_in_use(variant):
    case = Case("dit", batch=1)
    emag = case.emag(variant=variant)
    trajectory(case, emag, steps=3)
    with CountFused() as clean, emag.observe():
        case.model(*case.inputs(3))
    first = 1 + emag.selected[0].nonzero().item()
    with CountFused() as negative, emag.perturb():
        case.model(*case.inputs(3))
    assert clean.calls == 5                                              # the clean pass is the model's own
    assert negative.calls == 5 - first - (variant == "map")              # and only Ã·V is not, nor what is reused


def test_emag_q_takes_no_memory_that_grows_with_the_square_of_the_tokens():
    def extra(grid: int, variant: str) -> int:
        model = DiT(input_size=grid, patch_size=1, in_channels=1, hidden_size=32, depth=3, num_heads=2, num_classes=1,
                    learn_sigma=False).eval().requires_grad_(False)
        inputs = torch.zeros(1, 1, grid, grid), torch.zeros(1), torch.zeros(1, dtype=torch.long)
        with allocations() as plain:
            model(*inputs)
        emag = EMAG(model.blocks, [1], variant=variant)
        with allocations() as guided:
            for _ in range(2):
                with emag.observe():
                    model(*inputs)
                with emag.perturb():
                    model(*inputs)
        return guided[0] - plain[0]

    assert extra(64, "query") < 5 * extra(32, "query")                   # 1,024 → 4,096 tokens: linear is 4 times
    assert extra(64, "map") > 10 * extra(32, "map")                      # and a map 16 times
    assert extra(64, "query") < extra(64, "map") / 20


def test_half_precision_models_keep_a_float32_average():
    exact, half = Case("dit"), Case("dit")
    half.model.bfloat16()
    reference = trajectory(exact, exact.emag())
    emag, guided = EMAG(half.blocks, [1, 2, 3]), []
    for step in range(4):
        inputs = [part.bfloat16() if part.is_floating_point() else part for part in half.inputs(step)]
        with emag.observe():
            half.model(*inputs)
        with emag.perturb():
            guided.append(half.model(*inputs))
    assert guided[0].dtype == torch.bfloat16
    assert all(chunk.dtype == torch.float32 for chunks in emag._ema.values() for chunk in chunks)
    for entry, other in zip(emag.trace[1:], exact_trace(exact)[1:]):
        torch.testing.assert_close(entry.deviation, other.deviation, rtol=0.1, atol=0)
    for one, two in zip(guided, reference):
        assert (one.double() - two).norm() < 0.1 * two.norm()


def exact_trace(case: Case) -> list:
    emag = case.emag()
    trajectory(case, emag)
    return emag.trace


def test_under_autocast_and_inference_mode():
    exact, low = Case("dit"), Case("dit")
    low.model.float()
    reference, emag, negatives = trajectory(exact, exact.emag()), EMAG(low.blocks, [1, 2, 3]), []
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        for step in range(4):
            inputs = [part.float() if part.is_floating_point() else part for part in low.inputs(step)]
            with emag.observe():
                low.model(*inputs)
            with emag.perturb():
                negatives.append(low.model(*inputs))
    assert all(chunk.dtype == torch.float32 for chunks in emag._ema.values() for chunk in chunks)
    for one, two in zip(negatives, reference):
        assert (one.double() - two).norm() < 0.1 * two.norm()


class Checkpointed(nn.Module):
    def __init__(self, model: DiT, reentrant: bool):
        super().__init__()
        self.model, self.reentrant = model, reentrant
        for block in model.blocks:
            run = block.__call__
            block.checkpointed = lambda *args, run=run: torch.utils.checkpoint.checkpoint(
                run, *args, use_reentrant=reentrant)

    def forward(self, x, t, y):
        h, c = self.model.x_embedder(x) + self.model.pos_embed, self.model.t_embedder(t) + self.model.y_embedder(y)
        for block in self.model.blocks:
            h = block.checkpointed(h, c)
        return self.model.final_layer(h, c)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_in_eval_mode_changes_nothing(reentrant, grad):
    import torch.utils.checkpoint
    case = Case("dit")
    model, negatives = Checkpointed(case.model, reentrant), {}
    plain = lambda x, t, y: case.model.final_layer(*body(x, t, y))                                  # noqa: E731

    def body(x, t, y):
        h, c = case.model.x_embedder(x) + case.model.pos_embed, case.model.t_embedder(t) + case.model.y_embedder(y)
        for block in case.model.blocks:
            h = block(h, c)
        return h, c

    case.model.requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        for name, run in (("plain", plain), ("checkpointed", model)):
            emag, negatives[name] = case.emag(), []
            for step in range(3):
                with emag.observe():
                    run(*case.inputs(step))
                with emag.perturb():
                    negatives[name].append(run(*case.inputs(step)).detach())
    assert not any(chunk.requires_grad for chunks in emag._ema.values() for chunk in chunks)
    for one, two in zip(*negatives.values()):
        assert torch.equal(one, two)


@pytest.mark.parametrize("what", ["model", "blocks"])
def test_under_torch_compile_the_numbers_are_the_same(what):
    from torch import _dynamo
    case, plain = Case("dit"), Case("dit")
    reference, emag = trajectory(plain, plain.emag()), case.emag()
    _dynamo.reset()
    with _dynamo.config.patch(cache_size_limit=2):               # after which torch runs the blocks eagerly
        if what == "model":
            case.model = torch.compile(case.model, backend="aot_eager")
        else:
            for block in case.blocks:
                block.compile(backend="aot_eager")
        case.model(*case.inputs(0))                              # compiled before the hooks come
        for one, two in zip(trajectory(case, emag), reference):
            torch.testing.assert_close(one, two)
    _dynamo.reset()


# ------------------------------------------------------------------------------------------------ guide, in pipelines


def halves(case: Case, step: int) -> list[Tensor]:
    return [torch.cat([part, part]) for part in case.inputs(step)]


@pytest.mark.parametrize("cond", ["first", "last", "all"])
def test_guide_replaces_the_conditional_half(case, cond):
    rows = {"first": slice(0, 3), "last": slice(3, 6), "all": slice(None)}[cond]
    emag = case.emag(beta=0.8)
    plain, expected = [], []
    for step in range(5):
        with emag.observe(rows):
            plain.append(case.model(*halves(case, step)))
        expected.append(plain[-1].clone())
        if 1 <= 4 - step <= 3:                                           # round(0.2·4), round(0.8·4)
            with emag.perturb():
                negative = case.model(*[part[rows] for part in halves(case, step)])
            expected[-1][rows] = negative + 2.5 * (expected[-1][rows] - negative)
    with guide(case.model, case.blocks, (1, 2, 3), scale=2.5, steps=5, cond=cond, beta=0.8, ema_dtype=F64) as used:
        for repeat in range(2):                                          # a second image starts a new trajectory
            for step in range(5):
                out = case.model(*halves(case, step))
                torch.testing.assert_close(out, expected[step])
                assert (step in (0, 4)) == torch.equal(out, plain[step])     # step 0's E is A; step 4 is outside
            assert len(used.trace) == 4


def test_guide_leaves_other_channels_alone():
    case, plain = Case("dit"), Case("dit")
    with guide(case.model, case.blocks, (1, 2, 3), scale=2.5, steps=4, cond="last", channels=slice(0, 2)):
        for step in range(4):
            out, clean = case.model(*halves(case, step)), plain.model(*halves(case, step))
            assert torch.equal(out[:, 2:], clean[:, 2:]) and torch.equal(out[:3], clean[:3])
            assert (step in (1, 2)) != torch.equal(out[3:, :2], clean[3:, :2])


def test_guide_off_and_out_leaves_the_model_as_it_was(case):
    before, plain = forwards(case.model), case.model(*halves(case, 0))
    with guide(case.model, case.blocks, (1, 2), scale=1.0, steps=3) as emag:
        assert torch.equal(case.model(*halves(case, 0)), plain)
    assert emag.trace == []
    with pytest.raises(ZeroDivisionError), guide(case.model, case.blocks, (1, 2), steps=3):
        case.model(*halves(case, 0))
        1 / 0
    other = Case(case.name, seed=1)                             # nested: two models, and then one model twice
    with guide(case.model, case.blocks, (1, 2), steps=2), guide(other.model, other.blocks, (1, 2), steps=2):
        for step in range(2):
            case.model(*halves(case, step)), other.model(*halves(case, step))
    with pytest.raises(RuntimeError, match="ran twice"), guide(case.model, case.blocks, (1, 2), steps=2):
        with guide(case.model, case.blocks, (1, 2), steps=2):
            case.model(*halves(case, 0))
    assert forwards(case.model) == before and torch.equal(case.model(*halves(case, 0)), plain)


def test_guide_counts_calls_and_refuses_a_count_that_does_not_fit(case):
    for calls in (0, 2, 4):
        with pytest.raises(RuntimeError, match=f"called {calls} times inside guide"):
            with guide(case.model, case.blocks, (1, 2), steps=3):
                for step in range(calls):
                    case.model(*halves(case, step))
    with pytest.raises(RuntimeError, match="no conditional half"), guide(case.model, case.blocks, (1, 2), steps=3):
        case.model(*case.inputs(0))
    for options, message in ((dict(cond="middle"), "need 'first'"), (dict(steps=0), "at least 1"),
                             (dict(beta=2), "beta")):
        with pytest.raises(ValueError, match=message), guide(case.model, case.blocks, (1, 2), **options):
            pass


def tiny_vae(diffusers, levels: int = 2):
    return diffusers.AutoencoderKL(
        block_out_channels=(8,) * levels, norm_num_groups=4, latent_channels=4, shift_factor=0.0,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels).eval()


def tiny_sd3(blocks: int = 4):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=blocks, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=4,
        pos_embed_max_size=16)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = diffusers.StableDiffusion3Pipeline(randomised(transformer, std=0.3), scheduler,
                                              tiny_vae(diffusers).double(), *[None] * 6)
    pipe.set_progress_bar_config(disable=True)
    return pipe


PROMPT = dict(prompt_embeds=seeded(2, 5, 12, seed=1), negative_prompt_embeds=seeded(2, 5, 12, seed=2),
              pooled_prompt_embeds=seeded(2, 10, seed=3), negative_pooled_prompt_embeds=seeded(2, 10, seed=4))


class SlowJointProcessor:
    """SD3's joint attention written out, with EMAG's map in it: an attention processor as diffusers takes them.

    `state` is shared by all blocks: mode "clean" records what the EMA is of, for the last two samples of the batch;
    mode "negative" puts the blend in, for the samples that chose this block.
    """

    def __init__(self, index: int, state: dict):
        self.index, self.state = index, state

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        split = lambda x: x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)                        # noqa: E731
        image = hidden_states.shape[1]
        q, k, v = (torch.cat([split(f(hidden_states)), split(g(encoder_hidden_states))], dim=2)
                   for f, g in ((attn.to_q, attn.add_q_proj), (attn.to_k, attn.add_k_proj),
                                (attn.to_v, attn.add_v_proj)))
        state, variant, maps = self.state, self.state["variant"], softmax_map(q, k)
        seen = {"query": q[:, :, :image], "map": maps[:, :, :image], "image": maps[:, :, :image, :image]}[variant]
        if state["mode"] == "clean":
            state["seen"][self.index] = seen[2:]
        else:
            for b in range(len(q)):
                if state["chosen"][b] != self.index:
                    continue
                ema = state["ema"][self.index][b]
                if variant == "query":
                    maps[b] = softmax_map(torch.cat([ema, q[b, :, image:]], dim=1)[None], k[b:b + 1])[0]
                elif variant == "map":
                    maps[b, :, :image] = ema
                else:
                    maps[b, :, :image, :image] = ema
                    maps[b] /= maps[b].sum(-1, keepdim=True)
        out = (maps @ v).transpose(1, 2).flatten(2)
        text = out[:, image:]
        return attn.to_out[0](out[:, :image]), text if attn.context_pre_only else attn.to_add_out(text)


def sd3_by_hand(pipe, variant: str, scale: float, cfg: float, steps: int, beta: float, layers) -> Tensor:
    """Scheduler, transformer and the equations in one loop: the latents that EMAG in the pipeline must give."""
    scheduler, state = pipe.scheduler, dict(variant=variant, seen={}, ema={}, chosen=None)
    for index in layers:
        pipe.transformer.transformer_blocks[index].attn.set_processor(SlowJointProcessor(index, state))
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=F64)
    embeds = torch.cat([PROMPT["negative_prompt_embeds"], PROMPT["prompt_embeds"]])
    pooled = torch.cat([PROMPT["negative_pooled_prompt_embeds"], PROMPT["pooled_prompt_embeds"]])
    scheduler.set_timesteps(steps)
    for step, t in enumerate(scheduler.timesteps):
        run = lambda rows: pipe.transformer(                                                       # noqa: E731
            hidden_states=torch.cat([latents, latents])[rows], timestep=t.expand(4)[rows],
            encoder_hidden_states=embeds[rows], pooled_projections=pooled[rows], return_dict=False)[0]
        state["mode"] = "clean"
        null, pred = run(slice(0, 4)).chunk(2)
        left = steps - 1 - step
        if left >= round(0.2 * (steps - 1)):
            for index, seen in state["seen"].items():
                old = state["ema"].get(index, seen)
                state["ema"][index] = beta * old + (1 - beta) * seen
            dev = [[(state["ema"][n][b] - state["seen"][n][b]).abs().mean().item() for n in layers] for b in range(2)]
            state["chosen"] = [layers[row.index(max(row))] for row in dev]
            if left <= round(0.8 * (steps - 1)):
                state["mode"] = "negative"
                negative = run(slice(2, 4))
                pred = negative + scale * (pred - negative)
        latents = scheduler.step(null + cfg * (pred - null), t, latents, return_dict=False)[0]
    return latents


def sd3_latents(pipe, steps: int = 6) -> Tensor:
    return pipe(**PROMPT, num_inference_steps=steps, guidance_scale=3.0, generator=torch.Generator().manual_seed(0),
                output_type="latent", height=16, width=16).images


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("variant", ["map", "image", "query"])
def test_guide_in_the_pipeline_of_sd3_is_the_loop_written_by_hand(variant, reuse):
    pipe = tiny_sd3()
    plain = sd3_latents(pipe)
    guided_by = dict(layers=[1, 2], steps=6, cond="last", variant=variant, image_tokens=slice(0, 16), beta=0.8,
                     ema_dtype=F64, reuse=reuse)
    with guide(pipe.transformer, pipe.transformer.transformer_blocks, scale=2.5, **guided_by) as emag:
        latents = sd3_latents(pipe)
    with guide(pipe.transformer, pipe.transformer.transformer_blocks, scale=1.0, **guided_by):
        assert torch.equal(sd3_latents(pipe), plain)                     # off is off, bit for bit
    assert torch.equal(sd3_latents(pipe), plain)
    expected = sd3_by_hand(pipe, variant, 2.5, 3.0, 6, 0.8, [1, 2])
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
    assert (latents - plain).abs().max() > 1e-2 and len(emag.trace) == 5


# ------------------------------------------------------------------------------------------------------ checkpoints


def official_names(depth: int = 28, dim: int = 1152, classes: int = 1000, patch: int = 2, channels: int = 4) -> dict:
    """Every key of an official DiT with its shape, as METHOD section 8 lists them."""
    names = {"pos_embed": (1, 256, dim), "x_embedder.proj.weight": (dim, channels, patch, patch),
             "x_embedder.proj.bias": (dim,), "t_embedder.mlp.0.weight": (dim, 256), "t_embedder.mlp.0.bias": (dim,),
             "t_embedder.mlp.2.weight": (dim, dim), "t_embedder.mlp.2.bias": (dim,),
             "y_embedder.embedding_table.weight": (classes + 1, dim),
             "final_layer.adaLN_modulation.1.weight": (2 * dim, dim), "final_layer.adaLN_modulation.1.bias": (2 * dim,),
             "final_layer.linear.weight": (patch**2 * 2 * channels, dim),
             "final_layer.linear.bias": (patch**2 * 2 * channels,)}
    for n in range(depth):
        for name, rows, columns in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4),
                                    ("adaLN_modulation.1", 6, 1)):
            names[f"blocks.{n}.{name}.weight"] = (rows * dim, columns * dim)
            names[f"blocks.{n}.{name}.bias"] = (rows * dim,)
    return names


def test_every_key_of_the_official_xl_is_there():
    with torch.device("meta"):
        model = DiT()
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == official_names()


def small_official(learn_sigma: bool = True) -> DiT:
    """DiT-S/8 on small latents: a size of the table, so that its heads are known."""
    model = DiT(input_size=16, patch_size=8, hidden_size=384, depth=12, num_heads=6, num_classes=5,
                learn_sigma=learn_sigma)
    return randomised(model, std=0.1).float()


def dit_inputs(model: DiT) -> tuple[Tensor, ...]:
    channels, size = model.config["in_channels"], model.config["input_size"]
    x = seeded(3, channels, size, size, dtype=torch.float32)
    return x, torch.tensor([0.0, 40.0, 999.0]), torch.tensor([0, 4, 5])


@pytest.mark.parametrize("layout", ["bare", "training", "safetensors"])
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_official_layouts_round_trip(layout, learn_sigma, tmp_path):
    model = small_official(learn_sigma)
    state, path = model.state_dict(), tmp_path / "dit.pt"
    if layout == "bare":
        torch.save(state, path)
    elif layout == "training":
        noise = {name: torch.randn_like(tensor) for name, tensor in state.items()}
        args = argparse.Namespace(model="DiT-S/8")
        torch.save({"model": noise, "ema": state, "opt": {"state": {}}, "args": args}, path)
    else:
        path = tmp_path / "dit.safetensors"
        pytest.importorskip("safetensors.torch").save_file(state, path)
    loaded, meta = load_dit(path)
    assert loaded.config == model.config and meta["prediction"] == "noise" and meta["latent"]
    assert torch.equal(loaded(*dit_inputs(model)), model(*dit_inputs(model)))
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, F64, torch.int64, torch.bool])
def test_safetensors_of_any_dtype(dtype, tmp_path):
    tensors = {"a": (10 * seeded(3, 5)).to(dtype), "b": torch.ones(2, dtype=torch.uint8), "c": torch.tensor(3.5)}
    pytest.importorskip("safetensors.torch").save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    content, _ = read_checkpoint(tmp_path / "x.safetensors")
    assert content.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert content[name].dtype == tensor.dtype and torch.equal(content[name], tensor)


def diffusers_dit(**changes):
    """DiT of diffusers with random weights, brought to the official formulas in the two places where it departs.

    It spaces the frequencies of the time features by 1/127 instead of 1/128 (`downscale_freq_shift=1`), and its default
    norm_eps of 1e-5 reaches the second LayerNorm of a block, where the official code has 1e-6.
    """
    diffusers = pytest.importorskip("diffusers")
    config = dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=3,
                  sample_size=8, patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=4, norm_eps=1e-6)
    theirs = randomised(diffusers.DiTTransformer2DModel(**(config | changes)), std=0.2).float()
    embedder = theirs.transformer_blocks[0].norm1.emb
    embedder.time_proj.downscale_freq_shift = 0
    for block in theirs.transformer_blocks:
        block.norm1.emb.load_state_dict(embedder.state_dict())
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return theirs


@pytest.mark.parametrize("serialised", ["folder", "bin beside config"])
@pytest.mark.parametrize("size", [dict(), dict(num_attention_heads=3, attention_head_dim=12, num_layers=5,
                                               sample_size=16, patch_size=4, out_channels=4, norm_num_groups=6)])
def test_dit_is_that_of_diffusers(size, serialised, tmp_path):
    theirs = diffusers_dit(**size)
    theirs.save_pretrained(tmp_path, safe_serialization=serialised == "folder")
    ours, _ = load_dit(tmp_path if serialised == "folder" else next(tmp_path.glob("*.bin")))
    x = seeded(3, 4, theirs.config.sample_size, theirs.config.sample_size, dtype=torch.float32)
    t, y = torch.tensor([0, 250, 999]), torch.tensor([3, 999, 1000])
    with torch.no_grad():
        expected = theirs(x, timestep=t, class_labels=y).sample
    out = ours(x, t, y)
    assert (out - expected).abs().max() < 1e-5 * expected.abs().max()
    assert ours.config["learn_sigma"] == (out.shape[1] == 8) and ours.null_class == 1000


def test_diffusers_files_that_do_not_fit_say_why(tmp_path):
    theirs = diffusers_dit()
    state = theirs.state_dict()
    torch.save(state, tmp_path / "alone.bin")
    with pytest.raises(ValueError, match="need config.json beside the file"):
        load_dit(tmp_path / "alone.bin")
    (tmp_path / "config.json").write_text(json.dumps(dict(theirs.config)))
    load_dit(tmp_path / "alone.bin")
    for name, change, message in (
            ("transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight", lambda x: x + 1, "y_emb.* differ"),
            ("transformer_blocks.1.attn1.to_k.weight", None, "attn1.to_k.weight' is missing"),
            ("transformer_blocks.1.ff.net.2.bias", None, "1 missing keys, first blocks.1.mlp.fc2.bias"),
            ("transformer_blocks.1.ff.net.2.bias", lambda x: x[1:], "1 misshapen keys, first blocks.1.mlp.fc2.bias"),
            ("transformer_blocks.1.attn2.to_out.0.bias", lambda x: torch.zeros(1), "1 unexpected keys, first blocks.1")):
        changed = {key: tensor for key, tensor in state.items() if key != name}
        if change:
            changed[name] = change(state.get(name))
        torch.save(changed, tmp_path / "changed.bin")
        with pytest.raises(ValueError, match=message):
            load_dit(tmp_path / "changed.bin")


@pytest.mark.parametrize("naming", ["new", "old"])
def test_decoder_is_that_of_diffusers(naming, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    widths = (32, 64, 96, 96)
    theirs = randomised(diffusers.AutoencoderKL(
        block_out_channels=widths, latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2), std=0.05).float()
    if naming == "new":
        theirs.save_pretrained(tmp_path)
        path = tmp_path
    else:
        path, renamed = tmp_path / "vae.bin", {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        state = theirs.state_dict()
        for new, old in renamed.items():
            state = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): part for name, part in state.items()}
        assert "decoder.mid_block.attentions.0.query.weight" in state
        torch.save(state, path)
    ours = load_decoder(path)
    latents = seeded(2, 4, 6, 10, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs.decode(latents / 0.18215).sample
    out = ours(latents)
    assert out.shape == (2, 3, 48, 80) and (out - expected).abs().max() < 1e-5 * expected.abs().max()


def test_decoder_has_the_widths_of_stable_diffusion():
    with torch.device("meta"):
        state = LatentDecoder().state_dict()
    assert sum(tensor.numel() for tensor in state.values()) == 49_490_199        # SD's decoder and post_quant_conv
    assert state["decoder.up_blocks.2.resnets.0.conv_shortcut.weight"].shape == (256, 512, 1, 1)


# ------------------------------------------------------------------------------------------- the README's recipes


def recipe(title: str, scale: float | None = None) -> str:
    """The code under a heading of the README, for the CPU and in fewer steps, and with another EMAG scale if given."""
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    code = re.search(rf"^### {re.escape(title)}\n.*?```python\n(.*?)```", readme, re.MULTILINE | re.DOTALL).group(1)
    code = code.replace('"cuda"', '"cpu"').replace("250", "20")
    return code if scale is None else re.sub(r"scale=[\d.]+, steps", f"scale={scale}, steps", code)


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=float) for image in images])


def follow(title: str, monkeypatch, observed: int, namespace=lambda: {}):
    """Runs a recipe as written, with EMAG off, and without reuse: the first differs from the second, not the third."""
    monkeypatch.syspath_prepend(HERE)
    results = []
    for scale, reuse in ((None, True), (1.0, True), (None, False)):
        names, code = namespace(), recipe(title, scale)
        exec(code if reuse else code.replace(") as emag:", ", reuse=False) as emag:"), names)
        results.append(pixels(names["images"]))
        assert len(names["emag"].trace) == (0 if scale == 1.0 else observed)
        assert scale == 1.0 or names["emag"].trace[-1].deviation.min() > 0
    assert np.isfinite(results[0]).all() and results[0].std() > 0
    assert np.abs(results[0] - results[1]).mean() > 20 * np.abs(results[0] - results[2]).mean()
    assert np.abs(results[0] - results[1]).max() > 1e-3


def offer(monkeypatch, cls, make):
    monkeypatch.setattr(cls, "from_pretrained", lambda *args, **kwargs: make())


def test_recipe_official_dit(monkeypatch):
    class Official(DiT):
        """Calls itself as the official code does: first half conditional, three channels guided."""

        def forward_with_cfg(self, x, t, y, cfg_scale):
            half = x[:len(x) // 2]
            out = self.forward(torch.cat([half, half]), t, y)
            eps, rest = out[:, :3], out[:, 3:]
            cond, null = eps.chunk(2)
            eps = null + cfg_scale * (cond - null)
            return torch.cat([torch.cat([eps, eps]), rest], dim=1)

    class Diffusion:
        def p_sample_loop(self, model, shape, noise, clip_denoised, device, model_kwargs):
            assert noise.shape == shape
            for i in reversed(range(20)):
                out = model(noise, torch.full((shape[0],), 50.0 * i), **model_kwargs)
                noise = noise - 0.05 * out[:, :4]
            return noise

    model = randomised(Official(input_size=32, patch_size=8, hidden_size=32, depth=17, num_heads=4), std=0.2).float()
    weights = model.state_dict()
    for name, content in (("models", dict(DiT_XL_2=lambda input_size, num_classes: model)),
                          ("download", dict(find_model=lambda name: weights)),
                          ("diffusion", dict(create_diffusion=lambda steps: Diffusion()))):
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
        vars(sys.modules[name]).update(content)
    follow("The official DiT code", monkeypatch, observed=8)


def test_recipe_dit_pipeline(monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    transformer = randomised(diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=17, sample_size=8,
        patch_size=2, norm_num_groups=4), std=0.3).float()
    offer(monkeypatch, diffusers.DiTPipeline, lambda: diffusers.DiTPipeline(
        transformer, torch.manual_seed(0) and tiny_vae(diffusers), diffusers.DDIMScheduler(clip_sample=False)))
    follow("diffusers: DiTPipeline", monkeypatch, observed=8)


def test_recipe_pixart(monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    transformer = randomised(diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=17, sample_size=32,
        patch_size=8, cross_attention_dim=16, caption_channels=12, use_additional_conditions=False), std=0.3).float()

    def make():
        torch.manual_seed(0)
        pipe = diffusers.PixArtAlphaPipeline(None, None, tiny_vae(diffusers, levels=4), transformer,
                                             diffusers.DPMSolverMultistepScheduler())
        prompt = [part for seed in (1, 2)
                  for part in (seeded(1, 5, 12, seed=seed, dtype=torch.float32), torch.ones(1, 5))]
        pipe.encode_prompt = lambda *args, **kwargs: prompt
        return pipe

    offer(monkeypatch, diffusers.PixArtAlphaPipeline, make)
    follow("diffusers: PixArtAlphaPipeline", monkeypatch, observed=16)


def test_recipe_sd3(monkeypatch):
    diffusers = pytest.importorskip("diffusers")

    def make():
        pipe = tiny_sd3(blocks=10)
        pipe.transformer.float(), pipe.vae.float()
        pipe.encode_prompt = lambda **kwargs: [PROMPT[name][:1].float() for name in (
            "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")]
        return pipe

    offer(monkeypatch, diffusers.StableDiffusion3Pipeline, make)
    follow("diffusers: StableDiffusion3Pipeline", monkeypatch, observed=23)


def test_recipe_flux(monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    flux = randomised(diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=19, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
        guidance_embeds=True, joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 6, 6)),
        std=0.2).float()
    offer(monkeypatch, diffusers.FluxTransformer2DModel, lambda: flux)
    grid = torch.stack(torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij"), dim=-1).flatten(0, 1)
    draw = lambda *shape, seed: seeded(*shape, seed=seed, dtype=torch.float32)                     # noqa: E731
    follow("diffusers: FluxTransformer2DModel by hand", monkeypatch, observed=23, namespace=lambda: dict(
        x=draw(1, 16, 16, seed=1), text=draw(1, 5, 12, seed=2), pooled=draw(1, 10, seed=3), text_ids=torch.zeros(5, 3),
        image_ids=F.pad(grid, (1, 0))))


def test_emag_is_one_file_that_needs_torch_alone(tmp_path):
    (tmp_path / "emag.py").write_text((HERE / "emag.py").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "mine.py").write_text("""
import sys
import torch
from torch import nn
sys.modules.update(dict.fromkeys(["numpy", "einops", "PIL", "diffusers"]))    # not to be had
from emag import guide

class Block(nn.TransformerEncoderLayer):
    def forward(self, x):
        q = k = v = x.unflatten(-1, (2, 4)).transpose(1, 2)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return x + out.transpose(1, 2).flatten(2)

model = nn.Sequential(*[Block(8, 2) for _ in range(4)]).eval()
with torch.no_grad(), guide(model, model, [1, 2], scale=2.0, steps=5) as emag:
    for step in range(5):
        model(torch.randn(2, 3, 8))
print(len(emag.trace), emag.trace[-1].selected.sum().item())
""")
    done = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "4 1\n", done.stderr


# ---------------------------------------------------------------------------------------------------- command line


def run_cli(capsys, *argv) -> tuple[int, str, str]:
    code = sampler.main([str(arg) for arg in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


QUICK = ("--steps", 3, "--classes", "smiley,flag", "--num", 4)


def test_the_grid_and_its_settings(tmp_path, capsys):
    pictures = {}
    for scale in (2.0, 2.0, 1.0, 0.0):
        path = tmp_path / "grid.png"
        code, out, err = run_cli(capsys, *QUICK, "--emag", scale, "--out", path)
        shown, summary = out.splitlines()
        assert (code, err) == (0, "") and summary.startswith(f"{path}: 4 images, euler 3 steps")
        image = Image.open(path)
        settings = json.loads(image.text["settings"])
        assert settings == json.loads(shown)
        assert settings["emag"] == scale and settings["steps"] == 3 and settings["classes"] == ["smiley", "flag"]
        assert settings["checkpoint"] == "emoji-flow.pt" and settings["seed"] == 0 and settings["num"] == 4
        pixels = np.asarray(image)
        assert image.height == 2 * 100 + 4 and image.width > 2 * 100
        assert scale not in pictures or np.array_equal(pictures[scale], pixels)        # the same again
        pictures[scale] = pixels
    assert not np.array_equal(pictures[2.0], pictures[1.0]) and not np.array_equal(pictures[0.0], pictures[1.0])
    assert [entry.name for entry in tmp_path.iterdir()] == ["grid.png"]


def test_every_flag_reaches_the_run(tmp_path, capsys):
    path = tmp_path / "grid.png"
    code, _, err = run_cli(capsys, *QUICK, "--out", path, "--sampler", "heun", "--cfg", 3, "--layers", "2-4,6",
                           "--beta", 0.5, "--strength", 0.5, "--threshold", 0.7, "--window", 0.9, 0.7, 0.1, "--seed", 9,
                           "--batch", 3, "--device", "cpu", "--dtype", "float32", "--variant", "map", "--emag", 1.5,
                           "--apg", 0.1, "inf", -0.2, "--cads", 0.5, 0.8, 0.1, 0.9)
    assert (code, err) == (0, "")
    settings = json.loads(Image.open(path).text["settings"])
    assert settings == settings | dict(sampler="heun", cfg=3.0, layers=[2, 3, 4, 6], beta=0.5, strength=0.5, emag=1.5,
                                       threshold=0.7, window=[0.9, 0.7, 0.1], seed=9, dtype="float32", uncond=False,
                                       apg=[0.1, math.inf, -0.2], cads=[0.5, 0.8, 0.1, 0.9])


EXTRAS = {"": [], "APG": ["--apg"], "CADS": ["--cads"], "APG + CADS": ["--apg", "--cads"]}


@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize("guidance", ["none", "CFG", "EMAG", "EMAG + CFG"])
@pytest.mark.parametrize("name", ["euler", "heun", "ddim", "ddpm"])
def test_whatever_makes_sense_together_runs(name, guidance, extra, tmp_path, capsys):
    path = tmp_path / "x.npy"
    code, _, err = run_cli(capsys, *QUICK[:-1], 2, "--sampler", name, "--ckpt", EPS if name.startswith("dd") else DEMO,
                           "--emag", 2 if "EMAG" in guidance else 1, "--cfg", 2.5 if "CFG" in guidance else 1, *extra,
                           "--latents", path)
    if "--apg" in extra and "CFG" not in guidance:
        assert code == 2 and err.startswith("sampler.py: --apg: ") and err.count("\n") == 1 and not path.exists()
    else:
        x = np.load(path)
        assert code == 0 and x.shape == (2, 3, 32, 32) and np.isfinite(x).all() and 0.1 < x.std() < 10


def tiles(path: Path, count: int) -> np.ndarray:
    """The images of a grid with `count` columns, without the labels: (rows, count, 96, 96, 3)."""
    pixels = np.asarray(Image.open(path).convert("RGB"))[4:, -100 * count:]
    return pixels.reshape(-1, 100, count, 100, 3)[:, :96, :, :96].transpose(0, 2, 1, 3, 4)


def test_compare_draws_what_each_guidance_draws_alone(tmp_path, capsys):
    common = ("--steps", 4, "--classes", "smiley,flag,food", "--num", 3, "--emag", 3, "--cfg", 2)
    code, out, err = run_cli(capsys, *common, "--apg", 0.5, 4, -0.25, "--compare", "--out", tmp_path / "compare.png")
    assert (code, err) == (0, "")
    compared = tiles(tmp_path / "compare.png", 3)
    rows = json.loads(Image.open(tmp_path / "compare.png").text["settings"])
    assert [label.split("\n")[0] for label in rows] == ["no guidance", "CFG", "EMAG", "EMAG + APG", "EMAG + CADS"]
    assert compared.shape[:2] == (5, 3) and "\nw_e 3, w 2\neta 0.5, norm 4,\nmomentum -0.25" in list(rows)[3]
    alone = [["--emag", 1, "--cfg", 1], ["--emag", 1], [], ["--apg", 0.5, 4, -0.25], ["--cads"]]
    for row, flags in zip(compared, alone):
        run_cli(capsys, *common, *flags, "--out", tmp_path / "alone.png")
        assert np.array_equal(row, tiles(tmp_path / "alone.png", 1)[:, 0])
    assert len({row.tobytes() for row in compared}) == 5


@pytest.mark.parametrize("case_name, variant", [("dit", "map"), ("dit", "image"), ("wild", "map")])
def test_the_trace_holds_a_query_tokens_rows(case_name, variant):
    case, slow = Case(case_name), SlowEMAG(Case(case_name), (1, 2, 3), beta=0.9)
    tokens = slice(2, 8) if variant == "image" else slice(None)
    emag = case.emag(beta=0.9, query_token=3, variant=variant, image_tokens=tokens)
    columns, row = (tokens, 2 + 3) if variant == "image" else (slice(None), 3)
    for step in range(4):
        with emag.observe():
            case.model(*case.inputs(step))
        slow.clean(*case.inputs(step))
        for b in range(3):
            for n, layer in enumerate((1, 2, 3)):
                live, average = emag.trace[-1].attention[b, n]
                torch.testing.assert_close(live, slow.maps[layer][b][:, row, columns].mean(dim=0))
                torch.testing.assert_close(average, slow.ema[layer, b][:, row, columns].mean(dim=0))
    assert case.emag().query_token is None and EMAG(case.blocks, [1]).trace == []


@pytest.mark.parametrize("name", ["positional", "boolean mask", "grouped heads"])
def test_the_trace_of_emag_q_shows_the_map_of_the_average_query(name):
    call, expected = CALLS[name]
    block, first, second = EyeBlock(call), eye_inputs(0), eye_inputs(1)
    emag = EMAG([block], [0], variant="query", beta=0.75, ema_dtype=F64, query_token=2)
    for x in (first, second):
        with emag.observe():
            block(x)
    average = torch.cat([(0.75 * first + 0.25 * second)[..., :20], second[..., 20:]], dim=-1)      # the queries alone
    live, averaged = emag.trace[-1].attention[:, 0].unbind(dim=1)
    torch.testing.assert_close(live, map_by_hand(second, **expected)[:, :, 2].mean(dim=1))
    torch.testing.assert_close(averaged, map_by_hand(average, **expected)[:, :, 2].mean(dim=1))


@pytest.mark.parametrize("sampler_name, ckpt", [("heun", DEMO), ("ddpm", EPS)])
def test_trace_draws_what_happened(sampler_name, ckpt, tmp_path, capsys):
    """The picture read back: grey where nothing was observed, outlines on the selected blocks, x̂₀ in the tiles."""
    steps, count, path = 11, 5, tmp_path / "trace.png"
    code, _, err = run_cli(capsys, "--ckpt", ckpt, "--sampler", sampler_name, "--steps", steps, "--num", count,
                           "--window", 1, 0.7, 0.3, "--threshold", 1, "--trace", path, "--out", tmp_path / "grid.png")
    assert (code, err) == (0, "") and {file.name for file in tmp_path.iterdir()} == {"trace.png", "grid.png"}
    page = Image.open(path)
    settings, told = json.loads(page.text["settings"]), []
    model, meta = load_dit(ckpt)
    _, emag = sampler.sample(model, meta, range(count), range(count), settings, lambda *step: told.append(step))
    pixels, cell, height = np.asarray(page.convert("RGB")), 660 // steps, 30
    grey, black, left, top = (232, 232, 232), (0, 0, 0), 84, 84
    selected = {step: entry.selected for step, entry in enumerate(emag.trace)}       # the window is open from step 0 on
    assert sorted(selected) == list(range(8)) and any(each[0, 1:].any() for each in selected.values())
    shares = top + 4 * height + 10 + 2 * 17 + 54
    for step in range(steps):
        for row in range(4):
            x, y = left + step * cell, top + row * height
            outlined = [tuple(pixels[y + edge, x + cell // 2]) == black for edge in (0, height - 1)]
            assert all(outlined) == any(outlined) == (step in selected and bool(selected[step][0, row]))
            assert (tuple(pixels[y + height // 2, x + cell // 2]) == grey) == (step not in selected)
            share = float(selected[step][:, row].double().mean()) if step in selected else math.nan
            shown = tuple(pixels[shares + row * height + height // 2, x + cell // 2].tolist())
            assert shown == {0.0: (255, 255, 255), 1.0: black, 0.4: (136, 116, 181)}.get(share, shown)
            assert (shown == grey) == math.isnan(share)
    bars = pixels[[top + 4 * height + 15, top + 4 * height + 32], left:left + steps * cell][:, cell // 2::cell]
    assert [(bar != 255).any(axis=-1).nonzero()[0].tolist() for bar in bars] == [list(range(8)), [3, 4, 5, 6, 7]]
    perturbed = [step for step, *_, negative in told if negative is not None]
    assert perturbed == [3, 4, 5, 6, 7]
    for column, step in enumerate((3, 5, 7)):
        _, t, x, clean, negative = told[step]
        for row, pred in enumerate((clean, negative)):
            a = sampler.ALPHAS_BAR[round(1000 * t)]
            x0 = x - t * pred if ckpt == DEMO else (x - (1 - a).sqrt() * pred) / a.sqrt()
            expected = ((x0[0] + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
            y, edge = top + row * 126, left + steps * cell + 130 + column * 126
            shown = np.asarray(Image.fromarray(expected).resize((120, 120), Image.Resampling.NEAREST))
            assert np.array_equal(pixels[y + 1:y + 119, edge + 1:edge + 119], shown[1:-1, 1:-1])


@pytest.mark.parametrize("flags", [
    ["--layers", "5"], ["--layers", "0-11", "--variant", "image"], ["--variant", "query"], ["--steps", 1],
    ["--steps", 120, "--num", 1], ["--uncond"], ["--apg", "--cads"]])
def test_trace_of_other_settings(flags, tmp_path, capsys):
    code, _, err = run_cli(capsys, *QUICK, *flags, "--trace", tmp_path / "trace.png", "--out", tmp_path / "grid.png")
    assert (code, err) == (0, "") and Image.open(tmp_path / "trace.png").width < 1400


def test_unconditional_ignores_the_classes(tmp_path, capsys):
    pixels = []
    for classes in ("smiley", "flag"):
        code, _, _ = run_cli(capsys, "--uncond", "--steps", 3, "--num", 2, "--classes", classes, "--out",
                             tmp_path / "grid.png")
        assert code == 0
        pixels.append(np.asarray(Image.open(tmp_path / "grid.png"))[:, -200:])          # right of the label
    assert np.array_equal(*pixels)


def folder_pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))])


MANY = ("--num", "24", "--steps", "4", "--emag", "2", "--batch", "8", "--device", "cpu")


def launch(*argv, processes: int = 1, **options) -> subprocess.Popen:
    start = [sys.executable] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--"]
    return subprocess.Popen([*start, str(HERE / "sampler.py"), *map(str, argv)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)


def test_many_images_however_they_are_drawn(tmp_path):
    """In one go, by two processes, and killed halfway and resumed: the same bytes; in other batches: to rounding."""
    runs = {name: tmp_path / name for name in ("one", "two", "killed", "fives")}
    one = launch(*MANY, "--out", runs["one"], "--npz", tmp_path / "one.npz")
    two = launch(*MANY, "--out", runs["two"], "--npz", tmp_path / "two.npz", processes=2)
    fives = launch(*MANY[:-4], "--batch", "5", "--device", "cpu", "--out", runs["fives"])
    for run in (one, two, fives):
        assert run.wait(timeout=120) == 0, run.stderr.read()

    pixels = folder_pixels(runs["one"])
    assert pixels.shape == (24, 32, 32, 3) and pixels.std() > 10
    with np.load(tmp_path / "one.npz") as packed:
        assert list(packed) == ["arr_0"] and packed["arr_0"].dtype == np.uint8
        assert np.array_equal(packed["arr_0"], pixels)

    assert np.array_equal(folder_pixels(runs["two"]), pixels)
    with np.load(tmp_path / "two.npz") as packed:
        assert np.array_equal(packed["arr_0"], pixels)

    killed = launch(*MANY, "--out", runs["killed"])
    while len(list(runs["killed"].glob("*.png"))) < 11 and killed.poll() is None:      # within the second batch
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    there = {file.name: file.stat().st_mtime_ns for file in runs["killed"].glob("*.png")}
    assert 11 <= len(there) < 24
    resumed = launch(*MANY, "--out", runs["killed"])
    assert resumed.wait(timeout=120) == 0, resumed.stderr.read()
    assert np.array_equal(folder_pixels(runs["killed"]), pixels)
    assert all((runs["killed"] / name).stat().st_mtime_ns == when for name, when in there.items())     # kept

    assert np.abs(folder_pixels(runs["fives"]).astype(int) - pixels).max() <= 1

    text = Image.open(runs["one"] / "000013.png").text
    assert json.loads(text["settings"]) == json.loads((runs["one"] / "settings.json").read_text()) | dict(index=13)


def test_one_process_failing_ends_the_others(tmp_path):
    """The folder goes away under the processes: torchrun ends the run, and nobody waits at a barrier."""
    broken = launch(*MANY, "--out", tmp_path / "out", processes=2)
    while not list((tmp_path / "out").glob("*.png")) and broken.poll() is None:
        time.sleep(0.002)
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    assert broken.wait(timeout=60) != 0


def test_resuming_with_other_settings_is_an_error(tmp_path, capsys):
    folder = tmp_path / "out"
    assert run_cli(capsys, "--num", 2, "--steps", 2, "--out", folder, "--npz", tmp_path / "a.npz")[0] == 0
    assert run_cli(capsys, "--num", 2, "--steps", 2, "--out", folder)[0] == 0
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    for change, message in ((("--seed", 5), "made with seed 0, not 5"), (("--emag", 7), "made with emag 2.0, not 7.0"),
                            (("--num", 3), "made with num 2, not 3")):
        code, out, err = run_cli(capsys, "--num", 2, "--steps", 2, "--emag", 2, "--out", folder, *change)
        assert code == 2 and out == "" and err.count("\n") == 1 and message in err
    (folder / "settings.json").unlink()
    code, _, err = run_cli(capsys, "--num", 2, "--steps", 2, "--out", folder)
    assert code == 2 and "no settings.json" in err and "000000.png" in before


def test_classes_are_dealt_evenly(tmp_path, capsys):
    code, *_ = run_cli(capsys, "--num", 9, "--steps", 1, "--out", tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert code == 0 and settings["classes"] == load_dit(DEMO)[1]["class_names"]


@pytest.fixture(scope="module")
def latent_files(tmp_path_factory) -> Path:
    """A tiny official DiT on 8×8 latents and a tiny autoencoder."""
    folder = tmp_path_factory.mktemp("latent")
    model = DiT(input_size=8, patch_size=4, hidden_size=384, depth=12, num_heads=6, num_classes=40)
    torch.save(randomised(model, std=0.02).float().state_dict(), folder / "dit.pt")
    decoder = randomised(LatentDecoder((32, 32, 32, 32)), std=0.1).float()
    torch.save(decoder.state_dict(), folder / "vae.bin")
    state = {name: tensor for name, tensor in model.state_dict().items() if "blocks.3." not in name}
    torch.save(state, folder / "short.pt")
    torch.save({"model": model.state_dict(), "opt": {}, "args": argparse.Namespace()}, folder / "no-ema.pt")
    odd = DiT(input_size=8, patch_size=4, hidden_size=96, depth=3, num_heads=3, num_classes=4)
    torch.save(odd.state_dict(), folder / "odd.pt")
    (folder / "broken.safetensors").write_bytes((10**9).to_bytes(8, "little") + b"{}")
    return folder


@pytest.mark.parametrize("argv", [
    [], ["--sampler", "ddim", "--eta", "1"], ["--flow", "sit", "--sampler", "heun"], ["--flow", "rf"],
    ["--guide-channels", "3"], ["--uncond"], ["--dtype", "bfloat16"]], ids=" ".join)
def test_latent_checkpoints(argv, latent_files, tmp_path, capsys):
    """Decoded and not decoded, with every way to read such a file: finite, and the decoder makes the picture."""
    common = ["--ckpt", latent_files / "dit.pt", "--steps", 5, "--classes", "3,7", "--num", 4, *argv]
    code, out, err = run_cli(capsys, *common, "--vae", latent_files / "vae.bin", "--out", tmp_path / "grid.png")
    assert (code, err) == (0, "")
    settings = json.loads(out.splitlines()[0])
    velocity = "--flow" in argv
    assert settings["layers"] == [5] and settings["cfg"] == (1.0 if "--uncond" in argv else 1.5)
    assert settings["emag"] == (1.5 if velocity else 3.0)
    assert settings["window"] == ([1.0, 0.8, 0.2] if velocity else [0.6, 0.4, 0.2])
    code, _, _ = run_cli(capsys, *common, "--latents", tmp_path / "z.npy")
    latents = np.load(tmp_path / "z.npy")
    assert code == 0 and latents.shape == (4, 4, 8, 8) and latents.dtype == np.float32 and np.isfinite(latents).all()
    tile = np.asarray(Image.open(tmp_path / "grid.png"))[4:132:2, -264:-136:2]      # 64×64 pixels, enlarged twice
    expected = sampler.to_images(torch.from_numpy(latents).double(), load_decoder(latent_files / "vae.bin"))[0]
    assert np.abs(tile.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("flags", [[], ["--dtype", "bfloat16"]], ids=" ".join)
def test_the_comparison_of_a_latent_checkpoint_is_decoded(flags, latent_files, tmp_path, capsys):
    common = ["--ckpt", latent_files / "dit.pt", "--vae", latent_files / "vae.bin", "--steps", 5, "--classes", "3,7"]
    for name, more in (("compared.png", ["--compare"]), ("alone.png", [])):
        code, _, err = run_cli(capsys, *common, "--num", 2, *flags, *more, "--out", tmp_path / name)
        assert (code, err) == (0, "")
    compared, alone = (np.asarray(Image.open(tmp_path / name).convert("RGB")) for name in ("compared.png", "alone.png"))
    emag_row = compared[4 + 2 * 132:][:128, -2 * 132:][:, :128]
    assert np.array_equal(emag_row, alone[4:132, -132:-4])


def test_the_trace_of_a_latent_checkpoint_is_decoded(latent_files, tmp_path, capsys):
    """DDPM with learned variance: the first moment's x̂₀ and negative x̂₀ are what the decoder makes of them."""
    vae, path = latent_files / "vae.bin", tmp_path / "trace.png"
    code, _, err = run_cli(capsys, "--ckpt", latent_files / "dit.pt", "--vae", vae, "--steps", 5, "--classes", 3,
                           "--num", 1, "--trace", path, "--out", tmp_path / "grid.png")
    assert (code, err) == (0, "")
    page, told = Image.open(path), []
    model, meta = load_dit(latent_files / "dit.pt")
    sampler.sample(model, meta, [3], [0], json.loads(page.text["settings"]), lambda *step: told.append(step))
    _, t, x, *predictions = next(step for step in told if step[-1] is not None)
    a = sampler.ALPHAS_BAR[round(1000 * t)]
    x0 = torch.cat([(x - (1 - a).sqrt() * pred[:, :4]) / a.sqrt() for pred in predictions])
    for row, image in enumerate(sampler.to_images(x0, load_decoder(vae))):
        expected = np.asarray(Image.fromarray(image).resize((120, 120), Image.Resampling.NEAREST))
        y, edge = 84 + row * 126, 84 + 660 + 130
        assert np.array_equal(np.asarray(page)[y + 1:y + 119, edge + 1:edge + 119], expected[1:-1, 1:-1])


LATENT_BAD = [
    (["--ckpt", "dit.pt"], "samples latents: give --vae"),
    (["--ckpt", "dit.pt", "--vae", "missing"], "no such checkpoint"),
    (["--ckpt", "dit.pt", "--vae", "dit.pt"], "not an autoencoder"),
    (["--ckpt", "vae.bin"], "this looks like an autoencoder (VAE): pass it as --vae"),
    (["--ckpt", "short.pt", "--latents", "z.npy"], "10 missing keys, first blocks.3.adaLN_modulation.1.bias"),
    (["--ckpt", "no-ema.pt"], "a training checkpoint without ema"),
    (["--ckpt", "odd.pt"], "3 blocks of 96 channels is none of DiT-S, B, L, XL: pass --heads"),
    (["--ckpt", "odd.pt", "--heads", "7"], "7 heads do not divide 96"),
    (["--ckpt", "broken.safetensors"], "truncated"),
    (["--ckpt", "dit.pt", "--vae", "vae.bin"], "--classes: 40 classes are too many for one grid"),
    (["--ckpt", "dit.pt", "--vae", "vae.bin", "--sampler", "euler", "--classes", "1"], "needs ddim or ddpm"),
    (["--ckpt", "dit.pt", "--vae", "vae.bin", "--guide-channels", "5", "--classes", "1"], "at most 4"),
    (["--out", "folder-1.5"], "--num: say how many"), (["--out", "dit.pt"], "need a folder in a folder that exists"),
    (["--ckpt", "dit.pt", "--latents", "z.npy"], "--num: say how many"),
    (["--npz", "x.npz"], "need a folder as --out"), (["--latents", "nowhere/z.npy"], "a folder that exists"),
    (["--out", "nowhere/folder", "--num", "1"], "a folder that exists"), (["--flow", "up"], "invalid choice"),
]


@pytest.mark.parametrize("argv, message", LATENT_BAD, ids=[" ".join(argv) for argv, _ in LATENT_BAD])
def test_bad_files_and_flags_of_latent_checkpoints(argv, message, latent_files, monkeypatch, capsys):
    test_bad_input_is_one_line_and_leaves_nothing(argv, message, latent_files, monkeypatch, capsys)


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def write_bad_checkpoints(folder: Path):
    whole = DEMO.read_bytes()
    (folder / "truncated.pt").write_bytes(whole[:len(whole) // 2])
    (folder / "empty.pt").write_bytes(b"")
    (folder / "text.pt").write_text("no checkpoint")
    torch.save({"weight": torch.zeros(2)}, folder / "foreign.pt")
    torch.save([1, 2], folder / "list.pt")
    torch.save({"model": RunsCode(folder / "ran"), "config": {}, "meta": {}}, folder / "code.pt")
    torch.save({"model": RunsCode(folder / "ran")}, folder / "old-code.pt", _use_new_zipfile_serialization=False)
    content = torch.load(DEMO, weights_only=True)
    torch.save(content | {"config": content["config"] | {"hidden_size": 96}}, folder / "misfit.pt")


BAD_INPUT = [
    (["--ckpt", "missing.pt"], "no such checkpoint"), (["--ckpt", "truncated.pt"], "truncated"),
    (["--ckpt", "empty.pt"], "truncated"), (["--ckpt", "text.pt"], "refused unread"),
    (["--ckpt", "foreign.pt"], "not a DiT checkpoint: it holds weight"), (["--ckpt", "list.pt"], "holds a list"),
    (["--ckpt", "code.pt"], "refused unread"), (["--ckpt", "old-code.pt"], "refused unread"),
    (["--ckpt", "misfit.pt"], "misshapen keys, first blocks.0"), (["--ckpt", "."], "a folder without config.json"),
    (["--classes", "9"], "need all, or of 0…8"), (["--classes", "smiley,emu"], "or activity, animal"),
    (["--classes", ""], "need all"), (["--layers", "12"], "of 0…11"), (["--layers", "4-x"], "need block numbers"),
    (["--layers", "7-4"], "need block numbers"), (["--beta", "1.5"], "0 ≤ beta ≤ 1"),
    (["--beta", "nan"], "0 ≤ beta ≤ 1"), (["--strength", "-0.1"], "0 ≤ strength ≤ 1"),
    (["--window", "0.2", "0.8", "1"], "need 1 ≥ start ≥ apply ≥ stop ≥ 0"),
    (["--steps", "0"], "at least 1"), (["--steps", "2.5"], "invalid int"), (["--steps", "1001"], "at most 1000"),
    (["--num", "0"], "at least 1"), (["--batch", "0"], "at least 1"), (["--seed", "-1"], "at least 0"),
    (["--emag", "inf"], "at most 1e+06"), (["--emag", "much"], "invalid float"),
    (["--sampler", "ddim"], "needs euler or heun"), (["--sampler", "magic"], "invalid choice"),
    (["--magic"], "unrecognized"), (["--device", "abacus"], "--device abacus"),
    (["--eta", "2"], "at least 0 and at most 1"),
    (["--out", "nowhere/grid.png"], "a folder that exists"), (["--out", "folder.png"], "a folder that exists"),
    (["--out", "grid.bmp"], "ends in .png"), (["--out", "grid.PNG"], "ends in .png"),
    (["--out", "/proc/grid.png"], "cannot be written"),
    (["--apg", "1", "2"], "need 3 numbers, or none for 0 5 -0.5"), (["--cads", "0.5"], "need 4 numbers, or none"),
    (["--apg", "--cfg", "1"], "w = 1 makes none"), (["--apg", "--uncond"], "w = 1 makes none"),
    (["--apg", "0", "0", "0"], "NORM > 0"), (["--apg", "0", "5", "-1"], "−1 < MOMENTUM < 1"),
    (["--apg", "nan", "5", "0"], "ETA ≥ 0"), (["--cads", "--uncond"], "--uncond has none"),
    (["--cads", "0.9", "0.6", "0.1", "1"], "TAU1 ≤ TAU2"), (["--cads", "0.6", "0.9", "0", "1"], "S > 0"),
    (["--cads", "0.6", "0.9", "0.1", "1.5"], "PSI ≤ 1"), (["--compare", "--uncond"], "neither --uncond nor --trace"),
    (["--compare", "--emag", "1"], "other than 1"), (["--compare", "--out", "new", "--num", "4"], "a .png as --out"),
    (["--compare", "--trace", "trace.png"], "nor --trace"), (["--trace", "trace.png", "--emag", "1"], "other than 1"),
    (["--trace", "trace.png", "--out", "new", "--num", "4"], "a .png as --out"), (["--trace", "trace.jpg"], "in .png"),
    (["--trace", "samples.png"], "another than --out"), (["--trace", "nowhere/trace.png"], "a folder that exists"),
]


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    (folder / "folder.png").mkdir()
    write_bad_checkpoints(folder)
    return folder


@pytest.mark.parametrize("argv, message", BAD_INPUT, ids=[" ".join(argv) for argv, _ in BAD_INPUT])
def test_bad_input_is_one_line_and_leaves_nothing(argv, message, bad_folder, monkeypatch, capsys):
    monkeypatch.chdir(bad_folder)
    before = sorted(bad_folder.rglob("*"))
    code, out, err = run_cli(capsys, *argv)
    assert code == 2 and out == ""
    assert err.startswith("sampler.py: ") and err.count("\n") == 1 and message in err
    assert sorted(bad_folder.rglob("*")) == before                          # nor did a pickle run and touch `ran`


def test_the_exit_code_reaches_the_shell(tmp_path):
    done = subprocess.run([sys.executable, HERE / "sampler.py", "--steps", "0"], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_progress_is_silent_where_stderr_is_no_terminal(tmp_path, capsys, monkeypatch):
    _, _, quiet = run_cli(capsys, *QUICK, "--out", tmp_path / "grid.png")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    _, _, shown = run_cli(capsys, *QUICK, "--out", tmp_path / "grid.png")
    assert quiet == "" and "step 3 of 3" in shown and "\n" not in shown


def test_the_demo_checkpoint_says_what_it_is():
    model, meta = load_dit(DEMO)
    assert DEMO.stat().st_size < 17e6 and meta["prediction"] == "velocity" and len(meta["class_names"]) == 9
    assert {"sampler", "steps", "cfg", "emag", "layers", "window"} <= meta["settings"].keys()
    assert not model.training and model.null_class == 9


# ---------------------------------------------------------------------------------------------------------- the house


def test_emag_imports_torch_alone():
    modules = re.findall(r"^(?:from|import) (\w+)", (HERE / "emag.py").read_text(), re.MULTILINE)
    assert set(modules) <= {"torch", "dataclasses", "collections", "contextlib", "functools"}


def test_the_table_of_the_readme_points_at_the_equations():
    """Each row: an equation, a function, and the line where that starts; the equation stands in its docstring."""
    readme = (HERE / "README.md").read_text(encoding="utf-8").replace("\\|", "|")
    row = r"^\| `(.+?)` \| `(\w[\w.]*)` \| \[(\w+\.py):(\d+)\]\((\w+\.py)#L(\d+)\) \|"
    rows = re.findall(row, readme, re.MULTILINE)
    assert len(rows) >= 8
    for equation, name, file, line, linked_file, linked_line in rows:
        lines = (HERE / file).read_text().splitlines()
        assert (file, line) == (linked_file, linked_line)
        start = rf"\s*(def|class) {name.split('.')[-1]}\b"
        assert re.match(start, lines[int(line) - 1]), f"{name} is not at {file}:{line}"
        body = "\n".join(lines[int(line) - 1:int(line) + 12])
        assert equation in body, f"{equation} is not beside {name}"


def test_sizes_of_the_paper():
    assert DIT_SIZES == {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
    with torch.device("meta"):
        model = DiT()
    learned = sum(p.numel() for name, p in model.named_parameters() if name != "pos_embed")
    assert learned == pytest.approx(675e6, rel=2e-3)                         # "675M", Peebles & Xie, table 1
