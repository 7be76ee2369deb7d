/* The floor: the least that any program has to do, as plain C, compiled when the bench runs.
 *
 * scatter and gather walk the very table that hotgraft walks, with a prefetch `LOOKAHEAD` entries in
 * front; read streams through freshly mapped files; copy is memcpy; evict empties the caches.
 * Pieces of a job go to whichever thread asks first. Helper threads are started beforehand; between
 * jobs they spin for a while (`floor_spin`), so that the next job finds them awake, then sleep.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { LOOKAHEAD = 32 };

typedef struct {
    uint64_t base; /* address of the cell at position 0 */
    int64_t first; /* the segment's first entry in the table */
    int64_t count;
} Segment;

typedef void (*Piece)(void *job, int64_t begin, int64_t end);

/* ---- threads ------------------------------------------------------------------------------- */

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t posted = PTHREAD_COND_INITIALIZER;
static atomic_long generation;
static atomic_long spins;
static int sleepers, wanted; /* under the mutex: helpers asleep, helpers that may still join */
static atomic_int inside;    /* helpers at work */

static Piece piece;
static void *job;
static int64_t total, grain;
static atomic_llong next;

static void work(void) {
    for (;;) {
        int64_t begin = atomic_fetch_add_explicit(&next, grain, memory_order_relaxed);
        if (begin >= total) return;
        piece(job, begin, begin + grain < total ? begin + grain : total);
    }
}

static void *serve(void *unused) {
    long seen = 0;
    for (;;) {
        long left = atomic_load_explicit(&spins, memory_order_relaxed);
        while (left-- > 0 && atomic_load_explicit(&generation, memory_order_acquire) == seen) {
            __builtin_ia32_pause();
        }
        pthread_mutex_lock(&mutex);
        while (atomic_load(&generation) == seen) {
            ++sleepers;
            pthread_cond_wait(&posted, &mutex);
            --sleepers;
        }
        seen = atomic_load(&generation);
        int join = wanted > 0;
        if (join) {
            --wanted;
            atomic_fetch_add(&inside, 1);
        }
        pthread_mutex_unlock(&mutex);
        if (join) {
            work();
            atomic_fetch_sub(&inside, 1);
        }
    }
    return unused;
}

int floor_start(int helpers) {
    for (int i = 0; i < helpers; ++i) {
        pthread_t thread;
        if (pthread_create(&thread, 0, serve, 0) != 0) return -1;
        pthread_detach(thread);
    }
    return 0;
}

/* How many turns a helper spins before it sleeps: 0 makes it sleep at once. */
void floor_spin(int64_t turns) { atomic_store(&spins, turns); }

static void run(Piece each, void *with, int64_t n, int64_t at_a_time, int threads) {
    piece = each;
    job = with;
    total = n;
    grain = at_a_time;
    atomic_store(&next, 0);
    if (threads > 1 && n > at_a_time) {
        pthread_mutex_lock(&mutex);
        wanted = threads - 1;
        atomic_fetch_add(&generation, 1);
        if (sleepers) pthread_cond_broadcast(&posted);
        pthread_mutex_unlock(&mutex);
        work();
        pthread_mutex_lock(&mutex); /* who has not joined by now has nothing left to do */
        wanted = 0;
        pthread_mutex_unlock(&mutex);
        while (atomic_load(&inside)) __builtin_ia32_pause();
    } else {
        work();
    }
}

/* ---- moves over the table, items of two bytes ----------------------------------------------- */

typedef struct {
    const Segment *segments;
    int64_t n_segments;
    const int32_t *positions;
    uint16_t *values;
} Move;

static const Segment *segment_of(const Move *move, int64_t entry) {
    int64_t low = 0, high = move->n_segments - 1;
    while (low < high) {
        int64_t middle = (low + high + 1) / 2;
        if (move->segments[middle].first <= entry) low = middle;
        else high = middle - 1;
    }
    return move->segments + low;
}

/* `here` is at the entry being moved, `ahead` LOOKAHEAD entries in front of it. */
#define WALK(WRITES, ...)                                                                       \
    const Move *move = with;                                                                    \
    const int32_t *positions = move->positions;                                                 \
    const Segment *here = segment_of(move, begin), *ahead = here;                               \
    int64_t front = begin;                                                                      \
    for (int64_t entry = begin - LOOKAHEAD; entry < end; ++entry) {                             \
        if (front < end) {                                                                      \
            if (front == ahead->first + ahead->count) ++ahead;                                  \
            __builtin_prefetch((uint16_t *)ahead->base + positions[front++], WRITES, 3);        \
        }                                                                                       \
        if (entry < begin) continue;                                                            \
        if (entry == here->first + here->count) ++here;                                         \
        uint16_t *cell = (uint16_t *)here->base + positions[entry];                             \
        __VA_ARGS__;                                                                            \
    }

static void scatter(void *with, int64_t begin, int64_t end) {
    WALK(1, *cell = move->values[entry])
}

static void gather(void *with, int64_t begin, int64_t end) {
    WALK(0, move->values[entry] = *cell)
}

void floor_scatter(const Segment *segments, int64_t n_segments, const int32_t *positions,
                   uint16_t *values, int64_t n, int threads) {
    Move move = {segments, n_segments, positions, values};
    run(scatter, &move, n, threads > 1 ? 4096 : n, threads);
}

void floor_gather(const Segment *segments, int64_t n_segments, const int32_t *positions,
                  uint16_t *values, int64_t n, int threads) {
    Move move = {segments, n_segments, positions, values};
    run(gather, &move, n, threads > 1 ? 4096 : n, threads);
}

/* ---- streams -------------------------------------------------------------------------------- */

enum { STREAM = 1 << 20 };

typedef struct {
    char *to;
    const char *from;
    atomic_ullong sum;
} Stream;

static void copy(void *with, int64_t begin, int64_t end) {
    Stream *stream = with;
    memcpy(stream->to + begin, stream->from + begin, end - begin);
}

void floor_copy(void *to, const void *from, int64_t bytes, int threads) {
    Stream stream = {to, from, 0};
    run(copy, &stream, bytes, STREAM, threads);
}

static void sum_words(void *with, int64_t begin, int64_t end) {
    Stream *stream = with;
    uint64_t sum = 0;
    const uint64_t *words = (const uint64_t *)(stream->from + begin);
    for (int64_t i = 0; i < (end - begin) / 8; ++i) sum += words[i];
    atomic_fetch_add(&stream->sum, sum);
}

/* Maps a file anew, adds up its words, and unmaps it; returns its size, or -1. */
int64_t floor_read(const char *path, uint64_t *sum, int threads) {
    struct stat status;
    int file = open(path, O_RDONLY);
    if (file < 0 || fstat(file, &status) != 0) return -1;
    void *bytes = mmap(0, status.st_size, PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (bytes == MAP_FAILED) return -1;
    Stream stream = {0, bytes, 0};
    run(sum_words, &stream, status.st_size, STREAM, threads);
    *sum = atomic_load(&stream.sum);
    munmap(bytes, status.st_size);
    return status.st_size;
}

static void touch(void *with, int64_t begin, int64_t end) {
    Stream *stream = with;
    for (int64_t i = begin; i < end; i += 64) ++stream->to[i];
}

/* Reads and writes every line of a buffer that is larger than the caches. */
void floor_evict(void *buffer, int64_t bytes, int threads) {
    Stream stream = {buffer, 0, 0};
    run(touch, &stream, bytes, STREAM, threads);
}
