#!/usr/bin/env bash
# Requests a TPU pod from a laptop, checks it, trains on it and deletes it, see docs/pod.md. Needs only
# Python and gcloud.
#
#   export TPU_NAME=my-pod ZONE=us-west4-a PROJECT=my-project
#   launch/pod.sh create configs/cadpo.py:7b-v5e-256 [--spot] [--disk=NAME]
#   launch/pod.sh preflight configs/cadpo.py:7b-v5e-256 --config.root=gs://BUCKET/RUN
#   launch/pod.sh run configs/cadpo.py:7b-v5e-256 --config.root=gs://BUCKET/RUN
#   launch/pod.sh watch configs/cadpo.py:7b-v5e-256 --config.root=gs://BUCKET/RUN [--spot] [--delete]
#   launch/pod.sh delete
#
# create     requests the TPUs of the recipe as a queued resource and waits for them. For a config
#            without a recipe set TPU_TYPE=v5e:16x16 (or 2*v5e:8x16). --disk attaches a disk of the
#            zone to every worker, read-only; a run mounts it on /mnt/disks/data.
# preflight  checks every worker: chips, Python, disk, huge pages, write access to the bucket, and
#            whether the starting checkpoint (ROOT/init) and config.data.path are there.
# run        runs launch/tpu_run.sh there; with --stop in place of a config it saves and ends the run.
# watch      creates the TPUs if there are none and runs; repeats both after every preemption. With
#            --delete it deletes the TPUs when all is done.
# delete     deletes the TPUs. Outputs in the bucket are kept.
set -euo pipefail
cd "$(dirname "$0")/.."
exec python3 -m launch.pod "$@"
