import math
import sys
from copy import deepcopy
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import NAMES, pictures, places, spy
from PIL import Image

import tokenizer
from tokenizer import VQVAE, Examples, VQVAEConfig, as_rows, load_examples, read_images

SMALL = ["--image-size", "16", "--channels", "16", "--codebook-size", "24"]
SMALL += ["--codebook-after", "2"]
TINY = [*SMALL, "--batch-size", "4", "--save-every", "100"]


def train(data, out, *flags, steps=3):
    """Train a tiny tokenizer on the images in data; return tokenizer.pt."""
    command = [*TINY, "--data", str(data), "--out", str(out), "--steps", str(steps)]
    tokenizer.main([*command, *flags])
    return torch.load(out / "tokenizer.pt", weights_only=True)


def refused(data, out, *flags):
    """The error, one line, of a training that must end early."""
    command = [*TINY, "--data", data, "--out", out, *flags]
    with pytest.raises(SystemExit) as exit_info:
        tokenizer.main([str(part) for part in command])
    message = exit_info.value.code
    assert message.startswith("error: ") and "\n" not in message
    return message


def unit_vectors(*shape):
    return F.normalize(torch.randn(shape), dim=1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return VQVAE(VQVAEConfig(image_size=16, channels=16, codebook_size=24))


# -------------------------------------------------------------------- the user's images


def paint(path, value):
    """A grey 8x8 image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, value, value)).save(path)


def values(folder):
    """The sorted grey values of each class: (training, test, class names)."""
    *sets, names = read_images(str(folder), 8)
    grey = [[sorted(x[y == n, 4, 4, 0].tolist()) for n in y.unique()] for x, y in sets]
    return *grey, names


@pytest.mark.parametrize("test", ["test", "val", "TEST", "Val"])
def test_training_and_test_images_in_folders_of_their_own(tmp_path, test):
    for split, start in (("Train", 10), (test, 20)):
        for i in range(start // 10):
            paint(tmp_path / split / "bee" / f"{i}.png", start + i + 100)
            paint(tmp_path / split / "ant" / f"{i}.png", start + i)
    if test == "test":  # the test set is preferred to the validation set
        paint(tmp_path / "val" / "cat" / "0.png", 30)
    assert values(tmp_path) == ([[10], [110]], [[20, 21], [120, 121]], ["ant", "bee"])


def test_every_tenth_file_of_a_class_is_held_out(tmp_path):
    for name, start, count in (("ant", 0, 20), ("bee", 100, 2)):
        for i in range(count):
            paint(tmp_path / name / f"{i:02}.png", start + i)
    (tmp_path / "README.txt").write_text("a file beside the classes")
    (tmp_path / "ant" / ".DS_Store").write_text("hidden")
    for hidden in ("ant/.ipynb_checkpoints", ".thumbnails", "__MACOSX"):
        paint(tmp_path / hidden / "0.png", 200)
    rest = [i for i in range(20) if i not in (0, 10)]
    assert values(tmp_path) == ([rest, [101]], [[0, 10], [100]], ["ant", "bee"])


WRONG_LAYOUTS = [  # --data, an image that is added, what the error says
    ("images", "images/train/dog/.hidden.png", "no training images of class dog"),
    ("images", "images/test/dog/0.png", "no training images of class dog"),
    ("images", "images/train/dog/0.png", "no test images of class dog"),
    ("images", "images/train/ant/more/0.png", "ant/more is a folder where images"),
    ("half", "half/train/ant/0.png", "train/ant is a folder where images should be"),
    ("few", "few/dog/0.png", "no training images of class dog"),
    ("files", "files/0.png", "no folders of classes"),
    ("nowhere", "files/0.png", "no folders of classes"),
]


@pytest.mark.parametrize(("data", "added", "said"), WRONG_LAYOUTS)
def test_any_other_layout_is_refused(images, data, added, said):
    root = images.parent
    paint(root / added, 0)
    message = refused(root / data, root / "out")
    assert said in message and str(root / data) in message
    assert tokenizer.LAYOUT in message and not (root / "out").exists()


def test_images_are_turned_resized_and_cropped_in_the_centre(tmp_path):
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, 16:32, 1] = 200  # the middle third is green
    pixels[:2] = 250  # the upper edge is white: a crop before resizing would lose it
    exif = Image.Exif()
    exif[0x0112] = 3  # the camera was upside down
    for split in ("train", "test"):
        paint(tmp_path / split / "ant" / "0.png", 0)
        Image.fromarray(pixels).save(tmp_path / split / "ant" / "0.png", exif=exif)
    for x, _ in read_images(str(tmp_path), 8)[:2]:
        assert x.shape == (1, 8, 8, 3) and x.dtype == torch.uint8
        assert (x[0, :6, 1:7] == torch.tensor([0, 200, 0])).all(), "not the centre"
        assert (x[0, 7] > 200).all(), "not turned as EXIF says, or first cropped"


def grey_values(image, path, **how):
    """The grey values that read_image finds in image, once it is saved."""
    image.save(path, **how)
    read = tokenizer.read_image(path)
    assert read.mode == "RGB"
    return sorted(set(np.asarray(read).flatten().tolist()))


def test_more_than_8_bits_are_scaled_or_refused(tmp_path):
    deep = Image.fromarray(np.full((8, 8), [0, 128, 16384, 65535] * 2, np.uint16))
    for name in ("deep.png", "deep.tiff"):
        assert grey_values(deep, tmp_path / name) == [0, 64, 255]
    path, rows = tmp_path / "grey.tiff", np.full((8, 8), [0, 7, 255, 9] * 2)
    for kind, wrong in ((np.float32, 0.5), (np.float32, math.nan), (np.int32, 256)):
        assert grey_values(Image.fromarray(rows.astype(kind)), path) == [0, 7, 9, 255]
        with pytest.raises(SystemExit) as exit_info:
            grey_values(Image.fromarray(np.full((8, 8), wrong, kind)), path)
        said = f"error: {path} cannot be used: its values are not integers in 0..255"
        assert exit_info.value.code.startswith(said)


def test_what_is_transparent_is_white(tmp_path):
    noise = np.random.default_rng(0).integers(256, size=(8, 8, 4), dtype=np.uint8)
    noise[..., 3] = 0
    assert grey_values(Image.fromarray(noise), tmp_path / "a.png") == [255]
    palette = Image.fromarray(noise[..., :3]).quantize(4)
    assert grey_values(palette, tmp_path / "b.png", transparency=bytes(4)) == [255]


def test_the_first_unreadable_file_is_named(images, tmp_path):
    files = [path for path, _ in tokenizer.find_images(images)[0][0]]
    contents = (b"", b"some text", files[9].read_bytes()[:100])
    for first, content in zip((9, 5, 2), contents):  # the later ones stay broken
        files[first].write_bytes(content)
        message = refused(images, tmp_path / "out")
        assert f"{files[first]} cannot be used" in message
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("counts", [[5, 5, 5], [70, 0, 20, 10], [1, 40], [90, 9, 9]])
def test_classes_alternate_in_their_proportions(counts):
    y = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    y = y[torch.randperm(len(y))]
    mixed = tokenizer.interleave(Examples(torch.arange(len(y)), y))
    assert torch.equal(mixed.x.sort()[0], torch.arange(len(y))), "not all, each once"
    assert torch.equal(mixed.y, y[mixed.x]), "an example has lost its class"
    shares = torch.tensor(counts) / len(y)
    for n in range(len(y) + 1):
        error = mixed.y[:n].bincount(minlength=len(counts)) - n * shares
        # Up to rounding: every class may be half an example ahead or behind.
        assert (error.abs() <= 0.5 + shares * len(counts) / 2 + 1e-4).all(), n


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "CIFAR10"])
def test_train_and_test_of_a_known_data_set(monkeypatch, name):
    def known(root, train, download):
        shape = (6, 32, 32, 3) if name == "CIFAR10" else (6, 28, 28)
        data = torch.full(shape, 10 if train else 20, dtype=torch.uint8)
        data[:, 0, 0] = 99
        return type("Known", (), {"data": data, "targets": [0, 1] * 3, "classes": "ab"})

    monkeypatch.setattr(tokenizer.torchvision.datasets, name, known)
    flag = name.lower().replace("nm", "n_m")
    *sets, class_names = read_images(flag, 32)
    border = 0 if name == "CIFAR10" else 2  # grey images are padded
    for (x, y), value in zip(sets, (10, 20)):
        assert x.shape == (6, 32, 32, 3) and x.dtype == torch.uint8
        assert (x[:, border, border] == 99).all() and (x[:, 16, 16] == value).all()
        assert y.tolist() == [0, 1] * 3 and class_names == ["a", "b"]
    with pytest.raises(SystemExit, match="--image-size 64: .* have 32 pixels"):
        read_images(flag, 64)


def test_glyphs_depend_on_the_seed_alone(monkeypatch):
    paint = tokenizer.paint_glyphs
    (images, y), (again, y_again), (other, _) = (paint(40, 32, n) for n in (3, 3, 4))
    assert torch.equal(images, again) and torch.equal(y, y_again)
    assert not torch.equal(images, other) and y.bincount().tolist() == [4] * 10
    few = {"paint_glyphs": lambda count, size, seed: paint(50, size, seed)}
    monkeypatch.setattr(tokenizer, *few.popitem())
    train_set, test_set, _ = read_images("glyphs", 32)
    assert places(test_set.x, train_set.x).max() == -1, "a test image is in training"


def test_glyphs_show_the_digit_of_their_class():
    images, y = tokenizer.paint_glyphs(1800, 32, seed=0)
    brightness = images.amax(dim=-1).float().flatten(1)  # ink is bright, in any hue
    masters = F.avg_pool2d(tokenizer.glyph_masters(64).mean(0)[:, None], 2).flatten(1)
    for part in (slice(1000), slice(1000, None)):  # 1000 are painted at a time
        x, digits = brightness[part], y[part]
        means = torch.stack([x[digits == digit].mean(0) for digit in range(10)])
        likeness = torch.corrcoef(torch.cat([means, masters]))[:10, 10:]
        assert likeness.argmax(dim=1).tolist() == list(range(10))


# ---------------------------------------------------------------------------- the model


def test_quantize_picks_the_nearest_code(model):
    z = unit_vectors(3, 8, 4, 4)
    z_q, fine, _ = model.quantize(z)
    assert fine.dtype == torch.int64
    for b in range(3):
        for i in range(16):
            vector = z[b, :, i // 4, i % 4]  # tokens go row by row
            distances = [(vector - code).norm().item() for code in model.codebook]
            assert fine[b, i] == np.argmin(distances), "not the nearest code"
            code = model.codebook[fine[b, i]]
            torch.testing.assert_close(z_q[b, :, i // 4, i % 4], code)
    torch.testing.assert_close(model.codes(fine), z_q)
    model.codebook = unit_vectors(2**17, 8)  # so many that 8 rows are one chunk
    fine = torch.randint(2**17, (3, 16))
    assert torch.equal(model.quantize(model.codes(fine))[1], fine)


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
    message = "it must be the mean of (z - code)^2 over all elements, not a sum over d"
    torch.testing.assert_close(commitment, (z - codes).square().mean(), msg=message)
    (gradient,) = torch.autograd.grad(commitment, z, retain_graph=True)
    wanted = 2 * (z - codes).detach() / z.numel()
    message = "the commitment must pull z: is z detached where the code should be?"
    torch.testing.assert_close(gradient, wanted, msg=message)
    assert torch.equal(model.codebook, before), "quantize must not move the codes"


def test_codes_are_found_in_float32_under_autocast(model):
    z = unit_vectors(8, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        _, fine, commitment = model.quantize(z)
    assert torch.equal(fine, model.quantize(z)[1]) and commitment.dtype == torch.float32


def test_the_codebook_follows_moving_averages(model):
    z, fine = unit_vectors(2, 8, 4, 4), torch.randint(24, (2, 16))
    count, total = model.moving_count.clone(), model.moving_sum.clone()
    model.update_codebook(z, fine, np.random.default_rng(0), decay=0.9, dead_below=0.0)
    for code in range(24):
        own = as_rows(z)[fine.flatten() == code]
        new_count = 0.9 * count[code] + 0.1 * len(own)
        new_sum = 0.9 * total[code] + 0.1 * own.sum(0)
        torch.testing.assert_close(model.moving_count[code], new_count)
        torch.testing.assert_close(model.codebook[code], new_sum / new_sum.norm())
    torch.testing.assert_close(model.codebook.norm(dim=1), torch.ones(24))


def test_dead_codes_start_anew_at_an_encoder_output(model):
    model.moving_count[5] = 1e-4
    z, fine = unit_vectors(2, 8, 4, 4), torch.arange(32).view(2, 16) % 24
    fine[fine == 5] = 6
    before, vectors = model.codebook.clone(), as_rows(z)
    model.update_codebook(z, fine, np.random.default_rng(0))
    assert (vectors - model.codebook[5]).norm(dim=1).min() < 1e-6
    assert (before - model.codebook).norm(dim=1)[[4, 6]].max() < 0.2  # others stay
    model.moving_count.mul_(1000)
    model.moving_sum.mul_(1000)
    model.moving_count[7] = 0.5
    model.update_codebook(z, fine, np.random.default_rng(0))
    near = (vectors - model.codebook[7]).norm(dim=1).min()
    assert near < 1e-6, "compare the count with those of the others, not with a number"
    again = model.codebook[5].clone()
    model.update_codebook(z, fine, np.random.default_rng(1))
    torch.testing.assert_close(model.codebook[5], again, msg="dead again at once")


def test_many_dead_codes_start_at_many_vectors_drawn_by_the_generator(model):
    z, fine = unit_vectors(2, 8, 2, 4), torch.zeros(2, 8, dtype=torch.long)
    model.moving_count.fill_(1e-6)  # all codes but 0 are dead: more than vectors
    model.moving_count[0] = 1e3

    def restarted(seed):
        copy = deepcopy(model)
        copy.update_codebook(z, fine, np.random.default_rng(seed))
        return copy.codebook[1:]

    one, same, other = restarted(0), restarted(0), restarted(1)
    distance, nearest = torch.cdist(one, as_rows(z)).min(dim=1)
    assert distance.max() < 1e-3, "a dead code must start at one of the vectors"
    assert nearest.max() >= 8, "choose among the vectors of all images of the batch"
    assert len(one.unique(dim=0)) > 5, "all dead codes start at the same few vectors"
    assert torch.equal(one, same), "the same rng must choose the same vectors"
    assert not torch.equal(one, other), "rng must choose the vectors"


def test_a_code_is_dead_by_the_new_counts_and_the_share_asked_for(model):
    model.moving_count.fill_(1.0)
    model.moving_count[0], model.moving_count[9], model.moving_count[23] = 30, 1e-3, 0.6
    # The EMAs are the mean of old and new counts: 23, 4.0 and 0.3 for these three, and
    # 1 or 0.5 for the other codes. Their mean is 1.74.
    fine = torch.tensor([0] * 16 + [9] * 8 + list(range(1, 9))).view(2, 16)
    z = unit_vectors(2, 8, 4, 4)
    sums = torch.zeros(24, 8).index_add_(0, fine.flatten(), as_rows(z))
    alive = F.normalize(model.moving_sum + sums, dim=1)
    model.update_codebook(z, fine, np.random.default_rng(0), decay=0.5, dead_below=0.2)
    restarted = (model.codebook - alive).norm(dim=1) > 1e-4
    message = "only 0.3 is below 0.2 of the mean count after the update"
    assert restarted.nonzero()[:, 0].tolist() == [23], message
    message = "a re-initialised code has the count of an average one (set_codes)"
    assert model.moving_count[23].item() == pytest.approx(1.74, abs=0.1), message


def test_fill_codebook_sets_every_code_to_an_encoder_output(model):
    images, _ = pictures(np.random.default_rng(0), 20)
    model.moving_count.fill_(7.0)
    model.fill_codebook(images, np.random.default_rng(0))
    outputs = as_rows(model.encode(tokenizer.to_float(images)))
    assert torch.cdist(model.codebook, outputs).min(dim=1)[0].max() < 1e-3
    assert len(model.codebook.unique(dim=0)) > 12, "codes start at the same few vectors"
    torch.testing.assert_close(model.moving_count, torch.full((24,), 7.0))  # average
    torch.testing.assert_close(model.moving_sum, 7 * model.codebook)


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


def test_the_error_reaches_encoder_and_decoder(model):
    x = torch.randn(2, 3, 16, 16)
    F.mse_loss(model(x)[0], x).backward()  # through the codes, without commitment
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_tokens_and_pixels_are_computed_in_parts(model, monkeypatch):
    images, _ = pictures(np.random.default_rng(0), 3)
    _, fine, _ = model.quantize(model.encode(tokenizer.to_float(images)))
    pixels = tokenizer.to_uint8(model.decode(model.codes(fine))).int()
    encoded = spy(monkeypatch, VQVAE, "encode")
    model.at_once = 4
    assert torch.equal(tokenizer.tokenize(model, images), fine)
    assert (tokenizer.reconstruct(model, fine) - pixels).abs().max() <= 1  # rounding
    assert [len(call["x"]) for call in encoded] == [4, 4, 1]


def test_uint8_survives_the_way_to_float_and_back():
    images = torch.arange(256 * 3).byte().view(1, 16, 16, 3)
    x = tokenizer.to_float(images)
    assert x.shape == (1, 3, 16, 16) and x.min() == -1 and x.max() == 1
    assert torch.equal(tokenizer.to_uint8(x), images)
    beyond = tokenizer.to_uint8(3 * x)  # darker than black, brighter than white
    assert torch.equal(beyond, tokenizer.to_uint8((3 * x).clip(-1, 1)))


def test_psnr_is_the_mean_over_images_not_that_of_the_pooled_error():
    images = torch.full((2, 4, 4, 3), 100, dtype=torch.uint8)
    others = images + torch.tensor([5, 50], dtype=torch.uint8).view(2, 1, 1, 1)
    each = [20 * math.log10(255 / 5), 20 * math.log10(255 / 50)]
    assert tokenizer.psnr(images, others) == pytest.approx(sum(each) / 2)
    assert tokenizer.psnr(images, images) == pytest.approx(78, abs=0.2)


# --------------------------------------------------------------- artifacts and training


def test_an_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    def half(artifact, path):
        path.write_bytes(b"half a fi")
        raise KeyboardInterrupt

    tokenizer.save(tmp_path / "new" / "fine.pt", value=1)
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        tokenizer.save(tmp_path / "new" / "fine.pt", value=2)
    assert tokenizer.load(tmp_path / "new", "fine.pt")["value"] == 1


def test_load_says_what_is_wrong(tmp_path, capsys):
    path, again = tmp_path / "baseline.pt", "run python ar_model.py --labels fine again"
    ids = {"codebook_id": "abc"}

    def error(**ids):
        with pytest.raises(SystemExit) as exit_info:
            tokenizer.load(tmp_path, "baseline.pt", **ids)
        return exit_info.value.code

    assert error() == f"error: {path} is missing: {again.replace('again', 'first')}"
    tokenizer.save(path, step=4, settings={"steps": 7}, **ids)
    other = f"error: {path} does not belong here (codebook_id abc, not x): {again}"
    assert error(codebook_id="x") == other
    assert tokenizer.load(tmp_path, "baseline.pt", **ids)["path"] == path
    assert capsys.readouterr().out == f"{path} is unfinished: step 4 of 7\n"
    path.write_bytes(path.read_bytes()[:300])
    assert error().startswith(f"error: {path} is unreadable")


def test_a_folder_inherits_from_the_nearest_above_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in (Path("out"), Path("out/M512")):
        tokenizer.save(folder / "fine.pt", folder=str(folder))
        assert tokenizer.load(folder, "fine.pt")["folder"] == str(folder)
        found = tokenizer.load(Path("out/M512/seed1"), "fine.pt")
        assert found["folder"] == str(folder)
        assert capsys.readouterr().out == f"using {folder / 'fine.pt'}\n"


def test_learning_rate_warms_up_and_decays_to_a_tenth():
    rates = [tokenizer.learning_rate(s, 500, 2.0) for s in range(501)]
    assert rates[0] == pytest.approx(2 / 50) and max(rates) == rates[50] == 2.0
    assert rates[275] == pytest.approx(1.1) and rates[500] == pytest.approx(0.2)


def test_the_loss_and_how_nan_ends_the_run(images, tmp_path, monkeypatch):
    updates, losses = spy(monkeypatch, torch.optim.AdamW, "step"), []
    original, path = VQVAE.forward, tmp_path / "tokenizer.pt"

    def forward(self, x, quantized):
        x_hat, z, fine, commitment = original(self, x, quantized)
        assert commitment > 0 or not quantized
        losses.append(((x_hat - x).square().mean() + commitment / 4).item())
        return x_hat * (math.nan if len(losses) == 6 else 1), z, fine, commitment

    monkeypatch.setattr(VQVAE, "forward", forward)
    message = refused(images, tmp_path, "--steps", 60, "--save-every", 4)
    assert "the gradient is nan at step 5: try a lower --lr" in message
    assert str(path) in message and not (tmp_path / "tokens.pt").exists()
    assert len(updates) == 5, "the optimizer has spoilt the weights"
    artifact = torch.load(path, weights_only=True)
    assert artifact["history"]["loss"] == pytest.approx(losses[:4])


def test_a_resumed_run_ends_with_the_same_weights(images, tmp_path, monkeypatch):
    flags = [*TINY, "--data", str(images), "--steps", "7"]
    outs = tmp_path / "a", tmp_path / "b"
    conftest.check_resume(monkeypatch, tokenizer, "tokenizer.pt", flags, *outs)
    one, other = (torch.load(o / "tokens.pt", weights_only=True) for o in outs)
    assert torch.equal(one["train"][0], other["train"][0])
    assert torch.equal(one["test"][0], other["test"][0])


def test_resume_needs_the_same_flags_and_images(images, tmp_path):
    out, resume = tmp_path / "out", ["--resume", "--steps", "3"]
    path, more = out / "tokenizer.pt", images / "train" / "bee" / "more.png"
    assert f"--resume: {path} is missing" in refused(images, out, *resume)
    train(images, out)
    before = {path: path.read_bytes() for path in out.iterdir()}
    for flags, said in ((["--steps", 4], "steps 3, not 4"), (["--seed", 1], "seed 0")):
        message = refused(images, out, *resume, *flags)
        assert f"--resume: {path} was trained with {said}" in message
    paint(more, 7)
    assert "trained with images_id" in refused(images, out, *resume)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    more.unlink()
    images = images.rename(tmp_path / "moved")  # the same images in another place
    train(images, out, "--resume", "--save-every", "7", "--keep", "2")


def test_copies_are_kept_along_the_way(images, tmp_path, monkeypatch):
    plain, kept, stopped = (tmp_path / name for name in ("plain", "kept", "stopped"))
    train(images, plain, "--save-every", "4", steps=7)
    artifact = train(images, kept, "--save-every", "4", "--keep", "3", steps=7)
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        conftest.interrupt_at(context, 3)
        train(images, stopped, "--save-every", "3", steps=7)
    copies = [kept / f"kept-0{number}" / "tokenizer.pt" for number in (1, 2, 3)]
    assert sorted(kept.glob("kept-*/*")) == copies
    assert not list(plain.glob("kept-*"))
    steps = [torch.load(path, weights_only=True)["step"] for path in copies]
    assert steps == [3, 5, 7] and artifact["step"] == 7
    assert [row["step"] for row in artifact["history"]["test"]] == [3, 4, 5, 7]
    last = kept / "tokenizer.pt"
    assert conftest.same_weights(copies[0], stopped / "tokenizer.pt")
    assert conftest.same_weights(copies[2], last)
    assert conftest.same_weights(last, plain / "tokenizer.pt"), "--keep has an effect"


def test_a_finished_run_is_kept_once(images, tmp_path, capsys, monkeypatch):
    def content(suffix, folders=("", "kept-01", "kept-02")):
        return [(tmp_path / f / f"tokenizer{suffix}").read_bytes() for f in folders]

    train(images, tmp_path, "--keep", "2")
    first = content(".pt")
    for step in (0, 1):  # stopped before and after the first save
        assert content(".pt") == first and "is kept" not in capsys.readouterr().out
        with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
            conftest.interrupt_at(context, step)
            flags = "--save-every", "1", "--seed", "1", "--keep", "4"
            train(images, tmp_path, *flags)
    assert "is kept as tokenizer.old.pt" in capsys.readouterr().out
    assert list(tmp_path.glob("kept-*/tokenizer.pt")), "a copy of the stopped run"
    train(images, tmp_path, "--seed", "1")  # the unfinished run is not kept
    assert not list(tmp_path.glob("kept-*/tokenizer.pt")), "copies of another run"
    train(images, tmp_path, "--seed", "1", "--resume")
    assert content(".old.pt") == first
    second = content(".pt", [""])
    train(images, tmp_path)
    assert content(".old.pt", [""]) == second


def test_the_first_mistake_ends_the_script(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tokenizer, "read_images", lambda *_: sys.exit("it reads"))
    for out in (tmp_path, tmp_path / "a" / "out"):
        message = refused(tmp_path, out)
        assert f"--out {out} lies in --data {tmp_path}" in message
    with pytest.raises(SystemExit, match="it reads"):  # a data set is no folder
        tokenizer.main(["--data", "glyphs", "--out", "glyphs/seed1"])
    with pytest.raises(SystemExit):
        tokenizer.main(["--image-size", "30"])
    assert "--image-size must be a multiple of 4" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- how pieces are joined


def test_images_pt_holds_the_images_of_the_folder(images, tmp_path, capsys):
    artifact = train(images, tmp_path / "out")
    printed = capsys.readouterr().out
    assert "36 + 24 images, 3 classes (ant, bee, cat)" in printed
    *sets, file = load_examples(tmp_path / "out", "images.pt")
    assert file["class_names"] == NAMES and file["data"] == "images"
    assert file["images_id"] == artifact["images_id"]
    for examples, count in zip(sets, (12, 8)):
        x, y = pictures(np.random.default_rng(count), count)
        where = places(examples.x, x)
        assert sorted(where.tolist()) == list(range(3 * count))
        assert torch.equal(examples.y, y[where])
        assert all(len(three.unique()) == 3 for three in examples.y.split(3))
        ants = where[examples.y == 0].tolist()
        assert ants != sorted(ants), "the order within a class is that of the files"
    paint(images / "test" / "bee" / "more.png", 7)
    assert train(images, tmp_path / "out")["images_id"] != file["images_id"]


def test_it_trains_on_training_images_alone(images, tmp_path, monkeypatch):
    names = "forward", "fill_codebook", "update_codebook"
    forwards, filled, updates = (spy(monkeypatch, VQVAE, name) for name in names)
    measured = spy(monkeypatch, tokenizer, "psnr")
    for seed in ("0", "1"):  # no batch of seed 0 returns in seed 1
        flags = ["--seed", seed, "--save-every", "2"]
        artifact = train(images, tmp_path, *flags, steps=5)
    train_set, test_set, _ = load_examples(tmp_path, "images.pt")
    everything = tokenizer.to_float(train_set.x)
    batches = [places(call["x"], everything) for call in forwards]
    conftest.check_batches(batches, 10, 4)
    # --codebook-after 2: at first it is a plain autoencoder.
    wanted = 2 * [False, False, True, True, True]
    assert [call["quantized"] for call in forwards] == wanted
    assert len(filled) == 2 and len(updates) == 6
    assert all(torch.equal(call["images"], train_set.x) for call in filled)
    for call in updates:
        assert call["z"].shape == (4, 8, 4, 4) and not call["z"].requires_grad
        assert call["fine"].shape == (4, 16)
    assert len(measured) == 6  # after 4 and 5 steps, and all at the end; two seeds
    assert all(torch.equal(call["images"], test_set.x) for call in measured)
    perplexities = [row["perplexity"] for row in artifact["history"]["test"]]
    assert [math.isnan(value) for value in perplexities] == [True, False, False]
    train(images, tmp_path, steps=1)  # before --codebook-after
    assert forwards[-1]["quantized"] and len(filled) == 3, "no codebook in the end"


def test_flags_schedule_and_clock_of_the_tokenizer(images, tmp_path, monkeypatch):
    drawn = spy(monkeypatch, tokenizer, "plot")
    flags = [*SMALL, "--data", str(images), "--out", str(tmp_path)]
    flags += ["--code-dim", "5", "--downsample", "2"]
    conftest.check_schedule(monkeypatch, tokenizer, flags, tmp_path / "tokenizer.pt")
    model, artifact = tokenizer.load_tokenizer(tmp_path, torch.device("cpu"))
    assert artifact["config"] == vars(VQVAEConfig(16, 2, 16, 24, 5))
    # tokens.pt belongs to the last weights, and has each image beside its class.
    *sets, _ = load_examples(tmp_path, "images.pt")
    *tokens, file = load_examples(tmp_path, "tokens.pt")
    for examples, labels in zip(sets, tokens):
        assert torch.equal(labels.x, tokenizer.tokenize(model, examples.x))
        assert torch.equal(labels.y, examples.y)
    assert file["images_id"] == artifact["images_id"]
    assert file["codebook_id"] == artifact["codebook_id"]
    assert file["codebook_id"] == tokenizer.short_hash(model.codebook)
    assert file["class_names"] == NAMES and file["codebook_size"] == 24
    assert tuple(file["grid"]) == (8, 8)
    pixels = tokenizer.reconstruct(model, tokens[1].x)
    assert torch.equal(drawn[0]["images"], sets[1].x)
    assert torch.equal(drawn[0]["reconstructions"], pixels)
