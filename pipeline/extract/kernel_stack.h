/*
 * A stack of layers on images of one size: convolution, max-pool, bias, activation, statistics, stored values.
 *
 * Layer after layer is computed for all images, so that its weights are in the cache; of a large image, some rows at a time. Images
 * and maps lie channels last, as pixels do: a row of a kernel is one run of floats. Every output is the same sum in the same order,
 * wherever it is in a batch.
 */

enum { OUTPUTS = 512 }; /* convolved at a time; at least those of one row of maps */

struct stack_layer {
    const float *weight; /* (filters / lanes, ky, kx, channel, lane) */
    const float *bias;   /* (filters / lanes, lane) */
    int32_t filters, kh, kw, py, px, activation, kind;
    float levels, constant;
    int64_t filter_stride, row_stride; /* bytes */
    char *const *out;                  /* n pointers to (filters, y, x), contiguous along x; NULL where they are not kept */
    double *statistics;                /* (n, filters, 4); NULL where nobody asks */
};

struct extent { /* of a layer's input and output */
    int height, width, channels, out_height, out_width;
};

struct rows { /* of maps */
    int from, to;
};

struct workspace { /* one allocation from `maps` to `row` */
    float *maps[2];  /* (n, y, x, channel): input and output of a layer */
    float *outputs;  /* (image, y and x, place in the pool, group, lane) */
    float *sums;     /* (5, group, lane) */
    float *row;      /* (y and x) of one filter */
    const float **at; /* where the part of the image begins that each output sees */
    struct moments *all;
};

static struct extent next_extent(const struct stack_layer *l, struct extent e)
{
    return (struct extent){e.height, e.width, e.channels, (e.height - l->kh + 1) / l->py, (e.width - l->kw + 1) / l->px};
}

/* How many of n things are convolved at a time, each of so many outputs. */
static int n_at_once(size_t n_outputs, int n)
{
    size_t found = OUTPUTS / n_outputs;
    return found < 1 ? 1 : found < (size_t)n ? (int)found : n;
}

/* Outputs that a row of maps is pooled from. */
static size_t row_outputs(const struct stack_layer *l, struct extent e) { return (size_t)e.out_width * l->py * l->px; }

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

static int make_workspace(struct workspace *w, int n, struct extent e, const struct stack_layer *layers, int n_layers, int lanes)
{
    size_t maps[2] = {(size_t)e.height * e.width * e.channels, 0}, outputs = 0, filters = 0, row = 0, positions = 0;
    for (int i = 0; i < n_layers; i++) {
        const struct stack_layer *l = layers + i;
        e = next_extent(l, e);
        size_t area = (size_t)e.out_height * e.out_width, of_row = row_outputs(l, e), rows = n_at_once(of_row, e.out_height);
        size_t padded = ((size_t)l->filters + lanes - 1) / lanes * lanes;
        size_t at_once = of_row * rows * n_at_once(of_row * e.out_height, n) + PATCHES;
        maps[(i + 1) % 2] = larger(maps[(i + 1) % 2], area * l->filters);
        outputs = larger(outputs, at_once * padded), positions = larger(positions, at_once);
        filters = larger(filters, padded), row = larger(row, larger(rows * e.out_width, l->filters));
        e = (struct extent){e.out_height, e.out_width, l->filters, 0, 0};
    }
    size_t sizes[] = {n * maps[0] + lanes, n * maps[1] + lanes, outputs, 5 * filters, row + lanes}, total = 0;
    for (int i = 0; i < 5; i++)
        total += sizes[i] = (sizes[i] + 15) / 16 * 16;
    w->maps[0] = aligned_alloc(64, total * sizeof *w->maps[0]);
    w->at = malloc(positions * sizeof *w->at);
    w->all = malloc(filters * sizeof *w->all);
    if (!w->maps[0] || !w->at || !w->all)
        return -1;
    w->maps[1] = w->maps[0] + sizes[0], w->outputs = w->maps[1] + sizes[1], w->sums = w->outputs + sizes[2];
    w->row = w->sums + sizes[3];
    return 0;
}

/* Convolve n images for some rows of their maps, pools not yet taken. */
static void stack_convolve(const struct version *v, const struct stack_layer *l, struct extent e, const float *in, int n,
                           struct rows rows, const struct workspace *w)
{
    size_t groups = ((size_t)l->filters + v->lanes - 1) / v->lanes, row = (size_t)e.width * e.channels, count = 0;
    for (int i = 0; i < n; i++, in += e.height * row)
        for (int y = rows.from; y < rows.to; y++)
            for (int x = 0; x < e.out_width; x++)
                for (int j = 0; j < l->py; j++)
                    for (int k = 0; k < l->px; k++)
                        w->at[count++] = in + (y * l->py + j) * row + (size_t)(x * l->px + k) * e.channels;
    for (int i = 1; i < PATCHES; i++)
        w->at[count + i - 1] = w->at[count - 1]; /* the last ones are computed again, and not used */
    struct patches p = {l->kh, row, (size_t)l->kw * e.channels, (size_t)l->kh * l->kw * e.channels, groups * v->lanes};
    for (size_t g = 0; g < groups; g += 2)
        for (size_t i = 0; i < count; i += PATCHES)
            v->patches(&p, g + 1 < groups ? 2 : 1, w->at + i, l->weight + g * p.size * v->lanes, l->bias + g * v->lanes,
                       w->outputs + i * p.stride + g * v->lanes);
}

/* Some rows of one image's maps as they are stored. */
static void stack_store(const struct version *v, const struct stack_layer *l, struct extent e, const float *maps, char *out,
                        struct rows rows, const struct workspace *w)
{
    struct stored stored = {l->kind, l->levels, l->constant};
    int size = l->kind == FLOAT32 ? 4 : l->kind == UINT16 ? 2 : 1, area = (rows.to - rows.from) * e.out_width;
    if (e.out_height == 1 && e.out_width == 1 && l->filter_stride == size) {
        v->store(maps, l->filters, &stored, out);
        return;
    }
    out += rows.from * l->row_stride;
    int whole = l->row_stride == (int64_t)size * e.out_width, n_rows = whole ? 1 : rows.to - rows.from, n = area / n_rows;
    for (int f = 0; f < l->filters; f++) {
        for (int i = 0; i < area; i++)
            w->row[i] = maps[(size_t)i * l->filters + f];
        for (int y = 0; y < n_rows; y++)
            v->store(w->row + (size_t)y * n, n, &stored, out + f * l->filter_stride + y * l->row_stride);
    }
}

/* Pool, activate, measure and store some rows of one image's maps, one band of rows after the other. */
static void stack_epilogue(const struct version *v, const struct stack_layer *l, struct extent e, const float *outputs, float *maps,
                           int image, struct rows rows, const struct workspace *w)
{
    int groups = (l->filters + v->lanes - 1) / v->lanes, area = (rows.to - rows.from) * e.out_width;
    float *s = w->sums;
    size_t n = (size_t)groups * v->lanes;
    struct epilogue epilogue = {groups, l->filters, l->py * l->px, outputs, s, s + n, s + 2 * n, s + 3 * n, s + 4 * n};
    maps += (size_t)rows.from * e.out_width * l->filters;
    if (!rows.from)
        memset(w->all, 0, l->filters * sizeof *w->all);
    for (int first = 0; first < area; first += SUM) { /* float32 sums of a few, float64 of them */
        int count = area - first < SUM ? area - first : SUM;
        v->epilogue(&epilogue, l->activation, first, count, maps);
        for (int f = 0; f < l->filters && l->statistics; f++)
            merge(w->all + f, count, (struct sums){s[f], s[n + f], s[2 * n + f], s[3 * n + f], s[4 * n + f]});
    }
    for (int f = 0; f < l->filters && l->statistics && rows.to == e.out_height; f++)
        note(w->all + f, l->statistics + 4 * ((size_t)image * l->filters + f));
    if (l->out)
        stack_store(v, l, e, maps, l->out[image], rows, w);
}

static int stack_of_layers(const struct version *v, const uint8_t *const *images, int n, int height, int width, int channels,
                       const struct stack_layer *layers, int n_layers)
{
    struct extent e = {height, width, channels, 0, 0};
    struct workspace w = {{NULL, NULL}, NULL, NULL, NULL, NULL, NULL};
    int failed = make_workspace(&w, n, e, layers, n_layers, v->lanes);
    size_t size = (size_t)height * width * channels;
    for (int i = 0; i < n && !failed; i++)
        for (size_t j = 0; j < size; j++)
            w.maps[0][i * size + j] = images[i][j];
    for (int i = 0; i < n_layers && !failed; i++) {
        const struct stack_layer *l = layers + i;
        e = next_extent(l, e);
        size_t in = (size_t)e.height * e.width * e.channels, area = (size_t)e.out_height * e.out_width, out = area * l->filters;
        size_t outputs = row_outputs(l, e) * e.out_height, padded = ((size_t)l->filters + v->lanes - 1) / v->lanes * v->lanes;
        int at_once = n_at_once(outputs, n), band = n_at_once(row_outputs(l, e), e.out_height); /* all rows where images are several */
        for (int first = 0; first < n; first += at_once) {
            int count = n - first < at_once ? n - first : at_once;
            for (struct rows r = {0, band}; r.from < e.out_height; r.from = r.to, r.to += band) {
                r.to = r.to < e.out_height ? r.to : e.out_height;
                stack_convolve(v, l, e, w.maps[i % 2] + first * in, count, r, &w);
                for (int k = 0; k < count; k++)
                    stack_epilogue(v, l, e, w.outputs + k * outputs * padded, w.maps[(i + 1) % 2] + (first + k) * out, first + k, r, &w);
            }
        }
        e = (struct extent){e.out_height, e.out_width, l->filters, 0, 0};
    }
    free(w.maps[0]), free(w.at), free(w.all);
    return failed;
}
