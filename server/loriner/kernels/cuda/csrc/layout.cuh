// What linear.cu's defines come to: sizes, and what lies where in shared memory, and when.
//
// Part of linear.cu. tiling.py has the same sums; a static_assert holds them together.
#pragma once
#include "barriers.cuh"
#include "lora.cuh"

#define KU 4  // blocks of 64 inputs in a group's stage
#define GROUPS (WR * WK)
#define WARPS (GROUPS * 4)
#define MAIN_THREADS (WARPS * 32)
#define THREADS (MAIN_THREADS + BESIDE * 32)
#define FIRST (LORA && !BESIDE)  // adapters have units of A x before the main loop
#define ENDING (BESIDE ? BESIDE : WARPS)  // warps that see to A x
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
#define PORTIONS_TAKEN_AT EPOCH_AT  // of each eight rows, by any warps; where some are beside the main ones, the epoch stays in registers
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

#if __CUDA_ARCH_FEAT_SM90_ALL
#define WGMMA 1
#include "wgmma.cuh"
#else
#define WGMMA 0
#endif

static_assert(!RING || (NF4_KIND && WGMMA && DEPTH == 1), "bulk copies bring NF4 to Hopper");
static_assert(!FIRST || UNITS_AT + UNITS <= ROW_LORA, "units end before what stays");
#if BESIDE
static_assert(NT <= 2, "PORTIONS_TAKEN_AT has room for two");
static_assert(MAX(UNIT_SUMS_AT + UNITS, SHRUNK_AT + LEAST_SHRUNK) <= SMEM, "everything has room");
#else
static_assert(CONTROL_END <= SMEM && SUMS_AT + SUMS <= SMEM && SHRUNK_BYTES >= LEAST_SHRUNK, "everything has room");
#endif

extern __shared__ __align__(1024) u8 smem[];
