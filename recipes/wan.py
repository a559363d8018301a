"""EMAG in diffusers' WanPipeline: videos of Wan 2.1 and 2.2.

Blocks: `blocks`; all tokens are video tokens, since the text is only attended to, in a cross-attention that EMAG
leaves alone.
CFG: two calls per step, the conditional one first.
Experts: Wan 2.2 A14B has two transformers, the first for the noisier steps. Each is guided as a trajectory of its own,
since the maps of one network say nothing about the habits of another. Wan 2.1 and Wan 2.2 5B have one.
Settings: none published for Wan; SD3's w_e, window and relative depth.
Memory: a map of 81 frames at 480p has 32,760² entries per head, 4 GiB, so that only an average of the queries can be
held (EMAG-Q): 192 MiB per candidate and video in the 1.3B model, 640 MiB in the 14B ones.
"""
from contextlib import ExitStack

from guide import guide


def draw(pipe, scale=1.5, **inputs):
    """The pipeline's videos. inputs: what `pipe` takes, at least a prompt and a negative_prompt."""
    def noisier():                                        # steps of the first expert
        boundary = (pipe.config.get("boundary_ratio") or 0) * pipe.scheduler.config.num_train_timesteps
        return int((pipe.scheduler.timesteps[-pipe.num_timesteps:] >= boundary).sum())

    def others():
        return pipe.num_timesteps - noisier()

    experts = (pipe.transformer, noisier), (getattr(pipe, "transformer_2", None), others)
    with ExitStack() as stack:
        for expert, steps in experts:
            if expert is not None:
                layers = range(len(expert.blocks) // 4, len(expert.blocks) * 3 // 8)
                stack.enter_context(guide(expert, expert.blocks, layers, scale=scale, steps=steps, calls=2,
                                          cond="first", variant="query"))
        return pipe(**inputs).frames


def main(args):
    import torch
    from diffusers import AutoencoderKLWan, WanPipeline
    from diffusers.utils import export_to_video

    name = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    vae = AutoencoderKLWan.from_pretrained(name, subfolder="vae", torch_dtype=torch.float32)
    pipe = WanPipeline.from_pretrained(name, vae=vae, torch_dtype=torch.bfloat16).to(args.device)
    videos = draw(pipe, args.emag, prompt=args.prompt, negative_prompt="blurred, static, low quality",
                  generator=torch.manual_seed(args.seed))
    export_to_video(videos[0], args.out, fps=16)


if __name__ == "__main__":
    from command import command
    command(__doc__, main, out="wan.mp4")
