/* As much of libcuda.so.1 as CUDA IPC needs, over memory of the host: an allocation is a memfd, its handle says where
 * another process finds it. Whoever frees what somebody has mapped is aborted: the real driver calls that undefined.
 *
 * FAKE_CUDA_UUID: 16 characters; FAKE_CUDA_MEMORY: bytes of the device; FAKE_CUDA_ONE_PROCESS: a handle may be opened
 * where it was made, which the real driver refuses. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201, MAX = 256 };

typedef struct {
    char data[64];
} Handle;

static struct Memory {
    char *start;
    size_t size;
    int fd;
    int opened;
} memory[MAX];

static size_t total(int opened)
{
    size_t sum = 0;
    for (int i = 0; i < MAX; i++)
        sum += memory[i].opened == opened ? memory[i].size : 0;
    return sum;
}

size_t fake_allocated(void) { return total(0); }
size_t fake_mapped(void) { return total(1); }

static struct Memory *find(uint64_t pointer, int opened)
{
    for (int i = 0; i < MAX; i++)
        if (memory[i].size && memory[i].opened == opened && memory[i].start == (char *)pointer)
            return &memory[i];
    return NULL;
}

static int add(int fd, size_t size, int opened, uint64_t *pointer)
{
    for (int i = 0; i < MAX; i++) {
        if (memory[i].size)
            continue;
        char *start = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (start == MAP_FAILED)
            return OUT_OF_MEMORY;
        memory[i] = (struct Memory){start, size, fd, opened};
        *pointer = (uint64_t)start;
        return 0;
    }
    return OUT_OF_MEMORY;
}

static void removed(struct Memory *at)
{
    munmap(at->start, at->size);
    close(at->fd);
    *at = (struct Memory){0};
}

int cuMemAlloc_v2(uint64_t *pointer, size_t size)
{
    const char *limit = getenv("FAKE_CUDA_MEMORY");
    if (!size || size % (2 << 20))
        return INVALID_VALUE; /* it would share a block */
    if (limit && total(0) + size > strtoull(limit, NULL, 10))
        return OUT_OF_MEMORY;
    int fd = memfd_create("fake-cuda", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, size))
        return OUT_OF_MEMORY;
    return add(fd, size, 0, pointer);
}

int cuMemFree_v2(uint64_t pointer)
{
    struct Memory *at = find(pointer, 0);
    if (!at)
        return INVALID_VALUE;
    for (int tries = 0; flock(at->fd, LOCK_EX | LOCK_NB); tries++) { /* one that was killed may still be closing */
        if (tries == 1000) {
            fprintf(stderr, "fake libcuda: freed what another process has mapped\n");
            abort();
        }
        usleep(1000);
    }
    removed(at);
    return 0;
}

int cuIpcGetMemHandle(Handle *handle, uint64_t pointer)
{
    struct Memory *at = find(pointer, 0);
    if (!at || getenv("FAKE_CUDA_NO_IPC"))
        return INVALID_VALUE;
    memset(handle, 0, sizeof *handle);
    snprintf(handle->data, sizeof handle->data, "%d %d", getpid(), at->fd);
    return 0;
}

int cuIpcOpenMemHandle_v2(uint64_t *pointer, Handle handle, unsigned flags)
{
    int pid, number;
    char path[64];
    struct stat found;
    if (flags != 1 || sscanf(handle.data, "%d %d", &pid, &number) != 2)
        return INVALID_VALUE;
    if (pid == getpid() && !getenv("FAKE_CUDA_ONE_PROCESS"))
        return INVALID_CONTEXT;
    snprintf(path, sizeof path, "/proc/%d/fd/%d", pid, number);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return INVALID_VALUE;
    if (flock(fd, LOCK_SH | LOCK_NB) || fstat(fd, &found))
        return INVALID_VALUE;
    return add(fd, found.st_size, 1, pointer);
}

int cuIpcCloseMemHandle(uint64_t pointer)
{
    struct Memory *at = find(pointer, 1);
    if (!at)
        return INVALID_VALUE;
    removed(at);
    return 0;
}

int cuCtxGetDevice(int *device)
{
    *device = 3;
    return 0;
}

int cuDeviceGetUuid_v2(char *uuid, int device)
{
    const char *name = getenv("FAKE_CUDA_UUID");
    if (device != 3)
        return INVALID_VALUE;
    memcpy(uuid, name ? name : "a fake of a GPU.", 16);
    return 0;
}

int cuGetErrorName(int code, const char **name)
{
    *name = code == INVALID_VALUE     ? "CUDA_ERROR_INVALID_VALUE"
            : code == OUT_OF_MEMORY   ? "CUDA_ERROR_OUT_OF_MEMORY"
            : code == INVALID_CONTEXT ? "CUDA_ERROR_INVALID_CONTEXT"
                                      : NULL;
    return *name ? 0 : INVALID_VALUE;
}
