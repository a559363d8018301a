"""Draws many images into a folder, 000000.png and on, as evaluations need them; the flags of sampler.py.

    python bench/many.py --num 50000 --out FOLDER --npz FILE.npz
    torchrun --standalone --nproc-per-node=8 -- bench/many.py --num 50000 --out FOLDER --npz FILE.npz

The same command goes on where a run was interrupted, with the same pixels: batch k holds images k·B … k·B + B − 1, no
matter who draws it. An image that is there counts if it is whole and carries the settings of this run. The processes
share nothing but the folder: process r of n draws batches r, r + n, …; then process 0 draws what is still missing.
On a CPU each computes in one thread, since more would round otherwise: there, start as many processes as it has cores.
"""
import dataclasses
import json
import os
import platform
import re
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sampler import (Progress, check_file, make_parser, need, one_line_errors, prepare, sample, save_png,  # noqa: E402
                     to_images, whole_file)


def read_processes() -> tuple[int, int]:
    """(number of this process, number of processes), as torchrun sets RANK and WORLD_SIZE; (0, 1) without them."""
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is size is None:
        return 0, 1
    need(re.fullmatch("[0-9]{1,6} [0-9]{1,6}", f"{rank} {size}") and int(rank) < int(size),
         f"RANK {rank}, WORLD_SIZE {size}: need both, 0 ≤ RANK < WORLD_SIZE, as torchrun sets them, or neither")
    return int(rank), int(size)


def check_folder(folder: Path):
    """Before the sampling: ValueError where images cannot be written there. Removes what killed processes left."""
    if not os.path.isdir(folder):
        need(not os.path.lexists(folder), f"--out {folder}: is no folder: need one, or a new name")
        return check_file("--out", folder, folder.suffix)
    check_file("--out", folder / "000000.png", ".png")
    for file in sorted(folder.iterdir()):
        need(file.is_file() or file.suffix != ".png", f"--out {file}: is no regular file: need another folder")
    remove_leftovers(folder)


def remove_leftovers(folder: Path):
    """Removes temporary files of processes of this machine that have ended, and any that is older than an hour."""
    for file in folder.glob(".*-*-*.tmp"):
        *node, pid, _ = file.name[1:].split("-")
        try:
            if "-".join(node) == platform.node():
                os.kill(int(pid), 0)                                      # asks whether it runs
            ended = time.time() - file.stat().st_mtime > 3600
        except ProcessLookupError:
            ended = True
        except (OSError, ValueError):                                     # another user's process, or a name not ours
            continue
        if ended:
            file.unlink(missing_ok=True)


def claim_folder(folder: Path, settings: dict, make: bool = True):
    """Makes the folder with its settings.json, or checks that they are these; make=False does not make it.

    Raises ValueError where the folder belongs to another run.
    """
    file = folder / "settings.json"
    if not os.path.lexists(file):
        holds = os.path.isdir(folder) and any(not path.match(".*.tmp") for path in folder.iterdir())
        # Asked again, since another process of this run may have begun meanwhile.
        need(not holds or os.path.lexists(file),
             f"--out {folder}: holds files and no settings.json: need an empty folder, or a new name")
        if not make:
            return
        folder.mkdir(exist_ok=True)
        with whole_file(file) as beside:
            beside.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
            try:
                os.link(beside, file)                                     # unlike a renaming, never over another's file
                beside.unlink()
            except FileExistsError:
                beside.unlink()
            except OSError:                                               # no hard links here: it is renamed
                pass
    try:
        found = json.loads(file.read_bytes()) if file.is_file() else None
    except (ValueError, RecursionError):
        found = None
    need(isinstance(found, dict), f"{file}: holds no settings: need the file that a run wrote, or another folder")
    for name in sorted(found.keys() | settings.keys()):
        need(found.get(name) == settings.get(name), f"--out {folder}: made with {name} {found.get(name)!s:.60}, not "
             f"{settings.get(name)!s:.60}: need the same settings to go on, or another folder")


def read_image(file: Path, side: int, settings: dict) -> np.ndarray | None:
    """The pixels (side, side, 3) of a finished image; None where it is missing, damaged, or another run's."""
    if not file.is_file():                                                # a FIFO would have to be waited for
        return None
    try:
        with Image.open(file, formats=["PNG"]) as image:
            image.verify()                                                # the checksums, and not the pixels
        with Image.open(file, formats=["PNG"]) as image:
            fits = image.mode == "RGB" and image.size == (side, side) and json.loads(image.text["settings"]) == settings
            return np.asarray(image) if fits else None
    except Exception:                                                     # whatever is wrong with it, it is drawn again
        return None


def save_npz(path: Path, num: int, side: int, read: Callable[[int], np.ndarray | None]):
    """Packs the images as arr_0, (num, side, side, 3) uint8, as the ADM evaluation suite reads it, one at a time."""
    with whole_file(path) as beside, zipfile.ZipFile(beside, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            header = dict(descr="|u1", fortran_order=False, shape=(num, side, side, 3))
            np.lib.format.write_array_header_1_0(file, header)
            for index in range(num):
                image = read(index)
                need(image is not None, f"image {index} was changed or removed meanwhile: need a second run")
                file.write(image.tobytes())


@one_line_errors
def main(argv: Sequence[str] | None):
    parser, output = make_parser(__doc__)
    output.add_argument("--out", required=True, metavar="FOLDER", help="new, empty, or a run to go on with (needed)")
    output.add_argument("--npz", type=Path, metavar="FILE.npz", help="pack the images as arr_0 as well (default: no)")
    args = parser.parse_args(argv)
    rank, processes = read_processes()
    need(args.num is not None or args.like, "--num: say how many images to draw")
    need(args.out, "--out '': need the name of a folder")
    args.out = Path(args.out)
    if args.npz:
        check_file("--npz", args.npz, ".npz")
        remove_leftovers(args.npz.resolve().parent)
    check_folder(args.out)
    model, meta, decoder, settings, labels = prepare(args)
    torch.set_num_threads(1)
    num, told = settings.num, json.loads(json.dumps(dataclasses.asdict(settings)))
    claim_folder(args.out, told, make=False)
    if rank == 0:
        print(settings, flush=True)

    side = model.config["input_size"] * (2 ** (len(decoder.decoder.up_blocks) - 1) if decoder else 1)
    file_of = lambda index: args.out / f"{index:06d}.png"                                             # noqa: E731
    read = lambda index: read_image(file_of(index), side, told | dict(index=index))                   # noqa: E731
    starts, started, progress = range(0, num, settings.batch), time.monotonic(), Progress(num, settings.steps)
    for start in [*starts[rank::processes], *(starts if rank == 0 and processes > 1 else ())]:
        part = slice(start, start + settings.batch)
        missing = [index for index in range(num)[part] if read(index) is None]
        progress.to_go = (num - start) / processes
        if missing:
            x = sample(model, meta, labels[part], range(num)[part], settings, progress if rank == 0 else None)
            images = to_images(x, decoder)
            claim_folder(args.out, told)
            for index in missing:
                save_png(Image.fromarray(images[index - start]), file_of(index), settings, index=index)
    if rank == 0:
        if args.npz:
            save_npz(args.npz, num, side, read)
        print(f"{args.out}: {num} images, {settings.sampler} {settings.steps} steps, "
              f"{time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    sys.exit(main())
