"""Tiny inputs for the tests of each stage, made without running any other stage."""

import inspect
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


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch):
    """Pictures are made, but not rendered, which takes most of the time of many tests:
    test_pipeline.py renders them."""
    monkeypatch.setattr(
        tokenizer.Figure, "savefig", lambda self, path, **how: path.write_text("drawn")
    )


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
        step=7,
        settings={"steps": 7},
        weights_id="weights-of-vqvae",
    )
    write(
        "tokens.pt",
        train=(torch.randint(K, (36, T)), train[1]),
        test=(torch.randint(K, (24, T)), test[1]),
        grid=(4, 4),
        codebook_size=K,
    )
    centroids = torch.zeros(M, 8)
    write("clusters.pt", code_to_cluster=G, centroids=centroids, method="kmeans")
    return folder


@pytest.fixture
def trained(out):
    """out with coarse.pt, baseline.pt and fine.pt of random numbers as well."""

    def write(name, model):
        artifact = IDS | {"step": 7, "seconds": 1.5, "settings": {"steps": 7}}
        artifact |= {"model": noisy(model).state_dict(), "config": vars(model.config)}
        torch.save(artifact | {"weights_id": f"weights-of-{name}"}, out / f"{name}.pt")

    for name, vocabulary in (("coarse", M), ("baseline", K)):
        config = ar_model.ARConfig(vocabulary, CLASSES, [4, 4], 1, 16, 2)
        write(name, ar_model.ARModel(config))
    config = aux_model.AuxConfig(M, K, CLASSES, [4, 4], 1, 16, 2)
    write("fine", aux_model.AuxModel(config, G))
    return out


def edit(path, **changes):
    """Change entries of an artifact."""
    torch.save(torch.load(path, weights_only=True) | changes, path)


def noisy(model):
    """model with large random weights: a new head is all zeros."""
    torch.manual_seed(1)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model.eval()


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


def same_weights(a, b):
    """Whether two artifacts hold exactly the same model."""
    one, two = (torch.load(p, weights_only=True)["model"] for p in (a, b))
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def interrupt_at(monkeypatch, step):
    """Ctrl-C in this step of a training loop."""
    original = tokenizer.learning_rate

    def learning_rate(now, *args):
        if now == step:
            raise KeyboardInterrupt
        return original(now, *args)

    monkeypatch.setattr(tokenizer, "learning_rate", learning_rate)


def check_resume(monkeypatch, module, name, command, out, other_out):
    """A run that Ctrl-C stops in step 3, then --resume, ends as an undisturbed run."""
    command = [*command, "--save-every", "2"]
    module.main([*command, "--out", str(out)])
    with monkeypatch.context() as context:
        interrupt_at(context, 3)
        with pytest.raises(KeyboardInterrupt):
            module.main([*command, "--out", str(other_out)])
    assert torch.load(other_out / name, weights_only=True)["step"] == 2
    assert not same_weights(out / name, other_out / name)
    module.main([*command, "--out", str(other_out), "--resume"])
    assert same_weights(out / name, other_out / name)
    one, other = (torch.load(o / name, weights_only=True) for o in (out, other_out))
    assert one["history"]["loss"] == other["history"]["loss"]
    assert one["weights_id"] == other["weights_id"]


def spy(monkeypatch, owner, name):
    """The arguments {parameter: value} of every call of owner.name from now on, in a
    list; "grad" says whether it was a call to learn from. It works as before."""
    calls, original = [], getattr(owner, name)

    def watched(*args, **kwargs):
        bound = inspect.signature(original).bind(*args, **kwargs)
        bound.apply_defaults()
        calls.append(bound.arguments | {"grad": torch.is_grad_enabled()})
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, watched)
    return calls


def places(rows, everything):
    """Where each of rows (n, ...) stands in everything (N, ...), -1 if nowhere."""
    equal = (rows[:, None] == everything[None]).flatten(2).all(dim=2)  # (n, N)
    return torch.where(equal.any(dim=1), equal.int().argmax(dim=1), -1)


def check_schedule(monkeypatch, module, command, path):
    """What is the same in all trainings: flags, schedule, clipping, clock, checkpoint.

    command: flags but for --steps, --lr, --seed, --save-every and --batch-size.
    """
    rates = spy(monkeypatch, tokenizer, "learning_rate")
    clipped = spy(monkeypatch, torch.nn.utils, "clip_grad_norm_")
    flags = ["--steps", "6", "--lr", "0.02", "--seed", "3", "--save-every", "4"]
    with monkeypatch.context() as context:
        interrupt_at(context, 4)  # the first save is after step 4
        with pytest.raises(KeyboardInterrupt):
            module.main([*command, *flags, "--batch-size", "5"])
    before = torch.load(path, weights_only=True)
    module.main([*command, *flags, "--batch-size", "5", "--resume"])
    after = torch.load(path, weights_only=True)
    assert [call["step"] for call in rates] == [0, 1, 2, 3, 4, 5]  # none twice
    assert {(call["steps"], call["peak"]) for call in rates} == {(6, 0.02)}
    group = after["optimizer"]["param_groups"][0]
    assert group["lr"] == tokenizer.learning_rate(5, 6, 0.02)
    assert [call["max_norm"] for call in clipped] == [1.0] * 6
    assert [row["step"] for row in after["history"]["test"]] == [4, 6]
    assert len(after["history"]["loss"]) == after["step"] == 6
    seconds = [0, before["seconds"]]
    seconds += [row["seconds"] for row in after["history"]["test"]]
    assert seconds == sorted(seconds) and after["seconds"] == seconds[-1] > seconds[1]
    used = {"steps": 6, "lr": 0.02, "seed": 3, "batch_size": 5}
    assert used.items() <= after["settings"].items()


def check_batches(batches, number, size):
    """batches of places in the training set: of size, all within, no two the same."""
    assert len(batches) == number and all(len(batch) == size for batch in batches)
    assert min(batch.min() for batch in batches) >= 0, "not of the training set"
    assert len({tuple(batch.tolist()) for batch in batches}) == number


def check_what_is_learnt_from(monkeypatch, module, command, sets, losses, means):
    """Training sees pairs of the training set, some classes null; measuring sees the
    test set.

    sets: (training, test) Examples; losses, means: names of the functions in module
    that take tokens and y, and in which argument the tokens are.
    """
    loss_name, tokens_name = losses
    mean_name, mean_tokens = means
    learnt = spy(monkeypatch, module, loss_name)
    measured = spy(monkeypatch, module, mean_name)
    train_set, test_set = sets
    batches, classes = [], []
    for seed in ("0", "1"):
        learnt.clear()
        flags = ["--steps", "8", "--seed", seed, "--save-every", "5"]
        module.main([*command, *flags, "--batch-size", "9"])
        for call in learnt:
            if call["grad"]:
                where = places(call[tokens_name], train_set.x)
                batches.append(where)
                y, real = call["y"], train_set.y[where]
                assert ((y == real) | (y == CLASSES)).all(), "classes of other images"
                classes += y.tolist()
    check_batches(batches, 16, 9)
    assert 0.02 < classes.count(CLASSES) / len(classes) < 0.3  # a tenth is dropped
    assert len(measured) == 4  # after 5 and 8 steps, two seeds
    for call in measured:
        assert torch.equal(call[mean_tokens], test_set.x)
        assert torch.equal(call["y"], test_set.y)
