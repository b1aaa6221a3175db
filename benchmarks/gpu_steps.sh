#!/bin/sh
# The table of private steps on a GPU (docs/performance.md): sh benchmarks/gpu_steps.sh OUT_DIR [a|b]
# a: ResNet-18 and Fashion-MNIST; b: ResNet-50, the transformers, DenseNet-121. Each part takes one GPU about 150 s, half
# of it for kernels that compile at first use; without a part both, one after the other. On two GPUs:
#   CUDA_VISIBLE_DEVICES=0 sh benchmarks/gpu_steps.sh OUT a & CUDA_VISIBLE_DEVICES=1 sh benchmarks/gpu_steps.sh OUT b
# The most important come first, and what was measured is written at once: a run that is stopped loses little.
set -u # what fails leaves the rest to be measured
out=$1 part=${2:-ab}
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"

steps() { # file, seconds, models, batch sizes
    "${PYTHON:-python}" benchmarks/step.py --device cuda --precision tf32 --warmup 2 --repeats 15 --seconds 2.5 \
        --within "$2" --models $3 --batch-sizes $4 --out "$out/steps_$1.json"
}

case $part in *a*)
    steps a256 95 "resnet18-cifar resnet18-imagenet fashion" 256
    steps a 40 resnet18-cifar "1024 64"
esac
case $part in *b*)
    steps b256 135 "resnet50-imagenet vit transformer densenet121" 256
esac
