/* A request's way through a lane, in C: what `shortest._of_one` does, its reference, and `shortest._of_any` where there are several inputs or
   outputs.

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

#define VERSION 8 /* `hot.VERSION` */

#ifdef Py_GIL_DISABLED
#error "counts references and shares counters under the global lock"
#endif

#include "_hot_clock.h"
#include "_hot_answer.h"

static SELDOM int passed_on(PyObject *lane, long long started_ns, long long ended_ns)
{
    if (may_wait((Clock *)lane, ended_ns))
        return 1;
    PyObject *times = Py_BuildValue("(LL)", started_ns, ended_ns), *method = PyObject_GetAttr(lane, s_pass_on);
    int passed = times != NULL && method != NULL && succeeded(PyObject_Call(method, times, NULL));
    Py_XDECREF(times);
    Py_XDECREF(method);
    return passed;
}

static INLINE int counted(PyObject *lane, long long started_ns, long long ended_ns)
{
    Clock *clock = (Clock *)lane;
    clock->ring[(unsigned long long)clock->count % RING] = ended_ns - started_ns;
    clock->count++;
    if ((clock->count >= clock->due || ended_ns >= clock->due_ns) && !passed_on(lane, started_ns, ended_ns))
        return 0;
    clock->ended_ns = ended_ns;
    return 1;
}

static INLINE PyObject *run(Shortest *self, PyObject *runs) /* as `Slot.ready` says: a function and its arguments, or what is called */
{
    if (!OFTEN(Py_TYPE(runs) == self->tuple))
        return PyObject_CallNoArgs(runs);
    PyObject **items = &PyTuple_GET_ITEM(runs, 0);
    return self->call(items[0], items + 1, (size_t)PyTuple_GET_SIZE(runs) - 1, NULL);
}

/* `StageClock.took`. */
static INLINE int took(Shortest *self, PyObject *object, long long nanoseconds)
{
    if (!OFTEN(Py_TYPE(object) == self->clock_type)) {
        PyErr_SetString(PyExc_TypeError, "a stage has a clock");
        return 0;
    }
    Clock *clock = (Clock *)object;
    clock->ring[(unsigned long long)clock->count % RING] = nanoseconds;
    clock->count++;
    return OFTEN(clock->count < clock->due) || succeeded(PyObject_CallMethodNoArgs(object, s_add_up));
}

/* The stages in front of the last one, by a lane's `ahead`. When they began and ended goes to `times`. `refused` becomes who is told where it was
   a runtime that failed. */
static APART int runs_ahead(Shortest *self, PyObject *ahead, long long times[2], PyObject **refused)
{
    times[0] = times[1] = read_clock(self->clock);
    for (Py_ssize_t at = 0; at + 3 < PyTuple_GET_SIZE(ahead); at += 3) {
        PyObject **stage = &PyTuple_GET_ITEM(ahead, at);
        if (!succeeded(run(self, stage[0]))) {
            *refused = Py_NewRef(stage[2]);
            return 0;
        }
        long long now_ns = read_clock(self->clock);
        if (!took(self, stage[1], now_ns - times[1]))
            return 0;
        times[1] = now_ns;
    }
    return 1;
}

/* What ends when the lane was given back, taken off it: a list, or NULL where there is no memory for one, and they stay until there is. */
static SELDOM PyObject *taken_off(PyObject *ended)
{
    PyObject *taken = PyList_GetSlice(ended, 0, PyList_GET_SIZE(ended));
    if (taken == NULL || PyList_SetSlice(ended, 0, PyList_GET_SIZE(ended), NULL) < 0)
        PyErr_Clear();
    return taken;
}

static SELDOM int catches_up(Shortest *self, PyObject *lane, PyObject *slot)
{
    PyObject *hands = Py_NewRef(AT(lane, self->hands));
    int right = succeeded(PyObject_CallMethodOneArg(hands, s_catch_up, slot));
    Py_DECREF(hands);
    return right;
}

/* Answer by a lane whose inputs and earlier stages are done: by its last one, since `times` where there were any. `many`: outputs, or inputs. */
static INLINE PyObject *by_last(Shortest *self, PyObject *lane, PyObject *ahead, const long long times[2], PyObject **refused, int many)
{
    PyObject *slot = many ? free_slot_of_many(self, lane) : free_slot(self, lane), *answer = NULL;
    if (slot == NULL)
        return NULL;
    put(lane, self->turn, Py_NewRef(AT(slot, self->after)));
    if (AT(slot, self->stale) != self->yes || catches_up(self, lane, slot)) {
        PyObject *runs = Py_NewRef(AT(slot, self->ready)); /* a trace that begins may put another one in its place */
        long long started_ns = read_clock(self->clock);
        int right = succeeded(run(self, runs));
        long long ended_ns = read_clock(self->clock);
        Py_DECREF(runs);
        if (!OFTEN(right))
            *refused = Py_NewRef(AT(lane, self->hands));
        else if (!OFTEN(ahead == NULL)) {
            right = took(self, PyTuple_GET_ITEM(ahead, PyTuple_GET_SIZE(ahead) - 1), ended_ns - times[1]);
            started_ns = times[0];
        }
        if (right && counted(lane, started_ns, ended_ns))
            answer = many ? answer_of_many(self, lane, slot) : answer_of(self, lane, slot);
    }
    Py_DECREF(slot);
    return answer;
}

/* The same for a lane of several stages. */
static INLINE PyObject *by_stages(Shortest *self, PyObject *lane, PyObject **refused, int many)
{
    PyObject *ahead = Py_NewRef(AT(lane, self->ahead)), *answer = NULL; /* another one, where a trace begins meanwhile */
    long long times[2];
    if (Py_TYPE(ahead) != self->tuple || PyTuple_GET_SIZE(ahead) % 3 != 1)
        PyErr_SetString(PyExc_TypeError, "a lane's stages are three objects each, and a clock");
    else if (runs_ahead(self, ahead, times, refused))
        answer = by_last(self, lane, ahead, times, refused, many);
    Py_DECREF(ahead);
    return answer;
}

static APART PyObject *one_by_stages(Shortest *self, PyObject *lane, PyObject **refused)
{
    return by_stages(self, lane, refused, 0);
}

/* Answer by a lane that was taken. `refused` becomes who is told of an error, a new reference, where it was a runtime that failed. */
static INLINE PyObject *by_lane(Shortest *self, PyObject *lane, PyObject *array, PyObject **refused)
{
    PyObject *feed = AT(lane, self->feed);
    if (!OFTEN(array == AT(feed, self->bound)) && !take_input(self, feed, array, self->copied))
        return NULL;
    return OFTEN(AT(lane, self->ahead) == self->none) ? by_last(self, lane, NULL, NULL, refused, 0) : one_by_stages(self, lane, refused);
}

/* The same where there are several inputs or outputs. What is missing is refused by `Feed.take`. */
static INLINE PyObject *by_lane_of_many(Shortest *self, PyObject *lane, PyObject *inputs, PyObject **refused)
{
    PyObject *feeds = AT(lane, self->feeds);
    for (Py_ssize_t at = 0; at < PyTuple_GET_SIZE(feeds); at++) {
        PyObject *feed = PyTuple_GET_ITEM(feeds, at), *array = PyDict_GetItemWithError(inputs, AT(feed, self->name));
        if (array == NULL && PyErr_Occurred())
            return NULL;
        array = array == NULL ? self->none : array;
        if (!OFTEN(array == AT(feed, self->bound))) {
            Py_ssize_t copied = PyLong_AsSsize_t(AT(feed, self->copies));
            if ((copied < 0 && PyErr_Occurred()) || !take_input(self, feed, array, copied))
                return NULL;
        }
    }
    return OFTEN(AT(lane, self->ahead) == self->none) ? by_last(self, lane, NULL, NULL, refused, 1) : by_stages(self, lane, refused, 1);
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

/* Answer without a lane that was free: the reference waits for one. */
static SELDOM PyObject *at_length(Shortest *self, PyObject *inputs)
{
    if (PyErr_Occurred()) {
        if (!PyErr_ExceptionMatches(PyExc_IndexError))
            return NULL;
        PyErr_Clear();
    }
    return PyObject_CallOneArg(self->reference, inputs);
}

/* Give a lane back, and what ends then. */
static INLINE int give_back(Shortest *self, PyObject *lane)
{
    PyObject *list = Py_TYPE(lane) == self->lane_type ? AT(lane, self->ended) : NULL;
    PyObject *ended = list != NULL && Py_TYPE(list) == self->list && PyList_GET_SIZE(list) > 0 ? taken_off(list) : NULL;
    int given = succeeded(OFTEN(self->appends != NULL) ? self->appends(self->appended, lane) : PyObject_CallOneArg(self->give, lane));
    if (given && Py_TYPE(lane) == self->lane_type && AT(lane, self->awaited) == self->yes)
        given = succeeded(PyObject_CallNoArgs(self->wake));
    Py_DECREF(lane);
    Py_XDECREF(ended);
    return given;
}

/* Answer a request that came to an error, and give its lane back. */
static SELDOM PyObject *failing(Shortest *self, PyObject *inputs, PyObject *lane, PyObject *refused)
{
    PyObject *error = raised(), *answer = NULL;
    if (give_back(self, lane))
        answer = PyObject_CallFunctionObjArgs(self->failed, inputs, error, refused == NULL ? Py_None : refused, NULL);
    Py_XDECREF(refused);
    Py_XDECREF(error);
    return answer;
}

static SELDOM PyObject *no_lane(void)
{
    PyErr_SetString(PyExc_TypeError, "a free lane is closed, or not of the plan's inputs and outputs");
    return NULL;
}

static SELDOM PyObject *named(Shortest *self, PyObject *inputs)
{
    return PyDict_GetItemWithError(inputs, self->input);
}

static INLINE PyObject *take_lane(Shortest *self)
{
    return OFTEN(self->pops != NULL) ? self->pops(self->popped, NULL) : PyObject_CallNoArgs(self->take);
}

static INLINE PyObject *answered(Shortest *self, PyObject *inputs, PyObject *lane, PyObject *answer, PyObject *refused) /* and gives the lane back */
{
    if (!OFTEN(answer != NULL))
        return failing(self, inputs, lane, refused);
    if (!give_back(self, lane))
        Py_CLEAR(answer);
    return answer;
}

static IN_ONE_PAGE PyObject *ask(PyObject *object, PyObject *inputs)
{
    Shortest *self = (Shortest *)object;
    PyObject *name = NULL, *array = NULL, *lane = NULL, *answer;
    Py_ssize_t at = 0;
    if (OFTEN(Py_TYPE(inputs) == self->dict && PyDict_GET_SIZE(inputs) == 1) && self->next(inputs, &at, &name, &array) && name != self->input)
        array = named(self, inputs);
    if (OFTEN(array != NULL))
        lane = take_lane(self);
    if (!OFTEN(lane != NULL))
        return array == NULL && PyErr_Occurred() ? NULL : at_length(self, inputs);

    PyObject *refused = NULL;
    int fits = Py_TYPE(lane) == self->lane_type && AT(lane, self->hands) != NULL && AT(lane, self->feed) != NULL;
    if (OFTEN(fits && Py_TYPE(AT(lane, self->feed)) == self->feed_type && AT(lane, self->ahead) != NULL))
        answer = by_lane(self, lane, array, &refused);
    else
        answer = no_lane();
    return answered(self, inputs, lane, answer, refused);
}

static INLINE int fits_many(Shortest *self, PyObject *lane)
{
    PyObject *feeds = AT(lane, self->feeds);
    int fits = AT(lane, self->hands) != NULL && AT(lane, self->ahead) != NULL && feeds != NULL && Py_TYPE(feeds) == self->tuple;
    fits = fits && PyTuple_GET_SIZE(feeds) == self->inputs;
    for (Py_ssize_t at = 0; fits && at < self->inputs; at++)
        fits = Py_TYPE(PyTuple_GET_ITEM(feeds, at)) == self->feed_type;
    return fits;
}

static IN_ONE_PAGE PyObject *ask_many(PyObject *object, PyObject *inputs)
{
    Shortest *self = (Shortest *)object;
    PyObject *lane = OFTEN(Py_TYPE(inputs) == self->dict && PyDict_GET_SIZE(inputs) == self->inputs) ? take_lane(self) : NULL;
    if (!OFTEN(lane != NULL))
        return at_length(self, inputs);
    PyObject *refused = NULL, *answer;
    answer = Py_TYPE(lane) == self->lane_type && fits_many(self, lane) ? by_lane_of_many(self, lane, inputs, &refused) : no_lane();
    return answered(self, inputs, lane, answer, refused);
}

/* Where a slot of a class lies in its objects, as the class itself says; -1 with an exception set. */
static Py_ssize_t offset_of(PyTypeObject *type, const char *name)
{
    PyObject *found = PyObject_GetAttrString((PyObject *)type, name);
    PyMemberDef *member = found != NULL && Py_TYPE(found) == &PyMemberDescr_Type ? ((PyMemberDescrObject *)found)->d_member : NULL;
    Py_ssize_t offset = member != NULL && member->type == T_OBJECT_EX && member->offset <= USHRT_MAX ? member->offset : -1;
    if (offset < 0 && !PyErr_Occurred())
        PyErr_Format(PyExc_TypeError, "%s.%s is none of its slots", type->tp_name, name);
    Py_XDECREF(found);
    return offset;
}

/* What a method that was bound to its object comes to, called as one with these `flags`; NULL where it is no function of C's. */
static PyCFunction function_of(PyObject *method, int flags, PyObject **bound)
{
    int right = PyCFunction_CheckExact(method) && (PyCFunction_GET_FLAGS(method) & ~METH_STATIC) == flags;
    *bound = right ? PyCFunction_GET_SELF(method) : NULL; /* as long as `method` lives */
    return *bound != NULL ? PyCFunction_GET_FUNCTION(method) : NULL;
}

static PyObject *shortest_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    Shortest given = {0}; /* its objects are borrowed: the collector does not see it */
    PyObject *one = NULL;
    int right = PyArg_ParseTuple(args, "OOOOOO!O!O!O!O!nO:Shortest", &given.take, &given.give, &given.wake, &given.reference, &given.failed,
                                 &PyType_Type, &given.lane_type, &PyType_Type, &given.feed_type, &PyType_Type, &given.slot_type,
                                 &PyType_Type, &given.array_type, &PyType_Type, &given.clock_type, &given.inputs, &one);
    int many = one == Py_None;
    if (many)
        given.input = given.output = one;
    else
        right = right && PyArg_ParseTuple(one, "UUn:Shortest", &given.input, &given.output, &given.copied);
    if (right && !(PyType_IsSubtype(given.lane_type, &ClockType) && PyType_IsSubtype(given.clock_type, &ClockType))) {
        PyErr_SetString(PyExc_TypeError, "a lane is a clock, and a stage has one");
        right = 0;
    }
    Py_ssize_t offset = 0;
#define FIND(owner, name, spelled) right = right && (offset = offset_of(given.owner, spelled)) >= 0; given.name = (unsigned short)offset;
    FIELDS(FIND)
    Shortest *self = right ? (Shortest *)type->tp_alloc(type, 0) : NULL;
    if (self == NULL)
        return NULL;
#define OWN(name) Py_INCREF(given.name); self->name = given.name;
    HELD(OWN)
#define KEEP(owner, name, spelled) self->name = given.name;
    FIELDS(KEEP)
    if (!many) {
        PyUnicode_InternInPlace(&self->input); /* as names in callers' code are: found without being read */
        PyUnicode_InternInPlace(&self->output);
    }
    self->copied = given.copied;
    self->inputs = given.inputs;
    self->next = PyDict_Next;
    self->call = PyObject_Vectorcall;
    self->new_dict = PyDict_New;
    self->set_item = PyDict_SetItem;
    self->clock = CLOCK;
    self->dict = &PyDict_Type;
    self->tuple = &PyTuple_Type;
    self->list = &PyList_Type;
    self->none = Py_None;
    self->yes = Py_True;
    self->pops = function_of(self->take, METH_NOARGS, &self->popped);
    self->appends = function_of(self->give, METH_O, &self->appended);
    self->method = (PyMethodDef){"ask", many ? ask_many : ask, METH_O, PyDoc_STR("Answer a request.")};
    return (PyObject *)self;
}

/* A function of C's, which the interpreter calls without asking a type how. */
static PyObject *shortest_ask(PyObject *self, void *closure)
{
    return PyCFunction_New(&((Shortest *)self)->method, self);
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

static PyGetSetDef shortest_getset[] = {
    {"ask", shortest_ask, NULL, PyDoc_STR("What answers a request as `reference` does."), NULL}, {NULL, NULL, NULL, NULL, NULL}};

static PyTypeObject ShortestType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "aivmm.runtime._hot.Shortest",
    .tp_doc = PyDoc_STR("Answers requests as its `reference` does."),
    .tp_basicsize = sizeof(Shortest),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_getset = shortest_getset,
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
        {&s_pass_on, "pass_on"}, {&s_given, "given"}, {&s_view, "view"}, {&s_add_up, "add_up"}};
    PyObject *module = PyModule_Create(&definition);
    int right = module != NULL && (s_zero = PyLong_FromLong(0)) != NULL;
    for (size_t at = 0; at < sizeof names / sizeof *names; at++)
        right = right && (*names[at].held = PyUnicode_InternFromString(names[at].name)) != NULL;
    if (!right || PyModule_AddIntMacro(module, RING) < 0 || PyModule_AddIntMacro(module, VERSION) < 0 || PyModule_AddType(module, &ClockType) < 0 || PyModule_AddType(module, &ShortestType) < 0)
        Py_CLEAR(module);
    return module;
}
