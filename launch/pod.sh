#!/usr/bin/env bash
# A TPU pod from a laptop: gets it, looks it over, trains on it, and gives it back. docs/pod.md tells
# the whole story. Needs nothing but Python and gcloud.
#
#   export TPU_NAME=my-pod ZONE=us-west4-a PROJECT=my-project
#   launch/pod.sh create configs/cadpo.py:7b-v5e-256 [--spot] [--disk=NAME]
#   launch/pod.sh preflight configs/cadpo.py:7b-v5e-256 --config.root=gs://BUCKET/RUN
#   launch/pod.sh run configs/cadpo.py:7b-v5e-256 --config.root=gs://BUCKET/RUN
#   launch/pod.sh watch configs/cadpo.py:7b-v5e-256 --config.root=gs://BUCKET/RUN [--spot] [--delete]
#   launch/pod.sh delete
#
# create     asks for the TPUs that the recipe is made for, as a queued resource, and waits for them.
#            TPU_TYPE=v5e:16x16 (or 2*v5e:8x16) says it where the config names no recipe. --disk
#            attaches a disk of the zone to every worker, to read from.
# preflight  looks at every worker: chips, Python, disk, huge pages, may it write to the bucket?
# run        launch/tpu_run.sh there; --stop in place of a config saves and ends it.
# watch      create where there is nothing, run, and both again whenever the TPUs are taken back.
#            With --delete it deletes the TPUs when all is done.
# delete     gives the TPUs back. What a run left in its bucket stays.
set -euo pipefail
cd "$(dirname "$0")/.."
exec python3 -m launch.pod "$@"
