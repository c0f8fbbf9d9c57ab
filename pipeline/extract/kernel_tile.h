/* One instruction set's version of the fused layer; kernel.c includes this file once for each, with what is undefined at its end. */

typedef float NAME(vec) __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int NAME(ivec) __attribute__((vector_size(4 * LANES), aligned(4)));
#define vec NAME(vec)
#define ivec NAME(ivec)
#define LOAD(p) (*(const vec *)(p))
#define STORE(p, x) (*(vec *)(p) = (x))
#define SPLAT(x) ((x) - (vec){0})

INLINE vec NAME(choose)(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }

/* Add n vectors of two neighbouring output rows (only of row 0 or 1 where lo = hi) of two filters, for one input row. */
INLINE void NAME(accumulate)(
    vec acc[2][2][WIDE], int n, const float *in, const float *const w[2][2], int kw, int lo, int hi)
{
    for (int kx = 0; kx < kw; kx++) {
        for (int v = 0; v < n; v++) {
            vec x = LOAD(in + kx + v * LANES);
            for (int f = 0; f < 2; f++)
                for (int r = lo; r <= hi; r++)
                    acc[f][r][v] += x * w[f][r][kx];
        }
    }
}

/* n vectors of two output rows of two filters: valid convolution plus bias. */
INLINE void NAME(tile)(const struct pair *p, int n, int kw, int x, float *out[2][2])
{
    vec acc[2][2][WIDE];
    for (int f = 0; f < 2; f++)
        for (int r = 0; r < 2; r++)
            for (int v = 0; v < n; v++)
                acc[f][r][v] = SPLAT(p->bias[f]);
    int size = p->kh * kw;
    for (int c = 0; c < p->channels; c++) {
        for (int i = 0; i <= p->kh; i++) { /* input row i is kernel row i of output row 0, and i - 1 of output row 1 */
            const float *in = p->rows[i * p->channels + c] + x;
            const float *a = p->weight[0] + c * size + i * kw, *b = p->weight[1] + c * size + i * kw;
            const float *const w[2][2] = {{a, a - kw}, {b, b - kw}};
            if (i == 0)
                NAME(accumulate)(acc, n, in, w, kw, 0, 0);
            else if (i == p->kh)
                NAME(accumulate)(acc, n, in, w, kw, 1, 1);
            else
                NAME(accumulate)(acc, n, in, w, kw, 0, 1);
        }
    }
    for (int f = 0; f < 2; f++)
        for (int r = 0; r < 2; r++)
            for (int v = 0; v < n; v++)
                STORE(out[f][r] + x + v * LANES, acc[f][r][v]);
}

INLINE void NAME(convolve_as)(const struct pair *p, int kw, int width, float *out[2][2])
{
    int x = 0;
    for (; x + WIDE * LANES <= width; x += WIDE * LANES)
        NAME(tile)(p, WIDE, kw, x, out);
    for (; x + (WIDE / 2 - 1) * LANES < width; x += WIDE / 2 * LANES)
        NAME(tile)(p, WIDE / 2, kw, x, out);
    for (; x < width; x += LANES)
        NAME(tile)(p, 1, kw, x, out);
}

static void NAME(convolve)(const struct pair *p, int width, float *out[2][2])
{
    if (p->kw == 3) /* the compiler knows it, and keeps its weights at hand */
        NAME(convolve_as)(p, 3, width, out);
    else
        NAME(convolve_as)(p, p->kw, width, out);
}

/* One row of interleaved bytes to a float row per channel. */
static void NAME(widen)(const uint8_t *restrict in, int n, int channels, float *const *rows)
{
    if (channels == 3) {
        float *restrict a = rows[0], *restrict b = rows[1], *restrict c = rows[2];
        for (int x = 0; x < n; x++) {
            a[x] = in[3 * x];
            b[x] = in[3 * x + 1];
            c[x] = in[3 * x + 2];
        }
    } else {
        for (int k = 0; k < channels; k++)
            for (int x = 0; x < n; x++)
                rows[k][x] = in[channels * x + k];
    }
}

/* 2 to the power of x, good to 2 units in the last place: of a whole number, times a polynomial. */
INLINE vec NAME(power)(vec x)
{
    x = LESSER(SPLAT(126.0f), GREATER(SPLAT(-126.0f), x)); /* in this order NaN stays NaN */
    vec shifted = x + 12582912.0f, r = x - (shifted - 12582912.0f); /* shifted: rounded, and in the lowest bits */
    vec p = 0.00961843736f + r * (0.00133988744f + r * 0.000153533619f);
    p = 1.0f + r * (0.693147180f + r * (0.240226479f + r * (0.0555033247f + r * p)));
    return (vec)((ivec)p + ((ivec)shifted << 23));
}

INLINE vec NAME(activated)(vec x, int activation)
{
    if (activation == SIGMOID)
        return 1.0f / (1.0f + NAME(power)(-1.44269504f * x));
    if (activation == TANH)
        return 2.0f / (1.0f + NAME(power)(-2.88539008f * x)) - 1.0f;
    return activation == RELU ? GREATER((vec){0}, x) : x;
}

/* Activation in place, of whole vectors (the last one may reach beyond n), and what is noted of n values: sums about the first. */
INLINE struct sums NAME(activate_as)(float *row, int n, int activation)
{
    float about = NAME(activated)(LOAD(row), activation)[0];
    vec sum = {0}, squares = {0}, low = SPLAT(about), high = low;
    int whole = n / LANES * LANES;
    for (int x = 0; x < n; x += LANES) {
        vec y = NAME(activated)(LOAD(row + x), activation);
        STORE(row + x, y);
        if (x < whole) {
            vec d = y - about;
            sum += d;
            squares += d * d;
            low = LESSER(y, low);
            high = GREATER(y, high);
        }
    }
    struct sums s = {about, about, about, 0, 0};
    for (int i = 0; i < LANES; i++) {
        s.sum += sum[i];
        s.squares += squares[i];
        s.low = low[i] < s.low ? low[i] : s.low;
        s.high = high[i] > s.high ? high[i] : s.high;
    }
    for (int x = whole; x < n; x++) {
        double d = row[x] - about;
        s.sum += d;
        s.squares += d * d;
        s.low = row[x] < s.low ? row[x] : s.low;
        s.high = row[x] > s.high ? row[x] : s.high;
    }
    return s;
}

static struct sums NAME(activate)(float *row, int n, int activation)
{
    switch (activation) {
    case SIGMOID: return NAME(activate_as)(row, n, SIGMOID);
    case TANH: return NAME(activate_as)(row, n, TANH);
    case RELU: return NAME(activate_as)(row, n, RELU);
    default: return NAME(activate_as)(row, n, NONE);
    }
}

static void NAME(store)(const float *row, int n, const struct stored *s, char *out)
{
    if (s->kind == FLOAT32)
        memcpy(out, row, 4 * (size_t)n);
    else if (s->kind == UINT8) {
        uint8_t *to = (uint8_t *)out;
        for (int x = 0; x < n; x++)
            to[x] = (uint8_t)(int)(row[x] * s->levels + s->constant);
    } else {
        uint16_t *to = (uint16_t *)out;
        for (int x = 0; x < n; x++)
            to[x] = (uint16_t)(int)(row[x] * s->levels + s->constant);
    }
}

#include "kernel_points.h"
#include "kernel_patches.h"

static const struct version NAME(version) = {LANES,          TILE,           NAME(convolve), NAME(widen),    NAME(read),
                                             NAME(transform), NAME(multiply), NAME(join),     NAME(activate), NAME(store),
                                             NAME(patches),   NAME(epilogue)};

#undef vec
#undef ivec
#undef LOAD
#undef STORE
#undef SPLAT
#undef LANES
#undef WIDE
#undef TILE
#undef LOW_HALVES
#undef HIGH_HALVES
#undef LESSER
#undef GREATER
#undef NAME
