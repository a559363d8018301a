"""hps.py with tiny random models of the real classes: diffusers' SD3 pipeline, open_clip's and transformers' CLIP."""
import inspect
import json
import math
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
BENCH = Path(__file__).resolve().parent
sys.path[:0] = [str(BENCH), str(BENCH.parent), str(BENCH.parent / "recipes")]
import hps  # noqa: E402
import sd3  # noqa: E402
from emag import Window  # noqa: E402
from test_emag import randomised  # noqa: E402

SIZE, STEPS, PROMPTS = 64, 4, ["a red cube", "two dogs, one cat", "a blue bird"]
CALL = dict(num_inference_steps=STEPS, height=SIZE, width=SIZE)


def make_tokenizer(length: int):
    """CLIP's own class, with letters in the place of its 49,408 pieces of words."""
    from transformers import CLIPTokenizer
    letters = [chr(c) for c in range(33, 127)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return CLIPTokenizer(vocab={word: n for n, word in enumerate(words)}, merges=[], model_max_length=length)


def make_encoder(seed: int):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection
    torch.manual_seed(seed)
    return CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=190, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, projection_dim=8, bos_token_id=0, eos_token_id=1, pad_token_id=1)).eval()


def make_t5():
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast
    torch.manual_seed(3)
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(chr(c) for c in range(33, 127))]
    return (T5EncoderModel(T5Config(vocab_size=98, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval(),
            T5TokenizerFast(vocab=[(piece, 0.0) for piece in pieces], extra_ids=0))


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    transformer = randomised(diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=11, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=16), std=0.2).float()
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=4, shift_factor=0.0, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4).eval()
    made = diffusers.StableDiffusion3Pipeline(
        transformer, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae, make_encoder(1), make_tokenizer(77),
        make_encoder(2), make_tokenizer(77), *make_t5())
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipe, prompts=PROMPTS[:1], **options):
    images, omega = hps.draw(pipe, prompts, 5, range(len(prompts)), SIZE, STEPS, **options)
    return np.stack([np.asarray(image) for image in images]), np.array(omega)


def generators(count: int = 1):
    return [torch.Generator().manual_seed(5 + i) for i in range(count)]


def latents(pipe, monkeypatch, **options) -> torch.Tensor:
    """What draw decodes, in float32: an image in 256 steps would hide small differences."""
    kept = []
    decode = pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda z, **more: kept.append(z) or decode(z, **more))
    draw(pipe, **options)
    monkeypatch.undo()
    return kept[0]


def test_cfg_is_the_pipeline_and_emag_the_recipe(pipe):
    count, prompts = 2, PROMPTS[:2]
    plain = pipe(prompts, guidance_scale=7.0, generator=generators(count), **CALL).images
    assert np.array_equal(draw(pipe, prompts)[0], np.stack([np.asarray(image) for image in plain]))
    for variant in ("map", "image", "query"):
        steps = "steps" if "steps" in inspect.signature(sd3.draw).parameters else "num_inference_steps"
        recipe = sd3.draw(pipe, variant=variant, prompt=prompts, height=SIZE, width=SIZE, generator=generators(count),
                          **{steps: STEPS})
        drawn = draw(pipe, prompts, scale=1.5, variant=variant)[0]
        assert np.array_equal(drawn, np.stack([np.asarray(image) for image in recipe]))
        assert not np.array_equal(drawn[0], np.asarray(plain[0]))


def test_offloading_changes_nothing(pipe):
    """As --offload has it: of the pipeline's models only the one that runs is on the device (here the CPU, as both)."""
    methods = [hps.METHODS[name] for name in ("EMAG", "EMAG-Q + APG", "CADS", "SEG")]
    plain = [draw(pipe, **method) for method in methods]
    pipe.enable_model_cpu_offload(device=torch.device("cpu"))
    try:
        for method, (images, omega) in zip(methods, plain):
            again, omega_again = draw(pipe, **method)
            assert np.array_equal(again, images) and np.array_equal(omega_again, omega)
    finally:
        pipe.remove_all_hooks()


def test_skip_layers_is_the_pipelines_own(pipe):
    skip = hps.SKIP | dict(skip_layer_guidance_stop=0.6)                   # so that it acts in so few steps
    plain = pipe(PROMPTS[:1], guidance_scale=7.0, generator=generators(), **skip, **CALL).images[0]
    assert np.array_equal(draw(pipe, skip=skip)[0][0], np.asarray(plain))
    assert not np.array_equal(draw(pipe)[0][0], np.asarray(plain))


def test_formulas_that_are_off_are_cfg(pipe, monkeypatch):
    cfg, run = latents(pipe, monkeypatch), lambda **options: latents(pipe, monkeypatch, **options)
    off = dict(eta=1.0, norm=math.inf, momentum=0.0)
    size = cfg.abs().max()
    assert (run(apg=dict(scale=7.0, **off)) - cfg).abs().max() < 1e-4 * size
    assert (run(scales=torch.full((STEPS, 1), 7.0)) - cfg).abs().max() < 1e-4 * size
    assert torch.equal(run(cads=dict(tau1=1.0, tau2=1.0, s=0.25, psi=1.0)), cfg)
    for options in (dict(apg=hps.APG_SETTINGS), dict(cads=hps.CADS_SETTINGS), dict(scales=torch.full((STEPS, 1), 9.0))):
        assert (run(**options) - cfg).abs().max() > 1e-2 * size
    emag = run(scale=1.5)
    assert (run(scale=1.5, apg=dict(scale=7.0, **off)) - emag).abs().max() < 1e-4 * size
    assert torch.equal(run(scale=1.5, cads=dict(tau1=1.0, tau2=1.0, s=0.25, psi=1.0)), emag)


def test_apg_by_its_definition(pipe, monkeypatch):
    """APG's algorithm written out on the pipeline's own loop, with η, ρ and m that all act."""
    eta, norm, momentum, w = 0.3, 0.5, -0.5, 12.0
    embeds = pipe.encode_prompt(PROMPTS[:1], None, None)
    text, pooled = torch.cat(embeds[1::-1]), torch.cat(embeds[:1:-1])
    x = torch.randn(1, 4, SIZE // 8, SIZE // 8, generator=generators()[0])
    pipe.scheduler.set_timesteps(STEPS)
    sigmas, previous = pipe.scheduler.sigmas.double(), 0
    with torch.no_grad():
        for now, then in zip(sigmas, sigmas[1:]):
            null, pred = pipe.transformer(torch.cat([x, x]).float(), text, pooled, (1000 * now).float().repeat(2),
                                          return_dict=False)[0].double()
            d0, dc = (x[0] - now * each for each in (null, pred))
            d = dc - d0 + momentum * previous
            previous = d
            d = d * min(1, norm / d.square().sum().sqrt())
            along = dc * (d * dc).sum() / dc.square().sum()
            x0 = dc + (w - 1) * (d - along + eta * along)
            x = x + (then - now) * (x[0] - x0) / now
    drawn = latents(pipe, monkeypatch, apg=dict(scale=w, eta=eta, norm=norm, momentum=momentum))
    expected = x / pipe.vae.config.scaling_factor
    assert (drawn - expected).abs().max() < 1e-3 * expected.abs().max()


def test_cads_noises_the_condition_once_a_step_for_both_passes(pipe):
    seen = []
    handle = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True)
    try:
        draw(pipe, PROMPTS[:2], scale=1.5, cads=hps.CADS_SETTINGS | dict(tau2=0.9))
        with_cads, seen = seen, []
        draw(pipe, PROMPTS[:2], scale=1.5)
    finally:
        handle.remove()
    clean, full = seen[0], [each for each in with_cads if len(each) == 4]
    assert len(full) == STEPS and all(torch.equal(each[:2], clean[:2]) for each in full)          # ∅ stays as it is
    assert not torch.equal(full[0][2:], clean[2:]) and torch.equal(full[-1][2:], clean[2:])       # γ = 0, and 1
    assert not torch.equal(full[0][2] - clean[2], full[1][2] - clean[2])                          # fresh in each step
    # a further pass, of the conditional half alone, sees what the clean pass before it saw
    for before, after in zip(with_cads, with_cads[1:]):
        if len(after) == 2 and len(before) == 4:
            assert torch.equal(after, before[2:])


def test_omega_by_its_definition(pipe):
    """From passes of the model itself: ω is w outside the window, and inside as METHOD's formula has it."""
    preds = []
    handle = pipe.transformer.register_forward_hook(lambda *call: preds.append(call[-1][0].double()))
    inner = pipe.transformer.proj_out.register_forward_hook(lambda *call: preds.append(call[-1].double()))
    try:
        _, omega = draw(pipe, scale=1.5)
    finally:
        handle.remove(), inner.remove()
    assert omega.shape == (1, STEPS)
    for step in range(STEPS):
        acts = Window().perturbs(step, STEPS)
        assert (abs(omega[0, step] - 7) > 1e-3) == acts
    patches = [each for each in preds if each.ndim == 3 and len(each) == 2]
    guided = [each for each in preds if each.ndim == 4]
    expected = [7 * (g[1] - g[0]).norm() / (p[1] - p[0]).norm() for g, p in zip(guided, patches)]
    np.testing.assert_allclose(omega[0], expected, rtol=1e-6)
    _, matched = draw(pipe, scales=torch.tensor(omega).T)
    np.testing.assert_allclose(matched, omega, rtol=1e-6)


@pytest.mark.parametrize("negative", ["PAG", "SEG"])
def test_other_negatives_by_their_maps(negative):
    """Attention as a map by hand: rows of image tokens, first."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 7, 4, dtype=torch.float64)
    logits = q @ k.transpose(-1, -2) / 2
    if negative == "SEG":
        logits[:, :, :5] = (q[:, :, :5].sum(dim=2, keepdim=True) / 5) @ k.transpose(-1, -2) / 2
    else:
        for i in range(5):
            for j in range(5):
                if i != j:
                    logits[:, :, i, j] = -math.inf
    expected = (logits.exp() / logits.exp().sum(-1, keepdim=True)) @ v
    assert torch.allclose(hps.NEGATIVES[negative](5, q, k, v), expected)


def test_other_negatives_act_on_the_block_that_emag_selects_and_leave_nothing_behind(pipe):
    before = {name: dict(vars(module)) for name, module in pipe.transformer.named_modules()}
    drawn = {negative: draw(pipe, scale=1.5, negative=negative)[0] for negative in (None, "PAG", "SEG")}
    for a, b in ((None, "PAG"), (None, "SEG"), ("PAG", "SEG")):
        assert not np.array_equal(drawn[a], drawn[b])
    assert all(vars(module).keys() == before[name].keys() for name, module in pipe.transformer.named_modules())
    selected = torch.tensor([[False, True], [True, False]])
    emag = types.SimpleNamespace(layers=[4, 5], selected=selected, blocks=pipe.transformer.transformer_blocks)
    calls = []
    attend = lambda tokens, q, k, v: calls.append(len(q)) or torch.zeros_like(q)                     # noqa: E731
    with hps.other_attention(emag, attend, 16), torch.no_grad():
        for n in range(3, 7):
            block = emag.blocks[n]
            image, text = torch.randn(2, 16, 16), torch.randn(2, 5, 16)
            own = type(block.attn).forward(block.attn, image, text)[0]
            same = [torch.equal(a, b) for a, b in zip(own, block.attn(image, text)[0])]
            assert same == {3: [True, True], 4: [True, False], 5: [False, True], 6: [True, True]}[n]
    assert calls == [2, 2]


@pytest.mark.parametrize("name, text, expected", [
    ("p.tsv", 'Prompt\tCategory\na "quoted" word\tx\nb\ty\n', ['a "quoted" word', "b"]),
    ("c.json", json.dumps(dict(annotations=[dict(image_id=1, caption="a"), dict(image_id=1, caption="no"),
                                            dict(image_id=2, caption="b ")])), ["a", "b"]),
    ("t.txt", "a\n\n  b \n", ["a", "b"])])
def test_prompts_of_each_kind(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    assert sorted(hps.read_prompts(tmp_path / name, 2)) == sorted(expected)


def test_more_prompts_keep_the_first(tmp_path):
    file = tmp_path / "t.txt"
    file.write_text("\n".join(map(str, range(50))))
    assert hps.read_prompts(file, 50)[:7] == hps.read_prompts(file, 7) != list(map(str, range(7)))


# --------------------------------------------------------------------------------------------------- from end to end


@pytest.fixture
def open_clip(monkeypatch):
    """open_clip, which imports torchvision. Where that does not load, as beside a torch of another build, a stand-in
    does, since nothing of it is used here."""
    try:
        import torchvision  # noqa: F401
    except Exception:
        for name in ("", ".transforms", ".transforms.functional", ".ops.misc"):
            monkeypatch.setitem(sys.modules, f"torchvision{name}", mock.MagicMock())
        monkeypatch.setitem(sys.modules, "timm", None)                     # which would use it
    return pytest.importorskip("open_clip")


def tiny_open_clip(open_clip, tmp_path, monkeypatch) -> Path:
    """A ViT of open_clip's own class, known by the name of HPS's, and a file of weights in HPS's layout."""
    config = dict(embed_dim=16, vision_cfg=dict(image_size=28, layers=1, width=16, head_width=8, patch_size=14),
                  text_cfg=dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=1))
    from open_clip import factory
    monkeypatch.setitem(factory._MODEL_CONFIGS, "ViT-H-14", config)
    torch.manual_seed(3)
    file = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save(dict(state_dict=open_clip.create_model("ViT-H-14", load_weights=False).state_dict()), file)
    return file


def tiny_clip(folder: Path) -> Path:
    from transformers import CLIPConfig, CLIPModel
    torch.manual_seed(4)
    text = dict(vocab_size=190, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                max_position_embeddings=20, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    see = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32,
               patch_size=8)
    CLIPModel(CLIPConfig(text_config=text, vision_config=see, projection_dim=8)).save_pretrained(folder)
    make_tokenizer(20).save_pretrained(folder)
    return folder


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.glob("*/*.png"))}


def test_draw_score_table(pipe, tmp_path, monkeypatch, capsys, open_clip):
    weights, prompts, out = tmp_path / "sd3", tmp_path / "prompts.txt", tmp_path / "out"
    pipe.save_pretrained(weights)
    prompts.write_text("\n".join(PROMPTS))
    command = ["draw", "--out", str(out), "--prompts", str(prompts), "--num", "3", "--pipe", str(weights), "--size",
               str(SIZE), "--steps", str(STEPS), "--batch", "2", "--dtype", "float32"]
    for name in hps.METHODS.keys() - {"CFG", "EMAG", "APG", "CADS", "CFG at ω", "CFG 9 in window"}:
        monkeypatch.delitem(hps.METHODS, name)
    assert hps.main(command) == 0, capsys.readouterr().err
    first = bytes_of(out)
    assert len(first) == 3 * len(hps.METHODS)
    assert hps.main(command) == 0 and bytes_of(out) == first                         # nothing is drawn twice
    assert " 0 images drawn" in capsys.readouterr().out.splitlines()[-1]
    for victim in ("EMAG/000001.png", "CFG at ω/000000.png", "CADS/000002.png"):
        (out / victim).unlink()
    (out / "APG" / "000000.png").write_bytes(first["APG/000000.png"][:-20])
    assert hps.main(command) == 0 and bytes_of(out) == first
    with Image.open(out / "CFG at ω" / "000001.png") as image, Image.open(out / "EMAG" / "000001.png") as emag:
        omega, told = json.loads(image.text["omega"]), json.loads(image.text["settings"])
        np.testing.assert_allclose(omega, np.mean(json.loads(emag.text["omega"])), rtol=1e-6)
        assert told["prompt"] in PROMPTS and told["method"] == "CFG at ω" and told["index"] == 1
    with Image.open(out / "CFG 9 in window" / "000001.png") as image:
        inside = [Window().perturbs(step, STEPS) for step in range(STEPS)]
        np.testing.assert_allclose(json.loads(image.text["omega"]), np.where(inside, 9, 7), rtol=1e-6)

    # Two processes, each with its own batches, then one for what is missing: the same files.
    shared = ["draw", "--out", str(tmp_path / "two"), *command[3:], "--only", "CADS"]
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert hps.main(shared) == 0
    monkeypatch.delenv("RANK"), monkeypatch.delenv("WORLD_SIZE")
    assert bytes_of(tmp_path / "two") == {name: file for name, file in first.items() if name[:4] == "CADS"}
    capsys.readouterr()
    assert hps.main([*command, "--seed", "1"]) == 2 and "seed" in capsys.readouterr().err

    # Scores, one scorer after another.
    clip, hps21 = tiny_clip(tmp_path / "clip"), tiny_open_clip(open_clip, tmp_path, monkeypatch)
    assert hps.main(["score", "--out", str(out), "--clip", str(clip)]) == 0, capsys.readouterr().err
    assert hps.main(["score", "--out", str(out), "--hps21", str(hps21), "--pick", str(clip)]) == 0
    kept = json.loads((out / "EMAG" / "000000.json").read_text())["scores"]
    assert kept.keys() == {"CLIP", "HPS v2.1", "PickScore"} and kept["CLIP"]["score"] == kept["PickScore"]["score"]
    before = (out / "EMAG" / "000000.json").stat().st_mtime_ns
    assert hps.main(["score", "--out", str(out), "--clip", str(clip)]) == 0
    assert (out / "EMAG" / "000000.json").stat().st_mtime_ns == before               # nothing is scored twice
    file = out / "CFG" / "000000.json"
    stale = json.loads(file.read_text())
    file.write_text(json.dumps(stale | dict(image="another")))
    assert hps.main(["score", "--out", str(out), "--clip", str(clip)]) == 0
    assert json.loads(file.read_text())["scores"].keys() == {"CLIP"}                 # of another image: made anew
    assert hps.main(["score", "--out", str(out), "--hps21", str(hps21), "--pick", str(clip)]) == 0
    assert json.loads(file.read_text()) == stale

    # The table, by hand.
    assert hps.main(["table", "--out", str(out), "--show", "2", "0"]) == 0
    printed = capsys.readouterr().out
    assert printed == (out / "table.md").read_text(encoding="utf-8") and "3 prompts" in printed
    values = {name: [json.loads((out / name / f"00000{i}.json").read_text())["scores"]["HPS v2.1"]["score"]
                     for i in range(3)] for name in ("EMAG", "CFG")}
    less = np.subtract(values["EMAG"], values["CFG"])
    row = next(line for line in printed.splitlines() if line.startswith("| HPS v2.1 | EMAG | "))
    assert f"| {np.mean(values['EMAG']):.2f} | {less.mean():+.2f} (" in row and f"{(less > 0).mean():.0%} |" in row
    assert len((out / "table.csv").read_text(encoding="utf-8").splitlines()) == 1 + 3 * len(hps.METHODS)
    with Image.open(out / "sheet.png") as sheet:
        column = list(hps.METHODS).index("EMAG")
        with Image.open(out / "EMAG" / "000002.png") as image:                       # the first line: prompt 2
            left = 64 + column * 260
            assert sheet.crop((left, 24, left + 256, 280)).tobytes() == image.resize((256, 256)).tobytes()


def test_scores_are_cosines(tmp_path, monkeypatch, open_clip):
    """Of embeddings that the libraries' own classes give, for pixels prepared by hand."""
    from transformers import AutoTokenizer, CLIPModel
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    image, text = Image.fromarray(pixels), "a red cube"
    weights = tiny_open_clip(open_clip, tmp_path, monkeypatch)
    net = open_clip.create_model("ViT-H-14", load_weights=False).eval()
    net.load_state_dict(torch.load(weights)["state_dict"])
    x = torch.tensor((pixels / 255 - hps.MEAN) / hps.STD).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        a, b = net.encode_image(x)[0], net.encode_text(open_clip.get_tokenizer("ViT-H-14")([text]))[0]
    expected = 100 * (a @ b / a.norm() / b.norm()).item()
    assert hps.load_hps(str(weights), "cpu")(image, text) == pytest.approx(expected, rel=1e-4)

    folder = tiny_clip(tmp_path / "clip")
    net, tokenize = CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    image = image.resize((32, 32))
    x = torch.tensor((np.asarray(image) / 255 - hps.MEAN) / hps.STD).permute(2, 0, 1)[None].float()
    for text in ("a red cube", "a very long prompt of more letters than positions"):
        ids = tokenize(text, truncation=True, max_length=20, return_tensors="pt").input_ids
        with torch.no_grad():
            both = net(input_ids=ids, pixel_values=x)
        expected = 100 * (both.image_embeds @ both.text_embeds.T).item()
        assert hps.load_clip(str(folder), "cpu")(image, text) == pytest.approx(expected, rel=1e-4)


def test_intervals_cover():
    """Of 500 simulated experiments about 95% have the true mean within their interval."""
    rng = np.random.default_rng(1)
    low, high = hps.intervals(rng.exponential(size=(60, 500)) - 0.7, draws=500)
    assert 0.90 < ((low <= 0.3) & (0.3 <= high)).mean() < 0.98


@pytest.mark.parametrize("more, word", [
    (["--num", "9"], "3 prompts"), (["--prompts", "absent.tsv"], "--prompts"), (["--size", "100"], "multiple"),
    (["--batch", "0"], "--batch"), (["--only", "CFG at ω"], "EMAG"), (["--only", "nothing"], "nothing"),
    (["--steps", "0"], "--steps"), (["--offload"], "GPU"), ([], "cannot be loaded")])
def test_draw_refuses_before_any_work(tmp_path, capsys, monkeypatch, more, word):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    out = tmp_path / "out"
    assert hps.main(["draw", "--out", str(out), "--prompts", str(tmp_path / "prompts.txt"), "--num", "3", "--pipe",
                     str(tmp_path / "nowhere"), *more]) == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1 and not out.exists()


@pytest.mark.parametrize("argv, word", [
    (["score"], "--hps21"), (["score", "--clip"], "no images"), (["table"], "scores"), (["look"], "choose")])
def test_score_and_table_refuse(tmp_path, capsys, argv, word):
    assert hps.main([*argv, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_missing_package_is_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "CFG").mkdir()
    (tmp_path / "CFG" / "000000.png").touch()
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert hps.main(["score", "--out", str(tmp_path), "--hps21", "file.pt"]) == 2
    assert "pip install open_clip_torch" in capsys.readouterr().err


def test_draw_takes_what_the_methods_say():
    for options in hps.METHODS.values():
        given = {dict(of="scales", inside="scales").get(name, name): value for name, value in options.items()}
        inspect.signature(hps.draw).bind(None, [], 0, [], 0, 0, **given)
        assert options.get("negative") in (None, *hps.NEGATIVES)


def test_help_names_all_methods(capsys):
    with pytest.raises(SystemExit):
        hps.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(name in text for name in hps.METHODS)
