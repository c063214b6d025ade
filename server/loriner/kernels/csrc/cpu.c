/* The CPU's kernels: NF4 and bf16 linears, segmented LoRA, paged attention, small ops, over a thread pool.
 *
 * Compiled at run time for the machine it runs on (see native.py). Plain C over one vector type: AVX-512,
 * AVX2, or eight floats that the compiler lowers. Every function says what it computes in the words of
 * reference.py. Invariant: an output's order of additions depends on its own row only, never on how many
 * rows or threads there are.
 */
#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
#define VL 16
typedef __m512 vf;
INLINE vf v_set(float a) { return _mm512_set1_ps(a); }
INLINE vf v_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void v_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
INLINE vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE float v_sum(vf a) { return _mm512_reduce_add_ps(a); }
INLINE vf v_bf16(const uint16_t *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
typedef struct { __m512 all; } code_table;
INLINE code_table load_codes(const float *code) { return (code_table){_mm512_loadu_ps(code)}; }
/* 16 bytes -> high nibbles' values (elements 0, 2, ..) and low nibbles' (1, 3, ..) */
INLINE void decode(const uint8_t *p, code_table t, vf *even, vf *odd) {
    __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
    *even = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), t.all);
    *odd = _mm512_permutexvar_ps(bytes, t.all); /* reads the low 4 bits only */
}
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define VL 8
typedef __m256 vf;
INLINE vf v_set(float a) { return _mm256_set1_ps(a); }
INLINE vf v_load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void v_store(float *p, vf a) { _mm256_storeu_ps(p, a); }
INLINE vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vf v_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
INLINE float v_sum(vf a) {
    __m128 h = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}
INLINE vf v_bf16(const uint16_t *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
typedef struct { __m256 low, high; } code_table;
INLINE code_table load_codes(const float *code) {
    return (code_table){_mm256_loadu_ps(code), _mm256_loadu_ps(code + 8)};
}
INLINE vf look_up(__m256i index, code_table t) { /* bit 3 chooses the half of the table */
    __m256 low = _mm256_permutevar8x32_ps(t.low, index);
    __m256 high = _mm256_permutevar8x32_ps(t.high, index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
INLINE void decode(const uint8_t *p, code_table t, vf *even, vf *odd) {
    __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
    *even = look_up(_mm256_srli_epi32(bytes, 4), t);
    *odd = look_up(bytes, t);
}
#else
#define VL 8
typedef float vf __attribute__((vector_size(32)));
INLINE vf v_set(float a) { return (vf){a, a, a, a, a, a, a, a}; }
INLINE vf v_load(const float *p) { vf a; memcpy(&a, p, sizeof a); return a; }
INLINE void v_store(float *p, vf a) { memcpy(p, &a, sizeof a); }
INLINE vf v_fma(vf a, vf b, vf c) { return a * b + c; }
INLINE vf v_mul(vf a, vf b) { return a * b; }
INLINE float v_sum(vf a) {
    return ((a[0] + a[4]) + (a[1] + a[5])) + ((a[2] + a[6]) + (a[3] + a[7]));
}
INLINE vf v_bf16(const uint16_t *p) {
    vf a;
    for (int i = 0; i < VL; i++) {
        uint32_t bits = (uint32_t)p[i] << 16;
        float value;
        memcpy(&value, &bits, 4);
        a[i] = value;
    }
    return a;
}
typedef struct { const float *code; } code_table;
INLINE code_table load_codes(const float *code) { return (code_table){code}; }
INLINE void decode(const uint8_t *p, code_table t, vf *even, vf *odd) {
    for (int i = 0; i < VL; i++) {
        (*even)[i] = t.code[p[i] >> 4];
        (*odd)[i] = t.code[p[i] & 15];
    }
}
#endif

#define TILE 8        /* activation rows that share one decode of the weights */
#define GROUPS 4      /* most groups of VL outputs that one row works on at once */
#define NF4_BLOCK 64  /* weights under one scale */
#define MAX_THREADS 256

/* ---- thread pool: chunks are claimed one by one, so a thread that the system took away delays nobody ---- */

typedef void (*chunk_fn)(void *job, int chunk);

#define OWN_LINE __attribute__((aligned(128)))

static struct {
    OWN_LINE _Atomic uint64_t state; /* epoch << 40 | total << 20 | next */
    OWN_LINE _Atomic int done;
    OWN_LINE _Atomic int num_asleep;
    chunk_fn run;
    void *job;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    int num_workers;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

#define FIELD ((1u << 20) - 1)
#define SPINS 20000 /* about 50 us: longer than the gap between two kernels of a step */

/* No PAUSE: under a hypervisor a loop of them traps, and costs more than it saves. */
INLINE void pause_briefly(void) {
    for (int i = 0; i < 16; i++) __asm__ volatile("" ::: "memory");
}

/* Claim and run chunks until none is left; returns how many. The job stays until all claimed are done. */
static int run_what_is_left(void) {
    int count = 0;
    for (;;) {
        uint64_t state = atomic_load_explicit(&pool.state, memory_order_acquire);
        uint32_t next = state & FIELD, total = (state >> 20) & FIELD;
        if (next >= total) break;
        if (!atomic_compare_exchange_weak(&pool.state, &state, state + 1)) continue;
        pool.run(pool.job, (int)next);
        count++;
    }
    if (count) atomic_fetch_add_explicit(&pool.done, count, memory_order_release);
    return count;
}

static int has_work(void) {
    uint64_t state = atomic_load_explicit(&pool.state, memory_order_acquire);
    return (state & FIELD) < ((state >> 20) & FIELD);
}

static void *work(void *unused) {
    (void)unused;
    for (;;) {
        int spins = 0;
        while (!run_what_is_left() && spins++ < SPINS) pause_briefly();
        if (spins < SPINS) continue;
        pthread_mutex_lock(&pool.lock);
        atomic_fetch_add(&pool.num_asleep, 1);
        while (!has_work()) pthread_cond_wait(&pool.wake, &pool.lock);
        atomic_fetch_sub(&pool.num_asleep, 1);
        pthread_mutex_unlock(&pool.lock);
    }
    return NULL;
}

/* Start the pool, once. Returns the number of threads that will compute, the caller's included. */
int loriner_start(int num_threads) {
    pthread_mutex_lock(&pool.lock);
    while (pool.num_workers < num_threads - 1 && pool.num_workers < MAX_THREADS) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, work, NULL) != 0) break;
        pthread_detach(thread);
        pool.num_workers++;
    }
    int running = pool.num_workers + 1;
    pthread_mutex_unlock(&pool.lock);
    return running;
}

static pthread_mutex_t one_job = PTHREAD_MUTEX_INITIALIZER;

static void run_chunks(chunk_fn run, void *job, int total) {
    if (total <= 1 || pool.num_workers == 0) {
        for (int i = 0; i < total; i++) run(job, i);
        return;
    }
    pthread_mutex_lock(&one_job); /* two engines in one process take turns */
    pool.run = run;
    pool.job = job;
    atomic_store(&pool.done, 0);
    uint64_t epoch = (atomic_load(&pool.state) >> 40) + 1;
    atomic_store(&pool.state, epoch << 40 | (uint64_t)total << 20);
    if (atomic_load(&pool.num_asleep) > 0) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.lock);
    }
    run_what_is_left();
    for (int spins = 0; atomic_load_explicit(&pool.done, memory_order_acquire) < total; spins++) {
        if (spins < SPINS) pause_briefly(); else sched_yield();
    }
    pthread_mutex_unlock(&one_job);
}

/* exp to about 1e-7 relative, in a form that compilers vectorise; a NaN stays a NaN (Cephes' expf) */
INLINE float fast_exp(float x) {
    x = x > 88.0f ? 88.0f : x;
    x = x < -87.0f ? -87.0f : x;
    const float n = rintf(x * 1.44269504f);
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { int32_t bits; float value; } power = {.bits = ((int32_t)n + 127) << 23};
    return p * power.value;
}

INLINE int min_int(int a, int b) { return a < b ? a : b; }

/* ---- linear: y[t, n] = sum over k of x[t, k] w[n, k] + bias[n] ----
 *
 * Weights lie in groups of VL outputs: byte [group][k / 2][lane] of NF4, scale [group][k / 64][lane], number
 * [group][k][lane] of bf16. A lane is an output, so nothing is ever summed across lanes. Each output is the
 * sum of two chains, even k and odd k, whatever the number of rows.
 */

typedef struct {
    float *y;
    const float *x; /* by tiles: [rows / TILE][inputs][rows of the tile] */
    const void *weight;
    const float *absmax, *code, *bias; /* bias is padded to whole groups */
    int rows, inputs, outputs, chunk;  /* chunk: groups of one chunk of work */
} linear_job;

static void finish(const linear_job *j, int t, int group, vf sum) {
    float *y = j->y + (size_t)t * j->outputs + (size_t)group * VL;
    const int left = j->outputs - group * VL;
    if (j->bias) sum = sum + v_load(j->bias + (size_t)group * VL);
    if (left >= VL) {
        v_store(y, sum);
    } else {
        float lanes[VL];
        v_store(lanes, sum);
        memcpy(y, lanes, sizeof(float) * left);
    }
}

/* `tile` rows against `count` groups; both are constants, so that the sums stay in registers */
INLINE void nf4_tile(const linear_job *j, int t, int group, const int tile, const int count) {
    vf even_sum[TILE][GROUPS], odd_sum[TILE][GROUPS];
    for (int i = 0; i < tile; i++)
        for (int g = 0; g < count; g++) even_sum[i][g] = odd_sum[i][g] = v_set(0.0f);
    const code_table codes = load_codes(j->code);
    const size_t inputs = j->inputs, num_blocks = inputs / NF4_BLOCK;
    const uint8_t *packed = (const uint8_t *)j->weight + group * inputs / 2 * VL;
    const float *scales = j->absmax + group * num_blocks * VL;
    const float *x = j->x + t * inputs;
    for (size_t block = 0; block < num_blocks; block++) {
        vf scale[GROUPS];
        for (int g = 0; g < count; g++) scale[g] = v_load(scales + (g * num_blocks + block) * VL);
        for (int pair = 0; pair < NF4_BLOCK / 2; pair++, packed += VL, x += 2 * tile) {
            for (int g = 0; g < count; g++) {
                vf even, odd;
                decode(packed + g * inputs / 2 * VL, codes, &even, &odd);
                even = v_mul(even, scale[g]);
                odd = v_mul(odd, scale[g]);
                for (int i = 0; i < tile; i++) {
                    even_sum[i][g] = v_fma(even, v_set(x[i]), even_sum[i][g]);
                    odd_sum[i][g] = v_fma(odd, v_set(x[tile + i]), odd_sum[i][g]);
                }
            }
        }
    }
    for (int i = 0; i < tile; i++)
        for (int g = 0; g < count; g++) finish(j, t + i, group + g, even_sum[i][g] + odd_sum[i][g]);
}

INLINE void bf16_tile(const linear_job *j, int t, int group, const int tile, const int count) {
    vf even_sum[TILE][GROUPS], odd_sum[TILE][GROUPS];
    for (int i = 0; i < tile; i++)
        for (int g = 0; g < count; g++) even_sum[i][g] = odd_sum[i][g] = v_set(0.0f);
    const size_t inputs = j->inputs;
    const uint16_t *weight = (const uint16_t *)j->weight + group * inputs * VL;
    const float *x = j->x + t * inputs;
    for (size_t pair = 0; pair < inputs / 2; pair++, weight += 2 * VL, x += 2 * tile) {
        for (int g = 0; g < count; g++) {
            const vf even = v_bf16(weight + g * inputs * VL);
            const vf odd = v_bf16(weight + g * inputs * VL + VL);
            for (int i = 0; i < tile; i++) {
                even_sum[i][g] = v_fma(even, v_set(x[i]), even_sum[i][g]);
                odd_sum[i][g] = v_fma(odd, v_set(x[tile + i]), odd_sum[i][g]);
            }
        }
    }
    for (int i = 0; i < tile; i++)
        for (int g = 0; g < count; g++) finish(j, t + i, group + g, even_sum[i][g] + odd_sum[i][g]);
}

typedef void (*tile_fn)(const linear_job *j, int t, int group);

/* One function for each size, so that the compiler keeps its sums in registers. Few rows take several
 * groups at once: there have to be enough independent sums to hide the latency of one. */
#define VARIANT(name, tile, count)                                                                \
    static __attribute__((noinline)) void name##_##tile##_##count(const linear_job *j, int t, int g) { \
        name##_tile(j, t, g, tile, count);                                                        \
    }
#define KERNEL(name)                                                                              \
    VARIANT(name, 1, 4) VARIANT(name, 2, 4) VARIANT(name, 3, 2) VARIANT(name, 4, 2)               \
    VARIANT(name, 1, 1) VARIANT(name, 2, 1) VARIANT(name, 3, 1) VARIANT(name, 4, 1)               \
    VARIANT(name, 5, 1) VARIANT(name, 6, 1) VARIANT(name, 7, 1) VARIANT(name, 8, 1)               \
    static const tile_fn name##_one[TILE + 1] = {0, name##_1_1, name##_2_1, name##_3_1, name##_4_1, \
                                                 name##_5_1, name##_6_1, name##_7_1, name##_8_1}; \
    static const tile_fn name##_more[TILE + 1] = {0, name##_1_4, name##_2_4, name##_3_2, name##_4_2}; \
    static void name##_chunk(void *job, int chunk) {                                              \
        static const int at_once[TILE + 1] = {1, 4, 4, 2, 2, 1, 1, 1, 1};                         \
        const linear_job *j = job;                                                                \
        const int end = min_int((chunk + 1) * j->chunk, (j->outputs + VL - 1) / VL);              \
        for (int t = 0; t < j->rows; t += TILE) {                                                 \
            const int tile = min_int(TILE, j->rows - t), step = at_once[tile];                    \
            int g = chunk * j->chunk;                                                             \
            for (; step > 1 && g + step <= end; g += step) name##_more[tile](j, t, g);            \
            for (; g < end; g++) name##_one[tile](j, t, g);                                       \
        }                                                                                         \
    }
KERNEL(nf4)
KERNEL(bf16)

/* x [rows, inputs] -> [rows / TILE][inputs][rows of the tile] */
static void to_tiles(float *out, const float *x, int rows, int inputs) {
    for (int t = 0; t < rows; t += TILE) {
        const int tile = min_int(TILE, rows - t);
        for (int k = 0; k < inputs; k++)
            for (int i = 0; i < tile; i++)
                out[(size_t)t * inputs + (size_t)k * tile + i] = x[(size_t)(t + i) * inputs + k];
    }
}

/* Lanes of one group of outputs: the layout that `prepare` makes. */
int loriner_lanes(void) { return VL; }

/* ---- lora: y[t, o:o+n] += scale (x[t] A[r0:r1]^T) B + bias, for the adapter of row t ---- */

typedef struct {
    int32_t offset, rank_start, rank_end, outputs;
    const void *b;     /* [rank, outputs] */
    const float *bias; /* [outputs] or NULL */
    float scale;
} lora_part;

typedef struct {
    int32_t start, end, rank, num_parts, is_bf16; /* else A and B are f32 */
    const void *a;                                /* [rank, inputs] */
    const lora_part *parts;
} lora_segment;

typedef struct {
    float *y;
    const float *x;
    float *z; /* [rows, z_stride]: x A^T */
    const lora_segment *segments;
    const int32_t *first_chunk; /* of each segment, and one past the last */
    int z_stride, inputs, outputs;
} lora_job;

INLINE vf load_weight(const void *p, size_t at, const int is_bf16) {
    return is_bf16 ? v_bf16((const uint16_t *)p + at) : v_load((const float *)p + at);
}

INLINE float one_weight(const void *p, size_t at, const int is_bf16) {
    if (!is_bf16) return ((const float *)p)[at];
    union { uint32_t bits; float value; } wide = {.bits = (uint32_t)((const uint16_t *)p)[at] << 16};
    return wide.value;
}

/* sum over k of w[at + k] x[k] */
INLINE float weighted_sum(const void *w, size_t at, const float *x, int count, const int is_bf16) {
    vf sum[4] = {v_set(0.0f), v_set(0.0f), v_set(0.0f), v_set(0.0f)};
    int k = 0;
    for (; k + 4 * VL <= count; k += 4 * VL)
        for (int n = 0; n < 4; n++)
            sum[n] = v_fma(load_weight(w, at + k + n * VL, is_bf16), v_load(x + k + n * VL), sum[n]);
    for (; k + VL <= count; k += VL)
        sum[0] = v_fma(load_weight(w, at + k, is_bf16), v_load(x + k), sum[0]);
    float total = v_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (; k < count; k++) total += one_weight(w, at + k, is_bf16) * x[k];
    return total;
}

/* y += z[0] b[r] + ... + z[count - 1] b[r + count - 1], rows of b streamed side by side */
INLINE void add_rows(float *y, const float *z, const lora_part *part, int r, const int count,
                     const int is_bf16) {
    const size_t n = part->outputs;
    size_t c = 0;
    for (; c + VL <= n; c += VL) {
        vf sum = v_load(y + c);
        for (int i = 0; i < count; i++)
            sum = v_fma(v_set(z[i]), load_weight(part->b, (r + i) * n + c, is_bf16), sum);
        v_store(y + c, sum);
    }
    for (; c < n; c++)
        for (int i = 0; i < count; i++) y[c] += z[i] * one_weight(part->b, (r + i) * n + c, is_bf16);
}

INLINE void expand(float *y, const float *shrunk, const lora_part *part, const int is_bf16) {
    const int rank = part->rank_end - part->rank_start;
    float z[8];
    for (int r = 0; r < rank; r += 8) {
        const int count = min_int(8, rank - r);
        for (int i = 0; i < count; i++) z[i] = shrunk[r + i] * part->scale;
        if (count == 8) {
            add_rows(y, z, part, r, 8, is_bf16);
        } else {
            for (int i = 0; i < count; i++) add_rows(y, z + i, part, r + i, 1, is_bf16);
        }
    }
    if (part->bias)
        for (int c = 0; c < part->outputs; c++) y[c] += part->bias[c];
}

/* The segment of a chunk, and its rows [start, end): at most TILE of them. */
INLINE const lora_segment *rows_of(const lora_job *j, int chunk, int *start, int *end) {
    int s = 0;
    while (j->first_chunk[s + 1] <= chunk) s++;
    const lora_segment *segment = &j->segments[s];
    *start = segment->start + (chunk - j->first_chunk[s]) * TILE;
    *end = min_int(*start + TILE, segment->end);
    return segment;
}

static void shrink_chunk(const lora_job *j, int chunk) {
    int start, end;
    const lora_segment *segment = rows_of(j, chunk, &start, &end);
    for (int r = 0; r < segment->rank; r++)
        for (int t = start; t < end; t++) {
            const float *x = j->x + (size_t)t * j->inputs;
            const size_t at = (size_t)r * j->inputs;
            j->z[(size_t)t * j->z_stride + r] =
                segment->is_bf16 ? weighted_sum(segment->a, at, x, j->inputs, 1)
                                 : weighted_sum(segment->a, at, x, j->inputs, 0);
        }
}

static void expand_chunk(void *job, int chunk) {
    const lora_job *j = job;
    int start, end;
    const lora_segment *segment = rows_of(j, chunk, &start, &end);
    for (int p = 0; p < segment->num_parts; p++) {
        const lora_part *part = &segment->parts[p];
        for (int t = start; t < end; t++) {
            float *y = j->y + (size_t)t * j->outputs + part->offset;
            const float *z = j->z + (size_t)t * j->z_stride + part->rank_start;
            if (segment->is_bf16) expand(y, z, part, 1);
            else expand(y, z, part, 0);
        }
    }
}

/* ---- linear with adapters: shrinks run beside the base's chunks, since they wait for memory while those
 * wait for arithmetic; expands follow ---- */

typedef struct {
    linear_job linear;
    lora_job lora;
    chunk_fn base;
    int num_shrinks, num_paired; /* the first 2 * num_paired chunks take turns */
} joint_job;

static void joint_chunk(void *job, int chunk) {
    joint_job *j = job;
    const int rest = chunk - 2 * j->num_paired;
    const int turn = rest < 0 ? chunk / 2 : j->num_paired + rest;
    if (rest < 0 ? chunk % 2 == 0 : j->num_shrinks > j->num_paired) shrink_chunk(&j->lora, turn);
    else j->base(&j->linear, turn);
}

/* Groups of one chunk: a few chunks for each thread, since claiming one costs a microsecond or so. */
static void run_linear(chunk_fn base, linear_job *linear, const lora_segment *segments,
                       const int32_t *first_chunk, int num_segments, const float *x, float *z,
                       int z_stride) {
    const int num_groups = (linear->outputs + VL - 1) / VL;
    const int wanted = 4 * (pool.num_workers + 1);
    const int groups = (num_groups + wanted - 1) / wanted;
    linear->chunk = num_groups >= 16 * wanted ? (groups + 3) & ~3 : groups;
    const int num_chunks = (num_groups + linear->chunk - 1) / linear->chunk;
    if (num_segments == 0) {
        run_chunks(base, linear, num_chunks);
        return;
    }
    const int num_shrinks = first_chunk[num_segments];
    joint_job job = {
        *linear,
        {linear->y, x, z, segments, first_chunk, z_stride, linear->inputs, linear->outputs},
        base,
        num_shrinks,
        min_int(num_shrinks, num_chunks),
    };
    run_chunks(joint_chunk, &job, num_chunks + num_shrinks);
    run_chunks(expand_chunk, &job.lora, num_shrinks);
}

/* inputs is a multiple of 64; `scratch` has room for x, `z` for rows * z_stride. */
void loriner_nf4_linear(float *y, const float *x, float *scratch, const uint8_t *packed,
                        const float *absmax, const float *code, const float *bias, int rows,
                        int inputs, int outputs, const lora_segment *segments,
                        const int32_t *first_chunk, int num_segments, float *z, int z_stride) {
    to_tiles(scratch, x, rows, inputs);
    linear_job job = {y, scratch, packed, absmax, code, bias, rows, inputs, outputs, 0};
    run_linear(nf4_chunk, &job, segments, first_chunk, num_segments, x, z, z_stride);
}

/* inputs is even. */
void loriner_bf16_linear(float *y, const float *x, float *scratch, const uint16_t *weight,
                         const float *bias, int rows, int inputs, int outputs,
                         const lora_segment *segments, const int32_t *first_chunk, int num_segments,
                         float *z, int z_stride) {
    to_tiles(scratch, x, rows, inputs);
    linear_job job = {y, scratch, weight, NULL, NULL, bias, rows, inputs, outputs, 0};
    run_linear(bf16_chunk, &job, segments, first_chunk, num_segments, x, z, z_stride);
}

/* ---- attention: out[t, h] = softmax(scale q[t, h] K^T) V over the first context[t] keys of its sequence ----
 *
 * K lies as [block][kv head][dim][position], so that scores of a block's keys are lanes; V as
 * [block][kv head][position][dim].
 */

typedef struct {
    float *out;
    const float *q, *k, *v;
    const int32_t *blocks; /* [sequences, width] */
    const int32_t *sequence, *context; /* of each row */
    int q_stride, width, block, heads, num_kv, dim;
    float scale;
} attention_job;

#define MAX_GROUP 16
#define MAX_DIM 256
#define MAX_BLOCK 256

/* p[i] = scale * sum over d of q[d] k[d][i], for the `count` keys of one block */
INLINE void score(float *p, const float *q, const float *k, int block, int count, int dim, float scale) {
    int i = 0;
    for (; i + VL <= block && i < count; i += VL) {
        vf sum[4] = {v_set(0.0f), v_set(0.0f), v_set(0.0f), v_set(0.0f)};
        for (int d = 0; d < dim; d += 4)
            for (int n = 0; n < 4; n++)
                sum[n] = v_fma(v_set(q[d + n]), v_load(k + (size_t)(d + n) * block + i), sum[n]);
        v_store(p + i, v_mul((sum[0] + sum[1]) + (sum[2] + sum[3]), v_set(scale)));
    }
    for (; i < count; i++) {
        float sum = 0.0f;
        for (int d = 0; d < dim; d++) sum += q[d] * k[(size_t)d * block + i];
        p[i] = sum * scale;
    }
}

/* acc[d] = acc[d] * shrink + sum over i of p[i] v[i][d] */
INLINE void gather(float *acc, const float *p, const float *v, int count, int dim, float shrink) {
    int d = 0;
    for (; d + 4 * VL <= dim; d += 4 * VL) {
        vf sum[4];
        for (int n = 0; n < 4; n++) sum[n] = v_mul(v_load(acc + d + n * VL), v_set(shrink));
        for (int i = 0; i < count; i++)
            for (int n = 0; n < 4; n++)
                sum[n] = v_fma(v_set(p[i]), v_load(v + (size_t)i * dim + d + n * VL), sum[n]);
        for (int n = 0; n < 4; n++) v_store(acc + d + n * VL, sum[n]);
    }
    for (; d < dim; d++) {
        float sum = acc[d] * shrink;
        for (int i = 0; i < count; i++) sum += p[i] * v[(size_t)i * dim + d];
        acc[d] = sum;
    }
}

/* Blocks lie scattered, a page or so each, where no hardware prefetcher follows. */
INLINE void prefetch_block(const attention_job *j, const int32_t *blocks, int index, int head) {
    const size_t size = (size_t)j->block * j->dim;
    const size_t first = ((size_t)blocks[index] * j->num_kv + head) * size;
    for (size_t i = 0; i < size; i += 16) {
        __builtin_prefetch(j->k + first + i);
        __builtin_prefetch(j->v + first + i);
    }
}

static void attention_chunk(void *job, int chunk) {
    const attention_job *j = job;
    const int row = chunk / j->num_kv, head = chunk % j->num_kv;
    const int group = j->heads / j->num_kv, dim = j->dim, context = j->context[row];
    const int32_t *blocks = j->blocks + (size_t)j->sequence[row] * j->width;
    const float *q = j->q + (size_t)row * j->q_stride + (size_t)head * group * dim;
    float acc[MAX_GROUP][MAX_DIM], largest[MAX_GROUP], mass[MAX_GROUP], p[MAX_BLOCK];
    for (int g = 0; g < group; g++) {
        largest[g] = -INFINITY;
        mass[g] = 0.0f;
        memset(acc[g], 0, sizeof(float) * dim);
    }
    prefetch_block(j, blocks, 0, head);
    if (context > j->block) prefetch_block(j, blocks, 1, head);
    for (int base = 0; base < context; base += j->block) { /* online softmax, arXiv 1805.02867 */
        const int count = min_int(j->block, context - base);
        if (base + 2 * j->block < context) prefetch_block(j, blocks, base / j->block + 2, head);
        const size_t first = ((size_t)blocks[base / j->block] * j->num_kv + head) * j->block * dim;
        for (int g = 0; g < group; g++) {
            score(p, q + g * dim, j->k + first, j->block, count, dim, j->scale);
            float peak = largest[g];
            for (int i = 0; i < count; i++)
                if (!(p[i] <= peak)) peak = p[i]; /* a NaN becomes the peak and stays in this row */
            const float shrink = base ? fast_exp(largest[g] - peak) : 0.0f;
            for (int i = 0; i < count; i++) p[i] = fast_exp(p[i] - peak);
            mass[g] *= shrink;
            for (int i = 0; i < count; i++) mass[g] += p[i];
            largest[g] = peak;
            gather(acc[g], p, j->v + first, count, dim, shrink);
        }
    }
    float *out = j->out + ((size_t)row * j->heads + (size_t)head * group) * dim;
    for (int g = 0; g < group; g++)
        for (int d = 0; d < dim; d++) out[g * dim + d] = acc[g][d] / mass[g];
}

/* dim is a multiple of 4; lanes of K beyond `context` are computed and not used. */
void loriner_attention(float *out, const float *q, const float *k, const float *v,
                       const int32_t *blocks, const int32_t *sequence, const int32_t *context,
                       int rows, int q_stride, int width, int block, int heads, int num_kv, int dim,
                       float scale) {
    attention_job job = {out,      q,     k,     v,     blocks, sequence, context, q_stride,
                         width,    block, heads, num_kv, dim,    scale};
    run_chunks(attention_chunk, &job, rows * num_kv);
}

/* Write each row's key and value into its slot; rows of k and v are their strides apart. */
void loriner_store(float *k_cache, float *v_cache, const float *k, const float *v, const int64_t *slots,
                   int rows, int k_stride, int v_stride, int block, int num_kv, int dim) {
    for (int t = 0; t < rows; t++)
        for (int h = 0; h < num_kv; h++) {
            const size_t at = ((size_t)(slots[t] / block) * num_kv + h) * block * dim;
            const int position = slots[t] % block;
            const float *key = k + (size_t)t * k_stride + h * dim;
            for (int d = 0; d < dim; d++) k_cache[at + (size_t)d * block + position] = key[d];
            memcpy(v_cache + at + (size_t)position * dim, v + (size_t)t * v_stride + h * dim,
                   sizeof(float) * dim);
        }
}

/* ---- small ops, by the calling thread ---- */

/* y = x / sqrt(mean(x^2) + eps) * w, over rows of `dim`; rows of x are `stride` apart */
void loriner_rms_norm(float *y, const float *x, const float *w, int rows, int stride, int dim, float eps) {
    for (int t = 0; t < rows; t++, x += stride, y += dim) {
        const float scale = 1.0f / sqrtf(weighted_sum(x, 0, x, dim, 0) / dim + eps);
        for (int d = 0; d < dim; d++) y[d] = x[d] * scale * w[d];
    }
}

/* rotate pairs (i, i + dim/2) of `heads` heads; sin's first half is negated */
void loriner_rope(float *y, const float *x, const float *cos, const float *sin, int rows, int stride,
                  int heads, int dim) {
    const int half = dim / 2;
    for (int t = 0; t < rows; t++, cos += dim, sin += dim)
        for (int h = 0; h < heads; h++, y += dim) {
            const float *in = x + (size_t)t * stride + (size_t)h * dim;
            for (int d = 0; d < half; d++) y[d] = in[d] * cos[d] + in[d + half] * sin[d];
            for (int d = half; d < dim; d++) y[d] = in[d] * cos[d] + in[d - half] * sin[d];
        }
}

/* y = silu(g) * u, where [g | u] are the two halves of each row of x [rows, 2 * dim] */
void loriner_silu_mul(float *y, const float *x, int rows, int dim) {
    for (int t = 0; t < rows; t++, x += 2 * dim, y += dim)
        for (int d = 0; d < dim; d++) y[d] = x[d] / (1.0f + fast_exp(-x[d])) * x[dim + d];
}
