/* The loops of block status, compiled: see runs.py, which has the same functions in Python and says what
 * they do. Used when it was built; nothing but speed depends on it.
 *
 * Every argument is checked against the buffers here, so that no call can read or write outside of them.
 */

#define Py_LIMITED_API 0x030B0000 /* one build for Python 3.11 and all later ones */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <string.h>

#define PAIR 16 /* bytes of a length and its flags */

static uint64_t
load(const unsigned char *from)
{
    uint64_t word;
    memcpy(&word, from, sizeof word);
    return word;
}

static void
store(char *to, uint64_t word)
{
    memcpy(to, &word, sizeof word);
}

/* To or from little-endian. */
static uint64_t
little(uint64_t word)
{
    return __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__ ? __builtin_bswap64(word) : word;
}

/* To big-endian. */
static uint64_t
big(uint64_t word)
{
    return __builtin_bswap64(little(word));
}

/* Complain unless the runs of `start` to `stop`, of at most `available`, can be told. */
static int
check(Py_ssize_t start, Py_ssize_t stop, int64_t available, int shift, Py_ssize_t limit)
{
    if (start < 0 || start >= stop || stop > available)
        PyErr_SetString(PyExc_ValueError, "the range is empty or not inside the buffer");
    else if (shift < 0 || shift > 62 || (uint64_t)stop > (uint64_t)INT64_MAX >> shift)
        PyErr_SetString(PyExc_ValueError, "lengths would not fit in 63 bits");
    else if (limit < 1)
        PyErr_SetString(PyExc_ValueError, "the limit is less than one");
    else
        return 0;
    return -1;
}

/* (runs, where they end), unless there are fewer than were counted: then not all of `told` has been written. */
static PyObject *
told_up_to(PyObject *told, Py_ssize_t end, int all)
{
    if (all)
        return Py_BuildValue("Nn", told, end);
    Py_DECREF(told);
    PyErr_SetString(PyExc_ValueError, "the buffer was changed meanwhile");
    return NULL;
}

/* 64 bits from bit 64 * `number` on, bit 0 being the least significant; zeroes follow the buffer's end. */
static uint64_t
bits_at(const unsigned char *bits, Py_ssize_t size, Py_ssize_t number)
{
    Py_ssize_t at = 8 * number;
    Py_ssize_t left = size - at;
    uint64_t word = 0;
    if (left >= 8)
        return little(load(bits + at));
    for (Py_ssize_t byte = 0; byte < left; byte++)
        word |= (uint64_t)bits[at + byte] << 8 * byte;
    return word;
}

/* Bits of word `number` that differ from the bit before, as far as they are in (start, stop). */
static uint64_t
edges_at(const unsigned char *bits, Py_ssize_t size, Py_ssize_t number, Py_ssize_t start, Py_ssize_t stop)
{
    uint64_t word = bits_at(bits, size, number);
    uint64_t before = number ? bits[8 * number - 1] >> 7 : 0;
    uint64_t edges = word ^ (word << 1 | before);
    /* The first bit of the range begins a run, whatever is before it. */
    if (number == start >> 6)
        edges &= ~UINT64_C(0) << (start & 63) << 1;
    if (number == stop >> 6)
        edges &= ((uint64_t)1 << (stop & 63)) - 1;
    return edges;
}

static PyObject *
bit_runs(PyObject *module, PyObject *args)
{
    Py_buffer buffer;
    Py_ssize_t start, stop, limit;
    int shift;
    PyObject *told, *answer = NULL;

    if (!PyArg_ParseTuple(args, "y*nnin:bit_runs", &buffer, &start, &stop, &shift, &limit))
        return NULL;
    const unsigned char *bits = buffer.buf;
    const Py_ssize_t size = buffer.len;
    if (check(start, stop, size > PY_SSIZE_T_MAX / 8 ? PY_SSIZE_T_MAX : 8 * (int64_t)size, shift, limit) < 0)
        goto end;

    /* How many, to allocate no more than they need. */
    const Py_ssize_t last = (stop - 1) >> 6;
    Py_ssize_t count = 1;
    for (Py_ssize_t number = start >> 6; number <= last && count < limit; number++) {
        uint64_t edges = edges_at(bits, size, number, start, stop);
        if (edges)
            count += __builtin_popcountll(edges);
    }
    if (count > limit)
        count = limit;

    told = PyBytes_FromStringAndSize(NULL, count * PAIR);
    if (told == NULL)
        goto end;
    char *to = PyBytes_AsString(told);
    char *const full = to + count * PAIR;
    uint64_t value = bits[start >> 3] >> (start & 7) & 1;
    Py_ssize_t begin = start;
    for (Py_ssize_t number = start >> 6; number <= last && to < full; number++) {
        uint64_t edges = edges_at(bits, size, number, start, stop);
        for (; edges && to < full; edges &= edges - 1, to += PAIR) {
            Py_ssize_t edge = 64 * number + __builtin_ctzll(edges);
            store(to, (uint64_t)(edge - begin) << shift);
            store(to + 8, value);
            value ^= 1;
            begin = edge;
        }
    }
    if (to < full) {
        store(to, (uint64_t)(stop - begin) << shift);
        store(to + 8, value);
        to += PAIR;
        begin = stop;
    }
    answer = told_up_to(told, begin, to == full);
end:
    PyBuffer_Release(&buffer);
    return answer;
}

/* Which of the 8 bytes from `at` on differ from the byte before, as far as they are before `stop`: for byte n,
 * bit 8 * n + 7. `at` is not 0. */
static uint64_t
byte_edges(const unsigned char *values, Py_ssize_t at, Py_ssize_t stop)
{
    const uint64_t low = UINT64_C(0x7F7F7F7F7F7F7F7F);
    if (stop - at >= 8) {
        uint64_t differ = little(load(values + at) ^ load(values + at - 1));
        return (((differ & low) + low) | differ) & ~low;
    }
    uint64_t edges = 0;
    for (int byte = 0; at < stop; at++, byte += 8)
        edges |= (uint64_t)(values[at] != values[at - 1]) << (byte + 7);
    return edges;
}

static PyObject *
byte_runs(PyObject *module, PyObject *args)
{
    Py_buffer buffer;
    Py_ssize_t start, stop, limit;
    int shift;
    PyObject *told, *answer = NULL;

    if (!PyArg_ParseTuple(args, "y*nnin:byte_runs", &buffer, &start, &stop, &shift, &limit))
        return NULL;
    const unsigned char *values = buffer.buf;
    if (check(start, stop, buffer.len, shift, limit) < 0)
        goto end;

    Py_ssize_t count = 1;
    for (Py_ssize_t at = start + 1; at < stop && count < limit; at += 8) {
        uint64_t edges = byte_edges(values, at, stop);
        if (edges)
            count += __builtin_popcountll(edges);
    }
    if (count > limit)
        count = limit;

    told = PyBytes_FromStringAndSize(NULL, count * PAIR);
    if (told == NULL)
        goto end;
    char *to = PyBytes_AsString(told);
    char *const full = to + count * PAIR;
    Py_ssize_t begin = start;
    for (Py_ssize_t at = start + 1; at < stop && to < full; at += 8) {
        uint64_t edges = byte_edges(values, at, stop);
        for (; edges && to < full; edges &= edges - 1, to += PAIR) {
            Py_ssize_t edge = at + (__builtin_ctzll(edges) >> 3);
            store(to, (uint64_t)(edge - begin) << shift);
            store(to + 8, values[begin]);
            begin = edge;
        }
    }
    if (to < full) {
        store(to, (uint64_t)(stop - begin) << shift);
        store(to + 8, values[begin]);
        to += PAIR;
        begin = stop;
    }
    answer = told_up_to(told, begin, to == full);
end:
    PyBuffer_Release(&buffer);
    return answer;
}

static PyObject *
classify(PyObject *module, PyObject *args)
{
    Py_buffer buffer, letters;
    int swapped;
    unsigned long long masks[5];
    PyObject *told = NULL;

    if (!PyArg_ParseTuple(args, "y*p(KKKKK)y*:classify", &buffer, &swapped, &masks[0], &masks[1], &masks[2],
                          &masks[3], &masks[4], &letters))
        return NULL;
    if (buffer.len % 8 || letters.len != 32) {
        PyErr_SetString(PyExc_ValueError, "not words of 64 bits, or not 32 letters");
        goto end;
    }
    told = PyBytes_FromStringAndSize(NULL, buffer.len / 8);
    if (told == NULL)
        goto end;
    char *to = PyBytes_AsString(told);
    const unsigned char *words = buffer.buf;
    const char *letter = letters.buf;
    uint64_t last = 0;
    char same = letter[0];
    const uint64_t a = masks[0], b = masks[1], c = masks[2], d = masks[3], e = masks[4];
    for (Py_ssize_t at = 0; at < buffer.len; at += 8) {
        uint64_t word = load(words + at);
        if (word != last) {
            last = word;
            if (swapped)
                word = __builtin_bswap64(word);
            same = letter[((word & a) != 0) | ((word & b) != 0) << 1 | ((word & c) != 0) << 2 |
                          ((word & d) != 0) << 3 | ((word & e) != 0) << 4];
        }
        *to++ = same;
    }
end:
    PyBuffer_Release(&buffer);
    PyBuffer_Release(&letters);
    return told;
}

static PyObject *
pack(PyObject *module, PyObject *args)
{
    Py_buffer buffer;
    int width;
    unsigned long long longest;
    PyObject *packed = NULL;

    if (!PyArg_ParseTuple(args, "y*iK:pack", &buffer, &width, &longest))
        return NULL;
    const unsigned char *pairs = buffer.buf;
    if (buffer.len % PAIR || (width != 4 && width != 8)) {
        PyErr_SetString(PyExc_ValueError, "not pairs, or not words of 4 or 8 bytes");
        goto end;
    }
    const uint64_t greatest = width == 8 ? UINT64_MAX : UINT32_MAX;
    if (longest > greatest) {
        PyErr_SetString(PyExc_ValueError, "lengths would not fit");
        goto end;
    }
    Py_ssize_t size = 0;
    while (size < buffer.len) {
        uint64_t length = load(pairs + size);
        if (load(pairs + size + 8) > greatest) {
            PyErr_SetString(PyExc_ValueError, "flags do not fit");
            goto end;
        }
        size += PAIR;
        if (length > longest)
            break;
    }
    packed = PyBytes_FromStringAndSize(NULL, size / 8 * width);
    if (packed == NULL)
        goto end;
    char *to = PyBytes_AsString(packed);
    for (Py_ssize_t at = 0; at < size; at += PAIR, to += 2 * width) {
        uint64_t length = load(pairs + at);
        uint64_t flags = load(pairs + at + 8);
        if (length > longest)
            length = longest;
        if (width == 4) {
            store(to, big(length << 32 | flags));
        } else {
            store(to, big(length));
            store(to + 8, big(flags));
        }
    }
end:
    PyBuffer_Release(&buffer);
    return packed;
}

static PyMethodDef functions[] = {
    {"bit_runs", bit_runs, METH_VARARGS, NULL},
    {"byte_runs", byte_runs, METH_VARARGS, NULL},
    {"classify", classify, METH_VARARGS, NULL},
    {"pack", pack, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "nbdbm._speed",
    .m_doc = "The loops of block status, compiled; see nbdbm.runs.",
    .m_methods = functions,
};

PyMODINIT_FUNC
PyInit__speed(void)
{
    return PyModuleDef_Init(&definition);
}
