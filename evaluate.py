"""Stage 5: judge the samples, and everything on the way to them.

Fréchet distance, Inception Score, precision and recall, class accuracy, held-out bits per token; beside them what a
reader needs to weigh them: real images against real images, reconstructions, the two swaps of figure 1b, and the accuracy
of the judge itself.

    python evaluate.py                               # the files that sample.py wrote
    python evaluate.py --cfg-scales 1 1.5 2 3 4      # both models at each guidance scale, and the trade-off as a picture
    python evaluate.py --features inception          # torchvision's Inception v3 in place of our own small classifier

Reads what the other stages wrote; writes classifier.pt (the judge, trained once per data set), metrics.json and
metrics.png. A Fréchet distance is biased upward when samples are few: compare only equal numbers.
"""

import json
import math
import warnings

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from scipy.spatial.distance import cdist
from scipy.special import log_softmax
from torch import nn
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

from ar_model import heldout_loss
from aux_model import heldout_fine
from cluster import random_clusters, swap_within_clusters
from sample import DEFAULTS, load_models, sample_batches
from tokenizer import (
    CommandLine,
    fail,
    load,
    load_images,
    load_tokenizer,
    number,
    pick_device,
    psnr,
    replacing,
    save,
    save_figure,
    short_hash,
    to_float,
    to_uint8,
)

SAMPLE_FILES = {"ctf": "samples.pt", "baseline": "samples-baseline.pt"}

# ---------------------------------------------------------------------------------------------------------------------
# The metrics: pure functions of arrays, in float64


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two Gaussians (Heusel et al. 2017).

    mu1, mu2: (F,), sigma1, sigma2: covariances (F, F), possibly singular. Returns a float, 0 for equal Gaussians.
    """
    # S1 S2 has the eigenvalues of the symmetric S1^(1/2) S2 S1^(1/2), whose roots stay real when S1 or S2 is singular.
    values, vectors = np.linalg.eigh(sigma1)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T  # S1^(1/2)
    eigenvalues = np.linalg.eigvalsh(root @ sigma2 @ root).clip(min=0)
    return float(
        ((mu1 - mu2) ** 2).sum()
        + np.trace(sigma1)
        + np.trace(sigma2)
        - 2 * np.sqrt(eigenvalues).sum()
    )


def gaussian(features):
    """Mean (F,) and unbiased covariance (F, F) of features (N, F)."""
    return features.mean(axis=0), np.cov(features, rowvar=False)


def inception_score(logits, splits=10):
    """exp(mean_x KL(p(y|x) || p(y))) (Salimans et al. 2016): mean and standard deviation over splits.

    logits: (N, classes) of N images in random or class-balanced order. Between 1 and the number of classes.
    """
    scores = []
    for part in np.array_split(
        np.asarray(logits, dtype=np.float64), min(splits, len(logits))
    ):
        log_p = log_softmax(part, axis=1)  # log p(y|x)
        p = np.exp(log_p)
        marginal = p.mean(axis=0)  # p(y)
        log_marginal = np.log(marginal, out=np.zeros_like(marginal), where=marginal > 0)
        scores.append(np.exp((p * (log_p - log_marginal)).sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real, fake, k=3):
    """Improved precision and recall (Kynkäänniemi et al. 2019).

    real: (N, F), fake: (N', F), more than k rows each. An image is covered by a set if it lies no farther from one of its
    members than that member's k-th nearest neighbour within the set. precision: share of fake images covered by the real
    ones. recall: share of real images covered by the fake ones.
    """

    def covered(points, by):
        radius = np.concatenate(
            [
                np.partition(cdist(rows, by), k, axis=1)[:, k]
                for rows in np.array_split(by, 1 + len(by) // 1000)
            ]
        )
        hits = [
            (cdist(rows, by) <= radius).any(axis=1)
            for rows in np.array_split(points, 1 + len(points) // 1000)
        ]
        return float(np.concatenate(hits).mean())

    return covered(fake, by=real), covered(real, by=fake)


# ---------------------------------------------------------------------------------------------------------------------
# The networks that look at images


class Classifier(nn.Module):
    """The judge: a small CNN. Images (B, 3, H, W) in -1..1 -> features (B, 128) and logits (B, classes)."""

    def __init__(self, num_classes, widths=(32, 64, 128)):
        super().__init__()
        layers = []
        for inputs, outputs in zip((3, *widths), widths):
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride=2, padding=1),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
                nn.Conv2d(outputs, outputs, 3, padding=1),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            ]
        self.body = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x):
        features = self.body(x.contiguous(memory_format=torch.channels_last)).mean(
            dim=(2, 3)
        )  # (B, 128)
        return features, self.head(features)


def train_classifier(images, labels, num_classes, steps, seed, device):
    """A Classifier trained on uint8 images (N, H, W, 3) with light blur and noise, so that it does not take the softness
    of reconstructions for a different digit."""
    torch.manual_seed(seed)
    model = Classifier(num_classes).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=3e-3, total_steps=steps
    )
    for step in tqdm(range(steps), "classifier", mininterval=1):
        rng = np.random.default_rng((seed, step))
        batch = torch.from_numpy(rng.integers(len(images), size=128))
        x = to_float(images[batch].to(device))
        x[:64] = gaussian_blur(x[:64], 3, rng.uniform(0.3, 1.0))
        x[32:96] += rng.uniform(0, 0.2) * torch.from_numpy(
            rng.standard_normal(x[32:96].shape, np.float32)
        ).to(device)
        loss = F.cross_entropy(model(x)[1], labels[batch].to(device))
        if not math.isfinite(loss.item()):
            fail(f"the loss of the judge is {loss.item()} at step {step}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def get_classifier(path, data, images, labels, steps, seed, device):
    """The judge for these training images: from path if it was trained on them, else trained and written there."""
    settings = {"data": short_hash(images, labels), "steps": steps, "seed": seed}
    if (
        path.exists()
        and (artifact := load(path, "evaluate.py"))["settings"] == settings
    ):
        model = Classifier(len(data["classes"]))
        model.load_state_dict(artifact["model"])
        return model.eval().to(device)
    model = train_classifier(images, labels, len(data["classes"]), steps, seed, device)
    save(
        {"script": "evaluate.py", "model": model.state_dict(), "settings": settings},
        path,
    )
    return model


def get_inception(weights, device):
    """torchvision's Inception v3 as a module from images (B, 3, H, W) in -1..1 to features (B, 2048), logits (B, 1000).

    These are not the weights of the TensorFlow graph that papers use: its FID is near theirs, but not comparable.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the initial weights, which are replaced
        model = torchvision.models.inception_v3(
            weights=None, aux_logits=True, init_weights=False
        )
    try:
        if weights is None:
            state = (
                torchvision.models.Inception_V3_Weights.IMAGENET1K_V1.get_state_dict(
                    check_hash=True
                )
            )
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        model.load_state_dict(state)
    except Exception as error:  # network, file and format errors have no common type
        fail(
            f"no Inception weights ({str(error).splitlines()[0]}): give --inception-weights FILE, torchvision's "
            f"inception_v3_google-0cc3c7bd.pth"
        )
    head, model.fc = model.fc, nn.Identity()

    class Extractor(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = model, head

        def forward(self, x):
            x = F.interpolate(
                x, (299, 299), mode="bilinear", antialias=True
            )  # these weights take -1..1 as well
            features = self.body(x)  # (B, 2048)
            return features, self.head(features)

    return Extractor().eval().to(device)


@torch.inference_mode()
def look(network, images, device, batch_size=250):
    """uint8 images (N, H, W, 3) -> float64 numpy features (N, F) and logits (N, classes)."""
    outputs = [
        network(to_float(batch.to(device))) for batch in images.split(batch_size)
    ]
    features, logits = (
        torch.cat(part).double().cpu().numpy() for part in zip(*outputs)
    )
    return features, logits


# ---------------------------------------------------------------------------------------------------------------------
# The report


def print_table(metrics, distance):
    """One table on the terminal: a line for each set of images."""
    print(
        f"\n{'':34}{distance.upper():>8}{'IS':>14}{'precision':>11}{'recall':>8}{'class':>8}{'bits/token':>12}{'images/s':>10}"
    )
    sets = [
        ("real images (training)", metrics["real"]),
        ("reconstructions", metrics["reconstruction"]),
        ("swap within k-means clusters", metrics["swap"]["kmeans"]),
        ("swap within random clusters", metrics["swap"]["random"]),
    ]
    sets += [
        (f"{row['model']} samples, CFG {row['cfg_scale']:g}", row)
        for row in metrics["rows"]
    ]
    for name, row in sets:
        mean, std = row["inception_score"]
        line = f"{name:34}{row[distance]:8.2f}{mean:8.2f} ± {std:.2f}{row['precision']:10.3f}{row['recall']:8.3f}{row['class_accuracy']:8.1%}"
        if "bits_per_token" in row:
            line += f"{row['bits_per_token']:12.3f}{row['images_per_second']:10.0f}"
        print(line)


def plot_metrics(path, metrics, distance):
    """metrics.png: distance and class accuracy of each set of images; with several rows per model, also trade-offs."""
    rows = metrics["rows"]
    colors = {"ctf": "tab:orange", "baseline": "tab:blue"}
    bars = [
        ("real images", metrics["real"], "grey"),
        ("reconstructions", metrics["reconstruction"], "grey"),
        ("swap, k-means clusters", metrics["swap"]["kmeans"], "tab:green"),
        ("swap, random clusters", metrics["swap"]["random"], "tab:red"),
    ]
    for model in colors:  # each model at its own best
        own = [row for row in rows if row["model"] == model]
        if own:
            best = min(own, key=lambda row: row[distance])
            bars.append(
                (f"{model} samples, CFG {best['cfg_scale']:g}", best, colors[model])
            )
    trade_off = len(rows) > len({row["model"] for row in rows})
    figure = Figure(figsize=(12, 7.5 if trade_off else 3.5), layout="constrained")
    axes = figure.subplots(2 if trade_off else 1, 2, squeeze=False)
    names = [name for name, _, _ in bars]
    for ax, key, label in (
        (axes[0, 0], distance, f"{distance.upper()}, lower is better (log scale)"),
        (axes[0, 1], "class_accuracy", "recognised as its class by the judge, %"),
    ):
        values = [
            100 * row[key] if key == "class_accuracy" else row[key]
            for _, row, _ in bars
        ]
        ax.barh(
            names, values, color=[color for _, _, color in bars], log=key == distance
        )
        for i, value in enumerate(values):
            ax.text(
                value,
                i,
                f" {value:.2f}" if key == distance else f" {value:.1f}",
                va="center",
            )
        ax.invert_yaxis()
        ax.margins(x=0.15)
        ax.set_xlabel(label)
    if trade_off:
        for ax, x, y in (
            (axes[1, 0], "inception_score", distance),
            (axes[1, 1], "recall", "precision"),
        ):
            for model, color in colors.items():
                own = sorted(
                    (row for row in rows if row["model"] == model),
                    key=lambda row: row["cfg_scale"],
                )
                xs = [row[x][0] if x == "inception_score" else row[x] for row in own]
                ax.plot(
                    xs, [row[y] for row in own], color=color, marker="o", label=model
                )
                for row, at in zip(own, xs):
                    ax.annotate(
                        f"{row['cfg_scale']:g}",
                        (at, row[y]),
                        xytext=(4, 4),
                        textcoords="offset points",
                    )
            ax.set(
                xlabel=x.replace("_", " "),
                ylabel=distance.upper() if y == distance else y,
                title="each point: one guidance scale",
            )
            ax.legend()
    protocol = metrics["protocol"]
    figure.suptitle(
        f"{protocol['num_samples']} images of each kind against {protocol['num_real']} real test images, "
        f"features: {protocol['features']}"
    )
    save_figure(figure, path)


def main(argv=None):
    parser = CommandLine(__doc__)
    parser.add_argument(
        "--cfg-scales",
        type=number(float, 0),
        nargs="+",
        help="draw and judge images of both models at each of these, in place of the sample files",
    )
    parser.add_argument(
        "--num-samples",
        type=number(int, 8),
        default=2000,
        help="images of each kind, with --cfg-scales",
    )
    parser.add_argument(
        "--batch-size", type=number(int, 1), default=100, help="images drawn at a time"
    )
    parser.add_argument(
        "--features", choices=["classifier", "inception"], default="classifier"
    )
    parser.add_argument(
        "--inception-weights", help="file of torchvision's Inception v3, when offline"
    )
    parser.add_argument(
        "--judge-steps",
        type=number(int, 1),
        default=800,
        help="training steps of the classifier",
    )
    args = parser.parse_args(argv)
    device = pick_device(args.device)

    vqvae, tokenizer = load_tokenizer(args.out, device)
    data, codebook_id = tokenizer["data"], tokenizer["codebook_id"]
    tokens = load(args.out / "tokens.pt", "tokenizer.py", codebook_id=codebook_id)
    clusters = load(args.out / "clusters.pt", "cluster.py", codebook_id=codebook_id)
    ids = {
        "ctf": {"codebook_id": codebook_id, "cluster_id": clusters["cluster_id"]},
        "baseline": {"codebook_id": codebook_id},
    }
    wanted = (
        {"ctf": "coarse.pt", "baseline": "baseline.pt"}
        if args.cfg_scales
        else SAMPLE_FILES
    )
    present = [model for model, file in wanted.items() if (args.out / file).exists()]
    if not present:
        fail(
            f"{args.out} holds none of {', '.join(wanted.values())}: run python sample.py first"
        )
    loaded = {model: load_models(args.out, model, device)[:2] for model in present}
    N, drawn = args.num_samples, {}
    if not args.cfg_scales:
        drawn = {
            model: load(args.out / SAMPLE_FILES[model], "sample.py", **ids[model])
            for model in present
        }
        N = min(
            len(samples["images"]) for samples in drawn.values()
        )  # only equal numbers can be compared
    images, labels, classes = load_images(data["name"], "train", data["image_size"])
    test_images, test_labels, _ = load_images(data["name"], "test", data["image_size"])
    if N > min(len(images), len(test_images)):
        fail(
            f"{N} samples are more than the {len(test_images)} test or {len(images)} training images: use fewer"
        )

    judge = get_classifier(
        args.out / "classifier.pt",
        data,
        images,
        labels,
        args.judge_steps,
        args.seed,
        device,
    )
    network = (
        judge
        if args.features == "classifier"
        else get_inception(args.inception_weights, device)
    )
    distance = "fd" if args.features == "classifier" else "fid"
    real_features, _ = look(network, test_images, device)
    real_gaussian = gaussian(real_features)
    if N < real_features.shape[1]:
        print(
            f"warning: {N} samples are fewer than the {real_features.shape[1]} feature dimensions: the covariance is "
            f"singular and the {distance.upper()} far too high"
        )

    def measure(some_images, some_labels):
        features, logits = look(network, some_images, device)
        judged = logits if network is judge else look(judge, some_images, device)[1]
        precision, recall = precision_recall(real_features[:N], features)
        return {
            distance: frechet_distance(*real_gaussian, *gaussian(features)),
            "inception_score": inception_score(logits),
            "precision": precision,
            "recall": recall,
            "class_accuracy": float((judged.argmax(1) == some_labels.numpy()).mean()),
        }

    @torch.inference_mode()
    def decode(fine):
        return torch.cat(
            [
                to_uint8(vqvae.decode(vqvae.codes(part.to(device)))).cpu()
                for part in fine.split(250)
            ]
        )

    rng = np.random.default_rng(args.seed)
    code_to_cluster = clusters["code_to_cluster"]
    fine, fine_labels = tokens["test_fine"].long(), tokens["test_labels"]
    reconstructions = decode(fine)
    swaps = {
        name: decode(torch.from_numpy(swap_within_clusters(fine[:N], g, rng)))
        for name, g in (
            ("kmeans", code_to_cluster.numpy()),
            ("random", random_clusters(code_to_cluster.numpy(), rng)),
        )
    }
    accuracy = float(
        (look(judge, test_images, device)[1].argmax(1) == test_labels.numpy()).mean()
    )
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
        "real": measure(images[:N], labels[:N]),
        "reconstruction": {"psnr": psnr(test_images, reconstructions)}
        | measure(reconstructions[:N], fine_labels[:N]),
        "swap": {
            name: measure(swapped, fine_labels[:N]) for name, swapped in swaps.items()
        },
        "rows": [],
    }
    for model, (models, artifact) in loaded.items():
        ar, aux = models["ar"], models["aux"] if "aux" in models else None
        q, y, g = fine.to(device), fine_labels.to(device), code_to_cluster.to(device)
        # -log p(q) = -log p(c) - sum_i log p(q_i | c): CTF is a likelihood of fine labels too, comparable to the baseline's.
        bits = [heldout_loss(ar, q if aux is None else g[q], y) / math.log(2)]
        bits += [] if aux is None else [heldout_fine(aux, q, g, y)[0] / math.log(2)]
        facts = {
            "model": model,
            "step": artifact["step"],
            "bits_per_token": sum(bits),
            "bits_per_stage": bits,
            "parameters": sum(
                p.numel()
                for name in models
                if name != "vqvae"
                for p in models[name].parameters()
            ),
        }
        for scale in args.cfg_scales or []:
            sampled = torch.arange(N) % len(classes)
            pictures, _, _, speed = sample_batches(
                models,
                sampled,
                args.seed,
                DEFAULTS | {"cfg_scale": scale},
                args.batch_size,
            )
            metrics["rows"].append(
                facts
                | DEFAULTS
                | {"cfg_scale": scale, "seed": args.seed, "images_per_second": speed}
                | measure(pictures, sampled)
            )
        if model in drawn:
            pictures = drawn[model]["images"][:N].permute(0, 2, 3, 1)
            metrics["rows"].append(
                facts
                | drawn[model]["settings"]
                | {"images_per_second": drawn[model]["images_per_second"]}
                | measure(pictures, drawn[model]["labels"][:N])
            )

    print_table(metrics, distance)
    print(
        f"\n{N} images of each kind against {len(test_images)} real test images of {data['name']}; features: {args.features}"
        + (
            " v3 of torchvision, not the TensorFlow graph of the papers"
            if network is not judge
            else ""
        )
    )
    print(
        f"the judge is right on {accuracy:.2%} of real test images; reconstructions: {metrics['reconstruction']['psnr']:.2f} dB"
    )
    with replacing(args.out / "metrics.json") as temporary:
        temporary.write_text(json.dumps(metrics, indent=1) + "\n")
    plot_metrics(args.out / "metrics.png", metrics, distance)
    print(f"wrote metrics.json and metrics.png to {args.out}")


if __name__ == "__main__":
    main()
