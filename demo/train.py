"""Trains the demo checkpoint: a small DiT, class-conditional, on emoji at 32×32 RGB.

    pip install resvg-py            # draws the SVGs; npm fetches them (9 MB, once)
    python demo/train.py --minutes 120                    # writes demo/emoji-flow.pt
    python demo/train.py --minutes 120 --resume           # goes on after an interruption
    python demo/train.py --minutes 60 --predict noise --start demo/emoji-flow.pt      # writes demo/emoji-eps.pt

Rectified flow (velocity): x_t = (1 − t)·x₀ + t·ε, the network predicts v = ε − x₀ at network time 1000·t.
DDPM (noise): x_i = √ᾱ_i·x₀ + √(1−ᾱ_i)·ε on the linear schedule, the network predicts ε at network time i = 0…999.
"""
import argparse
import io
import json
import re
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from dit import DiT, load_dit  # noqa: E402
from sampler import ALPHAS_BAR, TRAIN_STEPS  # noqa: E402

PACKAGES = {"noto": "1.2.9", "twemoji": "1.2.5", "fluent-emoji-flat": "1.2.6", "fxemoji": "1.2.2", "emojione": "1.2.3"}
CLASSES = ["activity", "animal", "flag", "food", "object", "people", "smiley", "symbol", "travel"]
UNFLIPPED = [CLASSES.index("flag"), CLASSES.index("symbol")]       # a mirrored flag or letter is another one
CATEGORIES = {"Activities": "activity", "Animals & Nature": "animal", "Nature": "animal", "Flags": "flag",
              "Food & Drink": "food", "Food": "food", "Objects": "object", "People & Body": "people",
              "Smileys & Emotion": "smiley", "Symbols": "symbol", "Travel & Places": "travel", "Travel": "travel",
              "Places": "travel"}
SKIN_TONE = re.compile(r"skin-tone|-(medium-)?(dark|light)\b|-medium\b")
CONFIG = dict(input_size=32, patch_size=4, in_channels=3, hidden_size=192, depth=12, num_heads=3,
              num_classes=len(CLASSES), learn_sigma=False)
# Chosen by eye and with bench/quality.py: demo/README.md says how.
SETTINGS = dict(cfg=2.5, emag=2.0, layers=[4, 5, 6, 7], beta=0.988, strength=1.0, window=[1.0, 0.8, 0.2])
SAMPLING = {"velocity": dict(sampler="euler", steps=30), "noise": dict(sampler="ddim", steps=50)}


# ---------------------------------------------------------------------------------------------------------- the data

def read_package(name: str, version: str, folder: Path) -> dict:
    """The JSON files of one @iconify-json package, fetched with npm where they are not there yet."""
    archive = folder / f"iconify-json-{name}-{version}.tgz"
    if not archive.exists():
        subprocess.run(["npm", "pack", "--silent", f"@iconify-json/{name}@{version}"], cwd=folder, check=True,
                       stdout=subprocess.DEVNULL)
    with tarfile.open(archive) as tar:
        return {part: json.load(tar.extractfile(f"package/{part}.json")) for part in ("icons", "metadata")}


def category_of(packages: dict) -> dict:
    """Emoji name without hyphens → class. Three packages follow Unicode's categories; two older ones put smileys
    among the people and sports among the objects, so they are looked up by name first."""
    known = {}
    for name in ("noto", "twemoji", "fluent-emoji-flat"):
        for category, names in packages[name]["metadata"]["categories"].items():
            for emoji in names:
                known.setdefault(emoji.replace("-", ""), CATEGORIES[category])
        for alias, target in packages[name]["icons"].get("aliases", {}).items():
            parent = target["parent"].replace("-", "")
            if parent in known:
                known.setdefault(alias.replace("-", ""), known[parent])
    return known


def render(icon: dict, icons: dict) -> np.ndarray:
    """One SVG body on white, drawn at 128×128 and averaged down to (3, 32, 32) uint8."""
    import resvg_py
    width, height = (icon.get(side, icons[side]) for side in ("width", "height"))
    svg = (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
           f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>')
    png = resvg_py.svg_to_bytes(svg_string=svg, width=128, height=128, background="white")
    image = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    canvas = Image.new("RGB", (128, 128), "white")
    canvas.paste(image, ((128 - image.width) // 2, (128 - image.height) // 2))
    return np.asarray(canvas.reduce(4)).transpose(2, 0, 1)


def load_data(folder: Path) -> dict:
    """images (N, 3, 32, 32) uint8, labels (N,), names (N,) and held_out (N,) bool, drawn once and kept in `folder`.

    Held out are all drawings of the same 5% of emoji names, so that nothing held out was seen in another style.
    """
    cache = folder / "emoji.npz"
    if not cache.exists():
        folder.mkdir(parents=True, exist_ok=True)
        packages = {name: read_package(name, version, folder) for name, version in PACKAGES.items()}
        known, images, labels, names = category_of(packages), [], [], []
        for package, parts in packages.items():
            icons = parts["icons"]
            for category, emoji_names in parts["metadata"]["categories"].items():
                for emoji in emoji_names:
                    icon, key = icons["icons"].get(emoji), emoji.replace("-", "")
                    label = known.get(key) or CATEGORIES.get(category)
                    toned = SKIN_TONE.search(emoji) and label in ("people", "activity", None)
                    letter = key.startswith("regionalindicator")
                    if icon is None or icon.get("hidden") or label is None or toned or letter:
                        continue
                    images.append(render(icon, icons))
                    labels.append(CLASSES.index(label))
                    names.append(f"{package}:{emoji}")
        held_out = [zlib.crc32(name.split(":")[1].replace("-", "").encode()) % 20 == 0 for name in names]
        np.savez_compressed(cache, images=np.stack(images), labels=np.array(labels), names=np.array(names),
                            held_out=np.array(held_out))
    return dict(np.load(cache))


def batches(images: np.ndarray, labels: np.ndarray, size: int, seed: int):
    """Endless (x in [−1, 1], y) on the CPU, every image once an epoch, flipped at random where its class allows."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(images))
        for rows in order[:len(order) // size * size].reshape(-1, size):
            x, y = images[rows].astype(np.float32) / 127.5 - 1, labels[rows]
            flip = (rng.random(size) < 0.5) & ~np.isin(y, UNFLIPPED)
            x[flip] = x[flip, :, :, ::-1]
            yield torch.from_numpy(x), torch.from_numpy(y)


# ------------------------------------------------------------------------------------------------------ the training

def draw_velocity(x0: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x_t, network time, target) of the rectified flow, times logit-normal."""
    t = torch.randn(len(x0), device=x0.device).sigmoid()
    at = t[:, None, None, None]
    return (1 - at) * x0 + at * noise, TRAIN_STEPS * t, noise - x0


def draw_noise(x0: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x_i, network time, target) of DDPM, timesteps uniform."""
    i = torch.randint(TRAIN_STEPS, (len(x0),), device=x0.device)
    a = ALPHAS_BAR.to(x0)[i + 1][:, None, None, None]
    return a.sqrt() * x0 + (1 - a).sqrt() * noise, i.float(), noise


def loss_of(net, draw, x0: Tensor, y: Tensor) -> Tensor:
    """Mean squared error, labels dropped with probability 0.1."""
    y = torch.where(torch.rand(len(x0), device=x0.device) < 0.1, CONFIG["num_classes"], y)
    x_t, t, target = draw(x0, torch.randn_like(x0))
    with torch.autocast(x0.device.type, dtype=torch.bfloat16):
        out = net(x_t, t, y)
    return (out.float() - target).square().mean()


def save_checkpoint(path: Path, ema: dict, prediction: str, images_seen: int):
    weights = {name: tensor.half() for name, tensor in ema.items()}
    meta = dict(prediction=prediction, class_names=CLASSES, settings=SETTINGS | SAMPLING[prediction],
                images_seen=images_seen)
    replace(path, dict(model=weights, config=CONFIG, meta=meta))


def replace(path: Path, content):
    """Writes beside the file and renames, so that an interruption leaves the old file whole."""
    beside = path.with_suffix(".tmp")
    torch.save(content, beside)
    beside.replace(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="training time; the learning rate ends at zero")
    parser.add_argument("--resume", action="store_true", help="go on from the last saved state of this run")
    parser.add_argument("--start", type=Path, help="checkpoint whose weights the run starts from, of either prediction")
    parser.add_argument("--predict", choices=["velocity", "noise"], default="velocity")
    parser.add_argument("--out", type=Path, help="default: emoji-flow.pt or emoji-eps.pt beside this script")
    parser.add_argument("--data", type=Path, default=HERE / "data", help="where the emoji are kept")
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--lr", type=float, default=2e-3)
    args = parser.parse_args()
    out = args.out or HERE / {"velocity": "emoji-flow.pt", "noise": "emoji-eps.pt"}[args.predict]
    draw = {"velocity": draw_velocity, "noise": draw_noise}[args.predict]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

    data = load_data(args.data)
    keep = ~data["held_out"]
    net = DiT(**CONFIG).to(device)
    seen = 0
    if args.start:
        start, meta = load_dit(args.start)
        net.load_state_dict(start.state_dict())
        seen = meta["images_seen"]
    ema = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    matrices = [p for name, p in net.named_parameters() if p.ndim == 2 and name.startswith("blocks.")]
    others = [p for p in net.parameters() if p.requires_grad and not any(p is m for m in matrices)]
    optimizers = [torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.99), weight_decay=0)]
    step, elapsed = 0, 0.0
    state_file = out.with_suffix(".state")
    if args.resume:
        state = torch.load(state_file, map_location=device, weights_only=True)
        net.load_state_dict(state["net"])
        ema, step, elapsed, seen = state["ema"], state["step"], state["elapsed"], state["seen"]
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
    stream = batches(data["images"][keep], data["labels"][keep], args.batch, seed=step)
    print(f"{keep.sum()} images to train on, {(~keep).sum()} held out", flush=True)

    compiled = torch.compile(net)
    started, saved_at, running = time.monotonic() - 60 * elapsed, time.monotonic(), None
    while elapsed < args.minutes:
        warmup, remaining = min(1.0, (step + 1) / 200), 1 - elapsed / args.minutes
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * warmup * remaining
        x0, y = (tensor.to(device, non_blocking=True) for tensor in next(stream))
        loss = loss_of(compiled, draw, x0, y)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        # Power-function EMA (Karras et al., arXiv 2312.02696): its width is a fixed share of the run so far.
        decay = (1 - 1 / step) ** 17
        with torch.no_grad():
            for name, tensor in net.state_dict().items():
                ema[name].lerp_(tensor, 1 - decay)
        elapsed = (time.monotonic() - started) / 60
        if step % 50 == 0:
            running = loss.item() if running is None else 0.8 * running + 0.2 * loss.item()
            print(f"step {step}  {elapsed:.1f} min  loss {running:.4f}", flush=True)
        if time.monotonic() - saved_at > 300 or elapsed >= args.minutes:
            saved_at = time.monotonic()
            save_checkpoint(out, ema, args.predict, seen + step * args.batch)
            replace(state_file, dict(net=net.state_dict(), ema=ema, step=step, elapsed=elapsed, seen=seen,
                                     optimizers=[optimizer.state_dict() for optimizer in optimizers]))


if __name__ == "__main__":
    main()
