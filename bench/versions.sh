#!/usr/bin/env bash
# The core tests, and `tiles verify` for one target, with one pair of versions: a fresh environment that goes at the end.
#
#     bench/versions.sh 2.11.0 3.6.0          # torch, triton
#     bench/versions.sh 2.11.0 3.6.0 sm_80    # and the target (default: sm_90)
#
# torch of PyPI brings a triton of its own; another one is put in its place, as users do who upgrade one of them.
# WORKERS=N tests at a time (default: 2). It takes 5 GB where temporary files are (TMPDIR), and fails where anything does.
set -euo pipefail

if [[ $# -lt 2 || $# -gt 3 ]]; then
    echo "usage: bench/versions.sh TORCH TRITON [TARGET]" >&2
    exit 2
fi
torch=$1 triton=$2 target=${3:-sm_90}

cd "$(dirname "$0")/.."
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
python3 -m venv "$environment/venv"
source "$environment/venv/bin/activate"
export XDG_CACHE_HOME=$environment TRITON_CACHE_DIR=$environment/triton PYTHONPATH=$PWD
unset TRITON_INTERPRET

pip install --quiet --no-cache-dir "torch==$torch" numpy
pip install --quiet --no-cache-dir --no-deps "triton==$triton"
pip install --quiet --no-cache-dir "pytest>=8" "pytest-xdist>=3.6" "hypothesis>=6.100" "matplotlib>=3.8" "rich>=13"
python - "$torch" "$triton" <<'PYTHON'
import sys
import torch, triton
found = torch.__version__.partition("+")[0], triton.__version__
assert found == tuple(sys.argv[1:]), f"asked for torch {sys.argv[1]} and triton {sys.argv[2]}, got {found}"
print(f"torch {torch.__version__}, triton {triton.__version__}, Python {sys.version.split()[0]}")
PYTHON

failed=0
python -m pytest -q -p no:cacheprovider -n "${WORKERS:-2}" \
    tests/test_partition.py tests/test_tiles.py tests/test_kernels.py tests/test_backend_triton.py tests/test_launches.py \
    tests/test_functional.py tests/test_framework.py tests/test_inference.py tests/test_modules.py || failed=1
python -m bench tiles verify --targets "$target" --dtypes bf16 fp16 tf32 --jobs "${WORKERS:-2}" --format csv \
    > "$environment/verify.csv" || failed=1  # its table stays there, what it ends with is on stderr
exit $failed
