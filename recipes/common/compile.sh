#!/usr/bin/env bash
# Runs a compiler with paths relative to the sources, through ccache where it is set up.
#
# Where the folders of a build are must not show in its result: nvcc puts the names of the files it reads into the
# names of its symbols, and the cache would miss. So every path below the work folder becomes relative, and the
# environments are reached through links in it, whose names say nothing about the Python version.
set -euo pipefail

work="$(cd "${SRC_DIR}" && pwd -P)"
if [ -n "${LINK_SPECS:-}" ] && [[ " $* " != *" -c "* ]]; then
    # Specs of the command line come after GCC has put the sysroot into its own: without it the linker would take what
    # libc.so names, an absolute path, from the machine.
    set -- "$@" "-specs=${LINK_SPECS}" ${LINK_SYSROOT:+"-Wl,--sysroot=${LINK_SYSROOT}"}
fi
standard="${CXX_STANDARD:-17}"
if [ -n "${CU_HEADERS:-}" ] && [[ " $* " == *" -c "* ]]; then
    if [[ " $* " == *".cu "* ]]; then
        without_torch="$("${PYTHON}" -IS "${CU_HEADERS%/*}/own_headers.py" "$@")"
        if [ -n "${without_torch}" ]; then
            mapfile -t words <<<"${without_torch}"
            set -- "${words[@]}"
            # What the project names: the newer language is torch's wish.
            standard=17
        fi
    else
        set -- "$@" -include "${CU_HEADERS%/*}/cuda_check.h"
    fi
fi
args=()
for arg in "$@"; do
    # A conda compiler's LDFLAGS name the prefix here. The recipe sets the rpaths; a relative one would stay beside them.
    if [[ "${arg}" == -Wl,-rpath,* ]]; then
        continue
    fi
    # Both projects name C++17, and torch from 2.14 on takes nothing older than C++20.
    if [ "${arg}" = "-std=c++17" ]; then
        arg="-std=c++${standard}"
    fi
    # torch before 2.11 writes nvcc's long names, which ccache hands to the preprocessor as they are: it fails, and
    # nothing is cached.
    case "${arg}" in
    --generate-dependencies-with-compile) arg="-MD" ;;
    --dependency-output) arg="-MF" ;;
    esac
    arg="${arg//"${SP_DIR}"/.site}"
    arg="${arg//"${PREFIX}/include/python${PY_VER}"/.python}"
    arg="${arg//"${PREFIX}"/.host}"
    arg="${arg//"${BUILD_PREFIX}"/.build}"
    arg="${arg//"${SRC_DIR}/"/}"
    arg="${arg//"${work}/"/}"
    args+=("${arg}")
done
cd "${SRC_DIR}"
if [ -n "${CCACHE:-}" ]; then
    exec "${CCACHE}" "${args[@]}"
fi
exec "${args[@]}"
