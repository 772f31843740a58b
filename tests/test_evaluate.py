import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

import evaluate
import sample
from evaluate import frechet_distance, inception_score, precision_recall
from sample import FINE_SETTINGS, MODEL_FILES, SETTINGS
from tests.conftest import K, M, error_of, spy
from tests.test_sample import generate, predict_fine

HELDOUT = {"coarse": 2.5, "baseline": 4.25, "fine": 1.5}  # nats


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch, out):
    """The stages before this one have tests of their own."""

    test_set = torch.load(out / "tokens.pt", weights_only=True)

    def check(fine, labels, modulus):
        """The test images, all of them, in order; g(q) is q % M."""
        assert torch.equal(fine, test_set["test_fine"].long() % modulus)
        assert torch.equal(labels, test_set["test_labels"])

    def mean_loss(model, tokens, labels):
        check(tokens, labels, model.config.vocabulary)
        return HELDOUT["coarse" if model.config.vocabulary == M else "baseline"]

    def mean_fine_loss(model, fine, labels):
        check(fine, labels, K)
        assert torch.equal(model.code_to_cluster, torch.arange(K) % M)
        return [HELDOUT["fine"], 0.5]

    def swap_within_clusters(tokens, code_to_cluster, rng):
        shuffled = rng.permutation(np.arange(K))
        return np.where(code_to_cluster[tokens] > 0, shuffled[tokens], tokens)

    def sample_images(models, labels, generator, settings, fine_settings):
        """Grey images with a square for each token."""
        tokens = generate(models["ar"], labels, generator, **settings)  # (B, T)
        grey = (7 * tokens % 256).byte().view(-1, 4, 4, 1).expand(-1, 4, 4, 3)
        images = grey.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
        return images, tokens if "aux" in models else None, tokens

    monkeypatch.setattr(sample, "sample_images", sample_images)
    monkeypatch.setattr(evaluate, "predict_fine", predict_fine)
    monkeypatch.setattr(evaluate, "mean_loss", mean_loss)
    monkeypatch.setattr(evaluate, "mean_fine_loss", mean_fine_loss)
    monkeypatch.setattr(evaluate, "swap_within_clusters", swap_within_clusters)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def covariance(rng, size, rank=None):
    a = rng.normal(size=(size, rank or size + 3))
    return a @ a.T / size


# ------------------------------------------------------------------------------ metrics


def test_frechet_distance_of_correlated_features():
    # Computed with another program, by the matrix root of S1 S2.
    mu1, mu2 = np.array([1.0, -2.0, 0.5]), np.array([0.0, -1.0, 2.0])
    s1 = np.array([[2.0, 0.6, -0.4], [0.6, 1.0, 0.3], [-0.4, 0.3, 1.5]])
    s2 = np.array([[1.0, -0.5, 0.2], [-0.5, 3.0, 0.7], [0.2, 0.7, 0.8]])
    distance = frechet_distance(mu1, s1, mu2, s2)
    assert isinstance(distance, float) and distance == pytest.approx(5.759138952)
    assert frechet_distance(mu2, s2, mu1, s1) == pytest.approx(5.759138952), "symmetric"


def test_frechet_distance_of_independent_features_in_closed_form():
    mu1, mu2 = np.array([1.0, 2.0]), np.array([0.0, 4.0])
    s1, s2 = np.diag([4.0, 9.0]), np.diag([1.0, 16.0])
    # Independent: 1 + 4 of the means, and (2 - 1)^2 + (3 - 4)^2 of the deviations.
    assert frechet_distance(mu1, s1, mu2, s2) == pytest.approx(7)


def test_frechet_distance_of_singular_covariances(rng):
    s = covariance(rng, 8, rank=3)
    assert frechet_distance(np.zeros(8), s, np.zeros(8), s) == pytest.approx(
        0, abs=1e-6
    )
    scaled = frechet_distance(np.zeros(8), s, np.zeros(8), 4 * s)
    assert scaled == pytest.approx(np.trace(s))  # tr(S + 4S - 2 * 2S)
    assert frechet_distance(np.zeros(8), s, np.ones(8), 0 * s) == pytest.approx(
        8 + np.trace(s)
    )


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
            sum(p[i, y] * math.log(p[i, y] / marginal[y]) for y in range(4))
            for i in range(20)
        ]
        scores.append(math.exp(sum(kl) / 20))
    wanted = np.mean(scores), np.std(scores)
    assert inception_score(logits, splits=3) == pytest.approx(wanted)


def test_precision_recall_of_points_on_a_line():
    # Real: 0, 1, 2, 10. With k = 1 a real point reaches 1, 1, 1 and 8 far; with k = 2
    # 2, 1, 2 and 9 far. Fake: -1, 3, 18, 19.5, which reach 4, 4, 1.5, 1.5 (k = 1).
    real, fake = (np.array([x]).T for x in ([0.0, 1, 2, 10], [-1.0, 3, 18, 19.5]))
    precision, recall = precision_recall(real, fake, k=1)
    assert precision == 0.75, "-1, 3 and 18 lie just on the edge of 0, 2 and 10"
    assert recall == 0.75, "0, 1 and 2 lie within reach of -1; nothing reaches 10"
    precision, recall = precision_recall(real, fake, k=2)
    assert (precision, recall) == (0.75, 1.0), "k = 2: from 3 to 18 it is 15"
    assert precision_recall(real, real) == (1, 1)
    small = precision_recall(0.01 * real, 0.01 * fake, k=1)
    assert small == (0.75, 0.75), "the scale of the features must not matter"


def test_precision_recall_of_equal_distant_and_narrow_sets(rng):
    real = rng.normal(size=(1500, 2))  # more than a block
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


def test_the_judge_learns_and_is_kept(images, tmp_path):
    train_set, _ = evaluate.load_images(str(images), "train", 16)
    path = tmp_path / "classifier.pt"
    args, cpu = (
        SimpleNamespace(judge_steps=40, seed=0, batch_size=250),
        torch.device("cpu"),
    )
    judge = evaluate.get_classifier(path, train_set, 3, args, cpu)
    (test, test_labels), _ = evaluate.load_images(str(images), "test", 16)
    features, logits = evaluate.look(judge, test, "cpu")
    assert (logits.argmax(1) == test_labels.numpy()).mean() > 0.9
    assert features.shape == (24, 128) and features.dtype == np.float64
    written = path.stat().st_mtime_ns
    again = evaluate.get_classifier(path, train_set, 3, args, cpu)
    assert path.stat().st_mtime_ns == written  # read, not trained again
    np.testing.assert_array_equal(evaluate.look(again, test, "cpu")[1], logits)
    train_set = train_set._replace(x=train_set.x.flip(0))
    evaluate.get_classifier(path, train_set, 3, args, cpu)
    assert path.stat().st_mtime_ns > written  # other images: another judge


# --------------------------------------------------------------------------- the report


def run(out, *flags):
    evaluate.main(["--out", str(out), "--judge-steps", "20", *flags])
    return json.loads((out / "metrics.json").read_text())


def test_metrics_of_sample_files(trained, images, capsys):
    sample.main(["--out", str(trained), "--num-samples", "16", "--cfg-scales", "2"])
    flags = ["--out", str(trained), "--model", "baseline", "--num-samples", "12"]
    sample.main(flags)
    metrics = run(trained)
    assert metrics["protocol"]["num_samples"] == 12  # the smaller of the two
    assert metrics["protocol"]["num_real"] == 24
    assert "12 samples, fewer than 128 features" in capsys.readouterr().out
    ctf, baseline = metrics["rows"]
    assert (ctf["model"], ctf["cfg_scale"], ctf["step"]) == ("ctf", 2.0, 7)
    assert baseline["model"] == "baseline"
    assert (ctf["train_seconds"], baseline["train_seconds"]) == (3.0, 1.5)

    assert ctf["bits_per_stage"] == pytest.approx(
        [2.5 / math.log(2), 1.5 / math.log(2)]
    )
    assert ctf["bits_per_token"] == pytest.approx(4 / math.log(2))
    assert baseline["bits_per_token"] == pytest.approx(4.25 / math.log(2))
    for row in (*metrics["rows"], metrics["real"], *metrics["swap"].values()):
        assert row["fd"] > 0 and 0 <= row["class_accuracy"] <= 1
        assert 1 <= row["inception_score"] <= 3
    # The figures of the real images, computed from the judge that was kept.
    judge = evaluate.Classifier(3)
    kept = torch.load(trained / "classifier.pt", weights_only=True)
    judge.load_state_dict(kept["model"])
    (train, train_labels), _ = evaluate.load_images(str(images), "train", 16)
    (test, _), _ = evaluate.load_images(str(images), "test", 16)
    features, logits = evaluate.look(judge.eval(), train[:12], "cpu")
    real = evaluate.look(judge, test, "cpu")[0]
    gaussians = [part for x in (real, features) for part in (x.mean(0), np.cov(x.T))]
    assert metrics["real"]["fd"] == pytest.approx(
        frechet_distance(*gaussians), rel=1e-4
    )
    drawn = torch.load(trained / "samples.pt", weights_only=True)["images"][:12]
    fake = evaluate.look(judge, drawn.permute(0, 2, 3, 1), "cpu")[0]
    covered = ctf["precision"], ctf["recall"]
    assert covered == precision_recall(real[:12], fake) and covered[0] != covered[1]
    right = (logits.argmax(1) == train_labels[:12].numpy()).mean()
    assert metrics["real"]["class_accuracy"] == pytest.approx(right)
    assert (trained / "metrics.png").exists()


def draw(out, *flags, models=("ctf", "baseline")):
    """Sample files of the weights in out, 16 images each."""
    for model in models:
        command = ["--out", str(out), "--num-samples", "16", "--model", model]
        sample.main([*command, *flags])


def test_metrics_at_several_guidance_scales(trained):
    draw(trained, "--cfg-scales", "1", "4")
    metrics = run(trained)
    rows = [(row["model"], row["cfg_scale"]) for row in metrics["rows"]]
    assert rows == [("ctf", 1), ("ctf", 4), ("baseline", 1), ("baseline", 4)]
    assert metrics["rows"][0]["fd"] != metrics["rows"][1]["fd"]
    assert run(trained)["rows"][0]["fd"] == metrics["rows"][0]["fd"]
    assert not (trained / "convergence.png").exists()


def keep_copies(out, steps=(2, 4)):
    """What --keep-every leaves: coarse-000002.pt and so on, each of other weights."""
    for stem in ("coarse", "fine", "baseline"):
        artifact = torch.load(out / f"{stem}.pt", weights_only=True)
        for step in steps:
            weights = {k: step / 4 * v for k, v in artifact["model"].items()}
            facts = {"model": weights, "step": step, "seconds": step / 2}
            torch.save(artifact | facts, out / f"{stem}-{step:06d}.pt")


def test_kept_copies_are_judged_in_order(trained, capsys):
    keep_copies(trained)
    draw(trained, "--kept")
    metrics = run(trained)
    rows = metrics["rows"]
    facts = [(row["model"], row["step"], row["train_seconds"]) for row in rows]
    assert facts[:2] == [("ctf", 2, 2.0), ("ctf", 4, 4.0)]  # of both stages
    assert facts[2:] == [("baseline", 2, 1.0), ("baseline", 4, 2.0)]
    assert (trained / "convergence.png").exists()
    # The copies of step 4 have the final weights, those of step 2 others.
    for path in trained.glob("samples*"):
        path.unlink()
    draw(trained)
    final = run(trained)["rows"]
    assert rows[1]["fd"] == final[0]["fd"] and rows[3]["fd"] == final[1]["fd"]
    assert rows[0]["fd"] != final[0]["fd"] and rows[2]["fd"] != final[1]["fd"]

    (trained / "fine-000002.pt").unlink()
    command = "--out", trained, "--kept", "--num-samples", "3"
    code, message = error_of(capsys, sample.main, *command)
    assert code == 1 and "as many copies of coarse.pt as of fine.pt" in message
    keep_copies(trained)
    copy = torch.load(trained / "coarse-000004.pt", weights_only=True)
    torch.save(copy | {"settings": {"seed": 1}}, trained / "coarse-000004.pt")
    code, message = error_of(capsys, sample.main, *command)
    assert code == 1 and "coarse-000004.pt is of another run" in message


def test_a_curve_joins_what_was_sampled_alike():
    def row(model, scale, top_k):
        """A row of metrics.json, with its guidance scale as both scores."""
        fine = FINE_SETTINGS | {"top_k": top_k}
        return SETTINGS | {"model": model, "cfg_scale": scale, "fine_settings": fine}

    rows = [row("ctf", scale, k) for scale in (1, 2, 3) for k in (1, 0)]
    rows += [row("baseline", scale, 1) for scale in (2, 3)]
    ax = evaluate.Figure().subplots()
    evaluate.plot_lines(ax, rows, "cfg_scale", "cfg_scale", "cfg_scale")
    points = [line.get_xdata().tolist() for line in ax.lines]
    assert points == [[1, 2, 3], [1, 2, 3], [2, 3]]
    _, names = ax.get_legend_handles_labels()
    assert names == ["CTF", "CTF, fine top_k 0", "baseline"]
    assert [line.get_linestyle() for line in ax.lines] == ["-", "--", "-"]


def test_mean_of_seeds(trained, tmp_path, capsys):
    draw(trained, "--cfg-scales", "1", "3")
    metrics = run(trained)
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, factor in zip(folders, (1, 2, 6)):
        changed = json.loads(json.dumps(metrics))
        for row in changed["rows"]:
            row["fd"] *= factor
            row["class_accuracy"] = math.nan  # void, as of one class
        folder.mkdir()
        (folder / "metrics.json").write_text(json.dumps(changed))
    capsys.readouterr()
    means = run(tmp_path / "mean", "--mean-of", *map(str, folders))
    fd, row = metrics["rows"][1]["fd"], means["rows"][1]
    assert row["fd"] == pytest.approx(3 * fd)
    # Of 1, 2, 6: the squared distances from 3 are 4, 1 and 9, over n - 1 = 2.
    assert row["std"]["fd"] == pytest.approx(7**0.5 * fd)
    assert row["std"]["recall"] == 0 and row["recall"] == metrics["rows"][1]["recall"]
    assert f"{row['fd']:.2f} ± {row['std']['fd']:.2f}" in capsys.readouterr().out
    assert math.isnan(row["std"]["class_accuracy"])
    assert means["swap"] == metrics["swap"]
    assert means["protocol"]["training_seeds"] == 3

    command = "--out", tmp_path / "mean", "--mean-of", *folders
    same = (folders[1] / "metrics.json").read_text()
    for part, key in (("rows", "cfg_scale"), ("protocol", "judge_steps")):
        other = json.loads(same)
        changed = other["rows"][0] if part == "rows" else other["protocol"]
        changed[key] = 1.5
        (folders[1] / "metrics.json").write_text(json.dumps(other))
        code, message = error_of(capsys, evaluate.main, *command)
        assert code == 1 and "differ in models, steps, settings" in message
    (folders[1] / "metrics.json").write_text("{")
    code, message = error_of(capsys, evaluate.main, *command)
    assert code == 1 and "b/metrics.json" in message
    (folders[1] / "metrics.json").unlink()
    assert error_of(capsys, evaluate.main, *command)[0] == 1
    assert error_of(capsys, evaluate.main, "--mean-of", folders[0])[0] == 2


def test_the_best_guidance_scale_has_the_least_distance():
    rows = [
        {"model": model, "step": step, "cfg_scale": scale, "fd": fd}
        for model, step, fds in [("ctf", 1, [3, 1, 2]), ("ctf", 2, [4, 5, 6])]
        for scale, fd in enumerate(fds)
    ]
    rows.append({"model": "baseline", "step": 1, "cfg_scale": 1, "fd": 9})
    best = [(row["model"], row["cfg_scale"]) for row in evaluate.best_rows(rows)]
    assert best == [("ctf", 1), ("ctf", 0), ("baseline", 1)]


def test_stage_2_alone_starts_from_the_real_coarse_labels(trained, monkeypatch):
    models, _ = sample.load_models(trained, MODEL_FILES["ctf"], torch.device("cpu"))
    fine, seen = torch.randint(K, (130, 16)), []

    def reconstruct(_, drawn):
        seen.append(drawn)
        return drawn

    monkeypatch.setattr(evaluate, "reconstruct", reconstruct)
    g, labels = torch.arange(K) % M, torch.arange(130) % 3
    settings = {"cfg_scale": 1.5, "temperature": 0.7, "top_k": 2}
    drawn = evaluate.stage2_alone(models, fine, labels, 7, settings)
    generator = torch.Generator().manual_seed(7)
    parts = [(g[fine[:100]], labels[:100]), (g[fine[100:]], labels[100:])]
    wanted = [predict_fine(None, *part, generator, **settings) for part in parts]
    assert torch.equal(drawn, torch.cat(wanted))


def test_more_samples_than_test_images_are_cut(trained):
    sample.main(["--out", str(trained), "--num-samples", "30"])
    metrics = run(trained)
    assert metrics["protocol"]["num_samples"] == 24


def test_the_control_is_not_called_k_means(trained):
    clusters = torch.load(trained / "clusters.pt", weights_only=True)
    torch.save(clusters | {"method": "random"}, trained / "clusters.pt")
    sample.main(["--out", str(trained), "--num-samples", "16"])
    assert set(run(trained)["swap"]) == {"random"}


def test_two_samples_are_enough_to_run(trained):
    sample.main(["--out", str(trained), "--num-samples", "2"])
    assert run(trained)["protocol"]["num_samples"] == 2


def test_inception_features_come_before_the_head(tmp_path):
    torch.manual_seed(0)
    model = evaluate.torchvision.models.inception_v3(weights=None, init_weights=False)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    network = evaluate.Inception(tmp_path / "weights.pth").eval()
    images = torch.randint(256, (2, 16, 16, 3), dtype=torch.uint8)
    features, logits = evaluate.look(network, images, "cpu")
    assert features.shape == (2, 2048) and logits.shape == (2, 1000)
    x = torch.nn.functional.interpolate(
        images.permute(0, 3, 1, 2) / 127.5 - 1,
        (299, 299),
        mode="bilinear",
        antialias=True,
    )
    with torch.no_grad():
        wanted = model.eval()(x)
    np.testing.assert_allclose(logits, wanted, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------ how pieces are joined


def test_each_set_is_measured_with_its_own_images_and_classes(
    trained, images, monkeypatch
):
    sample.main(["--out", str(trained), "--num-samples", "16"])
    sample.main(["--out", str(trained), "--num-samples", "20", "--model", "baseline"])
    trainings = spy(monkeypatch, evaluate, "train_classifier")
    measured = spy(monkeypatch, evaluate, "measure")
    looked = spy(monkeypatch, evaluate, "look")
    flags = ["--judge-steps", "3", "--seed", "5", "--batch-size", "64"]
    evaluate.main(["--out", str(trained), *flags])
    train_set, _ = evaluate.load_images(str(images), "train", 16)
    test_set, _ = evaluate.load_images(str(images), "test", 16)
    (training,) = trainings
    assert torch.equal(training["train_set"].x, train_set.x), (
        "the judge saw other images"
    )
    assert torch.equal(training["train_set"].y, train_set.y)
    assert (training["steps"], training["seed"]) == (3, 5)
    assert torch.equal(looked[0]["images"], test_set.x)  # the real features
    vqvae, _ = evaluate.load_tokenizer(trained, torch.device("cpu"))
    fine = evaluate.load_tokens(trained, "test")[0].x
    drawn = {
        name: torch.load(trained / f"{name}.pt", weights_only=True)
        for name in ("samples", "samples-baseline")
    }
    wanted = [(train_set.x, train_set.y)]
    wanted += [(evaluate.reconstruct(vqvae, fine), test_set.y)]
    wanted += [(None, test_set.y)] * 3  # two swaps, stage 2 alone: of test images
    wanted += [(f["images"].permute(0, 2, 3, 1), f["labels"]) for f in drawn.values()]
    N = 16  # of all sets, the least
    for x, y in wanted:
        found = [
            call
            for call in measured
            if torch.equal(call["y"], y[:N])
            and (x is None or torch.equal(call["images"], x[:N]))
        ]
        assert found, "a set of images is missing, or measured with other classes"
    assert len(measured) == len(wanted) and all(len(c["y"]) == N for c in measured)
    real_features = looked[0]["network"](evaluate.to_float(test_set.x))[0]
    for call in measured:
        np.testing.assert_allclose(
            call["real"].features, real_features.detach(), rtol=1e-4, atol=1e-5
        )


def test_rows_hold_the_settings_seconds_and_sizes_of_their_own_model(trained):
    fine = torch.load(trained / "fine.pt", weights_only=True)
    torch.save(fine | {"seconds": 10.0}, trained / "fine.pt")
    flags = ["--out", str(trained), "--num-samples", "16", "--seed", "6"]
    sample.main([*flags, "--temperature", "0.5", "--fine-top-k", "3"])
    sample.main([*flags, "--model", "baseline", "--top-k", "7"])
    ctf, baseline = run(trained)["rows"]
    assert (ctf["temperature"], ctf["top_k"], ctf["seed"]) == (0.5, 0, 6)
    assert ctf["fine_settings"]["top_k"] == 3 and baseline["top_k"] == 7
    assert (ctf["train_seconds"], baseline["train_seconds"]) == (11.5, 1.5)
    for row, files in zip((ctf, baseline), MODEL_FILES.values()):
        models = [torch.load(trained / name, weights_only=True) for name in files]
        sizes = [w.numel() for model in models for w in model["model"].values()]
        assert row["parameters"] == sum(sizes)


@pytest.mark.parametrize("flags", [["--judge-steps", "4"], ["--seed", "1"]])
def test_another_judge_is_trained_for_other_flags(trained, monkeypatch, flags):
    sample.main(["--out", str(trained), "--num-samples", "16"])
    evaluate.main(["--out", str(trained), "--judge-steps", "3"])
    trainings = spy(monkeypatch, evaluate, "train_classifier")
    evaluate.main(["--out", str(trained), "--judge-steps", "3"])
    assert not trainings
    evaluate.main(["--out", str(trained), "--judge-steps", "3", *flags])
    assert len(trainings) == 1, "a stale judge was used"


def test_another_judge_is_trained_for_other_classes(images, tmp_path):
    train_set, _ = evaluate.load_images(str(images), "train", 16)
    path, cpu = tmp_path / "classifier.pt", torch.device("cpu")
    args = SimpleNamespace(judge_steps=2, seed=0, batch_size=250)
    evaluate.get_classifier(path, train_set, 3, args, cpu)
    written = path.stat().st_mtime_ns
    evaluate.get_classifier(
        path, train_set._replace(y=train_set.y.flip(0)), 3, args, cpu
    )
    assert path.stat().st_mtime_ns > written


def test_runs_of_unequal_size_are_not_averaged(trained, tmp_path, capsys):
    sample.main(["--out", str(trained), "--num-samples", "16"])
    text = json.dumps(run(trained))
    numbers = '"num_samples": 16', '"num_real": 24', '"top_k": 0', '"step": 7'
    for change in (*numbers, '"clusters": "kmeans'):
        assert change in text
        other = text.replace(change, change[:-1] + "9")
        for name, content in (("a", text), ("b", other)):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "metrics.json").write_text(content)
        command = "--out", tmp_path / "c", "--mean-of", tmp_path / "a", tmp_path / "b"
        code, message = error_of(capsys, evaluate.main, *command)
        assert code == 1 and "differ in" in message


def test_bits_are_nats_over_ln_2_of_each_stage(trained):
    tokens = evaluate.load_tokens(trained, "test")[0]
    # 2.5 nats of the coarse labels, 1.5 of the fine ones given these; 4.25 of the baseline
    for name, wanted in (("ctf", [3.606738, 2.164043]), ("baseline", [6.131454])):
        models, _ = sample.load_models(trained, MODEL_FILES[name], torch.device("cpu"))
        bits = evaluate.bits_per_token(models, *tokens)
        assert bits == pytest.approx(wanted), f"bits of {name}: is ln 2 divided by?"


def test_the_swap_is_of_the_first_test_tokens_and_the_clusters_on_disk(
    trained, monkeypatch
):
    swapped = spy(monkeypatch, evaluate, "swap_within_clusters")
    alone = spy(monkeypatch, evaluate, "stage2_alone")
    flags = ["--num-samples", "16", "--fine-top-k", "3"]
    sample.main(["--out", str(trained), *flags])
    run(trained)
    fine, y = evaluate.load_tokens(trained, "test")[0]
    g = (np.arange(K) % M).tolist()
    assert [(call["tokens"] == fine[:16].numpy()).all() for call in swapped] == [
        True
    ] * 2
    assert [call["code_to_cluster"].tolist() == g for call in swapped] == [False, True]
    (call,) = alone
    assert call["fine_settings"]["top_k"] == 3, "not as the samples"
    assert torch.equal(call["fine"], fine[:16]) and torch.equal(call["y"], y[:16])
