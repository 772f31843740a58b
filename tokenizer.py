"""The tokenizer: a VQ-VAE that turns an image into a grid of discrete tokens and back.

An encoder turns an image into a grid of vectors, one for each *token*. Each vector is
replaced by the nearest of K codebook vectors, its *code*. A decoder turns the grid of
codes back into an image. The index of a token's code is its *fine label*. CTF,
coarse-to-fine token prediction (arXiv 2503.16194), starts from such a tokenizer with a
large codebook. VQ-VAE: van den Oord et al. 2017. As in LlamaGen (arXiv 2406.06525), the
codes are unit vectors of only d = 8 dimensions.

    python tokenizer.py                   # coloured digits, 32x32 pixels -> 8x8 tokens
    python tokenizer.py --data cifar10    # or mnist, fashion_mnist, a folder of classes

Reads the images; writes to --out: images.pt (the images, read once for all scripts),
tokenizer.pt, tokens.pt (the fine labels of all images) and tokenizer.png. On two CPU
cores: 7 minutes, 27.5 dB (PSNR) on the test images, in which all 4096 codes occur.
The method is in the first part of the file. From "Images" on, it is data and what all
scripts share: main calls update, record, start and others, as do the main functions of
stages 1 and 2.

One image followed through all files: the first of the test set, a 0, is (3, 32, 32).
The encoder halves its height and width twice, to (48, 16, 16) and (96, 8, 8), and ends
with (d = 8, h = 8, w = 8): one unit vector for each cell of the 8x8 grid. The vector of
row 3, column 3 (counted from 0) is (0.17, 0.38, 0.22, ...). The nearest of the 4096
codes, at a distance of 0.10, is (0.17, 0.35, 0.14, ...), with index 1780. So token 27 =
3 * 8 + 3 has the fine label 1780. The whole image is 64 fine labels, 1048, 2760, 2681,
... The decoder turns their codes into an image again, with 29.0 dB. (All numbers of
this example are from one run, with one thread. Another CPU rounds differently and ends
with other codes.)

Axis legend of all files: B batch, N images, T tokens, H W pixels, h w token grid, K
codes, M clusters, S codes in the largest cluster, d code dimension, V vocabulary of the
model at hand, D features of the judge, n any number of rows; N' is the size of a second
set. y is the class of an image: what the image shows. A label is always the label of a
token. Arguments called tokens are labels, row by row of the token grid.
"""

import argparse
import hashlib
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from matplotlib import get_data_path, style
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torchvision.transforms import CenterCrop, Compose, Resize
from tqdm import tqdm

# ---------------------------------------------------------------------------- The model


@dataclass
class VQVAEConfig:
    image_size: int = 32  # pixels
    downsample: int = 4  # pixels per token along each side: a power of 2
    channels: int = 96  # at the token grid, 16 or more; halved as the grid doubles
    codebook_size: int = 4096  # K
    code_dim: int = 8  # d


class ResBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        layers = []
        for _ in range(2):
            groups = math.gcd(8, channels)  # 8, if channels is a multiple of 8
            layers += [nn.GroupNorm(groups, channels), nn.SiLU()]
            layers += [nn.Conv2d(channels, channels, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.layers(x)


def down(outer, inner):
    """Halve the size: (B, outer, H, W) -> (B, inner, H / 2, W / 2). inner is nearer to
    the token grid."""
    halve = nn.Conv2d(outer, inner, 4, stride=2, padding=1)
    return nn.Sequential(halve, ResBlock(inner))


def up(inner, outer):
    """Double the size: (B, inner, H / 2, W / 2) -> (B, outer, H, W)."""
    # PixelShuffle turns 4 channels of a cell into 2x2 pixels.
    expand = nn.Conv2d(inner, 4 * outer, 3, padding=1)
    return nn.Sequential(ResBlock(inner), expand, nn.PixelShuffle(2))


class VQVAE(nn.Module):
    """Image -> token grid -> image, through a codebook of K unit vectors."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        halvings = config.downsample.bit_length() - 1  # downsample is 2 ** halvings
        # [48, 96] by default; at least 16, for a large downsample.
        widths = [max(16, config.channels // 2**i) for i in reversed(range(halvings))]
        downs, ups = [], []
        for outer, inner in zip([3, *widths], widths):
            downs.append(down(outer, inner))  # 3 -> 48, 48 -> 96
            ups.append(up(inner, outer))  # 48 -> 3, 96 -> 48
        d, width = config.code_dim, widths[-1]
        to_codes = nn.Conv2d(width, d, 1)
        from_codes = nn.Conv2d(d, width, 3, padding=1)
        self.encoder = nn.Sequential(*downs, nn.SiLU(), to_codes)
        self.decoder = nn.Sequential(from_codes, ResBlock(width), *reversed(ups))
        # Buffers, not parameters: update_codebook moves them, and no gradient does.
        codes = F.normalize(torch.randn(config.codebook_size, d), dim=1)
        self.register_buffer("codebook", codes)  # (K, d)
        # For each code, the exponential moving average (EMA) of the number of vectors
        # that chose it, and of their sum.
        self.register_buffer("moving_count", torch.ones(len(codes)))  # (K,)
        self.register_buffer("moving_sum", codes.clone())  # (K, d)
        # Images to encode or decode at once outside training: fewer if they are large.
        self.at_once = max(32, 250 * 32**2 // config.image_size**2)
        side = config.image_size // config.downsample
        self.grid = (side, side)  # (h, w), T = h * w

    def encode(self, x):
        """Images float (B, 3, H, W), -1..1 -> unit vectors z (B, d, h, w)."""
        return F.normalize(self.encoder(x).float(), dim=1)

    def quantize(self, z):
        """Replace every vector by its nearest code; straight-through (see below).

        z: unit vectors (B, d, h, w). Returns (see VQ-VAE, equations 1 to 3)
        - z_q (B, d, h, w): the codes. Their gradient is passed to z unchanged.
        - fine int64 (B, T): the fine labels, row by row.
        - commitment: the mean of (z - code)^2 over all elements, with a gradient to z.
        The nearest code is found in float32 even under autocast: bfloat16 is too coarse
        to tell codes apart.
        """
        vectors = as_rows(z.detach())  # (B*T, d)
        # For unit vectors |z - e|^2 = 2 - 2 z.e, so the nearest code has the largest
        # dot product. The float32 table (B*T, K) is computed in chunks of rows: 4 MB
        # on a CPU, to fit in its cache; 1 GB on a GPU, to keep it busy.
        chunk = (2**20 if z.device.type == "cpu" else 2**28) // len(self.codebook)
        with torch.autocast(z.device.type, enabled=False):
            nearest = [
                (rows @ self.codebook.T).argmax(dim=1)
                for rows in vectors.split(max(1, chunk))
            ]
        fine = torch.cat(nearest).view(len(z), -1)  # (B, T)
        z_q = self.codes(fine)  # (B, d, h, w)
        # The commitment loss pulls z towards its code. VQ-VAE has a second loss that
        # pulls the code towards z. Here update_codebook does that instead.
        commitment = F.mse_loss(z, z_q)
        # argmax has no useful gradient. So the decoder's gradient is copied to z, as if
        # z_q were z (straight-through): the value of this sum is z_q, its gradient is
        # that of z.
        return z + (z_q - z).detach(), fine, commitment

    def codes(self, fine):
        """Fine labels int64 (B, T) -> their codes (B, d, h, w)."""
        return self.codebook[fine].unflatten(1, self.grid).permute(0, 3, 1, 2)

    def decode(self, z_q):
        """Codes (B, d, h, w) -> images float (B, 3, H, W), about -1..1."""
        return self.decoder(z_q).float()

    def forward(self, x):
        """Images (B, 3, H, W) -> reconstructions (B, 3, H, W), z (B, d, h, w), fine
        labels (B, T) and the commitment loss."""
        z = self.encode(x)
        z_q, fine, commitment = self.quantize(z)
        return self.decode(z_q), z, fine, commitment

    @torch.no_grad()
    def update_codebook(self, z, fine, rng, decay=0.99, dead_below=0.2):
        """Update every code by an EMA of the vectors that chose it (VQ-VAE, appendix
        A.1), and re-initialise dead codes.

        z (B, d, h, w) and fine (B, T) come from one batch; rng is a numpy Generator. A
        code becomes the direction of the EMA of the sum of its vectors, so there is no
        division by the count. A code is dead if the EMA of its count is below
        dead_below times the mean count. It is re-initialised to a random vector of z
        and the mean count, so that it has time to be chosen. Without that, half of the
        4096 codes occur in no test image: they start too far from all vectors to be
        chosen.
        """
        vectors, fine = as_rows(z), fine.flatten()  # (B*T, d), (B*T,)
        ones = torch.ones(len(fine), device=z.device)
        counts = torch.zeros_like(self.moving_count).index_add_(0, fine, ones)  # (K,)
        sums = torch.zeros_like(self.moving_sum).index_add_(0, fine, vectors)  # (K, d)
        self.moving_count.lerp_(counts, 1 - decay)
        self.moving_sum.lerp_(sums, 1 - decay)
        # Each code gets a candidate; only the dead ones use it. Its sum is the mean
        # count times this vector, as if the code had been chosen for it that often.
        mean = self.moving_count.mean()
        is_dead = self.moving_count < dead_below * mean  # (K,)
        chosen = torch.from_numpy(rng.integers(len(vectors), size=len(is_dead)))
        candidates = vectors[chosen.to(z.device)]  # (K, d)
        new_sum = torch.where(is_dead[:, None], mean * candidates, self.moving_sum)
        self.moving_count.copy_(torch.where(is_dead, mean, self.moving_count))
        self.moving_sum.copy_(new_sum)
        self.codebook.copy_(F.normalize(new_sum, dim=1))


def as_rows(z):
    """(B, d, h, w) -> (B*T, d): the vectors of all cells, row by row of the grid."""
    return z.permute(0, 2, 3, 1).flatten(0, 2)


# -------------------------------------------------------------------- Tokens and pixels


def to_float(images):
    """uint8 (B, H, W, 3), 0..255 -> float32 (B, 3, H, W), -1..1."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(x):
    """float (B, 3, H, W), -1..1 -> uint8 (B, H, W, 3), 0..255."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)


@torch.no_grad()
def tokenize(model, images):
    """Images uint8 (N, H, W, 3) -> their fine labels int64 (N, T)."""
    vectors = (model.encode(to_float(part)) for part in images.split(model.at_once))
    return torch.cat([model.quantize(z)[1] for z in vectors])  # 1: fine labels


@torch.no_grad()
def reconstruct(model, fine):
    """Fine labels int64 (N, T) -> images uint8 (N, H, W, 3)."""
    codes = (model.codes(part) for part in fine.split(model.at_once))
    return torch.cat([to_uint8(model.decode(z_q)) for z_q in codes])


def perplexity(fine):
    """The effective number of codes in fine labels of any shape, exp(entropy of their
    shares): n if n codes occur equally often, 1 if only one occurs."""
    share = fine.cpu().flatten().bincount() / fine.numel()
    return torch.special.entr(share).sum().exp().item()  # entr: -p ln p


def psnr(images, others):
    """Peak signal-to-noise ratio in dB, mean over images; uint8 (N, H, W, 3)."""
    pairs = zip(images.split(10), others.split(10))  # floats need 4 times the memory
    parts = [(a.float() - b.float()).square().mean(dim=(1, 2, 3)) for a, b in pairs]
    error = torch.cat(parts).clamp(min=1e-3)  # identical images: 78 dB, not infinity
    return (10 * (255**2 / error).log10()).mean().item()


# --------------------------------------------------------------------------- The script


def parse_args(argv):
    """The flags in argv."""
    parser, default = command_line(__doc__), VQVAEConfig()
    add, positive = parser.add_argument, number(int, 1)
    what = f"{', '.join(DATA_SETS)}, or a folder"
    add("--data", default="glyphs", help=what)
    add("--image-size", type=positive, default=default.image_size, help="pixels")
    what = "pixels per token, along each side"
    sides = [2, 4, 8, 16]
    add("--downsample", type=int, choices=sides, default=default.downsample, help=what)
    what = "network width"
    add("--channels", type=number(int, 16), default=default.channels, help=what)
    add("--codebook-size", type=positive, default=default.codebook_size, help="K")
    add("--code-dim", type=positive, default=default.code_dim, help="d")
    add_training_flags(parser, steps=600, batch_size=128, lr=2e-3)
    parser.set_defaults(keep=0)  # for record: only stages 1 and 2 have the flag --keep
    args = parser.parse_args(argv)
    if args.image_size % args.downsample:
        parser.error(f"--image-size must be a multiple of {args.downsample}")
    return args


def main(argv=None):
    args = parse_args(argv)
    device = pick_device(args.device)
    path = args.out / "tokenizer.pt"
    earlier = earlier_run(path, args)
    train_set, test_set, class_names = read_images(args.data, args.image_size)
    # So that the first n images are a fair sample of all classes.
    train_set, test_set = interleave(train_set), interleave(test_set)
    images_id = short_hash(*train_set, *test_set)  # later scripts refuse other images
    counts = f"{len(train_set.x)} + {len(test_set.x)} images"
    names = ", ".join(class_names[:10])
    print(f"{args.data}: {counts}, {len(class_names)} classes ({names}), on {device}")

    torch.manual_seed(args.seed)
    sizes = args.image_size, args.downsample, args.channels
    config = VQVAEConfig(*sizes, args.codebook_size, args.code_dim)
    model = VQVAE(config).to(device)
    optimizer = adamw(model)
    # A dict: config, settings, step, seconds, history, ids. start lists its keys.
    checkpoint = start(earlier, model, optimizer, args, images_id=images_id)
    train_set, test_set = train_set.to(device), test_set.to(device)

    first = checkpoint["step"]
    bar = tqdm(range(first, args.steps), "tokenizer", args.steps, initial=first)
    for step in bar:
        began = time.perf_counter()
        # Each step has its own generator, so that --resume draws what an uninterrupted
        # run would have drawn. It is numpy's, so that all devices see the same batches.
        rng = np.random.default_rng((args.seed, step))
        images, _ = train_set.batch(rng, args.batch_size)
        x = to_float(images)  # (B, 3, H, W)
        with autocast(device):
            x_hat, z, fine, commitment = model(x)
        loss = F.mse_loss(x_hat, x) + 0.25 * commitment  # beta of VQ-VAE
        norm = update(model, optimizer, loss, step, args)
        model.update_codebook(z.detach(), fine, rng)
        if record(checkpoint, loss, norm, began, bar, args):
            some = test_set.x[:1000]
            with autocast(device):
                fine = tokenize(model, some)
                quality = psnr(some, reconstruct(model, fine))
            scores = {"psnr": quality, "perplexity": perplexity(fine)}
            checkpoint["codebook_id"] = short_hash(model.codebook)
            save_checkpoint(path, model, optimizer, checkpoint, args, scores)

    # Without autocast: in bfloat16 some labels would differ.
    fine, test_fine = tokenize(model, train_set.x), tokenize(model, test_set.x)
    facts = {"class_names": class_names, "images_id": images_id}
    data = Path(args.data).resolve().name  # the name of a folder given as ".", too
    y, test_y = train_set.y.cpu(), test_set.y.cpu()
    images = {"train": (train_set.x.cpu(), y), "test": (test_set.x.cpu(), test_y)}
    save(args.out / "images.pt", **images, data=data, **facts)
    tokens = {"train": (fine.cpu(), y), "test": (test_fine.cpu(), test_y)}
    facts |= {"grid": model.grid, "codebook_size": args.codebook_size}
    facts["codebook_id"] = short_hash(model.codebook)
    save(args.out / "tokens.pt", **tokens, **facts)
    reconstructions = reconstruct(model, test_fine)
    quality = psnr(test_set.x, reconstructions)
    share = len(test_fine.unique()) / args.codebook_size
    print(f"test images: {quality:.2f} dB, {share:.1%} of the codes occur in them")
    rows = {"test images": test_set.x[:12], "reconstructions": reconstructions[:12]}
    title = f"PSNR of all test images: {quality:.1f} dB"
    plot_rows(args.out / "tokenizer.png", title, rows)
    print(f"wrote images.pt, tokenizer.pt, tokens.pt and tokenizer.png to {args.out}")


# ------------------------------------------------------------------------------- Images


class Examples(NamedTuple):
    """Images or tokens, together with their classes."""

    x: torch.Tensor  # images uint8 (N, H, W, 3), or tokens int64 (N, T)
    y: torch.Tensor  # classes int64 (N,)

    def to(self, device):
        """The same examples on device."""
        return Examples(self.x.to(device), self.y.to(device))

    def batch(self, rng, size):
        """size examples, each chosen uniformly at random, with replacement, by rng, a
        numpy Generator."""
        which = torch.from_numpy(rng.integers(len(self.x), size=size))
        which = which.to(self.x.device)
        return Examples(self.x[which], self.y[which])


def interleave(examples):
    """The same Examples in an order in which the classes alternate: for every n, the
    first n have the classes in the proportions of the whole set, up to a few images."""
    due = torch.empty(len(examples.y), dtype=torch.float64)
    for y, count in enumerate(examples.y.bincount()):
        # The place of example j of a class in the new order, as a fraction 0..1.
        due[examples.y == y] = (torch.arange(count) + 0.5).double() / count
    order = due.argsort(stable=True)
    return Examples(examples.x[order], examples.y[order])


DATA_SETS = "glyphs", "mnist", "fashion_mnist", "cifar10"
LAYOUT = "DATA/train/CLASS/* and DATA/test/CLASS/* (or val), or DATA/CLASS/*"


def read_images(data, image_size):
    """All images of a data set: (training Examples, test Examples, class names).

    data: one of DATA_SETS, or a folder laid out as LAYOUT says. Images are uint8
    (N, image_size, image_size, 3).
    """
    if data == "glyphs":
        train_set = Examples(*paint_glyphs(20_000, image_size, seed=0))
        test_set = Examples(*paint_glyphs(5_000, image_size, seed=1))
        return train_set, test_set, list("0123456789")
    if data not in DATA_SETS:
        return read_folder(Path(data), image_size)
    names = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}
    if image_size != 32:
        fail(f"--image-size {image_size}: the images of {data} have 32 pixels")
    known = getattr(torchvision.datasets, names[data])
    sets = []
    for train in (True, False):
        dataset = known("data", train, download=True)
        images, y = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)
        if images.ndim == 3:  # grey (N, 28, 28): padded to 32, three equal channels
            images = F.pad(images, (2, 2, 2, 2))[..., None].expand(-1, -1, -1, 3)
        sets.append(Examples(images.contiguous(), y))
    return *sets, list(dataset.classes)


def read_folder(root, image_size):
    """read_images for a folder."""
    files, class_names = find_images(root)
    resize = Compose([Resize(image_size), CenterCrop(image_size)])
    read = lambda pair: np.array(resize(read_image(pair[0])))
    sets = []
    for pairs in files:
        images = np.empty((len(pairs), image_size, image_size, 3), np.uint8)
        with ThreadPoolExecutor() as pool:  # Pillow decodes in parallel
            bar = tqdm(pool.map(read, pairs), f"read {root}", len(pairs))
            for i, image in enumerate(bar):
                images[i] = image
        y = torch.tensor([y for _, y in pairs])
        sets.append(Examples(torch.from_numpy(images), y))
    return *sets, class_names


def find_images(root):
    """([training pairs, test pairs], class names). A pair: (file, class number)."""
    splits = {path.name.lower(): class_files(path) for path in visible(root)}
    train = splits.get("train")
    test = splits.get("test") or splits.get("val")  # {}: no folders of classes
    if not train or not test:  # every tenth file of a class is held out
        train, test = {}, {}
        for name, paths in class_files(root).items():
            train[name] = [path for i, path in enumerate(paths) if i % 10]
            test[name] = paths[::10]
    names = sorted(train | test)
    if not names:
        fail(f"--data {root}: no folders of classes; expected {LAYOUT}")
    pairs = []
    for split, files in (("training", train), ("test", test)):
        for name in names:
            if not files.get(name):
                fail(f"{root}: no {split} images of class {name}; expected {LAYOUT}")
        own = [(path, y) for y, name in enumerate(names) for path in files[name]]
        order = np.random.default_rng(0).permutation(len(own))  # neighbours look alike
        pairs.append([own[i] for i in order])
    return pairs, names


def class_files(folder):
    """{class name: sorted files} of folder/CLASS/*."""
    files = {path.name: visible(path) for path in visible(folder) if path.is_dir()}
    folders = [path for own in files.values() for path in own if path.is_dir()]
    if folders:
        fail(f"{folders[0]} is a folder where images should be; expected {LAYOUT}")
    return files


def visible(folder):
    """What is in folder, sorted, without .DS_Store, .ipynb_checkpoints, __MACOSX ..."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [p for p in paths if not p.name.startswith(".") and p.name != "__MACOSX"]


def read_image(path):
    """The image in a file, as a PIL image in RGB. Fails if it cannot be read."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode in ("I", "F"):
                raise ValueError("it is grey with 32 bits per pixel")
            if image.mode.startswith("I;16"):  # grey with 16 bits: PIL would clip it
                x = np.asarray(image) / 257  # from 0..65535 to 0..255
                image = Image.fromarray(x.round().astype(np.uint8))
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return image.convert("RGB")
    except Exception as error:  # noqa: BLE001  Pillow raises a dozen kinds
        fail(f"{path} cannot be used: {error}; remove or convert it")


# Text fonts that ship inside matplotlib.
GLYPH_FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmb10", "cmr10", "cmss10", "cmtt10"),
)


def paint_glyphs(count, image_size, seed):
    """Bright digits on dark gradients, slightly rotated, slanted, zoomed and shifted.

    Returns images uint8 (count, H, W, 3) and their digits int64 (count,). Every digit
    occurs equally often, if count is a multiple of 10. The same seed and count paint
    the same images (up to the rounding of the CPU). All seeds share the fonts.
    """
    rng = np.random.default_rng((seed, count))
    y = torch.from_numpy(rng.permutation(np.arange(count) % 10))
    fonts = torch.from_numpy(rng.integers(len(GLYPH_FONTS), size=count))
    turn, slant = rng.normal(0, 0.1, (2, count))  # radians, and a slope
    zoom = rng.uniform(0.85, 1.1, count)
    dx, dy = rng.uniform(-0.1, 0.1, (2, count))  # in half widths of the image
    # An affine map from a place in the image to a place in the glyph: slant, rotate,
    # divide by the zoom, shift.
    cos = np.cos(turn) / zoom
    sin = np.sin(turn) / zoom
    affine = np.stack([cos, slant * cos - sin, dx, sin, slant * sin + cos, dy], axis=1)
    affine = torch.from_numpy(affine.reshape(count, 2, 3)).float()
    # Three colours per image: the ink and both ends of the background gradient.
    hue = rng.random((count, 3))
    saturation = rng.uniform(0.6, 1, (count, 3))
    value = rng.uniform((1, 0, 0), (1, 0.35, 0.35), (count, 3))  # bright ink, dark ends
    colors = hsv_to_rgb(np.stack([hue, saturation, value], axis=-1))
    colors = torch.from_numpy(colors).float()[..., None, None]  # (count, 3, rgb, 1, 1)
    angle = torch.from_numpy(rng.uniform(0, 2 * np.pi, (count, 1, 1, 1))).float()
    across = torch.linspace(-0.5, 0.5, image_size)
    # Painted at twice the resolution and averaged down, for smooth edges.
    size = 2 * image_size
    masters = glyph_masters(size)
    images = torch.empty(count, image_size, image_size, 3, dtype=torch.uint8)
    for part in torch.arange(count).split(1000):
        shape = (len(part), 1, size, size)
        grid = F.affine_grid(affine[part], shape, align_corners=False)
        glyphs = masters[fonts[part], y[part]][:, None]  # (n, 1, 2H, 2W)
        mask = F.avg_pool2d(F.grid_sample(glyphs, grid, align_corners=False), 2)
        ink, start, end = colors[part].unbind(1)  # (n, rgb, 1, 1)
        ramp_down = angle[part].sin() * across[:, None]  # (n, 1, H, 1)
        ramp = angle[part].cos() * across + ramp_down  # (n, 1, H, W)
        background = torch.lerp(start, end, (ramp + 0.5).clamp(0, 1))  # (n, rgb, H, W)
        painted = torch.lerp(background, ink, mask).permute(0, 2, 3, 1)
        images[part] = (painted * 255).round().byte()
    return images, y


def glyph_masters(size):
    """Every digit in every font, near the centre and of about the same height, as masks
    0..1: float (fonts, 10, size, size)."""
    folder = Path(get_data_path(), "fonts", "ttf")
    masters = torch.empty(len(GLYPH_FONTS), 10, size, size)
    for i, name in enumerate(GLYPH_FONTS):
        font = ImageFont.truetype(folder / f"{name}.ttf", size)
        for digit in range(10):
            _, top, _, bottom = font.getbbox(str(digit))
            fitted = font.font_variant(size=round(0.8 * size * size / (bottom - top)))
            left, top, right, bottom = fitted.getbbox(str(digit))
            corner = ((size - left - right) / 2, (size - top - bottom) / 2)
            canvas = Image.new("L", (size, size))
            ImageDraw.Draw(canvas).text(corner, str(digit), fill=255, font=fitted)
            masters[i, digit] = torch.from_numpy(np.array(canvas)) / 255
    return masters


# -------------------------------------------------- Shared by all scripts: the training


def adamw(model):
    """AdamW with LlamaGen's settings: weight decay on matrices and convolutions, none
    on norm gains and biases. update sets the learning rate of every step."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}]
    groups += [{"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def learning_rate(step, steps, peak, warmup=50):
    """Linear warm-up, then a cosine from peak down to a tenth of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)  # 0 .. 1
    return peak * (0.55 + 0.45 * math.cos(math.pi * progress))  # from 1 to 0.1 of peak


def update(model, optimizer, loss, step, args):
    """One optimizer step, with the gradient norm clipped to 1. Returns the norm before
    clipping, a 0-d tensor."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, args.steps, args.lr)
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return norm


def record(checkpoint, loss, norm, began, bar, args):
    """Add a step to checkpoint: its number, loss and seconds (without measuring and
    saving). Returns whether it is time to measure and save: every --save-every steps,
    at the end, and when a copy of --keep is due. Ends the script if norm, the gradient
    norm, is not finite."""
    loss, norm = torch.stack([loss.detach(), norm]).tolist()
    if not math.isfinite(norm):  # the weights are spoiled, but not yet saved
        where = f"the gradient norm of step {checkpoint['step']} is {norm}"
        fail(f"{where}: try a lower --lr (the last save, if there was one, is intact)")
    checkpoint["history"]["loss"].append(loss)
    if checkpoint["step"] > bar.initial:  # the first step is not timed: it warms up
        checkpoint["seconds"] += time.perf_counter() - began
    checkpoint["step"] += 1
    step = checkpoint["step"]
    bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
    return step % args.save_every == 0 or step == args.steps or copy_due(step, args)


def copy_due(step, args):
    """Which of the --keep evenly spaced copies is due after this step; 0 if none is.
    With --keep 3 in 600 steps: 1, 2, 3 after steps 200, 400, 600."""
    index, rest = divmod(step * args.keep, args.steps)
    return index if rest < args.keep else 0  # only the first step with this index


def copies(path):
    """The files that --keep wrote for the run in path: kept-01/NAME, kept-02/NAME."""
    return sorted(path.parent.glob(f"kept-[0-9][0-9]/{path.name}"))


def earlier_run(path, args):
    """The checkpoint in path that --resume continues; None for a new run.

    Called before anything else is read. A run that is already there is never replaced
    unasked: without --resume or --overwrite the script ends in one line.
    """
    if args.resume:
        if not path.exists():
            fail(f"--resume: {path} is missing")
        return load(path.parent, path.name, mmap=False)  # save will replace the file
    if args.overwrite:
        return None
    ways = "--overwrite begins anew, another --out keeps both"
    if path.exists():
        found = load(path.parent, path.name)
        done = f"step {found['step']} of {found['settings']['steps']}"
        fail(f"{path} holds a run ({done}): --resume continues it, {ways}")
    if kept := copies(path):
        fail(f"{kept[0]} is a copy of an earlier run: {ways}")
    return None


def start(earlier, model, optimizer, args, **ids):
    """The checkpoint from which training starts. If there is an earlier run, its states
    are loaded into model and optimizer. Fails if that run had other flags or other ids.

    A checkpoint is a dict: config (the fields of the model's config); settings (the
    flags and ids, for --resume); the ids of what the model is trained on; step;
    seconds; and history, {"loss": [one per step], "test": [a dict per save]}.
    save_checkpoint adds model and optimizer, their states, and weights_id.
    """
    # What may change when a run is resumed. (The data are known by their images_id.)
    free = "out", "data", "device", "save_every", "keep", "resume", "overwrite"
    settings = {k: v for k, v in vars(args).items() if k not in free} | ids
    if earlier is None:
        history = {"loss": [], "test": []}
        progress = {"step": 0, "seconds": 0.0, "history": history}
    else:
        for name, value in settings.items():
            before = earlier["settings"].get(name)
            if before != value:
                where = earlier["path"]
                fail(f"--resume: {where} was trained with {name} {before}, not {value}")
        model.load_state_dict(earlier["model"])
        optimizer.load_state_dict(earlier["optimizer"])
        progress = {name: earlier[name] for name in ("step", "seconds", "history")}
    return {"config": asdict(model.config), "settings": settings, **ids, **progress}


def save_checkpoint(path, model, optimizer, checkpoint, args, scores):
    """Add scores, {name: number} of test images, to the history, and save what later
    scripts and --resume need; also a copy of --keep, if one is due."""
    step, rows = checkpoint["step"], checkpoint["history"]["test"]
    rows.append({"step": step, "seconds": checkpoint["seconds"], **scores})
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    weights_id = short_hash(*states["model"].values())
    everything = states | {"weights_id": weights_id} | checkpoint
    save(path, **everything)
    if len(rows) == 1:  # a new run: with --overwrite, the copies of the old one go, too
        for copy in copies(path):
            copy.unlink()
    if index := copy_due(step, args):
        save(path.parent / f"kept-{index:02d}" / path.name, **everything)
    text = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
    tqdm.write(f"step {step}, on test images: {text}")


# ------------------------------------------------------------------- Shared: artifacts

WRITTEN_BY = {
    "images.pt": "tokenizer.py (with --resume, if it was stopped)",
    "tokenizer.pt": "tokenizer.py",
    "tokens.pt": "tokenizer.py (with --resume, if it was stopped)",
    "clusters.pt": "cluster.py",
    "coarse.pt": "ar_model.py",
    "baseline.pt": "ar_model.py --labels fine",
    "fine.pt": "aux_model.py",
    "samples.pt": "sample.py",
    "samples-baseline.pt": "sample.py --model baseline",
    "classifier.pt": "evaluate.py (delete the file first)",
}


def find(out, name):
    """The path of an artifact: in the folder out, or else in the nearest folder above
    it. So a variant in out/M512 needs only the artifacts in which it differs from
    out."""
    if (out / name).exists():
        return out / name
    for folder in out.resolve().parents:
        if (folder / name).exists():
            print(f"using {folder / name}")
            return folder / name
    return out / name


def load(out, name, mmap=True, **ids):
    """The artifact in the file that find returns: a dict, with tensors on the CPU, the
    file itself as "path", and "train" and "test" as Examples.

    With mmap, tensors are read when they are used: sampling never reads the states of
    the optimizers. Fails if the file is missing or unreadable, or if its ids
    (images_id, codebook_id, cluster_id ...) differ from these.
    """
    path = find(out, name)
    script = WRITTEN_BY[name]
    if not path.exists():
        fail(f"{path} is missing: run python {script} first")
    try:
        artifact = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # noqa: BLE001  a damaged file raises a dozen kinds
        kind = type(error).__name__
        fail(f"{path} is unreadable ({kind}): delete it and run python {script} again")
    if "step" in artifact and path == out / name:  # never a training of a folder above
        script += " --overwrite"
    for key, value in ids.items():
        if artifact.get(key) != value:
            differs = f"{key} {artifact.get(key)}, not {value}"
            fail(f"{path} does not belong here ({differs}): run python {script}")
    for split in {"train", "test"} & artifact.keys():
        artifact[split] = Examples(*artifact[split])
    return artifact | {"path": path}


def load_tokenizer(out, device):
    """(VQVAE in eval mode on device, the artifact) of tokenizer.pt."""
    artifact = load(out, "tokenizer.pt")
    return restore(VQVAE(VQVAEConfig(**artifact["config"])), artifact, device), artifact


def restore(model, artifact, device):
    """model in eval mode on device, with the weights of artifact. Says so if these are
    of an unfinished training."""
    if "step" in artifact and artifact["step"] < artifact["settings"]["steps"]:
        step, steps = artifact["step"], artifact["settings"]["steps"]
        print(f"{artifact['path']} is unfinished: step {step} of {steps}")
    model.load_state_dict(artifact["model"])
    return model.eval().to(device)


def save(path, **artifact):
    """Write an artifact. A temporary name first: an interrupted write keeps the old
    file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    torch.save(artifact, temporary)
    temporary.replace(path)


def short_hash(*tensors):
    """12 hex digits that identify the content of tensors."""
    content = hashlib.sha256()
    for tensor in tensors:
        content.update(tensor.cpu().contiguous().numpy())
    return content.hexdigest()[:12]


@contextmanager
def picture(path, width, height):
    """A new Figure of width x height inches, which is saved as path at the end of the
    block. It does not depend on the user's matplotlibrc, and $ in a class name is
    literal."""
    with style.context(["default", {"text.parse_math": False}]):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.savefig(path, bbox_inches="tight", dpi=110)


def plot_rows(path, title, rows):
    """A row of images for each of rows, {name: images uint8 (n, H, W, 3)}."""
    columns = max(len(row) for row in rows.values())
    with picture(path, 2 + columns, 0.5 + len(rows)) as figure:
        figure.suptitle(title)
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for ax in grid.flat:
            ax.set(xticks=[], yticks=[], frame_on=False)
        for axes, (name, row) in zip(grid, rows.items()):
            axes[0].set_ylabel(name, rotation=0, ha="right", va="center")
            for ax, image in zip(axes, row.cpu().numpy()):
                ax.imshow(image)


# ------------------------------------------------------- Shared: flags and the device


def command_line(doc):
    """An argparse parser with the flags of all scripts; doc: the module's docstring."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    title = doc.partition("\n")[0]
    parser = argparse.ArgumentParser(description=title, formatter_class=formatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("out"), help="folder of artifacts")
    add("--seed", type=number(int, 0), default=0, help="random seed")
    devices = ["auto", "cpu", "cuda", "mps"]
    add("--device", choices=devices, default="auto", help="where to run")
    return parser


def add_training_flags(parser, steps, batch_size, lr):
    """Add the flags of the three training scripts to an argparse parser."""
    add = parser.add_argument
    add("--steps", type=number(int, 1), default=steps, help="training steps")
    add("--batch-size", type=number(int, 1), default=batch_size, help="images per step")
    add("--lr", type=number(float, 1e-9), default=lr, help="peak learning rate")
    what = "steps between evaluations and saves"
    add("--save-every", type=number(int, 1), default=200, help=what)
    add = parser.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help="continue the run in --out")
    add("--overwrite", action="store_true", help="replace the run in --out")


def number(kind, least, most=1e9):
    """An argparse type: a number of this kind, int or float, from least to most."""

    def parse(text):
        """The number that text is; fails if it is out of range."""
        value = kind(text)
        if not least <= value <= most:  # nan, too
            message = f"{text} is not in {least:g} .. {most:g}"
            raise argparse.ArgumentTypeError(message)
        return value

    parse.__name__ = kind.__name__  # argparse: "invalid int value"
    return parse


def pick_device(name):
    """The torch.device called name; "auto" is cuda, mps or cpu, the first there is."""
    if name == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else mps
    return torch.device(name)


def autocast(device):
    """A context in which a GPU with native bfloat16 multiplies matrices in bfloat16.
    Elsewhere it does nothing: products are in float32."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(
        including_emulation=False
    )
    return torch.autocast(device.type, torch.bfloat16, enabled=native)


def fail(message):
    """End the script with one line on stderr and exit code 1."""
    raise SystemExit(f"error: {message}")


def run(main, trains=False):
    """Run a script's main; Ctrl-C ends it in one line."""
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace")  # class names on old terminals
    try:
        main()
    except KeyboardInterrupt:
        advice = " (--resume continues from the last save, if there is one)"
        fail(f"stopped{advice if trains else ''}")


if __name__ == "__main__":
    run(main, trains=True)
