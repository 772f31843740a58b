import json
import math
from pathlib import Path

import numpy as np
import pytest
import test_sample
import torch
from conftest import NAMES, G, K, T, bfloat16, edit, error_of, noisy
from scipy.linalg import sqrtm
from test_sample import CPU, pixels, predict_fine, read
from torch import nn

import cluster
import evaluate
import sample
from ar_model import Sampling
from evaluate import Classifier, frechet_distance, inception_score, precision_recall
from sample import load_models
from tokenizer import Examples, psnr, to_float

CTF, BASELINE = "CTF, sampled fine labels, guidance 2", "baseline, guidance 2"
CONTROLS = ["real training images", "reconstructions"]
CONTROLS += [f"swapped within {name} clusters" for name in ("k-means", "random")]
ALONE = "stage 2 alone (real coarse labels)"


def mean_loss(model, tokens, y):
    """A stand-in: nats that depend on the weights and on all arguments."""
    V, weights = model.config.vocabulary, model.head.weight.abs().mean().item()
    return V / 8 + weights + (tokens * (1 + y[:, None])).double().mean().item() / V


def mean_fine_loss(model, fine, y):
    """A stand-in: nats that depend on all arguments, and an accuracy."""
    weights = model.head.weight.abs().mean().item()
    return [weights + (fine * (2 + y[:, None])).double().mean().item() / K, 0.5]


learn, swap_within = evaluate.train_classifier, cluster.swap_within_clusters


def train_classifier(train_set, num_classes, steps, seed, device):
    """A stand-in: a judge of random numbers that depend on all arguments."""
    model = Classifier(num_classes).eval()
    torch.manual_seed(100 * int(train_set.x.sum()) + 10 * seed + steps)
    for weights in model.parameters():
        nn.init.normal_(weights, std=0.4)
    return model


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    """The scripts before this one have tests of their own."""
    test_sample.use_stand_ins(monkeypatch)
    for function in (predict_fine, mean_loss, mean_fine_loss, train_classifier):
        monkeypatch.setattr(evaluate, function.__name__, function)
    monkeypatch.setattr(sample, "sample_images", test_sample.sample_images)
    monkeypatch.setattr(sample, "plot_rows", lambda *_: None)


def draw(out, count=16, *flags, model="ctf"):
    """A sample file of the weights in out."""
    command = ["--out", str(out), f"--num-samples={count}", f"--model={model}"]
    sample.main([*command, *flags])


def run(out, *flags):
    """What evaluate.py writes to metrics.json: the protocol, {name: row}."""
    evaluate.main(["--out", str(out), "--judge-steps=2", *flags])
    metrics = json.loads((out / "metrics.json").read_text("utf-8"))
    return metrics["protocol"], {row["name"]: row for row in metrics["rows"]}


# --------------------------------------------------------------------------- The metrics


def random_gaussian(seed, features, rank):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(features, rank))
    return rng.normal(size=features), a @ a.T / rank


def test_frechet_distance_of_correlated_features():
    for features in (1, 3, 6):
        (mu1, s1), (mu2, s2) = (random_gaussian(seed, features, 9) for seed in (0, 1))
        wanted = ((mu1 - mu2) ** 2).sum() + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real)
        distance = frechet_distance(mu1, s1, mu2, s2)
        assert isinstance(distance, float) and distance == pytest.approx(wanted)
        assert frechet_distance(mu2, s2, mu1, s1) == pytest.approx(wanted), "symmetric"


def test_frechet_distance_of_independent_features_in_closed_form():
    mu1, mu2 = np.array([1.0, 2.0]), np.array([0.0, 4.0])
    s1, s2 = np.diag([4.0, 9.0]), np.diag([1.0, 16.0])
    # The means give 1 + 4, the standard deviations (2 - 1)^2 + (3 - 4)^2.
    assert frechet_distance(mu1, s1, mu2, s2) == pytest.approx(7)


def test_frechet_distance_of_singular_covariances():
    zero, one, near = np.zeros(8), np.ones(8), {"rel": 1e-3, "abs": 1e-3}
    for rank in (1, 2, 3, 4, 5, 6):
        _, s = random_gaussian(rank, 8, rank)
        trace, distance = np.trace(s), frechet_distance(zero, s, one, 0 * s)
        assert isinstance(distance, float), "never complex"
        assert distance == pytest.approx(8 + trace, **near)
        assert frechet_distance(zero, s, zero, 4 * s) == pytest.approx(trace, **near)
        assert 0 <= frechet_distance(zero, s, zero, s) < 1e-3, "0 or more, never nan"


def test_inception_score_against_the_definition():
    # Two images per class and split, or more: 10 splits of 90 images, 3 of 25.
    for count, splits in ((90, 10), (25, 3), (3, 1)):
        logits, scores = 2 * np.random.default_rng(0).normal(size=(count, 4)), []
        for part in np.array_split(logits, splits):
            p = np.exp(part) / np.exp(part).sum(axis=1, keepdims=True)
            scores.append(math.exp((p * np.log(p / p.mean(axis=0))).sum(axis=1).mean()))
        wanted = np.mean(scores)
        assert inception_score(logits) == pytest.approx(wanted)
    certain = 1000 * np.eye(5)[np.arange(100) % 5]  # 1 to the number of classes
    assert inception_score(certain) == pytest.approx(5)
    assert inception_score(0 * certain) == pytest.approx(1)
    assert inception_score(certain[::5]) == pytest.approx(1), "no variety"


def by_brute_force(points, members, k):
    """Kynkäänniemi et al. 2019, equation 2: the share of points for which some member
    is at most as far away as the k-th nearest neighbour of that member."""
    inside = 0
    for point in points:
        for i, member in enumerate(members):
            others = ((np.delete(members, i, axis=0) - member) ** 2).sum(axis=1)
            if ((point - member) ** 2).sum() <= np.sort(others)[:k][-1]:
                inside += 1
                break
    return inside / len(points)


def test_precision_recall_of_points_on_a_line():
    # With k = 1, the radii of the real points are 1, 1, 1, 8, 30, and of the fake ones
    # 4, 4, 15, 1, 1. Points on an edge are inside: 3 and 18, at the edges of 2 and 10.
    real, fake = (np.array([x]).T for x in ([0.0, 1, 2, 10, 40], [-1.0, 3, 18, 90, 91]))
    assert precision_recall(real, fake, k=1) == pytest.approx((0.6, 0.8))
    assert precision_recall(fake, real, k=1) == pytest.approx((0.8, 0.6)), "swapped"
    assert precision_recall(real / 256, fake / 256, k=1) == pytest.approx((0.6, 0.8))
    assert precision_recall(real, fake, k=2) == pytest.approx((0.6, 1))


def test_precision_recall_by_brute_force_with_doubled_points_and_edges():
    rng = np.random.default_rng(0)
    lattice = rng.integers(0, 4, size=(40, 3)).astype(float)  # ties, and equal rows
    pairs = [
        (lattice, rng.integers(0, 6, size=(30, 3)).astype(float)),
        (rng.normal(size=(30, 5)), 1.3 * rng.normal(size=(25, 5)) + 0.5),
        (np.zeros((9, 2)), np.concatenate([np.zeros((3, 2)), np.ones((4, 2))])),
        (lattice[:2], lattice[2:5]),  # fewer members than neighbours
    ]
    for real, fake in pairs:
        for k in (1, 3, 5):
            wanted = by_brute_force(fake, real, k), by_brute_force(real, fake, k)
            assert precision_recall(real, fake, k) == pytest.approx(wanted)
            assert k != 3 or precision_recall(real, fake) == pytest.approx(wanted)


# ---------------------------------------------------------------------------- The judge


class Witness(nn.Module):
    """A stand-in for Classifier that remembers its batches and its weight."""

    def __init__(self, num_classes):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(100.0, dtype=torch.float64))
        self.start, self.seen, self.weights = torch.rand(1).item(), [], []
        self.own, self.used = [], []  # gradients of each step
        self.weight.register_hook(lambda g: self.own.append(g.item()))
        use = lambda p: self.used.append(p.grad.item())
        self.weight.register_post_accumulate_grad_hook(use)

    def forward(self, x):
        self.seen.append(x.clone())
        self.weights.append(self.weight.item())
        return None, self.weight / 100 * x[:, 0, 0, :2].double()


def test_the_judge_learns_from_blurred_and_noisy_images(monkeypatch):
    monkeypatch.setattr(evaluate, "Classifier", Witness)
    asked, rate = [], evaluate.learning_rate
    ask = lambda *arguments: asked.append(arguments) or rate(*arguments)
    monkeypatch.setattr(evaluate, "learning_rate", ask)
    edge = torch.full((16, 16, 3), 255, dtype=torch.uint8)
    edge[:, :8] = 0  # -1 to the left of the edge, 1 to the right
    train_set = Examples(torch.stack([edge, edge.flip(1)]), torch.tensor([0, 1]))
    judge, *others = (
        learn(train_set, 2, steps, seed, CPU)
        for steps, seed in ((60, 0), (1, 0), (1, 1))
    )
    assert not judge.training and len(judge.seen) == 60
    assert asked[:60] == [(step, 60, 3e-3) for step in range(60)]
    assert judge.used == judge.own, "gradients of other steps"
    sigmas, noises = [], []
    for x in judge.seen:
        assert x.shape == (128, 3, 16, 16) and x.dtype == torch.float32
        x = x * x[:, :1, :1, -1:].sign()  # all like edge
        noise = (x[..., 10:] - 1).flatten(1)  # far from the edge: not blurred
        is_noisy = noise.abs().amax(dim=1) > 1e-5
        at_edge = x[..., 8].mean(dim=(1, 2))  # 1 - 2 a, if a neighbour weighs a
        only_blurred = (at_edge < 1 - 1e-4) & ~is_noisy
        assert is_noisy.sum() == 64 and only_blurred.sum() == 32, "not half, a quarter"
        a = (1 - at_edge[only_blurred].mean().item()) / 2
        assert a < 0.2 or (at_edge[is_noisy] < 0.8).sum() == 32, "a quarter is both"
        sigmas.append(math.sqrt(0.5 / math.log((1 - 2 * a) / a)))
        noises.append(noise[is_noisy].std().item())
    assert 0.295 < min(sigmas) < 0.4 and 0.9 < max(sigmas) < 1.005
    assert min(noises) < 0.03 and 0.17 < max(noises) < 0.205
    # AdamW's first step: the decay of 0.05, and the learning rate up or down.
    rate, moved = 3e-3 / 50, judge.weights[0] - judge.weights[1]
    assert abs(moved - rate * 0.05 * 100) == pytest.approx(rate, rel=1e-3)
    for other, same in zip(others, (True, False)):  # the seed
        assert torch.equal(other.seen[0], judge.seen[0]) == same
        assert (other.start == judge.start) == same


def test_the_judge_learns_and_is_trusted_only_then(trained, capsys):
    draw(trained)
    run(trained)
    train_set = Examples(*read(trained / "images.pt")["train"])
    judge = learn(train_set, 3, 40, 0, CPU, B=16)
    capsys.readouterr()
    for name, model in (("learnt", judge), ("random", noisy(Classifier(3)))):
        edit(trained / "classifier.pt", model=model.state_dict())
        run(trained)
        table, _, text = capsys.readouterr().out.partition("The judge is right on ")
        assert "| reconstructions |" in table
        assert (float(text.partition("%")[0]) > 80) == (name == "learnt")
        assert ("hardly better than chance" in text) == (name == "random")
    (x, y), constant = read(trained / "images.pt")["test"], Classifier(3)
    edit(trained / "images.pt", test=(x, y * (torch.arange(24) > 20)))  # 21 of class 0
    constant.head.weight.data.zero_()
    constant.head.bias.data.copy_(torch.tensor([1.0, 0.0, 0.0]))
    edit(trained / "classifier.pt", model=constant.state_dict())
    run(trained)
    assert "hardly better than chance" in capsys.readouterr().out, "right on 21 of 24"
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    assert "(default: 800)" in capsys.readouterr().out


def test_the_judge_is_trained_once_and_never_replaced(trained, capsys):
    path, kept = trained / "classifier.pt", trained / "kept-01"
    kept.mkdir()
    copy = read(trained / "coarse.pt") | {"step": 3, "weights_id": "half"}
    copy["model"] = {name: w / 2 for name, w in copy["model"].items()}
    torch.save(copy, kept / "coarse.pt")
    draw(trained)
    draw(trained, model="baseline")
    draw(kept)
    _, final = run(trained)
    before, printed = path.read_bytes(), capsys.readouterr().out
    assert f"{kept / 'coarse.pt'} is unfinished: step 3 of 7" in printed
    assert "of an earlier run" not in printed
    _, early = run(kept)
    assert f"the judge is {path}, of an earlier run" in capsys.readouterr().out
    assert list(early) == [*CONTROLS, ALONE, CTF], "only samples of the folder itself"
    assert early[CTF]["weights"] == ["kept-01/coarse.pt", "out/fine.pt"]
    assert early[CTF]["steps"] == [3, 11] and early[CTF]["fd"] != final[CTF]["fd"]
    assert all(early[name] == final[name] for name in CONTROLS)

    flags = "--judge-steps=2", "--out"
    refused = [("--judge-steps=4", "--out", trained), ("--seed=1", *flags, trained)]
    refused += [("--judge-steps=1", "--out", kept), (*flags, trained)]
    for command in refused:
        if command == refused[-1]:
            edit(path, images_id="others")
            before = path.read_bytes()
        code, message = error_of(capsys, evaluate.main, *command)
        assert code == 1 and f"{path} does not belong here" in message
        assert path.read_bytes() == before and not (kept / path.name).exists()
    path.unlink()
    assert run(kept, "--seed=1")[0]["seed"] == 1
    assert read(path)["images_id"] == "the-images", "beside images.pt"


# --------------------------------------------------------------- Scores, bits, controls


def swapped(vqvae, fine, code_to_cluster=G):
    """Images of fine labels (N, T), swapped as by the stand-in."""
    swap = test_sample.swap_within_clusters
    return pixels(vqvae, swap(fine, code_to_cluster.numpy(), None))


def test_scores_of_a_set_of_images(out):
    judge, test_x = noisy(Classifier(3)), read(out / "images.pt")["test"][0]
    images = torch.cat([test_x[:7], torch.randint_like(test_x[:4], 256)])
    assert sum(w.numel() for w in judge.parameters()) == 287843  # with BatchNorm
    features, logits = judge(to_float(images))
    torch.testing.assert_close(features, judge.body(to_float(images)).mean((2, 3)))
    torch.testing.assert_close(logits, judge.head(features))
    many = torch.cat([test_x, torch.randint_like(test_x, 256).repeat(10, 1, 1, 1)])
    real, features = (evaluate.look(judge, x, CPU)[0] for x in (many, images))
    logits = evaluate.look(judge, images, CPU)[1]
    assert real.shape == (264, 128) and real.dtype == logits.dtype == np.float64
    with torch.no_grad():
        np.testing.assert_allclose(real, judge(to_float(many))[0], 1e-3, 1e-4)
        np.testing.assert_allclose(logits, judge(to_float(images))[1], 1e-3, 1e-4)
    y = torch.from_numpy(logits.argmax(axis=1) + ([0] * 4 + [1] * 7)) % 3
    # tr (S1 S2)^1/2 is the nuclear norm of A B', if S1 = A'A and S2 = B'B.
    a, b = ((x - x.mean(axis=0)) / math.sqrt(len(x) - 1) for x in (real, features))
    wanted = {"fd": ((real.mean(axis=0) - features.mean(axis=0)) ** 2).sum()}
    wanted["fd"] += (a**2).sum() + (b**2).sum() - 2 * np.linalg.norm(a @ b.T, "nuc")
    wanted |= {"inception_score": inception_score(logits), "class_accuracy": 4 / 11}
    wanted["precision"] = by_brute_force(features, real[:11], 3)
    wanted["recall"] = by_brute_force(real[:11], features, 3)
    assert evaluate.score(images, y, judge, real, CPU) == pytest.approx(wanted, 1e-5)
    assert wanted["precision"] != wanted["recall"]
    x = torch.from_numpy(real)
    assert (evaluate.distances(x, x).diagonal() == 0).all(), "rounding at the edge"


@pytest.mark.parametrize("name", ["ctf", "baseline"])
def test_bits_are_nats_over_ln_2_of_each_stage(trained, name):
    models, _ = load_models(trained, name, CPU)
    fine, y = read(trained / "tokens.pt")["test"]
    nats = [mean_loss(models.ar, G[fine] if name == "ctf" else fine, y)]
    if name == "ctf":
        nats += mean_fine_loss(models.aux, fine, y)[:1]
    bits = evaluate.bits_per_token(models, fine, y)
    assert bits == pytest.approx([value / math.log(2) for value in nats])


def test_random_clusters_are_not_called_k_means(trained, monkeypatch):
    vqvae = load_models(trained, "ctf", CPU)[0].vqvae
    clusters = read(trained / "clusters.pt") | {"method": "random"}
    fine, _ = read(trained / "tokens.pt")["test"]
    found = evaluate.swaps(vqvae, fine, clusters, 0)
    assert list(found) == ["random"]
    assert torch.equal(found["random"], swapped(vqvae, fine))
    monkeypatch.setattr(cluster, "swap_within_clusters", swap_within)
    clusters["method"] = "kmeans"
    one, same, other = (evaluate.swaps(vqvae, fine, clusters, s) for s in (0, 0, 1))
    for name in ("k-means", "random"):
        assert torch.equal(one[name], same[name])
        assert not torch.equal(one[name], other[name])


def test_stage_2_alone_starts_from_the_real_coarse_labels(trained, monkeypatch):
    models, how = load_models(trained, "ctf", CPU)[0], Sampling(1.5, 0.7, 2, 0.9)
    fine, y, calls = torch.randint(K, (130, T)), torch.arange(130) % 3, []
    cast = []
    monkeypatch.setattr(evaluate, "autocast", bfloat16)

    def watched(model, coarse, y, generator, sampling):
        seed = generator.initial_seed()
        found = predict_fine(model, coarse, y, generator, sampling)
        calls.append((coarse, y, found, seed, generator, sampling))
        cast.append(torch.is_autocast_enabled("cpu"))
        return found

    monkeypatch.setattr(evaluate, "predict_fine", watched)
    found = evaluate.stage2_alone(models, fine, y, 7, how)
    coarse, classes, predicted = (torch.cat(part) for part in list(zip(*calls))[:3])
    assert torch.equal(coarse, G[fine]) and torch.equal(classes, y)
    assert {call[3:] for call in calls} == {(7, calls[0][4], how)}, "one generator"
    assert torch.equal(found, pixels(models.vqvae, predicted))
    assert cast == [True, True], "as in sample.py"


# --------------------------------------------------------------------------- The script


def test_each_row_has_its_own_images_and_classes(trained):
    (x, y), order = read(trained / "images.pt")["train"], torch.randperm(36)
    train_set = x[order], y[order]
    edit(trained / "images.pt", train=train_set)
    draw(trained, 16, "--fine-top-k=3")
    draw(trained, 20, "--seed=3", model="baseline")
    protocol, rows = run(trained, "--seed=5")
    N, (x, y) = 16, read(trained / "images.pt")["test"]
    fine, _ = read(trained / "tokens.pt")["test"]
    (models, _), (baseline, _) = (load_models(trained, m, CPU) for m in sample.FILES)
    tests = [pixels(models.vqvae, fine), swapped(models.vqvae, fine)]
    mixed = np.random.default_rng(5).permutation(G.numpy())
    tests += [swapped(models.vqvae, fine, torch.from_numpy(mixed))]
    alone = models, fine[:N], y[:N], 5, Sampling(top_k=3)
    tests += [evaluate.stage2_alone(*alone)]
    sets = [train_set, *((images, y) for images in tests)]
    for samples in (read(trained / name) for name in sample.FILES.values()):
        sets.append((samples["images"], samples["classes"]))
    assert list(rows) == [*CONTROLS, ALONE, f"{CTF}, fine top_k 3", BASELINE]
    judge = train_classifier(Examples(*train_set), 3, 2, 5, CPU)
    real, logits = evaluate.look(judge, x, CPU)
    for (name, row), (images, classes) in zip(rows.items(), sets):
        wanted = evaluate.score(images[:N], classes[:N], judge, real, CPU)
        assert {key: row[key] for key in wanted} == pytest.approx(wanted, 1e-4), name
    for row, used in zip(list(rows.values())[-2:], (models, baseline)):
        bits = evaluate.bits_per_token(used, fine, y)
        assert [row["bits_per_token"], *row["bits_per_stage"]] == [sum(bits), *bits]
    wanted = {"data": "pets", "num_samples": N, "num_real": 24, "device": "cpu"}
    wanted |= {"clusters": "kmeans", "judge_steps": 2, "seed": 5}
    wanted["images_id"] = "the-images"
    wanted["judge_accuracy"] = (logits.argmax(axis=1) == y.numpy()).mean()
    assert protocol == wanted | {"psnr": pytest.approx(psnr(x, tests[0]), rel=1e-4)}


@pytest.fixture
def evaluated(trained, monkeypatch, capsys):
    """The folder, the protocol, {name: row} and what was printed. The scores are a
    stand-in's, no value twice. The judge has only 15 features."""
    draw(trained, 16, "--temperature=0.5", "--seed=6")
    draw(trained, 16, "--top-k=7", "--seed=4", model="baseline")
    edit(trained / "samples.pt", images_per_second=123.4)
    edit(trained / "samples-baseline.pt", images_per_second=56.7)
    numbers, look = iter(range(1, 99)), evaluate.look

    def score(*_):
        i = next(numbers)
        scores = {"fd": 1.11 * i, "inception_score": 9 - i / 3, "recall": 1 - i / 19}
        return scores | {"class_accuracy": i / 13, "precision": i / 17}

    few = lambda *arguments: (look(*arguments)[0][:, :15], look(*arguments)[1])
    monkeypatch.setattr(evaluate, "look", few)
    monkeypatch.setattr(evaluate, "score", score)
    return trained, *run(trained), capsys.readouterr().out


TITLE = "16 images per row against 24 test images of pets (precision and recall: 16)"


def test_every_cell_of_the_table_is_that_of_metrics_json(evaluated):
    out, protocol, rows, printed = evaluated
    ctf = f"{CTF}, temperature 0.5", ["coarse", "fine"], ["ctf", 6, 123.4, [7, 11], 5.5]
    other = f"{BASELINE}, top_k 7", ["baseline"], ["baseline", 4, 56.7, [9], 2.5]
    for name, files, facts in (ctf, other):
        row, artifacts = rows[name], [read(out / f"{file}.pt") for file in files]
        keys = "model", "seed", "images_per_second", "steps", "train_seconds"
        assert [row[key] for key in keys] == facts
        assert row["weights"] == [f"out/{file}.pt" for file in files]
        sizes = [w.numel() for a in artifacts for w in a["model"].values()]
        samples = read(out / sample.FILES[row["model"]])
        assert row["parameters"] == sum(sizes)
        assert all(row[key] == samples[key] for key in ("stage1", "stage2"))
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    heads = "images, FD, IS, class accuracy, precision, recall, bits per token"
    assert table[:2] == [heads.split(", "), ["---"] * 7] and len(table) == 9
    for cells, (name, row) in zip(table[2:], rows.items()):
        wanted = [name, f"{row['fd']:.2f}", f"{row['inception_score']:.2f}"]
        wanted += [f"{100 * row['class_accuracy']:.1f}%", f"{row['precision']:.3f}"]
        bits = [f"{value:.2f}" for value in row.get("bits_per_stage", [])]
        assert cells == [*wanted, f"{row['recall']:.3f}", " + ".join(bits)]
    assert f"\n{TITLE}.\n" in printed and f" {protocol['psnr']:.2f} dB" in printed
    assert "singular" not in printed, "16 images, 15 features"


def test_a_failing_write_loses_nothing(evaluated, monkeypatch, capsys):
    def no_room(source, target):
        raise OSError("no room")

    path = evaluated[0] / "metrics.json"
    before = path.read_bytes()
    assert not list(path.parent.glob("*.tmp"))
    monkeypatch.setattr(Path, "replace", no_room)
    with pytest.raises(OSError, match="no room"):
        run(path.parent)  # the stand-in for score has other numbers now
    assert path.read_bytes() == before
    assert f"| {CTF}" in capsys.readouterr().out, "printed first"


def test_every_row_has_the_size_of_the_smallest_set(trained, capsys, monkeypatch):
    look = evaluate.look
    few = lambda *arguments: (look(*arguments)[0][:, :N], look(*arguments)[1])
    monkeypatch.setattr(evaluate, "look", few)  # N images cannot have the rank N
    x, y = read(trained / "images.pt")["train"]
    test_set = read(trained / "images.pt")["test"]
    sizes = [(30, test_set, 24), (9, test_set, 9), (30, (x, y), 24)]
    sizes += [(9, (x[:2], y[:2]), 2)]
    for count, train, N in sizes:
        edit(trained / "images.pt", train=train)
        draw(trained, count)
        assert run(trained)[0]["num_samples"] == N
        printed = capsys.readouterr().out
        assert f"the smallest set has {N} images, too few for {N}\n" in printed
        if train is test_set and N == 24:
            assert "| real training images | 0.00 |" in printed, "the same images"


def test_other_shares_of_the_classes_are_warned_of(trained, capsys):
    for of_cat in (10, 11):  # of 24; 8 of the test images
        y = torch.arange(24) % 3
        y[[i for i in range(24) if i % 3 < 2][: of_cat - 8]] = 2
        draw(trained, 24)
        edit(trained / "samples.pt", classes=y)
        run(trained)
        text = f"warning: {CTF} has other shares of the classes"
        assert (text in capsys.readouterr().out) == (of_cat == 11)
    edit(trained / "samples.pt", classes=torch.arange(24) % 2)  # --classes ant bee
    run(trained)
    assert text in capsys.readouterr().out


def test_what_cannot_be_judged_ends_in_one_line(trained, capsys):
    def error(out=trained):
        code, message = error_of(capsys, evaluate.main, "--out", out)
        assert code == 1 and not (out / "metrics.json").exists()
        return message

    assert "run python sample.py first" in error()
    draw(trained, 1, model="baseline")
    assert "a set of images has only one" in error()
    draw(trained, model="baseline")
    draw(trained)
    assert "v has no samples" in error(trained / "v"), "those of v itself"
    files = dict.fromkeys(["tokenizer", "coarse", "fine"], "sample.py again")
    for name, script in (files | {"baseline": "sample.py --model baseline"}).items():
        path = trained / f"{name}.pt"
        before = path.read_bytes()
        edit(path, weights_id="of another training")
        assert f"is from other weights: run python {script}" in error()
        path.write_bytes(before)
    x, y = read(trained / "images.pt")["test"]
    edit(trained / "images.pt", class_names=NAMES[:1], test=(x, 0 * y))
    for file in sample.FILES.values():
        edit(trained / file, classes=0 * read(trained / file)["classes"])
    run(trained)
    assert "hardly better than chance" in capsys.readouterr().out, "of one class"
