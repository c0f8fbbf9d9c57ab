/*
 * One instruction set's part of a stack of layers (kernel_stack.h); kernel_tile.h includes it.
 *
 * Vectors hold filters. So a map of any size, also of one value, fills them.
 */

/*
 * PATCHES outputs of m vectors of filters: valid convolution plus bias, at (ky, run) from each of `at` on. Products are added up some
 * hundred at a time, and these sums to the total, so that the error is small however large the kernel.
 */
INLINE void NAME(patches_of)(const struct patches *p, int m, const float *const *at, const float *weight, const float *bias,
                             float *out)
{
    vec total[2][PATCHES], acc[2][PATCHES];
    size_t next = p->size * LANES, done = 0;
    for (int g = 0; g < m; g++)
        for (int i = 0; i < PATCHES; i++)
            total[g][i] = LOAD(bias + g * LANES), acc[g][i] = (vec){0};
    for (int ky = 0; ky < p->kh; ky++)
        for (size_t from = 0, to; from < p->run; from = to) {
            to = p->run - from > SUM ? from + SUM : p->run;
            size_t x = ky * p->row;
            for (size_t j = from; j < to; j++, weight += LANES) {
                vec a = LOAD(weight), b = m > 1 ? LOAD(weight + next) : a;
                for (int i = 0; i < PATCHES; i++) {
                    float u = at[i][x + j];
                    acc[0][i] += a * u;
                    if (m > 1)
                        acc[1][i] += b * u;
                }
            }
            done += to - from;
            if (done < SUM / 2)
                continue;
            for (int g = 0; g < m; g++)
                for (int i = 0; i < PATCHES; i++)
                    total[g][i] += acc[g][i], acc[g][i] = (vec){0};
            done = 0;
        }
    for (int i = 0; i < PATCHES; i++)
        for (int g = 0; g < m; g++)
            STORE(out + i * p->stride + g * LANES, total[g][i] + acc[g][i]);
}

static void NAME(patches)(const struct patches *p, int groups, const float *const *at, const float *weight, const float *bias,
                          float *out)
{
    if (groups > 1)
        NAME(patches_of)(p, 2, at, weight, bias, out);
    else
        NAME(patches_of)(p, 1, at, weight, bias, out);
}

/* Pool and activate n outputs from `first` on, to (y and x, filter), and begin or go on with sums about the first. */
INLINE void NAME(epilogue_as)(const struct epilogue *s, int activation, int first, int n, float *out)
{
    size_t stride = (size_t)s->groups * LANES;
    const float *in = s->in + first * s->window * stride;
    for (int i = first; i < first + n; i++, in += s->window * stride)
        for (size_t f = 0; f < stride; f += LANES) {
            vec x = LOAD(in + f);
            for (int w = 1; w < s->window; w++) {
                vec y = LOAD(in + w * stride + f);
                x = NAME(choose)(y == y, GREATER(y, x), y); /* NaN stays NaN */
            }
            x = NAME(activated)(x, activation);
            STORE(out + (size_t)i * s->filters + f, x); /* what is written beyond the last filter is overwritten by the next output */
            if (i == first) {
                STORE(s->about + f, x), STORE(s->low + f, x), STORE(s->high + f, x);
                STORE(s->sum + f, (vec){0}), STORE(s->squares + f, (vec){0});
            } else {
                vec d = x - LOAD(s->about + f), low = LOAD(s->low + f), high = LOAD(s->high + f);
                STORE(s->sum + f, LOAD(s->sum + f) + d);
                STORE(s->squares + f, LOAD(s->squares + f) + d * d);
                STORE(s->low + f, LESSER(x, low));
                STORE(s->high + f, GREATER(x, high));
            }
        }
}

static void NAME(epilogue)(const struct epilogue *s, int activation, int first, int n, float *out)
{
    switch (activation) {
    case SIGMOID: NAME(epilogue_as)(s, SIGMOID, first, n, out); break;
    case TANH: NAME(epilogue_as)(s, TANH, first, n, out); break;
    case RELU: NAME(epilogue_as)(s, RELU, first, n, out); break;
    default: NAME(epilogue_as)(s, NONE, first, n, out); break;
    }
}
