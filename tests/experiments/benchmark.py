r"""The speed of sampling, with random weights.

    python tests/benchmark.py
    python tests/benchmark.py --batch-sizes 64    # about a minute on two CPU cores
    python tests/benchmark.py --sizes B L XL --codes 16384 --clusters 512 \
        --batch-sizes 1 --cfg-scales 1 --rounds 1      # the paper's sizes, 256 tokens

All rivals run in one process, in turn, for several rounds. It prints medians and ratios
of medians: absolute times differ between machines and between days.
"""

import argparse
import sys
import time
from itertools import product
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from ar_model import ARConfig, ARModel, draw, generate
from aux_model import AuxConfig, AuxModel, predict_fine
from tokenizer import VQVAE, VQVAEConfig, autocast, pick_device, to_device, to_uint8

CLASSES, GRID = 10, [8, 8]
# Layers, dim, heads. The paper's auxiliary model always has the size of L.
SIZES = {"default": (4, 128, 4), "default-aux": (2, 128, 4)}
SIZES |= {"B": (12, 768, 12), "L": (24, 1024, 16), "XL": (36, 1280, 20)}


def seconds(function, device):
    """Wall-clock seconds of one call, until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def race(rivals, rounds, device):
    """Median seconds of each of rivals {name: function}, run in turn."""
    for function in rivals.values():  # to warm up
        function()
    times = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, function in rivals.items():
            times[name].append(seconds(function, device))
    return {name: median(values) for name, values in times.items()}


def random_weights(model, device):
    """model on device, in eval mode, with a head that is not zero."""
    torch.nn.init.normal_(model.head.weight, std=0.02)
    return model.eval().to(device)


@torch.no_grad()
def generate_uncached(model, y, generator):
    """The tokens of generate without guidance, by a full pass for every token."""
    tokens = torch.empty(len(y), 0, dtype=torch.long, device=y.device)
    for _ in range(GRID[0] * GRID[1]):
        token = draw(model(tokens, y)[:, -1], generator)
        tokens = torch.cat([tokens, token[:, None]], dim=1)
    return tokens


def compare_cache(rounds, device):
    """Generation with and without the key/value cache."""
    model = random_weights(ARModel(ARConfig(1024, CLASSES, GRID)), device)
    y = torch.arange(64, device=device) % CLASSES
    generator = torch.Generator(device)
    rivals = {
        "with": lambda: generate(model, y, generator.manual_seed(0)),
        "without": lambda: generate_uncached(model, y, generator.manual_seed(0)),
    }
    with autocast(device):  # as in sample.py
        same = torch.equal(rivals["with"](), rivals["without"]())
        times = race(rivals, rounds, device)
    ratio = times["without"] / times["with"]
    print(f"key/value cache, 64 tokens, batch 64, V = 1024, same tokens: {same}")
    print(f"  without {64 / times['without']:.0f} images/s", end=", ")
    print(f"with {64 / times['with']:.0f} images/s: {ratio:.1f} times as fast\n")


@torch.no_grad()
def compare_models(size, K, M, batch_size, scale, rounds, device):
    """CTF and its baseline, both from classes to pixels."""
    aux_size = SIZES["default-aux" if size == "default" else "L"]
    grid, pixels = (GRID, 32) if size == "default" else ([16, 16], 256)
    coarse = random_weights(ARModel(ARConfig(M, CLASSES, grid, *SIZES[size])), device)
    baseline = random_weights(ARModel(ARConfig(K, CLASSES, grid, *SIZES[size])), device)
    config = AuxConfig(M, K, CLASSES, grid, *aux_size)
    aux = random_weights(AuxModel(config, torch.randint(M, (K,))), device)
    config = VQVAEConfig(pixels, pixels // grid[0], codebook_size=K)
    vqvae = to_device(VQVAE(config).eval(), device)
    y = torch.arange(batch_size, device=device) % CLASSES
    generator = torch.Generator(device).manual_seed(0)
    T = grid[0] * grid[1]
    coarse_labels = torch.randint(M, (batch_size, T), device=device)
    fine_labels = torch.randint(K, (batch_size, T), device=device)
    # CTF is the last three, one after the other.
    rivals = {
        "baseline": lambda: generate(baseline, y, generator, scale),
        "coarse": lambda: generate(coarse, y, generator, scale),
        "fine": lambda: predict_fine(aux, coarse_labels, y, generator),
        "decode": lambda: to_uint8(vqvae.decode(vqvae.codes(fine_labels))),
    }
    with autocast(device):  # as in sample.py
        times = race(rivals, rounds, device)
    slow = times["baseline"] + times["decode"]
    fast = times["coarse"] + times["fine"] + times["decode"]
    print(
        f"{size:8}{K:7}{M:6}{batch_size:6}{scale:5g}{batch_size / slow:10.4g}"
        f"{batch_size / fast:8.4g}{slow / fast:7.2f}",
        *(f"{1000 * time:9.1f}" for time in times.values()),
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add, sizes = parser.add_argument, ["default", "B", "L", "XL"]
    add("--sizes", choices=sizes, nargs="+", default=["default"])
    add("--codes", type=int, nargs="+", default=[1024, 4096, 16384], help="K")
    add("--clusters", type=int, default=128, help="M")
    add("--batch-sizes", type=int, nargs="+", default=[16, 64, 256])
    add("--cfg-scales", type=float, nargs="+", default=[1, 2], help="1 is off")
    add("--rounds", type=int, default=5, help="timings per median")
    add("--device", default="auto")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    device = pick_device(args.device)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    print(f"{device}{threads}, torch {torch.__version__}\n")
    if "default" in args.sizes:
        compare_cache(args.rounds, device)
    print(f"{'':32}{'images/s':>18}{'':7}{'milliseconds per batch':>28}")
    print(
        f"{'size':8}{'K':>7}{'M':>6}{'batch':>6}{'CFG':>5}{'baseline':>10}{'CTF':>8}"
        f"{'ratio':>7}{'baseline':>10}{'coarse':>10}{'fine':>10}{'decode':>10}"
    )
    settings = args.sizes, args.codes, args.batch_sizes, args.cfg_scales
    for size, K, batch_size, scale in product(*settings):
        compare_models(size, K, args.clusters, batch_size, scale, args.rounds, device)


if __name__ == "__main__":
    main()
