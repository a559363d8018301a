"""What wrong input does to the scripts of the command line and to demo/train.py, and kills to bench/many.py."""
import contextlib
import copy
import functools
import io
import itertools
import json
import math
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

resource = pytest.importorskip("resource", reason="limits, FIFOs and forks: Windows has none")
HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import sampler  # noqa: E402
from dit import DiT, LatentDecoder, load_dit  # noqa: E402
from test_emag import RUN, script  # noqa: E402

torch.set_num_threads(1)                 # the models are tiny, and a process that forks may have no other threads
many, train = script("bench/many.py"), script("demo/train.py")
trace, compare = script("demo/trace.py"), script("demo/compare.py")
SCRIPTS = dict(sampler=sampler, many=many, compare=compare, trace=trace, train=train)

SIZES = dict(input_size=8, patch_size=4, hidden_size=32, depth=3, num_heads=4, num_classes=3)
SETTINGS = dict(sampler="euler", steps=3, cfg=2.0, emag=2.0, layers=[1, 2])
META = dict(prediction="velocity", class_names=["cat", "t-rex", "7"], settings=SETTINGS, latent=False)


def weights(seed: int = 0, **sizes) -> dict:
    model, generator = DiT(**(SIZES | sizes)), torch.Generator().manual_seed(seed)
    return {name: tensor if name == "pos_embed" else torch.randn(tensor.shape, generator=generator) * 0.2
            for name, tensor in model.state_dict().items()}


def write_checkpoints(folder: Path):
    rgb = dict(in_channels=3, learn_sigma=False)
    tiny, broken, table = weights(**rgb), "blocks.1.mlp.fc1.weight", "y_embedder.embedding_table.weight"

    def own(name: str, model: dict = tiny, **meta):
        torch.save(dict(model=model, config=SIZES | rgb, meta=META | meta), folder / name)

    own("tiny.pt")
    own("noise.pt", prediction="noise", settings=SETTINGS | dict(sampler="ddim", steps=3))
    own("other.pt", weights(1, **rgb))
    own("no-null.pt", tiny | {table: torch.cat([tiny[table][:-1], torch.full((1, 32), torch.nan)])})    # see `load_once`
    own("nan.pt", tiny | {broken: tiny[broken] * torch.nan})
    own("large.pt", tiny | {broken: tiny[broken] * 1e6})
    own("still.pt", {name: tensor * (name == "pos_embed" or "y_emb" in name) for name, tensor in tiny.items()})
    for name, change in dict(short={"steps": 0}, kind={"cfg": "2"}, unknown={"speed": 1}, layers={"layers": 5},
                             tensor={"emag": torch.ones(2)}, deep={"layers": [7]}, ddim={"sampler": "ddim"},
                             shape={"steps": [5]},
                             zebra={"classes": ["zebra"]}, key={5: 5}, uncond={"uncond": "yes"}).items():
        own(f"says-{name}.pt", settings=SETTINGS | change)
    torch.save(weights(num_classes=40), folder / "latent.pt")
    for name, channels in (("vae", 4), ("vae8", 8)):
        torch.save(LatentDecoder((32,) * 4, channels).state_dict(), folder / f"{name}.bin")
    torch.save({name: tensor * torch.nan for name, tensor in LatentDecoder((32,) * 4).state_dict().items()},
               folder / "vae-nan.bin")


def write_obstacles(folder: Path):
    """What may lie where an output should go."""
    (folder / "file.txt").write_text("a file")
    (folder / "there.png").write_bytes(b"a picture")
    Image.new("RGB", (9, 9)).save(folder / "plain.png")
    for name in ("dir.png", "dir.pt", "taken.state", "small", "cut"):
        (folder / name).mkdir()
    (folder / "cut.state").write_bytes(b"PK")
    data = dict(images=np.zeros((4, 3, 32, 32), np.uint8), labels=np.zeros(4, int), class_names=np.array(["cat"]),
                names=np.array(["a"] * 4), held_out=np.zeros(4, bool), first=np.zeros(4, bool))
    np.savez(folder / "small" / "emoji.npz", **data)
    (folder / "cut" / "emoji.npz").write_bytes((folder / "small" / "emoji.npz").read_bytes()[:-99])
    for suffix in ("png", "npy", "npz"):
        os.mkfifo(folder / f"fifo.{suffix}")
        (folder / f"null.{suffix}").symlink_to("/dev/null")
        (folder / f"nowhere.{suffix}").symlink_to("missing/file")
        (folder / f"loop.{suffix}").symlink_to(f"loop.{suffix}")
    os.mkfifo(folder / "fifo")
    (folder / "to-nowhere").symlink_to("missing")
    for name, content in dict(files=None, null="null", half='{"sampler": "eu', list="[1]", deep="[" * 100_000,
                              fifo_settings=None, fifo_image=None, dir_image=None).items():
        (folder / name).mkdir()
        if content:
            (folder / name / "settings.json").write_text(content)
    (folder / "files" / "notes.txt").write_text("mine")
    np.savez(folder / "null" / "emoji.npz", images=data["images"])
    os.mkfifo(folder / "fifo_settings" / "settings.json")
    os.mkfifo(folder / "fifo_image" / "000001.png")
    (folder / "dir_image" / "000001.png").mkdir()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    write_checkpoints(folder)
    write_obstacles(folder)
    assert many.main(shlex.split(f"--ckpt {folder}/tiny.pt --num 2 --out {folder}/made")) == 0
    info, settings = PngInfo(), json.loads(Image.open(folder / "made" / "000000.png").text["settings"])
    info.add_text("settings", json.dumps(settings | dict(steps=0)))
    Image.new("RGB", (9, 9)).save(folder / "edited.png", pnginfo=info)
    return folder


def snapshot(folder: Path) -> dict:
    """What is in a folder, links and FIFOs included, and for what is no folder when it last changed in any way."""
    found = {path: path.lstat() for path in folder.rglob("*")}
    return {path: (each.st_mode, not stat.S_ISDIR(each.st_mode) and (each.st_ino, each.st_size, each.st_ctime_ns))
            for path, each in found.items()}


# Each line: a command, with environment variables before it where it needs any, and a part of its error line. Where a
# command names no checkpoint it is tiny.pt: 3 blocks of 4 heads, RGB of 8×8, three classes. «…» is evaluated.
TABLE = r"""
sampler --steps 0                              | --steps 0: need a number from
sampler --steps 1001                           | --steps 1001: need a number from
sampler --steps 2.5                            | argument --steps: invalid int value: '2.5'
sampler --steps «'9' * 5000»                   | argument --steps: invalid int value
sampler --num 0                                | --num 0: need a number from
sampler --num -3                               | --num -3: need a number from
sampler --num 10001                            | --num 10001: a grid has room for 10000: need bench/many.py
sampler --batch 0                              | --batch 0: need a number from
sampler --seed -1                              | --seed -1: need a number from
sampler --seed «2**64»                         | --seed 18446744073709551616: need a number from
sampler --emag inf                             | --emag inf: need a number from
sampler --emag nan                             | --emag nan: need a number from
sampler --emag much                            | argument --emag: invalid float value: 'much'
sampler --emag                                 | argument --emag: expected one argument
sampler --cfg 1e7                              | --cfg 10000000.0: need a number from
sampler --cfg nan                              | --cfg nan: need a number
sampler --beta 1.5                             | --beta 1.5: need a number from
sampler --beta nan                             | --beta nan: need a number from
sampler --strength -0.1                        | --strength -0.1: need a number from
sampler --threshold nan                        | --threshold nan: need a number from
sampler --threshold inf                        | --threshold inf: need a number from
sampler --variant maps                         | argument --variant: invalid choice: 'maps' (choose from
sampler --window 0.2 0.8 1                     | Window(start=0.2, apply=0.8, stop=1.0): need 1 ≥ start ≥ apply ≥ stop ≥ 0
sampler --window 1 nan 0                       | Window(start=1.0, apply=nan, stop=0.0): need 1 ≥ start ≥ apply ≥ stop ≥ 0
sampler --window 1 0.8                         | argument --window: expected 3 arguments
sampler --sampler ddim                         | --sampler ddim: tiny.pt needs euler or heun
sampler --ckpt noise.pt --sampler heun         | --sampler heun: noise.pt needs ddim or ddpm
sampler --sampler magic                        | argument --sampler: invalid choice: 'magic' (choose from
sampler --eta 0.5                              | --eta 0.5: euler has none: leave it out
sampler --ckpt noise.pt --sampler ddpm --eta 1 | --eta 1: ddpm has none: leave it out
sampler --ckpt noise.pt --eta 2                | --eta 2.0: need a number from
sampler --guide-channels 0                     | --guide-channels 0: need a number from
sampler --guide-channels 4                     | --guide-channels 4: need 1…3
sampler --layers 3                             | --layers '3': need all, or of 0…2 such as 0,1 or 0-1
sampler --layers 1-                            | --layers '1-': need all, or of 0…2
sampler --layers -1                            | --layers '-1': need all, or of 0…2
sampler --layers 2-1                           | --layers '2-1': need all, or of 0…2
sampler --layers 0-30000000                    | --layers '0-30000000': need all, or of 0…2
sampler --layers 0-1-2                         | --layers '0-1-2': need all, or of 0…2
sampler --layers ²                             | --layers '²': need all, or of 0…2
sampler --layers 1,,2                          | --layers '': need all, or of 0…2
sampler --layers ""                            | --layers '': need all, or of 0…2
sampler --classes dog                          | --classes 'dog': need all, or of 0…2 such as 0,1 or 0-1, or of 
sampler --classes rext                         | --classes 'rext': need all, or of 0…2 such as 0,1 or 0-1, or of t-rex, cat, 7
sampler --classes 3                            | --classes '3': need all, or of 0…2
sampler --classes cat,                         | --classes '': need all, or of 0…2
sampler --classes ²                            | --classes '²': need all, or of 0…2
sampler --classes "cat dog"                    | --classes 'cat dog': need all
sampler --classes all,cat                      | --classes 'all': need all, or
sampler --classes «'a' * 5000»                 | --classes 'aaaa
sampler --classes "«'a\nb'»"                   | --classes 'a\nb': need all
sampler --apg 1 2                              | --apg (1.0, 2.0): need 0 ≤ ETA ≤ 1e6, 0 < NORM ≤ 1e6, −1 < MOMENTUM < 1
sampler --apg 0 0 0                            | --apg (0.0, 0.0, 0.0): need 0 ≤ ETA ≤ 1e6, 0 < NORM ≤ 1e6
sampler --apg 0 inf 0                          | --apg (0.0, inf, 0.0): need 0 ≤ ETA ≤ 1e6, 0 < NORM ≤ 1e6
sampler --apg 0 5 -1                           | --apg (0.0, 5.0, -1.0): need
sampler --apg nan 5 0                          | --apg (nan, 5.0, 0.0): need
sampler --apg --cfg 1                          | --apg: needs a null prediction, and w = 1 makes none: give --cfg above 1
sampler --apg --uncond                         | --apg: needs a null prediction, and w = 1 makes none: give --cfg above 1
sampler --window                               | argument --window: expected 3 arguments
sampler --cads 0.5                             | --cads (0.5,): need 0 ≤ TAU1 ≤ TAU2 ≤ 1, 0 < S ≤ 1e6, 0 ≤ PSI ≤ 1
sampler --cads 0.9 0.6 0.1 1                   | --cads (0.9, 0.6, 0.1, 1.0): need 0 ≤ TAU1 ≤ TAU2 ≤ 1
sampler --cads 0.6 0.9 0 1                     | --cads (0.6, 0.9, 0.0, 1.0): need
sampler --cads 0.6 0.9 0.1 nan                 | --cads (0.6, 0.9, 0.1, nan): need
sampler --cads --uncond                        | --cads: noises the condition, and --uncond has none: leave one out
sampler --uncond --cfg 2                       | --uncond: has no CFG: leave --cfg out
sampler --heads 2                              | tiny.pt: --heads 2: this checkpoint says 4: leave the flag out
sampler --heads two                            | argument --heads: invalid int value: 'two'
sampler --ckpt latent.pt --latents new.npy     | latent.pt: 3 blocks of 32 channels is none of DiT-S, B, L, XL: pass --heads
sampler --ckpt latent.pt --heads 0 --vae vae.bin  | 0 heads do not divide 32 channels: need a whole number that does
sampler --ckpt latent.pt --heads 4             | latent.pt samples latents: need --vae sd-vae-ft-ema, or sampler.py --latents
sampler --ckpt latent.pt --heads 4 --vae vae.bin  | --classes: 40 are too many for a grid: need fewer, or --num
sampler --ckpt latent.pt --heads 4 --vae vae8.bin | vae8.bin: decodes latents of 8 channels, and the DiT samples 4
sampler --ckpt latent.pt --heads 4 --vae missing  | missing: no such checkpoint file
sampler --ckpt latent.pt --heads 4 --vae latent.pt --num 1 | latent.pt: not an autoencoder
sampler --ckpt latent.pt --heads 4 --vae vae-nan.bin --num 1 --steps 2 | the decoder gives NaN or infinity: need smaller scales or another --vae
sampler --ckpt latent.pt --heads 4 --flow up   | argument --flow: invalid choice: 'up' (choose from
sampler --vae vae.bin                          | vae.bin: decodes latents of 4 channels, and the DiT samples 3
sampler --flow sit                             | --flow sit: tiny.pt says what it predicts: leave the flag out
sampler --ckpt noise.pt --flow rf              | --flow rf: noise.pt says what it predicts: leave the flag out
sampler --ckpt missing.pt                      | missing.pt: no such checkpoint file
sampler --ckpt fifo.png                        | fifo.png: no such checkpoint file
sampler --ckpt /dev/zero                       | /dev/zero: no such checkpoint file
sampler --ckpt file.txt                        | file.txt: cannot be read, perhaps truncated (
sampler --ckpt dir.png                         | dir.png: a folder without .safetensors or .bin: need a file
sampler --ckpt vae.bin                         | vae.bin: not a DiT checkpoint
sampler --ckpt says-short.pt                   | says-short.pt, its settings: --steps 0: need a number
sampler --ckpt says-kind.pt                    | says-kind.pt, its settings: --cfg 2: need a number
sampler --ckpt says-tensor.pt                  | says-tensor.pt, its settings: --emag tensor([1., 1.]): need
sampler --ckpt says-unknown.pt                 | says-unknown.pt, its settings: cannot be read, perhaps truncated (TypeError: Settings.__init__()
sampler --ckpt says-key.pt                     | says-key.pt, its settings: cannot be read, perhaps truncated (TypeError: keywords must be strings
sampler --ckpt says-uncond.pt                  | says-uncond.pt, its settings: --uncond: has no CFG
sampler --ckpt says-layers.pt                  | says-layers.pt, its settings: cannot be read, perhaps truncated (TypeError: 'int' object is not iterable
sampler --ckpt says-shape.pt                   | says-shape.pt, its settings: --steps [5]: need a number
sampler --ckpt says-deep.pt                    | --layers '7': need all, or of 0…2
sampler --ckpt says-ddim.pt                    | --sampler ddim: says-ddim.pt needs euler or heun
sampler --ckpt says-zebra.pt                   | --classes 'zebra': need all, or of 0…2
sampler --ckpt nan.pt                          | the network gives NaN or infinity at t = 1: need --dtype float32, smaller
sampler --ckpt large.pt --dtype float16        | the network gives NaN or infinity at t = 1: need --dtype float32
sampler --ckpt nan.pt --latents new.npy        | the network gives NaN or infinity at t = 1: need --dtype float32
sampler --emag 1e6 --cfg 1e6 --steps 9 --batch 2 --num 2 --dtype float16 | the network gives NaN or infinity at t = 0.889: need --dtype float32, smaller
sampler --ckpt still.pt                        | the observed attention equals its average exactly: the model saw
sampler --ckpt no-null.pt                      | --cfg 2: no-null.pt has no null class, which CFG and --uncond need: need --cfg 1
sampler --ckpt no-null.pt --cfg 0              | --cfg 0: no-null.pt has no null class, which CFG and --uncond need: need --cfg 1
sampler --ckpt no-null.pt --uncond             | no-null.pt has no null class, which CFG and --uncond need: need --cfg 1
sampler --ckpt no-null.pt --cfg 1 --classes 3  | --classes '3': need all, or of 0…2
sampler --like made/000001.png --ckpt other.pt | --like made/000001.png: was drawn with other weights than other.pt has: need --ckpt tiny.pt
sampler --like made/000001.png --seed -1       | --seed -1: need a number
sampler --like there.png                       | --like there.png: cannot be read, perhaps truncated (
sampler --like plain.png                       | --like plain.png: holds no settings: need a PNG
sampler --like missing.png                     | --like missing.png: cannot be read, perhaps truncated (FileNotFound
sampler --like edited.png                      | --like edited.png: --steps 0: need a number from
trace --like made/000001.png --emag 1          | --emag 1: EMAG is off
compare --like made/000001.png --ckpt other.pt | --like made/000001.png: was drawn with other weights
sampler --device abacus                        | --device abacus: not usable here: need auto, cpu
sampler --device cuda:99                       | --device cuda:99: not usable here
sampler --device ""                            | --device : not usable here
sampler --dtype float8                         | argument --dtype: invalid choice: 'float8' (choose from
sampler --magic                                | unrecognized arguments: --magic: see --help
sampler cat                                    | unrecognized arguments: cat: see --help
sampler --step 3                               | unrecognized arguments: --step 3: see --help
sampler --compare                              | unrecognized arguments: --compare: see --help
sampler --latents new.npy --out new.png        | argument --out: not allowed with argument --latents
sampler --latents new.npy --npz new.npz        | unrecognized arguments: --npz new.npz: see --help
sampler --out new.bmp                          | --out new.bmp: need a file name that ends in .png
sampler --out new.PNG                          | --out new.PNG: need a file name that ends in .png
sampler --out .                                | --out .: need a file name that ends in .png
sampler --out ""                               | --out .: need a file name that ends in .png
sampler --out .png                             | --out .png: need a file name that ends in .png
sampler --out /dev/null                        | --out /dev/null: need a file name that ends in .png
sampler --out fifo.png                         | fifo.png: cannot be written (is no regular file, or is read-only): need a regular file or a new name
sampler --out null.png                         | null.png: cannot be written (is no regular file
sampler --out nowhere.png                      | nowhere.png: cannot be written (is no regular file
sampler --out loop.png                         | loop.png: cannot be written (is no regular file
sampler --out dir.png                          | dir.png: cannot be written (is no regular file
sampler --out missing/new.png                  | missing/new.png: cannot be written (No such file or directory): need
sampler --out file.txt/new.png                 | file.txt/new.png: cannot be written (Not a directory): need
sampler --out /proc/new.png                    | /proc/new.png: cannot be written (
sampler --out «'x' * 300».png                  | .png: cannot be written (File name too long): need a regular file or a new name
sampler --out «chr(0xd800)».png                | cannot be written (surrogates not allowed): need a regular file or a new name
sampler --latents /dev/null                    | --latents /dev/null: need a file name that ends in .npy
sampler --latents fifo.npy                     | fifo.npy: cannot be written (is no regular file
sampler --latents null.npy                     | null.npy: cannot be written (is no regular file
sampler --latents missing/new.npy              | missing/new.npy: cannot be written (No such file or directory)
sampler --latents new.png                      | --latents new.png: need a file name that ends in .npy
FULL=1 sampler --out new.png                   | new.png: cannot be written (File too large): need a regular file or a new name, in a folder
compare --uncond                               | --uncond, --cfg and --emag: the lines are with and without: need a condition
compare --emag 1                               | --uncond, --cfg and --emag: the lines are with and without: need
compare --cfg 1                                | --uncond, --cfg and --emag: the lines are with and without: need
compare --ckpt no-null.pt --cads .6 .9 .1 1    | --cfg 2: no-null.pt has no null class
compare --num 1000000                          | --num 1000000: 5 lines of a grid have room for 2000 each
compare --num 5001 --methods cfg emag          | --num 5001: 2 lines of a grid have room for 5000 each
compare --methods                              | argument --methods: expected at least one argument
compare --methods pag                          | argument --methods: invalid choice: 'pag'
compare --out fifo.png                         | fifo.png: cannot be written (is no regular file
compare --out new.jpg                          | --out new.jpg: need a file name that ends in .png
compare --ckpt nan.pt                          | the network gives NaN or infinity at t = 1: need
compare --latents new.npy                      | unrecognized arguments: --latents new.npy: see --help
compare --cads 1                               | --cads (1.0,): need 0 ≤ TAU1
trace --emag 1                                 | --emag 1: EMAG is off: need another scale, such as 2
trace --num 25                                 | --num 25: the trace is of one batch: need at most 24, or a larger --batch
trace --out null.png                           | null.png: cannot be written (is no regular file
trace --out new                                | --out new: need a file name that ends in .png
trace --ckpt nan.pt                            | the network gives NaN or infinity at t = 1: need --dtype float32
trace --trace new.png                          | unrecognized arguments: --trace new.png: see --help
many --num 2                                   | the following arguments are required: --out
many --out new                                 | --num: say how many images to draw
many --num 2 --out file.txt                    | --out file.txt: is no folder: need one, or a new name
many --num 2 --out there.png                   | --out there.png: is no folder: need one, or a new name
many --num 2 --out fifo                        | --out fifo: is no folder: need one, or a new name
many --num 2 --out /dev/null                   | --out /dev/null: is no folder: need one, or a new name
many --num 2 --out to-nowhere                  | --out to-nowhere: is no folder: need one, or a new name
many --num 2 --out loop.png                    | --out loop.png: is no folder: need one, or a new name
many --num 2 --out missing/new                 | missing/new: cannot be written (No such file or directory)
many --num 2 --out «'x' * 300»                 | xxx: cannot be written (File name too long)
many --num 2 --out /proc                       | cannot be written (
many --num 2 --out .                           | --out dir.png: is no regular file: need another folder
many --num 2 --out ""                          | --out '': need the name of a folder
many --num 2 --out files                       | --out files: holds files and no settings.json: need an empty folder, or a new name
many --num 2 --out null                        | null/settings.json: holds no settings: need the file that a run wrote, or another folder
many --num 2 --out half                        | half/settings.json: holds no settings: need
many --num 2 --out list                        | list/settings.json: holds no settings: need
many --num 2 --out deep                        | deep/settings.json: holds no settings: need
many --num 2 --out fifo_settings               | fifo_settings/settings.json: holds no settings: need
many --num 2 --out fifo_image                  | --out fifo_image/000001.png: is no regular file: need another folder
many --num 2 --out dir_image                   | --out dir_image/000001.png: is no regular file: need another folder
many --num 3 --out made                        | --out made: made with num 2, not 3: need the same settings to go on, or another folder
many --num 2 --out made --seed 1               | --out made: made with seed 0, not 1: need the same settings
many --num 2 --out made --emag 3               | --out made: made with emag 2.0, not 3.0: need the same settings
many --num 2 --out made --batch 1              | --out made: made with batch 24, not 1: need the same settings
many --num 2 --out made --dtype bfloat16       | --out made: made with dtype float32, not bfloat16: need the same settings
many --num 2 --out made --classes 7            | --out made: made with classes ['cat', 't-rex', '7'], not ['7']: need the same settings
many --num 2 --out made --ckpt other.pt        | --out made: made with checkpoint tiny.pt, not other.pt: need the same settings
many --num 2 --out new --npz new               | --npz new: need a file name that ends in .npz
many --num 2 --out new --npz /dev/null         | --npz /dev/null: need a file name that ends in .npz
many --num 2 --out new --npz fifo.npz          | fifo.npz: cannot be written (is no regular file
many --num 2 --out new --npz nowhere.npz       | nowhere.npz: cannot be written (is no regular file
many --num 2 --out new --npz missing/new.npz   | missing/new.npz: cannot be written (No such file or directory)
many --num 2 --out new --npz new/new.npz       | new/new.npz: cannot be written (No such file or directory)
many --num 2 --out new --ckpt nan.pt           | the network gives NaN or infinity at t = 1: need --dtype float32
many --num 2 --out new --latents new.npy       | unrecognized arguments: --latents new.npy: see --help
FULL=1 many --num 2 --out new                  | new: cannot be written (File too large)
RANK=1 many --num 2 --out new                  | RANK 1, WORLD_SIZE None: need both, 0 ≤ RANK < WORLD_SIZE, as torchrun sets them, or neither
WORLD_SIZE=2 many --num 2 --out new            | RANK None, WORLD_SIZE 2: need both
RANK=abc WORLD_SIZE=2 many --num 2 --out new   | RANK abc, WORLD_SIZE 2: need both, 0 ≤ RANK < WORLD_SIZE
RANK=2 WORLD_SIZE=2 many --num 2 --out new     | RANK 2, WORLD_SIZE 2: need both, 0 ≤ RANK < WORLD_SIZE
RANK=-1 WORLD_SIZE=2 many --num 2 --out new    | RANK -1, WORLD_SIZE 2: need both, 0 ≤ RANK < WORLD_SIZE
RANK=0 WORLD_SIZE=0 many --num 2 --out new     | RANK 0, WORLD_SIZE 0: need both, 0 ≤ RANK < WORLD_SIZE
RANK=² WORLD_SIZE=3 many --num 2 --out new     | RANK ², WORLD_SIZE 3: need both, 0 ≤ RANK < WORLD_SIZE
RANK= WORLD_SIZE= many --num 2 --out new       | RANK , WORLD_SIZE : need both, 0 ≤ RANK < WORLD_SIZE
train --minutes -1                             | --minutes -1.0: need a number above 0
train --minutes nan                            | --minutes nan: need a number above 0
train --batch 0                                | --batch 0: need a whole number above 0
train --batch -5                               | --batch -5: need a whole number above 0
train --batch 5 --data small                   | --batch 5: need at most 4, all images to train on
train --lr 0                                   | --lr 0.0: need a number above 0
train --lr nan                                 | --lr nan: need a number above 0
train --images 0                               | --images 0: need a whole number above 0
train --predict both                           | argument --predict: invalid choice: 'both'
train --out new                                | --out new: need a file name that ends in .pt
train --out missing/new.pt                     | missing/new.pt: cannot be written (No such file or directory)
train --out dir.pt                             | dir.pt: cannot be written (is no regular file
train --out taken.pt                           | taken.state: cannot be written (is no regular file
train --start missing.pt --out new.pt          | missing.pt: no such checkpoint file
train --start tiny.pt --out new.pt             | --start tiny.pt: is of another size: need a checkpoint of this script
train --resume --out new.pt                    | --resume: new.state is not there: need the --out of an interrupted run
train --resume --out cut.pt                    | --resume: cut.state cannot be read (
train --data file.txt --out new.pt             | --data file.txt: is no folder: need one, or a new name
train --data file.txt/new --out new.pt         | Not a directory: 'file.txt
train --data /proc/new --out new.pt            | No such file or directory: '/proc/new'
train --data cut --out new.pt                  | cut/emoji.npz: cannot be read (
train --data null --out new.pt                 | null/emoji.npz: cannot be read (
PATH= train --data files --out new.pt          | is not there, nor is npm, which fetches it: install npm
FULL=1 train --out new.pt                      | new.pt: cannot be written (File too large)
train --magic                                  | unrecognized arguments: --magic: see --help
"""
ROWS = [[part.strip() for part in line.split(" | ")] for line in TABLE.strip().splitlines()]


@pytest.mark.parametrize("command, message", ROWS, ids=[command for command, _ in ROWS])
def test_wrong_input_is_one_line_and_changes_nothing(command, message, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sampler, "load_dit", load_once)
    command = re.sub("«(.+?)»", lambda match: str(eval(match[1])), command)
    variables, name, *argv = re.fullmatch(r"((?:\w+=\S* )*)(\w+)(.*)", command, re.DOTALL).groups()
    for variable in variables.split():
        monkeypatch.setenv(*variable.split("=", 1))
    before = snapshot(folder)
    with full_disk() if "FULL" in variables else contextlib.nullcontext():
        checkpoint = ("--ckpt", "tiny.pt") * ("--ckpt" not in argv[0] and name != "train")
        code = SCRIPTS[name].main([*checkpoint, *shlex.split(argv[0])])
    out, err = capsys.readouterr()
    assert err.startswith(f"{name}.py: ") and err.endswith("\n") and len(err.splitlines()) == 1 and message in err
    assert code == 2 and snapshot(folder) == before
    assert out == "" or "gives NaN" in err or "observed attention" in err              # else before the sampling begins


@functools.cache
def loaded(path: Path, heads: int | None):
    return load_dit(path, heads)


def load_once(path: Path, heads: int | None):
    model, meta = copy.deepcopy(loaded(path, heads))
    if path.name == "no-null.pt":                         # stands in for a checkpoint whose table has no null row
        model.null_class = None
    return model, meta


@contextlib.contextmanager
def full_disk():
    """No file may grow beyond 1 kB; a disk that is full has another name for it and the same effect."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


# What no flag can say and a checkpoint can.
BAD = {"steps": [1001, 2.5, "5", math.nan], "cfg": ["2", None], "emag": [-math.inf], "window": [[1.0, 0.8]],
       "threshold": ["1"], "guide_channels": [1.5], "seed": [0.5], "apg": [[0, 5]], "cads": [[0.6, 0.9, 0.1, 1.5]],
       "sampler": ["rk4", ["ddim"]], "variant": [None], "dtype": ["float64", {}]}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in BAD.items() for value in values], ids=str)
def test_settings_that_cannot_be_name_their_flag(name, value):
    with pytest.raises(ValueError, match=f"^--{name.replace('_', '-')}"):
        sampler.Settings(**RUN | {name: value})


# ---------------------------------------------------------------------------------------------- errors and whole files

@pytest.mark.parametrize("error, code, line", [
    (KeyboardInterrupt(), 130, "interrupted"), (MemoryError("Unable to allocate"), 2, "Unable to allocate"),
    (ValueError("one\ntwo ü\udcff\x1b[2J"), 2, "one two ü\\udcff\\x1b[2J"),
    (RuntimeError("CUDA error"), 2, "CUDA error")])
def test_errors_are_one_line(error, code, line, capsys):
    def run(argv):
        raise error

    assert sampler.one_line_errors(run)([]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("test_faults.py: ") and line in err and err.count("\n") == 1


def test_stdout_that_lacks_characters(folder, monkeypatch, capsys):
    """A pipe on Windows."""
    monkeypatch.chdir(folder)
    for flags in ("--help", "--ckpt tiny.pt --num 1 --out ü→.png"):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
        with contextlib.suppress(SystemExit):
            assert sampler.main(flags.split()) == 0
        sys.stdout.flush()
        assert b"\\u" in sys.stdout.buffer.getvalue()
    (folder / "ü→.png").unlink()
    assert capsys.readouterr().err == ""


def test_a_new_file_has_the_users_mode(tmp_path):
    path, mask = tmp_path / "new.png", os.umask(0)
    os.umask(mask)
    with sampler.whole_file(path) as beside:
        beside.write_bytes(b"new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask and path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_replaced_is_kept_under_another_name(folder, tmp_path, monkeypatch, capsys):
    """As on Windows, while another program has the file open."""
    replace, path = Path.replace, tmp_path / "x.png"
    path.write_bytes(b"old")

    def locked(file: Path, target: Path):
        if Path(target) == path:
            raise PermissionError(13, "Access is denied")
        return replace(file, target)

    monkeypatch.setattr(Path, "replace", locked)
    assert sampler.main(["--ckpt", str(folder / "tiny.pt"), "--num", "1", "--out", str(path)]) == 2
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2
    (kept,) = tmp_path.glob("x-*.png")
    assert f"written is {kept}" in capsys.readouterr().err and Image.open(kept).text["settings"]


# ----------------------------------------------------------------------------------------- what scripts do that succeed


def test_a_link_to_a_file_is_followed(folder, tmp_path, monkeypatch):
    """And what is behind it has the new content, while a longer old one leaves nothing behind."""
    for suffix, run in (("png", "sampler --out"), ("npy", "sampler --num 2 --latents"),
                        ("npz", "many --num 2 --out made --npz")):
        kept, link = tmp_path / f"kept.{suffix}", tmp_path / f"link.{suffix}"
        kept.write_bytes(bytes(10**6))
        link.symlink_to(kept.name)
        monkeypatch.chdir(folder)
        name, *argv = run.split()
        assert SCRIPTS[name].main(["--ckpt", "tiny.pt", *argv, str(link)]) == 0
        assert link.is_symlink() and kept.stat().st_size < 10**5
        assert Image.open(kept).text["settings"] if suffix == "png" else np.load(link) is not None
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize("flags", ["", "--sampler heun --steps 11 --threshold 1 --window 0.9 0.7 0.3",
                                   "--ckpt noise.pt --sampler ddpm --layers 0-2 --beta 1", "--variant query",
                                   "--ckpt latent.pt --heads 4 --vae vae.bin --num 3 --steps 9",
                                   "--uncond --layers 1 --steps 1", "--steps 130 --num 1"])
def test_the_trace_of_any_settings(flags, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    assert trace.main(["--ckpt", "tiny.pt", *flags.split(), "--out", str(tmp_path / "out.png")]) == 0
    picture = Image.open(tmp_path / "out.png")
    assert picture.width < 1400 and json.loads(picture.text["settings"])["emag"] == (3 if "latent" in flags else 2)


# ------------------------------------------------------------------------------------------------ many.py under kills

MANY = "--ckpt tiny.pt --num 24 --batch 3 --steps 3 --out".split()


def fork(run: Callable[[], int]) -> int:
    """The number of a process that runs this and ends with what it returns."""
    pid, code = os.fork(), 1
    if not pid:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = run()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def run_many(*argv, processes: int = 1, times: int = 1, kill_at: int | None = None) -> list[int]:
    """The exit codes of as many processes, all running at once, `times` times; kill_at kills each with that file
    written and not yet renamed."""
    def child(rank: int) -> int:
        os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="192.0.2.1") if processes > 1 else {}
        replace, calls = Path.replace, itertools.count(1)

        def replace_or_die(path: Path, target: Path):
            if next(calls) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(path, target)

        Path.replace = replace_or_die
        return many.main([*MANY, *map(str, argv)])

    return wait([fork(functools.partial(child, rank)) for rank in [*range(processes)] * times])


def wait(processes: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in processes]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(folder) -> dict[str, bytes]:
    """What an undisturbed run leaves."""
    assert many.main([*MANY[:1], str(folder / "tiny.pt"), *MANY[2:], str(folder / "whole")]) == 0
    files = contents(folder / "whole")
    assert len(files) == 25 and len(set(files.values())) == 25
    return files


@pytest.mark.parametrize("processes, kill_at", [(1, 5), (4, 3), (1, 25)])                    # the 25th file is the .npz
def test_killed_runs_go_on_to_the_same_images(processes, kill_at, whole, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    out, npz = tmp_path / "out", tmp_path / "out.npz"
    assert run_many(out, "--npz", npz, processes=processes, kill_at=kill_at) == [-signal.SIGKILL] * processes
    temporary = list(tmp_path.rglob(".*.tmp"))
    killed = {name: content for name, content in contents(out).items() if name in whole}
    # A process that starts when another is dead already removes what that one left.
    assert 1 <= len(temporary) <= processes and len(killed) == 1 + processes * (kill_at - 1)
    assert killed.items() <= whole.items()

    # Images that only seem to be there: cut short, empty, with a changed byte, of another number, seed and size.
    pixels = whole["000012.png"].index(b"IDAT") + 12
    for number, content in {0: whole["000000.png"][:-40], 7: b"", 9: whole["000010.png"],
                            12: whole["000012.png"][:pixels] + b"\0" + whole["000012.png"][pixels + 1:]}.items():
        (out / f"{number:06d}.png").write_bytes(content)
    for number, size, seed in ((10, 8, 1), (11, 16, 0)):
        image, info = Image.open(io.BytesIO(whole[f"{number:06d}.png"])), PngInfo()
        info.add_text("settings", image.text["settings"].replace('"seed": 0', f'"seed": {seed}'))
        image.resize((size, size)).save(out / f"{number:06d}.png", pnginfo=info)
    good = {name: (out / name).stat().st_ctime_ns for name, content in contents(out).items()
            if content == whole.get(name)}
    assert run_many(out, "--npz", npz, processes=processes) == [0] * processes
    assert contents(out) == whole and sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.npz"]
    assert good and all((out / name).stat().st_ctime_ns == when for name, when in good.items())          # kept
    with np.load(npz) as packed:
        images = [np.asarray(Image.open(io.BytesIO(whole[f"{index:06d}.png"]))) for index in range(24)]
        assert list(packed) == ["arr_0"] and np.array_equal(packed["arr_0"], np.stack(images))


def test_two_runs_into_one_folder_do_not_disturb_each_other(whole, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    assert run_many(tmp_path / "out", "--npz", tmp_path / "out.npz", times=3) == [0, 0, 0]
    assert contents(tmp_path / "out") == whole and len(np.load(tmp_path / "out.npz")["arr_0"]) == 24
    assert len(list(tmp_path.iterdir())) == 2


def test_under_torchrun(folder, tmp_path):
    """The bytes are those of one process, which would have as many threads as there are cores. At 64 wide, with 1,000
    tokens, the number of threads changes the rounding."""
    sizes = dict(input_size=32, patch_size=1, hidden_size=64, in_channels=3, learn_sigma=False)
    torch.save(dict(model=weights(**sizes), config=SIZES | sizes, meta=META), tmp_path / "wide.pt")
    argv = ["bench/many.py", "--ckpt", tmp_path / "wide.pt", "--num", 4, "--batch", 2, "--emag", 1, "--out"]
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node=2 --"
    for name, launch, threads in (("two", torchrun, 1), ("one", "", 3)):
        command = [*launch.split(), *argv, tmp_path / name, "--npz", tmp_path / f"{name}.npz"]
        done = subprocess.run([sys.executable, *map(str, command)], cwd=HERE, capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "one") == contents(tmp_path / "two") and len(contents(tmp_path / "one")) == 5
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
