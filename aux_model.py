"""Stage 3: a bidirectional model that predicts the fine labels of all tokens at once, given all coarse labels.

p(q_i | c_1 .. c_T, y) for every i in one pass with full attention (arXiv 2503.16194, section 3.2): cross-entropy over
the K fine labels. Since q_i must lie in cluster c_i, all logits outside that cluster are masked. They need not even be
computed: a token is multiplied with the rows of the K-way head that belong to its cluster, and with no others.

    python aux_model.py

Reads tokens.pt and clusters.pt; writes fine.pt and fine.png. The first loss is the mean ln of the size of a token's
cluster, that of guessing within it. The fine labels are drawn independently of each other, so p(q | c, y) is a product
over tokens: what that costs shows in the held-out bits per token (evaluate.py).
"""

import math
import sys
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
)

NEVER = -1e9  # the logit of a code that does not exist; finite, since guidance subtracts such logits from each other


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
    """code_to_cluster int64 (K,) is the map g; S below is the size of its largest cluster."""

    def __init__(self, config, code_to_cluster):
        super().__init__()
        self.config = config
        self.class_embedding = nn.Embedding(
            config.num_classes + 1, config.dim
        )  # the last is the null class, for CFG
        self.token_embedding = nn.Embedding(config.clusters, config.dim)
        self.blocks = nn.ModuleList(
            Block(config.dim, config.heads, causal=False) for _ in range(config.layers)
        )
        self.norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.head = nn.Linear(config.dim, config.codebook_size, bias=False)
        self.register_buffer(
            "rotary",
            rotary_table(config.grid, config.dim // config.heads),
            persistent=False,
        )
        init_weights(self)
        # Two ways to say the same as g. members[m] are the codes of cluster m (padded with 0 to S of them), rank[q] is
        # the place of q among them: members[g(q), rank[q]] = q.
        self.sizes = code_to_cluster.bincount(
            minlength=config.clusters
        ).tolist()  # codes of each cluster
        by_cluster = code_to_cluster.argsort(
            stable=True
        )  # (K,) all codes of cluster 0, then all of cluster 1, ...
        members = nn.utils.rnn.pad_sequence(
            by_cluster.split(self.sizes), batch_first=True
        )  # (M, S)
        rank = torch.empty_like(code_to_cluster)
        rank[by_cluster] = torch.cat([torch.arange(size) for size in self.sizes])
        for name, buffer in (
            ("by_cluster", by_cluster),
            ("members", members),
            ("rank", rank),
        ):
            self.register_buffer(name, buffer, persistent=False)

    def cluster_logits(self, x, coarse):
        """Features (n, dim) and coarse labels (n,) of n tokens -> logits (n, S) of the members of each token's cluster.

        The same numbers as all K logits of which those outside the cluster are masked away, for a fraction of the work:
        the tokens are sorted by cluster, and each cluster needs one small matrix product.
        """
        order = coarse.argsort()
        inputs = x[order].split(
            coarse.bincount(minlength=len(self.sizes)).tolist()
        )  # M times (n_m, dim)
        weights = self.head.weight[self.by_cluster].split(
            self.sizes
        )  # M times (size_m, dim)
        largest = self.members.shape[1]  # S
        logits = [
            F.pad(h @ w.T, (0, largest - len(w)), value=NEVER)
            for h, w in zip(inputs, weights)
        ]
        return torch.cat(logits).float()[
            order.argsort()
        ]  # back in the order of the tokens

    def forward(self, coarse, labels):
        """Coarse labels int64 (B, T), class labels int64 (B,) -> logits float32 (B, T, S): [b, i, s] is that of the fine
        label members[coarse[b, i], s]."""
        x = torch.cat(
            [self.class_embedding(labels)[:, None], self.token_embedding(coarse)], dim=1
        )  # (B, T + 1, dim)
        for block in self.blocks:
            x = block(x, self.rotary)
        x = self.norm(x[:, 1:])  # (B, T, dim): the class token has done its work
        return self.cluster_logits(x.flatten(0, 1), coarse.flatten()).unflatten(
            0, coarse.shape
        )


def load_aux(path, code_to_cluster, device, **ids):
    """(AuxModel in eval mode on device, the artifact) from fine.pt; ids as in tokenizer.load."""
    artifact = load(path, "aux_model.py", **ids)
    model = AuxModel(AuxConfig(**artifact["config"]), code_to_cluster)
    model.load_state_dict(artifact["model"])
    return model.eval().to(device), artifact


@torch.inference_mode()
def predict_fine(
    model, coarse, labels, generator, cfg_scale=1.0, temperature=1.0, top_k=0
):
    """Draw all fine labels in one pass. coarse int64 (B, T), labels int64 (B,) -> fine int64 (B, T).

    A fine label always lies in its coarse cluster. The order: guide, mask to the cluster, temperature, top-k.
    """
    if cfg_scale == 1:
        logits = model(coarse, labels)  # (B, T, S)
    else:
        both = torch.cat([labels, torch.full_like(labels, model.config.num_classes)])
        logits = guide(*model(coarse.repeat(2, 1), both).chunk(2), cfg_scale)
    member = draw(
        filter_logits(logits / temperature, top_k), generator
    )  # (B, T), 0 .. S - 1
    return model.members[coarse, member]


def fine_loss(model, fine, code_to_cluster, labels):
    """Mean cross-entropy in nats of each fine label given all coarse labels and the class, and the share of the tokens
    whose most likely fine label is the right one. fine int64 (B, T), labels int64 (B,)."""
    logits = model(code_to_cluster[fine], labels)  # (B, T, S)
    rank = model.rank[fine]  # (B, T)
    return F.cross_entropy(logits.flatten(0, 1), rank.flatten()), (
        logits.argmax(-1) == rank
    ).float().mean()


@torch.no_grad()
def heldout_fine(model, fine, code_to_cluster, labels, batch_size=250):
    """fine_loss (nats, share) over all of fine (N, T) and labels (N,)."""
    total = torch.zeros(2)
    for q, y in zip(fine.split(batch_size), labels.split(batch_size)):
        total += torch.stack(fine_loss(model, q, code_to_cluster, y)).cpu() * len(q)
    return (total / len(fine)).tolist()


def main(argv=None):
    parser = CommandLine(__doc__)
    parser.add_argument("--layers", type=number(int, 1), default=AuxConfig.layers)
    parser.add_argument("--dim", type=number(int, 4), default=AuxConfig.dim)
    parser.add_argument("--heads", type=number(int, 1), default=AuxConfig.heads)
    parser.add_argument("--steps", type=number(int, 1), default=600)
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
    path = args.out / "fine.pt"

    data = load(args.out / "tokens.pt", "tokenizer.py")
    clusters = load(
        args.out / "clusters.pt", "cluster.py", codebook_id=data["codebook_id"]
    )
    ids = {"codebook_id": data["codebook_id"], "cluster_id": clusters["cluster_id"]}
    code_to_cluster = clusters["code_to_cluster"]  # g: (K,)
    M, K = len(clusters["centroids"]), len(code_to_cluster)

    torch.manual_seed(args.seed)
    sizes = {name: getattr(args, name) for name in ("layers", "dim", "heads")}
    model = AuxModel(
        AuxConfig(M, K, len(data["classes"]), list(data["grid"]), **sizes),
        code_to_cluster,
    ).to(device)
    optimizer = adamw(model, args.lr)
    settings = (
        {name: getattr(args, name) for name in ("steps", "batch_size", "lr", "seed")}
        | sizes
        | ids
    )
    first_step, seconds, history = 0, 0.0, {"loss": [], "heldout": []}
    if args.resume:
        checkpoint = resume(path, "aux_model.py", settings)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        first_step, seconds, history = (
            checkpoint["step"],
            checkpoint["seconds"],
            checkpoint["history"],
        )

    code_to_cluster = code_to_cluster.to(device)
    fine, labels = (
        data["train_fine"].long().to(device),
        data["train_labels"].to(device),
    )  # (N, T), (N,)
    test_fine, test_labels = (
        data["test_fine"].long().to(device),
        data["test_labels"].to(device),
    )
    # What a model that learnt nothing but the frequency of each code would get right on unseen images.
    frequency = fine.flatten().bincount(minlength=K)
    in_cluster = (
        code_to_cluster[None] == torch.arange(M, device=device)[:, None]
    )  # (M, K)
    favourite = torch.where(in_cluster, frequency, -1).argmax(
        1
    )  # (M,) the most frequent code of each cluster
    guess = (favourite[code_to_cluster[test_fine]] == test_fine).float().mean().item()
    uniform = (
        model.members.new_tensor(model.sizes)[code_to_cluster[test_fine]]
        .float()
        .log()
        .mean()
        .item()
    )  # nats
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {K} fine labels in {M} clusters, "
        f"{len(fine)} images of {fine.shape[1]} tokens, on {device}"
    )

    def save_checkpoint(step, path):
        save(
            {
                "script": "aux_model.py",
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

    if (
        args.compile
    ):  # the Transformer blocks; the sizes of cluster_logits differ from batch to batch
        for block in model.blocks:
            block.compile()
    bar = tqdm(
        range(first_step, args.steps),
        "fine",
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
            batch = torch.from_numpy(rng.integers(len(fine), size=args.batch_size)).to(
                device
            )
            y = drop_classes(labels[batch], model.config.num_classes, rng)
            with autocast(device):
                loss, _ = fine_loss(model, fine[batch], code_to_cluster, y)
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
                    f"first loss {loss.item():.3f}, that of guessing within the cluster is {uniform:.3f}"
                )
            if done % args.save_every == 0 or done == args.steps:
                heldout, right = heldout_fine(
                    model, test_fine[:1000], code_to_cluster, test_labels[:1000]
                )
                history["heldout"].append(
                    {
                        "step": done,
                        "seconds": seconds,
                        "loss": heldout,
                        "accuracy": right,
                        "guess": guess,
                    }
                )
                tqdm.write(
                    f"step {done}: held-out loss {heldout:.4f}, {heldout / math.log(2):.3f} bits per token; {right:.1%} "
                    f"right, always guessing the cluster's most frequent code: {guess:.1%}"
                )
            if done % args.save_every == 0 or done == args.steps or stop.is_set():
                save_checkpoint(done, path)
            if args.keep_every and done % args.keep_every == 0:
                save_checkpoint(done, args.out / f"fine-{done:06d}.pt")
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            if stop.is_set():
                bar.close()
                print(
                    f"stopped after step {done}; go on with the same command and --resume",
                    file=sys.stderr,
                )
                raise SystemExit(130)
    plot_curves(
        args.out / "fine.png",
        history,
        f"fine: the code within its cluster, {M} clusters of {K} codes",
        uniform,
    )
    print(f"wrote fine.pt and fine.png to {args.out} after {seconds:.0f} s of training")


if __name__ == "__main__":
    main()
