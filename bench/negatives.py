"""Are EMAG's negatives harder and more faithful than others? Seven kinds of negative in the same update.

    python bench/negatives.py --cache FOLDER --weak EARLIER.pt          # hours; stopped, it goes on

All kinds share CFG, window and candidate blocks, and those that perturb one block take the block that EMAG selects:
  EMAG, EMAG-Q      attention with the average of the maps, or of the queries
  PAG               attention with the identity (Ahn et al., arXiv 2403.17377)
  SEG               queries blurred over the grid of tokens, σ in tokens (Hong, arXiv 2408.00760)
  S²                a candidate left out, at random for each sample and step (arXiv 2508.12880)
  null condition    CFG's negative, so that the update is CFG with w·w_e inside the window
  weaker model      an earlier checkpoint of the same training (autoguidance, Karras et al., arXiv 2406.02507)

First each x̂₀' against the clean x̂₀, on held-out images with known noise, at three moments of the window:
  hardness          ‖x̂₀ − x̂₀'‖ / ‖x̂₀ − x̂₀^∅‖: the smaller, the harder to tell from the clean prediction
  same class        faithfulness: share of images that stay in their class (probe of quality.py)
  low frequencies   correlation with x̂₀'s
  high frequencies  their share of ‖x̂₀ − x̂₀'‖², above 4 cycles per image
A smaller change is harder to tell and more faithful, whatever it changes. So both are measured again at equal distance,
where each x̂₀' is moved along its line to the distance of the null prediction:
  hardness at 1     ‖f(x̂₀) − f(x̂₀')‖ / ‖f(x̂₀) − f(x̂₀^∅)‖, f the features of quality.py
  same class at 1   as above
E is averaged along the path that ends in x_t: the flow of the unguided network, run back from x_t to t = 1. Intervals
and paired differences are over halves of the held-out images, by name, as in quality.py.

Then the samples of each negative, as in quality.py, at its own best scale: of three lengths of guidance,
(w_e − 1)·hardness, the one with the smallest FD of 300 samples of another seed.
"""
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from metrics import features_of
# which makes what is in the folder above importable
from quality import (Bench, collect_run, half_samples, half_width, less, make_emag, make_parser, make_runs, only,
                     print_table, random_choice, read_kept, save_scores, scores_to_keep)
from dit import fingerprint, load_dit
from emag import EMAG, Window
from sampler import (TIMES, SampleNoise, alpha_bar, need, network, one_line_errors, sample, to_images,  # noqa: E402
                     to_x0, whole_file)

LENGTHS = [0.6, 1.2, 2.4]         # (w_e − 1)·hardness; EMAG at w_e = 2 has about 1.2
CHOOSE, CHOOSE_NUM = 100, 300      # the seed that scales are chosen on, and how many of its samples
QUANTITIES = ["hardness", "same class", "low frequencies", "high frequencies", "hardness at 1", "same class at 1"]
CUTOFF = 4                        # cycles per image, up to which frequencies are low

# ------------------------------------------------------------------------------------------------------ the negatives
#
# A change is a function of the chosen blocks, {block: samples (B,) bool}, and gives a context in which a pass of the
# model is the negative.

Change = Callable[[dict[int, Tensor]], AbstractContextManager]


@contextmanager
def forward_replaced(*pairs: tuple[nn.Module, Callable]) -> Iterator[None]:
    """Inside, each module runs another forward."""
    with ExitStack() as stack:
        for module, forward in pairs:
            module.forward = forward
            stack.callback(delattr, module, "forward")                    # which uncovers the class's own
        yield


def other_attention(model, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Change:
    """The chosen samples attend by attend(q, k, v), each (B, heads, N, d), in the chosen blocks."""
    def run(attn: nn.Module, samples: Tensor, x: Tensor) -> Tensor:
        q, k, v = rearrange(attn.qkv(x), "b n (three h d) -> three b h n d", three=3, h=attn.heads)
        samples = samples.to(x.device)[:, None, None, None]
        out = torch.where(samples, attend(q, k, v), F.scaled_dot_product_attention(q, k, v))
        return attn.proj(rearrange(out, "b h n d -> b n (h d)"))

    return lambda chosen: forward_replaced(*((model.blocks[n].attn, partial(run, model.blocks[n].attn, samples))
                                             for n, samples in chosen.items()))


def identity_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return v


def blurred_queries(sigma: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries blurred by a Gaussian over the square grid of tokens, whose weights sum to 1 within it. At σ = ∞ all
    weights are equal, and each query is the mean query."""
    side = math.isqrt(q.shape[2])
    at = torch.arange(side, device=q.device, dtype=q.dtype)
    weights = (-(at[:, None] - at).square() / (2 * sigma ** 2)).exp()
    weights = weights / weights.sum(dim=1, keepdim=True)
    grid = rearrange(q, "b h (y x) d -> b h y x d", y=side)
    grid = torch.einsum("iy, jx, bhyxd -> bhijd", weights, weights, grid)
    return F.scaled_dot_product_attention(rearrange(grid, "b h y x d -> b h (y x) d"), k, v)


def left_out(model) -> Change:
    """The chosen blocks give the chosen samples back as they came."""
    def run(forward: Callable, samples: Tensor, x: Tensor, *rest) -> Tensor:
        return torch.where(samples.to(x.device)[:, None, None], x, forward(x, *rest))

    return lambda chosen: forward_replaced(*((model.blocks[n], partial(run, model.blocks[n].forward, samples))
                                             for n, samples in chosen.items()))


def null_condition(model) -> Change:
    embed = model.y_embedder.forward
    return lambda chosen: forward_replaced((model.y_embedder, lambda y: embed(torch.full_like(y, model.null_class))))


def weaker_model(model, weak) -> Change:
    return lambda chosen: forward_replaced((model, weak.forward))


@dataclasses.dataclass(frozen=True)
class Negative:
    """change: None is EMAG's own. blocks: "selected" by EMAG, "all" candidates, or one at "random"."""
    change: Change | None = None
    blocks: str = "selected"
    variant: str = "map"
    weights: str = ""                     # fingerprint of the weaker model


def make_negatives(model, weak=None, weights: str = "") -> dict[str, Negative]:
    pag = other_attention(model, identity_attention)
    seg, seg_1 = (other_attention(model, partial(blurred_queries, sigma)) for sigma in (math.inf, 1.0))
    negatives = {"EMAG": Negative(), "EMAG-Q": Negative(variant="query"),
                 "PAG": Negative(pag), "PAG, all candidates": Negative(pag, "all"),
                 "SEG, σ = ∞": Negative(seg), "SEG, σ = ∞, all candidates": Negative(seg, "all"),
                 "SEG, σ = 1": Negative(seg_1), "S²": Negative(left_out(model), "random"),
                 "null condition": Negative(null_condition(model))}
    return negatives | ({"weaker model": Negative(weaker_model(model, weak), weights=weights)} if weak else {})


class Instead(EMAG):
    """EMAG, its window and its choice of blocks, with another negative."""

    def __init__(self, *args, negative: Negative, seed: int, indices: Sequence[int], **options):
        self.negative, self.draws = negative, (seed, indices)
        super().__init__(*args, **options)

    @contextmanager
    def perturb(self) -> Iterator["Instead"]:
        if self.negative.change is None:
            with super().perturb():
                yield self
            return
        table = {"selected": lambda: self.selected, "all": lambda: torch.ones_like(self.selected),
                 "random": lambda: random_choice(self, *self.draws)}[self.negative.blocks]()
        with self.negative.change({n: samples for n, samples in zip(self.layers, table.T) if samples.any()}):
            yield self


# ------------------------------------------------------------------------------------- hardness and faithfulness

def noised(x0: Tensor, noise: Tensor, t: float, prediction: str) -> Tensor:
    """x_t."""
    a, b = (1 - t, t) if prediction == "velocity" else (alpha_bar(t) ** 0.5, (1 - alpha_bar(t)) ** 0.5)
    return a * x0 + b * noise


def path_back(net: Callable, x: Tensor, y: Tensor, times: Sequence[float], prediction: str) -> list[Tensor]:
    """x at each of `times`, from noise to the last, at which it is `x`: the unguided flow, run back (Euler or DDIM)."""
    path = [x]
    for t, earlier in zip(times[:0:-1], times[-2::-1]):
        pred = net(path[0], t, y)
        x0 = to_x0(pred, path[0], t, prediction)
        path.insert(0, noised(x0, pred + x0 if prediction == "velocity" else pred, earlier, prediction))
    return path


def low_pass(x: Tensor) -> Tensor:
    """x (…, H, W) less all frequencies above CUTOFF cycles per image."""
    frequency = [torch.fft.fftfreq(size, 1 / size, device=x.device) for size in x.shape[-2:]]
    keep = frequency[0][:, None].square() + frequency[1].square() <= CUTOFF ** 2
    return torch.fft.ifft2(torch.fft.fft2(x) * keep).real


def compare(x0: Tensor, other: Tensor, null: Tensor) -> dict[str, Tensor]:
    """Hardness, correlation of low frequencies, share of high ones, each (B,), of x̂₀, x̂₀' and x̂₀^∅ (B, C, H, W)."""
    norm = lambda x: x.flatten(1).norm(dim=1)                                                        # noqa: E731
    low, low_other = ((low_pass(x) - x.mean(dim=(2, 3), keepdim=True)).flatten(1) for x in (x0, other))
    return {"hardness": norm(x0 - other) / norm(x0 - null),
            "low frequencies": F.cosine_similarity(low, low_other, dim=1),
            "high frequencies": 1 - (norm(low_pass(x0 - other)) / norm(x0 - other)) ** 2}


@torch.inference_mode()
def measure(bench: Bench, negatives: dict[str, Negative], step: int) -> dict[str, dict[str, np.ndarray]]:
    """name → quantity → its values (N,), for x̂₀' at one step, on all held-out images of the bench."""
    model, prediction, settings = bench.model, bench.meta["prediction"], bench.base
    net, times = network(model, bench.meta), TIMES[prediction](settings.steps)[:step + 1]
    found = {name: [] for name in negatives}

    def seen(x0: Tensor) -> tuple[Tensor, Tensor]:
        """Features and classes."""
        features = torch.from_numpy(features_of(to_images(x0).transpose(0, 3, 1, 2)))
        return features, bench.probe(features).argmax(dim=1)

    for start in range(0, len(bench.labels), settings.batch):
        indices = range(start, min(start + settings.batch, len(bench.labels)))
        y = torch.from_numpy(bench.labels[indices]).long().to(model.pos_embed.device)
        images = torch.from_numpy(bench.held_out[indices]).to(y.device).double() / 127.5 - 1
        x = noised(images, SampleNoise(settings.seed, indices)(images), times[-1], prediction)
        emags = {variant: make_emag(model, dataclasses.replace(settings, variant=variant), Instead, negative=Negative(),
                                    seed=settings.seed, indices=indices) for variant in ("map", "query")}
        for at, (x_at, t) in enumerate(zip(path_back(net, x, y, times, prediction), times)):
            for emag in emags.values():
                if Window(*settings.window).observes(at, settings.steps):
                    with emag.observe():
                        pred = net(x_at, t, y)
        null = net(x, t, torch.full_like(y, model.null_class))
        x0, null = (to_x0(each, x, t, prediction) for each in (pred, null))
        clean, clean_class = seen(x0)
        to_null = (seen(null)[0] - clean).norm(dim=1)
        for name, negative in negatives.items():
            emag = emags[negative.variant]
            emag.negative = negative
            with emag.perturb():
                other = to_x0(net(x, t, y), x, t, prediction)
            values = compare(x0, other, null)
            moved = x0 + (other - x0) / values["hardness"][:, None, None, None]
            (_, other_class), (moved, moved_class) = seen(other), seen(moved)
            values |= {"hardness at 1": (moved - clean).norm(dim=1) / to_null,
                       "same class": (other_class == clean_class).double(),
                       "same class at 1": (moved_class == clean_class).double()}
            found[name].append({quantity: value.cpu() for quantity, value in values.items()})
    return {name: {quantity: torch.cat([part[quantity] for part in parts]).numpy() for quantity in parts[0]}
            for name, parts in found.items()}


def kept_measure(bench: Bench, negatives: dict[str, Negative], step: int) -> dict[str, dict[str, np.ndarray]]:
    """`measure`, or what the cache has of it."""
    key = [bench.weights, dataclasses.asdict(bench.base), len(bench.labels), len(bench.training)]
    files = {name: bench.file(f"measured step {step} {name}", ".json", key, name, negative.weights)
             for name, negative in negatives.items()}
    missing = {name: negatives[name] for name in negatives if not files[name].exists()}
    for name, of in (measure(bench, missing, step) if missing else {}).items():
        with whole_file(files[name]) as beside:
            beside.write_text(json.dumps({quantity: values.tolist() for quantity, values in of.items()}))
    return {name: {quantity: np.array(values) for quantity, values in
                   read_kept(file, lambda file: json.loads(file.read_text())).items()}
            for name, file in files.items()}


# ------------------------------------------------------------------------------------------------------------ samples


def sample_negative(bench: Bench, name: str, negative: Negative, scale: float, seed: int,
                    num: int | None = None) -> dict[str, np.ndarray]:
    settings = dataclasses.replace(bench.base, emag=scale, seed=seed, variant=negative.variant)

    def guided_sample(labels, indices, watch):
        emag = make_emag(bench.model, settings, Instead, negative=negative, seed=seed, indices=indices)
        return sample(bench.model, bench.meta, labels, indices, settings, watch, emag)
    return bench.sampled(f"negative {name} {scale:g}", settings, f"{name} {negative.weights}", guided_sample, num)


def print_measured(measured: dict[str, dict[str, np.ndarray]], halves: Sequence[Tensor], t: float) -> dict[str, dict]:
    """name → quantity → its mean and half of its interval, printed; then the same of EMAG less each other."""
    scores = {name: ([values[quantity].mean() for quantity in QUANTITIES],
                     [[values[quantity][rows].mean() for quantity in QUANTITIES] for rows in halves])
              for name, values in measured.items()}
    scores = {name: tuple(map(np.array, score)) for name, score in scores.items()}
    pairs = less(scores, [("EMAG", name) for name in scores if name != "EMAG" and "EMAG" in scores])
    for first, table in (("negative", {(name,): score for name, score in scores.items()}), ("negative | less", pairs)):
        print(f"\nt = {t:.2f}\n\n| {first} | {' | '.join(QUANTITIES)} |\n|{' --- |' * (first.count('|') + 7)}")
        for cells, (mean, of_halves) in table.items():
            numbers = [f"{value:.3f} ± {width:.3f}" for value, width in zip(mean, half_width(of_halves))]
            print(f"| {' | '.join([*cells, *numbers])} |", flush=True)
    return {name: dict(zip(QUANTITIES, zip(mean, half_width(of_halves)))) for name, (mean, of_halves) in scores.items()}


@one_line_errors
def main(argv: Sequence[str] | None):
    parser = make_parser(__doc__)
    parser.add_argument("--weak", type=Path, metavar="FILE", help="an earlier checkpoint of the same training")
    args = parser.parse_args(argv)
    weak = load_dit(args.weak)[0] if args.weak else None
    bench, weights = Bench(args), fingerprint(weak) if weak else ""
    need(not (bench.base.cads or bench.base.uncond),
         "--set cads, uncond: the negatives need labels beside the null condition: leave them out")
    need(not weak or weights != bench.weights and weak.null_class == bench.model.null_class,
         f"--weak {args.weak}: need another checkpoint, with the same classes")
    negatives = make_negatives(bench.model, weak and weak.to(bench.model.pos_embed), weights)
    negatives = {name: negatives[name] for name in only(args, negatives)}
    bench.load_real()

    steps, window = bench.base.steps, Window(*bench.base.window)
    perturbed = [step for step in range(steps) if window.perturbs(step, steps)]
    middle, rows = perturbed[len(perturbed) // 2], []
    halves = half_samples(bench.emoji, args.halves, bench.scored)
    print(f"{args.ckpt.name}, {len(bench.labels)} held-out images, on {bench.device}, {bench.base}")
    for step in dict.fromkeys((perturbed[0], middle, perturbed[-1])):
        t = TIMES[bench.meta["prediction"]](steps)[step]
        measured = {name: {quantity: values[bench.scored] for quantity, values in of.items()}
                    for name, of in kept_measure(bench, negatives, step).items()}
        rows += [dict(name=name, t=t, step=step) | quantities
                 for name, quantities in print_measured(measured, halves, t).items()]
    save_scores(bench, args.seeds, "negatives", rows=rows, runs=[])       # the samples below take hours

    hardness = {row["name"]: float(row["hardness"][0]) for row in rows if row["step"] == middle}
    best = {}
    print(f"\nFD at three lengths of guidance, {', '.join(map(str, LENGTHS))}, seed {CHOOSE}:")
    for name, negative in negatives.items():
        scales = [round(1 + length / hardness[name], 2) for length in LENGTHS]
        drawn = {scale: sample_negative(bench, name, negative, scale, CHOOSE, CHOOSE_NUM) for scale in scales}
        distance = {scale: bench.score([found], 0)[0][0] for scale, found in drawn.items()}
        best[name] = min(distance, key=distance.get)
        print(f"- {name}: {', '.join(f'{value:.1f} (w_e {scale:g})' for scale, value in distance.items())}", flush=True)
    runs = make_runs(bench.base, bench.model)
    main_run, plain = next(iter(runs)), f"CFG {bench.base.cfg:g}"
    samples = {(name, seed): collect_run(bench, runs, name, seed) for seed in args.seeds for name in (plain, main_run)}
    samples |= {(name, seed): sample_negative(bench, name, negatives[name], best[name], seed)
                for seed in args.seeds for name in negatives}
    scores = {name: bench.score([samples[name, seed] for seed in args.seeds], args.halves)
              for name in [plain, main_run, *negatives]}
    omega = {name: float(np.mean([samples[name, seed]["omega"] for seed in args.seeds])) for name in scores}
    cells = {name: (name, f"{best[name]:g}" if name in best else "", f"{omega[name]:.2f}") for name in scores}
    print_table(["negative", "w_e", "ω"], {cells[name]: score for name, score in scores.items()})
    print_table(["negative", "less"], less(scores, [(one, other) for one in (main_run, "EMAG") for other in scores
                                                    if one in scores and one != other]))
    save_scores(bench, args.seeds, "negatives", rows=rows, runs=[
        dict(name=name, emag=best[name], omega=omega[name], **scores_to_keep(scores[name])) for name in negatives])


if __name__ == "__main__":
    sys.exit(main())
