"""DiT, the diffusion transformer of Peebles & Xie (arXiv 2212.09748), in one file.

Parameters have the names and layouts of the official checkpoints. Some checkpoints predict noise, others a velocity:
`load_dit` returns which in `meta`.
"""
import argparse
import hashlib
import json
import math
import pickle
import re
import warnings
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import Tensor

# name: hidden size, blocks, heads
DIT_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


def timestep_features(t: Tensor, dim: int = 256) -> Tensor:
    """Sinusoidal features of the network time, cosines first: (B,) → (B, dim)."""
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t.float()[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sincos_pos_embed(dim: int, grid: int) -> Tensor:
    """The fixed positional embedding of grid × grid patches, row by row: (1, grid², dim). The first half of the
    channels encodes a patch's column, the second half its row; in each half the sines come first."""
    freqs = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * freqs
    code = torch.cat([angles.sin(), angles.cos()], dim=-1)                                    # (grid, dim / 2)
    columns, rows = code.repeat(grid, 1), code.repeat_interleave(grid, 0)
    return torch.cat([columns, rows], dim=-1)[None].float()


def named(**layers: nn.Module) -> nn.Sequential:
    """Layers that run one after the other, with the names that they have in checkpoints."""
    return nn.Sequential(OrderedDict(layers))


class TimestepEmbedder(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_features(t).to(self.mlp[0].weight.dtype))


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """A transformer block with adaLN-Zero: the condition gives shift and scale after each LayerNorm, and a gate for
    what attention and MLP add to x."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = named(fc1=nn.Linear(dim, 4 * dim), gelu=nn.GELU("tanh"), fc2=nn.Linear(4 * dim, dim))
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

    input_size: H = W of x, in pixels of the latent or of the RGB image.  learn_sigma: C_out = 2C, and the second C
    channels are for the variance; else C_out = C.
    """

    def __init__(self, *, input_size: int = 32, patch_size: int = 2, in_channels: int = 4, hidden_size: int = 1152,
                 depth: int = 28, num_heads: int = 16, num_classes: int = 1000, learn_sigma: bool = True):
        super().__init__()
        self.config = dict(input_size=input_size, patch_size=patch_size, in_channels=in_channels,
                           hidden_size=hidden_size, depth=depth, num_heads=num_heads, num_classes=num_classes,
                           learn_sigma=learn_sigma)
        self.patch_size = patch_size
        self.null_class = num_classes
        self.x_embedder = named(proj=nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size),
                                tokens=Rearrange("b d h w -> b (h w) d"))
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = named(embedding_table=nn.Embedding(num_classes + 1, hidden_size))    # last row: ∅
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
        """t: time as in the checkpoint's training, say 0…999.  y: class labels (B,), or class embeddings (B, D)."""
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
    """Self-attention with one head; every pixel is a token."""

    def __init__(self, channels: int):
        super().__init__()
        self.group_norm = group_norm(channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        h = rearrange(self.group_norm(x), "b c h w -> b 1 (h w) c")
        h = self.to_out(F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h)))
        return x + rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2])


class LatentDecoder(nn.Module):
    """The decoder of Stable Diffusion's autoencoder: latents (B, 4, H, W) as DiT samples them → RGB (B, 3, 8H, 8W).

    Parameters have the names of the diffusers layout. RGB lies in about [−1, 1].
    """

    scale = 0.18215                         # DiT's latents: the autoencoder's × this, for a standard deviation near 1

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
            block.upsamplers = nn.ModuleList()
            if level < len(widths) - 1:
                block.upsamplers.append(named(twice=nn.Upsample(scale_factor=2.0, mode="nearest"),
                                              conv=nn.Conv2d(width, width, 3, padding=1)))
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


@contextmanager
def refusing(path: str | Path):
    """Every error inside becomes a ValueError of one line that begins with the file's name, and torch does not warn. A
    plain ValueError raised inside says what is wrong with the content; it need not name the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:                      # a damaged archive, pickle or JSON text raises errors of many kinds
        message = {ValueError: str(error), KeyError: f"{error} is missing",
                   pickle.UnpicklingError: "no checkpoint, or one whose loading could run code: refused unread",
                   }.get(type(error), f"cannot be read, perhaps truncated ({type(error).__name__}: {error})")
        raise ValueError(" ".join(f"{path}: {message[:400]}".splitlines())) from None


def need_dict(value, what: str) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{what} holds a {type(value).__name__}: need a dict")
    return value


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The file holds the length of its header in 8 bytes, little-endian, then the header, which is JSON, then the bytes
    of the tensors. They are mapped into memory, not copied."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise ValueError("truncated, or not a safetensors file")
        header = need_dict(json.loads(file.read(length)), "its header")
    data = np.memmap(path, np.uint8, mode="c")[8 + length:]
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        match entry:
            case {"dtype": str(kind), "shape": [*shape], "data_offsets": [int(start), int(stop)]} if (
                    kind in SAFETENSORS_DTYPES and all(type(n) is int and n >= 0 for n in shape) and start >= 0
                    and stop - start == math.prod(shape) * SAFETENSORS_DTYPES[kind].itemsize):
                if stop > len(data):
                    raise ValueError(f"truncated: {name} ends beyond the end of the file")
                tensors[name] = torch.from_numpy(data[start:stop]).view(SAFETENSORS_DTYPES[kind]).reshape(shape)
            case _:
                raise ValueError(f"its header has {entry!s:.120} for {name}: need one of the dtypes "
                                 f"{' '.join(SAFETENSORS_DTYPES)}, and a shape that fills the data_offsets")
    places = sorted(entry["data_offsets"] for entry in header.values())
    if any(stop > start for (_, stop), (start, _) in zip(places, places[1:])):
        raise ValueError("its header has tensors that overlap: each needs bytes of its own")
    return tensors


def read_config(folder: Path) -> dict:
    with refusing(folder / "config.json"):
        return need_dict(json.loads((folder / "config.json").read_bytes()), "the file")


def read_checkpoint(path: str | Path) -> tuple[dict, dict]:
    """Returns (content, config). Of a file: what it holds, and {}. Of the folder of a diffusers model: what the file of
    weights in it holds, and its config.json.

    Only tensors, plain values and argparse.Namespace are unpickled. Raises ValueError where the file cannot be read.
    """
    path, config = Path(path), {}
    with refusing(path):
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise ValueError("a folder without config.json: need a file, or a diffusers model's folder")
            files = [file for pattern in ("*.safetensors", "*.bin") for file in sorted(path.glob(pattern))]
            if not files:
                raise ValueError("no .safetensors or .bin file in this folder")
            path, config = files[0], read_config(path)
        if not path.is_file():
            raise ValueError("no such checkpoint file")
    with refusing(path):
        if path.suffix == ".safetensors":
            return read_safetensors(path), config
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        return need_dict(content, "the file"), config


def describe(names) -> str:
    """What a checkpoint with these names seems to be, for an error message."""
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


def check_weights(state: dict):
    """Raises ValueError at the first entry of a state dict that cannot be a network's weight."""
    for name, tensor in state.items():
        if not (isinstance(name, str) and isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.ndim
                and tensor.layout == torch.strided and not tensor.is_nested and tensor.device.type == "cpu"
                and 0 < tensor.nbytes <= tensor.untyped_storage().nbytes()):
            kind = f"tensor of {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name!r} names a {kind}: need names of dense floating-point tensors, none empty")


def from_diffusers(state: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    """The official layout of a state dict in the diffusers layout, which has three layers for q, k and v, a copy of the
    time and class embedders in every block, and no positional embedding."""
    check_weights(state)
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
            raise ValueError(f"the blocks' copies of {name} differ: this DiT has one for all blocks")
    proj, size = official["x_embedder.proj.weight"], config.get("sample_size")
    patch = proj.shape[-1]
    if type(size) is not int or size % patch or not 1 <= size // patch <= 256:
        raise ValueError(f"config.json has the sample_size {size!r:.60}: need a multiple of the patch size {patch}, "
                         f"at most {256 * patch}")
    official["pos_embed"] = sincos_pos_embed(len(proj), size // patch)
    return official


def config_of(state: dict[str, Tensor], heads: int | None) -> dict:
    """DiT's arguments, read off the shapes of an official state dict. heads: None looks them up in DIT_SIZES."""
    check_weights(state)
    shape = tuple(state["x_embedder.proj.weight"].shape)
    if len(shape) != 4:
        raise ValueError(f"x_embedder.proj.weight has the shape {shape}: need four dimensions")
    (dim, channels, _, patch), tokens = shape, state["pos_embed"].numel() // shape[0]
    classes = len(state["y_embedder.embedding_table.weight"]) - 1
    out_channels = len(state["final_layer.linear.bias"]) // patch**2
    numbers = [int(found[1]) for name in state if (found := re.match(r"blocks\.(\d{1,9})\.", name))]
    depth = 1 + max(numbers, default=-1)
    if not 0 < depth <= len(numbers):
        raise ValueError(f"{len(numbers)} tensors in {depth} blocks: need at least one block, and ten tensors in each")
    if dim % 4 or tokens != math.isqrt(tokens)**2 or classes < 1:
        raise ValueError(f"{dim} channels, {tokens} tokens and {classes} classes beside the null class: "
                         "need a multiple of 4, a square number and at least 1")
    known = {(width, blocks): count for width, blocks, count in DIT_SIZES.values()}
    heads = known.get((dim, depth)) if heads is None else heads
    if heads is None:
        raise ValueError(f"{depth} blocks of {dim} channels is none of DiT-S, B, L, XL: pass --heads")
    if type(heads) is not int or heads < 1 or dim % heads:
        raise ValueError(f"{heads!r:.60} heads do not divide {dim} channels: need a whole number that does")
    return dict(input_size=math.isqrt(tokens) * patch, patch_size=patch, in_channels=channels, hidden_size=dim,
                depth=depth, num_heads=heads, num_classes=classes, learn_sigma=out_channels == 2 * channels)


def check_own(config: dict, meta: dict, sizes: dict):
    """Raises ValueError where the config of this project's own file differs from the sizes of its weights, or its meta
    is not as `load_dit` describes it."""
    for name in [*sizes, *config]:
        if config.get(name) != sizes.get(name):
            raise ValueError(f"config has the {name} {config.get(name)!r:.60}: its weights need {sizes.get(name)}")
    names, one_line = meta["class_names"], re.compile(r"[^\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
    for name, fits, need in (
            ("prediction", meta["prediction"] in ("noise", "velocity"), "noise or velocity"),
            ("flow", meta["flow"] in ("rf", "sit"), "rf or sit"),
            ("settings", meta["settings"] is None or isinstance(meta["settings"], dict), "a dict or None"),
            ("latent", meta["latent"] is True or meta["latent"] is False and sizes["in_channels"] == 3,
             "True, or False for RGB of 3 channels"),
            ("class_names", names == [] or isinstance(names, list)
             and all(isinstance(each, str) and one_line.fullmatch(each) for each in names)
             and len(names) == len(set(names)) == sizes["num_classes"],
             f"{sizes['num_classes']} different strings, none empty or with a line break, or an empty list")):
        if not fits:
            raise ValueError(f"meta has the {name} {meta[name]!r:.60}: need {need}")


def load_into(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """The model with these weights, in float32 and eval mode; ValueError naming the first keys that do not fit."""
    wanted = model.state_dict()
    for what, names in (("missing", wanted.keys() - state.keys()), ("unexpected", state.keys() - wanted.keys()),
                        ("misshapen", [f"{name} of {tuple(state[name].shape)} for {tuple(wanted[name].shape)}"
                                       for name in wanted.keys() & state.keys()
                                       if wanted[name].shape != state[name].shape])):
        if names:
            raise ValueError(f"{len(names)} {what} keys, first {', '.join(sorted(names)[:3])}")
    model.load_state_dict(state, assign=True)
    return model.float().eval().requires_grad_(False)


def load_dit(path: str | Path, heads: int | None = None) -> tuple[DiT, dict]:
    """Reads a checkpoint: (model in float32 and eval mode, meta).

    path: this project's own file; an official DiT or SiT file, bare or from training (then its `ema`); or DiT in the
    diffusers layout, a folder with config.json or a file beside one. heads: needed where the file does not say their
    number and the size is none of DIT_SIZES.
    meta: prediction ("noise" or "velocity"), flow ("rf" or "sit", the time of a velocity, may be absent), class_names
    (one per class, or none), settings (the recommended ones; may be empty or None), latent (True where x is a latent,
    False where it is RGB). An official file does not say what it predicts: "noise" is a guess, right for DiT and wrong
    for SiT.
    Raises ValueError, one line that names the file, where it is no such checkpoint or has another number of heads.
    """
    content, config = read_checkpoint(path)
    with refusing(path):
        own = {"model", "config", "meta"} <= content.keys()
        if own:
            state, config, meta = (need_dict(content[name], name) for name in ("model", "config", "meta"))
            meta = dict(prediction=None, flow="rf", class_names=[], settings={}, latent=False) | meta
        else:
            state = need_dict(content.get("ema", content), "ema")
            meta = dict(prediction="noise", class_names=[], settings={}, latent=True)
        if {"pos_embed.proj.weight", "transformer_blocks.0.attn1.to_q.weight"} <= state.keys():
            beside = Path(path).parent / "config.json"
            if not config and not beside.is_file():
                raise ValueError("the diffusers layout does not hold the image size: need config.json beside the file")
            config = config or read_config(beside.parent)
            state = from_diffusers(state, config)
        if not {"x_embedder.proj.weight", "pos_embed", "final_layer.linear.bias",
                "y_embedder.embedding_table.weight"} <= state.keys():
            raise ValueError(f"not a DiT checkpoint: {describe(state)}")
        said = config.get("num_heads" if own else "num_attention_heads")
        if None not in (heads, said) and heads != said:
            raise ValueError(f"--heads {heads}: this checkpoint says {said!r:.60}: leave the flag out")
        sizes = config_of(state, heads if said is None else said)
        if own:
            check_own(config, meta, sizes)
        with torch.device("meta"):                        # takes no memory: the file's weights replace all parameters
            model = DiT(**sizes)
        return load_into(model, state), meta


def load_decoder(path: str | Path, channels: int | None = None) -> LatentDecoder:
    """Reads Stable Diffusion's decoder from an AutoencoderKL in the diffusers layout, a folder or a file.

    channels: what a latent of the DiT has, its in_channels; None leaves that unchecked.
    Raises ValueError, one line that names the file, where it is no such autoencoder or decodes another number of
    channels.
    """
    content, _ = read_checkpoint(path)
    old_names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    with refusing(path):
        state = {}
        for name, tensor in content.items():
            if str(name).startswith(("decoder.", "post_quant_conv.")):
                *stem, part, kind = name.split(".")
                part = old_names.get(part, part) if "attentions" in stem else part
                state[".".join([*stem, part, kind])] = tensor
        if "decoder.conv_in.weight" not in state:
            raise ValueError(f"not an autoencoder in the diffusers layout: {describe(content)}")
        check_weights(state)
        latent_channels = len(state["post_quant_conv.weight"])
        if channels not in (None, latent_channels):
            raise ValueError(f"decodes latents of {latent_channels} channels, and the DiT samples {channels} channels: "
                             "need the autoencoder that the DiT was trained with, or none if it samples RGB")
        widths = [len(state[f"decoder.up_blocks.{i}.resnets.2.conv2.weight"]) for i in range(4)]
        if any(width % 32 for width in widths):
            raise ValueError(f"its levels have {widths} channels: need multiples of 32, the groups of GroupNorm")
        with torch.device("meta"):
            decoder = LatentDecoder(tuple(widths), latent_channels)
        return load_into(decoder, state)


def fingerprint(model: nn.Module) -> str:
    """The first 12 hexadecimal digits of a SHA-256 of a model's weights: their names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:12]
