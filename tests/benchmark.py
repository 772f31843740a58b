"""How fast sampling is, with random weights: what the README says about speed.

    python tests/benchmark.py
    python tests/benchmark.py --batch-sizes 64    # about a minute on two CPU cores

All rivals run in one process, in turn, several rounds. Printed are medians and ratios
of medians: absolute times differ from machine to machine, and from day to day.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, not by pytest

from ar_model import ARConfig, ARModel, draw, generate
from aux_model import AuxConfig, AuxModel, predict_fine
from tokenizer import VQVAE, VQVAEConfig, pick_device, to_uint8

CLASSES, GRID = 10, [8, 8]


def seconds(function, device):
    """Wall-clock seconds of one call, with the device's queue emptied."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def race(rivals, rounds, device):
    """Median seconds of each of rivals {name: function}, run in turn."""
    for function in rivals.values():
        function()
    times = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, function in rivals.items():
            times[name].append(seconds(function, device))
    return {name: median(values) for name, values in times.items()}


@torch.inference_mode()
def generate_uncached(model, labels, generator):
    """What generate does (without guidance), by a whole pass for every token."""
    tokens = torch.empty(len(labels), 0, dtype=torch.long, device=labels.device)
    for _ in range(GRID[0] * GRID[1]):
        token = draw(model(labels, tokens)[:, -1], generator)
        tokens = torch.cat([tokens, token[:, None]], dim=1)
    return tokens


def random_weights(model, device):
    """model on device, in eval mode, with a head that is not zero."""
    torch.nn.init.normal_(model.head.weight, std=0.02)
    return model.eval().to(device)


def compare_cache(rounds, device):
    """Generation with and without the key/value cache: the same tokens, faster."""
    model = random_weights(ARModel(ARConfig(1024, CLASSES, GRID)), device)
    labels, generator = (
        torch.arange(64, device=device) % CLASSES,
        torch.Generator(device),
    )
    rivals = {
        "with": lambda: generate(model, labels, generator.manual_seed(0)),
        "without": lambda: generate_uncached(model, labels, generator.manual_seed(0)),
    }
    same = torch.equal(rivals["with"](), rivals["without"]())
    times = race(rivals, rounds, device)
    ratio = times["without"] / times["with"]
    print(f"key/value cache, 64 tokens, batch 64, V = 1024, same tokens: {same}")
    print(f"  without {64 / times['without']:.0f} images/s", end=", ")
    print(f"with {64 / times['with']:.0f} images/s: {ratio:.1f} times as fast\n")


@torch.inference_mode()
def compare_models(K, M, batch_size, scale, rounds, device):
    """CTF against its baseline, both down to pixels; the parts of CTF one by one."""
    coarse = random_weights(ARModel(ARConfig(M, CLASSES, GRID)), device)
    baseline = random_weights(ARModel(ARConfig(K, CLASSES, GRID)), device)
    config = AuxConfig(M, K, CLASSES, GRID)
    aux = random_weights(AuxModel(config, torch.randint(M, (K,))), device)
    vqvae = VQVAE(VQVAEConfig(codebook_size=K)).eval().to(device)
    labels = torch.arange(batch_size, device=device) % CLASSES
    generator = torch.Generator(device).manual_seed(0)
    labels_of_all = torch.randint(M, (batch_size, 64), device=device)

    def stage2():
        return generate(coarse, labels, generator, scale)

    def stage3():
        return predict_fine(aux, labels_of_all, labels, generator)

    def decode(fine):
        return to_uint8(vqvae.decode(vqvae.codes(fine)))

    codes = torch.randint(K, (batch_size, 64), device=device)
    rivals = {
        "baseline": lambda: decode(generate(baseline, labels, generator, scale)),
        "ctf": lambda: decode(predict_fine(aux, stage2(), labels, generator)),
        "coarse": stage2,
        "fine": stage3,
        "decode": lambda: decode(codes),
    }
    times = race(rivals, rounds, device)
    speeds = {name: batch_size / times[name] for name in ("baseline", "ctf")}
    parts = "".join(
        f"{1000 * times[part]:9.1f}" for part in ("coarse", "fine", "decode")
    )
    line = f"{K:6}{M:6}{batch_size:7}{scale:5g}{speeds['baseline']:10.0f}"
    print(f"{line}{speeds['ctf']:8.0f}{speeds['ctf'] / speeds['baseline']:8.2f}{parts}")


def main(argv=None):
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--codes", type=int, nargs="+", default=[1024, 4096, 16384], help="K")
    add("--clusters", type=int, default=128, help="M")
    add("--batch-sizes", type=int, nargs="+", default=[16, 64, 256], help="images")
    add("--rounds", type=int, default=5, help="of which the median is taken")
    add("--device", default="auto")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    device = pick_device(args.device)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    print(f"{device}{threads}, torch {torch.__version__}; 4 layers, dim 128\n")
    compare_cache(args.rounds, device)
    print(f"{'':24}{'images/s':>18}{'':8}{'milliseconds per batch of CTF':>31}")
    names = (
        "     K     M  batch  CFG  baseline     ctf   ratio   coarse     fine   decode"
    )
    print(names)
    for K in args.codes:
        for batch_size in args.batch_sizes:
            for scale in (1.0, 2.0):
                compare_models(K, args.clusters, batch_size, scale, args.rounds, device)


if __name__ == "__main__":
    main()
