import inspect

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from sample import FINE_SETTINGS, MODEL_FILES, SETTINGS
from tests.conftest import K, M, T, error_of, places, spy
from tokenizer import load_images, load_tokens, reconstruct, to_uint8

G = torch.arange(K) % M


def generate(model, y, generator, cfg_scale=1.0, temperature=1.0, top_k=0, top_p=1.0):
    """In place of the real one: tokens that depend on all that it is given."""
    setting = 1.7 * cfg_scale + 2.3 * temperature + 3 * top_k + 4.1 * top_p
    setting += model.head.weight.abs().sum()
    noise = torch.rand(len(y), T, generator=generator)
    return (99 * noise + y[:, None] + setting).long() % model.config.vocabulary


def predict_fine(model, coarse, y, generator, cfg_scale=1.0, temperature=1.0, top_k=0):
    """In place of the real one: codes q of the right clusters, q % M == coarse."""
    setting = 1.7 * cfg_scale + 2.3 * temperature + 3 * top_k
    noise = torch.rand(len(y), T, generator=generator)
    rank = (99 * noise + y[:, None] + setting).long() % (K // M)
    return coarse + M * rank


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    """The stages before this one have tests of their own."""
    monkeypatch.setattr(sample, "generate", generate)
    monkeypatch.setattr(sample, "predict_fine", predict_fine)
    swap = lambda tokens, code_to_cluster, rng: rng.permutation(tokens)
    monkeypatch.setattr(sample, "swap_within_clusters", swap)


def draw(out, *flags, name="samples.pt"):
    sample.main(["--out", str(out), "--num-samples", "6", *flags])
    return torch.load(out / name, weights_only=True)


def watched(monkeypatch, name):
    """The calls of a stand-in and what it returned: (arguments, result) of each."""
    calls, original = [], getattr(sample, name)

    def call(*args, **kwargs):
        bound = inspect.signature(original).bind(*args, **kwargs)
        bound.apply_defaults()
        calls.append((bound.arguments, original(*args, **kwargs)))
        return calls[-1][1]

    monkeypatch.setattr(sample, name, call)
    return calls


def test_coarse_then_fine_then_pixels(trained, monkeypatch):
    models, _ = sample.load_models(trained, MODEL_FILES["ctf"], torch.device("cpu"))
    models["vqvae"].codebook.mul_(20)  # pixels far beyond -1..1, which are to be cut
    stage1, stage2 = (watched(monkeypatch, f) for f in ("generate", "predict_fine"))
    y, generator = torch.tensor([0, 2, 1, 1]), torch.Generator().manual_seed(3)
    settings = {"cfg_scale": 2.5, "temperature": 0.7, "top_k": 3, "top_p": 0.9}
    fine_settings = {"cfg_scale": 1.5, "temperature": 0.5, "top_k": 2}
    drawn = sample.sample_images(models, y, generator, settings, fine_settings)
    images, coarse, fine = drawn
    ((first, drawn_coarse),), ((second, drawn_fine),) = stage1, stage2
    assert torch.equal(coarse, drawn_coarse), "not the labels that stage 1 drew"
    assert torch.equal(fine, drawn_fine), "not the labels that stage 2 drew"
    assert first["model"] is models["ar"] and second["model"] is models["aux"]
    assert torch.equal(second["coarse"], drawn_coarse), "stage 2 starts from stage 1's"
    for call, wanted in ((first, settings), (second, fine_settings)):
        assert wanted.items() <= call.items(), "settings of the other stage, or none"
        assert call["generator"] is generator, (
            "both stages draw from the same generator"
        )
        assert torch.equal(call["y"], y)
    wanted = reconstruct(models["vqvae"], drawn_fine)
    assert images.dtype == torch.uint8 and images.shape == (4, 16, 16, 3)
    assert torch.equal(images, wanted), "not the pixels of the fine labels"


def test_samples_file_holds_what_was_drawn(trained):
    samples = draw(trained)
    assert samples["images"].shape == (6, 3, 16, 16)
    assert samples["images"].dtype == torch.uint8
    assert samples["labels"].tolist() == [0, 1, 2, 0, 1, 2]
    assert samples["coarse"].shape == samples["fine"].shape == (6, T)
    assert torch.equal(G[samples["fine"]], samples["coarse"])
    assert samples["settings"] == SETTINGS and samples["fine_settings"] == FINE_SETTINGS
    assert samples["training"]["ar"]["step"] == samples["training"]["aux"]["step"] == 7
    assert samples["images_per_second"] > 0
    assert samples["cluster_id"] == "the-clusters"
    assert (trained / "samples.png").exists()


def test_seeds_decide_the_images(trained):
    one, again = draw(trained), draw(trained)
    other = draw(trained, "--seed", "1")
    assert torch.equal(one["images"], again["images"])
    assert not torch.equal(one["fine"], other["fine"])


def test_batches_are_drawn_one_after_the_other(trained):
    models, _ = sample.load_models(trained, MODEL_FILES["ctf"], torch.device("cpu"))
    labels, settings = torch.tensor([0, 1, 2, 2, 1]), (SETTINGS, FINE_SETTINGS)
    images, coarse, fine, _ = sample.sample_batches(models, labels, 4, *settings, 2)
    generator = torch.Generator().manual_seed(4)
    parts = [
        sample.sample_images(models, y, generator, *settings) for y in labels.split(2)
    ]
    for drawn, wanted in zip((images, coarse, fine), zip(*parts)):
        assert torch.equal(drawn, torch.cat(wanted))


def test_batches_differ_from_each_other(trained):
    samples = draw(trained, "--batch-size", "2", "--classes", "1")
    assert samples["labels"].tolist() == [1] * 6
    assert len(samples["coarse"].unique(dim=0)) > 3


@pytest.mark.parametrize(
    ("flag", "value", "changes"),
    [
        ("--cfg-scales", "1", "coarse"),
        ("--temperature", "0.01", "coarse"),
        ("--top-k", "1", "coarse"),
        ("--top-p", "0.05", "coarse"),
        ("--fine-cfg-scale", "9", "fine"),
        ("--fine-temperature", "0.01", "fine"),
        ("--fine-top-k", "1", "fine"),
    ],
)
def test_each_setting_acts_on_its_stage(trained, flag, value, changes):
    draws = "--fine-top-k", "0"
    plain, changed = draw(trained, *draws), draw(trained, *draws, flag, value)
    assert not torch.equal(plain["fine"], changed["fine"])
    coarse_changed = not torch.equal(plain["coarse"], changed["coarse"])
    assert coarse_changed == (changes == "coarse")


def test_the_baseline_draws_fine_labels_directly(trained, monkeypatch):
    models, _ = sample.load_models(
        trained, MODEL_FILES["baseline"], torch.device("cpu")
    )
    stage1, stage2 = (watched(monkeypatch, f) for f in ("generate", "predict_fine"))
    y, generator = torch.tensor([0, 2, 1]), torch.Generator().manual_seed(0)
    settings = {"cfg_scale": 2.5, "temperature": 0.7, "top_k": 3, "top_p": 0.9}
    drawn = sample.sample_images(models, y, generator, settings, FINE_SETTINGS)
    images, coarse, fine = drawn
    ((call, wanted),) = stage1
    assert settings.items() <= call.items(), "settings are those of the baseline too"
    assert call["generator"] is generator and torch.equal(call["y"], y)
    assert coarse is None and not stage2, "the baseline has no coarse labels"
    assert torch.equal(fine, wanted), "not what the baseline drew"
    assert torch.equal(images, reconstruct(models["vqvae"], fine))


def test_the_baseline_has_a_file_of_its_own(trained):
    samples = draw(trained, "--model", "baseline", name="samples-baseline.pt")
    assert samples["coarse"] is None and samples["weights"] == ["baseline.pt"]
    assert not (trained / "samples.pt").exists()


def test_npz_and_png_hold_the_same_images(trained):
    images = draw(trained, "--npz")["images"].permute(0, 2, 3, 1).numpy()
    stored = np.load(trained / "samples.npz")["arr_0"]
    assert stored.dtype == np.uint8 and (stored == images).all()
    for i in range(6):
        with Image.open(trained / "samples" / f"{i:06d}.png") as file:
            assert (np.array(file) == images[i]).all()


def test_entropy_in_bits():
    p = torch.tensor([0.5, 0.25, 0.25, 0.0])  # 0.5 * 1 + 2 * 0.25 * 2 bits
    logits = torch.stack([p.log(), torch.zeros(4)])  # and four alike
    assert torch.allclose(sample.entropy(logits), torch.tensor([1.5, 2.0]))


def test_tokens_not_yet_reached_hold_a_zero_code(trained):
    models, _ = sample.load_models(trained, MODEL_FILES["ctf"], torch.device("cpu"))
    vqvae, fine = models["vqvae"], torch.randint(K, (2, T))
    codes = vqvae.codebook[fine].view(2, 4, 4, 8).permute(0, 3, 1, 2).clone()
    codes[:, :, 1, 2:], codes[:, :, 2:] = 0, 0  # row by row: 4 + 2 tokens are known
    with torch.no_grad():
        wanted = to_uint8(vqvae.decode(codes))
    assert torch.equal(sample.decode_prefix(vqvae, fine, 6), wanted)
    assert torch.equal(sample.decode_prefix(vqvae, fine, T), reconstruct(vqvae, fine))


def test_anatomy_is_drawn(trained, capsys, monkeypatch):
    logits = {"ar": torch.randn(1, T, M), "aux": torch.randn(1, T, K // M)}
    load_models = sample.load_models

    def with_known_logits(*args):
        models, artifacts = load_models(*args)
        for name, values in logits.items():
            models[name].forward = lambda *_, values=values: values
        return models, artifacts

    monkeypatch.setattr(sample, "load_models", with_known_logits)
    draw(trained, "--anatomy", "--classes", "2")
    assert (trained / "anatomy.png").exists()
    draw(trained, "--anatomy", "--classes", "2", "--cfg-scales", "1", "2")
    assert (trained / "anatomy-cfg1.png").exists()  # each scale its own
    assert (trained / "anatomy-cfg2.png").exists()
    flags = "--anatomy", "--model", "baseline"
    assert error_of(capsys, sample.main, "--out", trained, *flags)[0] == 2


# ------------------------------------------------------------------ how pieces are joined


def test_every_flag_reaches_the_drawing_and_is_recorded(trained, monkeypatch):
    drawn = spy(monkeypatch, sample, "sample_images")
    flags = ["--cfg-scales=3", "--temperature=0.7", "--top-k=9", "--top-p=0.8"]
    flags += ["--fine-cfg-scale=2", "--fine-temperature=0.6", "--fine-top-k=5"]
    flags += ["--seed=4", "--batch-size=4", "--classes", "2", "0"]
    samples = draw(trained, *flags)
    settings = {"cfg_scale": 3.0, "temperature": 0.7, "top_k": 9, "top_p": 0.8}
    fine_settings = {"cfg_scale": 2.0, "temperature": 0.6, "top_k": 5}
    assert [call["y"].tolist() for call in drawn] == [[2, 0, 2, 0], [2, 0]]
    for call in drawn:
        assert call["settings"] == settings and call["fine_settings"] == fine_settings
    assert samples["settings"] == settings and samples["fine_settings"] == fine_settings
    assert samples["seed"] == 4 and samples["batch_size"] == 4
    assert samples["labels"].tolist() == [2, 0, 2, 0, 2, 0]
    assert samples["model"] == "ctf" and samples["weights"] == ["coarse.pt", "fine.pt"]
    vqvae, _ = sample.load_tokenizer(trained, torch.device("cpu"))
    pixels = reconstruct(vqvae, samples["fine"]).permute(0, 3, 1, 2)
    assert torch.equal(samples["images"], pixels), "images and tokens of other samples"


def test_a_file_for_each_guidance_scale(trained):
    flags = ["--out", str(trained), "--num-samples", "6"]
    sample.main([*flags, "--cfg-scales", "1", "2.5"])
    names = sorted(path.name for path in trained.glob("samples*.pt"))
    assert names == ["samples-cfg1.pt", "samples-cfg2.5.pt"]
    for name, scale in zip(names, (1.0, 2.5)):
        alone = draw(trained, "--cfg-scales", str(scale))
        file = torch.load(trained / name, weights_only=True)
        assert file["settings"]["cfg_scale"] == scale
        assert torch.equal(file["fine"], alone["fine"]), "not what this scale draws"


def test_kept_copies_are_drawn_each_with_its_own_weights(trained):
    for stem in ("coarse", "fine"):
        artifact = torch.load(trained / f"{stem}.pt", weights_only=True)
        for step in (200, 1000):
            weights = {k: v * step / 1000 for k, v in artifact["model"].items()}
            copy = artifact | {"model": weights, "step": step}
            torch.save(copy, trained / f"{stem}-{step:06d}.pt")
    files = ["samples-000200.pt", "samples-001000.pt"]
    sample.main(["--out", str(trained), "--num-samples", "6", "--kept"])
    assert sorted(path.name for path in trained.glob("samples*.pt")) == files
    early, late = (torch.load(trained / name, weights_only=True) for name in files)
    assert early["weights"] == ["coarse-000200.pt", "fine-000200.pt"]
    assert early["training"]["ar"]["step"] == early["training"]["aux"]["step"] == 200
    assert not torch.equal(early["fine"], late["fine"])
    assert torch.equal(late["fine"], draw(trained)["fine"])  # the final weights


def test_rows_of_the_picture_are_of_the_class_beside_them(trained, monkeypatch):
    saved = spy(monkeypatch, sample, "save_figure")
    samples = draw(trained, "--classes", "2", "0")
    (call,) = saved
    rows = {}
    for ax in call["figure"].axes:
        if ax.get_ylabel():
            rows[ax.get_ylabel()] = torch.from_numpy(ax.images[0].get_array().data)
    images = samples["images"].permute(0, 2, 3, 1)
    assert list(rows) == ["class ant", "class cat"]
    for name, y in (("class ant", 0), ("class cat", 2)):
        assert torch.equal(rows[name], images[samples["labels"] == y][0])


def test_the_anatomy_is_of_an_image_its_tokens_and_its_class(
    trained, images, monkeypatch
):
    def anatomy(models, image, fine, y, rng):
        return {"a picture": np.zeros((4, 4))}

    monkeypatch.setattr(sample, "anatomy", anatomy)
    opened = spy(monkeypatch, sample, "anatomy")
    (x, y), _ = load_images(str(images), "test", 16)
    other = (y[0].item() + 1) % 3  # not that of the first image
    samples = draw(trained, "--anatomy", "--classes", str(other))
    real, drawn = opened
    where = places(real["image"][None], x)
    assert y[where] == other and real["y"] == other and drawn["y"] == other
    tokens, _ = load_tokens(trained, "test")
    assert torch.equal(real["fine"], tokens.x[where]), "tokens of another image"
    assert torch.equal(drawn["image"], samples["images"][0].permute(1, 2, 0))
    assert torch.equal(drawn["fine"], samples["fine"][:1])


def test_no_picture_of_an_earlier_longer_run_is_left(trained):
    draw(trained, "--npz")
    sample.main(["--out", str(trained), "--num-samples", "4", "--npz"])
    names = sorted(path.name for path in (trained / "samples").iterdir())
    assert names == [f"{i:06d}.png" for i in range(4)]
    assert len(np.load(trained / "samples.npz")["arr_0"]) == 4
