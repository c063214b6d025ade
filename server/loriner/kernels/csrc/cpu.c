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
#define ROWS 2 /* output rows decoded together */
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
#define ROWS 1
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
#define ROWS 1
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

/* ---- linear: y[t, n] = sum over k of x[t, k] w[n, k] + bias[n] ---- */

typedef struct {
    float *y;
    const float *x;
    const void *weight; /* packed NF4 bytes, or bf16 */
    const float *absmax, *code, *bias;
    int rows, inputs, outputs, chunk;
} linear_job;

/* `tile` rows of x (already in decode order) against `count` rows of NF4 weights */
INLINE void nf4_tile(const linear_job *j, code_table codes, int t, int n, const int tile, const int count) {
    vf acc[TILE][ROWS];
    for (int i = 0; i < tile; i++)
        for (int r = 0; r < count; r++) acc[i][r] = v_set(0.0f);
    const int inputs = j->inputs;
    const uint8_t *packed = (const uint8_t *)j->weight + (size_t)n * inputs / 2;
    const float *scales = j->absmax + (size_t)n * inputs / NF4_BLOCK;
    const float *x = j->x + (size_t)t * inputs;
    for (int k = 0; k < inputs; k += 2 * VL) {
        vf even[ROWS], odd[ROWS];
        for (int r = 0; r < count; r++) {
            vf scale = v_set(scales[r * (inputs / NF4_BLOCK) + k / NF4_BLOCK]);
            decode(packed + (size_t)r * inputs / 2 + k / 2, codes, &even[r], &odd[r]);
            even[r] = v_mul(even[r], scale);
            odd[r] = v_mul(odd[r], scale);
        }
        for (int i = 0; i < tile; i++) {
            vf x0 = v_load(x + (size_t)i * inputs + k), x1 = v_load(x + (size_t)i * inputs + k + VL);
            for (int r = 0; r < count; r++) {
                acc[i][r] = v_fma(even[r], x0, acc[i][r]);
                acc[i][r] = v_fma(odd[r], x1, acc[i][r]);
            }
        }
    }
    for (int i = 0; i < tile; i++)
        for (int r = 0; r < count; r++)
            j->y[(size_t)(t + i) * j->outputs + n + r] =
                v_sum(acc[i][r]) + (j->bias ? j->bias[n + r] : 0.0f);
}

INLINE void bf16_tile(const linear_job *j, int t, int n, const int tile, const int count) {
    vf acc[TILE][ROWS];
    for (int i = 0; i < tile; i++)
        for (int r = 0; r < count; r++) acc[i][r] = v_set(0.0f);
    const int inputs = j->inputs;
    const uint16_t *weight = (const uint16_t *)j->weight + (size_t)n * inputs;
    const float *x = j->x + (size_t)t * inputs;
    for (int k = 0; k < inputs; k += VL) {
        vf w[ROWS];
        for (int r = 0; r < count; r++) w[r] = v_bf16(weight + (size_t)r * inputs + k);
        for (int i = 0; i < tile; i++) {
            vf xi = v_load(x + (size_t)i * inputs + k);
            for (int r = 0; r < count; r++) acc[i][r] = v_fma(w[r], xi, acc[i][r]);
        }
    }
    for (int i = 0; i < tile; i++)
        for (int r = 0; r < count; r++)
            j->y[(size_t)(t + i) * j->outputs + n + r] =
                v_sum(acc[i][r]) + (j->bias ? j->bias[n + r] : 0.0f);
}

/* Call TILE_FN(tile, count) with both as constants, so that accumulators stay in registers. */
#define BY_TILE(tile, count, CALL)                                                                  \
    switch (tile) {                                                                                 \
        case 1: CALL(1, count); break;                                                              \
        case 2: CALL(2, count); break;                                                              \
        case 3: CALL(3, count); break;                                                              \
        case 4: CALL(4, count); break;                                                              \
        case 5: CALL(5, count); break;                                                              \
        case 6: CALL(6, count); break;                                                              \
        case 7: CALL(7, count); break;                                                              \
        default: CALL(8, count); break;                                                             \
    }

static void nf4_chunk(void *job, int chunk) {
    const linear_job *j = job;
    code_table codes = load_codes(j->code);
    int end = min_int((chunk + 1) * j->chunk, j->outputs);
    for (int t = 0; t < j->rows; t += TILE) {
        int tile = min_int(TILE, j->rows - t), n = chunk * j->chunk;
        for (; n + ROWS <= end; n += ROWS) {
#define CALL(tile, count) nf4_tile(j, codes, t, n, tile, count)
            BY_TILE(tile, ROWS, CALL)
        }
        for (; n < end; n++) { BY_TILE(tile, 1, CALL) }
#undef CALL
    }
}

static void bf16_chunk(void *job, int chunk) {
    const linear_job *j = job;
    int end = min_int((chunk + 1) * j->chunk, j->outputs);
    for (int t = 0; t < j->rows; t += TILE) {
        int tile = min_int(TILE, j->rows - t), n = chunk * j->chunk;
        for (; n + ROWS <= end; n += ROWS) {
#define CALL(tile, count) bf16_tile(j, t, n, tile, count)
            BY_TILE(tile, ROWS, CALL)
        }
        for (; n < end; n++) { BY_TILE(tile, 1, CALL) }
#undef CALL
    }
}

/* Outputs of one chunk, a multiple of 4: a few chunks for each thread, since claiming one costs about as
 * much as computing 16 outputs of 576 inputs. */
INLINE int chunk_rows(int outputs) {
    int chunks = 4 * (pool.num_workers + 1);
    int rows = (outputs + chunks - 1) / chunks;
    return (rows + 3) & ~3;
}

/* x [rows, inputs] -> decode order: in each 2*VL inputs the even ones first, then the odd ones */
static void to_decode_order(const float *x, float *out, size_t count) {
    for (size_t k = 0; k < count; k += 2 * VL)
        for (int i = 0; i < VL; i++) {
            out[k + i] = x[k + 2 * i];
            out[k + VL + i] = x[k + 2 * i + 1];
        }
}

/* `scratch` has room for rows * inputs floats; inputs is a multiple of 64. */
void loriner_nf4_linear(float *y, const float *x, float *scratch, const uint8_t *packed,
                        const float *absmax, const float *code, const float *bias, int rows,
                        int inputs, int outputs) {
    to_decode_order(x, scratch, (size_t)rows * inputs);
    linear_job job = {y, scratch, packed, absmax, code, bias, rows, inputs, outputs, chunk_rows(outputs)};
    run_chunks(nf4_chunk, &job, (outputs + job.chunk - 1) / job.chunk);
}

/* inputs is a multiple of 16. */
void loriner_bf16_linear(float *y, const float *x, const uint16_t *weight, const float *bias, int rows,
                         int inputs, int outputs) {
    linear_job job = {y, x, weight, NULL, NULL, bias, rows, inputs, outputs, chunk_rows(outputs)};
    run_chunks(bf16_chunk, &job, (outputs + job.chunk - 1) / job.chunk);
}

/* ---- lora: y[t, o:o+n] += (x[t] A[r0:r1]^T) B + bias, for the adapter of row t ---- */

typedef struct {
    int32_t offset, rank_start, rank_end, outputs;
    const float *b, *bias; /* [rank, outputs], [outputs] */
} lora_part;

typedef struct {
    int32_t start, end, rank, num_parts;
    const float *a; /* [rank, inputs] */
    const lora_part *parts;
} lora_segment;

typedef struct {
    float *y;
    const float *x;
    const lora_segment *segments;
    const int32_t *first_chunk; /* of each segment, and one past the last */
    int num_segments, inputs, outputs;
} lora_job;

#define MAX_RANK 1024 /* of all slices of one fused linear together */

static float dot(const float *a, const float *b, int count) {
    vf sum = v_set(0.0f);
    int k = 0;
    for (; k + VL <= count; k += VL) sum = v_fma(v_load(a + k), v_load(b + k), sum);
    float total = v_sum(sum);
    for (; k < count; k++) total += a[k] * b[k];
    return total;
}

static void expand(float *y, const float *z, const lora_part *part) {
    const int n = part->outputs, rank = part->rank_end - part->rank_start;
    const float *b = part->b;
    int c = 0;
    for (; c + 4 * VL <= n; c += 4 * VL) {
        vf acc[4];
        for (int v = 0; v < 4; v++) acc[v] = v_set(0.0f);
        for (int r = 0; r < rank; r++) {
            vf scale = v_set(z[r]);
            for (int v = 0; v < 4; v++)
                acc[v] = v_fma(scale, v_load(b + (size_t)r * n + c + v * VL), acc[v]);
        }
        for (int v = 0; v < 4; v++) v_store(y + c + v * VL, acc[v] + v_load(y + c + v * VL));
    }
    for (; c < n; c++) {
        float sum = 0.0f;
        for (int r = 0; r < rank; r++) sum += z[r] * b[(size_t)r * n + c];
        y[c] += sum;
    }
    if (part->bias)
        for (c = 0; c < n; c++) y[c] += part->bias[c];
}

static void lora_chunk(void *job, int chunk) {
    const lora_job *j = job;
    int s = 0;
    while (j->first_chunk[s + 1] <= chunk) s++;
    const lora_segment *segment = &j->segments[s];
    int start = segment->start + (chunk - j->first_chunk[s]) * TILE;
    int end = min_int(start + TILE, segment->end);
    float z[TILE][MAX_RANK];
    for (int r = 0; r < segment->rank; r++)
        for (int t = start; t < end; t++)
            z[t - start][r] =
                dot(segment->a + (size_t)r * j->inputs, j->x + (size_t)t * j->inputs, j->inputs);
    for (int p = 0; p < segment->num_parts; p++) {
        const lora_part *part = &segment->parts[p];
        for (int t = start; t < end; t++)
            expand(j->y + (size_t)t * j->outputs + part->offset, z[t - start] + part->rank_start, part);
    }
}

void loriner_lora_add(float *y, const float *x, const lora_segment *segments,
                      const int32_t *first_chunk, int num_segments, int inputs, int outputs) {
    lora_job job = {y, x, segments, first_chunk, num_segments, inputs, outputs};
    run_chunks(lora_chunk, &job, first_chunk[num_segments]);
}

/* ---- attention: out[t, h] = softmax(scale q[t, h] K^T) V over the first context[t] keys of its sequence ---- */

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

static void attention_chunk(void *job, int chunk) {
    const attention_job *j = job;
    const int row = chunk / j->num_kv, head = chunk % j->num_kv;
    const int group = j->heads / j->num_kv, dim = j->dim, context = j->context[row];
    const int32_t *blocks = j->blocks + (size_t)j->sequence[row] * j->width;
    const float *q = j->q + (size_t)row * j->q_stride + (size_t)head * group * dim;
    const size_t stride = (size_t)j->num_kv * dim;
    float acc[MAX_GROUP][MAX_DIM], largest[MAX_GROUP], mass[MAX_GROUP], p[MAX_BLOCK];
    for (int g = 0; g < group; g++) {
        largest[g] = -INFINITY;
        mass[g] = 0.0f;
        memset(acc[g], 0, sizeof(float) * dim);
    }
    for (int base = 0; base < context; base += j->block) { /* online softmax, arXiv 1805.02867 */
        const int count = min_int(j->block, context - base);
        const size_t first = ((size_t)blocks[base / j->block] * j->block) * stride + (size_t)head * dim;
        for (int g = 0; g < group; g++) {
            float peak = largest[g];
            for (int i = 0; i < count; i++) {
                p[i] = j->scale * dot(q + g * dim, j->k + first + i * stride, dim);
                if (!(p[i] <= peak)) peak = p[i]; /* a NaN becomes the peak and stays in this row */
            }
            const float shrink = base ? fast_exp(largest[g] - peak) : 0.0f;
            mass[g] *= shrink;
            for (int d = 0; d < dim; d++) acc[g][d] *= shrink;
            largest[g] = peak;
            for (int i = 0; i < count; i++) p[i] = fast_exp(p[i] - peak);
            for (int i = 0; i < count; i++) {
                const float weight = p[i];
                const float *v = j->v + first + i * stride;
                mass[g] += weight;
                for (int d = 0; d < dim; d++) acc[g][d] += weight * v[d];
            }
        }
    }
    float *out = j->out + ((size_t)row * j->heads + (size_t)head * group) * dim;
    for (int g = 0; g < group; g++)
        for (int d = 0; d < dim; d++) out[g * dim + d] = acc[g][d] / mass[g];
}

void loriner_attention(float *out, const float *q, const float *k, const float *v,
                       const int32_t *blocks, const int32_t *sequence, const int32_t *context,
                       int rows, int q_stride, int width, int block, int heads, int num_kv, int dim,
                       float scale) {
    attention_job job = {out,      q,     k,     v,     blocks, sequence, context, q_stride,
                         width,    block, heads, num_kv, dim,    scale};
    run_chunks(attention_chunk, &job, rows * num_kv);
}

/* ---- small ops, by the calling thread ---- */

/* y = x / sqrt(mean(x^2) + eps) * w, over rows of `dim`; rows of x are `stride` apart */
void loriner_rms_norm(float *y, const float *x, const float *w, int rows, int stride, int dim, float eps) {
    for (int t = 0; t < rows; t++, x += stride, y += dim) {
        const float scale = 1.0f / sqrtf(dot(x, x, dim) / dim + eps);
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

/* cache[slots[t]] = x[t]; rows of x are `stride` apart and `dim` long */
void loriner_store(float *cache, const float *x, const int64_t *slots, int rows, int stride, int dim) {
    for (int t = 0; t < rows; t++)
        memcpy(cache + (size_t)slots[t] * dim, x + (size_t)t * stride, sizeof(float) * dim);
}

/* y = silu(g) * u, where [g | u] are the two halves of each row of x [rows, 2 * dim] */
void loriner_silu_mul(float *y, const float *x, int rows, int dim) {
    for (int t = 0; t < rows; t++, x += 2 * dim, y += dim)
        for (int d = 0; d < dim; d++) y[d] = x[d] / (1.0f + fast_exp(-x[d])) * x[dim + d];
}
