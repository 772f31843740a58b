"""Stage 2: a GPT-style model that predicts the coarse labels of an image one by one.

p(c_1 .. c_T | y) = prod_t p(c_t | c_<t, y) with cross-entropy over the M coarse labels (arXiv 2503.16194, section 3.2).
The Transformer is LlamaGen's (arXiv 2406.06525): pre-norm RMSNorm, SwiGLU, 2D rotary positions, no biases, untied
embedding and head, and the class embedding as the first token.

    python ar_model.py                   # CTF's first model, over M coarse labels: coarse.pt
    python ar_model.py --labels fine     # what CTF is compared with, the same model over K fine labels: baseline.pt

Reads tokens.pt and clusters.pt; writes coarse.pt and coarse.png (or baseline.pt and baseline.png). The first loss is
ln V, that of guessing. The paper's models: --layers 12 --dim 768 --heads 12 (B), 24 1024 16 (L), 36 1280 20 (XL).
"""

import math
import sys
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

from tokenizer import (
    CommandLine,
    autocast,
    fail,
    interruptible,
    learning_rate,
    load,
    number,
    pick_device,
    resume,
    save,
    save_figure,
)

# ---------------------------------------------------------------------------------------------------------------------
# The model


def rotary_table(grid, head_dim, base=10_000):
    """Angles of the 2D rotary positions: cosines and sines, float32 (2, T + 1, head_dim / 2).

    The first half of the angles grows with the row, the second half with the column, at falling frequencies. Position 0
    is the class token, which has no place in the grid: angle 0, no rotation.
    """
    h, w = grid
    frequencies = base ** -(torch.arange(0, 1, 4 / head_dim))  # (head_dim / 4,)
    rows = (
        torch.arange(h).repeat_interleave(w)[:, None] * frequencies
    )  # (T, head_dim / 4)
    columns = torch.arange(w).repeat(h)[:, None] * frequencies
    angles = F.pad(
        torch.cat([rows, columns], dim=1), (0, 0, 1, 0)
    )  # (T + 1, head_dim / 2)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x, rotary):
    """Turn each pair (x[i], x[i + head_dim / 2]) of x (..., n, head_dim) by the angles of its position, (2, n, head_dim / 2).

    The product of a query and a key then depends only on how far apart they are (Su et al. 2021, RoFormer).
    """
    cos, sin = rotary.type_as(x)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Cache:
    """The keys and values that one block has computed so far, so that a new token costs one step and not a whole pass."""

    def __init__(self, tokens):
        self.tokens, self.filled, self.kv = tokens, 0, None

    def extend(self, k, v):
        """Append k and v (B, heads, n, head_dim); returns all keys and all values so far."""
        if (
            self.kv is None
        ):  # the whole room at once: growing step by step would copy everything at every step
            self.kv = k.new_empty(2, *k.shape[:2], self.tokens, k.shape[-1])
        start, self.filled = self.filled, self.filled + k.shape[2]
        self.kv[0, :, :, start : self.filled] = k
        self.kv[1, :, :, start : self.filled] = v
        return self.kv[:, :, :, : self.filled].unbind(0)


class Block(nn.Module):
    """One Transformer layer. causal: a token sees itself and earlier tokens only; else it sees all (stage 3)."""

    def __init__(self, dim, heads, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        multiple = 256 if dim >= 512 else 64
        hidden = math.ceil(8 * dim / 3 / multiple) * multiple
        self.attention_norm = nn.RMSNorm(dim, eps=1e-5)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.mlp_norm = nn.RMSNorm(dim, eps=1e-5)
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x, rotary, cache=None):
        """x (B, n, dim), rotary of the n positions (2, n, head_dim / 2) -> (B, n, dim)."""
        B, n, dim = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(
            B, n, 3, self.heads, dim // self.heads
        )
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, heads, n, head_dim)
        (q, k), v = rotate(qkv[:2], rotary), qkv[2]
        if cache is not None:
            k, v = cache.extend(k, v)
        # A single new query may see every key in the cache: those are all earlier tokens, and itself.
        mask_future = self.causal and n > 1
        attended = F.scaled_dot_product_attention(
            q, k, v, is_causal=mask_future
        )  # (B, heads, n, head_dim)
        x = x + self.out(attended.transpose(1, 2).reshape(B, n, dim))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)  # SwiGLU


@dataclass
class ARConfig:
    vocabulary: int  # V: M coarse labels, or K fine ones for the baseline
    num_classes: int
    grid: list  # (h, w), T = h * w
    layers: int = 4
    dim: int = 128
    heads: int = 4


def init_weights(model):
    """Normal with deviation 0.02, and a head of zeros (as LlamaGen): the first predictions are uniform, the loss ln V."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
    nn.init.zeros_(model.head.weight)


class ARModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.class_embedding = nn.Embedding(
            config.num_classes + 1, config.dim
        )  # the last is the null class, for CFG
        self.token_embedding = nn.Embedding(config.vocabulary, config.dim)
        self.blocks = nn.ModuleList(
            Block(config.dim, config.heads, causal=True) for _ in range(config.layers)
        )
        self.norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.head = nn.Linear(config.dim, config.vocabulary, bias=False)
        self.register_buffer(
            "rotary",
            rotary_table(config.grid, config.dim // config.heads),
            persistent=False,
        )
        init_weights(self)

    def transformer(self, x, start=0, caches=None):
        """Embeddings (B, n, dim) of the positions start .. start + n -> float32 logits (B, n, V)."""
        rotary = self.rotary[:, start : start + x.shape[1]]
        for i, block in enumerate(self.blocks):
            x = block(x, rotary, caches and caches[i])
        return self.head(self.norm(x)).float()

    def forward(self, labels, tokens):
        """Class labels int64 (B,) and the first n tokens int64 (B, n), 0 <= n < T -> logits float32 (B, n + 1, V).

        logits[:, t] predict token t, and depend on the class and on tokens[:, :t] only.
        """
        x = torch.cat(
            [self.class_embedding(labels)[:, None], self.token_embedding(tokens)], dim=1
        )  # (B, n + 1, dim)
        return self.transformer(x)


def load_ar(path, device, **ids):
    """(ARModel in eval mode on device, the artifact) from coarse.pt or baseline.pt; ids as in tokenizer.load."""
    artifact = load(
        path,
        "ar_model.py --labels fine"
        if path.name.startswith("baseline")
        else "ar_model.py",
        **ids,
    )
    model = ARModel(ARConfig(**artifact["config"]))
    model.load_state_dict(artifact["model"])
    return model.eval().to(device), artifact


# ---------------------------------------------------------------------------------------------------------------------
# Generation


def guide(cond, uncond, scale):
    """Classifier-free guidance (Ho and Salimans 2022) on logits: scale 1 is off, more exaggerates what the class adds."""
    return uncond + scale * (cond - uncond)


def filter_logits(logits, top_k=0, top_p=1.0):
    """-inf for all but the top_k largest logits (0: off), and all but the fewest largest with probability top_p together.

    logits: (..., V). At least the largest is kept; top_k above V keeps all.
    """
    if 0 < top_k < logits.shape[-1]:
        smallest_kept = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < smallest_kept, -math.inf)
    if top_p < 1:
        ordered, index = logits.sort(descending=True)
        probability = ordered.softmax(-1)
        before = (
            probability.cumsum(-1) - probability
        )  # of the more likely tokens; 0 for the first, so it is always kept
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(
            -1, index, before >= top_p
        )
        logits = logits.masked_fill(drop, -math.inf)
    return logits


def draw(logits, generator):
    """A random index int64 (...,) for each row of logits (..., V), with probabilities softmax(logits)."""
    # The Gumbel-max trick: exact, and several times faster than torch.multinomial when V is large.
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device).clamp(
        min=1e-20
    )
    return (logits - (-uniform.log()).log()).argmax(-1)


@torch.inference_mode()
def generate(
    model, labels, generator, cfg_scale=1.0, temperature=1.0, top_k=0, top_p=1.0
):
    """Draw the T tokens of one image per class label, one after the other. labels int64 (B,) -> tokens int64 (B, T).

    With guidance, the same tokens run through the model twice, with the class and with the null class. The order of
    what is done to the logits: guide, temperature, top-k, top-p.
    """
    guided = cfg_scale != 1
    T = math.prod(model.config.grid)
    caches = [Cache(T) for _ in model.blocks]
    if guided:
        labels = torch.cat([labels, torch.full_like(labels, model.config.num_classes)])
    x = model.class_embedding(labels)[:, None]  # (B or 2B, 1, dim)
    tokens = []
    for t in range(T):
        logits = model.transformer(x, t, caches)[:, 0]  # (B or 2B, V)
        if guided:
            logits = guide(*logits.chunk(2), cfg_scale)
        token = draw(
            filter_logits(logits / temperature, top_k, top_p), generator
        )  # (B,)
        tokens.append(token)
        x = model.token_embedding(token.repeat(2) if guided else token)[:, None]
    return torch.stack(tokens, dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def next_token_loss(model, tokens, labels):
    """Mean cross-entropy in nats of each of the T tokens given the class and the tokens before it.

    tokens int64 (B, T), labels int64 (B,).
    """
    logits = model(labels, tokens[:, :-1])  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def drop_classes(labels, num_classes, rng, rate=0.1):
    """Replace a tenth of the labels (B,) by the null class, so that the model also learns p(c), which guidance needs."""
    dropped = torch.from_numpy(rng.random(len(labels)) < rate).to(labels.device)
    return labels.masked_fill(dropped, num_classes)


def adamw(model, lr):
    """AdamW as LlamaGen sets it; the gains of the norms do not decay."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    gains = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.05},
        {"params": gains, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=lr, betas=(0.9, 0.95), fused=gains[0].device.type != "mps"
    )


@torch.no_grad()
def heldout_loss(model, tokens, labels, batch_size=250):
    """next_token_loss over all of tokens (N, T) and labels (N,)."""
    batches = zip(tokens.split(batch_size), labels.split(batch_size))
    return sum(next_token_loss(model, t, y).item() * len(t) for t, y in batches) / len(
        tokens
    )


def plot_curves(path, history, title, guess):
    """Training and held-out loss in nats over steps, beside that of guessing."""
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    losses = np.array(history["loss"])
    axes.plot(
        np.arange(1, len(losses) + 1),
        losses,
        color="tab:blue",
        alpha=0.3,
        label="training, each step",
    )
    axes.plot(
        [r["step"] for r in history["heldout"]],
        [r["loss"] for r in history["heldout"]],
        color="tab:orange",
        marker=".",
        label="held-out images",
    )
    axes.axhline(guess, color="grey", linestyle=":", label=f"guessing: {guess:.2f}")
    axes.set(title=title, xlabel="step", ylabel="cross-entropy, nats per token")
    axes.legend()
    save_figure(figure, path)


def main(argv=None):
    parser = CommandLine(__doc__)
    parser.add_argument(
        "--labels",
        choices=["coarse", "fine"],
        default="coarse",
        help="fine trains the baseline",
    )
    parser.add_argument("--layers", type=number(int, 1), default=ARConfig.layers)
    parser.add_argument("--dim", type=number(int, 4), default=ARConfig.dim)
    parser.add_argument("--heads", type=number(int, 1), default=ARConfig.heads)
    parser.add_argument("--steps", type=number(int, 1), default=1800)
    parser.add_argument("--batch-size", type=number(int, 1), default=64)
    parser.add_argument(
        "--lr", type=number(float, 0), default=2e-3, help="peak learning rate"
    )
    parser.add_argument(
        "--save-every",
        type=number(int, 1),
        default=200,
        help="steps between saves and measurements",
    )
    parser.add_argument(
        "--keep-every",
        type=number(int, 0),
        default=0,
        help="steps between copies that are kept (0: none)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on where an interrupted run stopped"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile, worth it for long runs on a GPU",
    )
    args = parser.parse_args(argv)
    if args.dim % (4 * args.heads):
        parser.error(
            f"--dim {args.dim} is no multiple of 4 x --heads {args.heads}: 2D rotary positions need that"
        )
    device = pick_device(args.device)
    stem = "coarse" if args.labels == "coarse" else "baseline"
    path = args.out / f"{stem}.pt"

    data = load(args.out / "tokens.pt", "tokenizer.py")
    tokens, test_tokens = data["train_fine"].long(), data["test_fine"].long()  # (N, T)
    ids = {"codebook_id": data["codebook_id"], "cluster_id": None}
    vocabulary = data["codebook_size"]
    if args.labels == "coarse":
        clusters = load(
            args.out / "clusters.pt", "cluster.py", codebook_id=data["codebook_id"]
        )
        code_to_cluster = clusters["code_to_cluster"]  # g: (K,)
        tokens, test_tokens = code_to_cluster[tokens], code_to_cluster[test_tokens]
        vocabulary, ids["cluster_id"] = (
            len(clusters["centroids"]),
            clusters["cluster_id"],
        )
    labels, test_labels = (
        data["train_labels"].to(device),
        data["test_labels"].to(device),
    )
    tokens, test_tokens = tokens.to(device), test_tokens.to(device)

    torch.manual_seed(args.seed)
    sizes = {name: getattr(args, name) for name in ("layers", "dim", "heads")}
    model = ARModel(
        ARConfig(vocabulary, len(data["classes"]), list(data["grid"]), **sizes)
    ).to(device)
    optimizer = adamw(model, args.lr)
    settings = (
        {
            name: getattr(args, name)
            for name in ("labels", "steps", "batch_size", "lr", "seed")
        }
        | sizes
        | ids
    )
    first_step, seconds, history = 0, 0.0, {"loss": [], "heldout": []}
    if args.resume:
        checkpoint = resume(path, "ar_model.py", settings)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        first_step, seconds, history = (
            checkpoint["step"],
            checkpoint["seconds"],
            checkpoint["history"],
        )
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters over {vocabulary} {args.labels} labels, "
        f"{len(tokens)} images of {tokens.shape[1]} tokens, on {device}"
    )

    def save_checkpoint(step, path):
        save(
            {
                "script": "ar_model.py",
                "model": model.state_dict(),
                "config": asdict(model.config),
                **ids,
                "settings": settings,
                "step": step,
                "seconds": seconds,
                "optimizer": optimizer.state_dict(),
                "history": history,
            },
            path,
        )

    run = torch.compile(model) if args.compile else model
    bar = tqdm(
        range(first_step, args.steps),
        stem,
        args.steps,
        initial=first_step,
        mininterval=1,
    )
    with interruptible() as stop:
        for step in bar:
            start = time.perf_counter()
            rng = np.random.default_rng(
                (args.seed, step)
            )  # a step's randomness depends on nothing before it: --resume
            batch = torch.from_numpy(
                rng.integers(len(tokens), size=args.batch_size)
            ).to(device)
            y = drop_classes(labels[batch], model.config.num_classes, rng)
            with autocast(device):
                loss = next_token_loss(run, tokens[batch], y)
            if not math.isfinite(loss.item()):
                bar.close()
                fail(
                    f"the loss is {loss.item()} at step {step}: nothing saved since the last save; try a lower --lr"
                )
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.steps, args.lr)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            history["loss"].append(loss.item())
            seconds += time.perf_counter() - start
            done = step + 1
            if step == 0:
                tqdm.write(
                    f"first loss {loss.item():.3f}, that of guessing is ln {vocabulary} = {math.log(vocabulary):.3f}"
                )
            if done % args.save_every == 0 or done == args.steps:
                heldout = heldout_loss(model, test_tokens[:1000], test_labels[:1000])
                history["heldout"].append(
                    {"step": done, "seconds": seconds, "loss": heldout}
                )
                tqdm.write(
                    f"step {done}: held-out loss {heldout:.4f}, {heldout / math.log(2):.3f} bits per token"
                )
            if done % args.save_every == 0 or done == args.steps or stop.is_set():
                save_checkpoint(done, path)
            if args.keep_every and done % args.keep_every == 0:
                save_checkpoint(done, args.out / f"{stem}-{done:06d}.pt")
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            if stop.is_set():
                bar.close()
                print(
                    f"stopped after step {done}; go on with the same command and --resume",
                    file=sys.stderr,
                )
                raise SystemExit(130)
    plot_curves(
        args.out / f"{stem}.png",
        history,
        f"{stem}: one of {vocabulary} {args.labels} labels at a time",
        math.log(vocabulary),
    )
    print(
        f"wrote {stem}.pt and {stem}.png to {args.out} after {seconds:.0f} s of training"
    )


if __name__ == "__main__":
    main()
