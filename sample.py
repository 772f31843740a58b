"""Sampling: coarse labels one by one, all fine labels in one pass, then pixels.

T + 1 steps (arXiv 2503.16194, figure 1c). The baseline (--model baseline) takes T steps
over the fine labels themselves.

    python sample.py                                 # 2,000 images of all classes
    python sample.py --out out/few --classes 3 7     # only these classes
    python sample.py --out out/argmax --fine-top-k 1 # the most probable fine labels
    python sample.py --num-samples 50000 --export    # files for other FID programs

Reads tokenizer.pt and tokens.pt; clusters.pt, coarse.pt and fine.pt, or for the
baseline baseline.pt; images.pt for --export. Writes samples.pt (images uint8
(N, H, W, 3), classes (N,), coarse and fine labels (N, T)) and samples.png; for the
baseline samples-baseline.pt and .png; with --export also the folder export/. On two CPU
cores: 90 to 150 images/s.

A new image from beginning to end: class 0. 64 steps of stage 1 sample 64 coarse labels,
69, 113, 53, 68, ... (For guidance each step runs with and without the class.) Token 27
gets 67, a cluster of 65 codes. One step of stage 2 samples a code of each token's
cluster: 1393, 2060, 1052, ... Token 27 gets 706. The decoder turns the codes (d = 8, h
= 8, w = 8) into (3, 32, 32) pixels.
"""

import shutil
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

# isort: off
from tokenizer import VQVAE, autocast, load, load_tokenizer, plot_rows, restore, save
from tokenizer import to_uint8
from tokenizer import command_line, fail, number, pick_device, run
from ar_model import ARConfig, ARModel, Sampling, generate
from aux_model import AuxConfig, AuxModel, predict_fine

FILES = {"ctf": "samples.pt", "baseline": "samples-baseline.pt"}
# The defaults of stage 1 or the baseline (guidance 2 gives the default stage 1 its
# lowest FD on digits), and of stage 2 (sampled fine labels, as in the paper).
STAGE1, STAGE2 = Sampling(cfg_scale=2.0), Sampling()

# --------------------------------------------------------------- From classes to pixels


@dataclass
class Models:
    """The networks of a run."""

    vqvae: VQVAE
    ar: ARModel  # stage 1, or the baseline
    aux: AuxModel | None = None  # stage 2; None for the baseline


@torch.no_grad()
def sample_images(models, y, generator, stage1=STAGE1, stage2=STAGE2):
    """Sample one image for each class in y int64 (B,), on the device of models.

    stage1 is the Sampling of stage 1 or of the baseline, stage2 that of stage 2. Both
    stages use the same generator, stage 1 first. Returns images uint8 (B, H, W, 3),
    coarse labels int64 (B, T) (None for the baseline) and fine labels int64 (B, T).
    """
    with autocast(y.device):
        labels = generate(models.ar, y, generator, stage1)  # T steps: (B, T)
        if models.aux is None:
            coarse, fine = None, labels
        else:
            coarse = labels
            fine = predict_fine(models.aux, coarse, y, generator, stage2)  # 1 step
    images = to_uint8(models.vqvae.decode(models.vqvae.codes(fine)))  # in float32
    return images, coarse, fine


def sample_batches(models, y, seed, stage1=STAGE1, stage2=STAGE2, batch_size=100):
    """sample_images for any number of classes y (N,), batch by batch.

    The same seed and batch size give the same images on the same machine. Returns
    images, coarse and fine labels, all on the CPU, and images per second (without the
    first batch, if there are several: it includes the warm-up).
    """
    device = models.vqvae.codebook.device
    generator = torch.Generator(device).manual_seed(seed)
    batches, seconds = [], []
    for part in tqdm(y.split(batch_size), "sample", unit="batch"):
        began = time.perf_counter()
        batch = sample_images(models, part.to(device), generator, stage1, stage2)
        batches.append([None if x is None else x.cpu() for x in batch])
        seconds.append(time.perf_counter() - began)
    images, coarse, fine = zip(*batches)
    coarse = None if models.aux is None else torch.cat(coarse)
    counted = slice(1, None) if len(seconds) > 1 else slice(None)
    speed = sum(map(len, images[counted])) / sum(seconds[counted])
    return torch.cat(images), coarse, torch.cat(fine), speed


# --------------------------------------------------------------------------- The script


def load_models(out, name, device):
    """For "ctf" or "baseline": the Models in eval mode on device, and their artifacts,
    {"vqvae", "ar", "aux" (CTF only): dict}. Fails if these do not belong together."""
    vqvae, artifact = load_tokenizer(out, device)
    ids = {"codebook_id": artifact["codebook_id"]}
    file = "baseline.pt"
    if name == "ctf":
        clusters = load(out, "clusters.pt", **ids)
        ids["cluster_id"] = clusters["cluster_id"]
        file = "coarse.pt"
    artifacts = {"vqvae": artifact, "ar": load(out, file, **ids)}
    ar = ARModel(ARConfig(**artifacts["ar"]["config"]))
    models = Models(vqvae, restore(ar, artifacts["ar"], device))
    if name == "ctf":
        artifacts["aux"] = load(out, "fine.pt", **ids)
        config = AuxConfig(**artifacts["aux"]["config"])
        aux = AuxModel(config, clusters["code_to_cluster"])
        models.aux = restore(aux, artifacts["aux"], device)
    return models, artifacts


def weights_of(artifacts):
    """{network: weights_id}: evaluate.py checks that these weights made the samples."""
    return {name: artifact["weights_id"] for name, artifact in artifacts.items()}


def name_of(samples):
    """How a sample file was made, in words: "CTF, argmax fine labels, guidance 2", and
    the other settings that differ from the defaults."""
    stage1, stage2 = samples["stage1"], samples["stage2"]
    how = "argmax" if stage2.get("top_k") == 1 else "sampled"
    words = ["CTF", f"{how} fine labels"] if stage2 else ["baseline"]
    words.append(f"guidance {stage1['cfg_scale']:g}")
    for name in ("temperature", "top_k", "top_p"):
        if stage1[name] != getattr(STAGE1, name):
            words.append(f"{name} {stage1[name]:g}")
    for name, value in stage2.items():
        is_argmax = name == "top_k" and value == 1  # said above
        if value != getattr(STAGE2, name) and not is_argmax:
            words.append(f"fine {name} {value:g}")
    return ", ".join(words)


SAMPLING_FLAGS = {
    "cfg_scale": (number(float, 0), "guidance; 1 is off"),
    "temperature": (number(float, 1e-6), "below 1, likely labels become likelier"),
    "top_k": (number(int, 0), "labels to choose from; 1 is the argmax, 0 is off"),
    "top_p": (number(float, 1e-6, 1), "nucleus sampling; 1 is off"),
}


def parse_args(argv):
    """The flags in argv, and from them the Sampling of stage 1 and of stage 2."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--model", choices=list(FILES), default="ctf", help="what to sample")
    add("--num-samples", type=number(int, 1), default=2000, help="number of images")
    add("--batch-size", type=number(int, 1), default=100, help="images per batch")
    add("--classes", nargs="+", help="names; None: as in the test set")
    add("--export", action="store_true", help="also write .npz and PNG files")
    for prefix, usual in (("", STAGE1), ("fine-", STAGE2)):
        title = "stage 2" if prefix else "stage 1, or the baseline"
        add = parser.add_argument_group(title).add_argument
        for name, default in asdict(usual).items():
            kind, what = SAMPLING_FLAGS[name]
            flag = f"--{prefix}{name}".replace("_", "-")
            add(flag, type=kind, default=default, help=what)
    args = parser.parse_args(argv)
    names = list(SAMPLING_FLAGS)
    stage1 = Sampling(**{name: getattr(args, name) for name in names})
    stage2 = Sampling(**{name: getattr(args, f"fine_{name}") for name in names})
    if args.model == "baseline" and stage2 != STAGE2:
        parser.error("the baseline has no stage 2: drop the --fine flags")
    return args, stage1, stage2


def main(argv=None):
    args, stage1, stage2 = parse_args(argv)
    device = pick_device(args.device)
    models, artifacts = load_models(args.out, args.model, device)
    ids = {name: artifacts["vqvae"][name] for name in ("codebook_id", "images_id")}
    tokens = load(args.out, "tokens.pt", **ids)
    class_names = tokens["class_names"]
    y = choose_classes(args.classes, args.num_samples, tokens["test"].y, class_names)
    if args.export:  # before the sampling: the file may be missing
        real = load(args.out, "images.pt", images_id=ids["images_id"])["test"]
    images, coarse, fine, speed = sample_batches(
        models, y, args.seed, stage1, stage2, args.batch_size
    )
    path = args.out / FILES[args.model]
    samples = {
        "model": args.model,
        "images": images,
        "classes": y,
        "coarse": coarse,
        "fine": fine,
        "stage1": asdict(stage1),
        "stage2": {} if models.aux is None else asdict(stage2),
        "seed": args.seed,
        "batch_size": args.batch_size,
        "images_per_second": speed,
        "weights": weights_of(artifacts),
    }
    save(path, **samples)
    print(f"wrote {path}: {speed:.0f} images/s")
    if args.export:
        export(args.out / "export" / "real", real.x)
        export(args.out / "export" / path.stem, images)
    title = f"{name_of(samples)}, seed {args.seed}"
    shown = y.unique()[:10].tolist()
    rows = {f"class {class_names[c]}": images[y == c][:10] for c in shown}
    plot_rows(path.with_suffix(".png"), title, rows)


def choose_classes(wanted, count, test_classes, class_names):
    """Classes int64 (count,): those with the wanted names in turn, or by default
    test_classes (N,) in their order. Fails if one is unknown."""
    if not wanted:
        return test_classes[torch.arange(count) % len(test_classes)]
    for name in wanted:
        if name not in class_names:
            fail(f"--classes {name}: there are {', '.join(class_names)}")
    numbers = torch.tensor([class_names.index(name) for name in wanted])
    return numbers[torch.arange(count) % len(numbers)]


def export(folder, images):
    """Write images uint8 (N, H, W, 3) to folder.npz (as arr_0) and to folder/*.png."""
    shutil.rmtree(folder, ignore_errors=True)  # an earlier run may have more images
    folder.mkdir(parents=True)
    np.savez(f"{folder}.npz", arr_0=images.numpy())
    for i, image in enumerate(tqdm(images.numpy(), f"write {folder}")):
        Image.fromarray(image).save(folder / f"{i:06d}.png")


if __name__ == "__main__":
    run(main)
