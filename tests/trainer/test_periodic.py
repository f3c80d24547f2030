"""What is due after a step, by hand."""

from types import SimpleNamespace

from trainer.loop import periodic
from trainer.loop.periodic import PeriodicTasks, count_saves

ALL = {"log", "validate", "save"}


def done(bad=(), **intervals) -> dict[int, set[str]]:
    """Seven steps, of which some were bad -> what is done after each, where there is anything."""
    defaults = dict(log_interval=2, save_interval=3, save_minutes=None, val_interval=0)
    tasks, found = PeriodicTasks(SimpleNamespace(**defaults | intervals), total_steps=7), {}
    for step in range(1, 8):
        found[step] = tasks.defer_if_bad(tasks.due(step), step, sound=step not in bad)
    return {step: names for step, names in found.items() if names}


def test_intervals_and_the_last_step():
    """--val_interval 0 validates at every save; the last step has everything."""
    assert done() == {2: {"log"}, 3: {"validate", "save"}, 4: {"log"}, 6: ALL, 7: ALL}
    assert done(save_interval=0, val_interval=4) == {2: {"log"}, 4: {"log", "validate"}, 6: {"log"}, 7: ALL}


def test_saving_by_time(monkeypatch):
    """By steps, by minutes, by whichever is first; and with neither every 500 steps, if ten minutes have passed."""
    clock = [0.0]
    monkeypatch.setattr(periodic.time, "monotonic", lambda: clock[0])
    make = lambda **given: PeriodicTasks(
        SimpleNamespace(**dict(log_interval=9999, val_interval=9999, save_interval=None, save_minutes=None) | given),
        9999,
    )
    by_steps, by_time, both, neither = (
        make(save_interval=4),
        make(save_minutes=2),
        make(save_interval=4, save_minutes=2),
        make(),
    )
    assert by_steps.due(4, False) and not by_steps.due(5, True)
    assert by_time.due(5, True) and not by_time.due(4, False)
    assert both.due(4, False) and both.due(5, True) and not both.due(5, False)
    assert neither.due(500, True) and not neither.due(500, False) and not neither.due(499, True)
    clock[0] = 119.0
    assert not by_time.time_to_save()
    clock[0] = 120.0
    assert by_time.time_to_save() and not neither.time_to_save()
    by_time.saved()
    assert not by_time.time_to_save()
    clock[0] = 600.0
    assert neither.time_to_save()


def test_how_often_a_run_saves():
    """1,003 steps of half a second: every 100 steps are 11 saves, every 2 minutes (240 steps) 5. By default every 1,500
    steps, the first multiple of 500 after 10 minutes (1,200 steps): once. 3 seconds a step: every 500."""
    count = lambda seconds, **given: count_saves(
        SimpleNamespace(**dict(save_interval=None, save_minutes=None) | given), 1003, seconds
    )
    assert count(0.5, save_interval=100) == 11 and count(0.5, save_minutes=2) == 5 and count(0.5, save_interval=0) == 1
    assert count(0.5) == 1 and count(3.0) == 3


def test_a_bad_step_puts_off_validating_and_saving():
    """Steps 3 and 4 are bad: what was due at 3 is done after 5, and the log of 4 is written all the same."""
    assert done(bad=(3, 4)) == {2: {"log"}, 4: {"log"}, 5: {"validate", "save"}, 6: ALL, 7: ALL}
    assert done(bad=(6, 7))[6] == {"log"} and done(bad=(6, 7))[7] == ALL
