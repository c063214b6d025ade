// y = x W^T (+ bias) (+ scale B (A x)) for up to NT * 8 rows of x; W is NF4 in blocks of 64, or bf16.
//
// Weights are the A operand of the matrix instruction (outputs x inputs), rows of x the B operand. Weights are
// stored in the order in which lanes want them (see packing.py) and go from memory to registers, KU
// blocks ahead. A byte becomes a bf16 pair through a table of 256 values with a copy in each of the 32 banks:
// one PRMT, which puts the byte into the address, and one conflict-free load for two weights. A block's sum
// is scaled in fp32. Rows of x pass through a ring in shared memory, swizzled by 128 bytes, which all warps
// share. On sm_90a four warps multiply 64 outputs by wgmma; elsewhere each does 16 by mma.sync.
//
// A thread block computes ROWS outputs over 1/CLUSTER of the inputs; WK groups of four warps split those
// further; the blocks of a cluster add their sums through each other's shared memory in a fixed order. So a
// row's result depends neither on the other rows nor on NT.
//
// Defines: NT, WR x WK groups (each has 64 outputs), STAGES (of the ring of x, XU blocks of each group), DEPTH
// (stages of weights in registers), CLUSTER, APART (sums have room beside table and ring), KIND (0 NF4 with f32
// scales, 1 NF4 with nested scales, 2 bf16), EPILOGUE (0 bf16 store, 1 add to f32, 2 gated bf16 store, 3 f32
// store), GELU, MIN_BLOCKS, REGISTERS (of a thread at most; 0: what MIN_BLOCKS leaves).
#include "common.cuh"
#include "lora.cuh"

#define KU 4  // blocks of 64 inputs in a group's stage
#define GROUPS (WR * WK)
#define WARPS (GROUPS * 4)
#define THREADS (WARPS * 32)
#define ROWS (WR * 64)
#define TOKENS (NT * 8)
#define NF4_KIND (KIND != 2)
#define WORDS (NF4_KIND ? 1 : 4)  // 16-byte words of a lane in a block
#define BLOCK_BYTES (WORDS * 512)
#define TABLE (NF4_KIND ? 65536 : 0)  // 256 rows: 32 copies of a bf16 pair, then 32 of a nested scale's value
#define X_TILE (TOKENS * 128)         // rows of x in one block
#define X_STAGE (WK * XU * X_TILE)
#define X_STEPS (KU / XU)
#define ENTRIES (KIND == 1 ? 512 : 256)  // of the table before it is copied to every bank
#define RED_STRIDE (TOKENS + 4)  // a quad of rows of x is 16 bytes, and neighbouring outputs' quads meet no bank twice
#define OWN (ROWS / CLUSTER)  // outputs that this thread block finishes
static_assert(TOKENS * 3 <= THREADS, "one thread reads one row's adapter in one slice");
#define SUMS (CLUSTER * WK * OWN * RED_STRIDE * 4)
#define SUMS_AT (APART ? TABLE + STAGES * X_STAGE : 0)
#define ROW_LORA (APART ? SUMS_AT + SUMS : TABLE + STAGES * X_STAGE > SUMS ? TABLE + STAGES * X_STAGE : SUMS)
#define X_TOKENS (THREADS / (WK * XU * 8))  // rows of x that the thread block copies at a time
#define X_ROUNDS ((TOKENS + X_TOKENS - 1) / X_TOKENS)

#if __CUDA_ARCH_FEAT_SM90_ALL
#define WGMMA 1
#include "wgmma.cuh"
#else
#define WGMMA 0
#endif

extern __shared__ __align__(1024) u8 smem[];

struct Params {
    const u8* weight;      // [tiles, KB, BLOCK_BYTES], a tile is the 16 outputs of a warp
    const u8* scale;       // [tiles, KB / 4, 16, 4] f32, or u8 when nested
    const float* nested;   // [tiles, spans, 16] f32, a span is 1 << nested_shift blocks
    const float* offset;   // [tiles, 16] f32
    const float* bias;     // [N] f32 or null
    const u16* x;          // [M, K] bf16
    void* y;               // by EPILOGUE
    const u8* seats;       // seat table or null
    const i32* row_seat;   // [M]
    const float* shrunk;   // [M, shrunk_stride] f32
    float code[16];        // of NF4, and behind it
    float map[256];        // of nested scales
    i32 M, N, K, KB, nested_shift, group, num_groups, shrunk_stride, split0, split1;  // KB: padded to KU
};

DEV uint4 ld_once(const u8* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

// The pair of byte I of `v`: the byte becomes the row of the table, the lane its column.
template <int I> DEV u32 pair(u32 v, u32 lane4) { return *(const u32*)(smem + __byte_perm(v, lane4, 0x5504 | I << 4)); }

// This thread's part of the ring of x: [STAGES][WK * XU][TOKENS] rows of 128 bytes, 16-byte chunk c of row r
// in place of chunk c ^ (r % 8).
struct FeedX {
    const u16* from;  // of block 0
    u32 to;
    i32 jump, rows, kb, slot, step;
};

DEV void load_x(const Params& p, FeedX& f, u32 base) {
    const bool valid = f.kb * 64 < p.K;
#pragma unroll
    for (int i = 0; i < X_ROUNDS; i++)
        if (i * X_TOKENS < f.rows)
            cp_async16_or_zero(base + f.slot * X_STAGE + i * X_TOKENS * 128 + (f.to ^ (i * X_TOKENS % 8 * 16)),
                               valid ? f.from + f.kb * 64 + (i64)i * f.jump : p.x, valid);
    f.step = f.step == X_STEPS - 1 ? 0 : f.step + 1;
    f.kb += f.step ? XU : WK * KU - (X_STEPS - 1) * XU;
    f.slot = f.slot == STAGES - 1 ? 0 : f.slot + 1;
}

struct Weights {
    uint4 word[DEPTH][KU][WORDS];
    const u8* from;  // the stage to load next
};

template <int D, int U> DEV void load_block(Weights& w) {
#pragma unroll
    for (int i = 0; i < WORDS; i++) w.word[D][U][i] = ld_once(w.from + U * BLOCK_BYTES + i * 512);
}

// Scales of a stage: lane l has those of the tile's output l % 16 (g, half), for KU blocks.
struct Scales {
    float4 plain;
    u32 index;
    float outer, offset;
    const u8* from;
    const float* outer_from;
};

DEV void load_scales(const Params& p, Scales& s, i32 kb) {
    if (KIND == 0) s.plain = *(const float4*)s.from;
    if (KIND == 1) {
        s.index = *(const u32*)s.from;
        s.outer = s.outer_from[(i64)(kb >> p.nested_shift) * 16];
    }
}

// The scales of this lane's two outputs for block U.
template <int U> DEV float2 scales_of(const Scales& s, i32 lane) {
    float own = U == 0 ? s.plain.x : U == 1 ? s.plain.y : U == 2 ? s.plain.z : s.plain.w;
    if (KIND == 1)  // rounded as bitsandbytes does: product, then sum
        own = __fadd_rn(__fmul_rn(*(const float*)(smem + 128 + __byte_perm(s.index, lane * 4, 0x5504 | U << 4)), s.outer), s.offset);
    const i32 g2 = (lane >> 2) * 2;
    return make_float2(__shfl_sync(0xffffffffu, own, g2), __shfl_sync(0xffffffffu, own, g2 + 1));
}

#if WGMMA
typedef u64 XTile;  // a descriptor
#else
typedef u32 XTile;  // an address
#endif

// c (+)= A B over one block: a has the four k16 fragments, x_tile [TOKENS, 64] is in shared memory. Until
// `finish_multiply` c and a belong to the matrix unit.
template <bool ADD> DEV void start_multiply(float (&c)[NT][4], const u32 (&a)[4][4], XTile x_tile, i32 u, i32 lane) {
#if WGMMA
    wgmma_fence(c);
#pragma unroll
    for (int k = 0; k < 4; k++) wgmma<NT>(c, a[k], x_tile + (u * (X_TILE / 16) + k * 2), ADD || k > 0);
    wgmma_commit();
#else
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int n = 0; n < NT; n++) {
            u32 b0, b1, b2, b3;
            ldmatrix_x4(b0, b1, b2, b3, x_tile + u * X_TILE + n * 1024 + (lane & 7) * 128 + (((half * 4 + (lane >> 3)) ^ (lane & 7)) << 4));
            if (!ADD && half == 0)
                for (int i = 0; i < 4; i++) c[n][i] = 0.0f;
            mma_bf16(c[n], a[half * 2][0], a[half * 2][1], a[half * 2][2], a[half * 2][3], b0, b1);
            mma_bf16(c[n], a[half * 2 + 1][0], a[half * 2 + 1][1], a[half * 2 + 1][2], a[half * 2 + 1][3], b2, b3);
        }
#endif
}
DEV void finish_multiply(float (&c)[NT][4]) {
#if WGMMA
    wgmma_wait();
    wgmma_fence_registers(c);
#endif
}

DEV void decode(u32 (&a)[4][4], const uint4 (&word)[WORDS], i32 lane) {
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const uint4 q = word[NF4_KIND ? 0 : k];
        if (NF4_KIND) {
            const u32 v = k == 0 ? q.x : k == 1 ? q.y : k == 2 ? q.z : q.w;
            a[k][0] = pair<0>(v, lane * 4), a[k][1] = pair<1>(v, lane * 4), a[k][2] = pair<2>(v, lane * 4), a[k][3] = pair<3>(v, lane * 4);
        } else {
            a[k][0] = q.x, a[k][1] = q.y, a[k][2] = q.z, a[k][3] = q.w;
        }
    }
}

// Blocks U.. to END of a stage: while the matrix unit works on one, the next is decoded.
template <int D, int U, int END>
DEV void blocks(Weights& w, const Scales& s, XTile x_tile, i32 lane, bool more, u32 (&now)[4][4], u32 (&next)[4][4], float (&part)[NT][4], float (&acc)[NT][4]) {
    if constexpr (U < END) {
        if (NF4_KIND) start_multiply<false>(part, now, x_tile, U % XU, lane);
        else start_multiply<true>(acc, now, x_tile, U % XU, lane);
        if constexpr (U + 1 < KU) {
            decode(next, w.word[D][U + 1], lane);
            if (more) load_block<D, U + 1>(w);
        }
        if (NF4_KIND) {
            const float2 scale = scales_of<U>(s, lane);
            finish_multiply(part);
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int c = 0; c < 4; c++) acc[n][c] += (c < 2 ? scale.x : scale.y) * part[n][c];
        } else {
            finish_multiply(acc);
        }
        blocks<D, U + 1, END>(w, s, x_tile, lane, more, next, now, part, acc);
    }
}

// The blocks of a stage whose x has come in at `step`.
template <int D>
DEV void stage_step(Weights& w, const Scales& s, XTile x_tile, i32 lane, i32 step, bool more, u32 (&a)[4][4], u32 (&b)[4][4], float (&part)[NT][4], float (&acc)[NT][4]) {
    if (step == 0) {
        decode(a, w.word[D][0], lane);
        if (more) load_block<D, 0>(w);
        blocks<D, 0, XU>(w, s, x_tile, lane, more, a, b, part, acc);
    }
    if constexpr (XU == 2)
        if (step == 1) blocks<D, 2, 4>(w, s, x_tile, lane, more, a, b, part, acc);
    if constexpr (XU == 1) {
        if (step == 1) blocks<D, 1, 2>(w, s, x_tile, lane, more, b, a, part, acc);
        if (step == 2) blocks<D, 2, 3>(w, s, x_tile, lane, more, a, b, part, acc);
        if (step == 3) blocks<D, 3, 4>(w, s, x_tile, lane, more, b, a, part, acc);
    }
}

// Give a warp's sums to the block of the cluster that finishes its 16 outputs: [source][output][row of x].
DEV void give(const float (&acc)[NT][4], i32 source, i32 tile, i32 lane) {
    const i32 owner = tile / (OWN / 16), odd = lane & 1;
    const i32 output = source * OWN + tile % (OWN / 16) * 16 + (lane >> 2) + odd * 8;
    u32 to = smem_addr(smem) + SUMS_AT + (output * RED_STRIDE + (lane & 2) * 2) * 4;
    if (CLUSTER > 1) to = cluster_map(to, owner);
#pragma unroll
    for (int n = 0; n < NT; n++) {  // neighbours swap halves: each then has four rows of x for one output
        const float x = __shfl_xor_sync(0xffffffffu, odd ? acc[n][0] : acc[n][2], 1);
        const float y = __shfl_xor_sync(0xffffffffu, odd ? acc[n][1] : acc[n][3], 1);
        const float a = odd ? x : acc[n][0], b = odd ? y : acc[n][1], c = odd ? acc[n][2] : x, d = odd ? acc[n][3] : y;
        if (CLUSTER > 1) asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to + n * 32), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
        else asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to + n * 32), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
    }
}

// One output of this thread block for four rows of x: the sums of all groups and blocks, in a fixed order.
DEV void reduced(float (&sum)[4], i32 output, i32 quad) {
    const u8* at = smem + SUMS_AT + (output * RED_STRIDE + quad * 4) * 4;
#pragma unroll
    for (int i = 0; i < CLUSTER * WK; i++) {
        const float4 v = *(const float4*)(at + i * (OWN * RED_STRIDE * 4));
        if (i == 0) sum[0] = v.x, sum[1] = v.y, sum[2] = v.z, sum[3] = v.w;
        else sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
    }
}

// Bias and adapters onto output n of the four rows of `quad`.
DEV void finish(const Params& p, float (&v)[4], i32 n, i32 token0, i32 quad) {
    if (p.bias)
#pragma unroll
        for (int j = 0; j < 4; j++) v[j] += p.bias[n];
    if (p.seats) {
        const RowLora* rows = (const RowLora*)(smem + ROW_LORA) + quad * 12 + (n >= p.split0) + (n >= p.split1);
        lora_quad(v, rows, n, p.shrunk + (i64)(token0 + quad * 4) * p.shrunk_stride, p.shrunk_stride);
    }
}

DEV float activate(float v) {
#if GELU
    return 0.5f * v * (1.0f + tanhf(0.7978845608028654f * (v + 0.044715f * v * v * v)));
#else
    return v / (1.0f + __expf(-v));
#endif
}

DEV void epilogue(const Params& p, i32 token0, i32 rank) {
    constexpr i32 per = EPILOGUE == 2 ? OWN / 2 : OWN, total = per * TOKENS / 4;
    const i32 first = (blockIdx.x / CLUSTER) * (EPILOGUE == 2 ? ROWS / 2 : ROWS) + rank * per;
    const i32 outputs = EPILOGUE == 2 ? p.N / 2 : p.N;
#pragma unroll 1
    for (i32 i = threadIdx.x; i < total; i += THREADS) {
        const i32 own = i % per, n = first + own, quad = i / per, row0 = token0 + quad * 4;
        const i32 rows = min(p.M - row0, 4);
        if (n >= outputs) continue;
        float old[4], sum[4], up[4];
        if (EPILOGUE == 1)
#pragma unroll
            for (int j = 0; j < 4; j++) old[j] = j < rows ? ((const float*)p.y)[(i64)(row0 + j) * outputs + n] : 0.0f;
        const i32 output = EPILOGUE == 2 ? (own >> 3) * 16 + (own & 7) : own;  // 8 of gate, the 8 of up with them
        reduced(sum, output, quad);
        finish(p, sum, n, token0, quad);
        if (EPILOGUE == 2) {
            reduced(up, output + 8, quad);
            finish(p, up, n + outputs, token0, quad);
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (j >= rows) break;
            const i64 at = (i64)(row0 + j) * outputs + n;
            if (EPILOGUE == 2) ((u16*)p.y)[at] = float_to_bf16(activate(sum[j]) * up[j]);
            if (EPILOGUE == 0) ((u16*)p.y)[at] = float_to_bf16(sum[j]);
            if (EPILOGUE == 1) ((float*)p.y)[at] = old[j] + sum[j];
            if (EPILOGUE == 3) ((float*)p.y)[at] = sum[j];
        }
    }
}

#if REGISTERS
#define BOUNDS __maxnreg__(REGISTERS)
#else
#define BOUNDS __launch_bounds__(THREADS, MIN_BLOCKS)
#endif

extern "C" __global__ void BOUNDS linear(const __grid_constant__ Params p) {
    grid_launch();
    if (CLUSTER > 1 && APART) cluster_arrive();
    const i32 rank = CLUSTER == 1 ? 0 : cluster_rank();
    const i32 lane = threadIdx.x & 31, warp = __shfl_sync(0xffffffffu, (i32)threadIdx.x >> 5, 0), wk = (warp >> 2) % WK, wr = (warp >> 2) / WK;
    const i32 tile = (blockIdx.x / CLUSTER) * (ROWS / 16) + wr * 4 + (warp & 3), token0 = blockIdx.y * TOKENS;
    const i32 units = p.KB / KU, begin = units * rank / CLUSTER, end = units * (rank + 1) / CLUSTER;
    const i32 mine = max(0, (end - begin - wk + WK - 1) / WK);  // stages of this group
    const i32 stages = (end - begin + WK - 1) / WK;             // of the thread block
    i32 kb = (begin + wk) * KU;
    Scales s;
    if (NF4_KIND) {
        s.from = p.scale + ((i64)tile * p.KB + kb) * (KIND == 0 ? 64 : 16) + (lane & 15) * (KIND == 0 ? 16 : 4);
        if (KIND == 1) {
            const i32 spans = (p.KB + (1 << p.nested_shift) - 1) >> p.nested_shift;
            s.outer_from = p.nested + (i64)tile * spans * 16 + (lane & 15), s.offset = p.offset[tile * 16 + (lane & 15)];
        }
        if (mine > 0) load_scales(p, s, kb);
    }
    Weights w;
    w.from = p.weight + ((i64)tile * p.KB + kb) * BLOCK_BYTES + lane * 16;
    constexpr i32 hop = WK * KU * BLOCK_BYTES;
    if (mine > 0) load_block<0, 0>(w), load_block<0, 1>(w), load_block<0, 2>(w), load_block<0, 3>(w);
    w.from += hop;
    if (DEPTH > 1) {
        if (mine > 1) load_block<DEPTH - 1, 0>(w), load_block<DEPTH - 1, 1>(w), load_block<DEPTH - 1, 2>(w), load_block<DEPTH - 1, 3>(w);
        w.from += hop;
    }
    if (NF4_KIND) {
#pragma unroll
        for (int i = 0; i < (ENTRIES + THREADS - 1) / THREADS; i++) {
            const i32 e = threadIdx.x + i * THREADS;
            if (e < ENTRIES) {
                const u32 v = e < 256 ? pack_bf16(p.code[e & 15], p.code[e >> 4 & 15]) : __float_as_uint(p.map[e & 255]);
#pragma unroll
                for (int j = 0; j < 8; j++)  // neighbours start at different banks
                    *(uint4*)(smem + (e & 255) * 256 + (e >> 8) * 128 + ((e + j) & 7) * 16) = make_uint4(v, v, v, v);
            }
        }
    }
    if (p.seats && threadIdx.x < TOKENS * 3) {
        const i32 row = token0 + threadIdx.x / 3;
        ((RowLora*)(smem + ROW_LORA))[threadIdx.x] = row_lora(p.seats, row < p.M ? p.row_seat[row] : -1, p.group, p.num_groups, threadIdx.x % 3, p.split0, p.split1);
    }
    FeedX f;
    const i32 token = threadIdx.x / (WK * XU * 8), chunk = threadIdx.x % (WK * XU * 8);
    f.kb = (begin + chunk / 8 / XU) * KU + chunk / 8 % XU, f.slot = 0, f.step = 0;
    f.from = p.x + (i64)(token0 + token) * p.K + (chunk & 7) * 8;
    f.jump = X_TOKENS * p.K, f.rows = min(p.M - token0, TOKENS) - token;
    f.to = TABLE + (chunk / 8) * X_TILE + token * 128 + (((chunk & 7) ^ (token & 7)) << 4);
    const u32 base = smem_addr(smem);
    grid_wait();
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        if (i < stages * X_STEPS) load_x(p, f, base);
        cp_async_commit();
    }
    float acc[NT][4], part[NT][4];
#pragma unroll
    for (int i = 0; i < NT * 4; i++) (&acc[0][0])[i] = 0.0f, (&part[0][0])[i] = 0.0f;
#if WGMMA
    const XTile x_group = wgmma_descriptor(base + TABLE + wk * XU * X_TILE);
#else
    const XTile x_group = base + TABLE + wk * XU * X_TILE;
#endif
    i32 slot = 0;
    u32 a[4][4], b[4][4];
#pragma unroll 1
    for (int i = 0; i < stages; i++) {
        const bool more = i + DEPTH < mine;
        const Scales now = s;
        kb += WK * KU, s.from += WK * KU * (KIND == 0 ? 64 : 16);
        if (NF4_KIND && i + 1 < mine) load_scales(p, s, kb);
#pragma unroll
        for (int step = 0; step < X_STEPS; step++) {
            cp_async_wait<STAGES - 2>();
#if WGMMA
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // copies, then wgmma's reads
#endif
            __syncthreads();
            if (i * X_STEPS + step + STAGES - 1 < stages * X_STEPS) load_x(p, f, base);
            cp_async_commit();
            if (i < mine) {
#if WGMMA
                const XTile x_tile = x_group + slot * (X_STAGE / 16);
#else
                const XTile x_tile = x_group + slot * X_STAGE;
#endif
                if (DEPTH == 1 || i % 2 == 0) stage_step<0>(w, now, x_tile, lane, step, more, a, b, part, acc);
                else stage_step<DEPTH - 1>(w, now, x_tile, lane, step, more, a, b, part, acc);
            }
            slot = slot == STAGES - 1 ? 0 : slot + 1;
        }
        w.from += hop;
    }
    cp_async_wait<0>();
    if (APART) {
        if (CLUSTER > 1) cluster_wait();  // every block of the cluster has begun
    } else if (CLUSTER > 1) {
        cluster_sync();  // every block of the cluster is done with its table and ring
    } else {
        __syncthreads();
    }
    give(acc, rank * WK + wk, wr * 4 + (warp & 3), lane);
    if (CLUSTER == 1) __syncthreads();
    else cluster_sync();
    epilogue(p, token0, rank);
}
