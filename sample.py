"""Sampling: coarse labels one by one, all fine labels in one pass, then pixels.

T + 1 steps (arXiv 2503.16194, figure 1c). With --model baseline: T steps over the fine
labels themselves, then pixels.

    python sample.py                                # 2,000 images, all classes in turn
    python sample.py --classes 3 7 --cfg-scale 4    # chosen classes, more guidance
    python sample.py --num-samples 50000 --npz      # for the papers' own evaluators

Reads tokenizer.pt, clusters.pt, coarse.pt and fine.pt (or baseline.pt); writes
samples.pt (images uint8 (N, 3, H, W), labels (N,), coarse and fine labels (N, T)) and
samples.png, or samples-baseline.pt and .png. --anatomy: anatomy.png; --npz: samples.npz
and a folder of PNG files. About 180 images/s on two CPU cores.
"""

import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from tqdm import tqdm

from ar_model import generate, load_ar
from aux_model import load_aux, predict_fine
from cluster import load_clusters, random_clusters, swap_within_clusters
from tokenizer import (
    CommandLine,
    at_least,
    autocast,
    fail,
    load,
    load_images,
    load_tokenizer,
    pick_device,
    reconstruct,
    replacing,
    run_script,
    save,
    save_figure,
    to_uint8,
)

MODEL_NAMES = {"ctf": "CTF", "baseline": "baseline"}
SAMPLE_FILES = {"ctf": "samples.pt", "baseline": "samples-baseline.pt"}
# Stage 1, and stage 2 if there is one.
MODEL_FILES = {"ctf": ("coarse.pt", "fine.pt"), "baseline": ("baseline.pt",)}
# How the AR model is sampled, and how the auxiliary model is ("fine").
SETTINGS = {"cfg_scale": 2.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
FINE_SETTINGS = {"cfg_scale": 1.0, "temperature": 1.0, "top_k": 0}


def load_models(out, files, device):
    """The networks that draw images, in eval mode: vqvae, ar and (of CTF) aux.

    files: names in the folder out, as in MODEL_FILES. Returns a ModuleDict, and the
    artifacts of its networks in a dict. Fails in one line if files do not belong
    together.
    """
    vqvae, tokenizer = load_tokenizer(out, device)
    models, artifacts = {"vqvae": vqvae}, {"vqvae": tokenizer}
    ids = {"codebook_id": tokenizer["codebook_id"]}
    if len(files) > 1:
        clusters = load_clusters(out, **ids)
        ids["cluster_id"] = clusters["cluster_id"]
        g = clusters["code_to_cluster"]
        models["aux"], artifacts["aux"] = load_aux(out / files[1], g, device, **ids)
    models["ar"], artifacts["ar"] = load_ar(out / files[0], device, **ids)
    return nn.ModuleDict(models), artifacts


def training_of(artifacts):
    """What the weights of ar (and aux) come from: their training flags and steps."""
    stages = {name: artifacts[name] for name in artifacts if name != "vqvae"}
    return {n: a["settings"] | {"step": a["step"]} for n, a in stages.items()}


@torch.inference_mode()
def sample_images(models, labels, generator, settings, fine_settings):
    """Draw one image per class label int64 (B,), which lies on the device of models.

    settings as SETTINGS, fine_settings as FINE_SETTINGS. Returns images uint8
    (B, H, W, 3), coarse labels int64 (B, T) (None for the baseline), fine (B, T).
    """
    coarse, vqvae = None, models["vqvae"]
    with autocast(labels.device):
        fine = generate(models["ar"], labels, generator, **settings)  # (B, T)
        if "aux" in models:
            coarse = fine  # what stage 1 drew were coarse labels
            fine = predict_fine(
                models["aux"], coarse, labels, generator, **fine_settings
            )
    images = to_uint8(vqvae.decode(vqvae.codes(fine)))
    return images, coarse, fine


def sample_batches(models, labels, seed, settings, fine_settings, batch_size=100):
    """sample_images for any number of labels (N,), a batch at a time.

    The same seed and batch size give the same images on the same machine. Returns
    images, coarse and fine labels, all on the CPU, and images per second.
    """
    device = models["vqvae"].codebook.device
    generator = torch.Generator(device).manual_seed(seed)
    batches = [y.to(device) for y in labels.split(batch_size)]
    began = time.perf_counter()
    drawn = []
    for y in tqdm(batches, "sample", unit="batch"):
        parts = sample_images(models, y, generator, settings, fine_settings)
        drawn.append([None if part is None else part.cpu() for part in parts])
    speed = len(labels) / (time.perf_counter() - began)
    images, coarse, fine = zip(*drawn)
    coarse = None if coarse[0] is None else torch.cat(coarse)
    return torch.cat(images), coarse, torch.cat(fine), speed


def plot_samples(path, title, images, labels, classes):
    """A grid with a row per class: the first 10 images uint8 (N, H, W, 3) of each of
    the first 10 classes among labels (N,)."""
    shown = labels.unique()[:10].tolist()
    rows = [images[labels == y][:10] for y in shown]
    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(1.5 + columns, 0.5 + len(rows)), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[], frame_on=False)
    for y, row, row_axes in zip(shown, rows, axes):
        row_axes[0].set_ylabel(
            f"class {classes[y]}", rotation=0, ha="right", va="center"
        )
        for ax, image in zip(row_axes, row.numpy()):
            ax.imshow(image)
    save_figure(path, figure)


def entropy(logits):
    """Bits (...,) of the choice among softmax(logits) (..., V); -inf is no choice."""
    return torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1) / math.log(2)


@torch.inference_mode()
def decode_prefix(vqvae, fine, n):
    """Fine labels (B, T) -> images uint8 (B, H, W, 3) in which only the first n tokens
    are known: the others hold a code of zeros, which is none of the codebook."""
    codes = vqvae.codes(fine).flatten(2)  # (B, d, T)
    codes[:, :, n:] = 0
    return to_uint8(vqvae.decode(codes.unflatten(2, vqvae.grid)))


@torch.inference_mode()
def plot_anatomy(path, models, g, labels, fine, originals, seed):
    """anatomy.png: what every stage knows of a few images, two rows of panels for each.

    models of CTF; g int64 (K,), the fine to the coarse labels; class labels (n,); fine
    labels (n, T), all on one device; originals: n images uint8 (H, W, 3) with a title.
    """
    vqvae, grid, coarse = models["vqvae"], models["vqvae"].grid, g[fine]  # (n, T)
    K, M, T = len(g), len(models["aux"].sizes), fine.shape[1]
    # Colours in which similar codes look alike: their ranks along the three directions
    # in which the codebook varies most. A cluster has the mean colour of its codes.
    centred = vqvae.codebook - vqvae.codebook.mean(dim=0)
    directions = torch.linalg.svd(centred, full_matrices=False).Vh[:3]
    color = (centred @ directions.T).argsort(dim=0).argsort(dim=0) / K
    color = F.pad(color, (0, 3 - color.shape[1]))  # (K, rgb), if d is only 2 as well
    mean_color = torch.zeros(M, 3, device=g.device).index_add_(0, g, color)
    mean_color /= g.bincount(minlength=M)[:, None]
    logits = models["ar"](coarse[:, :-1], labels), models["aux"](coarse, labels)
    bits = [entropy(x) for x in logits]  # (n, T) of each stage
    rng, g_array = np.random.default_rng(seed), g.cpu().numpy()
    clusterings = {"its own": g_array, "random": random_clusters(g_array, rng)}
    swapped = {
        name: swap_within_clusters(fine.cpu().numpy(), clustering, rng)
        for name, clustering in clusterings.items()
    }
    figure = Figure(figsize=(13, 4.8 * len(fine)), layout="constrained")
    figure.suptitle(f"{T} tokens, each one of K = {K} codes in M = {M} clusters")
    parts = figure.subfigures(len(fine), 1, squeeze=False)[:, 0]
    for i, (part, (title, original)) in enumerate(zip(parts, originals)):
        part.suptitle(title)
        axes = part.subplots(2, 6)
        for ax in axes.flat:
            ax.set(xticks=[], yticks=[], frame_on=False)
        axes[0, 0].imshow(original)
        axes[0, 0].set_title("the image")
        axes[0, 1].imshow(color[fine[i]].view(*grid, 3).cpu().numpy())
        axes[0, 1].set_title("fine labels")
        axes[0, 2].imshow(mean_color[coarse[i]].view(*grid, 3).cpu().numpy())
        axes[0, 2].set_title("coarse labels")
        for ax, values, stage in zip(axes[0, 3:5], bits, (1, 2)):
            shown = ax.imshow(
                values[i].view(grid).cpu().numpy(), vmin=0, vmax=math.log2(M)
            )
            ax.set_title(f"entropy of stage {stage}\nmean {values[i].mean():.1f} bits")
        part.colorbar(shown, ax=axes[0, 5], label="entropy, bits", location="left")
        shares = "a quarter", "half", "three quarters", "all"
        for quarters, (ax, share) in enumerate(zip(axes[1], shares), start=1):
            picture = decode_prefix(vqvae, fine[i : i + 1], quarters * T // 4)
            ax.imshow(picture[0].cpu().numpy())
            ax.set_title(f"decoded from {share}\nof its tokens")
        for ax, (name, tokens) in zip(axes[1, 4:], swapped.items()):
            tokens = torch.from_numpy(tokens[i : i + 1]).to(g.device)
            ax.imshow(reconstruct(vqvae, tokens)[0].cpu().numpy())
            ax.set_title(f"swapped within\n{name} clusters")
    save_figure(path, figure)


def main(argv=None):
    parser = CommandLine(__doc__)
    add, positive = parser.add_argument, at_least(1e-3, float)
    add("--model", choices=["ctf", "baseline"], default="ctf", help="what to sample")
    add("--num-samples", type=at_least(1), default=2000, help="images")
    add("--batch-size", type=at_least(1), default=100, help="images at a time")
    add("--classes", type=at_least(0), nargs="+", help="class numbers; default: all")
    add("--cfg-scale", type=at_least(0, float), help="guidance of stage 1; 1: off")
    add("--temperature", type=positive, help="of stage 1")
    add(
        "--top-k",
        type=at_least(0),
        help="of stage 1: draw among the k likeliest; 0: off",
    )
    add("--top-p", type=positive, help="of stage 1: the likeliest, of this probability")
    add("--fine-cfg-scale", type=at_least(0, float), help="of stage 2; 1: off")
    add("--fine-temperature", type=positive, help="of stage 2")
    add("--fine-top-k", type=at_least(0), help="of stage 2; 0: off")
    add("--npz", action="store_true", help="also write samples.npz and a PNG folder")
    add("--anatomy", action="store_true", help="also draw anatomy.png, stage by stage")
    parser.set_defaults(**SETTINGS)
    parser.set_defaults(**{f"fine_{name}": v for name, v in FINE_SETTINGS.items()})
    args = parser.parse_args(argv)
    if args.anatomy and args.model == "baseline":
        parser.error("--anatomy shows both stages, and the baseline has one")
    device = pick_device(args.device)
    models, artifacts = load_models(args.out, MODEL_FILES[args.model], device)
    data = artifacts["vqvae"]["data"]
    classes, name = data["classes"], data["name"]
    chosen = args.classes or list(range(len(classes)))
    if max(chosen) >= len(classes):
        fail(f"--classes {max(chosen)}: those of {name} are 0 to {len(classes) - 1}")

    labels = torch.tensor(chosen)[torch.arange(args.num_samples) % len(chosen)]
    settings = {name: getattr(args, name) for name in SETTINGS}
    fine_settings = {name: getattr(args, f"fine_{name}") for name in FINE_SETTINGS}
    images, coarse, fine, speed = sample_batches(
        models, labels, args.seed, settings, fine_settings, args.batch_size
    )
    print(f"{len(images)} images, {speed:.0f} images/s on {device}")
    path = args.out / SAMPLE_FILES[args.model]
    save(
        path,
        script="sample.py",
        model=args.model,
        images=images.permute(0, 3, 1, 2).contiguous(),
        labels=labels,
        coarse=coarse,
        fine=fine,
        settings=settings,
        fine_settings=fine_settings,
        seed=args.seed,
        batch_size=args.batch_size,
        device=str(device),
        images_per_second=speed,
        training=training_of(artifacts),
        codebook_id=artifacts["ar"]["codebook_id"],
        cluster_id=artifacts["ar"]["cluster_id"],
    )
    title = f"{MODEL_NAMES[args.model]} samples of {Path(name).name}, "
    title += f"guidance {args.cfg_scale:g}, seed {args.seed}"
    plot_samples(path.with_suffix(".png"), title, images, labels, classes)
    if args.anatomy:
        ids = {"codebook_id": artifacts["vqvae"]["codebook_id"]}
        tokens = load(args.out / "tokens.pt", "tokenizer.py", **ids)
        real, real_labels, _ = load_images(name, "test", data["image_size"])
        i = (real_labels == labels[0]).nonzero()[0, 0]  # of the first sample's class
        class_name = classes[labels[0]]
        titled = [(f"A real image of class {class_name}", real[i].numpy())]
        titled += [(f"A sample of class {class_name}", images[0].numpy())]
        plot_anatomy(
            args.out / "anatomy.png",
            models,
            load_clusters(args.out, **ids)["code_to_cluster"].to(device),
            labels[[0, 0]].to(device),
            torch.stack([tokens["test_fine"][i].long(), fine[0]]).to(device),
            titled,
            args.seed,
        )
    if args.npz:
        array, folder = path.with_suffix(".npz"), path.with_suffix("")
        with replacing(array) as temporary, open(temporary, "wb") as file:
            np.savez(file, arr_0=images.numpy())
        for old in folder.glob("[0-9]*.png"):
            old.unlink()
        for i, image in enumerate(tqdm(images.numpy(), "write PNG files")):
            with replacing(folder / f"{i:06d}.png") as temporary:
                Image.fromarray(image).save(temporary, format="png")
    print(f"wrote {path.name} and {path.stem}.png to {args.out}")


if __name__ == "__main__":
    run_script(main)
