#!/bin/bash
# cluster/submit.sh train cartpole collect.workers=12 --out /home/ubuntu/runs/cartpole
#
# A raywm command as a Ray job, which goes on when this terminal is closed. RAY_API_SERVER_ADDRESS says where the
# cluster's dashboard is (default http://127.0.0.1:8265). This directory travels along, so that the cluster can import your
# environment's module; what .gitignore and .rayignore name stays here. Job's options (--no-wait, --submission-id X, ...)
# go into RAYWM_JOB. Ray 2.60.0.
set -euo pipefail
: "${RAY_API_SERVER_ADDRESS:=http://127.0.0.1:8265}"
export RAY_API_SERVER_ADDRESS

out=
for ((i = 1; i <= $#; i++)); do
  case "${!i}" in
    --out | -o) j=$((i + 1)) && out=${!j-} ;;
    --out=*) out=${!i#--out=} ;;
  esac
done
case "$out" in
  /* | *://*) ;;
  *)
    echo "error: --out ${out:-is missing}, expected an absolute path on the cluster's head (or, for collect, a URI):" \
      "the directory that a job starts in goes with it" >&2
    exit 2
    ;;
esac

read -ra options <<<"${RAYWM_JOB-}"
exec ray job submit --working-dir . --runtime-env-json '{"excludes": [".git", ".venv", "runs", "data"]}' \
  ${options[@]+"${options[@]}"} -- raywm "$@" --address auto --resume
