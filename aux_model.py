"""Stage 2, the auxiliary model: bidirectional, it predicts all fine labels at once.

It models p(q_i | c_1 .. c_T, y), where q_i is the fine and c_i the coarse label of
token i, for all i in one pass with full attention, trained by cross-entropy (arXiv
2503.16194, figure 1c). The paper's softmax is over all K codes. Here it is over the
codes of the cluster c_i, which contains q_i; the logits of other codes are not used.

    python aux_model.py

Reads tokens.pt and clusters.pt; writes fine.pt and fine.png. The first loss is that of
a uniform guess within the cluster, the mean of ln(cluster size). On two CPU cores: 2
minutes; 28% of the fine labels of 1,000 test images are predicted correctly.

The model treats fine labels as conditionally independent given the coarse labels:
p(q | c, y) is a product over tokens. That is tolerable since the codes of a cluster
look alike: whichever is sampled, the image stays recognisable. The bits per token
(evaluate.py) include what it costs. Training uses the coarse labels of real images.
Sampling uses those of stage 1, with its mistakes: stage 2 never learns to mend them.

The example image of tokenizer.py: the input is class 0 and its 64 coarse labels, 8,
8, 8, 53, ... The output is logits (64, S), where S = 111 is the size of the largest
cluster. Row 27 has cluster 38, with 99 codes; its last 12 logits are masked. The model
has seen all 64 coarse labels. It gives the right answer, code 1780, a probability of
0.0532, which costs 2.93 nats; it prefers code 1235, with 0.090. A uniform guess within
the cluster costs ln 99 = 4.60 nats.
"""

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

# isort: off
from tokenizer import adamw, autocast, earlier_run, record, save_checkpoint, start
from tokenizer import update, load
from tokenizer import add_training_flags, command_line, pick_device, run
from cluster import invert
from ar_model import Transformer, drop_classes, with_null
from ar_model import parse_with_model, plot_curves

# ---------------------------------------------------------------------------- The model


@dataclass
class AuxConfig:
    clusters: int  # M
    codebook_size: int  # K
    num_classes: int
    grid: list  # (h, w), T = h * w
    layers: int = 2
    dim: int = 128
    heads: int = 4


# The logit of an entry of members that is only padding (the code -1). Its probability
# is exactly 0, as with -inf. But guidance subtracts logits, and -inf - -inf is nan.
MASKED = -1e30


class AuxModel(Transformer):
    """The Transformer without the causal mask. Coarse labels in; for each token, the
    logits of the codes of its cluster out.

    code_to_cluster int64 (K,) is the map g; members (M, S) lists the codes of each
    cluster, and place (K,) where each code stands in its row (cluster.invert).
    """

    def __init__(self, config, code_to_cluster):
        super().__init__(config, config.clusters, config.codebook_size, causal=False)
        members, place = map(torch.from_numpy, invert(code_to_cluster.numpy()))
        self.register_buffer("members", members, persistent=False)
        self.register_buffer("place", place, persistent=False)
        self.register_buffer("code_to_cluster", code_to_cluster, persistent=False)

    def forward(self, coarse, y):
        """Coarse labels (B, T), classes y (B,), int64 -> float32 logits (B, T, S).

        Entry [b, i, s] is the logit of the fine label members[coarse[b, i], s]; MASKED
        where that is -1.
        """
        x = self.embed(coarse, y)  # (B, 1 + T, dim)
        for block in self.blocks:
            x = block(x, self.rotary)  # (B, T + 1, dim)
        x = self.norm(x[:, 1:])  # (B, T, dim): without the class token
        # cluster_logits_on_cpu gives the same, faster. To step through the plain one,
        # set on_cpu = False.
        on_cpu = x.device.type == "cpu"
        compute = self.cluster_logits_on_cpu if on_cpu else self.cluster_logits
        logits = compute(x.flatten(0, 1), coarse.flatten())  # (B*T, S)
        return logits.unflatten(0, coarse.shape)

    def cluster_logits(self, x, coarse):
        """Features (n, dim) of n tokens and their coarse labels (n,) -> float32 logits
        (n, S) of the codes members[coarse], and MASKED where members is -1."""
        members = self.members[coarse]  # (n, S)
        logits = self.head(x).gather(1, members.clamp(min=0))  # out of all K logits
        return logits.float().masked_fill(members < 0, MASKED)

    def cluster_logits_on_cpu(self, x, coarse):
        """(Skip this on a first reading.) The same logits as cluster_logits, nine times
        as fast on a CPU.

        Instead of all n * K logits it computes only those of each token's own cluster:
        one product per cluster, of the features of its tokens with the weights of its
        codes.
        """
        M, S = self.members.shape
        by_cluster = self.members[self.members >= 0]  # (K,): codes of cluster 0, 1, ...
        sizes = (self.members >= 0).sum(dim=1).tolist()  # codes per cluster
        weights = self.head.weight[by_cluster].split(sizes)  # M times (size, dim)
        order = coarse.argsort()  # tokens of cluster 0, then 1, ...
        counts = coarse.bincount(minlength=M).tolist()  # tokens per cluster
        logits = []
        for x_m, w_m in zip(x[order].split(counts), weights):
            products = x_m @ w_m.T  # (tokens of the cluster, codes of the cluster)
            logits.append(F.pad(products, (0, S - len(w_m)), value=MASKED))
        return torch.cat(logits).float()[order.argsort()]  # in the order of x


def fine_loss(model, fine, y):
    """How well fine labels (B, T) are predicted from their coarse labels and the
    classes y (B,). Returns the mean cross-entropy in nats within the clusters, a 0-d
    tensor with a gradient; and the top-1 accuracy, a 0-d tensor."""
    coarse = model.code_to_cluster[fine]  # (B, T)
    logits = model(coarse, y)  # (B, T, S)
    answer = model.place[fine]  # (B, T): the index of the right code in logits
    loss = F.cross_entropy(logits.flatten(0, 1), answer.flatten())
    return loss, (logits.argmax(dim=-1) == answer).float().mean()


@torch.no_grad()
def predict_fine(model, coarse, y, generator, sampling):
    """All fine labels in one pass: coarse (B, T), classes y (B,) -> fine int64 (B, T).

    Each is a code of its token's cluster. All randomness comes from generator.
    sampling: a Sampling.
    """
    if sampling.cfg_scale == 1:
        logits = model(coarse, y)  # (B, T, S)
    else:
        logits = model(coarse.repeat(2, 1), with_null(y, model))  # (2B, T, S)
    index = sampling.draw(logits, generator)  # (B, T)
    return model.members[coarse, index]


# ----------------------------------------------------------------------------- Training


@torch.no_grad()
def mean_fine_loss(model, fine, y):
    """fine_loss over all of fine (N, T) and y (N,): [nats, top-1 accuracy]."""
    total = torch.zeros(2)
    for part, part_y in zip(fine.split(64), y.split(64)):
        with autocast(part.device):
            loss, right = fine_loss(model, part, part_y)
        total += len(part) * torch.tensor([float(loss), float(right)])
    return (total / len(fine)).tolist()


def main(argv=None):
    parser = command_line(__doc__)
    add_training_flags(parser, steps=1000, batch_size=32, lr=3e-3)
    args = parse_with_model(parser, AuxConfig, argv)
    device = pick_device(args.device)
    path = args.out / "fine.pt"
    earlier = earlier_run(path, args)

    artifact = load(args.out, "tokens.pt")
    train_set, test_set = artifact["train"].to(device), artifact["test"].to(device)
    ids = {"codebook_id": artifact["codebook_id"]}
    clusters = load(args.out, "clusters.pt", **ids)
    ids["cluster_id"] = clusters["cluster_id"]
    g = clusters["code_to_cluster"]  # (K,)
    M, K = len(clusters["centroids"]), len(g)

    torch.manual_seed(args.seed)
    num_classes, grid = len(artifact["class_names"]), list(artifact["grid"])
    config = AuxConfig(M, K, num_classes, grid, args.layers, args.dim, args.heads)
    model = AuxModel(config, g).to(device)
    optimizer = adamw(model)
    checkpoint = start(earlier, model, optimizer, args, **ids)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{size:.2f}M parameters, {M} coarse to {K} fine labels, on {device}")
    coarse = model.code_to_cluster[test_set.x]  # (N, T)
    guess = g.bincount().to(device)[coarse].log().mean().item()
    print(f"a uniform guess within the cluster has a loss of {guess:.3f} nats")

    first = checkpoint["step"]
    bar = tqdm(range(first, args.steps), "fine", args.steps, initial=first)
    for step in bar:
        began = time.perf_counter()
        rng = np.random.default_rng((args.seed, step))  # see tokenizer.py
        fine, y = train_set.batch(rng, args.batch_size)
        y = drop_classes(y, num_classes, rng)
        with autocast(device):
            loss, _ = fine_loss(model, fine, y)
        norm = update(model, optimizer, loss, step, args)
        if record(checkpoint, loss, norm, began, bar, args):
            nats, right = mean_fine_loss(model, test_set.x[:1000], test_set.y[:1000])
            scores = {"loss": nats, "bits": nats / math.log(2), "accuracy": right}
            save_checkpoint(path, model, optimizer, checkpoint, args, scores)

    title = f"fine.pt: predicting the code within its cluster (K = {K}, M = {M})"
    plot_curves(args.out / "fine.png", title, checkpoint["history"], guess)
    print(f"wrote fine.pt and fine.png to {args.out}")


if __name__ == "__main__":
    run(main, trains=True)
