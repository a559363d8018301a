"""DiT, the diffusion transformer of Peebles & Xie (arXiv 2212.09748), in one file.

Parameter names and layouts are those of the official checkpoints. The network predicts noise or velocity; which of
the two, and the schedule, belong to the checkpoint and come from `load_dit` as `meta`.
"""
import argparse
import json
import math
import pickle
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

# name: hidden size, blocks, heads
DIT_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


def timestep_features(t: Tensor, dim: int = 256, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal features of the network time, cosines first: (B,) → (B, dim)."""
    freqs = torch.exp(-math.log(max_period) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t.float()[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sincos_pos_embed(dim: int, grid: int) -> Tensor:
    """The fixed positional embedding of a grid × grid square of patches: (1, grid², dim); half the channels code the
    column, half the row, sines first."""
    freqs = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * freqs
    code = torch.cat([angles.sin(), angles.cos()], dim=-1)                                    # (grid, dim / 2)
    columns, rows = code.repeat(grid, 1), code.repeat_interleave(grid, 0)
    return torch.cat([columns, rows], dim=-1)[None].float()


class TimestepEmbedder(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_features(t).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)         # the last row is the null class ∅

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, in_channels: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.proj(x), "b d h w -> b (h w) d")


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """A transformer block whose LayerNorms take shift, scale and gate from the condition (adaLN-Zero)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(dim, 4 * dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate_a[:, None] * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m[:, None] * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    def __init__(self, dim: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(dim, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """The network: x (B, C, H, W), t (B,) and a condition y → (B, C_out, H, W).

    input_size: H = W of x, in latent or RGB pixels.  learn_sigma: the output has twice the channels of x, the second
    half for the variance.
    """

    def __init__(self, *, input_size: int = 32, patch_size: int = 2, in_channels: int = 4, hidden_size: int = 1152,
                 depth: int = 28, num_heads: int = 16, num_classes: int = 1000, learn_sigma: bool = True):
        super().__init__()
        self.config = dict(input_size=input_size, patch_size=patch_size, in_channels=in_channels,
                           hidden_size=hidden_size, depth=depth, num_heads=num_heads, num_classes=num_classes,
                           learn_sigma=learn_sigma)
        self.patch_size = patch_size
        self.null_class = num_classes
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.pos_embed = nn.Parameter(sincos_pos_embed(hidden_size, input_size // patch_size), requires_grad=False)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels * (2 if learn_sigma else 1))
        self.initialize()

    def initialize(self):
        """adaLN-Zero: every block starts as the identity and the network's output as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        for zero in [block.adaLN_modulation[1] for block in self.blocks] + [self.final_layer.adaLN_modulation[1],
                                                                              self.final_layer.linear]:
            nn.init.zeros_(zero.weight)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """t: the checkpoint's own network time.  y: labels (B,) or ready condition embeddings (B, D)."""
        grid = x.shape[-2] // self.patch_size
        x = self.x_embedder(x) + self.pos_embed                           # (B, N, D)
        y = y if y.is_floating_point() else self.y_embedder(y)            # (B, D)
        c = self.t_embedder(t) + y                                        # (B, D)
        for block in self.blocks:
            x = block(x, c)                                               # (B, N, D)
        x = self.final_layer(x, c)                                        # (B, N, p·p·C_out)
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)",         # (B, C_out, H, W)
                         h=grid, p=self.patch_size, q=self.patch_size)


# ------------------------------------------------------------------------------------------------- the latent decoder


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int):
        super().__init__()
        self.norm1, self.conv1 = group_norm(channels_in), nn.Conv2d(channels_in, channels, 3, padding=1)
        self.norm2, self.conv2 = group_norm(channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class DecoderAttention(nn.Module):
    """Self-attention of one head over all pixels."""

    def __init__(self, channels: int):
        super().__init__()
        self.group_norm = group_norm(channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        h = rearrange(self.group_norm(x), "b c h w -> b 1 (h w) c")
        h = self.to_out(F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h)))
        return x + rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2])


class Upsampler(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class LatentDecoder(nn.Module):
    """The decoder of Stable Diffusion's autoencoder: latents (B, 4, H, W) as DiT samples them → RGB (B, 3, 8H, 8W).

    Parameter names are those of the diffusers layout. RGB is in about [−1, 1].
    """

    scale = 0.18215                       # latents are divided by their standard deviation over the training images

    def __init__(self, widths: tuple[int, ...] = (512, 512, 256, 128), latent_channels: int = 4):
        super().__init__()
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.decoder = decoder = nn.Module()
        decoder.conv_in = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        decoder.mid_block = nn.Module()
        decoder.mid_block.resnets = nn.ModuleList(ResnetBlock(widths[0], widths[0]) for _ in range(2))
        decoder.mid_block.attentions = nn.ModuleList([DecoderAttention(widths[0])])
        decoder.up_blocks = nn.ModuleList()
        for level, (width_in, width) in enumerate(zip((widths[0], *widths), widths)):
            block = nn.Module()
            block.resnets = nn.ModuleList(ResnetBlock(width_in if i == 0 else width, width) for i in range(3))
            last = level == len(widths) - 1
            block.upsamplers = nn.ModuleList([] if last else [Upsampler(width)])
            decoder.up_blocks.append(block)
        decoder.conv_norm_out = group_norm(widths[-1])
        decoder.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        decoder = self.decoder
        x = decoder.conv_in(self.post_quant_conv(latents / self.scale))                     # (B, 512, H, W)
        first, second = decoder.mid_block.resnets
        x = second(decoder.mid_block.attentions[0](first(x)))                               # (B, 512, H, W)
        for block in decoder.up_blocks:
            for layer in [*block.resnets, *block.upsamplers]:
                x = layer(x)                                                                # (B, 128, 8H, 8W) at last
        return decoder.conv_out(F.silu(decoder.conv_norm_out(x)))                           # (B, 3, 8H, 8W)


# -------------------------------------------------------------------------------------------------------- checkpoints

SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
                      "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
                      "BOOL": torch.bool}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """8 bytes of header length, little-endian, a JSON header, raw tensors: mapped into memory, not copied."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise ValueError(f"{path}: truncated, or not a safetensors file")
        header = json.loads(file.read(length))
    data = np.memmap(path, np.uint8, mode="c", offset=8 + length)
    header.pop("__metadata__", None)
    if any(entry["data_offsets"][1] > len(data) for entry in header.values()):
        raise ValueError(f"{path}: truncated: its header names tensors beyond the end of the file")
    return {name: torch.from_numpy(data[slice(*entry["data_offsets"])]).view(SAFETENSORS_DTYPES[entry["dtype"]])
            .reshape(entry["shape"]) for name, entry in header.items()}


def read_checkpoint(path: str | Path) -> tuple[dict, dict]:
    """(content, config): what a file holds, or the file in a diffusers folder with its config.json, else {}.

    Only tensors, plain values and argparse.Namespace are unpickled. Raises ValueError where the file cannot be read.
    """
    path = Path(path)
    config = path / "config.json"
    if path.is_dir():
        if not config.is_file():
            raise ValueError(f"{path}: a folder without config.json: need a file, or a diffusers model's folder")
        files = [file for pattern in ("*.safetensors", "*.bin") for file in sorted(path.glob(pattern))]
        if not files:
            raise ValueError(f"{path}: no .safetensors or .bin file in this folder")
        return read_checkpoint(files[0])[0], json.loads(config.read_text(encoding="utf-8"))
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint file")
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path), {}
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path}: no checkpoint, or one with more than tensors and plain values in it: refused unread"
                         ) from None
    except (RuntimeError, EOFError, OSError, KeyError, json.JSONDecodeError):
        raise ValueError(f"{path}: truncated, or not a file that torch.save or safetensors wrote") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}: need a state dict")
    return content, {}


def describe(names) -> str:
    """What a state dict with such names looks like, for error lines."""
    names = set(names)
    for sign, kind in (("decoder.conv_in.weight", "an autoencoder (VAE): pass it as --vae"),
                       ("first_stage_model.decoder.conv_in.weight", "a Stable Diffusion checkpoint"),
                       ("conv_in.weight", "a U-Net"), ("context_embedder.weight", "an SD3 or Flux transformer"),
                       ("adaln_single.linear.weight", "a PixArt transformer"), ("optimizer", "training state"),
                       ("opt", "a training checkpoint without ema")):
        if sign in names:
            return f"this looks like {kind}"
    return f"it holds {', '.join(sorted(map(str, names))[:3]) or 'nothing'}"


DIFFUSERS_NAMES = {"pos_embed.proj": "x_embedder.proj", "transformer_blocks.": "blocks.",
                   "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
                   "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
                   "norm1.emb.class_embedder": "y_embedder", "norm1.linear": "adaLN_modulation.1",
                   "attn1.to_q": "attn.qkv", "attn1.to_out.0": "attn.proj", "ff.net.0.proj": "mlp.fc1",
                   "ff.net.2": "mlp.fc2", "proj_out_1": "final_layer.adaLN_modulation.1",
                   "proj_out_2": "final_layer.linear"}


def from_diffusers(state: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    """Official names for the diffusers layout, which keeps q, k, v apart and a copy of the embedders in every block."""
    official = {}
    for name, tensor in state.items():
        if ".to_k." in name or ".to_v." in name or name == "pos_embed.pos_embed":
            continue
        if ".to_q." in name:
            tensor = torch.cat([state[name.replace(".to_q.", f".to_{which}.")] for which in "qkv"])
        for theirs, ours in DIFFUSERS_NAMES.items():
            name = name.replace(theirs, ours)
        name = re.sub(r"^blocks\.\d+\.([ty]_embedder)", r"\1", name)
        if not torch.equal(official.setdefault(name, tensor), tensor):
            raise ValueError(f"the blocks' copies of {name} differ: this DiT has one for all")
    dim, _, _, patch = official["x_embedder.proj.weight"].shape
    official["pos_embed"] = sincos_pos_embed(dim, config["sample_size"] // patch)
    return official


def config_of(state: dict[str, Tensor], heads: int | None) -> dict:
    """DiT's arguments, read off the shapes of an official state dict; heads from the table of sizes where not given."""
    (dim, channels, _, patch), tokens = state["x_embedder.proj.weight"].shape, state["pos_embed"].shape[1]
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    out_channels = len(state["final_layer.linear.bias"]) // patch**2
    known = {(width, blocks): count for width, blocks, count in DIT_SIZES.values()}
    heads = heads or known.get((dim, depth))
    if heads is None:
        raise ValueError(f"{depth} blocks of {dim} channels is none of DiT-S, B, L, XL: pass --heads")
    if dim % heads:
        raise ValueError(f"{heads} heads do not divide {dim} channels")
    return dict(input_size=math.isqrt(tokens) * patch, patch_size=patch, in_channels=channels, hidden_size=dim,
                depth=depth, num_heads=heads, num_classes=len(state["y_embedder.embedding_table.weight"]) - 1,
                learn_sigma=out_channels == 2 * channels)


def load_into(model: nn.Module, state: dict[str, Tensor], path) -> nn.Module:
    """The model with these weights, in float32 and eval mode; ValueError naming the first keys that do not fit."""
    wanted = model.state_dict()
    for what, names in (("missing", wanted.keys() - state.keys()), ("unexpected", state.keys() - wanted.keys()),
                        ("misshapen", [name for name in wanted.keys() & state.keys()
                                       if wanted[name].shape != state[name].shape])):
        if names:
            raise ValueError(f"{path}: {len(names)} {what} keys, first {', '.join(sorted(names)[:3])}; "
                             + describe(state))
    model.load_state_dict(state, assign=True)
    return model.float().eval().requires_grad_(False)


def load_dit(path: str | Path, heads: int | None = None) -> tuple[DiT, dict]:
    """Reads a checkpoint: (model in float32 and eval mode, meta).

    path: this project's file; an official DiT or SiT file, bare or from training (then its `ema`); or DiT in the
    diffusers layout, a folder with config.json or a file beside one. heads: where the size is none of the paper's.
    meta: prediction ("noise" or "velocity"), class_names, settings (recommended, may be empty), latent (whether x is
    one). An official file does not say what it predicts: "noise" is a guess that is right for DiT and wrong for SiT.
    Raises ValueError where the file is no such checkpoint.
    """
    content, config = read_checkpoint(path)
    if {"model", "config", "meta"} <= content.keys():
        try:
            with torch.device("meta"):                    # no memory and no initialisation: the weights replace it all
                model = DiT(**content["config"])
            return load_into(model, content["model"], path), dict(latent=False) | content["meta"]
        except TypeError as error:
            raise ValueError(f"{path}: {error}") from None
    state = content.get("ema", content)
    try:
        if "pos_embed.proj.weight" in state and "transformer_blocks.0.attn1.to_q.weight" in state:
            beside = Path(path).parent / "config.json"
            if not config and beside.is_file():
                config = json.loads(beside.read_text(encoding="utf-8"))
            if not config:
                raise ValueError("the diffusers layout does not hold the image size: need config.json beside the file")
            state, heads = from_diffusers(state, config), heads or config["num_attention_heads"]
        if not {"x_embedder.proj.weight", "pos_embed", "final_layer.linear.bias",
                "y_embedder.embedding_table.weight"} <= state.keys():
            raise ValueError(f"not a DiT checkpoint: {describe(state)}")
        with torch.device("meta"):
            model = DiT(**config_of(state, heads))
    except KeyError as error:
        raise ValueError(f"{path}: {error} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return load_into(model, state, path), dict(prediction="noise", class_names=[], settings={}, latent=True)


def load_decoder(path: str | Path) -> LatentDecoder:
    """Reads Stable Diffusion's decoder from an AutoencoderKL in the diffusers layout, a folder or a file.

    Raises ValueError where it is no such autoencoder.
    """
    content, _ = read_checkpoint(path)
    old_names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    state = {}
    for name, tensor in content.items():
        if name.startswith(("decoder.", "post_quant_conv.")):
            *stem, part, kind = name.split(".")
            part = old_names.get(part, part) if "attentions" in stem else part
            state[".".join([*stem, part, kind])] = tensor
    if "decoder.conv_in.weight" not in state:
        raise ValueError(f"{path}: not an autoencoder in the diffusers layout: {describe(content)}")
    widths = [len(state[f"decoder.up_blocks.{i}.resnets.2.conv2.bias"]) for i in range(4)
              if f"decoder.up_blocks.{i}.resnets.2.conv2.bias" in state]
    with torch.device("meta"):
        decoder = LatentDecoder(tuple(widths), len(state["post_quant_conv.bias"]))
    return load_into(decoder, state, path)
