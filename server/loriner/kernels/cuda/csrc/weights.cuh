// How weights and their scales come to the warp that multiplies them, and in which units it sums.
//
// Part of linear.cu, whose defines and shared memory it uses. Loads to registers count on the counters of the hardware, of which a warp
// has six: the compiler gives all loads of weights the same, so that who waits for one block waits for the one that was asked for last, and
// the memory's latency is paid in every stage. On Hopper, where there is room, bulk copies bring them to shared memory instead, each with a
// barrier of its own (RING). Knows nothing of x but how many sums a warp has.
#pragma once

// Word I of a lane's column in the table: the byte I of `v` becomes the row. On Hopper dynamic shared memory begins at
// 1024 (the kernel checks it), so that the address needs no addition: `column` has the high bits.
#if WGMMA
#define SMEM_START 1024
DEV u32 column_of(i32 lane) { return (smem_addr(smem) & 0xff000000) | lane * 4; }
template <int I, int OFFSET = 0> DEV u32 look_up(u32 v, u32 column) {
    u32 word;
    asm volatile("ld.shared.u32 %0, [%1 + %2];" : "=r"(word) : "r"(__byte_perm(v, column, 0x7604 | I << 4)), "n"(SMEM_START + OFFSET));
    return word;
}
#else
DEV u32 column_of(i32 lane) { return lane * 4; }
template <int I, int OFFSET = 0> DEV u32 look_up(u32 v, u32 column) { return *(const u32*)(smem + OFFSET + __byte_perm(v, column, 0x5504 | I << 4)); }
#endif

// Scales of a stage: lane l has those of the tile's output l % 16 (g, half) for two blocks, from l / 16 * 2 on.
struct Scales {
    float2 plain;
    u32 index;
    float outer, offset;
    u32 at, outer_at;  // bytes from the first scales on, floats from the first outer ones on: less than 4 GB
};

DEV void load_scales(const Params& p, Scales& s, i32 kb) {
    if (KIND == 0) s.plain = *(const float2*)(p.scale + s.at);
    if (KIND == 1) {
        s.index = *(const u16*)(p.scale + s.at);
        s.outer = p.nested[s.outer_at + (kb >> p.nested_shift) * 16];
    }
}

DEV void first_scales(const Params& p, Scales& s, i32 tile, i32 kb, i32 mine) {
    const i32 lane = threadIdx.x & 31;
    if (NF4_KIND) {
        s.at = (tile * p.KB + kb) * SCALES_BYTES + ((lane & 15) * 2 + (lane >> 4)) * (KIND == 0 ? 8 : 2);
        if (KIND == 1) {
            const i32 spans = (p.KB + (1 << p.nested_shift) - 1) >> p.nested_shift;
            s.outer_at = tile * spans * 16 + (lane & 15), s.offset = p.offset[tile * 16 + (lane & 15)];
        }
        if (mine > 0) load_scales(p, s, kb);
    }
}

#if RING
// Weights of a warp, through a ring of RING stages.
struct Weights {
    uint4 word[2][WORDS];  // of the next blocks, in turns
    const u8* from;        // the stage to fetch next
};

// A stage's place in the ring.
struct Place {
    u32 at, barrier, parity;
};
DEV Place place_of(i32 warp, i32 stage) {
    const i32 slot = warp * RING + stage % RING;
    return {smem_addr(smem) + WEIGHTS_AT + slot * WEIGHTS_SLOT, smem_addr(smem) + WEIGHTS_BARRIERS_AT + slot * 8, (u32)stage / RING & 1};
}

// By a whole warp, which has read what was there. With few rows of x it is worth the while that weights leave L2 to what comes back
// (measured: at 8 rows up to 2 % of a step; at 64 it costs half a per cent).
DEV void fetch_weights(Weights& w, const Place& to) {
    __syncwarp();
    if (elected()) {
        barrier_expect(to.barrier, WEIGHTS_SLOT);
        copy_bulk<(NT <= 2)>(to.at, w.from, WEIGHTS_SLOT, to.barrier);
    }
    w.from += HOP;
}

DEV void load_first(const Params& p, Weights& w, Scales& s, i32 tile, i32 kb, i32 mine) {
    const i32 warp = threadIdx.x >> 5;
    w.from = p.weight + ((i64)tile * p.KB + kb) * BLOCK_BYTES;
    if (elected()) {
#pragma unroll
        for (int i = 0; i < RING; i++) barrier_init(place_of(warp, i).barrier, 1);
        barrier_init_done();
    }
    if (mine > 0) fetch_weights(w, place_of(warp, 0));
    first_scales(p, s, tile, kb, mine);
}

// What has room behind it, when all warps have asked for theirs.
DEV void load_more(Weights& w, i32 mine) {
#pragma unroll
    for (int i = 1; i < RING; i++)
        if (i < mine) fetch_weights(w, place_of(threadIdx.x >> 5, i));
}

DEV void read_word(Weights& w, int i, u32 at, i32 lane) { w.word[i][0] = ld_shared16(at + lane * 16); }
#else
struct Weights {
    uint4 word[DEPTH][WINDOW][WORDS];
    const u8* from;  // the stage to load next
};

template <int D, int U> DEV void load_block(Weights& w, const u8* from) {
#pragma unroll
    for (int i = 0; i < WORDS; i++) w.word[D][U % WINDOW][i] = ld_once(from + U * BLOCK_BYTES + i * 512);
}

// Block U has been decoded: ask for the one that comes next in its place.
template <int D, int U> DEV void refill(Weights& w, bool more) {
    if constexpr (U + WINDOW < KU) load_block<D, U + WINDOW>(w, w.from - HOP);
    else if (more) load_block<D, U + WINDOW - KU>(w, w.from);
}

template <int D> DEV void load_stage(Weights& w) {
    load_block<D, 0>(w, w.from), load_block<D, 1>(w, w.from);
    if constexpr (WINDOW > 2) load_block<D, 2>(w, w.from), load_block<D, 3>(w, w.from);
}

DEV void load_more(Weights& w, i32 mine) {}  // there is no room

template <int D> DEV void load_stages(Weights& w, i32 mine) {
    if (D < mine) load_stage<D>(w);
    w.from += HOP;
    if constexpr (D + 1 < DEPTH) load_stages<D + 1>(w, mine);
}

DEV void load_first(const Params& p, Weights& w, Scales& s, i32 tile, i32 kb, i32 mine) {
    const i32 lane = threadIdx.x & 31;
    w.from = p.weight + ((i64)tile * p.KB + kb) * BLOCK_BYTES + lane * 16;
    load_stages<0>(w, mine);
    first_scales(p, s, tile, kb, mine);
}
#endif

// Sums are kept in units of the block's scale, so that products are added onto them by the matrix unit itself.
struct Units {
    float first, second;  // scales of this lane's two blocks of a stage (see Scales)
    float last, before;   // of the stage ahead: the second one, and what stands before the first one
    float changes[2];     // to them, each from the block before
    float2 change;        // to the block that comes next, for this lane's two outputs
};

#define LEAST_SCALE 1e-20f  // what a scale of 0 becomes; to others it adds nothing

// The scale of one of this lane's blocks; never 0, that it may be divided by.
template <int I> DEV float scale_of(const Scales& s, i32 lane) {
    float own = I ? s.plain.y : s.plain.x;
    if (KIND == 1)  // rounded as bitsandbytes does: product, then sum
        own = __fadd_rn(__fmul_rn(__uint_as_float(look_up<I, 128>(s.index, column_of(lane))), s.outer), s.offset);
    return own + LEAST_SCALE;
}

// The value of output (g, half) in the lanes that have block U's.
template <int U> DEV float2 of_outputs(float own, i32 lane) {
    const i32 from = (lane >> 2) * 2 + U / 2 * 16;
    return make_float2(__shfl_sync(0xffffffffu, own, from), __shfl_sync(0xffffffffu, own, from + 1));
}

DEV float inverse(float v) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}

// The units of a stage, in three steps: each waits for what the one before has asked for. Block 0's predecessor is the last of the stage ahead.
template <int STEP> DEV void next_units(Units& z, const Scales& s, i32 lane) {
    if (STEP == 0) z.last = z.second, z.first = scale_of<0>(s, lane), z.second = scale_of<1>(s, lane);
    if (STEP == 1) z.before = __shfl_xor_sync(0xffffffffu, lane < 16 ? z.second : z.last, 16);
    if (STEP == 2) z.changes[0] = z.before * inverse(z.first), z.changes[1] = z.first * inverse(z.second);
}
DEV void all_next_units(Units& z, const Scales& s, i32 lane) { next_units<0>(z, s, lane), next_units<1>(z, s, lane), next_units<2>(z, s, lane); }

DEV void scale_sums(float (&acc)[NT][4], float2 by) {
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int c = 0; c < 4; c++) acc[n][c] = __fmul_rn(c < 2 ? by.x : by.y, acc[n][c]);
}

// The fragments of a block.
DEV void decode(u32 (&a)[4][4], const uint4 (&word)[WORDS], i32 lane) {
    const u32 column = column_of(lane);
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const uint4 q = word[NF4_KIND ? 0 : k];
        if (NF4_KIND) {
            const u32 v = k == 0 ? q.x : k == 1 ? q.y : k == 2 ? q.z : q.w;
            a[k][0] = look_up<0>(v, column), a[k][1] = look_up<1>(v, column), a[k][2] = look_up<2>(v, column), a[k][3] = look_up<3>(v, column);
        } else {
            a[k][0] = q.x, a[k][1] = q.y, a[k][2] = q.z, a[k][3] = q.w;
        }
    }
}
