"""Stage 4: draw images. Coarse labels one by one, then all fine labels in one pass, then pixels: T + 1 steps.

(arXiv 2503.16194, figure 1c.) With --model baseline: T steps over the fine labels themselves, then pixels.

    python sample.py                                    # 2,000 images, all classes in turn
    python sample.py --classes 3 7 --cfg-scale 4        # chosen classes, stronger guidance
    python sample.py --num-samples 50000 --npz          # also samples.npz and a PNG folder for the papers' evaluators

Reads tokenizer.pt, clusters.pt, coarse.pt and fine.pt (or baseline.pt); writes samples.pt and samples.png (or
samples-baseline.pt and .png).
"""

import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from tqdm import tqdm

from ar_model import generate, load_ar
from aux_model import load_aux, predict_fine
from tokenizer import (
    CommandLine,
    autocast,
    fail,
    load,
    load_tokenizer,
    number,
    pick_device,
    replacing,
    save,
    save_figure,
    to_uint8,
)

# The sampling settings: stage 2 (one AR model) and stage 3 (the fine labels) have their own.
DEFAULTS = {
    "cfg_scale": 3.0,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "fine_cfg_scale": 1.0,
    "fine_temperature": 1.0,
    "fine_top_k": 0,
}


def load_models(out, model, device):
    """The modules that draw images, in eval mode on device: {"vqvae", "ar", "aux"} for "ctf"; no "aux" for "baseline".

    Second value: the artifact of the AR model, with its settings and history. Third: that of the tokenizer. Fails in one
    line if artifacts are missing or do not belong together.
    """
    vqvae, tokenizer = load_tokenizer(out, device)
    codebook_id = tokenizer["codebook_id"]
    if model == "baseline":
        ar, artifact = load_ar(out / "baseline.pt", device, codebook_id=codebook_id)
        return nn.ModuleDict({"vqvae": vqvae, "ar": ar}), artifact, tokenizer
    clusters = load(out / "clusters.pt", "cluster.py", codebook_id=codebook_id)
    ids = {"codebook_id": codebook_id, "cluster_id": clusters["cluster_id"]}
    ar, artifact = load_ar(out / "coarse.pt", device, **ids)
    aux, _ = load_aux(out / "fine.pt", clusters["code_to_cluster"], device, **ids)
    return nn.ModuleDict({"vqvae": vqvae, "ar": ar, "aux": aux}), artifact, tokenizer


@torch.inference_mode()
def sample_images(models, labels, generator, settings):
    """One image per class label. labels int64 (B,) on the device of the models; settings as DEFAULTS.

    Returns uint8 images (B, H, W, 3), int64 coarse labels (B, T) (None for the baseline) and fine labels (B, T).
    """
    names = ("cfg_scale", "temperature", "top_k", "top_p")
    with autocast(labels.device):
        tokens = generate(
            models["ar"], labels, generator, **{name: settings[name] for name in names}
        )  # (B, T)
        if "aux" in models:
            coarse = tokens
            names = ("cfg_scale", "temperature", "top_k")
            fine_settings = {name: settings[f"fine_{name}"] for name in names}
            fine = predict_fine(
                models["aux"], coarse, labels, generator, **fine_settings
            )  # (B, T)
        else:
            coarse, fine = None, tokens
        images = to_uint8(models["vqvae"].decode(models["vqvae"].codes(fine)))
    return images, coarse, fine


def sample_batches(models, labels, seed, settings, batch_size=100):
    """sample_images for any number of labels (N,), in batches. The same seed and batch size give the same images.

    Returns images (N, H, W, 3), coarse and fine labels (N, T), all on the CPU, and images per second.
    """
    device = models["vqvae"].codebook.device
    generator = torch.Generator(device).manual_seed(seed)
    images, coarse, fine = [], [], []
    start = time.perf_counter()
    with tqdm(
        total=len(labels), desc="sample", unit="image", mininterval=1, leave=False
    ) as bar:
        for batch in labels.split(batch_size):
            batch_images, batch_coarse, batch_fine = sample_images(
                models, batch.to(device), generator, settings
            )
            images.append(batch_images.cpu())
            fine.append(batch_fine.cpu())
            coarse += [] if batch_coarse is None else [batch_coarse.cpu()]
            bar.update(len(batch))
    speed = len(labels) / (time.perf_counter() - start)
    return (
        torch.cat(images),
        torch.cat(coarse) if coarse else None,
        torch.cat(fine),
        speed,
    )


def plot_samples(path, images, labels, classes, title):
    """A grid of up to 10 images (N, H, W, 3) of each of the first 10 classes that occur, a row per class."""
    present = labels.unique().tolist()[:10]
    columns = min(10, max((labels == y).sum().item() for y in present))
    figure = Figure(figsize=(1 + columns, 0.5 + len(present)))
    figure.suptitle(title, y=1.0)
    axes = figure.subplots(len(present), columns, squeeze=False)
    for row, y in zip(axes, present):
        of_class = images[labels == y]
        row[0].set_ylabel(classes[y], rotation=0, ha="right", va="center")
        for i, ax in enumerate(row):
            ax.set(xticks=[], yticks=[], frame_on=False)
            if i < len(of_class):
                ax.imshow(of_class[i])
    save_figure(figure, path)


def main(argv=None):
    parser = CommandLine(__doc__)
    parser.add_argument("--model", choices=["ctf", "baseline"], default="ctf")
    parser.add_argument("--num-samples", type=number(int, 1), default=2000)
    parser.add_argument(
        "--batch-size", type=number(int, 1), default=100, help="images drawn at a time"
    )
    parser.add_argument(
        "--classes",
        type=number(int, 0),
        nargs="+",
        help="class numbers (default: all in turn)",
    )
    parser.add_argument(
        "--npz",
        action="store_true",
        help="also write an .npz and a folder of PNG files",
    )
    parser.add_argument(
        "--cfg-scale", type=number(float, 0), help="classifier-free guidance, 1: off"
    )
    parser.add_argument(
        "--temperature", type=number(float, 1e-3), help="below 1: less varied"
    )
    parser.add_argument(
        "--top-k",
        type=number(int, 0),
        help="draw among the k likeliest tokens only, 0: off",
    )
    parser.add_argument(
        "--top-p",
        type=number(float, 1e-6, 1),
        help="among the likeliest of this total probability",
    )
    for name in ("cfg-scale", "temperature", "top-k"):
        kind = number(int, 0) if name == "top-k" else number(float, 1e-3)
        parser.add_argument(
            f"--fine-{name}", type=kind, help=f"--{name} of stage 3, the fine labels"
        )
    parser.set_defaults(**DEFAULTS)
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    models, ar_artifact, tokenizer = load_models(args.out, args.model, device)
    classes = tokenizer["data"]["classes"]
    chosen = list(range(len(classes))) if args.classes is None else args.classes
    if max(chosen) >= len(classes):
        fail(
            f"--classes {max(chosen)}: the classes of {tokenizer['data']['name']} are 0 to {len(classes) - 1}"
        )

    labels = torch.tensor(
        [chosen[i % len(chosen)] for i in range(args.num_samples)]
    )  # balanced, in any stretch
    settings = {name: getattr(args, name) for name in DEFAULTS}
    images, coarse, fine, speed = sample_batches(
        models, labels, args.seed, settings, args.batch_size
    )
    print(f"{len(images)} images at {speed:.0f} images/s on {device}")
    stem = "samples" if args.model == "ctf" else "samples-baseline"
    artifact = {
        "script": "sample.py",
        "model": args.model,
        "images": images.permute(0, 3, 1, 2).contiguous(),
        "labels": labels,
        "fine": fine.int(),
        "settings": settings | {"seed": args.seed},
        "codebook_id": tokenizer["codebook_id"],
        "cluster_id": ar_artifact["cluster_id"],
        "step": ar_artifact["step"],
        "images_per_second": speed,
    }
    if coarse is not None:
        artifact["coarse"] = coarse.int()
    save(artifact, args.out / f"{stem}.pt")
    title = (
        "CTF: coarse, then fine"
        if args.model == "ctf"
        else "Baseline: fine labels one by one"
    )
    changed = [
        f"{name} {value:g}"
        for name, value in settings.items()
        if value != DEFAULTS[name] or name == "cfg_scale"
    ]
    plot_samples(
        args.out / f"{stem}.png",
        images,
        labels,
        classes,
        f"{title} ({', '.join(changed)}, seed {args.seed})",
    )
    if args.npz:
        with (
            replacing(args.out / f"{stem}.npz") as temporary,
            open(temporary, "wb") as file,
        ):
            np.savez(file, arr_0=images.numpy())
        folder = Path(args.out / stem)
        folder.mkdir(exist_ok=True)
        for i, image in enumerate(images):
            Image.fromarray(image.numpy()).save(folder / f"{i:06d}.png")
    print(
        f"wrote {stem}.pt and {stem}.png{f', {stem}.npz and {stem}/' if args.npz else ''} to {args.out}"
    )


if __name__ == "__main__":
    main()
