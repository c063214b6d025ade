// The end of a linear: the sums of all groups and blocks of a cluster are added, and what adapters add; outputs are written.
//
// Part of linear.cu, whose defines and shared memory it uses. Knows no weights and no rows of x.
#pragma once

// Where the sums of lane (g, t) lie among those of 16 outputs for 8 rows of x: output g and g + 8 for rows 2t and 2t + 1, as the
// matrix unit leaves them. Neither lanes in order nor outputs in order meet a bank twice.
DEV i32 sums_at(i32 g, i32 t) { return t * 128 + (g ^ t * 2) * 16; }

// Ready for the sums that other blocks of the cluster give to this one. They may come when all its threads have arrived at the cluster's barrier.
DEV void expect_sums() {
    if (CLUSTER == 1 || threadIdx.x) return;
    const u32 barrier = smem_addr(smem) + SUMS_BARRIER_AT;
    barrier_init(barrier, 1), barrier_init_done();
    barrier_expect(barrier, (CLUSTER - 1) * WK * OWN * TOKENS * 4);
}

// Give a warp's sums to the block of the cluster that finishes its 16 outputs: [source][tile of outputs][NT].
DEV void give(const float (&acc)[NT][4], i32 rank, i32 source, i32 tile, i32 lane) {
    const i32 target = tile / (OWN / 16);
    const u32 to = smem_addr(smem) + SUMS_AT + (source * (OWN / 16) + tile % (OWN / 16)) * (NT * 512) + sums_at(lane >> 2, lane & 3);
    if (CLUSTER > 1 && target != rank) {
        const u32 there = cluster_map(to, target), barrier = cluster_map(smem_addr(smem) + SUMS_BARRIER_AT, target);
#pragma unroll
        for (int n = 0; n < NT; n++) store_counted(there + n * 512, acc[n], barrier);
        return;
    }
#pragma unroll
    for (int n = 0; n < NT; n++) asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to + n * 512), "f"(acc[n][0]), "f"(acc[n][1]), "f"(acc[n][2]), "f"(acc[n][3]) : "memory");
}

// This lane's sums of a tile of 16 outputs for eight rows of x: those of all groups and blocks, in a fixed order.
DEV void reduced(float (&sum)[4], i32 tile, i32 oct) {
    const u8* at = smem + SUMS_AT + (tile * NT + oct) * 512 + sums_at((threadIdx.x & 31) >> 2, threadIdx.x & 3);
#pragma unroll
    for (int i = 0; i < CLUSTER * WK; i++) {
        const float4 v = *(const float4*)(at + i * (OWN * TOKENS * 4));
        if (i == 0) sum[0] = v.x, sum[1] = v.y, sum[2] = v.z, sum[3] = v.w;
        else sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
    }
}

#include "adapters.cuh"

#define TILES (FIRST ? NUM_SLICES : 1)  // of sums that a warp ends one after the other: a strip's

// Whose turn it is: each warp has eight rows of x, and some of the outputs.
struct Turns {
    i32 oct, octs, end, first, groups;  // groups: of TILES

    DEV Turns(i32 oct0, i32 count, i32 warp) {
        groups = max(1, min(quotient(WARPS, count), (OWN / 16 + TILES - 1) / TILES)), octs = quotient(WARPS, groups), end = oct0 + count;
        const i32 before = quotient(warp, groups);
        oct = oct0 + before, first = warp - before * groups;
    }
    DEV i32 next(i32 tile) const { return TILES == 1 ? tile + groups : tile % 2 ? tile - 1 + groups * 2 : tile + 1; }
};

// A warp finishes 16 outputs for eight rows of x at a time. Lane (g, t) has outputs g and g + 8 (of gated ones the gate and the up of
// output g) for rows 2t and 2t + 1.
#if FIRST && WGMMA
__device__ __noinline__  // else its registers cost the main loop instructions: up to 7 % of them
#else
DEV
#endif
void epilogue(const End p, const Outputs own, const Passes passes, i32 token0, i32 warp) {
    const i32 lane = threadIdx.x & 31, outputs = GATED ? p.N / 2 : p.N, octs = BESIDE ? NT : passes.octs;
#if BESIDE
    if (are_helped(passes)) help(p, own, passes, warp);
#endif
#pragma unroll 1
    for (i32 oct0 = 0; oct0 < passes.all; oct0 += octs) {
        const Turns turns(oct0, min(octs, passes.all - oct0), warp);
#if FIRST
        Adding adding(p, own, passes);
        if (passes.stride && turns.oct < turns.end) adding.look(p, own, oct0, turns.oct, turns.first);
        if (oct0) __syncthreads();
        if (passes.stride) gather_shrunk(p, own, token0, oct0 * 8, passes.octs * 8, passes.stride, warp, *(const u32*)(smem + EPOCH_AT));
#endif
        __syncthreads();
        if (CLUSTER > 1 && oct0 == 0) barrier_wait_for_others(smem_addr(smem) + SUMS_BARRIER_AT);
#pragma unroll 1
        for (i32 oct = turns.oct; oct < turns.end; oct += turns.octs) {
            const i32 row0 = token0 + oct * 8, rows = min(p.M - row0, 8);
#if FIRST
            if (passes.stride && oct != turns.oct) adding.look(p, own, oct0, oct, turns.first);
            float share[TILES][4];
#endif
#pragma unroll 1
            for (i32 tile = turns.first * TILES; tile < OWN / 16; tile = turns.next(tile)) {
                const i32 n = own.first + tile * TILE_OUTPUTS + (lane >> 2), t = (lane & 3) * 2;
                const i64 to = (i64)(row0 + t) * outputs + n;
                float old[4], sum[4], add[4] = {};
                if (EPILOGUE == 1)
#pragma unroll
                    for (int j = 0; j < 4; j++) old[j] = t + (j & 1) < rows && n + j / 2 * 8 < outputs ? ((const float*)p.y)[to + (j & 1) * outputs + j / 2 * 8] : 0.0f;
#if FIRST
                if (passes.stride) {
                    if (tile % TILES == 0) adding.add(p, own, share, tile / TILES, [&] { return tile / TILES + turns.groups; });
#pragma unroll
                    for (int j = 0; j < 4; j++) add[j] = tile % TILES ? share[TILES - 1][j] : share[0][j];
                }
#endif
                reduced(sum, tile, oct);
                if (p.bias)
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const i32 at = GATED ? n + j / 2 * outputs : n + j / 2 * 8;
                        if (at < p.N) sum[j] += p.bias[at];
                    }
#if BESIDE
                if (passes.stride) {
                    const float4 a = *added(tile, oct);
                    add[0] = a.x, add[1] = a.y, add[2] = a.z, add[3] = a.w;
                }
#endif
                if (LORA && passes.stride)
#pragma unroll
                    for (int j = 0; j < 4; j++) sum[j] = __fadd_rn(sum[j], add[j]);
#pragma unroll
                for (int j = 0; j < (GATED ? 2 : 4); j++) {
                    if (t + (j & 1) >= rows || n + j / 2 * 8 >= outputs) continue;
                    const i64 at = to + (j & 1) * outputs + j / 2 * 8;
                    if (GATED) ((u16*)p.y)[at] = float_to_bf16(activate(sum[j], GELU) * sum[j + 2]);
                    if (EPILOGUE == 0) ((u16*)p.y)[at] = float_to_bf16(sum[j]);
                    if (EPILOGUE == 1) ((float*)p.y)[at] = old[j] + sum[j];
                    if (EPILOGUE == 3) ((float*)p.y)[at] = sum[j];
                }
            }
        }
    }
}
