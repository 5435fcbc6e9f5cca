#!/usr/bin/env bash
# A real Slurm of one node, for tests: slurmctld, slurmd and munged from Debian's packages, without systemd.
#
#   bash scripts/slurm.sh start DIR     installs the packages if they are missing (root, apt-get), and starts; prints the way
#                                       in which memory is limited
#   SLURM_CONF=DIR/slurm.conf sbatch ...
#   bash scripts/slurm.sh stop DIR      cancels all jobs and ends the daemons
#
# Everything that the daemons write lies in DIR, but empty control groups stay. Daemons and jobs run as root. The memory of a job is limited by its control
# group if this machine lets Slurm make some ("cgroup"), else slurmd polls it and kills a job that uses more ("polling"): a job
# can then use more for some seconds, and one of less than that ends as it would without a limit.
# Exit code 3: this machine cannot start it; the reason is on standard error.
set -euo pipefail

cannot() { echo "a Slurm of one node cannot be started here: $*" >&2; exit 3; }

[ $# = 2 ] || { echo "usage: slurm.sh start|stop DIR" >&2; exit 2; }
mkdir -p "$2"
dir="$(cd "$2" && pwd)"
export SLURM_CONF="$dir/slurm.conf"

stop() {
    if [ -s "$dir/slurmctld.pid" ]; then
        timeout 20 scancel --full --quiet --me || true
        for _ in $(seq 200); do # until no step is left
            [ -n "$(timeout 5 squeue --noheader 2>/dev/null)" ] || break
            sleep 0.2
        done
    fi
    for daemon in slurmctld slurmd munged; do
        [ -s "$dir/$daemon.pid" ] || continue
        pid="$(cat "$dir/$daemon.pid")"
        kill "$pid" 2>/dev/null || true
        for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
        kill -9 "$pid" 2>/dev/null || true
        rm -f "$dir/$daemon.pid"
    done
}

install_packages() {
    if command -v slurmctld slurmd munged >/dev/null; then return; fi
    command -v apt-get >/dev/null || cannot "slurmctld, slurmd and munge are not installed, and there is no apt-get"
    { apt-get update && DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y --no-install-recommends \
        slurmctld slurmd slurm-client munge; } >"$dir/apt.log" 2>&1 ||
        cannot "apt-get could not install slurmctld, slurmd and munge: $(tail -n 1 "$dir/apt.log")"
}

# Whether Slurm can make control groups that limit memory: of version 1, or of version 2 with the controller.
limits_memory() {
    local group=/sys/fs/cgroup/memory/memfit-probe
    if [ ! -d /sys/fs/cgroup/memory ]; then
        grep -qw memory /sys/fs/cgroup/cgroup.controllers 2>/dev/null || return 1
        group=/sys/fs/cgroup/memfit-probe
    fi
    mkdir "$group" 2>/dev/null && rmdir "$group"
}

write_configuration() {
    local name cpus memory_mib tracking
    name="$(hostname -s)"
    cpus="$(env -u OMP_NUM_THREADS nproc)"
    [ "$cpus" -ge 4 ] || cpus=4 # two ranks of two jobs at once, whatever the machine has
    memory_mib="$(awk '/^MemTotal/ { print int($2 / 1024 * 0.9) }' /proc/meminfo)"
    if limits_memory; then
        limit=cgroup
        tracking="ProctrackType=proctrack/cgroup
TaskPlugin=task/cgroup
JobAcctGatherType=jobacct_gather/cgroup"
        printf '%s\n' CgroupPlugin=autodetect IgnoreSystemd=yes ConstrainRAMSpace=yes AllowedSwapSpace=0 \
            ConstrainSwapSpace=yes >"$dir/cgroup.conf"
    else
        limit=polling
        tracking="ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill,UsePss"
        echo CgroupPlugin=disabled >"$dir/cgroup.conf"
    fi
    cat >"$SLURM_CONF" <<END
ClusterName=memfit
SlurmctldHost=$name(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=10
SlurmctldPort=$((port))
SlurmdPort=$((port + 1))
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
MailProg=/bin/true
SlurmdParameters=config_overrides
ReturnToService=2
$tracking
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1024
SchedulerParameters=sched_interval=2,batch_sched_delay=1
JobRequeue=1
KillWait=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=localhost NodeHostname=$name NodeAddr=127.0.0.1 CPUs=$cpus Boards=1 SocketsPerBoard=1 CoresPerSocket=$cpus ThreadsPerCore=1 RealMemory=$memory_mib State=UNKNOWN
PartitionName=low Nodes=localhost Default=YES PriorityTier=1 GraceTime=30
PartitionName=high Nodes=localhost PriorityTier=2 PreemptMode=OFF
END
}

start() {
    [ "$(id -u)" = 0 ] || cannot "it needs root"
    [ "$(uname)" = Linux ] || cannot "it needs Linux"
    install_packages
    stop
    mkdir -p "$dir/state" "$dir/spool"
    port=$((20000 + RANDOM % 10000))
    write_configuration
    [ -e "$dir/munge.key" ] || (umask 077 && head -c 128 /dev/urandom >"$dir/munge.key")
    munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
        --log-file="$dir/munged.log" --seed-file="$dir/munged.seed" || cannot "munged ended: $(tail -n 1 "$dir/munged.log")"
    slurmctld -c -f "$SLURM_CONF" 2>>"$dir/slurmctld.log" || cannot "slurmctld ended: $(tail -n 1 "$dir/slurmctld.log")"
    slurmd -N localhost -f "$SLURM_CONF" 2>>"$dir/slurmd.log" || cannot "slurmd ended: $(tail -n 1 "$dir/slurmd.log")"
    for _ in $(seq 150); do
        if [ "$(sinfo --noheader --format=%t --partition=low 2>/dev/null)" = idle ]; then
            echo "memory is limited by: $limit"
            return
        fi
        sleep 0.2
    done
    stop
    cannot "the node is not idle after 30 s: $(tail -n 1 "$dir/slurmd.log")"
}

case "$1" in
    start) start ;;
    stop) stop ;;
    *) echo "usage: slurm.sh start|stop DIR" >&2; exit 2 ;;
esac
