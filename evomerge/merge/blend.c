/* linear, task_arithmetic and passthrough over vectors, in one pass.

   The operations, their order and their rounding are those of the kernels in methods.py, so the
   bits are the same: float32, every operation rounded for itself (no contraction into fused
   ones), ties to even at the end. Written so that compilers vectorise it: no branch depends on a
   number. */

#include <float.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

_Static_assert(FLT_EVAL_METHOD == 0, "float is computed as float");

enum { BFLOAT16, FLOAT16, FLOAT32 };
enum { LINEAR, TASK_ARITHMETIC, PASSTHROUGH };

/* The sums of a block stay in the first-level cache. */
#define BLOCK 1024
#define INLINE static inline __attribute__((always_inline))

INLINE float as_float(uint32_t bits) {
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

INLINE uint32_t as_bits(float number) {
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    return bits;
}

/* float16 -> float32: as the bits of a float32, its numbers are too small by 2^112, exactly. */
INLINE float half_to_float(uint16_t half) {
    uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13;
    uint32_t scaled = as_bits(as_float(magnitude) * 0x1p112f);
    scaled |= magnitude >= 0x0f800000u ? 0x7f800000u : 0; /* infinities, NaN */
    return as_float(scaled | (uint32_t)(half & 0x8000) << 16);
}

/* float32 -> float16, ties to even; every NaN becomes one. */
INLINE uint16_t float_to_half(float number) {
    uint32_t bits = as_bits(number), sign = bits & 0x80000000u, magnitude = bits ^ sign;
    /* Below 2^-14 the addition shifts the number to where float16's last place is, and rounds. */
    uint32_t small = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t usual = (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13;
    uint32_t large = magnitude > 0x7f800000u ? 0x7e00 : 0x7c00;
    uint32_t half = magnitude < 0x38800000u ? small : usual;
    return (uint16_t)((magnitude >= 0x47800000u ? large : half) | sign >> 16);
}

INLINE uint16_t float_to_bfloat(float number) {
    uint32_t bits = as_bits(number);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000u ? 0x7fc0 : rounded);
}

INLINE float load(const void *numbers, int dtype, size_t i) {
    if (dtype == FLOAT32) return ((const float *)numbers)[i];
    uint16_t bits = ((const uint16_t *)numbers)[i];
    return dtype == FLOAT16 ? half_to_float(bits) : as_float((uint32_t)bits << 16);
}

/* Rounds one number into its place; its magnitude's bits, by which infinities and NaN are known. */
INLINE uint32_t store(void *numbers, int dtype, size_t i, float number) {
    if (dtype == FLOAT32) {
        ((float *)numbers)[i] = number;
        return as_bits(number) & 0x7fffffff;
    }
    uint16_t bits = dtype == FLOAT16 ? float_to_half(number) : float_to_bfloat(number);
    ((uint16_t *)numbers)[i] = bits;
    return bits & 0x7fff;
}

INLINE uint32_t infinity(int dtype) {
    return dtype == FLOAT32 ? 0x7f800000u : dtype == FLOAT16 ? 0x7c00 : 0x7f80;
}

/* What is called with constants below is compiled anew for each of them. */
#define FOR_DTYPE(dtype, call)                  \
    switch (dtype) {                            \
        case BFLOAT16: { enum { D = BFLOAT16 }; call; break; } \
        case FLOAT16: { enum { D = FLOAT16 }; call; break; }   \
        default: { enum { D = FLOAT32 }; call; break; }        \
    }

INLINE void widen(float *restrict out, const void *restrict in, int dtype, size_t count) {
    for (size_t i = 0; i < count; i++) out[i] = load(in, dtype, i);
}

INLINE uint32_t narrow(void *restrict out, const float *restrict in, int dtype, size_t count) {
    uint32_t largest = 0;
    for (size_t i = 0; i < count; i++) {
        uint32_t magnitude = store(out, dtype, i, in[i]);
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

/* What one input adds to the sums of the weights' two words; the first one begins them. */
INLINE void add(float *restrict high, float *restrict low, const void *restrict input, int dtype,
                const float *restrict base, float first, float second, int begins, size_t count) {
    for (size_t i = 0; i < count; i++) {
        float number = load(input, dtype, i);
        if (base) number -= base[i];
        float one = first * number, other = second * number;
        high[i] = begins ? one : high[i] + one;
        low[i] = begins ? other : low[i] + other;
    }
}

INLINE void finish(float *restrict high, const float *restrict low, const float *restrict base,
                   size_t count) {
    for (size_t i = 0; i < count; i++) {
        float sum = high[i] + low[i];
        high[i] = base ? sum + base[i] : sum;
    }
}

#define ADD(base, begins) \
    FOR_DTYPE(dtypes[j], add(sums, rest, in, D, base, first, second, begins, size))

/* The two commonest merges, of two bfloat16 models into one, with nothing in between. */
INLINE uint32_t of_two(int kernel, size_t count, const uint16_t *restrict a,
                       const uint16_t *restrict b, const float *high, const float *low,
                       uint16_t *restrict out) {
    uint32_t largest = 0;
    float high0 = high[0], low0 = low[0];
    float high1 = kernel == LINEAR ? high[1] : 0, low1 = kernel == LINEAR ? low[1] : 0;
    for (size_t i = 0; i < count; i++) {
        float x = load(a, BFLOAT16, i), y = load(b, BFLOAT16, i), sum;
        if (kernel == LINEAR) {
            sum = (high0 * x + high1 * y) + (low0 * x + low1 * y);
        } else {
            float delta = y - x;
            sum = (high0 * delta + low0 * delta) + x;
        }
        uint32_t magnitude = store(out, BFLOAT16, i, sum);
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

/* Fills out[0 .. count) with `kernel` over the inputs (task_arithmetic: the base first), weighted
   by high[j] + low[j]. Whether all of it is finite. */
int evomerge_blend(int kernel, size_t count, int number, const void *const *inputs,
                   const int *dtypes, const float *high, const float *low, void *out,
                   int out_dtype) {
    static const size_t sizes[] = {2, 2, 4};
    int is_plain = out_dtype == BFLOAT16 && number == 2;
    for (int j = 0; j < number; j++) is_plain = is_plain && dtypes[j] == BFLOAT16;
    if (is_plain && kernel == LINEAR)
        return of_two(LINEAR, count, inputs[0], inputs[1], high, low, out) < infinity(BFLOAT16);
    if (is_plain && kernel == TASK_ARITHMETIC)
        return of_two(TASK_ARITHMETIC, count, inputs[0], inputs[1], high, low, out) <
               infinity(BFLOAT16);

    float sums[BLOCK], rest[BLOCK], base[BLOCK];
    uint32_t largest = 0;
    for (size_t start = 0; start < count; start += BLOCK) {
        size_t size = count - start < BLOCK ? count - start : BLOCK;
        int has_base = kernel == TASK_ARITHMETIC;
        if (kernel == PASSTHROUGH || has_base) {
            float *into = has_base ? base : sums;
            const char *in = (const char *)inputs[0] + start * sizes[dtypes[0]];
            FOR_DTYPE(dtypes[0], widen(into, in, D, size))
        }
        for (int j = has_base; kernel != PASSTHROUGH && j < number; j++) {
            const char *in = (const char *)inputs[j] + start * sizes[dtypes[j]];
            float first = high[j - has_base], second = low[j - has_base];
            if (has_base && j == 1)
                ADD(base, 1)
            else if (has_base)
                ADD(base, 0)
            else if (j == 0)
                ADD(NULL, 1)
            else
                ADD(NULL, 0)
        }
        if (has_base)
            finish(sums, rest, base, size);
        else if (kernel == LINEAR)
            finish(sums, rest, NULL, size);
        char *place = (char *)out + start * sizes[out_dtype];
        uint32_t of_block = 0;
        FOR_DTYPE(out_dtype, of_block = narrow(place, sums, D, size))
        largest = of_block > largest ? of_block : largest;
    }
    return largest < infinity(out_dtype);
}
