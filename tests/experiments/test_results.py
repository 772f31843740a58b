"""The tables over several runs, and the script that makes them."""

import itertools
import json
import math
import re
from glob import glob

import benchmark
import numpy as np
import pytest
import results
import scipy.special
import scipy.stats
import torch
from conftest import CLASSES, ROOT, G, K, M, edit, error_of, noisy

import evaluate
import tokenizer
from ar_model import Sampling
from aux_model import predict_fine
from cluster import swap_within_clusters
from sample import load_models, sample_batches


def run(folder, base, stage1=2.0, rows=slice(None), steps=(4, 2), seed=0, **protocol):
    """folder with a metrics.json of four rows; every number in it is different."""
    found = []
    for i, name in enumerate(["real images", "stage 2 alone", "CTF", "baseline"]):
        x = base + i
        own = {"name": name, "fd": x, "inception_score": 10 + x}
        own |= {"class_accuracy": x / 100, "precision": x / 50, "recall": x / 40}
        if i > 1:
            bits = [base, base + 0.5] if i == 2 else [20 + base]
            own |= {"model": name.lower(), "seed": seed, "steps": list(steps)[: 4 - i]}
            own |= {"bits_per_stage": bits, "train_seconds": 10**i * base}
            own |= {"parameters": i, "stage1": {"cfg_scale": stage1}, "stage2": {}}
        found.append(own)
    facts = {"data": "pets", "num_samples": 16, "num_real": 24, "judge_steps": 800}
    facts |= {"images_id": "the-images", "judge_accuracy": 0.9, "device": "cpu"}
    facts |= {"clusters": "kmeans", "seed": 0}
    folder.mkdir(exist_ok=True)
    text = json.dumps({"protocol": facts | protocol, "rows": found[rows]})
    (folder / "metrics.json").write_text(text)
    return folder


def test_mean_and_standard_deviation_over_runs(tmp_path):
    # Of 1, 2, 6: the squared distances from 3 are 4, 1 and 9, over n - 1 = 2.
    assert (
        results.mean([run(tmp_path / f"{base}", base) for base in (1, 2, 6)])
        == """\
| images | FD | IS | class accuracy | precision | recall | bits per token | training s |
|---|---|---|---|---|---|---|---|
| stage 2 alone | 4.00 ± 2.65 | 14.00 ± 2.65 | 4.0 ± 2.6% | 0.080 ± 0.053 | \
0.100 ± 0.066 |  |  |
| CTF, 4 + 2 steps | 5.00 ± 2.65 | 15.00 ± 2.65 | 5.0 ± 2.6% | 0.100 ± 0.053 | \
0.125 ± 0.066 | 3.00 + 3.50 | 300 |
| baseline, 4 steps | 6.00 ± 2.65 | 16.00 ± 2.65 | 6.0 ± 2.6% | 0.120 ± 0.053 | \
0.150 ± 0.066 | 23.00 | 3000 |

16 images per row against 24 test images of pets (precision and recall: 16); \
mean ± standard deviation of 3 runs."""
    )


def test_rows_run_by_run_of_folders_and_of_copied_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (run(tmp_path / "b", 2) / "metrics.json").rename("b.json")
    run(tmp_path / "a", 1)
    assert (
        results.rows([results.Path("a"), results.Path("b.json")])
        == """\
| run | images | FD | IS | class accuracy | precision | recall | bits per token | \
training s |
|---|---|---|---|---|---|---|---|---|
| a | stage 2 alone | 2.00 | 12.00 | 2.0% | 0.040 | 0.050 |  |  |
| a | CTF | 3.00 | 13.00 | 3.0% | 0.060 | 0.075 | 1.00 + 1.50 | 100 |
| a | baseline | 4.00 | 14.00 | 4.0% | 0.080 | 0.100 | 21.00 | 1000 |
| b | stage 2 alone | 3.00 | 13.00 | 3.0% | 0.060 | 0.075 |  |  |
| b | CTF | 4.00 | 14.00 | 4.0% | 0.080 | 0.100 | 2.00 + 2.50 | 200 |
| b | baseline | 5.00 | 15.00 | 5.0% | 0.100 | 0.125 | 22.00 | 2000 |"""
    )


@pytest.mark.parametrize(
    ("what", "other"),
    [
        ("num_samples", {"num_samples": 17}),
        ("images_id", {"images_id": "others"}),
        ("judge_accuracy", {"judge_accuracy": 0.8}),
        ("clusters", {"clusters": "random"}),
        ("1 of 2 runs .* 4 . 2 steps", {"steps": (5, 2)}),
        ("1 of 2 runs .* baseline", {"rows": slice(3)}),
        ("sampling seed", {"seed": 1}),
        ("stage1", {"stage1": 3.0}),
        ("same FD", {"base": 1}),
    ],
)
def test_runs_that_are_not_alike_are_not_averaged(tmp_path, what, other):
    runs = [run(tmp_path / "a", 1), run(tmp_path / "b", **{"base": 2} | other)]
    with pytest.raises(SystemExit, match=f"error: .*{what}"):
        results.mean(runs)


def test_a_run_given_twice_and_a_missing_run_are_refused(tmp_path, capsys):
    a, c = run(tmp_path / "a", 1), run(tmp_path / "c", 5)
    for other, text in (
        (a / "b", "b/metrics.json is missing"),
        (a / "." / "", "twice"),
    ):
        assert text in error_of(capsys, results.main, "mean", a, c, other)[1]


@pytest.mark.parametrize(
    ("scale", "verdict"),
    [(0.3, "ahead"), (3, "behind"), (0.9, "level"), (1.2, "level")],
)
def test_comparison_by_welchs_interval_and_the_exact_permutation_test(
    tmp_path, scale, verdict
):
    a, b = scale * np.array([1.0, 1.1, 1.3, 1.2, 0.8]), np.array([2.0, 0.7, 1.1, 0.9])
    names = [tmp_path / f"{i}" for i in range(9)]
    folders = [run(f, x - 2, rows=slice(2, 3)) for f, x in zip(names, a)]
    folders += [run(f, x - 3, rows=slice(3, 4)) for f, x in zip(names[5:], b)]
    cells = [cell.strip() for cell in results.compare(folders).split("|")[-8:-1]]
    x, y = np.log(a), np.log(b)
    parts = x.var(ddof=1) / 5, y.var(ddof=1) / 4
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 4 + parts[1] ** 2 / 3)  # Welch
    half = scipy.stats.t.ppf(0.975, freedom) * math.sqrt(sum(parts))
    gap, everything = x.mean() - y.mean(), np.concatenate([x, y])
    gaps = []
    for chosen in itertools.combinations(range(9), 5):
        rest = np.delete(everything, chosen)
        gaps.append(everything[list(chosen)].mean() - rest.mean())
    shares = (
        np.mean(np.array(gaps) <= gap + 1e-9),
        np.mean(np.array(gaps) >= gap - 1e-9),
    )
    low, high = math.exp(gap - half), math.exp(gap + half)
    numbers = f"{math.exp(gap):.2f}", f"{low:.2f} to {high:.2f}"
    assert cells[:4] == ["CTF, 4 + 2 steps", "baseline, 4 steps", "5, 4", numbers[0]]
    assert cells[4:] == [numbers[1], f"{min(1, 2 * min(shares)):.3f}", verdict]


def test_an_interval_needs_two_runs(tmp_path):
    of_ctf = run(tmp_path / "b", 2, rows=slice(3))
    with pytest.raises(SystemExit, match="two runs"):
        results.compare([run(tmp_path / "a", 1), of_ctf])


def test_loss_is_that_of_the_last_save(tmp_path, capsys):
    for name, n in (("coarse", 1), ("fine", 2)):
        first = {"step": n, "loss": n + 0.1, "bits": n + 0.2}
        last = {"step": n + 5, "loss": n + 0.3, "bits": n + 0.4}
        made = {"settings": {"lr": n / 1000, "steps": n + 6}, "seconds": n + 7.0}
        made |= {"step": n + 5, "history": {"test": [first, last]}}
        torch.save(made, tmp_path / f"{name}.pt")
    results.main(["loss", f"{tmp_path}/coarse.pt", f"{tmp_path}/fine.pt"])
    assert capsys.readouterr().out == (  # without what load says
        "| file | lr | steps | nats | bits | training s |\n"
        "|---|---|---|---|---|---|\n"
        f"| {tmp_path}/coarse.pt | 0.001 | 6 of 7 | 1.300 | 1.400 | 8 |\n"
        f"| {tmp_path}/fine.pt | 0.002 | 7 of 8 | 2.300 | 2.400 | 9 |\n"
    )


def with_judge(folder, train=None):
    """folder with classifier.pt; the judge and a function: images -> its features."""
    judge = noisy(evaluate.Classifier(CLASSES))
    ids = {"images_id": "the-images"}
    torch.save(ids | {"model": judge.state_dict()}, folder / "classifier.pt")
    return judge, lambda images: evaluate.look(judge, images, results.CPU)[0]


def cells_of(own):
    """Scores as a table has them."""
    cells = f"{own['fd']:.2f}", f"{own['inception_score']:.2f}"
    cells += (f"{own['class_accuracy']:.1%}", f"{own['precision']:.3f}")
    return " | ".join([*cells, f"{own['recall']:.3f}"])


def test_the_best_settings_are_those_nearest_to_5000_training_images(out, capsys):
    rng = np.random.default_rng(0)
    noise = lambda n, most: torch.from_numpy(rng.integers(most, size=(n, 8, 8, 3)))
    train = torch.cat([noise(5000, 250), noise(20, 2)]).byte()
    y = torch.arange(5020) % CLASSES
    test = (noise(30, 90).byte(), torch.arange(30) % CLASSES)
    made = torch.load(out / "images.pt", weights_only=True) | {"test": test}
    torch.save(made | {"train": (train, y)}, out / "images.pt")
    judge, features = with_judge(out)
    real, lines = features(train[:5000]), {}
    kinds = {"c": ("ctf", 1, 100), "a": ("ctf", 3, 200), "b": ("baseline", 2, 240)}
    for seed, (name, (model, scale, most)) in enumerate(kinds.items()):
        folder = out / "search" / name
        folder.mkdir(parents=True)
        images, classes = noise(40, most).byte(), torch.arange(40) * 2 % CLASSES
        stages = {"stage1": vars(Sampling(scale)), "stage2": vars(Sampling())}
        if model == "baseline":
            stages["stage2"] = {}
        samples = {"images": images, "classes": classes, "seed": seed} | stages
        torch.save(samples, folder / f"samples{'-' + model if seed == 2 else ''}.pt")
        own = evaluate.score(images, classes, judge, real, results.CPU)
        text = "baseline" if seed == 2 else "CTF, sampled fine labels"
        line = (
            f"| {text}, guidance {scale} | {folder} | {seed} | 40 | {cells_of(own)} |"
        )
        lines[name] = own["fd"], line
    assert lines["a"][0] < lines["c"][0]
    head = "images | folder | sampling seed | N | FD | IS | class accuracy | precision"
    expected = [f"| {head} | recall |", "|---" * 9 + "|"]
    expected += [lines[name][1] for name in "acb"]
    assert results.best([out / "search", out]).splitlines() == expected
    few = {"images": images[:9], "classes": classes[:9]}
    torch.save(samples | few, out / "search" / "samples.pt")
    assert "40 and 9" in error_of(capsys, results.main, "best", out / "search")[1]
    (out / "search" / "a" / "images.pt").touch()  # other images
    message = error_of(capsys, results.main, "best", out / "search")[1]
    assert "not comparable: the images.pt" in message
    (out / "nothing").mkdir()
    assert "no samples" in error_of(capsys, results.main, "best", out / "nothing")[1]


@torch.no_grad()
def test_bits_per_coarse_label_against_loops(trained):
    models = load_models(trained, "ctf", results.CPU)[0]
    baseline = load_models(trained, "baseline", results.CPU)[0].ar
    tokens = torch.load(trained / "tokens.pt", weights_only=True)
    (seen, seen_y), (fine, y) = tokens["train"], tokens["test"]
    coarse = models.ar(G[fine][:, :-1], y).double().log_softmax(dim=-1)
    p = baseline(fine[:, :-1], y).double().softmax(dim=-1)
    totals = np.zeros(4)
    for i, t in itertools.product(*map(range, fine.shape)):
        q, own = fine[i, t], seen[seen_y == y[i]].flatten()
        totals[0] -= coarse[i, t, G[q]] / math.log(2)
        totals[1] -= math.log2(p[i, t][G[q] == G].sum())
        totals[2] -= math.log2(((G[own] == G[q]).sum() + 1) / (len(own) + M))
        totals[3] -= math.log2(((own == q).sum() + 1) / (len(own) + K))
    bits = " | ".join(f"{value:.3f}" for value in totals / fine.numel())
    head = "| folder | stage 1 | baseline, summed | given the class | fine labels |"
    lines = results.coarse([trained, trained]).splitlines()
    assert lines == [head, "|---" * 5 + "|", *2 * [f"| {trained} | {bits} |"]]


@torch.no_grad()
def test_refined_samples_keep_their_coarse_labels(trained, capsys):
    judge, features = with_judge(trained)
    real = features(torch.load(trained / "images.pt", weights_only=True)["test"][0])
    weights = torch.load(trained / "fine.pt", weights_only=True)["model"]
    weights["head.weight"] /= 50  # so that the argmax is seldom sampled
    edit(trained / "fine.pt", model=weights)
    models, made = load_models(trained, "baseline", results.CPU)
    y = torch.arange(24) % CLASSES
    images, _, fine, _ = sample_batches(models, y, 0)
    samples = {"model": "baseline", "images": images, "classes": y, "fine": fine}
    samples["weights"] = {name: own["weights_id"] for name, own in made.items()}
    assert "samples" in error_of(capsys, results.main, "refine", trained)[1]
    torch.save(samples, trained / "samples-baseline.pt")
    (trained / "classifier.pt").rename(trained.parent / "classifier.pt")  # of others
    assert "has no judge" in error_of(capsys, results.main, "refine", trained)[1]
    (trained.parent / "classifier.pt").rename(trained / "classifier.pt")
    models = load_models(trained, "ctf", results.CPU)[0]
    coarse, aux = G[fine], models.aux
    best = aux(coarse, y).argmax(dim=-1)[..., None]
    found = {"baseline": images}
    for how, own in (
        ("argmax", aux.members[coarse].gather(2, best)[..., 0]),
        ("sampled", predict_fine(aux, coarse, y, torch.manual_seed(0), Sampling())),
    ):
        decoded = tokenizer.reconstruct(models.vqvae, own)
        found[f"its coarse labels, {how} fine labels of stage 2"] = decoded
    head = "| folder | images | FD | IS | class accuracy | precision | recall |"
    lines = [head, "|---" * 7 + "|"]
    for name, x in found.items():
        cells = cells_of(evaluate.score(x, y, judge, real, results.CPU))
        lines.append(f"| {trained} | {name} | {cells} |")
    assert results.refine([trained]).splitlines() == lines
    assert lines[-1].split("|")[3:] != lines[-2].split("|")[3:]


def test_tables_of_results_md_are_what_results_py_prints(monkeypatch, capsys):
    """Each stands below its command, in a comment."""
    monkeypatch.chdir(ROOT / ".github")
    text = (ROOT / ".github" / "RESULTS.md").read_text("utf-8")
    commands = re.findall(r"<!-- results.py (.*) -->\n\n((?:\|.*\n)+)", text)
    assert commands and len(commands) == text.count("<!-- results.py")
    for command, table in commands:
        what, *patterns = command.split()
        files = [file for pattern in patterns for file in sorted(glob(pattern))]
        results.main([what, *files])
        assert capsys.readouterr().out.startswith(table), command


def section(title):
    """The section of RESULTS.md whose title begins so."""
    text = (ROOT / ".github" / "RESULTS.md").read_text("utf-8")
    return text.partition(f"## {title}")[2].partition("\n## ")[0]


@pytest.mark.parametrize("data", ["digits", "photographs"])
def test_the_ratios_in_words_are_those_of_compare(data):
    folder = ROOT / ".github" / "results" / f"table1_{data}"
    _, _, line = results.compare(sorted(folder.glob("*-tuned.json"))).splitlines()
    ratio, interval, p, verdict = line.strip("| ").split(" | ")[-4:]
    readme = (ROOT / "README.md").read_text("utf-8")
    found = f"{ratio}, 95% interval {interval}"
    assert found in " ".join(readme.split())
    text = " ".join(section(f"Table 1, {data}").split())
    assert f"{found}, p = {p}: {verdict}." in text


def test_the_table_of_the_readme_is_that_of_the_default_run():
    readme = (ROOT / "README.md").read_text("utf-8").replace("**", "")
    lines = set(readme.replace(" (the default)", "").splitlines())
    for name, rows in (("out", slice(None)), ("argmax", slice(-1, None))):
        file = ROOT / ".github" / "results" / "default" / f"{name}.json"
        found = json.loads(file.read_text("utf-8"))["rows"][rows]
        table = evaluate.markdown_table(found).replace("|  |", "| |")
        assert lines.issuperset(table.splitlines())
    ctf, baseline = (cells_of_runs("default", ["xeon"], x) for x in ("ctf", "baseline"))
    assert f"on a Xeon: [CTF {ctf[0]}, baseline {baseline[0]}]" in readme


@pytest.mark.parametrize("data", ["digits", "photographs"])
def test_the_selection_shows_and_chooses_the_lowest_fd_of_all_rows(data):
    text = section(f"Selection, {data}").replace("**", "")
    row = r"\| (CTF|baseline).*guidance ([\d.]*)(.*) \| (\S*) \| 0 \| 2000 \| (\S*)"
    found = {}
    for table in ("rates", "sampling"):
        file = ROOT / ".github" / "results" / f"{table}_{data}" / "tables.md"
        for model, s, flags, path, fd in re.findall(row, file.read_text("utf-8")):
            folder, name = path.split("/")[-2:]
            keys = [folder]  # of the models with a learning rate
            if table == "sampling":
                T = name.partition("-")[0]
                keys = [name] if "top_p" in flags else [T, "any"]
            for key in keys:  # the lowest FD of a model comes first
                found.setdefault((model, key), (name, fd, f"{fd} ({s})"))
    script = (ROOT / "tests" / "experiments" / "reproduce.sh").read_text("utf-8")
    settings = script.partition(f"settings_{data}()")[2].partition("\n}")[0]
    for label, model, default, start, variable in (
        ("stage 1 (stage 2 at 3e-3)", "CTF", "1e-3", "lr", "lr1"),
        ("stage 2 (stage 1 at 1e-3)", "CTF", "3e-3", "fine-lr", "lr2"),
        ("baseline", "baseline", "1e-3", "lr", "lrb"),
    ):
        cells, distances = [label], {}
        for lr in ("5e-4", "1e-3", "2e-3", "3e-3", "4e-3", "8e-3"):
            key = model, "default" if lr == default else start + lr
            _, distances[lr], cell = found.get(key, ("", "inf", ""))
            cells.append(cell)
        assert f"| {' | '.join(cells)} |".replace("|  |", "| |") in text
        chosen = re.search(rf"{variable}=(\S*)", settings)[1]
        assert distances[chosen] == min(distances.values(), key=float)
    for model in ("CTF", "baseline"):
        name, fd, best = found[model, "any"]
        T, s = name.removeprefix("T").split("-cfg")
        top_p = found[model, "tuned-top-p"][1]
        cells = model, found[model, "T1"][-1], f"{T}: {best}", top_p
        assert f"| {' | '.join(cells)} |" in text
        flags = " --top-p 0.9" if float(top_p) < float(fd) else ""
        tuned = settings.partition("tuned=")[2]
        assert f'[{model.lower()}]="{s} {T}{flags}"' in tuned


def cells_of_runs(table, runs, model, key="fd"):
    """A number of the model's row in each of results/TABLE/RUN.json, as text."""
    folder = ROOT / ".github" / "results" / table
    files = [json.loads((folder / f"{run}.json").read_text("utf-8")) for run in runs]
    rows = [row for file in files for row in file["rows"] if row.get("model") == model]
    assert len(rows) == len(runs)
    return [f"{row[key]:.2f}" for row in rows]


def test_ablations_and_convergence_in_results_md_are_those_of_the_runs():
    for label, runs in {
        "random clusters; M = 32, 128, 256, 512": "random M32 plain M256 M512",
        "1, 2, 4 layers of stage 2": "layers1 plain layers4",
        "top-k 1, 8, 32, all of stage 2": "top-k1 top-k8 top-k32 plain",
        "temperature 0.9, 1, 1.1 of stage 1": "T0.9 plain T1.1",
        "temperature 0.9, 1, 1.1 of stage 2": "fine-T0.9 plain fine-T1.1",
    }.items():
        runs = [x if x[0] in "rM" else f"seed1-{x}" for x in runs.split()]
        lists = [
            ", ".join(cells_of_runs("ablations", runs, "ctf", key))
            for key in ("fd", "inception_score")
        ]
        assert f"| {label} | {' | '.join(lists)} |" in section("Ablations")
    copies = [f"seed1-kept-{n:02}" for n in range(1, 11)]
    for name, model in (("CTF", "ctf"), ("baseline", "baseline")):
        cells = ", ".join(cells_of_runs("convergence", copies, model))
        assert f"| {name} | {cells} |" in section("Convergence")


def test_over_k_each_model_has_its_best_settings_and_its_own_numbers():
    tables = ROOT / ".github" / "results"
    searched = (tables / "rates_k" / "tables.md").read_text("utf-8")
    printed = (tables / "over_k" / "tables.md").read_text("utf-8")
    script = (ROOT / "tests" / "experiments" / "reproduce.sh").read_text("utf-8")
    row = r"\| (CTF|baseline).* \| out/K(\d+)/lr(\S*)/cfg(\S*) \| 0 \| 2000 \| (\S*)"
    found, ratios = {}, {"1": [], "2": [], "selection": []}
    for model, size, *own in re.findall(row, searched):
        found.setdefault((model, size), []).append(own)
    for size in ("1024", "4096", "16384"):
        cells, settings, distances = [size], [], []
        for model in ("CTF", "baseline"):
            own = found[model, size]
            lr, s, lowest = min(own, key=lambda one: float(one[2]))
            for value, *tried in zip((lr, s), *own):  # the best lies inside the grid
                assert min(map(float, tried)) < float(value) < max(map(float, tried))
            runs = [f"K{size}-seed1", f"K{size}-seed2"]
            fd = cells_of_runs("over_k", runs, model.lower())
            cells += [f"{lr} ({s})", ", ".join(fd)]
            settings += [lr, s]
            distances.append([*fd, lowest])
        bits = re.findall(rf"/K{size}/seed. \| (\d\S*) \| (\d\S*)", printed)
        cells += [", ".join(two) for two in zip(*bits)]
        assert f"| {' | '.join(cells)} |" in section("Over K")
        assert f'[{size}]="{" ".join(settings)}"' in script
        for of_seed, a, b in zip(ratios.values(), *distances):
            of_seed.append(f"{float(b) / float(a):.1f}")
    one, two, selection = (", ".join(of_seed) for of_seed in ratios.values())
    text = f"baseline's FD is {one} (seed 1) and {two} (seed 2) times CTF's"
    assert text in (ROOT / "README.md").read_text("utf-8")
    assert f"{text} (in selection: {selection})" in " ".join(section("Over K").split())


def test_the_second_tokenizers_fd_in_results_md_is_that_of_the_runs():
    text = " ".join(section("A second tokenizer").split())
    for name, model in (("CTF", "ctf"), ("the baseline", "baseline")):
        runs = ["tokenizer1-seed1", "tokenizer1-seed2"]
        cells = cells_of_runs("second_tokenizer", runs, model)
        assert f"of {name} {' and '.join(cells)}" in text


def test_convergence_over_steps_and_over_seconds(tmp_path, figures):
    folders = [run(tmp_path / f"kept-{n:02}", n, steps=(7 * n, n)) for n in (2, 1, 3)]
    text = results.convergence(folders)
    assert text.startswith(results.rows(folders))
    ((path, figure),) = figures.items()
    assert path == tmp_path / "convergence.png" and str(path) in text
    x = ["steps of stage 1 or baseline", "training seconds"]
    y = ["FD (log scale): lower is better", "Inception Score: higher is better"]
    for i, ax in enumerate(figure.axes):
        assert (ax.get_xlabel(), ax.get_ylabel()) == (x[i % 2], y[i // 2])
        assert ax.get_yscale() == ("log" if i < 2 else "linear")
        assert ax.get_legend() is None  # it would hide points
        for j, line in enumerate(ax.get_lines()):
            xs = [10 ** (j + 2) * n for n in (1, 2, 3)] if i % 2 else [7, 14, 21]
            ys = [10 * (i // 2) + n + j + 2 for n in (1, 2, 3)]
            assert line.get_xydata().tolist() == [list(pair) for pair in zip(xs, ys)]
            assert line.get_color() == ["tab:orange", "tab:blue"][j]
    assert len(figure.axes) == 4
    ((ctf, baseline),) = (legend.legend_handles for legend in figure.legends)
    assert (ctf.get_label(), ctf.get_color()) == ("CTF", "tab:orange")
    assert (baseline.get_label(), baseline.get_color()) == ("baseline", "tab:blue")


def test_colours_are_ranks_along_the_principal_components():
    u = np.random.default_rng(0).normal(size=(9, 4))
    u = np.linalg.qr(u - u.mean(axis=0))[0]  # uncorrelated, mean 0
    ranks = u.argsort(axis=0).argsort(axis=0)
    for d in (4, 2):  # with two dimensions there is no blue
        axes = np.linalg.qr(np.eye(d) + 0.3)[0]
        codes = torch.from_numpy(5 + u[:, :d] * [4, 3, 2, 1][:d] @ axes)
        colors = (9 * results.code_colors(codes)).round().numpy()
        for i in range(3):
            wanted = [ranks[:, i], 8 - ranks[:, i]] if i < d else [np.zeros(9)]
            assert any((colors[:, i] == one).all() for one in wanted)


def test_anatomy_shows_a_real_image_and_a_sample(trained, figures, monkeypatch):
    own, (models, made) = G.numpy(), load_models(trained, "ctf", results.CPU)
    # Stand-ins for both Transformers: logits that depend on the labels and y.
    first, second = torch.randn(M, M), 3 * torch.randn(M, 10)
    second[models.aux.members < 0] = -1e30
    models.ar.forward = lambda c, y: first[torch.cat([y[:, None], c], dim=1)]
    models.aux.forward = lambda c, y: second[c] * (1 + y)
    x, y = torch.load(trained / "images.pt", weights_only=True)["test"]
    fine = torch.load(trained / "tokens.pt", weights_only=True)["test"][0]
    samples = {"model": "ctf", "classes": torch.tensor([2, 1]), "images": x[:2] // 2}
    samples["fine"] = fine[5:7]
    given = [(samples, models, made)]
    monkeypatch.setattr(results, "sample_sets", lambda *_: given)
    path = trained / "anatomy.png"
    assert results.anatomy([trained]) == str(path)
    assert [*figures] == [path]
    figure = figures[path]
    assert figure.get_suptitle() == "class cat: a real image and a sample"
    panels = [(ax, ax.images[0].get_array()) for ax in figure.axes if ax.images]
    (i,) = (j for j in range(len(x)) if (x[j].numpy() == panels[0][1]).all())
    assert y[i] == 2, "an image of another class"
    rows = [("a real image", x[i], fine[i]), ("a sample", x[0] // 2, fine[5])]
    color, found = results.code_colors(models.vqvae.codebook), iter(panels)
    means = torch.stack([color[G == m].mean(dim=0) for m in range(M)])
    for name, image, q in rows:
        rng, coarse, wanted = np.random.default_rng(0), G[q], {name: image}
        wanted["fine labels"] = color[q].view(4, 4, 3)
        wanted["coarse labels"] = means[coarse].view(4, 4, 3)
        maps = {"k-means": own, "random": rng.permutation(own)}
        for kind, g in maps.items():
            swapped = swap_within_clusters(q[None].numpy(), g, rng)
            image = tokenizer.reconstruct(models.vqvae, torch.from_numpy(swapped))
            wanted[f"swapped within\n{kind} clusters"] = image[0]
        stages = first[torch.cat([y[i : i + 1], coarse[:-1]])], second[coarse] * 3
        for stage, logits in enumerate(stages, start=1):
            p = scipy.special.softmax(logits.double().numpy(), axis=1)
            bits = -scipy.special.xlogy(p, p).sum(axis=1).reshape(4, 4) / math.log(2)
            wanted[f"entropy of stage {stage}\nmean {bits.mean():.1f} bits"] = bits
        for (title, panel), (ax, shown) in zip(wanted.items(), found):
            assert ax.get_title() == title
            np.testing.assert_allclose(shown, panel, 1e-4, 1e-5, err_msg=title)
            if panel.ndim == 2:  # one scale: a cluster has up to 10 codes
                assert ax.images[0].get_clim() == pytest.approx((0, math.log2(10)))
    assert not list(found)
    assert [ax.get_ylabel() for ax in figure.axes].count("entropy, bits") == 2
    edit(trained / "clusters.pt", method="random")
    with pytest.raises(SystemExit, match="has random clusters"):
        results.anatomy([trained])
    samples["model"] = "baseline"
    with pytest.raises(SystemExit, match="has no samples.pt"):
        results.anatomy([trained])


def test_benchmark_prints_a_row_for_each_combination(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "GRID", [4, 4])
    monkeypatch.setitem(benchmark.SIZES, "default", (1, 16, 2))
    monkeypatch.setitem(benchmark.SIZES, "default-aux", (1, 16, 2))
    generate, scales = benchmark.generate, []

    def watched(model, y, generator, sampling):
        scales.append(sampling.cfg_scale)
        return generate(model, y, generator, sampling)

    monkeypatch.setattr(benchmark, "generate", watched)
    monkeypatch.setattr(benchmark, "compare_cache", lambda *_: None)
    flags = ["--codes", "32", "64", "--clusters", "8", "--batch-sizes", "3"]
    benchmark.main([*flags, "--rounds", "1", "--cfg-scales", "2"])
    printed = capsys.readouterr().out
    assert set(scales) == {2}, "of stage 1 and of the baseline"
    rows = [line.split(" | ") for line in printed.splitlines() if "| default" in line]
    assert len(rows) == 2
    for row, size in zip(rows, ("32", "64")):
        assert row[1:5] == [size, "8", "3", "2"]
        slow, fast, ratio, base, *parts = (float(x.strip("| ")) for x in row[5:])
        ctf = sum(parts)
        assert slow == pytest.approx(3000 / (base + parts[2]), rel=0.1)
        assert fast == pytest.approx(3000 / ctf, rel=0.1)
        assert ratio == pytest.approx(fast / slow, rel=0.1)


def test_the_cache_is_compared_with_full_passes(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "GRID", [4, 4])
    monkeypatch.setitem(benchmark.SIZES, "default", (1, 16, 2))
    seconds = {"with": 2.0, "without": 8.0}
    monkeypatch.setattr(benchmark, "race", lambda rivals, *_: seconds)
    benchmark.compare_cache(1, results.CPU)
    printed = capsys.readouterr().out
    assert "| without a key/value cache | 8 |\n| with | 32 |\n" in printed
    assert "The cache: 4.0 times as fast, same tokens: True." in printed
