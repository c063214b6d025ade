// Attention of one row over its keys in the paged cache.
//
// Chunks of all sequences, head by head, lie on a line, each as long as it costs; a thread block has those that begin on its equal
// part. Each of its warps has a piece of every chunk; a chunk's sums are those of its pieces, in order, and a head's those of its chunks. A
// block adds up a head's chunks from the first one on; where it begins in the midst of a head, it leaves each chunk's sums in
// memory, and whoever brings a head's last ones there adds all of them. Scores are products k q^T: keys are the 16 rows of an
// mma, query heads its 8 columns.
#pragma once
#include "sums.cuh"

// The note of a tile.
struct Tile {
    i32 what;
    Head head;
    DEV i32 keys() const { return what & 0xff; }
    DEV bool opens() const { return what & 0x100; }    // the warp's first of this head
    DEV bool begins() const { return what & 0x200; }   // the piece's first
    DEV bool ends() const { return what & 0x400; }     // the piece's last
    DEV bool is_last() const { return what & 0x800; }  // of the part
    DEV i32 chunk() const { return what >> 16; }
};
DEV Tile load_note(const Stage& stage) {
    Tile t;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(t.what), "=r"(t.head.row), "=r"(t.head.first_slot), "=r"(t.head.rest) : "r"(stage.note()) : "memory");
    return t;
}

// The q of a tile that came without.
DEV void fetch_q_of_note(const Inputs& c, const Stage& stage) {
    __syncwarp();
    const Tile t = load_note(stage);
    if (t.opens()) fetch_q(c, stage, t.head.row, t.head.index());
    cp_async_commit();
}

// The online softmax of heads 2t and 2t + 1 over 16 keys: s[0] and s[1] are key g's, s[2] and s[3] key g + 8's, and become
// weights. Until a piece ends, `top` is unscaled and `total` this lane's.
DEV void soften_keys(float (&s)[4], Sums& sums, float scale) {
    float fade[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float best = fmaxf(s[h], s[h + 2]);
#pragma unroll
        for (int i = 4; i < 32; i *= 2) best = fmaxf(best, __shfl_xor_sync(FULL, best, i));
        best = fmaxf(best, sums.top(h));
        const float shift = __fmul_rn(best, scale);
        fade[h] = exp2_fast(__fsub_rn(__fmul_rn(sums.top(h), scale), shift));  // 1 where the largest stays
        s[h] = exp2_fast(fmaf(s[h], scale, -shift)), s[h + 2] = exp2_fast(fmaf(s[h + 2], scale, -shift));
        sums.top(h) = best, sums.total(h) = fmaf(sums.total(h), fade[h], s[h] + s[h + 2]);
    }
    if (!__any_sync(FULL, fade[0] != 1.0f || fade[1] != 1.0f)) return;
#pragma unroll
    for (int i = 0; i < STEPS * 4; i++) sums.o[i / 4][i % 4] = fade[i & 1] == 0.0f ? 0.0f : sums.o[i / 4][i % 4] * fade[i & 1];
}
DEV void finish_piece(Sums& sums, float scale) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        sums.top(h) *= scale;
#pragma unroll
        for (int i = 4; i < 32; i *= 2) sums.total(h) += __shfl_xor_sync(FULL, sums.total(h), i);
    }
}

// A tile's keys and values onto `sums`.
DEV void add_tile(Sums& sums, const u32 (&q)[STEPS][2], const Stage& stage, i32 keys, float scale) {
    const i32 lane = threadIdx.x % 32;
    float s[4] = {}, odd[4] = {};
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
        u32 a[4];
        ldmatrix_x4(a[0], a[1], a[2], a[3], stage.keys() + at_step(lane & 15, i, lane >> 4));
        mma_bf16(i & 1 ? odd : s, a[0], a[1], a[2], a[3], q[i][0], q[i][1]);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) s[i] = lane / 4 + i / 2 * 8 < keys ? s[i] + odd[i] : NEG_INF;
    soften_keys(s, sums, scale);
    const u32 low = transposed(pack_bf16(s[0], s[1])), high = transposed(pack_bf16(s[2], s[3]));
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
        u32 a[4];
        ldmatrix_x4_trans(a[0], a[1], a[2], a[3], stage.values() + at_step((lane & 7) + (lane >> 4 << 3), i, lane >> 3 & 1));
        mma_bf16(sums.o[i], a[0], a[1], a[2], a[3], low, high);
    }
}

// q: rows of GROUP * num_kv heads, q_stride apart; caches [blocks, num_kv, BLOCK_SIZE, D]; block_table [sequences, table_width].
// num_items: 0, or how many items are listed, with the first one: in its place are the number of the others, their cost and their
// chunks. `scale` has log2(e) in it. Any grid.
extern "C" __global__ void __launch_bounds__(D_THREADS, D_BLOCKS)
    decode_attention(const u16* q_rows, i32 q_stride, const u16* k_cache, const u16* v_cache, const Item* items,
                     const i32* num_items, const i32* block_table, i32 table_width, i32 num_kv, float scale,
                     u16* out, float* part, float2* state, u32* tickets) {
    __shared__ int4 told;  // a head of which all chunks are in memory: how many the first slot has, or 0; and which it is
    grid_launch();
    const i32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const i32 listed = *num_items;
    const int4 all = *(const int4*)items;
    const Inputs in = {q_rows, k_cache, v_cache, q_stride, items + 1, block_table, table_width, num_kv, all.x, all.y, all.z};
    const Outputs to = {out, part, state, tickets, num_kv};
    const u32 mine = smem_addr(shared) + warp * D_WARP_BYTES, kept = mine + D_SUMS_AT;
    Stage stage = {mine, 0};
    Feed feed;
    i32 early = 0;  // tiles that do not wait for this step's keys
    if (listed) {
        feed.begin(in, blockIdx.x, gridDim.x, warp);
        if (!feed.any()) return;  // some block has a chunk, and waits: this launch does not end before the kernel ahead
#pragma unroll 1
        for (; early < D_STAGES && feed.is_old(); early++) feed.fetch<false>(in, {mine, early});
    }
    grid_wait();
    if (!listed) return;
#pragma unroll 1
    for (i32 i = 0; i < D_STAGES; i++) {
        if (i >= early) feed.fetch(in, {mine, i});
        else fetch_q_of_note(in, {mine, i});
    }
    u32 q[STEPS][2];
    Sums sums;
    Tile t;
    bool whole = true;      // this part has the head's first chunk: what comes before this one is warp 0's `kept`
    i32 left = 0;           // chunks in memory that nobody knows of yet
    bool is_ending = false;  // warp 0 is seeing to a chunk
    const auto wait_for_warp0 = [&] {
        __syncthreads();
        const int4 v = told;
        if (v.x) combine(to, {v.y, v.z, v.w}, v.x);
    };
    do {
        cp_async_wait<D_STAGES - 1>();
        __syncwarp();
        t = load_note(stage);
        if (t.opens()) {
            const i32 row = min(lane / 4, D_HEADS - 1);
#pragma unroll
            for (int i = 0; i < STEPS * 2; i++)
                asm volatile("ld.shared.b32 %0, [%1];" : "=r"(q[i / 2][i % 2]) : "r"(stage.q() + at(row, i) + lane % 4 * 4) : "memory");
            whole = t.chunk() == 0, left = 0;
        }
        if (t.begins()) sums.clear();
        if (t.keys()) add_tile(sums, q, stage, t.keys(), scale);
        else sums.zero();
        __syncwarp();  // all are done with the tile
        feed.fetch(in, stage);
        stage.next();
        if (!t.ends()) continue;

        // Warp 0 sees to the chunk, while the others go on.
        finish_piece(sums, scale);
        if (is_ending) wait_for_warp0();
        is_ending = true;
        if (warp) sums.save(kept);
        __syncthreads();
        if (warp) continue;
        Sums other;
#pragma unroll
        for (int i = 1; i < D_WARPS; i++) {
            other.load(kept + i * D_WARP_BYTES);
            sums.add(other);
        }
        i32 first = 0;
        const bool ends = t.chunk() + 1 == t.head.num_chunks();
        if (!whole) {
            sums.leave(to, t.head.first_slot + t.chunk(), t.head.count()), left++;
        } else if (t.chunk()) {
            other.load(kept);
            other.add(sums);
            sums = other;
        }
        if (whole && ends) {
            sums.store(to.row(t.head), t.head.count());
        } else if (ends || t.is_last()) {
            if (whole) sums.leave(to, t.head.first_slot, t.head.count());
            first = arrive(to, t.head, whole ? t.chunk() + 1 : left, whole ? t.chunk() + 1 : 0);
        } else if (whole) {
            sums.save(kept);
        }
        if (lane == 0) told = make_int4(first, t.head.row, t.head.first_slot, t.head.rest);
    } while (!t.is_last());
    wait_for_warp0();
}
