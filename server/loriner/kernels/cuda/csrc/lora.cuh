// The seat table, and the second half of an adapter: y += scale * (B t + bias), t = A x.
// One 96-byte entry for each (seat, fused linear), written by the adapter pool; ranks are exact.
#pragma once
#include "common.cuh"

struct SeatEntry {
    u64 a;            // bf16 [rank, K], the slices stacked
    u64 b[3];         // bf16 of each slice, see b_at()
    u64 bias[3];      // f32 [n] or 0
    float scale[3];
    i32 rank_end[3];  // cumulative
    u32 tiled;        // bit i: b[i] is in tiles
    u32 outputs[3];   // of each slice
};
static_assert(sizeof(SeatEntry) == 96, "the pool writes 96 bytes");

DEV const SeatEntry* seat_entry(const u8* seats, i32 seat, i32 group, i32 num_groups) {
    return (const SeatEntry*)seats + (i64)seat * num_groups + group;
}

// What one row's adapter does in one slice of the outputs.
struct __align__(16) RowLora {
    const u16* b;       // of the slice's output 0
    i32 begin, rank;    // its ranks among the adapter's
    const float* bias;  // as b, or null
    float scale;
    u32 tiled;  // b is
};
static_assert(sizeof(RowLora) == 32, "copied in two pieces of 16 bytes");

// A tile of A x: up to 16 ranks of up to 8 rows of one adapter.
struct ShrinkTile {
    u64 a;  // of the adapter's rank 0
    u16 row, rank;
    u8 rows, ranks;
    u16 spare;
};
static_assert(sizeof(ShrinkTile) == 16, "the plan's rows");

DEV RowLora row_lora(const u8* seats, i32 seat, i32 group, i32 num_groups, i32 slice) {
    RowLora r = {nullptr, 0, 0, nullptr, 0.0f, 0};
    if (seat < 0) return r;
    const SeatEntry* e = seat_entry(seats, seat, group, num_groups);
    r.begin = slice == 0 ? 0 : e->rank_end[slice - 1], r.rank = e->rank_end[slice] - r.begin;
    r.b = (const u16*)e->b[slice], r.bias = (const float*)e->bias[slice], r.scale = e->scale[slice], r.tiled = e->tiled >> slice & 1;
    return r;
}

// Where B of output n for rank r stands, of a slice of so many ranks: [n, rank], or in tiles of 16 outputs and 4 ranks,
// [n / 16, rank / 4, n % 8, r / 2 % 2, n / 8 % 2, r % 2]: so what a lane of mma.m16n8k16 takes of 16 outputs and 16 ranks is 16 bytes.
DEV u32 b_at(u32 n, u32 r, u32 rank, bool tiled) {
    if (!tiled) return n * rank + r;
    return n / 16 * 16 * rank + r / 4 * 64 + n % 8 * 8 + r / 2 % 2 * 4 + n / 8 % 2 * 2 + r % 2;
}

// scale * (B t + bias) for output n of the slice; `t`: of the slice's ranks.
DEV float lora_row(const RowLora& l, i32 n, const float* t) {
    if (l.rank == 0) return 0.0f;
    float sum = 0.0f;
    for (i32 r = 0; r < l.rank; r++) sum += bf16_to_float(l.b[b_at(n, r, l.rank, l.tiled)]) * t[r];
    if (l.bias) sum += l.bias[n];
    return __fmul_rn(l.scale, sum);
}

// What the row's adapter adds to output n; slices end at split0, split1 and N. `t`: A x over all its ranks.
DEV float lora_expand(const u8* seats, i32 seat, i32 group, i32 num_groups, i32 split0, i32 split1, i32 n, const float* t) {
    const i32 slice = (n >= split0) + (n >= split1), start = slice == 0 ? 0 : slice == 1 ? split0 : split1;
    const RowLora l = row_lora(seats, seat, group, num_groups, slice);
    return lora_row(l, n - start, t + l.begin);
}
