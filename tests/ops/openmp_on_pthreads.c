/* What code that GCC compiled calls of OpenMP, on plain threads: ThreadSanitizer does not see how those of libgomp wait
 * for each other, and would call every one of their hand-overs a race. Linked into a program it takes libgomp's place.
 */
#include <pthread.h>
#include <stdlib.h>

struct member {
    void (*work)(void *);
    void *data;
    int number, size;
    pthread_t thread;
};

static _Thread_local int own_number = 0, team_size = 1;

static void *run(void *argument) {
    const struct member *member = argument;
    own_number = member->number;
    team_size = member->size;
    member->work(member->data);
    return NULL;
}

int omp_get_thread_num(void) { return own_number; }

int omp_get_num_threads(void) { return team_size; }

void GOMP_parallel(void (*work)(void *), void *data, unsigned size, unsigned flags) {
    (void)flags;
    struct member *team = calloc(size, sizeof *team);
    if (!team) abort();
    for (unsigned number = 0; number < size; number++) {
        team[number] = (struct member){.work = work, .data = data, .number = (int)number, .size = (int)size};
        if (number && pthread_create(&team[number].thread, NULL, run, &team[number])) abort();
    }
    run(&team[0]);
    for (unsigned number = 1; number < size; number++) pthread_join(team[number].thread, NULL);
    own_number = 0;
    team_size = 1;
    free(team);
}
