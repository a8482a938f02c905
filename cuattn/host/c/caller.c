/* The thread of Python that makes a launch, and the launches that run.
 *
 * It waits here, inside one call, until every thread of the host has stopped. So whatever is raised in it, and whenever,
 * the call still holds what the launch reads and writes. Now and then it takes the interpreter's lock and enters an empty
 * function: there Python runs the handlers of signals and raises what other threads have sent. An exception stops the
 * launch, and is found by Python when the call returns. */
#include <pthread.h>
#include <time.h>

enum { LOOK_MILLISECONDS = 10 };

/* What the wait needs of the interpreter. Python fills this struct (library.py mirrors it). */
typedef struct {
  void *(*release)(void);                         /* PyEval_SaveThread */
  void (*acquire)(void *state);                   /* PyEval_RestoreThread */
  void *(*call)(void *function, void *arguments); /* PyObject_CallObject */
  void (*drop)(void *object);                     /* Py_DecRef */
  void *look;                                     /* a Python function that does nothing */
} Caller;

typedef struct Running {
  Launch *launch;
  u64 workers;            /* threads that have not stopped */
  pthread_mutex_t mutex;  /* of `workers` */
  pthread_cond_t stopped;
  struct Running *next;
} Running;

static pthread_mutex_t launches_mutex = PTHREAD_MUTEX_INITIALIZER;
static Running *launches;

static void launch_enters(Running *running) {
  pthread_condattr_t monotonic;
  pthread_condattr_init(&monotonic);
  pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
  pthread_cond_init(&running->stopped, &monotonic);
  pthread_condattr_destroy(&monotonic);
  pthread_mutex_init(&running->mutex, NULL);
  pthread_mutex_lock(&launches_mutex);
  running->next = launches;
  launches = running;
  pthread_mutex_unlock(&launches_mutex);
}

static void launch_leaves(Running *running) {
  pthread_mutex_lock(&launches_mutex);
  Running **link = &launches;
  while (*link != running) link = &(*link)->next;
  *link = running->next;
  pthread_mutex_unlock(&launches_mutex);
  pthread_cond_destroy(&running->stopped);
  pthread_mutex_destroy(&running->mutex);
}

static void worker_stops(Running *running) {
  pthread_mutex_lock(&running->mutex);
  if (!--running->workers) pthread_cond_signal(&running->stopped);
  pthread_mutex_unlock(&running->mutex);
}

/* Wait for the workers, at most until it is time to look. Returns whether all have stopped. */
static int wait_for_workers(Running *running, int forever) {
  struct timespec until;
  clock_gettime(CLOCK_MONOTONIC, &until);
  until.tv_nsec += LOOK_MILLISECONDS * 1000000L;
  until.tv_sec += until.tv_nsec / 1000000000L;
  until.tv_nsec %= 1000000000L;
  pthread_mutex_lock(&running->mutex);
  int late = 0;
  while (running->workers && !late)
    late = forever ? (pthread_cond_wait(&running->stopped, &running->mutex), 0)
                   : pthread_cond_timedwait(&running->stopped, &running->mutex, &until);
  int all = !running->workers;
  pthread_mutex_unlock(&running->mutex);
  return all;
}

/* The lock of the interpreter is not held. `state` is what `release` gave; returns what it gave last. */
static void *wait_for_launch(Running *running, const Caller *caller, void *state) {
  int raised = 0;
  while (!wait_for_workers(running, raised)) {
    caller->acquire(state);
    void *result = caller->call(caller->look, NULL);
    if (result) caller->drop(result);
    else raised = running->launch->stop = 1;
    state = caller->release();
  }
  return state;
}

/* The process ends: stop what other threads have started, and wait for it. */
static void stop_launches(void) {
  struct timespec pause = {.tv_nsec = 1000000};
  for (int any = 1; any;) {
    pthread_mutex_lock(&launches_mutex);
    any = launches != NULL;
    for (Running *running = launches; running; running = running->next) running->launch->stop = 1;
    pthread_mutex_unlock(&launches_mutex);
    if (any) nanosleep(&pause, NULL);
  }
}

/* In a child made by fork none of them run. */
static void forget_launches(void) {
  pthread_mutex_init(&launches_mutex, NULL);
  launches = NULL;
}
