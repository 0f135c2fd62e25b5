#!/usr/bin/env bash
# Runs one worker's part of a run for launch/remote.py. It survives the connection that started it.
#
#   launch/job.sh start CONFIG [SETTING ...]   in the background; output to runs/job/log
#   launch/job.sh state                        "running", "exit N" or "none"
#   launch/job.sh follow                       prints the log until the run has ended
#   launch/job.sh end                          waits for the end, prints "exit N", why if N is not 0
#   launch/job.sh stop [ID]                    asks it to save and end, if it was started with JOB_ID=ID;
#                                              says "told", or "none" if there is no such run
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/hardware.sh
source launch/hardware.sh
job=runs/job

# Identifies the boot of this machine, because process ids are reused after a reboot.
boot() { cat /proc/sys/kernel/random/boot_id 2>/dev/null || echo unknown; }

alive() {
  [[ -f $job/pid && "$(cat $job/boot 2>/dev/null)" == "$(boot)" ]] &&
    kill -0 "$(cat $job/pid)" 2>/dev/null
}

state() {
  if alive; then
    echo running
  elif [[ -f $job/status ]]; then
    echo "exit $(cat $job/status)"
  elif [[ -f $job/pid ]]; then
    echo "exit 137" # It vanished without a word: killed, or the machine was started anew.
  else
    echo none
  fi
}

case "${1:-}" in
  start)
    shift
    if alive; then echo "launch/job.sh: a run is going on already" >&2; exit 1; fi
    mount_disk
    mkdir -p $job
    rm -f $job/status
    boot > $job/boot
    echo "${JOB_ID:-}" > $job/id
    # `pid` is this shell, which forwards SIGTERM and records the exit status of the run.
    # shellcheck disable=SC2016
    setsid bash -c '
      launch/tpu_run.sh "$@" & run=$!
      trap "told=1; kill -TERM $run" TERM
      # A signal ends `wait` with 143, which is not the status of the run, although it may be over.
      # Once its status was given, `wait` says 127.
      status=127 told=
      while :; do
        wait $run && given=0 || given=$?
        if [[ $given == 127 ]]; then break; fi
        status=$given
        if [[ -z $told ]]; then break; fi
        told=
      done
      echo $status > runs/job/status.new && mv runs/job/status.new runs/job/status
    ' job "$@" > $job/log 2>&1 < /dev/null &
    echo $! > $job/pid
    ;;
  state) state ;;
  follow)
    tail -n +1 -F $job/log 2>/dev/null & tail=$!
    while alive; do sleep 1; done
    sleep 1
    kill $tail
    ;;
  end)
    while alive; do sleep 1; done
    state
    if [[ "$(state)" != "exit 0" ]]; then tail -n 30 $job/log; fi
    ;;
  stop)
    if alive && [[ $# == 1 || "$2" == "$(cat $job/id)" ]]; then
      kill -TERM "$(cat $job/pid)"
      echo told
    else
      echo none
    fi
    ;;
  *) echo "usage: launch/job.sh start|state|follow|end|stop" >&2; exit 2 ;;
esac
