#!/bin/sh
# Measures what is committed under benchmarks/results for a GPU: sh benchmarks/h200.sh OUT_DIR [NAME] [steps|products]
# steps: training steps, their kernels and energy, convolutions, copies (under five minutes). products: the calibration
# of matrix products and board power (two and a half). Both by default.
set -u # what fails leaves the rest to be measured
out=$1 name=${2:-h200} part=${3:-both}
python=${PYTHON:-python}
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"

steps() { # file, models, precisions, batch sizes, further arguments
    "$python" benchmarks/step.py --device cuda --formats --repeats 10 --seconds 5 --models $2 --precision $3 \
        --batch-sizes $4 --out "$out/step_${name}_$1.json" --kernels "$out/kernels_${name}_$1.json" $5
}

if [ "$part" != products ]; then
    steps resnet18 resnet18-cifar "tf32 bf16 float32" "64 256 512 1024" --energy
    "$python" benchmarks/convolutions.py --device cuda --hardware "$name" --out "$out/convolutions_$name.json" | tail -22
    steps others "digits fashion resnet50-imagenet" "tf32 bf16" 256 ""
fi
if [ "$part" != steps ]; then
    "$python" -m dpquant.cli hardware calibrate --seconds 80 \
        --out "$out/${name}_measured.yaml" --data "$out/gemm_$name.csv"
    gzip -9nf "$out/gemm_$name.csv"
fi
