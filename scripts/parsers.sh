#!/usr/bin/env bash
# Puts other trainers' packages into .parsers/, so that tests can have exports read by the parsers they are for.
# bash scripts/parsers.sh
# Without their dependencies: torchtitan's would set huggingface_hub and fsspec back and bring 34 more packages,
# and parsing needs few of them. Megatron-LM's parser is in the package megatron-core from 0.17 on, which asks
# for Python 3.12; its parser does not.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# put NAME REQUIREMENT...: into .parsers/NAME, unless that was made of the same requirements.
put() {
    local name="$1" folder=".parsers/$1"
    shift
    [ "$(cat "$folder/asked-for" 2>/dev/null)" = "$*" ] && return
    rm -rf "$folder"
    python -m pip install --disable-pip-version-check --quiet --no-deps --no-compile --target "$folder.new" "$@"
    echo "$*" >"$folder.new/asked-for"
    mv "$folder.new" "$folder"
}

rm -rf .parsers/*.new
tyro=("tyro>=1" "docstring-parser>=0.16" "typeguard>=4")
put torchtitan-0.3 "torchtitan>=0.3,<0.4" "spmd_types>=0.2.3,<0.3" "torch_checkpointing>=0.1" "torchdata>=0.8" \
    "${tyro[@]}"
put torchtitan-0.2 "torchtitan>=0.2.2,<0.3" "torchdata>=0.8" "${tyro[@]}"
put megatron-core --only-binary :all: --python-version 3.12 --ignore-requires-python "megatron-core>=0.17,<0.18" six
