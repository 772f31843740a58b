"""Stage 0: a VQ-VAE that turns an image into a grid of discrete tokens and back.

CTF (arXiv 2503.16194) starts from such a tokenizer and a large codebook: every token is the index of one of K
codewords, its *fine label*. The method changes nothing here, but lives from one property of the result: with a large K,
many codewords mean almost the same. The recipe is LlamaGen's (arXiv 2406.06525, section 3.1): l2-normalised codes of
only d = 8 dimensions and a commitment weight of 0.25. Codes follow moving averages (van den Oord et al. 2017, appendix
A.1), which needs no loss of its own. There is no perceptual and no adversarial loss.

    python tokenizer.py                     # digits drawn on the spot, 32x32 pixels -> 8x8 tokens
    python tokenizer.py --data cifar10      # or mnist, fashion_mnist, or a folder with one sub-folder per class

Reads images; writes tokenizer.pt, tokens.pt (the fine labels of the whole data set) and tokenizer.png to --out.

Axis legend of all six files: B batch, N images, T tokens, C channels, H W pixels, h w token grid, K codewords,
M clusters, d code dimension, V vocabulary of the model at hand (M, or K for the baseline).
"""

import argparse
import hashlib
import math
import os
import platform
import signal
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from torch import nn
from torchvision.transforms import CenterCrop, Compose, Resize
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# What every stage needs: one-line errors, whole files, the device, a clean Ctrl-C. Skip this on a first reading.


def fail(message):
    """End the program with one line on stderr and exit code 1."""
    raise SystemExit(f"error: {message}")


class CommandLine(argparse.ArgumentParser):
    """argparse whose --help shows the defaults, and whose errors are one line with exit code 2."""

    def __init__(self, doc):
        super().__init__(
            description=doc.split("\n")[0],
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument(
            "--out", type=Path, default=Path("out"), help="folder of the artifacts"
        )
        self.add_argument(
            "--seed", type=number(int, 0), default=0, help="seed of everything random"
        )
        self.add_argument(
            "--device", default="auto", help="auto is cuda, then mps, then cpu"
        )

    def error(self, message):
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def number(kind, low, high=math.inf):
    """An argparse type: an int or float with low <= value <= high."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    parse.__name__ = kind.__name__  # argparse: "invalid int value: ..."
    return parse


def pick_device(name):
    """The torch.device called name; "auto" is the fastest there is."""
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {name} cannot be used here: {str(error).splitlines()[0]}")
    return torch.device(name)


def autocast(device):
    """bfloat16 matrix products where a CUDA card has them; float32 on every other device."""
    enabled = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


@contextmanager
def replacing(path):
    """Yields a temporary name that is renamed to path at the end, so nobody ever finds half a file there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except (
        OSError,
        RuntimeError,
    ) as error:  # torch.save reports a full disk as a RuntimeError
        fail(f"cannot write {path}: {str(error).splitlines()[0]}")
    finally:
        if temporary.exists():
            temporary.unlink()


def save(artifact, path):
    """Write a dict of tensors, numbers, strings, lists and dicts to a .pt file."""
    with replacing(path) as temporary:
        torch.save(artifact, temporary)


def save_figure(figure, path):
    """Write a matplotlib figure as PNG."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120, bbox_inches="tight")


def load(path, script, **ids):
    """The artifact at path, on the CPU. Fails in one line that names the script to run if it is missing, unreadable, or
    made from another codebook or clustering than ids (codebook_id=..., cluster_id=...) say."""
    try:
        artifact = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"{path} is missing: run python {script} first")
    except Exception as error:  # torch.load raises a dozen kinds for a file that is cut short or is no .pt at all
        fail(
            f"{path} cannot be read ({type(error).__name__}): run python {script} again"
        )
    if not isinstance(artifact, dict) or artifact.get("script") != script.split()[0]:
        fail(f"{path} was not written by {script}: run python {script} again")
    for name, value in ids.items():
        if artifact[name] != value:
            what = {"codebook_id": "codebook", "cluster_id": "clustering"}[name]
            fail(
                f"{path} belongs to another {what} ({artifact[name]}, here {value}): run python {script} again"
            )
    return artifact


def resume(path, script, settings):
    """The checkpoint to go on from; refuses one that was trained with other settings (a dict)."""
    checkpoint = load(path, script)
    for name, value in settings.items():
        before = checkpoint["settings"].get(name)
        if before != value:
            fail(
                f"{path} was trained with {name} {before}, not {value}: give the same flags, or leave out --resume"
            )
    return checkpoint


@contextmanager
def interruptible():
    """Yields an event that Ctrl-C sets, so that a training loop ends after a whole step; a second Ctrl-C stops at once."""
    stop = threading.Event()
    previous = signal.getsignal(signal.SIGINT)

    def on_interrupt(*_):
        stop.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


def short_hash(*tensors):
    """12 hex digits that name the content of tensors."""
    return hashlib.sha256(
        b"".join(t.cpu().contiguous().numpy().tobytes() for t in tensors)
    ).hexdigest()[:12]


def learning_rate(step, steps, peak, warmup=50):
    """Linear warm-up, then a cosine from peak to a tenth of it at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.55 + 0.45 * math.cos(math.pi * progress))


# ---------------------------------------------------------------------------------------------------------------------
# Images


# The upright and slanted text fonts that ship inside matplotlib and have digits.
GLYPH_FONTS = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-BoldOblique", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta", "cmb10", "cmr10", "cmss10", "cmtt10"]
GLYPH_COUNTS = {"train": 20_000, "test": 5_000}


def draw_glyphs(count, image_size, seed):
    """Digits 0-9 in bright colours on dark gradients, a little turned, slanted, scaled and shifted.

    Returns uint8 images (count, H, W, 3) and int64 labels (count,). The same seed draws the same images. Train and test
    images differ in everything but the fonts: this is a data set for watching a method work, not for showing off.
    """
    rng = np.random.default_rng((seed, count))
    labels = torch.from_numpy(rng.permutation(np.arange(count) % 10))  # balanced
    size = (
        2 * image_size
    )  # everything is drawn at twice the resolution and averaged down: smooth edges
    masters = torch.zeros(len(GLYPH_FONTS), 10, size, size)
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    for i, name in enumerate(GLYPH_FONTS):
        font = ImageFont.truetype(folder / f"{name}.ttf", size)
        for digit in range(10):
            _, top, _, bottom = font.getbbox(str(digit))
            scaled = font.font_variant(
                size=round(0.8 * size * size / (bottom - top))
            )  # one height for all fonts
            left, top, right, bottom = scaled.getbbox(str(digit))
            canvas = Image.new("L", (size, size))
            corner = (
                (size - left - right) / 2,
                (size - top - bottom) / 2,
            )  # the ink in the middle
            ImageDraw.Draw(canvas).text(corner, str(digit), fill=255, font=scaled)
            masters[i, digit] = torch.from_numpy(np.array(canvas)) / 255
    angle = rng.normal(0, 0.10, count)  # radians
    shear, zoom = rng.normal(0, 0.10, count), rng.uniform(0.85, 1.10, count)
    shift = rng.uniform(-0.10, 0.10, (count, 2))  # of half the image width
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
    affine = np.stack(
        [cos, shear * cos - sin, shift[:, 0], sin, shear * sin + cos, shift[:, 1]],
        axis=1,
    )
    affine = torch.from_numpy(affine.reshape(count, 2, 3)).float()
    which_font = torch.from_numpy(rng.integers(len(GLYPH_FONTS), size=count))
    hue, value = (
        rng.random((count, 3)),
        np.stack([np.ones(count), *rng.uniform(0.0, 0.35, (2, count))], axis=1),
    )
    colors = hsv_to_rgb(
        np.stack([hue, rng.uniform(0.6, 1.0, (count, 3)), value], axis=-1)
    )  # (count, 3 colours, 3)
    ink, start, end = (
        torch.from_numpy(colors).float()[..., None, None].unbind(1)
    )  # each (count, 3, 1, 1)
    direction = torch.from_numpy(rng.random(count) * 2 * np.pi).float()[
        :, None, None, None
    ]
    axis = torch.linspace(-0.5, 0.5, image_size)
    images = torch.empty(count, image_size, image_size, 3, dtype=torch.uint8)
    for rows in torch.arange(count).split(1000):
        grid = F.affine_grid(
            affine[rows], (len(rows), 1, size, size), align_corners=False
        )
        mask = F.grid_sample(
            masters[which_font[rows], labels[rows]][:, None], grid, align_corners=False
        )
        mask = F.avg_pool2d(mask, 2)  # (n, 1, H, W)
        ramp = (
            direction[rows].cos() * axis + direction[rows].sin() * axis[:, None]
        )  # (n, 1, H, W)
        background = torch.lerp(
            start[rows], end[rows], (ramp + 0.5).clamp(0, 1)
        )  # (n, 3, H, W)
        images[rows] = (
            torch.lerp(background, ink[rows], mask)
            .mul(255)
            .round()
            .byte()
            .permute(0, 2, 3, 1)
        )
    return images, labels


def load_images(data, split, image_size):
    """All images of a data set, in memory.

    data: "glyphs", "mnist", "fashion_mnist", "cifar10", or a folder with one sub-folder per class, which may lie below
    train/ and test/ (or val/); without these two, a fixed 90/10 split is made. split: "train" or "test".
    Returns uint8 images (N, H, W, 3), int64 labels (N,) and the list of class names. Ends the program with one line if
    the data cannot be had, a file is no image (it is named) or an image is smaller than image_size.
    """
    if data == "glyphs":
        images, labels = draw_glyphs(
            GLYPH_COUNTS[split], image_size, seed=0 if split == "train" else 1
        )
        return images, labels, list("0123456789")
    if data in ("mnist", "fashion_mnist", "cifar10"):
        maker = {
            "mnist": "MNIST",
            "fashion_mnist": "FashionMNIST",
            "cifar10": "CIFAR10",
        }[data]
        root = Path("data").resolve()
        try:
            dataset = getattr(torchvision.datasets, maker)(
                root, train=split == "train", download=True
            )
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            fail(
                f"{data} is not in {root} and cannot be downloaded ({reason}); --data glyphs needs no network"
            )
        images, labels = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)
        if (
            images.ndim == 3
        ):  # grey (N, 28, 28): the margin makes 32, which halves evenly
            images = (
                F.pad(images, (2, 2, 2, 2))[..., None]
                .expand(-1, -1, -1, 3)
                .contiguous()
            )
        if image_size != images.shape[1]:
            fail(
                f"{data} has images of {images.shape[1]} pixels: leave --image-size at {images.shape[1]}"
            )
        return images, labels, list(dataset.classes)
    return load_folder(Path(data), split, image_size)


def load_folder(root, split, image_size):
    """load_images for a folder of class folders: resized so that the short side is image_size, then centre-cropped."""
    if not root.is_dir():
        fail(
            f"--data {root}: no such folder, and none of glyphs, mnist, fashion_mnist, cifar10"
        )
    has_splits = (root / "train").is_dir()
    folder = root
    if has_splits:
        folder = next(
            (
                root / name
                for name in ([split] if split == "train" else ["test", "val"])
                if (root / name).is_dir()
            ),
            None,
        )
        if folder is None:
            fail(f"{root} has a train/ folder but neither test/ nor val/")
    try:  # every file that is not hidden must be an image: a silently skipped file would be a silently smaller data set
        dataset = torchvision.datasets.ImageFolder(
            folder, is_valid_file=lambda path: Path(path).name[0] != "."
        )
    except FileNotFoundError as error:
        fail(
            f"{folder} needs one sub-folder of images per class: {str(error).splitlines()[0]}"
        )
    if (
        has_splits
        and split == "test"
        and dataset.classes
        != sorted(p.name for p in (root / "train").iterdir() if p.is_dir())
    ):
        fail(f"{folder} and {root / 'train'} do not have the same classes")
    files = dataset.samples
    if not has_splits:  # every tenth image of a fixed shuffle is a test image
        order = np.random.default_rng(0).permutation(len(files))
        files = [
            files[i]
            for i in np.sort(
                order[::10] if split == "test" else np.delete(order, np.s_[::10])
            )
        ]
    if not files:
        fail(f"{folder} has too few images for a {split} split")
    resize = Compose([Resize(image_size), CenterCrop(image_size)])
    images = torch.empty(len(files), image_size, image_size, 3, dtype=torch.uint8)
    for i, (path, _) in enumerate(
        tqdm(files, desc=f"read {split} images", disable=None)
    ):
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (
            UnidentifiedImageError,
            OSError,
            SyntaxError,
            ValueError,
        ) as error:  # Pillow raises all of these
            fail(
                f"{path} is not a readable image ({type(error).__name__}): mend or remove it"
            )
        if min(image.size) < image_size:
            fail(
                f"{path} has {image.width}x{image.height} pixels, fewer than --image-size {image_size}"
            )
        images[i] = torch.from_numpy(np.array(resize(image)))
    return images, torch.tensor([label for _, label in files]), dataset.classes


def to_float(images):
    """uint8 (B, H, W, 3) in 0..255 -> float32 (B, 3, H, W) in -1..1."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(x):
    """float (B, 3, H, W) in -1..1 -> uint8 (B, H, W, 3) in 0..255. The way back."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)


# ---------------------------------------------------------------------------------------------------------------------
# The model


@dataclass
class VQVAEConfig:
    image_size: int = 32  # pixels
    downsample: int = 4  # pixels per token, along each side: a power of 2
    channels: int = (
        96  # of the token grid; half as many at each doubling of the resolution
    )
    codebook_size: int = 4096  # K
    code_dim: int = 8  # d


class ResBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x):
        return x + self.body(x)


class VQVAE(nn.Module):
    """Image -> token grid -> image, through a codebook E of K unit vectors of d dimensions."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        halvings = int(math.log2(config.downsample))
        widths = [
            max(16, config.channels >> i) for i in reversed(range(halvings))
        ]  # from pixels to the token grid
        encoder, decoder = [], []
        for above, width in zip([3, *widths], widths):
            encoder += [
                nn.Conv2d(above, width, 4, stride=2, padding=1),
                ResBlock(width),
            ]
            # Up again: 4 * above channels become above channels of twice the height and width.
            decoder = [
                ResBlock(width),
                nn.Conv2d(width, 4 * above, 3, padding=1),
                nn.PixelShuffle(2),
                *decoder,
            ]
        encoder += [
            nn.GroupNorm(8, widths[-1]),
            nn.SiLU(),
            nn.Conv2d(widths[-1], config.code_dim, 1),
        ]
        decoder = [
            nn.Conv2d(config.code_dim, widths[-1], 3, padding=1),
            ResBlock(widths[-1]),
            *decoder,
        ]
        # channels_last: the same numbers, in the order in which convolutions are fastest (3 times, on a CPU).
        self.encoder = nn.Sequential(*encoder).to(memory_format=torch.channels_last)
        self.decoder = nn.Sequential(*decoder).to(memory_format=torch.channels_last)
        K, d = config.codebook_size, config.code_dim
        # Not parameters: no gradient reaches them, update_codebook moves them.
        self.register_buffer("codebook", F.normalize(torch.randn(K, d), dim=1))  # E
        self.register_buffer(
            "moving_count", torch.ones(K)
        )  # how many encoder outputs choose a code, per step
        self.register_buffer(
            "moving_sum", self.codebook.clone()
        )  # and their sum: sum / count is their mean

    @property
    def grid(self):
        """(h, w) of the token grid."""
        return (self.config.image_size // self.config.downsample,) * 2

    def encode(self, x):
        """float (B, 3, H, W) in -1..1 -> unit vectors (B, d, h, w)."""
        return F.normalize(
            self.encoder(x.contiguous(memory_format=torch.channels_last)).float(), dim=1
        )

    def nearest(self, vectors):
        """Unit vectors (n, d) -> int64 fine labels (n,): the index of the nearest codeword."""
        # |z - e|^2 = 2 - 2 z.e for unit vectors: the nearest code has the largest product. In pieces, since (n, K) may
        # not fit in memory, let alone in the cache.
        return torch.cat(
            [
                (piece @ self.codebook.T).max(dim=1).indices
                for piece in vectors.split(1024)
            ]
        )

    def quantize(self, z):
        """Replace each vector by the nearest codeword.

        z: (B, d, h, w). Returns the codes (B, d, h, w), int64 fine labels (B, T) row by row, and the commitment loss,
        which pulls encoder outputs to their codes. The straight-through step: z_q is what goes forward, but its
        gradient is handed to z as if quantising were the identity.
        """
        flat = z.permute(0, 2, 3, 1).flatten(0, 2)  # (B*T, d)
        fine = self.nearest(flat.detach()).view(len(z), -1)  # (B, T)
        z_q = self.codes(fine)  # (B, d, h, w)
        commitment = F.mse_loss(z, z_q)
        return z + (z_q - z).detach(), fine, commitment

    def codes(self, fine):
        """int64 fine labels (B, T) -> their codewords (B, d, h, w)."""
        return self.codebook[fine].unflatten(1, self.grid).permute(0, 3, 1, 2)

    def decode(self, z_q):
        """Codes (B, d, h, w) -> float images (B, 3, H, W), about -1..1."""
        return self.decoder(z_q.contiguous(memory_format=torch.channels_last)).float()

    def forward(self, x, quantized=True):
        """Images (B, 3, H, W) -> reconstructions, encoder outputs (B, d, h, w), fine labels (B, T), commitment loss."""
        z = self.encode(x)
        if not quantized:
            return self.decode(z), z, None, z.new_zeros(())
        z_q, fine, commitment = self.quantize(z)
        return self.decode(z_q), z, fine, commitment

    @torch.no_grad()
    def set_codes(self, which, vectors):
        """Place codes: which int64 (n,), vectors (n, d). Each gets an average share, so it lives for a while."""
        self.codebook[which] = vectors
        self.moving_count[which] = self.moving_count.mean()
        self.moving_sum[which] = vectors * self.moving_count.mean()

    @torch.no_grad()
    def update_codebook(self, z, fine, rng, decay=0.99, dead=0.02):
        """Move every code to the mean direction of the encoder outputs that chose it (in a moving average).

        z: (B, d, h, w), fine: (B, T). Codes used for less than `dead` of an average share start anew as one of the
        outputs in z: without this, most of a codebook is never used.
        """
        flat, fine = (
            z.permute(0, 2, 3, 1).flatten(0, 2),
            fine.flatten(),
        )  # (B*T, d), (B*T,)
        self.moving_count.mul_(decay).add_(
            fine.bincount(minlength=len(self.codebook)), alpha=1 - decay
        )
        sums = torch.zeros_like(self.moving_sum).index_add_(0, fine, flat)
        self.moving_sum.mul_(decay).add_(sums, alpha=1 - decay)
        self.codebook.copy_(
            F.normalize(self.moving_sum, dim=1)
        )  # the mean's direction: codes are unit vectors
        dead_codes = (self.moving_count < dead * self.moving_count.mean()).nonzero()[
            :, 0
        ]
        reborn = torch.from_numpy(rng.integers(len(flat), size=len(dead_codes))).to(
            flat.device
        )
        self.set_codes(dead_codes, flat[reborn])

    def usage(self):
        """(percent of codes with at least a tenth of an average share, perplexity of the shares), from the moving counts.

        The moving counts span about 100 steps, so this works even when a batch holds fewer tokens than there are codes.
        """
        share = self.moving_count / self.moving_count.sum()
        entropy = -(share * share.clamp(min=1e-12).log()).sum()
        return 100 * (
            share > 0.1 / len(share)
        ).float().mean().item(), entropy.exp().item()


def load_tokenizer(out, device):
    """(VQVAE in eval mode on device, the artifact) from the folder out."""
    artifact = load(out / "tokenizer.pt", "tokenizer.py")
    model = VQVAE(VQVAEConfig(**artifact["config"]))
    model.load_state_dict(artifact["model"])
    return model.eval().to(device), artifact


# ---------------------------------------------------------------------------------------------------------------------
# Training


@torch.no_grad()
def reconstruct(model, images, batch_size=500):
    """uint8 images (N, H, W, 3) -> int64 fine labels (N, T) and uint8 reconstructions, both where images are."""
    fine, reconstructions = [], []
    for batch in images.split(batch_size):
        x = to_float(batch.to(model.codebook.device))
        _, labels, _ = model.quantize(model.encode(x))
        fine.append(labels.to(images.device))
        reconstructions.append(
            to_uint8(model.decode(model.codes(labels))).to(images.device)
        )
    return torch.cat(fine), torch.cat(reconstructions)


def psnr(images, reconstructions):
    """Mean over images of the peak signal-to-noise ratio in dB. Both uint8 (N, H, W, 3)."""
    error = (
        (images.float() - reconstructions.float())
        .square()
        .mean(dim=(1, 2, 3))
        .clamp(min=1e-3)
    )
    return (20 * math.log10(255) - 10 * error.log10()).mean().item()


def plot(path, history, images, reconstructions):
    """tokenizer.png: unseen images above their reconstructions, and the training curves."""
    figure = Figure(figsize=(12, 6.5))
    strips, curves = figure.subfigures(2, 1, height_ratios=[1, 1.2])
    strips.suptitle(
        "Unseen images (above) and their reconstructions from tokens (below)"
    )
    for axes, image in zip(
        strips.subplots(2, 12).flat,
        torch.cat([images[:12], reconstructions[:12]]).cpu(),
    ):
        axes.imshow(image)
        axes.axis("off")
    loss, psnrs, codes = curves.subplots(1, 3)
    loss.semilogy(history["loss"], color="tab:blue")
    loss.set(
        title="Training loss", xlabel="step", ylabel="squared error + 0.25 commitment"
    )
    steps = [row["step"] for row in history["heldout"]]
    psnrs.plot(
        steps, [row["psnr"] for row in history["heldout"]], color="tab:blue", marker="."
    )
    psnrs.set(
        title="Reconstruction of unseen images", xlabel="step", ylabel="PSNR in dB"
    )
    codes.plot(
        steps,
        [row["perplexity"] for row in history["heldout"]],
        color="tab:blue",
        marker=".",
    )
    codes.set(
        title="Codes in effective use", xlabel="step", ylabel="perplexity", ylim=0
    )
    save_figure(figure, path)


def main(argv=None):
    parser = CommandLine(__doc__)
    parser.add_argument(
        "--data",
        default="glyphs",
        help="glyphs, mnist, fashion_mnist, cifar10, or a folder",
    )
    parser.add_argument(
        "--image-size",
        type=number(int, 8),
        default=VQVAEConfig.image_size,
        help="pixels",
    )
    parser.add_argument(
        "--downsample",
        type=int,
        choices=[2, 4, 8, 16],
        default=VQVAEConfig.downsample,
        help="pixels per token, along each side",
    )
    parser.add_argument(
        "--codebook-size",
        type=number(int, 2),
        default=VQVAEConfig.codebook_size,
        help="K",
    )
    parser.add_argument(
        "--code-dim", type=number(int, 2), default=VQVAEConfig.code_dim, help="d"
    )
    parser.add_argument(
        "--channels",
        type=number(int, 16),
        default=VQVAEConfig.channels,
        help="a multiple of 16",
    )
    parser.add_argument("--steps", type=number(int, 1), default=1000)
    parser.add_argument("--batch-size", type=number(int, 1), default=128)
    parser.add_argument(
        "--lr", type=number(float, 0), default=2e-3, help="peak learning rate"
    )
    parser.add_argument(
        "--unquantized-steps",
        type=number(int, 0),
        default=150,
        help="steps before the codebook",
    )
    parser.add_argument(
        "--save-every",
        type=number(int, 1),
        default=200,
        help="steps between saves and measurements",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on where an interrupted run stopped"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile, worth it for long runs on a GPU",
    )
    args = parser.parse_args(argv)
    if args.image_size % args.downsample:
        parser.error(
            f"--image-size {args.image_size} is no multiple of --downsample {args.downsample}"
        )
    if args.channels % 16:
        parser.error(f"--channels {args.channels} is no multiple of 16")
    device = pick_device(args.device)
    settings = {k: str(v) if k == "out" else v for k, v in vars(args).items()}
    for name in ("out", "device", "save_every", "resume", "compile"):
        del settings[name]  # what is left decides the weights

    torch.manual_seed(args.seed)
    names = VQVAEConfig.__dataclass_fields__
    model = VQVAE(VQVAEConfig(**{name: settings[name] for name in names})).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        betas=(0.9, 0.95),
        weight_decay=0.05,
        fused=device.type != "mps",
    )
    first_step, seconds, history = 0, 0.0, {"loss": [], "heldout": []}
    if args.resume:
        checkpoint = resume(args.out / "tokenizer.pt", "tokenizer.py", settings)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        first_step, seconds, history = (
            checkpoint["step"],
            checkpoint["seconds"],
            checkpoint["history"],
        )

    images, labels, classes = load_images(args.data, "train", args.image_size)
    test_images, test_labels, _ = load_images(args.data, "test", args.image_size)
    images, test_images = images.to(device), test_images.to(device)
    print(
        f"{args.data}: {len(images)} train and {len(test_images)} test images of {len(classes)} classes, on {device}"
    )
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, K = {args.codebook_size} codes"
    )
    versions = {
        m.__name__: str(m.__version__) for m in (torch, torchvision, np, matplotlib)
    }
    versions["python"] = platform.python_version()

    def save_checkpoint(step):
        data = {
            "name": args.data,
            "image_size": args.image_size,
            "classes": classes,
            "versions": versions,
        }
        save(
            {
                "script": "tokenizer.py",
                "model": model.state_dict(),
                "config": asdict(model.config),
                "data": data,
                "codebook_id": short_hash(model.codebook),
                "settings": settings,
                "step": step,
                "seconds": seconds,
                "optimizer": optimizer.state_dict(),
                "history": history,
            },
            args.out / "tokenizer.pt",
        )

    run = torch.compile(model) if args.compile else model
    bar = tqdm(
        range(first_step, args.steps),
        "tokenizer",
        args.steps,
        initial=first_step,
        mininterval=1,
    )
    with interruptible() as stop:
        for step in bar:
            start = time.perf_counter()
            rng = np.random.default_rng(
                (args.seed, step)
            )  # a step's randomness depends on nothing before it: --resume
            if step == args.unquantized_steps:
                # Start with codes where encoder outputs are. Random codes would leave most of them unused for good.
                enough = math.ceil(args.codebook_size / math.prod(model.grid))
                some = torch.from_numpy(
                    rng.permutation(len(images))[: max(enough, args.batch_size)]
                ).to(device)
                with torch.no_grad():
                    z = torch.cat(
                        [
                            model.encode(to_float(images[part]))
                            for part in some.split(500)
                        ]
                    )
                z = z.permute(0, 2, 3, 1).flatten(0, 2)  # (n, d)
                chosen = rng.permutation(
                    np.resize(np.arange(len(z)), max(len(z), args.codebook_size))
                )
                everything = torch.arange(args.codebook_size, device=device)
                model.set_codes(
                    everything,
                    z[torch.from_numpy(chosen[: args.codebook_size]).to(device)],
                )
            batch = torch.from_numpy(
                rng.integers(len(images), size=args.batch_size)
            ).to(device)
            x = to_float(images[batch])  # (B, 3, H, W)
            with autocast(device):
                x_hat, z, fine, commitment = run(
                    x, quantized=step >= args.unquantized_steps
                )
            loss = F.mse_loss(x_hat, x) + 0.25 * commitment
            if not math.isfinite(loss.item()):
                bar.close()
                fail(
                    f"the loss is {loss.item()} at step {step}: nothing saved since the last save; try a lower --lr"
                )
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.steps, args.lr)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if fine is not None:
                model.update_codebook(z.detach(), fine, rng)
            history["loss"].append(loss.item())
            seconds += time.perf_counter() - start
            done = step + 1
            if done % args.save_every == 0 or done == args.steps:
                used, perplexity = model.usage()
                heldout = psnr(
                    test_images[:1000], reconstruct(model, test_images[:1000])[1]
                )
                history["heldout"].append(
                    {
                        "step": done,
                        "seconds": seconds,
                        "psnr": heldout,
                        "usage": used,
                        "perplexity": perplexity,
                    }
                )
                tqdm.write(
                    f"step {done}: {heldout:.2f} dB on unseen images, {used:.1f}% of the codes used, "
                    f"perplexity {perplexity:.0f} of {args.codebook_size}"
                )
            if done % args.save_every == 0 or done == args.steps or stop.is_set():
                save_checkpoint(done)
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            if stop.is_set():
                bar.close()
                print(
                    f"stopped after step {done}; go on with the same command and --resume",
                    file=sys.stderr,
                )
                raise SystemExit(130)

    fine, _ = reconstruct(model.eval(), images)
    test_fine, reconstructions = reconstruct(model, test_images)
    counts = test_fine.flatten().bincount(minlength=args.codebook_size).double()
    share = counts[counts > 0] / counts.sum()
    print(
        f"all {len(test_images)} test images: {psnr(test_images, reconstructions):.2f} dB, "
        f"{100 * len(share) / args.codebook_size:.1f}% of the codes occur, "
        f"perplexity {math.exp(-(share * share.log()).sum()):.0f}; trained for {seconds:.0f} s"
    )
    tokens = {
        "train_fine": fine.int().cpu(),
        "test_fine": test_fine.int().cpu(),
        "train_labels": labels,
        "test_labels": test_labels,
        "grid": model.grid,
        "classes": classes,
        "codebook_size": args.codebook_size,
        "codebook_id": short_hash(model.codebook),
        "script": "tokenizer.py",
    }
    save(tokens, args.out / "tokens.pt")
    plot(args.out / "tokenizer.png", history, test_images, reconstructions)
    print(f"wrote tokenizer.pt, tokens.pt and tokenizer.png to {args.out}")


if __name__ == "__main__":
    main()
