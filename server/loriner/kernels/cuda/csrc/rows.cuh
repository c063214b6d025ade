// How rows of x come to shared memory.
//
// Part of linear.cu, whose defines and shared memory it uses. Knows no weights.
#pragma once

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
#define X_TOKENS (MAIN_THREADS / (WK * XU * 8))  // rows of x that the thread block copies at a time
#define X_ROUNDS ((TOKENS + X_TOKENS - 1) / X_TOKENS)
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
