/* Which of the compiled instruction sets this processor can run. Compiled for the plainest one. */
#include <stddef.h>

#define PUBLIC __attribute__((visibility("default")))

typedef struct {
  const char *isa;
  int (*init)(void);
  const char *(*op_name)(int);
  size_t (*launch_size)(void);
  void (*run)(void *, const void *);
  void (*stop)(void);
} Variant;

#define DECLARE(isa)                                                          \
  int cuattn_init_##isa(void);                                                \
  const char *cuattn_op_name_##isa(int);                                      \
  size_t cuattn_launch_size_##isa(void);                                      \
  void cuattn_run_##isa(void *, const void *);                                \
  void cuattn_stop_##isa(void);
#define VARIANT(isa) {#isa, cuattn_init_##isa, cuattn_op_name_##isa, cuattn_launch_size_##isa, cuattn_run_##isa, cuattn_stop_##isa}

DECLARE(base)
#ifdef HAVE_v3
DECLARE(v3)
#endif
#ifdef HAVE_v4
DECLARE(v4)
#endif

/* Best first. */
static const Variant variants[] = {
#ifdef HAVE_v4
  VARIANT(v4),
#endif
#ifdef HAVE_v3
  VARIANT(v3),
#endif
  VARIANT(base),
};
enum { NUM_VARIANTS = sizeof variants / sizeof variants[0] };

static int processor_has(const char *isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa[1] == '4')
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa[1] == '3')
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma");
#endif
  return isa[0] == 'b';
}

/* Variant number `index` among those that run here, best first; its name, or NULL. */
PUBLIC const char *cuattn_isa(int index) {
  for (int i = 0; i < NUM_VARIANTS; i++)
    if (processor_has(variants[i].isa) && index-- == 0) return variants[i].isa;
  return NULL;
}

static const Variant *find(const char *isa) {
  for (int i = 0; i < NUM_VARIANTS; i++) {
    const char *a = isa, *b = variants[i].isa;
    while (*a && *a == *b) a++, b++;
    if (*a == *b) return &variants[i];
  }
  return NULL;
}

PUBLIC int cuattn_init(const char *isa) { return find(isa)->init(); }
PUBLIC const char *cuattn_op_name(const char *isa, int index) { return find(isa)->op_name(index); }
PUBLIC size_t cuattn_launch_size(const char *isa) { return find(isa)->launch_size(); }
PUBLIC void *cuattn_runner(const char *isa) { return (void *)find(isa)->run; }
PUBLIC void *cuattn_stopper(const char *isa) { return (void *)find(isa)->stop; }
