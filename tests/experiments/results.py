"""Tables and figures that need several runs, from what the six scripts wrote.

    results.py loss out/lr*/baseline.pt        # the test loss of trainings
    results.py best out/select                 # samples in it, to choose settings
    results.py mean out/seed*/tuned            # mean ± standard deviation over seeds
    results.py compare out/seed*/tuned         # which model has the lower FD?
    results.py rows out out/M512               # the models run by run
    results.py coarse out                      # bits per coarse label
    results.py refine out                      # the baseline's samples + stage 2
    results.py convergence out/seed1/kept-*    # figure 2
    results.py anatomy out                     # a real image and a sample, step by step

Each but the last prints a Markdown table. For mean, compare, rows and convergence a
path is a folder with a metrics.json, or a copy of that file. reproduce.sh makes its
tables with it.
"""

import argparse
import contextlib
import functools
import json
import math
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import permutation_test, ttest_ind

# isort: off
sys.path.insert(0, str(Path(__file__).parents[2]))
from tokenizer import fail, find, load, picture, restore
from cluster import swapped_images
from ar_model import Sampling, mean_loss
from sample import load_models, name_of
from evaluate import Classifier, caption, look, sample_sets, score, stage2_alone

CPU = torch.device("cpu")
SCORES = ["fd", "inception_score", "class_accuracy", "precision", "recall"]
HEAD = ["FD", "IS", "class accuracy", "precision", "recall"]
COSTS = ["bits per token", "training s"]

# ------------------------------------------------------------------- From metrics.json


def read(paths, *also):
    """The metrics.json of each path. Fails if one is missing, or if the runs were not
    judged alike. also: more facts of the protocol that must be equal."""
    files = [p if p.suffix == ".json" else p / "metrics.json" for p in paths]
    for file in files:
        if not file.exists():
            fail(f"{file} is missing: run python evaluate.py first")
    runs = [json.loads(file.read_text("utf-8")) for file in files]
    alike = "images_id", "num_samples", "judge_steps", "judge_accuracy", "device"
    for key in (*alike, *also):
        same(f"{key} of the runs", [run["protocol"][key] for run in runs])
    return runs


def same(what, values):
    """Fails unless all values are equal."""
    for value in values:
        if value != values[0]:
            fail(f"not comparable: {what} is {values[0]} and {value}")


def rows_of(run):
    """The rows of models and of stage 2 alone. (The others need neither.)"""
    of_model = lambda row: "model" in row or row["name"].startswith("stage 2")
    return [row for row in run["rows"] if of_model(row)]


def by_name(paths):
    """{name: [its rows, one per run]}; the name of a model includes its steps. Fails if
    the rows of a model differ in parameters or sampling, or if a run is given twice.
    (Learning rates are not in metrics.json.)"""
    found = {}
    for run in read(paths, "clusters", "seed"):
        for row in rows_of(run):
            steps = " + ".join(map(str, row.get("steps", [])))
            name = f"{row['name']}, {steps} steps" if steps else row["name"]
            found.setdefault(name, []).append(row)
    for name, own in found.items():
        for key in ("seed", "parameters", "stage1", "stage2"):
            what = "sampling seed" if key == "seed" else key
            same(f"{what} of {name}", [row.get(key) for row in own])
        if "model" in own[0] and len({row["fd"] for row in own}) < len(own):
            fail(f"two runs of {name} have the same FD: one run is given twice")
    return found


def mean(paths):
    """Mean and standard deviation of each row over runs; all must have the same rows."""
    found = by_name(paths)
    for name, own in found.items():
        if len(own) < len(paths):
            fail(f"not comparable: {len(own)} of {len(paths)} runs have a row {name}")
    body = [[name, *score_cells(own), *cost_cells(own)] for name, own in found.items()]
    text = table(["images", *HEAD, *COSTS], body)
    spread = f"; mean ± standard deviation of {len(paths)} runs" * (len(paths) > 1)
    return f"{text}\n\n{caption(read(paths)[0]['protocol'])}{spread}."


def compare(paths):
    """For each pair of models: which one has the lower FD, over training seeds?"""
    models = {k: own for k, own in by_name(paths).items() if "model" in own[0]}
    distances = {name: [row["fd"] for row in own] for name, own in models.items()}
    body = []
    for (one, a), (other, b) in combinations(distances.items(), 2):
        if min(len(a), len(b)) < 2:
            fail(f"{one}, {other}: an interval needs two runs of each")
        ratio, low, high, p = ratio_of_means(a, b)
        verdict = "ahead" if high < 1 else "behind" if low > 1 else "level"
        cells = f"{ratio:.2f}", f"{low:.2f} to {high:.2f}", f"{p:.3f}", verdict
        body.append([one, other, f"{len(a)}, {len(b)}", *cells])
    head = ["images", "compared with", "runs", "ratio of FD", "95% interval", "p"]
    return table([*head, "verdict"], body)


def ratio_of_means(a, b):
    """The ratio of the geometric means of a and b; the ends of its 95% interval (Welch,
    on logarithms: the variances may differ); and p of the exact permutation test, two-
    sided, of the difference of the mean logarithms."""
    a, b = np.log(a), np.log(b)
    interval = ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    difference = lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis)
    test = permutation_test((a, b), difference, vectorized=True, n_resamples=np.inf)
    logs = a.mean() - b.mean(), interval.low, interval.high
    return *(math.exp(value) for value in logs), float(test.pvalue)


def rows(paths):
    """The scores run by run."""
    body = []
    for path, run in zip(paths, read(paths)):
        name = str(path).removesuffix(".json")
        for row in rows_of(run):
            body.append([name, row["name"], *score_cells([row]), *cost_cells([row])])
    return table(["run", "images", *HEAD, *COSTS], body)


def convergence(paths):
    """convergence.png beside the runs, the copies that --keep left: FD and Inception
    Score over steps and seconds (the paper's figure 2)."""
    models = [row for run in read(paths) for row in run["rows"] if "model" in row]
    models.sort(key=lambda row: row["steps"][0])
    colors = {"ctf": "tab:orange", "baseline": "tab:blue"}
    file = paths[0].parent / "convergence.png"
    with picture(file, 12, 7.5) as figure:
        figure.suptitle("Samples during training: the same runs over steps and seconds")
        left, right = figure.subplots(2, 2).T
        for name in dict.fromkeys(row["name"] for row in models):
            own = [row for row in models if row["name"] == name]
            color = colors[own[0]["model"]]
            style = {"marker": "o", "color": color, "label": name}
            steps = [row["steps"][0] for row in own]
            seconds = [row["train_seconds"] for row in own]
            for (above, below), xs in ((left, steps), (right, seconds)):
                above.semilogy(xs, [row["fd"] for row in own], **style)
                below.plot(xs, [row["inception_score"] for row in own], **style)
        labels = "steps of stage 1 or baseline", "training seconds"
        for (above, below), xlabel in zip((left, right), labels):
            above.set(xlabel=xlabel, ylabel="FD (log scale): lower is better")
            above.yaxis.set_major_formatter("{x:g}")
            above.yaxis.set_minor_formatter("")
            below.set(xlabel=xlabel, ylabel="Inception Score: higher is better")
        # The names are wider than a panel, and the same in all of them.
        lines = left[0].get_lines()
        figure.legend(handles=lines, loc="outside lower center", ncols=len(lines))
    return f"{rows(paths)}\n\n{file} shows them."


# -------------------------------------------------------------- From the .pt artifacts


def loss(paths):
    """The last test loss of trainings, beside their learning rates and steps."""
    body = []
    for path in paths:
        if not path.exists():
            fail(f"{path} is missing")
        run = load(path.parent, path.name)
        settings, last = run["settings"], run["history"]["test"][-1]
        steps = f"{last['step']} of {settings['steps']}"
        losses = f"{last['loss']:.3f}", f"{last['bits']:.3f}"
        rate, seconds = f"{settings['lr']:g}", f"{run['seconds']:.0f}"
        body.append([str(path), rate, steps, *losses, seconds])
    return table(["file", "lr", "steps", "nats", "bits", "training s"], body)


@functools.cache
def reference(path, split):
    """The judge beside path, an images.pt, and its features (N', F) of the images to
    compare with: all test images, or the first 5,000 training images."""
    images = load(path.parent, path.name)
    if not path.with_name("classifier.pt").exists():
        fail(f"{path.parent} has no judge: run python evaluate.py there first")
    saved = load(path.parent, "classifier.pt", images_id=images["images_id"])
    judge = restore(Classifier(len(images["class_names"])), saved, CPU)
    x = images["test"].x if split == "test" else images["train"].x[:5000]
    return judge, look(judge, x, CPU)[0]


def scores(folder, images, y, split="test"):
    """The scores of images of classes y, compared with the images.pt of folder."""
    judge, real = reference(find(folder, "images.pt"), split)
    return score(images, y, judge, real, CPU)


def best(folders):
    """The scores of all sample files in and below folders, the lowest FD of each model
    first, to choose settings: compared with *training* images, since test images are
    for what is reported."""
    paths = sorted({p for folder in folders for p in folder.rglob("samples*.pt")})
    if not paths:
        fail("there are no samples in these folders: run python sample.py first")
    found, sub_folders = [], sorted({path.parent for path in paths})
    sources = [find(folder, "images.pt").resolve() for folder in sub_folders]
    same("the images.pt of the samples", sources)
    for path in paths:
        samples = torch.load(path, map_location="cpu", weights_only=True)
        images, y = samples["images"], samples["classes"]
        own = scores(path.parent, images, y, "train")
        found.append([name_of(samples), path.parent, samples["seed"], len(images), own])
    same("the number of images", [N for *_, N, _ in found])
    found.sort(key=lambda row: (row[0].partition(", guidance")[0], row[-1]["fd"]))
    body = [[*map(str, facts), *score_cells([own])] for *facts, own in found]
    return table(["images", "folder", "sampling seed", "N", *HEAD], body)


@torch.no_grad()
def coarse(folders):
    """Bits per coarse label of test images: under stage 1, which has seen the coarse
    labels before a token; under the baseline, which has seen the fine labels (p(cluster)
    is the sum of p(code) over its codes); and given the class alone, for fine labels,
    too: a model with fewer bits has learnt from other tokens."""
    body = []
    for folder in folders:
        models, made = load_models(folder, "ctf", CPU)
        baseline = load_models(folder, "baseline", CPU)[0].ar
        g, M = models.aux.code_to_cluster, len(models.aux.members)
        ids = {"codebook_id": made["vqvae"]["codebook_id"]}
        tokens = load(folder, "tokens.pt", **ids)
        (seen, seen_y), (fine, y) = tokens["train"], tokens["test"]
        bits = [mean_loss(models.ar, g[fine], y) / math.log(2), 0]
        for part, part_y in zip(fine.split(16), y.split(16)):
            p = baseline(part[:, :-1], part_y).softmax(dim=-1)  # (B, T, K)
            p = torch.zeros(*part.shape, M).index_add_(2, g, p)  # (B, T, M)
            own = p.gather(2, g[part][..., None]).log2().sum().item()
            bits[1] -= own / fine.numel()
        bits += [unigram_bits(g[seen], seen_y, g[fine], y, M)]
        bits += [unigram_bits(seen, seen_y, fine, y, len(g))]
        body.append([str(folder), *(f"{value:.3f}" for value in bits)])
    head = ["folder", "stage 1", "baseline, summed", "given the class", "fine labels"]
    return table(head, body)


def unigram_bits(seen, seen_y, labels, y, V):
    """The bits per label of labels (N, T), 0 .. V - 1, if p(label | class y) is how
    often the label has the class in seen, plus one."""
    C = int(seen_y.max()) + 1
    pairs = (seen + V * seen_y[:, None]).flatten()
    counts = 1.0 + pairs.bincount(minlength=C * V).view(C, V)
    p = counts / counts.sum(dim=1, keepdim=True)
    return -p[y[:, None], labels].log2().mean().item()


def refine(folders):
    """The scores of the baseline's samples as they are, and with the fine labels that
    stage 2 gives to their coarse labels. Which of the two are at fault?"""
    body = []
    for folder in folders:
        sets = {samples["model"]: samples for samples, *_ in sample_sets(folder, CPU)}
        if "baseline" not in sets:
            fail(f"{folder} has no samples-baseline.pt")
        images, fine, y = map(sets["baseline"].get, ("images", "fine", "classes"))
        found, (models, _) = {"baseline": images}, load_models(folder, "ctf", CPU)
        for how, stage2 in (("argmax", Sampling(top_k=1)), ("sampled", Sampling())):
            name = f"its coarse labels, {how} fine labels of stage 2"
            found[name] = stage2_alone(models, fine, y, 0, stage2)
        for name, x in found.items():
            body.append([str(folder), name, *score_cells([scores(folder, x, y)])])
    return table(["folder", "images", *HEAD], body)


# ------------------------------------------------------------- One image, step by step


@torch.no_grad()
def anatomy(folders):
    """anatomy.png in each folder: a row of panels for the first image of samples.pt,
    and for a test image of its class."""
    files = []
    for folder in folders:
        samples, models, made = sample_sets(folder, CPU)[0]
        if samples["model"] != "ctf":
            fail(f"{folder} has no samples.pt")
        ids = {key: made["vqvae"][key] for key in ("images_id", "codebook_id")}
        images, tokens = load(folder, "images.pt"), load(folder, "tokens.pt", **ids)
        if load(folder, "clusters.pt")["method"] == "random":
            fail(f"{folder} has random clusters: anatomy needs those of k-means")
        y = samples["classes"][:1]
        i = (tokens["test"].y == y).nonzero()[0, 0]
        rows = {"a real image": (images["test"].x[i], tokens["test"].x[i : i + 1])}
        rows["a sample"] = (samples["images"][0], samples["fine"][:1])
        most_bits = math.log2(max(models.aux.members.shape))  # of M clusters or S codes
        files.append(folder / "anatomy.png")
        with picture(files[-1], 13, 4.5) as figure:
            name = tokens["class_names"][y]
            figure.suptitle(f"class {name}: {' and '.join(rows)}")
            for axes, (name, row) in zip(figure.subplots(2, 7), rows.items()):
                shown = panels(models, *row, y, np.random.default_rng(0))
                for ax, (title, panel) in zip(axes, shown.items()):
                    ax.set(xticks=[], yticks=[], frame_on=False, title=title)
                    last = ax.imshow(panel, vmin=0, vmax=most_bits)  # (of entropies)
                axes[0].set_title(name)
                # The last panel is an entropy. All entropies have the same scale.
                figure.colorbar(last, ax=axes, label="entropy, bits")
    return "\n".join(map(str, files))


def panels(models, image, fine, y, rng):
    """What anatomy.png shows of one image: {title: picture}.

    image uint8 (H, W, 3), its fine labels (1, T) and class y (1,). The pictures are
    images (H, W, rgb), colours of tokens (h, w, rgb) and entropies in bits (h, w).
    """
    vqvae, aux, grid = models.vqvae, models.aux, models.vqvae.grid
    g = aux.code_to_cluster
    coarse = g[fine]  # (1, T)
    color = code_colors(vqvae.codebook)  # (K, rgb)
    means = torch.stack([color[g == m].mean(dim=0) for m in range(len(aux.members))])
    shown = {
        "pixels": image,
        "fine labels": color[fine[0]].view(*grid, 3),
        "coarse labels": means[coarse[0]].view(*grid, 3),
    }
    own = g.numpy()
    for name, clusters in (("k-means", own), ("random", rng.permutation(own))):
        swapped = swapped_images(vqvae, fine, clusters, rng)
        shown[f"swapped within\n{name} clusters"] = swapped[0]
    logits = models.ar(coarse[:, :-1], y), aux(coarse, y)
    for stage, stage_logits in enumerate(logits, start=1):
        bits = entropy(stage_logits[0])  # (T,)
        name = f"entropy of stage {stage}\nmean {bits.mean():.1f} bits"
        shown[name] = bits.view(grid)
    return {name: panel.numpy() for name, panel in shown.items()}


def entropy(logits):
    """The entropy in bits (...,) of softmax(logits) (..., V)."""
    return torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1) / math.log(2)


def code_colors(codebook):
    """A colour for each code of (K, d): (K, rgb), 0..1. Similar codes look alike: red,
    green and blue are the ranks along the first three principal components."""
    centred = codebook - codebook.mean(dim=0)
    components = torch.linalg.svd(centred, full_matrices=False).Vh[:3]  # (3, d)
    ranks = (centred @ components.T).argsort(dim=0).argsort(dim=0)  # (K, 3)
    return F.pad(ranks / len(codebook), (0, 3 - ranks.shape[1]))  # if d is 2


# ----------------------------------------------------------------------------- As text


def table(head, body):
    """A Markdown table of cells."""
    lines = [f"| {' | '.join(line)} |" for line in [head, *body]]
    lines.insert(1, "|---" * len(head) + "|")
    return "\n".join(lines)


def score_cells(own):
    """The SCORES of several runs as text: mean ± standard deviation (n - 1)."""
    cells = []
    for key, digits in zip(SCORES, (2, 2, 1, 3, 3)):
        percent = key == "class_accuracy"
        values = np.array([row[key] for row in own]) * (100 if percent else 1)
        spread = f" ± {values.std(ddof=1):.{digits}f}" if len(own) > 1 else ""
        cells.append(f"{values.mean():.{digits}f}{spread}{'%' * percent}")
    return cells


def cost_cells(own):
    """The mean bits per stage and training seconds as text; nothing for no model."""
    if "model" not in own[0]:
        return "", ""
    bits = np.mean([row["bits_per_stage"] for row in own], axis=0)
    seconds = np.mean([row["train_seconds"] for row in own])
    return " + ".join(f"{value:.2f}" for value in bits), f"{seconds:.0f}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = [loss, best, mean, compare, rows, coarse, refine, convergence, anatomy]
    commands = {command.__name__: command for command in commands}
    parser.add_argument("what", choices=commands)
    parser.add_argument("paths", type=Path, nargs="+", help="runs (loss: .pt files)")
    args = parser.parse_args(argv)
    with contextlib.redirect_stdout(sys.stderr):  # "using out/..."
        text = commands[args.what](args.paths)
    print(text)


if __name__ == "__main__":
    main()
