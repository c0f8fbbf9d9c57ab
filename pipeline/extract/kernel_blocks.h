/*
 * The fused layer by Winograd's convolution F(3 x 3, 3 x 3): Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016.
 *
 * The kernel is cut into blocks of 3 x 3 weights, and the image and its outputs into blocks of 3 x 3 pixels. 25 products, one at
 * each of 5 x 5 points, do the work of 81: nine outputs of a block of weights. Along each axis they are the values of polynomials
 * at 0, 1, -1, 2 and infinity. Points of pixels are made once for all filters and blocks of weights, and are exact: small integers.
 * Points of weights are made in float64 and rounded once. The products of all blocks and channels are added up before the points
 * become outputs. So the error is about that of a direct sum in float32.
 *
 * A strip of some hundred blocks is computed from top to bottom before the next one, so that its points stay in the cache.
 */

enum { STRIP = 256 };      /* blocks of a strip */
enum { LONGEST_SUM = 40 }; /* products at a point: with more of them single outputs had three times the error of a direct sum */


static const double AT_POINTS[5][3] = {{.5, 0, 0}, {.5, .5, .5}, {1 / 6., -1 / 6., 1 / 6.}, {1 / 6., 1 / 3., 2 / 3.}, {0, 0, 1}};
static const float LARGEST_WEIGHT = 1e25f; /* no sum overflows that would not have done so directly */

/* Whether this takes less time than the direct convolution, in operations of a block: products, and to and from points. */
static int blocks_pay(const struct layer *l)
{
    if ((l->kh + 2) / 3 * ((l->kw + 2) / 3) * (int64_t)l->channels > LONGEST_SUM)
        return 0;
    double planes = l->channels * (double)l->filters, blocks = (l->kh + 2) / 3 * (double)((l->kw + 2) / 3);
    return POINTS * blocks * planes + 120 * l->channels + 80 * l->filters < 9. * l->kh * l->kw * planes;
}

/* Weights at points: (pair of filters, point, ky, channel, kx, filter). Returns the largest magnitude. */
static float weights_at_points(const struct layer *l, const struct blocks *k, float *out)
{
    float largest = 0;
    for (int f = 0; f < l->filters; f++)
        for (int c = 0; c < l->channels; c++)
            for (int i = 0; i < k->kh; i++)
                for (int j = 0; j < k->kw; j++) {
                    const float *w = l->weight + ((size_t)(f * l->channels + c) * l->kh + 3 * i) * l->kw + 3 * j;
                    float *to = out + f / 2 * POINTS * k->taps + 2 * ((i * l->channels + c) * k->kw + j) + f % 2;
                    double half[5][3] = {{0}}; /* (point along y, x) */
                    for (int p = 0; p < 5; p++)
                        for (int y = 0; y < 3 && 3 * i + y < l->kh; y++)
                            for (int x = 0; x < 3 && 3 * j + x < l->kw; x++)
                                half[p][x] += AT_POINTS[p][y] * w[y * l->kw + x];
                    for (int p = 0; p < POINTS; p++, to += k->taps) {
                        const double *h = half[p / 5], *a = AT_POINTS[p % 5];
                        *to = (float)(h[0] * a[0] + h[1] * a[1] + h[2] * a[2]);
                        largest = *to > largest ? *to : -*to > largest ? -*to : largest;
                    }
                }
    return largest;
}

struct scratch { /* one allocation, from `ring` on */
    float *ring;     /* (kh, point, channel, group, lane) */
    float *pixels;   /* (5, x in block, channel, group, lane) */
    float *maps;     /* (2, 3, x in lane, lane) */
    float *tile;     /* (point, 2, tile, lane) */
    float *row;      /* (x) */
    float *weights, *bias;
    uint8_t *turned; /* (x in block, channel, group, lane) */
    uint8_t *bytes;  /* the end of the image, and zeros */
    const float **points;
};

static int allocate(struct scratch *s, const struct layer *l, const struct blocks *k, const struct version *v, size_t n_bytes)
{
    size_t pairs = ((size_t)l->filters + 1) / 2, n = 0;
    size_t at[] = {k->kh * k->n_points, 5 * k->n_pixels, 6 * k->n_maps, (size_t)POINTS * 2 * v->tile * v->lanes, k->n_maps,
                   pairs * POINTS * k->taps, 2 * pairs, k->n_pixels / 4 + 1, n_bytes / 4 + 1};
    for (int i = 0; i < 9; i++) {
        size_t size = (at[i] + 15) / 16 * 16;
        at[i] = n, n += size;
    }
    s->ring = aligned_alloc(64, n * sizeof *s->ring);
    s->points = malloc((size_t)k->kh * sizeof *s->points);
    if (!s->ring || !s->points)
        return -1;
    s->pixels = s->ring + at[1], s->maps = s->ring + at[2], s->tile = s->ring + at[3], s->row = s->ring + at[4];
    s->weights = s->ring + at[5], s->bias = s->ring + at[6];
    s->turned = (uint8_t *)(s->ring + at[7]), s->bytes = (uint8_t *)(s->ring + at[8]);
    memset(s->maps, 0, (n - at[2]) * sizeof *s->maps);
    return 0;
}

/* Points of the blocks of row b, from column x on, in the ring. */
static void blocks_read(const struct layer *l, const struct blocks *k, const struct version *v, struct scratch *s, size_t n_bytes,
                        int x, int b)
{
    size_t size = (size_t)l->height * l->width * l->channels;
    float *pixels[5];
    for (int y = 3 * b; y < 3 * b + 5; y++) {
        pixels[y - 3 * b] = s->pixels + y % 5 * k->n_pixels;
        if (b && y < 3 * b + 2)
            continue; /* they were the last of the row before */
        size_t at = ((size_t)y * l->width + x) * l->channels;
        int is_inside = at + n_bytes <= size;
        size_t ahead = at + 3 * (size_t)l->width * l->channels; /* the same row of the next blocks */
        for (size_t i = ahead; i < ahead + n_bytes && i < size; i += 64)
            __builtin_prefetch(l->image + i);
        if (!is_inside) {
            memset(s->bytes, 0, n_bytes);
            if (at < size)
                memcpy(s->bytes, l->image + at, size - at);
        }
        v->read(k, is_inside ? l->image + at : s->bytes, s->turned, pixels[y - 3 * b]);
    }
    v->transform(k, pixels, s->ring + b % k->kh * k->n_points);
}

static void blocks_strip(const struct layer *l, const struct blocks *k, const struct sink *sink, struct scratch *s, size_t n_bytes,
                         int x)
{
    const struct version *v = sink->version;
    int out_height = l->height - l->kh + 1, whole = 3 * k->groups * v->lanes, n = sink->width - x < whole ? sink->width - x : whole;
    int read = 0;
    for (int b = 0; 3 * b < out_height; b++) {
        for (; read < b + k->kh; read++)
            blocks_read(l, k, v, s, n_bytes, x, read);
        for (int i = 0; i < k->kh; i++)
            s->points[i] = s->ring + (b + i) % k->kh * k->n_points;
        for (int f = 0; f < l->filters; f += 2) {
            v->multiply(k, s->points, s->weights + f / 2 * POINTS * k->taps, s->bias + f, s->tile, s->maps);
            for (int i = 0; i < 6; i++) {
                int filter = f + i / 3, y = 3 * b + i % 3;
                if (filter < l->filters && y < out_height) {
                    v->join(s->maps + i * k->n_maps, 3 * k->groups, s->row);
                    finish(sink, filter, y, x, s->row, n);
                }
            }
        }
    }
}

static int blocks_layers(struct layer *l, struct sink *sink, const struct batch *b)
{
    const struct version *v = sink->version;
    int n_blocks = (sink->width + 2) / 3, strips = (n_blocks + STRIP - 1) / STRIP, lanes = v->lanes;
    struct blocks k = {.channels = l->channels, .kh = (l->kh + 2) / 3, .kw = (l->kw + 2) / 3};
    k.groups = ((n_blocks + strips - 1) / strips + lanes - 1) / lanes;
    k.in_groups = k.groups + k.kw - 1;
    k.n_pixels = (size_t)3 * k.channels * (k.in_groups + 1) * lanes;
    k.n_points = (size_t)POINTS * k.channels * k.in_groups * lanes;
    k.n_maps = (size_t)(3 * k.groups + lanes) * lanes; /* the last vectors reach beyond */
    k.taps = (size_t)2 * k.kh * k.channels * k.kw;
    size_t n_bytes = (size_t)3 * k.channels * (lanes * k.groups + k.kw) + 16; /* that a row reads */
    struct scratch s;
    int failed = allocate(&s, l, &k, v, n_bytes);
    if (!failed && weights_at_points(l, &k, s.weights) < LARGEST_WEIGHT) {
        memcpy(s.bias, l->bias, (size_t)l->filters * sizeof *s.bias);
        for (int i = 0; i < b->n; i++) {
            take(l, sink, b, i);
            for (int x = 0; x < sink->width; x += 3 * k.groups * lanes)
                blocks_strip(l, &k, sink, &s, n_bytes, x);
        }
    } else if (!failed)
        failed = direct_layers(l, sink, b);
    free(s.ring), free(s.points);
    return failed;
}
