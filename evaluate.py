"""Evaluation: judge the samples, and everything on the way to them.

Fréchet distance, Inception Score, precision and recall, class accuracy and bits per
token; and what a reader needs to weigh them: the same for real images, for
reconstructions, for the two swaps of figure 1b, and the accuracy of the judge.

    python evaluate.py                           # all files that sample.py wrote to --out
    python evaluate.py --mean-of out-1 out-2 --out out-mean    # of runs judged before
    python evaluate.py --features inception      # Inception v3, not our classifier

Reads what the other stages wrote; writes classifier.pt (the judge, trained once per
data set), metrics.json and metrics.png, and convergence.png if there are samples of
kept copies (figure 2). On two CPU cores: a minute, FD 0.37.

One image all the way: that 0, (3, 32, 32), becomes the judge's 128 features and 10 logits,
of which that of 0 is the largest: it looks like the class that was asked for. 2,000 such
rows of features have a mean (128,) and a covariance (128, 128); the Fréchet distance
compares them with those of the 5,000 test images.
"""

import json
import math
import os
from itertools import cycle
from pathlib import Path
from statistics import mean

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from scipy.special import log_softmax, logsumexp
from torch import nn
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

from ar_model import at_once, mean_loss
from aux_model import mean_fine_loss, predict_fine
from cluster import (
    MOVED,
    check_images,
    load_clusters,
    random_clusters,
    swap_within_clusters,
)
from sample import (
    FINE_SETTINGS,
    MODEL_NAMES,
    SETTINGS,
    literal,
    load_models,
    training_of,
)
from tokenizer import (
    CommandLine,
    Figure,
    at_least,
    autocast,
    fail,
    home_path,
    learning_rate,
    load,
    load_images,
    load_tokenizer,
    load_tokens,
    load_weights,
    no_traceback,
    pick_device,
    psnr,
    reason,
    reconstruct,
    replacing,
    save,
    save_figure,
    short_hash,
    to_device,
    to_float,
)

# --------------------------------------------------------------------------------------
# The metrics: pure functions of arrays, in float64


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) of Gaussians (Heusel et al. 2017).

    mu1, mu2 (F,); covariances sigma1, sigma2 (F, F), singular or not. Returns a float:
    never nan, never complex.
    """
    # The trace of a root is the sum of the roots of the eigenvalues. S1 S2 has those of
    # S1^1/2 S2 S1^1/2, which is symmetric: they stay real and positive even when S1 or
    # S2 is singular, where the matrix root of the product turns complex.
    values, vectors = np.linalg.eigh(sigma1)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T  # S1^1/2
    eigenvalues = np.linalg.eigvalsh(root @ sigma2 @ root).clip(min=0)
    spread = np.trace(sigma1) + np.trace(sigma2) - 2 * np.sqrt(eigenvalues).sum()
    return float(((mu1 - mu2) ** 2).sum() + spread)


def gaussian(features):
    """Mean (F,) and unbiased covariance (F, F) of features (N, F)."""
    return features.mean(axis=0), np.cov(features, rowvar=False)


def inception_score(logits, splits=10):
    """exp(mean_x KL(p(y|x) || p(y))) (Salimans et al. 2016), 1 up to the class count.

    logits (N, classes), of images in random or balanced order. Returns the mean and the
    standard deviation over splits, ten as in the paper's code. Fewer if N is small: a
    split of two images cannot score more than 2.
    """
    scores = []
    most = len(logits) // (2 * logits.shape[1])  # two images a class in each
    for part in np.array_split(logits, max(1, min(splits, most))):
        log_p = log_softmax(np.asarray(part, np.float64), axis=1)  # log p(y|x)
        log_marginal = logsumexp(log_p, axis=0) - np.log(len(part))  # log p(y)
        kl = (np.exp(log_p) * (log_p - log_marginal)).sum(axis=1)
        scores.append(np.exp(kl.mean()))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real, fake, k=3, device="cpu", real_radius=None):
    """Improved precision and recall (Kynkäänniemi et al. 2019).

    real (N, F) and fake (N', F), more than one row each. A point is covered by a set if
    some member of the set is no farther from it than from its own k-th neighbour in the
    set; itself is no neighbour, and if there are not k others it is the farthest.
    precision: the share of fake covered by real; recall: of real by fake. Two floats.
    real_radius: neighbour_radius(real, k, device), if known.
    """
    if real_radius is None:
        real_radius = neighbour_radius(real, k, device)
    fake_radius = neighbour_radius(fake, k, device)
    precision = covered(fake, real, real_radius, device)
    return precision, covered(real, fake, fake_radius, device)


def neighbour_radius(members, k, device):
    """The squared distance of each of members (N, F) to its k-th neighbour: (N,)."""
    # The nearest is the member itself, at 0; so the k-th neighbour is at index k.
    nearest = min(k, len(members) - 1) + 1
    blocks = squared_distances(members, members, device)
    return torch.cat([b.topk(nearest, largest=False).values[:, -1] for b in blocks])


def covered(points, members, radius, device):
    """The share, in float64, of points (N, F) within the squared radius (N',) of one of
    members.

    A point on the edge is within, also where squared_distances rounds it beyond: by
    about 1e-14 F times the largest square.
    """
    largest = max(np.abs(points).max(), np.abs(members).max())
    rounding = 1e-14 * points.shape[1] * largest**2
    blocks = squared_distances(points, members, device)
    hits = torch.cat([(block <= radius + rounding).any(dim=1) for block in blocks])
    return hits.double().mean().item()


def squared_distances(points, members, device):
    """Yields the squared distances of points (N, F) to all of members (N', F) as float64
    tables (n, N') on device, some rows after the other: all may not fit in memory."""
    centre = members.mean(axis=0)  # near the origin the products below lose least
    points = torch.as_tensor(points - centre, device=device)
    members = torch.as_tensor(members - centre, device=device)
    norms = members.square().sum(dim=1)
    for rows in points.split(max(1, 2**24 // len(members))):
        # |a - b|^2 = |a|^2 + |b|^2 - 2 a.b: one matrix product, which is what is fast.
        table = rows.square().sum(dim=1, keepdim=True) + norms - 2 * rows @ members.T
        yield table.clamp(min=0)


# --------------------------------------------------------------------------------------
# The networks that look at images


class Classifier(nn.Module):
    """The judge: (B, 3, H, W), -1..1 -> features (B, 128), logits (B, classes)."""

    def __init__(self, num_classes):
        super().__init__()
        layers = []
        for before, width in ((3, 32), (32, 64), (64, 128)):
            # Two convolutions a level, of which the first halves the size.
            for channels, stride in ((before, 2), (width, 1)):
                layers += [
                    nn.Conv2d(channels, width, 3, stride, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                ]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(128, num_classes)

    def forward(self, x):
        features = self.body(x).mean(dim=(2, 3))
        return features, self.head(features)


def train_classifier(train_set, num_classes, steps, seed, device, B=128):
    """A Classifier trained on images uint8 (N, H, W, 3) and their classes, B a step.

    Half of each batch is blurred a little, half is noisy (some are both): a judge that
    only saw crisp images would misread soft reconstructions.
    """
    torch.manual_seed(seed)
    model = to_device(Classifier(num_classes), device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    for step in tqdm(range(steps), "classifier"):
        rng = np.random.default_rng((seed, step))
        images, y = train_set.batch(rng, B).to(device)
        x = to_float(images)
        blurred, noisy = x[: B // 2], x[B // 4 : 3 * B // 4]  # some both, some neither
        noise = torch.from_numpy(rng.standard_normal(noisy.shape, np.float32))
        blurred.copy_(gaussian_blur(blurred, 3, rng.uniform(0.3, 1.0)))
        noisy += rng.uniform(0, 0.2) * noise.to(device)
        loss = F.cross_entropy(model(x)[1], y)
        if not math.isfinite(loss.item()):
            fail(f"the judge's loss is {loss.item()} at step {step}: nothing saved")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 3e-3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def get_classifier(path, train_set, num_classes, args, device):
    """The judge of these training images: read from path, or trained and kept there."""
    steps, seed = args.judge_steps, args.seed
    # 128, or what --batch-size says fits in memory; BatchNorm needs two.
    B = max(2, min(128, args.batch_size))
    settings = {"data": short_hash(*train_set), "steps": steps, "seed": seed, "B": B}
    if path.exists():
        artifact = load(path, "evaluate.py")
        if artifact["settings"] == settings:
            model = Classifier(num_classes)
            load_weights(model, artifact, path)
            return to_device(model.eval(), device)
    model = train_classifier(train_set, num_classes, steps, seed, device, B)
    save(path, script="evaluate.py", model=model.state_dict(), settings=settings)
    return model


class Inception(nn.Module):
    """torchvision's Inception v3: images (B, 3, H, W), -1..1 -> (B, 2048), (B, 1000).

    Not the weights of the TensorFlow graph that papers use: the FID is no paper's FID.
    """

    def __init__(self, weights):
        super().__init__()
        self.body = torchvision.models.inception_v3(weights=None, init_weights=False)
        try:
            if weights is None:
                default = torchvision.models.Inception_V3_Weights.IMAGENET1K_V1
                state = default.get_state_dict(check_hash=True)
            else:
                state = torch.load(weights, map_location="cpu", weights_only=True)
            self.body.load_state_dict(state)
        except Exception as error:  # noqa: BLE001  no network, no file, other weights
            fail(f"no Inception v3 ({reason(error)}): see --inception-weights")
        self.head, self.body.fc = self.body.fc, nn.Identity()

    def forward(self, x):
        size = (299, 299)  # what it was trained on, in -1..1 as well
        features = self.body(F.interpolate(x, size, mode="bilinear", antialias=True))
        return features, self.head(features)


@torch.inference_mode()
def look(network, images, device, batch_size=250):
    """Images uint8 (N, H, W, 3) -> float64 features (N, F), logits (N, classes), by
    batch_size images at a time, or fewer if they are larger than 32x32."""
    size = max(1, batch_size * 32**2 // max(32, images.shape[1]) ** 2)
    parts = [network(to_float(part.to(device))) for part in images.split(size)]
    features, logits = (torch.cat(part).cpu().double().numpy() for part in zip(*parts))
    return features, logits


# --------------------------------------------------------------------------------------
# One set of images measured


class Real:
    """What sets of N images are compared with: features (N', F) of all real images."""

    def __init__(self, features, N, device):
        self.features = features
        self.mu, self.sigma = gaussian(features)
        # Recall rises with the number of samples: as many real ones as there are of these.
        self.some = features[:N]
        # On MPS there is no float64.
        self.device = "cuda" if device.type == "cuda" else "cpu"
        # 3 is the k of precision_recall.
        self.radius = neighbour_radius(self.some, 3, self.device)


def measure(images, y, network, judge, real, device, batch_size=250):
    """All scores of one set of images uint8 (N, H, W, 3) of classes y (N,).

    network gives the features of the distance, which are compared with those of real,
    a Real, and the logits of the Inception Score; judge, a Classifier (it may be the
    same network), the class accuracy.
    """
    features, logits = look(network, images, device, batch_size)
    judged = logits
    if judge is not network:
        judged = look(judge, images, device, batch_size)[1]
    score, score_std = inception_score(logits)
    precision, recall = precision_recall(
        real.some, features, device=real.device, real_radius=real.radius
    )
    return {
        "fd": frechet_distance(real.mu, real.sigma, *gaussian(features)),
        "inception_score": score,
        "inception_score_std": score_std,
        "precision": precision,
        "recall": recall,
        "class_accuracy": class_accuracy(judged, y),
    }


def class_accuracy(logits, y):
    """The share of images whose largest of logits (N, classes) is their class y (N,)."""
    return float((logits.argmax(1) == y.numpy()).mean())


def bits_per_token(models, fine, y):
    """Bits per token of each stage of a model on real tokens: their sum is comparable.

    -log p(q) = -log p(c) - sum_i log p(q_i | c): CTF has a likelihood too.
    models holds ar, and aux if it is no baseline; fine (N, T), y (N,). Returns a list:
    of CTF the bits of the coarse labels, then those of the fine ones given the coarse;
    of the baseline its own. mean_loss and mean_fine_loss measure nats, ln 2 to the bit.
    They are those of the models as trained: guidance, temperature and top-k change what
    is drawn, and not these.
    """
    if "aux" in models:
        coarse = models["aux"].code_to_cluster[fine]
        fine_nats, _ = mean_fine_loss(models["aux"], fine, y)
        nats = [mean_loss(models["ar"], coarse, y), fine_nats]
    else:
        nats = [mean_loss(models["ar"], fine, y)]
    return [value / math.log(2) for value in nats]


# --------------------------------------------------------------------------------------
# The controls: what the samples are compared with


def swaps(vqvae, fine, clusters, seed):
    """Images uint8 (N, H, W, 3) of fine labels (N, T) swapped within clusters, those of
    the artifact clusters and random ones: {"kmeans": images, "random": images}."""
    rng = np.random.default_rng(seed)
    g = clusters["code_to_cluster"].numpy()
    maps = {"random": random_clusters(g, rng)}
    if clusters["method"] == "kmeans":
        maps["kmeans"] = g
    else:  # of cluster.py --method random
        maps["random"] = g
    images = {}
    for name, code_to_cluster in maps.items():
        swapped = swap_within_clusters(fine.cpu().numpy(), code_to_cluster, rng)
        swapped = torch.from_numpy(swapped).to(fine.device)
        images[name] = reconstruct(vqvae, swapped).cpu()
    return images


def stage2_alone(models, fine, y, seed, fine_settings):
    """Images uint8 (N, H, W, 3) of real coarse labels with fine ones of stage 2.

    What stage 2 costs when stage 1 makes no mistake. fine (N, T), y (N,); fine_settings
    as FINE_SETTINGS.
    """
    aux = models["aux"]
    generator = torch.Generator(fine.device).manual_seed(seed)
    predicted = []
    size = at_once(100, fine)
    for part, part_y in zip(fine.split(size), y.split(size)):
        coarse = aux.code_to_cluster[part]
        with autocast(part.device):  # as sample_images does
            some = predict_fine(aux, coarse, part_y, generator, **fine_settings)
        predicted.append(some)
    return reconstruct(models["vqvae"], torch.cat(predicted)).cpu()


# --------------------------------------------------------------------------------------
# The script


def sample_sets(out, device):
    """Yields (samples, models, artifacts) of each sample file in the folder out, with
    the networks that drew it. Fails in one line if their weights have changed since."""
    for path in sorted(out.glob("samples*.pt")):
        samples = load(path, "sample.py")
        models, artifacts = load_models(out, samples["weights"], device)
        if samples["training"] != training_of(artifacts):
            again = "run python sample.py again, or remove it"
            fail(f"{path} is of other weights: {again}")
        yield samples, models, artifacts


def load_real_images(where, tokenizer, tokens):
    """The training and test images and the class names. Fails in one line if they are
    not those of tokenizer (the artifact) and of the test images' tokens."""
    size = tokenizer["data"]["image_size"]
    train_set, class_names = load_images(where, "train", size)
    test_set, _ = load_images(where, "test", size)
    if not torch.equal(test_set.y, tokens.y):
        fail(f"{where} has changed since python tokenizer.py: run it again")
    check_images(tokenizer, where, "train", train_set)
    check_images(tokenizer, where, "test", test_set)
    return train_set, test_set, class_names


def how_made(samples, models, artifacts):
    """What metrics.json says of a sample file besides its scores."""
    stages = [name for name in models if name != "vqvae"]
    parameters = [p.numel() for name in stages for p in models[name].parameters()]
    return {
        "model": samples["model"],
        "step": artifacts["ar"]["step"],
        "train_seconds": sum(artifacts[name]["seconds"] for name in stages),
        "parameters": sum(parameters),
        "fine_settings": samples["fine_settings"],
        "seed": samples["seed"],
        "images_per_second": samples["images_per_second"],
        **samples["settings"],
    }


def warn_of_shares(samples, real_y, class_names):
    """Say so if the classes of samples are not as frequent as those of real images."""
    C, y = len(class_names), samples["labels"]
    share = y.bincount(minlength=C) / len(y)
    real_share = real_y.bincount(minlength=C) / len(real_y)
    difference = (share - real_share).abs()
    if difference.sum() / 2 > 0.1:  # a tenth of the images would need another class
        i = difference.argmax()
        of_samples = f"{share[i]:.0%} of the {MODEL_NAMES[samples['model']]} samples"
        print(f"warning: {of_samples} are of class {class_names[i]}, and")
        print(f"{real_share[i]:.0%} of the test images: that alone raises the distance")


def judge_all(args, device):
    """Everything that metrics.json holds."""
    vqvae, tokenizer = load_tokenizer(args.out, device)
    data, codebook_id = tokenizer["data"], tokenizer["codebook_id"]
    tokens, _ = load_tokens(args.out, "test", codebook_id=codebook_id)
    clusters = load_clusters(args.out, codebook_id)
    # Now, so that a file that does not fit ends the program before a judge is trained.
    sizes = [len(samples["images"]) for samples, _, _ in sample_sets(args.out, device)]
    if not sizes:
        fail(f"{args.out} has nothing to judge: run python sample.py first")
    where = args.data or data["name"]
    train_set, test_set, class_names = load_real_images(where, tokenizer, tokens)
    # A Fréchet distance depends on N: only equal numbers can be compared.
    N = min(*sizes, len(train_set.x), len(test_set.x))
    if N < 2:
        fail("one image has no covariance: draw more samples")

    path = args.out / "classifier.pt"
    judge = get_classifier(path, train_set, len(class_names), args, device)
    network = judge
    if args.features == "inception":
        network = Inception(args.inception_weights).eval().to(device)
    real_features, judged = look(network, test_set.x, device, args.batch_size)
    if network is not judge:
        _, judged = look(judge, test_set.x, device, args.batch_size)
    if N < real_features.shape[1]:
        print(f"warning: {N} samples, fewer than {real_features.shape[1]} features:")
        print("the covariance is singular, and the distance far too high")
    real = Real(real_features, N, device)

    void = []
    if len(class_names) == 1:
        print("warning: of one class there is nothing to tell apart, and the judge")
        print("learns nothing: no class accuracy; the rest by --features inception")
        void = ["class_accuracy"]
        if judge is network:
            void += ["fd", "precision", "recall"]
            void += ["inception_score", "inception_score_std"]

    def score(images, y):
        """The scores of the first N images, nan if void."""
        size = args.batch_size
        scores = measure(images[:N], y[:N], network, judge, real, device, size)
        for name in void:
            scores[name] = math.nan
        return scores

    accuracy = math.nan if void else class_accuracy(judged, test_set.y)
    fine, y = tokens.to(device)
    reconstructions = reconstruct(vqvae, fine).cpu()
    swapped = swaps(vqvae, fine[:N], clusters, args.seed)
    metrics = {
        "protocol": {
            "features": args.features,
            "num_samples": N,
            "num_real": len(test_set.x),
            "judge_steps": args.judge_steps,
            "seed": args.seed,
            "data": data["name"],
            "device": str(device),
            "clusters": clusters["method"],
            "codebook_id": codebook_id,
            "cluster_id": clusters["cluster_id"],
        },
        "judge": {"test_accuracy": accuracy},
        # What real images score that are not those compared with: the training images
        # (their classes the judge has seen).
        "real": score(*train_set),
        # These are made of the very images compared with: they may beat real ones.
        "reconstruction": score(reconstructions, test_set.y),
        "swap": {name: score(images, test_set.y) for name, images in swapped.items()},
        "rows": [],
    }
    metrics["reconstruction"]["psnr"] = psnr(test_set.x, reconstructions)
    bits = {}
    for samples, models, artifacts in sample_sets(args.out, device):
        files = tuple(samples["weights"])
        if files not in bits:  # of several guidance scales, once
            bits[files] = bits_per_token(models, fine, y)
            if "aux" in models:  # what stays is of the last copy, and of its first file
                how = samples["fine_settings"]
                alone = stage2_alone(models, fine[:N], y[:N], args.seed, how)
                metrics["stage2"] = score(alone, test_set.y)
        row = how_made(samples, models, artifacts)
        row |= {"bits_per_token": sum(bits[files]), "bits_per_stage": bits[files]}
        warn_of_shares(samples, test_set.y, class_names)
        images = samples["images"].permute(0, 2, 3, 1)
        metrics["rows"].append(row | score(images, samples["labels"]))
    order = list(MODEL_NAMES)
    place = lambda row: (order.index(row["model"]), row["step"], row["cfg_scale"])
    metrics["rows"].sort(key=place)
    return metrics


@no_traceback()
def main(argv=None):
    parser = CommandLine(__doc__)
    add = parser.add_argument
    of_runs = "average these runs"
    add("--mean-of", type=home_path, nargs="+", metavar="OUT", help=of_runs)
    networks = ["classifier", "inception"]
    add("--features", choices=networks, default="classifier", help="of the distance")
    offline = "inception_v3_google-0cc3c7bd.pth, when offline"
    add("--inception-weights", type=os.path.expanduser, help=offline)
    what = "images at a time; below 128, the judge trains on as many"
    add("--batch-size", type=at_least(1), default=250, help=what)
    add("--data", type=os.path.expanduser, help=MOVED)
    add("--judge-steps", type=at_least(1), default=800, help="to train the classifier")
    args = parser.parse_args(argv)
    if args.mean_of:
        if len(args.mean_of) < 2 or args.out in args.mean_of:
            parser.error("--mean-of needs two folders or more, and another --out")
        metrics = mean_of_seeds([out / "metrics.json" for out in args.mean_of])
    else:
        metrics = judge_all(args, pick_device(args.device))

    print_table(metrics)
    print(f"\n{describe(metrics['protocol'])}.")
    if metrics["protocol"]["features"] == "inception":
        print("FID: torchvision's Inception v3, not the papers' TensorFlow graph.")
    accuracy = metrics["judge"]["test_accuracy"]
    if not math.isnan(accuracy):
        print(f"The judge is right on {accuracy:.2%} of the real test images.")
    quality = metrics["reconstruction"]["psnr"]
    print(f"Reconstruction of all test images: {quality:.2f} dB.")
    with replacing(args.out / "metrics.json") as temporary:
        temporary.write_text(json.dumps(metrics, indent=1) + "\n")
    plot_metrics(args.out / "metrics.png", metrics)
    written = "metrics.json and metrics.png"
    if has_copies(metrics["rows"]):
        plot_convergence(args.out / "convergence.png", metrics)
        written += " and convergence.png"
    print(f"wrote {written} to {args.out}")


def mean_of_seeds(paths):
    """The mean of the metrics of several runs, equal in all but the training seed.

    Each row also gets "std", the sample standard deviations of its scores.
    """
    runs = []
    for path in paths:
        try:
            runs.append(json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            fail(f"{path}: {reason(error)}: run python evaluate.py --out {path.parent}")

    def protocol_of(run):
        """What must be equal in all runs."""
        of_run = "features", "num_samples", "num_real", "judge_steps", "data", "seed"
        of_row = ("model", "step", "fine_settings", *SETTINGS)
        rows = [[row[key] for key in of_row] for row in run["rows"]]
        return [run["protocol"].get(key) for key in (*of_run, "clusters")], rows

    for path, run in zip(paths, runs):
        if protocol_of(run) != protocol_of(runs[0]):
            fail(f"{path} and {paths[0]} differ in models, steps, settings or protocol")
    metrics = average(runs)
    metrics["protocol"]["training_seeds"] = len(runs)
    for i, row in enumerate(metrics["rows"]):
        same_rows = [run["rows"][i] for run in runs]
        numbers = [key for key, value in row.items() if isinstance(value, (int, float))]
        row["std"] = {}
        for key in numbers:  # (statistics.stdev refuses the nan of a void score)
            row["std"][key] = float(np.std([same[key] for same in same_rows], ddof=1))
    return metrics


def average(values):
    """The mean of equal structures of numbers; of anything else the first."""
    first = values[0]
    if isinstance(first, dict):
        return {key: average([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [average(list(same)) for same in zip(*values)]
    return mean(values) if isinstance(first, (int, float)) else first


# --------------------------------------------------------------------------------------
# The table and the pictures

MODEL_COLORS = {"ctf": "tab:orange", "baseline": "tab:blue"}
AXIS_LABELS = {
    "fd": "distance (log scale): lower is better",
    "inception_score": "Inception Score: higher is better",
    "class_accuracy": "seen as its class by the judge, %: higher is better",
    "step": "training steps (CTF: of stage 1)",
    "train_seconds": "training seconds (CTF: of both stages)",
}


def describe(protocol):
    """What all scores of a run have in common, for the title of a picture."""
    name = "FID" if protocol["features"] == "inception" else "FD"
    text = f"{protocol['num_samples']} images of each set against "
    text += f"{protocol['num_real']} real test images of {Path(protocol['data']).name} "
    text += f"({name}: features of the {protocol['features']})"
    if "training_seeds" in protocol:
        text += f"\nmean and standard deviation of {protocol['training_seeds']} runs"
    return text


def last_steps(rows):
    """Of each model the rows of the most trained weights."""
    last = {}
    for row in rows:
        last[row["model"]] = max(row["step"], last.get(row["model"], 0))
    return [row for row in rows if row["step"] == last[row["model"]]]


def has_copies(rows):
    """Whether rows are of several steps of a model: copies that --keep-every left."""
    return len(last_steps(rows)) < len(rows)


def best_rows(rows):
    """Of each model at each step the row of the guidance scale with least distance."""
    best = {}
    for row in rows:
        key = row["model"], row["step"]
        if key not in best or row["fd"] < best[key]["fd"]:
            best[key] = row
    return list(best.values())


def other_settings(row):
    """How a row was sampled where it differs from the defaults, but for guidance."""
    text = ""
    for key, usual in SETTINGS.items():
        if key != "cfg_scale" and row[key] != usual:
            text += f", {key} {row[key]:g}"
    for key, usual in FINE_SETTINGS.items():
        if row["model"] == "ctf" and row["fine_settings"][key] != usual:
            text += f", fine {key} {row['fine_settings'][key]:g}"
    return text


def named_sets(metrics, rows):
    """(name, colour, scores) of each set of images, in reading order."""
    sets = [
        ("real (training) images", "tab:grey", metrics["real"]),
        ("reconstructions", "tab:grey", metrics["reconstruction"]),
    ]
    names = (("kmeans", "k-means", "tab:green"), ("random", "random", "tab:red"))
    for key, name, color in names:
        if key in metrics["swap"]:
            scores = metrics["swap"][key]
            sets.append((f"swap within {name} clusters", color, scores))
    if "stage2" in metrics:
        name = "real coarse labels, fine predicted"
        sets.append((name, "tab:olive", metrics["stage2"]))
    for row in rows:
        name = f"{MODEL_NAMES[row['model']]} samples, guidance {row['cfg_scale']:g}"
        name += other_settings(row)
        if has_copies(rows):
            name += f", step {row['step']}"
        sets.append((name, MODEL_COLORS[row["model"]], row))
    return sets


def print_table(metrics):
    """One table on the terminal: a line for each set of images."""
    columns = ["precision", "recall", "bits/token", "params", "train s", "images/s"]
    head = "".join(f"{name:>11}" for name in columns)
    distance = "FID" if metrics["protocol"]["features"] == "inception" else "FD"
    print(f"\n{'':40}{distance:>15}{'IS':>15}{'right class, %':>15}{head}")
    for name, _, row in named_sets(metrics, metrics["rows"]):
        line = f"{name:40}"
        for key in ("fd", "inception_score", "class_accuracy"):
            factor = 100 if key == "class_accuracy" else 1
            text = f"{factor * row[key]:.2f}"
            if "std" in row:  # over training seeds
                text += f" ± {factor * row['std'][key]:.2f}"
            line += f"{text.replace('nan', '-'):>15}"
        near = f"{row['precision']:11.3f}{row['recall']:11.3f}"
        line += near.replace("nan", "  -")
        if "bits_per_token" in row:
            line += f"{row['bits_per_token']:11.3f}{row['parameters'] / 1e6:10.2f}M"
            line += f"{row['train_seconds']:11.0f}{row['images_per_second']:11.0f}"
        print(line)


def plot_lines(ax, rows, x, y, note=None):
    """A line for each model and its settings: rows[x] against rows[y], with rows[note]
    beside the points."""
    lines = {}
    for row in rows:
        lines.setdefault((row["model"], other_settings(row)), []).append(row)
    styles = {model: cycle(["-", "--", ":", "-."]) for model in MODEL_NAMES}
    for (model, settings), own in lines.items():
        xs, ys = [row[x] for row in own], [row[y] for row in own]
        bars = [row["std"][y] for row in own] if "std" in own[0] else None
        how = {"color": MODEL_COLORS[model], "linestyle": next(styles[model])}
        name = MODEL_NAMES[model] + settings
        ax.errorbar(xs, ys, bars, marker="o", capsize=3, label=name, **how)
        if note:
            for row in own:
                ax.annotate(f" {row[note]:g}", (row[x], row[y]), va="bottom")
    ax.set(xlabel=AXIS_LABELS.get(x, x), ylabel=AXIS_LABELS.get(y, y))
    if y == "fd":
        ax.set_yscale("log")
    ax.legend()


def plot_convergence(path, metrics):
    """convergence.png: distance and Inception Score of the kept copies over training
    steps and over seconds (the paper's figure 2)."""
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    figure.suptitle(literal(describe(metrics["protocol"])))
    for row_axes, y in zip(figure.subplots(2, 2), ("fd", "inception_score")):
        for ax, x in zip(row_axes, ("step", "train_seconds")):
            plot_lines(ax, best_rows(metrics["rows"]), x, y)
    save_figure(path, figure)


def plot_metrics(path, metrics):
    """metrics.png: distance and class accuracy of each set of images; of several
    guidance scales, those of each model's best, and the trade-offs as curves."""
    rows = last_steps(metrics["rows"])
    best = best_rows(rows)
    several = len(rows) > len(best)
    figure = Figure(figsize=(12, 8 if several else 4.2), layout="constrained")
    figure.suptitle(literal(describe(metrics["protocol"])))
    axes = figure.subplots(1 + several, 2, squeeze=False)
    names, colors, scores = zip(*named_sets(metrics, best))
    for ax, key, factor in zip(axes[0], ("fd", "class_accuracy"), (1, 100)):
        values = [factor * row[key] for row in scores]
        bars = ax.barh(names, values, color=colors, log=key == "fd")
        texts = [f"{value:.2f}".replace("nan", "-") for value in values]
        ax.bar_label(bars, texts, padding=3)
        ax.set_xlabel(AXIS_LABELS[key])
        ax.invert_yaxis()
        ax.margins(x=0.2)
    axes[0, 1].set(yticklabels=[], xlim=(0, 119), xticks=range(0, 101, 20))
    if several:
        plot_lines(axes[1, 0], rows, "inception_score", "fd", "cfg_scale")
        plot_lines(axes[1, 1], rows, "recall", "precision", "cfg_scale")
        for ax in axes[1]:
            ax.set_title("numbers: guidance scale")
    save_figure(path, figure)


if __name__ == "__main__":
    main()
