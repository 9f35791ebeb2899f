#!/bin/bash
# Runs a search on one GPU node, and goes on after time limits and preemptions:
#
#     sbatch scripts/slurm_search.sh STUDY.yaml [--storage DIR] [--trials N] …
#
# The same command starts a study and resumes it, so a requeued job needs no thought. Two minutes
# before the time limit the search is interrupted and the job put back into the queue; a kill that
# comes without warning loses the answers in flight and nothing else. Options of sbatch given on
# its command line (partition, account, GPU type) go before those below.
#SBATCH --job-name=evomerge
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=128G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -u

if [ $# -eq 0 ]; then
    echo "usage: sbatch $0 STUDY.yaml [options of evomerge search]" >&2
    exit 2
fi

# The environment of `make venv` where the job was submitted, else whatever is active.
evomerge=${EVOMERGE:-.venv/bin/evomerge}
command -v "$evomerge" >/dev/null || evomerge=evomerge

requeue=no
interrupt() { kill -INT "$search" 2>/dev/null; }
trap 'requeue=yes; interrupt' USR1 # the time limit is near
trap interrupt TERM                # preempted: Slurm puts the job back itself

# Job control, because a shell without it starts what runs in the background deaf to SIGINT.
set -m
"$evomerge" search "$@" &
search=$!

# `wait` returns early whenever a trap has run: only the one after the end gives the search's status.
while kill -0 "$search" 2>/dev/null; do
    wait "$search"
done
wait "$search"
status=$?

if [ "$requeue" = yes ] && [ "$status" -eq 130 ]; then
    echo "time limit near: putting job $SLURM_JOB_ID back into the queue" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
