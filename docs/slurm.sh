#!/bin/bash
# Trains a recipe on one or more Slurm nodes, and requeues itself until the run is finished.
#
#   sbatch docs/slurm.sh --config gpt2_124m                 # arguments after slurm.sh go to train.py
#   sbatch --nodes=4 --gpus-per-node=4 --time=04:00:00 docs/slurm.sh --config gpt2_1558m
#
# Submit it in the repository's folder, with the Python environment active (sbatch passes both on). Code, data and run
# folder must be on a file system shared by all nodes. The total number of GPUs must divide the recipe's
# grad_accum_steps. Three minutes before the time limit, or after --max_minutes, the ranks finish their update, rank 0
# saves, and the job is requeued. A failed run is not requeued.
#SBATCH --job-name=flatgpt
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

set -uo pipefail

set -- "$@" --resume auto

# the run's folder, computed as train.py does; an error in the settings ends the job here
run=$(python -c 'import sys, config
from flatgpt.cli.cli import parse, run_script
from flatgpt.interop.pretrained import run_settings
run_script(lambda words: print(config.run_dir(parse(config.TrainConfig, words, None, run_settings))), sys.argv[1:])' \
    "$@") || exit

progress() { # "True 500" if the run is finished, else "False 300"; nothing before the first checkpoint
    python -c 'import pathlib, sys; from flatgpt.runs.history import read
state = read(pathlib.Path(sys.argv[1])).state; print(state["finished"], state["iter"])' "$run" 2>/dev/null
}

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # otherwise some restarts fail (a third of them in a test with Gloo)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120   # seconds for saving after a stop; the default, 30, is short for GPT-2 XL
# scancel signals the torchrun of each node, which stops its ranks; srun would answer SIGTERM with SIGKILL to all
signalled=
trap 'signalled=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

before=$(progress)
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --wait=60 python -m torch.distributed.run \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="$SLURM_GPUS_ON_NODE" --max_restarts=3 \
    --rdzv_backend=c10d --rdzv_endpoint="$head:$((20000 + SLURM_JOB_ID % 10000))" --rdzv_id="$SLURM_JOB_ID" \
    train.py "$@" &
step=$!
wait "$step"
status=$?
while kill -0 "$step" 2>/dev/null; do # wait was interrupted by the signal; the step still runs
    wait "$step"
    status=$?
done

[[ $status != 0 && -z $signalled ]] && exit "$status"        # after a signal torchrun exits 1, even if the ranks saved
after=$(progress)
[[ $status == 0 && $after == True* ]] && exit 0
[[ $after == "$before" ]] && echo "nothing was saved in this time slot: not requeued" >&2 && exit 1
exec scontrol requeue "$SLURM_JOB_ID"
