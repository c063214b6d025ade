// Logits -> token ids: bias, temperature, min_p, top_k, top_p, one draw, log-probabilities.
//
// A row belongs to a cluster of blocks (one block before sm_90), and its ids are cut into SEGMENTS of
// `seg`, one for each warp, in order. Probabilities are integers, 2^MASS_BITS at the row's best token:
// integer sums do not depend on their order, so neither the split, nor atomics, nor a neighbour can
// change a row's token. What the filters keep is a prefix of the ids sorted by (value descending, id
// ascending); its end, a `Cut`, is found by histograms over the ordered bits of the floats, the range
// ever narrower. The token is where one uniform number lands in the kept masses, in order of ids.
#include "common.cuh"

#ifndef CLUSTER
#define CLUSTER 8  // blocks a row; 1 before sm_90
#endif
#define STAGED (CLUSTER > 1)  // a block's part of the row stays in its shared memory
#define THREADS 384
#define WARPS (THREADS / 32)
#define SEGMENTS (CLUSTER * WARPS)
#define BUCKETS 256
#define BUCKET_BITS 8
#define MASS_BITS 44  // of a vocabulary of 2^18 tokens the masses sum below 2^63
#define MAX_TOP 20
#define FIXED_SMEM 4096
#define EVERY 0x7fffffff
#define FULL 0xffffffffu
#define NEG_INF __int_as_float(0xff800000)
#define KEY_INF 0xff800000u
#define KEY_NEG_INF 0x007fffffu
#define LOG2E 1.4426950408889634f
#define REACH 11.0f  // nats below the best that the first histogram looks at: 2^16 in probability

// One row's parameters; sampling.py: ROW.
struct Row {
    u64 seed;
    double top_p;      // 1: off
    float scale;       // log2(e) / temperature; 0: greedy
    float gap;         // temperature * ln(min_p); -inf: off
    i32 top_k;         // 0: off
    i32 position;      // output tokens so far
    i32 first_entry, num_entries;
    i32 logprobs;      // -1: none; k: the chosen token's and the k best
    i32 live;          // 0: a row of padding
};

// Added to one token's logit; -inf bars it.
struct Entry {
    i32 id;
    float add;
};

struct Shared {
    u32 count[BUCKETS], mass_lo[BUCKETS], mass_hi[BUCKETS];
    Row row;
    u64 part[WARPS];
    u64 whole[2];
    u64 segment_mass[WARPS];
    u64 top[MAX_TOP];
    u64 hit_before, left;
    i32 segment_ties[WARPS];
    i32 hit, hit_count, found, room, num_top;
    float raw_best, log_z;
};
static_assert(sizeof(Shared) <= FIXED_SMEM, "the fixed part of shared memory");

// A warp's segment of a row. `n` ids from p; a padded one may be read up to a multiple of 4.
struct View {
    const float* p;
    i32 n;
    bool aligned;
};

DEV View view_of(const float* logits, i32 stride, i32 row, i32 first, i32 n) {
    asm volatile("" : "+r"(row));  // made anew rather than kept in registers
    const float* p = logits + (i64)row * stride + first;
    return View{p, n, ((u64)p & 15) == 0};
}

// Kept: x > value, and of those equal to it the first `ties` by id.
struct Cut {
    float value;
    i32 ties;
};

// The largest of a thread's values, and where its group of four begins in the segment.
struct Best {
    float value;
    i32 group;
};

DEV float max_nan(float a, float b) {
    float m;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(a), "f"(b));
    return m;
}
DEV u64 shift_right(u64 v, u32 by) {  // 0 from 64 on
    asm("shr.u64 %0, %0, %1;" : "+l"(v) : "r"(by));
    return v;
}
DEV u32 block_rank() { return CLUSTER > 1 ? blockIdx.x : 0; }
DEV void row_sync() {
#if CLUSTER > 1
    __syncwarp();  // the barrier is an aligned one
    cluster_sync();
#else
    __syncthreads();
#endif
}
// What stands at the same place in the shared memory of block `rank` of the row.
template <typename T> DEV T peer(const T* p, u32 rank) {
#if CLUSTER > 1
    T v;
    const u32 from = cluster_map(smem_addr(p), rank);
    if constexpr (sizeof(T) == 8) asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(v) : "r"(from) : "memory");
    else asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(v) : "r"(from) : "memory");
    return v;
#else
    return *(const volatile T*)p;
#endif
}

// Floats in their order, -0 equal to 0.
DEV u32 key_of(float x) {
    u32 b = __float_as_uint(x + 0.0f);
    return b ^ ((u32)((i32)b >> 31) | 0x80000000u);
}
DEV float of_key(u32 k) { return __uint_as_float(k & 0x80000000u ? k ^ 0x80000000u : ~k); }

// exp2((x - m) * scale) in units of 2^-MASS_BITS; x <= m.
DEV u64 mass_of(float x, float m, float scale) {
    u32 b = __float_as_uint(exp2_fast((x - m) * scale));
    return shift_right((u64)((b & 0x7fffffu) | 0x800000u) << (MASS_BITS - 23), 127 - (b >> 23));
}

DEV u64 warp_max64(u64 v) {
#pragma unroll
    for (int i = 16; i; i >>= 1) {
        u64 other = __shfl_xor_sync(FULL, v, i);
        v = other > v ? other : v;
    }
    return v;
}
DEV u64 warp_sum64(u64 v) {
#pragma unroll
    for (int i = 16; i; i >>= 1) v += __shfl_xor_sync(FULL, v, i);
    return v;
}
// Inclusive.
template <typename T> DEV T warp_scan(T v, i32 lane) {
#pragma unroll
    for (int i = 1; i < 32; i <<= 1) {
        T other = __shfl_up_sync(FULL, v, i);
        if (lane >= i) v += other;
    }
    return v;
}

// Over the whole row, to every thread. `turn` alternates, so that a slow peer still reads the last one.
template <bool MAX> DEV u64 row_reduce(Shared& s, u64 v, u32& turn) {
    const i32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    v = MAX ? warp_max64(v) : warp_sum64(v);
    if (lane == 0) s.part[warp] = v;
    __syncthreads();
    if (warp == 0) {
        v = lane < WARPS ? s.part[lane] : 0;
        v = MAX ? warp_max64(v) : warp_sum64(v);
        if (lane == 0) s.whole[turn] = v;
    }
    row_sync();
    v = lane < CLUSTER ? peer(&s.whole[turn], lane) : 0;
    turn ^= 1;
    return MAX ? warp_max64(v) : warp_sum64(v);
}

// The four from i on; -inf behind the end.
DEV float4 four(const View& v, i32 i) {
    if (v.aligned && i + 4 <= v.n) return *(const float4*)(v.p + i);
    float4 f;
    f.x = i < v.n ? v.p[i] : NEG_INF;
    f.y = i + 1 < v.n ? v.p[i + 1] : NEG_INF;
    f.z = i + 2 < v.n ? v.p[i + 2] : NEG_INF;
    f.w = i + 3 < v.n ? v.p[i + 3] : NEG_INF;
    return f;
}
DEV float at(const float4& v, int j) { return j == 0 ? v.x : j == 1 ? v.y : j == 2 ? v.z : v.w; }
DEV float largest(const float4& v) { return fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w)); }

// Groups come in order, so the first of equals stays. A NaN beats all.
DEV void track(Best& best, const float4& v, i32 i) {
    float m = max_nan(max_nan(v.x, v.y), max_nan(v.z, v.w));
    if (m > best.value || m != m) best.value = m, best.group = i;
}
// Ordered by value, then the lower group of four.
DEV u64 packed(const Best& best, i32 first) {
    u32 key = best.value != best.value ? FULL : key_of(best.value);
    return (u64)key << 32 | ~((u32)(first + best.group) >> 2);
}
DEV bool finite_best(u64 top) {
    u32 key = (u32)(top >> 32);
    return key > KEY_NEG_INF && key < KEY_INF;
}

// Reads the logits once: their best, and where wanted a copy.
template <bool STORE> DEV Best load(const View& raw, float* home, i32 lane) {
    const int DEPTH = 4;  // loads under way
    Best best{NEG_INF, 0};
#pragma unroll 1
    for (i32 base = lane * 4; base < raw.n; base += DEPTH * 128) {
        float4 v[DEPTH];
#pragma unroll
        for (int u = 0; u < DEPTH; u++) {
            i32 i = base + u * 128;
            if (raw.aligned && i + 4 <= raw.n) {
                uint4 w = ld_cg16(raw.p + i);
                v[u] = make_float4(__uint_as_float(w.x), __uint_as_float(w.y), __uint_as_float(w.z), __uint_as_float(w.w));
            } else {
                v[u] = four(raw, i);
            }
        }
#pragma unroll
        for (int u = 0; u < DEPTH; u++) {
            i32 i = base + u * 128;
            if (i < raw.n) {
                track(best, v[u], i);
                if (STORE) *(float4*)(home + i) = v[u];
            }
        }
    }
    return best;
}

DEV bool kept(float x, const Cut& cut) { return x > cut.value || (cut.ties == EVERY && x == cut.value); }

// This thread's part of the kept mass of a segment, without limited ties, which are counted.
DEV u64 kept_mass(const View& v, const Cut& cut, float m, float scale, i32 lane, i32& ties) {
    u64 sum = 0;
#pragma unroll 2
    for (i32 i = lane * 4; i < v.n; i += 128) {
        float4 f = four(v, i);
        if (!(largest(f) >= cut.value)) continue;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float x = at(f, j);
            if (kept(x, cut)) sum += mass_of(x, m, scale);
            else ties += x == cut.value;
        }
    }
    return sum;
}

// One warp-wide addition to the histogram. Many lanes with one bucket add together first.
template <bool MASS> DEV void add_to(Shared& s, bool active, u32 bucket, u64 mass, i32 lane) {
    u32 lanes = __ballot_sync(FULL, active);
    if (!lanes) return;
    u32 times = 1;
    if (__popc(lanes) >= 8) {
        i32 leader = __ffs(lanes) - 1;
        u32 common = __shfl_sync(FULL, bucket, leader);
        if (__all_sync(FULL, !active || bucket == common)) {
            if (MASS) mass = warp_sum64(active ? mass : 0);
            times = __popc(lanes);
            active = lane == leader;
        }
    }
    if (!active) return;
    atomicAdd(&s.count[bucket], times);
    if (MASS) {  // 64 bits in two words: the carry is the one that this addition made
        u32 lo = (u32)mass, before = atomicAdd(&s.mass_lo[bucket], lo);
        u32 hi = (u32)(mass >> 32) + (before + lo < before);
        if (hi) atomicAdd(&s.mass_hi[bucket], hi);
    }
}

// The shortest prefix of the sorted row, down to `floor`, that has `limit` tokens, or with MASS a mass
// of at least `limit`; everything from `floor` up where it has less. limit >= 1, m is the largest value.
template <bool MASS>
DEV Cut find_cut(Shared& s, const View& v, float floor, u64 limit, float m, float scale, float reach) {
    const i32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const u32 bottom = key_of(floor) < KEY_NEG_INF ? KEY_NEG_INF : key_of(floor);
    u32 high = key_of(m), low = key_of(m - reach);
    u64 above = 0;  // count or mass of all that is higher than `high`
    i32 widened = 0;
    if (low < bottom) low = bottom;
    for (;;) {
        const u32 width = high - low;
        const i32 shift = width >> BUCKET_BITS ? 32 - BUCKET_BITS - __clz(width) : 0;
        const float low_value = of_key(low);
        if (threadIdx.x < BUCKETS) {
            s.count[threadIdx.x] = 0;
            if (MASS) s.mass_lo[threadIdx.x] = s.mass_hi[threadIdx.x] = 0;
        }
        if (threadIdx.x == 0) s.hit = -1;
        __syncthreads();
    #pragma unroll 1
    for (i32 base = 0; base < v.n; base += 128) {
            const i32 i = base + lane * 4;
            float4 f = make_float4(NEG_INF, NEG_INF, NEG_INF, NEG_INF);
            if (i < v.n) f = four(v, i);
            if (!__any_sync(FULL, i < v.n && largest(f) >= low_value)) continue;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float x = at(f, j);
                u32 key = key_of(x);
                bool active = i < v.n && key - low <= width;
                add_to<MASS>(s, active, (high - key) >> shift, MASS && active ? mass_of(x, m, scale) : 0, lane);
            }
        }
        row_sync();
        u32 count = 0;  // of this thread's bucket
        u64 mass = 0;
        if (threadIdx.x < BUCKETS) {
#pragma unroll
            for (u32 rank = 0; rank < CLUSTER; rank++) {
                count += peer(&s.count[threadIdx.x], rank);
                if (MASS) {
                    mass += peer(&s.mass_lo[threadIdx.x], rank);
                    mass += (u64)peer(&s.mass_hi[threadIdx.x], rank) << 32;
                }
            }
        }
        const u64 amount = MASS ? mass : count;
        u64 before = warp_scan(amount, lane);
        if (lane == 31) s.part[warp] = before;
        row_sync();  // the sums of all warps, and all have read this block's histogram
        before += above - amount;
#pragma unroll
        for (int w = 0; w < BUCKETS / 32; w++) {
            u64 part = s.part[w];
            if (w < warp) before += part;
            above += part;
        }
        if (before < limit && before + amount >= limit) {
            s.hit = threadIdx.x;
            s.hit_count = count;
            s.hit_before = before;
        }
        __syncthreads();
        const i32 hit = s.hit;
        if (hit < 0) {  // not in this range: look further down
            if (low == bottom) return Cut{of_key(bottom), EVERY};
            high = low - 1;
            reach *= 6.0f;
            low = key_of(m - reach);
            if (widened++ || low > high || low < bottom) low = bottom;
            __syncthreads();  // all have read s.hit
            continue;
        }
        above = s.hit_before;
        count = s.hit_count;
        high -= (u32)hit << shift;
        const u32 span = (1u << shift) - 1;
        if (high - low > span) low = high - span;
        if (MASS ? count == 1 : above + count == limit) return Cut{of_key(low), EVERY};
        if (low == high) {  // within equals
            u64 each = MASS ? mass_of(of_key(high), m, scale) : 1;
            return Cut{of_key(high), (i32)((limit - above + each - 1) / each)};
        }
        __syncthreads();  // all have read s.hit
    }
}

// Ties of this lane's four, and how many come before them in the segment.
DEV i32 ties_before(const float4& f, float value, i32& seen, i32 lane) {
    i32 own = (f.x == value) + (f.y == value) + (f.z == value) + (f.w == value);
    i32 upto = warp_scan(own, lane);
    i32 before = seen + upto - own;
    seen += __shfl_sync(FULL, upto, 31);
    return before;
}

// The best of the raw logits, as many as the row asks for, sorted, with their log-probabilities.
DEV void best_few(Shared& s, const View& raw, i32 first, i32 V, i32 row, i32* top_ids, float* top_logprobs) {
    const i32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const u32 rank = block_rank();
    const i32 few = s.row.logprobs < MAX_TOP ? s.row.logprobs : MAX_TOP;
    const Cut cut = find_cut<false>(s, raw, NEG_INF, few < V ? few : V, s.raw_best, LOG2E, REACH);
    i32 seen = 0;  // ties in the segments before
    if (threadIdx.x == 0) s.num_top = 0;
    if (cut.ties != EVERY) {
        i32 ties = 0;
        for (i32 i = lane * 4; i < raw.n; i += 128) {
            float4 f = four(raw, i);
            ties += (f.x == cut.value) + (f.y == cut.value) + (f.z == cut.value) + (f.w == cut.value);
        }
        ties = (i32)warp_sum64(ties);
        if (lane == 0) s.segment_ties[warp] = ties;
        row_sync();
        for (i32 e = lane; e < (i32)rank * WARPS + warp; e += 32)
            seen += peer((const u32*)&s.segment_ties[e % WARPS], e / WARPS);
        seen = (i32)warp_sum64(seen);
    }
    __syncthreads();
#pragma unroll 1
    for (i32 base = 0; base < raw.n; base += 128) {
        const i32 i = base + lane * 4;
        float4 f = make_float4(NEG_INF, NEG_INF, NEG_INF, NEG_INF);
        if (i < raw.n) f = four(raw, i);
        if (!__any_sync(FULL, largest(f) >= cut.value)) continue;
        i32 place = cut.ties == EVERY ? 0 : ties_before(f, cut.value, seen, lane);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float x = at(f, j);
            bool tie = x == cut.value;
            bool take = x > cut.value || (tie && place < cut.ties);
            place += tie && cut.ties != EVERY;
            if (take && first + i + j < V) {
                i32 slot = atomicAdd(&s.num_top, 1);
                if (slot < MAX_TOP) s.top[slot] = (u64)key_of(x) << 32 | ~(u32)(first + i + j);
            }
        }
    }
    row_sync();
    if (rank == 0 && warp == 0) {
        u64 mine = 0;
        i32 total = 0;
        for (u32 r = 0; r < CLUSTER; r++) {
            i32 num = (i32)peer((const u32*)&s.num_top, r);
            if (lane >= total && lane < total + num && lane < MAX_TOP) mine = peer(&s.top[lane - total], r);
            total += num;
        }
        i32 place = 0;
        for (int k = 0; k < 32; k++) place += __shfl_sync(FULL, mine, k) > mine;
        if (mine) {
            top_ids[row * MAX_TOP + place] = (i32)~(u32)mine;
            top_logprobs[row * MAX_TOP + place] = (of_key((u32)(mine >> 32)) - s.raw_best) - s.log_z;
        }
    }
}

// 53 random bits at the top of a word. SplitMix64 (Steele et al., OOPSLA 2014), as engine/sampler.py.
DEV u64 random_bits(u64 seed, i32 position) {
    u64 z = seed + ((u64)position + 1) * 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return (z ^ (z >> 31)) & ~0x7ffull;
}

// A segment's kept mass, its limited ties among it, while `room` of them are still to come.
DEV u64 segment_mass(const Shared& s, i32 e, u64 each, i32& room) {
    u64 mass = peer(&s.segment_mass[e % WARPS], e / WARPS);
    i32 ties = (i32)peer((const u32*)&s.segment_ties[e % WARPS], e / WARPS);
    mass += each * (room < 0 ? 0 : room < ties ? room : ties);
    room -= ties;
    return mass;
}

// Which segment the draw lands in, what mass is left there, and how many of its ties are kept. Warp 0.
DEV void choose_segment(Shared& s, const Cut& cut, float m, float scale, i32 lane) {
    const int PER = (SEGMENTS + 31) / 32;
    const i32 first = lane * PER, end = first + PER < SEGMENTS ? first + PER : SEGMENTS;
    const u64 each = cut.ties == EVERY ? 0 : mass_of(cut.value, m, scale);
    i32 tied = 0;
#pragma unroll 1
    for (i32 e = first; e < end; e++) tied += (i32)peer((const u32*)&s.segment_ties[e % WARPS], e / WARPS);
    const i32 lane_room = cut.ties - (warp_scan(tied, lane) - tied);
    i32 room = lane_room;
    u64 sum = 0;
#pragma unroll 1
    for (i32 e = first; e < end; e++) sum += segment_mass(s, e, each, room);
    const u64 upto = warp_scan(sum, lane);
    const u64 target = __umul64hi(random_bits(s.row.seed, s.row.position), __shfl_sync(FULL, upto, 31));
    if (upto <= target || upto - sum > target) return;
    u64 left = target - (upto - sum);
    room = lane_room;
#pragma unroll 1
    for (i32 e = first; e < end; e++) {
        const i32 before = room;
        const u64 mass = segment_mass(s, e, each, room);
        if (left < mass) {
            if (e / WARPS == (i32)block_rank()) s.found = e % WARPS, s.left = left, s.room = before;
            return;
        }
        left -= mass;
    }
}

// What the draw may land on, with `place` of the ties before it.
DEV u64 kept_of(float x, const Cut& cut, i32& place, i32 room, float m, float scale) {
    const bool tie = cut.ties != EVERY && x == cut.value;
    const bool take = tie ? place < room : x >= cut.value;
    place += tie;
    return take ? mass_of(x, m, scale) : 0;
}

// The token in this warp's segment where `left` runs out: its place to one lane, -1 to the others.
DEV i32 walk(const View& v, const Cut& cut, float m, float scale, u64 left, i32 room, i32 lane) {
    i32 seen = 0;
#pragma unroll 1
    for (i32 base = 0; base < v.n; base += 128) {
        const i32 i = base + lane * 4;
        float4 f = make_float4(NEG_INF, NEG_INF, NEG_INF, NEG_INF);
        if (i < v.n) f = four(v, i);
        const i32 before = cut.ties == EVERY ? 0 : ties_before(f, cut.value, seen, lane);
        i32 place = before;
        u64 sum = 0;
#pragma unroll
        for (int j = 0; j < 4; j++) sum += kept_of(at(f, j), cut, place, room, m, scale);
        const u64 upto = warp_scan(sum, lane), all = __shfl_sync(FULL, upto, 31);
        if (left < all) {
            if (upto <= left || upto - sum > left) return -1;
            left -= upto - sum;
            place = before;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const u64 mass = kept_of(at(f, j), cut, place, room, m, scale);
                if (left < mass) return i + j;
                left -= mass;
            }
        }
        left -= all;
    }
    return -1;
}

extern "C" __global__ void __launch_bounds__(THREADS, CLUSTER > 1 ? 3 : 2)
    sample(const float* logits, i32 stride, i32 V, i32 seg, const Row* rows, const Entry* entries,
           float* scratch, i32* ids, float* logprobs, i32* top_ids, float* top_logprobs, float* cuts) {
    extern __shared__ uint4 dynamic[];
    Shared& s = *(Shared*)dynamic;
    const i32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, row = blockIdx.y;
    const u32 rank = block_rank();
    grid_launch();
    grid_wait();
    if (threadIdx.x < sizeof(Row) / 4) ((u32*)&s.row)[threadIdx.x] = ((const u32*)&rows[row])[threadIdx.x];
    __syncthreads();
    const Row& r = s.row;
    if (!r.live) {
        if (rank == 0 && threadIdx.x == 0) ids[row] = -1;
        return;
    }
    const bool greedy = r.scale == 0.0f, adjusts = r.num_entries > 0;
    const bool stored = adjusts || (STAGED && (!greedy || r.logprobs >= 0));
    const i32 begin = (i32)rank * WARPS * seg, first = begin + warp * seg;
    const i32 n = V - first < 0 ? 0 : V - first < seg ? V - first : seg;
    float* const block_home = STAGED ? (float*)((u8*)dynamic + FIXED_SMEM) : scratch + (i64)row * seg * SEGMENTS;
    const View home = stored ? View{block_home + warp * seg, (n + 3) & ~3, true} : view_of(logits, stride, row, first, n);
    u32 turn = 0;

    u64 top;
    {
        const View raw = view_of(logits, stride, row, first, n);
        float* const copy = block_home + warp * seg;
        const Best best = stored ? load<true>(raw, copy, lane) : load<false>(raw, nullptr, lane);
        top = row_reduce<true>(s, packed(best, first), turn);
    }
    s.raw_best = of_key((u32)(top >> 32));  // every thread writes the same
    bool broken = !finite_best(top);
    if (adjusts && !broken) {
        for (i32 e = threadIdx.x; e < r.num_entries; e += THREADS) {
            const Entry entry = entries[r.first_entry + e];
            const i32 place = entry.id - begin;
            if (place >= 0 && place < WARPS * seg && entry.id < V)
                block_home[place] = __fadd_rn(block_home[place], entry.add);
        }
        __syncthreads();
        Best best{NEG_INF, 0};
        for (i32 i = lane * 4; i < home.n; i += 128) track(best, four(home, i), i);
        top = row_reduce<true>(s, packed(best, first), turn);
        broken = !finite_best(top);
    }
    const float m = of_key((u32)(top >> 32));
    i32 id = -1;  // to one thread of the row
    if (broken) {
        if (rank == 0 && threadIdx.x == 0) ids[row] = -1;
    } else {
        if (r.logprobs >= 0) {
            const View source = adjusts ? view_of(logits, stride, row, first, n) : home;
            const float raw_best = s.raw_best;
            i32 ties = 0;
            u64 total = kept_mass(source, Cut{NEG_INF, EVERY}, raw_best, LOG2E, lane, ties);
            total = row_reduce<false>(s, total, turn);
            s.log_z = logf((float)((double)total * (1.0 / (1ull << MASS_BITS))));  // the same in all
            if (r.logprobs > 0) best_few(s, source, first, V, row, top_ids, top_logprobs);
        }
        if (greedy) {
            const i32 start = (i32)(~(u32)top << 2);
            if (start / seg == (i32)rank * WARPS + warp && lane == 0) {
                const float4 f = four(home, start - first);
                id = start + (f.x == m ? 0 : f.y == m ? 1 : f.z == m ? 2 : 3);
            }
        } else {
            const float scale = r.scale;
            Cut cut{m + r.gap, EVERY};
            if (r.top_k > 0 && r.top_k < V)
                cut = find_cut<false>(s, home, cut.value, r.top_k, m, scale, fmaxf(REACH, REACH * LOG2E / scale));
            if (r.top_p < 1.0) {
                i32 ties = 0;
                u64 total = kept_mass(home, cut, m, scale, lane, ties);
                total = row_reduce<false>(s, total, turn);
                if (cut.ties != EVERY) total += cut.ties * mass_of(cut.value, m, scale);
                u64 limit = (u64)ceil(r.top_p * (double)total);
                limit = limit < 1 ? 1 : limit > total ? total : limit;
                cut = find_cut<true>(s, home, cut.value, limit, m, scale, REACH * LOG2E / scale);
            }
            i32 ties = 0;
            const u64 mass = warp_sum64(kept_mass(home, cut, m, scale, lane, ties));
            ties = (i32)warp_sum64(cut.ties == EVERY ? 0 : ties);
            if (lane == 0) s.segment_mass[warp] = mass, s.segment_ties[warp] = ties;
            if (threadIdx.x == 0) s.found = -1;
            row_sync();
            if (warp == 0) choose_segment(s, cut, m, scale, lane);
            __syncthreads();
            if (warp == s.found) {
                id = walk(home, cut, m, scale, s.left, s.room, lane);
                if (id >= 0) id += first;
            }
            if (rank == 0 && threadIdx.x == 0) cuts[row * 2] = cut.value, cuts[row * 2 + 1] = __int_as_float(cut.ties);
        }
    }
    if (id >= 0) {
        ids[row] = id;
        if (r.logprobs >= 0) logprobs[row] = (logits[(i64)row * stride + id] - s.raw_best) - s.log_z;
    }
#if CLUSTER > 1
    row_sync();  // peers may still read this block's shared memory
#endif
}

// -inf over the tokens of some rows that have no bit. masks [gridDim.y, 1 + num_words]: a row, and its words. A thread
// has a word; lanes take turns, so that a warp writes 32 neighbours.
extern "C" __global__ void bar(float* logits, i32 stride, i32 V, i32 num_words, const u32* masks) {
    grid_launch();
    grid_wait();
    const u32* mask = masks + (i64)blockIdx.y * (1 + num_words);
    const i32 lane = threadIdx.x & 31, word = blockIdx.x * blockDim.x + threadIdx.x;
    float* const row = logits + (i64)mask[0] * stride;
    const u32 own = word < num_words ? mask[1 + word] : FULL;
    for (i32 i = 0; i < 32; i++) {
        const u32 bits = __shfl_sync(FULL, own, i);
        const i32 id = (word - lane + i) * 32 + lane;
        if (id < V && !(bits >> lane & 1)) row[id] = NEG_INF;
    }
}
