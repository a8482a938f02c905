/* Spin locks for the few places where threads of the host meet. */

static void lock(volatile char *flag) {
  while (__atomic_test_and_set(flag, __ATOMIC_ACQUIRE)) {
  }
}

static void unlock(volatile char *flag) { __atomic_clear(flag, __ATOMIC_RELEASE); }
