/* What `_hot.c` reads and writes of NumPy's arrays and of the objects in Python: inputs that are taken, requests that are free, answers that are
   given. Included there alone, behind `_hot_clock.h`. */

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

static INLINE int same(const Py_ssize_t *a, const Py_ssize_t *b, int count) /* without the call of `memcmp`, for a few */
{
    for (int at = 0; at < count; at++)
        if (a[at] != b[at])
            return 0;
    return 1;
}

static INLINE int same_shape(const Array *a, const Array *b)
{
    return a->nd == b->nd && same(a->dims, b->dims, a->nd);
}

/* Whether a view is still what `face.view()` made: a caller may have given it another shape or type, or locked it. */
static INLINE int untouched(PyObject *view, PyObject *face)
{
    Array *a = (Array *)view, *b = (Array *)face;
    return a->data == b->data && a->base == face && a->descr == b->descr && a->flags == b->flags && a->weakrefs == NULL
        && same_shape(a, b) && same(a->strides, b->strides, a->nd);
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
    PyMethodDef method; /* of what `ask` gives: here, since a call reads it */
    PyObject *input, *output; /* names, where there is one of each; else None */
    /* What each call asks of CPython: else found in tables of this module's, which are two pages of data and one of code. */
    int (*next)(PyObject *, Py_ssize_t *, PyObject **, PyObject **);
    PyObject *(*call)(PyObject *, PyObject *const *, size_t, PyObject *);
    PyObject *(*new_dict)(void);
    int (*set_item)(PyObject *, PyObject *, PyObject *);
    Clocked clock;
    PyTypeObject *dict, *tuple, *list;
    PyObject *none, *yes;
    PyCFunction pops, appends; /* what `take` and `give` come to, NULL where they are no functions of C's */
    PyObject *popped, *appended;
    PyTypeObject *lane_type, *feed_type, *slot_type, *array_type, *clock_type;
    unsigned short awaited, ended, feed, hands, turn, ahead, bound, dtype, own, seen, times, after, face, ready, shown, stale; /* where fields lie: FIELDS */
    unsigned short feeds, name, copies, faces;
    Py_ssize_t copied; /* bytes of an only input that is copied, 0 where it is bound */
    Py_ssize_t inputs; /* how many */
    PyObject *take, *give, *wake; /* of the free lanes */
    PyObject *reference;          /* does all of it, in Python */
    PyObject *failed;             /* (inputs, error, hands or None) -> an answer all the same, or raises */
} Shortest;

#define HELD(DO) DO(take) DO(give) DO(wake) DO(input) DO(output) DO(reference) DO(failed) DO(lane_type) DO(feed_type) DO(slot_type) DO(array_type) DO(clock_type)
#define FIELDS(DO) \
    DO(lane_type, awaited, "awaited") DO(lane_type, ended, "ended") DO(lane_type, feed, "feed") DO(lane_type, hands, "hands") \
    DO(lane_type, turn, "turn") DO(lane_type, ahead, "ahead") \
    DO(feed_type, bound, "bound") DO(feed_type, dtype, "_dtype") DO(feed_type, own, "_own") DO(feed_type, seen, "_seen") \
    DO(feed_type, times, "_times") DO(slot_type, after, "after") DO(slot_type, face, "face") DO(slot_type, ready, "ready") \
    DO(slot_type, shown, "shown") DO(slot_type, stale, "stale") \
    DO(lane_type, feeds, "feeds") DO(feed_type, name, "name") DO(feed_type, copies, "copied_bytes") DO(slot_type, faces, "faces")

#define AT(object, offset) (*(PyObject **)((char *)(object) + (offset)))

static PyObject *s_take, *s_another, *s_catch_up, *s_pass_on, *s_given, *s_view, *s_add_up, *s_zero; /* as long as the process lives */

static INLINE void put(PyObject *object, Py_ssize_t offset, PyObject *value) /* takes `value` over */
{
    PyObject *before = AT(object, offset);
    AT(object, offset) = value;
    Py_XDECREF(before); /* last: it may run anything */
}

static INLINE int succeeded(PyObject *result) /* takes `result` over, of which it matters only that there is one */
{
    Py_XDECREF(result);
    return result != NULL;
}

/* `Feed.take` itself. */
static SELDOM int take_at_length(PyObject *feed, PyObject *array)
{
    Py_INCREF(feed);
    Py_INCREF(array); /* the caller's dictionary may change meanwhile */
    int taken = succeeded(PyObject_CallMethodOneArg(feed, s_take, array));
    Py_DECREF(array);
    Py_DECREF(feed);
    return taken;
}

/* The same for the case that another array of the right kind is copied. */
static APART int take_input(Shortest *self, PyObject *feed, PyObject *array, Py_ssize_t copied)
{
    PyObject *own = AT(feed, self->own);
    if (copied > 0 && own != NULL && own == AT(feed, self->bound) && Py_TYPE(array) == self->array_type && array != AT(feed, self->seen)) {
        Array *from = (Array *)array, *to = (Array *)own;
        if (from->descr == AT(feed, self->dtype) && (from->flags & C_CONTIGUOUS) && same_shape(from, to)) {
            memmove(to->data, from->data, (size_t)copied);
            put(feed, self->times, Py_NewRef(s_zero));
            put(feed, self->seen, Py_NewRef(array)); /* last: who ends here may do anything */
            return 1;
        }
    }
    return take_at_length(feed, array);
}

static SELDOM PyObject *another_slot(Shortest *self, PyObject *lane)
{
    PyObject *hands = Py_NewRef(AT(lane, self->hands)), *slot = PyObject_CallMethodNoArgs(hands, s_another);
    Py_DECREF(hands);
    if (slot != NULL && Py_TYPE(slot) != self->slot_type) {
        PyErr_SetString(PyExc_TypeError, "`another` returns a slot");
        Py_CLEAR(slot);
    }
    return slot;
}

/* `Handing.next`: a request whose arrays nobody has. Its face alone is counted twice, by `Slot.face` and `Slot.faces`, and once more by the
   view that was shown last, which is forgotten here unless it can be shown again. Not where somebody is to be told of its end, who may do
   anything then: `another` puts it among those that end when the lane was given back. */
static INLINE PyObject *free_slot(Shortest *self, PyObject *lane)
{
    PyObject *slot = AT(lane, self->turn), *face = NULL;
    if (slot != NULL && Py_TYPE(slot) == self->slot_type)
        face = AT(slot, self->face);
    if (face != NULL && Py_TYPE(face) == self->array_type) {
        PyObject *shown = AT(slot, self->shown);
        Py_ssize_t alone = 2;
        if (shown != NULL && shown != self->none && Py_REFCNT(shown) == 1) {
            if (Py_TYPE(shown) == self->array_type && OFTEN(untouched(shown, face)))
                alone = 3;
            else if (Py_TYPE(shown) == self->array_type && ((Array *)shown)->weakrefs == NULL)
                put(slot, self->shown, Py_NewRef(self->none));
        }
        if (OFTEN(Py_REFCNT(face) <= alone))
            return Py_NewRef(slot);
    }
    return another_slot(self, lane);
}

static SELDOM PyObject *given_of(Shortest *self, PyObject *lane, PyObject *slot)
{
    PyObject *hands = AT(lane, self->hands), *answer = NULL;
    if (hands == NULL)
        PyErr_SetString(PyExc_TypeError, "a lane was closed that was not free");
    else {
        Py_INCREF(hands);
        answer = PyObject_CallMethodOneArg(hands, s_given, slot);
        Py_DECREF(hands);
    }
    return answer;
}

static SELDOM PyObject *new_view(Shortest *self, PyObject *slot, PyObject *face)
{
    PyObject *shown = PyObject_CallMethodNoArgs(face, s_view);
    if (shown != NULL)
        put(slot, self->shown, shown);
    return shown;
}

static INLINE PyObject *answer_of(Shortest *self, PyObject *lane, PyObject *slot)
{
    PyObject *face = AT(slot, self->face), *shown = AT(slot, self->shown);
    if (face == NULL || face == self->none)
        return given_of(self, lane, slot);
    if ((shown == NULL || shown == self->none || Py_REFCNT(shown) != 1) && (shown = new_view(self, slot, face)) == NULL)
        return NULL;
    PyObject *answer = self->new_dict();
    if (answer != NULL && self->set_item(answer, self->output, shown) < 0)
        Py_CLEAR(answer);
    return answer;
}

/* ---- Several outputs: the same by loops, and `shown` is a list of the views that were shown last ---- */

static INLINE PyObject *list_of(Shortest *self, PyObject *shown, Py_ssize_t count) /* borrowed; NULL where `shown` is none, without an exception */
{
    return shown != NULL && Py_TYPE(shown) == self->list && PyList_GET_SIZE(shown) == count ? shown : NULL;
}

static INLINE PyObject *face_of(PyObject *faces, Py_ssize_t at) /* borrowed, of pairs of a name and a face */
{
    return PyTuple_GET_ITEM(PyTuple_GET_ITEM(faces, at), 1);
}

/* `free_slot` for one of several faces. `alone` is what counts a face that nobody has, and nobody was shown. */
static INLINE int unused(Shortest *self, PyObject *list, Py_ssize_t at, PyObject *face, Py_ssize_t alone)
{
    PyObject *shown = list == NULL ? self->none : PyList_GET_ITEM(list, at);
    if (shown != self->none && Py_REFCNT(shown) == 1 && Py_TYPE(shown) == self->array_type) {
        if (OFTEN(untouched(shown, face)))
            alone++;
        else if (((Array *)shown)->weakrefs == NULL) {
            PyList_SET_ITEM(list, at, Py_NewRef(self->none));
            Py_DECREF(shown);
        }
    }
    return Py_REFCNT(face) <= alone;
}

static INLINE PyObject *free_slot_of_many(Shortest *self, PyObject *lane)
{
    PyObject *slot = AT(lane, self->turn), *faces = slot != NULL && Py_TYPE(slot) == self->slot_type ? AT(slot, self->faces) : NULL;
    Py_ssize_t count = faces != NULL && Py_TYPE(faces) == self->tuple ? PyTuple_GET_SIZE(faces) : 0, at = 0;
    PyObject *list = count == 0 ? NULL : list_of(self, AT(slot, self->shown), count);
    while (at < count && unused(self, list, at, face_of(faces, at), count == 1 ? 2 : 1)) /* an only one is `Slot.face`, too */
        at++;
    return OFTEN(count > 0 && at == count) ? Py_NewRef(slot) : another_slot(self, lane);
}

/* What a slot shows of its face number `at`: the view in `list`, or a new one. A borrowed reference. */
static INLINE PyObject *shown_of_many(Shortest *self, PyObject *list, Py_ssize_t at, PyObject *face)
{
    PyObject *shown = PyList_GET_ITEM(list, at), *before = shown;
    if (shown == self->none || Py_REFCNT(shown) != 1) {
        if ((shown = PyObject_CallMethodNoArgs(face, s_view)) == NULL)
            return NULL;
        PyList_SET_ITEM(list, at, shown);
        Py_DECREF(before);
    }
    return shown;
}

static SELDOM PyObject *new_list(Shortest *self, PyObject *slot, Py_ssize_t count) /* of what is shown: nothing */
{
    PyObject *list = PyList_New(count);
    for (Py_ssize_t at = 0; list != NULL && at < count; at++)
        PyList_SET_ITEM(list, at, Py_NewRef(self->none));
    if (list != NULL)
        put(slot, self->shown, Py_NewRef(list));
    return list;
}

static INLINE PyObject *answer_of_many(Shortest *self, PyObject *lane, PyObject *slot)
{
    PyObject *faces = AT(slot, self->faces);
    Py_ssize_t count = Py_TYPE(faces) == self->tuple ? PyTuple_GET_SIZE(faces) : 0;
    if (count == 0)
        return given_of(self, lane, slot);
    PyObject *list = Py_XNewRef(list_of(self, AT(slot, self->shown), count));
    if (list == NULL && (list = new_list(self, slot, count)) == NULL)
        return NULL;
    PyObject *answer = self->new_dict();
    for (Py_ssize_t at = 0; answer != NULL && at < count; at++) {
        PyObject *shown = shown_of_many(self, list, at, face_of(faces, at));
        if (shown == NULL || self->set_item(answer, PyTuple_GET_ITEM(PyTuple_GET_ITEM(faces, at), 0), shown) < 0)
            Py_CLEAR(answer);
    }
    Py_DECREF(list);
    return answer;
}
