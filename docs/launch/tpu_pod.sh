#!/bin/bash
# A Cloud TPU slice: create, install, train. See tpu_pod.md. Usage: tpu_pod.sh {create|install|train|delete}
set -euo pipefail

: "${TPU_NAME:=llama}" "${ZONE:=us-west4-a}" "${ACCELERATOR:=v5litepod-64}" "${VERSION:=v2-alpha-tpuv5-lite}"
: "${NFS:?set NFS to HOST:/SHARE of a file system that the slice can mount}"
: "${SOURCE:?set SOURCE to the git URL of this repository}"

on_all_hosts() { # the same command on every host of the slice, at the same time
  gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker=all --command="$1"
}

case "${1:-}" in
create)
  gcloud compute tpus tpu-vm create "$TPU_NAME" --zone="$ZONE" --accelerator-type="$ACCELERATOR" --version="$VERSION"
  ;;
install)
  on_all_hosts "set -e
    sudo apt-get update -q && sudo apt-get install -qy nfs-common python3.12-venv
    sudo mkdir -p /mnt/shared && sudo mount $NFS /mnt/shared
    git clone -q $SOURCE llama_jax
    python3.12 -m venv llama_jax/.venv
    llama_jax/.venv/bin/pip install -q -e 'llama_jax[tpu]' -c llama_jax/constraints.txt"
  ;;
train)
  on_all_hosts "cd llama_jax && exec .venv/bin/python train.py llama2_7b \
    --data.path /mnt/shared/corpus --data.cache-dir /mnt/shared/cache --tokenizer.path /mnt/shared/tokenizer.model \
    --run-dir /mnt/shared/runs/llama2_7b"
  ;;
delete)
  gcloud compute tpus tpu-vm delete "$TPU_NAME" --zone="$ZONE" --quiet
  ;;
*)
  echo "usage: $0 {create|install|train|delete}" >&2
  exit 2
  ;;
esac
