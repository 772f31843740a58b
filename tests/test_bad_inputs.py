"""Missing, damaged and mismatched files, stopped runs and unusual machines, for every
script: one line that says what to do, and nothing lost."""

import argparse
import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SIZES, K, edit, error_of, interrupt_at
from matplotlib.figure import Figure
from matplotlib.text import Text

import cluster
import sample
import tokenizer

SCRIPTS = ["tokenizer", "cluster", "ar_model", "aux_model", "sample", "evaluate"]
FEW = ["--steps", "1", "--batch-size", "4"]
# Flags with which each script works on the files of the fixtures, in a second.
FLAGS = {
    "tokenizer": ["--image-size", "16", "--channels", "16", "--codebook-size", "24"],
    "cluster": ["--clusters", "4", "--restarts", "1"],
    "ar_model": [*SIZES, *FEW],
    "aux_model": [*SIZES, *FEW],
    "sample": ["--num-samples", "6"],
    "evaluate": ["--judge-steps", "2"],
}
FLAGS["tokenizer"] += ["--data", "{images}", *FEW]
WRITES = {"tokenizer": ["images.pt", "tokens.pt", "tokenizer.pt"]}
WRITES |= {"cluster": ["clusters.pt"], "ar_model": ["coarse.pt"]}
WRITES |= {"aux_model": ["fine.pt"], "sample": ["samples.pt"]}
WRITES |= {"evaluate": ["metrics.json"]}


def run(script, out, images, *flags):
    """Call main of a script with its FLAGS and some more."""
    used = [flag.format(images=images) for flag in FLAGS[script]]
    importlib.import_module(script).main(["--out", str(out), *used, *flags])


# ------------------------------------------------------ files that do not work together


def delete(name):
    return lambda out: (out / name).unlink()


def overwrite(name, content=b"some text"):
    return lambda out: (out / name).write_bytes(content)


def cut_short(name):
    return lambda out: (out / name).write_bytes((out / name).read_bytes()[:3000])


def other(name, **ids):
    return lambda out: edit(out / name, **ids)


class Touch:
    """Unpickling this object would create the file path."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def hostile(name):
    return lambda out: torch.save({"x": Touch(out / "trap")}, out / name)


def sampled(*flags, then=lambda out: None):
    def prepare(out):
        run("sample", out, None, *flags)
        then(out)

    return prepare


def nothing(out):
    pass


X = {"codebook_id": "x"}
BROKEN = "is unreadable ("
ALIEN = "does not belong here ("
BASELINE = "run python ar_model.py --labels fine first"
WEIGHTS = "samples.pt is from other weights: run python sample.py again"
# The script and further flags, the fault, and a part of the line.
TABLE = [
    ("cluster", delete("tokenizer.pt"), "tokenizer.pt is missing: run python token"),
    ("cluster", delete("images.pt"), "images.pt is missing: run python tokenizer.py"),
    ("cluster", cut_short("tokenizer.pt"), f"tokenizer.pt {BROKEN}"),
    ("cluster", other("tokens.pt", **X), f"tokens.pt {ALIEN}codebook_id x, not "),
    ("cluster", other("images.pt", images_id="x"), f"images.pt {ALIEN}images_id x"),
    ("cluster --clusters 33", nothing, f"33 is more than the {K} codes"),
    ("ar_model", delete("tokens.pt"), "tokens.pt is missing"),
    ("ar_model", overwrite("tokens.pt"), f"tokens.pt {BROKEN}"),
    ("ar_model", hostile("tokens.pt"), f"tokens.pt {BROKEN}"),
    ("ar_model", delete("clusters.pt"), "clusters.pt is missing: run python cluster.p"),
    ("ar_model", other("clusters.pt", **X), f"clusters.pt {ALIEN}codebook_id x"),
    ("ar_model --resume", delete("coarse.pt"), "coarse.pt is missing"),
    ("aux_model", overwrite("clusters.pt", b""), f"clusters.pt {BROKEN}"),
    ("aux_model", other("clusters.pt", **X), f"clusters.pt {ALIEN}codebook_id x"),
    ("aux_model --resume", nothing, "fine.pt was trained with"),
    ("sample", delete("fine.pt"), "fine.pt is missing: run python aux_model.py first"),
    ("sample", delete("coarse.pt"), "coarse.pt is missing: run python ar_model.py fi"),
    ("sample", hostile("fine.pt"), f"fine.pt {BROKEN}"),
    ("sample", other("tokens.pt", **X), f"tokens.pt {ALIEN}codebook_id x"),
    ("sample", other("coarse.pt", cluster_id="x"), f"coarse.pt {ALIEN}cluster_id x"),
    ("sample", other("fine.pt", cluster_id="x"), f"fine.pt {ALIEN}cluster_id x"),
    ("sample --anatomy", other("images.pt", images_id="x"), f"{ALIEN}images_id x"),
    ("sample --export", delete("images.pt"), "images.pt is missing"),
    ("sample --model baseline", delete("baseline.pt"), BASELINE),
    ("sample --model baseline", other("baseline.pt", **X), f"{ALIEN}codebook_id x"),
    ("evaluate", nothing, "has no samples: run python sample.py first"),
    ("evaluate", overwrite("samples.pt"), f"samples.pt {BROKEN}"),
    ("evaluate", hostile("samples.pt"), f"samples.pt {BROKEN}"),
    ("evaluate", sampled(then=other("fine.pt", weights_id="x")), WEIGHTS),
    ("evaluate", sampled(then=other("images.pt", images_id="x")), f"{ALIEN}images_id"),
    ("evaluate", sampled(then=delete("clusters.pt")), "run python cluster.py first"),
]
USAGE = [
    ("tokenizer --steps many", "invalid int value: 'many'"),
    ("tokenizer --device abacus", "invalid choice: 'abacus'"),
    ("cluster --data cifar10", "unrecognized arguments: --data"),
    ("cluster --method dbscan", "invalid choice: 'dbscan'"),
    ("ar_model --heads 3", "--dim must be a multiple of 4 x --heads, 12"),
    ("aux_model --dim 10", "--dim must be a multiple of 4 x --heads, 8"),
    ("sample --model vae", "invalid choice: 'vae'"),
    ("evaluate --cfg-scales 2", "unrecognized arguments: --cfg-scales"),
]


def contents(folder):
    """Every file below folder with its content."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("command", "fault", "line"), TABLE)
def test_a_fault_is_one_line_and_nothing_is_touched(
    command, fault, line, trained, capsys
):
    script, *flags = command.split()
    fault(trained)
    before = contents(trained)
    main = importlib.import_module(script).main
    code, message = error_of(capsys, main, "--out", trained, *FLAGS[script], *flags)
    assert code == 1 and line in message
    assert contents(trained) == before


@pytest.mark.parametrize(("command", "line"), USAGE)
def test_a_wrong_flag_is_a_usage_error(command, line, trained, images, capsys):
    before = contents(trained)
    script, *flags = command.split()
    with pytest.raises(SystemExit) as exit_info:
        run(script, trained, images, *flags)
    assert exit_info.value.code == 2 and line in capsys.readouterr().err
    assert contents(trained) == before


def test_a_process_prints_nothing_but_the_line(tmp_path):
    command = [sys.executable, str(ROOT / "evaluate.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    line = f"error: {tmp_path} has no samples: run python sample.py first\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line)


def test_without_a_fault_every_script_works(tmp_path, images):
    """So nothing above fails for another reason."""
    for script in SCRIPTS:
        run(script, tmp_path / "out", images)
        for name in WRITES[script]:
            assert (tmp_path / "out" / name).exists()


# ------------------------------------------------------------------------- sub-folders


def test_a_variant_inherits_from_the_folder_above(trained, capsys):
    variant = trained / "M8"
    run("cluster", variant, None, "--clusters", "8")
    run("aux_model", variant, None)
    printed = capsys.readouterr().out
    for name in ("images.pt", "tokenizer.pt", "tokens.pt"):
        assert f"using {trained / name}\n" in printed
    assert f"using {trained / 'clusters.pt'}" not in printed
    model = torch.load(variant / "fine.pt", weights_only=True)
    assert model["config"]["clusters"] == 8
    # Stage 1 of the folder above was trained on other clusters.
    code, message = error_of(capsys, sample.main, "--out", variant)
    assert code == 1
    assert f"{trained / 'coarse.pt'} {ALIEN}cluster_id" in message
    run("ar_model", variant, None)
    run("sample", variant, None)
    run("evaluate", variant, None)
    assert {path.name for path in variant.glob("*.pt")} == {
        f"{name}.pt" for name in ("clusters", "fine", "coarse", "samples")
    }
    assert (trained / "classifier.pt").exists()  # the judge is for all variants


# ------------------------------------------------------------------------ stopped runs


def interrupted(monkeypatch, script, out, images, *flags):
    """Ctrl-C in the third of 600 steps, after two steps were saved."""
    flags = [*flags, "--steps", "600", "--save-every", "2"]
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        interrupt_at(context, 3)
        run(script, out, images, *flags)


def test_a_stopped_training_is_named_by_later_scripts(
    trained, images, monkeypatch, capsys
):
    for script in ("ar_model", "aux_model"):
        interrupted(monkeypatch, script, trained, images)
    for later in ("sample", "evaluate"):
        capsys.readouterr()
        run(later, trained, images)
        printed = capsys.readouterr().out
        for name in ("coarse.pt", "fine.pt"):
            assert f"{trained / name} is unfinished: step 2 of 600\n" in printed
        assert printed.count("unfinished") == 2


def test_after_a_stopped_tokenizer_the_others_mention_resume(
    tmp_path, images, monkeypatch, capsys
):
    out = tmp_path / "out"
    interrupted(monkeypatch, "tokenizer", out, images)
    flags = ["--out", out, *FLAGS["cluster"]]
    code, message = error_of(capsys, cluster.main, *flags)
    resume = "run python tokenizer.py (with --resume, if it was stopped)"
    assert code == 1 and f"tokens.pt is missing: {resume} first" in message
    # The tokens of an earlier run do not belong to the new codebook.
    run("tokenizer", out, images)
    interrupted(monkeypatch, "tokenizer", out, images, "--seed", "1")
    code, message = error_of(capsys, cluster.main, *flags)
    assert code == 1 and f"tokens.pt {ALIEN}codebook_id" in message
    assert f"{resume} again" in message


@pytest.mark.parametrize("script", ["tokenizer", "ar_model", "aux_model"])
def test_a_step_is_saved_before_it_is_printed(script, trained, images, monkeypatch):
    """python tokenizer.py --save-every 1 | head -n 1: printing fails after a line."""

    def write(text):
        if text.startswith("step 2"):
            raise BrokenPipeError

    monkeypatch.setattr(tokenizer.tqdm, "write", write)
    with pytest.raises(BrokenPipeError):
        run(script, trained, images, "--steps", "3", "--save-every", "1")
    path = trained / WRITES[script][-1]
    assert torch.load(path, weights_only=True)["step"] == 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_results_are_saved_before_pictures_are_drawn(
    script, trained, images, monkeypatch
):
    if script == "evaluate":
        run("sample", trained, images)
    for name in WRITES[script]:
        (trained / name).unlink(missing_ok=True)

    def savefig(figure, path):
        raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", savefig)
    with pytest.raises(OSError, match="no space left"):
        run(script, trained, images)
    for name in WRITES[script]:
        path = trained / name
        if path.suffix == ".pt":
            torch.load(path, weights_only=True)
        else:
            json.loads(path.read_text("utf-8"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_ends_every_script_in_one_line(script, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", interrupt)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as exit_info:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    assert str(exit_info.value).startswith("error: stopped (a training continues")


# ---------------------------------------------------------------------------- pictures

DRAW = """
import pathlib, sys
import torch
sys.path.insert(0, sys.argv[1])
import tokenizer
images = torch.arange(2 * 8 * 8 * 3).view(2, 8, 8, 3).byte()
row = {"step": 2, "psnr": 20.0, "perplexity": 9.0}
history = {"loss": [2.0, 1.0], "test": [row]}
tokenizer.plot(pathlib.Path(sys.argv[2]), history, images, images.flip(1), 10)
"""


def test_pictures_do_not_depend_on_settings_of_matplotlib(tmp_path, monkeypatch):
    """Not on a matplotlibrc, nor on a backend that is not installed."""
    monkeypatch.undo()  # quick_pictures
    pictures = [tmp_path / name for name in ("here.png", "there.png")]
    commands = [[str(tmp_path / "draw.py"), str(ROOT), str(path)] for path in pictures]
    (tmp_path / "draw.py").write_text(DRAW)
    monkeypatch.setattr(sys, "argv", commands[0])
    runpy.run_path(commands[0][0])
    settings = "text.usetex: True\nimage.origin: lower\n"
    (tmp_path / "matplotlibrc").write_text(settings)
    unusual = {"cwd": tmp_path, "env": os.environ | {"MPLBACKEND": "no-such-backend"}}
    subprocess.run([sys.executable, *commands[1]], check=True, **unusual)
    here, there = (path.read_bytes() for path in pictures)
    assert here == there and len(here) > 5000


@pytest.mark.filterwarnings("ignore:Glyph")  # the font lacks it: a box is drawn
def test_class_names_are_drawn_literally(trained, images, monkeypatch):
    monkeypatch.undo()  # quick_pictures
    names, texts, savefig = ["$x_", "$\\frac$ $b^c$", "猫🐈"], [], Figure.savefig

    def watched(figure, *args, **kwargs):
        savefig(figure, *args, **kwargs)
        texts.extend(text.get_text() for text in figure.findobj(Text))

    monkeypatch.setattr(Figure, "savefig", watched)
    edit(trained / "tokens.pt", class_names=names)
    edit(trained / "images.pt", class_names=names, data="$\\x$")
    run("sample", trained, images, "--anatomy")
    run("evaluate", trained, images)
    assert all(f"class {name}" in texts for name in names)
    assert any("test images of $\\x$" in text for text in texts)
    for name in ("samples", "anatomy", "metrics"):
        assert (trained / f"{name}.png").stat().st_size > 5000
