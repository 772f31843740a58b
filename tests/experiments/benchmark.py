r"""The speed of sampling, with random weights.

    benchmark.py --batch-sizes 64    # about a minute on two CPU cores
    benchmark.py --sizes B L XL --codes 16384 --clusters 512 --batch-sizes 1 \
        --cfg-scales 1 --rounds 1    # the paper's sizes, 256 tokens

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

# isort: off
sys.path.insert(0, str(Path(__file__).parents[2]))
from tokenizer import VQVAE, VQVAEConfig, autocast, pick_device, to_uint8
from ar_model import ARConfig, ARModel, Sampling, generate
from aux_model import AuxConfig, AuxModel, predict_fine

CLASSES, GRID = 10, [8, 8]
# Layers, dim, heads. The paper's auxiliary model always has the size of L.
SIZES = {"default": (4, 128, 4), "default-aux": (2, 128, 4)}
SIZES |= {"B": (12, 768, 12), "L": (24, 1024, 16), "XL": (36, 1280, 20)}


def seconds(function, device):
    """Wall-clock seconds of one call, until the device has finished."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    function()
    wait()
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
        token = Sampling().draw(model(tokens, y)[:, -1], generator)
        tokens = torch.cat([tokens, token[:, None]], dim=1)
    return tokens


def compare_cache(rounds, device):
    """Generation with and without the key/value cache."""
    config = ARConfig(1024, CLASSES, GRID, *SIZES["default"])
    model = random_weights(ARModel(config), device)
    y = torch.arange(64, device=device) % CLASSES
    new = lambda: torch.Generator(device).manual_seed(0)
    rivals = {
        "with": lambda: generate(model, y, new(), Sampling()),
        "without": lambda: generate_uncached(model, y, new()),
    }
    with autocast(device):  # as in sample.py
        same = torch.equal(rivals["with"](), rivals["without"]())
        times = race(rivals, rounds, device)
    fast, slow = (len(y) / times[name] for name in rivals)
    print("| 64 tokens, batch 64, V = 1024 | images/s |\n|---|---|")
    print(f"| without a key/value cache | {slow:.0f} |\n| with | {fast:.0f} |")
    print(f"\nThe cache: {fast / slow:.1f} times as fast, same tokens: {same}.\n")


@torch.no_grad()
def compare_models(size, K, M, B, scale, rounds, device):
    """A row of the table: CTF and its baseline, both from B classes to pixels."""
    aux_size = SIZES["default-aux" if size == "default" else "L"]
    grid, pixels = (GRID, 32) if size == "default" else ([16, 16], 256)
    coarse = random_weights(ARModel(ARConfig(M, CLASSES, grid, *SIZES[size])), device)
    baseline = random_weights(ARModel(ARConfig(K, CLASSES, grid, *SIZES[size])), device)
    config = AuxConfig(M, K, CLASSES, grid, *aux_size)
    aux = random_weights(AuxModel(config, torch.randperm(K) % M), device)
    config = VQVAEConfig(pixels, pixels // grid[0], codebook_size=K)
    vqvae = VQVAE(config).eval().to(device)
    y = torch.arange(B, device=device) % CLASSES
    generator = torch.Generator(device).manual_seed(0)
    guided, shape = Sampling(cfg_scale=scale), (B, grid[0] * grid[1])
    coarse_labels = torch.randint(M, shape, device=device)
    fine_labels = torch.randint(K, shape, device=device)
    # CTF is the last three, one after the other.
    rivals = {
        "baseline": lambda: generate(baseline, y, generator, guided),
        "coarse": lambda: generate(coarse, y, generator, guided),
        "fine": lambda: predict_fine(aux, coarse_labels, y, generator, Sampling()),
        "decode": lambda: to_uint8(vqvae.decode(vqvae.codes(fine_labels))),
    }
    with autocast(device):  # as in sample.py
        times = race(rivals, rounds, device)
    slow = times["baseline"] + times["decode"]
    fast = times["coarse"] + times["fine"] + times["decode"]
    row = [size, K, M, B, f"{scale:g}", f"{B / slow:.4g}", f"{B / fast:.4g}"]
    row += [f"{slow / fast:.2f}", *(f"{1000 * value:.1f}" for value in times.values())]
    print(f"| {' | '.join(map(str, row))} |")


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
    head = "size | K | M | batch | guidance | baseline, images/s | CTF | ratio"
    print(f"| {head} | baseline, ms | coarse | fine | decode |\n{'|---' * 12}|")
    settings = args.sizes, args.codes, args.batch_sizes, args.cfg_scales
    for size, K, batch_size, scale in product(*settings):
        compare_models(size, K, args.clusters, batch_size, scale, args.rounds, device)


if __name__ == "__main__":
    main()
