import re

import numpy as np
import pytest
import torch
from conftest import IDS, K
from scipy.cluster.vq import kmeans2
from scipy.spatial.distance import cdist
from scipy.stats import chisquare

import cluster
from cluster import kmeans, kmeans_plus_plus, swap_within_clusters


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(400, 3))


@pytest.fixture
def distinct_rows(monkeypatch):
    """In place of k-means++, which has its own tests: k distinct random rows."""
    rows = lambda x, k, rng: rng.permutation(np.unique(x, axis=0))[:k]
    monkeypatch.setattr(cluster, "kmeans_plus_plus", rows)


def test_kmeans_against_scipy(x):
    init = x[:12]
    kept = init.copy()
    _, centroids, inertia = kmeans(x, 12, init=init, max_iter=8)
    assert (init == kept).all(), "the caller's init was overwritten"
    wanted, _ = kmeans2(x, kept, iter=8, minit="matrix")
    message = "after 8 steps: is a step the assignment, and then the means?"
    np.testing.assert_allclose(centroids, wanted, atol=1e-5, err_msg=message)
    assert len(inertia) == 8, "not one inertia per step"


def test_kmeans_ends_when_no_assignment_changes(x, distinct_rows):
    x = x.astype(np.float32)
    assignment, centroids, inertia = kmeans(x, 12, seed=1)
    assert centroids.dtype == np.float64 and assignment.dtype == np.int64
    distances = cdist(x, centroids)
    assert (assignment == distances.argmin(axis=1)).all(), "it must go on"
    for m in range(12):
        mean = x[assignment == m].mean(axis=0)
        np.testing.assert_allclose(centroids[m], mean, 1e-5, err_msg="not the mean")
    least = (distances.min(axis=1) ** 2).sum()  # measured before or after the last step
    assert inertia[-1] == pytest.approx(least, rel=0.02)
    assert 2 < len(inertia) < 300, "it must end when no assignment changes"


def test_inertia_never_rises_and_no_cluster_stays_empty(x, distinct_rows):
    runs = [kmeans(x, 40, init=np.repeat(x[:5], 8, axis=0))]  # 35 clusters start empty
    assert np.bincount(runs[0][0], minlength=40).min() > 0
    runs += [kmeans(x, 25, seed=seed) for seed in range(5)]
    runs += [kmeans(x + 1000, 25)]
    for _, _, inertia in runs:
        assert (np.diff(inertia) <= 1e-6).all() and len(inertia) < 300
    assignment, centroids, _ = runs[-1]
    mean = (x + 1000)[assignment == 7].mean(axis=0)
    np.testing.assert_allclose(centroids[7], mean, 1e-10, err_msg="not in float64")


def test_an_empty_cluster_takes_a_row_of_another_cluster():
    x = np.array([[0.0], [1.0], [10.0], [2.0]])
    assignment, centroids, _ = kmeans(x, 2, init=np.zeros((2, 1)), max_iter=1)
    assert np.bincount(assignment, minlength=2).min() > 0, "a cluster stayed empty"
    for m in range(2):
        assert centroids[m] == pytest.approx(x[assignment == m].mean(axis=0))
    # The farthest row is alone in its cluster, so another row must move.
    x, init = np.array([[0.0], [1.0], [100.0]]), np.array([[0.0], [60.0], [-900.0]])
    assignment, centroids, _ = kmeans(x, 3, init=init, max_iter=1)
    assert sorted(assignment) == [0, 1, 2], "a row was taken from a cluster of one"
    assert sorted(centroids[:, 0]) == [0, 1, 100]


def test_as_many_clusters_as_rows_have_no_inertia(x, distinct_rows):
    assignment, _, inertia = kmeans(x[:50], 50)
    assert sorted(assignment) == list(range(50))
    assert inertia[-1] == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError):  # in any words
        kmeans(x[:50], 51)


def test_kmeans_starts_from_k_means_plus_plus_with_seed(x, distinct_rows):
    one, same, other = (kmeans(x, 20, seed=seed)[0] for seed in (1, 1, 2))
    assert (one == same).all(), "the same seed must give the same clusters"
    assert (one != other).any(), "seed must choose the first centroids"
    # k-means++ chooses every distinct row before any twice, so it finds all six.
    rows = np.repeat(np.eye(6), [50, 40, 5, 3, 1, 1], axis=0)
    for seed in range(5):
        inertia = kmeans(rows, 6, seed=seed, max_iter=1)[2]
        assert inertia[-1] < 1e-9, "it does not start at the rows of k-means++"


def test_rows_are_chosen_in_proportion_to_the_squared_distance():
    x, rng = np.array([[0.0], [1.0], [3.0]]), np.random.default_rng(0)
    pairs = np.array([kmeans_plus_plus(x, 2, rng)[:, 0] for _ in range(4000)])
    first = [(pairs[:, 0] == row).sum() for row in (0, 1, 3)]
    assert chisquare(first).pvalue > 1e-3, f"the first row is not uniform: {first}"
    second = [(pairs[pairs[:, 0] == 0, 1] == row).sum() for row in (0, 1, 3)]
    assert second[0] == 0, "a row was chosen twice, at distance 0"
    wanted = sum(second) * np.array([0.1, 0.9])
    assert chisquare(second[1:], wanted).pvalue > 1e-3, f"1 and 3: {second[1:]}"


def test_every_distinct_row_is_chosen_before_any_twice():
    choose = lambda x, k, seed: kmeans_plus_plus(x, k, np.random.default_rng(seed))
    x = np.repeat(np.arange(6.0), 50)[:, None]
    assert sorted(choose(x, 6, 0)[:, 0]) == [0, 1, 2, 3, 4, 5]
    equal = choose(np.ones((9, 2)), 3, 0).tolist()
    assert equal == [[1, 1]] * 3, "if all distances are 0, take any row"
    assert (choose(x, 5, 0) == choose(x, 5, 0)).all(), "not by rng alone"
    assert (choose(x, 5, 0) != choose(x, 5, 1)).any(), "rng must choose the rows"


def test_invert_lists_the_codes_of_every_cluster():
    for g in (np.random.default_rng(0).integers(5, size=200), np.array([0, 1, 1])):
        (members, place), sizes = cluster.invert(g), np.bincount(g)
        assert members.shape == (len(sizes), max(sizes)), "not (M, S)"
        for m, row in enumerate(members):
            wanted = [*np.flatnonzero(g == m), *[-1] * (max(sizes) - sizes[m])]
            assert row.tolist() == wanted, "not the codes in ascending order, then -1"
        assert (members[g, place] == np.arange(len(g))).all(), "not the place of a code"
        assert members.dtype == place.dtype == np.int64


def test_swaps_stay_in_their_cluster_and_reach_all_of_it(monkeypatch):
    g = np.array([0, 1, 1, 0, 1, 2])
    members = np.array([[0, 3, -1], [1, 2, 4], [5, -1, -1]])  # invert has its own test
    inverse = lambda code_to_cluster: (members, np.array([0, 0, 1, 1, 2, 0]))
    monkeypatch.setattr(cluster, "invert", inverse)
    swap = lambda seed: swap_within_clusters(tokens, g, np.random.default_rng(seed))

    tokens = np.random.default_rng(1).integers(6, size=(3000, 4), dtype=np.int32)
    kept, swapped = tokens.copy(), swap(2)
    assert swapped.dtype == np.int64 and (tokens == kept).all()
    assert (g[swapped] == g[tokens]).all(), "a token left its cluster"
    for code in range(5):
        counts = np.bincount(swapped[tokens == code], minlength=6)[g == g[code]]
        assert chisquare(counts).pvalue > 1e-3, f"codes for {code}: {counts}"
    assert (swapped == swap(2)).all(), "the same rng must choose the same codes"
    assert (swapped != swap(3)).any(), "rng must choose the codes"
    tokens = np.ones((50, 2, 4), dtype=np.int64)  # tokens may be of any shape
    assert (swap(0) != swap(0)[:, :1, :1]).any(), "sample each token independently"
    tokens = tokens[0, 0]
    assert swap(0).shape == (4,)


@pytest.fixture
def run(out, figures, monkeypatch):
    """run(flags) calls main and returns clusters.pt, and the images and labels of
    clusters.png. Its images are the fine labels: a stand-in for the decoder."""
    plot_rows = cluster.plot_rows
    image = lambda model, fine: fine.view(-1, 4, 4, 1).expand(-1, -1, -1, 3).byte()
    monkeypatch.setattr(cluster, "reconstruct", image)

    def run(flags, picture=False):
        plot = plot_rows if picture else lambda *_: None
        monkeypatch.setattr(cluster, "plot_rows", plot)
        cluster.main(["--out", str(out), "--clusters", "5", *flags.split()])
        artifact = torch.load(out / "clusters.pt", weights_only=True)
        if not picture:
            return artifact
        figure = figures[out / "clusters.png"]
        assert f"K = {K}, M = 5" in figure.get_suptitle()
        rows = [figure.axes[i : i + 10] for i in range(0, 40, 10)]
        images = [np.stack([ax.images[0].get_array() for ax in row]) for row in rows]
        return artifact, images, [row[0].get_ylabel() for row in rows]

    return run


def test_the_clusters_their_centroids_and_the_random_control(run, out, capsys):
    codebook = torch.load(out / "tokenizer.pt")["model"]["codebook"]
    found = run("--seed 16")
    printed = re.findall(r"\d+\.\d|\d+", capsys.readouterr().out)
    sizes, inertia = np.bincount(found["code_to_cluster"]), found["inertia"]
    numbers = 5, min(sizes), max(sizes), f"{inertia[0]:.1f}", f"{inertia[-1]:.1f}"
    numbers += len(inertia), 3
    assert printed[:7] == [str(number) for number in numbers]
    alone = run("--clusters 32")["code_to_cluster"]  # M = K: every code has its own
    assert sorted(alone.tolist()) == list(range(K))
    shuffled = run("--seed 16 --method random")
    assert len(shuffled["inertia"]) == 1 < len(inertia)
    ids = [a["cluster_id"] for a in (shuffled, found, run("--seed 16"))]
    assert ids[0] != ids[1] == ids[2]
    for artifact, method in ((found, "kmeans"), (shuffled, "random")):
        g, means = artifact["code_to_cluster"], artifact["centroids"]
        assert artifact["codebook_id"] == IDS["codebook_id"]
        assert artifact["method"] == method and g.dtype == torch.int64
        assert (np.bincount(g) == sizes).all(), "not of the same sizes"
        wanted = torch.stack([codebook[g == m].mean(dim=0) for m in range(5)])
        torch.testing.assert_close(means, wanted)
        wanted = (codebook - means[g]).square().sum().item()
        assert artifact["inertia"][-1] == pytest.approx(wanted, rel=1e-5)


def test_the_best_restart_is_kept_and_every_seed_has_its_own(run, monkeypatch):
    seeds, maps, swaps = [], [], []

    def one_run(x, k, seed):  # the second of three is the best
        seeds.append(np.random.default_rng(seed).random())
        i = len(seeds) % 3
        inertia = ([6, 4], [7, 5], [9, 3])[i]
        return np.roll(np.arange(K) % 5, i), np.zeros((5, 8)), inertia

    monkeypatch.setattr(cluster, "kmeans", one_run)
    best = run("--seed 7")
    assert best["inertia"] == [9, 3] and best["code_to_cluster"][2] == 0
    for seed in range(3):
        artifact, images, _ = run(f"--seed {seed} --method random", picture=True)
        maps.append(artifact["code_to_cluster"].numpy().tobytes())
        swaps.append(images[2].tobytes())
    again = run("--seed 2 --method random", picture=True)[1]
    assert again[2].tobytes() == swaps[2], "not by --seed alone"
    assert len(set(seeds)) == 12, "two seeds share a restart"
    assert len(set(maps)) == len(set(swaps)) == 3


def test_the_picture_shows_swaps_within_the_saved_clusters(run, out):
    fine, images = (torch.load(out / f)["test"][0] for f in ("tokens.pt", "images.pt"))
    fine, methods = fine[:10].view(10, 4, 4), ("kmeans", "random")
    artifacts, pictures, labels = zip(*(run(f"--method {m}", True) for m in methods))
    maps = [artifact["code_to_cluster"] for artifact in artifacts]
    names = "original", "reconstruction", "k-means", "random"
    assert all(name in label for name, label in zip(names, labels[0], strict=True))
    for original, reconstruction, *swapped in pictures:  # the same with both methods
        assert (original == images[:10].numpy()).all()
        assert (reconstruction[..., 0] == fine.numpy()).all()
        for own, other, row in zip(maps, maps[::-1], swapped, strict=True):
            new = torch.from_numpy(row[..., 0]).long()
            assert torch.equal(own[new], own[fine]), "swapped within other clusters"
            assert not torch.equal(other[new], other[fine])
