/* The first layer in one pass over the image: uint8 pixels in, convolution, bias, activation, statistics, stored values out. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum activation { NONE, SIGMOID, TANH, RELU };
enum { ABI = 2, BLOCK = 256 };
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

struct moments {
    double n, mean, squares; /* squares: about the mean */
    float low, high;
};

struct stored { /* integers are value * levels + constant, cut off */
    int kind;
    float levels, constant;
};

struct version {
    int lanes;
    void (*convolve)(const struct pair *, int width, float *out[2][2]);
    void (*activate)(float *, int n, int activation);
    struct moments (*measure)(const float *, int n);
    void (*store)(const float *, int n, const struct stored *, char *out);
    void (*widen)(const uint8_t *, int n, int channels, float *const *rows);
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

#define LANES 4
#define WIDE 3
#define NAME(x) JOIN(plain_, x)
#include "kernel_tile.h"
#undef LANES
#undef WIDE
#undef NAME

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define LANES 8
#define WIDE 2
#define NAME(x) JOIN(avx2_, x)
#include "kernel_tile.h"
#undef LANES
#undef WIDE
#undef NAME
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,fma,prefer-vector-width=512")
#define LANES 16
#define WIDE 6
#define NAME(x) JOIN(avx512_, x)
#include "kernel_tile.h"
#undef LANES
#undef WIDE
#undef NAME
#pragma GCC pop_options
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

static void merge(struct moments *all, struct moments row) /* Chan, Golub and LeVeque 1979 */
{
    double n = all->n + row.n, delta = row.mean - all->mean;
    all->squares += row.squares + delta * delta * all->n * row.n / n;
    all->mean += delta * row.n / n;
    all->low = all->n && all->low < row.low ? all->low : row.low;
    all->high = all->n && all->high > row.high ? all->high : row.high;
    all->n = n;
}

/* Take one output row of one filter, convolution and bias done; the row itself is changed. */
static void finish(const struct sink *s, int filter, int y, float *row)
{
    const struct version *v = s->version;
    v->activate(row, s->width, s->activation);
    for (int x = 0; x < s->width; x += BLOCK) /* float32 sums of a few, float64 of them */
        merge(&s->all[filter], v->measure(row + x, s->width - x < BLOCK ? s->width - x : BLOCK));
    v->store(row, s->width, &s->stored, s->out + filter * s->filter_stride + y * s->row_stride);
}

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && __GNUC__ >= 11 && !defined(__clang__)
#include "kernel_amx.h"
#else
enum { AMX_LANES = 32 };
static int amx_runs(void) { return 0; }
static int amx_fits(const struct layer *l) { return (void)l, 0; }
static int amx_layer(const struct layer *l, const struct sink *s) { return (void)l, (void)s, -1; }
#endif

static int vector_layer(const struct layer *l, const struct sink *sink)
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
                    finish(sink, f + k, y + r, to[k][r]);
        }
    }
    free(ring), free(rows);
    return 0;
}

/* Changes with the arguments of what is called from outside. */
int featuremaps_abi(void) { return ABI; }

/* Lanes of the widest version that this processor runs for such a layer, at most so many. */
int featuremaps_lanes(int lanes, int channels, int kw)
{
    struct layer layer = {.channels = channels, .kw = kw};
    return lanes >= AMX_LANES && amx_fits(&layer) && amx_runs() ? AMX_LANES : choose(lanes)->lanes;
}

/*
 * image: (height, width, channel), contiguous. weight: (filters, channel, kh, kw); bias: (filters). out: (filters, y, x) with
 * strides in bytes, contiguous along x. statistics: (filters, 4): mean, sum of squares about it, low, high. Returns 0, or -1
 * where there is no memory.
 */
int featuremaps_layer(const uint8_t *image, int height, int width, int channels, const float *weight, const float *bias,
                      int filters, int kh, int kw, int activation, int kind, float levels, float constant, char *out,
                      int64_t filter_stride, int64_t row_stride, double *statistics, int lanes)
{
    struct layer layer = {image, height, width, channels, weight, bias, filters, kh, kw};
    struct moments *all = calloc((size_t)filters, sizeof *all);
    if (!all)
        return -1;
    struct sink sink = {choose(lanes), activation, width - kw + 1, {kind, levels, constant}, out, filter_stride, row_stride, all};
    int failed = lanes >= AMX_LANES && amx_fits(&layer) && amx_runs() ? amx_layer(&layer, &sink) : vector_layer(&layer, &sink);
    for (int f = 0; f < filters; f++) {
        double *s = statistics + 4 * f;
        s[0] = all[f].mean, s[1] = all[f].squares, s[2] = all[f].low, s[3] = all[f].high;
    }
    free(all);
    return failed;
}
