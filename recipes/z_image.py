"""EMAG in diffusers' ZImagePipeline. Also image to image, and ZImageOmniPipeline.

Blocks: `layers`, in which image and text tokens attend together, the image tokens first; in Omni text, reference
images, image. The two refiners before them see one kind of token each.
CFG: one call per step on a doubled batch, the conditional half first; the batch is a list of images and a list of
texts, which `guide` cuts like tensors. Z-Image-Turbo, at guidance_scale 0, doubles nothing, and cfg_truncation ends the
doubling in mid-run.
Length: a batch is padded to its longest text, rounded up to 32 tokens. The negative pass is of the conditional half
alone, so its longest text must be as long as the batch's: no negative prompt longer than every prompt.
Settings: none published for Z-Image; SD3's w_e, window and relative depth, blocks 7–10 of 30.
Memory: E is 1.9 GiB or more per candidate and image at 1024²; variant="query" makes it 60 MiB.
"""
import math

from guide import guide


def patches(latents):
    return math.prod(latents.shape[1:]) // 4                           # (channels, frames, height, width), of 2×2


def image_tokens(args, kwargs):
    if args:
        return slice(0, patches(args[0][0]))
    *references, image = map(patches, kwargs["x"][0])                  # Omni's, of the first sample
    start = sum(math.ceil(count / 32) * 32 for count in [*map(len, kwargs["cap_feats"][0]), *references])
    return slice(start, start + image)


def draw(pipe, scale=1.5, variant="map", **inputs):
    """The pipeline's images. inputs: what `pipe` takes, at least a prompt."""
    layers = pipe.transformer.layers
    with guide(pipe.transformer, layers, range(len(layers) // 4, len(layers) * 3 // 8), scale=scale,
               steps=lambda: pipe.num_timesteps, cond="first", variant=variant, image_tokens=image_tokens):
        return pipe(**inputs).images


def main(args):
    import torch
    from diffusers import ZImagePipeline

    pipe = ZImagePipeline.from_pretrained("Tongyi-MAI/Z-Image", torch_dtype=torch.bfloat16).to(args.device)
    draw(pipe, args.emag, prompt=args.prompt, generator=torch.manual_seed(args.seed))[0].save(args.out)


if __name__ == "__main__":
    from command import command
    command(__doc__, main, out="z-image.png")
