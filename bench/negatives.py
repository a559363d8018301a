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
  faithfulness      share of images that stay in their class (probe of quality.py); correlation of low frequencies
  at distance 1     the same share where each x̂₀' is moved along its line to the distance of the null prediction
  high frequencies  their share of ‖x̂₀ − x̂₀'‖², above 4 cycles per image
E is averaged along the path that ends in x_t: the flow of the unguided network, run back from x_t to t = 1.

Then the samples of each negative, as in quality.py, at its own best scale: of three lengths of guidance,
(w_e − 1)·hardness, the one with the smallest FD on another seed.
"""
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from metrics import features_of
# which makes what is in the folder above importable
from quality import Bench, collect_run, make_emag, make_parser, make_runs, print_table, random_choice, save_scores
from dit import fingerprint, load_dit
from emag import EMAG, Window
from sampler import TIMES, SampleNoise, alpha_bar, network, sample, to_images, to_x0, whole_file

LENGTHS = [0.6, 1.2, 2.4]         # (w_e − 1)·hardness; EMAG at w_e = 2 has about 1.2
CHOOSE = 100                      # the seed that scales are chosen on
QUANTITIES = ["hardness", "same class", "at distance 1", "low frequencies", "high frequencies"]
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

    def classes(x0: Tensor) -> Tensor:
        return bench.probe(torch.from_numpy(features_of(to_images(x0).transpose(0, 3, 1, 2)))).argmax(dim=1)

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
        clean = classes(x0)
        for name, negative in negatives.items():
            emag = emags[negative.variant]
            emag.negative = negative
            with emag.perturb():
                other = to_x0(net(x, t, y), x, t, prediction)
            values = compare(x0, other, null)
            moved = x0 + (other - x0) / values["hardness"][:, None, None, None]
            values["same class"], values["at distance 1"] = (
                (classes(each) == clean).double() for each in (other, moved))
            found[name].append({quantity: value.cpu() for quantity, value in values.items()})
    return {name: {quantity: torch.cat([part[quantity] for part in parts]).numpy() for quantity in parts[0]}
            for name, parts in found.items()}


def kept_measure(bench: Bench, negatives: dict[str, Negative], step: int) -> dict[str, dict[str, np.ndarray]]:
    """`measure`, or what the cache has of it."""
    key = [bench.weights, dataclasses.asdict(bench.base), len(bench.labels), len(bench.training)]
    key += [(name, negative.weights) for name, negative in negatives.items()]
    file = bench.file(f"measured step {step}", ".json", key)
    if not file.exists():
        found = {name: {quantity: values.tolist() for quantity, values in of.items()}
                 for name, of in measure(bench, negatives, step).items()}
        with whole_file(file) as beside:
            beside.write_text(json.dumps(found))
    return {name: {quantity: np.array(values) for quantity, values in of.items()}
            for name, of in json.loads(file.read_text()).items()}


# ------------------------------------------------------------------------------------------------------------ samples


def sample_negative(bench: Bench, name: str, negative: Negative, scale: float, seed: int) -> dict[str, np.ndarray]:
    settings = dataclasses.replace(bench.base, emag=scale, seed=seed, variant=negative.variant)

    def guided_sample(labels, indices, watch):
        emag = make_emag(bench.model, settings, Instead, negative=negative, seed=seed, indices=indices)
        return sample(bench.model, bench.meta, labels, indices, settings, watch, emag)
    return bench.sampled(f"negative {name} {scale:g}", settings, f"{name} {negative.weights}", guided_sample)


def main(argv: Sequence[str] | None = None):
    parser = make_parser(__doc__)
    parser.add_argument("--weak", type=Path, metavar="FILE", help="an earlier checkpoint of the same training")
    args = parser.parse_args(argv)
    try:
        bench, weak = Bench(args), load_dit(args.weak)[0] if args.weak else None
        if bench.base.cads or bench.base.uncond:
            raise ValueError("cads and uncond: the negatives need labels beside the null condition: leave them out")
        weights = fingerprint(weak) if weak else ""
        if weak and (weights == bench.weights or weak.null_class != bench.model.null_class):
            raise ValueError(f"--weak {args.weak}: need another checkpoint, with the same classes")
        negatives = make_negatives(bench.model, weak and weak.to(bench.model.pos_embed), weights)
        negatives = {name: negatives[name] for name in negatives if any(fnmatch(name, only) for only in args.only)}
    except (ValueError, ImportError) as error:
        parser.exit(2, f"negatives.py: {error}\n")

    steps, window = bench.base.steps, Window(*bench.base.window)
    perturbed = [step for step in range(steps) if window.perturbs(step, steps)]
    middle, rows = perturbed[len(perturbed) // 2], []
    print(f"{args.ckpt.name}, {len(bench.labels)} held-out images, {bench.base}")
    for step in dict.fromkeys((perturbed[0], middle, perturbed[-1])):
        measured = kept_measure(bench, negatives, step)
        t = TIMES[bench.meta["prediction"]](steps)[step]
        print(f"\nt = {t:.2f}\n\n| negative | {' | '.join(QUANTITIES)} |\n|{' --- |' * (1 + len(QUANTITIES))}")
        for name, values in measured.items():
            means = {quantity: (values[quantity].mean(), 1.96 * values[quantity].std() / len(bench.labels) ** 0.5)
                     for quantity in QUANTITIES}
            cells = [f"{mean:.3f} ± {width:.3f}" for mean, width in means.values()]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
            rows.append(dict(name=name, t=t, step=step) | means)
    save_scores(args.cache / "negatives.json", bench.base, rows)

    hardness = {row["name"]: float(row["hardness"][0]) for row in rows if row["step"] == middle}
    best = {}
    print(f"\nFD at three lengths of guidance, {', '.join(map(str, LENGTHS))}, seed {CHOOSE}:")
    for name, negative in negatives.items():
        scales = [round(1 + length / hardness[name], 2) for length in LENGTHS]
        drawn = {scale: sample_negative(bench, name, negative, scale, CHOOSE) for scale in scales}
        distance = {scale: bench.score([found], 0)[0][0] for scale, found in drawn.items()}
        best[name] = min(distance, key=distance.get)
        print(f"- {name}: {', '.join(f'{value:.1f} (w_e {scale:g})' for scale, value in distance.items())}", flush=True)
    plain, runs = f"CFG {bench.base.cfg:g}", make_runs(bench.base, bench.model)
    samples = {(plain, seed): collect_run(bench, runs, plain, seed) for seed in args.seeds}
    samples |= {(name, seed): sample_negative(bench, name, negatives[name], best[name], seed)
                for seed in args.seeds for name in negatives}
    scores = {name: bench.score([samples[name, seed] for seed in args.seeds], args.halves)
              for name in [plain, *negatives]}
    print_table(["negative", "w_e"], {(name, f"{best[name]:g}" if name in best else ""): score
                                      for name, score in scores.items()})
    print_table(["negative", "less"], {("EMAG", name): tuple(a - b for a, b in zip(scores["EMAG"], scores[name]))
                                       for name in scores if "EMAG" in scores and name != "EMAG"})


if __name__ == "__main__":
    main()
