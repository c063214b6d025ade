// The products of a stage: blocks of weights are decoded and multiplied by rows of x in shared memory, onto a warp's sums.
//
// Part of linear.cu, whose defines it uses. Knows not where rows and weights come from (rows.cuh, weights.cuh).
#pragma once

#if WGMMA
typedef u64 XTile;  // a descriptor
#else
typedef u32 XTile;  // an address
#endif

// c += A B over one block: a has the four k16 fragments, x_tile [TOKENS, 64] is in shared memory. Until
// `finish_multiply` c and a belong to the matrix unit.
DEV void start_multiply(float (&c)[NT][4], const u32 (&a)[4][4], XTile x_tile, i32 u, i32 lane) {
#if WGMMA
    wgmma_fence(c);
#pragma unroll
    for (int k = 0; k < 4; k++) wgmma<NT>(c, a[k], x_tile + (u * (X_TILE / 16) + k * 2));
    wgmma_commit();
#else
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int n = 0; n < NT; n++) {
            u32 b0, b1, b2, b3;
            ldmatrix_x4(b0, b1, b2, b3, x_tile + u * X_TILE + n * 1024 + (lane & 7) * 128 + (((half * 4 + (lane >> 3)) ^ (lane & 7)) << 4));
            mma_bf16(c[n], a[half * 2][0], a[half * 2][1], a[half * 2][2], a[half * 2][3], b0, b1);
            mma_bf16(c[n], a[half * 2 + 1][0], a[half * 2 + 1][1], a[half * 2 + 1][2], a[half * 2 + 1][3], b2, b3);
        }
#endif
}
DEV void finish_multiply(float (&c)[NT][4]) {
#if WGMMA
    wgmma_wait();
    wgmma_fence_registers(c);
#endif
}

// What a warp multiplies, on its way.
struct Work {
    Weights w;
    Scales s;  // of the next stage
    Units z;
    u32 a[4][4], b[4][4];  // blocks that have been decoded, in turns
    float acc[NT][4];
};

// A stage of a warp's.
struct Turn {
#if RING
    i32 index, mine;  // of so many
    i32 kb;           // its first block
    Place here, next;
#else
    i32 depth;  // of its weights, in registers
    bool more;  // there is one to come in their place
#endif
};

// Blocks U.. to END of a stage: while the matrix unit works on one, the next is decoded.
template <int D, int U, int END> DEV void blocks(const Params& p, Work& k, const Turn& turn, XTile x_tile, i32 lane, u32 (&now)[4][4], u32 (&next)[4][4]) {
    if constexpr (U < END) {
        if (NF4_KIND) scale_sums(k.acc, k.z.change);
        start_multiply(k.acc, now, x_tile, U % XU, lane);
#if RING
        decode(next, k.w.word[(U + 1) % 2], lane);
        if (U == 2 && turn.index + RING < turn.mine) fetch_weights(k.w, turn.here);
        if (U == 2 && turn.index + 1 < turn.mine) barrier_wait(turn.next.barrier, turn.next.parity);
        read_word(k.w, U % 2, U < 2 ? turn.here.at + (U + 2) * BLOCK_BYTES : turn.next.at + (U - 2) * BLOCK_BYTES, lane);
        k.z.change = of_outputs<(U + 1) % KU>(k.z.changes[(U + 1) % 2], lane);
        if constexpr (U < 3) next_units<U>(k.z, k.s, lane);
        if (U == 1 && turn.index + 2 < turn.mine) k.s.at += SCALES_HOP, load_scales(p, k.s, turn.kb + 2 * (WK * KU));
#else
        if constexpr (U + 1 < KU) {
            decode(next, k.w.word[D][(U + 1) % WINDOW], lane);
            refill<D, U + 1>(k.w, turn.more);
        }
        if (NF4_KIND) {
            k.z.change = of_outputs<(U + 1) % KU>(k.z.changes[(U + 1) % 2], lane);
            if (U + 2 == KU) all_next_units(k.z, k.s, lane);
        }
#endif
        finish_multiply(k.acc);
        blocks<D, U + 1, END>(p, k, turn, x_tile, lane, next, now);
    }
}

// The blocks of a stage whose x has come in at `step`.
template <int D, int STEP = 0> DEV void stage(const Params& p, Work& k, const Turn& turn, XTile x_tile, i32 lane, i32 step) {
    if constexpr (STEP + 1 < X_STEPS)
        if (step != STEP) return stage<D, STEP + 1>(p, k, turn, x_tile, lane, step);
#if !RING
    if constexpr (D + 1 < DEPTH)
        if (turn.depth != D) return stage<D + 1, STEP>(p, k, turn, x_tile, lane, step);
    if (STEP == 0) {
        decode(k.a, k.w.word[D][0], lane);
        refill<D, 0>(k.w, turn.more);
    }
#endif
    constexpr bool odd = STEP * XU % 2;
    blocks<D, STEP * XU, STEP * XU + XU>(p, k, turn, x_tile, lane, odd ? k.b : k.a, odd ? k.a : k.b);
}
