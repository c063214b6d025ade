// The seat table, and the second half of an adapter: y += scale * (B t + bias), t = A x.
// One 96-byte entry for each (seat, fused linear), written by the adapter pool; ranks are exact.
#pragma once
#include "common.cuh"

struct SeatEntry {
    u64 a;            // bf16 [rank, K], the slices stacked
    u64 b[3];         // bf16 [n, r] of each slice
    u64 bias[3];      // f32 [n] or 0
    float scale[3];
    i32 rank_end[3];  // cumulative
    i32 spare[4];
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
    i32 spare;
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
    r.b = (const u16*)e->b[slice], r.bias = (const float*)e->bias[slice], r.scale = e->scale[slice];
    return r;
}

// p . v for eight ranks, always in this order: a row's sum is the same whichever way it is computed.
DEV float dot8(const uint4& v, const float4& p, const float4& q) {
    float sum = __fmul_rn(lo_to_float(v.x), p.x);
    sum = __fmaf_rn(hi_to_float(v.x), p.y, sum);
    sum = __fmaf_rn(lo_to_float(v.y), p.z, sum);
    sum = __fmaf_rn(hi_to_float(v.y), p.w, sum);
    sum = __fmaf_rn(lo_to_float(v.z), q.x, sum);
    sum = __fmaf_rn(hi_to_float(v.z), q.y, sum);
    sum = __fmaf_rn(lo_to_float(v.w), q.z, sum);
    return __fmaf_rn(hi_to_float(v.w), q.w, sum);
}

// scale * (B t + bias) for output n of the slice; `t`: of the slice's ranks.
DEV float lora_row(const RowLora& l, i32 n, const float* t) {
    if (l.rank == 0) return 0.0f;
    const u16* b = l.b + (i64)n * l.rank;
    float sum = 0.0f;
    if (l.rank % 8 == 0 && (u64)t % 16 == 0) {
#pragma unroll 2
        for (int r = 0; r < l.rank; r += 8) {
            const float4* p = (const float4*)(t + r);
            sum = __fadd_rn(sum, dot8(__ldg((const uint4*)(b + r)), p[0], p[1]));
        }
    } else {
        for (int r = 0; r < l.rank; r++) sum += bf16_to_float(b[r]) * t[r];
    }
    if (l.bias) sum += l.bias[n];
    return __fmul_rn(l.scale, sum);
}

// What the row's adapter adds to output n; slices end at split0, split1 and N. `t`: A x over all its ranks.
DEV float lora_expand(const u8* seats, i32 seat, i32 group, i32 num_groups, i32 split0, i32 split1, i32 n, const float* t) {
    const i32 slice = (n >= split0) + (n >= split1), start = slice == 0 ? 0 : slice == 1 ? split0 : split1;
    const RowLora l = row_lora(seats, seat, group, num_groups, slice);
    return lora_row(l, n - start, t + l.begin);
}
