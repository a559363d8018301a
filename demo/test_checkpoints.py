"""dit.py: the layouts that load, and the same numbers as diffusers' DiT and decoder. Then bad checkpoints: for each one
ValueError line that names the file and what is wrong.
"""
import argparse
import json
import re
import sys
import warnings
import zipfile
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dit  # noqa: E402
from dit import (DIFFUSERS_NAMES, DIT_SIZES, DiT, LatentDecoder, fingerprint, load_decoder, load_dit,  # noqa: E402
                 read_checkpoint)
from test_emag import DEMO, F64, randomised, seeded, small_dit  # noqa: E402

# ------------------------------------------------------------------------------------------------- files that are good


def test_every_key_and_the_sizes_of_the_paper():
    """Every key of an official DiT-XL/2 with its shape."""
    assert DIT_SIZES == {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
    d, names = 1152, {"pos_embed": (1, 256, 1152)}
    layers = {"t_embedder.mlp.0": (d, 256), "t_embedder.mlp.2": (d, d), "x_embedder.proj": (d, 4, 2, 2),
              "final_layer.adaLN_modulation.1": (2 * d, d), "final_layer.linear": (2 * 2 * 8, d)}
    for n in range(28):
        layers |= {f"blocks.{n}.{name}": shape for name, shape in {
            "attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d),
            "adaLN_modulation.1": (6 * d, d)}.items()}
    for name, shape in layers.items():
        names |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    with torch.device("meta"):
        model, decoder = DiT(), LatentDecoder().state_dict()
    names["y_embedder.embedding_table.weight"] = (1001, d)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == names
    assert dit.config_of(model.state_dict(), heads=None, class_dropout=True) == model.config
    learned = sum(p.numel() for name, p in model.named_parameters() if name != "pos_embed")
    assert learned == pytest.approx(675e6, rel=2e-3)                         # "675M", Peebles & Xie, table 1
    assert sum(tensor.numel() for tensor in decoder.values()) == 49_490_199  # SD's decoder and post_quant_conv
    assert decoder["decoder.up_blocks.2.resnets.0.conv_shortcut.weight"].shape == (256, 512, 1, 1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_official_layouts_round_trip(training, learn_sigma, tmp_path):
    model = small_dit(in_channels=4, learn_sigma=learn_sigma).float()
    content = state = model.state_dict()
    if training:
        noise = {name: torch.randn_like(tensor) for name, tensor in state.items()}
        content = {"model": noise, "ema": state, "opt": {"state": {}}, "args": argparse.Namespace(model="DiT-S/8")}
    torch.save(content, tmp_path / "dit.pt")
    loaded, meta = load_dit(tmp_path / "dit.pt", heads=4)
    x, t, y = seeded(3, 4, 8, 8, dtype=torch.float32), torch.tensor([0.0, 40.0, 999.0]), torch.tensor([0, 2, 3])
    assert loaded.config == model.config and meta["prediction"] == "noise" and meta["latent"]
    assert torch.equal(loaded(x, t, y), model(x, t, y))
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, F64])
def test_safetensors_of_any_dtype(dtype, tmp_path):
    tensors = {"a": (10 * seeded(3, 5)).to(dtype), "b": torch.ones(2), "c": torch.tensor(3.5)}
    pytest.importorskip("safetensors.torch").save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    content, _ = read_checkpoint(tmp_path / "x.safetensors")
    assert content.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert content[name].dtype == tensor.dtype and torch.equal(content[name], tensor)


def diffusers_dit(**changes):
    """DiT of diffusers with random weights, brought to the official formulas in the two places where it departs.

    It spaces the frequencies of the time features by 1/127 instead of 1/128 (`downscale_freq_shift=1`), and its default
    norm_eps of 1e-5 reaches the second LayerNorm of a block, where the official code has 1e-6.
    """
    diffusers = pytest.importorskip("diffusers")
    config = dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=3,
                  sample_size=8, patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=4, norm_eps=1e-6)
    theirs = randomised(diffusers.DiTTransformer2DModel(**(config | changes)), std=0.2).float()
    embedder = theirs.transformer_blocks[0].norm1.emb
    embedder.time_proj.downscale_freq_shift = 0
    for block in theirs.transformer_blocks:
        block.norm1.emb.load_state_dict(embedder.state_dict())
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return theirs


@pytest.mark.parametrize("serialised", ["folder", "bin beside config"])
@pytest.mark.parametrize("size", [dict(), dict(num_attention_heads=3, attention_head_dim=12, num_layers=5,
                                               sample_size=16, patch_size=4, out_channels=4, norm_num_groups=6)])
def test_dit_is_that_of_diffusers(size, serialised, tmp_path):
    theirs = diffusers_dit(**size)
    theirs.save_pretrained(tmp_path, safe_serialization=serialised == "folder")
    ours, _ = load_dit(tmp_path if serialised == "folder" else next(tmp_path.glob("*.bin")))
    x = seeded(3, 4, theirs.config.sample_size, theirs.config.sample_size, dtype=torch.float32)
    t, y = torch.tensor([0, 250, 999]), torch.tensor([3, 999, 1000])
    with torch.no_grad():
        expected = theirs(x, timestep=t, class_labels=y).sample
    out = ours(x, t, y)
    assert (out - expected).abs().max() < 1e-5 * expected.abs().max()
    assert ours.config["learn_sigma"] == (out.shape[1] == 8) and ours.null_class == 1000


def test_a_diffusers_file_needs_its_config_and_one_embedder(tmp_path):
    theirs, path = diffusers_dit(), tmp_path / "alone.bin"
    state = theirs.state_dict()
    torch.save(state, path)
    with pytest.raises(ValueError, match="need config.json beside the file"):
        load_dit(path)
    (tmp_path / "config.json").write_text(json.dumps(dict(theirs.config)))
    state["transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight"] += 1
    torch.save(state, path)
    with pytest.raises(ValueError, match="y_embedder.* differ"):
        load_dit(path)


@pytest.mark.parametrize("naming", ["new", "old"])
def test_decoder_is_that_of_diffusers(naming, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    theirs = randomised(diffusers.AutoencoderKL(
        block_out_channels=(32, 64, 64, 64), layers_per_block=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4), std=0.05).float()
    path, state = tmp_path / "vae.bin", theirs.state_dict()
    if naming == "new":
        theirs.save_pretrained(tmp_path)
        path = tmp_path
    else:
        for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            state = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): part for name, part in state.items()}
        assert "decoder.mid_block.attentions.0.query.weight" in state
        torch.save(state, path)
    latents = seeded(2, 4, 6, 10, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs.decode(latents / 0.18215).sample
    out = load_decoder(path)(latents)
    assert out.shape == (2, 3, 48, 80) and (out - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("file, prediction", [("emoji-flow.pt", "velocity"), ("emoji-eps.pt", "noise")])
def test_the_demo_checkpoints_say_what_they_are(file, prediction):
    model, meta = load_dit(DEMO.parent / file)
    assert (DEMO.parent / file).stat().st_size < 17e6
    assert meta["prediction"] == prediction and len(meta["class_names"]) == 88
    assert {"sampler", "steps", "cfg", "emag", "layers", "window"} <= meta["settings"].keys()
    assert set(meta["settings"]["classes"]) < set(meta["class_names"])
    assert not model.training and model.null_class == 88 and model.pos_embed.dtype == torch.float32


def test_a_new_network_gives_zero_and_its_blocks_are_the_identity():
    model, x = DiT(**CONFIG), torch.randn(2, 4, 32)
    assert torch.equal(model.blocks[0](x, torch.randn(2, 32)), x)
    assert torch.equal(model(torch.randn(2, 3, 8, 8), torch.ones(2), torch.tensor([0, 3])), torch.zeros(2, 3, 8, 8))


# ------------------------------------------------------------------------------------------------ files that are bad

CONFIG = dict(input_size=8, patch_size=4, in_channels=3, hidden_size=32, depth=2, num_heads=4, num_classes=3,
              learn_sigma=False)
META = dict(prediction="noise", class_names=["cat", "dog", "emu"], settings={"steps": 5}, latent=False)
DIT, VAE = DiT(**CONFIG).state_dict(), LatentDecoder((32,) * 4).state_dict()
ENTRY = dict(dtype="F32", shape=[2], data_offsets=[0, 8])                       # of the header of a safetensors file
BIAS, PROJ, LABELS = "blocks.1.mlp.fc2.bias", "x_embedder.proj.weight", "y_embedder.embedding_table.weight"
KEY, CONV, QUANT = "transformer_blocks.1.attn1.to_k.weight", "decoder.up_blocks.2.resnets.2.conv2.", "post_quant_conv."


def diffusers_layout() -> dict[str, Tensor]:
    state = {}
    for name, tensor in DIT.items():
        for theirs, ours in sorted(DIFFUSERS_NAMES.items(), key=lambda pair: -len(pair[1])):
            name = name.replace(ours, theirs)
        if name.startswith("norm1.emb"):
            state |= {f"transformer_blocks.{i}.{name}": tensor for i in range(CONFIG["depth"])}
        elif ".to_q." in name:
            state |= {name.replace("to_q", f"to_{which}"): part for which, part in zip("qkv", tensor.chunk(3))}
        elif name != "pos_embed":
            state[name] = tensor
    return state


def changed(whole: dict, change):
    """whole with entries changed, or left out where the change is `...`; what is no dict stands for the whole."""
    if not isinstance(change, dict):
        return change
    return {name: value for name, value in (whole | change).items() if value is not ...}


# Each of these gives a function that writes a file. The arguments are changes to a file that loads.


def own(config={}, meta={}, model={}):
    return lambda path: torch.save({"model": changed(DIT, model), "config": changed(CONFIG, config),
                                    "meta": changed(META, meta)}, path)


def official(change={}):
    return lambda path: torch.save(changed(DIT, change), path)


def vae(change={}):
    return lambda path: torch.save(changed(VAE, change), path)


def diffusers(config={}, change={}):
    def write(path: Path):
        torch.save(changed(diffusers_layout(), change), path)
        content = changed(dict(sample_size=8, num_attention_heads=4), config)
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        path.with_name("config.json").write_bytes(content)
    return write


def safetensors(header, data: bytes = bytes(24)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return lambda path: path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def torchscript(path: Path):
    with zipfile.ZipFile(path, "w") as file:
        for name in ("data.pkl", "constants.pkl", "version"):
            file.writestr(f"bad/{name}", b"3")


def compressed(path: Path):
    """1 kB for each MB that it unpacks to: not for reading whole."""
    official({"zeros": torch.zeros(2**20)})(path)
    with zipfile.ZipFile(path) as file:
        parts = {entry.filename: file.read(entry) for entry in file.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in parts.items():
            file.writestr(name, content)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:%b\nsize 123456789\n" % (b"0" * 64)

# name: (function that writes it, what the line says)

HEADERS = {f"header {name}": (safetensors(header), words) for name, header, words in (
    ("null", None, "cannot be read"), ("list", [1], "cannot be read"),
    ("string", "x", "cannot be read"), ("number", 7, "cannot be read"),
    ("not UTF-8", b'{"\xff\xfe": 1}', "cannot be read"),
    ("with 5000 digits", b'{"x": ' + b"1" * 5000 + b"}", "digits"),
    ("entry null", {"x": None}, "cannot be read"), ("entry list", {"x": [0, 8]}, "cannot be read"),
    ("name of three lines", {"a\nb\u2028c": ENTRY | {"dtype": "I8"}}, "a b c has the dtype"),
    ("overlap", {"x": ENTRY, "y": ENTRY | {"data_offsets": [4, 12]}}, "overlap"),
    ("with a hole", {"x": ENTRY}, "do not fill the file"),
    ("of the three parts", {"model": ENTRY, "config": ENTRY | {"data_offsets": [8, 16]},
                            "meta": ENTRY | {"data_offsets": [16, 24]}}, "not a DiT checkpoint"))}
HEADERS |= {f"{key} {value}": (safetensors({"x": changed(ENTRY, {key: value})}), words) for key, words, values in (
    ("dtype", "need one of F64 F32 F16 BF16", (None, "F8_E4M3", "I32")), ("dtype", "cannot be read", (..., ["F32"])),
    ("shape", "cannot be read",
     (..., None, "2", ["2"], [float("nan")], [2.0], [1], [2, 2], [10**30], [0, 10**30])),
    ("data_offsets", "cannot be read",
     (..., None, 8, ["0", "8"], [0.0, 8.0], [-8, 0], [8, 0], [0, 7])), ("data_offsets", "unpack", ([0], [0, 8, 1])),
    ("shape", "overlap", (2, [-1])), ("data_offsets", "overlap", ([-16, -8],))) for value in values}

OWN = {f"config num_heads {value!r}": (own(config={"num_heads": value}), f"{value!r} heads do not divide 32 channels")
        for value in (0, -4, 5, "4", 4.0, [4])}
OWN |= {f"meta {name} {value!r}": (own(meta={name: value}), "its meta is") for name, values in (
    ("prediction", (..., "flow", ["noise"])), ("flow", ("up",)),
    ("class_names", (["cat", "dog"], ["cat", "dog", "emu", "fox"], [0, 1, 2], [["cat"], ["dog"], ["emu"]], "cat",
                     {"cat": 0, "dog": 1, "emu": 2}, None))) for value in values}
OWN |= {f"weight {name}": (own(model={BIAS: weight}), f"'{BIAS}' names a {kind}: need dense floating-point")
        for name, kind, weight in (
    ("list", "<class 'list'>", [0.0] * 32), ("None", "<class 'NoneType'>", None),
    ("int64", "torch.int64", torch.arange(32)),
    ("complex", "torch.complex64", torch.zeros(32, dtype=torch.complex64)),
    ("sparse", "torch.float32", torch.eye(32)[0].to_sparse()),
    ("without data", "torch.float32", torch.zeros(32, device="meta")))}
OWN |= {"parts lists": (own([1], ["noise"], [2]), "'model' names a <class 'list'>"),
        "model list": (own(model=[2]), "a list in the place of the weights"),
        "config list": (own(config=[1]), "its weights lie under 'model'"),
        "meta None": (own(meta=None), "its weights lie under 'model'"),
        "name 5": (own(model={5: torch.zeros(1)}), "5 names a torch.float32: need"),
        "num_heads missing": (own(config={"num_heads": ...}), "pass --heads"),
        "TorchScript": (torchscript, "TorchScript")}

OFFICIAL = {
    "ema list": (lambda path: torch.save({"ema": [1]}, path), "a list in the place of the weights"),
    "ema None": (lambda path: torch.save({"ema": None}, path), "a NoneType in the place of the weights"),
    "weight float": (official({BIAS: 0.0}), f"'{BIAS}' names a <class 'float'>"),
    "patches (32, 48)": (official({PROJ: torch.zeros(32, 48)}), f"{PROJ} has the shape (32, 48): need four dimensions"),
    "patches (32,)": (official({PROJ: torch.zeros(32)}), f"{PROJ} has the shape (32,): need four dimensions"),
    "patches (32, 3, 4, 0)": (official({PROJ: torch.zeros(32, 3, 4, 0)}), f"'{PROJ}' names a torch."),
    "pos_embed (128,)": (official({"pos_embed": torch.zeros(128)}), "mismatch for pos_embed"),
    "pos_embed (1, 5, 32)": (official({"pos_embed": torch.zeros(1, 5, 32)}), "mismatch for pos_embed"),
    "labels ()": (official({LABELS: torch.tensor(1.0)}), f"'{LABELS}' names a torch."),
    "no blocks": (official({name: ... for name in DIT if "blocks." in name}), "it has no blocks.0.attn.qkv.weight"),
    "block x": (official({"blocks.x.attn": torch.zeros(1)}), "blocks.x.attn"),
    "key of another file": (lambda path: torch.save({"ema_model": DIT, "epoch": 3}, path),
                            "torch.save(torch.load(f)['ema_model'], g)"),
    "no ema": (lambda path: torch.save({"opt": {"state": {}}, "model": DIT}, path), "torch.load(f)['model']"),
    "Lightning": (lambda path: torch.save({"epoch": 1, "state_dict": DIT}, path), "torch.load(f)['state_dict']"),
    "path beside": (lambda path: torch.save({"ema": DIT, "args": {"data": PurePosixPath("/data")}}, path),
                    "PurePosixPath, whose loading could run code: if you trust the file, save only `ema`"),
    "numpy scalar beside": (lambda path: torch.save({"ema": DIT, "loss": np.float64(0.1)}, path), "multiarray.scalar"),
    "whole model": (lambda path: torch.save(DiT(**CONFIG), path), "holds a dit.DiT"),
    "LFS pointer": (lambda path: path.write_bytes(LFS), "git lfs pull"),
    "web page": (lambda path: path.write_bytes(b"\n<!DOCTYPE html><html>404"), "a web page"),
    "text": (lambda path: path.write_bytes(b"version 2"), "no checkpoint, or one whose loading could run code"),
    "empty file": (lambda path: path.write_bytes(b""), "cannot be read, perhaps truncated"),
    "truncated": (lambda path: (official()(path), path.write_bytes(path.read_bytes()[:-999])), "perhaps truncated"),
    "compressed": (compressed, "compressed"),
    "block 10**6": (official({"blocks.1000000.attn": torch.zeros(1)}), "blocks.1000000.attn")}

DIFFUSERS = {f"config.json {str(config)[:30]}": (diffusers(config), words) for config, words in (
    (b"", "config.json: cannot be read"), (b"{'sample_size': 8}", "config.json: cannot be read"),
    (b'{"sample_size": 8', "config.json: cannot be read"), (b"\xff\xfe\xfd", "config.json: cannot be read"),
    (b"[" * 10**5, "config.json: cannot be read"),
    (None, "config.json: cannot be read"), ([8], "config.json: cannot be read"),
    ({"num_attention_heads": "4"}, "'4' heads do not divide 32 channels"),
    ({"num_attention_heads": 0}, "0 heads do not divide 32 channels"),
    ({"num_attention_heads": [4]}, "[4] heads do not divide 32 channels"))}
DIFFUSERS |= {f"sample_size {value}": (diffusers({"sample_size": value}), f"sample_size {value!r}: need a "
                                       "multiple of the patch size 4, at most 1024")
              for value in ("8", [8, 8], 0, -8, 9, 8.0, float("nan"), 10**7)}
DIFFUSERS |= {"key list": (diffusers(change={KEY: [0.0]}), f"'{KEY}' names a <class 'list'>"),
              "key of another width": (diffusers(change={KEY: torch.zeros(32, 31)}), "mismatch for blocks.1.attn.qkv"),
              "key missing": (diffusers(change={KEY: ...}), "mismatch for blocks.1.attn.qkv")}

VAES = {
    "no bias": (vae({QUANT + "bias": ...}), "Missing key(s) in state_dict: \"post_quant_conv.bias\""),
    "no post_quant_conv": (vae({QUANT + "bias": ..., QUANT + "weight": ...}), "it has no post_quant_conv.weight"),
    "weight list": (vae({CONV + "weight": [1]}), f"'{CONV}weight' names a <class 'list'>"),
    "weight ()": (vae({QUANT + "weight": torch.tensor(1.0)}), f"'{QUANT}weight' names a torch."),
    "bias int64": (vae({QUANT + "bias": torch.arange(4)}), f"'{QUANT}bias' names a torch.int64"),
    "48 channels": (vae({name: torch.zeros(48, *VAE[name].shape[1:]) for name in VAE if "resnets.2.conv2" in name}),
                    "must be divisible"),
    "name 5": (lambda path: torch.save({5: torch.zeros(1)}, path), "5 names a torch.float32")}

HEADERS |= {"Git LFS pointer": (lambda path: path.write_bytes(LFS), "git lfs pull"),
            "empty file": (lambda path: path.write_bytes(b""), "empty"),
            "truncated": (safetensors({"x": ENTRY | dict(shape=[8], data_offsets=[0, 32])}), "truncated"),
            "4 bytes": (lambda path: path.write_bytes(b"\xff" * 4), "cannot be read, perhaps truncated")}

BAD = [pytest.param(load, suffix, *case, id=f"{kind}: {name}".replace("\n", " ")) for kind, load, suffix, cases in (
    ("safetensors", load_dit, ".safetensors", HEADERS), ("own", load_dit, ".pt", OWN),
    ("official", partial(load_dit, heads=4), ".pt", OFFICIAL), ("diffusers", load_dit, ".bin", DIFFUSERS),
    ("vae", load_decoder, ".bin", VAES)) for name, case in cases.items()]


@pytest.mark.parametrize("load, suffix, write, words", BAD)
def test_a_bad_file_is_one_line_that_names_it(load, suffix, write, words, tmp_path):
    path = tmp_path / f"bad{suffix}"
    write(path)
    with warnings.catch_warnings(), pytest.raises(ValueError) as refusal:
        warnings.simplefilter("ignore")                                                   # torch warns of TorchScript
        load(path)
    line = str(refusal.value)
    assert line.startswith(f"{path}: ") and len(line.splitlines()) == 1 and words in line


def test_the_bad_files_are_good_but_for_one_change(tmp_path):
    for write, load in ((own(), load_dit), (official(), partial(load_dit, heads=4)), (diffusers(), load_dit)):
        write(tmp_path / "good.bin")
        model, _ = load(tmp_path / "good.bin")
        assert all(torch.equal(tensor, DIT[name]) for name, tensor in model.state_dict().items())
    vae()(tmp_path / "good.bin")
    assert load_decoder(tmp_path / "good.bin").state_dict().keys() == VAE.keys()


@pytest.mark.parametrize("meta", [
    {"class_names": []}, {"class_names": ["👩‍🚒", "می‌خواهم", "L'été, 2"]}, {"settings": None},
    {"settings": ..., "class_names": ..., "latent": ...}, {"latent": True, "flow": "sit"},
    {"flow": "repa"}])
def test_meta_that_makes_sense_is_kept(meta, tmp_path):
    own(meta=meta)(tmp_path / "own.pt")
    expected = changed(dict(flow="rf") | META, meta)
    assert load_dit(tmp_path / "own.pt")[1] == dict(settings={}, class_names=[], latent=False) | expected


@pytest.mark.parametrize("write", [own(), diffusers()])
def test_heads_that_contradict_the_checkpoint(write, tmp_path):
    write(tmp_path / "said.bin")
    assert load_dit(tmp_path / "said.bin", heads=4)[0].blocks[0].attn.heads == 4
    for heads in (0, 2, -4):
        with pytest.raises(ValueError, match=f"said.bin: --heads {heads}: this checkpoint says 4: leave the flag out"):
            load_dit(tmp_path / "said.bin", heads=heads)
    official()(tmp_path / "unsaid.pt")
    for heads in (0, -4, 5):
        with pytest.raises(ValueError, match=f"unsaid.pt: {heads} heads do not divide 32 channels"):
            load_dit(tmp_path / "unsaid.pt", heads=heads)


def test_a_name_of_two_lines_makes_one():
    with pytest.raises(ValueError, match="^two lines.pt: no such checkpoint file"):
        load_dit("two\nlines.pt")
    with pytest.raises(ValueError, match="File name too long"):
        load_dit("x" * 300)


def test_a_decoder_of_other_latents(tmp_path):
    vae({name: tensor.half() for name, tensor in VAE.items()})(tmp_path / "vae.bin")
    decoder = load_decoder(tmp_path / "vae.bin", channels=4)
    assert decoder.post_quant_conv.in_channels == 4 and decoder.decoder.conv_in.weight.dtype == torch.float32
    with pytest.raises(ValueError, match="vae.bin: decodes latents of 4 channels, and the DiT samples 3"):
        load_decoder(tmp_path / "vae.bin", channels=3)


def test_damaged_tensors_in_an_archive(tmp_path):
    """torch.load gives other numbers without a word."""
    official()(path := tmp_path / "damaged.pt")
    whole, generator = path.read_bytes(), torch.Generator().manual_seed(0)
    for tensor in [tensor for tensor in DIT.values() if tensor.any()][::4]:
        at = whole.find(tensor.numpy().tobytes()) + int(torch.randint(tensor.nbytes, (), generator=generator))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1:])
        assert not all(torch.equal(tensor, DIT[name]) for name, tensor in torch.load(path).items())
        with pytest.raises(ValueError, match="damaged.pt: damaged: .*CRC-32"):
            load_dit(path, heads=4)


def test_pickled_code_does_not_run(tmp_path):
    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"ema": DIT, "code": Code()}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="code.pt: holds a .*, whose loading could run code"):
        load_dit(tmp_path / "code.pt", heads=4)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", [AttributeError, IndexError, KeyError, RuntimeError, TypeError])
def test_a_bug_of_this_project_is_no_bad_file(kind, tmp_path, monkeypatch):
    own()(tmp_path / "own.pt")
    for name in ("config_of", "clean_state", "load_into", "DiT"):
        with monkeypatch.context() as patch, pytest.raises(kind, match="^.?a bug.?$"):
            patch.setattr(dit, name, lambda *args, **options: (_ for _ in ()).throw(kind("a bug")))
            load_dit(tmp_path / "own.pt")


def test_the_sizes_are_those_of_the_weights(tmp_path):
    own(config=dict(depth=10**6, hidden_size="2", patch_size=0, num_classes=...))(tmp_path / "own.pt")
    assert load_dit(tmp_path / "own.pt")[0].config == DiT(**CONFIG).config


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_prefixes_and_projectors_are_left_out(prefix, tmp_path):
    """Of DDP, torch.compile and Lightning; the projectors are REPA's."""
    state = {prefix + name: tensor for name, tensor in DIT.items()}
    torch.save({"ema": state | {prefix + "projectors.0.0.weight": torch.ones(3, 3)}}, tmp_path / "prefix.pt")
    loaded = load_dit(tmp_path / "prefix.pt", heads=4)[0].state_dict()
    assert loaded.keys() == DIT.keys() and all(torch.equal(tensor, DIT[name]) for name, tensor in loaded.items())


@pytest.mark.parametrize("rows, said, classes, null, kind", [
    (4, None, 3, 3, None), (4, 3, 3, 3, dict), (4, 4, 4, None, argparse.Namespace), (4, 4, 4, None, dict),
    (2, 1, 1, 1, argparse.Namespace), (1, 1, 1, None, dict), (1, None, 1, None, None)])
def test_a_checkpoint_with_no_null_class(rows, said, classes, null, kind, tmp_path):
    model = DiT(**CONFIG | dict(num_classes=rows - 1)).float()
    content = {"ema": model.state_dict()} | ({"args": kind(num_classes=said)} if said else {})
    torch.save(content, tmp_path / "dit.pt")
    loaded, meta = load_dit(tmp_path / "dit.pt", heads=4)
    assert loaded.null_class == null and loaded.config["num_classes"] == classes
    again = DiT(**loaded.config)
    again.load_state_dict(loaded.state_dict())
    assert again.null_class == null and again.config == loaded.config
    torch.save({"model": again.state_dict(), "config": again.config, "meta": META | dict(class_names=[])},
               tmp_path / "own.pt")
    assert load_dit(tmp_path / "own.pt")[0].config == loaded.config


@pytest.mark.parametrize("channels, latent", [(1, False), (3, False), (4, True), (16, True)])
def test_one_or_three_channels_are_pixels(channels, latent, tmp_path):
    torch.save(DiT(**CONFIG | dict(in_channels=channels)).state_dict(), tmp_path / "dit.pt")
    assert load_dit(tmp_path / "dit.pt", heads=4)[1]["latent"] is latent


def test_folders_as_people_have_them(tmp_path):
    folder = tmp_path / "transformer"
    folder.mkdir()
    with pytest.raises(ValueError, match="transformer: a folder without .safetensors or .bin"):
        load_dit(folder)
    full = folder / "diffusion_pytorch_model.bin"
    diffusers()(full)
    for variant in ("bf16.bin", "fp16.safetensors", "fp16-00001-of-00002.safetensors"):
        full.with_suffix(f".{variant}").write_bytes(b"not to be read")
    assert torch.equal(load_dit(folder)[0].blocks[1].attn.qkv.weight, DIT["blocks.1.attn.qkv.weight"])
    full.with_suffix(".safetensors").write_bytes(b"to be read first")
    with pytest.raises(ValueError, match="diffusion_pytorch_model.safetensors: cannot be read"):
        load_dit(folder)
    with pytest.raises(ValueError, match="need a file, or a diffusers transformer/"):            # a pipeline's folder
        load_dit(tmp_path)


def test_a_sharded_folder(tmp_path):
    for name in ("model.fp16.bin", "model-00002-of-00002.bin", "model-00001-of-00002.bin"):
        (tmp_path / name).write_bytes(b"not to be read")
    for path in (tmp_path, tmp_path / "model-00001-of-00002.bin"):
        with pytest.raises(ValueError, match="model-00001-of-00002.bin: one of several files .*max_shard_size"):
            load_dit(path)
    diffusers()(tmp_path / "model.bin")
    assert torch.equal(load_dit(tmp_path)[0].blocks[1].attn.qkv.weight, DIT["blocks.1.attn.qkv.weight"])


@pytest.mark.parametrize("name", ["facebook/DiT-XL-2-256", "missing", "/a/b"])
def test_what_is_not_there(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for load in (load_dit, load_decoder):
        with pytest.raises(ValueError, match=f"^{name}: no such checkpoint file.*hf download"):
            load(name)


def test_the_folder_of_a_model_names_its_config(tmp_path):
    diffusers(b"{")(tmp_path / "model.bin")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}: config.json: cannot be read")):
        load_dit(tmp_path)


def test_the_fingerprint_stands_for_the_weights(tmp_path):
    def print_of(changes: dict = {}) -> str:
        own(model=changes)(tmp_path / "own.pt")
        return fingerprint(load_dit(tmp_path / "own.pt")[0])

    whole, weight = print_of(), DIT[BIAS].clone()
    weight[7] = torch.nextafter(weight[7], torch.tensor(1.0))
    prints = [whole, print_of({BIAS: weight}), print_of({BIAS: weight.flip(0)}),
              print_of({BIAS: weight, "blocks.0.mlp.fc2.bias": weight}), print_of({"blocks.0.mlp.fc2.bias": weight})]
    assert re.fullmatch("[0-9a-f]{12}", whole) and len(set(prints)) == len(prints) and print_of() == whole
    model = load_dit(tmp_path / "own.pt")[0]
    layer = torch.nn.Linear(2, 3, bias=False)
    prints = [fingerprint(torch.nn.ModuleDict({name: layer})) for name in "ab"]
    layer.weight.data = layer.weight.view(2, 3)
    assert len({*prints, fingerprint(torch.nn.ModuleDict({"a": layer}))}) == 3
    assert fingerprint(model.to(torch.bfloat16)) != whole and fingerprint(LatentDecoder((32,) * 4)) != whole
