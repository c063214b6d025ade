// Attention over the paged KV cache: decode with split KV, and (chunked) prefill.
//
// Both walk a work list on the device with fixed grids, so one captured graph serves any batch. Tiles of
// keys arrive by cp.async; products are mma.sync m16n8k16 (its 16 rows are keys in decode, 16 tokens of
// one head in prefill); softmax is online, in fp32 and base 2.
// Invariants: a row's result depends on its own sequence alone (chunks follow from its context, and are
// added in their order, whoever does it); keys beyond the context may hold anything, NaN too.
// Before grid_wait() are read: the work lists and block tables, which come from copies that end before
// the step's first kernel; and, in decode, keys and values of earlier steps: of this one a row sees its own alone.
#include "common.cuh"

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef GROUP
#define GROUP 4
#endif
#ifndef BLOCK_SIZE
#define BLOCK_SIZE 16
#endif
static_assert(HEAD_DIM % 16 == 0 && HEAD_DIM <= 256, "head dims are multiples of 16, up to 256");
static_assert(GROUP >= 1 && GROUP <= 16, "query heads that share a KV head");

#define FULL 0xffffffffu
#define NEG_INF __int_as_float(0xff800000)
#define WIDE (HEAD_DIM > 128)
#define STEPS (HEAD_DIM / 16)   // k-steps of q k^T, and pairs of n-tiles of p v
#define VECTORS (HEAD_DIM / 8)  // 16-byte vectors of a row
// Rows of shared memory are swizzled where they are whole bank lines, else padded: ldmatrix without conflicts.
#define SWIZZLED (HEAD_DIM % 64 == 0)
#define ROW_BYTES (HEAD_DIM * 2 + (SWIZZLED ? 0 : 16))

DEV u32 at(i32 row, i32 vector) {
    return row * ROW_BYTES + ((SWIZZLED ? vector ^ (row & 7) : vector) << 4);
}

// The same for vector 2 * step + odd, with `step` a constant: four addresses serve all steps.
DEV u32 at_step(i32 row, i32 step, i32 odd) {
    if (!SWIZZLED) return at(row, step * 2 + odd);
    return row * ROW_BYTES + (((step % 4 * 2 + odd) ^ (row & 7)) << 4) + step / 4 * 128;
}

extern __shared__ __align__(128) u8 shared[];

#include "decode.cuh"

// ---- prefill: tiles of tokens, 16 for each warp, of one head ----

// The block ids of a tile of keys: lane i has that of page i. Pages past `end` are not looked up.
template <int TILE> DEV i32 load_pages(const i32* table, i32 key, i32 end) {
    static_assert(TILE % BLOCK_SIZE == 0 && TILE / BLOCK_SIZE <= 32, "tiles are whole pages");
    const i32 lane = threadIdx.x % 32;
    const i32 first = key + lane * BLOCK_SIZE;
    return lane < TILE / BLOCK_SIZE && first < end ? table[first / BLOCK_SIZE] : 0;
}

// Start copying keys and values [key, key + TILE) of one KV head to k and v; zeros from `end` on. All threads
// of the block take part.
template <int TILE, int THREADS>
DEV void copy_tile(u32 k, u32 v, const u16* k_cache, const u16* v_cache, i32 pages, i32 num_kv, i32 kv, i32 key,
                   i32 end) {
    constexpr int COUNT = TILE * VECTORS;
#pragma unroll 2  // more of them spill
    for (int i = 0; i < (COUNT + THREADS - 1) / THREADS; i++) {
        const i32 n = i * THREADS + threadIdx.x;
        const i32 row = n / VECTORS, vector = n % VECTORS;
        const i64 page = __shfl_sync(FULL, pages, (row / BLOCK_SIZE) & 31);
        if (COUNT % THREADS && n >= COUNT) continue;
        const i64 from = ((page * num_kv + kv) * BLOCK_SIZE + row % BLOCK_SIZE) * HEAD_DIM + vector * 8;
        const bool real = key + row < end;
        cp_async16_or_zero(k + at(row, vector), k_cache + from, real);
        cp_async16_or_zero(v + at(row, vector), v_cache + from, real);
    }
}

// q's A fragments of one k-step, from 16 rows of shared memory.
DEV void load_q(u32* a, u32 q, i32 step) {
    const i32 lane = threadIdx.x % 32;
    ldmatrix_x4(a[0], a[1], a[2], a[3], q + at_step(lane & 15, step, lane >> 4));
}

// s[16 rows, 8 keys] twice += q k^T over one k-step, for 16 keys from row `first` of the tile.
DEV void add_scores(float* s, const u32* a, u32 k, i32 first, i32 step) {
    const i32 lane = threadIdx.x % 32;
    u32 b[4];
    const i32 row = first + (lane & 7) + ((lane >> 4) << 3);
    ldmatrix_x4(b[0], b[1], b[2], b[3], k + at_step(row, step, (lane >> 3) & 1));
    mma_bf16(s, a[0], a[1], a[2], a[3], b[0], b[1]);
    mma_bf16(s + 4, a[0], a[1], a[2], a[3], b[2], b[3]);
}

// o[16 rows, HEAD_DIM] += p v for 16 keys from row `first` of the tile; s has their weights, as add_scores left
// them.
DEV void add_values(float* o, const float* s, u32 v, i32 first) {
    const i32 lane = threadIdx.x % 32;
    const u32 a0 = pack_bf16(s[0], s[1]), a1 = pack_bf16(s[2], s[3]);
    const u32 a2 = pack_bf16(s[4], s[5]), a3 = pack_bf16(s[6], s[7]);
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
        u32 b[4];
        ldmatrix_x4_trans(b[0], b[1], b[2], b[3], v + at_step(first + (lane & 15), i, lane >> 4));
        mma_bf16(o + i * 8, a0, a1, a2, a3, b[0], b[1]);
        mma_bf16(o + i * 8 + 4, a0, a1, a2, a3, b[2], b[3]);
    }
}

// The online softmax of one thread's two rows (lane / 4, and 8 more) over COUNT n-tiles of scores: s becomes the
// weights; top [2], sum [2] (of this thread's columns) and o follow. `scale` has log2(e) in it; top is
// unscaled.
template <int COUNT> DEV void soften(float* s, float* o, float* top, float* sum, float scale) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float best = top[half];
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            best = fmaxf(best, fmaxf(s[i * 4 + half * 2], s[i * 4 + half * 2 + 1]));
        best = fmaxf(best, __shfl_xor_sync(FULL, best, 1));
        best = fmaxf(best, __shfl_xor_sync(FULL, best, 2));
        const float shift = best == NEG_INF ? 0.0f : __fmul_rn(best, scale);  // no key yet: all weights are 0
        const float fade = exp2_fast(__fsub_rn(__fmul_rn(top[half], scale), shift));  // 1 where the largest stays
        float total = 0.0f;
#pragma unroll
        for (int i = 0; i < COUNT; i++)
#pragma unroll
            for (int j = half * 2; j < half * 2 + 2; j++) {
                s[i * 4 + j] = exp2_fast(fmaf(s[i * 4 + j], scale, -shift));
                total += s[i * 4 + j];
            }
        top[half] = best;
        sum[half] = fmaf(sum[half], fade, total);
#pragma unroll
        for (int i = 0; i < VECTORS; i++) o[i * 4 + half * 2] *= fade, o[i * 4 + half * 2 + 1] *= fade;
    }
}

DEV float quad_sum(float v) {
    v += __shfl_xor_sync(FULL, v, 1);
    return v + __shfl_xor_sync(FULL, v, 2);
}

#define P_MAX_WARPS (WIDE ? 4 : 8)
#define P_SPLIT ((GROUP + P_MAX_WARPS - 1) / P_MAX_WARPS)  // blocks that share a group
#define P_HEADS ((GROUP + P_SPLIT - 1) / P_SPLIT)          // a block's query heads
#define P_SPANS (P_MAX_WARPS / P_HEADS)                    // a block's spans of 16 tokens
#define P_WARPS (P_HEADS * P_SPANS)
#define P_THREADS (P_WARPS * 32)
#define P_TOKENS (P_SPANS * 16)  // attention.py: tile_tokens
#define P_TILE (WIDE ? 32 : 64)
#define P_KV_BYTES (P_TILE * ROW_BYTES)
#define P_STAGE_BYTES (2 * P_KV_BYTES)
#define P_Q_BYTES (P_WARPS * 16 * ROW_BYTES)
#define P_SMEM (2 * P_STAGE_BYTES + P_Q_BYTES)  // attention.py: prefill_smem
#ifndef P_BLOCKS
#define P_BLOCKS 1
#endif

// As decode_attention, with tiles [n] of (sequence, first row): P_TOKENS rows each, the sequence's last one maybe
// fewer; context [sequences]: keys that the sequence's last row sees. Any grid.
extern "C" __global__ void __launch_bounds__(P_THREADS, P_BLOCKS)
    prefill_attention(const u16* q, i32 q_stride, const u16* k_cache, const u16* v_cache, const int2* items,
                      const i32* num_items, const i32* q_start, const i32* context, const i32* block_table,
                      i32 table_width, i32 num_kv, float scale, u16* out) {
    grid_launch();
    const u32 base = smem_addr(shared), q_base = base + 2 * P_STAGE_BYTES;
    const i32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const i32 total = *num_items * num_kv * P_SPLIT;
    const u32 q_warp = q_base + warp * 16 * ROW_BYTES;
    grid_wait();
    for (i32 unit = blockIdx.x; unit < total; unit += gridDim.x) {
        const i32 kv = unit / P_SPLIT % num_kv, first_head = unit % P_SPLIT * P_HEADS;
        const int2 item = items[unit / (num_kv * P_SPLIT)];
        const i32 row0 = item.y, q_end = q_start[item.x + 1];
        const i32 rows = min(P_TOKENS, q_end - row0);
        const i32 seen0 = context[item.x] - (q_end - 1 - row0);  // keys that the tile's first row sees
        const i32 end = seen0 + rows - 1;                        // and its last row
        const i32* table = block_table + (i64)item.x * table_width;
        const i32 num_tiles = (end + P_TILE - 1) / P_TILE;

        i32 pages = load_pages<P_TILE>(table, 0, end);
        __syncthreads();  // no one is still in the last unit's q or stages
        for (i32 n = threadIdx.x; n < P_WARPS * 16 * VECTORS; n += P_THREADS) {
            const i32 r = n / VECTORS, vector = n % VECTORS, w = r / 16;
            const i32 token = w / P_HEADS * 16 + r % 16, head = first_head + w % P_HEADS;
            const bool real = token < rows && head < GROUP;
            const i64 from = (i64)(row0 + (real ? token : 0)) * q_stride + (kv * GROUP + (real ? head : 0)) * HEAD_DIM;
            cp_async16_or_zero(q_base + at(r, vector), q + from + vector * 8, real);
        }
        copy_tile<P_TILE, P_THREADS>(base, base + P_KV_BYTES, k_cache, v_cache, pages, num_kv, kv, 0, end);
        cp_async_commit();
        pages = load_pages<P_TILE>(table, P_TILE, end);

        const i32 token0 = warp / P_HEADS * 16, head = first_head + warp % P_HEADS;
        const i32 seen = seen0 + token0 + lane / 4;  // keys that this thread's first row sees; 8 more: the other
        float o[VECTORS * 4], top[2] = {NEG_INF, NEG_INF}, sum[2] = {0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < VECTORS * 4; i++) o[i] = 0.0f;

        for (i32 t = 0; t < num_tiles; t++) {
            cp_async_wait<0>();
            __syncthreads();  // the tile is here, and no one reads the other stage
            const u32 k = base + (t & 1) * P_STAGE_BYTES;
            if (t + 1 < num_tiles) {
                const u32 to = base + (~t & 1) * P_STAGE_BYTES;
                copy_tile<P_TILE, P_THREADS>(to, to + P_KV_BYTES, k_cache, v_cache, pages, num_kv, kv,
                                             (t + 1) * P_TILE, end);
                cp_async_commit();
                pages = load_pages<P_TILE>(table, (t + 2) * P_TILE, end);
            }
            // A warp whose tokens see none of these keys, or that has no tokens or head, waits for the others.
            if (t * P_TILE >= seen0 + token0 + 15 || token0 >= rows || head >= GROUP) continue;
            float s[P_TILE / 8 * 4];
#pragma unroll
            for (int i = 0; i < P_TILE / 8 * 4; i++) s[i] = 0.0f;
#pragma unroll
            for (int i = 0; i < STEPS; i++) {
                u32 a[4];
                load_q(a, q_warp, i);
#pragma unroll
                for (int j = 0; j < P_TILE / 16; j++) add_scores(s + j * 8, a, k, j * 16, i);
            }
            if ((t + 1) * P_TILE > seen0 + token0) {
                const i32 key = t * P_TILE + lane % 4 * 2;
#pragma unroll
                for (int i = 0; i < P_TILE / 8 * 4; i++)
                    if (key + i / 4 * 8 + i % 2 >= seen + i % 4 / 2 * 8) s[i] = NEG_INF;
            }
            soften<P_TILE / 8>(s, o, top, sum, scale);
#pragma unroll
            for (int j = 0; j < P_TILE / 16; j++) add_values(o, s + j * 8, k + P_KV_BYTES, j * 16);
        }

        // Out through this warp's rows of q, so that rows leave in whole vectors.
        if (token0 >= rows || head >= GROUP) continue;
        const float by0 = 1.0f / quad_sum(sum[0]), by1 = 1.0f / quad_sum(sum[1]);
        u8* mine = shared + 2 * P_STAGE_BYTES + warp * 16 * ROW_BYTES;
        __syncwarp();
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            *(u32*)(mine + at(lane / 4, i) + lane % 4 * 4) = pack_bf16(o[i * 4] * by0, o[i * 4 + 1] * by0);
            *(u32*)(mine + at(lane / 4 + 8, i) + lane % 4 * 4) = pack_bf16(o[i * 4 + 2] * by1, o[i * 4 + 3] * by1);
        }
        __syncwarp();
        for (i32 n = lane; n < 16 * VECTORS; n += 32) {
            const i32 r = n / VECTORS, vector = n % VECTORS;
            if (token0 + r >= rows) break;
            const i64 to = ((i64)(row0 + token0 + r) * num_kv + kv) * GROUP + head;
            *(uint4*)(out + to * HEAD_DIM + vector * 8) = *(const uint4*)(mine + at(r, vector));
        }
    }
}
