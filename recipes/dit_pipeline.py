"""EMAG in diffusers' DiTPipeline.

Blocks: `transformer_blocks`; all tokens are image tokens.
CFG: one call per step on a doubled batch, the conditional half first. The output's last four channels are a variance.
Settings: the paper's for DiT-XL/2.
"""
from emag import Window, guide


def draw(pipe, labels, steps=250, scale=3.0, guidance_scale=1.5, **inputs):
    """The pipeline's images. labels: a list of classes; inputs: what else `pipe` takes."""
    with guide(pipe.transformer, pipe.transformer.transformer_blocks, range(12, 16), scale=scale, steps=steps,
               cond="first", channels=slice(0, 4), window=Window(0.6, 0.4, 0.2)):
        return pipe(labels, num_inference_steps=steps, guidance_scale=guidance_scale, **inputs).images


if __name__ == "__main__":
    import torch
    from diffusers import DiTPipeline

    pipe = DiTPipeline.from_pretrained("facebook/DiT-XL-2-256").to("cuda")
    for number, image in enumerate(draw(pipe, [207, 360, 387, 974], generator=torch.manual_seed(0))):
        image.save(f"dit-{number}.png")
