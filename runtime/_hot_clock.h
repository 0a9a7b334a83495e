/* The clock of `_hot.c`: the fields of `StageClock` and `WatchedClock` that each call touches, and whether what was timed can wait to be passed
   on. `clocks.PythonClock` is its reference. Included there alone, behind Python.h. */
#include <time.h>

/* What is seldom lies apart, in other lines and pages than what each call runs through, which fits into 2 KiB, and so into a page. */
#if defined(__GNUC__) || defined(__clang__)
#define SELDOM __attribute__((cold, noinline))
#define APART __attribute__((noinline))
#define INLINE inline __attribute__((always_inline))
#define IN_ONE_PAGE __attribute__((hot, aligned(2048)))
#define OFTEN(condition) __builtin_expect(!!(condition), 1)
#else
#define SELDOM
#define APART
#define INLINE inline
#define IN_ONE_PAGE
#define OFTEN(condition) (condition)
#endif

/* What `time.perf_counter_ns` reads. */
#if PY_VERSION_HEX >= 0x030D0000
#define CLOCK PyTime_PerfCounterRaw
typedef int (*Clocked)(PyTime_t *);
static INLINE long long read_clock(Clocked clock)
{
    PyTime_t now = 0;
    (void)clock(&now); /* fails only where the interpreter would not have started */
    return (long long)now;
}
#else
#define CLOCK _PyTime_GetPerfCounter
typedef _PyTime_t (*Clocked)(void);
static INLINE long long read_clock(Clocked clock)
{
    return (long long)clock();
}
#endif

/* What `time.process_time_ns` reads, but for Windows, which counts that by ticks as long as an observation: there it is the clock's time.
   (As `clock` is there, too, which ends after 25 days.) */
static long long process_time_ns(void)
{
#ifdef CLOCK_PROCESS_CPUTIME_ID
    struct timespec now = {0};
    (void)clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
#else
    return read_clock(CLOCK);
#endif
}

#define RING 4096 /* durations remembered: `clocks.RING` */

typedef struct {
    PyObject_HEAD
    long long count, due, due_ns, ended_ns; /* first what each call touches */
    long long *ring; /* the last durations, that of call i at i % RING */
    long long step, until, pause_ns, until_ns, looked, own_ns; /* of `may_wait`; `own_ns`: the CPU time of this process at the last look */
    double call_ns, ratio;
    long long later; /* calls that may still come when some were slow */
    long long looking_ns; /* what `may_wait` took, added up; who passes calls on takes from it */
} Clock;

static PyObject *clock_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    Clock *self = (Clock *)type->tp_alloc(type, 0); /* arguments are for `__init__` */
    if (self == NULL)
        return NULL;
    self->ring = PyMem_Malloc(RING * sizeof *self->ring);
    if (self->ring == NULL) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    memset(self->ring, 0, RING * sizeof *self->ring); /* now, and not page by page in the calls */
    return (PyObject *)self;
}

static void clock_dealloc(PyObject *self)
{
    PyMem_Free(((Clock *)self)->ring);
    Py_TYPE(self)->tp_free(self);
}

static PyObject *clock_note(PyObject *self, PyObject *nanoseconds)
{
    Clock *clock = (Clock *)self;
    long long took = PyLong_AsLongLong(nanoseconds);
    if (took == -1 && PyErr_Occurred())
        return NULL;
    clock->ring[(unsigned long long)clock->count % RING] = took;
    Py_RETURN_NONE;
}

/* Of so many durations that are wanted, how many there are; -1 with an exception set where that is no number. */
static long long remembered(Clock *clock, PyObject *wanted)
{
    long long many = PyLong_AsLongLong(wanted);
    if (many == -1 && PyErr_Occurred())
        return -1;
    many = many < RING ? many : RING;
    many = many < clock->count ? many : clock->count;
    return many < 0 ? 0 : many;
}

static long long sum_of(Clock *clock, long long many)
{
    long long total = 0;
    for (long long at = 0; at < many; at++)
        total += clock->ring[(unsigned long long)(clock->count - 1 - at) % RING];
    return total;
}

static PyObject *clock_newest_ns(PyObject *self, PyObject *wanted)
{
    long long many = remembered((Clock *)self, wanted);
    return many < 0 ? NULL : PyLong_FromLongLong(sum_of((Clock *)self, many));
}

/* The sums of the durations by `step` calls, the oldest first, of `many` of the last ones without the newest `without`. None counts for more
   than `most_ns`. */
static PyObject *clock_sums(PyObject *self, PyObject *args)
{
    Clock *clock = (Clock *)self;
    long long many, without, step, most_ns;
    if (!PyArg_ParseTuple(args, "LLLL:sums", &many, &without, &step, &most_ns))
        return NULL;
    if (step < 1)
        return PyErr_Format(PyExc_ValueError, "sums by %lld calls", step);
    many = many < RING ? many : RING;
    many = many < clock->count ? many : clock->count;
    PyObject *found = PyList_New(0);
    for (long long at = many; found != NULL && at > without;) {
        long long total = 0, end = at - step > without ? at - step : without;
        for (; at > end; at--) {
            long long each = clock->ring[(unsigned long long)(clock->count - at) % RING];
            total += each < most_ns ? each : most_ns;
        }
        PyObject *sum = PyLong_FromLongLong(total);
        if (sum == NULL || PyList_Append(found, sum) < 0)
            Py_CLEAR(found);
        Py_XDECREF(sum);
    }
    return found;
}

static void look_again(Clock *clock, long long now_ns, long long own_ns)
{
    clock->looked = clock->count;
    clock->own_ns = own_ns;
    clock->due = clock->count + clock->step < clock->until ? clock->count + clock->step : clock->until;
    clock->due_ns = now_ns + clock->pause_ns < clock->until_ns ? now_ns + clock->pause_ns : clock->until_ns;
}

static int were_calm(Clock *clock, long long now_ns)
{
    long long calls = clock->count - clock->looked, own_ns = process_time_ns();
    double total_ns = (double)sum_of(clock, calls);
    int kept = total_ns > (double)(own_ns - clock->own_ns) * clock->ratio, slow = total_ns > (double)calls * clock->call_ns;
    if (kept || (slow && clock->later == 0)) {
        clock->until = clock->count;
        return 0;
    }
    if (slow) {
        clock->until = clock->count + clock->later < clock->until ? clock->count + clock->later : clock->until;
        clock->call_ns = Py_HUGE_VAL;
    }
    look_again(clock, now_ns, own_ns);
    return 1;
}

/* Whether what was timed need not be passed on yet; if not, it says so again until `wait` is called. Reading the CPU time is where Linux takes
   the core from who has had his slice, so that others have it before this returns: that is no pause of the caller. */
static int may_wait(Clock *clock, long long now_ns)
{
    if (clock->count >= clock->until || now_ns >= clock->due_ns)
        return 0;
    long long began_ns = read_clock(CLOCK);
    int calm = were_calm(clock, now_ns);
    clock->looking_ns += read_clock(CLOCK) - began_ns;
    return calm;
}

static PyObject *clock_may_wait(PyObject *self, PyObject *nanoseconds)
{
    long long now_ns = PyLong_AsLongLong(nanoseconds);
    return now_ns == -1 && PyErr_Occurred() ? NULL : PyBool_FromLong(may_wait((Clock *)self, now_ns));
}

static PyObject *clock_wait(PyObject *self, PyObject *args)
{
    Clock *clock = (Clock *)self;
    long long now_ns, step, most, pause_ns, most_ns, later;
    double call_ns, ratio;
    if (!PyArg_ParseTuple(args, "LLLLLddL:wait", &now_ns, &step, &most, &pause_ns, &most_ns, &call_ns, &ratio, &later))
        return NULL;
    clock->step = step;
    clock->until = clock->count + (most < RING - 1 ? most : RING - 1);
    clock->pause_ns = pause_ns;
    clock->until_ns = now_ns + most_ns;
    clock->call_ns = call_ns;
    clock->ratio = ratio;
    clock->later = later;
    look_again(clock, now_ns, process_time_ns());
    Py_RETURN_NONE;
}

static PyObject *clock_newest(PyObject *self, PyObject *wanted)
{
    Clock *clock = (Clock *)self;
    long long count = clock->count, many = remembered(clock, wanted);
    PyObject *found = many < 0 ? NULL : PyList_New((Py_ssize_t)many);
    for (long long at = 0; found != NULL && at < many; at++) {
        PyObject *each = PyLong_FromLongLong(clock->ring[(unsigned long long)(count - 1 - at) % RING]);
        if (each == NULL)
            Py_CLEAR(found);
        else
            PyList_SET_ITEM(found, (Py_ssize_t)at, each);
    }
    return found;
}

static PyObject *clock_fill(PyObject *self, PyObject *none)
{
    Py_RETURN_NONE; /* it was filled when it was made; the one in Python is not */
}

static PyMethodDef clock_methods[] = {
    {"note", clock_note, METH_O, PyDoc_STR("Remember the duration of a call in nanoseconds, before `count` counts it.")},
    {"newest", clock_newest, METH_O, PyDoc_STR("Return the durations of so many of the last calls, the very last first.")},
    {"newest_ns", clock_newest_ns, METH_O, PyDoc_STR("Return the sum of these.")},
    {"sums", clock_sums, METH_VARARGS, PyDoc_STR("Return their sums by so many calls, the oldest first; see `PythonClock`.")},
    {"may_wait", clock_may_wait, METH_O, PyDoc_STR("Look whether calls were slow; return whether what was timed need not be passed on by now.")},
    {"wait", clock_wait, METH_VARARGS, PyDoc_STR("Begin to wait with what is timed from now on.")},
    {"fill", clock_fill, METH_NOARGS, PyDoc_STR("Take the memory of what is still to come.")},
    {NULL, NULL, 0, NULL}};

static PyMemberDef clock_members[] = {
    {"count", T_LONGLONG, offsetof(Clock, count), 0, PyDoc_STR("Calls.")},
    {"due", T_LONGLONG, offsetof(Clock, due), 0, PyDoc_STR("The count at which durations are passed on.")},
    {"due_ns", T_LONGLONG, offsetof(Clock, due_ns), 0, PyDoc_STR("The time from which they are.")},
    {"ended_ns", T_LONGLONG, offsetof(Clock, ended_ns), 0, PyDoc_STR("When the last call ended.")},
    {"looking_ns", T_LONGLONG, offsetof(Clock, looking_ns), 0, PyDoc_STR("What looks took, added up.")},
    {NULL, 0, 0, 0, NULL}};

static PyTypeObject ClockType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "aivmm.runtime._hot.Clock",
    .tp_doc = PyDoc_STR("What each call counts, as C numbers; `clocks.PythonClock` is its reference."),
    .tp_basicsize = sizeof(Clock),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .tp_new = clock_new,
    .tp_dealloc = clock_dealloc,
    .tp_methods = clock_methods,
    .tp_members = clock_members,
};
