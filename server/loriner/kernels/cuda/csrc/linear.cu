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
// Adapters: before their main loop the first thread blocks multiply A x in units, which the end of every thread
// block waits for: each value carries the launch's epoch, so that nothing but the value itself is waited for.
// Those blocks are the first to be scheduled and never wait before they have given their part, so the
// launch may be of any size. When a thread block has multiplied, its warps add B (A x) to their sums, each for some
// rows of x: by mma.m16n8k16, whose accumulators lie as those of wgmma.
//
// Defines: NT, WR x WK groups (each has 64 outputs), STAGES (of the ring of x, XU blocks of each group), DEPTH
// (stages of weights in registers), CLUSTER, APART (sums have room beside table and ring), KIND (0 NF4 with f32
// scales, 1 NF4 with nested scales, 2 bf16), EPILOGUE (0 bf16 store, 1 add to f32, 2 gated bf16 store, 3 f32
// store), GELU, LORA, MIN_BLOCKS, REGISTERS (of a thread at most; 0: what MIN_BLOCKS leaves).
#include "common.cuh"
#include "lora.cuh"

#define AHEAD 4  // steps of 32 inputs of A x that a warp has in flight
#define EARLY (REGISTERS == 0)  // the first weights and a unit's A fit registers together
#define GATHER 4  // rows whose A x a warp waits for at a time
#define KU 4  // blocks of 64 inputs in a group's stage
#define GROUPS (WR * WK)
#define WARPS (GROUPS * 4)
#define THREADS (WARPS * 32)
#define ROWS (WR * 64)
#define TOKENS (NT * 8)
#define NF4_KIND (KIND != 2)
#define WORDS (NF4_KIND ? 1 : 4)  // 16-byte words of a lane in a block
#define BLOCK_BYTES (WORDS * 512)
#define HOP (WK * KU * BLOCK_BYTES)  // from a group's stage to its next
#define WINDOW (NF4_KIND && DEPTH == 1 ? 2 : KU)  // blocks of weights in registers in each stage
#define TABLE (NF4_KIND ? 65536 : 0)  // 256 rows: 32 copies of a bf16 pair, then 32 of a nested scale's value
#define X_TILE (TOKENS * 128)         // rows of x in one block
#define X_STAGE (WK * XU * X_TILE)
#define X_STEPS (KU / XU)
#define ENTRIES (KIND == 1 ? 512 : 256)  // of the table before it is copied to every bank
#define RED_STRIDE (TOKENS + 4)  // a quad of rows of x is 16 bytes, and neighbouring outputs' quads meet no bank twice
#define OWN (ROWS / CLUSTER)  // outputs that this thread block finishes
#define ADDERS (WK * CLUSTER)                // warps that share the rows of x of 16 outputs, when adapters are added
#define ADDED_TILES ((NT + ADDERS - 1) / ADDERS)  // of 8 rows, for one of them
#define SOURCES (ADDERS + (ADDERS > 1))      // of sums: all groups, then what adapters add
#define SUMS (SOURCES * OWN * RED_STRIDE * 4)
#define FRONT (TABLE + STAGES * X_STAGE)
#define LEAST_SHRUNK 24576  // eight rows of x of the most ranks (768)
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define SUMS_AT (APART ? MAX(FRONT, LEAST_SHRUNK) : 0)
#define ROW_LORA (APART ? SUMS_AT + SUMS : MAX(FRONT, MAX(SUMS, LEAST_SHRUNK)))
#define SHRUNK_BYTES (APART ? SUMS_AT : ROW_LORA)  // A x of rows of x, from 0 on, when table and ring have done their work
#define EPOCH_AT (ROW_LORA + TOKENS * 96)
#define BARRIERS_AT (EPOCH_AT + 16)  // a full and a free one of each group's tile of x in each stage
#define LAST_SLOT (TABLE + (STAGES - 1) * X_STAGE)
static_assert(X_STAGE >= WARPS * 512, "a unit of A x is summed in the slot of x that is filled last");
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
#if WGMMA
    TensorMap x_map;       // of x as [K / 64, M, 64], in boxes of [XU, TOKENS, 64] that are swizzled by 128 bytes
#endif
    const u8* weight;      // [tiles, KB, BLOCK_BYTES], a tile is the 16 outputs of a warp
    const u8* scale;       // [tiles, KB / 4, 16, 4] f32, or u8 when nested
    const float* nested;   // [tiles, spans, 16] f32, a span is 1 << nested_shift blocks
    const float* offset;   // [tiles, 16] f32
    const float* bias;     // [N] f32 or null
    const u16* x;          // [M, K] bf16
    void* y;               // by EPILOGUE
    const ShrinkTile* tiles;  // of A x in this linear, and how many there are: lora.cu's plan
    const i32* num_tiles;
    const RowLora* rows;   // [M, 3]
    u64* shrunk;           // [parts, M, shrunk_stride]: A x over each part of the inputs, f32 below the epoch
    u32* gate;             // this launch's epoch, and how many of its blocks know it
    float code[16];        // of NF4, and behind it
    float map[256];        // of nested scales
    i64 shrunk_size;
    i32 M, N, K, KB, nested_shift, max_tiles, shrunk_stride, parts_log, workers, split0, split1;  // KB: padded to KU
};

// Word I of a lane's column in the table: the byte I of `v` becomes the row. On Hopper dynamic shared memory begins at
// 1024 (the kernel checks it), so that the address needs no addition: `column` has the high bits.
#if WGMMA
#define SMEM_START 1024
DEV u32 column_of(i32 lane) { return (smem_addr(smem) & 0xff000000) | lane * 4; }
template <int I, int OFFSET = 0> DEV u32 look_up(u32 v, u32 column) {
    u32 word;
    asm volatile("ld.shared.u32 %0, [%1 + %2];" : "=r"(word) : "r"(__byte_perm(v, column, 0x7604 | I << 4)), "n"(SMEM_START + OFFSET));
    return word;
}
#else
DEV u32 column_of(i32 lane) { return lane * 4; }
template <int I, int OFFSET = 0> DEV u32 look_up(u32 v, u32 column) { return *(const u32*)(smem + OFFSET + __byte_perm(v, column, 0x5504 | I << 4)); }
#endif

// The ring of x: [STAGES][WK * XU][TOKENS] rows of 128 bytes, 16-byte chunk c of row r in place of chunk c ^ (r % 8).
// On Hopper each group has a ring of its own: its first warp fills a slot when all have freed it.
#if WGMMA
DEV u32 full_barrier(u32 base, i32 slot, i32 group) { return base + BARRIERS_AT + (slot * WK + group) * 16; }
DEV u32 free_barrier(u32 base, i32 slot, i32 group) { return full_barrier(base, slot, group) + 8; }

// By one warp of the group: the x of step `ahead` from the one whose first block is kb.
DEV void fetch_x(const Params& p, u32 base, i32 token0, i32 group, i32 slot, u32 parity, i32 kb, i32 ahead) {
    const u32 full = full_barrier(base, slot, group);
    barrier_wait(free_barrier(base, slot, group), parity);
    if (!elected()) return;
    barrier_expect(full, XU * X_TILE);
    copy_tensor(base + TABLE + slot * X_STAGE + group * (XU * X_TILE), &p.x_map, full, token0, kb + ahead / X_STEPS * (WK * KU) + ahead % X_STEPS * XU);
}

// A group's first slots, of `stages` at most.
DEV void start_x(const Params& p, u32 base, i32 token0, i32 group, i32 kb, i32 stages) {
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++)
        if (i / X_STEPS < stages) fetch_x(p, base, token0, group, i, 1, kb, i);
}
#else
struct FeedX {
    const u16* from;  // of block 0
    u32 to;
    i32 jump, rows, kb, slot, step;

    DEV FeedX(const Params& p, i32 token0, i32 begin) : slot(0), step(0) {
        const i32 token = threadIdx.x / (WK * XU * 8), chunk = threadIdx.x % (WK * XU * 8);
        kb = (begin + chunk / 8 / XU) * KU + chunk / 8 % XU;
        from = p.x + (i64)(token0 + token) * p.K + (chunk & 7) * 8;
        jump = X_TOKENS * p.K, rows = min(p.M - token0, TOKENS) - token;
        to = TABLE + (chunk / 8) * X_TILE + token * 128 + (((chunk & 7) ^ (token & 7)) << 4);
    }
};

DEV void copy_x(const Params& p, const FeedX& f, u32 base) {
    const bool valid = f.kb * 64 < p.K;
#pragma unroll
    for (int i = 0; i < X_ROUNDS; i++)
        if (i * X_TOKENS < f.rows)
            cp_async16_or_zero(base + f.slot * X_STAGE + i * X_TOKENS * 128 + (f.to ^ (i * X_TOKENS % 8 * 16)),
                               valid ? f.from + f.kb * 64 + (i64)i * f.jump : p.x, valid);
}

DEV void load_x(const Params& p, FeedX& f, u32 base) {
    copy_x(p, f, base);
    f.step = f.step == X_STEPS - 1 ? 0 : f.step + 1;
    f.kb += f.step ? XU : WK * KU - (X_STEPS - 1) * XU;
    f.slot = f.slot == STAGES - 1 ? 0 : f.slot + 1;
}

DEV void start_x(const Params& p, FeedX& f, u32 base, i32 stages) {
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        if (i / X_STEPS < stages) load_x(p, f, base);
        cp_async_commit();
    }
}
#endif

struct Weights {
    uint4 word[DEPTH][WINDOW][WORDS];
    const u8* from;  // the stage to load next
};

template <int D, int U> DEV void load_block(Weights& w, const u8* from) {
#pragma unroll
    for (int i = 0; i < WORDS; i++) w.word[D][U % WINDOW][i] = ld_once(from + U * BLOCK_BYTES + i * 512);
}

// Block U has been decoded: ask for the one that comes next in its place.
template <int D, int U> DEV void refill(Weights& w, bool more) {
    if constexpr (U + WINDOW < KU) load_block<D, U + WINDOW>(w, w.from - HOP);
    else if (more) load_block<D, U + WINDOW - KU>(w, w.from);
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
        s.outer = s.outer_from[(kb >> p.nested_shift) * 16];
    }
}

template <int D> DEV void load_stage(Weights& w) {
    load_block<D, 0>(w, w.from), load_block<D, 1>(w, w.from);
    if constexpr (WINDOW > 2) load_block<D, 2>(w, w.from), load_block<D, 3>(w, w.from);
}

DEV void load_first(const Params& p, Weights& w, Scales& s, i32 tile, i32 kb, i32 mine) {
    const i32 lane = threadIdx.x & 31;
    w.from = p.weight + ((i64)tile * p.KB + kb) * BLOCK_BYTES + lane * 16;
    if (mine > 0) load_stage<0>(w);
    w.from += HOP;
    if (DEPTH > 1) {
        if (mine > 1) load_stage<DEPTH - 1>(w);
        w.from += HOP;
    }
    if (NF4_KIND) {
        s.from = p.scale + ((i64)tile * p.KB + kb) * (KIND == 0 ? 64 : 16) + (lane & 15) * (KIND == 0 ? 16 : 4);
        if (KIND == 1) {
            const i32 spans = (p.KB + (1 << p.nested_shift) - 1) >> p.nested_shift;
            s.outer_from = p.nested + (i64)tile * spans * 16 + (lane & 15), s.offset = p.offset[tile * 16 + (lane & 15)];
        }
        if (mine > 0) load_scales(p, s, kb);
    }
}

// The scales of this lane's two outputs for block U.
template <int U> DEV float2 scales_of(const Scales& s, i32 lane) {
    float own = U == 0 ? s.plain.x : U == 1 ? s.plain.y : U == 2 ? s.plain.z : s.plain.w;
    if (KIND == 1)  // rounded as bitsandbytes does: product, then sum
        own = __fadd_rn(__fmul_rn(__uint_as_float(look_up<U, 128>(s.index, column_of(lane))), s.outer), s.offset);
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
    const u32 column = column_of(lane);
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const uint4 q = word[NF4_KIND ? 0 : k];
        if (NF4_KIND) {
            const u32 v = k == 0 ? q.x : k == 1 ? q.y : k == 2 ? q.z : q.w;
            a[k][0] = look_up<0>(v, column), a[k][1] = look_up<1>(v, column), a[k][2] = look_up<2>(v, column), a[k][3] = look_up<3>(v, column);
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
            decode(next, w.word[D][(U + 1) % WINDOW], lane);
            refill<D, U + 1>(w, more);
        }
        if (NF4_KIND) {
            const float2 scale = scales_of<U>(s, lane);
            finish_multiply(part);
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int c = 0; c < 4; c++) acc[n][c] = __fmaf_rn(c < 2 ? scale.x : scale.y, part[n][c], acc[n][c]);
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
        refill<D, 0>(w, more);
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

// Give a warp's sums of rows of x, `n` being the tile of 8 of its first, `hop` that to the next, to the block of the cluster
// that finishes its 16 outputs: [source][output][row of x].
template <int N> DEV void give(const float (&sums)[N][4], i32 source, i32 tile, i32 lane, i32 n, i32 hop) {
    const i32 owner = tile / (OWN / 16), odd = lane & 1;
    const i32 output = source * OWN + tile % (OWN / 16) * 16 + (lane >> 2) + odd * 8;
    u32 to = smem_addr(smem) + SUMS_AT + (output * RED_STRIDE + (lane & 2) * 2) * 4;
    if (CLUSTER > 1) to = cluster_map(to, owner);
#pragma unroll
    for (int i = 0; i < N; i++) {  // neighbours swap halves: each then has four rows of x for one output
        if (n + i * hop >= NT) break;
        const float* v = sums[i];
        const float x = __shfl_xor_sync(0xffffffffu, odd ? v[0] : v[2], 1);
        const float y = __shfl_xor_sync(0xffffffffu, odd ? v[1] : v[3], 1);
        const float a = odd ? x : v[0], b = odd ? y : v[1], c = odd ? v[2] : x, d = odd ? v[3] : y;
        const u32 at = to + (n + i * hop) * 32;
        if (CLUSTER > 1) asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
        else asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
    }
}

// One output of this thread block for four rows of x: the sums of all groups and blocks, then adapters: always in this order.
DEV void reduced(float (&sum)[4], i32 output, i32 quad, bool adapted) {
    const u8* at = smem + SUMS_AT + (output * RED_STRIDE + quad * 4) * 4;
#pragma unroll
    for (int i = 0; i < SOURCES; i++) {
        if (i == ADDERS && !adapted) break;
        const float4 v = *(const float4*)(at + i * (OWN * RED_STRIDE * 4));
        if (i == 0) sum[0] = v.x, sum[1] = v.y, sum[2] = v.z, sum[3] = v.w;
        else sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
    }
}

DEV i32 slice_of(const Params& p, i32 n) { return (n >= p.split0) + (n >= p.split1); }
DEV i32 slice_start(const Params& p, i32 slice) { return slice == 0 ? 0 : slice == 1 ? p.split0 : p.split1; }

// The outputs that this thread block finishes; gated ones have another half behind the first.
struct Outputs {
    i32 first, end;  // of a half, if gated
    i32 half;        // 0: not gated

};

DEV Outputs own_outputs(const Params& p, i32 rank) {
    constexpr i32 shape = EPILOGUE == 2 ? 2 : 1;
    const i32 first = (blockIdx.x / CLUSTER) * (ROWS / shape) + rank * (OWN / shape);
    return {first, min(first + OWN / shape, p.N / shape), EPILOGUE == 2 ? p.N / 2 : 0};
}

DEV u32 num_blocks() { return gridDim.x * gridDim.y; }

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
DEV void leave(const Params& p) {
    const u32 epoch = *(const u32*)(smem + EPOCH_AT) + 1;
    p.gate[1] = 0, p.gate[0] = epoch ? epoch : 1;
    if (!epoch)  // values of the epochs before must not be taken for those of the epochs to come
        for (i64 i = 0; i < p.shrunk_size; i++) p.shrunk[i] = 0;
}

// A unit: 16 ranks of up to 8 rows of an item, over one part of the inputs, which the block's warps share. Ranks are
// the A operand of mma.m16n8k16, rows of x the B operand; lanes take eight consecutive inputs as their
// fragments' sixteen, the same for both. Everything is added in a fixed order, whatever the other rows.
struct Unit {
    uint4 a[AHEAD][2];  // this lane's rows of A (g and g + 8), asked for
    const u16 *from, *x;
    i32 rows, ranks, steps;  // of 32 inputs, of this warp
    u64* out;
};

DEV void ask(const Params& p, Unit& u, i32 step) {
    const i32 g = (threadIdx.x & 31) >> 2;
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) u.a[i][h] = ld_once_or_zero(u.from + (i64)h * 8 * p.K + (step + i) * 32, g + h * 8 < u.ranks && step + i < u.steps);
}

// Ask for the A of unit `next`; false when there is none.
DEV bool start_unit(const Params& p, i32 next, i32 warp, Unit& u) {
    const i32 lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const i32 tile = next >> p.parts_log, part = next & ((1 << p.parts_log) - 1), shares = WARPS << p.parts_log;
    const ShrinkTile e = p.tiles[min(tile, p.max_tiles - 1)];
    if (tile >= *p.num_tiles) return false;
    const i32 all = p.K / 32, share = part * WARPS + warp, begin = all * share / shares;
    u.rows = e.rows, u.ranks = e.ranks, u.steps = all * (share + 1) / shares - begin;
    u.x = p.x + (i64)(e.row + g) * p.K + begin * 32 + t * 8;
    u.out = p.shrunk + ((i64)part * p.M + e.row) * p.shrunk_stride + e.rank;
    u.from = (const u16*)e.a + (i64)(e.rank + g) * p.K + begin * 32 + t * 8;
    ask(p, u, 0);
    return true;
}

DEV void multiply_unit(const Params& p, Unit& u, float (&acc)[4]) {
#pragma unroll 1
    for (i32 s = 0; s < u.steps; s += AHEAD) {
        if (s) ask(p, u, s);
        uint4 x[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            x[i] = make_uint4(0, 0, 0, 0);
            if (((threadIdx.x & 31) >> 2) < u.rows && s + i < u.steps) x[i] = ld_cg16(u.x + (s + i) * 32);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            mma_bf16(acc, u.a[i][0].x, u.a[i][1].x, u.a[i][0].y, u.a[i][1].y, x[i].x, x[i].y);
            mma_bf16(acc, u.a[i][0].z, u.a[i][1].z, u.a[i][0].w, u.a[i][1].w, x[i].z, x[i].w);
        }
    }
}

// Add the warps' sums of a unit, and give them out.
DEV void publish_unit(const Params& p, const float (&acc)[4], u32 epoch, i32 rows, i32 ranks, u64* out) {
    float* sums = (float*)(smem + LAST_SLOT);
    *(float4*)(sums + threadIdx.x * 4) = make_float4(acc[0], acc[1], acc[2], acc[3]);
    __syncthreads();
    if (threadIdx.x < 128) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += sums[w * 128 + threadIdx.x];
        const i32 c = threadIdx.x & 3, from = threadIdx.x >> 2, row = (from & 3) * 2 + (c & 1), r = (from >> 2) + (c >> 1) * 8;
        if (row < rows && r < ranks) st_relaxed(out + (i64)row * p.shrunk_stride + r, (u64)epoch << 32 | __float_as_uint(sum));
    }
#if WGMMA
    async_after_generic();
#endif
    __syncthreads();
}

// This thread block's units: `next`, whose A is under way, and every `workers`th.
DEV void multiply_units(const Params& p, i32 next, i32 workers, i32 warp, Unit& unit) {
    const u32 epoch = read_epoch(p);  // out of shared memory it costs the main loop its uniform registers
    bool more = true;
    while (more) {
        float acc[4] = {};
        multiply_unit(p, unit, acc);
        const i32 rows = unit.rows, ranks = unit.ranks;
        u64* out = unit.out;
        more = start_unit(p, next += workers, warp, unit);  // its A comes in meanwhile
        publish_unit(p, acc, epoch, rows, ranks, out);
    }
}

// A float as the sum of two bf16, the higher one in the high half.
DEV u32 split_bf16(float v) {
    const u32 high = (u32)float_to_bf16(v) << 16;
    return high | float_to_bf16(v - __uint_as_float(high));
}

// How this thread block adds adapters: rows of x in tiles of 8, of which a warp has every ADDERS-th.
struct Adding {
    i32 rank, first, last;  // in the cluster; slices of the cluster's outputs
    i32 stride, most;       // most ranks of a row, in these slices and in one; 0 if no row has an adapter
    bool odd, bias;         // ranks that are no multiples of 4; biases of adapters

    // Tile `local` of those that this thread block adds: the warps of group wk have the local ones wk, wk + WK...
    DEV i32 tile(i32 local) const { return CLUSTER == 1 ? local : (local / WK * CLUSTER + rank) * WK + local % WK; }

    DEV Adding(const Params& p, i32 rank, i32 tokens) : rank(rank), stride(0), most(0) {
        constexpr i32 shape = EPILOGUE == 2 ? 2 : 1;
        const i32 n = (blockIdx.x / CLUSTER) * (ROWS / shape), end = min(n + ROWS / shape, p.N / shape);
        first = slice_of(p, n), last = slice_of(p, end - 1 + (EPILOGUE == 2 ? p.N / 2 : 0));
        i32 flags = 0;
#pragma unroll
        for (i32 i = 0; i < TOKENS; i += 32) {
            const RowLora* l = (const RowLora*)(smem + ROW_LORA) + min(i + (i32)(threadIdx.x & 31), tokens - 1) * 3;
#pragma unroll
            for (int s = 0; s < 3; s++) {
                if (s >= first && s <= last) most = max(most, l[s].rank);
                flags |= l[s].rank & 3 | (l[s].bias ? 4 : 0);
            }
            stride = max(stride, l[last].begin + l[last].rank - l[first].begin);
        }
        stride = (__reduce_max_sync(0xffffffffu, stride) + 3) & ~3, most = __reduce_max_sync(0xffffffffu, most);
        flags = __reduce_or_sync(0xffffffffu, flags);
        odd = flags & 3, bias = flags & 4;
    }
};

// scale * A x of the rows of `count` local tiles from `local` on, over all parts, in shared memory: [rows, stride], as sums
// of two bf16. A warp does a row: a lane has one part of one rank.
DEV void gather_shrunk(const Params& p, const Adding& add, i32 token0, i32 tokens, i32 local, i32 count) {
    const i32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, wide = 32 >> p.parts_log, own = lane & (wide - 1), part = lane >> (5 - p.parts_log);
    const u64* mine = p.shrunk + ((i64)part * p.M + token0) * p.shrunk_stride + own;
    const u32 epoch = *(const u32*)(smem + EPOCH_AT);
#pragma unroll 1
    for (i32 row0 = warp; row0 < count * 8; row0 += WARPS * GATHER) {
        const RowLora* l[GATHER];
        const u64* from[GATHER];
        i32 ranks[GATHER];
#pragma unroll
        for (int q = 0; q < GATHER; q++) {
            const i32 row = row0 + q * WARPS, token = min(add.tile(local + row / 8) * 8 + row % 8, tokens);
            l[q] = (const RowLora*)(smem + ROW_LORA) + min(token, tokens - 1) * 3;
            const i32 begin = l[q][add.first].begin;
            ranks[q] = row < count * 8 && token < tokens ? l[q][add.last].begin + l[q][add.last].rank - begin - own : 0;
            from[q] = mine + (i64)token * p.shrunk_stride + begin;
        }
#pragma unroll 1
        for (i32 r = 0; r < add.stride; r += wide) {
            u64 v[GATHER];
#pragma unroll
            for (int q = 0; q < GATHER; q++) v[q] = r < ranks[q] ? ld_relaxed(from[q] + r) : (u64)epoch << 32;
#pragma unroll
            for (int q = 0; q < GATHER; q++) {
                while ((u32)(v[q] >> 32) != epoch) v[q] = ld_relaxed(from[q] + r);
                float sum = __uint_as_float((u32)v[q]);
#pragma unroll 1
                for (i32 d = wide; d < 32; d <<= 1) sum += __shfl_xor_sync(0xffffffffu, sum, d);
                const i32 at = l[q][add.first].begin + own + r;
                if (part == 0 && r < ranks[q]) ((u32*)smem)[(row0 + q * WARPS) * add.stride + own + r] = split_bf16(l[q][(at >= l[q][1].begin) + (at >= l[q][2].begin)].scale * sum);
            }
        }
    }
}

// The outputs of a warp, as this lane has them: g and g + 8 of the tile.
struct Rows16 {
    i32 n[2], slice[2], from[2];  // output, its slice and its place there
    bool whole;                   // all of the tile (of each half, if gated) are in one slice, and there

    DEV Rows16(const Params& p, i32 tile) {
        const i32 g = (threadIdx.x & 31) >> 2, first = EPILOGUE == 2 ? tile * 8 : tile * 16;
        n[0] = first + g, n[1] = EPILOGUE == 2 ? n[0] + p.N / 2 : n[0] + 8;
#pragma unroll
        for (int h = 0; h < 2; h++) slice[h] = slice_of(p, n[h]), from[h] = n[h] - slice_start(p, slice[h]);
        const bool same = EPILOGUE == 2 ? slice[0] == 0 && slice[1] == 1 : slice[0] == slice_of(p, first) && slice[1] == slice[0];
        whole = __all_sync(0xffffffffu, same && n[0] < (EPILOGUE == 2 ? p.N / 2 : p.N) && n[1] < p.N);
    }
};

// The runs of a tile of 8 rows of x: neighbours with one adapter, whose B is read once. Lane (g, q) has row g.
struct Runs {
    u32 heads;    // the first rows of runs: bit 4 g + q
    i32 head;     // that of this lane's row, or -1
    const RowLora* own;
    bool there;

    DEV Runs(const RowLora* l, i32 rows) {
        const i32 lane = threadIdx.x & 31, g = lane >> 2;
        own = l + min(g, rows - 1) * 3, there = g < rows;
        const i32 seat = there ? own->seat : -1, before = __shfl_up_sync(0xffffffffu, seat, 4);
        heads = __ballot_sync(0xffffffffu, seat >= 0 && (g == 0 || seat != before));
        head = seat >= 0 ? (31 - __clz(heads & ((2u << (lane | 3)) - 1))) >> 2 : -1;
    }
};

// Four ranks of A x of one row, as fragments of the upper and the lower bf16.
struct Fragments {
    u32 high[2], low[2];

    DEV Fragments(u32 a, u32 b, u32 c, u32 d) {
        high[0] = __byte_perm(a, b, 0x7632), high[1] = __byte_perm(c, d, 0x7632);
        low[0] = __byte_perm(a, b, 0x5410), low[1] = __byte_perm(c, d, 0x5410);
    }
};

DEV void multiply_run(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, const Fragments& t, bool in) {
    mma_bf16(sum, a0, a1, a2, a3, in ? t.high[0] : 0, in ? t.high[1] : 0);
    mma_bf16(sum, a0, a1, a2, a3, in ? t.low[0] : 0, in ? t.low[1] : 0);
}

// sum += B t for this warp's 16 outputs and a tile of 8 rows of x; `l`: the first one's adapters, `t`: its A x.
// For ranks that are multiples of 4 and whole tiles: all loads are under way together.
DEV void add_tile(const Adding& add, const Rows16& out, const RowLora* l, i32 rows, const u32* t, float (&sum)[4]) {
    const i32 lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
    const Runs runs(l, rows);
    const RowLora *up[2] = {l + out.slice[0], l + out.slice[1]};
#pragma unroll 1
    for (i32 k = q * 4; k < add.most + q * 4; k += 16) {
        uint2 b[8][2];
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const RowLora& one = up[h][j * 3];
                b[j][h] = ld_8_or_zero(one.b + (i64)out.from[h] * one.rank + k, runs.heads >> (j * 4) & 1 && k < one.rank);
            }
#pragma unroll
        for (int half = 0; half < (EPILOGUE == 2 ? 2 : 1); half++) {
            const RowLora& mine = runs.own[out.slice[half]];
            uint4 v = make_uint4(0, 0, 0, 0);
            if (runs.there && k < mine.rank) v = *(const uint4*)(t + g * add.stride + mine.begin - runs.own[add.first].begin + k);
            const Fragments f(v.x, v.y, v.z, v.w);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                if (!(runs.heads >> (j * 4) & 1)) continue;
                if (EPILOGUE != 2) multiply_run(sum, b[j][0].x, b[j][1].x, b[j][0].y, b[j][1].y, f, runs.head == j);
                else if (half == 0) multiply_run(sum, b[j][0].x, 0, b[j][0].y, 0, f, runs.head == j);
                else multiply_run(sum, 0, b[j][1].x, 0, b[j][1].y, f, runs.head == j);
            }
        }
    }
}

// The same, in the same order, for any ranks and slices.
DEV void add_odd_tile(const Params& p, const Adding& add, const Rows16& out, const RowLora* l, i32 rows, const u32* t, float (&sum)[4]) {
    const i32 lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
    const Runs runs(l, rows);
#pragma unroll 1
    for (i32 k = q * 4; k < add.most + q * 4; k += 16)
#pragma unroll 1
        for (i32 s = add.first; s <= add.last; s++) {
            const i32 rank = runs.there ? runs.own[s].rank : 0;
            const u32* from = t + g * add.stride + runs.own[s].begin - runs.own[add.first].begin + k;
            const Fragments f(k < rank ? from[0] : 0, k + 1 < rank ? from[1] : 0, k + 2 < rank ? from[2] : 0, k + 3 < rank ? from[3] : 0);
#pragma unroll 1
            for (u32 left = runs.heads & 0x11111111; left; left &= left - 1) {
                const i32 j = __ffs(left) - 1 >> 2;
                const RowLora& one = l[j * 3 + s];
                uint2 b[2] = {};
#pragma unroll
                for (int h = 0; h < 2; h++)
                    if (out.slice[h] == s && out.n[h] < p.N) b[h] = four_of(one.b + (i64)out.from[h] * one.rank, k, one.rank, false);
                multiply_run(sum, b[0].x, b[1].x, b[0].y, b[1].y, f, runs.head == j);
            }
        }
}

// to += scale * B (A x) for the outputs of tile `tile` and this warp's rows of x.
template <int N> DEV void add_adapters(const Params& p, const Adding& add, float (&to)[N][4], i32 tile, i32 wk, i32 token0, i32 tokens) {
    constexpr i32 locals = N * WK;
    const i32 at = min(SHRUNK_BYTES / 32 / add.stride, locals);
    const Rows16 out(p, tile);
#pragma unroll 1
    for (i32 begin = 0; begin < locals; begin += at) {
        if (begin) __syncthreads();
        gather_shrunk(p, add, token0, tokens, begin, min(at, locals - begin));
        __syncthreads();
#pragma unroll 1
        for (i32 local = wk; local < min(begin + at, locals); local += WK) {
            const i32 m = add.tile(local), rows = tokens - m * 8;
            if (local < begin || m >= NT || rows <= 0) continue;
            float sum[4] = {};
            const RowLora* l = (const RowLora*)(smem + ROW_LORA) + m * 24;
            const u32* t = (const u32*)smem + (local - begin) * 8 * add.stride;
            if (out.whole && !add.odd) add_tile(add, out, l, min(rows, 8), t, sum);
            else add_odd_tile(p, add, out, l, min(rows, 8), t, sum);
#pragma unroll
            for (int i = 0; i < N; i++)
#pragma unroll
                for (int c = 0; c < 4; c++) to[i][c] = i == local / WK ? to[i][c] + sum[c] : to[i][c];
        }
    }
}

// Biases onto output n of the four rows of `quad`, `rows` of which are there.
DEV void add_bias(const Params& p, float (&v)[4], i32 n, i32 quad, i32 rows, bool biased) {
    if (p.bias)
#pragma unroll
        for (int j = 0; j < 4; j++) v[j] += p.bias[n];
    if (!LORA || !biased) return;
    const i32 slice = slice_of(p, n);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const RowLora& l = ((const RowLora*)(smem + ROW_LORA))[(quad * 4 + min(j, rows - 1)) * 3 + slice];
        if (l.bias) v[j] += l.scale * l.bias[n - slice_start(p, slice)];
    }
}

DEV float activate(float v) {
#if GELU
    return 0.5f * v * (1.0f + tanhf(0.7978845608028654f * (v + 0.044715f * v * v * v)));
#else
    return v / (1.0f + __expf(-v));
#endif
}

DEV void epilogue(const Params& p, const Outputs& own, i32 token0, bool adapted, bool biased) {
    constexpr i32 per = EPILOGUE == 2 ? OWN / 2 : OWN;
    const i32 outputs = EPILOGUE == 2 ? p.N / 2 : p.N;
#pragma unroll 1
    for (i32 i = threadIdx.x; i < per * (TOKENS / 4); i += THREADS) {
        const i32 at = i % per, n = own.first + at, quad = i / per, row0 = token0 + quad * 4;
        const i32 rows = min(p.M - row0, 4);
        if (n >= outputs || rows <= 0) continue;
        float old[4], sum[4], up[4];
        if (EPILOGUE == 1)
#pragma unroll
            for (int j = 0; j < 4; j++) old[j] = j < rows ? ((const float*)p.y)[(i64)(row0 + j) * outputs + n] : 0.0f;
        const i32 output = EPILOGUE == 2 ? (at >> 3) * 16 + (at & 7) : at;  // 8 of gate, the 8 of up with them
        reduced(sum, output, quad, adapted);
        add_bias(p, sum, n, quad, rows, biased);
        if (EPILOGUE == 2) {
            reduced(up, output + 8, quad, adapted);
            add_bias(p, up, n + outputs, quad, rows, biased);
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (j >= rows) break;
            const i64 to = (i64)(row0 + j) * outputs + n;
            if (EPILOGUE == 2) ((u16*)p.y)[to] = float_to_bf16(activate(sum[j]) * up[j]);
            if (EPILOGUE == 0) ((u16*)p.y)[to] = float_to_bf16(sum[j]);
            if (EPILOGUE == 1) ((float*)p.y)[to] = old[j] + sum[j];
            if (EPILOGUE == 3) ((float*)p.y)[to] = sum[j];
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
    Weights w;
    const i32 block = blockIdx.y * gridDim.x + blockIdx.x, workers = min((i32)num_blocks(), p.workers);
    Unit unit;
    const bool works = LORA && block < workers && start_unit(p, block, warp, unit);
    if (EARLY || !works) load_first(p, w, s, tile, kb, mine);
    const Outputs own = own_outputs(p, rank);
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
    if (LORA)
        for (i32 i = threadIdx.x; i < min(TOKENS, p.M - token0) * 6; i += THREADS) cp_async16(smem_addr(smem) + ROW_LORA + i * 16, (const uint4*)(p.rows + (i64)token0 * 3) + i);
    cp_async_commit();
    const u32 base = smem_addr(smem);
#if WGMMA
    const i32 loops = mine, feeds = wr == 0 && (warp & 3) == 0 ? mine : 0;  // stages whose x this warp fetches
#define START_X() start_x(p, base, token0, wk, kb, feeds)
    if ((base & 0xffffff) != SMEM_START) __trap();
    if (threadIdx.x == 0) {
#pragma unroll
        for (int i = 0; i < STAGES * WK; i++) barrier_init(full_barrier(base, 0, i), 1), barrier_init(free_barrier(base, 0, i), WR * 4);
        barrier_init_done();
    }
    __syncthreads();
#else
    const i32 loops = stages, feeds = stages;
    FeedX f(p, token0, begin);
#define START_X() start_x(p, f, base, feeds)
#endif
    grid_wait();
    u32 epoch = 0;
    if (LORA && threadIdx.x == 0) epoch = read_epoch(p);
    START_X();
    if (LORA && threadIdx.x == 0) *(u32*)(smem + EPOCH_AT) = epoch;
    if (works) {
        multiply_units(p, block, workers, warp, unit);
        if (!EARLY) load_first(p, w, s, tile, kb, mine);
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
    u32 phase = 0;
    u32 a[4][4], b[4][4];
#pragma unroll 1
    for (int i = 0; i < loops; i++) {
        const bool more = i + DEPTH < mine;
        const Scales now = s;
        kb = (begin + wk + (i + 1) * WK) * KU, s.from += WK * KU * (KIND == 0 ? 64 : 16);
        if (NF4_KIND && i + 1 < mine) load_scales(p, s, kb);
#pragma unroll
        for (int step = 0; step < X_STEPS; step++) {
            const bool feed = i + (step + STAGES - 1) / X_STEPS < feeds;
#if WGMMA
            if (feed) fetch_x(p, base, token0, wk, slot ? slot - 1 : STAGES - 1, slot ? phase : phase ^ 1, kb - WK * KU, step + STAGES - 1);
            barrier_wait(full_barrier(base, slot, wk), phase);
            const XTile x_tile = x_group + slot * (X_STAGE / 16);
#else
            cp_async_wait<STAGES - 2>();
            __syncthreads();  // all are done with the slot that is filled now
            if (feed) load_x(p, f, base);
            cp_async_commit();
            const XTile x_tile = x_group + slot * X_STAGE;
#endif
            if (WGMMA || i < mine) {
                if (DEPTH == 1 || i % 2 == 0) stage_step<0>(w, now, x_tile, lane, step, more, a, b, part, acc);
                else stage_step<DEPTH - 1>(w, now, x_tile, lane, step, more, a, b, part, acc);
            }
#if WGMMA
            if (lane == 0) barrier_arrive(free_barrier(base, slot, wk));
#endif
            slot = slot == STAGES - 1 ? 0 : slot + 1;
            phase ^= slot == 0;
        }
        w.from += HOP;
    }
    cp_async_wait<0>();
    const u32 passed = LORA && threadIdx.x == 0 ? note_epoch(p) : 0;
    float added[ADDED_TILES][4] = {};
    bool adapted = false, biased = false;
    i32 first_added = 0;
    if (LORA) {
        __syncthreads();  // A x comes where table and ring were
        const i32 tokens = min(TOKENS, p.M - token0);
        const Adding add(p, rank, tokens);
        adapted = add.stride, biased = add.bias, first_added = add.tile(wk);
        if (ADDERS == 1 && adapted) add_adapters(p, add, acc, tile, wk, token0, tokens);
        if (ADDERS > 1 && adapted) add_adapters(p, add, added, tile, wk, token0, tokens);
    }
    if (CLUSTER > 1) {
        if (!APART) cluster_arrive();  // with table, ring and A x
        cluster_wait();                // every block of the cluster has begun, or is done with what lies where sums will
    } else if (!APART) {
        __syncthreads();
    }
    const i32 outputs = wr * 4 + (warp & 3);
    give(acc, rank * WK + wk, outputs, lane, 0, 1);
    if (ADDERS > 1 && adapted) give(added, ADDERS, outputs, lane, first_added, ADDERS);
    if (CLUSTER == 1) __syncthreads();
    else cluster_sync();
    epilogue(p, own, token0, adapted, biased);
    if (LORA && passed == num_blocks()) leave(p);
}
