/* One instruction set's version of the fused layer; kernel.c includes this file once for each, with LANES, WIDE and NAME(x) set. */

typedef float NAME(vec) __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int NAME(ivec) __attribute__((vector_size(4 * LANES), aligned(4)));
#define vec NAME(vec)
#define ivec NAME(ivec)
#define LOAD(p) (*(const vec *)(p))
#define SPLAT(x) ((vec){0} + (x))

/* Add n vectors of two neighbouring output rows (only of row 0 or 1 where lo = hi) of two filters, for one input row. */
static inline __attribute__((always_inline)) void NAME(accumulate)(
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
static inline __attribute__((always_inline)) void NAME(tile)(const struct pair *p, int n, int x, float *out[2][2])
{
    vec acc[2][2][WIDE];
    for (int f = 0; f < 2; f++)
        for (int r = 0; r < 2; r++)
            for (int v = 0; v < n; v++)
                acc[f][r][v] = SPLAT(p->bias[f]);
    int size = p->kh * p->kw;
    for (int c = 0; c < p->channels; c++) {
        for (int i = 0; i <= p->kh; i++) { /* input row i is kernel row i of output row 0, and i - 1 of output row 1 */
            const float *in = p->rows[i * p->channels + c] + x;
            const float *a = p->weight[0] + c * size + i * p->kw, *b = p->weight[1] + c * size + i * p->kw;
            const float *const w[2][2] = {{a, a - p->kw}, {b, b - p->kw}};
            if (i == 0)
                NAME(accumulate)(acc, n, in, w, p->kw, 0, 0);
            else if (i == p->kh)
                NAME(accumulate)(acc, n, in, w, p->kw, 1, 1);
            else
                NAME(accumulate)(acc, n, in, w, p->kw, 0, 1);
        }
    }
    for (int f = 0; f < 2; f++)
        for (int r = 0; r < 2; r++)
            for (int v = 0; v < n; v++)
                *(vec *)(out[f][r] + x + v * LANES) = acc[f][r][v];
}

static void NAME(convolve)(const struct pair *p, int width, float *out[2][2])
{
    int x = 0;
    for (; x + WIDE * LANES <= width; x += WIDE * LANES)
        NAME(tile)(p, WIDE, x, out);
    for (; x + (WIDE / 2 - 1) * LANES < width; x += WIDE / 2 * LANES)
        NAME(tile)(p, WIDE / 2, x, out);
    for (; x < width; x += LANES)
        NAME(tile)(p, 1, x, out);
}

/* Activation in place; the exponential is 2^n times a polynomial, good to 2 units in the last place. */
static void NAME(activate)(float *row, int n, int activation)
{
    if (activation == RELU) {
        for (int x = 0; x < n; x++)
            row[x] = row[x] > 0 ? row[x] : 0;
    } else if (activation == SIGMOID || activation == TANH) {
        float slope = activation == TANH ? -2.0f : -1.0f, top = activation == TANH ? 2.0f : 1.0f, shift = top - 1.0f;
#pragma omp simd
        for (int x = 0; x < n; x++) {
            float z = slope * row[x];
            z = z < 87.0f ? z : 87.0f;
            z = z > -87.0f ? z : -87.0f;
            float whole = (z * 1.44269504f + 12582912.0f) - 12582912.0f; /* to the nearest integer */
            float r = (z - whole * 0.693359375f) + whole * 2.12194440e-4f;
            float e = 1.0f + r + r * r * (0.5f + r * (0.166666654f + r * (0.0416657918f + r * (0.00833345205f + r * 0.00139819994f))));
            union { int i; float f; } scale = {.i = ((int)whole + 127) << 23};
            row[x] = top / (1.0f + e * scale.f) - shift;
        }
    }
}

/* Sum, minimum and maximum of a row, and the sum of squares about its mean. */
static struct moments NAME(measure)(const float *row, int n)
{
    float sum = 0, low = row[0], high = row[0], squares = 0;
#pragma omp simd reduction(+ : sum) reduction(min : low) reduction(max : high)
    for (int x = 0; x < n; x++) {
        sum += row[x];
        low = row[x] < low ? row[x] : low;
        high = row[x] > high ? row[x] : high;
    }
    float mean = sum / n;
#pragma omp simd reduction(+ : squares)
    for (int x = 0; x < n; x++)
        squares += (row[x] - mean) * (row[x] - mean);
    return (struct moments){n, sum / (double)n, squares, low, high};
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

static const struct version NAME(version) = {LANES, NAME(convolve), NAME(activate), NAME(measure), NAME(store), NAME(widen)};

#undef vec
#undef ivec
#undef LOAD
#undef SPLAT
