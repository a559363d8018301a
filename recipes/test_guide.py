"""guide, on the models of test_emag.py, against the equations written out there and loops written by hand."""
import collections
import dataclasses
import math
import re
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = map(str, [HERE, HERE.parent])
import emag  # noqa: E402
from guide import guide  # noqa: E402
from test_emag import F64, Case, SlowEMAG, seeded, small_dit, state  # noqa: E402


@pytest.fixture
def case() -> Case:
    return Case("wild")                                                  # the cheaper one


def halves(case: Case, step: int, cond: str = "last") -> list[Tensor]:
    """The inputs of a doubled batch."""
    parts = [case.inputs(step, null=True), case.inputs(step)][::1 if cond == "last" else -1]
    return [torch.cat(pair) for pair in zip(*parts)]


def by_the_loop(case: Case, slow: SlowEMAG, step: int) -> Tensor:
    """The conditional prediction that guide must give in a step, of 5 with scale 2.5, by the equations."""
    if step == 4:                                                        # round(0.2·4) ≤ r: observed are steps 0…3
        return case.by_hand(*case.inputs(step))
    pred = slow.clean(*case.inputs(step))
    negative = slow.negative(*case.inputs(step)) if step >= 1 else pred  # r ≤ round(0.8·4)
    return negative + 2.5 * (pred - negative)


GUIDED = dict(layers=(1, 2, 3), scale=2.5, steps=5, beta=0.8, ema_dtype=F64)


@pytest.mark.parametrize("name, channels", [("dit", slice(None)), ("wild", slice(0, 2))])
@pytest.mark.parametrize("calls, cond, images", [(1, "first", 3), (1, "last", 3), (1, "all", 3), (2, "first", 1),
                                                 (2, "first", 2), (2, "last", 1), (2, "last", 2)])
def test_guide_is_the_loop_written_by_hand(name, calls, cond, images, channels):
    case = Case(name, images)

    def run(step: int) -> tuple[Tensor, Tensor | None]:
        """The conditional prediction, and the other."""
        if calls == 2:
            out = [case.model(*case.inputs(step, null=null)) for null in (cond == "last", cond == "first")]
            return out if cond == "first" else out[::-1]
        out = case.model(*(case.inputs(step) if cond == "all" else halves(case, step, cond)))
        return (out, None) if cond == "all" else out.chunk(2)[::1 if cond == "first" else -1]

    plain = [run(step) for step in range(5)]
    with guide(case.model, case.blocks, calls=calls, cond=cond, channels=channels, **GUIDED) as used:
        for repeat in range(2):                                          # a second image starts a new trajectory
            slow = SlowEMAG(case.by_hand, beta=0.8)
            for step in range(5):
                (pred, other), expected = run(step), plain[step][0].clone()
                expected[:, channels] = by_the_loop(case, slow, step)[:, channels]
                torch.testing.assert_close(pred, expected)
                assert (step in (0, 4)) == torch.equal(pred, plain[step][0])        # step 0's E is A; step 4 is outside
                assert other is None or torch.equal(other, plain[step][1])          # passes through untouched
                assert not used._calls and not used._outputs                        # nothing is kept of the passes
            assert len(used.trace) == 4


Output = collections.namedtuple("Output", "sample more")
Record = dataclasses.make_dataclass("Record", ["sample", "more"])


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("wrap", [lambda out, more: out, lambda *both: both, Output, Record])
def test_guide_with_lists(wrap, images):
    """One tensor per sample, in and out, as Z-Image and the official code of Wan have them; and what is around them."""
    case, made = Case("dit", images), []
    forward, slow = case.model.forward, SlowEMAG(case.by_hand, beta=0.8)

    def of_lists(empty, x, t, *, y):
        made.append(list(forward(torch.stack(x), t, torch.stack(y))))
        return wrap(made[-1], "more")

    def run(step: int):
        x, t, y = halves(case, step, "first")
        out = case.model([], list(x), t, y=list(y))
        assert getattr(out, "more", out[1] if type(out) is tuple else "more") == "more"
        assert type(out) is type(wrap([], "more"))
        return out if type(out) is list else getattr(out, "sample", None) or out[0]

    case.model.forward = of_lists
    plain = [run(step) for step in range(5)]
    with guide(case.model, case.blocks, cond="first", channels=slice(0, 2), **GUIDED):
        for step, clean in enumerate(plain):
            out, expected = run(step), torch.stack(clean)
            expected[:images, :2] = by_the_loop(case, slow, step)[:, :2]
            torch.testing.assert_close(torch.stack(out), expected)
            assert all(map(torch.equal, out[images:], clean[images:]))
            whole = [each for each in made[5:] if len(each) == 2 * images]         # the model's own: as it made it
            assert all(map(torch.equal, whole[-1], clean)) and case.model.forward.__name__ == "of_lists"


@pytest.mark.parametrize("cond", ["first", "last"])
def test_a_model_that_writes_all_its_outputs_to_one_place(case, cond):
    out, forward = torch.zeros_like(case.model(*halves(case, 0))), case.model.forward

    def to_one_place(*args):
        out[:len(args[0])] = forward(*args)
        return out[:len(args[0])]

    found = []
    for case.model.forward in (forward, to_one_place):
        with guide(case.model, case.blocks, cond=cond, **GUIDED):
            found.append([case.model(*halves(case, step, cond)).clone() for step in range(5)])
    assert all(map(torch.equal, *found))


def test_x_t_is_the_first_tensor_with_dimensions():
    """A time without may stand before it; one of shape (1,) would be taken for it."""
    case, expected = Case("dit"), []
    forward = case.model.forward
    with guide(case.model, case.blocks, cond="last", **GUIDED):
        expected += [case.model(*halves(case, step)) for step in range(5)]
    case.model.forward = lambda t, x, y: forward(x, t.expand(len(x)), y)
    for shape in ((), (1,)):
        with pytest.raises(RuntimeError, match="1 samples went in") if shape else nullcontext(), \
                guide(case.model, case.blocks, cond="last", **GUIDED):
            for step in range(5):
                x, t, y = halves(case, step)
                torch.testing.assert_close(case.model(t[0].view(shape), x, y), expected[step])


def test_guide_with_an_input_that_is_one_for_all_samples():
    """(6,), by chance as long as the batch: it would be cut like the samples."""
    case, moved, shift = Case("dit"), Case("dit"), torch.arange(6.0)
    case.model.eight_bits = nn.Parameter(torch.ones(1).to(torch.float8_e4m3fn), requires_grad=False)
    forward, passes = case.model.forward, []
    case.model.forward = mine = lambda x, t, y, shift: passes.append(1) or forward(x + shift.mean(), t, y)
    moved.inputs = lambda step: (case.inputs(step)[0] + 2.5, *case.inputs(step)[1:])
    for reuse in (True, False):
        with pytest.raises(RuntimeError, match="give take="):
            with guide(case.model, case.blocks, reuse=reuse, cond="last", **GUIDED):
                for step in range(5):
                    case.model(*halves(case, step), shift=shift)

    def take(args, kwargs, rows):
        return [part[rows] for part in args], kwargs

    slow = SlowEMAG(case.by_hand, beta=0.8)
    passes.clear()
    with guide(case.model, case.blocks, take=take, cond="last", **GUIDED):
        for step in range(5):
            pred = case.model(*halves(case, step), shift=shift)[3:]
            torch.testing.assert_close(pred, by_the_loop(moved, slow, step))
    assert case.model.forward is mine                                    # and not the one of its class
    assert len(passes) == 5 + 3 + 1                                      # one to check the cut, in the first step


def test_a_wrong_cut_is_seen_where_the_condition_changes_little():
    """By 2 to 4% here, and bfloat16 may round by as much. The classes (1, 6) are not cut: the first half's act."""
    case, labels = Case("dit"), halves(Case("dit"), 0)[2]
    table, forward = case.model.y_embedder.embedding_table.weight, case.model.forward
    table.copy_(table[3] + 0.1 * (table - table[3]))
    case.model.bfloat16().forward = lambda x, t, y: forward(x, t, y[0, :len(x)])
    with pytest.raises(RuntimeError, match="give take="), guide(case.model, case.blocks, cond="last", **GUIDED):
        for step in range(5):
            case.model(*(part.bfloat16() for part in halves(case, step)[:2]), labels[None])
    for cond in ("first", "last"):                                       # where it changes much, 3% is rounding
        far = Case("dit")
        plain = far.model.bfloat16().forward
        far.model.forward = lambda x, *rest, plain=plain: plain(x, *rest) * (1 + 0.03 * (len(x) == 3))
        with guide(far.model, far.blocks, cond=cond, **GUIDED):
            for step in range(5):
                x, t, y = halves(far, step)
                far.model(x.bfloat16(), t.bfloat16(), y)


def test_guide_off_and_out_leaves_the_model_as_it_was(case):
    before, plain, double, single = state(case.model), case.model(*halves(case, 0)), halves(case, 0), case.inputs(0)
    with guide(case.model, case.blocks, (1, 2), scale=1.0, steps=3, cond="last") as emag:
        assert torch.equal(case.model(*double), plain) and state(case.model) == before
    assert emag.trace == []
    with pytest.raises(ZeroDivisionError), guide(case.model, case.blocks, (1, 2), steps=3, cond="last"):
        case.model(*double)
        1 / 0
    other = Case(case.name, seed=1)                             # nested: two models, and then one model twice
    options = dict(layers=(1, 2), steps=1, cond="last")
    with guide(case.model, case.blocks, **options), guide(other.model, other.blocks, **options):
        for _ in range(2):
            case.model(*double), other.model(*double)
    with guide(case.model, case.blocks, (1, 2), steps=3, cond="all", reuse=False) as emag:
        for _ in range(3):
            case.model(*single)
            single[0].mul_(0.9)                                 # latents that change in place
    assert not emag.reuse
    with pytest.raises(RuntimeError, match=r"another guide\(\)"), guide(case.model, case.blocks, **options):
        with guide(case.model, case.blocks, **options):
            pass
    assert state(case.model) == before and torch.equal(case.model(*double), plain)


def test_guide_stays_on_a_model_that_is_offloaded(case):
    """As by diffusers' enable_model_cpu_offload: after a run of the pipeline the hook is taken off and put on again."""
    hooks = pytest.importorskip("accelerate.hooks")

    def two_runs(offload: Callable) -> list[Tensor]:
        found = []
        with guide(case.model, case.blocks, (1, 2), steps=3, cond="last"):
            for _ in range(2):
                found += [case.model(*halves(case, step)) for step in range(3)]
                offload()
        return found

    def offload():
        hooks.remove_hook_from_module(case.model)
        hooks.add_hook_to_module(case.model, hooks.ModelHook())

    plain, expected = case.model(*halves(case, 0)), two_runs(lambda: None)
    assert all(map(torch.equal, two_runs(offload), expected))           # put on inside guide(), and there already
    assert all(map(torch.equal, two_runs(offload), expected))
    assert torch.equal(case.model(*halves(case, 0)), plain)
    hooks.remove_hook_from_module(case.model)
    assert torch.equal(case.model(*halves(case, 0)), plain)


def refusal(case: Case, inputs, **options) -> str:
    """The error that guide() ends with when the model is called with these inputs, and in which call: "2: …"."""
    passes, options = [], dict(layers=(1, 2), steps=3, cond="last") | options
    handle = case.model.register_forward_hook(lambda *args: passes.append(1))
    try:
        with pytest.raises(RuntimeError) as error, guide(case.model, case.blocks, **options):
            for each in inputs:
                case.model(*each)
    finally:
        handle.remove()
    return f"{len(passes)}: {error.value}"


def test_guide_draws_one_trajectory_at_a_time(case):
    double = [halves(case, step) for step in range(3)]
    options = dict(layers=(1, 2), steps=3, cond="last")
    with pytest.raises(RuntimeError, match="failed"), guide(case.model, case.blocks, **options):
        case.model(*double[0])
        with pytest.raises(TypeError):
            case.model(double[1][0])                                    # the other inputs are missing
        case.model(*double[1])
    with guide(case.model, case.blocks, **options):
        expected = [case.model(*each) for each in double]
    with guide(case.model, case.blocks, **options) as emag:             # the advice: reset() and start again
        case.model(*double[0])
        with pytest.raises(TypeError):
            case.model(double[1][0])
        emag.reset()
        assert all(map(torch.equal, [case.model(*each) for each in double], expected))

    def elsewhere(inputs: list) -> list:
        """What the model gives in another thread."""
        def run():
            try:
                found.extend(case.model(*each) for each in inputs)
            except RuntimeError as error:
                found.append(str(error))
        found = []
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return found

    with guide(case.model, case.blocks, **options):
        case.model(*double[0])
        assert "another thread" in elsewhere(double[1:])[0]             # and this one goes on as if nothing had been
        assert all(map(torch.equal, [case.model(*each) for each in double[1:]], expected[1:]))
        assert all(map(torch.equal, elsewhere(double), expected))       # one after the other
    forward, calls = case.model.forward, []

    def inside(*inputs):                                                # a pipeline draws inside a call of another one
        calls.append(1)
        if len(calls) == 1:
            case.model(*double[1])
        return forward(*inputs)

    case.model.forward = inside
    assert "two pipelines draw at once" in refusal(case, double)


def test_a_batch_is_what_cfg_makes_of_it(case):
    case.batch = 4
    x, *rest = case.inputs(0)
    for rows in ([0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0], [0, 1, 2, 0]):
        for cond in ("first", "last", "all"):
            assert refusal(case, [(x[rows], *rest)], cond=cond).startswith("0: the batch of 4 samples holds some")
        assert "holds some latents more than once" in refusal(case, [(x[rows], *rest)], cond="first", calls=2)
    twice = x[[0, 1, 0, 1]], *rest
    assert "give calls=1" in refusal(case, [twice], calls=2)
    assert "cond='first' or 'last'" in refusal(case, [twice], cond="all")
    mixed = x.clone()
    mixed[2:, :1] = x[:2, :1]                                            # other channels (tokens) are not equal
    assert "joins other inputs" in refusal(case, [(mixed, *rest)])
    for free in (dict(cond="all"), dict(cond="first", calls=2)):         # where no batch is doubled, they may be
        with guide(case.model, case.blocks, (1, 2), steps=1, **free):
            case.model(mixed, *rest)
    mixed = x.clone()
    mixed[2:, 0, :2] = mixed[:2, 0, :2] = 0                              # some numbers, such as zeros, may be
    with guide(case.model, case.blocks, (1, 2), steps=1, cond="last", variant="query", ema_dtype=F64):
        case.model(mixed, *rest)
    for advice in (dict(cond="all"), dict(cond="first", calls=2)):       # the first where there is no CFG
        with guide(case.model, case.blocks, (1, 2), steps=1, variant="query", ema_dtype=F64, **advice):
            case.model(mixed, *rest)                                     # whose negative is the prediction: E = A


def interval(case: Case, calls: int, cond: str) -> list[tuple]:
    """The model's inputs in five steps with CFG in steps 1 to 3 alone, as (step, what it is, inputs)."""
    found = []
    for step in range(5):
        clean, null = ("pred", case.inputs(step)), ("other", case.inputs(step, null=True))
        if not 1 <= step <= 3:
            found += [(step, *clean)]
        elif calls == 2:
            found += [(step, *clean), (step, *null)]
        else:
            found += [(step, cond, halves(case, step, cond))]
    return found


@pytest.mark.parametrize("name, calls, cond", [("wild", 1, "first"), ("dit", 1, "last"), ("wild", 2, "first")])
def test_cfg_in_an_interval(name, calls, cond):
    """Batches that are not doubled, and conditional calls without a partner, first and last."""
    for case in (Case(name, 1), Case(name, 2)):
        slow = SlowEMAG(case.by_hand, beta=0.8)
        with guide(case.model, case.blocks, cond=cond, calls=calls, **GUIDED) as emag:
            for step, kind, inputs in interval(case, calls, cond):
                out = case.model(*inputs)
                if kind in ("first", "last"):
                    pred, other = out.chunk(2)[::1 if kind == "first" else -1]
                    torch.testing.assert_close(other, case.by_hand(*case.inputs(step, null=True)))
                elif kind == "other":
                    torch.testing.assert_close(out, case.by_hand(*inputs))
                if kind != "other":
                    torch.testing.assert_close(out if kind == "pred" else pred, by_the_loop(case, slow, step))
        assert len(emag.trace) == 4


@pytest.mark.parametrize("calls, cond", [(1, "last"), (1, "first"), (2, "first"), (2, "last")])
def test_further_calls_in_a_step_do_not_count(case, calls, cond):
    """After CFG's call or calls: the conditional one once more (samplers that evaluate twice) is guided like it, others
    (skip-layer guidance) come back as they are."""
    slow, forward, thing = SlowEMAG(case.by_hand, beta=0.8), case.model.forward, SimpleNamespace()
    case.model.forward = lambda *inputs, more=None: forward(*inputs)
    with guide(case.model, case.blocks, cond=cond, calls=calls, **GUIDED) as emag:
        for step in range(5):
            clean, null = case.inputs(step), case.inputs(step, null=True)
            skip = clean[0], *[part.roll(1, 0) for part in clean[1:]]                          # another condition
            expected, double = by_the_loop(case, slow, step), halves(case, step, cond)
            calls_of_step = [double] if calls == 1 else [clean, null][::1 if cond == "first" else -1]
            for repeat in range(2):
                for inputs in calls_of_step:
                    out = case.model(*inputs, more=[None, float("0.5"), thing])
                    if calls == 1:
                        out, rest = out.chunk(2)[::1 if cond == "first" else -1]
                        torch.testing.assert_close(rest, case.by_hand(*null))
                    torch.testing.assert_close(out, case.by_hand(*null) if inputs is null else expected)
                torch.testing.assert_close(case.model(*skip), case.by_hand(*skip))
                wild = [torch.cat([part, part.roll(1, 0)]) for part in skip[1:]]
                if calls == 1:                                           # a doubled one with other conditions
                    torch.testing.assert_close(case.model(torch.cat([clean[0]] * 2), *wild),
                                               case.by_hand(torch.cat([clean[0]] * 2), *wild))
                for more in (None, [None, 0.5, SimpleNamespace()], [None, 0.25, thing]):
                    inputs = calls_of_step[cond == "last" and calls == 2]
                    torch.testing.assert_close(case.model(*inputs, more=more), case.by_hand(*inputs))
        assert len(emag.trace) == 4
    if calls == 2 and cond == "first":
        with guide(case.model, case.blocks, cond=cond, calls=calls, **GUIDED):
            for inputs in map(case.inputs, range(5)):                    # no condition: both calls get the same inputs
                case.model(*inputs)
                torch.testing.assert_close(case.model(*inputs), case.by_hand(*inputs))


def test_guide_refuses_calls_that_are_not_as_described(case):
    doubled = [halves(case, step) for step in range(4)]
    assert "never called" in refusal(case, []) and "never called" in refusal(case, [], steps=lambda: 3)
    assert "0: the model was called without a tensor" in refusal(case, [(1, 2)])
    assert "step 2 of 3" in refusal(case, doubled[:2]) and "step 1 of 3" in refusal(case, doubled)
    with pytest.MonkeyPatch.context() as patch:
        forward, plain = case.model.forward, case.model(*doubled[1])
        for wrap, unwrap in ((lambda out: {"sample": out}, lambda out: out["sample"]),
                             (lambda out: ((out,),), lambda out: out[0][0]),
                             (lambda out: Record((out,), 1), lambda out: out.sample[0])):
            patch.setattr(case.model, "forward", lambda *args, wrap=wrap: wrap(forward(*args)))
            with guide(case.model, case.blocks, (1, 2), steps=3, cond="last"):
                outs = [unwrap(case.model(*each)) for each in doubled[:3]]
            assert torch.equal(outs[1][:3], plain[:3]) and not torch.equal(outs[1][3:], plain[3:])
        for wrap, message in ((lambda out: [out], "observed, and the prediction holds 1"), (str, "returns a str")):
            patch.setattr(case.model, "forward", lambda *args, wrap=wrap: wrap(forward(*args)))
            assert message in refusal(case, doubled)
        patch.setattr(case.model, "forward", lambda *args: forward(*args)[:None if len(args[0]) == 6 else 1])
        assert "predicts something else" in refusal(case, doubled)       # one sample instead of three
    for case.batch in (1, 2, 3):
        single = [case.inputs(step) for step in range(4)]
        two = [case.inputs(step, null) for step in range(4) for null in (False, True)]
        for cond in ("all", "first", "last"):                            # two calls taken for one
            assert re.match("1: .*same latents.*calls=2", refusal(case, two, cond=cond, steps=4))
        with guide(case.model, case.blocks, (1, 2), steps=4, cond="first", calls=2):     # the advice
            for each in two:
                case.model(*each)
        assert re.match("1: .*they differ: .*give calls=1.*cond='first'", refusal(case, single, calls=2))
        for advice in (dict(cond="first", calls=2), dict(cond="last"), dict(cond="all")):
            with guide(case.model, case.blocks, (1, 2), steps=4, **advice):
                for each in single:
                    case.model(*each)
        assert "step 2 of 2" in refusal(case, two[:3], calls=2, steps=2)


def test_steps_and_image_tokens_that_are_functions(case):
    """Asked when a trajectory starts: here of 5 steps, of 3, and then of none."""
    counts, asked = iter([5, 3, 0]), []
    slice_of = lambda args, kwargs: (asked.append((args, kwargs)), slice(0, 2 + len(asked)))[1]             # noqa: E731
    options = GUIDED | dict(steps=lambda: next(counts))
    with guide(case.model, case.blocks, cond="all", image_tokens=slice_of, **options) as emag:
        for steps in (5, 3):
            slow = SlowEMAG(case.by_hand, beta=0.8, image_tokens=slice(0, 2 + (2 if steps == 3 else 1)))
            for step in range(steps):
                pred = case.model(*case.inputs(step))
                if steps == 5:
                    torch.testing.assert_close(pred, by_the_loop(case, slow, step))
            assert len(emag.trace) == {5: 4, 3: 3}[steps]
    assert len(asked) == 2 and torch.equal(asked[0][0][0], case.inputs(0)[0])
    with guide(case.model, case.blocks, cond="all", **options):          # an expert that has no step
        pass
    with pytest.raises(RuntimeError, match="need at least 1"):
        with guide(case.model, case.blocks, (1, 2), cond="all", steps=lambda: 0):
            case.model(*case.inputs(0))


@pytest.mark.parametrize("layers", [5, 6, 7])
def test_lists_are_cut_inside_and_each_call_has_its_own(case, layers):
    """6 is the batch. The model takes what it uses out of a list and a dict, as diffusers' U-Net and Flux do."""
    forward, hint, passes = case.model.forward, [], []

    def takes(x, *rest, hints, extra):
        passes.append(len(x))
        shift = extra.pop("shift")
        while hints:
            shift = shift + hints.pop(0)
        return forward(x + 0.1 * shift.view(-1, *[1] * (x.ndim - 1)), *rest)

    case.model.forward = takes
    parts = [seeded(3, seed=50 + n) for n in range(layers + 1)]
    moved, slow = Case(case.name), SlowEMAG(case.by_hand, beta=0.8)
    total = sum(parts)
    moved.inputs = lambda step: ((x := case.inputs(step))[0] + 0.1 * total.view(-1, *[1] * (x[0].ndim - 1)), *x[1:])
    with guide(case.model, case.blocks, cond="last", **GUIDED):
        for step in range(5):
            hint, extra = [part.repeat(2) for part in parts[1:]], dict(shift=parts[0].repeat(2))
            pred = case.model(*halves(case, step), hints=hint, extra=extra)
            torch.testing.assert_close(pred[3:], by_the_loop(moved, slow, step))
            assert not hint and not extra                                # the pipeline's own are used as without guide
    assert passes == [6, 6, 3, 3, 6, 3, 6, 3, 6]                         # step 1's first three: the check of the cut


def test_hooks_of_the_model_stay_around_guide(case):
    """For APG and CADS in a pipeline: before it they change the condition, after it they see ε̃'."""
    slow, seen, shift = SlowEMAG(case.by_hand, beta=0.8), [], 0.3
    moved = Case(case.name)
    moved.inputs = lambda step, null=False: (case.inputs(step, null)[0] + shift, *case.inputs(step, null)[1:])
    case.model.register_forward_pre_hook(lambda model, args: (args[0] + shift, *args[1:]))
    case.model.register_forward_hook(lambda model, args, out: (seen.append(out), 2 * out)[1])
    with guide(case.model, case.blocks, cond="last", **GUIDED):
        for step in range(5):
            out = case.model(*halves(case, step))
            torch.testing.assert_close(seen[-1][3:], by_the_loop(moved, slow, step))
            assert torch.equal(out, 2 * seen[-1])
    assert len(seen) == 5


def test_a_sampler_that_calls_another_method(case):
    """As REPA-E's calls model.inference; the error's advice is followed."""
    model = case.model
    kind = type(model)

    class Trains(kind):
        def forward(self, *args):
            raise AssertionError("for training")

        def inference(self, *args):
            return kind.forward(self, *args)

    model.__class__, slow = Trains, SlowEMAG(case.by_hand, beta=0.8)
    with pytest.raises(RuntimeError, match="model.inference, model.__call__"):
        with guide(model, case.blocks, cond="all", **GUIDED):
            model.inference(*case.inputs(0))
    advice = "model.forward, model.inference = model.inference, model.__call__"
    exec(advice, dict(model=model))
    with guide(model, case.blocks, cond="all", **GUIDED):
        for step in range(5):
            torch.testing.assert_close(model.inference(*case.inputs(step)), by_the_loop(case, slow, step))
    wrong = Case(case.name, seed=1)                                      # and a pipeline that calls another model
    with pytest.raises(RuntimeError, match="give the model that the pipeline calls"):
        with guide(wrong.model, wrong.blocks, cond="all", **GUIDED):
            case.model(*case.inputs(0))


def test_attention_whose_result_is_not_used(case):
    """The negative is then the prediction. With λ = 0 it may be."""
    attend = torch.nn.functional.scaled_dot_product_attention
    blocks = case.model.blocks = nn.ModuleList(Before(block, attend) for block in case.blocks)
    inputs = [case.inputs(step) for step in range(5)]
    for strength in (1.0, 0.5):
        with pytest.raises(RuntimeError, match="not the image's attention"):
            with guide(case.model, blocks, cond="all", strength=strength, **GUIDED):
                for each in inputs:
                    case.model(*each)
    plain = [case.model(*each) for each in inputs]
    with guide(case.model, blocks, cond="all", strength=0.0, **GUIDED):
        assert all(torch.allclose(case.model(*each), old) for each, old in zip(inputs, plain))


@pytest.mark.parametrize("value", [False, -torch.inf, torch.finfo(F64).min, -5.0])
def test_masks_that_hide_a_part_of_the_image(value):
    """16 tokens, 12 of them the image's. A bias of −5 hides nothing."""
    case, attend = Case("dit", 2), torch.nn.functional.scaled_dot_product_attention
    for block in case.blocks:
        block.attn.forward = lambda x: attend(*[x[:, None]] * 3, attn_mask=mask[:, None])[:, 0]
    for hidden, good in (((slice(0), 0, 0), True), ((0, slice(None), slice(12, 16)), True),       # nothing; some text
                         ((1, slice(None), 3), False), ((1, slice(5), 3), True)):     # the image; from some queries
        mask = torch.ones(2, 16, 16, dtype=torch.bool) if value is False else torch.zeros(2, 16, 16, dtype=F64)
        mask[hidden] = value
        with nullcontext() if good or value == -5.0 else pytest.raises(RuntimeError, match="mask hides"):
            with guide(case.model, case.blocks, (1, 2), steps=1, cond="all", image_tokens=slice(0, 12)):
                case.model(*case.inputs(0))


class Before(nn.Module):
    """A block with a self-attention before it that only chooses something."""

    def __init__(self, block: nn.Module, attend: Callable):
        super().__init__()
        self.block, self.attend = block, attend

    def forward(self, *args, **kwargs):
        x = args[0] if args else kwargs["hidden"]
        self.attend(x[:, None], x[:, None], x[:, None]).amax()
        return self.block(*args, **kwargs)


@pytest.mark.parametrize("options, message", [
    (dict(cond="middle"), "cond is 'middle': need"), (dict(cond="all", calls=2), "cond is 'all': need .*'first'"),
    (dict(steps=0), "at least 1"), (dict(calls=3), "need 1 or 2"), (dict(scale=math.nan), "need a finite number"),
    (dict(scale=math.inf), "need a finite number"), (dict(layers=[7]), "layers"), (dict(channels=3), "need a slice"),
    (dict(image_tokens=[0, 4]), "need a slice")])
def test_arguments_out_of_range(options, message):
    model = small_dit()
    with pytest.raises(ValueError, match=message):
        with guide(model, model.blocks, **dict(layers=[1], cond="last") | options):
            pass


def test_which_half_is_conditional_must_be_said():
    model = small_dit()
    with pytest.raises(TypeError, match="cond"), guide(model, model.blocks, [1]):
        pass


def test_guide_inside_a_model_that_is_compiled_as_a_whole():
    """It runs uncompiled. The other ways to compile: test_recipes.py."""
    torch._dynamo.reset()
    case, slow = Case("dit"), SlowEMAG(Case("dit").by_hand, beta=0.8)
    compiled = torch.compile(case.model, backend="eager")
    off = compiled(*case.inputs(0))
    with guide(case.model, case.blocks, cond="all", **GUIDED):
        for step in range(5):
            torch.testing.assert_close(compiled(*case.inputs(step)), by_the_loop(case, slow, step))
    assert torch.equal(compiled(*case.inputs(0)), off)
    torch._dynamo.reset()


def test_the_snippet_of_guide_guides_a_pipeline():
    """The README's: a doubled batch of one image, the conditional half last, in 28 steps of Euler."""
    def pipe(prompt: int, num_inference_steps: int, guidance_scale: float) -> SimpleNamespace:
        x = seeded(1, 3, 8, 8)
        for step in range(num_inference_steps):
            t = torch.full((2,), 1000 * (1 - step / num_inference_steps), dtype=F64)
            null, cond = pipe.transformer(torch.cat([x, x]), t, torch.tensor([3, prompt])).chunk(2)
            x = x - (null + guidance_scale * (cond - null)) / num_inference_steps
        return SimpleNamespace(images=[x])

    pipe.transformer, pipe.num_timesteps = small_dit(depth=9), 28
    pipe.transformer.transformer_blocks = pipe.transformer.blocks
    readme = (HERE.parent / "README.md").read_text(encoding="utf-8")
    code, = (code for code in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "with guide(" in code)
    code, names = code[code.index("with guide("):].replace("4096", "16"), dict(guide=guide, pipe=pipe, prompt=1)
    exec(code, names)                                                    # 16 image tokens are all of this model's
    plain = pipe(1, 28, 7.0).images[0]
    assert len(names["emag"].trace) == 23 and (names["image"] - plain).abs().max() > 1e-3
    exec(code.replace("scale=1.5", "scale=1.0"), names)
    assert torch.equal(names["image"], plain)


def test_the_recipes_readme():
    """Its snippet runs, its table names each recipe, and what it says of the window and of PAG's scale is so."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    transformer, steps = small_dit(depth=9), 28
    transformer.transformer_blocks = transformer.blocks
    found = []

    def pipe(prompt: str, num_inference_steps: int, guidance_scale: float) -> SimpleNamespace:
        for step in range(num_inference_steps):
            x = seeded(1, 3, 8, 8, seed=step)
            found.append(transformer(torch.cat([x, x]), torch.full((2,), 900.0 - step), torch.tensor([3, 1])))
        return SimpleNamespace(images=[x])

    pipe.transformer, pipe.num_timesteps = transformer, steps
    names = dict(pipe=pipe, prompt="")
    exec(code.replace("4096", "16"), names)
    guided, found = found, []
    pipe("", steps, 7.0)
    acts = [step for step in range(steps) if not torch.equal(guided[step], found[step])]
    assert "from 20% to 80% of the run" in text
    assert abs(acts[0] / steps - 0.2) < 0.05 and abs((acts[-1] + 1) / steps - 0.8) < 0.05
    null, pred, negative = seeded(3, 5)
    w, w_e = 7, 1.5
    pag = null + w * (pred - null) + 3.5 * (pred - negative)                      # as diffusers' PAG adds it
    torch.testing.assert_close(emag.cfg_update(emag.emag_update(pred, negative, w_e), null, w), pag)
    files = {file.stem for file in HERE.glob("[!t]*.py") if "\ndef draw(" in file.read_text(encoding="utf-8")}
    assert files - {"guider"} <= set(re.findall(r"^\| \[(\w+)\]\(\1\.py\)", text, re.MULTILINE))
