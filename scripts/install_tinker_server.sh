#!/usr/bin/env bash
# SkyRL's Tinker-compatible server for CPUs, into an environment of its own: scripts/install_tinker_server.sh FOLDER
# Start it with FOLDER/bin/tinker-server --base-model MODEL_FOLDER --port 8700 (its other options: --help).
set -euo pipefail
folder=${1:?usage: install_tinker_server.sh FOLDER}
"${PYTHON:-python3}" -m venv "$folder"
# tinker: later ones encode requests in a way that this server does not read.
"$folder/bin/python" -m pip install --quiet \
    "skyrl[tinker]==0.3.0" "jax>=0.8,<1.0" "flax>=0.12.2" "optax>=0.2.5" "torch==2.13.0" "tinker==0.24.1"
site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
# pydantic takes typing.TypedDict from Python 3.12 on only; after the first time there is nothing left to replace.
sed -i -E '/^from typing import .*TypedDict/{s/,? ?\bTypedDict\b//;s/import ,/import/;a from typing_extensions import TypedDict
}' "$site/skyrl/tinker/types.py"
# It starts its engine with `uv run ... -m module`, and reads the options of that run from its parent's command line,
# up to a "--": hence a uv that drops its own options, and a parent whose command line holds "--".
cat > "$folder/bin/uv" <<SCRIPT
#!/usr/bin/env bash
while [ "\$1" != -m ]; do shift; done
exec "$(cd "$folder" && pwd)/bin/python" "\$@"
SCRIPT
cat > "$folder/bin/tinker-server" <<SCRIPT
#!/usr/bin/env bash
# The arguments of the inner bash are what the server reads; it stays, as the parent that the server looks at.
export PATH="$(cd "$folder" && pwd)/bin:\$PATH" JAX_PLATFORMS=cpu
exec bash -c 'shift; python -m skyrl.tinker.api "\$@" & child=\$!; trap "kill \$child" TERM INT; wait \$child; wait \$child' \\
    run -- "\$@"
SCRIPT
chmod +x "$folder/bin/uv" "$folder/bin/tinker-server"
