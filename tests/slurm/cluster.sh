#!/usr/bin/env bash
# A SLURM cluster of two nodes on this machine's loopback, for tests. Needs root; Debian's packages:
# apt-get install -y --no-install-recommends slurm-wlm munge slurmdbd mariadb-server
#
#   tests/slurm/cluster.sh up DIR      everything under DIR; then export SLURM_CONF=DIR/slurm.conf
#   tests/slurm/cluster.sh down DIR    no process of it is left
#
# Accounting (slurmdbd, MariaDB) is there because submitit learns from it that a job was killed.
set -euo pipefail
export PATH=$PATH:/usr/sbin

die() { echo "cluster.sh: $*" >&2; exit 1; }

[[ $# = 2 && $1 =~ ^(up|down)$ ]] || die "usage: cluster.sh up|down DIR"
dir=$(realpath -m "$2")
export SLURM_CONF=$dir/slurm.conf

until_true() { # SECONDS COMMAND...
  local end=$((SECONDS + $1))
  shift
  until timeout 10 "$@" >/dev/null 2>&1; do
    ((SECONDS < end)) || return 1
    sleep 0.2
  done
}

missing() {
  local program
  for program in munged mariadbd mariadb-install-db slurmdbd slurmctld slurmd srun sacct; do
    command -v "$program" >/dev/null || echo -n "$program "
  done
}

up() {
  local lacking
  lacking=$(missing)
  [ -z "$lacking" ] || die "missing: $lacking(apt-get install -y --no-install-recommends slurm-wlm munge slurmdbd mariadb-server)"
  [ "$(id -u)" = 0 ] || die "needs root"
  [ ! -e "$dir/db" ] || die "$dir has been a cluster's: take another"
  mkdir -p "$dir"/{state,spool.n1,spool.n2,log,munge,db}
  trap 'down; die "not started; see $dir/log"' EXIT
  configure
  munged --force --key-file="$dir/munge/key" --socket="$dir/munge/sock" \
    --pid-file="$dir/munge.pid" --log-file="$dir/log/munged.log" --seed-file="$dir/munge/seed" \
    2>"$dir/log/munged.err"
  mariadb-install-db --no-defaults --user=root --datadir="$dir/db" \
    --auth-root-authentication-method=socket >"$dir/log/mariadb-install.log" 2>&1
  setsid mariadbd --no-defaults --user=root --datadir="$dir/db" --socket="$dir/db/sock" \
    --bind-address=127.0.0.1 --port="${ports[0]}" >"$dir/log/mariadbd.log" 2>&1 </dev/null &
  echo $! >"$dir/mariadbd.pid"
  until_true 60 mariadb-admin --no-defaults -S "$dir/db/sock" ping
  mariadb --no-defaults -S "$dir/db/sock" -e "create database slurm_acct_db;
    create user slurm@127.0.0.1 identified by 'x'; grant all on slurm_acct_db.* to slurm@127.0.0.1;
    create user slurm@localhost identified by 'x'; grant all on slurm_acct_db.* to slurm@localhost;"
  slurmdbd
  until_true 60 sacctmgr -n show cluster
  slurmctld
  slurmd -N n1
  slurmd -N n2
  until_true 60 bash -c '[ "$(sinfo -h -N -o %T | sort -u)" = idle ]'
  trap - EXIT
  echo "export SLURM_CONF=$SLURM_CONF"
}

configure() {
  local host
  host=$(hostname -s)
  # Ports that are free now: of MariaDB, slurmdbd, slurmctld and the two nodes.
  mapfile -t ports < <(python3 -c '
import socket
sockets = [socket.socket() for _ in range(5)]
for s in sockets: s.bind(("127.0.0.1", 0))
for s in sockets: print(s.getsockname()[1])')
  dd if=/dev/urandom of="$dir/munge/key" bs=1024 count=1 status=none
  chmod 400 "$dir/munge/key"
  # AccountingStoragePass names the munge socket too: slurmctld would look for the system's.
  # cred_expire is also how long a requeued job waits before it starts again; the default is 120 s.
  cat >"$dir/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$dir/munge/sock
DbdHost=$host
DbdAddr=127.0.0.1
DbdPort=${ports[1]}
CommunicationParameters=NoInAddrAny
SlurmUser=root
LogFile=$dir/log/slurmdbd.log
PidFile=$dir/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=${ports[0]}
StorageUser=slurm
StoragePass=x
StorageLoc=slurm_acct_db
CONF
  chmod 600 "$dir/slurmdbd.conf"
  cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[2]}
AuthType=auth/munge
AuthInfo=socket=$dir/munge/sock,cred_expire=10
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=${ports[1]}
AccountingStoragePass=$dir/munge/sock
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[3]} CPUs=1 RealMemory=4000
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[4]} CPUs=1 RealMemory=4000
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
}

stop() { # PID: asks, after ten seconds makes it
  local i
  for i in {1..100}; do
    # A zombie is gone too; where PID 1 reaps none it stays in the table.
    grep -qs '^State:.[^ZX]' "/proc/$1/status" || return 0
    [ "$i" -gt 1 ] || kill "$1"
    sleep 0.1
  done
  kill -KILL "$1" 2>/dev/null || true
}

# A step's daemon has no pid file; the environment tells whose cluster it belongs to.
stepds() {
  local proc
  for proc in /proc/[0-9]*; do
    if [[ $(cat "$proc/comm" 2>/dev/null) == slurmstepd* ]] &&
      tr '\0' '\n' 2>/dev/null <"$proc/environ" | grep -qxF "SLURM_CONF=$SLURM_CONF"; then
      echo "${proc#/proc/}"
    fi
  done
}

down() {
  local name pid
  if [ -s "$dir/slurmctld.pid" ]; then # jobs first: their daemons would outlive the nodes'
    timeout 10 scancel --full --user=root || true
    until_true 40 bash -c '[ -z "$(squeue -h)" ]' || true
  fi
  for name in slurmd.n1 slurmd.n2 slurmctld slurmdbd mariadbd munge; do
    [ ! -s "$dir/$name.pid" ] || stop "$(cat "$dir/$name.pid")"
    rm -f "$dir/$name.pid"
  done
  for pid in $(stepds); do stop "$pid"; done
  rm -f "$SLURM_CONF"
}

"$1"
