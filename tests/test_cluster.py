import numpy as np
import pytest
import torch
from scipy.cluster.vq import kmeans2
from scipy.spatial.distance import cdist
from scipy.stats import chisquare

import cluster
import tokenizer
from cluster import kmeans, swap_within_clusters
from tests.conftest import IDS, K, spy


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(400, 3))


def test_nearest_centroids_against_all_distances(x):
    centroids = x[:30] + 0.1
    distances = cdist(x, centroids)
    assert (cluster.nearest_centroids(x, centroids) == distances.argmin(axis=1)).all()


def test_kmeans_against_scipy(x):
    init = x[:12]
    labels, centroids, inertia = kmeans(x, 12, init=init, max_iter=8)
    wanted, wanted_labels = kmeans2(x, init, iter=8, minit="matrix")
    np.testing.assert_allclose(centroids, wanted, atol=1e-5)
    assert (labels == wanted_labels).all() and len(inertia) == 8


def test_kmeans_ends_at_a_fixed_point(x):
    labels, centroids, inertia = kmeans(x, 12, seed=1)
    distances = cdist(x, centroids)
    assert (labels == distances.argmin(axis=1)).all()
    for m in range(12):
        np.testing.assert_allclose(centroids[m], x[labels == m].mean(axis=0))
    assert inertia[-1] == pytest.approx((distances.min(axis=1) ** 2).sum())
    assert 2 < len(inertia) < 300 and inertia[-1] == inertia[-2]  # it stops by itself


def test_inertia_never_rises_and_no_cluster_stays_empty(x):
    doubled = np.repeat(x[:5], 8, axis=0)  # 40 centroids, of which 35 start empty
    labels, _, inertia = kmeans(x, 40, init=doubled)
    assert np.bincount(labels, minlength=40).min() > 0
    assert (np.diff(inertia) <= 1e-9).all()
    for seed in range(5):
        assert (np.diff(kmeans(x, 25, seed=seed)[2]) <= 1e-9).all()
    far = kmeans(x + 1000, 25, seed=0)[2]  # float32 would lose its digits there
    assert (np.diff(far) <= 1e-6).all() and len(far) < 300


def test_an_empty_cluster_takes_over_the_farthest_row():
    x = np.array([[0.0], [1.0], [10.0], [2.0]])
    labels, centroids, _ = kmeans(x, 2, init=[[0.0], [0.0]], max_iter=1)
    assert labels.tolist() == [0, 0, 1, 0]
    assert centroids.tolist() == [[1.0], [10.0]]


def test_as_many_clusters_as_rows_leave_no_inertia(x):
    labels, _, inertia = kmeans(x[:50], 50)
    assert sorted(labels) == list(range(50)) and inertia[-1] == 0
    with pytest.raises(ValueError, match="51 clusters of 50 rows"):
        kmeans(x[:50], 51)


def test_kmeans_of_equal_rows_still_fills_every_cluster():
    labels, _, inertia = kmeans(np.ones((10, 2)), 3)
    assert set(labels) == {0, 1, 2} and inertia[-1] == 0


def test_kmeans_depends_on_the_seed_alone(x):
    assert (kmeans(x, 20, seed=5)[0] == kmeans(x, 20, seed=5)[0]).all()
    assert (kmeans(x, 20, seed=5)[0] != kmeans(x, 20, seed=6)[0]).any()


def test_seeding_draws_in_proportion_to_the_squared_distance():
    x = np.array([[0.0], [1.0], [3.0]])
    counts = np.zeros(3)
    rng = np.random.default_rng(0)
    for _ in range(4000):
        first, second = cluster.kmeans_plus_plus(x, 2, rng)[:, 0]
        if first == 0:
            counts[[0, 1, 3].index(second) if second != 3 else 2] += 1
    assert counts[0] == 0  # distance 0
    total = counts.sum()
    assert chisquare(counts[1:], [total * 1 / 10, total * 9 / 10]).pvalue > 1e-3


def test_seeding_takes_every_distinct_row_before_any_twice():
    x = np.repeat(np.arange(6.0), 50)[:, None]
    seeds = cluster.kmeans_plus_plus(x, 6, np.random.default_rng(0))
    assert sorted(seeds[:, 0]) == [0, 1, 2, 3, 4, 5]


def test_swaps_stay_in_their_cluster_and_reach_all_of_it():
    g = np.array([0, 1, 1, 0, 1, 2])
    tokens = np.random.default_rng(1).integers(6, size=(3000, 4))
    swapped = swap_within_clusters(tokens, g, np.random.default_rng(2))
    assert swapped.shape == tokens.shape and (g[swapped] == g[tokens]).all()
    for code in range(6):
        members = np.flatnonzero(g == g[code])
        counts = np.bincount(swapped[tokens == code], minlength=6)[members]
        assert chisquare(counts).pvalue > 1e-3 if len(members) > 1 else counts[0] > 0
    again = swap_within_clusters(tokens, g, np.random.default_rng(2))
    other = swap_within_clusters(tokens, g, np.random.default_rng(3))
    assert (swapped == again).all() and (swapped != other).any()


def test_random_clusters_have_the_same_sizes():
    g = np.repeat(np.arange(8), [1, 2, 3, 4, 5, 6, 7, 8])
    control = cluster.random_clusters(g, np.random.default_rng(0))
    assert (np.bincount(control) == np.bincount(g)).all()
    assert (control == g).mean() < 0.5


@pytest.mark.parametrize("method", ["kmeans", "random"])
def test_cluster_writes_a_map_of_the_codebook(out, method):
    cluster.main(["--out", str(out), "--clusters", "5", "--method", method])
    artifact = cluster.load_clusters(out, IDS["codebook_id"])
    g = artifact["code_to_cluster"]
    assert g.shape == (K,) and sorted(g.unique()) == [0, 1, 2, 3, 4]
    codebook = tokenizer.load_tokenizer(out, torch.device("cpu"))[0].codebook
    for m in range(5):
        mean = codebook[g == m].mean(dim=0)
        torch.testing.assert_close(artifact["centroids"][m], mean)
    nearest = torch.cdist(codebook, artifact["centroids"]).argmin(dim=1)
    assert (nearest == g).all() == (method == "kmeans")
    assert (out / "clusters.png").exists()


def test_the_best_of_several_runs_is_kept(out):
    codebook = tokenizer.load_tokenizer(out, torch.device("cpu"))[0].codebook

    def inertia(seed, restarts):
        flags = f"--clusters=5 --seed={seed} --restarts={restarts}".split()
        cluster.main(["--out", str(out), *flags])
        artifact = cluster.load_clusters(out, IDS["codebook_id"])
        means = artifact["centroids"][artifact["code_to_cluster"]]
        return (codebook - means).square().sum().item()

    each = [inertia(seed, restarts=1) for seed in range(4)]
    assert len(set(each)) > 1
    assert inertia(seed=0, restarts=4) == pytest.approx(min(each))


def test_clusters_change_their_name_with_their_content(out):
    names = set()
    for clusters, method in ((5, "kmeans"), (6, "kmeans"), (5, "random")):
        cluster.main(
            ["--out", str(out), "--clusters", str(clusters), "--method", method]
        )
        names.add(cluster.load_clusters(out, IDS["codebook_id"])["cluster_id"])
    assert len(names) == 3


# ------------------------------------------------------------------ how pieces are joined


@pytest.mark.parametrize("method", ["kmeans", "random"])
def test_the_picture_shows_test_images_beside_their_own_tokens(
    out, images, monkeypatch, method
):
    runs = spy(monkeypatch, cluster, "kmeans")
    shown = spy(monkeypatch, cluster, "plot_swaps")
    flags = f"--clusters 5 --seed 7 --restarts 2 --max-iter 9 --method {method}"
    cluster.main(["--out", str(out), *flags.split()])
    codebook = tokenizer.load_tokenizer(out, torch.device("cpu"))[0].codebook.numpy()
    assert [(run["k"], run["seed"], run["max_iter"]) for run in runs] == [
        (5, 7, 9),
        (5, 8, 9),
    ]
    assert all((run["x"] == codebook).all() for run in runs)
    (call,) = shown
    test_set, _ = tokenizer.load_images(str(images), "test", 16)
    tokens, _ = tokenizer.load_tokens(out, "test")
    assert torch.equal(call["images"], test_set.x[:10])
    assert (call["fine"] == tokens.x[:10].numpy()).all()
    assert call["model"].codebook.numpy().tolist() == codebook.tolist()
    # In the picture the clusters are those of k-means, whatever is written.
    best = min((kmeans(codebook, 5, seed, max_iter=9) for seed in (7, 8)), key=last)
    assert (call["code_to_cluster"] == best[0]).all()
    written = cluster.load_clusters(out, IDS["codebook_id"])
    assert written["method"] == method
    if method == "kmeans":
        assert written["inertia"] == pytest.approx(best[2])
        assert written["code_to_cluster"].tolist() == best[0].tolist()


def last(run):
    return run[2][-1]


def test_an_empty_cluster_does_not_rob_one_of_a_single_row():
    # The farthest row is alone in its cluster: the next one has to give.
    x = np.array([[0.0], [1.0], [100.0]])
    assignment, _, inertia = kmeans(x, 3, init=[[0.0], [60.0], [-900.0]], max_iter=1)
    assert sorted(assignment) == [0, 1, 2] and inertia[-1] == 0


def test_the_centroids_of_the_control_are_the_means_of_its_clusters(out):
    cluster.main(["--out", str(out), "--clusters", "5", "--method", "random"])
    artifact = cluster.load_clusters(out, IDS["codebook_id"])
    codebook = tokenizer.load_tokenizer(out, torch.device("cpu"))[0].codebook
    means = artifact["centroids"][artifact["code_to_cluster"]]
    wanted = (codebook - means).square().sum().item()
    assert artifact["inertia"] == [pytest.approx(wanted, rel=1e-5)]
