#!/bin/sh
# Measures what is committed under benchmarks/results for a GPU: sh benchmarks/h200.sh OUT_DIR [NAME] [steps|products]
# steps: training steps and their energy, convolutions, copies (some three minutes). products: the calibration of matrix
# products and board power (two). Both by default.
set -u # what fails leaves the rest to be measured
out=$1 name=${2:-h200} part=${3:-both}
python=${PYTHON:-python}
export PYTHONPATH=.
mkdir -p "$out"

steps() { # precision, file, models, batch sizes, further arguments
    "$python" benchmarks/step.py --device cuda --formats --repeats 10 --seconds 6 --precision "$1" \
        --models $3 --batch-sizes $4 --out "$out/step_${name}_$2.json" $5
}

if [ "$part" != products ]; then
    steps tf32 tf32 resnet18-cifar "64 256 1024" --energy
    steps bf16 bf16 resnet18-cifar "64 256 1024" ""
    steps float32 float32 resnet18-cifar "64 256 1024" ""
    steps tf32 small "digits fashion" 256 ""
    steps tf32 unseen resnet50-imagenet 256 ""
    "$python" benchmarks/convolutions.py --device cuda --hardware "$name" --out "$out/convolutions_$name.json" | tail -22
fi
if [ "$part" != steps ]; then
    "$python" -m dpquant.cli hardware calibrate --seconds 80 \
        --out "$out/${name}_measured.yaml" --data "$out/gemm_$name.csv"
    gzip -9nf "$out/gemm_$name.csv"
fi
