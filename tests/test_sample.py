import inspect
from functools import partial

import numpy as np
import pytest
import torch
from conftest import NAMES, G, K, M, T, edit, error_of, places, spy
from matplotlib.figure import Figure
from PIL import Image

import cluster
import sample
from sample import FINE_SETTINGS, SETTINGS, choose_classes
from tokenizer import load_examples, load_tokenizer, reconstruct, to_uint8

CPU = torch.device("cpu")
SOME = {"cfg_scale": 2.5, "temperature": 0.7, "top_k": 3, "top_p": 0.9}
FINE_SOME = {"cfg_scale": 1.5, "temperature": 0.5, "top_k": 2}


def generate(model, y, generator, cfg_scale=1.0, temperature=1.0, top_k=0, top_p=1.0):
    """A stand-in: tokens that depend on the weights and on all arguments."""
    setting = 1.7 * cfg_scale + 2.3 * temperature + 3 * top_k + 4.1 * top_p
    setting += model.head.weight.abs().sum()
    noise = torch.rand(len(y), T, generator=generator)
    return (99 * noise + y[:, None] + setting).long() % model.config.vocabulary


def predict_fine(model, coarse, y, generator, cfg_scale=1.0, temperature=1.0, top_k=0):
    """A stand-in: codes q of the right clusters, q % M == coarse."""
    setting = 1.7 * cfg_scale + 2.3 * temperature + 3 * top_k
    noise = torch.rand(len(y), T, generator=generator)
    rank = (99 * noise + y[:, None] + setting).long() % (K // M)
    return coarse + M * rank


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    """The scripts before this one have tests of their own."""
    monkeypatch.setattr(sample, "generate", generate)
    monkeypatch.setattr(sample, "predict_fine", predict_fine)
    swap = lambda tokens, code_to_cluster, rng: code_to_cluster[tokens]
    monkeypatch.setattr(cluster, "swap_within_clusters", swap)


def run(out, *flags, name="samples.pt"):
    """What sample.py writes to out, of six images."""
    sample.main(["--out", str(out), "--num-samples", "6", *flags])
    return torch.load(out / name, weights_only=True)


def watched(monkeypatch, name):
    """The calls of a stand-in: (arguments, result) of each."""
    calls, original = [], getattr(sample, name)

    def call(*args, **kwargs):
        bound = inspect.signature(original).bind(*args, **kwargs)
        bound.apply_defaults()
        calls.append((bound.arguments, original(*args, **kwargs)))
        return calls[-1][1]

    monkeypatch.setattr(sample, name, call)
    return calls


# --------------------------------------------------------------- from classes to pixels


def test_coarse_then_fine_then_pixels(trained, monkeypatch):
    models, _ = sample.load_models(trained, "ctf", CPU)
    models["vqvae"].codebook.mul_(20)  # pixels far beyond -1..1, which must be clipped
    stage1, stage2 = (watched(monkeypatch, f) for f in ("generate", "predict_fine"))
    y, generator = torch.tensor([0, 2, 1, 1]), torch.Generator().manual_seed(3)
    images, coarse, fine = sample.sample_images(models, y, generator, SOME, FINE_SOME)
    ((first, coarse_of_1),), ((second, fine_of_2),) = stage1, stage2
    assert torch.equal(coarse, coarse_of_1), "not the coarse labels of stage 1"
    assert torch.equal(fine, fine_of_2), "not the fine labels of stage 2"
    assert first["model"] is models["ar"] and second["model"] is models["aux"]
    assert torch.equal(second["coarse"], coarse_of_1), "stage 2 needs those of stage 1"
    for call, wanted in ((first, SOME), (second, FINE_SOME)):
        assert wanted.items() <= call.items(), (
            "no settings, or those of the other stage"
        )
        assert call["generator"] is generator, "both stages use the same generator"
        assert torch.equal(call["y"], y)
    assert images.dtype == torch.uint8 and images.shape == (4, 16, 16, 3)
    wanted = reconstruct(models["vqvae"], fine_of_2)
    assert torch.equal(images, wanted), "not the pixels of the fine labels"


def test_the_baseline_draws_fine_labels_directly(trained, monkeypatch):
    models, _ = sample.load_models(trained, "baseline", CPU)
    stage1, stage2 = (watched(monkeypatch, f) for f in ("generate", "predict_fine"))
    y, generator = torch.tensor([0, 2, 1]), torch.Generator().manual_seed(0)
    images, coarse, fine = sample.sample_images(models, y, generator, SOME, FINE_SOME)
    ((call, wanted),) = stage1
    assert SOME.items() <= call.items(), "settings are those of the baseline too"
    assert call["generator"] is generator and torch.equal(call["y"], y)
    assert coarse is None and not stage2, "the baseline has no coarse labels"
    assert torch.equal(fine, wanted), "not the fine labels of the baseline"
    assert torch.equal(images, reconstruct(models["vqvae"], fine))


def test_batches_continue_with_the_same_generator(trained):
    models, _ = sample.load_models(trained, "ctf", CPU)
    y, settings = torch.tensor([0, 1, 2, 2, 1]), (SETTINGS, FINE_SETTINGS)
    *found, speed = sample.sample_batches(models, y, 4, *settings, 2)
    generator = torch.Generator().manual_seed(4)
    parts = [sample.sample_images(models, p, generator, *settings) for p in y.split(2)]
    for tensor, wanted in zip(found, zip(*parts)):
        assert torch.equal(tensor, torch.cat(wanted))
    assert speed > 0


# ---------------------------------------------------------------- how pieces are joined


def test_every_flag_reaches_the_stages_and_is_recorded(trained, monkeypatch):
    calls = spy(monkeypatch, sample, "sample_images")
    flags = ["--cfg-scales=3", "--temperature=0.7", "--top-k=9", "--top-p=0.8"]
    flags += ["--fine-cfg-scale=2", "--fine-temperature=0.6", "--fine-top-k=5"]
    flags += ["--seed=4", "--batch-size=4", "--classes", "2", "0"]
    samples = run(trained, *flags)
    settings = {"cfg_scale": 3.0, "temperature": 0.7, "top_k": 9, "top_p": 0.8}
    fine_settings = {"cfg_scale": 2.0, "temperature": 0.6, "top_k": 5}
    assert [call["y"].tolist() for call in calls] == [[2, 0, 2, 0], [2, 0]]
    for call in (*calls, samples):
        assert call["settings"] == settings and call["fine_settings"] == fine_settings
    assert samples["seed"] == 4 and samples["batch_size"] == 4
    assert samples["model"] == "ctf" and samples["images_per_second"] > 0
    assert samples["classes"].tolist() == [2, 0, 2, 0, 2, 0]
    assert samples["images"].dtype == torch.uint8
    assert samples["images"].shape == (6, 16, 16, 3)
    assert samples["coarse"].shape == samples["fine"].shape == (6, T)
    assert torch.equal(G[samples["fine"]], samples["coarse"])
    vqvae, _ = load_tokenizer(trained, CPU)
    pixels = reconstruct(vqvae, samples["fine"])
    assert torch.equal(samples["images"], pixels), "images of other fine labels"
    assert (trained / "samples.png").exists()


def test_the_seed_decides_the_images(trained):
    one, again, other = (run(trained, "--seed", seed) for seed in "001")
    assert one["settings"] == SETTINGS and one["fine_settings"] == FINE_SETTINGS
    assert torch.equal(one["images"], again["images"])
    assert not torch.equal(one["fine"], other["fine"])


def test_the_baseline_has_a_file_of_its_own(trained):
    samples = run(trained, "--model", "baseline", name="samples-baseline.pt")
    assert samples["model"] == "baseline" and samples["coarse"] is None
    weights = {"vqvae": "weights-of-vqvae", "ar": "weights-of-baseline"}
    assert samples["weights"] == weights
    assert (trained / "samples-baseline.png").exists()
    assert not (trained / "samples.pt").exists()


def test_a_folder_for_each_guidance_scale(trained):
    sample.main(
        ["--out", str(trained), "--num-samples", "6", "--cfg-scales", "1", "2.5"]
    )
    assert not (trained / "samples.pt").exists()
    for name, scale in (("cfg1", "1"), ("cfg2.5", "2.5")):
        alone = run(trained, "--cfg-scales", scale)
        samples = torch.load(trained / name / "samples.pt", weights_only=True)
        assert samples["settings"]["cfg_scale"] == float(scale)
        assert torch.equal(samples["fine"], alone["fine"]), "not samples of this scale"
        assert (trained / name / "samples.png").exists()


def test_a_kept_copy_is_sampled_with_what_the_folder_above_has(trained, capsys):
    kept = trained / "kept-01"
    kept.mkdir()
    copy = torch.load(trained / "coarse.pt", weights_only=True)
    weights = {name: w / 2 for name, w in copy["model"].items()}
    copy |= {"model": weights, "step": 3, "weights_id": "half-trained"}
    torch.save(copy, kept / "coarse.pt")
    early, final = run(kept), run(trained)
    assert early["weights"] == final["weights"] | {"ar": "half-trained"}
    assert not torch.equal(early["coarse"], final["coarse"])
    printed = capsys.readouterr().out
    assert f"using {trained / 'fine.pt'}" in printed
    assert f"{kept / 'coarse.pt'} is unfinished: step 3 of 7" in printed


def test_a_name_says_how_samples_differ_from_the_defaults():
    def name(model="ctf", settings=(), **fine):
        settings = SETTINGS | dict(settings)
        both = {"settings": settings, "fine_settings": FINE_SETTINGS | fine}
        return sample.name_of({"model": model, **both})

    assert name() == "CTF, argmax fine labels, guidance 2"
    assert name(top_k=0) == "CTF, sampled fine labels, guidance 2"
    assert name("baseline") == "baseline, guidance 2"
    warm = {"cfg_scale": 1.5, "temperature": 0.5, "top_p": 0.9}
    text = "guidance 1.5, temperature 0.5, top_p 0.9"
    assert name("baseline", warm) == f"baseline, {text}"
    text = f"CTF, sampled fine labels, {text}, fine cfg_scale 3, fine top_k 5"
    assert name("ctf", warm, cfg_scale=3.0, top_k=5) == text


def test_classes_are_those_of_the_test_set_or_those_asked_for(trained, capsys):
    test_y = torch.tensor([2, 0, 0, 1])
    for count, wanted in ((3, [2, 0, 0]), (6, [2, 0, 0, 1, 2, 0])):
        assert choose_classes(None, count, test_y, NAMES).tolist() == wanted
    assert choose_classes(["cat", "0"], 5, test_y, NAMES).tolist() == [2, 0, 2, 0, 2]
    # A folder that is called 2 may be class 0: names come first.
    assert choose_classes(["2"], 1, test_y, ["2", "3", "x"]).tolist() == [0]
    edit(trained / "tokens.pt", test=(torch.randint(K, (4, T)), test_y))
    assert run(trained)["classes"].tolist() == [2, 0, 0, 1, 2, 0]
    for wrong in ("3", "dog", "-1"):
        flags = "--out", trained, "--classes", wrong
        code, message = error_of(capsys, sample.main, *flags)
        assert code == 1 and f"--classes {wrong}: no such class; there are" in message


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--top-p", "0"], "--top-p must be above 0 and at most 1"),
        (["--top-p", "95"], "--top-p must be above 0 and at most 1"),
        (["--temperature", "0"], "a temperature must be above 0"),
        (["--fine-temperature", "0"], "a temperature must be above 0"),
        (["--fine-temperature", "2"], "add --fine-top-k 0"),
        (["--model", "baseline", "--anatomy"], "the baseline has only one"),
    ],
)
def test_settings_without_a_meaning_are_usage_errors(flags, text, capsys):
    with pytest.raises(SystemExit) as exit_info:
        sample.main(flags)
    assert exit_info.value.code == 2 and text in capsys.readouterr().err


def test_export_writes_samples_and_real_images(trained):
    def stored(name):
        """The images of export/name.npz, which must equal export/name/*.png."""
        images = np.load(trained / "export" / f"{name}.npz")["arr_0"]
        paths = sorted((trained / "export" / name).iterdir())
        assert [path.name for path in paths] == [
            f"{i:06d}.png" for i in range(len(images))
        ]
        for path, image in zip(paths, images):
            with Image.open(path) as file:
                assert (np.array(file) == image).all()
        assert images.dtype == np.uint8
        return torch.from_numpy(images)

    assert not (trained / "export").exists()
    for flags in ([], ["--num-samples", "4"]):  # of a longer run, nothing may be left
        samples = run(trained, "--export", *flags)
        assert torch.equal(stored("samples"), samples["images"])
    assert len(samples["images"]) == 4
    test_set = load_examples(trained, "images.pt")[1]
    assert torch.equal(stored("real"), test_set.x)
    baseline = run(trained, "--export", "--model=baseline", name="samples-baseline.pt")
    assert torch.equal(stored("samples-baseline"), baseline["images"])


# ----------------------------------------------------------------------------- pictures


def test_rows_of_the_picture_are_of_the_class_beside_them(trained, monkeypatch):
    saved = spy(monkeypatch, Figure, "savefig")
    samples = run(trained, "--classes", "2", "0")
    (call,) = saved
    rows = {}
    for ax in call["self"].axes:
        if ax.get_ylabel():
            rows[ax.get_ylabel()] = torch.from_numpy(ax.images[0].get_array().data)
    assert list(rows) == ["class ant", "class cat"]
    for name, y in (("class ant", 0), ("class cat", 2)):
        assert torch.equal(rows[name], samples["images"][samples["classes"] == y][0])


def test_entropy_in_bits():
    p = torch.tensor([0.5, 0.25, 0.25, 0.0])  # 0.5 * 1 + 2 * 0.25 * 2 bits
    logits = torch.stack([p.log(), torch.zeros(4)])  # and a uniform one
    assert torch.allclose(sample.entropy(logits), torch.tensor([1.5, 2.0]))


def test_tokens_not_yet_reached_have_a_code_of_zeros(trained):
    vqvae, _ = load_tokenizer(trained, CPU)
    fine = torch.randint(K, (2, T))
    codes = vqvae.codebook[fine].view(2, 4, 4, 8).permute(0, 3, 1, 2).clone()
    codes[:, :, 1, 2:], codes[:, :, 2:] = 0, 0  # row by row: 4 + 2 tokens are known
    with torch.no_grad():
        wanted = to_uint8(vqvae.decode(codes))
        assert torch.equal(sample.decode_prefix(vqvae, fine, 6), wanted)
        assert torch.equal(
            sample.decode_prefix(vqvae, fine, T), reconstruct(vqvae, fine)
        )


def test_similar_codes_have_similar_colours():
    along = torch.tensor([0.3, -0.9, 0.8, 0.1])  # their order: 2, 0, 3, 1
    red, green, blue = sample.code_colors(along[:, None] * torch.tensor([[3.0, 1.0]])).T
    assert red.tolist() in ([0.5, 0, 0.75, 0.25], [0.25, 0.75, 0, 0.5])
    assert blue.tolist() == [0] * 4 and 0 <= green.min() and green.max() < 1


@pytest.fixture
def known_logits(monkeypatch):
    """Stand-ins for both Transformers: {name: logits}, and {name: arguments}."""
    logits = {"ar": torch.randn(1, T, M), "aux": torch.randn(1, T, K // M)}
    seen, load_models = {}, sample.load_models

    def answer(name, table, *args):
        seen[name] = args
        return table

    def with_known_logits(*args):
        models, artifacts = load_models(*args)
        for name, table in logits.items():
            models[name].forward = partial(answer, name, table)
        return models, artifacts

    monkeypatch.setattr(sample, "load_models", with_known_logits)
    return logits, seen


def test_anatomy_shows_one_image_stage_by_stage(trained, known_logits):
    logits, seen = known_logits
    models, _ = sample.load_models(trained, "ctf", CPU)
    vqvae, fine, y = models["vqvae"], torch.randint(K, (1, T)), torch.tensor([2])
    image = torch.randint(256, (16, 16, 3), dtype=torch.uint8)
    pictures = sample.anatomy(models, image, fine, y, np.random.default_rng(0))
    titles = [title.split("\nmean")[0].replace("\n", " ") for title in pictures]
    pictures = dict(zip(titles, map(torch.from_numpy, pictures.values())))
    color = sample.code_colors(vqvae.codebook)
    wanted = {"pixels": image, "fine labels": color[fine].view(4, 4, 3)}
    means = torch.stack([color[G == m].mean(dim=0) for m in range(M)])
    wanted["coarse labels"] = means[G[fine]].view(4, 4, 3)
    for i, name in ((1, "ar"), (2, "aux")):
        wanted[f"entropy of stage {i}"] = sample.entropy(logits[name][0]).view(4, 4)
    for n in (4, 8, 12, 16):
        with torch.no_grad():
            part = sample.decode_prefix(vqvae, fine, n)[0]
        wanted[f"decoded from the first {n} tokens"] = part
    assert list(pictures)[: len(wanted)] == list(wanted)
    for title, picture in wanted.items():
        assert torch.equal(pictures[title], picture), title
    # The stand-in for the swap returns the coarse labels themselves.
    own = reconstruct(vqvae, G[fine])[0]
    assert torch.equal(pictures["swapped within k-means clusters"], own)
    assert not torch.equal(pictures["swapped within random clusters"], own)
    (tokens, classes), (coarse, also_classes) = seen["ar"], seen["aux"]
    assert torch.equal(tokens, G[fine][:, :-1]) and torch.equal(coarse, G[fine])
    assert classes is y and also_classes is y


def test_the_anatomy_is_of_a_real_image_and_of_a_sample_of_one_class(
    trained, known_logits, monkeypatch
):
    calls = spy(monkeypatch, sample, "anatomy")
    saved = spy(monkeypatch, Figure, "savefig")
    test_set = load_examples(trained, "images.pt")[1]
    y = (test_set.y[0] + 1) % 3  # not the class of the first test image
    flags = ["--anatomy", "--cfg-scales", "1", "2", "--classes", str(y.item())]
    sample.main(["--out", str(trained), "--num-samples", "2", *flags])
    samples = torch.load(trained / "cfg1" / "samples.pt", weights_only=True)
    real, sampled = calls[:2]
    where = places(real["image"][None], test_set.x)
    assert test_set.y[where] == y and real["y"] == y and sampled["y"] == y
    tokens = load_examples(trained, "tokens.pt")[1].x[where]
    assert torch.equal(real["fine"], tokens), "tokens of another image"
    assert torch.equal(sampled["image"], samples["images"][0])
    assert torch.equal(sampled["fine"], samples["fine"][:1])
    figures = {str(call["path"].relative_to(trained)): call["self"] for call in saved}
    names = [f"cfg{i}/{name}.png" for i in (1, 2) for name in ("samples", "anatomy")]
    assert list(figures) == names, "a picture in the folder of each scale"
    panels = [ax for ax in figures["cfg1/anatomy.png"].axes if ax.images]
    assert len(panels) == 22, "11 panels for each of the two images"
    shown = {ax.get_title(): ax.images[0].get_array().data for ax in panels}
    for name, call in (("a real image", real), ("a sample", sampled)):
        assert (shown[name] == call["image"].numpy()).all()
