#!/usr/bin/env bash
# Stands in the place of nvcc, ptxas and fatbinary, so that GPUs newer than this nvcc get machine code.
#
# nvcc 12.4 knows nothing newer than 9.0, and what NVIDIA publishes of 12.9 as wheels has a ptxas and no nvcc. So nvcc
# compiles to PTX for 9.0, as for any GPU that a driver would compile it for later; the newer ptxas assembles that PTX
# for the GPU now, and fatbinary puts its code beside that for 9.0, or in its place where 9.0 was not asked for.
# The programs themselves are beside this one under the name NAME.real. The file has no path in it, because the compile
# cache takes it for the compiler.
set -euo pipefail

tool="${0##*/}"
here="${0%/*}"
args=()
case "${tool}" in
nvcc)
    newer="" has_own=""
    while [ $# -gt 0 ]; do
        if [ "$1" = "-gencode" ] && [[ "${2:-}" =~ ^arch=compute_(1[0-9][0-9]),code=sm_(1[0-9][0-9])$ ]]; then
            newer="${newer:+${newer} }${BASH_REMATCH[2]}"
            shift 2
            continue
        fi
        if [ "$1" = "arch=compute_90,code=sm_90" ]; then has_own=1; fi
        args+=("$1")
        shift
    done
    if [ -n "${newer}" ]; then
        export FORGE_NEWER="${newer}" FORGE_NEWER_ALONE=""
        if [ -z "${has_own}" ]; then
            args+=(-gencode arch=compute_90,code=sm_90)
            FORGE_NEWER_ALONE=1
        fi
    fi
    ;;
ptxas)
    if [ -n "${FORGE_NEWER:-}" ] && [[ " $* " == *" -arch=sm_90 "* ]]; then
        for number in ${FORGE_NEWER}; do
            args=() output="" is_output=""
            for arg in "$@"; do
                if [ -n "${is_output}" ]; then
                    output="${arg}" arg="${arg}.sm_${number}"
                fi
                is_output=""
                if [ "${arg}" = "-o" ]; then is_output=1; fi
                if [ "${arg}" = "-arch=sm_90" ]; then arg="-arch=sm_${number}"; fi
                args+=("${arg}")
            done
            "${here}/newer-ptxas" "${args[@]}"
        done
        if [ -n "${FORGE_NEWER_ALONE:-}" ]; then
            # nvcc looks for it and removes it; fatbinary is not given it.
            : >"${output}"
            exit 0
        fi
    fi
    args=("$@")
    ;;
fatbinary)
    made=()
    for arg in "$@"; do
        if [ -n "${FORGE_NEWER:-}" ] && [[ "${arg}" =~ ^--image3=kind=elf,sm=90,file=(.*)$ ]]; then
            if [ -z "${FORGE_NEWER_ALONE:-}" ]; then args+=("${arg}"); fi
            for number in ${FORGE_NEWER}; do
                made+=("${BASH_REMATCH[1]}.sm_${number}")
                args+=("--image3=kind=elf,sm=${number},file=${BASH_REMATCH[1]}.sm_${number}")
            done
        else
            args+=("${arg}")
        fi
    done
    "${here}/${tool}.real" "${args[@]}"
    rm -f "${made[@]}"
    exit 0
    ;;
esac
exec "${here}/${tool}.real" "${args[@]}"
