# shellcheck shell=bash
# Sourced by train.sbatch and eval.sbatch: one launcher on every node, a warning before the time limit, and a requeue.
#
# How a run survives its time limit:
#   1. `#SBATCH --signal=B:USR1@300`: 300 s before the limit Slurm sends SIGUSR1 to the batch script, and only to it.
#   2. The trap below passes it to srun, and srun to scripts/launch.py on every node. (Where Slurm tracks processes by cgroup,
#      srun's signal reaches the training processes directly as well; twice does no harm.)
#   3. launch.py passes it to its training processes and waits for them. They agree on the step after which they stop, write a
#      checkpoint, and end with 138 = 128 + SIGUSR1.
#   4. `scontrol requeue` puts the job back into the queue under the same id; its next start resumes from the checkpoint.
# Make the 300 s longer than one step plus one checkpoint.
#
# SIGTERM (scancel, a node that is drained) is passed on in the same way and writes a checkpoint too, but nothing is requeued:
# whoever cancels does not want the job back, and Slurm requeues pre-empted jobs by itself (PreemptMode=REQUEUE).
#
# Environment:
#   PYTHON            the interpreter (default: python)
#   PROCS_PER_NODE    processes on a node (default: its GPUs, else 1)
#   MAX_REQUEUES      how often in all (default 50)
#   NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME   network to use where nodes have several, for example ib0

run_job() { # run_job SCRIPT ARGUMENTS...: run SCRIPT on all nodes of the job and end with its exit code
    local script=$1
    shift
    local python=${PYTHON:-python} nodes=${SLURM_NNODES:-1} restarts=${SLURM_RESTART_COUNT:-0}
    local processes=${PROCS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
    local head port
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    port=$((20000 + SLURM_JOB_ID % 20000)) # jobs that share a node must not share a port

    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((${SLURM_CPUS_PER_TASK:-1} / processes > 0 ? ${SLURM_CPUS_PER_TASK:-1} / processes : 1))}
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

    stopped=""
    trap 'stopped=USR1; kill -USR1 "$srun_pid" 2>/dev/null' USR1
    trap 'stopped=TERM; kill -TERM "$srun_pid" 2>/dev/null' TERM INT

    # A shell that waits for a child in the foreground runs its traps only afterwards: hence & and wait.
    # --wait: nodes end within moments of each other; one that does not within 5 minutes is killed. Ending all of them at the
    # first bad exit code (--kill-on-bad-exit=1) could cut off the node that still writes the checkpoint.
    srun --kill-on-bad-exit=0 --wait=300 "$python" scripts/launch.py \
        --nnodes "$nodes" --nproc-per-node "$processes" \
        --rdzv-backend c10d --rdzv-endpoint "$head:$port" --rdzv-id "$SLURM_JOB_ID-$restarts" \
        "$script" "$@" &
    srun_pid=$!
    local code
    wait "$srun_pid"
    code=$?
    while [ "$code" -gt 128 ] && kill -0 "$srun_pid" 2>/dev/null; do # a signal interrupted the wait
        wait "$srun_pid"
        code=$?
    done

    # 138: stopped by SIGUSR1. 75: the watchdog ended a hang. 69: a process was lost. See docs/clusters.md.
    local again=no
    case $code in
        138 | 75 | 69) again=yes ;;
        *) [ "$stopped" = USR1 ] && [ "$code" -gt 128 ] && again=yes ;;
    esac
    [ "$stopped" = TERM ] && again=no
    if [ "$again" = yes ] && [ "$restarts" -ge "${MAX_REQUEUES:-50}" ]; then
        echo "job $SLURM_JOB_ID: exit code $code, but it was requeued $restarts times already (MAX_REQUEUES); giving up"
        again=no
    fi
    if [ "$again" = yes ]; then
        echo "job $SLURM_JOB_ID: exit code $code; asking Slurm to run it again"
        scontrol requeue "$SLURM_JOB_ID"
    else
        echo "job $SLURM_JOB_ID: exit code $code"
    fi
    exit "$code"
}
