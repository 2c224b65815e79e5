#!/usr/bin/env bash
# Make the peer's environment: ./make_peer_env.sh DIR [PYTHON]; then python run.py --peer-python DIR/bin/python
# It sees PYTHON's packages, so that torch is the same; torchvision goes into DIR alone, never beside Lightning.
set -euo pipefail
dir=$1
python=${2:-python}
"$python" -m venv "$dir"
"$dir/bin/python" -m pip install --quiet --no-deps torchdistill==1.1.5 torchvision==0.28.0
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
own=$("$dir/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$packages" > "$own/torch_from.pth"
echo "$dir/bin/python"
