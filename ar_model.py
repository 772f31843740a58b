"""Stage 1: a GPT-style model that predicts the coarse labels of an image one by one.

p(c_1 .. c_T | y) = prod_t p(c_t | c_<t, y), trained by cross-entropy over the M coarse
labels (arXiv 2503.16194, figure 1c). The Transformer is LlamaGen's (arXiv 2406.06525).
It differs from that of "Attention is all you need" in this:
- pre-norm: a layer adds attention(norm(x)) to x, and then mlp(norm(x)).
- RMSNorm: x / sqrt(mean(x^2)) times a learnt gain. No mean is subtracted.
- SwiGLU in place of ReLU: down(silu(gate(x)) * up(x)) with three matrices, and
  silu(a) = a sigmoid(a).
- 2D rotary positions: nothing is added to the embeddings. Queries and keys are rotated
  (rotary_table).
- no biases; the embedding and the head do not share their weights; the sequence begins
  with the class. (LlamaGen has dropout 0.1, and sets the class's queries and keys to
  zero. This Transformer does neither.)

    python ar_model.py                  # CTF's stage 1, over M coarse labels: coarse.pt
    python ar_model.py --labels fine    # the baseline, over K fine labels: baseline.pt

Reads tokens.pt and (stage 1) clusters.pt; writes coarse.pt and coarse.png (or
baseline.pt and baseline.png). The first loss is ln V, the loss of a uniform guess. On
two CPU cores: 9 minutes (baseline: 15), 1.67 nats per token on 1,000 test images. The
paper's sizes, as --layers --dim --heads: 12 768 12 (B), 24 1024 16 (L), 36 1280 20
(XL).

The example image of tokenizer.py: class 0 and 64 coarse labels, 8, 8, 8, 53, ...
The input is the class and the first 63 labels, (1 + 63, dim). The output is logits (64,
128): T = 64, V = 128. Row 27 has seen the class and tokens 0 to 26. It gives the right
answer, cluster 38, a probability of 0.103, which costs -ln 0.103 = 2.27 nats. The loss
is the mean over all rows. A uniform guess costs ln 128 = 4.85 nats per token. (Bits are
nats divided by ln 2.)
"""

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

# isort: off
from tokenizer import adamw, autocast, earlier_run, record, save_checkpoint, start
from tokenizer import update, Examples, load, picture
from tokenizer import add_training_flags, command_line, number, pick_device, run

# ---------------------------------------------------------------------------- The model


@dataclass
class ARConfig:
    vocabulary: int  # V: M coarse labels, or K fine ones for the baseline
    num_classes: int
    grid: list  # (h, w), T = h * w
    layers: int = 4
    dim: int = 128
    heads: int = 4


def rotate(x, rotary):
    """Rotate the pairs (x[i], x[i + head_dim / 2]) of x (..., n, head_dim) by the
    angles of their position; rotary is (2, n, head_dim / 2), cosines and sines.

    The dot product of a rotated query and a rotated key depends on their positions only
    through the difference (RoFormer, Su et al. 2021).
    """
    cos, sin = rotary
    a, b = x.chunk(2, dim=-1)
    # cos and sin are float32: bfloat16 is too coarse for them.
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


def rotary_table(grid, head_dim, base=10_000):
    """Cosines and sines of the 2D rotary positions: float32 (2, T + 1, head_dim / 2).

    Half of the angles are proportional to the row, half to the column, at decreasing
    frequencies. In a 2x3 grid, token 5 is in row 1, column 2. With head_dim = 8 the
    frequencies are 1 and 0.01, so its angles are 1, 0.01 (row), 2, 0.02 (column).
    Rotated by 2, the pair (1, 0) becomes (cos 2, sin 2) = (-0.42, 0.91).

    Position 0 is the class token, position t + 1 is token t. The class is not in the
    grid: its angles are 0, like those of the token in row 0, column 0. Stage 1 never
    gets to position T, the last token: nothing is predicted after it. Stage 2 does.
    """
    h, w = grid
    quarter = head_dim // 4  # head_dim / 2 pairs, half of them for the row
    frequencies = base ** -(torch.arange(quarter) / quarter)  # 1 and below
    row = torch.arange(h).repeat_interleave(w)  # (T,): for a 2x3 grid 0 0 0 1 1 1
    column = torch.arange(w).repeat(h)  # (T,): 0 1 2 0 1 2
    row_angles = row[:, None] * frequencies  # (T, head_dim / 4)
    column_angles = column[:, None] * frequencies
    angles = torch.cat([row_angles, column_angles], dim=1)  # (T, head_dim / 2)
    angles = F.pad(angles, (0, 0, 1, 0))  # zeros in front: (T + 1, head_dim / 2)
    return torch.stack([angles.cos(), angles.sin()])


class Cache:
    """The keys and values of all tokens so far, in one layer.

    With a cache, a new token costs a pass over a single position. Without, it costs a
    pass over all positions so far.
    """

    def __init__(self, capacity):
        self.capacity = capacity  # positions
        self.length = 0  # positions so far
        self.kv = None

    def extend(self, k, v):
        """Append k and v (B, heads, n, head_dim); return the keys and values of all
        tokens so far, each (B, heads, tokens so far, head_dim).

        generate appends one token at a time (n = 1), the tests several. The results
        have the dtype of k and v, which is bfloat16 under autocast. No more than
        capacity tokens may be appended in total.
        """
        if self.kv is None:  # allocated once: torch.cat would copy it for every token
            B, heads, _, head_dim = k.shape
            self.kv = k.new_empty(2, B, heads, self.capacity, head_dim)
        begin = self.length
        self.length += k.shape[2]
        self.kv[:, :, :, begin : self.length] = torch.stack([k, v])
        return self.kv[:, :, :, : self.length].unbind(0)


class Block(nn.Module):
    """A Transformer layer. If causal, a token attends to itself and to earlier tokens,
    else to all tokens."""

    def __init__(self, dim, heads, causal):
        super().__init__()
        self.heads = heads
        self.causal = causal
        # SwiGLU has three matrices. With 8/3 dim they have as many weights as the two
        # of a plain MLP with 4 dim. Rounded up to a multiple of 256 (LlamaGen), or of
        # 64 in a small model.
        multiple = 256 if dim >= 512 else 64
        hidden = math.ceil(8 * dim / 3 / multiple) * multiple
        self.attention_norm = nn.RMSNorm(dim, eps=1e-5)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.mlp_norm = nn.RMSNorm(dim, eps=1e-5)
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x, rotary, cache=None):
        """x (B, n, dim), rotary of its positions (2, n, head_dim / 2) -> (B, n, dim).

        self.qkv gives the queries of all heads, then their keys, then their values;
        self.gate_up gives the gate, then up. Keys are rotated before they are cached.
        With a cache, x is the next token (generate), or several if the cache is empty
        (the tests): is_causal aligns the first query with the first key.
        """
        B, n, dim = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(B, n, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, n, head_dim)
        q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            k, v = cache.extend(k, v)  # (B, heads, tokens so far, head_dim)
        # A single query attends to every key: its own and those before it.
        causal = self.causal and n > 1
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(B, n, dim))
        # SwiGLU: silu(gate) scales every feature of up.
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Transformer(nn.Module):
    """The networks of stage 1 and stage 2: embeddings, layers and head. inputs and
    outputs are the sizes of the vocabularies of its inputs and of its predictions."""

    def __init__(self, config, inputs, outputs, causal):
        super().__init__()
        self.config = config
        dim = config.dim
        # One more, with index num_classes: the null class, "no class" (see guide).
        self.class_embedding = nn.Embedding(config.num_classes + 1, dim)
        self.token_embedding = nn.Embedding(inputs, dim)
        blocks = [Block(dim, config.heads, causal) for _ in range(config.layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.head = nn.Linear(dim, outputs, bias=False)
        rotary = rotary_table(config.grid, dim // config.heads)
        self.register_buffer("rotary", rotary, persistent=False)
        # Normal with standard deviation 0.02, and zeros in the head: the first loss is
        # exactly that of a uniform guess.
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.weight)

    def embed(self, tokens, y):
        """Tokens (B, n) and classes y (B,) -> (B, 1 + n, dim): the class token comes
        first."""
        class_token = self.class_embedding(y)[:, None]  # (B, 1, dim)
        return torch.cat([class_token, self.token_embedding(tokens)], dim=1)


class ARModel(Transformer):
    """p(token t | class, tokens before t) for all t of a sequence at once."""

    def __init__(self, config):
        super().__init__(config, config.vocabulary, config.vocabulary, causal=True)

    def forward(self, tokens, y):
        """The first n < T tokens (B, n) and the classes y (B,), int64 -> float32 logits
        (B, n + 1, V).

        logits[:, t] predict token t from the class and tokens[:, :t]. The class token
        comes first, so n tokens give n + 1 predictions.
        """
        return self.logits(self.embed(tokens, y))

    def logits(self, x, begin=0, caches=None):
        """Embeddings (B, n, dim) of n positions, starting at begin -> logits (B, n, V).

        Position 0 is the class, position t + 1 is token t. caches: one per layer.
        """
        rotary = self.rotary[:, begin : begin + x.shape[1]]
        for i, block in enumerate(self.blocks):
            x = block(x, rotary, None if caches is None else caches[i])
        return self.head(self.norm(x)).float()


def next_token_loss(model, tokens, y):
    """Mean cross-entropy in nats over all tokens int64 (B, T), each given the tokens
    before it and the classes y (B,): a 0-d tensor with a gradient. Token 0 is predicted
    from the class alone."""
    logits = model(tokens[:, :-1], y)  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


# --------------------------------------------------------------------------- Generation


def guide(cond, uncond, scale):
    """Classifier-free guidance (CFG, Ho and Salimans 2022) on logits of any shape.

    The model can predict logits without a class (uncond), since in training each image
    loses its class with probability 0.1 (drop_classes). A scale of 1 is off, 0 ignores
    the class, and more than 1 exaggerates it.
    """
    return uncond + scale * (cond - uncond)


@dataclass(frozen=True)
class Sampling:
    """How labels are sampled from logits. The order: guide, divide by the temperature,
    top-k, top-p."""

    cfg_scale: float = 1.0  # 1 is off
    temperature: float = 1.0  # above 0
    top_k: int = 0  # 1 is the argmax, 0 is off
    top_p: float = 1.0  # above 0; 1 is off

    def draw(self, logits, generator):
        """Logits (B, ..., V) -> indices int64 (B, ...). With guidance, logits are those
        with the class and then those without: (2B, ..., V)."""
        if self.cfg_scale != 1:
            cond, uncond = logits.chunk(2)
            logits = guide(cond, uncond, self.cfg_scale)
        logits = filter_logits(logits / self.temperature, self.top_k, self.top_p)
        return gumbel_max(logits, generator)


def filter_logits(logits, top_k=0, top_p=1.0):
    """Top-k and nucleus (top-p) filtering of logits (..., V): what is not kept becomes
    -inf. The caller's tensor is not modified; some logits may be -inf already.

    - top_k keeps the k largest logits, exactly k if some are equal. 0, or V and more,
      is off.
    - top_p, above 0, then keeps the smallest set of largest logits whose probabilities
      sum to top_p or more. 1 is off.
    - These probabilities are the softmax of what top_k has kept.
    - The largest logit is always kept.
    """
    if 0 < top_k < logits.shape[-1]:
        kept = logits.topk(top_k)
        nothing = torch.full_like(logits, -math.inf)
        logits = nothing.scatter(-1, kept.indices, kept.values)
    if top_p < 1:
        probability, index = logits.softmax(dim=-1).sort(descending=True)
        # The probability of all larger logits: 0 for the largest, always kept.
        before = probability.cumsum(dim=-1) - probability
        drop_sorted = before >= top_p
        # Undo the sorting: entry index[i] gets the value at i.
        drop = torch.empty_like(drop_sorted).scatter_(-1, index, drop_sorted)
        logits = logits.masked_fill(drop, -math.inf)
    return logits


def gumbel_max(logits, generator):
    """Sample indices int64 (...,) from softmax(logits), logits (..., V).

    The Gumbel-max trick: add independent Gumbel noise, -ln(-ln u) with u uniform in
    0..1, to every logit. Then the argmax is index i with probability
    softmax(logits)[i]. It is faster than torch.multinomial.
    """
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device)
    uniform = uniform.clamp(1e-20, 1 - 1e-7)  # at 0 and 1 the noise is infinite
    return (logits - (-uniform.log()).log()).argmax(dim=-1)


def with_null(y, model):
    """Classes (B,) -> (2B,): the classes, and then as many null classes (CFG)."""
    return torch.cat([y, torch.full_like(y, model.config.num_classes)])


# Not inference_mode: in it, autocast does not keep its bfloat16 copies of the weights,
# and would make them again for every token.
@torch.no_grad()
def generate(model, y, generator, sampling):
    """Sample T tokens one by one: classes y (B,) -> tokens int64 (B, T).

    With guidance, the model runs on a batch of 2B: the same tokens with the class and
    with the null class. generator is torch's, on the device of y. sampling: a Sampling.
    """
    guided = sampling.cfg_scale != 1
    T = math.prod(model.config.grid)
    caches = [Cache(T) for _ in model.blocks]  # T inputs: class, tokens 0 .. T - 2
    # x is the input at position t: the class for t = 0, else token t - 1.
    x = model.class_embedding(with_null(y, model) if guided else y)[:, None]
    tokens = []
    for t in range(T):  # x is (B or 2B, 1, dim)
        logits = model.logits(x, t, caches)[:, 0]  # (B or 2B, V)
        token = sampling.draw(logits, generator)
        tokens.append(token)  # (B,)
        x = model.token_embedding(token.repeat(2) if guided else token)[:, None]
    return torch.stack(tokens, dim=1)


# ----------------------------------------------------------------------------- Training


def drop_classes(y, num_classes, rng):
    """Replace each of the classes y (B,) with probability 0.1 by the null class,
    num_classes."""
    dropped = torch.from_numpy(rng.random(len(y)) < 0.1).to(y.device)
    return y.masked_fill(dropped, num_classes)


@torch.no_grad()
def mean_loss(model, tokens, y):
    """next_token_loss over all of tokens (N, T) and y (N,), a float."""
    total = 0.0
    for part, part_y in zip(tokens.split(64), y.split(64)):
        with autocast(part.device):
            loss = next_token_loss(model, part, part_y)
        total += loss.item() * len(part)
    return total / len(tokens)


def parse_with_model(parser, default, argv):
    """The flags in argv, with those that stages 1 and 2 share; default: the config
    class."""
    add = parser.add_argument
    add("--layers", type=number(int, 1), default=default.layers, help="layers")
    add("--dim", type=number(int, 1), default=default.dim, help="width")
    add("--heads", type=number(int, 1), default=default.heads, help="attention heads")
    what = "copies to keep along the way, in kept-*/"
    add("--keep", type=number(int, 0, 99), default=0, help=what)
    args = parser.parse_args(argv)
    if args.dim % (4 * args.heads):  # rotary pairs, for the row and for the column
        parser.error(f"--dim must be a multiple of 4 x --heads, {4 * args.heads}")
    return args


def main(argv=None):
    parser = command_line(__doc__)
    what = "coarse: stage 1; fine: the baseline"
    labels = ["coarse", "fine"]
    parser.add_argument("--labels", choices=labels, default="coarse", help=what)
    add_training_flags(parser, steps=3000, batch_size=32, lr=1e-3)
    args = parse_with_model(parser, ARConfig, argv)
    device = pick_device(args.device)
    is_stage1 = args.labels == "coarse"
    path = args.out / ("coarse.pt" if is_stage1 else "baseline.pt")
    earlier = earlier_run(path, args)

    artifact = load(args.out, "tokens.pt")
    train_set, test_set = artifact["train"], artifact["test"]
    ids, V = {"codebook_id": artifact["codebook_id"]}, artifact["codebook_size"]  # K
    if is_stage1:
        clusters = load(args.out, "clusters.pt", **ids)
        ids["cluster_id"] = clusters["cluster_id"]
        g, V = clusters["code_to_cluster"], len(clusters["centroids"])  # (K,), M
        train_set = Examples(g[train_set.x], train_set.y)
        test_set = Examples(g[test_set.x], test_set.y)
    train_set, test_set = train_set.to(device), test_set.to(device)

    torch.manual_seed(args.seed)
    num_classes, grid = len(artifact["class_names"]), list(artifact["grid"])
    config = ARConfig(V, num_classes, grid, args.layers, args.dim, args.heads)
    model = ARModel(config).to(device)
    optimizer = adamw(model)
    checkpoint = start(earlier, model, optimizer, args, **ids)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{size:.2f}M parameters, {V} {args.labels} labels, on {device}")
    print(f"a uniform guess has a loss of ln {V} = {math.log(V):.3f} nats")

    first = checkpoint["step"]
    bar = tqdm(range(first, args.steps), path.stem, args.steps, initial=first)
    for step in bar:
        began = time.perf_counter()
        rng = np.random.default_rng((args.seed, step))  # see tokenizer.py
        tokens, y = train_set.batch(rng, args.batch_size)
        y = drop_classes(y, num_classes, rng)
        with autocast(device):
            loss = next_token_loss(model, tokens, y)
        norm = update(model, optimizer, loss, step, args)
        if record(checkpoint, loss, norm, began, bar, args):
            nats = mean_loss(model, test_set.x[:1000], test_set.y[:1000])
            scores = {"loss": nats, "bits": nats / math.log(2)}
            save_checkpoint(path, model, optimizer, checkpoint, args, scores)

    title = f"{path.name}: predicting the next of {V} {args.labels} labels"
    plot_curves(path.with_suffix(".png"), title, checkpoint["history"], math.log(V))
    print(f"wrote {path.name} and {path.stem}.png to {args.out}")


def plot_curves(path, title, history, guess):
    """Training and test loss in nats over steps, and the loss of a uniform guess."""
    losses, rows = history["loss"], history["test"]
    with picture(path, 7, 4) as figure:
        ax = figure.subplots()
        steps = range(1, len(losses) + 1)
        ax.plot(steps, losses, color="tab:blue", alpha=0.4, label="training batches")
        steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
        ax.plot(steps, losses, color="tab:orange", marker=".", label="test images")
        ax.axhline(guess, color="grey", ls=":", label=f"uniform guess: {guess:.2f}")
        ax.set(title=title, xlabel="step", ylabel="cross-entropy, nats per token")
        ax.legend()


if __name__ == "__main__":
    run(main, trains=True)
