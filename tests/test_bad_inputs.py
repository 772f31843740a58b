"""What is typed or left lying wrong: one line that says what to do, nothing lost."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import evaluate
import sample
from tests.conftest import IDS, SIZES, K, error_of

ROOT = Path(__file__).parent.parent
FEW = ["--steps", "1", "--batch-size", "2"]
TOKENIZER = ["--image-size", "16", "--channels", "16", "--codebook-size", "24", *FEW]
STAGE = [*SIZES, *FEW]


def edit(name, **changes):
    def prepare(out, images):
        artifact = torch.load(out / name, weights_only=True)
        torch.save(artifact | changes, out / name)

    return prepare


def delete(name):
    return lambda out, images: (out / name).unlink()


def overwrite(name, content=b"some text"):
    return lambda out, images: (out / name).write_bytes(content)


def cut_short(name):
    def prepare(out, images):
        (out / name).write_bytes((out / name).read_bytes()[:3000])

    return prepare


class Touch:
    """What a hostile pickle holds: loading it would make the file called trap."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def hostile(name):
    def prepare(out, images):
        torch.save({"script": "tokenizer.py", "x": Touch(out / "trap")}, out / name)

    return prepare


def instead_of(name, other):
    return lambda out, images: (out / name).write_bytes((out / other).read_bytes())


def folder_instead_of(name):
    def prepare(out, images):
        (out / name).unlink()
        (out / name).mkdir()

    return prepare


def drawn(*flags):
    """Samples of the weights that are there."""
    return lambda out, images: sample.main(["--out", str(out), *flags])


def drawn_then_trained(out, images):
    drawn("--num-samples", "6")(out, images)
    edit("fine.pt", settings=IDS | {"steps": 7, "seed": 1})(out, images)


def drawn_then_data_changed(out, images):
    drawn("--num-samples", "6")(out, images)
    (images / "test" / "ant" / "0.png").rename(images / "test" / "bee" / "new.png")


def one_class_less(out, images):
    for path in (images / "test" / "cat").iterdir():
        path.unlink()
    (images / "test" / "cat").rmdir()


def one_image_in_all(out, images):
    (out / "few" / "ant").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(out / "few" / "ant" / "0.png")


def copies_of_one_stage(out, images):
    instead_of("coarse-000002.pt", "coarse.pt")(out, images)


def nothing(out, images):
    pass


# Script, flags ({images} and {out} are filled in), what is wrong with the files, exit
# code (2: usage), and what the message says.
TABLE = [
    ("tokenizer", ["--nonsense", "1"], nothing, 2, "--nonsense"),
    ("tokenizer", ["--steps", "0"], nothing, 2, "--steps: 0 is not in 1"),
    ("tokenizer", ["--steps", "many"], nothing, 2, "invalid int value: 'many'"),
    ("tokenizer", ["--batch-size", "-1"], nothing, 2, "--batch-size: -1 is not in"),
    ("tokenizer", ["--lr", "nan"], nothing, 2, "--lr: nan is not in 0"),
    ("tokenizer", ["--lr", "inf"], nothing, 2, "--lr: inf is not in 0"),
    ("tokenizer", ["--seed", "-1"], nothing, 2, "--seed: -1 is not in 0"),
    ("tokenizer", ["--downsample", "3"], nothing, 2, "invalid choice: 3"),
    ("tokenizer", ["--image-size", "30"], nothing, 2, "must be a multiple of 4"),
    ("tokenizer", ["--codebook-size", "1"], nothing, 2, "1 is not in 2"),
    ("cluster", ["--clusters", "0"], nothing, 2, "--clusters: 0 is not in 1"),
    ("cluster", ["--method", "dbscan"], nothing, 2, "invalid choice: 'dbscan'"),
    ("ar_model", ["--labels", "medium"], nothing, 2, "invalid choice: 'medium'"),
    ("ar_model", ["--heads", "3"], nothing, 2, "--dim must be a multiple of 4 x"),
    ("aux_model", ["--dim", "10"], nothing, 2, "--dim must be a multiple of 4 x"),
    ("sample", ["--temperature", "0"], nothing, 2, "--temperature: 0 is not in"),
    ("sample", ["--cfg-scales", "inf"], nothing, 2, "--cfg-scales: inf is not in"),
    ("sample", ["--cfg-scales"], nothing, 2, "expected at least one argument"),
    ("sample", ["--top-p", "0"], nothing, 2, "--top-p: 0 is not in"),
    ("sample", ["--fine-temperature", "2"], nothing, 2, "--fine-top-k 1: give 0"),
    ("sample", ["--classes", "-1"], nothing, 1, "--classes -1: those of"),
    ("sample", ["--num-samples", "0"], nothing, 2, "0 is not in 1"),
    ("sample", ["--model", "vae"], nothing, 2, "invalid choice: 'vae'"),
    ("sample", ["--model", "baseline", "--anatomy"], nothing, 2, "both stages"),
    ("evaluate", ["--judge-steps", "0"], nothing, 2, "--judge-steps: 0 is not in 1"),
    ("evaluate", ["--cfg-scales", "2"], nothing, 2, "unrecognized arguments"),
    ("evaluate", ["--features", "dino"], nothing, 2, "invalid choice: 'dino'"),
    ("evaluate", ["--mean-of", "{out}"], nothing, 2, "and another --out"),
    ("tokenizer", ["--device", "abacus"], nothing, 1, "--device abacus:"),
    ("tokenizer", ["--data", "{out}/no"], nothing, 1, "no: not a known data set, nor"),
    ("tokenizer", ["--data", "{out}"], nothing, 1, "nor class folders of images"),
    ("tokenizer", ["--image-size", "64"], nothing, 1, "fewer than --image-size 64"),
    ("tokenizer", [], one_class_less, 1, "too few images of cat"),
    ("tokenizer", ["--data", "{out}/few"], one_image_in_all, 1, "too few images"),
    ("tokenizer", ["--out", "{images}/train/ant/0.png"], nothing, 1, "File exists"),
    ("tokenizer", ["--resume"], nothing, 1, "tokenizer.pt was trained with"),
    ("cluster", [], delete("tokenizer.pt"), 1, "run python tokenizer.py first"),
    ("cluster", [], cut_short("tokenizer.pt"), 1, "tokenizer.pt cannot be read"),
    ("cluster", [], folder_instead_of("tokens.pt"), 1, "tokens.pt cannot be"),
    ("cluster", [], edit("tokens.pt", codebook_id="x"), 1, "belongs to another codebo"),
    ("cluster", ["--clusters", "33"], nothing, 1, f"33 is more than the {K} codes"),
    ("ar_model", [], delete("tokens.pt"), 1, "run python tokenizer.py first"),
    ("ar_model", [], overwrite("tokens.pt"), 1, "tokens.pt cannot be read"),
    ("ar_model", [], hostile("tokens.pt"), 1, "tokens.pt cannot be read"),
    ("ar_model", [], delete("clusters.pt"), 1, "run python cluster.py first"),
    ("ar_model", [], edit("clusters.pt", codebook_id="x"), 1, "another codebook"),
    ("ar_model", ["--resume"], delete("coarse.pt"), 1, "run python ar_model.py first"),
    ("ar_model", ["--resume"], nothing, 1, "coarse.pt was trained with"),
    ("aux_model", [], delete("clusters.pt"), 1, "run python cluster.py first"),
    (
        "aux_model",
        [],
        instead_of("clusters.pt", "fine.pt"),
        1,
        "not written by cluster",
    ),
    ("aux_model", [], edit("clusters.pt", codebook_id="x"), 1, "another codebook"),
    ("sample", [], delete("fine.pt"), 1, "run python aux_model.py first"),
    ("sample", [], delete("coarse.pt"), 1, "run python ar_model.py first"),
    ("sample", [], edit("coarse.pt", cluster_id="x"), 1, "belongs to another cluster"),
    ("sample", [], edit("fine.pt", cluster_id="x"), 1, "belongs to another cluster"),
    ("sample", [], edit("coarse.pt", model={}), 1, "does not fit this code, train it"),
    ("sample", ["--classes", "0", "3"], nothing, 1, "--classes 3: those of"),
    (
        "sample",
        ["--model", "baseline"],
        delete("baseline.pt"),
        1,
        "run python ar_model.py --labels fine first",
    ),
    ("evaluate", [], nothing, 1, "nothing to judge: run python sample.py first"),
    ("evaluate", [], overwrite("samples.pt"), 1, "samples.pt cannot be read"),
    ("evaluate", [], drawn("--num-samples", "1"), 1, "draw more samples"),
    ("evaluate", [], drawn_then_trained, 1, "samples.pt is of other weights: run"),
    ("evaluate", [], drawn_then_data_changed, 1, "has changed since python tokenizer"),
    ("sample", ["--kept"], nothing, 1, "no copies of coarse.pt: train with --keep"),
    ("sample", ["--kept"], copies_of_one_stage, 1, "as many copies of coarse.pt as"),
    (
        "evaluate",
        ["--mean-of", "{images}", "{images}/test"],
        nothing,
        1,
        "metrics.json",
    ),
    (
        "evaluate",
        ["--features", "inception", "--inception-weights", "{out}/no.pth"],
        drawn("--num-samples", "6"),
        1,
        "see --inception-weights",
    ),
]
# Through a process of its own as well: a usage error, a missing and a broken file.
SHOWN = "--steps: 0 is not", "run python tokenizer.py first", "tokenizer.pt cannot"
AS_PROCESSES = [next(row for row in TABLE if part in row[4]) for part in SHOWN]


def wrong_input(row, trained, images):
    """The script and its flags, after the files were made wrong."""
    script, flags, prepare, _, _ = row
    prepare(trained, images)
    base = ["--out", "{out}"]
    base += ["--data", "{images}", *TOKENIZER] if script == "tokenizer" else []
    base += STAGE if script in ("ar_model", "aux_model") else []
    base += ["--judge-steps", "2"] if script == "evaluate" else []
    flags = [flag.format(out=trained, images=images) for flag in [*base, *flags]]
    return script, flags


def contents(folder):
    """Every file below folder with its content, but for the judge of evaluate.py."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {p: p.read_bytes() for p in files if p.name != "classifier.pt"}


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]} {row[4]}")
def test_one_line_and_nothing_touched(row, trained, images, capsys):
    script, flags = wrong_input(row, trained, images)
    before = contents(trained)
    main = importlib.import_module(script).main
    code, message = error_of(capsys, main, *flags)
    assert code == row[3] and row[4] in message
    assert contents(trained) == before


@pytest.mark.parametrize("row", AS_PROCESSES, ids=lambda row: row[4])
def test_the_same_as_a_process(row, trained, images):
    script, flags = wrong_input(row, trained, images)
    command = [sys.executable, str(ROOT / f"{script}.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == row[3]
    assert done.stderr.count("\n") == 1 and row[4] in done.stderr


def test_a_broken_image_is_named(trained, images, capsys):
    for content in (b"", b"some text", (images / "test/bee/3.png").read_bytes()[:100]):
        (images / "test" / "bee" / "3.png").write_bytes(content)
        flags = ["--out", trained, "--data", images, *TOKENIZER]
        tokenizer = importlib.import_module("tokenizer")
        code, message = error_of(capsys, tokenizer.main, *flags)
        assert code == 1 and "3.png is no readable image" in message


def test_what_is_there_is_judged_after_all(trained, capsys):
    """The table is not red for another reason: without the fault, evaluate.py works."""
    sample.main(["--out", str(trained), "--num-samples", "6"])
    evaluate.main(["--out", str(trained), "--judge-steps", "2"])
    assert (trained / "metrics.json").exists()
