// RoPE and the write into the paged KV cache, fused: one pass over the q|k|v rows of a step.
//
// q is rotated in place; k is rotated and v copied into the cache, and stay as they are in qkv. With
// q_norm and k_norm each head is RMS-normalised first. A head belongs to `LANES` neighbouring threads,
// each with 8 dims of either half. positions and slots are read before grid_wait(): they come from
// copies that end before the step's first kernel.
#include "common.cuh"

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef BLOCK_SIZE
#define BLOCK_SIZE 16
#endif
#define HALF (HEAD_DIM / 2)
#define USED (HEAD_DIM / 16)  // threads with work, of a head's LANES
#define LANES (USED <= 1 ? 1 : USED <= 2 ? 2 : USED <= 4 ? 4 : USED <= 8 ? 8 : 16)
#define THREADS 128
static_assert(HEAD_DIM % 16 == 0 && HEAD_DIM <= 256, "head dims are multiples of 16, up to 256");

DEV uint4 load16(const void* p) { return *(const uint4*)p; }

DEV void unpack(const uint4& v, float* x) {
    x[0] = lo_to_float(v.x), x[1] = hi_to_float(v.x), x[2] = lo_to_float(v.y), x[3] = hi_to_float(v.y);
    x[4] = lo_to_float(v.z), x[5] = hi_to_float(v.z), x[6] = lo_to_float(v.w), x[7] = hi_to_float(v.w);
}

DEV uint4 pack(const float* x) {
    uint4 v;
    v.x = pack_bf16(x[0], x[1]), v.y = pack_bf16(x[2], x[3]);
    v.z = pack_bf16(x[4], x[5]), v.w = pack_bf16(x[6], x[7]);
    return v;
}

DEV void load8(const float* p, float* x) {
    const float4 a = *(const float4*)p, b = *(const float4*)(p + 4);
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

// x *= w / sqrt(mean(x^2) + eps) over the head; every lane of the warp takes part.
DEV void normalise(float* x1, float* x2, const float* w, float eps, i32 dim, bool used) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; j++) sum += x1[j] * x1[j] + x2[j] * x2[j];
#pragma unroll
    for (int i = LANES / 2; i; i >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, i);
    const float by = rsqrtf(sum * (1.0f / HEAD_DIM) + eps);
    if (!used) return;
    float w1[8], w2[8];
    load8(w + dim, w1);
    load8(w + HALF + dim, w2);
#pragma unroll
    for (int j = 0; j < 8; j++) x1[j] *= by * w1[j], x2[j] *= by * w2[j];
}

// qkv [T, (Hq + 2 Hkv) D] bf16; positions, slots [T]; cos, sin [max_len, D/2]; q_norm, k_norm [D] or 0;
// k_cache, v_cache [blocks, Hkv, BLOCK_SIZE, D]. Grid: ceil(T * heads * LANES / THREADS).
extern "C" __global__ void __launch_bounds__(THREADS)
    rope_store(u16* qkv, const i32* positions, const i32* slots, const float* cos, const float* sin,
               const float* q_norm, const float* k_norm, float eps, u16* k_cache, u16* v_cache, i32 num_rows,
               i32 num_q, i32 num_kv) {
    grid_launch();
    const i32 heads = num_q + 2 * num_kv;
    const i32 lane = threadIdx.x % LANES;
    const i32 index = (blockIdx.x * THREADS + threadIdx.x) / LANES;
    const i32 row = index / heads, head = index % heads;
    const bool used = lane < USED && row < num_rows;
    const i32 dim = lane * 8;
    i32 slot = -1;
    float c[8], s[8];
#pragma unroll
    for (int j = 0; j < 8; j++) c[j] = 1.0f, s[j] = 0.0f;
    if (used) {
        slot = slots[row];
        if (head < num_q + num_kv) {
            const i64 at = (i64)positions[row] * HALF + dim;
            load8(cos + at, c);
            load8(sin + at, s);
        }
    }
    grid_wait();

    u16* at = qkv + ((i64)row * heads + head) * HEAD_DIM + dim;
    uint4 low = make_uint4(0, 0, 0, 0), high = low;
    if (used) low = load16(at), high = load16(at + HALF);
    const bool rotated = head < num_q + num_kv;
    const float* norm = head < num_q ? q_norm : k_norm;
    float x1[8], x2[8];
    unpack(low, x1);
    unpack(high, x2);
    if (q_norm) normalise(x1, x2, norm, eps, dim, used && rotated);
    if (rotated) {
        float y1[8], y2[8];
#pragma unroll
        for (int j = 0; j < 8; j++) {
            y1[j] = x1[j] * c[j] - x2[j] * s[j];
            y2[j] = x2[j] * c[j] + x1[j] * s[j];
        }
        low = pack(y1), high = pack(y2);
    }
    if (!used) return;
    if (head >= num_q) {
        if (slot < 0) return;
        const bool is_key = head < num_q + num_kv;
        const i64 kv = head - num_q - (is_key ? 0 : num_kv);
        const i64 cell = ((i64)(slot / BLOCK_SIZE) * num_kv + kv) * BLOCK_SIZE + slot % BLOCK_SIZE;
        at = (is_key ? k_cache : v_cache) + cell * HEAD_DIM + dim;
    }
    *(uint4*)at = low;
    *(uint4*)(at + HALF) = high;
}
