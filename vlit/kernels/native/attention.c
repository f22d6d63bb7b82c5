/* Softmax of attention scores in bfloat16, forward and backward, in place; arithmetic in float.
 *
 * A row of `width` scores is visible in [0, shared) and [lo, hi); everything else becomes 0. Rows come in batches of
 * `count` with the same bounds (one batch a head). A NaN or infinite score spoils its whole row, as it must.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

static inline float widen(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline bf16 narrow(float value) { /* round to nearest even; NaN stays NaN unless its low 15 bits are all set */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* 2^x for x <= 0 to about 2e-7 relative: 2^round(x) times the Taylor polynomial of 2^r on [-1/2, 1/2]. */
static inline float power_of_two(float x) {
    x = x < -126.0f ? -126.0f : x;
    float whole = rintf(x), r = x - whole;
    float p = 1.5403530e-4f;
    p = p * r + 1.3333558e-3f;
    p = p * r + 9.6181291e-3f;
    p = p * r + 5.5504109e-2f;
    p = p * r + 2.4022651e-1f;
    p = p * r + 6.9314718e-1f;
    p = p * r + 1.0f;
    uint32_t bits = (uint32_t)((int32_t)whole + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return p * scale;
}

static inline float largest(const bf16 *row, int64_t lo, int64_t hi, float most) {
#pragma omp simd reduction(max : most)
    for (int64_t j = lo; j < hi; j++) {
        float x = widen(row[j]);
        most = x > most ? x : most;
    }
    return most;
}

static inline float exponentials(bf16 *restrict row, float *restrict out, int64_t lo, int64_t hi, float most, float scale) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = lo; j < hi; j++) {
        float e = power_of_two((widen(row[j]) - most) * scale);
        out[j] = e;
        sum += e;
    }
    return sum;
}

static inline void normalise(bf16 *restrict row, const float *restrict from, int64_t lo, int64_t hi, float factor) {
#pragma omp simd
    for (int64_t j = lo; j < hi; j++) row[j] = narrow(from[j] * factor);
}

/* scores [heads, rows, width] -> softmax(scale * scores); scale > 0. */
void vlit_softmax_bf16(bf16 *scores, int64_t heads, int64_t rows, int64_t width, int64_t count, int64_t shared,
                       const int64_t *lo, const int64_t *hi, float scale, int threads) {
    const float scale2 = scale * 1.4426950408889634f;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float buffer[width];
#pragma omp for schedule(static)
        for (int64_t r = 0; r < heads * rows; r++) {
            bf16 *row = scores + r * width;
            int64_t own = (r % rows) % count, a = lo[own] < shared ? shared : lo[own], b = hi[own];
            float most = largest(row, a, b, largest(row, 0, shared, -INFINITY));
            float sum = exponentials(row, buffer, 0, shared, most, scale2) + exponentials(row, buffer, a, b, most, scale2);
            float factor = 1.0f / sum;
            normalise(row, buffer, 0, shared, factor);
            normalise(row, buffer, a, b, factor);
            memset(row + shared, 0, (size_t)(a - shared) * sizeof(bf16));
            memset(row + b, 0, (size_t)(width - b) * sizeof(bf16));
        }
    }
}

static inline float product(const bf16 *x, const bf16 *y, int64_t lo, int64_t hi) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = lo; j < hi; j++) sum += widen(x[j]) * widen(y[j]);
    return sum;
}

static inline void slope(bf16 *restrict grad, const bf16 *restrict p, int64_t lo, int64_t hi, float mean, float scale) {
#pragma omp simd
    for (int64_t j = lo; j < hi; j++) grad[j] = narrow(scale * widen(p[j]) * (widen(grad[j]) - mean));
}

/* grad [heads, rows, width] of the weights p -> gradient of the unscaled scores, in place. */
void vlit_softmax_backward_bf16(bf16 *grad, const bf16 *p, int64_t heads, int64_t rows, int64_t width, int64_t count,
                                int64_t shared, const int64_t *lo, const int64_t *hi, float scale, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < heads * rows; r++) {
        bf16 *row = grad + r * width;
        const bf16 *weight = p + r * width;
        int64_t own = (r % rows) % count, a = lo[own] < shared ? shared : lo[own], b = hi[own];
        float mean = product(row, weight, 0, shared) + product(row, weight, a, b);
        slope(row, weight, 0, shared, mean, scale);
        slope(row, weight, a, b, mean, scale);
        memset(row + shared, 0, (size_t)(a - shared) * sizeof(bf16));
        memset(row + b, 0, (size_t)(width - b) * sizeof(bf16));
    }
}

/* Copy heads x rows vectors of `bytes` bytes between two layouts; strides in bytes. PyTorch's strided copy takes 3 times as long. */
void vlit_copy_heads(char *to, const char *from, int64_t heads, int64_t rows, int64_t bytes, int64_t to_head, int64_t to_row,
                     int64_t from_head, int64_t from_row, int threads) {
#pragma omp parallel for schedule(static) collapse(2) num_threads(threads) if (threads > 1)
    for (int64_t h = 0; h < heads; h++)
        for (int64_t r = 0; r < rows; r++)
            memcpy(to + h * to_head + r * to_row, from + h * from_head + r * from_row, (size_t)bytes);
}
