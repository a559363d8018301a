"""EMAG as a guider of diffusers, for pipelines that take one: HunyuanImage 2.1, HunyuanVideo 1.5, all modular ones.

A guider asks for the passes of a step by name; each is one call of the model, the conditional one first. This guider
asks for one more, the negative, from the same inputs as the conditional pass.
HunyuanImage 2.1: double-stream, then single-stream blocks; image tokens first. CFG takes the place of its own guider.
HunyuanVideo 1.5: `transformer_blocks`; video tokens first, one per position of the latents; EMAG(variant="query").
Settings: none published; SD3's w_e, window and relative depth, blocks 15–21 of 60.
Memory: E is 2.2 GiB per candidate and image at 2048²; EMAG(variant="query") makes it 56 MiB.
"""
from contextlib import ExitStack

from diffusers import ClassifierFreeGuidance

from emag import EMAG, Window, emag_update


class EMAGGuidance(ClassifierFreeGuidance):
    """diffusers' CFG, of ε̃' instead of ε. Run the pipeline inside `with guider.hooks:`: errors leave no hook then."""
    _input_predictions = ["pred_cond", "pred_negative", "pred_uncond"]

    def __init__(self, emag, scale=1.5, window=Window(), guidance_scale=3.5):
        super().__init__(guidance_scale=guidance_scale)
        self.emag, self.scale, self.window, self.hooks = emag, scale, window, ExitStack()

    def in_window(self, acts):
        return self.scale != 1 and self._step is not None and acts(self._step, self._num_inference_steps)

    @property
    def passes(self):                # name → 0 where it sees the prompt, 1 where it sees the negative prompt
        return {"pred_cond": 0, **({"pred_negative": 0} if self.in_window(self.window.perturbs) else {}),
                **({"pred_uncond": 1} if self._is_cfg_enabled() else {})}

    @property
    def num_conditions(self):
        return len(self.passes)

    def prepare_inputs(self, data):
        return [self._prepare_batch(data, index, name) for name, index in self.passes.items()]

    def prepare_inputs_from_block_state(self, data, input_fields):
        return [self._prepare_batch_from_block_state(input_fields, data, index, name)
                for name, index in self.passes.items()]

    def prepare_models(self, denoiser):
        name = list(self.passes)[self._count_prepared]
        super().prepare_models(denoiser)
        if name == "pred_cond" and self._step == 0:
            self.emag.reset()
        if name == "pred_cond" and self.in_window(self.window.observes):
            self.hooks.enter_context(self.emag.observe())
        if name == "pred_negative":
            self.hooks.enter_context(self.emag.perturb())

    def cleanup_models(self, denoiser):
        self.hooks.close()

    def forward(self, pred_cond, pred_uncond=None, pred_negative=None):
        if pred_negative is not None:
            pred_cond = emag_update(pred_cond, pred_negative, self.scale)
        return super().forward(pred_cond, pred_uncond)


def draw(pipe, steps=50, scale=1.5, guidance_scale=3.5, height=2048, width=2048, variant="map", **inputs):
    """The images of a HunyuanImagePipeline. inputs: what else `pipe` takes, at least a prompt and a negative_prompt."""
    blocks = [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]
    image_tokens = slice(0, (height // pipe.vae_scale_factor) * (width // pipe.vae_scale_factor))
    emag = EMAG(blocks, range(len(blocks) // 4, len(blocks) * 3 // 8), variant=variant, image_tokens=image_tokens)
    own = pipe.guider, pipe.ocr_guider
    pipe.guider = pipe.ocr_guider = EMAGGuidance(emag, scale, guidance_scale=guidance_scale)
    try:
        with pipe.guider.hooks:
            return pipe(num_inference_steps=steps, height=height, width=width, **inputs).images
    finally:
        pipe.guider, pipe.ocr_guider = own


if __name__ == "__main__":
    import torch
    from diffusers import HunyuanImagePipeline

    pipe = HunyuanImagePipeline.from_pretrained("hunyuanvideo-community/HunyuanImage-2.1-Diffusers",
                                                torch_dtype=torch.bfloat16).to("cuda")
    images = draw(pipe, prompt="a hummingbird at a flower", negative_prompt="", generator=torch.manual_seed(0))
    images[0].save("hunyuan-image.png")
