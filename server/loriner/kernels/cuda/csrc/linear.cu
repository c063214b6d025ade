// y = x W^T (+ bias) (+ scale B (A x)) for up to NT * 8 rows of x; W is NF4 in blocks of 64, or bf16.
//
// Weights are the A operand of the matrix instruction (outputs x inputs), rows of x the B operand. Weights are
// stored in the order in which lanes want them (see packing.py). A byte becomes a bf16 pair through a table of 256
// values, in a unit in which bf16 holds them well, with a copy in each of the 32 banks: one PRMT, which puts the byte
// into the address, and one conflict-free load for two weights. Sums are kept in fp32, in units of a block's scale, and
// changed from one block's unit to the next's: so the matrix unit adds onto them itself, and no registers hold a block's
// sum apart. Rows of x pass through a ring in shared memory, swizzled by 128 bytes, which all warps share. On sm_90a four
// warps multiply 64 outputs by wgmma; elsewhere each does 16 by mma.sync.
//
// A thread block computes ROWS outputs over 1/CLUSTER of the inputs; WK groups of four warps split those
// further; the blocks of a cluster add their sums through each other's shared memory in a fixed order. So a
// row's result depends neither on the other rows nor on NT.
//
// How rows and weights come, and how they are multiplied, stands in rows.cuh, weights.cuh and products.cuh; how sums
// become outputs in epilogue.cuh; what is done for adapters in adapters.cuh, units.cuh and expand.cuh; what lies where
// in layout.cuh.
//
// Defines: NT, WR x WK groups (each has 64 outputs), STAGES (of the ring of x, XU blocks of each group), DEPTH
// (stages of weights in registers), RING (of weights in shared memory; 0: they come to registers), CLUSTER, APART
// (sums have room beside table and rings), KIND (0 NF4 with f32 scales, 1 NF4 with nested scales, 2 bf16), EPILOGUE
// (0 bf16 store, 1 add to f32, 2 gated bf16 store, 3 f32 store), GELU, LORA, MIN_BLOCKS, REGISTERS (of a thread at
// most; 0: what MIN_BLOCKS leaves), BESIDE (warps that see to adapters while the others multiply), STEPS (of 32
// inputs in a unit of A x, at most), BUFFERS (for A of such units), SMEM (bytes of shared memory).
#include "layout.cuh"

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
    float code[16];        // of NF4 times CODE_UNIT (params.py), and behind it
    float map[256];        // of nested scales
    float sum_unit;        // what sums are multiplied by for that
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

#include "rows.cuh"
#include "weights.cuh"
#include "products.cuh"

#include "epilogue.cuh"

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
    if (NF4_KIND && mine > 0) scale_sums(k.acc, k.z.change), scale_sums(k.acc, of_outputs<0>(p.sum_unit * k.z.first, lane));
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
