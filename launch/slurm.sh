#!/bin/bash
# sbatch --nodes=2 --gpus-per-node=8 launch/slurm.sh recipe=qwen2_5_omni_lora data.path=my.jsonl output_dir=/shared/mine
#
# One launcher per node, one process per GPU; arguments after the script's name are those of train.py. Submit from the
# repository's root with the environment active: sbatch keeps both. Code, data and output_dir must be on a file system
# that all nodes share. Account, partition and --time depend on the site: pass them before the script's name.
#
#   CONFIG=launch/deepspeed_zero3.yaml sbatch ...   instead of launch/multi_node.yaml
#   PROCESSES_PER_NODE=4 sbatch ...                 instead of the number of GPUs of a node
#
# Before the time limit Slurm sends USR1 to this script. It then signals train.py to finish its step and save, and
# requeues the job, which resumes. The time between signal and limit must be enough for the longest step and its
# checkpoint; --signal=B:USR1@900 makes it 15 minutes. A preempted job or one whose node failed is requeued by Slurm and
# loses the steps after its last checkpoint, unless the site has PreemptParameters=send_user_signal.

#SBATCH --job-name=omnimem
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail

# `wait` returns early when a trapped signal arrives, so it is repeated while the process runs.
status_of() {
    while kill -0 "$1" 2>/dev/null; do wait "$1"; done
    wait "$1"
}

# Runs on every node. srun sends a signal to all processes of a node, and a launcher that receives TERM kills training
# after 30 s. So only this shell handles USR1, and it sends TERM (finish the step and save) to train.py only.
on_node() {
    (trap '' USR1 && exec accelerate launch --machine_rank "$SLURM_NODEID" "$@") &
    launcher=$!
    trap 'pkill -TERM -P "$launcher"' USR1
    status_of "$launcher"
}

nodes=$SLURM_JOB_NUM_NODES
each=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:?has no value: ask for --gpus-per-node, or set PROCESSES_PER_NODE}}
read -r main_address < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# srun starts all nodes, so DeepSpeed must not start them over ssh (launcher "standard"). The port depends on the job,
# because jobs may share a node. With --kill-on-bad-exit the other nodes do not wait for one that failed.
srun --nodes="$nodes" --ntasks="$nodes" --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
    bash -c "$(declare -f status_of on_node); on_node \"\$@\"" on_node \
    --config_file "${CONFIG:-launch/multi_node.yaml}" --num_machines "$nodes" --num_processes $((nodes * each)) \
    --main_process_ip "$main_address" --main_process_port $((20000 + SLURM_JOB_ID % 10000)) \
    --same_network --deepspeed_multinode_launcher standard train.py "$@" &
step=$!
asked=
trap 'asked=yes; kill -USR1 "$step"' USR1

status=0
status_of "$step" || status=$?
# A stopped run exits with an error; a run whose last step was just done does not.
if [[ -n $asked && $status -ne 0 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
