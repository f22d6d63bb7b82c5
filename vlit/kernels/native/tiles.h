/* Register-tiled bf16 products on AVX512-BF16 (sums in float), the transposes that feed them, and 2^x.
 *
 * A product takes its left operand as single 32-bit words, each a pair of bf16 neighbours along the contracted dimension,
 * broadcast to all lanes; its right operand as vectors of 16 such pairs. LANES query rows lie side by side in VECTORS
 * vectors: scores are kept transposed, [key][lane], so that a softmax needs no sum across lanes.
 */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

enum { VECTORS = 4, LANES = 16 * VECTORS };

#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))

/* Loaded once into a register: GCC would load again for every product. */
INLINE __m512bh pairs_at(const void *p) {
    __m512i pairs = _mm512_loadu_si512(p);
    __asm__("" : "+v"(pairs));
    return (__m512bh)pairs;
}

INLINE __m512bh pair_everywhere(const char *p) {
    int pair;
    memcpy(&pair, p, 4);
    return (__m512bh)_mm512_set1_epi32(pair);
}

/* c[M][16 N] (+)= a b: M rows of a, a_row bytes apart, made of `pairs` pairs; one row of 16 N pairs of b, b_row bytes apart,
 * for each of them; rows of c are c_row floats apart. */
INLINE void multiply_rows(const int M, const int N, float *c, int64_t c_row, const char *a, int64_t a_row, const char *b,
                          int64_t b_row, int64_t pairs, const int add) {
    __m512 sum[8][VECTORS];
    UNROLL for (int i = 0; i < M; i++) UNROLL for (int j = 0; j < N; j++) sum[i][j] = _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; p++) {
        __m512bh right[VECTORS];
        UNROLL for (int j = 0; j < N; j++) right[j] = pairs_at(b + p * b_row + 64 * j);
        UNROLL for (int i = 0; i < M; i++) {
            __m512bh left = pair_everywhere(a + i * a_row + 4 * p);
            UNROLL for (int j = 0; j < N; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
        }
    }
    UNROLL for (int i = 0; i < M; i++) UNROLL for (int j = 0; j < N; j++) {
        float *to = c + i * c_row + 16 * j;
        _mm512_storeu_ps(to, add ? _mm512_add_ps(_mm512_loadu_ps(to), sum[i][j]) : sum[i][j]);
    }
}

/* Eight rows of c, `vectors` (1 to 4) wide. */
INLINE void multiply_eight_rows(int vectors, float *c, int64_t c_row, const char *a, int64_t a_row, const char *b,
                                int64_t b_row, int64_t pairs, const int add) {
    switch (vectors) {
    case 4:
        multiply_rows(4, 4, c, c_row, a, a_row, b, b_row, pairs, add);
        multiply_rows(4, 4, c + 4 * c_row, c_row, a + 4 * a_row, a_row, b, b_row, pairs, add);
        break;
    case 3: multiply_rows(8, 3, c, c_row, a, a_row, b, b_row, pairs, add); break;
    case 2: multiply_rows(8, 2, c, c_row, a, a_row, b, b_row, pairs, add); break;
    default: multiply_rows(8, 1, c, c_row, a, a_row, b, b_row, pairs, add);
    }
}

/* c[M][16 N] = c * factor + a b. Vector j takes the pairs [0, ends[j]), ends ascending; b and c have rows of LANES words;
 * a holds the same pair of its columns side by side, the next pair a_pair bytes on. Lanes outside `lanes` keep their value. */
INLINE void multiply_columns(const int M, const int N, float *c, const char *a, int64_t a_pair, const char *b,
                             const int64_t *ends, const float *factor, const __mmask16 *lanes) {
    __m512 sum[8][VECTORS];
    UNROLL for (int j = 0; j < N; j++) {
        __m512 f = _mm512_loadu_ps(factor + 16 * j);
        UNROLL for (int i = 0; i < M; i++) sum[i][j] = _mm512_mul_ps(_mm512_loadu_ps(c + i * LANES + 16 * j), f);
    }
    int64_t p = 0;
    UNROLL for (int s = 0; s < N; s++) for (; p < ends[s]; p++) {
        __m512bh right[VECTORS];
        UNROLL for (int j = s; j < N; j++) right[j] = pairs_at(b + p * LANES * 4 + 64 * j);
        UNROLL for (int i = 0; i < M; i++) {
            __m512bh left = pair_everywhere(a + p * a_pair + 4 * i);
            UNROLL for (int j = s; j < N; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
        }
    }
    UNROLL for (int i = 0; i < M; i++)
        UNROLL for (int j = 0; j < N; j++) _mm512_mask_storeu_ps(c + i * LANES + 16 * j, lanes[j], sum[i][j]);
}

/* The same for all columns of a, a multiple of 8. */
INLINE void multiply_all_columns(int vectors, int64_t columns, float *c, const char *a, int64_t a_pair, const char *b,
                                 const int64_t *ends, const float *factor, const __mmask16 *lanes) {
    for (int64_t e = 0; e < columns; e += 8, c += 8 * LANES, a += 32) switch (vectors) {
        case 4:
            multiply_columns(4, 4, c, a, a_pair, b, ends, factor, lanes);
            multiply_columns(4, 4, c + 4 * LANES, a + 16, a_pair, b, ends, factor, lanes);
            break;
        case 3: multiply_columns(8, 3, c, a, a_pair, b, ends, factor, lanes); break;
        case 2: multiply_columns(8, 2, c, a, a_pair, b, ends, factor, lanes); break;
        default: multiply_columns(8, 1, c, a, a_pair, b, ends, factor, lanes);
        }
}

/* 2^x to 3e-6 relative, exact at 0; 2^-inf = 0, 2^NaN = NaN. Minimax polynomial of 2^(x - floor(x)). */
INLINE __m512 power_of_two(__m512 x) {
    __m512 r = _mm512_reduce_ps(x, 9), p = _mm512_set1_ps(1.342668610e-2f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.224247129e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.412802061e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.930448447e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, x);
}

/* log2(x), x >= 0, to 2e-7: exponent + 2/ln(2) artanh((m - 1) / (m + 1)) with m in [3/4, 3/2). NaN stays NaN. */
INLINE __m512 log_of_two(__m512 x) {
    __m512 m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src), one = _mm512_set1_ps(1.0f);
    __m512 whole = _mm512_getexp_ps(_mm512_div_ps(x, m));
    __m512 u = _mm512_div_ps(_mm512_sub_ps(m, one), _mm512_add_ps(m, one)), u2 = _mm512_mul_ps(u, u);
    __m512 p = _mm512_set1_ps(2.885390082f / 9);
    p = _mm512_fmadd_ps(p, u2, _mm512_set1_ps(2.885390082f / 7));
    p = _mm512_fmadd_ps(p, u2, _mm512_set1_ps(2.885390082f / 5));
    p = _mm512_fmadd_ps(p, u2, _mm512_set1_ps(2.885390082f / 3));
    p = _mm512_fmadd_ps(p, u2, _mm512_set1_ps(2.885390082f));
    return _mm512_fmadd_ps(p, u, whole);
}

/* x0 y0 x1 y1 ... as bf16. */
INLINE __m512i interleave(__m512 x, __m512 y) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                           20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(y, x));
}

/* 16 x 16 words of 32 bits. */
INLINE void transpose(__m512i x[16]) {
    __m512i y[16];
    UNROLL for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) {
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
        y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
        y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
        y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
        x[i + 4] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0x88);
        x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
        x[i + 12] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0xdd);
    }
}

INLINE __mmask16 first_words(int64_t count) { return count >= 16 ? 0xffff : (__mmask16)((1u << count) - 1); }

/* Words of a row of x; zeros for row -1. */
INLINE __m512i words_of(const bf16 *x, int64_t stride, int64_t row, int64_t word, __mmask16 mask) {
    return row < 0 ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi32(mask, x + row * stride + 2 * word);
}

/* to[size / 2][LANES]: pairs along the rows, a row in each lane. */
static void pack_lanes(int32_t *to, const bf16 *x, int64_t stride, const int64_t *rows, int vectors, int64_t size) {
    for (int v = 0; v < vectors; v++)
        for (int64_t word = 0; word < size / 2; word += 16) {
            __m512i block[16];
            UNROLL for (int i = 0; i < 16; i++)
                block[i] = words_of(x, stride, rows[16 * v + i], word, first_words(size / 2 - word));
            transpose(block);
            for (int i = 0; i < 16 && word + i < size / 2; i++)
                _mm512_storeu_si512(to + (word + i) * LANES + 16 * v, block[i]);
        }
}

/* to[size]: pairs of two rows. */
INLINE void pack_pair(int32_t *to, const bf16 *x, int64_t stride, int64_t first, int64_t second, int64_t size) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36,
                                         4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t e = 0; e < size; e += 32) {
        __m512i a = words_of(x, stride, first, e / 2, first_words((size - e) / 2));
        __m512i b = words_of(x, stride, second, e / 2, first_words((size - e) / 2));
        _mm512_storeu_si512(to + e, _mm512_permutex2var_epi16(a, low, b));
        if (size - e > 16) _mm512_storeu_si512(to + e + 16, _mm512_permutex2var_epi16(a, high, b));
    }
}

/* Row rows[lane] of x = bf16(from[size][lane] * factor[lane]); lanes of row -1 are dropped. */
static void store_lanes(bf16 *x, int64_t stride, const int64_t *rows, int vectors, int64_t size, const float *from,
                        const float *factor) {
    for (int v = 0; v < vectors; v++) {
        __m512 f = _mm512_loadu_ps(factor + 16 * v);
        for (int64_t word = 0; word < size / 2; word += 16) {
            __mmask16 mask = first_words(size / 2 - word);
            __m512i block[16];
            UNROLL for (int i = 0; i < 16; i++) {
                const float *even = from + 2 * (word + i) * LANES + 16 * v;
                block[i] = word + i >= size / 2 ? _mm512_setzero_si512()
                                                : interleave(_mm512_mul_ps(_mm512_loadu_ps(even), f),
                                                             _mm512_mul_ps(_mm512_loadu_ps(even + LANES), f));
            }
            transpose(block);
            UNROLL for (int i = 0; i < 16; i++) {
                int64_t row = rows[16 * v + i];
                if (row >= 0) _mm512_mask_storeu_epi32(x + row * stride + 2 * word, mask, block[i]);
            }
        }
    }
}
