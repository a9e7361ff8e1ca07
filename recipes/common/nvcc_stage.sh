#!/usr/bin/env bash
# Runs one of nvcc's compilers, cicc or cudafe++, so that nothing of this process and its folder gets into the result.
#
# The one that reads a file first gives what is local to it a name with two hashes. One is of its arguments, where nvcc
# puts the absolute path of the source whatever it was given; paths below the work folder, where nvcc was started (see
# compile.sh), become relative. The other is of what it asks the system: constant_identity.cpp answers.
set -euo pipefail

tool="$1.real"
shift
args=("${@//"${SRC_DIR}/"/}")
args=("${args[@]//"$(pwd -P)/"/}")
LD_PRELOAD="${SRC_DIR}/.tools/constant_identity.so" exec "${tool}" "${args[@]}"
