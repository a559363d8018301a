"""EMAG in diffusers' ZImagePipeline.

Blocks: `layers`, in which image and text tokens attend together, the image tokens first. The two refiners before them
see one kind of token each.
CFG: one call per step on a doubled batch, the conditional half first; the batch is a list of images and a list of
texts, which `guide` cuts like tensors. Z-Image-Turbo, at guidance_scale 0, doubles nothing.
Length: a batch is padded to its longest text, rounded up to 32 tokens. The negative pass is of the conditional half
alone, so its longest text must be as long as the batch's: no negative prompt longer than every prompt.
Settings: none published for Z-Image; SD3's w_e, window and relative depth, blocks 7–10 of 30.
Memory: E is 1.9 GiB or more per candidate and image at 1024²; variant="query" makes it 60 MiB.
"""
from emag import guide


def draw(pipe, steps=50, scale=1.5, guidance_scale=4.0, height=1024, width=1024, variant="map", **inputs):
    """The pipeline's images. inputs: what else `pipe` takes, at least a prompt."""
    layers = pipe.transformer.layers
    with guide(pipe.transformer, layers, range(len(layers) // 4, len(layers) * 3 // 8), scale=scale, steps=steps,
               cond="first" if guidance_scale > 0 else "all", variant=variant,
               image_tokens=slice(0, (height // 16) * (width // 16))):
        return pipe(num_inference_steps=steps, guidance_scale=guidance_scale, height=height, width=width,
                    **inputs).images


if __name__ == "__main__":
    import torch
    from diffusers import ZImagePipeline

    pipe = ZImagePipeline.from_pretrained("Tongyi-MAI/Z-Image", torch_dtype=torch.bfloat16).to("cuda")
    draw(pipe, prompt="a hummingbird at a flower", generator=torch.manual_seed(0))[0].save("z-image.png")
