"""The command line: every flag acts, the pictures of sampler.py, compare.py and trace.py show what the runs gave, and
the README's commands work. What wrong input does is in bench/test_faults.py."""
import json
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import emag as emag_module  # noqa: E402
import sampler  # noqa: E402
from dit import DIT_SIZES, DiT, LatentDecoder, load_decoder, load_dit  # noqa: E402
from test_emag import HERE, README, RUN, randomised, script, small_dit  # noqa: E402


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of tiny checkpoints: a velocity and a noise model of RGB, a noise model of latents, and its decoder."""
    folder, model = tmp_path_factory.mktemp("files"), small_dit().float()
    for name, prediction in (("flow.pt", "velocity"), ("eps.pt", "noise")):
        settings = RUN | dict(steps=3, cfg=2.25, classes=["emu", "cat"], sampler="ddim" if name[0] == "e" else "euler")
        meta = dict(prediction=prediction, class_names=["cat", "dog", "emu"], settings=settings, latent=False)
        torch.save({"model": model.state_dict(), "config": model.config, "meta": meta}, folder / name)
    latent = DiT(input_size=8, patch_size=4, hidden_size=48, depth=5, num_heads=6, num_classes=40)
    torch.save(randomised(latent, std=0.2).float().state_dict(), folder / "dit.pt")
    torch.save(randomised(LatentDecoder((32,) * 4), std=0.1).float().state_dict(), folder / "vae.bin")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DIT_SIZES, "tiny", (48, 5, 6))                          # DiT-S itself takes seconds
        yield folder


def run_cli(capsys, *argv) -> tuple[int, str, str]:
    code = sampler.main([*map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def settings_of(path: Path) -> dict:
    return json.loads(Image.open(path).text["settings"])


def test_the_grid_and_its_settings(files, tmp_path, capsys):
    """The picture holds what `sample` gives, dealt to the classes in turn, batch by batch, with the settings in it."""
    path, pictures = tmp_path / "grid.png", []
    for flags in ([], [], ["--emag", 1], ["--emag", 0], ["--seed", 9]):
        code, out, err = run_cli(capsys, "--ckpt", files / "flow.pt", "--num", 5, "--batch", 3, *flags, "--out", path)
        shown, summary = out.splitlines()
        assert (code, err) == (0, "") and summary.startswith(f"{path}: 5 images, euler 3 steps")
        image, settings = Image.open(path), settings_of(path)
        assert shown == str(sampler.Settings(**settings))
        assert settings["checkpoint"] == "flow.pt" and settings["cfg"] == 2.25
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
    settings = settings_of(tmp_path / "grid.png")
    assert (code, err) == (0, "") and settings == settings | flags | dict(classes=["dog", "emu"], uncond=False)
    code, out, _ = run_cli(capsys, *common, "--steps", 1, "--apg", "--cads", "--classes", "all")
    settings = settings_of(tmp_path / "grid.png")
    spread = load_dit(files / "eps.pt")[0].y_embedder.embedding_table.weight.std().item() / 4
    assert code == 0 and settings["apg"] == [0.0, 5.0, -0.5] and settings["cads"] == [0.6, 0.9, round(spread, 4), 1.0]
    assert settings["classes"] == ["cat", "dog", "emu"] and settings["num"] == 24


@pytest.mark.parametrize("argv", [[], ["--sampler", "ddim", "--eta", "1"], ["--flow", "sit", "--sampler", "heun"],
                                  ["--flow", "rf", "--dtype", "bfloat16"]], ids=" ".join)
def test_latent_checkpoints(argv, files, tmp_path, capsys):
    """With every way to read such a file: the decoder makes the picture from what --latents saves."""
    common = ["--ckpt", files / "dit.pt", "--steps", 3, "--classes", "3,7", "--num", 4, *argv]
    code, out, err = run_cli(capsys, *common, "--vae", files / "vae.bin", "--out", tmp_path / "grid.png")
    settings, velocity = settings_of(tmp_path / "grid.png"), "--flow" in argv
    assert (code, err) == (0, "") and settings["layers"] == [2] and settings["cfg"] == 1.5
    assert settings["emag"] == (1.5 if velocity else 3.0)
    assert settings["window"] == ([1.0, 0.8, 0.2] if velocity else [0.6, 0.4, 0.2])
    assert run_cli(capsys, *common, "--latents", tmp_path / "z.npy")[0] == 0
    latents = np.load(tmp_path / "z.npy")
    assert latents.shape == (4, 4, 8, 8) and latents.dtype == np.float32 and np.isfinite(latents).all()
    images = sampler.to_images(torch.from_numpy(latents).double(), load_decoder(files / "vae.bin"))
    expected = sampler.draw_grid([images[::2], images[1::2]], ["3", "7"])
    assert np.abs(np.asarray(Image.open(tmp_path / "grid.png")).astype(int) - np.asarray(expected)).max() <= 1


def test_the_settings_are_one_line(files, tmp_path, capsys):
    argv = ["--ckpt", files / "flow.pt", "--num", 2, "--steps", 2, "--threshold", 0.5, "--out", tmp_path / "grid.png"]
    assert sampler.main([str(arg) for arg in argv]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert line == ("flow.pt: sampler euler, steps 2, cfg 2.25, emag 2.0, layers (1, 2, 3), beta 0.9, threshold 0.5, "
                    "classes ('emu', 'cat'), num 2, seed 3, heads 4, flow rf")


def test_progress_is_silent_where_stderr_is_no_terminal(files, tmp_path, capsys, monkeypatch):
    argv = ["--ckpt", files / "flow.pt", "--num", 3, "--batch", 2, "--out", tmp_path / "grid.png"]
    assert run_cli(capsys, *argv)[2] == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    lines = [line.strip() for line in run_cli(capsys, *argv)[2].split("\r")]
    assert len(lines) == 8 and lines[-3:] == [""] * 3                       # 2 batches of 3 steps; the last is cleared
    for line, to_go in zip(lines[:5], ("2.3", "1.7", "1.0", "0.7", "0.3"), strict=True):
        assert re.fullmatch(rf"{to_go} images to go, [\d.e+]+ a second: 0:00:\d\d left", line)
    monkeypatch.setattr(sampler.time, "monotonic", iter((0.0, 8.0)).__next__)
    sampler.Progress(images=10, steps=4)(SimpleNamespace(x=torch.empty(4, 1)))     # one image's worth in 8 seconds
    assert capsys.readouterr().err.split("\r")[0].strip() == "9.0 images to go, 0.125 a second: 0:01:12 left"


@pytest.mark.parametrize("path", ["sampler.py", "demo/compare.py", "demo/trace.py", "bench/many.py", "demo/train.py"])
def test_help_says_what_holds_without_a_flag(path, capsys):
    with pytest.raises(SystemExit) as ended:
        script(path).main(["--help"])
    text = capsys.readouterr().out
    groups = re.split(r"^(?=\w+:$)", text, flags=re.MULTILINE)[1:]                 # a flag says it, or else its group
    flags = [flag for group in groups for flag in re.split(r"\n  (?=--)", group)[1:] if "\n  default: " not in group]
    assert ended.value.code == 0 and len(flags) >= 7
    assert all("(default: " in re.sub(r"\s+", " ", flag) or flag.startswith("--out FOLDER") for flag in flags)
    titles = [group.split(":")[0] for group in groups]
    assert titles == ["options"] + ["model", "guidance", "sampling", "output"] * (path != "demo/train.py")


@pytest.mark.parametrize("ckpt, flags", [
    ("flow.pt", []), ("flow.pt", ["--classes", "1,cat", "--emag", 3, "--threshold", 0.1, "--seed", 5, "--num", 3]),
    ("flow.pt", ["--uncond", "--window", 1, 0.9, 0.3]), ("eps.pt", ["--apg", "--cads", 0.5, 0.9, 0.1, 1, "--eta", 0.5]),
    ("dit.pt", ["--flow", "sit", "--sampler", "heun", "--vae", "vae.bin", "--classes", "3,7", "--steps", 2])])
def test_like_draws_a_picture_again(ckpt, flags, files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(files)
    network = ["--vae", "vae.bin", "--flow", "sit"] if "--flow" in flags else []
    assert run_cli(capsys, "--ckpt", ckpt, *flags, "--out", tmp_path / "one.png")[0] == 0
    like = ["--ckpt", ckpt, *network, "--like", tmp_path / "one.png", "--out", tmp_path / "two.png"]
    assert run_cli(capsys, *like)[0] == 0
    one, two = (Image.open(tmp_path / f"{name}.png") for name in ("one", "two"))
    assert one.text == two.text and one.tobytes() == two.tobytes()
    assert run_cli(capsys, *like, "--seed", 77, "--num", 1)[0] == 0                       # flags beside it win
    settings, changed = (json.loads(Image.open(tmp_path / f"{name}.png").text["settings"]) for name in ("one", "two"))
    assert changed == settings | dict(seed=77, num=1)
    if settings["uncond"]:
        assert run_cli(capsys, *like, "--no-uncond")[0] == 0
        assert json.loads(Image.open(tmp_path / "two.png").text["settings"]) == settings | dict(uncond=False)
    if network:                                                                           # what the file does not say
        code, _, err = run_cli(capsys, *[flag for flag in like if flag not in ("--flow", "sit")])
        assert code == 2 and "need the same flags" in err and "--flow sit" in err


def test_like_reads_what_the_other_scripts_drew_and_they_read_it(files, tmp_path, capsys):
    flags = ["--ckpt", str(files / "flow.pt"), "--num", "2", "--seed", "8"]
    paths = {"sampler.py": "samples.png", "demo/compare.py": "c.png", "demo/trace.py": "t.png", "bench/many.py": "many"}
    like = [*flags[:2], "--like", str(tmp_path / "samples.png"), "--out"]
    for path, out in paths.items():
        run = sampler.main if path == "sampler.py" else script(path).main
        assert run([*(flags + ["--out"] if path == "sampler.py" else like), str(tmp_path / out)]) == 0
    for out in ("c.png", "t.png", "many/000001.png"):
        path, drawn = tmp_path / "again.png", tmp_path / "samples.png"
        assert sampler.main([*flags[:2], "--like", str(tmp_path / out), "--out", str(path)]) == 0
        again, settings = (json.loads(Image.open(each).text["settings"]) for each in (path, drawn))
        assert again == settings | (dict(apg=again["apg"], cads=again["cads"]) if out == "c.png" else {})


@pytest.mark.parametrize("flags", [[], ["--cads", 0.5, 0.9, 0.1, 1], ["--variant", "query", "--emag", 0]])
def test_a_checkpoint_without_a_null_class(flags, files, tmp_path, capsys, monkeypatch):
    """Its network is never asked for ∅, whose row is NaN here, and samples as with one."""
    def without_null(path, heads):
        model, meta = load_dit(path, heads)
        model.y_embedder.embedding_table.weight[-1], model.null_class = torch.nan, None
        return model, meta

    argv, drawn = ["--ckpt", files / "flow.pt", "--cfg", 1, *flags, "--out", tmp_path / "grid.png"], []
    for load in (load_dit, without_null):
        monkeypatch.setattr(sampler, "load_dit", load)
        assert run_cli(capsys, *argv)[0] == 0
        drawn.append(Image.open(tmp_path / "grid.png").tobytes())
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("channels", [1, 3])
def test_one_channel_is_drawn_grey_and_three_as_rgb(channels, files, tmp_path, monkeypatch, capsys):
    model, path = small_dit(in_channels=channels).float(), tmp_path / "grid.png"
    meta = dict(prediction="noise", class_names=[], settings={}, latent=False)
    monkeypatch.setattr(sampler, "load_dit", lambda path, heads: (model, meta))
    argv = ["--ckpt", files / "flow.pt", "--steps", 2, "--classes", "0,1", "--num", 2]
    assert run_cli(capsys, *argv, "--out", path)[0] == 0
    pixels = np.asarray(Image.open(path))[4:100, -100:-4]
    assert (pixels == pixels[..., :1]).all() == (channels == 1)
    assert run_cli(capsys, *argv, "--latents", tmp_path / "z.npy")[0] == 0
    assert np.load(tmp_path / "z.npy").shape == (2, channels, 8, 8)


def test_no_float64_is_asked_of_a_device_that_has_none(files, monkeypatch):
    """Apple's mps: the network, its embeddings and the decoder get float32."""
    class NoFloat64(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            assert not (isinstance(result, torch.Tensor) and result.dtype == torch.float64), function
            return result

    (model, meta), decoder = load_dit(files / "dit.pt"), load_decoder(files / "vae.bin")
    for module in (model, model.y_embedder, decoder):
        monkeypatch.setattr(module, "forward", lambda *args, run=module.forward: inside(run, *args))

    def inside(run, *args):
        with NoFloat64():
            assert all(each.dtype in (torch.float32, torch.int64) for each in args)
            return run(*args)

    settings = sampler.Settings(emag=2.0, cfg=2.0, layers=[2, 3], sampler="ddpm", steps=3, apg=[0, 5, -0.5],
                                cads=[0.1, 0.9, 0.1, 1])
    x = sampler.sample(model, meta, [1, 2], range(2), settings)
    assert x.dtype == torch.float64 and sampler.to_images(x, decoder).shape == (2, 64, 64, 3)


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
        passes = 3 * (1 + (line["cfg"] != 1) + (line["emag"] != 1))       # round(0.8·2) is 2: all steps are perturbed
        assert title == f"{label}\n{passes} passes per image" and label.split("\n")[0] == name
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


# ------------------------------------------------------------------------------------- what the README says is true


def test_the_two_commands(files, tmp_path, monkeypatch):
    """The first with a smaller checkpoint; the second is what runs this."""
    install, draw, test = re.search(r"```\n(pip install .*) && (python .*)\n(pytest -q)\n```", README).groups()
    needed = re.findall(r"^[a-z]+", (HERE / "requirements.txt").read_text(), re.MULTILINE)
    assert install == "pip install -r requirements.txt" and needed == ["torch", "numpy", "einops", "pillow", "pytest"]
    python, path, *flags = draw.split()
    assert path == "sampler.py" and sampler.DEMO == HERE / "demo" / "emoji-flow.pt" and sampler.DEMO.exists()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [path, *flags, "--ckpt", str(files / "flow.pt"), "--num", "1"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(HERE / path, run_name="__main__")
    assert ended.value.code == 0 and [file.name for file in tmp_path.iterdir()] == ["samples.png"]


COMMANDS = re.findall(r"(?:python|--) ((?:demo/|bench/)?\w+\.py)([^`\n#|]*)", README)


@pytest.mark.parametrize("path", sorted({path for path, _ in COMMANDS}))
def test_every_flag_of_the_readme_is_one_of_its_script(path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(HERE / "bench")                       # whose scripts import their neighbours
    if path == "bench/figures.py":
        pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", [path, "--help"])
    with pytest.raises(SystemExit):
        script(path).main()
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert known >= set(re.findall(r"--[\w-]+", " ".join(flags for each, flags in COMMANDS if each == path)))
