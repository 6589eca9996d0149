#!/bin/bash
# Pretrains on machines that may come and go: when a rank or a machine is lost, all ranks start again from the newest
# checkpoint, on the machines that are left. Run the same line on every machine:
#
#   NODES=2:4 RANKS=8 ENDPOINT=host-of-one:29500 recipes/launch/elastic.sh OUT [options of train.pretrain]
#
#   NODES      fewest and most machines [1:1]
#   RANKS      processes on each, one for each GPU [1]
#   ENDPOINT   where they meet: a machine that stays, and a free port of it [localhost:29500]
#   RESTARTS   how many losses to bear [3]
#   PYTHON     the interpreter [python]
#
# Run it from the repository's root. OUT must be seen by all machines; where it holds a run, that is resumed.
#
# Batch normalisation sees the same parts of a batch on any number of ranks, so that it stays the same run: give
# --bn-groups, and only NODES whose ranks share its parts evenly. The number of the most ranks there may be is a good
# one, if every smaller number that may occur divides it; without it a run keeps the number of ranks that it began with,
# and refuses others that do not divide that. --batch-size is that of all ranks together, and every number of ranks must
# divide it as well. On another number of ranks sums have another order: the run goes on, but not to the same bits.
set -u

out=${1:?"usage: [NODES=..] [RANKS=..] [ENDPOINT=..] $0 OUT [options of train.pretrain]"}
shift
export OUT=$out PYTHON=${PYTHON:-python}

# Asked at every start, as the run that a restart resumes may not have been there at the first.
rank='
    resume=()
    if [ -e "$OUT/config.yaml" ]; then resume=(--resume); fi
    exec "$PYTHON" -m train.pretrain "$@" --out "$OUT" ${resume[@]+"${resume[@]}"}'

exec torchrun --nnodes="${NODES:-1:1}" --nproc-per-node="${RANKS:-1}" --max-restarts="${RESTARTS:-3}" \
    --rdzv-backend=c10d --rdzv-endpoint="${ENDPOINT:-localhost:29500}" --rdzv-id="$(basename "$out")" \
    --no-python bash -c "$rank" rank "$@"
