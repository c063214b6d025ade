// Small row-wise kernels: embedding, RMSNorm, gathered rows, gates. One block a row, fp32 inside, bf16 out.
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

// y [M, I] bf16 = act(g) * u, where [g | u] = x [M, 2I] bf16 (I a multiple of 8). Grid: (ceil(I / 2048), M), 256 threads.
extern "C" __global__ void gate(u16* y, const u16* x, i32 I, i32 is_gelu) {
    grid_launch();
    grid_wait();
    const i32 i = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (i >= I) return;
    const u16* row = x + (i64)blockIdx.y * 2 * I;
    const uint4 g = *(const uint4*)(row + i), u = *(const uint4*)(row + I + i);
    const u32 gs[4] = {g.x, g.y, g.z, g.w}, us[4] = {u.x, u.y, u.z, u.w};
    u32 to[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const float a = lo_to_float(gs[j]), b = hi_to_float(gs[j]);
        to[j] = pack_bf16((is_gelu ? gelu(a) : silu(a)) * lo_to_float(us[j]), (is_gelu ? gelu(b) : silu(b)) * hi_to_float(us[j]));
    }
    *(uint4*)(y + (i64)blockIdx.y * I + i) = make_uint4(to[0], to[1], to[2], to[3]);
}

// h [n] f32 += y [n] bf16 (n a multiple of 4). Grid: ceil(n / 1024), 256 threads.
extern "C" __global__ void add_rows(float* h, const u16* y, i32 n) {
    grid_launch();
    grid_wait();
    const i32 i = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i >= n) return;
    float4 f = *(float4*)(h + i);
    const uint2 v = *(const uint2*)(y + i);
    f.x += lo_to_float(v.x), f.y += hi_to_float(v.x), f.z += lo_to_float(v.y), f.w += hi_to_float(v.y);
    *(float4*)(h + i) = f;
}

// A bf16 bias [N] onto y [M, N] bf16, for linears that went through cuBLAS. Grid: (ceil(N / 256), M).
extern "C" __global__ void add_bias(u16* y, const float* bias, i32 N) {
    grid_launch();
    grid_wait();
    const i32 n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= N) return;
    u16* at = y + (i64)blockIdx.y * N + n;
    *at = float_to_bf16(bf16_to_float(*at) + bias[n]);
}
