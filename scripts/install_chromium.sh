#!/bin/sh
# Chromium for the tests of the report's page: the one that is there, else the distribution's package.
set -eu
for name in chromium chromium-browser google-chrome; do
    if command -v "$name" >/dev/null 2>&1; then
        exit 0
    fi
done
if ! command -v apt-get >/dev/null 2>&1; then
    echo "no Chromium found, and no apt-get to install it: install chromium and put it on PATH" >&2
    exit 1
fi
sudo=
if [ "$(id -u)" -ne 0 ]; then
    sudo=sudo
fi
$sudo apt-get update -qq
$sudo apt-get install -y -qq --no-install-recommends chromium
