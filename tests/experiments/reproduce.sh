#!/usr/bin/env bash
# The commands of the tables in .github/RESULTS.md, one function per table.
#
#     bash tests/reproduce.sh NAME ...     # for example: random, or table1 convergence
#
# They run in $OUT (default: out) and its sub-folders, and need what the commands of the
# README left in $OUT, those of the baseline included. tokenizers, equal_seconds,
# difference and convergence also need table1; sweep needs sweep_rates, cifar needs
# cifar_rates, cifar_seconds needs cifar. A command that has finished is skipped,
# so this script can be stopped and called again: a training then continues from its
# last save. RESULTS.md used OMP_NUM_THREADS=1 and two trainings at a time.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out}
CIFAR=${CIFAR:-cifar10} # or a folder of class folders with the same photographs

# Run a command, unless it has finished before.
once() {
    local mark="$OUT/done/$(tr -c 'a-zA-Z0-9.\n' '_' <<<"$*")"
    [ -e "$mark" ] && return
    echo "+ $*"
    mkdir -p "$OUT/done"
    local resume=
    if [ -e "$mark.begun" ]; then # it was stopped: only a training can continue
        case $2 in tokenizer.py | ar_model.py | aux_model.py) resume=--resume ;; esac
    fi
    touch "$mark.begun"
    if ! "$@" $resume; then
        echo "to start this command from its beginning: rm $mark.begun"
        exit 1
    fi
    mv "$mark.begun" "$mark"
}

# Learning rates for each model at its default length, seed 0. The defaults (1e-3, stage
# 2: 3e-3) are in $OUT.
learning_rates() {
    for lr in 5e-4 2e-3 4e-3; do
        once python ar_model.py --out $OUT/lr$lr --lr $lr
        once python ar_model.py --out $OUT/lr$lr --lr $lr --labels fine
    done
    for lr in 1e-3 2e-3 4e-3 8e-3; do
        once python aux_model.py --out $OUT/lr$lr --lr $lr
    done
    python tests/results.py loss $OUT/{,lr*/}{coarse,baseline,fine}.pt
    for lr in 5e-4 2e-3 4e-3; do
        once python sample.py --out $OUT/lr$lr --model baseline
        once python evaluate.py --out $OUT/lr$lr
    done
    python tests/results.py rows $OUT/lr{5e-4,2e-3,4e-3}
}

# Guidance and temperature of each model on seed 0. The sampling seed is 1, so that what
# is chosen here is reported on other samples.
sampling() {
    for T in 0.5 0.6 0.7 0.8 0.9 1; do
        flags="--temperature $T --seed 1 --cfg-scales 1 1.5 2 3 4"
        mkdir -p $OUT/search/{sampled,argmax}-T$T
        once python sample.py --out $OUT/search/sampled-T$T --fine-top-k 0 $flags
        once python sample.py --out $OUT/search/sampled-T$T --model baseline $flags
        once python sample.py --out $OUT/search/argmax-T$T $flags
    done
    python tests/results.py best $OUT/search
}

# Table 1: CTF against its baseline at equal steps, three training seeds, 5,000 images.
table1() {
    for seed in 0 1 2; do
        train $OUT/seed$seed --seed $seed --keep 10
        judge $OUT/seed$seed
    done
    for way in paper paper-argmax tuned tuned-argmax; do
        python tests/results.py mean $OUT/seed{0,1,2}/$way
    done
}

# Train CTF and its baseline in a folder.
train() {
    once python ar_model.py --out "$@"
    once python aux_model.py --out "$@"
    once python ar_model.py --labels fine --out "$@"
}

# Sample and judge the models of a folder in four ways: at temperature 1 or at the best
# temperature, with sampled or argmax fine labels, each time at the best guidance.
# `sampling` finds that these settings are the same for all models.
PAPER="--num-samples 5000 --cfg-scales 2"
TUNED="--num-samples 5000 --cfg-scales 1.5 --temperature 0.5"
judge() {
    once python sample.py --out $1/paper $PAPER --fine-top-k 0
    once python sample.py --out $1/paper $PAPER --model baseline
    once python sample.py --out $1/paper-argmax $PAPER
    once python sample.py --out $1/tuned $TUNED --fine-top-k 0
    once python sample.py --out $1/tuned $TUNED --model baseline
    once python sample.py --out $1/tuned-argmax $TUNED
    for way in paper paper-argmax tuned tuned-argmax; do
        once python evaluate.py --out $1/$way
    done
}

# Table 1 again with another tokenizer, and the same judge.
tokenizers() {
    out=$OUT/tokenizer1
    once python tokenizer.py --out $out --seed 1
    once python cluster.py --out $out
    once cp $OUT/classifier.pt $out
    train $out
    judge $out
    for way in paper paper-argmax tuned tuned-argmax; do
        python tests/results.py rows $OUT/seed0/$way $out/$way
    done
}

# Equal seconds: the baseline for as long as CTF's two trainings take together. On the
# machine of RESULTS.md that is 2,150 steps.
equal_seconds() {
    for lr in 1e-3 2e-3; do
        once python ar_model.py --out $OUT/seconds/lr$lr --lr $lr --labels fine --steps 2150
    done
    python tests/results.py loss $OUT/seconds/lr*/baseline.pt
    for out in $OUT/seconds/lr1e-3 $OUT/seconds/lr2e-3; do
        once python sample.py --out $out/paper $PAPER --model baseline
        once python sample.py --out $out/tuned $TUNED --model baseline
        for way in paper tuned; do
            once python evaluate.py --out $out/$way
            python tests/results.py rows $OUT/seed0/$way $out/$way
        done
    done
}

# Why the baseline's samples are worse: two controls without training, after `table1`.
difference() {
    python tests/results.py coarse $OUT/seed{0,1,2}
    python tests/results.py refine $OUT/seed{0,1,2}/{paper,tuned}
}

# Figure 2: the ten copies of seed 0 that table1 keeps.
convergence() {
    for copy in $OUT/seed0/kept-*; do
        once python sample.py --out $copy --fine-top-k 0 --cfg-scales 2
        once python sample.py --out $copy --model baseline --cfg-scales 2
        once python evaluate.py --out $copy
    done
    python tests/results.py convergence $OUT/seed0
}

# The control of figure 1b, trained: random clusters.
random() {
    once python cluster.py --out $OUT/random --method random
    once python ar_model.py --out $OUT/random
    once python aux_model.py --out $OUT/random
    once python sample.py --out $OUT/random --fine-top-k 0
    once python evaluate.py --out $OUT/random
    python tests/results.py rows $OUT/random
}

# Table 3 (a): clusters M, with stage 1 trained for each. (c) is in the table of sampling.
table3a() {
    for M in 32 512 1024; do
        once python cluster.py --out $OUT/M$M --clusters $M
        once python ar_model.py --out $OUT/M$M
        once python aux_model.py --out $OUT/M$M
        once python sample.py --out $OUT/M$M --fine-top-k 0
        once python evaluate.py --out $OUT/M$M
    done
    python tests/results.py rows $OUT/M{32,512,1024}
}

# Table 3 (b): layers of stage 2. Stage 1 is that of $OUT.
table3b() {
    for layers in 1 4; do
        once python aux_model.py --out $OUT/layers$layers --layers $layers
        once python sample.py --out $OUT/layers$layers --fine-top-k 0
        once python evaluate.py --out $OUT/layers$layers
    done
    python tests/results.py rows $OUT/layers{1,4}
}

# Table 3 (d), (e), (f): top-k of stage 2, temperature of stage 1, of stage 2.
table3def() {
    for k in 1 8 32 0; do
        once python sample.py --out $OUT/topk$k --fine-top-k $k
        once python evaluate.py --out $OUT/topk$k
    done
    for T in 0.9 1.1; do
        once python sample.py --out $OUT/T$T --fine-top-k 0 --temperature $T
        once python evaluate.py --out $OUT/T$T
        once python sample.py --out $OUT/fineT$T --fine-top-k 0 --fine-temperature $T
        once python evaluate.py --out $OUT/fineT$T
    done
    python tests/results.py rows $OUT/topk{1,8,32,0} $OUT/T{0.9,1.1} $OUT/fineT{0.9,1.1}
}

# Learning rates for the sweep over the size K of the codebook, at M = 128 and 1,000
# steps of each model. Stage 1 has 128 labels at every K: its rate is chosen at K = 4096,
# with the tokenizer of $OUT. At K = 16384 a baseline takes 15 minutes of one core: its
# rate is chosen in 333 steps.
sweep_rates() {
    for K in 256 1024 16384; do
        once python tokenizer.py --out $OUT/K$K --codebook-size $K
        once python cluster.py --out $OUT/K$K
    done
    for lr in 5e-4 1e-3 2e-3 4e-3; do
        once python ar_model.py --out $OUT/K4096/lr$lr --lr $lr --steps 1000
    done
    for lr in 2e-3 4e-3 8e-3; do
        for K in 256 1024 4096; do
            once python ar_model.py --out $OUT/K$K/lr$lr --lr $lr --labels fine --steps 1000
        done
        once python ar_model.py --out $OUT/K16384/lr$lr --lr $lr --labels fine --steps 333
    done
    lr=16e-3 # where 8e-3, the end of the grid, is the best
    once python ar_model.py --out $OUT/K4096/lr$lr --lr $lr --labels fine --steps 1000
    once python ar_model.py --out $OUT/K16384/lr$lr --lr $lr --labels fine --steps 333
    python tests/results.py loss $OUT/K*/lr*/{coarse,baseline}.pt
}

# The sweep: both models for each K, at the learning rates that sweep_rates found. First
# the guidance (with sampling seed 1), then the scores at the best guidance.
sweep() {
    once cp $OUT/K4096/lr1e-3/coarse.pt $OUT/K4096
    for K in 256 1024 16384; do
        once cp $OUT/classifier.pt $OUT/K$K
        once python ar_model.py --out $OUT/K$K --steps 1000
    done
    once cp $OUT/K256/lr4e-3/baseline.pt $OUT/K256
    once cp $OUT/K1024/lr4e-3/baseline.pt $OUT/K1024
    once cp $OUT/K4096/lr8e-3/baseline.pt $OUT/K4096
    once python ar_model.py --out $OUT/K16384 --lr 8e-3 --labels fine --steps 1000
    for K in 256 1024 4096 16384; do
        once python aux_model.py --out $OUT/K$K
        mkdir -p $OUT/K$K/search
        search="--out $OUT/K$K/search --seed 1 --cfg-scales 1 1.5 2 3 4"
        once python sample.py $search --fine-top-k 0
        once python sample.py $search --model baseline
        python tests/results.py best $OUT/K$K/search
    done
    for K in 256 1024 4096; do
        once python sample.py --out $OUT/K$K --fine-top-k 0 --cfg-scales 3
    done
    once python sample.py --out $OUT/K16384 --fine-top-k 0 --cfg-scales 2
    once python sample.py --out $OUT/K256 --model baseline --cfg-scales 2
    once python sample.py --out $OUT/K1024 --model baseline --cfg-scales 3
    once python sample.py --out $OUT/K4096 --model baseline --cfg-scales 2
    once python sample.py --out $OUT/K16384 --model baseline --cfg-scales 3
    for K in 256 1024 4096 16384; do
        once python evaluate.py --out $OUT/K$K
    done
    python tests/results.py rows $OUT/K{256,1024,4096,16384}
    python tests/results.py coarse $OUT/K{256,1024,4096,16384}
}

# Table 2: speed with random weights, at the default size.
speed() {
    python tests/benchmark.py --batch-sizes 64
}

# CIFAR-10 at the paper's K and M on a GPU: about five minutes for a seed on an H200.
cifar_gpu() {
    out=$OUT/cifar-gpu
    once python tokenizer.py --data $CIFAR --out $out --codebook-size 16384 --steps 5000 --save-every 1000
    once python cluster.py --out $out --clusters 512
    size="--dim 384 --heads 6 --batch-size 128 --steps 3000 --save-every 500"
    for seed in 0 1 2; do
        once python ar_model.py --out $out/seed$seed --seed $seed --layers 6 $size --lr 5e-4
        once python aux_model.py --out $out/seed$seed --seed $seed --layers 4 $size --lr 5e-4
        once python ar_model.py --out $out/seed$seed --seed $seed --layers 6 $size --labels fine --lr 5e-4
        draw="--num-samples 10000 --batch-size 1000 --cfg-scales 1 1.5 2 2.5 3"
        mkdir -p $out/seed$seed/{sampled,argmax}
        once python sample.py --out $out/seed$seed/sampled --fine-top-k 0 $draw
        once python sample.py --out $out/seed$seed/argmax $draw
        once python sample.py --out $out/seed$seed/sampled --model baseline $draw
        for folder in $out/seed$seed/{sampled,argmax}/cfg*; do
            once python evaluate.py --out $folder --judge-steps 3000
        done
    done
    for way in sampled argmax; do
        for scale in 1 1.5 2 2.5 3; do
            python tests/results.py mean $out/seed{0,1,2}/$way/cfg$scale
        done
    done
}

# Learning rates for CIFAR-10 at the paper's K and M after a short training: 1,000 steps
# of stage 1 and 500 of stage 2 against 1,000 of the baseline. A baseline takes twenty
# minutes of one core, so its rate is chosen in 333 steps.
cifar_rates() {
    out=$OUT/cifar
    once python tokenizer.py --data $CIFAR --out $out --codebook-size 16384 --steps 1500
    once python cluster.py --out $out --clusters 512
    for lr in 5e-4 1e-3 2e-3 4e-3; do
        once python ar_model.py --out $out/lr$lr --lr $lr --dim 192 --steps 1000
    done
    for lr in 1e-3 2e-3 4e-3 8e-3; do
        once python aux_model.py --out $out/lr$lr --lr $lr --steps 500
        once python ar_model.py --out $out/lr$lr --lr $lr --dim 192 --steps 333 --labels fine
    done
    python tests/results.py loss $out/lr*/{coarse,fine,baseline}.pt
}

# CIFAR-10 after a short training, three seeds, at the learning rates that cifar_rates
# found. First the guidance, on seed 0 with another sampling seed; then the scores at the
# best guidance.
cifar() {
    out=$OUT/cifar
    for seed in 0 1 2; do
        once python ar_model.py --out $out/seed$seed --seed $seed --dim 192 --steps 1000
        once python aux_model.py --out $out/seed$seed --seed $seed --lr 2e-3 --steps 500
        once python ar_model.py --out $out/seed$seed --seed $seed --lr 2e-3 --dim 192 --steps 1000 --labels fine
    done
    search="--seed 1 --cfg-scales 1 1.5 2 3 4 6 8 12"
    mkdir -p $out/seed0/search/{sampled,argmax}
    once python sample.py --out $out/seed0/search/sampled --fine-top-k 0 $search
    once python sample.py --out $out/seed0/search/sampled --model baseline $search 16 24
    once python sample.py --out $out/seed0/search/argmax $search
    once python evaluate.py --out $out/seed0/search/argmax/cfg2 --judge-steps 3000 # trains the judge
    low="--temperature 0.8 --seed 1"
    mkdir -p $out/seed0/search/{sampled,argmax}-T0.8
    once python sample.py --out $out/seed0/search/sampled-T0.8 $low --model baseline --cfg-scales 2 4 8
    once python sample.py --out $out/seed0/search/sampled-T0.8 $low --fine-top-k 0 --cfg-scales 2 3 4
    once python sample.py --out $out/seed0/search/argmax-T0.8 $low --cfg-scales 2 3 4
    python tests/results.py best $out/seed0/search
    for seed in 0 1 2; do
        once python sample.py --out $out/seed$seed --fine-top-k 0 --cfg-scales 4
        once python sample.py --out $out/seed$seed --model baseline --cfg-scales 12
        once python evaluate.py --out $out/seed$seed --judge-steps 3000
        once python sample.py --out $out/seed$seed/argmax --cfg-scales 3
        once python evaluate.py --out $out/seed$seed/argmax --judge-steps 3000
    done
    python tests/results.py mean $out/seed{0,1,2}
    python tests/results.py mean $out/seed{0,1,2}/argmax
}

# CIFAR-10 at equal seconds: the baseline for as long as CTF's two trainings take
# together. On the machine of RESULTS.md that is 400 steps.
cifar_seconds() {
    out=$OUT/cifar/seconds
    once python ar_model.py --out $out --lr 2e-3 --dim 192 --steps 400 --labels fine
    mkdir -p $out/search
    once python sample.py --out $out/search --model baseline --seed 1 --cfg-scales 4 8 12 24
    python tests/results.py best $out/search
    once python sample.py --out $out --model baseline --cfg-scales 12
    once python evaluate.py --out $out --judge-steps 3000
    python tests/results.py rows $OUT/cifar/seed0 $out
}

# CIFAR-10 at the paper's K and M on two cores. The last three trainings take 80 minutes
# of one core for CTF and as much for the baseline.
cifar_two_hours() {
    out=$OUT/cifar
    once python tokenizer.py --data $CIFAR --out $out --codebook-size 16384 --steps 1500
    once python cluster.py --out $out --clusters 512
    once python ar_model.py --out $out --dim 192 --steps 10000
    once python aux_model.py --out $out --steps 5000 --lr 1e-3
    once python ar_model.py --out $out --dim 192 --steps 4000 --labels fine
    once python sample.py --out $out --cfg-scales 1.5 2 3
    once python sample.py --out $out --cfg-scales 2 3 4 6 8 --model baseline
    for folder in $out/cfg*; do
        once python evaluate.py --out $folder --judge-steps 3000
    done
    python tests/results.py rows $out/cfg*
}

for name in "$@"; do
    $name
done
