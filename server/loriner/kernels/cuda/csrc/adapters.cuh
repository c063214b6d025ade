// What a linear does for its adapters: y += scale * B (A x), each row of x by its own, at exact ranks.
//
// Part of linear.cu, whose defines and shared memory it uses. A x is multiplied in units, which the thread blocks
// share: each value carries the launch's epoch, so that nothing but the value itself is waited for. On Hopper, and with few
// rows of x, some warps beside the main ones (BESIDE) see to adapters while those multiply, which may help with B when
// they have; else all do, before and after. Where multiprocessors are left over, thread blocks without outputs (helpers)
// multiply units alone. Units come first and wait for nobody, and only blocks that are sure to be resident have any
// (`workers`, which are the first to be scheduled), so that a launch may be of any size. Everything is added in a fixed
// order, whatever the other rows and whoever adds.
#pragma once

// The outputs that this thread block finishes; gated ones have another half behind the first.
struct Outputs {
    i32 first, end;  // of a half, if gated
    i32 half;        // 0: not gated

    DEV i32 slice(const End& p, i32 n) const { return (n >= p.split0) + (n >= p.split1); }
    DEV i32 first_slice(const End& p) const { return slice(p, first); }
    DEV i32 last_slice(const End& p) const { return slice(p, end - 1 + half); }
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

// What the adapters of the thread block's rows are, to shared memory; beyond the last row: none.
DEV void load_rows(const Params& p, i32 token0, i32 thread, i32 threads) {
    for (i32 i = thread; i < TOKENS * 6; i += threads) {
        const bool real = i < (p.M - token0) * 6;
        cp_async16_or_zero(smem_addr(smem) + ROW_LORA + i * 16, (const uint4*)p.rows + (real ? token0 * 6 + i : 0), real);
    }
    cp_async_commit();
}

#if BESIDE
DEV void ending_sync() { asm volatile("bar.sync 1, %0;" ::"n"(BESIDE * 32) : "memory"); }
DEV void main_sync() { asm volatile("bar.sync 2, %0;" ::"n"(MAIN_THREADS) : "memory"); }
// What the rows' adapters are has come to shared memory: the warps beside say so, the main ones wait for it.
DEV void rows_have_come() { asm volatile("bar.arrive 3, %0;" ::"n"(THREADS) : "memory"); }
DEV void wait_for_rows() { asm volatile("bar.sync 3, %0;" ::"n"(THREADS) : "memory"); }
// Likewise A x, where the main warps help.
DEV void shrunk_has_come() { asm volatile("bar.arrive 4, %0;" ::"n"(THREADS) : "memory"); }
DEV void wait_for_shrunk() { asm volatile("bar.sync 4, %0;" ::"n"(THREADS) : "memory"); }
#else
DEV void ending_sync() { __syncthreads(); }
DEV void main_sync() { __syncthreads(); }
#endif

#include "units.cuh"

// v as a sum of two bf16: the rounded one in the low half, what is left of v in the high one.
DEV u32 split(float v) { return pack_bf16(v, v - lo_to_float(pack_bf16(v, 0.0f))); }

// A x of `count` rows of x from `token` on, over all pieces, in shared memory: [count, stride], as split() makes it. A thread sees to AT
// values at a time, and to COUNT pieces of each.
template <int AT, int COUNT> DEV void gather_values(const End& p, i32 first, i32 last, i32 token0, i32 token, i32 count, i32 stride, i32 thread, u32 epoch) {
    static_assert(COUNT % PIECES == 0, "halves of a part come together");
    const i32 all = count * stride, of_piece = p.M * p.shrunk_stride;  // values: less than 2^31 in all
    const u32 inverse = 0xffffffff / stride + 1;                       // by which is divided
    u32* to = (u32*)(smem + SHRUNK_AT);
#pragma unroll 1
    for (i32 at = thread; at < all; at += AT * ENDING * 32) {
        u32 from[AT];
        bool real[AT];
        float sum[AT] = {};
#pragma unroll
        for (int q = 0; q < AT; q++) {
            const i32 i = min(at + q * (ENDING * 32), all - 1), row = __umulhi(i, inverse), r = i - row * stride;
            const RowLora* l = (const RowLora*)(smem + ROW_LORA) + (token + row) * 3;
            const i32 begin = l[first].begin;
            real[q] = at + q * (ENDING * 32) < all && begin + r < l[last].begin + l[last].rank;
            from[q] = (token0 + token + row) * p.shrunk_stride + begin + r;
        }
#pragma unroll 1
        for (i32 j = 0; j < num_pieces(p.parts); j += COUNT) {
            u64 v[AT * COUNT];  // pieces of one value beside each other
#pragma unroll
            for (int i = 0; i < AT * COUNT; i++) v[i] = real[i / COUNT] && j + i % COUNT < num_pieces(p.parts) ? 0 : (u64)epoch << 32;
            bool is_there;
            do {
                is_there = true;
#pragma unroll
                for (int i = 0; i < AT * COUNT; i++)
                    if ((u32)(v[i] >> 32) != epoch) v[i] = ld_relaxed(p.shrunk + from[i / COUNT] + (j + i % COUNT) * of_piece);
#pragma unroll
                for (int i = 0; i < AT * COUNT; i++) is_there &= (u32)(v[i] >> 32) == epoch;
            } while (!is_there);
#pragma unroll
            for (int i = 0; i < AT * COUNT; i += PIECES) sum[i / COUNT] += PIECES == 1 ? __uint_as_float((u32)v[i]) : __fadd_rn(__uint_as_float((u32)v[i]), __uint_as_float((u32)v[i + PIECES - 1]));
        }
#pragma unroll
        for (int q = 0; q < AT; q++)
            if (real[q]) to[at + q * (ENDING * 32)] = split(sum[q]);
    }
}
DEV void gather_shrunk(const End& p, const Outputs& own, i32 token0, i32 token, i32 count, i32 stride, i32 warp, u32 epoch) {
    const i32 first = own.first_slice(p), last = own.last_slice(p), thread = warp * 32 + (threadIdx.x & 31);
    count = min(count, min(p.M - token0, TOKENS) - token);
    if (p.parts <= 2) gather_values<(BESIDE || NT > 8 ? 2 : 4), 2 * PIECES>(p, first, last, token0, token, count, stride, thread, epoch);
    else gather_values<(BESIDE ? 1 : 2), (BESIDE ? 14 : 8)>(p, first, last, token0, token, count, stride, thread, epoch);
}

#include "expand.cuh"

#if BESIDE
#define HELPED_RANKS 32  // of a row in a slice, from which on main warps help

// Where B (A x) is kept for this lane's sums.
DEV float4* added(i32 tile, i32 oct) { return (float4*)(smem + ADDED_AT) + (tile * NT + oct) * 32 + (threadIdx.x & 31); }

// Have B of this thread block's outputs brought to L2: a thread sees to a row's slice.
DEV void prefetch(const End& p, const Outputs& own, i32 rows, i32 thread) {
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

// Whether the main warps, when they have multiplied, take portions that nobody has taken: where those are many and long, and A x is there at once.
DEV bool are_helped(const Passes& passes) { return STRIPS * HALVES > BESIDE && passes.stride >= HELPED_RANKS * NUM_SLICES && passes.octs >= passes.all; }
DEV u32 taken_at(i32 oct) { return smem_addr(smem) + PORTIONS_TAKEN_AT + oct * 4; }
DEV i32 take_portion(i32 oct) {
    i32 portion = 0;
    if ((threadIdx.x & 31) == 0) asm volatile("atom.shared.add.u32 %0, [%1], 1;" : "=r"(portion) : "r"(taken_at(oct)) : "memory");
    return __shfl_sync(0xffffffffu, portion, 0);
}

// Portions of eight rows, from one on that `adding` has looked at; `then` says which is next.
template <class Then> DEV void add_portions(const End& p, const Outputs& own, Adding& adding, i32 oct, i32 portion, Then then) {
#pragma unroll 1
    while (portion < adding.portions()) {
        float share[NUM_SLICES][4];
        const i32 next = adding.add(p, own, share, portion, [&] { return then(portion); }), tile = adding.strip_of(portion) * NUM_SLICES;
        if (adding.has_rows(portion))
#pragma unroll
            for (int i = 0; i < NUM_SLICES; i++)
                if (tile + i < OWN / 16) *added(tile + i, oct) = make_float4(share[i][0], share[i][1], share[i][2], share[i][3]);
        portion = next;
    }
}

// By the main warps, where they help.
__device__ __noinline__ void help(const End p, const Outputs own, const Passes passes, i32 warp) {
    const i32 oct = warp % passes.all;
    wait_for_shrunk();
    const i32 portion = take_portion(oct);
    if (portion >= STRIPS * HALVES) return;
    Adding adding(p, own, passes);
    adding.look(p, own, 0, oct, portion);
    add_portions(p, own, adding, oct, portion, [&](i32) { return take_portion(oct); });
}

// What the warps beside the main ones do: units of A x, then what adapters add to this thread block's outputs.
DEV void beside(const Params& p, const Outputs& own, i32 token0, i32 warp) {
    const i32 thread = threadIdx.x - MAIN_THREADS;
    if (CLUSTER > 1) cluster_arrive_relaxed();
    if (!is_helper(p)) load_rows(p, token0, thread, BESIDE * 32);
    Share units(p, count_units(p), warp);
    if (!is_helper(p)) {
        cp_async_wait<1>();  // not for A
        rows_have_come();
        ending_sync();
        prefetch(p, own, min(TOKENS, p.M - token0), thread);
    }
    grid_wait();
    const u32 epoch = read_epoch(p);
    units.multiply(p, thread, epoch);
    if (is_helper(p)) {
        ending_sync();
        if (thread == 0 && note_epoch(p) == num_blocks()) leave(p, epoch);
        return;
    }
    const Passes passes(own, p, token0);
    const i32 octs = NT == 1 ? 1 : min(passes.octs, passes.all), each = octs == 1 ? BESIDE : BESIDE / 2;  // warps of eight rows
    const bool helped = are_helped(passes);
    if (helped && thread < octs) asm volatile("st.shared.u32 [%0], %1;" ::"r"(taken_at(thread)), "r"(each) : "memory");
    if (passes.stride)
#pragma unroll 1
        for (i32 oct0 = 0; oct0 < passes.all; oct0 += octs) {
            const i32 oct = oct0 + (warp >= each), portion = warp & (each - 1);
            Adding adding(p, own, passes);
            adding.look(p, own, oct0, oct, portion);
            ending_sync();
            gather_shrunk(p, own, token0, oct0 * 8, octs * 8, passes.stride, warp, epoch);
            ending_sync();
            if (helped) shrunk_has_come();
            add_portions(p, own, adding, oct, portion, [&](i32 now) { return helped ? take_portion(oct) : now + each; });
        }
    const u32 known = thread == 0 ? note_epoch(p) : 0;
    __syncthreads();
    if (CLUSTER > 1) cluster_wait();
    if (known == num_blocks()) leave(p, epoch);
}
#endif
