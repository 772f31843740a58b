import json
import math

import numpy as np
import pytest
import torch
from conftest import NAMES, G, K, M, edit, error_of, spy
from scipy.spatial.distance import cdist
from test_sample import generate, predict_fine

import cluster
import evaluate
import sample
from evaluate import frechet_distance, inception_score, precision_recall
from sample import load_models
from tokenizer import load_examples, load_tokenizer, reconstruct, to_float

CPU = torch.device("cpu")
NATS = {"coarse": 2.5, "baseline": 4.25, "fine": 1.5}


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch, out):
    """The scripts before this one have tests of their own."""
    _, (test_fine, test_y), _ = load_examples(out, "tokens.pt")

    def mean_loss(model, tokens, y):
        V = model.config.vocabulary
        assert torch.equal(tokens, test_fine % V)  # the map g is q % M
        assert torch.equal(y, test_y)
        return NATS["coarse" if V == M else "baseline"]

    def mean_fine_loss(model, fine, y):
        assert torch.equal(fine, test_fine) and torch.equal(y, test_y)
        assert torch.equal(model.code_to_cluster, G)
        return [NATS["fine"], 0.5]

    def swap_within_clusters(tokens, code_to_cluster, rng):
        shuffled = rng.permutation(np.arange(K))
        return np.where(code_to_cluster[tokens] > 0, shuffled[tokens], tokens)

    def sample_images(models, y, generator, settings, fine_settings):
        """Grey images with a square for each token."""
        tokens = generate(models["ar"], y, generator, **settings)  # (B, T)
        grey = (7 * tokens % 256).byte().view(-1, 4, 4, 1).expand(-1, 4, 4, 3)
        images = grey.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
        return images, tokens if "aux" in models else None, tokens

    monkeypatch.setattr(sample, "sample_images", sample_images)
    monkeypatch.setattr(evaluate, "predict_fine", predict_fine)
    monkeypatch.setattr(evaluate, "mean_loss", mean_loss)
    monkeypatch.setattr(evaluate, "mean_fine_loss", mean_fine_loss)
    monkeypatch.setattr(cluster, "swap_within_clusters", swap_within_clusters)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def draw(out, count=16, *flags, models=("ctf", "baseline")):
    """Sample files of the weights in out."""
    for model in models:
        command = ["--out", str(out), "--num-samples", str(count), "--model", model]
        sample.main([*command, *flags])


def run(out, *flags):
    """What evaluate.py writes to metrics.json: the protocol, {name: row}."""
    evaluate.main(["--out", str(out), "--judge-steps", "3", *flags])
    metrics = json.loads((out / "metrics.json").read_text("utf-8"))
    assert (out / "metrics.png").exists()
    return metrics["protocol"], {row["name"]: row for row in metrics["rows"]}


CTF, BASELINE = "CTF, argmax fine labels, guidance 2", "baseline, guidance 2"
CONTROLS = ["real training images", "reconstructions"]
CONTROLS += [f"swapped within {name} clusters" for name in ("k-means", "random")]
ALONE = "stage 2 alone (real coarse labels)"


# ------------------------------------------------------------------------------ metrics


def test_frechet_distance_of_correlated_features():
    # Computed with another program, by the matrix square root of S1 S2.
    mu1, mu2 = np.array([1.0, -2.0, 0.5]), np.array([0.0, -1.0, 2.0])
    s1 = np.array([[2.0, 0.6, -0.4], [0.6, 1.0, 0.3], [-0.4, 0.3, 1.5]])
    s2 = np.array([[1.0, -0.5, 0.2], [-0.5, 3.0, 0.7], [0.2, 0.7, 0.8]])
    distance = frechet_distance(mu1, s1, mu2, s2)
    assert isinstance(distance, float) and distance == pytest.approx(5.759138952)
    assert frechet_distance(mu2, s2, mu1, s1) == pytest.approx(5.759138952), "symmetric"


def test_frechet_distance_of_independent_features_in_closed_form():
    mu1, mu2 = np.array([1.0, 2.0]), np.array([0.0, 4.0])
    s1, s2 = np.diag([4.0, 9.0]), np.diag([1.0, 16.0])
    # The means give 1 + 4, the standard deviations (2 - 1)^2 + (3 - 4)^2.
    assert frechet_distance(mu1, s1, mu2, s2) == pytest.approx(7)


def test_frechet_distance_of_singular_covariances(rng):
    a, zero, one = rng.normal(size=(8, 3)), np.zeros(8), np.ones(8)
    s = a @ a.T / 8  # rank 3
    trace = np.trace(s)
    assert frechet_distance(zero, s, zero, s) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(zero, s, zero, 4 * s) == pytest.approx(trace)  # 1 + 4 - 4
    assert frechet_distance(zero, s, one, 0 * s) == pytest.approx(8 + trace)


def test_gaussian_is_unbiased():
    mean, cov = evaluate.gaussian(np.array([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]]))
    np.testing.assert_allclose(mean, [2, 2])
    np.testing.assert_allclose(cov, [[4, 3], [3, 3]])


def test_inception_score_between_one_and_the_number_of_classes():
    assert inception_score(np.zeros((100, 7))) == pytest.approx((1, 0))
    certain = 1000 * np.eye(5)[np.arange(100) % 5]
    assert inception_score(certain) == pytest.approx((5, 0))
    same = 1000 * np.eye(5)[np.zeros(100, int)]  # certain, but no variety
    assert inception_score(same) == pytest.approx((1, 0))


def test_inception_score_against_the_definition(rng):
    logits = 2 * rng.normal(size=(60, 4))
    scores = []
    for part in np.split(logits, 3):
        p = np.exp(part) / np.exp(part).sum(axis=1, keepdims=True)
        marginal = [sum(p[i, y] for i in range(20)) / 20 for y in range(4)]
        kl = [
            p[i, y] * math.log(p[i, y] / marginal[y])
            for i in range(20)
            for y in range(4)
        ]
        scores.append(math.exp(sum(kl) / 20))
    wanted = np.mean(scores), np.std(scores)
    assert inception_score(logits, splits=3) == pytest.approx(wanted)


def test_precision_recall_of_points_on_a_line():
    # Radii of the real points 0, 1, 2, 10: with k = 1 they are 1, 1, 1, 8, and with
    # k = 2 they are 2, 1, 2, 9. Of the fake points -1, 3, 18, 19.5: 4, 4, 1.5, 1.5.
    real, fake = (np.array([x]).T for x in ([0.0, 1, 2, 10], [-1.0, 3, 18, 19.5]))
    precision, recall = precision_recall(real, fake, k=1)
    assert precision == 0.75, "-1, 3 and 18 lie on the edge of the radii of 0, 2, 10"
    assert recall == 0.75, "0, 1, 2 lie within the radius of -1, and 10 in none"
    precision, recall = precision_recall(real, fake, k=2)
    assert (precision, recall) == (0.75, 1.0), "with k = 2 the radius of 18 is 15"
    assert precision_recall(real, real) == (1, 1)
    small = precision_recall(0.01 * real, 0.01 * fake, k=1)
    assert small == (0.75, 0.75), "the scale of the features must not matter"


def test_precision_recall_of_equal_distant_and_narrow_sets(rng):
    real = rng.normal(size=(1500, 2))  # more than a chunk
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real + 100) == (0, 0)
    precision, recall = precision_recall(real, 0.01 * real[:200])
    assert precision > 0.95 and recall < 0.05


def test_precision_recall_against_scipy_where_points_lie_on_the_edge(rng):
    def covered(points, members, k):
        own = np.sort(cdist(members, members), axis=1)[:, min(k, len(members) - 1)]
        return (cdist(points, members) <= own).any(axis=1).mean()

    lattice = rng.integers(0, 4, size=(60, 3)).astype(float)  # ties, and equal rows
    far = rng.normal(size=(50, 5)) + 1000  # products lose digits far from the origin
    pairs = [
        (lattice, rng.integers(0, 5, size=(50, 3)).astype(float)),
        (far, far[::-1] + rng.normal(0, 0.7, size=(50, 5))),
        (np.zeros((9, 2)), np.concatenate([np.zeros((3, 2)), np.ones((4, 2))])),
        (lattice[:2], lattice[2:5]),  # fewer members than neighbours
    ]
    for real, fake in pairs:
        for k in (1, 3, 5):
            wanted = covered(fake, real, k), covered(real, fake, k)
            assert precision_recall(real, fake, k) == pytest.approx(wanted, abs=1e-9)


# ---------------------------------------------------------------------------- the judge


def test_the_judge_learns(out):
    train_set, test_set, _ = load_examples(out, "images.pt")
    judge = evaluate.train_classifier(train_set, 3, 40, 0, CPU)
    features, logits = evaluate.look(judge, test_set.x, CPU)
    assert evaluate.class_accuracy(logits, test_set.y) > 0.9
    assert features.shape == (24, 128) and features.dtype == np.float64


def test_a_kept_judge_is_used_only_if_it_is_the_right_one(out, capsys, monkeypatch):
    trainings = spy(monkeypatch, evaluate, "train_classifier")
    train_set, test_set, _ = load_examples(out, "images.pt")
    path, settings = out / "classifier.pt", {"images_id": "x", "steps": 2, "seed": 0}

    def get(**changes):
        """The logits of the judge, whether it was trained, and the printed text."""
        trainings.clear()
        judge = evaluate.get_judge(path, train_set, 3, settings | changes, CPU)
        logits = evaluate.look(judge, test_set.x, CPU)[1]
        return logits, len(trainings) == 1, capsys.readouterr().out

    logits, trained, printed = get()
    assert trained and printed == ""
    again, trained, printed = get()
    assert not trained and printed == "" and (again == logits).all()
    for change in ({"images_id": "others"}, {"steps": 3}, {"seed": 1}):
        _, trained, printed = get(**change)
        line = f"{path} is of other images or flags: training the judge again\n"
        assert trained and printed == line, "a judge of other images or flags was used"
        assert torch.load(path, weights_only=True)["settings"] == settings | change
    get()
    cut = path.read_bytes()[:3000]
    older = {"model": {}}  # without settings
    unfit = older | {"settings": settings}
    for damaged in (b"", cut, older, unfit):
        if isinstance(damaged, bytes):
            path.write_bytes(damaged)
        else:
            torch.save(damaged, path)
        again, trained, printed = get()
        assert trained and (again == logits).all()
        assert printed.startswith(f"{path} is unusable ("), printed


# -------------------------------------------------------------------------- the metrics


def test_stage_2_alone_starts_from_the_real_coarse_labels(trained, monkeypatch):
    models, _ = load_models(trained, "ctf", CPU)
    fine, y = torch.randint(K, (130, 16)), torch.arange(130) % 3
    monkeypatch.setattr(evaluate, "reconstruct", lambda _, fine: fine)
    settings = {"cfg_scale": 1.5, "temperature": 0.7, "top_k": 2}
    found = evaluate.stage2_alone(models, fine, y, 7, settings)
    generator = torch.Generator().manual_seed(7)
    parts = [(G[fine[:100]], y[:100]), (G[fine[100:]], y[100:])]
    wanted = [predict_fine(None, *part, generator, **settings) for part in parts]
    assert torch.equal(found, torch.cat(wanted))


def test_bits_are_nats_over_ln_2_of_each_stage(trained):
    tokens = load_examples(trained, "tokens.pt")[1]
    # 2.5 nats per coarse label, 1.5 per fine label given these; 4.25 for the baseline
    for name, wanted in (("ctf", [3.606738, 2.164043]), ("baseline", [6.131454])):
        models, _ = load_models(trained, name, CPU)
        bits = evaluate.bits_per_token(models, *tokens)
        assert bits == pytest.approx(wanted), f"bits of {name}: divided by ln 2?"


# ---------------------------------------------------------------- how pieces are joined


def test_each_set_is_measured_with_its_own_images_and_classes(trained, monkeypatch):
    draw(trained, 16, "--fine-top-k", "3", models=["ctf"])
    draw(trained, 20, models=["baseline"])
    names = (
        "train_classifier",
        "measure",
        "look",
        "swapped_images",
        "stage2_alone",
    )
    spies = [spy(monkeypatch, evaluate, name) for name in names]
    protocol, rows = run(trained, "--seed", "5")
    (training,), measured, looked, swapped, (alone,) = spies
    train_set, test_set, _ = load_examples(trained, "images.pt")
    assert torch.equal(training["train_set"].x, train_set.x), "the judge's images"
    assert torch.equal(training["train_set"].y, train_set.y)
    assert (training["steps"], training["seed"]) == (3, 5)

    N = 16  # the smallest set
    fine, y = load_examples(trained, "tokens.pt")[1]
    for call in swapped:
        assert torch.equal(call["fine"], fine[:N])
    maps = [call["code_to_cluster"].tolist() for call in swapped]
    assert maps.count(G.tolist()) == 1 and len(maps) == 2  # and a random map
    assert torch.equal(alone["fine"], fine[:N]) and torch.equal(alone["y"], y[:N])
    assert alone["fine_settings"]["top_k"] == 3, "not the settings of the samples"

    ctf = "CTF, sampled fine labels, guidance 2, fine top_k 3"
    assert list(rows) == [*CONTROLS, ALONE, ctf, BASELINE]
    vqvae, _ = load_tokenizer(trained, CPU)
    sets = dict.fromkeys(rows, (None, test_set.y))
    sets["real training images"] = train_set
    sets["reconstructions"] = reconstruct(vqvae, fine), test_set.y
    for name, file in ((ctf, "samples.pt"), (BASELINE, "samples-baseline.pt")):
        samples = torch.load(trained / file, weights_only=True)
        sets[name] = samples["images"], samples["classes"]
    real = looked[0]["judge"](to_float(test_set.x))[0].detach()
    assert len(measured) == len(sets)
    for call, (name, (x, y)) in zip(measured, sets.items()):
        assert torch.equal(call["y"], y[:N]), f"{name}: other classes"
        assert len(call["images"]) == N
        assert x is None or torch.equal(call["images"], x[:N]), f"{name}: other images"
        np.testing.assert_allclose(call["real"], real, rtol=1e-4, atol=1e-5)
    assert protocol["num_samples"] == N and protocol["num_real"] == 24


def test_scores_are_those_of_the_judge_that_was_kept(trained, capsys):
    draw(trained, 16, models=["ctf"])
    draw(trained, 12, models=["baseline"])
    protocol, rows = run(trained)
    assert protocol["num_samples"] == 12 and protocol["data"] == "pets"
    printed = capsys.readouterr().out
    assert "12 images (samples-baseline.pt) are fewer than 128\nfeatures" in printed
    judge = evaluate.Classifier(3)
    kept = torch.load(trained / "classifier.pt", weights_only=True)
    judge.load_state_dict(kept["model"])
    judge.eval()
    train_set, test_set, _ = load_examples(trained, "images.pt")
    real, logits = evaluate.look(judge, test_set.x, CPU)
    right = (logits.argmax(1) == test_set.y.numpy()).mean()
    assert protocol["judge_accuracy"] == pytest.approx(right)
    samples = torch.load(trained / "samples.pt", weights_only=True)
    pairs = {CTF: (samples["images"], samples["classes"]), CONTROLS[0]: train_set}
    for name, (x, y) in pairs.items():
        features, logits = evaluate.look(judge, x[:12], CPU)
        gaussians = [p for f in (real, features) for p in (f.mean(0), np.cov(f.T))]
        wanted = {"fd": frechet_distance(*gaussians)}
        wanted["inception_score"], _ = inception_score(logits)
        wanted["class_accuracy"] = (logits.argmax(1) == y[:12].numpy()).mean()
        wanted["precision"], wanted["recall"] = precision_recall(real[:12], features)
        found = {key: rows[name][key] for key in wanted}
        assert found == pytest.approx(wanted, rel=1e-4), name


def test_rows_hold_the_settings_seconds_and_sizes_of_their_own_model(trained):
    edit(trained / "fine.pt", seconds=10.0, step=6)
    flags = "--seed", "6"
    draw(trained, 16, "--temperature=0.5", "--fine-top-k=3", *flags, models=["ctf"])
    draw(trained, 16, "--top-k=7", "--cfg-scales=1.5", *flags, models=["baseline"])
    _, rows = run(trained)
    ctf, baseline = list(rows.values())[-2:]
    assert (ctf["model"], ctf["temperature"], ctf["top_k"]) == ("ctf", 0.5, 0)
    assert ctf["fine_settings"]["top_k"] == 3 and ctf["seed"] == 6
    assert (baseline["model"], baseline["top_k"]) == ("baseline", 7)
    assert (ctf["train_seconds"], baseline["train_seconds"]) == (11.5, 1.5)
    assert (ctf["steps"], baseline["steps"]) == ([7, 6], [7])
    nats = ([2.5, 1.5], ["coarse.pt", "fine.pt"]), ([4.25], ["baseline.pt"])
    for row, (nats_per_stage, files) in zip((ctf, baseline), nats):
        bits = [value / math.log(2) for value in nats_per_stage]
        assert row["bits_per_stage"] == pytest.approx(bits)
        assert row["bits_per_token"] == pytest.approx(sum(bits))
        models = [torch.load(trained / name, weights_only=True) for name in files]
        sizes = [w.numel() for model in models for w in model["model"].values()]
        assert row["parameters"] == sum(sizes)


def test_a_kept_copy_is_judged_in_its_own_folder(trained, monkeypatch):
    trainings = spy(monkeypatch, evaluate, "train_classifier")
    kept = trained / "kept-01"
    kept.mkdir()
    for name in ("coarse.pt", "fine.pt"):
        copy = torch.load(trained / name, weights_only=True)
        copy["model"] = {key: w / 2 for key, w in copy["model"].items()}
        torch.save(copy | {"step": 3, "weights_id": f"half-{name}"}, kept / name)
    draw(trained)
    draw(kept, models=["ctf"])
    _, final = run(trained)
    _, early = run(kept)
    assert list(early) == [*CONTROLS, ALONE, CTF], (
        "only the samples of the folder itself"
    )
    assert early[CTF]["steps"] == [3, 3] and final[CTF]["steps"] == [7, 7]
    assert early[CTF]["fd"] != final[CTF]["fd"]
    for name in CONTROLS:
        assert early[name] == final[name], "the controls are those of the folder above"
    assert len(trainings) == 1 and not (kept / "classifier.pt").exists()


def test_a_row_says_which_stage_was_inherited(trained, capsys):
    variant = trained / "longer"
    variant.mkdir()
    fine = torch.load(trained / "fine.pt", weights_only=True)
    torch.save(fine | {"step": 9}, variant / "fine.pt")
    draw(variant, models=["ctf"])
    _, rows = run(variant)
    row, weights = rows[CTF], [str(trained / "coarse.pt"), str(variant / "fine.pt")]
    assert row["weights"] == weights and row["steps"] == [7, 9]
    table = [line for line in capsys.readouterr().out.splitlines() if line[:1] == "|"]
    assert len({line.count("|") for line in table}) == 1, "rows of unequal length"
    assert [line.split(" | ")[0][2:] for line in table[2:]] == list(rows)
    assert table[-1].startswith(f"| {CTF} | {row['fd']:.2f} |")
    assert "| 3.61 + 2.16 |" in table[-1]
    assert table[-1].endswith(f"| {weights[0]} (7) + {weights[1]} (9) |")


@pytest.mark.parametrize(("count", "N"), [(2, 2), (30, 24)])
def test_every_set_has_the_size_of_the_smallest(trained, count, N):
    draw(trained, count, models=["ctf"])  # there are 24 test images
    assert run(trained)[0]["num_samples"] == N


def test_random_clusters_are_not_called_k_means(trained):
    edit(trained / "clusters.pt", method="random")
    draw(trained, models=["ctf"])
    protocol, rows = run(trained)
    assert protocol["clusters"] == "random"
    swaps = [name for name in rows if name.startswith("swapped")]
    assert swaps == ["swapped within random clusters"]


def test_other_shares_of_the_classes_are_warned_of(trained, capsys):
    draw(trained, models=["ctf"])
    run(trained)
    assert "that alone raises" not in capsys.readouterr().out
    draw(trained, 16, "--classes", "bee", models=["ctf"])
    run(trained)
    printed = capsys.readouterr().out
    assert f"the classes of {CTF} have other shares" in printed


def test_what_cannot_be_judged_ends_in_one_line(trained, capsys):
    def error(out=trained):
        code, message = error_of(capsys, evaluate.main, "--out", out)
        assert code == 1 and not (out / "metrics.json").exists()
        return message

    draw(trained, 1, models=["baseline"])
    assert "only one of samples-baseline.pt: a covariance needs two" in error()
    (trained / "samples-baseline.pt").unlink()
    draw(trained, models=["ctf"])
    assert "cfg4 has no samples" in error(trained / "cfg4")  # those of cfg4 itself
    edit(trained / "images.pt", class_names=NAMES[:1])
    assert "a single class: the judge would have nothing to learn" in error()
    edit(trained / "images.pt", class_names=NAMES)
    assert CTF in run(trained)[1]  # without a fault
