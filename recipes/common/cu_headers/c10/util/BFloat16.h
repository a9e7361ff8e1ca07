// Stands for torch's header of this name in .cu files (see README.md): the upper half of a 32-bit floating-point number.
#pragma once

#include <c10/util/Half.h>
#include <cuda_bf16.h>

namespace c10 {

struct alignas(2) BFloat16 {
    uint16_t x;

    BFloat16() = default;
    __device__ BFloat16(float value) : x(rounded(value)) {}
    // Not by __ushort_as_bfloat16, which CUDA 11 has from 8.0 on only.
    __device__ operator float() const { return __bfloat162float(*reinterpret_cast<const __nv_bfloat16 *>(&x)); }

  private:
    // To the nearest, to even of two; as torch does, in integers where the GPU has no instruction for it.
    static __device__ uint16_t rounded(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
        return __bfloat16_as_ushort(__float2bfloat16(value));
#else
        if (std::isnan(value)) {
            return 0x7fc0;
        }
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof(bits));
        return static_cast<uint16_t>((bits + ((bits >> 16) & 1) + 0x7fff) >> 16);
#endif
    }
};

BFloat16 operator+(const BFloat16 &, const BFloat16 &) = delete;
BFloat16 operator-(const BFloat16 &, const BFloat16 &) = delete;
BFloat16 operator*(const BFloat16 &, const BFloat16 &) = delete;
BFloat16 operator/(const BFloat16 &, const BFloat16 &) = delete;
BFloat16 operator-(const BFloat16 &) = delete;

}  // namespace c10
