#!/bin/bash
# Pretrains on a varying number of machines. After the loss of a rank or a machine, all ranks restart from the newest
# checkpoint on the remaining machines. Run the same command on every machine:
#
#   NODES=2:4 RANKS=8 ENDPOINT=host-of-one:29500 recipes/launch/elastic.sh OUT [options of train.pretrain]
#
#   NODES      minimum and maximum number of machines [1:1]
#   RANKS      processes per machine, one per GPU [1]
#   ENDPOINT   rendezvous: a machine that always runs, and a free port on it [localhost:29500]
#   RESTARTS   maximum number of restarts [3]
#   PYTHON     Python interpreter [python]
#
# Run it from the repository's root. OUT must be on a file system that all machines share; a run in it is resumed.
#
# Ghost batch norm groups must not depend on the number of ranks: give --bn-groups, and NODES such that every possible
# number of ranks divides it. The maximum number of ranks is a good value if all smaller possible numbers divide it.
# Without --bn-groups a run keeps the number of groups of its first start and refuses numbers of ranks that do not divide
# it. Every number of ranks must also divide --batch-size, which is the batch size over all ranks. Another number of
# ranks sums in another order, so the run continues with other rounding errors.
set -u

out=${1:?"usage: [NODES=..] [RANKS=..] [ENDPOINT=..] $0 OUT [options of train.pretrain]"}
shift
export OUT=$out PYTHON=${PYTHON:-python}

# Tested at every restart: the run may not have existed at the first start.
rank='
    resume=()
    if [ -e "$OUT/config.yaml" ]; then resume=(--resume); fi
    exec "$PYTHON" -m train.pretrain "$@" --out "$OUT" ${resume[@]+"${resume[@]}"}'

exec torchrun --nnodes="${NODES:-1:1}" --nproc-per-node="${RANKS:-1}" --max-restarts="${RESTARTS:-3}" \
    --rdzv-backend=c10d --rdzv-endpoint="${ENDPOINT:-localhost:29500}" --rdzv-id="$(basename "$out")" \
    --no-python bash -c "$rank" rank "$@"
