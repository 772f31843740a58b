"""What the trainings of the tokenizer, stage 1, the baseline and stage 2 share: batches,
optimizer, clock, saves, --resume and --overwrite. Nearly all tests run for all four."""

import math
from functools import partialmethod

import conftest
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import G, K, M, contents, ctrl_c, edit, error_of, on_backward, pictures
from torch.utils._python_dispatch import TorchDispatchMode

import ar_model
import aux_model
import sample
import tokenizer

SIZES = "--image-size 16 --downsample 8 --channels 20 --codebook-size 24 --code-dim 6"
SHAPE, CONFIG = "--layers 1 --dim 24 --heads 3", (3, [4, 4], 1, 24, 3)
# The file that a training writes: its script, and its own flags.
TRAININGS = {"tokenizer.pt": (tokenizer, SIZES), "coarse.pt": (ar_model, SHAPE)}
TRAININGS["baseline.pt"] = ar_model, f"{SHAPE} --labels fine"
TRAININGS["fine.pt"] = aux_model, SHAPE
NOT_TOKENIZER = [name for name in TRAININGS if name != "tokenizer.pt"]
pytestmark = pytest.mark.usefixtures("no_pictures")


def new_model(name):
    if name == "tokenizer.pt":
        return tokenizer.VQVAE(tokenizer.VQVAEConfig(16, 8, 20, 24, 6))
    if name == "fine.pt":
        return aux_model.AuxModel(aux_model.AuxConfig(M, K, *CONFIG), G)
    V = M if name == "coarse.pt" else K
    return ar_model.ARModel(ar_model.ARConfig(V, *CONFIG))


class Training:
    """One of the trainings, in the folder out/run; it inherits the rest from out."""

    def __init__(self, name, out, images):
        self.name, self.above, self.out = name, out, out / "run"
        self.module, flags = TRAININGS[name]
        self.flags = f"{flags} --steps 5 --batch-size 6 --save-every 2".split()
        if name == "tokenizer.pt":
            self.flags.append(f"--data={images}")

    def __call__(self, flags="", out=None):
        """Run it; return what it saved."""
        out = out or self.out
        self.module.main(["--out", str(out), *self.flags, *flags.split()])
        return torch.load(out / self.name, weights_only=True)

    def error(self, capsys, flags=""):
        """The line with which it ends, without any change to the files in its folder."""
        before, argv = contents(self.out), ["--out", self.out, *self.flags]
        code, line = error_of(capsys, self.module.main, *argv, *flags.split())
        assert code == 1 and contents(self.out) == before
        return line


@pytest.fixture(params=TRAININGS)
def training(request, out, images):
    return Training(request.param, out, images)


# -------------------------------------------------------------------- one step and more


def loss_of(name, model, tokens, y):
    if name == "fine.pt":
        return aux_model.fine_loss(model, tokens, y)[0]
    return ar_model.next_token_loss(model, tokens, y)


def train_by_hand(name, model, x, y, steps, B, lr, seed):
    """Trains model as the docstrings describe it; returns losses and gradient norms."""
    losses, norms, optimizer = [], [], tokenizer.adamw(model)
    for step in range(steps):
        rng = np.random.default_rng((seed, step))
        chosen = rng.integers(len(x), size=B)
        if name == "tokenizer.pt":
            real = x[chosen].permute(0, 3, 1, 2) / 127.5 - 1
            x_hat, z, fine, commitment = model(real)
            loss = F.mse_loss(x_hat, real) + 0.25 * commitment
        else:
            classes = y[chosen]
            classes[rng.random(B) < 0.1] = 3  # the null class
            loss = loss_of(name, model, x[chosen], classes)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        for group in optimizer.param_groups:
            group["lr"] = tokenizer.learning_rate(step, steps, lr)
        optimizer.step()
        if name == "tokenizer.pt":
            model.update_codebook(z.detach(), fine, rng)
        losses.append(loss.item())
    return losses, norms


def test_a_training_equals_one_written_out_by_hand(training, monkeypatch):
    """The first weights, batches, dropped classes, learning rates and clipping follow
    from the flags, and the first 1,000 test images are measured."""
    rng, name = np.random.default_rng(0), training.name
    sets = {"train": pictures(rng, 12), "test": pictures(rng, 340)}
    if name == "tokenizer.pt":
        read = *(tokenizer.Examples(*pair) for pair in sets.values()), list("abc")
        monkeypatch.setattr(tokenizer, "read_images", lambda *_: read)
    else:
        for split, (_, y) in sets.items():
            sets[split] = torch.from_numpy(rng.integers(K, size=(len(y), 16))), y
        edit(training.above / "tokens.pt", **sets)
    update = partialmethod(tokenizer.VQVAE.update_codebook, decay=0.5)  # codes die
    monkeypatch.setattr(tokenizer.VQVAE, "update_codebook", update)
    saved = training("--steps 54 --lr 0.05 --seed 3 --save-every 999")
    if name == "tokenizer.pt":  # they have another order there
        sets = torch.load(training.out / "images.pt", weights_only=True)
    if name == "coarse.pt":
        sets = {split: (G[x], y) for split, (x, y) in sets.items()}
    torch.manual_seed(3)
    model = new_model(name)
    losses, norms = train_by_hand(name, model, *sets["train"], 54, 6, 0.05, 3)
    assert min(norms) < 1 < max(norms), "clipping is not seen"
    assert saved["history"]["loss"] == pytest.approx(losses, rel=1e-4)
    for key, weights in model.state_dict().items():
        assert torch.allclose(saved["model"][key], weights, atol=1e-4), key
    assert saved["config"] == vars(model.config)
    x, y = (part[:1000] for part in sets["test"])
    if name == "tokenizer.pt":
        fine = tokenizer.tokenize(model, x)
        scores = {"psnr": tokenizer.psnr(x, tokenizer.reconstruct(model, fine))}
        scores["perplexity"] = tokenizer.perplexity(fine)
    else:
        nats = loss_of(name, model, x, y).item()
        scores = {"loss": nats, "bits": nats / math.log(2)}
    if name == "fine.pt":
        scores["accuracy"] = aux_model.fine_loss(model, x, y)[1].item()
    (row,) = saved["history"]["test"]
    assert row == pytest.approx({"step": 54, "seconds": saved["seconds"]} | scores)


# After a change on purpose: replace these numbers by those that pytest shows.
GOLDEN = {
    "tokenizer.pt": [1.97952, 1.09745, 0.84777],
    "coarse.pt": [2.05046, 1.91367, 1.66971],
    "baseline.pt": [3.60761, 3.53048, 3.38280],
    "fine.pt": [2.15162, 2.11854, 2.10074],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_three_steps_have_these_losses(name):
    """Neither weights nor data come from a random generator."""
    model, y = new_model(name), torch.arange(9) % 3
    tensors = [*model.parameters()]
    if name == "tokenizer.pt":
        tensors.append(model.codebook)
    for p in tensors:
        numbers = torch.arange(p.numel()).view_as(p) ** 2 % 1009 / 505 - 1
        scale = (3 / p[0].numel()) ** 0.5 if p.ndim > 1 else 0.3
        p.data.copy_(scale * numbers + (p.ndim == 1) / 2)
    if name == "tokenizer.pt":
        model.codebook.copy_(F.normalize(model.codebook, dim=1))
        model.moving_sum.copy_(model.codebook)
        x = (127.5 + 127.5 * torch.arange(9 * 768).sin()).byte().view(9, 16, 16, 3)
    else:
        x = torch.arange(9 * 16).view(9, 16) * 7 // 3
        x %= M if name == "coarse.pt" else K
    losses, _ = train_by_hand(name, model, x, y, steps=3, B=5, lr=0.2, seed=0)
    assert losses == pytest.approx(GOLDEN[name], abs=1e-4)


def test_no_step_waits_for_single_numbers(training):
    """A GPU would wait at every item(), float() and if: one tolist() reads all."""
    counts = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            counts[-1] += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    for steps in (2, 5):
        counts.append(0)
        with Count():
            training(f"--steps {steps} --save-every 9 --overwrite")
    assert counts[0] == counts[1]


def test_products_are_in_bfloat16_where_that_is_native(training, monkeypatch):
    exact = training(out=training.above / "exact")["history"]
    monkeypatch.setattr(training.module, "autocast", conftest.bfloat16)
    cast, tokenize = [], tokenizer.tokenize
    enabled = lambda *how: cast.append(torch.is_autocast_enabled("cpu"))
    monkeypatch.setattr(tokenizer, "tokenize", lambda *x: enabled() or tokenize(*x))
    assert training()["history"]["loss"] != exact["loss"]
    if training.name == "tokenizer.pt":  # measured three times; tokens.pt in float32
        assert cast == [True] * 3 + [False] * 2


@pytest.mark.parametrize("name", NOT_TOKENIZER)
def test_what_it_writes_prints_and_draws(name, out, images, monkeypatch, capsys):
    training = Training(name, out, images)
    monkeypatch.undo()  # no_pictures
    figures = conftest.keep_figures(monkeypatch)
    if name == "baseline.pt":
        (out / "clusters.pt").unlink()  # it is not needed
    saved = training("--steps 4 --save-every 3")
    assert {p.name for p in training.out.iterdir()} == {name, name.replace("pt", "png")}
    (figure,) = figures.values()
    assert saved["codebook_id"] == "the-codebook"
    cluster_id = None if name == "baseline.pt" else "the-clusters"
    assert saved.get("cluster_id") == cluster_id

    printed = capsys.readouterr().out
    size = sum(weights.numel() for weights in saved["model"].values())
    assert f"{size / 1e6:.2f}M" in printed
    coarse = G[torch.load(out / "tokens.pt", weights_only=True)["test"][0]]
    within = G.bincount()[coarse].log().mean().item()
    guess, said, title = {
        "coarse.pt": (math.log(M), f"{M} coarse labels", f"{M} coarse labels"),
        "baseline.pt": (math.log(K), f"{K} fine labels", f"{K} fine labels"),
        "fine.pt": (within, f"{M} coarse to {K} fine labels", f"(K = {K}, M = {M})"),
    }[name]
    assert said in printed and f"{guess:.3f} nats" in printed
    (ax,) = figure.axes
    assert ax.get_title().startswith(f"{name}: ") and title in ax.get_title()
    assert "nats" in ax.get_ylabel() and ax.get_xlabel() == "step"
    lines = {line.get_label().split()[0]: line for line in ax.lines}
    curves = {key: line.get_xydata().T.tolist() for key, line in lines.items()}
    tested = [row["loss"] for row in saved["history"]["test"]]
    assert curves["training"] == [[1, 2, 3, 4], saved["history"]["loss"]]
    assert curves["test"] == [[3, 4], tested]
    assert lines["uniform"].get_ydata() == pytest.approx([guess] * 2)
    assert f"{guess:.2f}" in lines["uniform"].get_label()
    assert len(ax.get_legend().get_texts()) == 3


# ----------------------------------------------------------------- stops, and continues


def plain(value):
    """value without tensors, to be compared with ==."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return value.tolist() if isinstance(value, torch.Tensor) else value


def test_resume_continues_as_if_nothing_had_happened(
    training, images, monkeypatch, capsys
):
    """Step n takes 2^n seconds, and each look at test images a million."""
    clock, call, tolist = [0.0], torch.nn.Module.__call__, torch.Tensor.tolist
    running = [0]

    def tick(step, loss):
        running[0] = 2**step
        return loss

    def wait(x):  # for a GPU, until it has computed the loss
        clock[0] += running[0]
        running[0] = 0
        return tolist(x)

    def measure(*args):
        clock[0] += 0 if torch.is_grad_enabled() else 1e6
        return call(*args)

    def seconds(run):
        """Takes the seconds out of run."""
        rows = run["history"]["test"]
        return [(r["step"], r.pop("seconds")) for r in rows] + [run.pop("seconds")]

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch.nn.Module, "__call__", measure)
    monkeypatch.setattr(torch.Tensor, "tolist", wait)
    with monkeypatch.context() as context:
        on_backward(context, tick)
        whole = training(out=training.above / "whole")
    # Every second step and the last are saved. The first step, of 1 second, warms up.
    assert seconds(whole) == [(2, 2), (4, 14), (5, 30), 30]
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        on_backward(context, lambda step, loss: ctrl_c(3)(step, tick(step, loss)))
        training()
    assert "step 2 of 5" in training.error(capsys)
    # Settings that change no result may differ. The seconds begin with 1 again.
    if training.name == "tokenizer.pt":
        training.flags.append(f"--data={images.rename(images.with_name('moved'))}")
    free = "--resume --device cpu" + " --keep 1" * (training.name in NOT_TOKENIZER)
    with monkeypatch.context() as context:
        on_backward(context, tick)
        resumed = training(free)
    assert seconds(resumed) == [(2, 2), (4, 4), (5, 8), 8]
    assert plain(resumed) == plain(whole)
    assert training("--resume --save-every 9")["step"] == 5  # nothing is left to do


def test_a_gradient_that_is_not_finite_ends_the_run(training, monkeypatch, capsys):
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        on_backward(context, ctrl_c(2))
        training()
    # The second step from now on is step 3, which would be saved.
    on_backward(monkeypatch, lambda step, loss: loss * (math.nan if step == 1 else 1))
    line = training.error(capsys, "--resume")
    assert "step 3" in line and "--lr" in line


def test_a_step_is_saved_before_it_is_printed(training, monkeypatch):
    """python tokenizer.py | head -n 1: printing fails."""
    monkeypatch.setattr(tokenizer.tqdm, "write", lambda text: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        training()
    assert torch.load(training.out / training.name, weights_only=True)["step"] == 2


def test_resume_is_refused_with_other_flags_or_data(training, images, capsys):
    assert "is missing" in training.error(capsys, "--resume")
    training()
    other = "seed 8, lr 0.5, batch-size 7, steps 9, "
    if training.name == "tokenizer.pt":
        other += (
            "image-size 24, downsample 4, channels 30, codebook-size 20, code-dim 5"
        )
    else:
        other += "layers 2, dim 36, heads 2"
    for flag in other.split(", "):
        line = training.error(capsys, f"--resume --{flag}")
        name, value = flag.replace("-", "_").split()
        assert f" {name} " in line and line.endswith(f", not {value}")
    if training.name == "tokenizer.pt":
        next(images.rglob("*.png")).unlink()
        assert " images_id " in training.error(capsys, "--resume")
    for key in ("cluster_id", "codebook_id")[training.name == "baseline.pt" :]:
        for file in ("tokens.pt", "clusters.pt"):
            edit(training.above / file, **{key: "other"})
        if training.name in NOT_TOKENIZER:
            assert f" {key} " in training.error(capsys, "--resume")


# ------------------------------------------------------------------------- nothing lost


@pytest.mark.parametrize("name", NOT_TOKENIZER)
def test_kept_copies_are_evenly_spaced_and_can_be_sampled(name, trained, images):
    training = Training(name, trained, images)
    whole = training("--keep 2 --save-every 4")
    assert [row["step"] for row in whole["history"]["test"]] == [3, 4, 5]
    first, last = (training.out / f"kept-0{i}" for i in (1, 2))
    assert sorted(training.out.glob("kept-*/*")) == [first / name, last / name]
    early, late = (torch.load(f / name, weights_only=True) for f in (first, last))
    assert early["step"] == 3 and plain(late) == plain(whole)
    which = "baseline" if name == "baseline.pt" else "ctf"
    sample.main(["--num-samples", "3", "--model", which, "--out", str(first)])
    (file,) = first.glob("samples*.pt")
    used = torch.load(file, weights_only=True)["weights"].values()
    assert early["weights_id"] in used and late["weights_id"] not in used


def test_a_run_is_never_replaced_unasked(training, images, capsys):
    training("--save-every 9")
    path, ways = training.out / training.name, ("--resume", "--overwrite", "--out")
    for read in [*training.above.glob("*.pt"), *images.rglob("*.png")]:
        read.unlink()  # it has to end before
    line = training.error(capsys)
    assert "step 5 of 5" in line and all(way in line for way in ways)
    edit(path, step=3)
    line = training.error(capsys, "--steps 9 --seed 4")
    assert "step 3 of 5" in line and all(way in line for way in ways)
    if training.name in NOT_TOKENIZER:  # a run that was renamed still has its copies
        path.rename(training.out / "good.pt")
        (training.out / "kept-02").mkdir()
        (training.out / "kept-02" / training.name).write_text("a copy")
        line = training.error(capsys)
        assert "kept-02" in line and all(way in line for way in ways[1:])


def test_overwrite_removes_the_run_and_its_copies_alone(training, monkeypatch):
    name, out = training.name, training.out
    own = [name, f"kept-07/{name}", f"kept-12/{name}"]
    stays = [f"kept-best/{name}", f"kept-/{name}", f"x/kept-07/{name}", "good.pt"]
    for other in {*TRAININGS} - {name}:
        stays += [other, f"kept-07/{other}"]
    for path in (*own, *stays):
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_text(path)
    before = contents(out)
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        on_backward(context, ctrl_c(1))  # before the first save
        training("--overwrite")
    assert contents(out) == before

    def no_room(artifact, path):
        path.write_text("half a file")
        raise OSError("no space left")

    with monkeypatch.context() as context, pytest.raises(OSError, match="no space"):
        context.setattr(torch, "save", no_room)
        training("--overwrite")
    assert before.items() <= contents(out).items(), "lost before anything was saved"
    assert len(training("--overwrite")["history"]["test"]) == 3
    assert not any((out / path).exists() for path in own[1:])
    assert all((out / path).read_text() == path for path in stays)
