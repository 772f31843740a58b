import itertools
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
import torch
from conftest import NAMES, K, M, T, bfloat16, edit, error_of
from PIL import Image

import aux_model
import cluster
import sample
from ar_model import Sampling
from sample import FILES, choose_classes, load_models, parse_args

CPU = torch.device("cpu")
# A Sampling of stage 1 and one of stage 2: no value twice.
SOME, FINE_SOME = Sampling(3.0, 0.7, 9, 0.8), Sampling(2.25, 0.6, 5, 0.85)


def numbers(y, generator, sampling, other=0):
    """Integers (B, T) that depend on all arguments."""
    noise = torch.randint(1000, (len(y), T), generator=generator)
    factor = 1 + (hash(sampling) + other) % 1009
    return (noise * factor + 13 * y[:, None]) // 8


def generate(model, y, generator, sampling):
    """A stand-in: labels that depend on the weights and on all arguments."""
    weights = int(1000 * model.head.weight.abs().sum())
    return numbers(y, generator, sampling, weights) % model.config.vocabulary


def predict_fine(model, coarse, y, generator, sampling):
    """A stand-in: codes of the right clusters that depend on all arguments."""
    members = model.members[coarse]  # (B, T, S)
    index = numbers(y, generator, sampling) % (members >= 0).sum(dim=-1)
    return members.gather(-1, index[..., None])[..., 0]


def invert(code_to_cluster):
    """A stand-in: the codes of each cluster, and no places."""
    rows = [np.flatnonzero(code_to_cluster == m) for m in range(M)]
    padded = [np.pad(row, (0, 10 - len(row)), constant_values=-1) for row in rows]
    return np.stack(padded), np.zeros(K, int)


def swap_within_clusters(fine, code_to_cluster, rng):
    """A stand-in: the lowest code in the cluster of each token."""
    return np.unique(code_to_cluster, return_index=True)[1][code_to_cluster[fine]]


@torch.no_grad()
def pixels(vqvae, fine):
    """Images uint8 (B, H, W, 3) of fine labels (B, T)."""
    x = vqvae.decode(vqvae.codebook[fine].view(-1, 4, 4, 8).permute(0, 3, 1, 2))
    return (127.5 * (x.clip(-1, 1) + 1)).round().byte().permute(0, 2, 3, 1)


def sample_images(models, y, generator, stage1, stage2):
    """A stand-in, of the stand-ins."""
    coarse, fine = None, generate(models.ar, y, generator, stage1)
    if models.aux is not None:
        coarse = fine
        fine = predict_fine(models.aux, coarse, y, generator, stage2)
    return pixels(models.vqvae, fine), coarse, fine


def use_stand_ins(monkeypatch):
    """The scripts before this one have tests of their own."""
    monkeypatch.setattr(sample, "generate", generate)
    monkeypatch.setattr(sample, "predict_fine", predict_fine)
    monkeypatch.setattr(aux_model, "invert", invert)
    monkeypatch.setattr(cluster, "swap_within_clusters", swap_within_clusters)


stand_ins = pytest.fixture(autouse=True)(use_stand_ins)


def read(path):
    return torch.load(path, weights_only=True)


def run(out, *flags, model="ctf"):
    """What sample.py writes to out, of six images."""
    sample.main(["--out", str(out), "--num-samples=6", "--model", model, *flags])
    return read(out / FILES[model])


def check_samples(models, y, size, seed, stage1, stage2, images, coarse, fine):
    """Whether these are the samples of the stand-ins for y (N,), size per batch."""
    how = torch.Generator().manual_seed(seed), stage1, stage2
    parts = [sample_images(models, part, *how) for part in y.split(size)]
    wanted, wanted_coarse, wanted_fine = zip(*parts)
    if models.aux is None:
        assert coarse is None, "the baseline has no coarse labels"
    else:
        assert torch.equal(coarse, torch.cat(wanted_coarse)), "not those of stage 1"
    assert torch.equal(fine, torch.cat(wanted_fine)), "not the fine labels sampled"
    assert images.dtype == torch.uint8 and images.shape == (len(y), 16, 16, 3)
    wrong = (images.float() - torch.cat(wanted).float()).abs()
    assert wrong.max() <= 1 and wrong.mean() < 0.01, "not the pixels of the fine labels"


# --------------------------------------------------------------- From classes to pixels


@pytest.mark.parametrize("name", FILES)
def test_from_classes_to_pixels(trained, name, monkeypatch):
    monkeypatch.setattr(sample, "autocast", bfloat16)  # the decoder is not in it
    models, _ = load_models(trained, name, CPU)
    models.vqvae.codebook.mul_(20)  # pixels far beyond -1..1, which must be clipped
    gradients = []
    watch = lambda *_: gradients.append(torch.is_grad_enabled())
    handle = models.vqvae.decoder.register_forward_hook(watch)
    y, generator = torch.tensor([0, 2, 1, 1]), torch.Generator().manual_seed(3)
    found = sample.sample_images(models, y, generator, SOME, FINE_SOME)
    handle.remove()
    check_samples(models, y, 4, 3, SOME, FINE_SOME, *found)
    usual = sample.STAGE1, sample.STAGE2
    found = sample.sample_images(models, y, generator.manual_seed(3))
    check_samples(models, y, 4, 3, *usual, *found)
    *found, _ = sample.sample_batches(models, y, 3)
    check_samples(models, y, 4, 3, *usual, *found)
    assert not any(gradients), "no gradients are needed"


def test_batches_continue_with_the_same_generator_and_are_timed(trained, monkeypatch):
    models, _ = load_models(trained, "ctf", CPU)
    clock, seconds = [0.0], iter([7.0, 2.0, 3.0, 4.0])

    def cpu(x):  # waits until a GPU has computed the images
        clock[0] += next(seconds) if x.dtype == torch.uint8 else 0
        return x

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    monkeypatch.setattr(sample.time, "perf_counter", lambda: clock[0])
    y, how = torch.tensor([0, 1, 2, 2, 1]), (SOME, FINE_SOME)
    *found, speed = sample.sample_batches(models, y, 4, *how, batch_size=2)
    check_samples(models, y, 2, 4, *how, *found)
    assert speed == pytest.approx(3 / 5), "without the 2 images and 7 s of the first"
    *_, speed = sample.sample_batches(models, y, 4, *how, batch_size=5)
    assert speed == pytest.approx(5 / 4), "of the only batch"


# --------------------------------------------------------------------------- The script

FLAGS = "--seed=4 --batch-size=4 --classes cat ant "
FLAGS += "--cfg-scale=3 --temperature=0.7 --top-k=9 --top-p=0.8 "
FINE_FLAGS = "--fine-cfg-scale=2.25 --fine-temperature=0.6 --fine-top-k=5 "
FINE_FLAGS += "--fine-top-p=0.85"
BOTH = {"ar": "coarse", "aux": "fine"}
TABLE = [  # by default fine labels are sampled, and stage 1 is guided
    ("ctf", "", 100, 0, Sampling(2.0, 1.0, 0, 1.0), Sampling(1.0, 1.0, 0, 1.0), BOTH),
    ("ctf", FLAGS + FINE_FLAGS, 4, 4, SOME, FINE_SOME, BOTH),
    ("baseline", FLAGS, 4, 4, SOME, None, {"ar": "baseline"}),
]


@pytest.mark.parametrize(("name", "flags", "size", "seed", "one", "two", "used"), TABLE)
def test_every_flag_reaches_its_stage_and_is_stored(
    name, flags, size, seed, one, two, used, trained, monkeypatch
):
    (trained / "images.pt").unlink()  # it is not needed
    if name == "baseline":
        (trained / "clusters.pt").unlink()
    monkeypatch.setattr(sample.time, "perf_counter", itertools.count().__next__)
    test_y = torch.tensor([2, 0, 0, 1])
    edit(trained / "tokens.pt", test=(torch.randint(K, (4, T)), test_y))
    samples = run(trained, *flags.split(), model=name)
    y = torch.tensor([2, 0, 2, 0, 2, 0] if flags else [2, 0, 0, 1, 2, 0])
    used = {"vqvae": "tokenizer", **used}
    ids = {name: f"weights-of-{file}" for name, file in used.items()}
    facts = {"model": name, "seed": seed, "batch_size": size, "stage1": asdict(one)}
    facts["images_per_second"] = 2 if flags else 6  # a second per batch
    facts |= {"stage2": asdict(two) if two else {}}
    facts |= {"weights": ids | {"vqvae": "weights-of-vqvae"}}
    assert facts.items() <= samples.items() and torch.equal(samples["classes"], y)
    models, _ = load_models(trained, name, CPU)
    found = [samples[key] for key in ("images", "coarse", "fine")]
    check_samples(models, y, size, seed, one, two, *found)
    for network, file in used.items():
        model, saved = getattr(models, network), read(trained / f"{file}.pt")["model"]
        assert all(torch.equal(w, saved[key]) for key, w in model.state_dict().items())
        assert not model.training
    path, written = trained / FILES[name], set(trained.glob("samples*"))
    assert written == {path, path.with_suffix(".png")}
    assert parse_args([])[0].num_samples == 2000


def test_files_of_another_tokenizer_or_other_clusters_are_refused(trained, capsys):
    refused = "clusters codebook_id, coarse cluster_id, fine cluster_id, baseline "
    refused += "codebook_id, tokens codebook_id, tokens images_id, images images_id"
    for name, key in (pair.split() for pair in refused.split(", ")):
        path = trained / f"{name}.pt"
        before = path.read_bytes()
        edit(path, **{key: "another"})
        flags = "--export", f"--model={'baseline' if name == 'baseline' else 'ctf'}"
        code, message = error_of(capsys, sample.main, "--out", trained, *flags)
        assert code == 1 and f"{path} does not belong here ({key}" in message
        path.write_bytes(before)


def test_a_name_says_how_samples_differ_from_the_defaults():
    def name(stage1, stage2=None):
        fine = asdict(stage2) if stage2 else {}
        return sample.name_of({"stage1": asdict(stage1), "stage2": fine})

    ctf, usual = "CTF, sampled fine labels", Sampling(2.0)
    some = "guidance 3, temperature 0.7, top_k 9, top_p 0.8"
    fine = "fine cfg_scale 2.25, fine temperature 0.6, fine top_k 5, fine top_p 0.85"
    assert name(usual, Sampling()) == f"{ctf}, guidance 2"
    assert name(SOME, FINE_SOME) == f"{ctf}, {some}, {fine}"
    assert name(SOME) == f"baseline, {some}"
    argmax = Sampling(top_k=1)
    assert name(usual, argmax) == "CTF, argmax fine labels, guidance 2"
    assert name(argmax) == "baseline, guidance 1, top_k 1"


def test_classes_are_chosen_by_name(capsys):
    test_y = torch.tensor([2, 0, 0, 1])
    assert choose_classes(None, 6, test_y, NAMES).tolist() == [2, 0, 0, 1, 2, 0]
    chosen = choose_classes(["cat", "ant", "cat"], 5, test_y, NAMES)
    assert chosen.tolist() == [2, 0, 2, 2, 0] and chosen.dtype == torch.int64
    assert choose_classes(["02"], 1, test_y, ["01", "02", "03"]).tolist() == [1]
    for text, names in (("dog", NAMES), ("1", NAMES), ("1", ["01", "02", "03"])):
        main = partial(choose_classes, count=1, test_classes=test_y, class_names=names)
        code, message = error_of(capsys, main, text)
        wanted = f"--classes {text}: there are {', '.join(names)}"
        assert code == 1 and wanted in message


def test_settings_without_a_meaning_are_refused(capsys):
    wrong = {"cfg-scale": "-1 nan inf", "temperature": "0 -1 nan inf"}
    wrong |= {"top-k": "-1 1.5", "top-p": "0 1.01 nan"}
    values = [f"{name}={x}" for name, text in wrong.items() for x in text.split()]
    commands = [f"--{stage}{value}" for stage in ("", "fine-") for value in values]
    commands += ["--num-samples=0", "--batch-size=0"]
    of_stage2 = FINE_FLAGS.split()
    for command in commands + [f"--model=baseline {flag}" for flag in of_stage2]:
        code, message = error_of(capsys, parse_args, *command.split())
        name = command.split("=")[0].removeprefix("--").removeprefix("fine-")
        assert code == 2 and (name in message or "the baseline has" in message)
    meant = "--cfg-scale=0 --top-k=1 --top-p=1 --fine-temperature=2 --fine-top-k=0"
    _, *found = parse_args([*meant.split(), "--fine-top-p=0.001"])
    assert found == [Sampling(0.0, 1.0, 1, 1.0), Sampling(1.0, 2.0, 0, 0.001)]


def test_export_writes_samples_and_real_images(trained):
    def check(name, wanted):
        """export/name.npz and export/name/*.png have these images."""
        images = np.load(trained / "export" / f"{name}.npz")["arr_0"]
        assert images.dtype == np.uint8 and (images == wanted.numpy()).all()
        paths = [trained / "export" / name / f"{i:06d}.png" for i in range(len(wanted))]
        assert sorted((trained / "export" / name).iterdir()) == paths
        pairs = [(np.array(Image.open(path)), x) for path, x in zip(paths, images)]
        assert all((stored == x).all() for stored, x in pairs)

    run(trained)
    assert not (trained / "export").exists()
    for flags in ([], ["--num-samples=4"]):  # of the longer run, nothing may be left
        samples = run(trained, "--export", *flags)
        check("samples", samples["images"])
    baseline = run(trained, "--export", model="baseline")
    check("samples-baseline", baseline["images"])
    check("samples", samples["images"])
    check("real", read(trained / "images.pt")["test"][0])


# ----------------------------------------------------------------------------- Pictures


def test_rows_of_the_picture_are_of_their_class(trained, figures):
    samples = run(trained, "--num-samples=40", "--classes", "bee", "cat", "cat", "cat")
    rows, row = {}, None
    for ax in figures[trained / "samples.png"].axes:
        row = rows.setdefault(ax.get_ylabel(), []) if ax.get_ylabel() else row
        row += [image.get_array().tolist() for image in ax.images]
    of_class = lambda y: samples["images"][samples["classes"] == y][:10].tolist()
    assert rows == {"class bee": of_class(1), "class cat": of_class(2)}
    test = torch.randint(K, (12, T)), torch.arange(12)
    edit(trained / "tokens.pt", class_names=[*"abcdefghijkl"], test=test)
    run(trained, "--num-samples=12")
    shown = [ax.get_ylabel() for ax in figures[trained / "samples.png"].axes]
    assert [name for name in shown if name] == [f"class {c}" for c in "abcdefghij"]
    assert figures[trained / "samples.png"].get_suptitle().endswith("2, seed 0")
