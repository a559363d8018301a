"""DiT, the diffusion transformer of Peebles & Xie (arXiv 2212.09748), in one file.

Parameter names and layouts are those of the official checkpoints. The network predicts noise or velocity; which of
the two, and the schedule, belong to the checkpoint and come from `load_dit` as `meta`.
"""
import math
import pickle
from pathlib import Path

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


# -------------------------------------------------------------------------------------------------------- checkpoints


def load_dit(path: str | Path) -> tuple[DiT, dict]:
    """Reads a checkpoint of this project: (model in float32, in eval mode, and its meta).

    meta: prediction ("velocity" or "noise"), class_names, settings (the recommended ones), images_seen.
    Only tensors and plain values are unpickled. Raises ValueError where the file is no such checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path}: no checkpoint, or one with more than tensors and plain values in it: refused unread"
                         ) from None
    except (RuntimeError, EOFError, OSError, KeyError, ValueError):
        raise ValueError(f"{path}: truncated, or not a file that torch.save wrote") from None
    if not isinstance(content, dict) or not {"model", "config", "meta"} <= content.keys():
        raise ValueError(f"{path}: not a checkpoint of this project: need a dict of model, config and meta")
    try:
        model = DiT(**content["config"])
        model.load_state_dict(content["model"])
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: the weights do not fit the configuration: {' '.join(str(error).split())}") from None
    return model.eval().requires_grad_(False), content["meta"]
