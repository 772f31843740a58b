#!/usr/bin/env bash
# Commands of the tables in .github/RESULTS.md, one function per table.
#
#     bash tests/experiments/reproduce.sh                    # the list of names
#     bash tests/experiments/reproduce.sh default random     # two of them
#     bash tests/experiments/reproduce.sh -j 2 table1_digits # two commands at a time
#
# They run in $OUT (default: out) and its sub-folders, with one thread each (speed: with
# all). What the tables of rates_* and sampling_* choose is written into the settings
# below, by hand, before the next functions are called. Tables go to stdout, all else to
# stderr, and a copy of the tables and of each metrics.json behind them to $OUT/results.
# The script can be stopped and called again: a finished command is skipped, and a
# training continues from its last save. (To train with other settings, delete the
# folder.) Marks in .done folders say which command made a file, at which commit of the
# six scripts. It needs bash 4.4 and flock.
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-out}
CIFAR=${CIFAR:-cifar10} # or a folder of class folders, with the photographs as files

list() { # name, minutes of one core, what it shows, (what it needs)
    cat <<'END'
default                     45  what a reader sees: the README's commands and the baseline's
random                      20  random clusters, trained (default, or the README's commands)
rates_digits               240  learning rates of all models, seed 0 (default)
sampling_digits             95  guidance, temperature and top-p, seed 0 (rates_digits)
table1_digits              260  CTF against its baseline, seeds 1 to 5 (sampling_digits)
ablations                   80  clusters, layers, top-k, temperatures (table1_digits)
convergence                 30  figure 2, the copies of seed 1 (table1_digits)
second_tokenizer            90  table 1 with another tokenizer, two seeds (default)
rates_k                    300  learning rates for three sizes K of the codebook (default)
over_k                     110  CTF against its baseline over K, seeds 1 and 2 (rates_k)
speed                       10  table 2; nothing else may run beside it
photographs                 55  default, on CIFAR-10
rates_photographs          200  as for digits (photographs)
sampling_photographs        95  as for digits (rates_photographs)
table1_photographs         260  as for digits (sampling_photographs)
END
}

# ------------------------------------------------------------------------- The settings

# The grids to choose from, and what the tables of rates_* and sampling_* chose on seed
# 0. A grid is extended until the best lies inside it.
RATES="5e-4 1e-3 2e-3 4e-3 8e-3" # of stage 2, whose default is 3e-3, and over K
TEMPERATURES="0.4 0.5 0.6 0.7 0.8 0.9 1 1.1 1.2"
MANY="--num-samples 5000"
declare -A plain tuned # guidance and temperature, 1 or the best; then other flags
# Over K: the learning rate and guidance of stage 1, and of the baseline.
declare -A for_k=(
    [1024]="4e-3 4 2e-3 3" [4096]="2e-3 3 8e-3 2" [16384]="1e-3 3 2e-3 4")

settings_digits() {
    out=$OUT first=default judge_steps=800
    rates="5e-4 2e-3 4e-3 8e-3" # stage 1, the baseline; 1e-3 is the default
    guidance="1 1.5 2 2.5 3" near="1 1.25 1.5 1.75 2 2.5"
    lr1=2e-3 lr2=4e-3 lrb=4e-3 # learning rates of stage 1, stage 2, the baseline
    plain=([ctf]="2 1" [baseline]="1.75 1")
    tuned=([ctf]="1.5 0.6 --top-p 0.9" [baseline]="1.75 0.6 --top-p 0.9")
}

settings_photographs() {
    out=$OUT/photographs first=photographs judge_steps=3000
    rates="5e-4 2e-3 4e-3 8e-3"
    guidance="1 2 3 4 6 8 12" near="1.5 2 2.5 3 3.5 4"
    lr1=1e-3 lr2=3e-3 lrb=4e-3
    plain=([ctf]="3 1" [baseline]="3 1")
    tuned=([ctf]="3 1" [baseline]="2 0.9")
}

# --------------------------------------------------------------------------- The tables

default() { everything; }
photographs() { everything --data "$CIFAR"; }
everything() { # FLAGS of tokenizer.py
    once tokenizer.py "$out" "$@"
    once cluster.py "$out"
    once ar_model.py "$out"
    once aux_model.py "$out"
    once ar_model.py "$out" --labels fine
    draw ctf "$out" 2 1
    draw baseline "$out" 2 1
    judge "$out"
    table mean "$out"
}

draw() { # WHAT FOLDER GUIDANCE TEMPERATURE FLAGS
    local flags=(--cfg-scale $3 --temperature $4 "${@:5}")
    [ $1 != baseline ] || flags+=(--model baseline)
    once sample.py "$2" "${flags[@]}"
}

judge() { # FOLDERS
    local to
    for to in "$@"; do once evaluate.py "$to" --judge-steps $judge_steps; done
}

rates() {
    need "$out/metrics.json" $first
    need "$out/baseline.png" $first # the last file that a training writes
    local lr s folder to=$out/rates
    for lr in $rates; do
        once ar_model.py "$to/lr$lr" --lr $lr
        once ar_model.py "$to/lr$lr" --lr $lr --labels fine
    done
    for lr in $RATES; do once aux_model.py "$to/fine-lr$lr" --lr $lr; done
    settle
    for folder in "$to"/{default,lr*,fine-lr*}; do
        for s in $guidance; do
            draw ctf "$folder/cfg$s" $s 1
            [[ $folder = *fine-* ]] || draw baseline "$folder/cfg$s" $s 1
        done
    done
    table best "$to"/{default,lr*,fine-lr*}
}

sampling() { # temperature and guidance of the models with the chosen rates
    need "$OUT/.done/rates$suffix" rates$suffix
    local what T s way to folders=()
    for what in ctf baseline; do
        to=$out/sampling/$what-$lr1-$lr2-$lrb
        mkdir -p "$to"
        # The models with the default rates are in $out.
        [ $lr1 = 1e-3 ] || cp "$out/rates/lr$lr1/coarse.pt" "$to"
        [ $lr2 = 3e-3 ] || cp "$out/rates/fine-lr$lr2/fine.pt" "$to"
        [ $lrb = 1e-3 ] || cp "$out/rates/lr$lrb/baseline.pt" "$to"
        for T in $TEMPERATURES; do
            for s in $near; do draw $what "$to/T$T-cfg$s" $s $T; done
        done
        # Top-p at the chosen settings: once they are written above, call it again.
        for way in plain tuned; do
            local -n how=$way
            read -r s T _ <<<"${how[$what]}"
            draw $what "$to/$way-top-p" $s $T --top-p 0.9
        done
        folders+=("$to")
    done
    table best "${folders[@]}"
}

table1() {
    need "$OUT/.done/sampling$suffix" sampling$suffix
    local seed way
    for seed in {1..5}; do train "$out/seed$seed" --seed $seed --keep 10; done
    four_ways "$out"/seed{1..5}
    for way in {plain,tuned}{,-argmax}; do table mean "$out"/seed{1..5}/$way; done
    table compare "$out"/seed{1..5}/plain{,-argmax}
    table compare "$out"/seed{1..5}/tuned{,-argmax}
    table coarse "$out"/seed{1..5}
    table refine "$out"/seed{1..5}/{plain,tuned}
}

train() { # FOLDER FLAGS: CTF and its baseline, with the chosen rates
    once ar_model.py "$1" --lr $lr1 "${@:2}"
    once aux_model.py "$1" --lr $lr2 "${@:2}"
    once ar_model.py "$1" --lr $lrb --labels fine "${@:2}"
}

four_ways() { # FOLDERS of models: samples at temperature 1 and tuned, sampled and argmax
    local folder way
    for folder in "$@"; do
        for way in plain tuned; do
            local -n how=$way
            draw ctf "$folder/$way" ${how[ctf]} $MANY
            draw ctf "$folder/$way-argmax" ${how[ctf]} $MANY --fine-top-k 1
            draw baseline "$folder/$way" ${how[baseline]} $MANY
        done
    done
    for folder in "$@"; do judge "$folder"/{plain,tuned}{,-argmax}; done
}

random() {
    need "$out/metrics.json" $first
    clusters random --method random
    table rows "$out/random"
}

clusters() { # NAME FLAGS: CTF on other clusters, seed 1
    once cluster.py "$out/$1" "${@:2}"
    once ar_model.py "$out/$1" --seed 1 --lr $lr1
    once aux_model.py "$out/$1" --seed 1 --lr $lr2
    draw ctf "$out/$1" ${plain[ctf]} $MANY
    judge "$out/$1"
}

ablations() { # of seed 1; how much seeds differ is in table 1
    need "$OUT/.done/table1_digits" table1_digits
    local M layers k T one=$out/seed1 flags="${plain[ctf]} $MANY"
    clusters random --method random
    for M in 32 256 512; do clusters M$M --clusters $M; done
    for layers in 1 4; do
        once aux_model.py "$one/layers$layers" --seed 1 --lr $lr2 --layers $layers
        draw ctf "$one/layers$layers" $flags
    done
    for k in 1 8 32; do draw ctf "$one/top-k$k" $flags --fine-top-k $k; done
    for T in 0.9 1.1; do draw ctf "$one/T$T" $flags --temperature $T; done
    for T in 0.9 1.1; do draw ctf "$one/fine-T$T" $flags --fine-temperature $T; done
    set -- "$one"/{layers{1,4},top-k{1,8,32},T{0.9,1.1},fine-T{0.9,1.1}}
    judge "$@"
    table rows "$out"/{random,M32,seed1/plain,M256,M512} "$@"
}

convergence() {
    need "$OUT/.done/table1_digits" table1_digits
    local copy
    for copy in "$out"/seed1/kept-*; do
        draw ctf "$copy" ${tuned[ctf]}
        draw baseline "$copy" ${tuned[baseline]}
    done
    judge "$out"/seed1/kept-*
    table convergence "$out"/seed1/kept-*
}

second_tokenizer() { # the primary comparison; that of the first tokenizer is table 1
    need "$out/metrics.json" default
    local seed to=$out/tokenizer1
    once tokenizer.py "$to" --seed 1
    once cluster.py "$to"
    for seed in 1 2; do train "$to/seed$seed" --seed $seed; done
    settle
    cp "$out/classifier.pt" "$to" # the same judge
    for seed in 1 2; do
        draw ctf "$to/seed$seed" ${tuned[ctf]} $MANY
        draw baseline "$to/seed$seed" ${tuned[baseline]} $MANY
    done
    judge "$to"/seed{1,2}
    table rows "$to"/seed{1,2}
}

rates_k() { # 1,000 steps; K = 4096 has the tokenizer and the clusters of $out
    need "$out/metrics.json" default
    local K lr s to
    for K in 1024 4096 16384; do
        to=$out/K$K
        [ $K = 4096 ] || once tokenizer.py "$to" --codebook-size $K
        [ $K = 4096 ] || once cluster.py "$to"
        once aux_model.py "$to"
        for lr in $RATES 16e-3; do
            once ar_model.py "$to/lr$lr" --steps 1000 --lr $lr
            once ar_model.py "$to/lr$lr" --steps 1000 --lr $lr --labels fine
        done
        settle
        cp "$out/classifier.pt" "$to" # the same judge
        for lr in $RATES 16e-3; do
            for s in 1 1.5 2 3 4 6; do
                draw ctf "$to/lr$lr/cfg$s" $s 1
                draw baseline "$to/lr$lr/cfg$s" $s 1
            done
        done
        table best "$to"/lr*
    done
}

over_k() {
    need "$OUT/.done/rates_k" rates_k
    local K seed to lr1 cfg1 lrb cfgb
    for K in 1024 4096 16384; do
        read -r lr1 cfg1 lrb cfgb <<<"${for_k[$K]}"
        for seed in 1 2; do
            to=$out/K$K/seed$seed
            once ar_model.py "$to" --steps 1000 --seed $seed --lr $lr1
            once aux_model.py "$to" --seed $seed
            once ar_model.py "$to" --steps 1000 --seed $seed --lr $lrb --labels fine
            draw ctf "$to" $cfg1 1 $MANY
            draw baseline "$to" $cfgb 1 $MANY
            judge "$to"
        done
    done
    table rows "$out"/K{1024,4096,16384}/seed{1,2}
    table coarse "$out"/K{1024,4096,16384}/seed{1,2}
}

speed() {
    local text
    text=$(env -u OMP_NUM_THREADS python tests/experiments/benchmark.py --batch-sizes 64)
    print "$text"
}

# ------------------------------------------------------------------------ How they run

# Run a script on a folder, unless its file there is from the same command: up to $J at
# a time. Only commands of one kind run together: each stage needs those before it.
once() { # SCRIPT FOLDER FLAGS
    local kind=${1/aux_/ar_} text="$1 ${*:3}" file=${1%.py}
    [ "$kind" = "$running" ] || settle
    running=$kind
    case "$text" in
        *"--labels fine"* | *"--model baseline"*) file+=-baseline ;;
        evaluate.py*) text+=$(cat "$2"/.done/sample*) ;; # of these samples
    esac
    local mark="$2/.done/$file"
    [ ! -e "$mark" ] || [ "$(<"$mark")" != "$text" ] || return 0
    rm -f "$mark"
    while [ "$(jobs -rp | wc -l)" -ge "$J" ]; do wait -n || exit 1; done
    echo "+ $*" >&2
    carry_out "$mark" "$text" "$@" &
    marks+=("$mark") jobs+=($!)
}

carry_out() { # MARK ITS_TEXT SCRIPT FOLDER FLAGS
    local mark=$1 text=$2 checkpoint=none resume=
    shift
    case "$2 ${*:4}" in
        tokenizer.py*) checkpoint=tokenizer.pt ;;
        ar_model.py*"--labels fine"*) checkpoint=baseline.pt ;;
        ar_model.py*) checkpoint=coarse.pt ;;
        aux_model.py*) checkpoint=fine.pt ;;
    esac
    [ ! -e "$3/$checkpoint" ] || resume=--resume # of a stopped or a finished training
    python "$2" --out "$3" "${@:4}" $resume >&2 || {
        echo "error: this failed: python $2 --out $3 ${*:4}" >&2
        kill $$ # the script, and with it what runs beside this
        exit 1
    }
    mkdir -p "$3/.done"
    echo "$text" >"$mark"
}

# Wait for all that runs. All of it must have finished.
settle() {
    local mark
    wait
    for mark in "${marks[@]}"; do [ -e "$mark" ] || exit 1; done
    marks=() jobs=()
}

# Print a table of results.py, and collect the metrics.json behind it.
table() { # COMMAND PATHS
    settle
    local path run text
    text=$(python tests/experiments/results.py "$@")
    print "$text"
    for path in "${@:2}"; do
        run=${path#"$OUT"/}
        copy "$path/metrics.json" "$OUT/results/$name/${run//\//-}.json"
    done
}

print() { # TEXT
    mkdir -p "$OUT/results/$name"
    printf '%s\n\n' "$1" | tee -a "$OUT/results/$name/tables.md"
}

copy() { [ ! -e "$1" ] || cp "$1" "$2"; } # FILE TO, if there is such a file

need() { [ -e "$1" ] || stop "$name needs $1: run $2 first"; } # FILE NAME

stop() { echo "error: $*" >&2 && exit 1; }

J=1 running='' marks=() jobs=()
if [ "${1:-}" = -j ]; then
    [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || stop "usage: reproduce.sh [-j N] NAME ..."
    J=$2
    shift 2
fi
[ $# != 0 ] || { list && exit; }
names=" $(list | cut -d ' ' -f 1 | tr '\n' ' ')"
for name in "$@"; do
    [[ $names = *" $name "* ]] || stop "$name is none of$names"
done

commit=$(git log -1 --abbrev=12 --format=%h -- ':(glob)*.py')
git diff --quiet HEAD -- ':(glob)*.py' || stop "commit the changes of the scripts first"
mkdir -p "$OUT/.done"
exec 9>"$OUT/.done/lock"
flock -n 9 || stop "another call works in $OUT"
[ -e "$OUT/.done/commit" ] || echo "$commit" >"$OUT/.done/commit"
made=$(<"$OUT/.done/commit")
[ "$made" = "$commit" ] ||
    stop "$OUT/.done belongs to commit $made, the scripts to $commit: set another OUT"

export OMP_NUM_THREADS=1
set -m # each job is a process group, which ends with this script
trap '[ ${#jobs[@]} = 0 ] || kill -- "${jobs[@]/#/-}" 2>/dev/null' EXIT
trap 'exit 1' INT TERM
for name in "$@"; do
    suffix=_digits
    [[ $name != *photographs ]] || suffix=_photographs
    settings$suffix
    rm -rf "$OUT/results/$name" "$OUT/.done/$name"
    ${name%$suffix}
    settle
    touch "$OUT/.done/$name"
done
