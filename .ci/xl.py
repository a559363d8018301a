"""DiT-XL/2 and Stable Diffusion's decoder at full size with random weights, through the command line, at 256²."""
import resource
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sampler  # noqa: E402
from dit import DiT, LatentDecoder  # noqa: E402

with tempfile.TemporaryDirectory() as folder:
    for name, model in (("dit.pt", DiT()), ("vae.bin", LatentDecoder())):
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
        torch.save(model.state_dict(), f"{folder}/{name}")
    del model
    common = ["--ckpt", f"{folder}/dit.pt", "--steps", "5", "--classes", "207,360", "--num", "2", "--device", "cpu"]
    for dtype in ("float32", "bfloat16"):
        assert sampler.main([*common, "--dtype", dtype, "--latents", f"{folder}/z.npy"]) == 0
        latents = np.load(f"{folder}/z.npy")
        assert latents.shape == (2, 4, 32, 32) and np.isfinite(latents).all() and latents.std() > 0, dtype
    assert sampler.main([*common, "--vae", f"{folder}/vae.bin", "--out", f"{folder}/grid.png"]) == 0
    assert Image.open(f"{folder}/grid.png").height > 2 * 256
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"DiT-XL/2 at 256²: finite in float32 and bfloat16, {peak:.1f} GiB at the peak")
    assert peak < 24
