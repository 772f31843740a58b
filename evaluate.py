"""Evaluation: judge the samples, and everything on the way to them.

Fréchet distance, Inception Score, precision and recall, class accuracy and held-out
bits per token; and what a reader needs to weigh them: the same for real images, for
reconstructions, for the two swaps of figure 1b, and the accuracy of the judge.

    python evaluate.py                           # the files that sample.py wrote
    python evaluate.py --cfg-scales 1 1.5 2 3    # both models at each guidance scale
    python evaluate.py --kept                    # the copies of --keep-every: figure 2
    python evaluate.py --mean-of out-1 out-2 --out out-mean    # of runs judged before
    python evaluate.py --features inception      # Inception v3, not our classifier

Reads what the other stages wrote; writes classifier.pt (the judge, trained once per
data set), metrics.json and metrics.png (--kept: convergence.json and .png). On two CPU
cores: a minute, FD 0.48.
"""

import json
import math
from pathlib import Path
from statistics import mean, stdev

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
from aux_model import heldout_fine, predict_fine
from cluster import load_clusters, random_clusters, swap_within_clusters
from sample import (
    FINE_SETTINGS,
    MODEL_FILES,
    MODEL_NAMES,
    SAMPLE_FILES,
    SETTINGS,
    load_models,
    sample_batches,
    training_of,
)
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
    run_script,
    save,
    save_figure,
    short_hash,
    to_device,
    to_float,
)

MODEL_COLORS = {"ctf": "tab:orange", "baseline": "tab:blue"}
IS_LABEL = "Inception Score: higher is better"
DISTANCE_LABEL = "{} (log scale): lower is better"

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
    """The judge: (B, 3, H, W), -1..1 -> features (B, 128), logits (B, classes)."""

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
    """Images uint8 (N, H, W, 3) -> float64 features (N, F), logits (N, classes)."""
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
    if "stage2" in metrics:
        sets.append(("real coarse labels, fine drawn", "tab:olive", metrics["stage2"]))
    steps = {row["step"] for row in metrics["rows"]}
    for row in metrics["rows"]:
        name = f"{MODEL_NAMES[row['model']]} samples, guidance {row['cfg_scale']:g}"
        if len(steps) > 1:
            name += f", step {row['step']}"
        sets.append((name, MODEL_COLORS[row["model"]], row))
    return sets


def print_table(metrics, distance):
    """One table on the terminal: a line for each set of images."""
    columns = ["precision", "recall", "bits/token", "params", "train s", "images/s"]
    head = "".join(f"{name:>11}" for name in columns)
    print(f"\n{'':40}{distance.upper():>15}{'IS':>15}{'right class, %':>15}{head}")
    for name, _, row in named_sets(metrics):
        line = f"{name:40}"
        for key in (distance, "inception_score", "class_accuracy"):
            factor = 100 if key == "class_accuracy" else 1
            text = f"{factor * row[key]:.2f}"
            if "std" in row:  # over training seeds
                text += f" ± {factor * row['std'][key]:.2f}"
            line += f"{text:>15}"
        line += f"{row['precision']:11.3f}{row['recall']:11.3f}"
        if "bits_per_token" in row:
            line += f"{row['bits_per_token']:11.3f}{row['parameters'] / 1e6:10.2f}M"
            line += f"{row['train_seconds']:11.0f}{row['images_per_second']:11.0f}"
        print(line)


def best_rows(rows, distance):
    """Of each model at each step the row of the guidance scale with least distance."""
    best = {}
    for row in rows:
        key = row["model"], row["step"]
        if row[distance] <= best.get(key, row)[distance]:
            best[key] = row
    return list(best.values())


def draw_lines(ax, rows, x, y, note=None):
    """A line for each model: rows[x] against rows[y], points annotated with note."""
    for model, color in MODEL_COLORS.items():
        own = [row for row in rows if row["model"] == model]
        if not own:
            continue
        xs, ys = [row[x] for row in own], [row[y] for row in own]
        bars = [row["std"][y] for row in own] if "std" in own[0] else None
        name = MODEL_NAMES[model]
        ax.errorbar(xs, ys, bars, color=color, marker="o", capsize=3, label=name)
        if note:
            for row in own:
                ax.annotate(f" {row[note]:g}", (row[x], row[y]), va="bottom")
    ax.legend()


def describe(protocol):
    """What all figures of a run have in common, for the title of a picture."""
    data, seeds = Path(protocol["data"]).name, protocol.get("training_seeds")
    text = f"{protocol['num_samples']} images of each kind against "
    text += f"{protocol['num_real']} real test images of {data} "
    text += f"(features: {protocol['features']})"
    return text + (f"\nmean and standard deviation of {seeds} runs" if seeds else "")


def plot_convergence(path, metrics, distance):
    """convergence.png: distance and Inception Score of the kept copies over training
    steps and over seconds (the paper's figure 2)."""
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    figure.suptitle(describe(metrics["protocol"]))
    axes, best = figure.subplots(2, 2), best_rows(metrics["rows"], distance)
    for row_axes, y in zip(axes, (distance, "inception_score")):
        for ax, x in zip(row_axes, ("step", "train_seconds")):
            draw_lines(ax, best, x, y)
    axes[0, 0].set_ylabel(DISTANCE_LABEL.format(distance.upper()))
    for ax in axes[0]:
        ax.set_yscale("log")
    axes[1, 0].set(ylabel=IS_LABEL, xlabel="training steps (CTF: of stage 1)")
    axes[1, 1].set_xlabel("training seconds (CTF: of both stages)")
    save_figure(path, figure)


def plot_metrics(path, metrics, distance):
    """metrics.png: distance and class accuracy of each set of images; of several
    guidance scales, those of each model's best, and the trade-offs as curves."""
    rows, best = metrics["rows"], best_rows(metrics["rows"], distance)
    several = len(rows) > len(best)
    figure = Figure(figsize=(12, 8 if several else 4.2), layout="constrained")
    figure.suptitle(describe(metrics["protocol"]))
    axes = figure.subplots(1 + several, 2, squeeze=False)
    names, colors, figures = zip(*named_sets(metrics | {"rows": best}))
    for ax, key, factor in zip(axes[0], (distance, "class_accuracy"), (1, 100)):
        values = [factor * row[key] for row in figures]
        bars = ax.barh(names, values, color=colors, log=key == distance)
        ax.bar_label(bars, [f"{value:.2f}" for value in values], padding=3)
        ax.invert_yaxis()
        ax.margins(x=0.2)
    distance_label = DISTANCE_LABEL.format(distance.upper())
    axes[0, 0].set_xlabel(distance_label)
    axes[0, 1].set_xlabel("seen as its class by the judge, %: higher is better")
    axes[0, 1].set(yticklabels=[], xlim=(0, 119), xticks=range(0, 101, 20))
    if several:
        draw_lines(axes[1, 0], rows, "inception_score", distance, "cfg_scale")
        draw_lines(axes[1, 1], rows, "recall", "precision", "cfg_scale")
        axes[1, 0].set(xlabel=IS_LABEL, ylabel=distance_label, yscale="log")
        axes[1, 1].set(xlabel="recall", ylabel="precision")
        for ax in axes[1]:
            ax.set_title("numbers: guidance scale")
    save_figure(path, figure)


def average(values):
    """The mean of equal structures of numbers; of anything else the first."""
    first = values[0]
    if isinstance(first, dict):
        return {key: average([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [average(list(same)) for same in zip(*values)]
    return mean(values) if isinstance(first, (int, float)) else first


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

    def kind(run):
        """What must be equal in all runs."""
        rows = [[r[key] for key in ("model", "step", "cfg_scale")] for r in run["rows"]]
        same = "features", "num_samples", "data", "seed"
        return rows, [run["protocol"][key] for key in same]

    for path, run in zip(paths, runs):
        if kind(run) != kind(runs[0]):
            fail(f"{path} and {paths[0]} differ in models, steps, guidance or protocol")
    metrics = average(runs)
    metrics["protocol"]["training_seeds"] = len(runs)
    for row, *same in zip(metrics["rows"], *(run["rows"] for run in runs)):
        numbers = [key for key, value in row.items() if isinstance(value, (int, float))]
        row["std"] = {key: stdev(each[key] for each in same) for key in numbers}
    return metrics


def measure(images, labels, network, judge, real, device):
    """All figures of one set of images uint8 (N, H, W, 3) with class labels (N,).

    network gives the features of the distance, and the logits of the Inception Score;
    real (N', F) are the features of the real images; judge gives the class accuracy.
    """
    features, logits = look(network, images, device)
    judged = logits if network is judge else look(judge, images, device)[1]
    precision, recall = precision_recall(real[: len(features)], features)
    distance = frechet_distance(*gaussian(real), *gaussian(features))
    score, score_std = inception_score(logits)
    return {
        "fd" if network is judge else "fid": distance,
        "inception_score": score,
        "inception_score_std": score_std,
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


def checkpoints(out, kind, kept):
    """What load_models wants to know: a tuple of file names for each set of weights.

    The final ones, if they are there; or, kept, the copies that --keep-every left, the
    earliest first: copy number i of stage 1 goes with copy number i of stage 2.
    """
    if not kept:
        files = MODEL_FILES[kind]
        return [files] if (out / files[0]).exists() else []
    stems = [Path(file).stem for file in MODEL_FILES[kind]]
    copies = [sorted(p.name for p in out.glob(f"{s}-[0-9]*.pt")) for s in stems]
    if len({len(names) for names in copies}) > 1:
        fail(f"{out}: --kept needs as many copies of {stems[0]}.pt as of {stems[1]}.pt")
    return list(zip(*copies))


def contestants(args, device):
    """Yields (kind, models, artifacts, sample file) of all there is to judge.

    The sample file is None where images are to be drawn: --cfg-scales and --kept.
    """
    drawing = bool(args.cfg_scales or args.kept)
    for kind in MODEL_FILES:
        if not (drawing or (args.out / SAMPLE_FILES[kind]).exists()):
            continue
        settings = None
        for files in checkpoints(args.out, kind, args.kept):
            models, artifacts = load_models(args.out, files, device)
            before, settings = settings, [a["settings"] for a in artifacts.values()]
            if before and before != settings:
                fail(f"{args.out}: {files[0]} is of another run than the copies before")
            file = None
            if not drawing:
                path = args.out / SAMPLE_FILES[kind]
                script = "sample.py" + " --model baseline" * (kind == "baseline")
                file = load(path, script)
                if file["training"] != training_of(artifacts):
                    fail(f"{path} is of other weights: run python {script} again")
            yield kind, models, artifacts, file


def sample_sets(models, file, args, num_samples, num_classes):
    """The images of one model to judge: yields (facts, images, labels).

    Those of the sample file; without one, what is drawn now at each guidance scale.
    """
    if file is not None:
        facts = file["settings"] | {"fine_settings": file["fine_settings"]}
        facts |= {name: file[name] for name in ("seed", "images_per_second")}
        images = file["images"].permute(0, 2, 3, 1)
        yield facts, images[:num_samples], file["labels"][:num_samples]
        return
    labels = torch.arange(num_samples) % num_classes
    for scale in args.cfg_scales or [SETTINGS["cfg_scale"]]:
        settings = SETTINGS | {"cfg_scale": scale}
        images, _, _, speed = sample_batches(
            models, labels, args.seed, settings, FINE_SETTINGS, args.batch_size
        )
        facts = settings | {"fine_settings": FINE_SETTINGS, "seed": args.seed}
        yield facts | {"images_per_second": speed}, images, labels


def swaps(vqvae, fine, clusters, seed):
    """Images uint8 (N, H, W, 3) of fine labels (N, T) swapped within clusters, those of
    the artifact clusters and random ones: {"kmeans": images, "random": images}."""
    rng, g = np.random.default_rng(seed), clusters["code_to_cluster"].numpy()
    clusterings = {"random": random_clusters(g, rng)}
    clusterings[clusters["method"]] = g  # of --method random, there is no other
    images = {}
    for name, clustering in clusterings.items():
        swapped = swap_within_clusters(fine.cpu().numpy(), clustering, rng)
        swapped = torch.from_numpy(swapped).to(fine.device)
        images[name] = reconstruct(vqvae, swapped).cpu()
    return images


def stage2_alone(models, fine, g, labels, seed):
    """Images uint8 (N, H, W, 3) of real coarse labels with drawn fine ones.

    What stage 2 costs when stage 1 makes no mistake. fine (N, T), g (K,), labels (N,).
    """
    generator = torch.Generator(fine.device).manual_seed(seed)
    batches = zip(g[fine].split(100), labels.split(100))
    drawn = [
        predict_fine(models["aux"], coarse, y, generator, **FINE_SETTINGS)
        for coarse, y in batches
    ]
    return reconstruct(models["vqvae"], torch.cat(drawn)).cpu()


def judge_all(args, device):
    """Everything that metrics.json holds."""
    vqvae, tokenizer = load_tokenizer(args.out, device)
    data, codebook_id = tokenizer["data"], tokenizer["codebook_id"]
    tokens = load(args.out / "tokens.pt", "tokenizer.py", codebook_id=codebook_id)
    clusters = load_clusters(args.out, codebook_id)
    todo = contestants(args, device)
    if args.kept:
        if not any(checkpoints(args.out, kind, kept=True) for kind in MODEL_FILES):
            fail(f"{args.out} has no copies: train with --keep-every")
    else:  # load all now, so that what does not fit fails at once
        todo = list(todo)
        if not todo:
            script = "ar_model.py" if args.cfg_scales else "sample.py"
            fail(f"{args.out} has nothing to judge: run python {script} first")
    image_size = data["image_size"]
    images, labels, classes = load_images(data["name"], "train", image_size)
    test_images, test_labels, _ = load_images(data["name"], "test", image_size)
    if not torch.equal(test_labels, tokens["test_labels"]):
        fail(f"{data['name']} has changed since python tokenizer.py: run it again")
    # A Fréchet distance depends on N: only equal numbers can be compared.
    N = min(args.num_samples, len(images), len(test_images))
    if not (args.cfg_scales or args.kept):
        sizes = [len(file["images"]) for _, _, _, file in todo]
        N = min(*sizes, len(images), len(test_images))
    if N < 2:
        fail("one image has no covariance: draw more samples")

    judge = get_classifier(
        args.out / "classifier.pt", images, labels, len(classes), args, device
    )
    network, distance = judge, "fd"
    if args.features == "inception":
        network, distance = Inception(args.inception_weights).eval().to(device), "fid"
    real, logits = look(network, test_images, device)
    judged = logits if network is judge else look(judge, test_images, device)[1]
    accuracy = float((judged.argmax(1) == test_labels.numpy()).mean())
    if N < real.shape[1]:
        print(f"warning: {N} samples, fewer than {real.shape[1]} feature dimensions:")
        print(f"the covariance is singular, and {distance.upper()} far too high")
    instruments = network, judge, real, device

    fine = tokens["test_fine"].long().to(device)
    reconstructions = reconstruct(vqvae, fine).cpu()
    swapped = swaps(vqvae, fine[:N], clusters, args.seed)
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
        "swap": {
            name: measure(swap, test_labels[:N], *instruments)
            for name, swap in swapped.items()
        },
        "rows": [],
    }
    metrics["reconstruction"]["psnr"] = psnr(test_images, reconstructions)
    g, y = clusters["code_to_cluster"].to(device), test_labels.to(device)
    for kind, models, artifacts, file in todo:
        networks = {name: part for name, part in models.items() if name != "vqvae"}
        sizes = [p.numel() for part in networks.values() for p in part.parameters()]
        bits = bits_per_token(models, fine, g, y)
        row = {
            "model": kind,
            "step": artifacts["ar"]["step"],
            "train_seconds": sum(artifacts[name]["seconds"] for name in networks),
            "parameters": sum(sizes),
            "bits_per_token": sum(bits),
            "bits_per_stage": bits,
        }
        for facts, pictures, wanted in sample_sets(models, file, args, N, len(classes)):
            figures = measure(pictures, wanted, *instruments)
            metrics["rows"].append(row | facts | figures)
        if kind == "ctf":  # what stage 2 alone costs: stage 1 made no mistake
            drawn = stage2_alone(models, fine[:N], g, y[:N], args.seed)
            metrics["stage2"] = measure(drawn, test_labels[:N], *instruments)
    return metrics


def main(argv=None):
    parser = CommandLine(__doc__)
    add, scale = parser.add_argument, at_least(0, float)
    instead = "draw both models at these, in place of the sample files"
    add("--cfg-scales", type=scale, nargs="+", help=instead)
    add("--kept", action="store_true", help="the copies of --keep-every: convergence")
    add("--mean-of", type=Path, nargs="+", metavar="OUT", help="average these runs")
    add("--num-samples", type=at_least(2), default=2000, help="where images are drawn")
    add("--batch-size", type=at_least(1), default=100, help="where images are drawn")
    networks = ["classifier", "inception"]
    add("--features", choices=networks, default="classifier", help="of the distance")
    add("--inception-weights", help="inception_v3_google-0cc3c7bd.pth, when offline")
    add("--judge-steps", type=at_least(1), default=800, help="to train the classifier")
    args = parser.parse_args(argv)
    stem = "convergence" if args.kept else "metrics"
    if args.mean_of:
        if len(args.mean_of) < 2 or args.out in args.mean_of:
            parser.error("--mean-of needs two folders or more, and another --out")
        metrics = mean_of_seeds([out / f"{stem}.json" for out in args.mean_of])
    else:
        metrics = judge_all(args, pick_device(args.device))
    protocol = metrics["protocol"]
    distance = "fid" if protocol["features"] == "inception" else "fd"

    print_table(metrics, distance)
    print(f"\n{describe(protocol)}.")
    if distance == "fid":
        print(
            "FID: torchvision's Inception v3, not the TensorFlow graph of the papers."
        )
    accuracy = metrics["judge"]["test_accuracy"]
    print(f"The judge is right on {accuracy:.2%} of the real test images.")
    quality = metrics["reconstruction"]["psnr"]
    print(f"Reconstruction of all test images: {quality:.2f} dB.")
    with replacing(args.out / f"{stem}.json") as temporary:
        temporary.write_text(json.dumps(metrics, indent=1) + "\n")
    plot = plot_convergence if args.kept else plot_metrics
    plot(args.out / f"{stem}.png", metrics, distance)
    print(f"wrote {stem}.json and {stem}.png to {args.out}")


if __name__ == "__main__":
    run_script(main)
