"""EMAG in diffusers' QwenImagePipeline. Also Qwen-Image-Edit, its Plus version, and Qwen-Image-Layered.

Blocks: `transformer_blocks`; the tokens are text, then the image or its layers, then the reference images of an edit.
CFG: two calls per step, the conditional one first. After CFG the pipeline scales its result to the norm of the
conditional prediction, which with EMAG is that of ε̃'.
Settings: none published for Qwen-Image; SD3's w_e, window and relative depth, blocks 15–21 of 60.
Memory: E of whole maps is 4.3 GiB per candidate and image at 1328², so that the default here is the average of the
queries (EMAG-Q), 81 MiB; variant="map" is EMAG.
"""
import math

from guide import guide


def image_tokens(args, kwargs):
    text, shapes = kwargs["encoder_hidden_states"].shape[1], kwargs["img_shapes"][0]
    shapes = shapes if isinstance(shapes, list) else [shapes]
    images = shapes[:-1] if kwargs.get("additional_t_cond") is not None else shapes[:1]      # after them: references
    return slice(text, text + sum(map(math.prod, images)))


def draw(pipe, scale=1.5, variant="query", **inputs):
    """The pipeline's images. inputs: what `pipe` takes, at least a prompt and a negative_prompt (" " for none)."""
    blocks = pipe.transformer.transformer_blocks
    with guide(pipe.transformer, blocks, range(len(blocks) // 4, len(blocks) * 3 // 8), scale=scale,
               steps=lambda: pipe.num_timesteps, calls=2, cond="first", variant=variant, image_tokens=image_tokens):
        return pipe(**inputs).images


def main(args):
    import torch
    from diffusers import QwenImagePipeline

    pipe = QwenImagePipeline.from_pretrained("Qwen/Qwen-Image", torch_dtype=torch.bfloat16).to(args.device)
    images = draw(pipe, args.emag, prompt=args.prompt, negative_prompt=" ", generator=torch.manual_seed(args.seed))
    images[0].save(args.out)


if __name__ == "__main__":
    from command import command
    command(__doc__, main, out="qwen-image.png")
