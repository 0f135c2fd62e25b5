# Buckets as folders; sourced by tpu_run.sh. SABER_BUCKETS is where they are mounted, ~/buckets by
# default: the same place on every host, and not below this checkout, where somebody may clean up.
# shellcheck shell=bash

# Prints its argument with every gs://BUCKET replaced by the folder that BUCKET is mounted on.
with_buckets() {
  local argument=$1 bucket folder
  while [[ $argument =~ gs://([a-z0-9][-_.a-z0-9]*) ]]; do
    bucket=${BASH_REMATCH[1]} folder=${SABER_BUCKETS:-$HOME/buckets}/${BASH_REMATCH[1]}
    mount_bucket "$bucket" "$folder" || return 1
    argument=${argument/gs:\/\/$bucket/$folder}
  done
  printf '%s\n' "$argument"
}

# What its arguments name of buckets, a line each: FOLDER=gs://BUCKET. The run speaks to a bucket itself
# where that is safer than through the mount (saber_jax/runs/buckets.py).
bucket_mounts() {
  local bucket
  { grep -oE 'gs://[a-z0-9][-_.a-z0-9]*' <<<"$*" || true; } | sort -u | while read -r bucket; do
    printf '%s\n' "${SABER_BUCKETS:-$HOME/buckets}/${bucket#gs://}=$bucket"
  done
}

# Onto a TPU VM, where nobody wants to do it by hand on 64 hosts. Quiet about failing: the caller sees
# that gcsfuse is not there.
install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc
  local source
  source="https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main"
  echo "installing gcsfuse" >&2
  { curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo -n tee $key &&
    echo "deb [signed-by=$key] $source" | sudo -n tee /etc/apt/sources.list.d/gcsfuse.list &&
    sudo -n apt-get -qq update &&
    sudo -n apt-get -qq -o DPkg::Lock::Timeout=300 install -y gcsfuse; } >/dev/null || true
}

# Some results are folders that are renamed when they are whole, which is many objects to a bucket; and
# hosts must see at once what another one wrote, so nothing about a file is remembered.
mount_bucket() {
  local bucket=$1 folder=$2
  if mountpoint -q "$folder"; then return; fi
  if ! command -v gcsfuse >/dev/null && has_tpu; then install_gcsfuse; fi
  if ! command -v gcsfuse >/dev/null; then
    echo "launch/tpu_run.sh: gs://$bucket is mounted by gcsfuse, which is not here. Install it" \
         "(https://cloud.google.com/storage/docs/cloud-storage-fuse/install) on every host, or give" \
         "the path of a disk that all hosts share." >&2
    return 1
  fi
  mkdir -p "$folder"
  echo "mounting gs://$bucket on $folder" >&2
  gcsfuse --implicit-dirs --rename-dir-limit=1000000 --metadata-cache-ttl-secs=0 \
    "$bucket" "$folder" >&2 || {
    echo "launch/tpu_run.sh: gs://$bucket could not be mounted, see above." >&2; return 1; }
}
