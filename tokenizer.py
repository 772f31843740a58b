"""The tokenizer: a VQ-VAE that turns an image into a grid of discrete tokens and back.

An encoder makes a vector of each cell of a grid, each vector is replaced by the nearest
of K learnt codewords, and a decoder paints the image from these. A token is the number
of its codeword, its *fine label*. CTF (arXiv 2503.16194) starts from such a tokenizer
with a large codebook. VQ-VAE: van den Oord et al. 2017; the codes here are unit vectors
of only d = 8 dimensions, as in LlamaGen (arXiv 2406.06525).

    python tokenizer.py                   # painted digits, 32x32 pixels -> 8x8 tokens
    python tokenizer.py --data cifar10    # mnist, fashion_mnist, a folder of classes

Reads images; writes tokenizer.pt, tokens.pt (the fine labels of the whole data set) and
tokenizer.png to --out. On two CPU cores: 4 minutes, 27 dB on the test images, nearly
all of the 4096 codes in use.

One image all the way, the first of the test set, a 0: (3, 32, 32). The encoder halves it
twice, (48, 16, 16) and (96, 8, 8), and ends in 8x8 vectors of d = 8 numbers and length 1.
That of row 3, column 3 is (0.18, 0.48, 0.06, ...). The nearest of 4096 codes, 0.13 away,
is (0.26, 0.41, 0.10, ...), code 1181. So token 27 is 1181, the whole image is 64 such
numbers, 1607, 250, 2315, ..., and the decoder makes it from their codes: 28.0 dB. (From
one run, which the other files follow further; another CPU ends in other codes.)

Axis legend of all files: B batch, N images, T tokens, C channels, H W pixels, h w token
grid, K codewords, M clusters, d code dimension, V vocabulary of the model at hand.
y is the class of an image, what it shows; every other label is a token's.
"""

import argparse
import hashlib
import math
import os
import re
import signal
import sys
import textwrap
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from glob import glob
from pathlib import Path
from typing import NamedTuple

if "IPython" not in sys.modules:  # a notebook's backend may be missing in its !python
    os.environ.pop("MPLBACKEND", None)
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure  # the other files take it from here
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torchvision.transforms import CenterCrop, Compose, Resize
from tqdm import tqdm

# --------------------------------------------------------------------------------------
# The model


@dataclass
class VQVAEConfig:
    image_size: int = 32  # pixels
    downsample: int = 4  # pixels per token, along each side: a power of 2
    channels: int = 96  # at the token grid; half as many each time the grid doubles
    codebook_size: int = 4096  # K
    code_dim: int = 8  # d


class ResBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        layers = []
        for _ in range(2):
            # 8 groups, or the most that divide both 8 and channels.
            layers += [nn.GroupNorm(math.gcd(8, channels), channels), nn.SiLU()]
            layers += [nn.Conv2d(channels, channels, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.layers(x)


class Down(nn.Sequential):
    """Half the size: (B, before, H, W) -> (B, width, H / 2, W / 2)."""

    def __init__(self, before, width):
        halve = nn.Conv2d(before, width, 4, stride=2, padding=1)
        super().__init__(halve, ResBlock(width))


class Up(nn.Sequential):
    """Twice the size: (B, width, H / 2, W / 2) -> (B, before, H, W)."""

    def __init__(self, width, before):
        # The shuffle turns 4 channels of a cell into its 2x2 pixels.
        expand = nn.Conv2d(width, 4 * before, 3, padding=1)
        super().__init__(ResBlock(width), expand, nn.PixelShuffle(2))


class VQVAE(nn.Module):
    """Image -> token grid -> image, by way of a codebook E of K unit vectors."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        halvings = config.downsample.bit_length() - 1  # downsample is 2 ** halvings
        # By default two levels of 48 and 96 channels, from the pixels inwards; under 16
        # a convolution sees little.
        widths = [max(16, config.channels // 2**i) for i in reversed(range(halvings))]
        downs, ups = [], []
        before = 3
        for width in widths:  # by default 3 -> 48 -> 96, and in the decoder back
            downs.append(Down(before, width))
            ups.append(Up(width, before))
            before = width
        inner, d = widths[-1], config.code_dim
        to_codes = nn.Conv2d(inner, d, 1)
        from_codes = nn.Conv2d(d, inner, 3, padding=1)
        self.encoder = nn.Sequential(*downs, nn.SiLU(), to_codes)
        self.decoder = nn.Sequential(from_codes, ResBlock(inner), *reversed(ups))
        # Buffers, not parameters: no gradient reaches the codes, update_codebook moves
        # them.
        codes = F.normalize(torch.randn(config.codebook_size, d), dim=1)
        self.register_buffer("codebook", codes)  # E, (K, d)
        # Of the vectors that chose each code: how many, and their sum (moving averages).
        self.register_buffer("moving_count", torch.ones(len(codes)))  # (K,)
        self.register_buffer("moving_sum", codes.clone())  # (K, d)
        # Images measured at a time: of large ones fewer, which take no more memory.
        self.at_once = max(1, 250 * 32**2 // max(32, config.image_size) ** 2)
        side = config.image_size // config.downsample
        self.grid = (side, side)  # (h, w), T = h * w

    def encode(self, x):
        """Images float (B, 3, H, W), -1..1 -> unit vectors (B, d, h, w)."""
        return F.normalize(self.encoder(x).float(), dim=1)

    def quantize(self, z):
        """Replace every vector by the nearest codeword, with a straight-through step.

        z: unit vectors (B, d, h, w). Returns the codes z_q (B, d, h, w), which hand
        their gradient on to z unchanged; the fine labels int64 (B, T) row by row; and
        the commitment loss, whose gradient reaches z: the squared difference of z and
        its code, mean over all B d h w elements (VQ-VAE, equations 1 to 3). Under
        autocast the nearest code is still found in float32.
        """
        # |z - e|^2 = |z|^2 + |e|^2 - 2 z.e = 2 - 2 z.e for unit vectors: the nearest e
        # has the largest product z.e. Some vectors at a time, since the table (B*T, K)
        # of all products may not fit in memory, and is read 2 to 3 times as fast if it
        # fits in a CPU's cache (4 MB); a GPU needs many products to be busy.
        products = 2**20 if z.device.type == "cpu" else 2**28
        size = max(1, products // len(self.codebook))
        pieces = as_rows(z.detach()).split(size)  # (<=size, d)
        # In float32 even under autocast: bfloat16 cannot tell similar products apart.
        # (max finds the place of the largest sooner than argmax does.)
        with torch.autocast(z.device.type, enabled=False):
            fine = torch.cat([(p @ self.codebook.T).max(dim=1).indices for p in pieces])
        fine = fine.view(len(z), -1)  # (B, T)
        z_q = self.codes(fine)  # (B, d, h, w)
        # It pulls z towards its code, so that the encoder does not run away from codes
        # that can only follow. VQ-VAE has a second loss that pulls the code towards z:
        # the moving averages of update_codebook stand in for it. The codebook takes no
        # gradient, so nothing needs to be detached here.
        commitment = F.mse_loss(z, z_q)
        # "Nearest" has no gradient: a small step of z changes nothing, a larger one the
        # code at once. So the decoder's gradient skips it and goes to z as if z_q were
        # z (straight-through): forward this is z_q, backward it is z.
        return z + (z_q - z).detach(), fine, commitment

    def codes(self, fine):
        """Fine labels int64 (B, T) -> their codewords (B, d, h, w)."""
        return self.codebook[fine].unflatten(1, self.grid).permute(0, 3, 1, 2)

    def decode(self, z_q):
        """Codes (B, d, h, w) -> images float (B, 3, H, W), about -1..1."""
        return self.decoder(z_q).float()

    def forward(self, x, quantized=True):
        """Images (B, 3, H, W) -> reconstructions, z (B, d, h, w), fine labels (B, T)
        and the commitment loss. Not quantized: a plain autoencoder, no fine labels."""
        z = self.encode(x)
        if not quantized:
            return self.decode(z), z, None, 0.0
        z_q, fine, commitment = self.quantize(z)
        return self.decode(z_q), z, fine, commitment

    # The codebook learns without gradients, from the vectors that chose each code.

    @torch.no_grad()
    def update_codebook(self, z, fine, rng, decay=0.99, dead=0.02):
        """Move each code to the mean direction of the vectors that chose it.

        z (B, d, h, w) and fine (B, T) are a batch's, rng is a numpy Generator. The mean
        is a moving one, over about 1 / (1 - decay) batches (VQ-VAE, appendix A.1): a
        batch has the weight 1 - decay in moving_count and moving_sum, and a code is the
        unit vector of its sum. A code whose count is then less than dead times the mean
        of all counts starts anew (set_codes) at a vector of z that rng draws for it:
        without that, most of a large codebook is never used. There may be more such
        codes than vectors.
        """
        vectors, fine = as_rows(z), fine.flatten()  # (B*T, d), (B*T,)
        counts = fine.bincount(minlength=len(self.codebook))  # (K,)
        sums = torch.zeros_like(self.moving_sum).index_add_(0, fine, vectors)  # (K, d)
        self.moving_count.lerp_(counts.float(), 1 - decay)
        self.moving_sum.lerp_(sums, 1 - decay)
        # The mean is sum / count; a unit vector of the same direction needs the sum only.
        self.codebook.copy_(F.normalize(self.moving_sum, dim=1))
        is_dead = self.moving_count < dead * self.moving_count.mean()
        which = is_dead.nonzero()[:, 0]
        reborn = torch.from_numpy(rng.integers(len(vectors), size=len(which)))
        self.set_codes(which, vectors[reborn.to(z.device)])

    @torch.no_grad()
    def set_codes(self, which, vectors):
        """Place the codes which (n,) at vectors (n, d), as if they had been chosen as
        often as the average code."""
        self.codebook[which] = vectors
        self.moving_count[which] = self.moving_count.mean()
        # The mean anew, which has risen by the line above: any weight near it will do.
        self.moving_sum[which] = vectors * self.moving_count.mean()

    @torch.no_grad()
    def fill_codebook(self, images, rng):
        """Start every code at an encoder output: at random, most would stay unused.

        images: uint8 (N, H, W, 3), of which as many are encoded as give K vectors.
        """
        K, T = len(self.codebook), math.prod(self.grid)
        count = max(64, K // T + 1)  # 64: not all codes from two or three images
        some = torch.from_numpy(rng.integers(len(images), size=count))
        parts = some.to(images.device).split(self.at_once)
        vectors = [as_rows(self.encode(to_float(images[part]))) for part in parts]
        vectors = torch.cat(vectors)  # (>= K, d)
        chosen = torch.from_numpy(rng.permutation(len(vectors))[:K])
        all_codes = torch.arange(K, device=vectors.device)
        self.set_codes(all_codes, vectors[chosen.to(vectors.device)])

    def usage(self):
        """(percent of the codes in use, perplexity), from the moving counts.

        Perplexity: exp(entropy of the shares), K if all codes are used alike, 1 if one.
        In use: a tenth of an average share or more. The moving counts span about 100
        steps, so a batch may have fewer tokens than there are codes. A code that has
        just started anew has an average share, and counts as used for 230 steps.
        """
        share = (self.moving_count / self.moving_count.sum()).cpu()
        used = (share > 0.1 / len(share)).float().mean()
        entropy = torch.special.entr(share).sum()  # the sum of -p ln p
        return 100 * used.item(), entropy.exp().item()


def as_rows(z):
    """(B, d, h, w) -> (B*T, d): the vectors of all cells, row by row of the grid."""
    return z.permute(0, 2, 3, 1).flatten(0, 2)


# --------------------------------------------------------------------------------------
# Tokens and pixels


def to_float(images):
    """uint8 (B, H, W, 3), 0..255 -> float32 (B, 3, H, W), -1..1."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(x):
    """float (B, 3, H, W), -1..1 -> uint8 (B, H, W, 3), 0..255."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)


@torch.inference_mode()
def tokenize(model, images):
    """Images uint8 (N, H, W, 3) -> their fine labels int64 (N, T)."""
    parts = [model.encode(to_float(part)) for part in images.split(model.at_once)]
    return torch.cat([model.quantize(z)[1] for z in parts])


@torch.inference_mode()
def reconstruct(model, fine):
    """Fine labels int64 (N, T) -> images uint8 (N, H, W, 3). The way back."""
    codes = (model.codes(part) for part in fine.split(model.at_once))
    return torch.cat([to_uint8(model.decode(z_q)) for z_q in codes])


def psnr(images, others):
    """Peak signal-to-noise ratio in dB, mean over images; uint8 (N, H, W, 3)."""
    pairs = zip(images.split(10), others.split(10))  # of all, floats would not fit
    parts = [(a.float() - b.float()).square().mean(dim=(1, 2, 3)) for a, b in pairs]
    error = torch.cat(parts).clamp(min=1e-3)  # equal images: 78 dB, not infinitely many
    return (10 * (255**2 / error).log10()).mean().item()


# --------------------------------------------------------------------------------------
# Training


def train(learner, train_set, test_set, args, checkpoint, path):
    """Train learner.model on the images of train_set; measure it on test_set.

    All around a step (learning rate, measuring, saving, Ctrl-C) is in training_steps.
    """
    model = learner.model
    # Until then it is a plain autoencoder, so that the codebook starts at vectors that
    # mean something already. The last step always has a codebook.
    codebook_after = min(args.codebook_after, args.steps - 1)

    def measure():
        """What is printed and plotted of every --save-every steps."""
        if len(checkpoint["history"]["loss"]) <= codebook_after:  # no codebook yet
            return {"psnr": math.nan, "usage": math.nan, "perplexity": math.nan}
        some = test_set.x[:1000]
        with autocast(some.device):
            quality = psnr(some, reconstruct(model, tokenize(model, some)))
        used, perplexity = model.usage()
        return {"psnr": quality, "usage": used, "perplexity": perplexity}

    steps = training_steps(args, path, learner, checkpoint, measure)
    for step, rng in steps:
        if step == codebook_after:
            model.fill_codebook(train_set.x, rng)
        images, _ = train_set.batch(rng, args.batch_size)
        x = to_float(images)  # (B, 3, H, W)
        with autocast(x.device):
            x_hat, z, fine, commitment = model(x, quantized=step >= codebook_after)
        loss = F.mse_loss(x_hat, x) + 0.25 * commitment
        backward_clip_step(loss, *learner)
        if fine is not None:
            model.update_codebook(z.detach(), fine, rng)
        checkpoint["history"]["loss"].append(loss.item())  # also shown in the bar


def backward_clip_step(loss, model, optimizer, scaler):
    """Move the weights of model one step down the gradient of loss, cut to length 1.

    scaler: for float16, in which small gradients would be 0, it multiplies the loss by a
    large number, and divides the gradients again; in other precisions it does nothing.
    """
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)  # none, where a gradient became infinite
    scaler.update()


def write_tokens(out, model, class_names, train_set, test_set):
    """Tokenize the images of both sets, and write tokens.pt.

    Returns the reconstructions of the test images, uint8 (N, H, W, 3).
    """
    K = len(model.codebook)
    fine, test_fine = tokenize(model, train_set.x), tokenize(model, test_set.x)
    save(
        out / "tokens.pt",
        script="tokenizer.py",
        train_fine=fine.int().cpu(),
        test_fine=test_fine.int().cpu(),
        train_labels=train_set.y.cpu(),
        test_labels=test_set.y.cpu(),
        classes=class_names,
        grid=model.grid,
        codebook_size=K,
        codebook_id=short_hash(model.codebook),
    )
    reconstructions = reconstruct(model, test_fine)
    quality = psnr(test_set.x, reconstructions)
    occur = len(test_fine.unique()) / K
    print(f"test images: {quality:.2f} dB, {occur:.1%} of the codes occur in them")
    return reconstructions


@contextmanager
def no_traceback():
    """Decorates each main: Ctrl-C and a lack of memory end it in one line."""
    try:
        yield
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except (MemoryError, RuntimeError) as error:
        text = f"{type(error).__name__} {error}"
        if not re.search("MemoryError|(out of|enough|allocate) memory", text):
            raise
        traceback.clear_frames(error.__traceback__)  # their tensors, and progress bars
        fail("out of memory: take a smaller --batch-size, or tokenizer.py --image-size")


@no_traceback()
def main(argv=None):
    parser = CommandLine(__doc__)
    add = parser.add_argument
    default = VQVAEConfig()
    known = "mnist, fashion_mnist, cifar10, or a folder"
    add("--data", type=os.path.expanduser, default="glyphs", help=known)
    add("--image-size", type=at_least(8), default=default.image_size, help="pixels")
    side = "pixels per token, along a side"
    add("--downsample", type=int, choices=[2, 4, 8, 16], default=4, help=side)
    add("--channels", type=at_least(16), default=default.channels, help="network width")
    add("--codebook-size", type=at_least(2), default=default.codebook_size, help="K")
    add("--code-dim", type=at_least(2), default=default.code_dim, help="d")
    add("--codebook-after", type=at_least(0), default=150, help="steps without codes")
    parser.add_training_flags(steps=600, batch_size=128, lr=2e-3)
    args = parser.parse_args(argv)
    if args.image_size % args.downsample:
        parser.error(f"--image-size must be a multiple of {args.downsample}")
    device = pick_device(args.device)
    path = args.out / "tokenizer.pt"

    train_set, class_names = load_images(args.data, "train", args.image_size)
    test_set, _ = load_images(args.data, "test", args.image_size)
    print(f"{args.data}: {len(train_set.x)} + {len(test_set.x)} images, on {device}")
    print(f"classes ({len(class_names)}): {', '.join(class_names[:10])}")
    fingerprint = {}
    if args.data != "glyphs":  # always alike, but for what another CPU rounds otherwise
        fingerprint["train"] = short_hash(*train_set)
        fingerprint["test"] = short_hash(*test_set)
        fingerprint["first"] = short_hash(*test_set.first(10))
    train_set, test_set = train_set.to(device), test_set.to(device)

    torch.manual_seed(args.seed)
    config = VQVAEConfig(
        image_size=args.image_size,
        downsample=args.downsample,
        channels=args.channels,
        codebook_size=args.codebook_size,
        code_dim=args.code_dim,
    )
    model = to_device(VQVAE(config), device)
    fused = device.type != "mps"
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), fused=fused)
    ids = {"images": " ".join(fingerprint.values())}
    learner = Learner(model, optimizer, gradient_scaler(device))
    checkpoint = start_or_resume(args, path, learner, "tokenizer.py", **ids)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{size:.2f}M parameters, {args.codebook_size} codes")
    checkpoint["data"] = {
        "name": args.data,
        "image_size": args.image_size,
        "classes": class_names,
        "fingerprint": fingerprint,
    }

    if args.compile:
        model.compile()
    train(learner, train_set, test_set, args, checkpoint, path)
    model.eval()
    reconstructions = write_tokens(args.out, model, class_names, train_set, test_set)
    plot(path, checkpoint["history"], test_set.x, reconstructions, args.codebook_size)
    print(f"wrote tokenizer.pt, tokens.pt and tokenizer.png to {args.out}")
    print(f"{checkpoint['seconds']:.0f} s of training")


# --------------------------------------------------------------------------------------
# Images


class Examples(NamedTuple):
    """Images or tokens, each with its class: what belongs together stays together."""

    x: torch.Tensor  # images uint8 (N, H, W, 3), or tokens int64 (N, T)
    y: torch.Tensor  # classes int64 (N,)

    def to(self, device):
        """The same on device."""
        return Examples(self.x.to(device), self.y.to(device))

    def batch(self, rng, size):
        """size examples, each as likely as any other."""
        which = torch.from_numpy(rng.integers(len(self.x), size=size))
        which = which.to(self.x.device)
        return Examples(self.x[which], self.y[which])

    def first(self, count):
        """The first count examples."""
        return Examples(self.x[:count], self.y[:count])


def load_images(data, split, image_size, count=None):
    """All images of one split of a data set, in memory, or only the first count.

    data: "glyphs", "mnist", "fashion_mnist", "cifar10", or a folder with a sub-folder
    per class, either below train/ and test/ (or such), or split 90/10. split: "train"
    or "test". Returns Examples and the names of the classes. Fails in one line if the
    data cannot be had, or files are no images or smaller than image_size.
    """
    if data == "glyphs":
        seed = {"train": 0, "test": 1}[split]
        images, y = paint_glyphs(GLYPH_COUNTS[split], image_size, seed)
        return Examples(images, y).first(count), list("0123456789")
    names = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}
    if data not in names:
        return load_folder(Path(data), split, image_size, count)
    root = Path("data").resolve()
    kind = getattr(torchvision.datasets, names[data])
    try:
        dataset = kind(root, train=split == "train", download=True)
    except Exception as error:  # noqa: BLE001  a dozen kinds, from no network to no zip
        offline = "--data glyphs needs no network"
        fail(f"no {data} in {root}, no download ({reason(error)}); {offline}")
    images, y = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)
    if images.ndim == 3:  # grey (N, 28, 28): padded to 32, three equal channels
        images = F.pad(images, (2, 2, 2, 2))[..., None].expand(-1, -1, -1, 3)
    if image_size != 32:
        fail(f"--image-size {image_size}: the images of {data} have 32 pixels")
    return Examples(images.contiguous(), y).first(count), list(dataset.classes)


def load_folder(root, split, image_size, count=None):
    """load_images for a folder: resized to the short side, the centre cut out."""
    files, class_names = find_images(root)
    own, other = files[split][:count], files["test" if split == "train" else "train"]
    images = torch.empty(len(own), image_size, image_size, 3, dtype=torch.uint8)
    broken = []

    def read(file):
        """The image of a pair (path, class number)."""
        return read_image(file[0], image_size, broken)

    with ThreadPoolExecutor() as pool:  # Pillow decodes without Python's lock
        bar = tqdm(pool.map(read, own), f"read {split} images", len(own), disable=None)
        for i, image in enumerate(bar):
            images[i] = image
        if broken:
            list(pool.map(read, other))  # to name all there are at once
            named = ", ".join(sorted(broken)[:10])
            fail(f"{len(broken)} files to remove or mend: {named}")
    return Examples(images, torch.tensor([y for _, y in own])), class_names


def read_image(path, image_size, broken):
    """The image in a file, uint8 (H, W, 3). Without one: 0, and broken gets a reason."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode[0] in "IF":  # integers or floats, which convert would clip
                x = np.array(image, np.float32).clip(min=0)
                white = max(x.max(), 65535 if image.mode[0] == "I" else 1)
                image = Image.fromarray((x * (255 / white)).round().astype(np.uint8))
            if image.has_transparency_data:
                paper = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(paper, image.convert("RGBA"))
            image = image.convert("RGB")
    except Exception as error:  # noqa: BLE001  Pillow raises five kinds
        broken.append(f"{path} is no readable image ({type(error).__name__})")
        return 0
    if min(image.size) < image_size:
        size = f"{image.width}x{image.height}"
        broken.append(f"{path} has {size} pixels, fewer than --image-size {image_size}")
        return 0
    resize = Compose([Resize(image_size), CenterCrop(image_size)])
    return torch.from_numpy(np.array(resize(image)))


def find_images(root):
    """{"train": [(file, class number), ...], "test": [...]}, and the class names."""
    # Class 2 before class 10: sorted as if all numbers had 12 digits.
    natural = lambda path: re.sub(r"\d+", lambda digits: digits[0].zfill(12), path.name)
    found = []  # of each split {class name: files}
    for folder in find_splits(root):
        folders = sorted(visible(folder, "*/"), key=natural)
        found.append({each.name: visible(each, "**") for each in folders})
    if len(found) == 1:  # no splits: of each class every tenth file is for testing
        found.append({name: files[::10] for name, files in found[0].items()})
        for files in found[0].values():
            del files[::10]
    names = list(found[0] | found[1])
    lacking = [name for name in names if not all(part.get(name) for part in found)]
    if lacking or not names:
        why = " (moved? see --data)"
        if lacking:
            why = f": too few images of {', '.join(lacking[:10])}"
        fail(f"{root}: not a known data set, nor class folders of images{why}")
    files = {}
    for split, classes in zip(("train", "test"), found):
        pairs = [(path, y) for y, name in enumerate(names) for path in classes[name]]
        # Shuffled, always alike: the first 1,000 of them shall be of all classes.
        order = np.random.default_rng(0).permutation(len(pairs))
        files[split] = [pairs[i] for i in order]
    return files, names


def find_splits(root):
    """The folders of class folders: [training, test], or one that is yet to be split.

    data/train/cat, data/test/cat: [data/train, data/test], in many spellings;
    data/cat, data/dog: [data]; and data/data/cat: [data/data].
    """
    inner = visible(root, "*/")
    deep = [folder for folder in inner if visible(folder, "*/")]
    if len(inner) == len(deep) == 1:  # a folder too many, as zip files have
        return find_splits(inner[0])
    # Train, test_images, validation, ...; but a class of that name has no folders.
    train = [f for f in deep if "train" in f.name.lower()]
    test = [f for word in ("test", "val") for f in deep if word in f.name.lower()]
    if train and (test or len(deep) == 1):
        return [find_splits(named[0])[0] for named in (train, test) if named]
    return [root]


def visible(folder, pattern):
    """The folders (*/) or files (**) below folder, but for what glob takes for hidden,
    and what operating systems leave."""
    names = sorted(glob(pattern, root_dir=folder, recursive=True))
    junk = "thumbs.db", "desktop.ini", "icon\r", "__macosx"
    paths = [folder / name for name in names if Path(name.lower()).name not in junk]
    return [path for path in paths if path.is_dir() == (pattern == "*/")]


# The text fonts with digits that ship inside matplotlib.
GLYPH_FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmb10", "cmr10", "cmss10", "cmtt10"),
)
GLYPH_COUNTS = {"train": 20_000, "test": 5_000}


def paint_glyphs(count, image_size, seed):
    """Digits in bright colours on dark gradients, a little turned, slanted and moved.

    Returns uint8 images (count, H, W, 3) and their digits, int64 (count,), all alike
    often. The same seed paints the same images; other seeds differ in everything but
    the fonts.
    """
    rng = np.random.default_rng((seed, count))
    y = torch.from_numpy(rng.permutation(np.arange(count) % 10))
    fonts = torch.from_numpy(rng.integers(len(GLYPH_FONTS), size=count))
    turn, slant = rng.normal(0, 0.1, (2, count))  # radians, and a slope
    zoom = rng.uniform(0.85, 1.1, count)
    dx, dy = rng.uniform(-0.1, 0.1, (2, count))  # in half widths of the image
    # For each place (x, y) of the image, where in the glyph to look: at turn times slant
    # times (x, y), divided by zoom, plus (dx, dy). Divided: of a larger glyph, less is in
    # the image.
    cos = np.cos(turn) / zoom
    sin = np.sin(turn) / zoom
    affine = np.stack([cos, slant * cos - sin, dx, sin, slant * sin + cos, dy], axis=1)
    affine = torch.from_numpy(affine.reshape(count, 2, 3)).float()
    # Three colours an image: of the ink, and of both ends of the background.
    hue = rng.random((count, 3))
    saturation = rng.uniform(0.6, 1, (count, 3))
    value = rng.uniform((1, 0, 0), (1, 0.35, 0.35), (count, 3))
    colors = hsv_to_rgb(np.stack([hue, saturation, value], axis=-1))
    colors = torch.from_numpy(colors).float()[..., None, None]  # (count, 3, rgb, 1, 1)
    angle = torch.from_numpy(rng.uniform(0, 2 * np.pi, (count, 1, 1, 1))).float()
    across = torch.linspace(-0.5, 0.5, image_size)
    # Painted at twice the resolution and averaged down, for smooth edges.
    size = 2 * image_size
    masters = glyph_masters(size)
    images = torch.empty(count, image_size, image_size, 3, dtype=torch.uint8)
    for i in torch.arange(count).split(1000):
        grid = F.affine_grid(affine[i], (len(i), 1, size, size), align_corners=False)
        glyphs = masters[fonts[i], y[i]][:, None]  # (n, 1, 2H, 2W)
        mask = F.avg_pool2d(F.grid_sample(glyphs, grid, align_corners=False), 2)
        ink, start, end = colors[i].unbind(1)  # (n, rgb, 1, 1)
        down = angle[i].sin() * across[:, None]  # (n, 1, H, 1)
        ramp = angle[i].cos() * across + down  # (n, 1, H, W)
        background = torch.lerp(start, end, (ramp + 0.5).clamp(0, 1))  # (n, rgb, H, W)
        painted = torch.lerp(background, ink, mask).permute(0, 2, 3, 1)
        images[i] = (painted * 255).round().byte()
    return images, y


def glyph_masters(size):
    """Every digit in every font, centred, at one height: float (fonts, 10, size, size).

    1 is ink, 0 is not.
    """
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
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


# --------------------------------------------------------------------------------------
# The picture


def plot(path, history, images, reconstructions, K):
    """tokenizer.png: test images and their reconstructions, and the curves.

    images and reconstructions uint8 (N, H, W, 3); K is the size of the codebook.
    """
    figure = Figure(figsize=(12, 6), layout="constrained")
    pictures, curves = figure.subfigures(2, 1, height_ratios=[2, 3])
    pictures.suptitle("test images (above), decoded from their tokens (below)")
    n = min(12, len(images))
    both = torch.cat([images[:n], reconstructions[:n]]).cpu().numpy()
    for ax, image in zip(pictures.subplots(2, n).flat, both):
        ax.imshow(image)
        ax.axis("off")
    measured = history["test"]
    steps = [row["step"] for row in measured]
    loss, quality, codes = curves.subplots(1, 3)
    loss.semilogy(range(1, len(history["loss"]) + 1), history["loss"])
    loss.set(title="training loss", ylabel="squared error + 0.25 commitment")
    quality.plot(steps, [row["psnr"] for row in measured], marker=".")
    quality.set(title="reconstruction of test images", ylabel="PSNR, dB")
    codes.plot(steps, [row["perplexity"] for row in measured], marker=".")
    codes.axhline(K, color="grey", linestyle=":", label=f"all {K} codes alike")
    codes.set(title="codes in effective use", ylabel="perplexity", ylim=0)
    codes.legend()
    for ax in (loss, quality, codes):
        ax.set_xlabel("step")
    save_figure(path.with_suffix(".png"), figure)


# --------------------------------------------------------------------------------------
# What all stages share: training around the step, files, flags, the device


class Learner(NamedTuple):
    """What training changes, and a checkpoint holds the state of."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler


def training_steps(args, path, learner, checkpoint, measure):
    """Yields (step, rng) for every training step that is left; does all around it.

    The caller takes the step and appends its loss to checkpoint["history"]["loss"].
    Here: the learning rate before it; then the clock, the check for nan, the bar; every
    --save-every steps and at the end, what measure() returns goes to history["test"]
    and the checkpoint to path; copies as --keep-every says; Ctrl-C, which ends the
    program after a whole step, with everything saved.
    """
    history, first = checkpoint["history"], checkpoint["step"]
    bar = tqdm(range(first, args.steps), path.stem, args.steps, initial=first)
    with interruptible() as stop, bar:
        for step in bar:
            rate = learning_rate(step, args.steps, args.lr)
            for group in learner.optimizer.param_groups:
                group["lr"] = rate
            began = time.perf_counter()
            # Seeded by the step, so that a resumed run draws what it would have drawn.
            yield step, np.random.default_rng((args.seed, step))
            if step > first or args.steps - first == 1:  # in the first it warms up
                checkpoint["seconds"] += time.perf_counter() - began
            done = checkpoint["step"] = step + 1
            loss = history["loss"][-1]
            if not math.isfinite(loss):
                last = f"{path} is of the last save, if any"
                fail(f"the loss is {loss} at step {step}; {last}")
            bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
            is_due = done % args.save_every == 0 or done == args.steps
            if is_due:
                row = measure()
                clock = {"step": done, "seconds": checkpoint["seconds"]}
                history["test"].append(clock | row)
                said = ", ".join(f"{name} {value:.4g}" for name, value in row.items())
                tqdm.write(f"step {done}, on test images: {said}")
            if is_due or stop.is_set():
                save_checkpoint(path, learner, checkpoint)
            if args.keep_every and done % args.keep_every == 0:
                copy = path.with_name(f"{path.stem}-{done:06d}.pt")
                save_checkpoint(copy, learner, checkpoint)
            if stop.is_set():
                how = "add --resume to go on"
                print(f"stopped after step {done}: {how}", file=sys.stderr)
                raise SystemExit(130)


def learning_rate(step, steps, peak, warmup=50):
    """Linear warm-up, then a cosine from peak down to a tenth of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)  # 0 .. 1
    return peak * (0.55 + 0.45 * math.cos(math.pi * progress))  # from 1 to 0.1 of peak


@contextmanager
def interruptible():
    """Yields an event that Ctrl-C sets: the training loop ends after a whole step.

    A second Ctrl-C ends the program at once.
    """
    stop, previous = threading.Event(), signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread():
        yield stop  # Ctrl-C never comes here, and signal.signal is refused
        return

    def on_interrupt(*_):
        """The first Ctrl-C; from then on it does what it did before."""
        stop.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


def start_or_resume(args, path, learner, script, **ids):
    """The checkpoint that training goes on from: step, seconds, history, and what later
    stages need to know of the model (config, flags, ids: what it was trained on).

    With --resume, learner goes on from path; one that was trained with other settings
    is refused. On another device as well: the weights then differ by rounding.
    """
    try:  # now, and not only when an hour of training is to be saved
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out {path.parent}: {error.strerror}")
    if not os.access(path.parent, os.W_OK):
        fail(f"--out {path.parent} cannot be written to")
    # Everything that decides the weights.
    others = "out", "data", "device", "save_every", "keep_every", "resume", "compile"
    settings = {k: v for k, v in vars(args).items() if k not in others} | ids
    config = asdict(learner.model.config)
    checkpoint = {"script": script.split()[0], "config": config, **ids}
    checkpoint |= {"settings": settings, "step": 0, "seconds": 0.0}
    checkpoint["history"] = {"loss": [], "test": []}
    if not args.resume:
        checkpoint["replaces"] = path
    else:
        saved = load(path, script)
        for name, value in settings.items():
            before = saved["settings"].get(name)
            if before != value:
                fail(f"--resume: {path} was trained with {name} {before}, not {value}")
        load_weights(learner.model, saved, path)
        fused = learner.optimizer.param_groups[0]["fused"]  # as this device likes it
        for group in saved["optimizer"]["param_groups"]:
            group["fused"] = fused
        learner.optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:  # empty where nothing was scaled
            learner.scaler.load_state_dict(saved["scaler"])
        checkpoint |= {name: saved[name] for name in ("step", "seconds", "history")}
    return checkpoint


def save_checkpoint(path, learner, checkpoint):
    """Write checkpoint with the weights, and what --resume needs to train them further.

    Fails, and leaves path as it is, if a weight is not finite.
    """
    states = {name: part.state_dict() for name, part in learner._asdict().items()}
    if not all(weight.isfinite().all() for weight in states["model"].values()):
        fail(f"a weight is not finite; {path} is of the last save, if any")
    if "replaces" in checkpoint:  # the first save
        set_aside(checkpoint.pop("replaces"))
    save(path, **states, **checkpoint)


def set_aside(path):
    """A finished run in path, with its copies and tokens, gets other names: *.old.pt."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["step"] < saved["settings"]["steps"]:
            return
    except Exception:  # noqa: BLE001  nothing there, or nothing that can be read
        return
    also = "tokens" if path.stem == "tokenizer" else None
    for file in list(path.parent.glob("*.pt")):
        stem, dash, step = file.stem.partition("-")
        if stem in (path.stem, also):
            os.replace(file, file.with_name(f"{stem}.old{dash}{step}.pt"))
    tqdm.write(f"the finished run of {path} is kept as {path.stem}.old.pt")


def load_tokenizer(out, device):
    """(VQVAE in eval mode on device, the artifact) from the folder out.

    The artifact gets a codebook_id, by which later stages know what belongs together.
    """
    artifact = load(out / "tokenizer.pt", "tokenizer.py")
    model = VQVAE(VQVAEConfig(**artifact["config"]))
    load_weights(model, artifact, out / "tokenizer.pt")
    artifact["codebook_id"] = short_hash(model.codebook)
    return to_device(model.eval(), device), artifact


def load_tokens(out, split, **ids):
    """The fine labels of a split of the data, "train" or "test", with their classes:
    (Examples, the artifact) from tokens.pt in the folder out; ids as for load."""
    artifact = load(out / "tokens.pt", "tokenizer.py", **ids)
    fine, y = artifact[f"{split}_fine"], artifact[f"{split}_labels"]
    return Examples(fine.long(), y), artifact


def load(path, script, **ids):
    """The artifact that script wrote to path, on the CPU.

    Fails in one line if it is missing, unreadable, written by another script, or made
    from another codebook or clustering than ids (codebook_id, cluster_id) say.
    """
    again = f"run python {script} again"
    try:
        artifact = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"{path} is missing: run python {script} first")
    except OSError as error:
        fail(f"{path} cannot be opened: {error.strerror}")
    except Exception as error:  # noqa: BLE001  a file cut short raises one of a dozen
        fail(f"{path} cannot be read ({type(error).__name__}): {again}")
    file = script.split()[0]  # without the flags
    if not isinstance(artifact, dict) or artifact.get("script") != file:
        fail(f"{path} was not written by {file}: {again}")
    for name, value in ids.items():
        found = artifact.get(name)
        if found != value:  # codebook_id: "another codebook"
            other = f"another {name.removesuffix('_id')} ({found}, here {value})"
            fail(f"{path} belongs to {other}: {again}")
    return artifact


def load_weights(model, artifact, path):
    """Put the weights of an artifact into model; fails if the code has changed."""
    try:
        model.load_state_dict(artifact["model"])
    except RuntimeError as error:  # it names the keys and shapes, in several lines
        detail = textwrap.shorten(str(error), 400)
        fail(f"{path} does not fit this code, train it again: {detail}")


@contextmanager
def replacing(path):
    """Yields a temporary name that becomes path at the end: never half a file there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save: a full disk, RuntimeError
        fail(f"cannot write {path}: no room, or no permission? ({reason(error)})")
    finally:
        if temporary.exists():
            temporary.unlink()


def save(path, **artifact):
    """Write tensors, numbers, strings, lists and dicts of them to a .pt file."""
    with replacing(path) as temporary:
        torch.save(artifact, temporary)


def save_figure(path, figure):
    """Write a matplotlib figure as PNG."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight")


def short_hash(*tensors):
    """12 hex digits that name the content of tensors."""
    content = hashlib.sha256()
    for tensor in tensors:
        content.update(tensor.cpu().contiguous().numpy())
    return content.hexdigest()[:12]


class CommandLine(argparse.ArgumentParser):
    """argparse with the flags of all stages; an error is one line and exit code 2."""

    def __init__(self, doc):
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(description=doc.split("\n")[0], formatter_class=formatter)
        if hasattr(sys.stdout, "reconfigure"):  # for terminals that lack a character
            sys.stdout.reconfigure(errors="replace")
        add = self.add_argument
        add("--out", type=home_path, default="out", help="folder of artifacts")
        add("--seed", type=at_least(0), default=0, help="of everything")
        add("--device", default="auto", help="auto: cuda, mps, or cpu")

    def add_training_flags(self, steps, batch_size, lr):
        """What the three training scripts share."""
        add = self.add_argument
        add("--steps", type=at_least(1), default=steps, help="training steps")
        add("--batch-size", type=at_least(1), default=batch_size, help="images a step")
        add("--lr", type=at_least(0, float), default=lr, help="peak learning rate")
        add("--save-every", type=at_least(1), default=200, help="and measure, in steps")
        add("--keep-every", type=at_least(0), default=0, help="keep copies, in steps")
        add("--resume", action="store_true", help="go on where a run was interrupted")
        add("--compile", action="store_true", help="torch.compile, for long GPU runs")

    def error(self, message):
        """Print message in one line, without argparse's usage, and exit with code 2."""
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def home_path(text):
    """An argparse type: a Path, in which ~ is the home folder."""
    return Path(os.path.expanduser(text))


def at_least(low, kind=int, high=2**63 - 1):
    """An argparse type: a number from low to high, which fits in 63 bits."""

    def parse(text):
        """The number in text; raises ArgumentTypeError if it is out of range."""
        number = kind(text)
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in {low} .. {high:g}")
        return number

    parse.__name__ = kind.__name__  # argparse prints it: "invalid int value: 'x'"
    return parse


def pick_device(name):
    """The torch.device called name; "auto" is the fastest one there is."""
    if name == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else mps
        if name == "cpu" and torch.version.cuda:  # a torch that expects a GPU
            try:
                torch.cuda.init()
            except (RuntimeError, AssertionError) as error:
                print(f"on the CPU, although this torch knows CUDA: {reason(error)}")
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # a device that cannot give a number back is of no use
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        fail(f"--device {name}: {reason(error)}")
    return probe.device


def to_device(model, device):
    """model on device, convolutions in the memory order that is fastest there."""
    # On a CPU channels_last is 3 times as fast; on MPS it is young, and has had bugs.
    order = torch.preserve_format if device.type == "mps" else torch.channels_last
    return model.to(device, memory_format=order)


def precision(device):
    """What products are computed in: on a CUDA card in bfloat16, on one that lacks it
    (as the T4 of free notebooks) in float16, and on all other devices in float32."""
    if device.type != "cuda":
        return torch.float32
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def autocast(device):
    """A context in which products are computed in precision(device)."""
    half = precision(device)
    if half == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, half)


def gradient_scaler(device):
    """What backward_clip_step needs for float16; for other precisions it is disabled."""
    return torch.amp.GradScaler(device.type, enabled=precision(device) == torch.float16)


def fail(message):
    """End the program with one line on stderr and exit code 1."""
    raise SystemExit(f"error: {message}")


def reason(error):
    """The first line of what an exception says."""
    return str(error).partition("\n")[0] or type(error).__name__


if __name__ == "__main__":
    main()
