// What adapters need beside the linears: A x of many rows, the embedding, B of a seat in tiles, and the plan of a step.
//
// t = A x for the rows of each adapter is the first half of y += scale * B (A x), at the adapter's exact rank. A work
// item is up to 32 rows of one seat. The eight blocks of a cluster share one item and 16 of its ranks: each sums over
// an eighth of the inputs, its warps over parts of that, all in the order of the input, so a row's t depends on nothing
// but the row. Ranks are the A operand of mma.m16n8k16, rows of x the B operand; lanes take eight consecutive inputs as
// their fragments' sixteen, the same for both. A is asked for before the kernel ahead has ended.
//
// Defines: CLUSTER (1 or 8), MAX_RANK (of a slice).
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

// h [M, H] += scale * B A[token] of the seats that adapt the embedding: A [vocab, R] bf16. Grid: (ceil(H / 256), M).
extern "C" __global__ void lora_embed(float* h, i32 H, const i32* token, const i32* row_seat, const u8* seats, i32 group, i32 num_groups) {
    grid_launch();
    grid_wait();
    const i32 row = blockIdx.y, n = blockIdx.x * blockDim.x + threadIdx.x, seat = row_seat[row];
    if (seat < 0 || n >= H) return;
    const SeatEntry* e = seat_entry(seats, seat, group, num_groups);
    const i32 rank = e->rank_end[0];
    if (rank == 0) return;
    const u16 *a = (const u16*)e->a + (i64)token[row] * rank, *b = (const u16*)e->b[0];
    float sum = 0.0f;
    for (int r = 0; r < rank; r++) sum += bf16_to_float(a[r]) * bf16_to_float(b[b_at(n, r, rank, e->tiled & 1)]);
    h[(i64)row * H + n] += e->scale[0] * sum;
}

// Puts B of a seat in tiles where its entries say so; it has come as [n, rank], and stays in its place: the 16 outputs of
// a tile lie where they lay. A warp sees to those at a time. Grid: (blocks for each group, groups).
extern "C" __global__ void __launch_bounds__(WARPS * 32) lora_tile(const SeatEntry* entries) {
    __shared__ uint4 strips[WARPS][2 * MAX_RANK];  // [16, rank] each
    const SeatEntry& e = entries[blockIdx.y];
    const i32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    uint4* strip = strips[warp];
    for (i32 s = 0; s < 3; s++) {
        const i32 rank = e.rank_end[s] - (s ? e.rank_end[s - 1] : 0), outputs = e.tiled >> s & 1 ? e.outputs[s] : 0;
        for (i32 n = (blockIdx.x * WARPS + warp) * 16; n < outputs; n += gridDim.x * WARPS * 16) {
            uint4* at = (uint4*)((u16*)e.b[s] + (i64)n * rank);
            for (i32 i = lane; i < 2 * rank; i += 32) strip[i] = at[i];
            __syncwarp();
            for (i32 i = lane; i < 2 * rank; i += 32) {
                const u32* from = (const u32*)strip + i % 8 * (rank / 2) + i / 8 * 2;  // output i % 8, ranks from i / 8 * 4 on
                at[i] = make_uint4(from[0], from[4 * rank], from[1], from[4 * rank + 1]);
            }
            __syncwarp();
        }
    }
}

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
