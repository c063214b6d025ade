// The second half of what a linear does for its adapters: B (A x), of rows of x whose A x is in shared memory.
//
// Part of adapters.cuh, whose outputs it adds to. Knows no units of A x and nobody who waits.
#pragma once

// B (A x) on the matrix unit, for 16 outputs and eight rows of x at a time. Outputs are the A operand of mma.m16n8k16, ranks its k; lanes
// take four consecutive ranks as their fragments', the same for both operands. Row j has columns j / 2 * 2 and the next one of its
// products, whose other columns are 0: even rows are added onto one accumulator, odd rows onto another, each from the B of its own
// adapter. A x is a sum of two bf16, which are the two columns; of gated outputs, whose gate and up have an A x each, those have the
// columns, and there are two products. So a row's sums depend on nothing but the row, as long as B is finite: an adapter of which
// something is not is refused when it comes in.
#define ROWS_AT (NT > 8 ? 2 : 4)  // rows whose B is asked for at a time
#define TILE_OUTPUTS (GATED ? 8 : 16)

struct Columns {
    u32 high[2][2];  // of even and odd rows: ranks 4t and 4t + 1, and the two behind
    u32 low[2][2];   // gated alone
};

// Rows of parity Q, of those that this lane's columns are if `mine`.
template <int Q> DEV void multiply_columns(float (&acc)[4], const uint2 (&b)[2], const Columns& c, bool mine) {
    mma_bf16(acc, b[0].x, b[1].x, b[0].y, b[1].y, mine ? c.high[Q][0] : 0, mine ? c.high[Q][1] : 0);
    if (GATED) mma_bf16(acc, b[0].x, b[1].x, b[0].y, b[1].y, mine ? c.low[Q][0] : 0, mine ? c.low[Q][1] : 0);
}
template <int N> DEV void multiply_rows(float (&even)[4], float (&odd)[4], const uint2 (&b)[N][2], i32 from, const Columns& c) {
    const i32 mine = (threadIdx.x & 31) >> 3;
#pragma unroll
    for (int j = 0; j < N; j += 2) multiply_columns<0>(even, b[j], c, mine == (from + j) / 2), multiply_columns<1>(odd, b[j + 1], c, mine == (from + j) / 2);
}

// This lane's sum i of a tile (see sums_at), out of both accumulators.
DEV float sum_of(const float (&even)[4], const float (&odd)[4], int i) {
    if (GATED) return i == 0 ? even[0] : i == 1 ? odd[0] : i == 2 ? even[3] : odd[3];
    return i & 1 ? __fadd_rn(odd[i / 2 * 2], odd[i / 2 * 2 + 1]) : __fadd_rn(even[i / 2 * 2], even[i / 2 * 2 + 1]);
}

// Most ranks of a row of x in this thread block's slices, to a multiple of 4.
DEV i32 most_ranks(i32 first, i32 last, i32 tokens) {
    const RowLora* rows = (const RowLora*)(smem + ROW_LORA);
    i32 most = 0;
#pragma unroll
    for (i32 i = 0; i < TOKENS; i += 32) {
        const RowLora* l = rows + min(i + (i32)(threadIdx.x & 31), tokens - 1) * 3;
        most = max(most, l[last].begin + l[last].rank - l[first].begin);
    }
    return (__reduce_max_sync(0xffffffffu, most) + 3) & ~3;
}

// How the end deals with adapters: rows of x whose A x fit shared memory at a time.
struct Passes {
    i32 stride, octs;  // stride 0: no row here has an adapter
    i32 rows, all;     // all: eights of rows, in all passes

    DEV Passes(const Outputs& own, const End& p, i32 token0) {
        rows = min(TOKENS, p.M - token0), all = (rows + 7) / 8;
        stride = LORA ? most_ranks(own.first_slice(p), own.last_slice(p), rows) : 0;
        octs = stride ? min(SHRUNK_BYTES / 32 / stride, NT) : NT;
    }
};

// Whose turn it is: each warp has eight rows of x, and some of the tiles of outputs.
struct Turns {
    i32 oct, octs, end, tile, tiles;

    DEV Turns(const Passes& passes, i32 oct0, i32 warps, i32 warp) {
        const i32 count = min(passes.octs, passes.all - oct0);
        tiles = max(1, min(quotient(warps, count), OWN / 16)), octs = quotient(warps, tiles), end = oct0 + count;
        const i32 before = quotient(warp, tiles);
        oct = oct0 + before, tile = warp - before * tiles;
    }
};

// What adapters add to eight rows of x. Plain are rows whose ranks are multiples of 4 and who have no bias, where all of this thread
// block's outputs are there and in one slice (in both, if gated): then B of the next tile is asked for ahead, ROWS_AT rows of it.
struct Adding {
    const RowLora* l;  // of the first row: its slices
    const float* t;    // its A x
    i32 stride, first, most;  // the thread block's first slice; ranks
    bool same, plain;         // all rows have one adapter
    i32 n;                    // output g of tile 0, in its slice
    float scale[GATED ? 4 : 2];
    Columns columns;  // of the first 16 ranks
    uint2 b[ROWS_AT][2];

    // Before A x is there.
    DEV Adding(const End& p, const Outputs& own, const Turns& turns, i32 oct0, i32 stride_) : stride(stride_), first(own.first_slice(p)) {
        const i32 start = GATED || first == 0 ? 0 : first == 1 ? p.split0 : p.split1;
        n = own.first + ((threadIdx.x & 31) >> 2) - start;
        look(p, own, turns, oct0, min(turns.oct, turns.end - 1));
    }

    DEV void look(const End& p, const Outputs& own, const Turns& turns, i32 oct0, i32 oct) {
        const i32 lane = threadIdx.x & 31, lead = GATED ? lane & 8 : 0;
        l = (const RowLora*)(smem + ROW_LORA) + oct * 24, t = (const float*)(smem + SHRUNK_AT) + (oct - oct0) * 8 * stride;
        // lanes 0 to 7 see to a row each, of gated outputs lanes 8 to 15 to the other slice
        const RowLora own_row = l[(lane & 7) * 3 + (GATED ? lane >> 3 & 1 : first)];
        const i32 begin = own_row.begin - l[(lane & 7) * 3 + first].begin, lead_rank = __shfl_sync(0xffffffffu, own_row.rank, lead);
        const u64 lead_b = __shfl_sync(0xffffffffu, (u64)own_row.b, lead);
        most = __reduce_max_sync(0xffffffffu, own_row.rank);
        same = __all_sync(0xffffffffu, (u64)own_row.b == lead_b && own_row.rank == lead_rank);
        plain = __all_sync(0xffffffffu, ((own_row.rank | begin) & 3) == 0 && own_row.bias == nullptr) && own.end - own.first == OWN / 16 * TILE_OUTPUTS && (GATED || first == own.last_slice(p));
#pragma unroll
        for (int i = 0; i < (GATED ? 4 : 2); i++) {
            const RowLora& row = l[((lane & 3) * 2 + (i & 1)) * 3 + (GATED ? i / 2 : first)];
            scale[i] = row.rank ? row.scale : 0.0f;
        }
        if (plain) ask(b, 0, turns.tile, 0);
    }

    // When A x is there, for the rows of `oct`.
    DEV void begin(const End& p, const Outputs& own, const Turns& turns, i32 oct0, i32 oct) {
        if (oct != turns.oct) look(p, own, turns, oct0, oct);
        if (plain) columns = load_columns<true>(first, 0);
    }

    // Plain: ranks r0 + 4t to r0 + 4t + 3 of N rows from `from` on, or of the one adapter.
    template <int N> DEV void ask(uint2 (&to)[N][2], i32 from, i32 tile, i32 r0) const {
        const u32 r = r0 + (threadIdx.x & 3) * 4, at = n + tile * TILE_OUTPUTS;
#pragma unroll
        for (int j = 0; j < N; j++) {
            if (j && same) break;
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const uint4 head = *(const uint4*)(l + (from + j) * 3 + (GATED ? h : first));
                const u16* rows = (const u16*)((u64)head.y << 32 | head.x);
                to[j][h] = make_uint2(0, 0);
                if (r < head.w) to[j][h] = __ldg((const uint2*)(rows + ((at + (GATED ? 0 : h * 8)) * head.w + r)));
            }
        }
    }

    // This lane's columns of A x in a slice at ranks r0 + 4t to r0 + 4t + 3.
    template <bool PLAIN> DEV Columns load_columns(i32 slice, i32 r0) const {
        const i32 g = (threadIdx.x & 31) >> 2, r = r0 + (threadIdx.x & 3) * 4;
        Columns c;
#pragma unroll
        for (int q = 0; q < 2; q++) {
            const i32 row = g / 2 * 2 + q;
            const RowLora* own_row = l + row * 3 + (GATED ? g & 1 : slice);
            const i32 rank = own_row->rank;
            float4 v = make_float4(0, 0, 0, 0);
            if (r < rank) {
                const float* from = t + row * stride + own_row->begin - l[row * 3 + first].begin + r;
                if (PLAIN) v = *(const float4*)from;
                else v = make_float4(from[0], r + 1 < rank ? from[1] : 0, r + 2 < rank ? from[2] : 0, r + 3 < rank ? from[3] : 0);
            }
            const u32 x = pack_bf16(v.x, v.y), y = pack_bf16(v.z, v.w);
            const u32 low_x = pack_bf16(v.x - lo_to_float(x), v.y - hi_to_float(x)), low_y = pack_bf16(v.z - lo_to_float(y), v.w - hi_to_float(y));
            c.high[q][0] = GATED || g % 2 == 0 ? x : low_x, c.high[q][1] = GATED || g % 2 == 0 ? y : low_y;
            c.low[q][0] = low_x, c.low[q][1] = low_y;
        }
        return c;
    }

    // Onto this lane's sums v of a tile (see sums_at), which are 0; `next` is the tile after it.
    DEV void add(const End& p, const Outputs& own, float (&v)[4], i32 tile, i32 next) {
        if (!plain) return add_slowly(p, own, v, tile);
        float even[4] = {}, odd[4] = {};
        Columns c = columns;
#pragma unroll 1
        for (i32 r = 0; r < most; r += 16) {
            if (r) c = load_columns<true>(first, r);
            if (same) {
                multiply_columns<0>(even, b[0], c, true), multiply_columns<1>(odd, b[0], c, true);
            } else {
                multiply_rows(even, odd, b, 0, c);
#pragma unroll
                for (int from = ROWS_AT; from < 8; from += ROWS_AT) ask(b, from, tile, r), multiply_rows(even, odd, b, from, c);
            }
            const bool is_last = r + 16 >= most;
            if (!is_last || next < OWN / 16) ask(b, 0, is_last ? next : tile, is_last ? 0 : r + 16);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = __fmul_rn(scale[GATED ? i : i & 1], sum_of(even, odd, i));
    }

    // The same for any rows and outputs.
    DEV void add_slowly(const End& p, const Outputs& own, float (&v)[4], i32 tile) const {
        const i32 lane = threadIdx.x & 31, t4 = (lane & 3) * 4, from = own.first + tile * TILE_OUTPUTS, end = own.end;
        if (from >= end) return;
        const i32 last = GATED ? 0 : own.slice(p, min(from + 15, end - 1));
#pragma unroll 1
        for (i32 slice = GATED ? 0 : own.slice(p, from); slice <= last; slice++) {
            const i32 start = slice == 0 ? 0 : slice == 1 ? p.split0 : p.split1, slice_end = min(end, GATED ? end : slice == 0 ? p.split0 : slice == 1 ? p.split1 : p.N);
            i32 at[2];  // outputs g and g + 8 (gated: g of both) in the slice, -1: not there
#pragma unroll
            for (int h = 0; h < 2; h++) {
                at[h] = from + (lane >> 2) + (GATED ? 0 : h * 8);
                at[h] = at[h] >= start && at[h] < slice_end ? at[h] - start : -1;
            }
            const i32 ranks = __reduce_max_sync(0xffffffffu, l[(lane & 7) * 3 + (GATED ? lane >> 3 & 1 : slice)].rank);
            float even[4] = {}, odd[4] = {};
#pragma unroll 1
            for (i32 r0 = 0; r0 < ranks; r0 += 16) {
                const Columns c = load_columns<false>(slice, r0);
#pragma unroll 1
                for (i32 row0 = 0; row0 < 8; row0 += 2) {
                    uint2 pair[2][2] = {};
#pragma unroll
                    for (int j = 0; j < 2; j++)
#pragma unroll
                        for (int h = 0; h < 2; h++) {
                            const RowLora& row = l[(row0 + j) * 3 + (GATED ? h : slice)];
                            const u16* of = row.b + (i64)at[h] * row.rank + r0 + t4;
                            const i32 count = at[h] < 0 ? 0 : row.rank - r0 - t4;
                            if (count > 0) pair[j][h].x = of[0];
                            if (count > 1) pair[j][h].x |= (u32)of[1] << 16;
                            if (count > 2) pair[j][h].y = of[2];
                            if (count > 3) pair[j][h].y |= (u32)of[3] << 16;
                        }
                    multiply_rows(even, odd, pair, row0, c);
                }
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const RowLora& row = l[((lane & 3) * 2 + (i & 1)) * 3 + (GATED ? i / 2 : slice)];
                if (at[i / 2] < 0 || row.rank == 0) continue;
                const float sum = sum_of(even, odd, i);
                v[i] = __fmul_rn(row.scale, row.bias ? sum + row.bias[at[i / 2]] : sum);
            }
        }
    }
};
