import numpy as np
import pytest
import torch
from conftest import IDS, K, M, spy
from scipy.cluster.vq import kmeans2
from scipy.spatial.distance import cdist
from scipy.stats import chisquare

import cluster
import tokenizer
from cluster import kmeans, kmeans_plus_plus, swap_within_clusters
from tokenizer import Examples, load_examples


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(400, 3))


@pytest.fixture
def any_rows(monkeypatch):
    """In place of k-means++, which has tests of its own: any rows to start from."""

    def rows(x, k, rng):
        return x[rng.permutation(len(x))[:k]]

    monkeypatch.setattr(cluster, "kmeans_plus_plus", rows)


def test_the_nearest_centroid_has_the_smallest_distance(x):
    nearest = cluster.nearest_centroids(x, x[:30] + 0.1)
    assert (nearest == cdist(x, x[:30] + 0.1).argmin(axis=1)).all()


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
    assert (assignment == nearest).all(), "it must go on until no assignment changes"
    for m in range(12):
        mean = x[assignment == m].mean(axis=0)
        np.testing.assert_allclose(centroids[m], mean, err_msg="not the mean")
    least = (distances.min(axis=1) ** 2).sum()  # measured before or after the last step
    assert inertia[-1] == pytest.approx(least, rel=0.02)
    assert 2 < len(inertia) < 300, "it must end when no assignment changes"


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
    equal = np.ones((10, 2))
    assert set(kmeans(equal, 3, init=equal[:3])[0]) == {0, 1, 2}, "if all are equal"


def test_an_empty_cluster_does_not_rob_one_of_a_single_row():
    # The farthest row is alone in its cluster, so another row must move.
    x = np.array([[0.0], [1.0], [100.0]])
    init = np.array([[0.0], [60.0], [-900.0]])
    assignment, centroids, _ = kmeans(x, 3, init=init, max_iter=1)
    assert sorted(assignment) == [0, 1, 2], "a row was taken from a cluster of one"
    assert sorted(centroids[:, 0]) == [0, 1, 100]


def test_as_many_clusters_as_rows_leave_no_inertia(x, any_rows):
    assignment, _, inertia = kmeans(x[:50], 50)
    assert sorted(assignment) == list(range(50))
    assert inertia[-1] == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="cannot make 51 clusters of 50 rows"):
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
    assert drawn[0] == drawn[1] != drawn[2], "the seed alone must decide the rows"
    assert centroids.dtype == np.float64 and assignment.dtype == np.int64


def test_seeding_draws_in_proportion_to_the_squared_distance():
    x, rng = np.array([[0.0], [1.0], [3.0]]), np.random.default_rng(0)
    pairs = [kmeans_plus_plus(x, 2, rng)[:, 0] for _ in range(4000)]
    second = np.array([second for first, second in pairs if first == 0])
    assert (second != 0).all(), "a row was chosen twice, at distance 0"
    counts = np.array([(second == 1).sum(), (second == 3).sum()])
    assert chisquare(counts, counts.sum() * np.array([0.1, 0.9])).pvalue > 1e-3


def test_seeding_takes_every_distinct_row_before_any_twice():
    x = np.repeat(np.arange(6.0), 50)[:, None]
    rows = kmeans_plus_plus(x, 6, np.random.default_rng(0))
    assert sorted(rows[:, 0]) == [0, 1, 2, 3, 4, 5]
    rows = kmeans_plus_plus(np.ones((9, 2)), 3, np.random.default_rng(0))
    assert rows.tolist() == [[1, 1]] * 3, "if all distances are 0, take any row"


def test_the_first_row_of_seeding_is_any_row():
    x, rng = np.arange(5.0)[:, None], np.random.default_rng(0)
    first = [int(kmeans_plus_plus(x, 2, rng)[0, 0]) for _ in range(1000)]
    counts = np.bincount(first, minlength=5)
    assert chisquare(counts).pvalue > 1e-3, f"first rows, not 200 each: {counts}"


def test_seeding_draws_rows_of_x_by_rng_alone(x):
    one, same, other = (
        kmeans_plus_plus(x, 5, np.random.default_rng(seed)) for seed in (0, 0, 1)
    )
    assert (one == same).all(), "the same rng must choose the same rows"
    assert (one != other).any(), "rng must choose the rows"
    assert (cdist(one, x).min(axis=1) == 0).all() and one.dtype == x.dtype


def test_coarse_labels_of_examples_and_back():
    g = torch.from_numpy(np.random.default_rng(0).integers(5, size=200))
    fine = torch.randint(200, (20, 10))
    kept = fine.clone()
    coarse = cluster.to_coarse(Examples(fine, torch.arange(20)), g)
    wanted = [[g[code].item() for code in row] for row in kept]
    assert coarse.x.tolist() == wanted, "not the clusters of the codes"
    assert coarse.y.tolist() == list(range(20)), "the classes must stay the same"
    assert torch.equal(fine, kept), "the fine labels were overwritten"
    assert coarse.x.dtype == torch.int64, "cross-entropy needs int64"
    by_cluster, sizes = (np.asarray(a) for a in cluster.labels_by_cluster(g.numpy()))
    wanted = sorted(range(200), key=lambda code: (g[code].item(), code))
    assert by_cluster.tolist() == wanted, "codes of 0, then of 1, ..., each ascending"
    assert sizes.tolist() == [(g == m).sum().item() for m in range(5)]
    assert by_cluster.dtype == sizes.dtype == np.int64


def test_swaps_stay_in_their_cluster_and_reach_all_of_it(monkeypatch):
    g = np.array([0, 1, 1, 0, 1, 2])
    inverse = np.array([0, 3, 1, 2, 4, 5]), np.array([2, 3, 1])
    monkeypatch.setattr(cluster, "labels_by_cluster", lambda code_to_cluster: inverse)

    def swap(tokens, seed):
        return swap_within_clusters(tokens, g, np.random.default_rng(seed))

    tokens = np.random.default_rng(1).integers(6, size=(3000, 4))
    swapped = swap(tokens, 2)
    assert (g[swapped] == g[tokens]).all(), "a token left its cluster"
    for code in range(6):
        members = np.flatnonzero(g == g[code])
        counts = np.bincount(swapped[tokens == code], minlength=6)[members]
        assert chisquare(counts).pvalue > 1e-3 if len(members) > 1 else counts[0] > 0
    assert (swapped == swap(tokens, 2)).all(), "the same rng must choose the same codes"
    assert (swapped != swap(tokens, 3)).any(), "rng must choose the codes"
    swapped = swap(np.ones((50, 8), dtype=np.int32), 0)
    assert set(swapped.flatten().tolist()) == {1, 2, 4}, "not all codes of the cluster"
    assert swapped.dtype == np.int64
    for some in (tokens, tokens[:, 0], tokens.reshape(-1, 2, 2)):
        assert swap(some, 0).shape == some.shape, "tokens may be of any shape"


def test_random_clusters_have_the_same_sizes():
    g = np.repeat(np.arange(8), [1, 2, 3, 4, 5, 6, 7, 8])
    control = cluster.random_clusters(g, np.random.default_rng(0))
    assert (np.bincount(control) == np.bincount(g)).all()
    assert (control == g).mean() < 0.5


@pytest.mark.parametrize("method", ["kmeans", "random"])
def test_the_best_run_is_kept_or_shuffled(out, monkeypatch, method):
    runs, shown = (spy(monkeypatch, cluster, n) for n in ("kmeans", "swapped_images"))
    drawn = spy(monkeypatch, cluster, "plot_swaps")
    flags = f"--clusters 5 --seed 6 --restarts 3 --method {method} --out".split()
    cluster.main([*flags, str(out)])
    artifact = tokenizer.load(out, "clusters.pt", codebook_id=IDS["codebook_id"])
    codebook = tokenizer.load(out, "tokenizer.pt")["model"]["codebook"]
    assert [(call["k"], call["seed"]) for call in runs] == [(5, 6), (5, 7), (5, 8)]
    assert all((call["x"] == codebook.numpy()).all() for call in runs)
    each = [kmeans(codebook.numpy(), 5, seed) for seed in (6, 7, 8)]
    best, _, inertia = min(each, key=lambda one: one[2][-1])
    assert inertia[-1] < each[0][2][-1], "the first is the best: choose another --seed"
    g = artifact["code_to_cluster"]
    assert (g.numpy() == best).all() == (method == "kmeans")
    assert (g.bincount() == torch.from_numpy(np.bincount(best))).all()
    means = torch.stack([codebook[g == m].mean(dim=0) for m in range(5)])
    torch.testing.assert_close(artifact["centroids"], means)
    wanted = (codebook - means[g]).square().sum().item()
    assert artifact["inertia"][-1] == pytest.approx(wanted, rel=1e-5)
    assert len(artifact["inertia"]) == (len(inertia) if method == "kmeans" else 1)
    assert artifact["method"] == method
    assert artifact["cluster_id"] == tokenizer.short_hash(g, codebook)
    # The picture shows k-means clusters in either case.
    images, tokens = (load_examples(out, f"{n}.pt")[1] for n in ("images", "tokens"))
    for call in shown:
        assert torch.equal(call["fine"], tokens.x[:10])
        assert torch.equal(call["model"].codebook, codebook)
    maps = [call["code_to_cluster"] for call in shown]
    assert (maps[0] == best).all() and (maps[1] != best).any() and len(maps) == 2
    assert (np.bincount(maps[1]) == np.bincount(best)).all()
    rows = drawn[0]["rows"]
    assert torch.equal(rows["original"], images.x[:10])
    model, _ = tokenizer.load_tokenizer(out, torch.device("cpu"))
    again = tokenizer.reconstruct(model, tokens.x[:10])
    assert torch.equal(rows["reconstruction"], again)
    assert "k-means" in list(rows)[2] and "random" in list(rows)[3]


def test_swapped_images_are_decoded_from_swapped_tokens(monkeypatch):
    # Tokens in place of the images that they stand for.
    monkeypatch.setattr(cluster, "reconstruct", lambda model, fine: fine)
    fine, g = torch.arange(K).repeat(3, 9), np.arange(K) % M
    swapped = cluster.swapped_images(None, fine, g, np.random.default_rng(0))
    assert (g[swapped] == g[fine]).all() and (swapped != fine).any()
