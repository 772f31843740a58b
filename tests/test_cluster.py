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
from tokenizer import Examples


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(400, 3))


def test_nearest_centroids_against_all_distances(x):
    centroids = x[:30] + 0.1
    distances = cdist(x, centroids)
    assert (cluster.nearest_centroids(x, centroids) == distances.argmin(axis=1)).all()


@pytest.fixture
def any_rows(monkeypatch):
    """In place of k-means++, which has tests of its own: any rows to start from."""

    def rows(x, k, rng):
        return x[rng.permutation(len(x))[:k]]

    monkeypatch.setattr(cluster, "kmeans_plus_plus", rows)


def test_kmeans_against_scipy(x):
    init = x[:12]
    kept = init.copy()
    assignment, centroids, inertia = kmeans(x, 12, init=init, max_iter=8)
    assert (init == kept).all(), "the caller's init was overwritten"
    wanted, wanted_assignment = kmeans2(x, kept, iter=8, minit="matrix")
    message = "after 8 steps: is a step the assignment, and then the means?"
    np.testing.assert_allclose(centroids, wanted, atol=1e-5, err_msg=message)
    assert centroids.dtype == np.float64, "float32 loses digits of the means"
    assert (assignment == wanted_assignment).all() and len(inertia) == 8


def test_kmeans_ends_at_a_fixed_point(x, any_rows):
    assignment, centroids, inertia = kmeans(x, 12, seed=1)
    distances = cdist(x, centroids)
    nearest = distances.argmin(axis=1)
    assert (assignment == nearest).all(), "it stopped before nothing changed"
    for m in range(12):
        mean = x[assignment == m].mean(axis=0)
        np.testing.assert_allclose(centroids[m], mean, err_msg="not the mean")
    # Measured before or after the last move of the centroids, the last step or the one
    # before it: all are near.
    least = (distances.min(axis=1) ** 2).sum()
    assert inertia[-1] == pytest.approx(least, rel=0.02)
    assert 2 < len(inertia) < 300, "it must stop when no assignment changes"


def test_inertia_never_rises_and_no_cluster_stays_empty(x, any_rows):
    doubled = np.repeat(x[:5], 8, axis=0)  # 40 centroids, of which 35 start empty
    assignment, _, inertia = kmeans(x, 40, init=doubled)
    assert np.bincount(assignment, minlength=40).min() > 0
    assert (np.diff(inertia) <= 1e-9).all()
    for seed in range(5):
        assert (np.diff(kmeans(x, 25, seed=seed)[2]) <= 1e-9).all()
    far = kmeans(x + 1000, 25, seed=0)[2]  # float32 would lose its digits there
    assert (np.diff(far) <= 1e-6).all() and len(far) < 300


def test_an_empty_cluster_takes_over_a_row():
    x = np.array([[0.0], [1.0], [10.0], [2.0]])
    init = np.array([[0.0], [0.0]])
    assignment, centroids, _ = kmeans(x, 2, init=init, max_iter=1)
    assert np.bincount(assignment, minlength=2).min() > 0, "a cluster stayed empty"
    for m in range(2):
        assert centroids[m] == pytest.approx(x[assignment == m].mean(axis=0))


def test_as_many_clusters_as_rows_leave_no_inertia(x, any_rows):
    assignment, _, inertia = kmeans(x[:50], 50)
    assert sorted(assignment) == list(range(50))
    assert inertia[-1] == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError):
        kmeans(x[:50], 51)


def test_kmeans_starts_at_the_rows_that_seeding_draws_with_its_seed(x, monkeypatch):
    drawn = []

    def seeding(x, k, rng):
        drawn.append(rng.random())
        return x[:k]

    monkeypatch.setattr(cluster, "kmeans_plus_plus", seeding)
    for seed in (1, 1, 2):
        assignment, centroids, _ = kmeans(x[:40].astype(np.float32), 4, seed=seed)
    assert len(drawn) == 3, "without init it starts at the rows of kmeans_plus_plus"
    assert drawn[0] == drawn[1] != drawn[2], "seed, and nothing else, decides the draw"
    assert centroids.dtype == np.float64 and assignment.dtype == np.int64


def test_kmeans_of_equal_rows_still_fills_every_cluster():
    assignment, _, inertia = kmeans(np.ones((10, 2)), 3)
    assert set(assignment) == {0, 1, 2} and inertia[-1] == 0


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
    assert counts[0] == 0, "a row was drawn twice, at distance 0"
    total = counts.sum()
    assert chisquare(counts[1:], [total * 1 / 10, total * 9 / 10]).pvalue > 1e-3


def test_seeding_takes_every_distinct_row_before_any_twice():
    x = np.repeat(np.arange(6.0), 50)[:, None]
    seeds = cluster.kmeans_plus_plus(x, 6, np.random.default_rng(0))
    assert sorted(seeds[:, 0]) == [0, 1, 2, 3, 4, 5]
    seeds = cluster.kmeans_plus_plus(np.ones((9, 2)), 3, np.random.default_rng(0))
    assert seeds.tolist() == [[1, 1]] * 3, "all distances 0: any row will do"


def test_the_first_row_of_seeding_is_any_row():
    x, rng = np.arange(5.0)[:, None], np.random.default_rng(0)
    first = [int(cluster.kmeans_plus_plus(x, 2, rng)[0, 0]) for _ in range(1000)]
    counts = np.bincount(first, minlength=5)
    assert chisquare(counts).pvalue > 1e-3, f"first rows, of 200 each: {counts}"


def test_seeding_draws_rows_of_x_by_rng_alone(x):
    seeds = [
        cluster.kmeans_plus_plus(x, 5, np.random.default_rng(seed))
        for seed in (0, 0, 1)
    ]
    assert (seeds[0] == seeds[1]).all(), "the same rng must draw the same rows"
    assert (seeds[0] != seeds[2]).any(), "rng must draw"
    assert seeds[0].dtype == x.dtype, "rows of x, as they are"


def test_coarse_labels_of_examples_and_back():
    g = torch.tensor([0, 1, 1, 0, 1, 2])
    fine = torch.tensor([[5, 4, 0], [1, 3, 2]])
    coarse = cluster.to_coarse(Examples(fine, torch.tensor([7, 8])), g)
    assert coarse.x.tolist() == [[2, 1, 0], [1, 0, 1]], "not the clusters of the codes"
    assert coarse.y.tolist() == [7, 8], "the classes stay as they are"
    by_cluster, sizes = cluster.codes_of_clusters(g.numpy())
    assert by_cluster.tolist() == [0, 3, 1, 2, 4, 5], "codes of 0, then of 1, then of 2"
    assert sizes.tolist() == [2, 3, 1]
    # Of many codes, among which an unstable sort would mix those of a cluster.
    g = torch.from_numpy(np.random.default_rng(0).integers(5, size=200))
    fine = torch.arange(200).view(20, 10)
    kept = fine.clone()
    coarse = cluster.to_coarse(Examples(fine, torch.arange(20)), g)
    assert torch.equal(fine, kept), "the fine labels were overwritten"
    assert coarse.x.dtype == torch.int64, "cross-entropy wants int64"
    by_cluster, sizes = cluster.codes_of_clusters(g.numpy())
    wanted = sorted(range(200), key=lambda code: (g[code].item(), code))
    assert by_cluster.tolist() == wanted, "in each cluster in rising order"
    for codes in (by_cluster, sizes):
        assert np.asarray(codes).dtype == np.int64


def test_swaps_stay_in_their_cluster_and_reach_all_of_it(monkeypatch):
    g = np.array([0, 1, 1, 0, 1, 2])
    inverse = np.array([0, 3, 1, 2, 4, 5]), np.array([2, 3, 1])
    monkeypatch.setattr(cluster, "codes_of_clusters", lambda code_to_cluster: inverse)
    tokens = np.random.default_rng(1).integers(6, size=(3000, 4))
    swapped = swap_within_clusters(tokens, g, np.random.default_rng(2))
    assert swapped.shape == tokens.shape
    assert (g[swapped] == g[tokens]).all(), "a token left its cluster"
    for code in range(6):
        members = np.flatnonzero(g == g[code])
        counts = np.bincount(swapped[tokens == code], minlength=6)[members]
        assert chisquare(counts).pvalue > 1e-3 if len(members) > 1 else counts[0] > 0
    again = swap_within_clusters(tokens, g, np.random.default_rng(2))
    other = swap_within_clusters(tokens, g, np.random.default_rng(3))
    assert (swapped == again).all() and (swapped != other).any(), "rng must decide"
    # Codes that do not occur are drawn as well, and int32 becomes int64.
    ones = np.ones((50, 8), dtype=np.int32)
    swapped = swap_within_clusters(ones, g, np.random.default_rng(0))
    assert set(swapped.flatten().tolist()) == {1, 2, 4}, "not all codes of the cluster"
    assert swapped.dtype == np.int64
    for some in (tokens[:, 0], tokens.reshape(-1, 2, 2)):  # tokens of any shape
        swapped = swap_within_clusters(some, g, np.random.default_rng(0))
        assert swapped.shape == some.shape


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
    init = np.array([[0.0], [60.0], [-900.0]])
    assignment, centroids, _ = kmeans(x, 3, init=init, max_iter=1)
    assert sorted(assignment) == [0, 1, 2], "a row was taken from a cluster of one"
    assert sorted(centroids[:, 0]) == [0, 1, 100]


def test_the_centroids_of_the_control_are_the_means_of_its_clusters(out):
    cluster.main(["--out", str(out), "--clusters", "5", "--method", "random"])
    artifact = cluster.load_clusters(out, IDS["codebook_id"])
    codebook = tokenizer.load_tokenizer(out, torch.device("cpu"))[0].codebook
    means = artifact["centroids"][artifact["code_to_cluster"]]
    wanted = (codebook - means).square().sum().item()
    assert artifact["inertia"] == [pytest.approx(wanted, rel=1e-5)]
