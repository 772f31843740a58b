import math

import pytest
import torch

import aux_model
from aux_model import AuxConfig, AuxModel, predict_fine
from tests.conftest import (
    SIZES,
    K,
    M,
    check_resume,
    check_schedule,
    check_what_is_learnt_from,
    error_of,
    noisy,
    spy,
)
from tokenizer import load_tokens

TINY = [*SIZES, "--batch-size", "4", "--save-every", "100"]
G = torch.tensor([2, 0, 1, 1, 0, 1, 2, 1, 1, 3])  # 10 codes in clusters of 2, 5, 2, 1


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    """What is done to logits has tests of its own, those of ar_model.py. Here it is
    something else, which shows whether it was done: only the largest may stay, and
    "guidance" is another formula, which makes nan of two -inf as well."""

    def filter_logits(logits, top_k=0, top_p=1.0):
        assert top_k in (0, 1) and top_p == 1
        largest = logits.amax(dim=-1, keepdim=True)
        return torch.where(logits == largest, logits, -math.inf) if top_k else logits

    monkeypatch.setattr(aux_model, "filter_logits", filter_logits)
    monkeypatch.setattr(aux_model, "guide", guide)


def guide(cond, uncond, scale):
    return uncond + scale * (cond - uncond)


@pytest.fixture
def model():
    config = AuxConfig(4, 10, 3, [3, 4], layers=2, dim=32, heads=4)
    return noisy(AuxModel(config, G))


@pytest.fixture
def fine():
    return torch.randint(10, (5, 12), generator=torch.Generator().manual_seed(0))


LABELS = torch.tensor([0, 1, 2, 3, 1])  # 3 is the null class


class Table:
    """In place of an AuxModel, for what is done with its logits: these come from tables
    of the K codes, by the coarse label, the class and the place. All else is as there."""

    code_to_cluster = G
    members = torch.tensor([[1, 4, -1, -1, -1], [2, 3, 5, 7, 8], [0, 6, -1, -1, -1]])
    members = torch.cat([members, torch.tensor([[9, -1, -1, -1, -1]])])
    rank = torch.tensor([0, 0, 0, 1, 1, 2, 1, 3, 4, 0])
    by_cluster, sizes = G.argsort(stable=True), [2, 5, 2, 1]
    config = AuxConfig(4, 10, 3, [3, 4])

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.codes = torch.randn(4, 12, 10, generator=generator)  # class, place, code

    def dense(self, coarse, y):
        """The logits of all K codes, -inf outside of the cluster: (B, T, K)."""
        return self.codes[y].masked_fill(coarse[..., None] != G, -math.inf)

    def forward(self, coarse, y):
        members = self.members[coarse]  # (B, T, S)
        logits = self.codes[y].gather(-1, members.clamp(min=0))
        return logits.masked_fill(members < 0, -math.inf)

    __call__ = forward


@pytest.fixture
def table():
    return Table()


def dense_logits(model, coarse, labels):
    """All K logits, then -inf outside the cluster: the definition."""
    features = []
    hook = model.norm.register_forward_hook(lambda *args: features.append(args[2]))
    model(coarse, labels)
    hook.remove()
    logits = features[0] @ model.head.weight.T  # (B, T, K)
    return logits.masked_fill(G != coarse[..., None], -math.inf)


def test_parameters_at_the_papers_size():
    with torch.device("meta"):
        config = AuxConfig(512, 16384, 1000, [16, 16], 24, 1024, 16)
        g = torch.arange(16384, device="cpu") % 512
        with torch.device("cpu"):
            config_small = AuxConfig(512, 16384, 1000, [16, 16], 1, 1024, 16)
            one = sum(p.numel() for p in AuxModel(config_small, g).parameters())
    layer = 4 * 1024**2 + 3 * 1024 * 2816 + 2 * 1024
    assert round((one + 23 * layer) / 1e6, 2) == 326.66 and config.layers == 24


def test_the_three_forms_of_the_map_agree(model):
    codes = torch.arange(10)
    assert torch.equal(model.members[G, model.rank], codes)
    assert model.members.shape == (4, 5) and model.sizes == [2, 5, 2, 1]
    assert sorted(model.by_cluster.tolist()) == codes.tolist()


def test_logits_are_those_of_the_masked_k_way_head(model):
    x = torch.randn(60, 32, generator=torch.Generator().manual_seed(0))
    coarse = torch.randint(4, (60,), generator=torch.Generator().manual_seed(1))
    dense = x @ model.head.weight.T  # (n, K): of which some are asked for
    with torch.no_grad():
        logits = model.cluster_logits(x, coarse)
    assert logits.shape == (60, 5)
    for i in range(60):
        codes = (G == coarse[i]).nonzero()[:, 0]
        message = "not the logits of the cluster's own codes, in the order of members"
        found, wanted = logits[i, : len(codes)], dense[i, codes]
        torch.testing.assert_close(found, wanted, msg=message)
        beyond = logits[i, len(codes) :]
        assert (beyond == -math.inf).all(), "-inf where the cluster has no more codes"
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        half = model.cluster_logits(x, coarse)
    assert half.dtype == torch.float32, "float32 under autocast as well"
    # No token of the largest cluster, and still its width; and what training needs.
    x, coarse = torch.randn(6, 32, requires_grad=True), torch.tensor([0, 3, 0, 2, 3, 0])
    logits = model.cluster_logits(x, coarse)
    assert logits.shape == (6, 5), "S is the size of the largest of all clusters"
    some = logits[logits.isfinite()].sum()
    of_x, of_head = torch.autograd.grad(some, (x, model.head.weight))
    assert of_x.abs().amax(dim=1).min() > 0, "a token's features get no gradient"
    of_codes = of_head.abs().amax(dim=1)
    assert of_codes[[0, 1, 4, 6, 9]].min() > 0, "a code of a token's cluster gets none"


def test_the_dense_head_of_a_gpu_is_that_of_the_loop_over_clusters(model):
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    coarse = G[torch.randint(10, (40,), generator=torch.Generator().manual_seed(1))]
    grids = []
    for dense in (False, True):
        features = x.clone().requires_grad_()
        logits = model.cluster_logits(features, coarse, dense)
        probability = logits.softmax(dim=-1)
        probability[:, 0].log().sum().backward()
        grids.append((logits, features.grad, model.head.weight.grad.clone()))
        model.head.weight.grad = None
    for one, other in zip(*grids):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_answer_of_a_token_is_read_off_at_its_own_place(fine):
    # Without layers nothing mixes the tokens: what is left is embedding, norm and head.
    model = noisy(AuxModel(AuxConfig(4, 10, 3, [3, 4], layers=0, dim=32, heads=4), G))
    coarse = G[fine]
    x = model.token_embedding.weight[coarse]
    x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * model.norm.weight
    wanted = (x @ model.head.weight.T).masked_fill(G != coarse[..., None], -math.inf)
    logits = model(coarse, LABELS).gather(-1, model.rank.expand(5, 12, 10))
    mask = wanted.isfinite()
    torch.testing.assert_close(logits[mask], wanted[mask])


def test_loss_is_the_masked_cross_entropy(table, fine):
    dense = table.dense(G[fine], LABELS)
    log_p = dense.log_softmax(-1).gather(-1, fine[..., None])
    loss, right = aux_model.fine_loss(table, fine, LABELS)
    message = "not the mean of -ln p of the fine labels within their clusters"
    torch.testing.assert_close(loss, -log_p.mean(), check_dtype=False, msg=message)
    wanted = (dense.argmax(-1) == fine).float().mean().item()
    assert float(right) == pytest.approx(wanted), "the share of likeliest codes right"


def test_gradient_is_that_of_the_masked_cross_entropy(table, fine):
    table.codes.requires_grad_()
    loss, _ = aux_model.fine_loss(table, fine, LABELS)
    (gradient,) = torch.autograd.grad(loss, table.codes)
    log_p = table.dense(G[fine], LABELS).log_softmax(-1)
    (wanted,) = torch.autograd.grad(
        -log_p.gather(-1, fine[..., None]).mean(), table.codes
    )
    message = "the loss must have a gradient in every logit of the token's cluster"
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6, msg=message)


def test_every_token_sees_every_coarse_label_and_the_class(model, fine):
    coarse = G[fine]
    logits = model(coarse, LABELS)
    for i in range(12):
        changed = coarse.clone()
        changed[:, i] = (changed[:, i] + 1) % 4
        other = model(changed, LABELS)
        others = [t for t in range(12) if t != i]
        assert (other - logits)[:, others].nan_to_num().abs().amax(dim=2).min() > 1e-5
    other = model(coarse, (LABELS + 1) % 4)
    assert (other - logits).nan_to_num().abs().amax(dim=2).min() > 1e-5


def test_first_loss_is_that_of_guessing_within_the_cluster(fine):
    model = AuxModel(AuxConfig(4, 10, 3, [3, 4], layers=1, dim=32, heads=4), G)
    loss, _ = aux_model.fine_loss(model, fine, LABELS)
    sizes = G.bincount()[G[fine]]
    assert loss.item() == pytest.approx(sizes.float().log().mean().item(), abs=1e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"cfg_scale": 3.0}, {"cfg_scale": 0.5}, {"temperature": 1e9}]
)
def test_a_fine_label_always_lies_in_its_cluster(table, settings):
    coarse, y = torch.randint(4, (200, 12)), torch.randint(3, (200,))
    generator = torch.Generator().manual_seed(0)
    fine = predict_fine(table, coarse, y, generator, **settings)
    message = "a fine label outside its cluster: or nan, -inf minus -inf?"
    assert torch.equal(G[fine], coarse), message
    assert fine.dtype == torch.int64
    assert len(fine.unique()) == 10, "every code must be within reach"


def test_likeliest_fine_labels_with_guidance(table, fine):
    coarse, y = G[fine], torch.tensor([0, 1, 2, 2, 1])
    cond, uncond = table.dense(coarse, y), table.dense(coarse, torch.full((5,), 3))
    for scale in (1.0, 4.0, 0.5, 0.0):
        drawn = predict_fine(table, coarse, y, torch.Generator(), scale, top_k=1)
        guided = cond if scale == 1 else guide(cond, uncond, scale)
        wanted = guided.masked_fill(coarse[..., None] != G, -math.inf).argmax(-1)
        assert torch.equal(drawn, wanted), f"likeliest codes at scale {scale}"
        cold = predict_fine(table, coarse, y, torch.Generator(), scale, 1e-5)
        assert torch.equal(cold, wanted), f"temperature is ignored at scale {scale}"


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_draws_follow_the_probabilities(table, fine, scale):
    coarse, y = G[fine[:1]], torch.tensor([1])
    many = coarse.expand(4000, 12), y.expand(4000)
    logits = table.dense(coarse, y)
    if scale != 1:
        logits = guide(logits, table.dense(coarse, torch.tensor([3])), scale)
        logits = logits.masked_fill(coarse[..., None] != G, -math.inf)
    wanted = (logits / 2).softmax(-1)[0]  # (T, K)

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return predict_fine(table, *many, generator, scale, temperature=2.0)

    drawn = run(0)
    for i in range(12):
        frequency = drawn[:, i].bincount(minlength=10) / 4000
        message = f"at scale {scale}, temperature 2: not how often the softmax says"
        torch.testing.assert_close(frequency, wanted[i], rtol=0, atol=0.04, msg=message)
    torch.manual_seed(5)  # another state of torch's own generator
    assert torch.equal(run(0), drawn), "all that is random must come from generator"
    assert not torch.equal(run(1), drawn)
    generator = torch.Generator().manual_seed(0)
    two = [predict_fine(table, *many, generator, scale) for _ in range(2)]
    assert not torch.equal(*two), "the next batch must go on with the same generator"


def test_guessing_within_the_cluster_against_loops(fine):
    test_fine = torch.randint(10, (7, 12), generator=torch.Generator().manual_seed(1))
    nats, right = [], []
    for q in test_fine.flatten().tolist():
        members = (G == G[q]).nonzero()[:, 0].tolist()
        nats.append(math.log(len(members)))
        right.append(q == max(members, key=lambda m: (fine == m).sum().item()))
    wanted = sum(nats) / len(nats), sum(right) / len(right)
    assert aux_model.guessing(G, fine, test_fine) == pytest.approx(wanted, rel=1e-5)


def test_mean_fine_loss_weighs_every_image_alike(model):
    fine, labels = torch.randint(10, (260, 12)), torch.randint(3, (260,))
    whole = [value.item() for value in aux_model.fine_loss(model, fine, labels)]
    assert aux_model.mean_fine_loss(model, fine, labels) == pytest.approx(
        whole, rel=1e-5
    )


def test_a_resumed_run_ends_with_the_same_weights(out, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    for name in ("tokens.pt", "clusters.pt"):
        (other / name).write_bytes((out / name).read_bytes())
    command = [*TINY, "--steps", "6"]
    check_resume(monkeypatch, aux_model, "fine.pt", command, out, other)
    g = torch.arange(K) % M
    _, artifact = aux_model.load_aux(
        out / "fine.pt", g, "cpu", cluster_id="the-clusters"
    )
    assert artifact["history"]["loss"][0] == pytest.approx(math.log(K / M), abs=1e-4)


def test_it_learns_fine_labels_that_the_neighbours_determine():
    # The fine label is the larger code of its cluster exactly where the label to the
    # left is of cluster 1: only a model that looks around can know. At this learning
    # rate 20 of 20 seeds know it after 60 to 240 steps.
    torch.manual_seed(0)
    g = torch.tensor([0, 0, 1, 1])
    model = AuxModel(AuxConfig(2, 4, 1, [2, 4], layers=2, dim=32, heads=2), g)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    labels = torch.zeros(64, dtype=torch.long)
    for _ in range(500):
        coarse = torch.randint(2, (64, 8))
        fine = 2 * coarse + coarse.roll(1, dims=1)
        loss, right = aux_model.fine_loss(model, fine, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.05:
            break
    assert right > 0.95, "the neighbours decide the label, and the model missed it"


def test_other_clusters_make_a_resume_fail(out, capsys):
    command = [*TINY, "--out", out, "--steps", 2]
    aux_model.main([str(a) for a in command])
    clusters = torch.load(out / "clusters.pt", weights_only=True)
    torch.save(clusters | {"cluster_id": "others"}, out / "clusters.pt")
    code, message = error_of(capsys, aux_model.main, *command, "--resume")
    assert code == 1 and "cluster_id the-clusters, not others" in message


# ------------------------------------------------------------------ how pieces are joined


def test_it_learns_from_training_tokens_and_measures_test_tokens(out, monkeypatch):
    sets = [load_tokens(out, split)[0] for split in ("train", "test")]
    guessed = spy(monkeypatch, aux_model, "guessing")
    command = ["--out", str(out), *SIZES]
    names = ("fine_loss", "fine"), ("mean_fine_loss", "fine")
    check_what_is_learnt_from(monkeypatch, aux_model, command, sets, *names)
    g = torch.arange(K) % M
    for call in guessed:
        assert torch.equal(call["code_to_cluster"], g)
        assert torch.equal(call["fine"], sets[0].x)
        assert torch.equal(call["test_fine"], sets[1].x)
    model, artifact = aux_model.load_aux(out / "fine.pt", g, "cpu")
    assert artifact["config"] == vars(AuxConfig(M, K, 3, [4, 4], 1, 16, 2))
    row = artifact["history"]["test"][-1]
    assert row["bits"] == pytest.approx(row["loss"] / math.log(2))
    wanted = aux_model.mean_fine_loss(model, *sets[1])
    assert [row["loss"], row["right"]] == pytest.approx(wanted, rel=1e-4)


def test_flags_schedule_and_clock_of_stage_2(out, monkeypatch):
    command = ["--out", str(out), "--layers", "1", "--dim", "16", "--heads", "4"]
    check_schedule(monkeypatch, aux_model, command, out / "fine.pt")
    config = torch.load(out / "fine.pt", weights_only=True)["config"]
    assert (config["layers"], config["dim"], config["heads"]) == (1, 16, 4)
