"""The clusters: similar codewords together, fine label q -> coarse label g(q).

The observation behind CTF (arXiv 2503.16194, figures 1a and 1b): a large codebook is
redundant. Replace every token of an image by a random one of its cluster, and the
picture survives; with clusters made at random it does not. So the cluster of a token
says nearly everything, and can be predicted first.

    python cluster.py                  # k-means, M = 128
    python cluster.py --method random  # the paper's control; use another --out, with
                                       # copies of tokenizer.pt and tokens.pt in it

Reads tokenizer.pt and tokens.pt; writes clusters.pt (code_to_cluster is g) and
clusters.png (figure 1b), in seconds.

One token all the way, with K = 6 and M = 2: code_to_cluster = [0, 1, 1, 0, 1, 0]. The
fine label 4 has the coarse label 1. Stage 1 (ar_model.py) predicts that 1; stage 2
(aux_model.py) picks one of 1, 2 and 4, given the coarse labels of the whole image.
In the run that tokenizer.py follows, token 27 of the first test image is the code 1181,
and g(1181) = 11, a cluster of 83 codes.
"""

import os

import numpy as np
import torch

from tokenizer import (
    CommandLine,
    Examples,
    Figure,
    at_least,
    fail,
    load,
    load_images,
    load_tokenizer,
    load_tokens,
    no_traceback,
    pick_device,
    reconstruct,
    save,
    save_figure,
    short_hash,
)

# --------------------------------------------------------------------------------------
# k-means


def kmeans(x, k, seed=0, init=None, max_iter=300):
    """Lloyd's algorithm: minimise the inertia, the sum of squared distances of the rows
    of x (n, d) to the centroids of their clusters.

    init: an array (k, d) of centroids to start from, which stays as it is; else
    k-means++ seeding. A step assigns each row to its nearest centroid, and then moves
    the centroids to the means of their rows. A cluster without rows first takes over
    one of a cluster that has several: after a step, none is empty. Ends when no
    assignment changes, at the latest after max_iter steps. Returns the cluster of each
    row, int64 (n,); float64 centroids (k, d); and a list of the inertia in each step,
    which never rises (but for rounding). Raises ValueError if there are fewer rows than
    clusters.
    """
    if not 1 <= k <= len(x):
        raise ValueError(f"cannot make {k} clusters of {len(x)} rows")
    x = np.asarray(x, dtype=np.float64)
    if init is None:
        init = kmeans_plus_plus(x, k, np.random.default_rng(seed))
    centroids = np.array(init, dtype=np.float64)
    previous = None
    inertia = []
    for _ in range(max_iter):
        assignment = nearest_centroids(x, centroids)
        distance = ((x - centroids[assignment]) ** 2).sum(axis=1)  # (n,)
        sizes = np.bincount(assignment, minlength=k)
        for empty in np.flatnonzero(sizes == 0):
            # It takes over the row farthest from its centroid, out of a cluster that
            # has others: the inertia falls.
            row = np.where(sizes[assignment] > 1, distance, -1).argmax()
            sizes[assignment[row]] -= 1
            sizes[empty] = 1
            assignment[row] = empty
        centroids = cluster_means(x, assignment, sizes)
        inertia.append(((x - centroids[assignment]) ** 2).sum())
        if previous is not None and (assignment == previous).all():
            break
        previous = assignment
    return assignment, centroids, inertia


def kmeans_plus_plus(x, k, rng):
    """k rows of x (n, d) that lie far apart, to start from: an array (k, d).

    The first is any row, all alike likely. Each of the others is drawn with a
    probability proportional to its squared distance to the nearest one drawn before
    (Arthur and Vassilvitskii 2007); if all these distances are 0, any row will do.
    rng: the numpy Generator that draws.
    """
    chosen = [rng.integers(len(x))]
    distance = np.full(len(x), np.inf)  # (n,) squared, to the nearest chosen row
    for _ in range(k - 1):
        distance = np.minimum(distance, ((x - x[chosen[-1]]) ** 2).sum(axis=1))
        # Row i is drawn if a random point of [0, total) falls into its part of it, as
        # long as distance[i]. (rng.choice does the same, more slowly.)
        ends = distance.cumsum()
        row = np.searchsorted(ends, rng.random() * ends[-1], side="right")
        chosen.append(min(row, len(x) - 1))  # all distances 0: any row will do
    return x[chosen]


def nearest_centroids(x, centroids):
    """The index int64 (n,) of the centroid (k, d) nearest to each row of x (n, d).

    It is (c**2).sum(axis=1) - 2 * x @ c.T, of which each row's argmin is taken, since
    |x - c|^2 = |x|^2 - 2 x.c + |c|^2 and the first term is the same for all c. Below
    are the same numbers, 3 times faster.
    """
    centre = x.mean(axis=0)  # float32 is exact enough near the origin only
    x, centroids = x - centre, centroids - centre
    # A column of ones makes one matrix product of both terms; and 128 rows at a time
    # stay in the cache, and do not wake BLAS's threads, which cost more than they save.
    x1 = np.concatenate([x, np.ones((len(x), 1))], axis=1, dtype=np.float32)
    norms = (centroids**2).sum(axis=1)[None]
    c1 = np.concatenate([-2 * centroids.T, norms], dtype=np.float32)  # (d + 1, k)
    rows = (x1[i : i + 128] for i in range(0, len(x), 128))
    return np.concatenate([(part @ c1).argmin(axis=1) for part in rows])


def cluster_means(x, assignment, sizes):
    """The mean (k, d) of the rows of x (n, d) in each cluster; sizes (k,) above 0."""
    k = len(sizes)
    sums = [np.bincount(assignment, weights=column, minlength=k) for column in x.T]
    return np.stack(sums, axis=1) / sizes[:, None]


# --------------------------------------------------------------------------------------
# The map g, and its inverse


def to_coarse(examples, code_to_cluster):
    """Examples of fine labels int64 (N, T) -> the same images by their coarse labels.

    code_to_cluster int64 (K,) is the map g; coarse labels are int64; the classes stay.
    """
    return Examples(code_to_cluster[examples.x], examples.y)


def codes_of_clusters(code_to_cluster):
    """The inverse of the map g, which is integers (K,) with values 0 .. M - 1.

    Returns by_cluster int64 (K,): the codes of cluster 0 in rising order, then those of
    cluster 1, and so on; and sizes int64 (M,): how many codes there are of each.
    """
    return code_to_cluster.argsort(kind="stable"), np.bincount(code_to_cluster)


# --------------------------------------------------------------------------------------
# Figure 1b: what the clusters are worth


def swap_within_clusters(tokens, code_to_cluster, rng):
    """Replace every token by a random code of its cluster (figure 1b).

    tokens: fine labels of any shape, code_to_cluster: (K,), integers; rng: a numpy
    Generator. Returns int64 fine labels of the shape of tokens, also where these are
    int32. All codes of a cluster are equally likely, the token itself among them, and
    those that do not occur in tokens; every token is drawn for itself.
    """
    by_cluster, sizes = codes_of_clusters(code_to_cluster)
    starts = sizes.cumsum() - sizes  # where in by_cluster the codes of each one start
    coarse = code_to_cluster[tokens]
    return by_cluster[starts[coarse] + rng.integers(sizes[coarse])]


def random_clusters(code_to_cluster, rng):
    """The control: as large, but of codes with nothing in common. (K,) -> (K,)."""
    return rng.permutation(code_to_cluster)


# --------------------------------------------------------------------------------------
# The script


def load_clusters(out, codebook_id):
    """The artifact clusters.pt in the folder out; fails if of another codebook."""
    return load(out / "clusters.pt", "cluster.py", codebook_id=codebook_id)


def check_images(tokenizer, data, part, examples):
    """Fail if examples, found at data, are not those that tokenizer.py read.

    tokenizer: the artifact; part: "train", "test", or "first" for the first ten of the
    test set.
    """
    fingerprint = tokenizer["data"].get("fingerprint")
    if fingerprint is None:  # of an older version
        return
    # Glyphs have none: they are always alike, but for what another CPU rounds otherwise.
    found = None if data == "glyphs" else short_hash(*examples)
    if fingerprint.get(part) != found:
        again = "run it again, or give another --data"
        fail(f"{data} has changed since python tokenizer.py: {again}")


MOVED = "where the images are now, if they have been moved"


@no_traceback()
def main(argv=None):
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("--data", type=os.path.expanduser, help=MOVED)
    add("--clusters", type=at_least(1), default=128, help="M")
    add("--method", choices=["kmeans", "random"], default="kmeans", help="the map g")
    add("--restarts", type=at_least(1), default=3, help="runs; the best is kept")
    add("--max-iter", type=at_least(1), default=300, help="Lloyd steps at most")
    args = parser.parse_args(argv)
    model, tokenizer = load_tokenizer(args.out, pick_device(args.device))
    codebook_id, data = tokenizer["codebook_id"], tokenizer["data"]
    test_tokens, _ = load_tokens(args.out, "test", codebook_id=codebook_id)
    codebook = model.codebook.cpu().numpy()  # (K, d)
    K, M = len(codebook), args.clusters
    if M > K:
        fail(f"--clusters {M} is more than the {K} codes of {args.out}/tokenizer.pt")

    seeds = range(args.seed, args.seed + args.restarts)
    runs = [kmeans(codebook, M, seed, max_iter=args.max_iter) for seed in seeds]
    code_to_cluster, centroids, inertia = min(runs, key=lambda run: run[2][-1])
    sizes = np.bincount(code_to_cluster, minlength=M)
    print(f"{M} clusters of {sizes.min()} to {sizes.max()} codes")
    steps = f"{len(inertia)} steps, best of {args.restarts} runs"
    print(f"inertia {inertia[0]:.1f} -> {inertia[-1]:.1f} in {steps}")
    share = inertia[-1] / ((codebook - codebook.mean(axis=0)) ** 2).sum()
    print(f"{share:.1%} of the variance of the codebook is within clusters")

    rng = np.random.default_rng(args.seed)
    where = args.data or data["name"]
    shown, _ = load_images(where, "test", data["image_size"], count=10)
    check_images(tokenizer, where, "first", shown)
    fine = test_tokens.x[:10].numpy()
    plot_swaps(args.out / "clusters.png", model, shown.x, fine, code_to_cluster, rng)
    if args.method == "random":
        # The clusters keep their sizes, and get other codes.
        code_to_cluster = random_clusters(code_to_cluster, rng)
        centroids = cluster_means(codebook, code_to_cluster, sizes)
        inertia = [((codebook - centroids[code_to_cluster]) ** 2).sum()]
        print("clusters permuted over the codes: this is the control, not the method")
        print(f"inertia {inertia[0]:.1f} with these")
    code_to_cluster = torch.from_numpy(code_to_cluster)
    save(
        args.out / "clusters.pt",
        script="cluster.py",
        code_to_cluster=code_to_cluster,
        centroids=torch.from_numpy(centroids).float(),
        inertia=[float(value) for value in inertia],
        method=args.method,
        codebook_id=codebook_id,
        cluster_id=short_hash(code_to_cluster, model.codebook),
    )
    print(f"wrote clusters.pt and clusters.png to {args.out}")


# --------------------------------------------------------------------------------------
# The picture


def plot_swaps(path, model, images, fine, code_to_cluster, rng):
    """clusters.png, which is figure 1b.

    images uint8 (n, H, W, 3) and their fine labels int64 (n, T); code_to_cluster (K,)
    of k-means.
    """
    control = random_clusters(code_to_cluster, rng)
    similar = swap_within_clusters(fine, code_to_cluster, rng)
    unlike = swap_within_clusters(fine, control, rng)
    tokens = {
        "reconstruction": fine,
        "tokens swapped within\nk-means clusters": similar,
        "tokens swapped within\nrandom clusters": unlike,
    }
    rows = {"original": images}
    for name, labels in tokens.items():
        labels = torch.from_numpy(labels).to(model.codebook.device)
        rows[name] = reconstruct(model, labels).cpu()
    figure = Figure(figsize=(12, 5))
    size = f"{len(code_to_cluster)} codes, {code_to_cluster.max() + 1} clusters"
    figure.suptitle(f"every token becomes a random one of its cluster ({size})")
    grid = figure.subplots(4, len(images), squeeze=False)
    for axes, (name, row) in zip(grid, rows.items()):
        axes[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for ax, image in zip(axes, row.numpy()):
            ax.imshow(image)
            ax.set(xticks=[], yticks=[], frame_on=False)
    save_figure(path, figure)


if __name__ == "__main__":
    main()
