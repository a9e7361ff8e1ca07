// Stands for torch's header of this name in .cu files (see README.md): IEEE's 16-bit floating-point number.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include <cuda_fp16.h>

namespace c10 {

struct alignas(2) Half {
    unsigned short x;

    Half() = default;
    __device__ Half(float value) : x(__half_as_ushort(__float2half(value))) {}
    __device__ operator float() const { return __half2float(__ushort_as_half(x)); }
};

// torch rounds each result to 16 bits. Without these a file would get the arithmetic of float instead.
Half operator+(const Half &, const Half &) = delete;
Half operator-(const Half &, const Half &) = delete;
Half operator*(const Half &, const Half &) = delete;
Half operator/(const Half &, const Half &) = delete;
Half operator-(const Half &) = delete;

}  // namespace c10

namespace at {
using namespace c10;
}  // namespace at
