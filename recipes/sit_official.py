"""EMAG in the official SiT code (willisma/SiT), whose checkout must be on Python's path.

Blocks: `model.blocks`; all tokens are image tokens.
CFG: `forward_with_cfg`, as in DiT's code: one call per step, the conditional half first, three of four channels
guided.
Sampler: Euler, which on n + 1 times makes n calls. The default, dopri5, chooses its own steps: nobody knows their
number, and E would average over as many as it happens to need. SDE samplers call the model twice per step with the
same inputs; `guide` counts that as one step and guides both.
Settings: none published for SiT; the candidates of DiT-XL/2, whose network it is, and SD3's window, since it is a
flow.
"""
import torch

from guide import guide


def draw(model, sampler, labels, steps=50, scale=1.5, cfg_scale=1.5):
    """Latents (len(labels), 4, height, width). labels: a list of classes; sampler: transport's `Sampler`."""
    weight = model.pos_embed
    size = model.patch_size * round(weight.shape[1] ** 0.5)
    noise = torch.randn(len(labels), 4, size, size, device=weight.device, dtype=weight.dtype)
    classes = torch.tensor([*labels, *[model.y_embedder.num_classes] * len(labels)], device=weight.device)
    sample = sampler.sample_ode(sampling_method="euler", num_steps=steps + 1)
    with torch.no_grad(), guide(model, model.blocks, range(12, 16), scale=scale, steps=steps, cond="first",
                                channels=slice(0, 3)):
        latents = sample(torch.cat([noise, noise]), model.forward_with_cfg, y=classes, cfg_scale=cfg_scale)[-1]
    return latents[:len(labels)]


def main(args):
    from diffusers import AutoencoderKL
    from download import find_model
    from models import SiT_XL_2
    from torchvision.utils import save_image
    from transport import Sampler, create_transport

    model = SiT_XL_2(input_size=32, num_classes=1000, learn_sigma=True).to(args.device).eval()
    model.load_state_dict(find_model("SiT-XL-2-256x256.pt"))
    torch.manual_seed(args.seed)
    labels = [int(label) for label in args.prompt.split(",")]
    latents = draw(model, Sampler(create_transport()), labels, scale=args.emag)
    vae = AutoencoderKL.from_pretrained("stabilityai/sd-vae-ft-ema").to(args.device)
    save_image(vae.decode(latents / 0.18215).sample, args.out, normalize=True, value_range=(-1, 1))


if __name__ == "__main__":
    from command import command
    command(__doc__, main, out="sit.png", prompt="207,360,387,974")
