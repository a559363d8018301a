"""EMAG in diffusers' DiTPipeline.

Blocks: `transformer_blocks`; all tokens are image tokens.
CFG: one call per step on a doubled batch, the conditional half first. The output's last four channels are a variance.
Settings: the paper's for DiT-XL/2.
"""
from guide import Window, guide


def draw(pipe, labels, scale=3.0, num_inference_steps=250, guidance_scale=1.5, **inputs):
    """The pipeline's images. labels: a list of classes; inputs: what else `pipe` takes."""
    with guide(pipe.transformer, pipe.transformer.transformer_blocks, range(12, 16), scale=scale,
               steps=lambda: len(pipe.scheduler.timesteps), cond="first", channels=slice(0, 4),
               window=Window(0.6, 0.4, 0.2)):
        return pipe(labels, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, **inputs).images


def main(args):
    import torch
    from diffusers import DiTPipeline

    pipe = DiTPipeline.from_pretrained("facebook/DiT-XL-2-256").to(args.device)
    draw(pipe, [int(args.prompt)], args.emag, generator=torch.manual_seed(args.seed))[0].save(args.out)


if __name__ == "__main__":
    from command import command
    command(__doc__, main, out="dit.png", emag=3.0, prompt="207")
