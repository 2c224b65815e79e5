#!/usr/bin/env bash
# A SLURM cluster of this one machine, without systemd and without accounting, to try launch=slurm and to test it.
#
#   apt-get install slurm-wlm munge
#   scripts/slurm/one_machine.sh start [FOLDER]     # writes FOLDER/slurm.conf; then: export SLURM_CONF=FOLDER/slurm.conf
#   scripts/slurm/one_machine.sh stop [FOLDER]
#
# FOLDER (default /tmp/slurm-one-machine) holds the configuration, state, logs and process ids. Needs root: munged and
# slurmd start as root on every cluster.
set -euo pipefail

command=${1:-start}
folder=${2:-/tmp/slurm-one-machine}
host=$(hostname -s)
cpus=${SLURM_ONE_MACHINE_CPUS:-8}  # more than there are is fine: config_overrides

say() { echo "one_machine.sh: $*" >&2; }

stop_one() {  # the process of a pid file, and only if it is still what it was
    local file=$1 name=$2 pid
    [ -f "$file" ] || return 0
    pid=$(cat "$file")
    if [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$name" ]; then kill "$pid"; fi
    rm -f "$file"
}

stop() {
    stop_one "$folder/run/slurmd.pid" slurmd
    stop_one "$folder/run/slurmctld.pid" slurmctld
    stop_one "$folder/munge/munged.pid" munged
}

write_configuration() {
    mkdir -p "$folder"/{state,spool,run,log}
    cat > "$folder/slurm.conf" <<CONF
ClusterName=one-machine
SlurmctldHost=$host(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
SlurmctldPort=${SLURM_ONE_MACHINE_PORT:-17817}
SlurmdPort=$((${SLURM_ONE_MACHINE_PORT:-17817} + 1))
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=10
MinJobAge=3000
SchedulerParameters=sched_interval=2
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=${SLURM_ONE_MACHINE_MEMORY_MB:-8000} State=UNKNOWN
PartitionName=debug Nodes=$host Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
CONF
}

start_munge() {
    mkdir -p "$folder/munge"
    chmod 755 "$folder" "$folder/munge"
    if [ ! -f "$folder/munge/munge.key" ]; then
        dd if=/dev/urandom of="$folder/munge/munge.key" bs=1024 count=1 status=none
    fi
    chmod 400 "$folder/munge/munge.key"
    munged --force --socket="$folder/munge/socket" --key-file="$folder/munge/munge.key" \
        --pid-file="$folder/munge/munged.pid" --log-file="$folder/munge/munged.log" \
        --seed-file="$folder/munge/munged.seed"
}

start() {
    for program in munged slurmctld slurmd; do
        command -v "$program" > /dev/null || { say "there is no $program: apt-get install slurm-wlm munge"; exit 2; }
    done
    [ "$(id -u)" = 0 ] || { say "needs root"; exit 2; }
    write_configuration
    start_munge
    export SLURM_CONF="$folder/slurm.conf"
    slurmctld -f "$SLURM_CONF"
    slurmd -f "$SLURM_CONF"
    for _ in $(seq 60); do
        if sinfo --noheader --format=%T 2> /dev/null | grep -q idle; then
            say "ready; export SLURM_CONF=$SLURM_CONF"
            return 0
        fi
        sleep 0.5
    done
    say "the node did not come up; see $folder/log"
    sinfo >&2 || true
    exit 1
}

case $command in
    start) start ;;
    stop) stop ;;
    *) say "usage: one_machine.sh start|stop [FOLDER]"; exit 2 ;;
esac
