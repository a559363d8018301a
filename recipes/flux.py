"""EMAG in diffusers' FluxPipeline: FLUX.1-dev, with and without true CFG. Also Kontext, image to image and
IP-Adapter.

Blocks: the double-stream blocks, then the single-stream ones, as they run; in both the tokens are text, then the
image, then Kontext's reference image.
CFG: FLUX.1-dev has its guidance built in, so that each step is one call and all of it conditional. With a negative
prompt and true_cfg_scale > 1 each step is two calls, the conditional one first.
Settings: none published for Flux; SD3's w_e, window and relative depth, blocks 14–20 of 57.
Memory: E is 1.7 GiB per candidate and image at 1024²; variant="query" makes it 48 MiB.
"""
from guide import guide


def image_tokens(args, kwargs):
    """Those whose first coordinate is 0: it is 1 for a reference image."""
    text, image = kwargs["encoder_hidden_states"].shape[1], int((kwargs["img_ids"][..., 0] == 0).sum())
    return slice(text, text + image)


def draw(pipe, scale=1.5, variant="map", **inputs):
    """The pipeline's images. inputs: what `pipe` takes, at least a prompt, for true CFG a negative_prompt."""
    flux = pipe.transformer
    blocks = [*flux.transformer_blocks, *flux.single_transformer_blocks]
    with guide(flux, blocks, range(len(blocks) // 4, len(blocks) * 3 // 8), scale=scale,
               steps=lambda: pipe.num_timesteps, calls=2, cond="first", variant=variant, image_tokens=image_tokens):
        return pipe(**inputs).images


def main(args):
    import torch
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16).to(args.device)
    draw(pipe, args.emag, prompt=args.prompt, generator=torch.manual_seed(args.seed))[0].save(args.out)


if __name__ == "__main__":
    from command import command
    command(__doc__, main, out="flux.png")
