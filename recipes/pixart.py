"""EMAG in diffusers' PixArtAlphaPipeline and PixArtSigmaPipeline.

Blocks: `transformer_blocks`; all tokens are image tokens, since the text is only attended to, in a cross-attention
that EMAG leaves alone.
CFG: one call per step on a doubled batch, the conditional half last. The output's last four channels are a variance.
Settings: none published for PixArt; the candidates of DiT-XL/2, whose network it is, and SD3's w_e and window.
"""
from guide import guide


def draw(pipe, scale=1.5, **inputs):
    """The pipeline's images. inputs: what `pipe` takes, at least a prompt."""
    with guide(pipe.transformer, pipe.transformer.transformer_blocks, range(12, 16), scale=scale,
               steps=lambda: len(pipe.scheduler.timesteps), cond="last", channels=slice(0, 4)):
        return pipe(**inputs).images


def main(args):
    import torch
    from diffusers import PixArtAlphaPipeline

    pipe = PixArtAlphaPipeline.from_pretrained("PixArt-alpha/PixArt-XL-2-512x512", torch_dtype=torch.float16)
    pipe.to(args.device)
    draw(pipe, args.emag, prompt=args.prompt, generator=torch.manual_seed(args.seed))[0].save(args.out)


if __name__ == "__main__":
    from command import command
    command(__doc__, main, out="pixart.png")
