"""EMAG in diffusers' StableDiffusionXLPipeline: a U-Net. Also image to image, IP-Adapter, T2I-Adapter.

Blocks: each `BasicTransformerBlock`, in the order down, mid, up in which they run (`unet.modules()` would give down,
up, mid). Their first attention is of image tokens alone; the text enters in the second, which EMAG leaves alone.
Candidates: the ten in the middle, where PAG acts in SDXL too. All candidates should have one number of tokens: a map
of fewer tokens has larger entries, so that Δ would choose by size.
CFG: one call per step on a doubled batch, the conditional half last.
Settings: none published for a U-Net; SD3's w_e and window.
"""
from diffusers.models.attention import BasicTransformerBlock

from guide import guide


def draw(pipe, scale=1.5, **inputs):
    """The pipeline's images. inputs: what `pipe` takes, at least a prompt."""
    unet = pipe.unet
    down, mid, up = ([block for block in part.modules() if isinstance(block, BasicTransformerBlock)]
                     for part in (unet.down_blocks, unet.mid_block, unet.up_blocks))
    steps = lambda: getattr(pipe, "num_timesteps", None) or len(pipe.scheduler.timesteps)                   # noqa: E731
    with guide(unet, [*down, *mid, *up], range(len(down), len(down) + len(mid)), scale=scale, steps=steps, cond="last"):
        return pipe(**inputs).images


def main(args):
    import torch
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0",
                                                     torch_dtype=torch.float16).to(args.device)
    draw(pipe, args.emag, prompt=args.prompt, generator=torch.manual_seed(args.seed))[0].save(args.out)


if __name__ == "__main__":
    from command import command
    command(__doc__, main, out="sdxl.png")
