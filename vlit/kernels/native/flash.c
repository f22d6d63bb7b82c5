/* Fused attention in bfloat16 for CPUs with AVX512-BF16, forward and backward; sums, softmax and gradients in float.
 *
 *     S = scale q k^T,  P = 2^(S log2(e) - lse),  o = P v
 *     dV = P^T dO,  dS = P (dO v^T - delta),  dQ = scale dS k,  dK = scale dS^T q,  delta = rowsum(dO o)
 *
 * A tile of up to LANES query rows meets STEP keys at a time: first the prefix all its rows see, then, run by run, the keys of
 * the run's own segment. Scores that nobody needs are skipped by 16 lanes x 8 keys. Lanes of other segments are masked out of
 * every store and every contraction, so that a NaN stays among those who see it. Neither the number of threads nor their
 * timing changes a result. FlashAttention-2 (arXiv:2307.08691) with the queries along the lanes.
 */
#if defined(__AVX512BF16__) && defined(__AVX512VL__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#include "flash.h"

enum { TASKS = 8 }; /* a single sample is cut into at least so many tasks in the backward pass */

/* Scores of a vector -> pairs of weights relative to the running maximum, over the front half of the scores' own memory. */
static void weigh(Work *w, Seen seen, int v, __mmask16 lanes) {
    float *column = w->scores + 16 * v;
    const __m512 scale = _mm512_set1_ps(w->scale2), before = _mm512_loadu_ps(w->top + 16 * v);
    __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < seen.all; j++) most = _mm512_max_ps(most, _mm512_loadu_ps(column + j * LANES));
    for (int64_t j = seen.all; j < seen.some; j++)
        most = _mm512_mask_max_ps(most, lanes_seeing(seen, j), most, _mm512_loadu_ps(column + j * LANES));
    const __m512 top = _mm512_mask_max_ps(before, lanes, before, _mm512_mul_ps(most, scale));
    const __m512 factor = power_of_two(_mm512_sub_ps(before, top)), total = _mm512_loadu_ps(w->total + 16 * v);
    for (int64_t j = 0; j < seen.some; j += 2) {
        __m512 x = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(column + j * LANES), scale, top));
        __m512 y = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(column + j * LANES + LANES), scale, top));
        if (j + 2 > seen.all)
            x = _mm512_maskz_mov_ps(lanes_seeing(seen, j), x), y = _mm512_maskz_mov_ps(lanes_seeing(seen, j + 1), y);
        sum = _mm512_add_ps(sum, _mm512_add_ps(x, y));
        _mm512_storeu_si512(column + j / 2 * LANES, interleave(x, y));
    }
    _mm512_storeu_ps(w->top + 16 * v, top);
    _mm512_storeu_ps(w->factor + 16 * v, factor);
    _mm512_storeu_ps(w->total + 16 * v, _mm512_mask_mov_ps(total, lanes, _mm512_fmadd_ps(total, factor, sum)));
}

static void attend(Work *w, const Range *range) {
    const int64_t step = step_of(range->count), begin = range_begin(range), end = range_end(range), size = w->size;
    int64_t ends[VECTORS];
    __mmask16 lanes[VECTORS];
    for (int64_t from = 0; from < range->count; from += step) {
        int64_t count = smaller(step, range->count - from);
        for (int64_t j = from; j < from + count; j += 8) {
            prefetch_rows(range->keys + (j + 16) * range->key_row, range->key_row, 8, size);
            prefetch(range->pairs + j / 2 * size, 16 * size);
            eight_products(w, range, w->scores + (j - from) * LANES, range->keys, range->key_row, w->q, j);
        }
        for (int v = (int)begin; v < end; v++) {
            Seen seen = seen_by(range, from, count, v);
            ends[v] = (seen.some + 1) / 2, lanes[v] = lanes_of(range, v);
            weigh(w, seen, v, lanes[v]);
        }
        const char *left = (const char *)(range->pairs + from / 2 * size), *right = (const char *)(w->scores + 16 * begin);
        multiply_all_columns((int)(end - begin), size, w->sum + 16 * begin, left, 4 * size, right, ends + begin,
                             w->factor + 16 * begin, lanes + begin);
    }
}

/* 0 in a build without the kernel. */
int vlit_flash_lanes(void) { return LANES; }

/* out = attention; lse[batch][heads][rows] = log2 of the sum of 2^(S log2(e)). Returns 0, or 1: out of memory. */
int vlit_flash_forward(const Problem *p, const View *q, const View *k, const View *v, const View *out, float *lse) {
    const int64_t group = p->heads / p->kv_heads, size = p->size, tasks = p->batch * p->heads * p->num_tiles;
    const int64_t pair_bytes = p->batch * p->kv_heads * p->packed * size * (int64_t)sizeof(bf16);
    int32_t *pairs = (int32_t *)borrow_buffer(kept_by_calls, KEPT / 16, pair_bytes);
    if (!pairs) return 1;
    pack_segments(p, v, pairs);
    int64_t next = 0;
    int failed = 0;
#pragma omp parallel num_threads((int)p->threads) if (p->threads > 1)
    {
        Work *w = borrow_work(p, 0);
        if (!w) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        for (int64_t task; w && (task = take(&next)) < tasks;) {
            const int64_t head = task / p->num_tiles % p->heads, batch = task / p->num_tiles / p->heads, kv = head / group;
            const Tile *tile = p->tiles + task % p->num_tiles;
            place_rows(w, p, tile);
            pack_lanes(w->q, head_of(q, batch, head), q->row, w->rows, w->vectors, size);
            if (task % p->num_tiles + 1 < p->num_tiles)
                prefetch_rows(head_of(q, batch, head) + p->runs[tile[1].first_run].row * q->row, q->row, LANES, size);
            /* the largest score starts finite: a first step of nothing but -inf gives weights of 0, not NaN */
            for (int i = 0; i < LANES; i++) w->top[i] = -1e30f, w->total[i] = 0.0f;
            Range base = {.keys = head_of(k, batch, kv), .key_row = k->row,
                          .pairs = pairs + (batch * p->kv_heads + kv) * p->packed / 2 * size};
            visit_ranges(w, p, tile, base, 0, attend);
            for (int i = 0; i < LANES; i += 16) {
                __m512 total = _mm512_loadu_ps(w->total + i);
                _mm512_storeu_ps(w->factor + i, _mm512_div_ps(_mm512_set1_ps(1.0f), total));
                _mm512_storeu_ps(w->top + i, _mm512_add_ps(_mm512_loadu_ps(w->top + i), log_of_two(total)));
            }
            store_lanes(head_of(out, batch, head), out->row, w->rows, w->vectors, size, w->sum, w->factor);
            for (int i = 0; i < LANES; i++)
                if (w->rows[i] >= 0) lse[(batch * p->heads + head) * p->rows + w->rows[i]] = w->top[i];
        }
        return_work(w);
    }
    return_buffer(kept_by_calls, KEPT / 16, (char *)pairs);
    return failed;
}

/* Scores and gradients of the weights of a vector -> weights and gradients of the scores, as rows; the latter also as pairs. */
static void weigh_backward(Work *w, Seen seen, int v) {
    const __m512 scale = _mm512_set1_ps(w->scale2), lse = _mm512_loadu_ps(w->top + 16 * v);
    const __m512 delta = _mm512_loadu_ps(w->delta + 16 * v);
    for (int64_t j = 0; j < round_up(seen.some, 8); j += 2) {
        __m512 weight[2], slope[2];
        UNROLL for (int i = 0; i < 2; i++) {
            const int64_t at = (j + i) * LANES + 16 * v;
            weight[i] = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(w->scores + at), scale, lse));
            slope[i] = _mm512_mul_ps(weight[i], _mm512_sub_ps(_mm512_loadu_ps(w->slopes + at), delta));
            if (j + i >= seen.all) {
                weight[i] = _mm512_maskz_mov_ps(lanes_seeing(seen, j + i), weight[i]);
                slope[i] = _mm512_maskz_mov_ps(lanes_seeing(seen, j + i), slope[i]);
            }
            _mm256_storeu_si256((__m256i *)(w->weights + at), (__m256i)_mm512_cvtneps_pbh(weight[i]));
            _mm256_storeu_si256((__m256i *)(w->weighed + at), (__m256i)_mm512_cvtneps_pbh(slope[i]));
        }
        _mm512_storeu_si512(w->weighed_pairs + j / 2 * LANES + 16 * v, interleave(slope[0], slope[1]));
    }
}

/* to[8][size] += eight rows of left, [8][LANES], times the packed pairs of rows, over the lanes that see keys j to j + 8. */
INLINE void eight_gradients(const Work *w, const Range *range, float *to, const bf16 *left, const int32_t *packed, int64_t j) {
    const int64_t lane = larger(16 * first_vector(range, j), range->lane_lo), pairs = (range->lane_hi - lane + 1) / 2;
    for (int64_t e = 0; pairs > 0 && e < w->size; e += LANES)
        multiply_eight_rows((int)smaller(VECTORS, (w->size - e) / 16), to + e, w->size, (const char *)(left + lane), 2 * LANES,
                            (const char *)(packed + lane / 2 * w->size + e), 4 * w->size, pairs, 1);
}

static void attend_backward(Work *w, const Range *range) {
    const int64_t step = step_of(range->count), begin = range_begin(range), end = range_end(range), size = w->size;
    int64_t ends[VECTORS];
    __mmask16 lanes[VECTORS];
    for (int64_t from = 0; from < range->count; from += step) {
        int64_t count = smaller(step, range->count - from);
        for (int64_t j = from; j < from + count; j += 8) {
            prefetch_rows(range->values + j * range->value_row, range->value_row, 8, size);
            prefetch(range->pairs + j / 2 * size, 16 * size);
            eight_products(w, range, w->scores + (j - from) * LANES, range->keys, range->key_row, w->q, j);
        }
        for (int64_t j = from; j < from + count; j += 8) {
            prefetch_rows(range->keys + (j + step) * range->key_row, range->key_row, 8, size);
            eight_products(w, range, w->slopes + (j - from) * LANES, range->values, range->value_row, w->grad, j);
        }
        for (int v = (int)begin; v < end; v++) {
            Seen seen = seen_by(range, from, count, v);
            ends[v] = (seen.some + 1) / 2, lanes[v] = lanes_of(range, v);
            weigh_backward(w, seen, v);
        }
        for (int64_t j = from; j < from + count; j += 8)
            eight_gradients(w, range, range->grad_values + j * size, w->weights + (j - from) * LANES, w->grad_pairs, j);
        for (int64_t j = from; j < from + count; j += 8)
            eight_gradients(w, range, range->grad_keys + j * size, w->weighed + (j - from) * LANES, w->q_pairs, j);
        const char *left = (const char *)(range->pairs + from / 2 * size);
        const char *right = (const char *)(w->weighed_pairs + 16 * begin);
        multiply_all_columns((int)(end - begin), size, w->sum + 16 * begin, left, 4 * size, right, ends + begin,
                             w->factor + 16 * begin, lanes + begin);
    }
}

static float dot(const bf16 *x, const bf16 *y, int64_t size) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t e = 0; e < size; e += 32) {
        __mmask16 mask = first_words((size - e) / 2);
        sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_maskz_loadu_epi32(mask, x + e),
                               (__m512bh)_mm512_maskz_loadu_epi32(mask, y + e));
    }
    return _mm512_reduce_add_ps(sum);
}

/* The tensors of the backward pass; lse as the forward pass left it. */
typedef struct {
    const View *q, *k, *v, *out, *grad, *grad_q, *grad_k, *grad_v;
    const float *lse;
} Tensors;

static void prefetch_tile(const Problem *p, const Tensors *x, const Tile *tile, int64_t batch, int64_t head) {
    const View *views[] = {x->q, x->grad, x->out};
    for (int i = 0; i < 3; i++) {
        const int64_t stride = views[i]->row;
        prefetch_rows(head_of(views[i], batch, head) + p->runs[tile->first_run].row * stride, stride, LANES, p->size);
    }
}

/* One tile of one head: its rows of dQ; its share is added to the dK and dV of the base. */
static void tile_backward(Work *w, const Problem *p, const Tensors *x, const Tile *tile, int64_t batch, int64_t head,
                          Range base, int64_t origin) {
    const bf16 *q = head_of(x->q, batch, head), *grad = head_of(x->grad, batch, head), *out = head_of(x->out, batch, head);
    place_rows(w, p, tile);
    pack_lanes(w->q, q, x->q->row, w->rows, w->vectors, p->size);
    pack_lanes(w->grad, grad, x->grad->row, w->rows, w->vectors, p->size);
    for (int lane = 0; lane < 16 * w->vectors; lane += 2) {
        const int64_t *rows = w->rows + lane, at = lane / 2 * p->size;
        pack_pair(w->q_pairs + at, q, x->q->row, rows[0], rows[1], p->size);
        pack_pair(w->grad_pairs + at, grad, x->grad->row, rows[0], rows[1], p->size);
    }
    for (int lane = 0; lane < LANES; lane++) {
        const int64_t row = w->rows[lane];
        /* a lane without a row has q = dO = 0: whatever its weights are, it adds 0 */
        w->top[lane] = row < 0 ? 0.0f : x->lse[(batch * p->heads + head) * p->rows + row];
        w->delta[lane] = row < 0 ? 0.0f : dot(out + row * x->out->row, grad + row * x->grad->row, p->size);
        w->factor[lane] = 1.0f;
    }
    visit_ranges(w, p, tile, base, origin, attend_backward);
    for (int lane = 0; lane < LANES; lane++) w->factor[lane] = (float)p->scale;
    store_lanes(head_of(x->grad_q, batch, head), x->grad_q->row, w->rows, w->vectors, p->size, w->sum, w->factor);
}

/* The tiles of a tree are dealt to `parts` tasks with float sums of dK and dV of their own: few heads can keep many threads
 * busy, and no two threads add to the same sum. `offset`: floats before the tree's sums, if it has several parts. */
typedef struct { int64_t parts, first_task, offset; } Share;

static int64_t packed_rows(const Problem *p, const Tree *tree) {
    const Segment *last = p->segments + tree->last_segment - 1;
    return last->packed + round_up(last->length, 8) - p->segments[tree->first_segment].packed;
}

/* shares[num_trees + 1]; the last one holds the totals of one key head. */
static void share_out(const Problem *p, Share *shares) {
    int64_t cost = 0;
    Share next = {0, 0, 0};
    for (int64_t t = 0; t < p->num_trees; t++) cost += p->trees[t].cost;
    for (int64_t t = 0; t < p->num_trees; t++) {
        const Tree *tree = p->trees + t;
        int64_t most = (tree->last_tile - tree->first_tile) * (p->heads / p->kv_heads), whole = cost * p->batch * p->kv_heads;
        next.parts = smaller(most, (TASKS * tree->cost + whole - 1) / whole);
        shares[t] = next;
        next.first_task += next.parts;
        if (next.parts > 1) next.offset += 2 * next.parts * packed_rows(p, tree) * p->size;
    }
    shares[p->num_trees] = next;
}

/* Rows [from, to) of a segment: the sums of all parts, added in order, become bf16 gradients. `both` numbers batch and key
 * head together. */
static void store_gradients(const Problem *p, const Tensors *x, const Segment *s, int64_t both, const float *sums,
                            int64_t parts, int64_t from, int64_t to) {
    const Tree *tree = p->trees + s->tree;
    const int64_t values = packed_rows(p, tree) * p->size, first = s->packed - p->segments[tree->first_segment].packed;
    bf16 *grad_k = head_of(x->grad_k, both / p->kv_heads, both % p->kv_heads) + s->start * x->grad_k->row;
    bf16 *grad_v = head_of(x->grad_v, both / p->kv_heads, both % p->kv_heads) + s->start * x->grad_v->row;
    for (int64_t r = from; r < to; r++)
        for (int64_t e = 0; e < p->size; e += 16) {
            const float *part = sums + (first + r) * p->size + e;
            __m512 key = _mm512_loadu_ps(part), value = _mm512_loadu_ps(part + values);
            for (int64_t i = 1; i < parts; i++) {
                part += 2 * values;
                key = _mm512_add_ps(key, _mm512_loadu_ps(part)), value = _mm512_add_ps(value, _mm512_loadu_ps(part + values));
            }
            key = _mm512_mul_ps(key, _mm512_set1_ps((float)p->scale));
            _mm256_storeu_si256((__m256i *)(grad_k + r * x->grad_k->row + e), (__m256i)_mm512_cvtneps_pbh(key));
            _mm256_storeu_si256((__m256i *)(grad_v + r * x->grad_v->row + e), (__m256i)_mm512_cvtneps_pbh(value));
        }
}

/* Gradients of q, k, v from that of the result. Returns 0, or 1: out of memory. */
int vlit_flash_backward(const Problem *p, const Tensors *x) {
    const int64_t size = p->size, group = p->heads / p->kv_heads, kv_count = p->batch * p->kv_heads;
    Share *shares = malloc((p->num_trees + 1) * sizeof(Share));
    if (!shares) return 1;
    share_out(p, shares);
    const Share all = shares[p->num_trees];
    int64_t most_rows = 0, next = 0;
    for (int64_t t = 0; t < p->num_trees; t++)
        if (shares[t].parts == 1) most_rows = larger(most_rows, packed_rows(p, p->trees + t));
    const int64_t pair_bytes = kv_count * p->packed * size * (int64_t)sizeof(bf16); /* a multiple of 64 */
    char *memory = borrow_buffer(kept_by_calls, KEPT / 16, pair_bytes + kv_count * all.offset * (int64_t)sizeof(float));
    int32_t *pairs = (int32_t *)memory;
    float *split_sums = memory ? (float *)(memory + pair_bytes) : 0;
    int failed = !memory;
    if (!failed) pack_segments(p, x->k, pairs);
    int64_t tasks = failed ? 0 : kv_count * all.first_task;
#pragma omp parallel num_threads((int)p->threads) if (p->threads > 1)
    {
        Work *w = borrow_work(p, most_rows);
        if (!w) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        for (int64_t task; w && (task = take(&next)) < tasks;) {
            const int64_t both = task / all.first_task, number = task % all.first_task;
            const int64_t batch = both / p->kv_heads, kv = both % p->kv_heads;
            const Share *share = shares;
            while (share[1].first_task <= number) share++;
            const Tree *tree = p->trees + (share - shares);
            const int64_t rows = packed_rows(p, tree), part = number - share->first_task;
            float *sums = w->own_sums;
            if (share->parts > 1) sums = split_sums + both * all.offset + share->offset + part * 2 * rows * size;
            memset(sums, 0, 2 * rows * size * sizeof(float));
            Range base = {.keys = head_of(x->k, batch, kv), .key_row = x->k->row, .values = head_of(x->v, batch, kv),
                          .value_row = x->v->row, .pairs = pairs + both * p->packed / 2 * size, .grad_keys = sums,
                          .grad_values = sums + rows * size};
            const int64_t origin = p->segments[tree->first_segment].packed, tiles = tree->last_tile - tree->first_tile;
            for (int64_t i = part, next_i; i < tiles * group; i = next_i) {
                next_i = i + share->parts;
                if (next_i < tiles * group)
                    prefetch_tile(p, x, p->tiles + tree->first_tile + next_i / group, batch, kv * group + next_i % group);
                tile_backward(w, p, x, p->tiles + tree->first_tile + i / group, batch, kv * group + i % group, base, origin);
            }
            for (int64_t s = tree->first_segment; share->parts == 1 && s < tree->last_segment; s++)
                store_gradients(p, x, p->segments + s, both, sums, 1, 0, p->segments[s].length);
        }
        return_work(w);
    }
    next = 0, tasks = failed || !all.offset ? 0 : kv_count * p->num_segments * TASKS;
#pragma omp parallel num_threads((int)p->threads) if (p->threads > 1 && tasks)
    for (int64_t task; (task = take(&next)) < tasks;) {
        const int64_t both = task / TASKS / p->num_segments, piece = task % TASKS;
        const Segment *s = p->segments + task / TASKS % p->num_segments;
        const Share *share = shares + s->tree;
        if (share->parts > 1)
            store_gradients(p, x, s, both, split_sums + both * all.offset + share->offset, share->parts,
                            piece * s->length / TASKS, (piece + 1) * s->length / TASKS);
    }
    return_buffer(kept_by_calls, KEPT / 16, memory);
    free(shares);
    return failed;
}
#else
int vlit_flash_lanes(void) { return 0; }
#endif
