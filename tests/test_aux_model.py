import math
import re

import numpy as np
import pytest
import torch
from conftest import error_of, noisy
from torch.nn.functional import one_hot

import ar_model
import aux_model
import cluster
import tokenizer
from ar_model import Sampling
from aux_model import MASKED, AuxConfig, AuxModel, fine_loss, predict_fine

G = torch.tensor([2, 0, 1, 1, 0, 1, 2, 1, 1, 3])  # 10 codes in clusters of 2, 5, 2, 1
MEMBERS = [[1, 4, -1, -1, -1], [2, 3, 5, 7, 8], [0, 6, -1, -1, -1], [9, -1, -1, -1, -1]]
PLACE = [0, 0, 0, 1, 1, 2, 1, 3, 4, 0]
CONFIG = AuxConfig(4, 10, 3, [3, 4], layers=2, dim=32, heads=4)
Y = torch.tensor([0, 1, 2, 3, 1])  # 3 is the null class


def guide(cond, uncond, scale):
    return uncond + scale * (cond - uncond)


def filter_logits(logits, top_k=0, top_p=1.0):
    """By ranks, for logits that all differ."""
    rank = (logits[..., None, :] > logits[..., None]).sum(dim=-1)
    logits = logits.masked_fill(rank >= (top_k or logits.shape[-1]), -math.inf)
    p = logits.softmax(dim=-1)
    before = (p[..., None, :] * (p[..., None, :] > p[..., None])).sum(dim=-1)
    return logits if top_p == 1 else logits.masked_fill(before >= top_p, -math.inf)


@pytest.fixture
def stand_ins(monkeypatch):
    """Of what has tests of its own, in test_ar_model.py and test_cluster.py."""
    monkeypatch.setattr(ar_model, "filter_logits", filter_logits)
    monkeypatch.setattr(ar_model, "guide", guide)
    inverse = np.array(MEMBERS), np.array(PLACE)
    monkeypatch.setattr(aux_model, "invert", lambda code_to_cluster: inverse)


@pytest.fixture
def model(stand_ins):
    return noisy(AuxModel(CONFIG, G))


@pytest.fixture
def fine():
    return torch.randint(10, (5, 12), generator=torch.Generator().manual_seed(0))


class Table:
    """A stand-in for AuxModel, whose logits depend on the class and the position."""

    code_to_cluster, config = G, CONFIG
    members, place = torch.tensor(MEMBERS), torch.tensor(PLACE)

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.codes = torch.randn(4, 12, 10, generator=generator)  # class, token, code

    def dense(self, coarse, y):
        """The logits of all K codes, MASKED outside the cluster: (B, T, K)."""
        return self.codes[y].masked_fill(coarse[..., None] != G, MASKED)

    def __call__(self, coarse, y):
        self.gradients = torch.is_grad_enabled() or torch.is_inference_mode_enabled()
        members = self.members[coarse]  # (B, T, S)
        logits = self.codes[y].gather(-1, members.clamp(min=0))
        return logits.masked_fill(members < 0, MASKED)

    forward = __call__


@pytest.fixture
def table(stand_ins):
    return Table()


# ---------------------------------------------------------------------------- the model


def test_sizes_and_members():
    config, g = AuxConfig(512, 16384, 1000, [16, 16], 24, 1024, 16), torch.arange(16384)
    with torch.device("meta"):  # counts, but no memory
        model = AuxModel(config, g % 512)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 326.66
    model = AuxModel(CONFIG, G)
    assert model.members.tolist() == MEMBERS and model.place.tolist() == PLACE
    weights = {name for name, _ in model.named_parameters()}
    assert set(model.state_dict()) == weights, "buffers are saved"


def features(n):
    """Random features (n, dim) and coarse labels (n,)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 32, generator=generator)
    return x, torch.randint(4, (n,), generator=generator)


@pytest.mark.parametrize("head", ["cluster_logits", "cluster_logits_on_cpu"])
@pytest.mark.parametrize("clusters", [[0, 1, 2, 3], [3, 0], [2]])
def test_logits_are_those_of_the_masked_k_way_head(model, head, clusters):
    head, (x, coarse) = getattr(model, head), features(60)
    coarse = torch.tensor(clusters)[coarse % len(clusters)]
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert head(x, coarse).dtype == torch.float32, "float32 under autocast as well"
    logits, dense = head(x, coarse), x @ model.head.weight.T  # (n, S), (n, K)
    members = torch.tensor(MEMBERS)[coarse]
    wanted = dense.gather(1, members.clamp(min=0)).masked_fill(members < 0, MASKED)
    message = "not the logits of the codes of the cluster, MASKED where members is -1"
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5, msg=message)
    pairs = []
    for some in (logits, wanted):
        loss = some.log_softmax(dim=-1)[:, 0].square().sum()
        pairs.append(torch.autograd.grad(loss, (x, model.head.weight)))
    for found, wanted in zip(*pairs):
        message = "not the gradient of the features, or of the head"
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, msg=message)


def test_a_gpu_uses_the_definition_and_a_cpu_the_fast_head(model, monkeypatch):
    for width, head in ((6, "cluster_logits"), (7, "cluster_logits_on_cpu")):
        zeros = lambda self, x, coarse, width=width: x.new_zeros(len(x), width)
        monkeypatch.setattr(AuxModel, head, zeros)
    coarse = torch.zeros(5, 12, dtype=torch.long)
    assert model(coarse, Y).shape == (5, 12, 7)
    model.to("meta")  # any device but the CPU
    assert model(coarse.to("meta"), Y.to("meta")).shape == (5, 12, 6)


def test_every_token_sees_every_coarse_label_and_the_class(model, fine):
    coarse = G[fine]
    logits = model(coarse, Y)
    for i in range(12):
        changed = coarse.clone()
        changed[:, i] = (changed[:, i] + 1) % 4
        moved = (model(changed, Y) - logits).abs().amax(dim=2)  # (B, T)
        assert moved[:, [t for t in range(12) if t != i]].min() > 1e-5
    assert (model(coarse, (Y + 1) % 4) - logits).abs().amax(dim=2).min() > 1e-5


# ----------------------------------------------------------------------------- the loss


def test_loss_is_the_masked_cross_entropy(table, fine):
    table.codes.requires_grad_()
    dense = table.dense(G[fine], Y)
    wanted = -dense.log_softmax(-1).gather(-1, fine[..., None]).mean()
    loss, right = fine_loss(table, fine, Y)
    message = "not the mean of -ln p of the fine labels within their clusters"
    torch.testing.assert_close(loss, wanted, check_dtype=False, msg=message)
    accuracy = (dense.argmax(-1) == fine).float().mean().item()
    assert float(right) == pytest.approx(accuracy), "not the top-1 accuracy"
    found, wanted = (torch.autograd.grad(x, table.codes)[0] for x in (loss, wanted))
    message = "the loss must have a gradient in every logit of the cluster of a token"
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6, msg=message)


def test_mean_fine_loss_weighs_every_image_equally_without_gradients(fine):
    table = Table()
    fine, y = torch.randint(10, (260, 12)), torch.randint(3, (260,))
    wanted = [float(value) for value in fine_loss(table, fine, y)]
    assert aux_model.mean_fine_loss(table, fine, y) == pytest.approx(wanted, rel=1e-5)
    assert not table.gradients


def test_the_first_loss_is_that_of_a_uniform_guess_within_the_cluster():
    fine = torch.randint(10, (5, 12), generator=torch.Generator().manual_seed(2))
    sizes = [sum(m >= 0 for m in MEMBERS[G[q]]) for q in fine.flatten().tolist()]
    loss, _ = fine_loss(AuxModel(CONFIG, G), fine, Y)
    assert loss.item() == pytest.approx(np.log(sizes).mean(), abs=1e-5)


# --------------------------------------------------------------------------- prediction


@pytest.mark.parametrize(
    "settings", [{}, {"cfg_scale": 3.0}, {"cfg_scale": 0.5}, {"temperature": 1000.0}]
)
def test_a_fine_label_always_lies_in_its_cluster(table, settings):
    coarse, y = torch.randint(4, (200, 12)), torch.randint(3, (200,))
    generator = torch.Generator().manual_seed(0)
    fine = predict_fine(table, coarse, y, generator, Sampling(**settings))
    assert torch.equal(G[fine], coarse), "a fine label outside its cluster"
    assert fine.dtype == torch.int64
    assert len(fine.unique()) == 10, "every code must be within reach"


def test_top_k_1_is_the_argmax_with_guidance(table, fine):
    coarse, y = G[fine], torch.tensor([0, 1, 2, 2, 1])
    cond, uncond = table.dense(coarse, y), table.dense(coarse, torch.full((5,), 3))
    for scale in (1.0, 4.0, 0.5, 0.0):
        wanted = guide(cond, uncond, scale).argmax(-1)
        for settings in ({"top_k": 1}, {"temperature": 1e-5}, {"top_p": 1e-6}):
            sampling = Sampling(scale, **settings)
            found = predict_fine(table, coarse, y, torch.Generator(), sampling)
            assert torch.equal(found, wanted), f"not the argmax: {sampling}"
    assert not table.gradients, "without torch.no_grad it takes more memory"


@pytest.mark.parametrize(
    "sampling", [Sampling(1, 2, 0, 1), Sampling(3, 2, 2, 1), Sampling(3, 2, 0, 0.7)]
)
def test_fine_labels_follow_the_probabilities(table, fine, sampling):
    coarse, y = G[fine[:1]], torch.tensor([1])
    many = coarse.expand(4000, 12), y.expand(4000)
    logits = table.dense(coarse, y)
    if sampling.cfg_scale != 1:
        logits = guide(logits, table.dense(coarse, torch.tensor([3])), 3)
    kept = filter_logits(logits / 2, sampling.top_k, sampling.top_p)
    wanted = kept.softmax(-1)[0]  # (T, K)

    def run(generator):
        return predict_fine(table, *many, generator, sampling)

    found = run(torch.Generator().manual_seed(0))
    frequency = one_hot(found, 10).float().mean(dim=0)  # (T, K)
    message = f"not the filtered softmax(logits / 2) with {sampling}"
    torch.testing.assert_close(frequency, wanted, rtol=0, atol=0.04, msg=message)
    torch.manual_seed(5)  # another state of torch's global generator
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(run(generator), found), "randomness that is not from generator"
    assert not torch.equal(run(generator), found), "the second batch equals the first"


# ---------------------------------------------------------------------------- the script


MODEL = {"dim": 128, "heads": 4, "keep": 0, "batch-size": 32, "save-every": 200}
STAGE_1 = {"layers": 4, "steps": 3000, "lr": 0.001, "labels": "coarse"}
STAGE_2 = {"layers": 2, "steps": 1000, "lr": 0.003}
TOKENIZER = {"image-size": 32, "downsample": 4, "channels": 96, "code-dim": 8}
TOKENIZER |= {"codebook-size": 4096, "data": "glyphs", "save-every": 200}
TOKENIZER |= {"steps": 600, "batch-size": 128, "lr": 0.002, "seed": 0}
CLUSTERS = {"clusters": 128, "method": "kmeans", "restarts": 3}


@pytest.mark.parametrize(
    ("script", "wanted"),
    [
        (ar_model, MODEL | STAGE_1),
        (aux_model, MODEL | STAGE_2),
        (cluster, CLUSTERS),
        (tokenizer, TOKENIZER),
    ],
)
def test_default_flags(script, wanted, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    found = re.findall(r"--([a-z-]+) (?:(?!--)[^()])*\(default: (.+?)\)", text)
    assert {(name, str(value)) for name, value in wanted.items()} <= set(found)
    if "heads" in wanted:  # a pair of numbers for the row, and one for the column
        code, _ = error_of(capsys, script.main, "--dim", 12, "--heads", 2)
        assert code == 2
