/*
 * The fused layer on a processor with matrix tiles (AMX, bfloat16 in, float32 out).
 *
 * A row of the image, as bfloat16 with the channels of a pixel side by side, holds 32 / channels pixels in 32 values. Sixteen such
 * windows, `step` pixels apart, are one tile; its product with a tile of weights gives for each window `step` neighbouring outputs
 * of several output rows and filters: 16 columns at most. Pixels are whole numbers below 256 and exact in bfloat16; a weight is the
 * sum of three bfloat16 numbers, to 2^-25 of itself. So the products are exact, and only the sums are rounded, in float32.
 */

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { AMX_LANES = 32, TILES = 4, PARTS = 3 }; /* tiles of outputs at once; parts of a weight */

struct grid { /* how 16 columns are used */
    int step, filters, rows, in_rows;
};

static struct grid amx_grid(const struct layer *l)
{
    int step = AMX_LANES / l->channels - l->kw + 1;
    step = step > 16 ? 16 : step;
    int filters = step < 1 ? 0 : l->filters < 16 / step ? l->filters : 16 / step, rows = filters ? 16 / step / filters : 0;
    return (struct grid){step, filters, rows, l->kh + rows - 1};
}

static int amx_fits(const struct layer *l) { return AMX_LANES / l->channels >= l->kw; }

static int amx_runs(void)
{
    static int known; /* 0: not yet; written by any thread, and always the same */
    if (!known) {
        unsigned a, b, c, d;
        int has = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1) && choose(16)->lanes == 16;
        known = has && syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0 ? 1 : -1;
    }
    return known == 1;
}

static uint16_t bfloat16(float x) /* to nearest, ties to even; no NaN comes here */
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static float float32(uint16_t x)
{
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Tiles of one group of filters: (input row, part, pair of values, column, value of the pair). */
static void amx_pack(const struct layer *l, const struct grid *g, int first, uint16_t *tiles, float *bias)
{
    for (int f = 0; f < g->filters && first + f < l->filters; f++)
        for (int row = 0; row < g->rows; row++)
            for (int dx = 0; dx < g->step; dx++) {
                int column = (f * g->rows + row) * g->step + dx;
                for (int m = 0; m < 16; m++)
                    bias[16 * m + column] = l->bias[first + f];
                for (int c = 0; c < l->channels; c++)
                    for (int ky = 0; ky < l->kh; ky++)
                        for (int kx = 0; kx < l->kw; kx++) {
                            float rest = l->weight[(((first + f) * l->channels + c) * l->kh + ky) * l->kw + kx];
                            int k = (dx + kx) * l->channels + c;
                            uint16_t *tile = tiles + (size_t)(row + ky) * PARTS * 512 + k / 2 * 32 + column * 2 + k % 2;
                            for (int part = 0; part < PARTS; part++, tile += 512) {
                                *tile = bfloat16(rest);
                                rest -= float32(*tile);
                            }
                        }
            }
}

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512,amx-tile,amx-bf16")

#define SEEN(pointer) __asm__ volatile("" : : "r"(pointer) : "memory") /* the intrinsics do not say what memory they use */

struct tile_config {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

static void amx_begin(void)
{
    struct tile_config config = {.palette = 1};
    for (int i = 0; i < 8; i++)
        config.bytes[i] = 64, config.rows[i] = 16;
    SEEN(&config);
    _tile_loadconfig(&config);
}

static void amx_end(void) { _tile_release(); }

static void amx_read(const uint8_t *in, int n, uint16_t *out)
{
    for (int i = 0; i < n; i++) {
        union { float f; uint32_t bits; } x = {.f = in[i]};
        out[i] = (uint16_t)(x.bits >> 16); /* exact */
    }
}

/* n tiles of outputs from pixel x on, for a group of filters. */
static void amx_tiles(const struct grid *g, int n, const uint16_t *const *rows, size_t x, size_t window, const uint16_t *tiles,
                      const float *bias, float *out)
{
    SEEN(rows);
    _tile_loadd(0, bias, 64);
    _tile_loadd(1, bias, 64);
    _tile_loadd(2, bias, 64);
    _tile_loadd(3, bias, 64);
    for (int i = 0; i < g->in_rows; i++, tiles += PARTS * 512) {
        const uint16_t *in = rows[i] + x;
        _tile_loadd(5, tiles, 64);
        _tile_loadd(6, tiles + 512, 64);
        _tile_loadd(7, tiles + 1024, 64);
#define MULTIPLY(b)                                                \
    if (n > b) {                                                   \
        _tile_loadd(4, in + b * 16 * window, 2 * window);          \
        _tile_dpbf16ps(b, 4, 5);                                   \
        _tile_dpbf16ps(b, 4, 6);                                   \
        _tile_dpbf16ps(b, 4, 7);                                   \
    }
        MULTIPLY(0) MULTIPLY(1) MULTIPLY(2) MULTIPLY(3)
#undef MULTIPLY
    }
    _tile_stored(0, out, 64);
    _tile_stored(1, out + 256, 64);
    _tile_stored(2, out + 512, 64);
    _tile_stored(3, out + 768, 64);
    SEEN(out);
}

/* (tile, window, column) to one output row of one filter: `step` values of each window. */
static void amx_spread(const float *in, int n, int step, float *out)
{
    if (step == 2)
        for (int m = 0; m < n; m++)
            memcpy(out + 2 * m, in + 16 * m, 8);
    else
        for (int m = 0; m < n; m++)
            for (int i = 0; i < step; i++)
                out[step * m + i] = in[16 * m + i];
}

#pragma GCC pop_options

static int amx_layer(const struct layer *l, const struct sink *sink)
{
    const struct grid g = amx_grid(l);
    int out_height = l->height - l->kh + 1, groups = (l->filters + g.filters - 1) / g.filters, values = l->width * l->channels;
    size_t window = (size_t)g.step * l->channels, columns = (size_t)sink->width + TILES * 16 * g.step;
    size_t span = (columns * l->channels + 2 * AMX_LANES) / AMX_LANES * AMX_LANES; /* the last windows reach beyond the row */
    size_t n_tiles = (size_t)groups * g.in_rows * PARTS * 512, n_ring = (size_t)g.in_rows * span;
    size_t n_floats = 256 * (groups + TILES) + (size_t)g.filters * g.rows * columns;
    size_t bytes = (2 * (n_tiles + n_ring) + 4 * n_floats + 63) / 64 * 64;
    uint16_t *tiles = aligned_alloc(64, bytes);
    const uint16_t **rows = malloc((size_t)g.in_rows * sizeof *rows);
    if (!tiles || !rows) {
        free(tiles), free(rows);
        return -1;
    }
    memset(tiles, 0, bytes);
    uint16_t *ring = tiles + n_tiles;
    float *bias = (float *)(ring + n_ring), *out = bias + 256 * groups, *buffers = out + 256 * TILES;
    for (int i = 0; i < groups; i++)
        amx_pack(l, &g, i * g.filters, tiles + (size_t)i * g.in_rows * PARTS * 512, bias + 256 * i);
    amx_begin();
    int read = 0;
    for (int y = 0; y < out_height; y += g.rows) {
        for (; read < y + g.in_rows && read < l->height; read++)
            amx_read(l->image + (size_t)read * values, values, ring + read % g.in_rows * span);
        for (int i = 0; i < g.in_rows; i++)
            rows[i] = ring + (y + i) % g.in_rows * span;
        for (int group = 0; group < groups; group++) {
            int first = group * g.filters;
            for (int x = 0; x < sink->width; x += TILES * 16 * g.step) {
                int windows = (sink->width - x + g.step - 1) / g.step, n = windows < TILES * 16 ? (windows + 15) / 16 : TILES;
                amx_tiles(&g, n, rows, (size_t)x * l->channels, window, tiles + (size_t)group * g.in_rows * PARTS * 512,
                          bias + 256 * group, out);
                for (int j = 0; j < g.filters * g.rows; j++)
                    amx_spread(out + j * g.step, 16 * n, g.step, buffers + j * columns + x);
            }
            for (int f = 0; f < g.filters && first + f < l->filters; f++)
                for (int r = 0; r < g.rows && y + r < out_height; r++)
                    finish(sink, first + f, y + r, 0, buffers + (f * g.rows + r) * columns, sink->width);
        }
    }
    amx_end();
    free(tiles), free(rows);
    return 0;
}
