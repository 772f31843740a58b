"""The tokenizer: a VQ-VAE that turns an image into a grid of discrete tokens and back.

An encoder makes a vector of each cell of a grid, each vector is replaced by the nearest
of K learnt codewords, and a decoder paints the image from these. The numbers of the
codewords are the tokens.

CTF (arXiv 2503.16194) starts from such a tokenizer with a large codebook. A token is
the index of one of K codewords, its *fine label*. The recipe is LlamaGen's (arXiv
2406.06525): l2-normalised codes of only d = 8 dimensions and a commitment
weight of 0.25. The codes follow moving averages (van den Oord et al. 2017, appendix
A.1). There is no perceptual and no adversarial loss.

    python tokenizer.py                   # drawn digits, 32x32 pixels -> 8x8 tokens
    python tokenizer.py --data cifar10    # mnist, fashion_mnist, a folder of classes

Reads images; writes tokenizer.pt, tokens.pt (the fine labels of the whole data set) and
tokenizer.png to --out. On two CPU cores: 3 minutes, 27 dB on unseen images, nearly all
of the 4096 codes in use.

Axis legend of all files: B batch, N images, T tokens, C channels, H W pixels, h w token
grid, K codewords, M clusters, d code dimension, V vocabulary of the model at hand.
"""

import argparse
import hashlib
import math
import os
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
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torchvision.transforms import CenterCrop, Compose, Resize
from tqdm import tqdm

# --------------------------------------------------------------------------------------
# What every stage needs: flags, files, the device, Ctrl-C. Skip it on a first reading.


def reason(error):
    """The first line of what an exception says."""
    return str(error).partition("\n")[0] or type(error).__name__


def fail(message):
    """End the program with one line on stderr and exit code 1."""
    raise SystemExit(f"error: {message}")


def at_least(low, kind=int):
    """An argparse type: a number from low up to what fits in 63 bits."""

    def parse(text):
        """The number in text; raises ArgumentTypeError if it is out of range."""
        if not low <= (value := kind(text)) < 2**63:
            raise argparse.ArgumentTypeError(f"{text} is not in {low} .. 2^63")
        return value

    parse.__name__ = kind.__name__  # argparse prints it: "invalid int value: 'x'"
    return parse


class CommandLine(argparse.ArgumentParser):
    """argparse with the flags of all stages; an error is one line and exit code 2."""

    def __init__(self, doc):
        super().__init__(
            description=doc.split("\n")[0],
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        self.add_argument("--out", type=Path, default="out", help="folder of artifacts")
        self.add_argument("--seed", type=at_least(0), default=0, help="of everything")
        self.add_argument("--device", default="auto", help="auto: cuda, mps, or cpu")

    def add_training_flags(self, steps, batch_size, lr):
        """What the three training scripts share."""
        add = self.add_argument
        add("--steps", type=at_least(1), default=steps, help="training steps")
        add("--batch-size", type=at_least(1), default=batch_size, help="images a step")
        add("--lr", type=at_least(0, float), default=lr, help="peak learning rate")
        add("--save-every", type=at_least(1), default=200, help="and measure, in steps")
        add("--resume", action="store_true", help="go on where a run was interrupted")
        add("--compile", action="store_true", help="torch.compile, for long GPU runs")

    def error(self, message):
        """Print message in one line, without argparse's usage, and exit with code 2."""
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def pick_device(name):
    """The torch.device called name; "auto" is the fastest one there is."""
    if name == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else mps
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


def autocast(device):
    """bfloat16 products where a CUDA card has them; float32 on all other devices."""
    cuda = device.type == "cuda"
    native = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=native)


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
    except RuntimeError as error:
        fail(f"{path} does not fit this code, train it again ({reason(error)})")


def start_or_resume(args, path, script, settings, model, optimizer):
    """Where training begins: (step, seconds so far, history).

    With --resume, from the checkpoint at path, which is loaded into model and
    optimizer; one that was trained with other settings is refused.
    """
    try:  # now, and not only when an hour of training is to be saved
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out {path.parent}: {error.strerror}")
    if not os.access(path.parent, os.W_OK):
        fail(f"--out {path.parent} cannot be written to")
    if not args.resume:
        return 0, 0.0, {"loss": [], "heldout": []}
    checkpoint = load(path, script)
    for name, value in settings.items():
        before = checkpoint["settings"].get(name)
        if before != value:
            fail(f"--resume: {path} was trained with {name} {before}, not {value}")
    load_weights(model, checkpoint, path)
    optimizer.load_state_dict(checkpoint["optimizer"])
    return checkpoint["step"], checkpoint["seconds"], checkpoint["history"]


def save_checkpoint(path, model, optimizer, **facts):
    """What later stages need to build the model, and --resume to train it further.

    Fails, and leaves path as it is, if a weight is not finite.
    """
    if not all(weight.isfinite().all() for weight in model.state_dict().values()):
        fail(f"a weight is not finite; {path} is of the last save, if any")
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    save(path, **states, **facts)


def training_settings(args, **more):
    """Everything that decides the weights, as a dict: the flags, and more."""
    others = ("out", "device", "save_every", "keep_every", "resume", "compile")
    return {k: v for k, v in vars(args).items() if k not in others} | more


@contextmanager
def interruptible():
    """Yields an event that Ctrl-C sets: the training loop ends after a whole step.

    A second Ctrl-C ends the program at once.
    """
    stop, previous = threading.Event(), signal.getsignal(signal.SIGINT)

    def on_interrupt(*_):
        """The first Ctrl-C; from then on it does what it did before."""
        stop.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


def leave(step):
    """End the program after Ctrl-C."""
    print(f"stopped after step {step}: add --resume to go on", file=sys.stderr)
    raise SystemExit(130)


def run_script(main):
    """Call main() of a script; Ctrl-C outside of a training loop is no traceback."""
    try:
        main()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None


def finite(loss, step, path):
    """The loss as a float; ends the program if it is nan or infinite."""
    value = loss.item()
    if not math.isfinite(value):
        fail(f"the loss is {value} at step {step}; {path} is of the last save, if any")
    return value


def learning_rate(step, steps, peak, warmup=50):
    """Linear warm-up, then a cosine from peak down to a tenth of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)  # 0 .. 1
    return peak * (0.55 + 0.45 * math.cos(math.pi * progress))


def short_hash(*tensors):
    """12 hex digits that name the content of tensors."""
    content = hashlib.sha256()
    for tensor in tensors:
        content.update(tensor.cpu().contiguous().numpy())
    return content.hexdigest()[:12]


# --------------------------------------------------------------------------------------
# Images

# The text fonts with digits that ship inside matplotlib.
GLYPH_FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmb10", "cmr10", "cmss10", "cmtt10"),
)
GLYPH_COUNTS = {"train": 20_000, "test": 5_000}


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


def draw_glyphs(count, image_size, seed):
    """Digits in bright colours on dark gradients, a little turned, slanted and moved.

    Returns uint8 images (count, H, W, 3) and balanced int64 labels (count,). The same
    seed draws the same images; other seeds differ in everything but the fonts.
    """
    rng = np.random.default_rng((seed, count))
    labels = torch.from_numpy(rng.permutation(np.arange(count) % 10))
    fonts = torch.from_numpy(rng.integers(len(GLYPH_FONTS), size=count))
    turn, shear = rng.normal(0, 0.1, (2, count))  # radians, and a slope
    zoom, (dx, dy) = rng.uniform(0.85, 1.1, count), rng.uniform(-0.1, 0.1, (2, count))
    cos, sin = np.cos(turn) / zoom, np.sin(turn) / zoom
    affine = np.stack([cos, shear * cos - sin, dx, sin, shear * sin + cos, dy], axis=1)
    affine = torch.from_numpy(affine.reshape(count, 2, 3)).float()
    hue, saturation = rng.random((count, 3)), rng.uniform(0.6, 1, (count, 3))
    value = rng.uniform((1, 0, 0), (1, 0.35, 0.35), (count, 3))
    colors = hsv_to_rgb(np.stack([hue, saturation, value], axis=-1))
    colors = torch.from_numpy(colors).float()[..., None, None]  # (count, 3, rgb, 1, 1)
    angle = torch.from_numpy(rng.uniform(0, 2 * np.pi, (count, 1, 1, 1))).float()
    across = torch.linspace(-0.5, 0.5, image_size)
    # Drawn at twice the resolution and averaged down, for smooth edges.
    size = 2 * image_size
    masters = glyph_masters(size)
    images = torch.empty(count, image_size, image_size, 3, dtype=torch.uint8)
    for i in torch.arange(count).split(1000):
        grid = F.affine_grid(affine[i], (len(i), 1, size, size), align_corners=False)
        glyphs = masters[fonts[i], labels[i]][:, None]  # (n, 1, 2H, 2W)
        mask = F.avg_pool2d(F.grid_sample(glyphs, grid, align_corners=False), 2)
        ink, start, end = colors[i].unbind(1)  # (n, rgb, 1, 1)
        down = angle[i].sin() * across[:, None]  # (n, 1, H, 1)
        ramp = angle[i].cos() * across + down  # (n, 1, H, W)
        background = torch.lerp(start, end, (ramp + 0.5).clamp(0, 1))  # (n, rgb, H, W)
        drawn = torch.lerp(background, ink, mask).permute(0, 2, 3, 1)
        images[i] = (drawn * 255).round().byte()
    return images, labels


def load_images(data, split, image_size):
    """All images of a data set, in memory.

    data: "glyphs", "mnist", "fashion_mnist", "cifar10", or a folder with a sub-folder
    per class, either below train/ and test/ (or val/), or split 90/10. split: "train"
    or "test". Returns uint8 images (N, H, W, 3), int64 labels (N,) and the class names.
    Fails in one line if the data cannot be had, a file is no image, or one is smaller
    than image_size.
    """
    if data == "glyphs":
        seed = ["train", "test"].index(split)
        images, labels = draw_glyphs(GLYPH_COUNTS[split], image_size, seed)
        return images, labels, list("0123456789")
    names = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}
    if data not in names:
        return load_folder(Path(data), split, image_size)
    root, train = Path("data").resolve(), split == "train"
    try:
        dataset = getattr(torchvision.datasets, names[data])(root, train, download=True)
    except Exception as error:  # noqa: BLE001  a dozen kinds, from no network to no zip
        offline = "--data glyphs needs no network"
        fail(f"no {data} in {root}, no download ({reason(error)}); {offline}")
    images, labels = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)
    if images.ndim == 3:  # grey (N, 28, 28): padded to 32, three equal channels
        images = F.pad(images, (2, 2, 2, 2))[..., None].expand(-1, -1, -1, 3)
    if image_size != 32:
        fail(f"--image-size {image_size}: the images of {data} have 32 pixels")
    return images.contiguous(), labels, list(dataset.classes)


def load_folder(root, split, image_size):
    """load_images for a folder: resized to the short side, the centre cut out."""
    folder = root
    if (root / "train").is_dir():
        folder = root / split
        if split == "test" and not folder.is_dir():
            folder = root / "val"
    try:  # a file that is not hidden must be an image: none is skipped silently
        dataset = torchvision.datasets.ImageFolder(
            folder, is_valid_file=lambda path: Path(path).name[0] != "."
        )
    except OSError as error:
        known = "a known data set, nor class folders of images"
        fail(f"{folder}: not {known} ({reason(error)})")
    # Shuffled, always alike: the first 1,000 of them shall be of all classes.
    order = np.random.default_rng(0).permutation(len(dataset.samples))
    files = [dataset.samples[i] for i in order]
    if folder == root:  # no splits: a tenth for testing
        tenth = len(files) // 10
        files = files[:tenth] if split == "test" else files[tenth:]
    if not files:
        fail(f"{folder} has too few images to split them 90/10")
    resize = Compose([Resize(image_size), CenterCrop(image_size)])
    images = torch.empty(len(files), image_size, image_size, 3, dtype=torch.uint8)
    for i, (path, _) in enumerate(tqdm(files, f"read {split} images", disable=None)):
        try:
            with Image.open(path) as file:
                image = ImageOps.exif_transpose(file).convert("RGB")
        except Exception as error:  # noqa: BLE001  Pillow raises five kinds
            fail(f"{path} is no readable image ({type(error).__name__}): remove it")
        if min(image.size) < image_size:
            size = f"{image.width}x{image.height}"
            fail(f"{path} has {size} pixels, fewer than --image-size {image_size}")
        images[i] = torch.from_numpy(np.array(resize(image)))
    return images, torch.tensor([label for _, label in files]), dataset.classes


def to_float(images):
    """uint8 (B, H, W, 3), 0..255 -> float32 (B, 3, H, W), -1..1."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(x):
    """float (B, 3, H, W), -1..1 -> uint8 (B, H, W, 3), 0..255."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)


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
            layers += [nn.GroupNorm(math.gcd(8, channels), channels), nn.SiLU()]
            layers += [nn.Conv2d(channels, channels, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.layers(x)


class VQVAE(nn.Module):
    """Image -> token grid -> image, by way of a codebook E of K unit vectors."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        halvings = config.downsample.bit_length() - 1
        widths = [max(16, config.channels >> i) for i in reversed(range(halvings))]
        encoder, decoder = [], []
        for before, width in zip([3, *widths], widths):  # from the pixels inwards
            encoder += [nn.Conv2d(before, width, 4, stride=2, padding=1)]
            encoder += [ResBlock(width)]
            # The way back: 4 * before channels become before channels of double size.
            up = nn.Conv2d(width, 4 * before, 3, padding=1)
            decoder = [ResBlock(width), up, nn.PixelShuffle(2), *decoder]
        inner = widths[-1]
        encoder += [nn.SiLU(), nn.Conv2d(inner, config.code_dim, 1)]
        first = nn.Conv2d(config.code_dim, inner, 3, padding=1)
        decoder = [first, ResBlock(inner), *decoder]
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder)
        # Buffers: no gradient reaches the codes, update_codebook moves them.
        codes = F.normalize(torch.randn(config.codebook_size, config.code_dim), dim=1)
        self.register_buffer("codebook", codes)  # E, (K, d)
        self.register_buffer("moving_count", torch.ones(len(codes)))
        self.register_buffer("moving_sum", codes.clone())
        side = config.image_size // config.downsample
        self.grid = (side, side)  # (h, w)

    def encode(self, x):
        """Images float (B, 3, H, W), -1..1 -> unit vectors (B, d, h, w)."""
        return F.normalize(self.encoder(x).float(), dim=1)

    def quantize(self, z):
        """Replace every vector by the nearest codeword, with a straight-through step.

        z: unit vectors (B, d, h, w). Returns the codes (B, d, h, w), the fine labels
        int64 (B, T) row by row, and the commitment loss, which pulls z to its codes.
        """
        # |z - e|^2 = 2 - 2 z.e for unit vectors: the largest product is the nearest.
        # In pieces, since (B*T, K) at once may not fit in memory.
        pieces = z.detach().permute(0, 2, 3, 1).flatten(0, 2).split(1024)  # (<=1024, d)
        with torch.autocast(z.device.type, enabled=False):  # bfloat16 would pick others
            fine = torch.cat([(p @ self.codebook.T).max(dim=1).indices for p in pieces])
        fine = fine.view(len(z), -1)  # (B, T)
        z_q = self.codes(fine)  # (B, d, h, w)
        commitment = F.mse_loss(z, z_q)
        # Forward this is z_q; backward the gradient goes to z as if nothing happened.
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

    @torch.no_grad()
    def set_codes(self, which, vectors):
        """Place the codes which (n,) at vectors (n, d), with an average usage."""
        self.codebook[which] = vectors
        self.moving_count[which] = self.moving_count.mean()
        self.moving_sum[which] = vectors * self.moving_count.mean()

    @torch.no_grad()
    def update_codebook(self, z, fine, rng, decay=0.99, dead=0.02):
        """Move each code to the mean direction of the vectors that chose it.

        z (B, d, h, w) and fine (B, T) are a batch's; the mean is a moving one. Codes
        with under dead of an average usage start anew at a vector of z: without that,
        most of a large codebook is never used.
        """
        vectors, fine = z.permute(0, 2, 3, 1).flatten(0, 2), fine.flatten()  # (B*T, d)
        counts = fine.bincount(minlength=len(self.codebook))  # (K,)
        sums = torch.zeros_like(self.moving_sum).index_add_(0, fine, vectors)  # (K, d)
        self.moving_count.lerp_(counts.float(), 1 - decay)
        self.moving_sum.lerp_(sums, 1 - decay)
        self.codebook.copy_(F.normalize(self.moving_sum, dim=1))  # unit vectors again
        is_dead = self.moving_count < dead * self.moving_count.mean()
        which = is_dead.nonzero()[:, 0]
        reborn = torch.from_numpy(rng.integers(len(vectors), size=len(which)))
        self.set_codes(which, vectors[reborn.to(z.device)])

    @torch.no_grad()
    def fill_codebook(self, images, rng):
        """Start every code at an encoder output: at random, most would stay unused.

        images: uint8 (N, H, W, 3), of which as many are encoded as give K vectors.
        """
        K, T = len(self.codebook), math.prod(self.grid)
        some = torch.from_numpy(rng.integers(len(images), size=max(64, K // T + 1)))
        parts = some.to(images.device).split(250)
        z = torch.cat([self.encode(to_float(images[part])) for part in parts])
        vectors = z.permute(0, 2, 3, 1).flatten(0, 2)  # (>= K, d)
        chosen = torch.from_numpy(rng.permutation(len(vectors))[:K]).to(z.device)
        self.set_codes(torch.arange(K, device=z.device), vectors[chosen])

    def usage(self):
        """(percent of the codes in use, perplexity), from the moving counts.

        Perplexity: exp(entropy of the shares), K if all codes are used alike, 1 if one.
        In use: a tenth of an average share or more. The moving counts span about 100
        steps, so this holds even when a batch has fewer tokens than there are codes.
        """
        share = (self.moving_count / self.moving_count.sum()).cpu()
        used = (share > 0.1 / len(share)).float().mean()
        return 100 * used.item(), torch.special.entr(share).sum().exp().item()


def load_tokenizer(out, device):
    """(VQVAE in eval mode on device, the artifact) from the folder out."""
    artifact = load(out / "tokenizer.pt", "tokenizer.py")
    model = VQVAE(VQVAEConfig(**artifact["config"]))
    load_weights(model, artifact, out / "tokenizer.pt")
    return to_device(model.eval(), device), artifact


# --------------------------------------------------------------------------------------
# Training


@torch.inference_mode()
def tokenize(model, images):
    """Images uint8 (N, H, W, 3) -> their fine labels int64 (N, T)."""
    parts = [model.encode(to_float(part)) for part in images.split(250)]
    return torch.cat([model.quantize(z)[1] for z in parts])


@torch.inference_mode()
def reconstruct(model, fine):
    """Fine labels int64 (N, T) -> images uint8 (N, H, W, 3). The way back."""
    parts = [to_uint8(model.decode(model.codes(part))) for part in fine.split(250)]
    return torch.cat(parts)


def psnr(images, others):
    """Peak signal-to-noise ratio in dB, mean over images; uint8 (N, H, W, 3)."""
    error = (images.float() - others.float()).square().mean(dim=(1, 2, 3))  # (N,)
    return (10 * (255**2 / error.clamp(min=1e-3)).log10()).mean().item()


def plot(path, history, images, reconstructions, K):
    """tokenizer.png: unseen images and their reconstructions, and the curves.

    images and reconstructions uint8 (N, H, W, 3); K is the size of the codebook.
    """
    figure = Figure(figsize=(12, 6), layout="constrained")
    pictures, curves = figure.subfigures(2, 1, height_ratios=[2, 3])
    pictures.suptitle("unseen images (above), decoded from their tokens (below)")
    n = min(12, len(images))
    both = torch.cat([images[:n], reconstructions[:n]]).cpu().numpy()
    for axes, image in zip(pictures.subplots(2, n).flat, both):
        axes.imshow(image)
        axes.axis("off")
    measured = history["heldout"]
    steps = [row["step"] for row in measured]
    loss, quality, codes = curves.subplots(1, 3)
    loss.semilogy(range(1, len(history["loss"]) + 1), history["loss"])
    loss.set(title="training loss", ylabel="squared error + 0.25 commitment")
    quality.plot(steps, [row["psnr"] for row in measured], marker=".")
    quality.set(title="reconstruction of unseen images", ylabel="PSNR, dB")
    codes.plot(steps, [row["perplexity"] for row in measured], marker=".")
    codes.axhline(K, color="grey", linestyle=":", label=f"all {K} codes alike")
    codes.set(title="codes in effective use", ylabel="perplexity", ylim=0)
    codes.legend()
    for axes in (loss, quality, codes):
        axes.set_xlabel("step")
    save_figure(path, figure)


def write_tokens(out, model, classes, train_set, test_set):
    """Tokenize the whole data set, each set a pair of images and labels: tokens.pt.

    Returns the reconstructions of the test images, uint8 (N, H, W, 3).
    """
    (images, labels), (test_images, test_labels) = train_set, test_set
    K = len(model.codebook)
    fine, test_fine = tokenize(model, images), tokenize(model, test_images)
    save(
        out / "tokens.pt",
        script="tokenizer.py",
        train_fine=fine.int().cpu(),
        test_fine=test_fine.int().cpu(),
        train_labels=labels,
        test_labels=test_labels,
        classes=classes,
        grid=model.grid,
        codebook_size=K,
        codebook_id=short_hash(model.codebook),
    )
    occur = len(test_fine.unique()) / K
    reconstructions = reconstruct(model, test_fine)
    quality = f"{psnr(test_images, reconstructions):.2f} dB"
    print(f"all unseen images: {quality}, {occur:.1%} of the codes occur in them")
    return reconstructions


def main(argv=None):
    parser, config = CommandLine(__doc__), VQVAEConfig()
    add = parser.add_argument
    add("--data", default="glyphs", help="mnist, fashion_mnist, cifar10, or a folder")
    add("--image-size", type=at_least(8), default=config.image_size, help="pixels")
    factors, side = [2, 4, 8, 16], "pixels per token, along a side"
    add("--downsample", type=int, choices=factors, default=config.downsample, help=side)
    add("--channels", type=at_least(16), default=config.channels, help="network width")
    add("--codebook-size", type=at_least(2), default=config.codebook_size, help="K")
    add("--code-dim", type=at_least(2), default=config.code_dim, help="d")
    add("--codebook-after", type=at_least(0), default=150, help="steps without codes")
    parser.add_training_flags(steps=600, batch_size=128, lr=2e-3)
    args = parser.parse_args(argv)
    if args.image_size % args.downsample:
        parser.error(f"--image-size must be a multiple of {args.downsample}")
    device, path = pick_device(args.device), args.out / "tokenizer.pt"

    torch.manual_seed(args.seed)
    config = VQVAEConfig(**{name: getattr(args, name) for name in vars(config)})
    model = to_device(VQVAE(config), device)
    fused = device.type != "mps"
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), fused=fused)
    settings = training_settings(args)
    # Until then it is a plain autoencoder; the last step always has a codebook.
    codebook_after = min(args.codebook_after, args.steps - 1)
    first, seconds, history = start_or_resume(
        args, path, "tokenizer.py", settings, model, optimizer
    )
    images, labels, classes = load_images(args.data, "train", args.image_size)
    test_images, test_labels, names = load_images(args.data, "test", args.image_size)
    if names != classes:
        fail(f"{args.data}: train and test do not have the same class folders")
    images, test_images = images.to(device), test_images.to(device)
    print(f"{args.data}: {len(images)} + {len(test_images)} images, on {device}")
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{size:.2f}M parameters, {args.codebook_size} codes")
    modules = (torch, torchvision, np, matplotlib)  # what draws and reads the images
    data = {
        "name": args.data,
        "image_size": args.image_size,
        "classes": classes,
        "versions": {module.__name__: str(module.__version__) for module in modules},
    }
    facts = {"script": "tokenizer.py", "config": asdict(config), "data": data}
    facts |= {"settings": settings, "history": history}

    if args.compile:
        model.compile()
    todo = tqdm(range(first, args.steps), "tokenizer", args.steps, initial=first)
    with interruptible() as stop, todo as bar:
        for step in bar:
            began = time.perf_counter()
            # Seeded by the step, so that a resumed run draws what it would have drawn.
            rng = np.random.default_rng((args.seed, step))
            if step == codebook_after:
                model.fill_codebook(images, rng)
            batch = torch.from_numpy(rng.integers(len(images), size=args.batch_size))
            x = to_float(images[batch.to(device)])  # (B, 3, H, W)
            with autocast(device):
                x_hat, z, fine, commitment = model(x, quantized=step >= codebook_after)
            loss = F.mse_loss(x_hat, x) + 0.25 * commitment
            history["loss"].append(finite(loss, step, path))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.steps, args.lr)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if fine is not None:
                model.update_codebook(z.detach(), fine, rng)
            bar.set_postfix(loss=f"{history['loss'][-1]:.4f}", refresh=False)
            seconds, done = seconds + time.perf_counter() - began, step + 1
            if done % args.save_every == 0 or done == args.steps:
                some = test_images[:1000]
                quality = psnr(some, reconstruct(model, tokenize(model, some)))
                used, perplexity = model.usage()
                row = {"psnr": quality, "usage": used, "perplexity": perplexity}
                history["heldout"].append({"step": done, "seconds": seconds, **row})
                codes = f"{used:.1f}% of the codes in use, perplexity {perplexity:.0f}"
                tqdm.write(f"step {done}: {quality:.2f} dB on unseen images, {codes}")
            if done % args.save_every == 0 or done == args.steps or stop.is_set():
                facts |= {"step": done, "seconds": seconds}
                facts["codebook_id"] = short_hash(model.codebook)
                save_checkpoint(path, model, optimizer, **facts)
            if stop.is_set():
                leave(done)

    test_set = (test_images, test_labels)
    reconstructions = write_tokens(
        args.out, model.eval(), classes, (images, labels), test_set
    )
    picture = args.out / "tokenizer.png"
    plot(picture, history, test_images, reconstructions, args.codebook_size)
    print(f"wrote tokenizer.pt, tokens.pt and tokenizer.png to {args.out}")
    print(f"{seconds:.0f} s of training")


if __name__ == "__main__":
    run_script(main)
