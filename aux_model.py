"""Stage 2: a bidirectional model that predicts all fine labels at once.

p(q_i | c_1 .. c_T, y) for every token i, in one pass with full attention (arXiv
2503.16194, figure 1c). The paper's softmax is over all K codes. Here it is over those
of cluster c_i, in which q_i lies: all other logits are -inf, and a CPU does not compute
them.

    python aux_model.py

Reads tokens.pt and clusters.pt; writes fine.pt and fine.png. The first loss is that of
guessing within the cluster, the mean ln of its size. On two CPU cores: 72 seconds, 31%
of the fine labels of the test images right. The model takes the fine labels for
independent given the coarse ones, p(q | c, y) is a product over tokens: what that costs
can be read from the bits per token (evaluate.py).

One image all the way: in go class 0 and its 64 coarse labels, 84, 84, 84, 106, ...; out
come logits (64, S), S = 100 codes of the largest cluster. Row 27, of cluster 11, has 83
codes to choose from. It has seen all 64 coarse labels, and gives the right answer, code
1181, a probability of 0.18, more than any other: 1.72 nats, where guessing costs ln 83 =
4.42.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from ar_model import (
    Block,
    adamw,
    at_once,
    draw,
    drop_classes,
    filter_logits,
    guide,
    init_weights,
    parse_args,
    plot_curves,
    rotary_table,
)
from cluster import load_clusters
from tokenizer import (
    CommandLine,
    Learner,
    autocast,
    backward_clip_step,
    gradient_scaler,
    load,
    load_tokens,
    load_weights,
    no_traceback,
    pick_device,
    start_or_resume,
    training_steps,
)

# --------------------------------------------------------------------------------------
# The model


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
    """The Transformer of stage 1 without the causal mask: coarse labels in, and for each
    the logits of the codes of its cluster out.

    code_to_cluster int64 (K,) is g. S below is the size of the largest cluster.
    """

    def __init__(self, config, code_to_cluster):
        super().__init__()
        self.config = config
        dim = config.dim
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
        self.add_maps(code_to_cluster)

    def add_maps(self, code_to_cluster):
        """Keep g, and what can be read off it. With g = [0, 1, 1, 0, 1, 0]:

        by_cluster (K,) = [0, 3, 5, 1, 2, 4]: the codes of cluster 0, then of 1, ...
        sizes, a list = [3, 3]: how many these are
        members (M, S) = [[0, 3, 5], [1, 2, 4]]: the same, a row for each cluster, which
            is filled up with -1 where a cluster is smaller than S
        rank (K,) = [0, 0, 1, 1, 2, 2]: where in its row a code is
        """
        self.sizes = code_to_cluster.bincount(minlength=self.config.clusters).tolist()
        by_cluster = code_to_cluster.argsort(stable=True)
        rows = by_cluster.split(self.sizes)
        members = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        rank = torch.empty_like(code_to_cluster)
        rank[by_cluster] = torch.cat([torch.arange(size) for size in self.sizes])
        self.register_buffer("code_to_cluster", code_to_cluster, persistent=False)
        self.register_buffer("by_cluster", by_cluster, persistent=False)
        self.register_buffer("members", members, persistent=False)
        self.register_buffer("rank", rank, persistent=False)

    def forward(self, coarse, y):
        """Coarse labels (B, T), classes y (B,), int64 -> float32 logits (B, T, S).

        Entry [b, i, s] is that of the fine label members[coarse[b, i], s].
        """
        class_token = self.class_embedding(y)[:, None]  # (B, 1, dim)
        x = torch.cat([class_token, self.token_embedding(coarse)], dim=1)
        for block in self.blocks:
            x = block(x, self.rotary)  # (B, T + 1, dim)
        x = self.norm(x[:, 1:])  # (B, T, dim): nothing is read off the class token
        x, coarse_n = x.flatten(0, 1), coarse.flatten()
        logits = self.cluster_logits(x, coarse_n, dense=x.is_cuda)
        return logits.unflatten(0, coarse.shape)

    def cluster_logits(self, x, coarse, dense=False):
        """Features (n, dim) of n = B T tokens and their coarse labels (n,) -> float32
        logits (n, S), with their gradients, under autocast as well: those of the codes
        members[coarse], -inf where there is none (members is -1).

        dense: by a few large products (for a GPU), not by many small ones; the logits
        are the same. It is a matter of speed alone.
        """
        S = self.members.shape[1]
        logits = []
        if dense:  # the K-way head of the paper, of which the members are picked
            size = max(1, 2**27 // len(self.rank))  # tokens at a time: (size, K) fits
            for x_n, coarse_n in zip(x.split(size), coarse.split(size)):
                members = self.members[coarse_n]  # (size, S)
                products = x_n @ self.head.weight.T  # (size, K)
                picked = products.gather(1, members.clamp(min=0)).float()
                logits.append(picked.masked_fill(members < 0, -math.inf))
            return torch.cat(logits)
        # Of these n K products only n S at most are needed. So: the tokens sorted by
        # cluster, and for each cluster one product of its tokens with its codes alone.
        order = coarse.argsort()
        counts = coarse.bincount(minlength=len(self.sizes)).tolist()  # tokens, of each
        tokens = x[order].split(counts)  # M parts of (tokens of the cluster, dim)
        weights = self.head.weight[self.by_cluster]  # (K, dim), sorted by cluster too
        weights = weights.split(self.sizes)  # M parts of (size of the cluster, dim)
        for x_m, w_m in zip(tokens, weights):
            products = x_m @ w_m.T  # (tokens of the cluster, its size)
            logits.append(F.pad(products, (0, S - len(w_m)), value=-math.inf))
        unsort = order.argsort()  # back to the order of x
        return torch.cat(logits).float()[unsort]


def fine_loss(model, fine, y):
    """Mean cross-entropy in nats of the fine labels (B, T) given the coarse labels and
    the classes y (B,), a 0-d tensor; and the share of tokens whose likeliest one is
    right, a 0-d tensor or a float: no gradient is needed of it."""
    coarse = model.code_to_cluster[fine]  # (B, T)
    logits = model(coarse, y)  # (B, T, S)
    rank = model.rank[fine]  # (B, T): the right answers, as places within the cluster
    loss = F.cross_entropy(logits.flatten(0, 1), rank.flatten())
    return loss, (logits.argmax(dim=-1) == rank).float().mean()


@torch.inference_mode()
def predict_fine(model, coarse, y, generator, cfg_scale=1.0, temperature=1.0, top_k=0):
    """All fine labels in one pass: coarse (B, T), classes y (B,) -> fine int64 (B, T).

    A fine label always lies in its coarse cluster. The order of what is done to the
    logits: guide (1 is off, any other scale acts, those below 1 as well), mask to the
    cluster, temperature, top-k. The model's logits are -inf already where the cluster
    has no more codes (members is -1), with a class and without, and guidance makes nan
    of two -inf. All that is random comes from generator.
    """
    if cfg_scale == 1:
        logits = model(coarse, y)  # (B, T, S)
    else:
        null = torch.full_like(y, model.config.num_classes)
        both = model(coarse.repeat(2, 1), torch.cat([y, null]))  # (2B, T, S)
        cond, uncond = both.chunk(2)
        logits = guide(cond, uncond, cfg_scale)
    members = model.members[coarse]  # (B, T, S)
    # What lies beyond the cluster is -inf once more, where guidance made nan of it.
    logits = logits.masked_fill(members < 0, -math.inf)
    rank = draw(filter_logits(logits / temperature, top_k), generator)  # (B, T)
    return members.gather(-1, rank[..., None])[..., 0]


# --------------------------------------------------------------------------------------
# Training


def train(learner, train_set, test_set, args, checkpoint, path):
    """Train learner.model on the tokens of train_set; measure it on test_set.

    All around a step (learning rate, measuring, saving, Ctrl-C) is in training_steps.
    """
    model = learner.model

    def measure():
        """What is printed and plotted of every --save-every steps."""
        nats, right = mean_fine_loss(model, *test_set.first(1000))
        return {"loss": nats, "bits": nats / math.log(2), "right": right}

    steps = training_steps(args, path, learner, checkpoint, measure)
    for step, rng in steps:
        fine, y = train_set.batch(rng, args.batch_size)
        y = drop_classes(y, model.config.num_classes, rng)
        with autocast(y.device):
            loss, _ = fine_loss(model, fine, y)
        backward_clip_step(loss, *learner)
        checkpoint["history"]["loss"].append(loss.item())
        if step == 0:
            tqdm.write(f"first loss {loss:.3f}")


@torch.no_grad()
def mean_fine_loss(model, fine, y):
    """fine_loss (nats, share) over all of fine (N, T) and y (N,), two floats."""
    total = torch.zeros(2)
    size = at_once(64, fine)
    for part, part_y in zip(fine.split(size), y.split(size)):
        with autocast(part.device):
            loss, right = fine_loss(model, part, part_y)
        total += len(part) * torch.tensor([float(loss), float(right)])
    return (total / len(fine)).tolist()


def guessing(code_to_cluster, fine, test_fine):
    """What looking at nothing but the cluster gives on test_fine (N', T).

    The nats of a model that only knows how many codes there are in each cluster, and
    the share right of one that knows the most frequent of them in fine (N, T).
    """
    K = len(code_to_cluster)
    sizes = code_to_cluster.bincount()  # (M,)
    coarse = code_to_cluster[test_fine]  # (N', T)
    nats = sizes[coarse].log().mean().item()
    frequency = fine.flatten().bincount(minlength=K)  # (K,)
    clusters = torch.arange(len(sizes), device=fine.device)[:, None]
    in_cluster = code_to_cluster == clusters  # (M, K)
    favourite = torch.where(in_cluster, frequency, -1).argmax(dim=1)  # (M,)
    right = (favourite[coarse] == test_fine).float().mean().item()
    return nats, right


# --------------------------------------------------------------------------------------
# The script


@no_traceback()
def main(argv=None):
    parser = CommandLine(__doc__)
    parser.add_training_flags(steps=1000, batch_size=32, lr=3e-3)
    args = parse_args(parser, AuxConfig, argv)
    device = pick_device(args.device)
    path = args.out / "fine.pt"

    train_set, artifact = load_tokens(args.out, "train")  # fine labels (N, T)
    test_set, _ = load_tokens(args.out, "test")
    train_set, test_set = train_set.to(device), test_set.to(device)
    clusters = load_clusters(args.out, artifact["codebook_id"])
    ids = {name: clusters[name] for name in ("codebook_id", "cluster_id")}
    g = clusters["code_to_cluster"]  # (K,)
    M, K = len(clusters["centroids"]), len(g)

    torch.manual_seed(args.seed)
    num_classes, grid = len(artifact["classes"]), list(artifact["grid"])
    config = AuxConfig(M, K, num_classes, grid, args.layers, args.dim, args.heads)
    model = AuxModel(config, g).to(device)
    learner = Learner(model, adamw(model), gradient_scaler(device))
    checkpoint = start_or_resume(args, path, learner, "aux_model.py", **ids)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{size:.2f}M parameters, {M} coarse to {K} fine labels, on {device}")

    if args.compile:  # not cluster_logits: its shapes change with every batch
        for block in model.blocks:
            block.compile()
    nats, right = guessing(model.code_to_cluster, train_set.x, test_set.x)
    print(f"guessing within the cluster: {nats:.3f} nats, {right:.1%} right")
    train(learner, train_set, test_set, args, checkpoint, path)
    title = f"fine.pt: the code within its cluster ({K} codes, {M} clusters)"
    plot_curves(args.out / "fine.png", title, checkpoint["history"], nats)
    print(f"wrote fine.pt and fine.png to {args.out}")
    print(f"{checkpoint['seconds']:.0f} s of training")


def load_aux(path, code_to_cluster, device, **ids):
    """(AuxModel in eval mode on device, the artifact) from path; ids as for load."""
    artifact = load(path, "aux_model.py", **ids)
    model = AuxModel(AuxConfig(**artifact["config"]), code_to_cluster)
    load_weights(model, artifact, path)
    return model.eval().to(device), artifact


if __name__ == "__main__":
    main()
