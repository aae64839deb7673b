/* A product of uint8 by int8 codes for CPUs with AVX2 and without VNNI. engine/avx2.py compiles it.
 *
 * One instruction multiplies 32 codes by 32 and adds neighbours: 16 sums of two products, in 16
 * bits. oneDNN widens each of them to 32 bits at once, two instructions more. Codes of few bits
 * leave room: here `run` of those sums are added in 16 bits before one is widened.
 *
 * A weight (O, I) is stored in panels of 16 output channels. A step is 4 inputs of all 16, channel
 * by channel: 64 bytes, of which `first` and `second` hold 8 channels each.
 */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

enum { ROWS = 4, CHANNELS = 16, STEP = 4 }; /* of a tile: what 16 registers hold; inputs of a step */
enum { BLOCK = 96, PANELS = 8 };            /* rows and panels of a thread's next piece of work */

typedef struct {
    __m256i first, second; /* a number for each of 16 channels, in 32 bits */
} sums;

static inline __m256i load(const int8_t *from) {
    return _mm256_loadu_si256((const __m256i *)from);
}

/* sum += part, in 16 bits, in the register where sum is: gcc by itself copies or spills some. */
static inline void add_to(__m256i *sum, __m256i part) {
    __asm__("vpaddw %1, %0, %0" : "+x"(*sum) : "x"(part));
}

static inline long least(long a, long b) { return a < b ? a : b; }

/* total += part, whose 16 sums in 16 bits belong to 8 channels. */
static inline __m256i widen(__m256i total, __m256i part) {
    return _mm256_add_epi32(total, _mm256_madd_epi16(part, _mm256_set1_epi16(1)));
}

/* Sums of a panel's weights. */
static sums sums_of_panel(const int8_t *panel, long steps) {
    const __m256i one = _mm256_set1_epi8(1);
    sums total = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (long k = 0; k < steps; k++, panel += CHANNELS * STEP) {
        total.first = widen(total.first, _mm256_maddubs_epi16(one, load(panel)));
        total.second = widen(total.second, _mm256_maddubs_epi16(one, load(panel + 32)));
    }
    return total;
}

/* Sums of products of four rows of codes and a panel. */
static void tile(const uint8_t *const codes[ROWS], const int8_t *panel, long steps, long run,
                 sums total[ROWS]) {
    for (int r = 0; r < ROWS; r++) total[r].first = total[r].second = _mm256_setzero_si256();
    for (long start = 0; start < steps; start += run) {
        sums part[ROWS];
        for (int r = 0; r < ROWS; r++) part[r].first = part[r].second = _mm256_setzero_si256();
        for (long k = start; k < least(start + run, steps); k++) {
            __m256i first = load(panel + k * CHANNELS * STEP);
            __m256i second = load(panel + k * CHANNELS * STEP + 32);
            for (int r = 0; r < ROWS; r++) {
                int32_t four;
                memcpy(&four, codes[r] + k * STEP, sizeof four);
                __m256i x = _mm256_set1_epi32(four);
                add_to(&part[r].first, _mm256_maddubs_epi16(x, first));
                add_to(&part[r].second, _mm256_maddubs_epi16(x, second));
            }
        }
        for (int r = 0; r < ROWS; r++) {
            total[r].first = widen(total[r].first, part[r].first);
            total[r].second = widen(total[r].second, part[r].second);
        }
    }
}

/* out = (float)(sum (q - z) v) scale + bias, of a panel and rows start..end of q; of `scale`, `bias`
 * and a row of out it is given where the panel's 16 channels begin. */
static void panel_product(const uint8_t *codes, const int8_t *panel, const float *scale,
                          const float *bias, float *out, long start, long end, long O, long I,
                          int32_t zero_point, long run) {
    int32_t weight[CHANNELS], found[CHANNELS];
    sums total[ROWS] = {sums_of_panel(panel, I / STEP)};
    memcpy(weight, total, sizeof weight);
    for (long row = start; row < end; row += ROWS) {
        const uint8_t *rows[ROWS]; /* beyond the end the last row once more */
        for (int r = 0; r < ROWS; r++) rows[r] = codes + least(row + r, end - 1) * I;
        tile(rows, panel, I / STEP, run, total);
        for (int r = 0; r < least(ROWS, end - row); r++) {
            float *z = out + (row + r) * O;
            memcpy(found, &total[r], sizeof found);
            for (int o = 0; o < CHANNELS; o++)
                z[o] = (float)(found[o] - zero_point * weight[o]) * scale[o] + bias[o];
        }
    }
}

/* codes (R, I), weight (O, I) in panels, scale and bias (O), out (R, O). */
void product(const uint8_t *codes, const int8_t *weight, const float *scale, const float *bias,
             float *out, long R, long O, long I, int32_t zero_point, long run, int threads) {
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
    for (long row = 0; row < R; row += BLOCK)
        for (long first = 0; first < O; first += PANELS * CHANNELS)
            for (long o = first; o < least(first + PANELS * CHANNELS, O); o += CHANNELS)
                panel_product(codes, weight + o * I, scale + o, bias + o, out + o, row,
                              least(row + BLOCK, R), O, I, zero_point, run);
}
