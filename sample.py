"""Sampling: coarse labels one by one, all fine labels in one pass, then pixels.

T + 1 steps (arXiv 2503.16194, figure 1c). The baseline (--model baseline) takes T steps
over the fine labels themselves.

    python sample.py                                 # 2,000 images of all classes
    python sample.py --classes 3 cat --cfg-scales 4  # by number or name, more guidance
    python sample.py --cfg-scales 1 2 3              # to out/cfg1, out/cfg2, out/cfg3
    python sample.py --fine-top-k 0                  # sampled fine labels (the paper)
    python sample.py --num-samples 50000 --export    # files for other FID programs

Reads tokenizer.pt, tokens.pt; clusters.pt, coarse.pt and fine.pt, or else baseline.pt;
images.pt for --anatomy and --export.
Writes samples.pt (images uint8 (N, H, W, 3), classes (N,), coarse and fine labels
(N, T)) and samples.png; for the baseline samples-baseline.pt and .png. With --anatomy
also anatomy.png, with --export also the folder export/. On two CPU cores: 110 to 150
images/s.

A new image from beginning to end: class 0. 64 steps of stage 1 sample 64 coarse labels,
91, 34, 91, 112, ... (For guidance each step runs with and without the class.) Token 27
gets 114, a cluster of 43 codes. One step of stage 2, here with --fine-top-k 0, samples
a code of each token's cluster: 3039, 990, 3786, ... Token 27 gets 1645. The decoder
turns the codes (d = 8, h = 8, w = 8) into (3, 32, 32) pixels.
"""

import math
import shutil
import time

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from tqdm import tqdm

import tokenizer
from ar_model import generate, load_ar
from aux_model import load_aux, predict_fine
from cluster import random_clusters, swapped_images
from tokenizer import fail, load_examples, to_uint8

FILES = {"ctf": "samples.pt", "baseline": "samples-baseline.pt"}
# The defaults: SETTINGS for stage 1 or the baseline; FINE_SETTINGS for stage 2, the
# argmax (top_k 1) without guidance. (The paper samples fine labels: top_k 0.)
SETTINGS = {"cfg_scale": 2.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
FINE_SETTINGS = {"cfg_scale": 1.0, "temperature": 1.0, "top_k": 1}

# --------------------------------------------------------------- From classes to pixels


@torch.no_grad()
def sample_images(models, y, generator, settings, fine_settings):
    """Sample one image for each class in y int64 (B,), on the device of models.

    models holds vqvae, ar, and for CTF aux. settings, with the keys of SETTINGS, are
    for stage 1 or the baseline; fine_settings, with those of FINE_SETTINGS, for stage
    2. Both stages use the same generator, stage 1 first. Returns images uint8 (B, H, W,
    3), coarse labels int64 (B, T) (None for the baseline) and fine labels int64 (B, T).
    """
    vqvae = models["vqvae"]
    with tokenizer.autocast(y.device):
        if "aux" in models:
            coarse = generate(models["ar"], y, generator, **settings)  # T steps: (B, T)
            aux = models["aux"]
            fine = predict_fine(aux, coarse, y, generator, **fine_settings)  # 1 step
        else:
            coarse = None
            fine = generate(models["ar"], y, generator, **settings)
    images = to_uint8(vqvae.decode(vqvae.codes(fine)))
    return images, coarse, fine


def sample_batches(models, y, seed, settings, fine_settings, batch_size=100):
    """sample_images for any number of classes y (N,), batch by batch.

    The same seed and batch size give the same images on the same machine. Returns
    images, coarse and fine labels, all on the CPU, and images per second (without the
    first batch, if there are several: it includes the warm-up).
    """
    device = models["vqvae"].codebook.device
    generator = torch.Generator(device).manual_seed(seed)
    images, coarse, fine, seconds = [], [], [], []
    for part in tqdm(y.split(batch_size), "sample", unit="batch"):
        began = time.perf_counter()
        pixels, c, q = sample_images(
            models, part.to(device), generator, settings, fine_settings
        )
        images.append(pixels.cpu())
        fine.append(q.cpu())
        if c is not None:
            coarse.append(c.cpu())
        seconds.append(time.perf_counter() - began)
    if len(seconds) > 1:
        speed = (len(y) - len(images[0])) / sum(seconds[1:])
    else:
        speed = len(y) / seconds[0]
    coarse = torch.cat(coarse) if coarse else None
    return torch.cat(images), coarse, torch.cat(fine), speed


# --------------------------------------------------------------------------- The script


def load_models(out, model, device):
    """For model "ctf" or "baseline": a ModuleDict of vqvae, ar and (CTF) aux in eval
    mode, and a dict of their artifacts. Fails if these do not belong together."""
    models, artifacts = {}, {}
    models["vqvae"], artifacts["vqvae"] = tokenizer.load_tokenizer(out, device)
    ids = {"codebook_id": artifacts["vqvae"]["codebook_id"]}
    if model == "ctf":
        clusters = tokenizer.load(out, "clusters.pt", **ids)
        ids["cluster_id"] = clusters["cluster_id"]
        g = clusters["code_to_cluster"]
        models["aux"], artifacts["aux"] = load_aux(out, g, device, **ids)
    file = "coarse.pt" if model == "ctf" else "baseline.pt"
    models["ar"], artifacts["ar"] = load_ar(out, file, device, **ids)
    return nn.ModuleDict(models), artifacts


def weights_of(artifacts):
    """{network: weights_id}: evaluate.py checks that these weights made the samples."""
    return {name: artifact["weights_id"] for name, artifact in artifacts.items()}


def name_of(samples):
    """How a sample file was made, in words: "CTF, argmax fine labels, guidance 2", and
    the other settings that differ from the defaults."""
    settings, fine = samples["settings"], samples["fine_settings"]
    changed = {key: v for key, v in settings.items() if v != SETTINGS[key]}
    name = "baseline"
    if samples["model"] == "ctf":
        how = "argmax" if fine["top_k"] == 1 else "sampled"
        name = f"CTF, {how} fine labels"
        # top_k is named only if above 1: "argmax" is 1, "sampled" is 0.
        usual = FINE_SETTINGS | {"top_k": min(fine["top_k"], 1)}
        changed |= {f"fine {key}": v for key, v in fine.items() if v != usual[key]}
    name += f", guidance {settings['cfg_scale']:g}"
    changed.pop("cfg_scale", None)
    return name + "".join(f", {key} {value:g}" for key, value in changed.items())


def parse_args(argv):
    """The flags in argv."""
    parser, usual, fine = tokenizer.command_line(__doc__), SETTINGS, FINE_SETTINGS
    add = parser.add_argument
    add("--model", choices=["ctf", "baseline"], default="ctf", help="what to sample")
    add("--num-samples", type=int, default=2000, help="number of images")
    add("--batch-size", type=int, default=100, help="images per batch")
    add("--classes", nargs="+", help="names or numbers (default: as in the test set)")
    add("--export", action="store_true", help="also write .npz and PNG files")
    add("--anatomy", action="store_true", help="also write anatomy.png")
    add = parser.add_argument_group("stage 1, or the baseline").add_argument
    what = "guidance; 1 is off; several: a folder cfg* for each"
    add("--cfg-scales", type=float, nargs="+", default=[usual["cfg_scale"]], help=what)
    add("--temperature", type=float, default=usual["temperature"], help="above 0")
    add("--top-k", type=int, default=usual["top_k"], help="0 is off")
    add("--top-p", type=float, default=usual["top_p"], help="1 is off")
    add = parser.add_argument_group("stage 2").add_argument
    add("--fine-cfg-scale", type=float, default=fine["cfg_scale"], help="1 is off")
    add("--fine-temperature", type=float, default=fine["temperature"], help="above 0")
    what = "1 is the argmax, 0 is off"
    add("--fine-top-k", type=int, default=fine["top_k"], help=what)
    args = parser.parse_args(argv)
    if args.temperature <= 0 or args.fine_temperature <= 0:
        parser.error("a temperature must be above 0")
    if not 0 < args.top_p <= 1:
        parser.error("--top-p must be above 0 and at most 1")
    if args.fine_top_k == 1 and args.fine_temperature != 1:
        parser.error("--fine-temperature does nothing to an argmax: add --fine-top-k 0")
    if args.anatomy and args.model == "baseline":
        parser.error("--anatomy shows both stages, and the baseline has only one")
    return args


def main(argv=None):
    args = parse_args(argv)
    device = tokenizer.pick_device(args.device)
    models, artifacts = load_models(args.out, args.model, device)
    codebook_id = artifacts["vqvae"]["codebook_id"]
    images_id = artifacts["vqvae"]["images_id"]
    _, tokens, facts = load_examples(args.out, "tokens.pt", codebook_id=codebook_id)
    if args.export or args.anatomy:
        _, real, _ = load_examples(args.out, "images.pt", images_id=images_id)
    class_names = facts["class_names"]
    y = choose_classes(args.classes, args.num_samples, tokens.y, class_names)
    fine_settings = {name: getattr(args, f"fine_{name}") for name in FINE_SETTINGS}
    same = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p")}
    if args.export:
        export(args.out / "export" / "real", real.x)
    for scale in args.cfg_scales:
        settings = {"cfg_scale": scale, **same}
        images, coarse, fine, speed = sample_batches(
            models, y, args.seed, settings, fine_settings, args.batch_size
        )
        several = len(args.cfg_scales) > 1
        out = args.out / f"cfg{scale:g}" if several else args.out
        path = out / FILES[args.model]
        samples = {
            "model": args.model,
            "images": images,
            "classes": y,
            "coarse": coarse,
            "fine": fine,
            "settings": settings,
            "fine_settings": fine_settings,
            "seed": args.seed,
            "batch_size": args.batch_size,
            "images_per_second": speed,
            "weights": weights_of(artifacts),
        }
        tokenizer.save(path, **samples)
        print(f"wrote {path}: {speed:.0f} images/s")
        if args.export:
            export(out / "export" / path.stem, images)
        title = f"{name_of(samples)}, seed {args.seed}"
        plot_samples(path.with_suffix(".png"), title, images, y, class_names)
        if args.anatomy:
            i = (real.y == y[0]).nonzero()[0, 0]  # a test image of the same class
            pairs = {
                "a real image": (real.x[i], tokens.x[i : i + 1]),
                "a sample": (images[0], fine[:1]),
            }
            title = f"class {class_names[y[0]]}"
            rng = np.random.default_rng(args.seed)
            plot_anatomy(out / "anatomy.png", title, models, pairs, y[:1], rng)


def choose_classes(wanted, count, test_classes, class_names):
    """Classes int64 (count,): the wanted ones (names or numbers) in turn, or by default
    test_classes (N,) in their order. Fails if one is unknown."""
    if not wanted:
        return test_classes[torch.arange(count) % len(test_classes)]
    numbers = []
    for text in wanted:
        if text in class_names:  # names first: class 3 may be a folder called 7
            numbers.append(class_names.index(text))
        elif text.isdecimal() and int(text) < len(class_names):
            numbers.append(int(text))
        else:
            known = ", ".join(f"{i} {name}" for i, name in enumerate(class_names[:20]))
            fail(f"--classes {text}: no such class; there are {known}")
    return torch.tensor(numbers)[torch.arange(count) % len(numbers)]


def export(folder, images):
    """Write images uint8 (N, H, W, 3) to folder.npz (as arr_0) and to folder/*.png."""
    shutil.rmtree(folder, ignore_errors=True)  # an earlier run may have more images
    folder.mkdir(parents=True)
    np.savez(f"{folder}.npz", arr_0=images.numpy())
    for i, image in enumerate(tqdm(images.numpy(), f"write {folder}")):
        Image.fromarray(image).save(folder / f"{i:06d}.png")


# ----------------------------------------------------------------------------- Pictures


def plot_samples(path, title, images, y, class_names):
    """A row per class: the first 10 images uint8 (N, H, W, 3) of each of the first 10
    classes in y (N,)."""
    shown = y.unique()[:10].tolist()
    rows = [images[y == number][:10] for number in shown]
    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(1.5 + columns, 0.5 + len(rows)), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for ax in grid.flat:
        ax.set(xticks=[], yticks=[], frame_on=False)
    for number, row, axes in zip(shown, rows, grid):
        name = f"class {class_names[number]}"
        axes[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for ax, image in zip(axes, row.numpy()):
            ax.imshow(image)
    figure.savefig(path)


def entropy(logits):
    """The entropy in bits (...,) of softmax(logits) (..., V)."""
    return torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1) / math.log(2)


def decode_prefix(vqvae, fine, n):
    """Fine labels (B, T) -> images uint8 (B, H, W, 3) decoded from the first n tokens;
    the other tokens get a vector of zeros."""
    codes = vqvae.codes(fine).flatten(2)  # (B, d, T)
    codes[:, :, n:] = 0
    return to_uint8(vqvae.decode(codes.unflatten(2, vqvae.grid)))


def code_colors(codebook):
    """A colour for each code of (K, d): (K, rgb), 0..1. Similar codes look alike: red,
    green and blue are the ranks along the first three principal components."""
    centred = codebook - codebook.mean(dim=0)
    components = torch.linalg.svd(centred, full_matrices=False).Vh[:3]  # (3, d)
    ranks = (centred @ components.T).argsort(dim=0).argsort(dim=0)  # (K, 3)
    return F.pad(ranks / len(codebook), (0, 3 - ranks.shape[1]))  # if d is 2


@torch.no_grad()
def anatomy(models, image, fine, y, rng):
    """One image, step by step: {title: picture}.

    image uint8 (H, W, 3), its fine labels (1, T) and class y (1,). The pictures are
    images (H, W, rgb), colours of tokens (h, w, rgb) and entropies in bits (h, w).
    """
    vqvae, aux, grid = models["vqvae"], models["aux"], models["vqvae"].grid
    g, T = aux.code_to_cluster, fine.shape[1]
    coarse = g[fine]  # (1, T)
    color = code_colors(vqvae.codebook)  # (K, rgb)
    cluster_color = torch.stack(
        [color[g == m].mean(0) for m in range(len(aux.members))]
    )
    pictures = {
        "pixels": image,
        "fine labels": color[fine[0]].view(*grid, 3),
        "coarse labels": cluster_color[coarse[0]].view(*grid, 3),
    }
    logits = models["ar"](coarse[:, :-1], y), aux(coarse, y)
    for stage, stage_logits in enumerate(logits, start=1):
        bits = entropy(stage_logits[0])  # (T,)
        name = f"entropy of stage {stage}\nmean {bits.mean():.1f} bits"
        pictures[name] = bits.view(grid)
    for n in (T // 4, T // 2, 3 * T // 4, T):
        name = f"decoded from the\nfirst {n} tokens"
        pictures[name] = decode_prefix(vqvae, fine, n)[0]
    own = g.cpu().numpy()
    for name, clusters in (("k-means", own), ("random", random_clusters(own, rng))):
        swapped = swapped_images(vqvae, fine, clusters, rng)
        pictures[f"swapped within\n{name} clusters"] = swapped[0]
    return {title: picture.cpu().numpy() for title, picture in pictures.items()}


def plot_anatomy(path, title, models, pairs, y, rng):
    """anatomy.png: two rows of panels for each of pairs, {name: (image, fine labels)};
    y (1,) is their class."""
    device, members = models["aux"].members.device, models["aux"].members
    most_bits = math.log2(max(members.shape))  # of a choice among M clusters or S codes
    figure = Figure(figsize=(13, 9.6), layout="constrained")
    figure.suptitle(f"{title}: {' and '.join(pairs)}")
    grid = figure.subplots(4, 6)
    for ax in grid.flat:
        ax.set(xticks=[], yticks=[], frame_on=False)
    for panels, (name, (image, fine)) in zip((grid[:2], grid[2:]), pairs.items()):
        pictures = anatomy(models, image, fine.to(device), y.to(device), rng)
        axes = list(panels.flat)
        # 11 pictures in 12 panels: the sixth holds the colour bar of the entropies.
        bar = axes.pop(5).inset_axes([0.1, 0, 0.1, 1])
        for ax, (panel_title, picture) in zip(axes, pictures.items()):
            shown = ax.imshow(picture, vmin=0, vmax=most_bits)
            ax.set_title(panel_title)
            if picture.ndim == 2:
                entropies = shown
        figure.colorbar(entropies, cax=bar, label="entropy, bits")
        axes[0].set_title(name)
    figure.savefig(path)


if __name__ == "__main__":
    tokenizer.run(main)
