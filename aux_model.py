"""Stage 2: a bidirectional model that predicts all fine labels at once.

p(q_i | c_1 .. c_T, y) for every token i, in one pass with full attention (arXiv
2503.16194, figure 1c). The paper's softmax is over all K codes. Here it is over those
of cluster c_i, in which q_i lies. The other logits are not even computed: a token meets
those rows of the K-way head that belong to its cluster, and no others.

    python aux_model.py

Reads tokens.pt and clusters.pt; writes fine.pt and fine.png. The first loss is that of
guessing within the cluster, the mean ln of its size. On two CPU cores: 75 seconds, 33%
of the fine labels of unseen images right. The fine labels are independent given the
coarse ones, p(q | c, y) is a product over tokens: what that costs can be read from the
held-out bits per token (evaluate.py).
"""

import math
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from ar_model import (
    Block,
    adamw,
    draw,
    drop_classes,
    filter_logits,
    guide,
    init_weights,
    plot_curves,
    rotary_table,
)
from cluster import load_clusters
from tokenizer import (
    CommandLine,
    at_least,
    autocast,
    finite,
    interruptible,
    learning_rate,
    leave,
    load,
    load_weights,
    pick_device,
    run_script,
    save_checkpoint,
    start_or_resume,
    training_settings,
)


@dataclass
class AuxConfig:
    clusters: int  # M
    codebook_size: int  # K
    num_classes: int
    grid: list  # (h, w), T = h * w
    layers: int = 2
    dim: int = 128
    heads: int = 4


class AuxModel(nn.Module):
    """The Transformer of stage 1 without the causal mask; M labels in, K labels out.

    code_to_cluster int64 (K,) is g. S below is the size of the largest cluster.
    """

    def __init__(self, config, code_to_cluster):
        super().__init__()
        self.config, dim = config, config.dim
        # The last class is the null class, for guidance.
        self.class_embedding = nn.Embedding(config.num_classes + 1, dim)
        self.token_embedding = nn.Embedding(config.clusters, dim)
        blocks = [Block(dim, config.heads, causal=False) for _ in range(config.layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.head = nn.Linear(dim, config.codebook_size, bias=False)
        rotary = rotary_table(config.grid, dim // config.heads)
        self.register_buffer("rotary", rotary, persistent=False)
        init_weights(self)
        # The map g in three other forms: by_cluster (K,) are the codes of cluster 0,
        # then those of 1, and so on; members (M, S) has a row for each cluster, filled
        # up with -1; code q is number rank[q] of its row, members[g(q), rank[q]] = q.
        self.sizes = code_to_cluster.bincount(minlength=config.clusters).tolist()
        by_cluster = code_to_cluster.argsort(stable=True)
        rows = by_cluster.split(self.sizes)
        rank = torch.empty_like(code_to_cluster)
        rank[by_cluster] = torch.cat([torch.arange(size) for size in self.sizes])
        members = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        self.register_buffer("by_cluster", by_cluster, persistent=False)
        self.register_buffer("members", members, persistent=False)
        self.register_buffer("rank", rank, persistent=False)

    def cluster_logits(self, x, coarse):
        """Features (n, dim) of n = B T tokens and their coarse labels (n,) -> logits
        (n, S) of the members of each token's cluster, -inf beyond its size.

        The same numbers as all K logits with those outside the cluster masked, for a
        fraction of the work: tokens sorted by cluster, then a small product for each.
        """
        order = coarse.argsort()  # order.argsort() undoes it
        counts = coarse.bincount(minlength=len(self.sizes)).tolist()
        tokens = x[order].split(counts)  # M parts of (n_m, dim)
        head = self.head.weight[self.by_cluster]  # (K, dim), sorted by cluster
        weights = head.split(self.sizes)  # M parts of (size_m, dim)
        S = self.members.shape[1]
        products = [
            F.pad(t @ w.T, (0, S - len(w)), value=-math.inf)  # (n_m, S)
            for t, w in zip(tokens, weights)
        ]
        return torch.cat(products).float()[order.argsort()]  # in the order of x again

    def forward(self, coarse, labels):
        """Coarse labels (B, T), class labels (B,), int64 -> float32 logits (B, T, S).

        Entry [b, i, s] is that of the fine label members[coarse[b, i], s].
        """
        class_token = self.class_embedding(labels)[:, None]  # (B, 1, dim)
        x = torch.cat([class_token, self.token_embedding(coarse)], dim=1)
        for block in self.blocks:
            x = block(x, self.rotary)  # (B, T + 1, dim)
        x = self.norm(x[:, 1:])  # (B, T, dim): nothing is read off the class token
        logits = self.cluster_logits(x.flatten(0, 1), coarse.flatten())
        return logits.unflatten(0, coarse.shape)


def load_aux(path, code_to_cluster, device, **ids):
    """(AuxModel in eval mode on device, the artifact) from path; ids as for load."""
    artifact = load(path, "aux_model.py", **ids)
    model = AuxModel(AuxConfig(**artifact["config"]), code_to_cluster)
    load_weights(model, artifact, path)
    return model.eval().to(device), artifact


@torch.inference_mode()
def predict_fine(
    model, coarse, labels, generator, cfg_scale=1.0, temperature=1.0, top_k=0
):
    """All fine labels in one pass: coarse (B, T), labels (B,) -> fine int64 (B, T).

    A fine label always lies in its coarse cluster. The order of what is done to the
    logits: guide, mask to the cluster, temperature, top-k.
    """
    if cfg_scale == 1:
        logits = model(coarse, labels)  # (B, T, S)
    else:
        null = torch.full_like(labels, model.config.num_classes)
        both = model(coarse.repeat(2, 1), torch.cat([labels, null]))  # (2B, T, S)
        logits = guide(*both.chunk(2), cfg_scale)
    members = model.members[coarse]  # (B, T, S)
    logits = logits.masked_fill(members < 0, -math.inf)  # guiding -inf gives nan
    rank = draw(filter_logits(logits / temperature, top_k), generator)  # (B, T)
    return members.gather(-1, rank[..., None])[..., 0]


def fine_loss(model, fine, code_to_cluster, labels):
    """Mean cross-entropy in nats of the fine labels (B, T) given the coarse labels and
    the class labels (B,); and the share of tokens whose likeliest one is right."""
    logits = model(code_to_cluster[fine], labels)  # (B, T, S)
    rank = model.rank[fine]  # (B, T): the right answers, numbered within their cluster
    loss = F.cross_entropy(logits.flatten(0, 1), rank.flatten())
    return loss, (logits.argmax(dim=-1) == rank).float().mean()


@torch.no_grad()
def heldout_fine(model, fine, code_to_cluster, labels):
    """fine_loss (nats, share) over all of fine (N, T) and labels (N,)."""
    total = torch.zeros(2)
    for q, y in zip(fine.split(64), labels.split(64)):
        loss, right = fine_loss(model, q, code_to_cluster, y)
        total += len(q) * torch.tensor([loss.item(), right.item()])
    return (total / len(fine)).tolist()


def guessing(fine, test_fine, code_to_cluster):
    """What looking at nothing but the cluster gives on test_fine (N', T).

    The nats of a model that knows how many codes it has, and the share right of one
    that knows the most frequent of them in fine (N, T).
    """
    K, coarse = len(code_to_cluster), code_to_cluster[test_fine]  # (N', T)
    sizes = code_to_cluster.bincount()  # (M,)
    frequency = fine.flatten().bincount(minlength=K)  # (K,)
    clusters = torch.arange(len(sizes), device=fine.device)[:, None]
    in_cluster = code_to_cluster == clusters  # (M, K)
    favourite = torch.where(in_cluster, frequency, -1).argmax(dim=1)  # (M,)
    right = (favourite[coarse] == test_fine).float().mean()
    return sizes[coarse].log().mean().item(), right.item()


def main(argv=None):
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("--layers", type=at_least(1), default=AuxConfig.layers, help="as of stage 1")
    add("--dim", type=at_least(1), default=AuxConfig.dim, help="multiple of 4 x heads")
    add("--heads", type=at_least(1), default=AuxConfig.heads, help="attention heads")
    add("--keep-every", type=at_least(0), default=0, help="keep copies, in steps")
    parser.add_training_flags(steps=1000, batch_size=32, lr=3e-3)
    args = parser.parse_args(argv)
    if args.dim % (4 * args.heads):
        parser.error(f"--dim must be a multiple of 4 x --heads: {4 * args.heads}")
    device, path = pick_device(args.device), args.out / "fine.pt"

    data = load(args.out / "tokens.pt", "tokenizer.py")
    clusters = load_clusters(args.out, data["codebook_id"])
    ids = {name: clusters[name] for name in ("codebook_id", "cluster_id")}
    g = clusters["code_to_cluster"]  # (K,)
    M, K = len(clusters["centroids"]), len(g)

    torch.manual_seed(args.seed)
    num_classes, sizes = len(data["classes"]), (args.layers, args.dim, args.heads)
    config = AuxConfig(M, K, num_classes, list(data["grid"]), *sizes)
    model = AuxModel(config, g).to(device)
    optimizer = adamw(model)
    settings = training_settings(args, **ids)
    first, seconds, history = start_or_resume(
        args, path, "aux_model.py", settings, model, optimizer
    )
    facts = {"script": "aux_model.py", "config": asdict(config), **ids}
    facts |= {"settings": settings, "history": history}
    g = g.to(device)
    fine, labels = data["train_fine"].long().to(device), data["train_labels"].to(device)
    test_fine = data["test_fine"].long().to(device)  # (N, T)
    test_labels = data["test_labels"].to(device)
    uniform, guessed = guessing(fine, test_fine, g)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{size:.2f}M parameters, {M} coarse to {K} fine labels, on {device}")
    print(
        f"the cluster's most frequent code is right for {guessed:.1%} of unseen tokens"
    )

    if args.compile:  # not cluster_logits: its shapes change with every batch
        for block in model.blocks:
            block.compile()
    todo = tqdm(range(first, args.steps), "fine", args.steps, initial=first)
    with interruptible() as stop, todo as bar:
        for step in bar:
            began = time.perf_counter()
            # Seeded by the step, so that a resumed run draws what it would have drawn.
            rng = np.random.default_rng((args.seed, step))
            batch = rng.integers(len(fine), size=args.batch_size)
            batch = torch.from_numpy(batch).to(device)
            y = drop_classes(labels[batch], num_classes, rng)
            with autocast(device):
                loss, _ = fine_loss(model, fine[batch], g, y)
            history["loss"].append(finite(loss, step, path))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.steps, args.lr)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            bar.set_postfix(loss=f"{history['loss'][-1]:.3f}", refresh=False)
            seconds, done = seconds + time.perf_counter() - began, step + 1
            if done == 1:
                guess = f"guessing within the cluster is {uniform:.3f}"
                tqdm.write(f"first loss {history['loss'][0]:.3f}; {guess}")
            if done % args.save_every == 0 or done == args.steps:
                some = test_fine[:1000], g, test_labels[:1000]
                nats, right = heldout_fine(model, *some)
                history["heldout"].append(
                    {"step": done, "seconds": seconds, "loss": nats, "right": right}
                )
                bits = nats / math.log(2)
                tqdm.write(
                    f"step {done}: {bits:.3f} bits a token held out, {right:.1%} right"
                )
            facts |= {"step": done, "seconds": seconds}
            if done % args.save_every == 0 or done == args.steps or stop.is_set():
                save_checkpoint(path, model, optimizer, **facts)
            if args.keep_every and done % args.keep_every == 0:
                copy = path.with_name(f"{path.stem}-{done:06d}.pt")
                save_checkpoint(copy, model, optimizer, **facts)
            if stop.is_set():
                leave(done)
    title = f"fine.pt: the code within its cluster ({K} codes, {M} clusters)"
    plot_curves(args.out / "fine.png", title, history, uniform)
    print(f"wrote fine.pt and fine.png to {args.out}; {seconds:.0f} s of training")


if __name__ == "__main__":
    run_script(main)
