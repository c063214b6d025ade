// An NF4 weight as linear.cu reads it -> bf16 [N, K] in its own order, for matrix products of many rows.
//
// A warp does one block of 64 inputs of 16 outputs and writes whole 128-byte rows. Defines: KIND (0 f32 scales,
// 1 nested), GATED (rows stand as 8 of gate, 8 of up).
#include "common.cuh"

#define WARPS 4

struct Values {
    float of[16 + 256];
};

// Grid: ceil(tiles * KB / WARPS). Fields as Params of linear.cu; values: of NF4, then of nested scales.
extern "C" __global__ void __launch_bounds__(WARPS * 32) dequantize(u16* out, const u8* weight, const u8* scale, const float* nested, const float* offset,
                                                                    const __grid_constant__ Values values, i32 tiles, i32 N, i32 K, i32 KB, i32 nested_shift) {
    __shared__ u32 rows[WARPS][16][33];
    __shared__ float code[16];
    grid_launch();
    if (threadIdx.x < 16) code[threadIdx.x] = values.of[threadIdx.x];
    __syncthreads();
    grid_wait();
    const i32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const i64 unit = (i64)blockIdx.x * WARPS + warp;
    const i32 tile = unit / KB, kb = unit % KB;
    if (tile >= tiles || kb * 64 >= K) return;
    const uint4 q = *(const uint4*)(weight + unit * 512 + lane * 16);
    float own[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const i64 at = ((i64)tile * (KB / 4) + kb / 4) * 64 + (g * 2 + h) * 4 + kb % 4;
        if (KIND == 0) own[h] = ((const float*)scale)[at];
        else {
            const i32 spans = (KB + (1 << nested_shift) - 1) >> nested_shift;
            const float outer = nested[((i64)tile * spans + (kb >> nested_shift)) * 16 + g * 2 + h];
            own[h] = __fadd_rn(__fmul_rn(values.of[16 + scale[at]], outer), offset[tile * 16 + g * 2 + h]);
        }
    }
    const u32 words[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
    for (int k = 0; k < 4; k++)
#pragma unroll
        for (int b = 0; b < 4; b++) {
            const u32 byte = words[k] >> (8 * b) & 255;
            const i32 h = b & 1;
            rows[warp][g + h * 8][k * 8 + (b >> 1) * 4 + t] = pack_bf16(code[byte & 15] * own[h], code[byte >> 4] * own[h]);
        }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < 16; r++) {
        const i32 packed = tile * 16 + r;
        const i32 n = GATED ? (r < 8 ? tile * 8 + r : N / 2 + tile * 8 + r - 8) : packed;
        const bool real = GATED ? tile * 8 + (r & 7) < N / 2 : packed < N;
        if (real) ((u32*)(out + (i64)n * K + kb * 64))[lane] = rows[warp][r][lane];
    }
}
