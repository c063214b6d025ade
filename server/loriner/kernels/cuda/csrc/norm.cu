// Small row-wise kernels: embedding, RMSNorm of all or of gathered rows. One block a row, fp32 inside, bf16 out.
#include "common.cuh"

// h [M, H] f32 = table[token] (H a multiple of 4).
extern "C" __global__ void embed(float* h, const i32* token, const u16* table, i32 H, i32 vocab) {
    grid_launch();
    grid_wait();
    const i32 row = blockIdx.x, id = min(max(token[row], 0), vocab - 1);
    const u16* e = table + (i64)id * H;
    for (int i = threadIdx.x * 4; i < H; i += blockDim.x * 4) {
        const uint2 v = *(const uint2*)(e + i);
        *(float4*)(h + (i64)row * H + i) = make_float4(lo_to_float(v.x), hi_to_float(v.x), lo_to_float(v.y), hi_to_float(v.y));
    }
}

// x [M, H] bf16 = h / sqrt(mean(h^2) + eps) * w, where row m of x is row rows[m] of h (or m when rows is null).
// (arXiv 1910.07467, eq. 4)
extern "C" __global__ void __launch_bounds__(256) rms_norm(u16* x, const float* h, const float* w, const i32* rows, i32 H, float eps) {
    __shared__ float warps[8];
    grid_launch();
    const i32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    float4 weight[4], v[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {  // weights do not depend on the kernel ahead
        const i32 i = (threadIdx.x + j * 256) * 4;
        if (i < H) weight[j] = *(const float4*)(w + i);
    }
    grid_wait();
    const float* from = h + (i64)(rows ? rows[blockIdx.x] : blockIdx.x) * H;
    u16* to = x + (i64)blockIdx.x * H;
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const i32 i = (threadIdx.x + j * 256) * 4;
        if (i < H) {
            v[j] = *(const float4*)(from + i);
            sum += v[j].x * v[j].x + v[j].y * v[j].y + v[j].z * v[j].z + v[j].w * v[j].w;
        }
    }
    for (i32 i = (threadIdx.x + 1024) * 4; i < H; i += 1024) {
        const float4 f = *(const float4*)(from + i);
        sum += f.x * f.x + f.y * f.y + f.z * f.z + f.w * f.w;
    }
    sum = warp_sum(sum);
    if (lane == 0) warps[warp] = sum;
    __syncthreads();
    sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) sum += warps[i];
    const float scale = rsqrtf(sum / H + eps);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const i32 i = (threadIdx.x + j * 256) * 4;
        if (i < H)
            *(uint2*)(to + i) = make_uint2(pack_bf16(v[j].x * scale * weight[j].x, v[j].y * scale * weight[j].y),
                                           pack_bf16(v[j].z * scale * weight[j].z, v[j].w * scale * weight[j].w));
    }
    for (i32 i = (threadIdx.x + 1024) * 4; i < H; i += 1024) {
        const float4 f = *(const float4*)(from + i), g = *(const float4*)(w + i);
        *(uint2*)(to + i) = make_uint2(pack_bf16(f.x * scale * g.x, f.y * scale * g.y), pack_bf16(f.z * scale * g.z, f.w * scale * g.w));
    }
}
