"""Evaluation: judge the samples in one folder, and the controls they are compared with.

Fréchet distance (FD), Inception Score (IS), precision, recall, class accuracy and bits
per token. The controls are real images, reconstructions, the two swaps of figure 1b,
and stage 2 alone.

    python evaluate.py                      # judges samples.pt and samples-baseline.pt
    python evaluate.py --out out/argmax     # those in the sub-folder

Reads what the other scripts wrote; writes metrics.json, and classifier.pt (the judge,
trained once) beside images.pt. Prints a Markdown table. On two CPU cores: two minutes,
FD 0.67.

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
from scipy.special import log_softmax, logsumexp
from torch import nn
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

# isort: off
from tokenizer import WRITTEN_BY, autocast, learning_rate, load, psnr, reconstruct
from tokenizer import restore, save, to_float
from tokenizer import command_line, fail, number, pick_device, run
from cluster import swapped_images
from ar_model import Sampling, mean_loss
from aux_model import mean_fine_loss, predict_fine
from sample import FILES, load_models, name_of, weights_of

# ------------------------------------------ The metrics: pure functions, in float64


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) of Gaussians (Heusel et al. 2017,
    equation 6: the square of a distance).

    mu1, mu2 (D,); covariances S1 = sigma1, S2 = sigma2 (D, D), singular or not.
    Returns a float, 0 or more, never nan or complex.
    """
    # tr (S1 S2)^1/2 is the sum of the square roots of the eigenvalues of S1 S2. Those
    # of S1^1/2 S2 S1^1/2 are the same. This matrix is symmetric, so they stay real even
    # if S1 or S2 is singular. (The matrix square root of S1 S2 may become complex.)
    values, vectors = np.linalg.eigh(sigma1)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T  # S1^1/2
    eigenvalues = np.linalg.eigvalsh(root @ sigma2 @ root).clip(min=0)
    spread = np.trace(sigma1) + np.trace(sigma2) - 2 * np.sqrt(eigenvalues).sum()
    return max(0.0, float(((mu1 - mu2) ** 2).sum() + spread))


def gaussian(features):
    """Mean (D,) and unbiased covariance (D, D) of features (N, D)."""
    return features.mean(axis=0), np.cov(features, rowvar=False)


def inception_score(logits):
    """exp(mean_x KL(p(y|x) || p(y))) (Salimans et al. 2016), a float from 1 to the
    number of classes.

    logits (N, classes), not sorted by class, so that all splits are alike. It is the
    mean over splits: ten as in the code of Salimans et al., fewer if N is small (a
    split of two images cannot score more than 2).
    """
    scores = []
    most = len(logits) // (2 * logits.shape[1])  # two images per class, or more
    for part in np.array_split(logits, max(1, min(10, most))):
        log_p = log_softmax(np.asarray(part, np.float64), axis=1)  # log p(y|x)
        log_marginal = logsumexp(log_p, axis=0) - np.log(len(part))  # log p(y)
        kl = (np.exp(log_p) * (log_p - log_marginal)).sum(axis=1)
        scores.append(np.exp(kl.mean()))
    return float(np.mean(scores))


def precision_recall(real, fake, k=3):
    """Improved precision and recall (Kynkäänniemi et al. 2019, equation 2).

    real (N, D) and fake (N', D), float64 arrays, at least two rows each. Precision is
    the share of fake covered by real, recall the share of real covered by fake: two
    floats. A table of distances takes 8 bytes for each pair of rows.
    """
    real, fake = torch.from_numpy(real), torch.from_numpy(fake)
    return covered(fake, real, k), covered(real, fake, k)


def covered(points, members, k):
    """The share, a float, of points, a tensor (N, D), within the radius of at least one
    of members, a tensor (N', D), or on its edge. The radius of a member is the distance
    to its k-th nearest neighbour in members (the farthest, if there are fewer than k
    others)."""
    nearest = distances(members, members).topk(min(k + 1, len(members)), largest=False)
    radius = nearest.values[:, -1]  # (N',). The first of k + 1 is the member itself.
    hits = (distances(points, members) <= radius).any(dim=1)  # (N,)
    return hits.double().mean().item()


def distances(points, members):
    """Euclidean distances (N, N') of points (N, D) to members (N', D), without a matrix
    product: its rounding would move points over an edge."""
    return torch.cdist(points, members, compute_mode="donot_use_mm_for_euclid_dist")


# --------------------------------------------------------------------------- The judge


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
    model = Classifier(num_classes).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    for step in tqdm(range(steps), "classifier"):
        rng = np.random.default_rng((seed, step))
        images, y = train_set.batch(rng, B).to(device)
        x = to_float(images)
        blurred, noisy = slice(0, B // 2), slice(B // 4, 3 * B // 4)  # of the batch
        noise = rng.standard_normal(x[noisy].shape, np.float32)
        x[blurred] = gaussian_blur(x[blurred], 3, rng.uniform(0.3, 1.0))
        x[noisy] += rng.uniform(0, 0.2) * torch.from_numpy(noise).to(device)
        loss = F.cross_entropy(model(x)[1], y)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 3e-3)
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


def score(images, y, judge, real, device):
    """All scores of images uint8 (N, H, W, 3) of classes y (N,): {name: float}.

    real: the features (N', D) of all test images. The Fréchet distance uses all of
    them. Precision and recall use the first N, so that both sets have the same size.
    """
    features, logits = look(judge, images, device)
    precision, recall = precision_recall(real[: len(images)], features)
    return {
        "fd": frechet_distance(*gaussian(real), *gaussian(features)),
        "inception_score": inception_score(logits),
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
    fine (N, T), y (N,). mean_loss and mean_fine_loss give nats; bits are nats divided
    by ln 2. Guidance, temperature and top-k play no role here.
    """
    if models.aux is None:
        nats = [mean_loss(models.ar, fine, y)]
    else:
        coarse = models.aux.code_to_cluster[fine]
        fine_nats, _ = mean_fine_loss(models.aux, fine, y)
        nats = [mean_loss(models.ar, coarse, y), fine_nats]
    return [value / math.log(2) for value in nats]


# ------------------------------------------------------------------------- The controls


def swaps(vqvae, fine, clusters, seed):
    """Images uint8 (N, H, W, 3) of fine labels (N, T) swapped within clusters (figure
    1b): {"k-means": images, "random": images}; only "random" if clusters, the
    artifact in clusters.pt, has random ones."""
    rng = np.random.default_rng(seed)
    g = clusters["code_to_cluster"].numpy()
    if clusters["method"] == "random":
        return {"random": swapped_images(vqvae, fine, g, rng)}
    control = swapped_images(vqvae, fine, rng.permutation(g), rng)
    return {"k-means": swapped_images(vqvae, fine, g, rng), "random": control}


def stage2_alone(models, fine, y, seed, stage2):
    """Images uint8 (N, H, W, 3) of real coarse labels with the fine labels of stage 2,
    by the Sampling stage2: what stage 2 costs if stage 1 makes no mistake. fine (N, T),
    y (N,)."""
    generator = torch.Generator(fine.device).manual_seed(seed)
    predicted = []
    for part, part_y in zip(fine.split(100), y.split(100)):
        coarse = models.aux.code_to_cluster[part]
        with autocast(part.device):
            some = predict_fine(models.aux, coarse, part_y, generator, stage2)
        predicted.append(some)
    return reconstruct(models.vqvae, torch.cat(predicted)).cpu()


# --------------------------------------------------------------------------- The script


def get_judge(path, images, steps, seed, device):
    """The Classifier in path. If there is none, it is trained on images, the artifact
    in images.pt, and saved there. Fails if it has seen other images or was trained with
    other flags: the scores of two judges cannot be compared."""
    num_classes = len(images["class_names"])
    made_of = {"images_id": images["images_id"], "judge_steps": steps, "seed": seed}
    if path.exists():
        saved = load(path.parent, path.name, **made_of)
        print(f"the judge is {path}, of an earlier run: delete it to train a new one")
        return restore(Classifier(num_classes), saved, device)
    model = train_classifier(images["train"], num_classes, steps, seed, device)
    save(path, model=model.state_dict(), **made_of)
    return model


def sample_sets(out, device):
    """[(samples, models, artifacts)] of each sample file in the folder out itself, with
    the networks that made it. Fails if there is none, or if the weights have
    changed."""
    sets = []
    for name, file in FILES.items():
        if not (out / file).exists():
            continue
        samples = load(out, file)
        models, artifacts = load_models(out, name, device)
        if samples["weights"] != weights_of(artifacts):
            script = WRITTEN_BY[file]
            fail(f"{out / file} is from other weights: run python {script} again")
        sets.append((samples, models, artifacts))
    if not sets:
        fail(f"{out} has no samples: run python sample.py first")
    return sets


def describe(samples, models, artifacts):
    """The facts about a sample file in metrics.json, besides its scores."""
    networks = [name for name in artifacts if name != "vqvae"]
    runs = [artifacts[name] for name in networks]
    paths = [run["path"].resolve() for run in runs]
    sizes = [p.numel() for name in networks for p in getattr(models, name).parameters()]
    copied = ("model", "images_per_second", "seed", "stage1", "stage2")
    return {
        "name": name_of(samples),
        "weights": [f"{path.parent.name}/{path.name}" for path in paths],
        "steps": [run["step"] for run in runs],
        "train_seconds": sum(run["seconds"] for run in runs),
        "parameters": sum(sizes),
    } | {key: samples[key] for key in copied}


def main(argv=None):
    parser = command_line(__doc__)
    what = "training steps of the judge"
    parser.add_argument("--judge-steps", type=number(int, 1), default=800, help=what)
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    sets = sample_sets(args.out, device)
    _, models, artifacts = sets[0]
    vqvae, artifact = models.vqvae, artifacts["vqvae"]
    ids = {"codebook_id": artifact["codebook_id"]}
    tokens = load(args.out, "tokens.pt", **ids)
    clusters = load(args.out, "clusters.pt", **ids)
    images = load(args.out, "images.pt", images_id=artifact["images_id"])
    train_set, test_set = images["train"], images["test"]
    for samples, *_ in sets:
        C, pair = len(images["class_names"]), (samples["classes"], test_set.y)
        share, test_share = (y.bincount(minlength=C) / len(y) for y in pair)
        # 0.2 is a tenth of the images: what one class lacks, another has too many.
        if (share - test_share).abs().sum() > 0.2:
            print(f"warning: {name_of(samples)} has other shares of the classes than")
            print("the test images: that alone raises the distance")
    # The Fréchet distance depends on N: so every row has the same N.
    sizes = [len(samples["images"]) for samples, *_ in sets]
    N = min(len(train_set.x), len(test_set.x), *sizes)
    if N < 2:
        fail("a set of images has only one: a covariance needs two or more")

    path = images["path"].with_name("classifier.pt")
    judge = get_judge(path, images, args.judge_steps, args.seed, device)
    real, logits = look(judge, test_set.x, device)
    if N <= real.shape[1]:
        print(f"warning: the smallest set has {N} images, too few for {real.shape[1]}")
        print("features: the covariance is singular, and the distance far too high")

    fine, y = tokens["test"].to(device)
    reconstructions = reconstruct(vqvae, fine).cpu()
    # {name: (images, classes, further facts)}
    to_score = {"real training images": (*train_set, {})}
    # The other controls are made from the test images that they are compared with.
    to_score["reconstructions"] = (reconstructions, test_set.y, {})
    for name, swapped in swaps(vqvae, fine[:N], clusters, args.seed).items():
        to_score[f"swapped within {name} clusters"] = (swapped, test_set.y, {})
    for samples, models, artifacts in sets:
        if models.aux is not None:
            stage2 = Sampling(**samples["stage2"])
            alone = stage2_alone(models, fine[:N], y[:N], args.seed, stage2)
            to_score["stage 2 alone (real coarse labels)"] = (alone, test_set.y, {})
        facts = describe(samples, models, artifacts)
        bits = bits_per_token(models, fine, y)
        facts |= {"bits_per_token": sum(bits), "bits_per_stage": bits}
        to_score[facts["name"]] = (samples["images"], samples["classes"], facts)
    rows = [
        {"name": name} | score(x[:N], y[:N], judge, real, device) | facts
        for name, (x, y, facts) in to_score.items()
    ]
    protocol = {
        "data": images["data"],
        "num_samples": N,
        "num_real": len(test_set.x),
        "judge_accuracy": class_accuracy(logits, test_set.y),
        "psnr": psnr(test_set.x, reconstructions),
        "device": str(device),
        "clusters": clusters["method"],
        "images_id": images["images_id"],
        "judge_steps": args.judge_steps,
        "seed": args.seed,
    }
    print(f"\n{markdown_table(rows)}\n\n{caption(protocol)}.")
    accuracy = protocol["judge_accuracy"]
    print(f"The judge is right on {accuracy:.2%} of the test images.")
    chance = test_set.y.bincount().max().item() / len(test_set.y)  # the largest class
    if accuracy - chance <= 0.1 * (1 - chance):  # also if there is a single class
        print("warning: it is hardly better than chance, and its scores mean nothing")
    print(f"Reconstructions of all test images: {protocol['psnr']:.2f} dB.")
    path = args.out / "metrics.json"
    temporary = path.with_suffix(".tmp")  # a full disk keeps the old file
    text = json.dumps({"protocol": protocol, "rows": rows}, indent=1)
    temporary.write_text(text + "\n", "utf-8")
    temporary.replace(path)
    print(f"wrote metrics.json to {args.out}")


# --------------------------------------------------------------------------- The table


def caption(protocol):
    """The numbers of images and the data set, the same for all rows."""
    N, all_real = protocol["num_samples"], protocol["num_real"]
    text = f"{N} images per row against {all_real} test images of {protocol['data']}"
    return f"{text} (precision and recall: {N})"


def markdown_table(rows):
    """The rows of metrics.json as a Markdown table, a line for each set of images."""
    head = "images | FD | IS | class accuracy | precision | recall | bits per token"
    lines = [f"| {head} |", "|---" * 7 + "|"]
    for row in rows:
        cells = [row["name"], f"{row['fd']:.2f}", f"{row['inception_score']:.2f}"]
        cells += [f"{row['class_accuracy']:.1%}"]
        cells += [f"{row['precision']:.3f}", f"{row['recall']:.3f}"]
        bits = row.get("bits_per_stage", [])  # of a model
        cells += [" + ".join(f"{value:.2f}" for value in bits)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
