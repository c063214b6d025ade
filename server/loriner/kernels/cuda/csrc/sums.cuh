// Sums of attention over keys: of a warp's piece, a chunk, a head; and where those of one head meet that several thread blocks have.
//
// Part of decode.cuh. Everything is added in the order of the keys. Knows no tiles and no scores.
#pragma once
#include "feed.cuh"

// A head of the line: up to D_HEADS query heads that share a KV head, in one sequence.
struct Head {
    i32 row, first_slot, rest;  // first_slot: that of its chunk 0
    DEV i32 index() const { return rest & 0xffff; }
    DEV i32 num_chunks() const { return rest >> 16; }
    DEV i32 first() const { return first_query(index()); }
    DEV i32 count() const { return count_queries(index()); }
};

// Where sums go.
struct Outputs {
    u16* out;       // [T, num_kv * GROUP * D]
    float* part;    // [slots, D_HEADS, D]; a slot: a chunk of a head
    float2* state;  // [slots, D_HEADS]: largest score (base 2), sum of weights
    u32* tickets;   // [slots], zero between launches: chunks that are there, and << 16 how many the first slot's are
    i32 num_kv;
    DEV u16* row(const Head& h) const { return out + ((i64)h.row * num_kv * GROUP + h.first()) * HEAD_DIM; }
};

// The weights of sums so far and of those that are added, always in this order; `top` and `total` become both's.
struct Weights {
    float before, now;
    DEV Weights(float& top, float& total, float2 state) {
        const float best = fmaxf(top, state.x);
        before = exp2_fast(top - best), now = exp2_fast(state.x - best);
        top = best, total = __fmaf_rn(total, before, __fmul_rn(state.y, now));
    }
    DEV float add(float sum, float more) const { return __fmaf_rn(sum, before, __fmul_rn(more, now)); }
};

// Sums of heads 2t and 2t + 1 in lane (g, t): of dims g and g + 8 of each 16.
struct Sums {
    float o[STEPS + 1][4];  // behind them: top [2], total [2]

    DEV float& top(i32 h) { return o[STEPS][h]; }
    DEV float& total(i32 h) { return o[STEPS][2 + h]; }
    // None: the next keys make `o` 0, whatever it is.
    DEV void clear() { top(0) = top(1) = NEG_INF, total(0) = total(1) = 0.0f; }
    DEV void zero() {
#pragma unroll
        for (int i = 0; i < STEPS * 4; i++) o[i / 4][i % 4] = 0.0f;
    }
    DEV void add(Sums& more) {
        const Weights w[2] = {{top(0), total(0), make_float2(more.top(0), more.total(0))}, {top(1), total(1), make_float2(more.top(1), more.total(1))}};
#pragma unroll
        for (int i = 0; i < STEPS * 4; i++) o[i / 4][i % 4] = w[i & 1].add(o[i / 4][i % 4], more.o[i / 4][i % 4]);
    }
    // In shared memory, for the same lane.
    DEV void save(u32 to) const {
#pragma unroll
        for (int i = 0; i <= STEPS; i++)
            asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to + i * 512 + threadIdx.x % 32 * 16), "f"(o[i][0]), "f"(o[i][1]), "f"(o[i][2]), "f"(o[i][3]) : "memory");
    }
    DEV void load(u32 from) {
#pragma unroll
        for (int i = 0; i <= STEPS; i++)
            asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(o[i][0]), "=f"(o[i][1]), "=f"(o[i][2]), "=f"(o[i][3]) : "r"(from + i * 512 + threadIdx.x % 32 * 16) : "memory");
    }
    // In memory, for all.
    DEV void leave(const Outputs& to, i64 slot, i32 heads) {
        const i32 g = threadIdx.x % 32 / 4, first = threadIdx.x % 4 * 2;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            if (first + h >= heads) continue;
            const i64 at = slot * D_HEADS + first + h;
#pragma unroll
            for (int i = 0; i < STEPS; i++) to.part[at * HEAD_DIM + i * 16 + g] = o[i][h], to.part[at * HEAD_DIM + i * 16 + 8 + g] = o[i][2 + h];
            if (g == 0) to.state[at] = make_float2(top(h), total(h));
        }
    }
    DEV void store(u16* row, i32 heads) {
        const i32 g = threadIdx.x % 32 / 4;
        const float by0 = 1.0f / total(0), by1 = 1.0f / total(1);
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            const u32 low = transposed(pack_bf16(o[i][0] * by0, o[i][1] * by1)), high = transposed(pack_bf16(o[i][2] * by0, o[i][3] * by1));
            u32* at = (u32*)(row + g * HEAD_DIM + i * 16) + threadIdx.x % 4;
            if (g < heads) at[0] = low, at[4] = high;
        }
    }
};

// All sums of a head, of which the first slot has `first` chunks, into its rows of out: four dims in a thread.
#define C_CHUNKS (WIDE ? 4 : 8)  // on their way
DEV void combine(const Outputs& to, const Head& h, i32 first) {
    const i32 slots = h.num_chunks() - first + 1, all = h.count() * (HEAD_DIM / 4);
    u16* row = to.row(h);
#pragma unroll 1
    for (i32 n = threadIdx.x; n < all; n += D_THREADS) {
        float4 sum;
        float top, total;
#pragma unroll 1
        for (i32 c = 0; c < slots; c += C_CHUNKS) {
            uint4 v[C_CHUNKS];
            float2 state[C_CHUNKS];
#pragma unroll
            for (int j = 0; j < C_CHUNKS; j++) {
                const i64 slot = (i64)h.first_slot + (c + j == 0 ? 0 : min(first + c + j, h.num_chunks()) - 1);
                v[j] = ld_cg16(to.part + slot * (D_HEADS * HEAD_DIM) + n * 4);
                state[j] = ld_cg8(to.state + slot * D_HEADS + n / (HEAD_DIM / 4));
            }
#pragma unroll
            for (int j = 0; j < C_CHUNKS; j++) {
                if (c + j >= slots) break;
                const float4 more = make_float4(__uint_as_float(v[j].x), __uint_as_float(v[j].y), __uint_as_float(v[j].z), __uint_as_float(v[j].w));
                if (c + j == 0) {
                    sum = more, top = state[j].x, total = state[j].y;
                    continue;
                }
                const Weights w(top, total, state[j]);
                sum.x = w.add(sum.x, more.x), sum.y = w.add(sum.y, more.y), sum.z = w.add(sum.z, more.z), sum.w = w.add(sum.w, more.w);
            }
        }
        const float by = 1.0f / total;
        *(uint2*)(row + n * 4) = make_uint2(pack_bf16(sum.x * by, sum.y * by), pack_bf16(sum.z * by, sum.w * by));
    }
}

// A warp has left so many more chunks of the head in memory. 0, or if they were the last ones, how many the first slot has.
DEV i32 arrive(const Outputs& to, const Head& h, i32 chunks, i32 of_first_slot) {
    u32 ticket = 0;
    const u32 more = chunks | of_first_slot << 16;
    __threadfence();
    __syncwarp();
    if (threadIdx.x % 32 == 0) ticket = atomicAdd(to.tickets + h.first_slot, more) + more;
    ticket = __shfl_sync(FULL, ticket, 0);
    if ((ticket & 0xffff) != h.num_chunks()) return 0;
    if (threadIdx.x % 32 == 0) to.tickets[h.first_slot] = 0;
    __threadfence();
    return ticket >> 16;
}
