// What bias, adapters, gate and residual make of a product of many rows that another kernel made.
//
// With adapters all but the bias are one pass; their A x comes from lora.cu's lora_shrink. Rows without one end as they do where nobody has
// any: to the last bit.
#include "common.cuh"
#include "lora.cuh"

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

// Four ranks of one row of t, those from `rank` on as zeros. `whole`: they are aligned for a wide load.
DEV float4 four_of(const float* from, i32 k, i32 rank, bool whole) {
    if (whole) return k < rank ? *(const float4*)(from + k) : make_float4(0, 0, 0, 0);
    return make_float4(k < rank ? from[k] : 0, k + 1 < rank ? from[k + 1] : 0, k + 2 < rank ? from[k + 2] : 0, k + 3 < rank ? from[k + 3] : 0);
}
// The same of B, whose output n stands at `from` for rank 0.
DEV uint2 four_of(const u16* from, i32 k, i32 rank, u32 tiled) {
    if (tiled) {
        const u32* pairs = (const u32*)(from + b_at(0, k, rank, true));
        return k < rank ? make_uint2(__ldg(pairs), __ldg(pairs + 2)) : make_uint2(0, 0);
    }
    const u32 a = k < rank ? from[k] : 0, b = k + 1 < rank ? from[k + 1] : 0, c = k + 2 < rank ? from[k + 2] : 0, d = k + 3 < rank ? from[k + 3] : 0;
    return make_uint2(a | b << 16, c | d << 16);
}

// acc [16 rows, 32 outputs] = t B^T for the rows in `rows`, over the ranks of one slice. t is f32: it is multiplied as a
// sum of two bf16. A lane takes four consecutive ranks as its fragments', and column c of the four tiles of
// outputs is output c / 2 * 8 + tile * 2 + c % 2: so each lane holds eight consecutive outputs.
DEV void expand(float (&acc)[4][4], const RowLora& l, const float* t, i32 stride, i32 n, u32 rows) {
    const i32 lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
    const bool whole = (l.rank | l.begin) % 4 == 0;
    const u16* b = l.b + b_at(n + (g >> 1) * 8 + (g & 1), 0, l.rank, l.tiled);
    const i32 two = b_at(2, 0, l.rank, l.tiled);  // outputs further: n is a multiple of 8
    for (i32 k0 = 0; k0 < l.rank; k0 += 16) {
        const i32 k = k0 + q * 4;
        uint2 out[4];
#pragma unroll
        for (int j = 0; j < 4; j++) out[j] = four_of(b + j * two, k, l.rank, l.tiled);
        u32 high[4], low[4];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const i32 row = h * 8 + g;
            const float4 v = four_of(t + (i64)row * stride + l.begin, k, rows >> row & 1 ? l.rank : 0, whole);
            high[h] = pack_bf16(v.x, v.y), high[h + 2] = pack_bf16(v.z, v.w);
            low[h] = pack_bf16(v.x - lo_to_float(high[h]), v.y - hi_to_float(high[h]));
            low[h + 2] = pack_bf16(v.z - lo_to_float(high[h + 2]), v.w - hi_to_float(high[h + 2]));
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            mma_bf16(acc[j], high[0], high[1], high[2], high[3], out[j].x, out[j].y);
            mma_bf16(acc[j], low[0], low[1], low[2], low[3], out[j].x, out[j].y);
        }
    }
}

// What becomes of a product.
#define STORE 0
#define ADD 1
#define SILU 2  // gated
#define GELU 3
#define IS_GATED(end) ((end) >= SILU)

DEV u32 add_pair(u32 y, float a, float b) { return pack_bf16(lo_to_float(y) + a, hi_to_float(y) + b); }
DEV float at(const uint4& v, int i) {
    const u32 pair = i < 2 ? v.x : i < 4 ? v.y : i < 6 ? v.z : v.w;
    return i & 1 ? hi_to_float(pair) : lo_to_float(pair);
}

// What another kernel multiplied, and where it goes.
struct Product {
    void* y;  // STORE: x; ADD: f32 [M, N]; gated: bf16 [M, N / 2]
    u16* x;   // bf16 [M, N]
    i32 M, N;

    // Output n of a row, to which adapters add `share`; of gated ones, whose up has `up`.
    template <int END> DEV void finish(i64 row, i32 n, float share, float up) const {
        u16* from = x + row * N + n;
        const float v = bf16_to_float(*from) + share;
        if (END == STORE) *from = float_to_bf16(v);
        if (END == ADD) ((float*)y)[row * N + n] += v;
        if (IS_GATED(END)) ((u16*)y)[row * (N / 2) + n] = float_to_bf16(activate(v, END == GELU) * (bf16_to_float(from[N / 2]) + up));
    }

    // Eight consecutive outputs of a row.
    DEV const uint4* eight(i64 row, i32 n) const { return (const uint4*)(x + row * N + n); }

    // The same for those, of which x is v; of gated ones, those of up are u.
    template <int END> DEV void finish8(i64 row, i32 n, const uint4& v, const uint4& u, const float (&share)[8], const float (&up)[8]) const {
        if (END == STORE) *(uint4*)eight(row, n) = make_uint4(add_pair(v.x, share[0], share[1]), add_pair(v.y, share[2], share[3]), add_pair(v.z, share[4], share[5]), add_pair(v.w, share[6], share[7]));
        if (END == ADD) {
            float4* to = (float4*)((float*)y + row * N + n);
            const float4 p = to[0], q = to[1];
            to[0] = make_float4(p.x + (at(v, 0) + share[0]), p.y + (at(v, 1) + share[1]), p.z + (at(v, 2) + share[2]), p.w + (at(v, 3) + share[3]));
            to[1] = make_float4(q.x + (at(v, 4) + share[4]), q.y + (at(v, 5) + share[5]), q.z + (at(v, 6) + share[6]), q.w + (at(v, 7) + share[7]));
        }
        if (IS_GATED(END)) {
            float z[8];
#pragma unroll
            for (int i = 0; i < 8; i++) z[i] = activate(at(v, i) + share[i], END == GELU) * (at(u, i) + up[i]);
            *(uint4*)((u16*)y + row * (N / 2) + n) = make_uint4(pack_bf16(z[0], z[1]), pack_bf16(z[2], z[3]), pack_bf16(z[4], z[5]), pack_bf16(z[6], z[7]));
        }
    }
};

struct Seated {
    const i32* row_seat;
    const u8* seats;
    i32 group, num_groups, split0, split1;
};

// A warp finishes 32 rows of 32 outputs (of gated ones, 32 pairs), the rows of one seat together; t [M, stride] f32 is their A x.
template <int END> DEV void finish(const Product& p, const float* t, i32 stride, const Seated& s) {
    grid_launch();
    grid_wait();
    constexpr int HALVES = IS_GATED(END) ? 2 : 1;
    const i32 lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3, row0 = blockIdx.y * 32, n0 = blockIdx.x * 128 + (threadIdx.x >> 5) * 32, outputs = p.N / HALVES;
    if (n0 >= outputs) return;
    const i32 slice = IS_GATED(END) ? 0 : (n0 >= s.split0) + (n0 >= s.split1), start = slice == 0 ? 0 : slice == 1 ? s.split0 : s.split1;
    const bool simple = n0 + 32 <= (IS_GATED(END) ? outputs : slice == 0 ? s.split0 : slice == 1 ? s.split1 : p.N) && (outputs | start) % 8 == 0;
    const i32 own = row0 + lane < p.M ? s.row_seat[row0 + lane] : -1;
    t += (i64)row0 * stride;
    u32 left = __ballot_sync(0xffffffffu, row0 + lane < p.M && (END != STORE || own >= 0));
    while (left) {
        const i32 seat = __shfl_sync(0xffffffffu, own, __ffs(left) - 1);
        const u32 rows = __ballot_sync(0xffffffffu, own == seat) & left;
        left &= ~rows;
        if (!simple) {  // outputs of two slices, or the last ones
            for (u32 rest = rows; rest && n0 + lane < outputs; rest &= rest - 1) {
                const i32 row = __ffs(rest) - 1;
                float share[2] = {};
#pragma unroll
                for (int h = 0; h < HALVES; h++)
                    if (seat >= 0) share[h] = lora_expand(s.seats, seat, s.group, s.num_groups, s.split0, s.split1, h * outputs + n0 + lane, t + (i64)row * stride);
                p.finish<END>(row0 + row, n0 + lane, share[0], share[1]);
            }
            continue;
        }
        RowLora l[HALVES];
        bool any = END != STORE;
#pragma unroll
        for (int half = 0; half < HALVES; half++) l[half] = row_lora(s.seats, seat, s.group, s.num_groups, slice + half), any |= l[half].rank > 0;
        if (!any) continue;
#pragma unroll 1
        for (i32 m = 0; m < 32; m += 16) {
            const u32 here = rows >> m & 0xffff;
            if (!here) continue;
            uint4 v[HALVES][2] = {};
            float acc[HALVES][4][4] = {};
#pragma unroll
            for (int half = 0; half < HALVES; half++)
#pragma unroll
                for (int h = 0; h < 2; h++)
                    if (here >> (h * 8 + g) & 1) v[half][h] = *p.eight(row0 + m + h * 8 + g, half * outputs + n0 + q * 8);
#pragma unroll
            for (int half = 0; half < HALVES; half++) expand(acc[half], l[half], t + (i64)m * stride, stride, n0 - start, here);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                if (!(here >> (h * 8 + g) & 1)) continue;
                float share[HALVES][8];
#pragma unroll
                for (int half = 0; half < HALVES; half++)
#pragma unroll
                    for (int i = 0; i < 8; i++)
                        share[half][i] = l[half].scale * (acc[half][i >> 1][h * 2 + (i & 1)] + (l[half].rank && l[half].bias ? l[half].bias[n0 - start + q * 8 + i] : 0.0f));
                p.finish8<END>(row0 + m + h * 8 + g, n0 + q * 8, v[0][h], v[HALVES - 1][h], share[0], share[HALVES - 1]);
            }
        }
    }
}

// y += the adapters' share, for products x [M, N] bf16 that another kernel made. y is x itself, f32 [M, N] to which x is added too, or bf16
// [M, N / 2], the gated product of x's halves. Grid: (ceil(outputs of y / 128), ceil(M / 32)), 128 threads.
#define FINISH(name, END)                                                                                                       \
    extern "C" __global__ void __launch_bounds__(128) name(void* y, u16* x, i32 M, i32 N, const float* t, i32 stride,            \
                                                           const i32* row_seat, const u8* seats, i32 group, i32 num_groups,     \
                                                           i32 split0, i32 split1) {                                             \
        finish<END>({y, x, M, N}, t, stride, {row_seat, seats, group, num_groups, split0, split1});                              \
    }
FINISH(lora_store, STORE)
FINISH(lora_add, ADD)
FINISH(lora_gate_silu, SILU)
FINISH(lora_gate_gelu, GELU)
