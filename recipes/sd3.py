"""EMAG in diffusers' StableDiffusion3Pipeline: SD3-Medium, the paper's main setting, and SD3.5. Also image to image,
inpainting, ControlNet and skip-layer guidance.

Blocks: `transformer_blocks`; image and text tokens attend together, the image tokens first. The second attention in
the first blocks of SD3.5-Medium, of image tokens alone, is left as it is.
CFG: one call per step on a doubled batch, the conditional half last.
Settings: the paper's for SD3-Medium (candidates 6–8 of 24 blocks, w 7, 28 steps, the last two the pipeline's own
defaults). SD3.5 has none published: the same relative depth.
Memory: E is 1.6 GiB per candidate and image at 1024²; variant="query" makes it 24 MiB.
"""
from guide import guide


def draw(pipe, scale=1.5, variant="map", **inputs):
    """The pipeline's images. inputs: what `pipe` takes, at least a prompt."""
    model, blocks = pipe.transformer, pipe.transformer.transformer_blocks

    def image_tokens(args, kwargs):
        height, width = kwargs["hidden_states"].shape[-2:]
        return slice(0, height * width // model.config.patch_size ** 2)

    with guide(model, blocks, range(len(blocks) // 4, len(blocks) * 3 // 8), scale=scale,
               steps=lambda: pipe.num_timesteps, cond="last", variant=variant, image_tokens=image_tokens):
        return pipe(**inputs).images


def main(args):
    import torch
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained("stabilityai/stable-diffusion-3-medium-diffusers",
                                                    torch_dtype=torch.float16).to(args.device)
    draw(pipe, args.emag, prompt=args.prompt, generator=torch.manual_seed(args.seed))[0].save(args.out)


if __name__ == "__main__":
    from command import command
    command(__doc__, main, out="sd3.png")
