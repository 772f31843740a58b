"""The clusters: a map g from fine labels to coarse labels, by k-means on the codebook.

The observation behind CTF (arXiv 2503.16194, figures 1a and 1b): a large codebook is
redundant. Replace the code of every token by a random one from the same cluster, and
the image stays recognisable. With random clusters it does not. So the cluster of a
token decides most of what one sees, and can be predicted first.

    python cluster.py                                      # k-means, M = 128
    python cluster.py --out out/random --method random     # the paper's control

k-means uses Euclidean distances. For unit vectors |a - b|^2 = 2 - 2 a.b: near means a
large dot product, and the tokenizer chooses codes by the dot product, too. (A centroid,
a mean of unit vectors, lies inside the sphere, so its length counts in the distance.)

Reads images.pt, tokenizer.pt and tokens.pt; writes clusters.pt (code_to_cluster is g)
and clusters.png (figure 1b). It takes seconds.

An example with K = 6 and M = 2: code_to_cluster = [0, 1, 1, 0, 1, 0]. The fine label 4
has the coarse label 1. Stage 1 (ar_model.py) predicts the coarse label 1. Stage 2
(aux_model.py) then chooses one of the fine labels 1, 2 and 4, given the coarse labels
of the whole image. In the example image of tokenizer.py, token 27 has the fine label
1780 and the coarse label g(1780) = 38, a cluster of 99 codes.
"""

import numpy as np
import torch

# isort: off
from tokenizer import load, load_tokenizer, plot_rows, reconstruct, save, short_hash
from tokenizer import command_line, fail, number, pick_device, run

# ------------------------------------------------------------------------------ k-means


def kmeans(x, k, seed=0, init=None, max_iter=300):
    """Lloyd's algorithm: minimise the inertia, the sum of squared distances of the rows
    of x (n, d) to the centroids of their clusters.

    It starts from init (k, d), which is not modified, or from k-means++ with seed (of
    np.random.default_rng). A step assigns each row to its nearest centroid and moves
    every centroid to the mean of its rows. An empty cluster first takes the row that is
    farthest from its centroid, out of a cluster of two or more rows. The algorithm ends
    when no assignment changes, or after max_iter steps.

    Returns the cluster of each row, int64 (n,); the centroids, float64 (k, d); and a
    list of the inertia after each step, which never rises (up to rounding). Raises
    ValueError if there are fewer rows than clusters.
    """
    if not 1 <= k <= len(x):
        raise ValueError(f"cannot make {k} clusters of {len(x)} rows")
    x = np.asarray(x, dtype=np.float64)
    if init is None:
        init = kmeans_plus_plus(x, k, np.random.default_rng(seed))
    centroids = np.array(init, dtype=np.float64)
    assignment = None
    inertia = []
    for _ in range(max_iter):
        previous, assignment = assignment, nearest_centroids(x, centroids)
        squared = ((x - centroids[assignment]) ** 2).sum(axis=1)  # (n,)
        sizes = np.bincount(assignment, minlength=k)
        for empty in np.flatnonzero(sizes == 0):
            row = np.where(sizes[assignment] > 1, squared, -1).argmax()
            sizes[assignment[row]] -= 1
            sizes[empty] = 1
            assignment[row] = empty
        centroids = cluster_means(x, assignment, sizes)
        inertia.append(((x - centroids[assignment]) ** 2).sum())
        if np.array_equal(assignment, previous):
            break
    return assignment, centroids, inertia


def kmeans_plus_plus(x, k, rng):
    """k rows of x (n, d) that lie far apart, as initial centroids: an array (k, d).

    The first row is chosen uniformly at random. Each further row is chosen with
    probability proportional to its squared distance to the nearest row chosen so far
    (Arthur and Vassilvitskii 2007). If all these distances are 0, any row may be
    chosen. rng: a numpy Generator.
    """
    chosen = [rng.integers(len(x))]
    distance = np.full(len(x), np.inf)  # (n,) squared, to the nearest chosen row
    for _ in range(k - 1):
        distance = np.minimum(distance, ((x - x[chosen[-1]]) ** 2).sum(axis=1))
        total = distance.sum()
        p = distance / total if total > 0 else None  # None: uniform
        chosen.append(rng.choice(len(x), p=p))
    return x[chosen]


def nearest_centroids(x, centroids):
    """The index int64 (n,) of the centroid (k, d) nearest to each row of x (n, d).

    |x - c|^2 = |x|^2 - 2 x.c + |c|^2. |x|^2 is left out: it is the same for all c.
    """
    distances = (centroids**2).sum(axis=1) - 2 * x @ centroids.T  # (n, k)
    return distances.argmin(axis=1)


def cluster_means(x, assignment, sizes):
    """The mean (k, d) of the rows of x (n, d) in each cluster; sizes (k,) above 0."""
    k = len(sizes)
    sums = [np.bincount(assignment, weights=column, minlength=k) for column in x.T]
    return np.stack(sums, axis=1) / sizes[:, None]


# ----------------------------------------------------------------- The inverse of map g


def invert(code_to_cluster):
    """Which codes a cluster has. code_to_cluster, the map g: an array (K,) with values
    0 .. M - 1.

    Returns
    - members int64 (M, S): row m lists the fine labels in cluster m in ascending order.
      It is padded with -1 to S entries, the size of the largest cluster.
    - place int64 (K,): where each code stands in its row, so that
      members[code_to_cluster[q], place[q]] = q.
    For g = [0, 1, 1, 0, 1] (K = 5): [[0, 3, -1], [1, 2, 4]] and [0, 0, 1, 1, 2].
    """
    sizes = np.bincount(code_to_cluster)  # (M,)
    members = np.full((len(sizes), sizes.max()), -1)
    place = np.empty_like(code_to_cluster)
    for m, size in enumerate(sizes):
        codes = np.flatnonzero(code_to_cluster == m)
        members[m, :size] = codes
        place[codes] = np.arange(size)
    return members, place


# ---------------------- Figure 1b: how much of an image do its coarse labels determine?


def swap_within_clusters(fine, code_to_cluster, rng):
    """Replace every token by a random code from the same cluster (figure 1b).

    fine: a numpy array of fine labels, of any shape; code_to_cluster: a numpy array
    (K,); rng: a numpy Generator. Returns fine labels int64 of the shape of fine.
    Every token is sampled independently and uniformly from all codes of its cluster.
    These include its own code and codes that do not occur in fine.
    """
    members, _ = invert(code_to_cluster)  # (M, S)
    coarse = code_to_cluster[fine]
    size = np.bincount(code_to_cluster)[coarse]  # of the cluster of each token
    return members[coarse, rng.integers(size)]


def swapped_images(model, fine, code_to_cluster, rng):
    """Fine labels int64 (N, T) -> images uint8 (N, H, W, 3) on the CPU, decoded after
    swap_within_clusters."""
    swapped = swap_within_clusters(fine.cpu().numpy(), code_to_cluster, rng)
    return reconstruct(model, torch.from_numpy(swapped).to(fine.device)).cpu()


# --------------------------------------------------------------------------- The script


def main(argv=None):
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--clusters", type=number(int, 1), default=128, help="M")
    add("--method", choices=["kmeans", "random"], default="kmeans", help="the map g")
    what = "runs of k-means; the best is kept"
    add("--restarts", type=number(int, 1), default=3, help=what)
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    model, artifact = load_tokenizer(args.out, device)
    ids = {"codebook_id": artifact["codebook_id"]}
    tokens = load(args.out, "tokens.pt", **ids)
    images = load(args.out, "images.pt", images_id=artifact["images_id"])
    codebook = model.codebook.cpu().numpy()  # (K, d)
    K, M = len(codebook), args.clusters
    if M > K:
        fail(f"--clusters {M} is more than the {K} codes of tokenizer.pt")

    seeds = [(args.seed, restart) for restart in range(args.restarts)]
    results = [kmeans(codebook, M, seed) for seed in seeds]
    last_inertia = lambda result: result[2][-1]
    code_to_cluster, centroids, inertia = min(results, key=last_inertia)
    sizes = np.bincount(code_to_cluster)
    print(f"{M} clusters of {sizes.min()} to {sizes.max()} codes")
    steps = f"{len(inertia)} steps, best of {args.restarts} runs"
    print(f"inertia {inertia[0]:.1f} -> {inertia[-1]:.1f} in {steps}")

    rng = np.random.default_rng(args.seed)
    # The control: clusters of the same sizes with random codes.
    maps = {"k-means": code_to_cluster, "random": rng.permutation(code_to_cluster)}
    fine = tokens["test"].x[:10].to(device)
    rows = {"original": images["test"].x[:10]}
    rows["reconstruction"] = reconstruct(model, fine).cpu()
    for name, swap_map in maps.items():
        swapped = swapped_images(model, fine, swap_map, rng)
        rows[f"swapped within\n{name} clusters"] = swapped
    if args.method == "random":  # in place of what k-means has found
        code_to_cluster = maps["random"]
        centroids = cluster_means(codebook, code_to_cluster, sizes)
        inertia = [((codebook - centroids[code_to_cluster]) ** 2).sum()]
        print(f"random clusters of the same sizes: inertia {inertia[0]:.1f}")
    g = torch.from_numpy(code_to_cluster)
    save(
        args.out / "clusters.pt",
        code_to_cluster=g,
        centroids=torch.from_numpy(centroids).float(),
        inertia=[float(value) for value in inertia],
        method=args.method,
        cluster_id=short_hash(g, model.codebook),
        **ids,
    )
    title = f"every token replaced by a random code from its cluster (K = {K}, M = {M})"
    plot_rows(args.out / "clusters.png", title, rows)
    print(f"wrote clusters.pt and clusters.png to {args.out}")


if __name__ == "__main__":
    run(main)
