import math

import numpy as np
import pytest
import torch
from conftest import noisy
from scipy.stats import chisquare

import ar_model
from ar_model import ARConfig, ARModel, Sampling, filter_logits, generate

CONFIG = ARConfig(11, 3, [3, 4], layers=2, dim=32, heads=4)
Y = torch.tensor([0, 1, 2, 3, 1])  # 3 is the null class


@pytest.fixture
def model():
    return noisy(ARModel(CONFIG))


@pytest.fixture
def tokens():
    return torch.randint(11, (5, 12), generator=torch.Generator().manual_seed(0))


def gradients_of(model):
    """A list that says, after each call of model, whether it kept what a gradient
    needs, which costs memory."""
    kept = []
    hook = lambda module, args, x: kept.append(x.requires_grad or x.is_inference())
    model.norm.register_forward_hook(hook)
    return kept


# ---------------------------------------------------------------------------- the model


def test_constants_of_the_papers():
    # Sizes B, L and XL: millions of parameters over 16384 and over 512 labels.
    table = {(12, 768, 12): (110.89, 86.51), (24, 1024, 16): (342.91, 310.41)}
    table |= {(36, 1280, 20): (774.70, 734.07)}
    for sizes, millions in table.items():
        for V, wanted in zip((16384, 512), millions):
            with torch.device("meta"):  # counts, but no memory
                model = ARModel(ARConfig(V, 1000, [16, 16], *sizes))
            count = sum(p.numel() for p in model.parameters())
            assert round(count / 1e6, 2) == wanted
    # SwiGLU: 8/3 dim, rounded up to a multiple of 256 (LlamaGen) or, below 512, of 64.
    hidden = {16: 64, 128: 384, 256: 704, 448: 1216, 512: 1536, 1024: 2816, 1280: 3584}
    with torch.device("meta"):
        found = {
            dim: ar_model.Block(dim, 4, causal=True).down.in_features for dim in hidden
        }
    assert found == hidden
    # A first loss of exactly ln V: a head of zeros; all others with std 0.02.
    model = ARModel(ARConfig(400, 100, [3, 4], layers=1, dim=64, heads=4))
    for name, weight in model.named_parameters():
        wanted = 0 if name == "head.weight" else 0.02
        if weight.ndim == 2:
            assert weight.std().item() == pytest.approx(wanted, rel=0.05), name
            assert abs(weight.mean()) < 0.001, name
        else:
            assert (weight == 1).all(), name
    # RMSNorm with eps = 1e-5 (Llama): x / sqrt(mean x^2 + eps), where x^2 is only 1e-5.
    x, half = torch.full((1, 64), 1e-5**0.5), torch.full((1, 64), 0.5**0.5)
    for norm in (model.norm, model.blocks[0].attention_norm, model.blocks[0].mlp_norm):
        torch.testing.assert_close(norm(x), half)
    # A tenth of the classes is dropped (LlamaGen).
    y = torch.arange(5).repeat(8000)
    dropped = ar_model.drop_classes(y, 5, np.random.default_rng(0))
    assert torch.equal(y, torch.arange(5).repeat(8000)), "the caller's were modified"
    assert ((dropped == y) | (dropped == 5)).all()
    assert (dropped == 5).float().mean().item() == pytest.approx(0.1, abs=0.005)


def test_logits_and_rotations_are_float32_under_bfloat16_autocast(model, tokens):
    rotary = ar_model.rotary_table((3, 4), 8)
    x = torch.randn(13, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logits, turned = model(tokens[:, :-1], Y), ar_model.rotate(x, rotary)
    assert logits.dtype == rotary.dtype == torch.float32
    assert turned.dtype == torch.bfloat16, "the dtype of x"
    assert torch.equal(turned, ar_model.rotate(x.float(), rotary).bfloat16())


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
    other = model(tokens[:, :-1], (Y + 1) % 4)
    assert (other - logits).abs().amax(dim=2).min() > 1e-3, "all depend on the class"


class KeptKeys:
    """A stand-in for Cache, which has a test of its own."""

    k = v = torch.empty(3, 2, 0, 8)

    def extend(self, k, v):
        self.k, self.v = (torch.cat(x, dim=2) for x in ((self.k, k), (self.v, v)))
        return self.k, self.v


@pytest.mark.parametrize("causal", [True, False])
def test_attention_against_the_formula(causal):
    torch.manual_seed(0)
    block, x = noisy(ar_model.Block(16, 2, causal)), torch.randn(3, 5, 16)
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
                n = i + 1 if causal else 5  # how many tokens it sees
                keys = ar_model.rotate(k[b, :n, head], rotary[:, :n])
                weights = (keys @ query[0] / 8**0.5).softmax(0)
                mixed[b, i, head] = weights @ v[b, :n, head]
    h = x + mixed @ block.out.weight.T
    normed = rms_norm(h, block.mlp_norm.weight)
    gate, up = (normed @ w.T for w in block.gate_up.weight.chunk(2))
    wanted = h + (gate * torch.sigmoid(gate) * up) @ block.down.weight.T
    message = "not x + attention, then + SwiGLU. Are the rows of qkv q, k, v? Is the "
    message += "gate first in gate_up? Are q, k rotated, and scores divided by 8^0.5?"
    found = block(x, rotary)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4, msg=message)
    if not causal:
        return
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
    x = torch.randn(2, 1 + 3 * 5, 16)
    turned = ar_model.rotate(x, ar_model.rotary_table((3, 5), 16))
    torch.testing.assert_close(turned[:, 0], x[:, 0])  # the class token is not rotated
    pairs, found = (torch.complex(*a[:, 1:].chunk(2, dim=-1)) for a in (x, turned))
    for t in range(15):
        row, column = divmod(t, 5)
        places = torch.tensor([row] * 4 + [column] * 4)
        angles = places * 10_000.0 ** -torch.tensor([0, 1 / 4, 2 / 4, 3 / 4] * 2)
        turn = torch.polar(torch.ones(8), angles)
        torch.testing.assert_close(found[:, t], pairs[:, t] * turn)


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


def test_mean_loss_weighs_every_image_equally_without_gradients(model):
    tokens, y = torch.randint(11, (260, 12)), torch.randint(3, (260,))
    whole, kept = ar_model.next_token_loss(model, tokens, y).item(), gradients_of(model)
    assert ar_model.mean_loss(model, tokens, y) == pytest.approx(whole, rel=1e-5)
    assert not any(kept)


# --------------------------------------------------------------------------- generation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_returns_all_keys_and_values_so_far(dtype):
    k, v = torch.randn(2, 3, 2, 6, 4).to(dtype)  # (B, heads, tokens, head_dim)
    cache = ar_model.Cache(6)
    for begin, end in ((0, 3), (3, 4), (4, 6)):  # several tokens at once, and one
        all_k, all_v = cache.extend(k[:, :, begin:end], v[:, :, begin:end])
        assert all_k.dtype == all_v.dtype == dtype, "not the dtype of the input"
        assert torch.equal(all_k, k[:, :, :end]), "not the keys so far, in order"
        assert torch.equal(all_v, v[:, :, :end]), "not the values so far, in order"


@pytest.mark.parametrize("scale", [1.0, 2.5, 0.5])
def test_generate_equals_generation_without_a_cache(model, scale):
    y, null = torch.tensor([0, 1, 2, 1]), torch.full((4,), 3)
    sampling, kept = Sampling(scale, 0.8, 6, 0.9), gradients_of(model)
    found = generate(model, y, torch.Generator().manual_seed(5), sampling)
    assert found.dtype == torch.int64
    assert not any(kept), "gradients, or inference_mode: autocast casts every time"
    generator, tokens = torch.Generator().manual_seed(5), found[:, :0]
    for _ in range(12):
        classes = (y,) if scale == 1 else (y, null)
        logits = torch.cat([model(tokens, c)[:, -1] for c in classes])
        token = sampling.draw(logits.detach(), generator)
        tokens = torch.cat([tokens, token[:, None]], dim=1)
    assert torch.equal(found, tokens)
    torch.manual_seed(7)  # all randomness comes from generator
    again = generate(model, y, torch.Generator().manual_seed(5), sampling)
    assert torch.equal(again, found)
    other = generate(model, y, torch.Generator().manual_seed(6), sampling)
    assert not torch.equal(other, found)


def test_guidance_formula():
    cond, uncond = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.0])
    table = {1.0: [1.0, -2.0], 0.0: [0.5, 1.0], 3.0: [2.0, -8.0], 0.5: [0.75, -0.5]}
    for scale, wanted in table.items():
        found = ar_model.guide(cond, uncond, scale).tolist()
        assert found == pytest.approx(wanted), f"at scale {scale}"


def test_top_k_keeps_exactly_the_k_largest():
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
        for logits in (torch.randn(shape), torch.ones(shape)):
            kept = filter_logits(logits, top_k=2).isfinite().sum(dim=-1)
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
            assert torch.equal(after[after.isfinite()], before[after.isfinite()])
    assert torch.equal(filter_logits(logits, top_p=1.0), logits)
    kept, wanted = (
        filter_logits(x, top_p=0.8) for x in (logits.view(2, 25, 9), logits)
    )
    assert torch.equal(kept.flatten(0, 1), wanted), "filter each row separately"


@pytest.mark.parametrize(
    ("p", "top_k", "top_p", "count", "why"),
    [
        ([0.4, 0.3, 0.2, 0.1], 2, 0.5, 1, "after top_k the largest has 0.57"),
        ([0.4, 0.3, 0.2, 0.1], 2, 0.9, 2, "top_k must act when top_p is given too"),
        ([0.4, 0.3, 0.2, 0.1], 0, 0.65, 2, "the smallest set with 0.65 or more"),
        ([0.5, 0.5], 0, 0.5, 1, "a sum of exactly 0.5 is enough for 0.5"),
        ([0.25, 0.25, 0.25, 0.25], 0, 0.5, 2, "a sum of exactly 0.5 is enough for 0.5"),
        ([0.1, 0.9], 0, 0.2, 1, "the largest is always kept"),
        ([0.6, 0.3, 0.1], 3, 0.5, 1, "top_p must act when top_k is V"),
        ([0.6, 0.4, 0.0], 0, 0.9, 2, "some logits may be -inf already"),
    ],
)
def test_top_k_and_top_p_together_and_on_the_edge(p, top_k, top_p, count, why):
    logits = torch.tensor(p).log() + 300  # the same softmax, but exp(300) is too large
    kept = filter_logits(logits, top_k, top_p).isfinite()
    assert kept.sum() == count, why
    assert logits[kept].min() >= logits[~kept].max(), why


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 0.25}, [256 / 354, 81 / 354, 16 / 354, 1 / 354]),
        ({"cfg_scale": 2.0}, [16 / 49, 12 / 49, 20 / 49, 1 / 49]),
        # Guided before top-k; temperature before top-p.
        ({"cfg_scale": 2.0, "top_k": 2}, [16 / 36, 0, 20 / 36, 0]),
        ({"temperature": 0.5, "top_p": 0.8}, [0.64, 0.36, 0, 0]),
        ({"top_k": 3, "top_p": 0.75}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_k": 1}, [1, 0, 0, 0]),
    ],
)
def test_labels_are_sampled_from_the_guided_filtered_softmax(settings, wanted):
    cond = torch.tensor([0.4, 0.3, 0.2, 0.1])
    uncond = torch.tensor([0.4, 0.3, 0.08, 0.4])  # cond^2 / uncond: .4, .3, .5, .025
    rows = [cond] * 20_000 + [uncond] * 20_000 * ("cfg_scale" in settings)
    logits = torch.stack(rows).log().unflatten(0, (-1, 2)) - 7  # (B or 2B, 2, V)
    draw = Sampling(**settings).draw
    found = draw(logits, torch.Generator().manual_seed(0))
    assert found.shape == (10_000, 2) and found.dtype == torch.int64
    counts, some = found.flatten().bincount(minlength=4).numpy(), np.array(wanted) > 0
    assert (counts[~some] == 0).all(), counts
    wanted = 20_000 * np.array(wanted)[some]
    assert some.sum() == 1 or chisquare(counts[some], wanted).pvalue > 1e-3, counts
    assert torch.equal(draw(logits, torch.Generator().manual_seed(0)), found)


def test_extreme_random_numbers_do_not_choose_a_filtered_label(monkeypatch):
    logits = torch.tensor([-math.inf, 1.0, -math.inf])
    for u in (0.0, 1.0):
        monkeypatch.setattr(torch, "rand", lambda shape, u=u, **_: torch.full(shape, u))
        assert ar_model.gumbel_max(logits, None) == 1
