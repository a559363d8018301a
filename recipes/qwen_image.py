"""EMAG in diffusers' QwenImagePipeline.

Blocks: `transformer_blocks`; text tokens first, image tokens last.
CFG: two calls per step, the conditional one first. After CFG the pipeline scales its result to the norm of the
conditional prediction, which with EMAG is that of ε̃'.
Settings: none published for Qwen-Image; SD3's w_e, window and relative depth, blocks 15–21 of 60.
Memory: E of whole maps is 4.3 GiB per candidate and image at 1328², so that the default here is the average of the
queries (EMAG-Q), 81 MiB; variant="map" is EMAG.
"""
from emag import guide


def draw(pipe, steps=50, scale=1.5, true_cfg_scale=4.0, height=1328, width=1328, variant="query", **inputs):
    """The pipeline's images. inputs: what else `pipe` takes, at least a prompt and a negative_prompt (" " for none)."""
    blocks = pipe.transformer.transformer_blocks
    image_tokens = (height // 16) * (width // 16)
    with guide(pipe.transformer, blocks, range(len(blocks) // 4, len(blocks) * 3 // 8), scale=scale, steps=steps,
               calls=2, cond="first", variant=variant, image_tokens=slice(-image_tokens, None)):
        return pipe(num_inference_steps=steps, true_cfg_scale=true_cfg_scale, height=height, width=width,
                    **inputs).images


if __name__ == "__main__":
    import torch
    from diffusers import QwenImagePipeline

    pipe = QwenImagePipeline.from_pretrained("Qwen/Qwen-Image", torch_dtype=torch.bfloat16).to("cuda")
    images = draw(pipe, prompt="a hummingbird at a flower", negative_prompt=" ", generator=torch.manual_seed(0))
    images[0].save("qwen-image.png")
