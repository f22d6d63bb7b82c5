/* What the forward and the backward pass of flash.c share: the problem, a thread's buffers, which lanes see which keys. */
#include "tiles.h"

#include <stdlib.h>

typedef struct { bf16 *data; int64_t batch, head, row; } View; /* strides in elements; the elements of a row are adjacent */
typedef struct { int64_t start, length, packed, tree; } Segment; /* packed: rows before it with all segments padded to 8 */
typedef struct { int64_t row, count, lane, segment; } Run; /* rows [row, row + count) of a segment at lane, lane + 1, ... */
typedef struct { int64_t first_run, last_run, prefix; } Tile; /* prefix: a segment all its lanes see, or -1 */
typedef struct { int64_t first_tile, last_tile, first_segment, last_segment, cost; } Tree; /* shares no key with others */
typedef struct {
    int64_t batch, heads, kv_heads, rows, size, causal, threads, num_segments, num_tiles, num_trees, packed;
    double scale;
    const Segment *segments;
    const Run *runs;
    const Tile *tiles;
    const Tree *trees;
} Problem;

enum { STEP = 128 }; /* most keys a tile meets at a time */

/* One thread's buffers: the rows of a tile and all that is computed for them. */
typedef struct {
    int64_t rows[LANES], size;
    int vectors;
    float scale2;              /* scale * log2(e) */
    int32_t *q, *q_pairs;      /* [size / 2][LANES] and [LANES / 2][size] pairs of q */
    int32_t *grad, *grad_pairs; /* the same of the result's gradient */
    float *scores, *slopes;    /* [STEP][LANES]; slopes: gradient of the weights */
    bf16 *weights, *weighed;   /* [STEP][LANES]; weighed: gradient of the scores */
    int32_t *weighed_pairs;    /* [STEP / 2][LANES] */
    float *sum;                /* [size][LANES] */
    bf16 *last;                /* [8][size] */
    float *own_sums;           /* dK and dV of a tree, [2][packed rows][size] */
    float top[LANES], total[LANES], factor[LANES], delta[LANES]; /* top: largest score, later the log-sum; in units of log2 */
} Work;

/* Keys that the lanes [lane_lo, lane_hi) see: lane i sees key j < count if j <= i + diagonal. */
typedef struct {
    const bf16 *keys, *values; /* rows, of which `readable` are inside the tensor */
    const int32_t *pairs;      /* pairs of rows: of the values (forward), of the keys (backward) */
    int64_t key_row, value_row, count, readable, diagonal, lane_lo, lane_hi;
    float *grad_keys, *grad_values; /* [count][size] */
} Range;

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
static inline bf16 *head_of(const View *x, int64_t batch, int64_t head) { return x->data + batch * x->batch + head * x->head; }
static inline int64_t take(int64_t *next) { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); }

/* Buffers are kept for the next call: new pages from the system cost more than the products of a short row. */
enum { KEPT = 64 };
typedef struct { int64_t bytes; } Buffer; /* its first 64 bytes; the rest is lent */
static Buffer *kept_by_threads[KEPT], *kept_by_calls[KEPT / 16];

static void return_buffer(Buffer **kept, int slots, char *memory) {
    Buffer *buffer = memory ? (Buffer *)(memory - 64) : 0;
    for (int i = 0; buffer && i < slots; i++) {
        Buffer *empty = 0;
        if (__atomic_compare_exchange_n(kept + i, &empty, buffer, 0, __ATOMIC_RELEASE, __ATOMIC_RELAXED)) return;
    }
    free(buffer);
}

/* At least `bytes` bytes, aligned to 64; 0: out of memory. */
static char *borrow_buffer(Buffer **kept, int slots, int64_t bytes) {
    for (int i = 0; i < slots; i++) {
        Buffer *buffer = __atomic_exchange_n(kept + i, 0, __ATOMIC_ACQUIRE);
        if (buffer && buffer->bytes >= bytes) return (char *)buffer + 64;
        free(buffer);
    }
    Buffer *buffer = aligned_alloc(64, 64 + round_up(bytes, 64));
    if (!buffer) return 0;
    buffer->bytes = bytes;
    return (char *)buffer + 64;
}

/* Frees what is kept. */
void vlit_flash_release(void) {
    for (int i = 0; i < KEPT; i++) free(__atomic_exchange_n(kept_by_threads + i, 0, __ATOMIC_ACQUIRE));
    for (int i = 0; i < KEPT / 16; i++) free(__atomic_exchange_n(kept_by_calls + i, 0, __ATOMIC_ACQUIRE));
}

static void *carve(char **memory, int64_t bytes) {
    void *part = *memory;
    *memory += round_up(bytes, 64);
    return part;
}

/* A thread's buffers, to be given to return_work; 0: out of memory. */
static Work *borrow_work(const Problem *p, int64_t rows_of_sums) {
    const int64_t word = 4, packed = p->size / 2 * LANES * word, step = STEP * LANES * word;
    const int64_t sums = 2 * rows_of_sums * p->size * word;
    char *memory = borrow_buffer(kept_by_threads, KEPT,
                                 round_up(sizeof(Work), 64) + 6 * packed + 7 * step / 2 + 16 * p->size + sums);
    if (!memory) return 0;
    Work *w = carve(&memory, sizeof(Work));
    w->size = p->size, w->scale2 = (float)(p->scale * 1.4426950408889634);
    w->q = carve(&memory, packed), w->q_pairs = carve(&memory, packed);
    w->grad = carve(&memory, packed), w->grad_pairs = carve(&memory, packed);
    w->scores = carve(&memory, step), w->slopes = carve(&memory, step);
    w->weights = carve(&memory, step / 2), w->weighed = carve(&memory, step / 2), w->weighed_pairs = carve(&memory, step / 2);
    w->sum = carve(&memory, 2 * packed), w->last = carve(&memory, 16 * p->size), w->own_sums = carve(&memory, sums);
    return w;
}

static void return_work(Work *w) { return_buffer(kept_by_threads, KEPT, (char *)w); }

static void place_rows(Work *w, const Problem *p, const Tile *tile) {
    int64_t lanes = 0;
    for (int i = 0; i < LANES; i++) w->rows[i] = -1;
    for (const Run *run = p->runs + tile->first_run; run < p->runs + tile->last_run; run++) {
        for (int64_t i = 0; i < run->count; i++) w->rows[run->lane + i] = run->row + i;
        lanes = run->lane + run->count;
    }
    w->vectors = (int)((lanes + 15) / 16);
    memset(w->sum, 0, p->size * LANES * sizeof(float));
}

/* Calls `visit` for the prefix of a tile, then for every run's own segment. The base holds the row's first key of all arrays;
 * its gradients start at packed row `origin`. */
typedef void Visit(Work *, const Range *);

INLINE void visit_ranges(Work *w, const Problem *p, const Tile *tile, Range base, int64_t origin, Visit *visit) {
    const int64_t everything = (int64_t)1 << 40;
    for (const Run *run = p->runs + tile->first_run - (tile->prefix >= 0); run < p->runs + tile->last_run; run++) {
        const int shared = run < p->runs + tile->first_run;
        const Segment *segment = p->segments + (shared ? tile->prefix : run->segment);
        Range range = base;
        range.keys += segment->start * base.key_row;
        range.pairs += segment->packed / 2 * w->size;
        range.readable = p->rows - segment->start;
        range.count = shared || !p->causal ? segment->length : run->row + run->count - segment->start;
        range.diagonal = shared || !p->causal ? everything : run->row - segment->start - run->lane;
        range.lane_lo = shared ? 0 : run->lane;
        range.lane_hi = shared ? 16 * w->vectors : run->lane + run->count;
        if (base.grad_keys) {
            range.values += segment->start * base.value_row;
            range.grad_keys += (segment->packed - origin) * w->size;
            range.grad_values += (segment->packed - origin) * w->size;
        }
        visit(w, &range);
    }
}

static inline int range_begin(const Range *range) { return (int)(range->lane_lo / 16); }
static inline int range_end(const Range *range) { return (int)((range->lane_hi + 15) / 16); }

/* First vector with a lane that sees key j. */
static inline int first_vector(const Range *range, int64_t j) {
    return (int)smaller(larger(j - range->diagonal, range->lane_lo) / 16, range_end(range));
}

/* Lanes of vector v that belong to the range. */
static __mmask16 lanes_of(const Range *range, int v) {
    return first_words(smaller(range->lane_hi - 16 * v, 16)) & ~first_words(larger(range->lane_lo - 16 * v, 0));
}

/* Of a step's keys: how many at least one lane of a vector sees, how many all see; key j is seen from lane j - edge on. */
typedef struct { int64_t some, all, edge; } Seen;

INLINE Seen seen_by(const Range *range, int64_t from, int64_t count, int v) {
    int64_t edge = 16 * v + range->diagonal - from;
    Seen seen = {larger(0, smaller(count, edge + 16)), larger(0, smaller(count, edge + 1)), edge};
    return seen;
}

INLINE __mmask16 lanes_seeing(Seen seen, int64_t j) {
    return j < seen.all ? 0xffff : j < seen.some ? (__mmask16)(0xffffu << (j - seen.edge)) : 0;
}

/* Equal steps of at most STEP keys, in whole blocks of 8. */
static inline int64_t step_of(int64_t count) {
    int64_t steps = (count + STEP - 1) / STEP;
    return round_up((count + steps - 1) / steps, 8);
}

static inline void prefetch(const void *from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)from + i);
}

static inline void prefetch_rows(const bf16 *x, int64_t stride, int64_t rows, int64_t size) {
    for (int64_t i = 0; i < rows; i++) prefetch(x + i * stride, 2 * size);
}

/* to[8][LANES] = rows j to j + 8 of x, times the packed rows of the tile, for the vectors that see key j. */
INLINE void eight_products(const Work *w, const Range *range, float *to, const bf16 *x, int64_t stride, const int32_t *packed,
                           int64_t j) {
    const int first = first_vector(range, j), vectors = range_end(range) - first;
    if (vectors <= 0) return;
    const bf16 *row = x + j * stride;
    if (j + 8 > range->readable) {
        memset(w->last, 0, 16 * w->size);
        for (int64_t i = j; i < range->readable; i++) memcpy(w->last + (i - j) * w->size, x + i * stride, 2 * w->size);
        row = w->last, stride = w->size;
    }
    multiply_eight_rows(vectors, to + 16 * first, LANES, (const char *)row, 2 * stride, (const char *)(packed + 16 * first),
                        4 * LANES, w->size / 2, 0);
}

/* pairs[batch * kv_heads][packed / 2][size] of the rows of x, segment by segment; the partner of an odd last row is zero. */
static void pack_segments(const Problem *p, const View *x, int32_t *pairs) {
    int64_t next = 0, tasks = p->batch * p->kv_heads * p->num_segments;
#pragma omp parallel num_threads((int)p->threads) if (p->threads > 1)
    for (int64_t task; (task = take(&next)) < tasks;) {
        int64_t head = task / p->num_segments;
        const Segment *s = p->segments + task % p->num_segments;
        const bf16 *rows = head_of(x, head / p->kv_heads, head % p->kv_heads) + s->start * x->row;
        int32_t *to = pairs + (head * p->packed + s->packed) / 2 * p->size;
        for (int64_t r = 0; r < s->length; r += 2, to += p->size) {
            prefetch_rows(rows + (r + 16) * x->row, x->row, 2, p->size);
            pack_pair(to, rows, x->row, r, r + 1 < s->length ? r + 1 : -1, p->size);
        }
    }
}
