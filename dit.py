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
import zipfile
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
    channels are for the variance; else C_out = C.  class_dropout: the last row of the labels is ∅,
    number `null_class`; without, that is None.
    """

    def __init__(self, *, input_size: int = 32, patch_size: int = 2, in_channels: int = 4, hidden_size: int = 1152,
                 depth: int = 28, num_heads: int = 16, num_classes: int = 1000, learn_sigma: bool = True,
                 class_dropout: bool = True):
        super().__init__()
        self.config = dict(input_size=input_size, patch_size=patch_size, in_channels=in_channels,
                           hidden_size=hidden_size, depth=depth, num_heads=num_heads, num_classes=num_classes,
                           learn_sigma=learn_sigma, class_dropout=class_dropout)
        self.patch_size = patch_size
        self.null_class = num_classes if class_dropout else None
        self.x_embedder = named(proj=nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size),
                                tokens=Rearrange("b d h w -> b (h w) d"))
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = named(embedding_table=nn.Embedding(num_classes + class_dropout, hidden_size))
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

SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DIFFUSERS_NAMES = {"pos_embed.proj": "x_embedder.proj", "transformer_blocks.": "blocks.",
                   "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
                   "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
                   "norm1.emb.class_embedder": "y_embedder", "norm1.linear": "adaLN_modulation.1",
                   "attn1.to_q": "attn.qkv", "attn1.to_out.0": "attn.proj", "ff.net.0.proj": "mlp.fc1",
                   "ff.net.2": "mlp.fc2", "proj_out_1": "final_layer.adaLN_modulation.1",
                   "proj_out_2": "final_layer.linear"}


def need(good, message: str):
    if not good:
        raise ValueError(message)


@contextmanager
def naming(file: str | Path, kinds=(ValueError, OSError)):
    """An error of these kinds inside becomes a ValueError of one line that begins with the file's name. Parsers of
    foreign bytes raise all kinds; elsewhere a KeyError is a bug of this project and stays one."""
    try:
        yield
    except kinds as error:
        why = f"{error!s:.400}"
        if type(error) is not ValueError:
            why = f"cannot be read, perhaps truncated ({type(error).__name__}: {why})"
        raise ValueError(" ".join(f"{file}: {why}".split())) from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The file holds the length of its header in 8 bytes, little-endian, then the header, which is JSON, then the bytes
    of the tensors. They are mapped into memory, not copied."""
    data = np.memmap(path, np.uint8, mode="c")
    end = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header, data, tensors = json.loads(data[8:end].tobytes()), data[end:], {}
    header.pop("__metadata__", None)
    for name, entry in header.items():
        need(entry["dtype"] in SAFETENSORS_DTYPES,
             f"{name} has the dtype {entry['dtype']}: need one of {' '.join(SAFETENSORS_DTYPES)}")
        start, stop = entry["data_offsets"]
        tensor = torch.from_numpy(data[start:stop]).view(SAFETENSORS_DTYPES[entry["dtype"]])
        tensors[name] = tensor.reshape(entry["shape"])
    need(sum(tensor.nbytes for tensor in tensors.values()) == len(data), "its tensors overlap, or do not fill the file")
    return tensors


def unpickle(path: Path):
    """What a .pt or .bin file holds: tensors, plain values and argparse.Namespace. Never runs pickled code."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
            need(size <= path.stat().st_size, "compressed, which torch.save never does: refused unread")
            damaged = archive.testzip()                                       # torch.load does not look at the CRC-32
            need(not damaged, f"damaged: {damaged} has not the CRC-32 that it was saved with: download it again")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:                                   # torch's advice is to run the code
        found = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
        raise ValueError(f"holds a {found[1]}, whose loading could run code: if you trust the file, save only `ema`: "
                         "torch.save(torch.load(f, weights_only=False)['ema'], g), or a whole model's .state_dict()"
                         if found else "no checkpoint, or one whose loading could run code: refused unread") from None


def read_checkpoint(path: str | Path) -> tuple[dict, Path]:
    """(What the file holds, the file). Of a diffusers model's folder: the file of weights in it, full ones before a
    variant such as fp16.  Raises ValueError where it cannot be read."""
    path = Path(path)
    with naming(path):
        if path.is_dir():
            files = sorted([*path.glob("*.safetensors"), *path.glob("*.bin")],
                           key=lambda file: (len(file.suffixes), "-of-" in file.name, file.suffix == ".bin", file.name))
            need(files, "a folder without .safetensors or .bin: need a file, or a diffusers transformer/ or vae/")
            path = files[0]
        need(path.is_file(), "no such checkpoint file: need a file, or a diffusers model's folder (from the hub: "
                             "hf download OWNER/NAME --local-dir NAME)")
    with naming(path, Exception):
        need("-of-" not in path.name, "one of several files (sharded): save them as one, "
                                      "from_pretrained(folder).save_pretrained(new_folder, max_shard_size='99GB')")
        with path.open("rb") as file:
            need(not re.match(rb"version https://git-lfs|\s*<(!doctype|html|\?xml)", file.read(64), re.I),
                 "a web page, or a Git LFS pointer: download the file itself, or run git lfs pull")
        content = read_safetensors(path) if path.suffix == ".safetensors" else unpickle(path)
        need(isinstance(content, dict), f"holds a {type(content).__name__}: need a dict")
        return content, path


def clean_state(state) -> dict[str, Tensor]:
    """A state dict without the prefixes of DDP, torch.compile and Lightning, and without REPA's projectors.  Raises
    ValueError where it is none."""
    need(isinstance(state, dict), f"a {type(state).__name__} in the place of the weights: need a dict")
    for name, value in state.items():
        need(not (isinstance(value, dict) and any(isinstance(each, Tensor) for each in value.values())),
             f"its weights lie under {name!r} or another key: pass one on: torch.save(torch.load(f)[{name!r}], g)")
    for name, value in state.items():
        need(isinstance(name, str) and isinstance(value, Tensor) and value.is_floating_point() and value.ndim
             and value.numel() and value.layout == torch.strided and value.device.type == "cpu",
             f"{name!r} names a {getattr(value, 'dtype', type(value))}: need dense floating-point tensors, none empty")
    state = {re.sub(r"^(module\.|_orig_mod\.|model\.)+", "", name): value for name, value in state.items()}
    return {name: value for name, value in state.items() if not name.startswith("projectors.")}


def need_names(state: dict, names: set[str], what: str):
    for name in sorted(names - state.keys()):
        raise ValueError(f"not {what}: it has no {name}, but {', '.join(sorted(state)[:3]) or 'nothing'}")


def from_diffusers(state: dict[str, Tensor], size) -> dict[str, Tensor]:
    """The official layout of a state dict in the diffusers layout, which has three layers for q, k and v, a copy of the
    time and class embedders in every block, and no positional embedding. size: the sample_size of its config.json."""
    official = {}
    for name, tensor in state.items():
        if ".to_k." in name or ".to_v." in name or name == "pos_embed.pos_embed":
            continue
        if ".to_q." in name:             # a part that is missing or misshapen is left out: load_into refuses the rest
            parts = [state.get(name.replace(".to_q.", f".to_{which}.")) for which in "qkv"]
            tensor = torch.cat([part for part in parts if part is not None and part.shape == tensor.shape])
        for theirs, ours in DIFFUSERS_NAMES.items():
            name = name.replace(theirs, ours)
        name = re.sub(r"^blocks\.\d+\.([ty]_embedder)", r"\1", name)
        need(torch.equal(official.setdefault(name, tensor), tensor),
             f"the blocks' copies of {name} differ: this DiT has one for all blocks")
    proj = official["x_embedder.proj.weight"]
    patch = proj.shape[-1]
    need(type(size) is int and size % patch == 0 and 1 <= size // patch <= 256, "config.json has the sample_size "
         f"{size!r:.60}: need a multiple of the patch size {patch}, at most {256 * patch}")
    return official | dict(pos_embed=sincos_pos_embed(len(proj), size // patch))


def config_of(state: dict[str, Tensor], heads: int | None, class_dropout: bool) -> dict:
    """DiT's arguments, read off the shapes of an official state dict. heads: None looks them up in DIT_SIZES.
    class_dropout: whether the last label is ∅."""
    shape = tuple(state["x_embedder.proj.weight"].shape)
    need(len(shape) == 4, f"x_embedder.proj.weight has the shape {shape}: need four dimensions")
    dim, channels, _, patch = shape
    depth = sum(name.endswith(".attn.qkv.weight") for name in state)
    known = {(width, blocks): count for width, blocks, count in DIT_SIZES.values()}
    heads = known.get((dim, depth)) if heads is None else heads
    need(heads is not None, f"{depth} blocks of {dim} channels is none of DiT-S, B, L, XL: pass --heads")
    need(type(heads) is int and heads > 0 and dim % heads == 0,
         f"{heads!r:.60} heads do not divide {dim} channels: need a whole number that does")
    grid, out = math.isqrt(state["pos_embed"].numel() // dim), len(state["final_layer.linear.bias"])
    return dict(input_size=grid * patch, patch_size=patch, in_channels=channels, hidden_size=dim, depth=depth,
                num_heads=heads, num_classes=len(state["y_embedder.embedding_table.weight"]) - class_dropout,
                learn_sigma=out == 2 * channels * patch**2, class_dropout=class_dropout)


def load_into(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """The model with these weights, in float32 and eval mode; ValueError naming the keys that do not fit."""
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    return model.float().eval().requires_grad_(False)


def load_dit(path: str | Path, heads: int | None = None) -> tuple[DiT, dict]:
    """Reads a checkpoint: (model in float32 and eval mode, meta).

    path: this project's own file; an official DiT, SiT or REPA file, bare or from training (then its `ema`); or DiT in
    the diffusers layout, a folder with config.json or a file beside one. heads: needed where the file does not say
    their number and the size is none of DIT_SIZES.
    meta: prediction ("noise" or "velocity"), flow ("rf", "sit" or "repa", the time of a velocity, may be absent),
    class_names (one per class, or none), settings (the recommended ones; may be empty or None), latent (True where x is
    a latent, False where it is grey or RGB in [−1, 1]).
    What an official file does not say is assumed: that it predicts noise, which is wrong for SiT and REPA; that 1 or 3
    channels are pixels; and that the last of several labels is ∅, unless args.num_classes in the file counts it as a
    class: then null_class is None.
    Raises ValueError, one line that names the file, where it is no such checkpoint or has another number of heads.
    """
    content, file = read_checkpoint(path)
    with naming(path):
        match content:
            case {"model": state, "config": dict(config), "meta": dict(meta)}:
                meta = dict(flow="rf", class_names=[], settings={}, latent=False) | meta
            case _:
                state, config, meta = content.get("ema", content), {}, {}
        state = clean_state(state)
        if {"pos_embed.proj.weight", "transformer_blocks.0.attn1.to_q.weight"} <= state.keys():
            beside = file.with_name("config.json")
            need(beside.is_file(), "the diffusers layout has no image size in it: need config.json beside the file")
            with naming(beside.name, Exception):
                config = dict(json.loads(beside.read_bytes()))
            state = from_diffusers(state, config.get("sample_size"))
        labels = "y_embedder.embedding_table.weight"
        need_names(state, {"x_embedder.proj.weight", "pos_embed", labels, "blocks.0.attn.qkv.weight",
                           "final_layer.linear.bias"}, "a DiT checkpoint")
        said = config.get("num_heads", config.get("num_attention_heads"))
        need(None in (heads, said) or heads == said,
             f"--heads {heads}: this checkpoint says {said!r:.60}: leave the flag out")
        rows, given = len(state[labels]), content.get("args")             # of the training script
        classes = given.get("num_classes") if isinstance(given, dict) else getattr(given, "num_classes", None)
        sizes = config_of(state, heads if said is None else said,
                          class_dropout=rows > 1 and classes != rows and config.get("class_dropout") is not False)
        meta = meta or dict(prediction="noise", class_names=[], settings={}, latent=sizes["in_channels"] not in (1, 3))
        names = meta["class_names"]
        need(meta.get("prediction") in ("noise", "velocity") and meta.get("flow", "rf") in ("rf", "sit", "repa")
             and isinstance(names, list) and len(names) in (0, sizes["num_classes"])
             and all(isinstance(name, str) for name in names), f"its meta is {meta!r:.120}: need prediction noise or "
             f"velocity, flow rf, sit or repa, and class_names for {sizes['num_classes']} classes, or none")
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
    with naming(path):
        state = {}
        for name, tensor in clean_state(content).items():
            for old, new in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items():
                name = name.replace(f".attentions.0.{old}.", f".attentions.0.{new}.")
            if name.startswith(("decoder.", "post_quant_conv.")):
                state[name] = tensor
        levels = [f"decoder.up_blocks.{i}.resnets.2.conv2.weight" for i in range(4)]
        need_names(state, {"post_quant_conv.weight", *levels}, "an autoencoder in the diffusers layout")
        latent_channels = len(state["post_quant_conv.weight"])
        need(channels in (None, latent_channels),
             f"decodes latents of {latent_channels} channels, and the DiT samples {channels} channels: "
             "need the autoencoder that the DiT was trained with, or none if it samples RGB")
        with torch.device("meta"):
            decoder = LatentDecoder(tuple(len(state[name]) for name in levels), latent_channels)
        return load_into(decoder, state)


def fingerprint(model: nn.Module) -> str:
    """The first 12 hexadecimal digits of a SHA-256 of a model's weights: their names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:12]
