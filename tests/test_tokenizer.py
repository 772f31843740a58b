import hashlib
import math
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import keep_figures
from PIL import Image
from scipy.stats import chisquare, entropy

import tokenizer
from tokenizer import VQVAE, Examples, VQVAEConfig, as_rows


def train(data, out, *flags, steps=3):
    """Train a tiny tokenizer on the images in data; return tokenizer.pt."""
    small = ["--image-size=16", "--channels=24", "--codebook-size=20", "--batch-size=4"]
    command = [*small, f"--steps={steps}", f"--data={data}", f"--out={out}", *flags]
    tokenizer.main(command)
    return torch.load(out / "tokenizer.pt", weights_only=True)


def unit_vectors(*shape):
    return F.normalize(torch.randn(shape), dim=1)


@pytest.fixture(autouse=True)
def model():
    torch.manual_seed(0)
    return VQVAE(VQVAEConfig(image_size=16, channels=16, codebook_size=24))


def paint(path, pixels=None):
    """Save an image: pixels (H, W, 3), or 8x8 with the file's name as grey value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if pixels is None:
        pixels = np.full((8, 8, 3), int(path.stem.strip("_")))
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def fixed_images(folder, train=(9, 9), test=(4, 4), names="ab"):
    """A data folder. Its images come from a sine, not from a random generator."""
    for split, counts in (("train", train), ("test", test)):
        for y, count in enumerate(counts):
            for i in range(count):
                wave = np.sin(np.arange(768) * (0.02 + 0.01 * i + 0.1 * y) + len(split))
                pixels = (127.5 + 127.5 * wave).reshape(16, 16, 3)
                paint(folder / split / names[y] / f"{i}.png", pixels)
    return folder


# ---------------------------------------------------------------------------- the model


def test_constants_of_the_papers(model):
    # A ResBlock adds its layers to its input. (12 channels: 4 groups instead of 8.)
    block, x = tokenizer.ResBlock(12), torch.randn(2, 12, 6, 5)
    for p in block.parameters():
        torch.nn.init.zeros_(p)
    assert torch.equal(block(x), x)
    # LlamaGen: d = 8; AdamW with weight decay on matrices only.
    assert tokenizer.parse_args([]).code_dim == VQVAEConfig().code_dim == 8
    groups = tokenizer.adamw(model).param_groups
    assert {group["betas"] for group in groups} == {(0.9, 0.95)}
    decay = {p: group["weight_decay"] for group in groups for p in group["params"]}
    assert decay == {p: 0.05 * (p.ndim > 1) for p in model.parameters()}
    # A linear warm-up in 50 steps, then a cosine from the peak to a tenth of it.
    rates = [tokenizer.learning_rate(s, 500, 2.0) for s in (0, 24, 49, 50, 200, 500)]
    assert rates == pytest.approx([2 / 50, 1, 2, 2, 0.2 + 0.9 * 1.5, 0.2])
    # VQ-VAE: EMA decay 0.99. The commitment weight is in test_training.py.
    z, fine = unit_vectors(2, 8, 4, 4), torch.randint(24, (2, 16))
    model.update_codebook(z, fine, np.random.default_rng(0))
    counts = 0.99 + 0.01 * fine.flatten().bincount(minlength=24)
    torch.testing.assert_close(model.moving_count, counts)


def test_encoder_outputs_are_unit_vectors_on_the_token_grid():
    for downsample, side in ((2, 16), (4, 8), (8, 4), (16, 2)):
        model = VQVAE(VQVAEConfig(32, downsample, 16, codebook_size=24, code_dim=5))
        with torch.autocast("cpu", torch.bfloat16):
            x_hat, z, fine, commitment = model(torch.randn(2, 3, 32, 32))
        assert model.grid == (side, side) and fine.shape == (2, side * side)
        assert z.shape == (2, 5, side, side) and x_hat.shape == (2, 3, 32, 32)
        assert {t.dtype for t in (x_hat, z, commitment)} == {torch.float32}
        torch.testing.assert_close(z.norm(dim=1), torch.ones(2, side, side))


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


def test_the_gradient_of_the_codes_is_passed_straight_through(model):
    z = unit_vectors(2, 8, 4, 4).requires_grad_()
    weight = torch.randn_like(z)
    (model.quantize(z)[0] * weight).sum().backward()
    torch.testing.assert_close(z.grad, weight, msg="it must reach z unchanged")


def test_commitment_pulls_the_encoder_and_not_the_codes(model):
    z, before = unit_vectors(2, 8, 4, 4).requires_grad_(), model.codebook.clone()
    z_q, _, commitment = model.quantize(z)
    apart = (z - z_q).detach()
    torch.testing.assert_close(commitment, apart.square().mean(), msg="not the mean")
    (gradient,) = torch.autograd.grad(commitment, z)
    torch.testing.assert_close(gradient, 2 * apart / z.numel(), msg="it must pull z")
    assert torch.equal(model.codebook, before), "quantize must not move the codes"


def test_codes_are_found_in_float32_under_autocast(model):
    z = unit_vectors(64, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        _, fine, commitment = model.quantize(z)
    assert torch.equal(fine, model.quantize(z)[1]) and commitment.dtype == torch.float32


def test_perplexity_is_the_exponential_of_the_entropy():
    counts = torch.tensor([9, 0, 1, 40, 0, 17, 17, 0])  # of 84
    fine = torch.arange(8).repeat_interleave(counts).view(7, 12)
    wanted = math.exp(entropy(counts.numpy()))
    assert tokenizer.perplexity(fine) == pytest.approx(wanted)


def test_pixels_and_their_psnr():
    images = torch.arange(2 * 16 * 8 * 3).view(2, 16, 8, 3).byte()
    x = tokenizer.to_float(images)
    assert x.shape == (2, 3, 16, 8) and x.min() == -1 and x.max() == 1
    assert x[1, 2, 15, 6].item() == pytest.approx(images[1, 15, 6, 2] / 127.5 - 1)
    for rounding in (-0.4, 0.4):
        assert torch.equal(tokenizer.to_uint8(x + rounding / 127.5), images)
    assert tokenizer.to_uint8(300 * x).unique().tolist() == [0, 255]  # clipped
    images = torch.full((23, 4, 4, 3), 100, dtype=torch.uint8)
    others = images + torch.arange(23, dtype=torch.uint8).view(23, 1, 1, 1)
    each = [78.13, *(20 * math.log10(255 / error) for error in range(1, 23))]
    assert tokenizer.psnr(images, others) == pytest.approx(sum(each) / 23, abs=1e-3)


def test_whole_sets_are_computed_in_parts_and_without_gradients(model):
    images, passes = torch.randint(256, (9, 16, 16, 3)).byte(), []
    x_hat, _, fine, _ = model(tokenizer.to_float(images))
    for network in (model.encoder, model.decoder):
        hook = lambda module, x, y: passes.append((len(y), y.requires_grad))
        network.register_forward_hook(hook)
    model.at_once = 4
    assert torch.equal(tokenizer.tokenize(model, images), fine)
    pixels = tokenizer.reconstruct(model, fine).int()
    assert (pixels - tokenizer.to_uint8(x_hat).int()).abs().max() <= 1  # rounding
    assert passes == [(4, False), (4, False), (1, False)] * 2


# -------------------------------------------------------------- the update of the codes


def test_codes_are_updated_by_an_ema(model):
    count, total = model.moving_count.clone(), model.moving_sum.clone()
    for _ in range(2):  # every code is chosen by one vector or more: none is dead
        z, fine = unit_vectors(3, 8, 4, 4), torch.randint(24, (48,))
        fine[torch.randperm(48)[:24]] = torch.arange(24)
        model.update_codebook(z, fine.view(3, -1), np.random.default_rng(0), decay=0.9)
        for code in range(24):
            own = as_rows(z)[fine == code]
            count[code] = 0.9 * count[code] + 0.1 * len(own)
            total[code] = 0.9 * total[code] + 0.1 * own.sum(0)
        wanted = total / total.norm(dim=1, keepdim=True)
        torch.testing.assert_close(model.codebook, wanted)
        torch.testing.assert_close(model.moving_count, count)


def test_dead_codes_are_reinitialised_to_random_encoder_outputs(model):
    z, fine = unit_vectors(2, 8, 4, 4), 2 * torch.randint(12, (32,))  # no odd codes
    model.moving_count.copy_(torch.logspace(-3, 1, 24))
    counts = (model.moving_count + fine.bincount(minlength=24)) / 2
    dead = counts < 0.2 * counts.mean()  # 1, 3, ... 15
    sums = torch.zeros(24, 8).index_add_(0, fine, as_rows(z))
    alive = F.normalize(model.moving_sum + sums, dim=1)
    copies = [deepcopy(model) for _ in range(3)]
    for copy, rng in zip(copies, map(np.random.default_rng, (0, 0, 1))):
        copy.update_codebook(z, fine.view(2, 16), rng, decay=0.5)
    one, same, other = (copy.codebook.clone() for copy in copies)
    assert torch.equal(one, same) and not torch.equal(one, other), "rng must choose"
    changed = (one - alive).norm(dim=1) > 1e-4
    assert changed.tolist() == dead.tolist(), "dead: below 0.2 of the new mean count"
    distance, nearest = torch.cdist(one[dead], as_rows(z)).min(dim=1)
    assert distance.max() < 1e-3, "a dead code must become one of the vectors"
    assert len(nearest.unique()) > 4 and nearest.max() >= 16, "of all images"
    copies[0].update_codebook(z, fine.view(2, 16), rng)
    torch.testing.assert_close(copies[0].codebook[dead], one[dead], msg="dead again")


# ----------------------------------------------------------------------- one training


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What one training with --data . wrote, printed and showed."""
    root, printed = tmp_path_factory.mktemp("ran"), []
    data = fixed_images(root / "pets", (9, 6, 3), (7, 5, 2), ("bee", "cat", "ant"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(data)
        patch.setattr("builtins.print", lambda line, **_: printed.append(line))
        figures = keep_figures(patch)
        flags = ["--downsample", "2", "--code-dim", "5", "--seed", "3"]
        train(".", root / "out", *flags, "--save-every", "2", steps=5)
    facts = {"data": data, "figures": figures, "printed": "\n".join(printed)}
    facts |= {n: tokenizer.load(root / "out", f"{n}.pt") for n in ("images", "tokens")}
    model, artifact = tokenizer.load_tokenizer(root / "out", torch.device("cpu"))
    return SimpleNamespace(**facts, model=model, tokenizer=artifact)


def test_images_pt_holds_each_image_with_its_class(ran):
    files = {Image.open(p).tobytes(): p.parts[-3:] for p in ran.data.rglob("*.png")}
    names, everything = ["ant", "bee", "cat"], b""
    assert ran.images["class_names"] == ran.tokens["class_names"] == names
    assert ran.images["data"] == "pets"  # the name of the folder "."
    for split, count in (("train", 18), ("test", 14)):
        x, y = ran.images[split]
        found = [files[image.numpy().tobytes()] for image in x]
        assert len(set(found)) == count
        assert [path[:2] for path in found] == [(split, names[n]) for n in y]
        excess = 2 * y[: count // 2].bincount(minlength=3) - y.bincount()
        assert excess.abs().max() <= 1, "the classes do not alternate"
        bees = [path for path in found if path[1] == "bee"]
        assert bees != sorted(bees), "the order within a class is that of the files"
        everything += x.numpy().tobytes() + y.numpy().tobytes()
    ids = {a["images_id"] for a in (ran.images, ran.tokens, ran.tokenizer)}
    assert ids == {hashlib.sha256(everything).hexdigest()[:12]}


def test_tokens_and_scores_are_those_of_the_last_weights(ran):
    run, images, fine = ran.tokenizer, ran.images["test"].x, ran.tokens["test"].x
    assert run["config"] == vars(VQVAEConfig(16, 2, 24, 20, 5))
    torch.manual_seed(3)  # the seed of the first weights
    change = VQVAE(ran.model.config).decoder[0].weight - ran.model.decoder[0].weight
    assert 0 < change.abs().max() < 0.002, "five steps of warm-up are small"
    for split in ("train", "test"):
        x, y = ran.tokens[split]
        assert torch.equal(x, tokenizer.tokenize(ran.model, ran.images[split].x))
        assert torch.equal(y, ran.images[split].y)
    codebook_id = tokenizer.short_hash(run["model"]["codebook"])
    assert run["codebook_id"] == ran.tokens["codebook_id"] == codebook_id
    assert ran.tokens["codebook_size"] == 20 and tuple(ran.tokens["grid"]) == (8, 8)
    quality = tokenizer.psnr(images, tokenizer.reconstruct(ran.model, fine))
    last = [run["history"]["test"][-1][n] for n in ("psnr", "perplexity")]
    assert last == pytest.approx([quality, tokenizer.perplexity(fine)])
    assert ".: 18 + 14 images, 3 classes (ant, bee, cat), on cpu" in ran.printed
    share = len(set(fine.flatten().tolist())) / 20
    assert f"test images: {quality:.2f} dB, {share:.1%} of the codes" in ran.printed


def test_the_picture_of_the_tokenizer(ran):
    ((path, figure),) = ran.figures.items()
    assert path == ran.tokenizer["path"].with_name("tokenizer.png")
    images, fine = ran.images["test"].x, ran.tokens["test"].x
    reconstructions = tokenizer.reconstruct(ran.model, fine)
    quality = tokenizer.psnr(images, reconstructions)
    assert f"test images: {quality:.1f} dB" in figure.get_suptitle()
    axes = np.array(figure.axes).reshape(2, 12)  # of 14 images
    wanted = {"test images": images, "reconstructions": reconstructions}
    for row, (name, x) in zip(axes, wanted.items()):
        assert row[0].get_ylabel() == name
        shown = np.stack([ax.images[0].get_array() for ax in row])
        assert np.array_equal(shown, x[:12])


def test_a_batch_is_chosen_uniformly_at_random():
    examples = Examples(torch.arange(10, 16), torch.arange(20, 26)).to("cpu")
    x, y = examples.batch(np.random.default_rng(0), 1200)
    assert torch.equal(y, x + 10) and len(x) == 1200
    assert chisquare((x - 10).bincount(minlength=6)).pvalue > 0.01
    again, other = (examples.batch(np.random.default_rng(s), 1200).x for s in (0, 1))
    assert torch.equal(x, again) and not torch.equal(x, other)


@pytest.mark.parametrize("counts", [[5, 5, 5], [70, 0, 20, 10], [1, 40], [90, 9, 9]])
def test_classes_alternate_in_their_proportions(counts):
    y = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    y = y[torch.randperm(len(y))]
    mixed = tokenizer.interleave(Examples(torch.arange(len(y)), y))
    assert torch.equal(mixed.x.sort()[0], torch.arange(len(y))), "not all, each once"
    assert torch.equal(mixed.y, y[mixed.x]), "an example has lost its class"
    shares = torch.tensor(counts) / len(y)
    for n in range(len(y) + 1):  # each class may be half an example ahead or behind
        error = mixed.y[:n].bincount(minlength=len(counts)) - n * shares
        assert (error.abs() <= 0.5 + shares * len(counts) / 2 + 1e-4).all(), n


# --------------------------------------------------------------------- reading of images


def values(folder):
    """The sorted grey values of each class: (training, test, class names)."""
    *sets, names = tokenizer.read_images(str(folder), 8)
    grey = [[sorted(x[y == n, 4, 4, 0].tolist()) for n in y.unique()] for x, y in sets]
    return *grey, names


@pytest.mark.parametrize("test", ["test", "val", "TEST", "Val"])
def test_training_and_test_images_in_folders_of_their_own(tmp_path, test):
    for name in ("bee/121", "bee/120", "ant/21", "ant/20"):
        paint(tmp_path / test / f"{name}.png")
    # test/ without classes is no test set, but with classes it is preferred to val/.
    other = "test/30" if test.lower() == "val" else "val/cat/30"
    for name in ("Train/bee/110", "Train/ant/10", other):
        paint(tmp_path / f"{name}.png")
    assert values(tmp_path) == ([[10], [110]], [[20, 21], [120, 121]], ["ant", "bee"])


def test_every_tenth_file_of_a_class_is_held_out(tmp_path):
    names = [f"_ant/{i:02}" for i in range(21)] + ["_ant/__30", "bee/100", "bee/101"]
    names += [".hidden/200", "bee/.hidden/200", "__MACOSX/200", "bee/__MACOSX/200"]
    for name in names:
        paint(tmp_path / f"{name}.png")
    (tmp_path / "README.txt").write_text("a file beside the classes")
    rest = [*(i for i in range(21) if i % 10), 30]
    assert values(tmp_path) == ([rest, [101]], [[0, 10, 20], [100]], ["_ant", "bee"])


def test_other_layouts_and_unreadable_files_are_refused(tmp_path):
    def error(data):
        with pytest.raises(SystemExit) as exit_info:
            train(data, tmp_path / "out")
        assert str(data) in exit_info.value.code and not (tmp_path / "out").exists()
        return exit_info.value.code

    data = fixed_images(tmp_path / "pets")
    first, *_, last = (path for path, _ in tokenizer.find_images(data)[0][0])
    for path, content in ((last, b"text"), (first, last.read_bytes()[:100])):
        path.write_bytes(content)  # with two unreadable files, it names the first
        assert f"{path} cannot be used" in error(data)
    for added, said in (
        ("few/dog/0.png", "no training images of class dog"),
        ("pets/train/dog/0.png", "no test images of class dog"),
        ("pets/test/cow/0.png", "no training images of class cow"),
        ("half/train/ant/0.png", "train/ant is a folder where images should be"),
        ("files/0.png", "no folders of classes"),
    ):
        paint(tmp_path / added)
        message = error(tmp_path / added.partition("/")[0])
        assert said in message and tokenizer.LAYOUT in message


def test_images_are_turned_resized_and_cropped_in_the_centre(tmp_path):
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, 16:32, 1] = 200  # the middle third is green
    pixels[:2] = 250  # the upper edge is white: a crop before resizing would lose it
    exif = Image.Exif()
    exif[0x0112] = 3  # the camera was upside down
    paint(tmp_path / "ant" / "0.png")
    Image.fromarray(pixels).save(tmp_path / "ant" / "1.png", exif=exif)
    x, _ = tokenizer.read_folder(tmp_path, 8)[0]
    assert x.shape == (1, 8, 8, 3) and x.dtype == torch.uint8
    assert (x[0, :6, 1:7] == torch.tensor([0, 200, 0])).all(), "not the centre"
    assert (x[0, 7] > 200).all(), "not turned as EXIF says, or first cropped"


def test_grey_with_more_than_8_bits_and_transparency(tmp_path):
    def grey_values(image, name, **how):
        image.save(tmp_path / name, **how)
        found = tokenizer.read_image(tmp_path / name)
        assert found.mode == "RGB"
        return sorted(set(np.asarray(found).flatten().tolist()))

    deep = np.full((8, 8), [0, 128, 16384, 65535] * 2)
    for mode, kind, name in (("I;16", "<u2", "a.png"), ("I;16B", ">u2", "a.tiff")):
        image = Image.frombytes(mode, (8, 8), deep.astype(kind).tobytes())
        assert grey_values(image, name) == [0, 64, 255]
    for kind in (np.float32, np.int32):
        with pytest.raises(SystemExit, match="b.tiff cannot be used: it is grey"):
            grey_values(Image.fromarray(deep.astype(kind)), "b.tiff")
    # What is transparent becomes white; 51: a fifth of 50 and four fifths of white.
    dark = np.full((8, 8, 4), 50, np.uint8)
    dark[..., 3] = [0, 51, 255, 255] * 2
    assert grey_values(Image.fromarray(dark), "c.png") == [50, 214, 255]
    palette = Image.fromarray(dark[..., :3]).quantize(4)
    assert grey_values(palette, "d.png", transparency=bytes(4)) == [255]


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "CIFAR10"])
def test_training_and_test_images_of_a_known_data_set(monkeypatch, name):
    shape = (3, 32, 32, 3) if name == "CIFAR10" else (3, 28, 28)
    data = np.random.default_rng(0).integers(256, size=(2, *shape), dtype=np.uint8)
    facts = [{"data": x, "targets": [0, 1, y]} for y, x in enumerate(data)]
    known = lambda root, train, download: SimpleNamespace(**facts[train], classes="abc")
    monkeypatch.setattr(tokenizer.torchvision.datasets, name, known)
    flag = name.lower().replace("nm", "n_m")
    *sets, class_names = tokenizer.read_images(flag, 32)
    if name != "CIFAR10":  # grey: two black pixels on each side, equal channels
        data = np.pad(data, ((0, 0), (0, 0), (2, 2), (2, 2)))[..., None].repeat(3, -1)
    for (x, y), train in zip(sets, (1, 0)):
        assert np.array_equal(x, data[train]) and y.tolist() == [0, 1, train]
    assert class_names == ["a", "b", "c"]
    with pytest.raises(SystemExit, match="--image-size 64: .* have 32 pixels"):
        tokenizer.read_images(flag, 64)


def test_glyphs_show_the_digit_of_their_class_and_depend_on_the_seed(monkeypatch):
    paint = tokenizer.paint_glyphs
    one, same, other = (paint(20, 24, seed)[0] for seed in (3, 3, 4))
    assert torch.equal(one, same) and not torch.equal(one, other)
    images, y = paint(1200, 32, seed=3)
    # The brightest channel in row 16 of two images, up to the rounding of the CPU.
    rows = {0: [64, 59, 54, 49, 90, 142, 255, 69, 62, 68, 73]}
    rows[1100] = [68, 63, 58, 53, 48, 43, 39, 255, 29, 27, 28]  # 1000 at a time
    for i, row in rows.items():
        found = images[i, 16].amax(dim=-1).int()[::3]
        assert (found - torch.tensor(row)).abs().max() <= 3
    brightness = images.amax(dim=-1).float().flatten(1)  # ink is bright, in any hue
    masters = F.avg_pool2d(tokenizer.glyph_masters(64).mean(0)[:, None], 2).flatten(1)
    for part in (slice(1000), slice(1000, None)):
        means = torch.stack([brightness[part][y[part] == n].mean(0) for n in range(10)])
        likeness = torch.corrcoef(torch.cat([means, masters]))[:10, 10:]
        assert likeness.argmax(dim=1).tolist() == list(range(10))
    few = lambda count, size, seed: paint(count // 500, size, seed)
    monkeypatch.setattr(tokenizer, "paint_glyphs", few)
    (x, _), (test_x, _), names = tokenizer.read_images("glyphs", 24)
    assert x.shape == (40, 24, 24, 3) and len(test_x) == 10 and names == [*"0123456789"]
    assert not (x[:, None] == test_x).flatten(2).all(dim=2).any()
