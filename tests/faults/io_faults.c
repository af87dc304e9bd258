// Faults in system calls, and a log of them: loaded by LD_PRELOAD, inactive until io_faults_arm is called.
//
// Calls on paths below one folder are counted by kind; the n-th of a kind is made to kill the process before, within
// or after it, to fail with an error, or to write and read less than asked for. With a log, each call that succeeded
// is appended to it with its data, in the order of its effect: tests/faults/disk.py rebuilds the folder from it.
//
// Descriptors are resolved by /proc/self/fd, so that files opened by any way (fopen, C++ streams) are known. Calls that
// libc makes internally, such as fwrite's, are not seen; Python and PyTorch write by write().
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN, READ, WRITE, FSYNC, RENAME, UNLINK, CLOSE, MKDIR, TRUNCATE, KINDS };  // as KINDS in library.py
enum { NOTHING, KILL_BEFORE, KILL_WITHIN, KILL_AFTER, FAIL_ONCE, FAIL_EVER, SHORT };  // as ACTIONS there

static int armed, kind_of_fault, action, error_number, log_descriptor = -1;
static long nth, own_counts[KINDS], *counted = own_counts;
static char folder[PATH_MAX];
static size_t folder_length;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;


static void die(void) {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

// Counts calls below `path` from now on. The `number`-th of `kind` suffers `what`. `counts` is a file of KINDS longs, in
// which the counts can be read even after a kill. `log` may be empty. Returns 0, or -1 when a file can't be opened.
int io_faults_arm(const char *path, int kind, long number, int what, int error, const char *counts, const char *log) {
  if (!realpath(path, folder)) return -1;
  int descriptor = open(counts, O_RDWR | O_CLOEXEC);
  counted = mmap(NULL, sizeof own_counts, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  if (descriptor < 0 || counted == MAP_FAILED) return -1;
  close(descriptor);
  folder_length = strlen(folder);
  kind_of_fault = kind, nth = number, action = what, error_number = error;
  if (*log) {
    log_descriptor = open(log, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (log_descriptor < 0) return -1;
    log_descriptor = fcntl(log_descriptor, F_DUPFD_CLOEXEC, 900);  // away from the numbers that programs reuse
  }
  armed = 1;
  return 0;
}

static int below(const char *path) {
  return strncmp(path, folder, folder_length) == 0 && (path[folder_length] == '/' || path[folder_length] == 0);
}

// The absolute path that a call means, in `out`; whether it lies below the folder.
static int resolve(int directory, const char *path, char *out) {
  char base[PATH_MAX] = "", link[64];
  if (!armed || !path) return 0;
  if (path[0] != '/') {
    if (directory == AT_FDCWD) {
      if (syscall(SYS_getcwd, base, sizeof base) < 0) return 0;
    } else {
      snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
      ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, base, sizeof base - 1);
      if (length < 0) return 0;
      base[length] = 0;
    }
    if (snprintf(out, PATH_MAX, "%s/%s", base, path) >= PATH_MAX) return 0;
  } else if (snprintf(out, PATH_MAX, "%s", path) >= PATH_MAX) {
    return 0;
  }
  return below(out);
}

static int resolve_descriptor(int descriptor, char *out) {
  char link[64];
  if (!armed || descriptor < 0) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, out, PATH_MAX - 1);
  if (length < 0) return 0;
  out[length] = 0;
  return below(out);
}

// What this call suffers.
static int fault(int kind) {
  long number = ++counted[kind];
  if (kind != kind_of_fault || action == NOTHING) return NOTHING;
  return number == nth || (number > nth && action == FAIL_EVER) ? action : NOTHING;
}

static void put(const void *data, size_t size) {
  for (const char *p = data; size;) {
    ssize_t written = syscall(SYS_write, log_descriptor, p, size);
    if (written < 0) die();  // a log with a gap would rebuild another disk
    p += written, size -= written;
  }
}

static void record(int kind, const char *path, const char *other, uint64_t inode, int64_t offset, const void *data,
                   uint64_t size) {
  struct { uint32_t kind, path, other, unused; uint64_t inode, size; int64_t offset; } header = {
      kind, strlen(path) - folder_length, other ? strlen(other) - folder_length : 0, 0, inode, size, offset};
  if (log_descriptor < 0) return;
  put(&header, sizeof header);
  put(path + folder_length, header.path);
  if (other) put(other + folder_length, header.other);
  put(data, size);
}

static uint64_t inode_of(int descriptor) {
  struct stat s;
  return fstat(descriptor, &s) == 0 ? s.st_ino : 0;
}

static uint64_t inode_at(const char *path) {
  struct stat s;
  return lstat(path, &s) == 0 ? s.st_ino : 0;
}

// A call between its two moments: `failed` when it must not be made, `do_it` makes it, `logged` logs what it did.
#define GUARDED(kind, failed, do_it, logged)                     \
  pthread_mutex_lock(&lock);                                     \
  int suffers = fault(kind);                                     \
  if (suffers == KILL_BEFORE) die();                             \
  if (suffers == FAIL_ONCE || suffers == FAIL_EVER) {            \
    pthread_mutex_unlock(&lock);                                 \
    errno = error_number;                                        \
    return failed;                                               \
  }                                                              \
  do_it;                                                         \
  int saved_errno = errno;                                       \
  logged;                                                        \
  if (suffers == KILL_AFTER || suffers == KILL_WITHIN) die();    \
  pthread_mutex_unlock(&lock);                                   \
  errno = saved_errno;

// ---- opening --------------------------------------------------------------------------------------------------------

static int guarded_open(int directory, const char *path, int flags, mode_t mode) {
  char full[PATH_MAX];
  if (!resolve(directory, path, full)) return syscall(SYS_openat, directory, path, flags, mode);
  int existed = access(full, F_OK) == 0, result;
  GUARDED(OPEN, -1, result = syscall(SYS_openat, directory, path, flags, mode), {
    if (result >= 0 && (flags & O_CREAT) && !existed) record(OPEN, full, NULL, inode_of(result), 0, NULL, 0);
    if (result >= 0 && (flags & O_TRUNC) && existed) record(TRUNCATE, full, NULL, inode_of(result), 0, NULL, 0);
  })
  return result;
}

#define OPEN_BODY(directory)                                     \
  mode_t mode = 0;                                               \
  if (flags & (O_CREAT | O_TMPFILE)) {                           \
    va_list arguments;                                           \
    va_start(arguments, flags);                                  \
    mode = va_arg(arguments, mode_t);                            \
    va_end(arguments);                                           \
  }                                                              \
  return guarded_open(directory, path, flags, mode);

int open(const char *path, int flags, ...) { OPEN_BODY(AT_FDCWD) }
int open64(const char *path, int flags, ...) { OPEN_BODY(AT_FDCWD) }
int openat(int directory, const char *path, int flags, ...) { OPEN_BODY(directory) }
int openat64(int directory, const char *path, int flags, ...) { OPEN_BODY(directory) }

int close(int descriptor) {
  char path[PATH_MAX];
  if (!resolve_descriptor(descriptor, path)) return syscall(SYS_close, descriptor);
  int result;
  pthread_mutex_lock(&lock);
  int suffers = fault(CLOSE);
  if (suffers == KILL_BEFORE) die();
  result = syscall(SYS_close, descriptor);  // Linux releases the descriptor even if it reports an error
  if (suffers == KILL_AFTER || suffers == KILL_WITHIN) die();
  pthread_mutex_unlock(&lock);
  if (suffers == FAIL_ONCE || suffers == FAIL_EVER) {
    errno = error_number;
    return -1;
  }
  return result;
}

// ---- reading and writing --------------------------------------------------------------------------------------------

ssize_t read(int descriptor, void *data, size_t size) {
  char path[PATH_MAX];
  if (!resolve_descriptor(descriptor, path)) return syscall(SYS_read, descriptor, data, size);
  ssize_t result;
  GUARDED(READ, -1, result = syscall(SYS_read, descriptor, data, suffers == SHORT && size > 1 ? size / 2 : size), )
  return result;
}

static ssize_t guarded_write(int descriptor, const char *path, const void *data, size_t size, int64_t at) {
  ssize_t result;
  GUARDED(WRITE, -1, {
    size_t asked = (suffers == SHORT || suffers == KILL_WITHIN) && size > 1 ? size / 2 : size;
    result = at < 0 ? syscall(SYS_write, descriptor, data, asked) : syscall(SYS_pwrite64, descriptor, data, asked, at);
  }, if (result > 0) {
    int64_t offset = at < 0 ? lseek(descriptor, 0, SEEK_CUR) - result : at;
    record(WRITE, path, NULL, inode_of(descriptor), offset, data, result);
  })
  return result;
}

ssize_t write(int descriptor, const void *data, size_t size) {
  char path[PATH_MAX];
  if (!resolve_descriptor(descriptor, path)) return syscall(SYS_write, descriptor, data, size);
  return guarded_write(descriptor, path, data, size, -1);
}

ssize_t pwrite(int descriptor, const void *data, size_t size, off_t offset) {
  char path[PATH_MAX];
  if (!resolve_descriptor(descriptor, path)) return syscall(SYS_pwrite64, descriptor, data, size, offset);
  return guarded_write(descriptor, path, data, size, offset);
}

ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t offset) {
  return pwrite(descriptor, data, size, offset);
}

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
  char path[PATH_MAX];
  if (!resolve_descriptor(descriptor, path)) return syscall(SYS_writev, descriptor, parts, count);
  ssize_t total = 0;  // part by part: each is a write of its own
  for (int i = 0; i < count; i++) {
    ssize_t result = guarded_write(descriptor, path, parts[i].iov_base, parts[i].iov_len, -1);
    if (result < 0) return total ? total : result;
    total += result;
    if ((size_t)result < parts[i].iov_len) break;
  }
  return total;
}

// Copies by the kernel are refused where they are seen: programs fall back to read and write, which are.
ssize_t sendfile(int out, int in, off_t *offset, size_t size) {
  char path[PATH_MAX];
  if (!resolve_descriptor(out, path)) return syscall(SYS_sendfile, out, in, offset, size);
  errno = EINVAL;
  return -1;
}

ssize_t sendfile64(int out, int in, off64_t *offset, size_t size) { return sendfile(out, in, offset, size); }

ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
  char path[PATH_MAX];
  if (!resolve_descriptor(out, path)) return syscall(SYS_copy_file_range, in, from, out, to, size, flags);
  errno = EXDEV;
  return -1;
}

static int guarded_sync(int call, int descriptor) {
  char path[PATH_MAX];
  if (!resolve_descriptor(descriptor, path)) return syscall(call, descriptor);
  int result;
  GUARDED(FSYNC, -1, result = syscall(call, descriptor),
          if (result == 0) record(FSYNC, path, NULL, inode_of(descriptor), 0, NULL, 0))
  return result;
}

int fsync(int descriptor) { return guarded_sync(SYS_fsync, descriptor); }
int fdatasync(int descriptor) { return guarded_sync(SYS_fdatasync, descriptor); }

int ftruncate(int descriptor, off_t length) {
  char path[PATH_MAX];
  if (!resolve_descriptor(descriptor, path)) return syscall(SYS_ftruncate, descriptor, length);
  int result;
  GUARDED(TRUNCATE, -1, result = syscall(SYS_ftruncate, descriptor, length),
          if (result == 0) record(TRUNCATE, path, NULL, inode_of(descriptor), length, NULL, 0))
  return result;
}

int ftruncate64(int descriptor, off64_t length) { return ftruncate(descriptor, length); }

int truncate(const char *path, off_t length) {
  char full[PATH_MAX];
  if (!resolve(AT_FDCWD, path, full)) return syscall(SYS_truncate, path, length);
  int result;
  GUARDED(TRUNCATE, -1, result = syscall(SYS_truncate, path, length),
          if (result == 0) record(TRUNCATE, full, NULL, inode_at(full), length, NULL, 0))
  return result;
}

int truncate64(const char *path, off64_t length) { return truncate(path, length); }

// ---- names ----------------------------------------------------------------------------------------------------------

static int guarded_rename(int from, const char *old, int to, const char *new, unsigned flags) {
  char source[PATH_MAX], target[PATH_MAX];
  if (!resolve(from, old, source) | !resolve(to, new, target))
    return syscall(SYS_renameat2, from, old, to, new, flags);
  int result;
  GUARDED(RENAME, -1, result = syscall(SYS_renameat2, from, old, to, new, flags),
          if (result == 0) record(RENAME, source, target, inode_at(target), 0, NULL, 0))
  return result;
}

int rename(const char *old, const char *new) { return guarded_rename(AT_FDCWD, old, AT_FDCWD, new, 0); }
int renameat(int from, const char *old, int to, const char *new) { return guarded_rename(from, old, to, new, 0); }
int renameat2(int from, const char *old, int to, const char *new, unsigned flags) {
  return guarded_rename(from, old, to, new, flags);
}

int unlinkat(int directory, const char *path, int flags) {
  char full[PATH_MAX];
  if (!resolve(directory, path, full)) return syscall(SYS_unlinkat, directory, path, flags);
  uint64_t inode = inode_at(full);
  int result;
  GUARDED(UNLINK, -1, result = syscall(SYS_unlinkat, directory, path, flags),
          if (result == 0) record(UNLINK, full, NULL, inode, 0, NULL, 0))
  return result;
}

int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
int remove(const char *path) {
  struct stat s;
  return unlinkat(AT_FDCWD, path, lstat(path, &s) == 0 && S_ISDIR(s.st_mode) ? AT_REMOVEDIR : 0);
}

int mkdirat(int directory, const char *path, mode_t mode) {
  char full[PATH_MAX];
  if (!resolve(directory, path, full)) return syscall(SYS_mkdirat, directory, path, mode);
  int result;
  GUARDED(MKDIR, -1, result = syscall(SYS_mkdirat, directory, path, mode),
          if (result == 0) record(MKDIR, full, NULL, inode_at(full), 0, NULL, 0))
  return result;
}

int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }
