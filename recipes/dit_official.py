"""EMAG in the official DiT code (facebookresearch/DiT), to be run from a checkout of it with emag.py beside it.

Blocks: `model.blocks`; all tokens are image tokens.
CFG: `forward_with_cfg` calls the model once per step on a doubled batch, the conditional half first, and guides the
first three of the four latent channels alone, so that EMAG does too.
Settings: the paper's for DiT-XL/2.
"""
import torch

from emag import Window, guide


def draw(model, diffusion, labels, size=32, scale=3.0, cfg_scale=1.5):
    """Latents (len(labels), 4, size, size). labels: a list of classes; diffusion: what `create_diffusion` gave."""
    weight = model.pos_embed
    noise = torch.randn(len(labels), 4, size, size, device=weight.device, dtype=weight.dtype)
    classes = torch.tensor([*labels, *[model.y_embedder.num_classes] * len(labels)], device=weight.device)
    with torch.no_grad(), guide(model, model.blocks, range(12, 16), scale=scale, steps=diffusion.num_timesteps,
                                cond="first", channels=slice(0, 3), window=Window(0.6, 0.4, 0.2)):
        latents = diffusion.p_sample_loop(
            model.forward_with_cfg, (len(classes), 4, size, size), torch.cat([noise, noise]), clip_denoised=False,
            model_kwargs=dict(y=classes, cfg_scale=cfg_scale), device=weight.device, progress=True)
    return latents[:len(labels)]


if __name__ == "__main__":
    from diffusers import AutoencoderKL
    from diffusion import create_diffusion
    from download import find_model
    from models import DiT_XL_2
    from torchvision.utils import save_image

    model = DiT_XL_2(input_size=32, num_classes=1000).to("cuda").eval()
    model.load_state_dict(find_model("DiT-XL-2-256x256.pt"))
    torch.manual_seed(0)
    latents = draw(model, create_diffusion("250"), labels=[207, 360, 387, 974])
    vae = AutoencoderKL.from_pretrained("stabilityai/sd-vae-ft-ema").to("cuda")
    save_image(vae.decode(latents / 0.18215).sample, "dit.png", normalize=True, value_range=(-1, 1))
