"""EMAG in diffusers' StableDiffusionXLPipeline: a U-Net.

Blocks: each `BasicTransformerBlock`, in the order down, mid, up in which they run (`unet.modules()` would give down,
up, mid). Their first attention is of image tokens alone; the text enters in the second, which EMAG leaves alone.
Candidates: the ten in the middle, where PAG acts in SDXL too. All candidates should have one number of tokens: a map
of fewer tokens has larger entries, so that Δ would choose by size.
CFG: one call per step on a doubled batch, the conditional half last.
Settings: none published for a U-Net; SD3's w_e and window.
"""
from diffusers.models.attention import BasicTransformerBlock

from emag import guide


def draw(pipe, steps=50, scale=1.5, guidance_scale=5.0, **inputs):
    """The pipeline's images. inputs: what else `pipe` takes, at least a prompt."""
    unet = pipe.unet
    down, mid, up = ([block for block in part.modules() if isinstance(block, BasicTransformerBlock)]
                     for part in (unet.down_blocks, unet.mid_block, unet.up_blocks))
    with guide(unet, [*down, *mid, *up], range(len(down), len(down) + len(mid)), scale=scale, steps=steps, cond="last"):
        return pipe(num_inference_steps=steps, guidance_scale=guidance_scale, **inputs).images


if __name__ == "__main__":
    import torch
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0",
                                                     torch_dtype=torch.float16).to("cuda")
    draw(pipe, prompt="a hummingbird at a flower", generator=torch.manual_seed(0))[0].save("sdxl.png")
