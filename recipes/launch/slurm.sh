#!/bin/bash
# Pretrains on the GPUs of several machines under Slurm, and resumes automatically after a time limit or a preemption.
#
#   sbatch --nodes=4 --gpus-per-node=8 --time=24:00:00 recipes/launch/slurm.sh OUT [options of train.pretrain]
#
# Submit it from the repository's root, in an environment with the project's torchrun. OUT must be on a file system that
# all machines share. A run in OUT is resumed, so the same command starts and continues it. Two minutes before the time
# limit the ranks receive SIGUSR1; they save and exit with code 0, and the job is requeued.
#SBATCH --job-name=dspnet-pretrain
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -u

out=${1:?"usage: sbatch [options of sbatch] $0 OUT [options of train.pretrain]"}
shift
resume=()
if [ -e "$out/config.yaml" ]; then resume=(--resume); fi
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((29500 + SLURM_JOB_ID % 1000))

# On every machine: torchrun, which USR1 would end and which therefore ignores it, and a shell that forwards USR1 to
# the ranks. Traps come before what they signal, which may be ready earlier than this shell's next line.
on_machine='
    trap "pkill -USR1 -P \$!" USR1
    (trap "" USR1; exec torchrun "$@") &
    launcher=$!
    while wait $launcher; code=$?; [ $code -gt 128 ] && kill -0 $launcher 2> /dev/null; do :; done
    exit $code'

noticed=
trap 'noticed=1; kill -USR1 $!' USR1 # srun forwards it
srun --kill-on-bad-exit=1 bash -c "$on_machine" machine \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-backend=c10d --rdzv-endpoint="$head:$port" --rdzv-id="$SLURM_JOB_ID" \
    -m train.pretrain "$@" --out "$out" ${resume[@]+"${resume[@]}"} &
step=$!
while wait $step; code=$?; [ $code -gt 128 ] && kill -0 $step 2> /dev/null; do :; done

if [ "$noticed" ] && [ $code = 0 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
