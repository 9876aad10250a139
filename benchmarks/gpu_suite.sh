#!/bin/bash
# All that only a GPU can tell, in less than ten minutes:
#
#     benchmarks/gpu_suite.sh [--dry-run] [--wheels FOLDER] [--tune] [FOLDER]
#
# Correctness of the GPU kernels (golden vectors, random ragged batches, gradients), one attention layer beside PyTorch
# and xformers, one of training, what a decode step costs beside its graph, and the whole engine. JSON and logs go to FOLDER (default:
# $OUT, else benchmarks/results/gpu); the terminal gets a few lines of each. Exit code 1 if a part has failed.
# --wheels installs what the machine lacks from a folder; --tune looks for better tile sizes at the end, outside
# the ten minutes; --dry-run goes the same way on a CPU, at sizes that mean nothing.
set -uo pipefail
cd "$(dirname "$0")/.."

DRY= WHEELS= TUNE= FOLDER=${OUT:-benchmarks/results/gpu}
while [ $# -gt 0 ]; do
    case $1 in
    --dry-run) DRY=--dry-run ;;
    --tune) TUNE=yes ;;
    --wheels) WHEELS=$2 && shift ;;
    -*) echo "gpu_suite.sh: unknown option $1" >&2 && exit 2 ;;
    *) FOLDER=$1 ;;
    esac
    shift
done
PYTHON=${PYTHON:-python3}
mkdir -p "$FOLDER"
export PYTHONPATH=$PWD/kernels:$PWD/engine:$PWD/server:$PWD/training:$PWD/tests
if [ -n "$WHEELS" ]; then
    "$PYTHON" -m pip install --quiet --no-index --find-links "$WHEELS" -r benchmarks/gpu_requirements.txt || exit 1
fi

FAILED=0
part() { # name, seconds, command...: run it, keep its output, show the end of it
    local name=$1 limit=$2
    shift 2
    echo "== $name"
    timeout "$limit" "$@" >"$FOLDER/$name.log" 2>&1
    local code=$?
    tail -n 20 "$FOLDER/$name.log" | cut -c 1-200
    [ $code -eq 0 ] || { echo "== $name FAILED ($code)" && FAILED=1; }
}
dape() { echo "from dape_server.cli import main; main()"; }

TESTS="tests/test_golden.py tests/test_triton_attention.py tests/test_triton_training.py tests/test_graphs.py tests/test_xformers.py"
if [ -n "$DRY" ]; then
    part checks 120 "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_golden.py -k "output and triton and h4-kerple-v1-d32 and float32"
else
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$FOLDER/device.txt"
    # shellcheck disable=SC2086
    part checks 220 "$PYTHON" -m pytest -q -p no:cacheprovider -n 12 -m "not slow" -k "triton or graphs or xformers" $TESTS
fi
# shellcheck disable=SC2086
part kernels 130 "$PYTHON" -m dape_kernels.bench.gpu $DRY --json "$FOLDER/kernels.json"
# shellcheck disable=SC2086
part training 60 "$PYTHON" -m dape_kernels.bench.gpu_training $DRY --json "$FOLDER/training.json"
# shellcheck disable=SC2086
part graph_steps 50 "$PYTHON" -m dape_engine.bench.graph_steps $DRY --json "$FOLDER/graph_steps.json"
if [ -n "$DRY" ]; then
    part engine 120 "$PYTHON" -c "$(dape)" bench engine small --device cpu --json "$FOLDER/engine.json" \
        --lengths 20 --contexts 20 --streams 2 --tokens 4 --repeats 1
else
    part engine 130 "$PYTHON" -c "$(dape)" bench engine 125m --device cuda --dtype bfloat16 --max-num-seqs 64 \
        --max-num-batched-tokens 8192 --json "$FOLDER/engine.json" \
        --lengths 1024,16384 --contexts 1024 --streams 1,64 --repeats 2
fi
if [ -n "$TUNE" ]; then
    part tune 590 "$PYTHON" -m dape_kernels.triton.tune --json "$FOLDER/tune.json"
fi
exit $FAILED
