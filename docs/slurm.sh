#!/bin/bash
# Trains one recipe on one Slurm node or several, and goes on in a new time slot until the run is finished.
#
#   sbatch docs/slurm.sh --config gpt2_124m                 # what follows slurm.sh goes to train.py
#   sbatch --nodes=4 --gpus-per-node=4 --time=04:00:00 docs/slurm.sh --config gpt2_1558m
#
# Submit it in the repository's folder, with the Python environment active (sbatch takes both along); code, data and
# run folder have to lie on a file system that all nodes share. The number of all GPUs has to divide the recipe's
# grad_accum_steps. Three minutes before the time limit every rank stops after its update and rank 0 saves; then the job
# goes back into the queue. So it does when --max_minutes are over. A run that fails is not queued again.
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

# train.py's own answer to where the run lies; a mistake in the settings ends the job here
run=$(python -c 'import sys, config
from flatgpt.cli import cli
cli.run_script(lambda words: print(config.run_dir(cli.parse(config.TrainConfig, words))), sys.argv[1:])' "$@") || exit

progress() { # "True 500" of a finished run, "False 300" of one that is not, nothing before the first checkpoint
    python -c 'import json, sys; state = json.load(open(sys.argv[1])); print(state["finished"], state["iter"])' \
        "$run/ckpt/last/state.json" 2>/dev/null
}

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # else some restarts fail: a third of those of Gloo ranks, tried
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120   # seconds to save in, once stopped; torchrun's own 30 are short for GPT-2 XL
# scancel reaches each node's torchrun, which tells its ranks; srun would answer a SIGTERM of its own by SIGKILL to all
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
while kill -0 "$step" 2>/dev/null; do # the signal ended the wait, not the step
    wait "$step"
    status=$?
done

[[ $status != 0 && -z $signalled ]] && exit "$status"        # torchrun exits 1 after any signal, also a clean stop
after=$(progress)
[[ $status == 0 && $after == True* ]] && exit 0
[[ $after == "$before" ]] && echo "nothing was saved in this time slot: not queued again" >&2 && exit 1
exec scontrol requeue "$SLURM_JOB_ID"
