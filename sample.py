"""Sampling: coarse labels one by one, all fine labels in one pass, then pixels.

T + 1 steps (arXiv 2503.16194, figure 1c). With --model baseline: T steps over the fine
labels themselves, then pixels.

    python sample.py                                # 2,000 images, all classes in turn
    python sample.py --classes 3 cat --cfg-scales 4 # by number or name, more guidance
    python sample.py --cfg-scales 1 2 3 4           # a file for each: samples-cfg1.pt ..
    python sample.py --fine-top-k 0                 # fine labels drawn, as in the paper
    python sample.py --kept                         # of the copies of --keep-every
    python sample.py --num-samples 50000 --npz      # for the papers' own evaluators

Reads tokenizer.pt, tokens.pt, clusters.pt, coarse.pt and fine.pt (or baseline.pt);
writes samples.pt (images uint8 (N, 3, H, W), their classes (N,), coarse and fine labels
(N, T)) and samples.png, or samples-baseline.pt and .png. --anatomy: anatomy.png; --npz:
samples.npz and a folder of PNG files. About 150 images/s on two CPU cores.

One image all the way: class 0. 64 steps of stage 1, with and without the class as a batch
of two, draw 64 coarse labels, 23, 103, 103, 106, ..., token 27 the cluster 96. One step of
stage 2 (here with --fine-top-k 0) draws a code of each of these clusters, 3753, 1756,
1303, ..., token 27 the code 634, one of 21. The decoder turns (d = 8, 8, 8) numbers into
(3, 32, 32) pixels.
"""

import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

from ar_model import generate, load_ar
from aux_model import load_aux, predict_fine
from cluster import (
    MOVED,
    check_images,
    load_clusters,
    random_clusters,
    swap_within_clusters,
)
from tokenizer import (
    CommandLine,
    Figure,
    at_least,
    autocast,
    fail,
    load_images,
    load_tokenizer,
    load_tokens,
    no_traceback,
    pick_device,
    reconstruct,
    replacing,
    save,
    save_figure,
    to_uint8,
)

MODEL_NAMES = {"ctf": "CTF", "baseline": "baseline"}
# The weights of stage 1, and of stage 2 if there is one.
MODEL_FILES = {"ctf": ["coarse.pt", "fine.pt"], "baseline": ["baseline.pt"]}
# How the AR model is sampled, and how the auxiliary model is ("fine"): there the class
# adds little to what the coarse labels say, and with the likeliest code of each cluster
# the FD was lower than with a drawn one wherever that was tried, each at its best
# guidance. (The paper draws: "top_k": 0.)
SETTINGS = {"cfg_scale": 2.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
FINE_SETTINGS = {"cfg_scale": 1.0, "temperature": 1.0, "top_k": 1}

# --------------------------------------------------------------------------------------
# From classes to pixels


@torch.inference_mode()
def sample_images(models, y, generator, settings, fine_settings):
    """Draw one image per class in y int64 (B,), which lies on the device of models.

    models holds vqvae, ar, and aux if it is no baseline. settings as SETTINGS, for
    stage 1 or the baseline; fine_settings as FINE_SETTINGS, for stage 2. Both stages
    draw from the same generator, coarse labels first. Returns images uint8
    (B, H, W, 3), coarse labels int64 (B, T) (None for the baseline), fine (B, T).
    """
    vqvae = models["vqvae"]
    with autocast(y.device):
        if "aux" in models:
            coarse = generate(models["ar"], y, generator, **settings)  # T steps: (B, T)
            aux = models["aux"]
            fine = predict_fine(aux, coarse, y, generator, **fine_settings)  # + 1
        else:
            coarse = None
            fine = generate(models["ar"], y, generator, **settings)
    images = to_uint8(vqvae.decode(vqvae.codes(fine)))
    return images, coarse, fine


def sample_batches(models, y, seed, settings, fine_settings, batch_size=100):
    """sample_images for any number of classes y (N,), a batch at a time.

    The same seed and batch size give the same images on the same machine. Returns
    images, coarse and fine labels, all on the CPU, and images per second.
    """
    device = models["vqvae"].codebook.device
    generator = torch.Generator(device).manual_seed(seed)
    batches = [part.to(device) for part in y.split(batch_size)]
    images, coarse, fine, seconds = [], [], [], []
    for part in tqdm(batches, "sample", unit="batch"):
        began = time.perf_counter()
        pixels, c, q = sample_images(models, part, generator, settings, fine_settings)
        images.append(pixels.cpu())
        fine.append(q.cpu())
        if c is not None:
            coarse.append(c.cpu())
        seconds.append(time.perf_counter() - began)
    if len(batches) > 1:  # in the first it warms up
        speed = (len(y) - len(batches[0])) / sum(seconds[1:])
    else:
        speed = len(y) / sum(seconds)
    coarse = torch.cat(coarse) if coarse else None
    return torch.cat(images), coarse, torch.cat(fine), speed


# --------------------------------------------------------------------------------------
# The script


def load_models(out, files, device):
    """The networks that draw images, in eval mode: vqvae, ar and (of CTF) aux.

    files: names in the folder out, as in MODEL_FILES. Returns a ModuleDict, and the
    artifacts of its networks in a dict. Fails in one line if files do not belong
    together.
    """
    vqvae, tokenizer = load_tokenizer(out, device)
    models, artifacts = {"vqvae": vqvae}, {"vqvae": tokenizer}
    ids = {"codebook_id": tokenizer["codebook_id"]}
    if len(files) == 2:  # of CTF: a file of stage 1, a file of stage 2
        clusters = load_clusters(out, **ids)
        ids["cluster_id"] = clusters["cluster_id"]
        g = clusters["code_to_cluster"]
        models["aux"], artifacts["aux"] = load_aux(out / files[1], g, device, **ids)
    models["ar"], artifacts["ar"] = load_ar(out / files[0], device, **ids)
    return nn.ModuleDict(models), artifacts


def training_of(artifacts):
    """What the weights of ar (and aux) come from, their flags and steps: what a sample
    file is recognised by when the weights may have changed since."""
    stages = {name: artifacts[name] for name in artifacts if name != "vqvae"}
    return {n: a["settings"] | {"step": a["step"]} for n, a in stages.items()}


def kept_copies(out, model_name):
    """The copies of --keep-every, the earliest first: a list of files for load_models.
    Copy number i of stage 1 goes with copy number i of stage 2."""
    stems = [Path(file).stem for file in MODEL_FILES[model_name]]
    copies = [sorted(p.name for p in out.glob(f"{s}-[0-9]*.pt")) for s in stems]
    if not copies[0]:
        fail(f"{out} has no copies of {stems[0]}.pt: train with --keep-every")
    if len({len(names) for names in copies}) > 1:
        fail(f"{out}: --kept needs as many copies of {stems[0]}.pt as of {stems[1]}.pt")
    return [list(files) for files in zip(*copies)]


@no_traceback()
def main(argv=None):
    parser = CommandLine(__doc__)
    add = parser.add_argument
    scale, positive = at_least(0, float), at_least(1e-3, float)
    add("--model", choices=["ctf", "baseline"], default="ctf", help="what to sample")
    add("--kept", action="store_true", help="not the final weights: all kept copies")
    add("--num-samples", type=at_least(1), default=2000, help="images")
    add("--batch-size", type=at_least(1), default=100, help="images at a time")
    which = "names or numbers; default: all, uneven classes as often as in the data"
    add("--classes", nargs="+", help=which)
    guidance = "guidance of stage 1; 1: off; of several, a file for each"
    add("--cfg-scales", type=scale, nargs="+", help=guidance)
    add("--temperature", type=positive, help="of stage 1")
    add("--top-k", type=at_least(0), help="k likeliest of stage 1; 0: off")
    share = at_least(1e-3, float, 1)
    add("--top-p", type=share, help="likeliest of this probability, of stage 1; 1: off")
    add("--fine-cfg-scale", type=scale, help="of stage 2; 1: off")
    add("--fine-temperature", type=positive, help="of stage 2, where it draws")
    add("--fine-top-k", type=at_least(0), help="of stage 2; 0: off, as in the paper")
    add("--npz", action="store_true", help="also write samples.npz and a PNG folder")
    add("--anatomy", action="store_true", help="also show anatomy.png, stage by stage")
    add("--data", type=os.path.expanduser, help=f"for --anatomy: {MOVED}")
    parser.set_defaults(cfg_scales=[SETTINGS["cfg_scale"]])
    for name in ("temperature", "top_k", "top_p"):
        parser.set_defaults(**{name: SETTINGS[name]})
    for name, value in FINE_SETTINGS.items():
        parser.set_defaults(**{f"fine_{name}": value})
    args = parser.parse_args(argv)
    if args.anatomy and args.model == "baseline":
        parser.error("--anatomy shows both stages, and the baseline has one")
    if args.fine_top_k == 1 and args.fine_temperature != 1:
        parser.error("--fine-temperature changes nothing with --fine-top-k 1: give 0")
    device = pick_device(args.device)

    weights = [MODEL_FILES[args.model]]
    if args.kept:
        weights = kept_copies(args.out, args.model)
    run = None  # the flags of the trainings, the same for all copies
    for files in weights:
        models, artifacts = load_models(args.out, files, device)
        flags = [artifact["settings"] for artifact in artifacts.values()]
        if run is not None and run != flags:
            fail(f"{args.out}: {files[0]} is of another run than the copies before")
        run = flags
        for cfg_scale in args.cfg_scales:
            stem = "samples" if args.model == "ctf" else "samples-baseline"
            if len(args.cfg_scales) > 1:
                stem += f"-cfg{cfg_scale:g}"
            if args.kept:
                stem += f"-{artifacts['ar']['step']:06d}"
            write_samples(args, stem, cfg_scale, files, models, artifacts)


def write_samples(args, stem, cfg_scale, files, models, artifacts):
    """Draw with the weights of files, and write out/stem.pt and what goes with it."""
    data = artifacts["vqvae"]["data"]
    class_names, data_name = data["classes"], Path(data["name"]).name
    y = classes_to_draw(args, artifacts["vqvae"])
    if args.anatomy:  # now, and not only when all images have been drawn
        where = args.data or data["name"]
        test_set, _ = load_images(where, "test", data["image_size"])
        check_images(artifacts["vqvae"], where, "test", test_set)
    settings = {
        "cfg_scale": cfg_scale,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
    }
    fine_settings = {
        "cfg_scale": args.fine_cfg_scale,
        "temperature": args.fine_temperature,
        "top_k": args.fine_top_k,
    }
    images, coarse, fine, speed = sample_batches(
        models, y, args.seed, settings, fine_settings, args.batch_size
    )
    path = args.out / f"{stem}.pt"
    save(
        path,
        script="sample.py",
        model=args.model,
        weights=files,
        images=images.permute(0, 3, 1, 2).contiguous(),
        labels=y,
        coarse=coarse,
        fine=fine,
        settings=settings,
        fine_settings=fine_settings,
        seed=args.seed,
        batch_size=args.batch_size,
        device=str(models["vqvae"].codebook.device),
        images_per_second=speed,
        training=training_of(artifacts),
        codebook_id=artifacts["ar"]["codebook_id"],
        cluster_id=artifacts["ar"]["cluster_id"],
    )
    title = f"{MODEL_NAMES[args.model]} samples of {data_name}, "
    title += f"guidance {cfg_scale:g}, seed {args.seed}"
    plot_samples(path.with_suffix(".png"), title, images, y, class_names)
    print(f"wrote {stem}.pt and {stem}.png to {args.out}: {speed:.0f} images/s")
    if args.npz:
        write_npz(path, images)
    if args.anatomy:
        sample, seed = images[0], args.seed
        picture = args.out / f"{stem.replace('samples', 'anatomy')}.png"
        write_anatomy(
            picture, models, test_set, class_names, sample, fine[:1], y[:1], seed
        )


def classes_to_draw(args, tokenizer):
    """The class of each image, int64 (N,): those of --classes alike often, or all as
    often as in the test set. tokenizer: the artifact."""
    names = tokenizer["data"]["classes"]
    shown = ", ".join(f"{i} {name}" for i, name in enumerate(names[:20]))
    if len(names) > 20:
        shown += f", ... {len(names) - 1} {names[-1]}"
    print(f"classes: {shown}")
    if not args.classes:
        ids = {"codebook_id": tokenizer["codebook_id"]}
        test_set, _ = load_tokens(args.out, "test", **ids)
        shares = test_set.y.bincount(minlength=len(names)).tolist()
        if len(set(shares)) > 1:
            print("drawn as often as they are in the test set; --classes: alike often")
        return in_turn(shares, args.num_samples)
    chosen = []
    for text in args.classes:
        if text in names:  # a name first: folders called 1, 2 are the classes 0, 1
            chosen.append(names.index(text))
        elif text.isdecimal() and int(text) < len(names):
            chosen.append(int(text))
        else:
            folder = Path(tokenizer["data"]["name"]).name
            fail(f"--classes {text}: those of {folder} are {shown}")
    return torch.tensor(chosen)[torch.arange(args.num_samples) % len(chosen)]


def in_turn(shares, count):
    """count indices of shares, each as often as its share says, well mixed: int64 (N,).

    Equal shares: 0 1 2 0 1 2. Shares 2 and 1: 0 1 0 0 1 0.
    """
    shares = torch.tensor(shares, dtype=torch.float64)
    shares /= shares.sum()
    # Index i is due for the j-th time in the middle of the j-th part of length 1 / share.
    often = [math.ceil(count * share) for share in shares.tolist()]
    due = [(torch.arange(n) + 0.5) / share for n, share in zip(often, shares)]
    order = torch.cat(due).argsort(stable=True)[:count]
    return torch.arange(len(shares)).repeat_interleave(torch.tensor(often))[order]


def write_npz(path, images):
    """What other evaluators read: an .npz beside path, and a folder of PNG files."""
    array, folder = path.with_suffix(".npz"), path.with_suffix("")
    with replacing(array) as temporary, open(temporary, "wb") as file:
        np.savez(file, arr_0=images.numpy())
    for old in folder.glob("[0-9]*.png"):
        old.unlink()
    for i, image in enumerate(tqdm(images.numpy(), "write PNG files")):
        with replacing(folder / f"{i:06d}.png") as temporary:
            Image.fromarray(image).save(temporary, format="png")


# --------------------------------------------------------------------------------------
# Pictures


def literal(text):
    """text as matplotlib shows it as it is: with $, and what Unicode does not know."""
    return text.encode(errors="replace").decode().replace("$", r"\$")


def plot_samples(path, title, images, y, class_names):
    """A grid with a row per class: the first 10 images uint8 (N, H, W, 3) of each of
    the first 10 classes among y (N,)."""
    shown = y.unique()[:10].tolist()
    rows = [images[y == class_number][:10] for class_number in shown]
    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(1.5 + columns, 0.5 + len(rows)), layout="constrained")
    figure.suptitle(literal(title))
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[], frame_on=False)
    for class_number, row, row_axes in zip(shown, rows, axes):
        name = literal(f"class {class_names[class_number]}")
        row_axes[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for ax, image in zip(row_axes, row.numpy()):
            ax.imshow(image)
    save_figure(path, figure)


def entropy(logits):
    """Bits (...,) of the choice among softmax(logits) (..., V); -inf is no choice."""
    return torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1) / math.log(2)


def decode_prefix(vqvae, fine, n):
    """Fine labels (B, T) -> images uint8 (B, H, W, 3) in which only the first n tokens
    are known: the others hold a code of zeros, which is none of the codebook."""
    codes = vqvae.codes(fine).flatten(2)  # (B, d, T)
    codes[:, :, n:] = 0
    return to_uint8(vqvae.decode(codes.unflatten(2, vqvae.grid)))


def code_colors(codebook):
    """A colour for each code of (K, d): (K, rgb), 0..1. Similar codes look alike.

    red, green and blue are a code's ranks along the three directions in which the
    codebook varies most.
    """
    centred = codebook - codebook.mean(dim=0)
    directions = torch.linalg.svd(centred, full_matrices=False).Vh[:3]  # (3, d)
    ranks = (centred @ directions.T).argsort(dim=0).argsort(dim=0)  # (K, 3)
    return F.pad(ranks / len(codebook), (0, 3 - ranks.shape[1]))  # if d is only 2


@torch.inference_mode()
def anatomy(models, image, fine, y, rng):
    """What every stage knows of one image: {title: picture}, in reading order.

    image uint8 (H, W, 3), its fine labels (1, T) and class y (1,). Pictures are arrays:
    images, colours of tokens (h, w, rgb), and entropies in bits (h, w).
    """
    vqvae = models["vqvae"]
    grid = vqvae.grid
    g = models["aux"].code_to_cluster
    coarse = g[fine]  # (1, T)
    color = code_colors(vqvae.codebook)  # (K, rgb)
    of_cluster = [color[g == m].mean(dim=0) for m in range(g.max() + 1)]
    pictures = {
        "the image": image,
        "fine labels": color[fine[0]].view(*grid, 3),
        "coarse labels": torch.stack(of_cluster)[coarse[0]].view(*grid, 3),
    }
    logits = models["ar"](coarse[:, :-1], y), models["aux"](coarse, y)
    for stage, stage_logits in enumerate(logits, start=1):
        bits = entropy(stage_logits[0])  # (T,)
        title = f"entropy of stage {stage}\nmean {bits.mean():.1f} bits"
        pictures[title] = bits.view(grid)
    shares = "a quarter", "half", "three quarters", "all"
    for quarters, share in enumerate(shares, start=1):
        prefix = decode_prefix(vqvae, fine, quarters * fine.shape[1] // 4)
        pictures[f"decoded from {share}\nof its tokens"] = prefix[0]
    own = g.cpu().numpy()
    for name, clusters in (("its own", own), ("random", random_clusters(own, rng))):
        swapped = swap_within_clusters(fine.cpu().numpy(), clusters, rng)
        swapped = torch.from_numpy(swapped).to(g.device)
        title = f"swapped within\n{name} clusters"
        pictures[title] = reconstruct(vqvae, swapped)[0]
    return {title: picture.cpu().numpy() for title, picture in pictures.items()}


def write_anatomy(path, models, test_set, class_names, sample, sample_fine, y, seed):
    """Draw to path the anatomy of a real image of class y (1,) of test_set, and of a
    sample of it with fine labels (1, T)."""
    device = models["vqvae"].codebook.device
    tokens, _ = load_tokens(path.parent, "test")
    i = (test_set.y == y).nonzero()[0, 0]
    rows = {
        "A real image": (test_set.x[i], tokens.x[i : i + 1]),
        "A sample": (sample, sample_fine),
    }
    K, M = models["aux"].config.codebook_size, models["aux"].config.clusters
    # One scale of colours for both stages: the most that either can choose among.
    most_bits = math.log2(max(M, models["aux"].members.shape[1]))
    figure = Figure(figsize=(13, 9.6), layout="constrained")
    T = sample_fine.shape[1]
    figure.suptitle(f"{T} tokens, each one of K = {K} codes in M = {M} clusters")
    rng = np.random.default_rng(seed)
    for part, (title, (image, fine)) in zip(figure.subfigures(2, 1), rows.items()):
        part.suptitle(literal(f"{title} of class {class_names[y]}"))
        axes = list(part.subplots(2, 6).flat)
        for ax in axes:
            ax.set(xticks=[], yticks=[], frame_on=False)
        scale_ax = axes.pop(5)  # the end of the first row: beside the entropies
        pictures = anatomy(models, image, fine.to(device), y.to(device), rng)
        for ax, (panel_title, picture) in zip(axes, pictures.items()):
            shown = ax.imshow(picture, vmin=0, vmax=most_bits)
            ax.set_title(panel_title)
            if picture.ndim == 2:  # entropies
                entropies = shown
        bar = scale_ax.inset_axes([0.1, 0, 0.1, 1])
        part.colorbar(entropies, cax=bar, label="entropy, bits")
    save_figure(path, figure)


if __name__ == "__main__":
    main()
