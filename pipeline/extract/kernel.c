/* The first layer in one pass over the image: uint8 pixels in, convolution, bias, activation, statistics, stored values out. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum activation { NONE, SIGMOID, TANH, RELU };
enum { ABI = 5, BLOCK = 1024, POINTS = 25 };
enum { PATCHES = 6, SUM = 128 }; /* outputs of a tile; products, or outputs, of one float32 sum */
enum kind { FLOAT32, UINT8, UINT16 };

struct layer {
    const uint8_t *image; /* (height, width, channel) */
    int height, width, channels;
    const float *weight, *bias; /* (filters, channel, kh, kw), (filters) */
    int filters, kh, kw;
};

struct pair { /* two filters and the input rows that two output rows need */
    int channels, kh, kw;
    float *const *rows;     /* (kh + 1, channel) */
    const float *weight[2]; /* (channel, ky, kx) each */
    float bias[2];
};

struct blocks { /* kernel and rows in blocks of 3 x 3, for Winograd's convolution */
    int channels, kh, kw;
    int groups, in_groups;                    /* vectors of a row of outputs, of inputs */
    size_t n_pixels, n_points, n_maps, taps; /* floats of a row of pixels, of points, of maps; weights of two filters at a point */
};

struct moments {
    double n, mean, squares; /* squares: about the mean */
    float low, high;
};

struct sums { /* of differences from `about`, and their squares */
    float about, low, high;
    double sum, squares;
};

struct stored { /* integers are value * levels + constant, cut off */
    int kind;
    float levels, constant;
};

struct patches { /* a kernel over parts of images, channels last */
    int kh;
    size_t row, run, size, stride; /* floats: of an image's row, of a kernel's row, of a kernel, between outputs */
};

struct epilogue { /* outputs of a convolution, and what is made of them */
    int groups, filters, window; /* vectors of filters; outputs that a pool takes together */
    const float *in;             /* (y and x, window, group, lane) */
    float *about, *low, *high, *sum, *squares; /* (group, lane) each */
};

struct version {
    int lanes, tile;
    void (*convolve)(const struct pair *, int width, float *out[2][2]);
    void (*widen)(const uint8_t *, int n, int channels, float *const *rows);
    void (*read)(const struct blocks *, const uint8_t *, uint8_t *turned, float *pixels);
    void (*transform)(const struct blocks *, float *const pixels[5], float *points);
    void (*multiply)(const struct blocks *, const float *const *points, const float *weight, const float *bias, float *tile,
                     float *maps);
    void (*join)(const float *maps, int n, float *row);
    struct sums (*activate)(float *, int n, int activation);
    void (*store)(const float *, int n, const struct stored *, char *out);
    void (*patches)(const struct patches *, int groups, const float *const *at, const float *weight, const float *bias, float *out);
    void (*epilogue)(const struct epilogue *, int activation, int first, int n, float *out);
};

struct batch { /* images of one size, and where their maps go */
    int n;
    const uint8_t *const *images;
    char *const *out;
    struct moments *all; /* (n, filters) */
};

struct sink { /* where maps go, and what is noted of them */
    const struct version *version;
    int activation, width;
    struct stored stored;
    char *out;
    int64_t filter_stride, row_stride; /* bytes */
    struct moments *all;               /* (filters) */
};

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define SHUFFLE_BYTES SHUFFLE
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#define SHUFFLE_BYTES(a, b, ...) __builtin_shuffle(a, b, (bytes){__VA_ARGS__})
#endif
#define LOW_BYTES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH_BYTES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
typedef uint8_t bytes __attribute__((vector_size(16), aligned(1)));

#define LANES 4
#define WIDE 3
#define TILE 4
#define LOW_HALVES 0, 4, 1, 5
#define HIGH_HALVES 2, 6, 3, 7
#define LESSER(a, b) NAME(choose)((a) < (b), a, b)
#define GREATER(a, b) NAME(choose)((a) > (b), a, b)
#define NAME(x) JOIN(plain_, x)
#include "kernel_tile.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define LANES 8
#define WIDE 2
#define TILE 4
#define LOW_HALVES 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH_HALVES 4, 12, 5, 13, 6, 14, 7, 15
#define LESSER(a, b) ((vec)_mm256_min_ps((__m256)(a), (__m256)(b)))
#define GREATER(a, b) ((vec)_mm256_max_ps((__m256)(a), (__m256)(b)))
#define NAME(x) JOIN(avx2_, x)
#include "kernel_tile.h"
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,fma,prefer-vector-width=512")
#endif
#define LANES 16
#define WIDE 6
#define TILE 6
#define LOW_HALVES LOW_BYTES
#define HIGH_HALVES HIGH_BYTES
#define LESSER(a, b) ((vec)_mm512_min_ps((__m512)(a), (__m512)(b)))
#define GREATER(a, b) ((vec)_mm512_max_ps((__m512)(a), (__m512)(b)))
#define NAME(x) JOIN(avx512_, x)
#include "kernel_tile.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

static const struct version *choose(int lanes)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (lanes >= 16 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vl"))
        return &avx512_version;
    if (lanes >= 8 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return &avx2_version;
#endif
    (void)lanes;
    return &plain_version;
}

static void merge(struct moments *all, int count, struct sums s) /* Chan, Golub and LeVeque 1979 */
{
    double shift = s.sum / count, squares = s.squares - s.sum * shift;
    double n = all->n + count, delta = s.about + shift - all->mean;
    all->squares += (squares > 0 ? squares : 0) + delta * delta * all->n * count / n;
    all->mean += delta * count / n;
    all->low = all->n && all->low < s.low ? all->low : s.low;
    all->high = all->n && all->high > s.high ? all->high : s.high;
    all->n = n;
}

static void note(const struct moments *m, double *statistics)
{
    statistics[0] = m->mean, statistics[1] = m->squares, statistics[2] = m->low, statistics[3] = m->high;
}

/* Take n outputs of one filter, from (y, x) on, convolution and bias done; they are changed, and up to a whole vector beyond. */
static void finish(const struct sink *s, int filter, int y, int x, float *row, int n)
{
    const struct version *v = s->version;
    for (int i = 0; i < n; i += BLOCK) { /* float32 sums of a few, float64 of them */
        int count = n - i < BLOCK ? n - i : BLOCK;
        merge(&s->all[filter], count, v->activate(row + i, count, s->activation));
    }
    int size = s->stored.kind == FLOAT32 ? 4 : s->stored.kind == UINT16 ? 2 : 1;
    v->store(row, n, &s->stored, s->out + filter * s->filter_stride + y * s->row_stride + (int64_t)x * size);
}

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && __GNUC__ >= 11 && !defined(__clang__)
#include "kernel_amx.h"
#else
enum { AMX_LANES = 32 };
static int amx_runs(void) { return 0; }
static int amx_fits(const struct layer *l) { return (void)l, 0; }
static int amx_layer(const struct layer *l, const struct sink *s) { return (void)l, (void)s, -1; }
#endif

static void take(struct layer *l, struct sink *s, const struct batch *b, int i)
{
    l->image = b->images[i], s->out = b->out[i], s->all = b->all + (size_t)i * l->filters;
}

static int direct_layer(const struct layer *l, const struct sink *sink)
{
    const struct version *v = sink->version;
    int out_height = l->height - l->kh + 1, size = l->channels * l->kh * l->kw;
    size_t padded = (size_t)l->width + 64 + (size_t)l->kw; /* the last vectors reach beyond the row */
    int n_rows = (l->kh + 1) * l->channels;
    float *ring = calloc((size_t)(n_rows + 4) * padded + size, sizeof *ring);
    float **rows = malloc(2 * (size_t)n_rows * sizeof *rows);
    if (!ring || !rows) {
        free(ring), free(rows);
        return -1;
    }
    float *const buffers = ring + (size_t)n_rows * padded, *const zeros = buffers + 4 * padded;
    float **slots = rows + n_rows; /* (kh + 1, channel): where row y of the image goes, at y % (kh + 1) */
    for (int i = 0; i < n_rows; i++)
        slots[i] = ring + (size_t)i * padded;
    int read = 0;
    for (int y = 0; y < out_height; y += 2) {
        int n = y + 1 < out_height ? 2 : 1;
        for (; read < y + l->kh + n - 1; read++)
            v->widen(l->image + (size_t)read * l->width * l->channels, l->width, l->channels,
                     slots + read % (l->kh + 1) * l->channels);
        for (int i = 0; i <= l->kh; i++)
            memcpy(rows + i * l->channels, slots + (y + i) % (l->kh + 1) * l->channels, (size_t)l->channels * sizeof *rows);
        for (int f = 0; f < l->filters; f += 2) {
            int last = f + 1 < l->filters;
            const float *weight = l->weight + (size_t)f * size;
            struct pair pair = {l->channels, l->kh, l->kw, rows, {weight, last ? weight + size : zeros},
                                {l->bias[f], last ? l->bias[f + 1] : 0}};
            float *to[2][2] = {{buffers, buffers + padded}, {buffers + 2 * padded, buffers + 3 * padded}};
            v->convolve(&pair, sink->width, to);
            for (int k = 0; k <= last; k++)
                for (int r = 0; r < n; r++)
                    finish(sink, f + k, y + r, 0, to[k][r], sink->width);
        }
    }
    free(ring), free(rows);
    return 0;
}

static int direct_layers(struct layer *l, struct sink *sink, const struct batch *b)
{
    int failed = 0;
    for (int i = 0; i < b->n && !failed; i++) {
        take(l, sink, b, i);
        failed = direct_layer(l, sink);
    }
    return failed;
}

#include "kernel_blocks.h"
#include "kernel_stack.h"

/* Changes with the arguments of what is called from outside. */
int featuremaps_abi(void) { return ABI; }

/* Lanes of the widest version that this processor runs for such a layer, at most so many; 1 more by Winograd's convolution. */
int featuremaps_version(int lanes, int channels, int filters, int kh, int kw)
{
    struct layer layer = {.channels = channels, .filters = filters, .kh = kh, .kw = kw};
    if (lanes >= AMX_LANES && amx_fits(&layer) && amx_runs())
        return AMX_LANES;
    return choose(lanes)->lanes + blocks_pay(&layer);
}

/*
 * Images of one size: n pointers to (height, width, channel), contiguous. weight: (filters, channel, kh, kw); bias: (filters). out: n
 * pointers to (filters, y, x) with strides in bytes, contiguous along x. statistics: (n, filters, 4): mean, sum of squares about it,
 * low, high. What becomes of an image does not depend on the others. Returns 0, or -1 where there is no memory.
 */
int featuremaps_layer(const uint8_t *const *images, int n, int height, int width, int channels, const float *weight,
                      const float *bias, int filters, int kh, int kw, int activation, int kind, float levels, float constant,
                      char *const *out, int64_t filter_stride, int64_t row_stride, double *statistics, int lanes)
{
    struct layer layer = {NULL, height, width, channels, weight, bias, filters, kh, kw};
    struct moments *all = calloc((size_t)n * filters, sizeof *all);
    if (!all)
        return -1;
    struct sink sink = {choose(lanes), activation, width - kw + 1, {kind, levels, constant}, NULL, filter_stride, row_stride, NULL};
    struct batch batch = {n, images, out, all};
    int failed = 0;
    if (lanes >= AMX_LANES && amx_fits(&layer) && amx_runs())
        for (int i = 0; i < n && !failed; i++) {
            take(&layer, &sink, &batch, i);
            failed = amx_layer(&layer, &sink);
        }
    else
        failed = blocks_pay(&layer) ? blocks_layers(&layer, &sink, &batch) : direct_layers(&layer, &sink, &batch);
    for (size_t i = 0; i < (size_t)n * filters; i++)
        note(all + i, statistics + 4 * i);
    free(all);
    return failed;
}

/*
 * A stack of layers on images of one size, each with its own weights as `struct stack_layer` says. What becomes of an image does
 * not depend on the others. Returns 0, or -1 where there is no memory.
 */
int featuremaps_stack(const uint8_t *const *images, int n, int height, int width, int channels, const struct stack_layer *layers,
                      int n_layers, int lanes)
{
    return stack_of_layers(choose(lanes), images, n, height, width, channels, layers, n_layers);
}

/* Lanes of the vectors that `featuremaps_stack` uses, at most so many. */
int featuremaps_lanes(int lanes) { return choose(lanes)->lanes; }
