/* Compares every CPU kernel that runs on this machine with plain loops written anew here: nothing is shared with the
 * kernels but their interface. Prints a line per kernel; ends with 1 at the first difference. Needs no Python, so that
 * it runs under an emulator. test_native_selftest.py compiles and runs it.
 */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "hf_stompp.h"

#define LENGTH(array) ((int)(sizeof(array) / sizeof((array)[0])))

/* Bytes behind each output that no kernel may change. */
enum { GUARD_BYTES = 64, GUARD = 0xa5 };

/* A sanitizer sees what is written beyond an output only where nothing is behind it. */
#ifdef __SANITIZE_ADDRESS__
enum { SPARE_BYTES = 0 };
#else
enum { SPARE_BYTES = GUARD_BYTES };
#endif

/* What bits are made of the output: none, those >= 0, those >= a threshold of each column. */
enum output_bits { VALUES, BITS_FROM_ZERO, BITS_FROM_THRESHOLD, OUTPUT_KINDS };

static const char *const kernel_names[HF_STOMPP_KERNELS] = {"amx", "avx512", "avx2", "neon", "scalar"};
static const char *const dtype_names[] = {"f32", "bf16", "f16", "bits"};
static const char *const surrogate_names[] = {"none", "ste", "clipped_ste"};
static long products[HF_STOMPP_KERNELS], packings[HF_STOMPP_KERNELS], maskings[HF_STOMPP_KERNELS];
static long byte_products[HF_STOMPP_KERNELS];

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
    static const int64_t shapes[][3] = {{5, 4100, 18}, {130, 3072, 193}, {3, 70000, 320}, {13, 70000, 65},
                                        {1100, 1000, 770}};
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

/* An output in memory of just its size, where nothing is sanitized with a guard behind it. */
static uint8_t *allocate_output(int64_t count, int64_t element_bytes) {
    return allocate_elements(count + SPARE_BYTES / element_bytes, element_bytes);
}

static void clear_output(uint8_t *output, int64_t bytes) { memset(output, GUARD, (size_t)(bytes + SPARE_BYTES)); }

static void fail_masked(int kernel, int64_t rows, int64_t columns, const char *options, const char *what) {
    printf("%s: %lld x %lld, %s: %s\n", kernel_names[kernel], (long long)rows, (long long)columns, options, what);
    exit(1);
}

struct masked_case {
    int64_t rows, columns;
    char options[100];
};

static void check_masked_output(int kernel, const struct masked_case *c, const uint8_t *output, int dtype,
                                const float *expected, const char *what) {
    int64_t count = c->rows * c->columns;
    for (int64_t i = 0; i < count; i++) {
        float value = value_at(output, dtype, i);
        if (same(value, expected[i])) continue;
        char message[200];
        snprintf(message, sizeof message, "%s: row %lld, column %lld: %a, expected %a", what,
                 (long long)(i / c->columns), (long long)(i % c->columns), value, expected[i]);
        fail_masked(kernel, c->rows, c->columns, c->options, message);
    }
    for (int i = 0; i < SPARE_BYTES; i++)
        if (output[count * size_of(dtype) + i] != GUARD)
            fail_masked(kernel, c->rows, c->columns, c->options, "writes beyond the output");
}

static void check_bytes(int kernel, const struct masked_case *c, const uint8_t *output, const uint8_t *expected,
                        int64_t bytes, const char *what) {
    int differ = memcmp(output, expected, (size_t)bytes) != 0;
    for (int i = 0; i < SPARE_BYTES; i++) differ |= output[bytes + i] != GUARD;
    if (differ) fail_masked(kernel, c->rows, c->columns, c->options, what);
}

static int gradient_passes(int surrogate, int frozen, int inside) {
    if (!frozen) return inside;
    if (surrogate == HF_STOMPP_STE) return 1;
    return surrogate == HF_STOMPP_CLIPPED_STE ? inside : 0;
}

static float clip_to(float value, float low, float high) {
    if (value < low) return low;
    if (value > high) return high;
    return value;
}

/* At least 0; many are the levels of fill_values, so that values lie exactly on a bound. */
static float draw_scale(void) {
    static const float plain[] = {0.0f, 0.5f, 1.0f, INFINITY, 0x1p-140f};
    if (draw(3) == 0) return plain[draw(LENGTH(plain))];
    return (float)ldexp((double)draw(1 << 24), (int)draw(12) - 28);
}

/* A third of the values becomes one of a few, rounded to the dtype, or a neighbour. */
static void put_on_edges(uint8_t *values, int dtype, int64_t index, const float *edges, int count) {
    if (draw(3)) return;
    float edge = round_to(edges[draw((uint64_t)count)], dtype);
    uint32_t bits = as_bits(edge);
    if (dtype != HF_STOMPP_F32) {
        /* The pattern of 16 bits is looked for: values of one sign are ordered as their patterns are. */
        uint32_t low = 0, high = dtype == HF_STOMPP_BF16 ? 0x7f80 : 0x7c00;
        while (low < high) {
            uint16_t middle = (uint16_t)((low + high) / 2);
            if (value_at((uint8_t *)&middle, dtype, 0) < fabsf(edge)) low = middle + 1u;
            else high = middle;
        }
        bits = low | (signbit(edge) ? 0x8000u : 0);
    }
    uint32_t magnitude = bits & (dtype == HF_STOMPP_F32 ? 0x7fffffffu : 0x7fffu);
    uint64_t step = draw(3);
    if (step == 1) bits++;
    if (step == 2 && magnitude) bits--;
    memcpy(values + index * size_of(dtype), &bits, (size_t)size_of(dtype));
}

static void check_masked_weight(int64_t rows, int64_t columns, int weight_dtype, int other_dtype, double clip,
                                int threads) {
    int64_t count = rows * columns, weight_bytes = count * size_of(weight_dtype);
    int64_t other_bytes = count * size_of(other_dtype);
    struct masked_case c = {rows, columns, ""};
    uint8_t *weight = allocate_elements(count, size_of(weight_dtype)), *mask = allocate_elements(count, 1);
    uint8_t *gradient = allocate_elements(count, size_of(other_dtype)), *scale = allocate_elements(rows, 4);
    uint8_t *value = allocate_output(count, size_of(other_dtype));
    uint8_t *weight_gradient = allocate_output(count, size_of(weight_dtype));
    float *expected = allocate(count * 4), *bounds = allocate(rows * 4), *windows = allocate(rows * 4);
    /* No float32, as the clip ranges: wider than they are or narrower. */
    double window = 2.2 / clip;
    fill_values(weight, weight_dtype, count);
    fill_values(gradient, other_dtype, count);
    for (int64_t m = 0; m < rows; m++) {
        float drawn = draw_scale();
        memcpy(scale + 4 * m, &drawn, 4);
        bounds[m] = (float)clip * drawn;
        windows[m] = (float)window * drawn;
    }
    for (int64_t i = 0; i < count; i++) {
        float bound = bounds[i / columns], reach = windows[i / columns];
        float edges[] = {bound, -bound, reach, -reach, 0.0f, -0.0f};
        put_on_edges(weight, weight_dtype, i, edges, LENGTH(edges));
        mask[i] = (uint8_t)draw(2);
    }
    for (int surrogate = -1; surrogate <= HF_STOMPP_CLIPPED_STE; surrogate++) {
        int of_value = surrogate < 0, output_dtype = of_value ? other_dtype : weight_dtype;
        uint8_t *output = of_value ? value : weight_gradient;
        for (int64_t i = 0; i < count; i++) {
            float w = value_at(weight, weight_dtype, i), level = float_at(scale, i / columns);
            float bound = bounds[i / columns];
            int frozen = mask[i];
            float reach = frozen ? windows[i / columns] : bound;
            int inside = w >= -reach && w <= reach;
            if (of_value)
                expected[i] = frozen ? (w >= 0 ? level : -level) : clip_to(w, -bound, bound);
            else
                expected[i] = gradient_passes(surrogate, frozen, inside) ? value_at(gradient, other_dtype, i) : 0.0f;
            expected[i] = round_to(expected[i], output_dtype);
        }
        snprintf(c.options, sizeof c.options, "weight %s, other %s, clip %g, %s, threads %d", dtype_names[weight_dtype],
                 dtype_names[other_dtype], clip, of_value ? "value" : surrogate_names[surrogate], threads);
        for (int kernel = 0; kernel < HF_STOMPP_KERNELS; kernel++) {
            if (hf_stompp_unavailable(kernel)) continue;
            clear_output(output, of_value ? other_bytes : weight_bytes);
            int status = hf_stompp_masked_weight(&(struct hf_stompp_masked_weight){
                .kernel = kernel, .threads = threads, .weight = weight, .weight_dtype = weight_dtype, .mask = mask,
                .scale = (const float *)scale, .clip = clip, .window = window, .rows = rows, .columns = columns,
                .gradient = of_value ? NULL : gradient, .surrogate = of_value ? 0 : surrogate, .output = output,
                .other_dtype = other_dtype});
            if (status != HF_STOMPP_OK) fail_masked(kernel, rows, columns, c.options, "masked_weight: not OK");
            check_masked_output(kernel, &c, output, output_dtype, expected, "masked_weight");
            maskings[kernel]++;
        }
    }
    release_elements(weight, size_of(weight_dtype));
    release_elements(mask, 1);
    release_elements(gradient, size_of(other_dtype));
    release_elements(scale, 4);
    release_elements(value, size_of(other_dtype));
    release_elements(weight_gradient, size_of(weight_dtype));
    free(expected);
    free(bounds);
    free(windows);
}

/* A masked activation with its expected bits, of which the gradient is taken. */
struct activation {
    struct masked_case of;
    int dtype, threads;
    uint8_t *mask;
    int8_t *passes, *upper;
    uint8_t *pass_bits, *upper_bits;
};

enum { SUMS = 3 };

static void check_activation_gradient(struct activation *a) {
    int64_t rows = a->of.rows, features = a->of.columns, count = rows * features, size = size_of(a->dtype);
    uint8_t *gradient = allocate_elements(count, size), *output = allocate_output(count, size);
    uint8_t *sums = allocate_output(SUMS * features, 8);
    float *expected = allocate(count * 4);
    double *totals = calloc((size_t)(SUMS * features), 8), *magnitudes = calloc((size_t)(SUMS * features), 8);
    if (!totals || !magnitudes) exit(1);
    fill_values(gradient, a->dtype, count);
    for (int64_t i = 0; i < count; i++) {
        int64_t k = i % features;
        float g = value_at(gradient, a->dtype, i);
        /* Every other column has finite sums. */
        if (k % 2 && !(fabsf(g) < 1e4f)) {
            memset(gradient + i * size, 0, (size_t)size);
            g = 0.0f;
        }
        int passes = a->passes[i] > 0, held = !passes || a->mask[k];
        int counts[SUMS] = {passes, held, held && a->upper[i] > 0};
        expected[i] = passes ? g : 0.0f;
        for (int kind = 0; kind < SUMS; kind++)
            if (counts[kind]) {
                totals[kind * features + k] += (double)g;
                magnitudes[kind * features + k] += fabs((double)g);
            }
    }
    for (int kernel = 0; kernel < HF_STOMPP_KERNELS; kernel++) {
        if (hf_stompp_unavailable(kernel)) continue;
        uint8_t *sums_of_one_thread = allocate(SUMS * features * 8);
        for (int threads = 1; threads <= a->threads; threads++) {
            clear_output(output, count * size);
            clear_output(sums, SUMS * features * 8);
            int status = hf_stompp_masked_activation(&(struct hf_stompp_masked_activation){
                .kernel = kernel, .threads = threads, .dtype = a->dtype, .mask = a->mask, .rows = rows,
                .features = features, .passes = a->pass_bits, .upper = a->upper_bits, .gradient = gradient,
                .output = output, .sums = (double *)sums});
            if (status != HF_STOMPP_OK) fail_masked(kernel, rows, features, a->of.options, "gradient: not OK");
            check_masked_output(kernel, &a->of, output, a->dtype, expected, "gradient");
            if (threads == 1) memcpy(sums_of_one_thread, sums, (size_t)(SUMS * features * 8));
            check_bytes(kernel, &a->of, sums, sums_of_one_thread, SUMS * features * 8,
                        "sums depend on the threads, or are written beyond");
            for (int64_t k = 0; k < SUMS * features; k++) {
                double sum, total = totals[k];
                memcpy(&sum, sums + 8 * k, 8);
                int close = isfinite(total) ? fabs(sum - total) <= 1e-12 * magnitudes[k] : sum == total;
                if (!close && !(isnan(sum) && isnan(total)))
                    fail_masked(kernel, rows, features, a->of.options, "another sum than expected");
            }
            maskings[kernel]++;
        }
        free(sums_of_one_thread);
    }
    release_elements(gradient, size);
    release_elements(output, size);
    release_elements(sums, 8);
    free(expected);
    free(totals);
    free(magnitudes);
}

static void check_masked_activation(int64_t rows, int64_t features, int dtype, int threads) {
    int64_t count = rows * features, size = size_of(dtype), bytes = rows * bytes_of_row(features);
    uint8_t *value = allocate_elements(count, size), *pre_activation = allocate_elements(count, size);
    uint8_t *threshold = allocate_elements(features, 4), *offset = allocate_elements(features, 4);
    uint8_t *center = allocate_elements(features, 4), *amplitude = allocate_elements(1, 4);
    uint8_t *bound = allocate_elements(1, 4), *window = allocate_elements(1, 4);
    uint8_t *output = allocate_output(count, size), *passes = allocate_output(bytes, 1);
    uint8_t *upper = allocate_output(bytes, 1);
    float *expected = allocate(count * 4);
    struct activation a = {.of = {rows, features, ""}, .dtype = dtype, .threads = threads,
                           .mask = allocate_elements(features, 1), .passes = allocate(count), .upper = allocate(count),
                           .pass_bits = allocate_elements(bytes, 1), .upper_bits = allocate_elements(bytes, 1)};
    fill_values(value, dtype, count);
    fill_values(pre_activation, dtype, count);
    fill_factors(threshold, features);
    float reach = 0.0f;
    while (!(reach > 0) || isinf(reach)) reach = draw_scale();
    float narrow = 0.6f * reach;
    memcpy(bound, &reach, 4);
    memcpy(window, &narrow, 4);
    memcpy(amplitude, &(float){0.75f}, 4);
    for (int64_t k = 0; k < features; k++) {
        a.mask[k] = (uint8_t)draw(2);
        float level = (float)draw(1000) / 128 - 4, middle = draw(2) ? 0.0f : (float)draw(1000) / 300 - 2;
        memcpy(offset + 4 * k, &level, 4);
        memcpy(center + 4 * k, &middle, 4);
    }
    for (int64_t i = 0; i < count; i++) {
        float middle = float_at(center, i % features), limit = float_at(threshold, i % features);
        float edges[] = {middle - reach, middle + reach, middle - narrow, middle + narrow, middle};
        put_on_edges(value, dtype, i, edges, LENGTH(edges));
        if (!isnan(limit)) put_on_edges(pre_activation, dtype, i, &limit, 1);
    }
    for (int surrogate = 0; surrogate <= HF_STOMPP_CLIPPED_STE; surrogate++) {
        for (int64_t i = 0; i < count; i++) {
            int64_t k = i % features;
            float v = value_at(value, dtype, i), middle = float_at(center, k), level = float_at(offset, k);
            float low = middle - reach, high = middle + reach, half = float_at(amplitude, 0);
            int frozen = a.mask[k], above = value_at(pre_activation, dtype, i) >= float_at(threshold, k);
            expected[i] = frozen ? (above ? level + half : level - half) : clip_to(v, low, high);
            expected[i] = round_to(expected[i], dtype);
            float within = frozen ? narrow : reach;
            int inside = v >= middle - within && v <= middle + within;
            a.passes[i] = gradient_passes(surrogate, frozen, inside) ? 1 : -1;
            a.upper[i] = (frozen ? above : v > middle) ? 1 : -1;
        }
        pack(a.passes, rows, features, a.pass_bits);
        pack(a.upper, rows, features, a.upper_bits);
        snprintf(a.of.options, sizeof a.of.options, "activation %s, %s, threads %d", dtype_names[dtype],
                 surrogate_names[surrogate], threads);
        for (int kernel = 0; kernel < HF_STOMPP_KERNELS; kernel++) {
            if (hf_stompp_unavailable(kernel)) continue;
            clear_output(output, count * size);
            clear_output(passes, bytes);
            clear_output(upper, bytes);
            int status = hf_stompp_masked_activation(&(struct hf_stompp_masked_activation){
                .kernel = kernel, .threads = threads, .value = value, .pre_activation = pre_activation, .dtype = dtype,
                .mask = a.mask, .threshold = (const float *)threshold, .offset = (const float *)offset,
                .amplitude = (const float *)amplitude, .center = (const float *)center, .bound = (const float *)bound,
                .window = (const float *)window, .surrogate = surrogate, .rows = rows, .features = features, .passes = passes, .upper = upper,
                .output = output});
            if (status != HF_STOMPP_OK) fail_masked(kernel, rows, features, a.of.options, "value: not OK");
            check_masked_output(kernel, &a.of, output, dtype, expected, "value");
            check_bytes(kernel, &a.of, passes, a.pass_bits, bytes, "other bits of what passes than expected");
            check_bytes(kernel, &a.of, upper, a.upper_bits, bytes, "other bits of the upper side than expected");
            maskings[kernel]++;
        }
        check_activation_gradient(&a);
    }
    release_elements(value, size);
    release_elements(pre_activation, size);
    release_elements(threshold, 4);
    release_elements(window, 4);
    release_elements(offset, 4);
    release_elements(center, 4);
    release_elements(amplitude, 4);
    release_elements(bound, 4);
    release_elements(output, size);
    release_elements(passes, 1);
    release_elements(upper, 1);
    release_elements(a.mask, 1);
    release_elements(a.pass_bits, 1);
    release_elements(a.upper_bits, 1);
    free(a.passes);
    free(a.upper);
    free(expected);
}

static void check_sign_product(int64_t out_features, int64_t in_features, int transposed, int threads) {
    int64_t taken = transposed ? out_features : in_features, given = transposed ? in_features : out_features;
    uint8_t *weight = allocate_elements(out_features * bytes_of_row(in_features), 1);
    uint8_t *vector = allocate_elements(taken, 8), *output = allocate_output(given, 8);
    int8_t *signs = allocate(out_features * in_features);
    double *expected = calloc((size_t)given + 1, 8);
    if (!expected) exit(1);
    for (int64_t i = 0; i < out_features * in_features; i++) signs[i] = draw(2) ? 1 : -1;
    pack(signs, out_features, in_features, weight);
    /* Of so few bits that every sum is exact, in whatever order it is taken. */
    for (int64_t i = 0; i < taken; i++) {
        double number = ldexp((double)draw(1 << 30) - (1 << 29), -20);
        memcpy(vector + 8 * i, &number, 8);
    }
    for (int64_t n = 0; n < out_features; n++)
        for (int64_t k = 0; k < in_features; k++) {
            double number;
            memcpy(&number, vector + 8 * (transposed ? n : k), 8);
            expected[transposed ? k : n] += signs[n * in_features + k] * number;
        }
    struct masked_case c = {out_features, in_features, ""};
    snprintf(c.options, sizeof c.options, "%s, threads %d", transposed ? "transposed" : "as it is", threads);
    for (int kernel = 0; kernel < HF_STOMPP_KERNELS; kernel++) {
        if (hf_stompp_unavailable(kernel)) continue;
        clear_output(output, given * 8);
        int status = hf_stompp_sign_product(&(struct hf_stompp_sign_product){
            kernel, threads, weight, out_features, in_features, transposed, (const double *)vector, (double *)output});
        if (status != HF_STOMPP_OK) fail_masked(kernel, out_features, in_features, c.options, "sign_product: not OK");
        for (int64_t i = 0; i < given; i++) {
            double sum;
            memcpy(&sum, output + 8 * i, 8);
            if (sum != expected[i])
                fail_masked(kernel, out_features, in_features, c.options, "sign_product: another sum than expected");
        }
        check_bytes(kernel, &c, output, output, given * 8, "sign_product: writes beyond the output");
        maskings[kernel]++;
    }
    release_elements(weight, 1);
    release_elements(vector, 8);
    release_elements(output, 8);
    free(signs);
    free(expected);
}

/* Rows of floats whose magnitudes differ by less than 2^8; one in eight is zero, one holds a special value. */
static void fill_rows(uint8_t *values, int dtype, int64_t rows, int64_t features) {
    int fraction_bits = dtype == HF_STOMPP_F32 ? 23 : dtype == HF_STOMPP_BF16 ? 7 : 10;
    int exponents = dtype == HF_STOMPP_F16 ? 30 : 254;
    int64_t size = size_of(dtype);
    for (int64_t m = 0; m < rows; m++) {
        uint64_t kind = draw(8), greatest = draw((uint64_t)exponents) + 1;
        for (int64_t k = 0; k < features; k++) {
            uint64_t below = draw(8), exponent = below < greatest ? greatest - below : 0;
            uint64_t bits = draw(2) << (8 * size - 1) | exponent << fraction_bits | draw((uint64_t)1 << fraction_bits);
            if (kind == 0) bits = 0;
            memcpy(values + (m * features + k) * size, &bits, (size_t)size);
        }
        uint32_t special = draw_special(dtype);
        if (kind == 1) memcpy(values + (m * features + (int64_t)draw((uint64_t)features)) * size, &special, (size_t)size);
    }
}

/* The bytes that a row is rounded to; returns their scale. */
static float round_row(const uint8_t *values, int dtype, int64_t first, int64_t features, int8_t *codes) {
    float largest = 0;
    int finite = 1;
    for (int64_t k = 0; k < features; k++) {
        float magnitude = fabsf(value_at(values, dtype, first + k));
        finite = finite && isfinite(magnitude);
        if (magnitude > largest) largest = magnitude;
    }
    float factor = 127.0f / largest;
    for (int64_t k = 0; k < features; k++)
        codes[k] = finite && isfinite(factor) ? (int8_t)rintf(value_at(values, dtype, first + k) * factor) : 0;
    return !finite ? NAN : isfinite(factor) ? largest / 127.0f : 0.0f;
}

static void check_byte_product(int64_t rows, int64_t in_features, int64_t out_features, int input_dtype, int dtype,
                               int with_bias, int threads) {
    struct problem p = make(rows, in_features, out_features, input_dtype, 0);
    int64_t count = rows * out_features, bytes = count * size_of(dtype);
    int8_t *codes = allocate(in_features);
    float *expected = allocate(count * 4);
    uint8_t *output = allocate_elements(bytes + GUARD_BYTES, 4);
    fill_rows(p.input, input_dtype, rows, in_features);
    for (int64_t m = 0; m < rows; m++) {
        float row_scale = round_row(p.input, input_dtype, m * in_features, in_features, codes);
        for (int64_t n = 0; n < out_features; n++) {
            int32_t sum = 0;
            for (int64_t k = 0; k < in_features; k++) sum += codes[k] * p.weight_signs[n * in_features + k];
            float value = (float)sum * row_scale;
            value = value * float_at(p.scale, n);
            if (with_bias) value = value + float_at(p.bias, n);
            expected[m * out_features + n] = round_to(value, dtype);
        }
    }
    char what[100];
    snprintf(what, sizeof what, "bytes, output %s, %s bias, threads %d", dtype_names[dtype], with_bias ? "with" : "no",
             threads);
    for (int kernel = 0; kernel < HF_STOMPP_KERNELS; kernel++) {
        if (hf_stompp_unavailable(kernel)) continue;
        memset(output, GUARD, (size_t)(bytes + GUARD_BYTES));
        int status = hf_stompp_binary_linear(&(struct hf_stompp_product){
            kernel, threads, p.input, input_dtype, NULL, p.weight, (const float *)p.scale,
            with_bias ? (const float *)p.bias : NULL, rows, in_features, out_features, output, dtype, NULL, NULL, 8});
        if (status != HF_STOMPP_OK) fail(kernel, &p, "bytes: not OK");
        check_values(kernel, &p, output, dtype, expected, what);
        check_guard(kernel, &p, output + bytes, "bytes: writes beyond the output");
        byte_products[kernel]++;
    }
    release_elements(output, 4);
    free(codes);
    free(expected);
    release(&p);
}

static void check_byte_products(void) {
    static const int64_t rows[] = {0, 1, 2, 3, 4, 5, 9, 17, 100}, out_features[] = {1, 3, 15, 16, 17, 33, 65};
    static const int64_t in_features[] = {1, 7, 63, 64, 65, 127, 128, 129, 255, 257, 768, 1000};
    int turn = 0;
    for (int m = 0; m < LENGTH(rows); m++)
        for (int k = 0; k < LENGTH(in_features); k++, turn++)
            check_byte_product(rows[m], in_features[k], out_features[turn % LENGTH(out_features)], turn % 3,
                               turn / 3 % 3, turn / 9 % 2, 1);
    /* Divided among threads by rows and by columns; sums of more than 2^24. */
    static const int64_t large[][3] = {{500, 1000, 65}, {3, 3072, 2100}, {700, 1500, 33}, {5, 140000, 17}};
    for (int shape = 0; shape < LENGTH(large); shape++)
        for (int threads = 1; threads <= 2; threads++)
            check_byte_product(large[shape][0], large[shape][1], large[shape][2], (shape + threads) % 3, shape % 3, 1,
                               threads);
}

static void check_masked(void) {
    static const int64_t rows[] = {0, 1, 2, 33, 70}, columns[] = {1, 7, 63, 64, 65, 127, 257, 770};
    static const double clips[] = {1.0, 1.1, 3.0};
    int turn = 0;
    for (int m = 0; m < LENGTH(rows); m++)
        for (int k = 0; k < LENGTH(columns); k++, turn++) {
            for (int dtypes = 0; dtypes < 9; dtypes++)
                check_masked_weight(rows[m], columns[k], dtypes / 3, dtypes % 3, clips[turn % LENGTH(clips)], 1);
            for (int dtype = 0; dtype < 3; dtype++) check_masked_activation(rows[m], columns[k], dtype, 1);
            for (int transposed = 0; transposed < 2; transposed++)
                check_sign_product(rows[m], columns[k], transposed, 1);
        }
    /* From 128 thousand elements on two threads share the work: rows or columns, evenly or not. */
    static const int64_t large[][2] = {{2005, 65}, {43, 3072}, {1, 130001}, {701, 203}};
    for (int shape = 0; shape < LENGTH(large); shape++)
        for (int threads = 1; threads <= 2; threads++) {
            check_masked_weight(large[shape][0], large[shape][1], shape % 3, (shape + threads) % 3, 1.1, threads);
            check_masked_activation(large[shape][0], large[shape][1], (shape + threads) % 3, threads);
            for (int transposed = 0; transposed < 2; transposed++)
                check_sign_product(large[shape][0], large[shape][1], transposed, threads);
        }
}

/* A thread of a program that runs one model in several: what every kernel puts out, packed bits before products. */
struct caller {
    const struct problem *of;
    uint8_t *output;
    int64_t bits, values;
    int failed;
    pthread_t thread;
};

static void *call_every_kernel(void *argument) {
    struct caller *caller = argument;
    const struct problem *p = caller->of;
    uint8_t *output = caller->output;
    for (int kernel = 0; kernel < HF_STOMPP_KERNELS; kernel++) {
        if (hf_stompp_unavailable(kernel)) continue;
        caller->failed |= hf_stompp_pack_sign(&(struct hf_stompp_packing){
            kernel, 2, p->input, p->input_dtype, (const float *)p->threshold, p->rows, p->in_features, output, NULL});
        caller->failed |= hf_stompp_binary_linear(&(struct hf_stompp_product){
            kernel, 2, p->input, p->input_dtype, (const float *)p->threshold, p->weight, (const float *)p->scale,
            (const float *)p->bias, p->rows, p->in_features, p->out_features, output + caller->bits, HF_STOMPP_F32,
            NULL, NULL});
        output += caller->bits + caller->values;
    }
    return NULL;
}

/* First of all checks, so that what a kernel finds out once is found out by all callers at once. */
static void check_callers_at_once(void) {
    enum { CALLERS = 4 };
    struct problem p = make(130, 3072, 193, HF_STOMPP_F32, 1);
    struct caller callers[CALLERS + 1];
    int64_t bits = p.rows * bytes_of_row(p.in_features), values = p.rows * p.out_features * 4;
    int64_t bytes = HF_STOMPP_KERNELS * (bits + values);
    for (int i = 0; i <= CALLERS; i++) {
        callers[i] = (struct caller){.of = &p, .output = allocate(bytes), .bits = bits, .values = values};
        memset(callers[i].output, GUARD, (size_t)bytes);
        if (i < CALLERS && pthread_create(&callers[i].thread, NULL, call_every_kernel, &callers[i])) exit(1);
    }
    for (int i = 0; i < CALLERS; i++) pthread_join(callers[i].thread, NULL);
    call_every_kernel(&callers[CALLERS]);
    for (int i = 0; i <= CALLERS; i++)
        if (callers[i].failed || memcmp(callers[i].output, callers[CALLERS].output, (size_t)bytes)) {
            printf("callers at once: another result than of one alone\n");
            exit(1);
        }
    for (int i = 0; i <= CALLERS; i++) free(callers[i].output);
    release(&p);
}

int main(void) {
    check_callers_at_once();
    check_every_shape();
    check_every_dtype();
    check_large_shapes();
    check_masked();
    check_byte_products();
    int run = 0;
    for (int kernel = 0; kernel < HF_STOMPP_KERNELS; kernel++) {
        const char *reason = hf_stompp_unavailable(kernel);
        if (reason)
            printf("%s: not run: %s\n", kernel_names[kernel], reason);
        else
            printf("%s: %ld products, %ld packings, %ld maskings, %ld products of bytes\n", kernel_names[kernel],
                   products[kernel], packings[kernel], maskings[kernel], byte_products[kernel]);
        run += !reason;
    }
    return run == 0;
}
