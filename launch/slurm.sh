#!/bin/bash
# sbatch --nodes=2 --gpus-per-node=8 launch/slurm.sh recipe=qwen2_5_omni_lora data.path=my.jsonl output_dir=/shared/mine
#
# One launcher a node, one process a GPU; what follows the script's name goes to train.py. Submit from the repository's
# root with the environment active: sbatch passes both on. Code, data and output_dir must be on a file system that all
# nodes share. Account, partition and --time are the site's and go on the command line, before the script's name.
#
#   CONFIG=launch/deepspeed_zero3.yaml sbatch ...   another configuration than launch/multi_node.yaml
#   PROCESSES_PER_NODE=4 sbatch ...                 another number than the GPUs of a node
#
# Before its time is over, Slurm sends USR1 to this script. train.py is then asked to end its step and save, and the job
# is queued again: it goes on from there. The time before the limit has to hold the longest step and its checkpoint;
# --signal=B:USR1@900 makes it 15 minutes. A preempted job or one whose node failed is queued again by Slurm and loses
# what came after its last checkpoint, unless the site has PreemptParameters=send_user_signal.

#SBATCH --job-name=omnimem
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail

# `wait` returns early when a trapped signal arrives, so it is asked again as long as the process lives.
status_of() {
    while kill -0 "$1" 2>/dev/null; do wait "$1"; done
    wait "$1"
}

# What runs on every node. srun passes a signal to all processes there, and a launcher that gets TERM leaves training
# half a minute, so USR1 is for this shell alone, and TERM, which ends a step and saves, for train.py alone.
on_node() {
    (trap '' USR1 && exec accelerate launch --machine_rank "$SLURM_NODEID" "$@") &
    launcher=$!
    trap 'pkill -TERM -P "$launcher"' USR1
    status_of "$launcher"
}

nodes=$SLURM_JOB_NUM_NODES
each=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:?has no value: ask for --gpus-per-node, or set PROCESSES_PER_NODE}}
read -r main_address < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# DeepSpeed would start the other nodes over ssh; here srun has. The port differs between jobs that share a node. With
# --kill-on-bad-exit the other nodes do not wait for one that failed.
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
# A run that was asked to stop ends with an error; one that was done in that very step does not.
if [[ -n $asked && $status -ne 0 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
