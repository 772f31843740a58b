"""Missing, damaged and mismatched files, wrong flags, stopped runs and unusual machines,
for every script: one line that says what to do, and nothing lost."""

import argparse
import importlib
import io
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pytest
import torch
from conftest import ROOT, SIZES, contents, ctrl_c, edit, error_of, on_backward
from matplotlib.figure import Figure

import tokenizer

SCRIPTS = ["tokenizer", "cluster", "ar_model", "aux_model", "sample", "evaluate"]
MAIN = {name: importlib.import_module(name).main for name in SCRIPTS}
TRAINS = ["tokenizer", "ar_model", "aux_model"]
# Flags with which each script works on the files of the fixtures, in a second.
FEW = ["--batch-size=4", "--steps=2", "--save-every=1"]
FLAGS = {
    "tokenizer": ["--image-size=16", "--channels=16", "--codebook-size=24", *FEW],
    "cluster": ["--clusters=4", "--restarts=1"],
    "ar_model": [*SIZES, *FEW],
    "aux_model": [*SIZES, *FEW],
    "sample": ["--num-samples=6"],
    "evaluate": ["--judge-steps=2"],
}
WRITES = {"tokenizer": ["images.pt", "tokens.pt", "tokenizer.pt"]}
WRITES |= {"cluster": ["clusters.pt"], "ar_model": ["coarse.pt"]}
WRITES |= {"aux_model": ["fine.pt"], "sample": ["samples.pt"]}
WRITES["evaluate"] = ["metrics.json"]

pytestmark = pytest.mark.usefixtures("no_pictures")


def argv_of(script, out, images, *flags):
    data = ["--data", str(images)] if script == "tokenizer" else []
    return ["--out", str(out), *data, *FLAGS[script], *flags]


def run(script, out, images, *flags):
    """Call main of a script with its FLAGS and some more."""
    MAIN[script](argv_of(script, out, images, *flags))


# ------------------------------------------------------ files that do not work together


FAULTS = {
    "missing": Path.unlink,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:3000]),
    "empty": lambda path: path.write_bytes(b""),
    "hostile": lambda path: torch.save({"x": path}, path),  # may run code when read
}
for key in ("images_id", "codebook_id", "cluster_id", "weights_id"):
    FAULTS[key] = lambda path, key=key: edit(path, **{key: "another"})
# The script (and a flag), the file, its fault, and a part of the line.
ROWS = """
cluster, tokenizer.pt, missing, tokenizer.pt is missing: run python tokenizer.py first
cluster, tokenizer.pt, cut short, tokenizer.pt is unreadable (
cluster, tokens.pt, codebook_id, tokens.pt does not belong here (codebook_id another
cluster, images.pt, images_id, images.pt does not belong here (images_id another
cluster --clusters=33, clusters.pt, missing, 33 is more than the 32 codes
ar_model, tokens.pt, missing, tokens.pt is missing: run python tokenizer.py (with --re
ar_model, tokens.pt, hostile, tokens.pt is unreadable (
ar_model, clusters.pt, codebook_id, clusters.pt does not belong here (codebook_id anot
aux_model, clusters.pt, empty, clusters.pt is unreadable (
aux_model, clusters.pt, codebook_id, clusters.pt does not belong here (codebook_id ano
sample, fine.pt, hostile, fine.pt is unreadable (
sample, fine.pt, codebook_id, not the-codebook): run python aux_model.py --overwrite
evaluate, samples.pt, missing, has no samples: run python sample.py first
evaluate, samples.pt, hostile, samples.pt is unreadable (
evaluate, tokens.pt, codebook_id, tokens.pt does not belong here (codebook_id another
evaluate, clusters.pt, codebook_id, clusters.pt does not belong here (codebook_id anot
evaluate, images.pt, images_id, images.pt does not belong here (images_id another
evaluate, fine.pt, weights_id, samples.pt is from other weights: run python sample.py
""".strip().splitlines()


@pytest.mark.parametrize("row", ROWS)
def test_a_fault_is_one_line_and_nothing_is_touched(row, trained, capsys):
    command, name, fault, line = row.split(", ")
    script, *flags = command.split()
    if script == "evaluate":
        run("sample", trained, None)
    if script in TRAINS:
        flags.append("--overwrite")  # it has to fail before
    FAULTS[fault](trained / name)
    before = contents(trained)
    argv = argv_of(script, trained, None, *flags)
    code, message = error_of(capsys, MAIN[script], *argv)
    assert code == 1 and line in message
    assert contents(trained) == before


def persist(script, out, images, *flags, patience=9):
    """Run a script and do what its errors say, until it works."""
    try:
        return run(script, out, images, *flags)
    except SystemExit as exit_info:
        error = str(exit_info)
    assert patience, error
    if "is unreadable" in error:
        Path(re.search(r"error: (\S+) is", error)[1]).unlink()
    advice = re.search(r"run python (\w+)\.py((?: --[-\w]+| fine| baseline)*)", error)
    advised = advice[2].split()
    if "(with --resume" in error and (out / "tokenizer.pt").exists():
        advised.append("--resume")
    persist(advice[1], out, images, *advised, patience=patience - 1)
    return persist(script, out, images, *flags, patience=patience - 1)


def test_following_the_advice_leads_to_a_table(tmp_path, images, monkeypatch, capsys):
    out = tmp_path / "out"
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        on_backward(context, ctrl_c(1))
        run("tokenizer", out, images)
    persist("evaluate", out, images)  # it needs all the others
    persist("sample", out, images, "--model=baseline")
    run("ar_model", out, images, "--labels=fine", "--seed=5", "--overwrite")
    faults = "fine.pt weights_id, coarse.pt cluster_id, tokens.pt hostile, "
    faults += "images.pt images_id, clusters.pt empty, tokens.pt missing"
    for name, fault in (pair.split() for pair in faults.split(", ")):
        FAULTS[fault](out / name)
        capsys.readouterr()
        persist("evaluate", out, images)
        printed = capsys.readouterr().out
        assert "| CTF" in printed and "| baseline" in printed


# ------------------------------------------------------------------------- wrong flags

FOR_ALL = "seed -1, seed x, seed 1e3, device abacus, "
FOR_TRAINING = "steps 0, steps many, batch-size 0, save-every 0, save-every -1, lr 0, "
FOR_TRAINING += "lr -1, lr nan, lr inf, resume --overwrite, "
SHAPES = "layers 0, layers -1, dim 0, dim 20, heads 0, heads 3, labels x, "
SHAPES += "keep -1, keep 100"
WRONG = {
    "tokenizer": f"{FOR_TRAINING}image-size 0, image-size 30, downsample 3, channels 0, "
    "code-dim 0, codebook-size 0, codebook-size 2e3, keep 1",
    "cluster": "clusters 0, clusters -4, restarts 0, method dbscan, data cifar10",
    "ar_model": FOR_TRAINING + SHAPES,
    "aux_model": FOR_TRAINING + SHAPES,
    "sample": "temperature nan, fine-temperature inf, cfg-scale nan, model vae",
    "evaluate": "judge-steps 0, judge-steps -3, cfg-scales 2",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_wrong_flag_is_a_usage_error(script, trained, images, capsys):
    before = contents(trained)
    for flag in (FOR_ALL + WRONG[script]).split(", "):
        argv = argv_of(script, trained, images, *f"--{flag}".split())
        code, message = error_of(capsys, MAIN[script], *argv)
        assert code == 2 and f"--{flag.split()[0]}" in message, flag
    assert contents(trained) == before


# ------------------------------------------------------------------------- sub-folders


def test_a_variant_inherits_from_its_real_parents(trained, monkeypatch, capsys):
    """From the nearest; not from the working directory, nor the folder of a link."""
    variant = trained / "M8"
    variant.mkdir()
    farther = trained.parent / "tokens.pt"
    farther.write_bytes((trained / "tokens.pt").read_bytes())
    monkeypatch.chdir(variant)
    run("cluster", ".", None, "--clusters", "8")
    run("aux_model", ".", None)
    farther.unlink()
    printed = capsys.readouterr().out
    for name in ("images.pt", "tokenizer.pt", "tokens.pt"):
        assert f"using {trained / name}\n" in printed
    model = torch.load(variant / "fine.pt", weights_only=True)
    assert model["config"]["clusters"] == 8
    # Stage 1 of the folder above was trained on other clusters.
    code, message = error_of(capsys, MAIN["sample"], "--out", ".")
    assert code == 1 and f"{trained / 'coarse.pt'} does not belong here (clu" in message
    assert "--overwrite" not in message, "it must not replace that training"
    run("ar_model", "../new", None)
    model = torch.load(trained / "new" / "coarse.pt", weights_only=True)
    assert model["config"]["vocabulary"] == 4
    far = trained.parent / "far"
    far.mkdir()
    (trained / "link").symlink_to(far)
    for folder in ("../link", "../../elsewhere"):
        argv = argv_of("ar_model", folder, None)
        code, message = error_of(capsys, MAIN["ar_model"], *argv)
        assert code == 1 and "tokens.pt is missing" in message
    assert not any(far.iterdir())


# ------------------------------------------------------------------------ stopped runs


def test_later_scripts_name_a_stopped_training(trained, images, monkeypatch, capsys):
    for script in ("ar_model", "aux_model"):
        with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
            on_backward(context, ctrl_c(1))
            run(script, trained, images, "--overwrite")
    for later in ("sample", "evaluate"):
        capsys.readouterr()
        run(later, trained, images)
        printed = capsys.readouterr().out
        for name in ("coarse.pt", "fine.pt"):
            assert f"{trained / name} is unfinished: step 1 of 2\n" in printed
        assert printed.count("unfinished") == 2


@pytest.mark.parametrize("script", SCRIPTS[:-1])  # evaluate draws none
def test_results_are_saved_before_pictures(script, trained, images, monkeypatch):
    monkeypatch.undo()  # no_pictures
    for name in WRITES[script]:
        (trained / name).unlink(missing_ok=True)

    def savefig(figure, path, **how):
        raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", savefig)
    with pytest.raises(OSError, match="no space left"):
        run(script, trained, images)
    assert all((trained / name).exists() for name in WRITES[script])


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_ends_every_script_in_one_line(script, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", interrupt)
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    line = str(exit_info.value)
    assert line.startswith("error: stopped") and "\n" not in line
    assert ("--resume" in line) == (script in TRAINS)  # the others have no --resume


# -------------------------------------------------------------------- unusual machines


def test_every_script_runs_on_the_cpu_of_a_machine_with_an_accelerator(
    tmp_path, images, monkeypatch
):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert tokenizer.pick_device("auto") == torch.device("mps")
    for script in SCRIPTS:
        run(script, tmp_path / "out", images, "--device=cpu")
        for name in WRITES[script]:
            assert (tmp_path / "out" / name).exists()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert tokenizer.pick_device("auto") == torch.device("cuda")
    monkeypatch.setattr(torch, "autocast", lambda *_, enabled: enabled)
    for native in (True, False):  # a T4 emulates bfloat16
        supported = lambda including_emulation=True, n=native: n or including_emulation
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert tokenizer.autocast(torch.device("cuda")) == native
    assert tokenizer.pick_device("mps") == torch.device("mps")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_starts_in_a_notebook(script, monkeypatch):
    """There, sys.stdout cannot be reconfigured."""
    printed = io.StringIO()
    stdout = SimpleNamespace(write=printed.write, flush=printed.flush)
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit, match="^0$"):
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    assert "--out" in printed.getvalue()


def test_an_old_terminal_shows_what_it_can(monkeypatch):
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, "ascii"))
    tokenizer.run(lambda: print("classes 猫, b", flush=True))
    assert terminal.getvalue().split() == [b"classes", b"?,", b"b"]


@pytest.mark.filterwarnings("ignore:Glyph")  # the font lacks it: a box is drawn
def test_pictures_and_settings_of_matplotlib_are_independent(tmp_path, monkeypatch):
    """Pictures do not depend on a matplotlibrc. Scripts do not change the settings of a
    notebook that imports them: conftest.py has imported all."""
    monkeypatch.undo()  # figures

    def draw(name):
        with tokenizer.picture(tmp_path / name, 4, 3) as figure:
            ax = figure.subplots()
            ax.imshow([[0, 1], [2, 3]])
            ax.set(title="$x_", xlabel="$\\frac$ $b^c$", ylabel="猫")  # literally
        return (tmp_path / name).read_bytes()

    here, of_user = draw("here.png"), dict(matplotlib.rc_params())
    del of_user["backend"]  # chosen when it is first used
    assert {name: matplotlib.rcParams[name] for name in of_user} == of_user
    other = {"text.usetex": True, "image.origin": "lower", "font.size": 20}
    with matplotlib.rc_context(other):
        assert draw("there.png") == here and len(here) > 2000
