"""Tiny inputs for the tests of each script, made without running any other script."""

import itertools
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # wherever pytest is called
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tests run on the CPU, wherever they run

import numpy as np
import pytest
import torch
from PIL import Image

import ar_model
import aux_model
import cluster
import evaluate
import sample
import tokenizer

torch.set_num_threads(1)  # tiny tensors: threads only cost time
torch.backends.mps.is_available = lambda: False  # the same for a Mac

K, M, T, CLASSES = 32, 4, 16, 3  # codes, clusters, tokens of a 4x4 grid, classes
# The map g of the fixtures: clusters of 10, 6, 9 and 7 codes, in no order. Applied
# twice it gives something else, g(g(q)) != g(q) for all q, so that a doubled map shows.
G = torch.tensor([1, 2, 3, 0] + [0] * 9 + [1] * 5 + [2] * 8 + [3] * 6)
G[4:] = G[4:][torch.from_numpy(np.random.default_rng(0).permutation(K - 4))]
NAMES = ["ant", "bee", "cat"]
SIZES = ["--layers", "1", "--dim", "16", "--heads", "2"]
IDS = {"images_id": "the-images", "codebook_id": "the-codebook"}
IDS["cluster_id"] = "the-clusters"


def random_tokenizer():
    """A small VQVAE of random numbers, the same every time."""
    torch.manual_seed(0)
    config = tokenizer.VQVAEConfig(image_size=16, channels=16, codebook_size=K)
    return tokenizer.VQVAE(config)


def keep_figures(monkeypatch):
    """Pictures are made, but not rendered, which takes most of the time of many tests:
    test_pipeline.py renders them. Returns a dict that receives {path: Figure}."""
    kept = {}

    def savefig(figure, path, **how):
        kept[path] = figure
        path.write_text("drawn")

    monkeypatch.setattr(tokenizer.Figure, "savefig", savefig)
    return kept


figures = pytest.fixture(autouse=True)(keep_figures)


@pytest.fixture
def no_pictures(monkeypatch):
    """Pictures are not even made."""
    for script in (tokenizer, cluster, ar_model, aux_model, sample, evaluate):
        for name in dir(script):
            if name.startswith("plot"):
                monkeypatch.setattr(script, name, lambda *_: None)


def pictures(rng, count):
    """count noisy images (16, 16, 3) of each class; the class is the colour."""
    classes = torch.arange(CLASSES).repeat(count)
    images = rng.integers(0, 120, (len(classes), 16, 16, 3), dtype=np.uint8)
    images[np.arange(len(classes)), :, :, classes] += 100
    return torch.from_numpy(images), classes


@pytest.fixture
def images(tmp_path):
    """A data folder of noisy 16x16 images: train/ has 12 of each class, test/ 8."""
    for split, count in (("train", 12), ("test", 8)):
        pairs = zip(*pictures(np.random.default_rng(count), count))
        for i, (pixels, y) in enumerate(pairs):
            folder = tmp_path / "images" / split / NAMES[y]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.numpy()).save(folder / f"{i:02}.png")
    return tmp_path / "images"


@pytest.fixture
def out(tmp_path):
    """A folder with images.pt, tokenizer.pt, tokens.pt and clusters.pt of random
    numbers: 36 training and 24 test images."""
    folder, model = tmp_path / "out", random_tokenizer()
    folder.mkdir()
    train, test = (pictures(np.random.default_rng(n), n) for n in (12, 8))
    facts = IDS | {"class_names": NAMES}

    def write(name, **artifact):
        torch.save(facts | artifact, folder / name)

    write("images.pt", train=train, test=test, data="pets")
    write(
        "tokenizer.pt",
        model=model.state_dict(),
        config=vars(model.config),
        step=5,
        settings={"steps": 5},
        weights_id="weights-of-vqvae",
    )
    random = torch.Generator().manual_seed(2)
    write(
        "tokens.pt",
        train=(torch.randint(K, (36, T), generator=random), train[1]),
        test=(torch.randint(K, (24, T), generator=random), test[1]),
        grid=(4, 4),
        codebook_size=K,
    )
    centroids = torch.zeros(M, 8)
    write("clusters.pt", code_to_cluster=G, centroids=centroids, method="kmeans")
    return folder


@pytest.fixture
def trained(out):
    """out with coarse.pt, baseline.pt and fine.pt of random numbers as well."""

    def write(name, model, steps, seconds):
        artifact = IDS | {"model": noisy(model).state_dict(), "seconds": seconds}
        artifact |= {"config": vars(model.config), "weights_id": f"weights-of-{name}"}
        artifact |= {"step": steps, "settings": {"steps": steps}}
        torch.save(artifact, out / f"{name}.pt")

    for name, V, *run in (("coarse", M, 7, 1.5), ("baseline", K, 9, 2.5)):
        config = ar_model.ARConfig(V, CLASSES, [4, 4], 1, 16, 2)
        write(name, ar_model.ARModel(config), *run)
    config = aux_model.AuxConfig(M, K, CLASSES, [4, 4], 1, 16, 2)
    write("fine", aux_model.AuxModel(config, G), 11, 4.0)
    return out


def edit(path, **changes):
    """Change entries of an artifact."""
    torch.save(torch.load(path, weights_only=True) | changes, path)


def contents(folder):
    """{path: bytes} of every file below folder."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def noisy(model):
    """model with large random weights: a new head is all zeros."""
    torch.manual_seed(1)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model.eval()


def bfloat16(device):
    """A stand-in for autocast, as on a GPU with native bfloat16."""
    return torch.autocast("cpu", torch.bfloat16)


def error_of(capsys, main, *argv):
    """(exit code, stderr) of main(argv), which must exit; stderr must be one line.

    SystemExit with a text is what Python prints on stderr, with exit code 1.
    """
    with pytest.raises(SystemExit) as exit_info:
        main([str(a) for a in argv])
    code, printed = exit_info.value.code, capsys.readouterr().err
    if isinstance(code, str):
        code, printed = 1, code
    message = [line for line in printed.splitlines() if "error: " in line]
    assert len(message) == 1, printed
    assert code == 2 or printed == message[0], "more than one line"
    return code, message[0]


def on_backward(monkeypatch, act):
    """From now on loss.backward() is act(step, loss).backward(). Steps are counted from
    0. act may also raise, as Ctrl-C does."""
    steps, backward = itertools.count(), torch.Tensor.backward
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda loss: backward(act(next(steps), loss))
    )


def ctrl_c(at):
    """For on_backward: Ctrl-C in this step."""

    def act(step, loss):
        if step == at:
            raise KeyboardInterrupt
        return loss

    return act
