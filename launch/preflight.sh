#!/usr/bin/env bash
# Prints facts about one worker for launch/pod.sh, one per line: name and value.
#
#   launch/preflight.sh [ROOT [INPUT ...]]    the run's folder, and what has to be there before it;
#                                             each is a path or gs://BUCKET/PATH
set -uo pipefail
cd "$(dirname "$0")/.." || exit
# shellcheck source=launch/hardware.sh
source launch/hardware.sh

root=${1:-}
shift $(($# > 0))
echo "chips $(tpu_chips)"
pythons=
for candidate in python3.12 python3.11 python3; do
  # A shim of pyenv can stand for a Python that is not there.
  if version=$("$candidate" -c 'import platform; print(platform.python_version())' 2>/dev/null); then
    pythons+=" $version"
  fi
done
echo "python${pythons:- none}"
echo "free_gib $(($(df --output=avail -k "$HOME" | tail -n 1) / 1048576))"
pages=${SYSFS:-/sys}/kernel/mm/transparent_hugepage/enabled
if [[ -e $pages ]]; then echo "huge_pages $(tr -d '[]' < <(grep -o '\[.*\]' "$pages"))"; fi

# Every worker writes its own file and removes it.
mark=".preflight_$(hostname)_$$"
case "$root" in
  "") ;;
  gs://*)
    if said=$(echo ok | gcloud storage cp - "$root/$mark" 2>&1 &&
      gcloud storage rm "$root/$mark" 2>&1); then echo "root ok"; else
      echo "root ${said##*$'\n'}"; fi ;;
  *)
    if said=$(mkdir -p "$root" && touch "$root/$mark" && rm "$root/$mark" 2>&1); then
      echo "root ok"; else echo "root cannot write to $root: ${said##*$'\n'}"; fi ;;
esac

mount_disk
missing=
for input; do
  case "$input" in
    gs://*) gcloud storage ls "$input" >/dev/null 2>&1 || missing+=" $input" ;;
    *) [[ -e $input ]] || missing+=" $input" ;;
  esac
done
if [[ $missing ]]; then echo "missing$missing"; fi
