/* Compares every CPU kernel that runs on this machine with plain loops written anew here: nothing is shared with the
 * kernels but their interface. Prints a line per kernel; ends with 1 at the first difference. Needs no Python, so that
 * it runs under an emulator. test_native_selftest.py compiles and runs it.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "hf_stompp.h"

#define LENGTH(array) ((int)(sizeof(array) / sizeof((array)[0])))

/* Bytes behind each output that no kernel may change. */
enum { GUARD_BYTES = 64, GUARD = 0xa5 };

/* What bits are made of the output: none, those >= 0, those >= a threshold of each column. */
enum output_bits { VALUES, BITS_FROM_ZERO, BITS_FROM_THRESHOLD, OUTPUT_KINDS };

static const char *const kernel_names[HF_STOMPP_KERNELS] = {"amx", "avx512", "avx2", "neon", "scalar"};
static const char *const dtype_names[] = {"f32", "bf16", "f16", "bits"};
static long products[HF_STOMPP_KERNELS], packings[HF_STOMPP_KERNELS];

/* The input of a product, its factors as numbers, and its exact sums. */
struct problem {
    int64_t rows, in_features, out_features;
    int input_dtype;
    uint8_t *input, *threshold, *weight, *scale, *bias;
    int8_t *signs, *weight_signs;
    int32_t *sums;
};

static uint64_t random_state = 0x9e3779b97f4a7c15;

static uint64_t draw(uint64_t below) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (random_state >> 16) % below;
}

static void *allocate(int64_t bytes) {
    void *memory = malloc(bytes ? (size_t)bytes : 1);
    if (!memory) {
        printf("out of memory\n");
        exit(1);
    }
    return memory;
}

/* Exactly so many bytes, so that a sanitizer sees what is read beyond; one element off any greater alignment. */
static uint8_t *allocate_elements(int64_t count, int64_t element_bytes) {
    return (uint8_t *)allocate((count + 1) * element_bytes) + element_bytes;
}

static void release_elements(uint8_t *elements, int64_t element_bytes) {
    if (elements) free(elements - element_bytes);
}

static int64_t size_of(int dtype) { return dtype == HF_STOMPP_F32 ? 4 : dtype == HF_STOMPP_BITS ? 1 : 2; }

static int64_t bytes_of_row(int64_t features) { return (features + 255) / 256 * 32; }

static float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static float float_at(const uint8_t *floats, int64_t index) {
    float value;
    memcpy(&value, floats + 4 * index, 4);
    return value;
}

static float value_at(const uint8_t *values, int dtype, int64_t index) {
    if (dtype == HF_STOMPP_F32) return float_at(values, index);
    uint16_t half;
    memcpy(&half, values + 2 * index, 2);
    int fraction_bits = dtype == HF_STOMPP_BF16 ? 7 : 10, bias = dtype == HF_STOMPP_BF16 ? 127 : 15;
    int exponent = (half & 0x7fff) >> fraction_bits, fraction = half & ((1 << fraction_bits) - 1);
    float magnitude;
    if (exponent == 2 * bias + 1)
        magnitude = fraction ? NAN : INFINITY;
    else if (exponent == 0)
        magnitude = (float)ldexp(fraction, 1 - bias - fraction_bits);
    else
        magnitude = (float)ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits);
    return half & 0x8000 ? -magnitude : magnitude;
}

/* The nearest number of a dtype; the even one of two. */
static float round_to(float value, int dtype) {
    if (dtype == HF_STOMPP_F32 || !isfinite(value) || value == 0) return value;
    int fraction_bits = dtype == HF_STOMPP_BF16 ? 7 : 10, greatest = dtype == HF_STOMPP_BF16 ? 127 : 15;
    int exponent = ilogb(value);
    if (exponent < 1 - greatest) exponent = 1 - greatest;
    double step = ldexp(1, exponent - fraction_bits);
    double magnitude = rint(fabs((double)value) / step) * step;
    if (magnitude >= ldexp(1, greatest + 1)) magnitude = INFINITY;
    return copysignf((float)magnitude, value);
}

static int same(float a, float b) { return (isnan(a) && isnan(b)) || as_bits(a) == as_bits(b); }

/* Zeros, ones, infinities, NaN, the smallest and greatest numbers, of either sign. */
static uint32_t draw_special(int dtype) {
    static const uint32_t f32[] = {0, 0x3f800000, 0x3f000000, 0x7f800000, 0x7fc00000, 0x7f800001, 1, 0x007fffff,
                                   0x7f7fffff};
    static const uint32_t bf16[] = {0, 0x3f80, 0x3f00, 0x7f80, 0x7fc0, 0x7f81, 1, 0x007f, 0x7f7f};
    static const uint32_t f16[] = {0, 0x3c00, 0x3800, 0x7c00, 0x7e00, 0x7c01, 1, 0x03ff, 0x7bff};
    const uint32_t *table = dtype == HF_STOMPP_F32 ? f32 : dtype == HF_STOMPP_BF16 ? bf16 : f16;
    uint32_t sign = dtype == HF_STOMPP_F32 ? 0x80000000 : 0x8000;
    return table[draw(LENGTH(f32))] | (draw(2) ? sign : 0);
}

/* Thresholds are drawn likewise, so that many equal their input. */
static void fill_values(uint8_t *values, int dtype, int64_t count) {
    int64_t size = size_of(dtype);
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits = draw(2) ? draw_special(dtype) : (uint32_t)draw((uint64_t)1 << 8 * size);
        memcpy(values + i * size, &bits, (size_t)size);
    }
}

/* Half of them of few bits, so that results lie midway between two numbers of 16 bits. */
static void fill_factors(uint8_t *values, int64_t count) {
    static const float plain[] = {0.0f, 1.0f, -1.0f, 0.5f};
    for (int64_t i = 0; i < count; i++) {
        uint64_t kind = draw(8);
        float value = (float)ldexp((double)draw(1 << 24) - (1 << 23), (int)draw(50) - 50);
        if (kind == 0) value = as_float(draw_special(HF_STOMPP_F32));
        if (kind > 4) value = plain[draw(LENGTH(plain))];
        memcpy(values + 4 * i, &value, 4);
    }
}

static void pack(const int8_t *signs, int64_t rows, int64_t features, uint8_t *bits) {
    memset(bits, 0, (size_t)(rows * bytes_of_row(features)));
    for (int64_t m = 0; m < rows; m++)
        for (int64_t k = 0; k < features; k++)
            if (signs[m * features + k] > 0) bits[m * bytes_of_row(features) + k / 8] |= (uint8_t)(1 << k % 8);
}

static struct problem make(int64_t rows, int64_t in_features, int64_t out_features, int dtype, int with_threshold) {
    struct problem p = {.rows = rows, .in_features = in_features, .out_features = out_features, .input_dtype = dtype};
    int is_bits = dtype == HF_STOMPP_BITS;
    p.input = allocate_elements(rows * (is_bits ? bytes_of_row(in_features) : in_features), size_of(dtype));
    p.signs = allocate(rows * in_features);
    if (is_bits) {
        for (int64_t i = 0; i < rows * in_features; i++) p.signs[i] = draw(2) ? 1 : -1;
        pack(p.signs, rows, in_features, p.input);
    } else {
        fill_values(p.input, dtype, rows * in_features);
        if (with_threshold) {
            p.threshold = allocate_elements(in_features, 4);
            fill_values(p.threshold, HF_STOMPP_F32, in_features);
        }
        for (int64_t i = 0; i < rows * in_features; i++) {
            float limit = with_threshold ? float_at(p.threshold, i % in_features) : 0.0f;
            p.signs[i] = value_at(p.input, dtype, i) >= limit ? 1 : -1;
        }
    }
    p.weight = allocate_elements(out_features * bytes_of_row(in_features), 1);
    p.weight_signs = allocate(out_features * in_features);
    for (int64_t i = 0; i < out_features * in_features; i++) p.weight_signs[i] = draw(2) ? 1 : -1;
    /* Row 0 and column 0 differ everywhere, so that a kernel's counters are at their fullest. */
    if (rows > 0)
        for (int64_t k = 0; k < in_features; k++) {
            p.weight_signs[k] = (int8_t)-p.signs[k];
            if (out_features > 1) p.weight_signs[(out_features - 1) * in_features + k] = p.signs[k];
        }
    pack(p.weight_signs, out_features, in_features, p.weight);
    p.scale = allocate_elements(out_features, 4);
    p.bias = allocate_elements(out_features, 4);
    fill_factors(p.scale, out_features);
    fill_factors(p.bias, out_features);
    /* Neither hides the least sum, whatever was drawn. */
    memcpy(p.scale, &(float){0.5f}, 4);
    memcpy(p.bias, &(float){0.0f}, 4);
    p.sums = allocate(rows * out_features * 4);
    for (int64_t m = 0; m < rows; m++)
        for (int64_t n = 0; n < out_features; n++) {
            int32_t sum = 0;
            for (int64_t k = 0; k < in_features; k++)
                sum += p.signs[m * in_features + k] * p.weight_signs[n * in_features + k];
            p.sums[m * out_features + n] = sum;
        }
    return p;
}

static void release(struct problem *p) {
    release_elements(p->input, size_of(p->input_dtype));
    release_elements(p->threshold, 4);
    release_elements(p->weight, 1);
    release_elements(p->scale, 4);
    release_elements(p->bias, 4);
    free(p->signs);
    free(p->weight_signs);
    free(p->sums);
}

static void fail(int kernel, const struct problem *p, const char *what) {
    printf("%s: %lld x %lld x %lld, input %s%s: %s\n", kernel_names[kernel], (long long)p->rows,
           (long long)p->in_features, (long long)p->out_features, dtype_names[p->input_dtype],
           p->threshold ? " with threshold" : "", what);
    exit(1);
}

static void check_guard(int kernel, const struct problem *p, const uint8_t *guard, const char *what) {
    for (int i = 0; i < GUARD_BYTES; i++)
        if (guard[i] != GUARD) fail(kernel, p, what);
}

static void check_packing(const struct problem *p, int threads) {
    if (p->input_dtype == HF_STOMPP_BITS) return;
    int64_t row = bytes_of_row(p->in_features), bytes = p->rows * row;
    uint8_t *expected = allocate(bytes), *bits = allocate(bytes + GUARD_BYTES);
    int32_t *popcounts = allocate(p->rows * 4);
    pack(p->signs, p->rows, p->in_features, expected);
    for (int kernel = 0; kernel < HF_STOMPP_KERNELS; kernel++) {
        if (hf_stompp_unavailable(kernel)) continue;
        for (int counted = 0; counted < 2; counted++) {
            memset(bits, GUARD, (size_t)(bytes + GUARD_BYTES));
            int status = hf_stompp_pack_sign(&(struct hf_stompp_packing){
                kernel, threads, p->input, p->input_dtype, (const float *)p->threshold, p->rows, p->in_features, bits,
                counted ? popcounts : NULL});
            if (status != HF_STOMPP_OK) fail(kernel, p, "pack_sign: not OK");
            if (memcmp(bits, expected, (size_t)bytes)) fail(kernel, p, "pack_sign: other bits than expected");
            check_guard(kernel, p, bits + bytes, "pack_sign: writes beyond the bits");
        }
        for (int64_t m = 0; m < p->rows; m++) {
            int32_t count = 0;
            for (int64_t k = 0; k < p->in_features; k++) count += p->signs[m * p->in_features + k] > 0;
            if (popcounts[m] != count) fail(kernel, p, "pack_sign: another popcount than expected");
        }
        packings[kernel]++;
    }
    free(expected);
    free(bits);
    free(popcounts);
}

static void check_values(int kernel, const struct problem *p, const uint8_t *output, int dtype, const float *expected,
                         const char *what) {
    for (int64_t i = 0; i < p->rows * p->out_features; i++) {
        float value = value_at(output, dtype, i);
        uint16_t half;
        memcpy(&half, output + i * size_of(dtype), 2);
        /* One NaN stands for all in bf16, as in PyTorch. */
        if (same(value, expected[i]) && (dtype != HF_STOMPP_BF16 || !isnan(value) || half == 0x7fc0)) continue;
        char message[200];
        snprintf(message, sizeof message, "%s: row %lld, column %lld: %a, expected %a", what,
                 (long long)(i / p->out_features), (long long)(i % p->out_features), value, expected[i]);
        fail(kernel, p, message);
    }
}

static void check_product(const struct problem *p, int with_bias, int dtype, int output_bits, int threads) {
    int64_t count = p->rows * p->out_features;
    int64_t bytes = output_bits ? p->rows * bytes_of_row(p->out_features) : count * size_of(dtype);
    float *expected = allocate(count * 4);
    for (int64_t i = 0; i < count; i++) {
        float value = (float)p->sums[i] * float_at(p->scale, i % p->out_features);
        if (with_bias) value = value + float_at(p->bias, i % p->out_features);
        expected[i] = round_to(value, dtype);
    }
    uint8_t *threshold = NULL, *expected_bits = allocate(bytes), *output = allocate_elements(bytes + GUARD_BYTES, 4);
    if (output_bits == BITS_FROM_THRESHOLD) {
        threshold = allocate_elements(p->out_features, 4);
        fill_factors(threshold, p->out_features);
        /* Half of them equal a result. */
        for (int64_t n = 0; n < p->out_features; n++)
            if (p->rows && draw(2))
                memcpy(threshold + 4 * n, expected + (int64_t)draw((uint64_t)p->rows) * p->out_features + n, 4);
    }
    if (output_bits) {
        int8_t *signs = allocate(count);
        for (int64_t i = 0; i < count; i++)
            signs[i] = expected[i] >= (threshold ? float_at(threshold, i % p->out_features) : 0.0f) ? 1 : -1;
        pack(signs, p->rows, p->out_features, expected_bits);
        free(signs);
    }
    static const char *const kinds[] = {"", " as bits", " as bits from threshold"};
    char what[100];
    snprintf(what, sizeof what, "output %s%s, %s bias, threads %d", dtype_names[dtype], kinds[output_bits],
             with_bias ? "with" : "no", threads);
    for (int kernel = 0; kernel < HF_STOMPP_KERNELS; kernel++) {
        if (hf_stompp_unavailable(kernel)) continue;
        memset(output, GUARD, (size_t)(bytes + GUARD_BYTES));
        int status = hf_stompp_binary_linear(&(struct hf_stompp_product){
            kernel, threads, p->input, p->input_dtype, (const float *)p->threshold, p->weight, (const float *)p->scale,
            with_bias ? (const float *)p->bias : NULL, p->rows, p->in_features, p->out_features,
            output_bits ? NULL : output, dtype, output_bits ? output : NULL, (const float *)threshold});
        if (status != HF_STOMPP_OK) fail(kernel, p, "binary_linear: not OK");
        if (!output_bits)
            check_values(kernel, p, output, dtype, expected, what);
        else if (memcmp(output, expected_bits, (size_t)bytes))
            fail(kernel, p, what);
        check_guard(kernel, p, output + bytes, "binary_linear: writes beyond the output");
        products[kernel]++;
    }
    release_elements(threshold, 4);
    release_elements(output, 4);
    free(expected);
    free(expected_bits);
}

static void check_every_shape(void) {
    static const int64_t rows[] = {0, 1, 2, 7, 8, 9, 130}, out_features[] = {1, 3, 15, 16, 17, 33, 65};
    static const int64_t in_features[] = {1, 7, 63, 64, 65, 255, 256, 257, 768, 1000, 3072};
    int turn = 0;
    for (int m = 0; m < LENGTH(rows); m++)
        for (int k = 0; k < LENGTH(in_features); k++)
            for (int n = 0; n < LENGTH(out_features); n++, turn++) {
                struct problem p = make(rows[m], in_features[k], out_features[n], HF_STOMPP_F32, turn % 2);
                check_product(&p, turn / 2 % 2, HF_STOMPP_F32, VALUES, 1);
                if (n == 0) check_packing(&p, 1);
                release(&p);
            }
}

static void check_every_dtype(void) {
    static const int64_t shapes[][3] = {{0, 64, 17}, {1, 7, 3}, {2, 257, 33}, {9, 65, 17}, {130, 768, 65}};
    for (int shape = 0; shape < LENGTH(shapes); shape++)
        for (int choice = 0; choice < 8; choice++) {
            int input_dtype = choice / 2, with_threshold = choice % 2;
            struct problem p =
                make(shapes[shape][0], shapes[shape][1], shapes[shape][2], input_dtype, with_threshold);
            check_packing(&p, 1);
            for (int dtype = HF_STOMPP_F32; dtype <= HF_STOMPP_F16; dtype++)
                for (int output_bits = VALUES; output_bits < OUTPUT_KINDS; output_bits++)
                    for (int with_bias = 0; with_bias < 2; with_bias++)
                        check_product(&p, with_bias, dtype, output_bits, 1);
            release(&p);
        }
}

/* Large enough to be split by rows and by columns; with more features than bytes or 16 bits can count. */
static void check_large_shapes(void) {
    static const int64_t shapes[][3] = {{5, 4100, 18}, {130, 3072, 193}, {3, 70000, 320}, {13, 70000, 65}};
    for (int shape = 0; shape < LENGTH(shapes); shape++) {
        struct problem p = make(shapes[shape][0], shapes[shape][1], shapes[shape][2], HF_STOMPP_F32, 1);
        for (int threads = 1; threads <= 2; threads++) {
            check_product(&p, 1, HF_STOMPP_F32, VALUES, threads);
            check_product(&p, 1, HF_STOMPP_F16, BITS_FROM_THRESHOLD, threads);
        }
        release(&p);
    }
    /* Signing alone is split from 4 million values on. */
    struct problem p = make(61, 70000, 1, HF_STOMPP_BF16, 1);
    check_packing(&p, 2);
    release(&p);
}

int main(void) {
    check_every_shape();
    check_every_dtype();
    check_large_shapes();
    int run = 0;
    for (int kernel = 0; kernel < HF_STOMPP_KERNELS; kernel++) {
        const char *reason = hf_stompp_unavailable(kernel);
        if (reason)
            printf("%s: not run: %s\n", kernel_names[kernel], reason);
        else
            printf("%s: %ld products, %ld packings\n", kernel_names[kernel], products[kernel], packings[kernel]);
        run += !reason;
    }
    return run == 0;
}
