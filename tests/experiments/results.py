"""Tables and figures that need several folders, from what the six scripts wrote there.

    python tests/results.py loss out/lr*/baseline.pt        # test loss of trainings
    python tests/results.py best out/search                 # scores of samples in it
    python tests/results.py mean out out/seed1 out/seed2    # mean ± deviation
    python tests/results.py rows out out/M512               # the model rows of folders
    python tests/results.py coarse out                      # bits per coarse label
    python tests/results.py refine out                      # baseline + stage 2
    python tests/results.py convergence out                 # figure 2, from out/kept-*

Each prints a Markdown table. tests/reproduce.sh calls it for every table of RESULTS.md.
"""

import argparse
import functools
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
import evaluate
import sample
import tokenizer
from ar_model import mean_loss
from aux_model import predict_fine

CPU = torch.device("cpu")
SCORES = ["fd", "inception_score", "class_accuracy", "precision", "recall"]
HEAD = ["FD", "IS", "class accuracy", "precision", "recall"]


def table(head, rows):
    """A Markdown table of cells."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def loss(paths):
    """The last test loss of trainings, beside their learning rates and steps."""
    runs = [torch.load(path, map_location="cpu", weights_only=True) for path in paths]
    rows = []
    for path, run in zip(paths, runs):
        last = run["history"]["test"][-1]
        steps = f"{last['step']} of {run['settings']['steps']}"
        numbers = f"{last['loss']:.3f}", f"{last['bits']:.3f}", f"{run['seconds']:.0f}"
        rows.append([str(path), f"{run['settings']['lr']:g}", steps, *numbers])
    return table(["file", "lr", "steps", "nats", "bits", "seconds"], rows)


@functools.cache
def judge_of(path):
    """The judge that evaluate.py has trained beside path, an images.pt; and the
    features of its test images."""
    data = torch.load(path, weights_only=True)
    judge = evaluate.Classifier(len(data["class_names"]))
    judge.load_state_dict(torch.load(path.with_name("classifier.pt"))["model"])
    judge = tokenizer.to_device(judge.eval(), CPU)
    return judge, evaluate.look(judge, data["test"][0], CPU)[0]


def scores(folder, images, y):
    """The scores of images of classes y, compared with the images.pt of folder."""
    judge, real = judge_of(tokenizer.find(folder, "images.pt"))
    return evaluate.measure(images, y, judge, real, CPU)


def best(folders):
    """The scores of all sample files below folders, the lowest FD of each model first:
    to choose settings. (evaluate.py measures more, which takes longer.)"""
    found = []
    for path in [path for folder in folders for path in folder.rglob("samples*.pt")]:
        samples = torch.load(path, map_location="cpu", weights_only=True)
        own = scores(path.parent, samples["images"], samples["classes"])
        found.append((sample.name_of(samples), own))
    found.sort(key=lambda pair: (pair[0].partition(", guidance")[0], pair[1]["fd"]))
    cells = [[name, *(number([own[k]], k) for k in SCORES)] for name, own in found]
    return table(["images", *HEAD], cells)


@torch.no_grad()
def refine(folders):
    """A control without training: the baseline's samples as they are, and with the fine
    labels that stage 2 gives to their coarse labels. Which of the two is at fault?"""
    cells = []
    for folder in folders:
        path = folder / "samples-baseline.pt"
        samples = torch.load(path, map_location="cpu", weights_only=True)
        y = samples["classes"]
        models, _ = sample.load_models(folder, "ctf", CPU)
        found = {"baseline": scores(folder, samples["images"], y)}
        coarse = models["aux"].code_to_cluster[samples["fine"]]
        for how, top_k in (("argmax", 1), ("sampled", 0)):
            generator = torch.Generator().manual_seed(0)
            fine = [
                predict_fine(models["aux"], c, own_y, generator, top_k=top_k)
                for c, own_y in zip(coarse.split(100), y.split(100))
            ]
            images = tokenizer.reconstruct(models["vqvae"], torch.cat(fine))
            name = f"its coarse labels, {how} fine labels of stage 2"
            found[name] = scores(folder, images, y)
        for name, own in found.items():
            numbers = (number([own[key]], key) for key in SCORES)
            cells.append([str(folder), name, *numbers])
    return table(["folder", "images", *HEAD], cells)


def read(folders):
    """The metrics.json of each folder."""
    return [
        json.loads((folder / "metrics.json").read_text("utf-8")) for folder in folders
    ]


def number(values, key):
    """One score of several seeds as text: mean ± sample standard deviation."""
    percent = key == "class_accuracy"
    values = 100 * np.array(values) if percent else np.array(values)
    digits = 1 if percent else 3 if key in ("precision", "recall") else 2
    text = f"{values.mean():.{digits}f}"
    if len(values) > 1:
        text += f" ± {values.std(ddof=1):.{digits}f}"
    return text + "%" * percent


def mean(folders):
    """Mean and standard deviation of the rows that have the same name in all folders.
    Fails if the folders were not judged alike."""
    runs = read(folders)
    same = ("data", "num_samples", "num_real", "steps", "images_id", "clusters")
    protocols = [[run["protocol"][key] for key in same] for run in runs]
    if any(protocol != protocols[0] for protocol in protocols):
        sys.exit("error: the folders differ in images, numbers of images or judge")
    rows = []
    for row in runs[0]["rows"]:
        found = [[r for r in run["rows"] if r["name"] == row["name"]] for run in runs]
        if not all(found):
            sys.exit(f"error: not every folder has a row called {row['name']}")
        seeds = [own[0] for own in found]
        cells = [row["name"]]
        cells += [number([seed[key] for seed in seeds], key) for key in SCORES]
        if "model" in row:
            stages = np.array([seed["bits_per_stage"] for seed in seeds]).mean(axis=0)
            cells.append(" + ".join(f"{bits:.2f}" for bits in stages))
            cells.append(f"{np.mean([seed['train_seconds'] for seed in seeds]):.0f}")
        else:
            cells += ["", ""]
        rows.append(cells)
    text = table(["images", *HEAD, "bits per token", "training s"], rows)
    return f"{text}\n\n{len(runs)} runs; {evaluate.caption(runs[0]['protocol'])}"


def rows(folders):
    """The rows of models and of stage 2 alone in each folder."""
    cells = []
    for folder, run in zip(folders, read(folders)):
        for row in run["rows"]:
            if "model" in row or row["name"].startswith("stage 2"):
                scores = [number([row[key]], key) for key in SCORES]
                bits = row.get("bits_per_stage", [])
                text = " + ".join(f"{value:.2f}" for value in bits)
                seconds = f"{row['train_seconds']:.0f}" if bits else ""
                cells.append([str(folder), row["name"], *scores, text, seconds])
    head = ["folder", "images", *HEAD, "bits per token", "training s"]
    return table(head, cells)


@torch.no_grad()
def coarse(folders):
    """A control without training: the bits per coarse label of stage 1, and those of
    the baseline, whose p(cluster) is the sum of p(code) over the codes of the cluster.
    Stage 1 has seen the coarse labels before a token, the baseline the fine labels."""
    cells = []
    for folder in folders:
        models, _ = sample.load_models(folder, "ctf", CPU)
        g, stage1 = models["aux"].code_to_cluster, models["ar"]
        baseline = sample.load_models(folder, "baseline", CPU)[0]["ar"]
        _, (fine, y), _ = tokenizer.load_examples(folder, "tokens.pt")
        nats = mean_loss(stage1, g[fine], y)
        own = []
        for part, part_y in zip(fine.split(64), y.split(64)):
            p = baseline(part[:, :-1], part_y).softmax(dim=-1)  # (B, T, K)
            shape = (*part.shape, len(models["aux"].members))
            p = torch.zeros(shape).index_add_(2, g, p)  # (B, T, M)
            own.append(-p.gather(2, g[part][..., None]).log().flatten())
        bits = nats / math.log(2), torch.cat(own).mean().item() / math.log(2)
        cells.append([str(folder), *(f"{value:.3f}" for value in bits)])
    return table(["bits per coarse label", "stage 1", "baseline, summed"], cells)


def convergence(folders):
    """convergence.png in the folder: FD and Inception Score over steps and seconds of
    the copies that --keep left (the paper's figure 2)."""
    (out,) = folders
    kept = sorted(out.glob("kept-*/metrics.json"))
    models = [row for run in read([p.parent for p in kept]) for row in run["rows"]]
    models = [row for row in models if "model" in row]
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    figure.suptitle(
        "Samples during training: the same runs over steps and over seconds"
    )
    labels = {"fd": "FD (log scale): lower is better"}
    labels["inception_score"] = "Inception Score: higher is better"
    names = list(dict.fromkeys(row["name"] for row in models))
    for axes, score in zip(figure.subplots(2, 2), labels):
        for ax, x in zip(axes, ("steps of stage 1 or baseline", "training seconds")):
            for name in names:
                own = [row for row in models if row["name"] == name]
                steps = [row["steps"][0] for row in own]
                seconds = [row["train_seconds"] for row in own]
                xs = steps if x.startswith("steps") else seconds
                ys = [row[score] for row in own]
                ax.plot(xs, ys, marker="o", color=evaluate.color_of(name), label=name)
            ax.set(xlabel=x, ylabel=labels[score])
            ax.legend()
            if score == "fd":
                ax.set_yscale("log")
                ax.yaxis.set_major_formatter("{x:g}")
                ax.yaxis.set_minor_formatter("")
    figure.savefig(out / "convergence.png")
    return rows([p.parent for p in kept]) + f"\n\nwrote {out / 'convergence.png'}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = {"loss": loss, "best": best, "mean": mean, "rows": rows}
    commands |= {"coarse": coarse, "refine": refine, "convergence": convergence}
    parser.add_argument("what", choices=commands)
    parser.add_argument("paths", type=Path, nargs="+", help="folders (loss: .pt files)")
    args = parser.parse_args(argv)
    print(commands[args.what](args.paths))


if __name__ == "__main__":
    main()
