#!/usr/bin/env bash
# Takes the picture of README.md: the top of the report of the last proof of concept. bash scripts/screenshot.sh
# It needs Chromium and, before it, a `bash scripts/poc.sh` on this machine.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

browser="$(command -v chromium || command -v chromium-browser || command -v google-chrome)" || {
    echo "no Chromium on this machine: on Debian and Ubuntu, apt-get install chromium" >&2
    exit 2
}
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
memfit report --lang en --out "$folder/report.html"
mkdir -p docs/images
"$browser" --headless --no-sandbox --disable-gpu --hide-scrollbars --force-device-scale-factor=1 \
    --window-size=1280,860 --screenshot="$PWD/docs/images/report.png" "file://$folder/report.html" 2>/dev/null
say "docs/images/report.png"
