"""EMAG in diffusers' StableDiffusion3Pipeline: SD3-Medium, the paper's main setting, and SD3.5.

Blocks: `transformer_blocks`; image and text tokens attend together, the image tokens first. The second attention in
the first blocks of SD3.5-Medium, of image tokens alone, is left as it is.
CFG: one call per step on a doubled batch, the conditional half last.
Settings: the paper's for SD3-Medium (candidates 6–8 of 24 blocks, w 7). SD3.5 has none published: the same relative
depth.
Memory: E is 1.6 GiB per candidate and image at 1024²; variant="query" makes it 24 MiB.
"""
from emag import guide


def draw(pipe, steps=28, scale=1.5, guidance_scale=7.0, height=1024, width=1024, variant="map", **inputs):
    """The pipeline's images. inputs: what else `pipe` takes, at least a prompt."""
    blocks = pipe.transformer.transformer_blocks
    with guide(pipe.transformer, blocks, range(len(blocks) // 4, len(blocks) * 3 // 8), scale=scale, steps=steps,
               cond="last", variant=variant, image_tokens=slice(0, (height // 16) * (width // 16))):
        return pipe(num_inference_steps=steps, guidance_scale=guidance_scale, height=height, width=width,
                    **inputs).images


if __name__ == "__main__":
    import torch
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained("stabilityai/stable-diffusion-3-medium-diffusers",
                                                    torch_dtype=torch.float16).to("cuda")
    draw(pipe, prompt="a hummingbird at a flower", generator=torch.manual_seed(0))[0].save("sd3.png")
