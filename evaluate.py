"""Evaluation: judge the samples in one folder, and the controls they are compared with.

Fréchet distance (FD), Inception Score (IS), precision, recall, class accuracy and bits
per token. The controls are real images, reconstructions, the two swaps of figure 1b,
and stage 2 alone.

    python evaluate.py                      # judges samples.pt and samples-baseline.pt
    python evaluate.py --out out/cfg3       # those in the sub-folder

Reads what the other scripts wrote; writes metrics.json and metrics.png, and
classifier.pt (the judge, trained once) beside images.pt. Prints a Markdown table. On
two CPU cores: a minute, FD 0.44.

The example image of tokenizer.py: the judge turns (3, 32, 32) pixels into 128 features
and 10 logits. The logit of class 0 is the largest, so the image counts as accurate.
2,000 rows of features have a mean (128,) and a covariance (128, 128). The Fréchet
distance compares them with those of the 5,000 test images.
"""

import json
import math

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy.special import log_softmax, logsumexp
from torch import nn
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

import tokenizer
from ar_model import mean_loss
from aux_model import mean_fine_loss, predict_fine
from cluster import random_clusters, swapped_images
from sample import FILES, load_models, name_of, weights_of
from tokenizer import fail, psnr, reconstruct, to_float

# ------------------------------ The metrics: pure functions of numpy arrays, in float64


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) of Gaussians (Heusel et al. 2017,
    equation 6: the square of a distance).

    mu1, mu2 (F,); covariances S1 = sigma1, S2 = sigma2 (F, F), singular or not.
    Returns a float, never nan or complex.
    """
    # tr (S1 S2)^1/2 is the sum of the square roots of the eigenvalues of S1 S2. Those
    # of S1^1/2 S2 S1^1/2 are the same. This matrix is symmetric, so they stay real even
    # if S1 or S2 is singular. (The matrix square root of S1 S2 may become complex.)
    values, vectors = np.linalg.eigh(sigma1)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T  # S1^1/2
    eigenvalues = np.linalg.eigvalsh(root @ sigma2 @ root).clip(min=0)
    spread = np.trace(sigma1) + np.trace(sigma2) - 2 * np.sqrt(eigenvalues).sum()
    return float(((mu1 - mu2) ** 2).sum() + spread)


def gaussian(features):
    """Mean (F,) and unbiased covariance (F, F) of features (N, F)."""
    return features.mean(axis=0), np.cov(features, rowvar=False)


def inception_score(logits, splits=10):
    """exp(mean_x KL(p(y|x) || p(y))) (Salimans et al. 2016), 1 to the number of
    classes.

    logits (N, classes), not sorted by class, so that all splits are alike. Returns the
    mean and the standard deviation over splits: ten as in the code of Salimans et al.,
    fewer if N is small (a split of two images cannot score more than 2).
    """
    scores = []
    most = len(logits) // (2 * logits.shape[1])  # two images per class, or more
    for part in np.array_split(logits, max(1, min(splits, most))):
        log_p = log_softmax(np.asarray(part, np.float64), axis=1)  # log p(y|x)
        log_marginal = logsumexp(log_p, axis=0) - np.log(len(part))  # log p(y)
        kl = (np.exp(log_p) * (log_p - log_marginal)).sum(axis=1)
        scores.append(np.exp(kl.mean()))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real, fake, k=3, device="cpu"):
    """Improved precision and recall (Kynkäänniemi et al. 2019).

    real (N, F) and fake (N', F), float64, at least two rows each. The radius of a
    member of a set is the distance to its k-th nearest neighbour in the set (the
    farthest, if there are fewer than k others). A point is covered by the set if it
    lies within the radius of some member. Precision is the share of fake covered by
    real, recall the share of real covered by fake. Returns two floats.
    """
    precision = covered(fake, real, squared_radius(real, k, device), device)
    recall = covered(real, fake, squared_radius(fake, k, device), device)
    return precision, recall


def squared_radius(members, k, device):
    """The squared distance of each of members (N, F) to its k-th nearest neighbour in
    members, itself excluded (the farthest, if there are fewer than k others): (N,)."""
    # The nearest one is the member itself, at distance 0. So the k-th is at index k.
    nearest = min(k, len(members) - 1) + 1
    blocks = squared_distances(members, members, device)
    return torch.cat([b.topk(nearest, largest=False).values[:, -1] for b in blocks])


def covered(points, members, squared, device):
    """The share, a float, of points (N, F) within the radius of at least one of the
    members (N', F). squared (N',): their squared radii.

    A point on the edge counts as covered. So the squared radii get an allowance for
    the rounding of squared_distances: 1e-14 * F * (the largest coordinate)^2.
    """
    largest = max(np.abs(points).max(), np.abs(members).max())
    rounding = 1e-14 * points.shape[1] * largest**2
    blocks = squared_distances(points, members, device)
    hits = torch.cat([(block <= squared + rounding).any(dim=1) for block in blocks])
    return hits.double().mean().item()


def squared_distances(points, members, device):
    """Yield the squared distances of points (N, F) to all of members (N', F), a chunk
    of rows at a time, since all may not fit in memory: float64 (n, N') on device."""
    centre = members.mean(axis=0)  # products are most accurate near the origin
    points = torch.as_tensor(points - centre, device=device)
    members = torch.as_tensor(members - centre, device=device)
    norms = members.square().sum(dim=1)
    for rows in points.split(max(1, 2**24 // len(members))):
        # |a - b|^2 = |a|^2 + |b|^2 - 2 a.b: a matrix product is fast.
        table = rows.square().sum(dim=1, keepdim=True) + norms - 2 * rows @ members.T
        yield table.clamp(min=0)


# ----------------------------------------------------- The networks that look at images


class Classifier(nn.Module):
    """The judge: (B, 3, H, W), -1..1 -> features (B, 128), logits (B, classes)."""

    def __init__(self, num_classes):
        super().__init__()
        layers = []
        for before, width in ((3, 32), (32, 64), (64, 128)):
            # Two convolutions per level. The first halves the size.
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
    """A Classifier in eval mode, trained on Examples of images, B per step.

    Half of each batch is slightly blurred and half is noisy (a quarter is both). A
    judge that has only seen sharp images would misjudge soft reconstructions.
    """
    torch.manual_seed(seed)
    model = tokenizer.to_device(Classifier(num_classes), device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    for step in tqdm(range(steps), "classifier"):
        rng = np.random.default_rng((seed, step))
        images, y = train_set.batch(rng, B).to(device)
        x = to_float(images)
        blurred, noisy = x[: B // 2], x[B // 4 : 3 * B // 4]  # views of x
        noise = torch.from_numpy(rng.standard_normal(noisy.shape, np.float32))
        blurred.copy_(gaussian_blur(blurred, 3, rng.uniform(0.3, 1.0)))
        noisy += rng.uniform(0, 0.2) * noise.to(device)
        loss = F.cross_entropy(model(x)[1], y)
        for group in optimizer.param_groups:
            group["lr"] = tokenizer.learning_rate(step, steps, 3e-3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def look(judge, images, device):
    """Images uint8 (N, H, W, 3) -> float64 arrays of the judge: features (N, 128) and
    logits (N, classes)."""
    parts = [judge(to_float(part.to(device))) for part in images.split(250)]
    features, logits = map(torch.cat, zip(*parts))
    return features.cpu().double().numpy(), logits.cpu().double().numpy()


# ----------------------------------------------------------- One set of images measured


def measure(images, y, judge, real, device):
    """All scores of images uint8 (N, H, W, 3) of classes y (N,): {name: float}.

    real: the features (N', F) of all test images. The Fréchet distance uses all of
    them. Precision and recall use the first N, so that both sets have the same size.
    """
    features, logits = look(judge, images, device)
    score, _ = inception_score(logits)
    where = "cuda" if device.type == "cuda" else "cpu"  # MPS has no float64
    precision, recall = precision_recall(real[: len(images)], features, device=where)
    return {
        "fd": frechet_distance(*gaussian(real), *gaussian(features)),
        "inception_score": score,
        "class_accuracy": class_accuracy(logits, y),
        "precision": precision,
        "recall": recall,
    }


def class_accuracy(logits, y):
    """The share of classes y, a tensor (N,), that are the argmax of logits (array)."""
    return float((logits.argmax(1) == y.numpy()).mean())


def bits_per_token(models, fine, y):
    """The bits per token of real images under a model, one number per stage: [coarse,
    fine given coarse] for CTF, [fine] for the baseline. Their sums can be compared.

    The fine labels q determine the coarse labels c, so, all given the class,
    -log p(q) = -log p(c) - sum_i log p(q_i | c).
    models holds ar, and for CTF aux; fine (N, T), y (N,). mean_loss and mean_fine_loss
    give nats; bits are nats divided by ln 2. Guidance, temperature and top-k play no
    role here.
    """
    if "aux" in models:
        coarse = models["aux"].code_to_cluster[fine]
        fine_nats, _ = mean_fine_loss(models["aux"], fine, y)
        nats = [mean_loss(models["ar"], coarse, y), fine_nats]
    else:
        nats = [mean_loss(models["ar"], fine, y)]
    return [value / math.log(2) for value in nats]


# ------------------------------------------------------------------------- The controls


def swaps(vqvae, fine, clusters, seed):
    """Images uint8 (N, H, W, 3) of fine labels (N, T) swapped within clusters (figure
    1b): {"random": images, "k-means": images}; only "random" if clusters, the
    artifact in clusters.pt, has random ones."""
    rng = np.random.default_rng(seed)
    g = clusters["code_to_cluster"].numpy()
    maps = {"random": random_clusters(g, rng), "k-means": g}
    if clusters["method"] == "random":
        maps = {"random": g}
    return {name: swapped_images(vqvae, fine, g, rng) for name, g in maps.items()}


def stage2_alone(models, fine, y, seed, fine_settings):
    """Images uint8 (N, H, W, 3) of real coarse labels with the fine labels of stage 2:
    what stage 2 costs if stage 1 makes no mistake. fine (N, T), y (N,)."""
    aux = models["aux"]
    generator = torch.Generator(fine.device).manual_seed(seed)
    predicted = []
    for part, part_y in zip(fine.split(100), y.split(100)):
        coarse = aux.code_to_cluster[part]
        with tokenizer.autocast(part.device):
            some = predict_fine(aux, coarse, part_y, generator, **fine_settings)
        predicted.append(some)
    return reconstruct(models["vqvae"], torch.cat(predicted)).cpu()


# --------------------------------------------------------------------------- The script


def get_judge(path, train_set, num_classes, settings, device):
    """The Classifier in path; if there is none with these settings, it is trained and
    saved there."""
    model = Classifier(num_classes)
    try:
        artifact = torch.load(path, map_location="cpu", weights_only=True)
        if artifact["settings"] == settings:
            model.load_state_dict(artifact["model"])
            return tokenizer.to_device(model.eval(), device)
        print(f"{path} is of other images or flags: training the judge again")
    except FileNotFoundError:
        pass
    except Exception as error:  # noqa: BLE001  a damaged file raises a dozen kinds
        print(f"{path} is unusable ({type(error).__name__}): training the judge again")
    steps, seed = settings["steps"], settings["seed"]
    model = train_classifier(train_set, num_classes, steps, seed, device)
    tokenizer.save(path, model=model.state_dict(), settings=settings)
    return model


def sample_sets(out, device):
    """[(samples, models, artifacts)] of each sample file in the folder out itself, with
    the networks that made it. Fails if there is none, or if the weights have
    changed."""
    sets = []
    for name, file in FILES.items():
        if not (out / file).exists():
            continue
        samples = tokenizer.load(out, file)
        models, artifacts = load_models(out, name, device)
        if samples["weights"] != weights_of(artifacts):
            fail(f"{out / file} is from other weights: run python sample.py again")
        sets.append((samples, models, artifacts))
    if not sets:
        fail(f"{out} has no samples: run python sample.py first")
    return sets


def describe(samples, models, artifacts):
    """The facts about a sample file in metrics.json, besides its scores."""
    stages = [name for name in ("ar", "aux") if name in models]
    parameters = [p.numel() for stage in stages for p in models[stage].parameters()]
    return {
        "name": name_of(samples),
        "model": samples["model"],
        "weights": [str(artifacts[stage]["path"]) for stage in stages],
        "steps": [artifacts[stage]["step"] for stage in stages],
        "train_seconds": sum(artifacts[stage]["seconds"] for stage in stages),
        "parameters": sum(parameters),
        "images_per_second": samples["images_per_second"],
        "seed": samples["seed"],
        "fine_settings": samples["fine_settings"],
        **samples["settings"],
    }


def warn_of_shares(name, y, test_y):
    """Print a warning if the classes y (N,) of samples have other shares than those of
    the test images, test_y (N',)."""
    num_classes = int(max(y.max(), test_y.max())) + 1
    share = y.bincount(minlength=num_classes) / len(y)
    test_share = test_y.bincount(minlength=num_classes) / len(test_y)
    if (share - test_share).abs().sum() / 2 > 0.1:  # more than a tenth of the images
        print(f"warning: the classes of {name} have other shares than those of the")
        print("test images: that alone raises the distance")


def main(argv=None):
    parser = tokenizer.command_line(__doc__)
    what = "training steps of the judge"
    parser.add_argument("--judge-steps", type=int, default=800, help=what)
    args = parser.parse_args(argv)
    device = tokenizer.pick_device(args.device)
    sets = sample_sets(args.out, device)
    _, models, artifacts = sets[0]
    vqvae, images_id = models["vqvae"], artifacts["vqvae"]["images_id"]
    ids = {"codebook_id": artifacts["vqvae"]["codebook_id"]}
    _, tokens, _ = tokenizer.load_examples(args.out, "tokens.pt", **ids)
    clusters = tokenizer.load(args.out, "clusters.pt", **ids)
    train_set, test_set, data = tokenizer.load_examples(
        args.out, "images.pt", images_id=images_id
    )
    num_classes = len(data["class_names"])
    if num_classes < 2:
        fail("the data have a single class: the judge would have nothing to learn")
    # The Fréchet distance depends on N: so every row has the same N.
    sizes = {"training images": len(train_set.x), "test images": len(test_set.x)}
    sizes |= {FILES[samples["model"]]: len(samples["images"]) for samples, *_ in sets}
    smallest = min(sizes, key=sizes.get)
    N = sizes[smallest]
    if N < 2:
        fail(f"there is only one of {smallest}: a covariance needs two or more images")

    settings = {"images_id": images_id, "steps": args.judge_steps, "seed": args.seed}
    path = data["path"].with_name("classifier.pt")
    judge = get_judge(path, train_set, num_classes, settings, device)
    real, logits = look(judge, test_set.x, device)
    if N < real.shape[1]:
        print(f"warning: {N} images ({smallest}) are fewer than {real.shape[1]}")
        print("features: the covariance is singular, and the distance far too high")

    def row(name, images, y):
        """The name and the scores of the first N images of a set."""
        return {"name": name} | measure(images[:N], y[:N], judge, real, device)

    fine, y = tokens.to(device)
    reconstructions = reconstruct(vqvae, fine).cpu()
    rows = [row("real training images", *train_set)]
    # All further controls are made from the test images that they are compared with.
    rows += [row("reconstructions", reconstructions, test_set.y)]
    swapped = swaps(vqvae, fine[:N], clusters, args.seed)
    for name in sorted(swapped):  # k-means first
        rows += [row(f"swapped within {name} clusters", swapped[name], test_set.y)]
    for samples, models, artifacts in sets:
        if "aux" in models:
            how = samples["fine_settings"]
            alone = stage2_alone(models, fine[:N], y[:N], args.seed, how)
            rows += [row("stage 2 alone (real coarse labels)", alone, test_set.y)]
        facts = describe(samples, models, artifacts)
        bits = bits_per_token(models, fine, y)
        facts |= {"bits_per_token": sum(bits), "bits_per_stage": bits}
        warn_of_shares(facts["name"], samples["classes"], test_set.y)
        rows += [row(facts["name"], samples["images"], samples["classes"]) | facts]
    protocol = {
        "data": data["data"],
        "num_samples": N,
        "num_real": len(test_set.x),
        "judge_accuracy": class_accuracy(logits, test_set.y),
        "psnr": psnr(test_set.x, reconstructions),
        "device": str(device),
        "clusters": clusters["method"],
        **settings,
    }
    text = json.dumps({"protocol": protocol, "rows": rows}, indent=1)
    (args.out / "metrics.json").write_text(text + "\n", "utf-8")
    print(f"\n{markdown_table(rows)}\n\n{caption(protocol)}.")
    print(f"The judge is right on {protocol['judge_accuracy']:.2%} of the test images.")
    print(f"Reconstructions of all test images: {protocol['psnr']:.2f} dB.")
    plot_metrics(args.out / "metrics.png", rows, caption(protocol))
    print(f"wrote metrics.json and metrics.png to {args.out}")


# ------------------------------------------------------------ The table and the picture


def caption(protocol):
    """The number of images and the data set, the same for all rows."""
    text = f"{protocol['num_samples']} images per row against {protocol['num_real']} "
    return text + f"test images of {protocol['data']}"


def markdown_table(rows):
    """The rows of metrics.json as a Markdown table, a line for each set of images."""
    head = "images | FD | IS | class accuracy | precision | recall | bits per token"
    head += " | parameters | training s | images/s | weights (steps)"
    lines = [f"| {head} |", "|---" * 11 + "|"]
    for row in rows:
        cells = [row["name"], f"{row['fd']:.2f}", f"{row['inception_score']:.2f}"]
        cells += [f"{row['class_accuracy']:.1%}"]
        cells += [f"{row['precision']:.3f}", f"{row['recall']:.3f}"]
        if "model" in row:
            bits = [f"{value:.2f}" for value in row["bits_per_stage"]]
            cells += [" + ".join(bits), f"{row['parameters'] / 1e6:.2f}M"]
            cells += [f"{row['train_seconds']:.0f}", f"{row['images_per_second']:.0f}"]
            pairs = zip(row["weights"], row["steps"])
            cells += [" + ".join(f"{path} ({steps})" for path, steps in pairs)]
        else:
            cells += [""] * 5
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def color_of(name):
    """The colour of a set of images, by the beginning of its name."""
    colors = {"CTF": "tab:orange", "baseline": "tab:blue", "stage 2": "tab:olive"}
    colors |= {"swapped within k-means": "tab:green", "swapped within r": "tab:red"}
    found = [color for start, color in colors.items() if name.startswith(start)]
    return found[0] if found else "tab:grey"


def plot_metrics(path, rows, title):
    """metrics.png: the distance and the class accuracy of each set of images."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    figure.suptitle(title)
    distance, accuracy = figure.subplots(1, 2)
    names = [row["name"] for row in rows]
    colors = [color_of(name) for name in names]
    bars = distance.barh(names, [row["fd"] for row in rows], color=colors, log=True)
    distance.bar_label(bars, fmt="{:.2f}", padding=3)
    distance.xaxis.set_major_formatter("{x:g}")
    distance.set_xlabel("Fréchet distance (log scale): lower is better")
    percent = [100 * row["class_accuracy"] for row in rows]
    bars = accuracy.barh(names, percent, color=colors)
    accuracy.bar_label(bars, fmt="{:.1f}", padding=3)
    accuracy.set_xlabel("class accuracy, %: higher is better")
    accuracy.set(yticklabels=[], xlim=(0, 119), xticks=range(0, 101, 20))
    for ax in (distance, accuracy):
        ax.invert_yaxis()
        ax.margins(x=0.2)
    figure.savefig(path)


if __name__ == "__main__":
    tokenizer.run(main)
