"""Does EMAG raise human preference on Stable Diffusion 3? The paper's main claim, on one GPU, with every image kept.

    pip install diffusers transformers accelerate sentencepiece protobuf
    python bench/hps.py draw  --out FOLDER --prompts PartiPrompts.tsv --num 200      # stopped, it goes on
    pip install open_clip_torch torchvision
    python bench/hps.py score --out FOLDER --hps21 --pick                            # weights from the hub, or a FILE
    python bench/hps.py table --out FOLDER

draw: one PNG per prompt and method, FOLDER/METHOD/000000.png, with its settings and ω_t in its text chunks. Prompt i
starts from the same noise in every method. Several processes share the folder:
`torchrun --standalone --nproc-per-node=8 -- bench/hps.py draw …`. Memory for one 1024² image in float16, estimated:
17 GiB for CFG and EMAG-Q, 23 GiB for EMAG, and for each further image of a --batch 6 GiB more; --offload needs 12 GiB
less, and more time.
score: a JSON beside each PNG. Scores that are there stay, so another scorer can be added later, from another
environment. All are 100 times the cosine of image and prompt.
table: means; differences to CFG, and to CFG at EMAG's own strength ω, paired by prompt, with 95% intervals of a
bootstrap over prompts; the share of prompts won. Also as table.csv, table.md, and sheet.png, a few prompts by number.

Prompts: PartiPrompts.tsv (github.com/google-research/parti, Apache 2.0), COCO's captions_val2014.json (of each image
the first), or a text file with one prompt per line. Licences of the weights: SD3-Medium's is Stability's community
licence, HPS v2's Apache 2.0, PickScore's and CLIP's MIT.
"""
import argparse
import csv
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "recipes"), str(ROOT / "bench")]
from emag import EMAG, Window, cfg_update  # noqa: E402
from guide import guide  # noqa: E402
from many import check_folder, claim_folder, read_image, read_processes, remove_leftovers  # noqa: E402
from sampler import APG, CADS, SampleNoise, need, one_line_errors, whole_file  # noqa: E402

# The paper's scales for CFG and EMAG; for APG and CADS those of the authors' public pipeline.
W, W_E = 7.0, 1.5
APG_SETTINGS = dict(scale=12.0, eta=0.0, norm=7.5, momentum=-0.5)          # its scale takes the place of w
CADS_SETTINGS = dict(tau1=0.6, tau2=1.0, s=0.25, psi=1.0)
SKIP = dict(skip_guidance_layers=[7, 8, 9], skip_layer_guidance_scale=2.8, skip_layer_guidance_start=0.01,
            skip_layer_guidance_stop=0.2)                                  # Stability's for SD3.5-Medium

# Method → what `draw` is given. of: EMAG's ω_t on the same prompt in the place of w, or its mean over the steps.
METHODS = {
    "CFG": {},
    "EMAG": dict(scale=W_E), "EMAG-I": dict(scale=W_E, variant="image"), "EMAG-Q": dict(scale=W_E, variant="query"),
    "APG": dict(apg=APG_SETTINGS), "CADS": dict(cads=CADS_SETTINGS),
    "EMAG + APG": dict(scale=W_E, apg=APG_SETTINGS), "EMAG + CADS": dict(scale=W_E, cads=CADS_SETTINGS),
    "EMAG-Q + APG": dict(scale=W_E, variant="query", apg=APG_SETTINGS),
    "EMAG-Q + CADS": dict(scale=W_E, variant="query", cads=CADS_SETTINGS),
    "CFG at ω": dict(of="mean"), "CFG at ω_t": dict(of="each"),            # matched strength
    "CFG 5": dict(w=5.0), "CFG 9": dict(w=9.0),
    "CFG 9 in window": dict(inside=9.0), "CFG 11 in window": dict(inside=11.0),
    "PAG": dict(scale=W_E, negative="PAG"), "SEG": dict(scale=W_E, negative="SEG"),
    "skip layers": dict(skip=SKIP)}

# ------------------------------------------------------------------------------------------------- drawing one batch


def draw(pipe, prompts: Sequence[str], seed: int, indices: Sequence[int], size: int, steps: int, *, w: float = W,
         scale: float = 1.0, variant: str = "map", negative: str | None = None, apg: dict | None = None,
         cads: dict | None = None, scales: Tensor | None = None, skip: dict | None = None,
         ) -> tuple[list[Image.Image], list[list[float]]]:
    """The images of one method, and of each its effective strength ω_t = ‖ε̃ − ε_∅‖ / ‖ε − ε_∅‖ at each step.

    indices: numbers of the prompts, which with the seed give their noise.  w, scale: CFG's w; w_e, 1 is off.
    negative: "PAG" or "SEG" in the place of EMAG's, in the block that EMAG selects.  apg, cads: as for `sampler.apg`,
    whose scale takes the place of w, and for `sampler.cads`.  scales: (steps, B), a w for each step and sample.
    skip: the pipeline's own skip-layer guidance, which ω_t leaves out.
    """
    model, blocks, batch = pipe.transformer, pipe.transformer.transformer_blocks, len(prompts)
    half, omega, lengths = slice(batch, None), [], []
    noise = SampleNoise(seed, indices)
    noisy_text, noisy_pooled = (CADS(noise, **cads) for _ in range(2)) if cads else (None, None)
    formula = None                                                         # the pipeline's own
    if apg:
        formula = APG("velocity", **apg)
    elif scales is not None:
        formula = lambda pred, null, x, t, update: cfg_update(                                       # noqa: E731
            pred, null, scales[len(omega)].to(pred)[:, None, None, None])

    def time_of(kwargs: dict) -> float:
        return kwargs["timestep"][0].item() / 1000

    def before(_, args, kwargs):
        """CADS: noise on the conditional half, before the pass, so that the negative has the same."""
        if cads:
            text, pooled = kwargs["encoder_hidden_states"].clone(), kwargs["pooled_projections"].clone()
            t = time_of(kwargs)
            text[half] = noisy_text(text[half].flatten(1), t, True).view_as(text[half])
            pooled[half] = noisy_pooled(pooled[half], t, True)
            kwargs = kwargs | dict(encoder_hidden_states=text, pooled_projections=pooled)
        return args, kwargs

    def last_layer(_, args, out):
        """‖ε − ε_∅‖, of the clean pass: it alone has both halves. In patches, which changes no norm."""
        if len(out) == 2 * batch:
            lengths[:] = (out[half] - out[:batch]).double().flatten(1).norm(dim=1).tolist()

    def after(_, args, kwargs, out):
        """`guide` has put ε̃' in the place of ε. With a formula of ours both halves come back alike, so that the
        pipeline's, ε_∅ + w·(ε − ε_∅), gives them back unchanged."""
        if len(out[0]) != 2 * batch:                                       # the further call of skip-layer guidance
            return None
        null, pred = out[0].double().chunk(2)
        guided = formula(pred, null, kwargs["hidden_states"][half].double(), time_of(kwargs), True) if formula else \
            cfg_update(pred, null, w)
        need(guided.isfinite().all(), "the prediction is not finite: need --dtype bfloat16 or float32")
        moved = (guided - null).flatten(1).norm(dim=1).tolist()
        omega.append([long / max(short, 1e-300) for long, short in zip(moved, lengths)])
        return (guided.to(out[0].dtype).repeat(2, 1, 1, 1), *out[1:]) if formula else None

    tokens = (size // pipe.vae_scale_factor // model.config.patch_size) ** 2
    layers = range(len(blocks) // 4, len(blocks) * 3 // 8)                 # 6–8 of SD3-Medium's 24
    with ExitStack() as stack:
        for handle in (model.register_forward_pre_hook(before, with_kwargs=True),
                       model.register_forward_hook(after, with_kwargs=True),
                       model.proj_out.register_forward_hook(last_layer)):
            stack.callback(handle.remove)
        emag = stack.enter_context(guide(model, blocks, layers, cond="last", scale=scale, steps=steps, variant=variant,
                                         image_tokens=slice(0, tokens)))
        if negative:
            emag.perturb = partial(other_attention, emag, NEGATIVES[negative], tokens)
        images = pipe(list(prompts), num_inference_steps=steps, guidance_scale=w, height=size, width=size,
                      generator=[torch.Generator().manual_seed(seed + i) for i in indices], **(skip or {})).images
    return images, [list(each) for each in zip(*omega)]


def identity_attention(tokens: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PAG (Ahn et al., arXiv 2403.17377), for joint attention: of the image each image token sees itself alone."""
    allowed = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    allowed[:tokens, :tokens] = torch.eye(tokens, dtype=torch.bool, device=query.device)
    return F.scaled_dot_product_attention(query, key, value, allowed)


def mean_query(tokens: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """SEG (Hong, arXiv 2408.00760) at σ = ∞: each image token attends with the mean of all image queries."""
    query = query.clone()
    query[:, :, :tokens] = query[:, :, :tokens].mean(dim=2, keepdim=True)
    return F.scaled_dot_product_attention(query, key, value)


NEGATIVES = {"PAG": identity_attention, "SEG": mean_query}


class _Attends(TorchFunctionMode):
    """While on, attention of the samples (B,) bool is attend(query, key, value)."""

    def __init__(self, attend: Callable, samples: Tensor):
        super().__init__()
        self.attend, self.samples = attend, samples

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is not F.scaled_dot_product_attention:
            return out
        return torch.where(self.samples.to(out.device)[:, None, None, None], self.attend(*args[:3]), out)


@contextmanager
def other_attention(emag: EMAG, attend: Callable, tokens: int) -> Iterator[EMAG]:
    """In the place of emag.perturb: the blocks that EMAG selected attend otherwise, for the samples that did so."""
    with ExitStack() as stack:
        for n, samples in zip(emag.layers, emag.selected.T):
            if samples.any():
                attn = emag.blocks[n].attn
                attn.forward = partial(_within, _Attends(partial(attend, tokens), samples), attn.forward)
                stack.callback(delattr, attn, "forward")                   # which uncovers the class's own
        yield emag


def _within(context, function: Callable, *args, **kwargs):
    with context:
        return function(*args, **kwargs)


# -------------------------------------------------------------------------------------------------- drawing all of them


def read_prompts(file: Path, num: int) -> list[str]:
    """The first `num` of a fixed permutation, so that a larger number keeps those drawn before."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix == ".tsv":
            lines = csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
            prompts = [line["Prompt"] for line in lines]
        elif file.suffix == ".json":
            first = {}
            for each in json.loads(text)["annotations"]:
                first.setdefault(each["image_id"], each["caption"])
            prompts = list(first.values())
        else:
            prompts = text.splitlines()
        prompts = [prompt.strip() for prompt in prompts if prompt and prompt.strip()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--prompts {file}: cannot be read ({type(error).__name__}: {error}): need PartiPrompts.tsv "
                         "with a column Prompt, COCO's captions_*.json, or a text with one prompt per line") from None
    need(1 <= num <= len(prompts), f"--num {num}: {file.name} holds {len(prompts)} prompts: need 1…{len(prompts)}")
    return [prompts[i] for i in np.random.default_rng(0).permutation(len(prompts))[:num]]


def save_image(image: Image.Image, file: Path, settings: dict, omega: Sequence[float]):
    info = PngImagePlugin.PngInfo()
    info.add_text("settings", json.dumps(settings))
    info.add_text("omega", json.dumps(omega))
    with whole_file(file) as beside:
        image.save(beside, format="PNG", pnginfo=info)


def read_text(file: Path, chunk: str):
    """What `save_image` left in a PNG."""
    try:
        with Image.open(file, formats=["PNG"]) as image:
            return json.loads(image.text[chunk])
    except Exception:                                                      # whatever is wrong with it
        raise ValueError(f"{file}: is missing, damaged or without {chunk}: need the image that draw makes") from None


def scales_of(of: str | None, inside: float | None, files: Sequence[Path], steps: int) -> list[list[float]] | None:
    """w for each sample and step: EMAG's ω_t, as its images `files` have it, or its mean; or `inside` EMAG's window."""
    if inside:
        return [[inside if Window().perturbs(step, steps) else W for step in range(steps)]] * len(files)
    if not of:
        return None
    found = [read_text(file, "omega") for file in files]
    return found if of == "each" else [[float(np.mean(omega))] * steps for omega in found]


def draw_all(pipe, prompts: Sequence[str], folder: Path, methods: dict[str, dict], run: dict, rank: int = 0,
             processes: int = 1):
    """Batch k holds prompts k·B … k·B + B − 1; process r of n draws batches r, r + n, …, then 0 what is missing."""
    size, steps, batch, started, drawn = run["size"], run["steps"], run["batch"], time.monotonic(), 0
    starts = range(0, len(prompts), batch)
    for start in [*starts[rank::processes], *(starts if rank == 0 and processes > 1 else ())]:
        indices = range(start, min(start + batch, len(prompts)))
        for name, options in methods.items():
            files = [folder / name / f"{i:06d}.png" for i in indices]
            options = dict(options)
            scales = scales_of(options.pop("of", None), options.pop("inside", None),
                               [folder / "EMAG" / file.name for file in files], steps)
            told = [run | dict(method=name, index=i, prompt=prompts[i], **options)
                    | (dict(scales=scales[i - start]) if scales else {}) for i in indices]
            told = json.loads(json.dumps(told))
            missing = [k for k, file in enumerate(files) if read_image(file, size, told[k]) is None]
            if not missing:
                continue
            if scales:
                options["scales"] = torch.tensor(scales, dtype=torch.float64).T
            images, omega = draw(pipe, [prompts[i] for i in indices], run["seed"], indices, size, steps, **options)
            files[0].parent.mkdir(exist_ok=True)
            for k in missing:
                save_image(images[k], files[k], told[k], omega[k])
            drawn += len(missing)
            if rank == 0 and sys.stderr and sys.stderr.isatty():
                print(f"{start} of {len(prompts)} prompts, {name}", end="\033[K\r", file=sys.stderr, flush=True)
    memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at the peak" if torch.cuda.is_available() else ""
    if rank == 0:
        print(f"{folder}: {len(prompts)} prompts, {len(methods)} methods, {drawn} images drawn, "
              f"{time.monotonic() - started:.1f} s{memory}")


# -------------------------------------------------------------------------------------------------------------- scores

# flag → (name in the tables, weights on the hub)
SCORERS = {"hps21": ("HPS v2.1", "xswu/HPSv2/HPS_v2.1_compressed.pt"),
           "hps2": ("HPS v2", "xswu/HPSv2/HPS_v2_compressed.pt"),
           "pick": ("PickScore", "yuvalkirstain/PickScore_v1"),
           "clip": ("CLIP", "openai/clip-vit-large-patch14")}
MEAN, STD = (.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711)        # OpenAI's, which all four take

Scorer = Callable[[Image.Image, str], float]


def cosine_scorer(see: Callable, read: Callable, tokenize: Callable, size: int, device: str = "cpu") -> Scorer:
    """100 · cosine of the embeddings see(pixels (1, 3, size, size)) and read(token ids (1, n)), both (1, D).

    The images are square, and are resized to size × size (bicubic).
    """
    mean, std = (torch.tensor(each)[:, None, None] for each in (MEAN, STD))

    @torch.inference_mode()
    def score(image: Image.Image, prompt: str) -> float:
        small = np.array(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
        pixels = ((torch.from_numpy(small).permute(2, 0, 1) / 255 - mean) / std)[None].to(device)
        return 100 * F.cosine_similarity(see(pixels).float(), read(tokenize(prompt).to(device)).float()).item()

    return score


def load_hps(weights: str, device: str, name: str = "ViT-H-14") -> Scorer:
    """HPS v2 and v2.1 are open_clip's ViT-H-14 with other weights. weights: a file, or OWNER/REPO/FILE on the hub."""
    import open_clip
    if not Path(weights).is_file():
        from huggingface_hub import hf_hub_download
        owner, repo, file = weights.split("/", 2)
        weights = hf_hub_download(f"{owner}/{repo}", file)
    net, tokenize = open_clip.create_model(name, load_weights=False), open_clip.get_tokenizer(name)
    net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True)["state_dict"])
    net.to(device).eval()
    return cosine_scorer(net.encode_image, net.encode_text, lambda text: tokenize([text]), net.visual.image_size[0],
                         device)


def load_clip(weights: str, device: str) -> Scorer:
    """PickScore and CLIP score. weights: a folder, or OWNER/REPO on the hub."""
    from transformers import AutoTokenizer, CLIPModel
    net, tokenize = CLIPModel.from_pretrained(weights).to(device).eval(), AutoTokenizer.from_pretrained(weights)
    embedding = lambda out: getattr(out, "pooler_output", out)             # transformers 4 gives it bare  # noqa: E731
    return cosine_scorer(
        lambda pixels: embedding(net.get_image_features(pixel_values=pixels)),
        lambda ids: embedding(net.get_text_features(input_ids=ids)),
        lambda text: tokenize(text, truncation=True, max_length=net.config.text_config.max_position_embeddings,
                              return_tensors="pt").input_ids, net.config.vision_config.image_size, device)


@contextmanager
def loading(what: str, packages: str) -> Iterator[None]:
    """Whatever a foreign package raises while it loads `what` becomes one line."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{what}: {str(error).strip().splitlines()[0]}: need `pip install {packages}`") from None
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise ValueError(f"{what}: cannot be loaded ({type(error).__name__}: {text}): need a folder or file with its "
                         "weights, or the hub and the right to read it there") from None


def score_all(folder: Path, scorers: dict[str, tuple[Scorer, str]], rank: int = 0, processes: int = 1):
    """scorers: name → (scorer, where its weights are from). A score is made anew where its image or weights changed."""
    for file in sorted(folder.glob("*/*.png"))[rank::processes]:
        kept, digest = file.with_suffix(".json"), hashlib.sha256(file.read_bytes()).hexdigest()
        found = read_scores(kept, digest)
        prompt = read_text(file, "settings")["prompt"]
        with Image.open(file) as image:
            new = {name: dict(score=score(image, prompt), weights=weights) for name, (score, weights) in scorers.items()
                   if found.get(name, {}).get("weights") != weights}
        if new:
            with whole_file(kept) as beside:
                beside.write_text(json.dumps(dict(image=digest, scores=found | new), indent=1) + "\n")


def read_scores(file: Path, digest: str | None = None) -> dict[str, dict]:
    """Scorer → its score and weights; nothing where there are none, or those of another image than `digest`."""
    try:
        found = json.loads(file.read_bytes())
        return found["scores"] if digest in (None, found["image"]) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


# --------------------------------------------------------------------------------------------------------------- table


def intervals(differences: np.ndarray, draws: int = 10_000) -> np.ndarray:
    """95% intervals (2, K) of the means of K quantities (prompts, K), by a bootstrap over prompts."""
    rng, count = np.random.default_rng(0), len(differences)
    means = np.stack([differences[rng.integers(count, size=count)].mean(axis=0) for _ in range(draws)])
    return np.quantile(means, [.025, .975], axis=0)


def make_rows(folder: Path, methods: Sequence[str]) -> tuple[list[str], list[dict]]:
    """(prompts' numbers that every method and scorer has, one row per scorer and method)."""
    kept = {name: {file.stem: read_scores(file) for file in (folder / name).glob("*.json")} for name in methods}
    kept = {name: scores for name, scores in kept.items() if any(scores.values())}
    need("CFG" in kept, f"--out {folder}: CFG has no scores: need draw and score first")
    scorers = list(dict.fromkeys(scorer for each in kept["CFG"].values() for scorer in each))
    shared = sorted(set.intersection(*({i for i, each in scores.items() if each.keys() >= set(scorers)}
                                       for scores in kept.values())))
    need(len(shared) > 1, f"--out {folder}: no two prompts have {', '.join(scorers)} in all of {', '.join(kept)}: need "
         "score once more, or --only methods that are complete")
    rows = []
    for scorer in scorers:
        values = {name: np.array([kept[name][i][scorer]["score"] for i in shared]) for name in kept}
        against = [plain for plain in ("CFG", "CFG at ω") if plain in values]
        pairs = [(name, plain) for name in values for plain in against]
        low, high = intervals(np.stack([values[name] - values[plain] for name, plain in pairs], axis=1))
        for name in values:
            row = {"scorer": scorer, "method": name, "prompts": len(shared), "mean": values[name].mean()}
            for plain in against:
                less, at = values[name] - values[plain], pairs.index((name, plain))
                row |= {f"less {plain}": less.mean(), f"low, {plain}": low[at], f"high, {plain}": high[at],
                        f"won, {plain}": ((less > 0) + (less == 0) / 2).mean()}
            rows.append(row)
    return shared, rows


def as_markdown(rows: Sequence[dict]) -> str:
    against = [column.removeprefix("less ") for column in rows[0] if column.startswith("less ")]
    lines = ["| scorer | method | mean | " + " | ".join(f"less {plain} (95%), prompts won" for plain in against) + " |",
             "|" + " --- |" * (3 + len(against))]
    for row in rows:
        cells = [f"{row[f'less {plain}']:+.2f} ({row[f'low, {plain}']:+.2f}…{row[f'high, {plain}']:+.2f}), "
                 f"{row[f'won, {plain}']:.0%}" if row["method"] != plain else "" for plain in against]
        lines.append(f"| {row['scorer']} | {row['method']} | {row['mean']:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def make_sheet(folder: Path, methods: Sequence[str], prompts: Sequence[int], side: int = 256) -> Image.Image:
    """One line per prompt, chosen by its number, and one column per method."""
    font, gap, top, left = ImageFont.load_default(size=16), 4, 24, 64
    sheet = Image.new("RGB", (left + len(methods) * (side + gap), top + len(prompts) * (side + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for c, name in enumerate(methods):
        pen.text((left + c * (side + gap) + side // 2, top // 2), name, "black", font, "mm")
    for r, index in enumerate(prompts):
        pen.text((left - 8, top + r * (side + gap) + side // 2), str(index), "black", font, "rm")
        for c, name in enumerate(methods):
            file = folder / name / f"{index:06d}.png"
            if file.is_file():
                place = left + c * (side + gap), top + r * (side + gap)
                with Image.open(file) as image:
                    sheet.paste(image.resize((side, side)), place)
    return sheet


# -------------------------------------------------------------------------------------------------------- command line


def draw_command(args: argparse.Namespace, device: str):
    need(args.prompts, "--prompts: say which: PartiPrompts.tsv, COCO's captions_val2014.json, or a text file")
    need(args.size % 16 == 0 and args.size > 0, f"--size {args.size}: need a multiple of 16")
    need(args.batch >= 1 and 1 <= args.steps <= 1000 and 0 <= args.seed < 2**32,
         "--batch needs 1 or more, --steps 1…1000, --seed 0…2^32 − 1")
    need(device != "cpu" or not args.offload, "--offload: no GPU was found: leave it out")
    need("EMAG" in args.only or not any("of" in METHODS[name] for name in args.only), "--only: CFG at ω needs EMAG too")
    rank, processes = read_processes()
    prompts = read_prompts(args.prompts, args.num)
    check_folder(args.out)
    for name in METHODS:
        if (args.out / name).is_dir():
            remove_leftovers(args.out / name)
    run = dict(pipe=args.pipe, dtype=args.dtype, size=args.size, steps=args.steps, seed=args.seed, batch=args.batch,
               prompts=args.prompts.name)
    claim_folder(args.out, run, make=False)
    with loading(args.pipe, "diffusers transformers accelerate sentencepiece protobuf"):
        from diffusers import StableDiffusion3Pipeline
        pipe = StableDiffusion3Pipeline.from_pretrained(args.pipe, torch_dtype=getattr(torch, args.dtype))
    pipe.set_progress_bar_config(disable=True)
    if args.offload:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    claim_folder(args.out, run)
    run.pop("prompts")                                                     # each image says its own
    draw_all(pipe, prompts, args.out, {name: METHODS[name] for name in args.only}, run, rank, processes)


def score_command(args: argparse.Namespace, device: str):
    chosen = {flag: getattr(args, flag) for flag in SCORERS if getattr(args, flag)}
    need(chosen, "score: say by what: --hps21, --hps2, --pick or --clip, each alone or with its weights")
    rank, processes = read_processes()
    need(any(args.out.glob("*/*.png")), f"--out {args.out}: holds no images: need the folder of draw")
    scorers = {}
    for flag, weights in chosen.items():
        load, packages = (load_hps, "open_clip_torch torchvision") if "hps" in flag else (load_clip, "transformers")
        with loading(f"--{flag} {weights}", packages):
            scorers[SCORERS[flag][0]] = load(weights, device), weights
    score_all(args.out, scorers, rank, processes)


def table_command(args: argparse.Namespace):
    shared, rows = make_rows(args.out, args.only)
    methods = [name for name in args.only if any(row["method"] == name for row in rows)]
    with whole_file(args.out / "table.csv") as beside, beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    text = f"{len(shared)} prompts, scores are 100 times a cosine, intervals are 95%\n\n{as_markdown(rows)}"
    with whole_file(args.out / "table.md") as beside:
        beside.write_text(text, encoding="utf-8")
    with whole_file(args.out / "sheet.png") as beside:
        make_sheet(args.out, methods, args.show).save(beside, format="PNG")
    print(text, end="")


@one_line_errors
def main(argv: Sequence[str] | None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error, add = lambda message: need(False, f"{message}: see --help"), parser.add_argument
    add("verb", choices=["draw", "score", "table"])
    add("--out", type=Path, required=True, metavar="FOLDER", help="new, empty, or a run to go on with")
    add("--only", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help=", ".join(METHODS))
    add("--prompts", type=Path, metavar="FILE", help="draw: PartiPrompts.tsv, captions_*.json, or one prompt per line")
    add("--num", type=int, default=200, help="draw: so many of the prompts, the same at each call (default 200)")
    add("--pipe", default="stabilityai/stable-diffusion-3-medium-diffusers", metavar="WEIGHTS",
        help="draw: SD3 or SD3.5, a folder or a name on the hub (default: SD3-Medium)")
    add("--size", type=int, default=1024)
    add("--steps", type=int, default=28)
    add("--seed", type=int, default=0)
    add("--batch", type=int, default=1, metavar="B", help="draw: prompts drawn together (default 1)")
    add("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    add("--offload", action="store_true", help="draw: of encoders, transformer and decoder only one is on the GPU")
    for flag, (name, weights) in SCORERS.items():
        add(f"--{flag}", nargs="?", const=weights, metavar="WEIGHTS", help=f"score: by {name} (default: {weights})")
    add("--show", type=int, nargs="+", default=[0, 1, 2, 3], metavar="N", help="table: prompts on the contact sheet")
    args = parser.parse_args(argv)
    args.only = [name for name in METHODS if name in args.only]
    device = f"cuda:{read_processes()[0] % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    if args.verb == "table":
        table_command(args)
    else:
        (draw_command if args.verb == "draw" else score_command)(args, device)


if __name__ == "__main__":
    sys.exit(main())
