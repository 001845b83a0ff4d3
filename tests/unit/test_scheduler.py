"""Which workload of a model gets the next batch."""

from attntune.search.scheduler import TaskScheduler


def spend(scheduler: TaskScheduler, batches: int, cost) -> list[str]:
    """Give out batches of 4; ``cost(name, nth batch)`` is the best of each."""
    given: list[str] = []
    for _ in range(batches):
        name = scheduler.next()
        if name is None:
            break
        secs = cost(name, given.count(name))
        scheduler.update(name, [secs] * 4)
        given.append(name)
    return given


def improving(start: dict[str, float], rate: dict[str, float]):
    return lambda name, n: start[name] * rate[name] ** n


def test_every_task_gets_its_turn_first_in_order():
    scheduler = TaskScheduler()
    for name in ("c", "a", "b"):
        scheduler.add(name, size=100)
    assert spend(scheduler, 3, lambda name, n: 1.0) == ["c", "a", "b"]


def test_the_heavier_task_gets_more():
    scheduler = TaskScheduler()
    scheduler.add("light", calls=1, size=1000)
    scheduler.add("heavy", calls=12, size=1000)
    given = spend(scheduler, 20, improving({"light": 1.0, "heavy": 1.0}, {"light": 0.97, "heavy": 0.97}))
    assert given.count("heavy") > 2 * given.count("light")
    assert given.count("light") >= 1


def test_time_counts_like_calls():
    scheduler = TaskScheduler()
    scheduler.add("short", size=1000)
    scheduler.add("long", size=1000)
    given = spend(scheduler, 20, improving({"short": 0.001, "long": 0.01}, {"short": 0.97, "long": 0.97}))
    assert given.count("long") > given.count("short")


def test_every_group_counts_alike():
    scheduler = TaskScheduler()
    for name, group, calls in (("a", "1x128", 1), ("b", "1x128", 1), ("c", "8x512", 30), ("d", "8x512", 30)):
        scheduler.add(name, group=group, calls=calls, size=1000)
    given = spend(scheduler, 20, lambda name, n: 0.9**n)
    assert {given.count(name) for name in "abcd"} == {5}
    assert sum(scheduler.weight(name) for name in "ab") == 1.0


def test_the_task_that_still_improves_gets_more():
    scheduler = TaskScheduler()
    scheduler.add("stuck", size=1000)
    scheduler.add("improving", size=1000)
    given = spend(scheduler, 16, improving({"stuck": 1.0, "improving": 1.0}, {"stuck": 1.0, "improving": 0.85}))
    assert given.count("improving") > given.count("stuck")


def test_a_task_at_its_peak_waits():
    scheduler = TaskScheduler()
    scheduler.add("at its peak", size=1000, floor_secs=0.99)
    scheduler.add("far from it", size=1000, floor_secs=0.2)
    given = spend(scheduler, 8, lambda name, n: 1.0)
    assert given.count("far from it") > given.count("at its peak")


def test_an_explored_space_promises_less():
    scheduler = TaskScheduler()
    scheduler.add("small", size=20)
    scheduler.add("large", size=1000)
    given = spend(scheduler, 7, lambda name, n: 1.0)
    assert given.count("large") > given.count("small")


def test_ends_when_nothing_improves():
    scheduler = TaskScheduler(patience=3)
    scheduler.add("a", size=1000)
    scheduler.add("b", size=1000)
    given = spend(scheduler, 100, lambda name, n: 1.0)
    assert given.count("a") == given.count("b") == 4
    assert scheduler.next() is None
    assert scheduler.finished("a")


def test_an_improvement_within_noise_does_not_count():
    scheduler = TaskScheduler(patience=3)
    scheduler.add("a", size=1000)
    assert len(spend(scheduler, 100, lambda name, n: 1.0 - 0.001 * n)) < 10


def test_an_exhausted_task_gets_nothing_more():
    scheduler = TaskScheduler()
    scheduler.add("a", size=8)
    scheduler.add("b", size=1000)
    scheduler.update("b", [1.0])
    scheduler.update("a", [1.0], exhausted=True)
    assert scheduler.finished("a")
    assert scheduler.next() == "b"
    scheduler.add("whole", size=2, known=[1.0, None])
    assert scheduler.finished("whole")


def test_a_task_that_only_fails_weighs_like_the_heaviest_until_given_up():
    scheduler = TaskScheduler(patience=3)
    scheduler.add("works", calls=2, size=1000)
    scheduler.add("fails", size=1000)
    given = spend(scheduler, 100, lambda name, n: 0.5 if name == "works" else None)
    assert scheduler.weight("fails") == scheduler.weight("works") == 0.5
    assert given.count("fails") == 3


def test_what_is_known_counts_as_a_batch():
    scheduler = TaskScheduler()
    scheduler.add("resumed", size=1000, known=[2.0, None, 1.0])
    scheduler.add("new", size=1000)
    assert scheduler.next() == "new"
    assert scheduler.tasks["resumed"].best_secs == 1.0
    assert scheduler.tasks["resumed"].trials == 3


def test_is_deterministic():
    runs = []
    for _ in range(2):
        scheduler = TaskScheduler()
        for i in range(5):
            scheduler.add(f"task {i}", calls=i + 1, size=500)
        runs.append(spend(scheduler, 40, lambda name, n: 0.9**n))
    assert runs[0] == runs[1]
