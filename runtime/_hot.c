/* A request's way through a lane of one stage with one input and one output, in C: what `shortest._of_one` does, its reference.

   A model leaves the caches cold, and then what counts is how many lines and pages of memory a call touches. Here those are few: the counters
   of a lane are C numbers in the lane itself, durations are in one array, the runtime is called with arguments that are there already, and
   an answer's array is used again once its caller has let it go (docs/decisions/0066).

   Only the way that nearly all requests take is here. Whatever is seldom is asked of Python: objects of another kind go to the reference as
   they came, before anything was done for them; methods of `Feed`, `Handing`, `Lane` do what is more than a look at a field.
   It relies on the global lock: a build of CPython without one must not have it.

   Functions return new references, and NULL with an exception set, unless they say otherwise. `AT` is a borrowed one. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#define VERSION 4 /* `hot.VERSION` */

#ifdef Py_GIL_DISABLED
#error "counts references and shares counters under the global lock"
#endif

#include "_hot_clock.h"

/* ---- NumPy's arrays: the head of `PyArrayObject_fields`, which NumPy's own macros compile into every extension, so that it is a part of its
   binary interface. Here without its headers, which a build would have to fetch; `hot` compares `array_fields` with what NumPy says. ---- */

typedef struct {
    PyObject_HEAD
    char *data;
    int nd;
    Py_ssize_t *dims, *strides;
    PyObject *base, *descr;
    int flags;
    PyObject *weakrefs;
} Array;

#define C_CONTIGUOUS 0x0001

static int same_shape(const Array *a, const Array *b)
{
    return a->nd == b->nd && memcmp(a->dims, b->dims, (size_t)a->nd * sizeof *a->dims) == 0;
}

/* Whether a view is still what `face.view()` made: a caller may have given it another shape or type, or locked it. */
static int untouched(PyObject *view, PyObject *face)
{
    Array *a = (Array *)view, *b = (Array *)face;
    return a->data == b->data && a->base == face && a->descr == b->descr && a->flags == b->flags && a->weakrefs == NULL
        && same_shape(a, b) && memcmp(a->strides, b->strides, (size_t)a->nd * sizeof *a->strides) == 0;
}

/* What is read here of an array of two dimensions, to be compared with what NumPy says. */
static PyObject *array_fields(PyObject *module, PyObject *array)
{
    Array *a = (Array *)array;
    if (Py_TYPE(array)->tp_basicsize < (Py_ssize_t)sizeof(Array) || a->nd != 2) {
        PyErr_SetString(PyExc_TypeError, "this is no array of two dimensions as NumPy makes them");
        return NULL;
    }
    return Py_BuildValue("(nnnnnOOiO)", (Py_ssize_t)a->data, a->dims[0], a->dims[1], a->strides[0], a->strides[1],
                         a->base == NULL ? Py_None : a->base, a->descr, a->flags, a->weakrefs == NULL ? Py_False : Py_True);
}

/* ---- Shortest ---- */

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject *take, *give, *wake; /* of the free lanes */
    PyObject *input, *output;     /* names */
    PyObject *reference;          /* does all of it, in Python */
    PyObject *failed;             /* (inputs, error, hands or None) -> an answer all the same, or raises */
    PyTypeObject *lane_type, *feed_type, *slot_type, *array_type;
    Py_ssize_t copied; /* bytes of an input that is copied, 0 where it is bound */
    Py_ssize_t awaited, ended, feed, hands, turn, bound, dtype, own, seen, times, after, face, ready, shown, stale; /* where fields lie: FIELDS */
} Shortest;

#define HELD(DO) DO(take) DO(give) DO(wake) DO(input) DO(output) DO(reference) DO(failed) DO(lane_type) DO(feed_type) DO(slot_type) DO(array_type)
#define FIELDS(DO) \
    DO(lane_type, awaited, "awaited") DO(lane_type, ended, "ended") DO(lane_type, feed, "feed") DO(lane_type, hands, "hands") \
    DO(lane_type, turn, "turn") \
    DO(feed_type, bound, "bound") DO(feed_type, dtype, "_dtype") DO(feed_type, own, "_own") DO(feed_type, seen, "_seen") \
    DO(feed_type, times, "_times") DO(slot_type, after, "after") DO(slot_type, face, "face") DO(slot_type, ready, "ready") \
    DO(slot_type, shown, "shown") DO(slot_type, stale, "stale")

#define AT(object, offset) (*(PyObject **)((char *)(object) + (offset)))

static PyObject *s_take, *s_another, *s_catch_up, *s_pass_on, *s_given, *s_view, *s_zero; /* as long as the process lives */

static void put(PyObject *object, Py_ssize_t offset, PyObject *value) /* takes `value` over */
{
    PyObject *before = AT(object, offset);
    AT(object, offset) = value;
    Py_XDECREF(before); /* last: it may run anything */
}

static int succeeded(PyObject *result) /* takes `result` over, of which it matters only that there is one */
{
    Py_XDECREF(result);
    return result != NULL;
}

/* `Feed.take` for the case that another array of the right kind is copied; else that method itself. */
static int take_input(Shortest *self, PyObject *feed, PyObject *array)
{
    PyObject *own = AT(feed, self->own);
    if (self->copied > 0 && own != NULL && own == AT(feed, self->bound) && Py_TYPE(array) == self->array_type && array != AT(feed, self->seen)) {
        Array *from = (Array *)array, *to = (Array *)own;
        if (from->descr == AT(feed, self->dtype) && (from->flags & C_CONTIGUOUS) && same_shape(from, to)) {
            memmove(to->data, from->data, (size_t)self->copied);
            put(feed, self->times, Py_NewRef(s_zero));
            put(feed, self->seen, Py_NewRef(array));
            return 1;
        }
    }
    return succeeded(PyObject_CallMethodOneArg(feed, s_take, array));
}

/* `Handing.next`: a request whose arrays nobody has. Its face alone is counted twice, by `Slot.face` and `Slot.faces`, and once more by the
   view that was shown last, which is forgotten here unless it can be shown again. Not where somebody is to be told of its end, who may do
   anything then: `another` puts it among those that end when the lane was given back. */
static PyObject *free_slot(Shortest *self, PyObject *lane, PyObject *hands)
{
    PyObject *slot = AT(lane, self->turn), *face = NULL;
    if (slot != NULL && Py_TYPE(slot) == self->slot_type)
        face = AT(slot, self->face);
    if (face != NULL && Py_TYPE(face) == self->array_type) {
        PyObject *shown = AT(slot, self->shown);
        Py_ssize_t alone = 2;
        if (shown != NULL && shown != Py_None && Py_REFCNT(shown) == 1) {
            if (Py_TYPE(shown) == self->array_type && untouched(shown, face))
                alone = 3;
            else if (Py_TYPE(shown) == self->array_type && ((Array *)shown)->weakrefs == NULL)
                put(slot, self->shown, Py_NewRef(Py_None));
        }
        if (Py_REFCNT(face) <= alone)
            return Py_NewRef(slot);
    }
    slot = PyObject_CallMethodNoArgs(hands, s_another);
    if (slot != NULL && Py_TYPE(slot) != self->slot_type) {
        PyErr_SetString(PyExc_TypeError, "`another` returns a slot");
        Py_CLEAR(slot);
    }
    return slot;
}

static PyObject *answer_of(Shortest *self, PyObject *hands, PyObject *slot)
{
    PyObject *face = AT(slot, self->face), *shown = AT(slot, self->shown);
    if (face == NULL || face == Py_None)
        return PyObject_CallMethodOneArg(hands, s_given, slot);
    if (shown == NULL || shown == Py_None || Py_REFCNT(shown) != 1) {
        shown = PyObject_CallMethodNoArgs(face, s_view);
        if (shown == NULL)
            return NULL;
        put(slot, self->shown, shown);
    }
    PyObject *answer = PyDict_New();
    if (answer != NULL && PyDict_SetItem(answer, self->output, shown) < 0)
        Py_CLEAR(answer);
    return answer;
}

static int counted(PyObject *lane, long long started_ns, long long ended_ns)
{
    Clock *clock = (Clock *)lane;
    clock->ring[(unsigned long long)clock->count % RING] = ended_ns - started_ns;
    clock->count++;
    if ((clock->count >= clock->due || ended_ns >= clock->due_ns) && !may_wait(clock, ended_ns)) {
        PyObject *times = Py_BuildValue("(LL)", started_ns, ended_ns), *method = PyObject_GetAttr(lane, s_pass_on);
        int passed = times != NULL && method != NULL && succeeded(PyObject_Call(method, times, NULL));
        Py_XDECREF(times);
        Py_XDECREF(method);
        if (!passed)
            return 0;
    }
    clock->ended_ns = ended_ns;
    return 1;
}

/* What ends when the lane was given back, taken off it: a list, or NULL where there is nothing. */
static PyObject *ended_of(Shortest *self, PyObject *lane)
{
    PyObject *ended = AT(lane, self->ended), *taken = NULL;
    if (ended != NULL && PyList_CheckExact(ended) && PyList_GET_SIZE(ended) > 0) {
        taken = PyList_GetSlice(ended, 0, PyList_GET_SIZE(ended));
        if (taken == NULL || PyList_SetSlice(ended, 0, PyList_GET_SIZE(ended), NULL) < 0)
            PyErr_Clear(); /* no memory: they stay until there is */
    }
    return taken;
}

/* Answer by a lane that was taken. `ran_into` becomes 1 where it was the runtime that failed. */
static PyObject *by_lane(Shortest *self, PyObject *lane, PyObject *hands, PyObject *feed, PyObject *array, int *ran_into)
{
    if (array != AT(feed, self->bound) && !take_input(self, feed, array))
        return NULL;
    PyObject *slot = free_slot(self, lane, hands), *answer = NULL;
    if (slot == NULL)
        return NULL;
    put(lane, self->turn, Py_NewRef(AT(slot, self->after)));
    if (AT(slot, self->stale) != Py_True || succeeded(PyObject_CallMethodOneArg(hands, s_catch_up, slot))) {
        PyObject *runs = Py_NewRef(AT(slot, self->ready)); /* a trace that begins may put another one in its place */
        int apart = PyTuple_CheckExact(runs); /* a function and its arguments: `handing.ready` */
        long long started_ns = perf_counter_ns();
        PyObject *result = apart ? PyObject_Call(PyTuple_GET_ITEM(runs, 0), PyTuple_GET_ITEM(runs, 1), NULL) : PyObject_CallNoArgs(runs);
        long long ended_ns = perf_counter_ns();
        Py_DECREF(runs);
        *ran_into = !succeeded(result);
        if (!*ran_into && counted(lane, started_ns, ended_ns))
            answer = answer_of(self, hands, slot);
    }
    Py_DECREF(slot);
    return answer;
}

static PyObject *raised(void) /* the exception that is set, which it takes away */
{
#if PY_VERSION_HEX >= 0x030C0000
    return PyErr_GetRaisedException();
#else
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    PyErr_NormalizeException(&type, &error, &traceback);
    if (traceback != NULL)
        PyException_SetTraceback(error, traceback);
    Py_XDECREF(type);
    Py_XDECREF(traceback);
    return error;
#endif
}

static PyObject *shortest_vectorcall(PyObject *callable, PyObject *const *args, size_t count, PyObject *names)
{
    Shortest *self = (Shortest *)callable;
    PyObject *inputs = PyVectorcall_NARGS(count) == 1 && names == NULL ? args[0] : NULL, *array = NULL, *lane = NULL;
    if (inputs != NULL && PyDict_CheckExact(inputs) && PyDict_GET_SIZE(inputs) == 1)
        array = PyDict_GetItemWithError(inputs, self->input);
    if (array != NULL) {
        lane = PyObject_CallNoArgs(self->take);
        if (lane == NULL && PyErr_ExceptionMatches(PyExc_IndexError))
            PyErr_Clear(); /* none is free: the reference waits */
    }
    if (PyErr_Occurred())
        return NULL;
    if (lane == NULL)
        return PyObject_Vectorcall(self->reference, args, count, names);

    int fits = Py_TYPE(lane) == self->lane_type, ran_into = 0;
    PyObject *hands = fits ? Py_XNewRef(AT(lane, self->hands)) : NULL, *feed = fits ? Py_XNewRef(AT(lane, self->feed)) : NULL;
    PyObject *answer = NULL, *error = NULL;
    Py_INCREF(array); /* the caller's dictionary may change while the runtime runs */
    if (hands != NULL && feed != NULL && Py_TYPE(feed) == self->feed_type)
        answer = by_lane(self, lane, hands, feed, array, &ran_into);
    else
        PyErr_SetString(PyExc_TypeError, "a free lane is closed, or none of one input and one output");
    Py_DECREF(array);
    Py_XDECREF(feed);
    if (answer == NULL)
        error = raised();
    PyObject *ended = fits ? ended_of(self, lane) : NULL;
    int given = succeeded(PyObject_CallOneArg(self->give, lane));
    if (given && fits && AT(lane, self->awaited) == Py_True)
        given = succeeded(PyObject_CallNoArgs(self->wake));
    Py_DECREF(lane);
    Py_XDECREF(ended);
    if (!given)
        Py_CLEAR(answer);
    else if (answer == NULL)
        answer = PyObject_CallFunctionObjArgs(self->failed, inputs, error, ran_into ? hands : Py_None, NULL);
    Py_XDECREF(hands);
    Py_XDECREF(error);
    return answer;
}

/* Where a slot of a class lies in its objects, as the class itself says; -1 with an exception set. */
static Py_ssize_t offset_of(PyTypeObject *type, const char *name)
{
    PyObject *found = PyObject_GetAttrString((PyObject *)type, name);
    PyMemberDef *member = found != NULL && Py_TYPE(found) == &PyMemberDescr_Type ? ((PyMemberDescrObject *)found)->d_member : NULL;
    Py_ssize_t offset = member != NULL && member->type == T_OBJECT_EX ? member->offset : -1;
    if (offset < 0 && !PyErr_Occurred())
        PyErr_Format(PyExc_TypeError, "%s.%s is none of its slots", type->tp_name, name);
    Py_XDECREF(found);
    return offset;
}

static PyObject *shortest_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    Shortest given = {0}; /* its objects are borrowed: the collector does not see it */
    int right = PyArg_ParseTuple(args, "OOOUUOOO!O!O!O!n:Shortest", &given.take, &given.give, &given.wake, &given.input, &given.output,
                                 &given.reference, &given.failed, &PyType_Type, &given.lane_type, &PyType_Type, &given.feed_type,
                                 &PyType_Type, &given.slot_type, &PyType_Type, &given.array_type, &given.copied);
    if (right && !PyType_IsSubtype(given.lane_type, &ClockType)) {
        PyErr_SetString(PyExc_TypeError, "a lane is a clock");
        right = 0;
    }
#define FIND(owner, name, spelled) right = right && (given.name = offset_of(given.owner, spelled)) >= 0;
    FIELDS(FIND)
    Shortest *self = right ? (Shortest *)type->tp_alloc(type, 0) : NULL;
    if (self == NULL)
        return NULL;
#define OWN(name) Py_INCREF(given.name); self->name = given.name;
    HELD(OWN)
#define KEEP(owner, name, spelled) self->name = given.name;
    FIELDS(KEEP)
    self->copied = given.copied;
    self->vectorcall = shortest_vectorcall;
    return (PyObject *)self;
}

static int shortest_traverse(PyObject *object, visitproc visit, void *arg)
{
    Shortest *self = (Shortest *)object;
#define VISIT(name) Py_VISIT(self->name);
    HELD(VISIT)
    return 0;
}

static int shortest_clear(PyObject *object)
{
    Shortest *self = (Shortest *)object;
#define CLEAR(name) Py_CLEAR(self->name);
    HELD(CLEAR)
    return 0;
}

static void shortest_dealloc(PyObject *self)
{
    PyObject_GC_UnTrack(self);
    (void)shortest_clear(self);
    Py_TYPE(self)->tp_free(self);
}

static PyTypeObject ShortestType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "aivmm.runtime._hot.Shortest",
    .tp_doc = PyDoc_STR("Answers requests as its `reference` does."),
    .tp_basicsize = sizeof(Shortest),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_vectorcall_offset = offsetof(Shortest, vectorcall),
    .tp_call = PyVectorcall_Call,
    .tp_new = shortest_new,
    .tp_traverse = shortest_traverse,
    .tp_clear = shortest_clear,
    .tp_dealloc = shortest_dealloc,
};

static PyMethodDef functions[] = {{"array_fields", array_fields, METH_O, NULL}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "aivmm.runtime._hot", NULL, -1, functions, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__hot(void)
{
    struct { PyObject **held; const char *name; } names[] = {{&s_take, "take"}, {&s_another, "another"}, {&s_catch_up, "catch_up"},
        {&s_pass_on, "pass_on"}, {&s_given, "given"}, {&s_view, "view"}};
    PyObject *module = PyModule_Create(&definition);
    int right = module != NULL && (s_zero = PyLong_FromLong(0)) != NULL;
    for (size_t at = 0; at < sizeof names / sizeof *names; at++)
        right = right && (*names[at].held = PyUnicode_InternFromString(names[at].name)) != NULL;
    if (!right || PyModule_AddIntMacro(module, RING) < 0 || PyModule_AddIntMacro(module, VERSION) < 0 || PyModule_AddType(module, &ClockType) < 0 || PyModule_AddType(module, &ShortestType) < 0)
        Py_CLEAR(module);
    return module;
}
