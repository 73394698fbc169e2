#!/bin/bash
# sbatch cluster/slurm.sh train cartpole collect.workers=24 --out "$HOME/runs/cartpole": a Ray cluster on the nodes of one
# SLURM job, and a raywm command on it. RAYWM_VENV names the virtual environment with raywm[cluster], on a disk that all
# nodes see. A preempted job is queued again and goes on with --resume. Ray 2.60.0.
#SBATCH --job-name=raywm
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --open-mode=append
set -euo pipefail
: "${RAYWM_VENV:=$HOME/venv}"
export PATH="$RAYWM_VENV/bin:$PATH" RAY_AUTH_MODE=token
ray get-auth-token --generate >/dev/null 2>&1 # ~/.ray/auth_token, which all nodes see in a shared home

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')
port=$((10000 + SLURM_JOB_ID % 20000)) # several jobs may share a node's ports
export RAY_ADDRESS="$ip:$port"

# shellcheck disable=SC2016 # the nodes say what they have
label='--labels=raywm=$(nvidia-smi -L >/dev/null 2>&1 && echo learn || echo collect)'
cpus="--num-cpus=${SLURM_CPUS_ON_NODE:-1}"
srun --nodes=1 --ntasks=1 --nodelist="$head" \
  bash -c "exec ray start --head --block --node-ip-address=$ip --port=$port $cpus $label" &
if [ "${#nodes[@]}" -gt 1 ]; then
  sleep 15 # a node that finds no head gives up
  srun --nodes=$((${#nodes[@]} - 1)) --ntasks=$((${#nodes[@]} - 1)) --exclude="$head" \
    bash -c "exec ray start --block --address=$ip:$port $cpus $label" &
fi

# raywm says at once what a cluster lacks, so wait until all nodes are there.
timeout 600 python - "${#nodes[@]}" <<'PYTHON'
import sys, time
import ray

while True:
    try:
        ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
        break
    except Exception:  # not up yet
        time.sleep(2)
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]):
    time.sleep(1)
PYTHON

# exec: SLURM's TERM goes to raywm, which then ends in order, and its end ends the job and the nodes' Ray.
exec raywm "$@" --address auto --resume
