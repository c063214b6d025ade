// The second half of what a linear does for its adapters: B (A x), of rows of x whose A x is in shared memory.
//
// Part of adapters.cuh, whose outputs it adds to. Knows no units of A x and nobody who waits.
#pragma once

// B (A x) on the matrix unit: a strip is 16 outputs of a slice (of each of both, if gated) for eight rows of x. Outputs are the A operand of
// mma.m16n8k16, 16 ranks at a time its k; lanes take four consecutive ranks as their fragments', the same for both operands. A x is a sum of
// two bf16: row j has columns j / 2 * 2 and the next one of its products for those, and the other columns are 0. Even rows are added onto one
// accumulator, odd rows onto another, each from the B of its own adapter. So a row's sums depend on nothing but the row, as long as B is
// finite: an adapter of which something is not is refused when it comes in.
#define TILE_OUTPUTS (GATED ? 8 : 16)
#define NUM_SLICES (GATED ? 2 : 1)  // that a strip is of; with as many tiles of sums
#define STRIPS ((OWN / 16 + NUM_SLICES - 1) / NUM_SLICES)
#define HALVES (BESIDE && NT == 1 ? 2 : 1)  // of a strip, a portion each: else there are more warps than portions
#define ROWS_AHEAD (!WGMMA ? 2 : BESIDE || EPILOGUE == 1 || NT > 8 ? 4 : 8)  // whose B is on its way

typedef u32 Columns[2][2];  // of even and odd rows: ranks 4t and 4t + 1, and the two behind

// A row's product, onto the accumulator of its parity.
DEV void multiply_row(float (&acc)[4], const uint4& b, const u32 (&c)[2], bool mine) { mma_bf16(acc, b.x, b.y, b.z, b.w, mine ? c[0] : 0, mine ? c[1] : 0); }

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

// Where A x of this lane's rows g / 2 * 2 and the next one stands in shared memory, and their ranks, of one slice.
struct Factors {
    u32 from[2];  // its address, of rank 4t
    i32 rank[2];
};

// What adapters add to eight rows of x. Plain are rows whose B is in tiles and who have no bias, where all of this thread block's outputs
// are there and in one slice (in both, if gated), and its first is a multiple of 16 there: then B of all eight rows is asked for ahead,
// across portions, none for ranks that a row has not. A portion is a strip, or half of one: its first four rows or its last.
struct Adding {
    const RowLora* l;       // of the first row: its slices
    u32 t;                  // where its A x stands
    i32 stride, first, n;   // the thread block's first slice, and its first output there
    bool same, plain;       // all rows have one adapter: then B is that of the first alone, one of b for each slice
    i32 halves;             // of a strip that are portions
    i32 steps[NUM_SLICES];  // of 16 ranks, of the row that has most; of the last half's from bit 16 on
    uint4 b[ROWS_AHEAD];    // of the next rows; what is left of others in it does no harm, as it is finite

    DEV Adding(const End& p, const Outputs& own, const Passes& passes) : stride(passes.stride), first(GATED ? 0 : own.first_slice(p)) {
        n = own.first - (GATED || first == 0 ? 0 : first == 1 ? p.split0 : p.split1);
#pragma unroll
        for (int j = 0; j < ROWS_AHEAD; j++) b[j] = make_uint4(0, 0, 0, 0);
    }

    DEV i32 portions() const { return HALVES == 1 ? STRIPS : STRIPS * halves; }
    static DEV i32 strip_of(i32 portion) { return HALVES == 1 ? portion : portion % STRIPS; }
    static DEV i32 half_of(i32 portion) { return HALVES == 1 ? 0 : portion / STRIPS; }
    DEV i32 steps_of(i32 slice, i32 half) const { return HALVES == 1 ? steps[slice] : half ? (u32)steps[slice] >> 16 : steps[slice] & 0xffff; }
    // Whether a portion has this lane's rows: 2t and 2t + 1.
    DEV bool has_rows(i32 portion) const { return HALVES == 1 || halves == 1 || (threadIdx.x >> 1 & 1) == half_of(portion); }

    // What the rows of `oct` are, before A x is there; `portion` comes first.
    DEV void look(const End& p, const Outputs& own, i32 oct0, i32 oct, i32 portion) {
        const i32 lane = threadIdx.x & 31, lead = GATED ? lane & 8 : 0;
        l = (const RowLora*)(smem + ROW_LORA) + oct * 24, t = smem_addr(smem) + SHRUNK_AT + (oct - oct0) * 8 * stride * 4;
        // lanes 0 to 7 see to a row each, of gated outputs lanes 8 to 15 to the other slice
        const RowLora own_row = l[(lane & 7) * 3 + (GATED ? lane >> 3 & 1 : first)];
        const i32 begin = own_row.begin - l[(lane & 7) * 3 + first].begin, lead_rank = __shfl_sync(0xffffffffu, own_row.rank, lead);
        const u64 lead_b = __shfl_sync(0xffffffffu, (u64)own_row.b, lead);
        same = __all_sync(0xffffffffu, (u64)own_row.b == lead_b && own_row.rank == lead_rank);
        plain = __all_sync(0xffffffffu, own_row.rank == 0 || (own_row.tiled && (begin & 3) == 0 && own_row.bias == nullptr)) && n % 16 == 0 && own.end - own.first == STRIPS * 16 && (GATED || first == own.last_slice(p));
        halves = HALVES == 2 && plain && !same && __any_sync(0xffffffffu, own_row.rank && lane & 4) ? 2 : 1;
#pragma unroll
        for (int s = 0; s < NUM_SLICES; s++) {
            const i32 rank = GATED && (lane >> 3 & 1) != s ? 0 : own_row.rank;
            steps[s] = (__reduce_max_sync(0xffffffffu, HALVES == 2 && lane & 4 ? 0 : rank) + 15) / 16;
            if (HALVES == 2) steps[s] |= (__reduce_max_sync(0xffffffffu, lane & 4 ? rank : 0) + 15) / 16 << 16;
        }
        if (plain) ask_first(portion);
    }

    DEV Factors factors_of(i32 slice) const {
        const i32 lane = threadIdx.x & 31;
        Factors f;
#pragma unroll
        for (int q = 0; q < 2; q++) {
            const i32 row = lane >> 3 << 1 | q;
            const RowLora* own_row = l + row * 3;
            f.from[q] = t + (row * stride + own_row[slice].begin - own_row[first].begin + (lane & 3) * 4) * 4, f.rank[q] = own_row[slice].rank;
        }
        return f;
    }

    // Plain: have B of row j come, for ranks 16k + 4t to 16k + 4t + 3.
    DEV void ask(uint4& to, int j, i32 slice, i32 strip, i32 k) const {
        const uint4 head = *(const uint4*)(l + j * 3 + (GATED ? slice : first));
        const u16* rows = (const u16*)((u64)head.y << 32 | head.x);
        const u32 lane = threadIdx.x & 31, r = k * 16 + (lane & 3) * 4;
        if (r < head.w) to = __ldg((const uint4*)(rows + ((n + strip * 16) * head.w + k * 256 + (lane & 3) * 64 + (lane >> 2) * 8)));
    }
    // The first step of a portion.
    DEV void ask_first(i32 portion) {
        if (portion >= portions()) return;
        if (same) {
#pragma unroll
            for (int s = 0; s < NUM_SLICES; s++) ask(b[s], 0, s, portion, 0);
        } else {
            const i32 half = half_of(portion);
            ask_rows(half * 4, GATED && steps_of(0, half) == 0, strip_of(portion), 0);
        }
    }
    DEV void ask_rows(int first_row, i32 slice, i32 strip, i32 k) {
#pragma unroll
        for (int j = 0; j < ROWS_AHEAD; j++) ask(b[j], first_row + j, slice, strip, k);
    }

    // This lane's columns at ranks 16k + 4t to 16k + 4t + 3.
    template <bool PLAIN> DEV void load_columns(Columns& c, const Factors& f, i32 k) const {
        const i32 r = k * 16 + (threadIdx.x & 3) * 4, halves = threadIdx.x & 4 ? 0x7632 : 0x5410;
#pragma unroll
        for (int q = 0; q < 2; q++) {
            uint4 v = make_uint4(0, 0, 0, 0);
            if (r < f.rank[q]) {
                const u32 from = f.from[q] + k * 64;
                if (PLAIN) v = ld_shared16(from);
                else v = make_uint4(ld_shared(from), r + 1 < f.rank[q] ? ld_shared(from + 4) : 0, r + 2 < f.rank[q] ? ld_shared(from + 8) : 0, r + 3 < f.rank[q] ? ld_shared(from + 12) : 0);
            }
            c[q][0] = __byte_perm(v.x, v.y, halves), c[q][1] = __byte_perm(v.z, v.w, halves);
        }
    }

    // A strip's part of one slice: this lane's outputs g and g + 8 for rows 2t and 2t + 1.
    static DEV void end_strip(float (&v)[4], const float (&even)[4], const float (&odd)[4]) {
        v[0] = __fadd_rn(even[0], even[1]), v[1] = __fadd_rn(odd[0], odd[1]), v[2] = __fadd_rn(even[2], even[3]), v[3] = __fadd_rn(odd[2], odd[3]);
    }

    // This lane's share of the sums (see sums_at) of a portion's tiles. Asks `then` for the next portion as late as it can, and returns that.
    template <class Then> DEV i32 add(const End& p, const Outputs& own, float (&share)[NUM_SLICES][4], i32 portion, Then then) {
        const i32 strip = strip_of(portion), half = half_of(portion), pair = ((threadIdx.x & 31) >> 3) - half * 2;
        i32 next = -1;
        const auto after = [&] { return next < 0 ? next = then() : next; };
#pragma unroll
        for (int s = 0; s < NUM_SLICES; s++) {
            float v[4] = {};
            if (!plain) {
                add_slowly(p, own, v, s, strip);
            } else {
                float even[4] = {}, odd[4] = {};
                const Factors f = factors_of(GATED ? s : first);
                const RowLora* own_rows = l + (threadIdx.x & 3) * 6 + (GATED ? s : first);  // 2t and the next
                const float scale[2] = {own_rows[0].scale, own_rows[3].scale};
#pragma unroll 1
                for (i32 k = 0; k < steps_of(s, half); k++) {
                    Columns c;
                    load_columns<true>(c, f, k);
                    const bool more = k + 1 < steps_of(s, half);
                    if (same) {
                        multiply_row(even, b[s], c[0], true), multiply_row(odd, b[s], c[1], true);
                        const i32 at = more ? portion : after();
                        if (at < portions()) ask(b[s], 0, s, at, more ? k + 1 : 0);
                        continue;
                    }
                    // where the next step is
                    const bool turn = GATED && s == 0 && steps_of(NUM_SLICES - 1, half);
                    const i32 at = more || turn ? portion : after(), next_half = half_of(at), next_slice = more ? s : turn ? 1 : GATED && steps_of(0, next_half) == 0;
#pragma unroll
                    for (int i = 0; i < 8 / HALVES; i += ROWS_AHEAD) {
#pragma unroll
                        for (int j = 0; j < ROWS_AHEAD; j++) multiply_row(j % 2 ? odd : even, b[j], c[j % 2], pair == (i + j) / 2);
                        if (i + ROWS_AHEAD < 8 / HALVES) ask_rows(i + ROWS_AHEAD, s, strip, k);
                        else if (at < portions()) ask_rows(next_half * 4, next_slice, strip_of(at), more ? k + 1 : 0);
                    }
                }
                end_strip(v, even, odd);
#pragma unroll
                for (int i = 0; i < 4; i++) v[i] = __fmul_rn(scale[i & 1], v[i]);
            }
            if (GATED) {
#pragma unroll
                for (int i = 0; i < 4; i++) share[i / 2][s * 2 + (i & 1)] = v[i];
            } else {
#pragma unroll
                for (int i = 0; i < 4; i++) share[0][i] = v[i];
            }
        }
        if (HALVES == 2 && plain && steps_of(0, half) + steps_of(NUM_SLICES - 1, half) == 0) ask_first(after());
        return after();
    }

    // Slice s of gated outputs, or all of others, for any rows and outputs.
    DEV void add_slowly(const End& p, const Outputs& own, float (&v)[4], i32 s, i32 strip) const {
        const i32 lane = threadIdx.x & 31, from = own.first + strip * 16, end = own.end;
        if (from >= end) return;
        const i32 first_slice = GATED ? s : own.slice(p, from), last = GATED ? s : own.slice(p, min(from + 15, end - 1));
#pragma unroll 1
        for (i32 slice = first_slice; slice <= last; slice++) {
            const i32 start = GATED || slice == 0 ? 0 : slice == 1 ? p.split0 : p.split1, slice_end = min(end, GATED ? end : slice == 0 ? p.split0 : slice == 1 ? p.split1 : p.N);
            i32 at[2];  // outputs g and g + 8 in the slice, -1: not there
#pragma unroll
            for (int h = 0; h < 2; h++) {
                at[h] = from + (lane >> 2) + h * 8;
                at[h] = at[h] >= start && at[h] < slice_end ? at[h] - start : -1;
            }
            const i32 ranks = __reduce_max_sync(0xffffffffu, l[(lane & 7) * 3 + slice].rank);
            const Factors f = factors_of(slice);
            float even[4] = {}, odd[4] = {}, sum[4];
#pragma unroll 1
            for (i32 k = 0; k * 16 < ranks; k++) {
                Columns c;
                load_columns<false>(c, f, k);
#pragma unroll 1
                for (i32 row0 = 0; row0 < 8; row0 += 2)
#pragma unroll
                    for (int q = 0; q < 2; q++) multiply_row(q ? odd : even, b_slowly(l[(row0 + q) * 3 + slice], at, k), c[q], lane >> 3 == row0 / 2);
            }
            end_strip(sum, even, odd);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const RowLora& row = l[((lane & 3) * 2 + (i & 1)) * 3 + slice];
                if (at[i / 2] < 0 || row.rank == 0) continue;
                v[i] = __fmul_rn(row.scale, row.bias ? sum[i] + row.bias[at[i / 2]] : sum[i]);
            }
        }
    }

    // What ask() has come, of outputs `at` and of any rank.
    static DEV uint4 b_slowly(const RowLora& row, const i32 (&at)[2], i32 k) {
        u32 pairs[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const i32 n = at[i & 1], r = k * 16 + (threadIdx.x & 3) * 4 + i / 2 * 2;
            pairs[i] = n >= 0 && r < row.rank ? row.b[b_at(n, r, row.rank, row.tiled)] : 0;
            if (n >= 0 && r + 1 < row.rank) pairs[i] |= (u32)row.b[b_at(n, r + 1, row.rank, row.tiled)] << 16;
        }
        return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
};
