/*
 * One instruction set's part of Winograd's convolution (kernel_blocks.h); kernel_tile.h includes it.
 *
 * A row of blocks lies in `groups` vectors: lane l of vector i is block l * groups + i. So the next block is the next vector's, and
 * no load crosses vectors.
 */

INLINE void NAME(to_points)(const vec u[5], vec p[5])
{
    vec t = u[3] - u[1], d = u[2] - u[3];
    p[0] = 2 * (u[0] - u[2]) + t;
    p[1] = 2 * u[1] + d;
    p[2] = 2 * (u[2] - u[1]) + d;
    p[3] = t;
    p[4] = (u[4] - u[2]) - 2 * t;
}

INLINE void NAME(from_points)(const vec p[5], vec out[3])
{
    vec s = p[1] + p[2], d = p[1] - p[2];
    out[0] = (p[0] + s) + p[3];
    out[1] = d + 2 * p[3];
    out[2] = (s + 4 * p[3]) + p[4];
}

INLINE void NAME(zip_bytes)(const bytes a[LANES], bytes b[LANES])
{
    for (int v = 0; v < LANES / 2; v++) {
        b[2 * v] = SHUFFLE_BYTES(a[v], a[v + LANES / 2], LOW_BYTES);
        b[2 * v + 1] = SHUFFLE_BYTES(a[v], a[v + LANES / 2], HIGH_BYTES);
    }
}

/* Up to 16 bytes of each of n * LANES blocks: (byte of a block, group, lane). */
INLINE void NAME(turn)(const struct blocks *k, const uint8_t *in, int n, int n_bytes, uint8_t *out)
{
    size_t size = 3 * (size_t)k->channels;
    for (int i = 0; i < n; i++, in += size) {
        bytes a[LANES], b[LANES];
        for (int l = 0; l < LANES; l++)
            a[l] = *(const bytes *)(in + l * k->groups * size);
        NAME(zip_bytes)(a, b);
        NAME(zip_bytes)(b, a);
        if (LANES >= 8)
            NAME(zip_bytes)(a, b);
        if (LANES == 16)
            NAME(zip_bytes)(b, a);
        for (int v = 0; v < n_bytes; v++)
            memcpy(out + (v * n + i) * LANES, (const char *)(LANES == 8 ? b : a) + v * LANES, LANES);
    }
}

/* One row of bytes to pixels: (x in block, channel, group, lane). */
static void NAME(read)(const struct blocks *k, const uint8_t *in, uint8_t *restrict turned, float *restrict pixels)
{
    int size = 3 * k->channels, n = k->in_groups + 1; /* bytes of a block; vectors with the next block's */
    if (size == 9)
        NAME(turn)(k, in, n, 9, turned);
    else
        for (int v = 0; v < size; v += 16)
            NAME(turn)(k, in + v, n, size - v < 16 ? size - v : 16, turned + v * n * LANES);
    for (int i = 0; i < size * n * LANES; i++)
        pixels[i] = turned[i];
}

INLINE void NAME(column)(float *const pixels[5], size_t x, vec p[5])
{
    vec u[5] = {LOAD(pixels[0] + x), LOAD(pixels[1] + x), LOAD(pixels[2] + x), LOAD(pixels[3] + x), LOAD(pixels[4] + x)};
    NAME(to_points)(u, p);
}

/* Five rows of pixels to points: (point along y, point along x, channel, group, lane). */
static void NAME(transform)(const struct blocks *k, float *const pixels[5], float *points)
{
    size_t channel = (size_t)(k->in_groups + 1) * LANES, phase = k->channels * channel, step = k->n_points / POINTS;
    for (int c = 0; c < k->channels; c++) {
        size_t x = c * channel;
        float *out = points + (size_t)c * k->in_groups * LANES;
        vec y[5][5]; /* (x in block and the next, point along y) */
        NAME(column)(pixels, x, y[3]);
        NAME(column)(pixels, x + phase, y[4]);
        for (int i = 0; i < k->in_groups; i++, x += LANES, out += LANES) {
            memcpy(y[0], y[3], sizeof y[0]);
            memcpy(y[1], y[4], sizeof y[1]);
            NAME(column)(pixels, x + 2 * phase, y[2]);
            NAME(column)(pixels, x + LANES, y[3]);
            NAME(column)(pixels, x + phase + LANES, y[4]);
            for (int p = 0; p < 5; p++) {
                vec u[5] = {y[0][p], y[1][p], y[2][p], y[3][p], y[4][p]}, q[5];
                NAME(to_points)(u, q);
                for (int j = 0; j < 5; j++)
                    STORE(out + (5 * p + j) * step, q[j]);
            }
        }
    }
}

/* n vectors of two filters at one point: the sum over channels and blocks of weights. kw is that of k, or 0 where that is above 3. */
INLINE void NAME(sum)(const struct blocks *k, int n, int kw, const float *const *points, size_t x, const float *w, float *out)
{
    vec acc[2][TILE];
    for (int v = 0; v < n; v++)
        acc[0][v] = acc[1][v] = (vec){0};
    for (int i = 0; i < k->kh; i++) {
        const float *in = points[i] + x, *next = in + k->n_points / POINTS;
        for (int c = 0; c < k->channels; c++, in += k->in_groups * LANES, next += k->in_groups * LANES) {
            for (int v = 0; v < n + 2; v += 16 / LANES)
                __builtin_prefetch(next + v * LANES); /* the next point's; this one's are on their way */
            for (int first = 0; first < (kw ? 1 : k->kw); first++) {
                const int m = kw ? kw : 1;
                vec a[3], b[3];
                for (int j = 0; j < m; j++, w += 2)
                    a[j] = SPLAT(w[0]), b[j] = SPLAT(w[1]);
                for (int v = 0; v < n + m - 1; v++) {
                    vec u = LOAD(in + (first + v) * LANES);
                    for (int j = 0; j < m; j++)
                        if (v >= j && v - j < n) {
                            acc[0][v - j] += u * a[j];
                            acc[1][v - j] += u * b[j];
                        }
                }
            }
        }
    }
    for (int v = 0; v < n; v++) {
        STORE(out + v * LANES, acc[0][v]);
        STORE(out + (TILE + v) * LANES, acc[1][v]);
    }
}

INLINE void NAME(sums)(const struct blocks *k, int n, const float *const *points, size_t x, const float *w, float *out)
{
    for (int p = 0; p < POINTS; p++, w += k->taps, out += 2 * TILE * LANES, x += k->n_points / POINTS) {
        if (k->kw == 3)
            NAME(sum)(k, n, 3, points, x, w, out);
        else if (k->kw == 2)
            NAME(sum)(k, n, 2, points, x, w, out);
        else if (k->kw == 1)
            NAME(sum)(k, n, 1, points, x, w, out);
        else
            NAME(sum)(k, n, 0, points, x, w, out);
    }
}

/* n vectors of three output rows of one filter from their points. */
static void NAME(outputs)(const struct blocks *k, const float *in, int n, float bias, float *maps)
{
    for (int v = 0; v < n; v++, in += LANES, maps += 3 * LANES) {
        vec half[3][5], p[5], out[3];
        for (int q = 0; q < 5; q++) {
            for (int i = 0; i < 5; i++)
                p[i] = LOAD(in + (5 * i + q) * 2 * TILE * LANES);
            NAME(from_points)(p, out);
            for (int r = 0; r < 3; r++)
                half[r][q] = out[r];
        }
        for (int r = 0; r < 3; r++) {
            NAME(from_points)(half[r], out);
            for (int i = 0; i < 3; i++)
                STORE(maps + r * k->n_maps + i * LANES, out[i] + bias);
        }
    }
}

/* Three output rows of two filters: (filter, row, x in a lane's part, lane). */
static void NAME(multiply)(const struct blocks *k, const float *const *points, const float *weight, const float *bias, float *tile,
                           float *maps)
{
    for (int i = 0, n; i < k->groups; i += n) {
        int left = k->groups - i, tiles = (left + TILE - 1) / TILE;
        size_t x = (size_t)i * LANES;
        n = (left + tiles - 1) / tiles;
#define SUMS(m) case m: NAME(sums)(k, m, points, x, weight, tile); break;
        switch (n) {
            SUMS(1) SUMS(2) SUMS(3) SUMS(4)
#if TILE > 4
            SUMS(5) SUMS(6)
#endif
        }
#undef SUMS
        for (int f = 0; f < 2; f++)
            NAME(outputs)(k, tile + f * TILE * LANES, n, bias[f], maps + 3 * (f * k->n_maps + x));
    }
}

INLINE void NAME(zip)(const vec a[LANES], vec b[LANES])
{
    for (int v = 0; v < LANES / 2; v++) {
        b[2 * v] = SHUFFLE(a[v], a[v + LANES / 2], LOW_HALVES);
        b[2 * v + 1] = SHUFFLE(a[v], a[v + LANES / 2], HIGH_HALVES);
    }
}

/* (x in a lane's part, lane) to (x), for parts of n. What is written beyond one part is overwritten by the next. */
static void NAME(join)(const float *maps, int n, float *row)
{
    for (int i = (n - 1) / LANES * LANES; i >= 0; i -= LANES) {
        vec a[LANES], b[LANES];
        for (int v = 0; v < LANES; v++)
            a[v] = LOAD(maps + (i + v) * LANES);
        NAME(zip)(a, b);
        NAME(zip)(b, a);
        if (LANES >= 8)
            NAME(zip)(a, b);
        if (LANES == 16)
            NAME(zip)(b, a);
        for (int v = 0; v < LANES; v++)
            STORE(row + v * n + i, LANES == 8 ? b[v] : a[v]);
    }
}
