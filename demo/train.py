"""Trains the demo checkpoint: a small DiT, class-conditional, on emoji at 32×32 RGB.

    pip install resvg-py            # draws the SVGs; npm fetches them (26 MB, once)
    python demo/train.py                                  # writes demo/emoji-flow.pt
    python demo/train.py --minutes 120 --resume           # goes on for two hours after an interruption
    python demo/train.py --predict noise --start demo/emoji-flow.pt --images 500000         # writes demo/emoji-eps.pt

Rectified flow (velocity): x_t = (1 − t)·x₀ + t·ε, the network predicts v = ε − x₀ at network time 1000·t.
DDPM (noise): x_i = √ᾱ_i·x₀ + √(1−ᾱ_i)·ε on the linear schedule, the network predicts ε at network time i = 0…999.
"""
import copy
import importlib.util
import io
import json
import math
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.overrides import TorchFunctionMode

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from dit import DiT, load_dit  # noqa: E402
from sampler import ALPHAS_BAR, TRAIN_STEPS, check_file, need, one_line_errors, plain_parser, whole_file  # noqa: E402

EMOJI = {"noto": "1.2.9", "twemoji": "1.2.5", "fluent-emoji-flat": "1.2.6", "fxemoji": "1.2.2", "emojione": "1.2.3",
         "noto-v1": "1.2.5", "fluent-emoji": "1.2.7", "streamline-emojis": "1.2.4"}
FLAGS = {"circle-flags": "1.2.11", "flag": "1.2.12", "flagpack": "1.2.8", "cif": "1.2.7"}   # named by country code
UNICODE = "emoji.json@16.0.0"                              # Unicode's list of emoji: code points, name, subgroup
# Classes are Unicode's subgroups. One of fewer than 30 drawings joins the one beside it that looks most like it.
MERGED = {"face-glasses": "face-smiling", "face-hat": "face-smiling", "monkey-face": "animal-mammal",
          "animal-amphibian": "animal-reptile", "hand-prop": "hands", "person-resting": "person-activity",
          "hotel": "household", "currency": "other-symbol", "gender": "other-symbol",
          "subdivision-flag": "country-flag"}
# A mirrored flag, letter, sign or clock is another one, or none.
UNFLIPPED = ["country-flag", "flag", "alphanum", "keycap", "arrow", "av-symbol", "math", "punctuation", "other-symbol",
             "religion", "transport-sign", "warning", "zodiac", "emotion", "time", "music", "money", "award-medal",
             "place-map"]
DEFAULT_CLASSES = ["face-smiling", "cat-face", "person-role", "animal-mammal", "plant-flower", "food-fruit",
                   "transport-ground", "time", "country-flag", "heart"]                   # what a grid shows: the range
SKIN_TONE = re.compile("1F3F[B-F]")
CONFIG = dict(input_size=32, patch_size=4, in_channels=3, hidden_size=192, depth=12, num_heads=3, learn_sigma=False)
# Chosen by eye and with bench/quality.py: demo/README.md says how.
SETTINGS = dict(cfg=2.5, emag=2.0, layers=[4, 5, 6, 7], beta=0.988, strength=1.0, window=[1.0, 0.8, 0.2],
                classes=DEFAULT_CLASSES)
SAMPLING = {"velocity": dict(sampler="euler", steps=30), "noise": dict(sampler="ddim", steps=50, emag=1.5)}


# ---------------------------------------------------------------------------------------------------------- the data

def fetch(package: str, folder: Path) -> tarfile.TarFile:
    """A package of the npm registry, name@version, fetched with npm where it is not there yet."""
    archive = folder / (re.sub("[/@]", "-", package).lstrip("-") + ".tgz")
    if not archive.exists():
        need(npm := shutil.which("npm"), f"{archive}: is not there, nor is npm, which fetches it: install npm")
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            done = subprocess.run([npm, "pack", "--silent", package], cwd=beside, capture_output=True, text=True)
            need(done.returncode == 0, f"npm pack {package}: failed: need a network ({done.stderr.strip():.200})")
            (Path(beside) / archive.name).replace(archive)
    return tarfile.open(archive)


def read(archive: tarfile.TarFile, part: str):
    return json.load(archive.extractfile(f"package/{part}.json"))


def key_of(name: str) -> str:
    """Letters and digits alone: packages differ in hyphens, and in how the name of a flag begins."""
    return re.sub("[^a-z0-9]", "", name.lower()).replace("flagfor", "flag")


def code_of(points: str) -> str:
    """Code points joined by hyphens, less the variation selector, in which packages differ."""
    return points.upper().replace(" ", "-").replace("-FE0F", "")


def unicode_emoji(archives: dict, folder: Path) -> tuple[dict, dict]:
    """({key: code}, {code: class}), without skin tones. Keys: Unicode's names, those of the packages for the same code,
    and their aliases."""
    codes, classes = {}, {}
    for emoji in read(fetch(UNICODE, folder), "emoji"):
        code, subgroup = code_of(emoji["codes"]), emoji["subgroup"].replace(" & ", "-")
        if emoji["group"] != "Component" and not SKIN_TONE.search(code):
            classes[code] = MERGED.get(subgroup, subgroup)
            codes.setdefault(key_of(emoji["name"]), code)
    for letter in "abcdefghijklmnopqrstuvwxyz":            # regional indicators, which Unicode does not list alone
        codes[f"letter{letter}"] = country_code(letter)
        classes[country_code(letter)] = "alphanum"
    for archive in archives.values():
        for points, name in read(archive, "chars").items():
            if code_of(points) in classes:
                codes.setdefault(key_of(name), code_of(points))
    for archive in archives.values():
        for alias, target in read(archive, "icons").get("aliases", {}).items():
            alias, name = key_of(alias), key_of(target["parent"])
            if name in codes:
                codes.setdefault(alias, codes[name])
            elif alias in codes:
                codes.setdefault(name, codes[alias])
    return codes, classes


def country_code(letters: str) -> str:
    """The regional indicators that make a country's flag."""
    return "-".join(f"{0x1F1E6 + ord(letter) - ord('a'):X}" for letter in letters)


def render(icon: dict, icons: dict) -> np.ndarray:
    """One SVG body on white, drawn at 128×128 and averaged down to (3, 32, 32) uint8."""
    import resvg_py
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    svg = (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
           f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>')
    png = resvg_py.svg_to_bytes(svg_string=svg, width=128, height=128, background="white")
    image = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    canvas = Image.new("RGB", (128, 128), "white")
    canvas.paste(image, ((128 - image.width) // 2, (128 - image.height) // 2))
    return np.asarray(canvas.reduce(4)).transpose(2, 0, 1)


def near_duplicates(images: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """(N,) bool: training images that, at 16×16, differ by less than 0.03 (root mean square, of 1) from an earlier one,
    or from a held-out one or its mirror image."""
    small = torch.from_numpy(images.reshape(-1, 3, 16, 2, 16, 2).mean((3, 5), dtype=np.float32) / 255)
    reach = 0.03 * small[0].numel() ** 0.5                                            # as a Euclidean distance
    mirrored, small = small.flip(-1).flatten(1)[held_out], small.flatten(1)
    left_out = held_out.copy()                                                        # none of these counts as earlier
    for part in torch.arange(len(images)).split(256):
        reserved = torch.cdist(small[part], torch.cat([small[held_out], mirrored])).amin(1) < reach
        close = (torch.cdist(small[part], small[:part[-1] + 1]) < reach).numpy()
        for i, row, taken in zip(part.tolist(), close, reserved.tolist()):
            left_out[i] |= taken or (row[:i] & ~left_out[:i]).any()
    return left_out & ~held_out


def load_data(folder: Path) -> dict:
    """images (N, 3, 32, 32) uint8, labels (N,), class_names, names (N,), held_out and first (N,) bool, drawn once and
    kept in `folder`.

    first: drawings in the first five packages whose name is among 5% of names, the held-out ones of this project's
    first checkpoints. Held out are all drawings of the same emoji, so that nothing held out was seen in another style.
    """
    cache = folder / "emoji.npz"
    if not cache.exists():
        need(folder.is_dir() or not folder.exists(), f"--data {folder}: is no folder: need one, or a new name")
        folder.mkdir(parents=True, exist_ok=True)
        check_file("--data", cache, ".npz")
        archives = {name: fetch(f"@iconify-json/{name}@{version}", folder)
                    for name, version in (EMOJI | FLAGS).items()}
        need(importlib.util.find_spec("resvg_py"), "resvg_py draws the emoji and is not there: pip install resvg-py")
        codes, classes = unicode_emoji(archives, folder)
        images, code, names = [], [], []
        for package, archive in archives.items():
            icons = read(archive, "icons")
            for name, icon in icons["icons"].items():
                if package in FLAGS:
                    found = country_code(name.removesuffix("-4x3"))
                elif package == "streamline-emojis":                  # numbers an emoji's drawings, names countries
                    key = key_of(re.sub(r"-\d$", "", name))
                    found = codes.get("flag" + key) or codes.get(key)
                else:
                    found = codes.get(key_of(name))
                if found in classes and not icon.get("hidden"):
                    images.append(render(icon, icons))
                    code.append(found)
                    names.append(f"{package}:{name}")
        images, code, package, name = np.stack(images), np.array(code), *np.array([n.split(":") for n in names]).T
        first = np.array([zlib.crc32(n.replace("-", "").encode()) % 20 == 0 for n in name])
        first &= np.isin(package, list(EMOJI)[:5])
        held_out = np.isin(code, code[first])
        keep = ~near_duplicates(images, held_out)
        class_names, labels = np.unique([classes[c] for c in code], return_inverse=True)
        with whole_file(cache) as beside, beside.open("wb") as file:
            np.savez_compressed(file, class_names=class_names, images=images[keep], labels=labels[keep],
                                names=np.array(names)[keep], held_out=held_out[keep], first=first[keep])
    try:
        with np.load(cache) as data:
            return {name: data[name] for name in ("images", "labels", "class_names", "names", "held_out", "first")}
    except Exception as error:                                                        # of a file that may hold anything
        raise ValueError(f"{cache}: cannot be read ({error}): delete it, and it is drawn again") from None


def margins(images: np.ndarray) -> np.ndarray:
    """(N, 2, 2): white columns left and right, white rows at the top and the bottom, at most 2."""
    ink = (images < 250).any(1)                                                       # (N, H, W)
    lines = [ink.any(1), ink.any(1)[:, ::-1], ink.any(2), ink.any(2)[:, ::-1]]
    return np.stack([np.where(line[:, 0], 0, np.where(line[:, 1], 1, 2)) for line in lines], 1).reshape(-1, 2, 2)


def batch_at(step: int, images: np.ndarray, labels: np.ndarray, flipped: np.ndarray, room: np.ndarray, size: int):
    """(x in [−1, 1], y) of a step: every image once an epoch, mirrored at random where its class allows, and moved by
    a pixel or two where nothing but white leaves the picture. It depends on the step alone, so that a run that was
    interrupted goes on as if it had not been."""
    steps = len(images) // size
    rows = np.random.default_rng(step // steps).permutation(len(images))[step % steps * size:][:size]
    rng = np.random.default_rng([step, 1])
    x, y, room = images[rows], labels[rows], room[rows]
    columns, lines = np.clip(np.rint(rng.normal(0, 0.8, (size, 2))).astype(int), -room[:, :, 0], room[:, :, 1]).T
    at = np.arange(32)
    x = np.take_along_axis(x, ((at - lines[:, None]) % 32)[:, None, :, None], 2)
    x = np.take_along_axis(x, ((at - columns[:, None]) % 32)[:, None, None, :], 3)
    flip = (rng.random(size) < 0.5) & flipped[y]
    x[flip] = x[flip, :, :, ::-1]
    return torch.from_numpy(x).float() / 127.5 - 1, torch.from_numpy(y)


# ------------------------------------------------------------------------------------------------------ the training

def velocity_at(x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x_t, network time, target) of the rectified flow at times t in (0, 1)."""
    at = t[:, None, None, None]
    return (1 - at) * x0 + at * noise, TRAIN_STEPS * t, noise - x0


def noise_at(x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x_i, network time, target) of DDPM at i = ⌊1000·t⌋."""
    i = (TRAIN_STEPS * t).long()
    a = ALPHAS_BAR.to(x0)[i + 1][:, None, None, None]
    return a.sqrt() * x0 + (1 - a).sqrt() * noise, i.float(), noise


class PlainAttention(TorchFunctionMode):
    """softmax(QKᵀ/√d)·V as matrix products: at 64 tokens faster on a CPU, backward above all, than the fused kernel."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not torch.nn.functional.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        q, k, v = args
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


@torch.no_grad()
def held_out_loss(net: DiT, at, x0: Tensor, y: Tensor) -> Tensor:
    """(N,): each image's squared error, the mean over t = 0.2, 0.4, 0.6, 0.8, always with the same noise."""
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0)
    losses = []
    for t in (0.2, 0.4, 0.6, 0.8):
        parts = [at(x, n, torch.full((len(x),), t).to(x)) for x, n in zip(x0.split(128), noise.split(128))]
        losses.append(torch.cat([(net(x_t, time, label) - target).square().mean((1, 2, 3))
                                 for (x_t, time, target), label in zip(parts, y.split(128))]))
    return torch.stack(losses).mean(0)


def save_checkpoint(path: Path, ema: dict, prediction: str, images_seen: int, class_names: list[str]):
    weights = {name: tensor.half() for name, tensor in ema.items()}
    meta = dict(prediction=prediction, class_names=class_names, settings=SETTINGS | SAMPLING[prediction],
                images_seen=images_seen)
    save(path, dict(model=weights, config=CONFIG | dict(num_classes=len(class_names)), meta=meta))


def load_state(path: Path, device: str) -> dict:
    """What `save` left of an interrupted run. Raises ValueError where it is not that."""
    need(path.is_file(), f"--resume: {path} is not there: need the --out of an interrupted run")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        return {name: state[name] for name in ("net", "ema", "step", "seen", "optimizers")}
    except Exception as error:                                                        # of a file that may hold anything
        raise ValueError(f"--resume: {path} cannot be read ({error!s:.99}): need an interrupted run's state") from None


def save(path: Path, content):
    with whole_file(path) as beside:
        torch.save(content, beside)


@one_line_errors
def main(argv: Sequence[str] | None):
    parser = plain_parser(__doc__)
    parser.add_argument("--images", type=int, default=3_000_000, help="to train on in all, those of --start included; "
                        "the rate falls over the last 30%% (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop then, for --resume (default: never)")
    parser.add_argument("--resume", action="store_true", help="from the last saved state of this run (default: no)")
    parser.add_argument("--start", type=Path, help="checkpoint whose weights the run starts from, of either prediction "
                        "(default: none)")
    parser.add_argument("--predict", choices=["velocity", "noise"], default="velocity", help="(default: velocity)")
    parser.add_argument("--out", type=Path, help="(default: emoji-flow.pt or emoji-eps.pt beside this script)")
    parser.add_argument("--data", type=Path, default=HERE / "data", help="where emoji are kept (default: demo/data)")
    parser.add_argument("--batch", type=int, default=256, help="images of a step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate (default: %(default)s)")
    args = parser.parse_args(argv)
    out = args.out or HERE / {"velocity": "emoji-flow.pt", "noise": "emoji-eps.pt"}[args.predict]
    at = {"velocity": velocity_at, "noise": noise_at}[args.predict]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    need(args.images > 0, f"--images {args.images}: need a whole number above 0")
    need(args.minutes > 0, f"--minutes {args.minutes}: need a number above 0")
    need(0 < args.lr <= 1, f"--lr {args.lr}: need a number above 0, at most 1")
    need(args.batch > 0, f"--batch {args.batch}: need a whole number above 0")
    state_file = out.with_suffix(".state")
    check_file("--out", out, ".pt")
    check_file("--out", state_file, ".state")
    start = args.start and load_dit(args.start)
    need(not start or start[0].config.items() >= CONFIG.items(),
         f"--start {args.start}: is of another size: need a checkpoint of this script")
    resumed = args.resume and load_state(state_file, device)

    data = load_data(args.data)
    class_names, held_out = data["class_names"].tolist(), data["held_out"]
    images, labels = data["images"][~held_out], data["labels"][~held_out]
    need(args.batch <= len(images), f"--batch {args.batch}: need at most {len(images)}, all images to train on")
    need(hasattr(torch.optim, "Muon"), f"torch {torch.__version__} has no torch.optim.Muon: need 2.9 or later")
    flipped, room = ~np.isin(class_names, UNFLIPPED), margins(images)
    held_out_x0 = torch.from_numpy(data["images"][held_out]).to(device) / 127.5 - 1
    held_out_y = torch.from_numpy(data["labels"][held_out]).to(device)
    first = torch.from_numpy(data["first"][held_out]).to(device)
    print(f"{len(images)} images to train on, {held_out.sum()} held out, {len(class_names)} classes", flush=True)

    net = DiT(**CONFIG, num_classes=len(class_names)).to(device)
    seen = step = 0
    if start:
        start, meta = start
        state, known = start.state_dict(), meta["class_names"]
        # A class that the start does not know begins as its null class, the last row.
        rows = [known.index(name) if name in known else len(known) for name in class_names + [None]]
        state["y_embedder.embedding_table.weight"] = state["y_embedder.embedding_table.weight"][rows]
        net.load_state_dict(state)
        seen = meta.get("images_seen", 0) if meta["prediction"] == args.predict else 0
    ema = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    matrices = [p for name, p in trained.items() if p.ndim == 2 and name.startswith("blocks.")]
    others = [p for name, p in trained.items() if p.ndim != 2 or not name.startswith("blocks.")]
    optimizers = [torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.99), weight_decay=0)]
    if resumed:
        net.load_state_dict(resumed["net"])
        ema, step, seen = resumed["ema"], resumed["step"], resumed["seen"]
        for optimizer, saved in zip(optimizers, resumed["optimizers"]):
            optimizer.load_state_dict(saved)
    need(seen < args.images, f"--images {args.images}: {seen} have been trained on already: give a larger number")

    # The passes run on a bfloat16 copy of the weights; the optimizers and the moving average work on float32.
    fast = copy.deepcopy(net).bfloat16()
    pairs = [(p, dict(fast.named_parameters())[name]) for name, p in trained.items()]
    compiled, average = torch.compile(fast), copy.deepcopy(net).eval()
    started = saved_at = time.monotonic()
    running, finished = None, False
    while not finished:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1, (step + 1) / 200, (1 - seen / args.images) / 0.3)
        torch.manual_seed(step)
        x0, y = (tensor.to(device, non_blocking=True)
                 for tensor in batch_at(step, images, labels, flipped, room, args.batch))
        y = torch.where(torch.rand(len(y), device=device) < 0.1, net.null_class, y)
        t = torch.rand(len(y)) if args.predict == "noise" else torch.randn(len(y)).sigmoid()       # logit-normal
        x_t, network_time, target = at(x0, torch.randn_like(x0), t.to(device))
        with PlainAttention():
            predicted = compiled(x_t.bfloat16(), network_time, y)
        loss = (predicted.float() - target).square().mean()
        loss.backward()
        with torch.no_grad():
            for p, copied in pairs:
                p.grad, copied.grad = copied.grad.float(), None
            for optimizer in optimizers:
                optimizer.step()
            for p, copied in pairs:
                copied.copy_(p)
            step, seen = step + 1, seen + args.batch
            # Power-function EMA (Karras et al., arXiv 2312.02696): its width is a fixed share of the run so far.
            decay = (1 - 1 / step) ** 17
            for name, tensor in net.state_dict().items():
                ema[name].lerp_(tensor, 1 - decay)
        now = time.monotonic()
        finished = seen >= args.images or now - started > 60 * args.minutes
        if step % 50 == 0:
            running = loss.item() if running is None else 0.8 * running + 0.2 * loss.item()
            print(f"step {step}  {seen} images  {(now - started) / 60:.1f} min  loss {running:.4f}", flush=True)
        if seen // 100_000 > (seen - args.batch) // 100_000 or finished:
            average.load_state_dict(ema)
            losses = held_out_loss(average, at, held_out_x0, held_out_y)
            print(f"{seen} images: held-out loss {losses.mean():.4f}, on the first ones {losses[first].mean():.4f}",
                  flush=True)
        if now - saved_at > 300 or finished:
            saved_at = now
            save_checkpoint(out, ema, args.predict, seen, class_names)
            save(state_file, dict(net=net.state_dict(), ema=ema, step=step, seen=seen,
                                  optimizers=[optimizer.state_dict() for optimizer in optimizers]))


if __name__ == "__main__":
    sys.exit(main())
