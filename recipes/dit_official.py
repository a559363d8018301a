"""EMAG in the official DiT code (facebookresearch/DiT), whose checkout must be on Python's path.

Blocks: `model.blocks`; all tokens are image tokens.
CFG: `forward_with_cfg` calls the model once per step on a doubled batch, the conditional half first, and guides the
first three of the four latent channels alone, so that EMAG does too.
Settings: the paper's for DiT-XL/2.
"""
import torch

from guide import Window, guide


def draw(model, diffusion, labels, scale=3.0, cfg_scale=1.5):
    """Latents (len(labels), 4, height, width). labels: a list of classes; diffusion: what `create_diffusion` gave."""
    weight = model.pos_embed
    size = model.patch_size * round(weight.shape[1] ** 0.5)
    noise = torch.randn(len(labels), 4, size, size, device=weight.device, dtype=weight.dtype)
    classes = torch.tensor([*labels, *[model.y_embedder.num_classes] * len(labels)], device=weight.device)
    with torch.no_grad(), guide(model, model.blocks, range(12, 16), scale=scale, steps=diffusion.num_timesteps,
                                cond="first", channels=slice(0, 3), window=Window(0.6, 0.4, 0.2)):
        latents = diffusion.p_sample_loop(
            model.forward_with_cfg, (len(classes), 4, size, size), torch.cat([noise, noise]), clip_denoised=False,
            model_kwargs=dict(y=classes, cfg_scale=cfg_scale), device=weight.device, progress=True)
    return latents[:len(labels)]


def main(args):
    from diffusers import AutoencoderKL
    from diffusion import create_diffusion
    from download import find_model
    from models import DiT_XL_2
    from torchvision.utils import save_image

    model = DiT_XL_2(input_size=32, num_classes=1000).to(args.device).eval()
    model.load_state_dict(find_model("DiT-XL-2-256x256.pt"))
    torch.manual_seed(args.seed)
    latents = draw(model, create_diffusion("250"), [int(label) for label in args.prompt.split(",")], args.emag)
    vae = AutoencoderKL.from_pretrained("stabilityai/sd-vae-ft-ema").to(args.device)
    save_image(vae.decode(latents / 0.18215).sample, args.out, normalize=True, value_range=(-1, 1))


if __name__ == "__main__":
    from command import command
    command(__doc__, main, out="dit.png", emag=3.0, prompt="207,360,387,974")
