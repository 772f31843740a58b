import math

import pytest
import torch
from conftest import (
    SIZES,
    K,
    M,
    check_resume,
    check_schedule,
    check_what_is_learnt_from,
    edit,
    error_of,
    noisy,
    spy,
)
from conftest import G as CLUSTERS_OF_OUT

import aux_model
from aux_model import MASKED, AuxConfig, AuxModel, fine_loss, predict_fine
from tokenizer import load_examples

TINY = [*SIZES, "--batch-size", "4", "--save-every", "100"]
G = torch.tensor([2, 0, 1, 1, 0, 1, 2, 1, 1, 3])  # 10 codes in clusters of 2, 5, 2, 1
MEMBERS = [[1, 4, -1, -1, -1], [2, 3, 5, 7, 8], [0, 6, -1, -1, -1], [9, -1, -1, -1, -1]]
CONFIG = AuxConfig(4, 10, 3, [3, 4], layers=2, dim=32, heads=4)
Y = torch.tensor([0, 1, 2, 3, 1])  # 3 is the null class


def guide(cond, uncond, scale):
    return uncond + scale * (cond - uncond)


def filter_logits(logits, top_k=0, top_p=1.0):
    assert top_p == 1, "stage 2 has no top-p"
    if not 0 < top_k < logits.shape[-1]:
        return logits
    smallest = logits.sort(descending=True).values[..., top_k - 1 : top_k]
    return torch.where(logits >= smallest, logits, -math.inf)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    """Guidance and top-k have tests of their own, in test_ar_model.py."""
    monkeypatch.setattr(aux_model, "filter_logits", filter_logits)
    monkeypatch.setattr(aux_model, "guide", guide)


@pytest.fixture
def model():
    return noisy(AuxModel(CONFIG, G))


@pytest.fixture
def fine():
    return torch.randint(10, (5, 12), generator=torch.Generator().manual_seed(0))


class Table:
    """A stand-in for AuxModel, whose logits depend on the class and the position."""

    code_to_cluster, members, config = G, torch.tensor(MEMBERS), CONFIG

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.codes = torch.randn(
            4, 12, 10, generator=generator
        )  # class, position, code

    def dense(self, coarse, y):
        """The logits of all K codes, MASKED outside the cluster: (B, T, K)."""
        return self.codes[y].masked_fill(coarse[..., None] != G, MASKED)

    def forward(self, coarse, y):
        members = self.members[coarse]  # (B, T, S)
        logits = self.codes[y].gather(-1, members.clamp(min=0))
        return logits.masked_fill(members < 0, MASKED)

    __call__ = forward


@pytest.fixture
def table():
    return Table()


# -------------------------------------------------------------------------------- model


def test_parameters_at_the_papers_size():
    config = AuxConfig(512, 16384, 1000, [16, 16], 24, 1024, 16)
    g = torch.arange(16384) % 512
    with torch.device("meta"):  # counts, but no memory
        model = AuxModel(config, g)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 326.66


def test_members_is_the_inverse_of_the_map(model):
    assert model.members.tolist() == MEMBERS
    weights = set(model.state_dict())
    assert weights == {name for name, _ in model.named_parameters()}, (
        "buffers are saved"
    )


def features(n, seed=0):
    """Random features (n, dim) and coarse labels (n,)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 32, generator=generator)
    return x, torch.randint(4, (n,), generator=generator)


def test_logits_are_those_of_the_masked_k_way_head(model):
    x, coarse = features(60)
    dense = x @ model.head.weight.T  # (n, K)
    with torch.no_grad():
        logits = model.cluster_logits(x, coarse)
    assert logits.shape == (60, 5)
    for i in range(60):
        codes = (G == coarse[i]).nonzero()[:, 0]
        message = "not the logits of the codes of the cluster, in the order of members"
        found, wanted = logits[i, : len(codes)], dense[i, codes]
        torch.testing.assert_close(found, wanted, msg=message)
        assert (logits[i, len(codes) :] == MASKED).all(), "MASKED where members is -1"
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        half = model.cluster_logits(x, coarse)
    assert half.dtype == torch.float32, "float32 under autocast as well"
    # No token of the largest cluster: the width is still S. And the gradients.
    x, coarse = torch.randn(6, 32, requires_grad=True), torch.tensor([0, 3, 0, 2, 3, 0])
    logits = model.cluster_logits(x, coarse)
    assert logits.shape == (6, 5), "S is the size of the largest of all clusters"
    some = logits[logits > MASKED].sum()
    of_x, of_head = torch.autograd.grad(some, (x, model.head.weight))
    assert of_x.abs().amax(dim=1).min() > 0, "the features of a token get no gradient"
    of_codes = of_head.abs().amax(dim=1)
    assert of_codes[[0, 1, 4, 6, 9]].min() > 0, "a code of the cluster gets no gradient"


@pytest.mark.parametrize("clusters", [[0, 1, 2, 3], [3, 1], [2]])
def test_the_fast_head_of_a_cpu_equals_the_definition(model, clusters):
    x, which = features(40)
    coarse = torch.tensor(clusters)[which % len(clusters)]
    results = []
    for head in (model.cluster_logits, model.cluster_logits_on_cpu):
        inputs = x.clone().requires_grad_()
        logits = head(inputs, coarse)
        with torch.autocast("cpu", torch.bfloat16):
            assert head(inputs, coarse).dtype == torch.float32
        loss = logits.log_softmax(dim=-1)[:, 0].square().sum()
        gradients = torch.autograd.grad(loss, (inputs, model.head.weight))
        assert (gradients[0].abs().amax(dim=1) > 0).sum() == (coarse != 3).sum()
        results.append((logits, *gradients))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_gpu_takes_the_definition_and_a_cpu_the_fast_head(model, fine, monkeypatch):
    definition = spy(monkeypatch, AuxModel, "cluster_logits")
    fast = spy(monkeypatch, AuxModel, "cluster_logits_on_cpu")
    model(G[fine], Y)
    assert len(fast) == 1
    definition.clear()
    # meta tensors have no values: code that reads them, as .tolist() does, fails there.
    logits = model.to("meta")(G[fine].to("meta"), Y.to("meta"))
    assert logits.shape == (5, 12, 5) and (len(definition), len(fast)) == (1, 1)


def test_the_logits_of_a_token_are_at_its_own_position(fine):
    # Without layers nothing mixes the tokens: embedding, norm and head remain.
    model = noisy(AuxModel(AuxConfig(4, 10, 3, [3, 4], layers=0, dim=32, heads=4), G))
    coarse = G[fine]
    x = model.token_embedding.weight[coarse]
    x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * model.norm.weight
    members = torch.tensor(MEMBERS)[coarse]  # (B, T, S)
    wanted = (x @ model.head.weight.T).gather(-1, members.clamp(min=0))
    logits, real = model(coarse, Y), members >= 0
    torch.testing.assert_close(logits[real], wanted[real])
    assert (logits[~real] == MASKED).all()


def test_every_token_sees_every_coarse_label_and_the_class(model, fine):
    coarse = G[fine]
    logits = model(coarse, Y)
    for i in range(12):
        changed = coarse.clone()
        changed[:, i] = (changed[:, i] + 1) % 4
        moved = (model(changed, Y) - logits).abs().amax(dim=2)  # (B, T)
        assert moved[:, [t for t in range(12) if t != i]].min() > 1e-5
    assert (model(coarse, (Y + 1) % 4) - logits).abs().amax(dim=2).min() > 1e-5


# --------------------------------------------------------------------------------- loss


def test_loss_is_the_masked_cross_entropy(table, fine):
    dense = table.dense(G[fine], Y)
    log_p = dense.log_softmax(-1).gather(-1, fine[..., None])
    loss, right = fine_loss(table, fine, Y)
    message = "not the mean of -ln p of the fine labels within their clusters"
    torch.testing.assert_close(loss, -log_p.mean(), check_dtype=False, msg=message)
    wanted = (dense.argmax(-1) == fine).float().mean().item()
    assert float(right) == pytest.approx(wanted), "not the top-1 accuracy"


def test_gradient_is_that_of_the_masked_cross_entropy(table, fine):
    table.codes.requires_grad_()
    loss, _ = fine_loss(table, fine, Y)
    (gradient,) = torch.autograd.grad(loss, table.codes)
    log_p = table.dense(G[fine], Y).log_softmax(-1).gather(-1, fine[..., None])
    (wanted,) = torch.autograd.grad(-log_p.mean(), table.codes)
    message = "the loss must have a gradient in every logit of the cluster of a token"
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6, msg=message)


def test_first_loss_is_that_of_a_uniform_guess_within_the_cluster(fine):
    loss, _ = fine_loss(AuxModel(CONFIG, G), fine, Y)
    sizes = G.bincount()[G[fine]]
    assert loss.item() == pytest.approx(sizes.log().mean().item(), abs=1e-5)


def test_mean_fine_loss_weighs_every_image_equally(model):
    fine, y = torch.randint(10, (260, 12)), torch.randint(3, (260,))
    with torch.no_grad():
        whole = [float(value) for value in fine_loss(model, fine, y)]
    assert aux_model.mean_fine_loss(model, fine, y) == pytest.approx(whole, rel=1e-5)


def test_mean_fine_loss_takes_an_accuracy_of_either_kind(model, fine, monkeypatch):
    for right in (0.25, torch.tensor(0.25)):
        answer = torch.tensor(1.5, requires_grad=True), right
        monkeypatch.setattr(aux_model, "fine_loss", lambda *_, answer=answer: answer)
        assert aux_model.mean_fine_loss(model, fine, Y) == [1.5, 0.25]


def test_guessing_within_the_cluster_against_loops(fine):
    test_fine = torch.randint(10, (7, 12), generator=torch.Generator().manual_seed(1))
    nats, right = [], []
    for q in test_fine.flatten().tolist():
        members = (G == G[q]).nonzero()[:, 0].tolist()
        nats.append(math.log(len(members)))
        right.append(q == max(members, key=lambda m: (fine == m).sum().item()))
    wanted = sum(nats) / len(nats), sum(right) / len(right)
    assert aux_model.guessing(G, fine, test_fine) == pytest.approx(wanted, rel=1e-5)


# --------------------------------------------------------------------------- prediction


@pytest.mark.parametrize(
    "settings", [{}, {"cfg_scale": 3.0}, {"cfg_scale": 0.5}, {"temperature": 1000.0}]
)
def test_a_fine_label_always_lies_in_its_cluster(table, settings):
    coarse, y = torch.randint(4, (200, 12)), torch.randint(3, (200,))
    generator = torch.Generator().manual_seed(0)
    fine = predict_fine(table, coarse, y, generator, **settings)
    assert torch.equal(G[fine], coarse), "a fine label outside its cluster"
    assert fine.dtype == torch.int64
    assert len(fine.unique()) == 10, "every code must be within reach"


def test_likeliest_fine_labels_with_guidance(table, fine):
    coarse, y = G[fine], torch.tensor([0, 1, 2, 2, 1])
    cond, uncond = table.dense(coarse, y), table.dense(coarse, torch.full((5,), 3))
    for scale in (1.0, 4.0, 0.5, 0.0):
        found = predict_fine(table, coarse, y, torch.Generator(), scale, top_k=1)
        wanted = guide(cond, uncond, scale).argmax(-1)
        assert torch.equal(found, wanted), f"not the argmax at scale {scale}"
        cold = predict_fine(table, coarse, y, torch.Generator(), scale, 1e-5)
        assert torch.equal(cold, wanted), f"temperature is ignored at scale {scale}"


@pytest.mark.parametrize(("scale", "top_k"), [(1.0, 0), (3.0, 0), (3.0, 2)])
def test_draws_follow_the_probabilities(table, fine, scale, top_k):
    coarse, y = G[fine[:1]], torch.tensor([1])
    many = coarse.expand(4000, 12), y.expand(4000)
    logits = table.dense(coarse, y)
    if scale != 1:
        logits = guide(logits, table.dense(coarse, torch.tensor([3])), scale)
    wanted = (filter_logits(logits, top_k) / 2).softmax(-1)[0]  # (T, K)

    def run(generator):
        return predict_fine(table, *many, generator, scale, 2.0, top_k)

    found = run(torch.Generator().manual_seed(0))
    for i in range(12):
        frequency = found[:, i].bincount(minlength=10) / 4000
        message = f"not softmax(logits / 2), at scale {scale} and top_k {top_k}"
        torch.testing.assert_close(frequency, wanted[i], rtol=0, atol=0.04, msg=message)
    torch.manual_seed(5)  # another state of torch's global generator
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(run(generator), found), "randomness that is not from generator"
    assert not torch.equal(run(generator), found), "the second batch equals the first"


def test_the_argmax_uses_no_randomness(table, fine):
    generator = torch.Generator()
    before = generator.get_state()
    for scale in (1.0, 3.0):
        predict_fine(table, G[fine], Y, generator, scale, top_k=1)
    assert torch.equal(generator.get_state(), before)


# ----------------------------------------------------------------------------- training


def test_it_learns_fine_labels_that_the_neighbours_determine():
    # The fine label is the larger code of its cluster exactly where the token to the
    # left has cluster 1: only a model that sees the other tokens can know that. At this
    # learning rate 20 of 20 seeds know it after 60 to 240 steps.
    torch.manual_seed(0)
    g = torch.tensor([0, 0, 1, 1])
    model = AuxModel(AuxConfig(2, 4, 1, [2, 4], layers=2, dim=32, heads=2), g)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    y = torch.zeros(64, dtype=torch.long)
    for _ in range(500):
        coarse = torch.randint(2, (64, 8))
        fine = 2 * coarse + coarse.roll(1, dims=1)
        loss, right = fine_loss(model, fine, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.05:
            break
    assert right > 0.95, "the neighbours decide the label, and the model missed it"


def test_a_resumed_run_ends_with_the_same_weights(out, monkeypatch):
    command = [*TINY, "--steps", "6"]
    check_resume(monkeypatch, aux_model, "fine.pt", command, out, out / "other")
    ids = {"cluster_id": "the-clusters"}
    model, _ = aux_model.load_aux(out, CLUSTERS_OF_OUT, "cpu", **ids)
    assert not model.training


def test_a_resume_with_other_clusters_is_refused(out, capsys):
    command = [*TINY, "--out", out, "--steps", 2]
    aux_model.main([str(a) for a in command])
    edit(out / "clusters.pt", cluster_id="others")
    code, message = error_of(capsys, aux_model.main, *command, "--resume")
    assert code == 1 and "cluster_id the-clusters, not others" in message


# ---------------------------------------------------------------- how pieces are joined


def test_it_learns_from_training_tokens_and_measures_test_tokens(out, monkeypatch):
    sets = load_examples(out, "tokens.pt")[:2]
    guessed = spy(monkeypatch, aux_model, "guessing")
    command = ["--out", str(out), *SIZES]
    names = ("fine_loss", "fine"), ("mean_fine_loss", "fine")
    check_what_is_learnt_from(monkeypatch, aux_model, command, sets, *names)
    for call in guessed:
        assert torch.equal(call["code_to_cluster"], CLUSTERS_OF_OUT)
        assert torch.equal(call["fine"], sets[0].x)
        assert torch.equal(call["test_fine"], sets[1].x)
    model, artifact = aux_model.load_aux(out, CLUSTERS_OF_OUT, "cpu")
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
