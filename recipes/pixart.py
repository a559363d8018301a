"""EMAG in diffusers' PixArtAlphaPipeline and PixArtSigmaPipeline.

Blocks: `transformer_blocks`; all tokens are image tokens, since the text is only attended to, in a cross-attention
that EMAG leaves alone.
CFG: one call per step on a doubled batch, the conditional half last. The output's last four channels are a variance.
Settings: none published for PixArt; the candidates of DiT-XL/2, whose network it is, and SD3's w_e and window.
"""
from emag import guide


def draw(pipe, steps=20, scale=1.5, guidance_scale=4.5, **inputs):
    """The pipeline's images. inputs: what else `pipe` takes, at least a prompt."""
    with guide(pipe.transformer, pipe.transformer.transformer_blocks, range(12, 16), scale=scale, steps=steps,
               cond="last", channels=slice(0, 4)):
        return pipe(num_inference_steps=steps, guidance_scale=guidance_scale, **inputs).images


if __name__ == "__main__":
    import torch
    from diffusers import PixArtAlphaPipeline

    pipe = PixArtAlphaPipeline.from_pretrained("PixArt-alpha/PixArt-XL-2-512x512", torch_dtype=torch.float16).to("cuda")
    draw(pipe, prompt="a hummingbird at a flower", generator=torch.manual_seed(0))[0].save("pixart.png")
