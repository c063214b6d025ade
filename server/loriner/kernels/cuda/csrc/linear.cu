// y = x W^T (+ bias) (+ scale B (A x)) for up to NT * 8 rows of x; W is NF4 in blocks of 64, or bf16.
//
// Weights are the A operand of the matrix instruction (outputs x inputs), rows of x the B operand. Weights are
// stored in the order in which lanes want them (see packing.py); how they come stands in weights.cuh. A byte
// becomes a bf16 pair through a table of 256 values with a copy in each of the 32 banks: one PRMT, which puts the
// byte into the address, and one conflict-free load for two weights. Sums are kept in fp32, in units of a block's
// scale, and changed from one block's unit to the next's: so the matrix unit adds onto them itself, and no registers
// hold a block's sum apart. Rows of x pass through a ring in shared memory, swizzled by 128 bytes, which all warps
// share. On sm_90a four warps multiply 64 outputs by wgmma; elsewhere each does 16 by mma.sync.
//
// A thread block computes ROWS outputs over 1/CLUSTER of the inputs; WK groups of four warps split those
// further; the blocks of a cluster add their sums through each other's shared memory in a fixed order. So a
// row's result depends neither on the other rows nor on NT.
//
// What it does for adapters stands in adapters.cuh, units.cuh and expand.cuh.
//
// Defines: NT, WR x WK groups (each has 64 outputs), STAGES (of the ring of x, XU blocks of each group), DEPTH
// (stages of weights in registers), RING (of weights in shared memory; 0: they come to registers), CLUSTER, APART
// (sums have room beside table and rings), KIND (0 NF4 with f32 scales, 1 NF4 with nested scales, 2 bf16), EPILOGUE
// (0 bf16 store, 1 add to f32, 2 gated bf16 store, 3 f32 store), GELU, LORA, MIN_BLOCKS, REGISTERS (of a thread at
// most; 0: what MIN_BLOCKS leaves), BESIDE (warps that see to adapters while the others multiply), STEPS (of 32
// inputs in a unit of A x, at most), BUFFERS (for A of such units), SMEM (bytes of shared memory).
#include "barriers.cuh"
#include "lora.cuh"

#define LEAST_SCALE 1e-20f  // what a scale of 0 becomes; to others it adds nothing
#define AHEAD 4  // steps of 32 inputs of A x that a warp has in flight
#define KU 4  // blocks of 64 inputs in a group's stage
#define GROUPS (WR * WK)
#define WARPS (GROUPS * 4)
#define MAIN_THREADS (WARPS * 32)
#define THREADS (MAIN_THREADS + BESIDE * 32)
#define FIRST (LORA && !BESIDE)  // adapters have units of A x before the main loop
#define ENDING (BESIDE ? BESIDE : WARPS)  // warps that see to adapters
#define SHARES 16                    // of a part of A x, each summed apart
#define PIECES (BESIDE ? 2 : 1)      // that a part is cut into, a unit each
#define UNIT_SHARES (SHARES / PIECES)
#define ROWS (WR * 64)
#define TOKENS (NT * 8)
#define NF4_KIND (KIND != 2)
#define GATED (EPILOGUE == 2)
#define WORDS (NF4_KIND ? 1 : 4)  // 16-byte words of a lane in a block
#define BLOCK_BYTES (WORDS * 512)
#define HOP (WK * KU * BLOCK_BYTES)  // from a group's stage to its next
#define WINDOW (NF4_KIND && DEPTH == 1 ? 2 : KU)  // blocks of weights in registers in each stage
#define SCALES_BYTES (KIND == 0 ? 64 : 16)  // of a block
#define SCALES_HOP (WK * KU * SCALES_BYTES)  // from a stage's scales to those of the next
#define WEIGHTS_SLOT (KU * BLOCK_BYTES)
#define WEIGHTS_RING (RING * WARPS * WEIGHTS_SLOT)
#define TABLE (NF4_KIND ? 65536 : 0)  // 256 rows: 32 copies of a bf16 pair, then 32 of a nested scale's value
#define X_TILE (TOKENS * 128)         // rows of x in one block
#define X_STAGE (WK * XU * X_TILE)
#define X_STEPS (KU / XU)
#define ENTRIES (KIND == 1 ? 512 : 256)  // of the table before it is copied to every bank
#define OWN (ROWS / CLUSTER)  // outputs that this thread block finishes
#define SUMS (CLUSTER * WK * OWN * TOKENS * 4)
#define WEIGHTS_AT (TABLE + STAGES * X_STAGE)
#define FRONT (WEIGHTS_AT + WEIGHTS_RING)
#define LEAST_SHRUNK 24576  // eight rows of x of the most ranks (768)
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define SUMS_AT (APART ? MAX(FRONT, LEAST_SHRUNK) : 0)
#define UNITS_AT (WGMMA ? TABLE : 0)         // units of A x, before x comes in; not on Hopper, before the table, too
#define A_STRIDE ((STEPS | 1) * 64)          // bytes of a unit's rank: neighbours lie half of the banks apart
#define A_BYTES (16 * A_STRIDE)
#define UNITS (UNIT_SHARES * 512 + BUFFERS * A_BYTES)
#define FRONT_END (APART ? SUMS_AT + SUMS : MAX(FRONT, SUMS + LEAST_SHRUNK))
#define ROW_LORA (FIRST ? MAX(FRONT_END, UNITS_AT + UNITS) : FRONT_END)
#define EPOCH_AT (ROW_LORA + TOKENS * 96)
#define SUMS_BARRIER_AT (EPOCH_AT + 8)  // counts sums of other blocks of the cluster
#define BARRIERS_AT (EPOCH_AT + 16)  // a full and a free one of each group's tile of x in each stage
#define WEIGHTS_BARRIERS_AT (BARRIERS_AT + 256)  // of each stage of each warp
#define CONTROL_END (WEIGHTS_BARRIERS_AT + RING * WARPS * 8)
static_assert(STAGES * WK <= 16 && STAGES <= WR * 4, "barriers have room, and a warp each that makes them");
#if BESIDE
#define UNIT_SUMS_AT CONTROL_END
#define ADDED_AT UNIT_SUMS_AT  // when the units are done: what adapters add to this block's outputs
#define ADDED (OWN * TOKENS * 4)
#define SHRUNK_AT (ADDED_AT + ADDED)  // and A x of rows of x
#define SHRUNK_BYTES MAX(UNITS - ADDED, LEAST_SHRUNK)
#else
#define UNIT_SUMS_AT UNITS_AT
#define SHRUNK_AT (APART ? 0 : SUMS)  // A x of rows of x, when table and ring have done their work
#define SHRUNK_BYTES (APART ? SUMS_AT : FRONT_END - SUMS)
#endif
#define A_AT (UNIT_SUMS_AT + UNIT_SHARES * 512)
#define X_TOKENS (MAIN_THREADS / (WK * XU * 8))  // rows of x that the thread block copies at a time
#define X_ROUNDS ((TOKENS + X_TOKENS - 1) / X_TOKENS)

#if __CUDA_ARCH_FEAT_SM90_ALL
#define WGMMA 1
#include "wgmma.cuh"
#else
#define WGMMA 0
#endif

static_assert(!RING || (NF4_KIND && WGMMA && DEPTH == 1), "bulk copies bring NF4 to Hopper");
static_assert(!FIRST || UNITS_AT + UNITS <= ROW_LORA, "units end before what stays");
#if BESIDE
static_assert(MAX(UNIT_SUMS_AT + UNITS, SHRUNK_AT + LEAST_SHRUNK) <= SMEM, "everything has room");
#else
static_assert(CONTROL_END <= SMEM && SUMS_AT + SUMS <= SMEM && SHRUNK_BYTES >= LEAST_SHRUNK, "everything has room");
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
    u64* shrunk;           // [pieces, M, shrunk_stride]: A x over each piece of the inputs, f32 below the epoch
    u32* gate;             // this launch's epoch, and how many of its blocks know it
    float code[16];        // of NF4, and behind it
    float map[256];        // of nested scales
    i64 shrunk_size;
    i32 M, N, K, KB, nested_shift, max_tiles, shrunk_stride, parts, workers, helpers, rounds, split0, split1;  // KB: padded to KU
};

// What the end of a thread block reads of it.
struct End {
    const float* bias;
    void* y;
    const u64* shrunk;
    i32 M, N, shrunk_stride, parts, split0, split1;

    DEV End(const Params& p) : bias(p.bias), y(p.y), shrunk(p.shrunk), M(p.M), N(p.N), shrunk_stride(p.shrunk_stride), parts(p.parts), split0(p.split0), split1(p.split1) {}
};

// Which block of ROWS outputs this is. Blocks ahead have none.
DEV i32 outputs_block(const Params& p, i32 block) { return block - (LORA ? p.helpers : 0); }

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

#include "weights.cuh"

#if WGMMA
typedef u64 XTile;  // a descriptor
#else
typedef u32 XTile;  // an address
#endif

// c += A B over one block: a has the four k16 fragments, x_tile [TOKENS, 64] is in shared memory. Until
// `finish_multiply` c and a belong to the matrix unit.
DEV void start_multiply(float (&c)[NT][4], const u32 (&a)[4][4], XTile x_tile, i32 u, i32 lane) {
#if WGMMA
    wgmma_fence(c);
#pragma unroll
    for (int k = 0; k < 4; k++) wgmma<NT>(c, a[k], x_tile + (u * (X_TILE / 16) + k * 2));
    wgmma_commit();
#else
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int n = 0; n < NT; n++) {
            u32 b0, b1, b2, b3;
            ldmatrix_x4(b0, b1, b2, b3, x_tile + u * X_TILE + n * 1024 + (lane & 7) * 128 + (((half * 4 + (lane >> 3)) ^ (lane & 7)) << 4));
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

// What a warp multiplies, on its way.
struct Work {
    Weights w;
    Scales s;  // of the next stage
    Units z;
    u32 a[4][4], b[4][4];  // blocks that have been decoded, in turns
    float acc[NT][4];
};

// A stage of a warp's.
struct Turn {
#if RING
    i32 index, mine;  // of so many
    i32 kb;           // its first block
    Place here, next;
#else
    i32 depth;  // of its weights, in registers
    bool more;  // there is one to come in their place
#endif
};

// Blocks U.. to END of a stage: while the matrix unit works on one, the next is decoded.
template <int D, int U, int END> DEV void blocks(const Params& p, Work& k, const Turn& turn, XTile x_tile, i32 lane, u32 (&now)[4][4], u32 (&next)[4][4]) {
    if constexpr (U < END) {
        if (NF4_KIND) scale_sums(k.acc, k.z.change);
        start_multiply(k.acc, now, x_tile, U % XU, lane);
#if RING
        decode(next, k.w.word[(U + 1) % 2], lane);
        if (U == 2 && turn.index + RING < turn.mine) fetch_weights(k.w, turn.here);
        if (U == 2 && turn.index + 1 < turn.mine) barrier_wait(turn.next.barrier, turn.next.parity);
        read_word(k.w, U % 2, U < 2 ? turn.here.at + (U + 2) * BLOCK_BYTES : turn.next.at + (U - 2) * BLOCK_BYTES, lane);
        k.z.change = of_outputs<(U + 1) % KU>(k.z.changes[(U + 1) % 2], lane);
        if constexpr (U < 3) next_units<U>(k.z, k.s, lane);
        if (U == 1 && turn.index + 2 < turn.mine) k.s.at += SCALES_HOP, load_scales(p, k.s, turn.kb + 2 * (WK * KU));
#else
        if constexpr (U + 1 < KU) {
            decode(next, k.w.word[D][(U + 1) % WINDOW], lane);
            refill<D, U + 1>(k.w, turn.more);
        }
        if (NF4_KIND) {
            k.z.change = of_outputs<(U + 1) % KU>(k.z.changes[(U + 1) % 2], lane);
            if (U + 2 == KU) all_next_units(k.z, k.s, lane);
        }
#endif
        finish_multiply(k.acc);
        blocks<D, U + 1, END>(p, k, turn, x_tile, lane, next, now);
    }
}

// The blocks of a stage whose x has come in at `step`.
template <int D, int STEP = 0> DEV void stage(const Params& p, Work& k, const Turn& turn, XTile x_tile, i32 lane, i32 step) {
    if constexpr (STEP + 1 < X_STEPS)
        if (step != STEP) return stage<D, STEP + 1>(p, k, turn, x_tile, lane, step);
#if !RING
    if constexpr (D + 1 < DEPTH)
        if (turn.depth != D) return stage<D + 1, STEP>(p, k, turn, x_tile, lane, step);
    if (STEP == 0) {
        decode(k.a, k.w.word[D][0], lane);
        refill<D, 0>(k.w, turn.more);
    }
#endif
    constexpr bool odd = STEP * XU % 2;
    blocks<D, STEP * XU, STEP * XU + XU>(p, k, turn, x_tile, lane, odd ? k.b : k.a, odd ? k.a : k.b);
}

// Where the sums of lane (g, t) lie among those of 16 outputs for 8 rows of x: output g and g + 8 for rows 2t and 2t + 1, as the
// matrix unit leaves them. Neither lanes in order nor outputs in order meet a bank twice.
DEV i32 sums_at(i32 g, i32 t) { return t * 128 + (g ^ t * 2) * 16; }

// Ready for the sums that other blocks of the cluster give to this one. They may come when all its threads have arrived at the cluster's barrier.
DEV void expect_sums() {
    if (CLUSTER == 1 || threadIdx.x) return;
    const u32 barrier = smem_addr(smem) + SUMS_BARRIER_AT;
    barrier_init(barrier, 1), barrier_init_done();
    barrier_expect(barrier, (CLUSTER - 1) * WK * OWN * TOKENS * 4);
}

// Give a warp's sums to the block of the cluster that finishes its 16 outputs: [source][tile of outputs][NT].
DEV void give(const float (&acc)[NT][4], i32 rank, i32 source, i32 tile, i32 lane) {
    const i32 target = tile / (OWN / 16);
    const u32 to = smem_addr(smem) + SUMS_AT + (source * (OWN / 16) + tile % (OWN / 16)) * (NT * 512) + sums_at(lane >> 2, lane & 3);
    if (CLUSTER > 1 && target != rank) {
        const u32 there = cluster_map(to, target), barrier = cluster_map(smem_addr(smem) + SUMS_BARRIER_AT, target);
#pragma unroll
        for (int n = 0; n < NT; n++) store_counted(there + n * 512, acc[n], barrier);
        return;
    }
#pragma unroll
    for (int n = 0; n < NT; n++) asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to + n * 512), "f"(acc[n][0]), "f"(acc[n][1]), "f"(acc[n][2]), "f"(acc[n][3]) : "memory");
}

// This lane's sums of a tile of 16 outputs for eight rows of x: those of all groups and blocks, in a fixed order.
DEV void reduced(float (&sum)[4], i32 tile, i32 oct) {
    const u8* at = smem + SUMS_AT + (tile * NT + oct) * 512 + sums_at((threadIdx.x & 31) >> 2, threadIdx.x & 3);
#pragma unroll
    for (int i = 0; i < CLUSTER * WK; i++) {
        const float4 v = *(const float4*)(at + i * (OWN * TOKENS * 4));
        if (i == 0) sum[0] = v.x, sum[1] = v.y, sum[2] = v.z, sum[3] = v.w;
        else sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
    }
}

#include "adapters.cuh"

DEV float activate(float v) { return GELU ? gelu(v) : silu(v); }

// A warp finishes 16 outputs for eight rows of x at a time. Lane (g, t) has outputs g and g + 8 (of gated ones the gate and the up of
// output g) for rows 2t and 2t + 1.
#if FIRST && WGMMA
__device__ __noinline__  // else its registers cost the main loop instructions: up to 7 % of them
#else
DEV
#endif
void epilogue(const End p, const Outputs own, const Passes passes, i32 token0, i32 warp) {
    const i32 lane = threadIdx.x & 31, outputs = GATED ? p.N / 2 : p.N;
#pragma unroll 1
    for (i32 oct0 = 0; oct0 < passes.all; oct0 += passes.octs) {
        const Turns turns(passes, oct0, WARPS, warp);
#if FIRST
        Adding adding(p, own, turns, oct0, passes.stride);
        if (oct0) __syncthreads();
        if (passes.stride) gather_shrunk(p, own, token0, oct0 * 8, passes.octs * 8, passes.stride, warp, *(const u32*)(smem + EPOCH_AT));
#endif
        __syncthreads();
        if (CLUSTER > 1 && oct0 == 0) barrier_wait_for_others(smem_addr(smem) + SUMS_BARRIER_AT);
#pragma unroll 1
        for (i32 oct = turns.oct; oct < turns.end; oct += turns.octs) {
            const i32 row0 = token0 + oct * 8, rows = min(p.M - row0, 8);
#if FIRST
            adding.begin(p, own, turns, oct0, oct);
#endif
#pragma unroll 1
            for (i32 tile = turns.tile; tile < OWN / 16; tile += turns.tiles) {
                const i32 n = own.first + tile * TILE_OUTPUTS + (lane >> 2), t = (lane & 3) * 2;
                const i64 to = (i64)(row0 + t) * outputs + n;
                float old[4], sum[4], add[4] = {};
                if (EPILOGUE == 1)
#pragma unroll
                    for (int j = 0; j < 4; j++) old[j] = t + (j & 1) < rows && n + j / 2 * 8 < outputs ? ((const float*)p.y)[to + (j & 1) * outputs + j / 2 * 8] : 0.0f;
#if FIRST
                if (passes.stride) adding.add(p, own, add, tile, tile + turns.tiles);
#endif
                reduced(sum, tile, oct);
                if (p.bias)
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const i32 at = GATED ? n + j / 2 * outputs : n + j / 2 * 8;
                        if (at < p.N) sum[j] += p.bias[at];
                    }
#if BESIDE
                if (passes.stride) {
                    const float4 a = *added(tile, oct);
                    add[0] = a.x, add[1] = a.y, add[2] = a.z, add[3] = a.w;
                }
#endif
                if (LORA && passes.stride)
#pragma unroll
                    for (int j = 0; j < 4; j++) sum[j] = __fadd_rn(sum[j], add[j]);
#pragma unroll
                for (int j = 0; j < (GATED ? 2 : 4); j++) {
                    if (t + (j & 1) >= rows || n + j / 2 * 8 >= outputs) continue;
                    const i64 at = to + (j & 1) * outputs + j / 2 * 8;
                    if (GATED) ((u16*)p.y)[at] = float_to_bf16(activate(sum[j]) * sum[j + 2]);
                    if (EPILOGUE == 0) ((u16*)p.y)[at] = float_to_bf16(sum[j]);
                    if (EPILOGUE == 1) ((float*)p.y)[at] = old[j] + sum[j];
                    if (EPILOGUE == 3) ((float*)p.y)[at] = sum[j];
                }
            }
        }
    }
}

// The table, before it is copied to every bank: pairs of codes, then values of nested scales.
DEV void fill_table(const Params& p) {
    if (!NF4_KIND) return;
#pragma unroll
    for (int i = 0; i < (ENTRIES + MAIN_THREADS - 1) / MAIN_THREADS; i++) {
        const i32 e = threadIdx.x + i * MAIN_THREADS;
        if (e < ENTRIES) {
            const u32 v = e < 256 ? pack_bf16(p.code[e & 15], p.code[e >> 4 & 15]) : __float_as_uint(p.map[e & 255]);
#pragma unroll
            for (int j = 0; j < 8; j++)  // neighbours start at different banks
                *(uint4*)(smem + (e & 255) * 256 + (e >> 8) * 128 + ((e + j) & 7) * 16) = make_uint4(v, v, v, v);
        }
    }
}

// What the end needs to know is read again, that all registers are the main loop's: else wgmma may be made to wait.
#define READ_AGAIN(name, from) i32 name; asm volatile("mov.u32 %0, %%" from ";" : "=r"(name))

#if REGISTERS
#define BOUNDS __maxnreg__(REGISTERS)
#else
#define BOUNDS __launch_bounds__(THREADS, MIN_BLOCKS)
#endif

extern "C" __global__ void BOUNDS linear(const __grid_constant__ Params p) {
    grid_launch();
    const i32 rank = CLUSTER == 1 ? 0 : cluster_rank();
    const i32 lane = threadIdx.x & 31, warp = __shfl_sync(0xffffffffu, (i32)threadIdx.x >> 5, 0), wk = (warp >> 2) % WK, wr = (warp >> 2) / WK;
    const i32 tile = outputs_block(p, blockIdx.z) * (ROWS / 16) + wr * 4 + (warp & 3), token0 = blockIdx.y * TOKENS;
#if BESIDE
    if (warp >= WARPS) return beside(p, own_outputs(p, blockIdx.z, rank), token0, warp - WARPS);
    if (is_helper(p)) return;
#endif
    const i32 units = p.KB / KU, begin = units * rank / CLUSTER, end = units * (rank + 1) / CLUSTER;
    const i32 mine = max(0, (end - begin - wk + WK - 1) / WK);  // stages of this group
    const i32 stages = (end - begin + WK - 1) / WK;             // of the thread block
    i32 kb = (begin + wk) * KU;
    Work k;
#if FIRST
    const i32 all_units = count_units(p);
    if (WGMMA) fill_table(p);  // in the meantime
    Share of_adapters(p, all_units, warp);
    const bool works = of_adapters.any() || is_helper(p);
#else
    const bool works = false;
#endif
    if (FIRST) load_rows(p, token0, threadIdx.x, THREADS);
    if (!works) load_first(p, k.w, k.s, tile, kb, mine);
    if (WGMMA ? !FIRST : !works) fill_table(p);
    if (!FIRST) cp_async_commit();  // of nothing: without it sm_86 has a register too few
    expect_sums();
    if (CLUSTER > 1 && APART && !FIRST) cluster_arrive_relaxed();
    const u32 base = smem_addr(smem);
#if WGMMA
    const i32 loops = mine, feeds = wr == 0 && (warp & 3) == 0 ? mine : 0;  // stages whose x this warp fetches
#define START_X() start_x(p, base, token0, wk, kb, feeds)
    if ((base & 0xffffff) != SMEM_START) __trap();
    if (warp < STAGES * WK && elected()) {  // not a lane each: the hardware takes one address of a warp at a time
        barrier_init(full_barrier(base, 0, warp), 1), barrier_init(free_barrier(base, 0, warp), WR * 4);
        barrier_init_done();
    }
    main_sync();
    if (!works) load_more(k.w, mine);
#else
    const i32 loops = stages, feeds = stages;
    FeedX f(p, token0, begin);
#define START_X() start_x(p, f, base, feeds)
#endif
    grid_wait();
    u32 epoch = 0;
    if (FIRST && threadIdx.x == 0) epoch = read_epoch(p);
    if (!works) START_X();
    if (FIRST && threadIdx.x == 0) *(u32*)(smem + EPOCH_AT) = epoch;
#if FIRST
    if (works) {
        const u32 epoch = read_epoch(p);  // out of shared memory it costs the main loop its uniform registers
        of_adapters.multiply(p, threadIdx.x, epoch);
        if (is_helper(p)) {
            __syncthreads();
            if (threadIdx.x == 0 && note_epoch(p) == num_blocks()) leave(p, epoch);
            return;
        }
        if (!RING) load_first(p, k.w, k.s, tile, kb, mine);
        cp_async_wait<0>();
#if WGMMA
        async_after_generic();
        __syncthreads();
        if (RING) load_first(p, k.w, k.s, tile, kb, mine), load_more(k.w, mine);
#else
        __syncthreads();
        fill_table(p);
        __syncthreads();
#endif
        START_X();
    }
    if (CLUSTER > 1 && APART) cluster_arrive_relaxed();  // sums may come where units were
#endif
#pragma unroll
    for (int i = 0; i < NT * 4; i++) (&k.acc[0][0])[i] = 0.0f;
    k.z = {};
#if !WGMMA
    if (KIND == 1) __syncthreads();  // all warps have made their part of the table
#endif
    if (NF4_KIND && mine > 0) {
        all_next_units(k.z, k.s, lane);
        k.z.change = of_outputs<0>(k.z.changes[0], lane);
        if (RING && mine > 1) k.s.at += SCALES_HOP, load_scales(p, k.s, kb + WK * KU);
    }
#if WGMMA
    const XTile x_group = wgmma_descriptor((WK == 1 ? SMEM_START : base) + TABLE + wk * XU * X_TILE);
#else
    const XTile x_group = base + TABLE + wk * XU * X_TILE;
#endif
    i32 slot = 0;
    u32 phase = 0;
#if RING
    if (mine > 0) {
        const Place first = place_of(warp, 0);
        barrier_wait(first.barrier, 0);
        read_word(k.w, 0, first.at, lane), read_word(k.w, 1, first.at + BLOCK_BYTES, lane);
        decode(k.a, k.w.word[0], lane);
    }
#endif
#pragma unroll 1
    for (int i = 0; i < loops; i++) {
        kb = (begin + wk + (i + 1) * WK) * KU;
#if RING
        const Turn turn{i, mine, kb - WK * KU, place_of(warp, i), place_of(warp, i + 1)};
#else
        const Turn turn{i % DEPTH, i + DEPTH < mine};
        k.s.at += SCALES_HOP;
        if (NF4_KIND && i + 1 < mine) load_scales(p, k.s, kb);
#endif
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
            if (WGMMA || i < mine) stage<0>(p, k, turn, x_tile, lane, step);
#if WGMMA
            if (lane == 0) barrier_arrive(free_barrier(base, slot, wk));
#endif
            slot = slot == STAGES - 1 ? 0 : slot + 1;
            phase ^= slot == 0;
        }
#if !RING
        k.w.from += HOP;
#endif
    }
    if (NF4_KIND && mine > 0) scale_sums(k.acc, k.z.change), scale_sums(k.acc, of_outputs<0>(k.z.first, lane));
    cp_async_wait<0>();
    if (FIRST || (CLUSTER == 1 && !APART)) main_sync();  // sums, or A x, come where table and ring were; what rows' adapters are has come
    if (CLUSTER > 1) {
        if (!APART) cluster_arrive_relaxed();
        cluster_wait();  // every block has begun, and is done with its table and ring if sums come there
    }
#if BESIDE
    wait_for_rows();
#endif
    u32 known = FIRST && threadIdx.x == 0 && !is_last(*(const u32*)(smem + EPOCH_AT)) ? note_epoch(p) : 0;
    READ_AGAIN(thread, "tid.x");
    READ_AGAIN(block_y, "ctaid.y");
    READ_AGAIN(block_z, "ctaid.z");
    const i32 end_warp = thread >> 5, end_token0 = block_y * TOKENS, end_rank = CLUSTER == 1 ? 0 : cluster_rank();
    give(k.acc, end_rank, end_rank * WK + (end_warp >> 2) % WK, (end_warp >> 2) / WK * 4 + (end_warp & 3), thread & 31);
    const Outputs own = own_outputs(p, block_z, end_rank);
    epilogue(p, own, Passes(own, p, end_token0), end_token0, end_warp);
#if FIRST
    if (threadIdx.x == 0) {
        const u32 epoch = *(const u32*)(smem + EPOCH_AT);
        if (is_last(epoch)) known = note_epoch(p);
        if (known == num_blocks()) leave(p, epoch);
    }
#endif
}
