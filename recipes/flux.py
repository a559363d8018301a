"""EMAG in diffusers' FluxPipeline: FLUX.1-dev, with and without true CFG.

Blocks: the double-stream blocks, then the single-stream ones, as they run; in both the image tokens are the last.
CFG: FLUX.1-dev has its guidance built in, so that each step is one call and all of it conditional. With a negative
prompt and true_cfg_scale > 1 each step is two calls, the conditional one first.
Settings: none published for Flux; SD3's w_e, window and relative depth, blocks 14–20 of 57.
Memory: E is 1.7 GiB per candidate and image at 1024²; variant="query" makes it 48 MiB.
"""
from emag import guide


def draw(pipe, steps=28, scale=1.5, true_cfg_scale=1.0, height=1024, width=1024, variant="map", **inputs):
    """The pipeline's images. inputs: what else `pipe` takes, at least a prompt, for true CFG a negative_prompt."""
    flux, image_tokens = pipe.transformer, (height // 16) * (width // 16)
    blocks = [*flux.transformer_blocks, *flux.single_transformer_blocks]
    calls, cond = (2, "first") if true_cfg_scale > 1 else (1, "all")
    with guide(flux, blocks, range(len(blocks) // 4, len(blocks) * 3 // 8), scale=scale, steps=steps, calls=calls,
               cond=cond, variant=variant, image_tokens=slice(-image_tokens, None)):
        return pipe(num_inference_steps=steps, true_cfg_scale=true_cfg_scale, height=height, width=width,
                    **inputs).images


if __name__ == "__main__":
    import torch
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16).to("cuda")
    draw(pipe, prompt="a hummingbird at a flower", generator=torch.manual_seed(0))[0].save("flux.png")
    draw(pipe, prompt="a hummingbird at a flower", negative_prompt="blurry", true_cfg_scale=2.0,
         generator=torch.manual_seed(0))[0].save("flux-true-cfg.png")
