"""Stage 1: group similar codewords, so that each fine label q in 0..K-1 gets a coarse label c = g(q) in 0..M-1.

The observation behind CTF (arXiv 2503.16194, section 3.1, figures 1a and 1b): a large codebook is redundant. Replace
every token of an image by another one of its cluster, and the picture survives; do the same with clusters made at random,
and it does not. So the cluster of a token says nearly everything, and can be predicted first.

    python cluster.py                                # k-means, M = 128
    python cluster.py --method random --out out2     # the paper's control (copy tokenizer.pt and tokens.pt there first)

Reads tokenizer.pt and tokens.pt; writes clusters.pt (code_to_cluster is the map g) and clusters.png (figure 1b).
One token all the way, with K = 6 and M = 2: code_to_cluster = [0, 1, 1, 0, 1, 0]; the fine label 4 has the coarse label
1; stage 2 (ar_model.py) predicts that 1, and stage 3 (aux_model.py) picks one of 1, 2, 4 given it and its neighbours.
"""

import numpy as np
import torch
from matplotlib.figure import Figure

from tokenizer import (
    CommandLine,
    fail,
    load,
    load_images,
    load_tokenizer,
    number,
    save,
    save_figure,
    short_hash,
    to_uint8,
)


def nearest_centroids(x, centroids, chunk=128):
    """Index int64 (n,) of the centroid (k, d) nearest to each row of x (n, d)."""
    # |x - c|^2 = |x|^2 - 2 x.c + |c|^2, where |x|^2 does not change which is smallest, and a column of ones turns the
    # rest into one matrix product. In chunks that stay in the cache, and are too small for BLAS to start threads for: both
    # matter, waking the threads costs more than so slim a product.
    x1 = np.concatenate(
        [x, np.ones((len(x), 1))], axis=1, dtype=np.float32
    )  # (n, d + 1)
    c1 = np.concatenate(
        [-2 * centroids.T, (centroids**2).sum(1)[None]], dtype=np.float32
    )  # (d + 1, k)
    return np.concatenate(
        [(x1[i : i + chunk] @ c1).argmin(axis=1) for i in range(0, len(x), chunk)]
    )


def kmeans_plus_plus(x, k, rng):
    """k rows of x (n, d), far apart: each is drawn with probability proportional to its squared distance to the nearest
    one drawn before (Arthur and Vassilvitskii 2007)."""
    chosen = [rng.integers(len(x))]
    distance = np.full(len(x), np.inf)  # (n,) squared, to the nearest chosen row
    for _ in range(k - 1):
        distance = np.minimum(distance, ((x - x[chosen[-1]]) ** 2).sum(1))
        cumulative = distance.cumsum()
        # If every row equals a chosen one, all distances are 0 and any row will do.
        pick = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
        chosen.append(min(pick, len(x) - 1))
    return x[chosen]


def kmeans(x, k, seed=0, init=None, max_iter=300):
    """Lloyd's algorithm: minimise the inertia, the sum of squared distances of the rows of x to their centroids.

    x: float (n, d). init: centroids (k, d) to start from instead of k-means++ seeding. Stops when no label changes, at the
    latest after max_iter steps. Returns int64 labels (n,), float64 centroids (k, d), and the inertia of each step, a list
    that never rises. Raises ValueError if there are fewer rows than clusters.
    """
    if not 1 <= k <= len(x):
        raise ValueError(f"cannot make {k} clusters of {len(x)} rows")
    x = np.asarray(x, dtype=np.float64)
    centroids = (
        kmeans_plus_plus(x, k, np.random.default_rng(seed))
        if init is None
        else np.array(init, np.float64)
    )
    labels, inertia = None, []
    for _ in range(max_iter):
        previous, labels = labels, nearest_centroids(x, centroids)
        distance = ((x - centroids[labels]) ** 2).sum(1)  # (n,)
        sizes = np.bincount(labels, minlength=k)
        # An empty cluster takes over the row farthest from its centroid, which can only lower the inertia.
        for empty in np.flatnonzero(sizes == 0):
            donors = np.where(sizes[labels] > 1, distance, -1)
            farthest = donors.argmax()
            sizes[labels[farthest]] -= 1
            labels[farthest], sizes[empty], distance[farthest] = empty, 1, 0
        inertia.append(distance.sum())
        if previous is not None and (labels == previous).all():
            break
        sums = np.stack(
            [np.bincount(labels, weights=column, minlength=k) for column in x.T], axis=1
        )  # (k, d)
        centroids = sums / sizes[:, None]
    return labels, centroids, inertia


def swap_within_clusters(tokens, code_to_cluster, rng):
    """Replace every token by a random code of its cluster (figure 1b).

    tokens: int fine labels of any shape. code_to_cluster: int (K,). rng: a numpy Generator. Returns int64 fine labels of the
    shape of tokens. Each code of the cluster is equally likely, the token itself among them.
    """
    tokens, code_to_cluster = np.asarray(tokens), np.asarray(code_to_cluster)
    by_cluster = code_to_cluster.argsort(
        kind="stable"
    )  # all codes of cluster 0, then all of cluster 1, ...
    sizes = np.bincount(code_to_cluster)
    starts = sizes.cumsum() - sizes
    coarse = code_to_cluster[tokens]
    return by_cluster[starts[coarse] + rng.integers(sizes[coarse])]


def random_clusters(code_to_cluster, rng):
    """The control: clusters of the same sizes, but of codes that have nothing in common. int (K,) -> int (K,)."""
    return rng.permutation(code_to_cluster)


@torch.no_grad()
def plot_swaps(path, model, images, fine, kmeans_labels, rng):
    """clusters.png, the paper's figure 1b: images uint8 (n, H, W, 3) and fine labels (n, T) of some unseen images."""
    swaps = [
        swap_within_clusters(fine, g, rng)
        for g in (kmeans_labels, random_clusters(kmeans_labels, rng))
    ]
    rows = [images] + [
        to_uint8(model.decode(model.codes(torch.as_tensor(f)))) for f in (fine, *swaps)
    ]
    names = [
        "original",
        "reconstruction",
        "tokens swapped within\nk-means clusters",
        "tokens swapped within\nrandom clusters",
    ]
    figure = Figure(figsize=(12, 5.2))
    figure.suptitle(
        f"{len(kmeans_labels)} codes in {kmeans_labels.max() + 1} clusters: "
        "what stays of an image when every token becomes another one of its cluster"
    )
    for axes_row, name, row in zip(figure.subplots(4, len(images)), names, rows):
        for axes, image in zip(axes_row, row):
            axes.imshow(image)
            axes.set(xticks=[], yticks=[], frame_on=False)
        axes_row[0].set_ylabel(name, rotation=0, ha="right", va="center")
    save_figure(figure, path)


def main(argv=None):
    parser = CommandLine(__doc__)
    parser.add_argument("--clusters", type=number(int, 1), default=128, help="M")
    parser.add_argument("--method", choices=["kmeans", "random"], default="kmeans")
    parser.add_argument(
        "--restarts",
        type=number(int, 1),
        default=3,
        help="k-means runs, of which the best is kept",
    )
    parser.add_argument(
        "--max-iter", type=number(int, 1), default=300, help="Lloyd steps at most"
    )
    args = parser.parse_args(argv)
    model, tokenizer = load_tokenizer(args.out, "cpu")
    tokens = load(
        args.out / "tokens.pt", "tokenizer.py", codebook_id=tokenizer["codebook_id"]
    )
    codebook = model.codebook.numpy()  # (K, d)
    if args.clusters > len(codebook):
        fail(
            f"--clusters {args.clusters} is more than the {len(codebook)} codes of {args.out / 'tokenizer.pt'}"
        )

    runs = [
        kmeans(codebook, args.clusters, args.seed + i, max_iter=args.max_iter)
        for i in range(args.restarts)
    ]
    labels, centroids, inertia = min(runs, key=lambda run: run[2][-1])
    sizes = np.bincount(labels, minlength=args.clusters)
    print(
        f"{len(codebook)} codes in {args.clusters} clusters of {sizes.min()} to {sizes.max()} codes, median "
        f"{np.median(sizes):.0f}; inertia {inertia[0]:.1f} -> {inertia[-1]:.1f} in {len(inertia)} steps, best of "
        f"{args.restarts}: {inertia[-1] / ((codebook - codebook.mean(0)) ** 2).sum():.1%} of the codebook's variance"
    )

    data = tokenizer["data"]
    images, _, _ = load_images(data["name"], "test", data["image_size"])
    rng = np.random.default_rng(args.seed)
    plot_swaps(
        args.out / "clusters.png",
        model,
        images[:10],
        tokens["test_fine"][:10].long(),
        labels,
        rng,
    )
    if args.method == "random":
        labels = random_clusters(labels, rng)
        sums = np.stack(
            [
                np.bincount(labels, weights=column, minlength=args.clusters)
                for column in codebook.T
            ],
            axis=1,
        )
        centroids = sums / sizes[:, None]
        print(
            "labels permuted at random over the codes: this is the control, not the method"
        )
    code_to_cluster = torch.from_numpy(labels)
    save(
        {
            "script": "cluster.py",
            "code_to_cluster": code_to_cluster,
            "centroids": torch.from_numpy(centroids).float(),
            "inertia": [float(value) for value in inertia],
            "method": args.method,
            "codebook_id": tokenizer["codebook_id"],
            "cluster_id": short_hash(code_to_cluster, model.codebook),
        },
        args.out / "clusters.pt",
    )
    print(f"wrote clusters.pt and clusters.png to {args.out}")


if __name__ == "__main__":
    main()
