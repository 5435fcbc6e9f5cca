#!/usr/bin/env bash
# Sets up and runs the proof of concept: bash scripts/poc.sh [any option of `memfit poc`]
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install all
say "memfit poc $*"
exec memfit poc "$@"
