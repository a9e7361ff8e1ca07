#!/usr/bin/env bash
# Runs a compiler with our capabilities, threads and debug information, whatever a setup.py asks for.
#
# usage: own_flags.sh nvcc|g++ COMPILER ARGUMENTS
set -euo pipefail

kind="$1"
compiler="$2"
shift 2

# The C++ standard that a setup.py names, or a newer one where torch's headers need that at least.
raised() {
    case "$1" in
        c++0x | c++11 | c++14 | c++1y | c++17 | c++1z | gnu++11 | gnu++14 | gnu++17) echo "c++${CXX_STANDARD:-17}" ;;
        *) echo "$1" ;;
    esac
}

work="$(cd "${SRC_DIR}" && pwd -P)"
args=()
# nvcc takes it once only, and torch adds one where it sees none in the spelling that it knows.
standard=""
while [ "$#" -gt 0 ]; do
    case "$1" in
        -gencode | --generate-code | -arch | --gpu-architecture | -code | --gpu-code | --threads | -t | -split-compile | --split-compile)
            [ "${kind}" = nvcc ] && shift 2 && continue
            ;;
        -gencode=* | --generate-code=* | -arch=* | --gpu-architecture=* | -code=* | --gpu-code=* | --threads=* | -t=* | -lineinfo | --generate-line-info | -split-compile=* | --split-compile=*)
            [ "${kind}" = nvcc ] && shift && continue
            ;;
        -std | --std)
            [ "${kind}" = nvcc ] && standard="$(raised "$2")" && shift 2 && continue
            ;;
        -std=* | --std=*)
            standard="$(raised "${1#*=}")"
            [ "${kind}" = nvcc ] || args+=("-std=${standard}")
            shift
            continue
            ;;
        *.cu)
            echo "$1" >>"${COMPILED}"
            ;;
        "-I${SRC_DIR}" | "-I${work}")
            # The folder of the sources itself: its absolute path would get into the library (see compile.sh).
            set -- -I. "${@:2}"
            ;;
    esac
    args+=("$1")
    shift
done
if [ "${kind}" = nvcc ]; then
    [ -z "${standard}" ] || args+=("-std=${standard}")
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
