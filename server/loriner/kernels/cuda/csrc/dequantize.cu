// An NF4 weight as linear.cu reads it -> bf16 [N, K] in its own order, for matrix products of many rows.
//
// A warp does a block of 64 inputs of 16 outputs at a time and writes whole 128-byte rows. Defines: KIND (0 f32 scales,
// 1 nested), GATED (rows stand as 8 of gate, 8 of up).
#include "common.cuh"

#define WARPS 8
#define TILES 4    // of a thread block, in turns
#define STRIDE 36  // words of a row in shared memory: neither writes nor reads meet a bank twice

struct Values {
    float of[16 + 256];
};

// Grid: (ceil(KB / WARPS), ceil(tiles / TILES)). Fields as Params of linear.cu; values: of NF4, then of nested scales.
extern "C" __global__ void __launch_bounds__(WARPS * 32) dequantize(u16* out, const u8* weight, const u8* scale, const float* nested, const float* offset,
                                                                    const __grid_constant__ Values values, i32 tiles, i32 N, i32 K, i32 KB, i32 nested_shift) {
    __shared__ __align__(16) u32 rows[WARPS][16 * STRIDE];
    __shared__ float code[16], map[256];
    grid_launch();
    if (threadIdx.x < 16) code[threadIdx.x] = values.of[threadIdx.x];
    if (KIND == 1) map[threadIdx.x] = values.of[16 + threadIdx.x];
    const i32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const i32 kb = blockIdx.x * WARPS + warp, first = blockIdx.y * TILES, count = kb * 64 < K ? min(tiles - first, TILES) : 0;
    uint4 q[TILES];
#pragma unroll
    for (int i = 0; i < TILES; i++)
        if (i < count) q[i] = ld_once(weight + ((i64)(first + i) * KB + kb) * 512 + lane * 16);
    __syncthreads();
    float own[TILES][2];
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            if (i >= count) continue;
            const i64 tile = first + i, at = (tile * (KB / 4) + kb / 4) * 64 + (g * 2 + h) * 4 + kb % 4;
            if (KIND == 0) own[i][h] = ((const float*)scale)[at];
            else {
                const i32 spans = (KB + (1 << nested_shift) - 1) >> nested_shift;
                const float outer = nested[(tile * spans + (kb >> nested_shift)) * 16 + g * 2 + h];
                own[i][h] = __fadd_rn(__fmul_rn(map[scale[at]], outer), offset[tile * 16 + g * 2 + h]);
            }
        }
    grid_wait();
    u32* to = rows[warp];
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        if (i >= count) break;
        const i32 tile = first + i;
        const u32 words[4] = {q[i].x, q[i].y, q[i].z, q[i].w};
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
            for (int b = 0; b < 4; b++) {
                const u32 byte = words[k] >> (8 * b) & 255;
                const i32 h = b & 1;
                to[(g + h * 8) * STRIDE + k * 8 + (b >> 1) * 4 + t] = pack_bf16(code[byte & 15] * own[i][h], code[byte >> 4] * own[i][h]);
            }
        __syncwarp();
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const i32 r = j * 4 + lane / 8, c = lane % 8;
            const i32 n = GATED ? tile * 8 + (r & 7) + (r < 8 ? 0 : N / 2) : tile * 16 + r;
            const bool real = GATED ? tile * 8 + (r & 7) < N / 2 : n < N;
            if (real) *(uint4*)(out + (i64)n * K + kb * 64 + c * 8) = *(const uint4*)(to + r * STRIDE + c * 4);
        }
        __syncwarp();
    }
}
