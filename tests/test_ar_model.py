import math

import numpy as np
import pytest
import torch
from conftest import (
    IDS,
    SIZES,
    G,
    K,
    M,
    check_resume,
    check_schedule,
    check_what_is_learnt_from,
    edit,
    error_of,
    noisy,
    same_weights,
)
from scipy.stats import chisquare
from torch.utils._python_dispatch import TorchDispatchMode

import ar_model
from ar_model import ARConfig, ARModel, Block, Cache, filter_logits, generate, guide
from tokenizer import Examples, load_examples

TINY = [*SIZES, "--batch-size", "4", "--save-every", "100"]
CONFIG = ARConfig(11, 3, [3, 4], layers=2, dim=32, heads=4)
Y = torch.tensor([0, 1, 2, 3, 1])  # 3 is the null class


@pytest.fixture
def model():
    return noisy(ARModel(CONFIG))


@pytest.fixture
def tokens():
    return torch.randint(11, (5, 12), generator=torch.Generator().manual_seed(0))


# -------------------------------------------------------------------------------- model


@pytest.mark.parametrize(
    ("sizes", "fine", "coarse"),
    [
        ((12, 768, 12), 110.89, 86.51),
        ((24, 1024, 16), 342.91, 310.41),
        ((36, 1280, 20), 774.70, 734.07),
    ],
)
def test_parameters_at_the_papers_sizes(sizes, fine, coarse):
    for vocabulary, millions in ((16384, fine), (512, coarse)):
        with torch.device("meta"):  # counts, but no memory
            model = ARModel(ARConfig(vocabulary, 1000, [16, 16], *sizes))
        count = sum(p.numel() for p in model.parameters())
        assert round(count / 1e6, 2) == millions


def test_future_tokens_do_not_change_past_logits(model, tokens):
    logits = model(tokens[:, :-1], Y)
    assert logits.shape == (5, 12, 11)
    for t in range(11):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 11
        other = model(changed[:, :-1], Y)
        torch.testing.assert_close(other[:, : t + 1], logits[:, : t + 1])
        moved = (other - logits).abs().amax(dim=(0, 2))  # (T,)
        assert moved[t + 1 :].min() > 1e-3, "all later logits must depend on token t"


def test_without_the_mask_every_token_sees_all():
    torch.manual_seed(0)
    block, x = noisy(Block(16, heads=2, causal=False)), torch.randn(3, 5, 16)
    rotary = ar_model.rotary_table((2, 2), 8)
    changed = x.clone()
    changed[:, 4] += 1
    moved = (block(changed, rotary) - block(x, rotary)).abs().amax(dim=(0, 2))
    assert moved.min() > 1e-4, "causal=False: earlier tokens must see the last one too"


def test_every_position_sees_the_class(model, tokens):
    logits, other = (model(tokens[:, :-1], y) for y in (Y, (Y + 1) % 4))
    assert (other - logits).abs().amax(dim=2).min() > 1e-3


class KeptKeys:
    """A stand-in for Cache, which has a test of its own."""

    k = v = torch.empty(3, 2, 0, 8)

    def extend(self, k, v):
        self.k, self.v = (torch.cat(x, dim=2) for x in ((self.k, k), (self.v, v)))
        return self.k, self.v


def test_attention_against_the_formula():
    torch.manual_seed(0)
    block, x = noisy(Block(16, heads=2, causal=True)), torch.randn(3, 5, 16)
    rotary = ar_model.rotary_table((2, 2), 8)

    def rms_norm(x, gain):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain

    normed = rms_norm(x, block.attention_norm.weight)
    q, k, v = (normed @ w.T for w in block.qkv.weight.split(16))
    mixed = torch.zeros(3, 5, 16)
    for b in range(3):
        for head in (slice(0, 8), slice(8, 16)):
            for i in range(5):
                query = ar_model.rotate(q[b, i : i + 1, head], rotary[:, i : i + 1])
                keys = ar_model.rotate(k[b, : i + 1, head], rotary[:, : i + 1])
                weights = (keys @ query[0] / 8**0.5).softmax(0)
                mixed[b, i, head] = weights @ v[b, : i + 1, head]
    h = x + mixed @ block.out.weight.T
    normed = rms_norm(h, block.mlp_norm.weight)
    gate, up = (normed @ w.T for w in block.gate_up.weight.chunk(2))
    wanted = h + (gate * torch.sigmoid(gate) * up) @ block.down.weight.T
    message = (
        "not x + attention, then + SwiGLU. Are the rows of qkv q, k, v? Is the gate "
    )
    message += "first in gate_up? Are q and k rotated, and scores divided by 8^0.5?"
    found = block(x, rotary)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4, msg=message)
    # The same with a cache: three tokens at once, then one by one.
    cache = KeptKeys()
    first = block(x[:, :3], rotary[:, :3], cache)
    rest = [block(x[:, t : t + 1], rotary[:, t : t + 1], cache) for t in (3, 4)]
    message = "with a cache, a token must see the tokens before it, and no later token"
    found = torch.cat([first, *rest], dim=1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4, msg=message)
    # A mask that is made on the CPU is an error on another device, such as meta.
    assert block.to("meta")(x.to("meta"), rotary.to("meta")).shape == x.shape


def test_rotary_positions_against_complex_numbers():
    x = torch.randn(1 + 3 * 5, 16)
    turned = ar_model.rotate(x, ar_model.rotary_table((3, 5), 16))
    torch.testing.assert_close(turned[0], x[0])  # the class token is not rotated
    for t in range(15):
        row, column = divmod(t, 5)
        for i in range(8):
            place, j = (row, i) if i < 4 else (column, i - 4)
            angle = place * 10_000 ** (-j / 4)
            turn = complex(math.cos(angle), math.sin(angle))
            pair = complex(x[t + 1, i], x[t + 1, i + 8]) * turn
            assert turned[t + 1, i].item() == pytest.approx(pair.real, abs=1e-5)
            assert turned[t + 1, i + 8].item() == pytest.approx(pair.imag, abs=1e-5)


def test_rotary_products_depend_on_the_offset_alone():
    q, k = torch.randn(2, 16)
    rotary = ar_model.rotary_table((6, 6), 16)[:, 1:].unflatten(1, (6, 6))

    def product(at, other):
        one = ar_model.rotate(q, rotary[:, at[0], at[1]])
        return one @ ar_model.rotate(k, rotary[:, other[0], other[1]])

    near = product((0, 1), (2, 4))
    torch.testing.assert_close(product((3, 0), (5, 3)), near)
    assert (product((3, 0), (5, 4)) - near).abs() > 1e-3
    assert (product((3, 0), (4, 3)) - near).abs() > 1e-3


def test_first_loss_is_that_of_a_uniform_guess(tokens):
    loss = ar_model.next_token_loss(ARModel(CONFIG), tokens, Y)
    assert loss.item() == pytest.approx(math.log(11), abs=1e-5)


def test_loss_is_the_mean_of_minus_log_p(tokens):
    table = torch.randn(5, 12, 11, generator=torch.Generator().manual_seed(2))
    table.requires_grad_()

    def model(first, y):
        """Logits from a table: the Transformer has tests of its own."""
        assert torch.equal(first, tokens[:, :-1]), "the last token is never an input"
        assert torch.equal(y, Y)
        return table

    log_p = table.detach().log_softmax(-1)
    total = sum(log_p[b, t, tokens[b, t]] for b in range(5) for t in range(12))
    loss = ar_model.next_token_loss(model, tokens, Y)
    message = "not the mean of -ln p over all 12 tokens. Is the first token included?"
    torch.testing.assert_close(loss, -total / 60, check_dtype=False, msg=message)
    assert loss.requires_grad, "without a gradient nothing is learnt"


def test_mean_loss_weighs_every_image_equally(model):
    tokens, y = torch.randint(11, (260, 12)), torch.randint(3, (260,))
    whole = ar_model.next_token_loss(model, tokens, y).item()
    assert ar_model.mean_loss(model, tokens, y) == pytest.approx(whole, rel=1e-5)


# --------------------------------------------------------------------------- generation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_returns_all_keys_and_values_so_far(dtype):
    k, v = torch.randn(2, 3, 2, 6, 4).to(dtype)  # (B, heads, tokens, head_dim)
    cache = Cache(6)
    for begin, end in ((0, 3), (3, 4), (4, 6)):  # several tokens at once, and one
        all_k, all_v = cache.extend(k[:, :, begin:end], v[:, :, begin:end])
        assert all_k.dtype == all_v.dtype == dtype, "not the dtype of the input"
        assert torch.equal(all_k, k[:, :, :end]), "not the keys so far, in order"
        assert torch.equal(all_v, v[:, :, :end]), "not the values so far, in order"


def test_cached_logits_equal_those_of_the_whole_pass(model, tokens):
    logits = model(tokens[:, :-1], Y)
    caches = [Cache(12) for _ in model.blocks]
    x = model.class_embedding(Y)[:, None]
    for t in range(12):
        step = model.transformer(x, t, caches)[:, 0]
        torch.testing.assert_close(step, logits[:, t], rtol=1e-4, atol=1e-5)
        x = model.token_embedding(tokens[:, t])[:, None]


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_generate_equals_generation_without_a_cache(model, scale):
    y, null = torch.tensor([0, 1, 2, 1]), torch.full((4,), 3)
    settings = {"temperature": 0.8, "top_k": 6, "top_p": 0.9}
    found = generate(model, y, torch.Generator().manual_seed(5), scale, **settings)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.empty(4, 0, dtype=torch.long)
    for _ in range(12):
        cond, uncond = (model(tokens, classes)[:, -1] for classes in (y, null))
        logits = guide(cond, uncond, scale) / 0.8
        token = ar_model.draw(filter_logits(logits, 6, 0.9), generator)
        tokens = torch.cat([tokens, token[:, None]], dim=1)
    assert torch.equal(found, tokens)


def test_generate_depends_on_the_seed_and_top_k_1_does_not(model):
    def run(seed, **settings):
        generator = torch.Generator().manual_seed(seed)
        return generate(model, torch.tensor([0, 1, 2]), generator, **settings)

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    greedy = run(1, top_k=1)
    assert torch.equal(greedy, run(2, top_k=1))
    assert torch.equal(greedy, run(3, temperature=1e-3))
    assert torch.equal(greedy, run(4, top_p=1e-6))


class CountCasts(TorchDispatchMode):
    """Counts how often each weight matrix of a model is cast to another dtype."""

    def __init__(self, model):
        super().__init__()
        matrices = [p for p in model.parameters() if p.ndim == 2]
        self.casts = {p.data_ptr(): 0 for p in matrices}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.casts:
            self.casts[args[0].data_ptr()] += 1
        return func(*args, **(kwargs or {}))


def test_generate_casts_each_weight_once_under_autocast(model):
    # autocast keeps the bfloat16 copy of a weight, but not under inference_mode: there
    # every weight would be cast again for every token.
    with torch.autocast("cpu", torch.bfloat16), CountCasts(model) as counter:
        tokens = generate(model, Y, torch.Generator())
    casts = list(counter.casts.values())
    assert sum(casts) == 4 * 2 + 1  # four matrices per layer, and the head
    assert max(casts) == 1, "a weight is cast more than once for 12 tokens"
    assert not tokens.is_inference() and not tokens.requires_grad


def test_guidance_formula():
    cond, uncond = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.0])
    assert torch.equal(guide(cond, uncond, 1.0), cond), "scale 1 is off"
    assert torch.equal(guide(cond, uncond, 0.0), uncond), "scale 0 ignores the class"
    for scale, wanted in ((3.0, [2.0, -8.0]), (0.5, [0.75, -0.5])):
        assert guide(cond, uncond, scale).tolist() == wanted, f"at scale {scale}"


def test_top_k_keeps_the_k_largest():
    logits = torch.randn(4, 9)
    for k in (1, 3, 8):
        for before, after in zip(logits, filter_logits(logits, top_k=k)):
            wanted = set(before.argsort(descending=True)[:k].tolist())
            assert set(after.isfinite().nonzero()[:, 0].tolist()) == wanted
            assert torch.equal(after[after.isfinite()], before[after.isfinite()])
    copy = logits.clone()
    filter_logits(logits, 3, 0.5)
    filter_logits(logits, 0, 0.5)
    assert torch.equal(logits, copy), "the caller's logits were modified"
    for k in (0, 9, 10, 1000):  # off, V, and more than V
        assert torch.equal(filter_logits(logits, top_k=k), logits)
    for shape in ((9,), (2, 3, 9)):  # logits of a single token, and those of stage 2
        kept = filter_logits(torch.randn(shape), top_k=2).isfinite().sum(dim=-1)
        assert (kept == 2).all(), f"2 of each row of logits {shape} must be kept"


def test_top_p_keeps_the_fewest_that_reach_p():
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(0)) * 2
    for p in (1e-6, 0.3, 0.8, 0.99):
        for before, after in zip(logits, filter_logits(logits, top_p=p)):
            probability, wanted, total = before.double().softmax(-1), set(), 0.0
            for i in probability.argsort(descending=True).tolist():
                if total >= p:
                    break
                wanted.add(i)
                total += probability[i].item()
            assert set(after.isfinite().nonzero()[:, 0].tolist()) == wanted
    assert torch.equal(filter_logits(logits, top_p=1.0), logits)
    kept = filter_logits(logits.view(2, 25, 9), top_p=0.8)
    wanted = filter_logits(logits, top_p=0.8).view(2, 25, 9)
    assert torch.equal(kept, wanted), (
        "each row of (B, T, V) must be filtered separately"
    )


@pytest.mark.parametrize(
    ("p", "top_k", "top_p", "count", "why"),
    [
        ([0.4, 0.3, 0.2, 0.1], 2, 0.5, 1, "after top_k the largest has 0.57"),
        ([0.4, 0.3, 0.2, 0.1], 2, 0.9, 2, "top_k must act when top_p is given too"),
        (
            [0.4, 0.3, 0.2, 0.1],
            0,
            0.65,
            2,
            "the smallest set whose sum is 0.65 or more",
        ),
        ([0.5, 0.5], 0, 0.5, 1, "a sum of exactly 0.5 is enough for 0.5"),
        ([0.25, 0.25, 0.25, 0.25], 0, 0.5, 2, "a sum of exactly 0.5 is enough for 0.5"),
        ([0.1, 0.9], 0, 0.2, 1, "the largest is always kept"),
        ([0.6, 0.3, 0.1], 3, 0.5, 1, "top_p must act when top_k is V"),
    ],
)
def test_top_k_and_top_p_together_and_on_the_edge(p, top_k, top_p, count, why):
    logits = torch.tensor(p).log() + 300  # the same softmax, but exp(300) is too large
    kept = filter_logits(logits, top_k, top_p).isfinite()
    assert kept.sum() == count, why
    assert logits[kept].min() >= logits[~kept].max(), why


def test_draws_follow_the_softmax():
    logits = torch.tensor([1.0, -1.0, 0.0, -math.inf, 2.0])
    generator = torch.Generator().manual_seed(0)
    found = ar_model.draw(logits.expand(20_000, 5), generator)
    counts = found.bincount(minlength=5).numpy()
    wanted = 20_000 * logits.double().softmax(0).numpy()
    assert counts[3] == 0
    some = [0, 1, 2, 4]
    assert chisquare(counts[some], wanted[some]).pvalue > 1e-3


# ----------------------------------------------------------------------------- training


def test_a_tenth_of_the_classes_becomes_the_null_class():
    y = torch.arange(5).repeat(4000)
    dropped = ar_model.drop_classes(y, 5, np.random.default_rng(0))
    changed = dropped != y
    assert (dropped[changed] == 5).all()
    assert changed.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(y, torch.arange(5).repeat(4000)), "the caller's were modified"


def test_only_matrices_decay(model):
    decaying, others = ar_model.adamw(model).param_groups
    assert decaying["weight_decay"] == 0.05 and others["weight_decay"] == 0
    assert {p.ndim for p in decaying["params"]} == {2}
    assert {p.ndim for p in others["params"]} == {1}
    count = len(decaying["params"]) + len(others["params"])
    assert count == len(list(model.parameters()))


def test_the_model_memorises_three_sequences(tokens):
    torch.manual_seed(0)
    model, y = ARModel(CONFIG), torch.tensor([0, 1, 2])
    optimizer = ar_model.adamw(model)
    for _ in range(120):
        loss = ar_model.next_token_loss(model, tokens[:3], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5
    assert torch.equal(generate(model, y, torch.Generator(), top_k=1), tokens[:3])


@pytest.mark.parametrize(("labels", "V"), [("coarse", M), ("fine", K)])
def test_a_resumed_run_ends_with_the_same_weights(out, monkeypatch, labels, V):
    name = {"coarse": "coarse.pt", "fine": "baseline.pt"}[labels]
    command = [*TINY, "--labels", labels, "--steps", "6"]
    check_resume(monkeypatch, ar_model, name, command, out, out / "other")
    model, artifact = ar_model.load_ar(out, name, "cpu", codebook_id="the-codebook")
    assert model.head.out_features == V and not model.training
    assert artifact.get("cluster_id") == (
        "the-clusters" if labels == "coarse" else None
    )


def test_copies_are_kept_along_the_way(out):
    ar_model.main([*TINY, "--out", str(out), "--steps", "5", "--keep", "2"])
    names = [f"kept-{i:02d}/coarse.pt" for i in (1, 2)]
    assert sorted(str(p.relative_to(out)) for p in out.glob("kept-*/*")) == names
    early, last = (torch.load(out / name, weights_only=True) for name in names)
    assert (early["step"], last["step"]) == (3, 5)
    assert early["weights_id"] != last["weights_id"]
    assert same_weights(out / names[1], out / "coarse.pt")
    # A copy can be resumed in its own folder, with the data of the folder above.
    ar_model.main([*TINY, "--out", str(out / "kept-01"), "--steps", "5", "--resume"])
    assert same_weights(out / names[0], out / "coarse.pt")


def test_a_resume_with_other_flags_or_clusters_is_refused(out, capsys):
    command = [*TINY, "--out", out, "--steps", 2]
    ar_model.main([str(a) for a in command])
    edit(out / "clusters.pt", cluster_id="others")
    for flags, text in (
        (["--lr", 0.5], "coarse.pt was trained with lr 0.001, not 0.5"),
        (["--labels", "fine"], "baseline.pt is missing"),
        ([], "coarse.pt was trained with cluster_id the-clusters, not others"),
    ):
        code, message = error_of(capsys, ar_model.main, *command, *flags, "--resume")
        assert code == 1 and text in message


# ---------------------------------------------------------------- how pieces are joined


@pytest.mark.parametrize(("labels", "V"), [("coarse", M), ("fine", K)])
def test_it_learns_from_training_tokens_and_measures_test_tokens(
    out, monkeypatch, labels, V
):
    sets = load_examples(out, "tokens.pt")[:2]
    if labels == "coarse":
        sets = [Examples(G[examples.x], examples.y) for examples in sets]
    command = ["--out", str(out), *SIZES, "--labels", labels]
    names = ("next_token_loss", "tokens"), ("mean_loss", "tokens")
    check_what_is_learnt_from(monkeypatch, ar_model, command, sets, *names)
    name = {"coarse": "coarse.pt", "fine": "baseline.pt"}[labels]
    model, artifact = ar_model.load_ar(out, name, "cpu")
    assert artifact["config"] == vars(ARConfig(V, 3, [4, 4], 1, 16, 2))
    row = artifact["history"]["test"][-1]
    assert row["bits"] == pytest.approx(row["loss"] / math.log(2))
    assert row["loss"] == pytest.approx(ar_model.mean_loss(model, *sets[1]), rel=1e-4)
    assert artifact["codebook_id"] == IDS["codebook_id"]


def test_flags_schedule_and_clock_of_stage_1(out, monkeypatch):
    command = ["--out", str(out), "--layers", "1", "--dim", "16", "--heads", "4"]
    check_schedule(monkeypatch, ar_model, command, out / "coarse.pt")
    config = torch.load(out / "coarse.pt", weights_only=True)["config"]
    assert (config["layers"], config["dim"], config["heads"]) == (1, 16, 4)
