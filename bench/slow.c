/* A slow file system under any process: LD_PRELOAD this and what reads files under given paths waits as for a server.

   The unit is a request to the server: a read, in whole pages, costs one latency and its share of one bandwidth that
   all processes use together. A read that goes on where the last one of its open file ended fetches a window ahead that
   doubles up to a limit, as Linux does it; what was fetched last costs nothing more. Nothing else is cached, as where
   the data are larger than memory. A mapped file would be read behind our back: mapping is refused (ENODEV).

   Settings come by the environment and counts go to a small file that all processes map; see slow.py. */

#define _GNU_SOURCE
#undef _FORTIFY_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

struct shared {
    _Atomic uint64_t free_at, requests, bytes, refused_maps; /* ns of CLOCK_MONOTONIC; counts */
};

struct file {
    dev_t device;
    ino_t inode;
    int slow;
    off_t begin, end, next; /* what the client fetched last; where its last read ended */
    off_t window;           /* bytes that it fetches ahead, 0 where it does not read in order */
};

#define PAGE 4096

#define FILES 65536
static struct file files[FILES];
static atomic_flag busy = ATOMIC_FLAG_INIT;
static struct shared *shared;
static const char *paths;
static uint64_t latency, rate, jitter_permille, ahead;

static uint64_t number_of(const char *name)
{
    const char *value = getenv(name);
    return value ? strtoull(value, NULL, 10) : 0;
}

static void after_fork(void)
{
    atomic_flag_clear(&busy); /* whoever held it in the parent is not here */
}

__attribute__((constructor)) static void start(void)
{
    const char *state = getenv("SHARDCLIP_SLOW_STATE");
    paths = getenv("SHARDCLIP_SLOW_PATHS");
    if (!state || !paths)
        return;
    latency = number_of("SHARDCLIP_SLOW_LATENCY_NS");
    rate = number_of("SHARDCLIP_SLOW_BYTES_PER_S");
    jitter_permille = number_of("SHARDCLIP_SLOW_JITTER_PERMILLE");
    ahead = number_of("SHARDCLIP_SLOW_READAHEAD");
    int fd = open(state, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return;
    void *at = (void *)syscall(SYS_mmap, NULL, sizeof(struct shared), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (at != MAP_FAILED)
        shared = at;
    pthread_atfork(NULL, NULL, after_fork);
}

/* Whether an open file is one of the paths, or lies under one: they are separated by newlines. */
static int is_under_paths(int fd)
{
    char link[64], name[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, name, sizeof name - 1);
    if (length <= 0)
        return 0;
    name[length] = 0;
    for (const char *path = paths; *path;) {
        size_t size = strcspn(path, "\n");
        if (size && !strncmp(name, path, size) && (name[size] == 0 || name[size] == '/'))
            return 1;
        path += size + (path[size] == '\n');
    }
    return 0;
}

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + time.tv_nsec;
}

/* In [1 - jitter, 1 + jitter] times the latency, by the number of the request (splitmix64). */
static uint64_t latency_of(uint64_t request)
{
    uint64_t x = (request + 1) * 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    double unit = (double)((x ^ (x >> 31)) >> 11) / (double)(1ull << 53);
    return (uint64_t)(latency * (1 + jitter_permille / 1000.0 * (2 * unit - 1)));
}

static void wait_for(uint64_t bytes)
{
    uint64_t request = atomic_fetch_add(&shared->requests, 1), asked = now();
    atomic_fetch_add(&shared->bytes, bytes);
    uint64_t span = rate ? (uint64_t)(bytes * 1e9 / rate) : 0, from, begin;
    from = atomic_load(&shared->free_at);
    do
        begin = from > asked ? from : asked;
    while (span && !atomic_compare_exchange_weak(&shared->free_at, &from, begin + span));
    uint64_t until = (span ? begin + span : asked) + latency_of(request);
    struct timespec end = {until / 1000000000u, until % 1000000000u};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &end, NULL) == EINTR)
        ;
}

/* The entry of an open regular file, with the lock held; NULL, without it, where reading it costs nothing. */
static struct file *entry(int fd, struct stat *status)
{
    if (!shared || fd < 0 || fd >= FILES || fstat(fd, status) || !S_ISREG(status->st_mode))
        return NULL;
    while (atomic_flag_test_and_set(&busy))
        ;
    struct file *file = &files[fd];
    if (file->inode != status->st_ino || file->device != status->st_dev)
        *file = (struct file){status->st_dev, status->st_ino, is_under_paths(fd), 0, 0, -1, 0};
    if (file->slow)
        return file;
    atomic_flag_clear(&busy);
    return NULL;
}

static off_t least(off_t one, off_t other)
{
    return one < other ? one : other;
}

/* Wait as long as a read of `size` bytes at an offset (-1: at the file's own) takes. */
static void charge(int fd, off_t offset, size_t size)
{
    int saved = errno;
    struct stat status;
    struct file *file = entry(fd, &status);
    if (!file)
        return;
    if (offset < 0)
        offset = lseek(fd, 0, SEEK_CUR);
    off_t end = least(offset + (off_t)size, status.st_size), fetch = 0, until = 0;
    int inside = offset >= file->begin && offset < file->end, sequential = inside || offset == file->next;
    if (end > offset && (!inside || end > file->end)) { /* else: nothing there, or all of it at hand */
        fetch = inside ? file->end : offset / PAGE * PAGE;
        off_t first = 4 * (off_t)size > 4 * PAGE ? 4 * (off_t)size : 4 * PAGE;
        file->window = !sequential ? 0 : least(ahead, file->window ? 2 * file->window : first);
        until = (end + PAGE - 1) / PAGE * PAGE;
        until = least(until > fetch + file->window ? until : fetch + file->window, status.st_size);
        file->begin = offset / PAGE * PAGE, file->end = until;
    }
    file->next = end;
    atomic_flag_clear(&busy);
    if (until > fetch)
        wait_for(until - fetch);
    errno = saved;
}

static size_t total(const struct iovec *parts, int count)
{
    size_t size = 0;
    for (int part = 0; part < count; part++)
        size += parts[part].iov_len;
    return size;
}

ssize_t read(int fd, void *to, size_t size)
{
    charge(fd, -1, size);
    return syscall(SYS_read, fd, to, size);
}

ssize_t pread64(int fd, void *to, size_t size, off_t offset)
{
    charge(fd, offset, size);
    return syscall(SYS_pread64, fd, to, size, offset);
}

ssize_t readv(int fd, const struct iovec *parts, int count)
{
    charge(fd, -1, total(parts, count));
    return syscall(SYS_readv, fd, parts, count);
}

ssize_t preadv64(int fd, const struct iovec *parts, int count, off_t offset)
{
    charge(fd, offset, total(parts, count));
    return syscall(SYS_preadv, fd, parts, count, offset, 0);
}

ssize_t preadv64v2(int fd, const struct iovec *parts, int count, off_t offset, int flags)
{
    charge(fd, offset, total(parts, count));
    return syscall(SYS_preadv2, fd, parts, count, offset, 0, flags);
}

/* The same under the other names that glibc has for them. */
ssize_t pread(int fd, void *to, size_t size, off_t offset) { return pread64(fd, to, size, offset); }
ssize_t __read_chk(int fd, void *to, size_t size, size_t room) { return size > room ? (abort(), 0) : read(fd, to, size); }
ssize_t __pread_chk(int fd, void *to, size_t size, off_t at, size_t room)
{
    return size > room ? (abort(), 0) : pread64(fd, to, size, at);
}
ssize_t __pread64_chk(int fd, void *to, size_t size, off_t at, size_t room) { return __pread_chk(fd, to, size, at, room); }
ssize_t preadv(int fd, const struct iovec *parts, int count, off_t at) { return preadv64(fd, parts, count, at); }
ssize_t preadv2(int fd, const struct iovec *parts, int count, off_t at, int flags)
{
    return preadv64v2(fd, parts, count, at, flags);
}

/* glibc reads for its streams without calling `read`: what their buffer does not hold is a read of at least 4 KiB. */
static void charge_stream(FILE *stream, size_t size)
{
    size_t held = stream->_IO_read_end - stream->_IO_read_ptr;
    if (size > held)
        charge(fileno(stream), -1, size - held > 4096 ? size - held : 4096);
}

size_t fread(void *to, size_t size, size_t count, FILE *stream)
{
    static size_t (*original)(void *, size_t, size_t, FILE *);
    if (!original)
        original = (size_t(*)(void *, size_t, size_t, FILE *))dlsym(RTLD_NEXT, "fread");
    charge_stream(stream, size * count);
    return original(to, size, count, stream);
}

#undef fread_unlocked
size_t fread_unlocked(void *to, size_t size, size_t count, FILE *stream) { return fread(to, size, count, stream); }

void *mmap64(void *at, size_t size, int protection, int flags, int fd, off_t offset)
{
    struct stat status;
    if (!(flags & MAP_ANONYMOUS) && entry(fd, &status)) {
        atomic_flag_clear(&busy);
        atomic_fetch_add(&shared->refused_maps, 1);
        errno = ENODEV;
        return MAP_FAILED;
    }
    return (void *)syscall(SYS_mmap, at, size, protection, flags, fd, offset);
}

void *mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset)
{
    return mmap64(at, size, protection, flags, fd, offset);
}
