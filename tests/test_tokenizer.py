import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import tokenizer
from tests.conftest import (
    check_batches,
    check_resume,
    check_schedule,
    error_of,
    places,
    spy,
)
from tokenizer import VQVAE, VQVAEConfig

TINY = ["--image-size", "16", "--channels", "16", "--codebook-size", "24"]
TINY += ["--batch-size", "4", "--codebook-after", "2", "--save-every", "100"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return VQVAE(VQVAEConfig(image_size=16, channels=16, codebook_size=24))


def unit_vectors(*shape):
    return F.normalize(torch.randn(shape), dim=1)


# ------------------------------------------------------------------------------- images


def test_glyphs_depend_on_the_seed_alone():
    images, labels = tokenizer.paint_glyphs(40, 32, seed=3)
    again, labels_again = tokenizer.paint_glyphs(40, 32, seed=3)
    other, _ = tokenizer.paint_glyphs(40, 32, seed=4)
    assert torch.equal(images, again) and torch.equal(labels, labels_again)
    assert not torch.equal(images, other)
    assert labels.bincount().tolist() == [4] * 10


def test_glyphs_show_the_digit_of_their_label():
    images, labels = tokenizer.paint_glyphs(1000, 32, seed=0)
    brightness = (
        images.amax(dim=-1).float().flatten(1)
    )  # ink is bright, whatever its hue
    means = torch.stack([brightness[labels == digit].mean(0) for digit in range(10)])
    masters = F.avg_pool2d(tokenizer.glyph_masters(64).mean(0)[:, None], 2).flatten(1)
    likeness = torch.corrcoef(torch.cat([means, masters]))[:10, 10:]
    assert likeness.argmax(dim=1).tolist() == list(range(10))


def test_train_and_test_glyphs_differ(monkeypatch):
    monkeypatch.setattr(tokenizer, "GLYPH_COUNTS", {"train": 50, "test": 50})
    train, test = (
        tokenizer.load_images("glyphs", s, 32)[0].x for s in ("train", "test")
    )
    assert (train.flatten(1).float() - test.flatten(1).float()).abs().mean() > 10


def test_uint8_survives_the_way_to_float_and_back():
    images = (
        torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3)
    )
    x = tokenizer.to_float(images)
    assert x.shape == (1, 3, 16, 16) and x.min() == -1 and x.max() == 1
    assert torch.equal(tokenizer.to_uint8(x), images)
    assert tokenizer.to_uint8(
        torch.tensor([-3.0, 3.0]).view(2, 1, 1, 1)
    ).flatten().tolist() == [0, 255]


def test_folder_images_are_resized_and_cropped_in_the_centre(tmp_path):
    (tmp_path / "ant").mkdir()
    (tmp_path / "bee").mkdir()
    stripes = np.zeros(
        (16, 48, 3), np.uint8
    )  # a third red, a third green, a third blue
    for i in range(3):
        stripes[:, 16 * i : 16 * i + 16, i] = 200
    for i in range(10):
        Image.fromarray(stripes).save(tmp_path / "bee" / f"{i}.png")
        Image.fromarray(stripes[:, :16]).save(tmp_path / "ant" / f"{i}.png")
    (images, labels), classes = tokenizer.load_images(str(tmp_path), "train", 8)
    assert classes == ["ant", "bee"] and len(images) == len(labels) == 18
    assert images.shape[1:] == (8, 8, 3) and images.dtype == torch.uint8
    middle = images[:, 4, 4].tolist()
    wanted = [[200, 0, 0] if y == 0 else [0, 200, 0] for y in labels]
    assert middle == wanted


def test_folder_images_come_in_a_fixed_mixed_order(images):
    (_, labels), classes = tokenizer.load_images(str(images), "train", 16)
    (pixels, again), _ = tokenizer.load_images(str(images), "train", 16)
    assert classes == ["ant", "bee", "cat"] and torch.equal(labels, again)
    assert labels.bincount().tolist() == [12, 12, 12]
    assert len(labels[:12].unique()) == 3  # a part of the data is of all classes
    assert torch.equal(pixels.float().mean(dim=(1, 2)).argmax(dim=1), labels)


def test_a_folder_without_splits_is_split_90_to_10(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for i in range(20):
            value = i + 100 * (name == "bee")
            Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(
                tmp_path / name / f"{i}.png"
            )
    (tmp_path / "ant" / ".DS_Store").write_text("no image, but hidden")
    train, test = (
        tokenizer.load_images(str(tmp_path), split, 8)[0].x[:, 0, 0, 0].tolist()
        for split in ("train", "test")
    )
    assert len(train) == 36 and len(test) == 4
    assert sorted(train + test) == [*range(20), *range(100, 120)]  # nothing twice


# ------------------------------------------------------------------------- quantisation


def test_quantize_picks_the_nearest_code(model):
    z = unit_vectors(3, 8, 4, 4)
    z_q, fine, _ = model.quantize(z)
    assert fine.dtype == torch.int64
    for b in range(3):
        for i in range(16):
            vector = z[b, :, i // 4, i % 4]  # tokens go row by row
            distances = [(vector - code).norm().item() for code in model.codebook]
            assert fine[b, i] == np.argmin(distances), "not the nearest codeword"
            torch.testing.assert_close(
                z_q[b, :, i // 4, i % 4], model.codebook[fine[b, i]]
            )
    torch.testing.assert_close(model.codes(fine), z_q)


def test_quantize_hands_the_gradient_straight_through(model):
    z = unit_vectors(2, 8, 4, 4).requires_grad_()
    z_q, _, _ = model.quantize(z)
    weight = torch.randn_like(z)
    (z_q * weight).sum().backward()
    assert z.grad is not None, "no gradient reaches z: is z_q detached from it?"
    message = "the gradient of z_q must reach z unchanged, as if z_q were z"
    torch.testing.assert_close(z.grad, weight, msg=message)


def test_commitment_pulls_the_encoder_and_not_the_codes(model):
    z, before = unit_vectors(2, 8, 4, 4).requires_grad_(), model.codebook.clone()
    z_q, _, commitment = model.quantize(z)
    codes = z_q.detach()
    message = (
        "the mean over all elements (not the sum over d) of (z - z_q)^2 is asked for"
    )
    wanted = (z - codes).square().mean()
    torch.testing.assert_close(commitment, wanted, msg=message)
    (gradient,) = torch.autograd.grad(commitment, z, retain_graph=True)
    wanted = 2 * (z - codes).detach() / z.numel()
    message = "the commitment must pull z: is z detached where the code should be?"
    torch.testing.assert_close(gradient, wanted, msg=message)
    assert torch.equal(model.codebook, before), "quantize must not move the codes"


def test_the_codebook_follows_moving_averages(model):
    z, fine = unit_vectors(2, 8, 4, 4), torch.randint(24, (2, 16))
    count, total = model.moving_count.clone(), model.moving_sum.clone()
    model.update_codebook(z, fine, np.random.default_rng(0), decay=0.9, dead=0.0)
    vectors = z.permute(0, 2, 3, 1).reshape(-1, 8)
    for code in range(24):
        mine = vectors[fine.flatten() == code]
        new_count = 0.9 * count[code] + 0.1 * len(mine)
        new_sum = 0.9 * total[code] + 0.1 * mine.sum(0)
        torch.testing.assert_close(model.moving_count[code], new_count)
        torch.testing.assert_close(model.codebook[code], new_sum / new_sum.norm())
    torch.testing.assert_close(model.codebook.norm(dim=1), torch.ones(24))


def test_dead_codes_start_anew_at_an_encoder_output(model):
    model.moving_count[5] = 1e-4
    z, fine = unit_vectors(2, 8, 4, 4), torch.arange(32).view(2, 16) % 24
    fine[fine == 5] = 6
    before = model.codebook.clone()
    model.update_codebook(z, fine, np.random.default_rng(0))
    vectors = z.permute(0, 2, 3, 1).reshape(-1, 8)
    assert (vectors - model.codebook[5]).norm(dim=1).min() < 1e-6
    assert (before - model.codebook).norm(dim=1)[[4, 6]].max() < 0.2  # others live on
    # A code is dead in comparison with the others, not below a fixed number.
    model.moving_count.mul_(1000)
    model.moving_sum.mul_(1000)
    model.moving_count[7] = 0.5
    model.update_codebook(z, fine, np.random.default_rng(0))
    near = (vectors - model.codebook[7]).norm(dim=1).min()
    assert near < 1e-6, (
        "code 7 is chosen far less than the others, and was not restarted"
    )
    # It is not dead at once: it counts as used until the averages say otherwise.
    reborn = model.codebook[5].clone()
    model.update_codebook(z, fine, np.random.default_rng(1))
    torch.testing.assert_close(model.codebook[5], reborn)


def test_many_dead_codes_start_at_many_vectors_drawn_by_the_generator(model):
    z, state = unit_vectors(2, 8, 2, 4), model.state_dict()
    state = {name: values.clone() for name, values in state.items()}

    def restarted(seed):
        model.load_state_dict(state)
        model.moving_count.fill_(1e-6)  # all dead but code 0: more than vectors
        model.moving_count[0] = 1e3
        fine = torch.zeros(2, 8, dtype=torch.long)
        model.update_codebook(z, fine, np.random.default_rng(seed))
        return model.codebook[1:].clone()

    one, same, other = restarted(0), restarted(0), restarted(1)
    vectors = z.permute(0, 2, 3, 1).reshape(-1, 8)
    distance, nearest = torch.cdist(one, vectors).min(dim=1)
    assert distance.max() < 1e-3, "a dead code must start at one of the vectors"
    assert nearest.max() >= 8, "the vectors are those of all images of the batch"
    assert len(one.unique(dim=0)) > 5, "all dead codes start at the same few vectors"
    assert torch.equal(one, same), "the same generator must restart codes alike"
    assert not torch.equal(one, other), "the vectors must be drawn by rng"


def test_a_code_is_dead_by_the_new_counts_and_the_share_asked_for(model):
    model.moving_count.fill_(1.0)
    model.moving_count[0], model.moving_count[9], model.moving_count[23] = 30, 1e-3, 0.6
    # Half of each count and half of these: 23, 4.0 and 0.3, others 1 or 0.5; mean 1.74.
    fine = torch.tensor([0] * 16 + [9] * 8 + list(range(1, 9))).view(2, 16)
    z = unit_vectors(2, 8, 4, 4)
    rows = z.permute(0, 2, 3, 1).reshape(-1, 8)
    sums = torch.zeros(24, 8).index_add_(0, fine.flatten(), rows)
    alive = F.normalize(model.moving_sum + sums, dim=1)
    model.update_codebook(z, fine, np.random.default_rng(0), decay=0.5, dead=0.2)
    restarted = (model.codebook - alive).norm(dim=1) > 1e-4
    assert restarted.nonzero()[:, 0].tolist() == [23], (
        "0.3 is less than 0.2 of the mean count after the update, and no other count is"
    )
    message = "a restarted code counts as the average one (set_codes)"
    assert model.moving_count[23].item() == pytest.approx(1.74, abs=0.1), message


def test_usage_of_even_and_of_single_use(model):
    assert model.usage() == pytest.approx((100, 24))
    model.moving_count.zero_()
    model.moving_count[3] = 5.0
    assert model.usage() == pytest.approx((100 / 24, 1))


def test_encoder_outputs_are_unit_vectors_on_the_token_grid():
    for downsample, side in ((2, 16), (4, 8), (8, 4), (16, 2)):
        model = VQVAE(VQVAEConfig(32, downsample, channels=16, codebook_size=24))
        z = model.encode(torch.randn(2, 3, 32, 32))
        assert z.shape == (2, 8, side, side) and model.grid == (side, side)
        torch.testing.assert_close(z.norm(dim=1), torch.ones(2, side, side))
        assert model.decode(z).shape == (2, 3, 32, 32)


def test_the_loss_reaches_encoder_and_decoder(model):
    x = torch.randn(2, 3, 16, 16)
    x_hat, _, _, commitment = model(x)
    (F.mse_loss(x_hat, x) + commitment).backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters()
    )


# -------------------------------------------------------------------- files and numbers


def test_psnr_of_a_known_error():
    images = torch.full((2, 4, 4, 3), 100, dtype=torch.uint8)
    assert tokenizer.psnr(images, images + 5) == pytest.approx(20 * math.log10(255 / 5))


def test_learning_rate_warms_up_and_decays_to_a_tenth():
    rates = [tokenizer.learning_rate(s, 500, 2.0) for s in range(501)]
    assert rates[0] == pytest.approx(2 / 50) and max(rates) == rates[50] == 2.0
    assert rates[275] == pytest.approx(1.1) and rates[500] == pytest.approx(0.2)


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    tokenizer.save(tmp_path / "a.pt", script="x.py", value=1)
    writing = tokenizer.replacing(tmp_path / "a.pt")
    with pytest.raises(KeyboardInterrupt), writing as temporary:
        temporary.write_bytes(b"half a fi")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]
    assert tokenizer.load(tmp_path / "a.pt", "x.py")["value"] == 1


def test_artifacts_that_cannot_be_used_are_named(tmp_path):
    path = tmp_path / "a.pt"

    def message(**ids):
        with pytest.raises(SystemExit) as exit_info:
            tokenizer.load(path, "x.py --flag", **ids)
        assert "\n" not in exit_info.value.code and str(path) in exit_info.value.code
        return exit_info.value.code

    assert "missing: run python x.py --flag first" in message()
    tokenizer.save(path, script="x.py", codebook_id="abc", weights=torch.zeros(1000))
    assert tokenizer.load(path, "x.py", codebook_id="abc")["codebook_id"] == "abc"
    assert "another codebook (abc, here def)" in message(codebook_id="def")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "cannot be read" in message()
    tokenizer.save(path, script="y.py")
    assert "not written by x.py" in message()
    torch.save({"script": "x.py", "code": math.sqrt}, path)  # no full unpickling
    assert "cannot be read" in message()


# ----------------------------------------------------------------------------- training


def test_the_loss_is_the_error_and_a_quarter_of_the_commitment(
    images, tmp_path, monkeypatch
):
    expected, original = [], VQVAE.forward

    def forward(self, x, quantized):
        outputs = original(self, x, quantized)
        commitment = outputs[3].item() if quantized else 0
        assert commitment > 0 or not quantized
        expected.append((outputs[0] - x).square().mean().item() + commitment / 4)
        return outputs

    monkeypatch.setattr(VQVAE, "forward", forward)
    tokenizer.main(
        [*TINY, "--data", str(images), "--out", str(tmp_path), "--steps", "4"]
    )
    history = tokenizer.load(tmp_path / "tokenizer.pt", "tokenizer.py")["history"]
    assert history["loss"] == pytest.approx(expected)


@pytest.mark.parametrize("steps", ["3", "1"])  # 1: before --codebook-after 2
def test_training_starts_the_codebook_at_encoder_outputs(
    images, tmp_path, monkeypatch, steps
):
    placed = []
    original = VQVAE.set_codes

    def set_codes(self, which, vectors):
        placed.append((len(which), vectors.norm(dim=1), len(vectors.unique(dim=0))))
        original(self, which, vectors)

    monkeypatch.setattr(VQVAE, "set_codes", set_codes)
    command = [*TINY, "--data", str(images), "--out", str(tmp_path), "--steps", steps]
    tokenizer.main(command)
    count, norms, distinct = placed[0]
    assert count == 24 and distinct > 12
    torch.testing.assert_close(norms, torch.ones(24))


def test_a_resumed_run_ends_with_the_same_weights(images, tmp_path, monkeypatch):
    command = [*TINY, "--data", str(images), "--steps", "7"]
    outs = tmp_path / "a", tmp_path / "b"
    check_resume(monkeypatch, tokenizer, "tokenizer.pt", command, *outs)
    tokens = [tokenizer.load(o / "tokens.pt", "tokenizer.py") for o in outs]
    assert torch.equal(tokens[0]["train_fine"], tokens[1]["train_fine"])
    assert tokens[0]["train_fine"].shape == (36, 16)
    _, artifact = tokenizer.load_tokenizer(outs[0], torch.device("cpu"))
    assert artifact["codebook_id"] == tokens[0]["codebook_id"]


def test_resume_with_other_settings_is_refused(images, tmp_path, capsys):
    command = [*TINY, "--data", images, "--out", tmp_path]
    tokenizer.main([str(a) for a in [*command, "--steps", 2]])
    before = (tmp_path / "tokenizer.pt").read_bytes()
    more = "--steps", 3, "--resume"
    code, message = error_of(capsys, tokenizer.main, *command, *more)
    assert code == 1 and "trained with steps 2, not 3" in message
    assert (tmp_path / "tokenizer.pt").read_bytes() == before


def test_a_loss_that_is_not_finite_keeps_the_last_good_file(
    images, tmp_path, capsys, monkeypatch
):
    def learning_rate(step, steps, peak):
        return math.inf if step == 5 else peak  # ruins the weights in step 5

    monkeypatch.setattr(tokenizer, "learning_rate", learning_rate)
    command = [*TINY, "--data", images, "--out", tmp_path, "--steps", 60]
    code, message = error_of(capsys, tokenizer.main, *command, "--save-every", 2)
    assert code == 1 and "a weight is not finite" in message
    code, message = error_of(capsys, tokenizer.main, *command, "--save-every", 4)
    assert code == 1 and "the loss is nan at step 6" in message
    artifact = tokenizer.load(tmp_path / "tokenizer.pt", "tokenizer.py")
    assert artifact["step"] == 4
    assert all(weights.isfinite().all() for weights in artifact["model"].values())
    assert not (tmp_path / "tokens.pt").exists()


def test_a_dataset_that_cannot_be_downloaded(tmp_path, capsys, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(tokenizer.torchvision.datasets, "CIFAR10", offline)
    monkeypatch.chdir(tmp_path)
    code, message = error_of(capsys, tokenizer.main, "--data", "cifar10")
    assert (
        code == 1 and str(tmp_path / "data") in message and "--data glyphs" in message
    )


# ------------------------------------------------------------------ how pieces are joined


def both_sets(images):
    return [
        tokenizer.load_images(str(images), split, 16)[0] for split in ("train", "test")
    ]


def test_it_learns_from_training_images_and_measures_test_images(
    images, tmp_path, monkeypatch
):
    train_set, test_set = both_sets(images)
    forwards = spy(monkeypatch, VQVAE, "forward")
    measured = spy(monkeypatch, tokenizer, "psnr")
    command = [*TINY, "--data", str(images), "--out", str(tmp_path), "--steps", "5"]
    batches = {}
    for seed in (0, 1):
        forwards.clear()
        tokenizer.main([*command, "--seed", str(seed), "--save-every", "2"])
        everything = tokenizer.to_float(train_set.x)
        batches[seed] = [places(call["x"], everything) for call in forwards]
        check_batches(batches[seed], 5, 4)
        # --codebook-after 2
        assert [call["quantized"] for call in forwards] == [False] * 2 + [True] * 3
    check_batches(batches[0] + batches[1], 10, 4)  # no draw of seed 0 returns in seed 1
    assert len(measured) == 6  # after 4 and 5 steps, and all at the end; two seeds
    artifact = tokenizer.load(tmp_path / "tokenizer.pt", "tokenizer.py")
    rows = artifact["history"]["test"]  # after 2 steps there is no codebook to measure
    assert [math.isnan(row["perplexity"]) for row in rows] == [True, False, False]
    assert all(torch.equal(call["images"], test_set.x) for call in measured)


def test_flags_schedule_and_clock_of_the_tokenizer(images, tmp_path, monkeypatch):
    command = [*TINY[:6], "--codebook-after", "2", "--data", str(images)]
    command += ["--code-dim", "5", "--downsample", "2", "--out", str(tmp_path)]
    check_schedule(monkeypatch, tokenizer, command, tmp_path / "tokenizer.pt")
    model, artifact = tokenizer.load_tokenizer(tmp_path, torch.device("cpu"))
    assert artifact["config"] == vars(VQVAEConfig(16, 2, 16, 24, 5))
    assert artifact["data"]["name"] == str(images)
    assert artifact["data"]["image_size"] == 16
    assert artifact["data"]["classes"] == ["ant", "bee", "cat"]
    # tokens.pt: of the last weights, each image beside its class.
    for split, examples in zip(("train", "test"), both_sets(images)):
        tokens, file = tokenizer.load_tokens(tmp_path, split)
        assert torch.equal(tokens.x, tokenizer.tokenize(model, examples.x))
        assert torch.equal(tokens.y, examples.y)
        assert file["codebook_id"] == artifact["codebook_id"]
    assert file["classes"] == ["ant", "bee", "cat"] and file["codebook_size"] == 24
    assert tuple(file["grid"]) == (8, 8)


def test_the_codebook_follows_the_vectors_of_the_batch(images, tmp_path, monkeypatch):
    updates = spy(monkeypatch, VQVAE, "update_codebook")
    command = [*TINY, "--data", str(images), "--out", str(tmp_path), "--steps", "4"]
    tokenizer.main(command)
    assert len(updates) == 2  # in the steps 2 and 3
    for call in updates:
        assert call["z"].shape == (4, 8, 4, 4) and not call["z"].requires_grad
        assert call["fine"].shape == (4, 16)


def test_auto_says_why_it_is_the_cpu(monkeypatch, capsys):
    def init():
        raise RuntimeError("Found no NVIDIA driver\nand more")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    assert tokenizer.pick_device("auto").type == "cpu"
    assert capsys.readouterr().out.count("\n") == 1
    monkeypatch.setattr(torch.version, "cuda", None)
    assert tokenizer.pick_device("auto").type == "cpu"
    assert capsys.readouterr().out == ""


def test_codes_are_found_in_float32_under_autocast(model):
    z = unit_vectors(8, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        _, fine, commitment = model.quantize(z)
    assert torch.equal(fine, model.quantize(z)[1]) and commitment.dtype == torch.float32


def test_a_batch_holds_each_example_beside_its_class():
    examples = tokenizer.Examples(torch.arange(50)[:, None], torch.arange(50) + 7)
    x, y = examples.batch(np.random.default_rng(0), 400)
    assert torch.equal(x[:, 0] + 7, y) and len(y.unique()) == 50


def test_a_reborn_code_weighs_as_much_as_an_average_one(model):
    model.moving_count.fill_(7.0)
    vector = unit_vectors(1, 8)
    model.set_codes(torch.tensor([5]), vector)
    torch.testing.assert_close(model.moving_sum[5], 7 * vector[0])
    assert model.moving_count[5] == 7 and torch.equal(model.codebook[5], vector[0])


def test_psnr_is_the_mean_over_images_not_that_of_the_pooled_error():
    images = torch.full((2, 4, 4, 3), 100, dtype=torch.uint8)
    others = images + torch.tensor([5, 50], dtype=torch.uint8).view(2, 1, 1, 1)
    each = [20 * math.log10(255 / 5), 20 * math.log10(255 / 50)]
    assert tokenizer.psnr(images, others) == pytest.approx(sum(each) / 2)


def test_glyphs_show_the_digit_of_their_label_after_the_first_thousand():
    images, y = tokenizer.paint_glyphs(1800, 32, seed=0)
    brightness = images.amax(dim=-1).float().flatten(1)[1000:]
    means = torch.stack([brightness[y[1000:] == digit].mean(0) for digit in range(10)])
    masters = F.avg_pool2d(tokenizer.glyph_masters(64).mean(0)[:, None], 2).flatten(1)
    likeness = torch.corrcoef(torch.cat([means, masters]))[:10, 10:]
    assert likeness.argmax(dim=1).tolist() == list(range(10))


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_train_and_test_of_a_known_data_set(monkeypatch, name):
    def known(root, train, download):
        shape = (6, 32, 32, 3) if name == "cifar10" else (6, 28, 28)
        data = np.full(shape, 10 if train else 20, np.uint8)
        data[:, 0, 0] = 99
        data = data if name == "cifar10" else torch.from_numpy(data)
        return type("Known", (), {"data": data, "targets": [0, 1] * 3, "classes": "ab"})

    names = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}
    monkeypatch.setattr(tokenizer.torchvision.datasets, names[name], known)
    for split, value in (("train", 10), ("test", 20)):
        (x, y), classes = tokenizer.load_images(name, split, 32)
        assert x.shape == (6, 32, 32, 3) and x.dtype == torch.uint8
        assert (x[:, 16, 16] == value).all() and classes == ["a", "b"]
        border = 0 if name == "cifar10" else 2  # grey images are padded
        assert (x[:, border, border] == 99).all() and y.tolist() == [0, 1] * 3


def test_test_is_preferred_to_val_and_images_are_turned_then_resized(tmp_path):
    for split, value in (("train", 10), ("val", 20), ("test", 30)):
        folder = tmp_path / split / "ant"
        folder.mkdir(parents=True)
        pixels = np.full((16, 24, 3), value, np.uint8)
        pixels[:2] = 250  # a bright upper edge, which a crop before resizing would lose
        exif = Image.Exif()
        exif[0x0112] = 3  # the camera stood on its head
        Image.fromarray(pixels).save(folder / "0.png", exif=exif)
    (x, _), _ = tokenizer.load_images(str(tmp_path), "test", 8)
    assert (x[:, :6] == 30).all(), "not the images of test/"
    assert (x[:, 7] > 200).all(), "not turned as EXIF says, or cropped before resizing"
