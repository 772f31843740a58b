"""Stage 1: a GPT-style model that predicts the coarse labels of an image one by one.

p(c_1 .. c_T | y) = prod_t p(c_t | c_<t, y), cross-entropy over the M coarse labels
(arXiv 2503.16194, figure 1c). The Transformer is LlamaGen's (arXiv 2406.06525):
pre-norm RMSNorm, SwiGLU, 2D rotary positions, no biases, untied embedding and head, the
class embedding as the first token.

    python ar_model.py                  # CTF's stage 1, over M coarse labels: coarse.pt
    python ar_model.py --labels fine    # its baseline, over K fine labels: baseline.pt

Reads tokens.pt and clusters.pt; writes coarse.pt and coarse.png (or baseline.pt and
.png). The first loss is ln V, that of guessing. On two CPU cores: 6 minutes, 1.59 nats
on the test images. The paper's sizes, --layers --dim --heads: 12 768 12 (B), 24 1024 16
(L), 36 1280 20 (XL).

One image all the way: class 0 and 64 coarse labels, 84, 84, 84, 106, ... (of the image
that tokenizer.py and cluster.py follow). In go the class and the first 63, (1 + 63, dim);
out come logits (64, V = 128). Row 27 has seen the class and tokens 0 to 26, and gives the
right answer, cluster 11, a probability of 0.24: 1.44 nats. The loss is the mean over all
rows. Guessing costs ln 128 = 4.85 nats each. (1 nat is 1.44 bits.)
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from cluster import load_clusters, to_coarse
from tokenizer import (
    CommandLine,
    Figure,
    Learner,
    at_least,
    autocast,
    backward_clip_step,
    gradient_scaler,
    load,
    load_tokens,
    load_weights,
    no_traceback,
    pick_device,
    save_figure,
    start_or_resume,
    training_steps,
)

# --------------------------------------------------------------------------------------
# The model


@dataclass
class ARConfig:
    vocabulary: int  # V: M coarse labels, or K fine ones for the baseline
    num_classes: int
    grid: list  # (h, w), T = h * w
    layers: int = 4
    dim: int = 128
    heads: int = 4


def rotary_table(grid, head_dim, base=10_000):
    """Cosines and sines of the 2D rotary positions: float32 (2, T + 1, head_dim / 2).

    Half of the angles grow with the row, half with the column, at falling frequencies.
    Position 0 is the class token, which has no place in the grid: all angles are 0, as
    at the upper left cell.
    """
    h, w = grid
    n = head_dim // 4  # head_dim / 2 pairs, half of them for the row
    frequencies = base ** -(torch.arange(n) / n)  # (head_dim / 4,), from 1 down
    row = torch.arange(h).repeat_interleave(w)  # (T,): 0 0 0 1 1 1
    column = torch.arange(w).repeat(h)  # (T,): 0 1 2 0 1 2
    row_angles = row[:, None] * frequencies  # (T, head_dim / 4)
    column_angles = column[:, None] * frequencies
    angles = torch.cat([row_angles, column_angles], dim=1)  # (T, head_dim / 2)
    angles = F.pad(angles, (0, 0, 1, 0))  # and zeros before: (T + 1, head_dim / 2)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x, rotary):
    """Turn the pairs (x[i], x[i + head_dim / 2]) of x (..., n, head_dim) by the angles
    of their position, rotary (2, n, head_dim / 2).

    The product of a query and a key then depends on the difference of their angles, and
    so on how far apart they are, not on where (RoFormer, Su et al. 2021).
    """
    cos, sin = rotary.type_as(x)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Cache:
    """The keys and values of all tokens so far, in one block.

    With them a new token costs one step; without, a pass over all tokens before it.
    """

    def __init__(self, capacity):
        self.capacity = capacity  # tokens
        self.length = 0  # tokens so far
        self.kv = None

    def extend(self, k, v):
        """Append k, v (B, heads, n, head_dim); returns the keys and values of all, each
        (B, heads, all so far, head_dim).

        n may be more than one. The results have the dtype of k and v, which is bfloat16
        under autocast. No more than capacity tokens will come.
        """
        if self.kv is None:  # all the room at once: growing would copy it every time
            B, heads, _, head_dim = k.shape
            self.kv = k.new_empty(2, B, heads, self.capacity, head_dim)
        begin = self.length
        self.length += k.shape[2]
        self.kv[:, :, :, begin : self.length] = torch.stack([k, v])
        return self.kv[:, :, :, : self.length].unbind(0)


class Block(nn.Module):
    """A Transformer layer. causal: tokens see themselves and earlier ones, else all."""

    def __init__(self, dim, heads, causal):
        super().__init__()
        self.heads = heads
        self.causal = causal
        # 8/3 dim, so that three matrices have as many weights as the two of a plain
        # network of 4 dim; rounded up to LlamaGen's 256, or to 64 in a small model.
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

        Rows of self.qkv: queries, keys, values, and of each of these head by head; of
        self.gate_up: first the gate, then up. Keys are rotated before they are cached.
        With a cache, x is what follows the tokens in it: one token at a time, or several
        into an empty cache.
        """
        B, n, dim = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(B, n, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, n, head_dim)
        q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            k, v = cache.extend(k, v)  # (B, heads, all so far, head_dim)
        # A single query may see every key there is: its own and those before it.
        causal = self.causal and n > 1
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(B, n, dim))
        # SwiGLU: one half says how much of the other half passes.
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class ARModel(nn.Module):
    """p(token t | class, tokens before t) for all t of a sequence at once."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        dim = config.dim
        # The last class is the null class, for guidance.
        self.class_embedding = nn.Embedding(config.num_classes + 1, dim)
        self.token_embedding = nn.Embedding(config.vocabulary, dim)
        blocks = [Block(dim, config.heads, causal=True) for _ in range(config.layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.head = nn.Linear(dim, config.vocabulary, bias=False)
        rotary = rotary_table(config.grid, dim // config.heads)
        self.register_buffer("rotary", rotary, persistent=False)
        init_weights(self)

    def forward(self, tokens, y):
        """The first n < T tokens (B, n) and the classes y (B,), int64 -> float32 logits
        (B, n + 1, V). logits[:, t] predict token t from the class and tokens[:, :t]: the
        class token comes first, so n tokens in give n + 1 predictions."""
        class_token = self.class_embedding(y)[:, None]  # (B, 1, dim)
        x = torch.cat([class_token, self.token_embedding(tokens)], dim=1)
        return self.transformer(x)

    def transformer(self, x, begin=0, caches=None):
        """Embeddings (B, n, dim) of n positions from begin on -> logits (B, n, V).

        Position 0 is the class, t + 1 is token t; the last token is never an input.
        """
        rotary = self.rotary[:, begin : begin + x.shape[1]]
        for i, block in enumerate(self.blocks):
            x = block(x, rotary, None if caches is None else caches[i])
        return self.head(self.norm(x)).float()


def init_weights(model):
    """Normal, deviation 0.02, and a head of zeros: the first loss is exactly ln V."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
    nn.init.zeros_(model.head.weight)


def next_token_loss(model, tokens, y):
    """Mean cross-entropy in nats of all tokens int64 (B, T), each given those before it
    and the classes y (B,): a 0-d tensor, with its gradient. The first token counts like
    any other."""
    logits = model(tokens[:, :-1], y)  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


# --------------------------------------------------------------------------------------
# Generation


def guide(cond, uncond, scale):
    """Classifier-free guidance (Ho and Salimans 2022) on logits of any shape.

    The model knows the logits without a class too, as it was trained with a null class
    now and then (drop_classes). The difference is what the class changes; scale 1 is
    off, 0 forgets the class, above 1 exaggerates it.
    """
    return uncond + scale * (cond - uncond)


def filter_logits(logits, top_k=0, top_p=1.0):
    """-inf for all logits (..., V) but the top_k largest (0: off), and of these for all
    but the fewest largest that have the probability top_p together (1: off).

    top_p is measured by the softmax of what top_k has left, and is reached by exactly
    that much. The largest always stays; of equal ones at an edge any may, but top_p
    keeps no more than it needs. A top_k of V or more keeps all. Some logits may be -inf
    already; all stay as they are in the caller's tensor.
    """
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if top_p < 1:
        probability, index = logits.softmax(dim=-1).sort(descending=True)
        # Of all larger ones together: 0 for the largest, which is always kept.
        before = probability.cumsum(dim=-1) - probability
        drop_sorted = before >= top_p
        # Back from the sorted order: position index[i] gets what stands at i.
        drop = torch.empty_like(drop_sorted).scatter_(-1, index, drop_sorted)
        logits = logits.masked_fill(drop, -math.inf)
    return logits


def draw(logits, generator):
    """An index int64 (...,) for each row of logits (..., V), from softmax(logits)."""
    # The Gumbel-max trick: if -ln(-ln u), u uniform, is added to each logit, each index
    # is the largest with its softmax probability. 5 times as fast as torch.multinomial at
    # V = 4096.
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device)
    uniform = uniform.clamp(1e-20, 1 - 1e-7)  # neither log may be of 0
    return (logits - (-uniform.log()).log()).argmax(dim=-1)


@torch.inference_mode()
def generate(model, y, generator, cfg_scale=1.0, temperature=1.0, top_k=0, top_p=1.0):
    """Draw T tokens one after the other: classes y (B,) -> tokens int64 (B, T).

    With guidance, the same tokens run with the class and with the null class, as a
    batch of 2B. The order of what is done to the logits: guide, temperature, top-k,
    top-p.
    """
    guided = cfg_scale != 1
    T = math.prod(model.config.grid)
    if guided:
        null = torch.full_like(y, model.config.num_classes)
        y = torch.cat([y, null])
    caches = [Cache(T) for _ in model.blocks]
    # x is the input at position t: the class for t = 0, else token t - 1.
    x = model.class_embedding(y)[:, None]  # (B or 2B, 1, dim)
    tokens = []
    for t in range(T):
        logits = model.transformer(x, t, caches)[:, 0]  # (B or 2B, V)
        if guided:
            cond, uncond = logits.chunk(2)
            logits = guide(cond, uncond, cfg_scale)
        token = draw(filter_logits(logits / temperature, top_k, top_p), generator)
        tokens.append(token)  # (B,)
        x = model.token_embedding(token.repeat(2) if guided else token)[:, None]
    return torch.stack(tokens, dim=1)


# --------------------------------------------------------------------------------------
# Training


def train(learner, train_set, test_set, args, checkpoint, path):
    """Train learner.model on the tokens of train_set; measure it on test_set.

    All around a step (learning rate, measuring, saving, Ctrl-C) is in training_steps.
    """
    model = learner.model
    V = model.config.vocabulary

    def measure():
        """What is printed and plotted of every --save-every steps."""
        nats = mean_loss(model, *test_set.first(1000))
        return {"loss": nats, "bits": nats / math.log(2)}

    steps = training_steps(args, path, learner, checkpoint, measure)
    for step, rng in steps:
        tokens, y = train_set.batch(rng, args.batch_size)
        y = drop_classes(y, model.config.num_classes, rng)
        with autocast(y.device):
            loss = next_token_loss(model, tokens, y)
        backward_clip_step(loss, *learner)
        checkpoint["history"]["loss"].append(loss.item())
        if step == 0:
            guess = f"guessing is ln {V} = {math.log(V):.3f}"
            tqdm.write(f"first loss {loss:.3f}; {guess}")


def drop_classes(y, num_classes, rng):
    """A tenth of the classes y (B,) becomes the null class, for guidance, which needs
    the probabilities of the tokens without a class as well."""
    dropped = torch.from_numpy(rng.random(len(y)) < 0.1).to(y.device)
    return y.masked_fill(dropped, num_classes)


def adamw(model):
    """AdamW as LlamaGen sets it; the gains of the norms do not decay. The learning rate
    is set before every step, by training_steps."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}]
    groups += [{"params": gains, "weight_decay": 0.0}]
    fused = gains[0].device.type != "mps"
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=fused)


@torch.no_grad()
def mean_loss(model, tokens, y):
    """next_token_loss over all of tokens (N, T) and y (N,), a float."""
    total, size = 0.0, at_once(64, tokens)
    for part, part_y in zip(tokens.split(size), y.split(size)):
        with autocast(part.device):
            loss = next_token_loss(model, part, part_y)
        total += loss.item() * len(part)
    return total / len(tokens)


def at_once(count, tokens):
    """How many rows of tokens (N, T) to measure at once: count if T is 64, of longer
    ones fewer, so that they take no more memory."""
    return max(1, count * 64 // max(64, tokens.shape[1]))


# --------------------------------------------------------------------------------------
# The script


def parse_args(parser, defaults, argv):
    """The flags in argv, with those that set the size of a Transformer; defaults:
    ARConfig or AuxConfig."""
    add = parser.add_argument
    add("--layers", type=at_least(1), default=defaults.layers, help="of the model")
    add("--dim", type=at_least(1), default=defaults.dim, help="multiple of 4 x heads")
    add("--heads", type=at_least(1), default=defaults.heads, help="attention heads")
    args = parser.parse_args(argv)
    if args.dim % (4 * args.heads):  # pairs of dimensions, for the row and the column
        parser.error(f"--dim must be a multiple of 4 x --heads: {4 * args.heads}")
    return args


@no_traceback()
def main(argv=None):
    parser = CommandLine(__doc__)
    what = "fine: the baseline"
    parser.add_argument(
        "--labels", choices=["coarse", "fine"], default="coarse", help=what
    )
    parser.add_training_flags(steps=3000, batch_size=32, lr=1e-3)
    args = parse_args(parser, ARConfig, argv)
    device = pick_device(args.device)

    train_set, artifact = load_tokens(args.out, "train")  # fine labels (N, T)
    test_set, _ = load_tokens(args.out, "test")
    ids = {"codebook_id": artifact["codebook_id"], "cluster_id": None}
    if args.labels == "coarse":
        clusters = load_clusters(args.out, artifact["codebook_id"])
        g = clusters["code_to_cluster"]  # (K,)
        train_set, test_set = to_coarse(train_set, g), to_coarse(test_set, g)
        ids["cluster_id"] = clusters["cluster_id"]
        V = len(clusters["centroids"])  # M
        script, path = "ar_model.py", args.out / "coarse.pt"
    else:
        V = artifact["codebook_size"]  # K
        script, path = "ar_model.py --labels fine", args.out / "baseline.pt"
    train_set, test_set = train_set.to(device), test_set.to(device)

    torch.manual_seed(args.seed)
    num_classes, grid = len(artifact["classes"]), list(artifact["grid"])
    config = ARConfig(V, num_classes, grid, args.layers, args.dim, args.heads)
    model = ARModel(config).to(device)
    learner = Learner(model, adamw(model), gradient_scaler(device))
    checkpoint = start_or_resume(args, path, learner, script, **ids)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{size:.2f}M parameters over {V} {args.labels} labels, on {device}")

    if args.compile:
        model.compile()
    train(learner, train_set, test_set, args, checkpoint, path)
    title = f"{path.name}: the next of {V} {args.labels} labels"
    plot_curves(path.with_suffix(".png"), title, checkpoint["history"], math.log(V))
    print(f"wrote {path.name} and {path.stem}.png to {args.out}")
    print(f"{checkpoint['seconds']:.0f} s of training")


def load_ar(path, device, **ids):
    """(ARModel in eval mode on device, the artifact) from path; ids as for load."""
    is_baseline = path.name.startswith("baseline")
    script = "ar_model.py --labels fine" if is_baseline else "ar_model.py"
    artifact = load(path, script, **ids)
    model = ARModel(ARConfig(**artifact["config"]))
    load_weights(model, artifact, path)
    return model.eval().to(device), artifact


def plot_curves(path, title, history, guess):
    """Training and test loss in nats over steps, beside that of guessing."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    ax = figure.subplots()
    losses, measured = history["loss"], history["test"]
    steps = range(1, len(losses) + 1)
    ax.plot(steps, losses, color="tab:blue", alpha=0.4, label="training, each step")
    steps = [row["step"] for row in measured]
    losses = [row["loss"] for row in measured]
    ax.plot(steps, losses, color="tab:orange", marker=".", label="test images")
    ax.axhline(guess, color="grey", linestyle=":", label=f"guessing: {guess:.2f}")
    ax.set(title=title, xlabel="step", ylabel="cross-entropy, nats per token")
    ax.legend()
    save_figure(path, figure)


if __name__ == "__main__":
    main()
