"""Other people's images, other people's machines: what public bug reports describe."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ar_model
import aux_model
import cluster
import evaluate
import sample
import tokenizer
from tests.conftest import SIZES, error_of, interrupt_at

ROOT = Path(__file__).parent.parent
FEW = ["--steps", "2", "--batch-size", "4", "--save-every", "1"]
TINY = ["--image-size", "8", "--channels", "16", "--codebook-size", "24"]
TINY += ["--codebook-after", "1", *FEW]


def paint(path, value=None, size=8):
    """An image of one grey value; without one, of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(list(path.parent.iterdir()))).integers(
        256, size=(size, size, 3), dtype=np.uint8
    )
    pixels = noise if value is None else np.full_like(noise, value)
    Image.fromarray(pixels).save(path)


def paint_classes(folder, names=("ant", "bee"), count=3, **how):
    for name in names:
        for i in range(count):
            paint(folder / name / f"{i}.png", **how)


def read(folder, split="train", size=8):
    """The class names and the number of images of each class."""
    (_, y), names = tokenizer.load_images(str(folder), split, size)
    return names, y.bincount(minlength=len(names)).tolist()


# ------------------------------------------------------------------- 1. folders of images


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Train", "Test"),
        ("train", "valid"),
        ("training", "validation"),
        ("TRAIN", "val"),
        ("train_set", "test_set"),
        ("seg_train", "seg_test"),
        ("train/train", "test/test"),
    ],
)
def test_splits_are_found_in_any_usual_spelling(tmp_path, train, test):
    paint_classes(tmp_path / train, count=3)
    paint_classes(tmp_path / test, count=2)
    assert read(tmp_path) == (["ant", "bee"], [3, 3])
    assert read(tmp_path, "test") == (["ant", "bee"], [2, 2])


def test_of_a_test_and_a_validation_set_the_test_set_is_used(tmp_path):
    for split, count in (("train", 4), ("test", 3), ("val", 2)):
        paint_classes(tmp_path / split, count=count)
    assert read(tmp_path, "test") == (["ant", "bee"], [3, 3])


def test_a_test_set_without_class_folders_is_no_class(tmp_path):
    paint_classes(tmp_path / "Train", count=10)
    paint(tmp_path / "Test" / "0.png")
    assert read(tmp_path) == (["ant", "bee"], [9, 9])
    assert read(tmp_path, "test") == (["ant", "bee"], [1, 1])


def test_a_labelled_validation_set_is_used_where_the_test_set_is_not(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        paint_classes(tmp_path / split, count=count)
    paint(tmp_path / "test" / "0.png")
    assert read(tmp_path) == (["ant", "bee"], [4, 4])
    assert read(tmp_path, "test") == (["ant", "bee"], [2, 2])


def test_a_folder_too_many_is_looked_through(tmp_path):
    for split in ("train", "test"):
        paint_classes(tmp_path / "pets" / "pets" / split)
    paint(tmp_path / "__MACOSX" / "pets" / "._0.png")
    assert read(tmp_path) == (["ant", "bee"], [3, 3])


def test_a_class_may_be_called_train(tmp_path):
    paint_classes(tmp_path, ("bus", "car", "train"), count=10)
    assert read(tmp_path) == (["bus", "car", "train"], [9, 9, 9])


@pytest.mark.parametrize("splits", [("train", "test"), ("",)])
def test_hidden_folders_and_system_files_are_no_images(tmp_path, splits):
    for split in splits:
        paint_classes(tmp_path / split, count=10)
        (tmp_path / split / ".ipynb_checkpoints").mkdir()
        paint(tmp_path / split / "ant" / ".ipynb_checkpoints" / "0-checkpoint.png")
        (tmp_path / split / "bee" / "Thumbs.db").write_bytes(b"\xd0\xcf")
        (tmp_path / split / "bee" / "desktop.ini").write_text("[x]")
    paint(tmp_path / ".ipynb_checkpoints" / "0-checkpoint.png")
    count = 10 if "test" in splits else 9
    assert read(tmp_path) == (["ant", "bee"], [count, count])


def test_classes_are_in_natural_order(tmp_path):
    names = [str(i) for i in range(12)]
    paint_classes(tmp_path, names[::-1], count=2)
    assert read(tmp_path)[0] == names


def test_each_class_is_split(tmp_path):
    paint_classes(tmp_path, ["many"], count=30)
    paint_classes(tmp_path, ["few"], count=2)
    assert read(tmp_path) == (["few", "many"], [1, 27])
    assert read(tmp_path, "test") == (["few", "many"], [1, 3])


def test_a_class_that_cannot_be_split_is_named(tmp_path, capsys):
    paint_classes(tmp_path, ["many"], count=30)
    paint_classes(tmp_path, ["lone"], count=1)
    (tmp_path / "none").mkdir()
    flags = ["--data", tmp_path, "--out", tmp_path / "out", *TINY]
    code, message = error_of(capsys, tokenizer.main, *flags)
    assert code == 1 and "lone, none" in message and "many" not in message


def test_broken_files_are_named_all_at_once(tmp_path, capsys):
    for split in ("train", "test"):
        paint_classes(tmp_path / split, count=9)
    wrong = [tmp_path / "train" / "ant" / f"{i}.png" for i in range(7)]
    wrong += [tmp_path / "test" / "bee" / f"{i}.png" for i in range(6)]
    for path in wrong[1:]:
        path.write_bytes(b"no image")
    paint(wrong[0], size=4)
    flags = ["--data", tmp_path, "--out", tmp_path / "out", *TINY]
    code, message = error_of(capsys, tokenizer.main, *flags)
    assert code == 1 and "13 files" in message
    assert sum(str(path) in message for path in wrong) == 10
    assert not list(tmp_path.rglob("*.pt"))


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    values = {"a": 1 / 4, "b": 1 / 2, "c": 1}
    for name, value in values.items():
        pixels = np.full((8, 8), round(65535 * value), np.uint16)
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "0.png")
        Image.fromarray(pixels.astype(np.int32)).save(tmp_path / name / "1.tiff")
        floats = np.full((8, 8), value, np.float32)
        Image.fromarray(floats).save(tmp_path / name / "2.tiff")
    for split in ("train", "test"):
        images, y = tokenizer.load_images(str(tmp_path), split, 8)[0]
        wanted = torch.tensor([64, 128, 255])[y]
        assert torch.equal(images[:, 0, 0].long(), wanted[:, None].expand(-1, 3))


def test_what_lies_under_transparent_pixels_is_not_seen(tmp_path):
    noise = np.random.default_rng(0).integers(256, size=(8, 8, 4), dtype=np.uint8)
    noise[..., 3] = 0
    paint_classes(tmp_path, count=2, value=255)
    Image.fromarray(noise).save(tmp_path / "ant" / "0.png")
    palette = Image.fromarray(noise[..., :3]).quantize(4)
    palette.save(tmp_path / "ant" / "1.png", transparency=bytes(4))
    for split in ("train", "test"):
        images, _ = tokenizer.load_images(str(tmp_path), split, 8)[0]
        assert images.min() == 255


def test_classes_and_counts_are_printed(tmp_path, images, capsys):
    flags = ["--data", str(images), "--out", str(tmp_path / "out"), *TINY]
    tokenizer.main(flags)
    printed = capsys.readouterr().out
    assert "36 + 24 images" in printed and "classes (3): ant, bee, cat" in printed


def test_classes_are_chosen_by_name_or_number(trained, capsys):
    def labels(*classes):
        flags = ["--out", str(trained), "--num-samples", "4"]
        sample.main([*flags, "--classes", *classes])
        samples = torch.load(trained / "samples.pt", weights_only=True)
        return samples["labels"].tolist()

    assert labels("cat", "0") == [2, 0, 2, 0]
    assert "0 ant, 1 bee, 2 cat" in capsys.readouterr().out
    rename_classes(trained, ["1", "2", "10"])
    assert labels("2", "0") == [1, 0, 1, 0]  # a name, where there is such a name
    flags = ["--out", trained, "--classes", "dog"]
    code, message = error_of(capsys, sample.main, *flags)
    assert code == 1 and "--classes dog: those of images are 0 1, 1 2, 2 10" in message


def rename_classes(out, names):
    artifact = torch.load(out / "tokenizer.pt", weights_only=True)
    artifact["data"] |= {"classes": names}
    torch.save(artifact, out / "tokenizer.pt")


def test_the_anatomy_of_a_rare_class(trained):
    """A class of two images has one of them in the test set."""
    folder = trained / "unsplit"
    paint_classes(folder, ["ant", "bee"], count=20, size=16)
    paint_classes(folder, ["rare"], count=2, size=16)
    artifact = torch.load(trained / "tokenizer.pt", weights_only=True)
    artifact["data"] |= {"name": str(folder), "classes": ["ant", "bee", "rare"]}
    torch.save(artifact, trained / "tokenizer.pt")
    flags = ["--num-samples", "2", "--anatomy", "--classes", "2"]
    sample.main(["--out", str(trained), *flags])
    assert (trained / "anatomy.png").exists()


def test_samples_come_in_the_proportions_of_the_data(trained):
    labels = torch.tensor([0] * 16 + [1] * 6 + [2] * 2)
    for count in (12, 24, 100):
        y = sample.in_turn(labels.bincount().tolist(), count)
        shares = y.bincount(minlength=3) / count
        wanted = torch.tensor([16, 6, 2]) / 24
        assert len(y) == count and (shares - wanted).abs().max() <= 1 / count
        assert (sample.in_turn([5, 5, 5], count) == torch.arange(count) % 3).all()
    artifact = torch.load(trained / "tokens.pt", weights_only=True)
    torch.save(artifact | {"test_labels": labels}, trained / "tokens.pt")
    sample.main(["--out", str(trained), "--num-samples", "12"])
    drawn = torch.load(trained / "samples.pt", weights_only=True)["labels"]
    assert drawn.bincount().tolist() == [8, 3, 1]


def test_other_class_shares_than_the_test_set_are_warned_of(trained, capsys):
    run = ["--out", str(trained), "--judge-steps", "2"]
    sample.main([*run[:2], "--num-samples", "12"])
    evaluate.main(run)
    assert "of class" not in capsys.readouterr().out
    sample.main([*run[:2], "--num-samples", "12", "--classes", "bee"])
    evaluate.main(run)
    printed = capsys.readouterr().out
    assert "100% of the CTF samples are of class bee, and\n33% of the test" in printed


def test_the_inception_score_of_few_images(trained):
    perfect = 1000 * np.eye(10)[np.arange(20) % 10]
    assert evaluate.inception_score(perfect) == pytest.approx((10, 0))
    assert evaluate.inception_score(perfect[:2])[0] == pytest.approx(2)


def test_of_one_class_there_is_nothing_to_judge(tmp_path, capsys):
    for split in ("train", "test"):
        paint_classes(tmp_path / "images" / split, ["only"], count=8)
    out = ["--out", str(tmp_path)]
    tokenizer.main([*out, "--data", str(tmp_path / "images"), *TINY])
    cluster.main([*out, "--clusters", "4"])
    ar_model.main([*out, *SIZES, *FEW])
    aux_model.main([*out, *SIZES, *FEW])
    sample.main([*out, "--num-samples", "8"])
    capsys.readouterr()
    evaluate.main([*out, "--judge-steps", "2"])
    printed = capsys.readouterr().out
    assert "one class" in printed and "nan" not in printed and "100.00" not in printed
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    row = metrics["rows"][0]
    for name in ("fd", "inception_score", "class_accuracy", "precision", "recall"):
        assert math.isnan(row[name]) and math.isnan(metrics["real"][name])
    assert row["bits_per_token"] > 0 and metrics["reconstruction"]["psnr"] > 0


@pytest.mark.filterwarnings("ignore:Glyph")  # the font lacks it: drawn as a box
def test_class_names_are_literal_text(trained, monkeypatch):
    monkeypatch.undo()  # quick_pictures
    rename_classes(trained, ["$x_", "a$b^c$\\frac", "\udcff猫🐈"])
    sample.main(["--out", str(trained), "--num-samples", "6", "--anatomy"])
    assert (trained / "samples.png").exists() and (trained / "anatomy.png").exists()
    artifact = torch.load(trained / "tokenizer.pt", weights_only=True)
    images = Path(artifact["data"]["name"])
    moved = images.rename(images.with_name("$\\x$"))
    evaluate.main(["--out", str(trained), "--judge-steps", "2", "--data", str(moved)])
    metrics = json.loads((trained / "metrics.json").read_text())
    metrics["protocol"]["data"] = str(moved)
    evaluate.plot_metrics(trained / "metrics.png", metrics)


def test_measuring_takes_fewer_of_larger_images(monkeypatch):
    seen = []

    def encode(self, x):
        seen.append(x.shape[0] * x.shape[2] * x.shape[3])
        return torch.zeros(len(x), 8, *self.grid)

    monkeypatch.setattr(tokenizer.VQVAE, "encode", encode)
    for size, count in ((32, 300), (256, 8)):
        config = tokenizer.VQVAEConfig(size, channels=16, codebook_size=24)
        model = tokenizer.VQVAE(config)
        images = torch.zeros(count, size, size, 3, dtype=torch.uint8)
        tokenizer.tokenize(model, images)
        model.fill_codebook(images, np.random.default_rng(0))

        def network(x):
            seen.append(x.shape[0] * x.shape[2] * x.shape[3])
            return torch.zeros(len(x), 2), torch.zeros(len(x), 2)

        evaluate.look(network, images, "cpu")
    assert max(seen) == 250 * 32 * 32
    seen.clear()
    evaluate.look(network, images[:4, :32, :32], "cpu", 2)
    assert seen == [2 * 32 * 32] * 2  # --batch-size 2


# --------------------------------------------------------- 2. work that outlives its place


@pytest.fixture
def finished(tmp_path, images):
    """out with a finished, real tokenizer of images/, which lies beside it."""
    out = tmp_path / "run"
    tokenizer.main(["--out", str(out), "--data", str(images), *TINY])
    return out


def test_images_that_have_moved(finished, images, tmp_path, capsys):
    moved = images.rename(tmp_path / "elsewhere")
    out = ["--out", str(finished)]
    code, message = error_of(capsys, cluster.main, *out, "--clusters", "4")
    assert code == 1 and "nor class folders of images" in message
    where = ["--data", str(moved)]
    cluster.main([*out, "--clusters", "4", *where])
    ar_model.main([*out, *SIZES, *FEW])
    aux_model.main([*out, *SIZES, *FEW])
    sample.main([*out, "--num-samples", "6", "--anatomy", *where])
    evaluate.main([*out, "--judge-steps", "2", *where])
    assert (finished / "metrics.json").exists()

    paint(moved / "test" / "ant" / "3.png", size=16)  # another image
    paint(moved / "test" / "ant" / "4.png", size=16)
    for main, flags in (
        (sample.main, ["--num-samples", "6", "--anatomy"]),
        (evaluate.main, ["--judge-steps", "2"]),
    ):
        code, message = error_of(capsys, main, *out, *flags, *where)
        assert code == 1 and "has changed since python tokenizer.py" in message
    for path in moved.glob("test/*/*.png"):
        paint(path, value=7, size=16)
    code, message = error_of(capsys, cluster.main, *out, "--clusters", "4", *where)
    assert code == 1 and "has changed since python tokenizer.py" in message


def test_resume_asks_for_the_same_images_not_for_the_same_path(
    finished, images, tmp_path, capsys
):
    moved = images.rename(tmp_path / "elsewhere")
    flags = ["--out", str(finished), "--data", str(moved), *TINY, "--resume"]
    tokenizer.main(flags)
    for path in moved.glob("train/bee/*.png"):
        paint(path, value=7, size=16)
    code, message = error_of(capsys, tokenizer.main, *flags)
    assert code == 1 and "tokenizer.pt was trained with images" in message


def test_a_rerun_keeps_the_finished_run(
    finished, images, tmp_path, capsys, monkeypatch
):
    def content(name):
        return (finished / name).read_bytes()

    old = {name: content(name) for name in ("tokenizer.pt", "tokens.pt")}
    again = ["--out", str(finished), "--data", str(images), *TINY, "--seed", "1"]
    original, state = tokenizer.torch.optim.AdamW.step, []

    def killed(*args, **kwargs):
        raise SystemExit  # before anything is written

    monkeypatch.setattr(tokenizer.torch.optim.AdamW, "step", killed)
    with pytest.raises(SystemExit):
        tokenizer.main(again)
    assert {name: content(name) for name in old} == old

    monkeypatch.setattr(tokenizer.torch.optim.AdamW, "step", original)
    with monkeypatch.context() as context:
        interrupt_at(context, 0)
        with pytest.raises(SystemExit):
            tokenizer.main(again)
    assert content("tokenizer.pt") != old["tokenizer.pt"]
    assert "is kept as tokenizer.old.pt" in capsys.readouterr().out
    kept = {"tokenizer.old.pt": "tokenizer.pt", "tokens.old.pt": "tokens.pt"}
    assert all(content(name) == old[of] for name, of in kept.items())
    tokenizer.main(again)  # an unfinished run is nothing to keep
    assert all(content(name) == old[of] for name, of in kept.items())
    second = content("tokenizer.pt")
    tokenizer.main(again)  # one generation
    assert content("tokenizer.old.pt") == second
    state.append(content("tokens.old.pt"))
    assert state[0] != old["tokens.pt"]


def test_the_other_trainings_keep_a_finished_run_and_its_copies(out):
    flags = ["--out", str(out), *SIZES, *FEW, "--keep-every", "1"]
    for main, name in ((ar_model.main, "coarse"), (aux_model.main, "fine")):
        main(flags)
        old = [out / f"{name}.pt", out / f"{name}-000001.pt"]
        old = [path.read_bytes() for path in old]
        main([*flags, "--seed", "1"])
        new = [out / f"{name}.old.pt", out / f"{name}.old-000001.pt"]
        assert [path.read_bytes() for path in new] == old
        main([*flags, "--seed", "1", "--resume"])
        assert new[0].read_bytes() == old[0]
    copies = sample.kept_copies(out, "ctf")
    assert copies[0] == ["coarse-000001.pt", "fine-000001.pt"] and len(copies) == 2


def test_home_is_written_with_a_tilde(out, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    _, message = error_of(capsys, cluster.main, "--out", "~/nothing")
    assert f"{tmp_path / 'nothing' / 'tokenizer.pt'} is missing" in message
    _, message = error_of(capsys, tokenizer.main, "--data", "~/nothing", *TINY)
    assert str(tmp_path / "nothing") in message
    flags = ["--out", "~/out", "--data", "~/nothing", "--clusters", "4"]
    _, message = error_of(capsys, cluster.main, *flags)
    assert str(tmp_path / "nothing") in message
    monkeypatch.setattr(evaluate, "judge_all", lambda args, device: sys.exit(str(args)))
    with pytest.raises(SystemExit, match="weights.pth") as exit_info:
        evaluate.main(["--inception-weights", "~/weights.pth"])
    assert str(tmp_path / "weights.pth") in str(exit_info.value)


# ------------------------------------------------------- 3. terminals, notebooks, memory


def test_a_backend_that_is_not_installed():
    done = subprocess.run(
        [sys.executable, "-c", "import sample"],
        cwd=ROOT,
        env=os.environ | {"MPLBACKEND": "no-such-backend"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_terminal_that_lacks_characters(trained, monkeypatch):
    rename_classes(trained, ["猫", "\udcff", "cat"])
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", terminal)
    print("à")
    sample.main(["--out", str(trained), "--num-samples", "3"])
    terminal.flush()
    printed = terminal.buffer.getvalue().decode("cp1252")
    assert "à" in printed and "classes: 0 ?, 1 ?, 2 cat" in printed


def test_training_in_a_thread(out):
    failures, before = [], signal.getsignal(signal.SIGINT)

    def work():
        try:
            ar_model.main(["--out", str(out), *SIZES, *FEW])
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures and (out / "coarse.pt").exists()
    assert signal.getsignal(signal.SIGINT) is before


NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"),
    RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    MemoryError("Unable to allocate 24 GiB for an array with shape (3,)"),
]


def test_out_of_memory_names_the_flag_to_turn(trained, images, capsys, monkeypatch):
    out = ["--out", trained]
    sample.main(["--out", str(trained), "--num-samples", "6"])
    for error in NO_MEMORY:
        for module, where, flags in (
            (tokenizer, "to_float", ["--data", images, *TINY]),
            (ar_model, "next_token_loss", SIZES),
            (aux_model, "fine_loss", SIZES),
            (sample, "sample_images", []),
            (evaluate, "train_classifier", []),
        ):

            def fail(*args, error=error, **kwargs):
                raise error

            capsys.readouterr()
            monkeypatch.setattr(module, where, fail)
            code, message = error_of(capsys, module.main, *out, *flags)
            assert code == 1 and "out of memory" in message
            assert "--batch-size" in message and "--image-size" in message


def test_other_errors_keep_their_traceback(trained, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("shape mismatch; memory format is not contiguous")

    monkeypatch.setattr(sample, "sample_images", fail)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        sample.main(["--out", str(trained), "--num-samples", "6"])


def test_a_share_of_more_than_all_is_a_usage_error(capsys):
    code, message = error_of(capsys, sample.main, "--top-p", "95")
    assert code == 2 and "--top-p: 95 is not in 0.001 .. 1" in message


# ------------------------------------------------------------ 4. for those who carry it on


def test_the_workflow_runs_what_the_readme_says():
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    for word in ("ubuntu", "macos", "windows", '"3.10"', "requirements.txt", "pytest"):
        assert word in workflow
