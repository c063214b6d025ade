// What a linear does for its adapters: y += scale * B (A x), each row of x by its own, at exact ranks.
//
// Part of linear.cu, whose defines and shared memory it uses. A x is multiplied in units, which the thread blocks
// share: each value carries the launch's epoch, so that nothing but the value itself is waited for. On Hopper, and with few
// rows of x, four warps beside the main ones (BESIDE) see to adapters while those multiply; else all do, before
// and after. Where multiprocessors are left over, thread blocks without outputs (helpers) multiply units alone. Units
// come first and wait for nobody, and only blocks that are sure to be resident have any (`workers`, which are the
// first to be scheduled), so that a launch may be of any size. Everything is added in a fixed order,
// whatever the other rows and whoever adds.
#pragma once

// The outputs that this thread block finishes; gated ones have another half behind the first.
struct Outputs {
    i32 first, end;  // of a half, if gated
    i32 half;        // 0: not gated

    DEV i32 slice(const Params& p, i32 n) const { return (n >= p.split0) + (n >= p.split1); }
    DEV i32 first_slice(const Params& p) const { return slice(p, first); }
    DEV i32 last_slice(const Params& p) const { return slice(p, end - 1 + half); }
};

DEV Outputs own_outputs(const Params& p, i32 block, i32 rank) {
    constexpr i32 shape = GATED ? 2 : 1;
    const i32 first = outputs_block(p, block) * (ROWS / shape) + rank * (OWN / shape);
    return {first, min(first + OWN / shape, p.N / shape), GATED ? p.N / 2 : 0};
}

// A grid is [cluster, tiles of rows of x, tiles of outputs]: blocks with the same weights run together.
DEV bool is_helper(const Params& p) { return (i32)blockIdx.z < p.helpers; }  // has no outputs
DEV u32 num_blocks() { return gridDim.x * gridDim.y * gridDim.z; }

DEV u32 read_epoch(const Params& p) {
    u32 epoch;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(epoch) : "l"(p.gate) : "memory");
    return epoch;
}
// How many blocks know the epoch, with this one. The next one begins when all do, and not before this launch ends.
DEV u32 note_epoch(const Params& p) {
    u32 before;
    asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(p.gate + 1) : "memory");
    return before + 1;
}
// Of the last epoch of all values are forgotten, so nobody may still want one when all know it.
DEV bool is_last(u32 epoch) { return epoch + 1 == 0; }
DEV void leave(const Params& p, u32 epoch) {
    p.gate[1] = 0, p.gate[0] = is_last(epoch) ? 1 : epoch + 1;
    if (is_last(epoch))  // values of the epochs before must not be taken for those of the epochs to come
        for (i64 i = 0; i < p.shrunk_size; i++) p.shrunk[i] = 0;
}

// A unit: 16 ranks of up to 8 rows of an item, over one part of the inputs, which is summed in SHARES. Ranks are
// the A operand of mma.m16n8k16, rows of x the B operand; lanes take eight consecutive inputs as their
// fragments' sixteen, the same for both.
struct Unit {
    ShrinkTile tile;
    i32 part;
};

// Unit `index`, where there are so many.
DEV Unit unit_at(const Params& p, i32 index) {
    const i32 tile = index / p.parts;
    return {p.tiles[min(tile, p.max_tiles - 1)], index - tile * p.parts};
}
DEV i32 count_units(const Params& p) { return *p.num_tiles * p.parts; }

// Steps of 32 inputs before share `share` of a part; before the next part, for SHARES.
DEV i32 steps_before(const Params& p, i32 part, i32 share) { return p.K / 32 * (part * SHARES + share) / (p.parts * SHARES); }

// Ask for the A of a unit: [16, A_STRIDE] in shared memory. A warp sees to a rank at a time.
DEV void ask_unit(const Params& p, const Unit& u, i32 place, i32 warp) {
    const i32 lane = threadIdx.x & 31, first = steps_before(p, u.part, 0), chunks = (steps_before(p, u.part, SHARES) - first) * 4;
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

#define SHARES_AT (ENDING == SHARES ? 1 : 2)  // of a warp, at a time

// A warp's shares of a unit, whose A is there when `arrived` has been called.
template <class Arrived> DEV void multiply_unit(const Params& p, const Unit& u, i32 place, i32 warp, Arrived arrived) {
    const i32 lane = threadIdx.x & 31, first = steps_before(p, u.part, 0);
    const u8* a = smem + A_AT + place * A_BYTES + (lane >> 2) * A_STRIDE + (lane & 3) * 16;
#pragma unroll 1
    for (i32 i = 0; i < SHARES / ENDING; i += SHARES_AT) {
        const i32 share = warp * (SHARES / ENDING) + i;
        i32 begin[SHARES_AT], count[SHARES_AT], most = 0;
#pragma unroll
        for (int k = 0; k < SHARES_AT; k++) begin[k] = steps_before(p, u.part, share + k), count[k] = steps_before(p, u.part, share + k + 1) - begin[k], most = max(most, count[k]);
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
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < SHARES; i++) sum += sums[i * 128 + thread];
    const i32 c = thread & 3, from = thread >> 2, row = (from & 3) * 2 + (c & 1), r = (from >> 2) + (c >> 1) * 8;
    u64* out = p.shrunk + ((i64)u.part * p.M + u.tile.row + row) * p.shrunk_stride + u.tile.rank + r;
    if (row < u.tile.rows && r < u.tile.ranks) st_relaxed(out, (u64)epoch << 32 | __float_as_uint(sum));
}

#if BESIDE
DEV void ending_sync() { asm volatile("bar.sync 1, %0;" ::"n"(BESIDE * 32) : "memory"); }
DEV void main_sync() { asm volatile("bar.sync 2, %0;" ::"n"(MAIN_THREADS) : "memory"); }
#else
DEV void ending_sync() { __syncthreads(); }
DEV void main_sync() { __syncthreads(); }
#endif

// The units of this thread block: their A is asked for before the kernel ahead has ended, and each next one's while one is
// multiplied. Thread blocks without outputs have the first ones, some rounds of them; the others share the rest.
struct Share {
    Unit now, later;
    i32 next, step, end, warp;

    DEV Share(const Params& p, i32 warp_) : warp(warp_) {
        const i32 all = count_units(p), first = min(all, p.helpers * p.rounds), block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
        if (is_helper(p)) next = block, step = p.helpers, end = first;
        else next = first + block - p.helpers, step = min((i32)num_blocks() - p.helpers, p.workers), end = block - p.helpers < step ? all : 0;
        now = unit_at(p, next);
        if (next < end) ask_unit(p, now, 0, warp);
        cp_async_commit();
        if (BUFFERS == 1) return;
        later = unit_at(p, next + step);
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

// A x of `count` rows of x from `token` on, over all parts, in shared memory: [count, stride] f32. One of the ENDING warps sees to
// a row at a time, a lane to a rank, with AT rows and PARTS parts of them under way.
template <int AT, int PARTS> DEV void gather_rows(const Params& p, i32 first, i32 last, i32 token0, i32 token, i32 count, i32 stride, i32 warp, u32 epoch) {
    const i32 lane = threadIdx.x & 31;
    const i32 part = p.M * p.shrunk_stride;  // values: less than 2^31 in all
    float* to = (float*)(smem + SHRUNK_AT);
#pragma unroll 1
    for (i32 row0 = warp; row0 < count; row0 += ENDING * AT) {
#pragma unroll 1
        for (i32 r = lane; r < stride; r += 32) {
            i32 from[AT];
            bool real[AT];
            float sum[AT] = {};
#pragma unroll
            for (int q = 0; q < AT; q++) {
                const i32 row = min(row0 + q * ENDING, count - 1);
                const RowLora* l = (const RowLora*)(smem + ROW_LORA) + (token + row) * 3;
                const i32 begin = l[first].begin;
                real[q] = row0 + q * ENDING < count && begin + r < l[last].begin + l[last].rank;
                from[q] = (token0 + token + row) * p.shrunk_stride + begin + r;
            }
#pragma unroll 1
            for (i32 j = 0; j < p.parts; j += PARTS) {
                u64 v[AT][PARTS];
#pragma unroll
                for (int q = 0; q < AT; q++)
#pragma unroll
                    for (int k = 0; k < PARTS; k++) v[q][k] = real[q] && j + k < p.parts ? ld_relaxed(p.shrunk + from[q] + (j + k) * part) : (u64)epoch << 32;
#pragma unroll
                for (int q = 0; q < AT; q++)
#pragma unroll
                    for (int k = 0; k < PARTS; k++) {
                        while ((u32)(v[q][k] >> 32) != epoch) v[q][k] = ld_relaxed(p.shrunk + from[q] + (j + k) * part);
                        sum[q] += __uint_as_float((u32)v[q][k]);
                    }
            }
#pragma unroll
            for (int q = 0; q < AT; q++)
                if (real[q]) to[(row0 + q * ENDING) * stride + r] = sum[q];
        }
    }
}
DEV void gather_shrunk(const Params& p, const Outputs& own, i32 token0, i32 token, i32 count, i32 stride, i32 warp, u32 epoch) {
    const i32 first = own.first_slice(p), last = own.last_slice(p);
    count = min(count, min(p.M - token0, TOKENS) - token);
    if (p.parts <= 2) gather_rows<(NT > 8 ? 2 : 4), 2>(p, first, last, token0, token, count, stride, warp, epoch);
    else gather_rows<2, 8>(p, first, last, token0, token, count, stride, warp, epoch);
}

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

    DEV Passes(const Outputs& own, const Params& p, i32 token0) {
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
        tiles = max(1, min(warps / count, OWN / 16)), octs = warps / tiles, end = oct0 + count;
        oct = oct0 + warp / tiles, tile = warp % tiles;
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
    DEV Adding(const Params& p, const Outputs& own, const Turns& turns, i32 oct0, i32 stride_) : stride(stride_), first(own.first_slice(p)) {
        const i32 start = GATED || first == 0 ? 0 : first == 1 ? p.split0 : p.split1;
        n = own.first + ((threadIdx.x & 31) >> 2) - start;
        look(p, own, turns, oct0, min(turns.oct, turns.end - 1));
    }

    DEV void look(const Params& p, const Outputs& own, const Turns& turns, i32 oct0, i32 oct) {
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
    DEV void begin(const Params& p, const Outputs& own, const Turns& turns, i32 oct0, i32 oct) {
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
    DEV void add(const Params& p, const Outputs& own, float (&v)[4], i32 tile, i32 next) {
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
    DEV void add_slowly(const Params& p, const Outputs& own, float (&v)[4], i32 tile) const {
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

#if BESIDE
// Where that is kept for this lane's sums.
DEV float4* added(i32 tile, i32 oct) { return (float4*)(smem + ADDED_AT) + (tile * NT + oct) * 32 + (threadIdx.x & 31); }
#endif

#if BESIDE
// Have B of this thread block's outputs brought to L2: a thread sees to a row's slice.
DEV void prefetch(const Params& p, const Outputs& own, i32 rows, i32 thread) {
#pragma unroll 1
    for (i32 i = thread; i < rows * 3; i += BESIDE * 32) {
        const i32 slice = i % 3, start = slice == 0 || GATED ? 0 : slice == 1 ? p.split0 : p.split1;
        const RowLora& l = ((const RowLora*)(smem + ROW_LORA))[i];
        const i32 first = max(own.first, start), end = min(own.end, GATED ? own.half : slice == 0 ? p.split0 : slice == 1 ? p.split1 : p.N);
        const u8* at = (const u8*)(l.b + (i64)(first - start) * l.rank);
        const i32 size = (end - first) * l.rank * 2 & ~15;
        if (((u64)at & 15) == 0 && size > 0) asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(at), "r"(size) : "memory");
    }
}

// What the warps beside the main ones do: units of A x, then what adapters add to this thread block's outputs.
DEV void beside(const Params& p, const Outputs& own, i32 token0, i32 warp) {
    const i32 thread = threadIdx.x - MAIN_THREADS;
    Share units(p, warp);
    if (!is_helper(p)) prefetch(p, own, min(TOKENS, p.M - token0), thread);
    grid_wait();
    const u32 epoch = read_epoch(p);
    units.multiply(p, thread, epoch);
    if (is_helper(p)) {
        ending_sync();
        if (thread == 0 && note_epoch(p) == num_blocks()) leave(p, epoch);
        return;
    }
    const Passes passes(own, p, token0);
    if (passes.stride)
#pragma unroll 1
        for (i32 oct0 = 0; oct0 < passes.all; oct0 += passes.octs) {
            const Turns turns(passes, oct0, BESIDE, warp);
            Adding adding(p, own, turns, oct0, passes.stride);
            ending_sync();
            gather_shrunk(p, own, token0, oct0 * 8, passes.octs * 8, passes.stride, warp, epoch);
            ending_sync();
#pragma unroll 1
            for (i32 oct = turns.oct; oct < turns.end; oct += turns.octs) {
                adding.begin(p, own, turns, oct0, oct);
#pragma unroll 1
                for (i32 tile = turns.tile; tile < OWN / 16; tile += turns.tiles) {
                    float v[4] = {};
                    adding.add(p, own, v, tile, tile + turns.tiles);
                    *added(tile, oct) = make_float4(v[0], v[1], v[2], v[3]);
                }
            }
        }
    const u32 known = thread == 0 ? note_epoch(p) : 0;
    if (CLUSTER > 1) {
        if (APART) cluster_wait();
        else cluster_sync();
        cluster_sync();
    } else {
        __syncthreads();
    }
    if (known == num_blocks()) leave(p, epoch);
}
#endif
