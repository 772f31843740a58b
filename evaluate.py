"""Evaluation: judge the samples, and everything on the way to them.

Fréchet distance, Inception Score, precision and recall, class accuracy and held-out
bits per token; and what a reader needs to weigh them: the same for real images, for
reconstructions, for the two swaps of figure 1b, and the accuracy of the judge.

    python evaluate.py                           # the files that sample.py wrote
    python evaluate.py --cfg-scales 1 1.5 2 3    # both models at each guidance scale
    python evaluate.py --features inception      # Inception v3, not our classifier

Reads what the other stages wrote; writes classifier.pt (the judge, trained once per
data set), metrics.json and metrics.png. On two CPU cores: a minute, FD 0.63.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from scipy.spatial.distance import cdist
from scipy.special import log_softmax, logsumexp
from torch import nn
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

from ar_model import heldout_loss
from aux_model import heldout_fine
from cluster import load_clusters, random_clusters, swap_within_clusters
from sample import FINE_SETTINGS, SETTINGS, load_models, sample_batches
from tokenizer import (
    CommandLine,
    at_least,
    fail,
    learning_rate,
    load,
    load_images,
    load_tokenizer,
    load_weights,
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

MODEL_COLORS = {"ctf": "tab:orange", "baseline": "tab:blue"}
SAMPLE_FILES = {"ctf": "samples.pt", "baseline": "samples-baseline.pt"}
MODEL_FILES = {"ctf": "coarse.pt", "baseline": "baseline.pt"}

# --------------------------------------------------------------------------------------
# The metrics: pure functions of arrays, in float64


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) of Gaussians (Heusel et al. 2017).

    mu1, mu2 (F,); covariances sigma1, sigma2 (F, F), singular or not. Returns a float.
    """
    # S1 S2 has the eigenvalues of the symmetric S1^1/2 S2 S1^1/2, whose roots stay real
    # when S1 or S2 is singular, where the matrix root of the product turns complex.
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
    standard deviation over splits.
    """
    scores = []
    for part in np.array_split(
        np.asarray(logits, np.float64), min(splits, len(logits))
    ):
        log_p = log_softmax(part, axis=1)  # log p(y|x)
        log_marginal = logsumexp(log_p, axis=0) - np.log(len(part))  # log p(y)
        kl = (np.exp(log_p) * (log_p - log_marginal)).sum(axis=1)
        scores.append(np.exp(kl.mean()))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real, fake, k=3):
    """Improved precision and recall (Kynkäänniemi et al. 2019).

    real (N, F) and fake (N', F), more than one row each. A point is covered by a set if
    some member of the set is no farther from it than from its own k-th neighbour in the
    set. precision: the share of fake covered by real; recall: of real by fake.
    """

    def covered(points, members):
        """The share of points (N, F) that are covered by members (N', F)."""
        blocks = np.array_split(members, 1 + len(members) // 1000)
        # The nearest is the member itself, at 0; so the k-th neighbour is at index k.
        at = min(k, len(members) - 1)
        radii = [np.partition(cdist(b, members), at, axis=1)[:, at] for b in blocks]
        radius = np.concatenate(radii)
        blocks = np.array_split(points, 1 + len(points) // 1000)
        hits = [(cdist(b, members) <= radius).any(axis=1) for b in blocks]
        return float(np.concatenate(hits).mean())

    return covered(fake, real), covered(real, fake)


# --------------------------------------------------------------------------------------
# The networks that look at images


class Classifier(nn.Module):
    """The judge: images (B, 3, H, W), -1..1 -> features (B, 128) and logits (B, V)."""

    def __init__(self, num_classes):
        super().__init__()
        layers = []
        for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
            for c, stride in ((inputs, 2), (outputs, 1)):
                layers += [nn.Conv2d(c, outputs, 3, stride, padding=1, bias=False)]
                layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(128, num_classes)

    def forward(self, x):
        features = self.body(x).mean(dim=(2, 3))
        return features, self.head(features)


def train_classifier(images, labels, num_classes, steps, seed, device):
    """A Classifier trained on images uint8 (N, H, W, 3) and labels (N,).

    Half of each batch is blurred a little, half is noisy (some are both): a judge that
    only saw crisp images would misread soft reconstructions.
    """
    torch.manual_seed(seed)
    model = to_device(Classifier(num_classes), device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    for step in tqdm(range(steps), "classifier"):
        rng = np.random.default_rng((seed, step))
        batch = torch.from_numpy(rng.integers(len(images), size=128))
        x, y = to_float(images[batch].to(device)), labels[batch].to(device)
        noise = torch.from_numpy(rng.standard_normal(x[32:96].shape, np.float32))
        x[:64] = gaussian_blur(x[:64], 3, rng.uniform(0.3, 1.0))
        x[32:96] += rng.uniform(0, 0.2) * noise.to(device)
        loss = F.cross_entropy(model(x)[1], y)
        if not math.isfinite(loss.item()):
            fail(
                f"the loss of the judge is {loss.item()} at step {step}: nothing saved"
            )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 3e-3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def get_classifier(path, images, labels, num_classes, args, device):
    """The judge of these training images: read from path, or trained and kept there."""
    steps, seed = args.judge_steps, args.seed
    settings = {"data": short_hash(images, labels), "steps": steps, "seed": seed}
    if path.exists():
        artifact = load(path, "evaluate.py")
        if artifact["settings"] == settings:
            model = Classifier(num_classes)
            load_weights(model, artifact, path)
            return to_device(model.eval(), device)
    model = train_classifier(images, labels, num_classes, steps, seed, device)
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
def look(network, images, device):
    """Images uint8 (N, H, W, 3) -> float64 arrays: features (N, F), logits (N, V)."""
    parts = [network(to_float(part.to(device))) for part in images.split(250)]
    return [torch.cat(part).cpu().double().numpy() for part in zip(*parts)]


# --------------------------------------------------------------------------------------
# The report


def named_sets(metrics):
    """(name, colour, figures) of each set of images, in reading order."""
    swap = metrics["swap"]
    sets = [
        ("real (training) images", "tab:grey", metrics["real"]),
        ("reconstructions", "tab:grey", metrics["reconstruction"]),
    ]
    names = (("kmeans", "k-means", "tab:green"), ("random", "random", "tab:red"))
    for key, name, color in names:
        if key in swap:
            sets.append((f"swap within {name} clusters", color, swap[key]))
    for row in metrics["rows"]:
        name = f"{row['model']} samples, guidance {row['cfg_scale']:g}"
        sets.append((name, MODEL_COLORS[row["model"]], row))
    return sets


def print_table(metrics, distance):
    """One table on the terminal: a line for each set of images."""
    columns = ["class", "precision", "recall", "bits/token", "images/s"]
    head = "".join(f"{name:>11}" for name in columns)
    print(f"\n{'':32}{distance.upper():>9}{'IS':>14}{head}")
    for name, _, row in named_sets(metrics):
        score = "{:.2f} ± {:.2f}".format(*row["inception_score"])
        line = f"{name:32}{row[distance]:9.2f}{score:>14}{row['class_accuracy']:11.1%}"
        line += f"{row['precision']:11.3f}{row['recall']:11.3f}"
        if "bits_per_token" in row:
            line += f"{row['bits_per_token']:11.3f}{row['images_per_second']:11.0f}"
        print(line)


def plot_metrics(path, metrics, distance):
    """metrics.png: distance and class accuracy of each set; of several guidance scales,
    each model's best, and the trade-offs as curves."""
    rows, protocol = metrics["rows"], metrics["protocol"]
    best = {}  # of each model
    for row in rows:
        if row[distance] <= best.get(row["model"], row)[distance]:
            best[row["model"]] = row
    sets = [s for s in named_sets(metrics) if s[2] in best.values() or s[2] not in rows]
    names, colors, figures = zip(*sets)
    curves = len(rows) > len(best)
    size = (12, 7.5 if curves else 3.8)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1 + curves, 2, squeeze=False)
    figure.suptitle(
        f"{protocol['num_samples']} images of each kind against {protocol['num_real']} "
        f"real test images of {Path(protocol['data']).name} "
        f"(features: {protocol['features']})"
    )
    for ax, key, factor in zip(axes[0], (distance, "class_accuracy"), (1, 100)):
        values = [factor * row[key] for row in figures]
        bars = ax.barh(names, values, color=colors, log=key == distance)
        ax.bar_label(bars, [f"{value:.2f}" for value in values], padding=3)
        ax.invert_yaxis()
        ax.margins(x=0.2)
    axes[0, 0].set_xlabel(f"{distance.upper()} (log scale): lower is better")
    axes[0, 1].set_xlabel("seen as its class by the judge, %: higher is better")
    axes[0, 1].set(yticklabels=[], xlim=(0, 119), xticks=range(0, 101, 20))
    if curves:
        points = [{**row, "IS": row["inception_score"][0]} for row in rows]
        for ax, x, y in zip(axes[1], ("IS", "recall"), (distance, "precision")):
            for model in best:
                own = [row for row in points if row["model"] == model]
                xs, ys = [row[x] for row in own], [row[y] for row in own]
                ax.plot(xs, ys, color=MODEL_COLORS[model], marker="o", label=model)
                for row in own:
                    ax.annotate(f" {row['cfg_scale']:g}", (row[x], row[y]))
            ax.set(xlabel=x, ylabel=y.upper() if y == distance else y)
            ax.set_title("numbers: guidance scale")
            ax.legend()
    save_figure(path, figure)


def measure(images, labels, network, judge, real, device):
    """All figures of one set of images uint8 (N, H, W, 3) with class labels (N,).

    network gives the features of the distance, and the logits of the Inception Score;
    real (N', F) are the features of the real images; judge gives the class accuracy.
    """
    features, logits = look(network, images, device)
    judged = logits if network is judge else look(judge, images, device)[1]
    precision, recall = precision_recall(real[: len(features)], features)
    distance = frechet_distance(*gaussian(real), *gaussian(features))
    return {
        "fd" if network is judge else "fid": distance,
        "inception_score": inception_score(logits),
        "precision": precision,
        "recall": recall,
        "class_accuracy": float((judged.argmax(1) == labels.numpy()).mean()),
    }


def bits_per_token(models, fine, g, labels):
    """Held-out bits per token of each stage of a model: their sum is comparable.

    -log p(q) = -log p(c) - sum_i log p(q_i | c): CTF has a likelihood too.
    fine (N, T), g (K,), labels (N,).
    """
    if "aux" in models:
        nats = [heldout_loss(models["ar"], g[fine], labels)]
        nats += heldout_fine(models["aux"], fine, g, labels)[:1]
    else:
        nats = [heldout_loss(models["ar"], fine, labels)]
    return [value / math.log(2) for value in nats]


def sample_sets(models, artifact, file, args, num_samples, num_classes):
    """What there is to judge of one model: yields (facts, images, labels).

    It is the sample file; or, with --cfg-scales, what is drawn now at each scale.
    """
    facts = {"step": artifact["step"]}
    if file is not None:
        if file["step"] != artifact["step"]:
            was = f"step {file['step']}, which is now at step {artifact['step']}"
            fail(f"the {file['model']} samples are of {was}: run sample.py again")
        facts |= file["settings"] | {"fine_settings": file["fine_settings"]}
        facts |= {name: file[name] for name in ("seed", "images_per_second")}
        images = file["images"].permute(0, 2, 3, 1)
        yield facts, images[:num_samples], file["labels"][:num_samples]
        return
    labels = torch.arange(num_samples) % num_classes
    for scale in args.cfg_scales:
        settings = SETTINGS | {"cfg_scale": scale}
        images, _, _, speed = sample_batches(
            models, labels, args.seed, settings, FINE_SETTINGS, args.batch_size
        )
        facts |= settings | {"fine_settings": FINE_SETTINGS, "seed": args.seed}
        yield facts | {"images_per_second": speed}, images, labels


def main(argv=None):
    parser = CommandLine(__doc__)
    add, scale = parser.add_argument, at_least(0, float)
    instead = "draw both models at these, in place of the sample files"
    add("--cfg-scales", type=scale, nargs="+", help=instead)
    add("--num-samples", type=at_least(2), default=2000, help="with --cfg-scales")
    add("--batch-size", type=at_least(1), default=100, help="with --cfg-scales")
    add("--features", choices=["classifier", "inception"], default="classifier")
    add("--inception-weights", help="inception_v3_google-0cc3c7bd.pth, when offline")
    add("--judge-steps", type=at_least(1), default=800, help="to train the classifier")
    args = parser.parse_args(argv)
    device = pick_device(args.device)

    vqvae, tokenizer = load_tokenizer(args.out, device)
    data, codebook_id = tokenizer["data"], tokenizer["codebook_id"]
    tokens = load(args.out / "tokens.pt", "tokenizer.py", codebook_id=codebook_id)
    clusters = load_clusters(args.out, codebook_id)
    wanted = MODEL_FILES if args.cfg_scales else SAMPLE_FILES
    kinds = [kind for kind, file in wanted.items() if (args.out / file).exists()]
    if not kinds:
        script = "ar_model.py" if args.cfg_scales else "sample.py"
        missing = " nor ".join(wanted.values())
        fail(f"{args.out} has neither {missing}: run python {script} first")
    models = {kind: load_models(args.out, kind, device)[:2] for kind in kinds}
    N, files = args.num_samples, {}
    if not args.cfg_scales:
        for kind, (_, artifact) in models.items():
            ids = {name: artifact[name] for name in ("codebook_id", "cluster_id")}
            path = args.out / SAMPLE_FILES[kind]
            script = "sample.py" if kind == "ctf" else "sample.py --model baseline"
            files[kind] = load(path, script, **ids)
        N = min(len(file["images"]) for file in files.values())
    image_size = data["image_size"]
    images, labels, classes = load_images(data["name"], "train", image_size)
    test_images, test_labels, _ = load_images(data["name"], "test", image_size)
    if not torch.equal(test_labels, tokens["test_labels"]):
        fail(f"{data['name']} has changed since python tokenizer.py: run it again")
    # A Fréchet distance depends on N: only equal numbers can be compared.
    N = min(N, len(images), len(test_images))
    if N < 2:
        fail("one image has no covariance: draw more samples")

    judge = get_classifier(
        args.out / "classifier.pt", images, labels, len(classes), args, device
    )
    network, distance = judge, "fd"
    if args.features == "inception":
        network, distance = Inception(args.inception_weights).eval().to(device), "fid"
    real = look(network, test_images, device)[0]
    if N < real.shape[1]:
        print(f"warning: {N} samples, fewer than {real.shape[1]} feature dimensions:")
        print(f"the covariance is singular, and {distance.upper()} far too high")
    instruments = network, judge, real, device

    rng = np.random.default_rng(args.seed)
    fine, g = tokens["test_fine"].long(), clusters["code_to_cluster"].numpy()
    reconstructions = reconstruct(vqvae, fine.to(device)).cpu()
    clusterings = {"random": random_clusters(g, rng)}
    clusterings[clusters["method"]] = g  # of --method random, there is no other
    swaps = {}
    for name, clustering in clusterings.items():
        swapped = swap_within_clusters(fine[:N].numpy(), clustering, rng)
        swapped = reconstruct(vqvae, torch.from_numpy(swapped).to(device)).cpu()
        swaps[name] = measure(swapped, test_labels[:N], *instruments)
    judged = look(judge, test_images, device)[1].argmax(1)
    accuracy = float((judged == test_labels.numpy()).mean())
    quality = psnr(test_images, reconstructions)
    metrics = {
        "protocol": {
            "features": args.features,
            "num_samples": N,
            "num_real": len(test_images),
            "seed": args.seed,
            "data": data["name"],
            "device": str(device),
            "clusters": clusters["method"],
            "codebook_id": codebook_id,
            "cluster_id": clusters["cluster_id"],
        },
        "judge": {"test_accuracy": accuracy},
        "real": measure(images[:N], labels[:N], *instruments),
        "reconstruction": measure(reconstructions[:N], test_labels[:N], *instruments),
        "swap": swaps,
        "rows": [],
    }
    metrics["reconstruction"]["psnr"] = quality
    held_out = [t.to(device) for t in (fine, clusters["code_to_cluster"], test_labels)]
    for kind, (parts, artifact) in models.items():
        bits = bits_per_token(parts, *held_out)
        networks = [part for name, part in parts.items() if name != "vqvae"]
        row = {
            "model": kind,
            "bits_per_token": sum(bits),
            "bits_per_stage": bits,
            "parameters": sum(p.numel() for n in networks for p in n.parameters()),
        }
        drawn = sample_sets(parts, artifact, files.get(kind), args, N, len(classes))
        for facts, pictures, labels_wanted in drawn:
            figures = measure(pictures, labels_wanted, *instruments)
            metrics["rows"].append(row | facts | figures)

    print_table(metrics, distance)
    print(f"\n{N} images of each kind against {len(test_images)} real test images.")
    if args.features == "inception":
        print(
            "FID: torchvision's Inception v3, not the TensorFlow graph of the papers."
        )
    print(f"The judge is right on {accuracy:.2%} of the real test images.")
    print(f"Reconstruction of all test images: {quality:.2f} dB.")
    with replacing(args.out / "metrics.json") as temporary:
        temporary.write_text(json.dumps(metrics, indent=1) + "\n")
    plot_metrics(args.out / "metrics.png", metrics, distance)
    print(f"wrote metrics.json and metrics.png to {args.out}")


if __name__ == "__main__":
    main()
