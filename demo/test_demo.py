"""The command line: every flag acts, and the pictures of sampler.py, compare.py and trace.py show what the runs gave.
What wrong input does is in bench/test_faults.py."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import emag as emag_module  # noqa: E402
import sampler  # noqa: E402
from dit import load_decoder, load_dit  # noqa: E402
from test_emag import files, script  # noqa: E402, F401


def run_cli(capsys, *argv) -> tuple[int, str, str]:
    code = sampler.main([str(arg) for arg in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_grid_and_its_settings(files, tmp_path, capsys):
    """The picture holds what `sample` gives, dealt to the classes in turn, batch by batch, with the settings in it."""
    path, pictures = tmp_path / "grid.png", []
    for flags in ([], [], ["--emag", 1], ["--emag", 0], ["--seed", 9]):
        code, out, err = run_cli(capsys, "--ckpt", files / "flow.pt", "--num", 5, "--batch", 3, *flags, "--out", path)
        shown, summary = out.splitlines()
        assert (code, err) == (0, "") and summary.startswith(f"{path}: 5 images, euler 3 steps")
        image = Image.open(path)
        settings = json.loads(image.text["settings"])
        assert settings == json.loads(shown) and settings["checkpoint"] == "flow.pt" and settings["cfg"] == 2.25
        assert [*settings["classes"], settings["layers"], settings["num"]] == ["emu", "cat", [1, 2, 3], 5]
        pictures.append(np.asarray(image))
    x = sampler.sample(*load_dit(files / "flow.pt"), [2, 0, 2, 0, 2], range(5), sampler.Settings(**settings))
    images = sampler.to_images(x)
    expected = sampler.draw_grid([images[::2], images[1::2]], ["emu", "cat"])
    assert np.abs(pictures[-1].astype(int) - np.asarray(expected)).max() <= 1     # a float32 network, other batches
    assert np.array_equal(*pictures[:2]) and len({picture.tobytes() for picture in pictures}) == 4
    assert [entry.name for entry in tmp_path.iterdir()] == ["grid.png"]


def test_numbers_by_name_and_by_range():
    names = ["cat", "cat-face", "2"]
    assert sampler.parse_numbers("--classes", ["cat-face", "cat-2", 1], 3, names) == [1, 0, 1, 2, 1]


@pytest.mark.parametrize("size, side", [(32, 96), (120, 120)])
def test_the_grid_has_each_image_in_its_place(size, side):
    table = [[np.full((size, size, 3), 60 * r + 20 * c, np.uint8) for c in range(3)] for r in range(2)]
    grid = np.asarray(sampler.draw_grid(table, ["one", "two"]))[4:, :, 0]
    tiles = grid[:, grid.shape[1] - 3 * (side + 4):].reshape(2, side + 4, 3, side + 4).swapaxes(1, 2)
    assert (tiles[:, :, :side, :side] == np.array(table)[:, :, :1, :1, 0]).all()
    assert (tiles[:, :, side:] == 255).all() and (tiles[:, :, :, side:] == 255).all()


def test_pixels_are_rounded_and_clamped():
    x = torch.tensor([-1.5, -1, -0.5, 0.0, 0.9999 / 255, 1, 1.5, 400])[:, None, None, None].expand(-1, 3, 1, 1)
    assert sampler.to_images(x)[:, 0, 0].tolist() == [[value] * 3 for value in (0, 0, 64, 128, 128, 255, 255, 255)]


def test_every_flag_reaches_the_settings(files, tmp_path, capsys):
    flags = dict(steps=2, cfg=3.0, emag=1.5, layers=[0, 1, 2, 4], beta=0.5, strength=0.25, variant="query", eta=0.5,
                 window=[0.9, 0.7, 0.1], guide_channels=2, apg=[0.1, 4.0, -0.2], cads=[0.5, 0.8, 0.1, 0.9], num=3,
                 batch=2, seed=9, dtype="float32", sampler="ddim", threshold=0.7)
    argv = ["--classes", "dog,2", "--device", "cpu"]
    for name, value in (flags | dict(layers="0-2,4")).items():
        argv += ["--" + name.replace("_", "-"), *(value if isinstance(value, list) else [value])]
    common = ["--ckpt", files / "eps.pt", "--out", tmp_path / "grid.png"]
    code, out, err = run_cli(capsys, *common, *argv)
    settings = json.loads(out.splitlines()[0])
    assert (code, err) == (0, "") and settings == settings | flags | dict(classes=["dog", "emu"], uncond=False)
    code, out, _ = run_cli(capsys, *common, "--steps", 1, "--apg", "--cads", "--classes", "all")
    settings = json.loads(out.splitlines()[0])
    spread = load_dit(files / "eps.pt")[0].y_embedder.embedding_table.weight.std().item() / 4
    assert code == 0 and settings["apg"] == [0.0, 5.0, -0.5] and settings["cads"] == [0.6, 0.9, round(spread, 4), 1.0]
    assert settings["classes"] == ["cat", "dog", "emu"] and settings["num"] == 24


@pytest.mark.parametrize("argv", [[], ["--sampler", "ddim", "--eta", "1"], ["--flow", "sit", "--sampler", "heun"],
                                  ["--flow", "rf", "--dtype", "bfloat16"]], ids=" ".join)
def test_latent_checkpoints(argv, files, tmp_path, capsys):
    """With every way to read such a file: the decoder makes the picture from what --latents saves."""
    common = ["--ckpt", files / "dit.pt", "--steps", 3, "--classes", "3,7", "--num", 4, *argv]
    code, out, err = run_cli(capsys, *common, "--vae", files / "vae.bin", "--out", tmp_path / "grid.png")
    settings, velocity = json.loads(out.splitlines()[0]), "--flow" in argv
    assert (code, err) == (0, "") and settings["layers"] == [5] and settings["cfg"] == 1.5
    assert settings["emag"] == (1.5 if velocity else 3.0)
    assert settings["window"] == ([1.0, 0.8, 0.2] if velocity else [0.6, 0.4, 0.2])
    assert run_cli(capsys, *common, "--latents", tmp_path / "z.npy")[0] == 0
    latents = np.load(tmp_path / "z.npy")
    assert latents.shape == (4, 4, 8, 8) and latents.dtype == np.float32 and np.isfinite(latents).all()
    images = sampler.to_images(torch.from_numpy(latents).double(), load_decoder(files / "vae.bin"))
    expected = sampler.draw_grid([images[::2], images[1::2]], ["3", "7"])
    assert np.abs(np.asarray(Image.open(tmp_path / "grid.png")).astype(int) - np.asarray(expected)).max() <= 1


def test_progress_is_silent_where_stderr_is_no_terminal(files, tmp_path, capsys, monkeypatch):
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
        _, _, shown = run_cli(capsys, "--ckpt", files / "flow.pt", "--num", 2, "--out", tmp_path / "grid.png")
        assert ("step 2 of 3" in shown) == terminal and "\n" not in shown


def test_compare_draws_what_each_guidance_draws_alone(files, tmp_path, monkeypatch):
    compare, drawn, path = script("demo/compare.py"), {}, tmp_path / "compare.png"
    page = Image.new("RGB", (9, 9))
    monkeypatch.setattr(compare, "draw_grid", lambda table, labels: drawn.update(zip(labels, table)) or page)
    flags = ["--ckpt", files / "flow.pt", "--num", 3, "--batch", 2, "--apg", 0.5, 4, -0.25, "--emag", 3]
    assert compare.main([str(arg) for arg in [*flags, "--out", path]]) == 0
    settings, (model, meta) = json.loads(Image.open(path).text["settings"]), load_dit(files / "flow.pt")
    lines = settings.pop("lines")
    for (title, images), (label, line), (name, changes) in zip(drawn.items(), lines.items(), {
            "no guidance": dict(cfg=1.0, emag=1.0), "CFG": dict(emag=1.0), "EMAG": {},
            "EMAG + APG": dict(apg=[0.5, 4, -0.25]), "EMAG + CADS": dict(cads=settings["cads"])}.items(), strict=True):
        assert title.startswith(label) and label.split("\n")[0] == name
        assert line == settings | dict(apg=None, cads=None) | changes
        expected = sampler.to_images(sampler.sample(model, meta, [2, 0, 2], range(3), sampler.Settings(**line)))
        assert np.abs(np.stack(images).astype(int) - expected).max() <= 1
    assert len({np.stack(images).tobytes() for images in drawn.values()}) == 5
    (negative,) = compare.lines_of(sampler.Settings(**settings), ["negative"]).values()
    assert (negative.emag, negative.cfg, negative.apg, negative.cads) == (0, settings["cfg"], None, None)


@pytest.mark.parametrize("flags", [[], ["--variant", "query", "--threshold", "0"], ["--layers", "2", "--steps", "1"]])
def test_trace_draws_what_happened(flags, files, tmp_path, monkeypatch):
    """What it keeps are the predictions and the maps of the run, and the picture has the run's settings."""
    trace, traces, told, maps, path = script("demo/trace.py"), [], [], [], tmp_path / "trace.png"
    draw_page = trace.draw
    monkeypatch.setattr(trace, "draw", lambda kept, *rest: traces.append(kept) or draw_page(kept, *rest))
    argv = ["--ckpt", str(files / "flow.pt"), "--num", "4", "--steps", "5", *flags, "--out", str(path)]
    assert trace.main(argv) == 0
    settings, (kept,) = sampler.Settings(**json.loads(Image.open(path).text["settings"])), traces
    update = emag_module.ema_update
    monkeypatch.setattr(emag_module, "ema_update", lambda ema, attn, beta: maps.append(attn) or update(ema, attn, beta))
    model, meta = load_dit(files / "flow.pt")
    sampler.sample(model, meta, [2, 0, 2, 0], range(4), settings, told.append)
    told = [step for step in told if step.negative is not None]
    for (step, size), other in zip(kept.perturbed, told, strict=True):
        assert step.step == other.step and torch.equal(step.negative, other.negative[:1])
        torch.testing.assert_close(size, (other.clean - other.negative).flatten(1).norm(dim=1))
    layers = len(settings.layers)
    for i, (attn, _) in enumerate(kept.rows.values()):                      # of the first sample, a token in the middle
        expected = torch.stack([each[0, :, kept.token].mean(dim=0) for each in maps[i * layers:(i + 1) * layers]])
        torch.testing.assert_close(attn, expected, rtol=1e-3, atol=1e-5)
    assert len(kept.rows) == (0 if settings.variant == "query" else len(kept.emag.trace))
