/* The table of handlers, and what Python calls. */

#define CONCAT_(a, b) a##b
#define CONCAT(a, b) CONCAT_(a, b)
#define EXPORT(name) CONCAT(name##_, ISA)

#define OP_FILES_CORE(X) \
  X(control) X(cluster) X(mbarrier) X(setmaxnreg) X(load_store) X(atomic) X(collective) X(matrix) X(mma) X(async) X(bulk) X(wgmma)

enum { MAX_OPS = 2048 };
static Handler handler_table[MAX_OPS];
static const char *handler_names[MAX_OPS];
static int num_handlers;

static void add_ops(const OpEntry *entry) {
  for (; entry->name; entry++) {
    handler_names[num_handlers] = entry->name;
    handler_table[num_handlers++] = entry->run;
  }
}

/* Fill the table; returns the number of handlers. */
int EXPORT(cuattn_init)(void) {
  if (!num_handlers) {
#define ADD_OPS(file) add_ops(ops_##file);
    OP_FILES_CORE(ADD_OPS)
    OP_FILES_ALU(ADD_OPS)
#undef ADD_OPS
    handlers = handler_table;
    pthread_atfork(NULL, NULL, forget_launches);
  }
  return num_handlers;
}

const char *EXPORT(cuattn_op_name)(int index) { return handler_names[index]; }

size_t EXPORT(cuattn_launch_size)(void) { return sizeof(Launch); }

void EXPORT(cuattn_run)(Launch *launch, const Caller *caller) { run_launch(launch, caller); }

void EXPORT(cuattn_stop)(void) { stop_launches(); }
