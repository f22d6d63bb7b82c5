/* Fused attention in bfloat16 for CPUs with AVX512-BF16, forward and backward; sums, softmax and gradients in float.
 *
 *     S = scale q k^T,  P = 2^(S log2(e) - lse),  o = P v
 *     dV = P^T dO,  dS = P (dO v^T - delta),  dQ = scale dS k,  dK = scale dS^T q,  delta = rowsum(dO o)
 *
 * LANES query rows (a tile) meet STEP keys at a time. A tile's rows see the same prefix; then each run of them (rows of one
 * segment) sees keys of its own segment. Scores that nobody needs are skipped 16 lanes by 8 keys. Results depend neither on
 * the number of threads nor on their timing. FlashAttention-2 (arXiv:2307.08691) with keys along the rows of a tile.
 */
#if defined(__AVX512BF16__) && defined(__AVX512VL__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#include "tiles.h"

#include <stdlib.h>
#include <string.h>

#ifndef STEP
#define STEP 128
#endif
#ifndef BACKWARD_STEP
#define BACKWARD_STEP 64
#endif
#ifndef PF
#define PF 16
#endif
#ifndef TASKS
#define TASKS 16
#endif
#define LOWEST -1e30f /* below any score; finite, so that a lane that has seen nothing yet computes 2^0, not NaN */
#define EVERY_LANE ((int64_t)1 << 40)

typedef struct { bf16 *data; int64_t batch, head, row; } View; /* strides in elements; elements of a row are adjacent */
typedef struct { int64_t start, length, packed, tree; } Segment; /* packed: rows before it when segments are padded to 8 rows */
typedef struct { int64_t row, count, lane, segment; } Run;     /* rows [row, row + count) of a segment at lane, lane + 1, ... */
typedef struct { int64_t first_run, last_run, prefix, cost; } Tile;              /* prefix: a segment, -1: none */
typedef struct { int64_t first_tile, last_tile, first_segment, last_segment, cost; } Tree; /* tiles that share no key with others */
typedef struct {
    int64_t batch, heads, kv_heads, rows, size, causal, threads, num_segments, num_tiles, num_trees, packed;
    double scale;
    const Segment *segments;
    const Run *runs;
    const Tile *tiles;
    const Tree *trees;
} Problem;

/* The query rows of a tile and everything that is computed for them. */
typedef struct {
    int64_t rows[LANES], size;
    int vectors;
    float scale2;
    int32_t *q, *q_pairs, *grad, *grad_pairs; /* [size / 2][LANES] and [LANES / 2][size] pairs */
    float *scores, *slopes, *sum;             /* [STEP][LANES], the same, [size][LANES] */
    bf16 *weights, *weight_slopes;            /* [STEP][LANES] */
    int32_t *slope_pairs;                     /* [STEP / 2][LANES] */
    bf16 *last_keys, *last_values;            /* [8][size] */
    float top[LANES], total[LANES], factor[LANES], delta[LANES];
} Work;

/* Keys that lanes [lane_lo, lane_hi) see: lane i sees key j < count if j <= i + diagonal. */
typedef struct {
    const bf16 *keys, *values;  /* rows */
    const char *pairs;          /* pairs of value rows (forward) or key rows (backward) */
    int64_t key_stride, value_stride, count, readable, diagonal, lane_lo, lane_hi;
    float *grad_keys, *grad_values; /* [packed rows of a tree][size], of which the range starts at row */
    int64_t origin;                 /* packed rows before the tree */
} Range;

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
static inline bf16 *head_of(const View *x, int64_t batch, int64_t head) { return x->data + batch * x->batch + head * x->head; }

static void *carve(char **memory, int64_t bytes) {
    void *part = *memory;
    *memory += round_up(bytes, 64);
    return part;
}

/* One thread's buffers, to be freed by free(); 0: out of memory. */
static Work *new_work(int64_t size, float scale2) {
    int64_t lanes = LANES * sizeof(float), packed = size / 2 * lanes, step = larger(STEP, BACKWARD_STEP);
    int64_t bytes = round_up(sizeof(Work), 64) + 6 * packed + 4 * step * lanes + 2 * 8 * size * sizeof(bf16) + 4096;
    char *memory = aligned_alloc(64, round_up(bytes, 64));
    if (!memory) return 0;
    Work *w = carve(&memory, sizeof(Work));
    w->size = size, w->scale2 = scale2;
    w->q = carve(&memory, packed), w->q_pairs = carve(&memory, packed);
    w->grad = carve(&memory, packed), w->grad_pairs = carve(&memory, packed);
    w->sum = carve(&memory, 2 * packed);
    w->scores = carve(&memory, step * lanes), w->slopes = carve(&memory, step * lanes);
    w->weights = carve(&memory, step * lanes / 2), w->weight_slopes = carve(&memory, step * lanes / 2);
    w->slope_pairs = carve(&memory, step * lanes / 2);
    w->last_keys = carve(&memory, 8 * size * sizeof(bf16)), w->last_values = carve(&memory, 8 * size * sizeof(bf16));
    return w;
}

static int64_t keys_seen(const Problem *p, const Run *run) {
    const Segment *own = p->segments + run->segment;
    return p->causal ? run->row + run->count - own->start : own->length;
}

static void place_rows(Work *w, const Problem *p, const Tile *tile) {
    int64_t lanes = 0;
    for (int i = 0; i < LANES; i++) w->rows[i] = -1;
    for (const Run *run = p->runs + tile->first_run; run < p->runs + tile->last_run; run++) {
        for (int64_t i = 0; i < run->count; i++) w->rows[run->lane + i] = run->row + i;
        lanes = run->lane + run->count;
    }
    w->vectors = (int)((lanes + 15) / 16);
}

/* First vector of the range that sees key j; its end if none does. */
static inline int first_vector(const Range *range, int64_t j) {
    int64_t lane = larger(j - range->diagonal, range->lane_lo) / 16;
    return (int)smaller(lane, (range->lane_hi + 15) / 16);
}

static inline void prefetch(const void *from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)from + i, 0, 2);
}

static void prefetch_rows(const bf16 *x, int64_t stride, int64_t rows, int64_t size) {
    for (int64_t i = 0; i < rows; i++) prefetch(x + i * stride, 2 * size);
}

/* to[8 keys][lanes that see them] = rows j.. of x times the packed rows; rows beyond the tensor read as zeros. */
INLINE void eight_products(const Work *w, const Range *range, float *to, const bf16 *x, int64_t stride, bf16 *last, const int32_t *packed,
                           int64_t j) {
    int first = first_vector(range, j), end = (int)((range->lane_hi + 15) / 16);
    if (first >= end) return;
    const bf16 *row = x + j * stride;
    if (j + 8 > range->readable) {
        memset(last, 0, 8 * w->size * sizeof(bf16));
        for (int64_t i = j; i < range->readable; i++) memcpy(last + (i - j) * w->size, x + i * stride, w->size * sizeof(bf16));
        row = last, stride = w->size;
    }
    multiply_eight_rows(end - first, to + 16 * first, LANES, (const char *)row, 2 * stride, (const char *)(packed + 16 * first), 4 * LANES,
                        w->size / 2, 0);
}

/* Keys of a step that at least one lane, and that every lane of vector v sees. */
typedef struct { int64_t some, every, edge; } Seen;

INLINE Seen seen_by(const Range *range, int64_t from, int64_t count, int v) {
    int64_t edge = 16 * v + range->diagonal - from;
    Seen seen = {larger(0, smaller(count, edge + 16)), larger(0, smaller(count, edge + 1)), edge};
    return seen;
}

INLINE __mmask16 lanes_seeing(Seen seen, int64_t j) {
    return j < seen.every ? 0xffff : j < seen.some ? (__mmask16)(0xffffu << (j - seen.edge)) : 0;
}

/* Scores of a vector -> weights relative to the running maximum, as pairs over the front half of the scores' own memory. */
static void weigh(Work *w, const Range *range, Seen seen, int v, __mmask16 lanes) {
    float *column = w->scores + 16 * v;
    __m512 before = _mm512_loadu_ps(w->top + 16 * v), top = before, scale = _mm512_set1_ps(w->scale2);
    __m512 most = _mm512_set1_ps(-INFINITY);
    for (int64_t j = 0; j < seen.every; j++) most = _mm512_max_ps(most, _mm512_loadu_ps(column + j * LANES));
    for (int64_t j = seen.every; j < seen.some; j++) {
        most = _mm512_mask_max_ps(most, lanes_seeing(seen, j), most, _mm512_loadu_ps(column + j * LANES));
    }
    top = _mm512_mask_max_ps(before, lanes, before, _mm512_mul_ps(most, scale));
    __m512 sum = _mm512_setzero_ps(), factor = power_of_two(_mm512_sub_ps(before, top));
    char *pairs = (char *)column;
    int64_t j = 0;
    for (; j + 2 <= seen.every; j += 2) {
        __m512 x = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(column + j * LANES), scale, top));
        __m512 y = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(column + j * LANES + LANES), scale, top));
        sum = _mm512_add_ps(sum, _mm512_add_ps(x, y));
        _mm512_storeu_si512(pairs + j / 2 * LANES * 4, interleave(x, y));
    }
    for (; j < seen.some; j += 2) {
        __m512 x = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(column + j * LANES), scale, top));
        __m512 y = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(column + j * LANES + LANES), scale, top));
        x = _mm512_maskz_mov_ps(lanes_seeing(seen, j), x), y = _mm512_maskz_mov_ps(lanes_seeing(seen, j + 1), y);
        sum = _mm512_add_ps(sum, _mm512_add_ps(x, y));
        _mm512_storeu_si512(pairs + j / 2 * LANES * 4, interleave(x, y));
    }
    __m512 total = _mm512_loadu_ps(w->total + 16 * v);
    _mm512_storeu_ps(w->top + 16 * v, top);
    _mm512_storeu_ps(w->factor + 16 * v, factor);
    _mm512_storeu_ps(w->total + 16 * v, _mm512_mask_mov_ps(total, lanes, _mm512_fmadd_ps(total, factor, sum)));
}

static __mmask16 lanes_of(const Range *range, int v) {
    int64_t from = larger(range->lane_lo - 16 * v, 0), to = smaller(range->lane_hi - 16 * v, 16);
    return first_words(to) & ~first_words(from);
}

static int64_t step_of(int64_t count, int64_t most) { return round_up((count + round_up(count, most) / most - 1) / (round_up(count, most) / most), 8); }

static void attend(Work *w, const Range *range) {
    int first = (int)(range->lane_lo / 16), end = (int)((range->lane_hi + 15) / 16);
    int64_t step = step_of(range->count, STEP), ends[VECTORS];
    __mmask16 lanes[VECTORS];
    for (int v = first; v < end; v++) lanes[v] = lanes_of(range, v);
    for (int64_t from = 0; from < range->count; from += step) {
        int64_t count = smaller(step, range->count - from);
        for (int64_t j = 0; j < count; j += 8) {
            prefetch_rows(range->keys + (from + j + PF) * range->key_stride, range->key_stride, 8, w->size);
            prefetch(range->pairs + (from + j) / 2 * w->size * 4, 4 * w->size * 4);
            eight_products(w, range, w->scores + j * LANES, range->keys, range->key_stride, w->last_keys, w->q, from + j);
        }
        for (int v = first; v < end; v++) {
            Seen seen = seen_by(range, from, count, v);
            ends[v] = (seen.some + 1) / 2;
            weigh(w, range, seen, v, lanes[v]);
        }
        multiply_all_columns(end - first, w->size, w->sum + 16 * first, range->pairs + from / 2 * w->size * 4, w->size * 4,
                             (const char *)(w->scores + 16 * first), ends + first, w->factor + 16 * first, lanes + first);
    }
}

/* What one tile sees: calls `visit` for the prefix, then for every run. */
typedef void Visit(Work *, const Range *);

INLINE void visit_ranges(Work *w, const Problem *p, const Tile *tile, Range base, Visit *visit) {
    for (const Run *run = p->runs + tile->first_run - (tile->prefix >= 0); run < p->runs + tile->last_run; run++) {
        int shared = run < p->runs + tile->first_run;
        const Segment *segment = p->segments + (shared ? tile->prefix : run->segment);
        Range range = base;
        range.keys += segment->start * base.key_stride;
        range.readable = p->rows - segment->start;
        range.pairs += segment->packed / 2 * w->size * 4;
        range.count = shared ? segment->length : keys_seen(p, run);
        range.diagonal = shared || !p->causal ? EVERY_LANE : run->row - segment->start - run->lane;
        range.lane_lo = shared ? 0 : run->lane;
        range.lane_hi = shared ? 16 * w->vectors : run->lane + run->count;
        if (base.values) range.values += segment->start * base.value_stride;
        if (base.grad_keys) {
            range.grad_keys += (segment->packed - base.origin) * w->size;
            range.grad_values += (segment->packed - base.origin) * w->size;
        }
        visit(w, &range);
    }
}

/* pairs[batch * kv_heads][packed / 2][size]: pairs of rows of x, segment by segment; the partner of an odd last row is zero. */
static void pack_segments(const Problem *p, const View *x, int32_t *pairs) {
    int64_t next = 0, tasks = p->batch * p->kv_heads * p->num_segments;
#pragma omp parallel num_threads((int)p->threads) if (p->threads > 1)
    for (int64_t task; (task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < tasks;) {
        int64_t head = task / p->num_segments;
        const Segment *s = p->segments + task % p->num_segments;
        const bf16 *rows = head_of(x, head / p->kv_heads, head % p->kv_heads) + s->start * x->row;
        pack_pairs(pairs + (head * p->packed + s->packed) / 2 * p->size, rows, x->row, 0, s->length, p->size);
    }
}

int vlit_flash_available(void) { return 1; }

/* out = attention, lse[batch][heads][rows] = log2 of the sum of 2^(S log2(e)). Returns 0, or 1: out of memory. */
int vlit_flash_forward(const Problem *p, const View *q, const View *k, const View *v, const View *out, float *lse) {
    int32_t *pairs = aligned_alloc(64, round_up(p->batch * p->kv_heads * p->packed * p->size * (int64_t)sizeof(bf16), 64));
    if (!pairs) return 1;
    pack_segments(p, v, pairs);
    int64_t next = 0, tasks = p->batch * p->heads * p->num_tiles;
    int failed = 0;
#pragma omp parallel num_threads((int)p->threads) if (p->threads > 1)
    {
        Work *w = new_work(p->size, (float)(p->scale * 1.4426950408889634));
        if (!w) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        for (int64_t task; w && (task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < tasks;) {
            int64_t batch = task / p->num_tiles / p->heads, head = task / p->num_tiles % p->heads, kv = head / (p->heads / p->kv_heads);
            const Tile *tile = p->tiles + task % p->num_tiles;
            place_rows(w, p, tile);
            pack_lanes(w->q, head_of(q, batch, head), q->row, w->rows, w->vectors, p->size);
            memset(w->sum, 0, p->size * LANES * sizeof(float));
            for (int i = 0; i < LANES; i++) w->top[i] = LOWEST, w->total[i] = 0.0f;
            Range base = {.keys = head_of(k, batch, kv), .key_stride = k->row,
                          .pairs = (const char *)(pairs + (batch * p->kv_heads + kv) * p->packed / 2 * p->size)};
            visit_ranges(w, p, tile, base, attend);
            for (int i = 0; i < LANES; i += 16) {
                __m512 total = _mm512_loadu_ps(w->total + i);
                _mm512_storeu_ps(w->factor + i, _mm512_div_ps(_mm512_set1_ps(1.0f), total));
                _mm512_storeu_ps(w->top + i, _mm512_add_ps(_mm512_loadu_ps(w->top + i), log_of_two(total)));
            }
            store_lanes(head_of(out, batch, head), out->row, w->rows, w->vectors, p->size, w->sum, w->factor);
            for (int i = 0; i < 16 * w->vectors; i++)
                if (w->rows[i] >= 0) lse[(batch * p->heads + head) * p->rows + w->rows[i]] = w->top[i];
        }
        free(w);
    }
    free(pairs);
    return failed;
}

/* Scores and gradients of the weights of a vector -> weights, gradients of the scores, as rows and (the latter) as pairs. */
static void weigh_backward(Work *w, Seen seen, int v) {
    const __m512 scale = _mm512_set1_ps(w->scale2), lse = _mm512_loadu_ps(w->top + 16 * v), delta = _mm512_loadu_ps(w->delta + 16 * v);
    for (int64_t j = 0; j < round_up(seen.some, 8); j += 2) {
        __m512 weight[2], slope[2];
        UNROLL for (int i = 0; i < 2; i++) {
            int64_t at = (j + i) * LANES + 16 * v;
            weight[i] = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(w->scores + at), scale, lse));
            slope[i] = _mm512_mul_ps(weight[i], _mm512_sub_ps(_mm512_loadu_ps(w->slopes + at), delta));
            if (j + i >= seen.every) {
                weight[i] = _mm512_maskz_mov_ps(lanes_seeing(seen, j + i), weight[i]);
                slope[i] = _mm512_maskz_mov_ps(lanes_seeing(seen, j + i), slope[i]);
            }
            _mm256_storeu_si256((__m256i *)(w->weights + at), (__m256i)_mm512_cvtneps_pbh(weight[i]));
            _mm256_storeu_si256((__m256i *)(w->weight_slopes + at), (__m256i)_mm512_cvtneps_pbh(slope[i]));
        }
        _mm512_storeu_si512(w->slope_pairs + j / 2 * LANES + 16 * v, interleave(slope[0], slope[1]));
    }
}

/* to[8 keys][size] += rows of weights (or of their gradients) times the packed pairs of rows, over the lanes that see the keys. */
INLINE void eight_gradients(const Work *w, const Range *range, float *to, const bf16 *weights, const int32_t *packed, int64_t j) {
    int64_t lane = larger(16 * first_vector(range, j), range->lane_lo), pairs = (range->lane_hi - lane + 1) / 2;
    if (pairs <= 0) return;
    for (int64_t e = 0; e < w->size; e += LANES)
        multiply_eight_rows((int)smaller(VECTORS, (w->size - e) / 16), to + e, w->size, (const char *)(weights + lane), 2 * LANES,
                            (const char *)(packed + lane / 2 * w->size + e), 4 * w->size, pairs, 1);
}

static void attend_backward(Work *w, const Range *range) {
    int first = (int)(range->lane_lo / 16), end = (int)((range->lane_hi + 15) / 16);
    int64_t step = step_of(range->count, BACKWARD_STEP), ends[VECTORS];
    __mmask16 lanes[VECTORS];
    for (int v = first; v < end; v++) lanes[v] = lanes_of(range, v);
    for (int64_t from = 0; from < range->count; from += step) {
        int64_t count = smaller(step, range->count - from);
        for (int64_t j = 0; j < count; j += 8)
            eight_products(w, range, w->scores + j * LANES, range->keys, range->key_stride, w->last_keys, w->q, from + j);
        for (int64_t j = 0; j < count; j += 8)
            eight_products(w, range, w->slopes + j * LANES, range->values, range->value_stride, w->last_values, w->grad, from + j);
        for (int v = first; v < end; v++) {
            Seen seen = seen_by(range, from, count, v);
            ends[v] = (seen.some + 1) / 2;
            weigh_backward(w, seen, v);
        }
        for (int64_t j = 0; j < count; j += 8)
            eight_gradients(w, range, range->grad_values + (from + j) * w->size, w->weights + j * LANES, w->grad_pairs, from + j);
        for (int64_t j = 0; j < count; j += 8)
            eight_gradients(w, range, range->grad_keys + (from + j) * w->size, w->weight_slopes + j * LANES, w->q_pairs, from + j);
        multiply_all_columns(end - first, w->size, w->sum + 16 * first, range->pairs + from / 2 * w->size * 4, w->size * 4,
                             (const char *)(w->slope_pairs + 16 * first), ends + first, w->factor + 16 * first, lanes + first);
    }
}

static float dot(const bf16 *x, const bf16 *y, int64_t size) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t e = 0; e < size; e += 32) {
        __mmask16 mask = first_words((size - e) / 2);
        sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_maskz_loadu_epi32(mask, x + e), (__m512bh)_mm512_maskz_loadu_epi32(mask, y + e));
    }
    return _mm512_reduce_add_ps(sum);
}

/* Tiles of a tree are dealt to `parts` tasks, each with its own float sums of dK and dV, so that few heads keep many threads busy. */
typedef struct { int64_t parts, first_task, offset; } Share; /* offset: floats before the tree's sums, if it has several parts */

static int64_t packed_rows(const Problem *p, const Tree *tree) {
    const Segment *last = p->segments + tree->last_segment - 1;
    return last->packed + round_up(last->length, 8) - p->segments[tree->first_segment].packed;
}

/* shares[num_trees + 1]; the last one holds the totals. */
static void share_out(const Problem *p, Share *shares) {
    int64_t cost = 0, tasks = 0, offset = 0, t = 0;
    for (t = 0; t < p->num_trees; t++) cost += p->trees[t].cost;
    for (t = 0; t < p->num_trees; t++) {
        const Tree *tree = p->trees + t;
        int64_t most = (tree->last_tile - tree->first_tile) * (p->heads / p->kv_heads), whole = cost * p->batch * p->kv_heads;
        Share share = {larger(1, smaller(most, (TASKS * tree->cost + whole - 1) / whole)), tasks, offset};
        tasks += share.parts;
        if (share.parts > 1) offset += 2 * share.parts * packed_rows(p, tree) * p->size;
        shares[t] = share;
    }
    Share total = {0, tasks, offset};
    shares[t] = total;
}

/* Rows [from, to) of a segment: the parts' sums, added in order, become bf16 gradients. */
static void store_gradients(const Problem *p, const Segment *s, const float *sums, int64_t parts, int64_t from, int64_t to, bf16 *grad_k,
                            int64_t k_row, bf16 *grad_v, int64_t v_row) {
    const Tree *tree = p->trees + s->tree;
    int64_t rows = packed_rows(p, tree), origin = p->segments[tree->first_segment].packed;
    for (int64_t r = from; r < to; r++)
        for (int64_t e = 0; e < p->size; e += 16) {
            const float *part = sums + (s->packed - origin + r) * p->size + e;
            __m512 key = _mm512_loadu_ps(part), value = _mm512_loadu_ps(part + rows * p->size);
            for (int64_t i = 1; i < parts; i++) {
                part += 2 * rows * p->size;
                key = _mm512_add_ps(key, _mm512_loadu_ps(part)), value = _mm512_add_ps(value, _mm512_loadu_ps(part + rows * p->size));
            }
            key = _mm512_mul_ps(key, _mm512_set1_ps((float)p->scale));
            _mm256_storeu_si256((__m256i *)(grad_k + (s->start + r) * k_row + e), (__m256i)_mm512_cvtneps_pbh(key));
            _mm256_storeu_si256((__m256i *)(grad_v + (s->start + r) * v_row + e), (__m256i)_mm512_cvtneps_pbh(value));
        }
}

/* Gradients of q, k, v (in their own strides) from that of `out`. Returns 0, or 1: out of memory. */
int vlit_flash_backward(const Problem *p, const View *q, const View *k, const View *v, const View *out, const View *grad, const float *lse,
                        const View *grad_q, const View *grad_k, const View *grad_v) {
    const int64_t size = p->size, group = p->heads / p->kv_heads, kv_count = p->batch * p->kv_heads;
    Share *shares = malloc((p->num_trees + 1) * sizeof(Share));
    if (!shares) return 1;
    share_out(p, shares);
    const Share total = shares[p->num_trees];
    int32_t *pairs = aligned_alloc(64, round_up(kv_count * p->packed * size * (int64_t)sizeof(bf16), 64));
    float *all_sums = aligned_alloc(64, 64 + kv_count * total.offset * (int64_t)sizeof(float));
    int failed = !pairs || !all_sums;
    if (!failed) pack_segments(p, k, pairs);
    int64_t next = 0, tasks = failed ? 0 : kv_count * total.first_task, most_rows = 0;
    for (int64_t t = 0; t < p->num_trees; t++)
        if (shares[t].parts == 1) most_rows = larger(most_rows, packed_rows(p, p->trees + t));
#pragma omp parallel num_threads((int)p->threads) if (p->threads > 1)
    {
        Work *w = new_work(size, (float)(p->scale * 1.4426950408889634));
        float *own_sums = aligned_alloc(64, 64 + 2 * most_rows * size * (int64_t)sizeof(float));
        if (!w || !own_sums) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        for (int64_t task; w && own_sums && (task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < tasks;) {
            int64_t both = task / total.first_task, batch = both / p->kv_heads, kv = both % p->kv_heads, t = 0, number = task % total.first_task;
            while (t + 1 < p->num_trees && shares[t + 1].first_task <= number) t++;
            const Tree *tree = p->trees + t;
            int64_t parts = shares[t].parts, part = number - shares[t].first_task, rows = packed_rows(p, tree);
            float *sums = parts == 1 ? own_sums : all_sums + both * total.offset + shares[t].offset + part * 2 * rows * size;
            memset(sums, 0, 2 * rows * size * sizeof(float));
            Range base = {.keys = head_of(k, batch, kv), .key_stride = k->row, .values = head_of(v, batch, kv), .value_stride = v->row,
                          .pairs = (const char *)(pairs + both * p->packed / 2 * size), .grad_keys = sums, .grad_values = sums + rows * size,
                          .origin = p->segments[tree->first_segment].packed};
            int64_t tiles = tree->last_tile - tree->first_tile;
            for (int64_t i = part; i < tiles * group; i += parts) {
                const Tile *tile = p->tiles + tree->first_tile + i / group;
                int64_t head = kv * group + i % group;
                const bf16 *from = head_of(q, batch, head), *grad_from = head_of(grad, batch, head), *out_from = head_of(out, batch, head);
                place_rows(w, p, tile);
                pack_lanes(w->q, from, q->row, w->rows, w->vectors, size);
                pack_lanes(w->grad, grad_from, grad->row, w->rows, w->vectors, size);
                pack_pairs(w->q_pairs, from, q->row, w->rows, 16 * w->vectors, size);
                pack_pairs(w->grad_pairs, grad_from, grad->row, w->rows, 16 * w->vectors, size);
                for (int lane = 0; lane < LANES; lane++) {
                    int64_t row = w->rows[lane];
                    w->top[lane] = row < 0 ? INFINITY : lse[(batch * p->heads + head) * p->rows + row];
                    w->delta[lane] = row < 0 ? 0.0f : dot(out_from + row * out->row, grad_from + row * grad->row, size);
                    w->factor[lane] = 1.0f;
                }
                memset(w->sum, 0, size * LANES * sizeof(float));
                visit_ranges(w, p, tile, base, attend_backward);
                for (int lane = 0; lane < LANES; lane++) w->factor[lane] = (float)p->scale;
                store_lanes(head_of(grad_q, batch, head), grad_q->row, w->rows, w->vectors, size, w->sum, w->factor);
            }
            for (const Segment *s = p->segments + tree->first_segment; parts == 1 && s < p->segments + tree->last_segment; s++)
                store_gradients(p, s, sums, 1, 0, s->length, head_of(grad_k, batch, kv), grad_k->row, head_of(grad_v, batch, kv), grad_v->row);
        }
        free(own_sums);
        free(w);
    }
    next = 0, tasks = failed || !total.offset ? 0 : kv_count * p->num_segments * TASKS;
#pragma omp parallel num_threads((int)p->threads) if (p->threads > 1 && tasks)
    for (int64_t task; (task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < tasks;) {
        int64_t both = task / TASKS / p->num_segments, piece = task % TASKS, batch = both / p->kv_heads, kv = both % p->kv_heads;
        const Segment *s = p->segments + task / TASKS % p->num_segments;
        const Share *share = shares + s->tree;
        if (share->parts > 1)
            store_gradients(p, s, all_sums + both * total.offset + share->offset, share->parts, piece * s->length / TASKS,
                            (piece + 1) * s->length / TASKS, head_of(grad_k, batch, kv), grad_k->row, head_of(grad_v, batch, kv), grad_v->row);
    }
    free(all_sums);
    free(pairs);
    free(shares);
    return failed;
}
#else
int vlit_flash_available(void) { return 0; }
#endif
