// t = A x for the rows of each adapter: the first half of y += scale * B (A x), at the adapter's exact rank.
//
// A work item is up to 32 rows of one seat. The eight blocks of a cluster share one item and 16 of its ranks: each
// sums over an eighth of the inputs, its warps over parts of that, all in the order of the input, so a
// row's t depends on nothing but the row. Ranks are the A operand of mma.m16n8k16, rows of x the B operand; lanes
// take eight consecutive inputs as their fragments' sixteen, the same for both. A is asked for before
// the kernel ahead has ended.
//
// Defines: CLUSTER (1 or 8).
#include "common.cuh"
#include "lora.cuh"

#define WARPS 4
#define PARTS (8 / CLUSTER)  // eighths of the inputs that this block sums
#define TILES 4              // of 8 rows of x
#define AHEAD 4              // steps of 32 inputs whose A is in flight

struct Item {
    i32 row, rows, seat;
};

__shared__ float sums[8][16][TILES * 8 + 1];  // [eighth of this block][rank][row of x]
__shared__ float warps[WARPS][16][TILES * 8 + 1];

// t [16, rows] += A [16, steps * 32] x^T; `a0`, `a1`: this lane's rows of A (g and g + 8), from input `k` on.
template <int N>
DEV void multiply(const u16* a0, const u16* a1, bool v0, bool v1, uint4 (&ahead)[AHEAD][2], i32 steps, const u16* x, i32 stride, i32 rows, float (&acc)[TILES][4]) {
    const i32 lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    for (int s = 0; s < steps; s += AHEAD) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (s + i >= steps) break;
            const uint4 p = ahead[i][0], q = ahead[i][1];
            const i32 next = s + i + AHEAD;
            if (next < steps) ahead[i][0] = ld_once_or_zero(a0 + next * 32, v0), ahead[i][1] = ld_once_or_zero(a1 + next * 32, v1);
#pragma unroll
            for (int n = 0; n < N; n++) {
                uint4 b = make_uint4(0, 0, 0, 0);
                if (n * 8 + g < rows) b = *(const uint4*)(x + (i64)(n * 8 + g) * stride + (s + i) * 32 + t * 8);
                mma_bf16(acc[n], p.x, q.x, p.y, q.y, b.x, b.y);
                mma_bf16(acc[n], p.z, q.z, p.w, q.w, b.z, b.w);
            }
        }
    }
}

// Grid: (CLUSTER, items in flight, ranks in flight). x [M, K] bf16; items [..] and their number on the device;
// t [M, stride] f32, of which the item's ranks are written.
extern "C" __global__ void __launch_bounds__(WARPS * 32) lora_shrink(const u16* x, i32 K, const u8* seats, i32 group, i32 num_groups,
                                                                     const Item* items, const i32* num_items, float* out, i32 stride) {
    grid_launch();
    const i32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const i32 eighth = CLUSTER == 1 ? 0 : cluster_rank();
    const i32 count = *num_items;
    bool waited = false;
    i32 next = blockIdx.y, r0 = blockIdx.z * 16;
    while (next < count) {
        const Item item = items[next];
        const SeatEntry* e = seat_entry(seats, item.seat, group, num_groups);
        const i32 rank = e->rank_end[2];
        if (r0 >= rank) {
            next += gridDim.y, r0 = blockIdx.z * 16;
            continue;
        }
        const u16* a = (const u16*)e->a;
        const bool v0 = r0 + g < rank, v1 = r0 + g + 8 < rank;
        for (int part = 0; part < PARTS; part++) {
            const i32 all = K / 32, eight = eighth * PARTS + part;
            const i32 begin = all * (eight * WARPS + warp) / (8 * WARPS), steps = all * (eight * WARPS + warp + 1) / (8 * WARPS) - begin;
            const u16 *a0 = a + (i64)(r0 + g) * K + begin * 32 + t * 8, *a1 = a0 + (i64)8 * K;
            uint4 ahead[AHEAD][2];
#pragma unroll
            for (int i = 0; i < AHEAD; i++) ahead[i][0] = ld_once_or_zero(a0 + i * 32, v0 && i < steps), ahead[i][1] = ld_once_or_zero(a1 + i * 32, v1 && i < steps);
            if (!waited) grid_wait();
            waited = true;
            float acc[TILES][4];
#pragma unroll
            for (int i = 0; i < TILES * 4; i++) (&acc[0][0])[i] = 0.0f;
            const u16* from = x + (i64)item.row * K + begin * 32;
            if (item.rows <= 8) multiply<1>(a0, a1, v0, v1, ahead, steps, from, K, item.rows, acc);
            else multiply<TILES>(a0, a1, v0, v1, ahead, steps, from, K, item.rows, acc);
            const i32 tiles = item.rows <= 8 ? 1 : TILES;
#pragma unroll
            for (int n = 0; n < TILES; n++)
                if (n < tiles)
#pragma unroll
                    for (int c = 0; c < 4; c++) warps[warp][g + (c >> 1) * 8][n * 8 + t * 2 + (c & 1)] = acc[n][c];
            __syncthreads();
            for (int i = threadIdx.x; i < 16 * tiles * 8; i += WARPS * 32) {
                const i32 r = i & 15, row = i >> 4;
                float sum = 0.0f;
#pragma unroll
                for (int w = 0; w < WARPS; w++) sum += warps[w][r][row];
                sums[part][r][row] = sum;
            }
            __syncthreads();
        }
        if (CLUSTER > 1) cluster_sync();
        // each block of the cluster finishes a share of the (rank, row) pairs
        const i32 pairs = 16 * (item.rows <= 8 ? 8 : TILES * 8);
        for (int i = threadIdx.x + eighth * WARPS * 32; i < pairs; i += WARPS * 32 * CLUSTER) {
            const i32 r = i & 15, row = i >> 4;
            float sum = 0.0f;
#pragma unroll
            for (int c = 0; c < 8; c++) {
                float v;
                if (CLUSTER == 1) v = sums[c][r][row];
                else asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(cluster_map(smem_addr(&sums[0][r][row]), c)));
                sum += v;
            }
            if (row < item.rows && r0 + r < rank) out[(i64)(item.row + row) * stride + r0 + r] = sum;
        }
        if (CLUSTER > 1) cluster_sync();
        else __syncthreads();
        r0 += gridDim.z * 16;
    }
    if (!waited) grid_wait();
}

// h [M, H] += scale * B A[token] of the seats that adapt the embedding: A [vocab, R], B [H, R] bf16. Grid: (ceil(H / 256), M).
extern "C" __global__ void lora_embed(float* h, i32 H, const i32* token, const i32* row_seat, const u8* seats, i32 group, i32 num_groups) {
    grid_launch();
    grid_wait();
    const i32 row = blockIdx.y, n = blockIdx.x * blockDim.x + threadIdx.x, seat = row_seat[row];
    if (seat < 0 || n >= H) return;
    const SeatEntry* e = seat_entry(seats, seat, group, num_groups);
    const i32 rank = e->rank_end[0];
    if (rank == 0) return;
    const u16 *a = (const u16*)e->a + (i64)token[row] * rank, *b = (const u16*)e->b[0] + (i64)n * rank;
    float sum = 0.0f;
    for (int r = 0; r < rank; r++) sum += bf16_to_float(a[r]) * bf16_to_float(b[r]);
    h[(i64)row * H + n] += e->scale[0] * sum;
}

// Four ranks of one row of t or of an output of B, those from `rank` on as zeros. `whole`: both are aligned for wide loads.
DEV float4 four_of(const float* from, i32 k, i32 rank, bool whole) {
    if (whole) return k < rank ? *(const float4*)(from + k) : make_float4(0, 0, 0, 0);
    return make_float4(k < rank ? from[k] : 0, k + 1 < rank ? from[k + 1] : 0, k + 2 < rank ? from[k + 2] : 0, k + 3 < rank ? from[k + 3] : 0);
}
DEV uint2 four_of(const u16* from, i32 k, i32 rank, bool whole) {
    if (whole) return k < rank ? __ldg((const uint2*)(from + k)) : make_uint2(0, 0);
    const u32 a = k < rank ? from[k] : 0, b = k + 1 < rank ? from[k + 1] : 0, c = k + 2 < rank ? from[k + 2] : 0, d = k + 3 < rank ? from[k + 3] : 0;
    return make_uint2(a | b << 16, c | d << 16);
}

// acc [16 rows, 32 outputs] = t B^T for the rows in `rows`, over the ranks of one slice. t is f32: it is multiplied as a
// sum of two bf16. A lane takes four consecutive ranks as its fragments', and column c of the four tiles of
// outputs is output c / 2 * 8 + tile * 2 + c % 2: so each lane holds eight consecutive outputs.
DEV void expand(float (&acc)[4][4], const RowLora& l, const float* t, i32 stride, i32 n, u32 rows) {
    const i32 lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
    const bool whole = (l.rank | l.begin) % 4 == 0;
    const u16* b = l.b + (i64)(n + (g >> 1) * 8 + (g & 1)) * l.rank;
    for (i32 k0 = 0; k0 < l.rank; k0 += 16) {
        const i32 k = k0 + q * 4;
        uint2 out[4];
#pragma unroll
        for (int j = 0; j < 4; j++) out[j] = four_of(b + (i64)j * 2 * l.rank, k, l.rank, whole);
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
        if (IS_GATED(END)) ((u16*)y)[row * (N / 2) + n] = float_to_bf16((END == GELU ? gelu(v) : silu(v)) * (bf16_to_float(from[N / 2]) + up));
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
            for (int i = 0; i < 8; i++) z[i] = (END == GELU ? gelu(at(v, i) + share[i]) : silu(at(v, i) + share[i])) * (at(u, i) + up[i]);
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
    const bool tiled = n0 + 32 <= (IS_GATED(END) ? outputs : slice == 0 ? s.split0 : slice == 1 ? s.split1 : p.N) && outputs % 8 == 0;
    const i32 own = row0 + lane < p.M ? s.row_seat[row0 + lane] : -1;
    t += (i64)row0 * stride;
    u32 left = __ballot_sync(0xffffffffu, row0 + lane < p.M && (END != STORE || own >= 0));
    while (left) {
        const i32 seat = __shfl_sync(0xffffffffu, own, __ffs(left) - 1);
        const u32 rows = __ballot_sync(0xffffffffu, own == seat) & left;
        left &= ~rows;
        if (!tiled) {  // outputs of two slices, or the last ones
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
#define FINISH(name, END)                                                                                                                                    \
    extern "C" __global__ void __launch_bounds__(128) name(void* y, u16* x, i32 M, i32 N, const float* t, i32 stride, const i32* row_seat, const u8* seats, \
                                                           i32 group, i32 num_groups, i32 split0, i32 split1) {                                              \
        finish<END>({y, x, M, N}, t, stride, {row_seat, seats, group, num_groups, split0, split1});                                                  \
    }
FINISH(lora_store, STORE)
FINISH(lora_add, ADD)
FINISH(lora_gate_silu, SILU)
FINISH(lora_gate_gelu, GELU)

// What the linears of a step need to know of its adapters: rows [groups, M, 3], and the tiles of A x by group, `most`
// at most. Grid: (groups from `first` on), 256 threads. No kernel may begin before this one has ended.
extern "C" __global__ void __launch_bounds__(256) lora_plan(RowLora* rows, ShrinkTile* tiles, i32* num_tiles, i32 most, const i32* row_seat, i32 M,
                                                            const Item* items, const i32* num_items, const u8* seats, i32 first, i32 num_groups) {
    __shared__ i32 warps[8];
    const i32 group = first + blockIdx.x, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    grid_wait();
    rows += (i64)group * M * 3, tiles += (i64)group * most;
    for (i32 i = threadIdx.x; i < M * 3; i += 256) rows[i] = row_lora(seats, row_seat[i / 3], group, num_groups, i % 3);
    const i32 live = *num_items;
    i32 base = 0;
    for (i32 i0 = 0; i0 < live; i0 += 256) {
        const i32 i = i0 + threadIdx.x;
        Item item = {0, 0, 0};
        i32 rank = 0;
        u64 a = 0;
        if (i < live) {
            item = items[i];
            const SeatEntry* e = seat_entry(seats, item.seat, group, num_groups);
            rank = e->rank_end[2], a = e->a;
        }
        const i32 own = (rank + 15) / 16 * ((item.rows + 7) / 8);
        i32 end = own;
#pragma unroll
        for (int d = 1; d < 32; d <<= 1) {
            const i32 before = __shfl_up_sync(0xffffffffu, end, d);
            end += lane >= d ? before : 0;
        }
        __syncthreads();
        if (lane == 31) warps[warp] = end;
        __syncthreads();
        i32 all = 0;
        for (int w = 0; w < 8; w++) end += w < warp ? warps[w] : 0, all += warps[w];
        ShrinkTile* to = tiles + base + end - own;
        for (i32 rank0 = 0; rank0 < rank; rank0 += 16)
            for (i32 row0 = 0; row0 < item.rows; row0 += 8)
                *to++ = {a, (u16)(item.row + row0), (u16)rank0, (u8)min(item.rows - row0, 8), (u8)min(rank - rank0, 16), 0};
        base += all;
    }
    if (threadIdx.x == 0) num_tiles[group] = base;
}
