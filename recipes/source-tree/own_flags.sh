#!/usr/bin/env bash
# Runs a compiler with our capabilities, threads and debug information, whatever a setup.py asks for.
#
# usage: own_flags.sh nvcc|g++ COMPILER ARGUMENTS
set -euo pipefail

kind="$1"
compiler="$2"
shift 2
args=()
while [ "$#" -gt 0 ]; do
    case "$1" in
        -gencode | --generate-code | -arch | --gpu-architecture | -code | --gpu-code | --threads | -t | -split-compile | --split-compile)
            [ "${kind}" = nvcc ] && shift 2 && continue
            ;;
        -gencode=* | --generate-code=* | -arch=* | --gpu-architecture=* | -code=* | --gpu-code=* | --threads=* | -t=* | -lineinfo | --generate-line-info | -split-compile=* | --split-compile=*)
            [ "${kind}" = nvcc ] && shift && continue
            ;;
        -std=c++11 | -std=c++14 | -std=c++17)
            # What torch's headers need at least.
            args+=("-std=c++${CXX_STANDARD:-17}")
            shift
            continue
            ;;
        *.cu)
            echo "$1" >>"${COMPILED}"
            ;;
    esac
    args+=("$1")
    shift
done
if [ "${kind}" = nvcc ]; then
    IFS=';' read -ra archs <<<"${TORCH_CUDA_ARCH_LIST}"
    for arch in "${archs[@]}"; do
        number="${arch%+PTX}"
        number="${number/./}"
        args+=(-gencode "arch=compute_${number},code=sm_${number}")
        if [ "${arch}" != "${arch%+PTX}" ]; then
            args+=(-gencode "arch=compute_${number},code=compute_${number}")
        fi
    done
    args+=(--threads "${NVCC_THREADS:-1}")
fi
exec "${compiler}" "${args[@]}"
