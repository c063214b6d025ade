// A x in units, which the thread blocks of a launch share.
//
// Part of adapters.cuh, whose epoch each value carries. A unit is multiplied by the warps that see to adapters, and given out; nobody is
// waited for. Knows no B and no outputs.
#pragma once

// A unit: 16 ranks of up to 8 rows of an item, over a piece of the inputs: a part of them, or half of one. A part is summed in SHARES, and
// either half of those apart. Ranks are the A operand of mma.m16n8k16, rows of x the B operand; lanes take eight consecutive inputs as their
// fragments' sixteen, the same for both.
#define HALF_SHARES (SHARES / 2)
#define AHEAD 4  // steps of 32 inputs of A x that a warp has in flight
struct Unit {
    ShrinkTile tile;
    i32 piece;
};
DEV i32 num_pieces(i32 parts) { return parts * PIECES; }

// Unit `index`, where there are so many.
DEV Unit unit_at(const Params& p, i32 index) {
    const i32 tile = quotient(index, num_pieces(p.parts));
    return {p.tiles[min(tile, p.max_tiles - 1)], index - tile * num_pieces(p.parts)};
}
DEV i32 count_units(const Params& p) {
    i32 tiles;
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(tiles) : "l"(p.num_tiles));  // at once: else what is put between waits behind it
    return tiles * num_pieces(p.parts);
}

// Steps of 32 inputs before share `share` of a piece; before the next piece, for UNIT_SHARES.
DEV i32 steps_before(const Params& p, i32 piece, i32 share) { return quotient(p.K / 32 * (piece * UNIT_SHARES + share), p.parts * SHARES); }

// Ask for the A of a unit: [16, A_STRIDE] in shared memory. A warp sees to a rank at a time.
DEV void ask_unit(const Params& p, const Unit& u, i32 place, i32 warp) {
    const i32 lane = threadIdx.x & 31, first = steps_before(p, u.piece, 0), chunks = (steps_before(p, u.piece, UNIT_SHARES) - first) * 4;
    const u16* a = (const u16*)u.tile.a + (i64)u.tile.rank * p.K + first * 32;
    const u32 to = smem_addr(smem) + A_AT + place * A_BYTES;
#pragma unroll 1
    for (i32 r = warp; r < 16; r += ENDING)
        for (i32 i = lane; i < chunks; i += 32) cp_async16_or_zero(to + r * A_STRIDE + i * 16, r < u.tile.ranks ? a + (i64)r * p.K + i * 8 : p.x, r < u.tile.ranks);
}

// This lane's x in `count` steps from `step` on, zeros beyond.
DEV void load_steps(const Params& p, const Unit& u, i32 step, i32 count, uint4 (&x)[AHEAD]) {
    const i32 g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
    const u16* from = p.x + (i64)(u.tile.row + g) * p.K + step * 32 + t * 8;
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
        x[i] = make_uint4(0, 0, 0, 0);
        if (g < u.tile.rows && i < count) x[i] = ld_cg16(from + i * 32);
    }
}

DEV void multiply_step(float (&acc)[4], const uint4& low, const uint4& high, const uint4& x) {
    mma_bf16(acc, low.x, high.x, low.y, high.y, x.x, x.y);
    mma_bf16(acc, low.z, high.z, low.w, high.w, x.z, x.w);
}

#define SHARES_EACH ((UNIT_SHARES + ENDING - 1) / ENDING)  // of a warp, if so many are left
#define SHARES_AT (SHARES_EACH == 1 ? 1 : 2)               // at a time
static_assert(UNIT_SHARES % SHARES_EACH == 0 && SHARES_EACH % SHARES_AT == 0, "a warp has all its shares of a unit or none");

// A warp's shares of a unit, whose A is there when `arrived` has been called.
template <class Arrived> DEV void multiply_unit(const Params& p, const Unit& u, i32 place, i32 warp, Arrived arrived) {
    const i32 lane = threadIdx.x & 31, first = steps_before(p, u.piece, 0);
    const u8* a = smem + A_AT + place * A_BYTES + (lane >> 2) * A_STRIDE + (lane & 3) * 16;
#pragma unroll 1
    for (i32 i = 0; i < SHARES_EACH; i += SHARES_AT) {
        const i32 share = warp * SHARES_EACH + i;
        if (UNIT_SHARES % ENDING && share >= UNIT_SHARES) return arrived();
        i32 begin[SHARES_AT], count[SHARES_AT], most = 0;
#pragma unroll
        for (int k = 0; k < SHARES_AT; k++) begin[k] = steps_before(p, u.piece, share + k), count[k] = steps_before(p, u.piece, share + k + 1) - begin[k], most = max(most, count[k]);
        float acc[SHARES_AT][4] = {};
        i32 s = 0;
#pragma unroll 1
        do {  // once at least: all warps have to arrive
            uint4 x[SHARES_AT][AHEAD];
#pragma unroll
            for (int k = 0; k < SHARES_AT; k++) load_steps(p, u, begin[k] + s, count[k] - s, x[k]);
            if (i + s == 0) arrived();
#pragma unroll
            for (int k = 0; k < SHARES_AT; k++)
#pragma unroll
                for (int j = 0; j < AHEAD; j++) {
                    if (s + j >= count[k]) break;
                    const u8* at = a + (begin[k] + s + j - first) * 64;
                    multiply_step(acc[k], *(const uint4*)at, *(const uint4*)(at + 8 * A_STRIDE), x[k][j]);
                }
        } while ((s += AHEAD) < most);
#pragma unroll
        for (int k = 0; k < SHARES_AT; k++) *(float4*)(smem + UNIT_SUMS_AT + (share + k) * 512 + lane * 16) = make_float4(acc[k][0], acc[k][1], acc[k][2], acc[k][3]);
    }
}

// Add the shares of a unit, and give them out; by 128 threads.
DEV void publish_unit(const Params& p, const Unit& u, i32 thread, u32 epoch) {
    const float* sums = (const float*)(smem + UNIT_SUMS_AT);
    float half[2] = {};
#pragma unroll
    for (int i = 0; i < UNIT_SHARES; i++) half[i / HALF_SHARES] += sums[i * 128 + thread];
    const float sum = PIECES == 1 ? half[0] + half[1] : half[0];
    const i32 c = thread & 3, from = thread >> 2, row = (from & 3) * 2 + (c & 1), r = (from >> 2) + (c >> 1) * 8;
    u64* out = p.shrunk + ((i64)u.piece * p.M + u.tile.row + row) * p.shrunk_stride + u.tile.rank + r;
    if (row < u.tile.rows && r < u.tile.ranks) st_relaxed(out, (u64)epoch << 32 | __float_as_uint(sum));
}

// The units of this thread block: their A is asked for before the kernel ahead has ended, and each next one's while one is
// multiplied. Thread blocks without outputs have the first ones, some rounds more than each has where all share alike; the others share
// the rest.
struct Share {
    Unit now, later;
    i32 next, step, end, warp;

    // `all`: units of the launch.
    DEV Share(const Params& p, i32 all, i32 warp_) : warp(warp_) {
        const i32 rounds = quotient(all, num_blocks()) + p.rounds, first = min(all, p.helpers * rounds), block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
        if (is_helper(p)) next = block, step = p.helpers, end = first;
        else next = first + block - p.helpers, step = min((i32)num_blocks() - p.helpers, p.workers), end = block - p.helpers < step ? all : 0;
        now = unit_at(p, next);
        if (BUFFERS == 2) later = unit_at(p, next + step);
        if (next < end) ask_unit(p, now, 0, warp);
        cp_async_commit();
        if (BUFFERS == 1) return;
        if (next + step < end) ask_unit(p, later, 1, warp);
        cp_async_commit();
    }
    DEV bool any() const { return next < end; }

    DEV void multiply(const Params& p, i32 thread, u32 epoch) {
#pragma unroll 1
        for (i32 place = 0; next < end; next += step) {
            Unit after;
            if (BUFFERS == 2) after = unit_at(p, next + 2 * step);
            multiply_unit(p, now, place, warp, [] {
                cp_async_wait<BUFFERS - 1>();
                ending_sync();
            });
            ending_sync();
            if (BUFFERS == 2 && next + 2 * step < end) ask_unit(p, after, place, warp);
            if (BUFFERS == 2) cp_async_commit();
            if (thread < 128) publish_unit(p, now, thread, epoch);
            if (BUFFERS == 2) {
                now = later, later = after, place ^= 1;
            } else {
                now = unit_at(p, next + step);
                if (next + step < end) ask_unit(p, now, 0, warp);
                cp_async_commit();
            }
        }
    }
};
